"""Plans: how the steps of a rollout are arranged.

A planner is a frozen part, called with a `PlanContext` (a key, the step, the batch); it returns a `Plan` whose number
of rows is static, so that one compiled program serves everything it samples.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loopformer.types import (
  AnyBatch,
  Array,
  ConfigError,
  Plan,
  PlanContext,
  Planner,
  config_dataclass,
  real,
  shown,
  whole,
)

SUM_TOLERANCE = 1e-6
LONGEST = 10_000  # loops of a plan


@dataclasses.dataclass(frozen=True)
class Uniform(Planner):
  """`loops` steps of 1/loops each: the finest trajectory (LoopFormer section 3), and the plan of plain loops."""
  loops: int

  def __post_init__(self):
    whole('Uniform.loops', self.loops, 1, why='a plan needs at least one step')

  @property
  def longest(self) -> int:
    return self.loops

  @property
  def expected(self) -> float:
    return float(self.loops)

  def __call__(self, context: PlanContext) -> Plan:
    return schedule((1.0 / self.loops,) * self.loops)


@dataclasses.dataclass(frozen=True)
class Partition(Planner):
  """LoopFormer's short trajectory (section 3, `sample_trajectory`), drawn in integers on the grid of 1/loops.

  The number of steps S is uniform on 1..loops-1. Each step but the last is uniform among the multiples of 1/loops
  that leave at least 1/loops for every step after it; the last takes what is left. The plan has loops-1 rows; the
  rows from S on are skipped.
  """
  loops: int

  def __post_init__(self):
    whole('Partition.loops', self.loops, 2,
          why='a trajectory shorter than the long one needs at least two loops to choose from')

  @property
  def longest(self) -> int:
    return self.loops - 1

  @property
  def expected(self) -> float:
    return self.loops / 2

  def sizes(self, key: Array) -> Array:
    """i32[loops-1]: step sizes in units of 1/loops, zero for the rows that are skipped; their sum is `loops`."""
    count_key, size_key = jax.random.split(key)
    count = jax.random.randint(count_key, (), 1, self.loops)

    def draw(left, row):
      index, row_key = row
      most = left - (count - index - 1)
      size = jax.random.randint(row_key, (), 1, jnp.maximum(most, 1) + 1)
      size = jnp.where(index < count - 1, size, jnp.where(index == count - 1, left, 0))
      return left - size, size

    rows = (jnp.arange(self.longest), jax.random.split(size_key, self.longest))
    return jax.lax.scan(draw, jnp.int32(self.loops), rows)[1]

  def __call__(self, context: PlanContext) -> Plan:
    sizes = self.sizes(context.key)
    start = jnp.cumsum(sizes) - sizes
    return Plan(t=start / jnp.float32(self.loops), dt=sizes / jnp.float32(self.loops), active=sizes > 0)


@dataclasses.dataclass(frozen=True)
class RandomDepth(Planner):
  """The first S of `loops` steps, S uniform on 1..loops-1: the second pass of the early-exit variants."""
  loops: int

  def __post_init__(self):
    whole('RandomDepth.loops', self.loops, 2, why='a depth below the full one needs at least two loops')

  @property
  def longest(self) -> int:
    return self.loops - 1

  @property
  def expected(self) -> float:
    return self.loops / 2

  def __call__(self, context: PlanContext) -> Plan:
    count = jax.random.randint(context.key, (), 1, self.loops)
    index = jnp.arange(self.longest)
    dt = jnp.full(self.longest, 1.0 / self.loops, jnp.float32)
    return Plan(t=index * dt, dt=dt, active=index < count)


# Depths that are drawn -----------------------------------------------------------------------------------------------


@config_dataclass
class Constant:
  """`loops`, always."""
  loops: int

  def __post_init__(self):
    whole('depth.loops', self.loops, 1, why='a plan needs at least one step')

  def mean(self, step: Array) -> Array:
    """Mean number of loops at a training step."""
    return jnp.float32(self.loops)

  @property
  def last_mean(self) -> float:
    """The mean at the end of training, as a number."""
    return float(self.loops)

  def draw(self, key: Array, mean: Array) -> Array:
    """i32[] loops, 1 or more, from a distribution with that mean."""
    return jnp.int32(mean)


@config_dataclass
class Poisson:
  """max(1, Poisson(average)) (Parcae section 3)."""
  average: float

  def __post_init__(self):
    real('depth.average', self.average, '(0, inf)')

  def mean(self, step: Array) -> Array:
    return jnp.float32(self.average)

  @property
  def last_mean(self) -> float:
    return self.average + math.exp(-self.average)

  def draw(self, key: Array, mean: Array) -> Array:
    return jnp.maximum(jax.random.poisson(key, mean), 1).astype(jnp.int32)


@config_dataclass
class LogNormalPoisson:
  """Poisson(exp(tau)) + 1, tau ~ Normal(log(average) - sigma^2 / 2, sigma): heavy-tailed, mean average + 1 (Huginn 3).
  """
  average: float
  sigma: float = 0.5

  def __post_init__(self):
    real('depth.average', self.average, '(0, inf)')

  def mean(self, step: Array) -> Array:
    return jnp.float32(self.average)

  @property
  def last_mean(self) -> float:
    return self.average + 1

  def draw(self, key: Array, mean: Array) -> Array:
    rate_key, count_key = jax.random.split(key)
    rate = mean * jnp.exp(self.sigma * jax.random.normal(rate_key) - self.sigma ** 2 / 2)
    return (jax.random.poisson(count_key, rate) + 1).astype(jnp.int32)


@config_dataclass
class Ramp:
  """A curriculum: the mean of `of` grows to its value over the first `steps` steps, max(1, ceil(mean * f(step/steps))).

  curve: f, `linear` or `one_minus_sqrt` of this module (retrofitted recurrence, Huginn section 11).
  """
  of: Constant | Poisson | LogNormalPoisson
  steps: int
  curve: Callable[[Array], Array]

  def __post_init__(self):
    whole('depth.steps', self.steps, 1, why='a ramp takes at least one step')

  def mean(self, step: Array) -> Array:
    share = jnp.minimum(step / self.steps, 1.0)
    return jnp.maximum(1.0, jnp.ceil(self.of.mean(step) * self.curve(share) - 1e-4))

  @property
  def last_mean(self) -> float:
    return self.of.last_mean

  def draw(self, key: Array, mean: Array) -> Array:
    return self.of.draw(key, mean)


def linear(share: Array) -> Array:
  """share."""
  return share


def one_minus_sqrt(share: Array) -> Array:
  """1 - sqrt(1 - share): slow at first."""
  return 1.0 - jnp.sqrt(1.0 - share)


@config_dataclass
class Stairs:
  """first, then `add` more every `every` steps, up to `last` (looped in-context learning, 3.1)."""
  first: int
  last: int
  add: int = 2
  every: int = 500

  def __post_init__(self):
    whole('depth.first', self.first, 1, why='a plan needs at least one step')
    whole('depth.last', self.last, self.first, why='a curriculum does not go down')
    whole('depth.add', self.add, 0, why='a curriculum does not go down')
    whole('depth.every', self.every, 1, why='a stair takes at least one step')

  def mean(self, step: Array) -> Array:
    return jnp.minimum(self.first + self.add * (step // self.every), self.last).astype(jnp.float32)

  @property
  def last_mean(self) -> float:
    return float(self.last)

  def draw(self, key: Array, mean: Array) -> Array:
    return jnp.int32(mean)


@config_dataclass
class Shared:
  """One depth for a whole microbatch: steps beyond it are skipped, and cost nothing."""

  def draw(self, depth: Any, context: PlanContext, mean: Array) -> Array:
    """i32[]."""
    return depth.draw(context.key, mean)


@config_dataclass
class PerSequence:
  """A depth for every sequence: the batch runs as many steps as its deepest, a sequence that is done stands still."""

  def draw(self, depth: Any, context: PlanContext, mean: Array) -> Array:
    """i32[B]."""
    return jax.vmap(lambda key: depth.draw(key, mean))(context.keys())


@config_dataclass
class Truncated(Planner):
  """T steps, T drawn from `depth`, of which the last min(T, graded) are differentiated (Parcae, Huginn section 3).

  The T - graded before them run without gradient, as many as are needed, in one compiled program. For loops whose step
  does not know the schedule. While the mean of a curriculum is below `graded`, so is the number of graded steps.
  """
  depth: Constant | Poisson | LogNormalPoisson | Ramp | Stairs
  graded: int
  over: Shared | PerSequence = Shared()

  def __post_init__(self):
    whole('Truncated.graded', self.graded, 1, why='without a graded step nothing in the loop is learned')
    if self.graded > math.ceil(self.depth.last_mean):
      raise ConfigError(f'Truncated.graded = {self.graded} is more than the mean number of steps, '
                        f'{self.depth.last_mean:g}; lower it')

  @property
  def longest(self) -> int:
    return self.graded

  @property
  def expected(self) -> float:
    return self.depth.last_mean

  @property
  def differentiated(self) -> float:
    return min(self.depth.last_mean, self.graded)

  def __call__(self, context: PlanContext) -> Plan:
    mean = self.depth.mean(context.step)
    total = self.over.draw(self.depth, context, mean)
    graded = jnp.minimum(total, jnp.minimum(self.graded, jnp.ceil(mean).astype(jnp.int32)))
    rows = jnp.arange(self.graded)
    return Plan(t=jnp.zeros(self.graded), dt=jnp.ones(self.graded), active=(rows < graded[..., None]).T,
                no_grad_steps=total - graded)


@config_dataclass
class RandomSupervision(Planner):
  """`graded` of `loops` steps, drawn without replacement: what LoopUS supervises (section 3). The others run without
  gradient, none hands a gradient to the one before it, and those after the last of them do not run.

  For loops whose step does not know the schedule. One compiled program serves every draw. What stands before the loop
  gets no gradient; let the optimiser leave it alone (`training.frozen.Freeze`), lest it decays.
  """
  loops: int
  graded: int
  detached = True

  def __post_init__(self):
    count('RandomSupervision.loops', self.loops)
    whole('RandomSupervision.graded', self.graded, 1, self.loops,
          why=f'of {self.loops} loops, at least one is supervised')

  @property
  def longest(self) -> int:
    return self.graded

  @property
  def expected(self) -> float:
    return self.graded * (self.loops + 1) / (self.graded + 1)

  @property
  def differentiated(self) -> float:
    return float(self.graded)

  def __call__(self, context: PlanContext) -> Plan:
    drawn = jnp.sort(jax.random.choice(context.key, self.loops, (self.graded,), replace=False))
    return Plan(t=jnp.zeros(self.graded), dt=jnp.ones(self.graded),
                no_grad_steps=jnp.diff(drawn, prepend=-1)[:, None] - 1)


@config_dataclass
class Given(Planner):
  """As many steps as each sequence asks for in `batch['loops']`, up to `most` (length generalisation, section 3)."""
  most: int

  def __post_init__(self):
    whole('Given.most', self.most, 1, why='a plan needs at least one step')

  @property
  def longest(self) -> int:
    return self.most

  @property
  def expected(self) -> float:
    return float(self.most)

  def __call__(self, context: PlanContext) -> Plan:
    loops = context.read('loops', f'Given.most = {self.most}')
    return Plan(t=jnp.zeros(self.most), dt=jnp.ones(self.most), active=jnp.arange(self.most)[:, None] < loops)


@config_dataclass
class LogDepth(Planner):
  """As many steps as the length of a sequence's input asks for, max(1, ceil(scale log2(n)^power)) + more.

  n is `batch['size']`, `size` at most. With power = 1 it is what regular languages and connectivity need (Merrill and
  Sabharwal, 2503.03961, theorems 1 and 2); power = 0 is a fixed depth. rows: the most tokens of a row, where these are
  more than n and a query: with fillers, or of a graph of n vertices.
  """
  size: int
  scale: float = 1.0
  power: float = 1.0
  more: int = 0
  rows: int | None = None

  def __post_init__(self):
    whole('LogDepth.size', self.size, 1, 2 ** 20, why='it is the longest input')
    real('LogDepth.scale', self.scale, '(0, inf)')
    real('LogDepth.power', self.power, '[0, inf)')
    whole('LogDepth.more', self.more, 0, LONGEST)
    if self.rows is not None:
      whole('LogDepth.rows', self.rows, self.size, why='a row holds the longest input')
    if self.power * math.log2(max(1.0, math.log2(self.size))) > 64 or self.longest > LONGEST:
      raise ConfigError(f'LogDepth.power = {self.power}: more than {LONGEST} steps for an input of {self.size}; lower '
                        'LogDepth.power, LogDepth.scale or LogDepth.more')

  @property
  def longest(self) -> int:
    return self.loops(self.size)

  @property
  def expected(self) -> float:
    return float(self.longest)

  def loops(self, n: int) -> int:
    """Steps for an input of n tokens. Raises ConfigError where n is not from 1 to `size`."""
    whole('n', n, 1, self.size, why='LogDepth.size is the longest input')
    steps = self.scale * math.log2(n) ** self.power
    return max(1, math.ceil(round(steps, 9))) + self.more  # a whole number of steps is no step more for rounding

  def check_batch(self, batch: AnyBatch):
    sizes = np.asarray(batch.get('size', ()))
    wrong = sizes[(sizes < 1) | (sizes > self.size)]
    if wrong.size:
      raise ConfigError(f'LogDepth.size = {self.size}: the batch has an input of size {wrong[0]}, which would take the '
                        f'steps of another; set LogDepth.size to {max(self.size, sizes.max())}, and let sizes begin '
                        'at 1')

  def __call__(self, context: PlanContext) -> Plan:
    rows = context.batch['tokens'].shape[1]
    if self.rows is not None and rows > self.rows:
      raise ConfigError(f'LogDepth.rows = {self.rows}: the rows of the batch have {rows} tokens; raise LogDepth.rows '
                        f'to {rows}, and LogDepth.size to the longest input')
    if self.rows is None and rows > self.size + 1:  # a query ends the input
      raise ConfigError(f'LogDepth.size = {self.size}: the rows of the batch have {rows} tokens, a query included; '
                        f'raise LogDepth.size to {rows - 1}, or give LogDepth.rows where they hold fillers')
    table = jnp.array([self.longest, *map(self.loops, range(1, self.size + 1))])
    index = jnp.arange(self.longest)[:, None]
    sizes = context.read('size', f'LogDepth.size = {self.size}')
    return Plan(t=jnp.zeros(self.longest), dt=jnp.ones(self.longest), active=index < table[sizes])


@config_dataclass
class Staged(Planner):
  """`loops[stage]` steps, the stage being what the run's controller has decided (SHIFT): one program for all stages."""
  loops: tuple[int, ...]

  def __post_init__(self):
    if not self.loops:
      raise ConfigError('Staged.loops is empty: give numbers of loops')
    for loops in self.loops:
      whole('Staged.loops', loops, 1, why='a plan needs at least one step')

  @property
  def stages(self) -> tuple[int, ...]:
    """The loops of every stage."""
    return self.loops

  @property
  def longest(self) -> int:
    return max(self.loops)

  @property
  def expected(self) -> float:
    return float(self.loops[-1])

  def __call__(self, context: PlanContext) -> Plan:
    index = jnp.arange(self.longest)
    loops = jnp.asarray(self.loops)[context.stage]
    return Plan(t=index / jnp.maximum(loops, 1), dt=jnp.broadcast_to(1.0 / loops, index.shape), active=index < loops)


