"""Self-attention, and what attentions have in common."""
from __future__ import annotations

import math
from typing import Any, Callable

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import memories, roles
from loopformer.nn import kernels
from loopformer.nn.layers import Dense, Normal, UniformWithin
from loopformer.roles import Role
from loopformer.types import INTERMEDIATES, KV, Array, ConfigError, Context

TOLD = 'attention'


def qkv(attn: nn.Module, x: Array, groups: int, init: Any, ctx: Context) -> tuple[Array, Array, Array]:
  """x [B, T, D] -> q [B, T, H, d], k and v [B, T, G, d]: the first products of an attention, inside its `__call__`."""
  outputs = (attn.heads + 2 * groups) * heads_of(attn, x.shape[-1])[1]
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

  norm: of queries and of keys, each a clone of it, before they learn their places (Qwen3). position: where they learn
  these (positions.py), if not from the input. norm_qk: one for both, after that; with a learned scale, which positions
  would mix within pairs, that is another function. biased: which of q, k, v, out have a bias. values: an embedding of
  tokens that is added to values.
  linear: what makes its products. head: the width of a head, if it is not the layer's divided by `heads` (Qwen3).
  """
  heads: int
  groups: int | None = None
  std: float = 0.02
  out_std: float = 0.02
  kernel: kernels.Kernel = kernels.Fused()
  position: Any = None
  norm_qk: nn.Module | None = None
  biased: tuple[str, ...] = ()
  values: ValueEmbed | None = None
  init: Any = None
  out_init: Any = None
  linear: Any = Dense()
  norm: nn.Module | None = None
  head: int | None = None

  @nn.compact
  def __call__(self, x: Array, ctx: Context, kv: KV | None, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, KV | None]:
    width = x.shape[-1]
    check_attention(self, width, '')
    groups, _ = heads_of(self, width)
    q, k, v = qkv(self, x, groups, self.init or Normal(self.std), ctx)
    q, k, v = self._biased('q', q), self._biased('k', k), self._biased('v', v)
    if self.norm is not None:
      q, k = self.norm.copy(name='norm_q')(q), self.norm.copy(name='norm_k')(k)
    if self.position is not None:
      q, k = self.position.rotate(q, ctx.pos), self.position.rotate(k, ctx.pos)
    if self.norm_qk is not None:
      q, k = self.norm_qk(q), self.norm_qk(k)
    if self.values is not None:
      v = self.values(v, x, ctx.ids('attn.values = ValueEmbed'))
    out, kv = attended(self, q, k, v, ctx, kv, layer)
    bias = Normal(0.0) if 'out' in self.biased else None
    return self.linear.copy(name='out')(out, width, self.out_init or Normal(self.out_std), ctx, bias=bias, gain=gate,
                                        divided=-2), kv

  def _biased(self, name, x):
    if name not in self.biased:
      return x
    role = Role(decayed=False, group='qk_bias' if name in ('q', 'k') else '')  # one tensor in Huginn's code
    bias = roles.param(self, f'{name}_bias', nn.initializers.zeros, x.shape[2:], role)  # [heads, d]
    return x + bias.astype(x.dtype)

  def flops(self, width: int, length: float) -> float:
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
  return attn.groups or attn.heads, attn.head or width // attn.heads


def check_attention(attn: nn.Module, width: int, where: str):
  """Raises ConfigError where heads without a width of their own do not divide the layer's, or groups the heads, or
  positions do not suit the heads."""
  groups, head = heads_of(attn, width)
  check_heads(attn.heads, groups, width if attn.head is None else attn.heads * head, where)
  if attn.position is not None:
    attn.position.check(attn.heads, attn.heads * head, where)


def attended(attn: nn.Module, q: Array, k: Array, v: Array, ctx: Context, kv: KV | None,
             layer: Array | int) -> tuple[Array, KV | None]:
  """What queries [B, T, H, d] read of keys and values [B, T, G, d], and of those in the cache: ([B, T, H d], kv)."""
  shape, pos_BS = q.shape, ctx.pos
  if kv is not None:
    kernels.check_causal(attn.kernel.causal, 'cache')
    kv, k, v, pos_BS = ctx.memory.update(kv, ctx, layer, k, v)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
  if attn.position is not None:
    q, k, v = attn.position.augment_qk(q, k, v, pos_BS, 2 if kv is None else 1)
  if kv is None:
    out = attn.kernel(q, k, v, ctx.seg)
    tell(attn, ctx, layer, lambda: attn.kernel.weights(q, k, ctx.seg))
  else:
    mask = memories.visible(kv, pos_BS, ctx)
    out = kernels.read(q, k, v, mask)
    tell(attn, ctx, layer, lambda: kernels.weights(q, k.swapaxes(1, 2), mask))
  return out[..., :shape[-1]].reshape(*shape[:2], -1), kv


def tell(attn: nn.Module, ctx: Context, layer: Array | int, weights: Callable[[], Array]):
  """Leaves (step, layer, entropy f32[B, H, T] in nats) of an attention in a loop in Linen's `intermediates`, as TOLD,
  where these are asked for; weights: () -> f32[B, H, T, S], what queries give to keys, with sum one."""
  if ctx.step is not None and attn.is_mutable_collection(INTERMEDIATES):
    given = weights()
    entropy = -jnp.where(given > 0, given * jnp.log(jnp.where(given > 0, given, 1)), 0).sum(-1)
    attn.sow(INTERMEDIATES, TOLD, (jnp.asarray(ctx.step.k), jnp.asarray(layer), entropy))


def attention_flops(attn: nn.Module, width: int, length: float) -> float:
  """Floating-point operations a token, forward; causal attention reads on average half of `length` tokens."""
  groups, head = heads_of(attn, width)
  inner = attn.heads * head
  read = (length + 1) / 2 if attn.kernel.causal else length
  return 2.0 * width * (2 * inner + 2 * groups * head) + 4.0 * inner * read
