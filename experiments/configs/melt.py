"""MELT: a looped model converted to one row of keys and values for all loops (Vendrell et al., arXiv 2605.07721).

    CONFIG=experiments/configs/melt.py
    python -m experiments.main --config=$CONFIG:cpu --workdir=runs/base
    python -m experiments.main --config=$CONFIG:cpu,phase=transition,base=runs/base --workdir=runs/blend
    python -m experiments.main --config=$CONFIG:cpu,phase=distill,base=runs/base,start=runs/blend --workdir=runs/melt

A model as Ouro's (configs/ouro.py) is trained, and then converted in two phases: rows of the loops' own are blended
into shared ones; and what attention gives is aligned. In both the answers of all loops are distilled from the first
model, which is frozen, and runs as it was trained: all loops over all tokens, without chunks.

Argument: size, then any of

    size    cpu    bytes, three loops of two layers of width 64: minutes on two CPU cores
            gpu    text, four loops of eight layers of width 512: one GPU
            1.4b   as published, from Ouro-1.4B: sequences of 10,000 tokens, chunks of 500
    phase   base, transition or distill
    base    of the last two: the work folder of the first model's run, which is their teacher; it is read
    start   of distill: the work folder whose last weights it starts from
    chunk   tokens that go together; the size's own by default; the sequence's length is the pass without chunks
    gate    elementwise; or scalar, mean (of loops), average (moving), last (loop), as in the paper's ablation

`experiments/studies/melt_stages.py` runs all phases, and decodes. Measured figures: experiments/reports/melt/.

Departures. The paper does not say: what a latent starts from (the first loop's input, so that one loop is the model as
it was); whether it takes the layer's input before or after its norm (after); how gates start (nearly open to the new
input); how the blend grows (linearly); which loss the transition has (distillation); the temperature (1); the optimiser
besides its learning rates (AdamW as Ouro's, warm-up 2 %). The published size takes our text, not reasoning traces.
"""
import dataclasses

from loopformer import loop, plans
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import Bytes, TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, PeriNorm
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.kernels import Fused
from loopformer.nn.layers import GatedMLP, Identity, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Own, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.papers.melt.attention import Constant, Elementwise, LatentAttention, Mean, Scalar
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.melt.plans import Transition
from loopformer.papers.melt.teacher import OwnWithAttention
from loopformer.papers.melt.terms import Aligned
from loopformer.tasks.text import Text
from loopformer.terms.distill import Distill
from loopformer.terms.expected import Expected
from loopformer.training.frozen import ParamGroups
from loopformer.training.train import Train
from loopformer.types import ConfigError

GATE = 'cell/core/block/attn/latent'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """vocab: rows of embedding and head; rates: peaks of the base weights and of the gates in both phases."""
  layers: int
  loops: int
  width: int
  heads: int
  hidden: int
  vocab: int
  task: Text
  chunk: int
  peak: float
  warmup: int
  rates: tuple[float, float]
  base: Train
  transition: Train
  distill: Train
  kernel: Fused = Fused()
  dtype: str = 'float32'
  remat: loop.PerStep | loop.KeepAll = loop.PerStep()


