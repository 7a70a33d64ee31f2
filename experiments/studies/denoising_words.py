"""Word problems by denoising: what order, steps and loops the last product needs, and loops of a padded model alone.

    python -m experiments.studies.denoising_words --seeds=0 --workdir=runs/words \\
        --out=experiments/reports/masked_diffusion/words

Theory makes S denoising steps of K loops a padded transformer of S K loops, and wants about log n steps of words of n
letters where a planner says what is written next (Svete and Sabharwal, 2510.13117, theorems 3.1 and 3.2). Trains a
denoiser of experiments/configs/masked_diffusion.py for every number of loops (--depths=1,2,4), whose slots hold all
running products; and one of experiments/configs/padded.py for every number of --padded, that reads all letters and as
many fillers as there are slots, and answers for every prefix at once. Then tells of held-out words, for every order,
number of steps and number of loops, how often the last slot is right, all of them are, and any is. What is trained
stands in the work folder, and is not trained again. Writes results.json and table.md after every row, and words.png.
"""
from __future__ import annotations

from pathlib import Path
import sys
from typing import Any, Iterator

from absl import flags, logging

from experiments.configs import masked_diffusion, padded
from experiments.main import check_command
from experiments.studies.denoising import ORDERS, answers, given_loops
from experiments.studies.padded_depth import measure
from experiments.tools import command, plots, records
import loopformer
from loopformer import storage
from loopformer.training import metrics

FLAGS = flags.FLAGS

DENOISERS, PADDED = (f'experiments/configs/{name}.py' for name in ('masked_diffusion', 'padded'))
AT_ONCE = 'padded'  # the name of rows without denoising


def letters() -> int:
  """Those of a word."""
  return FLAGS.letters or masked_diffusion.SIZES[FLAGS.size].letters


def trained(config: str, argument: str, seed: int, workdir: Path, *changes: str) -> Path:
  """The folder of a run, which is trained or resumed first."""
  folder = workdir / (f'{FLAGS.task}{letters()}_{Path(config).stem}_'
                      f'{argument.replace(",", "_").replace("=", "")}_seed{seed}')
  command.train(f'{config}:{FLAGS.size},task={FLAGS.task},{argument}', folder, *changes, *FLAGS['set'].value,
                f'train.seed={seed}')
  return folder


def judged(loaded: Any, name: str, steps: int, loops: int) -> dict[str, Any]:
  """The row of an order, steps and loops."""
  of, length = loaded.config.task.of, loaded.config.task.length
  made = answers(loaded, ORDERS[name], steps, loops)
  written, targets, weights = made
  return {'order': name, 'steps': steps, 'loops': loops, 'steps x loops': steps * loops,
          'MFLOP': loaded.model.flops(length, loops) * length * steps / 1e6, 'last': float(of.answered(*made).mean()),
          'all': float(of.solved(*made).mean()), 'a slot': float((written == targets)[weights > 0].mean())}


def run(seed: int, workdir: Path) -> Iterator[dict]:
  """Rows of a seed, one after another."""
  for loops in given_loops():
    loaded = loopformer.load(trained(DENOISERS, f'loops={loops},letters={letters()}', seed, workdir))
    for name in FLAGS.orders:
      for steps in map(int, FLAGS.steps):
        yield judged(loaded, name, steps, loops)
  slots = letters() + (FLAGS.task not in padded.GROUPS)
  words = [f'task.of.of.of.{field}={letters()}' for field in ('shortest', 'longest', 'room', 'limit')]
  for loops in map(int, FLAGS.padded):
    argument = f'loops={loops},lengths=fixed,attention=both,fillers={slots}'
    found = measure(trained(PADDED, argument, seed, workdir, *words))
    yield {'order': AT_ONCE, 'steps': 1, 'loops': loops, 'steps x loops': loops, 'MFLOP': found['MFLOP'],
           'last': found['last'], 'a slot': found['accuracy']}


def table(results: dict[str, list[dict]]) -> list[dict]:
  """A row for every seed and measurement."""
  shown = ('MFLOP', 'last', 'all', 'a slot')
  return [{'seed': seed, **row, **{name: round(row[name], 3) if name in row else '' for name in shown}}
          for seed, rows in results.items() for row in rows]


def draw(path: Path, rows: list[dict]):
  """How often the last slot is right against steps times loops, of one seed: a panel an order, a curve a number of
  loops.
  """
  pyplot = plots.library()
  if pyplot is None:
    return
  names = [name for name in dict.fromkeys(row['order'] for row in rows) if name != AT_ONCE]
  figure, panels = pyplot.subplots(1, len(names), figsize=(3.4 * len(names), 3.4), layout='constrained', sharey=True,
                                   squeeze=False)
  for name, axes in zip(names, panels[0]):
    for loops in dict.fromkeys(row['loops'] for row in rows if row['order'] == name):
      own = [row for row in rows if (row['order'], row['loops']) == (name, loops)]
      axes.plot([row['steps x loops'] for row in own], [row['last'] for row in own], marker='o',
                label=f'{loops} loops a step')
    own = [row for row in rows if row['order'] == AT_ONCE]
    axes.plot([row['loops'] for row in own], [row['last'] for row in own], 'k--x', label='padded, loops alone')
    axes.set(title=name, xlabel='steps x loops', ylim=(0.4, 1.03))
    plots.doubling(axes)
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel('last slot right')
  panels[0][0].legend(fontsize=7)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of both configurations.')
  flags.DEFINE_string('task', 'parity', f'One of {", ".join(padded.WORDS)}.')
  flags.DEFINE_integer('letters', None, 'Of a word; those of the size by default.', lower_bound=1)
  flags.DEFINE_list('steps', ['1', '2', '4', '8', '16'], 'Denoising steps.')
  flags.DEFINE_list('orders', ['random', 'confidence', 'left'], f'Of {", ".join(ORDERS)}.')
  flags.DEFINE_list('padded', ['1', '2', '4', '8'], 'Loops of models that do not denoise.')
  flags.DEFINE_integer('samples', 512, 'Words of every row.', lower_bound=1)


def main(argv):
  check_command('set', 'depths')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  for name, allowed in (('size', sorted({*padded.SIZES} & {*masked_diffusion.SIZES})), ('task', padded.WORDS)):
    command.check_chosen(name, FLAGS[name].value, allowed)
  command.check_chosen('orders', FLAGS.orders, ORDERS)
  command.check_whole(seeds=FLAGS.seeds, depths=FLAGS.depths, steps=FLAGS.steps, padded=FLAGS.padded)
  most = padded.SIZES[FLAGS.size].longest[FLAGS.task]
  if letters() > most:
    sys.exit(f'error: --letters={letters()}: {PADDED} has positions for words of {most}; give fewer')
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('size', 'task', 'samples', 'set', grow=('seeds', 'steps', 'orders', 'padded'),
              letters=letters(), depths=given_loops())
  results = {seed: [] for seed in FLAGS.seeds}
  for seed, rows in results.items():
    for row in run(int(seed), workdir):
      rows.append(row)
      records.report(out, results, table=table(results))
      print(f'seed {seed}: {row["order"]}, {row["steps"]} steps of {row["loops"]} loops: {row["last"]:.3f}', flush=True)
  draw(out / 'words.png', results[FLAGS.seeds[0]])
  print(metrics.table(table(results)))


if __name__ == '__main__':
  define_flags()
  command.run(main)
