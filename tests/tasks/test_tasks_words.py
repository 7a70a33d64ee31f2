"""Word problems and regular languages: groups by their laws, products and states against other ways to them, labels of
every prefix, and loops as many as the length of an input asks for."""
import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from loopformer import config as configs, plans
from loopformer.papers.melt.plans import Apart
from loopformer.tasks.arithmetic import LeftToRight
from loopformer.tasks.generated import Double, Generated, Grow
from loopformer.tasks.reasoning import Chain, Slots
from loopformer.tasks.words import (
  AB,
  NO_AA_BB,
  PARITY,
  Alternating,
  Automaton,
  Cyclic,
  Prefixes,
  Regular,
  Symmetric,
  Word,
  products,
)
from loopformer.types import ConfigError
from tests import parts

GROUPS = {'Z2': (Cyclic(degree=2), 2), 'Z7': (Cyclic(degree=7), 7), 'S3': (Symmetric(degree=3), 6),
          'S4': (Symmetric(degree=4), 24), 'S5': (Symmetric(degree=5), 120), 'A4': (Alternating(degree=4), 12),
          'A5': (Alternating(degree=5), 60)}
LANGUAGES = {'parity': (PARITY, r'0*(10*10*)*10*'), 'ab': (AB, r'(ab)*'),
             'no aa, no bb': (NO_AA_BB, r'(?!.*(aa|bb))[abc]*')}
group = pytest.mark.parametrize('name', GROUPS)
language = pytest.mark.parametrize('name', LANGUAGES)


def many(of, count=60):
  return [of.problem(np.random.default_rng((0, i))) for i in range(count)]


@group
def test_groups_keep_their_laws(name):
  of, order = GROUPS[name]
  table = products(of)
  assert table.shape == (order, order) and len(set(of.elements)) == order
  assert of.elements[0] == tuple(range(of.degree))
  assert (table[0] == np.arange(order)).all() and (table[:, 0] == np.arange(order)).all()
  assert all(sorted(row) == list(range(order)) for row in table.tolist())
  some = np.random.default_rng(0).integers(order, size=(200, 3)).T
  assert (table[table[some[0], some[1]], some[2]] == table[some[0], table[some[1], some[2]]]).all()


@pytest.mark.parametrize('name, solvable', [('Z7', True), ('S3', True), ('S4', True), ('A4', True), ('S5', False),
                                            ('A5', False)])
def test_which_groups_are_solvable(name, solvable):
  """The series of commutators ends in the identity, or it does not."""
  table = products(GROUPS[name][0])
  inverse = (table == 0).argmax(1)
  own = set(range(len(table)))
  for _ in range(5):
    found = {int(table[table[a, b], table[inverse[a], inverse[b]]]) for a, b in itertools.product(own, own)} | {0}
    while len(closed := {int(table[a, b]) for a, b in itertools.product(found, found)}) > len(found):
      found = closed
    own = found
  assert (own == {0}) == solvable


def test_products_apply_the_right_factor_first():
  """(a b)(i) = a(b(i)), in permutations of three symbols."""
  of = Symmetric(degree=3)
  turn, swap = of.elements.index((1, 2, 0)), of.elements.index((1, 0, 2))
  assert of.elements[products(of)[turn, swap]] == (2, 1, 0) and of.elements[products(of)[swap, turn]] == (0, 2, 1)


@group
def test_rounds_are_running_products(name):
  of = Word(longest=9, group=GROUPS[name][0])
  for problem in many(of, 30):
    elements, running = of.group.elements, tuple(range(of.group.degree))
    for word, told in zip(problem.prompt, problem.rounds):
      running = tuple(running[i] for i in elements[int(word)])
      assert elements[int(told[0])] == running
    assert problem.prompt[-1] == '=' and problem.answer == problem.rounds[-1][0] == of.concluded(problem.rounds)
    assert len(problem.rounds) == problem.size == len(problem.prompt) - 1


