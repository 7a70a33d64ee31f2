"""Weights of official repositories, in and out: of LoopFormer (PyTorch, armenjeddi/loopformer) and its three sister
models, whose tables are here; of Parcae, Huginn and Ouro, whose tables are in files of their own.

Letters of the layouts (see table.py):

    V vocabulary  T positions  D, E model width (E: the output side of a square matrix)  F hidden width
    H heads       d width of a head    q query, key, value    g modulations g_a, g_m, s_a, s_m    S sinusoidal features
"""
from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Callable, Mapping

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans, reading, sharding, storage
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.convert import files, kinds, published, table, tensors
from loopformer.convert.huginn import Huginn
from loopformer.convert.ouro import Ouro
from loopformer.convert.parcae import Parcae
from loopformer.convert.table import EMBEDDING, HEAD, Entry, Row, row
from loopformer.model import Looped, parameter_roles, parameter_shapes
from loopformer.nn.attention import SelfAttention, check_heads
from loopformer.nn.blocks import Block
from loopformer.nn.condition import FEATURES, LoopIndex, Modulation, Trajectory
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.layers import MLP, RMSNorm, UnitNorm
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError, Params, config_dataclass

DTYPES = ('float32', 'bfloat16', 'float16')


def _embedder(theirs: str, ours: str) -> tuple[Row, ...]:
  return (row(f'{theirs}.mlp.0.weight', f'{ours}/in/kernel', 'D S', 'S D'),
          row(f'{theirs}.mlp.0.bias', f'{ours}/in/bias', 'D'),
          row(f'{theirs}.mlp.2.weight', f'{ours}/out/kernel', 'E D', 'D E'),
          row(f'{theirs}.mlp.2.bias', f'{ours}/out/bias', 'D'))


_BLOCK = 'cell/core/block'
ENDS = (
    row(EMBEDDING, 'read_in/embedding', 'V D'),
    row('transformer.wpe.weight', 'read_in/positions', 'T D'),
    row('transformer.norm_f.weight', 'read_out/norm/scale', 'D'),
)
MATRICES = (
    row('attn.c_attn.weight', f'{_BLOCK}/attn/qkv/kernel', 'qHd D', 'D Hqd'),
    row('attn.c_proj.weight', f'{_BLOCK}/attn/out/kernel', 'E D', 'D E'),
    row('mlp.c_fc.weight', f'{_BLOCK}/mlp/up/kernel', 'F D', 'D F'),
    row('mlp.c_proj.weight', f'{_BLOCK}/mlp/down/kernel', 'D F', 'F D'),
)
NORMS = (
    row('norm_1.weight', f'{_BLOCK}/norm_attn/scale', 'D'),
    row('norm_2.weight', f'{_BLOCK}/norm_mlp/scale', 'D'),
)
MODULATION = (
    row('adaLN_modulation.1.weight', 'cell/modulation/kernel', 'gE D', 'D g E'),
    row('adaLN_modulation.1.bias', 'cell/modulation/bias', 'gD', 'g D'),
)
TIME = _embedder('time_embedder', 'cell/condition/time')
STEP = _embedder('dt_embedder', 'cell/condition/step')


def _plain(core: Stack, width: int) -> nn.Module:
  return Plain(core)


def _trajectory(core: Stack, width: int) -> nn.Module:
  return Timed(core, Trajectory(width), Modulation(core.depth))


def _loop_index(core: Stack, width: int) -> nn.Module:
  return Timed(core, LoopIndex(width), Modulation(core.depth))


ORIGINAL = (('transformer.attn.', 'transformer.h.blocks.0.attn.'), ('transformer.mlp.', 'transformer.h.blocks.0.mlp.'),
            ('adaLN_modulation.', 'transformer.h.blocks.0.adaLN_modulation.'), ('timestep_embedder.', 'time_embedder.'),
            ('transformer.ln_f.', 'transformer.norm_f.'))


