"""Ouro: the layer and the cell, exits in logarithms, both stages of training, published sizes and weights."""
import dataclasses
import functools
import json
import math

import hypothesis
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import ouro as paper
import loopformer
from loopformer import config as configs, loop, plans
from loopformer.cells.damped import Damped
from loopformer.cells.halting import GATE, Halting
from loopformer.cells.plain import Normed
from loopformer.convert import from_official, to_official
from loopformer.convert.ouro import Settings, settings
from loopformer.model import init_params, parameter_count, parameter_roles
from loopformer.nn.attention import SelfAttention
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import Linear, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import WSD, AdamW
from loopformer.papers.ouro.terms import Improvement, Prospective, Retrospective
from loopformer.roles import Roles
from loopformer.sharding import Mesh
from loopformer.terms.cross_entropy import nll_sum, token_nll
from loopformer.terms.expected import Expected, exit_step, log_exit
from loopformer.training.frozen import Freeze
from loopformer.training.step import State, make_step
from loopformer.types import ConfigError, Plan, Readout, Trace
from tests import parts
from tests.parts import ROWS, D, L, N, T, V, close
from tests.terms.test_terms import largest

MODEL = ROWS['ouro'].model
KEEP = loop.Every()


def objective(term, loops: int = L) -> Objective:
  return Objective(rolls={'all': Rollout(plans.Uniform(loops), keep=KEEP)}, terms={'term': Weighted(1.0, term)})


def gradient(term, batch, weights, model=MODEL):
  """(loss, gradient) of one term."""
  of = objective(term, model.loops)
  loss = jax.jit(jax.value_and_grad(lambda w: of(model, w, parts.plan_context(jax.random.key(0), batch),
                                                 of.denominators(batch))[0]))
  return loss(weights)


def paths(tree) -> dict[str, np.ndarray]:
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# The layer and the cell ----------------------------------------------------------------------------------------------


def test_loops_are_a_deep_network_of_tied_weights_with_a_norm_after_every_block():
  weights, tokens = parts.params(MODEL), parts.tokens(2)
  trace = parts.forward(MODEL, weights, tokens, plans.Uniform(L)(None), keep=KEEP)
  x = weights['read_in']['embedding'][tokens]
  ctx, core = parts.context(x), weights['cell']['core']['block']
  for step in range(L):
    for layer in range(N):
      own = {'params': jax.tree.map(lambda leaf: leaf[layer], core)}
      x, _ = MODEL.cell.core.block.apply(own, x, ctx, None, None)
    x = RMSNorm(1e-6).apply({'params': weights['cell']['norm']}, x)
    close(trace.xs[step], x, 1e-5)
    close(trace.aux['halt'][step], (x @ weights['cell']['gate']['kernel'] + weights['cell']['gate']['bias'])[..., 0],
          1e-5)
  close(trace.z, x, 1e-5)  # no second norm before the head
  assert trace.aux['halt'].shape == (L, 2, T)


def test_the_gate_is_float32_and_starts_at_one_half():
  block = MODEL.cell.core.block.clone(dtype='bfloat16')
  model = parts.looped(Halting(Normed(Stack(block, 1), RMSNorm(1e-6))), read_in=parts.nowhere().clone(dtype='bfloat16'))
  weights = init_params(model, jax.random.key(0))
  trace = parts.forward(model, weights, parts.tokens(2), plans.Uniform(2)(None))
  assert trace.x.dtype == jnp.bfloat16 and trace.aux['halt'].dtype == jnp.float32
  assert not trace.aux['halt'].any()
  p = np.exp(log_exit(jnp.zeros((4, 1))))[:, 0]
  np.testing.assert_allclose(p, [0.5, 0.25, 0.125, 0.125], rtol=1e-6)


