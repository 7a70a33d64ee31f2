"""Checkpoints that are damaged, the best of them, starting from another run, and disks that cannot be written."""
from __future__ import annotations

import json
import shutil
import subprocess

import jax
import numpy as np
import pytest

from loopformer import config as configs
from loopformer.inference.measures import LESS, MORE
from loopformer.training import checkpoint
from loopformer.training.checkpoint import Best, Checkpoints
from tests.experiments import test_cli


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  return test_cli.write_setting(tmp_path_factory.mktemp('text'))


@pytest.fixture(scope='module')
def run(setting, tmp_path_factory):
  """A finished run of 24 steps, saved every 4."""
  workdir = tmp_path_factory.mktemp('run')
  status, _, err = test_cli.run(workdir, setting)
  assert status == 0, err
  return workdir


@pytest.fixture
def copy(run, tmp_path):
  return shutil.copytree(run, tmp_path / 'copy')


def small(step: int) -> dict:
  return {'a': np.full((3, 2), step, np.float32)}


def target():
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), small(0))


def save(folder, steps, keep=3, best=None, losses=None):
  with Checkpoints(folder, keep, best) as checkpoints:
    for i, step in enumerate(steps):
      checkpoints.save(step, small(step), small(-step), {'next': step}, {}, losses and {'loss@2': losses[i], 'x': 0.0})


def kept(folder) -> list[int]:
  with Checkpoints(folder) as checkpoints:
    return checkpoints.steps()


def test_the_last_and_the_best_stay(tmp_path):
  save(tmp_path / 'last', range(1, 7), keep=2)
  assert kept(tmp_path / 'last') == [5, 6]
  losses = [3.0, 1.0, 2.0, 4.0, 2.5, 2.6]
  save(tmp_path / 'loss', range(1, 7), keep=2, best=Best(name='loss@2', sign=LESS), losses=losses)
  assert kept(tmp_path / 'loss') == [2, 5, 6]


def test_a_number_that_is_not_reported_is_never_the_best(tmp_path):
  with pytest.raises(configs.ConfigError,
                     match="train.best = 'bits_per_byte@2': the evaluations .* choose one of loss@2, x"):
    save(tmp_path, [1], best=Best(name='bits_per_byte@2', sign=LESS), losses=[1.0])


def test_a_later_run_knows_the_best_of_those_before(tmp_path):
  for step, value in enumerate((2.0, 1.0, 4.0, 3.0), 1):
    save(tmp_path, [step], keep=1, best=Best(name='loss@2', sign=LESS), losses=[value])
  assert kept(tmp_path) == [2, 4]


def test_steps_that_were_not_evaluated_are_never_the_best(tmp_path):
  with Checkpoints(tmp_path, 1, Best(name='loss@2', sign=LESS)) as checkpoints:
    for step, value in enumerate((None, 2.0, None, 3.0, None), 1):
      checkpoints.save(step, small(step), small(step), {}, {}, {} if value is None else {'loss@2': value})
  assert kept(tmp_path) == [2, 5]


@pytest.mark.slow
def test_evaluated_states_are_saved_where_the_best_is_kept(setting, tmp_path):
  changes = ('train.best=loss@1', 'train.eval_every=10', 'train.save_every=16', 'train.keep=9')
  status, _, err = test_cli.run_here(tmp_path, setting, *(f'--set={change}' for change in changes))
  assert status == 0, err
  assert kept(tmp_path) == [10, 16, 20, 24]
  values = {row['step']: row['loss@1'] for row in test_cli.rows(tmp_path, 'eval')}
  for step, value in values.items():
    told = json.loads((tmp_path / f'checkpoints/{step}/metrics/metrics').read_text())
    assert told == {'loss@1': value}
  assert not (tmp_path / 'checkpoints/16/metrics').exists()


def test_arrays_are_written_in_pieces(tmp_path, monkeypatch):
  """No file is much larger than a piece: TensorStore keeps what a file holds in memory until it is written."""
  monkeypatch.setattr(checkpoint, 'FILE_BYTES', 2 * 2**20)
  monkeypatch.setattr(checkpoint, 'CHUNK_BYTES', 2**20)
  array = np.random.default_rng(0).random((24, 2**18), np.float32)  # 25 MB, and hardly less compressed
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {'a': array}, None, {}, {})
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    checkpoints.resumes()  # which waits for it
    _, read = checkpoints.restore_params(0, {'a': jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place)})
  assert max(file.stat().st_size for file in tmp_path.rglob('*')) < 3 * 2**20
  np.testing.assert_array_equal(read['a'], array)