@config_dataclass
class Kind:
  """An official model. `stack`: what precedes the number of a layer; `rows`, `layer_rows`: its weights."""
  cell: Callable[[Stack, int], nn.Module]
  norm: nn.Module
  rows: tuple[Row, ...]
  layer_rows: tuple[Row, ...]
  stack: str = 'transformer.h.blocks.'
  loops: int = 8

  def rename(self, key: str) -> str:
    """Both names of the list of layers are read; and of a model with one layer, those of the original code of timestep
    encoding (kevin671/tmlt), where that is no list."""
    for theirs, ours in ORIGINAL:
      key = key.replace(theirs, ours, 1) if key.startswith(theirs) else key
    return key.replace('transformer.h.blocks.', self.stack)

  def buffer(self, key: str, array: np.ndarray) -> bool:
    """The causal mask that PyTorch < 2.0 needed."""
    return key.endswith('.attn.bias') and array.ndim == 4

  def measure(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], heads: int | None,
              length: int | None, where: str) -> dict[str, int]:
    """The sizes that the shapes show, and heads, which they do not."""
    if heads is None:
      raise ConfigError('heads is missing: no shape of the checkpoint shows the number of attention heads; '
                        'give heads=..., the n_head of its training (32 in the published configuration)')
    vocab, width = table.measured(arrays, EMBEDDING, '[V, D]', where)
    positions, _ = table.measured(arrays, 'transformer.wpe.weight', '[T, D]', where)
    hidden, _ = table.measured(arrays, f'{self.stack}0.mlp.c_fc.weight', '[F, D]', where)
    check_heads(heads, heads, width)
    if length not in (None, positions):
      raise ConfigError(f'length = {length}: the checkpoint has {positions} positions; leave length out')
    return _sizes(vocab=vocab, length=positions, width=width, hidden=hidden, depth=table.layers(arrays, self.stack),
                  heads=heads)

  def sizes_of(self, model: Looped) -> dict[str, int]:
    """The sizes of a model of the kind."""
    core = model.cell.core
    attn = core.block.attn
    if attn.groups not in (None, attn.heads):
      raise ConfigError(f'groups = {attn.groups}: the official code has as many key heads as query heads '
                        f'({attn.heads}); it cannot hold this model')
    return _sizes(vocab=model.read_in.vocab, length=model.read_in.length, width=model.read_in.width,
                  hidden=core.block.mlp.hidden, depth=core.depth, heads=attn.heads)

  def entries(self, sizes: Mapping[str, int]) -> list[Entry]:
    """Every weight in its place, the tied head's apart."""
    return ([Entry(key=r.theirs, path=r.ours, row=r) for r in self.rows] +
            [Entry(key=f'{self.stack}{i}.{r.theirs}', path=r.ours, row=r, slot=i)
             for i in range(sizes['N']) for r in self.layer_rows])

  def model(self, sizes: Mapping[str, int], loops: int, dtype: str) -> Looped:
    """The unbound model."""
    out_std = 0.02 / math.sqrt(2 * sizes['N'])
    block = Block(attn=SelfAttention(heads=sizes['H'], out_std=out_std), mlp=MLP(hidden=sizes['F'], out_std=out_std),
                  norm=self.norm, dtype=dtype)
    return Looped(read_in=TokenEmbed(vocab=sizes['V'], width=sizes['D'], length=sizes['T']),
                  cell=self.cell(Stack(block, sizes['N']), sizes['D']), loops=loops)


