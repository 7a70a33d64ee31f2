"""Parcae: stable looped language models (Prairie et al., 2604.12946), with the injections that it is compared with.

    python -m experiments.main --config=experiments/configs/parcae.py:cpu,inject=diagonal --workdir=runs/parcae

Argument: size, then any of

    size     cpu                       the sheet's comparison of injections, on dense 2-hop induction: a minute
             140m, 370m, 770m, 1300m   as published, on text: the paper's Transformer setup
             100m, 350m                its second setup, in which it is compared with recurrent depth models
    kind     parcae
             transformer               the same layers once, without injection (140m to 1300m)
             rdm                       the recurrent depth model: sandwich norms, concat (100m, 350m)
    inject   diagonal, concat, add; the kind's own by default
    each     1: a depth for every sequence (the paper's); 0: one for every microbatch
    norm     1: a norm after the prelude; 0: none; -1: 1, but 0 at 100m and 350m, as their numbers of parameters tell
    rate     peak learning rate; 0: the size's own
    ramp     steps over which the mean depth grows from 1, a curriculum of the code's; 0: none, as published
    curve    sqrt (1 - sqrt(1 - share)), linear

Departures at the published sizes: our text instead of FineWeb-Edu (Huginn's data); orthogonal matrices
are not cut ("truncated orthogonal" in the code); Muon's momentum is corrected for its start. `ramp` is of the number of all steps,
and where its mean is below those with gradient, of these; the code's is of one or the other. At 100m and 350m heads of
128 channels, the scale of embedding and start (Huginn's), batch and length (the other setup's), the number of steps and
weight decay (Huginn's) are ours: the paper names none. `cpu` has output projections at a fifth of the scale instead of
zero, as on the sheet. Measured figures: experiments/reports/parcae/.
"""
import dataclasses
import math

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.data.tokenizer import TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, ValueEmbed
from loopformer.nn.blocks import Block, Chain, PreNorm, SandwichNorm
from loopformer.nn.embed import Head, TiedHead, Tokens, TwiceNormedHead
from loopformer.nn.inject import Add, Concat, Diagonal
from loopformer.nn.layers import (MLP, ByProjection, GatedMLP, Linear, Normal, Orthogonal, RMSNorm, UnitNorm, gelu,
                                   squared_relu)
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, AtanAdam, Muon, WSD
from loopformer.starts import Noise
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError

VOCAB, LENGTH, MEAN, GRADED = 32_768, 2048, 8, 4
# Layers of prelude, core and coda each; width; learning rate; steps of 256 x 2048 tokens.
SIZES = {'140m': (2, 768, 8e-3, 21_400), '370m': (4, 1024, 8e-3, 56_500), '770m': (6, 1280, 6e-3, 117_500),
         '1300m': (8, 1536, 6e-3, 198_400)}
INJECT = {'diagonal': Diagonal(), 'concat': Concat(), 'add': Add()}
CURVES = {'sqrt': plans.one_minus_sqrt, 'linear': plans.linear}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Second:
  """A size of the second setup. core: layers of the core, between one and one; mean, graded: loops."""
  core: int
  width: int
  hidden: int
  mean: float
  graded: int
  rate: float
  steps: int


SECOND = {'100m': Second(core=1, width=1024, hidden=3520, mean=16, graded=8, rate=4e-4, steps=21_400),
          '350m': Second(core=2, width=2048, hidden=7040, mean=8, graded=4, rate=2e-4, steps=56_500)}
