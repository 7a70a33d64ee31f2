"""Weights of the official LoopFormer repository (PyTorch, armenjeddi/loopformer) and its three sister models.

One table of rows, read in both directions, says where each weight goes and how its axes are laid out. A layout is a
list of axes, each a product of letters:

    V vocabulary  T positions  D, E model width (E: the output side of a square matrix)  F hidden width
    H heads       d width of a head    q query, key, value    g modulations g_a, g_m, s_a, s_m    S sinusoidal features

so 'qHd D' -> 'D Hqd' takes PyTorch's fused [3D, D] (q, k, v stacked, heads contiguous in each) to this library's
[D, H * 3 * d], where the three of a head lie together (see `blocks.SelfAttention`).
"""
from __future__ import annotations

import math
from pathlib import Path
import re
from typing import Any, Callable, Mapping

import chex
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from loopformer.blocks import MLP, Block, RMSNorm, SelfAttention, Stack, UnitNorm, check_heads
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.condition import FEATURES, LoopIndex, Modulation, Trajectory
from loopformer.convert import files
from loopformer.embed import TokenEmbed
from loopformer.model import Looped, init_params
from loopformer.types import ConfigError, Params, part

NESTED = ('model', 'state_dict', 'model_state_dict')
PREFIXES = re.compile(r'^(?:(?:_orig_mod|module|model|gpt)\.)+')
EMBEDDING, HEAD = 'transformer.wte.weight', 'lm_head.weight'
DTYPES = ('float32', 'bfloat16', 'float16')


