"""Runs in work folders: two in one, interrupts, disks that are full, and runs that are to go on."""
from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.tools import command
from loopformer import config as configs, storage
from loopformer.optim import WSD, AdamW, Muon, WarmupCosine
from loopformer.training import checkpoint, lock, metrics, processes, resume, train as training
from loopformer.training.checkpoint import Checkpoints
from loopformer.training.control import Plateau
from loopformer.types import ConfigError
from tests.experiments import test_cli
from tests.training import test_checkpoint, test_train

# Two runs in one folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
  """Locks that expire within a moment."""
  for name, value in (('BEAT', 0.02), ('PATIENCE', 0.6), ('POLL', 0.02), ('SETTLE', 0.05)):
    monkeypatch.setattr(lock, name, value)


@pytest.fixture(scope='module')
def gone():
  """(process that has ended, one that has ended and that nobody has asked for its status)."""
  ended = subprocess.Popen(['true'])
  ended.wait()
  with subprocess.Popen(['true']) as zombie:
    while lock._process(zombie.pid)[0] not in 'Z':
      time.sleep(0.01)
    yield ended.pid, zombie.pid


def record(workdir, **changes) -> str:
  """The text of a lock of this process, with changes."""
  here = lock._here(workdir)
  return json.dumps({**here, 'process': os.getpid(), 'started': lock._process(os.getpid())[1], 'since': 'yesterday',
                     'token': 'theirs', **changes})


def quiet(_):
  pass


# What is another's in the lock, how long ago it gave a sign of life, whether it gives others; what becomes of it.
OWNERS = [
    ('the same command twice', {}, 0, False, 'refused'),
    ('a process that stands still', {}, 9999, False, 'refused'),  # Ctrl-Z, a laptop that slept
    ('kill -9', dict(process='ended'), 0, False, 'taken'),
    ('kill -9, and nobody has waited', dict(process='zombie'), 0, False, 'taken'),  # containers without an init
    ('its number is another process by now', dict(started='1'), 0, False, 'taken'),  # after weeks
    ('a number that no process has', dict(process=2 ** 40), 0, False, 'taken'),
    ('a copy of the folder of a run that lives', dict(folder=1), 0, False, 'taken'),  # cp -r
    ('another machine, alive', dict(host='other'), 0, True, 'refused'),
    ('another machine, alive, whose clock is an hour late', dict(host='other'), 9999, True, 'refused or taken'),
    ('another machine, dead for hours', dict(host='other'), 9999, False, 'taken'),
    ('another machine, dead just now', dict(host='other'), 0, False, 'waited'),  # a job that is queued again
    ('a container of the same name', dict(system='x pid:[1]'), 0, False, 'waited'),
    ('this machine before it was booted', dict(system='old pid:[1]'), 9999, False, 'taken'),
    ('written by nobody', '', 0, False, 'waited'), ('cut short', '{"host": "a', 9999, False, 'taken'),
    ('no record', '[1]', 9999, False, 'taken'), ('no process', dict(process='x'), 9999, False, 'taken'),
    ('all processes', dict(process=-1), 9999, False, 'taken'), ('null', 'null', 9999, False, 'taken')]


@pytest.mark.parametrize('name, changes, ago, beats, becomes', OWNERS, ids=[row[0] for row in OWNERS])
def test_a_lock_is_its_owners_while_that_lives(name, changes, ago, beats, becomes, tmp_path, quick, gone):
  file, told = tmp_path / lock.FILE, []
  if isinstance(changes, dict):
    named = {'ended': gone[0], 'zombie': gone[1]}
    process = named.get(changes.get('process'), changes.get('process', os.getpid()))
    started = lock._process(process)[1] if isinstance(process, int) else None
    changes = record(tmp_path, **{'started': started, **changes, 'process': process})
  file.write_text(changes)
  os.utime(file, (time.time() - ago,) * 2)
  stop = threading.Event()
  owner = threading.Thread(target=lambda: [os.utime(file) for _ in iter(lambda: stop.wait(0.1), True)])
  if beats:
    owner.start()
    time.sleep(0.2 if ago else 0)
  try:
    if becomes.startswith('refused'):
      with pytest.raises(ConfigError, match=rf'another run is training there \(process {os.getpid()} on \S+, since '
                                            'yesterday.*stop it, or give another --workdir'):
        with lock.Lock(tmp_path, told.append):
          pass
      assert file.read_text() == changes
    else:
      with lock.Lock(tmp_path, told.append) as held:
        assert bool(told) == (becomes == 'waited')
        held.check()
        assert json.loads(file.read_text())['process'] == os.getpid()
      assert not file.exists()
  finally:
    stop.set()
    if beats:
      owner.join()


