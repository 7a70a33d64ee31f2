"""Decoders of Llama's kind (Llama, Mistral, Qwen2, Qwen3, OLMo 2, SmolLM2) as looped models, and the way back; and
Nanbeige, whose stack runs several times.

    model.embed_tokens.weight             V D   read_in/embedding; lm_head.weight V D read_out/kernel, if not tied
    model.norm.weight                     D     read_out/norm
    model.layers.{i}.
      input_layernorm.weight              D     norm_attn
      post_attention_layernorm.weight     D     norm_mlp
      self_attn.{q, k, v}_proj.weight     .. D  attn/qkv; .bias: attn/{q, k, v}_bias (Qwen2)
      self_attn.{q, k}_norm.weight        d     attn/norm_{q, k} (Qwen3); of all heads together, H d and G d (OLMo 2)
      self_attn.o_proj.weight             D Hd  attn/out
      mlp.{gate, up}_proj.weight          F D   mlp/up: the half that passes the SiLU first
      mlp.down_proj.weight                D F   mlp/down

In OLMo 2 norms stand after the branches: post_attention_layernorm is n2, post_feedforward_layernorm n4, and there is no
input_layernorm. Nanbeige's model.norm ends every loop: cell/norm.

PyTorch's matrices are [out, in], ours [in, out]. Rotary positions turn pairs of channels: in Llama a pair is a channel
of the first half of a head and one of the second, here (`positions.Rotary`) they are neighbours. So the channels of
queries and keys (their matrices, biases and norms) change places; scores, the sums over pairs, do not notice.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any, Protocol

from flax import linen as nn

from loopformer import config as configs, reading
from loopformer.cells.plain import Normed, Plain
from loopformer.convert import published
from loopformer.convert.table import HEAD, Entry, Row, Span, check_count, row
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, check_heads
from loopformer.nn.blocks import Block, PostNorm, PreNorm
from loopformer.nn.embed import Head, TiedHead, Tokens
from loopformer.nn.kernels import Blockwise, Cudnn, Fused, Splash
from loopformer.nn.layers import AcrossHeads, GatedMLP, Identity, RMSNorm
from loopformer.nn.positions import Rotary, StretchedRotary
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError, config_dataclass


@config_dataclass
class Family:
  """A kind of decoder.

  biased: which projections always have a bias; qk: what norm queries and keys have, 'head', each head its own, 'heads',
  all heads one, or '' none; post: whether norms stand after the branches, and none before them; eps: of norms, where a
  config.json does not say; looped: whether the stack runs as often as `num_loops` says, with a norm after each time.
  """
  architecture: str
  biased: tuple[str, ...] = ()
  qk: str = ''
  post: bool = False
  eps: float = 1e-6
  looped: bool = False


QKV, ALL = ('q', 'k', 'v'), ('q', 'k', 'v', 'out')
FAMILIES = {
    'llama': Family(architecture='LlamaForCausalLM'),
    'mistral': Family(architecture='MistralForCausalLM'),
    'qwen2': Family(architecture='Qwen2ForCausalLM', biased=QKV),
    'qwen3': Family(architecture='Qwen3ForCausalLM', qk='head'),
    'olmo2': Family(architecture='Olmo2ForCausalLM', qk='heads', post=True, eps=1e-5),
    'nanbeige': Family(architecture='NanbeigeForCausalLM', eps=1e-5, looped=True),
}


@config_dataclass
class Decoder:
  """All that a decoder is besides its weights.

  head: the width of a head, None: `width` divided by `heads`; length: the longest sequence; rotary: its positions;
  loops: how often the stack runs; between: whether there is a norm after each time, or after the last alone.
  """
  family: str
  vocab: int
  width: int
  hidden: int
  layers: int
  heads: int
  groups: int
  length: int
  rotary: Rotary
  eps: float
  tied: bool
  biased: tuple[str, ...] = ()
  head: int | None = None
  loops: int = 1
  between: bool = False

  def __post_init__(self):
    own = ('head',) if self.head else ()
    for name in ('vocab', 'width', 'hidden', 'layers', 'heads', 'groups', 'length', 'loops', *own):
      check_count(name, getattr(self, name))
      if name != 'layers' and getattr(self, name) >= 2 ** 31:  # too many layers are found by counting tensors
        raise ConfigError(f'{name} = {getattr(self, name)}: no tensor has so many rows')
    check_heads(self.heads, self.groups, self.heads * self.head if self.head else self.width)
    if self.head_width % 2:
      raise ConfigError(f'heads = {self.heads}: their width {self.head_width} is odd, and rotary positions '
                        'turn pairs of channels; this model cannot be read')

  @property
  def head_width(self) -> int:
    """d, the width of a head."""
    return self.head or self.width // self.heads

  @property
  def sizes(self) -> dict[str, int]:
    """By the letters of the layouts. q: queries, key and value of a group; e: its queries; r, f: halves of a head and
    places in one; m: gate and up."""
    head, each = self.head_width, self.heads // self.groups
    return dict(V=self.vocab, D=self.width, F=self.hidden, N=self.layers, H=self.heads, G=self.groups,
                d=head, r=2, f=head // 2, q=each + 2, e=each, m=2)

  @property
  def kind(self) -> Family:
    """What its family is."""
    return FAMILIES[self.family]


# Names ---------------------------------------------------------------------------------------------------------------


@config_dataclass
class Naming:
  """What tensors are called. layer: what precedes the names of layer {}; names: those that differ from the table above;
  turn: how the channels of a head lie, 'rf' half by half, 'fr' pair by pair."""
  layer: str = 'model.layers.{}.'
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  turn: str = 'rf'

  def __call__(self, name: str, layer: int | None = None) -> str:
    return ('' if layer is None else self.layer.format(layer)) + self.names.get(name, name)


HUGGING_FACE = Naming()
AGAIN = 'correct it, or download it again'


def end_rows(decoder: Decoder) -> list[Row]:
  """The weights outside layers."""
  rows = [row('model.embed_tokens.weight', 'read_in/embedding', 'V D'),
          row('model.norm.weight', 'cell/norm/scale' if decoder.between else 'read_out/norm/scale', 'D')]
  return rows if decoder.tied else [*rows, row(HEAD, 'read_out/kernel', 'V D')]


def layer_rows(decoder: Decoder, turn: str) -> list[Row]:
  """The weights of a layer, whose heads lie as `turn` says (`Naming`)."""
  queries, key, value = (Span(letter='q', start=start, count=count) for start, count in ((0, 'e'), (-2, 1), (-1, 1)))
  gate, up = (Span(letter='m', start=start, count=1) for start in (0, 1))
  kind = decoder.kind
  placed = ((('post_attention_layernorm', 'n2'), ('post_feedforward_layernorm', 'n4')) if kind.post else
            (('input_layernorm', 'norm_attn'), ('post_attention_layernorm', 'norm_mlp')))
  rows = [
      *(row(f'{theirs}.weight', f'{ours}/scale', 'D') for theirs, ours in placed),
      row('self_attn.q_proj.weight', 'attn/qkv/kernel', f'Gq{turn} D', 'D Gqfr', span=queries),
      row('self_attn.k_proj.weight', 'attn/qkv/kernel', f'Gq{turn} D', 'D Gqfr', span=key),
      row('self_attn.v_proj.weight', 'attn/qkv/kernel', 'Gqd D', 'D Gqd', span=value),
      row('self_attn.o_proj.weight', 'attn/out/kernel', 'D Hd', 'Hd D'),
      row('mlp.gate_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=gate),
      row('mlp.up_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=up),
      row('mlp.down_proj.weight', 'mlp/down/kernel', 'D F', 'F D'),
  ]
  biases = {'q': row('self_attn.q_proj.bias', 'attn/q_bias', f'H{turn}', 'H fr'),
            'k': row('self_attn.k_proj.bias', 'attn/k_bias', f'G{turn}', 'G fr'),
            'v': row('self_attn.v_proj.bias', 'attn/v_bias', 'Gd', 'G d'),
            'out': row('self_attn.o_proj.bias', 'attn/out/bias', 'D')}
  norms = [row(f'self_attn.{name}_norm.weight', f'attn/norm_{name}/scale', heads + turn, f'{heads}fr')
           for name, heads in (zip('qk', 'HG') if kind.qk == 'heads' else zip('qk', ('', '')))]
  return rows + [biases[name] for name in decoder.biased] + (norms if kind.qk else [])


class Names(Protocol):
  """What calls tensors, as `Naming` does."""

  @property
  def turn(self) -> str:
    """How the channels of a head lie."""

  def __call__(self, name: str, layer: int | None = None) -> str:
    """The name, of the table above, as it is in the file."""


def entries(decoder: Decoder, places: Sequence[tuple[str, int]], naming: Names = HUGGING_FACE) -> list[Entry]:
  """Every weight in its place; places: of each layer, the stack's path and the slot in it."""
  return ([Entry(key=naming(r.theirs), path=r.ours, row=r) for r in end_rows(decoder)] +
          [Entry(key=naming(r.theirs, i), path=f'{stack}/block/{r.ours}', row=r, slot=slot)
           for i, (stack, slot) in enumerate(places) for r in layer_rows(decoder, naming.turn)])


