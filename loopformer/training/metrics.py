"""Where numbers go while a run trains: JSON lines always, TensorBoard where it is installed, Weights & Biases
(wandb_run.py) where a project is named; and the speed of light.
"""
from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import json
import math
from pathlib import Path
import re
import sys
import time
from typing import Any, Callable, Mapping
import warnings

import jax
import jax.numpy as jnp

from loopformer import reading, storage
from loopformer.training import wandb_run
from loopformer.types import ConfigError, config_dataclass


@config_dataclass
class Accelerator:
  """One device by its maker's data sheet.

  kinds: how JAX names it; flops: a second, dense, bfloat16; memory: bytes; bandwidth: bytes a second from and to it;
  interconnect: bytes a second that it sends to other devices, over all its links (half of what is told of both ways).
  node: devices that the interconnect joins, None for all of a slice; network: bytes a second to devices of other nodes,
  its share of the network cards of the maker's server (DGX).
  """
  kinds: tuple[str, ...]
  flops: float
  memory: float
  bandwidth: float
  interconnect: float
  node: int | None = None
  network: float | None = None

  def speed(self, apart: int) -> float:
    """Bytes a second that it sends to devices, the first and the last of which are so many places apart."""
    if self.node is None or self.network is None or apart <= self.node:
      return self.interconnect
    return self.network


ACCELERATORS = {
    'v4': Accelerator(kinds=('TPU v4',), flops=275e12, memory=32e9, bandwidth=1200e9, interconnect=300e9),
    'v5e': Accelerator(kinds=('TPU v5 lite',), flops=197e12, memory=16e9, bandwidth=819e9, interconnect=200e9),
    'v5p': Accelerator(kinds=('TPU v5', 'TPU v5p'), flops=459e12, memory=95e9, bandwidth=2765e9, interconnect=600e9),
    'v6e': Accelerator(kinds=('TPU v6 lite',), flops=918e12, memory=32e9, bandwidth=1640e9, interconnect=400e9),
    'tpu7x': Accelerator(  # half a chip
        kinds=('TPU7x',), flops=1153e12, memory=96e9, bandwidth=3690e9, interconnect=300e9),
    'A100': Accelerator(kinds=('NVIDIA A100',), flops=312e12, memory=80e9, bandwidth=2039e9, interconnect=300e9,
                        node=8, network=25e9),
    'H100': Accelerator(kinds=('NVIDIA H100',), flops=989e12, memory=80e9, bandwidth=3350e9, interconnect=450e9,
                        node=8, network=50e9),
    'H200': Accelerator(kinds=('NVIDIA H200',), flops=989e12, memory=141e9, bandwidth=4800e9, interconnect=450e9,
                        node=8, network=50e9),
}
PEAKS = {kind: accelerator.flops for accelerator in ACCELERATORS.values() for kind in accelerator.kinds}


