"""Data of linear in-context learning: the matrices of linear looped transformers.

After looped in-context learning, sections 2.2, 2.3 and 3.3; chains of thought are in experiments/studies/linear_cot.py.
x ~ N(0, I_d), w* ~ N(0, I_d), y = x . w*. Columns of the matrices there are tokens here. Computed in float64, from the
x that the model sees; given in float32.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.tasks.guesses import SHOWN, ridge
from loopformer.types import config_dataclass, whole


def gradient_descent(x: np.ndarray, y: np.ndarray, rate: float, steps: int,
                     start: float | np.ndarray = 0) -> np.ndarray:
  """w_{l+1} = w_l - (rate / n) x^T (x w_l - y), in float64.

  Args:
    x: [..., n, d]; y: [..., n]; start: w_0, [..., d] or a number.

  Returns:
    The iterates, w_0 first: [steps + 1, ..., d].
  """
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  weights = [np.broadcast_to(np.float64(start), (*x.shape[:-2], x.shape[-1]))]
  for _ in range(steps):
    residual = np.einsum('...nd,...d->...n', x, weights[-1]) - y
    weights.append(weights[-1] - rate / x.shape[-2] * np.einsum('...nd,...n->...d', x, residual))
  return np.stack(weights)


def best_rate(inputs: int, examples: int) -> float:
  """n / (n + d + 1): of one step from zero; over many steps it diverges (section 2.3)."""
  return examples / (examples + inputs + 1)


def _drawn(rng, inputs, rows):
  """x[rows, d] and w*[d], float64; x is exact in float32."""
  x = rng.standard_normal((rows, inputs)).astype(np.float32).astype(np.float64)
  return x, rng.standard_normal(inputs)


def _check(name, inputs, examples):
  whole(f'{name}.inputs', inputs, 1, why='a function needs an input')
  whole(f'{name}.examples', examples, 1, why='a function is learned from examples')


@config_dataclass
class LinearPrompt:
  """Predict y_q from n examples: the matrix Z of section 2.2, transposed.

  tokens f32[n + 1, d + 1]: (x_i, y_i) and at last (x_q, 0); targets f32[n + 1]: y_q at last, else 0; weights: 1 there,
  else 0. The construction of 2.2 leaves -w . x_q where the 0 was.
  """
  inputs: int = 10
  examples: int = 20
  symbols = None

  def __post_init__(self):
    _check('LinearPrompt', self.inputs, self.examples)

  @property
  def length(self) -> int:
    return self.examples + 1

  @property
  def scale(self) -> float:
    """The mean of y_q^2: d."""
    return float(self.inputs)

  def __call__(self, rng: np.random.Generator) -> Example:
    x, best = _drawn(rng, self.inputs, self.length)
    tokens = np.concatenate([x, (x @ best)[:, None]], 1).astype(np.float32)
    asked = np.arange(self.length) == self.examples
    targets = np.where(asked, tokens[:, -1], np.float32(0))
    tokens[-1, -1] = 0
    return aligned(tokens, targets, asked)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """In units of d: of zero, of one step of gradient descent at the best rate, of least squares."""
    tokens = np.stack([e['tokens'] for e in examples[:SHOWN]]).astype(np.float64)
    answer = np.array([e['targets'][-1] for e in examples[:SHOWN]], np.float64)
    x, y, query = tokens[:, :-1, :-1], tokens[:, :-1, -1], tokens[:, -1, :-1]
    step = gradient_descent(x, y, best_rate(self.inputs, self.examples), 1)[-1]
    guesses = {'zero': 0, 'one step': (step * query).sum(-1), 'least squares': ridge(x, y[..., None], query)[:, 0]}
    return {name: float(np.square(guess - answer).mean() / self.scale) for name, guess in guesses.items()}


@config_dataclass
class WeightPrompt:
  """Predict w* at once: the matrix of section 2.3, transposed, before its first step (3.3).

  tokens f32[n + 1, 2d + 2]: examples (x_i, y_i, 0_d, 0) and at last the thought (0_d, 0, 0_d, 1); targets
  f32[n + 1, 2d + 2], vectors: (0_d, 0, w*, 1) at the thought, else 0; weights: 1 there, else 0.
  """
  inputs: int = 10
  examples: int = 20
  symbols = None

  def __post_init__(self):
    _check('WeightPrompt', self.inputs, self.examples)

  @property
  def length(self) -> int:
    return self.examples + 1

  @property
  def scale(self) -> float:
    """d / (2d + 2): turns a mean over 2d + 2 outputs into |error of w|^2 / d."""
    return self.inputs / (2 * self.inputs + 2)

  def __call__(self, rng: np.random.Generator) -> Example:
    x, best = _drawn(rng, self.inputs, self.examples)
    d = self.inputs
    tokens, targets = np.zeros((2, self.length, 2 * d + 2), np.float32)
    tokens[:-1, :d], tokens[:-1, d] = x, x @ best
    targets[-1, d + 1:-1] = best
    tokens[-1, -1] = targets[-1, -1] = 1
    return aligned(tokens, targets, np.arange(self.length) == self.examples)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """In units of d: of zero, of one step of gradient descent at the best rate, of least squares."""
    d = self.inputs
    tokens = np.stack([e['tokens'][:-1, :d + 1] for e in examples[:SHOWN]]).astype(np.float64)
    best = np.stack([e['targets'][-1, d + 1:-1] for e in examples[:SHOWN]]).astype(np.float64)
    x, y = tokens[..., :d], tokens[..., d]
    step = gradient_descent(x, y, best_rate(d, self.examples), 1)[-1]
    guesses = {'zero': 0, 'one step': step, 'least squares': np.einsum('Edn,En->Ed', np.linalg.pinv(x), y)}
    return {name: float(np.square(guess - best).sum(-1).mean() / d) for name, guess in guesses.items()}