def test_bidirectional_attention_is_the_softmax_over_a_document():
  rng = np.random.default_rng(0)
  q, k, v = rng.standard_normal((3, 2, 5, 2, 4)).astype(np.float32)
  seg = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
  for given in (None, seg):
    att = np.einsum('bthd,bshd->bhts', q, k) / 2
    if given is not None:
      att = np.where((seg[:, :, None] == seg[:, None])[:, None], att, -np.inf)
    att = np.exp(att - att.max(-1, keepdims=True))
    expected = np.einsum('bhts,bshd->bthd', att / att.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(Bidirectional()(q, k, v, given), expected, atol=1e-5)


# Exits ---------------------------------------------------------------------------------------------------------------

gates = arrays.arrays(np.float32, st.integers(1, 6), elements=st.floats(-50, 50, width=32))


def law(halt) -> list[float]:
  """p_1 .. p_K by the definition."""
  lambdas, p, left = 1 / (1 + np.exp(-np.asarray(halt, np.float64))), [], 1.0
  for t, each in enumerate(lambdas):
    p.append(left * (each if t + 1 < len(lambdas) else 1))
    left *= 1 - each
  return p


@hypothesis.given(gates)
def test_exits_are_the_law_and_sum_to_one(halt):
  p = np.exp(log_exit(jnp.asarray(halt)))
  np.testing.assert_allclose(p, law(halt), atol=1e-5)
  np.testing.assert_allclose(p.sum(), 1, atol=1e-5)


def test_extreme_gates_have_finite_gradients_and_the_last_has_none():
  def entropy(halt):
    log_p = log_exit(halt)
    return -(jnp.exp(log_p) * log_p).sum()

  for halt in ([50, -50, 50, -50], [-50] * 4, [1e4, 0, 0, 0], [0.3, -0.2, 0.1, 5]):
    grads = jax.grad(entropy)(jnp.array(halt, jnp.float32))
    assert np.isfinite(grads).all() and grads[-1] == 0
  assert np.abs(grads[:-1]).min() > 1e-3


def test_certain_gates_put_all_on_one_step():
  never, always = jnp.full((4, 3), -60.0), jnp.full((4, 3), 60.0)
  np.testing.assert_allclose(np.exp(log_exit(never)), np.eye(4)[:, 3:] * np.ones((1, 3)), atol=1e-6)
  np.testing.assert_allclose(np.exp(log_exit(always)), np.eye(4)[:, :1] * np.ones((1, 3)), atol=1e-6)
  assert not log_exit(always[:1]).any()  # one step: probability 1, whatever the gate


@hypothesis.given(gates, st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_exit_step_is_the_first_that_reaches_the_threshold(halt, low, high):
  low, high = sorted((low, high))
  halt = jnp.asarray(np.clip(halt, -5, 5))
  assert exit_step(halt, 0.0) == 1 and exit_step(halt, 1.0) == len(halt)
  assert exit_step(halt, low) <= exit_step(halt, high)
  reached = np.cumsum(law(halt))
  hypothesis.assume(np.abs(reached - low).min() > 1e-4)
  assert exit_step(halt, low) == 1 + np.argmax(np.append(reached[:-1] >= low, True))


# Terms ---------------------------------------------------------------------------------------------------------------


def made(steps: int = 4, rows: int = 3, scale: float = 1.0):
  """(xs, table, halt, batch) of random numbers; some weights are zero."""
  rng = np.random.default_rng(steps)
  weights = rng.uniform(0.5, 2, (rows, T)) * (rng.uniform(size=(rows, T)) < 0.7)
  xs, table, halt = (jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)
                     for shape in ((steps, rows, T, D), (V, D), (steps, rows, T)))
  return xs, table, halt, {'targets': jnp.asarray(rng.integers(0, V, (rows, T))),
                           'weights': jnp.asarray(weights, jnp.float32)}


def value(term, xs, table, halt, batch, params=None):
  plan = Plan(t=jnp.zeros(len(xs)), dt=jnp.ones(len(xs)))
  trace = Trace(x=xs[-1], z=xs[-1], xs=xs, aux={'halt': halt}, kv=None, steps=None, plan=plan)
  return term({'all': trace}, batch, Readout(table=table, read=lambda x: x), params)


def losses(xs, table, targets):
  """CE of every step and token, [K, B, T]."""
  logp = jax.nn.log_softmax(jnp.einsum('...D,VD->...V', xs, table))
  return -jnp.take_along_axis(logp, jnp.broadcast_to(targets, xs.shape[:-1])[..., None], -1)[..., 0]


def plainly(xs, table, halt, batch, beta):
  """Stage I, by products."""
  lambdas, left, p = jax.nn.sigmoid(halt), jnp.ones(halt.shape[1:]), []
  for t in range(len(halt)):
    p.append(left * lambdas[t] if t + 1 < len(halt) else left)
    left = left * (1 - lambdas[t])
  p = jnp.stack(p)
  each = (p * losses(xs, table, batch['targets'])).sum(0) + beta * (p * jnp.log(p)).sum(0)
  return jnp.sum(each * batch['weights'])


@pytest.mark.parametrize('steps, chunk', [(1, 5), (4, 7), (4, 512)])
def test_expected_loss_and_its_gradients_are_the_formula(steps, chunk):
  xs, table, halt, batch = made(steps)
  term = Expected(roll='all', beta=0.3, chunk=chunk)
  ours = jax.value_and_grad(lambda *given: value(term, *given, batch), (0, 1, 2))(xs, table, halt)
  theirs = jax.value_and_grad(lambda *given: plainly(*given, batch, 0.3), (0, 1, 2))(xs, table, halt)
  close(ours, theirs, 1e-5)
  assert not ours[1][2][-1].any()  # the last lambda has no part in it
  assert term.weight(batch) == batch['weights'].sum() and term.reads == ('all',)


@pytest.mark.parametrize('step', range(4))
def test_a_certain_exit_is_the_loss_of_its_step(step):
  xs, table, _, batch = made()
  halt = jnp.where(jnp.arange(4)[:, None, None] == step, 60.0, -60.0) * jnp.ones((1, 3, T))
  expected = nll_sum(xs[step], table, batch['targets'], batch['weights'])
  np.testing.assert_allclose(value(Expected(roll='all', beta=0.7), xs, table, halt, batch), expected, rtol=1e-5)


def test_one_step_is_cross_entropy():
  xs, table, halt, batch = made(1)
  np.testing.assert_allclose(value(Expected(roll='all', beta=5.0), xs, table, halt, batch),
                             nll_sum(xs[0], table, batch['targets'], batch['weights']), rtol=1e-6)


def test_the_entropy_is_that_of_the_uniform_law_less_the_distance_to_it():
  xs, table, halt, batch = made()
  entropy = value(Expected(roll='all', beta=0.0), xs, table, halt, batch) - value(
      Expected(roll='all', beta=1.0), xs, table, halt, batch)
  p = np.exp(log_exit(halt))
  distance = (p * np.log(4 * p)).sum(0)
  np.testing.assert_allclose(entropy, np.sum((np.log(4) - distance) * np.asarray(batch['weights'])), rtol=1e-4)


def test_the_entropy_teaches_the_gate_and_what_it_reads_alone():
  batch, weights = parts.batch(), parts.params(MODEL)
  grads = [paths(gradient(Expected(roll='all', beta=beta), batch, weights)[1]) for beta in (0.0, 0.3)]
  close(grads[0]['read_out/kernel'], grads[1]['read_out/kernel'], 1e-6)
  for name in ('cell/gate/kernel', 'cell/core/block/attn/qkv/kernel'):
    assert np.abs(grads[0][name] - grads[1][name]).max() > 1e-4


def test_stage_one_teaches_everything():
  _, grads = gradient(Expected(roll='all'), parts.batch(), parts.params(MODEL))
  assert all(np.abs(leaf).max() > 1e-6 for leaf in paths(grads).values())


@pytest.mark.parametrize('term', [Expected(roll='all', beta=0.3), Improvement(roll='all'),
                                  Improvement(roll='all', alignment=Prospective())], ids=repr)
def test_padding_counts_for_nothing(term):
  xs, table, halt, batch = made()
  out = batch['weights'] == 0
  assert 0 < out.sum() < out.size
  gate = {'cell': {'gate': {'kernel': jnp.linspace(-1, 1, D)[:, None], 'bias': jnp.array([0.3])}}}

  def of(xs, halt, targets):
    return value(term, xs, table, halt, {**batch, 'targets': targets}, gate)

  result, grads = jax.value_and_grad(of, (0, 1))(xs, halt, batch['targets'])
  other = of(jnp.where(out[..., None], xs + 3, xs), jnp.where(out, halt - 2, halt),
             jnp.where(out, (batch['targets'] + 1) % V, batch['targets']))
  np.testing.assert_allclose(result, other, rtol=1e-6)
  for leaf in grads:
    assert not np.asarray(leaf)[:, np.asarray(out)].any()


@pytest.mark.parametrize('alignment, taught', [(Retrospective(), slice(1, None)), (Prospective(), slice(None, -1))])
def test_improvement_is_the_formula_and_teaches_the_aligned_gates(alignment, taught):
  steps = 4
  _, table, _, batch = made()
  # One channel a step, so that each step has a weight of the gate to itself.
  xs = jnp.zeros((steps, 3, T, D)).at[jnp.arange(steps), :, :, jnp.arange(steps)].set(
      jnp.array([1.0, 1.5, 2.0, 2.5])[:, None, None])
  kernel, bias = jnp.linspace(-1, 1, D)[:, None], jnp.array([0.3])
  term = Improvement(roll='all', alignment=alignment, slope=3.0, least=0.1, chunk=7)

  def ours(kernel, bias):
    return value(term, xs, table, jnp.zeros((steps, 3, T)), batch, {'cell': {'gate': {'kernel': kernel, 'bias': bias}}})

  found, (dkernel, dbias) = jax.value_and_grad(ours, (0, 1))(kernel, bias)
  ce = np.asarray(losses(xs, table, batch['targets']), np.float64)
  label = 1 / (1 + np.exp(-3.0 * (np.maximum(ce[:-1] - ce[1:], 0) - 0.1)))
  leave = 1 / (1 + np.exp(-(np.asarray(xs, np.float64) @ np.asarray(kernel)[:, 0] + 0.3)))[taught]
  loss = -(label * np.log(1 - leave) + (1 - label) * np.log(leave)) * np.asarray(batch['weights'])
  np.testing.assert_allclose(found, loss.sum() / steps, rtol=1e-5)
  reached = np.zeros(D, bool)
  reached[np.arange(steps)[taught]] = True
  np.testing.assert_array_equal(np.asarray(dkernel)[:, 0] != 0, reached)
  assert dbias.shape == (1,) and dbias != 0


@pytest.mark.parametrize('alignment', [Retrospective(), Prospective()], ids=repr)
def test_stage_two_has_gradients_of_the_gate_alone(alignment):
  _, grads = gradient(Improvement(roll='all', alignment=alignment), parts.batch(), parts.params(MODEL))
  for name, leaf in paths(grads).items():
    assert leaf.any() == name.startswith('cell/gate/'), name


def test_the_term_is_given_the_gate_of_the_cell():
  """Of a cell with another gate, and of one that has its gate elsewhere."""
  xs, table, halt, batch = made()
  for cell in ({'gate': {'out': {'kernel': jnp.ones((D, 1))}}}, {'gate': {'kernel': jnp.ones((D + 1, 1))}}, {}):
    with pytest.raises(ConfigError,
                       match=r'Improvement\.gate = Linear: .*give the term the gate that stands in model\.cell'):
      value(Improvement(roll='all'), xs, table, halt, batch, {'cell': cell})


def test_the_gate_is_taught_on_the_states_that_it_reads():
  """Within a damped step it would read others than those that the step gives."""
  term, inner = Improvement(roll='all'), MODEL.cell.clone(of=Damped(MODEL.cell.of, 0.5))
  term.check(MODEL.clone(cell=inner))
  config = paper.get_config('pointers,gate=literal')
  for cell, told in ((Damped(config.model.cell, 0.5), 'Damped has none'),
                     (config.model.cell.of, 'has none: .*put Halting around'),
                     (config.model.cell.clone(gate=Linear(1)), r"model\.cell\.gate = Linear.*the cell's gate")):
    with pytest.raises(ConfigError, match=told):
      configs.check(dataclasses.replace(config, model=config.model.clone(cell=cell)))


def test_a_term_without_steps_to_compare_is_zero():
  batch = parts.batch()
  model = MODEL.clone(loops=1)
  assert gradient(Improvement(roll='all'), batch, parts.params(model), model)[0] == 0


def test_losses_of_tokens_are_constants_and_the_naive_ones():
  xs, table, _, batch = made()
  targets = jnp.broadcast_to(batch['targets'], xs.shape[:-1])
  close(token_nll(xs, table, targets, 7), losses(xs, table, targets), 1e-5)
  assert not jax.grad(lambda xs: token_nll(xs, table, targets).sum())(xs).any()


def test_logits_of_all_steps_are_never_held():
  xs, table, halt, batch = made(8, 16)
  gate = {'cell': {'gate': {'kernel': jnp.ones((D, 1)), 'bias': jnp.zeros(1)}}}
  for make in (Expected, Improvement):
    def of(chunk):
      term = make(roll='all', chunk=chunk)
      return largest(jax.make_jaxpr(jax.grad(lambda xs: value(term, xs, table, halt, batch, gate)))(xs).jaxpr)
    logits = halt.size * V
    assert of(16) < logits <= of(halt.size)


@pytest.mark.parametrize('change, message', [
    ({'aux': {}}, "'all' has no gate to learn"), ({'xs': None}, 'keep every step'),
    ({'plan': Plan(t=jnp.zeros(4), dt=jnp.ones(4), active=jnp.ones(4, bool))}, 'plans.Uniform'),
    ({'plan': Plan(t=jnp.zeros(4), dt=jnp.ones(4), no_grad_steps=jnp.int32(1))}, 'plans.Uniform')])
@pytest.mark.parametrize('term', [Expected(roll='all'), Improvement(roll='all')], ids=['I', 'II'])
def test_a_rollout_that_does_not_serve_is_refused(change, message, term):
  xs, table, halt, batch = made()
  trace = Trace(x=None, z=None, xs=xs, aux={'halt': halt}, kv=None, steps=None,
                plan=Plan(t=jnp.zeros(4), dt=jnp.ones(4))).replace(**change)
  with pytest.raises(ConfigError, match=message):
    term({'all': trace}, batch, Readout(table=table, read=lambda x: x), {})


# Training a part of the parameters -----------------------------------------------------------------------------------

DECAYING = AdamW(schedule=WSD(peak=0.1, end=0.1), decay=0.5)


@pytest.mark.parametrize('term', [Improvement(roll='all'), Expected(roll='all')], ids=['stage II', 'stage I'])
def test_only_the_gate_moves_bit_for_bit(term):
  """Whatever the gradient and the decay of the others."""
  optimizer = Freeze(of=DECAYING, paths=('cell/gate',)).make(3, parameter_roles(MODEL))
  weights = parts.params(MODEL)
  step = make_step(MODEL, objective(term), optimizer, Mesh().make(jax.devices()[:1]))
  state = State(step=jnp.int32(0), params=jax.tree.map(jnp.copy, weights), optimizer=optimizer.init(weights))
  for seed in range(3):
    state, _ = step(state, parts.batch(seed=seed))
  for (name, new), old in zip(paths(state.params).items(), paths(weights).values()):
    assert (new.tobytes() == old.tobytes()) != name.startswith('cell/gate/'), name


def test_only_clips_by_what_it_trains_and_keeps_no_state_of_the_rest():
  weights = {'a': {'kernel': jnp.ones(2)}, 'ab': {'kernel': jnp.ones(2)}}
  grads = {'a': {'kernel': jnp.ones(2)}, 'ab': {'kernel': jnp.full(2, 1e6)}}
  of = dataclasses.replace(DECAYING, decay=0.0)
  optimizer = Freeze(of=of, paths=('a',)).make(5, Roles())
  state = optimizer.init(weights)
  updates, _ = optimizer.update(grads, state, weights)
  alone = of.make(5, Roles())
  expected, _ = alone.update({'a': grads['a']}, alone.init({'a': weights['a']}), {'a': weights['a']})
  np.testing.assert_array_equal(updates['a']['kernel'], expected['a']['kernel'])
  assert not updates['ab']['kernel'].any()
  assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 2 * 2  # two moments of `a`


def test_only_refuses_paths_of_nothing():
  with pytest.raises(ConfigError, match=r"optim\.paths names 'cell/gat', where no parameter is; there are .*cell/gate"):
    Freeze(of=AdamW(), paths=('cell/gat',)).routes(parts.shapes(MODEL))


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size, expected', [('1.4b', 1_434_652_673), ('2.6b', 2_667_974_657)])
def test_parameter_count_of_the_published_sizes(size, expected):
  assert parameter_count(paper.get_config(size).model) == expected


def test_arguments_of_the_configuration():
  config = paper.get_config('pointers,layers=4,loops=1')
  assert (config.model.cell.core.depth, config.model.loops, config.objective.longest) == (4, 1, 1)
  gates = {name: paper.get_config(f'pointers,gate={name}') for name in ('literal', 'prospective')}
  assert [config.objective.terms['gate'].term.alignment for config in gates.values()] == [Retrospective(),
                                                                                          Prospective()]
  assert all(config.optim.paths == ('cell/gate',) for config in gates.values())
  assert paper.get_config('tiny,beta=0.1').objective.terms['lm'].term.beta == 0.1
  with pytest.raises(ConfigError, match='gate = literal: with loops = 1'):
    paper.get_config('pointers,loops=1,gate=literal')


# Published weights ---------------------------------------------------------------------------------------------------

# No two sizes are equal, nor equal to another number in a layout.
SIZES = dict(V=50, D=48, F=80, H=6)
TOKENS = np.random.default_rng(9).integers(0, 50, (3, 11))
NORMS = ('input_layernorm', 'input_layernorm_2', 'post_attention_layernorm', 'post_attention_layernorm_2')
LAYER_0 = 'model.layers.0.'


def shapes(depth):
  v, d, f = (SIZES[name] for name in 'VDF')
  layer = {f'{name}.weight': (d,) for name in NORMS} | {f'self_attn.{c}_proj.weight': (d, d) for c in 'qkvo'} | {
      'mlp.gate_proj.weight': (f, d), 'mlp.up_proj.weight': (f, d), 'mlp.down_proj.weight': (d, f)}
  return {'model.embed_tokens.weight': (v, d), 'model.norm.weight': (d,), 'model.early_exit_gate.weight': (1, d),
          'model.early_exit_gate.bias': (1,), 'lm_head.weight': (v, d),
          **{f'model.layers.{i}.{key}': shape for i in range(depth) for key, shape in layer.items()}}


@functools.cache
def _weights(depth):
  rng = np.random.default_rng(depth)
  sd = {}
  for key, shape in shapes(depth).items():
    sd[key] = (rng.normal(size=shape) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)).astype(np.float32)
    if 'norm' in key:
      sd[key] += 1
  return sd


