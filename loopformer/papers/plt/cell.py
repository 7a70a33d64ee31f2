"""The shifted cell: a loop begins with the last one's state of the token before (Parallel Loop Transformer).

Parallel Loop Transformer (Wu et al., 2025) and LoopCoder-v2 (Yang et al., 2026), section 2:

    x_1 = norm(core(e)),  x_r = norm(core(mix(shift(x_{r-1}), e); K_1, V_1)),  shift(x)_i = x_{i-1}, x_{-1} = 0

Layers of later loops read the first loop's keys and values and, in a window, their own (streams.py). The loops of one
token do not depend on each other, so that it is decoded by one pass of the layers, with a stream for every loop.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import loop, roles
from loopformer.cells.cell import Cell
from loopformer.nn import modules
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.papers.plt import streams
from loopformer.types import Array, ConfigError, Context, Params, Plan, Step


class Mix(nn.Module):
  """embed * e + hidden * x.

  A normed state is some fifty times as long as a young embedding: with both at 1, as in LoopCoder-v2's equations, a
  token hardly hears itself. The defaults are said to be those of its released configuration.
  """
  embed: float = 0.707
  hidden: float = 0.053

  def __call__(self, x: Array, e: Array) -> Array:
    return self.embed * e + self.hidden * x

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging."""
    return {}


