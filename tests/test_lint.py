"""What tools say of the source: types of the public modules. Skipped where a tool is not installed (extra `dev`)."""
import subprocess
import sys

import pytest

from tests import parts


def mypy(*arguments: str) -> subprocess.CompletedProcess:
  pytest.importorskip('mypy', reason='mypy is not installed (extra `dev`)')
  return subprocess.run([sys.executable, '-m', 'mypy', *arguments], cwd=parts.ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_public_modules_have_the_types_that_they_say():
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
