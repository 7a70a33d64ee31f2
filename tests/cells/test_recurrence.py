"""Loops with an injection, a random start and steps without gradient: Parcae, Huginn, intra-layer recurrence."""
import dataclasses
import functools
import math

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import config as configs, plans
from loopformer.cells.cell import Cell
from loopformer.loop import Every
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Chain
from loopformer.nn.inject import Add, Concat, Diagonal, NoInjection, decay
from loopformer.nn.layers import Linear, RMSNorm, unfused
from loopformer.nn.positions import Alibi, Rotary
from loopformer.nn.stack import Stack, repeated
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.starts import Embedded, Noise, Zeros
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError, Plan
from tests import parts
from tests.experiments.test_golden import config_of
from tests.parts import ROWS, D, T, V, close, forward, params, tokens

RECURRENT = ['added', 'held', 'huginn', 'parcae']


def run(model, weights, text, loops: int):
  return forward(model, weights, text, plans.Uniform(loops)(None))


# The diagonal injection (Parcae, section 10) -------------------------------------------------------------------------


@pytest.mark.parametrize('log_a, dt', [(0, 0), (50, 50), (-50, -50), (50, -50), (-50, 50), (80, 80)])
def test_decay_is_between_zero_and_one(log_a, dt):
  a, delta = decay(jnp.full(3, float(log_a)), jnp.full(3, float(dt)))
  assert ((a > 0) & (a < 1)).all() and np.isfinite(delta).all()


def bare(**options):
  """A model whose layers are the identity: the injection alone."""
  model = parts.looped(parts.recur(Diagonal()), start=Noise(std=0.3), **options)
  weights = jax.jit(lambda: model.init(jax.random.key(0), tokens(1), plans.Uniform(1)(None)))()['params']
  block = weights['cell']['core']['block']
  zeroed = {name: {**block[name], out: jax.tree.map(jnp.zeros_like, block[name][out])}
            for name, out in (('attn', 'out'), ('mlp', 'down'))}
  return model, {**weights, 'cell': {**weights['cell'], 'core': {'block': {**block, **zeroed}}}}


def test_diagonal_starts_at_the_published_decay():
  _, weights = bare()
  inject = weights['cell']['inject']
  a, delta = decay(inject['log_a'], inject['dt'])
  np.testing.assert_allclose(a, math.sqrt(1 / 5), rtol=1e-6)
  np.testing.assert_allclose(delta, -math.log(math.sqrt(1 / 5)), rtol=1e-6)
  np.testing.assert_array_equal(inject['B'], np.eye(D))
  assert Diagonal().radius(inject) == pytest.approx(math.sqrt(1 / 5), rel=1e-6)


@pytest.mark.parametrize('loops', [1, 2, 8])
def test_identity_layers_leave_the_closed_form(loops):
  model, weights = bare()
  text = tokens(2)
  e = model.apply({'params': weights}, text, jnp.zeros_like(text) + jnp.arange(T),
                  method=lambda model, text, pos: model.read_in(text, pos))
  start = model.start(e, parts.context(text))
  a, delta = decay(weights['cell']['inject']['log_a'], weights['cell']['inject']['dt'])
  expected = a ** loops * start + delta * (1 - a ** loops) / (1 - a) * e
  close(run(model, weights, text, loops).x, expected, 1e-5)


def test_concat_radius_is_the_spectral_radius_of_the_state_half():
  rng = np.random.default_rng(0)
  q, _ = np.linalg.qr(rng.standard_normal((D, D)))
  state = q @ np.diag(np.linspace(-1.5, 0.5, D)) @ q.T
  kernel = np.concatenate([state, rng.standard_normal((D, D))]).astype(np.float32)
  assert Concat().radius({'adapter': {'kernel': kernel}}) == pytest.approx(1.5, rel=1e-5)
  assert Add().radius({}) == 1.0


