"""Problems that are solved in rounds, and the examples that are made of them.

A source of problems (arithmetic.py, edit_distance.py, increasing.py, words.py) draws them in symbols, with the rounds
of their solution and an answer of one symbol. What a model is shown is another part:

    Chain    the problem, all rounds one after another, the answer: what is decoded token by token
    Rounds   the problem against the right end of a row, and of every round another such row: what a loop shows after
             each of its steps, all tokens of the round at once
    Asked    the problem alone, whose last token is asked for the answer
    Slots    the problem and a place for every token of its rounds and answer: what a denoiser writes in any order

After RELAY (Yu et al., 2502.08482, sections 3 and 4). The last symbol of all examples is the padding and the end.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from loopformer.tasks.algorithms import accuracy, by_place, exact, most_frequent
from loopformer.tasks.generated import Example, aligned, sequence
from loopformer.types import ConfigError, config_dataclass, real, whole

END = '<end>'
Round = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is asked, the rounds of its solution and the answer, in symbols.

  size: how long it is, in the unit of its source; task: its name among several, '' where there is one.
  """
  prompt: tuple[str, ...]
  rounds: tuple[Round, ...]
  answer: str
  size: int
  task: str = ''


@dataclasses.dataclass(frozen=True)
class Extent:
  """The most that a problem may have: tokens of the prompt, tokens of a round, rounds, tokens of all rounds together.
  """
  prompt: int
  round: int
  rounds: int
  chain: int


