"""The plan of CCDD: any other, that brings the batch's latents and times along."""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from loopformer.nn.condition import TIME
from loopformer.plans import Around
from loopformer.types import Array, ConfigError, Plan, PlanContext, Planner

LATENTS, LATENT_TIME = 'latents', 'latent_time'


def with_latents(plan: Plan, latents: Array, time: Array, latent_time: Array) -> Plan:
  """The plan with rows of latents [B, T, d] and the times of tokens and latents, f32[B], the same in every step."""
  rows = {LATENTS: latents, TIME: time, LATENT_TIME: latent_time}
  steps = plan.dt.shape[0]
  every = {name: jnp.broadcast_to(row, (steps, *row.shape)) for name, row in rows.items()}
  return dataclasses.replace(plan, rows={**plan.rows, **every})


@dataclasses.dataclass(frozen=True)
class WithLatents(Around):
  """The plans of `of`, with what a batch says of latents (`prepare.Joint`, or its measures)."""
  of: Planner

  def __call__(self, context: PlanContext) -> Plan:
    batch = context.batch
    if LATENTS not in batch:
      raise ConfigError('the batch has no latents, which the plan would bring to the cell; set objective.prepare to '
                        'papers.ccdd.prepare.Joint, and task.measure to papers.ccdd.measures.JointBound')
    return with_latents(self.of(context), batch[LATENTS], batch[TIME], batch[LATENT_TIME])