# Noise ---------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_sequence_key_and_position_alone():
  e = jnp.zeros((3, 500, 8))
  pos = jnp.broadcast_to(jnp.arange(500), (3, 500))
  ctx = parts.context(jnp.zeros((3, 500))).replace(pos=pos, noise=jax.random.split(jax.random.key(1), 3))
  noise = Noise(std=2.0)(e, ctx)
  spread = np.std(noise)
  assert 2.0 * 0.96 < spread < 2.0 * 1.0 and np.abs(noise).max() <= 6.0  # the cut at three takes 1.3 %
  one = Noise(std=2.0)(e[1:2, 7:9], ctx.replace(pos=pos[1:2, 7:9], noise=ctx.noise[1:2]))
  np.testing.assert_array_equal(one, noise[1:2, 7:9])
  assert np.abs(noise[0] - noise[1]).min() > 0


# Depths that are drawn -----------------------------------------------------------------------------------------------


DEPTHS = {'poisson': (plans.Poisson(average=8), lambda mean: 8 + math.exp(-8), 8.0),
          'lognormal': (plans.LogNormalPoisson(average=32), lambda mean: 33.0, 32 + 32 ** 2 * (math.exp(0.25) - 1))}


@pytest.mark.parametrize('name', DEPTHS)
def test_moments_of_the_depth(name):
  depth, mean, variance = DEPTHS[name]
  count = 100_000
  drawn = np.asarray(jax.jit(jax.vmap(lambda key: depth.draw(key, depth.mean(jnp.int32(0)))))(
      jax.random.split(jax.random.key(0), count)))
  assert drawn.min() >= 1
  assert abs(drawn.mean() - mean(None)) < 3 * math.sqrt(variance / count)
  np.testing.assert_allclose(drawn.var(), variance, rtol=0.05)
  assert depth.last_mean == pytest.approx(mean(None))


@pytest.mark.parametrize('over', [plans.PerSequence(), plans.Shared()], ids=repr)
def test_truncated_splits_what_was_drawn(over):
  plan = plans.Truncated(depth=plans.Poisson(average=4), graded=2, over=over)
  batch = {'tokens': jnp.zeros((64, T))}
  drawn = jax.jit(jax.vmap(lambda key: plan(parts.plan_context(key, batch))))(jax.random.split(jax.random.key(0), 50))
  active, free = np.asarray(drawn.active), np.asarray(drawn.no_grad_steps)
  graded = active.sum(1)
  total = free + graded
  assert active.shape[1] == 2 and total.min() >= 1 and graded.min() >= 1 and graded.max() == 2 and free.min() == 0
  np.testing.assert_array_equal(graded, np.minimum(total, 2))
  assert active.ndim == (3 if over == plans.PerSequence() else 2)
  if over == plans.PerSequence():
    assert (free.max(1) > free.min(1)).mean() > 0.9  # sequences differ
    part = parts.plan_context(jax.random.split(jax.random.key(0), 50)[0], {'tokens': batch['tokens'][:8],
                                                                           'row': jnp.arange(8, 16)})
    np.testing.assert_array_equal(plan(part).no_grad_steps, free[0, 8:16])  # whatever device a sequence is on


@pytest.mark.parametrize('average, graded', [(0.5, 1), (2.5, 3)])
def test_a_mean_between_two_numbers_lets_the_larger_one_be_differentiated(average, graded):
  plan = plans.Truncated(depth=plans.Poisson(average=average), graded=graded, over=plans.PerSequence())
  drawn = plan(parts.plan_context(jax.random.key(0), {'tokens': jnp.zeros((64, T))}))
  total = np.asarray(drawn.no_grad_steps + drawn.active.sum(0))
  assert total.max() > graded
  np.testing.assert_array_equal(drawn.active.sum(0), np.minimum(total, graded))


@pytest.mark.parametrize('curve, values', [(plans.linear, {0: 1, 50: 4, 100: 8, 500: 8}),
                                           (plans.one_minus_sqrt, {0: 1, 75: 4, 100: 8, 101: 8})])
