"""Where numbers go while a run trains: JSON lines always, TensorBoard where it is installed; and the speed of light.
"""
from __future__ import annotations

import json
import math
from pathlib import Path
import time
from typing import Any, Mapping

import jax
import jax.numpy as jnp

# Dense peak of one device in bfloat16, FLOP/s, from the makers' data sheets.
PEAKS = {'TPU v4': 275e12, 'TPU v5 lite': 197e12, 'TPU v5': 459e12, 'TPU v5p': 459e12, 'TPU v6 lite': 918e12,
         'NVIDIA A100': 312e12, 'NVIDIA H100': 989e12, 'NVIDIA H200': 989e12}


def peak_flops() -> tuple[float, str]:
  """FLOP/s of one device and where the figure is from: a data sheet, or a matrix product timed here."""
  kind = jax.devices()[0].device_kind
  for name in sorted(PEAKS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAKS[name], f'data sheet, {name}, bfloat16'
  return measured_peak(), 'measured, float32 matrix product'


def measured_peak(size: int = 1024, repeats: int = 5) -> float:
  """FLOP/s of a square float32 matrix product here, the best of a few."""
  product = jax.jit(jnp.dot)
  a = jnp.ones((size, size))
  product(a, a).block_until_ready()
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    product(a, a).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2.0 * size ** 3 / best


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
