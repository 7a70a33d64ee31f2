"""Evaluation at chosen depths: what a measure reports of every schedule, from one compiled program."""
from __future__ import annotations

import functools
from typing import Any, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import loop, measures, plans
from loopformer.model import make_readout
from loopformer.types import Array, Batch, ConfigError, Draw, Params, Plan, part


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


@part
class Oracle:
  """Besides budgets, as many steps as every example itself asks for, up to `most`."""
  budgets: tuple[int, ...]
  most: int

  def schedules(self) -> dict[str, Any]:
    """Name -> step sizes, or a planner."""
    return {**Depths(budgets=self.budgets).schedules(), 'oracle': plans.Given(most=self.most)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def score(model: Any, measure: Any, params: Params, batch: Batch, plan: Plan, byte_lengths: Array | None) -> Any:
  """Sums of `measure` over the batch, f32[] each, and of the length of its last states."""
  trace = model.apply({'params': params}, batch['tokens'], plan, batch['positions'], batch['segments'],
                      keep=loop.Norms())
  sums = measure.sums(make_readout(model, params, batch), trace.z, batch, byte_lengths)
  last = loop.Norms()(trace.x)
  return {**sums, 'state norm': last.sum(), 'sequences': jnp.float32(last.size), 'loops': _loops(plan, last.size)}


def _loops(plan, rows):
  live = jnp.ones(plan.steps) if plan.live is None else plan.live
  return jnp.broadcast_to(live.sum(0), (rows,)).sum()


def evaluate(model: Any, params: Params, batches: Iterable[Batch], schedules: Mapping[str, Any],
             byte_lengths: np.ndarray | None = None, measure: Any = measures.Tokens()) -> list[dict[str, Any]]:
  """One row a schedule: budget, schedule, what `measure` reports, and the mean length of the states at its end.

  Args:
    schedules: name -> step sizes, all of which run through one program, padded to the longest; or name -> a planner,
      whose steps may depend on the sequence.
    byte_lengths: i32[V], UTF-8 bytes that each token stands for.
  """
  steps = {name: steps for name, steps in schedules.items() if not callable(steps)}
  rows = max(map(len, steps.values()), default=1)
  totals = {name: {} for name in schedules}
  for batch in batches:
    sums = {name: score(model, measure, params, batch, _plan(schedule, rows, batch), byte_lengths)
            for name, schedule in schedules.items()}
    for name, value in jax.device_get(sums).items():
      totals[name] = {key: totals[name].get(key, 0.0) + float(number) for key, number in value.items()}
  return [{'budget': round(total['loops'] / total['sequences'], 2) if callable(schedules[name]) else len(steps[name]),
           'schedule': name, **measure.row(total), 'state norm': total['state norm'] / total['sequences']}
          for name, total in totals.items()]


def _plan(schedule, rows, batch):
  if not callable(schedule):
    return plans.schedule(schedule, rows)
  size = len(batch['tokens'])
  return schedule(Draw(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0),
                       batch={**batch, 'row': jnp.arange(size)}))
