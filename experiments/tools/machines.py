"""The devices that a command runs on: flags of several processes, and the mesh that a run's model is divided over."""
from __future__ import annotations

from typing import Any, Sequence

from absl import flags
import jax

from loopformer import config as configs, sharding
from loopformer.sharding import Mesh
from loopformer.training import processes
from loopformer.types import ConfigError

FLAGS = flags.FLAGS


NAMES = ('trust', 'distributed', 'coordinator', 'processes', 'process', 'connect_timeout', 'heartbeat')


def define_flags():
  flags.DEFINE_bool('trust', False, 'Run code that lies in a work folder, or that it names and is no part of the '
                    'library; as safe as the folder is where you have it from.')
  flags.DEFINE_bool('distributed', False, 'One of several processes, which JAX finds out about by itself (TPU pods, '
                    'Slurm, Kubernetes).')
  flags.DEFINE_string('coordinator', None, 'host:port of process 0 of several, with --processes and --process.')
  flags.DEFINE_integer('processes', None, 'How many processes there are.', lower_bound=1)
  flags.DEFINE_integer('process', None, 'Which of them this is, from 0.', lower_bound=0)
  flags.DEFINE_integer('connect_timeout', 300, 'Seconds to wait for the other processes.', lower_bound=1)
  flags.DEFINE_integer('heartbeat', 60, 'Seconds without a sign of life after which a process counts as dead, and the '
                       'others end.', lower_bound=1)


def several() -> bool:
  """Whether the flags tell of other processes."""
  return FLAGS.distributed or any(value is not None for value in (FLAGS.coordinator, FLAGS.processes, FLAGS.process))


def connect():
  """Joins the other processes where the flags tell of some; before anything touches a device."""
  if several():
    processes.connect(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.connect_timeout, FLAGS.heartbeat)


def check_set(assignments: Sequence[str], command: str):
  """Raises ConfigError where --set would change what a run has computed: its mesh alone may be another."""
  for assignment in assignments:
    if not assignment.strip().startswith('mesh.'):
      raise ConfigError(f'--set {assignment}: {command} takes the run as it was trained; only mesh.data, mesh.fsdp and '
                        'mesh.tensor may be set')


def mesh_for_import(assignments: Sequence[str]) -> jax.sharding.Mesh | None:
  """The mesh that --set tells of, or all devices, which divide the weights; None for one device."""
  check_set(assignments, '--mode=import')
  held = {'mesh': Mesh() if assignments else Mesh(data=1, fsdp=-1)}
  for assignment in assignments:
    held = configs.override(held, assignment)
  made = held['mesh'].make(jax.devices())
  return made if made.size > 1 else None


def mesh_of(config: Any, assignments: Sequence[str], devices: list[jax.Device] | None = None
            ) -> jax.sharding.Mesh | None:
  """The mesh for a trained model; None for one device.

  Args:
    assignments: those of --set, of mesh fields alone. With them, the run's mesh is changed so, and must fit. Without,
      it is the run's own where that fits the devices that are here, and otherwise all devices, which divide the weights
      (mesh.fsdp): where a model was trained does not decide where it can be evaluated.

  Raises:
    ConfigError: a mesh that was asked for does not fit the devices or the model's heads.
  """
  devices = devices or jax.devices()
  if assignments:
    for assignment in assignments:
      config = configs.override(config, assignment)
    mesh = config.mesh.make(devices)
    sharding.check_model(config.model, mesh)
    return mesh if mesh.size > 1 else None
  if len(devices) == 1:
    return None
  try:
    mesh = config.mesh.make(devices)
    sharding.check_model(config.model, mesh)
    return mesh
  except ConfigError:
    return Mesh(data=1, fsdp=-1).make(devices)
