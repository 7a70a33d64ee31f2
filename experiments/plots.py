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


def depths(path: Path, curves: Mapping[str, Rows], flat: Mapping[str, float] | None = None):
  """Validation loss against the number of loops.

  Args:
    curves: name -> rows with `budget`, `loss` and, where several seeds were run, `spread` (half the range).
    flat: name -> loss of models that have no loops to choose, drawn as horizontal lines.
  """
  pyplot = _figure()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for name, rows in curves.items():
    rows = sorted((row for row in rows if row['schedule'].isdigit()) if 'schedule' in rows[0] else rows,
                  key=lambda row: row['budget'])
    axes.errorbar([row['budget'] for row in rows], [row['loss'] for row in rows],
                  [row.get('spread', 0.0) for row in rows], marker='o', capsize=3, label=name)
  for name, loss in (flat or {}).items():
    axes.axhline(loss, color='grey', linestyle='--', label=name)
  budgets = sorted({row['budget'] for rows in curves.values() for row in rows})
  axes.set_xscale('log', base=2)
  axes.set_xticks(budgets, [str(budget) for budget in budgets])
  axes.set_xticks([], minor=True)
  axes.set_xlabel('loops')
  axes.set_ylabel('validation loss (nats a token)')
  axes.grid(alpha=0.3)
  axes.legend()
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
