import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loopformer import config as configs, optim, sharding
from loopformer.model import parameter_roles
from loopformer.nn.layers import ByProjection, Orthogonal, unfused_kernel
from loopformer.optim import (
  WSD,
  AdamW,
  AtanAdam,
  CountState,
  Muon,
  Reset,
  Switched,
  WarmupCosine,
  routes,
  scale_by_atan,
)
from loopformer.roles import Role, Roles
from loopformer.training.checkpoint import Checkpoints
from loopformer.types import ConfigError
from tests import parts
from tests.parts import ROWS, all_rows, params

LAYERED = ('core', 'prelude', 'coda', 'modulation')  # stacked layers: one axis more than in the official layout


def official_axes(path, leaf) -> int:
  """Axes of a parameter in the official code's layout, where every layer's are apart and Linear weights are [O, I]."""
  names = [entry.key for entry in path]
  axes = leaf.ndim - any(name in LAYERED for name in names)
  axes -= 'modulation' in names  # its four parts are one axis there
  return axes - names[-1].endswith('_bias')  # heads are one axis there


@pytest.mark.parametrize('name', all_rows)
def test_decay_acts_on_matrices_and_embeddings_alone(name):
  shapes = parts.shapes(ROWS[name].model)
  mask = jax.tree_util.tree_leaves_with_path(parameter_roles(ROWS[name].model).decayed(shapes))
  expected = {path: official_axes(path, leaf) >= 2 for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  assert {path: masked for path, masked in mask} == expected
  assert set(expected.values()) == {True, False}
  kept = {path[-1].key for path, decayed in mask if not decayed}
  assert kept <= {'scale', 'bias', 'q_bias', 'k_bias', 'v_bias', 'log_a', 'dt', 'rates'}


def test_a_step_without_gradient_shrinks_matrices_alone():
  weights = params(ROWS['base_loop'].model)
  part = AdamW(schedule=WarmupCosine(peak=0.1, end=0.01, warmup=1), decay=0.2)
  roles = parameter_roles(ROWS['base_loop'].model)
  optimizer = part.make(10, roles)

  @jax.jit
  def step(weights):
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)

  new = step(weights)
  rate = part.schedule.make(10)(0)

  def check(old, new, decayed):
    np.testing.assert_allclose(new, old * (1 - rate * 0.2) if decayed else old, rtol=1e-6)

  jax.tree.map(check, weights, new, roles.decayed(weights))
  assert rate > 0.01


@pytest.mark.parametrize('part', [WarmupCosine(), WarmupCosine(peak=1e-2, end=1e-3, warmup=10),
                                  WarmupCosine(peak=1.0, end=0.0, warmup=1)], ids=['paper', 'short', 'one'])
