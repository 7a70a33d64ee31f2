"""Evaluation at chosen depths: what a measure reports of every schedule, from one compiled program."""
from __future__ import annotations

import functools
from typing import Any, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import loop, plans, sharding
from loopformer.inference import exits, measures
from loopformer.model import run_batch
from loopformer.training import processes
from loopformer.types import (
  AnyBatch,
  Array,
  Batch,
  ConfigError,
  Params,
  Plan,
  PlanContext,
  Planner,
  config_dataclass,
  whole,
)


@config_dataclass
class Depths:
  """Budgets to evaluate at; each is a number of equal steps."""
  budgets: tuple[int, ...] = (1, 2, 4, 8)

  def __post_init__(self):
    if not self.budgets:
      raise ConfigError('evals.budgets is empty: give one or more numbers of loops')
    for budget in self.budgets:
      whole('evals.budgets', budget, 1)

  def schedules(self) -> dict[str, tuple[float, ...]]:
    """Name -> step sizes."""
    return {str(budget): plans.resolve(budget, 'evals.budgets') for budget in self.budgets}


@config_dataclass
class Run:
  """A plan that may depend on the sequence, and the exit that says which of its states answers."""
  plan: Planner
  exit: exits.Final | exits.Confidence | exits.Adaptive = exits.Final()


@config_dataclass
class Named:
  """Besides budgets, runs by name."""
  runs: Mapping[str, Run]
  budgets: tuple[int, ...] = ()

  def schedules(self) -> dict[str, Any]:
    """Name -> step sizes, or a run."""
    return {**{str(budget): plans.resolve(budget, 'evals.budgets') for budget in self.budgets}, **self.runs}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def score(model: Any, measure: Any, exit_policy: Any, params: Params, batch: Batch, plan: Plan,
          byte_lengths: Array | np.ndarray | None, threshold: Array | None = None) -> Any:
  """Sums over the batch, f32[] each: of `measure`, of the length of its last states, of the steps that sequences took
  (a mean over their answers), and of those that ran until the last was ready. threshold: the exit's."""
  trace, readout = exit_policy.run(model, params, batch, plan, threshold)
  asked = (batch['weights'] > 0).astype(jnp.float32)
  steps = trace.steps
  if steps.ndim > 1:
    steps = (steps * asked).sum(-1) / jnp.maximum(asked.sum(-1), 1)
  rows = measures.counted(batch)
  return {**measure.sums(readout, trace.z, batch, byte_lengths), 'state norm': (loop.Norms()(trace.x) * rows).sum(),
          'steps': (steps * rows).sum(), 'ran': trace.aux['ran'] * rows.sum(), 'sequences': rows.sum()}


@functools.partial(jax.jit, static_argnums=0)
def motion(model: Any, params: Params, batch: Batch, plan: Plan) -> dict[str, Array]:
  """What the steps of a plan do to the state, means over tokens: its length f32[K], and how far each step but the first
  moves it, as a part of that, f32[K - 1]."""
  trace = run_batch(model, params, batch, plan, keep=loop.Every())
  assert trace.xs is not None
  xs = trace.xs.astype(jnp.float32)
  norms, moves = (jnp.linalg.norm(x, axis=-1) for x in (xs, xs[1:] - xs[:-1]))
  return {'state norm': norms.mean((1, 2)), 'state change': (moves / jnp.maximum(norms[1:], 1e-9)).mean((1, 2))}


