"""Plans that lead from rows of every loop to shared ones (MELT, section 4)."""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from loopformer.plans import Around
from loopformer.types import ConfigError, Plan, PlanContext, Planner, config_dataclass

BLEND = 'blend'  # of a plan's rows: f32[K], how far each step has gone from rows of its own, 0, to shared ones, 1


@config_dataclass
class Transition(Around):
  """The plan of `of`, blended: the share of shared rows rises linearly from 0 to 1 in `steps` steps of training."""
  of: Planner
  steps: int

  def __post_init__(self):
    if self.steps < 2:
      raise ConfigError(f'Transition.steps = {self.steps}: the first step is all of the old, the last all of the new; '
                        'give 2 or more')

  def __call__(self, context: PlanContext) -> Plan:
    return _blending(self.of(context), jnp.minimum(context.step / (self.steps - 1), 1.0))


@config_dataclass
class Apart(Around):
  """The plan of `of`, every loop with rows of its own: the model as it was before its conversion."""
  of: Planner

  def __call__(self, context: PlanContext) -> Plan:
    return _blending(self.of(context), 0.0)


def _blending(plan, share):
  return dataclasses.replace(plan, rows={**plan.rows, BLEND: jnp.full(plan.steps, share, jnp.float32)})
