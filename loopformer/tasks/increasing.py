"""The longest strictly increasing subsequence of numbers, counted place by place.

    18 30 5 7 <sep>     1 2 1 2 ..       of every number, the longest that ends with it; the answer is the most, 2

After RELAY (Yu et al., 2502.08482, section 4) and the benchmark that it adapts (Feng et al., 2305.15408).
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.reasoning import Extent, Problem, Round, Sized
from loopformer.types import ConfigError, config_dataclass, whole

SEP = '<sep>'


@config_dataclass
class Increasing(Sized):
  """Sequences of `size` numbers, limit + 1 to limit + spread, so that none shares its symbol with a count.

  They are uniform but for one to three increasing runs, drawn and sorted, at places of their own that are drawn too. A
  round has the counts of `group` numbers, and <sep>; the last round is filled up with its last count.
  """
  group: int = 10
  spread: int = 149

  def __post_init__(self):
    Sized.__post_init__(self)
    whole('Increasing.group', self.group, 1, why='a round has a count')
    whole('Increasing.spread', self.spread, 1, why='numbers are drawn from some')

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*map(str, range(self.limit + self.spread + 1)), SEP)

  @property
  def extent(self) -> Extent:
    rounds = -(-self.room // self.group)
    return Extent(prompt=self.room + 1, round=self.group + 1, rounds=rounds, chain=rounds * (self.group + 1))

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    size = self.checked(size, task)
    numbers = self.limit + 1 + rng.integers(self.spread, size=size)
    for _ in range(rng.integers(1, 4)):
      count = int(rng.integers(1, size + 1))
      places = np.sort(rng.choice(size, count, replace=False))
      numbers[places] = np.sort(self.limit + 1 + rng.integers(self.spread, size=count))
    return self.solved(numbers.tolist())

  def solved(self, numbers: Sequence[int]) -> Problem:
    """The problem of any numbers, one or more. Raises ConfigError where there are none."""
    if not len(numbers):
      raise ConfigError('numbers = []: they are empty; give one or more')
    counts = ending(numbers)
    counts += counts[-1:] * (-len(counts) % self.group)
    rounds = [(*map(str, counts[i:i + self.group]), SEP) for i in range(0, len(counts), self.group)]
    return Problem(prompt=(*map(str, numbers), SEP), rounds=tuple(rounds), answer=str(max(counts)), size=len(numbers))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The largest count of all rounds."""
    counts = [int(word) for each in rounds for word in each if word.isdigit()]
    return str(max(counts)) if counts else None


def ending(numbers: Sequence[int]) -> list[int]:
  """Of every number, the length of the longest increasing subsequence that ends with it."""
  values, counts = np.asarray(numbers), np.ones(len(numbers), np.int64)
  for place in range(1, len(values)):
    below = counts[:place][values[:place] < values[place]]
    counts[place] += below.max() if len(below) else 0
  return counts.tolist()
