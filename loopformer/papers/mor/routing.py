"""Around routers: the pass of training as it is measured, what routers do on data, and biases that move by load.

Of a model with cells/cell.py an evaluation tells two losses: that of its answers, which choose tokens causally, and,
as a run of the configuration, that of the pass which training makes:

    evals=Named(budgets=(3,), runs={'as trained': Run(plan=plans.Uniform(3), exit=AsTrained())})
"""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from loopformer.model import make_readout, run_batch
from loopformer.papers.mor.terms import loads
from loopformer.roles import Roles
from loopformer.training.frozen import Freeze
from loopformer.types import Array, Batch, ConfigError, Params, Plan, Readout, Trace, config_dataclass


@config_dataclass
class AsTrained:
  """The last state of the pass that a training step makes: starts are drawn, and routers look at later tokens."""
  seed: int = 0
  threshold, decides = None, False

  def run(self, model: Any, params: Params, batch: Batch, plan: Plan, threshold: Array | None) -> tuple[Trace, Readout]:
    """As exits.Final.run."""
    trace = learning(model, params, batch, plan, self.seed)
    steps = jnp.broadcast_to(plan.steps if plan.active is None else plan.active.sum(0), trace.z.shape[:1])
    return dataclasses.replace(trace, steps=steps, aux={'ran': steps.max()}), make_readout(model, params, batch)


def learning(model: Any, params: Params, batch: Batch, plan: Plan, seed: int = 0) -> Trace:
  """The pass that a training step makes."""
  keys = jax.random.split(jax.random.key(seed), len(batch['tokens']))
  return run_batch(model, params, batch, plan, noise=keys)


@functools.partial(jax.jit, static_argnums=0)
def _sums(model, params, batch, plan):
  learns = learning(model, params, batch, plan).aux
  answers = run_batch(model, params, batch, plan).aux
  agrees = (learns['causal'] == learns['taken']) & learns['candidate']
  return {'candidates': learns['candidate'].sum((1, 2)), 'agrees': agrees.sum((1, 2)),
          'tokens': answers['candidate'][0].sum(), 'taken': answers['taken'].sum((1, 2)),
          'load': loads(answers['taken']), 'chosen': learns['taken'].sum(1), 'let through': answers['taken'].sum(1)}


def routing(model: Any, params: Params, batches: Iterable[Batch], plan: Plan) -> dict[str, Any]:
  """What routers do on data, a list of K numbers where not said otherwise.

  Returns:
    accuracy: of the answering choice against that of training, over a recursion's candidates (sampling accuracy).
    through: the part of all tokens, without padding, that take each recursion in answers; depth: a number, its sum.
    dead: a number, the part of positions that training never takes to the last recursion in any of the sequences;
      dead answers: the same of answers.
    entropy: a number, nats, of where in a sequence the last recursion's tokens lie; log T if anywhere alike.
    load: the part of tokens whose last recursion it is, in answers; MaxVio: a number, (most - mean) / mean of these.
  """
  total: dict[str, Any] = {}
  for batch in batches:
    for name, value in jax.device_get(_sums(model, params, batch, plan)).items():
      total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
  load, last = total['load'], total['chosen'][-1]
  law = last / max(last.sum(), 1)
  through = total['taken'] / total['tokens']
  return {'accuracy': (total['agrees'] / np.maximum(total['candidates'], 1)).tolist(), 'through': through.tolist(),
          'depth': float(through.sum()), 'dead': float((last == 0).mean()),
          'dead answers': float((total['let through'][-1] == 0).mean()),
          'entropy': float(-(law[law > 0] * np.log(law[law > 0])).sum()),
          'load': (load / total['tokens']).tolist(), 'MaxVio': max_violation(load)}


def max_violation(load: Any) -> float:
  """(most - mean) / mean of loads: 0 where they are alike."""
  load = np.asarray(load, np.float64)
  return float((load.max() - load.mean()) / max(load.mean(), 1e-9))


@config_dataclass
class LossFree:
  """`of`, and for the bias of a TokenChoice router b_i += rate * sign(mean load - load_i) after every update.

  The loads come as the gradient of the term LoadBias. `of` neither sees the bias nor clips by it.
  """
  of: Any
  rate: float = 0.001
  path: str = 'cell/router/bias'

  def __post_init__(self):
    if self.rate <= 0:
      raise ConfigError(f'optim.rate = {self.rate}: what a bias moves by in an update, above 0')

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """As optim.AdamW.make."""
    signs = optax.stateless(lambda updates, _: jax.tree.map(lambda g: -self.rate * jnp.sign(g), updates))
    return optax.partition({'keep': self.of.make(steps, roles), 'learn': signs},
                           Freeze(of=None, paths=(self.path,)).routes)
