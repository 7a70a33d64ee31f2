"""Looped transformers learn learning algorithms: in-context regression (Yang et al., ICLR 2024, 2311.12424).

    python -m experiments.main --config=experiments/configs/looped_icl.py:cpu,function=linear --workdir=runs/icl

Argument: size, then any of

    size      cpu      D=5, 11 points, width 64: a few minutes
              paper    D=20, 41 points (tree, network: 101), width 256
    function  linear, sparse, tree, network
    kind      looped      h = norm(block(h + e)), loss over a window of loops
              stacked     `layers` distinct layers, not looped
    layers    of the block
    last, window   b, the last number of loops of the curriculum, and w, those that are differentiated; 0: the size's
    grow      1: prompts grow in training, in dimensions and points, as in the paper; 0: they do not; -1: 1 at `paper`

The curriculum of loops is in the plan, those of dimensions and points in the task; a tree reads all dimensions from the
start. Positions and the final norm are inside the loop, as in the paper. Measured figures (without `grow`):
experiments/reports/looped_icl/.
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
from loopformer.nn.inject import Add
from loopformer.nn.layers import Identity, LayerNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WSD, WarmupCosine
from loopformer.starts import Zeros
from loopformer.tasks.functions import Linear, Network, Sparse, Tree
from loopformer.tasks.generated import Generated, Grow, Rise, Same
from loopformer.tasks.regression import Regression
from loopformer.terms.squared import MSE, Window
from loopformer.training.train import Train
from loopformer.types import ConfigError

FUNCTIONS = {'linear': Linear(), 'sparse': Sparse(), 'tree': Tree(), 'network': Network()}
POINTS = {'linear': (11, 41, 2), 'sparse': (11, 41, 2), 'tree': (26, 101, 5), 'network': (26, 101, 5)}  # from, to, by
INTERVAL = 5000  # steps before the paper's prompts grow again
WINDOWS = {'linear': (20, 15), 'sparse': (20, 10), 'tree': (70, 15), 'network': (12, 5)}  # b and w of the paper


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,function=linear,kind=stacked,layers=4`."""
  given = arguments(argument, size='cpu', function='linear', kind='looped', layers=1, last=0, window=0, grow=-1)
  small = choose('size', given['size'], {'cpu': True, 'paper': False})
  function = choose('function', given['function'], FUNCTIONS)
  kind = choose('kind', given['kind'], {'looped': True, 'stacked': False})
  inputs, points, width, heads = (5, 11, 64, 4) if small else (20, POINTS[given['function']][1], 256, 8)
  last, window = (12, 5) if small else WINDOWS[given['function']]
  last, window = given['last'] or last, given['window'] or window
  if given['layers'] < 1:
    raise ConfigError(f'config argument layers = {given["layers"]}: must be 1 or more')
  if window > last:
    raise ConfigError(f'config argument window = {window} is more than last = {last}: no loop is left to differentiate')
  train = (Train(steps=3000, batch=64, log_every=100, eval_every=500, save_every=1000) if small else
           Train(steps=500_000, batch=64, log_every=1000, eval_every=10_000, save_every=10_000))
  grow = choose('grow', given['grow'], {-1: not small, 0: False, 1: True})
  room = dict(width=inputs, room=points) if grow else {}
  of = Regression(function=function, inputs=inputs, points=points, **room)
  out_std = 0.02 / (2 * given['layers']) ** 0.5
  core = Stack(gpt2(heads, 4 * width, out_std), given['layers'])
  read_in = Vectors(inputs=inputs, width=width, length=of.length)
  if kind:
    depth = plans.Stairs(first=window, last=last, add=2, every=100 if small else 500)
    model = Looped(read_in=read_in, cell=Recur(core, Add(), norm=LayerNorm()), start=Zeros(), loops=last,
                   read_out=Head(outputs=1, norm=Identity()), remat=loop.PerLayer())
    objective = Objective(rolls={'window': Rollout(plans.Truncated(depth=depth, graded=window), keep=loop.Every())},
                          terms={'error': Weighted(1.0, Window(roll='window'))})
  else:
    model = Looped(read_in=read_in, cell=Plain(core), loops=1, read_out=Head(outputs=1, norm=LayerNorm()),
                   remat=loop.PerLayer())
    objective = Objective(rolls={'all': Rollout(plans.Uniform(1))}, terms={'error': Weighted(1.0, MSE(roll='all'))})
  return Experiment(
      name=f'{given["function"]} {given["kind"]} {given["layers"]}',
      model=model, objective=objective,
      task=Generated(of=of, grow=curriculum(given['function'], small, train.batch) if grow else Same(),
                     measure=measures.Errors(scale=of.scale)),
      train=train,
      optim=AdamW(schedule=WarmupCosine(peak=1e-3, end=1e-5, warmup=100) if small else
                  WSD(peak=1e-4, warmup=0, cooldown=0.0), b2=0.999, decay=0.0, clip=1.0 if small else 1e9),
      evals=Depths(budgets=(1, 2, 4, 6, 8, 12, 20, 50, 100) if kind else (1,)))


def curriculum(function: str, small: bool, batch: int) -> Grow:
  """Of dimensions and points (section 3.1); at `cpu` from 3 and 5, one more of both every 200 steps."""
  if small:
    rises = {'inputs': Rise(first=3, every=200 * batch), 'points': Rise(first=5, every=200 * batch)}
  else:
    first, _, add = POINTS[function]
    every = INTERVAL * batch
    rises = {'inputs': Rise(first=5, every=every), 'points': Rise(first=first, every=every, add=add)}
  return Grow(fields={name: rise for name, rise in rises.items() if name == 'points' or function != 'tree'})
