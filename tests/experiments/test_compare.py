"""What a comparison refuses before it trains, and what its results look like when a run has diverged."""
import json
import math
import subprocess
import sys

import pytest

from experiments import main
from experiments.tools import command, plots, records
from loopformer.inference.measures import LESS, MORE
from loopformer.training import metrics
from tests import parts

RUN = f'{parts.ROOT}/experiments/configs'


def compare(tmp_path, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'experiments.compare', f'--workdir={tmp_path}/runs', f'--out={tmp_path}/out', *arguments],
      capture_output=True, text=True, cwd=parts.ROOT, timeout=300)


@pytest.mark.parametrize('arguments, message', [
    (['--show=exact', '--run=icl=CONFIGS/looped_icl.py:cpu'],
     'error: --show = exact: the run icl does not report it; choose one of loss, last, tokens, state norm'),
    (['--show=last', '--run=hop=CONFIGS/latent_thoughts.py', '--run=text=CONFIGS/intra_layer.py'],
     'error: --show = last: the run text does not report it; choose one of loss, perplexity, bits_per_byte'),
    (['--budgets=1,x', '--run=hop=CONFIGS/latent_thoughts.py'], 'error: --budgets=1,x'),
    (['--depths=1', '--run=hop=CONFIGS/latent_thoughts.py'],
     'error: --depths: this command does not read it; leave it out'),
], ids=['no run', 'one run', 'budgets', 'unread'])
def test_what_no_plot_could_show_is_refused_before_training(arguments, message, tmp_path):
  done = compare(tmp_path, *(argument.replace('CONFIGS', RUN) for argument in arguments))
  assert done.returncode != 0 and message in done.stderr
  assert not (tmp_path / 'runs').exists() and not (tmp_path / 'out').exists()


def test_a_run_without_a_loss_is_known_by_what_it_has_in_its_place(tmp_path):
  def seed(value):
    rows = [{'budget': n, 'schedule': str(n), 'conditional': value, 'accuracy': 0.5, 'tokens': 8} for n in (1, 2)]
    return {'tests': {'validation': rows}, 'number': 'conditional', 'parameters': 3, 'diagnosis': {}, 'seconds': 6.0,
            'curve': [{'step': 1, 'seconds': 6.0, 'conditional@2': value}]}

  code = """
import json, pathlib, sys
from absl import flags
from experiments import compare
runs, out = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
compare.draw(out, runs, 'conditional')
print(json.dumps(compare.summary(runs) + compare.summary({'a': runs['a'][:1]})))
"""
  row, alone, *_ = json.loads(parts.python(code, json.dumps({'a': [seed(0.25), seed(0.75)]}),
                                           str(tmp_path)).splitlines()[-1])[::2]
  assert (row['conditional'], row['+-'], 'loss' in row) == (0.5, 0.25, False)
  assert (alone['conditional'], alone['+-']) == (0.25, '')  # one seed has no range


def test_plots_show_what_the_rows_have(tmp_path):
  rows = [{'budget': n, 'schedule': str(n), 'conditional': 0.5 / n} for n in (1, 2)]
  for name in ('depths', 'exits', 'sweep'):
    main.write(tmp_path, name, rows, 'a', 'conditional')
    assert (tmp_path / f'{name}.csv').exists()
  plots.training(tmp_path / 'training.png', [{'kind': 'eval', 'step': 1, 'conditional@2': 0.5}], 'conditional')


def test_the_best_schedule_is_the_first():
  rows = [{'loss': loss} for loss in (2.0, 1.0, 3.0)]
  assert main.ranked(rows, 'loss', LESS) == [
      {'rank': 1, 'loss': 1.0}, {'rank': 2, 'loss': 2.0}, {'rank': 3, 'loss': 3.0}]
  assert [row['loss'] for row in main.ranked(rows, 'loss', MORE)] == [3.0, 2.0, 1.0]


def test_numbers_that_are_not_finite_are_null(tmp_path):
  path = tmp_path / 'results.json'
  records.write(path, {'a': [1.5, math.nan, {'b': -math.inf}], 'c': (2, None, 'NaN'), 'd': True})

  def refuse(name):
    raise AssertionError(f'{name} is no JSON')

  assert json.loads(path.read_text(), parse_constant=refuse) == {
      'a': [1.5, None, {'b': None}], 'c': [2, None, 'NaN'], 'd': True}


