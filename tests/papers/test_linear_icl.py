"""The linear looped transformer is gradient descent where its weights are, and learns to be."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import linear_icl
from experiments.studies import linear_cot
from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.model import Looped, init_params, parameter_roles
from loopformer.nn.stack import Stack
from loopformer.papers.linear_icl import attention
from loopformer.tasks import descent
from loopformer.types import ConfigError, Context, Readout
from tests import parts

D, N, B = 4, 12, 3
RATE = 0.4
LOOPS = (1, 2, 3, 5, 8, 20)


def problem(seed: int = 0, inputs: int = D, examples: int = N, rows: int = B):
  """x [B, n, d], y [B, n], query [B, d], w* [B, d], float64."""
  rng = np.random.default_rng(seed)
  x, query = rng.standard_normal((rows, examples, inputs)), rng.standard_normal((rows, inputs))
  best = rng.standard_normal((rows, inputs))
  return x, np.einsum('bnd,bd->bn', x, best), query, best


def reference(x, y, rate, steps, matrix=None):
  """Iterates of w <- w - (rate / n) A X (X^T w - y), [steps + 1, B, d], one prompt after another."""
  matrix = np.eye(x.shape[-1]) if matrix is None else matrix
  out = np.zeros((steps + 1, len(x), x.shape[-1]))
  for b in range(len(x)):
    for t in range(steps):
      out[t + 1, b] = out[t, b] - rate / x.shape[1] * matrix @ (x[b].T @ (x[b] @ out[t, b] - y[b]))
  return out


def prompt(x, y, query) -> np.ndarray:
  """Tokens [B, n + 1, d + 1]."""
  last = np.concatenate([query, np.zeros((len(query), 1))], 1)[:, None]
  return np.concatenate([np.concatenate([x, y[..., None]], -1), last], 1)


def definition(tokens, p, q, loops: int) -> np.ndarray:
  """Z <- Z + (1/n) P Z M (Z^T Q Z) as it is written, columns and all, in NumPy; tokens again at the end."""
  out = []
  for z in np.asarray(tokens, np.float64).transpose(0, 2, 1):
    n = z.shape[1] - 1
    mask = np.diag([1.0] * n + [0.0])
    for _ in range(loops):
      z = z + p @ z @ mask @ (z.T @ q @ z) / n
    out.append(z.T)
  return np.stack(out)


def thought_prompt(x, y) -> np.ndarray:
  """Tokens [B, n + 1, 2d + 2], the last the thought w = 0."""
  rows, count, d = x.shape
  tokens = np.zeros((rows, count + 1, 2 * d + 2))
  tokens[:, :-1, :d], tokens[:, :-1, d], tokens[:, -1, -1] = x, y, 1
  return tokens


def model_of(loops: int = 8, inputs: int = D, examples: int = N) -> Looped:
  return linear_icl.get_config(f'{loops},inputs={inputs},examples={examples}').model


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, plan):
  """[B, T, outputs] of the head."""
  trace = model.apply({'params': params}, tokens, plan)
  return model.apply({'params': params}, trace.z, method='logits')


def answers(model, params, tokens, plan):
  """[B, T] of a head with one output."""
  return forward(model, params, tokens, plan)[..., 0]


def preconditioner() -> np.ndarray:
  """Not symmetric, so that a transpose in the wrong place shows; its symmetric part is positive."""
  return 0.5 * np.eye(D) + 0.1 * np.random.default_rng(5).standard_normal((D, D))


# The prediction form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('matrix', [None, preconditioner()], ids=['identity', 'preconditioned'])
@pytest.mark.parametrize('loops', [*range(1, 9), 20])
def test_the_construction_is_gradient_descent(loops, matrix):
  x, y, query, _ = problem()
  model, params = model_of(20), linear_icl.constructive(D, RATE, matrix)
  w = reference(x, y, RATE, loops, matrix)[-1]
  state = model.apply({'params': params}, jnp.float32(prompt(x, y, query)), parts.padded(loops, 20)).x
  np.testing.assert_allclose(-state[:, -1, -1], np.sum(w * query, -1), rtol=0, atol=1e-5)
  np.testing.assert_allclose(state[:, :-1, -1], y - np.einsum('bnd,bd->bn', x, w), rtol=0, atol=1e-5)
  np.testing.assert_allclose(state[..., :-1], prompt(x, y, query)[..., :-1], rtol=0, atol=1e-6)


def test_the_construction_is_gradient_descent_to_the_last_digits():
  """In float64, in a process of its own; both forms, both parameterisations, 40 steps."""
  code = '''
import jax
import jax.numpy as jnp
import numpy as np
from experiments.configs import linear_icl
from experiments.studies import linear_cot
from loopformer import plans
from tests.papers import test_linear_icl as t
x, y, query, _ = t.problem()
matrix = t.preconditioner()
w = t.reference(x, y, t.RATE, 40, matrix)
params, model = linear_icl.constructive(t.D, t.RATE, matrix), t.model_of(40)
for loops in (1, 2, 3, 4, 5, 6, 7, 8, 40):
  state = model.apply({'params': params}, jnp.asarray(t.prompt(x, y, query)), plans.schedule((1 / loops,) * loops)).x
  assert state.dtype == jnp.float64
  np.testing.assert_allclose(-state[:, -1, -1], np.sum(w[loops] * query, -1), rtol=0, atol=1e-12)
for of in (linear_cot.Full(inputs=t.D), linear_cot.Sparse(inputs=t.D)):
  made = of.matrices(of.constructive(t.RATE, matrix))
  grown = linear_cot.chain(made, jnp.asarray(t.thought_prompt(x, y)), 40)
  np.testing.assert_allclose(linear_cot.thoughts_of(grown, t.N).transpose(1, 0, 2), w, rtol=0, atol=1e-12)
print('same')
'''
  assert parts.python(code, JAX_ENABLE_X64='1') == 'same\n'


@pytest.mark.parametrize('loops', LOOPS[:4])
def test_the_generic_loop_is_the_formula(loops):
  """Any P and Q, not only the construction."""
  rng = np.random.default_rng(1)
  p, q = 0.1 * rng.standard_normal((2, D + 1, D + 1))
  tokens = prompt(*problem()[:3])
  params = {'cell': {'core': {'block': {'P': jnp.float32(p)[None], 'Q': jnp.float32(q)[None]}}}}
  model = model_of(loops)
  expected = definition(tokens, p, q, loops)
  trace = model.apply({'params': params}, jnp.float32(tokens), plans.schedule(plans.resolve(loops)), keep=loop.Every())
  parts.close(trace.x, expected, 1e-5)
  np.testing.assert_allclose(answers(model, params, jnp.float32(tokens), parts.padded(loops, 8)), -expected[..., -1],
                             rtol=0, atol=1e-5 * np.abs(expected).max())
  state = jnp.float32(tokens)
  for kept in trace.xs:
    state = attention.linear_attention(state, jnp.float32(p), jnp.float32(q))
    parts.close(kept, state, 1e-5)


def test_parameters_are_two_matrices_whatever_the_loops():
  shapes = [jax.tree.map(lambda leaf: leaf.shape, parts.shapes(model_of(loops))) for loops in (1, 8)]
  square = (1, D + 1, D + 1)
  assert shapes[0] == shapes[1] == {'cell': {'core': {'block': {'P': square, 'Q': square}}}}


def test_the_label_of_the_query_does_not_enter():
  tokens, model = prompt(*problem()[:3]), model_of(3)
  params, plan = parts.params(model), plans.schedule(plans.resolve(3))
  told = tokens.copy()
  told[:, -1, -1] = 7.0
  whole = jax.jit(lambda tokens: model.apply({'params': params}, tokens, plan).x)
  np.testing.assert_array_equal(whole(jnp.float32(tokens)), whole(jnp.float32(told)))


def test_no_token_attends_to_the_query_and_all_to_all_examples():
  rng = np.random.default_rng(2)
  p, q = jnp.float32(0.2 * rng.standard_normal((2, D + 1, D + 1)))
  tokens = jnp.float32(prompt(*problem()[:3]))
  base = attention.linear_attention(tokens, p, q)
  other_query = attention.linear_attention(tokens.at[:, -1].add(1.0), p, q)
  np.testing.assert_array_equal(other_query[:, :-1], base[:, :-1])
  late = attention.linear_attention(tokens.at[:, N - 1].add(1.0), p,
                                    q)  # not causal: the last example reaches the first
  assert (jnp.abs(late - base).max(-1) > 1e-4).all()


def test_examples_may_come_in_any_order():
  x, y, query, _ = problem()
  model, order = model_of(4), np.random.default_rng(0).permutation(N)
  params, plan = parts.params(model), parts.padded(4, 8)
  a, b = (answers(model, params, jnp.float32(prompt(*data, query)), plan)[:, -1]
          for data in ((x, y), (x[:, order], y[:, order])))
  parts.close(a, b, 1e-5)


def test_the_task_is_laid_out_as_the_construction_wants():
  of = descent.LinearPrompt(inputs=D, examples=N)
  made = [of(np.random.default_rng(seed)) for seed in range(4)]
  tokens, targets, weights = (np.stack([e[name] for e in made]) for name in ('tokens', 'targets', 'weights'))
  w = descent.gradient_descent(tokens[:, :-1, :-1], tokens[:, :-1, -1], RATE, 5)[-1]
  got = answers(model_of(5), linear_icl.constructive(D, RATE), jnp.asarray(tokens), parts.padded(5, 8))
  np.testing.assert_allclose(got[:, -1], np.sum(w * tokens[:, -1, :-1], -1), rtol=0, atol=1e-5)
  assert (tokens[:, -1, -1] == 0).all() and (targets[:, -1] != 0).all() and (weights.sum(-1) == 1).all()


# Rates ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def crowd():
  """4000 prompts of d = 10, n = 20, as the construction sees them."""
  batch = linear_cot.sample(jax.random.key(3), 4000, 10, 20)
  of = linear_cot.Sparse(inputs=10)
  return lambda rate, steps: np.asarray(jax.jit(functools.partial(linear_cot.errors, steps=steps))(
      of.matrices(of.constructive(rate)), batch))


def test_the_best_rate_of_one_step_is_known(crowd):
  d, n = 10, 20
  for rate in (0.2, descent.best_rate(d, n), 0.9):
    assert crowd(rate, 1)[1] == pytest.approx(d * (1 - 2 * rate + rate ** 2 * (1 + (d + 1) / n)), rel=0.05)
  assert crowd(descent.best_rate(d, n), 1)[1] == pytest.approx(d * (d + 1) / (n + d + 1), rel=0.05)


def test_the_best_rate_of_one_step_must_not_be_used_for_many(crowd):
  """It falls to five steps and explodes at twenty; rates near 0.5 go on falling (sheet, section 10).

  Not for ever: the largest eigenvalue of a Gaussian prompt has no bound, so that some prompts diverge at any rate, and
  after many steps the mean is in their hands. So fifty steps are asked of the lowest rate alone.
  """
  curve = crowd(descent.best_rate(10, 20), 20)
  assert curve[1] > curve[2] > curve[5] and curve[5] == pytest.approx(1.07, rel=0.15)
  assert curve[10] > 5 and curve[20] > 1e4
  for rate in (0.475, 0.5, 0.525):
    curve = crowd(rate, 20)
    assert (np.diff(curve) < 0).all()
    np.testing.assert_allclose(curve[[10, 20]], [0.36, 0.11], rtol=0.25)
  assert crowd(0.475, 50)[50] < 0.03


# Training the prediction form ----------------------------------------------------------------------------------------


def prompts(key, rows: int, inputs: int, examples: int):
  """A batch as the task makes it, drawn inside a compiled program."""
  drawn = linear_cot.sample(key, rows, inputs, examples + 1)
  asked = jnp.zeros((rows, examples + 1)).at[:, -1].set(1)
  tokens = jnp.concatenate([drawn['x'], (drawn['y'] * (1 - asked))[..., None]], -1)
  return {'tokens': tokens, 'targets': drawn['y'] * asked, 'weights': asked}


def learn(config, steps: int, rate: float, inputs: int, examples: int):
  """Parameters after `steps` of Adam on the config's objective, from its own initialisation, and the losses."""
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))

  def loss(params, key, step):
    batch = prompts(key, 128, inputs, examples)
    context = parts.plan_context(key, batch).replace(step=step)
    return config.objective(config.model, params, context, config.objective.denominators(batch))[0]

  def step(carry, index):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(1), index), index)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  params = init_params(config.model, jax.random.key(0))
  run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
  (params, _), losses = run((params, optimizer.init(params)))
  return params, losses