def weights_of(depth=2):
  return {key: leaf.copy() for key, leaf in _weights(depth).items()}


@functools.cache
def converted(depth=2):
  return from_official('ouro', weights_of(depth), heads=SIZES['H'])


def reference(sd, tokens, loops):
  """(logits [K, B, T, V], gate's logits [K, B, T]) from the equations, in float64."""
  w = {key.removeprefix('model.'): leaf.astype(np.float64) for key, leaf in sd.items()}
  depth = 1 + max(int(key.split('.')[1]) for key in w if key.startswith('layers.'))
  heads = SIZES['H']

  def norm(x, name):
    return x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + 1e-6) * w[f'{name}.weight']

  def rotate(x):  # [B, T, H, d]: the first half of the channels and the second
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 1e6 ** (-np.arange(half) / half)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin

  def attend(x, name):
    q, k, v = (np.reshape(x @ w[f'{name}.{c}_proj.weight'].T, (*x.shape[:2], heads, -1)) for c in 'qkv')
    att = np.einsum('bthd,bshd->bhts', rotate(q), rotate(k)) / math.sqrt(q.shape[-1])
    att = np.exp(np.where(np.tri(x.shape[1], dtype=bool), att, -np.inf))
    out = np.einsum('bhts,bshd->bthd', att / att.sum(-1, keepdims=True), v).reshape(x.shape)
    return out @ w[f'{name}.o_proj.weight'].T

  def mlp(x, name):
    gate = x @ w[f'{name}.gate_proj.weight'].T
    return (gate / (1 + np.exp(-gate)) * (x @ w[f'{name}.up_proj.weight'].T)) @ w[f'{name}.down_proj.weight'].T

  x, logits, halt = w['embed_tokens.weight'][tokens], [], []
  for _ in range(loops):
    for i in range(depth):
      own = f'layers.{i}.'
      x = x + norm(attend(norm(x, own + NORMS[0]), own + 'self_attn'), own + NORMS[1])
      x = x + norm(mlp(norm(x, own + NORMS[2]), own + 'mlp'), own + NORMS[3])
    x = norm(x, 'norm')
    logits.append(x @ w['lm_head.weight'].T)
    halt.append((x @ w['early_exit_gate.weight'].T + w['early_exit_gate.bias'])[..., 0])
  return np.stack(logits), np.stack(halt)


