"""Generation: prefill and decode through the same loop, with a cache slot for every (loop, layer).

Both are compiled once for all budgets up to the model's own, all schedules and all sampling controls: a schedule is an
array, padded by skipped steps; lengths are rounded up.
"""
from __future__ import annotations

import functools
from typing import Any, Sequence
import warnings

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans
from loopformer.types import Array, ConfigError, Params, Plan

ROUND = 64  # lengths are rounded up to multiples of this


@struct.dataclass
class Controls:
  """How a token is drawn. temperature: f32[], 0 takes the likeliest; top_k: i32[], V for all; top_p: f32[], 1 for all.
  """
  temperature: Array
  top_k: Array
  top_p: Array


def controls(vocab: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Controls:
  """Checked sampling controls. Raises ConfigError for values out of range."""
  if temperature < 0:
    raise ConfigError(f'temperature = {temperature}: must be 0 (greedy) or more')
  if top_k is not None and top_k < 1:
    raise ConfigError(f'top_k = {top_k}: must be 1 or more, or None for all tokens')
  if top_p is not None and not 0 < top_p <= 1:
    raise ConfigError(f'top_p = {top_p}: must be above 0 and at most 1, or None for all tokens')
  return Controls(temperature=jnp.float32(temperature), top_k=jnp.int32(min(top_k or vocab, vocab)),
                  top_p=jnp.float32(1.0 if top_p is None else top_p))


def sample(logits: Array, key: Array, control: Controls) -> Array:
  """f32[B, V] -> i32[B]. top-k first, then the fewest of those whose probability reaches top_p.

  A branch each, because to sort the vocabulary costs more than a small model's whole step.
  """
  filtered = (control.top_k < logits.shape[-1]) | (control.top_p < 1)
  branch = jnp.where(control.temperature == 0, 0, jnp.where(filtered, 2, 1))
  draw = jax.random.categorical
  return jax.lax.switch(branch, [
      lambda scaled: scaled.argmax(-1),
      lambda scaled: draw(key, scaled, -1),
      lambda scaled: draw(key, jnp.where(scaled >= _threshold(scaled, control), scaled, -jnp.inf), -1),
  ], logits / jnp.where(control.temperature == 0, 1.0, control.temperature)).astype(jnp.int32)


def _threshold(scaled, control):
  """f32[B, 1]: the least logit that top-k and top-p leave."""
  order = jnp.sort(scaled, -1, descending=True)
  within = jnp.arange(scaled.shape[-1]) < control.top_k
  probability = jax.nn.softmax(jnp.where(within, order, -jnp.inf), -1)
  before = jnp.cumsum(probability, -1) - probability  # of all likelier tokens; the likeliest is always kept
  kept = (within & (before < control.top_p)).sum(-1)
  return jnp.take_along_axis(order, kept[:, None] - 1, -1)


@functools.partial(jax.jit, static_argnums=0, donate_argnames='kv')
def prefill(model: Any, params: Params, tokens: Array, lengths: Array, plan: Plan, kv: Any) -> tuple[Array, Any]:
  """Reads prompts: i32[B, T] padded at the end, lengths i32[B] -> logits after each prompt f32[B, V], caches."""
  index = jnp.arange(tokens.shape[1])[None]
  pos = jnp.where(index < lengths[:, None], index, -1)
  trace = model.apply({'params': params}, tokens, plan, pos, kv=kv)
  last = jnp.take_along_axis(trace.z, (lengths - 1)[:, None, None], 1)[:, 0]
  return model.apply({'params': params}, last, method='logits'), trace.kv


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnames='kv')
def decode(model: Any, room: int, params: Params, logits: Array, lengths: Array, plan: Plan, kv: Any, key: Array,
           control: Controls, most: Array, eos: Array) -> tuple[Array, Any]:
  """Draws up to `most` <= `room` tokens a row, until every row has drawn `eos`: i32[B, room], eos from there on."""
  variables = {'params': params}
  code = model.apply(variables, plan, method='timetable')  # once for all tokens

  def unfinished(carry):
    index, _, _, done, _ = carry
    return (index < most) & ~done.all()

  def token(carry):
    index, logits, kv, done, out = carry
    drawn = jnp.where(done, eos, sample(logits, jax.random.fold_in(key, index), control))
    out = jax.lax.dynamic_update_slice(out, drawn[:, None], (0, index))
    trace = model.apply(variables, drawn[:, None], plan, (lengths + index)[:, None], kv=kv, code=code)
    logits = model.apply(variables, trace.z[:, 0], method='logits')
    return index + 1, logits, trace.kv, done | (drawn == eos), out

  out = jnp.full((lengths.shape[0], room), eos, jnp.int32)
  carry = (jnp.int32(0), logits, kv, jnp.zeros(lengths.shape, bool), out)
  _, _, kv, _, out = jax.lax.while_loop(unfinished, token, carry)
  return out, kv


