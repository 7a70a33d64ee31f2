"""MELT: shared rows against the models that it is between, chunks, what a cache holds, both phases, and the teacher."""
import dataclasses
import functools
import re

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.configs import melt as paper
import loopformer
from loopformer import config as configs, loop, memories, plans
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed, Plain
from loopformer.inference import exits
from loopformer.inference.engine import Engine, generate
from loopformer.model import init_params, make_readout, parameter_count, parameter_roles, run_batch
from loopformer.nn import stack as stacks
from loopformer.nn.blocks import Chain
from loopformer.nn.embed import Head
from loopformer.nn.layers import Identity, RMSNorm
from loopformer.nn.positions import Alibi, Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Own, Rollout, Weighted
from loopformer.optim import WSD, AdamW
from loopformer.papers.melt import cell as cells
from loopformer.papers.melt.attention import Constant, Elementwise, Flight, LatentAttention, Mean, Scalar
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.melt.plans import BLEND, Apart, Transition
from loopformer.papers.melt.teacher import OwnWithAttention, WithAttention
from loopformer.papers.melt.terms import Aligned
from loopformer.papers.mor.cell import Routed
from loopformer.roles import Roles
from loopformer.sharding import Mesh
from loopformer.terms.distill import Distill, kl_sum
from loopformer.training.frozen import ParamGroups
from loopformer.training.step import State, make_step
from loopformer.training.train import train
from loopformer.types import ConfigError, Context, Readout, Step, Trace
from tests import parts, test_config
from tests.data.test_data import write_corpus
from tests.experiments.test_family import brief, compiled_once
from tests.experiments.test_golden import config_of
from tests.inference.test_generate import TOKENIZER
from tests.parts import ROWS, D, L, N, T, V, close, forward, over, padded, poked, tokens

OURO = ROWS['ouro'].model
UNIFORM = plans.Uniform(L)(None)
PATH = 'cell/core/block/attn/latent'
CHUNK = 3
CONFIG = dataclasses.replace(test_config.TINY, task=dataclasses.replace(test_config.TINY.task, length=T))
assert T % CHUNK and T > 2 * CHUNK  # a last chunk that is not full, and a chunk that reads two others


@functools.cache
def melt(chunk: int = CHUNK, latent=Elementwise(), **options):
  """OURO with shared rows."""
  attn = LatentAttention(**{'heads': 2, 'position': Rotary(), 'latent': latent, **options})
  return parts.looped(Gated(Stack(parts.peri(attn), N)), read_in=parts.nowhere(),
                      read_out=Head(outputs=V, norm=Identity()), memory=Latest(chunk=chunk))


def converted(model, base=None):
  """Parameters of `model`, those of OURO where it has them."""
  given = dict(jax.tree_util.tree_leaves_with_path(parts.params(OURO) if base is None else base))
  return jax.tree_util.tree_map_with_path(lambda path, own: given.get(path, own), parts.params(model))


def logits(model, weights, plan=UNIFORM, text=None, seg=None):
  text = tokens() if text is None else text
  return parts.logits(model, weights, forward(model, weights, text, plan, seg).z)


def by_token(model, weights, text, plan=UNIFORM, start: int = 0, kv=None):
  outs, kv = [], kv or model.cache(len(text), T + 2, plan.steps)
  for i in range(start, text.shape[1]):
    out, kv = parts.extend(model, weights, text[:, i:i + 1], plan, jnp.full((len(text), 1), i), kv)
    outs.append(out)
  return jnp.concatenate(outs, 1), kv


def prefill(model, weights, text, plan=UNIFORM, pos=None):
  pos = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape) if pos is None else pos
  return parts.extend(model, weights, text, plan, pos, model.cache(len(text), T + 2, plan.steps))


# Between other models ------------------------------------------------------------------------------------------------


def test_the_model_that_is_converted_has_all_parameters_but_the_gates():
  ours, theirs = ({jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape for path, leaf in
                   jax.tree_util.tree_leaves_with_path(parts.shapes(model))} for model in (melt(), OURO))
  assert {path: ours[path] for path in ours if not path.startswith(PATH)} == {
      path: theirs[path] for path in theirs if not path.startswith('cell/gate')}
  assert {path for path in ours if path.startswith(PATH)} == {f'{PATH}/gate', f'{PATH}/bias'}


def test_without_gate_and_chunks_it_is_the_looped_model():
  """z = 0 and all tokens in one chunk: every loop reads rows of its own."""
  for chunk in (T, T + 5):
    model = melt(chunk, Constant())
    for steps in (1, 3):
      close(logits(model, converted(model), padded(steps)), logits(OURO, parts.params(OURO), padded(steps)), 1e-5)


