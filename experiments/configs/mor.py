"""Mixture-of-Recursions: a router decides which tokens recur (Bae et al., NeurIPS 2025, arXiv 2507.10524).

    python -m experiments.main --config=experiments/configs/mor.py:tiny --workdir=runs/mor

Argument: size, then any of

    size     tiny       bytes, 1 + 1x3 + 1 layers of width 64: minutes on two CPU cores
             135m, 360m, 730m, 1.7b  as published: base of so many parameters, sequences of 2048, 2.1M tokens a step
    kind     mor        expert choice: every recursion has a router, which takes a share of the tokens
             token      token choice: one router tells every token its number of recursions
             random     the control of expert choice: as many tokens, whichever
             recursive  all tokens take all recursions; vanilla: no parameter is shared
    recursions, layers  3, and the size's own: those of the vanilla net; a recursive one may have a few more
    sharing  middle_cycle, cycle; of the recursive kind also sequence, middle_sequence
    memory   recursion  each recursion has keys of its own; shared: those of the first (recursive sharing)
             compact    as recursion, in a cache with places for 1.25 times the capacities
    router   linear, mlp; alpha: of the gate; gate=open: it chooses, and the state moves as in a plain loop (a control)
    c        weight of the router's loss; 0.016 is what the released 0.001 amounts to with its 16 microbatches
    z        weight of the router's z-loss, 0.001 in the paper's ablation
    auxiliary 1: another router answers, from which the model learns nothing
    balance  of token choice: loss (c = 0.1), free (a bias, moved by load), none; form: code, paper
    steps    the size's own by default

Answers choose causally, by the scores of the router, where the released code goes on with the top k of a sequence. An
evaluation reports both, `as trained` the latter. Measured figures: experiments/reports/mor/.

Departures: our text, one document after the other; the auxiliary router shares its optimiser with the model, but no
gradient; at `tiny`, initialisers of 1 / sqrt(width).
"""
import dataclasses
import math

from loopformer import loop, memories, plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import Bytes, TrainedPieces
from loopformer.inference.evaluate import Depths, Named, Run
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import TiedHead, Tokens
from loopformer.nn.kernels import Fused
from loopformer.nn.layers import GatedMLP, Normal, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack, repeated
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.papers.mor.cell import (AtExit, Auxiliary, Chance, EveryStep, ExpertChoice, LinearScore, MLPScore,
                                        Moved, Open, Routed, Sigmoid, TokenChoice)