@pytest.mark.parametrize('depth', [1, 2])
def test_loaded_weights_give_the_reference_after_every_loop(depth):
  model, params = converted(depth)
  logits, halt = reference(weights_of(depth), TOKENS, 5)  # beyond the trained depth too
  trace = parts.forward(model, params, TOKENS, plans.Uniform(5)(None), keep=KEEP)
  assert np.abs(logits).max() > 1 and np.abs(np.diff(logits, axis=0)).max() > 0.1
  np.testing.assert_allclose(parts.logits(model, params, trace.xs), logits, rtol=0, atol=1e-4)
  np.testing.assert_allclose(trace.aux['halt'], halt, rtol=0, atol=1e-4)
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS, steps=3), logits[2], rtol=0, atol=1e-4)


def swapped(first, second):
  def change(sd):
    other = {key: key.replace(first, second) if first in key else key.replace(second, first) for key in sd}
    return {key: sd[other[key]] for key in sd}
  return change


def transformed(end, how):
  return lambda sd: {key: how(leaf) if key.endswith(end) else leaf for key, leaf in sd.items()}


@pytest.mark.parametrize('mistake', [
    swapped('gate_proj', 'up_proj'), swapped('k_proj', 'v_proj'), swapped('input_layernorm.', 'input_layernorm_2.'),
    swapped('input_layernorm_2', 'post_attention_layernorm_2'), swapped('layers.0', 'layers.1'),
    swapped('embed_tokens', 'lm_head'), transformed('o_proj.weight', np.transpose),
    transformed('q_proj.weight', lambda q: q.reshape(6, 2, 4, 48).swapaxes(1, 2).reshape(48, 48))])
