"""The battery: what every cell and variant must do. Rows are in tests/parts.py."""
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.loopformer import get_config
from loopformer import backend, loop, plans
from loopformer.cells.timed import Timed
from loopformer.inference import exits, measures
from loopformer.inference.evaluate import evaluate
from loopformer.loop import Every, KeepAll, Offload, PerLayer, PerStep, Products
from loopformer.model import init_params, parameter_count
from loopformer.nn import kernels, stack as stacks
from loopformer.nn.blocks import Block
from loopformer.nn.condition import Modulation, Trajectory, sinusoid
from loopformer.nn.kernels import Blockwise, Cudnn, Fused, Splash, attend
from loopformer.nn.layers import Normal, RMSNorm, UnitNorm, dense, gelu, transposed
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError, Plan, Step
from tests import parts
from tests.parts import ROWS, D, L, N, T, V, all_rows, close, forward, padded, params, poked, time_free, tokens

rows = pytest.mark.parametrize('name', all_rows)
plain_rows = pytest.mark.parametrize('name', time_free)


def budget(name: str) -> int:
  return ROWS[name].model.loops


# Shapes and compilation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['loopformer', 'prelude_coda'])
def test_init_has_the_shapes_of_eval_shape(name):
  model = ROWS[name].model
  shapes, real = parts.shapes(model), jax.jit(lambda: init_params(model, jax.random.key(0)))()
  assert jax.tree.structure(shapes) == jax.tree.structure(real)
  assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [(r.shape, r.dtype) for r in jax.tree.leaves(real)]


@rows
def test_parameters_are_float32_and_counted(name):
  model = ROWS[name].model
  leaves = jax.tree.leaves(parts.shapes(model))
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  assert parameter_count(model) == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize('name', ['loopformer', 'prelude_coda', 'bfloat16'])
def test_without_jit_equals_with_jit(name):
  model = ROWS[name].model
  plan = plans.Uniform(budget(name))(jax.random.key(0))
  plainly = model.apply({'params': params(model)}, tokens(), plan)
  close(plainly.z, forward(model, params(model), tokens(), plan).z, ROWS[name].tolerance)


# Causality and documents ---------------------------------------------------------------------------------------------


@rows
def test_a_token_changes_itself_and_what_follows_alone(name):
  model = ROWS[name].model
  trace = forward(model, params(model), poked(), plans.Uniform(budget(name))(jax.random.key(0)))
  assert trace.x.shape == trace.z.shape == (T + 1, T, D) and trace.x.dtype == trace.z.dtype == jnp.float32
  assert trace.xs is None and int(trace.steps) == budget(name)
  z = np.asarray(trace.z)
  moved = np.abs(z[1:] - z[:1]).max(-1)  # [token that was poked, position]
  before = np.tril(np.ones((T, T), bool), -1)
  assert moved[before].max() <= 1e-6
  assert moved[~before].min() > 1e-5  # this test can fail: every position from there on has moved


@rows
def test_documents_do_not_see_each_other(name):
  model = ROWS[name].model
  first = T // 2 - 1
  seg = jnp.broadcast_to((jnp.arange(T) >= first).astype(jnp.int32), (T + 1, T))
  z = np.asarray(forward(model, params(model), poked(), plans.Uniform(budget(name))(jax.random.key(0)), seg).z)
  moved = np.abs(z[1:] - z[:1]).max(-1)
  index = np.arange(T)
  reached = (index[None] >= index[:, None]) & (seg[0][None] == seg[0][:, None])
  assert moved[~reached].max() <= 1e-6
  assert moved[reached].min() > 1e-5


# The loop against other ways to the same value -----------------------------------------------------------------------