@pytest.mark.parametrize('keep, shared', [(0.0, memories.Ring(size=1)), (1.0, memories.First())], ids=['last', 'first'])
def test_token_by_token_a_fixed_gate_is_the_looped_model_with_shared_rows(keep, shared):
  """z = 0 is the sharing of the last loop's rows in decoding, z = 1 (with h_0 = x_1) that of the first loop's."""
  model, text = melt(1, Constant(keep)), tokens(3)
  theirs, _ = by_token(OURO.clone(memory=shared), parts.params(OURO), text)
  close(by_token(model, converted(model), text)[0], theirs, 1e-5)
  close(logits(model, converted(model), text=text), theirs, 1e-5)
  assert np.abs(np.asarray(theirs - logits(OURO, parts.params(OURO), text=text))).max() > 1e-2


@pytest.mark.parametrize('latent', [Elementwise(), Scalar(), Constant(0.3), Mean()], ids=lambda g: type(g).__name__)
def test_one_loop_is_the_plain_transformer_whatever_the_gate(latent):
  model = melt(CHUNK, latent)
  close(logits(model, converted(model), padded(1)), logits(OURO, parts.params(OURO), padded(1)), 1e-5)
  if latent == Elementwise():
    assert np.abs(np.asarray(logits(model, converted(model), padded(2))
                             - logits(OURO, parts.params(OURO), padded(2)))).max() > 1e-2


@pytest.mark.parametrize('chunk', [1, CHUNK, T])
def test_unblended_it_is_the_looped_model_for_any_chunk(chunk):
  model = melt(chunk)
  weights, depth = converted(model), padded(3)
  trace = forward(model, weights, tokens(), depth.replace(rows={BLEND: jnp.zeros(L)}), keep=loop.Every())
  theirs = forward(OURO, parts.params(OURO), tokens(), depth, keep=loop.Every())
  close((trace.x, trace.z, trace.xs), (theirs.x, theirs.z, theirs.xs), 1e-5)


def test_wholly_blended_it_is_itself():
  model = melt()
  weights = converted(model)
  seg = jnp.broadcast_to(jnp.arange(T) // 4, (T + 1, T))
  np.testing.assert_array_equal(logits(model, weights, UNIFORM.replace(rows={BLEND: jnp.ones(L)}), seg=seg),
                                logits(model, weights, seg=seg))
  half = logits(model, weights, UNIFORM.replace(rows={BLEND: jnp.full(L, 0.5)}), seg=seg)
  ends = [logits(model, weights, UNIFORM.replace(rows={BLEND: jnp.full(L, share)}), seg=seg) for share in (0.0, 1.0)]
  assert min(np.abs(np.asarray(half - end)).max() for end in ends) > 1e-2


# Chunks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('position', [Rotary(), Alibi()], ids=['rotary', 'alibi'])
def test_causality_and_documents_across_chunks(position):
  model = melt(CHUNK, position=position)
  first, index = 4, np.arange(T)  # a document ends within a chunk
  seg = jnp.broadcast_to((jnp.arange(T) >= first).astype(jnp.int32), (T + 1, T))
  for own in (None, seg):
    z = np.asarray(forward(model, parts.params(model), poked(), UNIFORM, own).z)
    moved = np.abs(z[1:] - z[:1]).max(-1)
    reached = index[None] >= index[:, None]
    if own is not None:
      reached &= np.asarray(seg[0])[None] == np.asarray(seg[0])[:, None]
    assert moved[~reached].max() <= 1e-6 and moved[reached].min() > 1e-5


def test_chunks_are_the_function_that_decoding_begins_with():
  """The first token of every chunk is what decoding gives after the chunks before it; the others are not."""
  model, text = melt(), tokens(3)
  weights = converted(model)
  whole = logits(model, weights, text=text)
  for start in (0, CHUNK, 2 * CHUNK):
    kv = prefill(model, weights, text[:, :start])[1] if start else None
    single, _ = by_token(model, weights, text[:, :min(start + 2, T)], start=start, kv=kv)
    close(single[:, 0], whole[:, start], 1e-5)
    assert np.abs(np.asarray(single[:, 1] - whole[:, start + 1])).max() > 1e-3


def test_prompts_of_any_lengths_are_read_as_the_parallel_pass_reads_them():
  model, text = melt(), tokens(4)
  weights, lengths = converted(model), np.array([8, 1, 3, 5])
  index = np.arange(T)
  pos = jnp.asarray(np.where(index < lengths[:, None], index, -1))
  out, kv = prefill(model, weights, jnp.where(pos < 0, (text + 11) % V, text), pos=pos)
  whole = logits(model, weights, text=text)
  for row, length in enumerate(lengths):
    close(out[row, :length], whole[row, :length], 1e-5)
  assert (np.asarray(kv['loop'].pos[0]) >= 0).sum(-1).tolist() == lengths.tolist()


def test_sequences_with_depths_of_their_own():
  """In the parallel pass, and cached with schedules of their own."""
  model, depth = melt(), np.array([1, 4, 2, 3])
  weights, text = converted(model), tokens(4)
  active = jnp.arange(L)[:, None] < depth
  together = logits(model, weights, UNIFORM.replace(active=active), text)
  cached, _ = prefill(model, weights, text, UNIFORM.replace(active=active))
  for row, own in enumerate(depth):
    alone = logits(model, weights, UNIFORM.replace(active=jnp.arange(L) < own), text)[row]
    close((together[row], cached[row]), (alone, alone), 1e-5)


def value_and_gradient(model, weights, plan):
  def loss(weights):
    seg = jnp.broadcast_to(jnp.arange(T) // 6, (2, T))
    trace = model.apply({'params': weights}, tokens(2), plan, None, seg, keep=loop.Every())
    return (jnp.sum(jnp.sin(trace.z[:, -3])) + jnp.sum(trace.xs ** 2 * jnp.linspace(0, 0.1, T)[:, None])
            + jnp.mean(trace.aux['attention'] ** 2))

  return jax.jit(jax.value_and_grad(loss))(weights)


@pytest.mark.parametrize('plan', [padded(3), UNIFORM.replace(rows={BLEND: jnp.full(L, 0.6)})],
                         ids=['skipped', 'blended'])
def test_gradients_are_those_of_automatic_differentiation(plan, monkeypatch):
  """Of the loop over chunks as it stands, saving everything."""
  model = melt()
  value, grads = value_and_gradient(model, converted(model), plan)
  monkeypatch.setattr(cells, '_through', lambda *arguments: cells._through_forward(*arguments)[0])
  close((value, grads), value_and_gradient(model.clone(remat=loop.KeepAll()), converted(model), plan), 1e-5)
  assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads['cell']))


