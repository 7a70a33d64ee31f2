"""Descriptions of modules as values: taken apart, made anew, and made ready for decoding."""
from __future__ import annotations

import dataclasses
import operator
from typing import Any, Mapping

from flax import linen as nn
import jax

from loopformer import backend
from loopformer.blocks import Chain, Stack, layer_of
from loopformer.types import KV, Array, Ctx

PROJECTIONS = ('qkv', 'out', 'up', 'down')  # the names that layers give to a `Linear`


def fields(module: nn.Module) -> dict[str, Any]:
  """Name -> value of a module's own fields."""
  return {f.name: getattr(module, f.name) for f in dataclasses.fields(module)
          if f.init and f.name not in ('parent', 'name')}


def unshared(values: Mapping[str, Any]) -> dict[str, Any]:
  """The same fields, in which no module stands twice, neither in them nor anywhere below.

  Linen lets two places that hold one instance share its parameters. Here modules are values: a block that is written
  once and put into three stacks means three blocks, as it does when the configuration has been saved and read.
  """
  seen = {}  # modules by their identity; it keeps them, so that no other takes their place in memory

  def own(value):
    leaves, tree = jax.tree.flatten(value)
    new = [of_module(leaf) if isinstance(leaf, nn.Module) and leaf.parent is None else leaf for leaf in leaves]
    return value if all(map(operator.is_, leaves, new)) else jax.tree.unflatten(tree, new)

  def of_module(module):
    again = id(module) in seen
    seen[id(module)] = module
    inner = fields(module)
    changed = {name: value for name, old in inner.items() if (value := own(old)) is not old}
    return module.clone(**changed) if changed or again else module

  return {name: own(value) for name, value in values.items()}


class Flat(nn.Module):
  """A `Stack` whose blocks have parameters of their own, not stacked: a flat program, for decoding.

  A token's step reads little but weights, and a scan copies each layer's out of the stack before it reads them.
  """
  blocks: tuple[nn.Module, ...]
  order: tuple[int, ...]
  norm: nn.Module | None = None

  def __call__(self, x: Array, ctx: Ctx, mods: Any, kv: KV | None) -> tuple[Array, KV | None]:
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


def flattened(module: nn.Module, params: Any, turn: bool = False) -> tuple[nn.Module, Any]:
  """The same function with small stacks flat: (module, parameters). The arrays are copies of the stacks' slices, with
  `turn` [O, I] where a projection has a kernel [I, O]; kernels are in the dtype in which they multiply. Forward
  alone."""
  if isinstance(module, Stack):
    params = {**params, 'block': _cast(module.block, params['block'])}
    if module.applications > backend.current().flat:
      return module, params
    flat = Flat(**unshared({'blocks': (module.block,) * module.depth}), norm=module.norm,
                order=module.order or tuple(range(module.depth)))
    rest = {name: tree for name, tree in params.items() if name != 'block'}
    blocks = (jax.tree.map(lambda leaf: leaf[i], params['block']) for i in range(module.depth))
    return flat, {**rest, **{f'blocks_{i}': _turned(block) if turn else block for i, block in enumerate(blocks)}}
  params, changed = dict(params), {}
  for name, value in fields(module).items():
    if isinstance(value, nn.Module) and name in params:
      changed[name], params[name] = flattened(value, params[name], turn)
  return module.clone(**changed), params


def _cast(block, params):
  """A block's projections in its dtype, into which every call would cast them."""
  if isinstance(block, Chain):
    return {name: _cast(block.blocks[int(name.removeprefix('blocks_'))], tree) for name, tree in params.items()}

  def own(path, leaf):
    names = [entry.key for entry in path]
    return leaf.astype(block.dtype) if names[-1] == 'kernel' and names[-2] in PROJECTIONS else leaf

  return jax.tree_util.tree_map_with_path(own, params)


def _turned(params):
  def own(name, tree):
    if not isinstance(tree, Mapping):
      return tree
    if name not in PROJECTIONS or 'kernel' not in tree:
      return _turned(tree)
    return {**{other: leaf for other, leaf in tree.items() if other != 'kernel'}, 'turned': tree['kernel'].T}

  return {name: own(name, tree) for name, tree in params.items()}
