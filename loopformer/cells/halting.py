"""The halting cell: layers, a norm, and a gate that tells how likely a token is to leave after this step (Ouro)."""
from __future__ import annotations

from flax import linen as nn
import jax.numpy as jnp

from loopformer.blocks import Linear, Normal, RMSNorm, Stack
from loopformer.cells.plain import Plain
from loopformer.types import KV, Array, Ctx

GATE = Linear(1, std=0.0, bias=Normal(0.0))  # starts with lambda = 1/2 for all


class Halting(nn.Module):
  """x = norm(core(x)); aux['halt'] = gate(x), f32[B, T], the logit of lambda (Ouro, section 2).

  The norm ends every step: its output is what the next step, the head and the gate receive. So the head needs none of
  its own, `Head(norm=Identity())`. The gate is float32 whatever the layers' dtype: in bfloat16 a lambda near 1 is 1.
  """
  core: Stack
  norm: nn.Module = RMSNorm(1e-6)
  gate: nn.Module = GATE
  run, injects, check = Plain.run, Plain.injects, Plain.check
  timetable, diagnose = Plain.timetable, Plain.diagnose

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens, gates included."""
    return steps * (self.core.flops(width, length) + 2.0 * width)

  def __call__(self, x: Array, e: Array, ctx: Ctx, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(x, ctx, None, kv)
    x = self.norm(x)
    return x, kv, {'halt': halt_logits(self.gate, x)}


def halt_logits(gate: nn.Module, x: Array) -> Array:
  """[..., D] -> f32[...]; `gate` is bound, or a function of the states."""
  return gate(x.astype(jnp.float32))[..., 0]
