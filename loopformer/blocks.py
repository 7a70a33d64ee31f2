"""Layers, and the stack of them that a loop applies.

A block is pre-norm: `x += g_a * Attn(norm(x) * (1 + s_a)); x += g_m * MLP(norm(x) * (1 + s_m))`, where the gates g
and scales s are the modulation of the step (LoopFormer section 2), or absent. Matrix products run in `dtype`; norms
and softmax in float32; the residual state keeps the dtype that it came with.
"""
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from loopformer import attention, backend, memory, roles
from loopformer.roles import Role
from loopformer.types import KV, Array, ConfigError, Ctx

DTYPES = ('float32', 'bfloat16')
EPSILON = float(jnp.finfo(jnp.float32).eps)  # PyTorch's default for nn.RMSNorm in float32


@dataclasses.dataclass(frozen=True)
class Normal:
  """Initialiser N(0, std^2); a part, where a closure could be neither compared nor saved."""
  std: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return self.std * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class UniformWithin:
  """Initialiser U(-bound, bound)."""
  bound: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -self.bound, self.bound)


@dataclasses.dataclass(frozen=True)
class Orthogonal:
  """Initialiser of matrices [.., I, O] with orthogonal rows or columns and entries of standard deviation `std`."""
  std: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    return nn.initializers.orthogonal(self.std * math.sqrt(max(shape)))(key, shape, dtype)


@jax.custom_vjp
def dense(x: Array, kernel: Array, gain: Array | None = None) -> Array:
  """gain [O] * (x [..., I] @ kernel [I, O]) -> [..., O], accumulated in float32 and returned in the dtype of x.

  The backward pass is written out. It forms the weight's gradient with x as the left operand, whose transpose automatic
  differentiation would form first; and it needs x alone: the gain's gradient is found in the weight's, so the product
  itself is neither saved nor recomputed.
  """
  y = jnp.einsum('...i,io->...o', x, kernel.astype(x.dtype), preferred_element_type=backend.written(x.dtype))
  return (y if gain is None else y * gain).astype(x.dtype)


def turned(x: Array, kernel: Array) -> Array:
  """x [..., I] @ kernel [O, I]^T -> f32[..., O]; of few rows as columns, where the backend wants that (backend.py)."""
  kernel, rows = kernel.astype(x.dtype), x.size // x.shape[-1]
  if not 1 < rows <= backend.current().columns:
    return jnp.einsum('...i,oi->...o', x, kernel, preferred_element_type=jnp.float32)
  y = jnp.einsum('oi,ni->on', kernel, x.reshape(rows, -1), preferred_element_type=jnp.float32)
  return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)  # without it XLA swaps the operands back


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
  dx = jnp.einsum('...o,io->...i', dy, scaled.astype(dy.dtype), preferred_element_type=backend.written(dy.dtype))
  dx = dx.astype(x.dtype)
  return dx, dkernel.astype(kernel.dtype), dgain


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def dense_heads(x: Array, kernel: Array) -> Array:
  """x [B, T, I], kernel [I, H, d] -> [B, T, H, d]; as `dense`, of a kernel whose columns are heads.

  Heads are an axis of the products themselves, forward and backward: the compiler can write them in the layout that
  attention reads.
  """
  return jnp.einsum('BTi,iHd->BTHd', x, kernel.astype(x.dtype),
                    preferred_element_type=backend.written(x.dtype)).astype(x.dtype)


def _dense_heads_backward(saved, dy):
  x, kernel = saved
  dkernel = jnp.einsum('BTi,BTHd->iHd', x, dy, preferred_element_type=jnp.float32)
  dx = jnp.einsum('BTHd,iHd->BTi', dy, kernel.astype(dy.dtype), preferred_element_type=backend.written(dy.dtype))
  return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


dense_heads.defvjp(lambda x, kernel: (dense_heads(x, kernel), (x, kernel)), _dense_heads_backward)


@jax.custom_vjp
def gelu(x: Array) -> Array:
  """Exact GELU, x/2 (1 + erf(x/sqrt 2)); by erf, which is cheaper than the erfc of `jax.nn.gelu`; saves x alone."""
  return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x, dy):
  cdf = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
  density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
  return ((cdf + x * density) * dy,)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def squared_relu(x: Array) -> Array:
  """relu(x)^2 / 2 (Parcae section 2)."""
  return 0.5 * jnp.square(jax.nn.relu(x))