class Problems(Protocol):
  """A source of problems; a frozen part."""

  @property
  def symbols(self) -> tuple[str, ...]:
    """All that its problems are written with."""

  @property
  def extent(self) -> Extent:
    """Of its problems, up to those that rows have place for."""

  @property
  def room(self) -> int:
    """The largest size that rows have place for."""

  @property
  def tasks(self) -> Mapping[str, Any]:
    """The sources that it draws from, by the names that problems bear; itself, under '', if it is one."""

  def problem(self, rng: np.random.Generator) -> Problem:
    """One of any size that it trains on."""

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    """One of that size, of the source with that name."""

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The answer that rounds lead to, whoever wrote them; None where they lead to none."""

  def weight(self, task: str) -> float:
    """How much is learned from a problem of the source with that name."""


# Sizes ---------------------------------------------------------------------------------------------------------------


@config_dataclass
class Even:
  """All sizes alike."""

  def pick(self, rng: np.random.Generator, shortest: int, longest: int) -> int:
    return int(rng.integers(shortest, longest + 1))


@config_dataclass
class Proportional:
  """A size as often as it is large."""

  def pick(self, rng: np.random.Generator, shortest: int, longest: int) -> int:
    drawn = int(rng.integers((shortest + longest) * (longest - shortest + 1) // 2))
    size = shortest
    while drawn >= size:
      drawn, size = drawn - size, size + 1
    return size


@config_dataclass
class Sized:
  """What sources of problems have in common: their sizes.

  shortest, longest: of the problems that are drawn; room: the largest that a row has place for, `longest` by default;
  limit: the largest that there are symbols for, `room` by default. So tests on larger problems share symbols with the
  training, whose rows are shorter.
  """
  shortest: int = 1
  longest: int
  if TYPE_CHECKING:
    room: int = 0  # as it is once the part is made
    limit: int = 0  # also

    def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
      """What every source says for itself."""
  else:
    room: int | None = None
    limit: int | None = None
  sizes: Even | Proportional = Proportional()
  least = 1  # the smallest size that there is

  def __post_init__(self):
    name = type(self).__name__
    whole(f'{name}.shortest', self.shortest, self.least, why='there is no smaller problem')
    whole(f'{name}.longest', self.longest, self.shortest, why='the longest problem is not below the shortest')
    for field, least in (('room', self.longest), ('limit', self.room or self.longest)):
      if getattr(self, field) is None:
        object.__setattr__(self, field, least)
      whole(f'{name}.{field}', getattr(self, field), least,
            why='a row has place for the longest problem' if field == 'room' else 'all that rows hold has symbols')

  @property
  def tasks(self) -> dict[str, Any]:
    return {'': self}

  def problem(self, rng: np.random.Generator) -> Problem:
    return self.draw(rng, self.sizes.pick(rng, self.shortest, self.longest))

  def weight(self, task: str) -> float:
    return 1.0

  def checked(self, size: int, task: str) -> int:
    """The size. Raises ConfigError where there is no problem of it, or no such task."""
    if task:
      raise ConfigError(f'task = {task!r}: {type(self).__name__} is the only one here, and has no name; leave it out')
    return whole('size', size, self.least, self.limit, why=f'{type(self).__name__} has no problem of it')


@config_dataclass
class Several:
  """Problems of several sources, all alike often; the first token says which, '[ARI]' for the name ARI.

  weights: how much is learned from each, 1 for those that it does not name.
  """
  of: Mapping[str, Any]
  weights: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    if not self.of:
      raise ConfigError('Several.of is empty: name one or more sources of problems')
    for name, of in self.of.items():
      if not name or name.split() != [name]:
        raise ConfigError(f'Several.of names {name!r}: a name is a symbol of the text; give one without spaces')
      if set(of.tasks) != {''}:
        raise ConfigError(f'Several.of[{name!r}] = {type(of).__name__}: its problems have names of their own, '
                          f'{", ".join(of.tasks)}; name them all in one Several')
    for name, weight in self.weights.items():
      if name not in self.of:
        raise ConfigError(f'Several.weights names {name!r}, which Several.of does not have; '
                          f'it has {", ".join(self.of)}')
      real(f'Several.weights[{name!r}]', weight, '[0, inf)')

  @property
  def tasks(self) -> Mapping[str, Any]:
    return self.of

  @property
  def symbols(self) -> tuple[str, ...]:
    inner = (symbol for of in self.of.values() for symbol in of.symbols)
    return tuple(dict.fromkeys([*map(_tag, self.of), *inner]))

  @property
  def extent(self) -> Extent:
    all_of = [of.extent for of in self.of.values()]
    most = Extent(*(max(values) for values in zip(*map(dataclasses.astuple, all_of))))
    return dataclasses.replace(most, prompt=most.prompt + 1)

  @property
  def room(self) -> int:
    """The largest that any of them has place for."""
    return max(of.room for of in self.of.values())

  def problem(self, rng: np.random.Generator) -> Problem:
    name = list(self.of)[rng.integers(len(self.of))]
    return self._named(name, self.of[name].problem(rng))

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    return self._named(task, self._of(task).draw(rng, size))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    return self._of(task).concluded(rounds)

  def weight(self, task: str) -> float:
    return float(self.weights.get(task, 1.0))

  def _of(self, task: str) -> Any:
    if task not in self.of:
      raise ConfigError(f'task = {task!r}: no such source of problems; choose one of {", ".join(self.of)}')
    return self.of[task]

  def _named(self, name: str, problem: Problem) -> Problem:
    return dataclasses.replace(problem, prompt=(_tag(name), *problem.prompt), task=name)


def _tag(name: str) -> str:
  return f'[{name}]'


# Examples ------------------------------------------------------------------------------------------------------------


class Shown:
  """What all kinds of examples share."""
  of: Any  # a source of problems
  example: Callable[[Problem], Example]

  @property
  def tasks(self) -> Mapping[str, Any]:
    """The sources of problems, by the names that these bear."""
    return self.of.tasks

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.of.symbols, END)

  @property
  def pad(self) -> int:
    """The id of padding and end."""
    return len(self.of.symbols)

  def __call__(self, rng: np.random.Generator) -> Example:
    return self.example(self.of.problem(rng))

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the most frequent symbols, anywhere and by place."""
    guesses = {'most frequent': most_frequent(examples), 'by place': by_place(examples)}
    return accuracy(examples, guesses) | exact(examples, guesses)

  def ids(self, symbols: Sequence[str]) -> list[int]:
    """Raises ConfigError where a symbol is none of the task's."""
    known = _places(self.symbols)
    unknown = [symbol for symbol in symbols if symbol not in known]
    if unknown:
      raise ConfigError(f'problem {" ".join(symbols)!r}: {unknown[0]!r} is not a symbol of this task; use the source '
                        'that it came from, or raise its limit')
    return [known[symbol] for symbol in symbols]


@functools.lru_cache(maxsize=64)
def _places(symbols: tuple[str, ...]) -> dict[str, int]:
  return {symbol: place for place, symbol in enumerate(symbols)}


