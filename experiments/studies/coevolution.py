"""Tokens with latents beside them, against tokens alone: bounds, what only looks like one, and solved grids.

    python -m experiments.studies.coevolution --seeds=0,1 --workdir=runs/ccdd --out=experiments/reports/ccdd

The arms: `tokens`, masked diffusion of the same layers; `context`, with latents that know the whole grid; `random`,
with those that know one token, the control; `corrupted`, with latents of what is visible, whose loss is a bound; and,
if asked for, `slower`, whose latents decay slower than tokens, and `mdit`, `mmdit` and `moe`, `context` with the
paper's networks. What is trained stands in the work folder, and is not trained again. Writes results.json, numbers.md
(nats a cell; `conditional` where it is no bound), table.md and coevolution.png (right grids against denoising steps).
"""
from __future__ import annotations

import dataclasses

from absl import flags, logging
import numpy as np

from experiments.main import check_command, held_out
from experiments.studies.denoising import ORDERS, solved
from experiments.tools import command, plots, records
import loopformer
from loopformer import plans, storage
from loopformer.inference import measures
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics

FLAGS = flags.FLAGS

CCDD = 'experiments/configs/ccdd.py'
ARMS = {'tokens': ('experiments/configs/masked_diffusion.py', ''), 'context': (CCDD, ''),
        'random': (CCDD, 'encoder=tokens'), 'corrupted': (CCDD, 'source=corrupted'), 'slower': (CCDD, 'times=slower'),
        **{kind: (CCDD, f'kind={kind}') for kind in ('mdit', 'mmdit', 'moe')}}


def run(arm: str, seed: int) -> dict:
  """What is measured of one arm and seed, which is trained or resumed first."""
  folder = storage.path(FLAGS.workdir) / f'{arm}-{seed}'
  file, argument = ARMS[arm]
  command.train(f'{file}:{",".join(filter(None, (FLAGS.size, argument)))}', folder, *FLAGS['set'].value,
                f'train.seed={seed}')
  loaded = loopformer.load(folder)
  model, measure = loaded.model, dataclasses.replace(loaded.config.task.measure, draws=4)
  row, = evaluate(model, loaded.params, held_out(loaded.config, folder, loaded.config.train.eval_batches),
                  {'all': plans.resolve(model.loops)}, None, measure)
  name = measures.main_number(measure)
  found = {'number': {'is': 'bound' if name == 'loss' else name, 'nats': row[name], 'error': row['error']},
           'solved': []}
  for order in FLAGS.orders:
    for steps in map(int, FLAGS.steps):
      found['solved'].append({'order': order, 'steps': steps,
                              'solved': solved(loaded, ORDERS[order], steps, model.loops)})
  return found


def tables(results: dict[str, dict]) -> tuple[list[dict], list[dict]]:
  """(numbers, solved): rows of tables, a column a seed."""
  numbers, grids = {}, {}
  for seed, arms in results.items():
    for arm, found in arms.items():
      own = found['number']
      numbers.setdefault(arm, {'arm': arm, 'is': own['is']})[f'seed {seed}'] = round(own['nats'], 4)
      for row in found['solved']:
        key = arm, row['order'], row['steps']
        grids.setdefault(key, dict(zip(('arm', 'order', 'steps'), key)))[f'seed {seed}'] = round(row['solved'], 4)
  seeds = [f'seed {seed}' for seed in results]
  return tuple([{**row, **{seed: row.get(seed, '') for seed in seeds}} for row in table.values()]
               for table in (numbers, grids))


def draw(path, results: dict[str, dict]):
  """Right grids against denoising steps, means over seeds: a panel an order, a curve an arm."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, panels = pyplot.subplots(1, len(FLAGS.orders), figsize=(4 * len(FLAGS.orders), 3.4), layout='constrained',
                                   sharey=True, squeeze=False)
  for order, axes in zip(FLAGS.orders, panels[0]):
    for arm in FLAGS.arms:
      rows = [row for arms in results.values() if arm in arms for row in arms[arm]['solved'] if row['order'] == order]
      steps = sorted({row['steps'] for row in rows})
      axes.plot(steps, [np.mean([row['solved'] for row in rows if row['steps'] == n]) for n in steps],
                marker='o', label=arm)
    axes.set(title=f'order: {order}', xlabel='denoising steps', ylim=(-0.03, 1.03))
    plots.doubling(axes, steps)
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel('right grids')
  panels[0][0].legend(fontsize=8)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of both configurations, of Sudoku: cpu or gpu.')
  flags.DEFINE_list('arms', ['tokens', 'context', 'random', 'corrupted'], f'Of {", ".join(ARMS)}.')
  flags.DEFINE_list('steps', ['4', '8', '16'], 'Denoising steps.')
  flags.DEFINE_list('orders', ['random', 'confidence'], f'Of {", ".join(ORDERS)}.')
  flags.DEFINE_integer('samples', 512, 'Grids of every row.', lower_bound=1)


def main(argv):
  check_command('set')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  for flag, known in (('arms', ARMS), ('orders', ORDERS), ('size', ('cpu', 'gpu'))):
    command.check_chosen(flag, FLAGS[flag].value, known)
  command.check_whole(seeds=FLAGS.seeds, steps=FLAGS.steps)
  command.own('size', 'samples', 'set', grow=('seeds', 'arms', 'steps', 'orders'))
  out, results = storage.path(FLAGS.out), {}
  for seed in FLAGS.seeds:
    for arm in FLAGS.arms:
      results.setdefault(seed, {})[arm] = run(arm, int(seed))
      own = tables(results)
      records.report(out, results, numbers=own[0], table=own[1])
      print(f'seed {seed}: {arm} measured', flush=True)
    draw(out / 'coevolution.png', results)
  for rows in own:
    print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
