"""LoopUS: the gate, random supervision, the term against its definition, and a decoder that is cut anew."""
import dataclasses
import functools
import json
import re

from flax.traverse_util import unflatten_dict
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import loopus
import loopformer
from loopformer import config as configs, loop, objective, plans
from loopformer.api import Loaded
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Plain
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.inference import exits
from loopformer.nn.embed import Head
from loopformer.nn.layers import Normal
from loopformer.nn.low_rank import LowRank
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.loopus.cell import Rising, Selective, Share, StepSizes, between
from loopformer.papers.loopus.split import cut, layers, profile, sections, split
from loopformer.papers.loopus.terms import Supervision
from loopformer.tasks.imported import Imported
from loopformer.terms.cross_entropy import CE
from loopformer.training import sections as stacks
from loopformer.training.train import train
from loopformer.types import ConfigError, PlanContext
from tests import parts
from tests.data.test_data import write_corpus
from tests.parts import ROWS, D, T, V, close, forward, params, tokens

MODEL = parts.looped(ROWS['loopus'].model.cell.clone(of=Selective(parts.plain(1))), prelude=parts.stack(1),
                     coda=parts.stack(1), read_out=Head(outputs=V), read_in=parts.nowhere())
BATCH = parts.batch()
REAL = st.floats(-1e3, 1e3, width=32)


def context(batch=BATCH, seed=0):
  return PlanContext(key=jax.random.key(seed), step=jnp.int32(0), stage=jnp.int32(0), batch=batch)


def deep(loops, graded, **options):
  return Objective(rolls={'deep': Rollout(plans.RandomSupervision(loops=loops, graded=graded), keep=loop.Pairs())},
                   terms={'deep': Weighted(1.0, Supervision(roll='deep', **options))})


OF = deep(6, 2)


@functools.cache
def learned(loops=6):
  """The compiled (loss, gradient) of the small model, two steps of which are supervised."""
  of = deep(loops, 2)

  def learn(weights, context):
    return jax.value_and_grad(lambda p: of(MODEL, p, context, of.denominators(context.batch))[0])(weights)

  return jax.jit(learn).lower(params(MODEL), context()).compile()


# The gate ------------------------------------------------------------------------------------------------------------


@hypothesis.given(st.lists(st.tuples(REAL, REAL, st.floats(0, 1, width=32)), min_size=1, max_size=20))
@hypothesis.settings(deadline=None)
def test_a_state_ends_between_the_old_and_the_new_one(rows):
  x, new, share = np.array(rows, np.float32).T
  found = between(x, new, share)
  assert ((np.minimum(x, new) <= found) & (found <= np.maximum(x, new))).all()
  np.testing.assert_array_equal(between(x, x, share), x)
  np.testing.assert_array_equal(between(x, new, np.float32(1)), new)
  np.testing.assert_array_equal(between(x, new, np.float32(0)), x)
  np.testing.assert_allclose(found, x.astype(float) + share * (new.astype(float) - x), atol=1e-3)


def test_the_share_is_the_papers_formula():
  x, new = jax.random.normal(jax.random.key(0), (2, 3, 5, 40))
  module = Share()
  weights = jax.tree.map(lambda leaf: leaf + 0.1, module.init(jax.random.key(1), x, new))
  w = jax.tree.map(np.asarray, weights['params'])
  assert w['down']['kernel'].shape == (40, 3) and w['up']['kernel'].shape == (3, 40)  # rank ceil(40 / 16)
  delta = np.log1p(np.exp((new - x) @ w['down']['kernel'] @ w['up']['kernel'] + w['up']['bias']))
  alpha = module.apply(weights, x, new)
  np.testing.assert_allclose(alpha, np.exp(delta * -np.exp(w['rates'])), rtol=2e-5)
  assert (alpha > 0).all() and (alpha < 1).all()
  huge = module.apply(weights, x, 1e4 * new)
  assert np.isfinite(huge).all() and (huge >= 0).all() and (huge <= 1).all()