@config_dataclass
class Chain(Shown):
  """The problem, its rounds, the answer, the end; asked for from the first token after the problem on.

      3 * 2 + 6 / 3 = 6 + 6 / 3 = 6 + 2 = 8 8 <end>

  length: tokens of a row; what the source's largest problem needs by default.
  """
  of: Any
  length: int | None = None

  def __post_init__(self):
    if self.length is None:
      extent = self.of.extent
      object.__setattr__(self, 'length', extent.prompt + extent.chain + 1)
    whole('Chain.length', self.length, 1)

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where its trace does not fit a row."""
    asked = [symbol for each in problem.rounds for symbol in each] + [problem.answer]
    ids, weight = [*self.ids([*problem.prompt, *asked]), self.pad], self.of.weight(problem.task)
    assert self.length is not None
    if len(ids) > self.length + 1:
      raise ConfigError(f'Chain.length = {self.length}: a problem of size {problem.size} with its trace has '
                        f'{len(ids) - 1} tokens; raise Chain.length, or take smaller problems')
    return sequence(ids, [0.0] * len(problem.prompt) + [weight] * (len(asked) + 1), self.length, self.pad)

  def read(self, problem: Problem, text: Sequence[str]) -> Problem:
    """The problem with what was written after its prompt, without the end, in the place of its solution: all tokens but
    the last as one round, and the answer, '' where nothing was written."""
    return dataclasses.replace(problem, rounds=(tuple(text[:-1]),), answer=text[-1] if text else '')


def left_aligned(form: Any, problem: Problem, asked: Sequence[str | None]) -> Example:
  """The example in which the problem's tokens, and padding after them, are asked for these symbols, each for its own or
  None for nothing.

  What lies right of that is padding too, a segment of its own that nothing reads and that weighs nothing. Besides,
  examples have size i32[], that of the problem: plans.LogDepth reads it. Raises ConfigError where it does not fit a
  row.
  """
  count, n = len(asked), form.length
  if count > n:
    raise ConfigError(f'{type(form.of).__name__}.room: a problem of size {problem.size} has {count} tokens, but rows '
                      f'have {n}; raise room, and the length of rows where it is given, or take smaller problems')
  tokens, targets = np.full((2, n), form.pad, np.int32)
  tokens[:len(problem.prompt)] = form.ids(problem.prompt)
  weights, own = np.zeros(n, np.float32), np.arange(n) < count
  wanted = [place for place, symbol in enumerate(asked) if symbol is not None]
  targets[wanted], weights[wanted] = form.ids([asked[place] for place in wanted]), form.of.weight(problem.task)
  return {**aligned(tokens, targets, weights), 'segments': own.astype(np.int32),
          'size': np.array(problem.size, np.int32)}


@config_dataclass
class Asked(Shown):
  """The problem, and as many places of padding as there are thoughts; the answer is asked for at the last of them, and
  nothing else; see `left_aligned`.

      tokens     3 * 2 + 1 = . .      thoughts = 2
      targets                  7

  length: tokens of a row; what the source's largest problem needs by default.
  """
  of: Any
  thoughts: int = 0
  length: int | None = None

  def __post_init__(self):
    whole('Asked.thoughts', self.thoughts, 0)
    if self.length is None:
      object.__setattr__(self, 'length', self.of.extent.prompt + self.thoughts)
    whole('Asked.length', self.length, 1)

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where it is longer than a row."""
    return left_aligned(self, problem, [None] * (len(problem.prompt) + self.thoughts - 1) + [problem.answer])


