"""Learning when to leave, by the two older ways: PonderNet's prior, and adaptive computation time (ACT).

PonderNet (2107.05407, section 2) learns the same distribution p over exit steps as Ouro (expected.py), held to a
geometric one:

    'lm': Weighted(1.0, Expected(roll='all', beta=0.0)), 'prior': Weighted(beta, Geometric(roll='all', rate=rate))

ACT (Graves, 1603.08983, section 2) answers with a mean of states, and pays for steps:

    'lm': Weighted(1.0, Averaged(roll='all')), 'ponder': Weighted(tau, Ponder(roll='all'))

Both read the gate of the state that a step gives, and one a token. (PonderNet's experiments have one gate a sequence;
the code of Universal Transformers, 1807.03819, reads the state before the step.) All steps run in training, where
tokens that would have left go on giving keys; at inference (exits.py) they keep their state.
"""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.cross_entropy import nll_sum
from loopformer.terms.expected import log_exit, whole
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


def log_geometric(steps: int, rate: float) -> Array:
  """f32[K]: log of rate (1 - rate)^(t-1) over t = 1..K, divided by its sum."""
  log_p = jnp.arange(steps) * jnp.log1p(-rate)
  return log_p - jax.nn.logsumexp(log_p)


@config_dataclass
class Geometric(Term):
  """KL(p || g) in nats, a mean over tokens by their weights: p the distribution of the exit step, g the geometric one
  of `rate`, cut after K steps and normalised (PonderNet, section 2). Its mean is near 1 / rate where K is large.

  The gradient goes to gate and model, none to the head. The rollout keeps every state, and all of its steps run.
  """
  roll: str
  rate: float

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise ConfigError(f'Geometric.rate = {self.rate}: a probability of leaving, above 0 and below 1')

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    log_p_KBT = log_exit(whole(rolls, self.roll).aux['halt'])
    log_g_K11 = log_geometric(len(log_p_KBT), self.rate)[:, None, None]
    return jnp.sum(jnp.exp(log_p_KBT) * (log_p_KBT - log_g_K11) * batch['weights'])


def shares(halt: Array, threshold: float) -> tuple[Array, Array]:
  """ACT's weights of the states after each step, and the step N at which a token leaves.

  N is the first step at which the summed gates reach 1 - threshold, K at the latest. A step before it weighs its gate,
  N the remainder R, what is left to one, and those after it nothing.

  Args:
    halt: f32[K, ...], the gate's logits; threshold: epsilon.

  Returns:
    (f32[K, ...], which sum to one; i32[...], 1..K, without gradient).
  """
  gate = jax.nn.sigmoid(halt)
  done = (jnp.cumsum(gate, 0) >= 1 - threshold).at[-1].set(True)
  last = done.argmax(0)
  step = jnp.arange(len(halt)).reshape(-1, *(1,) * last.ndim)
  before = jnp.where(step < last, gate, 0)
  return jnp.where(step == last, 1 - before.sum(0), before), last + 1


def _check_threshold(term):
  if not 0 <= term.threshold < 1:
    raise ConfigError(f'{type(term).__name__}.threshold = {term.threshold}: epsilon, from 0 to below 1')


@config_dataclass
class Averaged(Term):
  """Cross-entropy of the mean of the states by ACT's weights, a mean over tokens; what exits.ACT answers with.

  The gradient goes to gate, model and head. The rollout keeps every state, and all of its steps run.

  threshold: epsilon, below which nothing is left to wait for.
  """
  roll: str
  threshold: float = 0.01
  chunk: int | None = None

  def __post_init__(self):
    _check_threshold(self)

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    trace = whole(rolls, self.roll)
    assert trace.xs is not None
    share_KBT, _ = shares(trace.aux['halt'], self.threshold)
    mean_BTD = jnp.einsum('KBT,KBTD->BTD', share_KBT, trace.xs.astype(jnp.float32)).astype(trace.xs.dtype)
    return nll_sum(readout.read(mean_BTD), readout.table, batch['targets'], batch['weights'], self.chunk,
                   readout.dtype)


@config_dataclass
class Ponder(Term):
  """N + R, the steps and the remainder of ACT, a mean over tokens by their weights.

  N is a constant: the gradient is that of R alone, -1 for the gate of every step before N. It goes to gate and model.
  """
  roll: str
  threshold: float = 0.01

  def __post_init__(self):
    _check_threshold(self)

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    share_KBT, steps_BT = shares(whole(rolls, self.roll).aux['halt'], self.threshold)
    rest_BT = jnp.take_along_axis(share_KBT, steps_BT[None] - 1, 0)[0]
    return jnp.sum((steps_BT + rest_BT) * batch['weights'])
