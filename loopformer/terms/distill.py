"""Learning from a teacher: a rollout that runs with other weights, frozen, or as another model
(`objective.Rollout.weights_of`).
"""
from __future__ import annotations

from typing import Any, Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.cross_entropy import at_once
from loopformer.terms.term import Taught
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


def kl_sum(z: Array, table: Array, taught: Array, teacher: Array, weights: Array, chunk: int | None = None,
           dtype: Any = None) -> Array:
  """f32[]: sum of weights * KL(softmax(taught teacher^T) || softmax(z table^T)) in nats, over chunks of tokens.

  Differentiable in z and table; the backward pass forms a chunk's logits again.

  Args:
    z, taught: [..., D]; table, teacher: f32[V, D]; weights: f32[...]; chunk, dtype: as of `nll_sum`.
  """
  taught, teacher = jax.lax.stop_gradient((taught, teacher))
  size = at_once(chunk, weights.size)

  def cut(array, *trailing):
    array = array.reshape(weights.size, *trailing)
    return jnp.pad(array, ((0, -weights.size % size), *((0, 0),) * len(trailing))).reshape(-1, size, *trailing)

  def log_law(z_nD, table_VD):
    return jax.nn.log_softmax(jnp.einsum('nD,VD->nV', z_nD.astype(dtype or z_nD.dtype),
                                         table_VD.astype(dtype or z_nD.dtype), preferred_element_type=jnp.float32))

  @jax.checkpoint
  def one(row):
    z_nD, taught_nD, weight_n = row
    log_p_nV, log_q_nV = log_law(taught_nD, teacher), log_law(z_nD, table)
    return jnp.sum(weight_n * jnp.sum(jnp.exp(log_p_nV) * (log_p_nV - log_q_nV), -1))

  rows = cut(z, z.shape[-1]), cut(taught, taught.shape[-1]), cut(weights)
  return jax.lax.scan(lambda total, row: (total + one(row), None), jnp.float32(0), rows)[0]


@config_dataclass
class Distill(Taught):
  """KL(teacher || student) of the answers after every step, a mean over steps and tokens by their weights (MELT, 3).

  Both rollouts keep every state and have the same steps. The teacher's head and final norm are its own, and its states
  may be of another width.

  roll: the student's rollout. teacher: another, which gets no gradient.
  """
  roll: str
  teacher: str
  chunk: int | None = None

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    own, taught = pair(self, rolls, lambda trace: trace.xs, 'keeps no states: give it keep=loop.Every()')
    check_alike(self, own.shape[:-1], taught.shape[:-1])
    theirs = readout.of.get(self.teacher, readout)
    weights_KBT = jnp.broadcast_to(batch['weights'], own.shape[:-1])
    total = kl_sum(readout.read(own), readout.table, theirs.read(taught), theirs.table, weights_KBT, self.chunk,
                   readout.dtype)
    return total / len(own)


def pair(term, rolls, pick, remedy):
  """What `pick` finds of the student's trace and of the teacher's."""
  found = []
  for name in (term.roll, term.teacher):
    value = pick(rolls[name])
    if value is None:
      raise ConfigError(f'{type(term).__name__}: the rollout {name!r} {remedy}')
    found.append(value)
  return found


def check_alike(term, own, taught, remedy='give both rollouts the same steps'):
  """Raises ConfigError where what two rollouts give has not one shape."""
  if own != taught:
    raise ConfigError(f'{type(term).__name__}: {term.roll!r} gives {own}, {term.teacher!r} {taught}; {remedy}')
