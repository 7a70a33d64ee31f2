"""Checkpoints: parameters, optimiser state, and where the data stood, in one Orbax manager a work folder.

`params` is an item of its own, so that evaluation restores weights without an optimiser.
"""
from __future__ import annotations

import contextlib
import logging
import math
import os
from pathlib import Path
import sys
from typing import Any, Callable, Iterator, Mapping

import jax

from loopformer import reading, sharding, storage
from loopformer.model import parameter_roles, parameter_shapes
from loopformer.training import processes
from loopformer.types import ConfigError, config_dataclass, whole

FOLDER = 'checkpoints'
RETRIES = {'max_retries': 8, 'initial_delay': '1s', 'max_delay': '32s'}  # of a request to a bucket: two minutes in all
FILE_BYTES, CHUNK_BYTES = 64 * 2**20, 32 * 2**20  # TensorStore holds what goes to a file until the file is full
BUCKET_FILE_BYTES = 4 * FILE_BYTES  # of which every one is a request
SMALLEST_PART = 32  # a chunk has no fewer bytes than CHUNK_BYTES by this: each is a read, and an entry of an index
LAYOUT = 2  # raised whenever the meaning of what is stored changes


class Unsaved(OSError):
  """A checkpoint that could not be written; the message names the last good one."""


@config_dataclass
class Best:
  """The checkpoint of the largest sign * value, where `name` is that of a number that is given to `save`."""
  name: str
  sign: int


