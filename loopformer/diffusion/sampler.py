"""Denoising: all positions at once, written and hidden again over a number of steps.

`denoise` is the loop, for any predictor, a function of tokens. `Denoising` is the part that a model has as its sampler,
and `Denoiser` what serves requests: prompts with something after them, or with holes. One compiled program serves every
number of steps, every number of loops in a step, and every prompt of up to the same length.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import time
from typing import Any, Callable, Iterable, Iterator, Protocol, Sequence

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans, sharding
from loopformer.data import chat
from loopformer.data.tokenizer import Tokenizer, anchor, continuation, ends_of
from loopformer.diffusion.noise import check_model
from loopformer.diffusion.orders import Ancestral, Kept, Looping, Ranked, Resampling, Round, times_of
from loopformer.inference.sampling import SamplingParams, controls, sample, sampling_logits, stops
from loopformer.training import processes
from loopformer.types import SEEDS, Array, ConfigError, Params, Plan, config_dataclass, real, whole

HOLE = re.compile(r'<mask(?::(\d+))?>')  # in prompts: a hidden position, or so many
AT_ONCE = 64  # denoising steps between two looks of the host, at first
EVERY = 5.0  # seconds between two lines of progress


# The loop ------------------------------------------------------------------------------------------------------------


@struct.dataclass
class Moment:
  """Where a predictor is asked. step, steps: i32[B], j and S of every sequence; active: bool[B], those that have steps
  left; keys: [B], of this step."""
  step: Array
  steps: Array
  active: Array
  keys: Array

  @property
  def times(self) -> tuple[Array, Array]:
    """(t, s), f32[B], as of `times_of`."""
    return times_of(self.step, self.steps)


class Predictor(Protocol):
  """Tells what may stand at every position."""

  def __call__(self, tokens: Array, carry: Any, moment: Moment) -> tuple[Array, Any]:
    """(tokens i32[B, T], what it keeps from step to step, the moment) -> (logits f32[B, T, V] without MASK, what it
    keeps).
    """


@struct.dataclass
class Held:
  """Sequences that are being denoised. step: i32[], steps done; tokens: i32[B, T]; held: f32[B, T], the probability
  with which a position was written; carry: what the predictor keeps."""
  step: Array
  tokens: Array
  held: Array
  carry: Any = None


def begun(tokens: Array, carry: Any = None) -> Held:
  """Before the first step."""
  return Held(step=jnp.int32(0), tokens=tokens, held=jnp.ones(tokens.shape), carry=carry)


def denoise(predict: Predictor, order: Any, mask: int, held: Held, asked: Array, steps: Array, keys: Array,
            control: SamplingParams, until: Array, barred: Array | None = None) -> Held:
  """The steps held.step .. until - 1 of sequences whose asked positions read `mask` at first.

  Args:
    order: a planner (orders.py). asked: bool[B, T], positions that are to be made; others never change.
    steps: i32[B], S of every sequence; of 0, nothing happens. keys: [B]; control: how tokens are drawn, f32[B] and
    i32[B].
    until: i32[], so that the host may look in between; max(steps) for all. barred: bool[B, V], tokens that are never
    written.
  """
  batch, length = held.tokens.shape
  flat = jax.tree.map(lambda leaf: jnp.repeat(leaf, length, 0), control)

  def body(held):
    j, tokens = held.step, held.tokens
    own = jax.vmap(lambda key: jax.random.fold_in(key, j))(keys)
    active = j < steps
    logits, carry = predict(tokens, held.carry, Moment(step=jnp.full(batch, j), steps=steps, active=active, keys=own))
    known = jnp.arange(logits.shape[-1]) < control.vocab[:, None, None]
    known = known if barred is None else known & ~barred[:, None]
    log_p = jax.nn.log_softmax(jnp.where(known, logits.astype(jnp.float32), -1e30))
    law = sampling_logits(log_p.reshape(batch * length, -1), flat)
    drawn = sample(law, _of_positions(own, length)).reshape(batch, length)
    seen = Round(step=jnp.full(batch, j), steps=steps, asked=asked, hidden=asked & (tokens == mask), tokens=tokens,
                 drawn=drawn, log_p=log_p, held=held.held, keys=own)
    write, hide = order(seen)
    last, active = (j == steps - 1)[:, None], active[:, None]
    write = (write | last) & seen.hidden & active
    hide = hide & asked & active & ~last
    new = jnp.where(hide, mask, jnp.where(write, drawn, tokens))
    return Held(step=j + 1, tokens=new, held=jnp.where(write, jnp.exp(seen.log_of(drawn)), held.held), carry=carry)

  return jax.lax.while_loop(lambda held: held.step < until, body, held)


def _of_positions(keys, length):
  """[B * T] keys, of every position of every sequence."""
  names = jnp.arange(length) + 2 ** 16  # what planners draw has other names
  return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(names))(keys).reshape(-1)


def guided(conditional: Array, unconditional: Array, weight: float) -> Array:
  """Logits u + (w + 1) (c - u): classifier-free guidance (LLaDA), w = 0 is the conditional."""
  return unconditional + (weight + 1) * (conditional - unconditional)


@dataclasses.dataclass(frozen=True)
class Network:
  """The predictor that a model is: its answers after a plan, guided by the same without the prompt where `guidance` is
  above 0. It keeps nothing from step to step.

  plan: t, dt f32[K, B], active bool[K, B], loops of every sequence; segments: i32[B, T], 0 for padding.
  """
  model: Any
  params: Params
  plan: Plan
  segments: Array
  asked: Array
  mask: int
  guidance: float = 0.0

  def __call__(self, tokens: Array, carry: Any, moment: Moment) -> tuple[Array, Any]:
    assert self.plan.active is not None
    plan = dataclasses.replace(self.plan, active=self.plan.active & moment.active)
    if not self.guidance:
      return self._logits(tokens, plan, self.segments), carry
    blank = jnp.where(self.asked, tokens, self.mask)
    both = self._logits(jnp.concatenate([tokens, blank]), jax.tree.map(lambda leaf: jnp.tile(leaf, (1, 2)), plan),
                        jnp.tile(self.segments, (2, 1)))
    conditional, unconditional = jnp.split(both, 2)
    return guided(conditional, unconditional, self.guidance), carry

  def _logits(self, tokens, plan, segments):
    variables = {'params': self.params}
    trace = self.model.apply(variables, tokens, plan, seg=segments)
    return sharding.whole(self.model.apply(variables, trace.z, method='logits'))


# The sampler ---------------------------------------------------------------------------------------------------------


@config_dataclass
class Denoising:
  """Writes all of an answer at once, over denoising steps, each of which runs the loops of a budget.

  order: the planner (orders.py). steps: of requests that do not say how many; guidance: w of classifier-free guidance.
  """
  order: Ranked | Ancestral | Resampling | Looping | Kept = Ranked()
  steps: int = 16
  guidance: float = 0.0
  denoises = True

  def __post_init__(self):
    whole('sampler.steps', self.steps, 1, plans.LONGEST, why='what is written is denoised in as many')
    real('sampler.guidance', self.guidance, '[0, inf)')

  def serve(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Denoiser:
    """A `Denoiser`; options as there."""
    return Denoiser(model, params, tokenizer, **options)

  def score(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """A `likelihood.Bounds`; options as there."""
    from loopformer.diffusion.likelihood import Bounds
    return Bounds(model, params, tokenizer, **options)

  def begin(self, model: Any, params: Params, rows: Rows) -> Any:
    """What the predictor keeps, before the first step."""
    return None

  def predictor(self, model: Any, params: Params, rows: Rows) -> Predictor:
    """Made inside the compiled program, of the rows."""
    return Network(model, params, rows.plan, rows.segments, rows.asked, model.outputs, self.guidance)


@struct.dataclass
class Rows:
  """Requests of a batch, all leaves [B, ...].

  tokens: i32[B, T], holes read MASK; asked: bool[B, T], holes; segments: i32[B, T], 1 for the sequence and 0 for
  padding; t, dt f32[B, K], active bool[B, K]: the loops of every step; steps: i32[B], 0 for a row without request;
  seed, number: u32[B]; temperature, top_k, top_p, vocab: as of `SamplingParams`; barred: bool[B, V], tokens that are
  never written.
  """
  tokens: Array
  asked: Array
  segments: Array
  t: Array
  dt: Array
  active: Array
  steps: Array
  seed: Array
  number: Array
  temperature: Array
  top_k: Array
  top_p: Array
  vocab: Array
  barred: Array

  @property
  def plan(self) -> Plan:
    """The loops, [K, B]."""
    return Plan(t=self.t.T, dt=self.dt.T, active=self.active.T)

  @property
  def control(self) -> SamplingParams:
    """How tokens are drawn."""
    return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, vocab=self.vocab)

  @property
  def keys(self) -> Array:
    """[B], what all draws of a request come from."""
    return jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(self.seed, self.number)


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(model: Any, sampler: Any, params: Params, rows: Rows) -> Held:
  """The rows before their first step."""
  return begun(rows.tokens, sampler.begin(model, params, rows))


@functools.partial(jax.jit, static_argnums=(0, 1))
def advance(model: Any, sampler: Any, params: Params, rows: Rows, held: Held, until: Array) -> Held:
  """The rows after `until` steps."""
  return denoise(sampler.predictor(model, params, rows), sampler.order, model.outputs, held, rows.asked, rows.steps,
                 rows.keys, rows.control, until, rows.barred)


@dataclasses.dataclass
class _Request:
  number: int
  ids: list[int]  # holes read MASK
  holes: bool  # whether the prompt had any; else what is made stands after it
  sizes: tuple[float, ...]
  steps: int
  control: SamplingParams
  seed: int
  draw_number: int
  stop: tuple[str, ...]


class Denoiser:
  """Serves requests, `rows` at a time, with the model's own sampler.

      denoiser = Denoiser(model, params, tokenizer, rows=8, length=128)
      denoiser.submit('Once upon', max_new_tokens=64, steps=32, budget=4)
      denoiser.submit('1 <mask> 3 4 <mask:12>', steps=13)
      texts = denoiser.run()

  What a request gets depends on its prompt, controls, seed and number, and not on those beside it.

  Args:
    rows, length: of a batch, and positions of a row; the model's by default. loops: rows of the longest plan.
    log: hears of long runs, a line every few seconds.
    exit, draft: what tokens that are written one by one may have; refused here.
    params: on one device, or divided over a mesh, over which the rows are divided then.

  Raises:
    ConfigError: a model that is no denoiser (noise.check_model); values out of range.
  """

  def __init__(self, model: Any, params: Params, tokenizer: Any, *, rows: int = 8, length: int | None = None,
               loops: int | None = None, exit: Any = None, draft: Any = None, log: Callable[[str], None] | None = None):
    for name, value in (('exit', exit), ('draft', draft)):
      if value is not None:
        raise ConfigError(f'{name} = {value}: this model writes all tokens at once (sampler = '
                          f'{type(model.sampler).__name__}), and none before others; leave it out')
    if tokenizer is None:
      raise ConfigError('tokenizer = None: no text can be made; give the one that the model was trained with')
    check_model(model, model.outputs)
    limit = model.read_in.length
    for name, value in (('rows', rows), ('loops', loops)):
      if value is not None:
        whole(name, value, 1)
    self.length = limit if length is None else whole('length', length, 1, limit)
    self.loops, self.log = loops or model.loops, log
    self._mesh = sharding.mesh_of(params)
    self._count = rows if self._mesh is None else rows + -rows % sharding.row_parts(self._mesh)
    self.model, self.params, self.tokenizer, self.mask = model, sharding.gathered(params), tokenizer, model.outputs
    self._vocab, self._ends = min(tokenizer.vocab_size, self.mask), ends_of(tokenizer)
    silent = {*self._ends, *(tokenizer.specials().values() if isinstance(tokenizer, Tokenizer) else ())}
    self._silent = np.isin(np.arange(self.mask), list(silent))  # decoding drops them
    self._waiting: list[_Request] = []
    self._requests, self._stats = 0, np.zeros(4, np.int64)

  @property
  def stats(self) -> dict[str, float]:
    """What denoising has cost so far: tokens; passes of rows, a denoising step being one; mean loops of these; loops
    that ran for the whole batch; tokens a pass."""
    tokens, passes, loops, ran = (int(n) for n in self._stats)
    return {'tokens': tokens, 'passes': passes, 'loops': loops / max(passes, 1), 'ran': ran,
            'tokens a pass': tokens / max(passes, 1)}

  def submit(self, prompt: Any, *, budget: int | Sequence[float] | None = None, steps: int | None = None,
             max_new_tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
             top_p: float | None = None, seed: int = 0, number: int = 0, stop: Sequence[str] = ()) -> int:
    """Queues a request and returns its number, 0, 1, ...

    Args:
      prompt: a text, its ids, or the messages of a chat. A text with holes, `<mask>` for one position and `<mask:5>`
        for five, or ids of which some are MASK, is filled in, and nothing is added: no hole becomes an end, or another
        special token, which the text would not show. After another, `max_new_tokens` positions are written.
      budget: loops in every step, or step sizes; all loops by default. steps: denoising steps; the sampler's by
        default.
      max_new_tokens: None: up to the end of the row. The text ends where an end token was written.
      temperature, top_k, top_p, seed, number, stop: as of `Engine.submit`; with holes there is no stop.

    Raises:
      ConfigError: what does not fit the positions, the loops or the planner; values out of range.
    """
    for name, value in (('seed', seed), ('number', number)):
      whole(name, value, 0, SEEDS - 1)
    steps = self.model.sampler.steps if steps is None else whole('steps', steps, 1, plans.LONGEST,
                                                                why='what is written is denoised in as many')
    sizes = plans.resolve(min(self.loops, self.model.loops) if budget is None else budget, 'budget')
    if len(sizes) > self.loops:
      raise ConfigError(f'budget = {budget}: {len(sizes)} loops, but there is room for {self.loops}; make the denoiser '
                        f'with loops={len(sizes)}')
    ids, stop = self.encode(prompt), stops(stop)
    holes = self.mask in ids
    if holes and stop:
      raise ConfigError(f'stop = {stop!r}: holes are filled, and nothing is written that could end sooner; '
                        'leave it out')
    if not holes:
      ids += [self.mask] * (self.length - len(ids) if max_new_tokens is None
                            else whole('max_new_tokens', max_new_tokens, 1))
    if len(ids) > self.length or self.mask not in ids:
      raise ConfigError(f'prompt {self._requests} and what is to be written have {len(ids) + (self.mask not in ids)} '
                        f'tokens, more than the {self.length} positions of a row; shorten the prompt, or ask for '
                        'fewer tokens')
    self.model.sampler.order.check(steps, ids.count(self.mask))
    self._waiting.append(_Request(self._requests, ids, holes, sizes, steps,
                                  controls(self._vocab, temperature, top_k, top_p), seed, number, stop))
    self._requests += 1
    return self._requests - 1

  def encode(self, prompt: Any) -> list[int]:
    """The ids of a prompt, MASK for its holes. Raises ConfigError where it has others than the tokenizer knows."""
    if isinstance(prompt, str):
      parts = HOLE.split(prompt)  # text, number of holes, text ..
      ids = list(self.tokenizer.encode(parts[0])) if parts[0] or len(parts) == 1 else []
      for count, text in zip(parts[1::2], parts[2::2]):
        ids += [self.mask] * whole('prompt: the number of a hole', int(count or 1), 1, self.length)
        ids += self.tokenizer.encode(text) if text else []
    else:
      name = f'prompt {self._requests}'
      ids = list(chat.begun(self.tokenizer, prompt, name)) if chat.is_messages(prompt) else chat.listed(prompt, name)
    ids = [whole(f'prompt {self._requests}: the id', id_, 0, self.mask) for id_ in ids]
    for id_ in set(ids) - {self.mask}:
      whole(f'prompt {self._requests}: the id', id_, 0, self._vocab - 1)
    return ids

  def finished(self) -> Iterator[tuple[_Request, list[int]]]:
    """(request, ids of its whole sequence), in the order of their numbers, until none is left."""
    while self._waiting:
      batch = self._waiting[:self._count]
      del self._waiting[:len(batch)]
      yield from zip(batch, self._denoised(batch))

  def stream(self) -> Iterator[Any]:
    """`TextChunk`s of requests, each whole, until none is left."""
    from loopformer.inference.engine import TextChunk  # which needs the model, which names its sampler
    for request, ids in self.finished():
      yield TextChunk(request.number, self._text(request, ids), True)

  def run(self) -> list[str]:
    """The texts of all requests that were left, in the order of their numbers: what stands after a prompt, or a prompt
    whose holes are filled."""
    return [piece.text for piece in sorted(self.stream(), key=lambda piece: piece.request)]

  def _text(self, request, ids):
    if request.holes:
      return self.tokenizer.decode(ids)
    first = request.ids.index(self.mask)
    new = list(itertools.takewhile(lambda token: token not in self._ends, ids[first:]))
    text = continuation(self.tokenizer, anchor(self.tokenizer, ids[:first]), new)
    return text[:min((text.index(stop) for stop in request.stop if stop in text), default=None)]

  def _denoised(self, batch) -> list[list[int]]:
    rows = self._rows(batch)
    most = int(rows.steps.max())
    if self._mesh is not None:
      rows = Rows(**sharding.spread(vars(rows), self._mesh))
    with sharding.on(self._mesh):
      held = begin(self.model, self.model.sampler, self.params, rows)
      told, done, chunk = time.monotonic(), 0, AT_ONCE
      while done < most:
        start, done = time.monotonic(), min(done + chunk, most)
        held = advance(self.model, self.model.sampler, self.params, rows, held, jnp.int32(done))
        if done < most:  # wait, so that what is told is true
          jax.block_until_ready(held.tokens)
          now = time.monotonic()
          chunk = max(1, min(AT_ONCE, int(chunk * EVERY / max(now - start, 1e-3))))
          if self.log and now - told >= EVERY:
            told = now
            self.log(f'  denoised {done:,}/{most:,} steps')
      tokens = processes.fetch(held.tokens)
    loops = [len(request.sizes) for request in batch]
    self._stats += [sum(request.ids.count(self.mask) for request in batch), sum(request.steps for request in batch),
                    sum(request.steps * n for request, n in zip(batch, loops)), most * max(loops)]
    return [tokens[i, :len(request.ids)].tolist() for i, request in enumerate(batch)]

  def _rows(self, batch: Sequence[_Request]) -> Rows:
    """In NumPy's arrays, filled up by rows without steps."""
    tokens: Any = np.full((self._count, self.length), self.tokenizer.eos, np.int32)
    segments = np.zeros_like(tokens)
    for i, request in enumerate(batch):
      tokens[i, :len(request.ids)], segments[i, :len(request.ids)] = request.ids, 1
    filled = list(batch) + [batch[0]] * (self._count - len(batch))
    schedule = [plans.on_host(request.sizes, self.loops) for request in filled]

    def column(values: Iterable[Any], dtype: Any) -> Any:
      return np.asarray(list(values), dtype)

    def stacked(trees: Sequence[Plan]) -> Any:
      return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    control = {name: column((getattr(request.control, name) for request in filled), dtype)
               for name, dtype in (('temperature', np.float32), ('top_k', np.int32), ('top_p', np.float32),
                                   ('vocab', np.int32))}
    plan = stacked(schedule)
    return Rows(tokens=tokens, asked=(tokens == self.mask), segments=segments, t=plan.t, dt=plan.dt, active=plan.active,
                steps=column((r.steps if i < len(batch) else 0 for i, r in enumerate(filled)), np.int32),
                barred=column((request.holes & self._silent for request in filled), bool),
                seed=column((r.seed for r in filled), np.uint32),
                number=column((r.draw_number for r in filled), np.uint32), **control)
