"""Plans: how the steps of a rollout are arranged.

A planner is a frozen part, called with a key; it returns a `Plan` whose number of rows is static, so that one
compiled program serves everything it samples.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loopformer.types import Array, ConfigError, Plan, part

SUM_TOLERANCE = 1e-6


def _at_least(name: str, value: int, least: int, why: str):
  if value < least:
    raise ConfigError(f'{name} = {value}: {why}; set {name} to {least} or more')


@dataclasses.dataclass(frozen=True)
class Uniform:
  """`loops` steps of 1/loops each: the finest trajectory (LoopFormer section 3), and the plan of plain loops."""
  loops: int

  def __post_init__(self):
    _at_least('Uniform.loops', self.loops, 1, 'a plan needs at least one step')

  @property
  def longest(self) -> int:
    return self.loops

  @property
  def expected(self) -> float:
    return float(self.loops)

  def __call__(self, key: Array) -> Plan:
    return schedule((1.0 / self.loops,) * self.loops)


@dataclasses.dataclass(frozen=True)
class Partition:
  """LoopFormer's short trajectory (section 3, `sample_trajectory`), drawn in integers on the grid of 1/loops.

  The number of steps S is uniform on 1..loops-1. Each step but the last is uniform among the multiples of 1/loops
  that leave at least 1/loops for every step after it; the last takes what is left. The plan has loops-1 rows; the
  rows from S on are skipped.
  """
  loops: int

  def __post_init__(self):
    _at_least('Partition.loops', self.loops, 2,
              'a trajectory shorter than the long one needs at least two loops to choose from')

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

  def __call__(self, key: Array) -> Plan:
    sizes = self.sizes(key)
    start = jnp.cumsum(sizes) - sizes
    return Plan(t=start / jnp.float32(self.loops), dt=sizes / jnp.float32(self.loops), live=sizes > 0)


@dataclasses.dataclass(frozen=True)
class RandomDepth:
  """The first S of `loops` steps, S uniform on 1..loops-1: the second pass of the early-exit variants."""
  loops: int

  def __post_init__(self):
    _at_least('RandomDepth.loops', self.loops, 2, 'a depth below the full one needs at least two loops')

  @property
  def longest(self) -> int:
    return self.loops - 1

  @property
  def expected(self) -> float:
    return self.loops / 2

  def __call__(self, key: Array) -> Plan:
    count = jax.random.randint(key, (), 1, self.loops)
    index = jnp.arange(self.longest)
    dt = jnp.full(self.longest, 1.0 / self.loops, jnp.float32)
    return Plan(t=index * dt, dt=dt, live=index < count)


@part
class Fixed:
  """The same schedule every time: `steps` are step sizes with sum one."""
  steps: tuple[float, ...]

  def __post_init__(self):
    check_steps(self.steps)

  @property
  def longest(self) -> int:
    return len(self.steps)

  @property
  def expected(self) -> float:
    return float(len(self.steps))

  def __call__(self, key: Array) -> Plan:
    return schedule(self.steps)


def check_steps(steps: Sequence[float], most: int | None = None, name: str = 'steps') -> tuple[float, ...]:
  """The schedule as a tuple of floats, or an error.

  Raises:
    ConfigError: no steps, a step that is not positive, a sum that is not one, or more than `most` steps.
  """
  steps = tuple(float(s) for s in steps)
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
  dt = np.asarray(steps, np.float64)
  t = np.concatenate([[0.0], np.cumsum(dt)[:-1]])
  if rows is None:
    return Plan(t=jnp.asarray(t, jnp.float32), dt=jnp.asarray(dt, jnp.float32))
  pad = (0, rows - len(dt))
  return Plan(t=jnp.asarray(np.pad(t, pad), jnp.float32), dt=jnp.asarray(np.pad(dt, pad), jnp.float32),
              live=jnp.arange(rows) < len(dt))


def resolve(steps: int | Sequence[float], name: str = 'steps') -> tuple[float, ...]:
  """Step sizes of a budget (an int: that many equal steps) or of an explicit schedule (checked)."""
  if isinstance(steps, (int, np.integer)):
    if steps < 1:
      raise ConfigError(f'{name} = {steps}: a budget is a number of loops, 1 or more')
    return (1.0 / int(steps),) * int(steps)
  if isinstance(steps, float):
    raise ConfigError(f'{name} = {steps}: give a budget as an integer, or step sizes as a tuple, such as ({steps},)')
  return check_steps(steps, name=name)


def all_schedules(budget: int, loops: int) -> Iterator[tuple[float, ...]]:
  """Every schedule of `budget` steps on the grid of 1/loops, coarse first steps first.

  Raises:
    ConfigError: the budget is not in 1..loops.
  """
  if not 1 <= budget <= loops:
    raise ConfigError(f'budget = {budget}: schedules on a grid of 1/{loops} have 1 to {loops} steps')

  def sizes(left: int, steps: int):
    if steps == 1:
      yield (left,)
      return
    for first in range(left - steps + 1, 0, -1):
      for rest in sizes(left - first, steps - 1):
        yield (first, *rest)

  for row in sizes(loops, budget):
    yield tuple(size / loops for size in row)
