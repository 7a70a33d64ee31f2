"""What terms have in common: which rollouts they read, and what their sums are divided by."""
from __future__ import annotations

from typing import Any

from loopformer.types import Array, Batch


class Term:
  """A term over the rollout `roll`, a field: a mean over tokens by their weights."""
  roll: str

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the rollouts."""
    return (self.roll,)

  def check(self, model: Any):
    """Raises ConfigError where the model does not suit it: never."""

  def weight(self, batch: Batch) -> Array:
    """f32[]: what the sum is divided by."""
    return batch['weights'].sum()


class Taught(Term):
  """A term over two rollouts, `roll` and its `teacher`."""
  teacher: str

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the rollouts."""
    return (self.roll, self.teacher)