def test_a_lock_is_let_go_of_whatever_happens(tmp_path, quick):
  for error in (ValueError, KeyboardInterrupt, SystemExit):
    with pytest.raises(error), lock.Lock(tmp_path / 'new/run', quiet):
      assert (tmp_path / 'new/run' / lock.FILE).exists()
      raise error
    assert [path.name for path in (tmp_path / 'new/run').iterdir()] == []


@pytest.mark.parametrize('before', [None, dict(host='other'), dict(process=2 ** 40)], ids=str)
def test_of_several_that_come_at_once_one_has_it(before, tmp_path, quick, monkeypatch):
  """A folder without a lock, and one whose owner has died, which all see before one of them takes it."""
  wait = lock.Lock._wait
  monkeypatch.setattr(lock.Lock, '_wait', lambda self, found: wait(self, found) or time.sleep(0.03))
  if before is not None:
    (tmp_path / lock.FILE).write_text(record(tmp_path, **before))
    os.utime(tmp_path / lock.FILE, (1, 1))
  start, over, had, refused = threading.Barrier(6), threading.Event(), [], []

  def run():
    start.wait()
    try:
      with lock.Lock(tmp_path, quiet) as held:
        had.append(held)
        over.wait(30)
    except ConfigError:
      refused.append(True)

  threads = [threading.Thread(target=run) for _ in range(6)]
  for thread in threads:
    thread.start()
  until = time.monotonic() + 30
  while len(had) + len(refused) < 6 and time.monotonic() < until:  # however slow the machine is
    time.sleep(0.01)
  over.set()
  for thread in threads:
    thread.join()
  assert len(had) == 1


def test_signs_of_life(tmp_path, quick):
  """They go on while the run does; a lock that was deleted by hand comes back; one that was taken ends the run."""
  file = tmp_path / lock.FILE

  with lock.Lock(tmp_path, quiet) as held:
    first, own = storage.written(file), file.read_text()
    wait_for(lambda: storage.written(file) > first)
    file.unlink()
    wait_for(lambda: file.exists() and file.read_text() == own)
    held.check()
    storage.write(file, record(tmp_path, host='thief'))
    wait_for(lambda: held._lost)
    with pytest.raises(OSError, match='another run has taken the folder over .*on thief.*writes nothing more'):
      held.check()
  assert 'thief' in file.read_text()  # which is not ours to remove


def test_others_hear_of_what_the_leader_may_not(monkeypatch):
  def refused():
    raise ConfigError('held')

  assert processes.by_leader(lambda: 3) == 3
  with pytest.raises(ConfigError, match='held'):
    processes.by_leader(refused)
  monkeypatch.setattr(processes, 'is_leader', lambda: False)
  monkeypatch.setattr(processes, 'all_agree', lambda mine: False)  # the leader's verdict
  with pytest.raises(ConfigError, match='process 0 says why'):
    processes.by_leader(refused)