class Checkpoints:
  """The checkpoints of a work folder; a context manager that waits for the last save.

  keep: so many last ones stay, and the `best` one besides (None: the last alone).
  """

  def __init__(self, workdir: str | Path, keep: int = 3, best: Best | None = None):
    import orbax.checkpoint as ocp
    workdir = storage.path(workdir)
    policy = ocp.checkpoint_managers
    kept, filed = [policy.LatestN(keep)], {}
    if best is not None:
      def rank(values: Any) -> float:
        known = isinstance(values, dict) and best.name in values  # a run may have kept the best of another number
        return values[best.name] * best.sign if known else -math.inf

      kept.append(policy.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False))
      filed = {'best_fn': rank}  # without it the policy works, but the numbers are not written
    if storage.remote(workdir):  # where renaming is copying, a last file says that a step is complete
      _serve_buckets()
      filed['temporary_path_class'] = ocp.path.atomicity.CommitFileTemporaryPath
    self._ocp, self._best = ocp, best
    self._folder = (workdir if storage.remote(workdir) else workdir.resolve()) / FOLDER
    self._good: int | None = None  # the last step that is known to be complete
    self._begun: int | None = None  # the one that is being saved
    self._stack = contextlib.ExitStack()
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.AnyPreservationPolicy(kept), create=True, **filed)
    try:
      self._manager = ocp.CheckpointManager(self._folder, options=options)
    except ValueError:  # it reads the numbers of all evaluations
      for numbers in self._folder.glob('*/metrics/metrics'):
        reading.read_json(numbers, 'delete the folder that it lies in: the step stays, but cannot be the best')
      raise

  def __enter__(self) -> Checkpoints:
    self._stack.enter_context(_quiet())
    return self

  def __exit__(self, *_):
    with self._stack, self._saving():
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    """Names the last good step where a save fails, of this step or of the one before, which it waits for."""
    try:
      yield
    except Exception as error:  # of Orbax, TensorStore, or the client of a bucket
      raise Unsaved(f'{self._folder}: a checkpoint cannot be written ({storage.reason(error)}); '
                    f'{self.resumes()}') from error
    self._good, self._begun = self._begun, None

  def last_good(self) -> str:
    """The last complete step, in words; waits for the one that is being saved."""
    if self._begun is not None:
      with contextlib.suppress(Exception):
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._good, self._begun = self._begun, None
    with contextlib.suppress(Exception):  # of a bucket that is out of reach
      self._good = trained(self._folder.parent)
    return 'there is no good checkpoint' if self._good is None else f'the last good checkpoint is step {self._good}'

  def resumes(self) -> str:
    """`last_good`, and what goes on from there."""
    told = self.last_good()
    return told if self._good is None else f'{told}, where the same command resumes'

  def latest(self) -> int | None:
    """The last complete step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, params: Any, optimizer: Any, data: dict, control: dict,
           values: Mapping[str, float] | None = None):
    """Starts to save; returns as soon as the arrays may be overwritten.

    `data` is the state of the data iterator, `control` the state of the run's controller, `values` the numbers of an
    evaluation of this step, among them that of `best`, if there was one. optimizer: None where parameters alone are
    kept.
    """
    if self._best and values and self._best.name not in values:
      raise ConfigError(f'train.best = {self._best.name!r}: the evaluations of this task do not report it; choose one '
                        f'of {", ".join(values)}')
    known = {self._best.name: values[self._best.name]} if self._best and values else None
    with self._saving():
      self._manager.save(step, metrics=known, args=self._ocp.args.Composite(
          params=self._written(params), **({} if optimizer is None else {'optimizer': self._written(optimizer)}),
          meta=self._ocp.args.JsonSave({'layout': LAYOUT, 'step': step, 'data': data, 'control': control})))
    self._begun = step

  def _written(self, tree: Any) -> Any:
    """How Orbax writes arrays: in pieces, so that a save takes half a gigabyte of memory beside their copy on the host,
    whatever their size (some gigabytes where it goes to a bucket)."""
    pieces = jax.tree.map(chunk_bytes, tree)
    least = BUCKET_FILE_BYTES if storage.remote(self._folder) else FILE_BYTES
    return self._ocp.args.PyTreeSave(
        tree, save_args=jax.tree.map(lambda size: self._ocp.SaveArgs(chunk_byte_size=size), pieces),
        ocdbt_target_data_file_size=max(least, *jax.tree.leaves(pieces)))

  def _read(self, tree: Any) -> Any:
    """How Orbax reads arrays into the abstract ones that are given."""
    return self._ocp.args.PyTreeRestore(tree, restore_args=self._ocp.checkpoint_utils.construct_restore_args(tree))

  def restore_last(self, params: Any, optimizer: Any, log: Callable[[str], None]) -> tuple[int, Any]:
    """(step, what `restore` returns) of the last step that can be read; (0, None) where none was saved.

    Steps after it, which are damaged, are put aside as `damaged-<step>`, and named in the log.

    Raises:
      ConfigError: no step can be read, or the last was written by another layout.
    """
    damaged: list[tuple[int, str]] = []
    for step in reversed(self.steps()):
      restored = None
      try:
        restored = self.restore(step, params, optimizer)
      except ConfigError:
        raise
      except Exception as error:  # whatever a damaged file leads to: Orbax, TensorStore and JSON each have their own
        damaged.append((step, str(error).splitlines()[0] if str(error) else type(error).__name__))
      if processes.all_agree(restored is not None):
        for number, reason in damaged:
          log(f'warning: checkpoint {self._folder}/{number} is damaged ({reason}); step {step} is used, and the '
              f'damaged one kept as damaged-{number}')
        self._put_aside([number for number, _ in damaged])
        self._good = self._begun = step
        return step, restored
    if damaged:
      told = '; '.join(f'{step}: {reason}' for step, reason in damaged)
      raise ConfigError(f'{self._folder}: no step can be read ({told}). Give another --workdir, or put the files back')
    return 0, None

  def _put_aside(self, steps: list[int]):
    if steps:
      def move() -> None:
        if processes.is_leader():
          for step in steps:
            storage.move(self._folder / str(step), self._folder / f'damaged-{step}')

      processes.leader_first(move, 'damaged checkpoints are put aside')
      self._manager.reload()

  def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict, dict]:
    """(params, optimizer, data state, controller's state) of a step, laid out like the abstract arrays that are given.

    Raises:
      ConfigError: the step is not there, or was written by another layout.
    """
    restored = self._restore(self._there(step), params=self._read(params), optimizer=self._read(optimizer))
    return restored['params'], restored['optimizer'], restored['meta']['data'], restored['meta']['control']

  def restore_params(self, step: int | None, params: Any) -> tuple[int, Any]:
    """(step, params), of the latest step if none is named. Raises ConfigError where it is not there, or damaged."""
    step = self._there(self.latest() if step is None else step)
    with self._naming(step):
      return step, self._restore(step, params=self._read(params))['params']

  def shapes(self) -> Any:
    """Shapes and dtypes of the latest step's parameters, as the checkpoint itself tells them."""
    step = self._there(self.latest())
    with self._naming(step), self._ocp.StandardCheckpointer() as reader:
      return reader.metadata(self._folder / str(step) / 'params').item_metadata.tree

  @contextlib.contextmanager
  def _naming(self, step: int | None) -> Iterator[None]:
    try:
      yield
    except ConfigError:
      raise
    except Exception as error:  # whatever a damaged file leads to: Orbax, TensorStore and JSON each have their own
      reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
      raise ConfigError(f'{self._folder}/{step}: it cannot be read ({reason}); put its files back, or name another '
                        f'step: {", ".join(str(other) for other in self.steps() if other != step) or "there is none"}'
                        ) from error

  def _there(self, step: int | None) -> int:
    step = step if step is None else whole('step', step, 0)
    if step not in self.steps():
      wanted = 'no complete checkpoint' if step is None else f'no complete checkpoint of step {step}'
      raise ConfigError(f'{self._folder}: {wanted} there; complete steps: {self.steps() or "none"}. '
                        'Train first, or name a step that is there')
    return step

  def _restore(self, step: int, **items: Any) -> Any:
    with _quiet():
      restored = self._manager.restore(
          step, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore(), **items))
    layout = restored['meta']['layout']
    if layout != LAYOUT:
      raise ConfigError(f'{self._folder}/{step}: layout {layout}, but this version reads layout {LAYOUT}; '
                        'use the version of loopformer that wrote it')
    return restored


