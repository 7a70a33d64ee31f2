"""Streams: what the loops of a Parallel Loop Transformer read, and what they keep of a text (LoopCoder-v2, section 2).

The first loop attends as ever. Every later one reads the first loop's keys and values of the same layer, and its own in
a window of `window_left` tokens before and the token itself. It begins with the state of the loop before it at the
token before, so that all loops of one token can run in one pass of the layers: a stream each.

A view says what the queries of a pass read, one class a kind of pass: `Opening` and `Later` without a cache, `Prompt`
and `LaterPrompt` for a chunk of tokens, `Together` for all loops of one token. `GatedAttention` calls its `attend`:

    attend(attn, q [B, T, H, d], k, v [B, T, G, d], ctx, layer, gate) -> (out [B, T, H, d], what is left)
"""
from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

from flax import struct
import jax
import jax.numpy as jnp

from loopformer import layouts, memories
from loopformer.nn.kernels import attend, check_causal, read
from loopformer.types import KV, Array, ConfigError, Context, config_dataclass

SMALLEST = 32  # queries of a block of local attention: smaller ones are slower than what they save


@struct.dataclass
class Cache:
  """Of a loop of up to R steps.

  first: the first loop's keys and values, one slot, a place for every position. rings: those of the others, R - 1 slots
  of w + 1 places; a position's is its number mod that. carried: the states of loops 1 to R - 1 at the last token, as
  keys [R - 1, 1, B, 1, 1, D], and its position; no values.
  """
  first: KV
  rings: KV
  carried: KV

  @property
  def loops(self) -> int:
    """R."""
    return self.rings.pos.shape[0] + 1


@config_dataclass
class Streams(memories.Slotted):
  """The memory of `cells.shifted.Shifted`: decodes exactly what the parallel pass computes.

  Bytes a sequence: 2 * N * (S + (R - 1) * min(w + 1, S)) * G * d * bytes of an element, 4 * (R - 1) * D for the carried
  states, and 4 for the position of each place. A ring does not hold what was before its window, so tokens cannot be
  taken back.
  """
  window_left: int
  exact, rewinds = True, False

  def __post_init__(self):
    check_window(self.window_left, 'memory.')

  def fill_skipped(self, kv: Cache, pos: Array, last: Array) -> NoReturn:
    """As slots: the loops of a token run together, and none is left out."""
    self.slots(0)

  def slots(self, loops: int) -> NoReturn:
    """Raises ConfigError: `loop.run` asks, and its steps are no streams."""
    raise ConfigError(f'model.memory = {self}: keeps windows of the later loops and states between tokens, which the '
                      'shifted cell alone can use (cells/cell.py); use PerLoop()')

  def make(self, loops: int, layers: int, batch: int, length: int, groups: int, head: int, dtype: Any,
           width: int | None = None) -> Cache:
    """An empty cache for plans of up to `loops` steps. width: that of the states, which it keeps."""
    assert width is not None
    if loops < 1:
      raise ConfigError(f'loops = {loops}: a cache serves 1 loop or more')
    places = min(self.window_left + 1, length)
    carried = memories.empty(loops - 1, 1, batch, 1, 1, width, jnp.float32, layouts.HeadsFirst())
    return Cache(first=memories.empty(1, layers, batch, length, groups, head, dtype),
                 rings=memories.empty(loops - 1, layers, batch, places, groups, head, dtype),
                 carried=dataclasses.replace(carried, v=carried.v[..., :0]))

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> memories.Exchanged:
    """Of prelude, coda and the first loop: a place for every position."""
    return memories.First().update(kv, ctx, layer, k, v)


def check_window(window_left: int, where: str):
  """Raises ConfigError where a window is negative."""
  if window_left < 0:
    raise ConfigError(f'{where}window_left = {window_left}: tokens before a token that its later loops read of their '
                      'own; 0 (itself alone) or more')


# Without a cache -----------------------------------------------------------------------------------------------------


@struct.dataclass
class Opening:
  """The first loop; leaves its keys and values, [B, T, G, d] each."""

  def attend(self, attn, q, k, v, ctx, layer, gate):
    return _causal(attn, q, k, v, ctx), (k, v)