@pytest.mark.parametrize('width, mean', [(64, 0.66), (256, 0.40), (2048, 0.10)])
def test_many_channels_hardly_move_at_first_as_released_and_all_do_with_the_other_start(width, mean):
  """The figures of the sheet, section 2."""
  x = jnp.zeros((1, 1, width))
  means = []
  for rates in (Rising(), Normal(0.0)):
    module = Share(rates=rates)
    drawn = jnp.stack([module.apply(module.init(jax.random.key(seed), x, x), x, x) for seed in range(8)])
    means.append(float(drawn.mean()))
  assert abs(means[0] - mean) < 0.03
  assert means[1] > 0.95 and float(drawn.min()) > 0.9 and float(drawn.max()) < 1
  assert (StepSizes()(jax.random.key(0), (1000,)) < np.log(np.expm1(0.1)) + 1e-3).all()


def test_an_open_gate_gives_the_decoder_bit_for_bit():
  """alpha = 1 and one loop: the decoder itself, and with more loops the ungated loop."""
  plain = MODEL.clone(cell=Plain(MODEL.cell.of.of.core))
  weights = params(MODEL)
  open_ = {**weights, 'cell': {**weights['cell'], 'share': {**weights['cell']['share'],
                                                           'rates': jnp.full(D, -jnp.inf)}}}
  own = {**weights, 'cell': {'core': weights['cell']['core']}}
  for loops in (1, 3):
    plan = plans.schedule((1 / loops,) * loops, 3)
    one, two = forward(MODEL, open_, tokens(), plan), forward(plain, own, tokens(), plan)
    np.testing.assert_array_equal(one.z, two.z)
  shut = {**weights, 'cell': {**weights['cell'], 'share': {**weights['cell']['share'], 'rates': jnp.full(D, 50.0)}}}
  start = forward(MODEL, shut, tokens(), plan).x
  np.testing.assert_array_equal(start, forward(MODEL, shut, tokens(), plans.schedule((1.0,), 3)).x)


def test_texts_that_stop_early_are_decoded_as_they_are_scored():
  """Token by token with caches, some of whose loops are never reached, against one pass: where the released code fails.
  """
  text, plan, weights = tokens(3), plans.Uniform(4)(None), params(MODEL)
  own = jnp.float32(jax.nn.sigmoid(jnp.median(forward(MODEL, weights, text, plan).aux['halt'])))
  policy = exits.Adaptive(rule=exits.Confident(threshold=float(own)), fill=exits.Recompute())

  @jax.jit
  def adapt(text, pos, kv):
    return MODEL.apply({'params': weights}, text, plan, policy.static, own, pos, kv=kv, method='adapt')

  whole = adapt(text, jnp.broadcast_to(jnp.arange(T), text.shape), None)
  assert 1 <= whole.steps.min() < whole.steps.max() == 4
  kv, pieces = MODEL.cache(len(text), T, 4), []
  for place in range(T):
    pieces.append(adapt(text[:, place:place + 1], jnp.full((len(text), 1), place), kv))
    kv = pieces[-1].kv
  np.testing.assert_array_equal(jnp.concatenate([piece.steps for piece in pieces], 1), whole.steps)
  close(jnp.concatenate([piece.z for piece in pieces], 1), whole.z, 1e-5)
  for threshold, steps in ((0.0, 1), (1.0, 4)):
    ran = exits.Adaptive(rule=exits.Confident(threshold=threshold)).run(
        MODEL, weights, {'tokens': text}, plan, threshold)[0]
    np.testing.assert_array_equal(ran.steps, steps)


# Random supervision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('loops, graded', [(1, 1), (6, 2), (7, 7), (20, 5)])
def test_a_plan_takes_as_many_different_steps(loops, graded):
  plan = plans.RandomSupervision(loops=loops, graded=graded)
  drawn = jax.vmap(lambda key: plan(context().replace(key=key)))(jax.random.split(jax.random.key(0), 2000))
  at = np.cumsum(np.asarray(drawn.no_grad_steps)[..., 0] + 1, 1) - 1
  assert (at[:, 1:] > at[:, :-1]).all() and at.min() >= 0 and at.max() <= loops - 1
  share = np.bincount(at.ravel(), minlength=loops) / len(at)
  np.testing.assert_allclose(share, graded / loops, atol=0.06)
  assert abs((at[:, -1] + 1).mean() - plan.expected) < 0.15 and plan.differentiated == plan.longest == graded


