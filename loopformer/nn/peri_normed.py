"""A layer whose branches are normed at both ends (Ouro, section 2; known as Peri-LN)."""
from __future__ import annotations

from flax import linen as nn

from loopformer.nn.attention import SelfAttention, heads_of
from loopformer.nn.blocks import check_layer, layer_flops
from loopformer.nn.layers import MLP, GatedMLP, RMSNorm
from loopformer.types import KV, Array, Ctx


class PeriNormed(nn.Module):
  """x += n2(attn(n1(x))); x += n4(mlp(n3(x))); `norm` is cloned four times.

  The sum is not normed: over a loop the state would grow, were it not for the norm at the end of Ouro's step.
  """
  attn: SelfAttention
  mlp: MLP | GatedMLP
  norm: nn.Module = RMSNorm(1e-6)
  dtype: str = 'float32'
  layers = 1
  modulated = False

  def setup(self):
    self.n1, self.n2, self.n3, self.n4 = (self.norm.clone(parent=None) for _ in range(4))

  def __call__(self, x: Array, ctx: Ctx, mod: None, kv: KV | None, layer: Array | int = 0) -> tuple[Array, KV | None]:
    """x [B, T, D] -> (x, kv)."""
    branch, kv = self.attn(self.n1(x).astype(self.dtype), ctx, kv, layer)
    x = x + self.n2(branch).astype(x.dtype)
    return x + self.n4(self.mlp(self.n3(x).astype(self.dtype), ctx=ctx)).astype(x.dtype), kv

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width or the positions, or the dtype is none that we know."""
    check_layer(self, width, where)

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""
    return heads_of(self.attn, width)

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token and layer, forward."""
    return layer_flops(self, width, length)
