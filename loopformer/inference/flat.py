"""Models made ready for decoding: small stacks written out, kernels cast, and transposed where that is faster."""
from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax

from loopformer import backend
from loopformer.cells.cell import Around
from loopformer.model import Looped, parameter_roles
from loopformer.nn.modules import fields, unshared
from loopformer.nn.stack import Stack, layer_of
from loopformer.roles import Roles
from loopformer.types import KV, Array, Context


class Flat(nn.Module):
  """A `Stack` whose blocks have parameters of their own, not stacked: a flat program, for decoding.

  A token's step reads little but weights, and a scan copies each layer's out of the stack before it reads them.
  """
  blocks: tuple[nn.Module, ...]
  order: tuple[int, ...]
  norm: nn.Module | None = None

  def __call__(self, x: Array, ctx: Context, mods: Any, kv: KV | None) -> tuple[Array, KV | None]:
    """As Stack."""
    for index, which in enumerate(self.order):
      x, kv = self.blocks[which](x, ctx, layer_of(index, mods), kv, index)
    return (x if self.norm is None else self.norm(x)), kv

  @property
  def block(self) -> nn.Module:
    """What its blocks are like."""
    return self.blocks[0]

  @property
  def applications(self) -> int:
    """Layers that run, and so the slots of keys and values."""
    return self.block.layers * len(self.order)


def flattened(model: Looped, params: Any, transpose: bool = False) -> tuple[Any, Any]:
  """The same function with small stacks flat: (model, parameters). The arrays are copies of the stacks' slices, with
  `turn` [O, I] where a projection has a kernel [I, O]; kernels are in the dtype in which they multiply. Forward
  alone."""
  return _flattened(model, params, parameter_roles(model), (), transpose)


def _flattened(module, params, roles: Roles, at: tuple[str, ...], transpose):
  if isinstance(module, Stack):
    def cast(path, leaf):
      dtype = roles[(*at, 'block', *(entry.key for entry in path))].dtype
      return leaf if dtype is None else leaf.astype(dtype)

    params = {**params, 'block': jax.tree_util.tree_map_with_path(cast, params['block'])}
    if module.applications > backend.current().flat:
      return module, params
    flat = Flat(**unshared({'blocks': (module.block,) * module.depth}), norm=module.norm,
                order=module.order or tuple(range(module.depth)))
    rest = {name: tree for name, tree in params.items() if name != 'block'}
    blocks = (jax.tree.map(lambda leaf: leaf[i], params['block']) for i in range(module.depth))
    return flat, {**rest, **{f'blocks_{i}': _transposed(block, roles, (*at, 'block')) if transpose else block
                             for i, block in enumerate(blocks)}}
  changed = {}
  if isinstance(module, Around):  # whose parameters lie beside those of the cell in it
    changed['of'], params = _flattened(module.of, params, roles, at, transpose)
  params = dict(params)
  for name, value in fields(module).items():
    if isinstance(value, nn.Module) and name in params:
      changed[name], params[name] = _flattened(value, params[name], roles, (*at, name), transpose)
  return module.clone(**changed), params


def _transposed(params, roles, at):
  """Parameters with the kernels of projections transposed, under the name `transposed`."""
  new = {}
  for name, tree in params.items():
    if (*at, name) not in roles:
      new[name] = _transposed(tree, roles, (*at, name))
    elif roles[*at, name].dtype is None:
      new[name] = tree
    else:
      new['transposed'] = tree.T
  return new