def test_what_is_kept_are_the_states_around_the_steps_that_were_drawn():
  gaps = jnp.array([[2], [0], [1]])
  plan = dataclasses.replace(plans.schedule((1 / 3,) * 3), no_grad_steps=gaps)
  trace = forward(MODEL, params(MODEL), tokens(), plan, keep=loop.Pairs())
  every = forward(MODEL, params(MODEL), tokens(), plans.schedule((1 / 6,) * 6), keep=loop.Every())
  assert trace.xs.shape == (3, 2, *every.xs.shape[1:]) and int(trace.steps) == 6
  for row, step in enumerate((2, 3, 5)):
    close(tuple(trace.xs[row]), (every.xs[step - 1], every.xs[step]), 1e-5)
    close(trace.aux['halt'][row], every.aux['halt'][step], 1e-5)
  np.testing.assert_array_equal(trace.x, trace.xs[-1, 1])


def test_steps_know_their_number():
  """Of a step without gradient too: sets of low rank by the loop give what they give with all steps written down."""
  block = MODEL.cell.of.of.core.block
  block = block.clone(mlp=block.mlp.clone(linear=LowRank(rank=2, loops=6)))
  model = parts.looped(Plain(MODEL.cell.of.of.core.clone(block=block)), loops=6)
  plan = dataclasses.replace(plans.schedule((0.5, 0.5)), no_grad_steps=jnp.array([[1], [2]]))
  found = forward(model, params(model), tokens(), plan).x
  close(found, forward(model, params(model), tokens(), plans.schedule((0.2,) * 5)).x, 1e-6)


@pytest.mark.parametrize('change, message', [
    (dict(graded=7), 'RandomSupervision.graded = 7: of 6 loops, at least one is supervised; .* 1 to 6'),
    (dict(graded=0), 'RandomSupervision.graded = 0'), (dict(loops=0), 'RandomSupervision.loops = 0'),
    (dict(loops=2.5), 'RandomSupervision.loops = 2.5')])
def test_plans_that_are_refused(change, message):
  with pytest.raises(ConfigError, match=message):
    plans.RandomSupervision(**{'loops': 6, 'graded': 2, **change})


def test_what_cannot_run_so_is_refused_by_name():
  plan = dataclasses.replace(plans.schedule((0.5, 0.5)), no_grad_steps=jnp.array([[1], [2]]))
  with pytest.raises(ConfigError, match='no_grad_steps: these have no row'):
    forward(ROWS['loopformer'].model, params(ROWS['loopformer'].model), tokens(), plan)
  with pytest.raises(ConfigError, match='keep = Pairs'):
    forward(ROWS['plt'].model, params(ROWS['plt'].model), tokens(), plans.schedule((0.5, 0.5)), keep=loop.Pairs())
  kv = MODEL.cache(2, T, 6)
  with pytest.raises(ConfigError, match='no_grad_steps: of each sequence or step'):
    parts.extend(MODEL, params(MODEL), tokens(2), plan, jnp.broadcast_to(jnp.arange(T), (2, T)), kv)
  plain = parts.looped(parts.plain(1))
  for term, roll, message in ((Supervision(roll='a'), Rollout(plans.Uniform(2)), 'keep=loop.Pairs'),
                              (Supervision(roll='a'), Rollout(plans.Uniform(2), keep=loop.Pairs()),
                               'no gate to teach')):
    of = Objective(rolls={'a': roll}, terms={'a': Weighted(1.0, term)})
    with pytest.raises(ConfigError, match=message):
      jax.eval_shape(lambda w, of=of: of(plain, w, context(), of.denominators(BATCH)), params(plain))


# The term -------------------------------------------------------------------------------------------------------------


def texts_of(batch):
  """(row, places that are asked for) of every text."""
  for row, segments in enumerate(np.asarray(batch['segments'])):
    for start in np.flatnonzero(np.diff(segments, prepend=segments[0] - 1)):
      stop = start + np.argmax(np.append(segments[start:] != segments[start], True))
      asked = [place for place in range(start, stop) if batch['weights'][row, place] > 0]
      if asked:
        yield row, asked


