"""Layers, and the stack of them that a loop applies.

A block is pre-norm: `x += g_a * Attn(norm(x) * (1 + s_a)); x += g_m * MLP(norm(x) * (1 + s_m))`, where the gates g
and scales s are the modulation of the step (LoopFormer section 2), or absent. Matrix products run in `dtype`; norms
and softmax in float32; the residual state keeps the dtype that it came with.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import attention
from loopformer.types import KV, Array, ConfigError, Ctx

EPSILON = float(jnp.finfo(jnp.float32).eps)  # PyTorch's default for nn.RMSNorm in float32


@dataclasses.dataclass(frozen=True)
class Normal:
  """Initialiser N(0, std^2); a part, where a closure could be neither compared nor saved."""
  std: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return self.std * jax.random.normal(key, shape, dtype)


@jax.custom_vjp
def dense(x: Array, kernel: Array, gain: Array | None = None) -> Array:
  """gain [O] * (x [..., I] @ kernel [I, O]) -> [..., O], accumulated in float32 and returned in the dtype of x.

  The backward pass is written out. It forms the weight's gradient with x as the left operand, whose transpose automatic
  differentiation would form first; and it needs x alone: the gain's gradient is found in the weight's, so the product
  itself is neither saved nor recomputed.
  """
  y = jnp.einsum('...i,io->...o', x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
  return (y if gain is None else y * gain).astype(x.dtype)


def _dense_forward(x, kernel, gain):
  return dense(x, kernel, gain), (x, kernel, gain)


def _dense_backward(saved, dy):
  x, kernel, gain = saved
  outer = jnp.einsum('ni,no->io', x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]),
                     preferred_element_type=jnp.float32)
  if gain is None:
    scaled, dkernel, dgain = kernel, outer, None
  else:
    scaled, dkernel, dgain = kernel * gain, outer * gain, jnp.sum(outer * kernel, 0).astype(gain.dtype)
  dx = jnp.einsum('...o,io->...i', dy, scaled.astype(dy.dtype), preferred_element_type=jnp.float32).astype(x.dtype)
  return dx, dkernel.astype(kernel.dtype), dgain


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
  """Exact GELU, x/2 (1 + erf(x/sqrt 2)); by erf, which is cheaper than the erfc of `jax.nn.gelu`; saves x alone."""
  return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, dy):
  cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
  return ((cdf + x * density) * dy,)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class UnitNorm(nn.Module):
  """RMSNorm without a learned scale: x / sqrt(mean(x^2) + eps), in float32."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + EPSILON)).astype(x.dtype)


