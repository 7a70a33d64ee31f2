"""Training: one step for every objective, and the loop around it."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from pathlib import Path
import time
from typing import Any, Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from loopformer import plans, sharding, storage
from loopformer.inference.evaluate import evaluate, motion
from loopformer.inference.measures import main_number, text_bytes
from loopformer.model import parameter_roles
from loopformer.objective import AsGiven
from loopformer.roles import Roles
from loopformer.training import averages, interrupts, masters, metrics, processes, sections
from loopformer.training.checkpoint import FOLDER, Best, Checkpoints, Unsaved, abstract, restore_model, trained
from loopformer.training.lock import Lock
from loopformer.training.step import State, init_state, make_step
from loopformer.types import SEEDS, AnyBatch, Array, ConfigError, Params, config_dataclass, whole


@config_dataclass
class Train:
  """How long, how much at a time, and how often to report.

  batch: sequences a step, over all devices; accumulate: microbatches that each step's batch is cut into, which draw
  plans of their own.
  keep: so many last checkpoints stay, and the one of the best `best`, a number of the task's measure at a depth of
  `evals`, such as 'loss@8' (None: the last alone); with `best` every evaluated state is saved.
  start: a work folder whose last checkpoint gives the first values of the parameters that both models have. As many
  layers may be cut into prelude, loop and coda otherwise there; a head of its own starts as the embedding if it was
  tied there.
  extended: the numbers of steps that the run had before it was told to go on. Up to each of them the schedules are
  those of a run of so many steps, from the last one on those of a run of `steps`.
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
  extended: int | tuple[int, ...] = ()
  paths = ('start',)

  def __post_init__(self):
    object.__setattr__(self, 'extended', self.earlier)
    for field in dataclasses.fields(self):
      if field.name == 'seed':
        whole('train.seed', self.seed, 0, SEEDS - 1)
      elif field.name not in ('best', 'start', 'extended'):
        whole(f'train.{field.name}', getattr(self, field.name), 1)
    ends = (0, *(whole('train.extended', end, 1) for end in self.earlier), self.steps)
    if list(ends) != sorted(set(ends)):
      raise ConfigError(f'train.extended = {self.extended}: give the numbers of steps that the run had before, '
                        f'ascending and below train.steps = {self.steps}')

  @property
  def earlier(self) -> tuple[int, ...]:
    """The numbers of steps in `extended`, which may be given as one."""
    return (self.extended,) if isinstance(self.extended, int) else self.extended


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
  """Runs or resumes `config` in `workdir`, which is locked meanwhile, and whose config.json says it from then on.

  With several processes (processes.py) all call it; the leader writes.

  Args:
    profile: the first and the last step of a profile, which goes to `workdir`/profile; None for none.
    verify: whether all data are read first, and compared with what was prepared.
    params: the first values of the parameters, a tree like that of `model.init_params`; random ones if absent. A run
      that is resumed has its own.

  Raises:
    NotFinite: a term of the loss is not a number any more; the checkpoints before it are kept.
    OSError: the work folder cannot be written any more; the message names the last good checkpoint.
    ConfigError: another run trains in the folder, or one of another configuration has (resume.py); data, mesh or
      starting weights do not fit the configuration.
    KeyboardInterrupt: a SIGINT before the first step, or a second one.
  """
  from loopformer import config as configs
  from loopformer.training import resume
  best_of(config)  # before anything is written
  config, workdir = configs.absolute(config), storage.path(workdir)
  log = log if processes.is_leader() else lambda text: None
  with contextlib.ExitStack() as stack:
    def begin() -> Callable[[], None]:
      lock = stack.enter_context(Lock(workdir, log))
      resume.check(config, workdir)
      configs.save(resume.with_its_paths(config, workdir), workdir)
      return lock.check

    held = processes.by_leader(begin) or (lambda: None)
    config = resume.with_its_paths(config, workdir)
    end = 0
    while end < config.train.steps:
      try:
        end, state = _train(config, workdir, log, profile, verify, params, held)
      except OSError as error:
        if error.filename is None and error.errno in storage.REMEDIES:  # of an open file, which does not say its name
          raise storage.unwritable(workdir, error) from error
        raise
      verify = False
  return state


