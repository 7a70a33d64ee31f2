import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import cosines
from loopformer import plans
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.latent_thoughts.cosine import Cosine, block_cosines
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError, Context
from tests import parts
from tests.parts import close

LAYERS = 6
MODEL = parts.looped(parts.plain(LAYERS, heads=4, groups=2), loops=1)
MATRICES = ('attn.q', 'attn.k', 'attn.v', 'attn.out', 'mlp.up', 'mlp.down')
NORMS = ('norm_attn.scale', 'norm_mlp.scale')


def term(period: int = 2, **options) -> Cosine:
  return Cosine(**{'period': period, 'heads': 4, 'kv_heads': 2, **options})


def with_block(change):
  """The parameters, every tensor of the stack changed."""
  params = parts.params(MODEL)
  core = jax.tree.map(change, params['cell']['core'])
  return {**params, 'cell': {**params['cell'], 'core': core}}


def tied(period: int):
  return with_block(lambda leaf: jnp.concatenate([leaf[:period]] * (LAYERS // period)))


def value(term, params, rows: int = 3):
  batch = {'weights': jnp.ones((rows, 5))}
  return term({}, batch, None, params) / term.weight(batch)


@pytest.mark.parametrize('period', [1, 2, 3])
def test_it_is_the_double_sum_of_the_paper(period):
  params = parts.params(MODEL)
  block = params['cell']['core']['block']
  width, head, each = 16, 4, 2
  qkv = np.asarray(block['attn']['qkv']['kernel']).reshape(LAYERS, width, 2, each + 2, head)
  tensors = {'attn.q': qkv[..., :2, :], 'attn.k': qkv[..., 2, :], 'attn.v': qkv[..., 3, :],
             'attn.out': block['attn']['out']['kernel'], 'mlp.up': block['mlp']['up']['kernel'],
             'mlp.down': block['mlp']['down']['kernel'], 'norm_attn.scale': block['norm_attn']['scale'],
             'norm_mlp.scale': block['norm_mlp']['scale']}
  expected = {}
  for name, tensor in tensors.items():
    rows = np.asarray(tensor, np.float64).reshape(LAYERS, -1)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [(i * period + j, (i + 1) * period + j) for i in range(LAYERS // period - 1) for j in range(period)]
    assert len(pairs) == LAYERS - period
    expected[name] = sum(rows[a] @ rows[b] for a, b in pairs) / (LAYERS - period)
  measured = block_cosines(params, term(period))
  assert set(measured) == set(MATRICES + NORMS) and all(type(number) is float for number in measured.values())
  close(measured, {name: float(number) for name, number in sorted(expected.items())}, 1e-5)
  np.testing.assert_allclose(value(term(period), params), 1 - np.mean(list(expected.values())), rtol=1e-5)
  some = np.mean([expected[name] for name in MATRICES])
  np.testing.assert_allclose(value(term(period, groups=MATRICES), params), 1 - some, rtol=1e-5)


def test_queries_keys_and_values_are_what_attention_reads():
  """Where a group lies in the fused kernel shows in its gradient; attention runs with that group at zero."""
  params = parts.params(MODEL)
  block = params['cell']['core']['block']
  attn, x = MODEL.cell.core.block.attn, jax.random.normal(jax.random.key(0), (1, 5, 16))
  masks, outs = {}, {}
  for name in ('attn.q', 'attn.k', 'attn.v'):
    grads = jax.grad(lambda params, name=name: term().cosines(params)[name])(params)['cell']['core']['block']
    masks[name] = grads['attn']['qkv']['kernel'] != 0
    weights = {'qkv': {'kernel': jnp.where(masks[name], 0, block['attn']['qkv']['kernel'])[0]},
               'out': {'kernel': block['attn']['out']['kernel'][0]}}
    outs[name] = attn.apply({'params': weights}, x, Context(pos=jnp.arange(5)[None]), None, 0)[0]
  assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
  assert [int(mask[0].sum()) for mask in masks.values()] == [16 * 16, 16 * 8, 16 * 8]
  assert not outs['attn.v'].any() and outs['attn.q'].any()
  np.testing.assert_allclose(outs['attn.q'], outs['attn.k'], atol=1e-6)  # either way, attention is even


@pytest.mark.parametrize('period', [1, 2, 3])
def test_tied_blocks_have_one_and_no_gradient(period):
  values = block_cosines(tied(period), term(period))
  np.testing.assert_allclose(list(values.values()), 1, rtol=1e-6)
  number, grads = jax.value_and_grad(lambda params: value(term(period), params))(tied(period))
  np.testing.assert_allclose(number, 0, atol=1e-6)
  assert all(np.abs(leaf).max() < 1e-6 for leaf in jax.tree.leaves(grads))


def test_negated_blocks_have_minus_one():
  signs = jnp.asarray([1.0, 1.0, -1.0, -1.0, 1.0, 1.0])
  params = jax.tree.map(lambda leaf: leaf, tied(2))
  params['cell']['core'] = jax.tree.map(lambda leaf: leaf * signs.reshape(-1, *(1,) * (leaf.ndim - 1)),
                                        params['cell']['core'])
  np.testing.assert_allclose(list(block_cosines(params, term()).values()), -1, rtol=1e-6)
  np.testing.assert_allclose(value(term(), params), 2, rtol=1e-6)


def test_size_does_not_matter():
  counter = itertools.count(1)
  scaled = with_block(lambda leaf: leaf * jnp.linspace(0.01, 30 * next(counter), LAYERS).reshape(
      -1, *(1,) * (leaf.ndim - 1)))
  close(block_cosines(scaled, term()), block_cosines(parts.params(MODEL), term()), 1e-5)


def test_a_small_step_draws_the_blocks_together():
  params = parts.params(MODEL)
  for groups in (None, MATRICES, ('mlp.up',)):
    part = term(groups=groups)
    before, grads = jax.value_and_grad(lambda p, part=part: value(part, p))(params)
    after = value(part, jax.tree.map(lambda p, g: p - 0.01 * g, params, grads))
    assert after < before - 1e-5
    assert np.mean([*block_cosines(params, part).values()]) < 1 - after
  assert grads['cell']['core']['block']['mlp']['up']['kernel'].any(axis=(1, 2)).all()  # both layers of every pair
  assert not grads['cell']['core']['block']['mlp']['down']['kernel'].any()


def test_zeros_have_cosine_zero_and_no_gradient():
  """Output projections may start at zero."""
  params = with_block(jnp.zeros_like)
  number, grads = jax.value_and_grad(lambda params: value(term(), params))(params)
  assert number == 1 and all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_bfloat16_is_compared_in_float32():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tied(2))
  assert value(term(), params).dtype == jnp.float32
  np.testing.assert_allclose(value(term(), params), 0, atol=1e-6)


def test_a_stack_of_chains():
  model = parts.looped(parts.Plain(parts.Stack(parts.valued(), 2)), loops=1, read_in=parts.nowhere())
  names = block_cosines(parts.params(model), Cosine(period=1, heads=2))
  assert {'blocks_0.attn.q', 'blocks_1.attn.v', 'blocks_1.attn.values.embedding', 'blocks_0.norm_mlp.scale'} <= {*names}


def test_shares_of_a_batch_add_up_to_one_mean():
  """Devices and microbatches divide rows; the value does not depend on how, or on the weights of tokens."""
  objective = Objective(rolls={'end': Rollout(plans.Uniform(1))},
                        terms={'lm': Weighted(1.0, CE(roll='end')), 'cosine': Weighted(10.0, term())})
  params, batch = parts.params(MODEL), parts.batch(6)
  total = objective.denominators(batch)
  assert total['cosine'] == 6 and total['cosine'].dtype == jnp.float32

  def share(rows):
    part = {name: leaf[rows] for name, leaf in batch.items()}
    return objective(MODEL, params, parts.plan_context(jax.random.key(0), part), total)[1]['cosine']

  expected = value(term(), params)
  np.testing.assert_allclose(share(slice(0, 6)), expected, rtol=1e-6)
  np.testing.assert_allclose(share(slice(0, 2)) + share(slice(2, 6)), expected, rtol=1e-6)


@pytest.mark.parametrize('options, match', [
    ({'period': 4}, r'period = 4 does not divide the 6 layers of cell\.core\.block'),
    ({'period': 6}, r'period = 6 does not divide the 6 layers of cell\.core\.block into two blocks'),
    ({'period': 0}, r'period = 0'),
    ({'groups': ('mlp.up', 'mlp.gate')}, r"'mlp\.gate'\): the groups of cell\.core\.block are .*attn\.q.*mlp\.up"),
    ({'groups': ()}, r'groups = \(\): the groups of'),
    ({'stack': 'cell.cor.block'}, r"stack = 'cell\.cor\.block': no 'cell\.cor' among the parameters; there are core"),
    ({'heads': 3}, r'heads = 3, kv_heads = 2 of cell\.core\.block\.attn\.qkv do not fit'),
    ({'heads': 12}, r'heads = 12, kv_heads = 2 of .* do not fit'),
    ({'heads': 5, 'kv_heads': None}, r'heads = 5, kv_heads = None of .* do not fit'),
])
def test_what_the_parameters_do_not_have_is_refused(options, match):
  with pytest.raises(ConfigError, match=match):
    value(term(**options), parts.params(MODEL))


def test_a_report_of_runs():
  """Blocks of one run, and the means over seeds; one block that is looped is like itself."""
  found = cosines.cosines_of(MODEL, parts.params(MODEL), 2)
  assert found == pytest.approx(block_cosines(parts.params(MODEL), term(groups=MATRICES)))
  assert max(found.values()) < 0.9
  assert cosines.cosines_of(MODEL, tied(2), 2) == pytest.approx(dict.fromkeys(MATRICES, 1.0))
  looped = parts.looped(parts.plain(2), loops=3)
  assert cosines.cosines_of(looped, parts.params(looped), 2) == dict.fromkeys(MATRICES, 1.0)
  rows = cosines.summary({'a': [{'accuracy': 0.5, 'x': 1.0}, {'accuracy': 0.75, 'x': 2.0}], 'b': [{'accuracy': 1.0}]})
  assert rows == [{'run': 'a', 'seeds': 2, 'accuracy': 0.625, '+-': 0.125, 'x': 1.5},
                  {'run': 'b', 'seeds': 1, 'accuracy': 1.0, '+-': ''}]
