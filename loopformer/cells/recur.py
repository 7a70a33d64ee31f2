"""The recurrent cell: the input is injected, then the layers run (Parcae, Huginn, looped in-context learning)."""
from __future__ import annotations

from flax import linen as nn

from loopformer.cells.cell import Cell
from loopformer.nn.layers import Identity
from loopformer.nn.stack import Stack
from loopformer.types import KV, Array, Context, Params


class Recur(Cell):
  """x = norm(core(inject(x, e)))."""
  core: Stack
  inject: nn.Module
  norm: nn.Module = Identity()

  @property
  def injects(self) -> bool:
    """Whether a step takes the input in again."""
    return self.inject.injects

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens."""
    return steps * (self.core.flops(width, length) + self.inject.flops(width))

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging, from the cell's parameters."""
    return {'radius': self.inject.radius(params.get('inject', {}))}

  def __call__(self, x: Array, e: Array, ctx: Context, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(self.inject(x, e), ctx, None, kv)
    return self.norm(x), kv, {}
