"""To CoT or to loop: one block as a decoder that writes chains, as a loop, and with continuous thoughts, on the same
tasks (Xu and Sato, 2505.19245; its successor 2509.25239, ICML 2026, which adds thoughts).

    python -m experiments.main --config=experiments/configs/cot_or_loop.py:cpu --workdir=runs/chain

Argument: size, then any of

    size        cpu    one layer of width 32, two for graphs, sums and edits (every kind): a minute or two on two CPU cores
                gpu    width 256, words of S5: one GPU
                paper  as published
    kind        chain    a decoder that writes the rounds of the solution, and the answer
                loop     the block in a loop; words are asked for at every prefix, causally, others at their last token,
                         where all tokens read each other
                timed    a loop modulated by its index (the paper's for arithmetic and edit distance)
                thought  a decoder whose last state is its next input, so many times (Coconut)
    task        parity; word (S3 at cpu, S5); connectivity; arithmetic (mod 3); edit;
                colouring, dnf: sampling and counting (chains write samples, loops see where they end, or the count)
    steps       chain: rounds that are kept, evenly, all by default, 0 for the answer alone; loop, timed: loops;
                thought: thoughts
    internalise chain: 0, or training steps a stage of stepwise internalisation, of all rounds
    inject      1: a loop takes the input in again in every step (not in the paper)

`experiments/studies/cot_or_loop.py` compares them, beside what they cost. Measured figures:
experiments/reports/cot_or_loop/.

Departures and what the paper does not say: rotary positions and no biases (published: learned positions, which loops
add again in every step); arithmetic reduced from the left; the question of a graph at the end of its row, where loops
are read; problems that are drawn anew each time (of small tasks some come again, and some that are held out); at the
published size loops begin with small problems, which grow to their size during training; 40 times at most, or evenly.
"""
from __future__ import annotations

import dataclasses
import re
from typing import Any

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.cells.timed import Timed
from loopformer.config import Experiment, arguments, choose
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.condition import LoopIndex, Modulation
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.nn.layers import MLP, RMSNorm, UnitNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import WSD, AdamW, WarmupCosine
from loopformer.papers.cot.cell import Thinking
from loopformer.tasks.arithmetic import Arithmetic
from loopformer.tasks.counting import Colouring, Count, Trials
from loopformer.tasks.edit_distance import EditRows
from loopformer.tasks.generated import Generated, Grow, Rise, Same
from loopformer.tasks.graph_search import Reachable, ReachableByEdges
from loopformer.tasks.reasoning import Asked, Chain
from loopformer.tasks.shortened import Internalised, Selected
from loopformer.tasks.words import Cyclic, Prefixes, Symmetric, Word
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError, whole

KINDS = ('chain', 'loop', 'timed', 'thought')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Problems of a task; those that loops are given, where they are written otherwise; and, of the published size, where
  loops begin, and by how much problems grow."""
  of: Any
  looped: Any = None
  layers: int = 1
  first: int = 0
  add: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Dimensions, tasks and training of a size; steps: what each kind does by default, chains apart."""
  width: int
  std: float
  tasks: dict[str, Source]
  steps: dict[str, int]
  train: Train
  schedule: WarmupCosine | WSD
  dtype: str = 'float32'


def _tasks(group: Symmetric, words: int, parity: int, vertices: int, operators: int, letters: int, using: int,
           layers: int, searched: int = 1) -> dict[str, Source]:
  """The problems of a size, each of one length. layers: of the block for words; searched: of that for graphs, sums and
  edits, where one layer cannot find which token a chain has to copy next."""
  def one(kind, size, **options):
    return kind(shortest=size, longest=size, **options)

  return {
      'parity': Source(of=one(Word, parity, group=Cyclic(degree=2)), first=4, add=2),
      'word': Source(of=one(Word, words, group=group), layers=layers, first=4, add=2),
      'connectivity': Source(of=one(Reachable, vertices), looped=one(ReachableByEdges, vertices), layers=searched,
                             first=4, add=4),
      'arithmetic': Source(of=one(Arithmetic, operators, modulus=3), layers=searched, first=4, add=4),
      'edit': Source(of=one(EditRows, letters, using=using), layers=searched),
      'colouring': Source(of=one(Colouring, 40)),
      'dnf': Source(of=one(Trials, 10), looped=one(Count, 10))}


