"""All looped language models on equal terms: one block, one text, one optimiser; each with its own loop and objective.

    python -m experiments.main --config=experiments/configs/leaderboard.py:cpu,system=parcae --workdir=runs/parcae

Argument: size, then any of

    size    cpu    two layers of width 64, four loops: a minute on two CPU cores
            small  three layers of width 768, eight loops: one GPU
    system  once         the layers once: as many parameters as the looped block
            base         as many layers as the loops apply, each with parameters of its own
            base_loop    the block again and again (LoopFormer's plain baseline)
            early_exit   the same, with a second pass of fewer loops
            tmlt         told the index of the loop
            loopformer   told where it stands on a trajectory, and trained on short ones
            middle       one layer before and one after the loop (k(x)L, middle)
            parcae       stable injection, a depth for every sequence
            huginn       concat and sandwich norms, heavy-tailed depths, truncated gradients
            ilr          every layer again in place (intra-layer recurrence): no dial
            algoformer   before, loop with the input added, after
            ouro         a gate, and the expected loss over its exits
            mor, mor_token  a router takes tokens out by expert choice, or gives each its depth
            plt          the loops of a token in one pass, shifted
            shift        one loop in the first half of the run, then all
            decoder      one layer, the block and one layer, once: what loopus starts from
            loopus       the middle of `decoder` learns to loop; needs start
            melt         one row of keys for all loops of `ouro`; needs start
            diffusion    masked diffusion, judged by its bound (text alone)
    task    text; p_hop (three hops of induction, asked for everywhere); arithmetic (relay.py's, from left to right)
    rate    peak of the learning rate, for all the same schedule and AdamW; steps: of the run
    loops, width  the size's own by default
    start   a work folder whose weights it begins with

What is of a paper here is its cell, its objective, where layers and norms stand, and what its depth is drawn from. The
same for all, and so not the paper's: width, heads, MLPs without gates, rotary positions, initialisers of the layers, an
untied head after one norm (Huginn's own stands before the coda too), AdamW with a warm-up of a twentieth and a cosine
(Muon and others are left out). AlgoFormer's loss is that of the last loop. MELT and LoopUS go on from where another
system stopped. Nothing is rematerialised.
`experiments/studies/leaderboard.py` trains all for as many operations as each other. Measured figures:
experiments/reports/leaderboard/.
"""
from __future__ import annotations

import dataclasses
import math
from typing import Any

from loopformer import loop, plans
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed, Plain
from loopformer.cells.recur import Recur
from loopformer.cells.timed import Timed
from loopformer.config import Experiment, arguments, choose, counted
from loopformer.data.tokenizer import TrainedPieces
from loopformer.diffusion.measures import Bound
from loopformer.diffusion.noise import Masking
from loopformer.diffusion.sampler import Denoising
from loopformer.diffusion.terms import NELBO
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, PeriNorm, SandwichNorm
from loopformer.nn.condition import LoopIndex, Modulation, Trajectory
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.inject import Add, Concat, Diagonal
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.nn.layers import MLP, Identity, RMSNorm, UnitNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack, repeated
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.loopus.cell import ConfidenceHead, Rising, Selective, Share
from loopformer.papers.loopus.terms import Supervision
from loopformer.papers.melt.attention import Elementwise, LatentAttention
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.melt.plans import Transition
from loopformer.papers.mor.cell import ExpertChoice, LinearScore, Routed, Sigmoid, TokenChoice
from loopformer.papers.mor.terms import Balance, RouterBCE
from loopformer.papers.plt.attention import GatedAttention, GatedBlock, QueryGate
from loopformer.papers.plt.cell import Mix, Shifted
from loopformer.papers.plt.streams import Streams
from loopformer.starts import Noise, Zeros
from loopformer.tasks.arithmetic import LeftToRight
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.tasks.reasoning import Asked
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.terms.expected import Expected
from loopformer.terms.match import ShortcutConsistency
from loopformer.training.control import NoControl, Plateau
from loopformer.training.frozen import Freeze
from loopformer.training.train import Train
from loopformer.types import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """layers: of the block; tokens: a text's length; vocab: its tokenizer's; text, other: steps and sequences of a run."""
  layers: int
  loops: int
  width: int
  heads: int
  tokens: int
  vocab: int
  text: Train
  other: Train
  hops: PHop
  sums: LeftToRight
  dtype: str = 'float32'
  kernel: Fused = Fused()

  @property
  def std(self) -> float:
    return self.width ** -0.5

  @property
  def out_std(self) -> float:
    """Of a branch's last matrix, as if the loop were so many layers."""
    return self.std / math.sqrt(2 * self.layers * self.loops)


