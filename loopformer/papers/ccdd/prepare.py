"""Batches of tokens and latents, both noised (CCDD, 2510.03206)."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from loopformer.diffusion.noise import Masking
from loopformer.nn.condition import TIME
from loopformer.papers.ccdd.encoders import Hidden, RandomContext, RandomTokens
from loopformer.papers.ccdd.plans import LATENT_TIME, LATENTS
from loopformer.papers.ccdd.process import VP, Flow, InverseSNR, Quadratic, Signal, noised
from loopformer.types import Array, Batch, Params, PlanContext, config_dataclass, real

# What is encoded -----------------------------------------------------------------------------------------------------


@config_dataclass
class Clean:
  """Latents of the clean sequence, as in the paper: those of visible tokens know what stands at hidden ones, so that
  what the tokens' loss reaches is conditional on latents, and NO bound on the likelihood.

  least, most: between which a sequence draws the share p_r of hidden tokens whose latents are 0 (leak control).
  """
  least: float = 0.0
  most: float = 0.0
  bounds = False

  def __post_init__(self):
    real('Clean.least', self.least, '[0, 1]')
    real('Clean.most', self.most, f'[{self.least}, 1]', why='Clean.least is the smallest share')

  def __call__(self, encode: Any, clean: Array, shown: Array, keys: Array) -> tuple[Array, Array]:
    """(latents that are noised, latents that are guessed), f32[B, T, d].

    encode: ids i32[B, T] -> latents; clean, shown: ids without and with MASK; keys: [B].
    """
    z = encode(clean)

    def drop(key):
      one, two = jax.random.split(key)
      share = jax.random.uniform(one, minval=self.least, maxval=self.most) if self.most > self.least else self.most
      return jax.random.uniform(two, clean.shape[1:]) < share

    if not self.most:
      return z, z
    gone = jax.vmap(drop)(keys) & (clean != shown)
    return jnp.where(gone[..., None], 0.0, z), z


@config_dataclass
class Corrupted:
  """Latents of what is shown, MASK and all: they say nothing of hidden tokens that those who are visible do not, and
  the tokens' loss stays a bound."""
  bounds = True

  def __call__(self, encode: Any, clean: Array, shown: Array, keys: Array) -> tuple[Array, Array]:
    """As of Clean."""
    return encode(shown), encode(clean)


# Times ---------------------------------------------------------------------------------------------------------------


@config_dataclass
class Together:
  """Latents have the time of their tokens."""

  def __call__(self, key: Array, row: Array, time: Array) -> Array:
    """f32[B]: times of latents; row: i32[B], places in the global batch; time: f32[B], of the tokens."""
    return time

  def beside(self, time: Array) -> Array:
    """f32[B]: times of latents that are written beside tokens of these times."""
    return time


@config_dataclass
class Apart:
  """Latents have a time of their own, uniform, whatever that of the tokens."""

  def __call__(self, key: Array, row: Array, time: Array) -> Array:
    """As of Together."""
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(row)

  def beside(self, time: Array) -> Array:
    """As of Together: of all ways to 0, that of the tokens."""
    return time


@config_dataclass
class Slower:
  """Latents decay slower than tokens: at time t^power."""
  power: float = 3.0

  def __post_init__(self):
    real('Slower.power', self.power, '(0, inf)')

  def __call__(self, key: Array, row: Array, time: Array) -> Array:
    """As of Together."""
    return self.beside(time)

  def beside(self, time: Array) -> Array:
    """As of Together."""
    return time ** self.power


# Weights of tokens ---------------------------------------------------------------------------------------------------


@config_dataclass
class OfBound:
  """The schedule's, with which the loss is a bound (1 / t for `Linear`)."""

  def __call__(self, weights: Array, time: Array, noise: Any) -> Array:
    """f32[B, T], from those of the bound."""
    return weights


@config_dataclass
class Dynamic:
  """2 (1 - t) where a token is hidden (the paper's training weight without uniform noise)."""

  def __call__(self, weights: Array, time: Array, noise: Any) -> Array:
    """As of OfBound."""
    return weights / noise.weight(time)[:, None] * jnp.clip(2 * (1 - time), 0.0, 2.0)[:, None]


def with_latents_of(batch: Batch, *, encode: Any, source: Clean | Corrupted, process: VP | Flow | Quadratic,
                    latent_time: Array, latent_weight: Any, keys: Array, drop: float = 0.0) -> Batch:
  """A batch that `Masking` or `Bound` hid tokens of, with `latents`, their `latent_time`, `latent_targets`, and where
  these count, `latent_real` f32[B, T], and how much, `latent_weights`."""
  own = jax.vmap(lambda key: jax.random.split(key, 3))(keys)
  noised_from, targets = source(encode, batch['targets'], batch['tokens'], own[:, 0])
  latents = noised(process, own[:, 1], noised_from, latent_time)
  if drop:
    kept = jax.vmap(jax.random.uniform)(own[:, 2]) >= drop
    latents = jnp.where(kept[:, None, None], latents, 0.0)
  shown = (jnp.ones(batch['tokens'].shape) if batch.get('segments') is None
           else (batch['segments'] > 0).astype(jnp.float32))
  return {**batch, LATENTS: latents, LATENT_TIME: latent_time, 'latent_targets': targets, 'latent_real': shown,
          'latent_weights': shown * latent_weight(latent_time)[:, None]}


@config_dataclass
class Joint:
  """Objective.prepare of CCDD: hides tokens as `masking` says, and adds latents of `encoder` under noise of their own.

  source: what is encoded; times: of latents; weights: of tokens; latent_weight: of the error of guessed latents; drop:
  the chance that a sequence's latents are 0, for guidance.
  """
  masking: Masking
  encoder: RandomContext | RandomTokens | Hidden
  process: VP | Flow | Quadratic = VP()
  source: Clean | Corrupted = Clean()
  times: Together | Apart | Slower = Together()
  weights: OfBound | Dynamic = OfBound()
  latent_weight: Signal | InverseSNR = Signal()
  drop: float = 0.0

  def __post_init__(self):
    real('Joint.drop', self.drop, '[0, 1)')

  @property
  def teacher(self) -> Any:
    """Whose weights the encoder needs, or None."""
    return self.encoder.teacher

  def check(self, model: Any, measure: Any):
    """Raises ConfigError where the model or the measure is none for masked tokens."""
    self.masking.check(model, measure)

  def __call__(self, context: PlanContext, weights: Params | None = None) -> Batch:
    batch = self.masking(context)
    own = context.named('latents')
    row = batch['row'] if 'row' in batch else jnp.arange(len(batch['tokens']))
    time = jnp.clip(self.times(own.key, row, batch[TIME]), self.masking.least, 1.0)
    batch = {**batch, 'weights': self.weights(batch['weights'], batch[TIME], self.masking.noise)}

    def encode(tokens):
      return jax.lax.stop_gradient(self.encoder(tokens, batch.get('segments'), weights))

    return with_latents_of(batch, encode=encode, source=self.source, process=self.process, latent_time=time,
                           latent_weight=self.latent_weight, keys=own.keys(), drop=self.drop)
