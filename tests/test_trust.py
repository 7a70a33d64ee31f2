"""Nothing runs because it was read: what a work folder names is found among the library's own parts, or not at all."""
import hashlib
import json
import sys

import pytest

import loopformer
from loopformer import config as configs
from loopformer.types import ConfigError
from tests import parts, test_config

TIMESTEP = parts.ROOT / 'experiments/configs/timestep.py'
PUBLISHED = f'{configs.LOADED}timestep_{hashlib.sha256(TIMESTEP.read_bytes()).hexdigest()[:8]}'
NAMED = {  # where in a configuration, and what is there
    'a command': ('control', {'$part': 'os:system', 'command': 'echo x > {made}'}),
    'a process': ('optim', {'$part': 'subprocess:Popen', 'args': ['touch', '{made}']}),
    'behind a module of ours': ('control', {'$part': 'loopformer.training.checkpoint:os.system',
                                            'command': 'touch {made}'}),
    'a function of ours': ('control', {'$part': 'loopformer.storage:write', 'path': '{made}', 'text': 'x'}),
    'a class of ours': ('control', {'$part': 'loopformer.training.metrics:Lines', 'path': '{made}'}),
    'a function as a value': ('model.cell.core.block.mlp.activation', {'$name': 'os:system'}),
    'one of ours as a value': ('model.cell.core.block.mlp.activation', {'$name': 'loopformer.storage:write'}),
    'a module that runs when it is imported': ('task', {'$part': 'made_elsewhere:Task'}),
    'through a published configuration': ('control', {'$part': f'{PUBLISHED}:dataclasses.inspect.os.system',
                                                      'command': 'touch {made}'}),
    'through a module of functions': ('model.cell.core.block.mlp.activation', {'$name': 'loopformer.plans:math.sqrt'}),
    'within a list': ('evals', {'$part': 'loopformer.inference.evaluate:Depths', 'budgets': [
        1, {'$part': 'os:system', 'command': 'touch {made}'}]}),
}


@pytest.fixture(autouse=True)
def strangers():
  """Folders are nobody's own here."""
  token = configs._TRUST.set(False)
  yield
  configs._TRUST.reset(token)


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A work folder, and beside it a module whose import leaves a file."""
  configs.save(test_config.TINY, tmp_path / 'run')
  (tmp_path / 'made_elsewhere.py').write_text(f'open({str(tmp_path / "made")!r}, "w").close()\nclass Task: pass\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  return tmp_path / 'run'


def write(folder, path, value):
  """Puts a value into config.json."""
  file = folder / configs.FILE
  encoded = json.loads(file.read_text())
  *outer, last = path.split('.')
  place = encoded
  for name in outer:
    place = place[name]
  place[last] = json.loads(json.dumps(value).replace('{made}', str(folder.parent / 'made')))
  file.write_text(json.dumps(encoded))


@pytest.mark.parametrize('case', NAMED)
def test_what_a_folder_names_is_not_run(case, folder):
  path, value = NAMED[case]
  write(folder, path, value)
  for read in (configs.read, loopformer.load):
    with pytest.raises(ConfigError, match='which is no part of this library; .* --trust') as error:
      read(folder)
    assert str(folder / configs.FILE) in str(error.value)
  assert not (folder.parent / 'made').exists() and 'made_elsewhere' not in sys.modules


def test_with_trust_it_is_found(folder):
  write(folder, *NAMED['a module that runs when it is imported'])
  with configs.trusting():
    assert type(configs.read(folder).task).__name__ == 'Task' and (folder.parent / 'made').exists()
  sys.modules.pop('made_elsewhere')
  with pytest.raises(ConfigError, match='made_elsewhere:Task, which is no part'):  # trust ends with the block
    configs.read(folder)


def test_code_in_the_folder_waits_for_trust(tmp_path):
  """In a process that has not read the configuration file itself."""
  configs.save(configs.load(str(test_config.own_part(tmp_path / 'configs'))), tmp_path / 'run')
  copy, = (tmp_path / 'run').glob('*.py')
  copy.write_text(copy.read_text() + f'\nopen({str(tmp_path / "made")!r}, "w").close()\n')
  code = '''
import sys
from loopformer import config as configs
try:
  configs.read(sys.argv[1])
except configs.ConfigError as error:
  print(error)
'''
  told = parts.python(code, str(tmp_path / 'run'))
  assert f'whose code is in {copy}; read that file, and give --trust' in told and not (tmp_path / 'made').exists()


@pytest.mark.parametrize('place', ['below/evil', '../evil'])
def test_code_in_another_folder_waits_too(place, folder):
  """A name is no path: it is refused before the file that it would lead to is opened."""
  file = folder / f'{place}.py'
  file.parent.mkdir(exist_ok=True)
  file.write_text(f'open({str(folder.parent / "made")!r}, "w").close()\nclass Part: pass\n')
  write(folder, 'control', {'$part': f'{configs.LOADED}{place}:Part'})
  with pytest.raises(ConfigError, match='whose code is in .*; read that file, and give --trust'):
    configs.read(folder)
  assert not (folder.parent / 'made').exists()
