"""Several processes that run one program: how they meet, who writes, and who reads which rows.

Every process runs the same code on its own devices. Files are written by the leader alone; all processes must see the
same work folder.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
import os
import sys
import traceback
from typing import Any, Callable

import jax
import numpy as np

from loopformer.types import ConfigError


def connect(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
            timeout: int = 300, heartbeat: int = 60):
  """Joins the other processes; call it before anything touches a device.

  Args:
    coordinator: host:port of process 0; None, with the next two, where JAX finds out by itself (TPU pods, Slurm,
      Kubernetes' JobSet, Open MPI).
    processes, process: how many there are, and which this is.
    timeout: seconds to wait for the others; heartbeat: seconds without a sign of life after which a process counts as
      dead, and the others end.

  Raises:
    ConfigError: the others cannot be reached, or there is no cluster to be found.
  """
  given = {'coordinator': coordinator, 'processes': processes, 'process': process}
  missing = [name for name, value in given.items() if value is None]
  if missing and len(missing) < len(given):
    raise ConfigError(f'--{missing[0]} is missing: give --coordinator=HOST:PORT, --processes and --process together, '
                      'or --distributed alone where the cluster tells')
  if process is not None and processes is not None and not 0 <= process < processes:
    raise ConfigError(f'--process={process}: must be 0 to {processes - 1} with --processes={processes}')
  config: Any = jax.config  # whose options are attributes that its class does not declare
  if config.jax_platforms == 'cpu':
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  # It would take SIGTERM for itself, and what comes before training catches the signal would be lost.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=timeout,
                               heartbeat_timeout_seconds=heartbeat)
  except (RuntimeError, ValueError) as error:
    where = coordinator or 'the cluster'
    raise ConfigError(f'--coordinator={where}: the {processes or "other"} processes did not meet within {timeout} s; '
                      'see that process 0 runs and that its port can be reached, or raise --connect_timeout\n'
                      f'({str(error).splitlines()[0]})') from error


def leave(error: Exception, message: str | None = None):
  """Ends this process with status 1 and a message, or the trace of the error.

  One of several ends at once, without the farewell that it would wait for the others in: they are waiting for it.
  """
  if not jax.distributed.is_initialized():
    if message is None:
      raise error
    sys.exit(message)
  if message is None:
    traceback.print_exception(error)
  print(message or f'error: process {jax.process_index()} ends: {type(error).__name__}: {error}', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)


def is_leader() -> bool:
  """Whether this process writes logs and results."""
  return jax.process_index() == 0


def say(text: str):
  """Prints, in the leader alone. A console that is gone, or has too few letters, loses its text, and nothing else."""
  if not is_leader():
    return
  try:
    print(text, flush=True)
  except UnicodeEncodeError:
    print(text.encode('ascii', 'backslashreplace').decode(), flush=True)
  except OSError:  # a pipe without a reader, a full disk
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leader_first(action: Callable[[], Any], name: str) -> Any:
  """What `action` returns; the others begin when the leader has done it, and find its files."""
  if jax.process_count() == 1:
    return action()
  from jax.experimental import multihost_utils
  if is_leader():
    result = action()
  multihost_utils.sync_global_devices(name)
  return result if is_leader() else action()


def by_leader(action: Callable[[], Any]) -> Any:
  """What `action` returns in the leader, None in the others; all wait for it, and end where it fails.

  Raises:
    ConfigError, OSError: what `action` raises; in the others, that the leader has said why.
  """
  result, failed = None, None
  if is_leader():
    try:
      result = action()
    except (ConfigError, OSError) as error:
      failed = error
  if not all_agree(failed is None):
    raise failed or ConfigError('the work folder cannot be used; process 0 says why')
  return result


def all_agree(verdict: bool) -> bool:
  """Whether every process says so."""
  if jax.process_count() == 1:
    return verdict
  from jax.experimental import multihost_utils
  return bool(multihost_utils.process_allgather(np.array(verdict)).all())


def fetch(tree: Any) -> Any:
  """Arrays on the host, whole, one after the other where other processes hold parts of them; all processes call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  from jax.experimental import multihost_utils

  def one(leaf):
    here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return jax.device_get(leaf) if here else multihost_utils.process_allgather(leaf, tiled=True)

  return jax.tree.map(one, tree)


class Fetched(Mapping):
  """A nested dict of arrays whose arrays are fetched when they are read, so that what nobody reads is not gathered. All
  processes read the same, in the same order."""

  def __init__(self, tree: Mapping[str, Any]):
    self._tree = tree

  def __getitem__(self, name: str) -> Any:
    value = self._tree[name]
    return Fetched(value) if isinstance(value, Mapping) else fetch(value)

  def __iter__(self) -> Iterator[str]:
    return iter(self._tree)

  def __len__(self) -> int:
    return len(self._tree)


def readers(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """(index, count): processes fall into `count` groups whose devices hold the same rows; this one is in group `index`.

  A process reads rows of its own, unless the tensor axis spans several, which then read the same.

  Raises:
    ConfigError: the tensor axis cuts through the devices of a process.
  """
  groups = []
  for devices in mesh.devices.reshape(-1, mesh.shape['tensor']):
    group = frozenset(device.process_index for device in devices)
    if group not in groups:
      groups.append(group)
  if sum(map(len, groups)) != jax.process_count():
    raise ConfigError(f'mesh.tensor = {mesh.shape["tensor"]} cuts through the {jax.local_device_count()} devices of a '
                      'process; choose a divisor or a multiple of them')
  return next(index for index, group in enumerate(groups) if jax.process_index() in group), len(groups)