@part
class Row:
  """A weight: its official key (within a layer, for rows of layers), its path in the parameters, both layouts."""
  theirs: str
  ours: str
  layout: tuple[str, str]

  def shapes(self, sizes: Mapping[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(official shape, shape here), without the axis of stacked layers."""
    theirs, ours = (tuple(math.prod(sizes[c] for c in axis) for axis in axes.split()) for axes in self.layout)
    return theirs, ours

  def convert(self, array: np.ndarray, sizes: Mapping[str, int], back: int = 1) -> np.ndarray:
    """To the layout here, or with `back` = -1 to the official one; any dtype -> float32, always a copy."""
    source, target = (axes.replace(' ', '') for axes in self.layout[::back])
    array = array.astype(np.float32).reshape([sizes[c] for c in source])
    array = array.transpose([source.index(c) for c in target]).reshape(self.shapes(sizes)[::back][1])
    return np.ascontiguousarray(array)  # safetensors writes the memory of a transposed view, not its values


def _row(theirs: str, ours: str, *layout: str) -> Row:
  return Row(theirs=theirs, ours=ours, layout=(layout[0], layout[-1]))


def _embedder(theirs: str, ours: str) -> tuple[Row, ...]:
  return (_row(f'{theirs}.mlp.0.weight', f'{ours}/in/kernel', 'D S', 'S D'),
          _row(f'{theirs}.mlp.0.bias', f'{ours}/in/bias', 'D'),
          _row(f'{theirs}.mlp.2.weight', f'{ours}/out/kernel', 'E D', 'D E'),
          _row(f'{theirs}.mlp.2.bias', f'{ours}/out/bias', 'D'))


_BLOCK = 'cell/core/block'
ENDS = (
    _row(EMBEDDING, 'read_in/embedding', 'V D'),
    _row('transformer.wpe.weight', 'read_in/positions', 'T D'),
    _row('transformer.norm_f.weight', 'read_out/norm/scale', 'D'),
)
MATRICES = (
    _row('attn.c_attn.weight', f'{_BLOCK}/attn/qkv/kernel', 'qHd D', 'D Hqd'),
    _row('attn.c_proj.weight', f'{_BLOCK}/attn/out/kernel', 'E D', 'D E'),
    _row('mlp.c_fc.weight', f'{_BLOCK}/mlp/up/kernel', 'F D', 'D F'),
    _row('mlp.c_proj.weight', f'{_BLOCK}/mlp/down/kernel', 'D F', 'F D'),
)
NORMS = (
    _row('norm_1.weight', f'{_BLOCK}/norm_attn/scale', 'D'),
    _row('norm_2.weight', f'{_BLOCK}/norm_mlp/scale', 'D'),
)
MODULATION = (
    _row('adaLN_modulation.1.weight', 'cell/modulation/kernel', 'gE D', 'D g E'),
    _row('adaLN_modulation.1.bias', 'cell/modulation/bias', 'gD', 'g D'),
)
TIME = _embedder('time_embedder', 'cell/condition/time')
STEP = _embedder('dt_embedder', 'cell/condition/step')


def _plain(core: Stack, width: int) -> nn.Module:
  return Plain(core)


def _trajectory(core: Stack, width: int) -> nn.Module:
  return Timed(core, Trajectory(width), Modulation(core.depth))


def _loop_index(core: Stack, width: int) -> nn.Module:
  return Timed(core, LoopIndex(width), Modulation(core.depth))


@part
class Kind:
  """An official model. `stack`: what precedes the number of a layer; `rows`, `layer_rows`: its weights."""
  cell: Callable[[Stack, int], nn.Module]
  norm: nn.Module
  rows: tuple[Row, ...]
  layer_rows: tuple[Row, ...]
  stack: str = 'transformer.h.blocks.'
  loops: int = 8

  def keys(self, depth: int) -> dict[str, Row]:
    """Every official key with its row, the tied head's apart."""
    layers = {f'{self.stack}{i}.{row.theirs}': row for i in range(depth) for row in self.layer_rows}
    return {row.theirs: row for row in self.rows} | layers

  def model(self, sizes: Mapping[str, int], loops: int, dtype: str) -> Looped:
    """The unbound model."""
    out_std = 0.02 / math.sqrt(2 * sizes['N'])
    block = Block(attn=SelfAttention(heads=sizes['H'], out_std=out_std), mlp=MLP(hidden=sizes['F'], out_std=out_std),
                  norm=self.norm, dtype=dtype)
    return Looped(read_in=TokenEmbed(vocab=sizes['V'], width=sizes['D'], length=sizes['T']),
                  cell=self.cell(Stack(block, sizes['N']), sizes['D']), loops=loops)


KINDS = {
    'loopformer': Kind(cell=_trajectory, norm=UnitNorm(), rows=ENDS + TIME + STEP, layer_rows=MATRICES + MODULATION),
    'base': Kind(cell=_plain, norm=RMSNorm(), rows=ENDS, layer_rows=MATRICES + NORMS, stack='transformer.h.', loops=1),
    'base_loop': Kind(cell=_plain, norm=RMSNorm(), rows=ENDS, layer_rows=MATRICES + NORMS),
    'tmlt': Kind(cell=_loop_index, norm=UnitNorm(), rows=ENDS + TIME, layer_rows=MATRICES + MODULATION),
}


def from_official(kind: str, source: str | Path | Mapping[str, Any], *, heads: int | None = None,
                  loops: int | None = None, dtype: str = 'float32') -> tuple[Looped, Params]:
  """(model, params) of an official checkpoint; params are float32, with the tree of `model.init_params`.

  Sizes are read from the shapes. Read are training checkpoints and bare state dicts, under any of the keys `model`,
  `state_dict`, `model_state_dict`, with any of the prefixes `_orig_mod.`, `module.`, `model.`, `gpt.`. Models trained
  with biases in attention and MLP (the official bias=True) have no counterpart here.

  Layers of `base` are a plain list, `transformer.h.{i}.`, in the official code; `transformer.h.blocks.{i}.`, as in the
  looped kinds, is read as well. Kinds with `ee` in their official name are read as the kind without it.

  Args:
    kind: 'loopformer', 'base', 'base_loop' or 'tmlt'.
    source: a .safetensors (extra `hf`), .npz, .pt or .pth (extra `peer`) file, or a dict of NumPy arrays or tensors.
    heads: attention heads, which no shape shows; may be left out where a checkpoint tells them (`model_args`).
    loops: the most loops that it was trained for; 8 for the looped kinds, 1 for base.
    dtype: of the matrix products, 'float32', 'bfloat16' or 'float16'.

  Raises:
    ConfigError: a bad argument, an unreadable file, or a key that is missing, surplus or misshapen.
    ImportError: the extra that reads the format is not installed.
  """
  row = _kind(kind)
  loops = row.loops if loops is None else loops
  _check_count('loops', loops)
  if dtype not in DTYPES:
    raise ConfigError(f'dtype = {dtype!r}: choose one of {", ".join(DTYPES)}')
  held = files.read(source)
  heads = _heads(heads, held)
  arrays = _tied(_named(held, row.stack))
  sizes = _measure(row, arrays, heads, f'kind = {kind!r}')
  keys = row.keys(sizes['N'])
  _compare({key: r.shapes(sizes)[0] for key, r in keys.items()}, {key: a.shape for key, a in arrays.items()},
           f'kind = {kind!r}')
  for key, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ConfigError(f'key {key!r} has dtype {array.dtype}; save it as floating point')
  flat = {r.ours: r.convert(arrays[r.theirs], sizes) for r in row.rows}
  for r in row.layer_rows:
    layers = (arrays[f'{row.stack}{i}.{r.theirs}'] for i in range(sizes['N']))
    flat[r.ours] = np.stack([r.convert(array, sizes) for array in layers])
  model = row.model(sizes, loops, dtype)
  params = unflatten_dict({path: jnp.asarray(array) for path, array in flat.items()}, sep='/')
  chex.assert_trees_all_equal_shapes_and_dtypes(
      params, jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
  return model, params


def to_official(kind: str, model: Looped, params: Params) -> dict[str, np.ndarray]:
  """The official state dict of a model of that kind, float32, tied head included: the inverse of `from_official`.

  Parameters are checked, functions (activation, norms) are not: they must be the ones that the kind has.

  Raises:
    ConfigError: an unknown kind, grouped keys and values, or parameters that are not those of the kind.
  """
  row = _kind(kind)
  core = model.cell.core
  attn = core.block.attn
  if attn.groups not in (None, attn.heads):
    raise ConfigError(f'groups = {attn.groups}: the official code has as many key heads as query heads '
                      f'({attn.heads}); it cannot hold this model')
  sizes = _sizes(vocab=model.read_in.vocab, length=model.read_in.length, width=model.read_in.width,
                 hidden=core.block.mlp.hidden, depth=core.depth, heads=attn.heads)
  flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep='/').items()}
  expected = {r.ours: r.shapes(sizes)[1] for r in row.rows}
  expected |= {r.ours: (sizes['N'], *r.shapes(sizes)[1]) for r in row.layer_rows}
  _compare(expected, {path: leaf.shape for path, leaf in flat.items()}, f'kind = {kind!r}')
  state = {r.theirs: r.convert(flat[r.ours], sizes, back=-1) for r in row.rows}
  for i in range(sizes['N']):
    for r in row.layer_rows:
      state[f'{row.stack}{i}.{r.theirs}'] = r.convert(flat[r.ours][i], sizes, back=-1)
  return state | {HEAD: state[EMBEDDING].copy()}


def _kind(kind: str) -> Kind:
  if kind not in KINDS:
    raise ConfigError(f'kind = {kind!r}: choose one of {", ".join(KINDS)}')
  return KINDS[kind]


def _check_count(name: str, value: Any):
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
    raise ConfigError(f'{name} = {value!r}: give an integer, 1 or more')


def _heads(heads: int | None, held: Mapping[str, Any]) -> int:
  saved = held.get('model_args')
  told = saved.get('n_head') if isinstance(saved, Mapping) else None
  if heads is None and told is None:
    raise ConfigError('heads is missing: no shape of the checkpoint shows the number of attention heads; '
                      'give heads=..., the n_head of its training (32 in the published configuration)')
  if None not in (heads, told) and heads != told:
    raise ConfigError(f'heads = {heads}: the checkpoint was trained with {told} (model_args.n_head); give that')
  heads = told if heads is None else heads
  _check_count('heads', heads)
  return int(heads)


def _named(held: Mapping[str, Any], stack: str) -> dict[str, np.ndarray]:
  """The arrays of the innermost state dict under their bare keys, without the buffers that are no weights."""
  while inner := [held[key] for key in NESTED if isinstance(held.get(key), Mapping)]:
    held = inner[0]
  arrays, full = {}, {}
  for name, value in held.items():
    key = PREFIXES.sub('', name).replace('transformer.h.blocks.', stack)
    if key in full:
      raise ConfigError(f'keys {full[key]!r} and {name!r} are both {key!r} without their prefixes; remove one')
    full[key] = name
    array = _array(value)
    if not (key.endswith('.attn.bias') and array.ndim == 4):  # the causal mask that PyTorch < 2.0 needed
      arrays[key] = array
  return arrays


def _array(value: Any) -> np.ndarray:
  """A tensor (NumPy has no bfloat16: by way of float32) or anything like an array, as NumPy."""
  if hasattr(value, 'detach'):
    value = value.detach().cpu()
    value = (value.float() if value.is_floating_point() else value).numpy()
  return np.asarray(value)


def _tied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the head; formats that store shared weights once may have kept it in place of the embedding."""
  if HEAD not in arrays:
    return arrays
  rest = {key: array for key, array in arrays.items() if key != HEAD}
  head, embedding = arrays[HEAD], rest.setdefault(EMBEDDING, arrays[HEAD])
  if not np.array_equal(head, embedding):
    raise ConfigError(f'key {HEAD!r} of shape {list(head.shape)} differs from {EMBEDDING!r} of shape '
                      f'{list(embedding.shape)}; the head of these models is tied: remove it, or convert a tied model')
  return rest


def _measure(kind: Kind, arrays: Mapping[str, np.ndarray], heads: int, where: str) -> dict[str, int]:
  """The sizes that the shapes show."""

  def rows_and_width(key: str, letters: str) -> tuple[int, int]:
    if key not in arrays:
      raise ConfigError(f'{where}: key {key!r} is missing, expected with shape {letters}; '
                        f'check that kind is the kind of the checkpoint{_sample(arrays)}')
    if arrays[key].ndim != 2:
      raise ConfigError(f'{where}: key {key!r} has shape {list(arrays[key].shape)}, expected {letters}')
    return arrays[key].shape

  vocab, width = rows_and_width(EMBEDDING, '[V, D]')
  length, _ = rows_and_width('transformer.wpe.weight', '[T, D]')
  hidden, _ = rows_and_width(f'{kind.stack}0.mlp.c_fc.weight', '[F, D]')
  check_heads(heads, heads, width)
  numbers = [re.match(re.escape(kind.stack) + r'(\d+)\.', key) for key in arrays]
  depth = 1 + max(int(number[1]) for number in numbers if number)
  return _sizes(vocab=vocab, length=length, width=width, hidden=hidden, depth=depth, heads=heads)


def _sizes(*, vocab: int, length: int, width: int, hidden: int, depth: int, heads: int) -> dict[str, int]:
  """Sizes by the letters of the layouts, and N, the number of layers."""
  return dict(V=vocab, T=length, D=width, E=width, F=hidden, N=depth, H=heads, d=width // heads, q=3, g=4, S=FEATURES)


def _compare(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], where: str):
  """Raises ConfigError for the first key that is missing, misshapen or surplus."""
  for key, shape in expected.items():
    if key not in given:
      raise ConfigError(f'{where}: key {key!r} is missing, expected with shape {list(shape)}; '
                        f'check that kind is the kind of the checkpoint{_sample(given)}')
    if given[key] != shape:
      raise ConfigError(f'{where}: key {key!r} has shape {list(given[key])}, expected {list(shape)}; '
                        'check that all weights are from one model')
  for key in given:
    if key not in expected:
      raise ConfigError(f'{where}: key {key!r} of shape {list(given[key])} is surplus, expected is no such weight; '
                        'choose the kind that has it, or remove it if it is none')


def _sample(given: Mapping[str, Any]) -> str:
  """The first keys that are there, for messages."""
  return f' (keys begin {", ".join(map(repr, sorted(given)[:3]))})' if given else ' (it is empty)'