def query_error(model, params, loops: int, inputs: int, examples: int) -> float:
  batch = prompts(jax.random.key(9), 4000, inputs, examples)
  got = answers(model, params, batch['tokens'], parts.padded(loops, 8))
  return float(jnp.square(got[:, -1] - batch['targets'][:, -1]).mean())


def test_one_trained_loop_is_the_best_step():
  """300 quick steps come within 10 % of the closed-form optimum d (d + 1) / (n + d + 1)."""
  d, n = 5, 20
  config = linear_icl.get_config(f'1,inputs={d},examples={n}')
  params, losses = learn(config, 300, 1e-2, d, n)
  assert jnp.isfinite(losses).all()
  error, best = query_error(config.model, params, 1, d, n), d * (d + 1) / (n + d + 1)
  assert 0.9 * best < error < 1.1 * best
  p, q = (params['cell']['core']['block'][name][0] for name in 'PQ')
  np.testing.assert_allclose(p[-1, -1] * q[:-1, :-1], -descent.best_rate(d, n) * np.eye(d), rtol=0, atol=0.1)


@pytest.mark.parametrize('argument', ['2,grow=0', '2,steps=400'])
def test_two_trained_loops_beat_two_steps_of_plain_descent(argument):
  """400 quick steps end below two steps of descent at its best rate of two, 0.449 for d = 5, n = 20."""
  d, n = 5, 20
  config = linear_icl.get_config(f'{argument},inputs={d},examples={n}')
  params, losses = learn(config, 400, 1e-2, d, n)
  x, y, query, best = problem(4, d, n, 4000)
  plain = min(np.square(np.sum((descent.gradient_descent(x, y, rate, 2)[-1] - best) * query, -1)).mean()
              for rate in np.arange(0.5, 0.9, 0.05))
  assert query_error(config.model, params, 2, d, n) < plain
  assert jnp.isfinite(losses).all()


