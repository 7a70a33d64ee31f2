"""Plans of training steps: what they count, against real shards, programs and formulas; and what bad input is told."""
from __future__ import annotations

import functools
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from experiments.tools import estimate
from loopformer import loop, plans, sharding
from loopformer.config import Experiment
from loopformer.model import parameter_roles
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.sharding import Mesh
from loopformer.tasks.text import Text
from loopformer.terms.cross_entropy import CE
from loopformer.training import metrics
from loopformer.training.step import init_state, make_step
from loopformer.training.train import Train
from loopformer.types import ConfigError
from tests import parts
from tests.experiments import test_cli

ROOT = Path(__file__).parents[2]
ROWS, HIDDEN = 16, 24
NO_STEPS = estimate.Steps(free=0.0, live=1.0)


def small(loops: int, remat=loop.KeepAll(), accumulate: int = 1, rows: int = ROWS) -> Experiment:
  """Two layers looped; every sum over tensor is one of [rows, T, D] after attention or MLP."""
  return Experiment(
      name='small', model=parts.looped(parts.plain(heads=8), loops=loops, remat=remat),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=Text(length=parts.T), train=Train(batch=rows, accumulate=accumulate, steps=10),
      optim=AdamW(schedule=WarmupCosine(warmup=2)))


MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
PAIRS = [(mesh, loops) for mesh in MESHES for loops in (3, 5) if mesh != (8, 1, 1) or loops == 3]
CASES = [(mesh, loops, 1) for mesh, loops in PAIRS] + [((2, 4, 1), 3, 2)]


def main():
  """Of one process with eight devices: plans, and what real states and programs are; prints JSON."""
  estimate.simulate(8)
  found = {}
  for sizes, loops, accumulate in CASES:
    config = small(loops, accumulate=accumulate)
    mesh = Mesh(**dict(zip(sharding.AXES, sizes))).make()
    made = estimate.make_plan(config, mesh)
    row = {'weights': made.weights, 'optimizer': made.optimizer, 'gathered': made.gathered, 'rest': made.rest,
           'gradients': made.gradients, 'total': made.total, 'flops': made.flops,
           'sent': [[*key, count] for key, count in made.sent.items()]}
    roles = parameter_roles(config.model)
    optimizer = config.optim.make(config.train.steps, roles)
    state = jax.eval_shape(functools.partial(init_state, config.model, optimizer, 0))
    specs = sharding.specs(state.params, mesh, roles)
    row['params'] = [[leaf.size * leaf.dtype.itemsize, 'fsdp' in tuple(spec), 'tensor' in tuple(spec)]
                     for leaf, spec in zip(jax.tree.leaves(state.params), jax.tree.leaves(
                         specs, is_leaf=lambda leaf: isinstance(leaf, jax.sharding.PartitionSpec)))]
    if loops == 3:
      real = jax.device_put(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state),
                            sharding.shardings(state, mesh, roles))
      row['real'] = [sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
                     for tree in (real.params, real.optimizer)]
      batch = sharding.put_batch({**parts.batch(ROWS), 'row': jnp.arange(ROWS), 'stop': jnp.zeros(ROWS)}, mesh)
      step = make_step(config.model, config.objective, optimizer, mesh, accumulate, 0)
      memory = step.lower(real, batch).compile().memory_analysis()
      row['compiled'] = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                         + memory.temp_size_in_bytes)
    found[name_of(sizes, loops, accumulate)] = row
  for loops in (4, 12):
    made = estimate.make_plan(small(loops, remat=loop.PerStep(), rows=1024), Mesh().make())
    found[f'memory {loops}'] = {'total': made.total, 'sent': [[*key, count] for key, count in made.sent.items()]}
  print(json.dumps(found))


def name_of(sizes, loops, accumulate) -> str:
  return f'{"x".join(map(str, sizes))} {loops}/{accumulate}'