def definition(trace, batch, readout, beta, confidence):
  """The term, text by text."""
  total = 0.0
  laws = np.asarray(jax.jit(lambda xs: jax.nn.log_softmax(readout.logits(jax.vmap(readout.read)(xs))))(trace.xs))
  for k, answers in enumerate(laws):
    for row, asked in texts_of(batch):
      weights = np.asarray(batch['weights'])[row, asked]
      targets = np.asarray(batch['targets'])[row, asked]
      before, after = (np.average([-logs[row, place, target] for place, target in zip(asked, targets)], weights=weights)
                       for logs in answers)
      right = np.average([int(answers[1][row, place].argmax()) == target for place, target in zip(asked, targets)],
                         weights=weights)
      gain, q = after - before, float(trace.aux['halt'][k, row, asked[-1]])
      total += weights.sum() * (after + beta * gain / (1 + np.exp(-gain))
                                + confidence * (np.log1p(np.exp(q)) - right * q))
  return total / len(trace.xs)


@jax.jit
def rollout(weights, context):
  return OF.rollouts(MODEL, weights, context)['deep']


@pytest.mark.parametrize('beta, confidence', [(1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_the_term_is_its_definition(beta, confidence):
  batch = parts.batch(weights=jnp.asarray(BATCH['weights']) * jnp.linspace(0.5, 2, T))
  weights = params(MODEL)
  trace = rollout(weights, context(batch))
  readout = objective.make_readout(MODEL, weights, batch)
  found = Supervision(roll='deep', beta=beta, confidence=confidence)({'deep': trace}, batch, readout, weights)
  np.testing.assert_allclose(found, definition(trace, batch, readout, beta, confidence), rtol=1e-5)


@pytest.mark.parametrize('active', [[[True] * 4, [False] * 4], [[True] * 4, [True, False, True, False]]],
                         ids=['all', 'some'])
def test_a_mean_over_the_steps_that_ran(active):
  """Of every sequence: one that skips the second learns from the first alone."""
  batch, weights, active = parts.batch(), params(MODEL), np.array(active)
  trace = rollout(weights, context(batch))
  readout = objective.make_readout(MODEL, weights, batch)
  term, expected = Supervision(roll='deep'), 0.0
  for row in range(4):
    own, ran = {**batch, 'weights': batch['weights'] * (jnp.arange(4) == row)[:, None]}, active[:, row]
    of = trace.replace(xs=trace.xs[ran], aux={'halt': trace.aux['halt'][ran]})
    expected += definition(of, own, readout, 1.0, 1.0)
  given = active[:, 0] if (active == active[:, :1]).all() else active
  skipping = trace.replace(plan=dataclasses.replace(trace.plan, active=jnp.asarray(given)))
  np.testing.assert_allclose(term({'deep': skipping}, batch, readout, weights), expected, rtol=1e-5)


def test_the_monotone_part_weighs_the_gradient_of_the_cross_entropy():
  """One text: grad(LM + L_mono) = (1 + SiLU'(LM - LM before)) grad LM, between 0.90 and 2.10 of it."""
  batch = {**{name: leaf[:1] for name, leaf in BATCH.items()}, 'weights': jnp.ones((1, T)),
           'segments': jnp.zeros((1, T), int)}
  weights = params(MODEL)
  trace = rollout(weights, context(batch))
  readout = objective.make_readout(MODEL, weights, batch)

  @jax.jit
  def gradient(beta):
    """Of what comes after the loop, by the last of the states, which is a constant."""
    def of(weights):
      readout = objective.make_readout(MODEL, weights, batch)
      one = trace.replace(xs=trace.xs[1:], aux={})
      return Supervision(roll='deep', beta=beta, confidence=0.0)({'deep': one}, batch, readout, weights)
    return jax.grad(of)(weights)

  before, after = (float(CE(roll='a')({'a': trace.replace(z=readout.read(x))}, batch, readout, weights)) / T
                   for x in trace.xs[1])
  factor = 1 + float(jax.grad(jax.nn.silu)(after - before))
  assert 0.90 < factor < 2.10 and abs(factor - 1.5) > 1e-3
  both, lm = gradient(1.0), gradient(0.0)
  assert np.abs(lm['coda']['block']['mlp']['up']['kernel']).max() > 1e-3
  jax.tree.map(lambda both, lm: np.testing.assert_allclose(both, factor * np.asarray(lm), rtol=1e-4, atol=1e-6), both,
               lm)


def test_what_learns():
  """Gate, loop, coda, head and confidence do; embedding and encoder do not, and every step is a step of its own: no
  gradient reaches the state that it begins with."""
  loss, grads = learned()(params(MODEL), context())
  assert np.isfinite(loss)
  still = [path for path, leaf in parts_of(grads).items() if not np.abs(leaf).max() > 0]
  assert still and all(path.startswith(('prelude/', 'read_in/')) for path in still)
  assert {path.split('/')[0] for path in still} == {'prelude', 'read_in'}

  def later(x):
    plan = dataclasses.replace(plans.schedule((0.5, 0.5)), no_grad_steps=jnp.array([[0], [0]]))
    def run(model, x):
      return loop.run(model.cell, x, x, plan, parts.context(x), None, loop.Last(), model.remat)[0]
    return jnp.sin(MODEL.apply({'params': params(MODEL)}, x, method=run)).sum()

  x = jax.random.normal(jax.random.key(0), (2, T, D))
  np.testing.assert_array_equal(jax.grad(later)(x), 0)


def test_a_batch_without_a_question_gives_nothing():
  batch = {**BATCH, 'weights': jnp.zeros_like(BATCH['weights'])}
  loss, grads = learned()(params(MODEL), context(batch))
  assert float(loss) == 0 and all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))


def test_memory_does_not_grow_with_the_loops():
  """Temporaries of the compiled gradient, of as many supervised steps."""
  used = [learned(loops).memory_analysis().temp_size_in_bytes for loops in (6, 24)]
  assert used[0] == used[1]


# Cutting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('text, found', [('0..1', range(2)), ('27..27', range(27, 28)), ('27', range(27, 28)),
                                         ('13..', range(13, 28)), ('none', range(0)), ('0..27', range(28))])
