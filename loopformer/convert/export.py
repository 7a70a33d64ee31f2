"""Models as Hugging Face folders: config.json, safetensors, tokenizer, and the code that computes them where needed.

    loopformer.convert.export(model, params, tokenizer, 'out')
    transformers.AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)

A loop whose steps are all alike, of the layers that Llama has, is a Llama of N * L layers and is written as one; so is
its relative with norms or biases (Qwen). Other models are written under our own names, with `modeling_loopformer.py`.
Updates of low rank (nn/low_rank.py) that all loops share are merged into the weights, and those of each loop too where
its layers are written out.
"""
from __future__ import annotations

from collections.abc import Callable
import json
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any
import uuid

from flax.traverse_util import flatten_dict
import numpy as np

import loopformer
from loopformer import storage
from loopformer.cells.plain import Plain
from loopformer.convert import description, llama, own, table, tensors
from loopformer.convert.pretrained import CONFIG, GENERATION, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from loopformer.data.chat import ChatTokenizer
from loopformer.data.tokenizer import MODEL, ByteTokenizer, PieceTokenizer, Tokenizer, ends_of, start_of
from loopformer.model import Looped, parameter_shapes
from loopformer.nn import low_rank
from loopformer.nn.layers import DTYPES
from loopformer.training import processes
from loopformer.types import ConfigError, Params, config_dataclass

MODELING = 'modeling_loopformer.py'
WRITTEN = (CONFIG, GENERATION, TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, MODEL, MODELING, tensors.INDEX)
WRITER = 'loopformer_version'  # a field of config.json by which an export is known
KINDS = {ByteTokenizer: 'bytes', PieceTokenizer: 'pieces'}


@config_dataclass
class Exported:
  """What was written. model_type: that of config.json; reason: why it is not a decoder that transformers knows, empty
  where it is; tokenizer: whether there is one beside it."""
  model_type: str
  reason: str
  tokenizer: bool


def export(model: Looped, params: Params, tokenizer: Tokenizer | None, folder: str | Path, *, dtype: str = 'float32',
           shard_bytes: int = 5_000_000_000) -> Exported:
  """Writes a model so that transformers, and `from_pretrained`, load it.

  The folder appears when all is written, and an earlier export in it is replaced only then. Tensors are gathered from
  the devices that hold them, made and written one at a time. With several processes all of them call this, and the
  leader writes. The loop of a decoder is unrolled `model.loops` times; `model.clone(loops=...)` for others.

  Args:
    model, params: as `loopformer.load` gives them.
    tokenizer: None for none; one that has no counterpart there is left out.
    folder: a new one, an empty one, or an earlier export; of this machine or of a bucket, whose config.json is written
      last.
    dtype: of the tensors, 'float32' or 'bfloat16'.
    shard_bytes: the most bytes of a file, if it holds more than one tensor.

  Raises:
    ConfigError: a part that cannot be exported, parameters that are not the model's, a bad argument, or a folder with
      other files in it.
  """
  folder = storage.path(folder)
  folder = folder if storage.remote(folder) else folder.absolute()
  storage.check(folder, 'folder', writes=True)
  if dtype not in DTYPES:
    raise ConfigError(f'dtype = {dtype!r}: use one of {", ".join(DTYPES)}')
  table.check_count('shard_bytes', shard_bytes)
  flat = flatten_dict(params, sep='/')
  expected = flatten_dict(parameter_shapes(model), sep='/')
  tensors.compare({path: leaf.shape for path, leaf in expected.items()},
                  {path: leaf.shape for path, leaf in flat.items()}, 'params')
  model, params = without_updates(model, params)
  flat = flatten_dict(params, sep='/')
  expected = flatten_dict(parameter_shapes(model), sep='/')
  decoder, reason = llama.decoder_of(model)
  if decoder is None:
    places = own.places({path: leaf.shape for path, leaf in expected.items()})
    config = _own_config(model, {key: list(place.shape) for key, place in places.items()})
    held = {key: (place.shape, _reader(place, flat[place.path])) for key, place in places.items()}
  else:
    config, held = _decoder_config_and_tensors(model, decoder, flat)
  eos, ends = (None, None) if tokenizer is None else (tokenizer.eos, list(ends_of(tokenizer)))
  ends = ends if ends is None or len(ends) > 1 else eos
  # The classes of transformers give the token of padding that config.json names no gradient, and ours ends texts.
  start = start_of(tokenizer)
  config |= {'dtype': dtype, 'torch_dtype': dtype, 'bos_token_id': start, 'pad_token_id': None if decoder else eos,
             'eos_token_id': ends, 'use_cache': True, WRITER: loopformer.__version__}
  files = {} if tokenizer is None else _tokenizer_files(tokenizer, model.read_in.length)
  files[GENERATION] = {'bos_token_id': start, 'pad_token_id': eos, 'eos_token_id': ends, 'use_cache': True}
  if tokenizer is not None and tokenizer.vocab_size < model.outputs:  # rows of the head that no text has
    files[GENERATION]['suppress_tokens'] = list(range(tokenizer.vocab_size, model.outputs))
  if decoder is None:
    files[MODELING] = Path(__file__).with_name(MODELING).read_bytes()
  check_target(folder)
  if processes.is_leader():
    _replace(folder, lambda temporary: _write(temporary, config, held, files, dtype, shard_bytes))
  else:
    for _, make in held.values():  # in which all processes take part
      make()
  return Exported(model_type=config['model_type'], reason=reason, tokenizer=TOKENIZER in files)