@pytest.fixture(scope='module')
def found() -> dict:
  """Of programs that are compiled as in a real run: their memory is what is predicted."""
  out = parts.python('from tests.experiments import test_plan; test_plan.main()', timeout=900, XLA_FLAGS='')
  return json.loads(out.splitlines()[-1])


def sent(row, op: str, count: int) -> float:
  """Bytes of a collective among so many devices, without sums of a few numbers."""
  return sum(number for name, among, _, number in row['sent'] if (name, among) == (op, count))


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES, ids=lambda case: name_of(*case))
def test_shards_are_those_of_a_real_state(found, case):
  row = found[name_of(*case)]
  if 'real' in row:
    assert [row['weights'], row['optimizer']] == row['real']
  whole = sum(count for count, _, _ in row['params'])
  assert row['weights'] < whole or case[0] == (8, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize('case', [case for case in CASES if case[1] == 3], ids=lambda case: name_of(*case))
def test_memory_is_that_of_the_real_program(found, case):
  """Which is optimised in full, and attends in blocks of its own."""
  row = found[name_of(*case)]
  assert 0.9 * row['compiled'] < row['total'] < 1.2 * row['compiled']
  assert row['rest'] > 0


@pytest.mark.slow
def test_memory_grows_by_a_state_a_loop(found):
  state = 1024 // 8 * parts.T * parts.D * 4
  growth = (found['memory 12']['total'] - found['memory 4']['total']) / 8
  assert 0.9 * state < growth < 1.3 * state


@pytest.mark.slow
@pytest.mark.parametrize('mesh, loops', PAIRS, ids=str)
def test_weights_and_gradients_are_sent_once(found, mesh, loops):
  row, (data, fsdp, tensor) = found[name_of(mesh, loops, 1)], mesh
  divided = sum(count for count, over, _ in row['params'] if over)
  both = sum(count for count, over, also in row['params'] if over and also)
  # Over fsdp go the weights whole, or a group's tensor shard of them, as the partitioner likes.
  shares = [(count - both + both / tensor) * (fsdp - 1) / fsdp for count, both in ((divided, 0), (divided, both))]
  gathered, scattered = sent(row, 'all-gather', fsdp), sent(row, 'reduce-scatter', fsdp)
  if fsdp == 1:
    assert not [name for name, *_ in row['sent'] if name != 'all-reduce']
  else:
    assert any(scattered == pytest.approx(share) for share in shares)
    if tensor == 1:
      assert gathered == scattered
    else:  # groups along tensor are as large, and gather some weights as well: at most all of them, twice
      assert scattered <= gathered <= scattered + 2 * both / 2
  # Over data goes a device's shard of the gradients, and over both axes what neither divides.
  if tensor == 1:
    whole = sum(count for count, over, _ in row['params'] if not over)
    expected = {data: divided / fsdp, data * fsdp: 0}
    expected[data * fsdp] += whole
    for count, number in expected.items():
      number *= 2 * (count - 1) / count
      assert number <= sent(row, 'all-reduce', count) <= number + 2000  # norms and terms are single numbers


@pytest.mark.slow
def test_what_tensor_sends_grows_with_layers_and_loops(found):
  """Two sums of [rows, T, D] a layer and loop forward, and two backward."""
  few, many = (found[name_of((2, 2, 2), loops, 1)] for loops in (3, 5))
  state = ROWS // 4 * parts.T * parts.D * 4
  assert sent(many, 'all-reduce', 2) - sent(few, 'all-reduce', 2) == pytest.approx(2 * parts.N * 4 * state)
  for few, many in ((name_of((2, 4, 1), 3, 1), name_of((2, 4, 1), 5, 1)), ('memory 4', 'memory 12')):
    few, many = (sum(row[-1] for row in found[name]['sent']) for name in (few, many))
    assert few == many > 0


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES[1:], ids=str)
def test_flops_of_a_loop(found, mesh):
  few, many = (found[name_of(mesh, loops, 1)]['flops'] for loops in (3, 5))
  linear = 3 * 2 * (4 * parts.D ** 2 + 2 * parts.D * HIDDEN)  # a product forward is two backward
  attend = (2 + 5) * 2 * parts.T * parts.D  # backward, scores are formed again
  tokens = ROWS * parts.T
  assert (many - few) * 8 == pytest.approx(2 * parts.N * tokens * (linear + attend))


