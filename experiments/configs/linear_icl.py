"""The linear looped transformer: linear attention learns gradient descent on least squares (2410.08292, 2410.11268).

    python -m experiments.main --config=experiments/configs/linear_icl.py:loops=4 --workdir=runs/linear_icl

Argument: loops, then any of

    loops     L, the number that the error is taken after
    predict   label: of the query; weights: w* itself, in a state that is looped (section 2.3; P and Q are its V and W)
    inputs    d; examples: n, of every prompt
    rate      peak of the learning rate; steps: of training
    grow      the share of training in which loops are added, one by one; 0: all from the start

Z <- Z + (1/n) P Z M (Z^T Q Z) with the same P and Q in every loop; the prediction is -Z at the query's label. The
papers' exact parameterisations were not to be had (sheet, section 2.2). A loop is cubic in its state, so that one rare
prompt overflows many loops: from scratch, 8 loops ended in NaN in four of six runs, at rates from 1e-3 to 1e-2 with the
clip. Growing mends it. `constructive` and `constructive_weights` give parameters that are gradient descent. The variant
that predicts the weights by a chain of thought, a column a step, is experiments/studies/linear_cot.py. Measured figures (of
labels): experiments/reports/linear_icl/.
"""
from flax import linen as nn
import jax.numpy as jnp

from loopformer import loop, plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments, choose
from loopformer.inference import measures
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.papers.linear_icl import attention
from loopformer.papers.linear_icl.attention import LabelHead, LinearAttention, Prompt
from loopformer.tasks.descent import LinearPrompt, WeightPrompt
from loopformer.tasks.generated import Generated
from loopformer.terms.squared import MSE
from loopformer.training.train import Train
from loopformer.types import Array, ConfigError


class AsGiven(nn.Module):
  """e = the tokens, examples and at last a thought (0_d, 0, w, 1); no parameters. width: 2 d + 2."""
  width: int
  length: int
  dtype = 'float32'
  vocab = 0

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """f32[B, n + 1, 2 d + 2] -> the same."""
    return tokens

  def example(self) -> Array:
    """The smallest input, for initialisation."""
    return jnp.zeros((1, 2, self.width))


class StateHead(nn.Module):
  """answer = the state; no parameters."""

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda: nothing."""
    return x

  def __call__(self, x: Array) -> Array:
    return x

  def table(self, read_in: nn.Module) -> Array:
    """The head's matrix, [D, D]."""
    return jnp.eye(read_in.width)

  def outputs_of(self, read_in: nn.Module) -> int:
    """Rows of that matrix."""
    return read_in.width


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `4,inputs=5,examples=20`."""
  given = arguments(argument, loops=4, predict='label', inputs=5, examples=20, rate=1e-2, steps=1500, grow=0.5)
  loops, rate, steps, grow = (given[name] for name in ('loops', 'rate', 'steps', 'grow'))
  for name, least in {'loops': 1, 'inputs': 1, 'examples': 1, 'steps': 2}.items():
    if given[name] < least:
      raise ConfigError(f'config argument {name} = {given[name]}: must be {least} or more')
  if not rate > 0:
    raise ConfigError(f'config argument rate = {rate}: must be above 0')
  if not 0 <= grow < 1:
    raise ConfigError(f'config argument grow = {grow}: a share of training, from 0 to less than 1')
  sizes = dict(inputs=given['inputs'], examples=given['examples'])
  label = choose('predict', given['predict'], {'label': True, 'weights': False})
  of = LinearPrompt(**sizes) if label else WeightPrompt(**sizes)
  read_in = (Prompt(width=of.inputs + 1, length=of.length) if label else
             AsGiven(width=2 * of.inputs + 2, length=of.length))
  model = Looped(read_in=read_in, cell=Plain(Stack(LinearAttention(), 1)),
                 read_out=LabelHead() if label else StateHead(), loops=loops, remat=loop.KeepAll())
  plan = plans.Uniform(loops)
  if grow and loops > 1:
    every = max(1, int(grow * steps / (loops - 1)))
    plan = plans.Truncated(depth=plans.Stairs(first=1, last=loops, add=1, every=every), graded=loops)
  return Experiment(
      name=f'linear looped {loops}' + ('' if label else ' weights'),
      model=model, objective=Objective(rolls={'all': Rollout(plan)}, terms={'error': Weighted(1.0, MSE(roll='all'))}),
      task=Generated(of=of, held_out=4096, measure=measures.Errors(scale=of.scale)),
      train=Train(steps=steps, batch=256, log_every=100, eval_every=500, eval_batches=16, save_every=500),
      optim=AdamW(schedule=WarmupCosine(peak=rate, end=rate / 100, warmup=min(50, steps // 2)), b2=0.999, decay=0.0,
                  clip=1.0),
      evals=Depths(budgets=(1, 2, 3, 4, 6, 8, 12)))


def constructive(inputs: int, rate: float, preconditioner=None) -> dict:
  """Parameters of the model with which L loops are L steps of gradient descent; see `linear.constructive`."""
  return _params(attention.constructive(inputs, rate, preconditioner))


def constructive_weights(inputs: int, rate: float) -> dict:
  """The same where the weights are predicted: V_31 = -rate I, W_13 = I, W_24 = -1, all else zero (section 2.3)."""
  d, size = inputs, 2 * inputs + 2
  zero = jnp.zeros((size, size))
  return _params({'P': zero.at[d + 1:-1, :d].set(-rate * jnp.eye(d)),
                  'Q': zero.at[:d, d + 1:-1].set(jnp.eye(d)).at[d, -1].set(-1)})


def _params(weights):
  return {'cell': {'core': {'block': {name: weight[None] for name, weight in weights.items()}}}}
