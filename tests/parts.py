"""Small models, one row a cell or variant, and the compiled functions that the batteries share.

A new cell or option is one row of ROWS: every battery picks it up.
"""
import dataclasses
import functools
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import loop, plans
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed, Plain
from loopformer.cells.recur import Recur
from loopformer.cells.timed import Timed
from loopformer.model import Looped, parameter_shapes
from loopformer.nn.attention import SelfAttention, ValueEmbed
from loopformer.nn.blocks import Block, Chain, PeriNorm, PostNorm, SandwichNorm
from loopformer.nn.condition import LoopIndex, Modulation, Trajectory
from loopformer.nn.embed import Head, TokenEmbed, Tokens
from loopformer.nn.inject import Add, Concat, Diagonal, NoInjection
from loopformer.nn.kernels import Blockwise, Fused
from loopformer.nn.layers import (
  MLP,
  AcrossHeads,
  GatedMLP,
  Identity,
  LayerNorm,
  Linear,
  Normal,
  RMSNorm,
  UnitNorm,
  gelu_tanh,
  squared_relu,
)
from loopformer.nn.positions import Alibi, Rotary
from loopformer.nn.stack import Stack
from loopformer.papers.loopus.cell import ConfidenceHead, Selective
from loopformer.papers.melt.attention import LatentAttention
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.mor.cell import ExpertChoice, Routed, TokenChoice
from loopformer.papers.plt.attention import GatedAttention, GatedBlock, HiddenGate, QueryGate
from loopformer.papers.plt.cell import LearnedMix, Mix, Shifted
from loopformer.papers.plt.streams import Streams
from loopformer.roles import Role, Roles
from loopformer.starts import Noise, Zeros
from loopformer.types import Context, PlanContext, Planner
from tests import quick

V, D, T, L, N = 40, 16, 8, 4, 2  # vocabulary, width, tokens, most loops, layers of the block
ROOT = Path(__file__).resolve().parent.parent
UNEVEN = (0.5, 0.125, 0.375)


@dataclasses.dataclass(frozen=True)
class Row:
  """One row: the model, how far two ways to the same value may be apart, whether its step knows the schedule, or the
  steps before it, and whether a step can be taken by itself."""
  model: Looped
  tolerance: float = 1e-5
  timed: bool = True
  steps: bool = True


def block(norm=UnitNorm(), **options) -> Block:
  """A small layer; `options` are those of SelfAttention, and `dtype`."""
  dtype = options.pop('dtype', 'float32')
  return Block(attn=SelfAttention(**{'heads': 2, **options}), mlp=MLP(hidden=24), norm=norm, dtype=dtype)


def plain(depth: int = N, norm=RMSNorm(), **options) -> Plain:
  return Plain(Stack(block(norm, **options), depth))


def timed(condition=Trajectory(D), init: float = 0.0, **options) -> Timed:
  return Timed(Stack(block(**options), N), condition, Modulation(N, init=Normal(init)))


def looped(cell, **options) -> Looped:
  return Looped(**{'read_in': TokenEmbed(vocab=V, width=D, length=32), 'cell': cell, 'loops': L, **options})


def stack(depth: int, **options) -> Stack:
  return Stack(block(RMSNorm()), depth, **options)


def recur(inject, core=None, **options) -> Recur:
  return Recur(core or stack(N), inject, **options)


def gpt2() -> Block:
  """A layer with LayerNorms and biases."""
  attn = SelfAttention(heads=2, biased=('q', 'k', 'v', 'out'))
  return Block(attn=attn, mlp=MLP(hidden=24, activation=gelu_tanh, biased=('up', 'down')), norm=LayerNorm())


def valued() -> Chain:
  """A plain layer and one with value embeddings, turned and normed queries and keys (Parcae)."""
  options = {'heads': 2, 'position': Rotary(), 'norm_qk': UnitNorm()}
  layers = [Block(attn=SelfAttention(**options, values=values), mlp=MLP(hidden=24, activation=squared_relu))
            for values in (None, ValueEmbed(vocab=V, features=4))]
  return Chain(tuple(layers))


