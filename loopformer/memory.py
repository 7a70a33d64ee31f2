"""Memories: what the steps of a loop keep of keys and values while tokens are decoded."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from loopformer.types import KV, Array, Ctx, part


def empty(slots: int, layers: int, batch: int, length: int, groups: int, head: int, dtype) -> KV:
  """A cache without entries; see `KV` for the shapes."""
  shape = (slots, layers, batch, length, groups, head)
  return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), pos=jnp.full((slots, batch, length), -1, jnp.int32))


@part
class PerLoop:
  """One slot for every (loop, layer): reproduces the parallel forward pass exactly, for every schedule.

  Bytes: 2 * loops * N * S * G * d * bytes of an element per sequence (LoopFormer section 4), and 4 * loops * S for
  positions.
  """

  def slots(self, loops: int) -> int:
    return loops

  def exchange(self, kv: KV, ctx: Ctx, layer: Array, k: Array, v: Array) -> tuple[KV, Array, Array, Array]:
    slot = 0 if ctx.tick is None else ctx.tick.k
    length = kv.pos.shape[-1]
    row = jnp.arange(k.shape[0])[:, None]
    place = jnp.where(ctx.pos < 0, length, ctx.pos)  # padding is out of range, and dropped
    kv = KV(k=kv.k.at[slot, layer, row, place].set(k.astype(kv.k.dtype), mode='drop'),
            v=kv.v.at[slot, layer, row, place].set(v.astype(kv.v.dtype), mode='drop'),
            pos=kv.pos.at[slot, row, place].set(ctx.pos, mode='drop'))
    return kv, _read(kv.k, slot, layer), _read(kv.v, slot, layer), jax.lax.dynamic_index_in_dim(
        kv.pos, slot, keepdims=False)


def _read(cache, slot, layer):
  size = (1, 1, *cache.shape[2:])
  return jax.lax.dynamic_slice(cache, (slot, layer, 0, 0, 0, 0), size).reshape(cache.shape[2:])
