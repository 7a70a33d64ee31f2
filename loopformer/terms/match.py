"""Shortcut consistency: a coarse trajectory is pulled to where the fine one ends."""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.term import Term
from loopformer.types import Array, Batch, Params, Readout, Trace, config_dataclass


@config_dataclass
class ShortcutConsistency(Term):
  """mean((stop_gradient(z_target) - z_roll)^2) over positions and width, after the final norm (LoopFormer section 3).

  The rollout `target` gets no gradient from this term.
  """
  roll: str
  target: str

  @property
  def reads(self) -> tuple[str, ...]:
    return (self.roll, self.target)

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    target = jax.lax.stop_gradient(rolls[self.target].z).astype(jnp.float32)
    distance_BT = jnp.mean(jnp.square(target - rolls[self.roll].z.astype(jnp.float32)), -1)
    return jnp.sum(distance_BT * batch['weights'])
