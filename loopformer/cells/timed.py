"""The timed cell: the stack, modulated by where the step stands (LoopFormer section 2; timestep encoding)."""
from __future__ import annotations

from flax import linen as nn

from loopformer.blocks import Stack
from loopformer.condition import LoopIndex, Modulation, Trajectory
from loopformer.types import KV, Array, Ctx, Plan


class Timed(nn.Module):
  """x = core(x; modulation(condition(step))). `condition` is Trajectory (LoopFormer) or LoopIndex (tmlt)."""
  core: Stack
  condition: Trajectory | LoopIndex
  modulation: Modulation

  def timetable(self, plan: Plan) -> Array:
    """f32[K, N, 4, D]: the gates and scales of every step and layer."""
    return self.modulation(self.condition(plan))

  def __call__(self, x: Array, e: Array, ctx: Ctx, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(x, ctx, ctx.tick.code, kv)
    return x, kv, {}
