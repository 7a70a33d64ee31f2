"""Training: one step for every objective, and the loop around it."""
from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
import signal
import threading
import time
from typing import Any, Callable

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import optax

from loopformer import metrics, sharding
from loopformer.checkpoint import Checkpoints, abstract
from loopformer.evaluate import evaluate
from loopformer.model import init_params
from loopformer.types import Array, ConfigError, Draw, Params, part


@part
class Train:
  """How long, how much at a time, and how often to report.

  batch: sequences a step, over all devices; accumulate: microbatches that each step's batch is cut into.
  """
  steps: int = 1000
  batch: int = 16
  accumulate: int = 1
  seed: int = 0
  log_every: int = 10
  eval_every: int = 250
  eval_batches: int = 8
  save_every: int = 250
  keep: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      least = 0 if field.name == 'seed' else 1
      if getattr(self, field.name) < least:
        raise ConfigError(f'train.{field.name} = {getattr(self, field.name)}: must be {least} or more')


class NotFinite(RuntimeError):
  """The loss is no longer a number."""


@struct.dataclass
class State:
  """What a training step updates. step: i32[], steps taken."""
  step: Array
  params: Params
  optimizer: Any


def init_state(model: Any, optimizer: optax.GradientTransformation, seed: int) -> State:
  """A fresh state; run it under `jax.jit` with shardings, or `jax.eval_shape`."""
  params = init_params(model, jax.random.fold_in(jax.random.key(seed), 0))
  return State(step=jnp.int32(0), params=params, optimizer=optimizer.init(params))


def make_step(model: Any, objective: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh,
              accumulate: int = 1, seed: int = 0) -> Callable[..., tuple[State, dict[str, Array]]]:
  """The compiled training step: (state, batch of global arrays, stage) -> (state, metrics f32[]); the state is donated.

  The gradient is taken inside a shard_map that is manual over the mesh: parameters are gathered once, all loops run on
  local weights, and each gradient is reduced once, whatever the number of loops.
  """
  run_key = jax.random.fold_in(jax.random.key(seed), 1)
  optimizer = optax.with_extra_args_support(optimizer)
  parts = mesh.shape['fsdp']

  def gather(leaf, shape):
    axis = sharding.split_axis(shape, parts)
    return leaf if axis is None else jax.lax.all_gather(leaf, 'fsdp', axis=axis, tiled=True)

  def reduce(leaf):
    axis = sharding.split_axis(leaf.shape, parts)
    if axis is None:
      return jax.lax.psum(leaf, sharding.AXES)
    return jax.lax.psum_scatter(jax.lax.psum(leaf, 'data'), 'fsdp', scatter_dimension=axis, tiled=True)

  def gradient(shapes, params, draw):
    params = jax.tree.map(gather, params, shapes)
    total = jax.lax.psum(objective.denominators(draw.batch), sharding.AXES)
    batch = draw.batch
    share = jax.value_and_grad(lambda p, rows: objective(model, p, draw.replace(batch=rows), total), has_aux=True)
    if accumulate == 1:
      (loss, terms), grads = share(params, batch)
    else:
      micro = jax.tree.map(lambda rows: rows.reshape(accumulate, -1, *rows.shape[1:]), batch)
      zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                          jax.eval_shape(share, params, jax.tree.map(lambda rows: rows[0], micro)))
      (loss, terms), grads = jax.lax.scan(
          lambda sums, rows: (jax.tree.map(jnp.add, sums, share(params, rows)), None), zero, micro)[0]
    return jax.lax.psum({'loss': loss, **terms}, sharding.AXES), jax.tree.map(reduce, grads)

  def step(state, batch, stage=0):
    size = batch['tokens'].shape[0]
    draw = Draw(key=jax.random.fold_in(run_key, state.step), step=state.step, stage=jnp.asarray(stage, jnp.int32),
                batch={**batch, 'row': jnp.arange(size)})
    shapes = jax.tree.map(lambda leaf: leaf.shape, state.params)
    specs = jax.tree.map(lambda leaf: sharding.spec(leaf.shape, parts), state.params)
    mapped = jax.shard_map(
        functools.partial(gradient, shapes), mesh=mesh, in_specs=(specs, Draw(P(), P(), P(), P(sharding.AXES))),
        out_specs=(P(), specs), check_vma=False)
    values, grads = mapped(state.params, draw)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params, stage=draw.stage)
    params = optax.apply_updates(state.params, updates)
    return State(step=state.step + 1, params=params, optimizer=optimizer_state), {
        **values, 'grad_norm': optax.tree.norm(grads)}

  return jax.jit(step, donate_argnums=0)


