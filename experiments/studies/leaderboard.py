"""All looped language models on equal terms: the same block, text, optimiser and operations of training.

    python -m experiments.studies.leaderboard --task=text --seeds=0,1 --workdir=runs/leaderboard \\
        --out=experiments/reports/leaderboard/text
    python -m experiments.studies.leaderboard --size=small --task=text --seeds=0,1 --workdir=... --out=...    # one GPU

Trains every system of experiments/configs/leaderboard.py. The operations of a training step are those of the matrix
products that its program runs (`estimate.step_flops`: what is of no use counts, such as steps of sequences that are
done), and every system takes as many steps as have the operations of `--steps` steps of `base`. First three learning
rates, for a quarter of that (`--share`); then the best of them by the validation loss at all loops, whole, for every
seed. A system that begins where another stops (loopus, melt) has half of the budget, and the other the first half.

What is trained stands in the work folder and is not trained again; a study that was stopped goes on. Writes
results.json, table.md (at all L loops, and the best of all budgets), budgets.md (at every budget), rates.md (what the
rates did), quality.png (all systems against operations a token) and systems.png (a panel a system). Of a denoiser the
loss is its bound. Times are of one row, measured after all training; `--together` says how many runs train at a time.
"""
from __future__ import annotations

from collections.abc import Sequence
import concurrent.futures
import math
from pathlib import Path
from typing import Any

from absl import flags, logging
import jax

from experiments.configs import leaderboard
from experiments.main import check_command, held_out, numbers
from experiments.tools import command, costs, estimate, plots, records
import loopformer
from loopformer import config as configs, plans, storage
from loopformer.inference import measures
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics
from loopformer.training.checkpoint import trained

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/leaderboard.py'


def names_of(task: str) -> list[str]:
  """The systems that a task can be given to."""
  every = leaderboard.systems(leaderboard.SIZES['cpu'], 100, 100, 100)
  return [name for name in every if task == 'text' or name != 'diffusion']


class Study:
  """What is trained for a task: numbers of steps by the operations that they may take, rates by the best of short runs.
  """

  def __init__(self, size: str, task: str, steps: int | None, share: float, rates: Sequence[float]):
    self.size, self.task, self.share, self.rates = size, task, share, rates
    self.counted: dict[str, float] = {}
    self.short: dict[str, dict[float, float]] = {}  # name -> rate -> validation loss at all loops after a short run
    self.budget = (configs.load(self.spec('base')).train.steps if steps is None else steps) * self.flops('base')

  def spec(self, name: str, **arguments: Any) -> str:
    """The configuration of a system."""
    told = ''.join(f',{key}={value}' for key, value in arguments.items())
    return f'{CONFIG}:{self.size},system={name},task={self.task}{told}'

  def flops(self, name: str) -> float:
    """Operations of a training step, in the mean over the run."""
    if name not in self.counted:
      start = {'start': 'none'} if name in leaderboard.BEGINS else {}
      self.counted[name] = estimate.step_flops(configs.load(self.spec(name, **start)))
    return self.counted[name]

  def steps(self, name: str, share: float) -> int:
    """Steps that have this share of the budget's operations."""
    return max(4, round(share * self.budget / self.flops(name)))

  def train(self, name: str, rate: float, seed: int, share: float):
    """Runs or resumes a system, and what stands before it; its folder."""
    start, before = {}, leaderboard.BEGINS.get(name)
    if before:
      share /= 2
      start = {'start': self.train(before, self.rate(before), seed, share)}
    steps, workdir = self.steps(name, share), storage.path(FLAGS.workdir)
    folder = workdir / f'{self.task}-{name}-{rate:g}-{steps}-{seed}'
    shared = [f"task.folder='{workdir / 'data'}'"] if self.task == 'text' else []
    spec = self.spec(name, rate=rate, steps=steps, **start)
    changes = *shared, *FLAGS['set'].value, f'train.seed={seed}'
    if trained(folder) != steps or not configs.is_saved(configs.load(spec, changes), folder):
      command.train(spec, folder, *changes)  # which refuses to go on with a run of another configuration
    return folder

  def sweep(self, name: str):
    """Trains a system with every rate for a short time, and remembers its losses; infinite where a run failed to learn.
    """
    found = {}
    for rate in self.rates if len(self.rates) > 1 else ():
      folder = self.train(name, rate, 0, self.share)
      loops = configs.read(folder).model.loops
      losses = [row[f'loss@{loops}'] for row in metrics.read_rows(folder / 'metrics.jsonl') if row['kind'] == 'eval']
      found[rate] = losses[-1] if losses and losses[-1] is not None and math.isfinite(losses[-1]) else math.inf
    self.short[name] = found

  def rate(self, name: str) -> float:
    """The best rate of the short runs."""
    return min(self.rates, key=self.short[name].get) if self.short[name] else self.rates[0]


