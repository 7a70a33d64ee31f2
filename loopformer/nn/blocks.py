"""Layers, and the stack of them that a loop applies.

A block is pre-norm: `x += g_a * Attn(norm(x) * (1 + s_a)); x += g_m * MLP(norm(x) * (1 + s_m))`, where the gates g
and scales s are the modulation of the step (LoopFormer section 2), or absent. Matrix products run in `dtype`; norms
and softmax in float32; the residual state keeps the dtype that it came with.
"""
from __future__ import annotations

from flax import linen as nn

from loopformer.nn.attention import SelfAttention, check_attention, heads_of
from loopformer.nn.layers import DTYPES, MLP, GatedMLP, LayerNorm, RMSNorm, gelu_tanh
from loopformer.types import KV, Array, ConfigError, Ctx


def check_layer(layer: nn.Module, width: int, where: str):
  """Raises ConfigError where a layer's attention does not fit the width, or its dtype is none that we know."""
  check_attention(layer.attn, width, where)
  if layer.dtype not in DTYPES:
    raise ConfigError(f'{where}block.dtype = {layer.dtype!r}; use one of {", ".join(DTYPES)}')


def layer_flops(layer: nn.Module, width: int, length: int) -> float:
  """Floating-point operations a token, forward, of a layer of attention and MLP."""
  return layer.attn.flops(width, length) + layer.mlp.flops(width)


class Block(nn.Module):
  """One pre-norm transformer layer; `norm` is cloned for both branches."""
  attn: SelfAttention
  mlp: MLP | GatedMLP
  norm: nn.Module = RMSNorm()
  dtype: str = 'float32'
  layers = 1
  modulated = True  # takes gates and scales

  def setup(self):
    self.norm_attn, self.norm_mlp = self.norm.clone(parent=None), self.norm.clone(parent=None)

  def __call__(self, x: Array, ctx: Ctx, mod: Array | None, kv: KV | None, layer: Array | int = 0):
    """x [B, T, D], mod None or [4, D] (g_a, g_m, s_a, s_m) -> (x, kv)."""
    g_a, g_m, s_a, s_m = (None,) * 4 if mod is None else mod
    branch, kv = self.attn(self._normed(self.norm_attn, x, s_a), ctx, kv, layer, g_a)
    x = x + branch.astype(x.dtype)
    branch = self.mlp(self._normed(self.norm_mlp, x, s_m), g_m, ctx)
    return x + branch.astype(x.dtype), kv

  def _normed(self, norm, x, scale):
    x = norm(x)
    return (x if scale is None else x * (1 + scale).astype(x.dtype)).astype(self.dtype)

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width or the positions, or the dtype is none that we know."""
    check_layer(self, width, where)

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""
    return heads_of(self.attn, width)

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token and layer, forward."""
    return layer_flops(self, width, length)


class Sandwich(nn.Module):
  """A layer with norms around both branches and on both sums (Huginn section 2); `norm` is cloned four times.

  y = n2(x + attn(n1(x))); x = n4(y + mlp(n3(y))): whatever the branches do, a loop ends on a normed state.
  """
  attn: SelfAttention
  mlp: MLP | GatedMLP
  norm: nn.Module = RMSNorm(1e-6)
  dtype: str = 'float32'
  layers = 1
  modulated = False

  def setup(self):
    self.n1, self.n2, self.n3, self.n4 = (self.norm.clone(parent=None) for _ in range(4))

  def __call__(self, x: Array, ctx: Ctx, mod: None, kv: KV | None, layer: Array | int = 0):
    """x [B, T, D] -> (x, kv)."""
    branch, kv = self.attn(self.n1(x).astype(self.dtype), ctx, kv, layer)
    x = self.n2(x + branch.astype(x.dtype))
    return self.n4(x + self.mlp(self.n3(x).astype(self.dtype), ctx=ctx).astype(x.dtype)), kv

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width or the positions, or the dtype is none that we know."""
    check_layer(self, width, where)

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""
    return heads_of(self.attn, width)

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token and layer, forward."""
    return layer_flops(self, width, length)


class Chain(nn.Module):
  """Unlike layers in a row, as one block: a stack of chains alternates between them."""
  blocks: tuple[nn.Module, ...]
  modulated = False  # a cell makes one set of gates and scales for each of a stack's blocks, not for the layers in them

  def __call__(self, x: Array, ctx: Ctx, mod: None, kv: KV | None, layer: Array | int = 0):
    """x [B, T, D] -> (x, kv)."""
    for i, block in enumerate(self.blocks):
      x, kv = block(x, ctx, mod, kv, layer * len(self.blocks) + i)
    return x, kv

  @property
  def layers(self) -> int:
    return len(self.blocks)

  def check(self, width: int, where: str):
    """Raises ConfigError where one of its layers does, or their caches differ."""
    for block in self.blocks:
      block.check(width, where)
    if len({block.heads_of(width) for block in self.blocks}) > 1:
      raise ConfigError(f'{where}the layers of a chain share a cache, and need the same heads and groups')

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""
    return self.blocks[0].heads_of(width)

  @property
  def dtype(self) -> str:
    return self.blocks[0].dtype

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token, forward, of all its layers."""
    return sum(block.flops(width, length) for block in self.blocks)


def gpt2(heads: int, hidden: int, out_std: float) -> Block:
  """A layer of GPT-2: LayerNorms before both branches, biases, GELU by tanh."""
  return Block(attn=SelfAttention(heads=heads, out_std=out_std, biased=('q', 'k', 'v', 'out')),
               mlp=MLP(hidden=hidden, out_std=out_std, activation=gelu_tanh, biased=('up', 'down')), norm=LayerNorm())