def train(config: Any, workdir: Path, log: Callable[[str], None] = print) -> State:
  """Runs or resumes `config` in `workdir`, whose config.json must agree with it already.

  Raises:
    NotFinite: a term of the loss is not a number any more; the checkpoints before it are kept.
    ConfigError: data or mesh do not fit the configuration.
  """
  from loopformer import data  # reading text needs grain; a model alone does not
  workdir, options = Path(workdir), config.train
  mesh = config.mesh.make()
  optimizer = config.optim.make(options.steps)
  if options.batch // options.accumulate % mesh.size:
    raise ConfigError(f'train.batch / train.accumulate = {options.batch // options.accumulate} rows do not divide over '
                      f'{mesh.size} devices; choose a multiple of {mesh.size}')
  tokenizer = config.task.prepare(workdir, log)
  if tokenizer is not None and tokenizer.vocab_size > config.model.read_in.vocab:
    raise ConfigError(f'model.read_in.vocab = {config.model.read_in.vocab} is smaller than the tokenizer\'s '
                      f'{tokenizer.vocab_size} entries; raise it to that or more')

  def batches(split, seed):
    return data.batches(config.task.examples(workdir, split, seed), batch=options.batch,
                        process=jax.process_index(), processes=jax.process_count())

  stream = iter(batches('train', options.seed))
  held_out = _first(batches('validation', 0), options.eval_batches, mesh)

  make = functools.partial(init_state, config.model, optimizer, options.seed)
  shapes = jax.eval_shape(make)
  shardings = sharding.state_shardings(shapes, mesh)
  byte_lengths = tokenizer and jax.device_put(jnp.asarray(tokenizer.byte_lengths()), NamedSharding(mesh, P()))
  memory = config.control.start()
  with Checkpoints(workdir, options.keep) as checkpoints:
    first = checkpoints.latest() or 0
    if first:
      target = abstract(shapes, shardings)
      params, optimizer_state, position, memory = checkpoints.restore(first, target.params, target.optimizer)
      stream.set_state(position)
      state = State(step=jax.device_put(jnp.int32(first), shardings.step), params=params, optimizer=optimizer_state)
      log(f'resumed from step {first}')
    else:
      state = jax.jit(make, out_shardings=shardings)()
    writer = metrics.Writer(workdir, first)
    run = _Run(config, mesh, make_step(config.model, config.objective, optimizer, mesh, options.accumulate,
                                       options.seed), writer, checkpoints, held_out, byte_lengths, log, memory)
    try:
      return run(state, stream, first)
    finally:
      writer.close()


def _first(batches, count, mesh):
  """The first `count` batches, on the devices."""
  return [sharding.put_batch(batch, mesh) for batch, _ in zip(batches, range(count))]


