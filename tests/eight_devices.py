"""The sharded step against the unsharded one, on eight CPU devices; a program of its own: prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.eight_devices
"""
import json
import re

import jax
from jax.sharding import PartitionSpec as P
import jax.numpy as jnp
import numpy as np

from loopformer import sharding
from loopformer.optim import AdamW, WarmupCosine
from loopformer.sharding import Mesh
from loopformer.train import State, make_step
from tests import parts
from tests.test_terms import full_objective

LOOPS = 6
MODEL = parts.looped(parts.timed(), loops=LOOPS)
ROWS = 16
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')


def optimizer():
  # A large clip, so that the update shows the gradient's size, and a large eps, so that it is smooth in it.
  return AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=2), clip=1e3, eps=1e-2).make(10)


def state_on(mesh):
  params = parts.params(MODEL)
  state = State(step=jnp.int32(3), params=params, optimizer=optimizer().init(params))
  return jax.device_put(jax.tree.map(jnp.array, state), sharding.state_shardings(state, mesh))


def step_on(mesh, accumulate, loops: int = LOOPS):
  return make_step(MODEL, full_objective(loops), optimizer(), mesh, accumulate, seed=7)


def collectives(text: str) -> dict[str, int]:
  """How many collectives a compiled program has, and how many of them sit in a loop, directly or through calls."""
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
  inside = 0
  for name, lines in bodies.items():
    for line in lines:
      for op in COLLECTIVES:
        if re.search(rf' {op}(-start)?\(', line):
          found[op] += 1
          inside += name in looped
  return {**found, 'inside_loops': inside, 'loops': len(looped)}


def control(mesh) -> dict[str, int]:
  """A program whose loop does communicate: what `collectives` must be able to see."""
  def repeat(x):
    return jax.lax.scan(lambda x, _: (jax.lax.psum(jnp.tanh(x), 'fsdp'), None), x, length=50)[0]
  mapped = jax.shard_map(repeat, mesh=mesh, in_specs=P(sharding.AXES), out_specs=P(sharding.AXES), check_vma=False)
  return collectives(jax.jit(mapped).lower(jnp.ones((8, 64))).compile().as_text())


def compare(ours, theirs) -> float:
  """Largest difference, relative to the largest entry of the leaf or one."""
  pairs = zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(jax.device_get(theirs)))
  return max(float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b)))) for a, b in pairs)


def main():
  devices = jax.devices()
  assert len(devices) == 8, devices
  # Padding that is unequal between rows, and so between microbatches and devices.
  weights = (jnp.arange(parts.T)[None] < (1 + jnp.arange(ROWS)[:, None] % parts.T)).astype(jnp.float32)
  batch = parts.batch(ROWS, weights=weights)
  report = {'steps': {}, 'collectives': {}}
  alone = Mesh(data=1).make(devices[:1])
  expected = None
  runs = [(1, 1, 1), (1, 1, 4), (8, 1, 1), (8, 1, 2), (1, 8, 1), (1, 8, 2), (2, 4, 1), (2, 4, 2)]
  for data, fsdp, accumulate in runs:
    mesh = alone if data * fsdp == 1 else Mesh(data=data, fsdp=fsdp).make(devices)
    state = state_on(mesh)
    kernel = state.params['cell']['core']['block']['mlp']['up']['kernel']
    moment = jax.tree_util.tree_leaves_with_path(state.optimizer)
    moment = next(leaf for path, leaf in moment if 'mu' in str(path) and leaf.shape == kernel.shape)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    here = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    rows = sharding.put_batch(batch, mesh)
    placed = {'share': here / whole, 'kernel': list(kernel.addressable_shards[0].data.shape),
              'moment': list(moment.addressable_shards[0].data.shape),
              'rows': rows['tokens'].addressable_shards[0].data.shape[0]}
    # Optimised in full where the program is read below; the others are compiled sooner without.
    jax.config.update('jax_disable_most_optimizations', (data, fsdp) != (2, 4))
    compiled = step_on(mesh, accumulate).lower(state, rows).compile()
    new, values = compiled(state, rows)
    result = {'values': values, 'params': new.params, 'optimizer': new.optimizer}
    expected = jax.device_get(result) if expected is None else expected
    report['steps'][f'{data}x{fsdp}/{accumulate}'] = {
        'values': {name: float(value) for name, value in values.items()}, 'step': int(new.step),
        'error': {name: compare(result[name], expected[name]) for name in result},
        **placed,
        'stays': jax.tree.all(jax.tree.map(lambda leaf, s: leaf.sharding.is_equivalent_to(s, leaf.ndim), new,
                                           sharding.state_shardings(new, mesh)))}
    if (data, fsdp) == (2, 4):
      report['collectives'][f'{LOOPS}/{accumulate}'] = collectives(compiled.as_text())
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected['params'], jax.device_get(parts.params(MODEL)))
  report['moved'] = min(jax.tree.leaves(moved))
  mesh = Mesh(data=2, fsdp=4).make(devices)
  state, rows = state_on(mesh), sharding.put_batch(batch, mesh)
  report['collectives']['2/1'] = collectives(step_on(mesh, 1, loops=2).lower(state, rows).compile().as_text())
  report['control'] = control(mesh)
  print(json.dumps(report))


if __name__ == '__main__':
  main()
