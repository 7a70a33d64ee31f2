"""Attention that reads rows which all loops share, and the gates that mix them (MELT, section 2)."""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn, struct
import jax
import jax.numpy as jnp

from loopformer import roles
from loopformer.nn import kernels
from loopformer.nn.attention import attended, attention_flops, check_attention, heads_of
from loopformer.nn.layers import Dense, Normal, dense, unfused
from loopformer.roles import Role
from loopformer.types import KV, Array, ConfigError, Context


@dataclasses.dataclass(frozen=True)
class Filled:
  """Initialiser with one value."""
  value: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jnp.full(shape, self.value, dtype)


# Gates ---------------------------------------------------------------------------------------------------------------


class Elementwise(nn.Module):
  """z [B, C, D] = sigmoid([x; h] W + b) in float32, W zero and b `bias` at first: 0.018, nearly the new input alone."""
  bias: float = -4.0

  @nn.compact
  def __call__(self, x: Array, h: Array, taken: Array) -> Array:
    """States and latents [B, C, D], loops before this one i32[B] -> f32[B, C, D or 1]."""
    return _gate(self, x, h, x.shape[-1])

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width * width


class Scalar(nn.Module):
  """As Elementwise with one z a token, [B, C, 1] (the paper's ablation)."""
  bias: float = -4.0

  @nn.compact
  def __call__(self, x: Array, h: Array, taken: Array) -> Array:
    return _gate(self, x, h, 1)

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width


class Constant(nn.Module):
  """z = `keep`, not learned: 0 is the last loop's row, more is a moving average (the paper's ablations)."""
  keep: float = 0.0

  def __call__(self, x: Array, h: Array, taken: Array) -> Array:
    return jnp.full((len(x), 1, 1), self.keep, jnp.float32)

  def flops(self, width: int) -> float:
    """Nothing worth counting."""
    return 0.0


class Mean(nn.Module):
  """z = t / (t + 1) after t loops: h is the mean of the inputs so far (the paper's ablation)."""

  def __call__(self, x: Array, h: Array, taken: Array) -> Array:
    return (taken / (taken + 1.0))[:, None, None]

  def flops(self, width: int) -> float:
    """Nothing worth counting."""
    return 0.0


def _gate(module, x, h, outputs):
  both = jnp.concatenate([x, h], -1)
  kernel = module.param('gate', Normal(0.0), (both.shape[-1], outputs))
  bias = module.param('bias', Filled(module.bias), (outputs,))
  return jax.nn.sigmoid(dense(both, kernel).astype(jnp.float32) + bias)


# What is in flight ---------------------------------------------------------------------------------------------------


@struct.dataclass
class Flight:
  """What the tokens of a chunk carry through layers and loops, in the place of a cache; N counts a step's layers.

  h: [N, B, C, D], latents; taken: i32[B], loops of each sequence so far.
  kv: with a cache, the cache: every loop overwrites the rows of these tokens. Without:
  given: [N, B, C, D], what attention gave, after its last projection; rows: keys and values [N, B, C, G, d], of the
  latents; base: None, or those of the states, where a plan blends.
  """
  h: Array
  taken: Array
  kv: KV | None = None
  given: Array | None = None
  rows: tuple[Array, Array] | None = None
  base: tuple[Array, Array] | None = None


@struct.dataclass
class Past:
  """Rows of the chunks before this one, without a cache.

  k, v: [slots, N, B, S, G, d], one slot, or where a plan blends one for every step; S counts all tokens, those still to
  come too. mask: bool[1 or B, C, S + C], what is read of these and the chunk's own; pos: i32[B, S + C].
  """
  k: Array
  v: Array
  mask: Array
  pos: Array


class Matrix(nn.Module):
  """The kernel of a `Linear`, [I, features], for products with some of its columns."""
  features: int
  std: float

  @nn.compact
  def __call__(self, width: int, dtype: Any) -> Array:
    if self.has_variable('params', 'transposed'):
      return self.get_variable('params', 'transposed').T
    return roles.param(self, 'kernel', Normal(self.std), (width, self.features), Role(dtype=dtype, tensor=-1))


