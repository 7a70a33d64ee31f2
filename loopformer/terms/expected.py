"""Learning when to leave a loop: the expected cross-entropy over exit steps, and a gate taught by what steps gained.

After every step t of K a token leaves with probability lambda_t = sigmoid(a_t), a_t the gate's logit; so it leaves

    after step t < K    with p_t = lambda_t S_(t-1),  S_t = (1 - lambda_1) .. (1 - lambda_t)
    after step K        with p_K = S_(K-1), all that is left: lambda_K has no part in it

All of it is computed as logarithms. See Ouro (2510.25741), sections 2 and 3; PonderNet has the same p.
"""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.inference.exits import SLACK
from loopformer.terms.cross_entropy import nll_sum
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


def log_survival(halt: Array) -> Array:
  """log S_0 .. log S_(K-1) of the gate's logits f32[K, ...]: the same shape."""
  return jnp.concatenate([jnp.zeros_like(halt[:1]), jnp.cumsum(jax.nn.log_sigmoid(-halt[:-1]), 0)])


def log_exit(halt: Array) -> Array:
  """log p_1 .. log p_K of the gate's logits f32[K, ...]: the same shape."""
  leave = jnp.concatenate([jax.nn.log_sigmoid(halt[:-1]), jnp.zeros_like(halt[:1])])
  return log_survival(halt) + leave


def exit_step(halt: Array, threshold: float) -> Array:
  """i32[...]: the first step t in 1..K by which a token has left with probability `threshold` or more (section 4).

  halt: f32[K, ...], of steps that were all run. K where no step before it is such; 1 for a threshold of 0.
  """
  left = log_survival(halt)[1:] <= jnp.log1p(-jnp.float32(threshold)) + SLACK
  return 1 + jnp.concatenate([left, jnp.ones_like(left, shape=halt[:1].shape)]).argmax(0)


@config_dataclass
class Expected(Term):
  """sum_t p_t CE_t - beta H(p), a mean over tokens by their weights: Ouro's stage I (section 3).

  H, the entropy of p in nats, is what keeps p off one step; but for a constant it is the distance to the uniform one.
  The gradient goes to gate and model. The rollout keeps every state, and all of its steps run.
  """
  roll: str
  beta: float = 0.05
  chunk: int | None = None

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    trace = whole(rolls, self.roll)
    assert trace.xs is not None
    log_p_KBT = log_exit(trace.aux['halt'])
    p_KBT = jnp.exp(log_p_KBT)
    targets_KBT = jnp.broadcast_to(batch['targets'], p_KBT.shape)
    loss = nll_sum(readout.read(trace.xs), readout.table, targets_KBT, p_KBT * batch['weights'], self.chunk,
                   readout.dtype)
    return loss + self.beta * jnp.sum(p_KBT * log_p_KBT * batch['weights'])


def whole(rolls: Mapping[str, Trace], name: str) -> Trace:
  """The rollout, of which every state and every lambda is needed. Raises ConfigError where it does not have them."""
  trace = rolls[name]
  if 'halt' not in trace.aux:
    raise ConfigError(f'objective: the rollout {name!r} has no gate to learn; use a cell with one (cells/halting.py)')
  plan = trace.plan
  if trace.xs is None or plan is None or plan.active is not None or plan.no_grad_steps is not None:
    raise ConfigError(f'objective: the rollout {name!r} must run and keep every step; use plans.Uniform and '
                      'keep=loop.Every()')
  return trace
