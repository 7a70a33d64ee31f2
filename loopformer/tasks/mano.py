"""Mano: arithmetic modulo a prime in prefix notation, without writing steps down.

After Ouro (2510.25741, section 5), where it measures how knowledge (the tables of the operations) is put to use:

    <bos> L2 - * 3 5 7 <ans> 8        3 * 5 - 7, with two operations
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.algorithms import accuracy
from loopformer.tasks.generated import Example
from loopformer.tasks.packed import packed
from loopformer.types import config_dataclass, whole

OPERATIONS = '+-*'


@config_dataclass
class Everything:
  """All tokens of a problem are asked for, as in the paper's training; the operands among them can only be guessed."""

  def ask(self, count: int) -> np.ndarray:
    """bool[count], for a problem of so many tokens."""
    return np.arange(count) > 0


@config_dataclass
class Answer:
  """The answer alone is asked for, as in the paper's test."""

  def ask(self, count: int) -> np.ndarray:
    """bool[count], for a problem of so many tokens."""
    return np.arange(count) == count - 1


@config_dataclass
class Mano:
  """Problems of shortest..longest operations, uniform, packed into rows of `length` tokens.

  Operands are uniform in 0..modulus - 1, operations in + - *. The paper does not say how expressions are shaped: here
  the root takes one operation, and the others go to its left side in a number uniform from none to all, the rest to
  its right. Its tests are of the longest alone: Mano(shortest=n, longest=n, labels=Answer()).
  """
  shortest: int = 1
  longest: int = 10
  modulus: int = 23
  length: int = 256
  labels: Everything | Answer = Everything()

  def __post_init__(self):
    whole('Mano.shortest', self.shortest, 1, why='a problem has an operation')
    whole('Mano.longest', self.longest, self.shortest, why=f'shortest = {self.shortest}')
    whole('Mano.modulus', self.modulus, 2, why='there are two numbers')
    whole('Mano.length', self.length, 2 * self.longest + 4, why=f'a row holds a problem of longest = {self.longest}')

  @property
  def symbols(self) -> tuple[str, ...]:
    counts = (f'L{n}' for n in range(1, self.longest + 1))
    return (*map(str, range(self.modulus)), *OPERATIONS, *counts, '<bos>', '<ans>', '<end>')

  def __call__(self, rng: np.random.Generator) -> Example:
    end = len(self.symbols) - 1
    bos, ans, first = end - 2, end - 1, self.modulus + len(OPERATIONS)

    def problem():
      count = int(rng.integers(self.shortest, self.longest + 1))
      ids, value = self._expression(rng, count)
      ids = [bos, first + count - 1, *ids, ans, value]
      return ids, self.labels.ask(len(ids))

    return packed(problem, self.length, end)

  def _expression(self, rng, count):
    """(ids, value) of an expression of `count` operations."""
    if not count:
      value = int(rng.integers(self.modulus))
      return [value], value
    operation, on_left = int(rng.integers(len(OPERATIONS))), int(rng.integers(count))
    left, a = self._expression(rng, on_left)
    right, b = self._expression(rng, count - 1 - on_left)
    value = (a + b, a - b, a * b)[operation] % self.modulus
    return [self.modulus + operation, *left, *right], value

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the answers alone: chance, the most frequent answer, the last operand."""
    ans = len(self.symbols) - 2
    answers = [{**e, 'weights': (e['tokens'] == ans).astype(np.float32)} for e in examples]
    targets, tokens = (np.stack([e[name] for e in answers]) for name in ('targets', 'tokens'))
    frequent = np.bincount(targets[tokens == ans]).argmax()
    guesses = {'most frequent': np.full(targets.shape, frequent), 'last operand': np.roll(tokens, 1, 1)}
    return {'chance': 1 / self.modulus} | accuracy(answers, guesses)
