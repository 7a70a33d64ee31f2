"""Measures: what is reported of a batch. Frozen parts: sums over a batch, and the row that totals of them make.

`better` declares the numbers of a row: name -> MORE or LESS, which of two values is the better one.
"""
from __future__ import annotations

import math
from typing import Any, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import sharding
from loopformer.terms.cross_entropy import nll_sum
from loopformer.types import Array, Batch, Plan, Readout, config_dataclass

Sums = dict[str, Array]
MORE, LESS = 1, -1  # signs: the better of two values is the larger one after multiplication by it


def counted(batch: Batch) -> Array:
  """f32[B]: 1 for every sequence, 0 for rows that only fill up a batch, whose `counted` says so."""
  return batch['counted'] if 'counted' in batch else jnp.ones(len(batch['weights']))


def main_number(measure: Any) -> str:
  """The number by which a measure is known, the first that it declares: `loss`, unless that is no name for it."""
  return next(iter(measure.better))


def text_bytes(tokenizer: Any) -> np.ndarray:
  """i32[2, V]: the UTF-8 bytes that each id of a tokenizer stands for within a text, and where a text begins with it.
  """
  return np.stack([tokenizer.byte_lengths(), tokenizer.first_byte_lengths()])


def _nll(readout, z, batch):
  return sharding.sum_over_rows(
      lambda z, targets, weights, table: nll_sum(z, table, targets, weights, None, readout.dtype),
      z, batch['targets'], batch['weights'], whole=readout.table)


class AsGiven:
  """A measure that asks for a batch as it is."""
  mask: int | None = None

  def asked(self, batch: Batch) -> Batch:
    """The batch that the model reads: the same."""
    return batch

  def told(self, plan: Plan, batch: Batch) -> Plan:
    """The plan that runs, by what the batch tells it: as it is."""
    return plan


@config_dataclass
class Tokens(AsGiven):
  """Loss in nats a token, perplexity, bits per byte of text."""
  better = {'loss': LESS, 'perplexity': LESS, 'bits_per_byte': LESS}

  def sums(self, readout: Readout, z: Array, batch: Batch, byte_lengths: Array | None) -> Sums:
    """f32[] each. byte_lengths: i32[2, V], UTF-8 bytes that each token stands for, as of `text_bytes`; or i32[V]; None
    where tokens are no text, and bits_per_byte is NaN."""
    totals = {'nll': _nll(readout, z, batch), 'tokens': batch['weights'].sum()}
    if byte_lengths is None:
      return {**totals, 'bytes': jnp.float32(0)}
    inside, first = byte_lengths if byte_lengths.ndim == 2 else (byte_lengths, byte_lengths)
    begins = inside[batch['tokens']] == 0  # after the end of another text
    size = (batch['weights'] * jnp.where(begins, first[batch['targets']], inside[batch['targets']])).sum()
    return {**totals, 'bytes': size}

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table."""
    loss = total['nll'] / total['tokens']
    return {'loss': loss, 'perplexity': math.exp(min(loss, 700.0)),
            'bits_per_byte': total['nll'] / math.log(2) / total['bytes'] if total['bytes'] else math.nan,
            'tokens': int(total['tokens'])}


@config_dataclass
class Answers(AsGiven):
  """Loss; accuracy over all answer tokens; `exact`, sequences whose answers are all right; `last`, their last ones."""
  better = {'loss': LESS, 'accuracy': MORE, 'exact': MORE, 'last': MORE}

  def sums(self, readout: Readout, z: Array, batch: Batch, byte_lengths: Array | None) -> Sums:
    logits_BTV = readout.logits(z)
    asked = batch['weights'] > 0
    right = (logits_BTV.argmax(-1) == batch['targets']) & asked
    last = jnp.where(asked, jnp.arange(asked.shape[1]), -1).argmax(-1)
    rows = counted(batch)
    return {'nll': _nll(readout, z, batch), 'weight': batch['weights'].sum(),
            'right': right.sum(), 'tokens': asked.sum(), 'exact': ((right == asked).all(-1) * rows).sum(),
            'last': jnp.take_along_axis(right, last[:, None], 1).sum(), 'rows': rows.sum()}

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table."""
    return {'loss': total['nll'] / total['weight'], 'accuracy': total['right'] / total['tokens'],
            'exact': total['exact'] / total['rows'], 'last': total['last'] / total['rows'],
            'tokens': int(total['tokens'])}


@config_dataclass
class Errors(AsGiven):
  """Mean squared error over all answers, and over the last of every sequence, in units of `scale`."""
  better = {'loss': LESS, 'last': LESS}
  scale: float = 1.0

  def sums(self, readout: Readout, z: Array, batch: Batch, byte_lengths: Array | None) -> Sums:
    error_BT = squared_error(readout, z, batch)
    asked = batch['weights'] > 0
    last = jnp.where(asked, jnp.arange(asked.shape[1]), -1).argmax(-1)
    rows = counted(batch)
    return {'error': (error_BT * batch['weights']).sum(), 'tokens': batch['weights'].sum(),
            'last': (jnp.take_along_axis(error_BT, last[:, None], 1)[:, 0] * rows).sum(), 'rows': rows.sum()}

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table."""
    return {'loss': total['error'] / total['tokens'] / self.scale, 'last': total['last'] / total['rows'] / self.scale,
            'tokens': int(total['tokens'])}


def squared_error(readout: Readout, z: Array, batch: Batch) -> Array:
  """f32[..., B, T]: of z [..., B, T, D] against targets f32[B, T] or [B, T, outputs], the mean over outputs."""
  answers = jnp.einsum('...D,OD->...O', z, readout.table.astype(z.dtype), preferred_element_type=jnp.float32,
                       precision=jax.lax.Precision.HIGHEST)
  targets = batch['targets']
  return jnp.square(answers - targets.reshape(*targets.shape[:2], -1)).mean(-1)
