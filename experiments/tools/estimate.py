"""What a training step will need, on machines that are not here.

    python -m experiments.main --mode=plan --config=experiments/configs/loopformer.py:paper --devices=16 \
      --set mesh.fsdp=4 --set mesh.tensor=2 --set train.accumulate=20

The step is compiled for as many CPU devices as the mesh has, which are simulated; nothing of its size is allocated. Of
the program and of the shardings:

    memory          XLA's account of the program that one device runs. The CPU widens bfloat16 to float32, and another
                    backend's compiler orders and fuses differently: an estimate, rather too large
    FLOPs           of all matrix products that a device runs, those that are run again for the backward pass included
    memory traffic  operands and results of these products, each moved once, as if all else were fused into them; and
                    the training state, read and written once
    communication   bytes that a device sends for every collective of the program, by a ring: (n - 1) / n of a gathered
                    or scattered array among n devices, twice that of a reduced one

A loop counts as often as it runs, a step that may be skipped as often as plans that are drawn here, at the last step of
the run, take it. The least time of a step is the longest of what these take at the speeds of the makers' data sheets
(metrics.ACCELERATORS).
"""
from __future__ import annotations

import collections
import functools
import math
import sys
from typing import Any, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np

from experiments.tools.hlo import Program, Steps
from loopformer import config as configs, sharding
from loopformer.model import parameter_roles, parameter_shapes
from loopformer.roles import Roles
from loopformer.training import metrics
from loopformer.training.checkpoint import abstract
from loopformer.training.step import init_state, make_step
from loopformer.types import ConfigError, PlanContext, config_dataclass

DRAWS = 1024  # plans that are drawn to see how many steps they take
BLOCKS = 8  # of queries, at most: attention in more of them takes minutes to trace, and plans nothing else
QUICK = {'xla_backend_optimization_level': '0', 'xla_llvm_disable_expensive_passes': True}  # no code is run
GIGA = 1e9


@config_dataclass
class Plan:
  """A training step on one of the devices of a mesh. Bytes and FLOPs are of that device and one step.

  weights, optimizer: its shards; gathered: the copy of the weights that it computes with, where they are divided over
  fsdp; gradients: as large as that copy, and twice where microbatches are summed; rest: what the program holds beyond
  these at its peak: activations, and what the compiler adds.
  traffic: bytes to and from its memory; sent: bytes that it sends, by (name of the collective, devices of its group,
  how far these are apart: 1 + last - first).
  model_flops: of all devices, without what is run twice (`Objective.flops`). uneven: lines about parameters that fsdp
  does not divide.
  """
  mesh: Mapping[str, int]
  parameters: int
  tokens: int
  rows: int
  steps: Steps
  weights: int
  optimizer: int
  gathered: int
  gradients: int
  total: int
  flops: float
  traffic: float
  sent: Mapping[tuple[str, int, int], float]
  model_flops: float
  uneven: tuple[str, ...] = ()

  @property
  def rest(self) -> int:
    """Bytes of activations, and of what else the program holds."""
    return self.total - self.weights - self.optimizer - self.gathered - self.gradients

  @property
  def devices(self) -> int:
    """Of the mesh."""
    return math.prod(self.mesh.values())

  def seconds(self, accelerator: metrics.Accelerator) -> dict[str, float]:
    """The least time of a step by what it is spent on."""
    sent = sum(count / accelerator.speed(apart) for (_, _, apart), count in self.sent.items())
    return {'compute': self.flops / accelerator.flops, 'memory': self.traffic / accelerator.bandwidth,
            'interconnect': sent}


def simulate(devices: int):
  """Makes JAX's devices so many CPU devices.

  Raises:
    ConfigError: not a positive number, or JAX has its devices already.
  """
  if devices < 1:
    raise ConfigError(f'--devices={devices}: give the number of devices of the mesh, 1 or more')
  try:
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_enable_compilation_cache', False)  # a program from there has no text
    jax.config.update('jax_num_cpu_devices', devices)
    found = len(jax.devices())
  except RuntimeError as error:
    raise ConfigError(f'--devices={devices}: {error}') from None
  if found != devices:
    raise ConfigError(f'--devices={devices}: JAX simulates {found}; unset XLA_FLAGS and JAX_NUM_CPU_DEVICES')


def choose(names: Sequence[str]) -> dict[str, metrics.Accelerator]:
  """The accelerators of that name. Raises ConfigError where there is none."""
  for name in names:
    if name not in metrics.ACCELERATORS:
      raise ConfigError(f'--accelerators={",".join(names)}: no data sheet of {name!r} here; choose from '
                        f'{", ".join(metrics.ACCELERATORS)}')
  return {name: metrics.ACCELERATORS[name] for name in names}


