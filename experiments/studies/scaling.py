"""Scaling: losses over loops, widths and tokens at equal operations of training, and the laws that fit them.

    python -m experiments.studies.scaling --workdir=runs/scaling --out=experiments/reports/scaling
    python -m experiments.studies.scaling --system=parcae --size=small --operations=1e17,3e17,1e18 \\
        --trained_loops=1,2,4,8 --widths=512,768 --workdir=... --out=...                               # one GPU

Trains a system of experiments/configs/leaderboard.py (`middle` by default: a layer before the loop, one after) at every
width and number of loops, for as many steps as have the given operations of matrix products. Then fits Parcae's law and
the exponent phi of what one loop is worth (experiments/tools/laws.py), with bootstrap intervals over the points. The
intervals say how well these runs fix a number, not how well they would predict larger ones.

Writes points.md and results.json (a row a run), laws.md, loops.md (the best number of loops for every number of
operations, and the exponents of these), and scaling.png. A study that was stopped goes on.
"""
from __future__ import annotations

import concurrent.futures
import math

from absl import flags, logging
import jax

from experiments.configs import leaderboard
from experiments.main import check_command, numbers
from experiments.tools import command, estimate, laws, plots, records
import loopformer
from loopformer import config as configs, storage
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/leaderboard.py'
SYSTEMS = ('middle', 'base_loop', 'parcae', 'huginn', 'algoformer')


def spec(width: int, loops: int, **more) -> str:
  """The configuration of a run."""
  told = ''.join(f',{name}={value}' for name, value in {'width': width, 'loops': loops, **more}.items())
  return f'{CONFIG}:{FLAGS.size},system={FLAGS.system}{told}'


def run(width: int, loops: int, operations: float) -> dict:
  """A row: trains or resumes the run, and reads what it came to."""
  a_step = estimate.step_flops(configs.load(spec(width, loops)))
  steps = round(operations / a_step)
  if steps < 4:
    raise ConfigError(f'--operations: {operations:g} are {operations / a_step:.1f} steps at width {width} with {loops} '
                      'loops; give 4 steps or more')
  workdir = storage.path(FLAGS.workdir)
  folder = workdir / f'{FLAGS.system}-{width}-{loops}-{steps}'
  command.train(spec(width, loops, steps=steps, rate=FLAGS.rate), folder, f"task.folder='{workdir / 'data'}'",
                *FLAGS['set'].value)
  model, params, _, config = loopformer.load(folder)
  sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}
  ends = sum(size for name, size in sizes.items() if name not in ('cell', 'read_in', 'read_out'))
  evals = [row for row in metrics.read_rows(folder / 'metrics.jsonl') if row['kind'] == 'eval']
  return {'width': width, 'loops': loops, 'operations': operations, 'steps': steps,
          'tokens': steps * config.train.batch * config.task.length, 'once': ends, 'looped': sizes['cell'],
          'loss': evals[-1][f'loss@{model.loops}']}


def fitted(points: list[laws.Point], draws: int) -> list[dict]:
  """A row a number of both laws: its value, and its interval."""
  rows = []
  for law in (laws.Unrolled(), laws.Equivalent()):
    if len(points) < len(law.names):
      continue
    values, between = law.told(laws.fit(law, points)), laws.intervals(law, points, draws)
    rows += [{'law': type(law).__name__, 'number': name, 'value': f'{values[name]:.4g}',
              '2.5 %': f'{between[name][0]:.4g}', '97.5 %': f'{between[name][1]:.4g}'} for name in law.names]
  return rows


def draw(path, rows: list[dict]):
  """A panel a width: loss against loops, a curve a number of operations."""
  pyplot = plots.library()
  if pyplot is None:
    return
  widths, costs = sorted({row['width'] for row in rows}), sorted({row['operations'] for row in rows})
  figure, panels = pyplot.subplots(1, len(widths), figsize=(3.6 * len(widths), 3.4), layout='constrained', sharey=True,
                                   squeeze=False)
  for width, axes in zip(widths, panels[0]):
    for i, cost in enumerate(costs):
      own = sorted((row for row in rows if row['width'] == width and row['operations'] == cost),
                   key=lambda row: row['loops'])
      axes.plot([row['loops'] for row in own], [row['loss'] for row in own], marker='o',
                color=pyplot.cm.viridis(i / max(len(costs) - 1, 1)), label=f'{cost:.2g} operations')
    plots.doubling(axes)
    axes.set(title=f'width {width}', xlabel='loops of the training')
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel(plots.LABELS['loss'])
  panels[0][-1].legend(fontsize=7)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set."""
  flags.DEFINE_enum('size', 'cpu', list(leaderboard.SIZES), 'Size of experiments/configs/leaderboard.py.')
  flags.DEFINE_enum('system', 'middle', SYSTEMS, 'System of that file.')
  flags.DEFINE_list('trained_loops', ['1', '2', '4'], 'Numbers of loops.')
  flags.DEFINE_list('widths', ['32', '64'], 'Widths, multiples of the number of heads.')
  flags.DEFINE_list('operations', ['5e10', '1e11', '2e11'], 'Operations of training, of matrix products.')
  flags.DEFINE_float('rate', 3e-3, 'Peak of the learning rate, of all runs.', lower_bound=0.0)
  flags.DEFINE_integer('draws', 200, 'Of the bootstrap.', lower_bound=1)
  flags.DEFINE_integer('together', 1, 'Runs at a time.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  loops, widths, costs = (sorted({int(value) if whole else float(value)
                                  for value in numbers(','.join(given), name, kind)})
                          for given, name, kind, whole in ((FLAGS.trained_loops, '--trained_loops', int, True),
                                                           (FLAGS.widths, '--widths', int, True),
                                                           (FLAGS.operations, '--operations', float, False)))
  out = storage.path(FLAGS.out)
  command.own('size', 'system', 'rate', 'draws', 'set', grow=('trained_loops', 'widths', 'operations'))
  jobs = [(width, count, cost) for cost in costs for width in widths for count in loops]
  rows = []
  with concurrent.futures.ThreadPoolExecutor(FLAGS.together) as pool:
    for row in pool.map(lambda job: run(*job), jobs):
      rows.append(row)
      records.report(out, rows, points=rows)
      draw(out / 'scaling.png', rows)
      print(f'width {row["width"]}, {row["loops"]} loops, {row["operations"]:g} operations: '
            + ('no number' if row['loss'] is None else f'{row["loss"]:.3f}'), flush=True)
  points = [laws.Point(once=row['once'], looped=row['looped'], loops=row['loops'],
                       tokens=row['tokens'], loss=row['loss'])
            for row in rows if row['loss'] is not None and math.isfinite(row['loss'])]
  found = fitted(points, FLAGS.draws)
  storage.write(out / 'laws.md', (metrics.table(found) if found else 'fewer points than a law has numbers') + '\n')
  best = laws.best_loops(points, [row['operations'] for row in rows
                                  if row['loss'] is not None and math.isfinite(row['loss'])])
  slopes = {name: laws.exponent([row['operations'] for row in best], [row[name] for row in best])
            for name in ('loops', 'tokens')}
  storage.write(out / 'loops.md', metrics.table(best) + '\n\n' + ', '.join(
      f'{name} ~ operations^{value:.2f}' for name, value in slopes.items()) + '\n')
  print(metrics.table(rows) + '\n' + (out / 'laws.md').read_text() + (out / 'loops.md').read_text())


if __name__ == '__main__':
  define_flags()
  command.run(main)