def test_loops_that_grow_are_those_of_the_schedule():
  """The loss of a step in the second stage is that of two loops, although the plan has three rows."""
  config = linear_icl.get_config(f'3,inputs={D},examples={N},steps=40')
  params, batch = parts.params(config.model), prompts(jax.random.key(0), 8, D, N)
  for step, loops in ((0, 1), (9, 1), (10, 2), (20, 3), (500, 3)):
    context = parts.plan_context(jax.random.key(0), batch, step)
    loss = config.objective(config.model, params, context, config.objective.denominators(batch))[0]
    got = answers(config.model, params, batch['tokens'], parts.padded(loops, 8))
    assert float(loss) == pytest.approx(float(jnp.square(got[:, -1] - batch['targets'][:, -1]).mean()), rel=1e-4)


# The chain of thought ------------------------------------------------------------------------------------------------


FORMS = [linear_cot.Full(inputs=D), linear_cot.Sparse(inputs=D)]
NAMES = ['full', 'sparse']


@pytest.mark.parametrize('of', FORMS, ids=NAMES)
@pytest.mark.parametrize('matrix', [None, preconditioner()], ids=['identity', 'preconditioned'])
def test_a_chain_of_thought_is_gradient_descent(of, matrix):
  x, y, _, _ = problem()
  grown = linear_cot.chain(of.matrices(of.constructive(RATE, matrix)), jnp.float32(thought_prompt(x, y)), 20)
  w = reference(x, y, RATE, 20, matrix)
  np.testing.assert_allclose(linear_cot.thoughts_of(grown, N).transpose(1, 0, 2), w, rtol=0, atol=1e-5)
  np.testing.assert_array_equal(grown[:, :N + 1], jnp.float32(thought_prompt(x, y)))
  np.testing.assert_allclose(grown[:, N:, :D + 1], 0, atol=1e-6)
  np.testing.assert_allclose(grown[:, N:, -1], 1, atol=1e-6)
  parts.close(of.product(of.constructive(RATE, matrix)), -RATE * (np.eye(D) if matrix is None else matrix), 1e-6)


