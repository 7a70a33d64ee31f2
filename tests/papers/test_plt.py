"""The Parallel Loop Transformer against its definition, written out below with masks, one loop after the other."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import loop, memories, plans
from loopformer.cells.plain import Plain
from loopformer.config import check
from loopformer.inference import exits
from loopformer.inference.engine import Engine
from loopformer.inference.harness import Scorer
from loopformer.model import init_params, parameter_count
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.layers import GatedMLP, RMSNorm
from loopformer.nn.low_rank import adapted
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.papers.mor.cell import Routed
from loopformer.papers.plt.attention import ConstantGate, HiddenGate, QueryGate
from loopformer.papers.plt.cell import LearnedMix, Mix
from loopformer.papers.plt.streams import Streams, banded
from loopformer.types import ConfigError, Context, Plan
from tests import parts
from tests.experiments.test_golden import config_of
from tests.inference.test_generate import LETTERS, TOKENIZER
from tests.parts import D, N, V, close, forward, params, tokens

S = 11  # tokens: more than twice a window of 3, and less than one of 20
WINDOWS = (3, 20)
EPS = RMSNorm().eps


def model_of(window_left: int = 3, loops: int = 3, **options):
  return parts.looped(**parts.shifted(window_left=window_left, **options), loops=loops)


def uniform(loops: int) -> Plan:
  return plans.Uniform(loops)(jax.random.key(0))


# The definition ------------------------------------------------------------------------------------------------------


def normed(x, scale):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS) * scale


def attention(q, k, v, mask):
  """[B, S, H, d] thrice, a mask that fits [B, H, S, S]."""
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / np.sqrt(q.shape[-1])
  return jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1), v)


@functools.partial(jax.jit, static_argnames=('loops', 'window', 'embed', 'hidden', 'stop', 'gate'))
def reference(weights, text, loops, window, embed, hidden, stop=lambda x: x, gate='query'):
  """Logits of every loop, [loops, B, S, V]; two heads, rotary positions. `stop` acts on the first loop's keys."""
  e = weights['read_in']['embedding'][text]
  batch, length = text.shape
  index = jnp.arange(length)
  causal = index[:, None] >= index
  near = causal & (index[:, None] - index <= window)
  pos = jnp.broadcast_to(index, text.shape)
  first, x, logits = [], None, []
  for r in range(loops):
    h = e if r == 0 else embed * e + hidden * jnp.concatenate([jnp.zeros((batch, 1, D)), x[:, :-1]], 1)
    for n in range(N):
      own = jax.tree.map(lambda leaf: leaf[n], weights['cell']['core']['block'])
      qkv = (normed(h, own['norm_attn']['scale']) @ own['attn']['qkv']['kernel']).reshape(batch, length, 2, 3, D // 2)
      q, k, v = qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]
      q, k = Rotary().rotate(q, pos), Rotary().rotate(k, pos)
      if r == 0:
        first.append((stop(k), stop(v)))
        y = attention(q, k, v, causal)
      else:
        if gate == 'query':
          full = jnp.einsum('bthd,gd->bthg', q, own['gate']['kernel'])  # of which the diagonal is used
          g = jax.nn.sigmoid(jnp.diagonal(full, axis1=2, axis2=3) + own['gate']['bias'])
        else:
          seen = normed(h, own['gate']['norm']['scale'])
          g = jax.nn.sigmoid(seen @ own['gate']['out']['kernel'] + own['gate']['out']['bias'])
        y = g[..., None] * attention(q, *first[n], causal) + (1 - g[..., None]) * attention(q, k, v, near)
      h = h + y.reshape(batch, length, D) @ own['attn']['out']['kernel']
      up = jnp.split(normed(h, own['norm_mlp']['scale']) @ own['mlp']['up']['kernel'], 2, -1)
      h = h + (jax.nn.silu(up[0]) * up[1]) @ own['mlp']['down']['kernel']
    x = normed(h, weights['cell']['norm']['scale'])
    logits.append(x @ weights['read_out']['kernel'].T)
  return jnp.stack(logits)


