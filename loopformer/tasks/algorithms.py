"""Algorithms on inputs of any length n, the whole answer at once: parity, copy, addition, sum, multiplication, set.

After looped transformers for length generalization (Fan et al., 2409.15647; sections 3 and 5). A row is x EOS EOS ..;
the last token of x is the query. From there to the end of the row targets are the answer, then EOS, and all of them
count: the token at the query is asked for answer[0]. Before the query targets are 'ignored', and weigh nothing.

    tokens   0 1 1 > E E      targets   - - - 0 E E      weights   0 0 0 1 1 1      the parity of 011

Every example has loops i32[], the number of loops T(n) that it is given. Every part has the fields shortest and
longest, n being uniform between them, both included, and room, the largest n that a row has place for: rows keep their
width while `longest` grows, and tests are the same part with a larger n. Widths are the paper's, whose max, which n
stays below, is room + 1; so are ids. The end symbol, which no row holds, comes after them.

Also here, for all tasks of symbols: how guesses are scored.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.types import ConfigError, config_dataclass, whole

# Guesses -------------------------------------------------------------------------------------------------------------


def answers(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
  """targets i32[E, T] and asked bool[E, T] of E examples."""
  return np.stack([e['targets'] for e in examples]), np.stack([e['weights'] for e in examples]) > 0


def most_frequent(examples: Sequence[Example]) -> np.ndarray:
  """i64[E, T]: the guess that is always the most frequent answer."""
  targets, asked = answers(examples)
  return np.full(targets.shape, np.bincount(targets[asked]).argmax())


def by_place(examples: Sequence[Example]) -> np.ndarray:
  """i64[E, T]: the guess that is the most frequent answer so many places after the first that is asked for."""
  targets, asked = answers(examples)
  place = np.maximum(np.arange(targets.shape[1]) - asked.argmax(1)[:, None], 0)
  counts = np.zeros((targets.shape[1], targets.max() + 1), np.int64)
  np.add.at(counts, (place[asked], targets[asked]), 1)
  return counts.argmax(1)[place]


def accuracy(examples: Sequence[Example], guesses: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Share of what is asked for that guesses [E, T] get right."""
  targets, asked = answers(examples)
  return {name: float((guess == targets)[asked].mean()) for name, guess in guesses.items()}


