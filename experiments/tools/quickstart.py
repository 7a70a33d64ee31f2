"""What launch/quickstart.sh says: how long it will take on this machine, and in the end what loops have bought.

    python -m experiments.tools.quickstart --mode=train --workdir=runs/tiny --reasoning=runs/tiny-pointers
    python -m experiments.tools.quickstart --mode=eval --workdir=runs/tiny --reasoning=runs/tiny-pointers

train: times a few steps of both runs of experiments/configs/quickstart.py, as --set changes them, and counts the rest.
eval: reads what `--mode=eval` of experiments.main wrote into both folders, writes WORKDIR/eval/dial.png and prints a
table of two lines.
"""
from __future__ import annotations

import functools
import math
import time
from typing import Any

from absl import flags
import jax
import numpy as np

from experiments.main import check_command, keep_compiled
from experiments.tools import command, estimate, plots, records
from loopformer import config as configs, sharding, storage
from loopformer.inference.evaluate import Run
from loopformer.inference.measures import main_number
from loopformer.model import parameter_roles
from loopformer.training import metrics
from loopformer.training.checkpoint import trained
from loopformer.training.step import init_state, make_step
from loopformer.types import ConfigError, config_dataclass

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/quickstart.py'
COMMANDS = {'text': 4, 'pointers': 2}  # that are started for a run: it, its evaluation, and of text two samples
LEAST, TIMED = 3, 2.0  # steps that are timed, and seconds of them
ALL = 'validation'  # the split of all problems; others are of so many jumps


@config_dataclass
class Pace:
  """Of a run on this machine. first: seconds of the first step, nearly all of it compilation; step: of those after it,
  their median."""
  first: float
  step: float


def pace(config: Any) -> Pace:
  """Times the training step of a configuration, whose batches are all alike here; what is compiled is what a run
  compiles.
  """
  options, mesh = config.train, config.mesh.make()
  sharding.check_model(config.model, mesh)
  sharding.check_batch(options.batch, options.accumulate, mesh)
  roles = parameter_roles(config.model)
  optimizer = config.optim.make(options.steps, roles)
  make = functools.partial(init_state, config.model, optimizer, options.seed)
  start = time.perf_counter()
  state = jax.jit(make, out_shardings=sharding.shardings(jax.eval_shape(make), mesh, roles))()
  rows = {name: np.stack([leaf] * options.batch) for name, leaf in estimate.rows_of(config.task).items()}
  rows |= {'row': np.arange(options.batch, dtype=np.int32), 'stop': np.zeros(options.batch, np.float32)}
  batch = sharding.put_batch(rows, mesh, options.accumulate)
  step = make_step(config.model, config.objective, optimizer, mesh, options.accumulate, options.seed)
  stage, seconds = config.control.stage(config.control.start()), []
  while len(seconds) <= LEAST or sum(seconds[1:]) < TIMED:
    state, _ = jax.block_until_ready(step(state, batch, stage, frozen={}))
    seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
  return Pace(first=seconds[0], step=float(np.median(seconds[1:])))


def left(config: Any, done: int, pace: Pace, commands: int) -> float:
  """Seconds that a run takes from so many steps on, with its evaluations, and so many commands that compile their
  programs.

  An evaluation takes as many steps' time as its arithmetic says."""
  options, model, length = config.train, config.model, config.task.length
  steps = max(options.steps - done, 0)
  often = len({number for number in range(done + 1, options.steps + 1)
               if number % options.eval_every == 0 or number == options.steps})
  forward = sum(model.flops(length, len(sizes)) for sizes in config.evals.schedules().values()
                if not isinstance(sizes, Run))
  of_step = forward / config.objective.flops(model, length)  # steps that a batch takes at all depths
  batches = options.eval_batches * (often + len(config.task.splits))
  return pace.step * (steps + of_step * batches) + pace.first * commands


def told(seconds: float) -> str:
  """'about N minutes', one at least."""
  minutes = max(1, math.ceil(seconds / 60))
  return f'about {minutes} minute{"s" if minutes > 1 else ""}'


