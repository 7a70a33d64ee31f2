"""The sharded step against the unsharded one, on eight CPU devices; a program of its own: prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.eight_devices
"""
import dataclasses
import itertools
import json
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from loopformer import backend, plans, sharding
from loopformer.model import init_params, parameter_roles
from loopformer.nn import kernels as nn_kernels
from loopformer.nn.inject import Diagonal
from loopformer.nn.kernels import Blockwise, Fused
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.sharding import Mesh
from loopformer.terms.cross_entropy import CE
from loopformer.training.step import State, make_step
from tests import parts
from tests.terms.test_terms import full_objective

LOOPS = 6
MODEL = parts.looped(parts.timed(heads=8), loops=LOOPS)
FREE = parts.looped(parts.recur(Diagonal(), Stack(parts.block(RMSNorm(), heads=8), parts.N)), loops=LOOPS)
ROWS = 16
SETUPS = {'loopformer': (MODEL, full_objective), 'free': (FREE, lambda loops: Objective(
    rolls={'r': Rollout(plans.Truncated(depth=plans.Poisson(average=loops), graded=2, over=plans.PerSequence()))},
    terms={'lm': Weighted(1.0, CE(roll='r', chunk=8))}))}
RUNS = [('loopformer', 1, 1, 1, 1), ('loopformer', 1, 1, 1, 2), ('loopformer', 8, 1, 1, 2), ('loopformer', 1, 8, 1, 1),
        ('loopformer', 2, 4, 1, 1), ('loopformer', 2, 2, 2, 1), ('loopformer', 2, 2, 2, 2), ('loopformer', 1, 1, 8, 1),
        ('free', 1, 1, 1, 1), ('free', 2, 4, 1, 1), ('free', 2, 2, 2, 1), ('free', 2, 2, 2, 2)]
# Programs are read at few loops, where they run too, and at many.
READ = [(setup, *mesh, 1) for setup in SETUPS for mesh in ((2, 4, 1), (2, 2, 2))]
MANY = 16
PROGRAMS = [*READ, ('loopformer', 2, 4, 1, 2)]
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


def optimizer(model):
  # A large clip, so that the update shows the gradient's size, and a large eps, so that it is smooth in it.
  return AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=2), clip=1e3, eps=1e-2).make(
      10, parameter_roles(model))


def alone(setup: str, accumulate: int) -> str:
  """The run on one device that another is compared with: microbatches draw plans of their own, but what is drawn for a
  sequence (`free`) does not depend on them."""
  return f'{setup} 1x1x1/{1 if setup == "free" else accumulate}'


def state_on(mesh, model=MODEL):
  params = parts.params(model)
  state = State(step=jnp.int32(3), params=params, optimizer=optimizer(model).init(params))
  return jax.device_put(jax.tree.map(jnp.array, state), sharding.shardings(state, mesh, parameter_roles(model)))


def step_on(mesh, accumulate, loops: int = LOOPS, setup: str = 'loopformer'):
  model, objective = SETUPS[setup]
  return make_step(model, objective(loops), optimizer(model), mesh, accumulate, seed=7)


def numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]


def ids(dims: str, order: str | None) -> np.ndarray:
  """All devices, as an array of these dimensions that is then transposed."""
  grid = np.arange(np.prod(numbers(dims))).reshape(numbers(dims))
  return grid.transpose(numbers(order)) if order else grid


def axes_of(line: str, mesh) -> str:
  """The axes of the mesh along which a collective's devices differ, such as 'data fsdp'.

  XLA writes groups of devices in three ways: as lists, as a reshaped and transposed range, and as axes of a grid.
  """
  listed = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  ranged = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
  gridded = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}",
                      line)
  if listed:
    first = numbers(listed[1])
  elif ranged:
    first = ids(ranged[2], ranged[3]).reshape(numbers(ranged[1]))[0].tolist()
  elif gridded:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", gridded[1]))
    grid = ids(gridded[2] or str(mesh.size), gridded[3]).reshape([int(n) for n in sizes.values()])
    first = grid[tuple(slice(None) if f"'{name}'" in gridded[4] else 0 for name in sizes)].ravel().tolist()
  elif 'replica_groups={}' in line:  # none named: all
    first = list(range(mesh.size))
  else:
    raise AssertionError(f'no groups are found in: {line}')
  places = np.array([np.argwhere(np.vectorize(lambda d: d.id)(mesh.devices) == device)[0] for device in first])
  return ' '.join(name for name, column in zip(mesh.axis_names, places.T) if len(set(column.tolist())) > 1)


