"""What every loop of a pass does: its states, what they would answer, where its attention looks, how far it goes."""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import loop, plans, sharding
from loopformer.inference.engine import warn_beyond
from loopformer.nn.attention import TOLD
from loopformer.types import INTERMEDIATES, Array, ConfigError, Params, Plan, config_dataclass

SMALL = 1e-30  # added to lengths that others are divided by: the start of some loops is zero


@dataclasses.dataclass(frozen=True)
class Insight:
  """What the K loops of a pass over tokens [B, T] did.

  states: [K, B, T, D], what is read out of the state after every loop (`Cell.output`). start: [B, T, D], of the state
  that they began with; None where the cell does not tell it.
  logits: f32[K, B, T, V], what every state would answer: through the model's own bridge, coda, norm and head. Of a
  model whose inputs are vectors these are its answers, [K, B, T, outputs].
  entropy: f32[K, B, T] in nats, of the distribution softmax(logits); None where an answer is one number. Whether
  several numbers are the logits of classes, their task alone knows, where inputs are vectors.
  rms: f32[K, B, T], root mean square of a token's state.
  cosine: f32[K, B, T], of the angle between the state after a loop and the one before it. update: f32[K, B, T], the
  length of their difference, as a part of the length of the new state. Of the first loop against `start`: NaN where
  there is none.
  attention: f32[K, N, B, H, S] in nats, entropies of what each head's queries give to keys, at each of the S tokens
  that the layer reads, which are the T tokens (in CCDD's joined sequences the latents too); None where layers do not
  tell it. A loop that passes a token by (a router's: aux['taken']) still has an entropy there, of what was computed and
  dropped. N are the layers that `layers` names; those of prelude and coda, which no loop runs, are not among them.
  aux: what the cell tells of every loop, by name, leaves [K, ...] (such as the logits of a halting gate).
  plan: what was run. unknown: name of a field -> why it is None, or NaN at first.
  """
  states: Array
  start: Array | None
  logits: Array
  entropy: Array | None
  rms: Array
  cosine: Array
  update: Array
  attention: np.ndarray | None
  layers: tuple[str, ...]
  aux: Mapping[str, Any]
  plan: Plan
  unknown: Mapping[str, str]

  @property
  def loops(self) -> int:
    """K."""
    return len(self.states)

  def settled(self) -> np.ndarray:
    """i32[B, T]: after how many loops the likeliest answer was the last loop's, and stayed it."""
    likeliest = np.asarray(self.logits.argmax(-1))
    differs = likeliest != likeliest[-1]
    return np.where(differs.any(0), self.loops + 1 - differs[::-1].argmax(0), 1).astype(np.int32)


@config_dataclass
class BeforeAndAfter:
  """Keep the states before and after every step, [2, B, T, D], or the latter alone, where a cell does not tell the
  former."""

  def __call__(self, x: Array, before: Array | None = None) -> Array:
    return x if before is None else jnp.stack([before, x])


def trace(model: Any, params: Params, tokens: Any, *, steps: int | Sequence[float] | Plan | None = None,
          positions: Any = None, segments: Any = None) -> Insight:
  """What every loop of one parallel pass does; nothing is decoded. It runs the model's own loop, once.

  Memory: K states, K times the logits f32[B, T, V], and for every layer the weights of attention f32[B, H, T, T], one
  loop at a time; so it is for prompts and not for corpora.

  Args:
    tokens: i32[B, T]; or vectors f32[B, T, inputs], of a model that reads such.
    steps: a budget (that many equal steps), or step sizes with sum one; the model's own number of loops by default. Or
      a plan, all of whose steps run, where a cell reads more of it than sizes (`Plan.rows`).
    positions: i32[B, T], of each token in its document; 0..T-1 by default.
    segments: i32[B, T], tokens attend within equal numbers only: those of documents, from 1, and 0 for padding.

  Raises:
    ConfigError: steps or tokens that the model cannot run, or its cell makes nothing of; positions or segments that are
        no integers of the shape of the tokens; positions that the model does not have.
  """
  plan = _plan(model, steps)
  tokens = checked_tokens(model, tokens)
  given = {name: None if array is None else _array(name, array) for name, array in (('positions', positions),
                                                                                 ('segments', segments))}
  for name, array in given.items():
    if array is not None and (array.shape != tokens.shape[:2] or not np.issubdtype(array.dtype, np.integer)):
      raise ConfigError(f'{name}: {array.dtype}, shape {list(array.shape)}; give integers of the shape of the tokens, '
                        f'{list(tokens.shape[:2])}')
  own = given['positions']
  if own is not None and not 0 <= own.min() <= own.max() < model.read_in.length:
    raise ConfigError(f'positions: from {own.min()} to {own.max()}, but the model has {model.read_in.length} '
                      '(read_in.length), from 0')
  model.cell.check_tokens(tokens, plan.steps, given['segments'])
  pos, seg = (None if array is None else jnp.asarray(array, jnp.int32) for array in given.values())
  with sharding.on(sharding.mesh_of(params)):
    found = _trace(model.clone(remat=loop.KeepAll()), params, tokens, plan, pos, seg)
  told = found.pop('told')
  unknown = {}
  if model.outputs == 1:
    unknown['entropy'] = 'an answer is one number, and no distribution'
  if found['start'] is None:
    unknown |= dict.fromkeys(('start', 'cosine', 'update'), f'{type(model.cell).__name__} runs its loops in a way of '
                             'its own, and does not tell the state before the first')
  layers, attention = _by_layer(told)
  if isinstance(layers, str):
    unknown['attention'], layers = layers, ()
  return Insight(**found, attention=attention, layers=layers, plan=plan, unknown=unknown)