def test_ramp(curve, values):
  depth = plans.Ramp(of=plans.Poisson(average=8), steps=100, curve=curve)
  assert {step: int(depth.mean(jnp.int32(step))) for step in values} == values


def test_stairs_and_window():
  depth = plans.Stairs(first=5, last=12, add=2, every=100)
  plan = plans.Truncated(depth=depth, graded=5)
  seen = {step: plan(parts.plan_context(jax.random.key(0), step=step)) for step in (0, 99, 100, 399, 400, 10_000)}
  assert {step: int(p.no_grad_steps) for step, p in seen.items()} == {0: 0, 99: 0, 100: 2, 399: 6, 400: 7, 10_000: 7}
  assert all(p.active.all() for p in seen.values())


def test_a_ramp_of_the_depth_of_every_sequence():
  """Parcae's curriculum: one loop at first, all differentiated; the published depths from its end on."""
  config = config_of('parcae', 'cpu,ramp=100,curve=linear')
  plan = config.objective.rolls['drawn'].plan
  batch = {'tokens': jnp.zeros((500, T))}
  steps = {step: plan(parts.plan_context(jax.random.key(1), batch, step)) for step in (0, 50, 100, 1000)}
  total = {step: np.asarray(drawn.no_grad_steps + drawn.active.sum(0)) for step, drawn in steps.items()}
  graded = {step: int(drawn.active.sum(0).max()) for step, drawn in steps.items()}
  assert graded == {0: 1, 50: 2, 100: 2, 1000: 2}
  for step, mean in {0: 1, 50: 2, 100: 4, 1000: 4}.items():
    expected = mean + math.exp(-mean)  # of Poisson, 1 at least
    assert abs(total[step].mean() - expected) < 4 * math.sqrt(mean / 500)
  np.testing.assert_array_equal(total[100], total[1000])


def test_given_runs_what_each_sequence_asks_for():
  batch = {'tokens': jnp.zeros((3, T)), 'loops': jnp.array([1, 4, 2])}
  plan = plans.Given(most=4)(parts.plan_context(jax.random.key(0), batch))
  np.testing.assert_array_equal(plan.active.sum(0), [1, 4, 2])


def test_staged_follows_the_stage():
  """A trajectory of as many equal steps."""
  plan = plans.Staged(loops=(1, 3))
  for stage, loops in enumerate(plan.stages):
    drawn = plan(parts.plan_context(jax.random.key(0), stage=stage))
    np.testing.assert_array_equal(drawn.active, np.arange(3) < loops)
    np.testing.assert_allclose(drawn.t[:loops], np.arange(loops) / loops, rtol=1e-6)
    np.testing.assert_allclose(drawn.dt[:loops], 1 / loops, rtol=1e-6)
  assert plan.longest == plan.expected == 3


@pytest.mark.parametrize('plan, longest, expected, differentiated', [
    (plans.Uniform(5), 5, 5, None), (plans.Given(most=6), 6, 6, None),
    (plans.Truncated(depth=plans.Constant(loops=7), graded=3), 3, 7, 3),
    (plans.Truncated(depth=plans.Stairs(first=2, last=9), graded=4), 4, 9, 4),
    (plans.Truncated(depth=plans.Poisson(average=0.5), graded=2), 2, 0.5 + math.exp(-0.5), 0.5 + math.exp(-0.5)),
    (plans.Truncated(depth=plans.Ramp(of=plans.LogNormalPoisson(average=8), steps=9, curve=plans.linear), graded=2), 2,
     9, 2)], ids=lambda value: type(value).__name__ if isinstance(value, plans.Truncated) else str(value))
def test_numbers_of_steps_for_counting_arithmetic(plan, longest, expected, differentiated):
  assert plan.longest == longest and plan.expected == pytest.approx(expected)
  if differentiated is not None:
    assert plan.differentiated == pytest.approx(differentiated)


