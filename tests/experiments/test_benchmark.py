import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark import (
  __main__ as benchmark,
  compile,
  decode,
  floor,
  growth,
  imported,
  memory,
  plain,
  sizes,
  train,
)
from experiments.configs import loopformer as configuration
from loopformer import loop, plans
from loopformer.model import init_params, parameter_shapes
from loopformer.nn import kernels
from loopformer.training import metrics
from tests import parts

TINY = sizes.Size(batch=2, length=16, width=16, heads=2, hidden=24, vocab=40, layers=2, loops=4, short=2, prompt=4,
                      new=4)


def lowered(objective, **changes):
  size = dataclasses.replace(TINY, **changes)
  return sizes.Ours(size, sizes.make_model(size), objective(size)).lower()


def random_short(size):
  return sizes.with_short(size, plans.Partition(size.loops))


def test_random_trajectories_share_one_program():
  row, = compile.programs_rows(TINY)
  assert row['programs'] == 1
  assert np.isfinite(row['last loss'])


def test_program_does_not_grow_with_depth():
  texts = {(loops, layers): lowered(random_short, loops=loops, layers=layers).as_text()
           for loops, layers in ((3, 2), (9, 2), (3, 7))}
  counts = {case: compile.count_instructions(text) for case, text in texts.items()}
  assert counts[3, 2] > 100
  for count in counts.values():  # a scan per layer or loop would add hundreds; a few constants of the plan remain
    assert abs(count - counts[3, 2]) < 0.05 * counts[3, 2], counts


@pytest.mark.parametrize('remat, states', [(loop.PerStep(), 1), (loop.PerLayer(), 2 * TINY.layers)], ids=str)
def test_memory_grows_by_the_states_that_are_saved(remat, states):
  size = dataclasses.replace(TINY, batch=8, length=32, width=32)
  rows = [memory.memory_row(dataclasses.replace(size, loops=loops), remat, 'long alone',
                               sizes.long_alone(loops)) for loops in (3, 9)]
  growth = (rows[1]['temp MB'] - rows[0]['temp MB']) * sizes.MEGA / 6
  state = 4 * size.tokens * size.width
  sums = 4 * size.tokens * size.heads * size.layers * (states > 1)  # of the softmax, which attention saves
  modulations = 4 * 4 * size.width * size.layers
  # Modulations, their inputs and gradients grow as well.
  assert 0.5 * states * state < growth <= states * state + sums + 6 * modulations


def test_program_holds_no_logits_of_all_tokens():
  size = dataclasses.replace(TINY, batch=12, length=64)  # more tokens than a chunk of the cross-entropy
  row = memory.memory_row(size, loop.PerStep(), 'both', sizes.with_short(size, sizes.short_of(size)))
  assert row['[tokens, V] arrays'] == 0


def test_logits_are_seen_where_they_are():
  def loss(z, table):
    return jax.nn.logsumexp(z @ table.T, -1).sum()

  z, table = jax.ShapeDtypeStruct((2, 16, 16), np.float32), jax.ShapeDtypeStruct((40, 16), np.float32)
  program = jax.jit(jax.grad(loss)).lower(z, table).compile().as_text()
  assert memory.logit_arrays(program, TINY)


def test_padded_plan_runs_its_steps_and_skips_the_rest():
  plan = sizes.Padded(count=2, rows=3)(jax.random.key(0))
  assert plan.active.tolist() == [True, True, False]
  assert plan.dt.tolist() == [0.5, 0.5, 0.0]


