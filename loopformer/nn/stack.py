"""The stack of layers that a loop applies."""
from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import backend, roles
from loopformer.types import GIVEN, INTERMEDIATES, Array, ConfigError, Context


def unrolls(layers: int) -> bool:
  """Whether so many layers of a stack are written out and not scanned when there is no cache (backend.py)."""
  return layers <= backend.current().unrolled


def layer_of(which: int | Array, tree: Any) -> Any:
  """Row `which`, or rows, of every array in a tree of arrays [N, ...]; None has none."""
  return jax.tree.map(lambda leaf: leaf[which], tree)


class Stack(nn.Module):
  """`depth` blocks with parameters of their own, stacked [N, ...] and, but for few (`unrolls`), scanned: compile time
  does not grow with N.

  order: which block runs when, if not each once from the first to the last: (0, 0, 1) applies the first twice. norm: of
  what leaves the stack.
  """
  block: Any
  depth: int
  order: tuple[int, ...] | None = None
  norm: nn.Module | None = None

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mods: Any, kv: Any) -> tuple[Array, Any]:
    """x [B, T, D] -> (x, kv). mods: what each application is given, a tree of arrays [applications, ...] or None; kv: a
    KV, None, or what a cell's own layers take in its place.
    """

    def layer(block, carry, row):
      x, kv = carry
      index, mod = row
      return block(x, ctx, mod, kv, index), None

    roles.stacked(self, 'block')
    # The cache is carried, not scanned over: as a scanned input and output it would be copied whole each time.
    layer = ctx.remat.layer(layer) if ctx.remat and not self.is_initializing() else layer
    order = tuple(range(self.depth)) if self.order is None else self.order
    if kv is None and not self.is_initializing() and unrolls(len(order)):
      for index, which in enumerate(order):
        own = nn.map_variables(layer, 'params', trans_in_fn=functools.partial(layer_of, which))
        (x, kv), _ = own(self.block, (x, kv), (index, layer_of(index, mods)))
      return x if self.norm is None else self.norm(x), kv
    scan = functools.partial(nn.scan, layer, variable_axes={'params': 0, INTERMEDIATES: 0, GIVEN: 0},
                             split_rngs={'params': True},
                             check_constancy_invariants=self.is_initializing())  # elsewhere it is but another trace
    if self.order is None:
      (x, kv), _ = scan(length=self.depth)(self.block, (x, kv), (jnp.arange(self.depth), mods))
    elif self.is_initializing():  # each block once, whatever runs when
      some = layer_of(jnp.zeros(self.depth, jnp.int32), mods)
      (x, kv), _ = scan(length=self.depth)(self.block, (x, kv), (jnp.arange(self.depth), some))
    else:
      ordered = nn.map_variables(scan(length=len(order)), 'params',
                                 trans_in_fn=functools.partial(layer_of, jnp.asarray(order)))
      (x, kv), _ = ordered(self.block, (x, kv), (jnp.arange(len(order)), mods))
    return (x if self.norm is None else self.norm(x)), kv

  @property
  def applications(self) -> int:
    """Layers that run, and so the slots of keys and values."""
    return self.block.layers * (self.depth if self.order is None else len(self.order))

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward, of one application."""
    return self.applications / self.block.layers * self.block.flops(width, length)


def repeated(times: tuple[int, ...]) -> tuple[int, ...]:
  """The order in which layer l runs times[l] times in place (intra-layer recurrence): (2, 1) -> (0, 0, 1).

  Raises:
    ConfigError: no layers, or a count that is not a positive integer.
  """
  if not times or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in times):
    raise ConfigError(f'repeats = {times}: give a positive whole number for every layer, such as (4, 2, 1, 1)')
  return tuple(layer for layer, n in enumerate(times) for _ in range(n))
