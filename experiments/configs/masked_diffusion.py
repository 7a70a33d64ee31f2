"""Masked diffusion with loops in every denoising step (MDLM, LLaDA, ReMDM; Svete and Sabharwal, 2510.13117).

    python -m experiments.main --config=experiments/configs/masked_diffusion.py:cpu --workdir=runs/diffusion
    python -m experiments.main --mode=generate --workdir=runs/diffusion --denoise=16 --budget=2

Argument: size, then any of

    size         cpu    4x4 Sudoku, one layer of width 32: a minute or two on two CPU cores
                 gpu    9x9 Sudoku with 30 to 45 holes, two layers of width 256: one GPU
                 paper  MDLM: twelve layers of width 768 on windows of 1024 tokens
    task         sudoku4, sudoku9 or text; the size's by default; or
                 parity, s3, a5, s5   word problems of groups, and slots for all running products
                 ab, no_aa_bb         regular languages, and slots for all states
                 countdown            three numbers (size cpu) or four, and equations that come to a target
    kind         diffusion, or ar: the same layers, causal, that write a grid cell by cell (sudoku4), a text, or products,
                 states and equations one by one
    loops        K, in every denoising step; the size's by default
    letters      of word problems and languages; 16 of size cpu by default, else 32
    consistency  the weight of LoopFormer's shortcut consistency between fewer loops and K (it needs K of 2 or more)
    time         1: the layers hear what share of a sequence is hidden (MDLM leaves it out, as is the default)
    noise        linear or cosine

Steps and loops are two dials: of total depth S K. Docs: docs/denoising.md; measured figures:
experiments/reports/masked_diffusion/; `experiments/studies/denoising.py` makes them.

Departures: RMSNorm before layers and heads; no dropout and no average of weights; `paper` reads rotary positions and has
no time conditioning, as MDLM, but no adaLN with a constant time in its place.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from experiments.configs import padded
from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.diffusion.cell import ToldHidden
from loopformer.diffusion.measures import Bound
from loopformer.diffusion.noise import Cosine, Linear, Masking
from loopformer.diffusion.sampler import Denoising
from loopformer.diffusion.terms import NELBO
from loopformer.inference.evaluate import Depths
from loopformer.inference.measures import Tokens
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TokenEmbed, Tokens as TokensIn
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional, Blockwise
from loopformer.nn.layers import MLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import AsGiven, Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.countdown import Countdown
from loopformer.tasks.generated import Generated
from loopformer.tasks.reasoning import Chain, Slots
from loopformer.tasks.sudoku import Sudoku
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.terms.match import ShortcutConsistency
from loopformer.training.train import Train
from loopformer.types import ConfigError

GRIDS = {'sudoku4': Sudoku(box=2), 'sudoku9': Sudoku(box=3, holes=(30, 45))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """task: that of the argument by default; vocab: ids of a text's tokenizer; letters: of word problems; numbers: of
  Countdown; rotary: positions of attention, else of a table."""
  task: str
  layers: int
  width: int
  heads: int
  loops: int
  length: int
  train: Train
  schedule: Any
  betas: tuple[float, float] = (0.9, 0.95)
  vocab: int = 8192
  letters: int = 32
  numbers: int = 4
  rotary: bool = False
  dtype: str = 'float32'


SIZES = {
    'cpu': Size(task='sudoku4', layers=1, width=32, heads=4, loops=2, length=64, vocab=1024, letters=16, numbers=3,
                train=Train(steps=1500, batch=128, log_every=50, eval_every=500, save_every=500, eval_batches=8),
                schedule=WarmupCosine(peak=5e-3, end=0.0, warmup=20)),
    'gpu': Size(task='sudoku9', layers=2, width=256, heads=8, loops=4, length=256,
                train=Train(steps=15_000, batch=1024, log_every=100, eval_every=1500, save_every=1500, eval_batches=2),
                schedule=WarmupCosine(peak=1e-3, end=1e-5, warmup=200), dtype='bfloat16'),
    'paper': Size(task='text', layers=12, width=768, heads=12, loops=1, length=1024, vocab=50_257, betas=(0.9, 0.999),
                  train=Train(steps=1_000_000, batch=512, log_every=100, eval_every=10_000, save_every=10_000),
                  schedule=WarmupCosine(peak=3e-4, end=3e-4, warmup=2500), rotary=True, dtype='bfloat16'),
}


def generators(letters: int, numbers: int, diffuses: bool) -> dict[str, Any]:
  """What every task makes examples with; text has None."""
  words = {name: padded.source(name, letters) for name in padded.WORDS}
  return {**GRIDS, 'text': None, 'countdown': Countdown(numbers=numbers),
          **{name: Slots(of=of, answer=name not in padded.GROUPS) if diffuses else Chain(of=of) for name, of in words.items()}}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,loops=4` or `cpu,kind=ar`."""
  given = arguments(argument, size='cpu', task='', kind='diffusion', loops=int, letters=int, consistency=0.0, time=False,
                    noise='linear')
  size = choose('size', given['size'], SIZES)
  task = given['task'] or size.task
  diffuses = choose('kind', given['kind'], {'diffusion': True, 'ar': False})
  of = choose('task', task, generators(counted(given, 'letters', size.letters), size.numbers, diffuses))
  noise = choose('noise', given['noise'], {'linear': Linear(), 'cosine': Cosine()})
  loops = counted(given, 'loops', size.loops)
  if not diffuses and task == 'sudoku9':
    raise ConfigError(f'config argument kind = ar: cells of {task} are told from those before them alone, and clues stand '
                      'behind, too; take task=sudoku4')
  if given['consistency'] and (loops < 2 or not diffuses):
    raise ConfigError(f'config argument consistency = {given["consistency"]}: it is of denoisers of loops=2 or more')
  if given['letters'] is not None and task not in padded.WORDS:
    raise ConfigError(f'config argument letters = {given["letters"]}: {task} has no words; leave it out')
  if given['consistency'] < 0:
    raise ConfigError(f'config argument consistency = {given["consistency"]}: fewer loops would learn to disagree; give 0 or more')
  for name, value in () if diffuses else (('time', int(given['time'])), ('noise', given['noise'])):
    if value not in (0, 'linear'):
      raise ConfigError(f'config argument {name} = {value}: nothing is hidden with kind=ar; leave it out')
  if of is None:
    from loopformer.data.tokenizer import TrainedPieces
    vocab, length = size.vocab, size.length
    data = Text(length=length, tokenizer=TrainedPieces(vocab=vocab), measure=Bound(mask=vocab) if diffuses else Tokens())
  else:
    vocab, length = len(of.symbols), of.length
    data = Generated(of=of, held_out=1024, **({'measure': Bound(mask=vocab)} if diffuses else {}))
  width, std = size.width, size.width ** -0.5
  attn = SelfAttention(heads=size.heads, kernel=Bidirectional() if diffuses else Blockwise(), std=std,
                       **({'position': Rotary()} if size.rotary else {}))
  core = Stack(Block(attn=attn, mlp=MLP(hidden=4 * width, std=std), norm=RMSNorm(), dtype=size.dtype), size.layers)
  cell = Recur(core, Add()) if loops > 1 or size.layers == 1 else Plain(core)
  if given['time']:
    cell = ToldHidden(cell, width=width, mask=vocab)
  places = length + (of is not None and not diffuses)  # one more than it trains on: a token to begin with, and all to write
  inputs = dict(vocab=vocab + diffuses, width=width, length=places, std=std if not size.rotary else 0.02)
  model = Looped(read_in=TokensIn(**inputs) if size.rotary else TokenEmbed(**inputs), cell=cell, loops=loops,
                 read_out=Head(outputs=vocab, std=std), remat=loop.PerLayer(),
                 **({'sampler': Denoising(steps=length)} if diffuses else {}))
  rolls, terms = {'all': Rollout(plans.Uniform(loops))}, {}
  terms['bound' if diffuses else 'cells'] = Weighted(1.0, NELBO(roll='all') if diffuses else CE(roll='all'))
  if given['consistency']:
    rolls['short'] = Rollout(plans.RandomDepth(loops))
    terms |= {'short': Weighted(1.0, NELBO(roll='short')),
              'match': Weighted(given['consistency'], ShortcutConsistency(roll='short', target='all'))}
  budgets = tuple(sorted({1, 2, loops} if given['consistency'] else {loops}))
  return Experiment(
      name=f'{"masked diffusion" if diffuses else "next token"} {task} {loops} loops', model=model, task=data,
      objective=Objective(rolls=rolls, terms=terms, prepare=Masking(mask=vocab, noise=noise) if diffuses else AsGiven()),
      train=size.train, evals=Depths(budgets=budgets),
      optim=AdamW(schedule=size.schedule, b1=size.betas[0], b2=size.betas[1], decay=0.0))