@pytest.mark.parametrize('of', FORMS, ids=NAMES)
def test_a_chain_and_its_teacher_forced_pass_are_the_formula(of):
  """Any V and W: f(Z) = Z + V Z (Z^T W Z) / n as it is written, in NumPy, a column at a time."""
  rng = np.random.default_rng(3)
  params = {name: jnp.float32(0.2 * rng.standard_normal(leaf.shape))
            for name, leaf in of.init(jax.random.key(0)).items()}
  v, w = (np.asarray(matrix, np.float64) for matrix in of.matrices(params))
  tokens = thought_prompt(*problem()[:2])
  z = tokens.transpose(0, 2, 1)
  for _ in range(3):
    whole = z + v @ z @ (z.transpose(0, 2, 1) @ w @ z) / N
    z = np.concatenate([z, whole[..., -1:]], -1)
  made = of.matrices(params)
  grown = linear_cot.chain(made, jnp.float32(tokens), 3)
  parts.close(grown, z.transpose(0, 2, 1), 1e-5)
  parts.close(linear_cot.successors(made, grown[:, :-1], N), z[..., N + 1:].transpose(0, 2, 1), 1e-5)


def test_a_chain_over_columns_is_a_loop_over_a_state():
  """With the sparse weights, whatever they are: earlier thoughts do not matter."""
  of = linear_cot.Sparse(inputs=D)
  rng = np.random.default_rng(3)
  params = {name: jnp.float32(0.3 * rng.standard_normal((D, D))) for name in ('V31', 'W13')}
  tokens = jnp.float32(thought_prompt(*problem()[:2]))
  grown, state = linear_cot.chain(of.matrices(params), tokens, 6), tokens
  for k in range(6):
    state = state.at[:, -1].set(linear_cot.successors(of.matrices(params), state, N)[:, 0])
    parts.close(state[:, -1], grown[:, N + 1 + k], 1e-5)


