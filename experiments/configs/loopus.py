"""LoopUS: a pretrained decoder is cut into encoder, loop and decoder, and learns to run its middle again and again
(Park et al., arXiv 2605.11011).

    python -m experiments.main --mode=import --from=SmolLM2-135M --workdir=runs/base
    python -m experiments.studies.loopus_split --workdir=runs/base --text=README.md
    python -m experiments.main --config=loopus:gpu,from=runs/base,encoder=0..1,decoder=29 --workdir=runs/loopus

Argument: size, then any of

    size     cpu    the sheet's experiment: a decoder of six layers of width 64 on bytes, of which the middle four loop
             gpu    300 steps of 32 texts of 512 tokens, for a decoder of some 135M parameters
             paper  as published, 3B tokens
    arm      loopus     a gate between steps, random deep supervision, a confidence head
             ungated    the same without the gate: every step's result is the next state (alpha = 1)
             base       the control that the paper lacks: as many tokens without loops, every layer once
             pretrain   of `cpu`, where there is no `start`: the decoder that the others start from, 1,000 steps
    start    of `cpu`: the work folder of `arm=pretrain`
    from     of the others: the work folder of a decoder that was imported, or trained here
    encoder, decoder   of the others: layers outside the loop, such as 0..1 and 27..27, or none
    text     of the others: a glob of texts, such as texts/*.jsonl (corpus.Files); Python's standard library without it
    gate     s4d        as released: channel n decays at the rate n, and many hardly move at first
             accept     alpha begins near one in all channels, and the first loop near what the decoder gave
    loops, graded       B and K: steps a text, and how many of them are supervised; the size's own by default

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
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.chat import SavedTokenizer
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import Bytes
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """loops, graded: B and K; length: of a text, in tokens."""
  loops: int
  graded: int
  length: int
  train: Train
  optim: AdamW


def adam(peak: float, warmup: int) -> AdamW:
  """PyTorch's defaults, with warm-up and cosine."""
  return AdamW(schedule=WarmupCosine(peak=peak, end=0.0, warmup=warmup), b2=0.999, decay=0.01)


SIZES = {
    'cpu': Size(loops=6, graded=2, length=64, optim=adam(3e-4, 40),
                train=Train(steps=400, batch=32, log_every=50, eval_every=200, eval_batches=16, save_every=200)),
    'gpu': Size(loops=8, graded=2, length=512, optim=adam(5e-5, 30),
                train=Train(steps=300, batch=32, accumulate=2, log_every=10, eval_every=100, save_every=100)),
    'paper': Size(loops=20, graded=5, length=1024, optim=adam(5e-5, 300),
                  train=Train(steps=23_000, batch=128, accumulate=16, log_every=20, eval_every=500, save_every=500)),
}
ARMS = ('loopus', 'ungated', 'base', 'pretrain')
GATES = {'s4d': Rising(), 'accept': Normal(0.0)}
BUDGETS = (1, 2, 3, 4, 6, 8, 12)


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,start=runs/pretrained` or `gpu,from=runs/base,encoder=0..1,decoder=29`."""
  given = arguments(argument, size='cpu', arm='', start='', **{'from': ''}, encoder='', decoder='', text='',
                    gate='s4d', loops=int, graded=int)
  size, own = choose('size', given['size'], SIZES), given['size'] == 'cpu'
  arm = given['arm'] or ('pretrain' if own and not given['start'] else 'loopus')
  choose('arm', arm, dict.fromkeys(ARMS))
  choose('gate', given['gate'], GATES)
  check(given, own, arm)
  decoder, task = small() if own else imported(given['from'], given['encoder'], given['decoder'], size.length)
  if given['text']:
    task = dataclasses.replace(task, corpus=Files(train=(given['text'],)))
  loops, graded = (counted(given, name, getattr(size, name)) for name in ('loops', 'graded'))
  run, optim = dataclasses.replace(size.train, start=given['start'] or given['from'] or None), size.optim
  if arm == 'pretrain':
    run = dataclasses.replace(run, steps=1000)
    optim = AdamW(schedule=WarmupCosine(peak=1e-3, end=1e-4, warmup=100), decay=0.01)
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


def check(given: dict, own: bool, arm: str):
  """Raises ConfigError where arguments are not of this size or arm."""
  outside = 'the layers outside the loop, such as 0..1, or none (experiments.studies.loopus_split proposes some)'
  for name, read, why in (
      ('start', own and arm != 'pretrain', 'the work folder of arm=pretrain'), ('from', not own, 'the work folder of a decoder'),
      ('encoder', not own, outside), ('decoder', not own, outside), ('text', not own, None)):  # None: it may be left out
    if read and why and not given[name]:
      raise ConfigError(f'config argument {name} is missing: {arm} of size {given["size"]} needs {why}')
    if given[name] and not read:
      raise ConfigError(f'config argument {name} = {given[name]}: {arm} of size {given["size"]} does not read it; leave it out')
  if arm == 'pretrain' and not own:
    raise ConfigError(f'config argument arm = pretrain: it makes the decoder of size cpu; with from = {given["from"]} there is one')


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


def imported(folder: str, encoder: str, decoder: str, length: int) -> tuple[Looped, Text]:
  """The decoder of a work folder, cut, with a head of its own, and text in its tokens."""
  model = configs.read(folder).model
  if not isinstance(model.cell, Plain):
    raise ConfigError(f'config argument from = {folder}: its cell is {type(model.cell).__name__}; a decoder whose layers run '
                      'once each (Plain) is made to loop')
  depth = sum(stack.depth for stack in model.stacks().values())
  model = cut(model, *sections(depth, encoder, decoder))
  if isinstance(model.read_out, TiedHead):
    model = model.clone(read_out=Head(outputs=model.read_in.vocab, norm=model.read_out.norm))
  return model, Text(tokenizer=SavedTokenizer(path=folder), length=min(length, model.read_in.length))