@functools.cache
def expected(window: int, gate: str = 'query'):
  """Logits of three loops over two texts."""
  model = model_of(window, gate=QueryGate() if gate == 'query' else HiddenGate())
  return reference(params(model), tokens(2, S), 3, window, 0.7, 0.4, gate=gate)


@functools.partial(jax.jit, static_argnums=0)
def packed(model, weights, text, plan, pos, seg):
  """z of documents in a row."""
  return model.apply({'params': weights}, text, plan, pos, seg).z


def decoded(model, loops, chunks, text=None, room: int = S + 2, most: int | None = None):
  """Logits of a text that is read in chunks of these lengths."""
  text = tokens(2, S) if text is None else text
  kv, outs, start = model.cache(len(text), room, most or loops), [], 0
  for length in chunks:
    pos = jnp.broadcast_to(jnp.arange(start, start + length), (len(text), length))
    out, kv = parts.extend(model, params(model), text[:, start:start + length], uniform(loops), pos, kv)
    outs.append(out)
    start += length
  return jnp.concatenate(outs, 1)


@pytest.mark.parametrize('gate', ['query', 'hidden'])
@pytest.mark.parametrize('window', WINDOWS)
def test_the_parallel_pass_is_the_definition(window, gate):
  model = model_of(window, gate=QueryGate() if gate == 'query' else HiddenGate())
  trace = forward(model, params(model), tokens(2, S), uniform(3), keep=loop.Every())
  close(parts.logits(model, params(model), trace.xs), expected(window, gate), 1e-5)
  close(trace.z, trace.xs[-1], 0)
  assert np.abs(np.diff(expected(window, gate), axis=0)).max() > 0.1  # the loops differ


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('loops, chunks', [(1, (1,) * S), (2, (1,) * S), (3, (1,) * S), (2, (S,)), (3, (4, 1, 5, 1))],
                         ids=['1', '2', '3', 'prompt', 'chunks'])
def test_all_loops_in_one_pass_decode_the_definition_at_every_position(window, loops, chunks):
  close(decoded(model_of(window), loops, chunks), expected(window)[loops - 1], 1e-5)