# Runs without a model: steps that are quick to compile ----------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
  """Steps of the run's own optimiser and data, of a few parameters with made-up gradients; nothing is evaluated.
  Returns a list, the functions of which are called with the numbers of steps before these."""
  before = []

  def init_state(model, optimizer, seed):
    params = {'cell': {'w': jax.random.normal(jax.random.key(seed), (3,))}}
    return training.State(step=jnp.int32(0), params=params, optimizer=optimizer.init(params))

  def make_step(model, objective, optimizer, *_):
    @jax.jit
    def update(state, batch):
      grads = jax.tree.map(lambda leaf: leaf / 8 + batch['tokens'].mean() / 64, state.params)
      updates, inner = optimizer.update(grads, state.optimizer, state.params)
      zeros = {name: jnp.float32(0) for name in ('loss', 'lm', 'grad_norm')}
      return (state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates), optimizer=inner),
              {**zeros, 'stop': batch['stop'].max()})

    def step(state, batch, stage=0, frozen={}):
      for call in before:
        call(int(state.step) + 1)
      return update(state, batch)

    return step

  monkeypatch.setattr(training, 'init_state', init_state)
  monkeypatch.setattr(training, 'make_step', make_step)
  monkeypatch.setattr(training, 'evaluate', lambda *_: [{'budget': 1, 'schedule': '1', 'loss': 0.0}])
  monkeypatch.setattr(training, 'motion', lambda *_: {})
  return before


def setting(schedule=None, **changes):
  """A run of six steps; `schedule` in place of its cosine."""
  config = test_train.setting(**{'save_every': 2, 'keep': 9, **changes})
  return config if schedule is None else dataclasses.replace(config, optim=AdamW(schedule=schedule))


def wait_for(what):
  """Blocks until `what` is true, for ten seconds at most."""
  end = time.monotonic() + 10
  while not what() and time.monotonic() < end:
    time.sleep(0.01)
  assert what()


def same(state, other):
  jax.tree.map(np.testing.assert_array_equal, (state.params, state.optimizer, state.step),
               (other.params, other.optimizer, other.step))


def test_the_function_has_the_lock_too(tmp_path, stub):
  """While it trains, and not after; what was saved can be read meanwhile. config.json is written where none was."""
  seen = []

  def look(number):
    seen.append((tmp_path / lock.FILE).exists())
    if number == 4:
      with pytest.raises(ConfigError, match='another run is training there'):
        training.train(setting(), tmp_path, quiet)
      wait_for(lambda: checkpoint.trained(tmp_path) == 2)
      assert configs.read(tmp_path) == setting()

  stub.append(look)
  test_train.run(setting(), tmp_path)
  assert seen == [True] * 6 and not (tmp_path / lock.FILE).exists()


def test_a_run_whose_folder_was_taken_saves_no_more(tmp_path, stub, quick):
  def thief(number):
    if number == 4:
      storage.write(tmp_path / lock.FILE, record(tmp_path, host='thief'))
      time.sleep(0.3)

  stub.append(thief)
  with pytest.raises(OSError, match='another run has taken the folder over.*; the last good checkpoint is step 2'):
    test_train.run(setting(), tmp_path)
  assert checkpoint.trained(tmp_path) == 2


# Interrupts ----------------------------------------------------------------------------------------------------------

INT, TERM = signal.SIGINT, signal.SIGTERM
SIGNALS = [  # those that come while a step is computed; how the run ends, and what it has saved
    ('Ctrl-C while the first step is compiled', {1: [INT]}, 'before the first step; nothing was saved yet', None),
    ('Ctrl-C', {3: [INT]}, 0, 3), ('a scheduler', {3: [TERM]}, 0, 3), ('twice TERM', {3: [TERM, TERM]}, 0, 3),
    ('a scheduler at the first step', {1: [TERM]}, 0, 1),
    ('Ctrl-C twice', {4: [INT, INT]}, r'after step 3; the last good checkpoint is step 2, where the same', 2),
    ('TERM, and then Ctrl-C twice', {4: [TERM, INT, INT]}, 'after step 3; the last good checkpoint is step 2', 2),
    ('in the last step', {6: [INT]}, None, 6)]


