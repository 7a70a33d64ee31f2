"""Work folders, corpora, imports and exports in buckets, on real servers of this machine with the real clients."""
from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
import time
import types
from unittest import mock

import jax
import numpy as np
import pytest

from experiments import main
from experiments.tools import machines
import loopformer
from loopformer import config as configs, convert, storage
from loopformer.data import prepared
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import GivenPieces, TrainedPieces
from loopformer.tasks.text import Text
from loopformer.training import lock, metrics, train
from loopformer.training.checkpoint import Checkpoints
from loopformer.types import ConfigError
from tests import buckets, cluster
from tests.experiments import test_cli
from tests.training import test_checkpoint


@pytest.fixture(scope='module', params=sorted(buckets.NEEDED))
def bucket(request):
  """The address of an empty bucket, which this process and those that it starts can use."""
  missing = buckets.missing(request.param)
  if missing:
    pytest.skip(f'{", ".join(missing)} are not installed (the extra `dev`)')
  with buckets.server(request.param) as environment, mock.patch.dict(os.environ, environment):
    yield f'{request.param}://{buckets.BUCKET}'


@pytest.fixture(autouse=True)
def no_folder_of_a_bucket(tmp_path, monkeypatch):
  """No test leaves a folder that is named like a bucket, here or where processes are started."""
  monkeypatch.chdir(tmp_path)
  yield
  for scheme in storage.CLIENTS:
    assert not Path(f'{scheme}:').exists() and not (test_cli.ROOT / f'{scheme}:').exists()


def quiet(_):
  pass


def upload_texts(folder) -> Path:
  """A corpus of generated text in a bucket."""
  local = Path('texts')
  test_cli.write_setting(local, 'base_loop')
  for file in local.glob('*.txt'):
    storage.write(storage.path(folder) / file.name, file.read_bytes())
  return local


# Without a server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, told', [
    ('ftp://host/x', 'no file system ftp://.*gs://, s3://'), ('gs://', 'names no bucket; give gs://BUCKET/FOLDER')])
def test_paths_that_cannot_be_served(name, told):
  with pytest.raises(ConfigError, match=told):
    storage.path(name)


@pytest.mark.parametrize('scheme, module', [('gs', 'gcsfs'), ('s3', 's3fs')])
def test_a_client_that_is_missing_is_named_with_its_extra(monkeypatch, scheme, module):
  there = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == module else there(name))
  extra = 'gcs' if scheme == 'gs' else scheme
  with pytest.raises(ConfigError, match=rf"{scheme}:// needs {module}; pip install 'loopformer\[{extra}\]'"):
    storage.path(f'{scheme}://b/x')


def test_local_paths_stay_what_they_are(tmp_path):
  for name in ('runs/x', '/runs/x', 'a:b', tmp_path):
    assert storage.path(name) == Path(name) and not storage.remote(name)
  assert storage.fetched(tmp_path) == tmp_path


@pytest.mark.parametrize('name', ['gs://b/x', Path('gs://b/x')])
def test_a_bucket_stays_one(name):
  """pathlib takes a slash away, by which it would be a local folder."""
  if importlib.util.find_spec('gcsfs') is None:
    pytest.skip('gcsfs is not installed (the extra `dev`)')
  place = storage.path(name)
  assert str(place) == 'gs://b/x' and str(place / 'y') == 'gs://b/x/y' and storage.remote(place)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  target = tmp_path / 'a.txt'
  storage.write(target, 'first')
  with mock.patch.object(Path, 'replace', side_effect=OSError('full')), pytest.raises(OSError, match='full'):
    storage.write(target, 'second')
  assert target.read_text() == 'first' and list(tmp_path.glob('a*')) == [target]