def _plan(model, steps):
  if isinstance(steps, Plan):
    if steps.active is not None or steps.no_grad_steps is not None:
      raise ConfigError('steps: a plan with skipped steps, or with steps without gradient; give one whose steps all '
                        'run, such as plans.schedule(sizes)')
    return steps
  steps = plans.resolve(model.loops if steps is None else steps)
  warn_beyond(model, steps)
  return plans.schedule(steps)


def checked_tokens(model: Any, tokens: Any) -> Array:
  """Tokens i32[B, T], or vectors f32[B, T, inputs], that the model can read. Raises ConfigError where they are none."""
  vocab, length = model.read_in.vocab, model.read_in.length
  tokens = _array('tokens', tokens)
  kind, axes, wanted = ((np.integer, 2, 'integers of shape [B, T]') if vocab else
                        (np.floating, 3, 'vectors of shape [B, T, inputs]'))
  if tokens.ndim != axes or not tokens.size or not np.issubdtype(tokens.dtype, kind):
    raise ConfigError(f'tokens: {tokens.dtype}{list(tokens.shape)}; give {wanted}, one at least')
  if tokens.shape[1] > length:
    raise ConfigError(f'tokens: {tokens.shape[1]} a row, more than the {length} positions of the model '
                      '(read_in.length); shorten them')
  if vocab and not 0 <= tokens.min() <= tokens.max() < vocab:
    raise ConfigError(f'tokens: ids from {tokens.min()} to {tokens.max()}, but the vocabulary has {vocab} '
                      '(read_in.vocab)')
  return jnp.asarray(tokens, jnp.int32 if vocab else jnp.float32)


def _array(name, rows):
  try:
    return np.asarray(rows)
  except ValueError as error:  # rows of unlike lengths
    raise ConfigError(f'{name}: no array ({error}); give integers of shape [B, T]') from error


@functools.partial(jax.jit, static_argnums=0)
def _trace(model, params, tokens, plan, pos, seg):
  variables = {'params': params}
  run, told = model.apply(variables, tokens, plan, pos, seg, keep=BeforeAndAfter(), mutable=[INTERMEDIATES])
  told = told.get(INTERMEDIATES, {}).get('cell', {})
  pairs = run.xs.ndim == 5  # [K, 2, B, T, D]
  states, start = (run.xs[:, 1], run.xs[0, 0]) if pairs else (run.xs, None)

  def answers(x):
    z = model.apply(variables, x, tokens, pos, seg, method='read')
    return model.apply(variables, z, method='logits')

  logits = jax.lax.map(answers, states)
  entropy = None
  if model.outputs > 1:
    log = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log) * log).sum(-1)
  new = states.astype(jnp.float32)
  first = jnp.full_like(new[:1], jnp.nan) if start is None else start[None].astype(jnp.float32)
  old = jnp.concatenate([first, new[:-1]])
  length, before = (jnp.linalg.norm(x, axis=-1) for x in (new, old))
  return {'states': states, 'start': start, 'logits': logits, 'entropy': entropy,
          'rms': jnp.sqrt(jnp.square(new).mean(-1)), 'cosine': (new * old).sum(-1) / (length * before + SMALL),
          'update': jnp.linalg.norm(new - old, axis=-1) / (length + SMALL), 'aux': run.aux, 'told': told}


def _by_layer(told) -> tuple[tuple[str, ...], np.ndarray] | tuple[str, None]:
  """What attentions have told -> (names of layers, f32[K, N, B, H, S]), or (why not, None)."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(told, is_leaf=_is_told):
    if not _is_told(leaf):
      continue
    name = '/'.join(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey) and entry.key != TOLD)
    steps, layers, entropies = (np.asarray(part) for part in leaf)
    steps, layers = (np.broadcast_to(part.reshape((*part.shape, *(1,) * (entropies.ndim - 3 - part.ndim))),
                                     entropies.shape[:-3]).ravel() for part in (steps, layers))
    for step, layer, entropy in zip(steps, layers, entropies.reshape(-1, *entropies.shape[-3:])):
      found[int(layer), name, int(step)] = entropy
  if not found:
    return ('no layer of the loop tells what its attention looks at: it has none that is a distribution over tokens, '
            'or its cell or paper reads keys in a way of its own'), None
  if len({entropy.shape for entropy in found.values()}) > 1:
    return 'its layers have attentions of several shapes', None
  layers = sorted({(layer, name) for layer, name, _ in found})
  steps = sorted({step for _, _, step in found})
  several = {layer for layer, _ in layers if sum(layer == other for other, _ in layers) > 1}
  names = tuple(f'{layer} {_own(name)}' if layer in several else str(layer) for layer, name in layers)
  return names, np.stack([[found[layer, name, step] for layer, name in layers] for step in steps])


def _is_told(leaf):
  return isinstance(leaf, tuple) and len(leaf) == 3 and not any(isinstance(part, (tuple, dict)) for part in leaf)


def _own(name):
  """The part of a path that tells two attentions of one layer apart: core/block/tokens/attn -> tokens."""
  return '/'.join(part for part in name.split('/') if part not in ('core', 'block', 'attn')) or name