@pytest.mark.parametrize('make, message', [
    (lambda: plans.Truncated(depth=plans.Poisson(average=4), graded=0), r'Truncated\.graded = 0'),
    (lambda: plans.Truncated(depth=plans.Poisson(average=4), graded=6), r'Truncated\.graded = 6 is more'),
    (lambda: plans.Poisson(average=0), r'depth\.average = 0'),
    (lambda: plans.LogNormalPoisson(average=-1), r'depth\.average = -1'),
    (lambda: plans.Stairs(first=5, last=3), r'depth\.last = 3'),
    (lambda: plans.Staged(loops=(0, 2)), r'Staged\.loops'),
    (lambda: plans.Constant(loops=0), r'depth\.loops = 0'),
    (lambda: Noise(std=-1), r'start\.std = -1'),
    (lambda: repeated((1, 0)), r'repeats = \(1, 0\)'),
    (lambda: repeated(()), r'repeats = \(\)'),
    (lambda: repeated((1, 1.5)), r'repeats = \(1, 1\.5\)'),
])
def test_bad_input_is_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


# A depth for every sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', RECURRENT)
def test_a_sequence_does_not_notice_how_deep_the_others_go(name):
  model = ROWS[name].model
  free, graded = jnp.array([0, 3, 1, 5]), jnp.array([1, 2, 2, 2])
  plan = Plan(t=jnp.zeros(2), dt=jnp.ones(2), active=jnp.arange(2)[:, None] < graded, no_grad_steps=free)
  together = forward(model, params(model), tokens(4), plan)
  for row in range(4):
    alone = forward(model, params(model), tokens(4)[row:row + 1],
                    plans.Uniform(int(free[row] + graded[row]))(None))
    close(together.z[row], alone.z[0], 2e-5)


class Numbered(Cell):
  """A step that looks up by the number of the loop: x = core(x) + row k of a table."""
  core: Stack

  @nn.compact
  def __call__(self, x, e, ctx, kv):
    table = self.param('table', nn.initializers.zeros, (9, x.shape[-1]))
    x, kv = self.core(x, ctx, None, kv)
    return x + table[ctx.step.k].reshape(-1, 1, x.shape[-1]), kv, {}


def test_a_lookup_by_the_number_of_the_loop_is_that_of_each_sequence():
  """Whatever number of free steps the deepest sequence takes."""
  model = parts.looped(Numbered(parts.stack(1)))
  free, graded = jnp.array([0, 3, 1, 5]), jnp.array([1, 2, 2, 2])
  plan = Plan(t=jnp.zeros(2), dt=jnp.ones(2), active=jnp.arange(2)[:, None] < graded, no_grad_steps=free)
  together = forward(model, params(model), tokens(4), plan)
  active = jnp.arange(7)[:, None] < free + graded  # the same without free steps: row k is step k
  close(together.z, forward(model, params(model), tokens(4), Plan(t=jnp.zeros(7), dt=jnp.ones(7), active=active)).z,
        2e-5)
  same = forward(model, params(model), tokens(4), plan.replace(no_grad_steps=jnp.int32(3), active=None))
  close(same.z, forward(model, params(model), tokens(4), Plan(t=jnp.zeros(5), dt=jnp.ones(5))).z, 2e-5)
  with pytest.raises(ConfigError,
                     match='plan.no_grad_steps: of each sequence or step, but a cache has one slot a step for all'):
    jax.eval_shape(lambda: model.apply({'params': params(model)}, tokens(4), plan, kv=model.cache(4, T, 9)).z)


@pytest.mark.parametrize('name', ['parcae', 'huginn'])
def test_standing_still_first_or_last_is_the_same(name):
  """The loop does not know the step, so which steps a sequence sits out changes neither value nor gradient."""
  model = ROWS[name].model
  active = jnp.arange(4)[:, None] < jnp.array([1, 4, 2])

  def loss(weights, active):
    trace = model.apply({'params': weights}, tokens(3), Plan(t=jnp.zeros(4), dt=jnp.ones(4), active=active))
    return jnp.sum(jnp.sin(trace.z))

  gradient = jax.jit(jax.value_and_grad(loss))
  close(gradient(params(model), active), gradient(params(model), active[::-1]), 2e-5)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, weights, plan):
  return jax.grad(lambda w: jnp.sum(jnp.sin(model.apply({'params': w}, tokens(3), plan).z)))(weights)


