"""Gradients of microbatches: what they share, and what each draws for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loopformer import loop, plans
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.sharding import Mesh
from loopformer.starts import Noise
from loopformer.terms.cross_entropy import CE
from loopformer.training.step import State, make_step
from loopformer.types import Plan, Planner
from tests import parts

ROWS, SEED = 8, 4
# Unequal between sequences, and so between microbatches.
WEIGHTS = (jnp.arange(parts.T)[None] < (1 + jnp.arange(ROWS)[:, None] % parts.T)).astype(jnp.float32)


def after(model, params, objective, accumulate: int, taken: int = 0):
  """The parameters after a step that follows `taken` others, and its metrics."""
  optimizer = optax.sgd(1.0)  # the update is the gradient
  state = State(step=jnp.int32(taken), params=jax.tree.map(jnp.array, params), optimizer=optimizer.init(params))
  step = make_step(model, objective, optimizer, Mesh().make(jax.devices()[:1]), accumulate, SEED)
  new, values = step(state, parts.batch(ROWS, weights=WEIGHTS))
  return new.params, jax.device_get(values)


class EachDepth(Planner):
  """One step or two, drawn for every sequence."""
  longest, expected = 2, 1.5

  def __call__(self, context):
    deep = jax.vmap(jax.random.bernoulli)(context.keys())
    return Plan(t=jnp.zeros(2), dt=jnp.ones(2), active=jnp.stack([jnp.ones_like(deep), deep]))


@pytest.mark.slow
def test_parts_of_a_model_add_up_to_the_batch():
  """What is drawn for a sequence, here its depth and its start, is the same in one part and in four."""
  model = parts.looped(parts.plain(1), start=Noise(std=1.0), remat=loop.KeepAll())
  objective = Objective(rolls={'r': Rollout(EachDepth())}, terms={'lm': Weighted(1.0, CE(roll='r', chunk=8))})
  (whole, values), (summed, in_parts) = (after(model, parts.params(model), objective, count) for count in (1, 4))
  parts.close(summed, whole, 1e-6)
  assert in_parts['lm'] == pytest.approx(values['lm'], rel=1e-6)
  assert in_parts['grad_norm'] == pytest.approx(values['grad_norm'], rel=1e-5)


class Weighed:
  """Stands for an objective: a mean over tokens of what each sequence and its draw make of the parameters."""
  teachers = {}

  def prepared(self, context):
    return context

  def denominators(self, batch):
    return {'lm': batch['weights'].sum()}

  def __call__(self, model, params, context, denominators, frozen):
    drawn = jax.vmap(jax.random.normal)(context.named('r').keys()) + context.batch['tokens'].sum(1)
    loss = (context.batch['weights'].sum(1) * jnp.sin(params['w'] * drawn)).sum() / denominators['lm']
    return loss, {'lm': loss}


def test_parts_add_up_to_the_batch():
  weights = {'w': jnp.float32(0.1)}
  (whole, values), (summed, in_parts) = (after(parts.ROWS['base_loop'].model, weights, Weighed(), count)
                                         for count in (1, 4))
  assert abs(whole['w'] - 0.1) > 1e-2
  parts.close(summed, whole, 1e-6)
  assert {name: float(value) for name, value in in_parts.items()} == pytest.approx(
      {name: float(value) for name, value in values.items()}, rel=1e-5)


class Counted:
  """Stands for an objective: its loss is the sum over microbatches of 2 ** the steps that they draw."""
  teachers = {}
  plan = plans.RandomDepth(20)

  def prepared(self, context):
    return context

  def denominators(self, batch):
    return {}

  def __call__(self, model, params, context, denominators, frozen):
    loss = 2.0 ** self.plan(context.named('r')).active.sum() + 0 * params['w']
    return loss, {}


def drawn(number: int | None, taken: int) -> int:
  """The steps of the plan that a microbatch draws for all its sequences, or the whole batch does."""
  context = parts.plan_context(jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), 1), taken))
  context = context if number is None else context.microbatch(jnp.int32(number), {})
  return int(Counted.plan(context.named('r')).active.sum())


def test_every_microbatch_draws_a_plan_of_its_own():
  """Of each step the same whenever it is taken, of another step others."""
  expected = [[drawn(number, taken) for number in range(4)] for taken in (0, 1)]
  assert all(len(set(counts)) == 4 for counts in expected) and sorted(expected[0]) != sorted(expected[1])
  for taken, counts in enumerate(expected):
    for accumulate, total in ((4, sum(2.0 ** count for count in counts)), (1, 2.0 ** drawn(None, taken))):
      assert after(parts.ROWS['base_loop'].model, {'w': jnp.float32(0)}, Counted(), accumulate,
                   taken)[1]['loss'] == total


def test_names_give_keys_of_their_own():
  context = parts.plan_context(jax.random.key(0), parts.batch())
  part, data = context.microbatch(jnp.int32(1), context.batch), jax.random.key_data
  np.testing.assert_array_equal(data(context.named('a').keys()), data(part.named('a').keys()))
  assert not np.array_equal(data(context.named('a').keys()), data(context.named('b').keys()))
  assert not np.array_equal(data(part.named('a').key), data(part.named('b').key))
  assert not np.array_equal(data(context.named('a').key), data(part.named('a').key))