def coarse(config: Any) -> Any:
  """The experiment with attention in at most `BLOCKS` blocks."""
  size = -(-config.task.length // BLOCKS)
  for path, value in configs.flatten(config.model, 'model').items():
    if path.endswith('.kernel.size') and int(value) < size:
      config = configs.override(config, f'{path}={size}')
  return config


def rows_of(task: Any) -> dict[str, np.ndarray]:
  """An example as the task makes it; one of text, which would first have to be prepared, by its shapes."""
  if hasattr(task, 'source'):
    return task.source('train', 0)[0]
  tokens = np.zeros(task.length, np.int32)
  return {'tokens': tokens, 'targets': tokens, 'weights': np.ones(task.length, np.float32),
          'positions': np.arange(task.length, dtype=np.int32)}


def expected(objective: Any, example: Mapping[str, np.ndarray], rows: int, steps: int | range,
             stage: int | None = None) -> Steps:
  """Draws plans for `rows` sequences at a training step, or at steps all over a range, in a stage of the run's
  controller; the last if absent."""
  batch = {name: np.broadcast_to(leaf, (rows, *np.shape(leaf))) for name, leaf in example.items()}
  batch['row'] = np.arange(rows, dtype=np.int32)
  free, taken, most = [], 0.0, 0
  at = (np.linspace(steps[0], steps[-1], DRAWS).round().astype(np.int32) if isinstance(steps, range)
        else np.full(DRAWS, steps, np.int32))
  for roll in objective.rolls.values():
    own = max(len(roll.plan.stages) - 1, 0) if stage is None else stage

    def draw(key, step, plan=roll.plan, own=own):
      drawn = plan(PlanContext(key=key, step=step, stage=jnp.int32(own), batch=batch))
      live = None if drawn.active is None else drawn.active.reshape(drawn.steps, -1).any(-1).sum()
      return live, None if drawn.no_grad_steps is None else drawn.free.max()

    live, first = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), DRAWS), at)
    if live is not None:
      taken, most = taken + float(live.mean()), most + roll.plan.longest
    if first is not None:
      free.append(float(first.mean()))
  return Steps(free=float(np.mean(free)) if free else 0.0, live=taken / most if most else 1.0)


def make_plan(config: Any, mesh: jax.sharding.Mesh) -> Plan:
  """Plans a configuration that has been checked, on a mesh of simulated devices.

  Raises:
    ConfigError: heads or batch do not divide over the mesh.
  """
  options = config.train
  sharding.check_model(config.model, mesh)
  sharding.check_batch(options.batch, options.accumulate, mesh)
  roles, example = parameter_roles(config.model), rows_of(config.task)
  rows = options.batch // options.accumulate // (mesh.shape['data'] * mesh.shape['fsdp'])
  steps = expected(config.objective, example, rows, options.steps)

  state, traced = _traced(coarse(config), mesh, example)
  compiled = traced.lower().compile(compiler_options=QUICK)
  memory, program = compiled.memory_analysis(), Program(compiled.as_text(), steps)

  params = jax.tree.leaves(state.params)
  weights, whole = (sharding.bytes_of(state.params, mesh, roles, names) for names in (sharding.AXES, ('tensor',)))
  optimizer_bytes = sharding.bytes_of(state.optimizer, mesh, roles)
  tokens = options.batch * config.task.length
  mapped = [equation for equation in traced.jaxpr.jaxpr.eqns if equation.primitive.name == 'shard_map']
  traffic = program.outside + sum(
      product.moved for equation in mapped
      for product in products(equation.params['jaxpr'], steps, mesh.shape, manual=frozenset(sharding.BATCH)))
  return Plan(
      mesh=dict(mesh.shape), parameters=sum(leaf.size for leaf in params), tokens=tokens, rows=rows, steps=steps,
      weights=weights, optimizer=optimizer_bytes, gathered=whole if mesh.shape['fsdp'] > 1 else 0,
      gradients=whole * (1 if options.accumulate == 1 else 2),
      total=memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes,
      flops=program.flops, traffic=traffic + 2 * (weights + optimizer_bytes), sent=program.sent,
      model_flops=config.objective.flops(config.model, config.task.length) * tokens,
      uneven=tuple(undivided(state.params, mesh, roles)))