class Around(Planner):
  """A planner that changes what another one, `of`, makes."""
  of: Any

  @property
  def longest(self) -> int:
    return self.of.longest

  @property
  def expected(self) -> float:
    return self.of.expected

  @property
  def differentiated(self) -> float:
    return self.of.differentiated

  @property
  def detached(self) -> bool:
    return self.of.detached

  @property
  def stages(self) -> tuple[int, ...]:
    return self.of.stages

  def check_batch(self, batch: AnyBatch):
    self.of.check_batch(batch)


def check_steps(steps: Sequence[float], most: int | None = None, name: str = 'steps') -> tuple[float, ...]:
  """The schedule as a tuple of floats, or an error.

  Raises:
    ConfigError: no steps, a step that is not positive, a sum that is not one, or more than `most` steps.
  """
  steps = tuple(real(name, s, '[-inf, inf]') for s in steps)
  shown = ', '.join(f'{s:g}' for s in steps)
  if not steps:
    raise ConfigError(f'{name} is empty: give at least one step size, such as 1.0')
  bad = [s for s in steps if not s > 0]
  if bad:
    raise ConfigError(f'{name} = ({shown}): step size {bad[0]:g} is not positive; every step must move forward')
  if most is not None and len(steps) > most:
    raise ConfigError(f'{name} = ({shown}): {len(steps)} steps, more than the {most} of the finest trajectory; '
                      f'use at most {most}')
  if abs(math.fsum(steps) - 1) > SUM_TOLERANCE:
    raise ConfigError(f'{name} = ({shown}): the steps sum to {math.fsum(steps):.9g}, not to 1; '
                      'scale them so that they cover the whole trajectory')
  return steps


