"""PonderNet's prior and adaptive computation time: terms against their definitions, what their gradients reach."""
import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import act, ouro, pondernet
from loopformer import plans
from loopformer.inference import exits
from loopformer.terms.cross_entropy import nll_sum
from loopformer.terms.expected import Expected, log_exit
from loopformer.terms.ponder import Averaged, Geometric, Ponder, log_geometric, shares
from loopformer.types import ConfigError, Plan, Readout, Trace
from tests import parts
from tests.papers.test_ouro import gates, gradient, law, made, paths, value
from tests.parts import ROWS, L, T, V, close

MODEL = ROWS['ouro'].model
TERMS = {'geometric': Geometric(roll='all', rate=0.4), 'averaged': Averaged(roll='all', threshold=0.2, chunk=7),
         'ponder': Ponder(roll='all', threshold=0.2)}
every = pytest.mark.parametrize('name', list(TERMS))


def one_by_one(halt, threshold):
  """ACT of one token's gates: (weights, N, R)."""
  weights, total = np.zeros(len(halt)), 0.0
  for t, gate in enumerate(1 / (1 + np.exp(-np.asarray(halt, np.float64)))):
    if total + gate >= 1 - threshold or t + 1 == len(halt):
      weights[t] = 1 - total
      return weights, t + 1, 1 - total
    weights[t], total = gate, total + gate


def definition(name, xs, table, halt, batch):
  """The sum of a term over the batch, in NumPy and token by token."""
  xs, table, halt, weights = (np.asarray(a, np.float64) for a in (xs, table, halt, batch['weights']))
  total = 0.0
  for place in np.ndindex(weights.shape):
    gate = halt[(slice(None), *place)]
    if name == 'geometric':
      p, g = np.array(law(gate)), 0.4 * 0.6 ** np.arange(len(gate))
      found = (p * np.log(p / (g / g.sum()))).sum()
    else:
      share, steps, rest = one_by_one(gate, 0.2)
      logits = table @ (share @ xs[(slice(None), *place)])
      found = steps + rest if name == 'ponder' else np.log(np.exp(logits).sum()) - logits[batch['targets'][place]]
    total += weights[place] * found
  return total


@every
@pytest.mark.parametrize('steps', [1, 4])
def test_a_term_is_its_definition(name, steps):
  xs, table, halt, batch = made(steps)
  np.testing.assert_allclose(value(TERMS[name], xs, table, halt, batch), definition(name, xs, table, halt, batch),
                             rtol=1e-5)
  assert TERMS[name].weight(batch) == batch['weights'].sum() and TERMS[name].reads == ('all',)


@every
def test_gradients_of_the_gates_are_those_of_the_definition(name):
  """By differences, where no token is at the edge of another step."""
  xs, table, halt, batch = made()
  _, steps = shares(halt, 0.2)
  for move in (1e-3, -1e-3):
    assert (shares(halt + move, 0.2)[1] == steps).all()
  ours = np.asarray(jax.grad(lambda halt: value(TERMS[name], xs, table, halt, batch))(halt))
  rng, halt = np.random.default_rng(1), np.asarray(halt, np.float64)
  for _ in range(6):
    way = rng.standard_normal(halt.shape)
    way *= 1e-4 / np.abs(way).max()
    ahead, back = (definition(name, xs, table, halt + sign * way, batch) for sign in (1, -1))
    np.testing.assert_allclose((ours * way).sum(), (ahead - back) / 2, rtol=1e-3, atol=1e-8)
  assert np.abs(ours).max() > 1e-3 and not ours[-1].any()  # the last gate has no part in it


def test_the_law_of_the_prior():
  np.testing.assert_allclose(np.exp(log_geometric(3, 0.5)), np.array([4, 2, 1]) / 7, rtol=1e-6)
  assert (np.arange(1, 200) * np.exp(log_geometric(199, 0.2))).sum() == pytest.approx(5, rel=1e-4)
  # One step leaves nothing to choose.
  xs, table, halt, batch = made(1)
  assert value(Geometric(roll='all', rate=0.3), xs, table, halt, batch) == pytest.approx(0, abs=1e-6)