@pytest.mark.parametrize('times', [1, 3])
@pytest.mark.parametrize('switched_off', ['plain', 'timed'])
def test_tied_loop_equals_a_deep_net(switched_off, times):
  """`times` steps of the block equal a net of times * N layers whose parameters are the block's, repeated."""
  if switched_off == 'plain':
    shallow, norm = ROWS['base_loop'].model, parts.RMSNorm()
    weights = params(shallow)
  else:  # a modulation that opens all gates and scales by nothing, whatever the step
    shallow, norm = ROWS['loopformer'].model, UnitNorm()
    weights = params(shallow)
    bias = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0, 0.0])[None, :, None], (N, 4, D))
    weights = {**weights, 'cell': {**weights['cell'], 'modulation': {
        'kernel': jnp.zeros((N, D, 4, D)), 'bias': bias}}}
  deep = parts.looped(parts.plain(times * N, norm), loops=1)
  core = jax.tree.map(lambda leaf: jnp.tile(leaf, (times, *(1,) * (leaf.ndim - 1))), weights['cell']['core'])
  deep_weights = {**{name: weights[name] for name in ('read_in', 'read_out')}, 'cell': {'core': core}}
  loops = forward(shallow, weights, tokens(), plans.Uniform(times)(jax.random.key(0)))
  once = forward(deep, deep_weights, tokens(), plans.Uniform(1)(jax.random.key(0)))
  close((loops.x, loops.z), (once.x, once.z), 1e-6)


@plain_rows
def test_twice_the_depth_is_the_loop_twice(name):
  model = ROWS[name].model
  e = model.bind({'params': params(model)})
  e = e.read_in(tokens(), jnp.broadcast_to(jnp.arange(T), (T + 1, T)))
  twice, four = plans.Uniform(2)(jax.random.key(0)), plans.Uniform(4)(jax.random.key(0))
  half = parts.resume(model, params(model), e, e, twice)
  whole = parts.resume(model, params(model), e, e, four)
  close(parts.resume(model, params(model), half, e, twice), whole, 1e-6)
  assert np.abs(np.asarray(whole - half)).max() > 1e-3


@functools.partial(jax.jit, static_argnums=0)
def by_while_loop(model, weights, e, plan):
  """The steps of a plan by `lax.while_loop` over `model.step`."""
  variables = {'params': weights}
  code = model.apply(variables, plan, method='precompute')
  ctx = parts.context(e)

  def body(carry):
    k, x = carry
    row = Step(t=plan.t[k], dt=plan.dt[k], active=None, k=k, precomputed=jax.tree.map(lambda leaf: leaf[k], code))
    return k + 1, model.apply(variables, x, e, ctx.replace(step=row), None, method='step')[0]

  return jax.lax.while_loop(lambda carry: carry[0] < plan.steps, body, (jnp.int32(0), model.start(e, ctx)))[1]


@pytest.mark.parametrize('name', [name for name in all_rows if ROWS[name].steps])
def test_scan_equals_while_loop(name):
  row = ROWS[name]
  model = row.model.clone(prelude=None, coda=None)  # the loop alone
  plan = plans.Uniform(budget(name))(jax.random.key(0))
  e = model.bind({'params': params(model)}).read_in(tokens(), jnp.broadcast_to(jnp.arange(T), (T + 1, T)))
  close(by_while_loop(model, params(model), e, plan), forward(model, params(model), tokens(), plan).x,
        min(row.tolerance, 1e-2) if row.model.cell.core.block.dtype == 'bfloat16' else 1e-6)


# Skipped steps -------------------------------------------------------------------------------------------------------


@rows
def test_skipped_rows_change_nothing(name):
  model = ROWS[name].model
  steps = parts.budgets(model)[-1]
  short = forward(model, params(model), tokens(), plans.schedule(plans.resolve(steps)))
  long = forward(model, params(model), tokens(), padded(steps))
  close((long.x, long.z), (short.x, short.z), 1e-6 if ROWS[name].tolerance < 1e-2 else 1e-2)
  assert int(long.steps) == int(short.steps) == len(plans.resolve(steps))


