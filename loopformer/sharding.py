"""Meshes and shardings: the one place where either is made."""
from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import numpy as np

from loopformer.types import Array, Batch, ConfigError, part

AXES = ('data', 'fsdp')


@part
class Mesh:
  """Sizes of the mesh axes; one of them may be -1, all devices that are left.

  The batch divides over both axes; parameters and optimiser state divide over fsdp and are gathered once a step.
  """
  data: int = -1
  fsdp: int = 1

  def __post_init__(self):
    for name in AXES:
      if getattr(self, name) < 1 and getattr(self, name) != -1:
        raise ConfigError(f'mesh.{name} = {getattr(self, name)}; give a number of devices, or -1 for the rest')
    if self.data == self.fsdp == -1:
      raise ConfigError('mesh.data and mesh.fsdp are both -1; only one axis can take the devices that are left')

  def make(self, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh over `devices` (all of them by default). Raises ConfigError where the sizes do not multiply up."""
    devices = devices or jax.devices()
    sizes = [self.data, self.fsdp]
    fixed = int(np.prod([size for size in sizes if size != -1]))
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if int(np.prod(sizes)) != len(devices):
      raise ConfigError(f'mesh = (data={self.data}, fsdp={self.fsdp}) does not use all {len(devices)} devices; '
                        'the sizes must multiply to that number')
    # Named explicitly: make_mesh makes Explicit axes by default, under which a constraint is an assertion.
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def split_axis(shape: tuple[int, ...], parts: int) -> int | None:
  """The axis of a parameter that is divided over fsdp: its largest that divides evenly; None keeps it whole."""
  axes = [axis for axis, size in enumerate(shape) if size % parts == 0 and size >= parts]
  return max(axes, key=lambda axis: shape[axis], default=None) if parts > 1 else None


def spec(shape: tuple[int, ...], parts: int) -> P:
  """The partition of an array of the train state."""
  axis = split_axis(shape, parts)
  return P() if axis is None else P(*(None,) * axis, 'fsdp')


def state_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
  """Shardings of a whole train state, from its shapes (`jax.eval_shape`)."""
  return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf.shape, mesh.shape['fsdp'])), state)


def put_batch(batch: Batch, mesh: jax.sharding.Mesh) -> dict[str, Array]:
  """This process's rows as part of global arrays [B, ...], rows divided over both axes."""
  sharding = NamedSharding(mesh, P(AXES))
  return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}
