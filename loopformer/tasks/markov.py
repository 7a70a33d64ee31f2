"""A first-order Markov language whose sentences are told apart by how much they surprise.

After SHIFT (Gong et al., 2510.10089; section 5); sizes and shares are inferred. The information content of a sentence
x_1 .. x_n is - sum_t log P(x_{t+1} | x_t), in nats. A table of pairs solves the language: no score exceeds that of the
`Bayes` floor by more than luck and, where sentences are selected, what the selection tells.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
import math

import numpy as np

from loopformer.tasks.algorithms import accuracy, most_frequent
from loopformer.tasks.generated import Example, seed_of, sequence
from loopformer.types import ConfigError, config_dataclass, whole

SAMPLES = 4096  # sentences that terciles are measured on


@config_dataclass
class Simple:
  """The third of the sentences with least information."""
  third = 0


@config_dataclass
class Medium:
  """The third of the sentences between."""
  third = 1


@config_dataclass
class Complex:
  """The third of the sentences with most information."""
  third = 2


@config_dataclass
class Markov:
  """Sentences of `letters` states out of `states`, each but the first being asked for: `a d b b a d` -> `d b b a d`.

  The first is uniform. A row of the transition matrix is `likely` on one state, drawn from all alike, and 1 - likely
  times a draw of a Dirichlet distribution of parameter `spread`; the matrix depends on these fields and `seed`, never
  on the run. difficulty: a third of the sentences by information, or None for all. tokens, targets i32[letters - 1];
  information f32[].
  """
  states: int = 8
  letters: int = 16
  likely: float = 0.7
  spread: float = 0.5
  seed: int = 0
  difficulty: Simple | Medium | Complex | None = None

  def __post_init__(self):
    if not 2 <= self.states <= 26:
      raise ConfigError(f'Markov.states = {self.states}: states are letters, and one alone says nothing; set '
                        'Markov.states to 2..26')
    whole('Markov.letters', self.letters, 2, why='the second letter is the first to be asked for')
    if not 0 <= self.likely < 1:
      raise ConfigError(f'Markov.likely = {self.likely}: at 1 nothing is uncertain; set Markov.likely to 0.7')
    if not self.spread > 0:
      raise ConfigError(f'Markov.spread = {self.spread}: a Dirichlet distribution needs more than 0; set Markov.spread '
                        'to 0.5')

  @property
  def length(self) -> int:
    return self.letters - 1

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*'abcdefghijklmnopqrstuvwxyz'[:self.states], '<end>')

  @property
  def transitions(self) -> np.ndarray:
    """f64[states, states], rows sum to 1; read only."""
    return _transitions(self.states, self.likely, self.spread, self.seed)

  @property
  def bounds(self) -> tuple[float, float]:
    """Information of the sentences that are kept, from the first (excluded) to the second (included)."""
    if self.difficulty is None:
      return -math.inf, math.inf
    edges, third = _terciles(self.states, self.likely, self.spread, self.seed, self.letters), self.difficulty.third
    return edges[third], edges[third + 1]

  def __call__(self, rng: np.random.Generator) -> Example:
    low, high = self.bounds
    matrix, rows = self.transitions, _cumulative(self.states, self.likely, self.spread, self.seed)
    information = None
    while information is None or not low < information <= high:
      sentence = _sentence(rng, rows, self.letters)
      information = float(-np.log(matrix[sentence[:-1], sentence[1:]]).sum())
    asked = np.arange(self.letters) > 0
    return {**sequence(sentence, asked, self.length, self.states), 'information': np.array(information, np.float32)}

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance, of the most frequent letter, of the letter itself, of the best guess of one who knows the matrix."""
    tokens = np.stack([e['tokens'] for e in examples])
    guesses = {'most frequent': most_frequent(examples), 'repeat the letter': tokens,
               'Bayes': self.transitions.argmax(1)[tokens]}
    return {'chance': 1 / self.states} | accuracy(examples, guesses)


@functools.lru_cache
def _transitions(states: int, likely: float, spread: float, seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed_of('transitions', seed))
  matrix = (1 - likely) * rng.dirichlet([spread] * states, states)
  matrix[np.arange(states), rng.integers(states, size=states)] += likely
  matrix.flags.writeable = False
  return matrix


@functools.lru_cache
def _cumulative(states: int, likely: float, spread: float, seed: int) -> tuple[np.ndarray, ...]:
  """Of each state, the sums of probabilities up to each successor but the last."""
  return tuple(_transitions(states, likely, spread, seed).cumsum(1)[:, :-1])


@functools.lru_cache
def _terciles(states: int, likely: float, spread: float, seed: int, letters: int) -> tuple[float, float, float, float]:
  """Between which the thirds lie, of sentences that never change."""
  rng = np.random.default_rng(seed_of('terciles'))
  matrix, rows = _transitions(states, likely, spread, seed), _cumulative(states, likely, spread, seed)
  sentences = np.array([_sentence(rng, rows, letters) for _ in range(SAMPLES)])
  information = -np.log(matrix[sentences[:, :-1], sentences[:, 1:]]).sum(1)
  low, high = map(float, np.quantile(information, (1 / 3, 2 / 3)))
  return -math.inf, low, high, math.inf


def _sentence(rng: np.random.Generator, rows: Sequence[np.ndarray], letters: int) -> list[int]:
  state = int(rng.integers(len(rows)))
  made = [state]
  for luck in rng.random(letters - 1).tolist():
    state = int(rows[state].searchsorted(luck, 'right'))
    made.append(state)
  return made
