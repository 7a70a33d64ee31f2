import functools
import zlib

import hypothesis
from hypothesis import strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs.loopformer import get_config
from loopformer import loop, plans
from loopformer.model import init_params
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.mor.terms import RouterBCE
from loopformer.starts import Noise
from loopformer.terms.cross_entropy import CE, nll_sum
from loopformer.terms.expected import Expected
from loopformer.terms.match import ShortcutConsistency
from loopformer.terms.ponder import Averaged, Geometric, Ponder
from loopformer.types import ConfigError, Plan, PlanContext, Readout, Trace
from tests import parts
from tests.parts import ROWS, D, L, T, V, close, over, params

KEY = jax.random.key(5)


def naive(z, table, targets, weights):
  logp = jax.nn.log_softmax(jnp.einsum('...D,VD->...V', z, table, preferred_element_type=jnp.float32))
  return -jnp.sum(weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0])


def inputs(rows: int = 3, length: int = 7, scale: float = 1.0, dtype=jnp.float32):
  rng = np.random.default_rng(rows * length)
  weights = rng.uniform(0, 2, (rows, length)) * (rng.uniform(size=(rows, length)) < 0.7)
  return (jnp.asarray(scale * rng.standard_normal((rows, length, D)), dtype),
          jnp.asarray(rng.standard_normal((V, D)), jnp.float32),
          jnp.asarray(rng.integers(0, V, (rows, length))), jnp.asarray(weights, jnp.float32))


@functools.partial(jax.jit, static_argnums=4)
def chunked(z, table, targets, weights, chunk):
  return jax.value_and_grad(lambda z, table: 3 * nll_sum(z, table, targets, weights, chunk), (0, 1))(z, table)


@jax.jit
def whole(z, table, targets, weights):
  return jax.value_and_grad(lambda z, table: 3 * naive(z, table, targets, weights), (0, 1))(z, table)


# Cross-entropy -------------------------------------------------------------------------------------------------------


@hypothesis.settings(max_examples=8)
@hypothesis.given(chunk=st.integers(1, 40))
@hypothesis.example(chunk=1)
@hypothesis.example(chunk=8)  # does not divide the 21 tokens
@hypothesis.example(chunk=21)
@hypothesis.example(chunk=512)
def test_nll_sum_equals_the_naive_one(chunk):
  close(chunked(*inputs(), chunk), whole(*inputs()), 1e-5)


def test_nll_sum_without_gradient_is_the_same():
  np.testing.assert_allclose(nll_sum(*inputs(), 8), naive(*inputs()), rtol=1e-6)


def test_tokens_of_weight_zero_do_not_count():
  z, table, targets, weights = inputs()
  out = weights == 0
  assert 0 < out.sum() < out.size
  other = jnp.where(out[..., None], z + 5, z), table, jnp.where(out, (targets + 1) % V, targets), weights
  (value, (dz, dtable)), (other_value, (other_dz, other_dtable)) = chunked(*inputs(), 8), chunked(*other, 8)
  close((value, dz, dtable), (other_value, other_dz, other_dtable), 1e-6)
  assert not np.asarray(dz)[np.asarray(out)].any()
  assert chunked(z, table, targets, jnp.zeros_like(weights), 8)[0] == 0


@pytest.mark.parametrize('scale', [1e3, 1e6])
def test_extreme_logits_are_finite(scale):
  value, grads = chunked(*inputs(scale=scale), 8)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads)))
  close((value, grads), whole(*inputs(scale=scale)), 1e-5)


def test_bfloat16_states_are_close():
  value, (dz, dtable) = chunked(*inputs(dtype=jnp.bfloat16), 8)
  expected, (expected_dz, expected_dtable) = whole(*inputs())
  assert value.dtype == dtable.dtype == jnp.float32 and dz.dtype == jnp.bfloat16
  close((value, dz, dtable), (expected, expected_dz, expected_dtable), 2e-2)


def largest(jaxpr) -> int:
  """Elements of the largest value in a jaxpr and in what it calls."""
  sizes = [0]
  for equation in jaxpr.eqns:
    sizes += [out.aval.size for out in equation.outvars if hasattr(out.aval, 'size')]
    sizes += [largest(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params)]
  return max(sizes)


@pytest.mark.parametrize('chunk, held', [(16, False), (192, True)], ids=['chunked', 'whole'])
def test_logits_are_never_held_whole(chunk, held):
  rows, length = 12, 16  # tokens * V is above everything else: tokens * D, V * D
  z, table, targets, weights = inputs(rows, length)
  trace = jax.make_jaxpr(functools.partial(chunked.__wrapped__, chunk=chunk))(z, table, targets, weights)
  assert rows * length * V > max(z.size, table.size)
  assert (largest(trace.jaxpr) >= rows * length * V) == held
  text = chunked.lower(z, table, targets, weights, chunk).compile().as_text()
  assert (f'f32[{rows * length},{V}]' in text) == held