SIZES = {
    'cpu': Size(layers=2, loops=4, width=64, heads=4, tokens=128, vocab=1024,
                text=Train(steps=400, batch=8, log_every=20, eval_every=100, eval_batches=16, save_every=400),
                other=Train(steps=800, batch=32, log_every=20, eval_every=200, eval_batches=8, save_every=400),
                hops=PHop(hops=3, length=24), sums=LeftToRight(longest=5)),
    'small': Size(layers=3, loops=8, width=768, heads=12, tokens=512, vocab=8192,
                  text=Train(steps=5000, batch=64, eval_every=500, save_every=500),
                  other=Train(steps=10_000, batch=256, eval_every=1000, save_every=1000),
                  hops=PHop(hops=16, length=256), sums=LeftToRight(longest=16), dtype='bfloat16',
                  kernel=Fused(size=128)),
}
TASKS = ('text', 'p_hop', 'arithmetic')


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """What a system is made of.

  cell, objective: its own; model: further fields of Looped; norm: of the head; control: what switches its stages; budgets:
  loops that it can be evaluated at, 1 to 2 L by default; measure: of its task, the task's own by default; learned: paths of
  the parameters that learn, all by default.
  """
  cell: Any
  objective: Objective
  model: dict[str, Any] = dataclasses.field(default_factory=dict)
  norm: Any = RMSNorm()
  control: Any = NoControl()
  budgets: tuple[int, ...] = ()
  measure: Any = None
  learned: tuple[str, ...] = ()


def block(size: Size, **changes: Any) -> Block:
  """Two branches, normed before; the same for all but for what is changed."""
  attn = changes.pop('attn', None) or SelfAttention(**attention(size))
  mlp = MLP(hidden=4 * size.width, std=size.std, out_std=changes.pop('out_std', size.out_std))
  return changes.pop('form', Block)(attn=attn, mlp=mlp, dtype=size.dtype, **{'norm': RMSNorm(), **changes})


def attention(size: Size) -> dict[str, Any]:
  """Fields of attention."""
  return dict(heads=size.heads, std=size.std, out_std=size.out_std, position=Rotary(), kernel=size.kernel)


def once(size: Size, term: Any = CE(roll='all'), **fields: Any) -> Objective:
  """A loss on the last of one loop."""
  return Objective(rolls={'all': Rollout(plans.Uniform(1))}, terms={'lm': Weighted(1.0, term)}, **fields)


def uniform(size: Size, **terms: Weighted) -> Objective:
  """A loss on the last loop, and further terms."""
  return Objective(rolls={'all': Rollout(plans.Uniform(size.loops))}, terms={'lm': Weighted(1.0, CE(roll='all')), **terms})


