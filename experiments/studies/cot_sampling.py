"""Chains that draw at random approach a law that a loop, with one answer an input, cannot: colourings and counts.

    python -m experiments.studies.cot_sampling --workdir=runs/cot_sampling
    --out=experiments/reports/cot_or_loop/sampling

Colourings: a small decoder is trained on Glauber chains on the triangle with five colours, and a loop on where they end
(experiments/configs/cot_or_loop.py, task=colouring). The decoder is sampled at temperature 1; the distance of what its
chains end with from the uniform law over the 60 proper colourings, in total variation, is set beside that of exact
chains of as many steps, of as many exact uniform samples, of the loop's one likeliest answer, and of samples from the
loop's head.

Counts: no model. The error of what trials of Karp, Luby and Madras give, an assignment being kept until it succeeds,
and of the published code's, which draws a new one every time, against the number of trials; means over random formulas.

Trains once: what stands in the work folder is not made again. Writes results.json, colourings.md, counts.md and
counts.png.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from absl import flags, logging
import numpy as np

from experiments.main import check_command
from experiments.studies.cot_or_loop import CONFIG, asked, batch_of, logits
from experiments.tools import command, plots, records
import loopformer
from loopformer import storage
from loopformer.inference.engine import generate
from loopformer.tasks import counting
from loopformer.tasks.generated import SymbolTokenizer
from loopformer.training import metrics

FLAGS = flags.FLAGS

ESTIMATES = {'assignment kept': counting.self_adjusting, 'drawn anew (published code)': counting.resampling}
TRIALS = (10, 30, 100, 300, 1000, 3000)


def colourings(workdir: Path) -> list[dict[str, Any]]:
  """A row a way to colour."""
  folders = {kind: workdir / f'colouring-{kind}-{steps}-{FLAGS.seed}' for kind, steps in (('chain', 40), ('loop', 4))}
  for (kind, folder), steps in zip(folders.items(), (40, 4)):
    command.train(f'{CONFIG}:cpu,task=colouring,kind={kind},steps={steps}', folder, *FLAGS['set'].value,
                  f'train.seed={FLAGS.seed}')
  model, params, _, config = loopformer.load(folders['chain'])
  form = config.task.of
  of = getattr(form.of, 'of', form.of)
  among, rng = of.proper, np.random.default_rng(FLAGS.seed)
  some = of.problem(rng)
  prompts = [form.ids(some.prompt)] * FLAGS.samples
  texts = generate(model, params, SymbolTokenizer(form.symbols), prompts, temperature=1.0, seed=FLAGS.seed,
                   max_new_tokens=of.extent.chain + 2, rows=FLAGS.together)
  ends = [of.coloured((text.split() or [''])[-1]) for text in texts]
  exact = [of.coloured(of.problem(rng).answer) for _ in range(FLAGS.samples)]
  uniform = [among[i] for i in rng.integers(len(among), size=FLAGS.samples)]
  rows = [told('decoder, sampled chains', ends, among), told('exact chains', exact, among),
          told('exact uniform samples', uniform, among)]
  model, params, _, config = loopformer.load(folders['loop'])
  form = config.task.of
  batch = batch_of(form, [some])
  own = np.asarray(logits(model, params, batch, asked(batch)), np.float64)[0]
  law = np.exp(own - own.max())
  picks = rng.choice(len(law), FLAGS.samples, p=law / law.sum())
  coloured = [of.coloured(symbol) for symbol in form.symbols]
  return [*rows, told('loop, its answer', [coloured[own.argmax()]] * FLAGS.samples, among),
          told('loop, samples from its head', [coloured[i] for i in picks], among)]


def told(name: str, ends: list, among: tuple) -> dict[str, Any]:
  """A row: how far samples are from uniform, and the share of them that are proper colourings."""
  return {'way': name, 'samples': len(ends), 'total variation': counting.total_variation(ends, among),
          'proper': float(np.mean([end in set(among) for end in ends]))}


def counts() -> list[dict[str, Any]]:
  """A row an estimate and number of trials; bias: the error that is left of infinitely many, a mean over formulas."""
  of = counting.Trials(shortest=10, longest=10)
  formulas = [of.formula(np.random.default_rng((FLAGS.seed, i)), 10) for i in range(FLAGS.formulas)]
  exact = [counting.count(formula, of.variables) for formula in formulas]
  limits = [counting.resampling_limit(formula, of.variables) for formula in formulas]
  bias = {name: float(np.mean([abs(a - b) / b for a, b in zip(tends, exact)]))
          for name, tends in zip(ESTIMATES, (exact, limits))}
  rows = []
  for name, estimate in ESTIMATES.items():
    for trials in TRIALS:
      # Few draws may see no success: an estimate is then no more than the number of assignments.
      errors = [abs(min(estimate(np.random.default_rng((FLAGS.seed, i, trials)), formula, of.variables, trials),
                        2.0 ** of.variables) - count) / count
                for i, (formula, count) in enumerate(zip(formulas, exact))]
      rows.append({'estimate': name, 'trials': trials, 'relative error': float(np.mean(errors)), 'bias': bias[name]})
  return rows


def draw(path: Path, rows: list[dict[str, Any]]):
  """Errors of counts against trials."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(5, 4), layout='constrained')
  for number, name in enumerate(ESTIMATES):
    own = [row for row in rows if row['estimate'] == name]
    axes.plot([row['trials'] for row in own], [row['relative error'] for row in own], marker='o', color=f'C{number}',
              label=name)
    if own[0]['bias']:
      axes.axhline(own[0]['bias'], color=f'C{number}', ls=':')
  axes.set(xscale='log', yscale='log', xlabel='trials', ylabel='mean relative error')
  axes.grid(alpha=0.3)
  axes.legend()
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir, --set and --seed, of
  all."""
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_integer('samples', 3000, 'Colourings that are sampled.', lower_bound=1)
  flags.DEFINE_integer('together', 256, 'Chains that are sampled together.', lower_bound=1)
  flags.DEFINE_integer('formulas', 40, 'Formulas whose assignments are counted.', lower_bound=1)


def main(argv):
  check_command('set', 'seed')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('seed', 'samples', 'formulas', 'set')
  found = {'counts': counts()}
  storage.write(out / 'counts.md', metrics.table(found['counts']) + '\n')
  draw(out / 'counts.png', found['counts'])
  found['colourings'] = colourings(workdir)
  storage.write(out / 'colourings.md', metrics.table(found['colourings']) + '\n')
  records.write(out / 'results.json', found)
  for rows in found.values():
    print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
