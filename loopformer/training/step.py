"""The training step: one for every objective."""
from __future__ import annotations

import functools
from typing import Any, Callable

from flax import struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax

from loopformer import sharding
from loopformer.model import init_params, parameter_roles
from loopformer.roles import Roles
from loopformer.training import masters
from loopformer.types import Array, Params, PlanContext


@struct.dataclass
class State:
  """What a training step updates. step: i32[], steps taken."""
  step: Array
  params: Params
  optimizer: Any


def init_state(model: Any, optimizer: optax.GradientTransformation, seed: int) -> State:
  """A fresh state; run it under `jax.jit` with shardings, or `jax.eval_shape`."""
  params = init_params(model, jax.random.fold_in(jax.random.key(seed), 0))
  state = optimizer.init(params)
  return State(step=jnp.int32(0), params=masters.shortened(params, state), optimizer=state)


def _norms(grads: Params) -> dict[str, Array]:
  """The gradient's length, and that of every part of the model."""
  parts = {f'grad_norm/{name}': tree for name, tree in grads.items() if name != 'cell'}
  parts |= {f'grad_norm/cell/{name}': tree for name, tree in grads.get('cell', {}).items()}
  return {name: optax.tree.norm(tree) for name, tree in {'grad_norm': grads, **parts}.items()}


def make_step(model: Any, objective: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh,
              accumulate: int = 1, seed: int = 0) -> Callable[..., tuple[State, dict[str, Array]]]:
  """The compiled training step: (state, batch of global arrays, stage) -> (state, metrics f32[]); the state is donated.

  The gradient is taken inside a shard_map that is manual over data and fsdp: parameters are gathered once, all loops
  run on local weights, and each gradient is reduced once, whatever the number of loops. The tensor axis is left to the
  partitioner.

  `frozen`, a last argument, holds the weights of `objective.teachers`; they are gathered too, and have no gradient.

  Each of the `accumulate` microbatches draws plans of its own, as the papers' code does: they are all of one
  expectation, and cost the same. Microbatch i is part i of every device's rows; `sharding.put_batch` deals them.

  A batch may say with `row` i32[B] which sequence of the step each is (their order otherwise), and with `stop` f32[B]
  whether a process was told to stop, which all then learn from the metrics.
  """
  run_key, roles = jax.random.fold_in(jax.random.key(seed), 1), parameter_roles(model)
  teachers = Roles({(name, *path): role for name, teacher in objective.teachers.items()
                    for path, role in parameter_roles(teacher.model(model)).items()})
  optimizer = optax.with_extra_args_support(optimizer)
  divided = [name for name in sharding.BATCH if mesh.shape[name] > 1]  # XLA refuses sums over a single device

  def total(tree):
    return jax.lax.psum(tree, divided) if divided else tree

  def gather(leaf, partition):
    return sharding.gather(leaf, partition) if 'fsdp' in tuple(partition) else leaf

  def reduce(leaf, partition):
    if 'fsdp' not in tuple(partition):
      return total(leaf)
    mine = sharding.scatter(leaf, partition)
    return jax.lax.psum(mine, 'data') if 'data' in divided else mine

  def gradient(specs, frozen_specs, params, frozen, context):
    params, frozen = jax.tree.map(gather, params, specs), jax.tree.map(gather, frozen, frozen_specs)
    context = objective.prepared(context, frozen) if frozen else objective.prepared(context)
    weights = total(objective.denominators(context.batch))
    differentiated = jax.value_and_grad(lambda p, part: objective(model, p, part, weights, frozen), has_aux=True)

    def share(p, part):  # sums over microbatches and devices are in float32, whatever the parameters are in
      values, grads = differentiated(p, part)
      return values, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

    if accumulate == 1:
      (loss, terms), grads = share(params, context)
    else:
      numbered = jnp.arange(accumulate), jax.tree.map(
          lambda rows: rows.reshape(accumulate, -1, *rows.shape[1:]), context.batch)

      def of(number, rows):
        return share(params, context.microbatch(number, rows))

      zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype),
                          jax.eval_shape(of, *jax.tree.map(lambda leaf: leaf[0], numbered)))
      (loss, terms), grads = jax.lax.scan(
          lambda sums, part: (jax.tree.map(jnp.add, sums, of(*part)), None), zero, numbered)[0]
    return total({'loss': loss, **terms}), jax.tree.map(reduce, grads, specs)

  def step(state, batch, stage=0, frozen={}):
    stop = {name: batch[name].max() for name in ('stop',) if name in batch}
    rows = {'row': jnp.arange(batch['tokens'].shape[0]), **batch}
    context = PlanContext(key=jax.random.fold_in(run_key, state.step), step=state.step,
                          stage=jnp.asarray(stage, jnp.int32),
                          batch={name: leaf for name, leaf in rows.items() if name not in stop})
    specs, frozen_specs = sharding.specs(state.params, mesh, roles), sharding.specs(frozen, mesh, teachers)
    by_rows, frozen_by_rows = (
        jax.tree.map(lambda partition: sharding.only(partition, sharding.BATCH), tree)
        for tree in (specs, frozen_specs))
    every: Any = P()  # in the places of arrays
    divided_rows: Any = P(sharding.BATCH)
    mapped = jax.shard_map(
        functools.partial(gradient, specs, frozen_specs), mesh=mesh,
        in_specs=(by_rows, frozen_by_rows, PlanContext(every, every, every, divided_rows)),
        out_specs=(P(), by_rows), axis_names=set(sharding.BATCH), check_vma=False)
    values, grads = mapped(state.params, frozen, context)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params, stage=context.stage)
    params = optax.apply_updates(state.params, updates)
    new = State(step=state.step + 1, params=params, optimizer=optimizer_state)
    new = jax.lax.with_sharding_constraint(new, sharding.shardings(new, mesh, roles))
    return new, {**values, **stop, **_norms(grads)}

  return jax.jit(step, donate_argnums=0)
