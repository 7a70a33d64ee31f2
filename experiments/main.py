"""The command line: train, evaluate at chosen depths, generate, inspect what loops do; or plan a training step for
machines that are not here.

    python -m experiments.main --config=experiments/configs/loopformer.py:tiny --workdir=runs/tiny --set train.steps=100
    python -m experiments.main --mode=eval --workdir=runs/tiny --depths=1,2,4,8 --schedules="0.5,0.25,0.25;1" --sweep=4
    python -m experiments.main --mode=harness --workdir=runs/tiny --tasks=piqa_1500 --include=tasks --depths=1,8
    python -m experiments.main --mode=generate --workdir=runs/tiny --prompt='def main(' --budget=8 --exit=kl:1e-3
    python -m experiments.main --mode=inspect --workdir=runs/tiny --prompt='def main(' --budget=8
    python -m experiments.main --mode=import --from=SmolLM2-135M --workdir=runs/smol
    python -m experiments.main --mode=eval --workdir=runs/smol --text=book.txt --window=512
    python -m experiments.main --mode=plan --config=experiments/configs/loopformer.py:paper --devices=16 \
      --set mesh.fsdp=16 --set train.accumulate=10
"""
import ast
from collections.abc import Callable, Iterable
import dataclasses
import functools
import itertools
import math
from pathlib import Path
import re
import sys
import textwrap
import time
from typing import Any

from absl import flags, logging
import jax

from experiments.tools import command, inspection, machines, plots, records
import loopformer
from loopformer import config as configs, memories, plans, reading, sharding, storage
from loopformer.data import chat as chats
from loopformer.data.corpus import rows_of
from loopformer.data.tokenizer import prompt_ids
from loopformer.diffusion import orders
from loopformer.diffusion.sampler import HOLE
from loopformer.inference import exits, measures, sampler
from loopformer.inference.engine import warn_beyond
from loopformer.inference.evaluate import Run, evaluate
from loopformer.inference.measures import text_bytes
from loopformer.inference.sampling import Contrast
from loopformer.model import parameter_count
from loopformer.training import interrupts, metrics, processes, resume
from loopformer.training.processes import say
from loopformer.training.train import train
from loopformer.types import SEEDS, ConfigError

FLAGS = flags.FLAGS
RULES = {'kl': exits.KL, 'entropy': exits.Entropy, 'entropy_change': exits.EntropyChange, 'state': exits.StateChange,
         'stable': exits.Stable, 'gate': exits.Cumulative, 'confident': exits.Confident, 'act': exits.ACT}
DRAWN = {'sampled': exits.Sampled}  # rules without a threshold
FILLS = {'copy': exits.Copy(), 'recompute': exits.Recompute()}
DENOISING = 'denoise', 'order', 'blocks', 'guidance'  # flags for models that denoise,
UNMASKED = 'exit', 'fill', 'memory', 'draft', 'contrast'  # and for those that write token by token
SCORES = {'confidence': orders.OfDrawn(), 'likeliest': orders.Likeliest(), 'margin': orders.Margin(),
          'entropy': orders.LeastEntropy(), 'random': orders.ByChance(), 'left': orders.LeftToRight()}
PLANNERS = {'ancestral': orders.Ancestral(), 'doubtful': orders.Resampling(sigma=orders.Doubtful()),
            'topk': orders.Kept()}
SIGMAS = {'cap': lambda eta: orders.Resampling(sigma=orders.Cap(eta=eta)),
          'rescale': lambda eta: orders.Resampling(sigma=orders.Rescale(eta=eta)),
          'plateau': lambda eta: orders.Looping(eta=eta)}
ROWS = 32  # prompts at a time
SCHEDULES = 10_000  # of a sweep
AT_ONCE = 16_384  # tokens of --text in a batch, at most, where a window has fewer
MEMORIES = {'per_loop': memories.PerLoop(), 'first': memories.First(), 'last': memories.Ring(size=1),
            'mean': memories.Mean()}
READERS = {}  # name of a flag -> the modes that read it


def define(kind, name, default, modes, about, **options):
  """Defines a flag that some modes alone read; others refuse it."""
  READERS[name] = modes.split(', ')
  kind(name, default, f'{modes}: {about}', **options)


flags.DEFINE_enum('mode', 'train', ['train', 'eval', 'generate', 'inspect', 'harness', 'import', 'plan', 'configs'],
                  'What to do; configs lists the configurations that come with the library, with --config=NAME what is '
                  'said of one.')
flags.DEFINE_string('workdir', None, 'Folder of the run, of this machine or of a bucket (gs://, s3://): configuration, '
                    'data, checkpoints, results; plan and configs need none.')
flags.register_multi_flags_validator(
    ['workdir', 'mode'], lambda given: given['workdir'] or given['mode'] in ('plan', 'configs'),
    '--workdir is missing: name the folder of the run')
flags.DEFINE_multi_string('set', [], 'path=value replaces a field of the configuration; may be repeated. eval, '
                          'generate, inspect, harness, import: mesh.data, mesh.fsdp and mesh.tensor alone, the devices '
                          'that the model is divided over.')
define(flags.DEFINE_string, 'config', None, 'train, plan, configs', 'one of the library, such as loopformer:tiny, or '
       'file.py:argument, which defines get_config.')
define(flags.DEFINE_string, 'from', None, 'import', 'a folder with config.json and weights, as models are published, a '
       ".gguf file, or with --kind a checkpoint of a paper's own code.")
