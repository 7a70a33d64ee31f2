"""AlgoFormer: pre-transformer, looped transformer, post-transformer (Gao et al., TMLR 2025, 2402.13572).

    python -m experiments.main --config=experiments/configs/algoformer.py:cpu --workdir=runs/algoformer

Argument: size, then any of

    size    cpu      D=4, one-layer representation, width 64: two minutes
            large    D=10, two-layer representation, width 128, 12 loops
    task    regression       on a fixed representation (the paper's first task)
            autoregression   of three states by a fixed representation (its second); bound=contracted: states that
                             cannot grow, and die out, where ours are rescaled
            chain            all hidden states of a network that is drawn for every prompt (its third)
    kind    algoformer   one layer before, one looped, one after
            looped       one looped layer alone, two loops more (the same compute)
            stacked      three distinct layers (the same parameters)
    layers  of the looped block; 3 gives `looped` the parameters of `algoformer`
    inject  pre: the pre-transformer's output is added in every loop; none: it is where the loop starts, and all loops
            are differentiated, because nothing before them would learn otherwise

The paper's body and code were not to be had: sizes, window and injection are the sheet's readings of it.
Measured figures: experiments/reports/algoformer/.
"""
from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.inference import measures
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.blocks import gpt2
from loopformer.nn.embed import Head, Vectors
from loopformer.nn.inject import Add, NoInjection
from loopformer.nn.layers import Identity, LayerNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.starts import Embedded, Zeros
from loopformer.tasks.chains import Autoregression, ChainOfThought, Contracted, Rescaled
from loopformer.tasks.functions import Representation, Represented
from loopformer.tasks.generated import Generated
from loopformer.tasks.regression import Regression
from loopformer.terms.squared import MSE, Window
from loopformer.training.train import Train


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,kind=looped`."""
  given = arguments(argument, size='cpu', kind='algoformer', inject='pre', task='regression', layers=1,
                    bound='rescaled')
  small = choose('size', given['size'], {'cpu': True, 'large': False})
  kind = choose('kind', given['kind'], dict.fromkeys(('algoformer', 'looped', 'stacked'))) or given['kind']
  pre = choose('inject', given['inject'], {'pre': True, 'none': False})
  inputs, points, width, heads, loops, window = (4, 20, 64, 4, 6, 3) if small else (10, 31, 128, 8, 12, 8)
  phi = Representation(layers=1, features=8, slope=0.2) if small else Representation(layers=2, features=10)
  bound = choose('bound', given['bound'], {'rescaled': Rescaled(), 'contracted': Contracted()})
  chain = ChainOfThought(inputs=inputs, hidden=8, layers=2 if small else 3, points=points // 2)
  of, channels, outputs = choose('task', given['task'], {  # channels: of a token
      'regression': (Regression(function=Represented(phi=phi), inputs=inputs, points=points), inputs, 1),
      'autoregression': (Autoregression(phi=phi, steps=2 * points, bound=bound), 1, 1),
      'chain': (chain, chain.width, chain.width)})
  out_std = 0.02 / 6 ** 0.5
  one = Stack(gpt2(heads, 4 * width, out_std), 1)
  read_in = Vectors(inputs=channels, width=width, length=of.length)
  parts = dict(read_in=read_in, remat=loop.PerLayer())
  if kind == 'stacked':
    model = Looped(cell=Plain(Stack(gpt2(heads, 4 * width, out_std), 3)), loops=1,
                   read_out=Head(outputs=outputs, norm=LayerNorm()), **parts)
    objective = Objective(rolls={'all': Rollout(plans.Uniform(1))}, terms={'error': Weighted(1.0, MSE(roll='all'))})
  else:
    loops += 2 * (kind == 'looped')
    whole = kind == 'algoformer'
    block = Stack(gpt2(heads, 4 * width, out_std), given['layers'])
    model = Looped(cell=Recur(block, Add() if pre else NoInjection(), norm=LayerNorm()),
                   start=Zeros() if pre else Embedded(),
                   prelude=one if whole else None, coda=one if whole else None, loops=loops,
                   read_out=Head(outputs=outputs, norm=LayerNorm() if whole else Identity()), **parts)
    plan = plans.Truncated(depth=plans.Constant(loops=loops), graded=window if pre else loops)
    objective = Objective(rolls={'window': Rollout(plan, keep=loop.Every())},
                          terms={'error': Weighted(1.0, Window(roll='window'))})
  return Experiment(
      name=kind if given['task'] == 'regression' else f'{kind} {given["task"]}', model=model, objective=objective,
      task=Generated(of=of, measure=measures.Errors(scale=of.scale)),
      train=Train(steps=800, batch=32, log_every=50, eval_every=200, eval_batches=32, save_every=400) if small else
      Train(steps=20_000, batch=256, log_every=100, eval_every=1000, save_every=1000),
      optim=AdamW(schedule=WarmupCosine(peak=1e-3, end=1e-5, warmup=50), b2=0.999, decay=0.0),
      evals=Depths(budgets=(1,) if kind == 'stacked' else tuple(sorted({1, 2, 3, 4, 6, loops, 2 * loops}))))