class RMSNorm(nn.Module):
  """RMSNorm with a learned scale, in float32."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return (UnitNorm()(x.astype(jnp.float32)) * scale).astype(x.dtype)


class Linear(nn.Module):
  """Bias-free projection of the last axis; kernel [I, O], N(0, std^2)."""
  features: int
  std: float = 0.02

  @nn.compact
  def __call__(self, x: Array, gain: Array | None = None) -> Array:
    return dense(x, self.param('kernel', Normal(self.std), (x.shape[-1], self.features)), gain)


class SelfAttention(nn.Module):
  """Causal self-attention with a fused projection; grouped keys and values when `groups` < `heads`.

  The fused kernel is laid out [D, G, H/G queries + 1 key + 1 value, d], so that it divides over groups.
  """
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: attention.Blockwise | attention.Fused = attention.Blockwise()

  @nn.compact
  def __call__(self, x: Array, ctx: Ctx, kv: KV | None, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, KV | None]:
    batch, length, width = x.shape
    groups = self.groups or self.heads
    check_heads(self.heads, groups, width)
    head, each = width // self.heads, self.heads // groups
    qkv = Linear(groups * (each + 2) * head, self.std, name='qkv')(x).reshape(batch, length, groups, each + 2, head)
    q, k, v = jnp.split(qkv, [each, each + 1], 3)  # whose transpose is one concatenation
    q, k, v = q.reshape(batch, length, self.heads, head), k.squeeze(3), v.squeeze(3)
    if kv is None:
      out = self.kernel(q, k, v, ctx.seg)
    else:
      kv, k, v, pos_BS = ctx.memory.exchange(kv, ctx, layer, k, v)
      mask_BTS = (pos_BS[:, None] >= 0) & (pos_BS[:, None] <= ctx.pos[..., None])
      out = attention.attend(q, k.astype(q.dtype), v.astype(q.dtype), mask_BTS)
    return Linear(width, self.out_std, name='out')(out.reshape(x.shape), gate), kv


def check_heads(heads: int, groups: int, width: int, where: str = ''):
  """Raises ConfigError where heads do not divide the width, or groups the heads."""
  if heads < 1 or width % heads:
    raise ConfigError(f'{where}heads = {heads} does not divide the width {width}; choose a divisor of the width')
  if groups < 1 or heads % groups:
    raise ConfigError(f'{where}groups = {groups} does not divide heads = {heads}; choose a divisor of the heads')


class MLP(nn.Module):
  """D -> F -> D without biases."""
  hidden: int
  std: float = 0.02
  out_std: float = 0.02
  activation: Callable[[Array], Array] = gelu

  @nn.compact
  def __call__(self, x: Array, gate: Array | None = None) -> Array:
    hidden = self.activation(Linear(self.hidden, self.std, name='up')(x))
    return Linear(x.shape[-1], self.out_std, name='down')(hidden, gate)


class Block(nn.Module):
  """One pre-norm transformer layer; `norm` is cloned for both branches."""
  attn: SelfAttention
  mlp: MLP
  norm: nn.Module = RMSNorm()
  dtype: str = 'float32'

  def setup(self):
    self.norm_attn, self.norm_mlp = self.norm.clone(parent=None), self.norm.clone(parent=None)

  def __call__(self, x: Array, ctx: Ctx, mod: Array | None, kv: KV | None, layer: Array | int = 0):
    """x [B, T, D], mod None or [4, D] (g_a, g_m, s_a, s_m) -> (x, kv)."""
    g_a, g_m, s_a, s_m = (None,) * 4 if mod is None else mod
    branch, kv = self.attn(self._normed(self.norm_attn, x, s_a), ctx, kv, layer, g_a)
    x = x + branch.astype(x.dtype)
    branch = self.mlp(self._normed(self.norm_mlp, x, s_m), g_m)
    return x + branch.astype(x.dtype), kv

  def _normed(self, norm, x, scale):
    x = norm(x)
    return (x if scale is None else x * (1 + scale).astype(x.dtype)).astype(self.dtype)

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token and layer, forward; causal attention over `length` tokens on average half."""
    groups = self.attn.groups or self.attn.heads
    matrices = width * (width + 2 * groups * width // self.attn.heads) + width * width + 2 * width * self.mlp.hidden
    return 2.0 * matrices + 4.0 * width * (length + 1) / 2


class Stack(nn.Module):
  """`depth` layers with parameters of their own, stacked [N, ...] and scanned: compile time does not grow with N."""
  block: Block
  depth: int

  @nn.compact
  def __call__(self, x: Array, ctx: Ctx, mods: Array | None, kv: KV | None) -> tuple[Array, KV | None]:
    """x [B, T, D], mods None or [N, 4, D] -> (x, kv)."""

    def layer(block, carry, row):
      x, kv = carry
      index, mod = row
      return block(x, ctx, mod, kv, index), None

    # The cache is carried, not scanned over: as a scanned input and output it would be copied whole each time.
    layer = ctx.remat.layer(layer) if ctx.remat else layer
    scan = nn.scan(layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth)
    (x, kv), _ = scan(self.block, (x, kv), (jnp.arange(self.depth), mods))
    return x, kv

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token, forward, of one application."""
    return self.depth * self.block.flops(width, length)