def test_schedule(part):
  steps = 50_000
  rate = part.make(steps)
  np.testing.assert_allclose(rate(0), part.peak / (part.warmup + 1), rtol=1e-3)
  np.testing.assert_allclose(rate(part.warmup), part.peak, rtol=1e-5)
  np.testing.assert_allclose(rate((part.warmup + steps) // 2), (part.peak + part.end) / 2, rtol=1e-3)
  np.testing.assert_allclose(rate(steps), part.end, rtol=1e-5, atol=1e-9)
  np.testing.assert_allclose(rate(steps + 100), part.end, rtol=1e-5, atol=1e-9)
  values = jax.vmap(rate)(jnp.arange(part.warmup + 1))
  assert (np.diff(values) > 0).all() and values.max() <= part.peak * 1.0001


@pytest.mark.parametrize('warmup, steps', [(10, 10), (2000, 100)])
def test_a_warmup_as_long_as_the_run_is_refused(warmup, steps):
  with pytest.raises(ConfigError, match=rf'optim\.schedule\.warmup = {warmup} is not below train\.steps = {steps}'):
    AdamW(schedule=WarmupCosine(warmup=warmup)).make(steps, Roles())


def test_gradients_are_clipped_by_their_global_norm():
  """Adam forgets a constant factor; what is left of it shows in the first moment."""
  weights = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
  optimizer = AdamW(schedule=WarmupCosine(warmup=1), clip=1.0).make(10, Roles())
  for scale, expected in ((0.1, 0.1), (100.0, 1.0)):
    grads = optax.tree.scale(scale / 4, weights)  # sixteen entries: norm = scale
    _, state = optimizer.update(grads, optimizer.init(weights), weights)
    first = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
    np.testing.assert_allclose(optax.tree.norm(first), 0.1 * expected, rtol=1e-5)


def test_published_values_are_the_defaults():
  part = AdamW()
  assert (part.b1, part.b2, part.decay, part.clip) == (0.9, 0.95, 0.2, 1.0)
  assert part.schedule == WarmupCosine(peak=6e-4, end=6e-5, warmup=2000)


# WSD -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('part, steps, marks', [
    (WSD(peak=8e-3, cooldown=0.5), 1000, {0: 8e-3, 500: 8e-3, 750: 4e-3, 999: 1.6e-5, 1000: 0, 1100: 0}),
    (WSD(peak=4e-5, warmup=4096), 47_000, {0: 4e-5 / 4097, 2048: 4e-5 * 2049 / 4097, 4096: 4e-5, 47_000: 4e-5}),
    (WSD(peak=1e-3, warmup=0.1, cooldown=0.9, end=1e-4), 100, {0: 1e-3 / 11, 10: 1e-3, 55: 5.5e-4, 100: 1e-4}),
    (WSD(peak=0.2, cooldown=1.0), 50, {0: 0.2, 25: 0.1, 49: 0.004, 50: 0}),
    (WSD(peak=1.0, cooldown=1), 50, {0: 1, 49: 1, 50: 0}),
    (WSD(peak=1.0), 50, {0: 1, 50: 1, 60: 1}),
], ids=['parcae', 'huginn', 'retrofit', 'decay', 'one_step', 'flat'])
def test_trapezoid(part, steps, marks):
  rate = part.make(steps)
  for step, expected in marks.items():
    np.testing.assert_allclose(rate(step), expected, rtol=1e-4, atol=1e-9, err_msg=f'at step {step}')


@pytest.mark.parametrize('options, steps, match', [
    ({'warmup': 4096}, 100, r'schedule\.warmup = 4096 does not fit train\.steps = 100'),
    ({'warmup': 60, 'cooldown': 0.5}, 100, r'are 60 and 50 steps, more than train\.steps = 100'),
    ({'cooldown': 1.5}, 100, r'schedule\.cooldown = 1\.5 does not fit'),
    ({'warmup': -1}, 100, r'schedule\.warmup = -1 does not fit'),
])
def test_a_trapezoid_that_does_not_fit_the_run_is_refused(options, steps, match):
  with pytest.raises(ConfigError, match=match):
    WSD(peak=1.0, **options).make(steps)


# Adam by the arc tangent ---------------------------------------------------------------------------------------------


def reference_atan(weights, grads, rates, peak, b1=0.9, b2=0.95, decay=4e-5, clip=1.0):
  """The table of the sheet in NumPy: weights {name: (array, layered, decayed)}, after every step's gradients."""
  p = {name: np.array(array, np.float64) for name, (array, *_) in weights.items()}
  m, v = {}, {}
  for t, (rate, step) in enumerate(zip(rates, grads), 1):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in step.values()))
    for name, g in step.items():
      g = np.asarray(g, np.float64) * min(1, clip / norm)
      m[name] = g if t == 1 else b1 * m[name] + (1 - b1) * g
      v[name] = np.maximum(g * g if t == 1 else b2 * v[name] + (1 - b2) * g * g, 1e-12)
      _, layered, decayed = weights[name]
      for tensor in (range(len(g)) if layered else [...]):
        mean = np.mean(g[tensor] ** 2 / v[name][tensor])
        size = rate / (1 - b1 ** t) / max(1, np.sqrt(mean))
        if decayed:
          p[name][tensor] *= 1 - rate / peak * decay
        p[name][tensor] -= size * np.arctan2(m[name][tensor], np.sqrt(v[name][tensor]) / np.sqrt(1 - b2 ** t))
  return p


