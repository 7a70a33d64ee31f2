"""Examples of the documents and reports, as they are written: every command's module and flags are there and take what
they are given, configurations are found, fields exist; and every name of the library that Python examples use. Nothing
is trained."""
import ast
import configparser
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import tempfile

import pytest

from experiments import cli
from loopformer import config as configs
from tests import parts

DOCUMENTS = sorted(['README.md', 'CONTRIBUTING.md', 'launch/README.md',
                    *(f'docs/{path.name}' for path in (parts.ROOT / 'docs').glob('*.md')),
                    *(str(path.relative_to(parts.ROOT)) for path in (parts.ROOT / 'experiments').rglob('README.md'))])
CHECK = '''
import contextlib, importlib, io, json, sys
from absl import flags
from loopformer import config as configs
from tests import commands

def check(module, words):
  """Raises what the command would say of its flags before it does anything."""
  flags.FLAGS([module, *words])
  if module != 'experiments.main':
    return
  main = sys.modules[module]
  F = flags.FLAGS
  main.check_flags(F.mode, main.given_flags())
  main.given_schedules(), main.given_memory(), main.given_sampler(), main.leaves(F.exits or '', '--exits')
  if F.mode in ('train', 'plan') and F.config is not None:
    name, _, argument = F.config.partition(':')
    configs._file_of(name)
    if 'runs/' not in argument:  # which would have to be there
      configs.load(F.config, F.set)

wrong = []
for module, given in json.loads(sys.argv[1]).items():
  for flag in commands.flags_of_commands():
    delattr(flags.FLAGS, flag)
  for name in [name for name in sys.modules if name.partition('.')[0] == 'experiments']:
    del sys.modules[name]
  found = importlib.import_module(module)
  if 'define_flags' in vars(found):  # which defines its own where it is the program
    found.define_flags()
  for where, words in given:
    try:
      check(module, words)
    except (Exception, SystemExit) as error:
      wrong.append(f'{where}: {module} {" ".join(words)}: {error}')
    flags.FLAGS.unparse_flags()
    for name in flags.FLAGS:
      flags.FLAGS[name].unparse()
print(json.dumps(wrong))
'''


def blocks(name: str, language: str) -> list[tuple[int, str]]:
  """(line of its beginning, text) of every block of a document in a language."""
  text = (parts.ROOT / name).read_text()
  return [(text[:found.start()].count('\n') + 2, found[1])
          for found in re.finditer(rf'^```{language}\n(.*?)^```', text, re.MULTILINE | re.DOTALL)]


def lines(name: str) -> list[tuple[str, list[str]]]:
  """(place, words) of every line of shell: those of blocks, and those that are indented and begin with a command."""
  found, text = [], (parts.ROOT / name).read_text()
  indented = [(text[:line.start()].count('\n') + 1, line[1]) for line in re.finditer(
      r'^ {4,}((?:python -m|bash|loopformer) (?:.*\\\n)*.*\n)', text, re.MULTILINE)]
  for start, block in [*blocks(name, 'bash'), *indented]:
    joined = block.replace('\\\n', ' ')
    found += [(f'{name}:{start}', words) for line in joined.splitlines() if (words := shlex.split(line, comments=True))]
  return found


def command(words: list[str]) -> tuple[str, list[str]] | None:
  """(module, flags) of a line that runs a command of ours; None of another."""
  words = words[next((n for n, word in enumerate(words) if not re.fullmatch(r'\w+=\S*', word)), 0):]
  if words[0] == 'loopformer':
    return cli.resolved(words[1:])
  if re.fullmatch(r'(.*/)?python3?', words[0]) and words[1] == '-m' and words[2].startswith('experiments'):
    return 'experiments.benchmark.__main__' if words[2] == 'experiments.benchmark' else words[2], words[3:]
  return None


