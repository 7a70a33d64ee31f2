"""A looped feed-forward layer memorises random targets, with and without being told which loop it is in (2410.01405).

    python -m experiments.studies.memorise --out=experiments/reports/timestep/memorise

Lemma 4.1 and theorem 4.2 in miniature (timestep encoding, section 9): input k / K, k = 0 .. K - 1, to K targets in
[-1, 1]^4. The layer is x + MLP(norm(x)), looped r times; `tmlt` multiplies what the norm and the MLP give by scales and
gates made of the loop's index, `table` by such as are learned for every loop by themselves, `wide` is the plain loop
with as many parameters as `tmlt`. Adam on all K at once, the rate falling to zero as a cosine; every seed has its own
targets. Prints the mean squared error at the end; writes results.json, table.md and memorise.png into --out.
"""
from __future__ import annotations

import functools
from pathlib import Path
import time

from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tools import command, plots, records
from loopformer import loop, plans, storage
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.model import Looped, init_params, parameter_count
from loopformer.nn.blocks import Block
from loopformer.nn.condition import LoopIndex, Modulation, StepNumber, Table
from loopformer.nn.embed import Head, Vectors
from loopformer.nn.layers import MLP, Identity, UnitNorm
from loopformer.nn.stack import Stack
from loopformer.training import metrics
from loopformer.types import KV, Array, Batch, ConfigError, Context, Params, config_dataclass

FLAGS = flags.FLAGS
KINDS = ('lt', 'tmlt', 'wide', 'table')


class NoAttention(nn.Module):
  """Nothing is read of other tokens; no parameters."""

  def __call__(self, x: Array, ctx: Context, kv: KV | None, layer: Array | int,
               gate: Array | None = None) -> tuple[Array, KV | None]:
    """x [B, T, D] -> zeros like it."""
    return jnp.zeros_like(x), kv


@config_dataclass
class Sizes:
  """K targets of `outputs` numbers, width D and hidden width F of the layer, r loops."""
  targets: int = 16
  outputs: int = 4
  width: int = 16
  hidden: int = 24
  loops: int = 4

  def __post_init__(self):
    for name in ('targets', 'outputs', 'width', 'hidden', 'loops'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} = {getattr(self, name)}: set {name} to 1 or more')


def model_of(kind: str, sizes: Sizes) -> Looped:
  """The model of a kind: an input is a sequence of one token, so that its place says nothing."""
  if kind not in KINDS:
    raise ConfigError(f'kind = {kind}: there are {", ".join(KINDS)}')
  width, hidden = sizes.width, sizes.hidden
  if kind == 'wide':
    missing = parameters('tmlt', sizes) - parameters('lt', sizes)
    hidden += round(missing / (2 * width + 1))  # a hidden unit has a row, a column and a bias
  # Divided by the loops: r additions of one layer point the same way, and would start the plain loop at an error of 30.
  mlp = MLP(hidden=hidden, std=width ** -0.5, out_std=hidden ** -0.5 / sizes.loops, biased=('up', 'down'))
  core = Stack(Block(attn=NoAttention(), norm=UnitNorm(), mlp=mlp), 1)
  cell = {'tmlt': lambda: Timed(core, LoopIndex(width, std=0.1), Modulation(1)),
          'table': lambda: Timed(core, StepNumber(width), Table(layers=1, loops=sizes.loops, width=width))
          }.get(kind, lambda: Plain(core))()
  return Looped(read_in=Vectors(inputs=1, width=width, length=1), cell=cell, loops=sizes.loops, remat=loop.KeepAll(),
                read_out=Head(outputs=sizes.outputs, norm=Identity(), std=width ** -0.5))


def parameters(kind: str, sizes: Sizes) -> int:
  """How many have an effect: the gates and scales of the attention that is not there are left out."""
  idle = {'tmlt': 2 * sizes.width * (sizes.width + 1), 'table': 2 * sizes.width * sizes.loops}.get(kind, 0)
  return parameter_count(model_of(kind, sizes)) - idle