@dataclasses.dataclass
class _Run:
  """The loop of one process; metrics of a step are read after the next one is dispatched."""
  config: Any
  mesh: Any
  step: Callable
  writer: metrics.Writer
  checkpoints: Checkpoints
  held_out: list
  byte_lengths: Array | None
  log: Callable
  memory: dict  # the controller's

  def __call__(self, state: State, stream: Any, first: int) -> State:
    options = self.config.train
    clock = _Clock(self.config, first)
    pending = None
    with _Terminated() as terminated:
      for number in range(first + 1, options.steps + 1):
        batch, stage = sharding.put_batch(next(stream), self.mesh), self.config.control.stage(self.memory)
        state, values = self.step(state, batch, stage)
        self._report(pending, clock)
        pending = (number, values)
        if number % options.eval_every == 0 or number == options.steps:
          self._report(pending, clock)
          pending = None
          self._evaluate(number, state)
          clock.restart(number)
        if number % options.save_every == 0 or number == options.steps or terminated.is_set():
          self._report(pending, clock)  # a state is saved once its loss is known to be finite
          pending = None
          self.checkpoints.save(number, state.params, state.optimizer, stream.get_state(), self.memory)
        if terminated.is_set() and number < options.steps:
          self.log(f'stopped by a signal after step {number}; the same command resumes there')
          raise SystemExit(0)
    return state

  def _report(self, pending, clock):
    if pending is None:
      return
    number, values = pending
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
      term = next((name for name in broken if name in self.config.objective.terms), broken[0])
      raise NotFinite(f'step {number}: {term} = {values[term]} (not finite: {", ".join(broken)}). Nothing was saved '
                      f'since; the last good checkpoint is step {self.checkpoints.latest()}. Lower the learning rate '
                      'or the clipping norm, or raise the warm-up')
    self._watch(number, values)
    options = self.config.train
    if number % options.log_every == 0 or number == options.steps or clock.fresh:
      speed = clock.read(number)
      self.writer.write('train', number, {**values, **speed})
      terms = '  '.join(f'{name} {values[name]:.3f}' for name in self.config.objective.terms)
      left = '' if 'tokens_per_s' not in speed else (
          f'  {speed["tokens_per_s"] / 1e3:.1f}k tok/s  MFU {100 * speed["mfu"]:.0f}%'
          f'  {metrics.duration(clock.left(number))} left')
      self.log(f'step {number}/{options.steps}  loss {values["loss"]:.3f}  {terms}{left}')

  def _evaluate(self, number, state):
    config = self.config
    rows = evaluate(config.model, state.params, self.held_out, config.evals.schedules(), self.byte_lengths,
                    config.task.measure)
    values = {f'{name}@{row["schedule"]}': row[name] for row in rows
              for name in row if name not in ('budget', 'schedule', 'tokens')}
    values |= config.model.cell.diagnose(jax.device_get(state.params['cell']))
    self.writer.write('eval', number, values)
    shown = ('loss', 'accuracy', 'exact')
    self.log(f'step {number}  validation loss at ' + '  '.join(
        f'{row["schedule"]} loop{"s" if row["budget"] != 1 else ""}: '
        + ' '.join([f'{row["loss"]:.3f}', *(f'{name} {row[name]:.3f}' for name in shown[1:] if name in row)])
        for row in rows))
    self._watch(number, values)

  def _watch(self, number, values):
    control = self.config.control
    before = control.stage(self.memory)
    self.memory = control.watch(self.memory, number, values)
    if control.stage(self.memory) != before:
      self.log(f'step {number}: stage {before} has ended, stage {control.stage(self.memory)} begins')
      self.writer.write('stage', number, {'stage': control.stage(self.memory)})


class _Clock:
  """Tokens a second, model FLOPs utilisation and time left; the first step, which compiles, is not counted."""

  def __init__(self, config: Any, first: int):
    self._tokens = config.train.batch * config.task.length
    self._flops = config.objective.flops(config.model, config.task.length) * self._tokens
    self._peak = metrics.peak_flops()[0] * jax.device_count()
    self._steps = config.train.steps
    self._seconds = 0.0
    self.fresh = True
    self.restart(first)

  def restart(self, number: int):
    self._number, self._start = number, time.perf_counter()

  def read(self, number: int) -> dict[str, float]:
    """Speed since the last reading."""
    steps, seconds = number - self._number, time.perf_counter() - self._start
    was_fresh, self.fresh = self.fresh, False
    self.restart(number)
    if was_fresh or not steps:
      return {}
    self._seconds = seconds / steps
    return {'tokens_per_s': self._tokens / self._seconds, 'mfu': self._flops / self._seconds / self._peak,
            'seconds_per_step': self._seconds}

  def left(self, number: int) -> float:
    """Seconds to the end of the run at the present speed."""
    return (self._steps - number) * self._seconds


class _Terminated:
  """Turns SIGTERM and SIGINT into an event, in the main thread; elsewhere no signal can be caught."""

  def __enter__(self) -> threading.Event:
    event = threading.Event()
    self._old = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, lambda *_: event.set())
    return event

  def __exit__(self, *_):
    for number, handler in self._old.items():
      signal.signal(number, handler)