@config_dataclass
class Slots(Shown):
  """The problem, and a slot for every token of its rounds and for its answer, all of which are asked for; see
  `left_aligned`.

      tokens     1 0 1 = . . . .
      targets    1 0 1 = 1 1 0 0

  Denoisers read the targets, of which they have the problem's tokens, that weigh nothing; other models, which read the
  tokens, have slots to compute at, and no slot sees what stands in another.

  answer: False where the last round ends with the answer, which then has no slot of its own: of two slots that always
  hold the same, a denoiser learns to copy one from the other.
  """
  of: Any
  answer: bool = True

  @property
  def length(self) -> int:
    return self.of.extent.prompt + self.of.extent.chain + self.answer

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where it does not fit a row, or has an answer that would have no slot."""
    count, chain = len(problem.prompt), [one for each in problem.rounds for one in each]
    if not self.answer and chain[-1:] != [problem.answer]:
      raise ConfigError(f'Slots.answer = False: the rounds of a problem of {type(self.of).__name__} do not end with '
                        f'its answer, {problem.answer!r}, which would have no slot; leave Slots.answer at True')
    made = left_aligned(self, problem, [*[None] * count, *chain, *[problem.answer] * self.answer])
    made['targets'][:count] = made['tokens'][:count]
    return made

  def solved(self, answers: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bool[N]: whether answers i32[N, T] are right in all slots of examples with these targets and weights."""
    return ((answers == targets) | (weights <= 0)).all(-1)

  def answered(self, answers: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bool[N]: whether they are right in the last slot, the problem's answer."""
    last = (np.arange(self.length) * (weights > 0)).argmax(-1)[:, None]
    return (np.take_along_axis(answers, last, -1) == np.take_along_axis(targets, last, -1))[:, 0]


@config_dataclass
class Rounds(Shown):
  """The problem in n tokens, and every round in n more, both against the right end of the row (RELAY, section 3.1).

      tokens          3 * 2 + 6 / 3 =
      rounds   1          6 + 6 / 3 =       asked for, and the one padding before it
               2              6 + 2 =
               3                    8
      targets                       8       the answer, at the last token

  n is the problem's own: the most of its prompt and of its rounds; a round as wide has no padding before it. Rows are
  as wide as the source's largest problem; what lies left of n is a segment of its own, that no token of the problem
  reads.

  Besides tokens, targets, weights and positions an example has segments i32[n], loops i32[], the number T of rounds,
  rounds i32[K, n] for the most rounds K, and round_weights f32[K, n]: equal within a round and between rounds, and
  the problem's weight in sum, so that long problems count as much as short ones.
  """
  of: Any

  def __post_init__(self):
    if not self.of.extent.rounds:
      raise ConfigError(f'Rounds.of = {type(self.of).__name__}: its problems have no rounds to show; take a source '
                        'with solutions, or ask for their answers by Asked')

  @property
  def length(self) -> int:
    return max(self.of.extent.prompt, self.of.extent.round)

  @property
  def most(self) -> int:
    """K."""
    return self.of.extent.rounds

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where it, or a round, is wider than a row, or it has more rounds than K."""
    count, width, n, weight = len(problem.rounds), self.width(problem), self.length, self.of.weight(problem.task)
    if width > n or not 1 <= count <= self.most:
      raise ConfigError(f'{type(self.of).__name__}.room: a problem of size {problem.size} has {count} rounds and '
                        f'{width} tokens, but rows have place for 1 to {self.most} rounds and {n} tokens; raise room, '
                        'or take smaller problems')
    tokens, targets = np.full((2, n), self.pad, np.int32)
    weights, segments = np.zeros(n, np.float32), np.zeros(n, np.int32)
    rounds, asked = np.full((self.most, n), self.pad, np.int32), np.zeros((self.most, n), np.float32)
    tokens[n - len(problem.prompt):] = self.ids(problem.prompt)
    segments[n - width:] = 1
    for row, mark, symbols in zip(rounds, asked, problem.rounds):
      row[n - len(symbols):] = self.ids(symbols)
      first = max(n - len(symbols) - 1, n - width)
      mark[first:] = weight / (count * (n - first))
    targets[-1], weights[-1] = self.ids([problem.answer])[0], weight
    return {**aligned(tokens, targets, weights), 'segments': segments, 'loops': np.array(count, np.int32),
            'rounds': rounds, 'round_weights': asked}

  def width(self, problem: Problem) -> int:
    """n."""
    return max(map(len, (problem.prompt, *problem.rounds)))

  def read(self, problem: Problem, shown: np.ndarray, answer: int) -> Problem:
    """The problem with what heads have chosen in the place of its solution.

    shown: ids [T, N] against the right end, of which a round is what follows the last padding, or all n tokens of the
    problem where there is none; answer: an id.
    """
    rounds = tuple(self._cut(row[-self.width(problem):]) for row in shown)
    return dataclasses.replace(problem, rounds=rounds, answer=self.symbols[answer])

  def _cut(self, row: np.ndarray) -> Round:
    pads = np.flatnonzero(row == self.pad)
    return tuple(self.symbols[i] for i in row[pads[-1] + 1 if len(pads) else 0:])
