"""The routed cell: a router decides which tokens take a recursion (Mixture-of-Recursions, 2507.10524).

A step of the loop is a recursion, a row of the plan. Recursions differ in how many tokens they take, so they are not
scanned but follow one another in the program, each with the shapes of its own.

What learns and what answers choose differently. A pass with noise, which is what the objective's rollouts are, lets an
expert-choice router take the best k of a sequence, later tokens included, and computes these alone. Every other pass,
cached or not, asks the causal part `answer`, token by token; without a cache it computes all and lets the chosen count.
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any

from flax import linen as nn, struct
import jax
import jax.numpy as jnp
import numpy as np

from loopformer import loop
from loopformer.cells.cell import Cell
from loopformer.memories import map_caches, slots_of
from loopformer.nn.layers import Linear, Normal, gelu
from loopformer.nn.stack import Stack
from loopformer.types import KV, Array, ConfigError, Context, Plan, Step, config_dataclass

EXACT = jax.lax.Precision.HIGHEST  # scores are compared with each other and with a threshold


@struct.dataclass
class Pick:
  """Tokens of a recursion.

  index: None (all of the sequence) or i32[B, k], places in it, in order. taken: bool[B, k], which of them the recursion
  changes (the others are padding, or there because shapes are static); gate: f32[B, k]. own: i32[B], tokens of the
  sequence that are no padding.
  """
  index: Array | None
  taken: Array
  gate: Array | None = None
  own: Array | None = None


def tokens_of(ctx: Context) -> Array:
  """bool[B, T]: which places hold tokens, and no padding: that has position -1, or in rows of documents the segment 0.
  """
  here = ctx.pos >= 0
  return here if ctx.seg is None else here & (ctx.seg != 0)


# Scores and gates ----------------------------------------------------------------------------------------------------


class LinearScore(nn.Module):
  """s = W x in float32, without bias; W ~ N(0, std^2)."""
  std: float = 0.02

  @nn.compact
  def __call__(self, x: Array, outputs: int) -> Array:
    """[..., D] -> f32[..., outputs]."""
    kernel = self.param('kernel', Normal(self.std), (x.shape[-1], outputs))
    return jnp.dot(x.astype(jnp.float32), kernel, precision=EXACT)

  def flops(self, width: int, outputs: int) -> float:
    """Floating-point operations a token, forward."""
    return 2.0 * width * outputs


class MLPScore(nn.Module):
  """s = W2 gelu(W1 x) in float32, 2 D wide."""
  std: float = 0.02

  @nn.compact
  def __call__(self, x: Array, outputs: int) -> Array:
    """[..., D] -> f32[..., outputs]."""
    hidden = gelu(Linear(2 * x.shape[-1], self.std, name='up')(x.astype(jnp.float32)))
    return Linear(outputs, self.std, name='down')(hidden)

  def flops(self, width: int, outputs: int) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width * width + 4.0 * width * outputs


@config_dataclass
class Sigmoid:
  """share = sigmoid(s), gate = alpha * share."""
  alpha: float = 0.1
  joint = False

  def __call__(self, scores: Array) -> Array:
    """f32[..., scores of a token] -> shares, the same shape."""
    return jax.nn.sigmoid(scores)


@config_dataclass
class Softmax:
  """share = softmax(s) over a token's recursions, gate = alpha * share; for token choice."""
  alpha: float = 1.0
  joint = True

  def __call__(self, scores: Array) -> Array:
    """f32[..., scores of a token] -> shares, the same shape."""
    return jax.nn.softmax(scores, -1)


@config_dataclass
class Open:
  """gate = 1: the router chooses, and nothing tells it how well."""
  alpha, joint = 1.0, False

  def __call__(self, scores: Array) -> Array:
    """f32[..., scores of a token] -> shares, the same shape."""
    return jnp.ones_like(scores)


# How an expert-choice router chooses ---------------------------------------------------------------------------------
# ranks: whether it can pick a given number in training; causal: whether it can answer; asks: for an auxiliary router.