def test_the_prior_is_met_by_its_own_gate_alone():
  """lambda = rate in all steps but the last, which takes the rest, is the geometric law that is not normalised."""
  xs, table, _, batch = made(4)
  g = np.exp(log_geometric(4, 0.3))
  left = 1 - np.concatenate([[0], np.cumsum(g)])[:-1]
  own = np.clip(g / left, 0, 1 - 1e-7)
  halt = jnp.asarray(np.log(own / (1 - own)), jnp.float32)[:, None, None] * jnp.ones((1, 3, T))
  term = Geometric(roll='all', rate=0.3)
  assert value(term, xs, table, halt, batch) == pytest.approx(0, abs=1e-4)
  assert value(term, xs, table, halt + 0.5, batch) > 0.01 * float(batch['weights'].sum())


def test_the_direction_of_the_divergence():
  """KL(p || g), not KL(g || p): a certain exit costs -log g of its step, and is finite."""
  xs, table, _, batch = made(2)
  halt = jnp.full((2, 3, T), 60.0)
  ones = {**batch, 'weights': jnp.ones((3, T))}
  found = value(Geometric(roll='all', rate=0.25), xs, table, halt, ones) / (3 * T)
  assert found == pytest.approx(np.log(1.75), rel=1e-5)  # g_1 = 1 / 1.75


@hypothesis.given(gates, st.floats(0, 0.9))
def test_shares_sum_to_one_and_end_at_the_step(halt, threshold):
  weights, steps = (np.asarray(found) for found in shares(jnp.asarray(halt), threshold))
  assert 1 <= steps <= len(halt) and not weights[steps:].any()
  np.testing.assert_allclose(weights.sum(), 1, atol=1e-5)
  reached = np.cumsum(1 / (1 + np.exp(-halt.astype(np.float64))))
  hypothesis.assume(np.abs(reached - (1 - threshold)).min() > 1e-5)
  theirs, expected, _ = one_by_one(halt, threshold)
  assert steps == expected
  np.testing.assert_allclose(weights, theirs, atol=1e-5)


@pytest.mark.parametrize('threshold', [0.0, 0.01])
def test_the_ends_of_the_gate(threshold):
  xs, table, _, batch = made()
  for logit, step, cost in ((60.0, 0, 2.0), (-60.0, 3, 5.0)):  # at once: N = R = 1; never: N = 4, R = 1
    halt = jnp.full((4, 3, T), logit)
    ours = value(Averaged(roll='all', threshold=threshold), xs, table, halt, batch)
    np.testing.assert_allclose(ours, nll_sum(xs[step], table, batch['targets'], batch['weights']), rtol=1e-5)
    found = value(Ponder(roll='all', threshold=threshold), xs, table, halt, batch)
    np.testing.assert_allclose(found / batch['weights'].sum(), cost, rtol=1e-5)


@every
def test_extreme_gates_have_finite_gradients(name):
  xs, table, _, batch = made()
  for logits in ([50, -50, 50, -50], [-50] * 4, [1e4, 0, 0, 0]):
    halt = jnp.asarray(logits, jnp.float32)[:, None, None] * jnp.ones((1, 3, T))
    found = jax.value_and_grad(lambda halt: value(TERMS[name], xs, table, halt, batch))(halt)
    assert all(np.isfinite(leaf).all() for leaf in found)


def test_the_ponder_cost_pays_by_its_remainder_alone():
  """-1 for every gate before the last step of a token, as a function of the gate, and nothing else."""
  xs, table, halt, batch = made()
  grads = jax.grad(lambda halt: value(TERMS['ponder'], xs, table, halt, batch))(halt)
  gate, (_, steps) = jax.nn.sigmoid(halt), shares(halt, 0.2)
  before = np.arange(1, 5)[:, None, None] < np.asarray(steps)
  assert before.any() and not before.all()
  close(grads, -np.where(before, gate * (1 - gate), 0) * np.asarray(batch['weights']), 1e-6)


@pytest.mark.parametrize('name, head, states', [('geometric', False, False), ('averaged', True, True),
                                                ('ponder', False, False)])
def test_what_the_gradient_reaches(name, head, states):
  """Through the gate all terms teach gate and model; the head, and states as answers, that of the mean alone."""
  xs, table, halt, batch = made()
  of_states, of_head = jax.grad(lambda xs, table: value(TERMS[name], xs, table, halt, batch), (0, 1))(xs, table)
  assert bool(of_states.any()) == states and bool(of_head.any()) == head
  _, grads = gradient(TERMS[name], parts.batch(), parts.params(MODEL))
  for path, leaf in paths(grads).items():
    assert (np.abs(leaf).max() > 1e-7) == (head or not path.startswith('read_out')), path