def test_train_rows(monkeypatch):
  monkeypatch.setattr(metrics, 'measured_peak', lambda size, dtype: 1e12)
  tables = train.train_suite(TINY, 1, None, kernels=(kernels.Blockwise(),), remats=(loop.KeepAll(), loop.PerStep()))
  rows = tables['train']
  assert [row['step'] for row in rows] == ['KeepAll, Blockwise', 'PerStep, Blockwise']
  np.testing.assert_allclose(rows[0]['first loss'], rows[1]['first loss'], rtol=1e-5)
  assert rows[0]['% of peak'] > 0
  losses = {row['step']: row['first loss'] for row in train.plain_suite(TINY, 1)['one pass']}
  assert len(losses) == 4
  for layers in ('8 layers', '2 layers 4 times'):  # from the same parameters each
    np.testing.assert_allclose(losses[f'ours, {layers}'], losses[f'plain JAX, {layers}'], rtol=1e-5)


def test_what_does_not_fit_takes_no_part(monkeypatch):
  monkeypatch.setattr(metrics, 'measured_peak', lambda size, dtype: 1e12)

  class Ran:
    objective, model = sizes.long_alone(TINY.loops), sizes.make_plain(TINY, 2, TINY.loops)
    compiles, error = True, None

    def lower(self):
      return self

    def compile(self):
      if not self.compiles:
        raise RuntimeError('RESOURCE_EXHAUSTED: 3 GB')
      return jax.jit(lambda: 0).lower().compile()

    def start(self, compiled):
      assert compiled

    def __call__(self):
      if self.error:
        raise RuntimeError(self.error)
      return 1.0

  class Large(Ran):
    compiles = False

  class Larger(Ran):
    error = 'CUDA out of memory'

  class Wrong(Ran):
    error = 'a fault'

  rows = train.race(TINY, 1, {'fits': Ran(), 'large': Large()}, Ran(), {'larger': Larger})
  assert [row['step'] for row in rows] == ['fits', 'large: out of memory', 'larger: out of memory']
  assert metrics.table(rows)
  with pytest.raises(RuntimeError, match='a fault'):
    train.race(TINY, 1, {'wrong': Wrong()}, Ran(), {})


def test_the_plain_peer_has_our_gradient():
  model = sizes.make_plain(TINY, TINY.layers, TINY.loops)
  params = init_params(model, jax.random.key(3))
  batch = sizes.make_batch(TINY)
  objective = sizes.long_alone(TINY.loops)

  def ours(params):
    return objective(model, params, parts.plan_context(jax.random.key(0), batch), objective.denominators(batch))[0]

  def theirs(params):
    return plain.loss(plain.from_params(model, params), batch['tokens'], batch['targets'], TINY.heads, TINY.loops,
                      TINY.dtype)

  (loss, grads), (expected, expected_grads) = (jax.jit(jax.value_and_grad(each))(params) for each in (ours, theirs))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  chex.assert_trees_all_close(grads, expected_grads, atol=1e-6)


def dtypes(model) -> dict[str, set]:
  """Of what a training pass holds."""
  tokens = jax.ShapeDtypeStruct((2, 8), np.int32)
  params = parameter_shapes(model)
  trace = jax.eval_shape(lambda params, tokens: model.apply({'params': params}, tokens, plans.Uniform(2)(None),
                                                            keep=loop.Every()), params, tokens)
  return {'params': {leaf.dtype.name for leaf in jax.tree.leaves(params)}, 'answers': {trace.z.dtype.name},
          'states': {trace.x.dtype.name, trace.xs.dtype.name}, 'products': {model.dtype},
          'caches': {model.cache(1, 8)['loop'].k.dtype.name}}


def test_what_is_measured_has_the_dtypes_of_what_is_trained():
  """In bfloat16, as on accelerators: the configuration's model, ours of the benchmark, and the plain peer."""
  half = dataclasses.replace(TINY, dtype='bfloat16')
  expected = dtypes(configuration.get_config('tiny,dtype=bfloat16').model)
  assert expected['states'] == {'float32'} and expected['products'] == {'bfloat16'}
  model = sizes.make_plain(half, half.layers, half.loops)
  assert dtypes(sizes.make_model(half)) == expected == dtypes(model)
  params = plain.from_params(model, init_params(model, jax.random.key(0)))
  tokens = sizes.make_batch(half)['tokens']
  program = jax.make_jaxpr(lambda params: plain.decoder(params, tokens, half.heads, half.loops, half.dtype))(params)
  added = [line.outvars[0].aval for line in program.eqns if line.primitive.name == 'add']
  states = [aval.dtype.name for aval in added if aval.shape == (half.batch, half.length, half.width)]
  assert set(states) == {'float32'} and len(states) > 2 * half.layers * half.loops