def test_every_sequence_may_have_its_own_depth():
  model = ROWS['prelude_coda'].model
  depth = np.array([1, 4, 2, 0, 3])
  text = tokens(len(depth))
  full = plans.Uniform(L)(jax.random.key(0))
  together = forward(model, params(model), text, full.replace(active=jnp.arange(L)[:, None] < depth))
  assert int(together.steps) == depth.max()
  for row, own in enumerate(depth):
    alone = forward(model, params(model), text[row:row + 1], full.replace(active=jnp.arange(L) < own))
    close(together.z[row], alone.z[0], 1e-6)
  assert np.abs(np.asarray(together.x[1] - forward(model, params(model), text, full.replace(
      active=jnp.arange(L) < 1)).x[1])).max() > 1e-3


def loss(model, weights, plan, rows: int = 3, keep=loop.Last()):
  trace = model.apply({'params': weights}, tokens(rows), plan, keep=keep)
  return jnp.sum(jnp.sin(trace.z))


gradient = functools.partial(jax.jit, static_argnums=0)(jax.value_and_grad(loss, argnums=1))


@pytest.mark.parametrize('name', ['prelude_coda', 'bfloat16'])
def test_gradients_pass_skipped_rows(name):
  model = ROWS[name].model
  short = gradient(model, params(model), plans.schedule(parts.UNEVEN))
  long = gradient(model, params(model), padded(parts.UNEVEN))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(long))
  close(long, short, 1e-5 if ROWS[name].tolerance < 1e-2 else 2e-2)


# Layers --------------------------------------------------------------------------------------------------------------


def by_softmax(q, k, v, seg):
  """Attention as it is defined, one head at a time."""
  length, each = q.shape[1], q.shape[2] // k.shape[2]
  k, v = jnp.repeat(k, each, 2), jnp.repeat(v, each, 2)
  mask = (jnp.arange(length)[:, None] >= jnp.arange(length))[None]
  mask = mask if seg is None else mask & (seg[:, :, None] == seg[:, None])
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1), v)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('segments', [False, True], ids=['joined', 'segments'])
@pytest.mark.parametrize('kernel', [Blockwise(), Blockwise(size=3), Fused()], ids=['one_block', 'blocks_of_3', 'fused'])
def test_attention_and_its_gradients(kernel, groups, segments):
  rng = np.random.default_rng(0)
  q, k, v, seed = (jnp.asarray(rng.standard_normal((2, T, heads, 5)), jnp.float32) for heads in (4, groups, groups, 4))
  seg = jnp.asarray(rng.integers(0, 2, (2, T)).cumsum(1)) if segments else None

  def value_and_gradients(attend):
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(seed * attend(*qkv, seg)), (0, 1, 2)))(q, k, v)

  close(value_and_gradients(kernel), value_and_gradients(by_softmax), 1e-5)


CUDNN = pytest.param(Cudnn(), marks=pytest.mark.skipif(jax.default_backend() != 'gpu', reason='wants a GPU'))


SPLASH = pytest.param(Splash(size=256, interpret=True), marks=pytest.mark.skipif(
    jax.default_backend() == 'gpu', reason='which multiplies float32 less exactly'))


@pytest.mark.parametrize('kernel', [SPLASH, CUDNN], ids=str)
@pytest.mark.parametrize('length, groups, segments', [(128, 4, False), (333, 2, True), (512, 1, False)])
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 1e-2)])
def test_kernels_of_accelerators(kernel, length, groups, segments, dtype, tolerance):
  if kernel == Cudnn() and dtype == 'float32':
    pytest.skip('cuDNN has no kernel for float32')
  rng = np.random.default_rng(0)
  q, k, v, seed = (jnp.asarray(rng.standard_normal((2, length, heads, 8)), dtype) for heads in (4, groups, groups, 4))
  seg = jnp.asarray((rng.random((2, length)) < 0.02).cumsum(1), jnp.int32) if segments else None

  def value_and_gradients(attend):
    def loss(q, k, v):
      out = attend(q, k, v, seg).astype(jnp.float32)
      return jnp.sum(seed * out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(leaf, np.float32) for leaf in (out, *grads)]

  for ours, theirs in zip(value_and_gradients(kernel), value_and_gradients(by_softmax)):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize('name, dtype, length, head, kernel', [
    ('gpu', 'bfloat16', 1001, 64, Cudnn()),
    ('cpu', 'float32', 1024, 64, Blockwise(size=16)), ('cpu', 'bfloat16', 1024, 64, Blockwise(size=16)),
    ('gpu', 'bfloat16', 1000, 64, Cudnn()), ('gpu', 'float32', 1024, 64, Blockwise(size=16)),
    ('gpu', 'bfloat16', 1024, 66, Blockwise(size=16)), ('gpu', 'bfloat16', 1024, 256, Blockwise(size=16)),
    ('tpu', 'bfloat16', 1024, 64, Splash()), ('tpu', 'float32', 128, 66, Splash()),
    ('tpu', 'bfloat16', 1000, 64, Splash()), ('tpu', 'bfloat16', 127, 64, Blockwise(size=16)),
    ('tpu', 'float16', 1024, 64, Blockwise(size=16)), ('gpu', 'float16', 1024, 64, Cudnn())])