@pytest.mark.parametrize('name, signals, ends, saved', SIGNALS, ids=[row[0] for row in SIGNALS])
def test_signals(name, signals, ends, saved, tmp_path, stub):
  handlers = [signal.getsignal(number) for number in (INT, TERM)]
  stub.append(lambda number: number == 4 and wait_for(lambda: checkpoint.trained(tmp_path) == 2))
  stub.append(lambda number: [signal.raise_signal(given) for given in signals.get(number, ())])
  if ends is None:
    test_train.run(setting(), tmp_path)
  elif ends == 0:
    with pytest.raises(SystemExit) as ended:
      test_train.run(setting(), tmp_path)
    assert ended.value.code == 0
  else:
    with pytest.raises(KeyboardInterrupt, match=ends):
      test_train.run(setting(), tmp_path)
  assert checkpoint.trained(tmp_path) == saved and not (tmp_path / lock.FILE).exists()
  assert [signal.getsignal(number) for number in (INT, TERM)] == handlers


# A command that says where it is, and stays there.
COMMAND = '''
from loopformer.training import interrupts
interrupts.watch()
interrupts.GRACE = 0.3
import hashlib, sys, threading, time
from absl import app
where = sys.argv.pop()

def stay():
  print('here', flush=True)
  if 'compiler' in where:  # from which the main thread comes back when it is done
    hashlib.pbkdf2_hmac('sha256', b'', b'', 10 ** 8)
  time.sleep(30)

def main(argv):
  interrupts.unwind(lambda: 'before the first step')
  if where == 'fails':
    threading.Thread(target=lambda: [time.sleep(0.5), print('a trace', file=sys.stderr)]).start()
    sys.exit('error: the disk is full')
  if 'training' in where:
    with interrupts.Caught(lambda: 'after step 3') as caught:
      caught.stepping = True
      if 'compiler' in where:
        stay()
      print('here', flush=True)
      caught.told.wait(30)
      print('told', flush=True)
      time.sleep(2 if where == 'training, once' else 30)
      return
  try:
    stay()
  finally:
    if where == 'cleaning':
      stay()

if where == 'imports':
  stay()
interrupts.run(lambda: app.run(main))
'''
FIRST = 'interrupted: the step is finished and saved; Ctrl-C again ends at once'
ENDS = [('imports', 1, 130, ['interrupted before anything was begun']),
        ('files', 1, 130, ['interrupted before the first step']),
        ('compiler', 1, 130, ['interrupted before the first step']),
        ('cleaning', 1, 130, ['interrupted before the first step']),
        ('training, once', 1, 0, [FIRST]), ('training, twice', 2, 130, [FIRST, 'interrupted after step 3']),
        ('training, compiler', 2, 130, [FIRST, 'interrupted after step 3']),
        ('fails', 0, 1, ['error: the disk is full'])]


@pytest.fixture(scope='module')
def commands():
  """Those of ENDS, started together."""
  started = {where: subprocess.Popen([sys.executable, '-c', COMMAND, where], cwd=test_cli.ROOT, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE) for where, *_ in ENDS}
  yield started
  for process in started.values():
    process.kill()
    process.communicate()


@pytest.mark.parametrize('where, times, status, lines', ENDS, ids=[row[0] for row in ENDS])
def test_a_command_ends_with_one_line(where, times, status, lines, commands):
  process, begun = commands[where], time.monotonic()
  for number in range(times):
    if number == 0:
      assert process.stdout.readline() == 'here\n'
    elif where == 'training, twice':
      assert process.stdout.readline() == 'told\n' and process.stderr.readline() == FIRST + '\n'
    else:
      assert process.stderr.readline() == FIRST + '\n'
    process.send_signal(INT)
  _, err = process.communicate(timeout=25)
  assert process.returncode == status
  assert err.splitlines() == (lines[-1:] if times == 2 else lines)  # the first was read above
  assert time.monotonic() - begun < 20


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='tells by /proc when a process listens')
@pytest.mark.parametrize('module', ['experiments.main', 'experiments.compare', 'experiments.studies.ouro_stages',
                                    'experiments.benchmark', 'experiments.tools.export'])
