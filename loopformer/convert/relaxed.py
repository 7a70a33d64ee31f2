"""Relaxed recursive transformers (Bae et al., 2410.20672): an untied decoder as a loop with an update of low rank a
loop.

    model, params, _ = loopformer.convert.from_pretrained('SmolLM2-135M', prelude=3, coda=3)
    model, params = relaxed(model, params, loops=3, rank=64)

Layer j of the loop is the mean of the layers j, j + M, j + 2 M, ... of the decoder that it stands for, M being the
layers of the loop; and in loop k the best approximation of this rank to what layer j + k M has beyond the mean is added
to each product. With the full rank the products are the decoder's own.
"""
from __future__ import annotations

from flax.traverse_util import flatten_dict, unflatten_dict
import jax.numpy as jnp
import numpy as np

from loopformer import plans
from loopformer.cells.plain import Plain
from loopformer.convert.table import check_count
from loopformer.model import Looped
from loopformer.nn.blocks import PreNorm
from loopformer.nn.low_rank import adapted
from loopformer.types import Array, ConfigError, Params

NORMS = {'norm_attn/scale': 'attn/qkv/kernel', 'norm_mlp/scale': 'mlp/up/kernel'}  # and the product that each precedes


def relaxed(model: Looped, params: Params, *, loops: int, rank: int) -> tuple[Looped, Params]:
  """The model and parameters of a loop out of those of a plain decoder.

  Scales of the norms before products are first made part of these, which changes nothing and leaves nothing of them to
  be averaged; other vectors (biases, norms of queries and keys) are averaged.

  Args:
    model, params: as `from_pretrained` gives them: Looped with a Plain cell, run once, of pre-norm blocks. Prelude and
      coda stay as they are.
    loops: a divisor of the layers that the loop has now, 2 or more.
    rank: of every update; at most the smaller side of each product.

  Raises:
    ConfigError: numbers that do not fit the model, or a model of another form.
  """
  plans.count('loops', loops)
  check_count('rank', rank)
  if loops == 1:
    raise ConfigError(f'rank = {rank}, loops = 1: one loop has nothing that is tied; give loops, 2 or more')
  core = model.cell.core
  if type(model.cell) is not Plain or model.loops != 1 or core.order is not None:
    raise ConfigError('model: it is no plain decoder (a Plain cell that runs once); give one, as of from_pretrained')
  if getattr(core.block, 'placement', None) != PreNorm():
    raise ConfigError(f'model: blocks of {type(getattr(core.block, "placement", core.block)).__name__}; a plain '
                      'decoder has pre-norm blocks (Block)')
  if core.depth % loops:
    raise ConfigError(f'loops = {loops} does not divide the {core.depth} layers of the loop; choose a divisor, or '
                      'other numbers of layers in prelude and coda')
  flat = {path: np.asarray(leaf, np.float32)
          for path, leaf in flatten_dict(params['cell']['core']['block'], sep='/').items()}
  for norm, product in NORMS.items():
    if norm in flat and product in flat and norm.replace('scale', 'bias') not in flat:
      flat[product] = flat[norm][..., None] * flat[product]
      flat[norm] = np.ones_like(flat[norm])
  depth, new = core.depth // loops, {}
  for path, leaf in flat.items():
    apart = leaf.reshape(loops, depth, *leaf.shape[1:])
    new[path] = apart.mean(0)
    if path.endswith('/kernel'):
      if rank > min(leaf.shape[1:]):
        raise ConfigError(f'rank = {rank}: {path} is a matrix of {leaf.shape[1]} x {leaf.shape[2]}; give at most '
                          f'{min(leaf.shape[1:])}')
      halves = [[_halves(apart[k, j] - new[path][j], rank) for k in range(loops)] for j in range(depth)]
      for side, name in enumerate('ab'):
        new[f'{path.removesuffix("kernel")}{name}'] = np.stack([[pair[side] for pair in layer] for layer in halves])
  tied = model.clone(cell=model.cell.clone(core=core.clone(depth=depth)), loops=loops)
  looped = tied.clone(cell=adapted(tied, rank, each=True).cell)
  block = unflatten_dict({path: jnp.asarray(leaf) for path, leaf in new.items()}, sep='/')
  return looped, {**params, 'cell': {**params['cell'], 'core': {**params['cell']['core'], 'block': block}}}


def _halves(matrix: Array, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """A [I, rank] and B [rank, O], of equal weight, whose product is the nearest to a matrix [I, O] of this rank."""
  u, s, v = np.linalg.svd(matrix, full_matrices=False)
  root = np.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * v[:rank]