def test_what_fails_for_a_while_is_tried_again(monkeypatch):
  slept, failures = [], [ConnectionError('1'), TimeoutError('2')]
  monkeypatch.setattr(storage.time, 'sleep', slept.append)

  def action():
    if failures:
      raise failures.pop(0)
    return 'done'

  assert storage.attempt(action, 'gs://b/x') == 'done' and slept == list(storage.DELAYS[:2])
  failures[:] = [ConnectionError('gone\nand more')] * 9
  with pytest.raises(storage.Unreachable, match=r'^gs://b/x: ConnectionError: gone \(tried 4 times\)$'):
    storage.attempt(action, 'gs://b/x')
  failures[:] = [PermissionError('no')] * 2
  with pytest.raises(storage.Unreachable, match='PermissionError: no$'):
    storage.attempt(action, 'gs://b/x')
  assert len(failures) == 1


def test_a_work_folder_that_cannot_be_served_is_refused_first(tmp_path):
  done = subprocess.run([sys.executable, '-m', 'experiments.main', '--workdir=ftp://host/run', '--config=nothing.py'],
                        cwd=tmp_path, capture_output=True, text=True, timeout=100,
                        env={**os.environ, 'PYTHONPATH': str(test_cli.ROOT)})
  assert done.returncode == 1 and not list(tmp_path.iterdir())
  assert done.stderr.startswith('error: ftp://host/run: there is no file system ftp://') and (
      done.stderr.count('\n') == 1)


@pytest.mark.parametrize('mode, several, workdir, expected', [
    ('train', {}, 'runs/a', 'cache'), ('train', {'processes': 2}, 'runs/a', 'runs/a/compiled'),
    ('train', {'distributed': True}, 'runs/a', 'runs/a/compiled'), ('train', {}, 'gs://b/a', 'gs://b/a/compiled'),
    ('eval', {}, 'gs://b/a', 'cache'), ('plan', {}, None, 'cache')])
def test_where_compiled_programs_go(monkeypatch, mode, several, workdir, expected):
  """Beside the run, where other processes or machines will need them."""
  monkeypatch.setenv('LOOPFORMER_CACHE', 'cache')
  if workdir and storage.remote(workdir) and buckets.missing('gs'):
    pytest.skip('gcsfs is not installed (the extra `dev`)')
  given = {'mode': mode, 'distributed': False, 'coordinator': None, 'processes': None, 'process': None, **several}
  flags = types.SimpleNamespace(**given)
  with mock.patch.object(main, 'FLAGS', flags), mock.patch.object(machines, 'FLAGS', flags):
    cache = str(Path('cache').absolute())
    assert main.compiled(workdir and storage.path(workdir)) == (cache if expected == 'cache' else expected)


# In this process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('writes', [True, False])
def test_a_bucket_that_is_not_there(bucket, writes):
  with pytest.raises(ConfigError, match='there is no bucket .*/none; make it'):
    storage.check_workdir(f'{bucket[:5]}none/run', writes)
  storage.check_workdir(f'{bucket}/anew', writes)
  assert not storage.path(f'{bucket}/anew').exists()


def test_a_bucket_without_permission(bucket):
  """A file system that refuses stands for a server that does."""
  place = storage.path(f'{bucket}/run')
  with mock.patch.object(type(place), 'write_text', side_effect=PermissionError('Forbidden\nby policy')), (
      pytest.raises(ConfigError, match=r'cannot be written \(PermissionError: Forbidden\); see to its permissions')):
    storage.check_workdir(place, True)


def test_metrics_are_parts(bucket, monkeypatch):
  monkeypatch.setattr(metrics.Parts, 'ROWS', 4)
  folder = storage.path(f'{bucket}/metrics')
  writer = metrics.writer(folder, 0)
  for step in range(1, 8):
    writer.write('train', step, {'loss': 1.0 / step})
  writer.flush()
  writer.flush()
  names = [child.name for child in folder.iterdir() if child.suffix == '.jsonl']
  assert sorted(names) == ['metrics-000000.jsonl', 'metrics-000001.jsonl']
  assert [row['step'] for row in metrics.read_rows(folder / 'metrics.jsonl')] == list(range(1, 8))
  writer = metrics.writer(folder, 5)  # was killed after it had saved step 5
  assert [row['step'] for row in metrics.read_rows(folder / 'metrics.jsonl')] == list(range(1, 6))
  writer.write('train', 6, {'loss': 0.0})
  writer.close()
  assert [row['step'] for row in metrics.read_rows(folder / 'metrics.jsonl')] == list(range(1, 7))
  assert (folder / 'metrics-000002.jsonl').exists()
  copy = storage.fetched(folder)  # a run that was copied to this machine goes on there
  local = metrics.writer(copy, 6)
  local.write('train', 7, {'loss': 0.0})
  local.close()
  assert [row['step'] for row in metrics.read_rows(copy / 'metrics.jsonl')][-1] == 7


