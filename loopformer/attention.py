"""Attention kernels: frozen parts with one method for the parallel pass, and two functions for keys under a mask.

All compute the softmax in float32 and return the dtype of the queries.
"""
from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from loopformer.types import Array, part

SAVED = 'attention'  # what a rematerialising loop may save of attention, instead of running it again,
PRODUCT = 'product'  # and of projections
NEGATIVE = -1e30  # finite: a row without any key (padding) averages the values, and is never NaN


@part
class Blockwise:
  """Causal attention over blocks of queries; each block reads the keys up to its end only.

  Half of the score matrix is never computed, and only one block's scores are held, in the backward pass too, where
  they are recomputed. Portable; the default.
  """
  size: int = 32

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]."""
    length = q.shape[1]
    q, k, v = _heads_first(q, k, v)  # once, and not in every block: the products want heads among the leading axes
    blocks = []
    for start in range(0, length, self.size):
      stop = min(start + self.size, length)
      mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
      mask = mask[None] if seg is None else mask & (seg[:, start:stop, None] == seg[:, None, :stop])
      blocks.append(_attend(q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], mask))
    return _heads_last(jnp.concatenate(blocks, -2) if len(blocks) > 1 else blocks[0])


@part
class Fused:
  """Causal attention by `jax.nn.dot_product_attention`: the kernel of the backend, where it has one."""

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    mask = None if seg is None else (seg[:, None, :, None] == seg[:, None, None, :])
    return checkpoint_name(jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True), SAVED)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """q [B, T, H, d], k and v [B, S, G, d], mask bool[B or 1, T, S] -> [B, T, H, d]; H is a multiple of G."""
  return read(q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask)


def read(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """As `attend`, of keys and values with their heads first, [B, G, S, d], as caches hold them."""
  return _heads_last(_attend(_grouped(q, k.shape[1]), k, v, mask))


def _heads_first(q, k, v):
  """[B, T, H, d], [B, S, G, d] twice -> [B, G, H/G, T, d], [B, G, S, d] twice."""
  return _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _grouped(q, groups):
  """[B, T, H, d] -> [B, G, H/G, T, d]."""
  return q.reshape(*q.shape[:2], groups, q.shape[2] // groups, q.shape[3]).transpose(0, 2, 3, 1, 4)


def _heads_last(out_BGrTd):
  batch, groups, each, length, width = out_BGrTd.shape
  return out_BGrTd.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * each, width)


@jax.custom_vjp
def _attend(q_BGrTd, k_BGSd, v_BGSd, mask_BTS):
  """The backward pass is written out: it keeps one number a query, and recomputes the scores from it."""
  return _forward(q_BGrTd, k_BGSd, v_BGSd, mask_BTS)[0]


def _dot(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _merged(x_BGrTd):
  """The heads of a group and the queries as one axis: the products are then plain batched matrix products."""
  batch, groups, each, length, width = x_BGrTd.shape
  return x_BGrTd.reshape(batch, groups, each * length, width)


def _scores(q_BGrTd, k_BGSd, mask_BTS):
  scaled = q_BGrTd * q_BGrTd.shape[-1] ** -0.5
  att_BGrTS = _dot('BGMd,BGSd->BGMS', _merged(scaled), k_BGSd).reshape(*q_BGrTd.shape[:-1], -1)
  return jnp.where(mask_BTS[:, None, None], att_BGrTS, NEGATIVE)


def _forward(q_BGrTd, k_BGSd, v_BGSd, mask_BTS):
  att_BGrTS = _scores(q_BGrTd, k_BGSd, mask_BTS)
  most_BGrT1 = att_BGrTS.max(-1, keepdims=True)
  att_BGrTS = jnp.exp(att_BGrTS - most_BGrT1)
  total_BGrT1 = att_BGrTS.sum(-1, keepdims=True)
  out_BGMd = _dot('BGMS,BGSd->BGMd', _merged(att_BGrTS).astype(v_BGSd.dtype), v_BGSd)
  out_BGrTd = (out_BGMd.reshape(q_BGrTd.shape) / total_BGrT1).astype(q_BGrTd.dtype)  # T * d divisions, not T * S
  out_BGrTd = checkpoint_name(out_BGrTd, SAVED)
  lse_BGrT1 = checkpoint_name(most_BGrT1 + jnp.log(total_BGrT1), SAVED)
  return out_BGrTd, (q_BGrTd, k_BGSd, v_BGSd, mask_BTS, out_BGrTd, lse_BGrT1)


def _backward(saved, dout_BGrTd):
  q_BGrTd, k_BGSd, v_BGSd, mask_BTS, out_BGrTd, lse_BGrT1 = saved
  dtype, scale = q_BGrTd.dtype, q_BGrTd.shape[-1] ** -0.5
  att_BGMS = _merged(jnp.exp(_scores(q_BGrTd, k_BGSd, mask_BTS) - lse_BGrT1))
  dout_BGMd, out_BGMd = _merged(dout_BGrTd), _merged(out_BGrTd)
  inner_BGM1 = jnp.sum(dout_BGMd.astype(jnp.float32) * out_BGMd, -1, keepdims=True)
  dv_BGSd = _dot('BGMS,BGMd->BGSd', att_BGMS.astype(dtype), dout_BGMd)
  datt_BGMS = (att_BGMS * (_dot('BGMd,BGSd->BGMS', dout_BGMd, v_BGSd) - inner_BGM1)).astype(dtype)
  dq_BGMd = _dot('BGMS,BGSd->BGMd', datt_BGMS, k_BGSd) * scale
  dk_BGSd = _dot('BGMS,BGMd->BGSd', datt_BGMS, _merged(q_BGrTd)) * scale
  return dq_BGMd.reshape(q_BGrTd.shape).astype(dtype), dk_BGSd.astype(dtype), dv_BGSd.astype(dtype), None


_attend.defvjp(_forward, _backward)
