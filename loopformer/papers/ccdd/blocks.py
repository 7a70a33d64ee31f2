"""Layers of CCDD's larger networks: two streams that read each other, and experts."""
from __future__ import annotations

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.nn.blocks import Block
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import MLP, Linear
from loopformer.types import KV, Array, ConfigError, Context


class CrossAttention(nn.Module):
  """Each token of one sequence reads all tokens of another, in both directions, without positions."""
  heads: int
  std: float = 0.02
  out_std: float = 0.02
  kernel: Bidirectional = Bidirectional()

  @nn.compact
  def __call__(self, x: Array, other: Array, seg: Array | None) -> Array:
    """x, other [B, T, D], segments i32[B, T] of both -> [B, T, D]."""
    q, k, v = (Linear(x.shape[-1], self.std, name=name)(of).reshape(*x.shape[:2], self.heads, -1)
               for name, of in (('q', x), ('k', other), ('v', other)))
    return Linear(x.shape[-1], self.out_std, name='out')(self.kernel(q, k, v, seg).reshape(x.shape))

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""
    return 8.0 * width ** 2 + 4.0 * width * length


class TwoStreams(nn.Module):
  """Layers of the two halves of a sequence [B, 2 T, D], each with parameters of its own: x += g_a (A(n) + C(n, m)),
  then x += g_m MLP, where n and m are the normed states of this half and of the other, A the attention within the half
  and C that to the other, both before either changes (MMDiT).

  tokens, latents: the layers, whose attention, MLP and norms are used; to_latents, to_tokens: C of the tokens, and of
  the latents. Both halves have the same gates and scales; in the paper's code each half and C have their own, and
  shifts.
  """
  tokens: Block
  latents: Block
  to_latents: CrossAttention
  to_tokens: CrossAttention
  layers = 1
  modulated, viewed = True, False

  @property
  def dtype(self) -> str:
    return self.tokens.dtype

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width, a layer is causal, or is none that modulations serve."""
    for name, layer in (('tokens', self.tokens), ('latents', self.latents)):
      layer.check(width, f'{where}{name}.')
      if not layer.modulated:
        raise ConfigError(f'{where}{name}.placement = {type(layer.placement).__name__}: its branches take no gates and '
                          'scales; use PreNorm')
    for name in ('to_latents', 'to_tokens'):
      if width % getattr(self, name).heads:
        raise ConfigError(f'{where}{name}.heads = {getattr(self, name).heads}: they do not divide the width {width}')

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d) of the tokens' layer."""
    return self.tokens.heads_of(width)

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token of either half, forward, of sequences of both halves together."""
    half = length / 2
    both = self.tokens.flops(width, half) + self.latents.flops(width, half)
    return (both + self.to_latents.flops(width, half) + self.to_tokens.flops(width, half)) / 2

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mod: Array | None, kv: KV | None,
               layer: Array | int = 0) -> tuple[Array, KV | None]:
    """x [B, 2 T, D] -> (x, kv)."""
    g_a, g_m, s_a, s_m = (None,) * 4 if mod is None else mod
    half = x.shape[1] // 2
    within = dataclasses.replace(ctx, pos=ctx.pos[:, :half], seg=None if ctx.seg is None else ctx.seg[:, :half])
    states, parts = jnp.split(x, 2, 1), (self.tokens, self.latents)
    named = list(zip(('tokens', 'latents'), states, parts, (self.to_latents, self.to_tokens)))
    normed = [_scaled(part.norm.copy(name=f'{name}_norm_attn')(state), s_a, part.dtype)
              for name, state, part, _ in named]
    done = []
    for (name, state, part, cross), own, other in zip(named, normed, reversed(normed)):
      branch = part.attn(own, within, None, layer, g_a)[0] + _gated(cross(own, other, within.seg), g_a)
      state = state + branch.astype(state.dtype)
      read = _scaled(part.norm.copy(name=f'{name}_norm_mlp')(state), s_m, part.dtype)
      done.append(state + part.mlp(read, g_m, ctx).astype(state.dtype))
    return jnp.concatenate(done, 1), kv


def _scaled(x, scale, dtype):
  return (x if scale is None else x * (1 + scale).astype(x.dtype)).astype(dtype)


def _gated(x, gate):
  return x if gate is None else x * gate.astype(x.dtype)


class Experts(nn.Module):
  """In the place of an MLP: sum over experts of their share times what they make, shares the softmax of a linear router
  of which the `top` largest count.

  Shares are not divided by their sum: of one expert that would be 1, whatever the router, which then would not learn
  (so it is in the paper's code). With `top` = `experts` they are a dense mixture. Every expert runs on every token.
  """
  mlp: MLP
  experts: int = 2
  top: int = 2
  std: float = 0.02

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""
    return self.experts * self.mlp.flops(width) + 2.0 * width * self.experts

  @nn.compact
  def __call__(self, x: Array, gate: Array | None = None, ctx: Context | None = None) -> Array:
    """[..., D] -> [..., D]. Raises ConfigError where `top` is not from 1 to `experts`."""
    if not 1 <= self.top <= self.experts:
      raise ConfigError(f'Experts.top = {self.top}: there are {self.experts} experts; set it to 1 to {self.experts}')
    share = jax.nn.softmax(Linear(self.experts, self.std, name='router')(x.astype(jnp.float32)), -1)
    least = jax.lax.top_k(share, self.top)[0][..., -1:]
    share = jnp.where(share >= least, share, 0.0)
    made = nn.vmap(lambda mlp, x: mlp(x, gate, ctx), variable_axes={'params': 0}, split_rngs={'params': True},
                   in_axes=None, axis_size=self.experts)(self.mlp, x)
    return jnp.einsum('...E,E...D->...D', share, made).astype(x.dtype)
