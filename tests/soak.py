"""Kills a run of two processes at random moments until it is done, and compares it with one that was left alone.

    python -m tests.soak --kills=20

Every kill is a SIGKILL, or one time in four a SIGTERM, to both processes or to one (the other must then end by itself).
Weights must come out equal to the last bit. Prints a line a kill, and exits with 1 where they are not equal.
"""
from __future__ import annotations

import math
from pathlib import Path
import random
import signal
import sys
import tempfile
import time

from absl import app, flags, logging

import loopformer
from loopformer.training import metrics
from tests import cluster
from tests.experiments import test_cli


def setting(folder: Path, steps: int) -> list[str]:
  """Arguments of a small run on text that is written to `folder`."""
  return [test_cli.write_setting(folder), '--set', f'train.steps={steps}', '--set', 'train.batch=8', '--set',
          'train.save_every=5', '--set', f'train.eval_every={steps}', '--set', 'train.log_every=1', '--heartbeat=30',
          '--connect_timeout=100']


def reached(workdir: Path) -> int:
  """The last step that was logged."""
  return max((row['step'] for row in metrics.read_rows(workdir / 'metrics.jsonl')), default=0)


def soak(folder: Path, alone: Path, arguments: list[str], devices: int, kills: int, steps: int, seed: int, log=print
         ) -> int:
  """Runs what `alone` did, of two processes with so many devices, to `folder`, and kills it; returns the number of
  kills.

  Raises AssertionError where the runs differ, or nothing got killed.
  """
  rng, killed, workdir = random.Random(seed), 0, folder
  while True:
    started = cluster.start(workdir, 2, devices, *arguments)
    # A third of the kills come at some moment of the start-up, the others some steps later, between saves and in them.
    begin, before = time.time(), reached(workdir)
    early, step = rng.random() < 1 / 3, before + rng.randint(1, max(2, steps // kills))
    moment = rng.uniform(0, 14) if early else math.inf
    while killed < kills and time.time() - begin < moment and started[0].poll() is None and (
        early or reached(workdir) < step):
      time.sleep(0.01)
    now = time.time() - begin
    if killed < kills and started[0].poll() is None:
      number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
      chosen = rng.choice([started, started[:1], started[1:]])
      for process in chosen:
        process.send_signal(number)
      killed += 1
      statuses = cluster.wait(started, 200)
      log(f'kill {killed}: {number.name} to {len(chosen)} of 2 after {now:.1f} s, steps {before} to '
          f'{reached(workdir)}, statuses {statuses}', flush=True)
      continue
    statuses = cluster.wait(started)
    assert statuses == [0, 0], cluster.told(workdir)
    if reached(workdir) == steps:
      break
  assert killed, 'the run was over before it could be killed'
  import chex
  chex.assert_trees_all_equal(loopformer.load(workdir, trust=True)[1], loopformer.load(alone, trust=True)[1])
  return killed


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)
  wanted, steps = flags.FLAGS.kills, flags.FLAGS.steps
  with tempfile.TemporaryDirectory() as folder:
    start = time.time()
    arguments, alone = setting(Path(folder, 'text'), steps), Path(folder, 'alone')
    assert cluster.wait(cluster.start(alone, 2, 1, *arguments)) == [0, 0], cluster.told(alone)
    killed = soak(Path(folder, 'killed'), alone, arguments, 1, wanted, steps, flags.FLAGS.seed)
    print(f'{killed} kills, {steps} steps, {time.time() - start:.0f} s: weights equal to the last bit')
    if killed < wanted:
      sys.exit(f'error: the run was done after {killed} kills; raise --steps')


if __name__ == '__main__':
  flags.DEFINE_integer('kills', 20, 'At least so many.')
  flags.DEFINE_integer('seed', 0, 'Of the moments.')
  flags.DEFINE_integer('steps', 400, 'Steps of the run.')
  app.run(main)
