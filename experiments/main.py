"""The command line: train, evaluate at chosen depths, generate.

    python -m experiments.main --config=experiments/configs/loopformer.py:tiny --workdir=runs/tiny --set train.steps=100
    python -m experiments.main --mode=eval --workdir=runs/tiny --depths=1,2,4,8 --schedules="0.5,0.25,0.25;1" --sweep=4
    python -m experiments.main --mode=harness --workdir=runs/tiny --tasks=piqa_1500 --include=tasks --depths=1,8
    python -m experiments.main --mode=generate --workdir=runs/tiny --prompt='def main(' --budget=8
"""
import itertools
from pathlib import Path
import sys
import time

from absl import app, flags, logging
import jax
import numpy as np

import loopformer
from experiments import plots, records
from loopformer import config as configs
from loopformer import exits, metrics, plans
from loopformer.evaluate import Run, evaluate
from loopformer.generation import warn_beyond
from loopformer.model import parameter_count
from loopformer.train import NotFinite, train
from loopformer.types import ConfigError

FLAGS = flags.FLAGS
RULES = {'kl': exits.KL, 'entropy': exits.Entropy, 'entropy_change': exits.EntropyChange, 'state': exits.StateChange,
         'stable': exits.Stable, 'gate': exits.Cumulative, 'confident': exits.Confident, 'act': exits.ACT}
flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'generate', 'harness'], 'What to do.')
flags.DEFINE_string('workdir', None, 'Folder of the run: configuration, data, checkpoints, results.', required=True)
flags.DEFINE_string('config', None, 'train: file.py or file.py:argument; it defines get_config.')
flags.DEFINE_multi_string('set', [], 'train: path=value replaces one field of the configuration; may be repeated.')
flags.DEFINE_integer('step', None, 'eval, generate: which checkpoint; the last by default.')
flags.DEFINE_list('depths', None, "eval: budgets, such as 1,2,4,8; the configuration's by default.")
flags.DEFINE_string('schedules', None, 'eval: step sizes, schedules apart by semicolons: "0.5,0.25,0.25;0.5,0.5".')
flags.DEFINE_integer('sweep', None, 'eval: rank all schedules of this budget on the grid of the finest trajectory.')
flags.DEFINE_string('exits', None, 'eval, harness: thresholds of rules that end loops by token: "kl:1e-3;state:0.1".')
flags.DEFINE_integer('eval_batches', None, "eval: batches of the validation split; the configuration's by default.")
flags.DEFINE_multi_string('prompt', [], 'generate: a prompt; may be repeated.')
flags.DEFINE_string('budget', None, 'generate: loops a token, or step sizes such as 0.5,0.25,0.25.')
flags.DEFINE_list('tasks', None, 'harness: tasks of lm-evaluation-harness, such as piqa_1500 (extra `eval`).')
flags.DEFINE_string('include', None, "harness: a folder of tasks, as experiments.benchmarks writes it; "
                    "the harness's own by default.")
flags.DEFINE_integer('limit', None, 'harness: so many rows of every task.')
flags.DEFINE_string('draft', None, 'generate: loops that draft tokens, which all loops of the budget then judge.')
flags.DEFINE_integer('max_new_tokens', 64, 'generate: at most so many tokens.')
flags.DEFINE_float('temperature', 1.0, 'generate: 0 takes the likeliest token.')
flags.DEFINE_integer('top_k', None, 'generate: draw from the k likeliest tokens.')
flags.DEFINE_float('top_p', None, 'generate: draw from the likeliest tokens that reach this probability.')
flags.DEFINE_integer('seed', 0, 'generate: of the draws.')


