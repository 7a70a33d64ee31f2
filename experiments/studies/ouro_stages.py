"""Both stages of Ouro on pointer jumping, and what its exits are worth.

    python -m experiments.studies.ouro_stages --seeds=0,1 --workdir=runs/ouro --out=experiments/reports/ouro

Trains one layer in four loops (stage I), one layer once and four layers once; then, from the loop, its gate alone by
either alignment (stage II, see loopformer/terms/expected.py). Every loop is run and the exit only picks the answer, as
in the released code, so that steps counted here are chosen, not saved. Writes results.json, table.md and exits.png.
"""
from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

from absl import flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.main import check_command, held_out
from experiments.tools import command, plots, records
import loopformer
from loopformer import config as configs, loop, plans, sharding, storage
from loopformer.data import batches
from loopformer.model import parameter_roles
from loopformer.terms.expected import exit_step
from loopformer.training import metrics
from loopformer.training.step import State, make_step

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/ouro.py:pointers'
MODELS = {'four loops': '', 'one loop': ',loops=1', 'four layers': ',layers=4,loops=1'}
GATES = ('literal', 'prospective')
SHOWN = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
THRESHOLDS = (0.0, *np.geomspace(1e-4, 1.0, 61))  # gates are compared at the best of these
GOOD = 0.99  # the accuracy at which they are
EXAMPLES = 4096  # held out, to measure on


def teach(config, params, seed: int, workdir: Path):
  """Stage II from the parameters of stage I; the new ones, and the loss at the first and the last steps."""
  mesh, optimizer = config.mesh.make(), config.optim.make(config.train.steps, parameter_roles(config.model))
  params = jax.tree.map(jnp.copy, params)  # the step takes over what it is given
  state = State(step=jnp.int32(0), params=params, optimizer=optimizer.init(params))
  step = make_step(config.model, config.objective, optimizer, mesh, config.train.accumulate, seed)
  stream = iter(batches.batches(config.task.examples(workdir, 'train', seed + 1000), batch=config.train.batch))
  losses = []
  for _ in range(config.train.steps):
    state, values = step(state, sharding.put_batch(next(stream), mesh), 0)
    losses.append(values['loss'])
  return state.params, [float(losses[0]), float(jnp.stack(losses[-20:]).mean())]


@functools.partial(jax.jit, static_argnums=0)
def look(model, params, batch):
  """Of every step: whether it answers right, bool[K, B, T], and the gate's logits, f32[K, B, T]."""
  plan = plans.schedule((1 / model.loops,) * model.loops)
  trace = model.apply({'params': params}, batch['tokens'], plan, keep=loop.Every())
  answers = jax.lax.map(lambda z: model.apply({'params': params}, z, method='logits').argmax(-1), trace.xs)
  return answers == batch['targets'], trace.aux['halt']


def measure(model, params, batches) -> dict:
  """Accuracy of static steps and of exits by threshold, over all tokens and by hops."""
  seen = [look(model, params, batch) for batch in batches]
  right, halt = (np.concatenate([part[i] for part in seen], 1) for i in (0, 1))
  hops = np.concatenate([batch['hops'] for batch in batches])
  of_hops = [hops == h for h in np.unique(hops)]

  def at(threshold):
    steps = np.asarray(exit_step(halt, threshold))
    picked = np.take_along_axis(right, steps[None] - 1, 0)[0]
    return {'threshold': mean(threshold), 'accuracy': mean(picked), 'steps': mean(steps),
            'steps by hops': [mean(steps[where]) for where in of_hops],
            'by hops': [mean(picked[where]) for where in of_hops]}

  static = [{'step': k + 1, 'accuracy': mean(right[k]), 'by hops': [mean(right[k][where]) for where in of_hops]}
            for k in range(len(right))]
  swept = [at(threshold) for threshold in THRESHOLDS]
  good = [row for row in swept if row['accuracy'] >= GOOD]
  return {'static': static, 'exits': [at(threshold) for threshold in SHOWN],
          'curve': [{name: row[name] for name in ('threshold', 'accuracy', 'steps')} for row in swept],
          'cheapest': min(good, key=lambda row: row['steps'], default=None)}


def mean(values) -> float:
  """To five digits."""
  return round(float(np.mean(values)), 5)


