"""Chains in part, searches of graphs, counts and colourings: generators against brute force, worked examples token for
token, estimates against their formulas, and what is refused."""
import dataclasses
from fractions import Fraction
import itertools

import numpy as np
import pytest

from loopformer import config as configs
from loopformer.tasks import counting
from loopformer.tasks.arithmetic import Arithmetic
from loopformer.tasks.counting import Colouring, Count, Trials
from loopformer.tasks.edit_distance import EditRows
from loopformer.tasks.generated import Generated, Grow, Rise
from loopformer.tasks.graph_search import Reachable, ReachableByEdges, search
from loopformer.tasks.increasing import Increasing
from loopformer.tasks.reasoning import Asked, Chain, Several
from loopformer.tasks.shortened import Internalised, Selected, selected, stages
from loopformer.tasks.words import Cyclic, Prefixes, Symmetric, Word
from loopformer.types import ConfigError

WORD = Word(shortest=6, longest=6, group=Symmetric(degree=3))
GRAPHS = Reachable(shortest=5, longest=8)
SOURCES = {'word': WORD, 'arithmetic': Arithmetic(longest=3, modulus=3), 'edit': EditRows(longest=6, using=2),
           'graph': GRAPHS, 'graph by edges': ReachableByEdges(shortest=5, longest=8), 'trials': Trials(longest=4),
           'count': Count(longest=4), 'colouring': Colouring(longest=5)}
every = pytest.mark.parametrize('name', SOURCES)


def rng(*words):
  return np.random.default_rng(words)


def many(of, count=60):
  return [of.problem(rng(0, i)) for i in range(count)]


def texts(problems):
  return [' '.join((*sum(problem.rounds, ()), problem.answer)) for problem in problems]


# All sources ---------------------------------------------------------------------------------------------------------


@every
def test_problems_fit_their_extent_and_their_symbols(name):
  """What a row has place for, no symbol twice, and none that is the padding."""
  of, shown = SOURCES[name], Chain(of=SOURCES[name])
  extent = of.extent
  assert len(set(shown.symbols)) == len(shown.symbols) and shown.symbols[shown.pad] == '<end>'
  for problem in many(of):
    assert len(problem.prompt) <= extent.prompt and len(problem.rounds) <= extent.rounds
    assert max(map(len, problem.rounds), default=0) <= extent.round and sum(map(len, problem.rounds)) <= extent.chain
    assert shown.pad not in shown.ids((*problem.prompt, *sum(problem.rounds, ()), problem.answer))
  assert texts([of.draw(rng(3), of.longest)]) == texts([of.draw(rng(3), of.longest)])  # an index is an example


@every
def test_what_is_asked_for_stands_after_the_problem(name):
  """An answer is a target at the last token, or thought, of its problem, and nowhere an input before it."""
  of = SOURCES[name]
  for thoughts in (0, 3):
    form = Asked(of=of, thoughts=thoughts)
    for problem in many(of, 20):
      made, count = form.example(problem), len(problem.prompt)
      place, = np.flatnonzero(made['weights'])
      assert place == count + thoughts - 1 and form.symbols[made['targets'][place]] == problem.answer
      assert [form.symbols[i] for i in made['tokens'][:count]] == list(problem.prompt)
      assert set(made['tokens'][count:]) <= {form.pad} and made['segments'].sum() == count + thoughts
      assert made['size'] == problem.size
  with pytest.raises(ConfigError, match=r'\w+\.room: a problem of size \d+ has \d+ tokens, but rows have 3'):
    Asked(of=of, length=3).example(of.draw(rng(0), of.longest))
  with pytest.raises(ConfigError, match='Asked.thoughts = -1'):
    Asked(of=of, thoughts=-1)


# Traces in part ------------------------------------------------------------------------------------------------------