SIZES = {
    'cpu': Size(
        width=32, std=32 ** -0.5, tasks=_tasks(Symmetric(degree=3), 8, 16, 8, 3, 6, 2, 1, searched=2),
        steps={'loop': 8, 'timed': 8, 'thought': 8},
        train=Train(steps=1500, batch=64, log_every=50, eval_every=500, save_every=500),
        schedule=WarmupCosine(peak=5e-3, end=0.0, warmup=50)),
    'gpu': Size(
        width=256, std=1 / 16, tasks=_tasks(Symmetric(degree=5), 32, 64, 16, 8, 12, 8, 2, searched=2),
        steps={'loop': 8, 'timed': 8, 'thought': 8},
        train=Train(steps=20_000, batch=1024, log_every=100, eval_every=2000, save_every=2000),
        schedule=WarmupCosine(peak=3e-4, end=0.0, warmup=500), dtype='bfloat16'),
    'paper': Size(
        width=256, std=0.02, tasks=_tasks(Symmetric(degree=5), 64, 64, 32, 32, 32, 8, 2),
        steps={'loop': 8, 'timed': 8, 'thought': 8},
        # As many steps as 100 passes over 900,000 problems.
        train=Train(steps=351_600, batch=256, log_every=500, eval_every=5000, save_every=5000),
        schedule=WSD(peak=1e-4, end=0.0, warmup=1000 / 351_600, cooldown=1 - 1000 / 351_600)),
}


def form_of(kind: str, task: str, source: Source, steps: int | None, internalise: int) -> Any:
  """What a kind is shown of problems."""
  if kind == 'chain':
    if internalise:
      return Chain(of=Internalised(of=source.of))
    return Chain(of=source.of if steps is None else Selected(of=source.of, rounds=steps))
  if kind == 'thought':
    return Asked(of=source.of, thoughts=steps)
  if task in ('parity', 'word'):
    return Prefixes(of=source.of)
  return Asked(of=source.looped or source.of)


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,kind=loop,task=parity,steps=4`."""
  given = arguments(argument, size='cpu', kind='chain', task='parity', steps='', internalise=0, inject=False)
  size, kind, task = choose('size', given['size'], SIZES), given['kind'], given['task']
  choose('kind', kind, {name: None for name in KINDS})
  source = choose('task', task, size.tasks)
  steps = _steps(given['steps'], kind, size)
  internalise = whole('config argument internalise', given['internalise'], 0)
  if internalise and (kind != 'chain' or steps is not None):
    raise ConfigError(f'config argument internalise = {internalise}: it takes whole chains apart, stage by stage; '
                      'leave out steps, and give kind=chain')
  if given['inject'] and kind != 'loop':
    raise ConfigError('config argument inject = 1: give 0, or 1 with kind=loop')
  form = form_of(kind, task, source, steps, internalise)
  grow = Same()
  if internalise:
    grow = Grow(fields={'of/stage': Rise(first=1, every=internalise * size.train.batch)})
  elif given['size'] == 'paper' and kind in ('loop', 'timed') and source.add:
    rises = -(-(form.of.longest - source.first) // source.add) + 1
    rise = Rise(first=source.first, add=source.add, every=size.train.steps * size.train.batch // min(rises, 40))
    grow = Grow(fields={'of/shortest': rise, 'of/longest': rise})
  width, std, depth = size.width, size.std, source.layers
  two_ways = kind in ('loop', 'timed') and not isinstance(form, Prefixes)
  out_std = std / (2 * depth) ** 0.5
  attn = SelfAttention(heads=4, position=Rotary(), kernel=Bidirectional() if two_ways else Fused(), std=std,
                       out_std=out_std)
  core = Stack(Block(attn=attn, mlp=MLP(hidden=4 * width, std=std, out_std=out_std),
                     norm=UnitNorm() if kind == 'timed' else RMSNorm(), dtype=size.dtype), depth)
  cell = {'chain': lambda: Plain(core), 'loop': lambda: Recur(core, Add()) if given['inject'] else Plain(core),
          'timed': lambda: Timed(core, LoopIndex(width), Modulation(depth)),
          'thought': lambda: Thinking(core, filler=form.pad)}[kind]()
  loops = {'chain': 1, 'thought': (steps or 0) + 1}.get(kind, steps)
  told = f', {steps} rounds' if steps is not None and kind == 'chain' else ', internalised' if internalise else (
      f', {steps}' if kind != 'chain' else '')
  vocab = len(form.symbols)
  return Experiment(
      name=f'{task} {kind}{told}' + (', with injection' if given['inject'] else ''),
      model=Looped(read_in=Tokens(vocab=vocab, width=width, length=form.length + 1, std=std), cell=cell,
                   read_out=Head(outputs=vocab, std=std), loops=loops, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))},
                          terms={'answer': Weighted(1.0, CE(roll='all'))}),
      task=Generated(of=form, grow=grow), train=size.train, optim=AdamW(schedule=size.schedule, decay=0.01),
      evals=Depths(budgets=(loops,)))


def _steps(text: str, kind: str, size: Size) -> int | None:
  """Of the argument; None where a chain is to have all its rounds."""
  if not text:
    return size.steps.get(kind)
  steps = int(text) if re.fullmatch(r'-?\d+', text) else text
  return whole('config argument steps', steps, 1 if kind in ('loop', 'timed') else 0)
