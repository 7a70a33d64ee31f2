"""LoopUS against continued training without loops: every arm from one decoder, on the same tokens.

    python -m experiments.studies.loopus_stages --seeds=0,1 --workdir=runs/loopus --out=experiments/reports/loopus
    python -m experiments.studies.loopus_stages --from=runs/smollm --encoder=0..1 --decoder=29 --text='texts/*.jsonl' \\
        --workdir=runs/loopus_smollm --out=runs/loopus_smollm/report

Without --from a decoder of six layers is trained first (experiments/configs/loopus.py). --text: what all arms are
trained on, with --from; Python's standard library without it. --loops: B, the size's own without it. The arms: `base`,
as many tokens without loops, the control that the paper lacks; `loopus`; `accept`, the same with a gate that begins
near one; `ungated`, without a gate; and `untrained`, the decoder whose middle is repeated as it is. Every run is a
process of its own, and goes on where it was stopped. Writes, after every arm, results.json, table.md, depths.png.
"""
from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

from absl import flags, logging
import numpy as np

from experiments.main import check_command, held_out, numbers
from experiments.tools import command, plots, records
import loopformer
from loopformer import config as configs, plans, storage
from loopformer.inference import exits, measures
from loopformer.inference.evaluate import Run, evaluate
from loopformer.inference.measures import text_bytes
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS

ARMS = {'base': 'arm=base', 'loopus': 'arm=loopus', 'accept': 'arm=loopus,gate=accept', 'ungated': 'arm=ungated'}