def test_layers_by_name(text, found):
  assert layers('encoder', text, 28) == found


@pytest.mark.parametrize('text',
                         ['', '..', '1..0', '28', '0..28', '-1', 'a', '1.5', '0...2', '0..2,4', '99999999999999'])
def test_layers_that_are_not_there(text):
  with pytest.raises(ConfigError, match=re.escape(f'encoder = {text!r}')):
    layers('encoder', text, 28)


@pytest.mark.parametrize('encoder, loop_, decoder, found', [
    ('0..1', '2..26', '27', (2, 1)), ('0..1', None, '27..', (2, 1)), ('none', None, 'none', (0, 0)),
    ('none', '0..', 'none', (0, 0)), ('0', None, 'none', (1, 0))])
def test_sections(encoder, loop_, decoder, found):
  assert sections(28, encoder, decoder, loop_) == found


@pytest.mark.parametrize('encoder, loop_, decoder, message', [
    ('0..3', '3..26', '27', 'layer 3 is in two sections'), ('0..20', None, '10..27', 'layer 10 is in two sections'),
    ('0..1', '3..26', '27', 'layer 2 is in no section'), ('0..1', None, '2..', 'the loop is empty'),
    ('0..1', 'none', '2..', 'the loop is empty'), ('0..1', '2..20', '25..27', 'layer 21 is in no section'),
    ('20..27', '2..19', '0..1', 'does not come in order'), ('0..30', None, '27', 'encoder = '),
    ('1..2', None, '27', 'in no section')])
def test_sections_that_do_not_fit(encoder, loop_, decoder, message):
  with pytest.raises(ConfigError, match=message):
    sections(28, encoder, decoder, loop_)


DECODER = parts.looped(parts.plain(5), loops=1)


