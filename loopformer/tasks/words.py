"""Word problems of groups, and regular languages: what comes of an input, token by token.

    57 3 118 =      rounds 57, 57 * 3, 57 * 3 * 118, the last of which is the answer too
    a b a b $       rounds 1 0 1 0, states of an automaton; the answer +, or - for a word that it does not accept

After A Little Depth Goes a Long Way (Merrill and Sabharwal, 2503.03961, sections 4 and 6) and To CoT or To Loop (Xu and
Sato, 2505.19245). Log-depth loops can do them, chains need a step a token. As Chain they are a chain of thought; as
Prefixes every token is asked for its round; as Slots they are for denoisers.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import numpy as np

from loopformer.tasks.generated import Example
from loopformer.tasks.reasoning import Even, Extent, Problem, Proportional, Round, Shown, Sized, left_aligned
from loopformer.types import ConfigError, config_dataclass, real, whole

EQUALS, END_OF_WORD, ACCEPTED, REFUSED = '=', '$', '+', '-'


# Groups --------------------------------------------------------------------------------------------------------------


@config_dataclass
class Symmetric:
  """All permutations of so many symbols, in lexicographic order: the first is the identity. S5 has 120, and is not
  solvable."""
  degree: int

  def __post_init__(self):
    whole(f'{type(self).__name__}.degree', self.degree, 1, 6, why='its table has a cell for every two permutations')

  @property
  def elements(self) -> tuple[tuple[int, ...], ...]:
    return tuple(itertools.permutations(range(self.degree)))


@config_dataclass
class Alternating(Symmetric):
  """The even permutations among them; A5 has 60, and is not solvable."""

  @property
  def elements(self) -> tuple[tuple[int, ...], ...]:
    return tuple(p for p in itertools.permutations(range(self.degree))
                 if sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0)


@config_dataclass
class Cyclic:
  """The rotations of so many symbols, addition mod `degree`; of two it is parity."""
  degree: int

  def __post_init__(self):
    whole('Cyclic.degree', self.degree, 1, 1000)

  @property
  def elements(self) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple((i + turn) % self.degree for i in range(self.degree)) for turn in range(self.degree))


@functools.cache
def products(group: Symmetric | Alternating | Cyclic) -> np.ndarray:
  """i64[G, G]: the number of a b, where (a b)(i) = a(b(i)); 0 is the identity."""
  elements = group.elements
  number = {element: place for place, element in enumerate(elements)}
  return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


@config_dataclass
class Word(Sized):
  """Words of a group's elements, uniform and independent; round t is the product of the first t. Size: the elements."""
  group: Symmetric | Alternating | Cyclic
  sizes: Even | Proportional = Even()

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*map(str, range(len(self.group.elements))), EQUALS)

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room + 1, round=1, rounds=self.room, chain=self.room)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    return self.solved(rng.integers(len(products(self.group)), size=self.checked(size, task)).tolist())

  def solved(self, word: Sequence[int]) -> Problem:
    """The problem of elements by their numbers. Raises ConfigError where there are none, or other numbers."""
    table = products(self.group)
    wrong = [number for number in word if number not in range(len(table))]
    if wrong or not len(word):
      raise ConfigError(f'word = {list(word)}: give one or more elements of the group by their numbers, 0 to '
                        f'{len(table) - 1}')
    running = [str(number) for number in itertools.accumulate(word, lambda a, b: int(table[a, b]))]
    return Problem(prompt=(*map(str, word), EQUALS), rounds=tuple((one,) for one in running), answer=running[-1],
                   size=len(word))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The last product."""
    last = rounds[-1][-1] if rounds and rounds[-1] else ''
    return last if last.isdigit() else None


# Regular languages ---------------------------------------------------------------------------------------------------


@config_dataclass
class Automaton:
  """A deterministic one: it begins in state 0, and in state q reads letter i of `letters`, to state next[q][i]."""
  letters: str
  next: tuple[tuple[int, ...], ...]
  accepting: tuple[int, ...]

  def __post_init__(self):
    taken = {END_OF_WORD, ACCEPTED, REFUSED}
    if (not self.letters or len(set(self.letters)) < len(self.letters) or taken & set(self.letters)
        or any(letter.isspace() for letter in self.letters)):
      raise ConfigError(f'Automaton.letters = {self.letters!r}: give one or more different letters, and no space nor '
                        f'{" ".join(sorted(taken))} among them, which say other things')
    states = range(len(self.next))
    if not self.next or any(len(row) != len(self.letters) or not set(row) <= set(states) for row in self.next):
      raise ConfigError(f'Automaton.next = {self.next}: give for every state one of 0..{len(states) - 1} a letter of '
                        f'{self.letters!r}')
    if not set(self.accepting) <= set(states):
      raise ConfigError(f'Automaton.accepting = {self.accepting}: states are 0..{len(states) - 1}')


PARITY = Automaton(letters='01', next=((0, 1), (1, 0)), accepting=(1,))  # an odd number of ones
AB = Automaton(letters='ab', next=((1, 2), (2, 0), (2, 2)), accepting=(0,))  # (ab)*
NO_AA_BB = Automaton(letters='abc', next=((1, 2, 0), (3, 2, 0), (1, 3, 0), (3, 3, 3)), accepting=(0, 1, 2))


@config_dataclass
class Regular(Sized):
  """Words of an automaton's letters, and whether it accepts them; round t is its state after t letters. Size: the
  letters.

  Words are uniform, but for a share `walks` of them, which is uniform among those that are accepted, where there are
  any of that size: of many languages hardly any word would be.
  """
  automaton: Automaton
  walks: float = 0.5
  sizes: Even | Proportional = Even()

  def __post_init__(self):
    Sized.__post_init__(self)
    real('Regular.walks', self.walks, '[0, 1]', why='it is a share of the words')

  @property
  def symbols(self) -> tuple[str, ...]:
    states = (f'q{state}' for state in range(len(self.automaton.next)))
    return (*self.automaton.letters, END_OF_WORD, *states, ACCEPTED, REFUSED)

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room + 1, round=1, rounds=self.room, chain=self.room)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    count, walks, state, word = self.checked(size, task), rng.random() < self.walks, 0, []
    table = _ways(self.automaton, count)
    for left in range(count - 1, -1, -1):
      weights = [table[left][after] for after in self.automaton.next[state]]
      total = sum(weights)
      shares = np.array(weights) / total if walks and total else None
      letter = int(rng.choice(len(weights), p=shares))
      word.append(self.automaton.letters[letter])
      state = self.automaton.next[state][letter]
    return self.solved(''.join(word))

  def solved(self, word: str) -> Problem:
    """The problem of a word. Raises ConfigError where it is empty, or has letters that the automaton does not read."""
    if not word or set(word) - set(self.automaton.letters):
      raise ConfigError(f'word = {word!r}: give one or more letters of {self.automaton.letters!r}')
    letters = [self.automaton.letters.index(letter) for letter in word]
    states = list(itertools.accumulate(letters, lambda state, letter: self.automaton.next[state][letter], initial=0))
    answer = ACCEPTED if states[-1] in self.automaton.accepting else REFUSED
    return Problem(prompt=(*word, END_OF_WORD), rounds=tuple((f'q{state}',) for state in states[1:]), answer=answer,
                   size=len(word))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """Whether the last state accepts."""
    last = rounds[-1][-1] if rounds and rounds[-1] else ''
    if not last[1:].isdigit():
      return None
    return ACCEPTED if int(last[1:]) in self.automaton.accepting else REFUSED


@functools.lru_cache(maxsize=256)
def _ways(automaton: Automaton, count: int) -> list[list[float]]:
  """ways[n][q]: a number proportional to that of words of n letters that lead from state q to an accepting one."""
  ways = [[float(state in automaton.accepting) for state in range(len(automaton.next))]]
  for _ in range(count):
    row = [sum(ways[-1][after] for after in row) for row in automaton.next]
    most = max(row) or 1.0  # they would grow without bound
    ways.append([one / most for one in row])
  return ways


# Examples ------------------------------------------------------------------------------------------------------------


@config_dataclass
class Prefixes(Shown):
  """Every token asked for its round, and the last token for the answer; of sources with a round of one token a token.

      tokens     57    3      118      =
      targets    57    57 3   57 3 118 57 3 118

  What lies right of the problem is padding, a segment of its own that weighs nothing. Besides, examples have size
  i32[], that of the problem: plans.LogDepth reads it.
  """
  of: Any

  def __post_init__(self):
    if self.of.extent.round != 1:
      raise ConfigError(f'Prefixes.of = {type(self.of).__name__}: its rounds have up to {self.of.extent.round} tokens; '
                        'take a source whose rounds are one token a token, such as Word')

  @property
  def length(self) -> int:
    return self.of.extent.prompt

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where it is longer than a row, or has not a round of one token for every token
    but the last."""
    asked = [*(one for each in problem.rounds for one in each), problem.answer]
    if len(problem.rounds) + 1 != len(problem.prompt) or len(asked) != len(problem.prompt):
      raise ConfigError(f'Prefixes.of = {type(self.of).__name__}: a problem of {len(problem.prompt)} tokens has '
                        f'{len(problem.rounds)} rounds of {len(asked) - 1} tokens; take a source whose rounds are one '
                        'token a token, whole, such as Word')
    return left_aligned(self, problem, asked)
