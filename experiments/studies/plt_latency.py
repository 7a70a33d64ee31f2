"""Time to decode a token, all loops in one pass against one after the other, at batch 1 (Parallel Loop Transformer).

    python -m experiments.studies.plt_latency --out=experiments/reports/plt [--repeats=7]

Contestants have the same layers and untrained weights, take turns in one process, and are compared within a turn:
`parallel` with R streams a token, `sequential` with R loops of the plain cell and a cache slot for each. Writes
latency.json, latency.md and latency.png.
"""
from __future__ import annotations

import dataclasses
import functools
import statistics
import sys

from absl import flags
import jax

from experiments.benchmark.__main__ import describe_machine
from experiments.benchmark.decode import decode_once
from experiments.benchmark.sizes import spread
from experiments.tools import command, plots, records
from loopformer import storage
from loopformer.cells.plain import Plain
from loopformer.model import Looped, init_params
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.layers import GatedMLP, Identity
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.papers.plt.attention import GatedAttention, GatedBlock
from loopformer.papers.plt.cell import Shifted
from loopformer.papers.plt.streams import Streams
from loopformer.training import metrics

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Size:
  """Weights of 113 MB in float32, more than the processor's caches hold: a pass costs what reading them costs."""
  layers: int = 4
  width: int = 768
  heads: int = 12
  hidden: int = 2048
  vocab: int = 1024
  window: int = 64
  prompt: int = 256
  new: int = 64
  loops: int = 1


def make_model(size: Size, kind: str) -> Looped:
  """A parallel or sequential model of `size.loops` loops."""
  read_in = Tokens(vocab=size.vocab, width=size.width, length=size.prompt + size.new + 1)
  mlp = GatedMLP(hidden=size.hidden)
  if kind == 'sequential':
    block = Block(attn=SelfAttention(heads=size.heads, position=Rotary()), mlp=mlp)
    return Looped(read_in=read_in, cell=Plain(Stack(block, size.layers)), read_out=Head(outputs=size.vocab),
                  loops=size.loops)
  block = GatedBlock(attn=GatedAttention(heads=size.heads), mlp=mlp)
  return Looped(read_in=read_in, cell=Shifted(Stack(block, size.layers), window_left=size.window),
                read_out=Head(outputs=size.vocab, norm=Identity()), loops=size.loops,
                memory=Streams(window_left=size.window))


def measure(size: Size, repeats: int, loops: tuple[int, ...] = (1, 2, 4)) -> list[dict]:
  """Milliseconds a token of every kind and number of loops, and how many times those of its like."""
  contestants, kept = {}, {}
  for kind in ('parallel', 'sequential'):
    for count in loops:
      own = dataclasses.replace(size, loops=count)
      model = make_model(own, kind)
      params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
      contestants[kind, count] = functools.partial(decode_once, own, model, params, count, 1)
      cache = jax.eval_shape(lambda model=model, own=own: model.cache(1, own.prompt + own.new))
      kept[kind, count] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache)) / 1e6
  seconds = {name: [] for name in contestants}
  for turn in range(repeats + 1):
    for name, contestant in contestants.items():
      _, drawn = contestant()
      if turn:
        seconds[name].append(drawn / size.new * 1e3)

  def ratio(name, other):
    return round(statistics.median(a / b for a, b in zip(seconds[name], seconds[other])), 2)

  return [{'model': kind, 'loops': count, 'ms a token': round(statistics.median(seconds[kind, count]), 2),
           'range': spread(seconds[kind, count]), 'against one loop': ratio((kind, count), ('sequential', 1)),
           'against sequential': ratio((kind, count), ('sequential', count)), 'cache MB': round(kept[kind, count], 2)}
          for kind, count in contestants]


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_string('out', None, 'Folder of latency.json, latency.md and latency.png; nothing is written without it.')
  flags.DEFINE_integer('repeats', 7, 'Turns of every contestant.', lower_bound=1)


def main(argv):
  size = Size()
  table = measure(size, FLAGS.repeats)
  print(metrics.table(table))
  if FLAGS.out:
    out = storage.path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    machine = {**describe_machine(None), 'command': ' '.join(['python -m experiments.studies.plt_latency',
                                                              *sys.argv[1:]])}
    records.write(out / 'latency.json', {'machine': machine, 'size': dataclasses.asdict(size), 'table': table})
    facts = [f'- {fact}: {value}' for fact, value in {**machine, 'size': dataclasses.asdict(size)}.items()]
    storage.write(out / 'latency.md', '\n'.join([*facts, '', metrics.table(table), '']))
    curves = {kind: [{'budget': row['loops'], 'ms a token': row['ms a token']} for row in table if row['model'] == kind]
              for kind in ('parallel', 'sequential')}
    plots.depths(out / 'latency.png', curves, {}, 'ms a token')


if __name__ == '__main__':
  define_flags()
  command.run(main)
