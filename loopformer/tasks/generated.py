"""Tasks that are made, not read: example i of a split is a pure function of (seed, i).

A generator is a frozen part that makes one example from a NumPy generator; `Generated` turns it into a task. Adding a
task is adding a generator.
"""
from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np

from loopformer.data.symbols import SymbolTokenizer
from loopformer.inference import measures
from loopformer.types import ConfigError, config_dataclass, whole

ENDLESS = 2**40  # examples of a training set that never repeats

Example = dict[str, np.ndarray]


class Generator(Protocol):
  """Makes examples; a frozen part, all of whose fields are the task's own."""

  @property
  def length(self) -> int:
    """T, tokens of every example."""

  @property
  def symbols(self) -> tuple[str, ...] | None:
    """The text of every token id, the last of which is the padding and the end; None where inputs are vectors."""

  def __call__(self, rng: np.random.Generator) -> Example:
    """tokens i32[T] (or f32[T, width]), targets i32[T] (or f32[T]), weights f32[T] (1 where an answer is wanted),
    positions i32[T]; segments i32[T] where documents share an example; and whatever else a plan or term reads."""

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Scores on `examples` of guesses that need no thought, by name; what a result has to be compared with."""


def sequence(ids: Sequence[int], answers: Sequence[float] | np.ndarray, length: int, pad: int) -> Example:
  """The example in which the marked ids of a sequence are to be predicted from those before them.

  Args:
    ids: up to length + 1 of them; answers: of the same length, which of them are asked for; pad: fills the rest.

  Raises:
    ValueError: the sequence is longer than length + 1, or asks for its first id, which nothing precedes.
  """
  if len(ids) != len(answers) or len(ids) > length + 1 or answers[0]:
    raise ValueError(f'{len(ids)} ids with {len(answers)} marks (the first: {answers[0]}) do not fit length = {length}')
  whole = np.full(length + 1, pad, np.int32)
  whole[:len(ids)] = ids
  marks = np.zeros(length + 1, np.float32)
  marks[:len(ids)] = answers
  return aligned(whole[:-1], whole[1:], marks[1:])


def aligned(tokens: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Example:
  """The example whose position i is asked for targets[i]; one document from its first token to its last."""
  length = len(tokens)
  return {'tokens': tokens, 'targets': targets, 'weights': np.asarray(weights, np.float32),
          'positions': np.arange(length, dtype=np.int32)}


def seed_of(*words: Any) -> int:
  """A seed from anything that prints: streams of different words are independent."""
  return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), 'big')


@config_dataclass
class Same:
  """Every example comes from the same generator."""

  def check(self, of: Any):
    """Nothing: it serves all generators."""

  def at(self, of: Any, index: int) -> Any:
    return of


@config_dataclass
class Rise:
  """`first`, and `add` more every `every` examples."""
  first: int
  every: int
  add: int = 1

  def __post_init__(self):
    for name in ('first', 'every', 'add'):
      whole(f'task.grow: {name}', getattr(self, name), 1)

  def at(self, index: int, last: int) -> int:
    """The value for example `index`, `last` at most."""
    return min(self.first + self.add * (index // self.every), last)


@config_dataclass
class Double:
  """`first`, and twice as much every `every` examples."""
  first: int
  every: int

  def __post_init__(self):
    for name in ('first', 'every'):
      whole(f'task.grow: {name}', getattr(self, name), 1)

  def at(self, index: int, last: int) -> int:
    """The value for example `index`, `last` at most."""
    return min(self.first << min(index // self.every, 62), last)


@config_dataclass
class Grow:
  """A curriculum: each of the generator's fields that `fields` names, `of/longest` that of its part `of`, rises to its
  own value. Rows must keep their shape meanwhile (generators have fields for the room that there is), so that one
  program serves all."""
  fields: Mapping[str, Rise | Double]

  def check(self, of: Any):
    """Raises ConfigError where the generator has no such field, or its rows would change their shape."""
    for name in self.fields:
      inner = of
      for word in name.split('/'):
        names = [field.name for field in dataclasses.fields(inner)] if dataclasses.is_dataclass(inner) else []
        if word not in names:
          raise ConfigError(f'task.grow.fields names {name!r}, which {type(of).__name__} does not have; '
                            f'{type(inner).__name__} has {", ".join(names) or "no fields"}')
        inner = getattr(inner, word)
    first, last = ({name: array.shape for name, array in generator(np.random.default_rng(0)).items()}
                   for generator in (self.at(of, 0), of))
    changed = [name for name in last if first[name] != last[name]]
    if changed:
      raise ConfigError(f'task.grow: {changed[0]} of the first examples has shape {first[changed[0]]}, of the last '
                        f'{last[changed[0]]}; give the generator the room of its largest')

  def at(self, of: Any, index: int) -> Any:
    """The generator of example `index`."""
    for name, rise in self.fields.items():
      of = _risen(of, name.split('/'), lambda last: rise.at(index, last))
    return of


def _risen(of, names, rise):
  """The generator with another value of the field that a path of names leads to."""
  name, *rest = names
  old = getattr(of, name)
  return dataclasses.replace(of, **{name: _risen(old, rest, rise) if rest else rise(old)})


@dataclasses.dataclass(frozen=True)
class Source:
  """Random access to `count` examples; example i depends on (seed, i) alone."""
  of: Any
  grow: Same | Grow
  seed: int
  count: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index) -> Example:
    if not 0 <= index < self.count:
      raise IndexError(f'example {index} of {self.count}')
    return self.grow.at(self.of, int(index))(np.random.default_rng((self.seed, int(index))))


@config_dataclass
class Generated:
  """Task: examples of the generator `of`.

  pool: how many different ones to train on; None makes a fresh one every time. held_out: how many to validate on;
  they are the same whatever the seed of the run, and drawn apart from those that are trained on: where there are few
  problems, the same ones are in both. tests: other generators to evaluate on, by name (longer, harder).
  grow: a curriculum of the training examples; it needs fresh ones (no `pool`).
  """
  of: Any
  grow: Same | Grow = Same()
  pool: int | None = None
  held_out: int = 1024
  tests: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  measure: measures.Answers | measures.Errors = measures.Answers()

  def __post_init__(self):
    for name in ('pool', 'held_out'):
      if getattr(self, name) is not None:
        whole(f'task.{name}', getattr(self, name), 1)
    for name in {'train', 'validation'} & set(self.tests):
      raise ConfigError(f'task.tests names {name!r}, which the task has of its own; give it another name')
    if self.pool is not None and self.grow != Same():
      raise ConfigError(f'task.pool = {self.pool}: a curriculum needs fresh examples in order; give pool = None')
    self.grow.check(self.of)

  @property
  def length(self) -> int:
    return self.of.length

  @property
  def splits(self) -> dict[str, int]:
    """Name of each split that is not trained on -> tokens of its examples."""
    return {'validation': self.of.length, **{name: of.length for name, of in self.tests.items()}}

  def prepare(self, workdir: str | os.PathLike, log: Callable = print) -> SymbolTokenizer | None:
    """The tokenizer; prints what simple guesses score on the held-out examples."""
    shown = list(itertools.islice(iter(self.source('validation', 0)), 256))
    for name, score in self.of.baselines(shown).items():
      log(f'floor: {name} {score:.3f}')
    return self.tokenizer_of(workdir)

  def verify(self, workdir: str | os.PathLike, log: Callable = print):
    """Nothing: no data is stored."""

  def tokenizer_of(self, workdir: str | os.PathLike) -> SymbolTokenizer | None:
    """The symbols as a tokenizer; None where inputs are vectors."""
    return None if self.of.symbols is None else SymbolTokenizer(self.of.symbols)

  def source(self, split: str, seed: int) -> Source:
    """The examples of 'train' (which depend on the seed), of 'validation', or of one of `tests`."""
    if split == 'train':
      return Source(self.of, self.grow, seed_of('train', seed), self.pool or ENDLESS)
    if split not in self.splits:
      raise ConfigError(f'split {split!r}: there are {", ".join(["train", *self.splits])}')
    return Source(self.tests.get(split, self.of), Same(), seed_of(split), self.held_out)

  def examples(self, workdir: str | os.PathLike, split: str, seed: int) -> Any:
    """As a grain.MapDataset: training examples without end, shuffled anew in every epoch; others once, in order."""
    import grain
    dataset = grain.MapDataset.source(self.source(split, seed))
    if split != 'train':
      return dataset
    return dataset if self.pool is None else dataset.shuffle(seed_of('order', seed) % 2**32).repeat()
