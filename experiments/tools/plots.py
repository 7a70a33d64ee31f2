"""Plots of results; each function writes one picture from rows of numbers. Nothing happens without matplotlib."""
from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Mapping, Sequence
import warnings

from loopformer import storage

Rows = Sequence[Mapping[str, Any]]


def library():
  """matplotlib.pyplot for pictures in files; None, and a line that says so, where it is not installed."""
  try:
    import matplotlib
  except ImportError:
    print('no plot: install matplotlib (the extra `plot`)')
    return None
  matplotlib.use('Agg')
  from matplotlib import pyplot
  return pyplot


def save(figure, path: str | Path, dpi: int):
  """Writes the picture, in the format of the path's suffix, and lets go of the figure."""
  picture = io.BytesIO()
  figure.savefig(picture, dpi=dpi, format=storage.path(path).suffix[1:])
  storage.write(path, picture.getvalue())
  library().close(figure)


def doubling(axes, at: Sequence[int] | None = None):
  """Makes x logarithmic, told in plain numbers: at these values, or at powers of two. Call it when all is drawn: where
  that is less than two doublings, x stays as it is."""
  low, high = axes.dataLim.intervalx
  if at is None and high < 4 * low:
    return
  axes.set_xscale('log', base=2)
  axes.xaxis.set_major_formatter('{x:.10g}')
  if at is not None:
    axes.set_xticks(at, list(map(str, at)))
  axes.set_xticks([], minor=True)


LABELS = {'loss': 'validation loss', 'conditional': 'validation loss, given latents', 'accuracy': 'accuracy',
          'exact': 'sequences all right', 'last': 'the last answer'}
FIXED = 'fixed budget'


def depths(path: Path, curves: Mapping[str, Rows], flat: Mapping[str, float] | None = None, show: str = 'loss'):
  """What `show` names on the validation split, against the number of loops.

  Args:
    curves: name -> rows with `budget`, `show` and, where several seeds were run, `+-` (half the range).
    flat: name -> the same of models that have no loops to choose, drawn as horizontal lines.
  """
  pyplot = library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(7, 4), layout='constrained')
  for name, rows in curves.items():
    rows = sorted((row for row in rows if row['schedule'].isdigit()) if 'schedule' in rows[0] else rows,
                  key=lambda row: row['budget'])
    axes.errorbar([row['budget'] for row in rows], [row[show] for row in rows],
                  [row.get('+-') or 0.0 for row in rows], marker='o', capsize=3, label=name)
  for i, (name, value) in enumerate((flat or {}).items()):
    axes.axhline(value, color=f'C{len(curves) + i}', linestyle='--', label=name)
  budgets = sorted({row['budget'] for rows in curves.values() for row in rows})
  doubling(axes, budgets)
  axes.set_xlabel('loops')
  axes.set_ylabel(LABELS.get(show, show))
  axes.grid(alpha=0.3)
  figure.legend(loc='outside right upper', fontsize=8)
  save(figure, path, 150)