def test_gradients_go_through_earlier_chunks():
  model, text = melt(), np.asarray(tokens(2))

  def loss(table):
    weights = {**converted(model), 'read_in': {'embedding': table}}
    return jnp.sum(jnp.sin(model.apply({'params': weights}, tokens(2), UNIFORM).z[:, -1]))

  grads = jax.jit(jax.grad(loss))(converted(model)['read_in']['embedding'])
  only_first = [token for token in text[0, :CHUNK] if token not in text[:, CHUNK:]]
  assert only_first and all(np.abs(grads[token]).max() > 1e-6 for token in only_first)


def test_states_are_kept():
  model = melt()
  trace = forward(model, converted(model), tokens(), padded(3), keep=loop.Every())
  assert trace.xs.shape == (L, T + 1, T, D) and trace.aux['attention'].shape == (L, N, T + 1, T, D)
  np.testing.assert_array_equal(trace.xs[-1], trace.x)
  assert not trace.aux['attention'][-1].any() and trace.aux['attention'][2].any()  # the last row is skipped
  norms = forward(model, converted(model), tokens(), padded(3), keep=loop.Norms())
  close(norms.xs, jnp.linalg.norm(trace.xs, axis=-1).mean(-1), 1e-6)


def test_what_attention_gives_is_not_held_where_nobody_asks():
  model = melt()

  def text(keep_aux):
    def run(weights, text):
      trace = model.apply({'params': weights}, text, UNIFORM)
      return (trace.z, trace.aux) if keep_aux else trace.z
    return jax.jit(run).lower(parts.params(model), tokens()).compile().as_text()

  shape = f'{L},{N},{T + 1},{CHUNK},{D}]'
  assert shape in text(True) and shape not in text(False)


# The cache -----------------------------------------------------------------------------------------------------------


def test_a_cache_is_as_large_as_that_of_one_loop():
  model = melt()
  sizes = {loops: jax.eval_shape(lambda: model.cache(3, 11, loops))['loop'].bytes for loops in (1, L, 9)}
  assert set(sizes.values()) == {3 * 11 * (2 * N * D * 4 + 4)}
  theirs = jax.eval_shape(lambda: OURO.cache(3, 11, L))['loop'].bytes
  assert theirs == L * sizes[L]
  engines = [Engine(model, parts.params(model), TOKENIZER, rows=2, length=32, loops=loops).bytes for loops in (1, L)]
  assert engines[0] == engines[1] == 2 * 32 * (2 * N * D * 4 + 4)


def test_published_bytes_and_parameters():
  """The table of section 4, and 201.3M gates beside Ouro's 1.4B (less its exit gate)."""
  model = config_of('melt', '1.4b,phase=transition,base=x').model
  kv = jax.eval_shape(lambda: model.cache(1, 1000))['loop']
  assert 2 * (kv.k.size + kv.v.size) / 1000 == 196_608
  assert parameter_count(model) == 1_434_652_673 - 2049 + 24 * (2 * 2048 ** 2 + 2048)
  more = model.flops(1, 1) / config_of('melt', '1.4b').model.flops(1, 1)
  assert 1.1 < more < 1.2