def test_checkpoints(bucket):
  """They are kept, come back, and a damaged one is put aside; as on this machine."""
  folder = storage.path(f'{bucket}/saved')
  test_checkpoint.save(folder, (1, 2, 3, 4), keep=3)
  assert test_checkpoint.kept(folder) == [2, 3, 4]
  storage.files(folder).rm(f'{folder}/checkpoints/4/params', recursive=True)
  told = []
  with Checkpoints(folder) as checkpoints:
    step, (params, optimizer, position, _) = checkpoints.restore_last(
        test_checkpoint.target(), test_checkpoint.target(), told.append)
    assert step == 3 and position == {'next': 3} and 'damaged-4' in told[0]
    np.testing.assert_array_equal(params['a'], test_checkpoint.small(3)['a'])
    np.testing.assert_array_equal(optimizer['a'], test_checkpoint.small(-3)['a'])
  assert test_checkpoint.kept(folder) == [2, 3] and (folder / 'checkpoints/damaged-4').exists()


def test_a_step_that_is_not_complete_is_none(bucket):
  """Of a process that was killed while it saved."""
  folder = storage.path(f'{bucket}/cut')
  test_checkpoint.save(folder, (1, 2))
  (folder / 'checkpoints/2/commit_success.txt').unlink()
  assert test_checkpoint.kept(folder) == [1]


def test_a_save_that_fails_names_the_last_good_step(bucket):
  folder = storage.path(f'{bucket}/failing')
  with pytest.raises(OSError, match='a checkpoint cannot be written .*; the last good checkpoint is step 3, where'):
    with Checkpoints(folder) as checkpoints:
      for step in (1, 2, 3):
        checkpoints.save(step, test_checkpoint.small(step), test_checkpoint.small(step), {}, {})
      with mock.patch.object(checkpoints._manager, 'save', side_effect=RuntimeError('UNAVAILABLE\nlong')):
        checkpoints.save(4, test_checkpoint.small(4), test_checkpoint.small(4), {}, {})


def test_data_are_made_once_and_copied_by_every_machine(bucket, tmp_path, monkeypatch):
  local, folder = upload_texts(f'{bucket}/books'), f'{bucket}/run'
  part = TrainedPieces(vocab=280)
  here = Files(train=(f'{local}/*.txt',), validation=0.3)
  given = storage.path(f'{bucket}/given.model')
  storage.write(given, part.build(document.text for document in here.documents()).model)
  there = Files(train=(f'{bucket}/books/**/*.txt',), validation=0.3)
  assert [(s.size, s.sha256()) for s in there.sources()] == [(s.size, s.sha256()) for s in here.sources()]
  assert {document.text for document in there.documents()} == {document.text for document in here.documents()}
  task, lines = Text(corpus=there, tokenizer=GivenPieces(path=str(given)), length=16), []
  monkeypatch.setenv('LOOPFORMER_CACHE', str(tmp_path / 'first'))
  task.prepare(folder, lines.append)
  assert 'written to' in lines[-3] and f'uploaded to {folder}/data' in lines[-2]
  assert len(list((tmp_path / 'first/data').iterdir())) == 1
  expected = [example['tokens'] for example in task.examples(folder, 'validation', 0)]
  monkeypatch.setenv('LOOPFORMER_CACHE', str(tmp_path / 'second'))
  lines.clear()
  with mock.patch.object(storage, 'sha256', side_effect=AssertionError('a file was read')):
    task.prepare(folder, lines.append)
  assert 'copied from' in lines[0] and 'reused from' in lines[1] and len(lines) == 2
  np.testing.assert_array_equal([example['tokens'] for example in task.examples(folder, 'validation', 0)], expected)
  task.verify(folder, quiet)
  assert task.describe(folder)['train']['documents'] > 0
  assert task.tokenizer_of(folder) == task.prepare(folder, quiet)
  shard = next((tmp_path / 'second').rglob('train-*'))
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(ValueError, match='train-.*damaged or stale'):
    task.examples(folder, 'train', 0)
  storage.write(storage.path(f'{bucket}/books/0.txt'), 'changed')
  with pytest.raises(ValueError, match='prepared from something else: source .*books/0.txt has changed'):
    task.prepare(folder, quiet)