@pytest.mark.parametrize('path', sorted((parts.ROOT / 'experiments/reports').rglob('*.json')), ids=str)
def test_reports_are_json(path):
  def refuse(name):
    raise AssertionError(f'{path}: {name} is no JSON')

  json.loads(path.read_text(), parse_constant=refuse)


def test_studies_write_results_and_tables_and_check_their_words(tmp_path):
  records.report(tmp_path / 'new/out', {'a': math.nan}, table=[{'n': 1}], more=[{'m': 0.5}])
  assert json.loads((tmp_path / 'new/out/results.json').read_text()) == {'a': None}
  assert [(tmp_path / f'new/out/{name}.md').read_text() for name in ('table', 'more')] == [
      '| n |\n|--:|\n| 1 |\n', '|      m |\n|-------:|\n| 0.5000 |\n']
  command.check_chosen('kinds', ['a', 'b'], {'a': 1, 'b': 2})
  command.check_whole(seeds=['0', '12'], steps=['3'], depths=None)
  for check, names in ((lambda: command.check_chosen('kinds', ['a', 'x'], ('a', 'b')),
                        "--kinds=a,x: there is no 'x' here; choose from a, b"),
                       (lambda: command.check_chosen('size', 'x', ('a', 'b')), "--size=x: there is no 'x' here"),
                       *((lambda text=text: command.check_whole(seeds=[text]),
                          f'--seeds={text}: give whole numbers .* 0 to 42949')
                         for text in ('-1', 'a', '', str(2 ** 32))),
                       (lambda: command.check_once('rates', [0.001, 1e-3]),
                        '--rates=0.001,0.001: 0.001 stands there more'),
                       (lambda: command.check_whole(steps=['2', '0']), '--steps=2,0: .* 1 or more')):
    with pytest.raises(SystemExit, match=names):
      check()


def test_a_table_of_no_rows_is_none():
  assert metrics.table([]) == '' and metrics.table([{'a': 1}]).splitlines()[0] == '| a |'


def test_means_over_seeds_are_made_in_one_way():
  rows = [{'loss': 1.0, 'loops': 2, 'schedule': '2'}, {'loss': 3.0, 'loops': 2, 'schedule': '2'}]
  assert records.means(rows, 'loss') == {'loss': 2.0, 'loops': 2.0, '+-': 1.0}
  assert records.means(rows[:1], 'loss') == {'loss': 1.0, 'loops': 2.0, '+-': ''}


def test_logarithmic_axes_are_told_in_plain_numbers():
  """Of a range that has no two doublings nothing would be told: it stays as it is."""
  pyplot = pytest.importorskip('matplotlib.pyplot')
  figure, (wide, given, short) = pyplot.subplots(1, 3, figsize=(18, 4))
  for axes, values, at in ((wide, [2, 18], None), (given, [1, 3], [1, 3]), (short, [5, 7], None)):
    axes.plot(values, values)
    plots.doubling(axes, at)
  figure.canvas.draw()
  told = [[label.get_text() for label in axes.get_xticklabels(which='both')] for axes in (wide, given)]
  assert ({'2', '4', '8', '16'} <= set(told[0]) and told[1] == ['1', '3']
          and not any('10' in text or '^' in text for text in told[0]))
  assert [axes.get_xscale() for axes in (wide, given, short)] == ['log', 'log', 'linear']
  pyplot.close(figure)


def test_growth_is_told_in_plain_numbers(tmp_path, monkeypatch):
  """Seconds as well as sizes."""
  pytest.importorskip('matplotlib')
  labels = []

  def keep(figure, path, dpi):
    figure.canvas.draw()
    labels.extend(label.get_text() for label in figure.axes[0].get_yticklabels())

  monkeypatch.setattr(plots, 'save', keep)
  plots.growth(tmp_path / 'growth.png', [{'grows': 'loops', 'to': 2 ** n, 's/step': 0.5 * 2 ** n, 'GFLOP': 2.0 ** n}
                                         for n in range(4)])
  assert {'0.5', '1', '2', '4'} <= set(labels) and not any('^' in label for label in labels), labels