@pytest.mark.parametrize('remote, least', [(False, 64), (True, 256)])
def test_files_in_buckets_are_larger(remote, least, tmp_path, monkeypatch):
  """There each is a request; and no file is smaller than a piece."""
  monkeypatch.setattr(checkpoint.storage, 'remote', lambda path: remote)
  small, whole = (jax.ShapeDtypeStruct((rows, 256), np.float32) for rows in (16, 1_000_003))
  with Checkpoints(tmp_path) as checkpoints:
    sizes = [checkpoints._written(tree).ocdbt_target_data_file_size
             for tree in ({'a': small}, {'a': small, 'b': whole})]
  assert sizes == [least * 2**20, 1_000_003 * 1024]


@pytest.mark.parametrize('rows, pieces', [(2**16, True), (65_537, False), (3 * 40_009, False), (65_600, True)])
def test_prime_axes_are_not_cut_to_rows(rows, pieces):
  """Orbax divides the largest axis by its divisors alone."""
  leaf = jax.ShapeDtypeStruct((rows, 256), np.float32)
  assert checkpoint.chunk_bytes(leaf) == (checkpoint.CHUNK_BYTES if pieces else rows * 1024)


def test_no_array_is_written_in_very_many_chunks(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'CHUNK_BYTES', 2**16)
  tree = {'prime': np.ones((8209, 16), np.float32), 'even': np.ones((8192, 16), np.float32)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, tree, None, {}, {})
    checkpoints.resumes()  # which waits for it
  import tensorstore
  for name, most in (('prime', 1), ('even', 8)):
    spec = {'driver': 'zarr',
            'kvstore': {'driver': 'ocdbt', 'base': f'file://{tmp_path}/checkpoints/0/params', 'path': f'{name}/'}}
    array = tensorstore.open(spec, open=True).result()
    assert -(-8209 // array.chunk_layout.read_chunk.shape[0]) <= most + 1


def test_checkpoints_of_older_versions_are_read(tmp_path):
  """They were written by Orbax's StandardSave, whole."""
  import orbax.checkpoint as ocp
  tree, optimizer = {'a': {'b': np.arange(6.0, dtype=np.float32)}}, (np.int32(3), {'mu': np.ones(2, np.float32)})
  with ocp.CheckpointManager(tmp_path / 'checkpoints') as manager:
    manager.save(4, args=ocp.args.Composite(
        params=ocp.args.StandardSave(tree), optimizer=ocp.args.StandardSave(optimizer),
        meta=ocp.args.JsonSave({'layout': checkpoint.LAYOUT, 'step': 4, 'data': {'at': 1}, 'control': {}})))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = checkpoint.abstract((tree, optimizer), jax.tree.map(lambda _: place, (tree, optimizer)))
  with Checkpoints(tmp_path) as checkpoints:
    step, read = checkpoints.restore_last(*like, print)
    assert step == 4 and checkpoints.shapes()['a']['b'].shape == (6,) and read[2] == {'at': 1}
    jax.tree.map(np.testing.assert_array_equal, read[:2], (tree, optimizer))


def test_of_more_is_better_the_highest_stays(tmp_path):
  with Checkpoints(tmp_path, 1, Best(name='last@4', sign=MORE)) as checkpoints:
    for step, value in enumerate((0.1, 0.9, 0.3, 0.4), 1):
      checkpoints.save(step, small(step), small(step), {}, {}, {'last@4': value})
  assert kept(tmp_path) == [2, 4]


DAMAGE = {
    'metadata': lambda step: [path.write_text('{') for path in step.rglob('_METADATA')],
    'arrays': lambda step: [path.write_bytes(b'') for path in step.rglob('d/*') if path.is_file()],
    'meta': lambda step: [path.write_text('{"lay') for path in (step / 'meta').rglob('metadata')],
    'an item': lambda step: [shutil.rmtree(step / 'params')],
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_step_is_passed_over_and_named(tmp_path, damage):
  save(tmp_path, (1, 2, 3))
  assert DAMAGE[damage](tmp_path / 'checkpoints/3'), 'nothing was damaged'
  told = []
  with Checkpoints(tmp_path) as checkpoints:
    step, (params, optimizer, position, _) = checkpoints.restore_last(target(), target(), told.append)
    assert step == 2 and position == {'next': 2}
    np.testing.assert_array_equal(params['a'], small(2)['a'])
    np.testing.assert_array_equal(optimizer['a'], small(-2)['a'])
    assert len(told) == 1 and 'checkpoints/3 is damaged' in told[0] and 'damaged-3' in told[0]
    assert checkpoints.steps() == [1, 2] and (tmp_path / 'checkpoints/damaged-3').is_dir()
    checkpoints.save(3, small(3), small(-3), {'next': 3}, {})  # its place is free again
  assert kept(tmp_path) == [1, 2, 3]


def test_where_all_are_damaged_nothing_is_moved(tmp_path):
  save(tmp_path, (1, 2))
  for step in (1, 2):
    DAMAGE['metadata'](tmp_path / f'checkpoints/{step}')
  with Checkpoints(tmp_path) as checkpoints, pytest.raises(configs.ConfigError, match='no step can be read.*2: .*1: '):
    checkpoints.restore_last(target(), target(), print)
  assert kept(tmp_path) == [1, 2]


@pytest.mark.slow
def test_a_run_resumes_before_its_damaged_step(run, copy, setting):
  """And ends with the same weights."""
  DAMAGE['arrays'](copy / 'checkpoints/24')
  status, out, err = test_cli.run(copy, setting)
  assert status == 0, err
  assert '24 is damaged' in out and 'resumed from step 20' in out
  test_cli.assert_same_run(copy, run)


@pytest.mark.slow
def test_what_differs_is_listed(copy, setting):
  status, _, err = test_cli.run_here(copy, setting, '--set', 'train.seed=5', '--set', 'optim.clip=2.5')
  assert status != 0
  assert 'train.seed is 0 there, 5 here' in err and 'optim.clip is 1.0 there, 2.5 here' in err


@pytest.mark.slow
def test_a_run_starts_from_another(run, setting, tmp_path):
  """Parameters that both have are taken over; one step at a rate of zero shows them."""
  still = ('--set', 'train.steps=2', '--set', 'optim.schedule.warmup=1', '--set', 'optim.schedule.peak=0.0', '--set',
           'optim.schedule.end=0.0', '--set', f'train.start={run}')
  status, out, err = test_cli.run_here(tmp_path / 'same', setting, *still)
  assert status == 0, err
  assert 'parameters start from step 24' in out
  jax.tree.map(np.testing.assert_array_equal, test_cli.weights(tmp_path / 'same'), test_cli.weights(run))
  status, _, err = test_cli.run_here(tmp_path / 'other', setting, *still, '--set',
                                     'model.cell.core.block.mlp.hidden=40')
  assert status != 0 and 'mlp/' in err and 'sizes' in err
  status, _, err = test_cli.run_here(tmp_path / 'none', setting, *still[:-1], f'train.start={tmp_path / "nowhere"}')
  assert status != 0 and 'no checkpoint was saved there' in err


@pytest.mark.slow
def test_a_full_disk_is_an_error_and_leaves_what_was_saved(copy, tmp_path):
  """A limit on the size of files stands for a disk that is full: both end a write before it is complete."""
  before = {path: path.read_bytes() for path in (copy / 'checkpoints').rglob('*') if path.is_file()}
  configuration = (copy / 'config.json').read_text().replace('"steps": 24', '"steps": 48')
  (copy / 'config.json').write_text(configuration)
  # its entries are cut too
  environment = {**test_cli.environment(), 'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cache')}
  limited = ['bash', '-c', 'ulimit -f 20 && exec "$@"', 'bash', *test_cli.command(copy)]  # no file over 20 KiB
  done = subprocess.run(limited, cwd=test_cli.ROOT, capture_output=True, text=True, timeout=300, env=environment)
  assert done.returncode != 0
  error = done.stderr.splitlines()[-1]
  assert error.startswith('error: ') and 'File too large; raise the limit' in error and 'copy/' in error, done.stderr
  assert 'the last good checkpoint is step 24' in error and len(done.stderr.splitlines()) < 20, done.stderr
  for path, content in before.items():
    assert path.read_bytes() == content, path
  assert test_cli.weights(copy)  # its last complete step can be read


@pytest.mark.slow
def test_a_folder_that_cannot_be_written(setting, tmp_path):
  """A file where the folder should be stands for a read-only one, which the superuser could write."""
  (tmp_path / 'file').write_text('')
  status, _, err = test_cli.run(tmp_path / 'file/run', setting)
  told = err.splitlines()[-1]  # before it may stand what a TPU's library says of this machine
  assert status != 0 and told.startswith('error: ') and 'file/run' in told