def sandwich() -> Block:
  return Block(attn=SelfAttention(heads=2, position=Rotary(), biased=('q', 'k')), mlp=GatedMLP(hidden=24),
               norm=RMSNorm(1e-6), placement=SandwichNorm())


def peri(attn, hidden: int = 24) -> Block:
  """A layer of Ouro's kind."""
  return Block(attn=attn, mlp=GatedMLP(hidden=hidden), norm=RMSNorm(1e-6), placement=PeriNorm())


def olmo() -> Block:
  """A layer of OLMo 2's kind, whose heads have a width of their own."""
  attn = SelfAttention(heads=4, groups=2, head=6, position=Rotary(), norm=AcrossHeads(RMSNorm()))
  return Block(attn=attn, mlp=GatedMLP(hidden=24), norm=RMSNorm(), placement=PostNorm())


def shifted(gate=QueryGate(), window_left: int = 3, mix=Mix(embed=0.7, hidden=0.4), dtype: str = 'float32', **options
            ) -> dict:
  """Cell, memory and head of a Parallel Loop Transformer."""
  layer = GatedBlock(attn=GatedAttention(**{'heads': 2, **options}), mlp=GatedMLP(hidden=24), gate=gate, dtype=dtype)
  return dict(cell=Shifted(Stack(layer, N), window_left=window_left, mix=mix), memory=Streams(window_left=window_left),
              read_in=nowhere(), read_out=Head(outputs=V, norm=Identity()))


def nowhere() -> Tokens:
  """Tokens without positions."""
  return Tokens(vocab=V, width=D, length=32)


ROWS = {
    'loopformer': Row(looped(timed())),
    'tmlt': Row(looped(timed(LoopIndex(D)))),
    'base_loop': Row(looped(plain()), timed=False),
    'base': Row(looped(plain(3), loops=1), timed=False),
    'prelude_coda': Row(looped(timed(), prelude=stack(2), coda=stack(1))),
    'grouped': Row(looped(timed(heads=4, groups=2))),
    'bfloat16': Row(looped(timed(dtype='bfloat16')), tolerance=4e-2),
    'fused': Row(looped(timed(kernel=Fused()))),
    'blocks_of_3': Row(looped(timed(kernel=Blockwise(size=3)))),
    'keep_all': Row(looped(plain(), remat=loop.KeepAll()), timed=False),
    'per_layer': Row(looped(timed(), remat=loop.PerLayer())),
    'rotary': Row(looped(plain(position=Rotary()), read_in=nowhere()), timed=False),
    'alibi': Row(looped(plain(position=Alibi(), heads=4, groups=2), read_in=nowhere()), timed=False),
    'nowhere': Row(looped(plain(), read_in=nowhere()), timed=False),
    'ordered': Row(looped(Plain(stack(3, order=(0, 0, 1, 2, 2))), loops=1), timed=False),
    'added': Row(looped(recur(Add(), norm=LayerNorm(), core=Stack(gpt2(), N)), start=Zeros(),
                        read_out=Head(outputs=V, norm=Identity())), timed=False),
    'held': Row(looped(recur(NoInjection()), prelude=stack(1), coda=stack(1)), timed=False),
    'parcae': Row(looped(recur(Diagonal(), core=Stack(valued(), 1)), read_in=nowhere(), start=Noise(std=0.3),
                         prelude=Stack(valued(), 1, norm=RMSNorm()), coda=Stack(valued(), 1), bridge=Linear(D)),
                  timed=False),
    'huginn': Row(looped(recur(Concat(), core=Stack(sandwich(), N), norm=RMSNorm()), read_in=nowhere(),
                         start=Noise(std=0.6), prelude=Stack(sandwich(), 1), coda=Stack(sandwich(), 1)), timed=False),
    'ouro': Row(looped(Halting(Normed(Stack(peri(SelfAttention(heads=2, position=Rotary())), N), RMSNorm(1e-6))),
                       read_in=nowhere(),
                       read_out=Head(outputs=V, norm=Identity())), timed=False),
    'olmo': Row(looped(Normed(Stack(olmo(), N), RMSNorm()), read_in=nowhere(), coda=Stack(olmo(), 1)), timed=False),
    'loopus': Row(looped(Halting(Selective(plain(norm=RMSNorm(1e-6), position=Rotary())), gate=ConfidenceHead()),
                         read_in=nowhere(), prelude=stack(1), coda=stack(1), read_out=Head(outputs=V)), timed=False),
    'damped': Row(looped(Damped(plain(position=Rotary())), read_in=nowhere(), prelude=stack(1)), timed=False),
    'mor': Row(looped(Routed(stack(N), ExpertChoice(capacities=(1.0, 0.75, 0.5, 0.25))), prelude=stack(1),
                      coda=stack(1)), steps=False),
    'mor_token': Row(looped(Routed(stack(N), TokenChoice(recursions=L)), prelude=stack(1)), steps=False),
    'plt': Row(looped(**shifted())),
    'plt_hidden': Row(looped(**shifted(HiddenGate(), mix=LearnedMix(), heads=4, groups=2, position=Alibi()),
                             remat=loop.PerLayer())),
    'melt': Row(looped(Gated(Stack(peri(LatentAttention(heads=2, position=Rotary())), N)), read_in=nowhere(),
                       read_out=Head(outputs=V, norm=Identity()), memory=Latest(chunk=1)), steps=False),
}
assert T % 3, 'the row blocks_of_3 is there for a last block that is not full'
all_rows = sorted(ROWS)
time_free = [name for name in all_rows if not ROWS[name].timed]