def run_train(workdir: Path):
  """Trains, or resumes the run that the work folder holds."""
  if FLAGS.config is None and not (workdir / 'config.json').exists():
    raise ConfigError('--config is missing: name a configuration, such as experiments/configs/loopformer.py:tiny')
  saved = configs.read(workdir) if (workdir / 'config.json').exists() else None
  if FLAGS.config is None:
    config = saved
    for assignment in FLAGS.set:
      config = configs.override(config, assignment)
  else:
    config = configs.load(FLAGS.config, FLAGS.set)
  configs.check(config)
  for path, old, new in configs.difference(saved, config) if saved else ():
    raise ConfigError(f'workdir = {workdir} holds a run of another configuration: {path} is {old} there, {new} here. '
                      'Give another --workdir, or the configuration that the run was started with')
  print(configs.describe(config))
  print(f'parameters: {parameter_count(config.model):,}; devices: {jax.device_count()} '
        f'{jax.devices()[0].device_kind}', flush=True)
  configs.save(config, workdir)
  start = time.time()
  train(config, workdir, log=lambda text: print(text, flush=True))
  print(f'trained in {metrics.duration(time.time() - start)}; work folder {workdir}')


def run_eval(workdir: Path):
  """Evaluates the checkpoint at budgets and schedules; writes eval/<name>.{csv,json,png} and prints the table."""
  model, params, tokenizer, config = loopformer.load(workdir, FLAGS.step)
  jobs = {}
  if FLAGS.sweep:
    jobs[f'sweep{FLAGS.sweep}'] = {label(steps): steps for steps in plans.all_schedules(FLAGS.sweep, model.loops)}
  if FLAGS.schedules:
    jobs['schedules'] = {label(steps): plans.check_steps(steps, name='--schedules') for steps in given_schedules()}
  if FLAGS.depths or not (jobs or FLAGS.exits):
    budgets = numbers(','.join(FLAGS.depths), '--depths', int) if FLAGS.depths else config.evals.budgets
    jobs['depths'] = {str(budget): plans.resolve(budget, '--depths') for budget in budgets}
    jobs['depths'] |= {name: run for name, run in config.evals.schedules().items() if isinstance(run, Run)}
  if FLAGS.exits:
    jobs['exits'] = {str(n): plans.resolve(n) for n in range(1, model.loops + 1)} | rules(FLAGS.exits, model.loops)
  count = FLAGS.eval_batches or config.train.eval_batches
  tests = {'': 'validation', **{f'-{test}': test for test in getattr(config.task, 'tests', {})}}
  lengths = None if tokenizer is None else np.asarray(tokenizer.byte_lengths())
  for (name, schedules), (suffix, split) in itertools.product(jobs.items(), tests.items()):
    warn_beyond(model, max((steps for steps in schedules.values() if not isinstance(steps, Run)), key=len, default=()))
    start = time.time()
    name += suffix
    rows = evaluate(model, params, held_out(config, workdir, count, split), schedules, lengths, config.task.measure)
    if name.startswith('sweep'):
      rows = [{'rank': rank + 1, **row} for rank, row in enumerate(sorted(rows, key=lambda row: row['loss']))]
    write(workdir / 'eval', name, rows, f'{config.name}, {workdir.name}')
    print(f'{name}: {rows[0]["tokens"]:,} {split} tokens, {time.time() - start:.1f} s')
    print(metrics.table(rows), flush=True)
  plots.training(workdir / 'eval/training.png', metrics.read_rows(workdir / 'metrics.jsonl'))
  print(f'written to {workdir / "eval"}')


def held_out(config, workdir: Path, count: int, split: str = 'validation') -> list[dict]:
  """The first `count` batches of a split that is not trained on."""
  from loopformer import data
  batches = data.batches(config.task.examples(workdir, split, 0), batch=config.train.batch)
  return [batch for batch, _ in zip(batches, range(count))]


def write(folder: Path, name: str, rows: list[dict], title: str):
  """The rows as CSV, JSON and, where matplotlib is installed, a plot."""
  folder.mkdir(parents=True, exist_ok=True)
  records.write(folder / f'{name}.json', rows)
  lines = [','.join(rows[0]), *[','.join(f'"{value}"' if isinstance(value, str) else str(value)
                                         for value in row.values()) for row in rows]]
  (folder / f'{name}.csv').write_text('\n'.join(lines) + '\n')
  if name.startswith('depths'):
    plots.depths(folder / f'{name}.png', {title: rows})
  elif name.startswith('exits'):
    plots.exits(folder / f'{name}.png', rows, title)
  else:
    plots.ranking(folder / f'{name}.png', rows, title)


