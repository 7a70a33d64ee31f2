"""Routers: who takes a recursion in training and in answers, what they learn, what is cached, and what it costs."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import mor
from loopformer import loop, memories, plans
from loopformer.cells.plain import Plain
from loopformer.inference import exits, measures
from loopformer.inference.engine import Engine
from loopformer.inference.evaluate import Run, evaluate
from loopformer.loop import Every
from loopformer.model import make_readout, parameter_count
from loopformer.nn.layers import Normal
from loopformer.nn.positions import Rotary
from loopformer.optim import WSD, AdamW
from loopformer.papers.mor import routing
from loopformer.papers.mor.cell import (
  AtExit,
  Auxiliary,
  Chance,
  EveryStep,
  ExpertChoice,
  LinearScore,
  MLPScore,
  Moved,
  Open,
  Routed,
  Sigmoid,
  Softmax,
  Threshold,
  TokenChoice,
  TopK,
)
from loopformer.papers.mor.memory import Compact
from loopformer.papers.mor.terms import Balance, LoadBias, RouterBCE, SquaredLogSum, SquaredScore
from loopformer.roles import Roles
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError, Trace, config_dataclass
from tests import parts
from tests.inference.test_generate import TOKENIZER
from tests.parts import D, L, T, V, close, forward, over, padded, params, poked, tokens

CAPACITIES = (1.0, 0.75, 0.5, 0.25)
COUNTS = [8, 6, 4, 2]


def expert(core=2, memory=memories.PerLoop(), read_in=None, **options):
  cell = Routed(parts.stack(core), ExpertChoice(**{'capacities': CAPACITIES, **options}))
  return parts.looped(cell, prelude=parts.stack(1), coda=parts.stack(1), memory=memory,
                      **({} if read_in is None else {'read_in': read_in}))


def token(**options):
  return parts.looped(Routed(parts.stack(2), TokenChoice(**{'recursions': L, **options})), prelude=parts.stack(1),
                      coda=parts.stack(1))


MODEL = expert()
ROUTERS = {'threshold': MODEL, 'mlp': expert(score=MLPScore()), 'chance': expert(train=Chance(), answer=Chance()),
           'auxiliary': expert(auxiliary=LinearScore(), answer=Auxiliary()), 'token': token(),
           'token_bias': token(bias=Normal(0.0), gate=Sigmoid(), combine=EveryStep()), 'shared': expert(
               memory=memories.First())}
routers = pytest.mark.parametrize('name', ROUTERS)
FULL = plans.Uniform(L)(None)


@functools.partial(jax.jit, static_argnames=('model', 'keep'))
def learn(model, weights, text, plan=FULL, seg=None, pos=None, keep=loop.Last()):
  """The pass of a training step."""
  return model.apply({'params': weights}, text, plan, pos, seg, keep=keep,
                     noise=jax.random.split(jax.random.key(0), len(text)))


def learned(model, weights, batch, plan=FULL):
  """The pass of a training step over a batch, by its positions and its documents."""
  return learn(model, weights, batch['tokens'], plan, batch['segments'], batch['positions'])


# Sharing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('sharing, layers, expected', [
    ('cycle', 9, '012012012'), ('sequence', 9, '000111222'), ('middle_cycle', 11, '01231231234'),
    ('middle_sequence', 11, '01112223334')])
def test_layer_maps(sharing, layers, expected):
  assert ''.join(map(str, mor.layer_map(sharing, layers, 3))) == expected


def small(argument):
  model = mor.get_config(f'tiny,{argument}').model
  return model.clone(read_in=model.read_in.clone(vocab=V))


def layers_of(weights):
  """Every parameter set of a model's layers, in order, each a tree."""
  stacks = [weights.get('prelude'), weights['cell']['core'], weights.get('coda')]
  return [jax.tree.map(lambda leaf: leaf[i], stack['block']) for stack in stacks if stack is not None
          for i in range(len(jax.tree.leaves(stack)[0]))]


@pytest.mark.parametrize('sharing', mor.SHARING)
def test_a_sharing_scheme_is_a_deep_net_with_its_layers_by_the_map(sharing):
  layers = 8 if sharing.startswith('middle') else 6
  model = small(f'kind=recursive,sharing={sharing},layers={layers}')
  weights = params(model)
  sets = layers_of(weights)
  which = mor.layer_map(sharing, layers, 3)
  assert len(sets) == max(which) + 1
  deep = parts.looped(Plain(model.cell.core.clone(depth=layers, order=None)), read_in=model.read_in,
                      read_out=model.read_out, loops=1)
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[sets[i] for i in which])
  whole = {'read_in': weights['read_in'], 'read_out': weights['read_out'], 'cell': {'core': {'block': stacked}}}
  ours = forward(model, weights, tokens(), plans.Uniform(model.loops)(None))
  close(ours.z, forward(deep, whole, tokens(), plans.Uniform(1)(None)).z, 1e-5)


