"""Speed, memory and compile time of the library at one reference size, on whatever device JAX finds.

    python -m experiments.benchmark [--suite=train,memory,compile,decode] [--peer=torch] [--out=FOLDER]
    python -m experiments.benchmark --suite=draft --trained=runs/quickstart

train    seconds of a full LoopFormer step (two rollouts, consistency, AdamW), for every way to save activations and to
         attend, beside the same computation in eager PyTorch (--peer=torch; the extra `peer`). Contestants take turns
         inside one process, and ratios are taken within a turn, so that a noisy machine disturbs all alike.
memory   temporary memory of the compiled step by XLA's own account, its growth per loop, and what it must not hold.
compile  seconds to compile for several depths; programs compiled for several random trajectories.
decode   tokens a second of generation at several budgets; the share of a token that does not depend on the budget; the
         cache against computing all again; and the bare matrix products of a token.
comms    bytes that a device sends in a training step on eight simulated devices, from the compiled program: ours, where
         weights are gathered once, and the automatic partitioner's (alone: --suite=comms).
draft    tokens a second with drafts of few loops that all loops judge, on the checkpoint of --trained (not by default).

With --out every suite writes FOLDER/<suite>.json and .md. The reference takes about 10 minutes on two CPU cores.
"""
from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import os
from pathlib import Path
import platform
import re
import statistics
import sys
import time
from typing import Any, Callable, Iterable, Mapping

from absl import app, flags
import flax
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import optax

from experiments import plan, records
from loopformer import loop, metrics, plans, sharding
from loopformer.attention import Blockwise, Fused
from loopformer.blocks import MLP, Block, Normal, SelfAttention, Stack, UnitNorm
from loopformer.cells.timed import Timed
from loopformer.checkpoint import abstract
from loopformer.condition import Modulation, Trajectory
from loopformer.embed import TokenEmbed
from loopformer.generation import Engine
from loopformer.model import Looped, init_params
from loopformer.objective import Objective, Roll, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.terms.cross_entropy import CE
from loopformer.terms.match import Match
from loopformer.train import State, init_state, make_step
from loopformer.types import Draw, Plan, part

SUITES = ('train', 'memory', 'compile', 'decode', 'draft', 'comms')
FLAGS = flags.FLAGS
flags.DEFINE_list('suite', list(SUITES[:4]), f'Which suites, in this order: {", ".join(SUITES)}.')
flags.DEFINE_enum('peer', None, ['torch'], 'train: measure eager PyTorch beside ours.')
flags.DEFINE_string('trained', None, 'draft: a work folder with a trained language model.')
flags.DEFINE_string('out', None, 'Folder for tables as JSON and Markdown.')
flags.DEFINE_integer('repeats', 7, 'Turns of every contestant.', lower_bound=1)

MEGA = 1e6
PEER = 'PyTorch, eager'
OPTIM = AdamW(schedule=WarmupCosine(warmup=10))
TRAIN_STEPS = 1000  # what the learning-rate schedule spans


@part
class Size:
  """What is measured. short: steps of the short trajectory; prompt and new: tokens read and drawn while decoding."""
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

  @property
  def tokens(self) -> int:
    """Tokens of a training step."""
    return self.batch * self.length


REFERENCE = Size()
REMATS = (loop.PerLayer(), loop.PerStep(), loop.KeepAll())


@part
class Padded:
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


def make_model(size: Size, remat: Any = loop.PerLayer(), kernel: Any = Blockwise()) -> Looped:
  """A LoopFormer with gates that are open from the start, as they are in training."""
  out_std = 0.02 / math.sqrt(2 * size.layers)
  block = Block(attn=SelfAttention(heads=size.heads, out_std=out_std, kernel=kernel),
                mlp=MLP(hidden=size.hidden, out_std=out_std), norm=UnitNorm())
  return Looped(read_in=TokenEmbed(vocab=size.vocab, width=size.width, length=size.length),
                cell=Timed(Stack(block, size.layers), Trajectory(size.width), Modulation(size.layers, Normal(0.02))),
                loops=size.loops, remat=remat)


def long_alone(size: Size) -> Objective:
  """One rollout of all loops."""
  return Objective(rolls={'long': Roll(plans.Uniform(size.loops))}, terms={'lm': Weighted(1.0, CE(roll='long'))})