def test_half_precision_decodes_nearly_the_parallel_pass():
  model = model_of(dtype='bfloat16')
  z = forward(model, params(model), tokens(2, S), uniform(3)).z
  close(decoded(model, 3, (4, *(1,) * (S - 4))), parts.logits(model, params(model), z), 4e-2)
  rings = model.cache(1, 4)['loop'].rings
  assert (rings.k.dtype, model.cache(1, 4)['loop'].carried.k.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_cache_of_more_loops_serves_fewer():
  close(decoded(model_of(), 2, (3, *(1,) * (S - 3)), most=5), expected(3)[1], 1e-5)


def test_a_prelude_and_a_coda_stand_around_it():
  model = parts.looped(**parts.shifted(), loops=3, prelude=parts.stack(1), coda=parts.stack(1))
  z = forward(model, params(model), tokens(2, S), uniform(3)).z
  close(decoded(model, 3, (3, *(1,) * (S - 3))), parts.logits(model, params(model), z), 1e-5)


def test_one_loop_is_the_plain_transformer():
  model = model_of(loops=1)
  weights = params(model)
  block = Block(attn=SelfAttention(heads=2, position=Rotary()), mlp=GatedMLP(hidden=24))
  plain = parts.looped(Plain(Stack(block, N)), loops=1, read_in=parts.nowhere(), read_out=parts.Head(outputs=V))
  core = {name: tree for name, tree in weights['cell']['core']['block'].items() if name != 'gate'}
  of_plain = {'read_in': weights['read_in'], 'cell': {'core': {'block': core}},
              'read_out': {**weights['read_out'], 'norm': weights['cell']['norm']}}
  close(forward(model, weights, tokens(), uniform(1)).z, forward(plain, of_plain, tokens(), uniform(1)).z, 0)


# Gradients -----------------------------------------------------------------------------------------------------------


@functools.cache
def by_definition(stop=lambda x: x):
  model = model_of()
  return jax.jit(jax.grad(lambda w: jnp.sin(reference(w, tokens(2, S), 3, 3, 0.7, 0.4, stop)[-1]).sum()))(params(model))


@pytest.mark.parametrize('remat', [loop.PerStep(), loop.PerLayer()], ids=str)
def test_gradients_are_those_of_the_definition(remat):
  """Through the first loop's keys and values and the embeddings, which all loops read."""
  model = model_of().clone(remat=remat)

  @jax.jit
  @jax.grad
  def gradient(weights):
    z = model.apply({'params': weights}, tokens(2, S), uniform(3)).z
    return jnp.sin(model.apply({'params': weights}, z, method='logits')).sum()

  close(gradient(params(model)), by_definition(), 1e-5)
  kernels = [by_definition(stop)['cell']['core']['block']['attn']['qkv']['kernel']
             for stop in (lambda x: x, jax.lax.stop_gradient)]
  assert np.abs(kernels[0] - kernels[1]).max() > 1e-2  # what reaches the first loop's keys matters


def test_keys_of_the_first_loop_are_told_of_the_losses_of_the_second():
  model = model_of()
  ctx = Context(pos=jnp.broadcast_to(jnp.arange(S), (2, S)), remat=loop.KeepAll())

  def second(model, text, nudge):
    e = model.read_in(text, ctx.pos)
    x, shared = model.cell._first(e, ctx)
    shared = shared.replace(k=shared.k + nudge, v=shared.v + nudge)
    return jnp.sin(model.cell._later(x, e, shared, ctx)).sum()

  nudges = jnp.zeros((N, 2, S, 2, D // 2))
  slope = jax.jit(jax.grad(lambda nudge: model.apply({'params': params(model)}, tokens(2, S), nudge, method=second)))
  assert slope(nudges).shape == nudges.shape and (np.abs(slope(nudges)).max((0, 1, 3, 4)) > 1e-6).all()


@pytest.mark.parametrize('gate, name', [(QueryGate(), 'gate'), (HiddenGate(), 'gate/out')], ids=['query', 'hidden'])
def test_gates_begin_at_one_half_and_learn(gate, name):
  model = model_of(gate=gate, loops=2)
  weights = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  half = model_of(gate=ConstantGate(0.5), loops=2)
  without = {**weights, 'cell': {**weights['cell'], 'core': {'block': {
      key: tree for key, tree in weights['cell']['core']['block'].items() if key != 'gate'}}}}
  close(forward(model, weights, tokens(), uniform(2)).z, forward(half, without, tokens(), uniform(2)).z, 0)

  def loss(weights):
    return jnp.sin(model.apply({'params': weights}, tokens(), uniform(2)).z).sum()

  slopes = jax.jit(jax.grad(loss))(weights)['cell']['core']['block']
  for step in name.split('/'):
    slopes = slopes[step]
  assert all((np.abs(leaf).reshape(N, -1).max(-1) > 0).all() for leaf in (slopes['kernel'], slopes['bias']))


def test_a_learned_scale_learns_and_is_logged():
  model = model_of(mix=LearnedMix(), loops=2)
  weights = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  assert model.cell.diagnose(weights['cell'])['hidden scale'] == pytest.approx(0.053)
  same = model_of(mix=Mix(), loops=2)
  without = {**weights, 'cell': {name: tree for name, tree in weights['cell'].items() if name != 'mix'}}
  close(forward(model, weights, tokens(), uniform(2)).z, forward(same, without, tokens(), uniform(2)).z, 1e-6)
  slope = jax.jit(jax.grad(lambda w: jnp.sin(model.apply({'params': w}, tokens(), uniform(2)).z).sum()))(weights)
  assert abs(float(slope['cell']['mix']['scale'])) > 1e-6 and same.cell.diagnose({}) == {}


# Gates and windows ---------------------------------------------------------------------------------------------------


def with_gate(bias: float, window: int = 3):
  """The logits of two loops where all gates are wide open or shut."""
  model = model_of(window, loops=2)
  weights = jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf * 0 + bias * (path[-1].key == 'bias') if 'gate' in jax.tree_util.keystr(path) else leaf,
      params(model))
  return forward(model, weights, tokens(2, S), uniform(2)).z, weights


def without_gate(weights, value, window):
  core = {name: tree for name, tree in weights['cell']['core']['block'].items() if name != 'gate'}
  weights = {**weights, 'cell': {**weights['cell'], 'core': {'block': core}}}
  return forward(model_of(window, gate=ConstantGate(value), loops=2), weights, tokens(2, S), uniform(2)).z


def test_an_open_gate_reads_the_first_loop_alone():
  """Whatever the window; and so the gate is on the side of the first loop's keys."""
  z, weights = with_gate(100.0)
  for window in WINDOWS:
    close(z, without_gate(weights, 1.0, window), 1e-6)


def test_a_shut_gate_with_a_window_over_all_is_a_loop_with_keys_of_its_own():
  """That loop: the plain cell's layers on the shifted input."""
  z, weights = with_gate(-100.0, 20)
  close(z, without_gate(weights, 0.0, S - 1), 1e-6)
  block = Block(attn=SelfAttention(heads=2, position=Rotary()), mlp=GatedMLP(hidden=24))
  core = {name: tree for name, tree in weights['cell']['core']['block'].items() if name != 'gate'}
  ctx = Context(pos=jnp.broadcast_to(jnp.arange(S), (2, S)))
  e = weights['read_in']['embedding'][tokens(2, S)]
  x = e
  for r in range(2):
    h = e if r == 0 else 0.7 * e + 0.4 * jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0)))
    h, _ = Stack(block, N).apply({'params': {'block': core}}, h, ctx, None, None)
    x = normed(h, weights['cell']['norm']['scale'])
  close(z, x, 1e-5)
  assert np.abs(np.asarray(with_gate(-100.0, 3)[0] - z)).max() > 1e-3  # a smaller window is felt


