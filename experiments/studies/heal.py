"""A pretrained decoder made to loop, before and after it is trained to: retrofitted recurrence, or damped steps.

    python -m experiments.studies.heal --from=SmolLM2-135M --prelude=10 --coda=10 --retrofit=4 --loops=4 \
      --corpus='text/*.txt' --steps=400 --workdir=runs/heal --out=experiments/reports/imported/retrofit
    python -m experiments.studies.heal --from=SmolLM2-135M --prelude=14 --coda=11 --damped=0.25 --loops=4 ...

Imports the decoder (flags as of --mode=import), evaluates it at every budget of --depths (1 to --loops by default) on
held-out documents of the corpus, trains it on the others as retrofitted recurrence is trained (section 11 of Huginn's
sheet: Muon for matrices and the adapter, AdamW for the rest, a number of loops drawn from a Poisson law with log-normal
rate whose mean, --loops, is reached after three quarters of the run; at most eight loops have gradients), and evaluates
it again. Damped steps do not take the input in again, so that what stands before them learns through all loops or not
at all: there as many are drawn as 1 to --loops, each as often, and all have gradients. The plain decoder stands beside,
on the same text: as it is, and trained on as many tokens without loops, which is the control. Writes results.json and
table.md after every model. The same command goes on where it was interrupted; with other flags it needs another
--workdir.
"""
from __future__ import annotations

from pathlib import Path

from absl import flags, logging

from experiments.main import check_command, check_looped, held_out
from experiments.tools import command, records
import loopformer
from loopformer import config as configs, plans, storage
from loopformer.data import prepared
from loopformer.data.chat import SavedTokenizer
from loopformer.data.corpus import Files
from loopformer.inference.evaluate import Depths, evaluate
from loopformer.inference.measures import text_bytes
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import WSD, AdamW, Muon
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training import metrics, resume
from loopformer.training.train import Train, train
from loopformer.types import ConfigError, Planner

FLAGS = flags.FLAGS
IMPORT = ('prelude', 'coda', 'retrofit', 'damped', 'loops')
GRADED = 8  # loops with gradients, at most

WINDOW = 256  # tokens, if nothing else is said


