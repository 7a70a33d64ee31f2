"""Damped cells: a part of another cell's step, so that layers that were trained to run once can run again."""
from __future__ import annotations

from typing import Any

import jax

from loopformer.cells.cell import Around
from loopformer.types import Array, Context, real


class Damped(Around):
  """x + share (M(x) - x), where M is the step of the cell `of`, in every leaf of the state.

  With a share of one it is M. Without training of its own it makes a plain decoder loop over its middle layers. Steps
  of a share a go as far as one whole step does after about 1 / a of them, where M(x) - x does not turn.
  """
  share: float = 0.5

  def check(self, width: int):
    """Raises ConfigError where the share is none, or as of `Around`."""
    real('model.cell.share', self.share, '(0, 1]')
    super().check(width)

  def __call__(self, x: Any, e: Array, ctx: Context, kv: Any) -> tuple[Any, Any, dict]:
    new, kv, aux = self.inner(x, e, ctx, kv)
    return jax.tree.map(lambda old, new: old + self.share * (new - old), x, new), kv, aux
