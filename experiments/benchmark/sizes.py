"""What is measured: sizes, models, the library's training step; and contestants that take turns."""
from __future__ import annotations

import functools
import math
import time
from typing import Any, Callable, Mapping

import jax
import numpy as np

from loopformer import loop, plans, sharding
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.model import Looped, parameter_roles
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.condition import Modulation, Trajectory
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.kernels import Fused
from loopformer.nn.layers import MLP, Normal, UnitNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.terms.cross_entropy import CE
from loopformer.terms.match import ShortcutConsistency
from loopformer.training.step import init_state, make_step
from loopformer.types import Plan, Planner, config_dataclass

MEGA = 1e6
OPTIM = AdamW(schedule=WarmupCosine(warmup=10))
TRAIN_STEPS = 1000  # what the learning-rate schedule spans


@config_dataclass
class Size:
  """What is measured.

  short: steps of the short trajectory; prompt and new: tokens read and drawn while decoding; dtype: of matrix products
  and of caches, as in the configurations, whose parameters and states are float32 whatever it is.
  """
  batch: int = 8
  length: int = 256
  width: int = 256
  heads: int = 8
  hidden: int = 1024
  vocab: int = 8192
  layers: int = 3
  loops: int = 8
  short: int = 4
  prompt: int = 64
  new: int = 128
  dtype: str = 'float32'

  @property
  def tokens(self) -> int:
    """Tokens of a training step."""
    return self.batch * self.length


SIZES = {
    'reference': Size(),
    'small': Size(batch=16, length=1024, width=1024, heads=16, hidden=2560, vocab=32768, prompt=512, dtype='bfloat16'),
    'paper': Size(batch=12, length=1024, width=2048, heads=32, hidden=5120, vocab=50304, prompt=512, dtype='bfloat16'),
}
REMATS = (loop.PerLayer(), loop.PerStep(), loop.Products(), loop.Offload(), loop.KeepAll())


@config_dataclass
class Padded(Planner):
  """`count` equal steps in a plan of `rows`, the rest skipped: what a random short trajectory costs on average."""
  count: int
  rows: int

  @property
  def longest(self) -> int:
    return self.rows

  @property
  def expected(self) -> float:
    return float(self.count)

  def __call__(self, key: jax.Array) -> Plan:
    return plans.schedule((1.0 / self.count,) * self.count, self.rows)


def make_model(size: Size, remat: Any = loop.PerLayer(), kernel: Any = Fused()) -> Looped:
  """A LoopFormer with gates that are open from the start, as they are in training."""
  cell = Timed(make_stack(size, size.layers, kernel), Trajectory(size.width), Modulation(size.layers, Normal(0.02)))
  return make_looped(size, cell, size.loops, remat)


def make_plain(size: Size, layers: int, loops: int, remat: Any = loop.PerLayer(), kernel: Any = Fused()) -> Looped:
  """A decoder of `layers` layers applied `loops` times, without conditions: what the plain peer computes too."""
  return make_looped(size, Plain(make_stack(size, layers, kernel)), loops, remat)


def make_stack(size: Size, layers: int, kernel: Any) -> Stack:
  """Layers of a size, with norms that have no scale of their own."""
  out_std = 0.02 / math.sqrt(2 * size.layers)
  block = Block(attn=SelfAttention(heads=size.heads, out_std=out_std, kernel=kernel),
                mlp=MLP(hidden=size.hidden, out_std=out_std), norm=UnitNorm(), dtype=size.dtype)
  return Stack(block, layers)


def make_looped(size: Size, cell: Any, loops: int, remat: Any) -> Looped:
  """A cell between an embedding with positions and a tied head."""
  read_in = TokenEmbed(vocab=size.vocab, width=size.width, length=size.length)
  return Looped(read_in=read_in, cell=cell, loops=loops, remat=remat)


def long_alone(loops: int) -> Objective:
  """One rollout of so many loops."""
  return Objective(rolls={'long': Rollout(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='long'))})


def with_short(size: Size, short: Any) -> Objective:
  """LoopFormer's objective with the short trajectories of the planner `short`."""
  return Objective(
      rolls={'long': Rollout(plans.Uniform(size.loops)), 'short': Rollout(short)},
      terms={'lm': Weighted(1.0, CE(roll='long')), 'lm_short': Weighted(0.1, CE(roll='short')),
             'shortcut': Weighted(0.1, ShortcutConsistency(roll='short', target='long'))})


def short_of(size: Size) -> Padded:
  """The short trajectory of the reference; fewer steps where L - 1 rows do not hold them."""
  return Padded(count=min(size.short, size.loops - 1), rows=size.loops - 1)


def make_batch(size: Size) -> dict[str, np.ndarray]:
  """A batch as the text task makes it, of random tokens."""
  tokens = np.random.default_rng(0).integers(size.vocab, size=(size.batch, size.length + 1), dtype=np.int32)
  shape = (size.batch, size.length)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(shape, np.float32),
          'positions': np.broadcast_to(np.arange(size.length, dtype=np.int32), shape)}


class Ours:
  """The library's training step on one device."""

  def __init__(self, size: Size, model: Looped, objective: Objective):
    self.size, self.objective, self.model = size, objective, model
    self._roles = parameter_roles(model)
    self._optimizer = OPTIM.make(TRAIN_STEPS, self._roles)
    self._mesh = sharding.Mesh(data=1).make(jax.devices()[:1])
    self.step = make_step(model, objective, self._optimizer, self._mesh)
    self._make = functools.partial(init_state, model, self._optimizer, 0)

  def lower(self) -> Any:
    """The traced step; nothing is allocated."""
    batch = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in make_batch(self.size).items()}
    return self.step.lower(jax.eval_shape(self._make), batch)

  def start(self, compiled: Any = None):
    """Allocates state and batch; compiles the step, where it is not given."""
    self.compiled = compiled or self.lower().compile()
    shardings = sharding.shardings(jax.eval_shape(self._make), self._mesh, self._roles)
    self.state = jax.jit(self._make, out_shardings=shardings)()
    self.batch = sharding.put_batch(make_batch(self.size), self._mesh)

  def __call__(self) -> float:
    """One step; its loss."""
    self.state, values = self.compiled(self.state, self.batch)
    return float(values['loss'])


def take_turns(contestants: Mapping[str, Callable[[], float]],
               repeats: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
  """Seconds, and processor seconds over all threads, of every call; each contestant has been called once before."""
  seconds, work = ({name: [] for name in contestants} for _ in range(2))
  for _ in range(repeats):
    for name, contestant in contestants.items():
      start, busy = time.perf_counter(), time.process_time()
      contestant()
      seconds[name].append(time.perf_counter() - start)
      work[name].append(time.process_time() - busy)
  return seconds, work


def spread(values: list[float]) -> str:
  """The range, as text."""
  return f'{min(values):.3g}..{max(values):.3g}'
