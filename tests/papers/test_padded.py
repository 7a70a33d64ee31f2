"""Padded and looped transformers: attention that averages the best, norms of a part, numbers as unit vectors, weights
that are constructed, fillers against padding, depth by the length of the input, and what the study measures."""
import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import padded
from experiments.studies import padded_depth as study
from loopformer import config as configs, plans
from loopformer.api import Loaded
from loopformer.cells.plain import Plain
from loopformer.model import Looped, make_readout, run_batch
from loopformer.nn import kernels
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.layers import LayerNorm, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.papers.padded import connectivity as constructed
from loopformer.papers.padded.attention import AveragingHard
from loopformer.papers.padded.norm import MaskedNorm, phi, psi
from loopformer.tasks.connectivity import Connectivity, distances
from loopformer.tasks.fillers import FILLER, Filled, Power, check_order
from loopformer.tasks.generated import Generated
from loopformer.tasks.reasoning import Asked, Chain, Rounds, Several, Slots
from loopformer.tasks.shortened import Selected
from loopformer.tasks.words import PARITY, Cyclic, Prefixes, Regular, Word
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError
from tests import parts
from tests.parts import D

BITS = Word(longest=5, group=Cyclic(degree=2))
GRAPHS = Connectivity(shortest=3, longest=4)


def batch_of(form, problems):
  examples = [form.example(problem) for problem in problems]
  return {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}


# Averaging-hard attention --------------------------------------------------------------------------------------------


def operands(seed, heads=4, groups=2, length=9):
  """q, k, v and segments; scores are multiples of 1/8 of up to some 20, so that many are equal."""
  rng = np.random.default_rng(seed)
  q, k = (rng.integers(-3, 4, (2, length, count, 4)) / 2.0 for count in (heads, groups))
  return *map(jnp.float32, (q, k / 4, rng.normal(size=k.shape))), jnp.asarray([[0] * 4 + [1] * 5, [0] * 9])


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('segments', [True, False])
def test_hard_attention_is_the_limit_of_softmax(causal, segments):
  q, k, v, seg = operands(0)
  seg = seg if segments else None
  soft = kernels.Blockwise() if causal else kernels.Bidirectional()
  hard = AveragingHard(masked=causal)(q, k, v, seg)
  assert np.abs(hard - soft(q * 1e4, k, v, seg)).max() < 1e-5
  assert np.abs(hard - soft(q, k, v, seg)).max() > 0.1
  q, k, v, _ = operands(1, 2, 2, 4)
  both = [AveragingHard(masked=masked)(q.at[:, :, 1].set(0), k, v, None) for masked in (True, False)]
  for t in range(4):  # queries of zeros find all keys alike
    np.testing.assert_allclose(both[0][:, t, 1], v[:, :t + 1, 1].mean(1), rtol=1e-5)
    np.testing.assert_allclose(both[1][:, t, 1], v[:, :, 1].mean(1), rtol=1e-5)


def test_scores_count_as_equal_within_a_part_of_the_largest():
  """The mean of two values where keys differ by less; scale and sign of all scores make no difference."""
  v = jnp.float32([1, 2, 4]).reshape(1, 3, 1, 1)
  for scale in (1e-3, 1.0, 1e4):
    for q, near in ((1.0, (1, 1.00005, 0.9)), (1.0, (0.9, 1.00005, 1)), (-1.0, (1, 1.00005, 1.1))):
      k = scale * jnp.float32(near).reshape(1, 3, 1, 1)
      ones = q * jnp.ones_like(k)
      chosen = [value for value, key in zip((1, 2, 4), near) if abs(key - 1) < 1e-3]
      assert float(AveragingHard(masked=False)(ones, k, v, None)[0, 0, 0, 0]) == np.mean(chosen)
      exact = AveragingHard(masked=False, tolerance=0.0)(ones, k, v, None)
      assert float(exact[0, 0, 0, 0]) in (1, 2, 4)


def test_hard_attention_has_no_gradient():
  q, k, v, _ = operands(0)
  with pytest.raises(ConfigError, match='AveragingHard.* no gradient; train with a softmax'):
    jax.grad(lambda v: AveragingHard()(q, k, v, None).sum())(v)
  with pytest.raises(ConfigError, match='kernel.tolerance = 1.0'):
    AveragingHard(tolerance=1.0)


