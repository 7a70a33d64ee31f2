"""The time of a denoiser, as an option: how much of a sequence is hidden."""
from __future__ import annotations

import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.nn.condition import ScalarEmbed
from loopformer.types import KV, Array, Context

SCALE = 1000.0  # of a share, so that sinusoids tell shares apart


class ToldHidden(Around):
  """Adds an embedding of the share of a sequence that is hidden to the state, before every step of the cell `of`.

  The share is what can be seen of the noise's time t, its mean where all may be hidden; so no plan, evaluation or
  sampler has to say the time. width: that of the model; mask: MASK. Raises ConfigError where the state is a tree.
  """
  width: int = 1
  mask: int = 1

  def setup(self):
    super().setup()
    self.told = ScalarEmbed(self.width)

  def __call__(self, x: Array, e: Array, ctx: Context, kv: KV | None) -> tuple[Array, KV | None, dict]:
    tokens = ctx.ids('model.cell = ToldHidden')
    own = jnp.ones(tokens.shape) if ctx.seg is None else ctx.seg > 0
    share = ((tokens == self.mask) & (own > 0)).sum(-1) / jnp.maximum(own.sum(-1), 1)
    return self.inner(self.of_one_array(x) + self.told(SCALE * share)[:, None].astype(x.dtype), e, ctx, kv)