def exact(examples: Sequence[Example], guesses: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Share of examples of which guesses [E, T] get all right; named so."""
  targets, asked = answers(examples)
  return {f'{name}, exact': float(((guess == targets) | ~asked).all(1).mean()) for name, guess in guesses.items()}


# What the parts share ------------------------------------------------------------------------------------------------


@config_dataclass
class _Lengths:
  """The fields of all parts: which n are drawn, and the largest that a row has place for."""
  shortest: int = 1
  longest: int
  room: int

  def __post_init__(self):
    name = type(self).__name__
    whole(f'{name}.shortest', self.shortest, 1, why='an input has a symbol')
    whole(f'{name}.longest', self.longest, self.shortest, why='the longest input is not below the shortest')
    whole(f'{name}.room', self.room, self.longest, why='a row has place for the longest input')

  def _count(self, rng: np.random.Generator) -> int:
    """n."""
    return int(rng.integers(self.shortest, self.longest + 1))


def _row(of: Any, x: Sequence[int], answer: Sequence[int], loops: int) -> Example:
  """The example of an input, its query included, and its answer."""
  tokens = np.full(of.length, of.eos, np.int32)
  tokens[:len(x)] = x
  asked = np.arange(of.length) >= len(x) - 1
  return {**aligned(tokens, _targets(of, len(x), answer), asked), 'loops': np.array(loops, np.int32)}


def _targets(of: Any, count: int, answer: Sequence[int]) -> np.ndarray:
  targets = np.full(of.length, of.eos, np.int32)
  targets[:count - 1] = of.ignored
  targets[count - 1:count - 1 + len(answer)] = answer
  return targets


def _floors(of: Any, examples: Sequence[Example], **guesses: Callable[[list[int]], Sequence[int]]) -> dict[str, float]:
  """Scores of answers that are functions of x, of the most frequent ones, and of chance.

  Chance knows where the answer ends, and draws its symbols.
  """
  targets, asked = answers(examples)
  inputs = [e['tokens'][:first + 1].tolist() for e, first in zip(examples, asked.argmax(1))]
  rows = {'most frequent': most_frequent(examples), 'by place': by_place(examples)} | {
    name.replace('_', ' '): np.stack([_targets(of, len(x), guess(x)) for x in inputs])
    for name, guess in guesses.items()}
  drawn = asked & (targets != of.eos)
  chance = {'chance': float(np.where(drawn, 1 / of.choices, 1)[asked].mean()),
            'chance, exact': float(np.mean((1 / of.choices)**drawn.sum(1)))}
  return accuracy(examples, rows) | exact(examples, rows) | chance


def _number(bits: Sequence[int]) -> int:
  """Of bits, the most significant first."""
  return int(''.join(map(str, bits)), 2)


def _bits(number: int, count: int) -> list[int]:
  """The lowest `count` bits, the least significant first."""
  return [number >> i & 1 for i in range(count)]


def _symbols(two: str, four: str, five: str) -> tuple[str, ...]:
  """Of the binary tasks: 0, 1, 3 = EOS, and what a task has at 2, 4 and 5."""
  return ('0', '1', two, '<eos>', four, five, '<end>')


# Tasks ---------------------------------------------------------------------------------------------------------------


@config_dataclass
class Parity(_Lengths):
  """b_1 .. b_n > : the sum of the bits mod 2; `0 1 1 >` -> `0`. T = n; rows of room + 2. Ids: > 2, EOS 3, ignored 5."""
  symbols = _symbols('>', '<4>', '<ignored>')
  eos, ignored, choices = 3, 5, 2

  @property
  def length(self) -> int:
    return self.room + 2

  def __call__(self, rng: np.random.Generator) -> Example:
    bits = rng.integers(2, size=self._count(rng)).tolist()
    return _row(self, [*bits, 2], [sum(bits) % 2], len(bits))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    return _floors(self, examples, last_bit=lambda x: x[-2:-1])


@config_dataclass
class Copy(_Lengths):
  """b_1 .. b_n > : the bits; `0 1 1 >` -> `0 1 1`. T = n; rows of 2 (room + 1). Ids: > 2, EOS 3, ignored 4."""
  symbols = _symbols('>', '<ignored>', '<5>')
  eos, ignored, choices = 3, 4, 2

  @property
  def length(self) -> int:
    return 2 * (self.room + 1)

  def __call__(self, rng: np.random.Generator) -> Example:
    bits = rng.integers(2, size=self._count(rng)).tolist()
    return _row(self, [*bits, 2], bits, len(bits))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    return _floors(self, examples, repeated_last_bit=lambda x: x[-2:-1] * (len(x) - 1))


@config_dataclass
class Addition(_Lengths):
  """a_1 .. a_n + b_1 .. b_n = : a + b in n + 1 bits, the most significant first everywhere; `1 1 + 0 1 =` -> `1 0 0`.

  T = n; rows of 3 (room + 1). Ids: + 2, EOS 3, ignored 4, = 5.
  """
  symbols = _symbols('+', '<ignored>', '=')
  eos, ignored, choices = 3, 4, 2

  @property
  def length(self) -> int:
    return 3 * (self.room + 1)

  def __call__(self, rng: np.random.Generator) -> Example:
    a, b = rng.integers(2, size=(2, self._count(rng))).tolist()
    answer = _bits(_number(a) + _number(b), len(a) + 1)[::-1]
    return _row(self, [*a, 2, *b, 5], answer, len(a))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    def without_carry(x):
      n = len(x) // 2 - 1
      return [0, *(i ^ j for i, j in zip(x[:n], x[n + 1:-1]))]
    return _floors(self, examples, without_carry=without_carry)


@config_dataclass
class BinarySum(_Lengths):
  """b_1 .. b_n = : how many are 1, in binary, the least significant bit first, nothing for none; `1 1 0 =` -> `0 1`.

  T = n; rows have place for the answer n = room and an EOS. Ids: EOS 3, ignored 4, = 5.
  """
  symbols = _symbols('<2>', '<ignored>', '=')
  eos, ignored, choices = 3, 4, 2

  @property
  def length(self) -> int:
    return self.room + self.room.bit_length() + 1

  def __call__(self, rng: np.random.Generator) -> Example:
    bits = rng.integers(2, size=self._count(rng)).tolist()
    ones = sum(bits)
    return _row(self, [*bits, 5], _bits(ones, ones.bit_length()), len(bits))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    def half_of_them(x):
      ones = len(x) // 2
      return _bits(ones, ones.bit_length())
    return _floors(self, examples, half_of_them=half_of_them)


@config_dataclass
class Multiplication(_Lengths):
  """a * b = : their product in len(a) + len(b) bits, the least significant first, a and b the most significant first.

  `1 0 * 1 1 =` -> `0 1 1 0` (2 * 3 = 6). first: lengths of a, any of them alike (tests of the paper: 2); n bits of b.
  T = len(a) n; rows of 4 (room + 1). Ids: * 2, EOS 3, ignored 4, = 5.
  """
  first: tuple[int, ...] = (1, 2)
  symbols = _symbols('*', '<ignored>', '=')
  eos, ignored, choices = 3, 4, 2

  def __post_init__(self):
    _Lengths.__post_init__(self)
    most = self.room + 1  # with it, len(a) + 1 + n + 1 tokens and an answer of len(a) + n fit, the first of both shared
    if not self.first or min(self.first) < 1 or max(self.first) > most:
      raise ConfigError(f'Multiplication.first = {self.first}: give lengths of the first factor, from 1 to {most}, '
                        'which a row has place for')

  @property
  def length(self) -> int:
    return 4 * (self.room + 1)

  def __call__(self, rng: np.random.Generator) -> Example:
    count = self.first[rng.integers(len(self.first))]
    a, b = rng.integers(2, size=count).tolist(), rng.integers(2, size=self._count(rng)).tolist()
    answer = _bits(_number(a) * _number(b), count + len(b))
    return _row(self, [*a, 2, *b, 5], answer, count * len(b))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    def second_factor(x):
      split = x.index(2)
      return x[split + 1:-1][::-1] + [0] * split
    return _floors(self, examples, second_factor=second_factor)


@config_dataclass
class UniqueSet(_Lengths):
  """s_1 .. s_n = : the different symbols, in order of first appearance; `7 3 7 =` -> `7 3`.

  T = n; rows of 2 (room + 1). Ids: symbols 0..49, = 51, ignored 52, EOS 53; 60 of them, the end symbol included.
  """
  symbols = (*map(str, range(50)), '<50>', '=', '<ignored>', '<eos>', *(f'<{i}>' for i in range(54, 59)), '<end>')
  eos, ignored, choices = 53, 52, 50

  @property
  def length(self) -> int:
    return 2 * (self.room + 1)

  def __call__(self, rng: np.random.Generator) -> Example:
    drawn = rng.integers(50, size=self._count(rng)).tolist()
    return _row(self, [*drawn, 51], list(dict.fromkeys(drawn)), len(drawn))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    return _floors(self, examples, copy=lambda x: x[:-1])
