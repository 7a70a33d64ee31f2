"""Programs compiled ahead of time for machines that are not here, by the compilers of these machines.

    python -m experiments.main --mode=plan --config=experiments/configs/loopformer.py:paper --topology=v5e:4x4 \
      --set mesh.fsdp=16 --set train.accumulate=10 [--program=train|eval|prefill|decode] [--rows=64]

The real programs of the library are compiled for the devices of `topologies.find`, without one of them and without
data. Of the compiled program: memory at its peak, or the compiler's refusal; collectives; copies; kernels. Of the
traced one: arithmetic and traffic, which compilers' own counts take for one pass of every loop (as in estimate.py).
"""
from __future__ import annotations

import collections
import dataclasses
import functools
import time
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from experiments.tools import estimate, hlo, topologies
from loopformer import backend, config as configs, plans, sharding
from loopformer.inference import engine, evaluate, exits, flat, sampling
from loopformer.model import parameter_roles, parameter_shapes
from loopformer.training import metrics
from loopformer.training.checkpoint import abstract
from loopformer.training.step import init_state, make_step
from loopformer.types import ConfigError, config_dataclass

GIGA = 1e9
EFFORT = -1.0  # of 0, what a run takes: an eighth of the time, peaks within -17 to +6 % (docs/plan.md)


@config_dataclass
class Built:
  """A program, and what to call it with.

  call: a jitted function; arguments: shapes with their shardings, and what is static; tokens: that it reads or writes;
  steps: of its branches and loops; state: bytes of a device that are read and written once besides what products read.
  model_flops: of all devices, nothing twice; uneven: lines about parameters that fsdp does not divide.
  """
  call: Callable[..., Any]
  arguments: tuple[Any, ...]
  told: str
  tokens: int
  steps: hlo.Steps
  state: float
  model_flops: float
  uneven: tuple[str, ...] = ()
  keywords: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def trace(self, mesh: jax.sharding.Mesh) -> Any:
    """Traced over the mesh, for the backend of the context."""
    with jax.set_mesh(mesh):
      return self.call.trace(*self.arguments, **self.keywords)


@config_dataclass
class Compiled:
  """A program on one device of a topology.

  peak, arguments: bytes; program: its text, read; flops, traffic: by the traced program; seconds: of the compilation.
  """
  built: Built
  topology: topologies.Topology
  mesh: Mapping[str, int]
  peak: int
  arguments: int
  program: hlo.Program
  flops: float
  traffic: float
  seconds: float

  @property
  def accelerator(self) -> metrics.Accelerator:
    """The data sheet of its devices."""
    return metrics.ACCELERATORS[self.topology.accelerator]

  def least(self) -> dict[str, float]:
    """The least time of a call, s, by what it is spent on."""
    sent = sum(count / self.accelerator.speed(apart) for (_, _, apart), count in self.program.sent.items())
    return {'compute': self.flops / self.accelerator.flops, 'memory': self.traffic / self.accelerator.bandwidth,
            'interconnect': sent}


# The programs --------------------------------------------------------------------------------------------------------


def training(config: Any, mesh: jax.sharding.Mesh, rows: int, room: float) -> Built:
  """A training step."""
  options, model = config.train, config.model
  sharding.check_batch(options.batch, options.accumulate, mesh)
  roles = parameter_roles(model)
  optimizer = config.optim.make(options.steps, roles)
  state = jax.eval_shape(functools.partial(init_state, model, optimizer, options.seed))
  example = estimate.rows_of(config.task)
  each = options.batch // options.accumulate // sharding.row_parts(mesh)
  tokens = options.batch * config.task.length
  return Built(
      call=make_step(model, config.objective, optimizer, mesh, options.accumulate, options.seed),
      arguments=(_placed(state, mesh, roles), _batch(example, options.batch, mesh)),
      keywords={'frozen': estimate.teachers_of(config, model, mesh)},
      told=f'a step of {tokens:,} tokens, {each} rows a device at a time',
      tokens=tokens, steps=estimate.expected(config.objective, example, each, options.steps),
      state=2.0 * sharding.bytes_of(state, mesh, roles), uneven=tuple(estimate.undivided(state.params, mesh, roles)),
      model_flops=config.objective.flops(model, config.task.length) * tokens)