def measure(folder: Path, config, text: Path, budgets: list[int],
            thresholds: list[float]) -> tuple[list[dict], list[dict]]:
  """Rows by budget, and by threshold of exits where the model has a confidence head, whose `budget` is the mean exit
  step; config: whose task is measured on, prepared in the folder `text`."""
  model, params, _, _ = loopformer.load(folder)
  lengths = text_bytes(config.task.tokenizer_of(text))
  batches = held_out(config, text, -(-FLAGS.eval_rows // config.train.batch))
  schedules = {str(budget): plans.resolve(budget) for budget in budgets}
  if 'gate' in params['cell']:
    schedules |= {f'{threshold:g}': Run(plan=plans.Uniform(model.loops), exit=exits.Adaptive(
        rule=exits.Confident(threshold=threshold))) for threshold in thresholds}
  rows = evaluate(model, params, batches, schedules, lengths, measures.Tokens())
  return rows[:len(budgets)], [{'threshold': float(row['schedule']), **row} for row in rows[len(budgets):]]


def run_seed(seed: int, workdir: Path, budgets: list[int], thresholds: list[float]) -> Iterator[dict]:
  """Trains and measures everything of one seed; what is measured so far, after every arm."""
  changes = (f"task.folder='{workdir / 'data'}'", *FLAGS['set'].value)
  if FLAGS['from'].value is None:
    start = workdir / f'pretrain-{seed}'
    command.train('loopus:cpu', start, *changes, f'train.seed={seed}')
    source = f'cpu,start={start}'
  else:
    start = storage.path(FLAGS['from'].value)
    source = (f'gpu,from={start},encoder={FLAGS.encoder},decoder={FLAGS.decoder}'
              + (f',text={FLAGS.text}' if FLAGS.text else ''))
  deep = f',loops={FLAGS.loops}' if FLAGS.loops else ''
  found = {}
  for arm in FLAGS.arms:
    folder = workdir / f'{arm}-{seed}'
    # Other tokens than the decoder was trained on.
    command.train(f'loopus:{source},{ARMS[arm]}{deep}', folder, *changes, f'train.seed={seed + 1000}')
    config = configs.read(folder)
    if not found:
      found['untrained'] = {'rows': measure(start, config, folder, budgets, thresholds)[0], 'exits': []}
    rows, left = measure(folder, config, folder, budgets, thresholds)
    found[arm] = {'rows': rows, 'exits': left}
    print(f'seed {seed}, {arm}: ' + ', '.join(f'{row["loss"]:.3f}' for row in rows), flush=True)
    yield found


def tables(results: dict[str, dict]) -> tuple[list[dict], list[dict]]:
  """Means over seeds, and half of their range: loss by arm and loops; loss and mean exit step by threshold."""
  losses, left = collections.defaultdict(list), collections.defaultdict(list)
  for found in results.values():
    for arm, measured in found.items():
      for row in measured['rows']:
        losses[arm, int(row['budget'])].append(row['loss'])
      for row in measured['exits']:
        left[arm, row['threshold']].append((row['budget'], row['loss']))

  def shown(values):
    spread = records.half_range(values)
    return f'{np.mean(values):.3f}' + (f' ± {spread:.3f}' if spread != '' else '')

  arms = list(next(iter(results.values())))
  depths = [{'loops': budget, **{arm: shown(losses[arm, budget]) for arm in arms}}
            for budget in sorted({budget for _, budget in losses})]
  return depths, [{'arm': arm, 'threshold': threshold, 'mean exit step': shown([s for s, _ in pairs]),
                   'loss': shown([loss for _, loss in pairs])} for (arm, threshold), pairs in left.items()]


def draw(out: Path, results: dict[str, dict]):
  """Loss against loops, a curve an arm, means over seeds."""
  curves = collections.defaultdict(dict)
  for found in results.values():
    for arm, measured in found.items():
      for row in measured['rows']:
        curves[arm].setdefault(int(row['budget']), []).append(row['loss'])
  plots.depths(out / 'depths.png', {arm: [
      {'budget': budget, 'loss': float(np.mean(values)), '+-': records.half_range(values)}
      for budget, values in sorted(rows.items())] for arm, rows in curves.items()})


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir, --from, --text, --loops,
  and --set, which acts on all arms."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('encoder', None, 'With --from: layers before the loop, such as 0..1, or none.')
  flags.DEFINE_string('decoder', None, 'With --from: layers after the loop.')
  flags.DEFINE_list('budgets', ['1', '2', '3', '4', '6', '8', '12'], 'Loops to evaluate at.')
  flags.DEFINE_list('thresholds', ['0.3', '0.4', '0.5', '0.6'], 'Of confidence, at which a token leaves.')
  flags.DEFINE_integer('eval_rows', 512, 'Sequences held out to measure on.', lower_bound=1)
  flags.DEFINE_list('arms', ['base', 'loopus', 'accept', 'ungated'], 'Which of the four.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set', 'from', 'text', 'loops')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  given = [name for name in ('from', 'encoder', 'decoder') if FLAGS[name].value is not None]
  if given and len(given) < 3:
    raise ConfigError(f'--{given[0]}: --from, --encoder and --decoder are given together; '
                      'experiments.studies.loopus_split proposes the latter two')
  if FLAGS.text and not given:
    raise ConfigError(f'--text={FLAGS.text}: without --from the decoder is one of bytes of the standard library; '
                      'add --from')
  command.check_chosen('arms', FLAGS.arms, ARMS)
  workdir, out = storage.path(FLAGS.workdir).absolute(), storage.path(FLAGS.out)
  command.check_whole(seeds=FLAGS.seeds, budgets=FLAGS.budgets)
  budgets = [len(plans.resolve(int(budget), '--budgets')) for budget in FLAGS.budgets]
  thresholds = list(numbers(','.join(FLAGS.thresholds), '--thresholds'))
  command.check_once('thresholds', thresholds)
  command.own('from', 'encoder', 'decoder', 'text', 'loops', 'eval_rows', 'set',
              grow=('seeds', 'arms', 'budgets', 'thresholds'))
  results = {}
  for seed in FLAGS.seeds:
    for results[seed] in run_seed(int(seed), workdir, budgets, thresholds):
      depths, left = tables(results)
      records.write(out / 'results.json', results)
      storage.write(out / 'table.md', '\n\n'.join(map(metrics.table, filter(None, (depths, left)))) + '\n')
      draw(out, results)
  print(metrics.table(depths))


if __name__ == '__main__':
  define_flags()
  command.run(main)