def test_every_command_hears_while_it_imports(module):
  process = subprocess.Popen([sys.executable, '-m', module], cwd=test_cli.ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
  while len(list(Path(f'/proc/{process.pid}/task').iterdir())) < 2:
    time.sleep(0.01)
  process.send_signal(INT)
  assert process.communicate(timeout=60) == ('', 'interrupted before anything was begun\n')
  assert process.returncode == 130


def test_a_study_ends_with_one_line_where_its_input_cannot_be_used(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'experiments.studies.loopus_stages', f'--workdir={tmp_path / "runs"}',
                         f'--out={tmp_path / "out"}', '--budgets=1,two'],
                        cwd=test_cli.ROOT, capture_output=True, text=True)
  assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith('error: --budgets=1,two: give whole numbers')
  assert 'Traceback' not in done.stderr


def test_a_run_that_fails_in_a_study_is_told_by_its_last_line(tmp_path):
  with pytest.raises(SystemExit,
                     match=f'error: the run of loopformer:none in {tmp_path} ended with status 1, and log.txt '
                           "with: error: config argument size = 'none'"):
    command.train('loopformer:none', tmp_path)


@pytest.mark.slow
def test_a_run_is_refused_killed_resumed_and_interrupted(tmp_path):
  """The real command: what the lock says of a run that lives, and that a killed one is nobody's at once."""
  option = (test_cli.write_setting(tmp_path / 'text', 'base_loop'), '--set', 'train.steps=100000', '--set',
            'train.keep=1')
  workdir = tmp_path / 'run'

  def start():
    return subprocess.Popen(test_cli.command(workdir, *option), cwd=test_cli.ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=test_cli.environment())

  first = start()
  test_cli.wait_for_save(first, workdir)
  status, _, err = test_cli.run(workdir, *option)
  assert status == 1 and err.splitlines()[-1].startswith(
      f'error: workdir = {workdir}: another run is training there (process {first.pid} on {socket.gethostname()}, ')
  first.kill()
  second = start()
  while 'tok/s' not in (line := second.stdout.readline()):
    assert line, second.communicate()
  first.communicate()
  second.send_signal(INT)
  while second.stderr.readline() != FIRST + '\n':  # Orbax tells of a save that was cut short before
    pass
  second.send_signal(INT)
  out, err = second.communicate(timeout=60)
  if second.returncode == 130:
    assert re.fullmatch(r'interrupted after step \d+; .*, (where|so) the same command (resumes|begins again)\n', err)
  else:  # it was faster
    assert second.returncode == 0 and 'stopped by a signal' in out
  assert checkpoint.trained(workdir) is not None


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('error, told', [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore\nlines'),
     '(RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.)'),
    (jax.errors.JaxRuntimeError('INTERNAL: Error dispatching computation: Out of memory allocating 7 bytes.'),
     '(INTERNAL: '),
    (MemoryError(), '(no more to be had)')])
def test_too_large_a_model_or_batch(error, told, tmp_path, monkeypatch):
  """A million layers, or a batch for a larger machine: one line that says what helps."""
  from experiments import main
  monkeypatch.setattr(main, 'train', mock.Mock(side_effect=error))
  status, _, err = test_cli.run_here(tmp_path, '--config=loopformer:tiny')
  last = err.splitlines()[-1]
  assert status == 1 and last.startswith(f'error: out of memory {told}') and '--mode=plan' in last


# Disks ---------------------------------------------------------------------------------------------------------------