def test_no_cache_is_read_by_it():
  """Decoding would answer by a softmax."""
  model = parts.looped(parts.plain(1, kernel=AveragingHard()))
  with pytest.raises(ConfigError, match='cache: its attention .* is no softmax, by which caches are read'):
    jax.eval_shape(lambda p: model.apply({'params': p}, parts.tokens(1, 4), parts.padded(1), kv=model.cache(1, 4)),
                   parts.shapes(model))


# Norms and numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('norm', [RMSNorm(1e-6), LayerNorm(1e-6)], ids=['rms', 'layer'])
def test_a_masked_norm(norm):
  """Ones: the plain norm. A block of the state: the unit vector of the number in it, whether psi or phi is stored."""
  of, x = MaskedNorm(norm), jax.random.normal(jax.random.key(0), (3, 12))
  params = of.init(jax.random.key(0), x)['params']
  inner = next(value for name, value in params.items() if name != 'mask')
  np.testing.assert_array_equal(of.apply({'params': params}, x), norm.apply({'params': inner}, x))
  masked = {**params, 'mask': (jnp.arange(12) // 4 == 1).astype(jnp.float32)}
  numbers = np.array([-2.0, 0.0, 7.0])
  for stored in (psi, phi):
    read = of.apply({'params': masked}, x.at[:, 4:8].set(stored(numbers)))
    np.testing.assert_allclose(read[:, 4:8] / np.sqrt(12), phi(numbers), atol=1e-5)
    np.testing.assert_allclose(np.delete(read, np.s_[4:8], 1), 0, atol=1e-6)
  assert jax.tree.leaves(jax.grad(lambda p: of.apply({'params': p}, x)[0, 0])(params)['mask'].any()) == [True]


def test_the_hash_tells_all_numbers_apart():
  found = phi(np.arange(1001.0))
  np.testing.assert_allclose((found ** 2).sum(-1), 1, rtol=1e-15)
  likeness = found @ found.T
  assert found.dtype == np.float64 and np.abs(likeness.diagonal() - 1).max() < 1e-15
  assert (1 - likeness[~np.eye(1001, dtype=bool)]).min() > 1e-13
  np.testing.assert_allclose(1 - likeness[10, 11], 0.5e-4, rtol=0.25)
  np.testing.assert_allclose(phi(3.0, 4.0), phi(0.75), rtol=1e-15)  # of ratios
  np.testing.assert_array_equal(psi(3.0, 4.0), [3, 4, -3, -4])


# The construction ----------------------------------------------------------------------------------------------------


def closure(adjacency):
  """bool[B, n, n]: what is reached, vertex by vertex (Warshall)."""
  found = adjacency.astype(bool) | np.eye(adjacency.shape[-1], dtype=bool)
  for via in range(adjacency.shape[-1]):
    found = found | found[:, :, via, None] & found[:, None, via]
  return found


def answers(adjacency, loops=None):
  """What the model says, after as many loops as it has for n, or fewer."""
  n, batch = adjacency.shape[-1], constructed.batch(adjacency)
  model, weights = constructed.model(n), constructed.weights(n)
  plan = constructed.plan(n)(parts.plan_context(jax.random.key(0), batch))
  if loops is not None:
    plan = plan.replace(active=plan.active & (jnp.arange(plan.steps)[:, None] < loops))
  trace = parts.forward(model, weights, batch['tokens'], plan)
  return constructed.reached(parts.logits(model, weights, trace.z))


def path(n):
  return np.eye(n, k=1, dtype=int)[None]


def test_all_graphs_of_three_vertices():
  graphs = np.array(list(itertools.product((0, 1), repeat=9))).reshape(-1, 3, 3)
  assert len(graphs) == 512
  np.testing.assert_array_equal(answers(graphs), closure(graphs))


@pytest.mark.parametrize('n', [2, 4, 6])
def test_random_graphs(n):
  """p = 1/n, paths, and the fewest and most edges, with ceil(log2 n) loops; ceil(log2(n - 1)) find the path of n
  vertices, and without the last of these, paths longer than 2^loops are missed."""
  random = np.random.default_rng(n).random((20, n, n)) < 1 / n
  path = np.eye(n, k=1, dtype=int)[None]
  graphs = np.concatenate([path, random, path[:, ::-1, ::-1], np.zeros((1, n, n)), np.ones((1, n, n))])
  found = closure(graphs)
  assert 0.2 < found[1:21].mean() < 0.9
  np.testing.assert_array_equal(answers(graphs), found)
  needed = math.ceil(math.log2(n - 1))
  np.testing.assert_array_equal(answers(graphs, needed)[0], found[0])
  if needed > 1:
    i, j = np.indices((n, n))
    np.testing.assert_array_equal(answers(graphs, needed - 1)[0], (i <= j) & (j - i <= 2 ** (needed - 1)))


# Loops as depth ------------------------------------------------------------------------------------------------------


def test_a_loop_is_a_deeper_net_of_the_same_weights():
  """(s, r, t) = (1, 2, 1), three loops, against 1 + 2 * 3 + 1 layers: bit for bit."""
  block = parts.block(RMSNorm())
  options = dict(read_in=TokenEmbed(vocab=7, width=D, length=8), read_out=Head(outputs=7))
  model = Looped(cell=Plain(Stack(block, 2)), prelude=Stack(block, 1), coda=Stack(block, 1), loops=3, **options)
  deep = Looped(cell=Plain(Stack(block, 8)), loops=1, **options)
  weights = parts.params(model)
  layers = [weights['prelude'], *[weights['cell']['core']] * 3, weights['coda']]
  joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *layers)
  copied = {'read_in': weights['read_in'], 'read_out': weights['read_out'], 'cell': {'core': joined}}
  tokens = jnp.arange(12).reshape(2, 6) % 7
  loop, stack = (parts.forward(of, p, tokens, plans.Uniform(n)(None)).z for of, p, n in
                 ((model, weights, 3), (deep, copied, 1)))
  np.testing.assert_array_equal(loop, stack)
  turned = jax.tree.map(lambda leaf: leaf[::-1], joined)
  other = parts.forward(deep, {**copied, 'cell': {'core': turned}}, tokens, plans.Uniform(1)(None)).z
  assert np.abs(other - stack).max() > 1e-3


def test_rows_with_fillers_take_the_steps_of_their_size():
  form = Filled(of=Prefixes(of=BITS), fillers=Power(power=2))
  batch = batch_of(form, [BITS.draw(np.random.default_rng(0), n) for n in (1, 2, 3, 5)])
  context = parts.plan_context(jax.random.key(0), batch)
  assert plans.LogDepth(size=5, rows=form.length)(context).active.sum(0).tolist() == [1, 1, 2, 3]
  with pytest.raises(ConfigError, match='LogDepth.size = 5: the rows of the batch have 31 tokens.* LogDepth.rows'):
    plans.LogDepth(size=5)(context)
  with pytest.raises(ConfigError, match='LogDepth.rows = 30: the rows of the batch have 31 tokens'):
    plans.LogDepth(size=5, rows=30)(context)
  for rows in (4, 2.5):
    with pytest.raises(ConfigError, match=f'LogDepth.rows = {rows}'):
      plans.LogDepth(size=5, rows=rows)


# Fillers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('form, query', [(Prefixes(of=BITS), 1), (Prefixes(of=BITS), 0), (Asked(of=GRAPHS), 2),
                                         (Chain(of=Regular(longest=4, automaton=PARITY)), 1),
                                         (Asked(of=dataclasses.replace(BITS, shortest=3)), 3)])