def schedule(steps: Sequence[float], rows: int | None = None) -> Plan:
  """The plan of a schedule; with `rows`, padded by skipped rows so that one program serves many schedules."""
  return jax.tree.map(jnp.asarray, on_host(steps, rows))


def on_host(steps: Sequence[float], rows: int | None = None) -> Plan:
  """As `schedule`, in NumPy's arrays: no device is asked for anything."""
  dt = np.asarray(steps, np.float32)
  t = np.concatenate([[0.0], np.cumsum(steps, dtype=np.float64)[:-1]]).astype(np.float32)
  plan: Any = Plan  # whose arrays are JAX's elsewhere
  if rows is None:
    return plan(t=t, dt=dt)
  pad = (0, rows - len(dt))
  return plan(t=np.pad(t, pad), dt=np.pad(dt, pad), active=np.arange(rows) < len(dt))


def count(name: str, loops: int) -> int:
  """A number of loops, from 1 to `LONGEST`: each is a row of every plan, and an entry of every cache, which are
  allocated whole.

  Raises:
    ConfigError: it is none.
  """
  return whole(name, loops, 1, LONGEST, why='no program is made for such a number of loops')


def resolve(steps: int | Sequence[float], name: str = 'steps') -> tuple[float, ...]:
  """Step sizes of a budget (an int: that many equal steps) or of an explicit schedule (checked).

  Raises:
    ConfigError: neither; a budget that is none (`count`), or a schedule that is none.
  """
  if isinstance(steps, (int, np.integer, np.ndarray, jax.Array)) and not isinstance(steps, bool) and not np.ndim(steps):
    loops = count(name, steps)
    return (1.0 / loops,) * loops
  if (isinstance(steps, (str, bytes, Mapping)) or not isinstance(steps, (Sequence, np.ndarray, jax.Array))
      or not np.ndim(steps)):
    raise ConfigError(f'{name} = {shown(steps)}: give a budget as an integer, or step sizes as a tuple, '
                      'such as (0.5, 0.5)')
  return check_steps(steps, name=name)


def all_schedules(budget: int, loops: int, name: str = 'budget') -> Iterator[tuple[float, ...]]:
  """Every schedule of `budget` steps on the grid of 1/loops, coarse first steps first. name: what errors call the
  budget.

  Raises:
    ConfigError: the budget is not in 1..loops.
  """
  if budget not in range(1, loops + 1):
    raise ConfigError(f'{name} = {budget}: schedules on a grid of 1/{loops} have 1 to {loops} steps')

  def sizes(left: int, steps: int):
    if steps == 1:
      yield (left,)
      return
    for first in range(left - steps + 1, 0, -1):
      for rest in sizes(left - first, steps - 1):
        yield (first, *rest)

  for row in sizes(loops, budget):
    yield tuple(size / loops for size in row)
