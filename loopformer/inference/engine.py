"""Generation: rows of a batch that read, draw and end each on their own, through the same loop as the parallel pass.

Two compiled functions do the work. `prefill` reads prompts into rows of the cache, `decode` draws tokens for all rows.
Budgets, schedules, controls and lengths are arrays, a column a row, so that one program serves them all; lengths of
prompts are rounded up. `Engine` keeps the rows busy; `generate` is the engine for a list of prompts.

With a draft, decoding speculates across depth: a few loops propose tokens, one pass of all loops judges them, and what
is kept follows exactly the distribution of all loops (greedy: the very same text).

On a mesh every device has rows of its own (of those of one tensor group, heads of the same rows), and both functions
run on these alone: nothing that grows with rows or caches is exchanged, and a device waits for the others only where
the host looks.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import AbstractSet as Set, Any, Callable, Iterable, Iterator, Mapping, Sequence
import warnings

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from loopformer import backend, plans, sharding
from loopformer.data import chat
from loopformer.data.tokenizer import anchor, continuation, ends_of, prompt_ids
from loopformer.inference import exits
from loopformer.inference.flat import flattened
from loopformer.inference.sampling import (
  Contrast,
  SamplingParams,
  controls,
  sample,
  sampling_logits,
  stops,
  verify_draft,
)
from loopformer.memories import map_caches
from loopformer.nn.layers import transposed
from loopformer.training import processes
from loopformer.types import KV, SEEDS, Array, ConfigError, Params, Plan, Trace, whole

ROUND = 64  # lengths are rounded up to multiples of this
NEW_TOKENS = 64  # that `generate` writes after a prompt at most, where it is not told
SHARED = 16  # a prompt's beginning is taken from another row if it is at least so long


@struct.dataclass
class DecodeState:
  """B rows in generation, all on the device.

  plan: t, dt f32[K, B], active bool[K, B], a schedule a row; precomputed: what the cell made of it (`Cell.precompute`).
  kv, draft: the caches of all loops, and of the draft ({} without).
  last: i32[B, 2], the last two tokens, of which the second has not been read yet; place: i32[B], its position.
  left: i32[B], tokens that may still be drawn, 0 where the row is idle; drawn: i32[B], tokens drawn so far.
  keys: [B], a request's randomness; exits: [B], that of its exits, which comes from its seed alone; control: how its
  tokens are drawn.
  """
  plan: Plan
  precomputed: Any
  kv: Any
  draft: Any
  last: Array
  place: Array
  left: Array
  drawn: Array
  keys: Array
  exits: Array
  control: SamplingParams


def empty_rows(model: Any, params: Params, rows: int, length: int, loops: int, draft: int = 0) -> DecodeState:
  """Idle rows with caches for `length` positions and schedules of up to `loops` steps, drafts of `draft` (0: none)."""
  plan = Plan(t=jnp.zeros((loops, rows)), dt=jnp.zeros((loops, rows)),
              active=jnp.zeros((loops, rows), bool))
  precomputed = jax.eval_shape(lambda: model.apply({'params': params}, plan, method='precompute'))

  def numbers() -> Array:
    return jnp.zeros(rows, jnp.int32)

  return DecodeState(plan=plan, precomputed=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), precomputed),
                     kv=model.cache(rows, length, loops), draft=model.cache(rows, length, draft) if draft else {},
                     last=jnp.zeros((rows, 2), jnp.int32), place=numbers(), left=numbers(), drawn=numbers(),
                     keys=jax.random.split(jax.random.key(0), rows), exits=jax.random.split(jax.random.key(0), rows),
                     control=SamplingParams(temperature=jnp.zeros(rows), top_k=jnp.ones(rows, jnp.int32),
                                            top_p=jnp.ones(rows), vocab=jnp.ones(rows, jnp.int32)))


def partitions(model: Any, params: Params, rows: DecodeState, sizes: Mapping[str, int]) -> DecodeState:
  """Partitions of the rows' arrays over a mesh of these sizes: rows over data and fsdp, heads of caches over tensor."""
  def precomputed(count: int) -> Any:
    plan = jax.tree.map(lambda leaf: jnp.zeros((len(leaf), count), leaf.dtype), rows.plan)
    return jax.eval_shape(lambda: model.apply({'params': params}, plan, method='precompute'))

  def differing(one: jax.ShapeDtypeStruct, two: jax.ShapeDtypeStruct) -> P:  # the axis of rows grows with them
    return P(*(None if a == b else sharding.BATCH for a, b in zip(one.shape, two.shape)))

  each: Any = P(sharding.BATCH)  # in the places of arrays
  caches = (map_caches(lambda kv: sharding.of_cache(kv, sizes), tree) for tree in (rows.kv, rows.draft))
  return DecodeState(plan=jax.tree.map(lambda _: P(None, sharding.BATCH), rows.plan),
                     precomputed=jax.tree.map(differing, precomputed(1), precomputed(2)), kv=next(caches),
                     draft=next(caches), last=each, place=each,
                     left=each, drawn=each, keys=each, exits=each, control=jax.tree.map(lambda _: each, rows.control))


