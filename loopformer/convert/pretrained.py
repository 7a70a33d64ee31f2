"""Models of Hugging Face folders and GGUF files, read in: decoders of Llama's kind, looped models as they are
published, and what `export` wrote."""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import numpy as np

from loopformer import plans, reading, sharding, storage
from loopformer.cells.damped import Damped
from loopformer.convert import adapters, description, gguf, kinds, llama, official, own, published, table, tensors
from loopformer.convert.retrofit import adapter as new_adapter, recurrent
from loopformer.convert.table import HEAD, Entry
from loopformer.convert.tensors import Tensors
from loopformer.data.chat import ChatTokenizer
from loopformer.data.tokenizer import (
  MODEL,
  ByteTokenizer,
  GivenPieces,
  JsonTokenizer,
  Tokenizer,
  id_of,
  json_text,
  json_tokenizer,
)
from loopformer.model import Looped, parameter_roles, parameter_shapes
from loopformer.nn.layers import DTYPES
from loopformer.types import Array, ConfigError, Params, config_dataclass, real, whole

CONFIG, TOKENIZER, TOKENIZER_CONFIG = 'config.json', 'tokenizer.json', 'tokenizer_config.json'
GENERATION, TEMPLATE, SPECIAL = 'generation_config.json', 'chat_template.jinja', 'special_tokens_map.json'
ADDED = 'added_tokens.json'  # by name, of tokenizers without a tokenizer.json
NAMED = ('bos_token', 'eos_token', 'unk_token', 'sep_token', 'pad_token', 'cls_token',
         'mask_token')  # that templates read
AGAIN = 'download it again'
EMBEDDING = 'model.embed_tokens.weight'


