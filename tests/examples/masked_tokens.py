"""Tokens are masked, and told from all others at once: a loop that reads in both directions.

    python -m experiments.main --config=tests/examples/masked_tokens.py --workdir=runs/masked
"""
import jax
import jax.numpy as jnp

from loopformer import plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import MLP
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train
from loopformer.types import Batch, PlanContext, config_dataclass


@config_dataclass
class Masked:
  """Every token is hidden with a chance of its sequence's own, uniform in (0, 1), and asked for."""
  mask: int

  def __call__(self, context: PlanContext) -> Batch:
    tokens = context.batch['tokens']

    def hide(key):
      one, two = jax.random.split(key)
      return jax.random.uniform(two, tokens.shape[1:]) < jax.random.uniform(one)

    hidden = jax.vmap(hide)(context.keys())
    return {**context.batch, 'tokens': jnp.where(hidden, self.mask, tokens), 'targets': tokens,
            'weights': hidden.astype(jnp.float32)}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `loops=4`."""
  given = arguments(argument, loops=3)
  task = Generated(of=PHop(length=16), held_out=64)
  symbols = len(task.of.symbols)
  block = Block(attn=SelfAttention(heads=2, kernel=Bidirectional()), mlp=MLP(hidden=64))
  model = Looped(read_in=TokenEmbed(vocab=symbols + 1, width=32, length=task.length),
                 cell=Plain(Stack(block, 1)), loops=given['loops'])
  return Experiment(
      name='masked', model=model, task=task, evals=Depths(budgets=(given['loops'],)),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(given['loops']))}, prepare=Masked(mask=symbols),
                          terms={'masked': Weighted(1.0, CE(roll='all'))}),
      train=Train(steps=40, batch=16, eval_every=40, save_every=40, eval_batches=1),
      optim=AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=4)))