@pytest.mark.parametrize('free', [0, 6])
@pytest.mark.parametrize('name', ['parcae', 'huginn'])
def test_everything_learns_however_many_steps_are_free(name, free):
  model = ROWS[name].model
  plan = Plan(t=jnp.zeros(2), dt=jnp.ones(2), active=jnp.ones(2, bool), no_grad_steps=jnp.int32(free))
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients(model, params(model), plan)):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_training_runs_one_program_for_all_depths_and_accumulates_exactly():
  """The whole objective, with a depth and a noise for every sequence: halves of a batch add up to it."""
  model = ROWS['parcae'].model
  objective = Objective(
      rolls={'drawn': Rollout(plans.Truncated(depth=plans.Poisson(average=4), graded=2, over=plans.PerSequence()))},
      terms={'lm': Weighted(1.0, CE(roll='drawn'))})

  @jax.jit
  def share(weights, context, total):
    return jax.value_and_grad(lambda w: objective(model, w, context, total)[0])(weights)

  batch = {**parts.batch(8), 'row': jnp.arange(8)}
  total = objective.denominators(batch)
  for seed in range(3):
    key = jax.random.key(seed)
    whole = share(params(model), parts.plan_context(key, batch), total)
    halves = [share(params(model), parts.plan_context(key, {n: leaf[i:i + 4] for n, leaf in batch.items()}), total)
              for i in (0, 4)]
    close(jax.tree.map(jnp.add, *halves), whole, 2e-5)
  assert share._cache_size() == 2  # one for the whole, one for the halves


# Orders (intra-layer recurrence, section 10) -------------------------------------------------------------------------


def ordered(order, depth: int = 3):
  return parts.looped(parts.Plain(parts.stack(depth, order=order)), loops=1)


@pytest.mark.parametrize('times', [(1, 1, 1), (4, 2, 1), (1, 1, 2)])
def test_an_order_equals_copied_layers_and_their_gradients_add_up(times):
  order = repeated(times)
  tied, deep = ordered(order), parts.looped(parts.plain(len(order)), loops=1)
  weights = params(tied)
  index = jnp.asarray(order)
  copies = {**weights, 'cell': jax.tree.map(lambda leaf: leaf[index], weights['cell'])}

  def loss(model, weights):
    return jnp.sum(jnp.sin(model.apply({'params': weights}, tokens(3), plans.Uniform(1)(None)).z))

  ours, grads = jax.jit(jax.value_and_grad(functools.partial(loss, tied)))(weights)
  theirs, copied = jax.jit(jax.value_and_grad(functools.partial(loss, deep)))(copies)
  close(ours, theirs, 1e-6)
  summed = jax.tree.map(lambda leaf: jnp.zeros((3, *leaf.shape[1:])).at[index].add(leaf), copied['cell'])
  close(grads['cell'], summed, 1e-5)


def test_an_order_adds_no_parameters_and_one_slot_an_application():
  plain, tied = ordered(None), ordered(repeated((4, 2, 1)))
  assert jax.tree.map(lambda leaf: leaf.shape, parts.shapes(plain)) == jax.tree.map(
      lambda leaf: leaf.shape, parts.shapes(tied))
  assert tied.cache(2, 8)['loop'].k.shape[1] == 7
  assert tied.flops(T, 1) > plain.flops(T, 1)


def test_the_order_of_one_layer_is_the_loop_of_it():
  once = parts.looped(parts.Plain(Stack(parts.block(RMSNorm()), 1)), loops=3)
  twice = parts.looped(parts.Plain(Stack(parts.block(RMSNorm()), 1, order=(0, 0))), loops=1)
  close(run(twice, params(once), tokens(), 1).z, run(once, params(once), tokens(), 2).z, 1e-6)
  layers = ordered(repeated((2, 2, 2)))
  other = run(ordered(None), params(layers), tokens(), 2)
  assert np.abs(run(layers, params(layers), tokens(), 1).z - other.z).max() > 1e-3


