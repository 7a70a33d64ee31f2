"""The halting cell: a gate around another cell, that tells how likely a token is to leave after this step (Ouro)."""
from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.nn.layers import Linear, Normal
from loopformer.types import Array, Context

GATE = Linear(1, std=0.0, bias=Normal(0.0))  # starts with lambda = 1/2 for all


class Halting(Around):
  """The step of another cell, and aux['halt'] = gate(x), f32[B, T], the logit of lambda (Ouro, section 2).

  Ouro's is Halting(Normed(core, RMSNorm(1e-6))): the norm ends every step, and its output is what the next step, the
  head and the gate receive. The gate is float32 whatever the layers' dtype: in bfloat16 a lambda near 1 is 1.
  """
  gate: nn.Module = GATE

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens, gates included."""
    return self.inner.flops(width, length, steps) + steps * 2.0 * width

  def __call__(self, x: Any, e: Array, ctx: Context, kv: Any) -> tuple[Any, Any, dict]:
    x, kv, aux = self.inner(x, e, ctx, kv)
    return x, kv, {**aux, 'halt': halt_logits(self.gate, self.output(x))}


def halt_logits(gate: nn.Module, x: Array) -> Array:
  """[..., D] -> f32[...]; `gate` is bound, or a function of the states."""
  return gate(x.astype(jnp.float32))[..., 0]