def run_generate(workdir: Path):
  """Prints a continuation of every prompt."""
  model, params, tokenizer, _ = loopformer.load(workdir, FLAGS.step)
  if tokenizer is None:
    raise ConfigError(f'workdir = {workdir}: its task has vectors as inputs, and no text that could be generated')
  budget = None
  if FLAGS.budget:
    steps = numbers(FLAGS.budget, '--budget')
    budget = int(steps[0]) if len(steps) == 1 and steps[0] != 1 else steps
  draft = FLAGS.draft and numbers(FLAGS.draft, '--draft', int)[0]
  prompts = FLAGS.prompt or ['']
  texts = loopformer.generate(model, params, tokenizer, prompts, budget=budget, max_new_tokens=FLAGS.max_new_tokens,
                              temperature=FLAGS.temperature, top_k=FLAGS.top_k, top_p=FLAGS.top_p, seed=FLAGS.seed,
                              draft=draft)
  for prompt, text in zip(prompts, texts):
    print(f'--- {FLAGS.budget or model.loops} loops\n{prompt}{text}')


def run_harness(workdir: Path):
  """Accuracy of the harness's tasks at every depth, schedule and exit; writes harness/<name>.{csv,json}."""
  from loopformer import harness
  if not FLAGS.tasks:
    raise ConfigError('--tasks is missing: name tasks, such as --tasks=piqa_1500 --include=FOLDER')
  depths = numbers(','.join(FLAGS.depths), '--depths', int) if FLAGS.depths else ()
  harness.run_harness(workdir, FLAGS.tasks, depths, given_schedules(), tuple(leaves(FLAGS.exits or '').values()),
                      FLAGS.include, FLAGS.limit, FLAGS.step)


def numbers(text: str, flag: str, kind: type = float) -> tuple:
  """Comma-separated numbers. Raises ConfigError naming the flag."""
  try:
    return tuple(kind(word) for word in text.split(','))
  except ValueError:
    raise ConfigError(f'{flag}={text}: expected {kind.__name__} numbers apart by commas') from None


def given_schedules() -> list[tuple[float, ...]]:
  """The step sizes of --schedules."""
  return [numbers(text, '--schedules') for text in (FLAGS.schedules or '').split(';') if text.strip()]


def rules(text: str, loops: int) -> dict[str, Run]:
  """A run of `loops` for every exit of `leaves`."""
  return {name: Run(plan=plans.Uniform(loops), exit=leave) for name, leave in leaves(text).items()}


def leaves(text: str) -> dict[str, exits.Adaptive]:
  """'kl:1e-3,1e-2;state:0.1' -> an exit for every threshold. Raises ConfigError naming the flag."""
  found = {}
  for word in filter(None, text.split(';')):
    name, _, thresholds = word.strip().partition(':')
    if name not in RULES:
      raise ConfigError(f'--exits={text}: there is no rule {name!r}; choose from {", ".join(RULES)}')
    for threshold in numbers(thresholds, '--exits'):
      found[f'{name}:{threshold:g}'] = exits.Adaptive(rule=RULES[name](threshold=threshold))
  return found


def label(steps) -> str:
  return ' '.join(f'{step:g}' for step in steps)


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save otherwise
  try:
    {'train': run_train, 'eval': run_eval, 'generate': run_generate,
     'harness': run_harness}[FLAGS.mode](Path(FLAGS.workdir))
  except (ConfigError, NotFinite, ValueError, FileNotFoundError, ImportError) as error:
    sys.exit(f'error: {error}')


if __name__ == '__main__':
  app.run(main)
