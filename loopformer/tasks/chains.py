"""Chains in context: each vector of a prompt is predicted from those before it (AlgoFormer, section 5, tasks 2 and 3).

Inputs and answers are vectors: `symbols` is None. Scales and baselines are as in regression.py.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

from loopformer.tasks.functions import Representation, check_slope, halved, network, states_of
from loopformer.tasks.generated import Example, aligned, seed_of
from loopformer.tasks.guesses import SHOWN, SMALL, half, ridge, scores
from loopformer.types import config_dataclass, real, whole


@config_dataclass
class Rescaled:
  """The window is rescaled to mean square 1 before Phi*: states neither die out nor grow, whatever w is."""

  def window(self, window: np.ndarray) -> np.ndarray:
    """[..., q D], what Phi* is applied to."""
    return window / (np.sqrt((window * window).sum(-1, keepdims=True) / window.shape[-1]) + SMALL)

  def spread(self, phi: Representation, width: int) -> float:
    """Root mean square of the entries of w; so that states have mean square 1, more or less. width: q D."""
    return (phi.features * phi.gain)**-0.5

  def weights(self, normal: np.ndarray, phi: Representation, width: int) -> np.ndarray:
    """w[features, D], from one that is N(0, I)."""
    return normal * self.spread(phi, width)


@config_dataclass
class Contracted:
  """w is divided by its norm times a Lipschitz bound of Phi*: states cannot grow.

  The bound is far above what Phi* does to most windows: states die out within tens of steps, down to the noise.
  """

  def window(self, window: np.ndarray) -> np.ndarray:
    """[..., q D], what Phi* is applied to."""
    return window

  def spread(self, phi: Representation, width: int) -> float:
    """Root mean square of the entries of w, at most. width: q D."""
    return phi.features**-0.5 / phi.lipschitz(width)

  def weights(self, normal: np.ndarray, phi: Representation, width: int) -> np.ndarray:
    """w[features, D], from one that is N(0, I)."""
    return normal / (np.linalg.norm(normal, 2) * phi.lipschitz(width))


@config_dataclass
class Autoregression:
  """x_{t+1} = w . Phi*(x_{t+1-q}, .., x_t) + noise, w drawn for each prompt (AlgoFormer, task 2).

  The first q states are N(0, I). tokens f32[T, D]; targets f32[T, D], vectors: the next states; weights: 1 from the
  q-th token on; point i32[T]: number of complete (window, next state) examples before this token. T = steps.

  order: q; states: D; steps: states that are read; bound: what keeps states in range.
  """
  phi: Representation = Representation()
  order: int = 3
  states: int = 1
  steps: int = 40
  noise: float = 0.1
  bound: Rescaled | Contracted = Rescaled()
  symbols = None

  def __post_init__(self):
    whole('Autoregression.order', self.order, 1, why='the next state depends on one or more')
    whole('Autoregression.states', self.states, 1, why='a state needs a coordinate')
    whole('Autoregression.steps', self.steps, self.order, why=f'the first window takes order = {self.order} steps')
    real('Autoregression.noise', self.noise, '[0, inf)', 'it is a standard deviation')

  @property
  def length(self) -> int:
    return self.steps

  @property
  def scale(self) -> float:
    """Mean square of the states that are asked for, on prompts that never change."""
    return _mean_asked(self)

  def features(self, windows: np.ndarray) -> np.ndarray:
    """Windows [..., q D], oldest state first -> Phi* [..., features]."""
    return self.phi(self.bound.window(windows))

  def __call__(self, rng: np.random.Generator) -> Example:
    width = self.order * self.states
    weights = self.bound.weights(rng.standard_normal((self.phi.features, self.states)), self.phi, width)
    chain = np.zeros((self.steps + 1, self.states))
    chain[:self.order] = rng.standard_normal((self.order, self.states))
    noise = self.noise * rng.standard_normal(chain.shape)
    for t in range(self.order, self.steps + 1):
      chain[t] = self.features(chain[t - self.order:t].reshape(width)) @ weights + noise[t]
    chain = chain.astype(np.float32)
    point = np.arange(self.steps, dtype=np.int32) - (self.order - 1)
    return {**aligned(chain[:-1], chain[1:], point >= 0), 'point': np.maximum(point, 0)}

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """In units of `scale`: of zero, of the last state, of ridge on the window and on the true Phi*; and at the last."""
    examples = examples[:SHOWN]
    chain = np.stack([np.concatenate([e['tokens'], e['targets'][-1:]]) for e in examples]).astype(np.float64)
    y = chain[:, self.order:]
    count = y.shape[1]
    windows = np.concatenate([chain[:, i:i + count] for i in range(self.order)], -1)
    features = self.features(windows)
    strength = (self.noise / self.bound.spread(self.phi, windows.shape[-1]))**2

    def guesses(k):
      last = {'last state': windows[:, k, -self.states:]}
      return last | {'ridge on Phi*': ridge(features[:, :k], y[:, :k], features[:, k], strength),
                     'ridge on x': ridge(windows[:, :k], y[:, :k], windows[:, k], half(windows))} if k else last

    return scores(guesses, y, self.scale)


@functools.lru_cache
def _mean_asked(of: Any) -> float:
  examples = [of(np.random.default_rng((seed_of('scale'), i))) for i in range(SHOWN)]
  return float(np.mean([np.square(e['targets'][e['weights'] > 0]).mean() for e in examples]))


@config_dataclass
class ChainOfThought:
  """Prompts x_i, s_i^1, .., s_i^L, y_i with all hidden states of a network drawn for each (AlgoFormer, task 3).

  s^0 = x ~ N(0, I), s^l = leaky ReLU of W_l s^{l-1}, y = v . s^L; weights N(0, 1 / fan in).
  tokens f32[T, W], zero beyond each one's own width, W = max(inputs, hidden), T = points (layers + 2);
  targets f32[T, W], vectors: the next token, and zero at y_i, after which nothing is asked for (weight 0);
  point i32[T]: number of examples before this token; link i32[T]: 0 at x, l at s^l, layers + 1 at y.
  """
  inputs: int = 10
  hidden: int = 8
  layers: int = 3
  points: int = 40
  slope: float = 0.01
  symbols = None

  def __post_init__(self):
    whole('ChainOfThought.inputs', self.inputs, 1, why='a network needs an input')
    whole('ChainOfThought.hidden', self.hidden, 1, why='a network needs a hidden unit')
    whole('ChainOfThought.layers', self.layers, 1, why='without a hidden state there is no chain')
    whole('ChainOfThought.points', self.points, 1, why='a prompt needs a point')
    check_slope('ChainOfThought.slope', self.slope)

  @property
  def width(self) -> int:
    """W, of tokens and targets."""
    return max(self.inputs, self.hidden)

  @property
  def length(self) -> int:
    return self.points * (self.layers + 2)

  @property
  def scale(self) -> float:
    """Mean square of targets that are asked for, over all W numbers of each, on average over networks."""
    left = halved(self.slope)
    states = sum(self.hidden * left**layer for layer in range(1, self.layers + 1))
    return (states + left**self.layers) / (self.width * (self.layers + 1))

  def draw(self, rng: np.random.Generator) -> list[np.ndarray]:
    """W_1[inputs, hidden], .., W_L[hidden, hidden], v[hidden, 1]."""
    return network(rng, (self.inputs, *(self.hidden,) * self.layers, 1))

  def __call__(self, rng: np.random.Generator) -> Example:
    *matrices, last = self.draw(rng)
    x = rng.standard_normal((self.points, self.inputs)).astype(np.float32).astype(np.float64)  # as the model sees it
    states = states_of(matrices, x, self.slope)
    links = self.layers + 2
    tokens = np.zeros((self.points, links, self.width), np.float32)
    for link, state in enumerate([*states, states[-1] @ last]):
      tokens[:, link, :state.shape[-1]] = state
    targets = np.zeros_like(tokens)
    targets[:, :-1] = tokens[:, 1:]
    point, link = np.divmod(np.arange(self.length, dtype=np.int32), links)
    flat = self.length, self.width
    return {**aligned(tokens.reshape(flat), targets.reshape(flat), link <= self.layers),
            'point': point.astype(np.int32), 'link': link.astype(np.int32)}

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of zero and of ridge from each token to the next, over all that is asked for, in units of `scale`.

    'answer': of y alone, in units of the mean of y^2: zero, least squares on the last state, ridge on x.
    """
    tokens = np.stack([e['tokens'] for e in examples[:SHOWN]]).astype(np.float64)
    tokens = tokens.reshape(len(tokens), self.points, self.layers + 2, self.width)
    x, y = tokens[:, :, 0], tokens[:, :, -1, :1]
    square = halved(self.slope)**self.layers

    def error(inputs, outputs, strength):
      """Mean squared error of ridge from inputs [E, n, W] to outputs [E, n, O], over points."""
      made = scores(lambda k: {'ridge': ridge(inputs[:, :k], outputs[:, :k], inputs[:, k], strength)} if k else {},
                    outputs, 1.0)
      return made.get('ridge', made['zero'])

    links = [error(state, after, half(state)) for state, after in zip(
      np.moveaxis(tokens, 2, 0), np.moveaxis(tokens, 2, 0)[1:])]
    return {'zero': float(np.square(tokens[:, :, 1:]).mean() / self.scale),
            'ridge': float(np.mean(links) / self.scale),
            'answer: zero': float(np.square(y).mean() / square),
            'answer: least squares': error(tokens[:, :, -2], y, 0.0) / square,
            'answer: ridge on x': error(x, y, half(x)) / square}
