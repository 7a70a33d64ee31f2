"""Scaling laws of looped models: their form, their fit to measured losses, and how well the measurements fix it.

All have the loss of a model with D tokens of training as

    L = E + A N^-a + B D^-b

and differ in what N counts. With N_once parameters that are applied once in a pass (embedding and head left out), and
N_rec that are applied r times:

    Unrolled     N = N_once + r N_rec       every loop counts as layers of its own (Parcae, 2604.12946)
    Equivalent   N = N_once + r^phi N_rec   phi, fitted: what a loop is worth; 1 as layers of its own, 0 nothing ("How
                                            much is one recurrence worth?", 2604.21106)

Fitted as Hoffmann et al. (2203.15556, appendix D.3) do: the logarithm of L, a Huber loss, L-BFGS from a grid of starts.
Intervals are those of a bootstrap over the measured points, the 2.5th to the 97.5th percentile.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import itertools

import numpy as np

from loopformer.types import ConfigError, whole

DELTA = 1e-3  # of the Huber loss, in nats of log L


@dataclasses.dataclass(frozen=True)
class Point:
  """A trained model: parameters applied once, and r = `loops` times; tokens of training; validation loss, nats."""
  once: float
  looped: float
  loops: float
  tokens: float
  loss: float


@dataclasses.dataclass(frozen=True)
class Unrolled:
  """L = E + A (once + r looped)^-a + B D^-b."""
  names = ('E', 'A', 'a', 'B', 'b')

  def size(self, values: np.ndarray, points: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """N f64[n]; and the slopes of log N along the values from the sixth on, f64[n] each. values: [log E,
    log A, a, log B, b].
    """
    return points['once'] + points['loops'] * points['looped'], []

  def starts(self) -> list[tuple[float, ...]]:
    """Where fits begin."""
    return list(itertools.product((-1.0, 0.0, 1.0), (2.0, 6.0, 10.0), (0.2, 0.5, 0.8), (2.0, 6.0, 10.0),
                                  (0.2, 0.5, 0.8)))

  def told(self, values: np.ndarray) -> dict[str, float]:
    """The law's numbers by name."""
    return {'E': float(np.exp(values[0])), 'A': float(np.exp(values[1])), 'a': float(values[2]),
            'B': float(np.exp(values[3])), 'b': float(values[4])}


@dataclasses.dataclass(frozen=True)
class Equivalent(Unrolled):
  """L = E + A (once + r^phi looped)^-a + B D^-b."""
  names = (*Unrolled.names, 'phi')

  def size(self, values: np.ndarray, points: Mapping[str, np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """As Unrolled, of values [log E, log A, a, log B, b, phi]."""
    looped = points['loops'] ** values[5] * points['looped']
    size = points['once'] + looped
    return size, [looped * np.log(points['loops']) / size]

  def starts(self) -> list[tuple[float, ...]]:
    """Where fits begin."""
    return [(*start, phi) for start in super().starts() for phi in (0.2, 0.8)]

  def told(self, values: np.ndarray) -> dict[str, float]:
    """The law's numbers by name."""
    return {**super().told(values), 'phi': float(values[5])}


def _columns(points: Sequence[Point]) -> dict[str, np.ndarray]:
  return {field.name: np.array([getattr(point, field.name) for point in points], np.float64)
          for field in dataclasses.fields(Point)}


def _miss(values, law, columns):
  """The Huber loss of log L over DELTA^2, a mean over points; and its gradient."""
  e, log_a, a, log_b, b = values[:5]
  with np.errstate(over='ignore', invalid='ignore'):
    size, slopes = law.size(values, columns)
    log_size, log_tokens = np.log(size), np.log(columns['tokens'])
    parts = np.exp(e), np.exp(log_a - a * log_size), np.exp(log_b - b * log_tokens)
    loss = sum(parts)
    off = np.log(loss) - np.log(columns['loss'])
    along = [parts[0] + 0 * off, parts[1], -parts[1] * log_size, parts[2], -parts[2] * log_tokens,
             *(-a * parts[1] * slope for slope in slopes)]
    far = np.abs(off) > DELTA
    each = np.where(far, DELTA * (np.abs(off) - 0.5 * DELTA), 0.5 * off ** 2) / DELTA ** 2
    pull = np.clip(off, -DELTA, DELTA) / DELTA ** 2
    total, slope = each.mean(), np.array([(pull * one / loss).mean() for one in along])
  return (total, slope) if np.isfinite(total) and np.isfinite(slope).all() else (1e9, np.zeros(len(values)))


def _search(law, columns, starts):
  """The values of the best of the fits that begin at these starts, of the eight that miss least."""
  from scipy import optimize
  bounds = [(-5, 3), (-5, 25), (0.01, 3), (-5, 25), (0.01, 3), (-1, 3)][:len(law.names)]
  nearest = sorted(starts, key=lambda start: _miss(np.array(start), law, columns)[0])[:8]
  found = [optimize.minimize(_miss, start, args=(law, columns), jac=True, method='L-BFGS-B', bounds=bounds,
                             options={'maxiter': 2000}) for start in nearest]
  return min(found, key=lambda result: result.fun).x


def fit(law: Unrolled, points: Sequence[Point]) -> np.ndarray:
  """The law's values that fit best.

  Raises:
    ConfigError: fewer points than the law has numbers, or a loss, a size or a number of tokens that is not positive.
  """
  _check(law, points)
  return _search(law, _columns(points), law.starts())


def _check(law, points):
  if len(points) < len(law.names):
    raise ConfigError(f'{len(points)} points: {type(law).__name__} has {len(law.names)} numbers '
                      f'({", ".join(law.names)}); measure as many or more')
  for point in points:
    values = dataclasses.asdict(point)
    for name, value in values.items():
      if not np.isfinite(value) or value < 0 or value == 0 and name != 'once':
        raise ConfigError(f'a point has {name} = {value:g}; all but the parameters applied once are above 0')


def intervals(law: Unrolled, points: Sequence[Point], draws: int = 200,
              seed: int = 0) -> dict[str, tuple[float, float]]:
  """Name -> the 2.5th and 97.5th percentile of the number among fits to points drawn anew, with replacement.

  Each begins at the fit to all points. A draw with fewer different points than the law has numbers is drawn again.

  Raises:
    ConfigError: as `fit`; draws below 1.
  """
  whole('draws', draws, 1)
  start, rng, told = fit(law, points), np.random.default_rng(seed), []
  while len(told) < draws:
    index = rng.integers(len(points), size=len(points))
    if len(set(index.tolist())) < min(len(law.names), len(points)):
      continue
    told.append(law.told(_search(law, _columns([points[i] for i in index]), [start])))
  return {name: tuple(float(np.percentile([one[name] for one in told], at)) for at in (2.5, 97.5))
          for name in law.names}


def best_loops(points: Sequence[Point], costs: Sequence[float]) -> list[dict[str, float]]:
  """Of every cost (operations of training, rounded to three digits) the point with the lowest loss: its loops and
  tokens.
  """
  rows = {}
  for point, cost in zip(points, costs):
    key = float(f'{cost:.3g}')
    if key not in rows or point.loss < rows[key].loss:
      rows[key] = point
  return [{'operations': cost, 'loops': point.loops, 'tokens': point.tokens, 'loss': point.loss}
          for cost, point in sorted(rows.items())]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
  """k of the line log y = k log x + c with least squares; nan with fewer than two different x."""
  if len(set(x)) < 2:
    return float('nan')
  return float(np.polyfit(np.log(x), np.log(y), 1)[0])
