"""p-hop induction: follow, p times, the pointer from a letter to what came after the letter's last appearance.

After Reasoning with latent thoughts (Saunshi et al., 2502.17416; section 5). With positions from 0:

    find(i) = 1 + max{j < i : v_j = v_i}        hop_p(i) = v[find(find(...find(i)))], p times

For example, in `a b c a` the last letter points to b: its hop_1 is b.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.algorithms import accuracy, answers, most_frequent
from loopformer.tasks.generated import Example, aligned
from loopformer.types import config_dataclass, whole


@config_dataclass
class NoRepeat:
  """Letters of which no two neighbours are equal: the next is uniform among the others.

  With independent letters a quarter of the sequences is stuck: where the last two letters are equal, find stays where
  it is, every hop is the last letter, and who repeats that scores 42 to 44 % instead of chance (measured on 2000
  sequences of 256 letters out of four). Here none is stuck, and to repeat the last letter scores 24 to 25 %; with few
  hops in few letters more, 33 % at 4 hops in 32. Look at the baselines.
  """
  spare = 2  # letters beside hops that an answer needs

  def draw(self, rng: np.random.Generator, length: int, alphabet: int) -> np.ndarray:
    """i32[length]."""
    steps = rng.integers(1, alphabet, length)
    steps[0] = rng.integers(alphabet)
    return (np.cumsum(steps) % alphabet).astype(np.int32)


@config_dataclass
class Uniform:
  """Letters that are uniform and independent of each other."""
  spare = 1

  def draw(self, rng: np.random.Generator, length: int, alphabet: int) -> np.ndarray:
    """i32[length]."""
    return rng.integers(alphabet, size=length, dtype=np.int32)


@config_dataclass
class Dense:
  """The answer is asked for at every position that has one: trains far faster, and a causal net may be asked that."""

  def ask(self, defined: np.ndarray) -> np.ndarray:
    """bool[T] -> bool[T]."""
    return defined


@config_dataclass
class Last:
  """The answer is asked for at the last position alone, as in the paper."""

  def ask(self, defined: np.ndarray) -> np.ndarray:
    """bool[T] -> bool[T]."""
    return defined & (np.arange(len(defined)) == len(defined) - 1)


@config_dataclass
class PHop:
  """Sequences of `length` letters out of `alphabet`, each asked for its hop_p, p = `hops`.

  tokens i32[length]: letters; targets i32[length]: hop_p where it is asked for, the end symbol where weights are 0.
  With 2 hops, `a b a b a` is asked for b at its fourth letter and for a at its fifth, and has no answer before.
  """
  hops: int = 3
  length: int = 24
  alphabet: int = 4
  letters: NoRepeat | Uniform = NoRepeat()
  labels: Dense | Last = Dense()

  def __post_init__(self):
    whole('PHop.hops', self.hops, 1, why='an answer takes a hop')
    whole('PHop.length', self.length, self.hops + self.letters.spare, why=f'hops = {self.hops} need more letters')
    whole('PHop.alphabet', self.alphabet, 2, 26, why='letters are a to z, and one alone says nothing')

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*'abcdefghijklmnopqrstuvwxyz'[:self.alphabet], '.')

  def __call__(self, rng: np.random.Generator) -> Example:
    letters = self.letters.draw(rng, self.length, self.alphabet)
    hopped = hop(letters, self.hops)
    asked = self.labels.ask(hopped >= 0)
    return aligned(letters, np.where(asked, hopped, self.alphabet).astype(np.int32), asked)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance, of the letter itself, of the most frequent answer."""
    letters = np.stack([e['tokens'] for e in examples])
    if not answers(examples)[1].any():
      return {}
    guesses = {'repeat the letter': letters, 'most frequent': most_frequent(examples)}
    return {'chance': 1 / self.alphabet} | accuracy(examples, guesses)


@config_dataclass
class Hops:
  """p-hop sequences that tell with their first token how many hops they ask for, uniform in `fewest` to `most`.

  of: the letters; of.hops is the largest number that there is a symbol for, and `most` by default. In `2 a b a b a` the
  last letters are asked for b and a, in `1 a b a b a` for b and for b, a before.
  """
  of: PHop
  fewest: int = 1
  most: int | None = None

  def __post_init__(self):
    if self.most is None:
      object.__setattr__(self, 'most', self.of.hops)
    whole('Hops.fewest', self.fewest, 1, self.of.hops, why='Hops.of.hops is the largest number with a symbol')
    whole('Hops.most', self.most, self.fewest, self.of.hops, why='Hops.of.hops is the largest number with a symbol')

  @property
  def length(self) -> int:
    return self.of.length + 1

  @property
  def symbols(self) -> tuple[str, ...]:
    letters = self.of.symbols
    return (*letters[:-1], *map(str, range(1, self.of.hops + 1)), letters[-1])

  def __call__(self, rng: np.random.Generator) -> Example:
    assert self.most is not None
    hops = int(rng.integers(self.fewest, self.most + 1))
    letters = self.of.letters.draw(rng, self.of.length, self.of.alphabet)
    hopped = np.append(-1, hop(letters, hops))
    asked = self.of.labels.ask(hopped >= 0)
    tokens = np.append(self.of.alphabet + hops - 1, letters).astype(np.int32)
    return aligned(tokens, np.where(asked, hopped, len(self.symbols) - 1).astype(np.int32), asked)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """As of PHop."""
    return self.of.baselines(examples)


def find(letters: np.ndarray) -> np.ndarray:
  """i32[T] -> i64[T]: where each letter points, -1 where it has not appeared before."""
  order = np.argsort(letters, kind='stable')
  before, after = order[:-1], order[1:]
  again = letters[before] == letters[after]
  pointers = np.full(len(letters), -1)
  pointers[after[again]] = before[again] + 1
  return pointers


def hop(letters: np.ndarray, hops: int) -> np.ndarray:
  """i32[T] -> i32[T]: hop_p of every position, -1 where it is not defined."""
  pointers = np.append(find(letters), -1)  # the last is that of place -1
  place = np.arange(len(letters))
  for _ in range(hops):
    place = pointers[place]
  return np.append(letters, np.int32(-1))[place]
