"""Several real processes: they train what one does, resume each other's runs, and end together."""
from __future__ import annotations

import json
import re
import shutil
import signal
import time

import numpy as np
import pytest

import loopformer
from loopformer import convert
from loopformer.training import metrics, processes
from loopformer.types import ConfigError
from tests import cluster, parts, soak
from tests.experiments import test_cli

SMALL = ('--set', 'train.batch=8', '--set', 'train.steps=12', '--set', 'train.eval_every=6', '--set',
         'train.save_every=3', '--set', 'train.keep=9', '--set', 'optim.eps=1e-4',  # Adam is smooth in small gradients
         '--heartbeat=30')
EVAL = ('--mode=eval', '--depths=1,4', '--heartbeat=30')
# Other plans at every step, and for every microbatch.
DRAWN = '''from loopformer import objective, plans
  rolls = {name: objective.Rollout(plans.Partition(4)) for name in config.objective.rolls}
  return dataclasses.replace(config, task=task, objective=dataclasses.replace(config.objective, rolls=rolls))'''
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  """--config of one rollout, which is compiled sooner."""
  return test_cli.write_setting(tmp_path_factory.mktemp('text'), 'base_loop')


def train(workdir, count, devices, *arguments):
  statuses = cluster.wait(cluster.start(workdir, count, devices, *arguments))
  assert statuses == [0] * count, cluster.told(workdir)
  return workdir


def commands(workdir, count, devices, *each):
  """As `train`, of processes that run several commands."""
  statuses = cluster.wait(cluster.start(workdir, count, devices, json.dumps(each), module='tests.commands'))
  assert statuses == [0] * count, cluster.told(workdir)


def said(workdir, command: int, process: int = 0) -> str:
  """What one of several commands has printed."""
  return (workdir / f'said-{process}-{command}.txt').read_text()


@pytest.fixture(scope='module')
def alone(setting, tmp_path_factory):
  """One process with one device."""
  return train(tmp_path_factory.mktemp('alone'), 1, 1, setting, *SMALL)


@pytest.fixture(scope='module')
def two(setting, tmp_path_factory):
  """Two processes with two devices each, weights divided, which train and evaluate."""
  workdir = tmp_path_factory.mktemp('two')
  commands(workdir, 2, 2, ['experiments.main', setting, *SMALL, '--set', 'mesh.fsdp=2'],
           ['experiments.main', *EVAL, '--set', 'mesh.fsdp=2', '--set', 'mesh.tensor=2'])
  return workdir


def assert_close(workdir, other, tolerance=2e-4):
  """The same losses, evaluations and weights, to the order of sums."""
  for kind in ('train', 'eval'):
    ours, theirs = test_cli.rows(workdir, kind), test_cli.rows(other, kind)
    assert [row['step'] for row in ours] == [row['step'] for row in theirs]
    for mine, his in zip(ours, theirs):
      for name, value in his.items():
        if isinstance(value, float):
          assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (mine['step'], name)
  parts.close(loopformer.load(workdir)[1], loopformer.load(other)[1], tolerance)


def test_two_processes_train_what_one_does(alone, two):
  assert_close(two, alone)
  assert 'processes: 2; devices: 4' in said(two, 0)


def assert_silent(workdir, *count):
  """Process 1 has printed nothing in so many commands, besides what Gloo says of connections, and warnings."""
  for n in range(*count):
    assert [line for line in said(workdir, n, 1).splitlines() if not line.startswith('[Gloo]')] == []
  told = [line for line in cluster.told(workdir, 1).splitlines() if not line.startswith('[Gloo]')]
  assert not [line for line in told if re.search('step|loss|parameters|written', line)], told


def test_only_the_leader_writes(two):
  """Training, and evaluating."""
  assert_silent(two, 2)
  steps = [row['step'] for row in metrics.read_rows(two / 'metrics.jsonl') if row['kind'] == 'train']
  assert steps == list(range(1, 13))