FULL = [  # what is raised where a checkpoint is written; what is said of it
    (OSError(errno.ENOSPC, 'No space left on device'), r'\(No space left on device; make room there\)'),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), r'\(Disk quota exceeded; make room in your quota\)'),
    (PermissionError(errno.EACCES, 'Permission denied', 'x'), r'\(Permission denied; see to its permissions\)'),
    (OSError(errno.EROFS, 'Read-only file system'), r'\(Read-only file system; it is mounted read-only\)'),
    (ValueError("RESOURCE_EXHAUSTED: Error writing: No space left [os_error_code='28']\nmore\nlines"),  # TensorStore's
     r'\(No space left on device; make room there\)'),
    (RuntimeError('PERMISSION_DENIED: HTTP 403\nmore'), r'\(PERMISSION_DENIED: HTTP 403\)'),
    (RuntimeError(), r'\(RuntimeError\)')]


@pytest.mark.parametrize('error, told', FULL, ids=[f'{row[0]!r:.40}' for row in FULL])
def test_a_checkpoint_that_cannot_be_written(error, told, tmp_path, monkeypatch):
  """One line, with the last good one, where the run goes on."""
  import orbax.checkpoint as ocp

  def failing(*_, **__):
    raise error

  with pytest.raises(OSError, match=rf'^{tmp_path}/checkpoints: a checkpoint cannot be written {told}; the last good '
                                    'checkpoint is step 2, where the same command resumes$'):
    with Checkpoints(tmp_path) as checkpoints:
      for step in (2, 4):
        checkpoints.save(step, test_checkpoint.small(step), None, {}, {})
      wait_for(lambda: checkpoint.trained(tmp_path) == 4)
      (tmp_path / 'checkpoints/4').rename(tmp_path / 'checkpoints/4.orbax-checkpoint-tmp')  # it was this that failed
      monkeypatch.setattr(ocp.CheckpointManager, 'save', failing)
      checkpoints.save(6, test_checkpoint.small(6), None, {}, {})


@pytest.mark.parametrize('what', ['metrics', 'tensorboard', 'a file', 'data'])
def test_what_is_on_a_full_disk_is_named(what, tmp_path, monkeypatch, stub):
  """/dev/full answers every write as a full disk does."""
  if not Path('/dev/full').exists():
    pytest.skip('a system without /dev/full')
  full = tmp_path / 'metrics.jsonl'
  full.symlink_to('/dev/full')
  match = 'metrics.jsonl: cannot be written (No space left on device; make room there)'
  if what == 'metrics':
    def write():
      metrics.Lines(full).add('{}\n')
  elif what == 'tensorboard':
    writers = pytest.importorskip('tensorboardX.record_writer')
    monkeypatch.setattr(writers, 'open_file', lambda path: open('/dev/full', 'wb'))
    match = 'tensorboard: cannot be written (No space'

    def write():
      board = metrics._Board(tmp_path / 'tensorboard', 0)
      board.add_scalar('train/loss', 1.0, 1)
  elif what == 'a file':
    monkeypatch.setattr(Path, 'write_bytes', lambda self, data: os.write(os.open('/dev/full', os.O_WRONLY), data))

    def write():
      storage.write(full, 'x')
  else:
    match = 'run: cannot be written (No space'
    monkeypatch.setattr(type(test_train.CONFIG.task), 'prepare',
                        lambda *_: os.write(os.open('/dev/full', os.O_WRONLY), b'x'))

    def write():
      test_train.run(setting(), tmp_path / 'run')
  with pytest.raises(OSError) as found:
    write()
  assert match in str(found.value)


@pytest.mark.parametrize('logger, file, trace, kept', [
    ('absl', 'orbax/future.py', True, False), ('absl', 'orbax/future.py', False, True),
    ('absl', 'x/mine.py', True, True),
    ('asyncio', 'asyncio/base_events.py', True, False), ('asyncio', 'asyncio/base_events.py', False, True)])
def test_traces_of_other_libraries_are_kept_back_while_checkpoints_are_written(logger, file, trace, kept):
  logger = logging.getLogger(logger)
  trace = trace and (OSError, OSError(), None)
  record_ = logger.makeRecord(logger.name, logging.ERROR, f'/lib/{file}', 1, 'said', (), trace)
  with checkpoint._quiet():
    assert bool(logger.filter(record_)) == kept
  assert logger.filter(record_)


