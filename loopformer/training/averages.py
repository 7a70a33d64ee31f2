"""Averages of weights over the steps of a run, which answer in the place of the last ones."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loopformer.roles import Roles
from loopformer.training import masters
from loopformer.types import Array, ConfigError, Params, config_dataclass


class AveragedState(NamedTuple):
  """count: i32[], updates so far; average: as the parameters; inner: the state of the optimiser."""
  count: Array  # type: ignore[assignment]  # saved under this name, which tuple has for a method
  average: Params
  inner: Any


@config_dataclass
class Averaged:
  """The optimiser `of`, and an exponential moving average of the parameters after each update:

      average <- d average + (1 - d) parameters,   d = min(decay, (1 + t) / (10 + t)) at update t from 0

  Of parameters that have masters (masters.py), these are averaged, whichever of the two wrappers stands around the
  other.

  Training goes on from the parameters; evaluations of the run, and whatever reads its checkpoints (`loopformer.load`,
  generation, export, train.start, teachers), have the averages.
  """
  of: Any
  decay: float = 0.999

  def __post_init__(self):
    if not 0 < self.decay < 1:
      raise ConfigError(f'optim.decay = {self.decay}: what of an average stays at each update, above 0 and below 1')

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformationExtraArgs:
    """As optim.AdamW.make."""
    inner = optax.with_extra_args_support(self.of.make(steps, roles))

    def init(params):
      if any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(
          params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))):
        raise ConfigError('optim: Averaged averages all parameters, but another optimiser gives it a part of them; put '
                          'it around the other')
      return AveragedState(jnp.int32(0), jax.tree.map(jnp.array, params), inner.init(params))

    def update(updates, state, params, **others):
      updates, own = inner.update(updates, state.inner, params, **others)
      stays = jnp.minimum(self.decay, (1 + state.count) / (10 + state.count))
      new, _ = masters.exchanged(optax.apply_updates(params, updates), own)
      average = jax.tree.map(lambda a, p: a + (1 - stays) * (p - a), state.average, new)  # exact where none moves
      return updates, AveragedState(state.count + 1, average, own)

    return optax.GradientTransformationExtraArgs(init, update)


def exchanged(params: Params, optimizer: Any) -> tuple[Params, Any]:
  """Parameters and averages in each other's places: (those that answer, the optimiser's state with the others).

  Twice it is nothing at all, and nothing where no averages are kept. Masters (masters.py) are exchanged so too, where
  no averages of them are kept.
  """
  found = []

  def swap(state):
    if not isinstance(state, AveragedState):
      return state
    found.append(state.average)
    return state._replace(average=params)

  optimizer = jax.tree.map(swap, optimizer, is_leaf=lambda leaf: isinstance(leaf, AveragedState))
  return (found[0], optimizer) if found else masters.exchanged(params, optimizer)