def test_one_recursion_is_the_vanilla_net():
  recursive, vanilla = small('kind=recursive,recursions=1'), small('kind=vanilla')
  assert recursive == vanilla and parameter_count(recursive) == parameter_count(vanilla)


@pytest.mark.parametrize('learns', [False, True])
def test_full_capacity_and_open_gates_are_the_loop(learns):
  routed = expert(capacities=(1.0,) * L, gate=Open(), combine=Moved())
  plain = parts.looped(parts.plain(), prelude=parts.stack(1), coda=parts.stack(1))
  weights = params(routed)
  same = {**weights, 'cell': {'core': weights['cell']['core']}}
  ours = (learn if learns else forward)(routed, weights, tokens(), FULL)
  close(ours.z, forward(plain, same, tokens(), FULL).z, 1e-6)


@pytest.mark.parametrize('argument, millions', [
    ('135m', 42), ('360m', 118), ('360m,recursions=2', 167), ('360m,recursions=4', 98), ('730m', 252), ('1.7b', 671),
    ('135m,kind=vanilla', 106), ('360m,kind=vanilla', 315), ('730m,kind=vanilla', 654), ('1.7b,kind=vanilla', 1611)])
def test_parameters_of_the_published_sizes(argument, millions):
  """Without embedding (section 2)."""
  model = mor.get_config(argument).model
  assert round((parameter_count(model) - 49_152 * model.read_in.width) / 1e6) == pytest.approx(millions, abs=0.6)


# Training: the best k ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['threshold', 'mlp', 'chance', 'auxiliary', 'shared'])
def test_counts_are_exact_and_nested_and_the_others_stay(name):
  model = ROUTERS[name]
  trace = learn(model, params(model), tokens(), keep=Every())
  taken = np.asarray(trace.aux['taken'])
  assert (taken.sum(-1) == np.array(COUNTS)[:, None]).all()
  assert not (taken[1:] & ~taken[:-1]).any()
  assert len({tuple(row) for row in taken[-1]}) > 2  # not the same places in every text
  for r in range(1, L):
    before, after = np.asarray(trace.xs[r - 1]), np.asarray(trace.xs[r])
    np.testing.assert_array_equal(after[~taken[r]], before[~taken[r]])
    assert np.abs(after[taken[r]] - before[taken[r]]).max(-1).min() > 1e-4
  np.testing.assert_array_equal(trace.xs[-1], trace.x)


def test_the_best_are_taken_and_the_earlier_of_equals():
  trace = learn(MODEL, params(MODEL), tokens())
  score, taken, candidate = (np.asarray(trace.aux[name]) for name in ('score', 'taken', 'candidate'))
  np.testing.assert_array_equal(candidate[1:], taken[:-1])
  for s, t, c in zip(score.reshape(-1, T), taken.reshape(-1, T), candidate.reshape(-1, T)):
    assert s[t].min() >= s[c & ~t].max(initial=-np.inf)
  equal = jax.tree.map(jnp.zeros_like, params(MODEL)['cell']['router'])
  weights = {**params(MODEL), 'cell': {**params(MODEL)['cell'], 'router': equal}}
  taken = np.asarray(learn(MODEL, weights, tokens()).aux['taken'])
  assert all((taken[r] == (np.arange(T) < COUNTS[r])).all() for r in range(L))


@config_dataclass
class Given:
  """A causal choice that was made before: [K][B][T]."""
  taken: tuple
  ranks, causal, asks = False, True, False

  def takes(self, score, other, ctx, r, share):
    return jnp.asarray(self.taken)[r]


@pytest.mark.parametrize('shared', [memories.PerLoop(), memories.First(), memories.Ring(size=1)], ids=str)
def test_gathered_is_masked_on_the_same_choice(shared):
  model = expert(memory=shared)
  text, seg = tokens(3), jnp.array([[1] * T, [1] * 3 + [2] * (T - 3), [1, 2, 2, 2, 2, 3, 3, 0]])
  pos = jnp.array([range(T), [0, 1, 2, *range(T - 3)], [0, 0, 1, 2, 3, 0, 1, 2]])
  gathered = learn(model, params(model), text, FULL, seg, pos)
  chosen = tuple(map(tuple, (tuple(map(tuple, rows)) for rows in np.asarray(gathered.aux['taken']).tolist())))
  masked = model.clone(cell=model.cell.clone(router=model.cell.router.clone(answer=Given(taken=chosen))))
  answer = jax.jit(lambda weights, text: masked.apply({'params': weights}, text, FULL, pos, seg).z)
  close(answer(params(model), text), gathered.z, 1e-5)


