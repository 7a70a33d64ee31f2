"""Attention kernels: frozen parts with one method for the parallel pass, and one function for cached keys.

All compute the softmax in float32 and return the dtype of the queries.
"""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from loopformer.types import Array, part

NEGATIVE = -1e30  # finite: a row without any key (padding) averages the values, and is never NaN


@part
class Blockwise:
  """Causal attention over blocks of queries; each block reads the keys up to its end only.

  Half of the score matrix is never computed, and only one block's scores are held, in the backward pass too, where
  they are recomputed. Portable; the default.
  """
  size: int = 64

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]."""
    length = q.shape[1]
    blocks = []
    for start in range(0, length, self.size):
      stop = min(start + self.size, length)
      mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
      mask = mask[None] if seg is None else mask & (seg[:, start:stop, None] == seg[:, None, :stop])
      blocks.append(jax.checkpoint(attend)(q[:, start:stop], k[:, :stop], v[:, :stop], mask))
    return jnp.concatenate(blocks, 1) if len(blocks) > 1 else blocks[0]


@part
class Fused:
  """Causal attention by `jax.nn.dot_product_attention`: the kernel of the backend, where it has one."""

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    mask = None if seg is None else (seg[:, None, :, None] == seg[:, None, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """q [B, T, H, d], k and v [B, S, G, d], mask bool[B or 1, T, S] -> [B, T, H, d]; H is a multiple of G."""
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q_BTGrd = q.reshape(batch, length, groups, heads // groups, width)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  att_BGrTS = dot('BTGrd,BSGd->BGrTS', q_BTGrd, k) * (width ** -0.5)
  mask = mask[:, None, None]
  att_BGrTS = jnp.where(mask, att_BGrTS, NEGATIVE)
  att_BGrTS = jnp.exp(att_BGrTS - jax.lax.stop_gradient(att_BGrTS.max(-1, keepdims=True)))
  total_BGrT1 = att_BGrTS.sum(-1, keepdims=True)
  out = dot('BGrTS,BSGd->BTGrd', (att_BGrTS / total_BGrT1).astype(v.dtype), v)
  return out.reshape(q.shape).astype(q.dtype)