def test_loops_overwrite_the_row_of_their_token_and_no_other():
  model, text = melt(1), tokens(2)
  weights = converted(model)
  _, before = prefill(model, weights, text[:, :4])
  rows = []
  for steps in (1, 2, L):
    _, kv = parts.extend(model, weights, text[:, 4:5], padded(steps), jnp.full((2, 1), 4), before)
    after = kv['loop']
    assert (np.asarray(after.pos[0]) >= 0).sum(-1).tolist() == [5, 5]
    others = np.arange(T + 2) != 4
    np.testing.assert_array_equal(np.asarray(after.k)[..., others, :], np.asarray(before['loop'].k)[..., others, :])
    rows.append(np.asarray(after.k)[0, -1, :, :, 4])
  assert np.abs(rows[0] - rows[1]).max() > 1e-3 and np.abs(rows[1] - rows[2]).max() > 1e-3


def test_generation_and_drafts():
  """With chunks of one token drafts are judged exactly; with others they are refused."""
  model = melt(1)
  options = dict(prompts=['abc', 'q', 'hello there'], max_new_tokens=6, temperature=0.0, rows=2)
  weights = converted(model)
  plainly = generate(model, weights, TOKENIZER, **options)
  assert len(set(plainly)) > 1 and plainly == generate(model, weights, TOKENIZER, draft=1, **options)
  ids = TOKENIZER.encode('abc')
  for _ in range(6):
    row = np.zeros((1, T + 1), np.int32)
    row[0, :len(ids)] = ids
    ids.append(int(loopformer.logits(model, weights, row)[0, len(ids) - 1].argmax()))
  assert TOKENIZER.decode(ids[3:]).split('\0')[0] == plainly[0]
  with pytest.raises(ConfigError, match='draft with memory = Latest'):
    Engine(melt(), weights, TOKENIZER, draft=1)


# The latents ---------------------------------------------------------------------------------------------------------


def latents(latent, xs, weights=None):
  """h of every loop [K, B, C, D] of one layer whose inputs are xs [K, B, C, D]."""
  attn = LatentAttention(heads=2, latent=latent)
  k, batch, length, width = xs.shape
  empty = jnp.zeros((1, batch, length, 2, width // 2))
  flight = Flight(h=jnp.zeros((1, batch, length, width)), taken=jnp.zeros(batch, jnp.int32), rows=(empty, empty))
  ctx = Context(pos=jnp.broadcast_to(jnp.arange(length), (batch, length)),
                step=Step(t=jnp.float32(0), dt=jnp.float32(1), active=None, k=jnp.int32(0)))
  shapes = attn.init(jax.random.key(0), xs[0], ctx, flight, 0)['params']
  params = {**shapes, **({} if weights is None else {'latent': weights})}
  found = []
  for x in xs:
    _, flight = attn.apply({'params': params}, x, ctx, flight, 0)
    flight = flight.replace(taken=flight.taken + 1)
    found.append(flight.h[0])
  return np.asarray(jnp.stack(found))


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 1000), scale=st.floats(0.1, 20.0))
def test_latents_stay_between_the_inputs_so_far(seed, scale):
  rng = np.random.default_rng(seed)
  xs = jnp.asarray(rng.standard_normal((4, 2, 3, D)), jnp.float32)
  weights = {'gate': jnp.asarray(scale * rng.standard_normal((2 * D, D)), jnp.float32),
             'bias': jnp.asarray(rng.standard_normal(D), jnp.float32)}
  h = latents(Elementwise(), xs, weights)
  low, high = np.minimum.accumulate(xs), np.maximum.accumulate(xs)
  assert (h >= low - 1e-5).all() and (h <= high + 1e-5).all()
  np.testing.assert_array_equal(h[0], xs[0])


def test_gates_are_their_formulas():
  xs = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 3, D)), jnp.float32)
  close(latents(Constant(0.0), xs), xs, 1e-6)
  close(latents(Constant(1.0), xs), jnp.broadcast_to(xs[0], xs.shape), 1e-6)
  close(latents(Mean(), xs), jnp.cumsum(xs, 0) / np.arange(1, 5)[:, None, None, None], 1e-6)
  z = 1 / (1 + np.exp(4.0))  # fresh gates
  by_hand = [xs[0]]
  for x in xs[1:]:
    by_hand.append(z * by_hand[-1] + (1 - z) * x)
  close(latents(Elementwise(), xs), jnp.stack(by_hand), 1e-6)
  close(latents(Scalar(), xs), jnp.stack(by_hand), 1e-6)


# Both phases ---------------------------------------------------------------------------------------------------------


def test_plans_of_the_phases():
  plan = Transition(of=plans.Uniform(L), steps=5)
  shares = [np.asarray(plan(parts.plan_context(jax.random.key(0), step=step)).rows[BLEND]) for step in range(7)]
  np.testing.assert_allclose([share[0] for share in shares], [0, 0.25, 0.5, 0.75, 1, 1, 1])
  assert all((share == share[0]).all() and share.shape == (L,) for share in shares)
  assert (plan.longest, plan.expected) == (L, L) == (Apart(of=plans.Uniform(L)).longest, L)
  assert not Apart(of=plans.Uniform(L))(parts.plan_context(jax.random.key(0), step=9)).rows[BLEND].any()