@pytest.mark.parametrize('shared', [memories.First(), memories.Ring(size=1)], ids=str)
@pytest.mark.parametrize('run', [forward, learn], ids=['answers', 'learns'])
def test_documents_do_not_share_keys(run, shared):
  """Nor do their routers, in answers; in training documents of a row compete for places."""
  model = parts.looped(Routed(parts.stack(1), ExpertChoice(capacities=(1.0,) * L)), read_in=parts.nowhere(),
                       memory=shared)
  first = 3
  seg = jnp.broadcast_to(1 + (jnp.arange(T) >= first).astype(jnp.int32), (T + 1, T))
  z = np.asarray(run(model, params(model), poked(), FULL, seg).z)
  moved = np.abs(z[1:] - z[:1]).max(-1)
  index = np.arange(T)
  reached = (index[None] >= index[:, None]) & (np.asarray(seg[0])[None] == np.asarray(seg[0])[:, None])
  assert moved[~reached].max() <= 1e-6 and moved[reached].min() > 1e-5


def test_short_sequences_keep_one_token():
  model = expert(capacities=(1.0, 0.5, 0.01, 0.01))
  assert np.asarray(learn(model, params(model), tokens(2, 3)).aux['taken']).sum(-1)[:, 0].tolist() == [3, 1, 1, 1]
  assert np.asarray(learn(model, params(model), tokens(2, 1)).aux['taken']).sum(-1)[:, 0].tolist() == [1, 1, 1, 1]


def test_padding_is_taken_last_and_changes_nothing():
  text = tokens(3)
  pos = jnp.array([range(T), [0, 1, 2] + [-1] * (T - 3), [-1] * T])
  trace = learn(expert(read_in=parts.nowhere()), params(expert(read_in=parts.nowhere())), text, FULL, None, pos)
  taken = np.asarray(trace.aux['taken'])
  assert not taken[:, np.asarray(pos) < 0].any() and taken[:, 1, :3].sum(-1).tolist() == [3, 2, 1, 1]
  assert np.isfinite(trace.z).all()
  other = learn(expert(read_in=parts.nowhere()), params(expert(read_in=parts.nowhere())),
                jnp.where(pos >= 0, text, (text + 5) % V), FULL, None, pos)
  np.testing.assert_array_equal(taken, other.aux['taken'])


def test_padding_of_a_row_of_documents_takes_no_place():
  """Packed, ragged, padded rows: whatever the padding holds, and however much there is of it, tokens are the same. k
  counts tokens alone."""
  model, batch = expert(read_in=parts.nowhere()), parts.batch(4)
  weights, own = params(expert(read_in=parts.nowhere())), np.asarray(batch['segments']) > 0
  trace = learned(model, weights, batch)
  taken = np.asarray(trace.aux['taken'])
  assert not taken[:, ~own].any() and not np.asarray(trace.aux['candidate'])[:, ~own].any()
  assert taken.sum(-1).T.tolist() == [[max(1, int(c * n + 1e-6)) for c in model.cell.router.capacities]
                                      for n in own.sum(-1)]
  others = {**batch, 'tokens': jnp.where(own, batch['tokens'], (batch['tokens'] + 5) % V)}
  longer = {name: jnp.pad(leaf, ((0, 0), (0, 3))) for name, leaf in batch.items()}
  for given in (others, longer):
    other = learned(model, weights, given)
    np.testing.assert_array_equal(np.asarray(other.aux['taken'])[..., :T], taken)
    close(np.asarray(other.z)[:, :T][own], np.asarray(trace.z)[own], 1e-6)
  chosen = learned(ROUTERS['token'], params(ROUTERS['token']), batch).aux
  assert not (np.asarray(chosen['taken']) | np.asarray(chosen['candidate']))[:, ~own].any()


# Causality -----------------------------------------------------------------------------------------------------------


@routers
def test_answers_do_not_look_ahead(name):
  model = ROUTERS[name]
  for plan in (padded(2), FULL):
    z = np.asarray(forward(model, params(model), poked(), plan).z)
    moved = np.abs(z[1:] - z[:1]).max(-1)
    before = np.tril(np.ones((T, T), bool), -1)
    assert moved[before].max() <= 1e-6 and moved[~before].min() > 1e-5


def test_the_best_k_of_training_look_ahead():
  """The leak that makes top-k no answer: a later token moves states that were before it."""
  z = np.asarray(learn(MODEL, params(MODEL), poked()).z)
  moved = np.abs(z[1:] - z[:1]).max(-1)
  assert moved[np.tril(np.ones((T, T), bool), -1)].max() > 1e-3