def test_fillers_stand_before_the_query(form, query):
  """Without them examples are those of the form: tokens, what is asked for, and of what."""
  filled = Filled(of=form, fillers=Power(power=1.5), query=query)
  assert filled.length == form.length + filled.count(form.of.room)
  for seed in range(6):
    problem = form.of.problem(np.random.default_rng(seed))
    made, plain, count = filled.example(problem), form.example(problem), int(np.ceil(problem.size ** 1.5))
    place, n = len(problem.prompt) - query, filled.length
    names = {name: np.array([*(filled.symbols[i] for i in made[name])]) for name in ('tokens', 'targets')}
    own = np.r_[:place, place + count:form.length + count]
    assert (names['tokens'][place:place + count] == FILLER).all() and (names['tokens'] == FILLER).sum() == count
    for name in names:
      assert [*names[name][own]] == [form.symbols[i] for i in plain[name]]
      assert (names[name][form.length + count:] == '<end>').all()
    np.testing.assert_array_equal(made['weights'][own], plain['weights'])
    assert made['weights'].sum() == plain['weights'].sum() and made['weights'].shape == (n,)
    np.testing.assert_array_equal(made['positions'], np.arange(n))
    segments = plain.get('segments', np.ones(form.length))
    np.testing.assert_array_equal(made['segments'][own], segments)
    assert made['segments'][place:place + count].all() and not made['segments'][form.length + count:].any()
    assert set(made) == {*plain, 'segments'} and made.get('size', 0) == plain.get('size', 0)