define(flags.DEFINE_string, 'kind', None, 'import', 'whose code wrote the checkpoint, as of convert.from_official: '
       'loopformer, base, base_loop, tmlt, parcae, huginn or ouro.')
define(flags.DEFINE_string, 'dtype', None, 'import', 'of matrix products: float32 (the default) or bfloat16.')
define(flags.DEFINE_integer, 'loops', None, 'import', "steps of the loop; the model's own by default.", lower_bound=1)
define(flags.DEFINE_integer, 'relaxed', None, 'import', 'with --loops: layers are tied over so many loops, each of '
       'which has an update of this rank, the nearest to what tying loses.', lower_bound=1)
define(flags.DEFINE_string, 'adapter', None, 'import',
       "a folder of a LoRA adapter of PEFT, which is added to the weights.")
define(flags.DEFINE_integer, 'prelude', None, 'import', 'the first so many layers stay outside the loop.',
       lower_bound=0)
define(flags.DEFINE_integer, 'coda', None, 'import', 'the last so many layers stay outside the loop.', lower_bound=0)
define(flags.DEFINE_float, 'damped', None, 'import', 'the share of its way that every step of the loop goes, such as '
       '0.5, so that a model that was not trained to loop can.')
define(flags.DEFINE_integer, 'retrofit', None, 'import', 'retrofitted recurrence: so many layers after the prelude are '
       "dropped, and every step over those up to the coda takes the prelude's output in again, by a new adapter; to be "
       'trained on.', lower_bound=0)
define(flags.DEFINE_integer, 'heads', None, 'import', 'with --kind: heads of attention, where no shape shows them.',
       lower_bound=1)
define(flags.DEFINE_integer, 'length', None, 'import', 'with --kind: the longest sequence, where no shape shows it.',
       lower_bound=1)
define(flags.DEFINE_integer, 'step', None, 'eval, generate, inspect, harness', 'which checkpoint; the last by default.',
       lower_bound=0)
define(flags.DEFINE_list, 'depths', None, 'eval, harness', "budgets, such as 1,2,4,8; the configuration's by default.")
define(flags.DEFINE_string, 'schedules', None, 'eval, harness', 'step sizes, schedules apart by semicolons: '
       '"0.5,0.25,0.25;0.5,0.5".')
define(flags.DEFINE_integer, 'sweep', None, 'eval', 'rank all schedules of this budget on the grid of the finest '
       'trajectory.', lower_bound=1)
define(flags.DEFINE_string, 'exits', None, 'eval, harness', 'thresholds of rules that end loops by token: '
       '"kl:1e-3;state:0.1".')
define(flags.DEFINE_integer, 'eval_batches', None, 'eval', "batches of every split; the configuration's by default.",
       lower_bound=1)
define(flags.DEFINE_string, 'text', None, 'eval', "a file of text (UTF-8) that is evaluated on whole, in the place of "
       "the task's examples.")
define(flags.DEFINE_integer, 'window', None, 'eval', "with --text: tokens that the model reads at a time; the task's "
       "length by default, an imported model's longest.", lower_bound=1)
define(flags.DEFINE_integer, 'stride', None, 'eval', 'with --text: windows begin so many tokens apart, and each counts '
       'what none before it did; the window by default.', lower_bound=1)
define(flags.DEFINE_multi_string, 'prompt', [], 'generate, inspect', 'a prompt; may be repeated.')
define(flags.DEFINE_bool, 'chat', False, 'generate',
       "prompts are what a user says, written by the tokenizer's chat template.")
define(flags.DEFINE_string, 'messages', None, 'generate', 'a file of chats to answer, a row each: {"messages": '
       '[{"role": "user", "content": ...}]}.')
define(flags.DEFINE_string, 'budget', None, 'generate, inspect', 'loops a token, or step sizes such as 0.5,0.25,0.25.')
define(flags.DEFINE_list, 'tasks', None, 'harness', 'tasks of lm-evaluation-harness, such as piqa_1500 (extra `eval`).')
define(flags.DEFINE_string, 'include', None, 'harness', 'a folder of tasks, as experiments.tools.evaluation_data '
       "writes it; the harness's own by default.")
define(flags.DEFINE_integer, 'limit', None, 'harness', 'so many rows of every task.', lower_bound=1)
define(flags.DEFINE_string, 'exit', None, 'generate', 'one rule and threshold as of --exits, by which tokens take '
       'fewer loops.')
define(lambda name, default, about: flags.DEFINE_enum(name, default, list(FILLS), about), 'fill', 'copy', 'generate',
       'with --exit, what the steps that a token skips leave in the cache: a copy of its last entries, or what they '
       'would have left (exact; no time is saved).')
define(flags.DEFINE_string, 'memory', None, 'generate, harness', 'what texts are generated with: per_loop, first, '
       "ring:SIZE, last or mean (docs/memories.md); the model's own by default.")
define(flags.DEFINE_string, 'draft', None, 'generate', 'loops, or step sizes, that draft tokens, which all loops of '
       'the budget then judge.')
define(flags.DEFINE_list, 'contrast', None, 'generate', 'tokens are drawn by what all loops answer and fewer do not: '
       'the loops of the shallow answer (0: none), and after a comma the weight of its log-probabilities, '
       '1 by default: 1,0.5.')
define(flags.DEFINE_integer, 'max_new_tokens', 64, 'generate', 'at most so many tokens; by default as many of them '
       'as fit, of a masked diffusion model all that fit.', lower_bound=1)