class LatentAttention(nn.Module):
  """Causal self-attention with queries from the states, and keys and values from latents; for the cell `Gated`.

  Its parameters are those of `SelfAttention`, and those of its gate, `latent`.
  """
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: kernels.Kernel = kernels.Fused()
  position: Any = None
  latent: nn.Module = Elementwise()
  head = None  # a head is as wide as the layer divided by `heads`

  @nn.compact
  def __call__(self, x: Array, ctx: Context, kv: Flight, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, Flight]:
    batch, length, width = x.shape
    check_attention(self, width, '')
    if not isinstance(kv, Flight):
      raise ConfigError('LatentAttention: its latents live in the cell Gated; use SelfAttention elsewhere')
    groups, head = heads_of(self, width)
    kernels = unfused(Matrix((self.heads + 2 * groups) * head, self.std, name='qkv')(width, x.dtype),
                      self.heads, groups)
    queries, both = kernels[0].reshape(width, -1), jnp.concatenate(kernels[1:], -2).reshape(width, -1)
    old = jnp.where(kv.taken[:, None, None] == 0, x, _of(kv.h, layer))
    h = x + (self.latent(x, old, kv.taken) * (old - x)).astype(x.dtype)

    def rows(source):
      k, v = jnp.split(dense(source, both).reshape(batch, length, groups, 2 * head), 2, -1)
      return self._rotated(k, ctx.pos), v

    q, own = self._rotated(dense(x, queries).reshape(batch, length, self.heads, head), ctx.pos), rows(h)
    kv = dataclasses.replace(kv, h=_put(kv.h, h, layer))
    if kv.kv is not None:
      out, cache = attended(self, q, own[0], own[1], ctx, kv.kv, layer)
      kv = dataclasses.replace(kv, kv=cache)
    else:
      kv = dataclasses.replace(kv, rows=jax.tree.map(lambda buffer, new: _put(buffer, new, layer), kv.rows, own))
      if kv.base is not None:
        assert ctx.step is not None
        share, base = ctx.step.precomputed, rows(x)
        kv = dataclasses.replace(kv, base=jax.tree.map(lambda buffer, new: _put(buffer, new, layer), kv.base, base))
        own = jax.tree.map(lambda own, base: blended(share, own, base), own, base)
      out = self._read(q, own[0], own[1], ctx, layer)
    out = Dense(name='out')(out, width, Normal(self.out_std), ctx, gain=gate, divided=-2)
    return out, kv if kv.given is None else dataclasses.replace(kv, given=_put(kv.given, out, layer))

  def _rotated(self, x, pos):
    return x if self.position is None else self.position.rotate(x, pos)

  def _read(self, q, k, v, ctx, layer):
    """What queries read of the chunk's rows and those before."""
    if ctx.own is None:
      return attended(self, q, k, v, ctx, None, layer)[0]
    kernels.check_causal(self.kernel.causal, 'model.cell = Gated')
    past, shape = ctx.own, q.shape
    slot = 0 if ctx.step.precomputed is None else ctx.step.k
    k, v = (jnp.concatenate([_of(_of(old, slot), layer), new], 1) for old, new in ((past.k, k), (past.v, v)))
    if self.position is not None:
      q, k, v = self.position.augment_qk(q, k, v, past.pos)
    out = kernels.attend(q, k, v, past.mask)
    return out[..., :shape[-1]].reshape(*shape[:2], -1)

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""
    return attention_flops(self, width, length) + self.latent.flops(width)


def blended(share: Array, new: Array, old: Array) -> Array:
  """share * new + (1 - share) * old; share f32[] or of leading axes of the others."""
  share = share.reshape(*share.shape, *(1,) * (new.ndim - share.ndim))
  return (share * new + (1 - share) * old).astype(new.dtype)


def _of(buffer, index):
  return jax.lax.dynamic_index_in_dim(buffer, index, keepdims=False)


def _put(buffer, value, index):
  return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), index, 0)