# Windows -------------------------------------------------------------------------------------------------------------


def test_a_window_is_the_unrolled_net_cut_before_it():
  """Looped in-context learning: K loops, of which the last w are differentiated, averaged over those w."""
  from loopformer.model import make_readout
  from loopformer.terms.squared import Window
  model = parts.looped(parts.recur(Add(), norm=RMSNorm()), start=Zeros(), read_out=parts.Head(outputs=1))
  weights = params(model)
  batch = {**parts.batch(3), 'targets': jax.random.normal(jax.random.key(1), (3, T))}
  total, window = 5, 2

  def ours(weights):
    plan = plans.Truncated(depth=plans.Constant(loops=total), graded=window)(parts.plan_context(jax.random.key(0)))
    trace = model.apply({'params': weights}, batch['tokens'], plan, keep=Every())
    return Window(roll='x')({'x': trace}, batch, make_readout(model, weights, batch), weights)

  last = model.apply({'params': weights}, batch['tokens'], plans.schedule((1.0,)))
  with pytest.raises(ConfigError, match="the rollout 'x' keeps the last state alone, .* give it keep=loop.Every()"):
    Window(roll='x')({'x': last}, batch, make_readout(model, weights, batch), weights)

  def by_hand(weights):
    ctx = parts.context(batch['tokens']).replace(tokens=batch['tokens'])
    e = model.apply({'params': weights}, batch['tokens'], ctx.pos, method=lambda m, t, p: m.read_in(t, p))
    x, errors = jnp.zeros_like(e), []
    for step in range(total):
      x = model.apply({'params': weights}, x, e, ctx, None, method='step')[0]
      if step == total - window - 1:
        x = jax.lax.stop_gradient(x)
      if step >= total - window:
        z = model.apply({'params': weights}, x, batch['tokens'], method='read')
        errors.append(jnp.square(z @ weights['read_out']['kernel'][0] - batch['targets']))
    return jnp.sum(sum(errors) / window * batch['weights'])

  close(jax.jit(jax.value_and_grad(ours))(weights), jax.jit(jax.value_and_grad(by_hand))(weights), 2e-5)


def test_bridge_and_heads():
  model = parts.looped(parts.plain(), bridge=Linear(D), read_out=parts.Head(outputs=V + 3))
  trace = run(model, params(model), tokens(), 2)
  assert parts.logits(model, params(model), trace.z).shape == (T + 1, T, V + 3)
  assert model.outputs == V + 3


# What would not learn is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize('file, changes, message', [
    ('parcae', {'cell': parts.plain()}, r'model\.start = .*Noise: the loop would never see its input'),
    ('looped_icl', {'cell': parts.recur(NoInjection()), 'start': Embedded()},
     r'rolls\.window\.plan: steps without gradient'),
])
def test_a_loop_that_cannot_learn_is_refused(file, changes, message):
  config = configs.load(f'experiments/configs/{file}.py:cpu')
  config = dataclasses.replace(config, model=config.model.clone(**changes))
  with pytest.raises(ConfigError, match=message):
    configs.check(config)


@pytest.mark.parametrize('assignment, message', [
    ('control.loops=(1, 2, 3)', r'control\.loops = \(1, 2, 3\), but objective\.rolls\.staged\.plan has the stages'),
    ('evals.budgets=(3,)', r'the stage of 1 is judged by its validation loss, but evals has 3 alone'),
])
def test_a_stage_that_would_never_end_is_refused(assignment, message):
  config = configs.override(configs.load('experiments/configs/shift.py:p_hop'), assignment)
  with pytest.raises(ConfigError, match=message):
    configs.check(config)


