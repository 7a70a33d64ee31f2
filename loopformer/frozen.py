"""Training some of the parameters: a wrapper of optimisers."""
from __future__ import annotations

from typing import Any

import jax
import optax

from loopformer.types import ConfigError, part


@part
class Only:
  """`of` acts on the parameters at `paths` and below, such as 'cell/gate'; the others keep their values exactly.

  No gradient, weight decay or state of the optimiser touches the others, and what `of` clips by is the norm of its own
  gradients.
  """
  of: Any
  paths: tuple[str, ...]

  def make(self, steps: int) -> optax.GradientTransformation:
    """The transformation for a run of `steps`."""
    return optax.partition({'learn': self.of.make(steps), 'keep': optax.set_to_zero()}, self.routes)

  def routes(self, params: Any) -> Any:
    """'learn' or 'keep' for every parameter. Raises ConfigError for a path that none lies at."""
    names = [jax.tree_util.keystr(path, simple=True, separator='/')
             for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path in self.paths:
      if not any(within(name, path) for name in names):
        raise ConfigError(f'optim.paths names {path!r}, where no parameter is; there are {", ".join(names)}')
    learned = [any(within(name, path) for path in self.paths) for name in names]
    return jax.tree.unflatten(jax.tree.structure(params), ['learn' if learns else 'keep' for learns in learned])


def within(name: str, path: str) -> bool:
  """Whether the parameter `name` is that at `path`, or below it."""
  return name == path or name.startswith(path + '/')
