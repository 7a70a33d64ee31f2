"""Training: one step for every objective, and the loop around it."""
from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
from pathlib import Path
import signal
import threading
import time
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from loopformer import plans, sharding, storage
from loopformer.inference.evaluate import evaluate, motion
from loopformer.inference.measures import text_bytes
from loopformer.model import parameter_roles
from loopformer.roles import Roles
from loopformer.training import averages, metrics, processes
from loopformer.training.checkpoint import FOLDER, Best, Checkpoints, abstract, restore_model
from loopformer.training.step import State, init_state, make_step
from loopformer.types import SEEDS, Array, ConfigError, Params, config_dataclass, whole


@config_dataclass
class Train:
  """How long, how much at a time, and how often to report.

  batch: sequences a step, over all devices; accumulate: microbatches that each step's batch is cut into, which draw plans
  of their own.
  keep: so many last checkpoints stay, and the one of the best `best`, a number of the task's measure at a depth of
  `evals`, such as 'loss@8' (None: the last alone); with `best` every evaluated state is saved.
  start: a work folder whose last checkpoint gives the first values of the parameters that both models have.
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
  best: str | None = None
  start: str | None = None
  paths = ('start',)

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.name == 'seed':
        whole('train.seed', self.seed, 0, SEEDS - 1)
      elif field.name not in ('best', 'start'):
        whole(f'train.{field.name}', getattr(self, field.name), 1)


def best_of(config: Any) -> Best | None:
  """Which checkpoint `train.best` keeps. Raises ConfigError where the evaluations report no such number."""
  best = config.train.best
  if best is None:
    return None
  signs = {f'{name}@{schedule}': sign for schedule in config.evals.schedules()
           for name, sign in config.task.measure.better.items()}
  if best in signs:
    return Best(name=best, sign=signs[best])
  raise ConfigError(f'train.best = {best!r}: no number of the evaluations that is better or worse; choose one of '
                    f'{", ".join(signs)}')


class NotFinite(RuntimeError):
  """The loss is no longer a number."""


def train(config: Any, workdir: str | Path, log: Callable[[str], None] = print,
          profile: tuple[int, int] | None = None, verify: bool = False, params: Params | None = None) -> State:
  """Runs or resumes `config` in `workdir`, whose config.json must agree with it already.

  With several processes (processes.py) all call it; the leader writes.

  Args:
    profile: the first and the last step of a profile, which goes to `workdir`/profile; None for none.
    verify: whether all data are read first, and compared with what was prepared.
    params: the first values of the parameters, a tree like that of `model.init_params`; random ones if absent. A run that
      is resumed has its own.

  Raises:
    NotFinite: a term of the loss is not a number any more; the checkpoints before it are kept.
    OSError: the work folder cannot be written any more; the message names the last good checkpoint.
    ConfigError: data, mesh or starting weights do not fit the configuration.
  """
  from loopformer.data import batches as data  # reading text needs grain; a model alone does not
  workdir, options, best = storage.path(workdir), config.train, best_of(config)
  log = log if processes.is_leader() else lambda text: None
  mesh = config.mesh.make()
  sharding.check_model(config.model, mesh)
  sharding.check_batch(options.batch, options.accumulate, mesh)
  roles = parameter_roles(config.model)
  optimizer = config.optim.make(options.steps, roles)
  reader, readers = processes.readers(mesh)
  tokenizer = processes.leader_first(lambda: config.task.prepare(workdir, log), 'data are prepared')
  if verify:
    config.task.verify(workdir, log)
  if tokenizer is not None and tokenizer.vocab_size > config.model.read_in.vocab:
    raise ConfigError(f'model.read_in.vocab = {config.model.read_in.vocab} is smaller than the tokenizer\'s '
                      f'{tokenizer.vocab_size} entries; raise it to that or more')
  rows = np.arange(options.batch // readers, dtype=np.int32) * readers + reader  # in the global batch

  def batches(split, seed):
    return data.batches(config.task.examples(workdir, split, seed), batch=options.batch, process=reader,
                        processes=readers)

  stream = iter(batches('train', options.seed))
  held_out = [batch for batch, _ in zip(batches('validation', 0), range(options.eval_batches))]
  positions, most = max((1 + int(np.max(batch['positions'])) for batch in held_out), default=0), config.model.read_in.length
  if positions > most:
    raise ConfigError(f'task: its examples stand at positions up to {positions - 1}, but model.read_in.length = {most}; '
                      'raise it, or let positions begin at 0')
  held_out = [sharding.put_batch({**batch, 'row': rows}, mesh) for batch in held_out]

  make = functools.partial(init_state, config.model, optimizer, options.seed)
  shapes = jax.eval_shape(make)
  shardings = sharding.shardings(shapes, mesh, roles)
  byte_lengths = tokenizer and jax.device_put(text_bytes(tokenizer), NamedSharding(mesh, P()))
  control = config.control.start()
  with Checkpoints(workdir, options.keep, best) as checkpoints:
    target = abstract(shapes, shardings)
    if checkpoints.latest() == 0:  # what `Loaded.save` wrote: parameters alone, to start from
      params, first, restored = checkpoints.restore_params(0, target.params)[1], 0, None
    else:
      first, restored = checkpoints.restore_last(target.params, target.optimizer, log)
    if first:
      params, optimizer_state, position, control = restored
      params, optimizer_state = averages.exchanged(params, optimizer_state)
      stream.set_state(position)
      state = State(step=jax.device_put(np.int32(first), shardings.step), params=params, optimizer=optimizer_state)
      log(f'resumed from step {first}')
    else:
      state = jax.jit(make, out_shardings=shardings)()
      if params is not None:
        state = _begun(state, _like(params, state.params, 'params'), optimizer, shardings)
      elif options.start is not None:
        state = _begun(state, _started(state.params, options.start, mesh, log), optimizer, shardings)
    writer = metrics.writer(workdir, first) if processes.is_leader() else metrics.Silent()
    step = make_step(config.model, config.objective, optimizer, mesh, options.accumulate, options.seed)
    fresh = jax.jit(lambda: make().params, out_shardings=shardings.params)
    frozen = {}
    for name, teacher in config.objective.teachers.items():
      if teacher.model(config.model) == config.model:
        frozen[name] = _started(fresh(), teacher.folder, mesh, log, 'objective.rolls: weights_of')
      else:
        given, frozen[name] = restore_model(teacher.folder, teacher.model(config.model), mesh)
        log(f'the teacher of {teacher.folder} is as it was at step {given}')
    run = _Run(config, mesh, functools.partial(step, frozen=frozen), writer, checkpoints, held_out, byte_lengths, rows,
               log, control, _Profile(workdir / 'profile', profile))
    try:
      with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        stack.callback(run.profile.stop)
        return run(state, stream, first)
    except storage.Unreachable as error:
      raise OSError(f'{error}; {checkpoints.last_good()}, where the same command resumes') from error


def _begun(state: State, params: Params, optimizer: Any, shardings: State) -> State:
  """The state of a run that starts from these parameters, of which an optimiser may keep averages."""
  return state.replace(params=params, optimizer=jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params))


def _like(given: Params, own: Params, name: str) -> Params:
  """Parameters placed as those of the run. Raises ConfigError where names or shapes are not those of the model."""
  ours, theirs = ({jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
                   for path, leaf in jax.tree_util.tree_leaves_with_path(tree)} for tree in (own, given))
  for path in ours.keys() | theirs.keys():
    if ours.get(path) != theirs.get(path):
      raise ConfigError(f'{name}: {path} has the shape {theirs.get(path, "(absent)")} there, '
                        f'{ours.get(path, "(absent)")} in the model; give parameters of the same model')
  return jax.tree.map(lambda leaf, mine: jax.device_put(jnp.array(leaf, mine.dtype), mine.sharding), given, own)


def _started(params: Params, start: str, mesh: jax.sharding.Mesh, log: Callable, where: str = 'train.start') -> Params:
  """The parameters with those of another run's last checkpoint in the places that both have."""
  own = dict(jax.tree_util.tree_leaves_with_path(params))

  def placed(path, leaf, elsewhere):
    mine = own.get(path)
    if mine is not None and mine.shape != leaf.shape:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ConfigError(f'{where} = {start}: {name} has the shape {leaf.shape} there, {mine.shape} here; give a run of '
                        'the same sizes')
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=elsewhere if mine is None else mine.sharding)

  if not (storage.path(start) / FOLDER).is_dir():
    raise ConfigError(f'{where} = {start}: no checkpoint was saved there; give the work folder of a run')
  with Checkpoints(start) as checkpoints:
    shapes = checkpoints.shapes()  # what is not ours is divided too, by its shapes alone
    step, given = checkpoints.restore_params(None, jax.tree_util.tree_map_with_path(
        placed, shapes, sharding.shardings(shapes, mesh, Roles())))
  given = dict(jax.tree_util.tree_leaves_with_path(given))
  taken = own.keys() & given.keys()
  if not taken:
    raise ConfigError(f'{where} = {start}: its model shares no parameter with this one')
  log(f'{len(taken)} of {len(own)} parameters start from step {step} of {start}')
  return jax.tree_util.tree_map_with_path(lambda path, leaf: given.get(path, leaf), params)


