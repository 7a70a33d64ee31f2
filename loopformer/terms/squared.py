"""Squared error of numbers that are predicted, at the end of a rollout or at every state of a window of it."""
from __future__ import annotations

from typing import Mapping

import jax.numpy as jnp

from loopformer.inference.measures import squared_error
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


@config_dataclass
class MSE(Term):
  """Mean squared error at the end of the rollout `roll`."""
  roll: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    return jnp.sum(squared_error(readout, rolls[self.roll].z, batch) * batch['weights'])


@config_dataclass
class Window(Term):
  """The mean over all graded steps that ran of the squared error after them (looped in-context learning, 3.1).

  The rollout keeps every state; how many steps are graded is its plan's affair. Coda and head read each state.
  """
  roll: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    trace = rolls[self.roll]
    if trace.xs is None or trace.plan is None:
      raise ConfigError(f'objective: the rollout {self.roll!r} keeps the last state alone, and Window reads every one; '
                        'give it keep=loop.Every()')
    error_KBT = squared_error(readout, readout.read(trace.xs), batch)
    active = trace.plan.active
    active = jnp.ones(error_KBT.shape[:2]) if active is None else active.reshape(len(error_KBT), -1)
    share_KB = active / jnp.maximum(active.sum(0), 1)
    return jnp.sum(error_KBT * share_KB[..., None] * batch['weights'])
