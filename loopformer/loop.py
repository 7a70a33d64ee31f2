"""The loop: one step applied to every row of a plan. All that is looped in the library goes through `run`."""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import jaxpr_as_fun
import jax.numpy as jnp

from loopformer import memories, sharding
from loopformer.nn import kernels
from loopformer.types import INTERMEDIATES, Array, ConfigError, Context, Plan, Step, config_dataclass


@config_dataclass
class Last:
  """Keep the last state alone."""

  def __call__(self, x: Array, before: Array | None = None) -> Any:
    return None


@config_dataclass
class Every:
  """Keep the state after every step."""

  def __call__(self, x: Array, before: Array | None = None) -> Any:
    return x


@config_dataclass
class Pairs:
  """Keep the states before and after every step, [2, B, T, D]; of cells whose steps `run` takes one by one."""

  def __call__(self, x: Array, before: Array | None = None) -> Any:
    if before is None:
      raise ConfigError('keep = Pairs(): the cell does not tell the state before a step; use a cell whose steps run '
                        'one by one, such as Plain')
    return jnp.stack([before, x])


@config_dataclass
class Norms:
  """Keep the mean length of the states of a sequence's tokens, f32[B], after every step."""

  def __call__(self, x: Array, before: Array | None = None) -> Any:
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean(-1)


LAYER = 'layer'  # the name under which a layer's input may be saved


def _named(layer):
  """A layer whose input has a name.

  With it, what layers save is saved for the step as a whole. Saved inside a step that may be skipped, the weights of
  every layer would be too, once for every row of the plan.
  """
  def call(block, carry, row):
    x, *rest = carry if isinstance(carry, tuple) else (carry,)
    x = checkpoint_name(x, LAYER)
    return layer(block, (x, *rest) if rest else x, row)

  return call


# What the backward pass saves. `step` wraps the body of a scan over steps, `once` a step that is written out in the
# program (its arguments are all that it uses), `layer` a layer. Prelude and coda run once, and what their layers save
# is what `layer` says.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(function, floats, others):
  """function(floats, others), of which the backward pass saves the arguments alone.

  In one program XLA would find that the backward pass computes what the forward pass has, and keep that instead; on a
  CPU no barrier hinders it. So all of it stands in a branch that is taken if the gradient is a number.
  """
  return function(floats, others)


def _recomputed_backward(function, saved, gradient):
  floats, others = saved
  first = next(leaf for leaf in jax.tree.leaves(gradient) if jnp.issubdtype(leaf.dtype, jnp.floating)).ravel()[0]

  def again(floats):
    return jax.vjp(lambda floats: function(floats, others), floats)[1](gradient)[0]

  def broken(floats):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), floats)

  return jax.lax.cond(jnp.isnan(first), broken, again, floats), None


_recomputed.defvjp(lambda function, *given: (function(*given), given), _recomputed_backward)


@config_dataclass
class KeepAll:
  """Save every activation of every step for the backward pass: the least arithmetic, memory of L * N layers."""

  def step(self, step):
    return step

  def once(self, step):
    return step

  def layer(self, layer):
    return layer


@config_dataclass
class PerStep:
  """Save the state between steps alone and recompute the rest: memory grows by one [B, T, D] a loop. Prelude and coda
  save every activation."""

  def step(self, step):
    return nn.remat(step, prevent_cse=False)

  def once(self, step):
    def call(cell, *given):
      if cell.is_initializing():
        return step(cell, *given)
      module, variables = cell.unbind()
      leaves, tree = jax.tree.flatten((variables, given))
      is_float = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in leaves]

      def function(floats, others):
        floats, others = iter(floats), iter(others)
        variables, given = jax.tree.unflatten(tree, [next(floats if real else others) for real in is_float])
        return module.apply(variables, *given, method=step)

      floats, others = ([leaf for leaf, real in zip(leaves, is_float) if real == wanted] for wanted in (True, False))
      return _recomputed(function, floats, others)

    return call

  def layer(self, layer):
    return layer


@config_dataclass
class PerLayer:
  """Save every layer's input and what its attention gave: memory grows by 2 N [B, T, D] a loop.

  Neither attention nor a layer's last product is run again, two thirds of a layer's other products are.
  """

  def step(self, step):
    return nn.remat(step, prevent_cse=False, policy=kernels.saving(LAYER, kernels.SAVED))

  def once(self, step):
    return nn.remat(step, policy=kernels.saving(LAYER, kernels.SAVED))

  def layer(self, layer):
    return _named(nn.remat(layer, prevent_cse=False, policy=kernels.saving(kernels.SAVED)))