def drawn(loaded, steps: int, mean: int) -> Planner:
  """The loops of a training step: see above."""
  if mean == 1:
    return plans.Uniform(1)
  if not loaded.model.cell.injects:
    return plans.RandomDepth(mean + 1)
  depth = plans.Ramp(of=plans.LogNormalPoisson(average=mean), steps=max(1, 3 * steps // 4), curve=plans.one_minus_sqrt)
  return plans.Truncated(depth=depth, graded=min(GRADED, mean))


def healing(loaded, start: Path, steps: int, batch: int, task: Text, mean: int) -> configs.Experiment:
  """The run that heals a model, or trains a plain one on: see above."""
  matrices = ('attn', 'mlp', *(['adapter'] if loaded.model.cell.injects else []))
  attn = loaded.model.cell.core.block.attn
  schedules = {name: WSD(peak=peak, warmup=0.005, cooldown=0.9) for name, peak in (('muon', 1e-3), ('adam', 5e-5))}
  return configs.Experiment(
      name=start.name, model=loaded.model,
      objective=Objective(rolls={'drawn': Rollout(drawn(loaded, steps, mean))},
                          terms={'lm': Weighted(1.0, CE(roll='drawn'))}), evals=Depths(budgets=(mean,)),
      task=task,
      train=Train(steps=max(steps, 1), batch=batch, start=str(start), log_every=5, eval_every=max(steps, 1),
                  eval_batches=4, save_every=max(1, min(steps, 50)), keep=1),
      optim=Muon(schedule=schedules['muon'], matrices=matrices, heads=attn.heads, groups=attn.groups,
                 decay=WSD(peak=1e-4), others=AdamW(schedule=schedules['adam'])))


def imported(start: Path, options: dict) -> loopformer.Loaded:
  """The decoder of --from, which is imported into a folder with these options, once. Raises ConfigError where the
  folder holds what others made."""
  source, done = FLAGS['from'].value, configs.is_workdir(start)
  records.made_with(start / 'made_with.json', done, **{'from': source}, **options)
  if not done:
    loaded = loopformer.load(source, **options)
    if loaded.tokenizer is None:
      raise ConfigError(f'--from={source}: no tokenizer came with it, and a text is to be read; add its files')
    loaded.save(start)
  return loopformer.load(start)


def arm(name: str, options: dict, schedules: dict[str, tuple[float, ...]], workdir: Path) -> list[dict]:
  """Rows of one model, before and after; options: of the import."""
  start, run = workdir / f'{name}-imported', workdir / name
  loaded, mean = imported(start, options), options.get('loops') or 1
  most = loaded.model.read_in.length
  window = min(WINDOW, most) if FLAGS.window is None else FLAGS.window
  if window > most:
    raise ConfigError(f'--window={window}: the model has {most} positions (read_in.length); give fewer')
  task = Text(corpus=Files(train=tuple(FLAGS.corpus)), tokenizer=SavedTokenizer(path=str(start)), length=window,
              folder=str(workdir / 'data'))  # of both models
  config = healing(loaded, start, FLAGS.steps, FLAGS.batch, task, mean)
  configs.check(config)
  if FLAGS.steps:
    resume.check(config, run)  # before data are prepared
  prepared.prepare(task.corpus, task.tokenizer, task.folder)
  for split, counts in prepared.load_manifest(task.folder)['splits'].items():
    windows = max(0, counts['tokens'] - 1) // window
    if windows < FLAGS.batch:
      raise ConfigError(f'--corpus={",".join(FLAGS.corpus)}: {windows} windows of {window} tokens in its {split} '
                        f'split, fewer than --batch={FLAGS.batch}; give more text, a smaller --batch or a '
                        'shorter --window')

  def rows(model, params, when):
    found = evaluate(model, params, held_out(config, run, 4), schedules, text_bytes(loaded.tokenizer))
    return [{'model': name, 'trained': when, **{key: row[key] for key in ('budget', 'loss', 'bits_per_byte', 'tokens')}}
            for row in found]

  table = rows(loaded.model, loaded.params, 'no')
  if FLAGS.steps:
    train(config, run, log=print)
    table += rows(*loopformer.load(run)[:2], f'{FLAGS.steps} steps')
  print(metrics.table(table), flush=True)
  return table


def budgets(loops: int) -> dict[str, tuple[float, ...]]:
  """The budgets of --depths by name. Raises ConfigError, or ends the command, naming the flag."""
  command.check_whole(depths=FLAGS.depths)
  given = list(map(int, FLAGS.depths)) if FLAGS.depths else range(1, loops + 1)
  return {str(budget): plans.resolve(budget, '--depths') for budget in given}


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines those of imports, --window,
  --depths.
  """
  flags.DEFINE_list('corpus', None, 'Globs of text, as of corpus.Files; a twentieth of the documents is held out.',
                    required=True)
  flags.DEFINE_integer('steps', 400, 'Steps of training; 0: none.', lower_bound=0)
  flags.DEFINE_integer('batch', 8, 'Windows of a step.', lower_bound=1)
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  check_command('from', 'window', 'depths', *IMPORT)
  logging.set_verbosity(logging.WARNING)
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  given = {name: FLAGS[name].value for name in IMPORT if FLAGS[name].present}
  if FLAGS['from'].value is None or given.get('loops', 1) < 2 or not {'retrofit', 'damped'} & set(given):
    raise ConfigError('--from, --loops (2 or more) and --retrofit or --damped are needed: '
                      'name a decoder and how it is to loop')
  check_looped(given)
  schedules = budgets(given['loops'])
  command.own('from', 'corpus', 'steps', 'batch', 'window', *given, depths=sorted(map(int, schedules)))
  table = []
  for name, options, measured in (('looped', given, schedules), ('plain', {}, {'1': (1.0,)})):
    table += arm(name, options, measured, workdir)
    records.write(out / 'results.json', {'flags': {**given, 'steps': FLAGS.steps, 'batch': FLAGS.batch}, 'rows': table})
    storage.write(out / 'table.md', metrics.table(table) + '\n')


if __name__ == '__main__':
  define_flags()
  command.run(main)
