"""Problems of reasoning.py in a file: to learn from what a model wrote, or to keep a set of problems."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import operator
import os
from typing import Any

from loopformer import reading, storage
from loopformer.tasks.generated import Example, Generated, SymbolTokenizer, seed_of
from loopformer.tasks.reasoning import Problem
from loopformer.types import ConfigError, config_dataclass

REMEDY = 'give a file that record() wrote'


def record(file: str | os.PathLike, problems: Sequence[Problem]):
  """Writes problems, a line of JSON each."""
  lines = (json.dumps({'task': p.task, 'size': p.size, 'prompt': ' '.join(p.prompt),
                       'rounds': [' '.join(each) for each in p.rounds], 'answer': p.answer}) for p in problems)
  storage.write(file, ''.join(f'{line}\n' for line in lines))


def recorded(file: str | os.PathLike) -> list[Problem]:
  """The problems of a file. Raises ConfigError, which names the line, where it holds something else, or none."""
  problems = []
  for number, line in enumerate(reading.text(file, REMEDY).splitlines(), 1):
    where = f'{os.fspath(file)}, line {number}'
    row = reading.parsed(line, where, REMEDY, dict)
    with reading.naming(where, REMEDY):
      texts = [row[name] for name in ('task', 'prompt', 'answer')] + list(row['rounds'])
      if (not isinstance(row['rounds'], list) or not all(isinstance(text, str) for text in texts)
          or not row['prompt'].split()):
        raise TypeError('prompt, rounds and answer are texts, rounds a list of them, and the prompt is not empty')
      if isinstance(row['size'], bool) or operator.index(row['size']) < 0:
        raise TypeError('size is a whole number, 0 or more')
      problems.append(Problem(prompt=tuple(row['prompt'].split()),
                              rounds=tuple(tuple(r.split()) for r in row['rounds']), answer=row['answer'],
                              size=operator.index(row['size']), task=row['task']))
  if not problems:
    raise ConfigError(f'{os.fspath(file)}: it holds no problems; {REMEDY}')
  return problems


@dataclasses.dataclass(frozen=True)
class _Source:
  """Random access to the examples of problems."""
  of: Any
  problems: list[Problem]

  def __len__(self) -> int:
    return len(self.problems)

  def __getitem__(self, index) -> Example:
    return self.of.example(self.problems[int(index)])


@config_dataclass
class Recorded:
  """Task: the problems of `file`, shuffled in every epoch, as examples of the kind that `of.of` makes (Chain, Rounds,
  ..); evaluated as `of` is. What else `of` says of training examples, `pool` and `grow`, is not read."""
  of: Generated
  file: str
  paths = ('file',)

  def __post_init__(self):
    if not hasattr(self.of.of, 'example'):
      raise ConfigError(f'task.of.of = {type(self.of.of).__name__}: it makes examples of no problems that a file could '
                        'hold; give a form of tasks/reasoning.py, such as Chain')

  @property
  def length(self) -> int:
    return self.of.length

  @property
  def measure(self) -> Any:
    return self.of.measure

  @property
  def splits(self) -> Mapping[str, int]:
    return self.of.splits

  def prepare(self, workdir: str | os.PathLike, log: Callable = print) -> SymbolTokenizer | None:
    """As of `of`. Raises ConfigError where a problem has other symbols, is of no source here, or does not fit a row."""
    for number, problem in enumerate(recorded(self.file), 1):
      try:
        if problem.task not in self.of.of.tasks:
          raise ConfigError(f'task = {problem.task!r}: no such source of problems here; there is '
                            f'{", ".join(map(repr, self.of.of.tasks))}')
        self.of.of.example(problem)
      except ConfigError as error:
        raise ConfigError(f'{self.file}, line {number}: {error}') from None
    return self.of.prepare(workdir, log)

  def verify(self, workdir: str | os.PathLike, log: Callable = print):
    """Nothing: no data is stored."""

  def tokenizer_of(self, workdir: str | os.PathLike) -> SymbolTokenizer | None:
    """The symbols as a tokenizer."""
    return self.of.tokenizer_of(workdir)

  def examples(self, workdir: str | os.PathLike, split: str, seed: int) -> Any:
    """As a grain.MapDataset: training examples without end; others once, in order."""
    if split != 'train':
      return self.of.examples(workdir, split, seed)
    import grain
    source = _Source(self.of.of, recorded(self.file))
    return grain.MapDataset.source(source).shuffle(seed_of('order', seed) % 2 ** 32).repeat()
