"""Memories: what the steps of a loop keep of keys and values while tokens are decoded. Frozen parts.

All store a place for every position: `update` writes the keys and values of a step's tokens and returns what they may
read, heads first. Positions of -1 (padding, rows that do not run this step) are not written. Which of them decode what
the parallel pass computes, and how far off the others are, is in docs/memories.md.
"""
from __future__ import annotations

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp

from loopformer import layouts
from loopformer.types import KV, Array, ConfigError, Context, config_dataclass

Exchanged = tuple[KV, Array, Array, Array]


def empty(slots: int, layers: int, batch: int, length: int, groups: int, head: int, dtype: Any,
          layout: layouts.Layout | None = None) -> KV:
  """A cache without entries; see `KV` for the shapes. layout: the backend's where it is not given."""
  layout = layout or layouts.chosen(groups)
  shape = layout.shape(slots, layers, batch, length, groups, head)
  return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype), pos=jnp.full((slots, batch, length), -1, jnp.int32),
            layout=layout)


def map_caches(function, *caches):
  """`function` of every KV in trees of them."""
  return jax.tree.map(function, *caches, is_leaf=lambda leaf: isinstance(leaf, KV))


def visible(caches, pos: Array, ctx: Context) -> Array:
  """bool[B, T, S]: which places, of positions pos i32[B, S], the tokens of `ctx` may read; KVs of a tree are of a kind.
  """
  return jax.tree.leaves(caches, is_leaf=lambda leaf: isinstance(leaf, KV))[0].visible(pos, ctx)


def slots_of(caches) -> int:
  """Slots of all KVs in a tree of them."""
  return sum(kv.pos.shape[0] for kv in jax.tree.leaves(caches, is_leaf=lambda leaf: isinstance(leaf, KV)))


class Slotted:
  """A memory that keeps one KV of `slots`, with a place for every position."""
  rewinds = True
  slots: Callable[[int], int]

  def make(self, loops: int, layers: int, batch: int, length: int, groups: int, head: int, dtype: Any,
           width: int | None = None) -> Any:
    """The empty cache; arguments as for `empty`. No states are kept, so `width` is not read."""
    return empty(self.slots(loops), layers, batch, length, groups, head, dtype)

  def has_capacity(self, kv: Any, ctx: Context, taken: Array) -> Array:
    """All find a place."""
    return taken


@config_dataclass
class PerLoop(Slotted):
  """One slot for every (loop, layer): decodes exactly what the parallel pass computes, for every schedule.

  Bytes a sequence: 2 * loops * N * S * G * d * bytes of an element (LoopFormer section 4; Ouro section 4), and
  4 * loops * S for positions.
  """
  exact = True

  def slots(self, loops: int) -> int:
    return loops

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> Exchanged:
    return _update(kv, _step(ctx), ctx.pos, layer, k, v)

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    """Slots of steps that were not taken get the entries of the last one that was."""
    return _copy_down(kv, pos, last)


@config_dataclass
class First(Slotted):
  """All loops read the keys and values of the first (recursive sharing): one slot.

  Decodes exactly what a pass over all tokens with this memory computes, which is another function than the loop without
  it: a model must be trained for it. Bytes: PerLoop's with one loop.
  """
  exact = True

  def slots(self, loops: int) -> int:
    return 1

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> Exchanged:
    return _update(kv, jnp.int32(0), jnp.where(_step(ctx) == 0, ctx.pos, -1), layer, k, v)

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    """Nothing: the first step is always taken."""
    return kv


@config_dataclass
class Ring(Slotted):
  """Loop k keeps its entries in slot k mod `size`, over those of loop k - size (Huginn section 4).

  One pass over a prompt is exact. A token that is decoded reads what the last loops left of earlier ones, so loops
  differ from training unless there are no more of them than slots; `Ring(1)`, the last loop's entries shared by all, is
  Ouro's sharing in decode. Bytes: PerLoop's with `size` loops.
  """
  size: int
  exact = False

  def __post_init__(self):
    if self.size < 1:
      raise ConfigError(f'memory.size = {self.size}: a ring has 1 slot or more')

  def slots(self, loops: int) -> int:
    return min(self.size, loops)

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> Exchanged:
    return _update(kv, _step(ctx) % kv.pos.shape[0], ctx.pos, layer, k, v)

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    """Slots that no step reached get the entries of the last step."""
    return _copy_down(kv, pos, last)