def gelu_tanh(x: Array) -> Array:
  """GELU by tanh, as in GPT-2."""
  return jax.nn.gelu(x, approximate=True)


class Identity(nn.Module):
  """No norm."""

  def __call__(self, x: Array) -> Array:
    return x


class UnitNorm(nn.Module):
  """RMSNorm without a learned scale: x / sqrt(mean(x^2) + eps), in float32."""
  eps: float = EPSILON

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.eps)).astype(x.dtype)


class RMSNorm(nn.Module):
  """RMSNorm with a learned scale, in float32."""
  eps: float = EPSILON

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return (UnitNorm(self.eps)(x.astype(jnp.float32)) * scale).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(variance + eps) * scale + bias, in float32."""
  eps: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    return (UnitNorm(self.eps)(x32 - x32.mean(-1, keepdims=True)) * scale + bias).astype(x.dtype)


class Dense(nn.Module):
  """x W + b: what makes the products of attention and MLP, each of which has a copy of it.

  Others stand in its place as `linear` of attention and MLP (low_rank.py). For decoding the kernel may be given as
  `turned` [O, I] instead (flat.flattened).
  """

  @nn.compact
  def __call__(self, x: Array, features: int, init: Any, ctx: Ctx | None = None, *, bias: Any = None,
               gain: Array | None = None, divided: int | None = None, heads: tuple[int, int] | None = None) -> Any:
    """x [..., I] -> gain * (x W + b) [..., features].

    Args:
      init: draws W [I, features]; bias: draws b, or None for none. ctx: where the step stands, for others than this.
      divided: which axis of W a tensor group divides, -1 (outputs), -2, or None.
      heads: None, or (H, G) where W makes queries, keys and values, of which q [B, T, H, d] and k, v [B, T, G, d] are
        returned. It is laid out [I, G (H/G queries + 1 key + 1 value) d], so that it divides over groups; where the
        backend wants them apart (backend.py), its parts are multiplied each by itself.
    """
    if self.has_variable('params', 'turned'):
      y = turned(x, self.get_variable('params', 'turned'))
      y = (y if gain is None else y * gain).astype(x.dtype)
    else:
      kernel = roles.param(self, 'kernel', init, (x.shape[-1], features), Role(dtype=x.dtype, tensor=divided))
      if heads is not None and backend.current().qkv_apart:
        head = features // (heads[0] + 2 * heads[1])
        q, k, v = (dense_heads(x, part.reshape(x.shape[-1], -1, head)) for part in unfused(kernel, *heads))
        return tuple(checkpoint_name(y, attention.PRODUCT) for y in (q, k, v))
      y = checkpoint_name(dense(x, kernel, gain), attention.PRODUCT)
    if bias is not None:
      role = Role(tensor=-1 if divided == -1 else None)
      bias = roles.param(self, 'bias', bias, (features,), role).astype(y.dtype)
      y += bias if gain is None else bias * gain.astype(y.dtype)
    return y if heads is None else by_heads(y, *heads)


class Linear(nn.Module):
  """Projection of the last axis; kernel [I, O], N(0, std^2) or what `init` draws; a bias where it has an initialiser."""
  features: int
  std: float = 0.02
  bias: Any = None
  init: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Dense(parent=self.scope)(x, self.features, self.init or Normal(self.std), bias=self.bias)


def qkv(attn: nn.Module, x: Array, groups: int, init: Any, ctx: Ctx) -> tuple[Array, Array, Array]:
  """x [B, T, D] -> q [B, T, H, d], k and v [B, T, G, d]: the first products of an attention, inside its `__call__`."""
  outputs = (attn.heads + 2 * groups) * (x.shape[-1] // attn.heads)
  return attn.linear.copy(name='qkv')(x, outputs, init, ctx, divided=-1, heads=(attn.heads, groups))


class ValueEmbed(nn.Module):
  """v + g * E[tokens], g = 2 sigmoid(W_g x[..., :32]) for every key/value head (Parcae section 2); E ~ N(0, 1)."""
  vocab: int
  features: int = 32

  @nn.compact
  def __call__(self, v: Array, x: Array, tokens: Array) -> Array:
    """v [B, T, G, d], x [B, T, D] -> [B, T, G, d]."""
    groups, head = v.shape[2:]
    table = roles.param(self, 'embedding', Normal(1.0), (self.vocab, groups * head), Role(tensor=-2))
    bound = 1 / math.sqrt(self.features)
    weights = self.param('gate', UniformWithin(bound), (self.features, groups))
    gate_BTG = 2 * jax.nn.sigmoid(x[..., :self.features].astype(jnp.float32) @ weights)
    return v + (gate_BTG[..., None] * table[tokens].reshape(v.shape)).astype(v.dtype)


class SelfAttention(nn.Module):
  """Causal self-attention with one kernel for queries, keys and values (`QKV`); grouped when `groups` < `heads`.

  position: where queries and keys learn their places (positions.py), if not from the input. norm_qk: of every query and
  key, after that. biased: which of q, k, v, out have a bias. values: an embedding of tokens that is added to values.
  linear: what makes its products.
  """
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: attention.Kernel = attention.Fused()
  position: Any = None
  norm_qk: nn.Module | None = None
  biased: tuple[str, ...] = ()
  values: ValueEmbed | None = None
  init: Any = None
  out_init: Any = None
  linear: Any = Dense()

  @nn.compact
  def __call__(self, x: Array, ctx: Ctx, kv: KV | None, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, KV | None]:
    width = x.shape[-1]
    check_attention(self, width, '')
    groups, _ = heads_of(self, width)
    q, k, v = qkv(self, x, groups, self.init or Normal(self.std), ctx)
    q, k, v = self._biased('q', q), self._biased('k', k), self._biased('v', v)
    if self.position is not None:
      q, k = self.position.turn(q, ctx.pos), self.position.turn(k, ctx.pos)
    if self.norm_qk is not None:
      q, k = self.norm_qk(q), self.norm_qk(k)
    if self.values is not None:
      v = self.values(v, x, ctx.tokens)
    out, kv = attended(self, q, k, v, ctx, kv, layer)
    bias = Normal(0.0) if 'out' in self.biased else None
    return self.linear.copy(name='out')(out, width, self.out_init or Normal(self.out_std), ctx, bias=bias, gain=gate,
                                        divided=-2), kv

  def _biased(self, name, x):
    if name not in self.biased:
      return x
    bias = roles.param(self, f'{name}_bias', nn.initializers.zeros, x.shape[2:], Role(decayed=False))  # [heads, d]
    return x + bias.astype(x.dtype)

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token, forward."""
    return attention_flops(self, width, length)


