import collections
from fractions import Fraction
import functools
import itertools
import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from loopformer import plans
from loopformer.inference.evaluate import Depths
from loopformer.papers.relay.plans import RoundByRound
from loopformer.types import ConfigError
from tests import parts

DRAWS = 10_000
LIKELY = 1e-3  # least p-value; the keys are fixed, so a test that passes once passes always


@functools.cache
def draws(loops: int, count: int = DRAWS) -> np.ndarray:
  """Step sizes of many trajectories in units of 1/loops, i32[count, loops - 1]."""
  return np.asarray(jax.jit(jax.vmap(plans.Partition(loops).sizes))(jax.random.split(jax.random.key(3), count)))


def official(loops: int, rng: np.random.Generator) -> tuple[int, ...]:
  """A short trajectory by the paper's rule, written on its own (sheet, section 3)."""
  left, sizes = loops, []
  steps = rng.integers(1, loops)
  for after in range(steps - 1, 0, -1):
    sizes.append(int(rng.integers(1, left - after, endpoint=True)))
    left -= sizes[-1]
  return (*sizes, left)


def probability(sizes: tuple[int, ...], loops: int) -> Fraction:
  """Of a trajectory, exactly."""
  chance, left = Fraction(1, loops - 1), loops
  for after, size in zip(range(len(sizes) - 1, 0, -1), sizes):
    chance, left = chance / (left - after), left - size
  return chance


@hypothesis.settings(max_examples=6)
@hypothesis.given(loops=st.integers(2, 24), seed=st.integers(0, 2 ** 31 - 1))
def test_partition_is_a_trajectory(loops, seed):
  part = plans.Partition(loops)
  draw = jax.jit(jax.vmap(lambda key: (part.sizes(key), part(parts.plan_context(key)))))
  sizes, plan = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(seed), 100)))
  count = (sizes > 0).sum(1, keepdims=True)
  active = np.arange(loops - 1) < count
  assert sizes.shape == (100, loops - 1) and part.longest == loops - 1 and sizes.dtype == np.int32
  assert (sizes.sum(1) == loops).all()  # exactly, in integers
  assert count.min() >= 1 and count.max() <= loops - 1
  assert (sizes[active] >= 1).all() and not sizes[~active].any()
  np.testing.assert_array_equal(plan.active, active)
  np.testing.assert_allclose(plan.dt, sizes / loops, rtol=1e-6)
  np.testing.assert_allclose(plan.t[active], ((np.cumsum(sizes, 1) - sizes) / loops)[active], rtol=1e-6)


@pytest.mark.parametrize('loops', [2, 5, 8, 16])
def test_partition_lengths_are_uniform(loops):
  sizes = draws(loops)
  assert (sizes.sum(1) == loops).all()
  counts = np.bincount((sizes > 0).sum(1), minlength=loops)
  assert counts[0] == 0 and len(counts) == loops
  assert loops == 2 or stats.chisquare(counts[1:]).pvalue > LIKELY


@pytest.mark.parametrize('steps', [2, 3, 5, 7])
def test_partition_first_step_is_uniform_given_the_length(steps):
  loops = 8
  sizes = draws(loops)
  first = sizes[(sizes > 0).sum(1) == steps, 0]
  most = loops - steps + 1
  counts = np.bincount(first, minlength=most + 1)
  assert len(counts) == most + 1 and counts[0] == 0
  assert most == 1 or stats.chisquare(counts[1:]).pvalue > LIKELY


def test_partition_draws_as_the_official_sampler():
  loops = 5
  outcomes = [tuple(round(loops * step) for step in steps)
              for budget in range(1, loops) for steps in plans.all_schedules(budget, loops)]
  assert len(outcomes) == 15 and sum(probability(o, loops) for o in outcomes) == 1
  ours = collections.Counter(tuple(int(s) for s in row if s) for row in draws(loops))
  rng = np.random.default_rng(0)
  theirs = collections.Counter(official(loops, rng) for _ in range(DRAWS))
  assert set(ours) == set(theirs) == set(outcomes)
  expected = [float(probability(o, loops)) * DRAWS for o in outcomes]
  for seen in (ours, theirs):
    assert stats.chisquare([seen[o] for o in outcomes], expected).pvalue > LIKELY
  assert stats.chi2_contingency([[c[o] for o in outcomes] for c in (ours, theirs)]).pvalue > LIKELY


def test_random_depth_is_uniform():
  part = plans.RandomDepth(6)
  drawn = jax.jit(jax.vmap(lambda key: part(parts.plan_context(key))))(jax.random.split(jax.random.key(0), 5000))
  counts = np.bincount(drawn.active.sum(1), minlength=6)
  assert drawn.active.shape == (5000, 5) and counts[0] == 0 and stats.chisquare(counts[1:]).pvalue > LIKELY
  assert (np.diff(drawn.active.astype(int), axis=1) <= 0).all()  # the first steps, without gaps
  np.testing.assert_allclose(drawn.dt, 1 / 6, rtol=1e-6)
  np.testing.assert_allclose(drawn.t, np.broadcast_to(np.arange(5) / 6, (5000, 5)), rtol=1e-6)


@pytest.mark.parametrize('part', [plans.Partition(8), plans.RandomDepth(8)], ids=lambda part: type(part).__name__)
def test_expected_is_the_mean_number_of_steps(part):
  steps = jax.jit(jax.vmap(lambda key: part(parts.plan_context(key))))(jax.random.split(jax.random.key(1),
                                                                                        4000)).active.sum(1)
  assert part.expected == 4 == part.longest - 3
  assert abs(float(steps.mean()) - part.expected) < 4 * 2 / math.sqrt(4000)


