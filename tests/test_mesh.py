"""What is done with a trained model, on eight devices as on one."""
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments.tools import machines
from loopformer import config as configs, sharding
from loopformer.sharding import Mesh
from loopformer.types import ConfigError
from tests import eight_inference, meshes, parts, quick
from tests.experiments import test_cli

MESHES = list(eight_inference.MESHES)


@pytest.fixture(scope='module')
def report() -> dict:
  """Of one program on eight devices."""
  out = parts.python('from tests import eight_inference; eight_inference.main()', timeout=900,
                     XLA_FLAGS=f'{quick.FLAGS} --xla_force_host_platform_device_count=8')
  return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_evaluation_is_that_of_one_device(report, mesh):
  """With an exit, and batches that the devices do not divide."""
  found = report[mesh]['evaluate']
  assert set(found) >= {'loss', 'perplexity', 'bits_per_byte', 'tokens', 'state norm', 'ran', 'budget'}
  assert max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_weights_that_stay_divided_answer_the_same(report):
  """Rows that fill up a batch are no answers."""
  found = report['answers']
  assert set(found) >= {'loss', 'accuracy', 'exact', 'last', 'tokens'} and max(found.values()) < 1e-5, found


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_a_device_scores_its_own_rows(report, mesh):
  """Chunks of the loss cut across rows, and no state is gathered for it."""
  found = report[mesh]['score']
  assert found['inside_loops'] == found['all-gather'] == found['all-to-all'] == 0 < found['loops'], found
  assert found['all-reduce'] > 0  # the sums


@pytest.mark.slow
def test_loading_exporting_and_importing_divide_the_weights(report):
  found = report['load']
  assert found['share'] == found['imported'] == pytest.approx(found['expected']) and found['share'] < 0.5, found
  assert found['error'] == found['import error'] == 0 and found['same file'], found


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_texts_are_those_of_one_device(report, mesh):
  found = report[mesh]
  assert report['unlike'] > 5 and found['texts'] and found['tally'] == [True, True]
  tensor = eight_inference.MESHES[mesh].get('tensor', 1)
  assert found['rows'] == 8  # of 5
  slots, layers, rows, groups, *_ = found['cache']
  assert (slots, layers) == (4, 2) and rows == tensor and groups == 2 // tensor
  assert found['bytes'] == pytest.approx(8 / 5)  # of all devices together: rows that fill up, and no copies
  assert found['kernels'] == [1 / tensor, 1 / tensor]


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('program', ['prefill', 'decode'])
def test_rows_are_served_where_they_are(report, mesh, program):
  """Neither caches nor anything else is gathered; layers that are divided agree on how long their loops are."""
  found = report[mesh]['programs'][program]
  assert found['all-gather'] == found['all-to-all'] == found['reduce-scatter'] == 0 < found['loops'], found
  if mesh == 'rows':
    assert found['inside_loops'] == found['tensor'] == 0, found
  else:
    assert found['inside_loops'] <= 2 and 0 < found['tensor'] < 10, found


@pytest.mark.slow
def test_a_denoiser_writes_and_scores_as_on_one_device(report):
  found = report['denoised']
  assert found['unlike'] == 8 and found['texts'] and found['scores'] < 1e-4, found


@pytest.mark.slow
def test_scores_of_the_harness_are_those_of_one_device(report):
  assert report['harness'] < 1e-5


def test_without_a_mesh_nothing_is_divided():
  params = parts.params(eight_inference.MODEL)
  assert sharding.mesh_of(params) is None and sharding.mesh_of({'a': np.zeros(3)}) is None
  assert sharding.gathered(params) is params
  one = sharding.place(params, Mesh().make(jax.devices()[:1]), eight_inference.ROLES)
  assert sharding.mesh_of(one) is None
  parts.close(one, params, 0)


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  setting = test_cli.write_setting(tmp_path_factory.mktemp('corpus'))
  return configs.load(setting.removeprefix('--config='))


@pytest.mark.slow
def test_where_a_run_was_trained_does_not_decide_where_it_is_evaluated(report):
  """Its own mesh where it fits, and otherwise the devices that are here."""
  sizes = [(mesh['data'], mesh['fsdp'], mesh['tensor']) for mesh in report['meshes']]
  assert sizes == [(8, 1, 1), (1, 4, 2), (1, 8, 1), (1, 8, 1)]


@pytest.mark.parametrize('mesh, assignments, devices, expected', [
    (dict(), [], 1, None), (dict(fsdp=8), [], 1, None), (dict(), ['mesh.fsdp=1'], 1, None)], ids=str)
def test_one_device_needs_no_mesh(config, mesh, assignments, devices, expected):
  config = dataclasses.replace(config, mesh=Mesh(**mesh))
  assert machines.mesh_of(config, assignments, jax.devices()[:devices]) is expected


def test_a_mesh_that_is_asked_for_must_fit(config):
  with pytest.raises(ConfigError, match='does not use all 1 devices'):
    machines.mesh_of(config, ['mesh.tensor=2'], jax.devices()[:1])


@pytest.mark.parametrize('mode', [['--mode=eval'], ['--mode=generate'], ['--mode=harness', '--tasks=x']],
                         ids=lambda m: m[0])
def test_only_the_mesh_may_be_set_for_a_trained_model(tmp_path, mode):
  status, out, err = test_cli.run_here(tmp_path, *mode, '--set', 'train.batch=2')
  assert status == 1 and not out
  assert err.splitlines()[-1] == (f'error: --set train.batch=2: {mode[0]} takes the run as it was trained; only '
                                  'mesh.data, mesh.fsdp and mesh.tensor may be set')


@pytest.mark.slow
def test_a_network_with_batches_of_its_own_trains_on_eight_devices_as_on_one():
  """Tokens that are masked and latents that are noised within the step, times of every sequence, experts. `python -m
  tests.meshes` does it for the other systems."""
  name = 'ccdd:cpu,kind=moe,source=corrupted,times=apart'
  difference, where = meshes.compared([name], '2x2x2', 2)[name]
  assert difference < meshes.TOLERANCE, where


def test_what_is_apart():
  assert meshes.numbers([{'a': 1, 'b': [2.0, 'x']}]) == {'/0/a': 1.0, '/0/b/0': 2.0}
  assert meshes.apart({'a': 1.0, 'b': 2.0}, {'a': 1.0, 'b': 2.5}) == (0.25, 'b')
  assert meshes.apart({'a': math.nan, 'b': 0.0}, {'a': math.nan, 'b': 0.01}) == (pytest.approx(0.1), 'b')
  assert meshes.apart({'a': math.nan}, {'a': 1.0})[0] == math.inf