class LearnedMix(nn.Module):
  """The same, with a hidden scale that is learned."""
  embed: float = 0.707
  hidden: float = 0.053

  @nn.compact
  def __call__(self, x: Array, e: Array) -> Array:
    return self.embed * e + self.param('scale', nn.initializers.constant(self.hidden), ()) * x

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging."""
    return {'hidden scale': float(params['scale'])}


class Shifted(Cell):
  """The loop of the Parallel Loop Transformer; its memory is `streams.Streams` of the same window.

  window_left: tokens before a token that its later loops read of their own, besides itself. mix: of the embedding and
  the shifted state. norm: after every loop, the last included, so the head needs none of its own (`Identity()`).

  The number of loops is the model's own, as it was trained. Fewer give the answer of an earlier stream.
  """
  core: Stack
  window_left: int = 64
  mix: Mix | LearnedMix = Mix()
  norm: nn.Module = RMSNorm()
  stepwise = False

  @property
  def injects(self) -> bool:
    """Whether a step takes the input in again."""
    return True

  def check(self, width: int):
    """Raises ConfigError where its layers know nothing of views, run in an order of their own, or differ from loop to
    loop."""
    streams.check_window(self.window_left, 'model.cell.')
    if not self.core.block.viewed:
      raise ConfigError(f'model.cell.core.block = {type(self.core.block).__name__} reads its own keys and values '
                        'alone; use papers.plt.attention.GatedBlock')
    if self.core.order is not None:
      raise ConfigError(f'model.cell.core.order = {self.core.order}: a layer reads the first loop\'s keys of its own '
                        'place; use None, every layer once')
    self._check_alike()

  def _check_alike(self):
    """Raises ConfigError where a product of a layer is another in every loop: one pass of the layers runs them all."""
    if any(loops is not None for loops in modules.held(self.core, 'loops')):
      raise ConfigError('model.cell.core: its products have an update of low rank for every loop (LowRank.loops), but '
                        'all loops of a token run in one pass of the layers; give one update for all, '
                        'LowRank(loops=None)')

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens."""
    window = min(self.window_left + 1, length)
    keys = window - window * (window - 1) / (2 * length)  # the first tokens have fewer before them
    later = self.core.applications * self.core.block.flops_of_mixing(width, keys)
    return steps * self.core.flops(width, length) + max(steps - 1, 0.0) * later

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging, from the cell's parameters."""
    return self.mix.diagnose(params.get('mix', {}))

  def run(self, x: Array, e: Array, plan: Plan, ctx: Context, kv: streams.Cache | None, keep: Any, remat: Any,
          precomputed: Any = None):
    """The steps of a plan; see `loop.run`. Without a cache loop by loop; with one too for several tokens, all loops at
    once for one.

    A row that is not active is no loop, whatever its place: where `active` says n times True, the first n loops run.
    """
    self._check_alike()
    if plan.no_grad_steps is not None:
      raise ConfigError('plan.no_grad_steps: the first loop is read by all others and cannot run without gradient; use '
                        'a plan without them')
    if plan.steps < 1:
      raise ConfigError('plan: no steps; give 1 loop or more')
    depth = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0)
    if kv is None:
      x, xs = self._without_cache(x, e, plan, depth, ctx, keep, remat)
      return x, None, xs, {}, depth.max()
    self._check_cache(kv, plan, ctx, keep)
    depth_B = jnp.broadcast_to(depth, x.shape[:1])
    x, kv = (self._together if x.shape[1] == 1 else self._chunk)(x, e, plan.steps, depth_B, ctx, kv)
    return x, kv, None, {}, depth.max()

  def __call__(self, x: Array, e: Array, ctx: Context, kv: None) -> tuple[Array, None, dict]:
    """One step alone, number ctx.step.k; the first loop's keys and values are computed anew, so it costs two.

    Raises:
      ConfigError: with a cache, where the loops of a token run together and none can be the last to run.
    """
    if kv is not None:
      raise ConfigError('exit: the loops of a shifted cell decode together, so that leaving early would save nothing; '
                        'decode without an exit, or with a smaller budget')
    assert ctx.step is not None
    first, shared = self._first(e, ctx)
    return jnp.where(ctx.step.k == 0, first, self._later(x, e, shared, ctx)), None, {}

  # Without a cache

  def _first(self, e, ctx):
    h, (k, v) = _layers(self.core, e, ctx, streams.Opening())
    return self.norm(h), streams.Later(k, v, self.window_left)

  def _later(self, x, e, shared, ctx):
    before = jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    h, _ = _layers(self.core, self.mix(jnp.where(_follows(ctx)[..., None], before, 0), e), ctx, shared)
    return self.norm(h)

  def _without_cache(self, x, e, plan, depth, ctx, keep, remat):
    first, shared = remat.once(Shifted._first)(self, e, ctx)
    if self.is_initializing():  # so that the parameters of later loops are there, whatever the plan
      return self._later(first, e, shared, ctx), None
    runs = None if plan.active is None else jnp.arange(plan.steps).reshape(-1, *(1,) * depth.ndim) < depth
    start, x = keep(x), _chosen(None if runs is None else runs[0], first, x)

    def step(cell, x, runs):
      def apply(cell, x):
        return _chosen(runs, cell._later(x, e, shared, ctx), x)

      x = apply(cell, x) if runs is None else nn.cond(runs.any(), apply, lambda cell, x: x, cell, x)
      return x, keep(x)

    kept = jax.tree.map(lambda leaf: leaf[None], keep(x))
    if plan.steps > 1:
      scan = nn.scan(remat.step(step), variable_broadcast='params', split_rngs={'params': False},
                     length=plan.steps - 1, check_constancy_invariants=self.is_initializing())
      x, others = scan(self, x, None if runs is None else runs[1:])
      kept = jax.tree.map(lambda one, more: jnp.concatenate([one, more]), kept, others)
    if runs is None:
      return x, kept
    done = jnp.cumsum(plan.active, 0)  # loops by the end of each row

    def of_rows(before, after):
      states = jnp.concatenate([before[None], after])
      index = done.reshape(*done.shape, *(1,) * (states.ndim - done.ndim))
      return jnp.take_along_axis(states, jnp.broadcast_to(index, (plan.steps, *states.shape[1:])), 0)

    return x, jax.tree.map(of_rows, start, kept)

  # With a cache

  def _check_cache(self, kv, plan, ctx, keep):
    if keep != loop.Last():
      raise ConfigError(f'keep = {keep}: with a cache no states are kept; use loop.Last()')
    window = getattr(ctx.memory, 'window_left', None)
    if window != self.window_left or not hasattr(kv, 'carried'):
      raise ConfigError(f'model.memory = {ctx.memory}: a shifted cell carries states from token to token and keeps '
                        f'windows; use streams.Streams(window_left={self.window_left}), and the cache of model.cache')
    if plan.steps > kv.loops:
      raise ConfigError(f'plan: {plan.steps} steps, but the cache has slots for {kv.loops}; make it with '
                        'cache(..., loops=...) of all steps')

  def _together(self, x, e, steps, depth_B, ctx, cache):
    """x, e [B, 1, D]: the loops of one token in one pass, [B, R, D]."""
    runs_BR = jnp.arange(steps) < depth_B[:, None]
    pos_BR = jnp.where(runs_BR, ctx.pos, -1)
    carried, later = cache.carried, steps - 1
    before = _carried(carried.k[:later, 0, :, 0, 0].swapaxes(0, 1), carried.pos[:later, :, 0].T, pos_BR[:, 1:])
    inputs = jnp.concatenate([e, self.mix(before, e)], 1).astype(e.dtype)
    h, view = self.core(inputs, dataclasses.replace(ctx, pos=pos_BR), None, streams.Together(cache, self.window_left))
    states = self.norm(h)
    write = (pos_BR[:, :later] >= 0).T  # [R - 1, B]
    k = jnp.where(write[..., None], states[:, :later].swapaxes(0, 1), carried.k[:later, 0, :, 0, 0])
    carried = dataclasses.replace(carried, k=carried.k.at[:later, 0, :, 0, 0].set(k.astype(carried.k.dtype)),
                                  pos=carried.pos.at[:later, :, 0].set(
                                      jnp.where(write, ctx.pos[:, 0], carried.pos[:later, :, 0])))
    last = jnp.take_along_axis(states, jnp.maximum(depth_B - 1, 0)[:, None, None], 1)
    return _chosen(depth_B > 0, last, x), dataclasses.replace(view.cache, carried=carried)

  def _chunk(self, x, e, steps, depth_B, ctx, cache):
    """x, e [B, T, D]: loop after loop over several tokens, that follow those in the cache."""
    old = cache.carried  # of the token before the chunk, whatever the loops now write

    def of_loop(k):
      runs = k < depth_B
      row = Step(t=jnp.float32(0), dt=jnp.float32(0), active=None, k=k)
      return runs, dataclasses.replace(ctx, step=row, pos=jnp.where(runs[:, None], ctx.pos, -1))

    def finish(cell, h, x, runs, own, cache, k):
      new = _chosen(runs, cell.norm(h), x)
      return new, dataclasses.replace(cache, carried=_carry(cache.carried, new, own.pos, k)), k + 1

    def body(cell, carry):
      x, cache, k = carry
      runs, own = of_loop(k)
      first = _carried(old.k[k - 1, 0, :, 0], old.pos[k - 1], own.pos[:, :1])
      before = jnp.where(_follows(ctx)[:, 1:, None], x[:, :-1], 0)
      inputs = cell.mix(jnp.concatenate([first.astype(x.dtype), before], 1), e)
      h, view = cell.core(inputs, own, None, streams.LaterPrompt(cache, cache.rings.pos[k - 1], cell.window_left))
      return finish(cell, h, x, runs, own, view.cache, k)

    runs, own = of_loop(jnp.int32(0))
    h, view = self.core(e, own, None, streams.Prompt(cache))
    carry = finish(self, h, x, runs, own, view.cache, jnp.int32(0))
    if steps > 1:
      count = depth_B.max()
      carry = nn.while_loop(lambda cell, carry: carry[2] < count, body, self, carry, carry_variables=(),
                            broadcast_variables='params')
    return carry[:2]


