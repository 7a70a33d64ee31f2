"""How alike the blocks of finished runs are, and what they score (Reasoning with latent thoughts, section 3).

    python -m experiments.studies.cosines --workdir=runs/like --period=2 --run=plain=6x1-0 --run=plain=6x1-1 \\
        --run=like=6x1-like-10-0 --out=experiments/reports/latent_thoughts/mine

Reads runs that experiments.compare has trained, those of one name being its seeds, and writes cosines.json, cosines.md
and cosines.png into --out. A run whose stack is a single block, looped, has the cosine 1.
"""
from pathlib import Path
import sys

from absl import flags, logging
import numpy as np

from experiments.configs.latent_thoughts import MATRICES
from experiments.main import check_command, held_out
from experiments.tools import command, plots, records
import loopformer
from loopformer import plans, storage
from loopformer.inference.evaluate import evaluate
from loopformer.model import Looped
from loopformer.papers.latent_thoughts.cosine import Cosine, block_cosines
from loopformer.training import metrics
from loopformer.types import ConfigError, Params

FLAGS = flags.FLAGS


def cosines_of(model: Looped, params: Params, period: int) -> dict[str, float]:
  """The mean cosine of successive blocks of `period` layers, by group of matrices; 1 where one block is looped."""
  core = model.cell.core
  if core.depth == period and model.loops > 1:
    return dict.fromkeys(MATRICES, 1.0)
  attn = core.block.attn
  return block_cosines(params, Cosine(period=period, heads=attn.heads, kv_heads=attn.groups, groups=MATRICES))


def measure(folder: Path, period: int, batches: int) -> dict:
  """Of one run: what it scores with all its loops, and its cosines."""
  model, params, _, config = loopformer.load(folder)
  score, = evaluate(model, params, held_out(config, folder, batches), {'all': plans.resolve(model.loops)}, None,
                    config.task.measure)
  cosines = cosines_of(model, params, period)
  return {**{name: score[name] for name in ('loss', 'accuracy', 'exact')},
          'mean cosine': float(np.mean([*cosines.values()])), **cosines}


def summary(runs: dict[str, list[dict]]) -> list[dict]:
  """A row a name: means over seeds, and half the range of the accuracy."""
  rows = []
  for name, found in runs.items():
    mean = records.means(found, 'accuracy')
    rows.append({'run': name, 'seeds': len(found), 'accuracy': mean.pop('accuracy'), '+-': mean.pop('+-'), **mean})
  return rows


def draw(path: Path, runs: dict[str, list[dict]]):
  """Accuracy against the mean cosine, a point a run."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for name, rows in runs.items():
    axes.plot([row['mean cosine'] for row in rows], [row['accuracy'] for row in rows], 'o', label=name)
  axes.set_xlabel('mean cosine of successive blocks')
  axes.set_ylabel('accuracy')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=150)
  pyplot.close(figure)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --eval_batches."""
  flags.DEFINE_multi_string('run', [], 'name=the folder of a run in --workdir; may be repeated, also with one name.')
  flags.DEFINE_integer('period', 1, 'Layers of a block.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('eval_batches')
  logging.set_verbosity(logging.WARNING)
  out, runs = storage.path(FLAGS.out), {}
  try:
    for name, _, folder in (run.partition('=') for run in FLAGS.run):
      runs.setdefault(name, []).append(
          measure(storage.path(FLAGS.workdir) / folder, FLAGS.period, FLAGS.eval_batches or 64))
  except ConfigError as error:
    sys.exit(f'error: {error}')
  out.mkdir(parents=True, exist_ok=True)
  records.write(out / 'cosines.json', runs)
  table = metrics.table(summary(runs))
  storage.write(out / 'cosines.md', table + '\n')
  draw(out / 'cosines.png', runs)
  print(table)


if __name__ == '__main__':
  define_flags()
  command.run(main)