@language
def test_words_are_accepted_as_by_a_regular_expression(name):
  automaton, expression = LANGUAGES[name]
  of = Regular(longest=9, automaton=automaton)
  for letters in itertools.chain.from_iterable(itertools.product(automaton.letters, repeat=n) for n in range(1, 6)):
    assert (of.solved(''.join(letters)).answer == '+') == bool(re.fullmatch(expression, ''.join(letters)))
  drawn = many(of, 300)
  for problem in drawn:
    word = ''.join(problem.prompt[:-1])
    assert (problem.answer == '+') == bool(re.fullmatch(expression, word)) and problem.prompt[-1] == '$'
    assert of.concluded(problem.rounds) == problem.answer and len(problem.rounds) == problem.size == len(word)
    assert problem.rounds == of.solved(word).rounds
  accepted = np.mean([problem.answer == '+' for problem in drawn])
  assert 0.2 < accepted < 0.9  # none of ab's words of odd length is


def test_shares_of_accepted_words():
  def accepted(walks, size=8, automaton=AB):
    of = Regular(shortest=size, longest=size, automaton=automaton, walks=walks)
    return [problem for problem in many(of, 400) if problem.answer == '+']

  assert len(accepted(1.0)) == 400 and not accepted(1.0, size=7) and len(accepted(0.0)) < 10
  found = accepted(1.0, size=3, automaton=PARITY)  # uniform among those that are
  assert {len(list(group)) > 60 for _, group in itertools.groupby(sorted(p.prompt for p in found))} == {True}


@pytest.mark.parametrize('of', [Word(longest=9, group=Symmetric(degree=5)),
                                Regular(longest=6, automaton=NO_AA_BB, room=8)],
                         ids=['S5', 'regular'])
def test_every_prefix_is_asked_for(of):
  form = Prefixes(of=of)
  for problem in many(of):
    made, count = form.example(problem), problem.size + 1
    assert made['tokens'].shape == (of.room + 1,) and made['size'] == problem.size
    np.testing.assert_array_equal(made['weights'], np.arange(form.length) < count)
    np.testing.assert_array_equal(made['segments'], np.arange(form.length) < count)
    assert [form.symbols[i] for i in made['tokens'][:count]] == list(problem.prompt)
    assert [form.symbols[i] for i in made['targets'][:count]] == [*(one for one, in problem.rounds), problem.answer]
    assert set(made['tokens'][count:]) <= {form.pad} and form.pad not in made['tokens'][:count]  # the identity is none
  with pytest.raises(ConfigError, match='room: a problem of size 12 has 13 tokens'):
    form.example(dataclasses.replace(of, longest=12, room=12, limit=12).draw(np.random.default_rng(0), 12))


SLOTTED = [Word(longest=9, group=Symmetric(degree=3)), Regular(longest=6, automaton=NO_AA_BB, room=8),
           LeftToRight(longest=3)]


@pytest.mark.parametrize('of, answer', [*((of, True) for of in SLOTTED), (SLOTTED[0], False)],
                         ids=lambda value: ('rounds alone' if value is False
                                            else '' if value is True else type(value).__name__))
def test_denoisers_get_a_slot_for_every_token_of_the_rounds(of, answer):
  form = Slots(of=of, answer=answer)
  for problem in many(of):
    made, own = form.example(problem), [*itertools.chain(*problem.rounds), *[problem.answer] * answer]
    given, count = len(problem.prompt), len(problem.prompt) + len(own)
    assert made['size'] == problem.size and made['targets'].shape == (form.length,)
    assert [form.symbols[i] for i in made['targets'][:count]] == [*problem.prompt, *own]
    assert (made['tokens'][:given] == made['targets'][:given]).all() and (made['tokens'][given:] == form.pad).all()
    np.testing.assert_array_equal(made['weights'], (np.arange(form.length) >= given) & (np.arange(form.length) < count))
    np.testing.assert_array_equal(made['segments'], np.arange(form.length) < count)
  if type(of) is Word:
    with pytest.raises(ConfigError, match=f'room: a problem of size 12 has {25 + answer} tokens'):
      form.example(dataclasses.replace(of, longest=12, room=12, limit=12).draw(np.random.default_rng(0), 12))


