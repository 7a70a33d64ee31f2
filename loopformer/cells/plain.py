"""The plain cell: a step is the stack, whatever the step (the k(x)L loop; base and base_loop of LoopFormer)."""
from __future__ import annotations

from flax import linen as nn

from loopformer.cells.cell import Cell
from loopformer.nn.stack import Stack
from loopformer.types import KV, Array, Context


class Plain(Cell):
  """x = core(x)."""
  core: Stack

  def __call__(self, x: Array, e: Array, ctx: Context, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(x, ctx, None, kv)
    return x, kv, {}


class Normed(Cell):
  """x = norm(core(x)): the state between steps is normed (Ouro), so that the head needs no norm of its own."""
  core: Stack
  norm: nn.Module

  def __call__(self, x: Array, e: Array, ctx: Context, kv: KV | None) -> tuple[Array, KV | None, dict]:
    x, kv = self.core(x, ctx, None, kv)
    return self.norm(x), kv, {}