def _by_rows(function: Callable[..., tuple], mesh: jax.sharding.Mesh | None, model: Any, params: Params,
             rows: DecodeState, others: tuple, other_specs: tuple, out_specs: tuple) -> tuple:
  """`function` of (params, rows, *others) -> (rows, *outputs), on every device with its own rows."""
  if mesh is None:
    return function(params, rows, *others)
  whole = partitions(model, params, rows, mesh.shape)
  own = jax.tree.map(lambda spec: sharding.only(spec, sharding.BATCH), whole)
  new, *outputs = jax.shard_map(function, mesh=mesh, in_specs=(P(), own, *other_specs), out_specs=(own, *out_specs),
                                axis_names=set(sharding.BATCH), check_vma=False)(params, rows, *others)
  return jax.lax.with_sharding_constraint(new, _on(whole, mesh)), *outputs


def _on(specs: Any, mesh: jax.sharding.Mesh) -> Any:
  return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


@struct.dataclass
class PrefillBatch:
  """R requests that take their places, on a mesh as many for every device, whose rows are numbered by themselves.

  row: i32[R], where to; a number beyond the rows is nobody. tokens: i32[R, W], what is to be read, padded; lengths:
  i32[R], without padding. source: i32[R], a row that has read the same before; shared: i32[R], how many tokens of it.
  seed, number: u32[R], what the randomness of a request comes from. plan, control, left: as of `DecodeState`, with
  columns R.
  """
  row: Array
  tokens: Array
  lengths: Array
  source: Array
  shared: Array
  plan: Plan
  seed: Array
  number: Array
  control: SamplingParams
  left: Array


@functools.partial(jax.jit, static_argnums=(0, 6, 7), donate_argnames='rows')
def prefill(model: Any, params: Params, rows: DecodeState, new: PrefillBatch, draft_plan: Plan | None, ends: Array,
            mesh: jax.sharding.Mesh | None = None, contrast: Contrast | None = None) -> tuple[DecodeState, Array]:
  """Reads prompts into their rows, and draws the first token of each, i32[R].

  ends: i32[E], each of which ends a row. mesh: of several devices that divide the rows; None for one. contrast: as of
  `decode`.
  """
  each: Any = P(sharding.BATCH)  # in the places of arrays
  columns: Any = P(None, sharding.BATCH)
  arriving = PrefillBatch(row=each, tokens=each, lengths=each, source=each, shared=each, plan=columns, seed=each,
                          number=each,
                          control=each, left=each)
  return _by_rows(functools.partial(_prefill, model, contrast), mesh, model, params, rows, (new, draft_plan, ends),
                  (arriving, P(), P()), (each,))


def _prefill(model: Any, contrast: Contrast | None, params: Params, rows: DecodeState, new: PrefillBatch,
             draft_plan: Plan | None, ends: Array) -> tuple[DecodeState, Array]:
  variables = {'params': params}
  index = jnp.arange(new.tokens.shape[1])
  pos = jnp.where(index < new.lengths[:, None], new.shared[:, None] + index, -1)

  def read(caches: Any, plan: Plan) -> tuple[Trace, Any]:
    own = map_caches(lambda kv: _rows_of(kv, new.source, new.shared), caches)
    trace = model.apply(variables, new.tokens, plan, pos, kv=own)
    return trace, map_caches(lambda kv, read: _put(kv, new.row, read), caches, trace.kv)

  def last(trace: Trace) -> Array:
    z = jnp.take_along_axis(trace.z, (new.lengths - 1)[:, None, None], 1)[:, 0]
    return sharding.whole(model.apply(variables, z, method='logits'))

  trace, kv = read(rows.kv, new.plan)
  logits, draft = last(trace), rows.draft
  if draft_plan is not None:
    shallow, draft = read(rows.draft, draft_plan)
    logits = logits if contrast is None else contrast.logits(logits, last(shallow), new.control.vocab)
  seeds = jax.vmap(jax.random.key)(new.seed)
  keys = _fold(seeds, new.number)
  first = sample(sampling_logits(logits, new.control), _fold(keys, jnp.zeros_like(new.row)))
  before = jnp.take_along_axis(new.tokens, (new.lengths - 1)[:, None], 1)[:, 0]

  def put(old: Array, value: Array) -> Array:
    return old.at[new.row].set(value, mode='drop')

  plan = jax.tree.map(lambda old, own: old.at[:, new.row].set(own, mode='drop'), rows.plan, new.plan)
  return DecodeState(plan=plan, precomputed=model.apply(variables, plan, method='precompute'), kv=kv, draft=draft,
                     last=put(rows.last, jnp.stack([before, first], -1)),
                     place=put(rows.place, new.shared + new.lengths),
                     left=put(rows.left, jnp.where(_among(first, ends), 0, new.left - 1)),
                     drawn=put(rows.drawn, jnp.ones_like(new.row)), keys=put(rows.keys, keys),
                     exits=put(rows.exits, seeds), control=jax.tree.map(put, rows.control, new.control)), first


