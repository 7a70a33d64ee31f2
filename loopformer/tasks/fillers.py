"""Fillers: tokens in the middle of an input that say nothing, for a model to compute at.

    57 3 118 F F F F =
             ^ before the query, after what the problem says

They are read and read others, as any token, and are never asked for. Padding, which fills up rows, is another symbol in
a segment of its own, that no token of the problem reads. After Exact Expressive Power of Transformers with Padding
(Merrill and Sabharwal, 2505.18948).
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.tasks.reasoning import Problem, Shown
from loopformer.types import ConfigError, config_dataclass, real, whole

FILLER = '<filler>'
MOST = 2 ** 20


@config_dataclass
class Power:
  """ceil(scale n^power) fillers for a problem of size n."""
  power: float
  scale: float = 1.0

  def __post_init__(self):
    real('fillers.power', self.power, '[0, 6]')
    real('fillers.scale', self.scale, '(0, inf)')

  def count(self, size: int) -> int:
    """Raises ConfigError where there would be more than a million."""
    count = self.scale * size ** self.power
    count = math.ceil(round(count, 9)) if count < math.inf else count  # a whole power is no filler more for rounding
    return whole(f'fillers of a problem of size {size}', count, 0, MOST, why='lower fillers.power or fillers.scale')


@config_dataclass
class Filled:
  """The examples of the form `of` (Prefixes, Asked, Chain, Slots) with fillers in them.

  fillers: how many, or a `Power` of the problem's size. query: so many last tokens of the problem stand after the
  fillers, which is what reads them where attention is causal. first: they stand before all of it instead, where tokens
  of a causal model say nothing but how many there are (`check_order`).
  """
  of: Any
  fillers: int | Power
  query: int = 1
  first: bool = False

  def __post_init__(self):
    whole('Filled.query', self.query, 0)
    if not isinstance(self.fillers, Power):
      whole('Filled.fillers', self.fillers, 0, MOST)

  @property
  def length(self) -> int:
    return self.of.length + self.count(self.of.of.room)

  @property
  def symbols(self) -> tuple[str, ...]:
    *inner, end = self.of.symbols
    return (*inner, FILLER, end)

  @property
  def pad(self) -> int:
    """The id of padding and end, the one after that of fillers."""
    return self.of.pad + 1

  def count(self, size: int) -> int:
    """Fillers of a problem of that size."""
    return self.fillers.count(size) if isinstance(self.fillers, Power) else self.fillers

  def __call__(self, rng: np.random.Generator) -> Example:
    return self.example(self.of.of.problem(rng))

  baselines = Shown.baselines

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where the form has rows of other things, or the query is all of it."""
    made, count = self.of.example(problem), self.count(problem.size)
    place = 0 if self.first else len(problem.prompt) - self.query
    if place < 1 and not self.first:
      raise ConfigError(f'Filled.query = {self.query}: a problem of size {problem.size} has {len(problem.prompt)} '
                        'tokens, none of which would stand before the fillers; lower Filled.query, or set Filled.first')
    rows = {name for name, value in made.items() if value.ndim}
    if other := sorted(rows - {'tokens', 'targets', 'weights', 'positions', 'segments'}):
      raise ConfigError(f'Filled.of = {type(self.of).__name__}: its examples have rows of {other[0]}, which have no '
                        'place for fillers; take a form of one row, such as Prefixes')
    left = self.length - self.of.length - count

    def widened(row, filler, rest):
      ends = np.full(count, filler, row.dtype), np.full(left, rest, row.dtype)
      return np.concatenate([row[:place], ends[0], row[place:], ends[1]])

    def moved(row):
      return np.where(row == self.of.pad, self.pad, row)

    segments = made.get('segments', np.ones(self.of.length, np.int32))
    rows = aligned(widened(moved(made['tokens']), self.of.pad, self.pad),
                   widened(moved(made['targets']), self.of.pad, self.pad), widened(made['weights'], 0, 0))
    return {**made, **rows, 'segments': widened(segments, segments[0], 0)}


def check_order(of: Filled, causal: bool):
  """Raises ConfigError where fillers stand before the input of a causal model, which they could not read."""
  if of.first and causal:
    raise ConfigError(f'Filled.first = {of.first}: attention is causal, and fillers before the input cannot read it; '
                      'set Filled.first to False, or take kernels.Bidirectional')