def check_heads(heads: int, groups: int, width: int, where: str = ''):
  """Raises ConfigError where heads do not divide the width, or groups the heads."""
  if heads < 1 or width % heads:
    raise ConfigError(f'{where}heads = {heads} does not divide the width {width}; choose a divisor of the width')
  if groups < 1 or heads % groups:
    raise ConfigError(f'{where}groups = {groups} does not divide heads = {heads}; choose a divisor of the heads')


def heads_of(attn: nn.Module, width: int) -> tuple[int, int]:
  """(G, d): heads of keys and values, and their width."""
  return attn.groups or attn.heads, width // attn.heads


def check_attention(attn: nn.Module, width: int, where: str):
  """Raises ConfigError where heads do not divide the width, or groups the heads, or positions do not suit the heads."""
  check_heads(attn.heads, attn.groups or attn.heads, width, where)
  if attn.position is not None:
    attn.position.check(attn.heads, width, where)


def attended(attn: nn.Module, q: Array, k: Array, v: Array, ctx: Ctx, kv: KV | None,
             layer: Array | int) -> tuple[Array, KV | None]:
  """What queries [B, T, H, d] read of keys and values [B, T, G, d], and of those in the cache: ([B, T, H d], kv)."""
  shape, pos_BS = q.shape, ctx.pos
  if kv is not None:
    attention.check_causal(attn.kernel.causal, 'cache')
    kv, k, v, pos_BS = ctx.memory.exchange(kv, ctx, layer, k, v)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
  if attn.position is not None:
    q, k, v = attn.position.extend(q, k, v, pos_BS, 2 if kv is None else 1)
  if kv is None:
    out = attn.kernel(q, k, v, ctx.seg)
  else:
    out = attention.read(q, k, v, memory.visible(kv, pos_BS, ctx))
  return out[..., :shape[-1]].reshape(*shape[:2], -1), kv