def test_the_largest_batch_is_compiled():
  rows = memory.largest(TINY, loops=3, memory=5e6, remats=(loop.PerStep(),))
  assert rows[0]['step'].startswith('plain JAX') and rows[0]['times plain'] == 1
  for row in rows:
    assert row['largest batch'] >= 2 and row['needs GB'] == pytest.approx(5e-3, rel=0.15), row
    assert row['needs GB'] <= 5e-3, row
  row, = memory.largest(TINY, loops=3, memory=1e3, remats=())
  assert row['largest batch'] == 0 and row['times plain'] == '' and row['needs GB'] > 1e-6


def test_growth_rows():
  tables = growth.growth_suite(TINY, 1, axes=('loops',), factors=(1, 2), base={})
  rows = tables['growth']
  assert [(row['grows'], row['to']) for row in rows] == [('loops', 4), ('loops', 8)]
  row, = tables['powers']
  assert row['arithmetic as the power'] == pytest.approx(np.log2(rows[1]['GFLOP'] / rows[0]['GFLOP']))
  assert row['time as the power'] == pytest.approx(np.log2(rows[1]['s/step'] / rows[0]['s/step']))


def test_a_power_is_a_slope():
  assert growth.slope({1: 3.0, 2: 12.0, 4: 48.0}) == pytest.approx(2.0)


def test_decode_rows_and_files(tmp_path):
  tables = decode.decode_suite(TINY, 1, budgets=(1, 2, 4), batches=(1, 2), context=16)
  rows = tables['decode']
  assert [(row['rows'], row['loops']) for row in rows] == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]
  assert all(row['tokens/s'] > 0 for row in rows)
  assert rows[0]['times one row'] == 1 and [row['rows'] for row in tables['fixed share']] == [1, 2]
  cache, = tables['cache']
  assert cache['times as fast'] == pytest.approx(cache['recomputed ms a token'] / cache['cached ms a token'])
  for row in tables['floor']:
    assert row['times the products'] == pytest.approx(row['decoding ms'] / row['bare products ms'])
    assert row['% of roofline'] == pytest.approx(100 * row['roofline ms'] / row['decoding ms'])
  machine = benchmark.describe_machine(None)
  benchmark.write(tmp_path, 'decode', {'decode': rows}, TINY, machine)
  assert json.loads((tmp_path / 'decode.json').read_text())['machine'] == machine
  assert metrics.table(rows) in (tmp_path / 'decode.md').read_text()
  assert set(machine) == {'hardware', 'peaks', 'versions', 'date', 'command'}


def test_an_imported_decoder_beside_transformers(tmp_path):
  pytest.importorskip('transformers', reason='the peer, of the extra dev')
  tiny = dataclasses.replace(imported.SMOL, vocab=40, width=16, hidden=24, layers=1, heads=4, groups=2, length=32)
  tables = imported.imported_suite(1, tiny, batches=(1, 2), prompt=4, new=3)
  ours, theirs = tables['imported'][::2], tables['imported'][1::2]
  assert [(row['rows'], row['by']) for row in tables['imported']] == [
      (1, 'ours'), (1, 'transformers'), (2, 'ours'), (2, 'transformers')]
  for own, peer in zip(ours, theirs):
    assert own['times as fast'] == pytest.approx(peer['ms a round'] / own['ms a round'])
    assert peer['times as fast'] == 1 and own['floor ms'] == peer['floor ms'] > 0
  machine = benchmark.describe_machine('transformers')
  assert 'transformers' in machine['versions']
  benchmark.write(tmp_path, 'decode', tables, TINY, machine)
  assert 'size' not in (tmp_path / 'decode.md').read_text().split('|')[0]