@dataclasses.dataclass
class _Run:
  """The loop of one process; metrics of a step are read after the next one is dispatched."""
  config: Any
  mesh: Any
  step: Callable
  writer: metrics.Writer | metrics.Silent
  checkpoints: Checkpoints
  held_out: list
  byte_lengths: Array | None
  rows: np.ndarray  # of this process, in the global batch
  log: Callable
  control_state: dict  # the controller's
  profile: _Profile
  stopped: bool = False  # a process was told to stop, and all know

  def __call__(self, state: State, stream: Any, first: int) -> State:
    options = self.config.train
    self.clock = clock = _Clock(self.config, first)
    pending = None
    with _Terminated() as terminated:
      for number in range(first + 1, options.steps + 1):
        self.profile.at(number)
        with clock.timed('data'):
          rows = {**next(stream), 'row': self.rows, 'stop': np.full(len(self.rows), terminated.is_set(), np.float32)}
        with clock.timed('step'):
          batch = sharding.put_batch(rows, self.mesh, options.accumulate)
          stage = self.config.control.stage(self.control_state)
          state, values = self.step(state, batch, stage)
        self._report(pending)
        pending = (number, values)
        last, evaluated = number == options.steps, {}
        self.stopped |= jax.process_count() == 1 and terminated.is_set()  # several agree one step later
        if number % options.eval_every == 0 or last:
          self._report(pending)
          pending = None
          with clock.timed('eval'), jax.set_mesh(self.mesh):  # over which kernels divide their rows
            evaluated = self._evaluate(number, sharding.gathered(averages.exchanged(state.params, state.optimizer)[0]))
        if number % options.save_every == 0 or last or self.stopped or (options.best and evaluated):
          self._report(pending)  # a state is saved once its loss is known to be finite
          pending = None
          with clock.timed('save'):
            self.writer.flush()  # rows of steps that are saved are not written again
            params, optimizer_state = averages.exchanged(state.params, state.optimizer)
            self.checkpoints.save(number, params, optimizer_state, stream.get_state(), self.control_state, evaluated)
        if self.stopped and not last:
          self.log(f'stopped by a signal after step {number}; the same command resumes there')
          raise SystemExit(0)
    return state

  def _report(self, pending):
    if pending is None:
      return
    number, values = pending
    with self.clock.timed('step'):
      values = {name: float(value) for name, value in jax.device_get(values).items()}
    self.stopped |= values.pop('stop') > 0
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
      term = next((name for name in broken if name in self.config.objective.terms), broken[0])
      raise NotFinite(f'step {number}: {term} = {values[term]} (not finite: {", ".join(broken)}). Nothing was saved '
                      f'since; {self.checkpoints.last_good()}. Lower the learning rate '
                      'or the clipping norm, or raise the warm-up')
    self._watch(number, values)
    options = self.config.train
    if number % options.log_every == 0 or number == options.steps or self.clock.fresh:
      speed = self.clock.read(number)
      self.writer.write('train', number, {**values, **speed})
      terms = '  '.join(f'{name} {values[name]:.3f}' for name in self.config.objective.terms)
      left = '' if 'tokens_per_s' not in speed else (
          f'  {speed["tokens_per_s"] / 1e3:.1f}k tok/s  MFU {100 * speed["mfu"]:.0f}%'
          f'  {metrics.duration(self.clock.left(number))} left')
      self.log(f'step {number}/{options.steps}  loss {values["loss"]:.3f}  {terms}{left}')

  def _evaluate(self, number, params) -> dict[str, float]:
    config = self.config
    rows = evaluate(config.model, params, self.held_out, config.evals.schedules(), self.byte_lengths,
                    config.task.measure)
    values = {f'{name}@{row["schedule"]}': row[name] for row in rows
              for name in row if name not in ('budget', 'schedule', 'tokens')}
    values |= config.model.cell.diagnose(processes.Fetched(params['cell']))
    self.writer.write('eval', number, values)
    longest = max((steps for steps in config.evals.schedules().values() if isinstance(steps, tuple)), key=len,
                  default=())
    if longest:
      moved = processes.fetch(motion(config.model, params, self.held_out[0], plans.schedule(longest)))
      self.writer.write('loops', number, {name: values.tolist() for name, values in moved.items()})
    shown = ('loss', 'accuracy', 'exact')
    self.log(f'step {number}  validation loss at ' + '  '.join(
        f'{row["schedule"]} loop{"s" if row["budget"] != 1 else ""}: '
        + ' '.join([f'{row["loss"]:.3f}', *(f'{name} {row[name]:.3f}' for name in shown[1:] if name in row)])
        for row in rows))
    self._watch(number, values)
    return values

  def _watch(self, number, values):
    control = self.config.control
    before = control.stage(self.control_state)
    self.control_state = control.watch(self.control_state, number, values)
    if control.stage(self.control_state) != before:
      self.log(f'step {number}: stage {before} has ended, stage {control.stage(self.control_state)} begins')
      self.writer.write('stage', number, {'stage': control.stage(self.control_state)})