@every
def test_padding_counts_for_nothing(name):
  xs, table, halt, batch = made()
  out = batch['weights'] == 0
  assert 0 < out.sum() < out.size

  def of(xs, halt, targets):
    return value(TERMS[name], xs, table, halt, {**batch, 'targets': targets})

  result, grads = jax.value_and_grad(of, (0, 1))(xs, halt, batch['targets'])
  other = of(jnp.where(out[..., None], xs + 3, xs), jnp.where(out, halt - 2, halt),
             jnp.where(out, (batch['targets'] + 1) % V, batch['targets']))
  np.testing.assert_allclose(result, other, rtol=1e-6)
  for leaf in grads:
    assert not np.asarray(leaf)[:, np.asarray(out)].any()


def test_what_is_trained_is_what_is_answered():
  """Of a single token, that reads nobody's state, the exit's answer is the mean that the term scores."""
  weights, texts, threshold = parts.params(MODEL), parts.tokens(16, 1), 0.3
  exit_policy = exits.Adaptive(rule=exits.ACT(threshold=threshold))
  found = MODEL.apply({'params': weights}, texts, plans.Uniform(L)(None), exit_policy, jnp.float32(threshold),
                      method='adapt')
  trace = parts.forward(MODEL, weights, texts, plans.Uniform(L)(None), keep=parts.loop.Every())
  share, steps = shares(trace.aux['halt'], threshold)
  assert len(np.unique(steps)) > 1
  np.testing.assert_array_equal(found.steps, steps)
  close(found.x, jnp.einsum('KBT,KBTD->BTD', share, trace.xs), 1e-5)


def test_pondernet_and_ouro_differ_by_their_prior():
  """With a rate near 0 the prior is uniform, and KL is the entropy's distance from its most."""
  xs, table, halt, batch = made()
  ours = value(Geometric(roll='all', rate=1e-6), xs, table, halt, batch)
  entropy = value(Expected(roll='all', beta=0.0), xs, table, halt, batch) - value(
      Expected(roll='all', beta=1.0), xs, table, halt, batch)
  np.testing.assert_allclose(ours, np.log(4) * batch['weights'].sum() - entropy, rtol=1e-4)
  assert np.exp(log_exit(halt)).std() > 0.05


@pytest.mark.parametrize('change, message', [
    ({'aux': {}}, "'all' has no gate to learn"), ({'xs': None}, 'keep every step'),
    ({'plan': Plan(t=jnp.zeros(4), dt=jnp.ones(4), active=jnp.ones(4, bool))}, 'plans.Uniform')])
@every
def test_a_rollout_that_does_not_serve_is_refused(change, message, name):
  xs, table, halt, batch = made()
  trace = Trace(x=None, z=None, xs=xs, aux={'halt': halt}, kv=None, steps=None,
                plan=Plan(t=jnp.zeros(4), dt=jnp.ones(4))).replace(**change)
  with pytest.raises(ConfigError, match=message):
    TERMS[name]({'all': trace}, batch, Readout(table=table, read=lambda x: x), {})


@pytest.mark.parametrize('make, message', [
    (lambda: Geometric(roll='all', rate=0.0), r'Geometric\.rate = 0\.0'),
    (lambda: Geometric(roll='all', rate=1.0), r'Geometric\.rate = 1\.0'),
    (lambda: Averaged(roll='all', threshold=-0.1), r'Averaged\.threshold = -0\.1'),
    (lambda: Ponder(roll='all', threshold=1.0), r'Ponder\.threshold = 1\.0'),
    (lambda: pondernet.get_config('pointers,rate=2.0'), r'Geometric\.rate = 2\.0'),
    (lambda: act.get_config('pointers,epsilon=1.0'), r'Averaged\.threshold = 1\.0')], ids=range(6))
def test_bad_input(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_configurations_differ_from_ouro_by_their_terms():
  base = ouro.get_config('mano,loops=3')
  prior = pondernet.get_config('mano,loops=3,rate=0.2,beta=0.05')
  mean = act.get_config('mano,loops=3,tau=0.1,epsilon=0.02')
  assert prior.objective.terms['prior'].weight == 0.05 and prior.objective.terms['prior'].term.rate == 0.2
  assert mean.objective.terms['ponder'].weight == 0.1 and mean.objective.terms['lm'].term.threshold == 0.02
  assert mean.evals.schedules()['act'].exit.rule.threshold == 0.02
  for config in (prior, mean):
    assert dataclasses.replace(config, name=base.name, objective=base.objective, evals=base.evals) == base