@config_dataclass
class Products:
  """Save every layer's input and what attention and projections gave, and recompute norms and activations alone."""

  def step(self, step):
    return nn.remat(step, prevent_cse=False, policy=kernels.saving(LAYER, kernels.SAVED, kernels.PRODUCT))

  def once(self, step):
    return nn.remat(step, policy=kernels.saving(LAYER, kernels.SAVED, kernels.PRODUCT))

  def layer(self, layer):
    return _named(nn.remat(layer, prevent_cse=False, policy=kernels.saving(kernels.SAVED, kernels.PRODUCT)))


@config_dataclass
class Offload:
  """As PerLayer, with what attention gave kept in the host's memory until the backward pass wants it; cuDNN's, whose
  results cannot be named, is run again."""

  def step(self, step):
    return nn.remat(step, prevent_cse=False, policy=self._policy(LAYER))

  def once(self, step):
    return nn.remat(step, policy=self._policy(LAYER))

  def layer(self, layer):
    return _named(nn.remat(layer, prevent_cse=False, policy=self._policy()))

  def _policy(self, *saved):
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=saved, names_which_can_be_offloaded=[kernels.SAVED], offload_src='device',
        offload_dst='pinned_host')


def run(cell: nn.Module, x: Array, e: Array, plan: Plan, ctx: Context, kv: Any, keep: Any, remat: Any,
        precomputed: Any = None):
  """Applies `cell` once for every row of `plan`; a bound module, inside its parent's method.

  `precomputed` is the plan's `cell.precompute` where the caller has it already. With a cache, sequences may have plans
  of their own, t and dt f32[K, B]; active = bool[K, B] must then be True in the first rows of each.
  Returns (x, kv, kept states [K, ...] or None, auxiliaries [K, ...], steps that ran i32[]).
  """
  first, k, free = jnp.int32(0), jnp.arange(plan.steps), None
  if precomputed is None:
    precomputed = cell.precompute(plan)
  if plan.no_grad_steps is not None and not cell.is_initializing():
    if precomputed is not None:
      raise ConfigError('plan.no_grad_steps: these have no row in the plan, so a cell that depends on the schedule '
                        'cannot run them; use a plan without them')
    if kv is not None and plan.no_grad_steps.ndim:
      raise ConfigError('plan.no_grad_steps: of each sequence or step, but a cache has one slot a step for all of '
                        'them; use one number for all, i32[], or a plan whose rows say by `active` which steps each '
                        'sequence takes')
  if plan.no_grad_steps is not None and plan.no_grad_steps.ndim == 2:
    free = plan.no_grad_steps[:, 0]
    k += jnp.cumsum(free)
  elif plan.no_grad_steps is not None and not cell.is_initializing():
    first, k = plan.no_grad_steps.max(), plan.no_grad_steps + (k[:, None] if plan.no_grad_steps.ndim else k)
    row = Step(t=jnp.float32(0), dt=jnp.float32(0), active=None, k=first, precomputed=None)
    x, kv = _without_gradient(cell, x, e, lambda k: dataclasses.replace(row, k=k, active=k < plan.no_grad_steps), first,
                              ctx, kv)
  rows = Step(t=plan.t, dt=plan.dt, active=plan.active, k=k, precomputed=precomputed)
  ran = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0)
  total = (ran + plan.free).max()
  if kv is not None and not cell.is_initializing():
    slots = memories.slots_of(kv)
    if ctx.memory.slots(plan.steps) > slots:  # steps without gradient, whose number is not known here, come on top
      raise ConfigError(f'plan: {plan.steps} steps, but the cache has slots for {slots}; make it with '
                        'cache(..., loops=...) of all steps')
    x, kv = walk(cell, x, e, rows, ctx, kv, keep)
    return x, kv, None, {}, total
  x, kv, xs, aux = scan(cell, x, e, rows, ctx, kv, keep, remat, free)
  return x, kv, xs, aux, total


