"""Descriptions of modules as values: taken apart, and made anew."""
from __future__ import annotations

import dataclasses
import operator
from typing import Any, Iterator, Mapping

from flax import linen as nn
import jax


def fields(module: Any) -> dict[str, Any]:
  """Name -> value of a module's own fields."""
  return {f.name: getattr(module, f.name) for f in dataclasses.fields(module)
          if f.init and f.name not in ('parent', 'name')}


def held(part: Any, name: str) -> Iterator[Any]:
  """The values of all fields of that name, of a part and of those in it."""
  for field, value in fields(part).items() if dataclasses.is_dataclass(part) else ():
    if field == name:
      yield value
    for inner in value if isinstance(value, tuple) else (value,):
      yield from held(inner, name)


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