def _each(caches: Any) -> list[KV]:
  """All of them, in one list."""
  return jax.tree.leaves(caches, is_leaf=lambda leaf: isinstance(leaf, KV))


def _rows_of(kv: KV, source: Array, shared: Array) -> KV:
  """The caches of rows `source`, of which the first `shared` positions count."""
  pos = jnp.take(kv.pos, source, 1, mode='clip')
  return dataclasses.replace(kv, k=jnp.take(kv.k, source, 2, mode='clip'), v=jnp.take(kv.v, source, 2, mode='clip'),
                             pos=jnp.where(pos < shared[:, None], pos, -1))


def _put(kv: KV, row: Array, new: KV) -> KV:
  return dataclasses.replace(kv, k=kv.k.at[:, :, row].set(new.k, mode='drop'),
                             v=kv.v.at[:, :, row].set(new.v, mode='drop'),
                             pos=kv.pos.at[:, row].set(new.pos, mode='drop'))


def _among(tokens: Array, ends: Array) -> Array:
  return (tokens[..., None] == ends).any(-1)


def _fold(keys: Array, numbers: Array) -> Array:
  return jax.vmap(jax.random.fold_in)(keys, numbers)


@struct.dataclass
class Stats:
  """What decoding cost. tokens: i32[], drawn; passes: i32[], of all loops over a row; loops: i32[], steps that rows
  took in these; ran: i32[], steps that ran for the whole batch; kept: i32[], drafted tokens that stood."""
  tokens: Array
  passes: Array
  loops: Array
  ran: Array
  kept: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 10, 11), donate_argnames='rows')
def decode(model: Any, max_steps: int, num_draft: int, exit_policy: Any, params: Params, rows: DecodeState,
           draft_plan: Plan | None,
           threshold: Array | None, ends: Array, return_on_finish: Array, mesh: jax.sharding.Mesh | None = None,
           contrast: Contrast | None = None) -> tuple[DecodeState, Array, Array, Stats]:
  """Draws tokens for all rows that are not idle, until all are.

  Args:
    max_steps: at most so many passes of all loops.
    num_draft: tokens that the draft proposes before each; 0: none. draft_plan: the draft's schedule.
    exit_policy: None, or an exits.Adaptive that shortens passes; threshold: its own.
    ends: i32[E], each of which ends a row. return_on_finish: bool[], whether to return as soon as a row is idle.
    mesh: of several devices that divide the rows, each of which stops by its own; None for one.
    contrast: None, or a `sampling.Contrast` of all loops with those of `draft_plan`, which then drafts nothing.

  Returns:
    (rows, tokens i32[B, max_steps * (num_draft + 1)], how many of them there are i32[B], the stats).
  """
  divided = () if mesh is None else tuple(name for name in sharding.BATCH if mesh.shape[name] > 1)

  def own(*arguments: Any) -> tuple[DecodeState, Array, Array, Stats]:
    rows, out, count, stats = _decode(model, max_steps, num_draft, exit_policy, contrast, *arguments)
    if divided:
      tokens, passes, loops, kept = jax.lax.psum((stats.tokens, stats.passes, stats.loops, stats.kept), divided)
      stats = Stats(tokens=tokens, passes=passes, loops=loops, ran=jax.lax.pmax(stats.ran, divided), kept=kept)
    return rows, out, count, stats

  each = P(sharding.BATCH)
  return _by_rows(own, mesh, model, params, rows, (draft_plan, threshold, ends, return_on_finish), (P(),) * 4,
                  (each, each, P()))


