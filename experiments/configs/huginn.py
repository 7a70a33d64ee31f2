"""Huginn: recurrent depth with latent reasoning (Geiping et al., 2502.05171), and retrofitted recurrence (2511.07384).

    python -m experiments.main --config=experiments/configs/huginn.py:cpu --workdir=runs/huginn

Argument: size, then any of

    size     cpu      the sheet's measured experiment: dense 3-hop induction, width 48, a few minutes
             small    the paper's ablation size (150M), on text
             paper    Huginn-0125, 3.5B parameters
    depth    random   log-normal Poisson; fixed: always the mean
    ramp     steps over which the mean depth grows (1 - sqrt), as in retrofitted recurrence; 0: none

Departures: our text, and a smaller vocabulary at `small`; initialisers are not truncated. The norm n_c is
applied as in the released code: after the last loop and before the head, one set of parameters. Every microbatch draws
a depth, the same on all devices, as in the paper; into how many its step of 4096 sequences was cut we do not know, so the
number of depths a step, `train.accumulate`, is ours.
Measured figures: experiments/reports/huginn/.
"""
import dataclasses
import math

from loopformer import loop, plans
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.data.tokenizer import TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, SandwichNorm
from loopformer.nn.embed import Tokens, TwiceNormedHead
from loopformer.nn.inject import Concat
from loopformer.nn.layers import GatedMLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, AtanAdam, WSD, WarmupCosine
from loopformer.starts import Noise
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of prelude, core, coda; mean: r bar; graded: k."""
  layers: tuple[int, int, int]
  width: int
  heads: int
  hidden: int
  vocab: int
  mean: float
  graded: int
  task: Text | Generated
  train: Train
  optim: AdamW | AtanAdam
  dtype: str = 'bfloat16'


HOP = Generated(of=PHop(hops=3, length=24), pool=32_768)
SIZES = {
    'cpu': Size(layers=(1, 1, 1), width=48, heads=4, hidden=144, vocab=len(HOP.of.symbols), mean=4, graded=3, task=HOP,
                train=Train(steps=2500, batch=64, log_every=50, eval_every=500, eval_batches=16, save_every=500),
                optim=AdamW(schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=100), decay=0.0), dtype='float32'),
    'small': Size(layers=(1, 4, 1), width=1024, heads=32, hidden=3520, vocab=32_768, mean=20, graded=4,
                  task=Text(tokenizer=TrainedPieces(vocab=32_768), length=1024),
                  train=Train(steps=20_000, batch=64, log_every=50, eval_every=1000, save_every=1000),
                  optim=AtanAdam(schedule=WSD(peak=4e-4, warmup=1000, cooldown=0.0))),
    'paper': Size(layers=(2, 4, 2), width=5280, heads=55, hidden=17_920, vocab=65_536, mean=32, graded=8,
                  task=Text(tokenizer=TrainedPieces(vocab=65_536), length=4096),
                  train=Train(steps=47_000, batch=4096, accumulate=8, log_every=100, eval_every=1000, save_every=1000),
                  optim=AtanAdam(schedule=WSD(peak=4e-5, warmup=4096, cooldown=0.0))),
}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,depth=fixed`."""
  given = arguments(argument, size='cpu', depth='random', ramp=0)
  size = choose('size', given['size'], SIZES)
  depth = choose('depth', given['depth'], {'random': plans.LogNormalPoisson(average=size.mean),
                                           'fixed': plans.Constant(loops=int(size.mean))})
  if given['ramp']:
    depth = plans.Ramp(of=depth, steps=given['ramp'], curve=plans.one_minus_sqrt)
  std = math.sqrt(2 / (5 * size.width))
  prelude, core, coda = size.layers
  out_std = math.sqrt(1 / (5 * size.width * (prelude + size.mean * core + coda)))
  block = Block(
      attn=SelfAttention(heads=size.heads, std=std, out_std=out_std, position=Rotary(base=50_000.0), biased=('q', 'k')),
      mlp=GatedMLP(hidden=size.hidden, std=std, up_std=out_std, out_std=out_std),
      norm=RMSNorm(1e-6), placement=SandwichNorm(), dtype=size.dtype)
  return Experiment(
      name=f'huginn {given["depth"]}',
      model=Looped(
          read_in=Tokens(vocab=size.vocab, width=size.width, length=size.task.length, std=std,
                         scale=math.sqrt(size.width)),
          cell=Recur(Stack(block, core), Concat(std=std)), read_out=TwiceNormedHead(RMSNorm(1e-6)),
          loops=int(size.mean), prelude=Stack(block, prelude), coda=Stack(block, coda),
          start=Noise(std=math.sqrt(2 / 5)), remat=loop.PerStep()),
      objective=Objective(rolls={'drawn': Rollout(plans.Truncated(depth=depth, graded=size.graded))},
                          terms={'lm': Weighted(1.0, CE(roll='drawn'))}),
      task=size.task, train=size.train, optim=size.optim,
      evals=Depths(budgets=(1, 2, 3, 4, 6, 8, 16, 32) if given['size'] == 'cpu' else (1, 4, 8, 16, 32, 64)))