def test_fused_takes_the_kernel_of_the_backend(name, dtype, length, head, kernel):
  assert Fused(size=16).on(name, jnp.dtype(dtype), length, head) == kernel


@pytest.mark.parametrize('length, heads, taken', [(128, 2, True), (127, 130, False)])
def test_fused_goes_by_the_length_of_the_text(length, heads, taken):
  q = jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)
  with backend.compiling_for('tpu'):
    assert ('pallas_call' in str(jax.make_jaxpr(lambda *qkv: Fused()(*qkv, None))(q, q, q))) == taken


def test_cudnn_gets_texts_of_even_length_with_segments():
  """And says nothing of what was added."""
  rng, seen = np.random.default_rng(0), []
  q, k, v = (jnp.asarray(rng.standard_normal((2, 7, 2, 8)), jnp.bfloat16) for _ in range(3))
  seg = jnp.asarray([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])

  def product(q, k, v, mask, is_causal, implementation):
    seen.append((q.shape[1], mask is None))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal)

  with (backend.compiling_for('gpu'),
        mock.patch.object(kernels, 'jax', wraps=jax, nn=mock.Mock(dot_product_attention=product))):
    ours = [Cudnn()(q, k, v, seg), Cudnn()(q, k, v, None)]
  assert seen == [(8, False), (7, True)]
  for out, given in zip(ours, (seg, None)):
    close(out.astype(jnp.float32), by_softmax(q, k, v, given).astype(jnp.float32), 2e-2)


@pytest.mark.skipif(jax.default_backend() == 'gpu', reason='there is cuDNN')
def test_kernels_that_cannot_serve_say_so():
  q = jnp.ones((1, 100, 2, 8))
  for kernel, message in ((Cudnn(), r'Cudnn\(\) with float32 on cpu.*kernels\.Fused'),
                          (Splash(), r'Splash\(\) with float16.*kernels\.Fused')):
    with pytest.raises(ConfigError, match=message):
      kernel(*(q.astype('float16' if kernel == Splash() else 'float32'),) * 3, None)
  for name, dtype in (('cpu', 'bfloat16'), ('gpu', 'float32')):
    with backend.compiling_for(name), pytest.raises(ConfigError, match=rf'Cudnn\(\) with {dtype} on {name}'):
      Cudnn()(*(q.astype(dtype),) * 3, None)
  with pytest.raises(ConfigError, match=r'kernel\.size = 200.*multiples of 128'):
    Splash(size=200)


def test_a_query_without_keys_is_finite():
  q = jnp.ones((1, 2, 2, 4))
  mask = jnp.array([[[True, False], [False, False]]])
  values = jax.value_and_grad(lambda q, k, v: attend(q, k, v, mask).sum(), (0, 1, 2))(q, q, q)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))


def test_dense_and_gelu_have_the_gradients_of_their_formulas():
  rng = np.random.default_rng(0)
  x, w, seed = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 3, 5), (5, 4), (2, 3, 4)))
  ours = jax.value_and_grad(lambda x, w: jnp.sum(seed * gelu(dense(x, w))), (0, 1))(x, w)
  theirs = jax.value_and_grad(lambda x, w: jnp.sum(
      seed * (x @ w) * 0.5 * (1 + jax.scipy.special.erf((x @ w) / np.sqrt(2)))), (0, 1))(x, w)
  close(ours, theirs, 1e-5)


