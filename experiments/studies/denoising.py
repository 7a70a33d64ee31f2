"""Denoising steps against loops in each: bounds and solved grids, at equal arithmetic too.

    python -m experiments.studies.denoising --seeds=0,1 --workdir=runs/diffusion \\
        --out=experiments/reports/masked_diffusion

Trains a denoiser for every number of loops (--depths=1,2,4) and seed; with --ar a model of the same layers that writes
a grid cell by cell; and with --consistency one checkpoint that is asked at all these numbers of loops. Then measures
the bound at every number of loops, and what part of --samples grids is right (valid, and with its clues) for every
order, number of denoising steps and number of loops in each. MFLOP is what a grid costs. What is trained stands in the
work folder, and is not trained again. Writes results.json, bounds.md, table.md and denoising.png.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
import sys
from typing import Any, Iterator

from absl import flags, logging
import numpy as np

from experiments.configs import masked_diffusion as configuration
from experiments.main import PLANNERS, SCORES, check_command, held_out
from experiments.tools import command, plots, records
import loopformer
from loopformer import plans, storage
from loopformer.diffusion import orders
from loopformer.diffusion.measures import Bound
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/masked_diffusion.py'
NEXT = 'cell by cell'
CONSISTENT = 'consistency'
ROWS = 256  # grids at a time
REMASKING = {'cap 0.1': orders.Resampling(sigma=orders.Cap(eta=0.1)), 'rescale 0.5': orders.Resampling(
    sigma=orders.Rescale(eta=0.5))}
ORDERS = {name: orders.Ranked(score=score) for name, score in SCORES.items()} | PLANNERS | REMASKING


def given_loops() -> list[int]:
  """Those of --depths, a model each."""
  return [int(loops) for loops in FLAGS.depths or (1, 2, 4)]


def trained(loops: int, seed: int, workdir: Path, more: str = '') -> Any:
  """The model of a run, which is trained or resumed first; more: an argument of the configuration, such as kind=ar."""
  folder = workdir / f'loops{loops}{"_" * bool(more)}{more.replace("=", "")}_seed{seed}'
  argument = f'{FLAGS.size},loops={loops}{"," * bool(more)}{more}'
  command.train(f'{CONFIG}:{argument}', folder, *FLAGS['set'].value, f'train.seed={seed}')
  return loopformer.load(folder), folder


def bounds(loaded: Any, folder: Path, measured: list[int]) -> dict[str, dict]:
  """Of every number of loops: the bound on held-out examples, nats a cell, and its standard error."""
  rows = evaluate(loaded.model, loaded.params, held_out(loaded.config, folder, loaded.config.train.eval_batches),
                  {str(loops): plans.resolve(loops) for loops in measured}, None,
                  Bound(mask=loaded.model.outputs, draws=16))
  return {row['schedule']: {'loss': row['loss'], 'error': row['error']} for row in rows}


def puzzles(config: Any, count: int) -> dict[str, np.ndarray]:
  """Held-out examples, [count, T]."""
  source = config.task.source('validation', 0)
  some = [source[i % len(source)] for i in range(count)]
  return {name: np.stack([example[name] for example in some]) for name in ('targets', 'weights')}


def answers(loaded: Any, order: Any, steps: int, loops: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(what is written i32[N, T], the examples' targets i32[N, T], their weights f32[N, T]), of --samples examples."""
  model = loaded.model.clone(sampler=dataclasses.replace(loaded.model.sampler, order=order))
  asked, mask = puzzles(loaded.config, FLAGS.samples), model.outputs
  denoiser = model.sampler.serve(model, loaded.params, loaded.tokenizer, rows=min(FLAGS.samples, ROWS),
                                 loops=max(loops, model.loops))
  for number, ids in enumerate(np.where(asked['weights'] > 0, mask, asked['targets']).tolist()):
    denoiser.submit(ids, steps=steps, budget=loops, number=number)
  return np.array([ids for _, ids in denoiser.finished()]), asked['targets'], asked['weights']


def solved(loaded: Any, order: Any, steps: int, loops: int) -> float:
  """The part of grids that is right."""
  return float(loaded.config.task.of.solved(*answers(loaded, order, steps, loops)).mean())


def written(loaded: Any) -> float:
  """The part of whole grids that is valid, of a model that writes cell by cell."""
  of = loaded.config.task.of
  start = len(of.symbols) - 1
  texts = loopformer.generate(loaded.model, loaded.params, loaded.tokenizer, [[start]] * FLAGS.samples,
                              max_new_tokens=of.length, rows=ROWS)
  ids = [loaded.tokenizer.encode(text) for text in texts]
  whole = np.array([(grid + [start] * of.length)[:of.length] for grid in ids])
  return float(of.solved(whole, whole, np.ones(whole.shape)).mean())


