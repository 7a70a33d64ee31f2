"""Meshes and shardings: the one place where either is made.

Three axes. The batch divides over data and fsdp. Parameters and optimiser state divide over fsdp and tensor; a training
step gathers them over fsdp once, however many loops it runs, and never over tensor, where each device computes with its
own heads and hidden units.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Any, Callable, ContextManager, Mapping

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from loopformer import backend
from loopformer.roles import Role, Roles
from loopformer.training import processes
from loopformer.types import KV, AnyBatch, Array, ConfigError, Params, config_dataclass

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')  # what rows are divided over, and what a training step is manual over


@config_dataclass
class Mesh:
  """Sizes of the mesh axes; one of them may be -1, all devices that are left.

  data: whole copies of the training state; fsdp: devices that divide one copy, and gather it once a step; tensor:
  devices that divide every layer (attention's heads, hidden units, the vocabulary), and exchange activations.
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = {name: getattr(self, name) for name in AXES}
    for name, size in sizes.items():
      if size < 1 and size != -1:
        raise ConfigError(f'mesh.{name} = {size}; give a number of devices, or -1 for the rest')
    rest = [f'mesh.{name}' for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
      raise ConfigError(f'{" and ".join(rest)} are both -1; only one axis can take the devices that are left')

  def make(self, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all of them by default). Raises ConfigError where the sizes do not multiply up."""
    devices = devices or jax.devices()
    sizes = [self.data, self.fsdp, self.tensor]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
      raise ConfigError(f'mesh = (data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}) does not use all '
                        f'{len(devices)} devices; the sizes must multiply to that number')
    # An axis of the mesh may be a part of a ring of a slice: without that, most meshes of a slice of TPUs are refused.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Named explicitly: the default may be Explicit axes, under which a constraint is an assertion.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check_model(model: Any, mesh: jax.sharding.Mesh):
  """Raises ConfigError where heads of keys and values do not divide over the tensor axis."""
  tensor = mesh.shape['tensor']
  for name, stack in model.stacks().items() if tensor > 1 else ():
    groups, _ = stack.block.heads_of(model.read_in.width)
    if groups % tensor:
      raise ConfigError(f'mesh.tensor = {tensor} does not divide the {groups} heads of keys and values of the stack '
                        f'{name!r}; choose a divisor of them, and divide parameters by mesh.fsdp instead')


def check_batch(batch: int, accumulate: int, mesh: jax.sharding.Mesh):
  """Raises ConfigError where the rows of a microbatch do not divide over the mesh."""
  parts = int(np.prod([mesh.shape[name] for name in BATCH]))
  if batch // accumulate % parts:
    raise ConfigError(f'train.batch / train.accumulate = {batch // accumulate} rows do not divide over mesh.data * '
                      f'mesh.fsdp = {parts}; choose a multiple of {parts}')


def spec(role: Role, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
  """The partition of a parameter, or of an array that an optimiser keeps of it, by its role and its shape.

  Over tensor as the role says, over fsdp by the largest axis that is left, in both cases if it divides evenly. A
  layer's two products pair up: the columns of the first give what the rows of the second take, with one sum at the end.
  """
  axes: list[str | None] = [None] * len(shape)
  axis = role.tensor
  if axis is not None and len(shape) >= -axis and sizes['tensor'] > 1 and not shape[axis] % sizes['tensor']:
    axes[axis] = 'tensor'
  left = [axis for axis, size in enumerate(shape)
          if axes[axis] is None and size % sizes['fsdp'] == 0 and size >= sizes['fsdp']]
  if left and sizes['fsdp'] > 1:
    axes[max(left, key=lambda axis: shape[axis])] = 'fsdp'
  while axes and axes[-1] is None:
    axes.pop()
  return P(*axes)


def specs(tree: Any, mesh: jax.sharding.Mesh, roles: Roles) -> Any:
  """Partitions of a whole train state or a part of it, from its shapes and the roles of the model's parameters."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: spec(roles.at(path), leaf.shape, mesh.shape), tree)


LARGE = 1 << 16  # numbers


def two_ways(shape: tuple[int, ...], partition: P, size: int) -> tuple[int, P] | None:
  """How an array none of whose axes `size` devices divide evenly is divided by two of its axes, or by one in part.

  Returns:
    (a, partition over 'outer' of a devices and 'inner' of size / a); None where it is small, or nothing divides.
  """
  if math.prod(shape) < LARGE:
    return None
  entries = (*partition, *(None,) * (len(shape) - len(partition)))

  def most(count, but=None):
    axes = [axis for axis, length in enumerate(shape) if entries[axis] is None and axis != but and length % count == 0]
    return max(axes, key=lambda axis: shape[axis], default=None) if count > 1 else None

  found = []
  for a in range(2, size):
    if size % a == 0 and (first := most(a)) is not None:
      second = most(size // a, first)
      names = {first: 'outer', second: 'inner'}
      shared = a * (size // a if second is not None else 1)
      found.append((shared, a, P(*(names.get(axis, entry) for axis, entry in enumerate(entries)))))
  return max(found, key=lambda each: each[:2])[1:] if found else None


def held(role: Role, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
  """Where the parts of an array of the train state lie, by its role and its shape.

  As `spec` says; large arrays that fsdp does not divide are held in parts too, and are whole as soon as they are
  computed with (in the step's shard_map they are arguments that every device has whole).
  """
  partition = spec(role, shape, mesh.shape)
  size = mesh.shape['fsdp']
  if size == 1 or 'fsdp' in tuple(partition) or not (found := two_ways(shape, partition, size)):
    return NamedSharding(mesh, partition)
  outer, parts = found
  grid = mesh.devices.reshape(mesh.shape['data'], outer, size // outer, mesh.shape['tensor'])
  finer = jax.sharding.Mesh(grid, ('data', 'outer', 'inner', 'tensor'), axis_types=(AxisType.Auto,) * 4)
  return NamedSharding(finer, parts)


def only(partition: P, names: tuple[str, ...]) -> P:
  """The partition over some of the axes, the others whole."""
  return P(*(entry if entry in names or entry == BATCH and set(BATCH) <= set(names) else None for entry in partition))


def shardings(tree: Any, mesh: jax.sharding.Mesh, roles: Roles, names: tuple[str, ...] = AXES) -> Any:
  """Shardings of a train state or a part of it, from its shapes (`jax.eval_shape`) and the roles of the model's
  parameters, over some of the axes."""
  if names != AXES:
    return jax.tree.map(lambda partition: NamedSharding(mesh, only(partition, names)), specs(tree, mesh, roles))
  return jax.tree_util.tree_map_with_path(lambda path, leaf: held(roles.at(path), leaf.shape, mesh), tree)


def bytes_of(tree: Any, mesh: jax.sharding.Mesh, roles: Roles, names: tuple[str, ...] = AXES) -> int:
  """Bytes that a device has of a train state or a part of it, divided over some of the axes."""
  return _bytes(tree, shardings(tree, mesh, roles, names))


def _bytes(tree, shardings):
  return sum(math.prod(own.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf, own in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings)))


def row_parts(mesh: jax.sharding.Mesh) -> int:
  """How many parts rows are divided into."""
  return math.prod(mesh.shape[name] for name in BATCH)


def mesh_of(tree: Any) -> Any:
  """The mesh (jax.sharding.Mesh) of several devices that arrays are divided over; None where they lie on one device, on
  the host, or nowhere, being traced."""
  for leaf in jax.tree.leaves(tree):
    held = leaf.sharding if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) else None
    if isinstance(held, NamedSharding) and held.mesh.axis_names == AXES and held.mesh.size > 1:
      return held.mesh
  return None


def on(mesh: jax.sharding.Mesh | None) -> ContextManager[Any]:
  """Within it, kernels and sums of a program run on the rows and heads of each device."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


# Parameters ----------------------------------------------------------------------------------------------------------


def placer(mesh: jax.sharding.Mesh | None, roles: Roles) -> Callable[[str, Any], Array]:
  """(path of a parameter, its array on the host) -> the array on the devices of a mesh, each of which gets its own part
  alone; None: on the default device, which may take over the memory of the array: nobody must write to it then."""
  if mesh is None:
    return lambda path, array: jax.device_put(array, may_alias=True)

  def put(path, array):
    divided = held(roles.of(path), array.shape, mesh)
    return jax.make_array_from_callback(array.shape, divided, lambda index: np.asarray(array[index]))

  return put


def place(params: Params, mesh: jax.sharding.Mesh, roles: Roles) -> Params:
  """Parameters that every process holds whole, divided over fsdp and tensor, one after the other."""
  put = placer(mesh, roles)
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: put(jax.tree_util.keystr(path, simple=True, separator='/'), leaf), params)


def gathered(params: Params) -> Params:
  """Parameters to compute with many times without a gradient: gathered over fsdp once, and divided over tensor alone.

  Where a device has no room for that (it would take more than half of the memory that is free) they stay divided, and
  are gathered layer by layer whenever they are needed. All processes call it.
  """
  mesh = mesh_of(params)
  if mesh is None or mesh.shape['fsdp'] == 1:
    return params
  target = _over_tensor_alone(params, mesh)
  size = _bytes(params, target)
  memory = jax.local_devices()[0].memory_stats() or {}
  room = memory['bytes_limit'] - memory['bytes_in_use'] if 'bytes_limit' in memory else math.inf
  return jax.device_put(params, target) if processes.all_agree(2 * size <= room) else params


def over_tensor(params: Params, mesh: jax.sharding.Mesh) -> Params:
  """Parameters gathered over fsdp, whatever room there is, and divided over tensor."""
  return jax.device_put(params, _over_tensor_alone(params, mesh))


def _over_tensor_alone(params, mesh):
  return jax.tree.map(lambda leaf: NamedSharding(mesh, only(leaf.sharding.spec, ('tensor',))), params)


# Batches and caches --------------------------------------------------------------------------------------------------


def put_batch(batch: AnyBatch, mesh: jax.sharding.Mesh, accumulate: int = 1) -> dict[str, Array]:
  """This process's rows as part of global arrays [B, ...], rows divided over data and fsdp.

  accumulate: microbatches, of which every device gets a part: whatever the mesh, microbatch i holds the same rows.
  """
  sharding = NamedSharding(mesh, P(BATCH))
  places = sharding.addressable_devices_indices_map((math.prod(mesh.shape[name] for name in BATCH),))
  here = len({str(index) for index in places.values()})

  def dealt(rows):
    parts = np.asarray(rows).reshape(accumulate, here, -1, *np.shape(rows)[1:])
    return parts.swapaxes(0, 1).reshape(np.shape(rows))

  return {name: jax.make_array_from_process_local_data(sharding, dealt(rows)) for name, rows in batch.items()}


def by_rows_and_heads(function: Callable[..., Array], q: Array, k: Array, v: Array, seg: Array | None) -> Array:
  """`function` of q [B, T, H, d], k and v [B, T, G, d] and segments, on every device of the context's mesh with its own
  rows and heads, where the devices divide them, and otherwise with all; without such a mesh, or inside a shard_map over
  all of it, as it is."""
  mesh = jax.sharding.get_abstract_mesh()
  free = mesh.auto_axes
  if not free:
    return function(q, k, v, seg)

  def dividing(axes, count):
    axes = tuple(name for name in axes if name in free)
    return axes if axes and count % math.prod(mesh.shape[name] for name in axes) == 0 else None

  rows = dividing(BATCH, q.shape[0])
  heads = P(rows, None, dividing(('tensor',), k.shape[2]))
  return jax.shard_map(function, in_specs=(heads, heads, heads, None if seg is None else P(rows)), out_specs=heads,
                       axis_names=set(free), check_vma=False)(q, k, v, seg)


def spread(batch: AnyBatch, mesh: jax.sharding.Mesh) -> dict[str, Array]:
  """A batch that every process holds whole as global arrays [B, ...], rows divided over data and fsdp."""
  divided = NamedSharding(mesh, P(BATCH))
  held = {name: np.asarray(rows) for name, rows in batch.items()}
  return {name: jax.make_array_from_callback(rows.shape, divided, rows.__getitem__) for name, rows in held.items()}


def of_cache(kv: KV, sizes: Mapping[str, int]) -> KV:
  """Partitions of a cache's arrays: rows over data and fsdp, heads over tensor where it divides them."""
  heads = ('tensor',) if kv.layout.count(kv.k) % sizes['tensor'] == 0 else ()
  own: Any = P(None, None, BATCH, *(None,) * (kv.layout.heads - 3), *heads)
  places: Any = P(None, BATCH)
  return dataclasses.replace(kv, k=own, v=own, pos=places)


def agreed(longest: Array) -> Array:
  """The largest of what devices with rows of their own say, where layers exchange activations over tensor: a loop that
  does so must be as long on all of them. i32[] or bool[]; where nothing is exchanged, as it is."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in BATCH if name in mesh.manual_axes and mesh.shape[name] > 1)
  if not axes or mesh.shape['tensor'] == 1:
    return longest
  return jax.lax.pmax(longest.astype(jnp.int32), axes).astype(longest.dtype)


def whole(array: Array) -> Array:
  """The array, whole on every device of a tensor group: one gather before what would exchange pieces many times."""
  mesh = jax.sharding.get_abstract_mesh()
  if 'tensor' not in mesh.auto_axes or mesh.shape['tensor'] == 1:
    return array
  return jax.lax.with_sharding_constraint(array, P(*(None,) * array.ndim))


def sum_over_rows(function: Callable[..., Array], *rows: Array, whole: Any) -> Array:
  """`function` of arrays [B, ...] and of `whole`, which is a sum over rows: on the context's mesh the sum of what every
  device makes of its own rows, which the partitioner would gather where rows are cut across; without such a mesh, or
  inside a shard_map over it, or where it does not divide the rows, as it is."""
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in BATCH if name in mesh.auto_axes and mesh.shape[name] > 1)
  if not axes or len(rows[0]) % math.prod(mesh.shape[name] for name in axes):
    return function(*rows, whole)
  return jax.shard_map(lambda *arrays: jax.lax.psum(function(*arrays), axes), in_specs=(*(P(axes) for _ in rows), P()),
                       out_specs=P(), axis_names=set(axes), check_vma=False)(*rows, whole)


# In the training step -----------------------------------------------------------------------------------------------


def gather(leaf: Array, partition: P) -> Array:
  """Inside the training step's shard_map: a parameter whole over fsdp, and divided over tensor as it was."""
  return _over_tensor(lambda x: jax.lax.all_gather(x, 'fsdp', axis=tuple(partition).index('fsdp'), tiled=True), leaf,
                      partition)


def scatter(leaf: Array, partition: P) -> Array:
  """Inside the training step's shard_map: the sum over fsdp of a gradient, each device its part."""
  axis = tuple(partition).index('fsdp')

  def once(x, groups=None):
    return jax.lax.psum_scatter(x, 'fsdp', scatter_dimension=axis, axis_index_groups=groups, tiled=True)

  return _over_tensor(lambda x: functools.reduce(once, _stages(), x), leaf, partition)


def _stages() -> list[list[list[int]] | None]:
  """The groups of devices along fsdp that a sum is scattered in, one stage after the other; None are all in one.

  In two, the first is among devices that are far apart, so that each has its part in the order of the devices.
  """
  mesh, most = jax.sharding.get_abstract_mesh(), backend.current().largest_scatter
  size = mesh.shape['fsdp']
  inner = next((n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 1)
  if most is None or size <= most or size < mesh.size or inner == 1:
    return [None]
  places = np.arange(size).reshape(-1, inner)
  return [places.T.tolist(), places.tolist()]


def _over_tensor(exchange, leaf, partition):
  """Every device of a tensor group exchanges its own part, which the partitioner would take to be whole otherwise."""
  if 'tensor' not in tuple(partition) or jax.sharding.get_abstract_mesh().shape['tensor'] == 1:
    return exchange(leaf)
  spec = only(partition, ('tensor',))
  return jax.shard_map(exchange, in_specs=spec, out_specs=spec, axis_names={'tensor'}, check_vma=False)(leaf)