def _train(config: Any, workdir: Any, log: Callable[[str], None], profile: tuple[int, int] | None, verify: bool,
           params: Params | None, held: Callable[[], None]) -> tuple[int, State]:
  """`train` up to the next number of steps at which schedules change, and that."""
  from loopformer.data import batches as data  # reading text needs grain; a model alone does not
  options, best = config.train, best_of(config)
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

  def batches(split: str, seed: int) -> Any:
    return data.batches(config.task.examples(workdir, split, seed), batch=options.batch, process=reader,
                        processes=readers)

  stream = iter(batches('train', options.seed))
  held_out = [batch for batch, _ in zip(batches('validation', 0), range(options.eval_batches))]
  positions, most = (max((1 + int(np.max(batch['positions'])) for batch in held_out), default=0),
                     config.model.read_in.length)
  if positions > most:
    raise ConfigError(f'task: its examples stand at positions up to {positions - 1}, but model.read_in.length = '
                      f'{most}; raise it, or let positions begin at 0')
  for batch in held_out:
    _check_batch(config, batch)
  held_out = [sharding.put_batch({**batch, 'row': rows}, mesh) for batch in held_out]

  make = functools.partial(init_state, config.model, optimizer, options.seed)
  shapes = jax.eval_shape(make)
  shardings = sharding.shardings(shapes, mesh, roles)
  byte_lengths = tokenizer and jax.device_put(text_bytes(tokenizer), NamedSharding(mesh, P()))
  control = config.control.start()
  caught = interrupts.Caught(lambda: _words(workdir, caught.reached))
  with caught, Checkpoints(workdir, options.keep, best) as checkpoints:  # the last save is waited for while signals are
    target = abstract(shapes, shardings)
    held_params, held_optimizer = averages.exchanged(target.params, target.optimizer)  # as checkpoints have them
    if checkpoints.latest() == 0:  # what `Loaded.save` wrote: parameters alone, to start from
      params, first, restored = checkpoints.restore_params(0, held_params)[1], 0, None
    else:
      first, restored = checkpoints.restore_last(held_params, held_optimizer, log)
    end = next((end for end in options.extended if end > first), options.steps)
    if end < options.steps:
      config = dataclasses.replace(config, train=dataclasses.replace(options, steps=end, extended=()))
      optimizer = config.optim.make(end, roles)
    if first and restored is not None:
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
    run = _Run(config, workdir, mesh, functools.partial(step, frozen=frozen), writer, checkpoints, held_out,
               byte_lengths, rows, log, control, _Profile(workdir / 'profile', profile), held, caught)
    try:
      with contextlib.ExitStack() as stack:
        stack.callback(writer.close)
        stack.callback(run.profile.stop)
        state = run(state, stream, first)
    except Unsaved:
      raise
    except OSError as error:
      raise OSError(f'{error}; {checkpoints.resumes()}') from error
  if end < options.steps and not processes.all_agree(not (run.stopped or caught.told.is_set())):
    log(f'stopped by a signal after step {end}; the same command resumes there')
    raise SystemExit(0)
  return end, state


def _check_batch(config: Any, batch: AnyBatch):
  """Raises ConfigError where examples are such as the model or its plans make nothing of, in silence: answers that it
  does not have, tokens of which the cell makes nothing in so many steps, steps that a plan does not have. Not of
  examples that a `prepare` changes first."""
  model, objective = config.model, config.objective
  if not isinstance(objective.prepare, AsGiven):
    return
  targets, weights = (np.asarray(batch.get(name, 0)) for name in ('targets', 'weights'))
  placed = np.issubdtype(targets.dtype, np.integer) and targets.shape == weights.shape
  asked = targets[weights > 0] if placed else np.zeros(0, int)
  if asked.size and asked.max() >= model.outputs > 1:
    raise ConfigError(f'model.read_out.outputs = {model.outputs}: the task asks for the answer {asked.max()}, and the '
                      f'model has 0 to {model.outputs - 1}; raise it to {asked.max() + 1} or more')
  longest = max((roll.plan.longest for roll in objective.rolls.values() if roll.teacher is None), default=1)
  model.cell.check_tokens(batch['tokens'], longest, batch.get('segments'))
  for plan in (roll.plan for roll in objective.rolls.values()):
    plan.check_batch(batch)


def _words(workdir: Any, reached: int | None) -> str:
  """What is to be said where a run is ended at once. reached: the last step that was begun, None if none was."""
  saved = trained(workdir)
  return ('before the first step' if reached is None else f'after step {reached}') + '; ' + (
      f'the last good checkpoint is step {saved}, where the same command resumes' if saved else
      'nothing was saved yet, so the same command begins again')


def _begun(state: State, params: Params, optimizer: Any, shardings: State) -> State:
  """The state of a run that starts from these parameters, of which an optimiser may keep averages."""
  own = jax.jit(optimizer.init, out_shardings=shardings.optimizer)(params)
  return dataclasses.replace(state, params=masters.shortened(params, own), optimizer=own)


def _like(given: Params, own: Params, name: str) -> Params:
  """Parameters placed as those of the run. Raises ConfigError where names or shapes are not those of the model."""
  ours, theirs = ({path: leaf.shape for path, leaf in _by_path(tree).items()} for tree in (own, given))
  for path in ours.keys() | theirs.keys():
    if ours.get(path) != theirs.get(path):
      raise ConfigError(f'{name}: {path} has the shape {theirs.get(path, "(absent)")} there, '
                        f'{ours.get(path, "(absent)")} in the model; give parameters of the same model')
  return jax.tree.map(lambda leaf, mine: jax.device_put(
      jnp.array(leaf, jnp.promote_types(mine.dtype, jnp.float32)), mine.sharding), given, own)


