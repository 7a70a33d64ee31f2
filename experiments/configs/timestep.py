"""Timestep encoding: one layer, many loops, modulated by the loop's index (Xu and Sato, ICML 2025, 2410.01405).

    python -m experiments.main --config=experiments/configs/timestep.py:cpu,kind=tmlt --workdir=runs/ed

Argument: size, then any of

    size    cpu      edit distance of strings of 6 letters, width 64, 6 loops: a minute or two
            ed60     the paper's ED-60: width 256, 100 loops
            lm       the paper's language model: width 768, 24 loops, on our text
    kind    lt       the plain loop, properly pre-normed
            legacy   the plain loop as released: values and MLP read the state without its norm
            tmlt     gates and scales from a sinusoidal code of the loop's index
            table    gates and scales learned for every loop by themselves (the control that the paper lacks)
    loops   r

The paper compares `tmlt` with `legacy`, so that its gain mixes the time code with proper norms (sheet, section 7);
`lt` is the fair one. Its theorem in miniature, without attention, is experiments/studies/memorise.py. Positions are learned,
not sinusoidal; weight decay, clipping and the schedule are the same at all sizes, where the paper's differ.
Measured figures: experiments/reports/timestep/.
"""
import dataclasses

from flax import linen as nn
import jax.numpy as jnp

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.config import Experiment, arguments, choose
from loopformer.data.tokenizer import TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, attended, heads_of
from loopformer.nn.blocks import Block, Layer
from loopformer.nn.condition import LoopIndex, Modulation, StepNumber, Table
from loopformer.nn.embed import TiedHead, TokenEmbed
from loopformer.nn.layers import MLP, Linear, RMSNorm, UnitNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.edit_distance import EditDistance
from loopformer.tasks.generated import Generated
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import KV, Array, Context


class LegacyBlock(Layer):
  """A layer of the released loop: q and k of norm(x), but v of x itself; x += Attn(q, k, v); x += MLP(x).

  attn: its sizes, spreads and kernel; it is not called itself.
  """
  attn: SelfAttention
  mlp: MLP
  norm: nn.Module = RMSNorm()
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mod: None, kv: KV | None, layer: Array | int = 0) -> tuple[Array, KV | None]:
    """x [B, T, D] -> (x, kv)."""
    batch, length, width = x.shape
    groups, head = heads_of(self.attn, width)
    low = x.astype(self.dtype)
    qk = Linear((self.attn.heads + groups) * head, self.attn.std, name='qk')(self.norm(x).astype(self.dtype))
    q, k = jnp.split(qk.reshape(batch, length, -1, head), [self.attn.heads], 2)
    v = Linear(groups * head, self.attn.std, name='v')(low).reshape(batch, length, groups, head)
    out, kv = attended(self.attn, q, k, v, ctx, kv, layer)
    x = x + Linear(width, self.attn.out_std, name='out')(out).astype(x.dtype)
    return x + self.mlp(x.astype(self.dtype)).astype(x.dtype), kv


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
  time_std: float | None = 0.02  # of the time MLP's first weights; None: PyTorch's own, as in the paper's language models


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
               schedule=WarmupCosine(peak=2e-4, end=6e-5, warmup=2000), dtype='bfloat16', time_std=None),
}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,kind=lt,loops=12`."""
  given = arguments(argument, size='cpu', kind='tmlt', loops=0)
  size = choose('size', given['size'], SIZES)
  loops, width = given['loops'] or size.loops, size.width
  kind = given['kind']
  layer = dict(attn=SelfAttention(heads=size.heads, out_std=0.02 / 24 ** 0.5),
               mlp=MLP(hidden=4 * width, out_std=0.02 / 24 ** 0.5), dtype=size.dtype)
  core = Stack(Block(**layer, norm=UnitNorm()), 1)
  cell = choose('kind', kind, {
      'lt': Plain(Stack(Block(**layer), 1)), 'legacy': Plain(Stack(LegacyBlock(**layer), 1)),
      'tmlt': Timed(core, LoopIndex(width, size.time_std), Modulation(1)),
      'table': Timed(core, StepNumber(width), Table(layers=1, loops=loops, width=width))})
  return Experiment(
      name=f'{kind} r={loops}',
      model=Looped(read_in=TokenEmbed(vocab=size.vocab, width=width, length=size.task.length), cell=cell,
                   read_out=TiedHead(), loops=loops, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=size.task, train=size.train, optim=AdamW(schedule=size.schedule, decay=0.01),
      evals=Depths(budgets=tuple(sorted({1, max(1, loops // 2), loops}))))