def chunk_bytes(leaf: Any) -> int:
  """The most bytes that a chunk of an array is to have: CHUNK_BYTES, or all that a device holds of it.

  Orbax makes chunks by dividing the largest axis by its divisors, until they are small enough. A large prime number of
  rows, as of some vocabularies, would be as many chunks: an array that has no better divisors stays whole.
  """
  shape = leaf.shape
  own = leaf.sharding.shard_shape(shape) if isinstance(leaf, jax.Array) else shape
  item = leaf.dtype.itemsize
  dims, divided = list(own), [all_ != part for all_, part in zip(shape, own)]
  while math.prod(dims) * item > CHUNK_BYTES:
    among = [i for i, size in enumerate(dims) if divided[i] and size > 1]
    if not among:
      divided = [True] * len(dims)
      continue
    largest = max(among, key=dims.__getitem__)
    dims[largest] = next(dims[largest] // n for n in range(2, dims[largest] + 1) if dims[largest] % n == 0)
  fits = math.prod(own) * item <= CHUNK_BYTES or math.prod(dims) * item >= CHUNK_BYTES // SMALLEST_PART
  return CHUNK_BYTES if fits else math.prod(own) * item


def trained(workdir: str | Path) -> int | None:
  """The last complete step of a work folder, or None; touches no device, and needs no Orbax."""
  folder = storage.path(workdir) / FOLDER
  if not folder.is_dir():
    return None
  remote = storage.remote(folder)  # where a step lies under its name before it is complete
  return max((int(child.name) for child in folder.iterdir() if child.name.isdecimal()
              and (not remote or (child / 'commit_success.txt').exists())), default=None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Keeps back what Orbax, asyncio and TensorStore print of a save or a restore that fails, which `Checkpoints` tells
  in one line: hundreds of lines of their threads. What TensorStore tells a closed loop comes after the error, too."""
  def told(record: logging.LogRecord) -> bool:
    return not (record.exc_info and ('orbax' in record.pathname or 'asyncio' in record.pathname))

  hook: Callable[[Any], None] = sys.unraisablehook
  loggers = [logging.getLogger(name) for name in ('absl', 'asyncio')]

  def shown(unraisable: sys.UnraisableHookArgs) -> None:
    if str(unraisable.exc_value) != 'Event loop is closed':  # what TensorStore would tell a loop that has failed
      hook(unraisable)

  for logger in loggers:
    logger.addFilter(told)
  sys.unraisablehook = shown
  failed = True
  try:
    yield
    failed = False
  finally:
    for logger in loggers:
      logger.removeFilter(told)
    if not failed and sys.unraisablehook is shown:
      sys.unraisablehook = hook


def restore_model(workdir: str | Path, model: Any, mesh: jax.sharding.Mesh | None, step: int | None = None
                  ) -> tuple[int, Any]:
  """(step, parameters) of a checkpoint of a run of this model, the latest if no step is named.

  They are divided over the axes fsdp and tensor of the mesh, or lie on the first device.
  """
  shapes = parameter_shapes(model)
  if mesh is None:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda _: device, shapes)
  else:
    target = sharding.shardings(shapes, mesh, parameter_roles(model))
  with Checkpoints(workdir) as checkpoints:
    return checkpoints.restore_params(step, abstract(shapes, target))


def _serve_buckets():
  """Lets Orbax keep arrays in s3://, as it keeps them in gs://, and bounds how long TensorStore tries.

  Orbax knows of local folders and of gs:// alone where it describes the place of an array.
  """
  from orbax.checkpoint._src.serialization import tensorstore_utils
  describe = tensorstore_utils.build_kvstore_tspec
  if describe.__module__ == __name__:
    return

  def described(directory: str, *rest: Any, **more: Any) -> Any:
    kind = storage.scheme(directory)
    if kind not in storage.WORKDIRS:
      return describe(directory, *rest, **more)
    return _placed(describe(str(storage.path(directory)).replace('s3://', 'gs://', 1), *rest, **more), kind)

  tensorstore_utils.build_kvstore_tspec = described


def _placed(spec: Any, kind: str) -> Any:
  """TensorStore's description of a place, in which that of the bucket is one of a kind in storage.WORKDIRS."""
  if isinstance(spec, list):
    return [_placed(inner, kind) for inner in spec]
  if not isinstance(spec, dict):
    return spec
  spec = {name: _placed(inner, kind) for name, inner in spec.items()}
  if not str(spec.get('driver')).startswith('gcs'):
    return spec
  if kind == 'gs':
    return {**spec, 'gcs_request_retries': RETRIES}
  given = {'endpoint': os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL'),
           'aws_region': os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')}
  return {**spec, 'driver': 's3', 's3_request_retries': RETRIES,
          **{name: value for name, value in given.items() if value}}


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes with their shardings: the target of a restore onto this mesh."""
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                      tree, shardings)