define(flags.DEFINE_integer, 'denoise', None, 'generate', 'denoising steps of a masked diffusion model '
       '(docs/denoising.md); its own by default. Prompts may have holes: <mask>, <mask:5>.', lower_bound=1)
define(flags.DEFINE_string, 'order', None, 'generate', 'with a masked diffusion model, what is written first: '
       'confidence, likeliest, margin, entropy, random, left, ancestral, cap:ETA, rescale:ETA, doubtful, '
       'plateau:ETA or topk.')
define(flags.DEFINE_integer, 'blocks', None, 'generate', 'with a masked diffusion model, parts of the answer that are '
       'written one after the other.', lower_bound=1)
define(flags.DEFINE_float, 'guidance', None, 'generate', 'with a masked diffusion model, the weight of classifier-free '
       'guidance by the prompt.', lower_bound=0)
define(flags.DEFINE_float, 'temperature', 1.0, 'generate', '0 takes the likeliest token.', lower_bound=0)
define(flags.DEFINE_integer, 'top_k', None, 'generate', 'draw from the k likeliest tokens.', lower_bound=1)
define(flags.DEFINE_float, 'top_p', None, 'generate', 'draw from the likeliest tokens that reach this probability.',
       lower_bound=0, upper_bound=1)
define(flags.DEFINE_integer, 'seed', 0, 'generate', 'of the draws.', lower_bound=0, upper_bound=SEEDS - 1)
define(flags.DEFINE_string, 'profile', None, 'train', 'first and last step of a profile, such as 20:25, which '
       'WORKDIR/profile takes.')
define(flags.DEFINE_bool, 'verify', False, 'train', 'read all data first, and compare them with what was prepared.')
machines.define_flags()
READERS |= dict.fromkeys(machines.NAMES, ['train', 'eval', 'generate', 'inspect', 'harness', 'import'])
define(flags.DEFINE_integer, 'devices', 1, 'plan', 'how many devices the mesh has.', lower_bound=1)
define(flags.DEFINE_string, 'topology', None, 'plan', 'a machine whose own compiler compiles the program, such as '
       'v5e:4x4 or h100:8 (extra `tpu`; docs/plan.md).')
define(flags.DEFINE_string, 'program', 'train', 'plan', 'with --topology: train, eval, prefill or decode.')
define(flags.DEFINE_integer, 'rows', 1, 'plan', 'with --topology: sequences that are evaluated, or requests served, at '
       'a time.')
define(flags.DEFINE_list, 'accelerators', ['v5e', 'v5p', 'H100', 'H200'], 'plan', 'what they may be, of '
       'metrics.ACCELERATORS.')


def given_flags() -> dict:
  """The flags that were given, of those that some modes alone read: name -> value."""
  return {name: FLAGS[name].value for name in READERS if FLAGS[name].present}


def check_flags(mode: str, given: dict):
  """Raises ConfigError where a flag was given that the mode does not read, or one without a value."""
  for name, value in given.items():
    readers = READERS[name]
    if mode not in readers:
      raise ConfigError(f'--{name}: --mode={mode} does not read it, {" and ".join(readers)} '
                        f'{"do" if len(readers) > 1 else "does"}; leave it out')
    if value in ('', []):
      raise ConfigError(f'--{name}: no value; give one, or leave it out')


def check_command(*read: str):
  """Ends another command, which reads these flags of this file alone, where it was given others; or by --set the seed,
  where it has a flag for that."""
  for name in ('mode', 'set', *READERS):
    if FLAGS[name].present and name not in read:
      sys.exit(f'error: --{name}: this command does not read it; leave it out')
  own = 'seed' if 'seed' in read else 'seeds' if 'seeds' in FLAGS else None
  for change in FLAGS['set'].value if own else ():
    if change.partition('=')[0].strip() == 'train.seed':
      sys.exit(f'error: --set={change}: this command takes seeds by --{own}; leave it out')


def run_train(workdir: Path):
  """Trains, or resumes the run that the work folder holds."""
  if FLAGS.config is None and not (workdir / 'config.json').exists():
    raise ConfigError('--config is missing: name a configuration, such as loopformer:tiny (--mode=configs lists them, '
                      'as `loopformer configs` does)')
  config = None if FLAGS.config is None else configs.load(FLAGS.config, FLAGS.set)
  saved = configs.read(workdir, config) if (workdir / 'config.json').exists() else None
  if config is None:
    config = saved
    for assignment in FLAGS.set:
      config = configs.override(config, assignment)
  configs.check(config)
  profile = None
  if FLAGS.profile:
    profile = numbers(FLAGS.profile.replace(':', ','), '--profile', int)
    if len(profile) != 2 or not 0 < profile[0] <= profile[1]:
      raise ConfigError(f'--profile={FLAGS.profile}: give the first and the last step, such as 20:25')
  machines.connect()
  resume.check(config, workdir)
  if processes.is_leader():
    print(configs.describe(config))
    print(f'parameters: {parameter_count(config.model):,}; processes: {jax.process_count()}; devices: '
          f'{jax.device_count()} {jax.devices()[0].device_kind}', flush=True)
  start = time.time()
  train(config, workdir, log=say, profile=profile, verify=FLAGS.verify)
  if processes.is_leader():
    print(f'trained in {metrics.duration(time.time() - start)}; work folder {workdir}')


def compiled(workdir: Path | None) -> str:
  """The folder of compiled programs: of the run, where others need them too or this machine may be lost; else our own.

  JAX writes it from process 0 alone, so the processes of other machines would compile at every start. (On CPUs they do:
  there JAX's keys differ by process.)
  """
  if FLAGS.mode == 'train' and (machines.several() or storage.remote(workdir)):
    return str(workdir / 'compiled')
  return str(storage.cache())


