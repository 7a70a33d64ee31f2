"""Both stages of RELAY, with the self-taught controls: does a loop teach a decoder to think longer?

    python -m experiments.studies.relay_stages --seeds=0,1 --workdir=runs/relay --out=experiments/reports/relay

Of every seed: (I) a loop that shows rounds, a loop that answers alone, and a decoder that writes chains are trained.
(II) The first loop writes chains of larger problems; those whose last round agrees with its answer are merged with
original ones, by table, and the decoder is trained on by them. Controls: the decoder writes chains itself, a size
further in every phase, and what is kept is what the second loop, or the truth, agrees with.

What has been made stands in the work folder, and is not made again: the same command goes on where it was stopped.
Writes results.json, table.md and relay.png. Times are of whole batches of problems, divided by their number.
"""
from __future__ import annotations

import dataclasses
from pathlib import Path
import sys
import time
from typing import Any, Iterator

from absl import flags, logging
import numpy as np

from experiments.configs import relay
from experiments.main import check_command
from experiments.tools import command, plots, records
import loopformer
from loopformer import reading, storage
from loopformer.papers.relay.chains import by_loop, by_token, consistent, correct, draws, filled, originals, scored
from loopformer.tasks.reasoning import Chain, Problem, Rounds
from loopformer.tasks.recorded import record, recorded
from loopformer.training import metrics

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/relay.py'
LOOP, PLAIN, DECODER = 'loop, shows rounds', 'loop, answer alone', 'decoder'
KINDS = {LOOP: 'aligned', PLAIN: 'vanilla', DECODER: 'chain'}
SHOWN = 4  # sizes of the training that are measured, at most
TUNED = 'decoder, taught by the loop'
VERIFIERS = {'decoder, taught by itself (loop agrees)': 'loop', 'decoder, taught by itself (truth agrees)': 'truth'}


@dataclasses.dataclass(frozen=True)
class Tables:
  """Of a task: original problems; chains of the sizes beyond, the nearest first, for stage II (of the first alone where
  there is one number); and chains that are kept in every phase of the controls, of which there are no
  more than sizes."""
  originals: int
  written: tuple[int, ...]
  kept: tuple[int, ...]


def even(first: int, last: int, count: int) -> tuple[int, ...]:
  """So many whole numbers from one to another, evenly."""
  return tuple(np.linspace(first, last, count).round().astype(int).tolist())


# The paper prints arithmetic whole, of the others how they begin and end.
PAPER = {'ARI': Tables(42_515, (6477, 6882, 7287, 6477, 6072, 5668, 5263, 4858, 4453, 4048),
                       (15_000, 10_000, 7500, 6000, 5000)),
         'ED': Tables(60_844, even(4195, 3636, 10), (15_000, 10_000, 7500, 3000, 3000)),
         'LIS': Tables(73_235, even(1479, 1198, 20), (15_000, 10_000, 7500, 3000, 3000))}
TABLES = {'cpu': dict.fromkeys(relay.NAMES.values(), Tables(10_000, (3000,), (1500, 1500))),
          'gpu': dict.fromkeys(('ARI', 'ED', 'LIS'), Tables(50_000, (12_500,) * 4, (5000,) * 4)),
          'paper': PAPER}
# Of a phase of the controls: steps, learning rate (the paper: 100 epochs).
PHASES = {'cpu': (500, 2e-4), 'gpu': (1000, 5e-5), 'paper': (65_000, 5e-5)}


def train(argument: str, workdir: Path, seed: int, *changes: str):
  """Runs or resumes a run; what --set says comes after the changes, and holds."""
  command.train(f'{CONFIG}:{FLAGS.size},task={task()}{argument}', workdir, *changes, *FLAGS['set'].value,
                f'train.seed={seed}')


def task() -> str:
  """That of --task."""
  return FLAGS.task or next(iter(relay.SIZES[FLAGS.size].tasks))


def beyond() -> dict[str, tuple[int, ...]]:
  """The sizes beyond the training, by the names of the tasks."""
  sources = relay.SIZES[FLAGS.size].tasks
  if task() != 'all':
    return {'': sources[task()].beyond}
  return {relay.NAMES[name]: source.beyond for name, source in sources.items() if name != 'left'}


def tables() -> dict[str, Tables]:
  """By the names of the tasks."""
  return {name: TABLES[FLAGS.size][name or relay.NAMES[task()]] for name in beyond()}


def far(kind: str) -> Any:
  """The source of problems with room for all sizes."""
  return relay.problems(FLAGS.size, task(), kind, far=True)


# Stages --------------------------------------------------------------------------------------------------------------


def made(folder: Path, table: dict, make) -> tuple[Path, list[dict]]:
  """The file of merged problems, and what became of the table of chains; both are written once, by make() -> (problems,
  told). Raises ConfigError where they were with another table, other originals or --tries."""
  file, told = folder / 'merged.jsonl', folder / 'filled.json'
  done = file.exists() and told.exists()
  records.made_with(folder / 'made_with.json', done, tries=FLAGS.tries, chains=table,
                    originals={name: own.originals for name, own in tables().items()})
  if not done:
    problems, rows = make()
    record(file, problems)
    records.write(told, [dataclasses.asdict(row) for row in rows])
    for row in rows:
      print(f'{folder.name}: {row.task or task()}, size {row.size}: kept {row.kept} of {row.asked} wanted, of '
            f'{row.tried} tried', flush=True)
  return file, reading.read_json(told, f'remove {told}', list)


