"""Cells of CCDD: another cell's steps on tokens and latents together, with a guess of the clean latents after each.

    MDiT     Summed(of=Timed(...))                      latents are added to the tokens' embeddings
    MoEDiT   Doubled(of=Timed(... mlp=Experts(...)))    one sequence, first the tokens and then the latents
    MMDiT    Doubled(of=Timed(... TwoStreams(...)))     the same, and each half has layers of its own

All steps of one denoising step are given the same latents, and the times of the noise (plans.WithLatents).
"""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.nn.condition import SCALE, ScalarEmbed
from loopformer.nn.layers import LayerNorm, Linear, Normal
from loopformer.papers.ccdd.plans import LATENT_TIME, LATENTS
from loopformer.types import Array, ConfigError, Context, Plan

GUESS = 'latent guess'


def last_guess(aux: Any, active: Array | None) -> Array:
  """f32[B, T, d]: the guess after the last step that ran, of all, active None or bool[K], or of each sequence,
  bool[K, B].
  """
  guesses = aux[GUESS]
  if active is None:
    return guesses[-1]
  last = active.sum(0) - 1
  if last.ndim == 0:
    return guesses[last]
  return jnp.take_along_axis(guesses, jnp.maximum(last, 0)[None, :, None, None], 0)[0]


class AdaFinal(nn.Module):
  """y = (LN(h) (1 + scale(c)) + shift(c)) W: W, scale and shift are zero at the start, so that y is, whatever h."""
  features: int

  @nn.compact
  def __call__(self, h: Array, c: Array) -> Array:
    """h [B, T, D], c f32[B, 1, D'] -> f32[B, T, features]."""
    scale, shift = jnp.split(Linear(2 * h.shape[-1], 0.0, bias=Normal(0.0), name='modulation')(jax.nn.silu(c)), 2, -1)
    h = LayerNorm(name='norm')(h.astype(jnp.float32))
    return Linear(self.features, 0.0, bias=Normal(0.0), name='out')(h * (1 + scale) + shift)


class WithLatents(Around):
  """What both cells share. Under a plan without latents these are 0, and their time too.

  into: makes of latents what the layers see; guess: makes of the state a guess of clean latents, f32[B, T, d], which is
  aux['latent guess'] of every step; clock: embeds the latents' time for both.
  """
  into: AdaFinal
  guess: AdaFinal
  clock: ScalarEmbed = ScalarEmbed(64)

  def check(self, width: int):
    """Raises ConfigError where latents do not come to the model's width, or as of `Around`."""
    if self.into.features != width:
      raise ConfigError(f'model.cell.into.features = {self.into.features}: latents are added to states of {width} '
                        'numbers; set it to that')
    super().check(width)

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens, both ends of latents included.
    """
    return self.inner.flops(width, length, steps) + steps * 4.0 * width * self.guess.features

  def precompute(self, plan: Plan) -> Any:
    """What the inner cell computes, the latents, and the embedding of their time, f32[K, B, 1, D']."""
    latents = plan.rows.get(LATENTS, jnp.zeros((plan.steps, 1, 1, self.guess.features)))
    time = plan.rows.get(LATENT_TIME, jnp.zeros((plan.steps, 1)))
    return self.inner.precompute(plan), latents, self.clock(SCALE * time[..., None])

  def stepped(self, x: Array, e: Array, ctx: Context) -> tuple[Array, Array, Array, Context]:
    """(embedded latents, the same in the first step and else 0, the embedded time, the context of the inner cell)."""
    assert ctx.step is not None
    inner, latents, c = ctx.step.precomputed
    embedded = jnp.broadcast_to(self.into(latents, c), e.shape).astype(e.dtype)
    first = (ctx.step.k == 0).reshape(-1, 1, 1)
    within = dataclasses.replace(ctx, step=dataclasses.replace(ctx.step, precomputed=inner))
    return embedded, jnp.where(first, embedded, 0), c, within


class Summed(WithLatents):
  """Latents are added to the tokens' embeddings, where a loop begins and in its input (MDiT)."""

  def __call__(self, x: Array, e: Array, ctx: Context, kv: Any) -> tuple[Array, Any, dict]:
    embedded, first, c, within = self.stepped(x, e, ctx)
    x, kv, aux = self.inner(x + first, e + embedded, within, kv)
    return x, kv, {**aux, GUESS: self.guess(self.output(x), c)}


class Doubled(WithLatents):
  """Tokens, and after them their latents at the same positions, are one sequence of the state [B, 2 T, D]; the first
  half is read out, the guess is made of the second (MoEDiT, MMDiT). For one pass over all tokens, not for decoding
  token by token.
  """

  def flops(self, width: int, length: int, steps: float) -> float:
    """As of Summed: a token has its latent beside it, and both see both."""
    return 2 * self.inner.flops(width, 2 * length, steps) + steps * 4.0 * width * self.guess.features

  def enter(self, x: Array) -> Array:
    """[B, T, D] -> [B, 2 T, D], latents 0."""
    return jnp.concatenate([x, jnp.zeros_like(x)], 1)

  def output(self, state: Array) -> Array:
    """The tokens' half."""
    return state[:, :state.shape[1] // 2]

  def __call__(self, x: Array, e: Array, ctx: Context, kv: Any) -> tuple[Array, Any, dict]:
    if kv is not None:
      raise ConfigError('model.cell = Doubled: tokens and latents are one sequence, which is no cache\'s; '
                        'run it without one')
    embedded, first, c, within = self.stepped(x, e, ctx)
    twice: Any = {name: jnp.concatenate([value] * 2, 1)
             for name, value in (('pos', ctx.pos), ('seg', ctx.seg)) if value is not None}
    x = x + jnp.concatenate([jnp.zeros_like(first), first], 1)
    x, _, aux = self.inner(x, jnp.concatenate([e, embedded], 1), dataclasses.replace(within, **twice), None)
    return x, None, {**aux, GUESS: self.guess(x[:, x.shape[1] // 2:], c)}