# Models --------------------------------------------------------------------------------------------------------------

STACKS = ('prelude', 'cell/core', 'coda')


def places(prelude: Iterable[int], core: Iterable[int], coda: Iterable[int]) -> list[tuple[str, int]]:
  """(path of a stack, slot) of the layers in the order in which they run."""
  return [(stack, slot) for stack, slots in zip(STACKS, (prelude, core, coda)) for slot in slots]


def cut(decoder: Decoder, prelude: int, coda: int) -> tuple[int, int, int]:
  """Layers of prelude, loop and coda. Raises ConfigError where the loop would have none."""
  for name, count in (('prelude', prelude), ('coda', coda)):
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
      raise ConfigError(f'{name} = {count!r}: give a number of layers, 0 or more')
  if prelude + coda >= decoder.layers:
    raise ConfigError(f'prelude = {prelude}, coda = {coda}: the model has {decoder.layers} layers, and none would be '
                      'left to loop over; give smaller numbers')
  return prelude, decoder.layers - prelude - coda, coda


def model_of(decoder: Decoder, *, loops: int | None = None, prelude: int = 0, coda: int = 0,
             dtype: str = 'float32') -> Looped:
  """The unbound model: the layers between prelude and coda are the loop, of the decoder's own steps if nothing else is
  said.

  Raises:
    ConfigError: no layer is left for the loop, or the whole stack is one already.
  """
  counts = cut(decoder, prelude, coda)
  if decoder.kind.looped and (prelude or coda):
    raise ConfigError(f'prelude = {prelude}, coda = {coda}: {decoder.family} loops over all of its layers; leave them '
                      'out')
  out_std = 0.02 / math.sqrt(2 * decoder.layers)

  def stack(depth: int) -> Stack:  # with a block of its own: one instance in two stacks would be one set of weights
    norm = RMSNorm(decoder.eps)
    normed = {'': None, 'head': norm, 'heads': AcrossHeads(norm)}[kind.qk]
    attn = SelfAttention(heads=decoder.heads, groups=decoder.groups, head=decoder.head, position=decoder.rotary,
                         out_std=out_std, biased=decoder.biased, norm=normed)
    mlp, placement = GatedMLP(hidden=decoder.hidden, out_std=out_std), PostNorm() if kind.post else PreNorm()
    return Stack(Block(attn=attn, mlp=mlp, norm=norm, placement=placement, dtype=dtype), depth)

  kind = decoder.kind
  before, core, after = (stack(depth) if depth else None for depth in counts)
  assert core is not None
  norm = Identity() if decoder.between else RMSNorm(decoder.eps)
  return Looped(read_in=Tokens(vocab=decoder.vocab, width=decoder.width, length=decoder.length),
                cell=Normed(core, RMSNorm(decoder.eps)) if decoder.between else Plain(core),
                read_out=TiedHead(norm) if decoder.tied else Head(outputs=decoder.vocab, norm=norm),
                loops=decoder.loops if loops is None else loops, prelude=before, coda=after)


