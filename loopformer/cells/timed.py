"""The timed cell: the stack, modulated by where the step stands (LoopFormer section 2; timestep encoding)."""
from __future__ import annotations

from typing import Any

from loopformer.cells.cell import Cell
from loopformer.nn.condition import LoopIndex, Modulation, NoiseTime, StepNumber, Table, Trajectory
from loopformer.nn.stack import Stack
from loopformer.types import KV, Array, ConfigError, Context, Plan


class Timed(Cell):
  """x = core(x; modulation(condition(step))). `condition` is Trajectory (LoopFormer), LoopIndex (tmlt), NoiseTime
  (denoisers), or StepNumber with a Table."""
  core: Stack
  condition: Trajectory | LoopIndex | StepNumber | NoiseTime
  modulation: Modulation | Table

  @property
  def most(self) -> int | None:
    """The most steps of a plan, where each has modulations of its own; None: as many as are asked for."""
    return self.modulation.most

  def check(self, width: int):
    """Raises ConfigError where the parts do not fit each other, or the model's width."""
    if not self.core.block.modulated:
      raise ConfigError(f'model.cell.core.block = {type(self.core.block).__name__} takes no gates and scales, so that '
                        'a modulation would train for nothing; use Block, or a cell without modulation, such as Plain')
    if self.modulation.layers != self.core.applications:
      raise ConfigError(f'model.cell.core.depth = {self.core.depth}, but model.cell.modulation.layers = '
                        f'{self.modulation.layers}; every layer needs its modulation: set both to the same number')
    if self.condition.width != width:
      raise ConfigError(f'model.read_in.width = {width}, but model.cell.condition.width = {self.condition.width}; '
                        'set both to the same number')

  def precompute(self, plan: Plan) -> Array:
    """f32[K, N, 4, D]: the gates and scales of every step and layer."""
    return self.modulation(self.condition(plan))

  def __call__(self, x: Array, e: Array, ctx: Context, kv: KV | None) -> tuple[Array, KV | None, dict]:
    step: Any = ctx.step
    x, kv = self.core(x, ctx, step.precomputed, kv)
    return x, kv, {}
