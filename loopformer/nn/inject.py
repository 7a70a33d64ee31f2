"""Injections: how a step of the loop takes in the input e again. Modules (state, e) -> what the layers see.

Arithmetic is in float32: a decay close to one is one in bfloat16.
"""
from __future__ import annotations

import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from loopformer.nn.layers import Linear, dense
from loopformer.types import Array, Params

STABLE = math.sqrt(1 / 5)  # the decay that Parcae starts from


class NoInjection(nn.Module):
  """x: the input is not injected."""
  injects = False

  def __call__(self, x: Array, e: Array) -> Array:
    return x

  def radius(self, params: Params) -> float:
    """Spectral radius of the linear map of the state."""
    return 1.0

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward, in matrix products."""
    return 0.0


class Add(nn.Module):
  """x + e."""
  injects = True

  def __call__(self, x: Array, e: Array) -> Array:
    return x + e

  def radius(self, params: Params) -> float:
    return 1.0

  def flops(self, width: int) -> float:
    return 0.0


class Concat(nn.Module):
  """W [x; e], W [2 D, D] without bias: Huginn's adapter."""
  std: float = 0.02
  init: Any = None
  injects = True

  @nn.compact
  def __call__(self, x: Array, e: Array) -> Array:
    return Linear(x.shape[-1], self.std, init=self.init, name='adapter')(jnp.concatenate([x, e], -1))

  def radius(self, params: Params) -> float:
    kernel = np.asarray(params['adapter']['kernel'], np.float64)
    return float(np.abs(np.linalg.eigvals(kernel[:kernel.shape[1]])).max())

  def flops(self, width: int) -> float:
    return 4.0 * width * width


class Diagonal(nn.Module):
  """a * x + delta * (e B), delta = softplus(dt), a = exp(-delta exp(log_a)) in (0, 1) (Parcae section 2).

  A diagonal state-space step: zero-order hold for the state, Euler for the input. Whatever the parameters, its spectral
  radius is below one. B starts as the identity, a at sqrt(1/5).
  """
  injects = True

  @nn.compact
  def __call__(self, x: Array, e: Array) -> Array:
    width = x.shape[-1]
    log_a = self.param('log_a', nn.initializers.zeros, (width,))
    dt = self.param('dt', nn.initializers.constant(math.log(math.expm1(-math.log(STABLE)))), (width,))
    kernel = self.param('B', _identity, (width, width))
    a, delta = decay(log_a, dt)
    return (a * x.astype(jnp.float32) + delta * dense(e, kernel).astype(jnp.float32)).astype(x.dtype)

  def radius(self, params: Params) -> float:
    return float(decay(jnp.asarray(params['log_a']), jnp.asarray(params['dt']))[0].max())

  def flops(self, width: int) -> float:
    return 2.0 * width * width


def decay(log_a: Array, dt: Array) -> tuple[Array, Array]:
  """(a, delta): exponents are kept where float32 still tells a from 0 and from 1."""
  delta = jax.nn.softplus(dt)
  return jnp.exp(-jnp.clip(delta * jnp.exp(jnp.clip(log_a, -60.0, 60.0)), 1e-7, 80.0)), delta


def _identity(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
  rows, columns = shape
  return jnp.eye(rows, columns, dtype=dtype)