# Caches --------------------------------------------------------------------------------------------------------------

MEMORIES = {'per_loop': memories.PerLoop(), 'first': memories.First(), 'compact': Compact(share=(1.0,) * L)}


def by_token(model, text, kv, plan, start=0):
  outs = []
  for i in range(start, text.shape[1]):
    out, kv = parts.extend(model, params(model), text[:, i:i + 1], plan, jnp.full((len(text), 1), i), kv)
    outs.append(out)
  return jnp.concatenate(outs, 1), kv


def at_once(model, text, kv, plan):
  pos = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
  return parts.extend(model, params(model), text, plan, pos, kv)


@pytest.mark.parametrize('router, name', [
    *(('threshold', name) for name in MEMORIES), ('token', 'compact'), ('chance', 'first'), ('auxiliary', 'per_loop')])
def test_decoding_is_the_masked_pass(name, router):
  model, text = ROUTERS[router].clone(memory=MEMORIES[name]), tokens(3)
  for plan in (padded(L), padded(2)):
    whole = forward(model, params(model), text, plan)
    logits = parts.logits(model, params(model), whole.z)
    for way in (by_token, at_once):
      out, kv = way(model, text, model.cache(3, T + 2), plan)
      close(out, logits, 1e-5)
      if name != 'first':  # entries of a recursion are its tokens
        entries = [np.asarray(one.pos >= 0).sum(-1) for one in (kv['loop'] if name == 'compact' else [kv['loop']])]
        np.testing.assert_array_equal(np.concatenate(entries), np.asarray(whole.aux['taken']).sum(-1))


def test_rows_with_budgets_of_their_own_in_a_compact_cache():
  model, text = MODEL.clone(memory=MEMORIES['compact']), tokens(3)
  own = [padded(steps) for steps in (1, L, 2)]
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *own)
  out, _ = by_token(model, text, model.cache(3, T), together)
  for row, plan in enumerate(own):
    close(out[row], parts.logits(model, params(model), forward(model, params(model), text, plan).z)[row], 1e-5)
  kept = forward(model, params(model), text, together, keep=Every())
  for row, plan in enumerate(own):
    close(kept.xs[:, row], forward(model, params(model), text, plan, keep=Every()).xs[:, row], 1e-5)


@pytest.mark.parametrize('name', MEMORIES)
def test_a_cache_is_rewound_by_reading_from_an_earlier_position(name):
  """What a draft left in recursions that the token in its place does not take is gone."""
  model, text, plan = MODEL.clone(memory=MEMORIES[name]), tokens(4), padded(L)
  other = text.at[:, 3:].set((text[:, 3:] + 9) % V)
  _, kv = at_once(model, text, model.cache(4, T), plan)
  again, _ = by_token(model, other, kv, plan, 3)
  fresh, _ = by_token(model, other, model.cache(4, T), plan)
  close(again, fresh[:, 3:], 1e-5)
  taken = [np.asarray(forward(model, params(model), t, plan).aux['taken'])[:, :, 3:] for t in (text, other)]
  assert (taken[0] & ~taken[1]).any()  # there was something to rewind


def test_a_full_slot_lets_tokens_pass():
  """The same one token at a time and in one pass, causal, and unlike a cache with room."""
  model, text, plan = MODEL.clone(memory=Compact(share=(1.0, 0.25, 0.25, 0.1))), tokens(4), padded(L)
  whole, kv = at_once(model, text, model.cache(4, T), plan)
  single, again = by_token(model, text, model.cache(4, T), plan)
  close(single, whole, 1e-5)
  assert [one.length for one in kv['loop']] == [8, 2, 2, 1]
  for one, two in zip(kv['loop'], again['loop']):
    np.testing.assert_array_equal(one.pos, two.pos)
  roomy, _ = at_once(MODEL, text, MODEL.cache(4, T), plan)
  assert np.abs(np.asarray(roomy - whole)).max() > 1e-3
  changed, _ = at_once(model, text.at[:, -1].add(1) % V, model.cache(4, T), plan)
  close(changed[:, :-1], whole[:, :-1], 1e-6)


def test_bytes_of_a_compact_cache():
  """(N + 1) / (2 N) of a slot for every recursion (section 4)."""
  for n in (2, 3, 4):
    share = mor.capacities(n)
    size = (n, 2, 3, 12, 2, 8, jnp.float32)
    compact = sum(one.bytes for one in Compact(share=share).make(*size))
    assert compact / memories.PerLoop().make(*size).bytes == pytest.approx((n + 1) / (2 * n))