def run(seed: int, workdir: Path) -> Iterator[dict]:
  """Measures of one seed, so far: after every order."""
  found = {'bounds': {}, 'solved': []}
  models = [(str(loops), loops, '', [loops]) for loops in given_loops()]
  if FLAGS.consistency:
    models.append((f'{max(given_loops())}, {CONSISTENT}', max(given_loops()), f'consistency={FLAGS.consistency:g}',
                   given_loops()))
  for name, trained_with, more, measured in models:
    loaded, folder = trained(trained_with, seed, workdir, more)
    length = loaded.config.task.length
    found['bounds'][f'trained with {name}'] = bounds(loaded, folder, given_loops())
    for order in FLAGS.orders:
      for loops in measured:
        for steps in map(int, FLAGS.steps):
          cost = loaded.model.flops(length, loops) * length * steps
          found['solved'].append({
              'trained with': name, 'loops': loops, 'order': order, 'steps': steps, 'MFLOP': round(cost / 1e6, 3),
              'solved': solved(loaded, ORDERS[order], steps, loops)})
      yield found
  if FLAGS.ar:
    loops = int(FLAGS.ar)
    loaded, folder = trained(loops, seed, workdir, 'kind=ar')
    row, = evaluate(loaded.model, loaded.params, held_out(loaded.config, folder, loaded.config.train.eval_batches),
                    {'all': plans.resolve(loops)}, None, loaded.config.task.measure)
    length = loaded.config.task.length
    found['bounds'][NEXT] = {str(loops): {'loss': row['loss'], 'error': 0.0}}
    found['solved'].append({'trained with': str(loops), 'loops': loops, 'order': NEXT, 'steps': length,
                            'solved': written(loaded),
                            'MFLOP': round(loaded.model.flops(length, loops) * length / 1e6, 3)})
    yield found


def tables(results: dict[str, dict]) -> tuple[list[dict], list[dict]]:
  """(bounds, solved): rows of tables, a column a seed."""
  first = {}
  for seed, found in results.items():
    for name, own in found['bounds'].items():
      for loops, row in own.items():
        first.setdefault((name, loops), {'model': name, 'loops': loops})[f'seed {seed}'] = round(row['loss'], 4)
  second = {}
  for seed, found in results.items():
    for row in found['solved']:
      columns = ('trained with', 'loops', 'order', 'steps', 'MFLOP')
      second.setdefault(tuple(row[name] for name in columns[:-1]), {name: row[name] for name in columns})[
          f'seed {seed}'] = round(row['solved'], 4)
  seeds = [f'seed {seed}' for seed in results]
  return tuple([{**row, **{seed: row.get(seed, '') for seed in seeds}} for row in table.values()]
               for table in (first, second))


def draw(path: Path, results: dict[str, dict]):
  """Solved grids against what one costs, means over seeds: a panel an order, a curve a number of loops."""
  pyplot = plots.library()
  if pyplot is None:
    return
  rows = [row for found in results.values() for row in found['solved']]
  names = [name for name in dict.fromkeys(row['order'] for row in rows) if name != NEXT]
  figure, panels = pyplot.subplots(1, len(names), figsize=(3.2 * len(names), 3.4), layout='constrained', sharey=True,
                                   squeeze=False)
  for name, axes in zip(names, panels[0]):
    for model, loops in dict.fromkeys((row['trained with'], row['loops']) for row in rows if row['order'] == name):
      own = [row for row in rows if (row['order'], row['trained with'], row['loops']) == (name, model, loops)]
      costs = sorted({row['MFLOP'] for row in own})
      axes.plot(costs, [np.mean([row['solved'] for row in own if row['MFLOP'] == cost]) for cost in costs], marker='o',
                linestyle=':' if CONSISTENT in model else '-',
                label=f'{loops} loops' + f' of {model}' * (CONSISTENT in model))
    if at_once := [row for row in rows if row['order'] == NEXT]:
      axes.plot([row['MFLOP'] for row in at_once], [row['solved'] for row in at_once], 'kx', label=NEXT)
    axes.set(title=name, xlabel='MFLOP a grid', ylim=(-0.03, 1.03))
    plots.doubling(axes)
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel('right grids')
  panels[0][0].legend(fontsize=7)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of experiments/configs/masked_diffusion.py, of Sudoku.')
  flags.DEFINE_list('steps', ['1', '4', '8', '16'], 'Denoising steps.')
  flags.DEFINE_list('orders', ['random', 'likeliest', 'margin', 'confidence'], f'Of {", ".join(ORDERS)}.')
  flags.DEFINE_string('ar', '', 'Loops of a model that writes cell by cell; none by default.')
  flags.DEFINE_float('consistency', 0.0, 'Weight of the consistency of one more model, of the most loops, which is '
                     'asked at all.', lower_bound=0.0)
  flags.DEFINE_integer('samples', 512, 'Grids of every row.', lower_bound=1)


def main(argv):
  check_command('set', 'depths')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  if FLAGS.size not in configuration.SIZES or configuration.SIZES[FLAGS.size].task not in configuration.GRIDS:
    sys.exit(f'error: --size={FLAGS.size}: no size of Sudoku; choose from cpu, gpu')
  command.check_chosen('orders', FLAGS.orders, ORDERS)
  command.check_whole(seeds=FLAGS.seeds, depths=FLAGS.depths, steps=FLAGS.steps)
  if FLAGS.ar and not (FLAGS.ar.isdigit() and int(FLAGS.ar)):
    sys.exit(f'error: --ar={FLAGS.ar}: give a number of loops')
  command.own('size', 'ar', 'consistency', 'samples', 'set', grow=('seeds', 'steps', 'orders'), depths=given_loops())
  workdir, out, results = storage.path(FLAGS.workdir), storage.path(FLAGS.out), {}
  for seed in FLAGS.seeds:
    for results[seed] in run(int(seed), workdir):
      own = tables(results)
      records.report(out, results, bounds=own[0], table=own[1])
      last = results[seed]['solved'][-1]
      print(f'seed {seed}: {last["loops"]} loops, {last["order"]} measured', flush=True)
    draw(out / 'denoising.png', results)
  for rows in own:
    print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