def from_pretrained(folder: str | Path, *, loops: int | None = None, prelude: int = 0, coda: int = 0,
                    damped: float | None = None, retrofit: int | None = None, dtype: str | None = None,
                    mesh: jax.sharding.Mesh | None = None, adapter: str | Path | None = None
                    ) -> tuple[Looped, Params, Tokenizer | None]:
  """(model, params, tokenizer) of a pretrained model; params are float32, with the tree of `model.init_params`.

  Llama, Mistral, Qwen2, Qwen3 and OLMo 2 (and models that call themselves so, such as SmolLM2) become `Looped` with a
  plain cell and one loop. A plain stack is what `retrofit` takes; with `prelude` and `coda`, the layers between them
  are the loop. Looped models that say in config.json whose they are (Ouro, Nanbeige, Parcae, Huginn, LoopFormer's) are
  read as they run there. What `export` wrote under our own names comes back as it was, bit for bit.

  Args:
    folder: of config.json and model.safetensors (or the files of its index), or a .gguf file; of a bucket, it is copied
      to `storage.cache()` first.
    loops: steps of the loop; one for a plain decoder, the model's own for others.
    prelude, coda: the first and the last so many layers are outside the loop; 0 for a model that is looped already.
    damped: the share of its way that every step goes (`cells.damped.Damped`), so that a plain decoder loops without
      training; None for whole steps.
    retrofit: retrofitted recurrence (retrofit.py): so many layers after the prelude are dropped, and every step of the
      loop over those that are left takes the prelude's output in again, by an adapter that is new, as is the state that
      the loop begins with. Such a model must be trained before it is of use.
    dtype: of the matrix products, 'float32' (the default) or 'bfloat16'; an export of ours keeps its own.
    mesh: None for one device, or the mesh that the parameters are divided over, as of `loopformer.load`. Tensors are
      read one at a time (stacks of layers whole), and every device gets its own part.

    adapter: a folder of a LoRA adapter of PEFT, which is added to the weights of a decoder.

  Raises:
    ConfigError: no such folder, an architecture that is not read, or a tensor that is missing, surplus, misshapen or
      cut off; all that is found before weights are read.
    ImportError: a K-quant without the extra `hf`.
  """
  if loops is not None:
    plans.count('loops', loops)
  if adapter is not None and str(folder).endswith('.gguf'):
    raise ConfigError(f'adapter = {adapter}: tensors of a .gguf file have other names; give the Hugging Face folder')
  if damped is not None:
    real('damped', damped, '(0, 1]')
    if retrofit is not None:
      raise ConfigError(f'damped = {damped}, retrofit = {retrofit}: two ways to make a loop of a decoder; give one')
  if dtype not in (None, *DTYPES):
    raise ConfigError(f'dtype = {dtype!r}: use one of {", ".join(DTYPES)}')
  given, dtype = dtype, dtype or 'float32'
  path = storage.fetched(folder, beside=(TOKENIZER, TOKENIZER_CONFIG, GENERATION, TEMPLATE, SPECIAL,
                                         *(part.name for part in gguf.parts(Path(str(folder))))))
  if path.suffix == '.gguf' and path.is_file():
    metadata, held = gguf.read(path)
    with reading.naming(path, AGAIN):
      decoder = gguf.read_config(metadata, held, path)
      naming = gguf.NAMINGS[decoder.family]
      inside = None if (path.parent / TOKENIZER).exists() else gguf.read_tokenizer(metadata, path)
    both, held = path, held.only(set(held) - {gguf.FACTORS})
    tokenizer = read_tokenizer(path.parent, gguf.special_ids(metadata), inside, metadata.get('tokenizer.chat_template'))
  else:
    config = _read_json(path / CONFIG)
    if adapter is None and (path / adapters.CONFIG).exists():
      raise ConfigError(f'{path}: it holds an adapter beside the model ({adapters.CONFIG}); give adapter={path}, and '
                        f'it is added, or take {adapters.CONFIG} away')
    ours = config.get('model_type') == description.MODEL_TYPE and 'n_embd' not in config
    kind = None if ours else published.kind_of(config)
    if kind is not None:
      _check_uncut(path, prelude=prelude, coda=coda, damped=damped, retrofit=retrofit)
      if adapter is not None:
        raise ConfigError(f'adapter = {adapter}: {path} holds a looped model, and adapters are added to plain decoders '
                          'alone; merge it with PEFT (merge_and_unload), and give what it saves')
      tokenizer = read_tokenizer(path, config)
      return *official.from_official(kind, path, loops=loops, dtype=dtype, mesh=mesh), tokenizer
    held = tensors.read_folder(path)
    if not ours:
      with reading.naming(path, AGAIN):
        held = tensors.bare(held)
    held = held if adapter is None else adapters.with_adapter(held, adapter)
    both = f'{path / CONFIG} and {tensors.NAME if (path / tensors.NAME).exists() else tensors.INDEX} beside it'
    if ours:
      _check_uncut(path, prelude=prelude, coda=coda, damped=damped, retrofit=retrofit)
      with reading.naming(path / CONFIG, AGAIN):
        model = own.untied(description.decode(config, path / CONFIG), held)
        if given not in (None, model.dtype):
          raise ConfigError(f'dtype = {given!r}: it is an export of a model whose products are in {model.dtype}, which '
                            'it keeps; leave it out')
        model = model if loops is None else model.clone(loops=loops)
        layers = max((stack.depth for stack in model.stacks().values()), default=0)
        if layers > max((len(held), *(axis for shape in held.shapes.values() for axis in shape))):
          raise ConfigError(f'{both}: a stack is said to have {layers} layers, more than any tensor has rows; the '
                            'configuration and the weights are not of one model')
        put = sharding.placer(mesh, parameter_roles(model))
        params = read_own(model, held, both, put)
      return model, params, read_tokenizer(path, config)
    with reading.naming(path / CONFIG, AGAIN):
      decoder, naming = llama.read_config(config, path / CONFIG), llama.HUGGING_FACE
    tokenizer = read_tokenizer(path, config)
  if decoder.layers > len(held):
    raise ConfigError(f'{both}: it is said to have {decoder.layers} layers, but there are {len(held)} tensors; the '
                      'configuration and the weights are not of one model')
  kept = list(range(decoder.layers))
  if retrofit is not None:
    llama.cut(decoder, prelude + whole('retrofit', retrofit, 0), coda)
    kept = kept[:prelude] + kept[prelude + retrofit:]
  cut = dataclasses.replace(decoder, layers=len(kept))
  model = llama.model_of(cut, loops=loops, prelude=prelude, coda=coda, dtype=dtype)
  model = model if damped is None else model.clone(cell=Damped(model.cell, damped))
  model = model if retrofit is None else recurrent(model)
  put = sharding.placer(mesh, parameter_roles(model))
  places = llama.places(*map(range, llama.cut(cut, prelude, coda)))
  params = read_decoder(decoder, llama.entries(decoder, places, _Numbered(naming=naming, numbers=kept)),
                        _without(held, naming, set(range(decoder.layers)) - set(kept)), both, put)
  if retrofit is not None:
    new = {path: put(path, np.asarray(leaf)) for path, leaf in new_adapter(model).items()}
    params = unflatten_dict({**flatten_dict(params, sep='/'), **new}, sep='/')
  return model, params, tokenizer


@config_dataclass
class _Numbered:
  """A naming of layers that are some of a decoder's: layer i is its layer numbers[i]."""
  naming: llama.Naming
  numbers: Sequence[int]

  @property
  def turn(self) -> str:
    return self.naming.turn

  def __call__(self, name: str, layer: int | None = None) -> str:
    return self.naming(name, None if layer is None else self.numbers[layer])


