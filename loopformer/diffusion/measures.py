"""The bound on the likelihood, as a measure: of every budget, schedule and exit that is evaluated."""
from __future__ import annotations

import functools
import math
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from loopformer.diffusion.noise import hidden_exactly, hide, key_of
from loopformer.inference.measures import LESS, MORE, AsGiven, Sums, counted
from loopformer.terms.cross_entropy import token_answers
from loopformer.types import Array, Batch, Readout, config_dataclass, whole

BETTER = {'loss': LESS, 'error': LESS, 'perplexity': LESS, 'bits_per_byte': LESS, 'accuracy': MORE}


@config_dataclass
class Bound(AsGiven):
  """The negative evidence lower bound in nats a token, an upper bound on the loss; its exponential; of text, bits a
  byte.

  Of every sequence of n tokens that may be hidden, exactly l are, l uniform on 1..n and they drawn without replacement,
  and weigh n / l (LLaDA): of the same mean as the bound at chance times, and less spread. `accuracy` is that of hidden
  tokens by these weights; `error`, one standard error of the loss, of what was drawn.

  mask: MASK. draws: masks of every sequence; its l are spread evenly. seed: of the masks, which depend on it, on the
  sequence and its place in the batch, so that all depths and models are asked for the same.
  """
  mask: int
  draws: int = 1
  seed: int = 0

  @property
  def better(self) -> dict[str, int]:
    """Numbers of a row."""
    return BETTER

  def __post_init__(self):
    whole('measure.mask', self.mask, 1)
    whole('measure.draws', self.draws, 1)

  def asked(self, batch: Batch) -> Batch:
    """The batch in which tokens are hidden, `draws` rows of every one."""
    return self._hidden(batch)

  @functools.partial(jax.jit, static_argnums=0)
  def _hidden(self, batch):
    rows = len(batch['targets'])
    batch = {name: jnp.repeat(jnp.asarray(leaf), self.draws, 0) for name, leaf in batch.items()}
    row, draw = (jnp.arange(rows * self.draws) // self.draws), jnp.arange(rows * self.draws) % self.draws
    place = batch['row'] if 'row' in batch else row
    keys = jax.vmap(functools.partial(key_of, self.seed))(batch['targets'], place)
    maskable = batch['weights'] > 0
    n = maskable.sum(-1)
    u = jnp.mod(jax.vmap(jax.random.uniform)(keys) + draw / self.draws, 1.0)
    count = jnp.minimum(1 + jnp.floor(u * n).astype(jnp.int32), n)
    hidden = hidden_exactly(jax.vmap(jax.random.fold_in)(keys, 1 + draw), maskable, count)
    return {**hide(batch, hidden, n / jnp.maximum(count, 1), count / jnp.maximum(n, 1), self.mask),
            'before': batch['tokens']}

  def sums(self, readout: Readout, z: Array, batch: Batch, byte_lengths: Array | None) -> Sums:
    nll, right = token_answers(z, readout.table, batch['targets'], None, readout.dtype)
    weights, given = batch['weights'], batch['maskable']
    of_row = (nll * weights).sum(-1)
    sums = {'nll': of_row.sum(), 'squares': jnp.square(of_row).sum(), 'tokens': given.sum(),
            'right': (right * weights).sum(), 'weight': weights.sum(), 'rows': counted(batch).sum(),
            'bytes': jnp.float32(0)}
    if byte_lengths is None:
      return sums
    inside, first = byte_lengths if byte_lengths.ndim == 2 else (byte_lengths, byte_lengths)
    begins = inside[batch['before']] == 0  # after the end of another text
    return {**sums, 'bytes': (given * jnp.where(begins, first[batch['targets']], inside[batch['targets']])).sum()}

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table."""
    rows, loss = max(total['rows'], 1), total['nll'] / total['tokens']
    text = {'bits_per_byte': total['nll'] / math.log(2) / total['bytes']} if total['bytes'] else {}
    spread = max(total['squares'] / rows - (total['nll'] / rows) ** 2, 0.0) / rows
    return {'loss': loss, 'error': math.sqrt(spread) * rows / total['tokens'], 'perplexity': math.exp(min(loss, 700.0)),
            **text, 'accuracy': total['right'] / total['weight'], 'tokens': int(total['tokens'] / self.draws)}
