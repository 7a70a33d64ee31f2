"""Attention in both directions, a kernel for tasks that are answered at every position at once."""
from __future__ import annotations

import jax.numpy as jnp

from loopformer.nn import kernels
from loopformer.types import Array, part


@part
class Bidirectional:
  """Every token reads all tokens of its document, those after it too.

  For the pass without cache alone: what a token reads is not there yet when it is decoded.
  """
  causal = False

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]."""
    length = q.shape[1]
    mask = jnp.ones((1, length, length), bool) if seg is None else seg[:, :, None] == seg[:, None]
    return kernels.attend(q, k, v, mask)