def test_ce_is_the_mean_by_weights():
  z, table, targets, weights = inputs()
  batch = {'targets': targets, 'weights': weights}
  trace = Trace(x=None, z=z, xs=None, aux=None, kv=None, steps=None)
  term = CE(roll='long', chunk=5)
  np.testing.assert_allclose(term({'long': trace}, batch, Readout(table=table, read=None), None),
                             naive(z, table, targets, weights), rtol=1e-6)
  assert term.weight(batch) == weights.sum() and term.reads == ('long',)


# Match ---------------------------------------------------------------------------------------------------------------


def test_match_is_the_formula():
  z, _, targets, weights = inputs()
  other = inputs(scale=0.5)[0] + 0.1
  rolls = {name: Trace(x=None, z=value, xs=None, aux=None, kv=None, steps=None)
           for name, value in (('short', z), ('long', other))}
  term, batch = ShortcutConsistency(roll='short', target='long'), {'targets': targets, 'weights': weights}
  squares = np.mean((np.asarray(other, np.float64) - np.asarray(z, np.float64)) ** 2, -1)
  np.testing.assert_allclose(term(rolls, batch, None, None), np.sum(squares * np.asarray(weights)), rtol=1e-5)
  ones = {**batch, 'weights': jnp.ones_like(weights)}
  np.testing.assert_allclose(term(rolls, ones, None, None) / term.weight(ones), np.mean(squares), rtol=1e-5)
  # Into the short state, and not into the long one.
  grads = jax.grad(lambda short, long: term({'short': rolls['short'].replace(z=short),
                                             'long': rolls['long'].replace(z=long)}, batch, None, None), (0, 1))
  d_short, d_long = grads(z, other)
  np.testing.assert_allclose(d_short, 2 / D * (z - other) * weights[..., None], atol=1e-6)
  assert not d_long.any()


MODEL = ROWS['loopformer'].model
SHORTCUT = Objective(
    rolls={'long': Rollout(plans.Uniform(L)), 'short': Rollout(plans.Partition(L))},
    terms={'shortcut': Weighted(0.5, ShortcutConsistency(roll='short', target='long'))})


def full_objective(loops: int = L) -> Objective:
  return Objective(
      rolls={'long': Rollout(plans.Uniform(loops)), 'short': Rollout(plans.Partition(loops))},
      terms={'lm': Weighted(1.0, CE(roll='long', chunk=8)), 'lm_short': Weighted(0.1, CE(roll='short', chunk=8)),
             'shortcut': Weighted(0.3, ShortcutConsistency(roll='short', target='long'))})


def short_plan(key) -> Plan:
  return plans.Partition(L)(parts.plan_context(jax.random.fold_in(key, zlib.crc32(b'short'))))


def test_the_long_pass_gets_no_gradient_from_the_shortcut():
  batch = parts.batch()
  total = SHORTCUT.denominators(batch)

  @jax.jit
  def ours(weights):
    return jax.value_and_grad(lambda w: SHORTCUT(MODEL, w, parts.plan_context(KEY, batch), total)[0])(weights)

  @jax.jit
  def by_hand(weights):
    def loss(w):
      long = over(MODEL, jax.lax.stop_gradient(w), batch, plans.Uniform(L)(KEY)).z
      short = over(MODEL, w, batch, short_plan(KEY)).z
      return 0.5 * jnp.sum(jnp.mean((long - short) ** 2, -1) * batch['weights']) / batch['weights'].sum()
    return jax.value_and_grad(loss)(weights)

  close(ours(params(MODEL)), by_hand(params(MODEL)), 1e-6)


def test_what_the_long_pass_alone_sees_gets_no_gradient():
  """Each pass is given a plan of its own to differentiate by."""
  batch = parts.batch()

  def moved(plan, times):
    return lambda key: plan.replace(t=times)

  def loss(times):
    objective = Objective(rolls={name: Rollout(moved(plan, times[name])) for name, plan in base.items()},
                          terms=SHORTCUT.terms)
    return objective(MODEL, params(MODEL), parts.plan_context(KEY, batch), objective.denominators(batch))[0]

  base = {'long': plans.Uniform(L)(KEY), 'short': plans.schedule((0.5, 0.5))}
  grads = jax.jit(jax.grad(loss))({name: plan.t for name, plan in base.items()})
  assert not grads['long'].any()
  assert np.abs(grads['short']).min() > 1e-6


