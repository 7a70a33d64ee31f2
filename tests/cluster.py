"""Several processes of the command line on this machine, each with CPU devices of its own."""
from __future__ import annotations

import os
from pathlib import Path
import socket
import subprocess
import sys

from tests import quick

ROOT = Path(__file__).parents[1]


def free_port() -> int:
  """A port that nobody listens on now."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


def start(workdir: Path, processes: int, devices: int, *arguments: str, output: bool = True,
          module: str = 'experiments.main') -> list[subprocess.Popen]:
  """Starts the processes of one run; their standard output and error are one stream, unless it is thrown away."""
  workdir.mkdir(parents=True, exist_ok=True)
  address = f'127.0.0.1:{free_port()}'
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu',
                 'XLA_FLAGS': f'{quick.FLAGS} --xla_force_host_platform_device_count={devices}'}
  started = []
  for i in range(processes):
    place = [f'--coordinator={address}', f'--processes={processes}', f'--process={i}'] if processes > 1 else []
    with (workdir / f'out-{i}.txt').open('w') if output else open(os.devnull, 'w') as out:
      started.append(subprocess.Popen(
          [sys.executable, '-m', module, f'--workdir={workdir}', '--trust=true', *place, *arguments], cwd=ROOT,
          env=environment, stdout=out, stderr=subprocess.STDOUT))
  return started


def wait(started: list[subprocess.Popen], timeout: float = 400) -> list[int]:
  """Exit statuses; kills what does not end in time."""
  try:
    return [process.wait(timeout) for process in started]
  finally:
    for process in started:
      process.kill()


def told(workdir: Path, process: int = 0) -> str:
  """What a process of the run that was started last has written."""
  return (workdir / f'out-{process}.txt').read_text()
