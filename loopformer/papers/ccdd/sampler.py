"""Writing tokens and latents together (CCDD)."""
from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from loopformer import sharding
from loopformer.diffusion.sampler import Denoising, Moment, Predictor, Rows, guided
from loopformer.papers.ccdd.cell import last_guess
from loopformer.papers.ccdd.plans import with_latents
from loopformer.papers.ccdd.prepare import Apart, Slower, Together
from loopformer.papers.ccdd.process import DDIM, DDPM, VP, Flow, Quadratic
from loopformer.types import Array, ConfigError, Params, Plan, config_dataclass, whole

LEAST = 1e-3  # time of tokens and latents but for their end; training has none before it


def noise_of(keys: Array, length: int, width: int) -> Array:
  """f32[B, T, d], N(0, 1), of keys [B]; what a position draws does not depend on the length of the row."""
  names = jnp.arange(length) + 2 ** 17  # planners and tokens draw under others

  def draw(key, i):
    return jax.random.normal(jax.random.fold_in(key, i), (width,))

  return jax.vmap(lambda key: jax.vmap(lambda i: draw(key, i))(names))(keys)


@dataclasses.dataclass(frozen=True)
class Both:
  """The predictor that a model of tokens and latents is: it keeps the latents, f32[B, T, d], from step to step.

  plan, segments: as of `Network`; guidance: against the same with latents 0; times: of latents.
  """
  model: Any
  params: Params
  plan: Plan
  segments: Array
  process: VP | Flow | Quadratic
  update: DDIM | DDPM
  guidance: float = 0.0
  times: Together | Apart | Slower = Together()

  def __call__(self, tokens: Array, carry: Array, moment: Moment) -> tuple[Array, Array]:
    begins, ends = moment.times
    own = jnp.maximum(begins, LEAST)  # those of sequences that are done are below 0
    t, s = (jnp.maximum(self.times.beside(jnp.maximum(time, LEAST)), LEAST) for time in (begins, ends))
    times, s = (own, t), jnp.where(ends > 0, s, 0.0)
    logits, guess = self._answers(tokens, carry, times, moment)
    if self.guidance:
      logits = guided(logits, self._answers(tokens, jnp.zeros_like(carry), times, moment)[0], self.guidance)
    new = self.update(self.process, carry, guess, t, s, noise_of(moment.keys, *carry.shape[1:]))
    return logits, jnp.where(moment.active[:, None, None], new, carry)

  def _answers(self, tokens, latents, times, moment):
    """(logits, guessed latents)."""
    assert self.plan.active is not None
    plan = dataclasses.replace(self.plan, active=self.plan.active & moment.active)
    variables = {'params': self.params}
    trace = self.model.apply(variables, tokens, with_latents(plan, latents, *times), seg=self.segments)
    logits = self.model.apply(variables, trace.z, method='logits')
    return sharding.whole(logits), sharding.whole(last_guess(trace.aux, self.plan.active))


@config_dataclass
class Coevolving(Denoising):
  """As Denoising, with latents that begin as noise and are denoised beside the tokens; no encoder is needed.

  latents: d, their channels; process: their noise in training; update: how they step back; times: of latents, as they
  were trained. guidance: w of logits (1 + w) c - w u, u being without latents (the paper's weight is 1 + w).
  """
  latents: int
  process: VP | Flow | Quadratic = VP()
  update: DDIM | DDPM = DDIM()
  times: Together | Apart | Slower = Together()

  def __post_init__(self):
    super().__post_init__()
    whole('sampler.latents', self.latents, 1)

  def score(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """Raises ConfigError: how likely a text is depends on the latents that it would be given."""
    raise ConfigError('sampler = Coevolving: how likely a text is depends on the latents beside it, which texts to be '
                      'scored do not have; measure by --mode=eval, or train masked_diffusion.py')

  def begin(self, model: Any, params: Params, rows: Rows) -> Array:
    """Latents before the first step, f32[B, T, d]."""
    return noise_of(jax.vmap(lambda key: jax.random.fold_in(key, 2 ** 31))(rows.keys), rows.tokens.shape[1],
                    self.latents)

  def predictor(self, model: Any, params: Params, rows: Rows) -> Predictor:
    """Made inside the compiled program, of the rows."""
    return Both(model, params, rows.plan, rows.segments, self.process, self.update, self.guidance, self.times)