LENT = Rollout(Apart(of=plans.Uniform(L)), keep=loop.Every(), weights_of='there')


def phases(plan, teacher=LENT, **terms) -> Objective:
  rolls = {'all': Rollout(plan, keep=loop.Every()), 'teacher': teacher}
  every = {'kd': Distill(roll='all', teacher='teacher', chunk=5), 'aligned': Aligned(roll='all', teacher='teacher')}
  return Objective(rolls=rolls, terms={name: Weighted(weight, every[name]) for name, weight in terms.items()})


BOTH = {'kd': 1.0, 'aligned': 0.1}


@functools.partial(jax.jit, static_argnums=(0,))
def shares(blended: bool, weights, teacher):
  """((loss, means of terms), gradients of student and teacher)."""
  objective = phases(Apart(of=plans.Uniform(L)) if blended else plans.Uniform(L), **BOTH)
  batch = parts.batch()
  total = objective.denominators(batch)
  context = parts.plan_context(jax.random.key(0), batch)
  return jax.value_and_grad(lambda w, t: objective(melt(), w, context, total, {'there': t}), (0, 1), has_aux=True)(
      weights, teacher)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
  weights = converted(melt())
  (_, terms), (grads, _) = shares(True, weights, weights)
  assert terms['aligned'] == 0 and abs(terms['kd']) < 1e-6
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads)) < 1e-5
  (_, terms), (grads, taught) = shares(False, weights, weights)
  assert terms['kd'] > 1e-3 and terms['aligned'] > 1e-3
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads['cell']))
  assert not any(leaf.any() for leaf in jax.tree.leaves(taught))


def test_terms_are_their_formulas():
  """The teacher answers by its own head and norm."""
  rng = np.random.default_rng(0)
  weights, teacher = converted(melt()), jax.tree.map(lambda leaf: 1.1 * leaf + 0.01, converted(melt()))
  (loss, terms), _ = shares(False, weights, teacher)
  batch = parts.batch()
  own = over(melt(), weights, batch, UNIFORM, loop.Every())
  base = over(melt(), teacher, batch, UNIFORM.replace(rows={BLEND: jnp.zeros(L)}), loop.Every())
  p, q = (jax.nn.log_softmax(jnp.stack([parts.logits(melt(), w, x) for x in trace.xs]))
          for w, trace in ((teacher, base), (weights, own)))
  count = batch['weights'].sum()
  kd = float(jnp.sum(jnp.sum(jnp.exp(p) * (p - q), -1).mean(0) * batch['weights']) / count)
  apart = (own.aux['attention'] - base.aux['attention']) ** 2
  aligned = float(jnp.sum(apart.mean((0, 1, 4)) * batch['weights']) / count)
  np.testing.assert_allclose([terms['kd'], terms['aligned'], loss], [kd, aligned, kd + 0.1 * aligned], rtol=1e-4)
  z, taught = (jnp.asarray(rng.standard_normal((2, 3, 4, D)), jnp.float32) for _ in range(2))
  tables = [jnp.asarray(rng.standard_normal((V, D)), jnp.float32) for _ in range(2)]
  w = jnp.asarray(rng.uniform(size=(2, 3, 4)), jnp.float32)

  def naive(z, table):
    p, q = jax.nn.log_softmax(taught @ tables[1].T), jax.nn.log_softmax(z @ table.T)
    return jnp.sum(w * jnp.sum(jnp.exp(p) * (p - q), -1))

  expected = jax.value_and_grad(naive, (0, 1))(z, tables[0])
  for chunk in (7, 512):
    close(jax.value_and_grad(lambda z, table: kl_sum(z, table, taught, tables[1], w, chunk), (0, 1))(z, tables[0]),
          expected, 1e-5)


def adam(rate: float) -> AdamW:
  return AdamW(schedule=WSD(peak=rate, end=rate), decay=0.0)


