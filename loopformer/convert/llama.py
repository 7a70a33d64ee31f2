"""Decoders of Llama's kind (Llama, Mistral, Qwen2, Qwen3, SmolLM2) as looped models, and the way back.

    model.embed_tokens.weight             V D   read_in/embedding; lm_head.weight V D read_out/kernel, if not tied
    model.norm.weight                     D     read_out/norm
    model.layers.{i}.
      input_layernorm.weight              D     norm_attn
      post_attention_layernorm.weight     D     norm_mlp
      self_attn.{q, k, v}_proj.weight     .. D  attn/qkv; .bias: attn/{q, k, v}_bias (Qwen2)
      self_attn.{q, k}_norm.weight        d     attn/norm_{q, k} (Qwen3)
      self_attn.o_proj.weight             D D   attn/out
      mlp.{gate, up}_proj.weight          F D   mlp/up: the half that passes the SiLU first
      mlp.down_proj.weight                D F   mlp/down

PyTorch's matrices are [out, in], ours [in, out]. Rotary positions turn pairs of channels: in Llama a pair is a channel
of the first half of a head and one of the second, here (`positions.Rotary`) they are neighbours. So the channels of
queries and keys (their matrices, biases and norms) change places; scores, the sums over pairs, do not notice.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

from flax import linen as nn

from loopformer import config as configs
from loopformer.cells.plain import Plain
from loopformer.convert.table import HEAD, Entry, Row, Span, check_count, row
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, check_heads
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TiedHead, Tokens
from loopformer.nn.layers import GatedMLP, RMSNorm
from loopformer.nn.positions import Rotary, StretchedRotary
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError, config_dataclass
from loopformer.nn.kernels import Blockwise, Cudnn, Fused, Splash


@config_dataclass
class Family:
  """A kind of decoder. biased: which projections always have a bias; normed: whether queries and keys have norms."""
  architecture: str
  biased: tuple[str, ...] = ()
  normed: bool = False


QKV, ALL = ('q', 'k', 'v'), ('q', 'k', 'v', 'out')
FAMILIES = {
    'llama': Family(architecture='LlamaForCausalLM'),
    'mistral': Family(architecture='MistralForCausalLM'),
    'qwen2': Family(architecture='Qwen2ForCausalLM', biased=QKV),
    'qwen3': Family(architecture='Qwen3ForCausalLM', normed=True),
}


@config_dataclass
class Decoder:
  """All that a decoder is besides its weights. length: the longest sequence; rotary: its positions."""
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

  def __post_init__(self):
    for name in ('vocab', 'width', 'hidden', 'layers', 'heads', 'groups', 'length'):
      check_count(name, getattr(self, name))
      if name != 'layers' and getattr(self, name) >= 2 ** 31:  # too many layers are found by counting tensors
        raise ConfigError(f'{name} = {getattr(self, name)}: no tensor has so many rows')
    check_heads(self.heads, self.groups, self.width)
    if self.width // self.heads % 2:
      raise ConfigError(f'heads = {self.heads}: their width {self.width // self.heads} is odd, and rotary positions '
                        'turn pairs of channels; this model cannot be read')

  @property
  def sizes(self) -> dict[str, int]:
    """By the letters of the layouts. q: queries, key and value of a group; e: its queries; r, f: halves of a head and
    places in one; m: gate and up."""
    head, each = self.width // self.heads, self.heads // self.groups
    return dict(V=self.vocab, D=self.width, E=self.width, F=self.hidden, N=self.layers, H=self.heads, G=self.groups,
                d=head, r=2, f=head // 2, q=each + 2, e=each, m=2)

  @property
  def normed(self) -> bool:
    """Whether queries and keys have norms."""
    return FAMILIES[self.family].normed


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


def end_rows(decoder: Decoder) -> list[Row]:
  """The weights outside layers."""
  rows = [row('model.embed_tokens.weight', 'read_in/embedding', 'V D'),
          row('model.norm.weight', 'read_out/norm/scale', 'D')]
  return rows if decoder.tied else [*rows, row(HEAD, 'read_out/kernel', 'V D')]


def layer_rows(decoder: Decoder, turn: str) -> list[Row]:
  """The weights of a layer, whose heads lie as `turn` says (`Naming`)."""
  queries, key, value = (Span(letter='q', start=start, count=count) for start, count in ((0, 'e'), (-2, 1), (-1, 1)))
  gate, up = (Span(letter='m', start=start, count=1) for start in (0, 1))
  rows = [
      row('input_layernorm.weight', 'norm_attn/scale', 'D'),
      row('post_attention_layernorm.weight', 'norm_mlp/scale', 'D'),
      row('self_attn.q_proj.weight', 'attn/qkv/kernel', f'Gq{turn} D', 'D Gqfr', span=queries),
      row('self_attn.k_proj.weight', 'attn/qkv/kernel', f'Gq{turn} D', 'D Gqfr', span=key),
      row('self_attn.v_proj.weight', 'attn/qkv/kernel', 'Gqd D', 'D Gqd', span=value),
      row('self_attn.o_proj.weight', 'attn/out/kernel', 'E D', 'D E'),
      row('mlp.gate_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=gate),
      row('mlp.up_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=up),
      row('mlp.down_proj.weight', 'mlp/down/kernel', 'D F', 'F D'),
  ]
  biases = {'q': row('self_attn.q_proj.bias', 'attn/q_bias', f'H{turn}', 'H fr'),
            'k': row('self_attn.k_proj.bias', 'attn/k_bias', f'G{turn}', 'G fr'),
            'v': row('self_attn.v_proj.bias', 'attn/v_bias', 'Gd', 'G d'),
            'out': row('self_attn.o_proj.bias', 'attn/out/bias', 'D')}
  norms = [row(f'self_attn.{name}_norm.weight', f'attn/norm_{name}/scale', turn, 'fr') for name in 'qk']
  return rows + [biases[name] for name in decoder.biased] + (norms if decoder.normed else [])


def entries(decoder: Decoder, places: Sequence[tuple[str, int]], naming: Naming = HUGGING_FACE) -> list[Entry]:
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


def model_of(decoder: Decoder, *, loops: int = 1, prelude: int = 0, coda: int = 0, dtype: str = 'float32') -> Looped:
  """The unbound model: the layers between prelude and coda are the loop, of one step if nothing else is said."""
  counts = cut(decoder, prelude, coda)
  out_std = 0.02 / math.sqrt(2 * decoder.layers)

  def stack(depth: int) -> Stack:  # with a block of its own: one instance in two stacks would be one set of weights
    heads = dict(heads=decoder.heads, groups=decoder.groups, out_std=out_std, position=decoder.rotary)
    attn = SelfAttention(**heads, biased=decoder.biased, norm=RMSNorm(decoder.eps) if decoder.normed else None)
    mlp = GatedMLP(hidden=decoder.hidden, out_std=out_std)
    return Stack(Block(attn=attn, mlp=mlp, norm=RMSNorm(decoder.eps), dtype=dtype), depth)

  before, core, after = (stack(depth) if depth else None for depth in counts)
  norm = RMSNorm(decoder.eps)
  return Looped(read_in=Tokens(vocab=decoder.vocab, width=decoder.width, length=decoder.length), cell=Plain(core),
                read_out=TiedHead(norm) if decoder.tied else Head(outputs=decoder.vocab, norm=norm),
                loops=loops, prelude=before, coda=after)


def decoder_of(model: Looped) -> tuple[Decoder | None, str]:
  """The decoder that a model is when its loop is unrolled, and why there is none: the first part that differs.

  The layers of the decoder are those of the model as it is written, each once; see `unrolled`.
  """
  try:
    block = model.cell.core.block
    attn, stacks = block.attn, model.stacks().values()
    biased = tuple(getattr(attn, 'biased', ()))
    family = 'qwen3' if getattr(attn, 'norm', None) is not None else 'qwen2' if biased == QKV else 'llama'
    # A tied head has no rows of its own to say how many they are.
    decoder = Decoder(family=family, vocab=model.read_in.vocab, width=model.read_in.width, hidden=block.mlp.hidden,
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
  if decoder.biased not in ((), QKV, ALL):
    return None, f'cell.core.block.attn.biased = {decoder.biased}, none of (), {QKV}, {ALL}'
  return decoder, ''


def _rotary(position: Any) -> Rotary:
  """The positions, if they are such as a decoder can have."""
  return position if type(position) in (Rotary, StretchedRotary) else Rotary(base=position.base)


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
    if path.endswith('attn.groups') and text == 'None':
      rows[path] = rows[path.removesuffix('groups') + 'heads']
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
    raise ConfigError(f'{where}: model_type = {family!r}: the architectures that are read are {", ".join(FAMILIES)} '
                      'and loopformer; convert another one yourself')
  names = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  missing = [name for name in names if config.get(name) is None]
  if missing:
    raise ConfigError(f'{where}: {missing[0]} is missing; it must have {", ".join(names)}')
  vocab, width, hidden, layers, heads = (config[name] for name in names)
  if config.get('head_dim') not in (None, width / heads):
    raise ConfigError(f'{where}: head_dim = {config["head_dim"]}: heads here are hidden_size / num_attention_heads = '
                      f'{width / heads:g} wide; choose a model for which this holds')
  _refuse(config, where)
  family_biased = FAMILIES[family].biased or (ALL if config.get('attention_bias') else ())
  if FAMILIES[family].normed and family_biased:
    raise ConfigError(f'{where}: attention_bias = True: {family} is read without biases; choose a model without')
  try:
    return Decoder(family=family, vocab=vocab, width=width, hidden=hidden, layers=layers, heads=heads,
                   groups=config.get('num_key_value_heads') or heads, rotary=_rope(config, where),
                   length=config.get('max_position_embeddings', 2048), eps=float(config.get('rms_norm_eps', 1e-6)),
                   tied=config.get('tie_word_embeddings', False), biased=family_biased)
  except ConfigError as error:
    raise ConfigError(f'{where}: {error}') from error


def _refuse(config, where):
  sliding = config.get('use_sliding_window', config['model_type'] == 'mistral') and config.get('sliding_window')
  for name, value, wrong in (
      ('hidden_act', config.get('hidden_act', 'silu'), config.get('hidden_act', 'silu') not in ('silu', 'swish')),
      ('mlp_bias', True, config.get('mlp_bias')),
      ('sliding_window', config.get('sliding_window'), sliding),
      ('layer_types', config.get('layer_types'), set(config.get('layer_types') or ()) - {'full_attention'}),
      ('quantization_config', config.get('quantization_config'), config.get('quantization_config')),
  ):
    if wrong:
      raise ConfigError(f'{where}: {name} = {value}: read are MLPs with SiLU and without bias, attention to all '
                        'earlier tokens, and weights as they are; choose a model of this form')


STRETCH = {'factor': 'factor', 'low': 'low_freq_factor', 'high': 'high_freq_factor',
           'original': 'original_max_position_embeddings'}  # fields of StretchedRotary -> of rope_scaling


def _rope(config, where) -> Rotary:
  """The rotary positions."""
  rope = config.get('rope_parameters') or config.get('rope_scaling') or {}
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'llama3'):
    raise ConfigError(f'{where}: rope_scaling = {kind}: rotary positions can be read as they are, or scaled as llama3; '
                      'choose a model of this form')
  factor = config.get('partial_rotary_factor', rope.get('partial_rotary_factor', 1.0))
  if factor != 1.0:
    raise ConfigError(f'{where}: partial_rotary_factor = {factor}: only rotary positions of whole heads can be read')
  base = float(rope.get('rope_theta', config.get('rope_theta', 10_000.0)))
  if kind == 'default':
    return Rotary(base=base)
  missing = [name for name in STRETCH.values() if rope.get(name) is None]
  if missing:
    raise ConfigError(f'{where}: rope_scaling = llama3: {missing[0]} is missing; it must have {", ".join(STRETCH.values())}')
  return StretchedRotary(base=base, **{name: rope[theirs] for name, theirs in STRETCH.items()})


def write_config(decoder: Decoder) -> dict[str, Any]:
  """The config.json of a decoder, as old and as new versions of transformers read it."""
  family, rotary = FAMILIES[decoder.family], decoder.rotary
  stretch = {theirs: getattr(rotary, name) for name, theirs in STRETCH.items()} if type(rotary) is StretchedRotary else {}
  kind = {'rope_type': 'llama3' if stretch else 'default'} | stretch
  return {
      'architectures': [family.architecture], 'model_type': decoder.family, 'vocab_size': decoder.vocab,
      'hidden_size': decoder.width, 'intermediate_size': decoder.hidden, 'num_hidden_layers': decoder.layers,
      'num_attention_heads': decoder.heads, 'num_key_value_heads': decoder.groups,
      'head_dim': decoder.width // decoder.heads, 'hidden_act': 'silu', 'max_position_embeddings': decoder.length,
      'rms_norm_eps': decoder.eps, 'rope_theta': rotary.base,
      'rope_parameters': kind | {'rope_theta': rotary.base}, **({'rope_scaling': kind} if stretch else {}),
      'tie_word_embeddings': decoder.tied, 'attention_bias': decoder.biased == ALL, 'mlp_bias': False,
  }
