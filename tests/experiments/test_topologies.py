"""Programs as the compilers of TPUs make them, on a machine that has none; and what bad input is told."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from unittest import mock

import pytest

from experiments.tools import hlo, topologies
from loopformer.types import ConfigError
from tests import parts, tpu_programs
from tests.experiments import test_cli

WITH_TPU = pytest.mark.skipif(importlib.util.find_spec('libtpu') is None,
                              reason="wants libtpu, the TPU's compiler (extra `tpu`)")


@pytest.fixture(scope='module')
def found() -> dict:
  return json.loads(parts.python('from tests import tpu_programs; tpu_programs.main()', timeout=900).splitlines()[-1])


@WITH_TPU
@pytest.mark.slow
@pytest.mark.parametrize('name', tpu_programs.SLICES)
def test_every_mesh_of_a_slice_can_be_made(found, name):
  row = found['meshes'][name]
  n = row['devices'].bit_length() - 1
  assert row['meshes'] == (n + 1) * (n + 2) // 2 and row['distinct'] == row['devices']


@WITH_TPU
@pytest.mark.slow
@pytest.mark.parametrize('which', ['split', 'whole'])
def test_training_attends_by_splash_attention(found, which):
  """Two rollouts of two layers each, both passes."""
  assert found[which]['kernels'] == {'splash_mha_fwd_residuals': 4, 'splash_mha_dkv_no_residuals': 4}


def exchanged(row, op, axes, looped=False):
  """Sizes of the collectives along these axes, but for single numbers."""
  return [size for kind, along, size, inside in row['collectives']
          if kind == op and along == axes and inside == looped and size > 1000]


def divided(row, tensor):
  """Bytes of the parameters that fsdp divides, of a tensor group's part where tensor divides them too."""
  return sum(size / (tensor if both else 1) for size, over, both in row['weights'] if over)


@WITH_TPU
@pytest.mark.slow
@pytest.mark.parametrize('which, tensor', [('split', 2), ('whole', 1)])
def test_a_parameter_is_gathered_once(found, which, tensor):
  """Over fsdp, a tensor group's part of it alone."""
  row = found[which]
  assert sum(exchanged(row, 'all-gather', ['fsdp'])) == pytest.approx(divided(row, tensor), rel=0.02)


@WITH_TPU
@pytest.mark.slow
def test_a_gradient_crosses_fsdp_once(found):
  """Scattered, or where the compiler joins several and makes the sum whole, as that."""
  row = found['split']
  scattered, summed = (sum(exchanged(row, op, ['fsdp'])) for op in ('reduce-scatter', 'all-reduce'))
  assert scattered + summed == pytest.approx(divided(row, 2), rel=0.02)
  assert scattered > 0.4 * summed


@WITH_TPU
@pytest.mark.slow
@pytest.mark.parametrize('which', ['split', 'whole', 'eval'])
def test_nothing_goes_between_rows_inside_loops(found, which):
  assert not [each for each in found[which]['collectives'] if each[3] and set(each[1]) & {'data', 'fsdp'}]


@WITH_TPU
@pytest.mark.slow
def test_no_weight_is_gathered_over_tensor(found):
  """Inside loops, states are summed over the devices of a group."""
  assert not exchanged(found['split'], 'all-gather', ['tensor'])
  assert exchanged(found['split'], 'all-reduce', ['tensor'], looped=True)


@WITH_TPU
@pytest.mark.slow
def test_a_sum_over_a_whole_slice_is_scattered(found):
  """In two stages of four devices; as one of sixteen the compiler would make it whole on every device."""
  row = found['whole']
  scattered, summed = (sum(exchanged(row, op, ['fsdp'])) for op in ('reduce-scatter', 'all-reduce'))
  assert scattered > 0.8 * divided(row, 1) and summed < 0.3 * divided(row, 1)


@WITH_TPU
@pytest.mark.slow
def test_an_evaluation_gathers_no_states(found):
  """Over the devices that divide the rows; only single numbers are summed."""
  row = found['eval']
  assert row['kernels'] == {'splash_mha_fwd_no_residuals': 2}
  assert not [each for each in row['collectives'] if set(each[1]) & {'data', 'fsdp'} and each[2] > 1000]


@WITH_TPU
@pytest.mark.slow
def test_a_report_says_what_a_program_needs(found):
  report = found['split']['report']
  for told in ('tiny on v5e:2x4, 8 devices: data 2 x fsdp 2 x tensor 2', 'compiled by libtpu ', 'peak GB', 'in loops',
               'reduce-scatter', 'splash_mha_fwd_residuals x4', 'bound by'):
    assert told in report
  assert 0 < found['split']['peak'] < 1e9
  assert found['split']['flops'] == pytest.approx(2 * found['whole']['flops'], rel=0.01)  # of a device