def test_a_step_of_training_leaves_the_teacher_and_gives_gates_their_own_rate():
  model, rates = melt(), {'base': 1e-4, 'gate': 1e-2}
  weights, teacher = converted(model), jax.tree.map(lambda leaf: 1.2 * leaf, converted(model))
  kept = jax.tree.map(np.array, (weights, teacher))
  optimizer = ParamGroups(of=adam(rates['base']), named=adam(rates['gate']), paths=(PATH,)).make(10,
                                                                                                 parameter_roles(model))
  step = make_step(model, phases(Transition(of=plans.Uniform(L), steps=2), **BOTH), optimizer,
                   Mesh().make(jax.devices()[:1]))
  start = jax.tree.map(jnp.copy, weights)
  state = State(step=jnp.int32(1), params=start, optimizer=optimizer.init(start))
  assert not any('there' in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
  state, values = step(state, parts.batch(), 0, {'there': teacher})
  jax.tree.map(np.testing.assert_array_equal, teacher, kept[1])
  moved = jax.tree.map(lambda new, old: np.abs(np.asarray(new) - old).max(), state.params, kept[0])
  gates = moved['cell']['core']['block']['attn'].pop('latent')
  # The first step of Adam is as long as its rate.
  np.testing.assert_allclose(jax.tree.leaves(gates), rates['gate'], rtol=1e-2)
  np.testing.assert_allclose(jax.tree.leaves(moved), rates['base'], rtol=1e-2)
  assert values['kd'] > 0


def test_groups():
  part = ParamGroups(of=adam(1.0), named=adam(2.0), paths=('a/b', 'c'))
  tree = {'a': {'b': 0.0, 'd': 0.0}, 'c': {'e': 0.0}, 'f': 0.0}
  assert part.routes(tree) == {'a': {'b': 'named', 'd': 'others'}, 'c': {'e': 'named'}, 'f': 'others'}
  with pytest.raises(ConfigError, match="optim.paths names 'a/x'"):
    dataclasses.replace(part, paths=('a/x',)).make(5, Roles()).init(tree)
  updates, _ = optax.with_extra_args_support(part.make(5, Roles())).update(
      jax.tree.map(jnp.ones_like, tree), part.make(5, Roles()).init(jax.tree.map(jnp.ones_like, tree)),
      jax.tree.map(jnp.ones_like, tree))
  close(updates, {'a': {'b': -2.0, 'd': -1.0}, 'c': {'e': -2.0}, 'f': -1.0}, 1e-6)


@pytest.mark.slow
def test_a_model_is_trained_converted_decoded_and_resumed(tmp_path):
  corpus, log = write_corpus(tmp_path / 'text'), []

  def run(name, argument, **changes):
    config = brief(config_of('melt', argument), corpus)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    configs.check(config)
    configs.save(config, tmp_path / name)
    assert configs.flatten(configs.read(tmp_path / name)) == configs.flatten(config)
    return train(config, tmp_path / name, log.append), config

  base, _ = run('base', 'cpu')
  started = f'base={tmp_path / "base"}'
  run('transition', f'cpu,phase=transition,{started}')
  assert sum('11 of 13 parameters start from step 4' in line for line in log) == 1
  assert f'the teacher of {tmp_path / "base"} is as it was at step 4' in log
  with compiled_once():
    end, config = run('distill', f'cpu,phase=distill,{started},start={tmp_path / "transition"}')
    assert any('13 of 13 parameters start from step 4' in line for line in log)
    (tmp_path / 'distill/checkpoints/4').rename(tmp_path / 'last')
    again = train(config, tmp_path / 'distill', log.append)
  jax.tree.map(np.testing.assert_array_equal, end.params, again.params)
  model, params, tokenizer, _ = loopformer.load(tmp_path / 'distill')
  texts = loopformer.generate(model, params, tokenizer, ['ab', 'ab'], max_new_tokens=3, temperature=0)
  assert texts[0] == texts[1]
  theirs = loopformer.load(tmp_path / 'base')[1]
  taught = OwnWithAttention(folder=str(tmp_path / 'base')).model(model)
  batch = parts.batch(length=30)
  close(told(taught, theirs, batch, plans.Uniform(3)(None)), told(model, converted(model, theirs), batch, Apart(
      of=plans.Uniform(3))(None)), 1e-5)
  fresh = jax.jit(lambda: init_params(model, jax.random.key(0)))()
  own = config.model.clone(memory=Latest(chunk=config.task.length))
  text = jax.random.randint(jax.random.key(0), (2, 20), 0, 256)
  closed = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.full_like(leaf, -1e9) if path[-1].key == 'bias' else leaf, converted(model, theirs))
  assert jax.tree.structure(fresh) == jax.tree.structure(closed)
  close(loopformer.logits(own, closed, text), loopformer.logits(loopformer.load(tmp_path / 'base')[0], theirs, text),
        1e-5)


# The teacher as it was trained ---------------------------------------------------------------------------------------


def saved(folder, model) -> str:
  """A work folder of a model, with the parameters of the tests."""
  loopformer.Loaded(model, parts.params(model), None, dataclasses.replace(CONFIG, model=model)).save(folder)
  return str(folder)


@functools.partial(jax.jit, static_argnums=0)
def told(model, weights, batch, plan):
  """What a teacher tells: its states, what they answer, and what its attention gave."""
  trace = run_batch(model, weights, batch, plan, keep=loop.Every())
  readout = make_readout(model, weights, batch)
  return trace.xs, readout.logits(readout.read(trace.xs)), trace.aux['attention']