def test_rounds_are_selected_evenly():
  assert [selected(6, k) for k in range(7)] == [[], [0], [0, 5], [0, 2, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [*range(6)]]
  for count, kept in ((31, 23), (46, 34), (127, 64)):  # 30 * 11 / 22 is 15, and no 14.99..
    assert selected(count, kept) == [int(Fraction(i * (count - 1), kept - 1)) for i in range(kept)]
  whole, some, none = (Selected(of=WORD, rounds=k) for k in (9, 3, 0))
  for problem, kept, cut, bare in zip(many(WORD), many(whole), many(some), many(none)):
    assert kept == problem and cut.rounds == tuple(problem.rounds[t] for t in (0, 2, 5))
    assert bare == dataclasses.replace(problem, rounds=()) and cut.answer == problem.answer
  assert Chain(of=some).length == 7 + 3 + 1 and Chain(of=none).length == 7 + 1 and Chain(of=whole) != Chain(of=some)
  made = Chain(of=none).example(many(none, 1)[0])
  assert (made['weights'] > 0).sum() == 2  # the answer and the end
  with pytest.raises(ConfigError, match='Selected.rounds = -1: 0 leaves the answer alone'):
    Selected(of=WORD, rounds=-1)


def test_what_is_told_in_part_is_a_source_like_the_one_in_it():
  of = Several(of={'A': WORD, 'B': GRAPHS}, weights={'B': 2.0})
  for part in (Selected(of=of, rounds=2), Internalised(of=of)):
    problem = part.draw(rng(0), 6, 'B')
    assert part.symbols == of.symbols and part.tasks == of.tasks and part.weight('B') == 2 and problem.task == 'B'
    assert part.concluded((('N',),), 'B') is None
  for part in (Selected(of=of, rounds=of.extent.rounds), Internalised(of=of, stage=1, smoothing=np.inf)):
    assert part.concluded((('N',),), 'B') == 'FALSE'


@pytest.mark.parametrize('of',
                         [WORD, GRAPHS, Increasing(longest=17, shortest=8, group=4, spread=9), EditRows(longest=6)],
                         ids=lambda of: type(of).__name__)
def test_rounds_in_part_lead_to_no_other_answer(of):
  cut = (Internalised(of=of, smoothing=smoothing) for smoothing in (0.5, np.inf))
  for part in (*(Selected(of=of, rounds=k) for k in (0, 1, 2, 99)), *cut):
    for problem in many(part):
      assert part.concluded(problem.rounds) == (problem.answer if part.whole else None)


def test_what_is_no_product_is_no_answer():
  assert WORD.concluded((('0',), ('=',))) is None and WORD.concluded((('0',),)) == '0'


def test_stages_of_internalisation():
  assert stages(170) == [170, 154, 138, 122, *range(114, 9, -8), 8]
  assert stages(128)[:2] == [128, 120] and stages(8) == [8] and stages(5) == [5]


def test_internalised_traces_lose_their_first_tokens():
  of = Word(shortest=20, longest=20, group=Cyclic(degree=2))
  whole = many(of)
  for stage, lost in enumerate((0, 8, 12), 1):
    part = Internalised(of=of, stage=stage, smoothing=np.inf)
    for problem, told in zip(whole, many(part)):
      assert told == dataclasses.replace(problem, rounds=problem.rounds[lost:])
  assert Internalised(of=of).stage == 3
  part = Internalised(of=EditRows(shortest=6, longest=6, using=2), stage=2, smoothing=np.inf)  # of several tokens
  for problem, told in zip(many(part.of), many(part)):
    flat = sum(problem.rounds, ())
    assert sum(told.rounds, ()) == flat[8:] and all(told.rounds) and told.rounds[-1] == problem.rounds[-1]


def test_a_stage_comes_as_no_surprise():
  """Shares of problems that lose o tokens more: (1 - e^-s) e^(-s o)."""
  part = Internalised(of=WORD, stage=1, smoothing=0.7)
  lost = np.bincount([6 - len(problem.rounds) for problem in many(part, 4000)], minlength=7)[:5] / 4000
  np.testing.assert_allclose(lost, (1 - np.exp(-0.7)) * np.exp(-0.7 * np.arange(5)), atol=0.03)


def test_stages_follow_one_another_in_rows_of_one_shape():
  of = Word(shortest=20, longest=20, group=Cyclic(degree=2))
  task = Generated(of=Chain(of=Internalised(of=of, smoothing=np.inf)),
                   grow=Grow(fields={'of/stage': Rise(first=1, every=10)}))
  source = task.source('train', 0)
  assert [int((source[i]['weights'] > 0).sum()) for i in (0, 9, 10, 19, 20, 500)] == [22, 22, 14, 14, 10, 10]


@pytest.mark.parametrize('options, message', [
    (dict(stage=0), r'Internalised.stage = 0: traces of 6 tokens have so many; set Internalised.stage to 1 to 1'),
    (dict(stage=2), 'Internalised.stage = 2'), (dict(smoothing=0.0), 'Internalised.smoothing = 0.0'),
    (dict(of=Count(longest=3)), 'Internalised.of: its problems have no rounds')])
def test_stages_that_there_are_not(options, message):
  with pytest.raises(ConfigError, match=message):
    Internalised(**{'of': WORD, **options})


@pytest.mark.parametrize('smoothing', [1e-300, 1e-17, 1e-9])
def test_hardly_any_smoothing_leaves_nothing(smoothing):
  assert not any(problem.rounds for problem in many(Internalised(of=WORD, stage=1, smoothing=smoothing)))


def test_no_smoothing_can_be_told_in_a_configuration(tmp_path):
  """Where numbers are finite."""
  config = configs.load('cot_or_loop:cpu,internalise=5', ['task.of.of.smoothing=None'])
  configs.check(config)
  configs.save(config, tmp_path)
  of = configs.read(tmp_path).task.of.of
  assert of.smoothing is None and many(of) == many(dataclasses.replace(of, smoothing=np.inf))
  assert [dataclasses.replace(of, stage=1, smoothing=s).whole for s in (None, np.inf, 4.0)] == [True, True, False]


def test_a_trace_longer_than_the_row_is_refused():
  problem = GRAPHS.draw(rng(0), 8)
  with pytest.raises(ConfigError, match='Chain.length = 12: a problem of size 8 with its trace has'):
    Chain(of=GRAPHS, length=12).example(problem)


# Graphs --------------------------------------------------------------------------------------------------------------


def test_a_search_token_for_token():
  problem = Reachable(longest=6).solved([(0, 2), (0, 4), (1, 2), (3, 5)], 0, 1, 6)
  assert ' '.join(problem.prompt) == '0 2 | 0 4 | 1 2 | 3 5 | ? 0 1'
  assert [' '.join(each) for each in problem.rounds] == ['N 0', '0 2 0 4 0 N', '2 0 2 1'] and problem.answer == 'TRUE'
  apart = Reachable(longest=6).solved([(0, 2), (0, 4), (1, 2), (3, 5)], 3, 1, 6)
  assert [' '.join(each) for each in apart.rounds] == ['N 3', '3 5 3 N', '5 3 5 N'] and apart.answer == 'FALSE'
  other = ReachableByEdges(longest=6).solved([(0, 2), (3, 5)], 2, 0, 6)
  assert ' '.join(other.prompt) == '0 1 2 3 4 5 0,2 3,5 2,0' and other.rounds == () and other.answer == 'TRUE'


def test_searches_end_at_what_can_be_reached():
  """Against the closure of the graph's matrix."""
  for problem in many(GRAPHS, 200):
    n = problem.size
    linked = np.eye(n, dtype=bool)
    bar = problem.prompt.index('?')
    for u, v in np.array(problem.prompt[:bar]).reshape(-1, 3)[:, :2].astype(int):
      linked[u, v] = linked[v, u] = True
    start, end = map(int, problem.prompt[bar + 1:])
    reachable = np.linalg.matrix_power(linked.astype(int), n)[start, end] > 0
    last = problem.rounds[-1][-1]
    assert (problem.answer == 'TRUE') == reachable == (last == str(end)) and (last == 'N') != reachable
    assert GRAPHS.concluded(problem.rounds) == problem.answer
    pairs = [pair for each in problem.rounds for pair in zip(each[::2], each[1::2])]
    assert all(linked[int(u), int(v)] for u, v in pairs if 'N' not in (u, v))
    told = [int(u) for u, v in pairs if v == 'N']
    assert len(set(told)) == len(told)  # every vertex is expanded once
  assert search([], 0, 1) == ((('N', '0'), ('0', 'N')), False)
  assert search([(1, 2), (0, 2)], 2, 3)[0][1] == tuple('2021') + ('2', 'N')  # whatever the order of edges


def test_half_of_all_pairs_are_connected():
  of = Reachable(shortest=64, longest=64)
  problems = many(of, 200)
  assert 0.4 < np.mean([problem.answer == 'TRUE' for problem in problems]) < 0.6
  edges = np.mean([problem.prompt.count('|') for problem in problems])
  assert abs(edges - 63 * 1.7 / 2) < 1.5


@pytest.mark.parametrize('made, message', [
    (lambda: GRAPHS.solved([(0, 1)], 2, 2, 5), 'start = end = 2'),
    (lambda: GRAPHS.solved([(0, 5)], 2, 3, 5), 'give vertices 0..4, and edges'),
    (lambda: GRAPHS.solved([(1, 0)], 2, 3, 5), 'u < v'),
    (lambda: Reachable(longest=8, degree=2.5), 'edges of 2 vertices would have the probability 1.25'),
    (lambda: Reachable(longest=8, degree=0.0), 'Reachable.degree = 0.0'),
    (lambda: Reachable(longest=8, shortest=1), 'Reachable.shortest = 1'),
    (lambda: Arithmetic(longest=3, modulus=9), 'modulus = 9: division needs a prime')])
def test_problems_that_there_are_not(made, message):
  with pytest.raises(ConfigError, match=message):
    made()


# Counts --------------------------------------------------------------------------------------------------------------

FORMULA = np.array([[1, -2, 3], [-1, 2, 4], [2, 3, -5], [2, 3, 4]])


def test_counts_are_those_of_truth_tables():
  for i in range(20):
    formula = Trials(longest=9).formula(rng(i), 9)
    assert all(len({*map(abs, clause)}) == 3 for clause in formula.tolist())
    true = sum(any(all(values[abs(v) - 1] == (v > 0) for v in clause) for clause in formula.tolist())
               for values in itertools.product([False, True], repeat=5))
    assert counting.count(formula, 5) == true and Count(longest=9).solved(rng(0), formula).answer == str(true)


def test_a_trial_is_what_it_says():
  of = Trials(shortest=4, longest=4)
  assert ' '.join(of.written(FORMULA)) == '+1 -2 +3 | -1 +2 +4 | +2 +3 -5 | +2 +3 +4 | <sep>'
  for i in range(100):
    problem = of.solved(rng(i), FORMULA)
    (first, _), (*values, _), (second, _) = problem.rounds
    assert [int(v[1:]) for v in values] == [1, 2, 3, 4, 5]
    clauses = [{f'{v:+d}' for v in clause} for clause in FORMULA.tolist()]
    assert clauses[int(first[1:])] <= set(values)
    assert (problem.answer == 'Success') == (clauses[int(second[1:])] <= set(values))


def test_estimates_tend_to_what_they_should():
  """Within three standard errors, of a formula for which the two differ by a fifth."""
  of = Trials(longest=10)
  formula = of.formula(rng(1), 10)
  exact, limit = counting.count(formula, 5), counting.resampling_limit(formula, 5)
  assert abs(exact - limit) > 0.15 * exact
  for estimate, wanted in ((counting.self_adjusting, exact), (counting.resampling, limit)):
    made = np.array([estimate(rng(2, i), formula, 5, 400) for i in range(24)])
    assert made.dtype == np.float64 and made.std() < 0.3 * wanted
    assert abs(made.mean() - wanted) < 3 * made.std(ddof=1) / 24 ** 0.5 + 0.01 * wanted


def test_the_limit_of_the_published_estimate():
  """By hand: two clauses that are one, and a third; and where no assignment satisfies two, both are right."""
  twice = np.array([[1], [1], [2]])  # of 4 assignments c = 0, 2, 1, 3
  assert counting.cover(twice, 2).tolist() == [0, 2, 1, 3]
  assert counting.resampling_limit(twice, 2) == pytest.approx(36 / 14) and counting.count(twice, 2) == 3
  apart = np.array([[1, 2], [-1, 2]])
  assert counting.resampling_limit(apart, 2) == counting.count(apart, 2) == 2
  assert counting.estimate(twice, 2, 30, 12) == 2 * 30 / 12 and counting.estimate(twice, 2, 3, 0) == np.inf


@pytest.mark.parametrize('made, message', [
    (lambda: counting.count(np.zeros((0, 3), int), 5), r'formula = \[\]: it is empty'),
    (lambda: Trials(longest=3).written([]), 'it is empty'),
    (lambda: Trials(longest=3).written(np.array([[1, 2, 6]])), 'literals are 1..5'),
    (lambda: counting.count(np.array([[1, 0]]), 5), 'literals are'),
    (lambda: Trials(longest=3, width=6), 'Trials.width = 6'),
    (lambda: Trials(longest=3, variables=40), 'variables = 40'),
    (lambda: Trials(longest=3).written([[1, 2, 3], [1]]), 'its clauses have different lengths'),
    (lambda: Trials(longest=3).written(np.array([[1.5, 2, 3]])), 'literals are 1..5'),
    (lambda: Trials(longest=3).written([['a']]), 'literals are 1..5'),
    *((lambda of=of, formula=formula: of(rng(0), np.array(formula), 2, 9), message)
      for of in (counting.self_adjusting, counting.resampling)
      for formula, message in (([[1, -1]], r'its clause \[1, -1\] has a variable twice'),
                               ([[1, 2], [2, 2]], r'\[2, 2\] has a variable twice'),
                               (np.zeros((0, 2), int), 'it is empty'), ([[1, 9]], 'literals are 1..2'))),
    (lambda: counting.self_adjusting(rng(0), np.array([[1, 2]]), 2, 0), 'draws = 0'),
    (lambda: counting.resampling(rng(0), np.array([[1, 2]]), 2, -3), 'draws = -3'),
    (lambda: counting.count(np.array([[1, 2]]), 40), 'variables = 40: their assignments are counted'),
    *((lambda edges=edges: Colouring(longest=3, edges=edges), 'Colouring.edges')
      for edges in ((), ((1, 1),), ((0, 1, 2),), ((-1, 0),), ((0.5, 1),), ((0, 100_000),))),
    (lambda: Colouring(longest=3, edges=tuple((i, i + 1) for i in range(30))), r'31 vertices have 5 \^ 31 colourings'),
    (lambda: counting.total_variation([(0,)], []), 'among is empty'),
    (lambda: Colouring(longest=3, colours=3), 'Colouring.colours = 3'),
    (lambda: counting.total_variation([], [(0,)]), 'drawn is empty')])
def test_formulas_and_graphs_that_there_are_not(made, message):
  with pytest.raises(ConfigError, match=message):
    made()


# Colourings ----------------------------------------------------------------------------------------------------------


def test_glauber_chains_stay_proper():
  of = Colouring(longest=30)
  assert len(of.proper) == 60 and of.colours == 5 and of.first == (0, 1, 2)
  for problem in many(of, 30):
    state = list(of.first)
    for vertex, colour, verdict, *told in problem.rounds:
      v, c = int(vertex[1:]), int(colour[1:])
      fits = all(state[u] != c for u in range(3) if u != v)
      assert verdict == ('accept' if fits else 'refuse')
      state[v] = c if fits else state[v]
      assert told == [str(one) for one in state] and len(set(state)) == 3
    assert problem.answer == '-'.join(map(str, state)) == of.concluded(problem.rounds)
    assert of.coloured(problem.answer) == tuple(state) and ' '.join(problem.prompt) == '0 1 | 0 2 | 1 2 | <sep>'
  assert of.coloured('v1') is None and of.coloured('0-1') is None


def test_chains_come_near_the_uniform_law():
  """The exact law of a chain by its matrix: 0.50, 0.27 and 0.02 after 5, 10 and 40 steps; and samples agree."""
  of = Colouring(shortest=5, longest=5)
  number = {state: i for i, state in enumerate(of.proper)}
  move = np.zeros((60, 60))
  for state, vertex, colour in itertools.product(of.proper, range(3), range(5)):
    move[number[state], number[of.step(state, vertex, colour)]] += 1 / 15
  for steps, wanted in ((1, 0.88), (5, 0.50), (10, 0.27), (40, 0.02)):
    law = np.linalg.matrix_power(move, steps)[number[of.first]]
    assert np.abs(law - 1 / 60).sum() / 2 == pytest.approx(wanted, abs=0.02)
  law = np.linalg.matrix_power(move, 5)[number[of.first]]
  ends = np.bincount([number[of.coloured(p.answer)] for p in many(of, 3000)], minlength=60) / 3000
  assert np.abs(ends - law).sum() / 2 < 0.08


def test_total_variation():
  among = Colouring(longest=1).proper
  assert counting.total_variation(among, among) == pytest.approx(0, abs=1e-12)
  assert counting.total_variation([among[0]] * 7, among) == pytest.approx(59 / 60)
  assert counting.total_variation([None, (0, 0, 0)], among) == 1
  assert counting.total_variation([*among[:30], *[None] * 30], among) == pytest.approx(0.5)


def test_prefixes_and_thoughts_are_of_the_same_words():
  """The forms that arms are compared by show the same problems."""
  for problem in many(WORD, 5):
    assert Prefixes(of=WORD).ids(problem.prompt) == Asked(of=Selected(of=WORD, rounds=2)).ids(problem.prompt)
