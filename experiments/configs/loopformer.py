"""LoopFormer and its baselines (Jeddi, Ciccone, Taati, ICLR 2026, arXiv 2602.11451; sections are the paper's sheet's).

    python -m experiments.main --config=experiments/configs/loopformer.py:tiny --workdir=runs/tiny

Argument: size, then any of kind, ee, loops, dtype: `loopformer.py:small,kind=base_loop,ee=1`.

    kind       loopformer   random short trajectories with shortcut consistency
               base         not looped: as many layers as the loops apply (k times L)
               base_loop    the same block L times, without conditioning
               tmlt         conditioned on the integer index of the loop
    ee         1: early exit, for base_loop and tmlt: a second pass of a random number of loops, same losses
    size       tiny      D=128, k=2, L=8, T=128: minutes on two CPU cores
               p_hop     one to six hops of p-hop induction, D=64, k=1, L=8: the same
               pointers  one to eight jumps along pointers, D=64, k=1, L=8, attention in both directions: the same
               small     D=768, k=3, L=8, T=512: one GPU
               paper     D=2048, k=3, L=8, T=1024: as published (50,000 steps of 480 sequences)

Departures from the paper: the default corpus is Python's standard library, not the Pile, and the tokenizer's vocabulary
is small to match. Every microbatch draws a short trajectory of its own, as in the released code, where the processes
draw theirs apart too: its 40 microbatches of 12 sequences take 40 a step, and so does `paper`; with a smaller
`train.accumulate` a step takes as many as that says, the same on all devices. Initialisers keep the published std * sqrt(D), 0.02 at D=2048, at other widths, because at 0.02 a
narrow model with closed gates hardly leaves its start. Measured figures: experiments/reports/loopformer/.
"""
import dataclasses
import math

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.condition import LoopIndex, Modulation, Trajectory
from loopformer.nn.embed import Head, TiedHead, TokenEmbed, Tokens, Vectors
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.nn.layers import MLP, RMSNorm, UnitNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import Hops, PHop
from loopformer.tasks.pointers import Pointers
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.terms.match import ShortcutConsistency
from loopformer.training.train import Train
from loopformer.types import ConfigError


