"""What simple guesses make of regression in context, to compare results with.

Letters: n points, k earlier points, E examples, D width of an x, O outputs.
"""
from __future__ import annotations

from collections.abc import Callable

import numpy as np

SHOWN = 256  # examples that baselines are measured on
PLACES = 8  # and points of each
SMALL = 1e-6  # singular values below this share of the largest are noise; so is a window of this size


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
