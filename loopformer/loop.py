"""The loop: one step applied to every row of a plan. All that is looped in the library goes through `run`."""
from __future__ import annotations

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer.types import Array, Ctx, Plan, Tick, part


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
class KeepAll:
  """Save every activation of every step for the backward pass: the least arithmetic, memory of L * N layers."""

  def wrap(self, step):
    return step


@part
class PerStep:
  """Save the state between steps alone and recompute the rest: memory grows by one [B, T, D] a loop."""

  def wrap(self, step):
    return nn.remat(step, prevent_cse=False)


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
    first = plan.free
    x, e, kv = _free(cell, x, e, plan, ctx, kv)
  step = functools.partial(_step, e=e, ctx=ctx, keep=keep)
  index = first + jnp.arange(plan.steps)
  rows = Tick(t=plan.t, dt=plan.dt, live=plan.live, k=index, code=code)
  scan = nn.scan(remat.wrap(lambda cell, carry, tick: step(cell, carry, tick)),
                 variable_broadcast='params', split_rngs={'params': False}, length=plan.steps)
  (x, kv), (xs, aux) = scan(cell, (x, kv), rows)
  ran = plan.steps if plan.live is None else plan.live.sum(0).max()
  return x, kv, xs, aux, first + jnp.int32(ran)


def _step(cell, carry, tick, *, e, ctx, keep):
  x, kv = carry
  ctx = ctx.replace(tick=tick)

  def apply(cell, x, kv):
    return cell(x, e, ctx, kv)

  if tick.live is None or cell.is_initializing():
    x, kv, aux = apply(cell, x, kv)
  elif tick.live.ndim == 0:
    module, variables = cell.unbind()
    shapes = jax.eval_shape(lambda v, x, kv: module.apply(v, x, e, ctx, kv)[2], variables, x, kv)

    def skip(cell, x, kv):
      return x, kv, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    x, kv, aux = nn.cond(tick.live, apply, skip, cell, x, kv)
  else:
    new, kv, aux = apply(cell, x, kv)
    x = jax.tree.map(lambda n, o: jnp.where(tick.live.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, x)
  return (x, kv), (keep(x), aux)


def _free(cell, x, e, plan, ctx, kv):
  """`plan.free` steps without gradient, as many as the number says at run time.

  Reverse mode goes through a while loop only if every input that carries a tangent is stopped, parameters included.
  """
  stop = jax.lax.stop_gradient
  frozen = stop(e)

  def body(cell, carry):
    x, kv, k = carry
    tick = Tick(t=jnp.float32(0), dt=jnp.float32(0), live=None, k=k, code=None)
    x, kv, _ = cell(x, frozen, ctx.replace(tick=tick), kv)
    return x, kv, k + 1

  def loop(cell, carry):
    return nn.while_loop(lambda cell, carry: carry[2] < plan.free, body, cell, carry,
                         carry_variables=(), broadcast_variables='params')

  stopped = nn.map_variables(loop, 'params', trans_in_fn=lambda tree: jax.tree.map(stop, tree))
  x, kv, _ = stopped(cell, jax.tree.map(stop, (x, kv, jnp.int32(0))))
  return x, e, kv