def test_a_decoder_that_is_cut_is_the_same_decoder():
  """By the description and the parameters, whichever way it was cut before; a head of its own begins as the embedding.
  """
  whole = params(DECODER)
  expected = forward(DECODER, whole, tokens(), plans.schedule((1.0,))).z
  answers = parts.logits(DECODER, whole, expected)
  given = dict(parts_of(whole))
  for prelude, coda in ((1, 2), (0, 0), (3, 1)):
    model = cut(DECODER, prelude, coda).clone(read_out=Head(outputs=V))
    shapes = parts_of(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), parts.shapes(model)))
    given = stacks.fitted(given, shapes)
    assert given.keys() >= shapes.keys()
    weights = tree_of({path: given[path] for path in shapes})
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, parts.shapes(model))
    trace = forward(model, weights, tokens(), plans.schedule((1.0,)))
    close(trace.z, expected, 1e-6)
    close(parts.logits(model, weights, trace.z), answers, 1e-5)
  with pytest.raises(ConfigError, match='none is left for the loop'):
    cut(DECODER, 3, 2)


def parts_of(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def tree_of(flat):
  return unflatten_dict(flat, sep='/')


def test_a_profile_is_of_the_states_between_layers():
  """Against the states of the first n layers alone; and the same however the decoder is cut."""
  whole = params(DECODER)
  states = [forward(DECODER.clone(cell=Plain(parts.stack(n))), {**whole, 'cell': jax.tree.map(
      lambda leaf: leaf[:n], whole['cell'])}, BATCH['tokens'], plans.schedule((1.0,)), BATCH['segments'],
      pos=BATCH['positions']).x for n in range(1, 6)]
  e = forward(DECODER.clone(cell=Plain(parts.stack(1))), {**whole, 'cell': jax.tree.map(
      lambda leaf: leaf[:1] * 0, whole['cell'])}, BATCH['tokens'], plans.schedule((1.0,)), BATCH['segments'],
      pos=BATCH['positions']).x
  expected = []
  for before, after in zip([e, *states], states):
    cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
    expected.append(np.average(1 - cosine, weights=BATCH['weights']))
  np.testing.assert_allclose(profile(DECODER, whole, BATCH), expected, rtol=1e-3)
  model = cut(DECODER, 2, 1)
  shapes = parts_of(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), parts.shapes(model)))
  held = stacks.fitted(dict(parts_of(whole)), shapes)
  np.testing.assert_allclose(profile(model, tree_of(held), BATCH), expected, rtol=1e-3)
  for other in (MODEL, parts.looped(Plain(parts.stack(2, order=(0, 0, 1))))):
    with pytest.raises(ConfigError, match='layers are compared in a decoder'):
      profile(other, {}, BATCH)


@pytest.mark.parametrize('turned, found', [
    ([9, 8, 1, 1.1, 1, 0.9, 1, 7], (2, 1)), ([1, 1, 1, 1.1, 1, 1], (1, 1)), ([9, 1, 1, 1, 9, 9], (1, 2)),
    ([1, 9, 1, 1, 1, 1], (1, 1)), ([2, 1, 2], (1, 1))])
def test_the_rule(turned, found):
  assert split(turned) == found


def test_a_profile_of_two_layers_leaves_no_loop():
  with pytest.raises(ConfigError, match='need three'):
    split([1, 2])


@hypothesis.given(st.lists(st.floats(0, 2), min_size=3, max_size=40))
def test_the_rule_leaves_a_loop(turned):
  prelude, coda = split(turned)
  assert prelude >= 1 and coda >= 1 and prelude + coda < len(turned)


# The configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('argument, message', [
    ('arm=base', 'config argument start is missing: base of size cpu needs the work folder of arm=pretrain'),
    ('arm=pretrain,start=x', 'start = x: pretrain of size cpu does not read it'),
    ('cpu,from=x', 'from = x: pretrain of size cpu does not read it'), ('gpu', 'config argument from is missing'),
    ('gpu,from=x,encoder=0', 'config argument decoder is missing: .* layers outside the loop'),
    ('gpu,from=x,encoder=0,decoder=3,start=y', 'start = y: loopus of size gpu does not read it'),
    ('gpu,from=x,encoder=0,decoder=3,arm=pretrain', 'it makes the decoder of size cpu'), ('none', "size = 'none'"),
    ('start=x,encoder=0..1', 'encoder = 0..1: loopus of size cpu'), ('arm=none', "arm = 'none'"),
    ('text=x', 'text = x: pretrain of size cpu does not read it'),
    ('start=x,gate=open', "gate = 'open'"), ('start=x,graded=9', 'RandomSupervision.graded = 9')])
