"""Products, norms and feed-forward layers."""
from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from loopformer import backend, roles
from loopformer.nn import kernels
from loopformer.roles import Role
from loopformer.types import Array, ConfigError, Context

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


@dataclasses.dataclass(frozen=True)
class ByProjection:
  """Initialiser of the kernel [.., D, outputs] of a fused projection (`unfused`): its queries, keys and values are
  drawn by `of` as matrices of their own."""
  of: Any
  heads: int
  groups: int

  def __call__(self, key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    *lead, outputs = shape
    head, counts = outputs // (self.heads + 2 * self.groups), (self.heads, self.groups, self.groups)
    drawn = [self.of(own, (*lead, count * head), dtype).reshape(*lead, self.groups, count // self.groups, head)
             for own, count in zip(jax.random.split(key, 3), counts)]
    return jnp.concatenate(drawn, -2).reshape(shape)


@jax.custom_vjp
def dense(x: Array, kernel: Array, gain: Array | None = None) -> Array:
  """gain [O] * (x [..., I] @ kernel [I, O]) -> [..., O], accumulated in float32 and returned in the dtype of x.

  The backward pass is written out. It forms the weight's gradient with x as the left operand, whose transpose automatic
  differentiation would form first; and it needs x alone: the gain's gradient is found in the weight's, so the product
  itself is neither saved nor recomputed.
  """
  y = jnp.einsum('...i,io->...o', x, kernel.astype(x.dtype), preferred_element_type=backend.written(x.dtype))
  return (y if gain is None else y * gain).astype(x.dtype)


def transposed(x: Array, kernel: Array) -> Array:
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


class AcrossHeads(nn.Module):
  """A norm of all heads of a token together, [..., H, d] as [..., H d] (queries and keys of OLMo 2)."""
  of: nn.Module = RMSNorm()

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # In the scope of this module: its scale lies where it would without it.
    return self.of.copy(parent=self.scope)(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


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
  `transposed` [O, I] instead (flat.flattened).
  """

  @nn.compact
  def __call__(self, x: Array, features: int, init: Any, ctx: Context | None = None, *, bias: Any = None,
               gain: Array | None = None, divided: int | None = None, heads: tuple[int, int] | None = None) -> Any:
    """x [..., I] -> gain * (x W + b) [..., features].

    Args:
      init: draws W [I, features]; bias: draws b, or None for none. ctx: where the step stands, for others than this.
      gain: [features], or of sequences or tokens, [B, 1 or T, features].
      divided: which axis of W a tensor group divides, -1 (outputs), -2, or None.
      heads: None, or (H, G) where W makes queries, keys and values, of which q [B, T, H, d] and k, v [B, T, G, d] are
        returned. It is laid out [I, G (H/G queries + 1 key + 1 value) d], so that it divides over groups; where the
        backend wants them apart (backend.py), its parts are multiplied each by itself.
    """
    if self.has_variable('params', 'transposed'):
      y = transposed(x, self.get_variable('params', 'transposed'))
      y = (y if gain is None else y * gain).astype(x.dtype)
    else:
      kernel = roles.param(self, 'kernel', init, (x.shape[-1], features), Role(dtype=x.dtype, tensor=divided))
      if heads is not None and backend.current().qkv_apart:
        head = features // (heads[0] + 2 * heads[1])
        q, k, v = (dense_heads(x, part.reshape(x.shape[-1], -1, head)) for part in unfused(kernel, *heads))
        return tuple(checkpoint_name(y, kernels.PRODUCT) for y in (q, k, v))
      of_weights = gain is not None and gain.ndim == 1
      y = checkpoint_name(dense(x, kernel, gain if of_weights else None), kernels.PRODUCT)
      y = y if gain is None or of_weights else (y * gain).astype(x.dtype)
    if bias is not None:
      role = Role(tensor=-1 if divided == -1 else None)
      bias = roles.param(self, 'bias', bias, (features,), role).astype(y.dtype)
      y += bias if gain is None else bias * gain.astype(y.dtype)
    return y if heads is None else by_heads(y, *heads)


class Linear(nn.Module):
  """Projection of the last axis; kernel [I, O], N(0, std^2) or what `init` draws; a bias where it has an initialiser.
  """
  features: int
  std: float = 0.02
  bias: Any = None
  init: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    own: Any = self.scope  # Linen takes a scope for a parent too
    return Dense(parent=own)(x, self.features, self.init or Normal(self.std), bias=self.bias)


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
    raise ConfigError(f'{given} do not fit the projection {kernel.shape}; give those of the model\'s attention, or '
                      'leave them out where its heads have a width of their own (head)')
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
  def __call__(self, x: Array, gate: Array | None = None, ctx: Context | None = None) -> Array:
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
  def __call__(self, x: Array, gate: Array | None = None, ctx: Context | None = None) -> Array:
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