def decoder_of(model: Looped) -> tuple[Decoder | None, str]:
  """The decoder that a model is when its loop is unrolled, and why there is none: the first part that differs.

  The layers of the decoder are those of the model as it is written, each once; see `unrolled`.
  """
  try:
    block = model.cell.core.block
    attn, stacks = block.attn, model.stacks().values()
    biased, width = tuple(getattr(attn, 'biased', ())), model.read_in.width
    normed = getattr(attn, 'norm', None) is not None
    family = ('olmo2' if getattr(block, 'placement', None) == PostNorm() else 'qwen3' if normed else
              'qwen2' if biased == QKV else 'llama')
    head = attn.head if attn.head is None or attn.head * attn.heads != width else None
    # A tied head has no rows of its own to say how many they are.
    decoder = Decoder(family=family, vocab=model.read_in.vocab, width=width, head=head, hidden=block.mlp.hidden,
                      layers=sum(stack.depth for stack in stacks), heads=attn.heads, groups=attn.groups or attn.heads,
                      length=model.read_in.length, rotary=_rotary(attn.position), eps=model.read_out.norm.eps,
                      tied=not hasattr(model.read_out, 'outputs'), biased=biased)
  except AttributeError as error:
    return None, f'{type(error.obj).__name__} stands where a part with {error.name!r} is wanted'
  except ConfigError as error:
    return None, str(error)
  depths = {name: stack.depth for name, stack in model.stacks().items()}
  twin = model_of(decoder, loops=model.loops, prelude=depths.get('prelude', 0), coda=depths.get('coda', 0))
  given, wanted = _essence(model), _essence(twin)
  for path in dict.fromkeys([*given, *wanted]):
    if given.get(path) != wanted.get(path):
      return None, f'{path} = {given.get(path, "absent")}, not {wanted.get(path, "absent")}'
  known = ((),) if decoder.kind.qk else ((), QKV, ALL)
  if decoder.biased not in known:
    return None, f'cell.core.block.attn.biased = {decoder.biased}, none of {", ".join(map(str, known))}'
  return decoder, ''


