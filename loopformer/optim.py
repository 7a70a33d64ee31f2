"""Optimisers: frozen parts that make an optax transformation for a run of so many steps."""
from __future__ import annotations

from typing import Any

import jax
import optax

from loopformer.types import ConfigError, part

DECAYED = ('kernel', 'embedding', 'positions')


@part
class WarmupCosine:
  """Linear warm-up to `peak` in `warmup` steps, then a cosine to `end` at the last step of the run."""
  peak: float = 6e-4
  end: float = 6e-5
  warmup: int = 2000

  def make(self, steps: int) -> optax.Schedule:
    """The learning rate by step. Raises ConfigError where the run is not longer than its warm-up."""
    if self.warmup >= steps:
      raise ConfigError(f'optim.schedule.warmup = {self.warmup} is not below train.steps = {steps}; '
                        'lower the warm-up or train longer')
    return optax.warmup_cosine_decay_schedule(self.peak / (self.warmup + 1), self.peak, self.warmup, steps, self.end)


@part
class AdamW:
  """AdamW with global-norm clipping; weight decay on matrices and embeddings alone (LoopFormer section 3).

  Matrices are told by the name of the parameter, not by the number of its axes: stacked layers give a norm's scale
  two axes.
  """
  schedule: WarmupCosine = WarmupCosine()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  decay: float = 0.2
  clip: float = 1.0

  def make(self, steps: int) -> optax.GradientTransformation:
    """The transformation for a run of `steps`."""
    return optax.chain(
        optax.clip_by_global_norm(self.clip),
        optax.adamw(self.schedule.make(steps), self.b1, self.b2, self.eps, weight_decay=self.decay, mask=decay_mask))


def decay_mask(params: Any) -> Any:
  """True for the parameters that weight decay acts on."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)