@struct.dataclass
class Later:
  """A later loop; k, v [B, T, G, d] are the first one's."""
  k: Array
  v: Array
  window_left: int = struct.field(pytree_node=False)

  def attend(self, attn, q, k, v, ctx, layer, gate):
    check_causal(attn.kernel.causal, 'model.cell = Shifted')
    wide_q, wide_k, wide_v = attn.extended(q, k, v, ctx.pos)
    own = banded(wide_q, wide_k, wide_v, ctx.seg, self.window_left)[..., :q.shape[-1]]
    return mixed(gate(q), _causal(attn, q, self.k, self.v, ctx), own), None


def _causal(attn, q, k, v, ctx):
  return attn.kernel(*attn.extended(q, k, v, ctx.pos), ctx.seg)[..., :q.shape[-1]]


def mixed(gate_BTH: Array, shared_BTHd: Array, own_BTHd: Array) -> Array:
  """gate * shared + (1 - gate) * own, in float32."""
  gate = gate_BTH[..., None]
  return (gate * shared_BTHd + (1 - gate) * own_BTHd).astype(own_BTHd.dtype)


def banded(q: Array, k: Array, v: Array, seg: Array | None, left: int) -> Array:
  """Attention to the `left` tokens before each and itself, within equal numbers of `seg`.

  q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]. A block of queries reads its own keys and
  those of the block before, so that the cost grows with T * left and not with T * T.
  """
  batch, length = q.shape[:2]
  size = max(left, SMALLEST)
  if length <= 2 * size:
    index = jnp.arange(length)
    mask = _within(index[:, None], index, left)[None]
    return attend(q, k, v, mask if seg is None else mask & (seg[:, :, None] == seg[:, None]))
  blocks = -(-length // size)

  def blocked(x):
    x = jnp.pad(x, ((0, 0), (0, blocks * size - length), *((0, 0),) * (x.ndim - 2)))
    return x.reshape(batch, blocks, size, *x.shape[2:])

  def with_before(x):
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), *((0, 0),) * (x.ndim - 2)))
    return jnp.concatenate([before, x], 2)

  place = jnp.arange(blocks * size).reshape(1, blocks, size)
  of_keys = jnp.concatenate([place - size, place], 2)  # negative before the first block
  mask = _within(place[..., None], of_keys[:, :, None], left) & (of_keys >= 0)[:, :, None]
  if seg is not None:
    seg = blocked(seg)
    mask = mask & (seg[..., None] == with_before(seg)[:, :, None])
  mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
  q, k, v = blocked(q), with_before(blocked(k)), with_before(blocked(v))
  out = attend(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v, mask)))
  return out.reshape(batch, blocks * size, *out.shape[2:])[:, :length]


def _within(of_query, of_key, left):
  """Whether a key is no further back than `left`, and not ahead."""
  return (of_key <= of_query) & (of_query - of_key <= left)


# With a cache --------------------------------------------------------------------------------------------------------


@struct.dataclass
class Prompt:
  """The first loop over a chunk of tokens."""
  cache: Cache

  def attend(self, attn, q, k, v, ctx, layer, gate):
    first, k, v, pos_BS = memories.First().update(self.cache.first, ctx, layer, k, v)
    cache = dataclasses.replace(self.cache, first=first)
    return _placed(attn, q, k, v, ctx.pos, pos_BS, None), dataclasses.replace(self, cache=cache)