def keep_compiled(workdir: Path | None):
  """Sets the folder of compiled programs, unless JAX_COMPILATION_CACHE_DIR names another, or by '' none."""
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    folder = compiled(workdir)
    storage.check(folder, 'compiled programs', writes=not storage.remote(folder))
  except ConfigError as error:
    print(f'warning: compiled programs are not kept, so that every start compiles anew: {error}', file=sys.stderr)
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  if storage.remote(folder):  # XLA's own beside it would be a local folder of that name
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


def load(workdir: Path) -> tuple:
  """As `loopformer.load`, onto the devices that the flags tell of."""
  machines.check_set(FLAGS.set, f'--mode={FLAGS.mode}')
  machines.connect()
  return loopformer.load(workdir, FLAGS.step, machines.mesh_of(configs.read(workdir), FLAGS.set))


def run_eval(workdir: Path):
  """Evaluates the checkpoint at budgets and schedules; writes eval/<name>.{csv,json,png} and prints the table."""
  model, params, tokenizer, config = load(workdir)
  stores = storage.stores(workdir / 'eval', say)
  params = sharding.gathered(params)
  jobs = {}
  if FLAGS.sweep is not None:
    count = math.comb(model.loops - 1, FLAGS.sweep - 1)
    if count > SCHEDULES:
      raise ConfigError(f'--sweep={FLAGS.sweep}: there are {count:,} schedules of so many steps on the grid of '
                        f'1/{model.loops}, more than the {SCHEDULES:,} that are ranked; give fewer steps, or name some '
                        'by --schedules')
    jobs[f'sweep{FLAGS.sweep}'] = {label(steps): steps
                                   for steps in plans.all_schedules(FLAGS.sweep, model.loops, '--sweep')}
  if FLAGS.schedules:
    jobs['schedules'] = {label(steps): plans.check_steps(steps, name='--schedules') for steps in given_schedules()}
  if FLAGS.depths or not (jobs or FLAGS.exits):
    budgets = numbers(','.join(FLAGS.depths), '--depths', int) if FLAGS.depths else config.evals.budgets
    jobs['depths'] = {str(budget): plans.resolve(budget, '--depths') for budget in budgets}
    jobs['depths'] |= {name: run for name, run in config.evals.schedules().items() if isinstance(run, Run)}
  if FLAGS.exits:
    jobs['exits'] = {str(n): plans.resolve(n) for n in range(1, model.loops + 1)} | rules(FLAGS.exits, model)
  tests, measure = examples(model, params, tokenizer, config, workdir)
  lengths, first = None if tokenizer is None else text_bytes(tokenizer), measures.main_number(measure)
  for (name, schedules), (split, batches) in itertools.product(jobs.items(), tests.items()):
    warn_beyond(model, max((steps for steps in schedules.values() if not isinstance(steps, Run)), key=len, default=()))
    start = time.time()
    name += '' if split == 'validation' else f'-{split}'
    rows = evaluate(model, params, batches(), schedules, lengths, measure)
    if name.startswith('sweep'):
      rows = ranked(rows, first, measure.better[first])
    say(f'{name}: {rows[0]["tokens"]:,} {split} tokens, {time.time() - start:.1f} s\n{metrics.table(rows)}')
    if stores and processes.is_leader():
      write(workdir / 'eval', name, rows, f'{config.name}, {workdir.name}', first)
  if stores and processes.is_leader():
    plots.training(workdir / 'eval/training.png', metrics.read_rows(workdir / 'metrics.jsonl'),
                   measures.main_number(config.task.measure))
    say(f'written to {workdir / "eval"}')


def ranked(rows: list[dict], name: str, better: int) -> list[dict]:
  """The rows with their ranks, the best first by a number, of which more or less is better (measures.MORE, LESS)."""
  return [{'rank': rank, **row} for rank, row in enumerate(sorted(rows, key=lambda row: -better * row[name]), 1)]