def test_loops_that_are_closed_are_not_told_of(monkeypatch):
  """TensorStore answers into them after a save has failed."""
  others = []
  monkeypatch.setattr(sys, 'unraisablehook', others.append)
  with checkpoint._quiet():
    for word in ('Event loop is closed', 'another'):
      sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(word)))
  assert [str(other.exc_value) for other in others] == ['another']
  sys.unraisablehook('as before')
  assert others[1:] == ['as before']


# Runs that go on -----------------------------------------------------------------------------------------------------

FLAT, DECAY = WSD(peak=1e-2, warmup=1), WSD(peak=1e-2, warmup=1, cooldown=3)
COSINE = WarmupCosine(peak=1e-2, end=1e-3, warmup=1)
GO_ON = [  # schedule, steps of the run, its last checkpoint, what is asked for; None or what is said
    (FLAT, 6, 6, dict(steps=9), None), (FLAT, 6, 2, dict(steps=9), None), (FLAT, 6, 6, dict(steps=6), None),
    (FLAT, 6, 4, dict(steps=4), None), (FLAT, 6, 4, dict(steps=5), None),
    (FLAT, 6, 4, dict(steps=3), 'step 4 is saved already; give train.steps=4 or more'),
    (WSD(peak=1e-2, warmup=0.5), 6, 6, dict(steps=9), 'optim.schedule goes by the number.*train.extended=6; or'),
    (WSD(peak=1e-2, warmup=0.5), 6, 0, dict(steps=9), None),  # no step was trained, as Loaded.save leaves it
    (DECAY, 6, 4, dict(steps=9), None), (DECAY, 6, 3, dict(steps=9), None),  # before the rate has changed
    (DECAY, 6, 5, dict(steps=9), 'optim.schedule goes by'), (DECAY, 9, 4, dict(steps=7), None),
    (DECAY, 9, 6, dict(steps=7), 'those of a longer run; keep train.steps=9, or begin anew.*train.start='),
    (COSINE, 6, 6, dict(steps=9), 'To go on after step 6 as a run of 9 .*train.extended=6; or begin.*train.start='),
    (COSINE, 6, 6, dict(steps=9, extended=6), None), (COSINE, 6, 4, dict(steps=9, extended=(6,)), None),
    (COSINE, 6, 6, dict(steps=9, extended=4), 'Give --set train.extended=6, the numbers'),
    (COSINE, 6, 6, dict(steps=4), 'step 6 is saved already'),
    (WarmupCosine(peak=1e-2, end=1e-2, warmup=1), 6, 6, dict(steps=9), None),  # no cosine at all
    (FLAT, 6, 6, dict(steps=9, seed=1), 'train.seed is 0 there, 1 here. Give another --workdir, or'),
    (COSINE, 6, 6, dict(log_every=3, eval_every=5, save_every=1, keep=1, eval_batches=2), None),
    (COSINE, 6, 6, dict(batch=8), 'train.batch is 4 there, 8 here'),
    (COSINE, 6, None, dict(batch=8, steps=9), None)]  # a mistake that was found before anything was saved


@pytest.mark.parametrize('schedule, steps, done, changes, told', GO_ON, ids=range(len(GO_ON)))
def test_what_may_change_when_a_run_goes_on(schedule, steps, done, changes, told, tmp_path):
  saved = setting(schedule, steps=steps)
  configs.save(saved, tmp_path)
  if done is not None:
    (tmp_path / f'checkpoints/{done}').mkdir(parents=True)
  config = dataclasses.replace(saved, train=dataclasses.replace(saved.train, **changes))
  if told is None:
    resume.check(config, tmp_path)
  else:
    with pytest.raises(ConfigError, match=told):
      resume.check(config, tmp_path)