def test_four_processes_with_accumulation_and_tensor(tmp_path):
  """Microbatches, which draw plans of their own, hold the same rows whoever reads them; layers are divided between
  processes, of which two read the same rows."""
  setting = test_cli.write_setting(tmp_path / 'text', 'base_loop')
  file = tmp_path / 'text/mine.py'
  file.write_text(file.read_text().replace('return dataclasses.replace(config, task=task)', DRAWN))
  options = (setting, *SMALL, '--set', 'train.accumulate=2', '--set', 'train.steps=4', '--set', 'train.save_every=4')
  one = train(tmp_path / 'one', 1, 1, *options)
  four = train(tmp_path / 'four', 4, 1, *options, '--set', 'mesh.tensor=2')
  assert_close(four, one)


def evaluated(workdir) -> dict[str, float]:
  """The losses that the command for evaluation has written."""
  return {f'loss@{row["schedule"]}': row['loss'] for row in json.loads((workdir / 'eval/depths.json').read_text())}


def test_weights_of_two_processes_are_evaluated_where_they_are(two):
  """Divided between processes (fsdp) and within them (tensor); what training logged of the same state is the measure.
  """
  logged = test_cli.rows(two, 'eval')[-1]
  assert evaluated(two) == pytest.approx({name: logged[name] for name in ('loss@1', 'loss@4')}, rel=1e-5)


def assert_ends(started, victim: int, workdir):
  """After a process has been killed the other ends, within the time-out and with a message, instead of a wait without
  end."""
  started[victim].kill()
  begin = time.time()
  assert started[1 - victim].wait(90) != 0
  assert time.time() - begin < 60
  text = cluster.told(workdir, 1 - victim).lower()
  assert 'peer' in text or 'heartbeat' in text or 'coordination service' in text or 'unavailable' in text, text
  cluster.wait(started)