SIZES = {
    'cpu': Size(layers=2, loops=3, width=64, heads=2, hidden=176, vocab=257, task=Text(tokenizer=Bytes(), length=96),
                chunk=16, peak=3e-3, warmup=60, rates=(3e-4, 3e-3), base=Train(steps=600, batch=16),
                transition=Train(steps=100, batch=16, eval_every=50), distill=Train(steps=60, batch=16, eval_every=30),
                remat=loop.KeepAll()),
    'gpu': Size(layers=8, loops=4, width=512, heads=8, hidden=1408, vocab=8192,
                task=Text(tokenizer=TrainedPieces(vocab=8192), length=512), chunk=32, peak=1e-3, warmup=200,
                rates=(1e-4, 1e-3), base=Train(steps=3000, batch=32), transition=Train(steps=500, batch=32),
                distill=Train(steps=300, batch=32), dtype='bfloat16'),
    '1.4b': Size(layers=24, loops=4, width=2048, heads=16, hidden=5632, vocab=49_152,
                 task=Text(tokenizer=TrainedPieces(vocab=49_152), length=10_000), chunk=500, peak=3e-4, warmup=2000,
                 rates=(8e-6, 5e-4), base=Train(steps=375_000, batch=32, accumulate=32),
                 transition=Train(steps=500, batch=32, accumulate=32),
                 distill=Train(steps=300, batch=32, accumulate=32), kernel=Fused(size=128), dtype='bfloat16'),
}
GATES = {'elementwise': Elementwise(), 'scalar': Scalar(), 'mean': Mean(), 'average': Constant(0.2), 'last': Constant()}
PHASES = ('base', 'transition', 'distill')


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu` or `cpu,phase=transition,base=runs/melt/base`."""
  given = arguments(argument, size='cpu', phase='base', base='', start='', chunk=int, gate='elementwise')
  size, gate = choose('size', given['size'], SIZES), choose('gate', given['gate'], GATES)
  phase = choose('phase', given['phase'], {phase: phase for phase in PHASES})
  for name, phases in (('base', PHASES[1:]), ('start', PHASES[2:])):
    if (phase in phases) != bool(given[name]):
      raise ConfigError(f'config argument {name} = {given[name]!r}: phase = {phase} '
                        + ('needs the work folder of a run' if phase in phases else 'starts from no other run'))
  options = {'heads': size.heads, 'position': Rotary(), 'kernel': size.kernel}
  plan, evals = plans.Uniform(size.loops), Depths(budgets=tuple(range(1, size.loops + 1)))

  def model(cell, attn, **more):
    core = Stack(Block(attn=attn, mlp=GatedMLP(hidden=size.hidden), norm=RMSNorm(1e-6), placement=PeriNorm(),
                       dtype=size.dtype), size.layers)
    return Looped(read_in=Tokens(vocab=size.vocab, width=size.width, length=size.task.length),
                  cell=cell(core, RMSNorm(1e-6)), read_out=Head(outputs=size.vocab, norm=Identity()),
                  loops=size.loops, remat=size.remat, **more)

  if phase == 'base':
    peak = size.peak
    return Experiment(
        name='MELT base', model=model(lambda core, norm: Halting(Normed(core, norm)), SelfAttention(**options)),
        objective=Objective(rolls={'all': Rollout(plan, keep=loop.Every())},
                            terms={'lm': Weighted(1.0, Expected(roll='all'))}),
        task=size.task, train=size.base, evals=evals,
        optim=AdamW(schedule=WarmupCosine(peak=peak, end=0.1 * peak, warmup=size.warmup), decay=0.1))

  run = dataclasses.replace(getattr(size, phase), start=given['start'] or given['base'])
  terms = {'kd': Weighted(1.0, Distill(roll='all', teacher='teacher'))}
  if phase == 'transition':
    teacher = Rollout(plan, keep=loop.Every(), weights_of=Own(folder=given['base']))
    plan = Transition(of=plan, steps=run.steps)
  else:
    teacher = Rollout(plan, keep=loop.Every(), weights_of=OwnWithAttention(folder=given['base']))
    terms['aligned'] = Weighted(0.1, Aligned(roll='all', teacher='teacher'))
  base, gates = (AdamW(schedule=WSD(peak=peak, end=peak, warmup=0.02), decay=0.1) for peak in size.rates)
  learned = given['gate'] in ('elementwise', 'scalar')
  return Experiment(
      name=f'MELT {phase}',
      model=model(Gated, LatentAttention(**options, latent=gate),
                  memory=Latest(chunk=counted(given, 'chunk', size.chunk))),
      objective=Objective(rolls={'all': Rollout(plan, keep=loop.Every()), 'teacher': teacher}, terms=terms),
      task=size.task, train=run, evals=evals, optim=ParamGroups(of=base, named=gates,
                                                                paths=(GATE,)) if learned else base)