def scan(cell: nn.Module, x: Array, e: Array | None, rows: Step, ctx: Context, kv: Any, keep: Any, remat: Any,
         free: Array | None = None):
  """The rows of a plan one after the other, differentiable: (x, kv, kept states [K, ...] or None, auxiliaries).

  free: None, or i32[K]: steps that run before each row. They have no gradient, nor has the state that a row begins
  with, and the backward pass does not run them again.
  """
  step = functools.partial(_step, e=e, ctx=ctx, keep=keep)
  if cell.is_initializing():  # one step makes all parameters, and a scan would trace it twice more
    (x, kv), (xs, aux) = step(cell, (x, kv), jax.tree.map(lambda leaf: leaf[0], rows))
    return x, kv, jax.tree.map(lambda leaf: leaf[None], xs), jax.tree.map(lambda leaf: leaf[None], aux)
  graded = remat.step(lambda cell, carry, row: step(cell, carry, row))

  def detached(cell, carry, row_and_free):
    (x, kv), (row, count) = carry, row_and_free
    at = Step(t=jnp.float32(0), dt=jnp.float32(0), active=None, k=row.k - count, precomputed=None)
    x, kv = _without_gradient(cell, x, e, lambda k: dataclasses.replace(at, k=at.k + k), count, ctx, kv)
    return graded(cell, (x, kv), row)

  over = nn.scan(graded if free is None else detached, variable_axes={INTERMEDIATES: 0}, variable_broadcast='params',
                 split_rngs={'params': False}, length=rows.dt.shape[0],
                 check_constancy_invariants=False)  # parameters are read alone, and the check is a trace
  (x, kv), (xs, aux) = over(cell, (x, kv), rows if free is None else (rows, free))
  return x, kv, xs, aux


def walk(cell: nn.Module, x: Array, e: Array | None, rows: Step, ctx: Context, kv: Any, keep: Any):
  """The rows that are active, in a while loop: (x, kv). It updates caches in place, where a scan would copy them into
  and out of every branch that can skip."""
  if keep != Last():
    raise ConfigError(f'keep = {keep}: with a cache no states are kept; use loop.Last()')
  count = jnp.int32(rows.dt.shape[0]) if rows.active is None else rows.active.sum(0).max()
  return _walk(cell, x, e, _active_first(rows), sharding.agreed(count), ctx, kv)


def _step(cell, carry, row, *, e, ctx, keep):
  (x, kv), before = carry, carry[0]
  ctx = ctx.replace(step=row)

  def apply(cell, x, kv):
    new, kv, aux = cell(x, e, ctx, kv)
    return new if row.active is None or row.active.ndim == 0 else _of_active(row.active, new, x), kv, aux

  if row.active is None or cell.is_initializing():
    x, kv, aux = apply(cell, x, kv)
  else:  # traced once, for what it gives and for the shapes of what a step that is skipped gives
    module, variables = cell.unbind()
    traced, shapes = jax.make_jaxpr(lambda variables, x, kv: apply(module.bind(variables), x, kv), return_shape=True)(
        variables, x, kv)

    def taken():
      return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(traced)(*jax.tree.leaves((variables, x, kv))))

    def skipped():
      return x, kv, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[2])

    x, kv, aux = jax.lax.cond(row.active.any(), taken, skipped)
  return (x, kv), (keep(cell.output(x), cell.output(before)), aux)


def _of_active(active, new, old):
  """The new state of the sequences that are active, the old one of the others."""
  return jax.tree.map(lambda n, o: jnp.where(active.reshape(-1, *(1,) * (n.ndim - 1)), n, o), new, old)


def _active_first(rows):
  """k -> row k of those that are active, all of which come before the others where every sequence has rows of its
  own."""
  if rows.active is not None and rows.active.ndim == 1:
    order = jnp.argsort(~rows.active, stable=True)
    rows = jax.tree.map(lambda leaf: leaf[order], rows).replace(active=None)
  return lambda k: jax.tree.map(lambda leaf: leaf[k], rows)


def _walk(cell, x, e, row_of, count, ctx, kv):
  """The first `count` steps, as many as the number says at run time; no reverse mode."""

  def body(cell, carry):
    x, kv, k = carry
    row = row_of(k)
    own, each = ctx.replace(step=row), row.active is not None and row.active.ndim > 0
    if each and kv is not None:  # a sequence that has no such step writes nothing
      own = own.replace(pos=jnp.where(row.active[:, None], ctx.pos, -1))
    new, kv, _ = cell(x, e, own, kv)
    return _of_active(row.active, new, x) if each else new, kv, k + 1

  x, kv, _ = nn.while_loop(lambda cell, carry: carry[2] < count, body, cell, (x, kv, jnp.int32(0)),
                           carry_variables=(), broadcast_variables='params')
  return x, kv