def collectives(text: str, mesh) -> dict[str, int]:
  """How many collectives over data or fsdp a compiled program has, and how many of them sit in a loop, directly or
  through calls; those over tensor alone, which a layer needs, are counted apart."""
  bodies, name = {}, None
  for line in text.splitlines():
    head = re.match(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if head:
      name = head[1]
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  found = {op: 0 for op in COLLECTIVES}
  called, looped = {}, set()
  for name, lines in bodies.items():
    called[name] = set()
    for line in lines:
      refers = re.findall(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)', line)
      for group in re.findall(r'(?:branch_computations|calls)=\{([^}]*)\}', line):
        refers += [word.strip().lstrip('%') for word in group.split(',')]
      called[name] |= {r for r in refers if r in bodies}
      if re.search(r' while\(', line):
        looped |= {r for r in refers if r in bodies}
  pending = list(looped)
  while pending:
    for inner in called[pending.pop()] - looped:
      looped.add(inner)
      pending.append(inner)
  inside = tensor = 0
  for name, lines in bodies.items():
    for line in lines:
      for op in COLLECTIVES:
        match = re.search(rf' = (.*) {op}(-start)?\(', line)
        if match:
          if op != 'collective-permute' and axes_of(line, mesh) not in ('', 'tensor'):
            found[op] += len(re.findall(r'\w\[', match[1]))  # arrays, several of which may share one
            inside += name in looped
          else:
            tensor += 1
  return {**found, 'inside_loops': inside, 'loops': len(looped), 'tensor': tensor}


def control(mesh) -> dict[str, int]:
  """A program whose loop does communicate: what `collectives` must be able to see."""
  def repeat(x):
    return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.tanh(x), 'fsdp'), None), x, length=50)[0]
  mapped = jax.shard_map(repeat, mesh=mesh, in_specs=P(sharding.BATCH), out_specs=P(sharding.BATCH), check_vma=False)
  return collectives(jax.jit(mapped).lower(jnp.ones((8, 64))).compile().as_text(), mesh)


def compare(ours, theirs) -> float:
  """Largest difference, relative to the largest entry of the leaf or one."""
  pairs = zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)))
  return max(float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))) for a, b in pairs)


def kernels(devices) -> dict[str, dict]:
  """What a kernel that no partitioner divides sees of rows and heads on a device, and how far its results are from
  those of one device. What runs in the place of cuDNN's and of splash attention is plain attention, with their
  arguments.
  """
  mesh = Mesh(data=2, fsdp=2, tensor=2).make(devices)
  found, seen = {}, []

  def attend(*args):
    seen.append(args[0].shape)
    return Blockwise()(*args)

  def cudnn(q, k, v, mask, is_causal, implementation):
    assert is_causal and implementation == 'cudnn'
    seen.append(q.shape)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation='xla')

  def splash(self, q, k, v, seg):
    return attend(q * q.shape[-1] ** 0.5, k, v, seg)

  kinds = {'plain': ('cpu', lambda *args: sharding.by_rows_and_heads(attend, *args), 6, jnp.float32),
           'cudnn': ('gpu', Fused(), 6, jnp.bfloat16), 'splash': ('tpu', Fused(), 128, jnp.float32)}
  for (kind, (name, kernel, length, dtype)), (where, rows, groups, inside) in itertools.product(
      kinds.items(), (('evaluating', 8, 2, False), ('odd', 3, 1, False), ('training', 8, 2, True))):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((rows, length, heads, 8)), dtype) for heads in (4, groups, groups))
    seg = jnp.asarray(rng.integers(0, 2, (rows, length)).cumsum(1))
    divided = kernel
    if inside:
      divided = jax.shard_map(kernel, mesh=mesh, in_specs=P(sharding.BATCH), out_specs=P(sharding.BATCH),
                              axis_names=set(sharding.BATCH), check_vma=False)
    with (jax.set_mesh(mesh), backend.compiling_for(name), mock.patch.object(nn_kernels.Splash, '_attend', splash),
          mock.patch.object(nn_kernels, 'jax', wraps=jax, nn=mock.Mock(dot_product_attention=cudnn))):
      out = jax.device_get(jax.jit(lambda *args: divided(*args))(q, k, v, seg))
    error = jnp.abs(out.astype(jnp.float32) - Blockwise()(q, k, v, seg).astype(jnp.float32)).max()
    found[f'{kind} {where}'] = {'seen': seen[-1], 'error': float(error)}
  return found


def staged(devices) -> dict[str, Any]:
  """A sum that is scattered over all devices, for a backend that does it in one stage and one that does it in two."""
  mesh, found = Mesh(fsdp=8).make(devices), {}
  x = jnp.asarray(np.random.default_rng(0).standard_normal((64, 16, 3)), jnp.float32)
  for name in ('cpu', 'tpu'):
    few = dataclasses.replace(backend.BACKENDS[name], largest_scatter=4 if name == 'tpu' else None)
    with backend.compiling_for(name), mock.patch.dict(backend.BACKENDS, {name: few}):
      scatter = jax.jit(jax.shard_map(lambda x: sharding.scatter(x, P(None, 'fsdp')), mesh=mesh, in_specs=P('fsdp'),
                                      out_specs=P(None, 'fsdp'), axis_names=set(sharding.BATCH), check_vma=False))
      found[name] = jax.device_get(scatter(x))
      found[f'{name} scatters'] = scatter.lower(x).compile().as_text().count(' reduce-scatter(')
  return {'error': float(np.abs(found['tpu'] - found['cpu']).max()), 'size': float(np.abs(found['cpu']).max()),
          'scatters': [found['cpu scatters'], found['tpu scatters']]}