def test_recursive_sharing_is_another_function():
  z = [np.asarray(learn(ROUTERS[name], params(MODEL), tokens()).z) for name in ('threshold', 'shared')]
  assert np.abs(z[0] - z[1]).max() > 1e-2


# Generation and evaluation -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('router, name', [('threshold', 'per_loop'), ('threshold', 'compact'), ('token', 'first')])
def test_the_engine_draws_what_the_masked_pass_says_and_drafts_change_nothing(name, router):
  chooser = ExpertChoice() if router == 'threshold' else TokenChoice(recursions=3)
  model = parts.looped(Routed(parts.stack(1), chooser), loops=3, memory=MEMORIES[name])
  texts = {}
  for draft in (None, 1):
    engine = Engine(model, params(model), TOKENIZER, rows=2, length=32, draft=draft, num_draft=3, max_steps=4)
    for prompt, budget in (('abc', 3), ('hello there', 2), ('q', 3)):
      engine.submit(prompt, budget=budget, max_new_tokens=9, temperature=0.0)
    texts[draft] = engine.run()
  assert texts[None] == texts[1]
  ids = TOKENIZER.encode('abc') + TOKENIZER.encode(texts[None][0])
  z = forward(model, params(model), jnp.asarray([ids]), padded(3, 3)).z
  told = np.asarray(parts.logits(model, params(model), z))[0].argmax(-1)
  assert told[2:-1].tolist() == ids[3:]


def test_evaluation_reports_answers_and_the_pass_of_training():
  rows = evaluate(MODEL, params(MODEL), [parts.batch()], {
      '1': plans.resolve(1), str(L): plans.resolve(L), 'trained': Run(plan=plans.Uniform(L), exit=routing.AsTrained())},
      np.ones(V, np.int32), measures.Tokens())
  batch = parts.batch()
  for row, trace in ((rows[1], over(MODEL, params(MODEL), batch, FULL)),
                     (rows[2], learned(MODEL, params(MODEL), batch))):
    total = CE(roll='a')({'a': trace}, batch, make_readout(MODEL, params(MODEL), batch), params(MODEL))
    assert row['loss'] == pytest.approx(float(total / batch['weights'].sum()), rel=1e-5)
  assert rows[1]['loss'] != rows[2]['loss'] and rows[2]['ran'] == L


def test_what_routers_do_on_data():
  batches = [parts.batch(rows, seed=seed) for rows, seed in ((4, 0), (4, 3))]
  found = routing.routing(MODEL, params(MODEL), batches, FULL)
  aux = [jax.tree.map(np.asarray, learned(MODEL, params(MODEL), b).aux) for b in batches]
  score, taken, among = (np.concatenate([a[name] for a in aux], 1) for name in ('score', 'taken', 'candidate'))
  agrees = ((score > 0) == taken) & among
  assert found['accuracy'][0] == 1
  np.testing.assert_allclose(found['accuracy'][1:], (agrees.sum((1, 2)) / among.sum((1, 2)))[1:])
  assert found['dead'] == (~taken[-1].any(0)).mean()
  answered = np.concatenate([np.asarray(over(MODEL, params(MODEL), b, FULL).aux['taken']) for b in batches], 1)
  through = answered.sum((1, 2)) / sum(int((b['segments'] > 0).sum()) for b in batches)
  np.testing.assert_allclose(found['through'], through)
  np.testing.assert_allclose(found['load'], -np.diff([*through, 0]), atol=1e-12)
  assert found['depth'] == pytest.approx(through.sum()) and 0 <= found['entropy'] <= math.log(T)


def test_maximal_violation():
  assert routing.max_violation([5, 5, 5]) == 0 and routing.max_violation([8, 1, 0]) == pytest.approx(8 / 3 - 1)


# What routers learn --------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('model', 'term'))
def value_and_grad(model, term, weights, batch, plan):
  def total(weights):
    rolls = {'all': learned(model, weights, batch, plan)}
    return term(rolls, batch, make_readout(model, weights, batch), weights) / term.weight(batch)
  return jax.value_and_grad(total)(weights)


def gradient(model, term, plan=FULL):
  value, grads = value_and_grad(model, term, params(model), parts.batch(), plan)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
  return float(value), grads


