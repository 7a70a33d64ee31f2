"""The Parallel Loop Transformer (Wu et al., arXiv 2510.24824), as LoopCoder-v2 (arXiv 2606.18023) writes it down.

    python -m experiments.main --config=experiments/configs/plt.py:tiny --workdir=runs/plt

A loop begins with the last one's state of the token before, so that all loops of a token are decoded in one pass of the
layers; later loops read the first one's keys and values and, in a window, their own.

Argument: size, then any of

    size     tiny       bytes of text, width 64, two loops of two layers: minutes on two CPU cores
             loopcoder  the 7B of LoopCoder-v2 (its shape; sequences and batch are not published)
    kind     gswa       all of it: gated sliding-window attention
             share      the first loop's keys and values alone (the gate is 1)
             clp        the shift alone: every loop has keys and values of its own (the gate is 0, the window all)
             seq        neither: the block again on the state that it gave, token for token
             r1         one loop of the same layers
    loops    2 by default
    gate     query      sigmoid(w . q + b), LoopCoder-v2's released configuration
             hidden     sigmoid(W norm(x) + b), its paper
    mix      scaled     0.707 of the embedding and 0.053 of the shifted state
             ones       one of each, as in the paper's equations
             learned    0.707, and a learned scale that starts at 0.053
    window   tokens before a token that later loops read of their own; the size's own by default

Departures: initialisers of the layers are N(0, 1/width), the paper does not state them; embeddings start at 0.02.
Measured figures: experiments/reports/plt/.
"""
import dataclasses
import math

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import Bytes, TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.memories import PerLoop
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TiedHead, Tokens
from loopformer.nn.kernels import Fused
from loopformer.nn.layers import GatedMLP, Identity, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.plt.attention import ConstantGate, GatedAttention, GatedBlock, HiddenGate, QueryGate
from loopformer.papers.plt.cell import LearnedMix, Mix, Shifted
from loopformer.papers.plt.streams import Streams
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of the loop; window: tokens before a token; base: of the rotary positions; untied: a head of its own."""
  layers: int
  width: int
  heads: int
  groups: int
  hidden: int
  vocab: int
  window: int
  task: Text
  train: Train
  optim: AdamW
  base: float = 10_000.0
  untied: bool = False
  dtype: str = 'float32'
  kernel: Fused = Fused()
  eps: float = 1e-5


BYTES, PIECES = Bytes(), TrainedPieces(vocab=76_800)
SIZES = {
    'tiny': Size(layers=2, width=64, heads=2, groups=2, hidden=176, vocab=257, window=16,
                 task=Text(tokenizer=BYTES, length=128),
                 train=Train(steps=1200, batch=16, log_every=50, eval_every=200, save_every=400),
                 optim=AdamW(schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=60), decay=0.1)),
    'loopcoder': Size(layers=14, width=5120, heads=40, groups=8, hidden=27_648, vocab=76_800, window=64,
                      task=Text(tokenizer=PIECES, length=4096),
                      train=Train(steps=4_300_000, batch=1024, accumulate=64, log_every=100, eval_every=5000,
                                  save_every=5000),
                      optim=AdamW(schedule=WarmupCosine(peak=4e-4, end=0.0, warmup=215_000), decay=0.1, eps=1e-15),
                      base=5e5, untied=True, dtype='bfloat16', kernel=Fused(size=128)),
}
KINDS = ('gswa', 'share', 'clp', 'seq', 'r1')
GATES = {'query': QueryGate(), 'hidden': HiddenGate()}
MIXES = {'scaled': Mix(), 'ones': Mix(embed=1.0, hidden=1.0), 'learned': LearnedMix()}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `tiny` or `tiny,kind=seq,loops=3`."""
  given = arguments(argument, size='tiny', kind='gswa', loops=int, gate='', mix='', window=int)
  size, kind = choose('size', given['size'], SIZES), given['kind']
  choose('kind', kind, dict.fromkeys(KINDS))
  for name, kinds in (('gate', ('gswa',)), ('window', ('gswa',)), ('mix', ('gswa', 'share', 'clp')),
                      ('loops', [kind for kind in KINDS if kind != 'r1'])):
    if given[name] not in ('', None) and kind not in kinds:
      raise ConfigError(f'config argument {name} = {given[name]}: kind={kind} does not read it, {", ".join(kinds)} '
                        f'{"does" if len(kinds) == 1 else "do"}; leave it out')
  gate, mix = choose('gate', given['gate'] or 'query', GATES), choose('mix', given['mix'] or 'scaled', MIXES)
  loops = 1 if kind == 'r1' else counted(given, 'loops', 2)
  norm = RMSNorm(size.eps)
  cell, memory = parts(size, kind, gate, mix, size.window if given['window'] is None else given['window'], norm)
  outer = norm if kind in ('seq', 'r1') else Identity()  # a shifted cell ends with the norm
  return Experiment(
      name=f'plt {kind}' + ('' if loops == 2 else f' {loops}'),
      model=Looped(read_in=Tokens(vocab=size.vocab, width=size.width, length=size.task.length), cell=cell,
                   read_out=Head(outputs=size.vocab, norm=outer) if size.untied else TiedHead(norm=outer), loops=loops,
                   memory=memory, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=size.task, train=size.train, optim=size.optim, evals=Depths(budgets=tuple(range(1, loops + 1))))


def parts(size: Size, kind: str, gate, mix, window: int, norm: RMSNorm):
  """(cell, memory) of a kind."""
  std = 1 / math.sqrt(size.width)
  out_std = std / math.sqrt(2 * size.layers)
  options = dict(heads=size.heads, groups=size.groups, std=std, out_std=out_std, kernel=size.kernel,
                 position=Rotary(base=size.base))
  mlp = GatedMLP(hidden=size.hidden, std=std, out_std=out_std)
  if kind in ('seq', 'r1'):
    block = Block(attn=SelfAttention(**options), mlp=mlp, norm=norm, dtype=size.dtype)
    return Plain(Stack(block, size.layers)), PerLoop()
  if kind != 'gswa':
    gate = ConstantGate(1.0 if kind == 'share' else 0.0)
    window = 0 if kind == 'share' else size.task.length - 1
  block = GatedBlock(attn=GatedAttention(**options), mlp=mlp, gate=gate, norm=norm, dtype=size.dtype)
  return Shifted(Stack(block, size.layers), window_left=window, mix=mix, norm=norm), Streams(window_left=window)