@pytest.mark.parametrize('order', [None, (0, 1, 1)], ids=['each once', 'one twice'])
@pytest.mark.parametrize('remat', [loop.KeepAll(), loop.PerLayer()], ids=str)
def test_layers_written_out_equal_layers_scanned(order, remat, monkeypatch):
  gates = Modulation(len(order or (0, 1)), init=Normal(0.5))
  model = parts.looped(Timed(Stack(parts.block(), 2, order=order), Trajectory(D), gates), remat=remat)
  weights = params(model)

  def value_and_gradient(unrolled):
    monkeypatch.setattr(stacks, 'unrolls', lambda layers: unrolled)
    # A function of its own each time: what is compiled does not know what was changed.
    return jax.jit(jax.value_and_grad(
        lambda p: (model.apply({'params': p}, tokens(2), plans.Uniform(L)(None)).z[..., 0] ** 2).sum()))(weights)

  close(value_and_gradient(True), value_and_gradient(False), 1e-5)


@pytest.mark.parametrize('name', ['tpu', 'gpu'])
@pytest.mark.parametrize('row', ['grouped', 'loopformer'])
def test_programs_for_other_backends_compute_the_same(row, name):
  """In float32, in which only the order of sums differs."""
  model = ROWS[row].model
  weights = params(model)

  def value_and_gradient(name):
    with backend.compiling_for(name):
      return jax.jit(jax.value_and_grad(
          lambda p: (model.apply({'params': p}, tokens(2), plans.Uniform(L)(None)).z[..., 0] ** 2).sum()))(weights)

  close(value_and_gradient(name), value_and_gradient('cpu'), 1e-5)


@pytest.mark.skipif(jax.default_backend() != 'gpu', reason='wants a GPU')
@pytest.mark.parametrize('remat, runs', [(loop.PerLayer(), 1), (loop.PerStep(), 2)], ids=str)
def test_attention_of_cudnn_is_not_run_again(remat, runs):
  model = parts.looped(parts.timed(heads=1, dtype='bfloat16'), remat=remat)
  text = str(jax.make_jaxpr(jax.grad(
      lambda p: model.apply({'params': p}, tokens(2), plans.Uniform(L)(None)).z.astype(jnp.float32).sum()))(
          params(model)))
  assert text.count(kernels.CUDNN) == runs * parts.N


# Steps without gradient ----------------------------------------------------------------------------------------------


def freed(steps: int, free: int) -> Plan:
  return plans.Uniform(steps)(jax.random.key(0)).replace(no_grad_steps=jnp.int32(free))


@plain_rows
def test_free_steps_are_steps(name):
  model = ROWS[name].model
  steps = forward(model, params(model), tokens(), freed(2, 3))
  whole = forward(model, params(model), tokens(), plans.Uniform(5)(jax.random.key(0)))
  close((steps.x, steps.z), (whole.x, whole.z), 1e-6)
  assert int(steps.steps) == 5


@functools.partial(jax.jit, static_argnums=(0, 2))
def truncated(model, weights, free):
  """The gradient where the first steps see neither tangents of the state nor of the parameters, written by hand."""
  text, plan = tokens(3), plans.Uniform(2)(jax.random.key(0))
  ctx = parts.context(text)

  def total(weights):
    def start(model, text):
      e = model.read_in(text, ctx.pos)
      return model.prelude(e, ctx, None, None)[0] if model.prelude is not None else e

    e = model.apply({'params': weights}, text, method=start)
    x, frozen = jax.lax.stop_gradient((e, weights))
    for _ in range(free):
      x = model.apply({'params': frozen}, x, e, ctx, None, method='step')[0]
    x = jax.lax.stop_gradient(x)
    for _ in range(plan.steps):
      x = model.apply({'params': weights}, x, e, ctx, None, method='step')[0]
    return jnp.sum(jnp.sin(model.apply({'params': weights}, x, text, method='read')))

  return jax.value_and_grad(total)(weights)


