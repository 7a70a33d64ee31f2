"""What is learned of latents (CCDD)."""
from __future__ import annotations

from typing import Mapping

import jax.numpy as jnp

from loopformer.papers.ccdd.cell import GUESS, last_guess
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass

MOST = 10.0  # of the squared error of a channel


@config_dataclass
class LatentError(Term):
  """The squared error of the guess of clean latents at the end of the rollout `roll`: a mean over channels, that of
  each at most 10, times the weight of the latents' time, a mean over tokens that are no padding."""
  roll: str

  def weight(self, batch: Batch) -> Array:
    if 'latent_weights' not in batch:
      raise ConfigError('objective.prepare makes no latents, so that LatentError has nothing to ask for; set it to '
                        'papers.ccdd.prepare.Joint')
    return batch['latent_real'].sum()

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    if GUESS not in rolls[self.roll].aux:
      raise ConfigError(f'objective.rolls.{self.roll}: its cell guesses no latents; use papers.ccdd.cell.Summed or '
                        'Doubled')
    trace = rolls[self.roll]
    assert trace.plan is not None
    guess = last_guess(trace.aux, trace.plan.active)
    error = jnp.minimum(jnp.square(guess - batch['latent_targets']), MOST).mean(-1)
    return (error * batch['latent_weights']).sum()