def moves(grads):
  return all((np.asarray(leaf) != 0).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize('name', ['threshold', 'mlp', 'chance', 'shared', 'token', 'token_bias'])
def test_routers_learn_through_their_gates(name):
  _, grads = gradient(ROUTERS[name], CE(roll='all'))
  router = dict(grads['cell']['router'])
  if name == 'token_bias':
    assert not np.asarray(router.pop('bias')).any()  # it is compared, and never in a gate
  assert moves(router) and moves(grads['cell']['core']) and moves(grads['prelude'])


def mean_of(values, among):
  """The sum over recursions of the mean over sequences of the mean over their candidates."""
  return sum(np.mean([row[own].mean() for row, own in zip(*pair)])
             for pair in zip(np.asarray(values), np.asarray(among)))


def test_the_routers_loss_by_hand_and_its_gradient():
  value, grads = gradient(MODEL, RouterBCE(roll='all'))
  aux = jax.tree.map(np.asarray, learned(MODEL, params(MODEL), parts.batch()).aux)
  p = 1 / (1 + np.exp(-aux['score'].astype(np.float64)))
  each = -np.where(aux['taken'], np.log(p), np.log(1 - p))
  assert value == pytest.approx(mean_of(each, aux['candidate']), rel=1e-5)
  assert moves(grads['cell']['router']) and moves(grads['prelude'])
  everyone = expert(capacities=(1.0,) * L)
  assert np.asarray(learn(everyone, params(everyone), tokens()).aux['taken']).all()  # every target is 1 there
  value, _ = gradient(everyone, RouterBCE(roll='all'))
  aux = learned(everyone, params(everyone), parts.batch()).aux
  assert value == pytest.approx(mean_of(jax.nn.softplus(-aux['score']), aux['candidate']), rel=1e-5)


def test_from_the_auxiliary_router_the_model_learns_nothing():
  model = ROUTERS['auxiliary']
  value, grads = gradient(model, RouterBCE(roll='all', of='auxiliary'))
  router = dict(grads['cell'].pop('router'))
  assert moves([router.pop(f'others_{r}') for r in range(L)]) and value > 0
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves((grads, router)))
  with pytest.raises(ConfigError, match='has no auxiliary of a router'):
    gradient(MODEL, RouterBCE(roll='all', of='auxiliary'))


def test_squared_scores():
  value, _ = gradient(MODEL, SquaredScore(roll='all'))
  aux = jax.tree.map(np.asarray, learned(MODEL, params(MODEL), parts.batch()).aux)
  assert value == pytest.approx(mean_of(aux['score'] ** 2, aux['candidate']), rel=1e-5)
  value, _ = gradient(token(), SquaredLogSum(roll='all'))
  score = np.asarray(learned(token(), params(token()), parts.batch()).aux['score'])
  own = np.asarray(parts.batch()['segments'])[None] > 0
  assert value == pytest.approx(mean_of((np.log(np.exp(score).sum(0)) ** 2)[None], own), rel=1e-4)


def routes(share, last):
  """The trace of a router that gave shares [K, B, T] and let tokens end with recursions last [B, T]."""
  taken = np.asarray(last)[None] >= np.arange(len(share))[:, None, None]
  aux = {'share': jnp.asarray(share), 'taken': jnp.asarray(taken), 'candidate': jnp.ones(taken.shape, bool),
         'score': jnp.asarray(share)}
  return {'all': Trace(x=None, z=None, xs=None, aux=aux, kv={}, steps=None)}


def test_balance():
  last = np.arange(12).reshape(2, 6) % 3
  batch = {'tokens': jnp.zeros((2, 6), jnp.int32)}

  def of(share, last):
    return float(Balance(roll='all')(routes(share, last), batch, None, None) / Balance(roll='all').weight(batch))

  assert of(np.full((3, 2, 6), 1 / 3), last) == pytest.approx(1)
  sharp = (last[None] == np.arange(3)[:, None, None]).astype(np.float32)
  assert of(sharp, last) == pytest.approx(1)
  assert of(np.stack([np.ones((2, 6)), *np.zeros((2, 2, 6))]), np.zeros((2, 6), int)) == pytest.approx(3)
  value, grads = gradient(token(), Balance(roll='all'))
  assert moves(grads['cell']['router']) and value > 0


def test_the_bias_moves_against_the_load_and_stays_out_of_the_gate():
  model = ROUTERS['token_bias']
  value, grads = gradient(model, LoadBias(roll='all'))
  aux = jax.tree.map(np.asarray, learned(model, params(model), parts.batch()).aux)
  load = -np.diff([*aux['taken'].sum((1, 2)), 0])
  bias = np.asarray(grads['cell']['router']['bias'])
  assert value == 0 and len(set(load)) > 1
  np.testing.assert_allclose(bias, (load - load.mean()) / parts.batch()['tokens'].size, atol=1e-6)
  others = {**grads['cell'], 'router': grads['cell']['router']['scores']}
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(others))

  optimizer = routing.LossFree(of=AdamW(schedule=WSD(peak=0.1)), rate=0.01).make(3, Roles())
  weights = params(model)
  updates, _ = optimizer.update(grads, optimizer.init(weights), weights)
  np.testing.assert_allclose(updates['cell']['router']['bias'], 0.01 * np.sign(load.mean() - load), atol=1e-8)

  pushed = {**weights, 'cell': {**weights['cell'], 'router': {**weights['cell']['router'],
                                                             'bias': jnp.array([0.0, 0.0, 9.0, 0.0])}}}
  moved = jax.tree.map(np.asarray, learned(model, pushed, parts.batch()).aux)
  own = np.asarray(parts.batch()['segments']) > 0
  assert (moved['taken'].sum(0)[own] == 3).all() and not (aux['taken'].sum(0)[own] == 3).all()
  np.testing.assert_array_equal(moved['share'][0], aux['share'][0])
  with pytest.raises(ConfigError, match='a bias that the router does not have'):
    gradient(token(), LoadBias(roll='all'))


