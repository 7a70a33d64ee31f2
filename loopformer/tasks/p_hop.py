"""p-hop induction: follow, p times, the pointer from a letter to what came after the letter's last appearance.

Reasoning with latent thoughts (Saunshi et al., 2502.17416), section 5 of its sheet. With positions from 0:

    find(i) = 1 + max{j < i : v_j = v_i}        hop_p(i) = v[find(find(...find(i)))], p times

For example, in `a b c a` the last letter points to b: its hop_1 is b.
"""
from __future__ import annotations

from typing import Sequence

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.types import ConfigError, part


@part
class NoRepeat:
  """Letters of which no two neighbours are equal: the next is uniform among the others.

  With independent letters a quarter of the sequences is stuck: where the last two letters are equal, find stays where it
  is, every hop is the last letter, and who repeats that scores 42 to 44 % instead of chance (measured, 2000 sequences of
  256 letters out of four). Here none is stuck, and to repeat the last letter scores 24 to 25 %.
  """

  def draw(self, rng: np.random.Generator, length: int, alphabet: int) -> np.ndarray:
    """i32[length]."""
    steps = rng.integers(1, alphabet, length)
    steps[0] = rng.integers(alphabet)
    return (np.cumsum(steps) % alphabet).astype(np.int32)


@part
class Independent:
  """Letters that are uniform and independent of each other."""

  def draw(self, rng: np.random.Generator, length: int, alphabet: int) -> np.ndarray:
    """i32[length]."""
    return rng.integers(alphabet, size=length, dtype=np.int32)


@part
class Dense:
  """The answer is asked for at every position that has one: trains far faster, and a causal net may be asked that."""

  def ask(self, defined: np.ndarray) -> np.ndarray:
    """bool[T] -> bool[T]."""
    return defined


@part
class Last:
  """The answer is asked for at the last position alone, as in the paper."""

  def ask(self, defined: np.ndarray) -> np.ndarray:
    """bool[T] -> bool[T]."""
    return defined & (np.arange(len(defined)) == len(defined) - 1)


@part
class PHop:
  """Sequences of `length` letters out of `alphabet`, each asked for its hop_p, p = `hops`."""
  hops: int = 3
  length: int = 24
  alphabet: int = 4
  letters: NoRepeat | Independent = NoRepeat()
  labels: Dense | Last = Dense()

  def __post_init__(self):
    if not 1 <= self.hops < self.length:
      raise ConfigError(f'task.of.hops = {self.hops}, length = {self.length}: give at least one hop, and more letters '
                        'than hops')
    if not 2 <= self.alphabet <= 26:
      raise ConfigError(f'task.of.alphabet = {self.alphabet}: give 2 to 26 letters')

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*'abcdefghijklmnopqrstuvwxyz'[:self.alphabet], '.')

  def __call__(self, rng: np.random.Generator) -> Example:
    letters = self.letters.draw(rng, self.length, self.alphabet)
    answers = hop(letters, self.hops)
    asked = self.labels.ask(answers >= 0)
    return aligned(letters, np.where(asked, answers, self.alphabet).astype(np.int32), asked)

  def floors(self, examples: Sequence[Example]) -> dict[str, float]:
    """Accuracy of guesses at the positions that are asked for."""
    asked = np.stack([example['weights'] > 0 for example in examples])
    letters, answers = (np.stack([example[name] for example in examples]) for name in ('tokens', 'targets'))
    if not asked.any():
      return {}
    return {'chance': 1 / self.alphabet, 'repeat the letter': float((letters == answers)[asked].mean()),
            'most frequent answer': float(np.bincount(answers[asked]).max() / asked.sum())}


def find(letters: np.ndarray) -> np.ndarray:
  """i32[T] -> i32[T]: where each letter points, -1 where it has not appeared before."""
  pointers = np.full(len(letters), -1, np.int32)
  for letter in np.unique(letters):
    places = np.flatnonzero(letters == letter)
    pointers[places[1:]] = places[:-1] + 1
  return pointers


def hop(letters: np.ndarray, hops: int) -> np.ndarray:
  """i32[T] -> i32[T]: hop_p of every position, -1 where it is not defined."""
  pointers = find(letters)
  place = np.arange(len(letters))
  for _ in range(hops):
    place = np.where(place < 0, -1, pointers[place])
  return np.where(place < 0, -1, letters[place])