def std_of(width: int) -> float:
  """Of all initialisers: 0.02 at the published width of 2048, scaled as 1/sqrt(D)."""
  return 0.02 * math.sqrt(2048 / width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Dimensions of a size: k layers, heads, hidden width F; what stands around the loop; task and training."""
  layers: int
  heads: int
  hidden: int
  read_in: TokenEmbed | Tokens | Vectors
  task: Text | Generated
  train: Train
  schedule: WarmupCosine
  read_out: TiedHead | Head = TiedHead()
  position: Rotary | None = None
  kernel: Fused | Bidirectional = Fused(size=32)
  dtype: str = 'float32'
  remat: loop.PerStep | loop.PerLayer = loop.PerStep()

  @property
  def width(self) -> int:
    return self.read_in.width

  @property
  def std(self) -> float:
    return std_of(self.width)


def text(width: int, length: int, vocab: int, pieces: int) -> dict:
  """Fields of sizes that learn from text."""
  return {'read_in': TokenEmbed(vocab=vocab, width=width, length=length, std=std_of(width)),
          'task': Text(tokenizer=TrainedPieces(vocab=pieces), length=length)}


def by_difficulty(of: Hops | Pointers, levels: range) -> Generated:
  """The task, with a test for every number of hops."""
  return Generated(of=of, tests={f'{hops} hops': dataclasses.replace(of, fewest=hops, most=hops) for hops in levels})


P_HOP = Hops(of=PHop(hops=6, length=32))
POINTERS = Pointers(places=8, hops=8)
SIZES = {
    'tiny': Size(layers=2, heads=2, hidden=512, **text(width=128, length=128, vocab=1024, pieces=1024),
                 train=Train(steps=1000, batch=8), schedule=WarmupCosine(peak=3e-3, end=3e-4, warmup=100),
                 remat=loop.PerLayer()),
    'p_hop': Size(layers=1, heads=4, hidden=256, task=by_difficulty(P_HOP, range(1, P_HOP.of.hops + 1)),
                  read_in=Tokens(vocab=len(P_HOP.symbols), width=64, length=P_HOP.length, std=std_of(64)),
                  read_out=Head(outputs=len(P_HOP.symbols), std=std_of(64)), position=Rotary(),
                  train=Train(steps=2000, batch=64, log_every=50, eval_every=500, eval_batches=4, save_every=500),
                  schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=100), remat=loop.PerLayer()),
    'pointers': Size(layers=1, heads=4, hidden=256, task=by_difficulty(POINTERS, range(1, POINTERS.hops + 1)),
                     read_in=Vectors(inputs=POINTERS.places + POINTERS.hops, width=64, length=POINTERS.places, std=0.1),
                     read_out=Head(outputs=POINTERS.places, std=std_of(64)), kernel=Bidirectional(),
                     train=Train(steps=2500, batch=64, log_every=50, eval_every=500, eval_batches=4, save_every=500),
                     schedule=WarmupCosine(peak=2e-3, end=0.0, warmup=100), remat=loop.PerLayer()),
    'small': Size(layers=3, heads=12, hidden=2048, dtype='bfloat16', kernel=Fused(size=128),
                  **text(width=768, length=512, vocab=8192, pieces=8192),
                  train=Train(steps=5000, batch=64, eval_every=500, save_every=500),
                  schedule=WarmupCosine(peak=6e-4, end=6e-5, warmup=300)),
    'paper': Size(layers=3, heads=32, hidden=5120, dtype='bfloat16', kernel=Fused(size=128),
                  **text(width=2048, length=1024, vocab=50304, pieces=50257),
                  train=Train(steps=50_000, batch=480, accumulate=40, log_every=100, eval_every=1000, save_every=1000),
                  schedule=WarmupCosine()),
}
KINDS = ('loopformer', 'base', 'base_loop', 'tmlt')


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `tiny`, `small,kind=tmlt,ee=1` or `tiny,loops=4`."""
  given = arguments(argument, size='tiny', kind='loopformer', ee=False, loops=8, dtype='')
  size, kind, loops = choose('size', given['size'], SIZES), given['kind'], counted(given, 'loops', 8)
  choose('kind', kind, dict.fromkeys(KINDS))
  if given['ee'] and kind not in ('base_loop', 'tmlt'):
    raise ConfigError('config argument ee = 1: early exit is a variant of base_loop and tmlt, '
                      f'not of {kind}')
  layers = size.layers * loops if kind == 'base' else size.layers
  once = kind == 'base'
  return Experiment(
      name=kind + ('_ee' if given['ee'] else ''),
      model=Looped(
          read_in=size.read_in, cell=cell(kind, size, layers, given['dtype'] or size.dtype), read_out=size.read_out,
          loops=1 if once else loops, remat=size.remat),
      objective=objective(kind, given['ee'], loops),
      task=size.task,
      train=size.train,
      optim=AdamW(schedule=size.schedule),
      evals=Depths(budgets=(1,) if once else tuple(b for b in (1, 2, 4, 8, 16) if b < loops) + (loops,)))


def cell(kind: str, size: Size, layers: int, dtype: str):
  """The step of a kind: plain layers with learned norms, or modulated layers with bare ones."""
  out_std = size.std / math.sqrt(2 * layers)
  block = Block(
      attn=SelfAttention(heads=size.heads, std=size.std, out_std=out_std, kernel=size.kernel,
                         position=size.position),
      mlp=MLP(hidden=size.hidden, std=size.std, out_std=out_std),
      norm=RMSNorm() if kind in ('base', 'base_loop') else UnitNorm(),
      dtype=dtype)
  core = Stack(block, layers)
  if kind in ('base', 'base_loop'):
    return Plain(core)
  condition = (Trajectory if kind == 'loopformer' else LoopIndex)(size.width, size.std)
  return Timed(core, condition, Modulation(layers))


def objective(kind: str, early_exit: bool, loops: int) -> Objective:
  """The long rollout alone, or with a short one and the consistency of the two (section 3)."""
  if kind == 'base':
    return Objective(rolls={'long': Rollout(plans.Uniform(1))}, terms={'lm': Weighted(1.0, CE(roll='long'))})
  rolls = {'long': Rollout(plans.Uniform(loops))}
  terms = {'lm': Weighted(1.0, CE(roll='long'))}
  if kind == 'loopformer' or early_exit:
    rolls['short'] = Rollout(plans.Partition(loops) if kind == 'loopformer' else plans.RandomDepth(loops))
    terms['lm_short'] = Weighted(0.1, CE(roll='short'))
    terms['shortcut'] = Weighted(0.1, ShortcutConsistency(roll='short', target='long'))
  return Objective(rolls=rolls, terms=terms)
