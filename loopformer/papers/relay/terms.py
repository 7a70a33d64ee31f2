"""What teaches a loop to show the rounds of a solution (RELAY, section 3.1)."""
from __future__ import annotations

from typing import Any, Mapping

import jax.numpy as jnp

from loopformer.nn import modules
from loopformer.papers.relay.cell import LOSS, RoundHead
from loopformer.papers.relay.plans import WEIGHTS
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


@config_dataclass
class RoundCE(Term):
  """L_iter: a mean over problems by their weights of (1 / T) sum_t CE_t, CE_t being a mean over the tokens of round t.

  A problem's steps after its T-th weigh nothing, and get no gradient. The rollout's plan is RoundByRound, its cell
  Showing.
  """
  roll: str

  def check(self, model: Any):
    """Raises ConfigError where the head of rounds has fewer answers than there are symbols: the loss of those that it
    lacks is no number."""
    for head in modules.held(model.cell, 'head'):
      if isinstance(head, RoundHead) and head.outputs < model.read_in.vocab:
        raise ConfigError(f'model.cell.head.outputs = {head.outputs}: rounds are written in the {model.read_in.vocab} '
                          f'symbols of model.read_in.vocab; set it to {model.read_in.vocab}')

  def weight(self, batch: Batch) -> Array:
    """f32[]: the weights of the problems."""
    if WEIGHTS not in batch:
      raise ConfigError('objective.terms: the batch has no rounds, so that RoundCE has nothing to ask for; set task.of '
                        'to tasks.reasoning.Rounds')
    return batch[WEIGHTS].sum()

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = rolls[self.roll].aux
    if LOSS not in aux:
      raise ConfigError(f'objective: the rollout {self.roll!r} shows no rounds to learn; use a cell that does '
                        '(papers/relay/cell.py: Showing) and a plan that knows them (papers/relay/plans.py: '
                        'RoundByRound)')
    return jnp.sum(aux[LOSS])