class _Clock:
  """Tokens a second, model FLOPs utilisation, where the time went, memory, and time left.

  The first step, which compiles, is not counted, nor are evaluations and saves in the speed.
  """

  def __init__(self, config: Any, first: int):
    self._tokens = config.train.batch * config.task.length
    self._flops = config.objective.flops(config.model, config.task.length) * self._tokens
    self._peak = metrics.peak_flops()[0] * jax.device_count()
    self._steps = config.train.steps
    self._seconds = 0.0
    self._number, self._spent, self._start = first, collections.Counter(), time.perf_counter()
    self.fresh = True

  @contextlib.contextmanager
  def timed(self, what: str):
    """Counts the time inside as that of data, step, eval or save."""
    start = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - start

  def read(self, number: int) -> dict[str, float]:
    """Speed and times since the last reading."""
    now = time.perf_counter()
    steps, all_, spent = number - self._number, now - self._start, self._spent
    was_fresh, self.fresh = self.fresh, False
    self._number, self._start, self._spent = number, now, collections.Counter()
    if was_fresh or not steps:
      return {}
    self._seconds = (all_ - spent['eval'] - spent['save']) / steps
    return {'tokens_per_s': self._tokens / self._seconds, 'mfu': self._flops / self._seconds / self._peak,
            'seconds_per_step': self._seconds, **{f'seconds/{what}': spent[what] for what in _SPENT},
            'memory_gb': metrics.bytes_used() / 1e9}

  def left(self, number: int) -> float:
    """Seconds to the end of the run at the present speed."""
    return (self._steps - number) * self._seconds


_SPENT = ('data', 'step', 'eval', 'save')


class _Profile:
  """A profile of the steps from first to last, for TensorBoard or Perfetto."""

  def __init__(self, folder: Any, steps: tuple[int, int] | None):
    self._folder, self._steps, self._on = folder, steps, contextlib.ExitStack()

  def at(self, number: int):
    """Starts or stops where a step begins."""
    if self._steps and number == self._steps[0]:
      jax.profiler.start_trace(str(self._on.enter_context(storage.filled(self._folder))))
      self._on.callback(jax.profiler.stop_trace)
    elif self._steps and number > self._steps[1]:
      self.stop()

  def stop(self):
    """Writes what there is."""
    self._on.close()


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
