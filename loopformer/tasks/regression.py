"""Regression in context: a function is drawn for every prompt, and its values are predicted from earlier examples.

After looped in-context learning (section 5) and AlgoFormer (section 5). Inputs are vectors and
answers are numbers: `symbols` is None. Every generator has a `scale`, the mean square of what is asked for; floors are
in units of it, and so are measured errors where the task's measure is `Errors(scale=generator.scale)`.

Letters: n points, k earlier points, E examples, D width of an x, O outputs.
"""
from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from loopformer.tasks.generated import Example, aligned, seed_of
from loopformer.types import ConfigError, part

SHOWN = 256  # examples that floors are measured on
PLACES = 8  # and points of each
SAMPLES = 4096  # inputs that the scale of a fixed function is measured on
SMALL = 1e-6  # singular values below this share of the largest are noise; so is a window of this size


def at_least(name: str, value: float, least: float, why: str):
  """Raises ConfigError where the field `name` is below `least`."""
  if not value >= least:
    raise ConfigError(f'{name} = {value}: {why}; set {name} to {least} or more')


def _check_slope(name: str, slope: float):
  if not 0 <= slope <= 1:
    raise ConfigError(f'{name} = {slope}: the slope of a leaky ReLU below zero is in 0..1; set {name} to 0.01')


# Functions -----------------------------------------------------------------------------------------------------------
#
# A function part draws the weights of one prompt and applies them: draw(rng, D) -> weights; apply(weights, x[n, D]) ->
# y[n], without noise. noise: standard deviation of what is added; least: fewest inputs it makes sense for;
# scale(inputs, D): mean of y^2 where `inputs` of D coordinates are not zero; informed(...): guesses beside `simple`.