def test_data_are_those_of_the_tasks():
  """Chains descend as the tasks' baselines do, start as WeightPrompt, and their loss is the squared error of
  thoughts."""
  k = 4
  x, y, _, best = (jnp.float32(value) for value in problem())
  iterates = descent.gradient_descent(x, y, RATE, k).transpose(1, 0, 2)
  parts.close(linear_cot.descend(x, y, RATE, k), iterates, 1e-5)
  example = descent.WeightPrompt(inputs=D, examples=N)(np.random.default_rng(0))
  shown = example['tokens'][:N]
  x, y = jnp.asarray(shown[None, :, :D]), jnp.asarray(shown[None, :, D])
  parts.close(linear_cot.lay_out(x, y, jnp.zeros((1, 1, D)))[0], example['tokens'], 1e-6)
  thoughts = linear_cot.descend(x, y, RATE, k)
  tokens = linear_cot.lay_out(x, y, thoughts[:, :-1])
  of = linear_cot.Sparse(inputs=D)
  made = of.matrices(of.constructive(0.3))
  batch = {'x': x, 'y': y, 'best': jnp.asarray(example['targets'][None, -1, D + 1:-1])}
  wrong = (linear_cot.successors(made, tokens, N) - linear_cot.lay_out(x, y, thoughts[:, 1:])[:, N:])[0]
  loss = linear_cot.loss_with_chain(made, batch, k, RATE)
  assert float(loss) == pytest.approx(float(jnp.square(wrong).sum()) / 2, rel=1e-4)
  assert linear_cot.loss_with_chain(of.matrices(of.constructive(RATE)), batch, k, RATE) < 1e-10


