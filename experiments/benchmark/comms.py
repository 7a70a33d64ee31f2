"""Bytes that a device sends in a training step, from compiled programs on simulated devices."""
from __future__ import annotations

import dataclasses
import functools
from typing import Any, Iterable

import jax
from jax.sharding import NamedSharding, PartitionSpec as P
import optax

from experiments.benchmark.sizes import MEGA, OPTIM, TRAIN_STEPS, Size, make_batch, make_model, with_short
from experiments.tools import estimate
from loopformer import plans, sharding
from loopformer.model import Looped, parameter_roles
from loopformer.objective import Objective
from loopformer.training.checkpoint import abstract
from loopformer.training.step import State, init_state, make_step
from loopformer.types import PlanContext


def comms_suite(size: Size, depths: Iterable[int] = (2, 8, 16), data: int = 2, fsdp: int = 4) -> dict[str, list[dict]]:
  """MB that a device sends in a step with two rollouts of all loops, by a ring, and how often the program does so."""
  mesh = sharding.Mesh(data=data, fsdp=fsdp).make()
  rows = []
  for loops in depths:
    deep = dataclasses.replace(size, loops=loops)
    model, objective = make_model(deep), with_short(deep, plans.Uniform(loops))
    roles = parameter_roles(model)
    optimizer = OPTIM.make(TRAIN_STEPS, roles)
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, 0))
    state = abstract(shapes, sharding.shardings(shapes, mesh, roles))
    over_rows = NamedSharding(mesh, P(sharding.BATCH))
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=over_rows)
             for name, leaf in make_batch(deep).items()}
    steps = {'ours': make_step(model, objective, optimizer, mesh),
             'automatic': automatic(model, objective, optimizer, mesh)}
    sent = {}
    for name, step in steps.items():
      program = estimate.Program(step.lower(state, batch).compile().as_text(), estimate.Steps(free=0.0, live=1.0))
      sent[name] = sum(program.sent.values()) / MEGA
    rows.append({'loops': loops, **{f'{name} MB': value for name, value in sent.items()},
                 'automatic / ours': sent['automatic'] / sent['ours'],
                 'MB of weights': 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) / MEGA})
  return {'comms': rows}


def automatic(model: Looped, objective: Objective, optimizer: Any, mesh: jax.sharding.Mesh) -> Any:
  """A training step on the same shardings that leaves all communication to the partitioner."""

  def step(state, batch):
    draw = PlanContext(key=jax.random.key(0), step=state.step, stage=jax.numpy.int32(0),
                       batch={**batch, 'row': jax.numpy.arange(batch['tokens'].shape[0])})
    weights = objective.denominators(draw.batch)
    (loss, _), grads = jax.value_and_grad(lambda params: objective(model, params, draw, weights), has_aux=True)(
        state.params)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    new = State(step=state.step + 1, params=optax.apply_updates(state.params, updates), optimizer=moments)
    return jax.lax.with_sharding_constraint(new, sharding.shardings(new, mesh, parameter_roles(model))), loss

  return jax.jit(step, donate_argnums=0)