def test_the_reference_feels_mistakes(mistake):
  """Or agreement with it would prove nothing."""
  sd = {key.replace('model.embed', 'embed'): leaf for key, leaf in weights_of().items()}
  wrong, right = (reference(given, TOKENS, 2)[0] for given in (mistake(sd), sd))
  assert np.abs(wrong - right).max() > 1e-2


def test_weights_round_trip_and_have_the_tree_of_init(tmp_path):
  model, params = converted()
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, parts.shapes(model))
  sd, back = weights_of(), to_official('ouro', model, params)
  assert set(back) == {key.removeprefix('model.') for key in sd} and len(back) == 5 + 11 * 2
  for key, leaf in sd.items():
    np.testing.assert_array_equal(back[key.removeprefix('model.')], leaf, err_msg=key)
  np.savez(tmp_path / 'model.npz', **sd)
  halves = {key: leaf.astype(jnp.bfloat16) for key, leaf in sd.items()}
  rounded = {key: leaf.astype(np.float32) for key, leaf in halves.items()}
  pairs = [(params, from_official('ouro', tmp_path / 'model.npz', heads=6)[1]),
           (from_official('ouro', halves, heads=6)[1], from_official('ouro', rounded, heads=6)[1])]
  for first, second in pairs:
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_sizes_are_read():
  model, _ = converted()
  assert (model.read_in.vocab, model.read_in.width, model.cell.core.depth) == (50, 48, 2)
  assert (model.cell.core.block.mlp.hidden, model.loops, model.read_in.length) == (80, 4, 65_536)


