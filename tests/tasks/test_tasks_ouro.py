"""The tasks of Ouro, each against an answer found another way: packed rows, Mano, multi-hop questions, pointers."""
import collections
import dataclasses

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from loopformer.tasks.generated import Generated
from loopformer.tasks.mano import Answer, Mano
from loopformer.tasks.multi_hop import HeldOut, MultiHop, Trained
from loopformer.tasks.packed import packed
from loopformer.tasks.pointers import Pointers
from loopformer.types import ConfigError

WORLD = MultiHop(entities=6, layers=4, relations=3, hops=3, share=0.5, held_out=40, length=24)
ROWS = {
    'Mano': Mano(), 'tests of Mano': Mano(shortest=10, longest=10, labels=Answer()),
    'small Mano': Mano(longest=3, modulus=5, length=10), 'questions': WORLD,
    'held-out questions': dataclasses.replace(WORLD, split=HeldOut()), 'pointers': Pointers(),
    'many pointers': Pointers(places=16, hops=9),
}
every = pytest.mark.parametrize('name', ROWS)
symbolic = pytest.mark.parametrize('name', [name for name in ROWS if ROWS[name].symbols])


def many(of, count, seed=0):
  return [of(np.random.default_rng((seed, i))) for i in range(count)]


def problems(of, made):
  """Symbols of every problem of a row, its last target included, and the places in it that are asked for."""
  found = []
  for number in range(1, made['segments'].max() + 1):
    where = np.flatnonzero(made['segments'] == number)
    np.testing.assert_array_equal(where, np.arange(where[0], where[-1] + 1))
    np.testing.assert_array_equal(made['positions'][where], np.arange(len(where)))
    np.testing.assert_array_equal(made['tokens'][where][1:], made['targets'][where][:-1])
    ids = [*made['tokens'][where], made['targets'][where[-1]]]
    found.append(([of.symbols[i] for i in ids], 1 + np.flatnonzero(made['weights'][where])))
  return found


# All -----------------------------------------------------------------------------------------------------------------


@every
def test_examples_work_as_a_task_and_repeat_by_seed(name, tmp_path):
  of = ROWS[name]
  task = Generated(of=of, held_out=8)
  batch = task.examples(tmp_path, 'validation', 0).batch(8)[0]
  for key in ('tokens', 'targets', 'weights', 'positions', *({'segments'} & batch.keys())):
    assert batch[key].shape[:2] == (8, of.length)
    assert batch[key].dtype == (np.float32 if key == 'weights' or key == 'tokens' and not of.symbols else np.int32)
  train = task.examples(tmp_path, 'train', 3)
  again, other = task.examples(tmp_path, 'train', 3)[4], task.examples(tmp_path, 'train', 4)[4]
  assert all(np.array_equal(train[4][key], again[key]) for key in again)
  assert not np.array_equal(train[4]['tokens'], other['tokens'])
  lines = []
  task.prepare(tmp_path, lines.append)
  assert len(lines) > 1 and all(line.startswith('floor: ') for line in lines)
  assert all(0 <= value <= 1 for value in of.baselines(many(of, 50)).values())


@symbolic
def test_rows_are_filled_and_padding_weighs_nothing(name):
  of = ROWS[name]
  end, longest = len(of.symbols) - 1, 0
  for made in many(of, 50):
    padding = made['segments'] == 0
    assert not made['weights'][padding].any() and (made['tokens'][padding] == end).all()
    assert (np.flatnonzero(padding) >= of.length - padding.sum()).all() and made['segments'][0] == 1
    assert end not in made['tokens'][~padding]
    longest = max(longest, padding.sum())
  assert longest < of.length / 2
  assert len(set(of.symbols)) == len(of.symbols)


def test_packing_leaves_out_what_does_not_fit_and_refuses_what_never_does():
  def lengths(*counts):
    given = iter(counts)
    return lambda: (list(range(count := next(given))), np.arange(count) == count - 1)

  made = packed(lengths(4, 3, 4), 7, 9)
  assert made['tokens'].tolist() == [0, 1, 2, 0, 1, 9, 9] and made['targets'].tolist() == [1, 2, 3, 1, 2, 9, 9]
  assert made['weights'].tolist() == [0, 0, 1, 0, 1, 0, 0] and made['segments'].tolist() == [1, 1, 1, 2, 2, 0, 0]
  assert made['positions'].tolist() == [0, 1, 2, 0, 1, 0, 1]
  assert packed(lengths(4, 5, 2), 7, 9)['segments'].tolist() == [1, 1, 1, 2, 2, 2, 2]
  with pytest.raises(ValueError, match='9 ids'):
    packed(lengths(9), 7, 9)
  with pytest.raises(ValueError, match='asked for: True'):
    packed(lambda: ([1, 2], [True, True]), 7, 9)