def test_a_layer_divided_between_processes(alone, setting, tmp_path):
  """Trained, evaluated, saved, killed (process 1), resumed; then by commands of two processes evaluated, generated from
  and exported."""
  options = (setting, *SMALL, '--set', 'mesh.tensor=2', '--set', 'train.best=loss@4')
  started = cluster.start(tmp_path, 2, 1, *options)
  test_cli.wait_for_save(started[0], tmp_path)
  assert_ends(started, 1, tmp_path)
  reached = max(row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl'))
  assert 3 <= reached < 12
  prompts, out = ('one two', 'again'), tmp_path / 'export'
  asked = ('--mode=generate', *(f'--prompt={prompt}' for prompt in prompts), '--temperature=0', '--max_new_tokens=12')
  commands(tmp_path, 2, 1, ['experiments.main', *options], ['experiments.main', *EVAL],  # on the run's own mesh
           ['experiments.main', *asked, '--heartbeat=30'],
           ['experiments.tools.export', f'--out={out}', '--heartbeat=30'])
  assert re.search('resumed from step [369]', said(tmp_path, 0))
  assert_close(tmp_path, alone)
  logged = test_cli.rows(tmp_path, 'eval')[-1]
  assert evaluated(tmp_path) == pytest.approx({name: logged[name] for name in ('loss@1', 'loss@4')}, rel=1e-5)
  assert_silent(tmp_path, 4)
  text = [line for line in said(tmp_path, 2).splitlines() if not line.startswith('[Gloo]')]
  model, params, tokenizer, _ = loopformer.load(tmp_path)
  texts = loopformer.generate(model, params, tokenizer, list(prompts), max_new_tokens=12, temperature=0.0)
  assert text == ''.join(f'--- 4 loops\n{prompt}{text}\n' for prompt, text in zip(prompts, texts)).splitlines()
  parts.close(convert.from_pretrained(out)[1], params, 0)


def test_what_nobody_reads_is_not_fetched(monkeypatch):
  fetched = []
  monkeypatch.setattr(processes, 'fetch', lambda leaf: fetched.append(leaf) or leaf)
  tree = processes.Fetched({'inject': {'adapter': {'kernel': 1}}, 'core': {'kernel': 2}})
  assert tree['inject'].get('adapter', {})['kernel'] == 1 and 'core' in tree and tree.get('mix', {}) == {}
  assert fetched == [1]


def test_a_run_of_one_goes_on_as_two_and_as_one_again(alone, setting, tmp_path):
  """With other devices. SIGTERM to one of two: both finish the step, save, and end with 0."""
  workdir = shutil.copytree(alone, tmp_path / 'run')
  for step in (6, 9, 12):
    shutil.rmtree(workdir / f'checkpoints/{step}')
  metrics.writer(workdir, 3).close()  # nor are rows of later steps there
  started = cluster.start(workdir, 2, 2, setting, *SMALL, '--set', 'mesh.fsdp=4')
  test_cli.wait_for_step(started[0], workdir, 4)
  started[1].send_signal(signal.SIGTERM)
  assert cluster.wait(started, 60) == [0, 0], cluster.told(workdir)
  assert 'resumed from step 3' in cluster.told(workdir)
  stopped = max(row['step'] for row in metrics.read_rows(workdir / 'metrics.jsonl'))
  assert 4 <= stopped < 12
  assert f'stopped by a signal after step {stopped + 1}' in cluster.told(workdir) or (
      f'stopped by a signal after step {stopped}' in cluster.told(workdir))
  train(workdir, 1, 1, setting, *SMALL)
  assert 'resumed from step' in cluster.told(workdir)
  assert_close(workdir, alone)


def test_a_process_that_dies_ends_the_job(setting, tmp_path):
  """The leader; of the other it is told above."""
  started = cluster.start(tmp_path, 2, 1, setting, *SMALL, '--set', 'train.steps=100000')
  test_cli.wait_for_step(started[0], tmp_path, 2)
  assert_ends(started, 0, tmp_path)


def test_a_coordinator_that_cannot_be_reached(setting, tmp_path):
  status, _, err = test_cli.run(tmp_path, setting, '--coordinator=127.0.0.1:1', '--processes=2', '--process=1',
                                '--connect_timeout=3')
  assert status != 0
  assert '127.0.0.1:1' in err and 'connect_timeout' in err or 'DEADLINE_EXCEEDED' in err, err


@pytest.mark.parametrize('arguments, message', [
    (dict(coordinator='a:1'), '--processes is missing'), (dict(processes=2), '--coordinator is missing'),
    (dict(coordinator='a:1', processes=2, process=2), '--process=2: must be 0 to 1')], ids=str)
def test_half_an_address_is_refused(arguments, message):
  with pytest.raises(ConfigError, match=message):
    processes.connect(**arguments)


def test_kills_at_random_moments_change_nothing(two, setting, tmp_path):
  """The leader at a step, both when they start again; the long form is `python -m tests.soak --kills=20`."""
  arguments = (setting, *SMALL, '--set', 'mesh.fsdp=2')
  assert soak.soak(tmp_path, two, arguments, devices=2, kills=2, steps=12, seed=17, log=lambda *a, **k: None) > 0


def test_groups_of_readers():
  """Which rows a process reads, for two processes of two devices."""
  class Device:
    def __init__(self, process):
      self.process_index = process

  class Grid:
    def __init__(self, shape, tensor):
      self.devices = np.array([Device(i // 2) for i in range(4)]).reshape(shape)
      self.shape = {'tensor': tensor}

  import unittest.mock as mock
  with mock.patch('jax.process_count', lambda: 2), mock.patch('jax.local_device_count', lambda: 2):
    for shape, tensor, expected in (((4, 1, 1), 1, [(0, 2), (1, 2)]), ((1, 2, 2), 2, [(0, 2), (1, 2)]),
                                    ((1, 1, 4), 4, [(0, 1), (0, 1)])):
      for process in (0, 1):
        with mock.patch('jax.process_index', lambda: process):
          assert processes.readers(Grid(shape, tensor)) == expected[process]