def test_fillers_among_several_tasks_and_parts_of_solutions():
  several = Several(of={'A': BITS, 'B': dataclasses.replace(BITS, longest=7, room=None, limit=None)})
  assert Filled(of=Asked(of=several), fillers=Power(power=1)).length == Asked(of=several).length + 7
  form = Chain(of=Selected(of=BITS, rounds=1))
  assert Filled(of=form, fillers=3).length == form.length + 3


def test_denoisers_read_fillers_where_they_stand():
  form = Filled(of=Slots(of=BITS), fillers=3)
  made = form.example(BITS.draw(np.random.default_rng(0), 2))
  given = made['weights'] == 0
  np.testing.assert_array_equal(made['targets'][given], made['tokens'][given])
  assert (made['targets'] == form.symbols.index(FILLER)).sum() == 3


def test_how_many_fillers():
  assert [Power(power=3).count(n) for n in (1, 2, 3, 8)] == [1, 8, 27, 512]
  assert [Power(power=0.5, scale=2).count(n) for n in (1, 4, 5)] == [2, 4, 5]
  assert [Power(power=1, scale=0.1).count(n) for n in (10, 11, 30)] == [1, 2, 3]  # no rounding up of 3.0000000000000004
  nothing = Filled(of=Asked(of=GRAPHS), fillers=0, query=2)
  assert nothing.length == 18 and nothing.symbols[-2:] == (FILLER, '<end>')


BOTH = parts.block(RMSNorm(), kernel=kernels.Bidirectional())  # padding lies right of the problem
MODEL = Looped(read_in=TokenEmbed(vocab=5, width=D, length=12), cell=Plain(Stack(BOTH, 1)), loops=2)
FILLED = Filled(of=Prefixes(of=BITS), fillers=3)


@jax.jit
def passed(batch):
  """Answers f32[B, T, V], and the loss."""
  weights = parts.params(MODEL)
  trace = run_batch(MODEL, weights, batch, plans.Uniform(2)(None))
  readout = make_readout(MODEL, weights, batch)
  term = CE(roll='all')
  return readout.logits(trace.z), term({'all': trace}, batch, readout, weights) / term.weight(batch)


def test_fillers_are_read_and_padding_is_not():
  """Another token in the place of a filler changes all answers; in that of padding, none. The loss hears of
  neither's targets, and of every token that is asked for."""
  problem = BITS.draw(np.random.default_rng(0), 3)
  made = FILLED.example(problem)
  assert made['segments'].tolist() == [1] * 7 + [0] * 2
  batch = jax.tree.map(lambda row: jnp.asarray(row)[None], made)
  plain, loss = passed(batch)

  def changed(name, place, value):
    return passed({**batch, name: batch[name].at[0, place].set(value)})

  for place in (3, 4, 5):
    logits, other = changed('tokens', place, 0)
    assert (np.abs(logits - plain)[0, [0, 1, 2, 6]].max(-1) > 1e-3).all()
    assert other != loss and changed('targets', place, 0)[1] == loss
  for place in (7, 8):
    logits, other = changed('tokens', place, 0)
    np.testing.assert_array_equal(logits[0, :7], plain[0, :7])
    assert other == loss and changed('targets', place, 0)[1] == loss
  for place in (0, 1, 2, 6):
    assert changed('targets', place, 1 - made['targets'][place])[1] != loss
  without, _ = passed(jax.tree.map(lambda row: jnp.asarray(row)[None], dataclasses.replace(FILLED, fillers=0).example(
      problem) | {'size': np.int32(3)}))
  assert np.abs(without[0, 3] - plain[0, 6]).max() > 1e-3


