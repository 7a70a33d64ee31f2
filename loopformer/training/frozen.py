"""Training some of the parameters, or some apart from the others: wrappers of optimisers."""
from __future__ import annotations

from typing import Any

import jax
import optax

from loopformer.roles import Roles
from loopformer.types import ConfigError, config_dataclass


@config_dataclass
class Freeze:
  """`of` acts on the parameters at `paths` and below, such as 'cell/gate'; the others keep their values exactly.

  No gradient, weight decay or state of the optimiser touches the others, and what `of` clips by is the norm of its own
  gradients.
  """
  of: Any
  paths: tuple[str, ...]

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """As optim.AdamW.make."""
    return optax.partition({'learn': self.of.make(steps, roles), 'keep': optax.set_to_zero()}, self.routes)

  def routes(self, params: Any) -> Any:
    """'learn' or 'keep' for every parameter. Raises ConfigError for a path that none lies at."""
    return routed(params, self.paths, 'learn', 'keep')


@config_dataclass
class ParamGroups:
  """`named` acts on the parameters at `paths` and below, `of` on the others, with learning rates of their own.

  Each clips by the norm of its own gradients. MELT's gates learn so.
  """
  of: Any
  named: Any
  paths: tuple[str, ...]

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """As optim.AdamW.make."""
    return optax.partition({'named': self.named.make(steps, roles), 'others': self.of.make(steps, roles)}, self.routes)

  def routes(self, params: Any) -> Any:
    """'named' or 'others' for every parameter. Raises ConfigError for a path that none lies at."""
    return routed(params, self.paths, 'named', 'others')


def routed(params: Any, paths: tuple[str, ...], here: str, elsewhere: str) -> Any:
  """`here` for the parameters at `paths` and below, `elsewhere` for the others, in a tree like that of the parameters.

  Raises:
    ConfigError: no parameter lies at one of the paths.
  """
  names = [jax.tree_util.keystr(path, simple=True, separator='/')
           for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for path in paths:
    if not any(within(name, path) for name in names):
      raise ConfigError(f'optim.paths names {path!r}, where no parameter is; there are {", ".join(names)}')
  labels = [here if any(within(name, path) for path in paths) else elsewhere for name in names]
  return jax.tree.unflatten(jax.tree.structure(params), labels)


def within(name: str, path: str) -> bool:
  """Whether the parameter `name` is that at `path`, or below it."""
  return name == path or name.startswith(path + '/')
