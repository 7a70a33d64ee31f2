import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loopformer.optim import AdamW, WarmupCosine, decay_mask
from loopformer.types import ConfigError
from tests import parts
from tests.parts import ROWS, all_rows, params

LAYERED = ('core', 'prelude', 'coda', 'modulation')  # stacked layers: one axis more than in the official layout


def official_axes(path, leaf) -> int:
  """Axes of a parameter in the official code's layout, where every layer's are apart and Linear weights are [O, I]."""
  names = [entry.key for entry in path]
  axes = leaf.ndim - any(name in LAYERED for name in names)
  return axes - ('modulation' in names)  # its four parts are one axis there


@pytest.mark.parametrize('name', all_rows)
def test_decay_acts_on_matrices_and_embeddings_alone(name):
  shapes = parts.shapes(ROWS[name].model)
  mask = jax.tree_util.tree_leaves_with_path(decay_mask(shapes))
  expected = {path: official_axes(path, leaf) >= 2 for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
  assert {path: masked for path, masked in mask} == expected
  assert set(expected.values()) == {True, False}
  kept = {path[-1].key for path, decayed in mask if not decayed}
  assert kept <= {'scale', 'bias'}


def test_a_step_without_gradient_shrinks_matrices_alone():
  weights = {**params(ROWS['base_loop'].model), 'cell/modulation': {'bias': jnp.ones((2, 4, 3))}}
  part = AdamW(schedule=WarmupCosine(peak=0.1, end=0.01, warmup=1), decay=0.2)
  optimizer = part.make(10)

  @jax.jit
  def step(weights):
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, weights), optimizer.init(weights), weights)
    return optax.apply_updates(weights, updates)

  new = step(weights)
  rate = part.schedule.make(10)(0)

  def check(old, new, decayed):
    np.testing.assert_allclose(new, old * (1 - rate * 0.2) if decayed else old, rtol=1e-6)

  jax.tree.map(check, weights, new, decay_mask(weights))
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
    AdamW(schedule=WarmupCosine(warmup=warmup)).make(steps)


def test_gradients_are_clipped_by_their_global_norm():
  """Adam forgets a constant factor; what is left of it shows in the first moment."""
  weights = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
  optimizer = AdamW(schedule=WarmupCosine(warmup=1), clip=1.0).make(10)
  for scale, expected in ((0.1, 0.1), (100.0, 1.0)):
    grads = optax.tree.scale(scale / 4, weights)  # sixteen entries: norm = scale
    _, state = optimizer.update(grads, optimizer.init(weights), weights)
    first = next(s.mu for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, 'mu')) if hasattr(s, 'mu'))
    np.testing.assert_allclose(optax.tree.norm(first), 0.1 * expected, rtol=1e-5)


def test_published_values_are_the_defaults():
  part = AdamW()
  assert (part.b1, part.b2, part.decay, part.clip) == (0.9, 0.95, 0.2, 1.0)
  assert part.schedule == WarmupCosine(peak=6e-4, end=6e-5, warmup=2000)
