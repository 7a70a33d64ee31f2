"""Programs compiled for TPUs that are not here; a process of its own, because its devices are others: prints JSON."""
import json

import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from experiments.tools import ahead, topologies
from loopformer import config as configs, sharding
from loopformer.model import parameter_roles, parameter_shapes
from loopformer.sharding import Mesh
from loopformer.types import ConfigError
from tests import parts

CONFIG = f'{parts.ROOT}/experiments/configs/loopformer.py:tiny,dtype=bfloat16'
LENGTH, ROWS = 256, 16
SMALL = [f'task.length={LENGTH}', f'model.read_in.length={LENGTH}', f'train.batch={ROWS}']
SLICES = ('v5e:1x1', 'v5e:2x2', 'v5e:2x4', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v6e:2x4', 'v6e:4x4', 'v6e:8x16',
          'v5p:2x2x1', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x4x8', 'v5p:8x8x8', 'tpu7x:2x2x1', 'tpu7x:4x4x4')


def meshes(name: str) -> dict[str, int]:
  """How many meshes of powers of two a slice has, and on how many devices each of them lies, at least."""
  devices, found = list(topologies.find(name).devices), []
  count = len(devices).bit_length() - 1
  for data in range(count + 1):
    for fsdp in range(count - data + 1):
      mesh = Mesh(data=2 ** data, fsdp=2 ** fsdp, tensor=2 ** (count - data - fsdp)).make(devices)
      assert tuple(mesh.shape.values()) == (2 ** data, 2 ** fsdp, 2 ** (count - data - fsdp))
      found.append(len(set(mesh.devices.ravel().tolist())))
  return {'devices': len(devices), 'meshes': len(found), 'distinct': min(found)}


def compiled(topology: str, program: str, *overrides: str, rows: int = ROWS) -> ahead.Compiled:
  config = configs.load(CONFIG, [*SMALL, *overrides])
  return ahead.compile_for(topologies.find(topology), config, program, rows)


def along(collective, mesh) -> list[str]:
  """The axes of the mesh along which the devices of a collective differ."""
  if collective.group is None:
    return ['permute']
  places = np.stack(np.unravel_index(collective.group, tuple(mesh.values())))
  return [name for name, row in zip(mesh, places) if len(set(row.tolist())) > 1]


def described(program: ahead.Compiled) -> dict:
  """What the tests ask about."""
  return {'collectives': [[each.op, along(each, program.mesh), each.size, each.looped]
                          for each in program.program.collectives], 'kernels': dict(program.program.kernels),
          'peak': program.peak, 'flops': program.flops, 'sent': sum(program.program.sent.values()),
          'least': program.least(), 'report': ahead.report('tiny', program)}


def weights(mesh: dict[str, int]) -> list[list]:
  """Of every parameter its bytes, and whether fsdp and tensor divide it."""
  model = configs.load(CONFIG, SMALL).model
  shapes = parameter_shapes(model)
  divided = sharding.specs(shapes, type('Sizes', (), {'shape': mesh}), parameter_roles(model))
  return [[leaf.size * 4, 'fsdp' in tuple(spec), 'tensor' in tuple(spec)] for leaf, spec in zip(
      jax.tree.leaves(shapes), jax.tree.leaves(divided, is_leaf=lambda leaf: isinstance(leaf, P)))]


def refused(call) -> str:
  """What a ConfigError says."""
  try:
    call()
  except ConfigError as error:
    return str(error)
  return ''


def main():
  jax.config.update('jax_exec_time_optimization_effort', ahead.EFFORT)
  found = {'meshes': {name: meshes(name) for name in SLICES}}
  split = compiled('v5e:2x4', 'train', 'mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2')
  found['split'] = {**described(split), 'weights': weights(split.mesh)}
  whole = compiled('v5e:4x4', 'train', 'mesh.fsdp=16')
  found['whole'] = {**described(whole), 'weights': weights(whole.mesh)}
  found['eval'] = described(compiled('v5e:2x4', 'eval', 'mesh.fsdp=4', 'mesh.tensor=2'))
  found['refused'] = {
      'memory': refused(lambda: compiled('v5e:1x1', 'eval', rows=1 << 19)),
      'name': refused(lambda: topologies.find('v5e:3x5')), 'unknown': refused(lambda: topologies.find('abacus')),
      'mesh': refused(lambda: compiled('v5e:4x4', 'train', 'mesh.fsdp=5')),
      'rows': refused(lambda: compiled('v5e:4x4', 'train', 'train.batch=8'))}
  print(json.dumps(found))


if __name__ == '__main__':
  main()