def attention_flops(attn: nn.Module, width: int, length: int) -> float:
  """Floating-point operations a token, forward; causal attention over `length` tokens on average half."""
  groups, head = heads_of(attn, width)
  return 2.0 * width * (2 * width + 2 * groups * head) + 4.0 * width * (length + 1) / 2


def unfused(qkv: Array, heads: int, groups: int) -> tuple[Array, Array, Array]:
  """Queries, keys and values of a fused projection, [..., G (H/G queries + key + value) d], in three.

  Returns:
    q [..., G, H/G, d], k and v [..., G, 1, d]; the transpose of it is one concatenation.
  """
  each = heads // groups
  q, k, v = jnp.split(qkv.reshape(*qkv.shape[:-1], groups, each + 2, -1), [each, each + 1], -2)
  return q, k, v


def by_heads(y: Array, heads: int, groups: int) -> tuple[Array, Array, Array]:
  """A fused projection [..., G (H/G queries + key + value) d] -> q [..., H, d], k and v [..., G, d]."""
  q, k, v = unfused(y, heads, groups)
  return q.reshape(*y.shape[:-1], heads, -1), k.squeeze(-2), v.squeeze(-2)


def unfused_kernel(kernel: Array, heads: int, groups: int, given: str) -> tuple[Array, Array, Array]:
  """The kernel [..., D, outputs] of a fused projection in three, as `unfused`.

  Raises:
    ConfigError: it is not that of attention with so many heads and groups, which the message calls `given`.
  """
  width, outputs = kernel.shape[-2:]
  if heads % groups or width % heads or outputs * heads != width * (heads + 2 * groups):
    raise ConfigError(f'{given} do not fit the projection {kernel.shape}; give those of the model\'s attention')
  return unfused(kernel, heads, groups)


class MLP(nn.Module):
  """D -> F -> D. biased: which of up, down have a bias. linear: what makes its products."""
  hidden: int
  std: float = 0.02
  out_std: float = 0.02
  activation: Callable[[Array], Array] = gelu
  biased: tuple[str, ...] = ()
  init: Any = None
  out_init: Any = None
  linear: Any = Dense()

  @nn.compact
  def __call__(self, x: Array, gate: Array | None = None, ctx: Ctx | None = None) -> Array:
    up, down = (Normal(0.0) if name in self.biased else None for name in ('up', 'down'))
    hidden = self.activation(self.linear.copy(name='up')(
        x, self.hidden, self.init or Normal(self.std), ctx, bias=up, divided=-1))
    return self.linear.copy(name='down')(hidden, x.shape[-1], self.out_init or Normal(self.out_std), ctx, bias=down,
                                         gain=gate, divided=-2)

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width * self.hidden


class GatedMLP(nn.Module):
  """down(silu(gate(x)) * up(x)), gate and up one matrix [D, 2, F] (SwiGLU). linear: what makes its products."""
  hidden: int
  std: float = 0.02
  up_std: float | None = None
  out_std: float = 0.02
  activation: Callable[[Array], Array] = jax.nn.silu
  linear: Any = Dense()

  @nn.compact
  def __call__(self, x: Array, gate: Array | None = None, ctx: Ctx | None = None) -> Array:
    init = Halves(self.std, self.std if self.up_std is None else self.up_std)
    both = self.linear.copy(name='up')(x, 2 * self.hidden, init, ctx, divided=-1)
    hidden = self.activation(both[..., :self.hidden]) * both[..., self.hidden:]
    return self.linear.copy(name='down')(hidden, x.shape[-1], Normal(self.out_std), ctx, gain=gate, divided=-2)

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return 6.0 * width * self.hidden


