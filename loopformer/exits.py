"""Exits: which state of a rollout answers. Frozen parts.

An exit says which states it must see (`keep`), and picks from them: z [B, T, D], and the steps it took, f32[B].
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from loopformer import loop
from loopformer.types import Array, Batch, ConfigError, Readout, Trace, part


@part
class Final:
  """The last state."""

  @property
  def keep(self) -> loop.Last:
    return loop.Last()

  def pick(self, readout: Readout, trace: Trace, batch: Batch) -> tuple[Array, Array]:
    plan = trace.plan
    steps = plan.steps if plan.live is None else plan.live.sum(0)
    steps += 0 if plan.free is None else plan.free
    return trace.z, jnp.broadcast_to(steps, trace.z.shape[:1]).astype(jnp.float32)


@part
class Confidence:
  """The step whose answers are surest (length generalisation, section 4): the least cross-entropy of its likeliest
  answers, a mean over a sequence's own answer positions; the first of equals. No step before `least` is taken.
  For plans without free steps, whose states are not kept.
  """
  least: int = 1

  def __post_init__(self):
    if self.least < 1:
      raise ConfigError(f'exit.least = {self.least}: must be 1 or more')

  @property
  def keep(self) -> loop.Every:
    return loop.Every()

  def pick(self, readout: Readout, trace: Trace, batch: Batch) -> tuple[Array, Array]:
    z_KBTD = readout.read(trace.xs)
    asked_BT = (batch['weights'] > 0).astype(jnp.float32)

    def doubt(z_BTD):
      logits = jnp.einsum('BTD,VD->BTV', z_BTD, readout.table.astype(z_BTD.dtype), preferred_element_type=jnp.float32)
      unsure_BT = jax.nn.logsumexp(logits, -1) - logits.max(-1)
      return (unsure_BT * asked_BT).sum(-1) / jnp.maximum(asked_BT.sum(-1), 1)

    doubt_KB = jax.lax.map(doubt, z_KBTD)
    early = jnp.arange(len(doubt_KB))[:, None] < self.least - 1
    live = jnp.ones(len(doubt_KB), bool) if trace.plan.live is None else trace.plan.live
    best_B = jnp.where(early | ~live.reshape(len(doubt_KB), -1), jnp.inf, doubt_KB).argmin(0)
    return jnp.take_along_axis(z_KBTD, best_B[None, :, None, None], 0)[0], best_B + 1.0