@pytest.mark.parametrize('length, left, documents', [(1, 0, 0), (64, 16, 2), (65, 16, 3), (96, 0, 0), (150, 31, 0),
                                                     (150, 40, 3), (129, 64, 2)])
def test_local_attention_in_blocks_is_the_band(length, left, documents):
  rng = np.random.default_rng(length + left)
  q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, 4)), jnp.float32) for heads in (4, 2, 2))
  seg = jnp.asarray(np.sort(rng.integers(0, documents, (2, length))), jnp.int32) if documents else None
  index = np.arange(length)
  mask = (index[:, None] >= index) & (index[:, None] - index <= left)
  mask = mask[None] if seg is None else mask & (np.asarray(seg)[:, :, None] == np.asarray(seg)[:, None])
  ours = jax.jit(lambda q, k, v: banded(q, k, v, seg, left))(q, k, v)
  close(ours, jax.jit(attention)(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), mask[:, None]), 1e-5)


def test_local_attention_does_not_form_all_scores():
  length, left = 4096, 64
  shape = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
  text = str(jax.make_jaxpr(lambda q, k, v: banded(q, k, v, None, left))(shape, shape, shape))
  assert f'{length},{length}' not in text and '64,64,128' in text  # blocks, queries, keys


# The first token, documents ------------------------------------------------------------------------------------------