def test_an_answer_that_no_round_ends_with_keeps_its_slot():
  of = SLOTTED[1]
  with pytest.raises(ConfigError,
                     match='Slots.answer = False: the rounds of a problem of Regular do not end with its answer'):
    Slots(of=of, answer=False).example(many(of)[0])
  for name, length in (('parity', 33), ('ab', 34)):  # of sixteen letters
    assert configs.load(f'masked_diffusion:cpu,task={name}').task.length == length


def test_slots_are_judged_whole_and_by_the_last():
  form = Slots(of=SLOTTED[0])
  examples = [form.example(form.of.solved(word)) for word in ([1, 2], [3, 4, 5], [0] * 9, [2])]
  targets, weights = (np.stack([example[name] for example in examples]) for name in ('targets', 'weights'))
  answers = np.where(weights > 0, targets, -1)  # what is given is not judged
  judged = (answers, targets, weights)
  assert form.solved(*judged).all() and form.answered(*judged).all()
  answers[0, 3] += 1  # its first slot
  answers[1, 4 + 3] += 1  # its last
  answers[3, -1] += 1  # behind its last
  assert form.solved(*judged).tolist() == [False, False, True, True]
  assert form.answered(*judged).tolist() == [True, False, True, True]


def test_a_chain_of_products_and_a_curriculum_that_doubles():
  of = Word(longest=16, group=Alternating(degree=5))
  made = Chain(of=of).example(of.solved([3, 0, 7]))
  assert made['weights'].sum() == 3 + 2
  source = Generated(of=Prefixes(of=of), grow=Grow(fields={'of/longest': Double(first=2, every=50)})).source('train', 0)
  most = [max(int(source[i]['size']) for i in range(start, start + 50)) for start in range(0, 300, 50)]
  assert most[:5] == [2, 4, 8, 16, 16] and most[5] > 8
  assert Double(first=1, every=1).at(10 ** 6, 512) == 512


