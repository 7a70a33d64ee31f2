"""Weights & Biases beside the other writers, offline: one run a work folder, and nothing of it stops training."""
import json
import struct
import time
import warnings

import pytest

from loopformer.training import metrics, wandb_run

ROWS = [('train', 1, {'loss': 2.5, 'kinds': [1, 2]}), ('train', 2, {'loss': 2.25}), ('eval', 2, {'loss@4': 2.125})]


@pytest.fixture
def offline(monkeypatch, tmp_path):
  """wandb, which sends nothing."""
  module = pytest.importorskip('wandb', reason='wandb is not installed (extra `wandb`)')
  for name, value in {'WANDB_PROJECT': 'looped', 'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true',
                      'WANDB_CACHE_DIR': str(tmp_path / 'cache'),
                      'WANDB_CONFIG_DIR': str(tmp_path / 'settings')}.items():
    monkeypatch.setenv(name, value)
  return module


def write(folder, first, rows):
  writer = metrics.writer(folder, first)
  for row in rows:
    writer.write(*row)
  writer.close()


def records(data: bytes):
  """What a .wandb file holds: after 7 bytes blocks of 32 KB, of pieces that say (checksum, length, type) before them.
  """
  place, piece, block = 7, b'', 1 << 15
  while place < len(data):
    if block - place % block < 7:
      place += block - place % block
      continue
    if len(data) - place < 7:
      return
    _, length, kind = struct.unpack_from('<IHB', data, place)
    piece, place = piece + data[place + 7:place + 7 + length], place + 7 + length
    if kind in (1, 4) and place <= len(data):  # whole, or the last piece
      yield piece
      piece = b''


def told(folder) -> tuple[list[dict], list[dict]]:
  """What wandb has written of a work folder, in order: the numbers of every step, and its runs. Its own process may
  still be writing the last."""
  from wandb.proto import wandb_internal_pb2
  history, runs, patience = [], [], time.monotonic() + 60
  for path in sorted((folder / 'wandb').glob('offline-run-*/*.wandb')):  # named by their time
    found = []
    while not any(record.WhichOneof('record_type') == 'exit' for record in found) and time.monotonic() < patience:
      time.sleep(0.1)
      found = [wandb_internal_pb2.Record.FromString(data) for data in records(path.read_bytes())]
    for record in found:
      if record.WhichOneof('record_type') == 'run':
        runs.append({'id': record.run.run_id, 'project': record.run.project, 'name': record.run.display_name})
      if record.WhichOneof('record_type') == 'history':
        items = {item.key or '/'.join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        history.append({'step': record.history.step.num} | {name: value for name, value in items.items()
                                                            if name[0] != '_'})
  return history, runs


def test_a_resumed_run_goes_on_under_its_id(offline, tmp_path):
  folder = tmp_path / 'tiny'
  folder.mkdir()
  (folder / 'config.json').write_text('{"train": {"steps": 3}}')
  write(folder, 0, ROWS)
  write(folder, 2, [('train', 3, {'loss': 2.0})])
  history, runs = told(folder)
  assert history == [{'step': 1, 'train/loss': 2.5}, {'step': 2, 'train/loss': 2.25, 'eval/loss@4': 2.125},
                     {'step': 3, 'train/loss': 2.0}]
  assert {run['id'] for run in runs} == {json.loads((folder / wandb_run.FILE).read_text())['id']}
  assert len(list((folder / 'wandb').glob('offline-run-*'))) == 2
  assert {(run['project'], run['name']) for run in runs} == {('looped', 'tiny')}
  assert len(metrics.read_rows(folder / 'metrics.jsonl')) == 4


def test_what_fails_in_it_is_one_warning(offline, tmp_path, monkeypatch):
  def failing(**options):
    raise offline.errors.CommError('no network\nand more')

  monkeypatch.setattr(offline, 'init', failing)
  with pytest.warns(UserWarning, match='told no more of this run, which goes on: no network$') as found:
    write(tmp_path, 0, ROWS)
  assert len([said for said in found if said.category is UserWarning]) == 1
  assert len(metrics.read_rows(tmp_path / 'metrics.jsonl')) == 3


@pytest.mark.parametrize('text, why', [('{"id": 5}', 'no id of a run'), ('{"id": ""}', 'no id of a run'),
                                       ('{}', 'no id of a run'), ('[]', 'is damaged'), ('{', 'is damaged')])
def test_a_damaged_id_is_named_with_its_file(offline, tmp_path, monkeypatch, text, why):
  monkeypatch.setattr(offline, 'init', lambda **_: pytest.fail('it was begun'))
  (tmp_path / wandb_run.FILE).write_text(text)
  with pytest.warns(UserWarning, match=f'goes on: .*wandb.json:? {why}.*; remove it, and another run begins$'):
    write(tmp_path, 0, ROWS)
  assert len(metrics.read_rows(tmp_path / 'metrics.jsonl')) == 3


def test_without_a_project_nothing_is_told(tmp_path, monkeypatch):
  monkeypatch.delenv('WANDB_PROJECT', raising=False)
  assert wandb_run.begin(tmp_path) is None


@pytest.mark.parametrize('spec', ['none', 'a folder'])
def test_a_project_without_the_package_is_a_warning(spec, tmp_path, monkeypatch):
  """A folder `wandb`, as it leaves one where it is started, is not the package."""
  monkeypatch.setenv('WANDB_PROJECT', 'looped')
  found = None if spec == 'none' else wandb_run.importlib.machinery.ModuleSpec('wandb', None)
  monkeypatch.setattr(wandb_run.importlib.util, 'find_spec', lambda name: found)
  with pytest.warns(UserWarning, match="WANDB_PROJECT=looped: .* not installed; pip install 'loopformer"):
    assert wandb_run.begin(tmp_path) is None


def test_nothing_is_begun_before_there_is_something_to_tell(offline, tmp_path, monkeypatch):
  monkeypatch.setattr(offline, 'init', lambda **_: pytest.fail('it was begun'))
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    write(tmp_path, 0, [('stage', 1, {'why': 'words'})])
  assert not (tmp_path / wandb_run.FILE).exists()