def exits(path: Path, panels: Mapping[str, Rows], show: str = 'loss'):
  """What `show` names against mean loops: a panel a model, in it a curve a rule, and the fixed budgets.

  Args:
    panels: title -> rows with `budget`, `schedule` (a number of loops, or rule:threshold) and `show`.
  """
  pyplot = library()
  if pyplot is None:
    return
  rules = dict.fromkeys(rule_of(row) for rows in panels.values() for row in rows)
  colour = {rule: f'C{i - 1}' if i else 'black' for i, rule in enumerate(rules)}
  across = min(len(panels), 2)
  down = -(-len(panels) // across)
  figure, grid = pyplot.subplots(down, across, figsize=(4.5 * across + 2, 1 + 3 * down), layout='constrained',
                                 squeeze=False, sharex=True, sharey=True)
  for (title, rows), axes in zip(panels.items(), grid.flat):
    for rule in rules:
      points = sorted((row for row in rows if rule_of(row) == rule), key=lambda row: row['budget'])
      if points:
        axes.plot([row['budget'] for row in points], [row[show] for row in points], color=colour[rule], label=rule,
                  **({'linestyle': '--', 'marker': 'x'} if rule == FIXED else {'marker': '.'}))
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
  for axes in grid[-1]:
    axes.set_xlabel('mean loops a token')
  for axes in grid[:, 0]:
    axes.set_ylabel(LABELS.get(show, show))
  handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
  figure.legend(handles.values(), handles.keys(), loc='outside right upper', fontsize=8)
  save(figure, path, 150)


def rule_of(row: Mapping[str, Any]) -> str:
  """The rule of an exit's row, or FIXED for a budget."""
  rule = row['schedule'].partition(':')[0]
  return FIXED if rule.isdigit() else rule


def ranking(path: Path, rows: Rows, title: str, show: str = 'loss'):
  """What `show` names, which is better the lower it is, of every schedule, best at the top."""
  pyplot = library()
  if pyplot is None:
    return
  rows = sorted(rows, key=lambda row: -row[show])
  figure, axes = pyplot.subplots(figsize=(7, 1 + 0.22 * len(rows)), layout='constrained')
  axes.plot([row[show] for row in rows], range(len(rows)), 'o')
  axes.set_yticks(range(len(rows)), [row['schedule'] for row in rows], fontsize=7)
  axes.set_xlabel(LABELS.get(show, show))
  axes.set_title(title, parse_math=False)
  axes.grid(alpha=0.3)
  save(figure, path, 150)


def training(path: Path, rows: Rows, show: str = 'loss'):
  """What `show` names on the validation split at every budget against steps, from the rows of metrics.jsonl."""
  pyplot = library()
  rows = [row for row in rows if row['kind'] == 'eval']
  if pyplot is None or not rows:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for name in [name for name in rows[-1] if name.startswith(f'{show}@')]:
    axes.plot([row['step'] for row in rows], [row[name] for row in rows], marker='.',
              label=name.removeprefix(f'{show}@'))
  axes.set_xlabel('step')
  axes.set_ylabel(LABELS.get(show, show))
  axes.grid(alpha=0.3)
  axes.legend(title='loops')
  save(figure, path, 150)


def progress(path: Path, curves: Mapping[str, Rows], show: str = 'loss'):
  """What `show` names at the deepest evaluated budget, against steps and against seconds of training.

  Args:
    curves: name -> evaluations during training: rows with `step`, `seconds`, and `<show>@<loops>` for each budget.
  """
  pyplot = library()
  if pyplot is None:
    return
  figure, both = pyplot.subplots(1, 2, figsize=(10, 4), layout='constrained', sharey=True)
  deepest = {}
  for name, rows in curves.items():
    depths = [key for key in rows[-1] if key.startswith(f'{show}@') and key.split('@')[1].isdigit()]
    if depths:
      deepest[name] = depths[-1]
  for axes, across in zip(both, ('step', 'seconds')):
    for name, key in deepest.items():
      label = f'{name} ({key.split("@")[1]})'  # the loops are not those that every run was trained for
      axes.plot([row[across] for row in curves[name]], [row[key] for row in curves[name]], marker='.', label=label)
    axes.set_xlabel('step' if across == 'step' else 'seconds of training')
    axes.grid(alpha=0.3)
  both[0].set_ylabel(LABELS.get(show, show))
  both[1].legend(fontsize=7, title='run (loops)', title_fontsize=7)
  save(figure, path, 120)


def growth(path: Path, rows: Rows):
  """Seconds of a training step against what grows, a panel a dimension, and what the arithmetic would have them be.

  Args:
    rows: `grows`, `to`, `s/step` and `GFLOP`, as the benchmark's suite growth makes them.
  """
  pyplot = library()
  if pyplot is None:
    return
  axes_of = list(dict.fromkeys(row['grows'] for row in rows))
  across = min(len(axes_of), 3)
  down = -(-len(axes_of) // across)
  figure, grid = pyplot.subplots(down, across, figsize=(3.2 * across, 2.8 * down), layout='constrained', squeeze=False,
                                 sharey=True)
  for name, axes in zip(axes_of, grid.flat):
    points = [row for row in rows if row['grows'] == name]
    sizes, first = [row['to'] for row in points], points[0]
    axes.plot(sizes, [row['s/step'] for row in points], marker='o', label='measured')
    axes.plot(sizes, [first['s/step'] * row['GFLOP'] / first['GFLOP'] for row in points], linestyle='--', color='black',
              label='as the arithmetic')
    doubling(axes, sizes)
    axes.set_yscale('log', base=2)
    axes.yaxis.set_major_formatter('{x:.10g}')
    axes.set_xlabel(name)
    axes.grid(alpha=0.3)
  for left in grid[:, 0]:
    left.set_ylabel('s a step')
  grid[0, 0].legend(fontsize=8)
  save(figure, path, 150)


SHOWN = 48  # tokens of a prompt in a picture, the last ones
LETTERS = 9  # of a token in a cell
MARKED = 16  # loops that an axis names one by one


def answers(path: Path, rows: Rows, title: str):
  """The likeliest answer at every loop and token, its probability as colour; a line is drawn where it is the last
  loop's and stays so.

  Args:
    rows: `loop`, `place`, `token`, `answer`, `probability` and `settled` of one prompt, loop by loop.
  """
  pyplot = library()
  if pyplot is None:
    return
  rows, left_out = _last(rows)
  columns = [row for row in rows if row['loop'] == 1]
  down, across = rows[-1]['loop'], len(columns)
  figure, axes = pyplot.subplots(figsize=(2.0 + 0.62 * across, 1.9 + 0.3 * down), layout='constrained')
  chances = [[row['probability'] for row in rows if row['loop'] == k] for k in range(1, down + 1)]
  image = axes.imshow(chances, vmin=0, vmax=1, aspect='auto', cmap='viridis')
  for i, row in enumerate(rows):
    axes.text(i % across, i // across, _cut(row['answer']), ha='center', va='center', fontsize=6.5, parse_math=False,
              color='black' if row['probability'] > 0.6 else 'white')
  for x, row in enumerate(columns):
    axes.hlines(row['settled'] - 1.5, x - 0.5, x + 0.5, color='red', linewidth=1.5)
  axes.set_xticks(range(across), [_cut(row['token']) for row in columns], rotation=60, ha='right', fontsize=7)
  for label in axes.get_xticklabels():
    label.set_parse_math(False)
  axes.set_yticks(range(down), range(1, down + 1))
  axes.set_ylabel('loop')
  axes.set_xlabel('token read' + (f' (the last {SHOWN}; {left_out} before)' if left_out else ''))
  axes.set_title(f'{title}: what each loop would answer; below the red line it stays', fontsize=9, parse_math=False)
  figure.colorbar(image, label='probability', pad=0.01)
  _quietly(figure, path)


def motion(path: Path, rows: Rows, title: str):
  """Length of states, angle to the state before, size of the update and entropy of the answer, against loops: every
  token faint, their mean thick.

  Args:
    rows: as of `answers`, with `rms`, `cosine`, `update` and `entropy`.
  """
  pyplot = library()
  if pyplot is None:
    return
  labels = {'rms': 'rms of the state', 'cosine': 'cosine to the state before', 'update': 'update / state',
            'entropy': 'entropy of the answer (nats)'}
  at = range(1, rows[-1]['loop'] + 1)
  figure, panels = pyplot.subplots(1, len(labels), figsize=(13, 3.2), layout='constrained')
  for axes, (name, label) in zip(panels, labels.items()):
    values = [[row[name] for row in rows if row['loop'] == k] for k in at]
    axes.plot(at, values, color='C0', alpha=0.25, linewidth=0.8)
    axes.plot(at, [sum(of) / len(of) for of in values], color='C0', marker='o', linewidth=2)
    axes.set_xlabel('loop')
    axes.set_title(label, fontsize=10, parse_math=False)
    if len(at) <= MARKED:
      axes.set_xticks(at)
    axes.grid(alpha=0.3)
  figure.suptitle(title, fontsize=10, parse_math=False)
  _quietly(figure, path)


def attention(path: Path, rows: Rows, title: str):
  """Entropy of attention at every loop: a panel a layer, a line a head; the colours are the same in all.

  Args:
    rows: `loop`, `layer`, `head` and `entropy`, a mean over tokens.
  """
  pyplot = library()
  if pyplot is None:
    return
  layers = list(dict.fromkeys(row['layer'] for row in rows))
  across = min(len(layers), 6)
  down = -(-len(layers) // across)
  figure, grid = pyplot.subplots(down, across, figsize=(1.5 + 2.4 * across, 0.8 + 2.3 * down), layout='constrained',
                                 squeeze=False, sharex=True, sharey=True)
  for axes, layer in zip(grid.flat, layers):
    own = [row for row in rows if row['layer'] == layer]
    for head in dict.fromkeys(row['head'] for row in own):
      line = [row for row in own if row['head'] == head]
      axes.plot([row['loop'] for row in line], [row['entropy'] for row in line], marker='.', label=f'head {head}')
    if own[-1]['loop'] <= MARKED:
      axes.set_xticks(sorted({row['loop'] for row in own}))
    axes.set_title(f'layer {layer}', fontsize=9)
    axes.grid(alpha=0.3)
  for axes in list(grid.flat)[len(layers):]:
    axes.set_visible(False)
  for axes in grid[-1]:
    axes.set_xlabel('loop')
  for axes in grid[:, 0]:
    axes.set_ylabel('nats')
  if len({row['head'] for row in rows}) <= 12:
    grid[0, 0].legend(fontsize=6)
  figure.suptitle(f'{title}: entropy of attention, mean over tokens', fontsize=10, parse_math=False)
  _quietly(figure, path)


def _last(rows):
  """The rows of the last SHOWN tokens, and how many tokens come before these."""
  left_out = max(0, 1 + max(row['place'] for row in rows) - SHOWN)
  return [row for row in rows if row['place'] >= left_out], left_out


def _cut(text):
  return text if len(text) <= LETTERS else text[:LETTERS - 1] + '\u2026'


def _quietly(figure, path):
  """As `save`, without a warning for every letter that matplotlib's font does not have."""
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', message='Glyph')
    save(figure, path, 130)