def _layers(core: Stack, x: Array, ctx: Context, view: Any) -> tuple[Array, Any]:
  """The layers without a cache: each takes its row of the view's arrays [N, ...], and leaves a row: (x, [N, ...]).

  Scanned over, not carried: the gradient of what all loops read would else be formed whole in every layer.
  """

  def layer(block, x, view):
    return block(x, ctx, None, view)

  layer = ctx.remat.layer(layer) if ctx.remat else layer
  roles.stacked(core, 'block')
  scan = nn.scan(layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=core.depth,
                 check_constancy_invariants=core.is_initializing())
  x, left = scan(core.block, x, view)
  return (x if core.norm is None else core.norm(x)), left


def _follows(ctx: Context) -> Array:
  """bool[B, T], whether a token's document has the token before it; no for the first."""
  follows = ctx.pos[:, 1:] == ctx.pos[:, :-1] + 1
  if ctx.seg is not None:
    follows &= ctx.seg[:, 1:] == ctx.seg[:, :-1]
  return jnp.pad(follows, ((0, 0), (1, 0)))


def _chosen(runs: Array | None, new: Array, old: Array) -> Array:
  """new where a sequence runs (None: all do), old elsewhere; runs bool[] or bool[B]."""
  return new if runs is None else jnp.where(runs.reshape(-1, *(1,) * (new.ndim - 1)), new, old).astype(new.dtype)


def _carried(states: Array, places: Array, pos: Array) -> Array:
  """The states [B, n, D] of the tokens before positions pos i32[B, n]: those that were kept of `places` i32[B, n].

  Zero before a document's first token. NaN where another token's were kept: tokens were left out, and no answer is
  better than a wrong one.
  """
  kept = jnp.where((places == pos - 1)[..., None], states, jnp.nan)
  return jnp.where((pos > 0)[..., None], kept, 0)


def _carry(carried, x, pos, k):
  """Keeps loop k's state of the last token of each row; nothing of rows without one."""
  batch, at = len(pos), pos.argmax(-1)
  last = jnp.take_along_axis(pos, at[:, None], 1)[:, 0]
  row = jnp.where(last >= 0, jnp.arange(batch), batch)  # out of range, and dropped
  state = jnp.take_along_axis(x, at[:, None, None], 1)[:, 0]
  return dataclasses.replace(carried, k=carried.k.at[k, 0, row, 0, 0].set(state.astype(carried.k.dtype), mode='drop'),
                             pos=carried.pos.at[k, row, 0].set(last, mode='drop'))