@struct.dataclass
class LaterPrompt:
  """A later loop over a chunk of tokens, number `ctx.step.k` from 0; the first one has been over them.

  places: i32[B, w + 1], positions in the loop's ring before the chunk, which the first layer overwrites.
  """
  cache: Cache
  places: Array
  window_left: int = struct.field(pytree_node=False)

  def attend(self, attn, q, k, v, ctx, layer, gate):
    first, rings, slot = self.cache.first, self.cache.rings, ctx.step.k - 1
    k1, v1 = (first.layout.of_heads(_layer(entries[0], layer)) for entries in (first.k, first.v))
    shared = _placed(attn, q, k1, v1, ctx.pos, first.pos[0], None)
    old_k, old_v = (rings.layout.of_heads(_layer(_layer(entries, slot), layer)) for entries in (rings.k, rings.v))
    keys, values = (jnp.concatenate([old.astype(new.dtype), new.swapaxes(1, 2)], 2)
                    for old, new in ((old_k, k), (old_v, v)))
    places = jnp.concatenate([self.places, ctx.pos], 1)
    own = _placed(attn, q, keys, values, ctx.pos, places, self.window_left)
    # Of a chunk that is longer than the ring, the last tokens alone are kept.
    last = ctx.pos.max(-1, keepdims=True)
    pos = jnp.where(ctx.pos > last - rings.length, ctx.pos, -1)
    rings = _put(rings, slot, layer, jnp.arange(len(pos))[:, None], pos, k, v)
    return mixed(gate(q), shared, own), dataclasses.replace(self, cache=dataclasses.replace(self.cache, rings=rings))


@struct.dataclass
class Together:
  """All loops of one token; streams [B, R, ...] stand where tokens do, and ctx.pos is i32[B, R], -1 for none."""
  cache: Cache
  window_left: int = struct.field(pytree_node=False)

  def attend(self, attn, q, k, v, ctx, layer, gate):
    token = dataclasses.replace(ctx, pos=ctx.pos[:, :1])
    first, k1, v1, pos_BS = memories.First().update(self.cache.first, token, layer, k[:, :1], v[:, :1])
    shared = _placed(attn, q, k1, v1, ctx.pos, pos_BS, None)
    cache, later = dataclasses.replace(self.cache, first=first), q.shape[1] - 1
    if not later:
      return shared, dataclasses.replace(self, cache=cache)
    q_RBHd, k_RBGd, v_RBGd, pos_RB = (x[:, 1:].swapaxes(0, 1) for x in (q, k, v, ctx.pos))
    rings = _put(cache.rings, jnp.arange(later)[:, None], layer, jnp.arange(len(q))[None], pos_RB, k_RBGd, v_RBGd)
    keys, values = (rings.layout.of_heads(jax.lax.dynamic_index_in_dim(entries[:later], layer, 1, keepdims=False))
                    for entries in (rings.k, rings.v))  # [R - 1, B, G, w + 1, d]
    queries, keys, values, pos, places = (_merged(x) for x in (q_RBHd[:, :, None], keys, values, pos_RB[..., None],
                                                               rings.pos[:later]))
    own = _placed(attn, queries, keys, values, pos, places, self.window_left)
    own = own.reshape(q_RBHd.shape).swapaxes(0, 1)
    out = mixed(gate(q)[:, 1:], shared[:, 1:], own)
    cache = dataclasses.replace(cache, rings=rings)
    return jnp.concatenate([shared[:, :1], out], 1), dataclasses.replace(self, cache=cache)


def _placed(attn, q, k, v, pos_BT, pos_BS, left):
  """What queries at positions [B, T] read of a cache's keys and values [B, G, S, d] at [B, S], -1 where there is none,
  `left` back or all the way."""
  check_causal(attn.kernel.causal, 'cache')
  k, v, head = k.astype(q.dtype), v.astype(q.dtype), q.shape[-1]
  mask_BTS = (pos_BS[:, None] >= 0) & (pos_BS[:, None] <= pos_BT[..., None])
  if left is not None:
    mask_BTS &= pos_BT[..., None] - pos_BS[:, None] <= left
  q, k, v = attn.extended(q, k, v, pos_BS, heads=1)
  return read(q, k, v, mask_BTS)[..., :head]


def _put(rings, slot, layer, row, pos, k, v):
  """Entries of positions `pos`, of which those of -1 are not written, in the places of rings."""
  place = jnp.where(pos < 0, rings.length, pos % rings.length)
  k, v = (rings.layout.put(cache, (slot, layer, row, place), new, mode='drop')
          for cache, new in ((rings.k, k), (rings.v, v)))
  return dataclasses.replace(rings, k=k, v=v, pos=rings.pos.at[slot, row, place].set(pos, mode='drop'))


def _layer(entries, index):
  return jax.lax.dynamic_index_in_dim(entries, index, keepdims=False)


def _merged(x):
  """The two leading axes as one."""
  return x.reshape(-1, *x.shape[2:])