def run_train(folders: dict[str, Any]):
  """Prints how long the runs will take that are not ready."""
  found = {}
  both = {name: configs.load(f'{CONFIG}:{name}', FLAGS['set'].value) for name in folders}
  for config in both.values():
    configs.check(config)
  for name, config in both.items():
    done = trained(folders[name]) or 0
    if done < config.train.steps:
      own = pace(config)
      found[name] = left(config, done, own, COMMANDS[name])
      print(f'{name}: {config.train.steps - done} steps of {own.step:.2f} s, {told(found[name])} with its evaluation',
            flush=True)
  if found:
    print(f'this will take {told(sum(found.values()))} on this machine, as busy as it is now', flush=True)


def dial(folder: Any, number: str, split: str = ALL) -> dict[int, float]:
  """Loops -> what `number` names, as a run was evaluated on a split. Raises ConfigError where it was not."""
  path = folder / f'eval/depths{"" if split == ALL else f"-{split}"}.json'
  rows = records.read(path, ('budget', number), 'evaluate the run with --mode=eval --depths=1,2,4,8')
  return {row['budget']: row[number] for row in rows}


def lines(loss: dict[int, float], accuracy: dict[int, float]) -> list[dict]:
  """The two lines of the table, a column a number of loops."""
  loops = sorted(loss.keys() | accuracy.keys())
  return [{'loops of one checkpoint': name, **{str(n): f'{of[n]:.3f}' if n in of else '' for n in loops}}
          for name, of in (('text: loss, nats a token', loss), ('pointers: accuracy', accuracy))]


def draw(path: Any, loss: dict[int, float], accuracy: dict[str, dict[int, float]]):
  """Text on the left, the lower the better; on the right the share of right answers, a curve a split."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, (left_, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
  left_.plot(list(loss), list(loss.values()), marker='o')
  left_.set(title='text', ylabel='validation loss, nats a token')
  for number, (split, of) in enumerate(accuracy.items()):
    how = {'color': 'black', 'linewidth': 2, 'marker': 'o', 'label': 'all'} if split == ALL else {
        'color': pyplot.cm.viridis(number / len(accuracy)), 'linewidth': 1, 'marker': '.', 'label': split}
    right.plot(list(of), list(of.values()), **how)
  right.set(title='jumps along pointers', ylabel='accuracy', ylim=(0, 1.03))
  right.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
  for axes, of in ((left_, loss), (right, accuracy[ALL])):
    plots.doubling(axes, list(of))
    axes.set_xlabel('loops')
    axes.grid(alpha=0.3)
  figure.suptitle('one checkpoint each, more loops')
  plots.save(figure, path, 150)


def run_eval(folders: dict[str, Any]):
  """Writes the picture, and prints its path and the table."""
  tasks = {name: configs.read(folder).task for name, folder in folders.items()}
  loss = dial(folders['text'], main_number(tasks['text'].measure))
  accuracy = {split: dial(folders['pointers'], 'accuracy', split) for split in tasks['pointers'].splits}
  path = folders['text'] / 'eval/dial.png'
  draw(path, loss, accuracy)
  print(f'{metrics.table(lines(loss, accuracy[ALL]))}\n{path}')


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --mode, --workdir and --set."""
  flags.DEFINE_string('reasoning', None, 'Folder of the run on pointers.', required=True)


def main(argv):
  check_command('mode', 'set')
  folders = {'text': storage.path(FLAGS.workdir), 'pointers': storage.path(FLAGS.reasoning)}
  if FLAGS.mode == 'train':
    keep_compiled(folders['text'])
    run_train(folders)
  elif FLAGS.mode == 'eval':
    run_eval(folders)
  else:
    raise ConfigError(f'--mode={FLAGS.mode}: this command has train, before both runs, and eval, after them')


if __name__ == '__main__':
  define_flags()
  command.run(main)