def scoring(config: Any, mesh: jax.sharding.Mesh, rows: int, room: float) -> Built:
  """An evaluation of `rows` sequences with all loops; weights whole over fsdp, if twice as much fits into `room`, bytes
  of a device, and divided if not, as `sharding.gathered` has them."""
  model, measure, length = config.model, config.task.measure, config.task.length
  rows = -(-rows // sharding.row_parts(mesh)) * sharding.row_parts(mesh)

  def asked(batch):
    batch = measure.asked(batch)
    return batch, measure.told(plans.schedule(plans.resolve(model.loops)), batch)

  batch, schedule = jax.eval_shape(asked, _batch(estimate.rows_of(config.task), rows, mesh, stop=False))
  rows = len(batch['tokens'])  # several of a sequence, where a measure draws several masks of it
  batch = abstract(batch, jax.tree.map(lambda leaf: NamedSharding(mesh, P(sharding.BATCH)), batch))
  exit_policy, threshold = exits.compiled(evaluate.Run(plan=None).exit)
  shapes = parameter_shapes(model)
  roles = parameter_roles(model)
  divided = 2 * sharding.bytes_of(shapes, mesh, roles, ('tensor',)) > room
  params = abstract(shapes, sharding.shardings(shapes, mesh, roles, sharding.AXES if divided else ('tensor',)))
  return Built(
      call=evaluate.score, arguments=(model, measure, exit_policy, params, batch, schedule,
                                      jax.ShapeDtypeStruct((model.outputs,), jnp.int32), threshold),
      told=f'{rows} sequences of {length} tokens', tokens=rows * length, steps=hlo.Steps(free=model.loops, live=1.0),
      state=0.0, model_flops=model.flops(length, model.loops) * rows * length)


def reading(config: Any, mesh: jax.sharding.Mesh, rows: int, room: float) -> Built:
  """Prompts of half the model's positions, of `rows` requests at once."""
  model, params, state = _serving(config, mesh, rows)
  count, width = state.place.shape[0], max(config.model.read_in.length // 2, 1)
  new = jax.eval_shape(lambda: engine.PrefillBatch(
      row=jnp.zeros(count, jnp.int32), tokens=jnp.zeros((count, width), jnp.int32), lengths=jnp.ones(count, jnp.int32),
      source=jnp.zeros(count, jnp.int32), shared=jnp.zeros(count, jnp.int32), plan=_all_loops(model, count),
      seed=jnp.zeros(count, jnp.uint32), number=jnp.zeros(count, jnp.uint32), control=_controls(count),
      left=jnp.ones(count, jnp.int32)))
  return Built(
      call=engine.prefill, arguments=(model, params, state, new, None, _integer(), mesh),
      told=f'{count} prompts of {width} tokens', tokens=count * width,
      steps=hlo.Steps(free=config.model.loops, live=1.0), state=0.0,
      model_flops=config.model.flops(width, config.model.loops) * count * width)


def writing(config: Any, mesh: jax.sharding.Mesh, rows: int, room: float) -> Built:
  """One token of every one of `rows` requests, with caches for all positions of the model."""
  model, params, state = _serving(config, mesh, rows)
  count, length = state.place.shape[0], config.model.read_in.length
  return Built(
      call=engine.decode,
      arguments=(model, 1, 0, None, params, state, None, None, _integer(), jax.ShapeDtypeStruct((), bool), mesh),
      told=f'a token of {count} requests, {length} positions in the caches', tokens=count,
      steps=hlo.Steps(free=config.model.loops, live=1.0, outer=1.0), state=0.0,
      model_flops=config.model.flops(2 * length, config.model.loops) * count)


PROGRAMS = {'train': training, 'eval': scoring, 'prefill': reading, 'decode': writing}


def _placed(tree, mesh, roles):
  return abstract(tree, sharding.shardings(tree, mesh, roles))


def _batch(example, rows, mesh, stop=True):
  over_rows = NamedSharding(mesh, P(sharding.BATCH))
  leaves = {**example, 'row': np.int32(0), **({'stop': np.float32(0)} if stop else {})}
  return {name: jax.ShapeDtypeStruct((rows, *np.shape(leaf)), np.asarray(leaf).dtype, sharding=over_rows)
          for name, leaf in leaves.items()}


def _serving(config, mesh, rows):
  """(model, parameters, rows) as an Engine holds them: shapes with their shardings, weights whole over fsdp."""
  found, count = {}, -(-rows // sharding.row_parts(mesh)) * sharding.row_parts(mesh)

  def make(params):
    found['model'], params = flat.flattened(
        config.model, params, transpose=count > sharding.row_parts(mesh) or backend.current().sums_contiguous)
    empty = engine.empty_rows(found['model'], params, count, config.model.read_in.length, config.model.loops)
    found['specs'] = engine.partitions(found['model'], params, empty, mesh.shape)
    return params, empty

  params, empty = jax.eval_shape(make, parameter_shapes(config.model))
  roles = parameter_roles(found['model'])
  params = jax.tree_util.tree_map_with_path(lambda path, leaf: _decoded(path, leaf, mesh, roles), params)
  placed = abstract(empty, jax.tree.map(lambda spec: NamedSharding(mesh, spec), found['specs']))
  return found['model'], params, placed


def _decoded(path, leaf, mesh, roles):
  """The shape of a parameter with its sharding; kernels that are turned [O, I] are divided as those [I, O] are."""
  name, transposed = jax.tree_util.keystr(path, simple=True, separator='/'), path[-1].key == 'transposed'
  shape = leaf.shape[::-1] if transposed else leaf.shape
  role = roles.of(name.removesuffix('transposed') + 'kernel' if transposed else name)
  spec = sharding.only(sharding.spec(role, shape, mesh.shape), ('tensor',))
  entries = (*spec, *(None,) * (len(shape) - len(spec)))
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                              sharding=NamedSharding(mesh, P(*(entries[::-1] if transposed else entries))))


def _all_loops(model: Any, rows: int) -> Any:
  """A schedule of all loops for every row."""
  loops = model.loops
  return plans.Plan(t=jnp.zeros((loops, rows)), dt=jnp.zeros((loops, rows)), active=jnp.ones((loops, rows), bool))


def _controls(rows):
  return sampling.SamplingParams(temperature=jnp.zeros(rows), top_k=jnp.ones(rows, jnp.int32), top_p=jnp.ones(rows),
                                 vocab=jnp.ones(rows, jnp.int32))


def _integer():
  return jax.ShapeDtypeStruct((), jnp.int32)


# Compiling -----------------------------------------------------------------------------------------------------------


def compile_for(topology: topologies.Topology, config: Any, program: str = 'train', rows: int = 1) -> Compiled:
  """Compiles a program of a configuration that has been checked, on its mesh.

  Raises:
    ConfigError: a mesh that the topology does not fill; heads or batch that do not divide over the mesh; the compiler
      refuses, with its words.
  """
  mesh = config.mesh.make(list(topology.devices))
  sharding.check_model(config.model, mesh)
  room = metrics.ACCELERATORS[topology.accelerator].memory
  with backend.compiling_for('cpu'):  # whose attention is made of products that can be counted
    built = PROGRAMS[program](estimate.coarse(config), mesh, rows, room)
    counted = list(estimate.products(built.trace(mesh).jaxpr.jaxpr, built.steps, mesh.shape))
  with backend.compiling_for(topology.backend):
    built = PROGRAMS[program](config, mesh, rows, room)
    lowered = built.trace(mesh).lower()
  begun = time.perf_counter()
  try:
    compiled = lowered.compile()
  except Exception as error:  # of kinds that each compiler has for itself
    raise ConfigError(_refusal(error, topology, program)) from None
  memory = compiled.memory_analysis()
  return Compiled(
      built=built, topology=topology, mesh=dict(mesh.shape), peak=memory.peak_memory_in_bytes,
      arguments=memory.argument_size_in_bytes, program=hlo.Program(compiled.as_text(), built.steps),
      flops=sum(product.flops for product in counted), traffic=built.state + sum(product.moved for product in counted),
      seconds=time.perf_counter() - begun)


def _refusal(error, topology, program):
  told = topologies.words(error)
  if 'RESOURCE_EXHAUSTED' in told or 'out of memory' in told.lower():
    return (f'--topology={topology.name}: the program {program!r} does not fit ({told}); raise mesh.fsdp, mesh.tensor '
            'or train.accumulate, or take a larger topology')
  return f'--topology={topology.name}: the program {program!r} cannot be compiled there: {told}'


# The report ----------------------------------------------------------------------------------------------------------


def report(name: str, compiled: Compiled) -> str:
  """What the program needs and does, as tables."""
  built, topology, accelerator = compiled.built, compiled.topology, compiled.accelerator
  seconds = compiled.least()
  least, peak = max(seconds.values()), len(topology.devices) * accelerator.flops
  sums = metrics.table([{
      'peak GB': f'{compiled.peak / GIGA:.3g}', 'of GB': f'{accelerator.memory / GIGA:.0f}',
      'arguments GB': f'{compiled.arguments / GIGA:.3g}', **{f'{what} s': f'{n:.3g}' for what, n in seconds.items()},
      'least s': f'{least:.3g}', 'bound by': max(seconds, key=seconds.get),
      'tokens/s at most': f'{built.tokens / least:,.0f}',
      'MFU % at most': f'{100 * built.model_flops / least / peak:.0f}'}])
  groups = collections.defaultdict(lambda: [0, 0.0])
  for each in compiled.program.collectives:
    row = groups[each.op, each.devices, 'in loops' if each.looped else 'once']
    row[0] += 1
    row[1] += each.times * each.sent
  exchanged = metrics.table([
      {'collective': op, 'devices': devices, 'where': where, 'instructions': count, 'GB sent': f'{sent / GIGA:.4g}'}
      for (op, devices, where), (count, sent) in sorted(groups.items())]) if groups else 'collectives: none'
  copied = sum(copy.size * copy.times for copy in compiled.program.copies if copy.looped)
  kernels = ', '.join(f'{name} x{count}' for name, count in sorted(compiled.program.kernels.items())) or 'none'
  return '\n\n'.join([
      f'{name} on {topology.name}, {len(topology.devices)} devices: '
      + ' x '.join(f'{axis} {size}' for axis, size in compiled.mesh.items())
      + f'\n{built.told}; compiled by {topology.compiler} in {compiled.seconds:.0f} s',
      sums, *built.uneven, exchanged, f'kernels: {kernels}; copies in loops: {copied / GIGA:.3g} GB'])


def run(config: Any, name: str, program: str, rows: int):
  """Prints what a program of a configuration needs on a topology.

  Raises:
    ConfigError: a topology, a program, a mesh or a configuration that cannot be, or does not fit.
  """
  if program not in PROGRAMS:
    raise ConfigError(f'--program={program}: choose from {", ".join(PROGRAMS)}')
  if rows < 1:
    raise ConfigError(f'--rows={rows}: give the number of sequences or requests, 1 or more')
  topology = topologies.find(name)
  jax.config.update('jax_enable_compilation_cache', False)  # a program from there has no text
  if not jax.config.jax_exec_time_optimization_effort:
    jax.config.update('jax_exec_time_optimization_effort', EFFORT)
  configs.check(config)
  print(report(config.name, compile_for(topology, config, program, rows)), flush=True)