def _started(params: Params, start: str, mesh: jax.sharding.Mesh, log: Callable, where: str = 'train.start') -> Params:
  """The parameters with those of another run's last checkpoint in the places that both have; its layers may be cut into
  other sections (sections.py)."""
  own = _by_path(params)
  if not (storage.path(start) / FOLDER).is_dir():
    raise ConfigError(f'{where} = {start}: no checkpoint was saved there; give the work folder of a run')
  with Checkpoints(start) as checkpoints:
    shapes = checkpoints.shapes()  # what is not ours is divided too, by its shapes alone
    cut = sections.moved(*({path: leaf.shape for path, leaf in tree.items()} for tree in (_by_path(shapes), own)))

    def placed(path: Any, leaf: Any, elsewhere: Any) -> jax.ShapeDtypeStruct:
      path = _name(path)
      mine = own.get(path)
      if (section := sections.section_of(path)) is not None and path.removeprefix(section) in cut:
        mine = None
      if mine is not None and mine.shape != leaf.shape:
        raise ConfigError(f'{where} = {start}: {path} has the shape {leaf.shape} there, {mine.shape} here; give a run '
                          'of the same sizes')
      return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=elsewhere if mine is None else mine.sharding)

    step, given = checkpoints.restore_params(None, jax.tree_util.tree_map_with_path(
        placed, shapes, sharding.shardings(shapes, mesh, Roles())))
  given = sections.fitted(_by_path(given), own)
  taken = own.keys() & given.keys()
  if not taken:
    raise ConfigError(f'{where} = {start}: its model shares no parameter with this one')
  log(f'{len(taken)} of {len(own)} parameters start from step {step} of {start}'
      + (', its layers cut into other sections' if cut else ''))
  return jax.tree_util.tree_map_with_path(lambda path, leaf: given.get(_name(path), leaf), params)


def _by_path(tree: Any) -> dict[str, Any]:
  return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


@dataclasses.dataclass
class _Run:
  """The loop of one process; metrics of a step are read after the next one is dispatched."""
  config: Any
  workdir: Any
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
  held: Callable[[], None]  # raises where another run has the folder
  caught: interrupts.Caught
  stopped: bool = False  # a process was told to stop, and all know

  def __call__(self, state: State, stream: Any, first: int) -> State:
    options = self.config.train
    self.clock = clock = _Clock(self.config, first)
    pending: tuple[int, Any] | None = None
    for number in range(first + 1, options.steps + 1):
      self.profile.at(number)
      with clock.timed('data'):
        rows = {**next(stream), 'row': self.rows,
                'stop': np.full(len(self.rows), self.caught.told.is_set(), np.float32)}
      with clock.timed('step'):
        batch = sharding.put_batch(rows, self.mesh, options.accumulate)
        stage = self.config.control.stage(self.control_state)
        state, values = self.step(state, batch, stage)
      self.caught.reached, self.caught.stepping = number, True
      self.held()
      self._report(pending)
      pending = (number, values)
      last, evaluated = number == options.steps, {}
      self.stopped |= jax.process_count() == 1 and self.caught.told.is_set()  # several agree one step later
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

  def _report(self, pending: tuple[int, Any] | None):
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
          f'  {metrics.rounded(speed["tokens_per_s"])} tok/s  MFU {100 * speed["mfu"]:.0f}%'
          f'  {metrics.duration(self.clock.left(number))} left')
      self.log(f'step {number}/{options.steps}  loss {values["loss"]:.3f}  {terms}{left}')

  def _evaluate(self, number: int, params: Params) -> dict[str, float]:
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
      batch = config.task.measure.asked(self.held_out[0])
      moved = processes.fetch(motion(config.model, params, batch,
                                     config.task.measure.told(plans.schedule(longest), batch)))
      self.writer.write('loops', number, {name: values.tolist() for name, values in moved.items()})
    first = main_number(config.task.measure)
    self.log(f'step {number}  validation {first} at ' + '  '.join(
        f'{row["schedule"]} loop{"s" if row["budget"] != 1 else ""}: '
        + ' '.join([f'{row[first]:.3f}', *(f'{name} {row[name]:.3f}' for name in ('accuracy', 'exact') if name in row)])
        for row in rows))
    self._watch(number, values)
    return values

  def _watch(self, number: int, values: Mapping[str, float]):
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
    self._number, self._spent, self._start = first, dict.fromkeys(_SPENT, 0.0), time.perf_counter()
    self.fresh = True

  @contextlib.contextmanager
  def timed(self, what: str) -> Iterator[None]:
    """Counts the time inside as that of data, step, eval or save."""
    start = time.perf_counter()
    yield
    self._spent[what] += time.perf_counter() - start

  def read(self, number: int) -> dict[str, float]:
    """Speed and times since the last reading."""
    now = time.perf_counter()
    steps, all_, spent = number - self._number, now - self._start, self._spent
    was_fresh, self.fresh = self.fresh, False
    self._number, self._start, self._spent = number, now, dict.fromkeys(_SPENT, 0.0)
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