@config_dataclass
class TopK:
  """The k highest scores of a sequence, the earlier of equals; it looks at later tokens, and is for training alone."""
  ranks, causal, asks = True, False, False

  def order(self, score: Array, ctx: Context, r: int) -> Array:
    """f32[B, k] -> what is ranked, the same shape."""
    return score


@config_dataclass
class Threshold:
  """sigmoid(score) > `at`: the score itself, which the loss of terms/terms.py separates into 0 and 1."""
  at: float = 0.5
  ranks, causal, asks = False, True, False

  def __post_init__(self):
    if not 0 < self.at < 1:
      raise ConfigError(f'router.answer.at = {self.at}: a probability above 0 and below 1')

  def takes(self, score: Array, other: Array | None, ctx: Context, r: int, share: float) -> Array:
    """bool[B, T]; share: the part of its candidates that the recursion is to take."""
    return jax.nn.sigmoid(score) > self.at


@config_dataclass
class Auxiliary:
  """The auxiliary router says so: it reads the same states, which learn nothing from it."""
  at: float = 0.5
  ranks, causal, asks = False, True, True

  def __post_init__(self):
    Threshold(at=self.at)  # which checks it

  def takes(self, score: Array, other: Array | None, ctx: Context, r: int, share: float) -> Array:
    """As Threshold.takes."""
    assert other is not None  # where a part `asks`, there is one
    return jax.nn.sigmoid(other) > self.at