# Mano ----------------------------------------------------------------------------------------------------------------


def computed(words, modulus):
  """The value of a prefix expression, from its end with a stack."""
  stack = []
  for word in reversed(words):
    if word in '+-*':
      a, b = stack.pop(), stack.pop()
      stack.append({'+': a + b, '-': a - b, '*': a * b}[word] % modulus)
    else:
      stack.append(int(word))
  assert len(stack) == 1
  return stack[0]


@pytest.mark.parametrize('name', [name for name in ROWS if 'Mano' in name])
def test_mano_is_arithmetic_in_prefix_notation(name):
  of, counts = ROWS[name], collections.Counter()
  for made in many(of, 60):
    for words, asked in problems(of, made):
      bos, count, *expression, ans, value = words
      assert (bos, ans) == ('<bos>', '<ans>') and int(value) == computed(expression, of.modulus)
      operations = sum(word in '+-*' for word in expression)
      assert count == f'L{operations}' and len(expression) == 2 * operations + 1
      assert list(asked) == ([len(words) - 1] if isinstance(of.labels, Answer) else list(range(1, len(words))))
      counts[operations] += 1
  assert set(counts) == set(range(of.shortest, of.longest + 1))


def test_mano_draws_operations_operands_and_shapes_evenly():
  of = Mano(shortest=3, longest=3, modulus=7, labels=Answer())
  words = [word for made in many(of, 400) for problem, _ in problems(of, made) for word in problem[2:-2]]
  seen = collections.Counter(words)
  assert all(abs(seen[o] / sum(seen[o] for o in '+-*') - 1 / 3) < 0.01 for o in '+-*')
  assert all(abs(seen[str(i)] / sum(seen[str(i)] for i in range(7)) - 1 / 7) < 0.01 for i in range(7))
  # The first operand is at place 3 - n where n operations are on the left of the root's right side: 0, 1, 2 alike;
  # each of them puts an operation at place 1 unless none is on the left.
  second = [problem[3] in '+-*' for made in many(of, 400) for problem, _ in problems(of, made)]
  assert abs(np.mean(second) - 2 / 3) < 0.01


def test_the_example_of_the_paper_is_worked_out():
  assert computed('- * 3 5 + 7 4'.split(), 23) == (3 * 5 - (7 + 4)) % 23


def test_floors_of_mano_are_of_answers_alone():
  of = Mano(shortest=1, longest=1, modulus=5, length=60)
  made = many(of, 300)
  answers = [(int(words[-1]), int(words[-3])) for e in made for words, _ in problems(of, e)]
  values = collections.Counter(value for value, _ in answers)
  baselines = of.baselines(made)
  assert baselines['chance'] == 0.2
  np.testing.assert_allclose(baselines['most frequent'], max(values.values()) / len(answers))
  np.testing.assert_allclose(baselines['last operand'], np.mean([value == last for value, last in answers]))


@pytest.mark.parametrize('fields, message', [
    ({'shortest': 0}, 'Mano.shortest = 0'), ({'shortest': 4, 'longest': 3}, 'Mano.longest = 3'),
    ({'modulus': 1}, 'Mano.modulus = 1'), ({'longest': 10, 'length': 23}, 'Mano.length = 23.*to 24')])
def test_mano_that_does_not_fit_is_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    Mano(**fields)


# Multi-hop questions -------------------------------------------------------------------------------------------------


def facts_of(of):
  """{(entity, relation): entity}, gathered from the problems of one hop alone."""
  told = {}
  for made in many(dataclasses.replace(of, split=Trained(facts=1.0)), 200):
    for (entity, relation, equals, answer), asked in problems(of, made):
      assert equals == '=' and list(asked) == [3]
      assert told.setdefault((entity, relation), answer) == answer
  return told


@pytest.mark.parametrize('name', [name for name in ROWS if 'questions' in name])
def test_questions_chain_the_facts(name):
  of = ROWS[name]
  told = facts_of(of)
  assert len(told) == of.entities * (of.layers - 1) * of.relations
  for (entity, _), answer in told.items():
    assert int(answer[1:]) // of.entities == int(entity[1:]) // of.entities + 1
  hops = collections.Counter()
  for made in many(of, 60):
    for (entity, *relations, equals, answer), asked in problems(of, made):
      assert equals == '=' and list(asked) == [len(relations) + 2]
      hops[len(relations)] += 1
      if len(relations) > 1:
        assert int(entity[1:]) < of.entities
      for relation in relations:
        entity = told[entity, relation]
      assert entity == answer
  assert set(hops) == ({of.hops} if isinstance(of.split, HeldOut) else {1, of.hops})
  if isinstance(of.split, Trained):
    assert 0.4 < hops[1] / hops.total() < 0.7  # shorter problems fill the ends of rows


