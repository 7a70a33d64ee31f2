"""What routers learn, besides what their gates learn from the loss itself (Mixture-of-Recursions, section 3).

All read the auxiliaries of a rollout through cells/cell.py, [K, B, T] of K recursions:

    expert choice   'lm': Weighted(1.0, CE(roll='all')), 'router': Weighted(0.001, RouterBCE(roll='all'))
    token choice    'lm': Weighted(1.0, CE(roll='all')), 'balance': Weighted(0.1, Balance(roll='all'))

The released code divides the cross-entropy by the tokens of the whole accumulated batch and the router's loss by those
of a microbatch: with 16 of them its coefficient of 0.001 is 0.016 here, where every mean is one over the whole batch.
"""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


class OfRouter(Term):
  """A mean over sequences."""

  def weight(self, batch: Batch) -> Array:
    """f32[]: the sequences."""
    return jnp.float32(len(batch['tokens']))


def routed(rolls: Mapping[str, Trace], name: str, *needed: str) -> dict[str, Array]:
  """Auxiliaries of a rollout. Raises ConfigError where its router does not give those that are needed."""
  aux = rolls[name].aux
  missing = [key for key in ('taken', *needed) if key not in aux]
  if missing:
    raise ConfigError(f'objective: the rollout {name!r} has no {", ".join(missing)} of a router; use cells/cell.py '
                      'with ExpertChoice (BCE; with an auxiliary router for its own) or TokenChoice (balance)')
  return aux


def over_candidates(values: Array, aux: Mapping[str, Array]) -> Array:
  """f32[]: the mean over a recursion's candidates of values [K, B, T], summed over recursions and sequences."""
  candidate = aux['candidate']
  total = jnp.where(candidate, values, 0).sum(-1)
  return (total / jnp.maximum(candidate.sum(-1), 1)).sum()


def bce(logit: Array, target: Array) -> Array:
  """-target log sigmoid(logit) - (1 - target) log sigmoid(-logit)."""
  return jax.nn.softplus(logit) - target * logit


@config_dataclass
class RouterBCE(OfRouter):
  """sum over recursions of the mean over their candidates of BCE(score, whether it was taken): it separates the scores
  of those taken and not, so that a threshold can answer (expert choice).

  of: whose score, the router's, or 'auxiliary', the router's that answers instead and learns from this term alone.
  """
  roll: str
  of: str = 'score'

  def __post_init__(self):
    if self.of not in ('score', 'auxiliary'):
      raise ConfigError(f'RouterBCE.of = {self.of!r}: use \'score\' or \'auxiliary\'')

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = routed(rolls, self.roll, self.of)
    return over_candidates(bce(aux[self.of], aux['taken']), aux)


@config_dataclass
class SquaredScore(OfRouter):
  """The z-loss of routers with one score: the mean of s^2 over a recursion's candidates, summed over recursions."""
  roll: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = routed(rolls, self.roll, 'score')
    return over_candidates(jnp.square(aux['score']), aux)


@config_dataclass
class SquaredLogSum(OfRouter):
  """The z-loss of a router with a score for every recursion: the mean over tokens of logsumexp(s)^2 (token choice)."""
  roll: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = routed(rolls, self.roll, 'score', 'share')
    square = jnp.square(jax.nn.logsumexp(aux['score'], 0))
    return over_candidates(square[None], {'candidate': aux['candidate'][:1]})


def loads(taken: Array) -> Array:
  """bool[K, B, T], which tokens took each recursion -> f32[K]: the tokens whose last one it is."""
  last = taken & ~jnp.concatenate([taken[1:], jnp.zeros_like(taken[:1])])
  return last.sum((1, 2)).astype(jnp.float32)


@config_dataclass
class Balance(OfRouter):
  """sum_i f_i P_i, f_i = K * the fraction of tokens that end with recursion i (a constant), P_i the mean share that the
  router gives to it (token choice). 1 at perfect balance.

  Over the sequences of one device and microbatch, as in the released code: a product of means is none over parts.
  """
  roll: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = routed(rolls, self.roll, 'share')
    candidate = aux['candidate']
    tokens = jnp.maximum(candidate[0].sum(), 1)
    f_K = len(candidate) * loads(aux['taken']) / tokens
    p_K = jnp.where(candidate, aux['share'], 0).sum((1, 2)) / tokens
    return jnp.sum(jax.lax.stop_gradient(f_K) * p_K) * len(batch['tokens'])


@config_dataclass
class LoadBias(Term):
  """Zero, whose gradient of the bias of TokenChoice is every recursion's load less the mean one, a token.

  routing.LossFree takes its sign: over the whole batch, since loads add up.
  """
  roll: str

  def weight(self, batch: Batch) -> Array:
    return jnp.float32(batch['tokens'].shape[0] * batch['tokens'].shape[1])

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    aux = routed(rolls, self.roll, 'share')
    if 'bias' not in params['cell']['router']:
      raise ConfigError('objective: LoadBias moves a bias that the router does not have; use TokenChoice(bias='
                        'Normal(0.0))')
    bias, load = params['cell']['router']['bias'], loads(aux['taken'])
    return jnp.sum(jax.lax.stop_gradient(load - load.mean()) * (bias - jax.lax.stop_gradient(bias)))
