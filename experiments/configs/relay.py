"""RELAY: a loop that is taught to show the rounds of a solution, and writes chains of thought (Yu et al., 2502.08482).

    python -m experiments.main --config=experiments/configs/relay.py:cpu --workdir=runs/relay

Argument: size, then any of

    size    cpu    one layer of width 64: minutes on two CPU cores
            gpu    three layers of width 256 on shorter problems than the paper's: one GPU
            paper  as published
    task    left   chains of + and * from left to right, mod 5 (cpu alone)
            ari    arithmetic mod 11 with brackets;  ed  edit distance;  lis  longest increasing subsequence
            all    these three, told apart by their first token
    kind    aligned  stage I: the encoder shows round t after its t-th step, and answers after the last
            vanilla  the same encoder, answer alone
            chain    a decoder, not looped, that writes the chain: of as many layers, at cpu of two (of one it cannot copy
                     by what stands before)
            tuned    stage II: `chain` trained on from `start` on the problems of the file `chains`
    inject  1: the input is added in every step (not in the paper)
    relay   the weight lambda of the rounds; the paper's could not be found, 1 by default, of `cpu` 5 (measured)

`experiments/studies/relay_stages.py` runs both stages, and the self-taught controls. Measured figures:
experiments/reports/relay/.

Departures and what the paper does not say: reduction of arithmetic from the left (the paper's example, not the
benchmark's order); RMSNorm before the layers and the heads; the MLP's width 4 d; the answer is read at the last token; no
dropout, which the library does not have (paper: 0.1); padding is no part of attention (the paper fixes one width).
"""
from __future__ import annotations

import dataclasses
from typing import Any

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.inference.evaluate import Depths, Named, Run
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.nn.layers import MLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.papers.relay.cell import RoundHead, Showing
from loopformer.papers.relay.plans import RoundByRound
from loopformer.papers.relay.terms import RoundCE
from loopformer.tasks.arithmetic import Arithmetic, LeftToRight
from loopformer.tasks.edit_distance import EditRows
from loopformer.tasks.generated import Generated, Grow, Rise, Same
from loopformer.tasks.increasing import Increasing
from loopformer.tasks.reasoning import Chain, Rounds, Several
from loopformer.tasks.recorded import Recorded
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError

