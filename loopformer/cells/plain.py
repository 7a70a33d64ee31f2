"""The plain cell: a step is the stack, whatever the step (the k(x)L loop; base and base_loop of LoopFormer)."""
from __future__ import annotations

from flax import linen as nn

from loopformer import loop
from loopformer.blocks import Stack
from loopformer.types import KV, Array, Ctx, Params, Plan


class Plain(nn.Module):
  """x = core(x)."""
  core: Stack
  run = loop.run

  @property
  def injects(self) -> bool:
    """Whether a step takes the input in again."""
    return False

  def check(self, width: int):
    """Nothing: its one part takes any width."""

  def timetable(self, plan: Plan) -> None:
    """Nothing: the step does not depend on the schedule."""
    return None

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens."""
    return steps * self.core.flops(width, length)

  def diagnose(self, params: Params) -> dict[str, float]:
    """Nothing."""
    return {}

  def __call__(self, x: Array, e: Array, ctx: Ctx, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(x, ctx, None, kv)
    return x, kv, {}
