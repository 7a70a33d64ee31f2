"""CCDD: tokens and latents denoised together, with loops in every denoising step (Zhou et al., 2510.03206).

    python -m experiments.main --config=experiments/configs/ccdd.py:cpu --workdir=runs/ccdd
    python -m experiments.main --mode=generate --workdir=runs/ccdd --denoise=8 --budget=2

Argument: size, then any of

    size     cpu    4x4 Sudoku, one layer of width 32, two loops: minutes on two CPU cores
             gpu    9x9 Sudoku with 30 to 45 holes, two layers of width 256: one GPU
             paper  text, twelve layers of width 768 on windows of 128 tokens (LM1B's length), 32 channels
    kind     sum    latents are added to a looped stack that takes its input in again
             mdit   latents are added, layers are modulated by the time of the noise (MDiT)
             moe    tokens and latents are one sequence, MLPs are two experts (MoEDiT)
             mmdit  the same, and each has layers of its own (MMDiT)
    encoder  what latents are: `context`, a fixed random map of the whole grid (Sudoku); `tokens`, random vectors of tokens, the
             control; or the work folder of a model, of ours or imported, whose last states they are
    source   clean      latents know what is hidden, as in the paper: the number that is reached is conditional
             corrupted  they do not: the number is a bound
    noise    of latents: vp, flow or quadratic
    times    of latents: together (as tokens), apart, or slower (t^3)
    weights  of tokens: bound (1/t) or dynamic (2 (1 - t), the paper's)
    loops    K, in every denoising step; the size's by default
    experts  of moe, how many of two a token takes: 1 or 2
    drop     the chance that a sequence's latents are 0, for guidance (`--guidance`)

Measured figures: experiments/reports/ccdd/; `experiments/studies/coevolution.py` makes them.

Departures: modulations are gates and scales without shifts, and the same for both streams of mmdit; no dropout and no
average of weights; embeddings of times begin like other weights; a byte-pair tokenizer of our own, and no uniform noise.
"""
from __future__ import annotations

import dataclasses
from typing import Any

from loopformer import loop, plans
from loopformer.cells.recur import Recur
from loopformer.cells.timed import Timed
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import TrainedPieces
from loopformer.diffusion.noise import Masking
from loopformer.diffusion.terms import NELBO
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.condition import Modulation, NoiseTime
from loopformer.nn.embed import Head, TokenEmbed, Tokens
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import MLP, RMSNorm, UnitNorm, gelu_tanh
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.papers.ccdd.blocks import CrossAttention, Experts, TwoStreams
from loopformer.papers.ccdd.cell import AdaFinal, Doubled, Summed
from loopformer.papers.ccdd.encoders import Hidden, RandomContext, RandomTokens
from loopformer.papers.ccdd.measures import JointBound
from loopformer.papers.ccdd.plans import WithLatents
from loopformer.papers.ccdd.prepare import Apart, Clean, Corrupted, Dynamic, Joint, OfBound, Slower, Together
from loopformer.papers.ccdd.process import VP, Flow, Quadratic
from loopformer.papers.ccdd.sampler import Coevolving
from loopformer.papers.ccdd.terms import LatentError
from loopformer.tasks.generated import Generated
from loopformer.tasks.sudoku import Sudoku
from loopformer.tasks.text import Text
from loopformer.training.train import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """grid: the task, None for text; channels: of latents that do not say how many they have."""
  grid: Sudoku | None
  kind: str
  layers: int
  width: int
  heads: int
  loops: int
  length: int
  train: Train
  optim: AdamW
  channels: int = 32
  vocab: int = 8192
  dtype: str = 'float32'


SIZES = {
    'cpu': Size(grid=Sudoku(box=2), kind='sum', layers=1, width=32, heads=4, loops=2, length=16, channels=8,
                train=Train(steps=1500, batch=128, log_every=50, eval_every=500, save_every=500, eval_batches=8),
                optim=AdamW(schedule=WarmupCosine(peak=5e-3, end=0.0, warmup=20), decay=0.0)),
    'gpu': Size(grid=Sudoku(box=3, holes=(30, 45)), kind='mdit', layers=2, width=256, heads=8, loops=4, length=81,
                train=Train(steps=15_000, batch=1024, log_every=100, eval_every=1500, save_every=1500, eval_batches=2),
                optim=AdamW(schedule=WarmupCosine(peak=5e-4, end=0.0, warmup=500), b2=0.99, decay=0.02),
                dtype='bfloat16'),
    'paper': Size(grid=None, kind='mdit', layers=12, width=768, heads=12, loops=1, length=128, vocab=50_257,
                  train=Train(steps=1_000_000, batch=512, log_every=100, eval_every=10_000, save_every=10_000),
                  optim=AdamW(schedule=WSD(peak=3e-4, end=3e-4, warmup=2500), b2=0.99, eps=1e-9, decay=0.02),
                  dtype='bfloat16'),
}


