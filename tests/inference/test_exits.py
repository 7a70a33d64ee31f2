"""Exits: every rule against scan and select, edges of thresholds, rows on their own, caches."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import loop, plans
from loopformer.cells.halting import Halting
from loopformer.inference import exits, measures
from loopformer.inference.evaluate import Run, evaluate
from loopformer.types import ConfigError, Context, StepView
from tests import parts
from tests.parts import ROWS, L, T, batch, close, params, tokens

GATED = next(row.model for row in ROWS.values() if isinstance(row.model.cell, Halting))
PLAIN = ROWS['loopformer'].model
# Rule, model, thresholds of which the middle one parts the tokens of a batch.
RULES = {
    'kl': (exits.KL, PLAIN, 0.3), 'entropy_change': (exits.EntropyChange, PLAIN, 0.2),
    'entropy': (exits.Entropy, PLAIN, 3.45), 'state': (exits.StateChange, PLAIN, 0.5),
    'stable': (exits.Stable, PLAIN, 2), 'cumulative': (exits.Cumulative, GATED, 0.8),
    'confident': (exits.Confident, GATED, 0.55), 'act': (exits.ACT, GATED, 0.2)}
rules = pytest.mark.parametrize('name', list(RULES))


@functools.partial(jax.jit, static_argnums=(0, 3))
def adapt(model, weights, text, exit_policy, threshold, plan, seg=None):
  return model.apply({'params': weights}, text, plan, exit_policy, threshold, None, seg, method='adapt')


def run(name, threshold=None, text=None, **options):
  make, model, middle = RULES[name]
  exit_policy = exits.Adaptive(rule=make(threshold=middle if threshold is None else threshold), **options)
  text = tokens() if text is None else text
  return adapt(model, params(model), text, exit_policy.static, jnp.float32(exit_policy.threshold),
               plans.Uniform(L)(None))


def one_by_one(name, threshold):
  """The rule in NumPy, in a loop over steps in which tokens that have left keep their state: (steps, answers)."""
  _, model, _ = RULES[name]
  weights, text, plan = params(model), tokens(), plans.Uniform(L)(None)
  bound = model.bind({'params': weights})
  ctx = parts.context(bound.read_in(text, jnp.broadcast_to(jnp.arange(T), text.shape)))
  ctx = ctx.replace(tokens=text)
  e = bound.read_in(text, ctx.pos)
  x = bound.start(e, ctx)
  precomputed = bound.precompute(plan)
  shape = text.shape
  active, steps = np.ones(shape, bool), np.zeros(shape, int)
  log_p, best, same = np.full((*shape, model.outputs), -np.log(model.outputs)), np.full(shape, -1), np.zeros(shape, int)
  stay, total, mixed, answer = np.ones(shape), np.zeros(shape), np.zeros(x.shape), np.asarray(x, np.float64)
  for k in range(L):
    row = loop.Step(t=plan.t[k], dt=plan.dt[k], active=None, k=jnp.int32(k),
                    precomputed=jax.tree.map(lambda leaf: leaf[k], precomputed))
    new, _, aux = bound.step(x, e, ctx.replace(step=row), None)
    new = np.where(active[..., None], new, x)
    after = np.asarray(jax.nn.log_softmax(bound.logits(bound.read(jnp.asarray(new), text))), np.float64)
    halt = 1 / (1 + np.exp(-np.asarray(aux.get('halt', np.zeros(shape)), np.float64)))
    entropies = [-(np.exp(law) * law).sum(-1) for law in (log_p, after)]
    same = np.where(after.argmax(-1) == best, same + 1, 1)
    best = after.argmax(-1)
    stay = stay * (1 - halt)
    found = new
    if name == 'act':
      done = (total + halt >= 1 - threshold) | (k == L - 1)
      weight = np.where(done, 1 - total, halt)
      mixed, total = mixed + weight[..., None] * new, total + weight
      found = mixed
    else:
      done = {'kl': (np.exp(log_p) * (log_p - after)).sum(-1) < threshold,
              'entropy_change': np.abs(entropies[1] - entropies[0]) < threshold, 'entropy': entropies[1] < threshold,
              'state': np.linalg.norm(new - x, axis=-1) < threshold * np.linalg.norm(new, axis=-1),
              'stable': same >= threshold, 'cumulative': 1 - stay >= threshold, 'confident': halt >= threshold}[name]
    answer = np.where(active[..., None], found, answer)
    steps += active
    x, log_p, active = jnp.asarray(new), after, active & ~done
  return steps, answer


@rules
def test_a_rule_equals_its_definition(name):
  steps, answer = one_by_one(name, RULES[name][2])
  trace = run(name)
  assert len(np.unique(steps)) > 1, 'the threshold must part the tokens, or this tests nothing'
  np.testing.assert_array_equal(trace.steps, steps)
  close(trace.x, answer, 1e-5)
  assert int(trace.aux['ran']) == steps.max()


@rules
def test_what_a_sequence_does_not_depend_on_the_others(name):
  together = run(name)
  for row in (0, 3):
    alone = run(name, text=tokens()[row:row + 1])
    np.testing.assert_array_equal(alone.steps[0], together.steps[row])
    close(alone.z[0], together.z[row], 1e-5)


@pytest.mark.parametrize('name, never, at_once', [
    ('kl', 0, 1e9), ('entropy_change', 0, 1e9), ('entropy', 0, 1e9), ('state', 0, 1e9), ('stable', L + 1, 1),
    ('cumulative', 1, 0), ('confident', 1, 0), ('act', 0, 1)])
def test_the_ends_of_the_dial(name, never, at_once):
  """Never: the answers of all loops, every one run; at once: those of the first, and nothing else is run."""
  make, model, _ = RULES[name]
  assert (run(name, at_once).steps == 1).all() and int(run(name, at_once).aux['ran']) == 1
  assert (run(name, at_once, least=3).steps == 3).all()
  if name != 'act':
    trace = run(name, never)
    assert (trace.steps == L).all() and int(trace.aux['ran']) == L
    close(trace.z, parts.forward(model, params(model), tokens(), plans.Uniform(L)(None)).z, 1e-5)


@pytest.mark.parametrize('name', ['kl', 'state', 'entropy', 'cumulative', 'stable'])
def test_a_looser_dial_never_takes_longer_at_the_first_token(name):
  """The first token reads nobody else's state, so its steps are monotone; one program serves all thresholds."""
  dials = {'cumulative': np.linspace(1, 0, 9), 'stable': np.arange(L + 1, 0, -1)}.get(name, np.geomspace(1e-3, 10, 9))
  run(name)
  before = adapt._cache_size()
  steps = np.stack([np.asarray(run(name, float(threshold)).steps)[:, 0] for threshold in dials])
  assert (np.diff(steps, axis=0) <= 0).all() and steps[0].mean() > steps[-1].mean()
  assert adapt._cache_size() == before


