"""Countdown: the checker and the examples against solutions that brute force finds, and wrong fields."""
from fractions import Fraction
import itertools
import operator

import numpy as np
import pytest

from loopformer.tasks.countdown import Countdown
from loopformer.types import ConfigError

SMALL = Countdown(numbers=3, largest=4, most=12)
EXACT = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.truediv}


def solutions(numbers, most):
  """{target: every list of equations, as words}: all orders of numbers and operations, evaluated as fractions."""
  found = {}
  if len(numbers) == 1:
    return {numbers[0]: [()]}
  for i, j in itertools.permutations(range(len(numbers)), 2):
    rest = [number for place, number in enumerate(numbers) if place not in (i, j)]
    for name, operation in EXACT.items():
      made = operation(Fraction(numbers[i]), Fraction(numbers[j]))
      if made.denominator == 1 and 1 <= made <= most:
        for target, tails in solutions([*rest, int(made)], most).items():
          first = f'{numbers[i]} {name} {numbers[j]} = {made}'
          found.setdefault(target, []).extend((first, *tail) for tail in tails)
  return found


def rows(of, problem, answers):
  """Ids, i32[N, T], of a problem and answers in words."""
  known = {symbol: place for place, symbol in enumerate(of.symbols)}
  return np.array([[known[word] for word in f'{problem} {answer}'.split()] for answer in answers])


def test_examples_are_among_the_solutions_of_brute_force():
  for seed in range(60):
    made = SMALL(np.random.default_rng(seed))
    words = [SMALL.symbols[i] for i in made['targets']]
    equations = tuple(' '.join(words[SMALL.given:]).split(' , '))
    assert equations in solutions([*map(int, words[:3])], SMALL.most)[int(words[4])]
    assert made['tokens'][0] == len(SMALL.symbols) - 1 and (made['tokens'][1:] == made['targets'][:-1]).all()
    assert made['weights'].tolist() == [0] * SMALL.given + [1] * 11 and len(words) == SMALL.length
    assert SMALL.solved(made['targets'][None], made['targets'][None], made['weights'][None]).all()


def test_the_checker_accepts_what_brute_force_finds_and_nothing_near_it():
  of, problem = SMALL, '2 4 2 : 4 ,'
  right = {' , '.join(answer) for answer in solutions([2, 4, 2], of.most)[4]}
  assert len(right) > 5
  near = set()
  for answer in right:
    words = answer.split()
    near |= {' '.join([*words[:i], symbol, *words[i + 1:]]) for i in range(len(words)) for symbol in of.symbols}
  answers = rows(of, problem, near := sorted(near))
  weights = np.tile(np.arange(of.length) >= of.given, (len(near), 1)).astype(np.float32)
  assert of.solved(answers, answers, weights).tolist() == [answer in right for answer in near]


def test_what_names_no_numbers_solves_nothing():
  row = rows(SMALL, '+ + 3 : 5 ,', ['+ + + = 5 , 5 - 3 = 2'])
  weights, asked = (np.float32(np.arange(SMALL.length) >= SMALL.given)[None],
                    SMALL(np.random.default_rng(0))['targets'][None])
  assert SMALL.solved(row, asked, weights).tolist() == [False]


def test_two_numbers_exhaustively_and_problems_are_kept():
  of = Countdown(numbers=2, largest=4, most=6)
  symbols = of.symbols[:-4]
  said = [' '.join((a, name, b, '=', c)) for a, name, b, c in itertools.product(symbols, EXACT, symbols, symbols)]
  answers = rows(of, '4 2 : 2 ,', said)
  weights = np.tile(np.arange(of.length) >= of.given, (len(said), 1)).astype(np.float32)
  assert {said[i] for i in np.flatnonzero(of.solved(answers, answers, weights))} == {'4 - 2 = 2', '4 / 2 = 2'}
  other, asked = rows(of, '4 3 : 1 ,', ['4 - 3 = 1']), rows(of, '4 2 : 2 ,', ['4 - 2 = 2'])
  assert of.solved(other, other, weights[:1]).all() and not of.solved(other, asked, weights[:1]).any()


@pytest.mark.parametrize('fields', [{'numbers': 1}, {'largest': 0}, {'largest': 9, 'most': 8}, {'most': 10 ** 6}])
def test_wrong_fields_are_named(fields):
  name, value = next(iter(fields.items()))
  with pytest.raises(ConfigError, match=f'Countdown.{name} = {value}'):
    Countdown(**fields)
