"""Problems whose solutions are told in part: what stands between a chain of thought and an answer alone.

    Selected       so many rounds of every solution, evenly
    Internalised   solutions without their first tokens, more of which go from stage to stage

Both are sources of problems (reasoning.py) around another, so that `Chain(of=Selected(of=Word(..), rounds=4))` is what
a decoder writes. After To CoT or To Loop (Xu and Sato, 2505.19245 and 2509.25239, experiments) and, for the second,
stepwise internalisation (Deng et al., 2405.14838).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from loopformer.tasks.reasoning import Extent, Problem, Round
from loopformer.types import ConfigError, config_dataclass, real, whole

LONG = 128  # tokens; of longer traces a stage removes more
FAST, SLOW = 16, 8  # tokens that a stage removes of long traces, and of others
LEAST = 1e-12  # probability that no more goes
SHORTEST = 8  # tokens of the trace in the last stage


class _Told:
  """What both have in common."""
  of: Any  # a source of problems
  told: Callable[[Problem, np.random.Generator], Problem]  # what becomes of a problem

  @property
  def whole(self) -> bool:
    """Whether that is all of every solution."""
    raise NotImplementedError

  @property
  def symbols(self) -> tuple[str, ...]:
    return self.of.symbols

  @property
  def room(self) -> int:
    return self.of.room

  @property
  def tasks(self) -> Mapping[str, Any]:
    return self.of.tasks

  def problem(self, rng: np.random.Generator) -> Problem:
    return self.told(self.of.problem(rng), rng)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    return self.told(self.of.draw(rng, size, task), rng)

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """None where something is left out: what is may have said more, such as the largest of all counts."""
    return self.of.concluded(rounds, task) if self.whole else None

  def weight(self, task: str) -> float:
    return self.of.weight(task)


@config_dataclass
class Selected(_Told):
  """Of T rounds those at i (T - 1) / (rounds - 1), rounded down: all where T is no more, the first where `rounds` is 1,
  none where it is 0."""
  of: Any
  rounds: int

  def __post_init__(self):
    whole('Selected.rounds', self.rounds, 0, why='0 leaves the answer alone')

  @property
  def extent(self) -> Extent:
    of = self.of.extent
    return dataclasses.replace(of, rounds=min(of.rounds, self.rounds), chain=min(of.chain, self.rounds * of.round))

  @property
  def whole(self) -> bool:
    return self.rounds >= self.of.extent.rounds

  def told(self, problem: Problem, rng: np.random.Generator) -> Problem:
    """The problem with the rounds that are kept."""
    kept = selected(len(problem.rounds), self.rounds)
    return dataclasses.replace(problem, rounds=tuple(problem.rounds[t] for t in kept))


def selected(count: int, kept: int) -> list[int]:
  """Which of `count` rounds are kept, in order."""
  return list(range(count)) if kept >= count else [i * (count - 1) // max(kept - 1, 1) for i in range(kept)]


@config_dataclass
class Internalised(_Told):
  """Solutions without their first tokens: from stage to stage 16 more are removed while the longest solution has more
  than 128, then 8 more, until 8 are left of it (`stages`); shorter solutions are left with none before.

  Every problem loses o tokens more, with probability (1 - e^-smoothing) e^(-smoothing o), so that a new stage comes as
  no surprise; smoothing = None, or inf: none. stage: from 1, in which nothing is removed, to the last, by default.
  `Grow` with a `Rise` of `of/stage` goes from one to the next.
  """
  of: Any
  stage: int | None = None
  smoothing: float | None = 4.0

  def __post_init__(self):
    last = len(stages(self.of.extent.chain))
    if self.stage is None:
      object.__setattr__(self, 'stage', last)
    whole('Internalised.stage', self.stage, 1, last, why=f'traces of {self.of.extent.chain} tokens have so many')
    if self.smoothing is not None:
      real('Internalised.smoothing', self.smoothing, '(0, inf]')

  @property
  def extent(self) -> Extent:
    return self.of.extent  # rows keep their shape from stage to stage

  @property
  def whole(self) -> bool:
    return self.stage == 1 and self.smoothing in (None, np.inf)

  def told(self, problem: Problem, rng: np.random.Generator) -> Problem:
    """The problem without the first tokens of its rounds; a round that has lost all is gone."""
    longest = self.of.extent.chain
    assert self.stage is not None
    cut = longest - stages(longest)[self.stage - 1]
    if self.smoothing is not None and self.smoothing < np.inf:
      cut += int(rng.geometric(max(1 - np.exp(-self.smoothing), LEAST))) - 1
    rounds = []
    for each in problem.rounds:
      rounds += [each[cut:]] if len(each) > cut else []
      cut = max(cut - len(each), 0)
    return dataclasses.replace(problem, rounds=tuple(rounds))


def stages(longest: int) -> list[int]:
  """Tokens that every stage leaves of the longest trace; the first leaves all. Raises ConfigError where there are
  none."""
  if longest < 1:
    raise ConfigError('Internalised.of: its problems have no rounds to remove; take a source of problems '
                      'with solutions')
  left = [longest]
  while left[-1] > SHORTEST:
    left.append(max(left[-1] - (FAST if left[-1] > LONG else SLOW), SHORTEST))
  return left