@config_dataclass
class Chance:
  """Tokens at random, whatever their score: the control. In an answer by the position alone."""
  seed: int = 0
  ranks, causal, asks = True, True, False

  def order(self, score: Array, ctx: Context, r: int) -> Array:
    """As TopK.order."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, r), score.shape[1:]))(ctx.noise)

  def takes(self, score: Array, other: Array | None, ctx: Context, r: int, share: float) -> Array:
    """As Threshold.takes."""
    key = jax.random.fold_in(jax.random.key(self.seed), r)
    draw = jax.vmap(jax.vmap(lambda pos: jax.random.uniform(jax.random.fold_in(key, pos))))
    return draw(jnp.maximum(ctx.pos, 0)) < share


@config_dataclass
class Added:
  """x + g f(x), f with its own residual: a token that is taken grows by g x besides (the paper)."""

  def __call__(self, x: Array, y: Array, gate: Array) -> Array:
    """[B, k, D] twice, f32[B, k, 1] -> [B, k, D]."""
    return x + gate * y


@config_dataclass
class Moved:
  """(1 - g) x + g f(x): with g = 1 the plain loop."""

  def __call__(self, x: Array, y: Array, gate: Array) -> Array:
    """As Added."""
    return (1 - gate) * x + gate * y


class ExpertChoice(nn.Module):
  """Every recursion has a router of its own, which chooses among the tokens of the recursion before (section 2).

  capacities: of each recursion, the part of the sequence that it takes, k = max(1, int(c T)) of its T tokens, which
  padding (`tokens_of`) is none of; documents of a row compete for them. None above the one before. A recursion of
  capacity 1 takes all, in training and after it. score: a router, one for each; auxiliary: another, for `answer`.
  train: how a pass that learns chooses; answer: how all others do. combine: what becomes of a token that was taken,
  given the layers' output.
  """
  capacities: tuple[float, ...] = (1.0, 2 / 3, 1 / 3)
  score: nn.Module = LinearScore()
  gate: Sigmoid | Open = Sigmoid()
  combine: Added | Moved = Added()
  train: TopK | Chance = TopK()
  answer: Threshold | Auxiliary | Chance = Threshold()
  auxiliary: nn.Module | None = None

  def setup(self):
    self.scores = [self.score.clone(parent=None) for _ in self.capacities]
    self.others = [self.auxiliary.clone(parent=None) for _ in self.capacities] if self.auxiliary is not None else []

  def check(self):
    """Raises ConfigError for capacities and parts that do not fit."""
    where = f'model.cell.router.capacities = {self.capacities}: '
    if not self.capacities or not all(0 < c <= 1 for c in self.capacities):
      raise ConfigError(where + 'give each recursion a share of the sequence, above 0 and at most 1')
    if any(late > early for early, late in zip(self.capacities, self.capacities[1:])):
      raise ConfigError(where + 'a recursion chooses among the tokens of the one before, so that none may have more; '
                        'sort them')
    if not self.train.ranks:
      raise ConfigError(f'model.cell.router.train = {self.train}: it takes no fixed number; use TopK() or Chance()')
    if not self.answer.causal:
      raise ConfigError(f'model.cell.router.answer = {self.answer}: it looks at later tokens, which no answer can '
                        'know; use Threshold() or Auxiliary(), and routing.AsTrained() to measure what training does')
    if self.gate.joint:
      raise ConfigError(f'model.cell.router.gate = {self.gate}: of the one score that a recursion gives it is always '
                        '1; use Sigmoid()')
    if self.answer.asks and self.auxiliary is None:
      raise ConfigError(f'model.cell.router.answer = {self.answer}: there is no auxiliary router to ask; give it by '
                        'auxiliary=LinearScore(), and RouterBCE(of=\'auxiliary\') to learn from')

  def begin(self, x: Array, plan: Plan, ctx: Context) -> Pick:
    """Before the first recursion all tokens are candidates, but for padding."""
    if self.is_initializing():
      for router in (*self.scores, *self.others):
        router(x, 1)
    taken = tokens_of(ctx)
    return Pick(index=None, taken=taken, own=taken.sum(-1))

  def choose(self, x: Array, among: Pick, r: int, ctx: Context, has_capacity: Any) -> tuple[Pick, Pick, dict]:
    """Recursion r, from 0: (its tokens, the candidates of the next, auxiliaries [B, T]).

    has_capacity: bool[B, T] -> bool[B, T], those who find a place in the cache.
    """
    rows, length = among.index, x.shape[1]
    states = x if rows is None else _at(x, rows)
    score = self.scores[r](states, 1)[..., 0]
    other = self.others[r](jax.lax.stop_gradient(states), 1)[..., 0] if self.others else None
    gate = self.gate.alpha * self.gate(score)
    share = self.capacities[r] / (self.capacities[r - 1] if r else 1.0)
    here = ctx if rows is None else dataclasses.replace(ctx, pos=_at(ctx.pos, rows))
    would = among.taken  # what an answer takes
    if self.capacities[r] < 1:
      would &= self.answer.takes(score, other, here, r, share)
    counts = np.array([max(1, int(self.capacities[r] * own + 1e-6)) for own in range(length + 1)])
    if ctx.noise is None:
      pick = Pick(index=None, taken=has_capacity(would), gate=gate)
    elif share == 1:
      pick = Pick(index=rows, taken=among.taken, gate=gate)
    else:
      order = jnp.where(among.taken, self.train.order(score, ctx, r), -jnp.inf)  # padding comes last
      best = jax.lax.top_k(order, counts[-1])[1]
      chosen = _at(among.taken, best) & (jnp.arange(counts[-1]) < jnp.asarray(counts)[among.own][:, None])
      best, chosen = jax.lax.sort((best, chosen), num_keys=1)
      pick = Pick(index=best if rows is None else _at(rows, best), taken=chosen, gate=_at(gate, best))
    pick = dataclasses.replace(pick, own=among.own)
    aux = {'score': _spread(score, rows, length), 'candidate': _spread(among.taken, rows, length),
           'causal': _spread(would, rows, length), 'taken': _spread(pick.taken, pick.index, length)}
    if other is not None:
      aux['auxiliary'] = _spread(other, rows, length)
    return pick, pick, aux

  def blend(self, x: Array, y: Array, pick: Pick, among: Pick, r: int) -> Array:
    """The states of tokens that are taken: x before, y after the layers, [B, k, D]."""
    assert pick.gate is not None
    return self.combine(x, y, pick.gate[..., None].astype(x.dtype))

  def flops(self, width: int, r: int) -> float:
    """Floating-point operations of recursion r's routers, a token of the sequence."""
    share = self.capacities[r - 1] if r else 1.0
    return share * sum(each.flops(width, 1) for each in (self.score, self.auxiliary) if each is not None)