def test_without_a_chain_the_loss_is_of_one_step():
  x, y, _, best = (jnp.float32(value) for value in problem())
  of = linear_cot.Full(inputs=D)
  loss = linear_cot.loss_without_chain(of.matrices(of.constructive(0.6)), {'x': x, 'y': y, 'best': best})
  one = reference(np.asarray(x, np.float64), np.asarray(y, np.float64), 0.6, 1)[-1]
  assert float(loss) == pytest.approx(np.square(one - np.asarray(best)).sum(-1).mean(), rel=1e-5)


def test_a_chain_of_thought_is_learned():
  """400 steps at d = 5, n = 20: within 10 % of the descent at twice the trained length; without it, one step alone."""
  d, n, k, steps = 5, 20, 5, 400
  of, key = linear_cot.Sparse(inputs=d), jax.random.key(0)
  held_out = linear_cot.sample(jax.random.key(5), 4000, d, n)
  with_chain = functools.partial(linear_cot.loss_with_chain, thoughts=k, descent=RATE)
  params, _ = linear_cot.train(of, with_chain, key, n, steps, 128, 2e-2)
  curve = linear_cot.errors(of.matrices(params), held_out, 2 * k)
  taught = linear_cot.errors(of.matrices(of.constructive(RATE)), held_out, 2 * k)
  np.testing.assert_allclose(curve, taught, rtol=0.1)
  parts.close(of.product(params), -RATE * np.eye(d), 0.01)
  params, _ = linear_cot.train(of, linear_cot.loss_without_chain, key, n, steps, 128, 2e-2)
  curve = linear_cot.errors(of.matrices(params), held_out, 2 * k)
  assert float(curve[1]) == pytest.approx(d * (d + 1) / (n + d + 1), rel=0.1)
  assert curve[2 * k] > curve[0]
  # w_0 = 0: W_13 has no gradient, and stays where it began.
  parts.close(params['W13'], of.init(jax.random.fold_in(key, 0))['W13'], 1e-6)


def test_loops_over_a_thought_are_gradient_descent():
  """L loops of the constructed model leave w_L in the thought, and examples as they were (section 2.3)."""
  config = linear_icl.get_config(f'20,predict=weights,inputs={D},examples={N}')
  x, y, _, best = problem()
  w = reference(x, y, RATE, 20)
  tokens = np.zeros((B, N + 1, 2 * D + 2), np.float32)
  tokens[:, :N, :D], tokens[:, :N, D], tokens[:, N, -1] = x, y, 1
  params = linear_icl.constructive_weights(D, RATE)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parts.shapes(config.model))
  for loops in LOOPS:
    got = forward(config.model, params, jnp.asarray(tokens), parts.padded(loops, 20))
    np.testing.assert_allclose(got[:, N, D + 1:-1], w[loops], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got[:, :N], tokens[:, :N])
  batch = {'targets': jnp.zeros_like(tokens).at[:, N, D + 1:-1].set(best).at[:, N, -1].set(1),
           'weights': jnp.zeros((B, N + 1)).at[:, N].set(1)}
  readout = Readout(table=jnp.eye(2 * D + 2), read=None)
  measure = config.task.measure
  error = measure.row(jax.device_get(measure.sums(readout, got, batch, None)))['loss']
  assert error == pytest.approx(np.square(w[20] - best).sum(-1).mean() / D, rel=1e-4)  # |w - w*|^2 in units of d