def taught(folder: Path, seed: int, loop: Path, decoder: Path) -> list[dict]:
  """Stage II: what became of the table of chains."""
  table = {name: dict(zip(sizes, tables()[name].written)) for name, sizes in beyond().items()}

  def make():
    model, params, _, _ = loopformer.load(loop)
    of = far('aligned')
    problems, told = filled(table, of, ('taught', seed), lambda some: by_loop(model, params, Rounds(of=of), some),
                            lambda problem, written: consistent(of, problem, written), FLAGS.tries)
    return originals(of, seed, {name: of.originals for name, of in tables().items()}) + problems, told

  file, told = made(folder, table, make)
  train(f',kind=tuned,start={decoder},chains={file}', folder, seed)
  return told


def self_taught(folder: Path, seed: int, verifier: str, plain: Path, decoder: Path) -> tuple[Path, list[dict]]:
  """A control: the folder of its last phase, and what became of its tables. Every phase keeps what the others have."""
  of, start, kept, told = far('chain'), decoder, [], []
  judge = loopformer.load(plain) if verifier == 'loop' else None
  first = originals(of, seed, {name: own.originals for name, own in tables().items()})
  steps, peak = PHASES[FLAGS.size]
  weights = [f'task.of.of.of.weights.{name}=1.0' for name in beyond() if name]
  kept_of = {name: tuple(zip(sizes, tables()[name].kept)) for name, sizes in beyond().items()}
  for phase in range(max(map(len, kept_of.values()))):
    # empty where a task has no more sizes
    table = {name: dict(rows[phase:phase + 1]) for name, rows in kept_of.items()}

    def make():
      model, params, _, _ = loopformer.load(start)
      verdicts = {}

      def write(some):
        if judge is not None:
          answers = by_loop(judge.model, judge.params, Rounds(of=far('vanilla')), some)
          verdicts.update(zip(some, (written.answer for written in answers)))
        return by_token(model, params, Chain(of=of), some)

      def keep(problem, written):
        return correct(problem, written) if judge is None else written.answer == verdicts[problem]

      problems, rows = filled(table, of, ('self', seed, verifier), write, keep, FLAGS.tries)
      return first + kept + problems, rows

    own = folder / f'phase-{phase + 1}'
    file, rows = made(own, table, make)
    kept, told = recorded(file)[len(first):], told + rows
    train(f',kind=tuned,start={start},chains={file}', own, seed, f'train.steps={steps}', f'optim.schedule.peak={peak}',
          *weights)
    start = own
  return start, told


# Measures ------------------------------------------------------------------------------------------------------------


def measure(folder: Path, kind: str) -> dict[str, dict]:
  """By task and size: scores, and what a problem costs."""
  model, params, _, _ = loopformer.load(folder)
  loops = kind in ('aligned', 'vanilla')
  form, write = (Rounds, by_loop) if loops else (Chain, by_token)
  source, found = far(kind), {}
  for name, sizes in beyond().items():
    own = source.tasks[name]
    for size in (*dict.fromkeys(even(own.shortest, own.longest, SHOWN)), *sizes):
      stream = draws(source, 'measured', size, name)
      problems = [next(stream) for _ in range(FLAGS.problems)]
      shown = form(of=sized(source, name, size))
      write(model, params, shown, problems)  # compiles
      start = time.perf_counter()
      written = write(model, params, shown, problems)
      spent = time.perf_counter() - start
      scores = scored(problems, written)
      answers = [problem.answer for problem in problems]
      row = {'answer': scores.answer, 'most frequent': max(map(answers.count, answers)) / len(answers)}
      if kind != 'vanilla':
        row |= {'chain': scores.chain, 'bits': scores.bits}
      row |= costs(model, shown, problems, loops) | {'ms': round(1e3 * spent / len(problems), 3)}
      if size == sizes[-1] and kind != 'vanilla':
        row['hits'] = [[None if np.isnan(hit) else round(float(hit), 3) for hit in hits] for hits in scores.hits]
      found[f'{name or task()} {size}'] = row
  return found


def sized(source: Any, name: str, size: int) -> Any:
  """The source with room for no more than a size of one task."""
  if not name:
    return dataclasses.replace(source, shortest=source.least, longest=size, room=size)
  return dataclasses.replace(source, of={**source.of, name: sized(source.of[name], '', size)})