# How a token-choice router chooses -----------------------------------------------------------------------------------


@struct.dataclass
class Fate:
  """depth: i32[B, T], a token's last recursion, from 0 (-1: none, padding); score, share: f32[B, T, R] of all
  recursions; first: [B, T, D], the state before the loop."""
  depth: Array
  score: Array
  share: Array
  first: Array


@config_dataclass
class AtExit:
  """f(x) at every recursion, and first + g f(x) at a token's last (the released code)."""

  def __call__(self, y: Array, gate: Array, last: Array, first: Array) -> Array:
    """y, first [B, T, D], gate f32[B, T, 1], last bool[B, T, 1] -> [B, T, D]."""
    return jnp.where(last, first + gate * y, y)


@config_dataclass
class EveryStep:
  """g f(x) at every recursion, and first + g f(x) at a token's last (the paper's equation 2.2)."""

  def __call__(self, y: Array, gate: Array, last: Array, first: Array) -> Array:
    """As AtExit."""
    return gate * y + jnp.where(last, first, 0)


class TokenChoice(nn.Module):
  """One router, which tells from a token's state before the loop how many recursions it takes (section 2).

  The last recursion is that of the highest share, with the bias: of a plan that is shorter, its last one. It depends on
  the token alone, so training and answers choose alike; both compute all tokens and let those count that are under way.

  Live rows of a plan come before the others. recursions: the most. bias: None, or an initialiser of what is added to
  shares where they are compared, and only there: terms/terms.py and routing.LossFree move it against the load.
  """
  recursions: int = 3
  score: nn.Module = LinearScore()
  gate: Sigmoid | Softmax = Softmax()
  combine: AtExit | EveryStep = AtExit()
  bias: Any = None

  def setup(self):
    self.scores = self.score.clone(parent=None)
    self.biases = self.param('bias', self.bias, (self.recursions,)) if self.bias is not None else None

  @property
  def capacities(self) -> tuple[float, ...]:
    """What each recursion computes, of the sequence."""
    return (1.0,) * self.recursions

  def check(self):
    """Raises ConfigError for a number of recursions that is none."""
    if self.recursions < 1:
      raise ConfigError(f'model.cell.router.recursions = {self.recursions}: must be 1 or more')

  def begin(self, x: Array, plan: Plan, ctx: Context) -> Fate:
    """Decides for all recursions."""
    score = self.scores(x, self.recursions)
    share = self.gate(score)
    compared = share if self.biases is None else share + self.biases
    steps = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0)
    depth = jnp.minimum(compared.argmax(-1).astype(jnp.int32), steps.reshape(-1, 1) - 1)
    return Fate(depth=jnp.where(tokens_of(ctx), depth, -1), score=score, share=share, first=x)

  def choose(self, x: Array, fate: Fate, r: int, ctx: Context, has_capacity: Any) -> tuple[Pick, Fate, dict]:
    """As ExpertChoice.choose."""
    taken = has_capacity(fate.depth >= r)
    fate = dataclasses.replace(fate, depth=jnp.where(taken, fate.depth, jnp.minimum(fate.depth, r - 1)))
    pick = Pick(index=None, taken=taken, gate=self.gate.alpha * fate.share[..., r])
    return pick, fate, {'score': fate.score[..., r], 'share': fate.share[..., r], 'candidate': tokens_of(ctx),
                        'causal': taken, 'taken': taken}

  def blend(self, x: Array, y: Array, pick: Pick, fate: Fate, r: int) -> Array:
    """As ExpertChoice.blend."""
    assert pick.gate is not None
    return self.combine(y, pick.gate[..., None].astype(x.dtype), (fate.depth == r)[..., None], fate.first)

  def flops(self, width: int, r: int) -> float:
    """Floating-point operations of the router at recursion r, a token."""
    return 0.0 if r else self.score.flops(width, self.recursions)


# The cell ------------------------------------------------------------------------------------------------------------