# Objectives ----------------------------------------------------------------------------------------------------------


OBJECTIVE = full_objective()
GATED = {'all': Rollout(plans.Uniform(L), keep=loop.Every())}
# Model, and an objective of terms that it has what to read for.
OBJECTIVES = {
    'loopformer': (MODEL, OBJECTIVE),
    'ouro': (ROWS['ouro'].model, Objective(rolls=GATED, terms={'lm': Weighted(1.0, Expected(roll='all', chunk=8))})),
    'pondernet': (ROWS['ouro'].model, Objective(rolls=GATED, terms={
        'lm': Weighted(1.0, Expected(roll='all', beta=0.0)), 'prior': Weighted(0.5, Geometric(roll='all', rate=0.4))})),
    'act': (ROWS['ouro'].model, Objective(rolls=GATED, terms={
        'lm': Weighted(1.0, Averaged(roll='all', threshold=0.2)),
        'ponder': Weighted(0.5, Ponder(roll='all', threshold=0.2))})),
}
every_objective = pytest.mark.parametrize('name', list(OBJECTIVES))


@functools.partial(jax.jit, static_argnames='name')
def share(weights, batch, total, name='loopformer'):
  """((loss, {term: mean}), gradient)."""
  model, objective = OBJECTIVES[name]
  return jax.value_and_grad(lambda w: objective(model, w, parts.plan_context(KEY, batch), total), has_aux=True)(weights)


def test_loss_is_the_sum_assembled_by_hand():
  batch, weights = parts.batch(), params(MODEL)
  (loss, shares), _ = share(weights, batch, OBJECTIVE.denominators(batch))
  z = {'long': over(MODEL, weights, batch, plans.Uniform(L)(KEY)).z,
       'short': over(MODEL, weights, batch, short_plan(KEY)).z}
  table, count = weights['read_in']['embedding'], float(batch['weights'].sum())
  ce = {name: float(naive(z[name], table, batch['targets'], batch['weights'])) / count for name in z}
  match = float(jnp.sum(jnp.mean((z['long'] - z['short']) ** 2, -1) * batch['weights'])) / count
  assert 0 < count < batch['weights'].size
  np.testing.assert_allclose([shares['lm'], shares['lm_short'], shares['shortcut']],
                             [ce['long'], ce['short'], match], rtol=1e-5)
  np.testing.assert_allclose(loss, ce['long'] + 0.1 * ce['short'] + 0.3 * match, rtol=1e-5)


def test_every_rollout_draws_its_own_noise_for_every_sequence():
  """From the key, the rollout's name and the sequence's number: which other sequences are there does not matter."""
  model = parts.looped(parts.plain(1), start=Noise(std=0.5))
  objective = Objective(rolls={'a': Rollout(plans.Uniform(1)), 'b': Rollout(plans.Uniform(1))}, terms={})

  @jax.jit
  def ends(context):
    return [trace.x for trace in objective.rollouts(model, params(model), context).values()]

  def of(key, *rows):
    chosen = np.array(rows)
    batch = {name: jnp.repeat(leaf[:1], len(rows), 0) for name, leaf in parts.batch().items()}  # all the same text
    return np.stack(ends(parts.plan_context(key, {**batch, 'row': jnp.asarray(chosen)})))

  x, other = of(KEY, 0, 1, 2, 3), of(jax.random.fold_in(KEY, 1), 0, 1, 2, 3)
  each = [*x[0], *x[1], *other[0], *other[1]]
  assert min(np.abs(a - b).max() for i, a in enumerate(each) for b in each[:i]) > 1e-2
  np.testing.assert_array_equal(of(KEY, 3, 5, 0, 2)[:, [0, 2, 3]], x[:, [3, 0, 2]])


@every_objective
def test_parts_of_a_batch_add_up_to_it(name):
  batch, (model, objective) = parts.batch(8), OBJECTIVES[name]
  weights, total = params(model), objective.denominators(batch)
  halves = [{name: leaf[i:i + 4] for name, leaf in batch.items()} for i in (0, 4)]
  assert len({float(half['weights'].sum()) for half in halves}) == 2  # unequal weights
  values, grads = jax.tree.map(jnp.add, *(share(weights, half, total, name) for half in halves))
  whole_values, whole_grads = share(weights, batch, total, name)
  close(values, whole_values, 1e-6)
  close(grads, whole_grads, 1e-5)