@pytest.mark.parametrize('make, message', [
    (lambda: Symmetric(degree=7), 'Symmetric.degree = 7'), (lambda: Alternating(degree=0), 'Alternating.degree = 0'),
    (lambda: Cyclic(degree=0), 'Cyclic.degree = 0'),
    (lambda: Automaton(letters='', next=((),), accepting=()), "letters = ''"),
    (lambda: Automaton(letters='aa', next=((0, 0),), accepting=()), "letters = 'aa'"),
    (lambda: Automaton(letters='a$', next=((0, 0),), accepting=()), "letters = 'a\\$'"),
    (lambda: Automaton(letters='a+', next=((0, 0),), accepting=()), "letters = 'a\\+'"),
    (lambda: Automaton(letters='a ', next=((0, 0),), accepting=()), "letters = 'a '"),
    (lambda: Generated(of=Prefixes(of=Word(longest=2, group=Cyclic(degree=2))), tests={'train': None}),
     "task.tests names 'train'"),
    (lambda: Automaton(letters='ab', next=((0, 2),), accepting=()), r'Automaton.next = \(\(0, 2\),\).* 0..0'),
    (lambda: Automaton(letters='ab', next=((0,),), accepting=()), 'Automaton.next'),
    (lambda: Automaton(letters='a', next=((0,),), accepting=(1,)), r'Automaton.accepting = \(1,\)'),
    (lambda: Automaton(letters='a\n', next=((0, 0),), accepting=()), "letters = 'a"),
    *((lambda walks=walks: Regular(longest=3, automaton=AB, walks=walks), f'Regular.walks = {walks}: .* a share')
      for walks in (1.5, -0.1, float('nan'), True)),
    *((lambda word=word: Word(longest=3, group=Symmetric(degree=3)).solved(word), r'word = .*0 to 5')
      for word in ([], [6], [-1], [0, 6], [0.5])),
    *((lambda word=word: Regular(longest=3, automaton=AB).solved(word), f"word = '{word}': .* of 'ab'")
      for word in ('', 'c', 'abx')),
    (lambda: Prefixes(of=LeftToRight(longest=3)), r'Prefixes.of = LeftToRight: its rounds have up to \d+ tokens'),
    (lambda: Double(first=0, every=1), 'first = 0'), (lambda: Double(first=1, every=0), 'every = 0'),
])
def test_what_cannot_be(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


# Depth by length -----------------------------------------------------------------------------------------------------


def test_loops_by_the_length_of_the_input():
  plan = plans.LogDepth(size=1024)
  assert [plan.loops(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 1024)] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 10]
  for n in range(1, 11):  # a power of two is no loop more for rounding
    assert plan.loops(2 ** n) == n and plan.longest == 10
  squared = plans.LogDepth(size=64, power=2.0, scale=0.5, more=2)
  assert [squared.loops(n) for n in (1, 2, 4, 8, 64)] == [3, 3, 4, 7, 20]
  for scale in (1.1, 2.2, 0.07):  # whole in exact arithmetic, a little more in floating point
    assert plans.LogDepth(size=1024, power=2.0, scale=scale).loops(1024) == round(100 * scale)
  assert plans.LogDepth(size=1024, power=2.0, scale=1.101).loops(1024) == 111
  fixed = plans.LogDepth(size=64, power=0.0, scale=3.0)
  assert fixed.loops(1) == fixed.loops(64) == 3
  for own in (plan, squared):
    found = [own.loops(n) for n in range(1, 65)]
    assert found == sorted(found)
  for n in (0, -1, 1025, 2.5):
    with pytest.raises(ConfigError, match=f'n = {n}: LogDepth.size is the longest input'):
      plan.loops(n)


def test_every_sequence_takes_its_own_steps():
  of = Prefixes(of=Word(longest=9, group=Cyclic(degree=2)))
  examples = [of.example(of.of.draw(np.random.default_rng(0), n)) for n in (1, 2, 3, 5, 9)]
  batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
  plan = plans.LogDepth(size=9)(parts.plan_context(jax.random.key(0), batch))
  assert plan.active.shape == (4, 5) and plan.active.sum(0).tolist() == [1, 1, 2, 3, 4]
  assert np.asarray(plan.active).tolist() == sorted(np.asarray(plan.active).tolist(), reverse=True)
  with pytest.raises(ConfigError, match='LogDepth.size = 8: the rows of the batch have 10 tokens.* to 9'):
    plans.LogDepth(size=8)(parts.plan_context(jax.random.key(0), batch))


@pytest.mark.parametrize('sizes, wrong',
                         [([1, 9], None), ([3, 10], 10), ([0, 3], 0), ([-1], -1), ([10 ** 6, 1], 10 ** 6)])
def test_an_input_beyond_the_longest_is_no_other_input(sizes, wrong):
  """Of a batch on the host: it would take the steps of the longest."""
  for of in (plans.LogDepth(size=9), Apart(of=plans.LogDepth(size=9))):
    of.check_batch({'tokens': np.zeros((2, 10))})
    if wrong is None:
      of.check_batch({'size': np.array(sizes)})
      continue
    with pytest.raises(ConfigError, match=f'LogDepth.size = 9: the batch has an input of size {wrong},.*to '
                                          f'{max(9, *sizes)}, and'):
      of.check_batch({'size': np.array(sizes)})


@pytest.mark.parametrize('field, value', [('size', 0), ('size', 2.0), ('scale', 0.0), ('scale', float('nan')),
                                          ('power', -1.0), ('power', 1e9), ('scale', 1e9), ('more', -1)])
def test_depths_that_cannot_be(field, value):
  with pytest.raises(ConfigError, match='LogDepth'):
    plans.LogDepth(**{'size': 64, field: value})