@WITH_TPU
@pytest.mark.slow
@pytest.mark.parametrize('what, told', [
    ('memory', ["--topology=v5e:1x1: the program 'eval' does not fit (RESOURCE_EXHAUSTED", 'take a larger topology']),
    ('name', ['--topology=v5e:3x5: there is no such machine; there are v5e:1x1 2x2', 'h100 or h200:N']),
    ('unknown', ['--topology=abacus: there is no such machine']),
    ('mesh', ['mesh = (data=-1, fsdp=5, tensor=1) does not use all 16 devices']),
    ('rows', ['8 rows do not divide over mesh.data * mesh.fsdp = 16'])])
def test_what_cannot_be_is_refused_in_a_line(found, what, told):
  for words in told:
    assert words in found['refused'][what]
  assert '\n' not in found['refused'][what]


# Without a compiler --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, told', [('v5e:2x2', r"pip install 'loopformer\[tpu\]'"),
                                        ('h100:2', r"CUDA plugin of JAX is not installed; pip install 'jax\[cuda12\]")])
def test_a_compiler_that_is_not_installed(name, told):
  topologies.find.cache_clear()
  with (mock.patch.object(importlib.metadata, 'version', side_effect=importlib.metadata.PackageNotFoundError),
        mock.patch.object(importlib.metadata, 'distributions', lambda: []), pytest.raises(ConfigError, match=told)):
    topologies.find(name)


@pytest.mark.parametrize('name', ['h100:0', 'h100:12', 'h100:x', 'v5p:4x4', 'v5e', ''])
def test_names_of_no_machine(name):
  with pytest.raises(ConfigError, match='there is no such machine; there are v5e:1x1'):
    topologies.find(name)


@pytest.mark.parametrize('arguments, told', [
    (['--program=decode'], '--program=decode: simulated CPU devices plan training alone; name a machine by --topology'),
    (['--topology=v5e:9x9'], '--topology=v5e:9x9: there is no such machine'),
    (['--topology=v5e:2x2', '--program=bake'], '--program=bake: choose from train, eval, prefill, decode'),
    (['--topology=v5e:2x2', '--rows=0'], '--rows=0: give the number')], ids=['program', 'topology', 'what', 'rows'])
def test_command_line_refuses(tmp_path, monkeypatch, arguments, told):
  monkeypatch.chdir(tmp_path)
  status, _, err = test_cli.run_here(None, '--mode=plan', f'--config={tpu_programs.CONFIG}', *arguments)
  assert status == 1 and told in err, err
  assert not list(tmp_path.iterdir())


ASYNC = '''HloModule example

%condition (c: (s32[], f32[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(7)
  %c = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (p: f32[4,8]) -> f32[2,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %sum = f32[4,8]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
  ROOT %part = f32[2,8]{1,0:T(8,128)} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={2,8}
}

%body (d: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %d = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%d), index=1
  %y = f32[2,8]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %copy.3 = f32[4,8]{0,1:T(8,128)} copy(%x)
  ROOT %next = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i.1, %copy.3)
}

ENTRY %main (x.1: f32[2,8]) -> f32[4,8] {
  %x.1 = f32[2,8]{1,0:T(8,128)} parameter(0)
  %gather = (f32[2,8]{1,0}, f32[4,8]{1,0}) all-gather-start(%x.1), replica_groups=[1,2]<=[2], dimensions={0}
  %splash.12 = f32[4,8]{1,0} custom-call(%x.1), custom_call_target="tpu_custom_call"
  %attend = f32[4,8]{1,0} custom-call(%x.1), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
}
'''


def test_programs_of_accelerators_are_read():
  """Loops by their conditions, collectives that start and end, sums that are scattered, kernels, copies."""
  read = hlo.Program(ASYNC, hlo.Steps(free=100.0, live=1.0))
  assert [(each.op, each.size, each.times, each.looped) for each in read.collectives] == [
      ('all-gather', 4 * 8 * 4, 1.0, False), ('reduce-scatter', 4 * 8 * 4, 7.0, True)]
  assert read.sent == {('all-gather', 2, 2): 64.0, ('reduce-scatter', 2, 2): 7 * 64.0}
  assert read.kernels == {'splash': 1, '__cudnn$fmhaSoftmax': 1}
  assert [(copy.size, copy.times, copy.looped) for copy in read.copies] == [(128.0, 7.0, True)]


def test_loops_of_unknown_end_around_each_other():
  """The outer one once, the inner one as often as is told."""
  text = ASYNC.replace('direction=LT', 'direction=GT').replace('%x = f32', '''%inner = (s32[], f32[4,8]) while(%d), \
condition=%condition, body=%deeper
  %x = f32''').replace('%body (d', '''%deeper (e: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %e = (s32[], f32[4,8]{1,0}) parameter(0)
  %copy.4 = f32[2,2]{1,0} copy(%e)
  ROOT %next.1 = (s32[], f32[4,8]{1,0}) tuple(%e, %e)
}

%body (d''')
  read = hlo.Program(text, hlo.Steps(free=5.0, live=1.0, outer=1.0))
  assert {copy.size: copy.times for copy in read.copies} == {128.0: 1.0, 16.0: 5.0}
