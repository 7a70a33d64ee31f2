"""Averaging-hard attention, for weights that are constructed and not learned."""
from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from loopformer.nn.kernels import NEGATIVE
from loopformer.types import Array, ConfigError, config_dataclass, real


@config_dataclass
class AveragingHard:
  """The mean of the values of all keys with the highest score: the limit of softmax(scores / temperature) at
  temperature 0 (2503.03961, section 2).

  tolerance: scores this near to the highest count as equal to it, as a part of the query's largest absolute score.
  masked: whether queries read no token after them. Scores are float32. It has no useful gradient, and gives none.

  For the pass without cache alone: caches are read by a softmax.
  """
  tolerance: float = 1e-4
  masked: bool = True
  causal = False

  def __post_init__(self):
    real('kernel.tolerance', self.tolerance, '[0, 1)')

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]. Raises ConfigError where a gradient
    is asked for."""
    each = q.shape[2] // k.shape[2]
    return _attend(self.tolerance, q, jnp.repeat(k, each, 2), jnp.repeat(v, each, 2), self._mask(q, seg))

  def weights(self, q: Array, k: Array, seg: Array | None) -> Array:
    """What it gives to every key, f32[B, H, T, T]: the same to all that have the highest score."""
    chosen = _chosen(self.tolerance, q, jnp.repeat(k, q.shape[2] // k.shape[2], 2), self._mask(q, seg))
    return chosen / chosen.sum(-1, keepdims=True)

  def _mask(self, q, seg):
    length = q.shape[1]
    mask = jnp.ones((1, length, length), bool)
    if self.masked:
      mask &= jnp.tri(length, dtype=bool)
    if seg is not None:
      mask &= seg[:, :, None] == seg[:, None]
    return mask


_exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _chosen(tolerance, q_BTHd, k_BSHd, mask_BTS):
  """f32[B, H, T, S]: 1 for every key with the highest score."""
  scores_BHTS = _exact('BTHd,BSHd->BHTS', q_BTHd, k_BSHd)
  seen = mask_BTS[:, None]
  best = jnp.where(seen, scores_BHTS, NEGATIVE).max(-1, keepdims=True)
  scale = jnp.where(seen, jnp.abs(scores_BHTS), 0).max(-1, keepdims=True)
  return (seen & (scores_BHTS >= best - tolerance * scale)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tolerance, q_BTHd, k_BSHd, v_BSHd, mask_BTS):
  chosen = _chosen(tolerance, q_BTHd, k_BSHd, mask_BTS)
  out_BTHd = _exact('BHTS,BSHd->BTHd', chosen, v_BSHd.astype(jnp.float32))
  return (out_BTHd / chosen.sum(-1).swapaxes(1, 2)[..., None]).astype(q_BTHd.dtype)


def _forward(tolerance, *operands):
  raise ConfigError('kernel = AveragingHard(): which keys it chooses has no gradient; train with a softmax, such as '
                    'kernels.Fused')


_attend.defvjp(_forward, lambda *_: ())
