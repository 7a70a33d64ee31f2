"""Where numbers go while a run trains: JSON lines always, TensorBoard where it is installed; and the speed of light.
"""
from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
import sys
import time
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from loopformer.types import part


@part
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
    return self.interconnect if self.node is None or apart <= self.node else self.network


ACCELERATORS = {
    'v4': Accelerator(kinds=('TPU v4',), flops=275e12, memory=32e9, bandwidth=1200e9, interconnect=300e9),
    'v5e': Accelerator(kinds=('TPU v5 lite',), flops=197e12, memory=16e9, bandwidth=819e9, interconnect=200e9),
    'v5p': Accelerator(kinds=('TPU v5', 'TPU v5p'), flops=459e12, memory=95e9, bandwidth=2765e9, interconnect=600e9),
    'v6e': Accelerator(kinds=('TPU v6 lite',), flops=918e12, memory=32e9, bandwidth=1640e9, interconnect=400e9),
    'tpu7x': Accelerator(kinds=('TPU7x',), flops=1153e12, memory=96e9, bandwidth=3690e9, interconnect=300e9),  # half a chip
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
  return 2.0 * x[0].nbytes / _least_seconds(lambda: x.append(negate(x.pop())) or x[0])


def _least_seconds(program, *operands, seconds=0.5):
  """Of the calls within so many seconds, and of five at least: a machine that others use is slow for moments."""
  jax.block_until_ready(program(*operands))
  times, begun = [], time.perf_counter()
  while len(times) < 5 or time.perf_counter() - begun < seconds:
    start = time.perf_counter()
    jax.block_until_ready(program(*operands))
    times.append(time.perf_counter() - start)
  return min(times)


class Writer:
  """Appends rows to `<folder>/metrics.jsonl`, and to TensorBoard event files where tensorboardX is installed.

  A resumed run drops the rows from its first step on, which it will write again.
  """

  def __init__(self, folder: Path, first_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'metrics.jsonl'
    kept = [row for row in read_rows(path) if row['step'] <= first_step]
    path.write_text(''.join(json.dumps(row) + '\n' for row in kept))
    self._file = path.open('a', buffering=1)
    self._board = _tensorboard(folder, first_step)

  def write(self, kind: str, step: int, values: Mapping[str, Any]):
    """One row; values are numbers, or lists and texts for the JSON lines alone."""
    self._file.write(json.dumps({'kind': kind, 'step': step, **values}) + '\n')
    for name, value in values.items() if self._board else ():
      if isinstance(value, (int, float)):
        self._board.add_scalar(f'{kind}/{name}', value, step)

  def close(self):
    self._file.close()
    if self._board:
      self._board.close()


class Silent:
  """The writer of processes that write nothing."""

  def write(self, kind: str, step: int, values: Mapping[str, Any]):
    """Nothing."""

  def close(self):
    """Nothing."""


def memory() -> float:
  """Most bytes in use so far: of this process's first device, or, where that does not tell, of the process."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return float(stats['peak_bytes_in_use'])
  import resource  # not on every system
  unit = 1 if sys.platform == 'darwin' else 1024
  return float(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _tensorboard(folder: Path, first_step: int):
  try:
    import tensorboardX  # the extra `tensorboard`
  except ImportError:
    return None
  return tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=first_step + 1)


def read_rows(path: Path) -> list[dict]:
  """The rows of a metrics file; a last line that a killed run cut short is left out."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      continue
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


def table(rows: list[Mapping[str, Any]]) -> str:
  """Rows as a GitHub table, which reads well in a terminal too."""
  names = list(rows[0])
  cells = [names, *[[f'{row[n]:.4f}' if isinstance(row[n], float) else str(row[n]) for n in names] for row in rows]]
  widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
  lines = ['| ' + ' | '.join(cell.rjust(width) for cell, width in zip(row, widths)) + ' |' for row in cells]
  lines.insert(1, '|' + '|'.join('-' * (width + 1) + ':' for width in widths) + '|')
  return '\n'.join(lines)


def write_csv(path: Path, rows: list[Mapping[str, Any]]):
  """Writes rows of the same names, under a line of these."""
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
