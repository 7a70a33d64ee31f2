"""What rules that end loops by token are worth, beside fixed budgets, from evaluations that were made.

    python -m experiments.main --mode=eval --workdir=runs/ouro --exits="kl:1e-3,1e-2;gate:0.1,0.5"    # of every model
    python -m experiments.studies.adaptive --workdir=runs --models=ouro,act --out=experiments/reports/adaptive_compute

Reads <workdir>/<model>/eval/exits.json; writes results.json, table.md and exits.png. In results.json there
stands beside every threshold what the fixed budgets give at the same mean loops, on straight lines between them.
"""
from __future__ import annotations

import sys

from absl import flags
import numpy as np

from experiments.tools import command, plots, records
from loopformer import storage
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS
NEAR = 0.01  # of the best accuracy: what counts as equal to it


def beside_fixed(rows: list[dict]) -> list[dict]:
  """Rows with `fixed`, the accuracy of the fixed budgets at the same mean loops, and `gain` over it."""
  fixed = sorted((row for row in rows if plots.rule_of(row) == plots.FIXED), key=lambda row: row['budget'])
  line = [row['budget'] for row in fixed], [row['accuracy'] for row in fixed]
  return [{**row, 'fixed': (there := float(np.interp(row['budget'], *line))), 'gain': row['accuracy'] - there}
          for row in rows]


def summary(rows: list[dict]) -> list[dict]:
  """A row for every rule: its cheapest threshold near the best accuracy of all rows, its largest and its least gain."""
  rows = beside_fixed(rows)
  best = max(row['accuracy'] for row in rows)
  found = []
  for rule in dict.fromkeys(map(plots.rule_of, rows)):
    own = [row for row in rows if plots.rule_of(row) == rule]
    near = min((row for row in own if row['accuracy'] >= best - NEAR), key=lambda row: row['budget'], default=None)
    most, least = (choose(own, key=lambda row: row['gain']) for choose in (max, min))
    found.append({'rule': rule, f'loops within {NEAR}': near['budget'] if near else 'none',
                  'at': near['schedule'] if near else '', 'largest gain': most['gain'], 'there': most['schedule'],
                  'loops': most['budget'], 'least gain': least['gain'], 'here': least['schedule']})
  return found


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_string('workdir', None, 'Folder of the runs.', required=True)
  flags.DEFINE_list('models', None, 'Their names in it.', required=True)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  command.check_once('models', FLAGS.models)
  out, folder = storage.path(FLAGS.out), storage.path(FLAGS.workdir)
  try:
    models = {name: records.read(folder / name / 'eval/exits.json', ('schedule', 'budget', 'accuracy'),
                                 'run experiments.main --mode=eval --exits=... on all first') for name in FLAGS.models}
  except ConfigError as error:
    sys.exit(f'error: {error}')
  out.mkdir(parents=True, exist_ok=True)
  records.write(out / 'results.json', {name: beside_fixed(rows) for name, rows in models.items()})
  table = metrics.table([{'model': name, **row} for name, rows in models.items() for row in summary(rows)])
  storage.write(out / 'table.md', table + '\n')
  plots.exits(out / 'exits.png', models, 'accuracy')
  print(table)


if __name__ == '__main__':
  define_flags()
  command.run(main)