@struct.dataclass
class Segmented(KV):
  """A cache of whole sequences in which several documents lie: seg i32[B, S], that of each position."""
  seg: Array | None = None

  def visible(self, pos: Array, ctx: Context) -> Array:
    """As of KV, within a document."""
    assert self.seg is not None and ctx.seg is not None
    return super().visible(pos, ctx) & (self.seg[:, None] == ctx.seg[..., None])


class Routed(Cell):
  """x of the tokens that the router takes becomes router.blend(x, core(x)); that of the others stays, bit for bit.

  Keys are those of the recursion's own tokens (recursion-wise caching). With a memory that has fewer slots than the
  plan has steps, the pass without a cache goes through one too, so that it is what decoding computes: memory.First is
  recursive sharing, memory.Ring(size=1) the sharing in which later recursions write over the entries of their tokens.
  """
  core: Stack
  router: ExpertChoice | TokenChoice = ExpertChoice()
  stepwise = False

  @property
  def most(self) -> int:
    """The most steps of a plan: recursions that the router is made for."""
    return len(self.router.capacities)

  def check(self, width: int):
    """Raises ConfigError where the router's parts do not fit each other."""
    self.router.check()

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token of the sequence, forward: linear maps by a recursion's capacity, attention by
    its square (with shared keys it reads more than that)."""
    total = 0.0
    for r, c in enumerate(self.router.capacities):
      runs = min(max(steps - r, 0.0), 1.0)
      total += runs * (c * self.core.flops(width, c * length) + self.router.flops(width, r))
    return total

  def __call__(self, x: Array, e: Array, ctx: Context, kv: Any) -> tuple[Array, Any, dict]:
    """Raises ConfigError: a recursion's candidates are those of the one before, which a step alone does not know."""
    raise ConfigError('model.cell = Routed: its router decides how many recursions each token takes, and its steps do '
                      'not run one by one; leave the exit out, or use a cell without a router')

  def run(self, x: Array, e: Array, plan: Plan, ctx: Context, kv: Any, keep: Any, remat: Any, precomputed: Any = None):
    """As loop.run. Row k of the plan is recursion k; one that does not run passes all tokens through."""
    self.router.check()
    cached = kv is not None
    if plan.steps > self.most:
      raise ConfigError(f'plan: {plan.steps} steps, but model.cell.router is made for {self.most} recursions; ask for '
                        'at most so many loops')
    if plan.no_grad_steps is not None:
      raise ConfigError('plan.no_grad_steps: these have no row in the plan, and a router has nothing to choose for '
                        'them; use a plan without them')
    if cached:
      ctx, kv = dataclasses.replace(ctx, noise=None), self._cut(kv, plan, ctx, keep)
    begun = self.router.begin(x, plan, ctx)
    if not cached and ctx.memory is not None and ctx.memory.slots(plan.steps) < plan.steps:
      batch, length, width = x.shape
      kv = ctx.memory.make(plan.steps, self.core.applications, batch, length, *self.core.block.heads_of(width),
                           self.core.block.dtype, width=width)
      ctx = dataclasses.replace(ctx, pos=jnp.broadcast_to(jnp.arange(length), (batch, length)))
      if ctx.seg is not None:
        kv = map_caches(lambda one: Segmented(one.k, one.v, one.pos, one.layout, seg=ctx.seg), kv)
    route: Any = begun  # of the router's own type
    kept, auxes = [], []
    for r in range(plan.steps):
      active = None if plan.active is None or self.is_initializing() else plan.active[r]
      number: Any = np.int32(r)  # a constant of the program, by which caches of several shapes are told apart
      own = dataclasses.replace(ctx, step=Step(t=plan.t[r], dt=plan.dt[r], active=active, k=number))

      def has_capacity(taken, own=own, kv=kv):
        return taken if kv is None else own.memory.has_capacity(kv, own, taken)

      before = x
      pick, route, aux = self.router.choose(x, route, r, own, has_capacity)
      if cached:
        x, kv = _Step(r, pick, route, own).while_live(self, x, kv)
      else:
        x, kv = remat.once(functools.partial(_step, r))(self, x, kv, pick, route, own)
        runs = True if active is None else active.reshape(-1, 1)
        auxes.append({name: leaf & runs if leaf.dtype == bool else leaf for name, leaf in aux.items()})
      kept.append(keep(x, before))
    steps = jnp.int32(plan.steps) if plan.active is None else plan.active.sum(0).max()
    if cached:
      return x, kv, None, {}, steps
    kept, auxes = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows) for rows in (kept, auxes))
    return x, None, kept, auxes, steps

  def _cut(self, kv, plan, ctx, keep):
    """The cache without what it held at the positions that are read now, and beyond them.

    Elsewhere new entries take the places of old ones. Here a token may not come back to a recursion that it took in a
    draft, and would leave its entries there.
    """
    if keep != loop.Last():
      raise ConfigError(f'keep = {keep}: with a cache no states are kept; use loop.Last()')
    slots = slots_of(kv)
    if ctx.memory.slots(plan.steps) > slots:
      raise ConfigError(f'plan: {plan.steps} steps, but the cache has slots for {slots}; make it with '
                        'cache(..., loops=...) of all steps')
    start = jnp.where(ctx.pos >= 0, ctx.pos, jnp.iinfo(jnp.int32).max).min(-1)[:, None]
    return map_caches(lambda one: dataclasses.replace(one, pos=jnp.where(one.pos < start, one.pos, -1)), kv)


