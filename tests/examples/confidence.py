"""A head that tells how sure each loop is, supervised at random loops, on a pretrained decoder that is looped.

    model = loopformer.load('SmolLM2-135M', loops=4, prelude=5, coda=5)
    looped, objective = sure(model.model)
"""
from flax import linen as nn
import jax
import jax.numpy as jnp

from loopformer import loop, plans
from loopformer.cells.cell import Around
from loopformer.model import Looped
from loopformer.nn.layers import Linear, Normal
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.terms.cross_entropy import CE, token_nll
from loopformer.types import Batch, PlanContext, config_dataclass


class Confident(Around):
  """The step of another cell, and aux['sure'] f32[B, T], the logit of being right."""
  head: nn.Module = Linear(1, std=0.0, bias=Normal(0.0))

  def __call__(self, x, e, ctx, kv):
    x, kv, aux = self.inner(x, e, ctx, kv)
    return x, kv, {**aux, 'sure': self.head(jax.lax.stop_gradient(self.output(x)).astype(jnp.float32))[..., 0]}


@config_dataclass
class RandomLoops:
  """Says of each sequence which loop is supervised: batch['loop'] i32[B]."""
  loops: int

  def __call__(self, context: PlanContext) -> Batch:
    return {**context.batch, 'loop': jax.vmap(lambda key: jax.random.randint(key, (), 0, self.loops))(context.keys())}


@config_dataclass
class Calibrated:
  """Binary cross-entropy of the head at the supervised loop: its probability is that of the right token."""
  roll: str
  weight = CE.weight

  @property
  def reads(self):
    return (self.roll,)

  def __call__(self, rolls, batch, readout, params):
    trace, row = rolls[self.roll], jnp.arange(len(batch['loop']))
    nll = token_nll(readout.read(trace.xs[batch['loop'], row]), readout.table, batch['targets'], dtype=readout.dtype)
    logit, right = trace.aux['sure'][batch['loop'], row], jnp.exp(-nll)
    return -jnp.sum((right * jax.nn.log_sigmoid(logit) + (1 - right) * jax.nn.log_sigmoid(-logit)) * batch['weights'])


def sure(model: Looped) -> tuple[Looped, Objective]:
  """The model with a head at the end of every loop, and what it learns from."""
  terms = {'lm': Weighted(1.0, CE(roll='all')), 'sure': Weighted(1.0, Calibrated(roll='all'))}
  rolls = {'all': Rollout(plans.Uniform(model.loops), keep=loop.Every())}
  return (model.clone(cell=Confident(model.cell)),
          Objective(rolls=rolls, terms=terms, prepare=RandomLoops(loops=model.loops)))
