"""Several tasks at once: examples of each, in shares that are exact in the long run."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from fractions import Fraction
import functools
import math
import os
import re
from typing import Any

import numpy as np

from loopformer import storage
from loopformer.data.chat import ChatTokenizer
from loopformer.data.tokenizer import Tokenizer
from loopformer.inference import measures
from loopformer.tasks.generated import ENDLESS, Example
from loopformer.types import ConfigError, config_dataclass, real

JOINT = 'validation'


@config_dataclass
class Mixture:
  """Task: examples of the tasks `of`, by name, in the order of their shares, `weights` over their sum.

  Which task example i is of, and which of that task's examples it is, depends on i and the weights alone: after any
  number of examples, those of a task are its share of them but for less than the number of tasks. They are validated on
  in the same shares, and each by itself ('text-validation'). The tasks have one length and one tokenizer, and folders
  of their own in the work folder where they name none.
  """
  of: Mapping[str, Any]
  weights: Mapping[str, float]
  measure: measures.Tokens = measures.Tokens()

  def __post_init__(self):
    if set(self.of) != set(self.weights) or not self.of:
      raise ConfigError(f'task.weights are of {", ".join(self.weights) or "nothing"}, task.of has '
                        f'{", ".join(self.of) or "nothing"}; give a weight for every task')
    for name, weight in self.weights.items():
      if name in ('', '.', '..') or re.search(r'[/\\]', name):
        raise ConfigError(f'task.of: {name!r} is no name of a task, of which a folder is called; '
                          'give letters and digits')
      real(f'task.weights.{name}', weight, '(0, inf)')
    lengths = {name: task.length for name, task in self.of.items()}
    if len(set(lengths.values())) > 1:
      raise ConfigError(f'task.of: examples of {", ".join(f"{name} have {n} tokens" for name, n in lengths.items())}; '
                        'give them one length')

  @property
  def length(self) -> int:
    return next(iter(self.of.values())).length

  @property
  def splits(self) -> dict[str, int]:
    """That of the mixture, and those of its tasks."""
    return {JOINT: self.length} | {f'{name}-{split}': length for name, task in self.of.items()
                                   for split, length in task.splits.items()}

  def prepare(self, workdir: str | os.PathLike, log: Callable = print) -> Tokenizer:
    """Prepares all of them. Raises ConfigError where their tokenizers differ."""
    made = {name: task.prepare(self._folder(workdir, name), lambda text, name=name: log(f'{name}: {text}'))
            for name, task in self.of.items()}
    first = next(iter(made))
    for name, other in made.items():
      if ids_of(other) != ids_of(made[first]):
        raise ConfigError(f'task.of: {name} has another tokenizer than {first}; give both the same, such as '
                          'data.chat.SavedTokenizer of one folder')
    return self.tokenizer_of(workdir)

  def verify(self, workdir: str | os.PathLike, log: Callable = print):
    """As of all tasks."""
    for name, task in self.of.items():
      task.verify(self._folder(workdir, name), log)

  def tokenizer_of(self, workdir: str | os.PathLike) -> Tokenizer:
    """The one with the most ends, which knows how a turn ends."""
    found = [task.tokenizer_of(self._folder(workdir, name)) for name, task in self.of.items()]
    return max(found, key=lambda tokenizer: len(tokenizer.ends))

  def examples(self, workdir: str | os.PathLike, split: str, seed: int):
    """As of the tasks; of the training split without end, of the others each once, as long as the shares last."""
    import grain
    for name, task in self.of.items():
      for own in task.splits:
        if split == f'{name}-{own}':
          return task.examples(self._folder(workdir, name), own, seed)
    datasets = [task.examples(self._folder(workdir, name), split, seed) for name, task in self.of.items()]
    shares = self.shares()
    count = ENDLESS if split == 'train' else lasting(shares, [len(dataset) for dataset in datasets])
    return grain.MapDataset.source(Mixed(datasets=tuple(datasets), shares=shares, count=count))

  def shares(self) -> tuple[Fraction, ...]:
    """Of the tasks in their order; their sum is one."""
    weights = [Fraction(float(self.weights[name])) for name in self.of]
    return tuple(weight / sum(weights) for weight in weights)

  def _folder(self, workdir, name: str):
    return storage.path(workdir) / 'mixture' / name


def ids_of(tokenizer: Tokenizer) -> str:
  """The fingerprint of what decides which ids a text has: not of its chats."""
  return (tokenizer.of if isinstance(tokenizer, ChatTokenizer) else tokenizer).fingerprint()


def place(shares: Sequence[Fraction], index: int) -> tuple[int, int]:
  """(task, which of its examples) of an example.

  Example j of a task with share w is due at (j + 1/2) / w, and examples come in the order in which they are due, those
  of earlier tasks first where two are due at once. So there are round(w t) of it at time t, and t examples but for half
  the number of tasks.
  """
  reach = len(shares)
  begin, end = Fraction(max(index - reach, 0)), Fraction(index + reach + 1)
  before = [_due(share, begin) for share in shares]
  due = sorted((Fraction(2 * j + 1, 2) / share, task, j) for task, share in enumerate(shares)
               for j in range(before[task], _due(share, end)))
  _, task, j = due[index - sum(before)]
  return task, j


def _due(share: Fraction, time: Fraction) -> int:
  """How many examples of a task are due before a time."""
  return max(math.ceil(share * time - Fraction(1, 2)), 0)


def lasting(shares: Sequence[Fraction], counts: Sequence[int]) -> int:
  """How many examples there are before that which a task does not have any more."""
  ends = sorted((Fraction(2 * count + 1, 2) / share, task) for task, (share, count) in enumerate(zip(shares, counts)))
  time, last = ends[0]
  return sum(_due(share, time) + (task < last and Fraction(2 * _due(share, time) + 1, 2) / share == time)
             for task, share in enumerate(shares))


@dataclasses.dataclass(frozen=True, eq=False)
class Mixed:
  """Random access to `count` examples of several datasets, in these shares; all have the same fields."""
  datasets: tuple[Any, ...]
  shares: tuple[Fraction, ...]
  count: int

  @functools.cached_property
  def _separate(self) -> bool:
    """Whether any of them has several documents in an example."""
    names = [set(dataset[0]) for dataset in self.datasets]
    if len({frozenset(own - {'segments'}) for own in names}) > 1:
      raise ConfigError(f'task.of: examples have the fields {" and ".join(", ".join(sorted(own)) for own in names)}; '
                        'give tasks whose examples have the same')
    return any('segments' in own for own in names)

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index) -> Example:
    if not 0 <= index < self.count:
      raise IndexError(f'example {index} of {self.count}')
    task, own = place(self.shares, int(index))
    example = self.datasets[task][own]
    return {'segments': np.ones(len(example['tokens']), np.int32), **example} if self._separate else example
