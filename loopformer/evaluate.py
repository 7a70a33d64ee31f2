"""Evaluation at chosen depths: what a measure reports of every schedule, from one compiled program."""
from __future__ import annotations

import functools
from typing import Any, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import exits, loop, measures, plans
from loopformer.model import make_readout
from loopformer.types import Array, Batch, ConfigError, Draw, Params, Plan, Planner, part


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
class Run:
  """A plan that may depend on the sequence, and the exit that picks from its states."""
  plan: Planner
  exit: exits.Final | exits.Confidence = exits.Final()


@part
class Named:
  """Besides budgets, runs by name."""
  runs: Mapping[str, Run]
  budgets: tuple[int, ...] = ()

  def schedules(self) -> dict[str, Any]:
    """Name -> step sizes, or a run."""
    return {**{str(budget): plans.resolve(budget) for budget in self.budgets}, **self.runs}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score(model: Any, measure: Any, leave: Any, params: Params, batch: Batch, plan: Plan,
          byte_lengths: Array | None) -> Any:
  """Sums of `measure` over the batch, f32[] each, of the length of its last states, and of steps."""
  trace = model.apply({'params': params}, batch['tokens'], plan, batch['positions'], batch['segments'],
                      keep=leave.keep)
  readout = make_readout(model, params, batch)
  z, steps = leave.pick(readout, trace, batch)
  return {**measure.sums(readout, z, batch, byte_lengths), 'state norm': loop.Norms()(trace.x).sum(),
          'steps': steps.sum(), 'sequences': jnp.float32(steps.size)}


def evaluate(model: Any, params: Params, batches: Iterable[Batch], schedules: Mapping[str, Any],
             byte_lengths: np.ndarray | None = None, measure: Any = measures.Tokens()) -> list[dict[str, Any]]:
  """One row a schedule: budget, schedule, what `measure` reports, and the mean length of the states at its end.

  Args:
    schedules: name -> step sizes, all of which run through one program, padded to the longest; or name -> a `Run`,
      whose budget is the mean of the steps that sequences took.
    byte_lengths: i32[V], UTF-8 bytes that each token stands for.
  """
  rows = max((len(steps) for steps in schedules.values() if not isinstance(steps, Run)), default=1)
  totals = {name: {} for name in schedules}
  for batch in batches:
    draw = Draw(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0),
                batch={**batch, 'row': jnp.arange(len(batch['tokens']))})
    sums = {}
    for name, steps in schedules.items():
      run = steps if isinstance(steps, Run) else Run(plan=None)
      plan = plans.schedule(steps, rows) if run.plan is None else run.plan(draw)
      sums[name] = score(model, measure, run.exit, params, batch, plan, byte_lengths)
    for name, value in jax.device_get(sums).items():
      totals[name] = {key: totals[name].get(key, 0.0) + float(number) for key, number in value.items()}
  return [{'budget': round(total['steps'] / total['sequences'], 2) if isinstance(schedules[name], Run)
           else len(schedules[name]), 'schedule': name, **measure.row(total),
           'state norm': total['state norm'] / total['sequences']} for name, total in totals.items()]