def test_a_changed_folder_is_fetched_again(bucket):
  folder = storage.path(f'{bucket}/files')
  storage.write(folder / 'a/b.txt', 'one')
  first = storage.fetched(folder)
  assert storage.fetched(folder) == first and (first / 'a/b.txt').read_text() == 'one'
  storage.write(folder / 'a/b.txt', 'two')
  assert (storage.fetched(folder) / 'a/b.txt').read_text() == 'two'
  assert storage.fetched(folder / 'a/b.txt').read_text() == 'two'
  with pytest.raises(ConfigError, match='no such file or folder'):
    storage.fetched(folder / 'none')


def test_text_is_appended(bucket):
  for text in ('one\n', 'two\n'):
    with storage.appending(f'{bucket}/log.txt') as file:
      subprocess.run(['echo', text.strip()], stdout=file, check=True)
  assert storage.path(f'{bucket}/log.txt').read_text() == 'one\ntwo\n'


def forget():
  """Lets go of configuration files, as a new process would not have them."""
  for name in [name for name in sys.modules if name.startswith(configs.LOADED)]:
    del sys.modules[name]


def test_a_configuration_is_saved_with_its_file(bucket, tmp_path):
  _, _, spec = test_cli.write_setting(tmp_path / 'text').partition('=')
  file, _, argument = spec.partition(':')
  storage.write(storage.path(f'{bucket}/mine.py'), Path(file).read_bytes())
  forget()
  config = configs.load(f'{bucket}/mine.py:{argument}')
  configs.save(config, f'{bucket}/config')
  forget()
  assert configs.describe(configs.read(f'{bucket}/config')) == configs.describe(config)
  with pytest.raises(ConfigError, match='no config.json in it'):
    configs.read(f'{bucket}/nothing')


# Runs ----------------------------------------------------------------------------------------------------------------


