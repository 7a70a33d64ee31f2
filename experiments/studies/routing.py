"""What routers do in finished runs of Mixture-of-Recursions: answers against the pass of training, loads, dead tokens.

    python -m experiments.studies.routing --workdir=runs --run=mor=mor-0 --run=random=random-0
    --out=experiments/reports/mor

Reads runs that experiments.compare has trained, and writes routing.json and routing.md into --out.
Losses are nats a token; `accuracy`, `through` and `load` are lists over recursions (loopformer/papers/mor/routing.py).
"""
from pathlib import Path
import sys

from absl import flags, logging

from experiments.main import check_command, held_out
from experiments.tools import command, records
import loopformer
from loopformer import plans, storage
from loopformer.inference import measures
from loopformer.inference.evaluate import Run, evaluate
from loopformer.papers.mor import routing
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS


def measure(folder: Path) -> dict:
  """Of one run: losses of the full plan, what its router does, and the work of its blocks for a token, forward."""
  model, params, tokenizer, config = loopformer.load(folder)
  batches = held_out(config, folder, FLAGS.eval_batches or 64)
  plan = plans.Uniform(model.loops)
  answers, trained = evaluate(model, params, batches, {'answers': plans.resolve(model.loops), 'as trained': Run(
      plan=plan, exit=routing.AsTrained())}, tokenizer and measures.text_bytes(tokenizer), config.task.measure)
  head = 2.0 * model.read_in.width * model.outputs
  found = {'steps': config.train.steps, 'answers': answers['loss'], 'as trained': trained['loss'],
           'gap': answers['loss'] - trained['loss'],
           'block MFLOPs': (model.flops(config.task.length, model.loops) - head) / 1e6,
           'training TFLOPs': config.objective.flops(model, config.task.length) * config.train.steps
                              * config.train.batch * config.task.length / 1e12}
  if hasattr(model.cell, 'router'):
    found |= routing.routing(model, params, batches, plan(None))
  return found


def shown(value) -> str | float:
  """Lists in one cell."""
  return ' '.join(f'{number:.2f}' for number in value) if isinstance(value, list) else value


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --eval_batches."""
  flags.DEFINE_multi_string('run', [], 'name=the folder of a run in --workdir; may be repeated.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('eval_batches')
  logging.set_verbosity(logging.WARNING)
  out = storage.path(FLAGS.out)
  out.mkdir(parents=True, exist_ok=True)
  try:
    rows = {name: measure(storage.path(FLAGS.workdir) / folder)
            for name, folder in command.named(FLAGS.run)}
  except ConfigError as error:
    sys.exit(f'error: {error}')
  records.write(out / 'routing.json', rows)
  columns = list(dict.fromkeys(key for row in rows.values() for key in row))
  table = metrics.table([{'run': name, **{column: shown(row.get(column, '')) for column in columns}}
                         for name, row in rows.items()])
  storage.write(out / 'routing.md', table + '\n')
  print(table)


if __name__ == '__main__':
  define_flags()
  command.run(main)
