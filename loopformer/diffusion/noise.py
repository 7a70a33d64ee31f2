"""The noise of masked diffusion: schedules, times, and which tokens are hidden.

The clean sequence is the batch's `targets`, whatever its `tokens` are; tokens of weight 0 (prompt, padding, filler) are
never hidden. What is hidden reads MASK, the id after those of the data: the model reads one id more than it answers, so
that MASK has no probability, and as hidden tokens alone are scored, visible ones are carried over (SUBS; MDLM,
2406.07524, section 3).
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from loopformer.nn import modules
from loopformer.types import Array, Batch, ConfigError, Params, PlanContext, config_dataclass, real, whole

# Schedules -----------------------------------------------------------------------------------------------------------


@config_dataclass
class Linear:
  """alpha(t) = 1 - t: a token is hidden with chance t (MDLM's log-linear noise, LLaDA)."""

  def alpha(self, t: Array) -> Array:
    """The chance that a token is visible at time t, f32 of any shape: 1 at 0, 0 at 1."""
    return 1 - t

  def weight(self, t: Array) -> Array:
    """-alpha'(t) / (1 - alpha(t)), the weight of what is hidden at t, above 0."""
    return 1 / t


@config_dataclass
class Cosine:
  """alpha(t) = 1 - sin(pi t / 2): more times at which little is visible (MDLM, appendix; MD4, 2406.04329)."""

  def alpha(self, t: Array) -> Array:
    """As of Linear."""
    return 1 - jnp.sin(jnp.pi / 2 * t)

  def weight(self, t: Array) -> Array:
    """As of Linear."""
    return jnp.pi / 2 / jnp.tan(jnp.pi / 2 * t)


# Times ---------------------------------------------------------------------------------------------------------------


def stratified(key: Array, row: Array) -> Array:
  """f32[B] in [0, 1): a number a sequence, uniform, and spread over the batch.

  One draw for all, and from sequence to sequence van der Corput's numbers, the bits of `row` read backwards: of a batch
  of 2^n sequences there is exactly one in each of as many equal parts of [0, 1), and nobody needs to know the size of
  the batch, of which microbatches and devices have a part alone.

  Args:
    key: the same for the whole batch. row: i32[B], places in the global batch.
  """
  return jnp.mod(jax.random.uniform(key) + corput(row), 1.0)


def corput(number: Array) -> Array:
  """f32[...] in [0, 1): van der Corput's numbers in base 2, of 24 bits: 0, 1/2, 1/4, 3/4, 1/8 ..."""
  bits = number.astype(jnp.uint32)
  for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0f0f0f0f), (8, 0x00ff00ff), (16, 0x0000ffff)):
    bits = (bits >> shift) & jnp.uint32(mask) | (bits & jnp.uint32(mask)) << shift
  return (bits >> 8).astype(jnp.float32) / 2 ** 24


# Masks ---------------------------------------------------------------------------------------------------------------


def hidden_by_chance(keys: Array, maskable: Array, chance: Array) -> Array:
  """bool[B, T]: each token that may be hidden (bool[B, T]) with the chance of its sequence, f32[B], by keys [B]."""
  u = jax.vmap(lambda key: jax.random.uniform(key, maskable.shape[1:]))(keys)
  return maskable & (u < chance[:, None])


def hidden_exactly(keys: Array, maskable: Array, count: Array) -> Array:
  """bool[B, T]: so many tokens, i32[B], of those that may be hidden (bool[B, T]), drawn without replacement."""
  u = jax.vmap(lambda key: jax.random.uniform(key, maskable.shape[1:]))(keys)
  return maskable & (ranks(jnp.where(maskable, u, 2.0)) < count[:, None])


def ranks(score: Array) -> Array:
  """i32[B, T]: how many of a row are smaller, of equals those to the left."""
  return jnp.argsort(jnp.argsort(score, -1, stable=True), -1, stable=True)


