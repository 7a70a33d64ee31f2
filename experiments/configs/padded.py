"""Padded and looped transformers, trained: loops as many as the logarithm of the input, and fillers to compute at
(Merrill and Sabharwal, 2503.03961 and 2505.18948, who loop and pad in theory alone).

    python -m experiments.main --config=experiments/configs/padded.py:cpu --workdir=runs/padded
    python -m experiments.main --config=experiments/configs/padded.py:cpu,task=connectivity --workdir=runs/paths

Argument: size, then any of

    size       cpu  one layer of width 32, short inputs: a minute or two on two CPU cores
               gpu  (1, 2, 1) layers of width 256, bfloat16, words of 64: one GPU
    task       parity, s3, a5, s5   word problems of groups, every prefix asked for its product
               ab, no_aa_bb         regular languages, every prefix asked for its state
               connectivity         is there a path between two vertices; tests by distance
    loops      a number; or log: as many as ceil(log2 n), and two more of size gpu, for an input of size n
    fillers    a number, or n^k for ceil(n^k), tokens before the query: '=' or '$' of words, the two vertices of a graph
    place      query: fillers stand before that; first: before all
    untied     1: as many layers as the loops apply, each with its own weights, and no loop
    lengths    fixed: all training inputs are as long as those tested; doubling: 2, 4, 8 .. (size gpu: 4, 8 ..) first
    attention  causal, or both: every token reads all
    mask       1: the norms before layers read mu * x, mu learned and ones at first

`experiments/studies/padded_depth.py` trains depths beside each other and reports up to which length they are right.
Measured figures: experiments/reports/padded/.

What theory leaves open, and is chosen here: softmax attention, learned positions, RMSNorm before layers and head, the
input added in every loop, AdamW with a cosine.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.inference.evaluate import Named, Run
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.nn.layers import MLP, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.padded.norm import MaskedNorm
from loopformer.starts import Embedded, Zeros
from loopformer.tasks.connectivity import Connectivity
from loopformer.tasks.fillers import Filled, Power, check_order
from loopformer.tasks.generated import Double, Generated, Grow, Same
from loopformer.tasks.reasoning import Asked
from loopformer.tasks.words import AB, NO_AA_BB, Alternating, Cyclic, Prefixes, Regular, Symmetric, Word
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError

GROUPS = {'parity': Cyclic(degree=2), 's3': Symmetric(degree=3), 'a5': Alternating(degree=5), 's5': Symmetric(degree=5)}
LANGUAGES = {'ab': AB, 'no_aa_bb': NO_AA_BB}
LENGTHS = {'fixed': False, 'doubling': True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """around: layers before the loop, and after it; layers: of the loop; more: loops beyond the logarithm; longest: the
  input of every task; first: the shortest of lengths that double, `every` steps."""
  around: int
  layers: int
  width: int
  heads: int
  longest: dict[str, int]
  loops: str
  more: int
  lengths: str
  first: int
  every: int
  train: Train
  schedule: WarmupCosine
  remat: Any
  dtype: str = 'float32'


WORDS = (*GROUPS, *LANGUAGES)
SIZES = {
    'cpu': Size(around=0, layers=1, width=32, heads=4, loops='4', more=0, lengths='fixed', first=2, every=50,
                longest={**dict.fromkeys(WORDS, 16), 's3': 8, 'a5': 8, 's5': 8, 'connectivity': 5},
                train=Train(steps=1000, batch=64, log_every=100, eval_every=500, save_every=1000),
                schedule=WarmupCosine(peak=5e-3, end=0.0, warmup=50), remat=loop.KeepAll()),
    'gpu': Size(around=1, layers=2, width=256, heads=8, loops='log', more=2, lengths='doubling', first=4, every=1000,
                longest={**dict.fromkeys(WORDS, 64), 'connectivity': 8},
                train=Train(steps=10_000, batch=512, log_every=100, eval_every=1000, save_every=1000),
                schedule=WarmupCosine(peak=3e-4, end=0.0, warmup=500), remat=loop.PerLayer(), dtype='bfloat16'),
}


def source(task: str, size: int) -> Any:
  """The problems of a task, all of one size."""
  if task in GROUPS:
    return Word(shortest=size, longest=size, group=GROUPS[task])
  if task in LANGUAGES:
    return Regular(shortest=size, longest=size, automaton=LANGUAGES[task])
  return Connectivity(shortest=size, longest=size)


def fillers_of(text: str) -> int | Power:
  """The fillers that an argument asks for."""
  try:
    number = float(text[2:]) if text.startswith('n^') else int(text)
  except ValueError:
    raise ConfigError(f'config argument fillers = {text!r}: give a whole number, or n^k for a power of the size, such '
                      'as n^3') from None
  return Power(power=number) if text.startswith('n^') else number


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,task=parity,loops=log,lengths=doubling`."""
  given = arguments(argument, size='cpu', task='', loops='', fillers='0', place='query', untied=False, lengths='',
                    attention='', mask=False)
  size = choose('size', given['size'], SIZES)
  task = given['task'] or {'cpu': 'parity', 'gpu': 'a5'}[given['size']]
  longest = choose('task', task, size.longest)
  graphs = task == 'connectivity'
  first = choose('place', given['place'], {'query': False, 'first': True})
  causal = choose('attention', given['attention'] or ('both' if graphs else 'causal'), {'causal': True, 'both': False})
  doubles = choose('lengths', given['lengths'] or ('fixed' if graphs else size.lengths), LENGTHS)

  def filled(of):
    return Filled(of=Asked(of=of) if graphs else Prefixes(of=of), fillers=fillers_of(given['fillers']),
                  query=2 if graphs else 1, first=first)

  of = filled(source(task, longest))
  check_order(of, causal)
  plan = plan_of(given['loops'] or size.loops, longest, size.more, of.length)
  grow = Same()
  if doubles:  # the shorter bound first: it is never above the other
    rise = Double(first=size.first, every=size.every * size.train.batch)
    grow = Grow(fields={'of/of/shortest': rise, 'of/of/longest': rise})
  tests = {}
  if graphs:
    far = (0, *range(1, longest - 1))
    tests = {f'distance {d}' if d else 'no path': filled(dataclasses.replace(of.of.of, distance=d)) for d in far}
  width, vocab = size.width, len(of.symbols)
  std = width ** -0.5
  attn = SelfAttention(heads=size.heads, kernel=Fused() if causal else Bidirectional(), std=std)
  block = Block(attn=attn, mlp=MLP(hidden=4 * width, std=std), norm=MaskedNorm() if given['mask'] else RMSNorm(),
                dtype=size.dtype)
  loops, cell, start = plan.longest, Recur(Stack(block, size.layers), Add()), Zeros()
  if given['untied']:
    cell, start = Plain(Stack(block, size.layers * loops)), Embedded()
    plan, loops = plans.Uniform(1), 1
  around = Stack(block, size.around) if size.around else None
  return Experiment(
      name=f'{task} {"untied" if given["untied"] else "looped"} {given["loops"] or size.loops}',
      model=Looped(read_in=TokenEmbed(vocab=vocab, width=width, length=of.length, std=std), cell=cell, start=start,
                   prelude=around, coda=around, read_out=Head(outputs=vocab, std=std), loops=loops, remat=size.remat),
      objective=Objective(rolls={'all': Rollout(plan)}, terms={'answer': Weighted(1.0, CE(roll='all'))}),
      task=Generated(of=of, grow=grow, held_out=512, tests=tests), train=size.train,
      optim=AdamW(schedule=size.schedule, decay=0.01), evals=Named(runs={'trained': Run(plan=plan)}))


def plan_of(loops: str, longest: int, more: int, rows: int) -> Any:
  """Always so many loops; or, of 'log', as many as the size of an input asks for."""
  if loops == 'log':
    return plans.LogDepth(size=longest, more=more, rows=rows)
  if not loops.isdecimal():
    raise ConfigError(f'config argument loops = {loops!r}: give a whole number, or log for as many as the input asks '
                      'for')
  return plans.Uniform(int(loops))