def test_free_steps_have_no_gradient_and_one_program_serves_any_number():
  model = ROWS['prelude_coda'].model.clone(cell=parts.plain())
  step = jax.jit(jax.value_and_grad(lambda weights, plan: loss(model, weights, plan)))
  value, grads = step(params(model), freed(2, 3))
  close((value, grads), truncated(model, params(model), 3), 1e-5)
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads['prelude']))  # out of the gradient's reach
  assert all((leaf != 0).any() for leaf in jax.tree.leaves((grads['cell'], grads['coda'])))
  others = [step(params(model), freed(2, free)) for free in (0, 7)]
  assert len({float(value), *(float(v) for v, _ in others)}) == 3
  assert (others[0][1]['prelude']['block']['mlp']['up']['kernel'] == 0).all()
  assert step._cache_size() == 1


@pytest.mark.parametrize('name', ['loopformer', 'tmlt'])
def test_free_steps_of_a_cell_that_knows_the_trajectory_are_refused(name):
  """They have no row in the plan, so no time and no modulation; run without one, they would be another function."""
  model = ROWS[name].model
  with pytest.raises((ConfigError, ValueError), match='no_grad_steps'):
    jax.eval_shape(lambda: model.apply({'params': params(model)}, tokens(), freed(2, 3)))


# What is saved and kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize('remat', [PerStep(), PerLayer(), Products(), Offload()], ids=repr)
def test_rematerialised_equals_plain(remat):
  model = ROWS['prelude_coda'].model
  plan = padded(parts.UNEVEN)
  close(gradient(model.clone(remat=remat), params(model), plan),
        gradient(model.clone(remat=KeepAll()), params(model), plan), 1e-5)


@pytest.mark.parametrize('name', ['prelude_coda', 'base_loop'])
def test_every_state_is_kept(name):
  model = ROWS[name].model
  trace = forward(model, params(model), tokens(), padded(parts.UNEVEN), keep=Every())
  assert trace.xs.shape == (L, T + 1, T, D)
  np.testing.assert_array_equal(trace.xs[-1], trace.x)
  np.testing.assert_array_equal(trace.xs[len(parts.UNEVEN) - 1], trace.x)  # the rest is skipped
  if not ROWS[name].timed:
    close(trace.xs[0], forward(model, params(model), tokens(), padded(1)).x, 1e-6)
  assert np.abs(np.diff(np.asarray(trace.xs[:3]), axis=0)).max((1, 2, 3)).min() > 1e-3


# LoopFormer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['loopformer', 'tmlt', 'bfloat16'])
def test_closed_gates_make_every_trajectory_the_embedding(name):
  model = ROWS[name].model
  weights = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  bound = model.bind({'params': weights})
  expected = bound.read_out(bound.read_in(tokens(), jnp.broadcast_to(jnp.arange(T), (T + 1, T))))
  for steps in (*range(1, L + 1), parts.UNEVEN):
    close(forward(model, weights, tokens(), padded(steps)).z, expected, 1e-6, str(steps))


@pytest.mark.parametrize('name, differs', [('loopformer', True), ('tmlt', False), ('base_loop', False)])
def test_only_a_cell_that_knows_the_trajectory_tells_schedules_apart(name, differs):
  model = ROWS[name].model
  z = [np.asarray(forward(model, params(model), tokens(), padded(steps)).z)
       for steps in ((0.5, 0.25, 0.25), (0.25, 0.25, 0.5))]
  assert (np.abs(z[0] - z[1]).max() > 1e-3) == differs


def test_the_sinusoid_is_the_papers():
  s = np.array([0.0, 0.125, 1.0])
  freqs = np.exp(-np.log(10000.0) * np.arange(128) / 128)
  expected = np.concatenate([np.cos(s[:, None] * freqs), np.sin(s[:, None] * freqs)], 1)
  np.testing.assert_allclose(sinusoid(jnp.asarray(s, jnp.float32)), expected, atol=1e-6)


# Cached decoding -----------------------------------------------------------------------------------------------------

LENGTHS = np.array([3, 1, T, 5])
ROOM = T + 3  # a cache with room to spare


