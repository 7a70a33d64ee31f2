"""Functions of regression in context: what is drawn for every prompt, and the fixed representation that some read.

After looped in-context learning (section 5) and AlgoFormer (section 5). A function part draws the weights of one prompt
and applies them: draw(rng, D) -> weights; apply(weights, x[n, D]) -> y[n], without noise. noise: standard deviation of
what is added; least: fewest inputs it makes sense for; scale(inputs, D): mean of y^2 where `inputs` of D coordinates
are not zero; informed(...): guesses beside `simple`.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
import itertools

import numpy as np

from loopformer.tasks.generated import seed_of
from loopformer.tasks.guesses import half, ridge
from loopformer.types import ConfigError, config_dataclass, real, whole

SAMPLES = 4096  # inputs that the scale of a fixed function is measured on


def check_slope(name: str, slope: float):
  """Raises ConfigError where it is none of a leaky ReLU."""
  if not 0 <= slope <= 1:
    raise ConfigError(f'{name} = {slope}: the slope of a leaky ReLU below zero is in 0..1; set {name} to 0.01')


@config_dataclass
class Linear:
  """y = w . x + noise, w ~ N(0, I). Scale: D, without the noise, which adds noise^2 / D to every error."""
  noise: float = 0.0
  least = 1

  def __post_init__(self):
    real('Linear.noise', self.noise, '[0, inf)', 'it is a standard deviation')

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


@config_dataclass
class Sparse:
  """y = w . x, w ~ N(0, I) of which `kept` coordinates are kept, any of them alike, the others zero. Scale: kept."""
  kept: int = 3
  noise = 0.0

  def __post_init__(self):
    whole('Sparse.kept', self.kept, 1, why='without a coordinate y is zero')

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


@config_dataclass
class Tree:
  """y is the leaf of a full binary tree that x falls to; leaves are N(0, 1). Scale: 1.

  Nodes in heap order: from node i to 2i + 2 where its coordinate of x, drawn from all alike, is above 0, else to
  2i + 1. depth: 4 is 15 nodes and 16 leaves.
  """
  depth: int = 4
  noise = 0.0
  least = 1

  def __post_init__(self):
    whole('Tree.depth', self.depth, 1, why='a leaf alone is a constant')

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


@config_dataclass
class Network:
  """y = sqrt(2 / hidden) relu(x W1) W2, W1[D, hidden] and W2[hidden] all N(0, 1). Scale: D."""
  hidden: int = 100
  noise = 0.0
  least = 1

  def __post_init__(self):
    whole('Network.hidden', self.hidden, 1, why='without a hidden unit y is zero')

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


@config_dataclass
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
    whole('Representation.layers', self.layers, 1, why='a representation needs a layer')
    whole('Representation.features', self.features, 1, why='a representation needs a feature')
    check_slope('Representation.slope', self.slope)

  def matrices(self, width: int) -> tuple[np.ndarray, ...]:
    """[D, features], then [features, features]; read only."""
    return _fixed(self.seed, (width, *(self.features,) * self.layers))

  def __call__(self, x: np.ndarray) -> np.ndarray:
    """x[..., D] -> [..., features]."""
    return states_of(self.matrices(x.shape[-1]), x, self.slope)[-1]

  @property
  def gain(self) -> float:
    """Mean square of a feature for inputs of mean square 1, on average over networks."""
    return halved(self.slope)**self.layers

  def lipschitz(self, width: int) -> float:
    """A bound on |Phi*(a) - Phi*(b)| / |a - b|."""
    return float(np.prod([np.linalg.norm(matrix, 2) for matrix in self.matrices(width)]))


@config_dataclass
class Represented:
  """y = w . Phi*(x) + noise, w ~ N(0, I / features) (AlgoFormer, task 1). Scale: mean of y^2, noise included.

  The model can store Phi* in its parameters; w has to be learned in context.
  """
  phi: Representation = Representation()
  noise: float = 0.0
  least = 1

  def __post_init__(self):
    real('Represented.noise', self.noise, '[0, inf)', 'it is a standard deviation')

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


def halved(slope: float) -> float:
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