def adapt(model: nn.Module, x: Array, e: Array, plan: Plan, ctx: Context, kv: Any, exit_policy: Any,
          threshold: Array | None,
          precomputed: Any, observe: Callable[..., Any]):
  """Applies `model.cell` until `exit_policy` (exits.Adaptive) lets every token go, or the plan ends; a bound module, no
  reverse mode.

  A token that was let go keeps its state, and the others go on reading the keys that this state gives, or with a cache
  what `exit_policy.fill` leaves there. What becomes of a token does not depend on how long others stay.

  kv: the caches by name, {} without. see: (k, last, old, new, aux, the coda's cache) -> what the rule sees, and a
  function that gives the coda's cache thereafter.
  Returns (states to be read out, kv, steps that each token took i32[B, T], steps that ran i32[]).
  """
  if not model.cell.tokenwise:
    raise ConfigError(f'model.cell = {type(model.cell).__name__}: its steps write to other tokens\' states, so that '
                      'none may stop before the others; leave the exit out')
  cached, through = 'loop' in kv, 'loop' in kv and exit_policy.fill.runs
  if plan.no_grad_steps is not None or (plan.active is not None and plan.active.ndim > 1 and not cached):
    raise ConfigError('plan: exits decide how many steps are taken; use a plan of all sequences, without '
                      'no_grad_steps, such as Uniform')
  if cached and not through and ctx.pos.shape[1] > 1:
    raise ConfigError('exit.fill = Copy(): fills the cache for one token at a time; read prompts with all loops, or '
                      'use fill=Recompute()')
  precomputed = model.cell.precompute(plan) if precomputed is None else precomputed
  row_of = _active_first(Step(t=plan.t, dt=plan.dt, active=plan.active, k=jnp.arange(plan.steps),
                              precomputed=precomputed))
  length = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0)  # of each sequence, or of all
  length = jnp.broadcast_to(length, ctx.pos.shape[:1])[:, None]

  def body(model, carry):
    x, answer, kv, k, active, taken, state = carry
    runs = (active | through) & (k < length)
    own = dataclasses.replace(ctx, step=row_of(k), pos=jnp.where(runs, ctx.pos, -1) if cached else ctx.pos)
    new, loop_kv, aux = model.cell(x, e, own, kv.get('loop'))
    new = jax.tree.map(lambda new, old: jnp.where(active.reshape(*active.shape, *(1,) * (new.ndim - 2)), new, old),
                       new, x)
    old, shown = model.cell.output(x), model.cell.output(new)
    seen, coda_kv = observe(model, k, k + 1 >= length, old, shown, aux, kv.get('coda'))
    state, done, found = exit_policy.rule.update(state, seen, threshold)
    if through and coda_kv() is not kv.get('coda'):
      raise ConfigError('exit.fill = Recompute(): its rule reads answers through a coda, whose cache holds what '
                        'earlier tokens gave when they left, and not what they gave after the same step, so that '
                        'decoding would not be the pass without a cache; use a rule that reads the state, such as '
                        'StateChange, or fill=Copy()')
    kv = {**kv, **{name: cache for name, cache in (('loop', loop_kv), ('coda', coda_kv())) if cache is not None}}
    taken += active
    stays = active & ~(done & (k + 1 >= exit_policy.least)) & (k + 1 < length)
    return new, jnp.where(active[..., None], found, answer), kv, k + 1, stays, taken, state

  def going(model, carry):
    k, active = carry[3], carry[4]
    return sharding.agreed((k < length.max()) & (active.any() | through))

  active = (ctx.pos >= 0) if cached else jnp.ones(ctx.pos.shape, bool)
  shown = model.cell.output(x)
  carry = (x, shown, kv, jnp.int32(0), active, jnp.zeros(active.shape, jnp.int32),
           exit_policy.rule.init(model, shown, ctx))
  _, answer, kv, ran, _, taken, _ = nn.while_loop(going, body, model, carry, carry_variables=(),
                                                  broadcast_variables='params')
  if cached and not through:
    kv = {**kv, 'loop': ctx.memory.fill_skipped(kv['loop'], ctx.pos, taken[:, 0] - 1)}
  return answer, kv, taken, ran


def _without_gradient(cell, x, e, row_of, count, ctx, kv):
  """As `_walk`; reverse mode passes it because every input with a tangent is stopped, parameters included."""
  stop = functools.partial(jax.tree.map, jax.lax.stop_gradient)
  walk = nn.map_variables(lambda cell, x, e, kv: _walk(cell, x, e, row_of, count, ctx, kv), 'params', trans_in_fn=stop)
  return walk(cell, stop(x), stop(e), stop(kv))