@part
class Linear:
  """y = w . x + noise, w ~ N(0, I). Scale: D, without the noise, which adds noise^2 / D to every error."""
  noise: float = 0.0
  least = 1

  def __post_init__(self):
    at_least('Linear.noise', self.noise, 0, 'it is a standard deviation')

  def draw(self, rng: np.random.Generator, width: int) -> np.ndarray:
    """w[D]."""
    return rng.standard_normal(width)

  def apply(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x @ weights

  def scale(self, inputs: int, width: int) -> float:
    return float(inputs)

  def informed(self, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    """The mean of the posterior."""
    return {'ridge': ridge(x, y, query, self.noise**2)}


@part
class Sparse:
  """y = w . x, w ~ N(0, I) of which `kept` coordinates are kept, any of them alike, the others zero. Scale: kept."""
  kept: int = 3
  noise = 0.0

  def __post_init__(self):
    at_least('Sparse.kept', self.kept, 1, 'without a coordinate y is zero')

  @property
  def least(self) -> int:
    return self.kept

  def draw(self, rng: np.random.Generator, width: int) -> np.ndarray:
    """w[D]."""
    weights = np.zeros(width)
    weights[rng.choice(width, self.kept, replace=False)] = rng.standard_normal(self.kept)
    return weights

  def apply(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x @ weights

  def scale(self, inputs: int, width: int) -> float:
    return self.kept * inputs / width

  def informed(self, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    return {}


@part
class Tree:
  """y is the leaf of a full binary tree that x falls to; leaves are N(0, 1). Scale: 1.

  Nodes in heap order: from node i to 2i + 2 where its coordinate of x, drawn from all alike, is above 0, else to
  2i + 1. depth: 4 is 15 nodes and 16 leaves.
  """
  depth: int = 4
  noise = 0.0
  least = 1

  def __post_init__(self):
    at_least('Tree.depth', self.depth, 1, 'a leaf alone is a constant')

  def draw(self, rng: np.random.Generator, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates i64[2^depth - 1] of the nodes, values[2^depth] of the leaves, which follow them in heap order."""
    return rng.integers(width, size=2**self.depth - 1), rng.standard_normal(2**self.depth)

  def apply(self, weights: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> np.ndarray:
    coordinates, values = weights
    right = x[:, coordinates] > 0
    rows = np.arange(len(x))
    node = np.zeros(len(x), np.int64)
    for _ in range(self.depth):
      node = 2 * node + 1 + right[rows, node]
    return values[node - len(coordinates)]

  def scale(self, inputs: int, width: int) -> float:
    return 1.0

  def informed(self, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    return {}


@part
class Network:
  """y = sqrt(2 / hidden) relu(x W1) W2, W1[D, hidden] and W2[hidden] all N(0, 1). Scale: D."""
  hidden: int = 100
  noise = 0.0
  least = 1

  def __post_init__(self):
    at_least('Network.hidden', self.hidden, 1, 'without a hidden unit y is zero')

  def draw(self, rng: np.random.Generator, width: int) -> tuple[np.ndarray, np.ndarray]:
    """W1[D, hidden], W2[hidden]."""
    return rng.standard_normal((width, self.hidden)), rng.standard_normal(self.hidden)

  def apply(self, weights: tuple[np.ndarray, np.ndarray], x: np.ndarray) -> np.ndarray:
    first, second = weights
    return np.sqrt(2 / self.hidden) * np.maximum(x @ first, 0) @ second

  def scale(self, inputs: int, width: int) -> float:
    return float(inputs)

  def informed(self, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    return {'ridge on x': ridge(x, y, query, half(x))}


@part
class Representation:
  """Phi*: a network of `layers` leaky-ReLU layers of `features` units without biases, weights N(0, 1 / fan in).

  It is the same for all prompts, batches, splits and runs: it depends on the fields of this part and the width of its
  input, never on the data's seed.
  """
  layers: int = 2
  features: int = 20
  slope: float = 0.01
  seed: int = 0

  def __post_init__(self):
    at_least('Representation.layers', self.layers, 1, 'a representation needs a layer')
    at_least('Representation.features', self.features, 1, 'a representation needs a feature')
    _check_slope('Representation.slope', self.slope)

  def matrices(self, width: int) -> tuple[np.ndarray, ...]:
    """[D, features], then [features, features]; read only."""
    return _fixed(self.seed, (width, *(self.features,) * self.layers))

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """x[..., D] -> [..., features]."""
    return states_of(self.matrices(x.shape[-1]), x, self.slope)[-1]

  @property
  def gain(self) -> float:
    """Mean square of a feature for inputs of mean square 1, on average over networks."""
    return _halved(self.slope)**self.layers

  def lipschitz(self, width: int) -> float:
    """A bound on |Phi*(a) - Phi*(b)| / |a - b|."""
    return float(np.prod([np.linalg.norm(matrix, 2) for matrix in self.matrices(width)]))


@part
class Represented:
  """y = w . Phi*(x) + noise, w ~ N(0, I / features) (AlgoFormer, task 1). Scale: mean of y^2, noise included.

  The model can store Phi* in its parameters; w has to be learned in context.
  """
  phi: Representation = Representation()
  noise: float = 0.0
  least = 1

  def __post_init__(self):
    at_least('Represented.noise', self.noise, 0, 'it is a standard deviation')

  def draw(self, rng: np.random.Generator, width: int) -> np.ndarray:
    """w[features]."""
    return rng.standard_normal(self.phi.features) / np.sqrt(self.phi.features)

  def apply(self, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    return self.phi(x) @ weights

  def scale(self, inputs: int, width: int) -> float:
    return _mean_square(self.phi, inputs, width) + self.noise**2

  def informed(self, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
    """The mean of the posterior of one who knows Phi*; and of one who does not, and takes half of y for linear in x."""
    noise = self.noise**2
    return {'ridge on Phi*': ridge(self.phi(x), y, self.phi(query), noise * self.phi.features),
            'ridge on x': ridge(x, y, query, half(x) * (1 + 2 * noise / self.phi.gain))}


def _halved(slope: float) -> float:
  """What a leaky ReLU leaves of the mean square of a symmetric input."""
  return (1 + slope**2) / 2


def states_of(matrices: Sequence[np.ndarray], x: np.ndarray, slope: float) -> list[np.ndarray]:
  """x and the states after each leaky-ReLU layer of a network, [..., width of the layer] each."""
  states = [x]
  for matrix in matrices:
    z = states[-1] @ matrix
    states.append(np.maximum(z, slope * z))
  return states


def network(rng: np.random.Generator, widths: Sequence[int]) -> list[np.ndarray]:
  """Matrices [widths[i], widths[i + 1]], entries N(0, 1 / widths[i])."""
  return [rng.standard_normal((rows, columns)) / np.sqrt(rows) for rows, columns in itertools.pairwise(widths)]


@functools.lru_cache
def _fixed(seed: int, widths: tuple[int, ...]) -> tuple[np.ndarray, ...]:
  matrices = tuple(network(np.random.default_rng(seed_of('representation', seed)), widths))
  for matrix in matrices:
    matrix.flags.writeable = False
  return matrices


@functools.lru_cache
def _mean_square(phi: Representation, inputs: int, width: int) -> float:
  """Mean square of a feature, on inputs that never change."""
  x = np.zeros((SAMPLES, width))
  x[:, :inputs] = np.random.default_rng(seed_of('scale')).standard_normal((SAMPLES, inputs))
  return float(np.square(phi(x)).mean())


# Guesses -------------------------------------------------------------------------------------------------------------


def ridge(x: np.ndarray, y: np.ndarray, query: np.ndarray, strength: float = 0.0) -> np.ndarray:
  """[E, O]: query . argmin_w |x w - y|^2 + strength |w|^2; the least |w| among equals.

  Args:
    x: [E, k, D], k 1 or more; y: [E, k, O]; query: [E, D].
  """
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  kept = s > SMALL * s.max(-1, keepdims=True)
  shrunk = np.where(kept, s / np.where(kept, s**2 + strength, 1), 0)
  return np.einsum('ED,ErD,Er,Ekr,EkO->EO', query, vt, shrunk, u, y, optimize=True)


def simple(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> dict[str, np.ndarray]:
  """Guesses [E, O] of one who knows nothing of the function: shapes as for `ridge`.

  least squares (of minimum norm); average (w is the mean of y x); nearest 3 (the mean of their y).
  """
  distance_Ek = np.square(x - query[:, None]).sum(-1)
  nearest = np.argsort(distance_Ek, axis=1)[:, :3, None]
  return {'least squares': ridge(x, y, query),
          'average': np.einsum('ED,EkD,EkO->EO', query, x, y, optimize=True) / x.shape[1],
          'nearest 3': np.take_along_axis(y, nearest, 1).mean(1)}


def half(x: np.ndarray) -> float:
  """The strength of ridge on x [..., D] for one who takes half of the answers for linear in x, whatever their scale."""
  return float(np.square(x).sum(-1).mean())


def spaced(points: int) -> list[int]:
  """Up to PLACES of 0 .. points - 1, evenly, both ends included."""
  return [int(i) for i in np.unique(np.linspace(0, points - 1, PLACES).round())]


def scores(guesses: Callable[[int], dict[str, np.ndarray]], y: np.ndarray, scale: float) -> dict[str, float]:
  """Mean squared errors of zero and of guesses, in units of `scale`: over all points, and at the last of them.

  Args:
    guesses: from k, a guess [E, O] at the answers y[:, k] by name; a name that is missing there guesses zero.
    y: [E, n, O].
  """
  places = spaced(y.shape[1])
  made = [{'zero': 0.0, **guesses(k)} for k in places]
  errors = {name: [np.square(row.get(name, 0) - y[:, k]).mean() / scale for row, k in zip(made, places)]
            for name in made[-1]}
  return {name: float(np.mean(each)) for name, each in errors.items()} | {
    f'{name}, last': float(each[-1]) for name, each in errors.items()}


# Generators ----------------------------------------------------------------------------------------------------------


@part
class Regression:
  """Prompts x_1, y_1, .., x_n, y_n of a function drawn for each: y_i is asked for at x_i (section 5).

  tokens f32[2n, D]: x_i ~ N(0, I) at 2i - 2, (y_i, 0, .., 0) at 2i - 1 (i from 1); targets f32[2n]: y_i at the token of
  x_i, else 0; weights: 1 there, else 0; point i32[2n]: number of examples before this token.

  inputs: coordinates of x that are not zero; points: n. For curricula, whose rows keep their shape: width: D, None is
  `inputs`; room: points that a row has place for, None is `points`; what is left over is zero and not asked for.
  Trees, sparse weights and Phi* are drawn over all D coordinates, whatever `inputs` is at the time.
  """
  function: Linear | Sparse | Tree | Network | Represented = Linear()
  inputs: int = 20
  points: int = 41
  width: int | None = None
  room: int | None = None
  symbols = None

  def __post_init__(self):
    at_least('Regression.inputs', self.inputs, 1, 'a function needs an input')
    at_least('Regression.points', self.points, 1, 'a prompt needs a point')
    if self.width is not None:
      at_least('Regression.width', self.width, self.inputs, f'inputs = {self.inputs} do not fit')
    if self.room is not None:
      at_least('Regression.room', self.room, self.points, f'points = {self.points} do not fit')
    at_least(f'Regression.{"width" if self.width else "inputs"}', self._width, self.function.least,
             f'{self.function} needs more')

  @property
  def _width(self) -> int:
    return self.width or self.inputs

  @property
  def length(self) -> int:
    return 2 * (self.room or self.points)

  @property
  def scale(self) -> float:
    """The mean of y^2 (Linear: without noise)."""
    return self.function.scale(self.inputs, self._width)

  def __call__(self, rng: np.random.Generator) -> Example:
    used = slice(2 * self.points)
    tokens, targets, weights = np.zeros((self.length, self._width), np.float32), *np.zeros((2, self.length), np.float32)
    tokens[used][::2, :self.inputs] = rng.standard_normal((self.points, self.inputs))
    x = tokens[used][::2].astype(np.float64)  # as the model sees it
    y = self.function.apply(self.function.draw(rng, self._width), x)
    y = y + self.function.noise * rng.standard_normal(self.points)
    tokens[used][1::2, 0] = targets[used][::2] = y
    weights[used][::2] = 1
    return {**aligned(tokens, targets, weights), 'point': np.arange(self.length, dtype=np.int32) // 2}

  def floors(self, examples: Sequence[Example]) -> dict[str, float]:
    """In units of `scale`: of zero, of `simple` guesses and of those of one who knows the function's form.

    A mean over all points, and at the last of them. Without an example, all guess zero.
    """
    examples = examples[:SHOWN]
    x = np.stack([e['tokens'][::2] for e in examples])[:, :self.points].astype(np.float64)
    y = np.stack([e['targets'][::2, None] for e in examples])[:, :self.points].astype(np.float64)

    def guesses(k):
      seen = x[:, :k], y[:, :k], x[:, k]
      return {**simple(*seen), **self.function.informed(*seen)} if k else {}

    return scores(guesses, y, self.scale)


@part
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


@part
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


@part
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
    at_least('Autoregression.order', self.order, 1, 'the next state depends on one or more')
    at_least('Autoregression.states', self.states, 1, 'a state needs a coordinate')
    at_least('Autoregression.steps', self.steps, self.order, f'the first window takes order = {self.order} steps')
    at_least('Autoregression.noise', self.noise, 0, 'it is a standard deviation')

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

  def floors(self, examples: Sequence[Example]) -> dict[str, float]:
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


@part
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
    at_least('ChainOfThought.inputs', self.inputs, 1, 'a network needs an input')
    at_least('ChainOfThought.hidden', self.hidden, 1, 'a network needs a hidden unit')
    at_least('ChainOfThought.layers', self.layers, 1, 'without a hidden state there is no chain')
    at_least('ChainOfThought.points', self.points, 1, 'a prompt needs a point')
    _check_slope('ChainOfThought.slope', self.slope)

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
    halved = _halved(self.slope)
    states = sum(self.hidden * halved**layer for layer in range(1, self.layers + 1))
    return (states + halved**self.layers) / (self.width * (self.layers + 1))

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

  def floors(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of zero and of ridge from each token to the next, over all that is asked for, in units of `scale`.

    'answer': of y alone, in units of the mean of y^2: zero, least squares on the last state, ridge on x.
    """
    tokens = np.stack([e['tokens'] for e in examples[:SHOWN]]).astype(np.float64)
    tokens = tokens.reshape(len(tokens), self.points, self.layers + 2, self.width)
    x, y = tokens[:, :, 0], tokens[:, :, -1, :1]
    square = _halved(self.slope)**self.layers

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
