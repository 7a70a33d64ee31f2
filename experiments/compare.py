"""Trains several configurations on the same data in the same order, evaluates them at the same budgets, and compares.

    python -m experiments.compare --run=loopformer=experiments/configs/loopformer.py:tiny \\
        --run=base_loop=experiments/configs/loopformer.py:tiny,kind=base_loop --seeds=0,1 \\
        --budgets=1,2,4,8 --workdir=runs/compare --out=experiments/reports/mine --set train.steps=1000

Every run is `experiments.main` in a process of its own, so that a comparison that was stopped goes on where it was.
Writes results.json, table.md and depths.png into --out: means over seeds, and half of their range.
"""
import json
from pathlib import Path
import subprocess
import sys

from absl import app, flags, logging
import jax
import numpy as np

import loopformer
from experiments import plots
from experiments.main import held_out, numbers
from loopformer import metrics, plans
from loopformer.evaluate import evaluate

FLAGS = flags.FLAGS
# experiments.main defines --workdir, --set and --eval_batches.
flags.DEFINE_multi_string('run', [], 'name=configuration; may be repeated.')
flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
flags.DEFINE_list('budgets', ['1', '2', '3', '4', '5', '6', '7', '8'], 'Loops to evaluate at.')
flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def train(spec: str, seed: int, workdir: Path):
  """Runs or resumes one training run; its output goes to <workdir>/log.txt."""
  workdir.mkdir(parents=True, exist_ok=True)
  changes = [f'--set={change}' for change in
             [*FLAGS['set'].value, f'train.seed={seed}', f"task.folder='{FLAGS.workdir}/data'"]]
  with (workdir / 'log.txt').open('a') as log:
    subprocess.run([sys.executable, '-m', 'experiments.main', f'--config={spec}', f'--workdir={workdir}', *changes],
                   stdout=log, stderr=subprocess.STDOUT, check=True)


def measure(workdir: Path, budgets: list[int]) -> dict:
  """Losses by budget, tokens that were trained on, and the seconds that training steps took."""
  model, params, tokenizer, config = loopformer.load(workdir)
  if model.loops == 1:
    budgets = [1]
  rows = evaluate(model, params, held_out(config, workdir, FLAGS.eval_batches or 64),
                  {str(budget): plans.resolve(budget) for budget in budgets},
                  tokenizer and tokenizer.byte_lengths(), config.task.measure)
  logged = [row for row in metrics.read_rows(workdir / 'metrics.jsonl') if 'seconds_per_step' in row]
  return {'rows': rows, 'tokens': config.train.steps * config.train.batch * config.task.length,
          'parameters': sum(leaf.size for leaf in jax.tree.leaves(params)),
          'seconds': config.train.steps * float(np.median([row['seconds_per_step'] for row in logged]))}


def summary(runs: dict[str, list[dict]]) -> tuple[list[dict], dict, dict]:
  """(table rows, curves by name, flat lines by name) of the results of every name and seed."""
  table, curves, flat = [], {}, {}
  for name, results in runs.items():
    curve = []
    for rows in zip(*[result['rows'] for result in results]):
      losses = [row['loss'] for row in rows]
      curve.append({'budget': rows[0]['budget'], 'loss': float(np.mean(losses)),
                    'spread': (max(losses) - min(losses)) / 2,
                    'bits_per_byte': float(np.mean([row['bits_per_byte'] for row in rows]))})
    if len(curve) == 1:
      flat[name] = curve[0]['loss']
    else:
      curves[name] = curve
    for row in curve:
      table.append({'model': name, 'seeds': len(results), 'parameters': results[0]['parameters'],
                    'loops': row['budget'], 'loss': row['loss'], '+-': row['spread'],
                    'bits per byte': row['bits_per_byte'],
                    'minutes of training': round(float(np.mean([r['seconds'] for r in results])) / 60, 1)})
  return table, curves, flat


def main(argv):
  del argv
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  workdir, out = Path(FLAGS.workdir), Path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  budgets = [int(n) for n in numbers(','.join(FLAGS.budgets), '--budgets', int)]
  runs = {}
  for seed in FLAGS.seeds:  # all models with one seed before the next, so that a stopped comparison compares all
    for named in FLAGS.run:
      name, _, spec = named.partition('=')
      folder = workdir / f'{name}-{seed}'
      print(f'{name}, seed {seed}', flush=True)
      train(spec, int(seed), folder)
      runs.setdefault(name, []).append(measure(folder, budgets))
      table, curves, flat = summary(runs)
      (out / 'results.json').write_text(json.dumps(runs, indent=1) + '\n')
      (out / 'table.md').write_text(metrics.table(table) + '\n')
      plots.depths(out / 'depths.png', curves, flat)
  print(metrics.table(table))


if __name__ == '__main__':
  app.run(main)
