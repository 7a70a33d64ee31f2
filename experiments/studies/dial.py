"""What depth buys on reasoning: accuracy at every number of loops, by how many hops are asked for, beside what it
costs.

    python -m experiments.studies.dial --task=pointers --seeds=0,1 --workdir=runs/dial --out=experiments/reports/dial

Trains every kind of experiments/configs/loopformer.py on a task with hops (`pointers` or `p_hop`), and evaluates each
at 1 to L loops on held-out problems, all together and by hops. A kind is one of the configuration's, `tmlt+ee` that
with early exit. What is trained stands in the work folder, and is not trained again. Writes results.json, table.md
(means over seeds, a column a number of hops; MFLOP and ms are those of a problem in a batch of 64) and dial.png.
"""
from __future__ import annotations

from absl import flags, logging

from experiments.main import check_command, held_out
from experiments.tools import command, costs, plots, records
import loopformer
from loopformer import plans, storage
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/loopformer.py'
KINDS = ('loopformer', 'tmlt', 'tmlt+ee', 'base_loop', 'base_loop+ee')
TASKS = ('pointers', 'p_hop')
ALL = 'validation'
TOGETHER = 64


def run(kind: str, seed: int) -> list[dict]:
  """Rows of one kind and seed, which is trained or resumed first: one for every number of loops."""
  folder = storage.path(FLAGS.workdir) / f'{FLAGS.task}-{kind}-{seed}'
  name, exits, _ = kind.partition('+ee')
  command.train(f'{CONFIG}:{FLAGS.task},kind={name}' + ',ee=1' * bool(exits), folder, *FLAGS['set'].value,
                f'train.seed={seed}')
  model, params, _, config = loopformer.load(folder)
  schedules = {str(loops): plans.resolve(loops) for loops in range(1, model.loops + 1)}
  rows = [{'loops': loops} for loops in range(1, model.loops + 1)]
  for split in config.task.splits:
    batches = list(held_out(config, folder, FLAGS.eval_batches or config.train.eval_batches, split))
    for row, found in zip(rows, evaluate(model, params, batches, schedules, None, config.task.measure)):
      row[split] = found['accuracy']
    if split == ALL:
      one = costs.rows(batches[0], TOGETHER)
      for row in rows:
        cost = costs.of_pass(model, params, one, plans.schedule(plans.resolve(row['loops'])))
        row |= {'MFLOP': cost.flops / 1e6, 'steps': cost.steps, 'ms': cost.milliseconds}
  return rows


def table(results: dict[str, dict]) -> list[dict]:
  """Means over seeds, and half the range of the accuracy."""
  rows = []
  for kind in dict.fromkeys(kind for kinds in results.values() for kind in kinds):
    for same in zip(*(kinds[kind] for kinds in results.values() if kind in kinds)):
      mean = records.means(same, ALL)
      rows.append({'kind': kind, 'loops': int(mean.pop('loops')), 'accuracy': round(mean.pop(ALL), 4),
                   '+-': mean.pop('+-'),
                   'MFLOP': round(mean.pop('MFLOP'), 3), 'steps': int(mean.pop('steps')),
                   'ms': round(mean.pop('ms'), 3), **{split: round(value, 3) for split, value in mean.items()}})
  return rows


def draw(path, rows: list[dict]):
  """All kinds on all problems; then a panel a kind, a curve a number of hops, against loops."""
  pyplot = plots.library()
  if pyplot is None:
    return
  kinds = list(dict.fromkeys(row['kind'] for row in rows))
  hops = [name for name in rows[0] if name.endswith(' hops')]
  figure, panels = pyplot.subplots(1, 1 + len(kinds), figsize=(2.9 * (1 + len(kinds)), 3.4), layout='constrained',
                                   sharey=True)
  for kind, axes in zip(kinds, panels[1:]):
    own = [row for row in rows if row['kind'] == kind]
    loops = [row['loops'] for row in own]
    panels[0].plot(loops, [row['accuracy'] for row in own], marker='o', label=kind)
    for i, name in enumerate(hops):
      axes.plot(loops, [row[name] for row in own], marker='.', color=pyplot.cm.viridis(i / max(len(hops) - 1, 1)),
                label=name)
    axes.set_title(kind)
  panels[0].set(title='all problems', ylabel='accuracy', ylim=(0, 1.03))
  panels[0].legend(fontsize=7)
  panels[-1].legend(fontsize=7)
  for axes in panels:
    axes.set_xlabel('loops')
    axes.grid(alpha=0.3)
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir, --set and --eval_batches.
  """
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_enum('task', 'pointers', TASKS, 'Size of experiments/configs/loopformer.py.')
  flags.DEFINE_list('kinds', list(KINDS), f'Of {", ".join(KINDS)}.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set', 'eval_batches')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  command.check_chosen('kinds', FLAGS.kinds, KINDS)
  command.check_whole(seeds=FLAGS.seeds)
  out, results = storage.path(FLAGS.out), {}
  command.own('task', 'eval_batches', 'set', grow=('seeds', 'kinds'))
  for seed in FLAGS.seeds:
    for kind in FLAGS.kinds:
      results.setdefault(seed, {})[kind] = run(kind, int(seed))
      rows = table(results)
      records.report(out, results, table=rows)
      draw(out / 'dial.png', rows)
      print(f'seed {seed}: {kind} measured', flush=True)
  print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
