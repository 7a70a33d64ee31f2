"""Speed, memory and compile time of the library, on whatever device JAX finds.

    python -m experiments.benchmark [--suite=train,plain,decode,memory,compile] [--size=small] [--peer=torch]
                                    [--out=FOLDER]
    python -m experiments.benchmark --suite=decode --peer=transformers
    python -m experiments.benchmark --suite=draft --trained=runs/quickstart
    python -m experiments.benchmark --suite=comms

train    seconds of a full LoopFormer step (two rollouts, consistency, AdamW), for every way to save activations and to
         attend, beside the same computation in eager PyTorch (--peer=torch; the extra `peer`). Contestants take turns
         inside one process, and ratios are taken within a turn, so that a noisy machine disturbs all alike.
plain    the same for one pass through as many layers, looped and not, beside a plain decoder in JAX.
memory   temporary memory of the compiled step by XLA's own account, its growth per loop, what it must not hold, and the
         largest batches that fit.
compile  seconds to compile for several depths, and the published configuration from cold and from the cache of
         programs; programs compiled for several random trajectories.
decode   tokens a second of generation at several budgets; the share of a token that does not depend on the budget; the
         cache against computing all again; and the bare matrix products of a token. With --peer=transformers: an
         imported decoder of 135M parameters beside transformers with the same weights.
data     tokens a second of the input pipeline alone, and megabytes a second of tokenising.
growth   seconds of a step against loops, layers, width, length, vocabulary and batch, beside the arithmetic.
comms    bytes that a device sends in a training step on eight simulated devices, from the compiled program: ours, where
         weights are gathered once, and the automatic partitioner's (alone).
draft    tokens a second with drafts of few loops that all loops judge, on the checkpoint of --trained.

With --out every suite writes FOLDER/<suite>.json and .md.
"""
from __future__ import annotations

import dataclasses
import datetime
import os
from pathlib import Path
import platform
import re
import sys
import time
from typing import Mapping

from absl import flags, logging
import flax
import jax

from experiments.benchmark import comms, compile, data, decode, draft, growth, imported, memory, train
from experiments.benchmark.sizes import SIZES, Size
from experiments.tools import command, estimate, plots, records
from loopformer import storage
from loopformer.training import metrics

SUITES = {
    'train': lambda size, repeats: train.train_suite(
        size, repeats, FLAGS.peer if FLAGS.peer == 'torch' else None),
    'plain': train.plain_suite,
    'memory': lambda size, repeats: memory.memory_suite(size),
    'compile': lambda size, repeats: compile.compile_suite(size, min(repeats, 3)),
    'decode': lambda size, repeats: imported.imported_suite(repeats) if FLAGS.peer == 'transformers' else (
        decode.decode_suite(size, repeats)),
    'data': data.data_suite,
    'growth': growth.growth_suite,
    'comms': lambda size, repeats: comms.comms_suite(size),
    'draft': lambda size, repeats: draft.draft_suite(FLAGS.trained, repeats),
}
FLAGS = flags.FLAGS


def describe_machine(peer: str | None) -> dict[str, str]:
  """Where the numbers are from: hardware and what it reaches here, versions, date and command."""
  versions = {'python': platform.python_version(), 'jax': jax.__version__, 'flax': flax.__version__}
  if peer:
    import torch
    versions['torch'] = torch.__version__
  if peer == 'transformers':
    import transformers
    versions['transformers'] = transformers.__version__
  kind = jax.devices()[0].device_kind
  if jax.default_backend() == 'cpu':
    kind = f'{cpu_model()}, {os.cpu_count()} cores'
  peaks = f'{train.peak_of(SIZES["reference"]) / 1e9:.4g} GFLOP/s by a float32 product'
  if jax.default_backend() != 'cpu':
    peaks += f', {train.peak_of(SIZES["paper"]) / 1e9:.4g} in bfloat16'
  return {'hardware': kind, 'peaks': f'{peaks}, {metrics.measured_bandwidth() / 1e9:.4g} GB/s in place',
          'versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
          'date': datetime.date.today().isoformat(),
          'command': ' '.join(['python -m experiments.benchmark', *sys.argv[1:]])}


def cpu_model() -> str:
  """The processor's name, where the system tells."""
  info = Path('/proc/cpuinfo')
  found = re.search(r'model name\s*:\s*(.+)', info.read_text()) if info.exists() else None
  return found[1] if found else platform.processor() or platform.machine()


def write(folder: Path, name: str, tables: Mapping[str, list[dict]], size: Size, machine: Mapping[str, str]):
  """The tables of a suite as JSON and as Markdown."""
  folder.mkdir(parents=True, exist_ok=True)
  record = {'machine': machine, 'size': dataclasses.asdict(size), 'tables': tables}
  records.write(folder / f'{name}.json', record)
  facts = [f'- {fact}: {value}' for fact, value in machine.items()]
  if name != 'draft' and 'imported' not in tables:  # whose models have their own
    facts.append('- size: ' + ', '.join(f'{field} {value}' for field, value in dataclasses.asdict(size).items()))
  parts = [f'# Benchmark: {name}', '\n'.join(facts), *map(metrics.table, tables.values())]
  storage.write(folder / f'{name}.md', '\n\n'.join(parts) + '\n')
  if name == 'growth':
    plots.growth(folder / 'growth.png', tables['growth'])


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_list('suite', None, f'Which suites, in this order: {", ".join(SUITES)}. By default train, plain, '
                    'decode, and on CPUs memory and compile, which say of other devices what their compiler says.')
  flags.DEFINE_enum('size', None, list(SIZES), 'What is measured; by default reference on CPUs, small elsewhere.')
  flags.DEFINE_enum('peer', None, ['torch', 'transformers'],
                    'Measured beside ours; train: torch, eager; decode: transformers.')
  flags.DEFINE_string('trained', None, 'draft: a work folder with a trained language model.')
  flags.DEFINE_string('out', None, 'Folder for tables as JSON and Markdown.')
  flags.DEFINE_integer('repeats', 7, 'Turns of every contestant.', lower_bound=1)


def main(argv):
  suites = FLAGS.suite or ['train', 'plain', 'decode'] + ['memory', 'compile'] * (jax.default_backend() == 'cpu')
  unknown = [name for name in suites if name not in SUITES]
  if unknown:
    sys.exit(f'error: --suite: there is no suite {unknown[0]}; choose from {", ".join(SUITES)}')
  if 'draft' in suites and not FLAGS.trained:
    sys.exit('error: --suite=draft needs --trained, a work folder with a trained language model')
  if 'comms' in suites:
    if len(suites) > 1:
      sys.exit('error: --suite: comms simulates eight devices, on which nothing else is measured; run it alone')
    estimate.simulate(8)
  logging.set_verbosity(logging.WARNING)
  size = SIZES[FLAGS.size or ('reference' if jax.default_backend() == 'cpu' else 'small')]
  machine = describe_machine(FLAGS.peer)
  for fact, value in machine.items():
    print(f'{fact}: {value}')
  for name in suites:
    start = time.time()
    tables = SUITES[name](size, FLAGS.repeats)
    print(f'\n{name}: {metrics.duration(time.time() - start)}')
    for rows in tables.values():
      print(metrics.table(rows), flush=True)
    if FLAGS.out:
      write(storage.path(FLAGS.out), name, tables, size, machine)


if __name__ == '__main__':
  define_flags()
  command.run(main)