def test_a_task_may_change_until_something_is_prepared_for_it(tmp_path):
  """A file of data that was mistyped is corrected in the same folder."""
  saved = setting()
  configs.save(saved, tmp_path)
  for name in ('lock.json', 'log.txt', 'mine_0123abcd.py'):
    (tmp_path / name).write_text('')
  config = configs.override(saved, 'task.held_out=33')
  resume.check(config, tmp_path)
  (tmp_path / 'data').mkdir()
  with pytest.raises(ConfigError, match='task.held_out is .* there, 33 here'):
    resume.check(config, tmp_path)
  with pytest.raises(ConfigError, match=r' here, and \d+ more\. Give another') as error:
    resume.check(configs.load('relay:cpu'), tmp_path)
  assert str(error.value).count(' there, ') == 8


@pytest.mark.parametrize('changes, where', [
    (dict(optim=Muon(schedule=FLAT, others=AdamW(schedule=FLAT))), 'optim.decay'),  # its weight decay has its own
    (dict(optim=Muon(schedule=FLAT, decay=FLAT, others=AdamW(schedule=COSINE))), 'optim.others.schedule'),
    (dict(optim=Muon(schedule=FLAT, decay=FLAT, others=AdamW(schedule=FLAT))), None),
    (dict(optim=AdamW(schedule=FLAT), control=Plateau(loops=(1,))), 'control')],
                         ids=['decay', 'others', 'none', 'control'])
def test_all_that_goes_by_the_number_of_steps_is_found(changes, where):
  saved = dataclasses.replace(setting(eval_every=4), **changes)
  assert resume.unlike(saved, dataclasses.replace(saved, train=dataclasses.replace(saved.train, steps=9)), 6) == where


def test_a_constant_run_goes_on_as_if_it_had_been_longer(tmp_path, stub):
  """Bit for bit, its data too; config.json says what it is now."""
  whole = test_train.run(setting(FLAT, steps=9), tmp_path / 'whole')
  test_train.run(setting(FLAT), tmp_path / 'run')
  same(test_train.run(setting(FLAT, steps=9), tmp_path / 'run'), whole)
  assert configs.read(tmp_path / 'run') == configs.read(tmp_path / 'whole') == setting(FLAT, steps=9)


def test_an_extended_run_is_what_its_configuration_says(tmp_path, stub):
  """Run from the start with its config.json it is the same, also where it was stopped in between; and its first part is
  the run that it was."""
  longer = setting(steps=9, extended=6)
  short = test_train.run(setting(), tmp_path / 'run')
  end = test_train.run(longer, tmp_path / 'run')
  assert configs.read(tmp_path / 'run') == longer and longer.train.extended == (6,)
  same(test_train.run(longer, tmp_path / 'again'), end)
  assert checkpoint.trained(tmp_path / 'again') == 9
  for step in (6, 8, 9):
    shutil.rmtree(tmp_path / f'again/checkpoints/{step}')
  same(test_train.run(longer, tmp_path / 'again'), end)  # steps 5 and 6 as those of a run of six
  with Checkpoints(tmp_path / 'again') as checkpoints:
    shardings = jax.tree.map(lambda leaf: leaf.sharding, short.params)
    first = checkpoints.restore_params(6, checkpoint.abstract(short.params, shardings))[1]
  jax.tree.map(np.testing.assert_array_equal, first, short.params)
  plain = test_train.run(setting(steps=9), tmp_path / 'plain')
  assert any((a != b).any() for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(end.params)))


@pytest.mark.parametrize('given, told', [(6, r'\(6,\): .*below train.steps = 6'), ((3, 2), 'ascending'),
                                         ((2, 2), 'ascending'), (0, '1 or more'), (-1, '1 or more'),
                                         (True, '1 or more'), ((2.5,), 'a whole number')])
def test_numbers_of_steps_before(given, told):
  with pytest.raises(ConfigError, match=rf'train.extended = .*{told}'):
    training.Train(steps=6, extended=given)
  config = setting()
  for text in ('4', '4,', '(4,)', '[4]'):
    assert configs.override(config, f'train.extended={text}').train.extended == (4,)
