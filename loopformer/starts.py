"""Starts: the state that a loop begins with. Frozen parts: (input e, context) -> state."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from loopformer.types import Array, ConfigError, Context, config_dataclass


@config_dataclass
class Embedded:
  """x = e: the loop goes on from the prelude's output."""
  heard = True  # the state knows the input

  def __call__(self, e: Array, ctx: Context) -> Array:
    return e


@config_dataclass
class Zeros:
  """x = 0: what the loop knows, its injection tells it."""
  heard = False

  def __call__(self, e: Array, ctx: Context) -> Array:
    return jnp.zeros_like(e)


@config_dataclass
class Noise:
  """x ~ N(0, std^2), cut at three std (Parcae section 2, Huginn section 2); the cut itself lowers the spread by 1.3 %.

  A token's noise depends on the sequence's key and the token's position alone, so that decoding token by token starts
  from what the parallel pass starts from. Without keys, as in evaluation and generation, one fixed key serves all.
  """
  std: float
  heard = False

  def __post_init__(self):
    if self.std < 0:
      raise ConfigError(f'start.std = {self.std}: must be 0 or more')

  def __call__(self, e: Array, ctx: Context) -> Array:
    keys = ctx.noise
    if keys is None:
      keys = jnp.broadcast_to(jax.random.key(0), e.shape[:1])

    def draw(key, pos):
      return jax.random.truncated_normal(jax.random.fold_in(key, pos), -3.0, 3.0, e.shape[-1:])

    return (self.std * jax.vmap(jax.vmap(draw, (None, 0)))(keys, jnp.maximum(ctx.pos, 0))).astype(e.dtype)