def _without(held: Tensors, naming: llama.Naming, layers: set[int]) -> Tensors:
  """The tensors but those of some layers."""
  begin = tuple(naming.layer.format(layer) for layer in layers)
  return held.only({name for name in held.shapes if not name.startswith(begin)}) if begin else held


def _check_uncut(path: Any, **given: Any):
  """Raises ConfigError where a model that is looped already was to be made to loop."""
  if any(given.values()) or given['retrofit'] is not None:
    raise ConfigError(f'{", ".join(f"{name} = {value}" for name, value in given.items())}: {path} holds a looped '
                      'model, whose layers are not cut again; leave them out')


def read_decoder(decoder: llama.Decoder, entries: Sequence[Entry], held: Tensors, path: Any,
                 put: Callable[[str, np.ndarray], Array]) -> Params:
  """Parameters out of tensors that lie where `entries` say; buffers and the copy of a tied head are passed over."""
  if decoder.tied and EMBEDDING not in held and HEAD in held:  # of shared tensors some writers keep the first by name
    held = Tensors({EMBEDDING if name == HEAD else name: held.tensor(name) for name in held})
  given = {name: shape for name, shape in held.shapes.items() if not name.endswith('rotary_emb.inv_freq')}
  head = given.pop(HEAD, None) if decoder.tied else None
  if not decoder.tied and EMBEDDING in given and HEAD not in given:
    raise ConfigError(f'{path}: tensor {HEAD!r} is missing; where the embedding is the head, write '
                      '"tie_word_embeddings": true in config.json, or else download the weights again')
  tensors.compare(table.shapes(entries, decoder.sizes)[0], given, path)
  own.check_floats(held, given, path)
  if head is not None and not np.array_equal(held[HEAD], held[EMBEDDING]):
    raise ConfigError(f'{path}: tensor {HEAD!r} differs from the embedding, though tie_word_embeddings is true; set '
                      'that to false in config.json')
  return unflatten_dict(table.to_ours(entries, held, decoder.sizes, put), sep='/')


def read_own(model: Looped, held: Tensors, path: Any, put: Callable[[str, np.ndarray], Array]) -> Params:
  """Parameters under our own names."""
  shapes = flatten_dict(parameter_shapes(model), sep='/')
  return own.read({name: leaf.shape for name, leaf in shapes.items()}, held, path, put)


def read_tokenizer(folder: Path, config: dict[str, Any], given: Tokenizer | None = None, template: str | None = None
                   ) -> Tokenizer | None:
  """The tokenizer that lies in a folder, of an export of ours as it was, with the ids that end what a model says and
  the template of its chats; None where there is none.

  Args:
    config: config.json, whose `eos_token_id` counts where no generation_config.json has one.
    given, template: those of a file that holds its own.

  Raises:
    ConfigError: nothing says which id ends a text, or an id that the tokenizer does not have.
  """
  about, generation, special = (_read_json(folder / name) if (folder / name).exists() else {}
                                for name in (TOKENIZER_CONFIG, GENERATION, SPECIAL))
  # As in transformers: what newer versions wrote is whole, and to what older ones did the map of tokens is added.
  about = special | about if 'added_tokens_decoder' in about else about | special
  wrong = [name for name in NAMED if not isinstance(_content(about.get(name)), str | None)]
  wrong += ['added_tokens_decoder'] * (not isinstance(about.get('added_tokens_decoder'), dict | None))
  if wrong:
    raise ConfigError(f'{folder / TOKENIZER_CONFIG}: {wrong[0]} = {about[wrong[0]]!r}: it is no name of a token, and '
                      f'no table of them; {AGAIN}')
  found = given or _plain_tokenizer(folder, config, about)
  if found is None:
    return None
  where = GENERATION if generation.get('eos_token_id') is not None else CONFIG
  ends = (generation if where == GENERATION else config).get('eos_token_id')
  ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
  wrong = [end for end in ends if type(end) is not int or not 0 <= end < found.vocab_size]
  if wrong and len(ends) > 1:
    raise ConfigError(f'{folder / where}: eos_token_id = {ends}: {wrong[0]!r} is none of the {found.vocab_size} ids of '
                      'the tokenizer; correct it')
  stops = tuple(end for end in dict.fromkeys(ends) if end != found.eos and end not in wrong)
  template = _template(folder, about) or template
  start = _start(found, about, config)
  if not stops and template is None and start is None:
    return found
  names = {'bos_token': _name_of(found, config.get('bos_token_id')), 'eos_token': _name_of(found, found.eos)} | {
      name: _content(about[name]) for name in NAMED if name in about}
  with reading.naming(folder, 'correct it'):
    return ChatTokenizer(of=found, stops=stops, template=template, start=start,
                         names=tuple((name, value) for name, value in names.items() if value is not None))