def generate(model: Any, params: Params, tokenizer: Any, prompts: Sequence[str], *,
             budget: int | Sequence[float] | None = None, max_new_tokens: int = 64, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> list[str]:
  """Continues prompts.

  Args:
    prompts: texts, of any lengths; an empty one starts a document.
    budget: loops a token (a number of equal steps), or a tuple of step sizes with sum one; the model's own by default.
    max_new_tokens: at most this many tokens each; a row ends early where the model ends the document.
    temperature, top_k, top_p: 0 takes the likeliest token.
    seed: the same seed, prompts and controls give the same texts.

  Returns:
    The continuations, without their prompts.

  Raises:
    ConfigError: a prompt with its continuation does not fit the model's positions; a schedule or control out of range.
  """
  if isinstance(prompts, str):
    raise ConfigError(f'prompts = {prompts!r}: give a list of texts')
  if not prompts:
    return []
  if max_new_tokens < 1:
    raise ConfigError(f'max_new_tokens = {max_new_tokens}: must be 1 or more')
  steps = plans.resolve(model.loops if budget is None else budget, 'budget')
  warn_beyond(model, steps)
  control = controls(model.read_in.vocab, temperature, top_k, top_p)
  ids = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
  longest, limit = max(map(len, ids)), model.read_in.length
  if longest + max_new_tokens > limit:
    raise ConfigError(f'prompt {[len(row) for row in ids].index(longest)} has {longest} tokens; with max_new_tokens = '
                      f'{max_new_tokens} that is more than the {limit} positions of the model (read_in.length); '
                      'shorten the prompt or ask for fewer tokens')
  width = min(_rounded(longest), limit)
  room = min(_rounded(longest + max_new_tokens), limit)
  tokens = np.full((len(ids), width), tokenizer.eos, np.int32)
  for row, prompt in zip(tokens, ids):
    row[:len(prompt)] = prompt
  lengths = jnp.asarray([len(row) for row in ids], jnp.int32)
  rows = max(len(steps), model.loops)
  plan = plans.schedule(steps, rows)
  logits, kv = prefill(model, params, jnp.asarray(tokens), lengths, plan, kv=model.cache(len(ids), room, rows))
  out, _ = decode(model, _rounded(max_new_tokens), params, logits, lengths, plan, kv=kv, key=jax.random.key(seed),
                  control=control, most=jnp.int32(max_new_tokens), eos=jnp.int32(tokenizer.eos))
  return [tokenizer.decode(_until(row[:max_new_tokens], tokenizer)) for row in np.asarray(out).tolist()]


def warn_beyond(model: Any, steps: Sequence[float]):
  """Warns where a schedule has more steps than the model was trained for."""
  if len(steps) > model.loops:
    warnings.warn(f'{len(steps)} loops, but the model was trained with at most {model.loops}: quality beyond the '
                  'trained depth is not to be expected', stacklevel=3)


def _rounded(length: int) -> int:
  return -(-length // ROUND) * ROUND


def _until(row, tokenizer):
  """The ids before the end of the document; ids that the tokenizer does not have (a padded head) are dropped."""
  row = row[:row.index(tokenizer.eos)] if tokenizer.eos in row else row
  return [token for token in row if token < tokenizer.vocab_size]