def measure(folder: Path, budgets: Sequence[int], count: int) -> dict[str, Any]:
  """What a trained system reaches with these numbers of loops, on `count` batches, and what that takes."""
  model, params, tokenizer, config = loopformer.load(folder)
  length = config.task.length
  found = evaluate(model, params, held_out(config, folder, count), {str(n): plans.resolve(n) for n in budgets},
                   tokenizer and measures.text_bytes(tokenizer), config.task.measure)
  rows = [{'loops': n,
           **{key: value for key, value in row.items() if key not in ('budget', 'schedule', 'tokens', 'ran')},
           'MFLOP a token': model.flops(length, n) / 1e6} for n, row in zip(budgets, found)]
  denoises = model.sampler.denoises
  return {'rows': rows, 'loops': model.loops, 'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
          'steps': config.train.steps, 'cache': None if denoises else costs.cache_bytes(model, length, model.loops),
          **model.cell.diagnose(jax.device_get(params['cell']))}


def timed(folder: Path) -> float | None:
  """Milliseconds of one more token of a row, with all loops; None of a denoiser."""
  model, params, _, config = loopformer.load(folder)
  return None if model.sampler.denoises else costs.of_token(model, params, config.task.length, model.loops).milliseconds


def show_of(task: str) -> str:
  """What the plots show."""
  return 'loss' if task == 'text' else 'accuracy'


def means(results: dict[str, list[dict]], show: str) -> dict[str, list[dict]]:
  """Name -> a row for every budget: means over seeds, and half the range of `show`."""
  return {name: [{**records.means(same, show), 'loops': same[0]['loops']}
                 for same in zip(*(run['rows'] for run in runs))]
          for name, runs in results.items()}


def table(results: dict[str, list[dict]], times: dict[str, float | None], show: str) -> list[dict]:
  """A row a system, the best first: at all L loops, and at the best of its budgets."""
  rows = []
  for name, budgets in means(results, show).items():
    run, less = results[name][0], show == 'loss'
    whole = next(row for row in budgets if row['loops'] == run['loops'])
    best = (min if less else max)(budgets, key=lambda row: row[show])
    radius = run.get('radius')
    rows.append({'system': name, 'seeds': len(results[name]), 'parameters': run['parameters'],
                 'rate': f'{run["rate"]:g}', 'steps': run['steps'],
                 show: round(whole[show], 3), '+-': whole['+-'] and round(whole['+-'], 3),
                 'at loops': run['loops'],
                 'best': f'{best[show]:.3f} at {best["loops"]}', 'MFLOP a token': round(whole['MFLOP a token'], 3),
                 'cache bytes a token': '' if run['cache'] is None else round(run['cache']),
                 'ms a token': '' if times.get(name) is None else round(times[name], 2),
                 'state norm': round(whole['state norm'], 1), 'radius': '' if radius is None else round(radius, 3)})
  return sorted(rows, key=lambda row: row[show] if show == 'loss' else -row[show])


def budget_table(results: dict[str, list[dict]], show: str) -> list[dict]:
  """A row a system, a column a number of loops."""
  found = means(results, show)
  most = sorted({row['loops'] for rows in found.values() for row in rows})
  values = {name: {row['loops']: round(row[show], 3) for row in rows} for name, rows in found.items()}
  return [{'system': name, **{str(loops): own.get(loops, '') for loops in most}} for name, own in values.items()]


