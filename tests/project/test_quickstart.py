"""The first command of the README: what it runs, how long it says that it takes, and what it shows in the end."""
import os
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest

from experiments.tools import quickstart, records
from loopformer import config as configs
from loopformer.types import ConfigError
from tests import parts

# Notes its arguments. A run that Ctrl-C reaches saves, and ends with 0; its shell hears Ctrl-C, too.
PYTHON = '''#!/usr/bin/env bash
echo "$*" >> said
case "$*" in
  *quickstart.py:text*)
    [ -z "${INTERRUPTED:-}" ] || kill -INT "$PPID" ;;
esac
'''
SMALL = ['train.batch=2', 'model.read_in.width=8', 'model.cell.core.block.mlp.hidden=8', 'model.cell.condition.width=8',
         'model.cell.core.block.attn.heads=1', 'train.steps=20', 'optim.schedule.warmup=5', 'train.eval_every=8']


@pytest.fixture
def checkout(tmp_path):
  """A folder with the scripts, and a Python that notes what it is asked."""
  shutil.copytree(parts.ROOT / 'launch', tmp_path / 'launch')
  for name in ('setup.cfg', 'pyproject.toml'):
    shutil.copy(parts.ROOT / name, tmp_path)
  python = tmp_path / '.venv/bin/python'
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  return tmp_path


def run(checkout, *words, **environment):
  done = subprocess.run(['bash', 'launch/quickstart.sh', *words], cwd=checkout, capture_output=True, text=True,
                        timeout=60, env=os.environ | environment, start_new_session=True)
  return done, [shlex.split(line) for line in (checkout / 'said').read_text().splitlines()]


def test_both_runs_are_trained_and_shown(checkout):
  done, (installed, told, text, pointers, *evaluated, first, second, shown) = run(checkout, '--set', 'train.steps=30')
  assert done.returncode == 0, done.stderr
  assert installed[:3] == ['-m', 'pip', 'install']
  both = ['-m', 'experiments.tools.quickstart', '--workdir=runs/tiny', '--reasoning=runs/tiny-pointers']
  assert told == [*both, '--mode=train', '--set', 'train.steps=30'] and shown == [*both, '--mode=eval']
  for name, found, folder in (('text', text, 'runs/tiny'), ('pointers', pointers, 'runs/tiny-pointers')):
    assert found[2:] == [f'--workdir={folder}', f'--config=experiments/configs/quickstart.py:{name}', '--set',
                         'train.steps=30']
  assert [found[2:] for found in evaluated] == [[f'--workdir=runs/tiny{end}', '--mode=eval', '--depths=1,2,4,8']
                                                for end in ('', '-pointers')]
  assert [found[4] for found in (first, second)] == ['--budget=1', '--budget=8']


def test_ctrl_c_ends_it_once_the_run_has_saved(checkout):
  done, said = run(checkout, WORKDIR='here/', INTERRUPTED='yes')
  assert done.returncode == 130
  assert [words[1:3] for words in said[1:]] == [['experiments.tools.quickstart', '--workdir=here'],
                                               ['experiments.main', '--workdir=here']]


def test_time_is_that_of_steps_evaluations_and_compilation():
  config = configs.load('quickstart:pointers', ['train.steps=20', 'train.eval_every=8', 'train.eval_batches=3'])
  pace, model = quickstart.Pace(first=10.0, step=0.5), config.model
  forward = sum(model.flops(8, n) for n in (1, 2, 4, 8)) / config.objective.flops(model, 8)  # in steps, of a batch
  splits = len(config.task.splits)
  # at 8, 16, 20
  assert quickstart.left(config, 0, pace, 2) == pytest.approx(0.5 * (20 + forward * 3 * (3 + splits)) + 20)
  assert quickstart.left(config, 16, pace, 2) == pytest.approx(0.5 * (4 + forward * 3 * (1 + splits)) + 20)
  assert 0.1 < forward < 1
  assert [quickstart.told(seconds) for seconds in (1, 60, 61)] == [
      'about 1 minute', 'about 1 minute', 'about 2 minutes']


def test_a_pace_is_measured(monkeypatch):
  monkeypatch.setattr(quickstart, 'TIMED', 0.0)
  config = configs.load('quickstart:pointers', SMALL)
  configs.check(config)
  found = quickstart.pace(config)
  assert 0 < found.step < found.first


def test_what_is_ready_takes_no_time(monkeypatch, tmp_path, capsys):
  """And a field that one of the runs lacks is told before either is timed."""
  steps = {name: configs.load(f'quickstart:{name}').train.steps for name in ('text', 'pointers')}
  monkeypatch.setattr(quickstart, 'trained', lambda folder: steps['pointers'] if folder == 'p' else 100)
  asked = []
  monkeypatch.setattr(quickstart, 'pace',
                      lambda config: asked.append(config.name) or quickstart.Pace(first=30.0, step=0.25))
  monkeypatch.setattr(quickstart, 'FLAGS', {'set': SimpleNamespace(value=[])})
  quickstart.run_train({'text': 't', 'pointers': 'p'})
  out = capsys.readouterr().out
  assert (asked == ['quickstart text'] and f'text: {steps["text"] - 100} steps of 0.25 s' in out
          and 'pointers' not in out)
  assert out.splitlines()[-1].startswith('this will take about ')
  monkeypatch.setattr(quickstart, 'FLAGS', {'set': SimpleNamespace(value=['task.documents.x=1'])})
  with pytest.raises(ConfigError, match='task.documents.x'):
    quickstart.run_train({'text': 't', 'pointers': 'p'})
  assert len(asked) == 1


def test_the_dial_is_drawn_and_told(tmp_path, capsys):
  pytest.importorskip('matplotlib')
  folders = {'text': tmp_path / 'tiny', 'pointers': tmp_path / 'tiny-pointers'}
  splits = configs.load('quickstart:pointers').task.splits
  assert list(splits) == ['validation', *(f'{hops} hops' for hops in range(1, 9))]
  for run_, folder in folders.items():
    configs.save(configs.load(f'quickstart:{run_}'), folder)
    (folder / 'eval').mkdir()
    for split in splits if run_ == 'pointers' else ['validation']:
      rows = [{'budget': n, 'schedule': str(n), 'loss': 4 - n / 16, 'accuracy': n / 8} for n in (1, 2, 4, 8)]
      name = 'depths' if split == 'validation' else f'depths-{split}'
      records.write(folder / f'eval/{name}.json', rows)
  quickstart.run_eval(folders)
  head, _, text, pointers, path = capsys.readouterr().out.splitlines()
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in (head, text, pointers)]
  assert cells == [['loops of one checkpoint', '1', '2', '4', '8'],
                   ['text: loss, nats a token', '3.938', '3.875', '3.750', '3.500'],
                   ['pointers: accuracy', '0.125', '0.250', '0.500', '1.000']]
  assert path == str(tmp_path / 'tiny/eval/dial.png') and (tmp_path / 'tiny/eval/dial.png').read_bytes()[1:4] == b'PNG'
  (folders['pointers'] / 'eval/depths-3 hops.json').unlink()
  with pytest.raises(ConfigError, match=r'depths-3 hops\.json.*--mode=eval'):
    quickstart.run_eval(folders)