def with_short(size: Size, short: Any) -> Objective:
  """LoopFormer's objective with the short trajectories of the planner `short`."""
  return Objective(
      rolls={'long': Roll(plans.Uniform(size.loops)), 'short': Roll(short)},
      terms={'lm': Weighted(1.0, CE(roll='long')), 'lm_short': Weighted(0.1, CE(roll='short')),
             'shortcut': Weighted(0.1, Match(roll='short', target='long'))})


def short_of(size: Size) -> Padded:
  """The short trajectory of the reference; fewer steps where L - 1 rows do not hold them."""
  return Padded(count=min(size.short, size.loops - 1), rows=size.loops - 1)


def make_batch(size: Size) -> dict[str, np.ndarray]:
  """A batch as the text task makes it, of random tokens."""
  tokens = np.random.default_rng(0).integers(size.vocab, size=(size.batch, size.length + 1), dtype=np.int32)
  shape = (size.batch, size.length)
  return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'weights': np.ones(shape, np.float32),
          'positions': np.broadcast_to(np.arange(size.length, dtype=np.int32), shape),
          'segments': np.ones(shape, np.int32)}


class Ours:
  """The library's training step on one device."""

  def __init__(self, size: Size, model: Looped, objective: Objective):
    self.size, self.objective, self.model = size, objective, model
    self._optimizer = OPTIM.make(TRAIN_STEPS)
    self._mesh = sharding.Mesh(data=1).make(jax.devices()[:1])
    self.step = make_step(model, objective, self._optimizer, self._mesh)
    self._make = functools.partial(init_state, model, self._optimizer, 0)
    self._state = None

  def lower(self) -> Any:
    """The traced step; nothing is allocated."""
    batch = {name: jax.ShapeDtypeStruct(rows.shape, rows.dtype) for name, rows in make_batch(self.size).items()}
    return self.step.lower(jax.eval_shape(self._make), batch)

  def start(self):
    """Allocates state and batch."""
    shardings = sharding.shardings(jax.eval_shape(self._make), self._mesh)
    self._state = jax.jit(self._make, out_shardings=shardings)()
    self._batch = sharding.put_batch(make_batch(self.size), self._mesh)

  def __call__(self) -> float:
    """One step; its loss."""
    self._state, values = self.step(self._state, self._batch)
    return float(values['loss'])


class Theirs:
  """The same step in eager PyTorch, from the parameters that ours starts from."""

  def __init__(self, size: Size, model: Looped):
    import torch
    from experiments import peer
    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    params = jax.jit(functools.partial(init_params, model))(jax.random.fold_in(jax.random.key(0), 0))
    self._peer, self._model = peer, peer.from_params(model, params).to(device)
    self._optimizer = peer.make_optimizer(self._model, OPTIM.schedule.peak, OPTIM.decay)
    batch = make_batch(size)
    self._batch = [torch.tensor(batch[name], dtype=torch.long, device=device) for name in ('tokens', 'targets')]
    short = short_of(size)
    self._plans = (1.0 / size.loops,) * size.loops, (1.0 / short.count,) * short.count

  def __call__(self) -> float:
    """One step; its loss."""
    return self._peer.train_step(self._model, self._optimizer, *self._batch, *self._plans, OPTIM.clip)


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


def train_suite(size: Size, repeats: int, peer: str | None, kernels: Iterable[Any] = (Blockwise(), Fused()),
                remats: Iterable[Any] = REMATS) -> list[dict]:
  """Seconds a step; see the module's docstring. The first loss of every row shows that all compute the same.

  On a machine that others use, processor seconds and the least seconds say more than medians.
  """
  contestants = {}
  for kernel in kernels:
    for remat in remats:
      ours = Ours(size, make_model(size, remat, kernel), with_short(size, short_of(size)))
      ours.start()
      contestants[f'{type(remat).__name__}, {type(kernel).__name__}'] = ours
  default = next(iter(contestants.values()))
  if peer:
    contestants[PEER] = Theirs(size, default.model)
  losses = {name: contestant() for name, contestant in contestants.items()}
  seconds, work = take_turns(contestants, repeats)
  peak = metrics.measured_peak(1024 if jax.default_backend() == 'cpu' else 8192)
  flops = default.objective.flops(default.model, size.length) * size.tokens
  rows = []
  for name, times in seconds.items():
    median = statistics.median(times)
    row = {'step': name, 's/step': median, 'range': spread(times), 'processor s': statistics.median(work[name]),
           'tokens/s': round(size.tokens / median), 'MFU %': 100 * flops / median / peak, 'first loss': losses[name]}
    if peer:
      ratios = [their / our for their, our in zip(seconds[PEER], times)]
      row |= {'times as fast as PyTorch': statistics.median(ratios), 'range of that': spread(ratios),
              'by least seconds': min(seconds[PEER]) / min(times)}
    rows.append(row)
  return rows