def costs(model, form, problems: list[Problem], loops: bool) -> dict[str, float]:
  """Of a problem, means: floating-point operations, and steps that wait for each other."""
  each = []
  for problem in problems:
    if loops:
      tokens, steps, applied = form.width(problem), len(problem.rounds), len(problem.rounds)
    else:
      steps = sum(map(len, problem.rounds)) + 2
      tokens, applied = len(problem.prompt) + steps - 1, 1
    each.append((model.flops(tokens, applied) * tokens, steps))
  flops, steps = np.mean(each, 0)
  return {'MFLOP': round(float(flops) / 1e6, 3), 'steps': round(float(steps), 2)}


def run_seed(seed: int, workdir: Path) -> Iterator[dict]:
  """Makes and measures everything of one seed; what is known so far, after each model."""
  found, folders, own = {}, {}, '-inject' if FLAGS.inject else ''
  for name, kind in KINDS.items():
    loops = kind != 'chain'
    folders[name] = workdir / f'{kind}{own if loops else ""}-{seed}'
    train(f',kind={kind}{",inject=1" if FLAGS.inject and loops else ""}', folders[name], seed)
    found[name] = {'scores': measure(folders[name], kind)}
    yield found
  folder = workdir / f'taught{own}-{seed}'
  told = taught(folder, seed, folders[LOOP], folders[DECODER])
  found[TUNED] = {'tables': told, 'scores': measure(folder, 'tuned')}
  yield found
  for name, verifier in VERIFIERS.items():
    last, told = self_taught(workdir / f'self-{verifier}{own}-{seed}', seed, verifier, folders[PLAIN], folders[DECODER])
    found[name] = {'tables': told, 'scores': measure(last, 'tuned')}
    yield found


def rows_of(results: dict[str, dict]) -> list[dict]:
  """A row a seed, model and size."""
  return [{'seed': seed, 'model': name, 'size': size,
           **{key: '' if row.get(key) is None else round(row[key], 3)
              for key in ('answer', 'most frequent', 'chain', 'bits', 'MFLOP', 'steps', 'ms')}}
          for seed, found in results.items() for name, own in found.items() for size, row in own['scores'].items()]


def draw(path: Path, results: dict[str, dict]):
  """Right answers and whole chains by size, means over seeds; right tokens by round and place at the largest size, of
  the loop, and of decoders taught by it and by themselves."""
  pyplot = plots.library()
  if pyplot is None:
    return
  names = list(dict.fromkeys(name for found in results.values() for name in found))
  sizes = list(results[next(iter(results))][names[0]]['scores'])
  shown = [name for name in (LOOP, TUNED, *VERIFIERS) if name in names]
  figure, panels = pyplot.subplots(1, 2 + len(shown), figsize=(9 + 3 * len(shown), 4.5), layout='constrained')
  for number, name in enumerate(names):
    scores = [found[name]['scores'] for found in results.values() if name in found]
    for key, axes in zip(('answer', 'chain'), panels):
      if key in scores[0][sizes[0]]:
        axes.plot(range(len(sizes)), [np.mean([own[size][key] for own in scores]) for size in sizes], marker='o',
                  color=f'C{number}', label=name)
  for axes, title in zip(panels, ('right answers', 'right chains')):
    axes.set_xticks(range(len(sizes)), [size.rsplit(' ', 1)[-1] for size in sizes])
    axes.set(title=title, xlabel='size', ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
  panels[0].legend(fontsize=7)
  for name, axes in zip(shown, panels[2:]):
    hits = [found[name]['scores'][sizes[-1]]['hits'] for found in results.values() if name in found]
    image = axes.imshow(np.mean(np.array(hits, float), 0), vmin=0, vmax=1, aspect='auto')
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f'{name},\nsize {sizes[-1].rsplit(" ", 1)[-1]}', fontsize=8)
    axes.set(xlabel='place', ylabel='round')
  if shown:
    figure.colorbar(image, ax=panels[-1], label='right tokens')
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, of all."""
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation, data order and chains.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of experiments/configs/relay.py.')
  flags.DEFINE_string('task', None, "Task of experiments/configs/relay.py; the size's first by default.")
  flags.DEFINE_bool('inject', False,
                    'Both loops take the input in again in every step (not in the paper); give another --out.')
  flags.DEFINE_integer('problems', 256, 'Problems of every size to measure on.', lower_bound=1)
  flags.DEFINE_integer('tries', 40, 'So many problems at most are tried for every chain that is wanted.', lower_bound=1)


def main(argv):
  check_command('set')
  command.check_whole(seeds=FLAGS.seeds)
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  command.check_chosen('size', FLAGS.size, relay.SIZES)
  names = (*relay.SIZES[FLAGS.size].tasks, 'all')
  if task() not in names:
    sys.exit(f'error: --task={task()}: size {FLAGS.size} has no such task; choose from {", ".join(names)}')
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('size', 'inject', 'problems', 'tries', 'set', grow=('seeds',), task=task())
  results = {}
  for seed in FLAGS.seeds:
    for results[seed] in run_seed(int(seed), workdir):
      records.report(out, results, table=rows_of(results))
      print(f'seed {seed}: {list(results[seed])[-1]} measured', flush=True)
    draw(out / 'relay.png', results)
  print(metrics.table(rows_of(results)))


if __name__ == '__main__':
  define_flags()
  command.run(main)
