import json
from types import SimpleNamespace

import jax
from jax.sharding import PartitionSpec as P
import pytest

from loopformer import sharding
from loopformer.model import parameter_roles
from loopformer.roles import Role
from loopformer.sharding import Mesh
from loopformer.types import ConfigError
from tests import eight_devices, parts, quick


@pytest.fixture(scope='module')
def report() -> dict:
  """Of one program on eight devices."""
  out = parts.python('from tests import eight_devices; eight_devices.main()', timeout=900,
                     XLA_FLAGS=f'{quick.FLAGS} --xla_force_host_platform_device_count=8')
  return json.loads(out.splitlines()[-1])


RUNS = [f'{setup} {data}x{fsdp}x{tensor}/{accumulate}' for setup, data, fsdp, tensor, accumulate in eight_devices.RUNS]
ALONE = '1x1x1'


@pytest.mark.slow
@pytest.mark.parametrize('run', [run for run in RUNS if ALONE not in run])
def test_sharded_step_equals_the_single_device_one(report, run):
  setup = run.split()[0]
  single, ours = report['steps'][eight_devices.alone(setup, int(run.split('/')[1]))], report['steps'][run]
  tolerance = 1e-5
  assert set(ours['values']) >= {'loss', 'lm', 'grad_norm', 'grad_norm/read_in', 'grad_norm/cell/core'}
  assert set(ours['values']) == set(single['values'])
  for name, value in single['values'].items():
    assert ours['values'][name] == pytest.approx(value, rel=tolerance, abs=1e-6), name
  assert max(ours['error'].values()) < tolerance, ours['error']
  assert ours['step'] == 4
  assert report['moved'][setup] > 1e-4  # every parameter has been updated, far beyond the tolerance