@config_dataclass
class Mean(Slotted):
  """One slot with the mean over the loops taken; a step reads its own tokens as they are now (Ouro section 4).

  One pass over a prompt is exact, decoding is not. Bytes: PerLoop's with one loop.
  """
  exact = False

  def slots(self, loops: int) -> int:
    return 1

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> Exchanged:
    step = _step(ctx)
    place = jnp.where(ctx.pos < 0, kv.pos.shape[-1], ctx.pos)
    row = jnp.arange(k.shape[0])[:, None]

    def mean(cache, new):
      old = kv.layout.get(cache, (0, layer, row, place), mode='fill', fill_value=0).astype(jnp.float32)
      return (jnp.where(step == 0, 0, old) * step + new.astype(jnp.float32)) / (step + 1)

    kept, *_ = _update(kv, jnp.int32(0), ctx.pos, layer, mean(kv.k, k), mean(kv.v, v))

    def read(cache, own):
      return kv.layout.of_heads(kv.layout.put(_layer(cache, 0, layer), (row, place), own, mode='drop'))

    return kept, read(kept.k, k), read(kept.v, v), kept.pos[0]

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    """Nothing: the mean is that of the steps that were taken."""
    return kv


def _step(ctx):
  """Number of the step, 0 outside the loop."""
  return jnp.int32(0) if ctx.step is None else ctx.step.k


def _update(kv, slot, pos, layer, k, v):
  beyond = kv.pos.shape[-1] + jnp.arange(pos.shape[1])  # out of range, each by itself, and dropped
  return put(kv, slot, pos, jnp.where(pos < 0, beyond, pos), layer, k, v)


def put(kv: KV, slot: Array | int, pos: Array, place: Array, layer: Array | int, k: Array, v: Array) -> Exchanged:
  """Writes k, v [B, T, G, d] of positions pos i32[B, T] at the places i32[B, T] of a slot, no two of a row the same.

  Layers of a step come in order, and after the first, where its number is known, the positions are there already.

  Returns:
    (kv, keys and values that the slot then holds [B, G, S, d], their positions i32[B, S]).
  """
  row = jnp.arange(k.shape[0])[:, None]
  first = not isinstance(layer, int) or layer == 0

  def written(cache, new):
    return kv.layout.put(cache, (slot, layer, row, place), new, mode='drop', unique_indices=True)

  kv = dataclasses.replace(
      kv, k=written(kv.k, k), v=written(kv.v, v),
      pos=kv.pos.at[slot, row, place].set(pos, mode='drop', unique_indices=True) if first else kv.pos)
  keys, values = (kv.layout.of_heads(_layer(cache, slot, layer)) for cache in (kv.k, kv.v))
  return kv, keys, values, jax.lax.dynamic_index_in_dim(kv.pos, slot, keepdims=False)


def _layer(cache, slot, layer):
  """One layer's entries of a slot, [B, ...]."""
  start = (slot, layer, *(0,) * (cache.ndim - 2))
  return jax.lax.dynamic_slice(cache, start, (1, 1, *cache.shape[2:])).reshape(cache.shape[2:])


def _copy_down(kv, pos, last):
  """pos i32[B, 1], last i32[B] (-1: the row took no step): slots beyond `last` get its entries at that position.

  One token a row: of several, those that stop early would be missed by the others on the way.
  """
  slots, batch, length = kv.pos.shape
  row, place = jnp.arange(batch), pos[:, 0]
  unreached = (jnp.arange(slots)[:, None] > last) & (last >= 0) & (place >= 0)  # [slots, B]
  target = jnp.where(unreached, place, length)
  slot, source = jnp.arange(slots)[:, None], jnp.clip(last, 0, slots - 1)

  def copy(cache):  # indices at slots, rows and places, apart by slices: the result leads with them
    entries = kv.layout.get(cache, (source, slice(None), row, jnp.maximum(place, 0)))  # [B, N, G, d]
    entries = jnp.broadcast_to(entries, (slots, *entries.shape))
    return kv.layout.put(cache, (slot, slice(None), row[None], target), entries, mode='drop')

  return kv.replace(k=copy(kv.k), v=copy(kv.v), pos=kv.pos.at[slot, row[None], target].set(place[None], mode='drop'))