def cell(kind: str, size: Size, channels: int, experts: int) -> Any:
  """The step of a kind."""
  width, std = size.width, size.width ** -0.5
  attn = SelfAttention(heads=size.heads, kernel=Bidirectional(), std=std, position=Rotary() if size.grid is None else None)
  mlp = MLP(hidden=4 * width, std=std, activation=gelu_tanh)
  block = Block(attn=attn, mlp=mlp, norm=RMSNorm() if kind == 'sum' else UnitNorm(), dtype=size.dtype)
  if kind == 'moe':
    block = dataclasses.replace(block, mlp=Experts(mlp, top=experts))
  if kind == 'mmdit':
    cross = CrossAttention(size.heads, std=std)
    block = TwoStreams(tokens=block, latents=block, to_latents=cross, to_tokens=cross)
  core = Stack(block, size.layers)
  inner = Recur(core, Add()) if kind == 'sum' else Timed(core, NoiseTime(width), Modulation(size.layers))
  return (Doubled if kind in ('moe', 'mmdit') else Summed)(inner, into=AdaFinal(width), guess=AdaFinal(channels))


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,encoder=tokens` or `gpu,kind=mmdit,encoder=runs/encoder`."""
  given = arguments(argument, size='cpu', kind='', encoder='', source='clean', noise='vp', times='together', weights='bound',
                    loops=int, experts=2, drop=0.0)
  size = choose('size', given['size'], SIZES)
  kind = given['kind'] or size.kind
  choose('kind', kind, dict.fromkeys(('sum', 'mdit', 'moe', 'mmdit')))
  noise = choose('noise', given['noise'], {'vp': VP(), 'flow': Flow(), 'quadratic': Quadratic()})
  times = choose('times', given['times'], {'together': Together(), 'apart': Apart(), 'slower': Slower()})
  source = choose('source', given['source'], {'clean': Clean(), 'corrupted': Corrupted()})
  weights = choose('weights', given['weights'], {'bound': OfBound(), 'dynamic': Dynamic()})
  loops, vocab = counted(given, 'loops', size.loops), len(size.grid.symbols) if size.grid else size.vocab
  named = given['encoder'] or ('context' if size.grid else 'tokens')
  encoder = {'context': RandomContext(vocab=vocab - 1, length=size.length),
             'tokens': RandomTokens(vocab=vocab, width=size.channels)}.get(named) or Hidden(folder=named, width=size.channels)
  measure = JointBound(mask=vocab, encoder=encoder, process=noise, source=source, times=times)
  table = dict(vocab=vocab + 1, width=size.width, length=size.length, std=size.width ** -0.5)
  model = Looped(
      read_in=TokenEmbed(**table) if size.grid else Tokens(**table), loops=loops, remat=loop.PerLayer(),
      cell=cell(kind, size, encoder.width, choose('experts', given['experts'], {1: 1, 2: 2})),
      read_out=Head(outputs=vocab, std=size.width ** -0.5),
      sampler=Coevolving(latents=encoder.width, process=noise, times=times, steps=size.length))
  return Experiment(
      name=f'CCDD {kind} {loops} loops', model=model,
      task=Generated(of=size.grid, measure=measure) if size.grid else
      Text(tokenizer=TrainedPieces(vocab=vocab), length=size.length, measure=measure),
      objective=Objective(
          rolls={'all': Rollout(WithLatents(plans.Uniform(loops)))},
          terms={'tokens': Weighted(1.0, NELBO(roll='all')), 'latents': Weighted(1.0, LatentError(roll='all'))},
          prepare=Joint(masking=Masking(mask=vocab), encoder=encoder, process=noise, source=source, times=times,
                        weights=weights, drop=given['drop'])),
      train=size.train, optim=size.optim,
      evals=Depths(budgets=(loops,)))