def evaluate(model: Any, params: Params, batches: Iterable[AnyBatch], schedules: Mapping[str, Any],
             byte_lengths: Array | np.ndarray | None = None, measure: Any = measures.Tokens()) -> list[dict[str, Any]]:
  """One row a schedule: budget, schedule, what `measure` reports, `ran` (steps until the batch was done, a mean) and
  the mean length of the states at its end.

  Args:
    schedules: name -> step sizes or a budget, all of which run through one program, padded to the longest; or name -> a
      `Run`, whose budget is the mean of the steps that sequences took. Thresholds of one rule share a program.
    batches: of arrays on the host, whole in every process; or already divided over the parameters' mesh.
    byte_lengths: i32[2, V], UTF-8 bytes that each token stands for (`measures.text_bytes`); or i32[V], wherever it
      stands.
    params: on one device, or divided over a mesh (`loopformer.load(..., mesh=)`), over which the rows are divided then;
      batches that it does not divide are filled up with rows that do not count. Parameters that are divided over fsdp
      are gathered whenever they are needed: `sharding.gathered` does that once, where a device has room.

  Raises:
    ConfigError: no batch, or none that asks for anything; a batch that lacks rows, or has longer ones than the model
      has positions; or, of arrays on the host, ids that the model does not have, or tokens that its cell makes nothing
      of in so many steps, or a `Run`'s plan.
  """
  mesh = sharding.mesh_of(params)
  schedules = {name: steps if isinstance(steps, Run) else plans.resolve(steps, name=f'schedules[{name!r}]')
               for name, steps in schedules.items()}
  rows = max((len(steps) for steps in schedules.values() if not isinstance(steps, Run)), default=1)
  totals: dict[str, dict[str, float]] = {name: {} for name in schedules}
  longest = max((steps.plan.longest if isinstance(steps, Run) else len(steps) for steps in schedules.values()),
                default=1)
  if isinstance(batches, Mapping):
    raise ConfigError('batches: one batch alone; give a list of them')
  for batch in batches:
    missing = [name for name in ('tokens', 'targets', 'weights') if name not in batch]
    if missing:
      raise ConfigError(f'batches: a batch has {", ".join(batch) or "nothing"}, and no {missing[0]}; give tokens, '
                        'targets and weights')
    if not isinstance(batch['tokens'], jax.Array):
      _check_ids(model, batch)
      model.cell.check_tokens(batch['tokens'], longest, batch.get('segments'))
      for steps in schedules.values():
        if isinstance(steps, Run):
          steps.plan.check_batch(batch)
    batch = {'row': np.arange(len(batch['tokens']), dtype=np.int32), **batch}
    if mesh is not None and sharding.mesh_of(batch['tokens']) is None:
      batch = sharding.spread(_filled(batch, sharding.row_parts(mesh)), mesh)
    batch = measure.asked(batch)
    context = PlanContext(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0), batch=batch)
    sums = {}
    for name, steps in schedules.items():
      chosen, exit_part = ((steps.plan(context), steps.exit) if isinstance(steps, Run) else
                           (plans.schedule(steps, rows), exits.Final()))
      plan = measure.told(chosen, batch)
      exit_policy, threshold = exits.compiled(exit_part)
      with sharding.on(mesh):
        sums[name] = score(model, measure, exit_policy, params, batch, plan, byte_lengths, threshold)
    for name, value in processes.fetch(sums).items():
      totals[name] = {key: totals[name].get(key, 0.0) + float(number) for key, number in value.items()}
  for total in totals.values():
    if not total.get('tokens', len(total)):
      raise ConfigError('batches: ' + ('there are none' if not total else 'nothing is asked for in any of them, for '
                                       'all weights are 0') + '; give some with weights above 0')
  return [{'budget': round(total['steps'] / total['sequences'], 2) if isinstance(schedules[name], Run)
           else len(schedules[name]), 'schedule': name, **measure.row(total), 'ran': total['ran'] / total['sequences'],
           'state norm': total['state norm'] / total['sequences']} for name, total in totals.items()]


def _check_ids(model: Any, batch: AnyBatch):
  """Raises ConfigError where a batch of arrays on the host has ids that the model does not."""
  for name, count in (('tokens', model.read_in.vocab), ('targets', model.outputs)):
    ids = np.asarray(batch[name])
    if count > 1 and ids.size and np.issubdtype(ids.dtype, np.integer) and not 0 <= ids.min() <= ids.max() < count:
      raise ConfigError(f'{name}: ids from {ids.min()} to {ids.max()}, but the model has 0 to {count - 1}; give these, '
                        'and the weight 0 to what is not asked for')


def _filled(batch: AnyBatch, parts: int) -> AnyBatch:
  """The batch with copies of its first row at the end, of no weight and not counted, so that `parts` divides it."""
  count = len(batch['tokens'])
  missing = -count % parts
  if not missing:
    return batch
  filled = {name: np.concatenate([rows, np.repeat(rows[:1], missing, 0)])
            for name, rows in ((name, np.asarray(rows)) for name, rows in batch.items())}
  real = (np.arange(count + missing) < count).astype(np.float32)
  weights = filled['weights']
  return {**filled, 'weights': weights * real.reshape(-1, *(1,) * (weights.ndim - 1)), 'counted': real}