def test_fillers_before_the_input():
  form = Filled(of=Asked(of=GRAPHS), fillers=4, query=2, first=True)
  made = form.example(form.of.of.draw(np.random.default_rng(0), 4))
  assert (made['tokens'][:4] == form.symbols.index(FILLER)).all() and made['weights'].nonzero()[0] == [21]
  with pytest.raises(ConfigError, match='Filled.first = True: attention is causal.* set Filled.first to False'):
    check_order(form, causal=True)
  check_order(form, causal=False)
  check_order(dataclasses.replace(form, first=False), causal=True)


@pytest.mark.parametrize('make, message', [
    (lambda: Power(power=-1.0), 'fillers.power = -1.0'), (lambda: Power(power=float('nan')), 'fillers.power = nan'),
    (lambda: Power(power=1.0, scale=0.0), 'fillers.scale = 0.0'),
    (lambda: Power(power=6.0).count(11), 'fillers of a problem of size 11 = 1771561: lower fillers.power'),
    (lambda: Power(power=6.0, scale=1e300).count(10 ** 6), 'fillers of a problem of size 1000000 = inf: lower'),
    (lambda: Filled(of=Prefixes(of=BITS), fillers=-1), 'Filled.fillers = -1'),
    (lambda: Filled(of=Prefixes(of=BITS), fillers=2.0), 'Filled.fillers = 2.0'),
    (lambda: Filled(of=Prefixes(of=BITS), fillers=2, query=-1), 'Filled.query = -1'),
    (lambda: Filled(of=Prefixes(of=BITS), fillers=2, query=2).example(BITS.solved([1])),
     'Filled.query = 2: a problem of size 1 has 2 tokens, none'),
    (lambda: Filled(of=Rounds(of=BITS), fillers=2).example(BITS.solved([1])), 'Filled.of = Rounds: .* rows of round'),
    (lambda: Asked(of=dataclasses.replace(BITS, longest=3, room=3)).example(BITS.draw(np.random.default_rng(0), 5)),
     'Word.room: a problem of size 5 has 6 tokens, but rows have 4'),
    (lambda: Connectivity(shortest=1, longest=4), 'Connectivity.shortest = 1'),
    (lambda: Connectivity(shortest=4, longest=4, distance=4), 'Connectivity.distance = 4'),
    (lambda: Connectivity(shortest=4, longest=4, edges=0.0), 'Connectivity.edges = 0.0'),
    (lambda: Connectivity(shortest=4, longest=4, edges=100.0, distance=2).problem(np.random.default_rng(0)),
     'Connectivity.edges = 100.0: none of 10000 graphs of 4 vertices has a pair of vertices at distance 2'),
    *((lambda ends=ends: GRAPHS.solved(np.zeros((3, 3)), *ends), f'start = {ends[0]}, end = {ends[1]}: .* 0..2')
      for ends in ((1, 1), (0, 3), (-1, 0))),
    (lambda: GRAPHS.solved(np.zeros((3, 2)), 0, 1), r'adjacency: its shape is \(3, 2\)'),
    (lambda: GRAPHS.solved(np.full((3, 3), 2), 0, 1), 'of 0 and 1'),
    (lambda: constructed.model(0), 'vertices = 0'), (lambda: constructed.model(2.0), 'vertices = 2.0'),
])
def test_what_cannot_be(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


# Graphs --------------------------------------------------------------------------------------------------------------


def searched(problem, n, limit):
  """(start, end, edges of the shortest path or None) of a problem's tokens, by breadth first search."""
  cells = np.array([int(cell) for cell in problem.prompt[:n * n]]).reshape(n, n)
  start, end = int(problem.prompt[-2][1:]), int(problem.prompt[-1][1:])
  at = {start: 0}
  for vertex in (queue := [start]):
    for other in np.flatnonzero(cells[vertex]).tolist():
      if other not in at:
        at[other] = at[vertex] + 1
        queue.append(other)
  return cells, start, end, at.get(end)


def test_a_graph_without_edges_leads_nowhere():
  problem = GRAPHS.solved(np.zeros((3, 3)), 0, 2)
  assert problem.answer == '-' and problem.prompt == (*'000000000', 's0', 't2')
  assert GRAPHS.solved(np.eye(3, k=1), 0, 2).answer == '+'


@pytest.mark.parametrize('directed', [False, True])
@pytest.mark.parametrize('distance', [None, 0, 1, 3])
def test_problems_of_connectivity(directed, distance):
  of = Connectivity(shortest=5, longest=7, distance=distance, directed=directed)
  found = []
  for seed in range(120):
    problem = of.problem(np.random.default_rng((1, seed)))
    cells, start, end, steps = searched(problem, problem.size, of.limit)
    assert problem.answer == ('-' if steps is None else '+') and start != end and not cells.diagonal().any()
    assert directed or (cells == cells.T).all()
    assert distances(cells)[start, end] == (-1 if steps is None else steps)
    found.append(steps)
  if distance is None:
    assert 0.35 < np.mean([steps is None for steps in found]) < 0.65 and len(set(found)) > 3
  else:
    assert set(found) == {distance or None}


# The configuration, and its study ------------------------------------------------------------------------------------


def test_the_configuration_of_two_cores():
  """Sheet, section 9: parity of 16 bits, one causal layer of width 32 with 4 heads, the input in every loop."""
  config = padded.get_config('')
  assert isinstance(config.task.of, Filled) and config.task.of.fillers == 0 and config.train.batch == 64
  assert (config.task.of.of.of.longest, config.task.of.of.of.shortest, config.model.read_in.width) == (16, 16, 32)
  core = config.model.cell.core
  assert core.depth == 1 and config.model.cell.injects and core.block.attn.heads == 4
  assert core.block.attn.kernel.causal and config.optim.schedule.peak == 5e-3
  log, fixed = (padded.get_config(f'cpu,loops={loops},lengths=doubling') for loops in ('log', '4'))
  assert parts.shapes(log.model) == parts.shapes(fixed.model) and log.model.loops == 4
  every = padded.SIZES['cpu'].every * 64
  source = log.task.source('train', 0)
  assert [int(source[stage * every]['size']) for stage in range(6)] == [2, 4, 8, 16, 16, 16]
  deep = padded.get_config('cpu,loops=4,untied=1')
  assert deep.model.cell.core.depth == 4 and deep.model.loops == 1
  assert padded.get_config('gpu').objective.rolls['all'].plan.loops(64) == 8


@pytest.mark.parametrize('argument', ['cpu,loops=log,lengths=doubling,fillers=3',
                                      'cpu,task=connectivity,fillers=n^2,loops=log,mask=1'])
def test_the_loss_of_a_configuration(argument):
  config = padded.get_config(argument)
  configs.check(config)
  source = config.task.source('train', 0)
  batch = {name: np.stack([source[i][name] for i in (0, 1)]) for name in source[0]}
  context = parts.plan_context(jax.random.key(0), batch)
  loss, _ = jax.eval_shape(lambda p: config.objective(config.model, p, context, config.objective.denominators(batch)),
                           parts.shapes(config.model))
  assert loss.shape == () and batch['tokens'].shape[1] == config.task.length == config.model.read_in.length


def test_more_fillers_than_positions():
  config = configs.override(padded.get_config('cpu,task=connectivity,fillers=4'), 'task.of.fillers=40')
  with pytest.raises(ConfigError, match='task.length = 67 is more than model.read_in.length = 31, the positions'):
    configs.check(config)


@pytest.mark.parametrize('argument, message', [
    ('cpu,place=first', 'Filled.first = True: attention is causal'), ('cpu,loops=0', 'Uniform.loops = 0'),
    ('cpu,fillers=n^9', 'fillers.power = 9.0: must be a finite number, 0 or more and at most 6'),
    ('cpu,loops=many', "config argument loops = 'many'"), ('cpu,fillers=n^x', r"config argument fillers = 'n\^x'"),
    ('cpu,fillers=1.5', "config argument fillers = '1.5'"), ('cpu,fillers=-1', 'Filled.fillers = -1'),
    ('cpu,task=words', "config argument task = 'words'"), ('cpu,place=last', 'place'), ('cpu,lengths=all', 'lengths'),
    ('tiny', 'size'), ('cpu,attention=none', 'attention')])
def test_arguments_that_cannot_be(argument, message):
  with pytest.raises(ConfigError, match=message):
    padded.get_config(argument)


def test_fillers_first_where_all_is_read():
  config = padded.get_config('cpu,task=connectivity,fillers=2,place=first')
  assert config.task.of.first and all(of.first for of in config.task.tests.values())


def test_how_far_accuracies_reach():
  assert study.reached([1, 0.95, 0.9, 0.96, 0.5]) == 4 and study.reached([0.5, 0.9499]) == 0
  assert study.reached([1.0]) == 1 and study.reached([1, 0.9, 0.8], 0.85) == 2


@pytest.mark.parametrize('words', [70, 5])
def test_what_the_study_measures(words, monkeypatch):
  """Accuracy by index against an argmax by hand, of letters alone: neither the query nor fillers count."""
  of = dataclasses.replace(BITS, shortest=5)
  task = Generated(of=dataclasses.replace(FILLED, of=Prefixes(of=of)), held_out=words)
  weights, rolls = parts.params(MODEL), {'all': SimpleNamespace(plan=plans.LogDepth(size=5, scale=0.5, rows=9))}
  config = SimpleNamespace(task=task, objective=SimpleNamespace(rolls=rolls))
  monkeypatch.setattr(study.loopformer, 'load', lambda folder: Loaded(MODEL, weights, None, config))
  monkeypatch.setattr(study, 'REPEATS', 1)
  found = study.measure('folder')
  source = task.source('validation', 0)
  batch = {name: np.stack([source[i][name] for i in range(words)]) for name in source[0]}
  logits, _ = passed(batch)  # two loops, as LogDepth takes
  right = (np.asarray(logits).argmax(-1) == batch['targets'])[:, :5].mean(0)
  np.testing.assert_allclose(found['by index'], right)
  assert found['accuracy'] == pytest.approx(right.mean()) and found['last'] == right[4]
  assert found['n*'] == study.reached(right) and found['ms'] > 0
  assert (found['loops'], found['layers in order']) == (2, 2)
  assert found['MFLOP'] == pytest.approx(9 * MODEL.flops(9, 2) / 1e6)


def test_the_study(monkeypatch, tmp_path, capsys):
  runs = []
  flags = SimpleNamespace(size='cpu', task='parity', seeds=['0', '3'], workdir=str(tmp_path / 'runs'),
                          out=str(tmp_path / 'out'))
  names = {'size': 'cpu', 'task': 'parity', 'set': ['train.steps=5']}
  monkeypatch.setattr(study, 'FLAGS', type('Flags', (), {'__getitem__': lambda self, name: SimpleNamespace(
      value=names[name]), **vars(flags)})())
  monkeypatch.setattr(study, 'check_command', lambda *allowed: None)
  monkeypatch.setattr(study.command, 'own', lambda *read, **more: None)
  monkeypatch.setattr(study.command, 'train', lambda spec, folder, *changes: runs.append((spec, folder.name, changes)))
  monkeypatch.setattr(study, 'measure', lambda folder: {
      'n*': len(runs), 'accuracy': 0.5, 'last': 0.5, 'loops': 1, 'layers in order': 1, 'MFLOP': 1.0, 'ms': 1.0,
      'by index': [1.0, 0.0]})
  study.main([])
  arms = study.arms(16)
  assert len(runs) == 14 and len({folder for _, folder, _ in runs}) == 14 and len(arms) == 7
  for spec, _, changes in runs:
    path, argument = spec.split(':')
    padded.get_config(argument)
    assert path == study.CONFIG and argument.startswith('cpu,task=parity,') and changes[0] == 'train.steps=5'
  assert [changes[-1] for *_, changes in runs] == ['train.seed=0'] * 7 + ['train.seed=3'] * 7
  results = json.loads((tmp_path / 'out/results.json').read_text())
  assert list(results) == ['0', '3'] and list(results['3']) == list(arms) and results['3']['1 loop']['n*'] == 8
  assert len((tmp_path / 'out/table.md').read_text().splitlines()) == 2 + 14
  names['task'] = 'connectivity'
  with pytest.raises(SystemExit, match='--task=connectivity: there is no .connectivity. here; choose from parity'):
    study.main([])
