"""MELT from a model that is trained on the spot: all phases, and what tokens cost that are decoded one by one.

    python -m experiments.studies.melt_stages --seeds=0,1 --workdir=runs/melt --out=experiments/reports/melt

Trains the first model, which has rows of keys and values for every loop, and converts it: as the paper does, and with
one thing changed at a time. All are then decoded exactly, token by token, each with its own cache, beside two ways to
share the first model's rows that no training has prepared: those of the last loop, and the mean over loops. Models that
were converted are also measured as they were trained, by chunks of tokens. Writes results.json, table.md, melt.png.
"""
from __future__ import annotations

from pathlib import Path
from typing import Iterator

from absl import flags, logging
import jax
import jax.numpy as jnp
import numpy as np

from experiments.main import check_command, held_out
from experiments.studies.memories import decoded
from experiments.tools import command, plots, records
import loopformer
from loopformer import config as configs, memories, storage
from loopformer.inference import measures
from loopformer.inference.engine import Engine
from loopformer.inference.evaluate import evaluate
from loopformer.papers.melt.cell import Latest
from loopformer.training import metrics

FLAGS = flags.FLAGS

CONFIG = 'experiments/configs/melt.py'
WHOLE = 'no chunks'
# Name -> arguments of both phases, and changes of the second; None: no transition, whose steps go to the other phase.
ARMS = {'MELT': ('', ()), WHOLE: (',chunk={length}', ()), 'chunks of 4': (',chunk=4', ()),
        'last loop, trained': (',gate=last', ()),
        'no transition': None, 'no alignment': ('', ('objective.terms.aligned.weight=0.0',)),
        'scalar gate': (',gate=scalar', ())}
SHARED = {'rows of every loop': memories.PerLoop(), 'last loop, untrained': memories.Ring(size=1),
          'mean of loops, untrained': memories.Mean()}


def train(argument: str, workdir: Path, seed: int, *changes: str):
  """Runs or resumes a phase; what --set says comes after the changes, and holds."""
  command.train(f'{CONFIG}:{FLAGS.size}{argument}', workdir, *changes, *FLAGS['set'].value, f'train.seed={seed}')


def nll(model, params, batches) -> float:
  """Nats a token, decoded one by one from the first."""
  total = weight = 0.0
  for batch in batches:
    law = jax.nn.log_softmax(decoded(model, params, jnp.asarray(batch['tokens']), 0))
    own = -jnp.take_along_axis(law, jnp.asarray(batch['targets'])[..., None], -1)[..., 0]
    total, weight = total + float((own * batch['weights']).sum()), weight + float(batch['weights'].sum())
  return total / weight


def measure(folder: Path, memories: dict) -> dict[str, dict]:
  """By memory: nats a token decoded with it, and of the pass over all tokens by chunks where it has them."""
  model, params, tokenizer, config = loopformer.load(folder)
  batches, steps = held_out(config, folder, FLAGS.batches), {'all': (1 / model.loops,) * model.loops}
  lengths = measures.text_bytes(tokenizer)
  found = {}
  for name, part in memories.items():
    own = model.clone(memory=part or model.memory)
    chunks = [min(int(chunk), config.task.length) for chunk in FLAGS.chunks] if part is None else [None]
    found[name] = {'decoded': nll(own, params, batches), 'parallel': {
        str(chunk): evaluate(own.clone(memory=Latest(chunk=chunk)) if chunk else own, params, batches, steps,
                             lengths)[0]['loss'] for chunk in chunks}}
    if part is None:
      found[name]['trained with'] = str(model.memory.chunk)
  return found


def run_seed(seed: int, workdir: Path) -> Iterator[dict]:
  """Trains and measures everything of one seed; what is known so far, after each model."""
  base = workdir / f'base-{seed}'
  train('', base, seed)
  found = measure(base, SHARED)
  length = configs.read(base).task.length
  for name, arm in ARMS.items():
    folder = workdir / f'{name.replace(",", "").replace(" ", "_")}-{seed}'
    argument, changes = arm or ('', ())
    argument = argument.format(length=length) + f',base={base}'
    first = configs.load(f'{CONFIG}:{FLAGS.size},phase=transition{argument}', FLAGS['set'].value)
    second = configs.load(f'{CONFIG}:{FLAGS.size},phase=distill,start={base}{argument}', FLAGS['set'].value)
    start = base
    if arm is None:
      changes = (f'train.steps={first.train.steps + second.train.steps}',)
    else:
      start = folder / 'transition'
      train(f',phase=transition{argument}', start, seed)
    train(f',phase=distill,start={start}{argument}', folder / 'distill', seed, *changes)
    found |= measure(folder / 'distill', {name: None})
    print(f'seed {seed}, {name}: decoded {found[name]["decoded"]:.4f}, by chunks {found[name]["parallel"]}', flush=True)
    yield found