KINDS = ('aligned', 'vanilla', 'chain', 'tuned')
NAMES = {'left': 'LEFT', 'ari': 'ARI', 'ed': 'ED', 'lis': 'LIS'}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """Problems of a task: those that are trained on, up to of.longest, and the sizes beyond it that are tested."""
  of: Any
  beyond: tuple[int, ...]

  def sized(self, shortest: int | None = None, longest: int | None = None, room: int | None = None) -> Any:
    """The source of other sizes, with symbols for all that are tested."""
    longest = longest or self.of.longest
    return dataclasses.replace(self.of, shortest=shortest or self.of.shortest, longest=longest, room=room or longest,
                               limit=max(self.beyond))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of loops, and of decoders where these have no number of their own. tasks: what problems there are; train,
  tuned: of both stages; schedules: kind -> learning rate; grow: examples until the training problems grow by one, 0 for
  all from the start; pool: different examples that are trained on; relay: the weight of rounds."""
  layers: int
  width: int
  tasks: dict[str, Source]
  train: Train
  tuned: Train
  schedules: dict[str, Any]
  grow: int = 0
  pool: int | None = None
  dtype: str = 'float32'
  kernel: Fused = Fused()
  relay: float = 1.0
  decoder_layers: int | None = None


def _linear(peak: float) -> WSD:
  return WSD(peak=peak, end=0.0, warmup=0.01, cooldown=0.99)


LEFT = LeftToRight(longest=6)
SIZES = {
    'cpu': Size(
        layers=1, width=64,
        tasks={'left': Source(of=LEFT, beyond=(7, 8)), 'ari': Source(of=Arithmetic(longest=3), beyond=(4, 5)),
               'ed': Source(of=EditRows(longest=6, using=2), beyond=(7, 8)),
               'lis': Source(of=Increasing(longest=10, group=4, spread=20), beyond=(12, 14))},
        train=Train(steps=3000, batch=64, log_every=50, eval_every=1000, save_every=1000),
        tuned=Train(steps=1000, batch=64, log_every=50, eval_every=1000, save_every=500),
        schedules={**dict.fromkeys(KINDS[:3], WarmupCosine(peak=2e-3, end=0.0, warmup=50)), 'tuned': _linear(5e-4)},
        grow=50 * 64, relay=5.0, decoder_layers=2),
    'gpu': Size(
        layers=3, width=256,
        tasks={'ari': Source(of=Arithmetic(longest=6), beyond=(7, 8, 9, 10)),
               'ed': Source(of=EditRows(longest=12), beyond=(13, 14, 16)),
               'lis': Source(of=Increasing(longest=40), beyond=(45, 50))},
        train=Train(steps=20_000, batch=1024, log_every=100, eval_every=2000, save_every=2000),
        tuned=Train(steps=5000, batch=1024, log_every=100, eval_every=1000, save_every=1000),
        schedules={**dict.fromkeys(KINDS[:3], _linear(5e-4)), 'tuned': _linear(1e-4)}, dtype='bfloat16'),
    'paper': Size(
        layers=3, width=256,
        tasks={'ari': Source(of=Arithmetic(longest=15), beyond=tuple(range(16, 26))),
               'ed': Source(of=EditRows(longest=30), beyond=tuple(range(31, 41))),
               'lis': Source(of=Increasing(longest=100), beyond=tuple(range(101, 121)))},
        train=Train(steps=2_929_687, batch=512, log_every=500, eval_every=20_000, save_every=20_000),
        tuned=Train(steps=292_968, batch=512, log_every=500, eval_every=20_000, save_every=20_000),
        schedules={'aligned': _linear(5e-4), 'vanilla': _linear(1e-3), 'chain': _linear(5e-4), 'tuned': _linear(1e-4)},
        pool=1_000_000),
}


def problems(size: str, task: str, kind: str, beyond: int = 0, far: bool = False) -> Any:
  """The source of problems of an experiment: of the sizes that are trained on, or of the beyond-th of those that are
  tested (1, 2 ..); far: with room for the largest of all."""
  tasks = choose('size', size, SIZES).tasks
  chosen = list(tasks) if task == 'all' else [task]
  if task == 'all':
    chosen = [name for name in chosen if name != 'left']
  found = {}
  for name in chosen:
    source = choose('task', name, {**tasks, **({} if task == name else {'all': None})})
    tested = source.beyond[min(beyond, len(source.beyond)) - 1] if beyond else None
    found[NAMES[name]] = source.sized(tested, tested, max(source.beyond) if far else None)
  if task != 'all':
    return next(iter(found.values()))
  return Several(of=found, weights={} if kind == 'aligned' else {'ARI': 1.0, 'ED': 10.0, 'LIS': 5.0})


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu` or `cpu,kind=tuned,start=runs/chain,chains=runs/merged.jsonl`."""
  given = arguments(argument, size='cpu', task='', kind='aligned', inject=False, relay=float, start='', chains='')
  size, kind = choose('size', given['size'], SIZES), choose('kind', given['kind'], {kind: kind for kind in KINDS})
  task = given['task'] or next(iter(size.tasks))
  choose('task', task, {**size.tasks, 'all': None})
  for name in ('start', 'chains'):
    if (kind == 'tuned') != bool(given[name]):
      raise ConfigError(f'config argument {name} = {given[name]!r}: kind = {kind} '
                        + ('needs both start, a work folder, and chains, a file' if kind == 'tuned' else
                           'starts from no other run'))
  if given['relay'] is not None and (given['relay'] < 0 or kind != 'aligned'):
    raise ConfigError(f'config argument relay = {given["relay"]}: ' + (
        'rounds would be learned not to be shown; give 0 or more' if kind == 'aligned' else
        f'kind = {kind} shows no rounds; leave it out'))
  decodes = kind in ('chain', 'tuned')
  form = Chain if decodes else Rounds
  tests = max(len(source.beyond) for name, source in size.tasks.items() if task in (name, 'all'))
  of = form(of=problems(given['size'], task, kind, far=kind == 'tuned'))
  longest = form(of=problems(given['size'], task, kind, tests))
  vocab, width = len(of.symbols), size.width
  grow = Grow(fields={'of/longest': Rise(first=of.of.least, every=size.grow)}) if (
      size.grow and task != 'all' and kind != 'tuned') else Same()
  pool = size.pool and size.pool * (3 if task == 'all' else 1)
  data = Generated(of=of, grow=grow, pool=pool, held_out=512 if size.grow else 1024,
                   tests={f'beyond {i}': form(of=problems(given['size'], task, kind, i)) for i in range(1, tests + 1)})
  std = width ** -0.5
  attn = SelfAttention(heads=4, position=Rotary(), kernel=size.kernel if decodes else Bidirectional(), std=std)
  core = Stack(Block(attn=attn, mlp=MLP(hidden=4 * width, std=std), norm=RMSNorm(), dtype=size.dtype),
               (decodes and size.decoder_layers) or size.layers)
  cell = Recur(core, Add()) if given['inject'] else Plain(core)
  most = 1 if decodes else longest.most
  plan = plans.Uniform(1) if decodes else plans.Given(most=of.most)
  terms = {'answer': Weighted(1.0, CE(roll='all'))}
  if kind == 'aligned':
    cell, plan = Showing(cell, RoundHead(outputs=vocab, std=std)), RoundByRound(most=of.most)
    terms['rounds'] = Weighted(size.relay if given['relay'] is None else given['relay'], RoundCE(roll='all'))
  evals = Depths(budgets=(1,)) if decodes else Named(runs={'rounds': Run(plan=plans.Given(most=most))})
  train = dataclasses.replace(size.tuned, start=given['start']) if kind == 'tuned' else size.train
  return Experiment(
      name=f'RELAY {task} {kind}' + (' with injection' if given['inject'] else ''),
      model=Looped(read_in=Tokens(vocab=vocab, width=width, length=longest.length + 1, std=std), cell=cell,
                   read_out=Head(outputs=vocab, std=std), loops=most, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plan)}, terms=terms),
      task=Recorded(of=data, file=given['chains']) if kind == 'tuned' else data, train=train,
      optim=AdamW(schedule=size.schedules[kind], decay=0.01), evals=evals)