BAD = {
    'missing': (lambda sd: {k: a for k, a in sd.items() if k != LAYER_0 + 'mlp.up_proj.weight'},
                [r"'layers.0.mlp.up_proj.weight' is missing", '[80, 48]']),
    'missing gate': (lambda sd: {k: a for k, a in sd.items() if 'gate.bias' not in k},
                     ["'early_exit_gate.bias' is missing", '[1]']),
    'missing head': (lambda sd: {k: a for k, a in sd.items() if 'lm_head' not in k},
                     ["'lm_head.weight' is missing", '[50, 48]']),
    'misshapen': (lambda sd: sd | {LAYER_0 + 'self_attn.k_proj.weight': np.zeros((24, 48), np.float32)},
                  ["'layers.0.self_attn.k_proj.weight' has shape [24, 48], expected [48, 48]"]),
    'misshapen head': (lambda sd: sd | {'lm_head.weight': np.zeros((51, 48), np.float32)},
                       ["'lm_head.weight' has shape [51, 48], expected [50, 48]"]),
    'surplus': (lambda sd: sd | {'model.layers.1.self_attn.q_proj.bias': np.zeros(48, np.float32)},
                ["'layers.1.self_attn.q_proj.bias' of shape [48] is surplus"]),
    'integers': (lambda sd: sd | {'model.norm.weight': np.ones(48, np.int8)}, ["'norm.weight' has dtype int8"]),
    'empty': (lambda sd: {}, ["'embed_tokens.weight' is missing", 'empty']),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_weights_are_named(case):
  change, words = BAD[case]
  with pytest.raises(ConfigError) as error:
    from_official('ouro', change(weights_of()), heads=6)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('heads, message', [(None, 'heads is missing: no shape'), (5, 'heads = 5 does not divide'),
                                            (16, 'heads = 16: their width 3 is odd')])
def test_bad_heads_are_named(heads, message):
  with pytest.raises(ConfigError, match=message):
    from_official('ouro', weights_of(), heads=heads)


def test_models_that_the_published_code_cannot_hold_are_refused():
  model, params = converted()
  with pytest.raises(ConfigError, match='prelude or a coda'):
    to_official('ouro', model.clone(coda=parts.stack(1)), params)
  block = parts.peri(SelfAttention(heads=6, groups=3), hidden=80)
  with pytest.raises(ConfigError, match='groups = 3'):
    to_official('ouro', model.clone(cell=Halting(Normed(Stack(block, 2), RMSNorm(1e-6)))), params)


def test_settings_of_a_checkpoint_are_told(tmp_path):
  held = {'num_attention_heads': 16, 'num_key_value_heads': 16, 'total_ut_steps': 4, 'max_position_embeddings': 65_536,
          'eos_token_id': 2, 'early_exit_threshold': 1.0, 'rope_theta': 1_000_000, 'tie_word_embeddings': False}
  (tmp_path / 'config.json').write_text(json.dumps(held))
  expected = Settings(heads=16, loops=4, length=65_536, eos=2, threshold=1.0)
  assert settings(held) == settings(tmp_path) == settings(tmp_path / 'config.json') == expected
  assert settings({}) == Settings()
  for name, wrong in (('num_key_value_heads', 4), ('tie_word_embeddings', True), ('rope_theta', 1e4),
                      ('rms_norm_eps', 1e-5)):
    with pytest.raises(ConfigError, match=f'{name} = {wrong}'):
      settings(held | {name: wrong})
  with pytest.raises(ConfigError, match='no such file'):
    settings(tmp_path / 'nothing.json')


def test_the_gate_of_the_cell_is_that_of_the_term():
  assert Halting(MODEL.cell.of).gate == Improvement(roll='all').gate == GATE == Linear(1, std=0.0, bias=GATE.bias)