def without_updates(model: Looped, params: Params) -> tuple[Looped, Params]:
  """The same function without updates of low rank that can be merged into weights; where every loop has one of its own,
  as layers that are written out, if these are a plain decoder's. Raises ConfigError where shared ones cannot be merged.
  """
  model, params = low_rank.merged(model, params)
  if not low_rank.has_one_a_loop(model):
    return model, params
  if type(model.cell) is not Plain:  # whose layers cannot be written out
    return model, params
  written = low_rank.written_out(model, params)
  return (model, params) if llama.decoder_of(written[0])[0] is None else written


def _own_config(model, shapes) -> dict[str, Any]:
  module, architecture = MODELING.removesuffix('.py'), 'LoopformerForCausalLM'
  block = model.cell.core.block
  groups, head = block.heads_of(model.read_in.width)
  return {
      'architectures': [architecture], 'model_type': description.MODEL_TYPE,
      'auto_map': {'AutoConfig': f'{module}.LoopformerConfig', 'AutoModelForCausalLM': f'{module}.{architecture}'},
      'vocab_size': model.read_in.vocab, 'hidden_size': model.read_in.width,
      'num_attention_heads': getattr(block, 'blocks', (block,))[0].attn.heads, 'num_key_value_heads': groups,
      'head_dim': head,
      'max_position_embeddings': model.read_in.length, 'loops': model.loops,
      'tie_word_embeddings': 'lm_head.weight' not in shapes, 'description': description.encode(model), 'shapes': shapes,
  }


def _decoder_config_and_tensors(model, decoder, flat):
  order = llama.unrolled(model)
  config = llama.write_config(decoder) | {'num_hidden_layers': len(order)}
  entries = llama.entries(decoder, order)

  def maker(entry):
    shape, _ = entry.row.shapes(decoder.sizes)

    def make() -> np.ndarray:
      array = np.empty(shape, np.float32)
      target, source = entry.row.views(array, processes.fetch(entry.of(flat)), decoder.sizes)
      target[...] = source
      return array

    return shape, make

  return config, {entry.key: maker(entry) for entry in entries}


def _reader(place: own.Place, leaf) -> Callable[[], np.ndarray]:
  return lambda: place.turn(processes.fetch(place.of(leaf)))


def _tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, Any]:
  """File name -> contents, of a tokenizer that transformers' AutoTokenizer loads, where there is one."""
  chat = tokenizer if isinstance(tokenizer, ChatTokenizer) else None
  tokenizer = chat.of if chat else tokenizer
  text = tokenizer.hugging_face()
  files: dict[str, Any] = {MODEL: tokenizer.model} if isinstance(tokenizer, PieceTokenizer) else {}
  if text is None and not files:
    return {}
  about = {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': length,
           'model_input_names': ['input_ids', 'attention_mask'], 'padding_side': 'left',
           'clean_up_tokenization_spaces': False, description.MODEL_TYPE: KINDS.get(type(tokenizer), 'json')}
  if text is not None:
    added = {token['id']: token['content'] for token in json.loads(text)['added_tokens']}
    files[TOKENIZER] = text.encode()
    about['eos_token'] = about['pad_token'] = added[tokenizer.eos]
    if chat:  # what its template reads, where it is not ours to say
      about = {name: value for name, value in chat.names if value in added.values()} | about
  first = next((name for name, i in chat.specials().items() if i == chat.start), None) if chat else None
  if first is not None:
    about |= {'add_bos_token': True, 'bos_token': first}
  if chat and chat.template is not None:
    files[TEMPLATE] = chat.template.encode()
  return files | {TOKENIZER_CONFIG: about}


def _write(folder: Path, config, held, files, dtype, shard_bytes):
  tensors.write_folder(folder, held, dtype, shard_bytes)
  for name, contents in files.items():
    (folder / name).write_bytes(contents if isinstance(contents, bytes) else _json(contents))
  (folder / CONFIG).write_bytes(_json(config))


def _json(value: Any) -> bytes:
  return (json.dumps(value, indent=1) + '\n').encode()


def check_target(folder: Any):
  """Raises ConfigError where something lies that an export must not replace."""
  if not folder.exists():
    return
  if not folder.is_dir():
    raise ConfigError(f'folder = {folder}: it is a file; give another name')
  names = sorted(path.name for path in folder.iterdir())
  if not names:
    return
  strange = [name for name in names if name not in WRITTEN and not name.endswith('.safetensors')]
  config = folder / CONFIG
  if strange or not config.is_file() or WRITER not in json.loads(config.read_text()):
    raise ConfigError(f'folder = {folder}: it holds {(strange or names)[0]!r} and is no earlier export, which could be '
                      'replaced; give a new folder')


def _replace(folder: Any, write: Callable[[Path], None]):
  """Writes into a folder beside, which takes the place of `folder` when it is complete."""
  if storage.remote(folder):
    with tempfile.TemporaryDirectory() as beside:
      write(Path(beside))
      old = [file for file in folder.iterdir() if file.name not in os.listdir(beside)] if folder.exists() else []
      storage.upload(Path(beside), folder, last=CONFIG)
    for file in old:
      file.unlink()
    return
  folder.parent.mkdir(parents=True, exist_ok=True)
  beside = folder.with_name(f'.{folder.name}.{uuid.uuid4().hex[:8]}')
  old = beside.with_name(f'{beside.name}.old')
  try:
    beside.mkdir()
    write(beside)
    if folder.exists():
      folder.rename(old)
    try:
      beside.rename(folder)
    except BaseException:
      if old.exists():
        old.rename(folder)
      raise
  except BaseException:
    shutil.rmtree(beside, ignore_errors=True)
    raise
  shutil.rmtree(old, ignore_errors=True)