def test_the_loads_of_parts_of_a_batch_add_up():
  """Microbatches and devices: the sign is that of the whole batch's loads."""
  term, rng = LoadBias(roll='all'), np.random.default_rng(0)
  last, weights = rng.integers(0, 3, (4, 6)), {'cell': {'router': {'bias': jnp.zeros(3)}}}

  def grad(last):
    batch, share = {'tokens': jnp.asarray(last)}, np.zeros((3, *last.shape), np.float32)
    return jax.grad(lambda w: term(routes(share, last), batch, None, w))(weights)['cell']['router']['bias']

  np.testing.assert_allclose(grad(last), grad(last[:1]) + grad(last[1:]), atol=1e-5)


# Token choice --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('combine', [AtExit(), EveryStep()], ids=str)
@pytest.mark.parametrize('gate', [Softmax(), Sigmoid()], ids=str)
def test_token_choice_by_its_definition(combine, gate):
  """One text, token by token, with a core that sees no other tokens."""
  core = parts.stack(1)
  model = parts.looped(Routed(core, TokenChoice(recursions=L, combine=combine, gate=gate)), read_in=parts.nowhere())
  weights, text = params(model), tokens(6, 1)
  alone = parts.looped(Plain(core), read_in=parts.nowhere(), loops=1)
  of_core = {**weights, 'cell': {'core': weights['cell']['core']}}
  first = np.asarray(weights['read_in']['embedding'])[np.asarray(text)]
  s = first @ np.asarray(weights['cell']['router']['scores']['kernel'])
  share = np.exp(s) / np.exp(s).sum(-1, keepdims=True) if gate.joint else 1 / (1 + np.exp(-s))

  @jax.jit
  def f(x):
    return alone.apply({'params': of_core}, x, method=lambda m, x: m.cell.core(x, parts.context(x), None, None)[0])

  for steps in (L, 2):
    depth, x = np.minimum(s.argmax(-1), steps - 1), first.copy()
    for r in range(steps):
      y, g = np.asarray(f(x)), gate.alpha * share[..., r:r + 1]
      last, under_way = (depth == r)[..., None], (depth >= r)[..., None]
      if isinstance(combine, AtExit):
        new = np.where(last, first + g * y, y)
      else:
        new = g * y + np.where(last, first, 0)
      x = np.where(under_way, new, x)
    close(forward(model, weights, text, padded(steps)).x, x, 1e-5)
  assert len(set(s.argmax(-1).ravel())) > 1


# Cost ----------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled_flops(capacities):
  """Of the compiled pass of training, one layer a recursion, no head."""
  block = parts.block(parts.RMSNorm(), position=Rotary(), kernel=parts.Blockwise(size=64))
  model = parts.looped(Routed(parts.Stack(block, 1), ExpertChoice(capacities=capacities)), read_in=parts.nowhere(),
                       loops=len(capacities))
  plan, text = plans.Uniform(len(capacities))(None), tokens(2, 32)
  step = jax.jit(lambda weights, text: learn(model, weights, text, plan).x)
  return step.lower(params(model), text).compile().cost_analysis()['flops'], model.cell.flops(D, 32, len(capacities))


def test_the_compiled_work_falls_with_the_capacity():
  full, counted = compiled_flops((1.0, 1.0, 1.0))
  third, fewer = compiled_flops((1.0, 2 / 3, 1 / 3))
  least, fewest = compiled_flops((1.0, 0.125, 0.125))
  assert least < third < full
  assert third / full == pytest.approx(fewer / counted, abs=0.05)
  assert least / full == pytest.approx(fewest / counted, abs=0.05)