def memory_suite(size: Size, depths: Iterable[int] = (2, 4, 8, 16, 32)) -> list[dict]:
  """Temporary memory of compiled steps in MB, its growth per loop in states, and arrays of [tokens, V] in the program.

  The program of the two rollouts keeps 2 L - 1 states, because skipped rows of the short one are kept as well. At L = 2
  the short one has a single row, whose loop XLA unrolls; what it then saves is not comparable with deeper programs.
  """
  rows = []
  state = 4 * size.tokens * size.width
  for remat in REMATS:
    rows.append(memory_row(size, remat, 'long and short', with_short(size, short_of(size))))
  for name, make in (('long alone', long_alone), ('long and short', lambda size: with_short(size, short_of(size)))):
    last = None
    for depth in depths:
      deep = dataclasses.replace(size, loops=depth)
      row = memory_row(deep, loop.PerStep(), name, make(deep))
      if last:
        row['states a loop'] = (row['temp MB'] - last['temp MB']) * MEGA / state / (depth - last['loops'])
      rows.append(row)
      last = row
  return rows


def memory_row(size: Size, remat: Any, name: str, objective: Objective) -> dict:
  """One compiled step: its memory, and arrays that it should not hold."""
  compiled = Ours(size, make_model(size, remat), objective).lower().compile()
  return {'rollouts': name, 'remat': type(remat).__name__, 'loops': size.loops,
          'temp MB': compiled.memory_analysis().temp_size_in_bytes / MEGA, 'states a loop': '',
          '[tokens, V] arrays': len(logit_arrays(compiled.as_text(), size))}


def logit_arrays(program: str, size: Size) -> set[str]:
  """Shapes in a program's text that have an axis of V and room for the logits of all tokens."""
  shapes = set(re.findall(r'\[([\d,]+)\]', program))
  dims = {shape: [int(number) for number in shape.split(',') if number] for shape in shapes}
  return {shape for shape, axes in dims.items() if size.vocab in axes and math.prod(axes) >= size.tokens * size.vocab}


def compile_suite(size: Size, repeats: int, loops: Iterable[int] = (2, 8, 32),
                  layers: Iterable[int] = (1, 3, 12)) -> list[dict]:
  """Seconds to trace and compile the training step, over L at the reference's k and over k at its L."""
  sizes = {f'L={n}, k={size.layers}': dataclasses.replace(size, loops=n) for n in loops}
  sizes |= {f'L={size.loops}, k={n}': dataclasses.replace(size, layers=n) for n in layers}
  seconds, instructions = {name: [] for name in sizes}, {}
  compile_step(next(iter(sizes.values())))  # what the process compiles once is nobody's
  for _ in range(repeats):
    for name, each in sizes.items():
      start = time.perf_counter()
      compiled = compile_step(each)
      seconds[name].append(time.perf_counter() - start)
      instructions[name] = count_instructions(compiled.as_text())
  least = min(statistics.median(times) for times in seconds.values())
  return [{'step': name, 'compile s': statistics.median(times), 'range': spread(times),
           'of the least': statistics.median(times) / least, 'instructions': instructions[name]}
          for name, times in seconds.items()]


def compile_step(size: Size) -> Any:
  """The step with random short trajectories, compiled afresh."""
  return Ours(size, make_model(size), with_short(size, plans.Partition(size.loops))).lower().compile()


def count_instructions(program: str) -> int:
  """Instructions of a program's text."""
  return len(re.findall(r'^\s+(?:ROOT )?%?[\w.-]+ = ', program, re.MULTILINE))


def programs_suite(size: Size, steps: int = 5) -> list[dict]:
  """Programs that `steps` training steps with short trajectories of their own need."""
  planner = plans.Partition(size.loops)
  ours = Ours(size, make_model(size), with_short(size, planner))
  ours.start()
  losses = [ours() for _ in range(steps)]
  return [{'steps': steps, 'programs': ours.step._cache_size(), 'last loss': losses[-1]}]


