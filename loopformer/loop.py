"""The loop: one step applied to every row of a plan. All that is looped in the library goes through `run`."""
from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import attention
from loopformer.types import Array, ConfigError, Ctx, Plan, Tick, part


@part
class Last:
  """Keep the last state alone."""

  def __call__(self, x: Array) -> Any:
    return None


@part
class Every:
  """Keep the state after every step."""

  def __call__(self, x: Array) -> Any:
    return x


@part
class Norms:
  """Keep the mean length of the states of a sequence's tokens, f32[B], after every step."""

  def __call__(self, x: Array) -> Any:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean(-1)


@part
class KeepAll:
  """Save every activation of every step for the backward pass: the least arithmetic, memory of L * N layers."""

  def step(self, step):
    return step

  def layer(self, layer):
    return layer


@part
class PerStep:
  """Save the state between steps alone and recompute the rest: memory grows by one [B, T, D] a loop."""

  def step(self, step):
    return nn.remat(step, prevent_cse=False)

  def layer(self, layer):
    return layer


@part
class PerLayer:
  """Save every layer's input and what its attention gave: memory grows by 2 N [B, T, D] a loop.

  Neither attention nor a layer's last product is run again, two thirds of a layer's other products are.
  """

  def step(self, step):
    return step

  def layer(self, layer):
    return nn.remat(layer, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(attention.SAVED))


def run(cell: nn.Module, x: Array, e: Array, plan: Plan, ctx: Ctx, kv: Any, keep: Any, remat: Any,
        code: Any = None):
  """Applies `cell` once for every row of `plan`; a bound module, inside its parent's method.

  `code` is the plan's `cell.timetable` where the caller has it already.
  Returns (x, kv, kept states [K, ...] or None, auxiliaries [K, ...], steps that ran i32[]).
  """
  first = jnp.int32(0)
  if code is None:
    code = cell.timetable(plan)
  if plan.free is not None and not cell.is_initializing():
    if code is not None:
      raise ConfigError('plan.free: free steps have no row in the plan, so a cell that depends on the schedule cannot '
                        'run them; use a plan without free steps')
    first = plan.free.max()
    tick = Tick(t=jnp.float32(0), dt=jnp.float32(0), live=None, k=first, code=None)
    x, kv = _without_gradient(cell, x, e, lambda k: tick.replace(k=k, live=k < plan.free), first, ctx, kv)
  rows = Tick(t=plan.t, dt=plan.dt, live=plan.live, k=first + jnp.arange(plan.steps), code=code)
  ran = jnp.int32(plan.steps) if plan.live is None else plan.live.sum(0)
  total = (ran + (0 if plan.free is None else plan.free)).max()
  ran = ran.max()
  if kv is not None and not cell.is_initializing():
    if ctx.memory.slots(plan.steps) > kv.pos.shape[0]:  # free steps, whose number is not known here, come on top
      raise ConfigError(f'plan: {plan.steps} steps, but the cache has slots for {kv.pos.shape[0]}; make it with '
                        'cache(..., loops=...) of all steps')
    # A while loop updates the caches in place; a scan would copy them into and out of every branch that can skip.
    if keep != Last() or (plan.live is not None and plan.live.ndim > 1):
      raise ConfigError('with a cache no states are kept, and all sequences step together: live = bool[K]')
    if plan.live is not None:
      order = jnp.argsort(~plan.live, stable=True)  # live rows first
      rows = jax.tree.map(lambda leaf: leaf[order], rows)
    x, kv = _walk(cell, x, e, lambda k: jax.tree.map(lambda leaf: leaf[k], rows).replace(live=None), ran, ctx, kv)
    return x, kv, None, {}, total
  step = functools.partial(_step, e=e, ctx=ctx, keep=keep)
  scan = nn.scan(remat.step(lambda cell, carry, tick: step(cell, carry, tick)),
                 variable_broadcast='params', split_rngs={'params': False}, length=plan.steps)
  (x, kv), (xs, aux) = scan(cell, (x, kv), rows)
  return x, kv, xs, aux, total


def _step(cell, carry, tick, *, e, ctx, keep):
  x, kv = carry
  ctx = ctx.replace(tick=tick)

  def apply(cell, x, kv):
    new, kv, aux = cell(x, e, ctx, kv)
    return new if tick.live is None or tick.live.ndim == 0 else _of_live(tick.live, new, x), kv, aux

  if tick.live is None or cell.is_initializing():
    x, kv, aux = apply(cell, x, kv)
  else:
    module, variables = cell.unbind()
    shapes = jax.eval_shape(lambda v, x, kv: module.apply(v, x, e, ctx, kv)[2], variables, x, kv)

    def skip(cell, x, kv):
      return x, kv, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    x, kv, aux = nn.cond(tick.live.any(), apply, skip, cell, x, kv)
  return (x, kv), (keep(x), aux)


def _of_live(live, new, old):
  """The new state of the sequences that live, the old one of the others."""
  return jax.tree.map(lambda n, o: jnp.where(live.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old)


def _walk(cell, x, e, tick_of, count, ctx, kv):
  """The first `count` steps, as many as the number says at run time; no reverse mode."""

  def body(cell, carry):
    x, kv, k = carry
    tick = tick_of(k)
    new, kv, _ = cell(x, e, ctx.replace(tick=tick), kv)
    return new if tick.live is None or tick.live.ndim == 0 else _of_live(tick.live, new, x), kv, k + 1

  x, kv, _ = nn.while_loop(lambda cell, carry: carry[2] < count, body, cell, (x, kv, jnp.int32(0)),
                           carry_variables=(), broadcast_variables='params')
  return x, kv


def _without_gradient(cell, x, e, tick_of, count, ctx, kv):
  """As `_walk`; reverse mode passes it because every input with a tangent is stopped, parameters included."""
  stop = functools.partial(jax.tree.map, jax.lax.stop_gradient)
  walk = nn.map_variables(lambda cell, x, e, kv: _walk(cell, x, e, tick_of, count, ctx, kv), 'params', trans_in_fn=stop)
  return walk(cell, stop(x), stop(e), stop(kv))