from loopformer.papers.mor.memory import Compact
from loopformer.papers.mor.routing import AsTrained, LossFree
from loopformer.papers.mor.terms import Balance, LoadBias, RouterBCE, SquaredLogSum, SquaredScore
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of the vanilla net."""
  layers: int
  width: int
  heads: int
  groups: int
  hidden: int
  vocab: int
  task: Text
  train: Train
  schedule: WarmupCosine | WSD
  std: float = 0.02
  dtype: str = 'bfloat16'
  block: int = 128


def published(layers: int, width: int, heads: int, groups: int, hidden: int) -> Size:
  """A SmolLM shape, and the run of 16.5e18 FLOPs."""
  vocab = 49_152
  return Size(layers=layers, width=width, heads=heads, groups=groups, hidden=hidden, vocab=vocab,
              task=Text(tokenizer=TrainedPieces(vocab=vocab), length=2048),
              train=Train(steps=14_161, batch=1024, accumulate=64, log_every=100, eval_every=1000, save_every=1000),
              schedule=WSD(peak=3e-3, warmup=86, cooldown=2832))


SIZES = {
    'tiny': Size(layers=5, width=64, heads=2, groups=2, hidden=176, vocab=257,
                 task=Text(tokenizer=Bytes(), length=128),
                 train=Train(steps=400, batch=16, log_every=20, eval_every=200, eval_batches=32, save_every=200),
                 schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=60), std=0.125, dtype='float32', block=32),
    '135m': published(30, 576, 9, 3, 1536),
    '360m': published(32, 960, 15, 5, 2560),
    '730m': published(26, 1536, 24, 8, 4096),
    '1.7b': published(24, 2048, 32, 32, 8192),
}
KINDS = ('mor', 'token', 'random', 'recursive', 'vanilla')
SHARING = ('middle_cycle', 'cycle', 'sequence', 'middle_sequence')
MEMORIES = ('recursion', 'shared', 'compact')


def layer_map(sharing: str, layers: int, recursions: int) -> tuple[int, ...]:
  """Which of its parameter sets each of `layers` effective layers has (section 2).

  Raises:
    ConfigError: a scheme that does not exist, or layers that do not divide into recursions.
  """
  choose('sharing', sharing, dict.fromkeys(SHARING))
  ends = 2 if sharing.startswith('middle') else 0
  inner = layers - ends
  if inner < recursions or inner % recursions:
    raise ConfigError(f'layers = {layers}: {inner} of them are shared with sharing = {sharing}, which do not divide '
                      f'into {recursions} recursions; choose a multiple of these' + (', and 2' if ends else ''))
  each = inner // recursions
  shared = [layer % each if sharing.endswith('cycle') else layer // recursions for layer in range(inner)]
  return tuple([0, *(1 + layer for layer in shared), each + 1] if ends else shared)


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `tiny,kind=token`."""
  given = arguments(argument, size='tiny', kind='mor', recursions=3, layers=int, sharing='middle_cycle',
                    memory='recursion', router='linear', alpha=0.1, c=0.016, auxiliary=False, balance='loss', form='code',
                    gate='sigmoid', z=0.0, steps=int)
  size, kind, sharing = choose('size', given['size'], SIZES), given['kind'], given['sharing']
  choose('kind', kind, dict.fromkeys(KINDS))
  layers = counted(given, 'layers', size.layers)
  recursions = 1 if kind == 'vanilla' else counted(given, 'recursions', 3)
  ends = 2 if sharing.startswith('middle') else 0
  each = math.ceil((layers - ends) / recursions)  # the paper adds layers where they do not divide
  layer_map(sharing, each * recursions + ends, recursions)
  sequence = sharing.endswith('sequence')
  if sequence and kind not in ('recursive', 'vanilla'):
    raise ConfigError(f'config argument sharing = {sharing}: a router decides between passes through the whole shared '
                      'block, which a sequence does not have; use cycle or middle_cycle')
  if kind in ('recursive', 'vanilla') and given['memory'] != 'recursion':
    raise ConfigError(f'config argument memory = {given["memory"]}: without a router each loop has keys of its own; '
                      'leave it out')
  if kind != 'mor' and given['auxiliary']:
    raise ConfigError('config argument auxiliary = 1: another router is for kind=mor; leave it out')
  out_std = size.std / math.sqrt(2 * layers) if given['size'] == 'tiny' else size.std
  block = Block(attn=SelfAttention(heads=size.heads, groups=size.groups, std=size.std, out_std=out_std,
                                   position=Rotary(), kernel=Fused(size=size.block)),
                mlp=GatedMLP(hidden=size.hidden, std=size.std, out_std=out_std), norm=RMSNorm(1e-5), dtype=size.dtype)
  end = Stack(block, 1) if ends else None
  core = Stack(block, each, order=repeated((recursions,) * each) if sequence and recursions > 1 else None)
  loops = 1 if sequence else recursions
  train = dataclasses.replace(size.train, steps=counted(given, 'steps', size.train.steps))
  terms, optim = {'lm': Weighted(1.0, CE(roll='all'))}, AdamW(schedule=size.schedule, decay=0.1)
  cell, evals = Plain(core), Depths(budgets=tuple(range(1, loops + 1)))
  if kind not in ('recursive', 'vanilla'):
    cell = Routed(core, router(kind, given))
    terms |= losses(kind, given)
    if kind != 'token':  # whose training chooses as its answers do
      evals = Named(budgets=evals.budgets, runs={'as trained': Run(plan=plans.Uniform(loops), exit=AsTrained())})
    elif given['balance'] == 'free':
      optim = LossFree(of=optim)
  return Experiment(
      name=f'{kind} {recursions}',
      model=Looped(read_in=Tokens(vocab=size.vocab, width=size.width, length=size.task.length, std=size.std), cell=cell,
                   read_out=TiedHead(RMSNorm(1e-5)), loops=loops, prelude=end, coda=end, memory=memory(given),
                   remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms=terms),
      task=size.task, train=train, optim=optim, evals=evals)


def capacities(recursions: int) -> tuple[float, ...]:
  """(N - r + 1) / N of recursions r = 1 .. N."""
  return tuple((recursions - r) / recursions for r in range(recursions))


def router(kind: str, given: dict) -> ExpertChoice | TokenChoice:
  """The router of a kind."""
  score = choose('router', given['router'], {'linear': LinearScore(), 'mlp': MLPScore()})
  if kind == 'token':
    return TokenChoice(recursions=given['recursions'], score=score,
                       combine=choose('form', given['form'], {'code': AtExit(), 'paper': EveryStep()}),
                       bias=Normal(0.0) if given['balance'] == 'free' else None)
  parts = {'train': Chance(), 'answer': Chance()} if kind == 'random' else {}
  parts |= choose('gate', given['gate'], {'sigmoid': {'gate': Sigmoid(alpha=given['alpha'])},
                                          'open': {'gate': Open(), 'combine': Moved()}})
  if given['auxiliary']:
    parts |= {'auxiliary': score, 'answer': Auxiliary()}
  return ExpertChoice(capacities=capacities(given['recursions']), score=score, **parts)


def losses(kind: str, given: dict) -> dict[str, Weighted]:
  """What a router learns besides."""
  if kind == 'random':
    return {}
  z = {'z': Weighted(given['z'], (SquaredLogSum if kind == 'token' else SquaredScore)(roll='all'))} if given['z'] else {}
  if kind == 'token':
    return z | choose('balance', given['balance'], {'loss': {'balance': Weighted(0.1, Balance(roll='all'))},
                                                'free': {'load': Weighted(1.0, LoadBias(roll='all'))}, 'none': {}})
  term = RouterBCE(roll='all', of='auxiliary' if given['auxiliary'] else 'score')
  return {'router': Weighted(given['c'], term), **z}


def memory(given: dict):
  """What recursions keep of keys and values."""
  choose('memory', given['memory'], dict.fromkeys(MEMORIES))
  share = tuple(min(1.0, 1.25 * c) for c in capacities(given['recursions']))
  return {'recursion': memories.PerLoop(), 'shared': memories.First(), 'compact': Compact(share=share)}[given['memory']]