@pytest.mark.parametrize('part', [plans.Partition, plans.RandomDepth])
@pytest.mark.parametrize('loops', [1, 0, -2])
def test_too_few_loops_name_the_field(part, loops):
  with pytest.raises(ConfigError, match=rf'{part.__name__}\.loops = {loops}: .* 2 or more'):
    part(loops)


@pytest.mark.parametrize('planner, name', [
    (plans.Given(most=3), 'loops'), (plans.LogDepth(size=parts.T), 'size'), (RoundByRound(most=3), 'rounds')])
def test_a_plan_of_what_a_batch_does_not_say(planner, name):
  with pytest.raises(ConfigError,
                     match=f'{type(planner).__name__}.* = .: it reads {name!r} of a batch, which has .*tokens'):
    planner(parts.plan_context(jax.random.key(0), parts.batch(2)))


def test_uniform():
  plan = plans.Uniform(5)(jax.random.key(0))
  np.testing.assert_allclose(plan.dt, [0.2] * 5, rtol=1e-6)
  np.testing.assert_allclose(plan.t, [0, 0.2, 0.4, 0.6, 0.8], rtol=1e-6)
  assert plan.active is None and plan.no_grad_steps is None and plan.steps == plans.Uniform(5).longest == 5
  with pytest.raises(ConfigError, match=r'Uniform\.loops = 0'):
    plans.Uniform(0)


def test_schedule_pads_with_skipped_rows():
  plan = plans.schedule((0.5, 0.3, 0.2), rows=5)
  assert plan.steps == 5 and plan.dt.dtype == plan.t.dtype == jnp.float32
  np.testing.assert_array_equal(plan.active, [True, True, True, False, False])
  np.testing.assert_allclose(plan.dt, [0.5, 0.3, 0.2, 0, 0], rtol=1e-6)
  np.testing.assert_allclose(plan.t, [0, 0.5, 0.8, 0, 0], rtol=1e-6)
  assert plans.schedule((0.5, 0.5)).active is None


@pytest.mark.parametrize('steps, message', [
    ((), 'steps is empty'),
    ((0.5, 0.4), r'\(0\.5, 0\.4\).*sum to 0\.9'),
    ((0.5, 0.6), r'sum to 1\.1'),
    ((1.5, -0.5), r'step size -0\.5 is not positive'),
    ((1.0, 0.0), r'step size 0 is not positive'),
    ((0.5, math.nan), 'nan'),
    ((math.inf,), 'inf'),
    ((0.25,) * 4, r'4 steps, more than the 3'),
], ids=['empty', 'short', 'long', 'negative', 'zero', 'nan', 'inf', 'many'])
def test_check_steps_refuses(steps, message):
  with pytest.raises(ConfigError, match=message):
    plans.check_steps(steps, most=3)


@pytest.mark.parametrize('steps, expected', [
    (1, (1.0,)), (4, (0.25,) * 4), (np.int64(2), (0.5, 0.5)), ([0.75, 0.25], (0.75, 0.25)), ((1.0,), (1.0,)),
    ((0.1,) * 10, (0.1,) * 10),
], ids=str)
def test_resolve(steps, expected):
  assert plans.resolve(steps) == expected


@pytest.mark.parametrize('steps, message', [
    (0, 'budget = 0'), (-3, 'budget = -3'), (10_001, 'budget = 10001: .*1 to 10000'), ((0.5, 0.4), 'budget = .*0.9')],
                         ids=str)
def test_resolve_refuses(steps, message):
  with pytest.raises(ConfigError, match=message):
    plans.resolve(steps, 'budget')


@pytest.mark.parametrize('loops', [1, 5, 8])
def test_all_schedules(loops):
  for budget in range(1, loops + 1):
    found = list(plans.all_schedules(budget, loops))
    assert len(found) == len(set(found)) == math.comb(loops - 1, budget - 1)
    for steps in found:
      assert len(plans.check_steps(steps, most=loops)) == budget
      assert all(abs(loops * step - round(loops * step)) < 1e-9 and step > 0 for step in steps)
    assert [s[0] for s in found] == sorted((s[0] for s in found), reverse=True)  # coarse first steps first


@pytest.mark.parametrize('make', [
    lambda: plans.Uniform(2.5), lambda: plans.Constant(loops=2.7), lambda: plans.Stairs(first=1, last=4, add=1.5),
    lambda: plans.Staged(loops=(1, 2.5)), lambda: plans.Given(most=2.5), lambda: Depths(budgets=(1, 2.5))],
                         ids=range(6))
def test_parts_of_a_loop_are_refused(make):
  with pytest.raises(ConfigError, match=r'= (2\.5|2\.7|1\.5): .* a whole number, '):
    make()


@pytest.mark.parametrize('steps', [2.7, np.float32(2.7)], ids=type)
def test_a_budget_is_a_whole_number(steps):
  with pytest.raises(ConfigError, match=r'budget = 2\.70*4?\d*: give a budget as an integer'):
    plans.resolve(steps, 'budget')


@pytest.mark.parametrize('budget', [0, 6, -1, 2.5])
def test_all_schedules_refuses(budget):
  with pytest.raises(ConfigError, match=rf'budget = {budget}\b.*1 to 5'):
    list(itertools.islice(plans.all_schedules(budget, 5), 1))
