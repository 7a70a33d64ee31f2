"""How keys and values lie in a cache: the order of its axes, which is known here alone. Frozen parts.

Both begin with slots, layers and rows, [slots, N, B, ...]. An `index` is of some of these axes, as NumPy takes it, with
that of the places at its end; entries are [..., G, d]. `heads` is the axis that divides over heads.
"""
from __future__ import annotations

from typing import Any

from loopformer import backend
from loopformer.types import Array, config_dataclass


@config_dataclass
class HeadsFirst:
  """[slots, N, B, G, S, d]: what a row's query reads of a head lies in one piece, so that products copy nothing."""
  heads = 3

  def shape(self, slots: int, layers: int, batch: int, length: int, groups: int, head: int) -> tuple[int, ...]:
    return slots, layers, batch, groups, length, head

  def put(self, cache: Array, index: tuple[Any, ...], entries: Array, **options: Any) -> Array:
    """The cache with entries at an index; options of `jax.numpy.ndarray.at[].set`."""
    return cache.at[*index[:-1], :, index[-1]].set(entries.astype(cache.dtype), **options)

  def get(self, cache: Array, index: tuple[Any, ...], **options: Any) -> Array:
    """The entries at an index."""
    return cache.at[*index[:-1], :, index[-1]].get(**options)

  def of_heads(self, cache: Array) -> Array:
    """A cache, or rows of it, as attention reads it: [..., B, G, S, d]."""
    return cache

  def count(self, cache: Array) -> int:
    """G."""
    return cache.shape[self.heads]


@config_dataclass
class Merged:
  """[slots, N, B, S, G d]: a token's entries lie in one piece, which a TPU writes in place, where it copies the whole
  cache to and fro for the other; and its registers' 128 lanes are full, whatever the width of a head."""
  groups: int
  heads = 4

  def shape(self, slots: int, layers: int, batch: int, length: int, groups: int, head: int) -> tuple[int, ...]:
    return slots, layers, batch, length, groups * head

  def put(self, cache: Array, index: tuple[Any, ...], entries: Array, **options: Any) -> Array:
    """As HeadsFirst.put."""
    return cache.at[index].set(entries.reshape(*entries.shape[:-2], -1).astype(cache.dtype), **options)

  def get(self, cache: Array, index: tuple[Any, ...], **options: Any) -> Array:
    """As HeadsFirst.get."""
    return self._apart(cache.at[index].get(**options))

  def of_heads(self, cache: Array) -> Array:
    """As HeadsFirst.of_heads."""
    return self._apart(cache).swapaxes(-3, -2)

  def count(self, cache: Array) -> int:
    """As HeadsFirst.count."""
    return self.groups

  def _apart(self, entries):
    return entries.reshape(*entries.shape[:-1], self.groups, -1)


Layout = HeadsFirst | Merged


def chosen(groups: int) -> Layout:
  """What the backend wants of a cache of so many heads."""
  return Merged(groups=groups) if backend.current().merged else HeadsFirst()