def test_an_imported_decoder_that_differs_is_refused(monkeypatch):
  pytest.importorskip('transformers', reason='the peer, of the extra dev')
  monkeypatch.setattr(imported, 'logits_apart', lambda *arguments: 0.1)
  with pytest.raises(RuntimeError, match='differ by 0.1'):
    imported.imported_suite(1, dataclasses.replace(imported.SMOL, vocab=40, width=16, hidden=24, layers=1, heads=4,
                                                   groups=2, length=32))


def test_the_floor_counts_every_weight_that_a_token_reads():
  params = init_params(sizes.make_model(TINY), jax.random.key(0))
  kernels = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params['cell']['core']) if leaf.ndim == 3]
  table = params['read_in']['embedding']
  assert decode.bare_bytes(TINY) == 4 * (TINY.loops * sum(leaf.size for leaf in kernels) + table.size)


def test_bare_products_are_those_of_every_kernel():
  params = init_params(sizes.make_model(TINY), jax.random.key(0))
  core, table, rows = params['cell']['core'], params['read_in']['embedding'], 64
  layers = floor.layers_of(core, table.dtype)
  x = jnp.ones((rows, TINY.width))
  own, without = (
      jax.jit(functools.partial(floor.products, loops=1)).lower(x, layers, own).compile().cost_analysis()['flops']
      for own in (table, None))
  kernels = sum(leaf.size for layer in layers for leaf in layer.values())
  assert kernels == sum(leaf.size for leaf in jax.tree.leaves(core) if leaf.ndim == 3) and len(layers) == TINY.layers
  assert 1 <= without / (2 * rows * kernels) < 1.1 and own - without == pytest.approx(2 * rows * table.size, rel=0.02)
  assert floor.bare_products(core, rows, 2, table)() > 0


@pytest.mark.parametrize('short', [(1.0,), (0.25, 0.75)])
def test_peer_computes_the_same_loss_and_gradient(short):
  torch = pytest.importorskip('torch')
  from experiments.benchmark import peer
  model = sizes.make_model(TINY)
  params = init_params(model, jax.random.key(3))
  batch = sizes.make_batch(TINY)
  objective = sizes.with_short(TINY, parts.Fixed(short))

  def loss(params):
    return objective(model, params, parts.plan_context(jax.random.key(0), batch), objective.denominators(batch))[0]

  ours, grads = jax.jit(jax.value_and_grad(loss))(params)
  theirs = peer.from_params(model, params)
  tokens, targets = (torch.tensor(batch[name], dtype=torch.long) for name in ('tokens', 'targets'))
  their_loss = peer.loss_of(theirs, tokens, targets, (1 / TINY.loops,) * TINY.loops, short)
  their_loss.backward()
  np.testing.assert_allclose(their_loss.item(), ours, rtol=1e-4)
  theirs.load_state_dict({name: torch.zeros_like(value) if value.grad is None else value.grad
                          for name, value in theirs.state_dict(keep_vars=True).items()})
  expected = peer.from_params(model, grads).state_dict()
  for name, value in theirs.state_dict().items():
    if not name.endswith('frequencies'):
      np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_what_is_sent_does_not_grow_with_loops():
  """On eight devices; the automatic partitioner's does."""
  code = '''
import dataclasses, json
from experiments.benchmark import comms
from experiments.tools import estimate
from tests.experiments.test_benchmark import TINY
estimate.simulate(8)
print(json.dumps(comms.comms_suite(dataclasses.replace(TINY, batch=8), depths=(2, 6))['comms']))
'''
  few, many = json.loads(parts.python(code).splitlines()[-1])
  assert few['ours MB'] == many['ours MB'] > 0
  assert many['automatic MB'] > 2 * few['automatic MB'] > 2 * few['ours MB']