def _step(r, cell, x, kv, pick, route, ctx):
  """Recursion r of a pass without a cache of earlier tokens: (states, caches)."""
  return _Step(r, pick, route, ctx).if_live(cell, x, kv)


class _Step:
  """Recursion r of the tokens of `pick`; `route`: what the router has decided; `ctx`: of the whole sequence."""

  def __init__(self, r, pick, route, ctx):
    self.r, self.pick, self.route, self.ctx, self.active = r, pick, route, ctx, ctx.step.active

  def apply(self, cell, x, kv):
    """(states, caches) after it."""
    pick, ctx = self.pick, self.ctx
    taken = pick.taken if self.active is None else pick.taken & self.active.reshape(-1, 1)
    rows = x
    if pick.index is not None:
      rows = _at(x, pick.index)
      ctx = dataclasses.replace(ctx, pos=_at(ctx.pos, pick.index), tokens=_at(ctx.tokens, pick.index),
                                seg=None if ctx.seg is None else _at(ctx.seg, pick.index))
    if kv is None:  # tokens that are not taken keep to themselves
      seg = 0 if ctx.seg is None else ctx.seg
      ctx = dataclasses.replace(ctx, seg=2 * seg + (~taken).astype(jnp.int32))
    else:  # they write nothing
      ctx = dataclasses.replace(ctx, pos=jnp.where(taken, ctx.pos, -1))
    y, kv = cell.core(rows, ctx, None, kv)
    new = cell.router.blend(rows, y, pick, self.route, self.r).astype(x.dtype)
    new = jnp.where(taken[..., None], new, rows)
    if pick.index is None:
      return new, kv
    return x.at[jnp.arange(len(x))[:, None], pick.index].set(new, unique_indices=True), kv

  def if_live(self, cell, x, kv):
    """Skipped by a branch where no sequence takes it."""
    if self.active is None:
      return self.apply(cell, x, kv)
    return nn.cond(self.active.any(), self.apply, lambda cell, x, kv: (x, kv), cell, x, kv)

  def while_live(self, cell, x, kv):
    """The same as a loop of one round or none, which updates caches in place; no reverse mode."""
    if self.active is None:
      return self.apply(cell, x, kv)
    x, kv, _ = nn.while_loop(lambda cell, carry: carry[2], lambda cell, carry: (*self.apply(cell, *carry[:2]), False),
                             cell, (x, kv, self.active.any()), carry_variables=(), broadcast_variables='params')
    return x, kv


def _at(values, index):
  """[B, T, ...], i32[B, k] -> [B, k, ...]."""
  return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 2)), 1)


def _spread(values, index, length):
  """[B, k], places [B, k] -> [B, length], zero elsewhere."""
  if index is None:
    return values
  return jnp.zeros((len(values), length), values.dtype).at[jnp.arange(len(values))[:, None], index].set(values)
