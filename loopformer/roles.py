"""Roles of parameters: what each is to optimisers, meshes and decoding, declared where it is made.

    kernel = roles.param(self, 'kernel', init, shape, Role(dtype=x.dtype, tensor=-1))

A parameter that is made by `self.param`, as in any Linen module, has the role `Role()`: weight decay acts on it if it
has two axes or more, and every device of a tensor group has it whole. `model.parameter_roles` collects the roles of a
model, from a trace of its initialisation.
"""
from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from typing import Any, Callable, Iterator

from flax import linen as nn
import jax

from loopformer.types import Array


@dataclasses.dataclass(frozen=True)
class Role:
  """What a parameter is.

  decayed: whether weight decay acts on it; None: if it has two axes or more, not counting that of layers.
  dtype: None, or of the products that it is the kernel [I, O] of: a projection, which decoding casts and transposes
    once (flat.flattened), and which Muon may update.
  tensor: None, or the axis, counted from the last, that the devices of a tensor group divide.
  layered: whether its first axis numbers the layers of a stack; the stack says so.
  group: '', or the name of what it and others beside it are to optimisers that look at whole tensors: one of these.
  """
  decayed: bool | None = None
  dtype: Any = None
  tensor: int | None = None
  layered: bool = False
  group: str = ''


class Roles(dict[tuple[str, ...], Role]):
  """Role by path, such as ('cell', 'core', 'block', 'attn', 'qkv', 'kernel')."""

  def at(self, path: Any) -> Role:
    """The role of the parameter at a key path, or of that whose state an optimiser keeps at it; `Role()` elsewhere."""
    names = tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
    return next((self[names[start:]] for start in range(len(names)) if names[start:] in self), Role())

  def of(self, path: str) -> Role:
    """The same of a path that is written with slashes."""
    return self.get(tuple(path.split('/')), Role())

  def decayed(self, params: Any) -> Any:
    """True for the parameters that weight decay acts on, in a tree like that of `params`."""
    def one(path, leaf):
      role = self.at(path)
      return leaf.ndim - role.layered >= 2 if role.decayed is None else role.decayed

    return jax.tree_util.tree_map_with_path(one, params)


_collected: contextvars.ContextVar[tuple[dict, set] | None] = contextvars.ContextVar('collected', default=None)


def param(module: nn.Module, name: str, init: Callable[..., Array], shape: tuple[int, ...], role: Role) -> Array:
  """`module.param(name, init, shape)`, whose role is declared."""
  if (collected := _collected.get()) is not None:
    collected[0][(*module.path, name)] = role
  return module.param(name, init, shape)


def stacked(module: nn.Module, name: str):
  """Says that the parameters of the module's part `name` have layers as their first axis."""
  if (collected := _collected.get()) is not None:
    collected[1].add((*module.path, name))


@contextlib.contextmanager
def collecting() -> Iterator[Callable[[Any], Roles]]:
  """Within it a model is initialised; what it gives turns the shapes of the parameters into their roles."""
  declared: dict[Any, Any] = {}
  stacks: set[Any] = set()

  def roles(params):
    found = Roles()
    names = {tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    if not names >= set(declared):
      raise ValueError(f'roles were declared of {sorted(set(declared) - names)}, where no parameter is')
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
      names = tuple(entry.key for entry in path)
      layered = any(names[:len(stack)] == stack for stack in stacks)
      found[names] = dataclasses.replace(declared.get(names, Role()), layered=layered)
    return found

  token = _collected.set((declared, stacks))
  try:
    yield roles
  finally:
    _collected.reset(token)