def peak_flops() -> tuple[float, str]:
  """FLOP/s of one device and where the figure is from: a data sheet, or a matrix product timed here."""
  kind = jax.devices()[0].device_kind
  for name in sorted(PEAKS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAKS[name], f'data sheet, {name}, bfloat16'
  return measured_peak(), 'measured, float32 matrix product'


@functools.cache
def measured_peak(size: int = 1024, dtype: str = 'float32') -> float:
  """FLOP/s of a square matrix product here, at its fastest; of random numbers, because a GPU multiplies equal ones
  faster. Measured once."""
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  return 2.0 * size ** 3 / _least_seconds(jax.jit(jnp.dot), a, a)


@functools.cache
def measured_bandwidth(megabytes: int | None = None) -> float:
  """Bytes a second that a pass over an array in place reads and writes here, at its fastest; of 256 MB on a CPU and
  2 GB elsewhere, beside which its launch is short. Measured once."""
  megabytes = megabytes or (256 if jax.default_backend() == 'cpu' else 2048)
  negate = jax.jit(lambda x: -x, donate_argnums=0)
  x = [negate(jnp.ones(megabytes << 18))]  # without a new array a call, whose pages the system would have to find

  def once():
    x[0] = negate(x[0])
    return x[0]

  return 2.0 * x[0].nbytes / _least_seconds(once)


def _least_seconds(program: Callable, *operands: Any, seconds: float = 0.5) -> float:
  """Of the calls within so many seconds, and of five at least: a machine that others use is slow for moments."""
  jax.block_until_ready(program(*operands))
  begun = time.perf_counter()
  times: list[float] = []
  while len(times) < 5 or time.perf_counter() - begun < seconds:
    start = time.perf_counter()
    jax.block_until_ready(program(*operands))
    times.append(time.perf_counter() - start)
  return min(times)


class Writer:
  """Writes rows to `lines`, and their numbers to `boards`: TensorBoard event files, Weights & Biases.

  A resumed run drops the rows from its first step on, which it will write again.
  """

  def __init__(self, lines: Lines | Parts, *boards: Any):
    self._lines, self._boards = lines, boards

  def write(self, kind: str, step: int, values: Mapping[str, Any]):
    """One row; values are numbers, or lists and texts for the JSON lines alone."""
    self._lines.add(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
    for name, value in values.items() if self._boards else ():
      if isinstance(value, (int, float)):
        for board in self._boards:
          board.add_scalar(f'{kind}/{name}', value, step)

  def flush(self):
    """Sees that all rows are where a resumed run finds them."""
    self._lines.flush()

  def close(self):
    self._lines.flush()
    for board in self._boards:
      board.close()


class Lines:
  """Lines that are appended to a file of this machine."""

  def __init__(self, path: Path):
    self._path, self._file = path, path.open('a', buffering=1)

  def add(self, line: str):
    try:
      self._file.write(line)
    except OSError as error:
      raise storage.unwritable(self._path, error) from error

  def flush(self):
    """Nothing: every line is written when it comes."""


class Parts:
  """Lines in a bucket, to whose objects nothing can be appended: `metrics-000000.jsonl`, `metrics-000001.jsonl`, ...

  The last part is written anew, when it holds ROWS lines or has been waiting for SECONDS, and on `flush`.
  """
  ROWS = 512
  SECONDS = 10.0

  def __init__(self, path: Any, number: int):
    self._path, self._number, self._written, self._at = path, number, 0, time.monotonic()
    self._held: list[str] = []

  def add(self, line: str):
    self._held.append(line)
    if len(self._held) == self.ROWS or time.monotonic() - self._at >= self.SECONDS:
      self.flush()

  def flush(self):
    if self._written < len(self._held):
      storage.write(_part(self._path, self._number), ''.join(self._held))
    self._written, self._at = len(self._held), time.monotonic()
    if self._written == self.ROWS:
      self._number, self._held, self._written = self._number + 1, [], 0


def writer(workdir: str | Path, first_step: int) -> Writer:
  """The writer of a work folder, without the rows of steps after the first."""
  folder = storage.path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'metrics.jsonl'
  parts = _files(path)
  for part_ in parts:
    rows = _rows(part_)
    kept = [row for row in rows if row['step'] <= first_step]
    if len(kept) < len(rows) or not storage.remote(path):  # whose last line may be cut short
      storage.write(part_, ''.join(json.dumps(row) + '\n' for row in kept))
  number = 1 + max((int(part_.stem.rpartition('-')[2]) for part_ in parts if part_ != path), default=-1)
  lines = Parts(path, number) if storage.remote(path) else Lines(path)
  return Writer(lines, *filter(None, (_tensorboard(folder, first_step), wandb_run.begin(folder))))


def _part(path: Any, number: int) -> Any:
  return path.with_name(f'{path.stem}-{number:06}{path.suffix}')


def _files(path: Any) -> list:
  """The file of that name and its parts, in order, as far as they are there."""
  if not path.parent.exists():
    return []
  parts = sorted(child for child in path.parent.iterdir()
                 if re.fullmatch(rf'{path.stem}-\d{{6}}{path.suffix}', child.name))
  return [path, *parts] if path.exists() else parts


class Silent:
  """The writer of processes that write nothing."""

  def write(self, kind: str, step: int, values: Mapping[str, Any]):
    """Nothing."""

  def flush(self):
    """Nothing."""

  def close(self):
    """Nothing."""


def bytes_used() -> float:
  """Most bytes in use so far: of this process's first device, or, where that does not tell, of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return float(stats['peak_bytes_in_use'])
  import resource  # not on every system
  unit = 1 if sys.platform == 'darwin' else 1024
  return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


@contextlib.contextmanager
def _unfound(*names: str):
  """Meanwhile an import does not find these modules, but for those that are loaded already."""
  hidden = [name for name in names if name not in sys.modules]
  modules: dict[str, Any] = sys.modules
  modules.update(dict.fromkeys(hidden))
  try:
    yield
  finally:
    for name in hidden:
      del sys.modules[name]


class _Board:
  """TensorBoard's event file; tensorboardX is imported after the first step.

  It is written here and not in tensorboardX's thread, which would die of a full disk and let the run wait for it. Event
  files of a bucket are uploaded at the end.
  """
  SECONDS = 30.0  # between two times that it is brought to the disk

  def __init__(self, folder: Any, first_step: int):
    self._folder, self._first_step, self._stack, self._at = folder, first_step, contextlib.ExitStack(), -math.inf

  @functools.cached_property
  def _events(self):
    with _unfound('torch', 'boto3', 'google.cloud'):  # seconds, and hundreds of MB, for what scalars do not need
      from tensorboardX import event_file_writer, summary  # the extra `tensorboard`
      from tensorboardX.proto import event_pb2
    local = self._stack.enter_context(storage.filled(self._folder))
    writer = event_file_writer.EventsWriter(str(local / 'events'), f'.{self._first_step}')
    self._stack.callback(writer.close)
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)  # hides what was told from this step on
    writer.write_event(event_pb2.Event(wall_time=time.time(), step=self._first_step + 1, session_log=start))
    return writer, event_pb2.Event, summary.scalar

  def add_scalar(self, name: str, value: float, step: int):
    try:
      events, event, scalar = self._events
      events.write_event(event(wall_time=time.time(), step=step, summary=scalar(name, value)))
      if time.monotonic() - self._at >= self.SECONDS:
        self._at = time.monotonic()
        events.flush()
    except OSError as error:
      raise storage.unwritable(self._folder, error) from error

  def close(self):
    try:
      self._stack.close()
    except storage.Unreachable:
      raise
    except OSError as error:
      raise storage.unwritable(self._folder, error) from error


def _tensorboard(folder: Any, first_step: int) -> _Board | None:
  return None if importlib.util.find_spec('tensorboardX') is None else _Board(folder / 'tensorboard', first_step)


def read_rows(path: str | Path) -> list[dict]:
  """The rows of a metrics file and its parts; a last line that a killed run cut short is left out."""
  return sorted((row for file in _files(storage.path(path)) for row in _rows(file)), key=lambda row: row['step'])


def _rows(path: Any) -> list[dict]:
  """The rows of one file, without those that are damaged; of which a warning tells, but for a last line cut short."""
  rows, damaged = [], []
  lines = reading.contents(path, 'move it away, and what a run writes begins anew').split(b'\n')
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = reading.parsed(reading.decoded(line, path), path, '')
      if type(row.get('step')) is not int or not isinstance(row.get('kind'), str):
        raise ConfigError('no row of metrics')
      rows.append(row)
    except ConfigError:
      damaged.append(number)
  damaged = [number for number in damaged if number < len(lines)]
  if damaged:
    warnings.warn(f'{path}: {len(damaged)} rows are damaged and left out, the first of them on line {damaged[0]}',
                  stacklevel=2)
  return rows


def training_curve(rows: list[dict]) -> list[dict]:
  """Evaluations during training, with the seconds of training steps before each (compilation is not counted)."""
  seconds, last, curve = 0.0, 0, []
  for row in rows:
    if 'seconds_per_step' in row:
      seconds, last = seconds + row['seconds_per_step'] * (row['step'] - last), row['step']
    elif row['kind'] == 'eval':
      curve.append({**row, 'seconds': seconds})
  return curve


def duration(seconds: float) -> str:
  """Seconds as `1h02m`, `3m04s` or `5s`."""
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02}m' if hours else f'{minutes}m{seconds:02}s' if minutes else f'{seconds}s'


def rounded(count: float) -> str:
  """A count as `57`, `1.5k` or `2.3M`."""
  for unit, size in (('M', 1e6), ('k', 1e3)):
    if count >= 0.9995 * size:
      return f'{count / size:.1f}{unit}'
  return f'{count:.0f}'


def table(rows: list[Mapping[str, Any]]) -> str:
  """Rows as a GitHub table, which reads well in a terminal too; of no rows, nothing."""
  if not rows:
    return ''
  names = list(rows[0])
  cells = [names, *[[f'{row[n]:.4f}' if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
  lines = ['| ' + ' | '.join(cell.rjust(width) for cell, width in zip(row, widths)) + ' |' for row in cells]
  lines.insert(1, '|' + '|'.join('-' * (width + 1) + ':' for width in widths) + '|')
  return '\n'.join(lines)


def write_csv(path: str | Path, rows: list[Mapping[str, Any]]):
  """Writes rows of the same names, under a line of these."""
  text = io.StringIO()
  lines = csv.DictWriter(text, list(rows[0]), lineterminator='\n')
  lines.writeheader()
  lines.writerows(rows)
  storage.write(path, text.getvalue())