def test_counted_work():
  """Linear maps by the capacity, attention by its square (section 3); 2/3 of the loop's for thirds."""
  cell = mor.get_config('tiny').model.cell
  linear = cell.core.flops(64, -1)  # attention over -1 tokens costs nothing
  attention = cell.core.flops(64, 128) - linear
  expected = sum(c * linear + c * attention * (c * 128 + 1) / 129 for c in (1, 2 / 3, 1 / 3)) + 2 * 64 * (1 + 1 + 2 / 3)
  assert cell.flops(64, 128, 3) == pytest.approx(expected)
  assert cell.flops(64, 128, 3) / (3 * cell.core.flops(64, 128)) == pytest.approx(2 / 3, abs=0.03)
  assert cell.flops(64, 128, 1.5) == pytest.approx((cell.flops(64, 128, 1) + cell.flops(64, 128, 2)) / 2)


@pytest.mark.parametrize('remat', [loop.PerStep(), loop.PerLayer()], ids=repr)
def test_rematerialised_equals_plain(remat):
  model = MODEL.clone(remat=remat)
  close(gradient(model, CE(roll='all')), gradient(MODEL.clone(remat=loop.KeepAll()), CE(roll='all')), 1e-5)


def test_skipped_recursions_route_and_change_nothing():
  plan = FULL.replace(active=jnp.array([True, False, True, False]))
  trace = learn(MODEL, params(MODEL), tokens(), plan, keep=Every())
  taken = np.asarray(trace.aux['taken'])
  assert taken.sum(-1)[:, 0].tolist() == [8, 0, 4, 0] and int(trace.steps) == 2
  np.testing.assert_array_equal(trace.xs[1], trace.xs[0])
  np.testing.assert_array_equal(trace.xs[3], trace.xs[2])
  assert gradient(MODEL, CE(roll='all'), plan)[0] > 0


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('options, message', [
    (dict(capacities=()), 'give each recursion a share'), (dict(capacities=(1.0, 0.0)), 'above 0'),
    (dict(capacities=(0.5, 1.0)), 'sort them'), (dict(train=Threshold()), 'takes no fixed number'),
    (dict(answer=TopK()), 'looks at later tokens'), (dict(gate=Softmax()), 'always 1'),
    (dict(answer=Auxiliary()), 'no auxiliary router')], ids=str)
def test_routers_that_do_not_fit_are_refused(options, message):
  cell = Routed(parts.stack(1), ExpertChoice(**options))
  with pytest.raises(ConfigError, match=message):
    cell.check(D)
  with pytest.raises(ConfigError, match=message):
    parts.shapes(parts.looped(cell))


@pytest.mark.parametrize('attempt, message', [
    (lambda: learn(MODEL, params(MODEL), tokens(), plans.Uniform(L + 1)(None)), 'made for 4 recursions'),
    (lambda: learn(MODEL, params(MODEL), tokens(), FULL.replace(no_grad_steps=jnp.int32(1))), 'no_grad_steps'),
    (lambda: Threshold(at=1.0), 'at = 1.0'), (lambda: Compact(share=()), 'memory.share'),
    (lambda: Compact(share=(1.0,)).make(2, 1, 1, 1, 1, 1, jnp.float32), '2 are asked for'),
    (lambda: at_once(parts.looped(parts.plain(), memory=Compact(share=(1.0,) * L)), tokens(2), parts.looped(
        parts.plain(), memory=Compact(share=(1.0,) * L)).cache(2, T), FULL), 'must be known when they are compiled'),
    (lambda: at_once(MODEL, tokens(2), MODEL.cache(2, T, 2), FULL), 'slots for 2'),
    (lambda: MODEL.apply({'params': params(MODEL)}, tokens(2), FULL, kv=MODEL.cache(2, T), keep=Every()), 'keep ='),
    (lambda: exits.check(MODEL, exits.Adaptive(rule=exits.KL()), '--exit=kl'), '--exit=kl: .*decides how many'),
    (lambda: routing.LossFree(of=AdamW(), rate=0.0), 'optim.rate'), (lambda: token(recursions=0).cell.check(D), '= 0'),
    (lambda: mor.get_config('tiny,sharing=sequence'), 'a sequence does not have'),
    (lambda: mor.get_config('tiny,kind=recursive,memory=shared'), 'keys of its own'),
    (lambda: mor.get_config('tiny,kind=token,auxiliary=1'), 'for kind=mor'),
    (lambda: mor.layer_map('cycle', 10, 3), 'do not divide'), (lambda: mor.get_config('tiny,recursions=0'), '= 0'),
    (lambda: RouterBCE(roll='a')({'a': forward(parts.ROWS['base_loop'].model, params(parts.ROWS['base_loop'].model),
                                               tokens(), FULL)}, parts.batch(), None, None), 'has no taken'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_what_is_refused(attempt, message):
  with pytest.raises(ConfigError, match=message):
    attempt()
