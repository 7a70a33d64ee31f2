"""Expressions, reduced one operation a round until a number is left.

    3 * 2 + 6 / 3 =      6 + 6 / 3 =      6 + 2 =      8          the answer 8

After RELAY (Yu et al., 2502.08482, section 4) and the benchmark that it adapts (Feng et al., 2305.15408). Numbers are
one symbol each, 0..modulus - 1.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import TYPE_CHECKING

import numpy as np

from loopformer.tasks.reasoning import Extent, Problem, Round, Sized
from loopformer.types import ConfigError, config_dataclass, whole

PRECEDENCE = {'+': 1, '-': 1, '*': 2, '/': 2}
EQUALS = '='


@config_dataclass
class _Expressions(Sized):
  """What both kinds share. Size: the number of operators, which is that of the rounds. The last round is the answer.

  modulus: of all arithmetic, a prime, so that all but zero divides; operators: some of + - * /.
  """
  modulus: int
  operators: str

  def __post_init__(self):
    Sized.__post_init__(self)
    name = type(self).__name__
    whole(f'{name}.modulus', self.modulus, 2, 10_000)
    if any(self.modulus % divisor == 0 for divisor in range(2, int(self.modulus ** 0.5) + 1)):
      raise ConfigError(f'{name}.modulus = {self.modulus}: division needs a prime; choose one, such as 5 or 11')
    wrong = set(self.operators) - set(PRECEDENCE)
    if wrong or not self.operators:
      raise ConfigError(f'{name}.operators = {self.operators!r}: give one or more of {" ".join(PRECEDENCE)}')

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The last round, if it is a number alone."""
    last = rounds[-1] if rounds else ()
    return last[0] if len(last) == 1 and last[0].isdigit() else None

  if TYPE_CHECKING:
    def reduced(self, words: Sequence[str], operate: Callable[[int, str, int], int]) -> list[str]:
      """What every kind says for itself: the words after a round."""

  def solved(self, expression: Sequence[str]) -> Problem:
    """The problem of an expression, without its `=`. Raises ConfigError where it is none, or divides by zero."""
    operate = functools.partial(modular, self.modulus)
    rounds, words = [], list(expression)
    try:
      if not words:
        raise ValueError('it is empty')
      if any(word.isdigit() and int(word) >= self.modulus for word in words):
        raise ValueError(f'numbers are 0 to {self.modulus - 1}')
      while len(words) > 1:
        words = self.reduced(words, operate)
        rounds.append(tuple(words) if len(words) == 1 else (*words, EQUALS))
      if not words[0].isdigit():
        raise ValueError(f'{words[0]} is no number')
    except ValueError as error:
      raise ConfigError(f'expression = {" ".join(expression)!r}: {error}; give one of numbers and '
                        f'{" ".join(PRECEDENCE)}') from error
    return Problem(prompt=(*expression, EQUALS), rounds=tuple(rounds), answer=words[0], size=len(rounds))

  @property
  def numbers(self) -> tuple[str, ...]:
    return tuple(map(str, range(self.modulus)))


@config_dataclass
class Arithmetic(_Expressions):
  """Expressions with precedence and brackets; a round reduces the leftmost operation that these allow.

  One grows from a number: `size` times any of its numbers is replaced by two of equal value, with an operator between
  them, in brackets where its neighbours would change what it means. It has 4 size + 1 tokens at most. The order of the
  chain is a function of the problem, as in the paper's example; the benchmark's is that of the growth, reversed.
  """
  modulus: int = 11
  operators: str = '+-*/'

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.numbers, *PRECEDENCE, '(', ')', EQUALS)

  @property
  def extent(self) -> Extent:
    # A round has one operator and one number less, and brackets around what stays; 4 tokens less of the most.
    rounds = [4 * left + 2 for left in range(self.room - 1, 0, -1)] + [1]
    return Extent(prompt=4 * self.room + 2, round=rounds[0], rounds=self.room, chain=sum(rounds))

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    words = [str(rng.integers(self.modulus))]
    for _ in range(self.checked(size, task)):
      places = [place for place, word in enumerate(words) if word.isdigit()]
      place = places[rng.integers(len(places))]
      operator, pairs = '', ()
      while not len(pairs):  # nothing but zero is a product with zero, or a quotient of it
        operator = self.operators[rng.integers(len(self.operators))]
        pairs = _pairs(self.modulus, operator, int(words[place]))
      a, b = pairs[rng.integers(len(pairs))]
      before, after = words[place - 1] if place else '', words[place + 1] if place + 1 < len(words) else ''
      new = [str(a), operator, str(b)]
      weak = PRECEDENCE[operator] == 1
      if before == '/' or weak and (before in ('*', '-') or after in ('*', '/')):
        new = ['(', *new, ')']
      words[place:place + 1] = new
    return self.solved(words)

  def reduced(self, words: Sequence[str], operate: Callable[[int, str, int], int]) -> list[str]:
    """As the function of that name."""
    return reduced(words, operate)