def _sizes(*, vocab: int, length: int, width: int, hidden: int, depth: int, heads: int) -> dict[str, int]:
  """Sizes by the letters of the layouts, and N, the number of layers."""
  return dict(V=vocab, T=length, D=width, E=width, F=hidden, N=depth, H=heads, d=width // heads, q=3, g=4, S=FEATURES)


KINDS: dict[str, Kind | Parcae | Huginn | Ouro] = {
    'loopformer': Kind(cell=_trajectory, norm=UnitNorm(), rows=ENDS + TIME + STEP, layer_rows=MATRICES + MODULATION),
    'base': Kind(cell=_plain, norm=RMSNorm(), rows=ENDS, layer_rows=MATRICES + NORMS, stack='transformer.h.', loops=1),
    'base_loop': Kind(cell=_plain, norm=RMSNorm(), rows=ENDS, layer_rows=MATRICES + NORMS),
    'tmlt': Kind(cell=_loop_index, norm=UnitNorm(), rows=ENDS + TIME, layer_rows=MATRICES + MODULATION),
    'parcae': Parcae(),
    'huginn': Huginn(),
    'ouro': Ouro(),
}


def from_official(kind: str, source: str | Path | Mapping[str, Any], *, heads: int | None = None,
                  loops: int | None = None, length: int | None = None, dtype: str = 'float32',
                  mesh: jax.sharding.Mesh | None = None) -> tuple[Looped, Params]:
  """(model, params) of an official checkpoint; params are float32, with the tree of `model.init_params`.

  Sizes are read from the shapes. Read are training checkpoints and bare state dicts, under any of the keys `model`,
  `state_dict`, `model_state_dict`, with any of the prefixes `_orig_mod.`, `module.`, `model.`, `gpt.`. Models trained
  with biases in attention and MLP (the official bias=True) have no counterpart here.

  Layers of `base` are a plain list, `transformer.h.{i}.`, in the official code; `transformer.h.blocks.{i}.`, as in the
  looped kinds, is read as well. Kinds with `ee` in their official name are read as the kind without it.

  `parcae` and `huginn` start from noise; `model.clone(start=loopformer.starts.Zeros())` is the same without it.

  Args:
    kind: 'loopformer', 'base', 'base_loop', 'tmlt', 'parcae', 'huginn' or 'ouro'.
    source: a .safetensors (extra `hf`), .npz, .pt or .pth (extra `peer`) file; a folder with one, or with an index of
      several, whose config.json, if there is one of the kind, is obeyed (published.py); or a dict of NumPy arrays or
      tensors.
    heads: attention heads, which no shape of LoopFormer's and Ouro's shows; may be left out where a checkpoint tells
      them (`model_args`, config.json), and for parcae and huginn.
    loops: the most loops that it was trained for; what the checkpoint says, or else 8 for the looped kinds, 1 for base,
      32 (the mean) for huginn, 4 for ouro.
    length: the longest sequence that it is meant for, of parcae, huginn and ouro; that of config.json, of the
      checkpoint's rotary table, or else the published one (2048, 4096, 65,536).
    dtype: of the matrix products, 'float32', 'bfloat16' or 'float16'.
    mesh: None for one device, or the mesh that the parameters are divided over, as of `loopformer.load`. Tensors are
      read one at a time (stacks of layers whole) by every process.

  Raises:
    ConfigError: a bad argument, an unreadable file, a key that is missing, surplus or misshapen, or a config.json of
      another model.
    ImportError: the extra that reads the format is not installed.
  """
  name, kind, where = kind, _kind(kind), f'kind = {kind!r}'
  if loops is not None:
    plans.count('loops', loops)
  if length is not None:
    table.check_count('length', length)
  if dtype not in DTYPES:
    raise ConfigError(f'dtype = {dtype!r}: choose one of {", ".join(DTYPES)}')
  folder = storage.path(source) if isinstance(source, (str, os.PathLike)) else None
  if folder is None or not folder.is_dir():
    with files.naming(source):
      return _read(kind, where, files.read(source), heads, loops, length, dtype, mesh)
  folder = storage.fetched(folder)
  with reading.naming(folder, 'download it again'):
    told = _told(folder, name)
    return _read(kind, where, tensors.read_any(folder), heads, loops, length, dtype, mesh, told, folder / CONFIG)


CONFIG = 'config.json'


def _told(folder: Path, kind: str) -> published.Told | None:
  """What the config.json of a folder says, if there is one of a kind. Raises ConfigError where it is of another."""
  if not (folder / CONFIG).is_file():
    return None
  config = reading.read_json(folder / CONFIG, 'download it again')
  kinds.check(config, folder / CONFIG)
  named = published.kind_of(config)
  if named not in (None, kind):
    raise ConfigError(f'kind = {kind!r}: {folder / CONFIG} is that of kind {named}; leave kind out')
  with reading.naming(folder / CONFIG, 'download it again'):
    return None if named is None else published.read(config, folder / CONFIG)


def _read(kind, where, held, heads, loops, length, dtype, mesh, told=None, config=None) -> tuple[Looped, Params]:
  if told is not None:
    if None not in (heads, told.heads) and heads != told.heads:
      raise ConfigError(f'heads = {heads}: {config} says {told.heads}; leave heads out')
    heads, loops, length = heads or told.heads, loops or told.loops, length or told.length
  heads = _heads(heads, held)
  loops = loops or _loops(held) or kind.loops
  weights, buffers = table.named(held, kind.rename, kind.buffer)
  arrays = table.tied(weights) if _tied(kind) else weights
  sizes = kind.measure(arrays, buffers, heads, length, where)
  if told is not None:
    told.check(sizes, config)
  entries = kind.entries(sizes)
  table.compare(table.shapes(entries, sizes)[0], {key: a.shape for key, a in arrays.items()}, where)
  for key, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ConfigError(f'key {key!r} has dtype {array.dtype}; save it as floating point')
  model = kind.model(sizes, loops, dtype)
  put = sharding.placer(mesh, parameter_roles(model))
  flat = table.to_ours(entries, arrays, sizes, put)
  expected = flatten_dict(parameter_shapes(model), sep='/')
  assert {path: leaf.shape for path, leaf in flat.items()} == {path: leaf.shape for path, leaf in expected.items()}
  return model, unflatten_dict(flat, sep='/')


def to_official(kind: str, model: Looped, params: Params) -> dict[str, np.ndarray]:
  """The official state dict of a model of that kind, float32, tied head included: the inverse of `from_official`.

  Parameters are checked, functions (activation, norms) are not: they must be the ones that the kind has.

  Raises:
    ConfigError: an unknown kind, a model that the official code cannot hold, or parameters that are not those of the
      kind.
  """
  kind, where = _kind(kind), f'kind = {kind!r}'
  sizes = kind.sizes_of(model)
  entries = kind.entries(sizes)
  flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep='/').items()}
  table.compare(table.shapes(entries, sizes)[1], {path: leaf.shape for path, leaf in flat.items()}, where)
  state = table.to_theirs(entries, flat, sizes)
  return state | {HEAD: state[EMBEDDING].copy()} if _tied(kind) else state