def test_act_weights_sum_to_one():
  """Equal states make the answer that state, whatever the gates say, also where the plan ends first."""
  rule, x = exits.ACT(threshold=0.0), jnp.ones((2, 3, 4))
  for logit in (-50.0, -1.0, 0.3, 50.0):
    state, k, done = rule.init(None, 0 * x, None), 0, jnp.zeros(())
    while not done.all():
      seen = StepView(k=k, last=jnp.array(k == 3), old=x, new=x, aux={'halt': jnp.full((2, 3), logit)}, logits=None)
      state, done, answer = rule.update(state, seen, 0.0)
      k += 1
    assert k <= 4
    np.testing.assert_allclose(answer, x, atol=1e-6)


def test_sampled_leaves_with_the_probability_of_the_gate():
  rule, shape = exits.Sampled(seed=1), (64, 512)
  pos = jnp.broadcast_to(jnp.arange(shape[1]), shape)
  ctx = Context(pos=pos, keys=jax.random.split(jax.random.key(3), shape[0]))
  x = jnp.zeros((*shape, 1))
  state, left = rule.init(None, x, ctx), np.zeros(shape, bool)
  for k, lam in enumerate((0.2, 0.5, 0.9)):
    aux = {'halt': jnp.full(shape, np.log(lam / (1 - lam)))}
    state, done, _ = rule.update(state, StepView(k=k, last=jnp.array(False), old=x, new=x, aux=aux, logits=None), None)
    newly = np.asarray(done)[~left].mean()
    assert newly == pytest.approx(lam, abs=0.02)
    left |= np.asarray(done)


# With a cache --------------------------------------------------------------------------------------------------------