def key_of(seed: int, ids: Array, place: Array | int) -> Array:
  """The key of a sequence of ids, i32[T], at a place: what is drawn in evaluation, the same for all models and depths.
  """
  odd = jnp.arange(ids.shape[0], dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
  content = ((ids.astype(jnp.uint32) + 1) * odd).sum(dtype=jnp.uint32)
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), place), content)


@config_dataclass
class Masking:
  """Objective.prepare: hides tokens at a time of their sequence's own, t stratified in [least, 1].

  The batch gets `tokens`, of which hidden ones read `mask`; `weights`, the task's times the schedule's weight where a
  token is hidden and 0 elsewhere; `maskable` f32[B, T], the task's weights, by whose sum the bound is divided (NELBO);
  `time` f32[B].

  mask: MASK, the number of answers of the model. noise: the schedule. least: the earliest time; weights are up to
  1 / least.
  """
  mask: int
  noise: Linear | Cosine = Linear()
  least: float = 1e-3
  teacher = None

  def __post_init__(self):
    whole('Masking.mask', self.mask, 1, why='it is the id after those of the data')
    real('Masking.least', self.least, '(0, 1)', why='weights grow as 1 / t')

  def check(self, model: Any, measure: Any):
    """Raises ConfigError where the model could answer MASK, cannot read it, or has causal layers; or where the measure
    hides no tokens, or by another id, so that an evaluation would ask for what the model sees."""
    check_model(model, self.mask)
    if measure.mask != self.mask:
      hides = 'no tokens' if measure.mask is None else f'tokens by the id {measure.mask}'
      raise ConfigError(f'task.measure = {type(measure).__name__}: it hides {hides}, and objective.prepare hides them '
                        f'by {self.mask}; set it to diffusion.measures.Bound(mask={self.mask})')

  def __call__(self, context: PlanContext, weights: Params | None = None) -> Batch:
    batch = context.batch
    row = batch['row'] if 'row' in batch else jnp.arange(len(batch['tokens']))
    t = self.least + (1 - self.least) * stratified(context.key, row)
    hidden = hidden_by_chance(context.keys(), batch['weights'] > 0, 1 - self.noise.alpha(t))
    return hide(batch, hidden, self.noise.weight(t), t, self.mask)


def hide(batch: Batch, hidden: Array, weight: Array, time: Array, mask: int) -> Batch:
  """The batch in which these tokens, bool[B, T], are hidden and asked for with their sequences' weights, f32[B]."""
  given = batch['weights']
  return {**batch, 'tokens': jnp.where(hidden, mask, batch['targets']), 'maskable': given, 'time': time,
          'weights': jnp.where(hidden, given * weight[:, None], 0.0)}


# Checks --------------------------------------------------------------------------------------------------------------


def check_model(model: Any, mask: int):
  """Raises ConfigError where a model is none that reveals what reads `mask`: it could answer MASK, or cannot read it;
  or a layer is causal, which would tell what is hidden from what stands before it alone."""
  if not model.read_in.vocab:
    raise ConfigError('model.read_in: its inputs are vectors, of which none can be MASK; take one that reads ids')
  if mask != model.outputs:
    raise ConfigError(f'mask = {mask}: the model answers ids 0 to {model.outputs - 1}, and MASK must be the next, so '
                      f'that it has no probability; set mask to {model.outputs}, or read_out to Head(outputs={mask})')
  if model.read_in.vocab <= mask:
    raise ConfigError(f'model.read_in.vocab = {model.read_in.vocab}: MASK, the id {mask}, cannot be read; set it to '
                      f'{mask + 1}, and give the model a Head(outputs={mask})')
  for name, stack in model.stacks().items():
    if any(kernel.causal for kernel in modules.held(stack, 'kernel')):
      raise ConfigError(f'model.{name}: a layer is causal, so that a hidden token would not see there what follows; '
                        'give all layers kernel=kernels.Bidirectional()')
