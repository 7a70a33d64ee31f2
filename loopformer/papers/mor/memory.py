"""A memory whose slots have as many places as a recursion has tokens (Mixture-of-Recursions, section 4)."""
from __future__ import annotations

import math
import operator
from typing import Any

import jax.numpy as jnp

from loopformer import memories
from loopformer.types import KV, Array, ConfigError, Context, config_dataclass


@config_dataclass
class Compact:
  """Loop k keeps the entries of the tokens that took it, one behind the other, in ceil(share[k] * length) places.

  Where a slot is full, a token passes the loop by, as if its router had not taken it: what is decoded stays causal, the
  same one token at a time and in one pass, and finite; with enough places it is what the pass without a cache computes,
  and `share` of 1.0 is always enough. The places in use are those whose position is not -1.

  Entries lie in the order of their positions, so that a cache from which the last tokens are taken is the cache before
  them. For cells whose steps are known when they are compiled (cells/cell.py). Bytes: PerLoop's by the mean share, so
  (K + 1) / (2 K) of it for shares K/K .. 1/K.
  """
  share: tuple[float, ...] = (1.0, 2 / 3, 1 / 3)
  exact, rewinds = True, True

  def __post_init__(self):
    if not self.share or not all(0 < share <= 1 for share in self.share):
      raise ConfigError(f'memory.share = {self.share}: give every loop a share of the positions, above 0 and at most 1')

  def slots(self, loops: int) -> int:
    return loops

  def make(self, loops: int, layers: int, batch: int, length: int, groups: int, head: int, dtype: Any,
           width: int | None = None) -> tuple[KV, ...]:
    """An empty cache, one slot for every loop; it keeps no states, so `width` is not read."""
    if loops > len(self.share):
      raise ConfigError(f'memory.share = {self.share}: shares for {len(self.share)} loops, but {loops} are asked for; '
                        'give one a loop')
    return tuple(memories.empty(1, layers, batch, math.ceil(share * length - 1e-6), groups, head, dtype)
                 for share in self.share[:loops])

  def has_capacity(self, kv: tuple[KV, ...], ctx: Context, taken: Array) -> Array:
    """Which of the tokens find a place, the first ones first."""
    own = kv[_step(ctx)]
    used = (own.pos[0] >= 0).sum(-1, keepdims=True)
    return taken & (used + jnp.cumsum(taken, -1) <= own.length)

  def update(self, kv: KV | tuple[KV, ...], ctx: Context, layer: Array, k: Array, v: Array) -> Any:
    """As PerLoop.update, which serves outside the loop; tokens without a place have a position of -1 by now."""
    if isinstance(kv, KV):
      return memories.PerLoop().update(kv, ctx, layer, k, v)
    step = _step(ctx)
    own, stored = kv[step], ctx.pos >= 0
    start = jnp.where(stored, ctx.pos, jnp.iinfo(jnp.int32).max).min(-1, keepdims=True)
    before = ((own.pos[0] >= 0) & (own.pos[0] < start)).sum(-1, keepdims=True)  # not those of the layer before
    beyond = own.length + jnp.arange(stored.shape[1])  # out of range, and dropped
    place = jnp.where(stored, before + jnp.cumsum(stored, -1) - 1, beyond)
    own, keys, values, pos = memories.put(own, 0, ctx.pos, place, layer, k, v)
    return (*kv[:step], own, *kv[step + 1:]), keys, values, pos

  def fill_skipped(self, kv: Any, pos: Array, last: Array) -> Any:
    """Raises ConfigError: slots of steps that were not taken have no places for them."""
    raise ConfigError('memory = Compact(): exits fill the slots of steps that were not taken; use PerLoop()')


def _step(ctx):
  """The number of the step, which tells the array. Raises ConfigError where it is not known when compiled."""
  try:
    return operator.index(ctx.step.k)
  except TypeError:
    raise ConfigError('memory = Compact(): slots differ in their shapes, so that steps must be known when they are '
                      'compiled; use it with cells/cell.py, or PerLoop()') from None
