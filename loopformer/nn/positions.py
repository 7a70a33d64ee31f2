"""Positions inside attention: frozen parts, applied to queries and keys. Without one, order comes from the mask alone.

`rotate` acts on queries and keys before keys are cached; `augment_qk` on queries and all keys that may be read, and may
add to their width; `check` refuses heads that cannot be served. Positions are those of the documents, the same in every
loop.
"""
from __future__ import annotations

import math

import jax.numpy as jnp

from loopformer.types import Array, ConfigError, config_dataclass, real, whole


@config_dataclass
class Rotary:
  """RoPE: pairs of channels (2 i, 2 i + 1) turn by pos * base^(-2 i / d), in float32."""
  base: float = 10_000.0

  def __post_init__(self):
    if self.base <= 1:
      raise ConfigError(f'position.base = {self.base}: must be above 1')

  def check(self, heads: int, width: int, where: str):
    """Raises ConfigError where the width of a head is odd; width: of all heads together."""
    if width // heads % 2:
      raise ConfigError(f'{where}heads = {heads}: at width {width} a head has {width // heads} channels, an odd '
                        'number, and rotary positions turn pairs of them; choose heads, head or width so that it is '
                        'even')

  def turns(self, half: int) -> Array:
    """f32[half]: by what each pair turns from one position to the next, in radians."""
    return self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)

  def rotate(self, x: Array, pos: Array) -> Array:
    """[B, T, H, d], i32[B, T] -> [B, T, H, d]."""
    half = x.shape[-1] // 2
    angle = pos[..., None].astype(jnp.float32) * self.turns(half)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], half, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape).astype(x.dtype)

  def augment_qk(self, q: Array, k: Array, v: Array, pos_BS: Array, heads: int = 2) -> tuple[Array, Array, Array]:
    """Nothing to add."""
    return q, k, v


@config_dataclass
class StretchedRotary(Rotary):
  """Rotary positions of a model that was trained on longer texts afterwards, as Llama 3.1 (`rope_type` llama3).

  Pairs that turn less than `low` times in the `original` positions turn `factor` times more slowly, those that turn
  more than `high` times as before, and those between by a mean of the two.
  """
  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192

  def __post_init__(self):
    super().__post_init__()
    real('position.factor', self.factor, '[1, inf)')
    real('position.low', self.low, '(0, inf)')
    real('position.high', self.high, f'({self.low}, inf)')
    whole('position.original', self.original, 1)

  def turns(self, half: int) -> Array:
    """As of Rotary."""
    turns = super().turns(half)
    kept = jnp.clip((self.original * turns / (2 * math.pi) - self.low) / (self.high - self.low), 0, 1)
    return turns * (kept + (1 - kept) / self.factor)


@config_dataclass
class Alibi:
  """ALiBi: score - slope_h * (query position - key position), slope_h = 2^(-8 h / H) for h = 1..H.

  A softmax forgets what all keys of a query share, so slope_h * (key position) is enough. It enters as two more
  channels of queries (the slope) and keys (the position, in multiples of 256 and the rest, which bfloat16 holds exactly
  up to 65,536), and every attention kernel serves.
  """

  def check(self, heads: int, width: int, where: str):
    """Nothing: it serves all heads."""

  def rotate(self, x: Array, pos: Array) -> Array:
    """Nothing to turn."""
    return x

  def augment_qk(self, q: Array, k: Array, v: Array, pos_BS: Array, heads: int = 2) -> tuple[Array, Array, Array]:
    """q [B, T, H, d], k and v [B, S, G, d], i32[B, S] -> the same with d + 2 channels, scaled so that scores fit.

    heads: the axis of G in k and v, 1 in a cache's [B, G, S, d].
    """
    count, width = q.shape[2:]
    slopes = 2.0 ** (-8.0 * jnp.arange(1, count + 1) / count) * (width + 2) ** 0.5
    q = q * ((width + 2) / width) ** 0.5  # kernels divide by the root of the width that they see
    slope = jnp.broadcast_to(slopes[:, None], (*q.shape[:3], 2)).astype(q.dtype)
    place = jnp.expand_dims(jnp.stack([pos_BS // 256 * 256, pos_BS % 256], -1), heads)
    place = jnp.broadcast_to(place, (*k.shape[:3], 2)).astype(k.dtype)
    return (jnp.concatenate([q, slope], -1), jnp.concatenate([k, place], -1),
            jnp.concatenate([v, jnp.zeros_like(v[..., :2])], -1))