def test_the_first_token_of_a_document_hears_no_state():
  """Another scale of the states changes every answer but the first token's, of each document."""
  quiet, loud = (model_of(mix=Mix(embed=0.7, hidden=hidden)) for hidden in (0.4, 3.0))
  pos = jnp.concatenate([jnp.arange(4), jnp.arange(S - 4)])[None]
  seg = jnp.array([[1] * 4 + [2] * (S - 4)])
  traces = [packed(model, params(quiet), tokens(1, S), uniform(3), pos, seg) for model in (quiet, loud)]
  moved = np.abs(np.asarray(traces[0] - traces[1]))[0].max(-1)
  assert moved[[0, 4]].max() < 1e-6 and np.delete(moved, [0, 4]).min() > 1e-3


def test_packed_documents_are_as_if_alone():
  model, text = model_of(), tokens(1, 2 * S)
  cut = 9
  pos = jnp.concatenate([jnp.arange(cut), jnp.arange(2 * S - cut)])[None]
  seg = (jnp.arange(2 * S) >= cut)[None].astype(jnp.int32)
  z = packed(model, params(model), text, uniform(3), pos, seg)
  for part, where in ((text[:, :cut], slice(0, cut)), (text[:, cut:], slice(cut, None))):
    close(z[:, where], forward(model, params(model), part, uniform(3)).z, 1e-5)


# Depths --------------------------------------------------------------------------------------------------------------


def test_states_that_are_kept_are_those_after_each_row_of_the_plan():
  model, text = model_of(), tokens(3, S)
  full = forward(model, params(model), text, uniform(3), keep=loop.Every())
  active = jnp.array([True, False, True, False])
  plan = uniform(4)
  some = forward(model, params(model), text, plan.replace(active=active), keep=loop.Every())
  close(some.xs, full.xs[jnp.array([0, 0, 1, 1])], 1e-6)
  assert int(some.steps) == 2
  depth = np.array([0, 1, 3])
  each = forward(model, params(model), text, plan.replace(active=jnp.arange(4)[:, None] < depth), keep=loop.Every())
  norms = forward(model, params(model), text, plan.replace(active=jnp.arange(4)[:, None] < depth), keep=loop.Norms())
  for row, own in enumerate(depth):
    for k in range(4):
      done = min(k + 1, own)
      start = params(model)['read_in']['embedding'][text[row]]
      close(each.xs[k, row], full.xs[done - 1, row] if done else start, 1e-6)
  close(norms.xs, jax.vmap(loop.Norms())(each.xs), 1e-5)
  assert norms.xs.shape == (4, 3)


def test_a_loop_that_nobody_takes_is_a_branch():
  model = model_of()
  plan = uniform(3)
  text = str(jax.make_jaxpr(lambda active: forward(model, params(model), tokens(), plan.replace(active=active)).z)(
      jnp.ones(3, bool)))
  assert ' cond[' in text and ' cond[' not in str(jax.make_jaxpr(
      lambda weights: forward(model, weights, tokens(), plan).z)(params(model)))


def test_a_step_alone_is_the_loop():
  """For exits that are scored without a cache."""
  model = model_of()
  weights, text = params(model), tokens(2, S)
  rule = exits.Adaptive(rule=exits.StateChange(threshold=0.0))
  trace = jax.jit(lambda: model.apply({'params': weights}, text, uniform(3), rule, 0.0, method='adapt'))()
  close(trace.z, forward(model, weights, text, uniform(3)).z, 1e-5)
  assert (np.asarray(trace.steps) == 3).all()


# The engine ----------------------------------------------------------------------------------------------------------

ROOM = 64
LONG = parts.looped(**{**parts.shifted(), 'read_in': parts.Tokens(vocab=V, width=D, length=ROOM)}, loops=3)


def greedy(prompt, budget, count):
  """The continuation by the parallel pass over all that is there, again for every token."""
  ids = [LETTERS.index(letter) for letter in prompt] or [0]
  for _ in range(count):
    row = jnp.asarray([ids + [0] * (ROOM - len(ids))])
    z = forward(LONG, params(LONG), row, uniform(budget)).z[0, len(ids) - 1]
    ids.append(int(parts.logits(LONG, params(LONG), z).argmax()))
    if ids[-1] == TOKENIZER.eos:
      break
  return TOKENIZER.decode([i for i in ids[max(len(prompt), 1):] if i != TOKENIZER.eos])