def test_weights_that_are_predicted_are_learned():
  """300 quick steps end below the best that one step of descent can do (section 9)."""
  config = linear_icl.get_config(f'2,predict=weights,grow=0,inputs={D},examples=16')
  optimizer = config.optim.make(300, parameter_roles(config.model))
  key = jax.random.key(0)

  @jax.jit
  def run(params):
    def step(carry, index):
      params, state = carry
      batch = thoughts(jax.random.fold_in(key, index), 128, D, 16)
      loss, grads = jax.value_and_grad(lambda p: config.objective(
          config.model, p, parts.plan_context(key, batch), config.objective.denominators(batch))[0])(params)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), loss
    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(300))[1]

  losses = run(init_params(config.model, jax.random.key(1)))
  best = D * (D + 1) / (16 + D + 1) / (2 * D + 2)  # of one step, as a mean over outputs
  assert jnp.isfinite(losses).all() and losses[-30:].mean() < best


def thoughts(key, rows, inputs, examples):
  """A batch of `WeightPrompt`."""
  sample = linear_cot.sample(key, rows, inputs, examples)
  last, asked = examples, jnp.arange(examples + 1) == examples
  laid = linear_cot.lay_out(sample['x'], sample['y'], jnp.stack([jnp.zeros_like(sample['best']), sample['best']], 1))
  targets = jnp.where(asked[:, None], laid[:, last + 1:], 0.0)
  return {'tokens': laid[:, :last + 1], 'targets': targets, 'weights': jnp.broadcast_to(asked, targets.shape[:2]) * 1.0}


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('argument, name', [
    ('loops=0', 'loops'), ('loops=-1', 'loops'), ('inputs=0', 'inputs'), ('examples=0', 'examples'),
    ('steps=0', 'steps'), ('rate=0', 'rate'), ('grow=-1', 'grow'), ('grow=1', 'grow'), ('steps=1.5', 'steps'),
    ('width=3', 'width')])
def test_bad_arguments(argument, name):
  with pytest.raises(ConfigError, match=name):
    linear_icl.get_config(argument)


@pytest.mark.parametrize('call, name', [
    (lambda: linear_icl.constructive(0, RATE), 'inputs = 0'),
    (lambda: linear_icl.constructive(3, RATE, np.eye(2)), 'preconditioner'),
    (lambda: linear_cot.Full(inputs=0), 'inputs = 0'),
    (lambda: linear_cot.Sparse(inputs=-1), 'inputs = -1'),
    (lambda: linear_cot.Sparse(inputs=3).constructive(RATE, np.eye(2)), 'preconditioner'),
    (lambda: linear_cot.chain((jnp.eye(2 * D + 2),) * 2, jnp.zeros((2, 2, 2 * D + 2)), 0), 'chain of 0 steps'),
    (lambda: linear_cot.chain((jnp.eye(2 * D + 2),) * 2, jnp.zeros((2, 1, 2 * D + 2)), 1), 'after 0 examples'),
    (lambda: attention.LinearAttention().check(1, 'here: '), 'here: width = 1')])
def test_bad_values(call, name):
  with pytest.raises(ConfigError, match=name):
    call()


def test_it_refuses_caches_gates_and_prompts_without_examples():
  model, block = model_of(2), attention.LinearAttention()
  with pytest.raises(ConfigError, match='not causal'):
    model.cache(1, 8)
  params = parts.params(model)['cell']['core']
  core = Stack(block, 1)
  x = jnp.zeros((1, N + 1, D + 1))
  ctx = Context(pos=jnp.zeros((1, N + 1), jnp.int32))
  with pytest.raises(ConfigError, match='not causal'):
    core.apply({'params': params}, x, ctx, None, jnp.zeros(1))
  with pytest.raises(ConfigError, match='plain cell'):
    core.apply({'params': params}, x, ctx, jnp.zeros((1, 4, D + 1)), None)
  with pytest.raises(ConfigError, match='no examples'):
    core.apply({'params': params}, x[:, :1], ctx, None, None)


def test_the_configuration_is_of_library_parts():
  config = linear_icl.get_config('')
  assert isinstance(config.model.cell, Plain) and isinstance(config.model.cell.core.block, attention.LinearAttention)
  assert config.objective.longest == config.model.loops
  assert config.model.flops(21, 4) == 4 * (4 * 6 ** 2 + 4 * 6 ** 3 / 21) + 2 * 6
