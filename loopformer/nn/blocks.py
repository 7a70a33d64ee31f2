"""The layers that stacks are made of.

A block is pre-norm if nothing else is said: `x += g_a * Attn(norm(x) * (1 + s_a)); x += g_m * MLP(norm(x) * (1 +
s_m))`, where the gates g and scales s are the modulation of the step (LoopFormer section 2), or absent. Matrix products
run in `dtype`; norms and softmax in float32; the residual state keeps the dtype that it came with.
"""
from __future__ import annotations

from typing import Any, Callable

from flax import linen as nn
import jax.numpy as jnp

from loopformer.nn.attention import SelfAttention, check_attention, heads_of
from loopformer.nn.layers import DTYPES, MLP, Identity, LayerNorm, RMSNorm, gelu_tanh
from loopformer.types import GIVEN, KV, Array, ConfigError, Context, config_dataclass


def check_layer(layer: nn.Module, width: int, where: str):
  """Raises ConfigError where a layer's attention does not fit the width, or its dtype is none that we know."""
  check_attention(layer.attn, width, where)
  if layer.dtype not in DTYPES:
    raise ConfigError(f'{where}block.dtype = {layer.dtype!r}; use one of {", ".join(DTYPES)}')


def layer_flops(layer: nn.Module, width: int, length: float) -> float:
  """Floating-point operations a token, forward, of a layer of attention and MLP."""
  return layer.attn.flops(width, length) + layer.mlp.flops(width)


class Layer(nn.Module):
  """A layer with fields `attn`, `mlp` and `dtype`: what it answers whatever it makes of the two."""
  layers = 1
  viewed = False

  @property
  def modulated(self) -> bool:
    """Whether it takes gates and scales from the cell."""
    return False

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width or the positions, or the dtype is none that we know."""
    check_layer(self, width, where)

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""
    return heads_of(self.attn, width)

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""
    return layer_flops(self, width, length)


@config_dataclass
class PreNorm:
  """x + branch(n(x)); the branch may have gates and scales."""
  modulated, norms = True, (('norm_attn',), ('norm_mlp',))

  def join(self, x: Array, branch: Array) -> Array:
    """The state [B, T, D] after a branch, from the one before and what the branch made of its norm."""
    return x + branch.astype(x.dtype)


@config_dataclass
class SandwichNorm:
  """m(x + branch(n(x))): whatever the branches do, a loop ends on a normed state (Huginn section 2)."""
  modulated, norms = False, (('n1', 'n2'), ('n3', 'n4'))

  def join(self, x: Array, branch: Array, norm: Callable[[Array], Array]) -> Array:
    """As PreNorm."""
    return norm(x + branch.astype(x.dtype))


@config_dataclass
class PeriNorm:
  """x + m(branch(n(x))) (Ouro, section 2; known as Peri-LN).

  The sum is not normed: over a loop the state would grow, were it not for the norm at the end of Ouro's step.
  """
  modulated, norms = False, (('n1', 'n2'), ('n3', 'n4'))

  def join(self, x: Array, branch: Array, norm: Callable[[Array], Array]) -> Array:
    """As PreNorm."""
    return x + norm(branch).astype(x.dtype)


@config_dataclass
class PostNorm:
  """x + m(branch(x)) (OLMo 2): branches read the state as it is, and what they give is normed."""
  modulated, norms = False, ((None, 'n2'), (None, 'n4'))

  def join(self, x: Array, branch: Array, norm: Callable[[Array], Array]) -> Array:
    """As PreNorm."""
    return x + norm(branch).astype(x.dtype)


class Block(Layer):
  """One transformer layer; `placement` says where its norms stand, each of which is a clone of `norm`."""
  attn: Any
  mlp: Any
  norm: nn.Module = RMSNorm()
  dtype: str = 'float32'
  placement: PreNorm | SandwichNorm | PeriNorm | PostNorm = PreNorm()

  @property
  def modulated(self) -> bool:
    return self.placement.modulated

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mod: Array | None, kv: KV | None, layer: Array | int = 0):
    """x [B, T, D], mod None or [4, D] (g_a, g_m, s_a, s_m) -> (x, kv)."""
    g_a, g_m, s_a, s_m = (None,) * 4 if mod is None else mod
    (norm_a, *after_a), (norm_m, *after_m) = (
        [Identity() if name is None else self.norm.copy(name=name) for name in names] for names in self.placement.norms)
    branch, kv = self.attn(self._scaled(norm_a(x), s_a), ctx, kv, layer, g_a)
    if self.is_mutable_collection(GIVEN) and not self.is_initializing():
      self.sow(GIVEN, 'attention', (jnp.asarray(layer), branch))
    x = self.placement.join(x, branch, *after_a)
    return self.placement.join(x, self.mlp(self._scaled(norm_m(x), s_m), g_m, ctx), *after_m), kv

  def _scaled(self, x, scale):
    return (x if scale is None else x * (1 + scale).astype(x.dtype)).astype(self.dtype)


class Chain(nn.Module):
  """Unlike layers in a row, as one block: a stack of chains alternates between them."""
  blocks: tuple[nn.Module, ...]
  modulated = False  # a cell makes one set of gates and scales for each of a stack's blocks, not for the layers in them
  viewed = False

  def __call__(self, x: Array, ctx: Context, mod: None, kv: KV | None, layer: Array | int = 0):
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

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward, of all its layers."""
    return sum(block.flops(width, length) for block in self.blocks)


def gpt2(heads: int, hidden: int, out_std: float) -> Block:
  """A layer of GPT-2: LayerNorms before both branches, biases, GELU by tanh."""
  return Block(attn=SelfAttention(heads=heads, out_std=out_std, biased=('q', 'k', 'v', 'out')),
               mlp=MLP(hidden=hidden, out_std=out_std, activation=gelu_tanh, biased=('up', 'down')), norm=LayerNorm())