def cache_bytes(workdir: Path, seeds) -> list[dict]:
  """Bytes of the engine's caches a token, by loops, as they are allocated."""
  rows = []
  for name, folder in (('rows of every loop', workdir / f'base-{seeds[0]}'),
                       ('MELT', workdir / f'MELT-{seeds[0]}/distill')):
    model, params, tokenizer, config = loopformer.load(folder)
    for loops in (1, 2, 3, 4, 6, 8):
      engine = Engine(model, params, tokenizer, rows=1, loops=loops)
      rows.append({'cache': name, 'loops': loops, 'bytes a token': engine.bytes / config.model.read_in.length})
  return rows


def rows_of(results: dict[str, dict]) -> list[dict]:
  """A row an arm and seed; the rows that MELT is compared with first."""
  rows = []
  for seed, found in results.items():
    reference = found['rows of every loop']['decoded']
    for name, row in found.items():
      own = row['parallel'].get(row.get('trained with'), row['parallel'].get('None'))
      rows.append({'seed': seed, 'arm': name, 'NLL, decoded': row['decoded'],
                   'more than with rows of every loop': row['decoded'] - reference,
                   'NLL, as trained': own, 'chunk': row.get('trained with', 'any')})
  return rows


def draw(path: Path, results: dict[str, dict], sizes: list[dict]):
  """Decoded and parallel NLL by chunk, a mean over seeds; bytes of caches by loops."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout='constrained')
  for name in ('chunks of 4', 'MELT', WHOLE):
    found = [measured for measured in results.values() if name in measured]
    if not found:
      continue
    chunks = [int(chunk) for chunk in found[0][name]['parallel']]
    left.plot(chunks, [np.mean([f[name]['parallel'][str(c)] for f in found]) for c in chunks], marker='o',
                      label=f'{name}: trained with chunks of {found[0][name]["trained with"]}')
  for name, style in zip(SHARED, ('-', '--', ':')):
    left.axhline(np.mean([f[name]['decoded'] for f in results.values()]), color='k', linestyle=style, label=name)
  plots.doubling(left)
  left.set_xlabel('tokens of a chunk (1: as decoded)')
  left.set_ylabel('validation NLL, nats a byte')
  left.legend(fontsize=8)
  for name in dict.fromkeys(row['cache'] for row in sizes):
    rows = [row for row in sizes if row['cache'] == name]
    right.plot([row['loops'] for row in rows], [row['bytes a token'] for row in rows], marker='o', label=name)
  right.set_xlabel('loops')
  right.set_ylabel('cache, bytes a token')
  right.set_ylim(0)
  right.legend()
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --set, which acts on
  all phases.
  """
  flags.DEFINE_list('seeds', ['0'], 'Seeds of initialisation and data order.')
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)
  flags.DEFINE_string('size', 'cpu', 'Size of experiments/configs/melt.py.')
  flags.DEFINE_list('chunks', ['1', '4', '16', '48', '96'], 'Chunks in which converted models are measured.')
  flags.DEFINE_integer('batches', 8, 'Batches of the validation split to decode.', lower_bound=1)


def main(argv):
  check_command('set')
  command.check_whole(seeds=FLAGS.seeds, chunks=FLAGS.chunks)
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  command.own('size', 'batches', 'set', grow=('seeds', 'chunks'))
  results = {}
  for seed in FLAGS.seeds:
    for results[seed] in run_seed(int(seed), workdir):
      sizes, rows = cache_bytes(workdir, FLAGS.seeds), rows_of(results)
      records.write(out / 'results.json', {'seeds': results, 'bytes': sizes})
      storage.write(out / 'table.md', '\n\n'.join(metrics.table(table) for table in (rows, sizes)) + '\n')
      draw(out / 'melt.png', results, sizes)
  print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