def examples(model, params, tokenizer, config, workdir: Path) -> tuple[dict[str, Callable[[], Iterable]], Any]:
  """What is evaluated on, name -> () -> batches, and the measure: the task's splits, or the text of --text."""
  if FLAGS.text is None:
    for name in ('window', 'stride'):
      if FLAGS[name].present:
        raise ConfigError(f'--{name}: is read with --text alone; leave it out')
    if not config.task.splits:
      raise ConfigError(f'workdir = {workdir}: its task ({type(config.task).__name__}) has no examples to evaluate on; '
                        'name a text by --text=FILE, or tasks with --mode=harness')
    count = FLAGS.eval_batches or config.train.eval_batches
    return ({split: functools.partial(held_out, config, workdir, count, split) for split in config.task.splits},
            config.task.measure)
  if tokenizer is None:
    raise ConfigError(f'--text={FLAGS.text}: {workdir} holds no tokenizer, so that its model reads no text; '
                      'leave it out')
  from loopformer.data import passage
  from loopformer.inference.harness import check_causal
  text = reading.text(FLAGS.text, 'name a file of text by --text')
  length = min(config.task.length, model.read_in.length) if FLAGS.window is None else FLAGS.window
  if length > model.read_in.length:
    raise ConfigError(f'--window={length}: the model has {model.read_in.length} positions (read_in.length); give fewer')
  if FLAGS.stride is not None and FLAGS.stride > length:
    raise ConfigError(f'--stride={FLAGS.stride}: tokens between windows of {length} would be left out; '
                      f'give {length} or less')
  if not text:
    raise ConfigError(f'--text={FLAGS.text}: it is empty; name another file')
  rows = max(1, min(config.train.batch, AT_ONCE // length))
  if not model.sampler.denoises:
    check_causal(model, params)

  def batches():
    found = passage.batches(text, tokenizer, length, stride=FLAGS.stride, rows=rows, causal=not model.sampler.denoises)
    return found if FLAGS.eval_batches is None else itertools.islice(found, FLAGS.eval_batches)

  return {'text-' + re.sub(r'[^\w+-]+', '_', Path(FLAGS.text).stem): batches}, (
      config.task.measure if model.sampler.denoises else measures.Tokens())


def held_out(config, workdir: Path, count: int, split: str = 'validation') -> list[dict]:
  """The first `count` batches of a split that is not trained on."""
  from loopformer.data import batches as data
  batches = data.batches(config.task.examples(workdir, split, 0), batch=config.train.batch)
  return [batch for batch, _ in zip(batches, range(count))]


def write(folder: Path, name: str, rows: list[dict], title: str, show: str):
  """The rows as CSV, JSON and, where matplotlib is installed, a plot of what `show` names."""
  folder.mkdir(parents=True, exist_ok=True)
  records.write(folder / f'{name}.json', rows)
  metrics.write_csv(folder / f'{name}.csv', rows)
  if name.startswith('depths'):
    plots.depths(folder / f'{name}.png', {title: rows}, show=show)
  elif name.startswith('exits'):
    plots.exits(folder / f'{name}.png', {title: rows}, 'accuracy' if 'accuracy' in rows[0] else show)
  else:
    plots.ranking(folder / f'{name}.png', rows, title, show)


def run_generate(workdir: Path):
  """Prints a continuation of every prompt."""
  model, params, tokenizer, _ = load(workdir)
  check_text(workdir, model, tokenizer)
  budget, draft = (given and loops_or_sizes(given, flag)
                   for given, flag in ((FLAGS.budget, '--budget'), (FLAGS.draft, '--draft')))
  prompts, steps = given_prompts(), plans.resolve(model.loops if budget is None else budget, '--budget')
  if model.sampler.denoises:
    return run_denoise(model, params, tokenizer, prompts, steps)
  for name in DENOISING:
    if FLAGS[name].present:
      raise ConfigError(f'--{name}: the model of {workdir} writes token by token, without denoising; leave it out')
  if FLAGS['fill'].present and FLAGS.exit is None:
    raise ConfigError(f'--fill={FLAGS.fill}: is read with --exit alone, by which tokens skip steps; leave it out')
  exit_policy = None if FLAGS.exit is None else only_exit(model)
  model = model.clone(memory=given_memory() or model.memory, sampler=given_sampler() or model.sampler)
  warn_beyond(model, steps)
  encoded = [prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else
             chats.begun(tokenizer, prompt, f'prompt {number}') for number, prompt in enumerate(prompts)]
  fits = [max(1, model.read_in.length - (len(ids) or 1)) for ids in encoded]
  news = [FLAGS.max_new_tokens if FLAGS['max_new_tokens'].present else min(FLAGS.max_new_tokens, most) for most in fits]
  room = max((len(ids) or 1) + new for ids, new in zip(encoded, news))
  engine = model.sampler.serve(model, params, tokenizer, rows=min(len(prompts), ROWS), exit=exit_policy, draft=draft,
                               length=min(max(room, 2), model.read_in.length), loops=max(len(steps), model.loops))
  for number, (prompt, new) in enumerate(zip(encoded, news)):
    engine.submit(prompt, budget=budget, max_new_tokens=new, temperature=FLAGS.temperature,
                  top_k=FLAGS.top_k, top_p=FLAGS.top_p, seed=FLAGS.seed, number=number)
  for prompt, text in zip(prompts, engine.run()):
    told = (prompt if isinstance(prompt, str)
            else ''.join(f'{m["role"]}: {m["content"]}\n' for m in prompt) + 'assistant: ')
    say(f'--- {FLAGS.budget or model.loops} loops\n{told}{text}')
  if exit_policy is not None:
    stats = engine.stats
    say(f'--- mean loops a token: {stats["loops"]:.2f} of {len(steps)} with {FLAGS.exit}, over {stats["passes"]} '
        'tokens; the first of a text comes with its prompt, which is read with all loops, and is not among them')


def check_text(workdir: Path, model, tokenizer):
  """Raises ConfigError where a model reads no text."""
  if tokenizer is None:
    raise ConfigError(f'workdir = {workdir}: ' + (
        'no tokenizer came with its model; import it again with tokenizer.json or tokenizer.model beside the weights'
        if model.read_in.vocab else 'its task has vectors as inputs, and no text that could be a prompt or an answer; '
        'loopformer.load and loopformer.trace, evaluate take vectors'))


def run_inspect(workdir: Path):
  """Prints what every loop does with every prompt; writes inspect/{loops,places,attention}.{csv,json} and pictures."""
  if not FLAGS.prompt:
    raise ConfigError('--prompt is missing: give a text to inspect')
  model, params, tokenizer, config = load(workdir)
  check_text(workdir, model, tokenizer)
  steps = plans.resolve(model.loops if FLAGS.budget is None else loops_or_sizes(FLAGS.budget, '--budget'), '--budget')
  folder = workdir / 'inspect'
  stores = storage.stores(folder, say)
  into = folder if stores and processes.is_leader() else None
  inspection.inspect(model, params, tokenizer, FLAGS.prompt, steps, into, f'{config.name}, {workdir.name}', say)
  if stores:
    say(f'written to {folder}')


def run_denoise(model, params, tokenizer, prompts, sizes):
  """Prints what a masked diffusion model writes after every prompt, or into its holes."""
  for name in UNMASKED:
    if FLAGS[name].present:
      raise ConfigError(f'--{name}: a masked diffusion model writes all tokens at once, and not one by one; leave it '
                        f'out (it has {", ".join(f"--{name}" for name in DENOISING)})')
  if FLAGS['max_new_tokens'].present and all(isinstance(prompt, str) and HOLE.search(prompt) for prompt in prompts):
    raise ConfigError(f'--max_new_tokens={FLAGS.max_new_tokens}: holes of a prompt are filled, and nothing is added; '
                      'leave it out')
  warn_beyond(model, sizes)
  model = model.clone(sampler=given_order(model.sampler))
  denoiser = model.sampler.serve(model, params, tokenizer, rows=min(len(prompts), ROWS),
                                 loops=max(len(sizes), model.loops), log=say)
  steps = FLAGS.denoise or model.sampler.steps
  for number, prompt in enumerate(prompts):
    denoiser.submit(prompt, budget=sizes, steps=steps, temperature=FLAGS.temperature, top_k=FLAGS.top_k,
                    top_p=FLAGS.top_p, max_new_tokens=FLAGS.max_new_tokens if FLAGS['max_new_tokens'].present else None,
                    seed=FLAGS.seed, number=number)
  for prompt, text in zip(prompts, denoiser.run()):
    told = '' if isinstance(prompt, str) and HOLE.search(prompt) else prompt if isinstance(prompt, str) else ''.join(
        f'{m["role"]}: {m["content"]}\n' for m in prompt) + 'assistant: '
    say(f'--- {steps} denoising steps of {FLAGS.budget or model.loops} loops\n{told}{text}')


def given_order(sampler):
  """The sampler of a masked diffusion model with what --order, --blocks and --guidance say. Raises ConfigError naming
  the flag."""
  order, changes = sampler.order, {}
  if FLAGS.order is not None:
    name, colon, number = FLAGS.order.partition(':')
    eta = numbers(number, '--order=NAME:ETA, ETA') if colon and name in SIGMAS else ()
    if name not in SCORES | SIGMAS | PLANNERS or bool(colon) + (name not in SIGMAS) != 1 or len(eta) > 1:
      raise ConfigError(f'--order={FLAGS.order}: there is no such order; choose from {", ".join(SCORES | PLANNERS)}, '
                        f'or {", ".join(f"{name}:ETA" for name in SIGMAS)}')
    try:
      order = (orders.Ranked(score=SCORES[name]) if name in SCORES
               else PLANNERS[name] if name in PLANNERS else SIGMAS[name](*eta))
    except ConfigError as error:
      raise ConfigError(f'--order={FLAGS.order}: {error}') from None
  if FLAGS.blocks is not None:
    if not isinstance(order, orders.Ranked):
      raise ConfigError(f'--blocks={FLAGS.blocks}: is read with an order by rank ({", ".join(SCORES)}); leave it out')
    order = dataclasses.replace(order, blocks=FLAGS.blocks)
  if FLAGS.guidance is not None:
    changes = {'guidance': FLAGS.guidance}
  return dataclasses.replace(sampler, order=order, **changes)


def given_prompts() -> list:
  """What is to be continued: texts, or the messages of chats. Raises ConfigError naming the flag, or file and row."""
  if FLAGS.messages is None:
    if FLAGS.chat and not FLAGS.prompt:
      raise ConfigError('--chat: there is nothing that a user says; give --prompt, or a file by --messages')
    return [[{'role': 'user', 'content': text}] for text in FLAGS.prompt] if FLAGS.chat else FLAGS.prompt or ['']
  if FLAGS.prompt:
    raise ConfigError('--prompt and --messages: give one of the two')
  given = [messages for _, messages in rows_of(FLAGS.messages, FLAGS.messages,
                                            remedy='name a file of chats by --messages')]
  if not given:
    raise ConfigError(f'--messages={FLAGS.messages}: it has no rows; write one a line')
  return given


def run_harness(workdir: Path):
  """Accuracy of the harness's tasks at every depth, schedule and exit; writes harness/<name>.{csv,json}."""
  from loopformer.inference import harness
  if not FLAGS.tasks:
    raise ConfigError('--tasks is missing: name tasks, such as --tasks=piqa_1500 --include=FOLDER')
  depths = numbers(','.join(FLAGS.depths), '--depths', int) if FLAGS.depths else ()
  machines.check_set(FLAGS.set, '--mode=harness')
  machines.connect()
  harness.run_harness(workdir, FLAGS.tasks, depths, given_schedules(), leaves(FLAGS.exits or '', '--exits'),
                      given_memory(), FLAGS.include, FLAGS.limit, FLAGS.step,
                      mesh=machines.mesh_of(configs.read(workdir), FLAGS.set))


# Flags that say how a model is imported -> whether they are for checkpoints of papers' code; None for all.
IMPORT = {'kind': True, 'dtype': None, 'loops': None, 'relaxed': False, 'adapter': False, 'prelude': False,
          'coda': False, 'damped': False, 'retrofit': False, 'heads': True, 'length': True}


def check_looped(given: dict):
  """Raises ConfigError where --damped or --retrofit, of the flags of an import, would make no loop, or no other than
  there is.
  """
  damped, once = given.get('damped'), given.get('loops', 1) < 2
  if damped == 1:
    raise ConfigError('--damped=1: a whole step is what --loops runs without it; leave it out, or give a share below 1')
  if damped is not None and 0 < damped < 1 and once and 'retrofit' not in given:
    raise ConfigError(f'--damped={damped:g}: a loop of one step would go that share of the decoder\'s way and stop '
                      'there; give --loops, 2 or more')
  if 'retrofit' in given and once and damped is None:
    raise ConfigError(f'--retrofit={given["retrofit"]}: layers are dropped for a loop, which would run once; '
                      'give --loops, 2 or more')


def run_import(workdir: Path):
  """Makes a work folder of a model that comes from elsewhere: configuration, weights as step 0, tokenizer."""
  source = FLAGS['from'].value
  if source is None:
    raise ConfigError('--from is missing: name a Hugging Face folder, a .gguf file, or a checkpoint with --kind')
  if (workdir / configs.FILE).exists():
    raise ConfigError(f'workdir = {workdir}: it holds a run; give a new folder')
  if configs.is_workdir(storage.path(source)):
    raise ConfigError(f'--from={source}: it is a work folder already, which every mode reads as it is')
  given = {name: FLAGS[name].value for name in IMPORT if FLAGS[name].present}
  for name in given:
    if IMPORT[name] not in (None, 'kind' in given):
      raise ConfigError(f'--{name}: is read {"with" if IMPORT[name] else "without"} --kind alone; leave it out')
  check_looped(given)
  path = storage.path(source)
  if 'kind' not in given and path.is_dir() and not any(
      (path / f'{name}config.json').is_file() for name in ('', 'adapter_')):
    raise ConfigError(f'--from={source}: it has no config.json; give a folder as models are published, with '
                      'config.json beside the weights, a .gguf file, or whose code wrote them by --kind')
  machines.connect()
  loaded = loopformer.load(source, mesh=machines.mesh_for_import(FLAGS.set), **given)
  loaded.save(workdir)
  say(f'{configs.describe(loaded.config.model)}\nparameters: {parameter_count(loaded.model):,}; '
      f'{"a" if loaded.tokenizer else "no"} tokenizer; written to {workdir}')


def run_plan():
  """Prints what a program needs of every device, and how long it takes at least; writes nothing."""
  from experiments.tools import ahead, estimate
  if FLAGS.config is None:
    raise ConfigError('--config is missing: name a configuration, such as loopformer:paper (--mode=configs lists them, '
                      'as `loopformer configs` does)')
  unread, why = ((('rows',), 'is read with --topology alone; name a machine by it, such as v5e:4x4')
                 if FLAGS.topology is None else
                 (('devices', 'accelerators'), 'is not read with --topology, which names the machine; leave it out'))
  for name in unread:
    if FLAGS[name].present:
      raise ConfigError(f'--{name} {why}')
  config = configs.load(FLAGS.config, FLAGS.set)
  if FLAGS.topology is not None:
    ahead.run(config, FLAGS.topology, FLAGS.program, FLAGS.rows)
  elif FLAGS.program != 'train':
    raise ConfigError(f'--program={FLAGS.program}: simulated CPU devices plan training alone; name a machine by '
                      '--topology, such as v5e:4x4')
  else:
    estimate.run(config, FLAGS.devices, FLAGS.accelerators)


def run_configs():
  """Prints the names of the configurations that come with the library, and what they are; or all that is said of one.
  """
  files = configs.published()
  about = {name: ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '' for name, file in files.items()}
  if FLAGS.config is not None:
    name = FLAGS.config.partition(':')[0]
    if name not in about:
      raise ConfigError(f'--config={FLAGS.config}: no configuration of the library; there are {", ".join(about)}')
    print(f'{files[name]}\n\n{about[name]}')
    return
  column = max(map(len, about)) + 2
  for name, text in about.items():
    print(textwrap.fill(f'{name:{column}}{" ".join(text.partition(chr(10) * 2)[0].split())}', 120 + column,
                        subsequent_indent=' ' * column, break_long_words=False))
  print('\n--mode=configs --config=NAME tells what arguments one has; --config=NAME:ARGUMENTS trains it')


def numbers(text: str, flag: str, kind: type = float) -> tuple:
  """Comma-separated numbers. Raises ConfigError naming the flag."""
  try:
    return tuple(kind(word) for word in text.split(','))
  except ValueError:
    kinds = {int: 'whole numbers', float: 'numbers'}
    raise ConfigError(f'{flag}={text}: expected {kinds[kind]} apart by commas') from None


def loops_or_sizes(text: str, flag: str) -> int | tuple[float, ...]:
  """A number of loops, or step sizes apart by commas. Raises ConfigError naming the flag."""
  sizes = numbers(text, flag)
  if len(sizes) > 1 or sizes == (1,):
    return plans.check_steps(sizes, name=flag)
  if sizes[0] % 1:  # NaN for what is no finite number, which is true too
    raise ConfigError(f'{flag}={text}: neither a whole number of loops nor step sizes with sum one; give loops, such '
                      'as 2, or sizes, such as 0.5,0.25,0.25')
  return plans.count(flag, int(sizes[0]))


def given_schedules() -> list[tuple[float, ...]]:
  """The step sizes of --schedules. Raises ConfigError where it was given and names none."""
  found = [numbers(text, '--schedules') for text in (FLAGS.schedules or '').split(';') if text.strip()]
  if FLAGS.schedules and not found:
    raise ConfigError(f'--schedules={FLAGS.schedules}: names none; give step sizes, such as 0.5,0.25,0.25')
  return found


def given_memory():
  """The memory of --memory, or None. Raises ConfigError naming the flag."""
  name, colon, size = (FLAGS.memory or '').partition(':')
  if name == 'ring':
    sizes = numbers(size, '--memory=ring:SIZE, SIZE', int)
    if len(sizes) > 1:
      raise ConfigError(f'--memory={FLAGS.memory}: a ring has one size; give one, such as ring:2')
    return memories.Ring(size=sizes[0])
  if FLAGS.memory is not None and (colon or name not in MEMORIES):
    raise ConfigError(f'--memory={FLAGS.memory}: there is no such memory; choose from {", ".join(MEMORIES)}, ring:SIZE')
  return MEMORIES.get(name)


def given_sampler():
  """The sampler of --contrast, or None. Raises ConfigError naming the flag."""
  if FLAGS.contrast is None:
    return None
  words = numbers(','.join(FLAGS.contrast), '--contrast')
  if len(words) > 2 or words[0] % 1:
    raise ConfigError(f'--contrast={",".join(FLAGS.contrast)}: give a whole number of loops, '
                      'and after a comma a weight')
  try:
    return sampler.Contrasted(contrast=Contrast(shallow=int(words[0]), **({'weight': words[1]} if words[1:] else {})))
  except ConfigError as error:
    raise ConfigError(f'--contrast={",".join(FLAGS.contrast)}: {error}') from None


def rules(text: str, model) -> dict[str, Run]:
  """A run of the model's loops for every exit that --exits names."""
  return {name: Run(plan=plans.Uniform(model.loops), exit=exit_policy)
          for name, exit_policy in served(text, model, '--exits').items()}


def served(text: str, model, flag: str) -> dict[str, exits.Adaptive]:
  """As `leaves`. Raises ConfigError where the model cannot be run with one of them."""
  found = leaves(text, flag)
  for name, exit_policy in found.items():
    exits.check(model, exit_policy, f'{flag}={name}')
  return found


def only_exit(model) -> exits.Adaptive:
  """The exit of --exit. Raises ConfigError where it names several, or the model cannot be run with it."""
  found = list(served(FLAGS.exit, model, '--exit').values())
  if len(found) != 1:
    raise ConfigError(f'--exit={FLAGS.exit}: names {len(found)} exits; give one rule and threshold, such as kl:1e-3')
  return dataclasses.replace(found[0], fill=FILLS[FLAGS.fill])


def leaves(text: str, flag: str) -> dict[str, exits.Adaptive]:
  """'kl:1e-3,1e-2;state:0.1' -> an exit for every threshold. Raises ConfigError naming the flag."""
  found = {}
  if text and not text.strip('; '):
    raise ConfigError(f'{flag}={text}: names none; give a rule and thresholds, such as kl:1e-3')
  for word in filter(None, map(str.strip, text.split(';'))):
    name, _, thresholds = word.partition(':')
    if name not in RULES | DRAWN or name in DRAWN and thresholds:
      raise ConfigError(f'{flag}={text}: there is no rule {word!r}; choose from {", ".join(RULES)} with a '
                        f'threshold, {", ".join(DRAWN)} without one')
    if name in DRAWN:
      found[name] = exits.Adaptive(rule=DRAWN[name]())
      continue
    for threshold in numbers(thresholds, flag):
      try:
        found[f'{name}:{threshold:g}'] = exits.Adaptive(rule=RULES[name](threshold=threshold))
      except ConfigError as error:
        raise ConfigError(f'{flag}={name}:{threshold:g}: {error}') from None
  return found


def label(steps) -> str:
  return ' '.join(f'{step:g}' for step in steps)


def main(argv):
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every save otherwise
  interrupts.unwind(lambda: 'before the first step; the same command begins again, or goes on from the last checkpoint'
                    if FLAGS.mode == 'train' else f'before --mode={FLAGS.mode} had ended')
  try:
    check_flags(FLAGS.mode, given_flags())
    workdir = FLAGS.workdir and storage.path(FLAGS.workdir)
    if workdir:
      storage.check_workdir(workdir, writes=FLAGS.mode in ('train', 'import'))
    keep_compiled(workdir)
    if FLAGS.mode in ('plan', 'configs'):
      {'plan': run_plan, 'configs': run_configs}[FLAGS.mode]()
    else:
      with configs.trusting(FLAGS.trust):
        {'train': run_train, 'eval': run_eval, 'generate': run_generate, 'inspect': run_inspect, 'harness': run_harness,
         'import': run_import}[FLAGS.mode](workdir)
  except command.TOLD as error:
    processes.leave(error, f'error: {error}')
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError) and not re.search(
        'out of memory|resource_exhausted', str(error), re.I):
      processes.leave(error)
    asked = str(error).partition('\n')[0] or 'no more to be had'
    less = ('a smaller batch (train.batch, or more train.accumulate), a smaller model' if FLAGS.mode == 'train' else
            'fewer loops, fewer or shorter texts, a smaller model')
    processes.leave(error, f'error: out of memory ({asked}); take {less}, or mesh.fsdp over more devices; --mode=plan '
                    'tells what a step needs')
  except Exception as error:
    processes.leave(error)


if __name__ == '__main__':
  command.run(main)
