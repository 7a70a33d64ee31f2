"""The model: read in, loop, read out. A paper is this module with its parts in the sockets."""
from __future__ import annotations

import functools
from typing import Any

from flax import errors, linen as nn
import jax
import jax.numpy as jnp

from loopformer import loop, memories as memories, roles, starts
from loopformer.inference.sampler import Autoregressive
from loopformer.nn import modules
from loopformer.nn.embed import Head, TiedHead, TokenEmbed, Tokens, Vectors
from loopformer.nn.layers import Linear, transposed
from loopformer.nn.stack import Stack
from loopformer.types import Array, Batch, ConfigError, Context, Params, Plan, Readout, StepView, Trace


class Looped(nn.Module):
  """e = prelude(read_in(tokens)); x = start(e); x = cell(x, e) for every row of the plan; z = norm(coda(bridge(x))).

  loops: L, the most loops that it is trained for, and the slots of its cache. bridge: a projection between the loop and
  what follows. remat: what the backward pass saves. sampler: how it makes texts.

  Modules are values: an instance that stands in two places, in any depth, means two sets of parameters.
  """
  read_in: TokenEmbed | Tokens | Vectors
  cell: nn.Module
  read_out: TiedHead | Head = TiedHead()
  loops: int = 8
  prelude: Stack | None = None
  start: Any = starts.Embedded()
  bridge: Linear | None = None
  coda: Stack | None = None
  memory: Any = memories.PerLoop()
  remat: Any = loop.PerStep()
  sampler: Any = Autoregressive()

  def __post_init__(self):
    for name, value in modules.unshared(modules.fields(self)).items():
      object.__setattr__(self, name, value)
    super().__post_init__()

  def __call__(self, tokens: Array, plan: Plan, pos: Array | None = None, seg: Array | None = None,
               kv: dict[str, Any] | None = None, keep: Any = loop.Last(), precomputed: Any = None,
               noise: Array | None = None) -> Trace:
    """Runs a plan.

    Args:
      tokens: i32[B, T], or f32[B, T, width] where inputs are vectors.
      plan: the steps to take.
      pos: i32[B, T], positions in the document; 0..T-1 if absent; -1 marks padding (with a cache only).
      seg: None or i32[B, T]; tokens attend within equal numbers only: those of documents, from 1, and 0 for padding.
      kv: None (the parallel pass), or the caches of `cache`, which are read and extended.
      keep: which states the trace keeps besides the last.
      precomputed: `precompute(plan)`, where it was computed before (once for many tokens).
      noise: keys [B] of a pass that learns, where starts are drawn and routers may look ahead; None where it answers.
    """
    kv = dict(kv or {})
    ctx = self._context(tokens, pos, seg, noise)
    e = self.read_in(tokens, ctx.pos)
    if self.prelude is not None:
      e, kv['prelude'] = self.prelude(e, ctx, None, kv.get('prelude'))
    x, kv['loop'], xs, aux, steps = self.cell.run(self.cell.enter(self.start(e, ctx)), e, plan, ctx, kv.get('loop'),
                                                 keep, self.remat, precomputed)
    x = self.cell.output(x)
    z, kv['coda'] = self._finish(x, ctx, kv.get('coda'))
    kv = {name: cache for name, cache in kv.items() if cache is not None}
    return Trace(x=x, z=z, xs=xs, aux=aux, kv=kv, steps=steps, plan=plan)

  def adapt(self, tokens: Array, plan: Plan, exit_policy: Any, threshold: Array | None, pos: Array | None = None,
            seg: Array | None = None, kv: dict[str, Any] | None = None, precomputed: Any = None,
            keys: Array | None = None) -> Trace:
    """Runs the steps of a plan until `exit_policy` (exits.Adaptive) lets go; arguments as for the model itself.

    threshold: the rule's, f32[] or f32[B, 1] (`exit_policy.threshold`). keys: [B], of a rule that draws; None: one
    fixed key for all sequences.

    Returns:
      A trace whose steps are those that every token took, i32[B, T], and whose aux['ran'] is the number that ran.
    """
    kv = dict(kv or {})
    ctx = self._context(tokens, pos, seg).replace(keys=keys)
    e = self.read_in(tokens, ctx.pos)
    if self.prelude is not None:
      e, kv['prelude'] = self.prelude(e, ctx, None, kv.get('prelude'))

    def observe(model, k, last, old, new, aux, coda):
      caches = [coda]

      def logits():
        z, caches[0] = model._finish(new, ctx, caches[0])
        return model.logits(z)

      return StepView(k=k, last=last, old=old, new=new, aux=aux, logits=logits), lambda: caches[0]

    looped = {name: kv[name] for name in ('loop', 'coda') if kv.get(name) is not None}
    x, looped, taken, ran = loop.adapt(self, self.cell.enter(self.start(e, ctx)), e, plan, ctx, looped, exit_policy,
                                       threshold, precomputed, observe)
    kv |= looped
    z, kv['coda'] = self._finish(x, ctx, kv.get('coda'))
    kv = {name: cache for name, cache in kv.items() if cache is not None}
    return Trace(x=x, z=z, xs=None, aux={'ran': ran}, kv=kv, steps=taken, plan=plan)

  def _context(self, tokens, pos, seg, noise=None):
    if pos is None:
      pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    return Context(pos=pos, seg=seg, tokens=tokens, noise=noise, memory=self.memory, remat=self.remat)

  def _finish(self, x, ctx, kv):
    x = self.read_out.before(x)
    x = x if self.bridge is None else self.bridge(x)
    if self.coda is not None:
      x, kv = self.coda(x, ctx, None, kv)
    return self.read_out(x), kv

  def read(self, x: Array, tokens: Array, pos: Array | None = None, seg: Array | None = None) -> Array:
    """A state of the loop [B, T, D] -> z [B, T, D], ready for the head."""
    return self._finish(x, self._context(tokens, pos, seg), None)[0]

  def table(self) -> Array:
    """The head's matrix, [V, D]; logits are z @ table^T."""
    return self.read_out.table(self.read_in)

  def logits(self, z: Array) -> Array:
    """[..., D] -> f32[..., V]: the head alone."""
    return transposed(z.astype(self.dtype), self.table())

  def precompute(self, plan: Plan) -> Any:
    """What the cell computes ahead of the loop."""
    return self.cell.precompute(plan)

  def step(self, x: Array, e: Array, ctx: Context, kv: Any) -> tuple[Array, Any, Any]:
    """One application of the cell, for loops that stop by what they see."""
    return self.cell(x, e, ctx, kv)

  def stacks(self) -> dict[str, Stack]:
    """The stacks by the names of their caches."""
    stacks = {'prelude': self.prelude, 'loop': self.cell.core, 'coda': self.coda}
    return {name: stack for name, stack in stacks.items() if stack is not None}

  def cache(self, batch: int, length: int, loops: int | None = None) -> dict[str, Any]:
    """Empty caches, trees of KV, by the names of their stacks, for `batch` rows of `length` positions and plans of up
    to `loops` steps."""
    caches = {}
    for name, stack in self.stacks().items():
      size = stack.applications, batch, length, *stack.block.heads_of(self.read_in.width), stack.block.dtype
      caches[name] = (self.memory.make(loops or self.loops, *size, width=self.read_in.width) if name == 'loop' else
                      memories.empty(1, *size))
    return caches

  def flops(self, length: int, steps: float) -> float:
    """Floating-point operations a token of a forward pass with `steps` loops, head included, embedding not.

    Analytic, because XLA counts the body of a scan once.
    """
    width = self.read_in.width
    around = sum(stack.flops(width, length) for name, stack in self.stacks().items() if name != 'loop')
    bridge = 0 if self.bridge is None else 2.0 * width * width
    return around + self.cell.flops(width, length, steps) + bridge + 2.0 * width * self.outputs

  @property
  def dtype(self) -> str:
    """Of the operands of products, the head's too, which sums in float32."""
    return self.cell.core.block.dtype

  @property
  def outputs(self) -> int:
    """Rows of the head's matrix."""
    return self.read_out.outputs_of(self.read_in)