# Pieces --------------------------------------------------------------------------------------------------------------

PROGRAM = '''HloModule example

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%skip (p: f32[4,8]) -> f32[4,8] {
  ROOT %p = f32[4,8]{1,0} parameter(0)
}

%take (p.1: f32[4,8]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} constant({...})
  ROOT %product = f32[4,8]{1,0} dot(%p.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (c: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %c = (s32[], f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%c), index=1
  %y = f32[4,8]{1,0} conditional(%i, %x, %x), branch_computations={%skip, %take}
  %z = f32[4,8]{1,0} all-reduce(%y), channel_id=1, GROUPS, to_apply=%add
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %z)
}

%condition (c.1: (s32[], f32[4,8])) -> pred[] {
  %c.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (x.1: f32[4,8]) -> (s32[], f32[4,8]) {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %all = bf16[16,8]{1,0} all-gather(%x.1), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  %part = f32[1,8]{1,0} reduce-scatter(%x.1), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %start = (s32[], f32[4,8]{1,0}) tuple(%x.1, %x.1)
  ROOT %loop = (s32[], f32[4,8]{1,0}) while(%start), condition=%condition, body=%body, TRIPS
}
'''
TRIPS = 'backend_config={"known_trip_count":{"n":"6"}}'


@pytest.mark.parametrize('groups, key', [
    ('replica_groups={{0,1},{2,3},{4,5},{6,7}}', ('all-reduce', 2, 2)),
    ('replica_groups=[4,2]<=[8]', ('all-reduce', 2, 2)),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', ('all-reduce', 4, 7)),
    ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ('all-reduce', 4, 7)),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", ('all-reduce', 2, 2)),
], ids=['named', 'short', 'transposed', 'mesh', 'mesh, turned'])
def test_a_program_is_read(groups, key):
  text = PROGRAM.replace('GROUPS', groups).replace('TRIPS', TRIPS)
  read = estimate.Program(text, estimate.Steps(free=0.0, live=0.5))
  assert read.flops == 6 * 0.5 * 2 * 4 * 8 * 8
  assert read.outside == 6 * 0.5 * 4 * (4 * 8 + 8 * 8 + 4 * 8)
  ring = (key[1] - 1) / key[1]
  assert read.sent == {key: pytest.approx(6 * 2 * ring * 4 * 8 * 4), ('all-gather', 4, 7): 16 * 8 * 2 * 3 / 4,
                       ('reduce-scatter', 4, 4): 4 * 8 * 4 * 3 / 4}


def test_products_of_the_mapped_step_are_not_outside():
  named = 'rhs_contracting_dims={0}, metadata={op_name="jit(f)/shard_map/x"}'
  text = PROGRAM.replace('rhs_contracting_dims={0}', named)
  read = estimate.Program(text.replace('GROUPS', 'replica_groups=[4,2]<=[8]').replace('TRIPS', TRIPS), NO_STEPS)
  assert read.flops and not read.outside


def test_loops_without_an_end_are_free_steps():
  text = PROGRAM.replace('GROUPS', 'replica_groups=[4,2]<=[8]').replace(', TRIPS', '')
  assert estimate.Program(text, estimate.Steps(free=2.5, live=1.0)).flops == 2.5 * 2 * 4 * 8 * 8


def test_groups_that_cannot_be_read_are_an_error():
  with pytest.raises(ValueError, match='cannot read'):
    estimate.Program(PROGRAM.replace('GROUPS', "replica_groups=mesh['a'=8] {'a':(1)2}").replace('TRIPS', TRIPS),
                     NO_STEPS)