def test_arguments_that_do_not_fit(argument, message):
  with pytest.raises(ConfigError, match=message):
    loopus.get_config(argument)


STUDY = '''
import json, sys
from pathlib import Path
from experiments.studies import loopus_stages as study
from loopformer import config as configs
study.define_flags()
study.FLAGS(sys.argv)
folder = Path(study.FLAGS.workdir)
rows, left = study.measure(folder, configs.read(folder), folder, [1, 2], [0.5])
print(json.dumps(study.tables({'0': {'loopus': {'rows': rows, 'exits': left}}})))
'''


def test_a_decoder_of_a_folder_is_made_to_loop(tmp_path):
  """From a folder as an import leaves it, with a tied head: two steps; the encoder stays, gate and head learn, and a
  second start of the same command goes on."""
  model = DECODER.clone(read_in=DECODER.read_in.clone(vocab=257))
  weights = params(model)
  config = configs.Experiment(name='decoder', model=model, task=Imported(length=32), objective=Objective(
      rolls={'all': Rollout(plans.Uniform(1))}, terms={'lm': Weighted(1.0, CE(roll='all'))}))
  Loaded(model, weights, ByteTokenizer(), config).save(tmp_path / 'base')
  texts = str(tmp_path / 'text/*.jsonl')
  made = loopus.get_config(f'gpu,from={tmp_path / "base"},encoder=0..1,decoder=4,loops=4,graded=2,text={texts}')
  assert made.task.corpus.train == (texts,)
  assert made.model.prelude.depth == 2 and made.model.coda.depth == 1 and made.model.cell.core.depth == 2
  made = dataclasses.replace(
      made, task=dataclasses.replace(made.task, corpus=write_corpus(tmp_path / 'text'), length=16),
      train=dataclasses.replace(made.train, steps=2, batch=2, accumulate=1, log_every=1, eval_every=2, save_every=2,
                                eval_batches=1),
      optim=dataclasses.replace(made.optim, of=dataclasses.replace(made.optim.of, schedule=dataclasses.replace(
          made.optim.of.schedule, warmup=1))), evals=dataclasses.replace(made.evals, budgets=(1, 2)))
  configs.check(made)
  log = []
  state = train(made, tmp_path / 'run', log.append)
  assert any('its layers cut into other sections' in line for line in log)
  for path in ('prelude', 'read_in'):
    now, before = state.params[path], weights['read_in'] if path == 'read_in' else jax.tree.map(
        lambda leaf: leaf[:2], weights['cell']['core'])
    jax.tree.map(np.testing.assert_array_equal, now, before)
  moved = np.asarray(state.params['read_out']['kernel'] - weights['read_in']['embedding'])
  assert 0 < np.abs(moved).max() < 1e-3
  assert np.abs(state.params['coda']['block']['mlp']['up']['kernel'] - weights['cell']['core']['block']['mlp']['up'][
      'kernel'][4:]).max() < 1e-3
  loaded = loopformer.load(tmp_path / 'run')
  assert isinstance(loaded.model.cell, Halting) and isinstance(loaded.model.cell.of, Selective)
  assert loopformer.generate(*loaded[:3], ['abc'], budget=2, max_new_tokens=2, temperature=0)
  found = json.loads(parts.python(STUDY, f'--out={tmp_path}', '--eval_rows=2',
                                  f'--workdir={tmp_path / "run"}').splitlines()[-1])
  assert [row['loops'] for row in found[0]] == [1, 2] and found[1][0]['threshold'] == 0.5
  assert 1 <= float(found[1][0]['mean exit step'].split()[0]) <= 4
  with pytest.raises(ConfigError, match='a decoder whose layers run'):
    loopus.get_config(f'gpu,from={tmp_path / "run"},encoder=0..1,decoder=4')
