"""MELT: one row of keys and values a layer and token, which all loops share (2605.07721, sections 2 to 4).

Every layer keeps a latent of the tokens in flight, from loop to loop. With x the layer's normed input at loop t,

    z_t = sigmoid([x_t; h_(t-1)] W + b),  h_t = z_t h_(t-1) + (1 - z_t) x_t,  k_t = h_t W_K,  v_t = h_t W_V,  h_0 = x_1

and queries come from x_t as ever. A later loop overwrites the row of an earlier one, so a cache is as large as that of
the layers run once. What tokens read of those before them are their last rows, which makes a pass sequential: tokens go
in chunks, all loops of a chunk before the next chunk. Within a chunk a token reads the rows of the present loop.

What `Gated` with `LatentAttention` has besides its gates are parameters of cells/halting.py with SelfAttention: a model
that was trained so is converted by taking them over. While it learns, the plan's rows `blend` go from 0, where every
loop reads rows of its own as before, to 1.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import loop, memories
from loopformer.cells.cell import Cell
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.papers.melt.attention import Flight, Past, blended
from loopformer.papers.melt.plans import BLEND
from loopformer.types import KV, Array, ConfigError, Context, Plan, Step, config_dataclass

LAST = memories.Ring(size=1)


@config_dataclass
class Latest(memories.Slotted):
  """The memory of `Gated`: one row a layer and token, that of the last loop taken; tokens come `chunk` at a time.

  Chunks belong to the function, in training as in decoding: with `chunk=1` the pass over all tokens is token by token,
  and decoding exactly the same; larger chunks are the faster and the further from it. Bytes: PerLoop's with one loop.
  """
  chunk: int

  def __post_init__(self):
    if self.chunk < 1:
      raise ConfigError(f'memory.chunk = {self.chunk}: must be 1 or more tokens')

  @property
  def exact(self) -> bool:
    """Whether decoding token by token gives what one pass over all of them gives."""
    return self.chunk == 1

  def slots(self, loops: int) -> int:
    """Raises ConfigError: `loop.run` asks, whose tokens do not come in chunks, so that decoding would not be the pass.
    """
    raise ConfigError(f'model.memory = {self}: rows that all loops share are read by the cell Gated alone; use '
                      'PerLoop(), or Ring(size=1) for the last loop\'s keys')

  def make(self, loops: int, *size, width: int | None = None) -> KV:
    """As Slotted.make: one slot."""
    return memories.empty(1, *size)

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> memories.Exchanged:
    return LAST.update(kv, ctx, layer, k, v)

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    return LAST.fill_skipped(kv, pos, last)


class Gated(Cell):
  """x = norm(core(x)), chunk by chunk; the layers' attention is `LatentAttention`, the model's memory `Latest`.

  aux['attention'] f32[K, N, B, T, D]: what attention gave, in the dtype of the layers; not with a cache.

  Loops need their latents, and chunks end before others begin: single steps, exits by token and steps without gradient
  are not defined. The backward pass saves the rows of all tokens, once, and runs every chunk again.
  """
  core: Stack
  norm: nn.Module = RMSNorm(1e-6)
  stepwise = False

  def check(self, width: int):
    """Raises ConfigError where a layer's attention knows of no latents."""
    for block in getattr(self.core.block, 'blocks', (self.core.block,)):
      if not hasattr(block.attn, 'latent'):
        raise ConfigError(f'model.cell.core: block.attn = {type(block.attn).__name__} shares no rows between loops; '
                          'use LatentAttention, or a cell without latents, such as Plain')

  def precompute(self, plan: Plan) -> Array | None:
    """f32[K]: the share of the shared rows against those of every loop's own; None for all of it."""
    return plan.rows.get(BLEND)

  def run(self, x: Array, e: Array, plan: Plan, ctx: Context, kv: KV | None, keep: Any, remat: Any,
          precomputed: Any = None):
    """As `loop.run`. Raises ConfigError for another memory than `Latest`, steps without gradient, and a blend with a
    cache."""
    chunk = getattr(ctx.memory, 'chunk', None)
    if chunk is None:
      raise ConfigError(f'model.memory = {ctx.memory}: the cell Gated shares rows between loops and reads tokens by '
                        'chunks; use papers.melt.cell.Latest(chunk=...)')
    if plan.no_grad_steps is not None:
      raise ConfigError('plan.no_grad_steps: steps without gradient before the others are not defined for chunks of '
                        'tokens; use a plan without them')
    precomputed = self.precompute(plan) if precomputed is None else precomputed
    if precomputed is not None and kv is not None:
      raise ConfigError('plan: rows of loops and shared rows are blended in training alone; decode without')
    rows = Step(t=plan.t, dt=plan.dt, active=plan.active, k=jnp.arange(plan.steps), precomputed=precomputed)
    steps = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0).max()
    length = x.shape[1]
    size = min(chunk, length)
    count = -(-length // size)
    pieces = _padded(x, count * size).reshape(len(x), count, size, -1).swapaxes(0, 1), jnp.arange(count) * size
    ctx = dataclasses.replace(ctx, pos=_padded(ctx.pos, count * size, -1),
                              **{name: None if (leaf := getattr(ctx, name)) is None else _padded(leaf, count * size)
                                 for name in ('seg', 'tokens')})

    def joined(chunks, axis):
      """Chunks [count, ...] put together along an axis of theirs."""
      whole = jnp.moveaxis(chunks, 0, axis)
      whole = whole.reshape(*whole.shape[:axis], count * size, *whole.shape[axis + 2:])
      return jax.lax.slice_in_dim(whole, 0, length, axis=axis)

    if kv is not None:
      over = nn.scan(lambda cell, kv, piece: cell._cached(rows, ctx, keep, kv, piece), variable_broadcast='params',
                     split_rngs={'params': False}, check_constancy_invariants=self.is_initializing())
      kv, x = over(self, kv, pieces)
      return joined(x, 1), kv, None, {}, steps
    options: dict[str, Any] = dict(keep=keep, remat=remat)
    if count == 1:
      out, _ = self._parallel(rows, ctx, None, (pieces[0][0], 0), **options)
      out = jax.tree.map(lambda leaf: leaf[None], out)
    else:
      module, variables = self.unbind()
      empty = self._rows(x, count * size, 1 if precomputed is None else plan.steps)
      one: Any = functools.partial(module.apply, **options, method='_parallel')
      out = _through(lambda variables, fixed, *others: one(variables, *fixed, *others), variables, (rows, ctx), pieces,
                     (empty, empty))
    x, xs, given = out
    return (joined(x, 1), None, None if xs is None else jax.vmap(keep)(joined(xs, 2)), {'attention': joined(given, 3)},
            steps)

  def _rows(self, x, length, *lead):
    """Zeros [*lead, N, B, length, G, d], as rows of keys or values."""
    groups, head = self.core.block.heads_of(x.shape[-1])
    return jnp.zeros((*lead, self.core.applications, len(x), length, groups, head), self.core.block.dtype)

  def _flight(self, x, **others):
    h = jnp.zeros((self.core.applications, *x.shape), self.core.block.dtype)
    return Flight(h=h, taken=jnp.zeros(len(x), jnp.int32), **others)

  def _cached(self, rows, ctx, keep, kv, piece):
    x, start = piece
    x, flight = loop.walk(self, x, None, rows, _chunk_of(ctx, start, x.shape[1]), self._flight(x, kv=kv), keep)
    return flight.kv, x

  def _parallel(self, rows, ctx, past, piece, *, keep, remat):
    """A chunk [B, C, D] from its first place on, that reads rows of all tokens, `past`: what it gives, and its rows."""
    x, start = piece
    own = _chunk_of(ctx, start, x.shape[1])
    if past is not None:
      own = dataclasses.replace(own, own=_past(ctx, own, past, start))
    empty = self._rows(x, x.shape[1])
    flight = self._flight(x, rows=(empty, empty), base=None if rows.precomputed is None else (empty, empty))
    flight = dataclasses.replace(flight, given=jnp.zeros_like(flight.h))
    keep = loop.Last() if keep == loop.Last() else loop.Every()  # others see whole states, when the chunks are joined
    x, flight, xs, aux = loop.scan(self, x, None, rows, own, flight, keep, remat)
    new = jax.tree.map(lambda leaf: leaf[None], flight.rows)
    if rows.precomputed is not None:
      new = jax.tree.map(lambda new, base: blended(rows.precomputed, new, base), new, aux['base'])
    return (x, xs, aux['attention']), new

  def __call__(self, x: Array, e: Array, ctx: Context, kv: Flight) -> tuple[Array, Flight, dict]:
    if not isinstance(kv, Flight):
      raise ConfigError('model.cell = Gated: its loops need the latents of those before, and are run as whole plans; '
                        'single steps and exits by token are not defined')
    assert ctx.step is not None
    active = ctx.step.active
    new, flight = self.core(x, ctx, None, kv)
    flight = dataclasses.replace(flight, taken=flight.taken + 1)
    if active is not None and active.ndim:  # of each sequence; what is not active does not write to a cache in any case
      def of_live(new, old, axis):
        return jnp.where(active.reshape(-1, *(1,) * (new.ndim - axis - 1)), new, old)

      flight = dataclasses.replace(
          flight, h=of_live(flight.h, kv.h, 1), taken=of_live(flight.taken, kv.taken, 0),
          rows=jax.tree.map(lambda new, old: of_live(new, old, 1), flight.rows, kv.rows))
    aux = {'attention': flight.given, 'base': flight.base}
    return self.norm(new), flight, {name: leaf for name, leaf in aux.items() if leaf is not None}


def _padded(array, length, fill=0):
  """[B, T, ...] -> [B, length, ...]."""
  return jnp.pad(array, ((0, 0), (0, length - array.shape[1]), *((0, 0),) * (array.ndim - 2)), constant_values=fill)


def _chunk_of(ctx, start, size):
  """The context of `size` tokens from `start` on."""
  return dataclasses.replace(ctx, **{name: None if (leaf := getattr(ctx, name)) is None else
                                     jax.lax.dynamic_slice_in_dim(leaf, start, size, 1)
                                     for name in ('pos', 'seg', 'tokens')})


def _past(ctx, own, rows, start):
  """What a chunk, whose context is `own`, reads of rows of all tokens (k, v)."""
  size, length = own.pos.shape[1], ctx.pos.shape[1]
  before = jnp.broadcast_to(jnp.arange(length) < start, (size, length))
  mask = jnp.concatenate([before, jnp.tri(size, dtype=bool)], 1)[None]
  if ctx.seg is not None:
    mask = mask & (own.seg[:, :, None] == jnp.concatenate([ctx.seg, own.seg], 1)[:, None])
  k, v = rows
  return Past(k=k, v=v, mask=mask, pos=jnp.concatenate([ctx.pos, own.pos], 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(chunk, variables, fixed, pieces, past):
  """What `chunk` gives of one piece after the other, [count, ...]; each reads what those before it left in `past`.

  The backward pass runs each again, the last first. What one has read of others is masked in the rows that are there at
  the end, so these are saved once, where automatic differentiation of the scan would save them for every chunk. Only
  `variables` and the states in `pieces` have gradients.

  Args:
    chunk: (variables, fixed, rows of all tokens, (states, first place)) -> (outputs, rows of its own).
    past: zeros, trees of [slots, N, B, S, ...].
  """
  return _through_forward(chunk, variables, fixed, pieces, past)[0]


def _through_forward(chunk, variables, fixed, pieces, past):
  def one(past, piece):
    out, new = chunk(variables, fixed, past, piece)
    return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, piece[1], 3), past, new), out

  past, out = jax.lax.scan(one, past, pieces)
  return out, (variables, fixed, pieces, past)


def _through_backward(chunk, saved, dout):
  variables, fixed, pieces, past = saved

  def one(carry, row):
    (x, start), dout = row
    drows = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, x.shape[1], 3), carry[1])
    _, pull = jax.vjp(lambda variables, x, past: chunk(variables, fixed, past, (x, start)), variables, x, past)
    dvariables, dx, dpast = pull((dout, drows))
    return jax.tree.map(jnp.add, carry, (dvariables, dpast)), dx

  zeros = jax.tree.map(jnp.zeros_like, (variables, past))
  (dvariables, _), dx = jax.lax.scan(one, zeros, (pieces, dout), reverse=True)
  return dvariables, None, (dx, None), None


_through.defvjp(_through_forward, _through_backward)
