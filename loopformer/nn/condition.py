"""What a step is told about where it stands: embeddings of a plan's rows, and the modulations made from them.

All of it depends on the plan alone, never on tokens, so it is computed for all steps before the loop. Where every
sequence has a plan of its own, [K] stands for [K, B, 1] here: modulations are then [K, N, 4, B, 1, D].
"""
from __future__ import annotations

import math

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import roles
from loopformer.nn.layers import Normal, UniformWithin
from loopformer.roles import Role
from loopformer.types import Array, ConfigError, Plan

FEATURES = 256
TIME = 'time'  # the row of a plan that tells the time of noise, from 0 (none) to 1
SCALE = 1000.0  # of such times, for the waves that embed them


def sinusoid(s: Array) -> Array:
  """f32[K] -> f32[K, 256]: cos(s f_j) for j < 128, then sin; f_j = 10000^(-j/128). s is used as it is."""
  frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(FEATURES // 2) / (FEATURES // 2))
  angle = s[..., None] * frequencies
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)


class ScalarEmbed(nn.Module):
  """f32[K] -> f32[K, D]: sinusoid, Linear with bias, SiLU, Linear with bias (LoopFormer section 2).

  std: of the first weights, with biases of zero; None for PyTorch's own first values, weights and biases within
  1 / sqrt(inputs).
  """
  width: int
  std: float | None = 0.02

  @nn.compact
  def __call__(self, s: Array) -> Array:
    hidden = self._linear('in', FEATURES)(sinusoid(s))
    return self._linear('out', self.width)(jax.nn.silu(hidden))

  def _linear(self, name, inputs):
    if self.std is not None:
      return nn.Dense(self.width, kernel_init=Normal(self.std), name=name)
    within = UniformWithin(1 / math.sqrt(inputs))
    return nn.Dense(self.width, kernel_init=within, bias_init=within, name=name)


def _rows(s: Array) -> Array:
  """f32[K] as it is; f32[K, B] -> f32[K, B, 1], so that what is made of it broadcasts over tokens."""
  return s if s.ndim == 1 else s[..., None]


class Trajectory(nn.Module):
  """c = TimeEmbed(t) + StepEmbed(dt): LoopFormer's condition."""
  width: int
  std: float = 0.02

  @nn.compact
  def __call__(self, plan: Plan) -> Array:
    time = ScalarEmbed(self.width, self.std, name='time')(_rows(plan.t))
    return time + ScalarEmbed(self.width, self.std, name='step')(_rows(plan.dt))


class LoopIndex(nn.Module):
  """c = TimeEmbed(k), the integer index of the loop: the timestep-modulated looped transformer's condition.

  std: as of ScalarEmbed; None in the paper's language models, 0.02 in its in-context learning.
  """
  width: int
  std: float | None = 0.02

  @nn.compact
  def __call__(self, plan: Plan) -> Array:
    return ScalarEmbed(self.width, self.std, name='time')(jnp.arange(plan.steps, dtype=jnp.float32))


class NoiseTime(nn.Module):
  """c = TimeEmbed(1000 t), t the time of the noise that a denoiser's input is under, the plan's row `time` [K, B]: the
  same in all steps (CCDD, 2510.03206). Under a plan that does not tell it, t is 0.

  std: as of ScalarEmbed. CCDD's code leaves t as it is, of which the fastest of its waves sees one radian.
  """
  width: int
  std: float = 0.02

  @nn.compact
  def __call__(self, plan: Plan) -> Array:
    time = plan.rows.get(TIME, jnp.zeros((plan.steps, 1)))
    return ScalarEmbed(self.width, self.std, name='time')(SCALE * time[..., None])


class Modulation(nn.Module):
  """Gates and scales of all layers, [K, D] -> [K, N, 4, D] in the order g_a, g_m, s_a, s_m: Linear(SiLU(c)).

  The paper starts it at zero (the default): every loop is an identity. The official code starts it, by accident, at
  N(0, 0.02^2): give `init=Normal(0.02)` for that.
  """
  layers: int
  init: Normal = Normal(0.0)  # type: ignore[assignment]  # in the place of Linen's method, as saved models have it
  most = None  # steps of a plan: as many as are asked for

  @nn.compact
  def __call__(self, c: Array) -> Array:
    width = c.shape[-1]
    kernel = self.param('kernel', self.init, (self.layers, width, 4, width))
    bias = roles.param(self, 'bias', nn.initializers.zeros, (self.layers, 4, width), Role(decayed=False))
    out = jnp.einsum('K...D,NDgE->KNg...E', jax.nn.silu(c), kernel, preferred_element_type=jnp.float32)
    return out + bias.reshape(*bias.shape[:2], *(1,) * (c.ndim - 2), width)


class StepNumber(nn.Module):
  """[K, 1]: the number of each step, for a table that is indexed by it."""
  width: int

  def __call__(self, plan: Plan) -> Array:
    return jnp.arange(plan.steps)[:, None]


class Table(nn.Module):
  """Gates and scales of every step and layer, learned directly: the control of a time code (timestep encoding, 7).

  [K, 1] -> [K, N, 4, D]; zero at the start. A step beyond `loops` has no entry, and is refused.
  """
  layers: int
  loops: int
  width: int

  @property
  def most(self) -> int:
    """The most steps of a plan."""
    return self.loops

  @nn.compact
  def __call__(self, index: Array) -> Array:
    if index.shape[0] > self.loops:
      raise ConfigError(f'modulation.loops = {self.loops}: a plan of {index.shape[0]} steps asks for modulations that '
                        'were never learned; take at most that many steps')
    shape = self.loops, self.layers, 4, self.width
    return roles.param(self, 'table', nn.initializers.zeros, shape, Role(decayed=False))[index[:, 0]]
