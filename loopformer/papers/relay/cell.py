"""The cell of RELAY: a second head, that shows a round of the solution after every step."""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.nn.layers import Linear, RMSNorm
from loopformer.papers.relay.plans import ROUNDS, WEIGHTS
from loopformer.types import Array, Context, Plan

LOSS, SHOWN = 'round loss', 'round'


class RoundHead(nn.Module):
  """logits = norm(x) W: f32[B, T, D] -> f32[B, T, outputs]."""
  outputs: int
  norm: nn.Module = RMSNorm()
  std: float = 0.02

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return Linear(self.outputs, self.std, name='kernel')(self.norm(x.astype(jnp.float32)))


class Showing(Around):
  """The step of another cell, and what `head` makes of the state that it gives (RELAY, section 3.1).

  Under a plan that knows its rounds (plans.RoundByRound) aux['round loss'] f32[B] is the cross-entropy of the step's
  round, a sum by the weights of its tokens. It is taken inside the loop, so that logits of several steps never exist
  together. Under other plans aux['round'] i32[B, T] are the likeliest tokens.
  """
  head: RoundHead

  def precompute(self, plan: Plan) -> Any:
    """What the inner cell computes, and the rounds, where the plan has them."""
    inner = self.inner.precompute(plan)
    rounds = {name: plan.rows[name] for name in (ROUNDS, WEIGHTS) if name in plan.rows}
    return (inner, rounds) if rounds or inner is not None else None

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens, the head's included."""
    return self.inner.flops(width, length, steps) + steps * 2.0 * width * self.head.outputs

  def __call__(self, x: Any, e: Array, ctx: Context, kv: Any) -> tuple[Any, Any, dict]:
    assert ctx.step is not None
    inner, rounds = (None, {}) if ctx.step.precomputed is None else ctx.step.precomputed
    x, kv, aux = self.inner(x, e, dataclasses.replace(ctx, step=dataclasses.replace(ctx.step, precomputed=inner)), kv)
    logits = self.head(self.output(x))
    if not rounds:
      return x, kv, {**aux, SHOWN: logits.argmax(-1).astype(jnp.int32)}
    own = jnp.take_along_axis(logits, rounds[ROUNDS][..., None], -1)[..., 0]
    nll = jax.nn.logsumexp(logits, -1) - own
    return x, kv, {**aux, LOSS: (nll * rounds[WEIGHTS]).sum(-1)}