def test_atan_adam_is_the_table():
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  tree = {'core': {'block': {'kernel': draw(3, 4, 5), 'scale': draw(3, 4)}}, 'read_in': {'embedding': draw(6, 4)}}
  layout = {'kernel': (True, True), 'scale': (True, False), 'embedding': (False, True)}

  def flat(tree):
    return {path[-1].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  # Layer 0 sees a gradient that bursts, whose updates are clipped; layer 1 none at first: its second moment is zero.
  grads = [jax.tree.map(lambda leaf: draw(*leaf.shape), tree) for _ in range(5)]
  grads[:3] = [optax.tree.scale(0.01, step) for step in grads[:3]]
  for t in range(2):
    grads[t]['core']['block']['kernel'] = grads[t]['core']['block']['kernel'].at[1].set(0)
  part = AtanAdam(schedule=WSD(peak=0.1, warmup=3), decay=0.3)
  optimizer, weights = part.make(10, parts.roles_of(tree)), tree
  state = optimizer.init(weights)
  update = jax.jit(optimizer.update)
  for step in grads:
    updates, state = update(step, state, weights)
    weights = optax.apply_updates(weights, updates)
  rates = [float(part.schedule.make(10)(t)) for t in range(5)]
  expected = reference_atan({name: (leaf, *layout[name]) for name, leaf in flat(tree).items()},
                            [flat(step) for step in grads], rates, 0.1, decay=0.3)
  for name, leaf in flat(weights).items():
    np.testing.assert_allclose(leaf, expected[name], rtol=2e-5, atol=2e-6, err_msg=name)


def test_the_first_atan_update_is_2_2_rates_long_unless_the_gradient_is_next_to_nothing():
  """The second moment is floored in place, as in the paper's code: lengths there for normal gradients of these sizes.
  """
  optimizer = AtanAdam(schedule=WSD(peak=0.1), clip=1e9).make(10, Roles())
  normal = jax.random.normal(jax.random.key(0), (4096,))
  for size, expected in ((1e4, 2.20), (1.0, 2.20), (1e-4, 2.19), (1e-6, 1.60), (1e-7, 0.22), (1e-8, 0.022)):
    weights = {'scale': jnp.zeros(4096)}
    updates, _ = optimizer.update({'scale': size * normal}, optimizer.init(weights), weights)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(updates['scale'] ** 2)) / 0.1, expected, rtol=0.03)
  weights = {'scale': jnp.zeros(4)}
  zero, _ = optimizer.update({'scale': jnp.zeros(4)}, optimizer.init(weights), weights)
  assert not zero['scale'].any()


# Muon ----------------------------------------------------------------------------------------------------------------