@every_objective
def test_a_batch_without_targets_costs_nothing(name):
  batch, (model, objective) = parts.batch(weights=jnp.zeros((4, T))), OBJECTIVES[name]
  (loss, _), grads = share(params(model), batch, objective.denominators(batch), name)
  assert loss == 0 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('term', [
    CE(roll='lnog'), ShortcutConsistency(roll='short', target='lnog'), Expected(roll='lnog'),
                                  Geometric(roll='lnog', rate=0.5),
    Averaged(roll='lnog'), Ponder(roll='lnog')], ids=lambda term: type(term).__name__)
def test_an_unknown_rollout_is_refused(term):
  with pytest.raises(ConfigError, match=r"objective\.terms\['broken'\] reads the rollout 'lnog'.*long, short"):
    Objective(rolls=SHORTCUT.rolls, terms={'broken': Weighted(1.0, term)})


def test_teachers_and_free_steps_are_not_differentiated():
  model = ROWS['base_loop'].model
  drawn = plans.Truncated(depth=plans.Constant(loops=3), graded=2)
  objective = Objective(rolls={'a': Rollout(drawn), 'b': Rollout(plans.Uniform(2), weights_of='there')}, terms={})
  assert list(objective.teachers) == ['there'] and objective.longest == 2
  assert objective.flops(model, T) == pytest.approx(model.flops(T, 3) + 3 * model.flops(T, 2))


def test_longest_plan_and_arithmetic():
  objective = full_objective(8)
  assert objective.longest == 8
  model = ROWS['base_loop'].model
  one, two = (model.flops(T, steps) for steps in (1, 2))
  np.testing.assert_allclose(objective.flops(model, T), 3 * (2 * one + (8 - 1 + 4 - 1) * (two - one)))


# In somebody's own loop -----------------------------------------------------------------------------------------------

CROSS = {'lm': Weighted(1.0, CE(roll='all'))}
OWN = {
    'loopformer': get_config(f'tiny,loops={L}').objective,  # paths that are drawn, one for all
    'parcae': Objective(rolls={'all': Rollout(plans.Truncated(depth=plans.Poisson(average=3), graded=2,
                                                              over=plans.PerSequence()))},
                        terms=CROSS),  # a depth and a noise for every sequence
    'ouro': Objective(rolls={'all': Rollout(plans.Uniform(L), keep=loop.Every())},
                      terms={'expected': Weighted(1.0, Expected(roll='all'))}),
    'mor': Objective(rolls={'all': Rollout(plans.Uniform(L))},
                     terms={**CROSS, 'router': Weighted(0.01, RouterBCE(roll='all'))}),
}


@pytest.mark.parametrize('name', OWN)
def test_an_objective_learns_in_a_loop_of_ones_own(name):
  """As in a notebook: no mesh, no task, a batch of tokens, targets and weights alone."""
  model, objective, optimizer = ROWS[name].model, OWN[name], optax.adam(1e-2)
  text = parts.tokens(4, T + 1)
  batch = {'tokens': text[:, :-1], 'targets': text[:, 1:], 'weights': jnp.ones((4, T))}
  weights = jax.jit(lambda: init_params(model, jax.random.key(0)))()

  @jax.jit
  def step(weights, state, number):
    context = PlanContext(key=jax.random.fold_in(KEY, number), step=number, stage=jnp.int32(0), batch=batch)
    (loss, terms), grads = jax.value_and_grad(
        lambda w: objective(model, w, context, objective.denominators(batch)), has_aux=True)(weights)
    updates, state = optimizer.update(grads, state, weights)
    return optax.apply_updates(weights, updates), state, loss

  state, losses = optimizer.init(weights), []
  for number in range(20):
    weights, state, loss = step(weights, state, jnp.int32(number))
    losses.append(float(loss))
  assert np.isfinite(losses).all() and np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3]), losses


def test_sequences_without_numbers_are_numbered_as_they_stand():
  bare = {'tokens': parts.tokens(3)}
  keys = [jax.random.key_data(PlanContext(key=KEY, step=0, stage=0, batch=batch).keys())
          for batch in (bare, {**bare, 'row': jnp.arange(3)}, {**bare, 'row': jnp.arange(3, 6)})]
  np.testing.assert_array_equal(keys[0], keys[1])
  assert (keys[0] != keys[2]).any(-1).all()


def test_a_teacher_whose_weights_are_missing_is_named():
  taught = Objective(rolls={'all': Rollout(plans.Uniform(2), weights_of='runs/base')}, terms=CROSS)
  batch = parts.batch(2)
  with pytest.raises(ConfigError, match="frozen: no weights of 'runs/base'"):
    taught(ROWS['base_loop'].model, parts.shapes(ROWS['base_loop'].model), parts.plan_context(KEY, batch), {})
