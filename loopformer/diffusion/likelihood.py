"""Likelihoods of texts by the bound, for the harness."""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans, sharding
from loopformer.diffusion.noise import check_model, hidden_exactly, key_of
from loopformer.inference.harness import Scorer
from loopformer.terms.cross_entropy import token_answers
from loopformer.training import processes
from loopformer.types import Array, ConfigError, Params, Plan, whole

DRAWS = 32  # masks of a continuation; one is enough for one token (LLaDA takes 128)


@functools.partial(jax.jit, static_argnums=(0, 1))
def bound_rows(model: Any, draws: int, params: Params, tokens: Array, asked: Array, segments: Array, plan: Plan,
               vocab: Array) -> tuple[Array, Array]:
  """(bounds on log-likelihoods f32[B], whether every token is the likeliest where all asked ones are hidden bool[B]).

  Args:
    tokens: i32[B, T], contexts and continuations, padded at the end, where segments i32[B, T] are 0; asked: bool[B, T],
      continuations. Of n tokens exactly l are hidden, and weigh n / l; l is spread evenly over 1..n.
    vocab: i32[], ids of the tokenizer; the likeliest is one of them.
  """
  n = asked.sum(-1)
  keys = jax.vmap(functools.partial(key_of, 0, place=0))(jnp.where(segments > 0, tokens, 0))
  start = jax.vmap(jax.random.uniform)(keys)

  def answers(hidden):
    trace = model.apply({'params': params}, jnp.where(hidden, model.outputs, tokens), plan, seg=segments)
    table = model.apply({'params': params}, method='table')
    return token_answers(trace.z, table, tokens, None, model.dtype, vocab)

  def one(draw):
    count = jnp.clip(1 + jnp.floor(jnp.mod(start + draw / draws, 1.0) * n).astype(jnp.int32), 1, jnp.maximum(n, 1))
    hidden = hidden_exactly(jax.vmap(lambda key: jax.random.fold_in(key, 1 + draw))(keys), asked, count)
    return -jnp.where(hidden, answers(hidden)[0], 0.0).sum(-1) * n / count

  bounds = jax.lax.map(one, jnp.arange(draws)).mean(0)
  return bounds, (answers(asked)[1] | ~asked).all(-1)


class Bounds(Scorer):
  """As Scorer, of a model that denoises: a log-likelihood is a lower bound, estimated by `draws` masks of the
  continuation, all of whose context is visible; and a continuation counts as the likeliest where every token of it is,
  all being hidden.

  A text is not the sum of its parts: bounds of texts of unlike lengths are of unlike tightness.
  """
  likelihood = 'bound'
  unread = 0

  def __init__(self, *args: Any, draws: int = DRAWS, **options: Any):
    self.draws = whole('draws', draws, 1)
    super().__init__(*args, **options)

  def check(self, model: Any, params: Params, exit: Any):
    """Raises ConfigError where the model does not denoise, or is to stop token by token."""
    check_model(model, model.outputs)
    if exit is not None:
      raise ConfigError(f'exit = {exit}: a denoiser answers for all tokens at once; leave it out')

  def _score_batch(self, rows, width):
    tokens, segments = np.zeros((2, self.batch, width), np.int32)
    asked = np.zeros((self.batch, width), bool)
    for i, (_, ids, count) in enumerate(rows):
      tokens[i, :len(ids)], segments[i, :len(ids)], asked[i, len(ids) - count:len(ids)] = ids, 1, True
    given = {'tokens': tokens, 'asked': asked, 'segments': segments}
    if self._mesh is not None:
      given = sharding.spread(given, self._mesh)
    plan = plans.schedule(self.steps, max(len(self.steps), self.model.loops))
    with sharding.on(self._mesh):
      scores = bound_rows(self.model, self.draws, self.params, **given, plan=plan,
                          vocab=jnp.int32(self.tokenizer.vocab_size))
    total, likeliest = processes.fetch(scores)
    self._taken += float(asked.sum()) * len(self.steps)
    self._tokens += int(asked.sum())
    return list(zip(total.tolist(), likeliest.tolist()))[:len(rows)]
