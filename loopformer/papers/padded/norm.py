"""Norms of chosen dimensions, and numbers as unit vectors, which such norms read (2503.03961, sections 2 and 3)."""
from __future__ import annotations

from typing import Any

from flax import linen as nn
import numpy as np

from loopformer.nn.layers import RMSNorm
from loopformer.types import Array


class MaskedNorm(nn.Module):
  """of(mu * x): a norm that reads a part of the state, or parts by weights; mu [D] is learned, and ones at first."""
  of: nn.Module = RMSNorm()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    mask = self.param('mask', nn.initializers.ones, (x.shape[-1],))
    return self.of(x * mask.astype(x.dtype))


def psi(number: Any, by: Any = 1.0) -> np.ndarray:
  """<a, b, -a, -b> of the ratio a / b, on a new last axis: how a state stores a number. NumPy's dtypes; b is not 0."""
  a, b = np.broadcast_arrays(number, by)
  return np.stack([a, b, -a, -b], -1)


def phi(number: Any, by: Any = 1.0) -> np.ndarray:
  """The layer-norm hash, psi / |psi|: unit vectors, the product of two of which is 1 for equal numbers alone (of
  the same sign of b).

  RMSNorm and LayerNorm make it, times the root of their width, of psi and of itself alike. 1 - phi(i) . phi(i + 1) is
  about 1 / (2 i^4): float32 tells neighbours apart up to some 40, float64 up to some thousands.
  """
  stored = psi(number, by)
  return stored / np.sqrt((stored ** 2).sum(-1, keepdims=True))
