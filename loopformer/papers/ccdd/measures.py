"""What a model of tokens and latents reaches on tokens (CCDD), and what that number may be called."""
from __future__ import annotations

import functools
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from loopformer import sharding, storage
from loopformer.diffusion.measures import BETTER, Bound, key_of
from loopformer.inference.measures import LESS, MORE
from loopformer.nn.condition import TIME
from loopformer.papers.ccdd.encoders import Hidden, RandomContext, RandomTokens
from loopformer.papers.ccdd.plans import LATENT_TIME, LATENTS, with_latents
from loopformer.papers.ccdd.prepare import Apart, Clean, Corrupted, Slower, Together, with_latents_of
from loopformer.papers.ccdd.process import VP, Flow, Quadratic, Signal
from loopformer.training.checkpoint import trained
from loopformer.types import Batch, Plan, config_dataclass


def weights_of(encoder: Hidden, mesh: jax.sharding.Mesh | None) -> Any:
  """The weights that an encoder needs, on the devices of the batches that it encodes; read once, and again where its
  run has gone on."""
  return _weights_at(encoder, trained(storage.path(encoder.folder)), mesh)


@functools.lru_cache(maxsize=4)
def _weights_at(encoder, step, mesh):
  from loopformer.api import load
  return load(encoder.folder, mesh=mesh).params


@config_dataclass
class JointBound(Bound):
  """As Bound, with noised latents beside the tokens.

  With `Corrupted` latents the loss is a bound. With those of the `Clean` sequence visible positions know hidden ones:
  the number is `conditional`, it may be below the entropy of the data, and it has no perplexity. Latent times that are
  `Apart` are drawn for every mask of every sequence, the same for all models and depths.
  """
  encoder: RandomContext | RandomTokens | Hidden
  process: VP | Flow | Quadratic = VP()
  source: Clean | Corrupted = Corrupted()
  times: Together | Apart | Slower = Together()

  @property
  def better(self) -> dict[str, int]:
    """As of Bound, under the number's name."""
    return BETTER if self.source.bounds else {'conditional': LESS, 'accuracy': MORE}

  def asked(self, batch: Batch) -> Batch:
    """The batch in which tokens are hidden, with latents."""
    weights, mesh = None, sharding.mesh_of(batch['targets'])
    if self.encoder.teacher is not None:
      weights = weights_of(self.encoder, mesh)
    with sharding.on(mesh):
      return self._with_latents(super().asked(batch), weights)

  def told(self, plan: Plan, batch: Batch) -> Plan:
    """The plan, with the batch's latents and times."""
    return with_latents(plan, batch[LATENTS], batch[TIME], batch[LATENT_TIME])

  @functools.partial(jax.jit, static_argnums=0)
  def _with_latents(self, batch, weights):
    rows = jnp.arange(len(batch['tokens']))
    place, draw = batch['row'] if 'row' in batch else rows // self.draws, rows % self.draws
    keys = jax.vmap(lambda ids, place, draw: jax.random.fold_in(key_of(self.seed, ids, place), 2 ** 20 + draw))(
        batch['targets'], place, draw)
    # of every sequence, place and draw
    number = jax.vmap(lambda key: jax.random.bits(jax.random.fold_in(key, 1)))(keys)
    time = self.times(jax.random.fold_in(jax.random.key(self.seed), 1), number, batch[TIME])
    return with_latents_of(batch, encode=lambda tokens: self.encoder(tokens, batch.get('segments'), weights),
                           source=self.source, process=self.process, latent_time=jnp.clip(time, 1e-3, 1.0),
                           latent_weight=Signal(), keys=keys)

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table."""
    row = super().row(total)
    if self.source.bounds:
      return row
    return {'conditional': row['loss'], **{name: row[name] for name in ('error', 'accuracy', 'tokens')}}