def step_flops(config: Any) -> float:
  """Floating-point operations of all matrix products that a training step runs on one device, in the mean over plans,
  over the steps of the run (curricula), and over its stages: what runs without being of use, such as steps of sequences
  that are done, counts too."""
  options, mesh, example = config.train, sharding.Mesh().make(jax.devices()[:1]), rows_of(config.task)
  _, traced = _traced(config, mesh, example)
  total = 0.0
  for stage, share in shares(config).items():
    steps = expected(config.objective, example, options.batch // options.accumulate, range(options.steps), stage)
    total += share * sum(product.flops for product in products(traced.jaxpr.jaxpr, steps, mesh.shape))
  return total


def shares(config: Any) -> dict[int, float]:
  """Stage -> share of the run's steps that are in it, where no evaluation tells the controller anything: stages end
  when they must (`Plateau.longest`), or never."""
  control, options = config.control, config.train
  nothing = {f'loss@{name}': math.nan for name in config.evals.schedules()}
  state, counts = control.start(), collections.Counter()
  for number in range(1, options.steps + 1):
    counts[control.stage(state)] += 1
    if number % options.eval_every == 0:
      state = control.watch(state, number, nothing)
  return {stage: count / options.steps for stage, count in counts.items()}


def _traced(config: Any, mesh: jax.sharding.Mesh, example: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
  """The shapes of the training state, and the training step as it is traced with batches of such an example."""
  options, roles = config.train, parameter_roles(config.model)
  optimizer = config.optim.make(options.steps, roles)
  state = jax.eval_shape(functools.partial(init_state, config.model, optimizer, options.seed))
  over_rows = NamedSharding(mesh, P(sharding.BATCH))
  batch = {name: jax.ShapeDtypeStruct((options.batch, *np.shape(leaf)), np.asarray(leaf).dtype, sharding=over_rows)
           for name, leaf in {**example, 'row': np.int32(0), 'stop': np.float32(0)}.items()}
  step = make_step(config.model, config.objective, optimizer, mesh, options.accumulate, options.seed)
  return state, step.trace(_placed(state, mesh, roles), batch, frozen=teachers_of(config, config.model, mesh))


def teachers_of(config: Any, model: Any, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The shapes of the teachers' weights, with their shardings, where `model` learns."""
  made = {}
  for name, teacher in config.objective.teachers.items():
    runs = teacher.model(model)
    shapes = parameter_shapes(runs)
    made[name] = _placed(shapes, mesh, parameter_roles(runs))
  return made


def _placed(tree: Any, mesh: jax.sharding.Mesh, roles: Roles) -> Any:
  """Shapes of a train state or a part of it, with their shardings."""
  return abstract(tree, sharding.shardings(tree, mesh, roles))


def undivided(params: Any, mesh: jax.sharding.Mesh, roles: Roles) -> list[str]:
  """Lines about parameters that fsdp does not divide evenly."""
  size, numbers, names = mesh.shape['fsdp'], collections.Counter(), {}
  for (path, leaf), own in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(
      sharding.shardings(params, mesh, roles))):
    axes = {axis for entry in own.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    kind = ('parts' if axes & {'outer', 'inner'}
            else 'whole' if 'fsdp' not in axes and leaf.size >= sharding.LARGE else '')
    numbers[kind] += leaf.size
    names.setdefault(kind, jax.tree_util.keystr(path, simple=True, separator='/') + f' {list(leaf.shape)}')
  total, told = sum(leaf.size for leaf in jax.tree.leaves(params)), {
      'parts': 'held in parts over two axes or by some of the devices, gathered before and summed whole after the step',
      'whole': 'whole on every device, and so are their moments; choose an fsdp that divides an axis'}
  return [f'fsdp = {size} divides no axis of {numbers[kind]:,} of {total:,} parameters ({names[kind]} is the first): '
          f'{words}' for kind, words in told.items() if size > 1 and numbers[kind]]


# The traced program ---------------------------------------------------------------------------------------------------


@config_dataclass
class Product:
  """A matrix product on one device: floating-point operations, and bytes of its operands and its result, times how
  often it runs."""
  flops: float
  moved: float


def products(jaxpr: Any, steps: Steps, sizes: Mapping[str, int], times: float = 1.0, manual: frozenset = frozenset(),
             within: bool = False) -> Iterator[Product]:
  """Every matrix product of a traced program, in the dtypes that it is written in.

  sizes: of the mesh. Inside a shard_map shapes are those of one device of the axes that it is manual over; what no
  shard_map divides counts as if the partitioner divided it over all devices. A loop whose end the trace does not know
  is one of `steps.free`, or, if no other is around it, of `steps.outer`.
  """
  for equation in jaxpr.eqns:
    name, inner = equation.primitive.name, list(_inner(equation.params))
    if name == 'dot_general':
      (left, _), _ = equation.params['dimension_numbers']
      summed = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
      share = times / math.prod(size for axis, size in sizes.items() if axis not in manual)
      yield Product(flops=share * 2.0 * equation.outvars[0].aval.size * summed, moved=share * sum(
          var.aval.size * var.aval.dtype.itemsize for var in (*equation.invars, *equation.outvars)))
    elif name == 'cond':
      for number, branch in enumerate(inner):
        yield from products(branch, steps, sizes, times * (steps.live if number else 1 - steps.live), manual, within)
    else:
      often = {'scan': equation.params.get('length'), 'while': steps.often(within)}.get(name, 1)
      also = frozenset(equation.params['newly_manual_axes']) if name == 'shard_map' else frozenset()
      for body in inner:
        yield from products(body, steps, sizes, times * often, manual | also, within or name == 'while')


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
  """The programs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, 'jaxpr', item)
      if hasattr(item, 'eqns'):
        yield item


# The report ----------------------------------------------------------------------------------------------------------


def table(plan: Plan, accelerators: Mapping[str, metrics.Accelerator]) -> str:
  """One row an accelerator; the shares of memory that are the same on all of them come first."""
  shares = {'weights': plan.weights, 'optimizer': plan.optimizer, 'gathered copy': plan.gathered,
            'gradients': plan.gradients, 'activations and the rest': plan.rest}
  rows = []
  for name, accelerator in accelerators.items():
    seconds = plan.seconds(accelerator)
    least = max(seconds.values())
    peak = plan.devices * accelerator.flops
    rows.append({
        'accelerator': name,
        **{f'{share} GB': f'{count / GIGA:.3g}' for share, count in shares.items()},
        'together GB': f'{plan.total / GIGA:.3g}', 'of GB': f'{accelerator.memory / GIGA:.0f}',
        'fits': 'yes' if fits(plan, accelerator) else 'NO',
        **{f'{what} s': f'{count:.3g}' for what, count in seconds.items()},
        'step s': f'{least:.3g}', 'bound by': max(seconds, key=seconds.get),
        'tokens/s': f'{plan.tokens / least:,.0f}', 'MFU % at most': f'{100 * plan.model_flops / least / peak:.0f}'})
  return metrics.table(rows)


def fits(plan: Plan, accelerator: metrics.Accelerator) -> bool:
  """Whether the program's memory is within the device's."""
  return plan.total <= accelerator.memory


def summary(name: str, plan: Plan, changed: bool) -> str:
  """What the step is, and what it computes and sends."""
  sent = collections.Counter()
  for (op, count, _), number in plan.sent.items():
    sent[f'{op} among {count}'] += number
  lines = [
      f'{name}: {plan.parameters:,} parameters on ' + ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items())
      + f' = {plan.devices} devices',
      f'a step: {plan.tokens:,} tokens, {plan.rows} rows a device at a time; plans drawn at the last step take '
      f'{100 * plan.steps.live:.0f} % of the steps that may be skipped, after {plan.steps.free:.1f} without gradient',
      f'FLOPs a device: {plan.flops:.3e} run, {plan.model_flops / plan.devices:.3e} of the model (nothing twice)',
      f'memory traffic a device: {plan.traffic / GIGA:.1f} GB',
      f'sent by a device: {sum(sent.values()) / GIGA:.3f} GB' + ''.join(
          f'; {what} {number / GIGA:.3f}' for what, number in sent.most_common() if number >= 0.0005 * GIGA)]
  lines += plan.uneven
  if changed:
    lines.append(f'attention is planned in {BLOCKS} blocks of queries, fewer than the configuration asks for: more '
                 'scores at once')
  return '\n'.join(lines)


def run(config: Any, devices: int, names: Sequence[str]):
  """Prints the plan of a configuration; the program's exit status is 1 where no accelerator of these holds it.

  Raises:
    ConfigError: an accelerator, a number of devices, a mesh or a configuration that cannot be.
  """
  accelerators = choose(names)
  configs.check(config)
  simulate(devices)
  plan = make_plan(config, config.mesh.make())
  print(summary(config.name, plan, coarse(config).model != config.model) + '\n')
  print(table(plan, accelerators), flush=True)
  short = [name for name, accelerator in accelerators.items() if not fits(plan, accelerator)]
  for name in short:
    print(f'warning: {plan.total / GIGA:.1f} GB a device do not fit the {accelerators[name].memory / GIGA:.0f} GB of '
          f'{name}; raise mesh.fsdp, mesh.tensor or train.accumulate', file=sys.stderr)
  if len(short) == len(accelerators):
    raise ConfigError('no accelerator of --accelerators holds this step')