def draw(out: Path, results: dict[str, list[dict]], show: str):
  """quality.png and systems.png."""
  pyplot = plots.library()
  if pyplot is None:
    return
  found = means(results, show)
  apart = [pyplot.cm.tab20(i) for i in range(20) if i not in (14, 15)]  # grey are the others, in systems.png
  apart += [pyplot.cm.tab20b(i) for i in (0, 4)]
  colours = {name: apart[i % len(apart)] for i, name in enumerate(found)}
  figure, axes = pyplot.subplots(figsize=(9, 5.5), layout='constrained')
  for name, rows in found.items():
    axes.plot([row['MFLOP a token'] for row in rows], [row[show] for row in rows], marker='o' if len(rows) > 1 else 's',
              markersize=4, color=colours[name], label=name)
  best = [min(row[show] for row in rows) for rows in found.values()]
  if show == 'loss':  # what fails far from its training would hide all others
    axes.set_ylim(min(best) - 0.1, max(best) + 0.2)
  axes.set(xlabel='operations a token, millions (forward)', ylabel=plots.LABELS[show])
  plots.doubling(axes)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
  plots.save(figure, out / 'quality.png', 150)
  wide = 5
  tall = -(-len(found) // wide)
  figure, panels = pyplot.subplots(tall, wide, figsize=(2.3 * wide, 1.9 * tall), layout='constrained', sharex=True,
                                   sharey=True, squeeze=False)
  for axes, (name, rows) in zip(panels.flat, found.items()):
    for theirs in found.values():
      axes.plot([row['loops'] for row in theirs], [row[show] for row in theirs], color='0.88', linewidth=0.8)
    axes.errorbar([row['loops'] for row in rows], [row[show] for row in rows], [row['+-'] or 0.0 for row in rows],
                  marker='o', markersize=3, color=colours[name])
    axes.axvline(results[name][0]['loops'], color='0.6', linewidth=0.6, linestyle=':')
    axes.set_title(name, fontsize=8)
    axes.tick_params(labelsize=6)
    if show == 'loss':
      axes.set_ylim(min(best) - 0.1, max(best) + 0.2)
  for axes in list(panels.flat)[len(found):]:
    axes.axis('off')
  figure.supxlabel('loops (dotted: those of the training)', fontsize=8)
  figure.supylabel(plots.LABELS[show], fontsize=8)
  plots.save(figure, out / 'systems.png', 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir, --set and --eval_batches.
  """
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_enum('task', 'text', leaderboard.TASKS, 'Task of experiments/configs/leaderboard.py.')
  flags.DEFINE_enum('size', 'cpu', list(leaderboard.SIZES), 'Size of experiments/configs/leaderboard.py.')
  flags.DEFINE_list('systems', None, 'Those to compare; all by default.')
  flags.DEFINE_list('rates', ['1e-3', '3e-3', '1e-2'],
                    'Peaks of the learning rate that are tried; of one, no short runs.')
  flags.DEFINE_float('share', 0.25, 'Of the budget, for the short runs.', lower_bound=0.0, upper_bound=1.0)
  flags.DEFINE_integer('steps', None, "Of `base`, whose operations all have; the configuration's by default.",
                       lower_bound=1)
  flags.DEFINE_integer('together', 1, 'Runs at a time.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set', 'eval_batches')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  known = names_of(FLAGS.task)
  names = FLAGS.systems or known
  command.check_chosen('systems', names, known)
  command.check_whole(seeds=FLAGS.seeds)
  seeds = list(map(int, FLAGS.seeds))
  rates = [float(rate) for rate in numbers(','.join(FLAGS.rates), '--rates', float)]
  out, show = storage.path(FLAGS.out), show_of(FLAGS.task)
  command.check_once('rates', rates)
  records.own(out, {'seeds': FLAGS.seeds, 'systems': names}, size=FLAGS.size, task=FLAGS.task, steps=FLAGS.steps,
              share=FLAGS.share if len(rates) > 1 else None, rates=rates, eval_batches=FLAGS.eval_batches,
              set=FLAGS['set'].value)
  study = Study(FLAGS.size, FLAGS.task, FLAGS.steps, FLAGS.share, rates)
  every = list(dict.fromkeys([*names, *(leaderboard.BEGINS[name] for name in names if name in leaderboard.BEGINS)]))
  results: dict[str, list[dict]] = {}
  folders: dict[str, Path] = {}
  with concurrent.futures.ThreadPoolExecutor(FLAGS.together) as pool:
    for group in (False, True):  # those that begin where others stop come after them
      for _ in pool.map(study.sweep, [name for name in every if (name in leaderboard.BEGINS) == group]):
        pass
    records.write(out / 'rates.json', study.short)
    if len(rates) > 1:
      storage.write(out / 'rates.md', metrics.table([
          {'system': name, **{f'{rate:g}': round(loss, 3) for rate, loss in found.items()}}
          for name, found in study.short.items()]) + '\n')
    for seed in seeds:
      for name, folder in zip(names, pool.map(lambda name: study.train(name, study.rate(name), seed, 1.0), names)):
        folders.setdefault(name, folder)
        results.setdefault(name, []).append(
            {**measure(folder, leaderboard.budgets(FLAGS.size, name), FLAGS.eval_batches or 32),
             'rate': study.rate(name), 'seed': seed})
        records.report(out, results, budgets=budget_table(results, show))
        draw(out, results, show)
        print(f'{name}, seed {seed}: measured', flush=True)
  times = {name: timed(folder) for name, folder in folders.items()}
  rows = table(results, times, show)
  records.write(out / 'times.json', times)
  storage.write(out / 'table.md', metrics.table(rows) + '\n')
  print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