@pytest.mark.parametrize('plan', [UNIFORM, padded(3)], ids=['all', 'skipped'])
def test_a_teacher_of_its_own_make_is_the_converted_model_with_rows_of_every_loop(plan):
  """On a packed, ragged, padded batch; its parameters are those of the model that it stands around."""
  model, batch, taught = melt(), parts.batch(), OURO.clone(cell=WithAttention(OURO.cell))
  assert parts.shapes(taught) == parts.shapes(OURO) and parameter_roles(taught) == parameter_roles(OURO)
  theirs = told(model, converted(model), batch, plan.replace(rows={BLEND: jnp.zeros(L)}))
  close(told(taught, parts.params(OURO), batch, plan), theirs, 1e-5)
  assert theirs[2].shape == (L, N, *batch['tokens'].shape, D) and np.abs(theirs[2][:3]).min((0, 2, 3, 4)).max() > 0
  trace = over(taught, parts.params(OURO), batch, plan)
  np.testing.assert_array_equal(trace.aux['halt'], over(OURO, parts.params(OURO), batch, plan).aux['halt'])


def test_what_attention_gives_is_told_once():
  """Around a cell that tells it, also with another between them, it is told as it is."""
  batch = parts.batch()
  for cell in (WithAttention(WithAttention(OURO.cell)), WithAttention(Damped(WithAttention(OURO.cell)))):
    taught = OURO.clone(cell=cell)
    found = jax.eval_shape(lambda weights, taught=taught: over(taught, weights, batch, UNIFORM).aux, parts.shapes(OURO))
    assert found['attention'].shape == (L, N, *batch['tokens'].shape, D)


CHAINED = parts.looped(Plain(Stack(Chain((parts.block(RMSNorm()), parts.sandwich())), 2)))
ORDERED = ROWS['ordered'].model


@pytest.mark.parametrize('model, order', [
    (CHAINED, [('blocks_0', 0), ('blocks_1', 0), ('blocks_0', 1), ('blocks_1', 1)]),
    (ORDERED, [('', layer) for layer in range(5)])], ids=['chain', 'ordered'])
@pytest.mark.parametrize('unrolled, remat',
                         [(False, loop.KeepAll()), (False, loop.PerLayer()), (True, loop.PerLayer())],
                         ids=['scanned', 'per_layer', 'unrolled'])
def test_layers_are_told_in_the_order_in_which_they_run(model, order, unrolled, remat, monkeypatch):
  """Against what Linen sees of the calls of attention, where layers are scanned."""
  weights, plan = parts.params(model), plans.Uniform(1)(None)
  _, seen = model.apply({'params': weights}, tokens(2), plan, mutable=['intermediates'],
                        capture_intermediates=lambda module, _: module.name == 'attn')
  block = seen['intermediates']['cell']['core']['block']
  expected = jnp.stack([(block[name] if name else block)['attn']['__call__'][0][0][0][layer] for name, layer in order])
  monkeypatch.setattr(stacks, 'unrolls', lambda layers: unrolled)
  trace = model.clone(cell=WithAttention(model.cell), remat=remat).apply({'params': weights}, tokens(2), plan)
  close(trace.aux['attention'][0], expected, 1e-5)


def test_one_learns_from_it_what_one_learned_from_the_converted_model(tmp_path):
  """Loss, terms and gradients; none reaches the teacher."""
  folder, weights = saved(tmp_path / 'base', OURO), converted(melt())
  teacher = Rollout(plans.Uniform(L), keep=loop.Every(), weights_of=OwnWithAttention(folder=folder))
  objective, batch = phases(plans.Uniform(L), teacher, **BOTH), parts.batch()
  (name, part), = objective.teachers.items()
  assert part == teacher.weights_of and name != Own(folder=folder).name
  context = parts.plan_context(jax.random.key(0), batch)

  def loss(weights, theirs):
    return objective(melt(), weights, context, objective.denominators(batch), {name: theirs})

  values, (grads, taught) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, parts.params(OURO))
  theirs, (expected, _) = shares(False, weights, weights)
  close((values, grads), (theirs, expected), 1e-5)
  assert values[1]['aligned'] > 1e-3 and not any(leaf.any() for leaf in jax.tree.leaves(taught))
  assert objective.flops(melt(), 8) == 3 * melt().flops(8, L) + OURO.flops(8, L)
  config = dataclasses.replace(CONFIG, model=melt(), objective=objective)
  configs.check(config)
  configs.save(config, tmp_path / 'run')
  assert configs.read(tmp_path / 'run').objective == objective