def _tied(kind: Kind | Parcae | Huginn | Ouro) -> bool:
  """Whether the head is the embedding, as in all kinds that do not say otherwise."""
  return getattr(kind, 'tied', True)


def _kind(kind: str) -> Kind | Parcae | Huginn | Ouro:
  if kind not in KINDS:
    raise ConfigError(f'kind = {kind!r}: choose one of {", ".join(KINDS)}')
  return KINDS[kind]


def _loops(held: Mapping[str, Any]) -> int | None:
  """The number of loops that a training checkpoint tells: of the original code of timestep encoding, in `config`."""
  for about in (held.get('model_args'), held.get('config')):
    if isinstance(about, Mapping) and about.get('n_loop') is not None:
      table.check_count('n_loop', about['n_loop'])
      return int(about['n_loop'])
  return None


def _heads(heads: int | None, held: Mapping[str, Any]) -> int | None:
  """The number given, or told by a training checkpoint."""
  saved = held.get('model_args')
  told = saved.get('n_head') if isinstance(saved, Mapping) else None
  if None not in (heads, told) and heads != told:
    raise ConfigError(f'heads = {heads}: the checkpoint was trained with {told} (model_args.n_head); give that')
  heads = told if heads is None else heads
  if heads is not None:
    table.check_count('heads', heads)
    heads = int(heads)
  return heads
