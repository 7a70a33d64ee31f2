"""Plots of results; each function writes one picture from rows of numbers. Nothing happens without matplotlib."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

Rows = Sequence[Mapping[str, Any]]


def _figure():
  try:
    import matplotlib
  except ImportError:
    print('no plot: install matplotlib (the extra `plot`)')
    return None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  return pyplot


LABELS = {'loss': 'validation loss', 'accuracy': 'accuracy', 'exact': 'sequences all right',
          'last': 'the last answer'}


def depths(path: Path, curves: Mapping[str, Rows], flat: Mapping[str, float] | None = None, show: str = 'loss'):
  """What `show` names on the validation split, against the number of loops.

  Args:
    curves: name -> rows with `budget`, `show` and, where several seeds were run, `spread` (half the range).
    flat: name -> the same of models that have no loops to choose, drawn as horizontal lines.
  """
  pyplot = _figure()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for name, rows in curves.items():
    rows = sorted((row for row in rows if row['schedule'].isdigit()) if 'schedule' in rows[0] else rows,
                  key=lambda row: row['budget'])
    axes.errorbar([row['budget'] for row in rows], [row[show] for row in rows],
                  [row.get('spread', 0.0) for row in rows], marker='o', capsize=3, label=name)
  for i, (name, value) in enumerate((flat or {}).items()):
    axes.axhline(value, color=f'C{len(curves) + i}', linestyle='--', label=name)
  budgets = sorted({row['budget'] for rows in curves.values() for row in rows})
  axes.set_xscale('log', base=2)
  axes.set_xticks(budgets, [str(budget) for budget in budgets])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('loops')
  axes.set_ylabel(LABELS.get(show, show))
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def exits(path: Path, rows: Rows, title: str):
  """Loss against mean loops: a curve a rule, and the fixed budgets for comparison."""
  pyplot = _figure()
  if pyplot is None:
    return
  curves = {}
  for row in rows:
    rule = row['schedule'].partition(':')[0]
    curves.setdefault('fixed budget' if rule.isdigit() else rule, []).append(row)
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for name, points in curves.items():
    points = sorted(points, key=lambda row: row['budget'])
    axes.plot([row['budget'] for row in points], [row['loss'] for row in points], marker='o', label=name)
  axes.set_xlabel('mean loops a token')
  axes.set_ylabel('validation loss (nats a token)')
  axes.set_title(title)
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def ranking(path: Path, rows: Rows, title: str):
  """Loss of every schedule, best at the top."""
  pyplot = _figure()
  if pyplot is None:
    return
  rows = sorted(rows, key=lambda row: -row['loss'])
  figure, axes = pyplot.subplots(figsize=(7, 1 + 0.22 * len(rows)), layout='constrained')
  axes.plot([row['loss'] for row in rows], range(len(rows)), 'o')
  axes.set_yticks(range(len(rows)), [row['schedule'] for row in rows], fontsize=7)
  axes.set_xlabel('validation loss (nats a token)')
  axes.set_title(title)
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def training(path: Path, rows: Rows):
  """Validation loss at every budget against steps, from the rows of metrics.jsonl."""
  pyplot = _figure()
  rows = [row for row in rows if row['kind'] == 'eval']
  if pyplot is None or not rows:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for name in [name for name in rows[-1] if name.startswith('loss@')]:
    axes.plot([row['step'] for row in rows], [row[name] for row in rows], marker='.', label=name.removeprefix('loss@'))
  axes.set_xlabel('step')
  axes.set_ylabel('validation loss (nats a token)')
  axes.grid(alpha=0.3)
  axes.legend(title='loops')
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def progress(path: Path, curves: Mapping[str, Rows], show: str = 'loss'):
  """What `show` names at the deepest evaluated budget, against steps and against seconds of training.

  Args:
    curves: name -> evaluations during training: rows with `step`, `seconds`, and `<show>@<loops>` for each budget.
  """
  pyplot = _figure()
  if pyplot is None:
    return
  figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
  for axes, across in zip(both, ('step', 'seconds')):
    for name, rows in curves.items():
      depths = [key for key in rows[-1] if key.startswith(f'{show}@') and key.split('@')[1].isdigit()]
      if depths:
        axes.plot([row[across] for row in rows], [row[depths[-1]] for row in rows], marker='.', label=name)
    axes.set_xlabel('step' if across == 'step' else 'seconds of training')
    axes.grid(alpha=0.3)
  both[0].set_ylabel(LABELS.get(show, show))
  both[1].legend(fontsize=7)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)
