"""k(x)L loops without injection, middle loops, and the regulariser of the like (Saunshi et al., ICLR 2025, 2502.17416).

    python -m experiments.main --config=experiments/configs/latent_thoughts.py:p_hop,layers=1,loops=3 --workdir=runs/hop

Argument: task, then any of

    task            p_hop, addition, igsm, assignment, assignment_code; of timestep encoding: edit_distance, lcs; of
    SHIFT: markov layers, loops   k and L of (k(x)L); loops=1 is a net of k layers
    kind            loop     the block alone
                    middle   k layers, the block L times, k layers: (k(x)1,L,1)
    cosine, period  weight and block length of the regulariser that makes a net without loops like one with (section 3)
    size            cpu      the sheet's measured experiment: minutes on two cores
                    paper    width, depth and batch as published, for a GPU

The default corpus of tasks is exact: dense labels for p-hop (a legitimate and faster variant, section 5), answers alone
elsewhere. Departures: AdamW for Adafactor; norm placement (pre-norm), initialisation and the untied head are ours, the
paper does not state them. Measured figures: experiments/reports/latent_thoughts/.
"""
import dataclasses
import math

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments, choose
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.layers import MLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.latent_thoughts.cosine import Cosine
from loopformer.tasks.addition import Addition
from loopformer.tasks.assignment import Assignment, Code
from loopformer.tasks.edit_distance import EditDistance, LongestCommonSubsequence
from loopformer.tasks.generated import Generated
from loopformer.tasks.igsm import SymbolicGSM
from loopformer.tasks.markov import Complex, Markov, Medium, Simple
from loopformer.tasks.p_hop import PHop
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import ConfigError

MATRICES = ('attn.q', 'attn.k', 'attn.v', 'attn.out', 'mlp.up', 'mlp.down')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """A task with the net and the training that it is given."""
  task: Generated
  width: int
  heads: int
  hidden: int
  train: Train
  schedule: WarmupCosine


MARKOV = Generated(of=Markov(), tests={'simple': Markov(difficulty=Simple()), 'medium': Markov(difficulty=Medium()),
                                       'complex': Markov(difficulty=Complex())})


def settings(size: str) -> dict[str, Setting]:
  """Name -> setting."""
  if size == 'paper':
    train = Train(steps=200_000, batch=256, log_every=100, eval_every=5000, save_every=5000)
    small = dict(width=128, heads=8, hidden=512, train=train,
                 schedule=WarmupCosine(peak=1e-3, end=0.0, warmup=2000))
    return {
        'p_hop': Setting(task=Generated(of=PHop(hops=16, length=256), pool=4_000_000), **small),
        'igsm': Setting(task=Generated(of=SymbolicGSM(), pool=4_000_000), **small),
        'assignment': Setting(task=Generated(of=Assignment()), **small),
        'assignment_code': Setting(task=Generated(of=Assignment(skin=Code())), **small),
        'edit_distance': Setting(task=Generated(of=EditDistance(letters=60, using=24), pool=1_000_000), **small),
        'lcs': Setting(task=Generated(of=LongestCommonSubsequence(letters=100, using=8), pool=1_000_000), **small),
        'markov': Setting(task=MARKOV, **small),
        'addition': Setting(task=Generated(of=Addition(), tests={'24': Addition(counts=(24,))}),
                            width=256, heads=8, hidden=1024, train=dataclasses.replace(train, batch=1024),
                            schedule=WarmupCosine(peak=1e-3, end=0.0, warmup=2000))}
  small = dict(width=64, heads=4, hidden=256, train=Train(steps=1000, batch=64, log_every=50, save_every=500),
               schedule=WarmupCosine(peak=3e-3, end=0.0, warmup=100))
  return {
      'p_hop': Setting(task=Generated(of=PHop(hops=3, length=24), pool=32_768), **small),
      'igsm': Setting(task=Generated(of=SymbolicGSM()), **small),
      'assignment': Setting(task=Generated(of=Assignment()), **small),
      'assignment_code': Setting(task=Generated(of=Assignment(skin=Code())), **small),
      'edit_distance': Setting(task=Generated(of=EditDistance(letters=6, using=2), pool=40_000), **small),
      'lcs': Setting(task=Generated(of=LongestCommonSubsequence(letters=8, using=4)), **small),
      'markov': Setting(task=MARKOV, **small),
      'addition': Setting(task=Generated(of=Addition(counts=(2, 3, 4))), **small)}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `p_hop,layers=1,loops=3`."""
  given = arguments(argument, task='p_hop', layers=1, loops=3, kind='loop', cosine=0.0, period=1, size='cpu')
  setting = choose('task', given['task'], settings(choose('size', given['size'], {'cpu': 'cpu', 'paper': 'paper'})))
  layers, loops, kind = given['layers'], given['loops'], given['kind']
  choose('kind', kind, dict.fromkeys(('loop', 'middle')))
  if loops < 1 or layers < 1:
    raise ConfigError(f'config argument layers = {layers}, loops = {loops}: both must be 1 or more')
  width = setting.width
  std = 1 / math.sqrt(width)
  ends = 2 if kind == 'middle' else 0
  out_std = std / math.sqrt(2 * layers * (loops + ends))
  block = Block(attn=SelfAttention(heads=setting.heads, std=std, out_std=out_std, position=Rotary()),
                mlp=MLP(hidden=setting.hidden, std=std, out_std=out_std), norm=RMSNorm())
  end = Stack(block, layers) if kind == 'middle' else None
  vocab = len(setting.task.of.symbols)
  terms = {'lm': Weighted(1.0, CE(roll='all'))}
  if given['cosine']:
    terms['cosine'] = Weighted(given['cosine'], Cosine(period=given['period'], heads=setting.heads, groups=MATRICES))
  return Experiment(
      name=f'{given["task"]} ({layers}x{loops})' + (' middle' if kind == 'middle' else ''),
      model=Looped(read_in=Tokens(vocab=vocab, width=width, length=setting.task.length, std=std),
                   cell=Plain(Stack(block, layers)), read_out=Head(outputs=vocab, std=std), loops=loops, prelude=end,
                   coda=end, remat=loop.PerLayer()),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms=terms),
      task=setting.task,
      train=setting.train,
      optim=AdamW(schedule=setting.schedule, decay=0.01),
      evals=Depths(budgets=tuple(sorted({1, loops}))))
