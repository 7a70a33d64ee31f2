"""Layers whose later loops mix two reads of attention by a gate (Parallel Loop Transformer; LoopCoder-v2, section 2).

Every loop projects with the same parameters. What its queries then read is told by a view (streams.py), which comes
in the place of the cache: of the first loop all tokens before, as ever; of later ones the first loop's keys and values
of the same layer, and their own in a window, mixed head by head.
"""
from __future__ import annotations

from typing import Any, Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.nn import kernels
from loopformer.nn.attention import attention_flops, check_attention, heads_of, qkv
from loopformer.nn.blocks import Layer
from loopformer.nn.layers import MLP, Dense, GatedMLP, Linear, Normal, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.types import Array, ConfigError, Context


class QueryGate(nn.Module):
  """sigmoid(w_h . q_h + b_h), q after its turn, w [H, d]; zero at the start, so that both reads count half."""

  @nn.compact
  def __call__(self, q: Array, x: Array) -> Array:
    """q [B, T, H, d], x [B, T, D], the layer's input before its norm -> f32[B, T, H]."""
    weights = self.param('kernel', Normal(0.0), q.shape[2:])
    bias = self.param('bias', Normal(0.0), q.shape[2:3])
    return jax.nn.sigmoid(jnp.einsum('BTHd,Hd->BTH', q.astype(jnp.float32), weights) + bias)

  def flops(self, width: int, heads: int) -> float:
    """Floating-point operations a token, forward."""
    return 2.0 * width


class HiddenGate(nn.Module):
  """sigmoid(W norm(x) + b), W [D, H], with a norm of its own; zero at the start."""
  norm: nn.Module = RMSNorm()

  @nn.compact
  def __call__(self, q: Array, x: Array) -> Array:
    """As QueryGate."""
    return jax.nn.sigmoid(Linear(q.shape[2], 0.0, Normal(0.0), name='out')(self.norm(x.astype(jnp.float32))))

  def flops(self, width: int, heads: int) -> float:
    """Floating-point operations a token, forward."""
    return 2.0 * width * heads


class ConstantGate(nn.Module):
  """The same for all heads and tokens: 1 reads the first loop alone, 0 the loop's own window alone (for ablations)."""
  value: float

  def __call__(self, q: Array, x: Array) -> Array:
    """As QueryGate."""
    return jnp.full(q.shape[:3], self.value, jnp.float32)

  def flops(self, width: int, heads: int) -> float:
    """Floating-point operations a token, forward."""
    return 0.0


class GatedAttention(nn.Module):
  """Causal self-attention whose reads a view arranges; the fused kernel is laid out as that of `SelfAttention`."""
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: kernels.Kernel = kernels.Fused()
  position: Any = Rotary()
  linear: Any = Dense()
  head = None  # a head is as wide as the layer divided by `heads`

  @nn.compact
  def __call__(self, x: Array, ctx: Context, view: Any, layer: Array | int,
               gate: Callable[[Array], Array]) -> tuple[Array, Any]:
    """x [B, T, D], gate: queries [B, T, H, d] -> f32[B, T, H] -> ([B, T, D], what the view leaves).

    Raises:
      ConfigError: there is no view, because another cell than `Shifted`, or a prelude or coda, runs the layer.
    """
    if not hasattr(view, 'attend'):
      raise ConfigError('GatedAttention: the cell Shifted alone tells it what to read; use SelfAttention elsewhere')
    batch, length, width = x.shape
    check_attention(self, width, '')
    groups, _ = heads_of(self, width)
    q, k, v = qkv(self, x, groups, Normal(self.std), ctx)
    if self.position is not None:
      q, k = self.position.rotate(q, ctx.pos), self.position.rotate(k, ctx.pos)
    out, left = view.attend(self, q, k, v, ctx, layer, gate)
    out = out.reshape(batch, length, width)
    return self.linear.copy(name='out')(out, width, Normal(self.out_std), ctx, divided=-2), left

  def extended(self, q: Array, k: Array, v: Array, pos: Array, heads: int = 2) -> tuple[Array, Array, Array]:
    """Queries, keys and values with what positions add to their width; pos i32[B, S] of the keys, whose heads stand at
    the axis `heads`."""
    return (q, k, v) if self.position is None else self.position.augment_qk(q, k, v, pos, heads)

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward, of a first loop."""
    return attention_flops(self, width, length)


class GatedBlock(Layer):
  """One pre-norm layer, `Block` with a gate, whose parameters have the names that they have there."""
  attn: GatedAttention
  mlp: MLP | GatedMLP
  gate: QueryGate | HiddenGate | ConstantGate = QueryGate()
  norm: nn.Module = RMSNorm()
  dtype: str = 'float32'
  viewed = True

  def setup(self):
    self.norm_attn, self.norm_mlp = self.norm.clone(parent=None), self.norm.clone(parent=None)

  def __call__(self, x: Array, ctx: Context, mod: None, view: Any, layer: Array | int = 0) -> tuple[Array, Any]:
    """x [B, T, D] -> (x, what the view leaves)."""
    branch, left = self.attn(self.norm_attn(x).astype(self.dtype), ctx, view, layer, lambda q: self.gate(q, x))
    x = x + branch.astype(x.dtype)
    return x + self.mlp(self.norm_mlp(x).astype(self.dtype), ctx=ctx).astype(x.dtype), left

  def flops_of_mixing(self, width: int, keys: float) -> float:
    """What a later loop adds to that, where a token reads `keys` tokens of its window."""
    return 4.0 * width * keys + self.gate.flops(width, self.attn.heads)
