"""Ouro: looped language models that learn when to leave (Zhu et al., arXiv 2510.25741).

    python -m experiments.main --config=experiments/configs/ouro.py:pointers --workdir=runs/pointers

Every loop ends with the final norm and gives an answer and a probability of leaving; the loss is the expected
cross-entropy over the exit step, less beta times the entropy of that step.

Argument: size, then any of

    size     tiny       text, width 128, four loops of two layers: minutes on two CPU cores
             pointers   jumps along pointers, four loops of one layer: minutes on two CPU cores
             mano       arithmetic modulo 23 in prefix notation, six loops of two layers: one GPU, minutes
             multi_hop  three-hop questions, four loops of six layers: one GPU
             1.4b, 2.6b as published (their stage 1b: sequences of 4096, 8M tokens a step, 3T tokens)
    layers, loops       the size's own by default; 12 layers in one loop is `layers=12,loops=1`
    gate     joint      stage I: model and gate are trained together
             literal    stage II: the gate alone, from a model of stage I, by the gain of the step just taken
             prospective  the same by the gain of the step that would follow (see loopformer/terms/expected.py)
    beta     of the entropy; 0.05, in the paper 0.1 before

`experiments/studies/ouro_stages.py` runs both stages and measures exits. Measured figures: experiments/reports/ouro/.

Departures: of the published sizes one stage of five is here, on our text; the paper's learning rate is constant in it,
as here, but its warm-up is not known. The gate starts at zero, where the paper does not say. Mano has the width and the
batch of an ablation for one GPU instead of width 1024. Multi-hop questions and facts are packed in rows of 128 tokens.
"""
import dataclasses

