"""The alignment of a student whose loops share rows with its teacher (MELT, section 4)."""
from __future__ import annotations

from typing import Mapping

import jax
import jax.numpy as jnp

from loopformer.terms.distill import check_alike, pair
from loopformer.terms.term import Taught
from loopformer.types import Array, Batch, Params, Readout, Trace, config_dataclass


@config_dataclass
class Aligned(Taught):
  """mean((o - stop_gradient(o_teacher))^2) of what attention gives, after its last projection, in every step and layer:
  a mean over steps, layers and width, and over tokens by their weights (MELT, section 3).

  The cells give it as aux['attention'], [K, N, B, T, D]: the student's is `Gated`; the teacher's too, or, of a teacher
  of its own make, `WithAttention`. roll, teacher: as of `Distill`.
  """
  roll: str
  teacher: str

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    own, taught = pair(self, rolls, lambda trace: trace.aux.get('attention'),
                        'does not tell what attention gives: use a cell that does, such as papers/melt/cell.py, or '
                        'for a teacher weights_of=papers.melt.teacher.OwnWithAttention(folder=...)')
    check_alike(self, own.shape, taught.shape, 'give both rollouts the same steps, and a teacher of as many layers and '
                'of the same width')
    apart = jnp.square(own.astype(jnp.float32) - jax.lax.stop_gradient(taught).astype(jnp.float32))
    return jnp.sum(apart.mean((0, 1, -1)) * batch['weights'])