def started(script: str, *arguments: str) -> list[tuple[str, list[str]]]:
  """(place, words) of every command that a script of shell gives the Python that it is told."""
  with tempfile.TemporaryDirectory() as folder:
    told, python = pathlib.Path(folder, 'told'), pathlib.Path(folder, 'python')
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$(printf "%q " "$@")" >> {told}\n')
    python.chmod(0o755)
    subprocess.run(['bash', script, *arguments], cwd=parts.ROOT, env={**os.environ, 'PYTHON': str(python)}, check=True)
    return [(script, ['python', *shlex.split(line)]) for line in told.read_text().splitlines()]


VARIABLES = {'file': 'ouro', 'seed': '0', 'EXITS': 'entropy:0.5'}  # of the shell, in loops that documents write


def filled(words: list[str]) -> list[str]:
  """With values of variables, and without dots, which stand for more words."""
  return [re.sub(r'\$(\w+)', lambda name: VARIABLES.get(name[1], name[0]), word) for word in words if word != '...']


EVERY = [(where, words) for name in DOCUMENTS for where, words in lines(name)]


MISTAKES = [['--colour=red'], ['--mode=eval', '--workdir=w', '--budget=8'], ['--config=loopfromer:tiny', '--workdir=w'],
            ['--config=loopformer:tiny', '--workdir=w', '--set', 'train.stepz=1'],
            ['--workdir=w', '--mode=eval', '--depths=1', '--step=x']]


def test_commands_take_the_flags_that_they_are_given():
  """And of each kind of mistake, in a flag, its mode, a configuration, a field, a number, it is seen that it is found.
  """
  given = {'experiments.main': [(f'mistake {n}', words) for n, words in enumerate(MISTAKES)]}
  script = started('experiments/studies/gpu.sh', 'runs', 'out')
  for where, words in (*EVERY, *script):
    if found := command(words):
      given.setdefault(found[0], []).append((where, filled(found[1])))
  assert (sum(map(len, given.values())) > 110 and len(given) > 20 and len(script) == 28
          and {'experiments.main', 'experiments.tools.export'} <= set(given))
  wrong = json.loads(parts.python(CHECK, json.dumps(given)).splitlines()[-1])
  assert [line.partition(':')[0] for line in wrong[:len(MISTAKES)]] == [
      f'mistake {n}' for n in range(len(MISTAKES))], wrong
  assert wrong[len(MISTAKES):] == []


def test_scripts_are_there():
  scripts = {(where, word) for where, words in EVERY for word in words[:2] if re.match(r'(\./)?launch/', word)}
  assert len(scripts) > 5
  assert [(where, script) for where, script in scripts if not (parts.ROOT / script).is_file()] == []


def missing(text: str) -> list[str]:
  """Paths of the repository that running text names, and where nothing is; blocks of code may name what will be."""
  text = re.sub(r'(?ms)^```.*?^```|^ {4,}\S.*?$', '', text)
  paths = re.findall(r'(?<![\w/.-])(?<!\]\()((?:loopformer|experiments|tests|docs|launch|notebooks)/[\w./-]*\w)', text)
  return [path for path in paths if not (parts.ROOT / path).exists()]


@pytest.mark.parametrize('name', [*DOCUMENTS, 'CHANGELOG.md'])
def test_paths_are_there(name):
  assert missing((parts.ROOT / name).read_text()) == []


def test_paths_that_are_not_there_are_seen():
  text = ('(tests/test_layout.py), `docs/nothing.md`, [a](docs/other.md); loopformer/types.py, tests/project.\n\n'
          '    cat docs/nothing2.md\n')
  assert missing(text) == ['tests/test_layout.py', 'docs/nothing.md']