def test_a_controller_makes_evaluation_part_of_what_is_computed():
  shift, plain = (configs.load(f'experiments/configs/{name}') for name in ('shift.py:p_hop', 'parcae.py:cpu'))
  changed = [configs.override(config, 'train.eval_every=10') for config in (shift, plain)]
  assert [path for path, *_ in configs.difference(shift, changed[0])] == ['train.eval_every']
  assert not list(configs.difference(plain, changed[1]))


def test_more_steps_than_the_cache_has_slots_are_refused():
  model = ROWS['huginn'].model
  kv = model.cache(2, 8, loops=2)
  with pytest.raises(ConfigError, match='3 steps, but the cache has slots for 2'):
    jax.eval_shape(lambda: model.apply({'params': params(model)}, tokens(2), plans.Uniform(3)(None), kv=kv))


def test_alibi_is_exact_in_bfloat16():
  pos = jnp.arange(1024)[None]
  ones = jnp.ones((1, 1024, 2, 4))
  scores = {}
  for dtype in ('float32', 'bfloat16'):
    q, k, _ = Alibi().augment_qk(ones[:, :1].astype(dtype), ones[:, :, :1].astype(dtype), ones[:, :, :1].astype(dtype),
                                 pos)
    scores[dtype] = np.asarray(k[0, :, 0, -2:].astype(jnp.float32).sum(-1))
  np.testing.assert_array_equal(scores['bfloat16'], np.arange(1024))
  np.testing.assert_array_equal(scores['float32'], np.arange(1024))
  q, k, _ = Alibi().augment_qk(jnp.zeros((1, 1, 4, 6)), jnp.zeros((1, 8, 4, 6)), jnp.zeros((1, 8, 4, 6)), pos[:, :8])
  score_HS = jnp.einsum('Hd,SHd->HS', q[0, 0], k[0]) / 8 ** 0.5
  np.testing.assert_allclose(score_HS[:, 1] - score_HS[:, 0], [1 / 4, 1 / 16, 1 / 64, 1 / 256], rtol=1e-5)


# Layers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make', [
    lambda: parts.block(position=Rotary(), heads=4), lambda: parts.sandwich().clone(
        attn=SelfAttention(heads=4, position=Rotary())),
    lambda: Chain((parts.block(heads=4), parts.block(position=Rotary(), heads=4)))], ids=['block', 'sandwich', 'chain'])
def test_rotary_positions_refuse_heads_of_odd_width(make):
  """A head of three channels has no pairs to turn: refused when a configuration is checked, and when it is built."""
  block = make()
  with pytest.raises(ConfigError, match=r'model\.loop: heads = 4: at width 12 a head has 3 channels, an odd number'):
    block.check(12, 'model.loop: ')
  block.check(16, '')
  parts.block(position=Alibi(), heads=4).check(12, '')  # which turns nothing
  with pytest.raises(ConfigError, match='heads = 4: at width 12'):
    parts.shapes(parts.looped(parts.plain(position=Rotary(), heads=4),
                              read_in=parts.nowhere().clone(width=12)))


def test_blocks_say_whether_they_take_gates_and_scales():
  assert parts.block().modulated
  assert not parts.sandwich().modulated and not parts.valued().modulated


@pytest.mark.parametrize('heads, groups', [(4, 4), (4, 2), (6, 1)])
def test_a_fused_projection_in_three(heads, groups):
  """Group by group: its queries, its key, its value."""
  each, d = heads // groups, 3
  x = jnp.arange((heads + 2 * groups) * d)
  q, k, v = unfused(x[None], heads, groups)
  assert q.shape == (1, groups, each, d) and k.shape == v.shape == (1, groups, 1, d)
  for g in range(groups):
    first = g * (each + 2) * d
    np.testing.assert_array_equal(q[0, g].ravel(), first + np.arange(each * d))
    np.testing.assert_array_equal(k[0, g, 0], first + each * d + np.arange(d))
    np.testing.assert_array_equal(v[0, g, 0], first + (each + 1) * d + np.arange(d))
