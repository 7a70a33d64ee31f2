"""What LoopUS learns from a supervised step (2605.11011, section 3)."""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.cross_entropy import nll_sum, token_answers
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Plan, Readout, Trace, config_dataclass


@config_dataclass
class Supervision(Term):
  """LM + beta SiLU(LM - LM before the step) + confidence BCE(q, accuracy), a mean over supervised steps and texts.

  A text is a document of a row. LM is its mean cross-entropy after the step; that before the step is a constant, so
  that the second part weighs the gradient of the first: by 1 + beta SiLU'(difference), 0.90 to 2.10 for beta = 1. q is
  the gate's logit at the last token that is asked for, and is taught the share of likeliest answers that are right.
  Texts weigh as much as they have tokens. (The released code takes the difference of the means of two texts, those of
  one device.)

  The rollout keeps pairs of states (`loop.Pairs`). Supervised are the rows of its plan (`plans.RandomSupervision`), but
  for those that it skips, of all sequences or of some.

  Raises:
    ConfigError: the rollout keeps no pairs, or the cell has no gate though confidence is above 0.
  """
  roll: str
  beta: float = 1.0
  confidence: float = 1.0
  chunk: int | None = None

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    trace, weights_BT = rolls[self.roll], batch['weights']
    if trace.xs is None or trace.plan is None or trace.xs.ndim != 5:
      raise ConfigError(f'objective: the rollout {self.roll!r} must keep the states before and after its steps; use '
                        'keep=loop.Pairs()')
    z_KBTD, old_KBTD = readout.read(trace.xs[:, 1]), readout.read(jax.lax.stop_gradient(trace.xs[:, 0]))
    targets_KBT = jnp.broadcast_to(batch['targets'], z_KBTD.shape[:-1])
    options = self.chunk, readout.dtype
    nll_KBT, right_KBT = token_answers(z_KBTD, readout.table, targets_KBT, *options)
    before_KBT, _ = token_answers(old_KBTD, readout.table, targets_KBT, *options)
    mean = of_texts(batch)
    gained_KBT = mean(nll_KBT - before_KBT)
    silu = jax.nn.silu(gained_KBT)
    weights_KBT = weights_BT * of_steps(trace.plan)
    graded_KBT = weights_KBT * (1 + self.beta * jax.vmap(jax.grad(jax.nn.silu))(gained_KBT.ravel()).reshape(silu.shape))
    graded = nll_sum(z_KBTD, readout.table, targets_KBT, graded_KBT, *options)
    total = graded + jax.lax.stop_gradient(jnp.sum(weights_KBT * (nll_KBT + self.beta * silu)) - graded)
    if self.confidence:
      if 'halt' not in trace.aux:
        raise ConfigError(f'objective: the rollout {self.roll!r} has no gate to teach; use a cell with one '
                          '(cells/halting.py), or confidence = 0')
      q_KBT, share_KBT = trace.aux['halt'], mean(right_KBT.astype(jnp.float32))
      total += self.confidence * jnp.sum(last_of_texts(batch) * of_steps(trace.plan)
                                         * (jax.nn.softplus(q_KBT) - share_KBT * q_KBT))
    return total / len(z_KBTD)


def of_steps(plan: Plan) -> Array | float:
  """1; of a plan that skips steps f32[K, B or 1, 1], by which a mean over all K is one over those that ran, of each
  sequence.
  """
  if plan.active is None:
    return 1.0
  ran_KB1 = plan.active.reshape(plan.steps, -1, 1).astype(jnp.float32)
  return plan.steps * ran_KB1 / jnp.maximum(ran_KB1.sum(0), 1)


def numbers(batch: Batch) -> Array:
  """i32[B, T]: which text of its row each token belongs to, from 0."""
  if 'segments' not in batch:
    return jnp.zeros(batch['tokens'].shape[:2], jnp.int32)
  changes = batch['segments'][:, 1:] != batch['segments'][:, :-1]
  return jnp.pad(jnp.cumsum(changes, 1), ((0, 0), (1, 0)))


def of_texts(batch: Batch):
  """f32[.., B, T] -> f32[.., B, T]: at every token the mean of its text, by the batch's weights; 0 where none is asked.
  """
  number_BT, weights_BT = numbers(batch), batch['weights']
  length = number_BT.shape[1]

  def sums(values_T, number_T):
    return jax.ops.segment_sum(values_T, number_T, length)[number_T]

  def mean(values):
    of_rows = jax.vmap(sums)
    total = jax.vmap(lambda rows: of_rows(rows * weights_BT, number_BT))(values.reshape(-1, *number_BT.shape))
    return (total / jnp.maximum(of_rows(weights_BT, number_BT), 1e-9)).reshape(values.shape)

  return mean


def last_of_texts(batch: Batch) -> Array:
  """f32[B, T]: at the last token of every text that is asked for the text's weight, 0 elsewhere."""
  number_BT, weights_BT = numbers(batch), batch['weights']
  place = jnp.arange(number_BT.shape[1])

  def one(number_T, weights_T):
    last = jax.ops.segment_max(jnp.where(weights_T > 0, place, -1), number_T, len(place))[number_T]
    return (place == last) * jax.ops.segment_sum(weights_T, number_T, len(place))[number_T]

  return jax.vmap(one)(number_BT, weights_BT)