@dataclasses.dataclass(frozen=True)
class Halves:
  """Initialiser of a matrix whose first and second half of columns have standard deviations of their own."""
  first: float
  second: float

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    half = shape[-1] // 2
    return jax.random.normal(key, shape, dtype) * jnp.where(jnp.arange(shape[-1]) < half, self.first, self.second)


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


def unrolls(layers: int) -> bool:
  """Whether so many layers of a stack are written out and not scanned when there is no cache (backend.py)."""
  return layers <= backend.current().unrolled


def layer_of(which: int | Array, tree: Any) -> Any:
  """Row `which`, or rows, of every array in a tree of arrays [N, ...]; None has none."""
  return jax.tree.map(lambda leaf: leaf[which], tree)


class Stack(nn.Module):
  """`depth` blocks with parameters of their own, stacked [N, ...] and, but for few (`unrolls`), scanned: compile time
  does not grow with N.

  order: which block runs when, if not each once from the first to the last: (0, 0, 1) applies the first twice. norm: of
  what leaves the stack.
  """
  block: Block | Sandwich | Chain
  depth: int
  order: tuple[int, ...] | None = None
  norm: nn.Module | None = None

  @nn.compact
  def __call__(self, x: Array, ctx: Ctx, mods: Any, kv: KV | None) -> tuple[Array, KV | None]:
    """x [B, T, D] -> (x, kv). mods: what each application is given, a tree of arrays [applications, ...] or None."""

    def layer(block, carry, row):
      x, kv = carry
      index, mod = row
      return block(x, ctx, mod, kv, index), None

    roles.stacked(self, 'block')
    # The cache is carried, not scanned over: as a scanned input and output it would be copied whole each time.
    layer = ctx.remat.layer(layer) if ctx.remat else layer
    order = tuple(range(self.depth)) if self.order is None else self.order
    if kv is None and not self.is_initializing() and unrolls(len(order)):
      for index, which in enumerate(order):
        own = nn.map_variables(layer, 'params', trans_in_fn=functools.partial(layer_of, which))
        (x, kv), _ = own(self.block, (x, kv), (index, layer_of(index, mods)))
      return x if self.norm is None else self.norm(x), kv
    scan = functools.partial(nn.scan, layer, variable_axes={'params': 0}, split_rngs={'params': True})
    if self.order is None:
      (x, kv), _ = scan(length=self.depth)(self.block, (x, kv), (jnp.arange(self.depth), mods))
    elif self.is_initializing():  # each block once, whatever runs when
      some = layer_of(jnp.zeros(self.depth, jnp.int32), mods)
      (x, kv), _ = scan(length=self.depth)(self.block, (x, kv), (jnp.arange(self.depth), some))
    else:
      ordered = nn.map_variables(scan(length=len(order)), 'params',
                                 trans_in_fn=functools.partial(layer_of, jnp.asarray(order)))
      (x, kv), _ = ordered(self.block, (x, kv), (jnp.arange(len(order)), mods))
    return (x if self.norm is None else self.norm(x)), kv

  @property
  def applications(self) -> int:
    """Layers that run, and so the slots of keys and values."""
    return self.block.layers * (self.depth if self.order is None else len(self.order))

  def flops(self, width: int, length: int) -> float:
    """Floating-point operations a token, forward, of one application."""
    return self.applications / self.block.layers * self.block.flops(width, length)


def repeated(times: tuple[int, ...]) -> tuple[int, ...]:
  """The order in which layer l runs times[l] times in place (intra-layer recurrence): (2, 1) -> (0, 0, 1).

  Raises:
    ConfigError: no layers, or a count that is not a positive integer.
  """
  if not times or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in times):
    raise ConfigError(f'repeats = {times}: give a positive whole number for every layer, such as (4, 2, 1, 1)')
  return tuple(layer for layer, n in enumerate(times) for _ in range(n))


def gpt2(heads: int, hidden: int, out_std: float) -> Block:
  """A layer of GPT-2: LayerNorms before both branches, biases, GELU by tanh."""
  return Block(attn=SelfAttention(heads=heads, out_std=out_std, biased=('q', 'k', 'v', 'out')),
               mlp=MLP(hidden=hidden, out_std=out_std, activation=gelu_tanh, biased=('up', 'down')), norm=LayerNorm())