def test_held_out_questions_are_never_trained_on():
  def asked(of):
    return {tuple(words[:-2]) for made in many(of, 400) for words, _ in problems(of, made) if len(words) > 4}

  trained, held_out = asked(WORLD), asked(dataclasses.replace(WORLD, split=HeldOut()))
  assert not trained & held_out
  assert len(trained) == WORLD.trained == 81 and len(held_out) == WORLD.held_out == 40
  assert asked(dataclasses.replace(WORLD, share=0.1)) < trained  # a smaller share is a part of the larger


def test_worlds_differ():
  assert facts_of(WORLD) != facts_of(dataclasses.replace(WORLD, world=1))
  assert [WORLD.question(i) for i in range(5)] == [dataclasses.replace(WORLD).question(i) for i in range(5)]


def test_the_world_of_the_paper():
  of = MultiHop()
  assert (of.questions, of.trained, len(of.symbols)) == (800_000, 200_000, 500 + 20 + 2)
  assert of.baselines(many(of, 20))['chance'] == 0.01


@pytest.mark.parametrize('fields, message', [
    ({'layers': 3}, 'MultiHop.layers = 3.*to 4'), ({'length': 4}, 'MultiHop.length = 4'),
    ({'share': 0.9999}, 'MultiHop.share = 0.9999'), ({'share': 0.0}, 'MultiHop.share = 0.0'),
    ({'held_out': 0}, 'MultiHop.held_out = 0'), ({'split': {'facts': 1.5}}, 'MultiHop.split.facts = 1.5')])
def test_worlds_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(ConfigError, match=message):
    MultiHop(**fields | ({'split': Trained(**fields['split'])} if 'split' in fields else {}))


# Pointers ------------------------------------------------------------------------------------------------------------


def cycle_of(pointers, place):
  """The places that are met from `place` on, back to it."""
  met = [place]
  while (following := pointers[met[-1]]) != place:
    met.append(following)
  return met


@hypothesis.given(places=st.integers(2, 12), hops=st.integers(1, 9), seed=st.integers(0, 1000))
def test_pointers_are_followed_around_their_cycles(places, hops, seed):
  made = Pointers(places=places, hops=hops)(np.random.default_rng(seed))
  tokens = made['tokens']
  assert tokens.shape == (places, places + hops) and set(np.unique(tokens)) <= {0, 1}
  assert (tokens[:, :places].sum(1) == 1).all() and (tokens[:, places:].sum(1) == 1).all()
  pointers = [int(row.argmax()) for row in tokens[:, :places]]
  assert sorted(pointers) == list(range(places))
  np.testing.assert_array_equal(tokens[:, places:].argmax(1) + 1, made['hops'])
  for place in range(places):
    cycle = cycle_of(pointers, place)
    assert made['targets'][place] == cycle[made['hops'][place] % len(cycle)]
  assert (made['weights'] == 1).all() and made['hops'].dtype == np.int32


def test_floors_of_pointers():
  of = Pointers(places=8, hops=4)
  made = many(of, 2000)
  baselines = of.baselines(made)
  assert baselines['chance'] == 1 / 8
  hops = np.concatenate([e['hops'] for e in made])
  np.testing.assert_allclose(np.bincount(hops)[1:] / len(hops), 0.25, atol=0.02)
  # One jump is right for h = 1, and by chance for the others: pi^(h-1) fixes a place with probability
  # 1/8, 2/8, 2/8 for h - 1 = 1, 2, 3 (a place whose cycle's length divides h - 1).
  np.testing.assert_allclose(baselines['one jump'], (1 + 1 / 8 + 2 / 8 + 2 / 8) / 4, atol=0.02)
  np.testing.assert_allclose(baselines['own place'], (1 / 8 + 2 / 8 + 2 / 8 + 3 / 8) / 4, atol=0.02)


@pytest.mark.parametrize('fields', [{'places': 1}, {'hops': 0}])
def test_pointers_that_do_not_fit_are_refused(fields):
  name, = fields
  with pytest.raises(ConfigError, match=f'Pointers.{name}'):
    Pointers(**fields)
