"""Timestep encoding: one layer, many loops, modulated by the loop's index (Xu and Sato, ICML 2025, 2410.01405).

    python -m experiments.main --config=experiments/configs/timestep.py:cpu,kind=tmlt --workdir=runs/ed

Argument: size, then any of

    size    cpu      edit distance of strings of 6 letters, width 64, 6 loops: a minute or two
            ed60     the paper's ED-60: width 256, 100 loops
            lm       the paper's language model: width 768, 24 loops, on our text
    kind    lt       the plain loop, properly pre-normed
            tmlt     gates and scales from a sinusoidal code of the loop's index
            table    gates and scales learned for every loop by themselves (the control that the paper lacks)
    loops   r

The released `lt` takes its values from another input than its queries, without a norm (sheet, section 7); ours does
not. Positions are learned, not sinusoidal; weight decay, clipping and the schedule are the same at all sizes, where the
paper's differ.
Measured figures: experiments/reports/timestep/.
"""
import dataclasses

from loopformer import loop, plans
from loopformer.blocks import MLP, Block, RMSNorm, SelfAttention, Stack, UnitNorm
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.condition import LoopIndex, Modulation, StepNumber, Table
from loopformer.config import Experiment, arguments, choose
from loopformer.embed import TiedHead, TokenEmbed
from loopformer.evaluate import Depths
from loopformer.model import Looped
from loopformer.objective import Objective, Roll, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.edit_distance import EditDistance
from loopformer.tasks.generated import Generated
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.tokenizer import TrainedPieces
from loopformer.train import Train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Dimensions, task and training of a size."""
  width: int
  heads: int
  loops: int
  vocab: int
  task: Text | Generated
  train: Train
  schedule: WarmupCosine
  dtype: str = 'float32'


SHORT, LONG = EditDistance(letters=6, using=2), EditDistance(letters=60, using=24)
SIZES = {
    'cpu': Size(width=64, heads=4, loops=6, vocab=len(SHORT.symbols), task=Generated(of=SHORT, pool=40_000),
                train=Train(steps=1500, batch=64, log_every=50, eval_every=500, eval_batches=16, save_every=500),
                schedule=WarmupCosine(peak=2e-3, end=0.0, warmup=100)),
    'ed60': Size(width=256, heads=4, loops=100, vocab=len(LONG.symbols), task=Generated(of=LONG, pool=1_000_000),
                 train=Train(steps=100_000, batch=128, log_every=100, eval_every=5000, save_every=5000),
                 schedule=WarmupCosine(peak=1e-4, end=0.0, warmup=5000), dtype='bfloat16'),
    'lm': Size(width=768, heads=12, loops=24, vocab=50_304,
               task=Text(tokenizer=TrainedPieces(vocab=50_257), length=1024),
               train=Train(steps=100_000, batch=48, log_every=100, eval_every=1000, save_every=1000),
               schedule=WarmupCosine(peak=2e-4, end=6e-5, warmup=2000), dtype='bfloat16'),
}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,kind=lt,loops=12`."""
  given = arguments(argument, size='cpu', kind='tmlt', loops=0)
  size = choose('size', given['size'], SIZES)
  loops, width = given['loops'] or size.loops, size.width
  kind = given['kind']
  block = Block(attn=SelfAttention(heads=size.heads, out_std=0.02 / 24 ** 0.5),
                mlp=MLP(hidden=4 * width, out_std=0.02 / 24 ** 0.5),
                norm=RMSNorm() if kind == 'lt' else UnitNorm(), dtype=size.dtype)
  core = Stack(block, 1)
  cell = choose('kind', kind, {
      'lt': Plain(core), 'tmlt': Timed(core, LoopIndex(width), Modulation(1)),
      'table': Timed(core, StepNumber(width), Table(layers=1, loops=loops, width=width))})
  return Experiment(
      name=f'{kind} r={loops}',
      model=Looped(read_in=TokenEmbed(vocab=size.vocab, width=width, length=size.task.length), cell=cell,
                   read_out=TiedHead(), loops=loops, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Roll(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=size.task, train=size.train, optim=AdamW(schedule=size.schedule, decay=0.01),
      evals=Depths(budgets=tuple(sorted({1, max(1, loops // 2), loops}))))