def _decode(model: Any, max_steps: int, num_draft: int, exit_policy: Any, contrast: Contrast | None, params: Params,
            rows: DecodeState, draft_plan: Plan | None, threshold: Array | None, ends: Array, return_on_finish: Array
            ) -> tuple[DecodeState, Array, Array, Stats]:
  variables = {'params': params}
  batch, length = rows.place.shape[0], max(kv.length for kv in _each(rows.kv))
  at = jnp.arange(batch)
  draft_code = model.apply(variables, draft_plan, method='precompute') if draft_plan is not None else None
  started = rows.left > 0

  def positions(rows: DecodeState, offset: Array | int, count: int) -> Array:
    pos = rows.place[:, None] + offset + jnp.arange(count)
    return jnp.where((rows.left > 0)[:, None] & (pos < length), pos, -1)

  # Cast once, here: XLA would cast the whole table for every token.
  table = jax.lax.optimization_barrier(model.apply(variables, method='table').astype(model.dtype))

  def logits_of(z: Array) -> Array:
    return sharding.whole(transposed(z.astype(table.dtype), table))

  def full(rows: DecodeState, tokens: Array, pos: Array) -> tuple[Trace, Array, Array]:
    assert rows.plan.active is not None  # bool[K, B], of empty_rows
    active = rows.plan.active & (rows.left > 0)
    plan = dataclasses.replace(rows.plan, active=active)
    if exit_policy is None:
      trace = model.apply(variables, tokens, plan, pos, kv=rows.kv, precomputed=rows.precomputed)
      return trace, active.sum(), trace.steps
    trace = model.apply(variables, tokens, plan, exit_policy, threshold, pos, kv=rows.kv, precomputed=rows.precomputed,
                        keys=rows.exits,
                        method='adapt')
    return trace, trace.steps.sum(), trace.aux['ran']

  def propose(rows: DecodeState, keys: Array) -> tuple[DecodeState, Array, Array]:
    """The draft reads the last two tokens, for the first of them it may not have, and goes on from there."""
    def once(kv: Any, tokens: Array, pos: Array, i: Array | int) -> tuple[Any, Array, Array]:
      trace = model.apply(variables, tokens, draft_plan, pos, kv=kv, precomputed=draft_code)
      guess = sampling_logits(logits_of(trace.z[:, -1]), rows.control)
      return trace.kv, guess, sample(guess, _fold(keys, jnp.full(batch, 1 + i)))

    kv, guess, token = once(rows.draft, rows.last, positions(rows, -1, 2), 0)

    def more(carry: tuple[Any, Array], i: Array) -> tuple[tuple[Any, Array], tuple[Array, Array]]:
      kv, token = carry
      kv, guess, new = once(kv, token[:, None], positions(rows, i, 1), i)
      return (kv, new), (guess, new)

    (kv, _), (guesses, tokens) = jax.lax.scan(more, (kv, token), jnp.arange(1, num_draft))
    return (dataclasses.replace(rows, draft=kv), jnp.concatenate([guess[:, None], guesses.swapaxes(0, 1)], 1),
            jnp.concatenate([token[:, None], tokens.swapaxes(0, 1)], 1))

  def round_(carry: Carry) -> Carry:
    index, rows, out, count, stats = carry
    active = rows.left > 0
    keys = _fold(rows.keys, rows.drawn)
    current = rows.last[:, 1:]
    if num_draft:
      rows, guesses, proposed = propose(rows, keys)
      trace, loops, ran = full(rows, jnp.concatenate([current, proposed], 1), positions(rows, 0, num_draft + 1))
      logits = logits_of(trace.z)
      truth = jnp.stack([sampling_logits(logits[:, i], rows.control) for i in range(num_draft + 1)], 1)
      # Keys of their own: `split` and `fold_in` of one key can give the same.
      kept, final = verify_draft(proposed, guesses, truth, _fold(keys, jnp.zeros(batch, jnp.int32)))
      tokens = jnp.where(jnp.arange(num_draft + 1) == kept[:, None], final[:, None],
                         jnp.pad(proposed, ((0, 0), (0, 1))))
    else:
      trace, loops, ran = full(rows, current, positions(rows, 0, 1))
      kept = jnp.zeros(batch, jnp.int32)
      logits = logits_of(trace.z[:, 0])
      if contrast is not None:
        shallow = model.apply(variables, current, draft_plan, positions(rows, 0, 1), kv=rows.draft,
                              precomputed=draft_code)
        logits = contrast.logits(logits, logits_of(shallow.z[:, 0]), rows.control.vocab)
        rows = dataclasses.replace(rows, draft=shallow.kv)
      tokens = sample(sampling_logits(logits, rows.control), keys)[:, None]
    new = jnp.minimum(kept + 1, rows.left)  # how many of `tokens` are drawn in this round
    ended = _among(tokens, ends) & (jnp.arange(num_draft + 1) < new[:, None])
    new = jnp.where(ended.any(-1), ended.argmax(-1) + 1, new)
    target = jnp.where(active[:, None] & (jnp.arange(num_draft + 1) < new[:, None]),
                       count[:, None] + jnp.arange(num_draft + 1), out.shape[1])
    out = out.at[at[:, None], target].set(tokens, mode='drop')
    new = jnp.where(active, new, 0)
    both = jnp.concatenate([current, tokens], 1)
    last = jnp.take_along_axis(both, jnp.maximum(new, 1)[:, None] - 1 + jnp.arange(2), 1)
    rows = dataclasses.replace(rows, kv=trace.kv, last=jnp.where(active[:, None], last, rows.last),
                               place=rows.place + new, left=jnp.where(ended.any(-1), 0, rows.left - new),
                               drawn=rows.drawn + new)
    stats = Stats(tokens=stats.tokens + new.sum(), passes=stats.passes + active.sum(), loops=stats.loops + loops,
                  ran=stats.ran + ran, kept=stats.kept + jnp.where(active, jnp.minimum(kept, new), 0).sum())
    return index + 1, rows, out, count + new, stats

  def going(carry: Carry) -> Array:
    index, rows, *_ = carry
    idle = sharding.agreed((started & (rows.left == 0)).any())
    return (index < max_steps) & sharding.agreed((rows.left > 0).any()) & ~(return_on_finish & idle)

  zero = jnp.int32(0)
  out = jnp.zeros((batch, max_steps * (num_draft + 1)), jnp.int32)
  carry = (zero, rows, out, jnp.zeros(batch, jnp.int32), Stats(zero, zero, zero, zero, zero))
  _, rows, out, count, stats = jax.lax.while_loop(going, round_, carry)
  return rows, out, count, stats