def _rotary(position: Any) -> Rotary:
  """The positions, if they are such as a decoder can have. Raises ConfigError for others, and none."""
  if type(position) not in (Rotary, StretchedRotary):
    name = position if position is None else f'{type(position).__module__}.{type(position).__qualname__}'
    raise ConfigError(f'cell.core.block.attn.position = {name}, not {Rotary.__module__}.{Rotary.__qualname__}')
  return position


# What a decoder computes does not depend on these: how weights began, how gradients and attention are computed, and in
# what precision; the order of layers is unrolled.
PASSED = ('std', 'up_std', 'out_std', 'init', 'out_init', 'remat', 'dtype', 'order')
KERNELS = tuple(f'{kernel.__module__}.{kernel.__qualname__}' for kernel in (Blockwise, Fused, Cudnn, Splash))


def _essence(model: nn.Module) -> dict[str, str]:
  """Path -> text of all fields on which the function of a model depends."""
  rows = {path: text for path, text in configs.flatten(model).items() if not set(path.split('.')) & set(PASSED)}
  for path in [path for path, text in rows.items() if text in KERNELS]:
    rows = {other: text for other, text in rows.items() if other != path and not other.startswith(f'{path}.')}
  for path, text in list(rows.items()):
    heads = rows.get(path.rpartition('.')[0] + '.heads')
    if heads is not None and path.endswith('attn.groups') and text == 'None':
      rows[path] = heads
    if (heads is not None and path.endswith('attn.head') and text != 'None' and
        int(text) * int(heads) == model.read_in.width):
      rows[path] = 'None'
  return rows


def unrolled(model: Looped) -> list[tuple[str, int]]:
  """(path of a stack, slot) of all layers in the order in which they run, the loop's as often as it has steps."""
  prelude, core, coda = ([] if stack is None else list(stack.order or range(stack.depth))
                         for stack in (model.prelude, model.cell.core, model.coda))
  return places(prelude, core * model.loops, coda)


# config.json ---------------------------------------------------------------------------------------------------------