def cached_by_token(model, weights, text, plan):
  kv, outs = model.cache(len(text), ROOM, plan.steps), []
  for i in range(T):
    out, kv = parts.extend(model, weights, text[:, i:i + 1], plan, jnp.full((len(text), 1), i), kv)
    outs.append(out)
  return jnp.concatenate(outs, 1)


def cached_after_prompts(model, weights, text, plan):
  """Prompts of different lengths, padded on the right, then token by token: logits where they are defined."""
  index = np.arange(T)
  kv = model.cache(len(text), ROOM, plan.steps)
  # What stands in the padding must not matter.
  prompts = jnp.where(index < LENGTHS[:, None], text, (text + 11) % V)
  out, kv = parts.extend(model, weights, prompts, plan, jnp.asarray(np.where(index < LENGTHS[:, None], index, -1)), kv)
  result = np.array(out)
  for i in range(T - LENGTHS.min()):
    place = LENGTHS + i
    on = place < T
    token = jnp.asarray(np.asarray(text)[np.arange(len(text)), np.minimum(place, T - 1)])
    out, kv = parts.extend(model, weights, token[:, None], plan, jnp.asarray(np.where(on, place, -1))[:, None], kv)
    result[np.flatnonzero(on), place[on]] = np.asarray(out)[on, 0]
  return result


@rows
@pytest.mark.parametrize('way', [cached_by_token, cached_after_prompts], ids=['by_token', 'after_prompts'])
def test_cached_equals_parallel(name, way):
  model = ROWS[name].model
  weights, text = params(model), tokens(len(LENGTHS))
  for steps in parts.budgets(model):
    plan = padded(steps)
    z = forward(model, weights, jnp.pad(text, ((0, T + 1 - len(text)), (0, 0))), plan).z[:len(text)]
    close(way(model, weights, text, plan), parts.logits(model, weights, z), ROWS[name].tolerance, str(steps))


def test_a_cache_keeps_no_states():
  model, plan = ROWS['loopformer'].model, plans.Uniform(L)(jax.random.key(0))
  with pytest.raises(ConfigError, match='with a cache'):
    jax.eval_shape(lambda: model.apply({'params': params(model)}, tokens(2), plan, kv=model.cache(2, T), keep=Every()))


@rows
def test_sequences_with_schedules_of_their_own(name):
  """Every row of a batch as if it were alone with its schedule."""
  model = ROWS[name].model
  weights, text = params(model), tokens(3)
  own = [padded(steps, model.loops) for steps in (1, model.loops, parts.budgets(model)[-1])]
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *own)
  pos = jnp.broadcast_to(jnp.arange(T), text.shape)
  ours, kv = parts.extend(model, weights, text[:, :-1], together, pos[:, :-1], model.cache(3, ROOM))
  last, _ = parts.extend(model, weights, text[:, -1:], together, pos[:, -1:], kv)
  ours = jnp.concatenate([ours, last], 1)
  for row, plan in enumerate(own):
    z = forward(model, weights, jnp.pad(text, ((0, T - 2), (0, 0))), plan).z[row]
    close(ours[row], parts.logits(model, weights, z), ROWS[name].tolerance, f'row {row}')


def test_a_cache_serves_a_plan_whose_skipped_rows_are_not_the_last():
  model, text = ROWS['loopformer'].model, tokens(len(LENGTHS))
  plan = plans.Uniform(L)(jax.random.key(0)).replace(active=jnp.array([True, False, True, False]))
  z = forward(model, params(model), text, plan).z
  close(cached_by_token(model, params(model), text, plan), parts.logits(model, params(model), z), 1e-5)


def test_free_steps_with_a_cache():
  model, text = ROWS['base_loop'].model, tokens(2)
  pos = jnp.broadcast_to(jnp.arange(T), text.shape)
  ours = parts.extend(model, params(model), text, freed(2, 2), pos, model.cache(2, T))
  theirs = parts.extend(model, params(model), text, plans.Uniform(4)(jax.random.key(0)), pos, model.cache(2, T))
  close(ours, theirs, 1e-6)