Carry = tuple[Array, DecodeState, Array, Array, Stats]  # of decoding: rounds, rows, what was drawn, how much, the stats


# The host's side -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TextChunk:
  """New text of a request; `done` with its last piece."""
  request: int
  text: str
  done: bool


@dataclasses.dataclass
class _Request:
  number: int
  prompt: list[int]
  anchor: list[int]
  steps: tuple[float, ...]
  most: int
  control: SamplingParams
  seed: int
  draw_number: int
  stop: tuple[str, ...]
  drawn: list[int] = dataclasses.field(default_factory=list)
  told: str = ''
  done: bool = False


class Engine:
  """Continuous batching: requests of any lengths, budgets and controls share the rows; a finished row is refilled.

      engine = Engine(model, params, tokenizer, rows=8)
      for prompt in prompts: engine.submit(prompt, budget=4, stop=('\\n\\n',))
      for piece in engine.stream(): print(piece.request, piece.text)

  A prompt that begins as another did whose row still holds it, under the same schedule, is read from there on only.
  A request's text depends on its seed, prompt, budget and controls, and not on what shares the batch.

  Parameters that are divided over a mesh (`loopformer.load(..., mesh=)`) are gathered over fsdp and stay divided over
  tensor; rows and caches are divided over data and fsdp, heads over tensor. With several processes each of them submits
  the same requests, and gets the same texts.

  Args:
    rows: requests at a time; on a mesh rounded up to a multiple of data * fsdp.
    length: positions of a row, prompt and new tokens; the model's own by default.
    loops: most steps of a schedule; the model's own by default.
    exit: an exits.Adaptive, by which tokens take fewer loops than their budget; prompts are read with all of them.
    draft: a budget or schedule with which tokens are drafted before all loops verify them, `num_draft` at a time.
    max_steps: passes between two looks of the host.
    contrast: a `sampling.Contrast`, by which tokens are drawn from the difference to what fewer loops answer; these run
      besides, with caches of their own.

  It holds weights of its own: copies of the layers', which lie as decoding wants them (flat.flattened), and the rest
  as given. Where memory is short, let go of the ones it was given.

  Raises:
    ConfigError: an exit and a draft together, a contrast and a draft, or values out of range.
  """

  def __init__(self, model: Any, params: Params, tokenizer: Any, *, rows: int = 8, length: int | None = None,
               loops: int | None = None, exit: Any = None, draft: int | Sequence[float] | None = None,
               num_draft: int = 4, max_steps: int = 16, contrast: Contrast | None = None):
    _check_text(model, tokenizer)
    limit = model.read_in.length
    for name, value in (('rows', rows), ('num_draft', num_draft), ('max_steps', max_steps), ('loops', loops),
                        ('length', length)):
      if value is not None:
        whole(name, value, 1)
    if length is not None and not 1 < length <= limit:
      raise ConfigError(f'length = {length}: must be 2 to {limit}, the positions of the model (read_in.length)')
    if exit is not None:
      exits.check(model, exit, 'exit')
    if exit is not None and draft is not None:
      raise ConfigError('exit and draft: drafts are judged by all loops of the budget; give one of the two')
    if contrast is not None and draft is not None:
      raise ConfigError('contrast and draft: drafts would be judged by another law than theirs; give one of the two')
    if draft is not None and not (model.memory.exact and model.memory.rewinds):
      raise ConfigError(f'draft with memory = {model.memory}: what it decodes depends on how tokens are grouped, so '
                        'drafts cannot be judged exactly; use PerLoop() or First()')
    self._mesh = sharding.mesh_of(params)
    parts = 1 if self._mesh is None else sharding.row_parts(self._mesh)
    self._per = -(-rows // parts)  # rows of a device
    if self._mesh is not None:
      params = sharding.over_tensor(params, self._mesh)
    model, params = flattened(model, params, transpose=self._per > 1 or backend.current().sums_contiguous)
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self._vocab = min(tokenizer.vocab_size, model.read_in.vocab)
    self._ends = ends_of(tokenizer)
    self.length, self.loops, self.max_steps = length or limit, loops or model.loops, max_steps
    self.exit, self.num_draft = exit, num_draft if draft is not None else 0
    self.contrast = contrast
    self.draft_plan = None if draft is None else plans.schedule(plans.resolve(draft, 'draft'))
    if contrast is not None:
      self.draft_plan = plans.schedule(plans.resolve(contrast.shallow or 1, 'contrast.shallow'))
      if not contrast.shallow:
        self.draft_plan = dataclasses.replace(self.draft_plan, active=jnp.zeros(1, bool))
    # The request that a row serves, or served last.
    self._of: list[_Request | None] = [None] * (self._per * parts)
    self._rows = self._empty(0 if self.draft_plan is None else self.draft_plan.steps)
    self._waiting: list[_Request] = []
    self._requests, self._stats = 0, np.zeros(5, np.int64)

  def _empty(self, draft: int) -> DecodeState:
    make = functools.partial(empty_rows, self.model, self.params, len(self._of), self.length, self.loops, draft)
    if self._mesh is None:
      return make()
    specs = partitions(self.model, self.params, jax.eval_shape(make), self._mesh.shape)
    return jax.jit(make, out_shardings=_on(specs, self._mesh))()

  @property
  def bytes(self) -> int:
    """Bytes of all caches, drafts' included."""
    return sum(kv.bytes for kv in _each((self._rows.kv, self._rows.draft)))

  @property
  def stats(self) -> dict[str, float]:
    """What decoding has cost so far: tokens, passes of rows, mean loops of these, loops that ran for the whole batch,
    tokens a pass, and the share of drafted tokens that stood."""
    tokens, passes, loops, ran, kept = (int(n) for n in self._stats)
    result = {'tokens': tokens, 'passes': passes, 'loops': loops / max(passes, 1), 'ran': ran,
              'tokens a pass': tokens / max(passes, 1)}
    return {**result, 'accepted': kept / max(passes * self.num_draft, 1)} if self.num_draft else result

  def submit(self, prompt: str | Sequence[int] | Sequence[chat.Message], *, budget: int | Sequence[float] | None = None,
             max_new_tokens: int = NEW_TOKENS, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, seed: int = 0, number: int = 0, stop: Sequence[str] = ()) -> int:
    """Queues a request and returns its number, 0, 1, ...

    Args:
      prompt: a text, its ids, or the messages of a chat ({'role': 'user', 'content': ...}), which the tokenizer's
        template writes; an empty one starts a document.
      budget: loops a token (a number of equal steps), or a tuple of step sizes with sum one; all loops by default.
      max_new_tokens: at most this many tokens; fewer where the model ends the document, or its turn (`Tokenizer.ends`).
      temperature, top_k, top_p: 0 takes the likeliest token.
      seed, number: of the draws, 0 to 2^32 - 1; `number` tells requests of one seed apart.
      stop: texts before the first of which the continuation ends.

    Raises:
      ConfigError: what does not fit the positions or the loops of the engine; values out of range.
    """
    whole('max_new_tokens', max_new_tokens, 1)
    for name, value in (('seed', seed), ('number', number)):
      whole(name, value, 0, SEEDS - 1)
    stop = stops(stop)
    steps = plans.resolve(min(self.loops, self.model.loops) if budget is None else budget, 'budget')
    if len(steps) > self.loops:
      raise ConfigError(f'budget = {budget}: {len(steps)} steps, but the caches have slots for {self.loops}; make the '
                        f'engine with loops={len(steps)}')
    ids = _ids(prompt, self._requests, self.tokenizer, self._vocab) or [self.tokenizer.eos]
    if len(ids) + max_new_tokens > self.length:
      raise ConfigError(f'prompt {self._requests} has {len(ids)} tokens; with max_new_tokens = {max_new_tokens} that '
                        f'is more than the {self.length} positions of the model (read_in.length); shorten the prompt '
                        'or ask for fewer tokens')
    control = controls(self._vocab, temperature, top_k, top_p)
    self._waiting.append(_Request(self._requests, ids, anchor(self.tokenizer, ids), steps, max_new_tokens, control,
                                  seed, number, stop))
    self._requests += 1
    return self._requests - 1

  def stream(self) -> Iterator[TextChunk]:
    """Pieces of text as they come, until no request is left; more may be submitted meanwhile."""
    while self._waiting or any(request and not request.done for request in self._of):
      yield from self._admit()
      yield from self._advance()

  def run(self) -> list[str]:
    """The texts of all requests that were left, in the order of their numbers."""
    texts: dict[int, str] = {}
    for piece in self.stream():
      texts[piece.request] = texts.get(piece.request, '') + piece.text
    return [texts[number] for number in sorted(texts)]

  def _admit(self) -> Iterator[TextChunk]:
    """Fills idle rows with waiting requests; those of one width at a time."""
    idle = [row for row, request in enumerate(self._of) if request is None or request.done]
    idle.sort(key=lambda row: row % self._per)  # no device waits with idle rows while another has all to do
    while idle and self._waiting:
      batch = list(zip(idle, self._waiting))
      origin = [self._beginning(request, row // self._per) for row, request in batch]
      width = min(_rounded(max(len(r.prompt) - shared for (_, r), (_, shared) in zip(batch, origin))), self.length)
      groups = [[i for i, (row, _) in enumerate(batch) if row // self._per == device]
                for device in range(len(self._of) // self._per)]
      size = 1 if max(map(len, groups)) == 1 else self._per
      places = [i for group in groups for i in (*group, *[None] * (size - len(group)))]
      columns = [i or 0 for i in places]  # what is missing repeats the first, for nobody
      tokens: Any = np.full((len(places), width), self.tokenizer.eos, np.int32)
      for line, i in zip(tokens, places):
        if i is not None:
          (_, request), (_, shared) = batch[i], origin[i]
          line[:len(request.prompt) - shared] = request.prompt[shared:]

      def column(values: Sequence[Any], dtype: Any = np.int32) -> Any:
        return np.asarray([values[i] for i in columns], dtype)

      def columns_of(trees: Sequence[Any], axis: int) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *[trees[i] for i in columns])

      row: Any = np.asarray([self._per if i is None else batch[i][0] % self._per for i in places], np.int32)
      new = PrefillBatch(
          row=row, tokens=tokens, lengths=column([len(r.prompt) - n for (_, r), (_, n) in zip(batch, origin)]),
          source=column([row % self._per for row, _ in origin]), shared=column([n for _, n in origin]),
          plan=columns_of([plans.on_host(request.steps, self.loops) for _, request in batch], 1),
          seed=column([request.seed for _, request in batch], np.uint32),
          number=column([request.draw_number for _, request in batch], np.uint32),
          control=columns_of([request.control for _, request in batch], 0),
          left=column([request.most for _, request in batch]))
      self._rows, first = prefill(self.model, self.params, self._rows, new, self.draft_plan,
                                  np.asarray(self._ends, np.int32), self._mesh, self.contrast)
      del self._waiting[:len(batch)]
      token_of = dict(zip(places, processes.fetch(first).tolist()))
      for i, (row, request) in enumerate(batch):
        self._of[row] = request
        yield self._told(request, [token_of[i]])
      idle = [row for row, request in batch if request.done]

  def _beginning(self, request: _Request, device: int = 0) -> tuple[int, int]:
    """(row, n): a row of a device that has read the first n tokens of a prompt under the same schedule; its first row
    and 0 if none."""
    first = device * self._per
    best = (first, 0)
    if self.model.memory.exact and self.model.memory.rewinds:
      for row, other in enumerate(self._of[first:first + self._per], first):
        if other is not None and other.steps == request.steps:
          read = other.prompt + ([] if self.exit else other.drawn[:-2])
          n = _common(read, request.prompt[:-1])
          best = max(best, (row, n) if n >= SHARED else (first, 0), key=lambda pair: pair[1])
    return best

  def _advance(self) -> Iterator[TextChunk]:
    if not any(request and not request.done for request in self._of):
      return
    exit_policy, threshold = exits.compiled(self.exit)
    self._rows, out, count, stats = decode(
        self.model, self.max_steps, self.num_draft, exit_policy, self.params, self._rows, self.draft_plan, threshold,
        np.asarray(self._ends, np.int32), jnp.bool_(bool(self._waiting)), self._mesh, self.contrast)
    out, count, stats = processes.fetch((out, count, stats))
    self._stats += [stats.tokens, stats.passes, stats.loops, stats.ran, stats.kept]
    stopped: list[int] = []
    for row, request in enumerate(self._of):
      if request is not None and not request.done:
        piece = self._told(request, out[row, :count[row]].tolist())
        if piece.done and len(request.drawn) < request.most and request.drawn[-1] not in self._ends:
          stopped.append(row)  # by its text, of which the device knows nothing
        if piece.text or piece.done:
          yield piece
    if stopped:
      goes_on = np.isin(np.arange(len(self._of)), stopped, invert=True).astype(np.int32)
      left = jax.device_put(self._rows.left * goes_on, self._rows.left.sharding)
      self._rows = dataclasses.replace(self._rows, left=left)

  def _told(self, request: _Request, tokens: list[int]) -> TextChunk:
    """Adds drawn tokens to a request; the text that is certain by now and was not told yet."""
    request.drawn += tokens
    new = list(itertools.takewhile(lambda token: token not in self._ends, request.drawn))
    request.done = len(request.drawn) >= request.most or len(new) < len(request.drawn)
    text = continuation(self.tokenizer, request.anchor, new)
    cut = min((text.index(stop) for stop in request.stop if stop in text), default=None)
    if cut is not None:
      text, request.done = text[:cut], True
    certain = text if request.done else text[:len(text) - _pending(text, request.stop)]
    piece = certain[len(request.told):]
    request.told = certain
    return TextChunk(request.number, piece, request.done)


def _ids(prompt: Any, number: int, tokenizer: Any, vocab: int) -> list[int]:
  """Of a prompt. Raises ConfigError where it has others than tokenizer and model know, `vocab` of them."""
  if isinstance(prompt, str) or chat.is_messages(prompt):
    ids = (prompt_ids(tokenizer, prompt) if isinstance(prompt, str)
           else chat.begun(tokenizer, prompt, f'prompt {number}'))
    if max(ids, default=0) >= vocab:
      raise ConfigError(f'prompt {number}: the tokenizer gives the id {max(ids)}, but the model has {vocab} '
                        '(read_in.vocab); give the tokenizer that it was trained with')
    return ids
  return [whole(f'prompt {number}: the id', token, 0, vocab - 1) for token in chat.listed(prompt, f'prompt {number}')]


def _pending(text: str, ends: Sequence[str]) -> int:
  """Characters at the end that may still change: the beginning of a stop, or of a letter of several bytes."""
  open_ = len(text) - len(text.rstrip('\ufffd'))
  return max([open_, *(n for stop in ends for n in range(1, len(stop)) if text.endswith(stop[:n]))])


def _check_text(model: Any, tokenizer: Any):
  """Raises ConfigError where there is no text that could be generated."""
  if tokenizer is None or not model.read_in.vocab:
    raise ConfigError('tokenizer = None: no text can be generated; give one, such as '
                      'loopformer.data.tokenizer.GivenPieces(path=...).build(())' if model.read_in.vocab else
                      'model: its inputs are vectors, and it has no text that could be generated')


def _common(a: Sequence[int], b: Sequence[int]) -> int:
  """Length of the common beginning."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def generate(model: Any, params: Params, tokenizer: Any,
             prompts: Sequence[str | Sequence[int] | Sequence[chat.Message]], *,
             budget: int | Sequence[float] | None = None, max_new_tokens: int | None = None, temperature: float = 1.0,
             top_k: int | None = None, top_p: float | None = None, seed: int = 0, stop: Sequence[str] = (),
             exit: Any = None, draft: int | Sequence[float] | None = None, rows: int = 32) -> list[str]:
  """Continues prompts; with a masked diffusion model also fills their holes (`Denoiser.submit`). For many calls keep an
  `Engine`, or a `Denoiser`, which sets up weights and caches once.

  Args:
    prompts: texts, lists of ids, or chats, lists of messages ({'role': 'user', 'content': ...}) that the tokenizer's
      template writes; of any lengths; an empty one starts a document.
    budget: loops a token (a number of equal steps), or a tuple of step sizes with sum one; the model's own by default.
    max_new_tokens: at most this many tokens each; a row ends early where the model ends the document, or its turn.
      None: 64; of a masked diffusion model, which writes all positions at once, as many as it has after the prompt.
    temperature, top_k, top_p: 0 takes the likeliest token.
    seed: the same seed, prompts and controls give the same texts.
    stop: texts before the first of which a continuation ends.
    exit: an exits.Adaptive, by which tokens take fewer loops.
    draft: a budget or schedule that drafts tokens, which all loops then verify; the same distribution, faster where
      loops cost much. A masked diffusion model has neither, and takes the denoising steps of its sampler
      (`model.clone(sampler=Denoising(steps=8))`).
    rows: at most this many prompts at a time.
    params: on one device, or divided over a mesh, as of `Engine`.

  Returns:
    The continuations, without their prompts; of a prompt with holes the whole text.

  Raises:
    ConfigError: a prompt with its continuation does not fit the model's positions; a schedule or control out of range.
  """
  if isinstance(prompts, (str, bytes, Mapping, Set)) or not isinstance(prompts, Iterable):
    raise ConfigError(f'prompts = {prompts!r}: give a list of texts')
  _check_text(model, tokenizer)
  whole('rows', rows, 1)
  prompts = list(prompts)
  steps = plans.resolve(model.loops if budget is None else budget, 'budget')
  warn_beyond(model, steps)
  if not prompts:
    return []
  how: dict[str, Any] = dict(budget=budget, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                             top_p=top_p, seed=seed, stop=stops(stop))
  if model.sampler.denoises:
    served = model.sampler.serve(model, params, tokenizer, rows=min(len(prompts), rows),
                                 loops=max(len(steps), model.loops), exit=exit, draft=draft)
    for number, prompt in enumerate(prompts):
      served.submit(prompt, number=number, **how)
    return served.run()
  vocab = min(tokenizer.vocab_size, model.read_in.vocab)
  encoded = [_ids(prompt, number, tokenizer, vocab) or [tokenizer.eos] for number, prompt in enumerate(prompts)]
  how['max_new_tokens'] = NEW_TOKENS if max_new_tokens is None else whole('max_new_tokens', max_new_tokens, 1)
  room = max(map(len, encoded)) + how['max_new_tokens']
  length = min(_rounded(room), model.read_in.length)
  engine = model.sampler.serve(model, params, tokenizer, rows=min(len(prompts), rows), length=length,
                               loops=max(len(steps), model.loops), exit=exit, draft=draft)
  for number, prompt in enumerate(encoded):
    engine.submit(prompt, number=number, **how)
  return engine.run()


def warn_beyond(model: Any, steps: Sequence[float]):
  """Warns where a schedule has more steps than the model was trained for."""
  if len(steps) > model.loops:
    warnings.warn(f'{len(steps)} loops, but the model was trained with at most {model.loops}: quality beyond the '
                  'trained depth is not to be expected', stacklevel=3)


def _rounded(length: int) -> int:
  return -(-length // ROUND) * ROUND