def read_config(config: Mapping[str, Any], where: Any) -> Decoder:
  """The decoder that a config.json describes.

  Raises:
    ConfigError: another architecture, a field that is missing, or one under which the same weights would be another
      model than those that can be read.
  """
  family = config.get('model_type')
  if family not in FAMILIES:
    raise ConfigError(f'{where}: model_type = {family!r}: the architectures that are read are {", ".join(FAMILIES)}, '
                      f'{", ".join(published.PUBLISHED)} and exports of ours; convert another one yourself')
  _refuse(config, where)
  names = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  missing = [name for name in names if config.get(name) is None]
  if missing:
    raise ConfigError(f'{where}: {missing[0]} is missing; it must have {", ".join(names)}')
  vocab, width, hidden, layers, heads = (config[name] for name in names)
  kind, rotary = FAMILIES[family], _rope(config, where)
  biased = kind.biased or (ALL if config.get('attention_bias') else ())
  if (kind.qk or kind.looped) and biased:
    raise ConfigError(f'{where}: attention_bias = True: {family} is read without biases; choose a model without')
  if kind.looped and config.get('num_loops') is None:
    raise ConfigError(f'{where}: num_loops is missing, and no shape of the weights shows how often the layers run; '
                      'write it')
  with reading.naming(where, AGAIN):
    for name, value in (*((name, config[name]) for name in names), ('head_dim', config.get('head_dim') or 1)):
      check_count(name, value)
    head = config.get('head_dim') or None
    return Decoder(family=family, vocab=vocab, width=width, hidden=hidden, layers=layers, heads=heads,
                   head=None if head is None or head * heads == width else head,
                   groups=config.get('num_key_value_heads') or heads, rotary=rotary,
                   length=_length(config),
                   eps=float(kind.eps if config.get('rms_norm_eps') is None else config['rms_norm_eps']),
                   tied=bool(config.get('tie_word_embeddings')), biased=biased,
                   loops=config['num_loops'] if kind.looped else 1,
                   between=kind.looped and not config.get('skip_loop_final_norm', False))


def _length(config) -> int:
  return 2048 if config.get('max_position_embeddings') is None else config['max_position_embeddings']


# Fields of which another value than these makes another model of the same weights.
PLAIN = {
    'hidden_act': (None, 'silu', 'swish'), 'mlp_bias': (None, False), 'quantization_config': (None,),
    'is_causal': (None, True), 'use_bidirectional_attention': (None, False),
    **dict.fromkeys(('attn_logit_softcapping', 'final_logit_softcapping', 'logit_softcap', 'clip_qkv', 'qk_layernorm',
                     'use_qk_norm'), (None, False)),
    **dict.fromkeys(('embedding_multiplier', 'residual_multiplier', 'logits_scaling', 'embed_scale'), (None, 1)),
}
# Fields by which configurations say that layers run several times, and parts of Nanbeige's code that are off in its
# weights.
LOOPED = ('num_loops', 'total_ut_steps', 'mean_recurrence', 'n_layers_in_recurrent_block', 'n_loop', 'max_loops',
          'max_model_loops')
WINDOWS = {'mistral': 4096}  # of a family whose config.json does not say; null there is none
OPTIONS = ('emb_neighbor_num', 'insert_ngram_layer_idx', 'ngram_insert_all_layers', 'loop_middle_layers',
           'loop_share_kv')


def _refuse(config, where):
  for name, plain in PLAIN.items():
    if config.get(name) not in plain:
      raise ConfigError(f'{where}: {name} = {config[name]}: read are MLPs with SiLU and without bias, attention to all '
                        'earlier tokens, scores, logits and embeddings that are neither capped nor scaled, and weights '
                        'as they are; choose a model of this form')
  looped = FAMILIES[config['model_type']].looped
  for name in LOOPED if not looped else ():
    if config.get(name) not in (None, 1):
      raise ConfigError(f'{where}: {name} = {config[name]}: its layers run several times, and a {config["model_type"]} '
                        'has each once; write the model_type of its own code, or give kind')
  code = config.get('auto_map') if isinstance(config.get('auto_map'), Mapping) else {}
  own = next((code[name] for name in ('AutoModelForCausalLM', 'AutoModel') if code.get(name)), None)
  if own and not looped:
    raise ConfigError(f'{where}: auto_map = {own}: its model is computed by code of its own, of which nothing is known '
                      f'here; where it is a {config["model_type"]} like others, remove auto_map')
  for name in OPTIONS + tuple(name for name in config if name.startswith('enable_')) if looped else ():
    if config.get(name):
      raise ConfigError(f'{where}: {name} = {config[name]}: what {config["model_type"]} does with it is not known '
                        'here; choose a model for which it is off')
  window, length = config.get('sliding_window', WINDOWS.get(config['model_type'])), _length(config)
  others = set(config.get('layer_types') or ()) - {'full_attention'}
  if others - {'sliding_attention'} or window is None and others:
    raise ConfigError(f'{where}: layer_types = {sorted(others)}: attention is read to all earlier tokens alone; choose '
                      'a model of this form')
  told = config.get('use_sliding_window')
  slides = others or (config['model_type'] in WINDOWS if told is None else told)
  if slides and window is not None and window < length:
    raise ConfigError(f'{where}: sliding_window = {window}: attention is read to all earlier tokens alone; choose a '
                      f'model of this form, or write max_position_embeddings = {window} (it is {length}), up to which '
                      'both are the same')