@pytest.mark.parametrize('name', ['loopformer', 'grouped', 'bfloat16', 'prelude_coda'])
@pytest.mark.parametrize('loops', [1, L, L + 3])
def test_cache_bytes(name, loops):
  model, batch, length = ROWS[name].model, 3, 11
  caches = jax.eval_shape(lambda: model.cache(batch, length, loops))
  assert set(caches) == set(model.stacks())
  for stack, kv in caches.items():
    slots = loops if stack == 'loop' else 1
    core = model.stacks()[stack]
    attn, size = core.block.attn, {'float32': 4, 'bfloat16': 2}[core.block.dtype]
    groups = attn.groups or attn.heads
    formula = 2 * slots * core.depth * length * groups * (D // attn.heads) * size + 4 * slots * length
    assert kv.bytes == batch * formula
    assert (kv.pos.shape, kv.k.shape) == ((slots, batch, length),
                                          (slots, core.depth, batch, groups, length, D // attn.heads))


@pytest.mark.parametrize('rows', [(1,), (5,), (3, 4), (65,)], ids=str)
def test_turned_products(rows):
  x = jax.random.normal(jax.random.key(0), (*rows, 24))
  kernel = jax.random.normal(jax.random.key(1), (40, 24))
  np.testing.assert_allclose(jax.jit(transposed)(x, kernel), x @ kernel.T, atol=1e-4)


def test_cache_bytes_of_the_published_size():
  kv = jax.eval_shape(lambda: get_config('paper').model.cache(1, 1024))['loop']
  assert kv.k.size * 2 + kv.v.size * 2 == 2 * 8 * 3 * 1024 * 2048 * 2 == 201_326_592  # the sheet's 201 MB


# Positions that a model does not have -----------------------------------------------------------------------------


FAR = 33  # tokens; models of `parts` have 32 positions


@pytest.mark.parametrize('row, refused',
                         [('loopformer', True), ('prelude_coda', True), ('rotary', False), ('alibi', False)])
def test_sequences_without_positions_are_refused(row, refused):
  """In every pass; where positions are attention's, any length is read."""
  model, text = ROWS[row].model, jnp.zeros((1, FAR), jnp.int32)
  variables, plan = {'params': parts.shapes(model)}, plans.Uniform(2)(None)
  exit_policy = exits.Adaptive(rule=exits.StateChange())
  for run in (lambda v: model.apply(v, text, plan).z, lambda v: model.apply(v, text, plan, text).z,
              lambda v: model.apply(v, text, plan, kv=model.cache(1, FAR)).z,
              lambda v: model.apply(v, text, plan, exit_policy, exit_policy.threshold, method='adapt').z):
    if refused:
      with pytest.raises(ConfigError, match=r'33 a row, more than the 32 positions of the model \(read_in\.length\)'):
        jax.eval_shape(run, variables)
    else:
      jax.eval_shape(run, variables)


def test_evaluation_of_longer_sequences_is_refused():
  model = ROWS['loopformer'].model
  batch = {name: np.zeros((1, FAR), np.int32) for name in ('tokens', 'targets', 'weights')}
  with pytest.raises(ConfigError, match='33 a row, more than the 32 positions'):
    evaluate(model, parts.params(model), [batch], {'1': (1.0,)}, measure=measures.Answers())


@pytest.mark.parametrize('skips', [False, True])
def test_a_layer_is_traced_once_a_pass(monkeypatch, skips):
  """One trace serves all layers and all steps, whether these may be skipped or not."""
  model, calls, call = parts.looped(parts.plain(norm=RMSNorm(1e-4))), [], Block.__call__
  shapes, plan = parts.shapes(model), parts.padded(2) if skips else plans.schedule(plans.resolve(2))
  assert (plan.active is not None) == skips
  monkeypatch.setattr(Block, '__call__', lambda self, *given, **named: calls.append(1) or call(self, *given, **named))
  jax.eval_shape(lambda params: model.apply({'params': params}, parts.tokens(1), plan).z, shapes)
  assert len(calls) == 1
