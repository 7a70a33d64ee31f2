"""Timestep encoding: the layer of the released loop, and the targets that a looped layer memorises."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import timestep
from experiments.studies import memorise
from loopformer import plans
from loopformer.cells.plain import Plain
from loopformer.nn.attention import SelfAttention
from loopformer.nn.condition import LoopIndex
from loopformer.nn.layers import EPSILON, MLP
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError
from tests import parts

SIZES = memorise.Sizes(loops=2)


def test_the_legacy_layer_is_the_released_one():
  """Two loops in float64: queries and keys of the normed state, values and MLP of the state itself (section 7)."""
  model = parts.looped(Plain(Stack(timestep.LegacyBlock(attn=SelfAttention(heads=2), mlp=MLP(hidden=24)), 1)))
  params = parts.params(model)
  tokens = parts.tokens(2)
  read_in = params['read_in']
  x = np.asarray(read_in['embedding'][tokens] + read_in['positions'][:parts.T], np.float64)
  layer = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params['cell']['core']['block'])
  causal = np.tril(np.ones((parts.T, parts.T), bool))
  for _ in range(2):
    normed = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + EPSILON) * layer['norm']['scale']
    q, k, v = (z.reshape(2, parts.T, 2, -1) for z in (*np.split(normed @ layer['qk']['kernel'], 2, -1),
                                                     x @ layer['v']['kernel']))
    scores = np.where(causal, np.exp(np.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(q.shape[-1])), 0)
    read = np.einsum('bhqk,bkhd->bqhd', scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
    x = x + read @ layer['out']['kernel']
    hidden = x @ layer['mlp']['up']['kernel']
    x = x + np.asarray(jax.nn.gelu(hidden, approximate=False)) @ layer['mlp']['down']['kernel']
  parts.close(parts.forward(model, params, tokens, plans.schedule((0.5, 0.5))).x, x, 1e-4)


def test_wide_has_the_parameters_of_the_modulated():
  for loops in (1, 8):
    sizes = memorise.Sizes(loops=loops)
    counts = {kind: memorise.parameters(kind, sizes) for kind in memorise.KINDS}
    width = sizes.width
    assert counts['table'] == counts['lt'] + 2 * width * loops  # a gate and a scale; there is no attention to modulate
    assert counts['tmlt'] == counts['lt'] + 256 * width + width + 3 * width * (width + 1)
    assert abs(counts['wide'] - counts['tmlt']) <= width  # half a hidden unit: it has 2 D + 1


def test_targets_are_memorised_and_differ_by_seed():
  errors = memorise.train('table', SIZES, jnp.arange(2), 150, 1e-2)
  assert errors.shape == (2, 151) and errors[0, -1] != errors[1, -1]
  assert (errors[:, -1] < 0.6 * errors[:, 0]).all()
  first, second = (memorise.problem(jax.random.key(seed), SIZES)['targets'] for seed in (0, 1))
  assert (first != second).all() and abs(first).max() <= 1


def test_bad_values():
  with pytest.raises(ConfigError, match='loops = 0'):
    memorise.Sizes(loops=0)
  with pytest.raises(ConfigError, match='kind = moon'):
    memorise.model_of('moon', SIZES)


def test_the_language_models_time_code_begins_as_a_linear_of_pytorch():
  """Weights and biases within 1 / sqrt(inputs), spread evenly; that of other sizes normal, without biases."""
  config = timestep.get_config('lm')
  assert (config.model.cell.condition.std, timestep.get_config('cpu').model.cell.condition.std) == (None, 0.02)
  made = LoopIndex(64, None).init(jax.random.key(0), plans.Uniform(3)(None))['params']['time']
  for name, inputs in (('in', 256), ('out', 64)):
    for leaf in (made[name]['kernel'], made[name]['bias']):
      edge = 1 / np.sqrt(inputs)
      assert 0.85 * edge < np.abs(leaf).max() <= edge and np.std(leaf) == pytest.approx(edge / np.sqrt(3), rel=0.3)