def drawn(size: Size, depth: Any, over: Any) -> Objective:
  """Depths that are drawn, of which the last half of a mean one is differentiated."""
  plan = plans.Truncated(depth=depth, graded=max(1, size.loops // 2), over=over)
  return Objective(rolls={'all': Rollout(plan)}, terms={'lm': Weighted(1.0, CE(roll='all'))})


def two_rollouts(size: Size, short: Any) -> Objective:
  """LoopFormer's loss: all loops, fewer, and their consistency."""
  return Objective(
      rolls={'long': Rollout(plans.Uniform(size.loops)), 'short': Rollout(short)},
      terms={'lm': Weighted(1.0, CE(roll='long')), 'lm_short': Weighted(0.1, CE(roll='short')),
             'shortcut': Weighted(0.1, ShortcutConsistency(roll='short', target='long'))})


def timed(size: Size, condition: Any, objective: Objective) -> System:
  """Layers without gains, modulated."""
  core = Stack(block(size, norm=UnitNorm()), size.layers)
  return System(cell=Timed(core, condition(size.width, size.std), Modulation(size.layers)), objective=objective)


def plain(size: Size, objective: Objective, **fields: Any) -> System:
  """The block again and again."""
  return System(cell=Plain(Stack(block(size), size.layers)), objective=objective, **fields)


def ends(size: Size, **changes: Any) -> dict[str, Any]:
  """One layer before the loop, and one after."""
  return {'prelude': Stack(block(size, **changes), 1), 'coda': Stack(block(size, **changes), 1)}


def shift(size: Size, steps: int) -> System:
  stages = (1, size.loops)
  objective = Objective(rolls={'all': Rollout(plans.Staged(loops=stages))}, terms={'lm': Weighted(1.0, CE(roll='all'))})
  return plain(size, objective, control=Plateau(loops=stages, patience=steps + 1, longest=steps // 2))


def mor(size: Size, router: Any, name: str, term: Weighted) -> System:
  return System(cell=Routed(Stack(block(size), size.layers), router), objective=uniform(size, **{name: term}),
                budgets=tuple(range(1, size.loops + 1)))


def exits_of(size: Size, plan: Any) -> Objective:
  """Ouro's."""
  return Objective(rolls={'all': Rollout(plan, keep=loop.Every())}, terms={'lm': Weighted(1.0, Expected(roll='all'))})


def ouro(size: Size) -> System:
  core = Stack(block(size, placement=PeriNorm()), size.layers)
  return System(cell=Halting(Normed(core, RMSNorm())), objective=exits_of(size, plans.Uniform(size.loops)),
                norm=Identity())


def melt(size: Size, steps: int) -> System:
  attn = LatentAttention(**attention(size), latent=Elementwise())
  core = Stack(block(size, attn=attn, placement=PeriNorm()), size.layers)
  objective = uniform(size)
  roll = Rollout(Transition(of=plans.Uniform(size.loops), steps=max(2, steps)))
  return System(cell=Gated(core, RMSNorm()), objective=dataclasses.replace(objective, rolls={'all': roll}),
                norm=Identity(), model={'memory': Latest(chunk=16)}, budgets=tuple(range(1, size.loops + 1)))


def loopus(size: Size) -> System:
  plan = plans.RandomSupervision(loops=size.loops, graded=max(1, size.loops // 2))
  objective = Objective(rolls={'deep': Rollout(plan, keep=loop.Pairs())},
                        terms={'deep': Weighted(1.0, Supervision(roll='deep'))})
  cell = Selective(of=Plain(Stack(block(size), size.layers)), share=Share(rates=Rising()))
  return System(cell=Halting(of=cell, gate=ConfidenceHead()), objective=objective, model=ends(size),
                learned=('cell', 'coda', 'read_out'))


def plt(size: Size) -> System:
  attn, window = GatedAttention(**attention(size)), 16
  core = Stack(block(size, attn=attn, form=GatedBlock, gate=QueryGate()), size.layers)
  return System(cell=Shifted(core, window_left=window, mix=Mix(), norm=RMSNorm()), objective=uniform(size),
                norm=Identity(), model={'memory': Streams(window_left=window)},
                budgets=tuple(range(1, size.loops + 1)))


def diffusion(size: Size, vocab: int, length: int) -> System:
  attn = SelfAttention(**{**attention(size), 'kernel': Bidirectional()})
  objective = Objective(rolls={'all': Rollout(plans.Uniform(size.loops))}, terms={'lm': Weighted(1.0, NELBO(roll='all'))},
                        prepare=Masking(mask=vocab))
  read_in = Tokens(vocab=vocab + 1, width=size.width, length=length, std=size.std)
  return System(cell=Recur(Stack(block(size, attn=attn), size.layers), Add()), objective=objective,
                measure=Bound(mask=vocab), model={'read_in': read_in, 'sampler': Denoising(steps=length)})


def systems(size: Size, steps: int, vocab: int, length: int) -> dict[str, Any]:
  """What makes each system, by name."""
  L, k = size.loops, size.layers
  std = math.sqrt(2 / 5) * size.std
  capacities = tuple((L - r) / L for r in range(L))
  many = dataclasses.replace(size, layers=k * L, loops=1)
  return {
      'once': lambda: plain(size, once(size), budgets=(1,)),
      'base': lambda: plain(many, once(size), budgets=(1,)),
      'base_loop': lambda: plain(size, uniform(size)),
      'early_exit': lambda: plain(size, two_rollouts(size, plans.RandomDepth(L))),
      'tmlt': lambda: timed(size, LoopIndex, uniform(size)),
      'loopformer': lambda: timed(size, Trajectory, two_rollouts(size, plans.Partition(L))),
      'middle': lambda: plain(size, uniform(size), model=ends(size)),
      'parcae': lambda: System(
          cell=Recur(Stack(block(size), k), Diagonal()), objective=drawn(size, plans.Poisson(average=L), plans.PerSequence()),
          model={**ends(size), 'prelude': Stack(block(size), 1, norm=RMSNorm()), 'start': Noise(std=std)}),
      'huginn': lambda: System(
          cell=Recur(Stack(block(size, placement=SandwichNorm()), k), Concat(std=size.std)),
          objective=drawn(size, plans.LogNormalPoisson(average=L), plans.Shared()),
          model={**ends(size, placement=SandwichNorm()), 'start': Noise(std=std)}),
      'ilr': lambda: System(cell=Plain(Stack(block(size), k, order=repeated((L,) * k))), objective=once(size), budgets=(1,)),
      'algoformer': lambda: System(cell=Recur(Stack(block(size), k), Add()), objective=uniform(size),
                                   model={**ends(size), 'start': Zeros()}),
      'ouro': lambda: ouro(size),
      'mor': lambda: mor(size, ExpertChoice(capacities=capacities, score=LinearScore(), gate=Sigmoid(alpha=0.1)), 'router',
                         Weighted(0.016, RouterBCE(roll='all', of='score'))),
      'mor_token': lambda: mor(size, TokenChoice(recursions=L, score=LinearScore()), 'balance',
                               Weighted(0.1, Balance(roll='all'))),
      'plt': lambda: plt(size),
      'shift': lambda: shift(size, steps),
      'decoder': lambda: plain(size, once(size), model=ends(size), budgets=(1,)),
      'loopus': lambda: loopus(size),
      'melt': lambda: melt(size, steps),
      'diffusion': lambda: diffusion(size, vocab, length),
  }


BEGINS = {'loopus': 'decoder', 'melt': 'ouro'}  # what stands before, in half of the budget


def often(steps: int | None, control: Any) -> dict[str, int]:
  """Of a run of so many steps (None: the size's own): evaluated and saved at its end, and in between where a stage may
  end."""
  if not steps:
    return {}
  return {'eval_every': steps if control == NoControl() else max(1, steps // 2), 'save_every': steps}


def budgets(size: str, name: str) -> tuple[int, ...]:
  """The numbers of loops that a system can be evaluated at."""
  found = SIZES[size]
  return systems(found, 100, 100, 100)[name]().budgets or tuple(range(1, 2 * found.loops + 1))


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,system=ouro,task=p_hop,rate=1e-2`."""
  given = arguments(argument, size='cpu', system='loopformer', task='text', rate=3e-3, steps=int, start='', loops=int,
                    width=int)
  size, name = choose('size', given['size'], SIZES), given['system']
  size = dataclasses.replace(size, loops=counted(given, 'loops', size.loops), width=counted(given, 'width', size.width))
  task = choose('task', given['task'], {task: task for task in TASKS})
  data = {'text': Text(tokenizer=TrainedPieces(vocab=size.vocab), length=size.tokens),
          'p_hop': Generated(of=size.hops, pool=32_768), 'arithmetic': Generated(of=Asked(of=size.sums))}[task]
  vocab = size.vocab if task == 'text' else len(data.of.symbols)
  run = size.text if task == 'text' else size.other
  steps = counted(given, 'steps', run.steps)
  system = choose('system', name, systems(size, steps, vocab, data.length))()
  if (name in BEGINS) != bool(given['start']):
    raise ConfigError(f'config argument start = {given["start"]!r}: ' + (
        f'{name} needs the work folder of system={BEGINS[name]}' if name in BEGINS else f'{name} starts from no other run'))
  if task != 'text' and name == 'diffusion':
    raise ConfigError(f'config argument task = {task}: its answers are asked of causal models; system=diffusion takes text')
  if system.measure is not None:
    data = dataclasses.replace(data, measure=system.measure)
  fields = {'read_in': Tokens(vocab=vocab, width=size.width, length=data.length, std=size.std), **system.model}
  loops = 1 if system.budgets == (1,) else size.loops
  optim = AdamW(schedule=WarmupCosine(peak=given['rate'], end=0.0, warmup=max(1, steps // 20)))
  return Experiment(
      name=f'{name} {task}',
      model=Looped(cell=system.cell, read_out=Head(outputs=vocab, std=size.std, norm=system.norm),
                   loops=loops, remat=loop.KeepAll(), **fields),
      objective=system.objective, task=data, control=system.control,
      train=dataclasses.replace(run, steps=steps, start=given['start'] or None, **often(given['steps'], system.control)),
      optim=Freeze(of=optim, paths=system.learned) if system.learned else optim,
      evals=Depths(budgets=tuple(sorted({1, loops}))))