def test_teachers_that_cannot_tell_are_refused(tmp_path):
  """Each in one line, which names the folder where there is one to change."""
  def refused(match, model=None, part=OwnWithAttention, folder=None):
    folder = folder or saved(tmp_path / str(len(list(tmp_path.iterdir()))), model)
    objective = phases(plans.Uniform(L), Rollout(plans.Uniform(L), loop.Every(), part(folder=folder)), **BOTH)
    with pytest.raises(ConfigError, match=match) as error:
      configs.check(dataclasses.replace(CONFIG, model=melt(), objective=objective))
      (name, teacher), = objective.teachers.items()
      batch = parts.batch()
      jax.eval_shape(lambda weights, theirs: objective(melt(), weights, parts.plan_context(
          jax.random.key(0), batch), objective.denominators(batch), {name: theirs}), parts.shapes(melt()), parts.shapes(
              teacher.model(melt())))
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300

  missing = str(tmp_path / 'nobody')
  refused(f'{re.escape(missing)}.*no config.json in it', folder=missing)
  refused(r'weights_of = .*: model\.cell\.of = Gated: its loops run together', melt())
  refused("gives .*'teacher' .*of as many layers", OURO.clone(cell=Halting(Normed(Stack(OURO.cell.core.block, N + 1),
                                                                               RMSNorm(1e-6)))))
  refused("'teacher' does not tell .*OwnWithAttention", OURO, Own)
  linear = config_of('linear_icl', '').model
  with pytest.raises(ConfigError, match='model.cell.of: 0 of its 1 layers tell'):
    jax.eval_shape(lambda weights: linear.clone(cell=WithAttention(linear.cell)).apply(
        {'params': weights}, linear.read_in.example(), UNIFORM), parts.shapes(linear))


def test_a_plain_pass_holds_nothing_of_it():
  def text(model):
    return jax.jit(lambda weights: model.apply({'params': weights}, tokens(3), UNIFORM).aux).lower(
        parts.params(OURO)).as_text()

  shape = f'{L}x{N}x3x{T}x{D}x'
  assert shape in text(OURO.clone(cell=WithAttention(OURO.cell))) and shape not in text(OURO)


# Refusals ------------------------------------------------------------------------------------------------------------


def test_what_is_not_defined_is_refused():
  model = melt()

  def run(model=model, plan=UNIFORM, **options):
    jax.eval_shape(lambda w: model.apply({'params': w}, tokens(2), plan, **options), parts.shapes(melt()))

  with pytest.raises(ConfigError, match=r'model\.memory = PerLoop.*use papers\.melt\.cell\.Latest'):
    run(model.clone(memory=memories.PerLoop()))
  with pytest.raises(ConfigError, match='plan.no_grad_steps'):
    run(plan=UNIFORM.replace(no_grad_steps=jnp.int32(2)))
  with pytest.raises(ConfigError, match='plan: rows of loops.*decode without'):
    run(plan=UNIFORM.replace(rows={BLEND: jnp.zeros(L)}), kv=model.cache(2, T))
  with pytest.raises(ConfigError, match='with a cache no states'):
    run(kv=model.cache(2, T), keep=loop.Every())
  with pytest.raises(ConfigError, match='exit: model.cell = Gated.*not defined'):
    exits.check(model, exits.Adaptive(rule=exits.KL(threshold=0.1)), 'exit')
  with pytest.raises(ConfigError, match='use SelfAttention elsewhere'):
    parts.shapes(parts.looped(parts.plain(), prelude=model.cell.core, read_in=parts.nowhere()))
  with pytest.raises(ConfigError, match='block.attn = SelfAttention shares no rows'):
    Gated(OURO.cell.core).check(D)
  melt().cell.check(D)
  with pytest.raises(ConfigError, match=r'memory\.chunk = 0'):
    Latest(chunk=0)
  for cell in (parts.plain(1), Routed(parts.stack(1))):  # with a cache, which the latter always has
    other = parts.looped(cell, memory=Latest(chunk=1))
    with pytest.raises(ConfigError, match=r'model\.memory = Latest\(chunk=1\): .*read by the cell Gated alone'):
      jax.eval_shape(lambda weights, other=other: other.apply({'params': weights}, tokens(1), plans.Uniform(2)(None),
                                                              kv=other.cache(1, T)).z, parts.shapes(other))
  with pytest.raises(ConfigError, match=r'Transition\.steps = 1'):
    Transition(of=plans.Uniform(2), steps=1)
  for argument, message in (('phase=transition', 'base = .*needs'), ('base=x', 'starts from no other'),
                            ('phase=transition,base=x,start=y', 'start = .*starts from no'), ('phase=x', 'phase')):
    with pytest.raises(ConfigError, match=message):
      paper.get_config(argument)


@pytest.mark.parametrize('term', [Distill(roll='all', teacher='teacher'), Aligned(roll='all', teacher='teacher')],
                         ids=['Distill', 'Aligned'])
def test_rollouts_that_do_not_tell_enough_are_refused(term):
  def trace(steps, aux=None):
    xs = steps and jnp.zeros((steps, 2, T, D))
    return Trace(x=None, z=None, xs=xs, aux=aux or {}, kv=None, steps=None)

  readout, batch = Readout(table=jnp.zeros((V, D)), read=lambda x: x), parts.batch(2)
  with pytest.raises(ConfigError, match="the rollout 'all' (keeps no states|does not tell)"):
    term({'all': trace(None), 'teacher': trace(None)}, batch, readout, None)
  given = {steps: {'attention': jnp.zeros((steps, N, 2, T, D))} for steps in (2, 3)}
  with pytest.raises(ConfigError, match='the same steps'):
    term({'all': trace(2, given[2]), 'teacher': trace(3, given[3])}, batch, readout, None)