BEGUN = ('LlamaTokenizer', 'LlamaTokenizerFast', 'CodeLlamaTokenizer', 'CodeLlamaTokenizerFast')


def _start(found: Tokenizer, about: dict[str, Any], config: dict[str, Any]) -> int | None:
  """The id that transformers' tokenizer begins a text with: as its configuration says or its class does, or else its
  post-processor."""
  said = about.get('add_bos_token', config.get('add_bos_token'))
  said = True if said is None and about.get('tokenizer_class') in BEGUN else said
  if said is None:
    return found.added_first if isinstance(found, JsonTokenizer) else None
  if not said:
    return None
  return found.specials().get(_content(about['bos_token'])) if 'bos_token' in about else config.get('bos_token_id')


def _plain_tokenizer(folder: Path, config: dict[str, Any], about: dict[str, Any]) -> Tokenizer | None:
  if about.get(description.MODEL_TYPE) == 'bytes':
    return ByteTokenizer()
  if (folder / MODEL).exists() and (about.get(description.MODEL_TYPE) == 'pieces' or
                                    not (folder / TOKENIZER).exists()):
    found = GivenPieces(path=str(folder / MODEL)).build(())
    _check_added(folder, MODEL, found.known(), about)
    return found
  if not (folder / TOKENIZER).exists():
    return None
  text, named, numbered = json_text(folder / TOKENIZER), about.get('eos_token'), config.get('eos_token_id')
  if named:
    numbered = id_of(text, str(_content(named)), f'{folder / TOKENIZER}, whose {TOKENIZER_CONFIG} names eos_token')
  if numbered is None or numbered == []:
    raise ConfigError(f'{folder}: neither eos_token in {TOKENIZER_CONFIG} nor eos_token_id in {CONFIG}, and texts must '
                      'end; write one of them')
  found = json_tokenizer(text, numbered[0] if isinstance(numbered, list) else numbered, folder / TOKENIZER)
  _check_added(folder, TOKENIZER, found.known(), about)
  return found


def _check_added(folder: Path, name: str, known: set[str], about: dict[str, Any]):
  """Raises ConfigError where other files add tokens to those that a tokenizer knows, but for that of padding, which no
  text has."""
  added = list(_read_json(folder / ADDED)) if (folder / ADDED).exists() else []
  added += [_content(token) for token in (about.get('added_tokens_decoder') or {}).values()]
  more = [token for token in added if token not in known and token != _content(about.get('pad_token'))]
  if more:
    raise ConfigError(f'{folder}: other files add {more[0]!r} to the tokens of {name}; put a {TOKENIZER} there that '
                      'has all of them, which transformers writes '
                      '(AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER))')


def _content(token: Any) -> Any:
  """The text of a token, which stands there as it is or in an object."""
  return token.get('content') if isinstance(token, dict) else token


def _name_of(tokenizer: Tokenizer, token: Any) -> str | None:
  """What a special token is called, by its id."""
  return next((name for name, i in tokenizer.specials().items() if i == token), None)


def _template(folder: Path, about: dict[str, Any]) -> str | None:
  """The chat template of a folder; of several, the one that is called default."""
  if (folder / TEMPLATE).exists():
    return reading.text(folder / TEMPLATE, AGAIN)
  found = about.get('chat_template')
  if isinstance(found, list):
    named = {row.get('name'): row.get('template') for row in found if isinstance(row, dict)}
    found = next(iter(named.values())) if len(named) == 1 else named.get('default')
    if found is None and named:
      raise ConfigError(f'{folder / TOKENIZER_CONFIG}: chat_template has {", ".join(map(repr, named))}, and none is '
                        f'called default; write the one that you want as {TEMPLATE}')
  if not isinstance(found, str | None):
    raise ConfigError(f'{folder / TOKENIZER_CONFIG}: chat_template is {type(found).__name__}, not text; {AGAIN}')
  return found


def _read_json(path: Path) -> dict[str, Any]:
  if path.name == CONFIG and not path.exists() and (path.parent / adapters.CONFIG).exists():
    raise ConfigError(f'{path.parent}: it holds an adapter and no model; give the folder of the model that it was '
                      f'trained on, with adapter={path.parent}')
  if not path.exists():
    raise ConfigError(f'{path}: there is no such file; give the folder of a model with {CONFIG} and safetensors, or a '
                      '.gguf file')
  found = reading.read_json(path, AGAIN)
  if path.name in (CONFIG, TOKENIZER_CONFIG):
    kinds.check(found, path)
  return found
