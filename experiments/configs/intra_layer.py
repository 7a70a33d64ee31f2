"""Intra-layer recurrence: layers are re-entered in place (Nguyen and Lin, Canadian AI 2025, 2505.01855).

    python -m experiments.main --config=experiments/configs/intra_layer.py:cpu,map=4211 --workdir=runs/ilr

Argument: size, then any of

    size      cpu      four layers of width 64 on bytes: half a minute a hundred steps
              small    as published (1.18M parameters); large (100.1M)
    map       how often each layer runs, a digit each: 1111, 2111, 4211, 1124, ...
    block     R: the whole stack R times instead (the map must be all ones)
    inject    1: the input is added before every pass but the first of `block` (as in the released configurations)
    position  rope, nope, ape, alibi
    std       of all initialisers; 0.02 as published, which is small for the width of `cpu`

Departures: our text; pads carry no loss. Measured figures: experiments/reports/intra_layer/.
"""
import dataclasses

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.data.tokenizer import Bytes, TrainedPieces
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import TiedHead, TokenEmbed, Tokens
from loopformer.nn.inject import Add
from loopformer.nn.layers import GatedMLP, RMSNorm
from loopformer.nn.positions import Alibi, Rotary
from loopformer.nn.stack import Stack, repeated
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.starts import Zeros
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Dimensions, task and training of a size."""
  layers: int
  width: int
  heads: int
  vocab: int
  task: Text
  train: Train
  schedule: WarmupCosine
  dtype: str = 'bfloat16'


SIZES = {
    'cpu': Size(layers=4, width=64, heads=4, vocab=257, task=Text(tokenizer=Bytes(), length=96),
                train=Train(steps=400, batch=16, log_every=20, eval_every=200, eval_batches=32, save_every=400),
                schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=40), dtype='float32'),
    'small': Size(layers=4, width=128, heads=4, vocab=1024, task=Text(tokenizer=TrainedPieces(vocab=1024), length=1024),
                  train=Train(steps=7600, batch=64, eval_every=500, save_every=500),
                  schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=760)),
    'large': Size(layers=8, width=768, heads=8, vocab=32_000, task=Text(tokenizer=TrainedPieces(vocab=32_000),
                                                                        length=1024),
                  train=Train(steps=46_000, batch=64, eval_every=1000, save_every=1000),
                  schedule=WarmupCosine(peak=1e-3, end=0.0, warmup=920)),
}
POSITIONS = {'rope': Rotary(), 'nope': None, 'ape': None, 'alibi': Alibi()}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,map=2111`."""
  given = arguments(argument, size='cpu', map='', block=1, inject=False, position='rope', std=0.02)
  size = choose('size', given['size'], SIZES)
  if not given['map'].isdigit() and given['map']:
    raise ConfigError(f'config argument map = {given["map"]}: give one digit a layer, such as 4211')
  times = tuple(map(int, given['map'])) if given['map'] else (1,) * size.layers
  if len(times) != size.layers:
    raise ConfigError(f'config argument map = {given["map"]}: {len(times)} digits, but there are {size.layers} layers; '
                      'give one digit a layer')
  order, loops, std = repeated(times), given['block'], given['std']
  if loops < 1 or loops > 1 and set(times) != {1}:
    raise ConfigError(f'config argument block = {loops}: 1 or more, and above 1 only with a map of ones')
  if given['inject'] and loops == 1:
    raise ConfigError('config argument inject = 1: with one pass there is none before which the input could be added; '
                      'give block=2 or more')
  block = Block(attn=SelfAttention(heads=size.heads, std=std, out_std=std,
                                   position=choose('position', given['position'], POSITIONS)),
                mlp=GatedMLP(hidden=4 * size.width, std=std, out_std=std), norm=RMSNorm(1e-6), dtype=size.dtype)
  core = Stack(block, size.layers, order=None if set(times) == {1} else order)
  embed = TokenEmbed if given['position'] == 'ape' else Tokens
  return Experiment(
      name=f'block {loops}' if loops > 1 else 'map ' + ''.join(map(str, times)),
      model=Looped(read_in=embed(vocab=size.vocab, width=size.width, length=size.task.length, std=std),
                   cell=Recur(core, Add()) if given['inject'] else Plain(core), read_out=TiedHead(RMSNorm(1e-6)),
                   loops=loops, remat=loop.PerLayer(), **({'start': Zeros()} if given['inject'] else {})),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=size.task, train=size.train,
      optim=AdamW(schedule=size.schedule, b2=0.999, decay=0.01),
      evals=Depths(budgets=(loops,)))