def test_traffic_of_products():
  def run(x, w, count):
    x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
    x = jax.lax.while_loop(lambda c: c[1] < count, lambda c: (c[0] @ w, c[1] + 1), (x, 0))[0]
    return jax.lax.cond(count > 2, lambda x: x @ w, lambda x: x, x)

  x, w = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.bfloat16)
  traced = jax.jit(run).trace(x, w, 2)
  one = 2 * (4 * 8 + 8 * 8 + 4 * 8)
  found = list(estimate.products(traced.jaxpr.jaxpr, estimate.Steps(free=5.0, live=0.25), {'data': 2, 'tensor': 1}))
  assert sum(product.moved for product in found) == (3 + 5 + 0.25) * one / 2
  assert sum(product.flops for product in found) == (3 + 5 + 0.25) * 2 * 4 * 8 * 8 / 2
  once = estimate.products(traced.jaxpr.jaxpr, estimate.Steps(free=5.0, live=0.25, outer=1.0), {})
  assert sum(product.moved for product in once) == (3 + 1 + 0.25) * one


@pytest.mark.parametrize('planner, free, live', [
    (plans.Uniform(4), 0.0, 1.0), (plans.Partition(8), 0.0, 4 / 7),
    (plans.Truncated(depth=plans.Constant(loops=6), graded=4), 2.0, 1.0),
    (plans.Staged(loops=(2, 4)), 0.0, 1.0),
    (plans.Truncated(depth=plans.Poisson(average=8), graded=4), 4.0, 1.0),
], ids=str)
def test_steps_of_plans(planner, free, live):
  objective = Objective(rolls={'r': Rollout(planner)}, terms={})
  drawn = estimate.expected(objective, estimate.rows_of(Text(length=4)), 2, 100)
  assert drawn.free == pytest.approx(free, abs=0.4) and drawn.live == pytest.approx(live, abs=0.03)


def test_a_curriculum_counts_over_the_run():
  """2, 4 and 6 loops, a third of the steps each, of which 2 are graded: 2 without gradient in the mean, 4 at the end.
  """
  each = plans.Truncated(depth=plans.Stairs(first=2, last=6, add=2, every=50), graded=2)
  whole, last = (estimate.expected(Objective(rolls={'r': Rollout(each)}, terms={}), {}, 2, steps).free
                 for steps in (range(150), 150))
  assert last == 4 and whole == pytest.approx(2, abs=0.02)


def test_a_batch_runs_as_far_as_its_deepest_row():
  each = plans.Truncated(depth=plans.Poisson(average=8), graded=4, over=plans.PerSequence())
  one, many = (estimate.expected(Objective(rolls={'r': Rollout(each)}, terms={}), {}, rows, 0).free for rows in (1, 16))
  assert many > one + 3


def test_attention_is_planned_in_few_blocks():
  config = small(3)
  assert estimate.coarse(config).model == config.model  # its blocks are as long as the text
  longer = Experiment(name='l', model=config.model, objective=config.objective, task=Text(length=1024))
  assert estimate.coarse(longer).model.cell.core.block.attn.kernel.size == 128


def made(**changes) -> estimate.Plan:
  values = dict(mesh={'data': 2, 'fsdp': 8, 'tensor': 1}, parameters=10, tokens=1000, rows=1, steps=NO_STEPS,
                weights=10, optimizer=20, gathered=80, gradients=80, total=200, flops=989e12, traffic=3350e9 / 2,
                sent={('all-gather', 8, 8): 450e9 / 4, ('all-reduce', 2, 9): 50e9 / 8}, model_flops=8 * 989e12)
  return estimate.Plan(**{**values, **changes})


@pytest.mark.parametrize('changes, least, bound', [
    ({}, '1', 'compute'), ({'traffic': 2 * 3350e9}, '2', 'memory'),
    ({'sent': {('all-reduce', 2, 9): 3 * 50e9}}, '3', 'interconnect')], ids=['compute', 'memory', 'interconnect'])