def uneven(devices) -> dict[str, Any]:
  """Two steps of a model with matrices that eight devices do not divide along an axis: held in parts all the same."""
  model = parts.looped(parts.plain(heads=2), loops=3)
  model = model.clone(read_in=model.read_in.clone(width=12))
  objective = SETUPS['free'][1](3)
  objective = Objective(rolls={'r': Rollout(plans.Uniform(3))}, terms=objective.terms)
  found, params = {}, jax.jit(lambda: init_params(model, jax.random.key(0)))()
  with mock.patch.object(sharding, 'LARGE', 100):
    for name, mesh in (('one', Mesh(data=1).make(devices[:1])), ('eight', Mesh(fsdp=8).make(devices))):
      state = State(step=jnp.int32(0), params=params, optimizer=optimizer(model).init(params))
      places = sharding.shardings(state, mesh, parameter_roles(model))
      state = jax.device_put(jax.tree.map(jnp.array, state), places)
      step = make_step(model, objective, optimizer(model), mesh)
      for _ in range(2):
        state, _ = step(state, sharding.put_batch(parts.batch(ROWS), mesh))
      found[name] = jax.device_get(state.params)
    kernel = state.params['cell']['core']['block']['attn']['out']['kernel']
    stays = jax.tree.all(jax.tree.map(lambda leaf, own: leaf.sharding.is_equivalent_to(own, leaf.ndim), state, places))
  return {'error': compare(found['eight'], found['one']), 'kernel': list(kernel.shape), 'stays': stays,
          'part': list(kernel.addressable_shards[0].data.shape)}


def main():
  devices = jax.devices()
  assert len(devices) == 8, devices
  # Padding that is unequal between rows, and so between microbatches and devices.
  weights = (jnp.arange(parts.T)[None] < (1 + jnp.arange(ROWS)[:, None] % parts.T)).astype(jnp.float32)
  batch = parts.batch(ROWS, weights=weights)
  report = {'steps': {}, 'collectives': {}, 'moved': {}}
  single, expected = Mesh(data=1).make(devices[:1]), {}
  for setup, data, fsdp, tensor, accumulate in RUNS:
    model = SETUPS[setup][0]
    mesh = single if data * fsdp * tensor == 1 else Mesh(data=data, fsdp=fsdp, tensor=tensor).make(devices)
    state = state_on(mesh, model)
    kernel = state.params['cell']['core']['block']['mlp']['up']['kernel']
    moment = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moment = next(leaf for path, leaf in moment if 'mu' in str(path) and leaf.shape == kernel.shape)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    rows = sharding.put_batch({**batch, 'row': np.arange(ROWS)}, mesh, accumulate)
    placed = {'share': here / whole, 'kernel': list(kernel.addressable_shards[0].data.shape),
              'moment': list(moment.addressable_shards[0].data.shape),
              'rows': rows['tokens'].addressable_shards[0].data.shape[0]}
    read = (setup, data, fsdp, tensor, accumulate) in READ
    jax.config.update('jax_disable_most_optimizations', not read)  # optimised in full where the program is read
    step = step_on(mesh, accumulate, setup=setup).lower(state, rows).compile()
    if read:
      report['collectives'][f'{setup} {data}x{fsdp}x{tensor}/{accumulate} {LOOPS}'] = collectives(step.as_text(), mesh)
    new, values = step(state, rows)
    result = {'values': values, 'params': new.params, 'optimizer': new.optimizer}
    name = f'{setup} {data}x{fsdp}x{tensor}/{accumulate}'
    beside = expected.setdefault(alone(setup, accumulate), jax.device_get(result))
    report['steps'][name] = {
        'values': {name: float(value) for name, value in values.items()}, 'step': int(new.step),
        'error': {part: compare(result[part], beside[part]) for part in result},
        **placed,
        'stays': jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), new,
                                           sharding.shardings(new, mesh, parameter_roles(model))))}
  for setup, (model, _) in SETUPS.items():
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected[alone(setup, 1)]['params'],
                         jax.device_get(parts.params(model)))
    report['moved'][setup] = min(jax.tree.leaves(moved))
  jax.config.update('jax_disable_most_optimizations', False)
  for setup, data, fsdp, tensor, accumulate in PROGRAMS:
    mesh = Mesh(data=data, fsdp=fsdp, tensor=tensor).make(devices)
    state, rows = state_on(mesh, SETUPS[setup][0]), sharding.put_batch(batch, mesh)
    text = step_on(mesh, accumulate, MANY, setup).lower(state, rows).compile().as_text()
    divided = sum('fsdp' in tuple(partition) for partition in jax.tree.leaves(
        sharding.specs(state.params, mesh, parameter_roles(SETUPS[setup][0])),
        is_leaf=lambda leaf: isinstance(leaf, P)))
    report['collectives'][f'{setup} {data}x{fsdp}x{tensor}/{accumulate} {MANY}'] = {
        **collectives(text, mesh), 'divided': divided}
  report['kernels'], report['staged'] = kernels(devices), staged(devices)
  report['uneven'] = uneven(devices)
  report['control'] = control(Mesh(data=2, fsdp=4).make(devices))
  print(json.dumps(report))


if __name__ == '__main__':
  main()
