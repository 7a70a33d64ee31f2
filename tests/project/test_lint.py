"""What tools say of the source: lint of all, types of the library, ends of lines. Skipped where a tool is not
installed (extra `dev`).
"""
import re
import subprocess
import sys

import pytest

from tests import parts, tidy


def test_ruff_finds_nothing():
  pytest.importorskip('ruff', reason='ruff is not installed (extra `dev`)')
  done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '.'], cwd=parts.ROOT, capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def mypy(*arguments: str) -> subprocess.CompletedProcess:
  pytest.importorskip('mypy', reason='mypy is not installed (extra `dev`)')
  return subprocess.run([sys.executable, '-m', 'mypy', *arguments], cwd=parts.ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_library_has_the_types_that_it_says():
  done = mypy()
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_who_uses_the_library_has_its_types(tmp_path):
  """Of what the package offers on demand, too: an attribute that is not there is found before anything runs."""
  user = tmp_path / 'user.py'
  user.write_text("import loopformer\n\nloaded = loopformer.load('runs/tiny')\nreveal_type(loaded)\n"
                  "loaded.save('runs/other')\nloaded.paint()\nloopformer.generate(loaded.model)\n")
  lines = mypy(str(user)).stdout.splitlines()
  assert 'Revealed type is' in lines[0] and 'loopformer.api.Loaded' in lines[0], lines
  assert '"Loaded" has no attribute "paint"' in lines[1] and lines[1].partition(': ')[0].endswith('user.py:6')
  assert 'user.py:7' in lines[2] and '[call-arg]' in lines[2]


@pytest.mark.parametrize('text, why', [
    ('a\nb\n', []), ('', []), ('a', ['f:1: ends with no newline']), ('a\n\n', ['f:3: ends with more than one newline']),
    ('a \nb\n', ['f:1: spaces at the end of the line']), ('a\r\n', ['f:1: spaces at the end of the line']),
    ('<' * 7 + ' HEAD\n' + '=' * 7 + '\n', ['f:1: a mark of a merge', 'f:2: a mark of a merge']), ('=' * 8 + '\n', [])])
def test_what_is_not_tidy(text, why):
  assert tidy.faults('f', text) == why


def test_hooks_are_programs_of_this_environment():
  """Each can be started offline; and those of the source say nothing of it now."""
  yaml = pytest.importorskip('yaml')
  repositories = yaml.safe_load((parts.ROOT / '.pre-commit-config.yaml').read_text())['repos']
  assert [repository['repo'] for repository in repositories] == ['local']
  hooks = {hook['id']: hook for hook in repositories[0]['hooks']}
  assert all(hook['language'] == 'system' and hook['entry'].startswith('python -m ') for hook in hooks.values())
  assert set(hooks) == {'ruff', 'mypy', 'tidy'}
  kept = re.compile(hooks['tidy']['exclude'])
  texts = [path for pattern in ('*.md', '*.toml', '*.cfg', '*.cff', 'loopformer/**/*.py', 'experiments/**/*.py',
                                'tests/**/*.py', 'launch/*', 'docs/*.md') for path in parts.ROOT.glob(pattern)
           if path.is_file()]
  names = [name for path in texts if not kept.search(name := str(path.relative_to(parts.ROOT)))]
  assert len(names) > 200
  assert [fault for name in names for fault in tidy.faults(name, (parts.ROOT / name).read_text())] == []