def test_recompute_takes_no_rule_that_reads_answers_through_a_coda():
  """The coda's cache has what earlier tokens gave when they left: steps differed from those of the pass without a
  cache.
  """
  model, pos = ROWS['prelude_coda'].model, jnp.zeros((2, 1), jnp.int32)

  def decode(rule, model=model, **options):
    exit_policy = exits.Adaptive(rule=rule, **options)
    return jax.eval_shape(lambda: extend(model, params(model), tokens(2, 1), exit_policy.static, jnp.float32(1.0),
                                         plans.Uniform(L)(None), pos, model.cache(2, T)).steps)

  with pytest.raises(ConfigError,
                     match=r'exit\.fill = Recompute\(\): its rule reads answers through a coda.*fill=Copy\(\)'):
    decode(exits.KL(), fill=exits.Recompute())
  for rule, options in ((exits.StateChange(), {'fill': exits.Recompute()}), (exits.KL(), {})):
    assert decode(rule, **options).shape == (2, 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def extend(model, weights, text, exit_policy, threshold, plan, pos, kv):
  return model.apply({'params': weights}, text, plan, exit_policy, threshold, pos, kv=kv, method='adapt')


@pytest.mark.parametrize('prompt', [1, 4])
@pytest.mark.parametrize('name', ['kl', 'state', 'cumulative', 'act', 'stable'])
def test_recompute_decodes_what_the_pass_without_cache_computes(name, prompt):
  make, model, middle = RULES[name]
  exit_policy = exits.Adaptive(rule=make(threshold=middle), fill=exits.Recompute())
  text, plan, threshold = tokens(), plans.Uniform(L)(None), jnp.float32(middle)
  whole = run(name)
  kv, zs, steps = model.cache(len(text), T + 2), [], []
  for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, T))]:
    pos = jnp.broadcast_to(jnp.arange(start, stop), (len(text), stop - start))
    trace = extend(model, params(model), text[:, start:stop], exit_policy.static, threshold, plan, pos, kv)
    kv = trace.kv
    zs.append(trace.z), steps.append(trace.steps)
  np.testing.assert_array_equal(jnp.concatenate(steps, 1), whole.steps)
  close(jnp.concatenate(zs, 1), whole.z, 1e-5)


def copied(name, threshold):
  """z [B, T, D] and steps by decoding token by token; slots of steps not taken are copies."""
  make, model, _ = RULES[name]
  exit_policy, text = exits.Adaptive(rule=make(threshold=threshold)), tokens()
  kv, zs, steps = model.cache(len(text), T + 2), [], []
  for i in range(T):
    trace = extend(model, params(model), text[:, i:i + 1], exit_policy.static, jnp.float32(threshold),
                   plans.Uniform(L)(None),
                   jnp.full((len(text), 1), i), kv)
    kv = trace.kv
    zs.append(trace.z), steps.append(trace.steps)
  return jnp.concatenate(zs, 1), jnp.concatenate(steps, 1), kv


def test_copy_saves_steps_and_leaves_no_hole():
  z, steps, kv = copied('kl', RULES['kl'][2])
  assert 1 < steps.mean() < L and np.isfinite(z).all()
  np.testing.assert_array_equal(kv['loop'].pos[:, :, :T], np.broadcast_to(np.arange(T), (L, len(z), T)))
  last = np.asarray(steps) - 1
  k = np.asarray(kv['loop'].k)  # [slots, N, B, G, S, d]
  for row in range(len(z)):
    for i in range(T):
      for slot in range(last[row, i], L):
        np.testing.assert_array_equal(k[slot, :, row, :, i], k[last[row, i], :, row, :, i])
  assert np.abs(np.asarray(run('kl').z) - np.asarray(z)).max() > 1e-3  # it is an approximation, and no more


def test_copy_of_all_steps_is_exact():
  z, steps, _ = copied('kl', 0.0)
  assert (steps == L).all()
  close(z, run('kl', 0.0).z, 1e-5)


def test_the_last_state_answers_after_the_free_steps_and_those_of_the_plan():
  model, made = ROWS['base_loop'].model, batch(3)
  plan = plans.Uniform(2)(None).replace(active=jnp.array([[True, True, True], [True, False, True]]))
  plan = plan.replace(no_grad_steps=jnp.array([0, 1, 2]))
  run_ = jax.jit(lambda weights: exits.Final().run(model, weights, made, plan, None)[0])
  trace = run_(params(model))
  np.testing.assert_array_equal(trace.steps, [2, 2, 4])
  assert int(trace.aux['ran']) == 4
  close(trace.z, parts.over(model, params(model), made, plan).z, 1e-6)


