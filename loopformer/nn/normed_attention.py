"""Attention with a norm of queries and one of keys, before they learn their places (Qwen3)."""
from __future__ import annotations

from typing import Any

from flax import linen as nn

from loopformer.nn import kernels
from loopformer.nn.attention import attended, attention_flops, check_attention, heads_of, qkv
from loopformer.nn.layers import Dense, Normal, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.types import KV, Array, Ctx


class NormedAttention(nn.Module):
  """Causal self-attention whose queries and keys are normed head by head, each by a norm of its own.

  `SelfAttention.norm_qk` is one norm for both, after the turn: with a learned scale, which the turn would mix within
  pairs, that is another function. The fused kernel is laid out as there.
  """
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: kernels.Kernel = kernels.Fused()
  position: Any = Rotary()
  norm: nn.Module = RMSNorm(1e-6)
  linear: Any = Dense()

  def setup(self):
    self.norm_q, self.norm_k = self.norm.clone(parent=None), self.norm.clone(parent=None)

  @nn.compact
  def __call__(self, x: Array, ctx: Ctx, kv: KV | None, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, KV | None]:
    width = x.shape[-1]
    check_attention(self, width, '')
    groups, _ = heads_of(self, width)
    q, k, v = qkv(self, x, groups, Normal(self.std), ctx)
    q, k = self.norm_q(q), self.norm_k(k)
    q, k = self.position.turn(q, ctx.pos), self.position.turn(k, ctx.pos)
    out, kv = attended(self, q, k, v, ctx, kv, layer)
    return self.linear.copy(name='out')(out, width, Normal(self.out_std), ctx, gain=gate, divided=-2), kv

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token, forward."""
    return attention_flops(self, width, length)
