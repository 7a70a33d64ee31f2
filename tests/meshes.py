"""Trains and evaluates configurations on one device and on eight, and compares what is logged.

    python -m tests.meshes [--mesh=2x2x2] [--steps=2] [CONFIG:ARGUMENTS ...]

Eight CPU devices are simulated. Of every configuration (all of WHOLE by default) the whole of training runs: data,
steps, evaluation, saving. Prints a row a configuration, and exits with 1 where a number differs by more than sums in
another order do, or a run fails. The balance of Mixture-of-Recursions is a product of means over a device's tokens, as
in the released code, and differs by construction: its token choice is compared without.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
import json
import math
import os
from pathlib import Path
import subprocess
import sys
import tempfile

import numpy as np

from tests import quick

ROOT = Path(__file__).parents[1]
DEVICES = 8
TOLERANCE = 2e-3  # relative: the first steps of Adam have the size of the rate, whatever that of the gradient
TIMED = ('tokens_per_s', 'mfu', 'seconds', 'memory')
WHOLE = ('loopformer:pointers', 'masked_diffusion:cpu', 'masked_diffusion:cpu,loops=2,consistency=0.1,time=1',
         'ccdd:cpu', 'ccdd:cpu,kind=moe,source=corrupted,times=apart', 'ccdd:cpu,kind=mmdit',
         'padded:cpu,task=connectivity,fillers=n^2', 'padded:cpu,loops=log,lengths=doubling', 'cot_or_loop:cpu',
         'cot_or_loop:cpu,kind=thought,steps=3', 'cot_or_loop:cpu,kind=timed', 'relay:cpu', 'loopus:cpu',
         'leaderboard:cpu,system=shift', 'mor:tiny', 'mor:tiny,kind=token,balance=free', 'plt:tiny', 'melt:cpu',
         'ouro:pointers', 'pondernet', 'act', 'parcae:cpu', 'huginn:cpu', 'algoformer:cpu', 'looped_icl:cpu',
         'timestep:cpu', 'latent_thoughts:p_hop')


def train(folder: Path, mesh: str, steps: int, names: list[str]):
  """Trains every configuration in a folder of its own; what was logged, or the error, goes to told.json."""
  from loopformer import config as configs
  from loopformer.training import metrics, train as training
  told = {}
  sizes = [f'mesh.{axis}={size}' for axis, size in zip(('data', 'fsdp', 'tensor'), mesh.split('x'))]
  short = [f'train.steps={steps}', 'train.log_every=1', 'train.eval_batches=1',
           *(f'train.{what}_every={steps}' for what in ('eval', 'save'))]
  for index, name in enumerate(names):
    try:
      config = configs.load(name, sizes)
      warmups = [f'{field}={steps // 2}' for field, value in configs.flatten(config).items()
                 if field.endswith('.warmup') and int(float(value)) >= steps]
      for change in (*warmups, *short):
        config = configs.override(config, change)
      training.train(config, folder / str(index), log=lambda text: None)
      rows = [row for row in metrics.read_rows(folder / str(index) / 'metrics.jsonl')
              if row['kind'] in ('train', 'eval')]
      told[name] = [{key: value for key, value in row.items() if not key.startswith(TIMED)} for row in rows]
    except Exception as error:  # told in the table, and the others go on
      told[name] = f'{type(error).__name__}: {error}'
    (folder / 'told.json').write_text(json.dumps(told))


def numbers(value, path: str = '') -> dict[str, float]:
  """All numbers of what was logged, by their places."""
  if isinstance(value, (dict, list)):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: number for name, inner in items for key, number in numbers(inner, f'{path}/{name}').items()}
  return {path: float(value)} if isinstance(value, (int, float)) else {}


def apart(one: dict[str, float], other: dict[str, float]) -> tuple[float, str]:
  """The largest difference, relative to the larger of the number and 0.1, and where it is; NaNs in one place are equal.
  """
  assert one and one.keys() == other.keys(), one.keys() ^ other.keys()
  found = {name: abs(value - other[name]) / max(abs(value), 0.1) for name, value in one.items()}
  found = {name: (0.0 if np.isnan(one[name]) and np.isnan(other[name])
                  else math.inf if math.isnan(difference) else difference)
           for name, difference in found.items()}
  where = max(found, key=found.get)
  return found[where], where


def compared(names: Sequence[str], mesh: str, steps: int) -> dict[str, tuple[float, str]]:
  """By configuration: the largest difference and where it is; or infinity, and what the error said."""
  with tempfile.TemporaryDirectory() as folder:
    started = []
    for devices, sizes in ((1, '1x1x1'), (DEVICES, mesh)):
      place = Path(folder, str(devices))
      place.mkdir()
      environment = {**os.environ, 'JAX_PLATFORMS': 'cpu',
                     'XLA_FLAGS': f'{quick.FLAGS} --xla_force_host_platform_device_count={devices}'}
      started.append((place, subprocess.Popen(
          [sys.executable, '-c', 'import sys; from pathlib import Path; from tests import meshes; '
           'meshes.train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])',
           str(place), sizes, str(steps), *names], cwd=ROOT, env=environment)))
    assert [process.wait() for _, process in started] == [0, 0]
    alone, divided = (json.loads((place / 'told.json').read_text()) for place, _ in started)
  errors = {name: told[name] for told in (alone, divided) for name in names if isinstance(told[name], str)}
  return {name: (math.inf, errors[name]) if name in errors else apart(numbers(alone[name]), numbers(divided[name]))
          for name in names}


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--mesh', default='2x4x1')
  parser.add_argument('--steps', type=int, default=2)
  parser.add_argument('names', nargs='*', default=WHOLE)
  given = parser.parse_args()
  found = compared(given.names, given.mesh, given.steps)
  for name, (difference, where) in found.items():
    print(f'{name}: {difference:.1e}  {where}{"  DIFFERS" * (difference > TOLERANCE)}')
  sys.exit(any(difference > TOLERANCE for difference, _ in found.values()))


if __name__ == '__main__':
  main()