SECOND_VOCAB = 65_536


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,inject=concat,rate=1e-2`."""
  given = arguments(argument, size='cpu', inject='', each=True, norm=-1, rate=0.0, kind='parcae', ramp=0, curve='sqrt')
  size, kind = given['size'], given['kind']
  make = choose('size', size, {'cpu': small, **dict.fromkeys(SIZES, published), **dict.fromkeys(SECOND, second)})
  choose('kind', kind, dict.fromkeys(('parcae', 'transformer', 'rdm')))
  if kind == 'transformer' and size not in SIZES or kind == 'rdm' and size not in SECOND:
    sizes = SIZES if kind == 'transformer' else SECOND
    raise ConfigError(f'config argument kind = {kind}: not at size {size}; give one of {", ".join(sizes)}')
  inject = given['inject'] or ('concat' if kind == 'rdm' else 'diagonal')
  choose('inject', inject, INJECT)
  choose('curve', given['curve'], CURVES)
  norm = choose('norm', given['norm'], {-1: size not in SECOND, 0: False, 1: True})
  return make({**given, 'inject': inject, 'norm': norm})


def objective(mean: float, graded: int, given: dict) -> Objective:
  """Cross-entropy after a Poisson number of loops, the last few of them differentiated (section 3)."""
  depth = plans.Poisson(average=mean)
  if given['ramp']:
    depth = plans.Ramp(of=depth, steps=given['ramp'], curve=CURVES[given['curve']])
  over = plans.PerSequence() if given['each'] else plans.Shared()
  plan = plans.Truncated(depth=depth, graded=graded, over=over)
  return Objective(rolls={'drawn': Rollout(plan)}, terms={'lm': Weighted(1.0, CE(roll='drawn'))})


def small(given: dict) -> Experiment:
  """Three layers of width 48 on dense 2-hop induction (the sheet's measured block)."""
  width, std = 48, 1 / math.sqrt(48)
  block = Block(attn=SelfAttention(heads=4, std=std, out_std=0.2 * std, position=Rotary()),
                mlp=MLP(hidden=4 * width, std=std, out_std=0.2 * std / 2, activation=gelu), norm=RMSNorm(1e-5))
  task = Generated(of=PHop(hops=2, length=24), pool=8192)
  vocab = len(task.of.symbols)
  inject = Concat(std=1 / math.sqrt(2 * width)) if given['inject'] == 'concat' else INJECT[given['inject']]
  return Experiment(
      name=f'parcae {given["inject"]}',
      model=Looped(read_in=Tokens(vocab=vocab, width=width, length=task.length, std=std),
                   cell=Recur(Stack(block, 1), inject), read_out=Head(outputs=vocab, std=std), loops=MEAN // 2,
                   prelude=Stack(block, 1, norm=RMSNorm(1e-5) if given['norm'] else None), coda=Stack(block, 1),
                   start=Noise(std=math.sqrt(2 / (5 * width))), remat=loop.PerLayer()),
      objective=objective(4, 2, given),
      task=task,
      train=Train(steps=400, batch=32, log_every=20, eval_every=100, eval_batches=16, save_every=400),
      optim=AdamW(schedule=WSD(peak=given['rate'] or 3e-3, warmup=0, cooldown=1.0), decay=0.0),
      evals=Depths(budgets=(1, 2, 4, 8, 16, 64)))


def published(given: dict) -> Experiment:
  """The nanochat-like layers of the paper's Transformer setup (section 2)."""
  layers, width, rate, steps = SIZES[given['size']]
  parcae, std, heads = given['kind'] == 'parcae', math.sqrt(2 / (5 * width)), width // 128
  orthogonal = Orthogonal(std)
  read_in = Tokens(vocab=VOCAB, width=width, length=LENGTH, std=std, init=orthogonal)

  def block(valued: bool) -> Block:
    attn = SelfAttention(heads=heads, init=ByProjection(orthogonal, heads, heads), out_init=Normal(0.0),
                         position=Rotary(base=50_000.0), norm_qk=UnitNorm(),
                         values=ValueEmbed(vocab=VOCAB) if valued else None)
    mlp = MLP(hidden=4 * width, init=orthogonal, out_init=Normal(0.0), activation=squared_relu)
    return Block(attn=attn, mlp=mlp, norm=RMSNorm(1e-5), dtype='bfloat16')

  # Layer i of all N has value embeddings where i and N - 1 are both even or both odd: here N is even, and so every odd.
  pair = Chain((block(False), block(True)))
  third = Stack(pair, layers // 2)
  if parcae:
    model = Looped(read_in=read_in,
                   cell=Recur(third, INJECT[given['inject']]), read_out=TiedHead(RMSNorm(1e-5)), loops=MEAN,
                   prelude=Stack(pair, layers // 2, norm=RMSNorm(1e-5) if given['norm'] else None), coda=third,
                   start=Noise(std=std), bridge=Linear(width, init=orthogonal))
  else:
    model = Looped(read_in=read_in,
                   cell=Plain(Stack(pair, 3 * layers // 2)), read_out=TiedHead(RMSNorm(1e-5)), loops=1)
  schedule = WSD(peak=given['rate'] or rate, warmup=0, cooldown=0.5)
  once = Objective(rolls={'all': Rollout(plans.Uniform(1))}, terms={'lm': Weighted(1.0, CE(roll='all'))})
  return Experiment(
      name=f'{given["kind"]} {given["size"]}',
      model=model,
      objective=objective(MEAN, GRADED, given) if parcae else once,
      task=Text(tokenizer=TrainedPieces(vocab=VOCAB), length=LENGTH),
      train=Train(steps=steps, batch=256, accumulate=8, log_every=100, eval_every=1000, save_every=1000),
      optim=Muon(schedule=schedule, heads=heads, matrices=('attn', 'mlp', 'gate'),  # of values: a matrix like others
                 others=AdamW(schedule=schedule, b1=0.8, b2=0.95, eps=1e-10, decay=0.0)),
      evals=Depths(budgets=(1, 4, 8, 16) if parcae else (1,)))


def second(given: dict) -> Experiment:
  """The layers and the training of recurrent depth models (Huginn), pre-normed for Parcae (the paper's RDM setup)."""
  size = SECOND[given['size']]
  width, std, rdm = size.width, math.sqrt(2 / (5 * size.width)), given['kind'] == 'rdm'
  block = Block(attn=SelfAttention(heads=width // 128, std=std, out_std=std, position=Rotary(base=50_000.0)),
                mlp=GatedMLP(hidden=size.hidden, std=std, out_std=std), norm=RMSNorm(1e-5), dtype='bfloat16',
                placement=SandwichNorm() if rdm else PreNorm())
  inject = Concat(std=std) if given['inject'] == 'concat' else INJECT[given['inject']]
  head = TwiceNormedHead if rdm else TiedHead
  return Experiment(
      name=f'{given["kind"]} {given["size"]}',
      model=Looped(read_in=Tokens(vocab=SECOND_VOCAB, width=width, length=LENGTH, std=std, scale=math.sqrt(width)),
                   cell=Recur(Stack(block, size.core), inject), read_out=head(RMSNorm(1e-5)), loops=int(size.mean),
                   prelude=Stack(block, 1, norm=RMSNorm(1e-5) if given['norm'] else None), coda=Stack(block, 1),
                   start=Noise(std=math.sqrt(2 / 5))),
      objective=objective(size.mean, size.graded, given),
      task=Text(tokenizer=TrainedPieces(vocab=SECOND_VOCAB), length=LENGTH),
      train=Train(steps=size.steps, batch=256, accumulate=8, log_every=100, eval_every=1000, save_every=1000),
      optim=AtanAdam(schedule=WSD(peak=given['rate'] or size.rate, warmup=4096, cooldown=4096)),
      evals=Depths(budgets=(1, 4, 8, 16)))