@config_dataclass
class LeftToRight(_Expressions):
  """Chains a op b op c .. without brackets or precedence; a round reduces the first operation. All numbers are uniform,
  but no division by zero: the smallest task of its kind."""
  modulus: int = 5
  operators: str = '+*'

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.numbers, *PRECEDENCE, EQUALS)

  @property
  def extent(self) -> Extent:
    rounds = [2 * left + 2 for left in range(self.room - 1, 0, -1)] + [1]
    return Extent(prompt=2 * self.room + 2, round=rounds[0], rounds=self.room, chain=sum(rounds))

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    words = [str(rng.integers(self.modulus))]
    for _ in range(self.checked(size, task)):
      operator = self.operators[rng.integers(len(self.operators))]
      words += [operator, str(rng.integers(operator == '/', self.modulus))]
    return self.solved(words)

  def reduced(self, words: Sequence[str], operate: Callable[[int, str, int], int]) -> list[str]:
    """The expression after its first operation. Raises ValueError where there is none."""
    if len(words) < 3 or words[1] not in PRECEDENCE or not (words[0].isdigit() and words[2].isdigit()):
      raise ValueError(f'{" ".join(words)}: no operation can be done')
    return [str(operate(int(words[0]), words[1], int(words[2]))), *words[3:]]


def modular(modulus: int, a: int, operator: str, b: int) -> int:
  """a operator b mod `modulus`. Raises ValueError where b does not divide."""
  if operator == '/':
    if not b % modulus:
      raise ValueError(f'{a} / {b} divides by zero')
    operator, b = '*', pow(b, -1, modulus)
  return {'+': a + b, '-': a - b, '*': a * b}[operator] % modulus


def reduced(words: Sequence[str], operate: Callable[[int, str, int], int]) -> list[str]:
  """An expression after its leftmost operation that precedence allows: the first with a number on both sides, whose
  left neighbour is of lower precedence, and whose right one of no higher. Brackets around a number alone are dropped.

  Raises:
    ValueError: no operation can be done.
  """
  words = list(words)
  for place in range(1, len(words) - 1):
    if words[place] not in PRECEDENCE or not (words[place - 1].isdigit() and words[place + 1].isdigit()):
      continue
    own = PRECEDENCE[words[place]]
    before, after = (PRECEDENCE.get(words[at], 0) if 0 <= at < len(words) else 0 for at in (place - 2, place + 2))
    if before < own >= after:
      words[place - 1:place + 2] = [str(operate(int(words[place - 1]), words[place], int(words[place + 1])))]
      place -= 1
      if place and words[place - 1] == '(' and words[place + 1:place + 2] == [')']:
        words[place - 1:place + 2] = [words[place]]
      return words
  raise ValueError(f'{" ".join(words)}: no operation can be done')


@functools.cache
def _pairs(modulus: int, operator: str, value: int) -> np.ndarray:
  """i64[n, 2]: all a, b with a operator b = value."""
  if operator == '/':  # a = value b
    return np.array([(value * b % modulus, b) for b in range(1, modulus)])
  a, b = np.divmod(np.arange(modulus ** 2), modulus)
  right = {'+': a + b, '-': a - b, '*': a * b}[operator] % modulus == value
  return np.stack([a, b], 1)[right]
