"""Edit distance and longest common subsequence of two strings, as one token; edit distance row by row of its table.

After timestep encoding (On expressive power of looped transformers, Xu and Sato, 2410.01405; section 5). Both write

    c a b | b a b b <sep> 5 <eos>        what follows <sep> being asked for

Ids are the paper's: pad 0, sep 1, eos 2, | 3, comma 4, letters 5..30, numbers from 31. Rows are filled with pad; the
end symbol of the library, which no row holds, comes last. Rows have 2 * letters + 7 tokens, 127 for strings of 60.
"""
from __future__ import annotations

from collections.abc import Sequence
import string

import numpy as np

from loopformer.tasks.algorithms import accuracy, answers, by_place, exact, most_frequent
from loopformer.tasks.generated import Example, sequence
from loopformer.tasks.reasoning import Extent, Problem, Round, Sized
from loopformer.types import ConfigError, config_dataclass, whole

PAD, SEP, EOS, BAR = 0, 1, 2, 3
FIRST_LETTER, FIRST_NUMBER = 5, 31
LETTERS = len(string.ascii_lowercase)
COST, REPLACE = 2, 3  # of a letter inserted or deleted, of one replaced
UNRELATED = 0.4  # share of pairs that are drawn apart
FEWEST = 3  # letters of an alphabet
SHORTER, LONGER = 3, 2  # how far the length of the second string may be off


@config_dataclass
class EditDistance:
  """Costs: insert 2, delete 2, replace 3; but along the border of the table a step costs 1 (`edit_distance`).

  letters: n, of the first string. Both are of an alphabet of 3..using + 2 of the 26 letters, drawn for each pair. With
  probability 0.4 the second is random, of n - 3 to n + 2 letters; else it is the first after 1..n edits, each a
  deletion (of more than two letters), a replacement or an insertion. Pairs that are equal, or of which the second has
  another length than that, are drawn anew. The shorter comes first. Numbers 0..3n + 2, of which the paper has 3n: the
  last three are rare.
  """
  letters: int = 60
  using: int = 24

  def __post_init__(self):
    whole('EditDistance.letters', self.letters, SHORTER + 1, why='the second string, 3 shorter at most, is not empty')
    whole('EditDistance.using', self.using, 1, LETTERS - FEWEST + 1,
          why=f'alphabets have {FEWEST} to using + {FEWEST - 1} of {LETTERS} letters')

  @property
  def length(self) -> int:
    return _length(self.letters)

  @property
  def symbols(self) -> tuple[str, ...]:
    return _symbols(3 * self.letters + LONGER)

  def __call__(self, rng: np.random.Generator) -> Example:
    pair = self.pair(rng)
    return _row(*pair, edit_distance(*pair), self.length)

  def pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two strings, numbers of letters, the shorter first."""
    pair = None
    while pair is None:
      pair = self._pair(rng)
    return pair

  def _pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """As `pair`; None where they are refused."""
    n = self.letters
    alphabet = rng.permutation(LETTERS)[:FEWEST + rng.integers(self.using)]
    first = rng.choice(alphabet, n)
    if rng.random() < UNRELATED:
      second = rng.choice(alphabet, rng.integers(n - SHORTER, n + LONGER + 1))
    else:
      second = _edited(rng, first, alphabet, int(rng.integers(1, n + 1)))
    if not n - SHORTER <= len(second) <= n + LONGER or np.array_equal(first, second):
      return None
    return (second, first) if len(second) < len(first) else (first, second)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the most frequent answers, anywhere and by place, and of comparing letters place by place."""
    def compared(first, second):
      n = min(len(first), len(second))
      return REPLACE * np.count_nonzero(first[:n] != second[:n]) + COST * abs(len(first) - len(second))
    return _floors(examples, compared)