def decode_suite(size: Size, repeats: int, budgets: Iterable[int] = (1, 2, 4, 8),
                 batches: Iterable[int] = (1, 8), context: int = 512) -> dict[str, list[dict]]:
  """Tokens a second over a batch, the end of text never drawn; every budget runs the same program.

  All that is compared takes turns: budgets and batches, the bare products of as many rows, and a pass without cache
  over `context` tokens.
  """
  model = make_model(size)
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
  contestants = {(batch, budget): functools.partial(decode_once, size, model, params, budget, batch)
                 for batch in batches for budget in budgets}
  bare = {batch: bare_products(size, params, batch) for batch in batches}
  deep = dataclasses.replace(size, prompt=context - size.new, length=context + 1)
  whole = make_model(deep)
  weights = jax.jit(functools.partial(init_params, whole))(jax.random.key(0))
  again = recompute(deep, whole, weights, context)
  reads, draws = ({key: [] for key in contestants} for _ in range(2))
  products, cached, recomputed = {batch: [] for batch in bare}, [], []
  for turn in range(repeats + 1):
    kept = turn > 0  # the first compiles
    for key, contestant in contestants.items():
      read, drawn = contestant()
      reads[key] += [read] * kept
      draws[key] += [drawn / size.new] * kept
    for batch, contestant in bare.items():
      products[batch] += [contestant()] * kept
    cached += [decode_once(deep, whole, weights, deep.loops, 1)[1] / deep.new] * kept
    recomputed += [again()] * kept
  middle = {key: statistics.median(times) for key, times in draws.items()}
  rows = [{'rows': batch, 'loops': budget, f'prefill {size.prompt} s': statistics.median(reads[batch, budget]),
           'ms a round': 1e3 * middle[batch, budget], 'range': spread([1e3 * value for value in draws[batch, budget]]),
           'tokens/s': round(batch / middle[batch, budget]),
           'times one row': batch * middle[batches[0], budget] / middle[batch, budget]}
          for batch, budget in contestants]
  shares = []
  for batch in batches:
    slope, fixed = np.polyfit(budgets, [middle[batch, budget] for budget in budgets], 1)
    worst = max(abs(fixed + slope * budget - middle[batch, budget]) / middle[batch, budget] for budget in budgets)
    shares.append({'rows': batch, 'fixed ms': 1e3 * fixed, 'ms a loop': 1e3 * slope,
                   f'fixed share at {size.loops} loops %': 100 * fixed / (fixed + slope * size.loops),
                   'worst miss of the line %': 100 * worst})
  ratio = [b / a for a, b in zip(cached, recomputed)]
  caches = [{'places': context, 'cached ms a token': 1e3 * statistics.median(cached),
             'recomputed ms a token': 1e3 * statistics.median(recomputed),
             'times as fast': statistics.median(ratio), 'range': spread(ratio)}]
  floors = [{'rows': batch, 'bare products ms': 1e3 * statistics.median(times),
             'MB of weights': bare_bytes(size) / MEGA, 'decoding ms': 1e3 * middle[batch, size.loops],
             'times the floor': middle[batch, size.loops] / statistics.median(times)}
            for batch, times in products.items()]
  return {'decode': rows, 'fixed share': shares, 'cache': caches, 'floor': floors}


def recompute(size: Size, model: Looped, params: Any, context: int) -> Callable[[], float]:
  """Seconds of a pass over `context` tokens and the logits of the last: a token without a cache."""
  tokens = jax.numpy.asarray(np.random.default_rng(0).integers(size.vocab, size=(1, context)), jax.numpy.int32)

  @jax.jit
  def last(params, tokens):
    trace = model.apply({'params': params}, tokens, plans.schedule(plans.resolve(size.loops)))
    return model.apply({'params': params}, trace.z[:, -1], method='logits')

  def once():
    start = time.perf_counter()
    last(params, tokens).block_until_ready()
    return time.perf_counter() - start

  return once


def bare_products(size: Size, params: Any, batch: int) -> Callable[[], float]:
  """Seconds of all matrix products of a token of every row, one after the other, with nothing between: the floor."""
  block = params['cell']['core']['block']
  layers = [(block['attn']['qkv']['kernel'][i], block['attn']['out']['kernel'][i], block['mlp']['up']['kernel'][i],
             block['mlp']['down']['kernel'][i]) for i in range(size.layers)]
  x = jax.numpy.ones((batch, size.width))

  @jax.jit
  def all_of(x, layers, table):
    def loop_(_, x):
      for qkv, out, up, down in layers:
        x = (x @ qkv).reshape(batch, -1, size.width).sum(1) @ out
        x = (x @ up) @ down
      return x
    return jax.lax.fori_loop(0, size.loops, loop_, x) @ table.T

  def once():
    start = time.perf_counter()
    all_of(x, layers, params['read_in']['embedding']).block_until_ready()
    return time.perf_counter() - start

  return once