def run_batch(model: Looped, params: Params, batch: Batch, plan: Plan, **options: Any) -> Trace:
  """A pass over a batch: its tokens, at its positions and within its segments, where it has them.

  options: further arguments of the model, such as `keep`, `noise`, or `method='adapt'` and what that takes.
  """
  trace: Any = model.apply({'params': params}, batch['tokens'], plan, pos=batch.get('positions'),
                           seg=batch.get('segments'), **options)
  return trace


def make_readout(model: Looped, params: Params, batch: Batch) -> Readout:
  """The way from states of this batch to answers."""
  variables = {'params': params}
  table: Any = model.apply(variables, method='table')

  def one(x):
    return model.apply(variables, x, batch['tokens'], batch.get('positions'), batch.get('segments'), method='read')

  def read(x):
    return one(x) if x.ndim == 3 else jax.vmap(one)(x)

  return Readout(table=table, read=read, dtype=model.dtype)


def init_params(model: Looped, key: Array) -> Any:
  """Parameters of the model, a nested dict of float32 arrays; run it under `jax.jit` or `jax.eval_shape`.

  Raises:
    ConfigError: two parts would have their parameters in one place, as a cell around another of its own kind.
  """
  plan = Plan(t=jnp.zeros(1), dt=jnp.ones(1))
  try:
    return model.init(key, model.read_in.example(), plan, method=_touch_all)['params']
  except errors.NameInUseError as error:
    told = str(error).partition(': Name in use')[0]
    raise ConfigError(f'model: two of its parts would have their parameters in one place ({told}); of cells that stand '
                      'around one another, take each kind once') from error


def _touch_all(model, tokens, plan):
  return model.logits(model(tokens, plan).z)


def _declared(model: Looped) -> tuple[Any, roles.Roles]:
  """Shapes and roles of the parameters, from one trace of their initialisation, which is remembered."""
  try:
    hash(model)
  except TypeError:  # a field of somebody's module is a list or a dict
    return _of_initialisation(model)
  return _remembered(model)


def _of_initialisation(model):
  with roles.collecting() as collected:
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
  return shapes, collected(shapes)


_remembered = functools.lru_cache(maxsize=256)(_of_initialisation)


def parameter_shapes(model: Looped) -> Any:
  """The tree of `init_params`, of shapes and dtypes (jax.ShapeDtypeStruct); nothing is allocated."""
  return jax.tree.map(lambda leaf: leaf, _declared(model)[0])  # dicts of its own: others may change them


def parameter_roles(model: Looped) -> roles.Roles:
  """What each parameter is to optimisers, meshes and decoding (roles.py)."""
  return _declared(model)[1]


def parameter_count(model: Looped) -> int:
  """Number of parameters, without allocating them."""
  return sum(leaf.size for leaf in jax.tree.leaves(parameter_shapes(model)))
