"""Evaluation at chosen depths: loss, perplexity and bits per byte of every schedule, from one compiled program."""
from __future__ import annotations

import functools
import math
from typing import Any, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans
from loopformer.terms.cross_entropy import nll_sum
from loopformer.types import Array, Batch, ConfigError, Params, Plan, part


@part
class Depths:
  """Budgets to evaluate at; each is a number of equal steps."""
  budgets: tuple[int, ...] = (1, 2, 4, 8)

  def __post_init__(self):
    if not self.budgets or min(self.budgets) < 1:
      raise ConfigError(f'evals.budgets = {self.budgets}: give one or more numbers of loops, each 1 or more')

  def schedules(self) -> dict[str, tuple[float, ...]]:
    """Name -> step sizes."""
    return {str(budget): plans.resolve(budget) for budget in self.budgets}


@functools.partial(jax.jit, static_argnums=0)
def score(model: Any, params: Params, batch: Batch, plan: Plan, byte_lengths: Array) -> Array:
  """f32[3]: negative log-likelihood in nats, tokens, and bytes of text, summed over the batch."""
  trace = model.apply({'params': params}, batch['tokens'], plan, batch['positions'], batch['segments'])
  table = model.apply({'params': params}, method='table')
  nll = nll_sum(trace.z, table, batch['targets'], batch['weights'])
  return jnp.stack([nll, batch['weights'].sum(), (batch['weights'] * byte_lengths[batch['targets']]).sum()])


def evaluate(model: Any, params: Params, batches: Iterable[Batch], schedules: Mapping[str, Sequence[float]],
             byte_lengths: np.ndarray) -> list[dict[str, Any]]:
  """One row a schedule: budget, schedule, loss (nats a token), perplexity, bits per byte, tokens.

  Args:
    schedules: name -> step sizes; all run through one program, padded to the longest.
    byte_lengths: i32[V], UTF-8 bytes that each token stands for.
  """
  rows = max(map(len, schedules.values()))
  totals = {name: np.zeros(3) for name in schedules}
  for batch in batches:
    sums = {name: score(model, params, batch, plans.schedule(steps, rows), byte_lengths)
            for name, steps in schedules.items()}
    for name, value in sums.items():
      totals[name] += np.asarray(value, np.float64)
  return [_row(name, schedules[name], *total) for name, total in totals.items()]


def _row(name, steps, nll, tokens, size):
  loss = nll / tokens
  return {'budget': len(steps), 'schedule': name, 'loss': loss, 'perplexity': math.exp(min(loss, 700.0)),
          'bits_per_byte': nll / math.log(2) / size if size else math.nan, 'tokens': int(tokens)}