def bare_bytes(size: Size) -> float:
  """Bytes of weights that a token reads: a block a loop, and the head."""
  block = size.width * (4 * size.width + 2 * size.hidden)
  return 4.0 * (size.loops * size.layers * block + size.vocab * size.width)


def comms_suite(size: Size, depths: Iterable[int] = (2, 8, 16), data: int = 2, fsdp: int = 4) -> list[dict]:
  """MB that a device sends in a step with two rollouts of all loops, by a ring, and how often the program does so."""
  mesh = sharding.Mesh(data=data, fsdp=fsdp).make()
  rows = []
  for loops in depths:
    deep = dataclasses.replace(size, loops=loops)
    model, objective = make_model(deep), with_short(deep, plans.Uniform(loops))
    optimizer = OPTIM.make(TRAIN_STEPS)
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, 0))
    state = abstract(shapes, sharding.shardings(shapes, mesh))
    over_rows = NamedSharding(mesh, P(sharding.BATCH))
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over_rows)
             for name, leaf in make_batch(deep).items()}
    steps = {'ours': make_step(model, objective, optimizer, mesh),
             'automatic': automatic(model, objective, optimizer, mesh)}
    sent = {}
    for name, step in steps.items():
      program = plan.Program(step.lower(state, batch).compile().as_text(), plan.Steps(free=0.0, live=1.0))
      sent[name] = sum(program.sent.values()) / MEGA
    rows.append({'loops': loops, **{f'{name} MB': value for name, value in sent.items()},
                 'automatic / ours': sent['automatic'] / sent['ours'],
                 'MB of weights': 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) / MEGA})
  return rows


def automatic(model: Looped, objective: Objective, optimizer: Any, mesh: jax.sharding.Mesh) -> Any:
  """A training step on the same shardings that leaves all communication to the partitioner."""

  def step(state, batch):
    draw = Draw(key=jax.random.key(0), step=state.step, stage=jax.numpy.int32(0),
                batch={**batch, 'row': jax.numpy.arange(batch['tokens'].shape[0])})
    weights = objective.denominators(draw.batch)
    (loss, _), grads = jax.value_and_grad(lambda params: objective(model, params, draw, weights), has_aux=True)(
        state.params)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    new = State(step=state.step + 1, params=optax.apply_updates(state.params, updates), optimizer=moments)
    return jax.lax.with_sharding_constraint(new, sharding.shardings(new, mesh)), loss

  return jax.jit(step, donate_argnums=0)


def draft_suite(workdir: str, repeats: int, new: int = 128, temperatures: Iterable[float] = (0.0, 1.0),
                drafts: Iterable[tuple[int, int]] = ((1, 3), (1, 4), (1, 5), (1, 6), (2, 4)),
                prompts: int = 4) -> list[dict]:
  """Tokens a second at one row, plain and with drafts (loops, tokens ahead), in turns; a few texts that the model was
  not trained on are continued, one after the other."""
  import loopformer
  model, params, tokenizer, config = loopformer.load(workdir)
  examples = config.task.examples(Path(workdir), 'validation', 0)
  texts = [[int(token) for token in examples[i]['tokens'][:32]] for i in range(prompts)]
  new = min(new, model.read_in.length - len(texts[0]))
  rows = []
  for temperature in temperatures:
    contestants = {None: Engine(model, params, tokenizer, rows=1)}
    contestants |= {draft: Engine(model, params, tokenizer, rows=1, draft=draft[0], ahead=draft[1]) for draft in drafts}
    seconds, drawn = {name: [] for name in contestants}, {name: [] for name in contestants}
    for turn in range(repeats + 1):
      for name, engine in contestants.items():
        before = engine.tally['tokens']
        for text in texts:
          engine.submit(text, max_new_tokens=new, temperature=temperature, seed=turn)
        start = time.perf_counter()
        engine.run()
        if turn:
          seconds[name].append(time.perf_counter() - start)
          drawn[name].append(engine.tally['tokens'] - before)
    rates = {name: [n / s for n, s in zip(drawn[name], seconds[name])] for name in contestants}
    for name, engine in contestants.items():
      ratios = [ours / plain for ours, plain in zip(rates[name], rates[None])]
      rows.append({'temperature': temperature, 'draft': '-' if name is None else f'{name[0]} loops, {name[1]} ahead',
                   'tokens/s': round(statistics.median(rates[name])), 'times plain': statistics.median(ratios),
                   'range': spread(ratios), 'accepted': engine.tally.get('accepted', '-')})
  return rows