def test_what_binds(changes, least, bound):
  text = estimate.table(made(**changes), {'H100': metrics.ACCELERATORS['H100']})
  cells = dict(zip(*([cell.strip() for cell in line.split('|')] for line in (text.splitlines()[0],
                                                                            text.splitlines()[2]))))
  assert (cells['step s'], cells['bound by'], cells['fits']) == (least, bound, 'yes')
  assert cells['MFU % at most'] == f'{50 / int(least):.0f}'


def test_seconds_of_a_network_and_of_links():
  seconds = made().seconds(metrics.ACCELERATORS['H100'])
  assert seconds == {'compute': 1.0, 'memory': 0.5, 'interconnect': 0.25 + 0.125}
  assert made().seconds(metrics.ACCELERATORS['v5p'])['interconnect'] == (450e9 / 4 + 50e9 / 8) / 600e9


def test_rest_is_what_the_program_holds_beyond_what_is_named():
  assert made().rest == 10
  assert estimate.fits(made(total=80_000_000_000), metrics.ACCELERATORS['H100'])
  assert not estimate.fits(made(total=80_000_000_001), metrics.ACCELERATORS['H100'])


@pytest.mark.parametrize('call, message', [
    (lambda: estimate.choose(['v5e', 'v7']), r"no data sheet of 'v7' here; choose from v4, v5e"),
    (lambda: estimate.simulate(0), r'--devices=0: give the number'),
    (lambda: estimate.simulate(len(jax.devices()) + 1), r'--devices=\d+: '),  # this process has its devices already
], ids=['accelerator', 'none', 'late'])
def test_bad_input(call, message):
  with pytest.raises(ConfigError, match=message):
    call()


# The command line ----------------------------------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
  """(exit status, stdout, stderr); the folder is the working one."""
  done = subprocess.run([sys.executable, '-m', 'experiments.main', *arguments], cwd=folder, capture_output=True,
                        text=True, timeout=600, env={**os.environ, 'PYTHONPATH': str(ROOT)})
  return done.returncode, done.stdout, done.stderr


TINY = ['--mode=plan', f'--config={ROOT}/experiments/configs/loopformer.py:tiny', '--devices=4', '--set', 'mesh.fsdp=4']


@pytest.mark.slow
def test_command_line(tmp_path):
  status, out, err = run(tmp_path, *TINY)
  assert status == 0, err
  assert '771,712 parameters on data 1 x fsdp 4 x tensor 1 = 4 devices' in out
  rows = [line for line in out.splitlines() if line.startswith('|')]
  assert [row.split('|')[1].strip() for row in rows[2:]] == ['v5e', 'v5p', 'H100', 'H200']
  assert 'warning' not in err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_step_that_does_not_fit(tmp_path):
  status, out, err = run(tmp_path, *TINY, '--accelerators=v5e', '--set', 'train.batch=262144')
  assert status == 1 and ' NO |' in out
  assert 'do not fit the 16 GB of v5e; raise mesh.fsdp, mesh.tensor or train.accumulate' in err
  assert err.splitlines()[-1] == 'error: no accelerator of --accelerators holds this step'


@pytest.mark.slow
@pytest.mark.parametrize('arguments, expected', [
    ([*TINY, '--set', 'mesh.data=3'], 'does not use all 4 devices'),
    ([*TINY, '--set', 'train.batch=6'], '6 rows do not divide over mesh.data * mesh.fsdp = 4'),
    (['--mode=eval'], '--workdir is missing'),
], ids=['mesh', 'rows', 'workdir'])
def test_command_line_refuses(tmp_path, arguments, expected):
  status, out, err = run(tmp_path, *arguments)
  assert status == 1 and expected in err and 'Traceback' not in err, err
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('arguments, expected', [
    (['--mode=plan'], '--config is missing'),
    ([*TINY, '--accelerators=B100'], "no data sheet of 'B100' here"),
], ids=['config', 'accelerator'])
def test_command_line_refuses_before_it_asks_for_devices(tmp_path, monkeypatch, arguments, expected):
  monkeypatch.chdir(tmp_path)
  status, out, err = test_cli.run_here(None, *arguments)
  assert status == 1 and expected in err and not out
  assert not list(tmp_path.iterdir())
