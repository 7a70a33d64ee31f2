"""The gate of LoopUS: how far a state follows what the layers make of it (2605.11011, equations 3 to 5)."""
from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.nn.layers import LayerNorm, Linear, Normal, UniformWithin
from loopformer.types import Array, Context


@dataclasses.dataclass(frozen=True)
class Rising:
  """Initialiser log(1), log(2), .. log(D): channel n decays at the rate n (S4D-real), as in the released code.

  Channels of high numbers hardly move at first: the mean of alpha is 0.66 at D = 64, 0.10 at 2048.
  """

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


@dataclasses.dataclass(frozen=True)
class StepSizes:
  """Initialiser softplus^-1(dt), log(dt) uniform between those of `low` and `high` (Mamba's)."""
  low: float = 1e-3
  high: float = 0.1

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(self.low), math.log(self.high)))
    return dt + jnp.log(-jnp.expm1(-dt))


class Share(nn.Module):
  """alpha = exp(-softplus(W (new - x) + b) exp(rates)), f32[B, T, D] in (0, 1), W of rank ceil(D / ratio).

  rates: first values of log(-A), [D]: `Rising`, or Normal(0.0), with which alpha starts between 0.90 and 0.999 and the
  first loop gives what the decoder gave.
  """
  rates: Any = Rising()
  ratio: int = 16

  @nn.compact
  def __call__(self, x: Array, new: Array) -> Array:
    width = x.shape[-1]
    rank = -(-width // self.ratio)
    low = Linear(rank, init=UniformWithin(width ** -0.5), name='down')((new - x).astype(jnp.float32))
    step = jax.nn.softplus(Linear(width, init=UniformWithin(rank ** -0.5), bias=StepSizes(), name='up')(low))
    return jnp.exp(-step * jnp.exp(self.param('rates', self.rates, (width,))))

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width * -(-width // self.ratio)


class Selective(Around):
  """x + alpha (new - x), new being what the step of another cell gives: the state follows where alpha is near one.

  Between x and new whatever the rounding; new itself where alpha is one, and x where new is x. Raises ConfigError where
  the other cell's state is a tree.
  """
  share: nn.Module = Share()

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens, gates included."""
    return self.inner.flops(width, length, steps) + steps * self.share.flops(width)

  def __call__(self, x: Array, e: Array, ctx: Context, kv: Any) -> tuple[Array, Any, dict]:
    new, kv, aux = self.inner(self.of_one_array(x), e, ctx, kv)
    return between(x, new, self.share(x, new)), kv, aux


def between(x: Array, new: Array, share: Array) -> Array:
  """x + share (new - x), computed in float32 from the end that is nearer, in the dtype of x."""
  old, far = x.astype(jnp.float32), new.astype(jnp.float32)
  return jnp.where(share < 0.5, old + share * (far - old), far - (1 - share) * (far - old)).astype(x.dtype)


class ConfidenceHead(nn.Module):
  """Linear(LayerNorm(x)), [B, T, D] -> [B, T, 1]: the logit of how much of the text is answered right; a gate of
  `Halting`, trained by `terms.Supervision` on the state that it reads when it decides."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Linear(1, init=UniformWithin(x.shape[-1] ** -0.5), bias=Normal(0.0), name='out')(LayerNorm(name='norm')(x))
