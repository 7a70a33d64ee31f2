"""Countdown: a target, and equations that make it of given numbers.

    7 2 3 : 17 , 7 * 2 = 14 , 14 + 3 = 17

After Beyond Autoregression (Ye et al., 2410.14157), whose answers are such equations; a problem has many.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.algorithms import accuracy, by_place, exact, most_frequent
from loopformer.tasks.generated import Example, aligned
from loopformer.types import config_dataclass, whole

OPERATIONS = '+-*/'
OF, NEXT, IS, START = ':', ',', '=', '.'  # START: before the first token; ends texts, too


def combined(a: int, operation: str, b: int) -> int | None:
  """What an operation makes of two positive whole numbers; None where that is none."""
  if operation == '/':
    return a // b if a % b == 0 else None
  made = {'+': a + b, '-': a - b, '*': a * b}[operation]
  return made if made > 0 else None


@config_dataclass
class Countdown:
  """Problems of so many numbers, each of which is used once, with an operation between two of what is left:

      targets    7 2 3 : 17 , 7 * 2 = 14 , 14 + 3 = 17     asked for from the first equation on

  Tokens are the targets, one place later. Numbers are even among 1 .. largest, and the equations even among those that
  are possible; the target is what they come to. What is between is a positive whole number, `most` at the most.
  """
  numbers: int = 4
  largest: int = 10
  most: int = 100

  def __post_init__(self):
    whole('Countdown.numbers', self.numbers, 2, 16)
    whole('Countdown.most', self.most, 1, 10_000, why='every number has a symbol')
    whole('Countdown.largest', self.largest, 1, self.most, why='numbers are not above the most that there may be')

  @property
  def length(self) -> int:
    """Tokens: numbers, target, and equations, with what stands between them."""
    return self.given + 6 * (self.numbers - 1) - 1

  @property
  def given(self) -> int:
    """Tokens of the problem."""
    return self.numbers + 3

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*map(str, range(1, self.most + 1)), *OPERATIONS, OF, NEXT, IS, START)

  def moves(self, numbers: Sequence[int]) -> list[tuple[int, int, str, int]]:
    """(place of a, place of b, operation, result) of every equation that is possible."""
    return [(i, j, operation, result) for i, a in enumerate(numbers) for j, b in enumerate(numbers) if i != j
            for operation in OPERATIONS
            if (result := combined(a, operation, b)) is not None and result <= self.most]

  def __call__(self, rng: np.random.Generator) -> Example:
    numbers = rng.integers(1, self.largest + 1, self.numbers).tolist()
    left, equations = list(numbers), []
    while len(left) > 1:
      moves = self.moves(left)  # never empty: of two numbers one can be subtracted from the other, or they are equal
      i, j, operation, made = moves[rng.integers(len(moves))]
      equations += [left[i], operation, left[j], IS, made, NEXT]
      left = [number for place, number in enumerate(left) if place not in (i, j)] + [made]
    known = {symbol: place for place, symbol in enumerate(self.symbols)}
    words = [*numbers, OF, left[0], NEXT, *equations[:-1]]
    ids = np.array([known[str(word)] for word in words], np.int32)
    tokens = np.concatenate([[known[START]], ids[:-1]]).astype(np.int32)
    return aligned(tokens, ids, np.arange(self.length) >= self.given)

  def solves(self, words: Sequence[str]) -> bool:
    """Whether the equations of a row are true, use what is left and each once, and come to its target."""
    given, said = list(words[:self.given]), [*words[self.given:], NEXT]
    left, made = given[:self.numbers], ''
    for a, operation, b, equals, made, after in zip(*[iter(said)] * 6):
      if (equals, after) != (IS, NEXT) or operation not in OPERATIONS or a not in left:
        return False
      left.remove(a)
      if b not in left or str(combined(int(a), operation, int(b))) != made:
        return False
      left.remove(b)
      left.append(made)
    return made == given[self.numbers + 1]

  def solved(self, answers: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bool[N]: whether answers i32[N, T] solve the problems of examples' targets; any solution is right."""
    solved = ((answers == targets) | (weights > 0)).all(-1)
    for row in np.flatnonzero(solved):  # of others the numbers may be none
      solved[row] = self.solves([self.symbols[id_] for id_ in answers[row]])
    return solved

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the most frequent symbols, anywhere and by place."""
    guesses = {'most frequent': most_frequent(examples), 'by place': by_place(examples)}
    return accuracy(examples, guesses) | exact(examples, guesses)
