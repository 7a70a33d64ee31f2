"""Machines that are not here, as the compilers of their makers describe them.

TPUs need libtpu (the extra `tpu`), CUDA the plugin of JAX (`pip install 'jax[cuda12]'` of the installed version);
neither needs a device. A topology has devices of which a mesh can be made, and for which
`jax.jit(...).lower(...).compile()` gives the program that would run there.
"""
from __future__ import annotations

import functools
import importlib.metadata
import math
import os
import re
from typing import Any

import jax

from loopformer.training import metrics
from loopformer.types import ConfigError, config_dataclass

FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBIC = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16')
TPUS = {'v5e': FLAT, 'v6e': FLAT, 'v5p': CUBIC, 'tpu7x': CUBIC}
GPUS = {'h100': 'H100', 'h200': 'H200'}  # and their rows in metrics.ACCELERATORS
NODE = 8  # GPUs of a host
HOPPER = '''gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 }}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{kind}"
'''


@config_dataclass
class Topology:
  """name: such as 'v5e:4x4'; backend: 'tpu' or 'gpu'; accelerator: its row in metrics.ACCELERATORS; devices: JAX's;
  compiler: what compiles for it, with its version."""
  name: str
  backend: str
  accelerator: str
  devices: tuple[Any, ...]
  compiler: str


def known() -> str:
  """The names that there are, for messages."""
  return '; '.join([*(f'{kind}:{" ".join(sizes)}' for kind, sizes in TPUS.items()),
                    f'{" or ".join(GPUS)}:N, N GPUs, 1 to {NODE} or a multiple of {NODE}'])


@functools.cache
def find(name: str) -> Topology:
  """The topology of that name. JAX's own devices are those of the CPU from then on.

  Raises:
    ConfigError: there is none of that name, or its compiler is not installed.
  """
  kind, _, size = name.lower().partition(':')
  if kind in TPUS and size in TPUS[kind]:
    return _tpu(kind, size)
  if kind in GPUS and re.fullmatch('[1-9][0-9]*', size) and (int(size) <= NODE or int(size) % NODE == 0):
    return _gpu(kind, int(size))
  raise ConfigError(f'--topology={name}: there is no such machine; there are {known()}')


def _tpu(kind, size):
  try:
    version = importlib.metadata.version('libtpu')
  except importlib.metadata.PackageNotFoundError:
    raise ConfigError(f"--topology={kind}:{size}: the TPU's compiler, libtpu, is not installed; "
                      "pip install 'loopformer[tpu]', or plan with --devices on simulated CPU devices") from None
  # It would ask the machine that it is on for a TPU, and refuse to be loaded by a second process.
  for variable, value in (('TPU_SKIP_MDS_QUERY', '1'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),
                          ('TPU_WORKER_HOSTNAMES', 'localhost'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-16')):
    os.environ.setdefault(variable, value)
  single = {'chips_per_host_bounds': (1, 1, 1)} if size == '1x1' else {}
  devices = _devices(f'{kind}:{size}', platform='tpu', topology_name=f'{kind}:{size}', **single)
  return Topology(name=f'{kind}:{size}', backend='tpu', accelerator=kind, devices=devices, compiler=f'libtpu {version}')


def _gpu(kind, count):
  accelerator = metrics.ACCELERATORS[GPUS[kind]]
  plugins = [found for found in importlib.metadata.distributions()
             if re.fullmatch(r'jax-cuda\d+-plugin', (found.name or '').replace('_', '-'))]
  if not plugins:
    raise ConfigError(f'--topology={kind}:{count}: the CUDA plugin of JAX is not installed; pip install '
                      f"'jax[cuda12]=={jax.__version__}', or plan with --devices on simulated CPU devices")
  layout = f'1x1x{count}' if count <= NODE else f'1x{count // NODE}x{NODE}'
  config = HOPPER.format(bandwidth=accelerator.bandwidth, memory=accelerator.memory, kind=accelerator.kinds[0])
  devices = _devices(f'{kind}:{count}', platform='cuda', topology_name=kind, topology=layout, target_config=config)
  return Topology(name=f'{kind}:{count}', backend='gpu', accelerator=GPUS[kind], devices=devices,
                  compiler=f'XLA of {plugins[0].name} {plugins[0].version}')


def _devices(name, **options):
  jax.config.update('jax_platforms', 'cpu')
  from jax.experimental import topologies
  try:
    devices = tuple(topologies.get_topology_desc(**options).devices)
  except Exception as error:  # whatever a compiler says of itself
    raise ConfigError(f'--topology={name}: {words(error)}') from None
  sizes = [int(n) for n in re.findall(r'\d+', name.partition(':')[2])]
  assert len(devices) % math.prod(sizes) == 0, devices
  return devices


def words(error: Exception) -> str:
  """What a compiler says, in one line."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return ' '.join(lines)[:400] or type(error).__name__
