"""Cross-entropy of the next token that never holds [tokens, vocabulary] whole."""
from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from loopformer import backend
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, Params, Readout, Trace, config_dataclass


def at_once(chunk: int | None, tokens: int) -> int:
  """Of so many tokens, those whose logits are held at once: `chunk`, or what the backend wants (backend.py)."""
  return min(chunk or backend.current().logits_at_once, tokens)

@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def nll_sum(z: Array, table: Array, targets: Array, weights: Array, chunk: int | None = None,
            dtype: Any = None) -> Array:
  """f32[]: sum of weights * -log softmax(z table^T)[targets], over chunks of tokens.

  Differentiable in z, table and weights. The gradient is formed in the forward pass, chunk by chunk: that saves the
  backward pass the product that would recompute the logits, for a buffer of the size of z and one of the table's.

  Args:
    z: [..., D]; table: f32[V, D]; targets: i32[...]; weights: f32[...]; chunk: see `at_once`; dtype: of the operands of
      products, which are summed in float32; that of z by default.
  """
  chunks = _chunks(z.astype(dtype or z.dtype), targets, weights, chunk)
  table = table.astype(dtype or z.dtype)

  def body(total, row):
    z_nD, target_n, weight_n = row
    logits_nV, lse_n = _logits(z_nD, table)
    return total + jnp.sum(weight_n * (lse_n - _pick(logits_nV, target_n))), None

  return jax.lax.scan(body, jnp.float32(0), chunks)[0]


def token_nll(z: Array, table: Array, targets: Array, chunk: int | None = None, dtype: Any = None) -> Array:
  """f32[...]: -log softmax(z table^T)[targets] of every token, over chunks of tokens; constants, without gradient.

  Args:
    z: [..., D]; table: f32[V, D]; targets: i32[...]; chunk, dtype: as of `nll_sum`.
  """
  return token_answers(z, table, targets, chunk, dtype)[0]


def token_answers(z: Array, table: Array, targets: Array, chunk: int | None = None, dtype: Any = None,
                  vocab: Array | None = None) -> tuple[Array, Array]:
  """As `token_nll`, and whether the target is the likeliest answer, bool[...], of the first `vocab` (i32[]) where
  given.
  """
  z, table = jax.lax.stop_gradient((z.astype(dtype or z.dtype), table.astype(dtype or z.dtype)))

  def one(row):
    z_nD, target_n, _ = row
    logits_nV, lse_n = _logits(z_nD, table)
    shown = logits_nV if vocab is None else jnp.where(jnp.arange(logits_nV.shape[-1]) < vocab, logits_nV, -jnp.inf)
    return lse_n - _pick(logits_nV, target_n), shown.argmax(-1) == target_n

  chunks = _chunks(z, targets, jnp.ones(targets.shape), chunk)
  return jax.tree.map(lambda leaf: leaf.reshape(-1)[:targets.size].reshape(targets.shape), jax.lax.map(one, chunks))


def _chunks(z, targets, weights, chunk):
  """Flattened, padded by tokens of weight zero, and cut: [chunks, chunk, ...]."""
  count = targets.size
  chunk = at_once(chunk, count)
  pad = -count % chunk

  def cut(array, trailing):
    array = jnp.pad(array.reshape(count, *trailing), ((0, pad), *((0, 0),) * len(trailing)))
    return array.reshape(-1, chunk, *trailing)

  return cut(z, z.shape[-1:]), cut(targets, ()), cut(weights, ())


def _logits(z_nD, table_VD):
  logits_nV = jnp.einsum('nD,VD->nV', z_nD, table_VD, preferred_element_type=jnp.float32)
  return logits_nV, jax.nn.logsumexp(logits_nV, -1)


def _pick(logits_nV, target_n):
  return jnp.take_along_axis(logits_nV, target_n[:, None], -1)[:, 0]


def _forward(z, table, targets, weights, chunk, dtype):
  dtype = dtype or z.dtype
  chunks = _chunks(z.astype(dtype), targets, weights, chunk)
  cast = table.astype(dtype)

  def body(carry, row):
    total, dtable_VD = carry
    z_nD, target_n, weight_n = row
    logits_nV, lse_n = _logits(z_nD, cast)
    nll_n = lse_n - _pick(logits_nV, target_n)
    total += jnp.sum(weight_n * nll_n)
    hit_nV = jnp.arange(cast.shape[0]) == target_n[:, None]
    error_nV = ((jnp.exp(logits_nV - lse_n[:, None]) - hit_nV) * weight_n[:, None]).astype(dtype)
    dtable_VD += jnp.einsum('nV,nD->VD', error_nV, z_nD, preferred_element_type=jnp.float32)
    dz_nD = jnp.einsum('nV,VD->nD', error_nV, cast, preferred_element_type=jnp.float32).astype(z.dtype)
    return (total, dtable_VD), (dz_nD, nll_n)

  start = jnp.float32(0), jnp.zeros(table.shape, jnp.float32)
  (total, dtable), (dz, nll) = jax.lax.scan(body, start, chunks)
  dz = dz.reshape(-1, z.shape[-1])[:targets.size].reshape(z.shape)
  return total, (dz, dtable.astype(table.dtype), nll.reshape(-1)[:targets.size].reshape(targets.shape))


def _backward(chunk, dtype, saved, g):
  dz, dtable, nll = saved
  return (dz * g).astype(dz.dtype), (dtable * g).astype(dtable.dtype), None, nll * g


nll_sum.defvjp(_forward, _backward)


@config_dataclass
class CE(Term):
  """Cross-entropy at the end of the rollout `roll`; a mean over tokens by their weights."""
  roll: str
  chunk: int | None = None

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    return nll_sum(rolls[self.roll].z, readout.table, batch['targets'], batch['weights'], self.chunk,
                   readout.dtype)