@functools.cache
def params(model: Looped):
  """Parameters far from the start, so that closed gates, zero biases and unit scales hide nothing; no compilation."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    start = 1.0 if path[-1].key == 'scale' else 0.0
    return jnp.asarray(start + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)

  like = shapes(model)  # outside: what is evaluated at compile time would run the model, layer by layer
  with jax.ensure_compile_time_eval():  # arrays, though the first caller may be a function that is being traced
    return jax.tree_util.tree_map_with_path(draw, like)


def roles_of(tree) -> Roles:
  """Roles in a tree that no model has made: what is called a kernel is a projection, what lies in a block has layers.
  """
  paths = [tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  return Roles({path: Role(dtype='float32' if path[-1] == 'kernel' else None, layered='block' in path)
                for path in paths})


def shapes(model: Looped):
  return parameter_shapes(model)


@functools.partial(jax.jit, static_argnames=('model', 'keep'))
def forward(model, params, tokens, plan, seg=None, keep=loop.Last(), pos=None):
  """The parallel pass: a Trace."""
  return model.apply({'params': params}, tokens, plan, pos, seg, keep=keep)


def over(model, params, batch, plan, keep=loop.Last()):
  """The parallel pass over a batch, by its positions and its documents: a Trace."""
  return forward(model, params, batch['tokens'], plan, batch['segments'], keep, batch['positions'])


@functools.partial(jax.jit, static_argnames='model')
def extend(model, params, tokens, plan, pos, kv):
  """The pass with caches: logits and caches."""
  trace = model.apply({'params': params}, tokens, plan, pos, kv=kv)
  return model.apply({'params': params}, trace.z, method='logits'), trace.kv


def context(x) -> Context:
  """Of states x, [B, T, D], of the texts `tokens(B)`."""
  return Context(pos=jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]), tokens=tokens(len(x)))


@functools.partial(jax.jit, static_argnames='model')
def resume(model, params, x, e, plan):
  """The loop alone, from state x: (x, auxiliaries)."""
  def run(model, x, e, plan):
    ctx = context(x)
    return loop.run(model.cell, x, e, plan, ctx, None, loop.Last(), model.remat)[0]
  return model.apply({'params': params}, x, e, plan, method=run)


@functools.partial(jax.jit, static_argnames='model')
def logits(model, params, z):
  return model.apply({'params': params}, z, method='logits')


def tokens(rows: int = T + 1, length: int = T, seed: int = 0) -> jax.Array:
  return jax.random.randint(jax.random.key(seed), (rows, length), 0, V)


def poked(rows: int = T + 1) -> jax.Array:
  """Row 0 is a text; row i + 1 is the same text with another token i."""
  base = tokens(1)
  same = jnp.repeat(base, rows, 0)
  return same.at[jnp.arange(1, rows), jnp.arange(rows - 1)].set((base[0, :rows - 1] + 7) % V)


def batch(rows: int = 4, length: int = T, seed: int = 0, weights=None) -> dict[str, jax.Array]:
  """A packed, ragged, padded batch: in every row other documents of one to five tokens, with positions of their own,
  and at its end one to three tokens of padding, segment 0, that weigh nothing.

  weights: in the place of those that are 0 for a document's last token, 1 for its first, and 0 or 1 for others.
  """
  rng = np.random.default_rng(seed)
  segments, positions, asked = (np.zeros((rows, length), kind) for kind in (np.int32, np.int32, np.float32))
  for row in range(rows):
    place, number, text = 0, 1, length - 1 - (row + seed) % 3
    while place < length:
      size = min(int(rng.integers(2, 6)), text - place) if place < text else length - text
      segments[row, place:place + size] = number if place < text else 0
      positions[row, place:place + size] = np.arange(size)
      if size > 1 and place < text:
        asked[row, place:place + size - 1] = [1, *(rng.uniform(size=size - 2) < 0.5)]
      place, number = place + size, number + 1
  stream = tokens(rows, length + 1, seed)
  return {'tokens': stream[:, :-1], 'targets': stream[:, 1:],
          'weights': jnp.asarray(asked) if weights is None else weights,
          'positions': jnp.asarray(positions), 'segments': jnp.asarray(segments)}


def plan_context(key, batch=None, step: int = 0, stage: int = 0) -> PlanContext:
  """What a plan may depend on; rows are numbered as they stand in the batch."""
  batch = batch or {}
  if batch:
    batch = {'row': jnp.arange(len(batch['tokens'])), **batch}
  return PlanContext(key=key, step=jnp.int32(step), stage=jnp.int32(stage), batch=batch)


@dataclasses.dataclass(frozen=True)
class Fixed(Planner):
  """A planner whose steps are always the same."""
  steps: tuple[float, ...]

  @property
  def longest(self) -> int:
    return len(self.steps)

  expected = longest

  def __call__(self, context: PlanContext):
    return plans.schedule(self.steps)


def padded(steps, rows: int = L):
  """The plan of a budget or schedule, padded to `rows`: one program for all."""
  return plans.schedule(plans.resolve(steps), rows)


def budgets(model: Looped) -> list:
  """All budgets of a model, and an uneven schedule where it has room for one."""
  return [*range(1, model.loops + 1), *([UNEVEN] if model.loops >= len(UNEVEN) else [])]


def close(a, b, tolerance: float, message: str = ''):
  """Every leaf of a equals that of b, absolutely and relative to the largest entry."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1.0, np.abs(y).max()),
                               err_msg=f'{message} {jax.tree_util.keystr(path)}')


def python(code: str, *arguments: str, timeout: int = 300, **environment: str) -> str:
  """The standard output of a program in a process of its own, compiled as the tests are unless XLA_FLAGS are given."""
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
  done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True, timeout=timeout,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': quick.FLAGS, 'PYTHONPATH': path,
                             **environment})
  assert done.returncode == 0, done.stderr
  return done.stdout
