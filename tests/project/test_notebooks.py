"""The notebooks run: their code cells, one after the other, in a process of its own, with a few steps of training.

Without a kernel, which takes packages and time: what a kernel adds, the display of values, no cell relies on.
"""
import ast
import json
import re

import pytest

from tests import parts

NOTEBOOKS = sorted((parts.ROOT / 'notebooks').glob('*.ipynb'))
RUN = '''
import json, sys
import matplotlib
matplotlib.use('Agg')
space = {'__name__': '__main__'}
for number, cell in enumerate(json.load(open(sys.argv[1]))['cells']):
  if cell['cell_type'] == 'code':
    exec(compile(''.join(cell['source']), f'cell {number}', 'exec'), space)
print('STEPS', space['STEPS'])
'''


def cells(path, kind: str) -> list[dict]:
  return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def test_there_are_notebooks():
  assert [path.stem for path in NOTEBOOKS] == ['quickstart', 'your_own_loop']


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
  pytest.importorskip('matplotlib')
  said = parts.python(RUN, str(path), timeout=1200, LOOPFORMER_NOTEBOOK_STEPS='4')
  assert said.endswith('STEPS 4\n')


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_comes_with_its_outputs(path):
  """As it was executed whole: in order, without an error, with its figures, and small."""
  code = cells(path, 'code')
  assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell['outputs']]
  assert not [output for output in outputs if output['output_type'] == 'error']
  assert sum('image/png' in output.get('data', {}) for output in outputs) >= 2
  assert path.stat().st_size < 400_000
  text = path.read_text()
  assert not re.search(r'/(home|root|work|Users)/', text), 'no path of a machine'


def test_the_cell_of_ones_own_is_as_short_as_is_said():
  source, = (''.join(cell['source']) for cell in cells(parts.ROOT / 'notebooks/your_own_loop.ipynb', 'code')
             if 'class HeavyBall' in ''.join(cell['source']))
  assert isinstance(ast.parse(source).body[0], ast.ClassDef)
  text = ''.join(''.join(cell['source']) for cell in cells(parts.ROOT / 'notebooks/your_own_loop.ipynb', 'markdown'))
  assert re.findall(r'takes (\w+) lines', text) == [str(len(source.splitlines()))] * 2
