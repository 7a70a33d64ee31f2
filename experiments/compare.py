"""Trains several configurations on the same data in the same order, evaluates them at the same depths, and compares.

    python -m experiments.compare --run=loopformer=experiments/configs/loopformer.py:tiny \\
        --run=base_loop=experiments/configs/loopformer.py:tiny,kind=base_loop --seeds=0,1 \\
        --budgets=1,2,4,8 --workdir=runs/compare --out=experiments/reports/mine --set train.steps=1000

Every run is `experiments.main` in a process of its own, so that a comparison that was stopped goes on where it was, and
`--together` of them at a time. Writes results.json, table.md (means over seeds, and half of their range), depths.png
(what `--show` names against loops) and training.png (the same against steps and seconds of training) into --out.
"""
import collections
import concurrent.futures
from pathlib import Path
import sys
from typing import Any

from absl import flags, logging
import jax
import numpy as np

from experiments.main import check_command, held_out, numbers
from experiments.tools import command, plots, records
import loopformer
from loopformer import config as configs, plans, storage
from loopformer.inference import measures
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS


def check_shown(show: str, tasks: dict[str, Any]):
  """Raises ConfigError where the measure of a run's task, given by name, does not report `show`."""
  for name, task in tasks.items():
    reported = [*task.measure.row(collections.defaultdict(lambda: 1.0)), 'state norm']
    if show not in reported:
      raise ConfigError(f'--show = {show}: the run {name} does not report it; choose one of {", ".join(reported)}')


def train(spec: str, seed: int, workdir: Path):
  """Runs or resumes one training run, on data that all share."""
  shared = [f"task.folder='{FLAGS.workdir}/data'"] if hasattr(configs.load(spec).task, 'folder') else []
  command.train(spec, workdir, *shared, *FLAGS['set'].value, f'train.seed={seed}')


def measure(workdir: Path, budgets: list[int] | None) -> dict:
  """What was measured by split and depth, tokens that were trained on, and the curve of training."""
  model, params, tokenizer, config = loopformer.load(workdir)
  schedules = config.evals.schedules()
  if budgets:
    schedules = {str(budget): plans.resolve(budget) for budget in (budgets if model.loops > 1 else [1])}
  lengths = tokenizer and measures.text_bytes(tokenizer)
  count = FLAGS.eval_batches or 64
  tests = {split: evaluate(model, params, held_out(config, workdir, count, split), schedules, lengths,
                           config.task.measure) for split in config.task.splits}
  curve = metrics.training_curve(metrics.read_rows(workdir / 'metrics.jsonl'))
  return {'tests': tests, 'number': measures.main_number(config.task.measure),
          'tokens': config.train.steps * config.train.batch * config.task.length,
          'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)), 'curve': curve,
          'diagnosis': model.cell.diagnose(jax.device_get(params['cell'])),
          'seconds': curve[-1]['seconds'] if curve else 0.0}


def summary(runs: dict[str, list[dict]]) -> list[dict]:
  """The rows of the table: every name, split and depth; means over seeds, and half the range of the loss, or of what
  a measure has in its place."""
  table = []
  for name, results in runs.items():
    for split in results[0]['tests']:
      for rows in zip(*[result['tests'][split] for result in results]):
        first = results[0]['number']
        mean = records.means(rows, first)
        table.append({'model': name, 'seeds': len(results), 'parameters': results[0]['parameters'], 'test': split,
                      'loops': rows[0]['schedule'], first: mean.pop(first), '+-': mean.pop('+-'),
                      **{key: value for key, value in mean.items() if key not in ('budget', 'tokens', 'perplexity')},
                      **{key: float(np.mean([result['diagnosis'][key] for result in results]))
                         for key in results[0]['diagnosis']},
                      'minutes of training': round(float(np.mean([r['seconds'] for r in results])) / 60, 1)})
  columns = list(dict.fromkeys(key for row in table for key in row))
  return [{column: row.get(column, '') for column in columns} for row in table]


def draw(out: Path, runs: dict[str, list[dict]], show: str):
  """depths.png, where a run was evaluated at several depths, and training.png."""
  curves, flat = {}, {}
  for name, results in runs.items():
    rows = [{**records.means(same, show), 'budget': int(same[0]['schedule'])}
            for same in zip(*[result['tests']['validation'] for result in results]) if same[0]['schedule'].isdigit()]
    if len(rows) > 1:
      curves[name] = rows
    elif rows:
      flat[name] = rows[0][show]
  if curves:
    plots.depths(out / 'depths.png', curves, flat, show)
  trained = {name: results[0]['curve'] for name, results in runs.items() if results[0]['curve']}
  plots.progress(out / 'training.png', trained, show)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir, --set and --eval_batches.
  """
  flags.DEFINE_multi_string('run', [], 'name=configuration; may be repeated.')
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_list('budgets', None, "Loops to evaluate at; each configuration's own by default.")
  flags.DEFINE_string('show', None, 'What the plots show: loss, accuracy, exact, last; by default what the first run '
                      'is known by.')
  flags.DEFINE_integer('together', 1, 'Runs at a time; with several, seconds of training say little.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set', 'eval_batches')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  command.check_whole(seeds=FLAGS.seeds)
  named = command.named(FLAGS.run)
  try:
    workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
    tasks = {name: configs.load(spec, FLAGS['set'].value).task for name, spec in named}
    show = FLAGS.show or next((measures.main_number(task.measure) for task in tasks.values()), 'loss')
    check_shown(show, tasks)
    budgets = FLAGS.budgets and [len(plans.resolve(n, '--budgets'))
                                 for n in numbers(','.join(FLAGS.budgets), '--budgets', int)]
  except ConfigError as error:
    sys.exit(f'error: {error}')
  command.own('budgets', 'eval_batches', 'set', grow=('run', 'seeds'))
  # All models with one seed before the next, so that a stopped comparison compares all.
  jobs = [(name, spec, int(seed), workdir / f'{name}-{seed}') for seed in FLAGS.seeds for name, spec in named]
  runs = {name: [] for name, _ in named}
  with concurrent.futures.ThreadPoolExecutor(FLAGS.together) as pool:
    trained = [pool.submit(train, spec, seed, folder) for _, spec, seed, folder in jobs]
    for (name, _, seed, folder), done in zip(jobs, trained):
      print(f'{name}, seed {seed}', flush=True)
      done.result()
      runs[name].append(measure(folder, budgets))
      finished = {name: results for name, results in runs.items() if results}
      table = summary(finished)
      records.write(out / 'results.json', finished)
      storage.write(out / 'table.md', metrics.table(table) + '\n')
      draw(out, finished, show)
  print(metrics.table(table))


if __name__ == '__main__':
  define_flags()
  command.run(main)