def wait_for(file, process: subprocess.Popen):
  """Blocks until the file is there."""
  deadline = time.time() + 240
  while not file.exists():
    assert time.time() < deadline and process.poll() is None, f'{file} never came'
    time.sleep(0.05)


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket):
  """Trained, killed, resumed, exported and imported; in S3 by two processes, elsewhere evaluated and generated from."""
  upload_texts(f'{bucket}/texts')
  processes = 2 if bucket.startswith('s3') else 1
  workdir = storage.path(f'{bucket}/whole')
  arguments = [f'--workdir={workdir}', f'--config={Path("texts/mine.py").absolute()}:{bucket}/texts',
               '--set=train.save_every=3', '--set=train.steps=12', '--set=train.eval_every=12',
               '--set=evals.budgets=(1,)']
  profile = ['--profile=2:2'] if processes == 1 else []
  environment = {'JAX_DEBUG_LOG_MODULES': 'jax._src.compiler', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.3'}
  with mock.patch.dict(os.environ, environment):
    runs = cluster.start(Path('logs'), processes, 1, *arguments, *profile)
    wait_for(workdir / 'checkpoints/3/commit_success.txt', runs[0])
    for process in runs:
      process.kill()
    cluster.wait(runs)
    reached = [row['step'] for row in metrics.read_rows(workdir / 'metrics.jsonl')]
    assert max(reached) < 12, 'the run was over before it could be killed'
    assert cluster.wait(cluster.start(Path('logs'), processes, 1, *arguments)) == [0] * processes, (
        cluster.told(Path('logs')))
  assert "Persistent compilation cache hit for 'jit_step'" in cluster.told(Path('logs'))  # process 1: keys of its own
  assert 'resumed from step' in cluster.told(Path('logs'))
  assert [row['step'] for row in metrics.read_rows(workdir / 'metrics.jsonl') if row['kind'] == 'train'] == (
      list(range(1, 13)))
  for name in ('compiled', 'profile', 'data', 'tensorboard') if processes == 1 else ('compiled', 'data'):
    assert (workdir / name).is_dir(), name
  model, params, tokenizer, config = loopformer.load(str(workdir))
  if processes == 1:
    assert loopformer.generate(model, params, tokenizer, ['one'], max_new_tokens=3)
  convert.export(model, params, tokenizer, f'{bucket}/exported')
  convert.export(model, params, tokenizer, f'{bucket}/exported')  # in the place of the first
  again, same, _ = convert.from_pretrained(f'{bucket}/exported')
  jax.tree.map(np.testing.assert_array_equal, params, same)
  assert again.read_in.vocab == model.read_in.vocab
  storage.write(storage.path(f'{bucket}/exported/mine.txt'), 'mine')
  with pytest.raises(ConfigError, match="holds 'mine.txt' and is no earlier export"):
    convert.export(model, params, tokenizer, f'{bucket}/exported')
  if processes == 2:
    return
  status, _, err = test_cli.run_here(workdir, '--mode=eval', '--depths=1,2')
  assert status == 0, err
  rows = json.loads((workdir / 'eval/depths.json').read_text())
  assert [row['budget'] for row in rows] == [1, 2]
  assert (workdir / 'eval/depths.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_bucket_that_vanishes_ends_the_run(tmp_path, monkeypatch):
  """With the last good checkpoint in the message."""
  _, _, spec = test_cli.write_setting(tmp_path / 'text').partition('=')
  config = configs.load(spec, ('train.eval_every=24', 'model.loops=2', 'objective.rolls.long.plan.loops=2'))
  steps, write = [], metrics.Writer.write

  def failing(self, kind, step, values):
    steps.append(step)
    if step == 7:
      raise storage.Unreachable('gs://b/run/metrics-000000.jsonl: ConnectionError: gone (tried 4 times)')
    write(self, kind, step, values)

  monkeypatch.setattr(metrics.Writer, 'write', failing)
  with pytest.raises(OSError, match=r'gone \(tried 4 times\); the last good checkpoint is step 4, where the same'):
    train.train(config, tmp_path / 'run', log=quiet)
  with contextlib.suppress(FileNotFoundError):
    assert prepared.load_manifest(tmp_path / 'run/data')['splits']


# Locks ---------------------------------------------------------------------------------------------------------------


def test_one_run_at_a_time_in_a_bucket(bucket, monkeypatch):
  """Its lock is made where none is, is refused to others while its owner lives, and is anybody's afterwards."""
  for name, value in (('BEAT', 0.2), ('PATIENCE', 2.5), ('POLL', 0.1), ('SETTLE', 0.3)):
    monkeypatch.setattr(lock, name, value)
  folder = storage.path(bucket) / 'locked'
  place, told = folder / lock.FILE, []
  with lock.Lock(folder, told.append) as held:
    own = place.read_text()
    assert not storage.create(place, 'another')
    with pytest.raises(ConfigError, match=rf'another run is training there \(process {os.getpid()} on'):
      lock.Lock(folder, told.append).__enter__()
    first = storage.written(place)
    while storage.written(place) == first:  # a sign of life
      time.sleep(0.1)
    held.check()
    assert place.read_text() == own and storage.age(place) < 2.5
  assert not place.exists() and not told
  storage.write(place, own.replace(f'"host": "{json.loads(own)["host"]}"', '"host": "other"'))
  with lock.Lock(folder, told.append):
    assert json.loads(place.read_text())['host'] == json.loads(own)['host']
  assert len(told) == 1 and 'on other' in told[0]