def run_seed(seed: int, workdir: Path) -> dict:
  """Trains and measures everything of one seed."""
  found = {}
  for name, change in MODELS.items():
    folder = workdir / f'{name.replace(" ", "_")}-{seed}'
    command.train(CONFIG + change, folder, *FLAGS['set'].value, f'train.seed={seed}')
    model, params, _, config = loopformer.load(folder)
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, held_out=EXAMPLES))
    batches = held_out(config, folder, EXAMPLES // config.train.batch)
    found[name] = {'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
                   **measure(model, params, batches)}
    print(f'seed {seed}, {name}: ' + ', '.join(f'{row["accuracy"]:.3f}' for row in found[name]['static']), flush=True)
    if change:
      continue
    for gate in GATES:
      second = configs.load(f'{CONFIG},gate={gate}')
      taught, losses = teach(second, params, seed, folder)
      moved = [jax.tree_util.keystr(path, simple=True, separator='/') for path, same in
               jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: bool((a == b).all()), params, taught))
               if not same]
      found[f'gate {gate}'] = {'losses': losses, 'moved': moved, **measure(model, taught, batches)}
      print(f'seed {seed}, gate {gate}: loss {losses[0]:.3f} -> {losses[1]:.3f}, moved {moved}', flush=True)
  return found


def rows_of(results: dict[str, dict]) -> tuple[list[dict], list[dict], list[dict]]:
  """Three tables: accuracy by step and hops, accuracy by threshold, the cheapest good thresholds."""
  accuracy, exits, good = [], [], []
  for seed, found in results.items():
    for name, measured in found.items():
      if name in MODELS:
        accuracy += [{'seed': seed, 'model': name, 'parameters': measured['parameters'], 'step': row['step'],
                      'accuracy': row['accuracy'], **{f'hops {h}': value for h, value in enumerate(row['by hops'], 1)}}
                     for row in measured['static']]
      if name not in ('one loop', 'four layers'):
        gate = 'stage I' if name in MODELS else name.replace('gate ', 'stage II, ')
        exits += [{'seed': seed, 'gate': gate, 'threshold': row['threshold'], 'accuracy': row['accuracy'],
                   'steps': row['steps'], **{f'steps, hops {h}': n for h, n in enumerate(row['steps by hops'], 1)}}
                  for row in measured['exits']]
        best = measured['cheapest'] or {}
        good.append({'seed': seed, 'gate': gate,
                     **{name: best.get(name, 'none') for name in ('threshold', 'accuracy', 'steps')},
                     **{f'steps, hops {h}': best['steps by hops'][h - 1] if best else 'none' for h in range(1, 5)}})
  return accuracy, exits, good


def draw(path: Path, results: dict[str, dict]):
  """Accuracy against mean steps: a panel a seed, a curve a gate, and the static steps."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, panels = pyplot.subplots(1, len(results), figsize=(4 * len(results) + 2, 4), layout='constrained',
                                   sharey=True, squeeze=False)
  for (seed, found), axes in zip(results.items(), panels[0]):
    for name, label in (('four loops', 'stage I'), *((f'gate {gate}', f'stage II, {gate}') for gate in GATES)):
      rows = found[name]['curve']
      axes.plot([row['steps'] for row in rows], [row['accuracy'] for row in rows], marker='.', label=label)
    rows = found['four loops']['static']
    axes.plot([row['step'] for row in rows], [row['accuracy'] for row in rows], 'k--', marker='x', label='static')
    axes.set_title(f'seed {seed}')
    axes.set_xlabel('mean exit step')
    axes.grid(alpha=0.3)
  panels[0][0].set_ylabel('accuracy')
  figure.legend(*panels[0][0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, which acts on
  stage I.
  """
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('set')
  command.check_whole(seeds=FLAGS.seeds)
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('set', grow=('seeds',))
  results = {}
  for seed in FLAGS.seeds:
    results[seed] = run_seed(int(seed), workdir)
    tables = rows_of(results)
    records.write(out / 'results.json', results)
    storage.write(out / 'table.md', '\n\n'.join(metrics.table(rows) for rows in tables) + '\n')
    draw(out / 'exits.png', results)
  print(metrics.table(tables[2]))


if __name__ == '__main__':
  define_flags()
  command.run(main)
