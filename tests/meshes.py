"""Trains and evaluates configurations on one device and on eight, and compares what is logged.

    python -m tests.meshes [--mesh=2x2x2] [--steps=2] [CONFIG:ARGUMENTS ...]

Eight CPU devices are simulated. Of every configuration (all of WHOLE by default) the whole of training runs: data, steps,
evaluation, saving. Prints a row a configuration, and exits with 1 where a number differs by more than sums in another
order do, or a run fails.
"""
from __future__ import annotations

import argparse
import json
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
WHOLE = ('loopformer:pointers', 'masked_diffusion:cpu', 'masked_diffusion:cpu,loops=2,consistency=0.1,time=1', 'ccdd:cpu',
         'ccdd:cpu,kind=moe,source=corrupted,times=apart', 'ccdd:cpu,kind=mmdit', 'padded:cpu,task=connectivity,fillers=n^2',
         'padded:cpu,loops=log,lengths=doubling', 'cot_or_loop:cpu', 'cot_or_loop:cpu,kind=thought,steps=3',
         'cot_or_loop:cpu,kind=timed', 'relay:cpu', 'loopus:cpu', 'leaderboard:cpu,system=shift', 'mor:tiny', 'mor:tiny,kind=token',
         'plt:tiny', 'melt:cpu', 'ouro:pointers', 'pondernet', 'act', 'parcae:cpu', 'huginn:cpu', 'algoformer:cpu',
         'looped_icl:cpu', 'timestep:cpu', 'latent_thoughts:p_hop')


def train(folder: Path, mesh: str, steps: int, names: list[str]):
  """Trains every configuration in a folder of its own; what was logged, or the error, goes to told.json."""
  from loopformer import config as configs
  from loopformer.training import metrics
  from loopformer.training import train as training
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
      rows = [row for row in metrics.read_rows(folder / str(index) / 'metrics.jsonl') if row['kind'] in ('train', 'eval')]
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
  """The largest difference, relative to the larger of the number and 0.1, and where it is."""
  assert one and one.keys() == other.keys(), one.keys() ^ other.keys()
  return max((abs(one[name] - other[name]) / max(abs(one[name]), 0.1) if np.isfinite([one[name], other[name]]).all()
              else float('inf') * (str(one[name]) != str(other[name])) if str(one[name]) != str(other[name]) else 0.0, name)
             for name in one)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--mesh', default='2x4x1')
  parser.add_argument('--steps', type=int, default=2)
  parser.add_argument('names', nargs='*', default=WHOLE)
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    started = []
    for devices, mesh in ((1, '1x1x1'), (DEVICES, given.mesh)):
      place = Path(folder, str(devices))
      place.mkdir()
      environment = {**os.environ, 'JAX_PLATFORMS': 'cpu',
                     'XLA_FLAGS': f'{quick.FLAGS} --xla_force_host_platform_device_count={devices}'}
      started.append((place, subprocess.Popen(
          [sys.executable, '-c', 'import sys; from pathlib import Path; from tests import meshes; '
           'meshes.train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])',
           str(place), mesh, str(given.steps), *given.names], cwd=ROOT, env=environment)))
    assert all(process.wait() == 0 for _, process in started)
    alone, divided = (json.loads((place / 'told.json').read_text()) for place, _ in started)
  wrong = 0
  for name in given.names:
    if isinstance(alone[name], str) or isinstance(divided[name], str):
      wrong += 1
      print(f'{name}: FAILS  {divided[name] if isinstance(divided[name], str) else alone[name]}')
      continue
    difference, where = apart(numbers(alone[name]), numbers(divided[name]))
    wrong += difference > TOLERANCE
    print(f'{name}: {difference:.1e} at {where}{"  DIFFERS" * (difference > TOLERANCE)}', flush=True)
  sys.exit(wrong > 0)


if __name__ == '__main__':
  main()
