"""Tokens that are drawn: the distribution, the draw, and the verdict on drafts."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from loopformer.types import Array, ConfigError, config_dataclass, real, shown, whole

BLOCK = 128  # tokens of the vocabulary whose probabilities are summed first
COLDEST, HOTTEST = 1e-30, 1e6  # temperatures: logits are finite when divided by them


@struct.dataclass
class SamplingParams:
  """How tokens are drawn. temperature: f32[B], 0 takes the likeliest; top_k: i32[B], V for all; top_p: f32[B], 1 for
  all; vocab: i32[B], ids that there are: those from there to V, by which a model's vocabulary is padded, are not drawn.
  """
  temperature: Array
  top_k: Array
  top_p: Array
  vocab: Array


@config_dataclass
class Contrast:
  """Deep against shallow answers (after DoLa, 2309.03883, which contrasts layers): log p_deep - weight log p_shallow,
  among the tokens whose p_deep is `plausible` times the likeliest one's or more.

  shallow: loops of the shallow answer, 0 for the state that the loop begins with: of a plain decoder that was imported
  with a prelude, what its later layers are contrasted with. weight: of one, what loops have agreed on decides nothing;
  of 0, the deep answer, cut.
  """
  shallow: int = 1
  plausible: float = 0.1
  weight: float = 1.0

  def __post_init__(self):
    whole('contrast.shallow', self.shallow, 0)
    real('contrast.plausible', self.plausible, '(0, 1]')
    real('contrast.weight', self.weight, '[0, 1]')

  def logits(self, deep: Array, shallow: Array, vocab: Array) -> Array:
    """Logits f32[B, V] twice, ids that there are i32[B] -> logits f32[B, V], -inf where a token is implausible."""
    known = jnp.arange(deep.shape[-1]) < vocab[:, None]
    deep, shallow = (jax.nn.log_softmax(jnp.where(known, logits, -jnp.inf)) for logits in (deep, shallow))
    kept = known & (deep >= deep.max(-1, keepdims=True) + jnp.log(self.plausible))
    return jnp.where(kept, deep - self.weight * jnp.maximum(shallow, -1e30), -jnp.inf)


def controls(vocab: int, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None) -> SamplingParams:
  """Checked sampling controls, arrays of no dimension. Raises ConfigError for values out of range."""
  real('temperature', temperature, f'[0, {HOTTEST:g}]', '0 takes the likeliest token')
  top_k = vocab if top_k is None else whole('top_k', top_k, 1)
  top_p = 1.0 if top_p is None else real('top_p', top_p, '(0, 1]', 'None leaves all tokens')
  scalars: dict[str, Any] = {'temperature': np.float32(temperature), 'top_k': np.int32(min(top_k, vocab)),
                             'top_p': np.float32(top_p), 'vocab': np.int32(vocab)}  # on the host, where arrays will be
  return SamplingParams(**scalars)


def stops(texts: Any) -> tuple[str, ...]:
  """Texts before which a continuation ends. Raises ConfigError where they are none, or one is empty, or stands alone.
  """
  found = tuple(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else (None,)
  if not all(isinstance(text, str) and text for text in found):
    raise ConfigError(f'stop = {shown(texts)}: give a list of texts, none of them empty')
  return found


def sampling_logits(logits: Array, control: SamplingParams) -> Array:
  """f32[B, V] -> logits whose softmax is the distribution of the token, f32[B, V].

  Greedy rows leave one token. top-k first, then the fewest of those whose probability reaches top_p. A branch each,
  because to sort the vocabulary costs more than a small model's whole step.
  """
  greedy = control.temperature == 0
  logits = jnp.where(jnp.arange(logits.shape[-1]) < control.vocab[:, None], logits, -jnp.inf)
  filtered = ((control.top_k < control.vocab) | (control.top_p < 1)) & ~greedy
  temperature = jnp.where(greedy, 1.0, jnp.maximum(control.temperature, COLDEST))
  branch = jnp.where(filtered.any(), 2, jnp.where(greedy.all(), 0, 1))

  def hot(logits: Array) -> Array:
    likeliest = jnp.arange(logits.shape[-1]) == logits.argmax(-1, keepdims=True)
    return jnp.where(likeliest, 0.0, -jnp.inf)

  def scaled(logits: Array) -> Array:
    return jnp.where(greedy[:, None], hot(logits), logits / temperature[:, None])

  def cut(logits: Array) -> Array:
    warm = scaled(logits)
    return jnp.where(~filtered[:, None] | (warm >= _threshold(warm, control)), warm, -jnp.inf)

  return jax.lax.switch(branch, [hot, scaled, cut], logits)


def _threshold(scaled: Array, control: SamplingParams) -> Array:
  """f32[B, 1]: the least logit that top-k and top-p leave."""
  order = jnp.sort(scaled, -1, descending=True)
  within = jnp.arange(scaled.shape[-1]) < control.top_k[:, None]
  probability = jax.nn.softmax(jnp.where(within, order, -jnp.inf), -1)
  before = jnp.cumsum(probability, -1) - probability  # of all likelier tokens; the likeliest is always kept
  kept = (within & (before < control.top_p[:, None])).sum(-1)
  return jnp.take_along_axis(order, jnp.maximum(kept, 1)[:, None] - 1, -1)  # a top_p next to 0 leaves one


def sample(logits: Array, keys: Array) -> Array:
  """f32[B, V], keys [B] -> i32[B]: a token of each row's distribution; the likeliest where there is no other.

  One number a row, looked up in the sums of its probabilities, of blocks first and then within one: a number for every
  token of the vocabulary would cost more than a loop of a small model.
  """
  batch, vocab = logits.shape
  blocks = jnp.pad(jnp.exp(logits - logits.max(-1, keepdims=True)), ((0, 0), (0, -vocab % BLOCK)))
  blocks = blocks.reshape(batch, -1, BLOCK)
  upto = jnp.cumsum(blocks.sum(-1), -1)
  sought = jax.vmap(jax.random.uniform)(keys) * upto[:, -1]
  block = (upto <= sought[:, None]).sum(-1)  # the first beyond it, which is never empty
  own = blocks[jnp.arange(batch), block]
  before = jnp.where(block > 0, upto[jnp.arange(batch), block - 1], 0)
  inside = (jnp.cumsum(own, -1) <= jnp.maximum(sought - before, 0)[:, None]).sum(-1)
  last = BLOCK - 1 - (own[:, ::-1] > 0).argmax(-1)  # the block's sum, formed otherwise, may be a little less
  return (block * BLOCK + jnp.minimum(inside, last)).astype(jnp.int32)


def verify_draft(proposed: Array, guess: Array, truth: Array, keys: Array) -> tuple[Array, Array]:
  """What of a draft is kept, so that the tokens follow the distribution of all loops exactly (speculative sampling).

  Args:
    proposed: i32[B, A], drawn from the distributions of the draft, `guess` f32[B, A, V] (logits, as of
    `sampling_logits`).
    truth: f32[B, A + 1, V], the distributions of all loops at the same places and one more.
    keys: [B].

  Returns:
    (kept i32[B], the number of proposed tokens that stand; next i32[B], the token after them).
  """
  num_draft = proposed.shape[1]
  p, q = jax.nn.softmax(truth, -1), jax.nn.softmax(guess, -1)
  p_of = jnp.take_along_axis(p[:, :num_draft], proposed[..., None], -1)[..., 0]
  q_of = jnp.take_along_axis(q, proposed[..., None], -1)[..., 0]
  two = jax.vmap(jax.random.split)(keys)
  u = jax.vmap(lambda key: jax.random.uniform(key, (num_draft,)))(two[:, 0])
  stands = u * q_of < p_of
  kept = jnp.cumprod(stands, -1).sum(-1)
  at = kept[:, None, None]
  p_next = jnp.take_along_axis(p, at, 1)[:, 0]
  q_next = jnp.take_along_axis(jnp.pad(q, ((0, 0), (0, 1), (0, 0))), at, 1)[:, 0]  # nothing was proposed at the end
  rest = jnp.maximum(p_next - q_next, 0)
  rest = jnp.where(rest.sum(-1, keepdims=True) > 0, rest, p_next)
  return kept, sample(jnp.where(rest > 0, jnp.log(jnp.maximum(rest, 1e-38)), -jnp.inf), two[:, 1])
