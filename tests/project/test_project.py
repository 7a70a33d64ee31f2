"""What a checkout carries besides code, and what is installed from it: licence, citation, changes, wheel, command."""
import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from experiments import cli, main as command
import loopformer
from tests import parts

ROOT = parts.ROOT


def installed() -> dict[str, str]:
  """Section [metadata] of setup.cfg."""
  setup = configparser.ConfigParser()
  setup.read(ROOT / 'setup.cfg')
  return dict(setup['metadata'])


def test_the_version_stands_in_one_place():
  assert re.fullmatch(r'\d+\.\d+\.\d+', loopformer.__version__)
  assert installed()['version'] == 'attr: loopformer.__version__'
  where = [path.name for path in (*ROOT.glob('*.toml'), *ROOT.glob('*.cfg'), *ROOT.glob('*.cff'), ROOT / 'README.md')
           if loopformer.__version__ in path.read_text()]
  assert where == []


def test_changes_are_told_of_this_version():
  newest = re.search(r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)
  assert newest[1] == loopformer.__version__


def test_the_licence_is_named_as_it_is():
  text = (ROOT / 'LICENSE').read_text()
  assert 'Apache License\n' in text and 'Version 2.0, January 2004' in text
  assert 'END OF TERMS AND CONDITIONS' in text and '9. Accepting Warranty or Additional Liability' in text
  assert installed()['license'] == 'Apache-2.0'


def test_every_paper_of_a_configuration_can_be_cited():
  yaml = pytest.importorskip('yaml')
  cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
  assert cited['license'] == installed()['license'] and cited['title'] == installed()['name']
  assert {'cff-version', 'message', 'authors'} <= set(cited)
  assert [author['name'] for author in cited['authors']] == [installed()['author']]
  assert ', '.join(cited['keywords']) == installed()['keywords']
  references = {}
  for reference in cited['references']:
    assert {'type', 'title', 'authors', 'year', 'url', 'notes'} <= set(reference), reference
    assert all(set(author) <= {'given-names', 'family-names', 'name'} for author in reference['authors'])
    references[reference['url'].removeprefix('https://arxiv.org/abs/')] = reference['notes']
  named = {file.name: set(re.findall(r'\b\d{4}\.\d{5}\b', ast.get_docstring(ast.parse(file.read_text())) or ''))
           for file in (ROOT / 'experiments/configs').glob('*.py')}
  assert set.union(*named.values()) <= set(references)
  for name, notes in references.items():  # and each says whose paper it is
    assert re.match(r'\w+\.py', notes)[0] in named, name


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> zipfile.ZipFile:
  """The wheel of this checkout, made in a copy: setuptools leaves files where it builds."""
  pytest.importorskip('setuptools', '70.1')
  folder = tmp_path_factory.mktemp('wheel')
  source = folder / 'source'
  for name in ('loopformer', 'experiments'):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('reports', '__pycache__'))
  for name in ('setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-build-isolation', '--no-deps', '--no-index',
                  f'--wheel-dir={folder}', str(source)], check=True, timeout=120)
  [path] = folder.glob('*.whl')
  return zipfile.ZipFile(path)


def test_a_wheel_carries_all_that_runs(wheel):
  """Every module that a checkout has, and no test."""
  names = set(wheel.namelist())
  modules = {str(file.relative_to(ROOT)) for folder in ('loopformer', 'experiments')
             for file in (ROOT / folder).rglob('*.py')}
  assert {name for name in names if '.dist-info/' not in name} == modules | {'loopformer/py.typed'}
  about = f'loopformer-{loopformer.__version__}.dist-info/'
  assert re.search(r'^License(-Expression)?: Apache-2.0$', wheel.read(f'{about}METADATA').decode(), re.MULTILINE)
  assert {f'{about}licenses/LICENSE', f'{about}LICENSE'} & names


def test_an_installed_command_runs_anywhere(wheel, tmp_path):
  """In another folder, of the wheel's own files: it lists the configurations, and reads one by its short name."""
  wheel.extractall(tmp_path / 'site')
  points = configparser.ConfigParser()
  points.read(next((tmp_path / 'site').glob('*.dist-info')) / 'entry_points.txt')
  module, function = points['console_scripts']['loopformer'].split(':')
  code = f'''
import sys
import {module}
assert {module}.__file__.startswith({str(tmp_path)!r}), {module}.__file__
{module}.{function}()
'''
  def run(*words):
    return subprocess.run([sys.executable, '-c', code, *words], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, env={'PYTHONPATH': str(tmp_path / 'site'), 'PATH': '',
                                            'JAX_PLATFORMS': 'cpu', 'HOME': str(tmp_path)})
  done = run('configs')
  assert done.returncode == 0, done.stderr
  assert {line.split()[0] for line in done.stdout.split('\n\n')[0].splitlines() if line[0] != ' '} == {
      file.stem for file in (ROOT / 'experiments/configs').glob('*.py')} - {'__init__'}
  done = run('train', '--config=loopformer:tiny,kind=nonsense', '--workdir=w')
  assert done.returncode == 1 and 'nonsense' in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_the_command_has_every_mode_and_fits_a_screen(capsys, monkeypatch):
  modes = {word for word, (module, _) in cli.COMMANDS.items() if module == cli.MAIN}
  assert modes == set(command.FLAGS['mode'].parser.enum_values)
  monkeypatch.setattr(sys, 'argv', ['loopformer', '--help'])
  cli.main()
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) <= 24 and max(map(len, lines)) <= 100
  assert [line.split()[0] for line in lines[2:2 + len(cli.COMMANDS)]] == list(cli.COMMANDS)
  monkeypatch.setattr(sys, 'argv', ['loopformer'])
  with pytest.raises(SystemExit, match='^error: no command; give one of these$'):
    cli.main()
  assert capsys.readouterr() == ('', cli.USAGE + '\n')
  monkeypatch.setattr(sys, 'argv', ['loopformer', '--version'])
  cli.main()
  assert capsys.readouterr().out.strip() == loopformer.__version__


@pytest.mark.parametrize('words, module, flags', [
    (['eval', '--workdir=w', '--depths=1'], 'experiments.main', ['--mode=eval', '--workdir=w', '--depths=1']),
    (['generate', '--prompt=--mode=x'], 'experiments.main', ['--mode=generate', '--prompt=--mode=x']),
    (['compare', '--mode=x'], 'experiments.compare', ['--mode=x']),
])
def test_words_become_flags(words, module, flags):
  assert cli.resolved(words) == (module, flags)


@pytest.mark.parametrize('words, message', [
    (['nonsense'], 'error: nonsense: no such command; there are train, eval'),
    (['trian'], 'error: trian: no such command; did you mean train? there are train, eval'),
    (['train', '--mode=eval'], 'error: --mode=eval: the first word, train, is the mode; leave it out'),
    (['--config=a'], 'error: --config=a: no command, which comes first; there are'),
])
def test_mistakes_are_one_line(words, message):
  with pytest.raises(SystemExit, match=re.escape(message)) as error:
    cli.resolved(words)
  assert '\n' not in error.value.code
