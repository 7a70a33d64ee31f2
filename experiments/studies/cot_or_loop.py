"""To chain, to loop, or to think: one block as three reasoners on the same problems, beside what an answer costs.

    python -m experiments.studies.cot_or_loop --seeds=0,1 --workdir=runs/cot_or_loop
    --out=experiments/reports/cot_or_loop

An arm is a kind of experiments/configs/cot_or_loop.py and its steps, `chain-4`, `loop-8`, `thought-8`; `loop-8-inject`
takes the input in again in every step. Every arm is trained (once: what stands in the work folder is not made again,
and the same command goes on where it was stopped), then answers the same problems: chains write theirs token by token,
greedily and with a cache; loops and thoughts answer in one pass.

Writes results.json, table.md and cot_or_loop.png. `ms` is the time of a problem alone, `ms of 64` that of 64 together,
a problem; of chains by the engine, of others by one compiled pass.
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

from experiments.configs import cot_or_loop
from experiments.main import check_command
from experiments.tools import command, costs, plots, records
import loopformer
from loopformer import plans, storage
from loopformer.model import run_batch
from loopformer.papers.relay.chains import by_token, correct, draws
from loopformer.tasks.generated import SymbolTokenizer
from loopformer.tasks.reasoning import Problem
from loopformer.training import metrics
from loopformer.types import ConfigError, Plan

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/cot_or_loop.py'
TASKS = ('parity', 'word', 'connectivity', 'arithmetic', 'edit')
TOGETHER = 64


@dataclasses.dataclass(frozen=True)
class Arm:
  """A kind and its steps; inject: whether a loop takes the input in again."""
  kind: str
  steps: int
  inject: bool = False

  @property
  def name(self) -> str:
    return f'{self.kind}-{self.steps}' + '-inject' * self.inject


def arm(text: str) -> Arm:
  """Of its name. Raises ConfigError where it is none."""
  kind, _, rest = text.partition('-')
  steps, _, inject = rest.partition('-')
  if kind not in cot_or_loop.KINDS or not steps.isdecimal() or inject not in ('', 'inject'):
    raise ConfigError(f'--arms has {text!r}: write an arm as one of {", ".join(cot_or_loop.KINDS)} with its steps, '
                      'such as chain-4 or loop-8-inject')
  return Arm(kind, int(steps), bool(inject))


def train(own: Arm, task: str, seed: int, folder: Path):
  """Trains an arm, unless it has been."""
  spec = f'{CONFIG}:{FLAGS.size},task={task},kind={own.kind},steps={own.steps}' + ',inject=1' * own.inject
  command.train(spec, folder, *FLAGS['set'].value, f'train.seed={seed}')


def measure(own: Arm, folder: Path, count: int) -> dict[str, float]:
  """Shares of right answers, and what an answer costs; floor: the share of the most frequent answer."""
  model, params, _, config = loopformer.load(folder)
  form = config.task.of
  size = getattr(form.of, 'of', form.of).longest  # all of a task have one
  source = draws(form.of, 'measured', size)
  problems = [next(source) for _ in range(count)]
  answers = [problem.answer for problem in problems]
  timed = [problems[i % count] for i in range(TOGETHER)]
  row = {'floor': max(map(answers.count, answers)) / count}
  if own.kind == 'chain':
    written = by_token(model, params, form, problems, rows=TOGETHER)
    tokens = float(np.mean([len(each.rounds[0]) + 2 for each in written]))
    right = [correct(*pair) for pair in zip(problems, written)]
    options = dict(written=tokens, most=form.of.extent.chain + 2)
    prompts = [form.ids(problem.prompt) for problem in timed]
    alone, together = (costs.of_chain(model, params, SymbolTokenizer(form.symbols), some, **options)
                       for some in (prompts[:1], prompts))
  else:
    batch = batch_of(form, problems)
    right = np.asarray(logits(model, params, batch, asked(batch))).argmax(-1) == np.array(
        [form.ids([answer])[0] for answer in answers])
    alone, together = (costs.of_pass(model, params, batch_of(form, some), even(model))
                       for some in (timed[:1], timed))
  return row | {'right': float(np.mean(right)), 'MFLOP': together.flops / 1e6, 'steps': together.steps,
                'ms': alone.milliseconds, f'ms of {TOGETHER}': together.milliseconds}


def batch_of(form: Any, problems: list[Problem]) -> dict[str, np.ndarray]:
  """Examples of problems, as a batch."""
  examples = [form.example(problem) for problem in problems]
  return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def asked(batch: dict[str, np.ndarray]) -> np.ndarray:
  """i64[B]: the last place of every row at which an answer is asked for."""
  return batch['weights'].shape[1] - 1 - (batch['weights'][:, ::-1] > 0).argmax(1)


def even(model: Any) -> Plan:
  """As many equal steps as it was trained for."""
  return plans.schedule((1 / model.loops,) * model.loops)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Any, params: Any, batch: Any, place: Any) -> Any:
  """f32[B, V]: of the answers at these places, by one pass of all steps."""
  z = run_batch(model, params, batch, even(model)).z
  return model.apply({'params': params}, jnp.take_along_axis(z, place[:, None, None], 1)[:, 0], method='logits')


def rows_of(results: dict[str, Any]) -> list[dict]:
  """A row a task, seed and arm."""
  return [{'task': task, 'seed': seed, 'arm': name, **{key: round(value, 3) for key, value in row.items()}}
          for task, seeds in results.items() for seed, arms in seeds.items() for name, row in arms.items()]


def draw(path: Path, results: dict[str, Any]):
  """Right answers against steps that wait for each other, and against operations; means over seeds, a column a task."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, panels = pyplot.subplots(2, len(results), figsize=(4.5 * len(results), 8), layout='constrained',
                                   squeeze=False)
  for column, (task, seeds) in zip(panels.T, results.items()):
    names = list(dict.fromkeys(name for arms in seeds.values() for name in arms))
    kinds = list(dict.fromkeys(dataclasses.replace(arm(name), steps=0) for name in names))
    for axes, key in zip(column, ('steps', 'MFLOP')):
      for number, kind in enumerate(kinds):
        points = []
        for name in names:
          found = [arms[name] for arms in seeds.values() if name in arms]
          if dataclasses.replace(arm(name), steps=0) == kind:
            points.append([np.mean([row[own] for row in found]) for own in (key, 'right')])
        points.sort()
        axes.plot(*zip(*points), marker='o', color=f'C{number}', label=kind.kind + ', injected' * kind.inject)
      axes.axhline(np.mean([row['floor'] for arms in seeds.values() for row in arms.values()]), color='grey', ls=':')
      axes.set(xlabel='steps in order' if key == 'steps' else key, ylabel='right answers', ylim=(-0.03, 1.03),
               title=task)
      plots.doubling(axes)
      axes.grid(alpha=0.3)
  panels[0][0].legend(fontsize=7)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of experiments/configs/cot_or_loop.py.')
  flags.DEFINE_list('on', ['parity'], 'Tasks of that file.')
  flags.DEFINE_list('arms', ['chain-0', 'chain-4', 'chain-8', 'chain-16', 'loop-4-inject', 'loop-8-inject',
                             'thought-8'], 'Kinds with their steps.')
  flags.DEFINE_integer('problems', 512, 'Problems that are answered.', lower_bound=1)


def main(argv):
  check_command('set')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  command.check_chosen('size', FLAGS.size, cot_or_loop.SIZES)
  command.check_chosen('on', FLAGS.on, TASKS)
  command.check_whole(seeds=FLAGS.seeds)
  arms, seeds = [arm(text) for text in FLAGS.arms], [int(seed) for seed in FLAGS.seeds]
  command.check_once('arms', [own.name for own in arms])
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('size', 'problems', 'set', grow=('on', 'seeds', 'arms'))
  results = {}
  for task in FLAGS.on:
    for seed in seeds:
      found = results.setdefault(task, {}).setdefault(str(seed), {})
      for own in arms:
        folder = workdir / f'{task}-{own.name}-{seed}'
        train(own, task, seed, folder)
        found[own.name] = measure(own, folder, FLAGS.problems)
        records.write(out / 'results.json', results)
        storage.write(out / 'table.md', metrics.table(rows_of(results)) + '\n')
        print(f'{task}, seed {seed}: {own.name} measured', flush=True)
  draw(out / 'cot_or_loop.png', results)
  print(metrics.table(rows_of(results)))


if __name__ == '__main__':
  define_flags()
  command.run(main)