@config_dataclass
class EditRows(Sized):
  """Edit distance, a row of its table a round, for reasoning.py; after RELAY (2502.08482, section 4).

      o t m l | o t t m l <sep>       0 2 4 6 7 ,   2 0 2 4 6 ,   4 2 3 2 4 ,   6 4 5 4 2 ,       the answer 2

  Size: the letters of the first of EditDistance's strings. Rounds: a letter of the shorter string each, columns 1 to
  the length of the longer one, and a comma. using: as of EditDistance.
  """
  shortest: int = SHORTER + 1
  using: int = 8
  least = SHORTER + 1

  def __post_init__(self):
    Sized.__post_init__(self)
    EditDistance(letters=self.longest, using=self.using)

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*string.ascii_lowercase, '|', ',', '<sep>', *map(str, range(3 * self.limit + LONGER + 1)))

  @property
  def extent(self) -> Extent:
    longer = self.room + LONGER
    return Extent(prompt=self.room + longer + 2, round=longer + 1, rounds=self.room, chain=self.room * (longer + 1))

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    pair = EditDistance(letters=self.checked(size, task), using=self.using).pair(rng)
    first, second = (''.join(string.ascii_lowercase[letter] for letter in letters) for letters in pair)
    return self.solved(first, second, size)

  def solved(self, first: str, second: str, size: int) -> Problem:
    """The problem of two strings, the shorter one first. Raises ConfigError where they are not, or one is empty."""
    if not 0 < len(first) <= len(second) or set(first + second) - set(string.ascii_lowercase):
      raise ConfigError(f'first = {first!r}, second = {second!r}: give two strings of letters a to z, of which the '
                        'second is not the shorter one')
    table = distances(*(np.array(list(text)) for text in (first, second)))
    rounds = tuple((*map(str, row[1:]), ',') for row in table[1:])
    return Problem(prompt=(*first, '|', *second, '<sep>'), rounds=rounds, answer=str(table[-1, -1]), size=size)

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The last number of the last row."""
    numbers = [word for word in rounds[-1] if word.isdigit()] if rounds else []
    return numbers[-1] if numbers else None


@config_dataclass
class LongestCommonSubsequence:
  """How many letters, in order but not side by side, two strings of `letters` letters have in common.

  Each string draws `using` of the 26 letters with replacement, then its own letters from these: strings overlap little,
  and answers are low. Look at the baselines. Numbers 0..letters.
  """
  letters: int = 100
  using: int = 8

  def __post_init__(self):
    whole('LongestCommonSubsequence.letters', self.letters, 1, why='a string has a letter')
    whole('LongestCommonSubsequence.using', self.using, 1, why='letters are drawn from some')

  @property
  def length(self) -> int:
    return _length(self.letters)

  @property
  def symbols(self) -> tuple[str, ...]:
    return _symbols(self.letters)

  def __call__(self, rng: np.random.Generator) -> Example:
    first, second = (rng.choice(rng.integers(LETTERS, size=self.using), self.letters) for _ in range(2))
    return _row(first, second, common_subsequence(first, second), self.length)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the most frequent answers, anywhere and by place, and of letters that are equal place by place."""
    return _floors(examples, lambda first, second: np.count_nonzero(first == second))


def edit_distance(first: np.ndarray, second: np.ndarray) -> int:
  """D[n, m] of `distances`."""
  return int(distances(first, second)[-1, -1])


def distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """i64[n + 1, m + 1]: the table D, where D[i, 0] = i, D[0, j] = j and
  D[i, j] = min(D[i-1, j] + 2, D[i, j-1] + 2, D[i-1, j-1] + (3 where letters differ, else 0))."""
  replace = REPLACE * (first[:, None] != second)
  paid = COST * np.arange(len(second) + 1)  # for insertions along a row
  rows = [np.arange(len(second) + 1)]
  for i, costs in enumerate(replace, 1):
    down = np.minimum(rows[-1][1:] + COST, rows[-1][:-1] + costs)
    rows.append(np.minimum.accumulate(np.concatenate([[i], down]) - paid) + paid)
  return np.stack(rows)


def common_subsequence(first: np.ndarray, second: np.ndarray) -> int:
  """L[n, m], where L is 0 along the border and L[i, j] = max(L[i-1, j], L[i, j-1], L[i-1, j-1] + (1 where equal))."""
  row = np.zeros(len(second) + 1, np.int64)
  for equal in first[:, None] == second:
    row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + equal))
  return int(row[-1])


def _edited(rng: np.random.Generator, letters: np.ndarray, alphabet: np.ndarray, edits: int) -> np.ndarray:
  """The string after so many edits, each a deletion, a replacement or an insertion, all alike."""
  made = letters.tolist()
  kinds, places, new = rng.integers(3, size=edits), rng.random(edits), rng.choice(alphabet, edits)
  for kind, place, letter in zip(kinds.tolist(), places.tolist(), new.tolist()):
    if kind == 0 and len(made) > 2:
      del made[int(place * len(made))]
    elif kind == 1:
      made[int(place * len(made))] = letter
    elif kind == 2:
      made.insert(int(place * (len(made) + 1)), letter)
  return np.array(made)


def _length(letters: int) -> int:
  return 2 * letters + 7


def _symbols(most: int) -> tuple[str, ...]:
  return ('<pad>', '<sep>', '<eos>', '|', ',', *string.ascii_lowercase, *map(str, range(most + 1)), '<end>')


def _row(first: np.ndarray, second: np.ndarray, answer: int, length: int) -> Example:
  ids = [*(first + FIRST_LETTER), BAR, *(second + FIRST_LETTER), SEP, FIRST_NUMBER + answer, EOS]
  return sequence(ids, [0] * (len(ids) - 2) + [1, 1], length, PAD)


def _floors(examples: Sequence[Example], compared) -> dict[str, float]:
  """Beside the most frequent answers, scores of a function of both strings."""
  targets, asked = answers(examples)
  guess = np.full_like(targets, EOS)
  for row, example, sep in zip(guess, examples, asked.argmax(1)):
    tokens = example['tokens'][:sep]
    bar = tokens.tolist().index(BAR)
    row[sep] = FIRST_NUMBER + compared(tokens[:bar], tokens[bar + 1:])
  guesses = {'most frequent': most_frequent(examples), 'by place': by_place(examples), 'place by place': guess}
  return accuracy(examples, guesses) | exact(examples, guesses)