REQUESTS = [('abc', 1), ('hello there', 3), ('', 2), ('q', 3), ('abc', 2), ('hello there', 3)]


def test_the_engine_writes_what_the_parallel_pass_would():
  """Rows of different budgets and lengths; fewer rows than requests, so that rows are refilled."""
  engine = Engine(LONG, params(LONG), TOKENIZER, rows=4, length=ROOM, max_steps=4)
  for prompt, budget in REQUESTS:
    engine.submit(prompt, budget=budget, temperature=0.0, max_new_tokens=9)
  assert engine.run() == [greedy(prompt, budget, 9) for prompt, budget in REQUESTS]
  assert 1 < engine.stats['loops'] < 3


def test_the_harness_scores_at_every_depth():
  ids = [LETTERS.index(letter) for letter in 'hello there']
  for budget in (1, 2, 3):
    ((score, _),) = Scorer(LONG, params(LONG), TOKENIZER, steps=budget).loglikelihood([('hello', ' there')])
    logits = reference(params(LONG), jnp.asarray([ids]), budget, 3, 0.7, 0.4)[-1, 0]
    own = jax.nn.log_softmax(logits)[jnp.arange(4, 10), jnp.asarray(ids[5:])]
    assert score == pytest.approx(float(own.sum()), abs=1e-4)


def test_the_engine_offers_neither_drafts_nor_shared_beginnings():
  with pytest.raises(ConfigError, match='draft with memory'):
    Engine(LONG, params(LONG), TOKENIZER, draft=1)
  engine = Engine(LONG, params(LONG), TOKENIZER, rows=1, length=ROOM)
  prompt = 'the quick brown fox jumps over'
  engine.submit(prompt, temperature=0.0, max_new_tokens=2)
  engine.run()
  engine.submit(prompt + ' it', temperature=0.0, max_new_tokens=2)
  assert engine._beginning(engine._waiting[0]) == (0, 0)


# Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('loops', [1, 2, 4])
@pytest.mark.parametrize('length', [3, 50])
def test_bytes(loops, length):
  """2 N G d (S + (R - 1) min(w + 1, S)) numbers, the carried states, and a position for each place."""
  window = 3
  model = model_of(window, heads=4, groups=2)
  cache = jax.eval_shape(lambda: model.cache(3, length, loops))['loop']
  places = length + (loops - 1) * min(window + 1, length)
  carried = (loops - 1) * (4 * D + 4)
  kv = 4 * 2 * N * 2 * (D // 4)
  assert sum(kv.bytes for kv in (cache.first, cache.rings, cache.carried)) == 3 * (places * (kv + 4) + carried)
  assert cache.loops == loops


def test_operations():
  """A later loop reads its window too, and forms its gate."""
  model, length = model_of(window_left=3), 10
  core = model.cell.core.flops(D, length)
  keys = np.mean([min(i + 1, 4) for i in range(length)])
  assert model.cell.flops(D, length, 1) == core
  assert model.cell.flops(D, length, 3) == pytest.approx(3 * core + 2 * N * (4 * D * keys + 2 * D))
  assert HiddenGate().flops(D, 2) == 4 * D and ConstantGate(1.0).flops(D, 2) == 0


def test_the_published_size():
  """14 layers of width 5120 with 8 key/value heads, two loops in one set of weights (section 2)."""
  config = config_of('plt', 'loopcoder')
  check(config)
  width, hidden, vocab, layers = 5120, 27_648, 76_800, 14
  layer = 2 * width * width + 2 * width * 8 * 128 + 3 * width * hidden + 2 * width + 40 * 128 + 40
  assert parameter_count(config.model) == layers * layer + width + 2 * vocab * width == 7_612_882_480
  cache = jax.eval_shape(lambda: config.model.cache(1, 4096))['loop']
  assert cache.rings.bytes / cache.first.bytes == pytest.approx(65 / 4096)  # 1.6 % more than without loops


# Bad input -----------------------------------------------------------------------------------------------------------


def run(model, plan=None, kv=None, length=2, **options):
  text = tokens(1, length)
  return jax.eval_shape(lambda: model.apply({'params': params(model_of())}, text, uniform(2) if plan is None else plan,
                                            kv=kv, **options))


PLAIN = parts.looped(parts.plain(), memory=Streams(window_left=3))
EACH = adapted(model_of(), 2, each=True)  # an update for every loop, which one pass of the layers cannot tell apart
GATED = model_of().cell.core  # layers of the shifted cell, elsewhere


def of_cell(**changes):
  return model_of().cell.clone(**changes)


@pytest.mark.parametrize('make, message', [
    (lambda: Streams(window_left=-1), r'memory\.window_left = -1'),
    (lambda: of_cell(window_left=-1).check(D), r'model\.cell\.window_left = -1'),
    (lambda: of_cell(core=parts.stack(1)).check(D), 'core.block = Block.*GatedBlock'),
    (lambda: of_cell(core=Stack(model_of().cell.core.block, 2, order=(0, 1, 1))).check(D), 'order'),
    (lambda: Streams(window_left=1).make(0, 1, 1, 4, 1, 1, 'float32', D), 'loops = 0'),
    (lambda: run(model_of(), Plan(t=jnp.zeros(0), dt=jnp.zeros(0))), 'no steps'),
    (lambda: run(model_of(), uniform(2).replace(no_grad_steps=jnp.int32(1))), 'plan.no_grad_steps'),
    (lambda: run(model_of(), kv=model_of().clone(memory=memories.PerLoop()).cache(1, 4)), 'window'),
    (lambda: run(model_of().clone(memory=memories.First()), kv=model_of().cache(1, 4)), 'model.memory = First'),
    (lambda: run(model_of().clone(memory=Streams(window_left=2)), kv=model_of(2).cache(1, 4)),
     r'Streams\(window_left=3\)'),
    (lambda: run(model_of(), uniform(3), kv=model_of().cache(1, 4, 2)), '3 steps.*slots for 2'),
    (lambda: jax.eval_shape(lambda: PLAIN.apply({'params': params(PLAIN)}, tokens(1, 1), uniform(2),
                                                kv=PLAIN.cache(1, 4))), r'use PerLoop\(\)'),
    (lambda: run(model_of(), kv=model_of().cache(1, 4), keep=loop.Every()), 'with a cache'),
    (lambda: jax.eval_shape(lambda: model_of().apply(
        {'params': params(model_of())}, tokens(1, 1), uniform(2), exits.Adaptive(rule=exits.StateChange()), 0.1,
        kv=model_of().cache(1, 4), method='adapt')), 'decode without an exit'),
    (lambda: EACH.cell.check(D), r'an update of low rank for every loop.*LowRank\(loops=None\)'),
    (lambda: parts.shapes(EACH), r'an update of low rank for every loop'),
    (lambda: parts.shapes(parts.looped(Plain(GATED))), 'GatedAttention: the cell Shifted alone'),
    (lambda: parts.shapes(parts.looped(parts.plain(), coda=GATED)), 'GatedAttention: the cell Shifted alone'),
    (lambda: parts.shapes(parts.looped(Routed(GATED))), 'use SelfAttention elsewhere')], ids=range(19))
def test_bad_input(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


@pytest.mark.parametrize('count', [1, 2])
def test_a_token_whose_forerunner_was_left_out_has_no_answer(count):
  """Carried states are missing: better none than a wrong one. One loop needs none."""
  model = model_of()
  for loops in (1, 2):
    pos = jnp.arange(5, 5 + count)[None]
    out, _ = parts.extend(model, params(model), tokens(1, count), uniform(loops), pos, model.cache(1, 12))
    assert np.isnan(out).all(-1)[0, 0] == (loops > 1)