def test_evaluation_reports_steps_taken_and_run():
  runs = {str(t): Run(plan=plans.Uniform(L), exit=exits.Adaptive(rule=exits.KL(threshold=t))) for t in (0.0, 0.3, 1e9)}
  rows = evaluate(PLAIN, params(PLAIN), [batch(4), batch(4, seed=1)], {**runs, str(L): plans.resolve(L)},
                  np.ones(parts.V, np.int32), measures.Tokens())
  assert [rows[0]['budget'], rows[0]['ran'], rows[2]['budget'], rows[2]['ran']] == [L, L, 1, 1]
  assert 1 < rows[1]['budget'] < rows[1]['ran'] <= L
  assert rows[0]['loss'] == pytest.approx(rows[3]['loss'], rel=1e-5) != pytest.approx(rows[2]['loss'], rel=1e-3)


# What a model cannot serve --------------------------------------------------------------------------------------------

NUMBER = parts.looped(parts.plain(), read_out=parts.Head(outputs=1))


@pytest.mark.parametrize('name', list(RULES))
@pytest.mark.parametrize('model, message', [(GATED, None), (PLAIN, 'gate'), (NUMBER, 'gate|1 output')],
                         ids=['gated', 'plain', 'number'])
def test_rules_are_refused_where_a_model_lacks_what_they_read(name, model, message):
  exit_policy = exits.Adaptive(rule=RULES[name][0](threshold=RULES[name][2]))
  gated, laws = name in ('cumulative', 'confident', 'act'), name in ('kl', 'entropy_change', 'entropy', 'stable')
  if (gated and model is not GATED) or (laws and model is NUMBER):
    with pytest.raises(ConfigError, match=rf'--exits={name}: exit\.rule: .*({message}).*take a rule'):
      exits.check(model, exit_policy, f'--exits={name}')
  else:
    exits.check(model, exit_policy, f'--exits={name}')


def test_a_check_computes_nothing():
  """Of a model of 64 GB."""
  model = PLAIN.clone(read_in=PLAIN.read_in.clone(vocab=2 ** 30))
  exits.check(model, exits.Adaptive(rule=exits.StateChange()), '')
  with pytest.raises(ConfigError, match='no gate'):
    exits.check(model, exits.Adaptive(rule=exits.Sampled()), '')


@pytest.mark.parametrize('exit_policy', [exits.Final(), exits.Confidence(least=2)], ids=repr)
def test_exits_of_whole_plans_do_not_decide_token_by_token(exit_policy):
  with pytest.raises(ConfigError, match=rf"exit = {re.escape(str(exit_policy))}: .*whole plan.*use exits\.Adaptive"):
    exits.check(PLAIN, exit_policy, 'exit')


@pytest.mark.parametrize('make, message', [
    (lambda: exits.KL(threshold=-1.0), r'threshold = -1\.0'),
    (lambda: exits.Cumulative(threshold=1.5), r'= 1\.5.*0 to 1'),
    (lambda: exits.Stable(threshold=0), 'threshold = 0.*1 or more'),
    (lambda: exits.StateChange(threshold=-0.1), '-0.1'),
    (lambda: exits.Adaptive(rule=exits.KL(), least=0), 'exit.least = 0'),
    (lambda: exits.Confidence().run(
        PLAIN, None, None, plans.Uniform(L)(None).replace(no_grad_steps=jnp.int32(0)), None),
     r'exit = Confidence\(least=1\): the plan has steps without gradient.*exit = Final\(\)'),
    (lambda: adapt(PLAIN, params(PLAIN), tokens(), exits.Adaptive(rule=exits.Cumulative()), jnp.float32(0.5),
                   plans.Uniform(L)(None)), 'no gate'),
    (lambda: extend(PLAIN, params(PLAIN), tokens(), exits.Adaptive(rule=exits.KL()), jnp.float32(0.5),
                    plans.Uniform(L)(None), None, PLAIN.cache(T + 1, T)), 'one token at a time')], ids=range(8))
def test_bad_input(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
