"""LoopUS: a pretrained decoder is cut into encoder, loop and decoder, and learns to run its middle again and again
(Park et al., arXiv 2605.11011).

    python -m experiments.main --mode=import --from=SmolLM2-135M --workdir=runs/base
    python -m experiments.studies.loopus_split --workdir=runs/base
    python -m experiments.main --config=loopus:from=runs/base,encoder=0..1,decoder=29 --workdir=runs/loopus

Argument: arm, then any of

    arm      loopus     a gate between steps, random deep supervision, a confidence head
             ungated    the same without the gate: every step's result is the next state (alpha = 1)
             base       the control that the paper lacks: as many tokens without loops, every layer once
             pretrain   the first 1,000 steps of the small decoder that `start` names for the others
    from     the work folder of a decoder (imported, or trained here) that is made to loop; '' for the sheet's experiment on
             a CPU: six layers of width 64 on bytes, of which the middle four loop, from the folder that `start` names
    start    without `from`: the work folder of `arm=pretrain`
    encoder, decoder   with `from`: layers outside the loop, such as 0..1 and 27..27, or none
    gate     s4d        as released: channel n decays at the rate n, and many hardly move at first
             accept     alpha begins near one in all channels, and the first loop near what the decoder gave
    loops, graded       B and K: steps a text, and how many of them are supervised; 20 and 5, on a CPU 6 and 2

Embedding and encoder get no gradient, and keep their values; a head that was tied to the embedding is one of its own.

Departures: one update a batch, from the mean over its K supervised steps, where the released code makes one every so many
steps of whatever batch and runs through its schedule K times; L_mono by text, where it takes two texts together; the
head that tells confidence is taught, and asked, on the state that a step ends with, where the released code teaches it
another than it asks. Our text, packed. Measured figures: experiments/reports/loopus/.
"""
import dataclasses

from loopformer import config as configs, loop, plans
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments, choose
from loopformer.data.tokenizer import Bytes, Kept
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TiedHead, Tokens
from loopformer.nn.layers import GatedMLP, Normal, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.loopus.cell import ConfidenceHead, Rising, Selective, Share
from loopformer.papers.loopus.split import cut, sections
from loopformer.papers.loopus.terms import Supervision
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training.frozen import Freeze
from loopformer.training.train import Train
from loopformer.types import ConfigError

ARMS = ('loopus', 'ungated', 'base', 'pretrain')
GATES = {'s4d': Rising(), 'accept': Normal(0.0)}
BUDGETS = (1, 2, 3, 4, 6, 8, 12)


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `start=runs/pretrained` or `base,from=runs/smollm,encoder=0..1,decoder=29`."""
  given = arguments(argument, arm='loopus', **{'from': ''}, start='', encoder='', decoder='', gate='s4d', loops=0, graded=0)
  arm, source, start = given['arm'], given['from'], given['start']
  choose('arm', arm, dict.fromkeys(ARMS))
  choose('gate', given['gate'], GATES)
  if source and (start or arm == 'pretrain'):
    raise ConfigError(f'config argument from = {source}: it starts from that decoder; leave out start and pretrain')
  if not source and (start == '') != (arm == 'pretrain'):
    raise ConfigError(f'config argument start = {start!r}: ' + (
        'pretrain starts from nothing; leave it out' if start else
        f'{arm} starts from a decoder; give its work folder as from=, or that of arm=pretrain as start='))
  for name in ('encoder', 'decoder'):
    if bool(given[name]) != bool(source):
      raise ConfigError(f'config argument {name} = {given[name]!r}: ' + (
          'name the layers outside the loop, such as 0..1, or none (experiments.studies.loopus_split proposes some)' if source
          else 'it is for from='))
  if source:
    decoder, task = imported(source, given['encoder'], given['decoder'])
    loops, graded = given['loops'] or 20, given['graded'] or 5
    run = Train(steps=23_000, batch=128, accumulate=16, log_every=20, eval_every=500, save_every=500, start=source)
    optim = AdamW(schedule=WarmupCosine(peak=5e-5, end=0.0, warmup=300), b2=0.999, decay=0.01)
  else:
    decoder, task = small()
    loops, graded = given['loops'] or 6, given['graded'] or 2
    run = Train(steps=1000 if arm == 'pretrain' else 400, batch=32, log_every=50, eval_every=200, eval_batches=16,
                save_every=200, start=start or None)
    optim = (AdamW(schedule=WarmupCosine(peak=1e-3, end=1e-4, warmup=100), decay=0.01) if arm == 'pretrain' else
             AdamW(schedule=WarmupCosine(peak=3e-4, end=0.0, warmup=40), b2=0.999, decay=0.01))
  looped = arm in ('loopus', 'ungated')
  if looped:
    middle = Selective(of=decoder.cell, share=Share(rates=GATES[given['gate']])) if arm == 'loopus' else decoder.cell
    model = decoder.clone(cell=Halting(of=middle, gate=ConfidenceHead()), loops=loops)
    objective = Objective(
        rolls={'deep': Rollout(plans.RandomSupervision(loops=loops, graded=graded), keep=loop.Pairs())},
        terms={'deep': Weighted(1.0, Supervision(roll='deep'))})
    optim = Freeze(of=optim, paths=('cell', 'read_out') if model.coda is None else ('cell', 'coda', 'read_out'))
  else:
    model = decoder.clone(loops=1)
    objective = Objective(rolls={'once': Rollout(plans.Uniform(1))}, terms={'lm': Weighted(1.0, CE(roll='once'))})
  return Experiment(name=f'loopus {arm}', model=model, objective=objective, task=task, train=run, optim=optim,
                    evals=Depths(budgets=BUDGETS))


def small() -> tuple[Looped, Text]:
  """The sheet's decoder of six layers, cut, and its text."""
  width = 64
  std, out_std = 0.08, 0.02  # near width ** -0.5, and that over the root of twelve branches
  block = Block(attn=SelfAttention(heads=2, std=std, out_std=out_std, position=Rotary()),
                mlp=GatedMLP(hidden=176, std=std, out_std=out_std), norm=RMSNorm(1e-6))
  vocab = 257  # bytes, and the end of a text
  model = Looped(read_in=Tokens(vocab=vocab, width=width, length=64, std=0.125), cell=Plain(Stack(block, 4)),
                 read_out=Head(outputs=vocab, norm=RMSNorm(1e-6)), prelude=Stack(block, 1), coda=Stack(block, 1))
  return model, Text(tokenizer=Bytes(), length=64)


def imported(folder: str, encoder: str, decoder: str) -> tuple[Looped, Text]:
  """The decoder of a work folder, cut, with a head of its own, and text in its tokens."""
  model = configs.read(folder).model
  if not isinstance(model.cell, Plain):
    raise ConfigError(f'config argument from = {folder}: its cell is {type(model.cell).__name__}; a decoder whose layers run '
                      'once each (Plain) is made to loop')
  depth = sum(stack.depth for stack in model.stacks().values())
  model = cut(model, *sections(depth, encoder, decoder))
  if isinstance(model.read_out, TiedHead):
    model = model.clone(read_out=Head(outputs=model.read_in.vocab, norm=model.read_out.norm))
  return model, Text(tokenizer=Kept(folder=folder), length=min(1024, model.read_in.length))