def paths(tree):
  return {'/'.join(entry.key for entry in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize('name', all_rows)
def test_muon_takes_the_matrices_of_attention_and_mlp(name):
  shapes = parts.shapes(ROWS[name].model)
  taken = {path for path, route in paths(routes(shapes, parameter_roles(ROWS[name].model))).items() if route == 'muon'}
  endings = ('attn/qkv/kernel', 'attn/out/kernel', 'mlp/up/kernel', 'mlp/down/kernel')
  assert taken == {path for path in paths(shapes) if path.endswith(endings)}
  stacks = [path for path in paths(shapes) if path.endswith('attn/qkv/kernel')]
  assert len(taken) == 4 * len(stacks) and any('cell/core' in path for path in taken)


def test_other_routes_are_other_values():
  huginn, parcae = (paths(parts.shapes(ROWS[name].model)) for name in ('huginn', 'parcae'))

  def added(name, *matrices):
    shapes = parts.shapes(ROWS[name].model)
    roles = parameter_roles(ROWS[name].model)
    before, after = paths(routes(shapes, roles)), paths(routes(shapes, roles, ('attn', 'mlp', *matrices)))
    return {path for path in after if after[path] != before[path]}

  assert added('huginn', 'adapter') == {'cell/inject/adapter/kernel'} <= set(huginn)
  assert added('parcae', 'B', 'bridge') == {'cell/inject/B', 'bridge/kernel'} <= set(parcae)
  with pytest.raises(ConfigError, match="optim.matrices names 'adaptor', which no parameter.*adapter"):
    Muon(matrices=('attn', 'adaptor')).make(10, Roles()).init(params(ROWS['huginn'].model))


def random_like(tree):
  """Gradients; those of matrices have singular values from 1 to 0.05."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    g = rng.standard_normal(leaf.shape)
    if leaf.ndim > 1:
      u, values, v = np.linalg.svd(g, full_matrices=False)
      g = u * np.geomspace(1, 0.05, values.shape[-1]) @ v
    return jnp.asarray(g, jnp.float32)

  return jax.tree.map(draw, tree)


def first_updates(part, weights, grads, steps=10):
  optimizer = part.make(steps, parts.roles_of(weights))
  return jax.jit(lambda w: optimizer.update(grads, optimizer.init(w), w)[0])(weights)


def singular(matrices):
  """Smallest and largest singular value of each, and the largest of all."""
  values = np.linalg.svd(np.asarray(matrices), compute_uv=False)
  return values.min(-1), values.max(-1)


FLAT = WSD(peak=1.0)
BARE = Muon(schedule=FLAT, second=None, decay=WSD(peak=0.0),
            others=AdamW(schedule=FLAT, b1=0.8, eps=1e-10, decay=0.0))


def test_every_slice_of_a_stack_is_orthogonalised_and_the_rest_is_adams():
  weights = params(ROWS['loopformer'].model)
  grads = random_like(weights)
  kernel = grads['cell']['core']['block']['mlp']['up']['kernel']
  grads['cell']['core']['block']['mlp']['up']['kernel'] = kernel.at[0].multiply(100)  # layers of unequal gradients
  updates = paths(first_updates(BARE, weights, grads))
  grads, labels = paths(grads), paths(routes(weights, parts.roles_of(weights)))
  assert {'cell/modulation/kernel', 'read_in/embedding', 'read_in/positions'} <= set(updates)
  for path, update in updates.items():
    if labels[path] == 'muon':
      rows, columns = update.shape[-2:]
      factor = max(1.0, columns / rows) ** 0.5
      assert update.ndim == 3 and len(update) == 2
      low, high = singular(update / factor)
      assert (low > 0.75).all() and (high < 1.25).all(), path
      u, _, v = np.linalg.svd(np.asarray(grads[path], np.float64), full_matrices=False)
      np.testing.assert_allclose(update / factor, -u @ v, atol=0.15, err_msg=path)
    else:  # Adam's first step is the sign, where the clipped gradient is far above eps
      np.testing.assert_allclose(update, -np.sign(grads[path]), atol=0.05, err_msg=path)


def test_the_default_routing_of_optax_would_leave_stacks_to_adam():
  weights = params(ROWS['loopformer'].model)
  grads = random_like(weights)
  optimizer = optax.contrib.muon(1.0)
  updates = jax.jit(lambda w: optimizer.update(grads, optimizer.init(w), w)[0])(weights)
  stacked = updates['cell']['core']['block']['attn']['qkv']['kernel']
  low, high = singular(stacked)
  assert (high > 3 * low).all()
  np.testing.assert_allclose(np.abs(stacked), np.abs(stacked).mean(), rtol=0.3)  # Adam's: entries of one size
  low, high = singular(updates['read_in']['embedding'])
  assert high < 2 * low  # while an embedding, which has two axes, goes to Muon


def test_axes_before_the_last_two_number_matrices():
  grads = {'attn': {'kernel': random_like(jnp.zeros((2, 3, 6, 4)))}, 'mlp': {'scale': jnp.ones(4)}}
  apart = {'attn': {'kernel': grads['attn']['kernel'].reshape(6, 6, 4)}, 'mlp': {'scale': jnp.ones(4)}}
  for part in (BARE, Muon()):
    nested = first_updates(part, grads, grads)['attn']['kernel']
    np.testing.assert_allclose(nested.reshape(6, 6, 4), first_updates(part, apart, apart)['attn']['kernel'], rtol=1e-5)


@pytest.mark.parametrize('name', ['loopformer', 'grouped'])
def test_queries_keys_and_values_are_matrices_of_their_own(name):
  model = ROWS[name].model
  attn = model.cell.core.block.attn
  heads, groups = attn.heads, attn.groups or attn.heads
  weights = params(model)
  width, head = 16, 16 // heads

  def pieces(kernel):
    cut = np.asarray(kernel).reshape(2, width, groups, heads // groups + 2, head)
    return [piece.reshape(2, width, -1) for piece in (cut[..., :-2, :], cut[..., -2, :], cut[..., -1, :])]

  grads = random_like(weights)
  part = dataclasses.replace(BARE, heads=heads, groups=attn.groups)
  update = first_updates(part, weights, grads)['cell']['core']['block']['attn']['qkv']['kernel']
  together = first_updates(BARE, weights, grads)['cell']['core']['block']['attn']['qkv']['kernel']
  assert update.shape == together.shape and np.abs(update - together).max() > 0.1
  for piece, gradient in zip(pieces(update), pieces(grads['cell']['core']['block']['attn']['qkv']['kernel'])):
    u, values, v = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
    along = np.einsum('nik,nij,nkj->nk', u, piece, v)
    np.testing.assert_allclose(along[values > 0.05 * values[:, :1]], -1, atol=0.25)  # smaller ones take longer
  with pytest.raises(ConfigError, match=r'optim\.heads = 5, optim\.groups = 5 do not fit'):
    first_updates(dataclasses.replace(BARE, heads=5), weights, grads)
  with pytest.raises(ConfigError, match=r'optim\.groups = 2, but optim\.heads is None'):
    Muon(groups=2).make(10, Roles())


def test_polar_express_is_scaled_by_its_margin():
  """Against the iteration of the sheet, by hand, with its input over 1.02 of the norm."""
  g = np.random.default_rng(1).standard_normal((5, 8))
  x = g / (1.02 * np.linalg.norm(g))
  for a, b, c in optim.POLAR:
    square = x @ x.T
    x = a * x + (b * square + c * square @ square) @ x
  grads = {'attn': {'kernel': jnp.asarray(g, jnp.float32)}, 'mlp': {'scale': jnp.ones(3)}}
  update = first_updates(BARE, grads, grads)['attn']['kernel']
  np.testing.assert_allclose(update, -x * np.sqrt(8 / 5), rtol=1e-3, atol=1e-4)


def test_cautious_decay_never_works_against_the_update():
  weights = {'kernel': jnp.array([[1.0, -2.0], [3.0, -4.0]])}
  updates = {'kernel': jnp.array([[0.5, 0.5], [-0.5, -0.5]])}
  decay = optim.cautious_decay(WSD(peak=0.2, cooldown=1.0).make(4))
  state = decay.init(weights)
  for rate in (0.2, 0.15, 0.1, 0.05, 0.0):
    new, state = decay.update(updates, state, weights)
    np.testing.assert_allclose(new['kernel'], [[0.5 + rate, 0.5], [-0.5, -0.5 - 4 * rate]], rtol=1e-6)


def test_muon_decays_its_matrices_alone():
  """A step without gradient: the update is zero, so it agrees with every sign."""
  weights = params(ROWS['huginn'].model)
  part = Muon(schedule=WSD(peak=0.1), decay=WSD(peak=0.5))
  updates, labels = (paths(tree) for tree in (first_updates(part, weights, jax.tree.map(jnp.zeros_like, weights)),
                                              routes(weights, parts.roles_of(weights))))
  for path, old in paths(weights).items():
    expected = -0.1 * 0.5 * old * max(1.0, old.shape[-1] / old.shape[-2]) ** 0.5 if labels[path] == 'muon' else 0 * old
    np.testing.assert_allclose(updates[path], expected, rtol=1e-5, atol=1e-9, err_msg=path)


@pytest.mark.parametrize('shape, axis', [((2, 6, 4), -1), ((2, 4, 6), -2), ((2, 5, 5), -2)])
def test_sides_are_brought_to_one_size(shape, axis):
  """axis: the shorter side. Second moments are kept by the longer; in a square matrix by columns, the outputs."""
  rng = np.random.default_rng(0)
  part = optim.normalize_sides(0.9)
  v, state = 0.0, part.init({'kernel': jnp.zeros(shape)})
  for _ in range(3):
    u = rng.standard_normal(shape) * rng.uniform(0.1, 3, (shape[0], 1, shape[2]) if axis == -2 else (*shape[:2], 1))
    v = 0.9 * v + 0.1 * np.mean(u ** 2, axis, keepdims=True)
    scaled = u / np.sqrt(v)
    scaled *= np.sqrt((u ** 2).sum((1, 2), keepdims=True) / (scaled ** 2).sum((1, 2), keepdims=True))
    new, state = part.update({'kernel': jnp.asarray(u, jnp.float32)}, state)
    np.testing.assert_allclose(new['kernel'], scaled, rtol=1e-4, atol=1e-5)
  assert state.second['kernel'].shape == v.shape and v.size == 2 * max(shape[1:])
  zero, _ = part.update({'kernel': jnp.zeros(shape)}, part.init({'kernel': jnp.zeros(shape)}))
  assert not zero['kernel'].any()


def test_muon_and_the_rest_are_clipped_together():
  weights = params(ROWS['loopformer'].model)
  grads = random_like(weights)
  optimizer = Muon().make(10, parameter_roles(ROWS['loopformer'].model))
  state = jax.jit(lambda w: optimizer.update(grads, optimizer.init(w), w)[1])(weights)
  moments = [leaf / (0.05 if "'muon'" in jax.tree_util.keystr(path) else 0.2)  # 1 - momentum, 1 - b1
             for path, leaf in jax.tree_util.tree_leaves_with_path(state) if '.mu[' in jax.tree_util.keystr(path)]
  total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in moments))
  np.testing.assert_allclose(total, 1.0, rtol=1e-4)


def test_muon_s_published_values_are_the_defaults():
  part = Muon()
  assert part.schedule == part.others.schedule == WSD(peak=8e-3, warmup=0, cooldown=0.5, end=0.0)
  assert (part.momentum, part.second, part.clip, part.matrices) == (0.95, 0.95, 1.0, ('attn', 'mlp'))
  assert part.decay == WSD(peak=0.2, cooldown=1.0)
  assert (part.others.b1, part.others.b2, part.others.eps, part.others.decay) == (0.8, 0.95, 1e-10, 0.0)
  assert AtanAdam() == AtanAdam(schedule=WSD(peak=4e-5, warmup=4096), b1=0.9, b2=0.95, decay=4e-5, clip=1.0)


# States --------------------------------------------------------------------------------------------------------------


OPTIMIZERS = {'adamw': AdamW(schedule=WarmupCosine(warmup=1)), 'atan': AtanAdam(schedule=WSD(peak=1e-3)),
              'muon': Muon(), 'muon_apart': Muon(heads=2), 'muon_atan': Muon(second=None, others=AtanAdam(
                  schedule=WSD(peak=1e-3)))}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_state_is_float32_arrays_that_can_be_sharded_and_saved(name, tmp_path):
  weights = params(ROWS['parcae'].model)
  roles = parameter_roles(ROWS['parcae'].model)
  optimizer = OPTIMIZERS[name].make(10, roles)
  mesh = sharding.Mesh(data=1).make(jax.devices()[:1])
  shapes = jax.eval_shape(optimizer.init, weights)
  shardings = sharding.shardings(shapes, mesh, roles)
  state = jax.jit(optimizer.init, out_shardings=shardings)(weights)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
  assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {'float32', 'int32'}
  assert all(leaf.ndim == 0 for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32)
  updates, state = jax.jit(optimizer.update)(random_like(weights), state, weights)
  assert jax.tree.structure(state) == jax.tree.structure(shapes)
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), updates) == jax.tree.map(
      lambda leaf: (leaf.shape, leaf.dtype), weights)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
  target = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, weights, state, {}, {})
  with Checkpoints(tmp_path) as checkpoints:
    _, restored, *_ = checkpoints.restore(1, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=leaf.sharding), weights), target)
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_quadratic_falls(name):
  weights = params(ROWS['parcae'].model)
  optimizer = OPTIMIZERS[name].make(20, parameter_roles(ROWS['parcae'].model))

  @jax.jit
  def step(carry, _):
    weights, state = carry
    loss, grads = jax.value_and_grad(lambda w: sum(jnp.sum(leaf ** 2) for leaf in jax.tree.leaves(w)))(weights)
    updates, state = optimizer.update(grads, state, weights)
    return (optax.apply_updates(weights, updates), state), loss

  _, losses = jax.lax.scan(step, (weights, optimizer.init(weights)), length=20)
  assert (np.diff(losses) < 0).all()


# At the switch of SHIFT (section 3) ----------------------------------------------------------------------------------


STAGES = [0, 0, 0, 1, 1, 1, 1, 1]
SWITCH = STAGES.index(1)
OPTIMISERS = {
    'adamw': AdamW(schedule=WSD(peak=1e-2, cooldown=1.0)),
    'atan': AtanAdam(schedule=WSD(peak=1e-2, cooldown=1.0)),
    'muon': Muon(schedule=WSD(peak=1e-2, cooldown=1.0), heads=2,
                 others=AdamW(schedule=WSD(peak=1e-2, cooldown=1.0)))}
every_optimiser = pytest.mark.parametrize('name', OPTIMISERS)


def updates_of(part, first: int = 0, state=None):
  """Updates for the same parameters and a gradient for every step from `first` on; and the states before each."""
  params = {'attn': {'qkv': {'kernel': jnp.linspace(-1, 1, 4 * 12).reshape(4, 12)}}, 'mlp': {
      'up': {'kernel': jnp.ones((4, 8))}}, 'norm': {'scale': jnp.ones(4)}}
  transform = optax.with_extra_args_support(part.make(len(STAGES), parts.roles_of(params)))
  state = transform.init(params) if state is None else state
  update = jax.jit(lambda grads, state, stage: transform.update(grads, state, params, stage=stage))
  made, states = [], []
  for i in range(first, len(STAGES)):
    rng = np.random.default_rng(i)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
    states.append(state)
    update_, state = update(grads, state, jnp.int32(STAGES[i]))
    made.append(update_)
  return made, [*states, state]


@every_optimiser
def test_by_default_the_switch_changes_nothing(name):
  plain, switched = (updates_of(part)[0] for part in (OPTIMISERS[name], Switched(of=OPTIMISERS[name])))
  for ours, theirs in zip(switched, plain):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@every_optimiser
def test_moments_that_are_reset_are_those_of_a_new_run_at_the_place_of_the_old(name):
  """From the switch on: updates of an optimiser that has seen nothing, on the learning rate of the whole run."""
  of = OPTIMISERS[name]
  made, states = updates_of(Switched(of=of, moments=Reset()))
  plain, before = updates_of(of)
  for ours, theirs in zip(made[:SWITCH], plain):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)

  def here(state):
    return isinstance(state, (optax.ScaleByScheduleState, CountState))

  fresh = jax.tree.map(lambda new, old: old if here(old) else new, before[0], before[SWITCH], is_leaf=here)
  expected, after = updates_of(of, SWITCH, fresh)
  for ours, theirs in zip(made[SWITCH:], expected):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
  jax.tree.map(np.testing.assert_array_equal, states[-1].inner, after[-1])
  assert any(np.abs(ours['norm']['scale'] - theirs['norm']['scale']).max() > 1e-4
             for ours, theirs in zip(made[SWITCH:], plain[SWITCH:]))
  counts = [leaf.count for leaf in jax.tree.leaves(states[-1].inner, is_leaf=here) if here(leaf)]
  assert counts and all(int(count) == len(STAGES) for count in counts)


@every_optimiser
def test_the_learning_rate_climbs_back_after_the_switch(name):
  plain = updates_of(OPTIMISERS[name])[0]
  warm = updates_of(Switched(of=OPTIMISERS[name], rewarm=3, least=0.1))[0]
  for i, share in enumerate([1, 1, 1, 0.1, 0.4, 0.7, 1, 1]):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), warm[i],
                 jax.tree.map(lambda update: share * update, plain[i]))


def test_a_run_that_is_resumed_at_the_switch_makes_it_once():
  """From the state before the switch, at it, and after it: the same updates."""
  part = Switched(of=OPTIMISERS['adamw'], moments=Reset(), rewarm=3)
  made, states = updates_of(part)
  for first in (SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 3):
    saved = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), states[first])
    for ours, theirs in zip(updates_of(part, first, saved)[0], made[first:]):
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_stage_that_a_run_begins_in_is_no_switch(monkeypatch):
  monkeypatch.setattr('tests.test_optim.STAGES', [1] * 8)
  warm = updates_of(Switched(of=OPTIMISERS['adamw'], moments=Reset(), rewarm=3))[0]
  jax.tree.map(np.testing.assert_array_equal, warm, updates_of(OPTIMISERS['adamw'])[0])


@pytest.mark.parametrize('options, message', [({'rewarm': -1}, r'optim\.rewarm = -1'),
                                              ({'least': 1.5}, r'optim\.least = 1\.5')])
def test_a_switch_that_cannot_be_made_is_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    Switched(of=AdamW(), **options)


def test_biases_that_are_one_tensor_in_the_papers_code_are_clipped_as_one():
  """Huginn's q and k; the mean of g^2 / v is over both, so a burst in the one shortens the other's update."""
  names = {('attn', f'{name}_bias'): Role(decayed=False, layered=True, group='qk_bias' if name in 'qk' else '')
           for name in 'qkv'}
  quiet, burst = jnp.full((2, 3, 4), 0.1), jnp.full((2, 3, 4), 0.1).at[0].set(30.0)

  def second(grads, roles):
    part = scale_by_atan(0.9, 0.95, roles)
    state = part.init(grads[0])
    for step in grads:
      updates, state = part.update(step, state)
    return updates['attn']

  grads = [{'attn': dict.fromkeys(('q_bias', 'k_bias', 'v_bias'), quiet)},
           {'attn': {'q_bias': burst, 'k_bias': quiet, 'v_bias': quiet}}]
  whole = [{'attn': {'qk': jnp.concatenate([g['attn']['q_bias'], g['attn']['k_bias']], 1)}} for g in grads]
  found, expected = second(grads, Roles(names)), second(whole, Roles({('attn', 'qk'): Role(layered=True)}))['qk']
  np.testing.assert_allclose(jnp.concatenate([found['q_bias'], found['k_bias']], 1), expected, rtol=1e-6)
  assert (jnp.abs(found['k_bias'][0]) < 0.9 * jnp.abs(found['v_bias'][0])).all()
  np.testing.assert_allclose(found['k_bias'][1], found['v_bias'][1], rtol=1e-6)
  model = parts.looped(parts.plain(biased=('q', 'k', 'v')))
  declared = {path[-1]: role.group for path, role in parameter_roles(model).items() if path[-1].endswith('_bias')}
  assert declared == {'q_bias': 'qk_bias', 'k_bias': 'qk_bias', 'v_bias': ''}


@pytest.mark.parametrize('heads, groups', [(4, 4), (4, 2), (6, 1)])
def test_projections_are_drawn_as_matrices_of_their_own(heads, groups):
  kernel = ByProjection(Orthogonal(0.1), heads, groups)(jax.random.key(0), (24, (heads + 2 * groups) * 24 // heads))
  for matrix in unfused_kernel(kernel, heads, groups, 'heads'):
    values = np.linalg.svd(matrix.reshape(24, -1), compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-5)
  together = np.linalg.svd(Orthogonal(0.1)(jax.random.key(0), kernel.shape)[:, :24], compute_uv=False)
  assert together.min() < 0.9 * together.max()


def test_parcae_starts_and_moves_as_its_code_does():
  """Singular values of its embedding are equal; its value gates are Muon's."""
  config = configs.load('parcae:140m')
  assert config.model.read_in.init == config.model.bridge.init == Orthogonal(config.model.read_in.std)
  table = config.model.read_in.init(jax.random.key(0), (64, 16))
  values = np.linalg.svd(table, compute_uv=False)
  np.testing.assert_allclose(values, values[0], rtol=1e-5)
  taken = paths(routes(parts.shapes(config.model), parameter_roles(config.model), config.optim.matrices))
  assert {route for path, route in taken.items() if path.endswith('/gate')} == {'muon'}
  assert {route for path, route in taken.items() if path.endswith('/embedding')} == {'adam'}
