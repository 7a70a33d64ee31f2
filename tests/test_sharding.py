import json

import jax
from jax.sharding import PartitionSpec as P
import pytest

from loopformer import sharding
from loopformer.sharding import Mesh
from loopformer.types import ConfigError
from tests import parts

MESHES = ('1x1/4', '8x1/1', '8x1/2', '1x8/1', '1x8/2', '2x4/1', '2x4/2')


@pytest.fixture(scope='module')
def report() -> dict:
  """Of one program on eight devices, whose programs are compiled as in a real run."""
  out = parts.python('from tests import eight_devices; eight_devices.main()', timeout=600,
                     XLA_FLAGS='--xla_force_host_platform_device_count=8')
  return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_sharded_step_equals_the_single_device_one(report, mesh):
  single, ours = report['steps']['1x1/1'], report['steps'][mesh]
  tolerance = 1e-6 if mesh == '1x1/4' else 1e-5
  assert set(ours['values']) == {'loss', 'lm', 'lm_short', 'shortcut', 'grad_norm'}
  for name, value in single['values'].items():
    assert ours['values'][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
  assert max(ours['error'].values()) < tolerance, ours['error']
  assert ours['step'] == 4
  assert report['moved'] > 1e-4  # every parameter has been updated, far beyond the tolerance


@pytest.mark.slow
@pytest.mark.parametrize('mesh', ['8x1/1', '1x8/1', '2x4/1'])
def test_state_and_batch_are_divided(report, mesh):
  data, fsdp = (int(n) for n in mesh.split('/')[0].split('x'))
  ours = report['steps'][mesh]
  layers, width, hidden = parts.N, parts.D, 24
  assert ours['kernel'] == ours['moment'] == [layers, width, hidden // fsdp]
  assert ours['rows'] == 16 // (data * fsdp)
  assert 1 / fsdp <= ours['share'] < 1 / fsdp + 0.01
  assert ours['stays']


@pytest.mark.slow
def test_communication_does_not_grow_with_loops(report):
  few, many = report['collectives']['2/1'], report['collectives']['6/1']
  names = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
  assert {name: few[name] for name in names} == {name: many[name] for name in names}
  assert many['all-gather'] > 0 and many['loops'] > 0


@pytest.mark.slow
@pytest.mark.parametrize('program', ['2/1', '6/1', '6/2'])
def test_no_communication_inside_loops(report, program):
  assert report['collectives'][program]['inside_loops'] == 0
  assert report['control']['inside_loops'] > 0  # the count can see what it must not find


@pytest.mark.parametrize('shape, parts_, axis', [
    ((16, 64), 4, 1), ((64, 16), 4, 0), ((2, 16, 24), 8, 2), ((3, 5), 4, None), ((), 4, None), ((64, 16), 1, None),
    ((7, 16), 4, 1), ((2,), 4, None), ((4,), 4, 0), ((8, 8), 8, 0),
], ids=str)
def test_the_largest_axis_that_divides_is_split(shape, parts_, axis):
  assert sharding.split_axis(shape, parts_) == axis
  assert sharding.spec(shape, parts_) == (P() if axis is None else P(*(None,) * axis, 'fsdp'))


@pytest.mark.parametrize('mesh, message', [
    (dict(data=0), r'mesh\.data = 0'), (dict(fsdp=-2), r'mesh\.fsdp = -2'),
    (dict(data=-1, fsdp=-1), 'mesh.data and mesh.fsdp are both -1'),
], ids=str)
def test_a_mesh_that_cannot_be_is_refused(mesh, message):
  with pytest.raises(ConfigError, match=message):
    Mesh(**mesh)


@pytest.mark.parametrize('mesh', [dict(data=3, fsdp=1), dict(data=-1, fsdp=3), dict(data=2, fsdp=2)], ids=str)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
  with pytest.raises(ConfigError, match=r'does not use all 1 devices'):
    Mesh(**mesh).make(jax.devices()[:1])


def test_mesh_takes_the_devices_that_are_left():
  mesh = Mesh().make(jax.devices()[:1])
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 1} and mesh.axis_names == sharding.AXES