STRETCH = {'factor': 'factor', 'low': 'low_freq_factor', 'high': 'high_freq_factor',
           'original': 'original_max_position_embeddings'}  # fields of StretchedRotary -> of rope_scaling
ROPE = ('rope_theta', 'partial_rotary_factor')


def _rope(config, where) -> Rotary:
  """The rotary positions: said at the top, in rope_scaling (whose kind was called `type`) or in rope_parameters."""
  said = {'config.json': {name: config.get(name) for name in ROPE}} | {
      source: config.get(source) or {} for source in ('rope_scaling', 'rope_parameters')}
  rope: dict[str, Any] = {}
  for source, fields in said.items():
    for name, value in fields.items():
      if isinstance(value, Mapping):
        raise ConfigError(f'{where}: {source}.{name} = {value}: rotary positions are read that are the same in all '
                          'layers; choose a model of this form')
      name = 'rope_type' if name == 'type' else name
      if value is not None and rope.setdefault(name, value) != value:
        raise ConfigError(f'{where}: {source}: {name} = {value}, but elsewhere it is {rope[name]}; leave one of them')
  kind = rope.get('rope_type', 'a factor without rope_type' if 'factor' in rope else 'default')
  if kind not in ('default', 'llama3'):
    raise ConfigError(f'{where}: rope_scaling = {kind}: rotary positions can be read as they are, or scaled as llama3; '
                      'choose a model of this form')
  factor = rope.get('partial_rotary_factor', 1.0)
  if factor != 1.0:
    raise ConfigError(f'{where}: partial_rotary_factor = {factor}: only rotary positions of whole heads can be read')
  with reading.naming(where, AGAIN):
    base = float(rope.get('rope_theta', 10_000.0))
    if kind == 'default':
      return Rotary(base=base)
    missing = [name for name in STRETCH.values() if rope.get(name) is None]
    if missing:
      raise ConfigError(f'rope_scaling = llama3: {missing[0]} is missing; it must have {", ".join(STRETCH.values())}')
    return StretchedRotary(base=base, **{name: rope[theirs] for name, theirs in STRETCH.items()})


def write_config(decoder: Decoder) -> dict[str, Any]:
  """The config.json of a decoder, as old and as new versions of transformers read it."""
  family, rotary = FAMILIES[decoder.family], decoder.rotary
  stretch = ({theirs: getattr(rotary, name) for name, theirs in STRETCH.items()}
             if type(rotary) is StretchedRotary else {})
  kind = {'rope_type': 'llama3' if stretch else 'default'} | stretch
  return {
      'architectures': [family.architecture], 'model_type': decoder.family, 'vocab_size': decoder.vocab,
      'hidden_size': decoder.width, 'intermediate_size': decoder.hidden, 'num_hidden_layers': decoder.layers,
      'num_attention_heads': decoder.heads, 'num_key_value_heads': decoder.groups,
      'head_dim': decoder.head_width, 'hidden_act': 'silu', 'max_position_embeddings': decoder.length,
      'rms_norm_eps': decoder.eps, 'rope_theta': rotary.base,
      'rope_parameters': kind | {'rope_theta': rotary.base}, **({'rope_scaling': kind} if stretch else {}),
      'tie_word_embeddings': decoder.tied, 'attention_bias': decoder.biased == ALL, 'mlp_bias': False,
  }
