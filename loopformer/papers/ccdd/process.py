"""The noise of latents, and the ways back from it (CCDD, 2510.03206; its code's errors are not repeated).

z_t = signal(t) z_0 + spread(t) eps, eps ~ N(0, 1), t from 0 (clean) to 1 (noise).
"""
from __future__ import annotations

import jax
import jax.numpy as jnp

from loopformer.types import Array, config_dataclass, real

# Noise ---------------------------------------------------------------------------------------------------------------


@config_dataclass
class VP:
  """sqrt(1 - t) z_0 + sqrt(t) eps: of the variance of z_0, if that is one (`vp_linear`)."""

  def signal(self, t: Array) -> Array:
    """The factor of z_0 at time t, f32 of any shape."""
    return jnp.sqrt(1 - t)

  def spread(self, t: Array) -> Array:
    """The factor of eps."""
    return jnp.sqrt(t)


@config_dataclass
class Flow:
  """(1 - t) z_0 + t eps: straight lines (`flow_linear`)."""

  def signal(self, t: Array) -> Array:
    """As of VP."""
    return 1 - t

  def spread(self, t: Array) -> Array:
    """As of VP."""
    return t


@config_dataclass
class Quadratic:
  """(1 - t) z_0 + sqrt(t (2 - t)) eps: of the variance of z_0, as VP, and faster at first (`old`)."""

  def signal(self, t: Array) -> Array:
    """As of VP."""
    return 1 - t

  def spread(self, t: Array) -> Array:
    """As of VP."""
    return jnp.sqrt(t * (2 - t))


# Steps back ----------------------------------------------------------------------------------------------------------


@config_dataclass
class DDIM:
  """z_s = signal(s) z + spread(s) / spread(t) (z_t - signal(t) z), z the guess of z_0: no noise is added. With `Flow`
  it is an Euler step of the straight line."""

  def __call__(self, process: VP | Flow | Quadratic, z: Array, guess: Array, t: Array, s: Array, noise: Array) -> Array:
    """z_t, guess [B, T, d] at times t > s, f32[B], with noise N(0, 1) of their shape -> z_s [B, T, d]."""
    t, s = t[:, None, None], s[:, None, None]
    return process.signal(s) * guess + process.spread(s) / process.spread(t) * (z - process.signal(t) * guess)


@config_dataclass
class DDPM:
  """A draw of z_s given z_t and z_0 = guess. With a = signal(t) / signal(s) and v = spread(t)^2 - a^2 spread(s)^2:

      mean = a spread(s)^2 / spread(t)^2 z_t + signal(s) v / spread(t)^2 guess,   variance = v spread(s)^2 / spread(t)^2

  Where the guess is right, z_s has the mean signal(s) z_0 and the variance spread(s)^2 at every s. The paper's code
  exchanges the two coefficients, and multiplies the noise by the variance.
  """

  def __call__(self, process: VP | Flow | Quadratic, z: Array, guess: Array, t: Array, s: Array, noise: Array) -> Array:
    """As of DDIM."""
    t, s = t[:, None, None], s[:, None, None]
    a = process.signal(t) / process.signal(s)
    all_of, left = jnp.square(process.spread(t)), jnp.square(process.spread(s))
    v = jnp.maximum(all_of - jnp.square(a) * left, 0.0)
    mean = a * left / all_of * z + process.signal(s) * v / all_of * guess
    return mean + jnp.sqrt(v * left / all_of) * noise


# Weights -------------------------------------------------------------------------------------------------------------


@config_dataclass
class Signal:
  """1 / (1 - t), `most` at most: of the error of a guess of z_0 (`ddpm_x`)."""
  most: float = 10.0

  def __post_init__(self):
    real('latent_weight.most', self.most, '(0, inf)')

  def __call__(self, t: Array) -> Array:
    """f32 of any shape."""
    return jnp.minimum(1 / jnp.maximum(1 - t, 1e-6), self.most)


@config_dataclass
class InverseSNR:
  """t / (1 - t), `most` at most (`inv_snr`)."""
  most: float = 10.0

  def __post_init__(self):
    real('latent_weight.most', self.most, '(0, inf)')

  def __call__(self, t: Array) -> Array:
    """f32 of any shape."""
    return jnp.minimum(t / jnp.maximum(1 - t, 1e-6), self.most)


def noised(process: VP | Flow | Quadratic, keys: Array, z: Array, t: Array) -> Array:
  """z_t [B, T, d] of z_0 at the times of sequences, f32[B], with noise from their keys [B]."""
  noise = jax.vmap(lambda key, row: jax.random.normal(key, row.shape))(keys, z)
  t = t[:, None, None]
  return process.signal(t) * z + process.spread(t) * noise
