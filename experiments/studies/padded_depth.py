"""Up to which length is a word problem learned, by the number of loops? (2503.03961, section 6, which has no loops)

    python -m experiments.studies.padded_depth --seeds=0,1 --workdir=runs/padded --out=experiments/reports/padded

Of every seed: the model of experiments/configs/padded.py with 1, 2, 4 and 8 loops; with as many as ceil(log2 n) while
the length n of training words doubles, and its control, whose loops stay those of the longest words; and a stack of as
many layers, each with its own weights. All are measured on the same words of the longest length, prefix by prefix: n*
is the largest index at which 95 % of the tokens are right.

What has been trained stands in the work folder, and is not trained again: the same command goes on where it was
stopped. Writes results.json, table.md and depth.png. Milliseconds are those of one pass over 64 words, divided by their
number, the median of several.
"""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from absl import flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs import padded
from experiments.main import check_command
from experiments.tools import command, costs, plots, records
import loopformer
from loopformer import storage
from loopformer.model import make_readout, run_batch
from loopformer.training import metrics
from loopformer.types import Batch, Params, Plan, PlanContext

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/padded.py'
RIGHT = 0.95
ROWS, REPEATS = 64, 10  # words that are timed together, and how often


@dataclasses.dataclass(frozen=True)
class Arm:
  """A model: the argument of its configuration; looped: whether it is drawn as one with a fixed number of loops."""
  argument: str
  looped: bool = False


def arms(longest: int) -> dict[str, Arm]:
  """The models for words of that length."""
  depth = padded.plan_of('log', longest, padded.SIZES[FLAGS.size].more, longest).longest
  fixed = {f'{loops} loop{"s" if loops > 1 else ""}': Arm(f'loops={loops},lengths=fixed', looped=True)
           for loops in (1, 2, 4, 8)}
  return {**fixed, 'log n loops, lengths double': Arm('loops=log,lengths=doubling'),
          f'{depth} loops, lengths double': Arm(f'loops={depth},lengths=doubling'),
          f'no loop, depth of {depth}': Arm(f'loops={depth},lengths=fixed,untied=1')}


# Measures ------------------------------------------------------------------------------------------------------------


def plan_of(planner: Any, batch: Batch) -> Plan:
  """The steps of a batch."""
  return planner(PlanContext(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0), batch=batch))


@functools.partial(jax.jit, static_argnums=(0, 1))
def right(model: Any, planner: Any, params: Params, batch: Batch) -> jax.Array:
  """bool[B, T]: where the most likely token is the right one."""
  trace = run_batch(model, params, batch, plan_of(planner, batch))
  return make_readout(model, params, batch).logits(trace.z).argmax(-1) == batch['targets']


def reached(accuracies: np.ndarray, least: float = RIGHT) -> int:
  """n*: the largest index, from 1, with an accuracy of `least` or more; 0 where there is none."""
  found = np.flatnonzero(np.asarray(accuracies) >= least)
  return int(found[-1]) + 1 if len(found) else 0


def layers_of(model: Any, loops: int) -> int:
  """Layers one after another, of so many loops."""
  return sum(stack.applications * (loops if name == 'loop' else 1) for name, stack in model.stacks().items())


def measure(folder: Path) -> dict[str, Any]:
  """Of a trained run: accuracy by index of its held-out words, n*, and what a word costs."""
  model, params, _, config = loopformer.load(folder)
  task, planner = config.task, config.objective.rolls['all'].plan
  source = task.source('validation', 0)
  examples = [source[i] for i in range(len(source))]
  batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
  words, size = len(examples), int(batch['size'].max())
  hits = np.concatenate([right(model, planner, params, {name: rows[start:start + ROWS] for name, rows in batch.items()})
                         for start in range(0, words, ROWS)])
  accuracies = hits[:, :size].mean(0)
  few = {name: jnp.asarray(rows) for name, rows in costs.rows(batch, ROWS).items()}
  cost = costs.of_pass(model, params, few, plan_of(planner, few), REPEATS)
  return {'n*': reached(accuracies), 'accuracy': float(accuracies.mean()), 'last': float(accuracies[-1]),
          'loops': int(cost.steps), 'layers in order': layers_of(model, int(cost.steps)), 'MFLOP': cost.flops / 1e6,
          'ms': cost.milliseconds, 'by index': [float(one) for one in accuracies]}


def rows_of(results: dict[str, dict]) -> list[dict]:
  """A row a seed and model."""
  shown = ('n*', 'accuracy', 'last', 'loops', 'layers in order', 'MFLOP', 'ms')
  return [{'seed': seed, 'model': name, **{key: round(row[key], 3) for key in shown}}
          for seed, found in results.items() for name, row in found.items()]


def draw(path: Path, results: dict[str, dict], looped: list[str]):
  """n* and accuracy against layers in order: a line for fixed loops, means over seeds, and a mark for every other
  model; every seed is a point. Accuracy by index, means."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.2), layout='constrained')
  names = list(dict.fromkeys(name for found in results.values() for name in found))
  rows = {name: [found[name] for found in results.values() if name in found] for name in names}
  for key, axes in zip(('n*', 'accuracy'), panels):
    across = [rows[name][0]['layers in order'] for name in looped if name in rows]
    axes.plot(across, [np.mean([row[key] for row in rows[name]]) for name in looped if name in rows], color='black',
              label='fixed loops')
    for number, name in enumerate(names):
      mark = {'marker': 'x', 'color': f'C{number}', 'label': name}
      mark = {'marker': 'o', 'color': 'black'} if name in looped else mark
      axes.scatter([row['layers in order'] for row in rows[name]], [row[key] for row in rows[name]], **mark)
    plots.doubling(axes)
    axes.set(xlabel='layers in order', ylabel=key)
    axes.grid(alpha=0.3)
  for number, name in enumerate(names):
    mean = np.mean([row['by index'] for row in rows[name]], 0)
    panels[2].plot(range(1, len(mean) + 1), mean, color=f'C{number}', linestyle='-' if name in looped else '--',
                   label=name)
  panels[2].axhline(RIGHT, color='grey', linewidth=0.8)
  panels[2].set(xlabel='index', ylabel='accuracy of tokens')
  panels[2].grid(alpha=0.3)
  for axes in panels[1:]:
    axes.legend(fontsize=7)
  plots.save(figure, path, 130)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of experiments/configs/padded.py.')
  flags.DEFINE_string('task', 'parity', 'Task of experiments/configs/padded.py, of words.')


def main(argv):
  check_command('set')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  for name, allowed in (('size', padded.SIZES), ('task', padded.WORDS)):
    command.check_chosen(name, FLAGS[name].value, allowed)
  command.check_whole(seeds=FLAGS.seeds)
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('size', 'task', 'set', grow=('seeds',))
  results, models = {}, arms(padded.SIZES[FLAGS.size].longest[FLAGS.task])
  for seed in FLAGS.seeds:
    results[seed] = {}
    for name, arm in models.items():
      folder = workdir / f'{FLAGS.task}-{arm.argument.replace(",", "-").replace("=", "_")}-{seed}'
      command.train(f'{CONFIG}:{FLAGS.size},task={FLAGS.task},{arm.argument}', folder, *FLAGS['set'].value,
                    f'train.seed={seed}')
      results[seed][name] = measure(folder)
      records.report(out, results, table=rows_of(results))
      print(f'seed {seed}: {name}: n* {results[seed][name]["n*"]}', flush=True)
    draw(out / 'depth.png', results, [name for name, arm in models.items() if arm.looped])
  print(metrics.table(rows_of(results)))


if __name__ == '__main__':
  define_flags()
  command.run(main)