def test_figures_of_the_first_page_are_those_of_the_reports():
  """Jumps along pointers, of the first command's checkpoint; and how the leaderboard's rates were chosen."""
  def report(name):
    return json.loads((parts.ROOT / 'experiments/reports' / name).read_text())

  page, jumps = (parts.ROOT / 'README.md').read_text(), report('dial/results.json')
  told = re.search(r'^\| jumps along pointers: right answers \|(.*)\|$', page, re.MULTILINE)[1].split('|')
  of_loops = {row['loops']: row['validation'] for row in jumps['0']['loopformer']}
  assert [float(number) for number in told] == pytest.approx([of_loops[n] for n in (1, 2, 4, 8)], abs=0.005)
  worse = float(re.search(r'Another seed of the puzzle .* ends at (0\.\d+)', page)[1])
  assert worse == pytest.approx(jumps['1']['loopformer'][-1]['validation'], abs=0.005)
  assert page.count('best of three learning rates') == 1
  rates = {task: report(f'leaderboard/{task}/made_with.json')['rates'] for task in ('text', 'p_hop', 'arithmetic')}
  assert {task: len(tried) for task, tried in rates.items()} == {'text': 3, 'p_hop': 1, 'arithmetic': 1}
  assert 'on hops and sums at one' in page


def test_reports_of_systems_quote_the_leaderboard_as_it_is():
  """What stands there of losses and accuracies, to two places and more."""
  folder, quoted = parts.ROOT / 'experiments/reports', 0
  board = {float(number) for task in ('text', 'p_hop', 'arithmetic') for name in ('table', 'budgets')
           for number in re.findall(r'\d+\.\d+', (folder / f'leaderboard/{task}/{name}.md').read_text())}
  for report in folder.glob('*/README.md'):
    _, found, said = report.read_text().partition('**Beside all others, at equal operations of training**')
    for number in re.findall(r'\d\.\d\d+', said.partition('\n\n')[0]):
      places = len(number) - 2
      assert any(abs(float(number) - value) <= 0.501 * 10 ** -places for value in board), (report.parent.name, number)
      quoted += 1
    assert found or report.parent.name not in {'ouro', 'mor', 'plt', 'parcae', 'huginn', 'shift', 'melt', 'loopus'}
  assert quoted > 10


def test_extras_are_all_told_of():
  """In one line of the guide, which one can copy."""
  setup = configparser.ConfigParser()
  setup.read(parts.ROOT / 'setup.cfg')
  told = re.search(r"pip install -e '\.\[([\w,]+)\]'", (parts.ROOT / 'docs/guide.md').read_text())[1]
  assert sorted(told.split(',')) == sorted(setup['options.extras_require'])


def test_fields_exist_that_lines_replace():
  """Of blocks that list changes alone, for the README's first configuration."""
  tiny, count = configs.load('loopformer:tiny'), 0
  for _, words in EVERY:
    config = tiny
    for change in words[1::2] if words[0] == '--set' else ():
      config, count = configs.override(config, change), count + 1
  assert count > 5


def names(tree: ast.AST) -> set[str]:
  """What of the library a text uses by whole names, such as loopformer.convert.from_official, or imports."""
  def chain(node):
    if isinstance(node, ast.Name):
      return node.id
    return f'{inner}.{node.attr}' if isinstance(node, ast.Attribute) and (inner := chain(node.value)) else None

  used = {name for node in ast.walk(tree) if (name := chain(node))}
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom):
      used |= {f'{node.module}.{name.name}' for name in node.names}
    if isinstance(node, ast.Import):
      used |= {name.name for name in node.names}
  return {name for name in used if name.partition('.')[0] in ('loopformer', 'experiments')}


def found(name: str):
  """What a whole name stands for. Raises ImportError or AttributeError where there is nothing."""
  first, *rest = name.split('.')
  value, path = importlib.import_module(first), first
  for word in rest:
    path = f'{path}.{word}'
    if not hasattr(value, word):
      importlib.import_module(path)
    value = getattr(value, word)
  return value


@pytest.mark.parametrize('place', [f'{name}:{start}' for name in DOCUMENTS for start, _ in blocks(name, 'python')])
def test_python_uses_what_is_there(place):
  name, _, start = place.rpartition(':')
  for used in names(ast.parse(dict(blocks(name, 'python'))[int(start)])):
    found(used)


def test_names_that_are_not_there_are_seen():
  assert names(ast.parse('import loopformer\nloopformer.paint(x).y')) == {'loopformer', 'loopformer.paint'}
  with pytest.raises(ImportError):
    found('loopformer.paint')