@dataclasses.dataclass(frozen=True)
class Ids:
  """The end of a tokenizer that writes ids as numbers, and never ends a document."""
  vocab_size: int
  eos: int = -1

  def decode(self, ids) -> str:
    return ' '.join(map(str, ids))


def decode_once(size: Size, model: Looped, params: Any, budget: int, batch: int) -> tuple[float, float]:
  """Seconds to read the prompts and draw the first tokens, and to draw the new tokens."""
  rng = np.random.default_rng(0)
  engine = Engine(model, params, Ids(size.vocab), rows=batch, length=size.prompt + size.new + 1, loops=size.loops,
                  rounds=size.new)
  for _ in range(batch):
    engine.submit(rng.integers(size.vocab, size=size.prompt).tolist(), budget=budget,
                  max_new_tokens=size.new + 1)
  start = time.perf_counter()
  stream = engine.stream()
  for _ in range(batch):  # the first piece of every row comes from reading its prompt
    next(stream)
  middle = time.perf_counter()
  for _ in stream:
    pass
  if engine.tally['tokens'] != batch * size.new:
    raise RuntimeError(f'decoding drew {engine.tally["tokens"]} tokens, not {batch * size.new}')
  return middle - start, time.perf_counter() - middle


def run_suite(name: str, size: Size, repeats: int, peer: str | None) -> dict[str, list[dict]]:
  """The tables of a suite by their names."""
  if name == 'train':
    return {'train': train_suite(size, repeats, peer)}
  if name == 'memory':
    return {'memory': memory_suite(size)}
  if name == 'compile':
    return {'compile': compile_suite(size, min(repeats, 3)), 'programs': programs_suite(size)}
  if name == 'comms':
    return {'comms': comms_suite(size)}
  if name == 'draft':
    if not FLAGS.trained:
      raise app.UsageError('--suite=draft needs --trained, a work folder with a trained language model')
    return {'draft': draft_suite(FLAGS.trained, repeats)}
  return decode_suite(size, repeats)


def describe_machine(peer: str | None) -> dict[str, str]:
  """Where the numbers are from: hardware, versions, date and command."""
  versions = {'python': platform.python_version(), 'jax': jax.__version__, 'flax': flax.__version__}
  if peer:
    import torch
    versions['torch'] = torch.__version__
  kind = jax.devices()[0].device_kind
  if jax.default_backend() == 'cpu':
    kind = f'{cpu_model()}, {os.cpu_count()} cores'
  return {'hardware': kind, 'versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
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
  if name != 'draft':  # whose model has its own
    facts.append('- size: ' + ', '.join(f'{field} {value}' for field, value in dataclasses.asdict(size).items()))
  parts = [f'# Benchmark: {name}', '\n'.join(facts), *map(metrics.table, tables.values())]
  (folder / f'{name}.md').write_text('\n\n'.join(parts) + '\n')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown arguments: {" ".join(argv[1:])}')
  unknown = [name for name in FLAGS.suite if name not in SUITES]
  if unknown:
    raise app.UsageError(f'--suite: there is no suite {unknown[0]}; choose from {", ".join(SUITES)}')
  if 'comms' in FLAGS.suite:
    if len(FLAGS.suite) > 1:
      raise app.UsageError('--suite: comms simulates eight devices, on which nothing else is measured; run it alone')
    plan.simulate(8)
  machine = describe_machine(FLAGS.peer)
  for fact, value in machine.items():
    print(f'{fact}: {value}')
  for name in FLAGS.suite:
    start = time.time()
    tables = run_suite(name, REFERENCE, FLAGS.repeats, FLAGS.peer)
    print(f'\n{name}: {metrics.duration(time.time() - start)}')
    for rows in tables.values():
      print(metrics.table(rows), flush=True)
    if FLAGS.out:
      write(Path(FLAGS.out), name, tables, REFERENCE, machine)


if __name__ == '__main__':
  app.run(main)