def problem(key: Array, sizes: Sizes) -> Batch:
  """tokens f32[K, 1, 1]: k / K; targets f32[K, 1, outputs], uniform in [-1, 1]."""
  return {'tokens': (jnp.arange(sizes.targets) / sizes.targets)[:, None, None],
          'targets': jax.random.uniform(key, (sizes.targets, 1, sizes.outputs), minval=-1.0, maxval=1.0)}


def error(model: Looped, params: Params, batch: Batch) -> Array:
  """The mean squared error, f32[]."""
  z = model.apply({'params': params}, batch['tokens'], plans.schedule(plans.resolve(model.loops))).z
  answers = z @ model.apply({'params': params}, method='table').T
  return jnp.square(answers - batch['targets']).mean()


@functools.partial(jax.jit, static_argnames=('kind', 'sizes', 'steps', 'rate'))
def train(kind: str, sizes: Sizes, seeds: Array, steps: int, rate: float) -> Array:
  """The error before every step and after the last, f32[seeds, steps + 1], of all seeds i32[seeds] together."""
  model = model_of(kind, sizes)
  optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

  def one(seed):
    targets_key, init_key = jax.random.split(jax.random.key(seed))
    batch, start = problem(targets_key, sizes), init_params(model, init_key)

    def step(carry, _):
      params, state = carry
      value, grads = jax.value_and_grad(lambda p: error(model, p, batch))(params)
      updates, state = optimizer.update(grads, state, params)
      return (optax.apply_updates(params, updates), state), value

    (params, _), errors = jax.lax.scan(step, (start, optimizer.init(start)), None, length=steps)
    return jnp.append(errors, error(model, params, batch))

  return jax.vmap(one)(seeds)


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_multi_integer('loops', [2, 4, 8], 'r; may be repeated.', lower_bound=1)
  flags.DEFINE_integer('seeds', 6, 'Seeds 0, 1, ..', lower_bound=1)
  flags.DEFINE_integer('steps', 3000, 'Of training.', lower_bound=1)
  flags.DEFINE_float('rate', 3e-3, "Adam's learning rate.")
  flags.DEFINE_string('out', None, 'Folder of results.json, table.md and memorise.png; nothing is written without it.')


def main(argv):
  if FLAGS.out:
    command.own('seeds', 'steps', 'rate', grow=('loops',))
  rows = []
  for loops in FLAGS.loops:
    for kind in KINDS:
      sizes, start = Sizes(loops=loops), time.time()
      curve = np.asarray(train(kind, sizes, jnp.arange(FLAGS.seeds), FLAGS.steps, FLAGS.rate))
      ends = curve[:, -1]
      rows.append({'loops': loops, 'model': kind, 'parameters': parameters(kind, sizes), 'ends': ends.tolist()})
      print(f'r = {loops}, {kind}: {curve[:, 0].mean():.3f} -> {ends.mean():.2g}, {time.time() - start:.1f} s',
            flush=True)
  table = metrics.table([{**{name: row[name] for name in ('loops', 'model', 'parameters')},
                          'median of seeds': f'{np.median(row["ends"]):.2g}', 'mean': f'{np.mean(row["ends"]):.2g}',
                          'every seed': ', '.join(f'{end:.2g}' for end in row['ends'])} for row in rows])
  print('\nmean squared error')
  print(table)
  if FLAGS.out:
    write(storage.path(FLAGS.out), rows, table)


def write(out: Path, rows: list[dict], table: str):
  """results.json, table.md and memorise.png."""
  out.mkdir(parents=True, exist_ok=True)
  records.write(out / 'results.json', rows)
  storage.write(out / 'table.md', table + '\n')
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for kind in KINDS:
    mine = [row for row in rows if row['model'] == kind]
    middle = np.array([np.median(row['ends']) for row in mine])
    ends = np.array([[min(row['ends']), max(row['ends'])] for row in mine])
    axes.errorbar([row['loops'] for row in mine], middle, np.abs(ends - middle[:, None]).T, marker='o', capsize=3,
                  label=kind)
  axes.set_yscale('log')
  plots.doubling(axes, sorted({row['loops'] for row in rows}))
  axes.set_xlabel('loops')
  axes.set_ylabel('mean squared error: median and range of seeds')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(out / 'memorise.png', dpi=150)
  pyplot.close(figure)


if __name__ == '__main__':
  define_flags()
  command.run(main)