@pytest.mark.slow
@pytest.mark.parametrize('run', [run for run in RUNS if ALONE not in run])
def test_state_and_batch_are_divided(report, run):
  data, fsdp, tensor = (int(n) for n in run.split()[1].split('/')[0].split('x'))
  ours = report['steps'][run]
  layers, width, hidden = parts.N, parts.D, 24
  if tensor == 1:
    assert ours['kernel'] == ours['moment'] == [layers, width, hidden // fsdp]
  else:
    assert ours['kernel'] == ours['moment'] == [layers, width // fsdp, hidden // tensor]
  assert ours['rows'] == 16 // (data * fsdp)
  if tensor == 1:
    assert 1 / fsdp <= ours['share'] < 1 / fsdp + 0.01
  assert ours['stays']


@pytest.mark.slow
@pytest.mark.parametrize('setup', eight_devices.SETUPS)
@pytest.mark.parametrize('mesh', ['2x4x1', '2x2x2'])
def test_communication_does_not_grow_with_loops(report, setup, mesh):
  """One gather and one reduction for every parameter that is divided, whatever the number of loops."""
  few, many = (report['collectives'][f'{setup} {mesh}/1 {loops}'] for loops in (eight_devices.LOOPS,
                                                                                eight_devices.MANY))
  assert {name: few[name] for name in eight_devices.COLLECTIVES} == {
      name: many[name] for name in eight_devices.COLLECTIVES}
  assert many['all-gather'] == many['divided'] > 0
  twins = setup == 'loopformer'  # two biases, of time and of step size, have one gradient, which XLA reduces once
  assert many['reduce-scatter'] == many['divided'] - twins
  assert many['loops'] > 0
  assert (many['tensor'] > 0) == (mesh == '2x2x2')


@pytest.mark.slow
def test_a_kernel_runs_on_the_rows_and_heads_of_its_device(report):
  expected = {'evaluating': (2, 2), 'odd': (3, 4), 'training': (2, 2)}
  assert {name: found['seen'] for name, found in report['kernels'].items()} == {
      f'{kind} {where}': [rows, length, heads, 8]
      for kind, length in (('plain', 6), ('cudnn', 6), ('splash', 128)) for where, (rows, heads) in expected.items()}
  for name, found in report['kernels'].items():
    assert found['error'] < (2e-2 if name.startswith('cudnn') else 2e-6), name  # cuDNN's are in bfloat16


@pytest.mark.slow
def test_a_sum_over_all_devices_of_a_slice_is_scattered_in_two_stages(report):
  """To the same places; the compiler of a TPU would make it whole on every device."""
  assert report['staged']['scatters'] == [1, 2]
  assert report['staged']['error'] < 1e-5 < report['staged']['size']


@pytest.mark.slow
def test_what_fsdp_does_not_divide_is_held_in_parts(report):
  """Twelve by twelve on eight devices: four parts of one axis by two of the other."""
  found = report['uneven']
  assert found['kernel'] == [2, 12, 12] and sorted(found['part']) == [2, 3, 6] and found['stays']
  assert found['error'] < 1e-6


@pytest.mark.parametrize('shape, partition, size, expected', [
    ((4, 5280, 15840), P(), 64, (32, P(None, 'inner', 'outer'))),
    ((4, 5280, 5280), P(), 64, (32, P(None, 'outer', 'inner'))), ((1001, 1002), P(), 8, (2, P(None, 'outer'))),
    ((1001, 1003), P(), 8, None), ((12, 12), P(), 8, None),
    ((4, 5280, 15840), P(None, None, 'tensor'), 64, (32, P('inner', 'outer', 'tensor')))], ids=str)
def test_two_ways_to_divide(shape, partition, size, expected):
  """The most parts; the larger number of devices along the larger axis that they divide."""
  found = sharding.two_ways(shape, partition, size)
  if expected is None:
    assert found is None
  else:
    shares = {'outer': found[0], 'inner': size // found[0], 'tensor': 1, None: 1}
    assert all(length % shares[name] == 0 for length, name in zip(shape, found[1]))
    assert found == expected


@pytest.mark.slow
def test_no_communication_inside_loops(report):
  assert {name: row['inside_loops'] for name, row in report['collectives'].items()} == dict.fromkeys(
      report['collectives'], 0)
  assert report['control']['inside_loops'] > 0  # the count can see what it must not find


@pytest.mark.parametrize('shape, parts_, axis', [
    ((16, 64), 4, 1), ((64, 16), 4, 0), ((2, 16, 24), 8, 2), ((3, 5), 4, None), ((), 4, None), ((64, 16), 1, None),
    ((7, 16), 4, 1), ((2,), 4, None), ((4,), 4, 0), ((8, 8), 8, 0),
], ids=str)
def test_the_largest_axis_that_divides_is_split(shape, parts_, axis):
  found = sharding.spec(Role(), shape, {'fsdp': parts_, 'tensor': 2})
  assert found == (P() if axis is None else P(*(None,) * axis, 'fsdp'))


ROLES = parameter_roles(parts.ROWS['added'].model)  # with biases, and a head of its own


@pytest.mark.parametrize('path, shape, fsdp, tensor, partition', [
    ('cell/core/block/attn/qkv/kernel', (2, 16, 48), 1, 4, P(None, None, 'tensor')),
    ('cell/core/block/attn/qkv/kernel', (2, 16, 48), 2, 4, P(None, 'fsdp', 'tensor')),
    ('optimizer/0/mu/cell/core/block/attn/out/kernel', (2, 16, 16), 2, 4, P(None, 'tensor', 'fsdp')),
    ('cell/core/block/mlp/up/kernel', (16, 64), 1, 8, P(None, 'tensor')),
    ('cell/core/block/mlp/down/kernel', (64, 16), 2, 8, P('tensor', 'fsdp')),
    ('cell/core/block/mlp/up/bias', (2, 64), 1, 8, P(None, 'tensor')),
    ('cell/core/block/mlp/down/bias', (2, 64), 1, 8, P()),
    ('read_in/embedding', (100, 16), 2, 4, P('tensor', 'fsdp')),
    ('read_in/embedding', (101, 16), 2, 4, P(None, 'fsdp')),  # does not divide: whole there
    ('read_in/embedding', (100, 16), 2, 1, P('fsdp')),
    ('read_out/kernel', (100, 16), 1, 4, P('tensor')),
    ('cell/other/kernel', (16, 48), 1, 4, P()),
], ids=str)
def test_a_layer_divides_over_tensor(path, shape, fsdp, tensor, partition):
  role = ROLES.at(tuple(jax.tree_util.DictKey(name) for name in path.split('/')))
  assert sharding.spec(role, shape, {'fsdp': fsdp, 'tensor': tensor}) == partition


def fake(sizes: tuple[int, int, int]):
  return SimpleNamespace(shape=dict(zip(sharding.AXES, sizes)))


def test_heads_and_batches_that_do_not_divide_are_refused():
  model = parts.ROWS['grouped'].model  # 2 groups
  sharding.check_model(model, fake((1, 1, 2)))
  with pytest.raises(ConfigError, match=r'mesh\.tensor = 4 does not divide the 2 heads of keys and values.*divisor'):
    sharding.check_model(model, fake((1, 1, 4)))
  sharding.check_batch(24, 3, fake((2, 4, 3)))
  with pytest.raises(ConfigError, match=r'train\.batch / train\.accumulate = 12 rows do not divide over.*= 8'):
    sharding.check_batch(24, 2, fake((2, 4, 3)))


@pytest.mark.parametrize('mesh, message', [
    (dict(data=0), r'mesh\.data = 0'), (dict(fsdp=-2), r'mesh\.fsdp = -2'),
    (dict(tensor=0), r'mesh\.tensor = 0'),
    (dict(data=-1, fsdp=-1), 'mesh.data and mesh.fsdp are both -1'),
    (dict(fsdp=-1, data=1, tensor=-1), 'mesh.fsdp and mesh.tensor are both -1'),
], ids=str)
def test_a_mesh_that_cannot_be_is_refused(mesh, message):
  with pytest.raises(ConfigError, match=message):
    Mesh(**mesh)


@pytest.mark.parametrize('mesh', [dict(data=3, fsdp=1), dict(data=-1, fsdp=3), dict(data=2, fsdp=2), dict(tensor=2)],
                         ids=str)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
  with pytest.raises(ConfigError, match=r'does not use all 1 devices'):
    Mesh(**mesh).make(jax.devices()[:1])


def test_mesh_takes_the_devices_that_are_left():
  mesh = Mesh().make(jax.devices()[:1])
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1} and mesh.axis_names == sharding.AXES