from loopformer import loop, plans
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.blocks import Block, PeriNorm
from loopformer.nn.embed import Head, Tokens, Vectors
from loopformer.nn.kernels import Fused
from loopformer.nn.layers import GatedMLP, Identity, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.papers.ouro.terms import Improvement, Prospective, Retrospective
from loopformer.tasks import mano, multi_hop
from loopformer.tasks.generated import Generated
from loopformer.tasks.pointers import Pointers
from loopformer.tasks.text import Text
from loopformer.terms.expected import Expected
from loopformer.training.frozen import Freeze
from loopformer.training.train import Train
from loopformer.types import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of the loop; outputs: rows of the head; gate: how the second stage is trained."""
  layers: int
  loops: int
  width: int
  heads: int
  hidden: int
  outputs: int
  read_in: Tokens | Vectors
  task: Text | Generated
  train: Train
  optim: AdamW
  gate: Train
  position: Rotary | None = Rotary()
  kernel: Fused | Bidirectional = Fused()
  dtype: str = 'float32'
  remat: loop.PerStep | loop.PerLayer = loop.PerStep()


def adam(peak: float, warmup: int, end: float = 0.1, **options) -> AdamW:
  """Warm-up and cosine to a share `end` of the peak."""
  return AdamW(schedule=WarmupCosine(peak=peak, end=end * peak, warmup=warmup), **{'decay': 0.1, **options})


def published(layers: int) -> Size:
  """Stage 1b of the published models."""
  vocab, width = 49_152, 2048
  run = Train(steps=375_000, batch=2048, accumulate=32, log_every=100, eval_every=1000, save_every=1000)
  return Size(layers=layers, loops=4, width=width, heads=16, hidden=5632, outputs=vocab,
              read_in=Tokens(vocab=vocab, width=width, length=4096),
              task=Text(tokenizer=TrainedPieces(vocab=vocab), length=4096), train=run,
              optim=AdamW(schedule=WSD(peak=3e-4, end=3e-4, warmup=2000), decay=0.1),
              gate=dataclasses.replace(run, steps=10_000), kernel=Fused(size=128), dtype='bfloat16')


POINTERS = Pointers(places=8, hops=4)
MANO = mano.Mano(longest=10, length=256)
WORLD = multi_hop.MultiHop()
SIZES = {
    'tiny': Size(layers=2, loops=4, width=128, heads=2, hidden=384, outputs=1024,
                 read_in=Tokens(vocab=1024, width=128, length=128),
                 task=Text(tokenizer=TrainedPieces(vocab=1024), length=128), train=Train(steps=1000, batch=8),
                 optim=adam(3e-3, 100), gate=Train(steps=200, batch=8), remat=loop.PerLayer()),
    'pointers': Size(layers=1, loops=4, width=64, heads=2, hidden=128, outputs=POINTERS.places,
                     read_in=Vectors(inputs=POINTERS.places + POINTERS.hops, width=64, length=POINTERS.places, std=0.1),
                     task=Generated(of=POINTERS),
                     train=Train(steps=2500, batch=64, log_every=50, eval_every=500, eval_batches=16, save_every=500),
                     optim=adam(2e-3, 100), gate=Train(steps=500, batch=256, log_every=50, save_every=500),
                     position=None, kernel=Bidirectional()),
    'mano': Size(layers=2, loops=6, width=256, heads=8, hidden=1024, outputs=len(MANO.symbols),
                 read_in=Tokens(vocab=len(MANO.symbols), width=256, length=MANO.length),
                 task=Generated(of=MANO, tests={'longest': dataclasses.replace(MANO, shortest=MANO.longest,
                                                                               labels=mano.Answer())}),
                 train=Train(steps=6000, batch=256, log_every=100, eval_every=1000, save_every=1000),
                 optim=adam(5e-4, 1000, b2=0.98, eps=1e-6), gate=Train(steps=500, batch=256, save_every=500),
                 dtype='bfloat16'),
    'multi_hop': Size(layers=6, loops=4, width=1024, heads=16, hidden=4096, outputs=len(WORLD.symbols),
                      read_in=Tokens(vocab=len(WORLD.symbols), width=1024, length=WORLD.length),
                      task=Generated(of=WORLD, tests={'unseen': dataclasses.replace(WORLD,
                                                                                    split=multi_hop.HeldOut())}),
                      train=Train(steps=20_000, batch=128, log_every=100, eval_every=1000, save_every=1000),
                      optim=adam(5e-4, 1000), gate=Train(steps=500, batch=128, save_every=500), dtype='bfloat16'),
    '1.4b': published(24),
    '2.6b': published(48),
}
GATES = {'joint': None, 'literal': Retrospective(), 'prospective': Prospective()}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `pointers` or `mano,layers=12,loops=1`."""
  given = arguments(argument, size='tiny', layers=int, loops=int, gate='joint', beta=0.05)
  size, alignment = choose('size', given['size'], SIZES), choose('gate', given['gate'], GATES)
  layers, loops = (counted(given, name, getattr(size, name)) for name in ('layers', 'loops'))
  if alignment is not None and loops < 2:
    raise ConfigError(f'config argument gate = {given["gate"]}: with loops = {loops} there is nothing to learn about '
                      'leaving; give 2 loops or more')
  block = Block(attn=SelfAttention(heads=size.heads, position=size.position, kernel=size.kernel),
                mlp=GatedMLP(hidden=size.hidden), norm=RMSNorm(1e-6), placement=PeriNorm(), dtype=size.dtype)
  if alignment is None:
    terms = {'lm': Weighted(1.0, Expected(roll='all', beta=given['beta']))}
    run, optim = size.train, size.optim
  else:
    terms = {'gate': Weighted(1.0, Improvement(roll='all', alignment=alignment))}
    run = size.gate
    optim = Freeze(of=AdamW(schedule=WSD(peak=1e-2, end=1e-2), decay=0.0), paths=('cell/gate',))
  return Experiment(
      name='ouro' + ('' if alignment is None else f' gate {given["gate"]}'),
      model=Looped(read_in=size.read_in, cell=Halting(Normed(Stack(block, layers), RMSNorm(1e-6))),
                   read_out=Head(outputs=size.outputs, norm=Identity()), loops=loops, remat=size.remat),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops), keep=loop.Every())}, terms=terms),
      task=size.task, train=run, optim=optim,
      evals=Depths(budgets=tuple(b for b in (1, 2, 3, 4, 6, 8, 12) if b <= 2 * loops) if loops > 1 else (1,)))
