"""RELAY: the loss inside the loop against its definition, what its gradient reaches, what a loop may read, chains that
are written, kept and scored, and the stages one after another."""
import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import relay_stages as study
from loopformer import config as configs, loop, plans
from loopformer.api import Loaded
from loopformer.cells.damped import Damped
from loopformer.cells.plain import Plain
from loopformer.cells.timed import Timed
from loopformer.model import Looped
from loopformer.nn.condition import Modulation, Trajectory
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.relay import chains
from loopformer.papers.relay.cell import LOSS, SHOWN, RoundHead, Showing
from loopformer.papers.relay.plans import RoundByRound
from loopformer.papers.relay.terms import RoundCE
from loopformer.tasks.arithmetic import LeftToRight
from loopformer.tasks.connectivity import NO, YES, Connectivity
from loopformer.tasks.increasing import Increasing
from loopformer.tasks.reasoning import Chain, Even, Problem, Rounds, Several
from loopformer.tasks.recorded import recorded
from loopformer.tasks.shortened import Selected
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError
from tests import parts
from tests.parts import D, close

OF = LeftToRight(longest=3, sizes=Even())
FORM = Rounds(of=OF)
V = len(FORM.symbols)
BLOCK = parts.block(RMSNorm(), position=Rotary(), kernel=Bidirectional())
OPTIONS = dict(read_in=Tokens(vocab=V, width=D, length=40), read_out=Head(outputs=V), loops=3)
MODEL = Looped(cell=Showing(Plain(Stack(BLOCK, 1)), RoundHead(outputs=V)), **OPTIONS)
PLAIN = Looped(cell=Plain(Stack(BLOCK, 1)), **OPTIONS)
WRITER = Looped(cell=Plain(Stack(parts.block(RMSNorm(), position=Rotary()), 1)), **{**OPTIONS, 'loops': 1})
ANSWER = Weighted(1.0, CE(roll='all'))


def problems(*sizes, of=OF):
  return [of.draw(np.random.default_rng(i), size) for i, size in enumerate(sizes)]


def batch_of(some, form=FORM):
  examples = [form.example(problem) for problem in some]
  return {name: jnp.asarray(np.stack([example[name] for example in examples])) for name in examples[0]}


BATCH = batch_of(problems(1, 3, 2))


def objective(plan, **terms):
  return Objective(rolls={'all': Rollout(plan)}, terms={name: term for name, term in terms.items() if term})


RELAY = objective(RoundByRound(most=3), answer=ANSWER, rounds=Weighted(0.5, RoundCE(roll='all')))


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradient(model, key, params, batch):
  of = {'relay': RELAY,
        'nothing': dataclasses.replace(RELAY, terms={**RELAY.terms, 'rounds': Weighted(0.0, RoundCE(roll='all'))}),
        'plain': objective(plans.Given(most=3), answer=ANSWER)}[key]
  context = parts.plan_context(jax.random.key(0), batch)
  return jax.value_and_grad(lambda params: of(model, params, context, of.denominators(batch))[0])(params)


# The loss ------------------------------------------------------------------------------------------------------------


def test_the_loss_is_its_definition():
  """By section 3.1, problem by problem from the states that are kept, with the mask's rule."""
  weights = parts.params(MODEL)
  trace = parts.over(MODEL, weights, BATCH, plans.Given(most=3)(parts.plan_context(jax.random.key(0), BATCH)),
                     keep=loop.Every())
  head = RoundHead(outputs=V)
  total = 0.0
  for row, problem in enumerate(problems(1, 3, 2)):
    rounds = []
    for t, words in enumerate(problem.rounds):
      logits = np.asarray(head.apply({'params': weights['cell']['head']}, trace.xs[t, row]), np.float64)
      logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
      slots = [*words] if len(words) == FORM.width(problem) else ['<end>', *words]
      rounds.append(-np.mean([logp[place - len(slots), FORM.symbols.index(word)] for place, word in enumerate(slots)]))
    total += np.mean(rounds)
  answers = MODEL.apply({'params': weights}, trace.z[:, -1], method='logits')
  nll = -jax.nn.log_softmax(answers)[jnp.arange(3), BATCH['targets'][:, -1]]
  loss, _ = gradient(MODEL, 'relay', weights, BATCH)
  np.testing.assert_allclose(loss, nll.mean() + 0.5 * total / 3, rtol=1e-5)


def test_long_problems_count_as_much_as_short_ones_and_tasks_by_their_weights():
  several = Several(of={'A': OF, 'B': LeftToRight(longest=3, modulus=3)}, weights={'B': 4.0})
  some = [several.draw(np.random.default_rng(i), size, task) for i, (size, task) in enumerate([(1, 'A'), (3, 'B')])]
  batch = batch_of(some, Rounds(of=several))
  np.testing.assert_allclose(batch['round_weights'].sum((1, 2)), [1, 4], rtol=1e-6)
  assert float(RoundCE(roll='all').weight(batch)) == pytest.approx(5) and CE(roll='all').weight(batch) == 5


def test_steps_after_the_last_round_learn_nothing():
  """A batch of one round gives the same gradient whether there is place for two more, and whatever stands there."""
  one = batch_of(problems(1, 1, 1))
  loss, grads = gradient(MODEL, 'relay', parts.params(MODEL), one)
  other = {**one, 'rounds': one['rounds'].at[:, 1:].set(3)}
  close(gradient(MODEL, 'relay', parts.params(MODEL), other), (loss, grads), 1e-6)
  short = {**one, 'rounds': one['rounds'][:, :1], 'round_weights': one['round_weights'][:, :1]}
  of = dataclasses.replace(RELAY, rolls={'all': Rollout(RoundByRound(most=1))})
  context = parts.plan_context(jax.random.key(0), short)
  alone = jax.jit(jax.value_and_grad(lambda p: of(MODEL, p, context, of.denominators(short))[0]))(parts.params(MODEL))
  close(alone, (loss, grads), 1e-5)


def test_without_its_weight_it_is_the_loop_that_answers_alone():
  weights = parts.params(MODEL)
  loss, grads = gradient(MODEL, 'nothing', weights, BATCH)
  shared = {**weights, 'cell': {'core': weights['cell']['core']}}
  plain_loss, plain = gradient(PLAIN, 'plain', shared, BATCH)
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads['cell'].pop('head')))
  close((loss, grads), (plain_loss, plain), 1e-6)


def test_the_rounds_reach_every_step_and_not_the_other_head():
  both, answer = (gradient(MODEL, key, parts.params(MODEL), BATCH)[1] for key in ('relay', 'nothing'))
  moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), both, answer)
  assert max(jax.tree.leaves(moved['read_out'])) < 1e-6
  assert all(value > 1e-5 for name in ('read_in', 'cell') for value in jax.tree.leaves(moved[name]))


def test_no_logits_of_several_steps_exist_together():
  program = str(jax.make_jaxpr(lambda p: gradient.__wrapped__(MODEL, 'relay', p, BATCH))(parts.params(MODEL)))
  n = FORM.length
  assert f'f32[3,{n},{V}]' in program  # of the batch, after one step
  assert f'f32[3,3,{n},{V}]' not in program


def test_around_a_cell_that_knows_the_schedule():
  """The inner cell gets what it computed ahead, with rounds and without."""
  timed = Timed(Stack(BLOCK, 1), Trajectory(D), Modulation(1))
  inner, model = (Looped(cell=cell, **OPTIONS) for cell in (timed, Showing(timed, RoundHead(outputs=V))))
  weights = parts.params(model)
  own = {**weights, 'cell': {name: value for name, value in weights['cell'].items() if name != 'head'}}
  context = parts.plan_context(jax.random.key(0), BATCH)
  plan = RoundByRound(most=3)(context)
  expected = parts.over(inner, own, BATCH, plans.Given(most=3)(context))
  for rows, name in ((plan.rows, LOSS), ({}, SHOWN)):
    trace = parts.over(model, weights, BATCH, plan.replace(rows=rows))
    close(trace.z, expected.z, 1e-6)
    assert trace.aux.keys() == {name}


# What a loop reads ---------------------------------------------------------------------------------------------------


def shown(some, form=FORM, model=MODEL):
  return chains.shown(model, parts.params(model), batch_of(some, form), form.most)


def test_every_token_reads_all_of_its_problem():
  one = problems(3)[0]
  other = dataclasses.replace(one, prompt=(*one.prompt[:-1], '4'))
  first, second = (parts.over(MODEL, parts.params(MODEL), batch_of([problem]), plans.schedule((1.0,))).x
                   for problem in (one, other))
  assert np.abs(first - second)[0, 0].max() > 1e-4


def test_the_width_of_the_row_changes_nothing():
  """Padding is no part of a problem: rows with room for more give the same."""
  wide, some = Rounds(of=dataclasses.replace(OF, room=6, limit=6)), problems(1, 3, 2)
  (rounds, answers), (more, same) = shown(some), shown(some, wide)
  assert wide.length > FORM.length and (answers == same).all()
  for row, problem in enumerate(some):
    width, steps = FORM.width(problem), len(problem.rounds)
    np.testing.assert_array_equal(rounds[:steps, row, -width:], more[:steps, row, -width:])


def test_loops_are_a_deep_encoder_of_copied_layers():
  deep = Looped(cell=Plain(Stack(BLOCK, 3)), **{**OPTIONS, 'loops': 1})
  weights = parts.params(PLAIN)
  copied = {**weights, 'cell': {'core': jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, 0), weights['cell']['core'])}}
  close(parts.over(PLAIN, weights, BATCH, plans.schedule((1 / 3,) * 3)).z,
        parts.over(deep, copied, BATCH, plans.schedule((1.0,))).z, 1e-5)


# Chains --------------------------------------------------------------------------------------------------------------


def disguised(problem):
  """The same question with another solution of the same shape."""
  return dataclasses.replace(problem, rounds=tuple(('0',) * len(each) for each in problem.rounds), answer='0')


def test_a_loop_writes_without_seeing_the_solution():
  some, weights = problems(1, 3, 2), parts.params(MODEL)
  written = chains.by_loop(MODEL, weights, FORM, some, rows=2)
  assert [len(p.rounds) for p in written] == [1, 3, 2] and [p.prompt for p in written] == [p.prompt for p in some]
  again = chains.by_loop(MODEL, weights, FORM, list(map(disguised, some)), rows=4)
  assert [(p.rounds, p.answer) for p in again] == [(p.rounds, p.answer) for p in written]
  tokens, answers = shown(some)
  assert [p.answer for p in written] == [FORM.symbols[i] for i in answers]
  assert written[1].rounds == FORM.read(some[1], np.asarray(tokens)[:, 1], 0).rounds
  plain = chains.by_loop(PLAIN, parts.params(PLAIN), FORM, some)
  assert all(p.rounds == () and p.answer in FORM.symbols for p in plain)


def test_a_decoder_writes_without_seeing_the_solution():
  """And always the likeliest token: what a pass over all that was written finds likeliest."""
  form, some, weights = Chain(of=OF), problems(1, 3, 2), parts.params(WRITER)
  head = weights['read_out']['kernel'].at[form.pad].set(0)  # so that it does not end at once
  weights = {**weights, 'read_out': {**weights['read_out'], 'kernel': head}}
  written = chains.by_token(WRITER, weights, form, some)
  again = chains.by_token(WRITER, weights, form, list(map(disguised, some)))
  assert [(p.rounds, p.answer) for p in again] == [(p.rounds, p.answer) for p in written]
  ids = form.ids(written[1].prompt) + form.ids([*written[1].rounds[0], written[1].answer])
  logits = parts.logits(WRITER, weights, parts.forward(WRITER, weights, jnp.array([ids]), plans.schedule((1.0,))).z)
  given = len(some[1].prompt)
  assert logits[0, given - 1:-1].argmax(-1).tolist() == ids[given:]


def test_chains_that_do_not_fit():
  far = LeftToRight(longest=30)
  with pytest.raises(ConfigError, match=r'problems: 62 tokens, more than the 40 positions'):
    chains.by_loop(MODEL, {}, Rounds(of=far), problems(30, of=far))
  with pytest.raises(ConfigError, match='2 rounds .* raise room'):
    chains.by_loop(MODEL, {}, Rounds(of=LeftToRight(longest=1, limit=2)), problems(2))
  with pytest.raises(ConfigError, match='positions'):
    chains.by_token(WRITER, parts.params(WRITER), Chain(of=far), problems(30, of=far))
  other = LeftToRight(longest=3, modulus=3)
  for write, model, form in ((chains.by_loop, MODEL, Rounds), (chains.by_token, WRITER, Chain)):
    with pytest.raises(ConfigError, match=rf'LeftToRight writes them in {V - 2} symbols, and the model reads {V} and'):
      write(model, {}, form(of=other), problems(3, of=other))
  for rows in (0, 1.5):
    with pytest.raises(ConfigError, match=f'rows = {rows}'):
      chains.by_loop(MODEL, {}, FORM, problems(3), rows=rows)


TWO = Several(of={'A': LeftToRight(longest=2, room=4), 'B': Increasing(longest=4, room=8, group=2, spread=9)})


def fake(wrong=3):
  """A writer of true chains, but for every `wrong`-th, whose answer is another."""
  seen = []

  def write(some):
    seen.extend(some)
    return [dataclasses.replace(p, answer='x') if (len(seen) - len(some) + i) % wrong == 0 else p
            for i, p in enumerate(some)]

  return write, seen


def test_what_leads_to_no_answer_is_never_consistent():
  """Of solutions that are told in part every chain would be thrown away, in silence."""
  part = Selected(of=LeftToRight(longest=4), rounds=1)
  problem = part.draw(np.random.default_rng(0), 4)
  with pytest.raises(ConfigError, match='Selected: its rounds lead to no answer'):
    chains.consistent(part, problem, problem)


@pytest.mark.parametrize('rows', [1, 7, 64])
def test_tables_are_filled_with_what_is_consistent(rows):
  write, seen = fake()
  table = {'A': {3: 10, 4: 5}, 'B': {6: 4, 8: 1}}
  made, told = chains.filled(table, TWO, 7, write, lambda p, w: chains.consistent(TWO, p, w), tries=40, rows=rows)
  counts = {(row.task, row.size): row.kept for row in told}
  assert counts == {(task, size): n for task, sizes in table.items() for size, n in sizes.items()}
  assert [(p.task, p.size) for p in made] == [key for key, n in counts.items() for _ in range(n)]
  assert all(p.answer != 'x' and p in seen for p in made) and sum(row.tried for row in told) == len(seen)


def test_tables_that_cannot_be_filled_are_told():
  write, seen = fake(wrong=1)
  made, told = chains.filled({'A': {3: 4}}, TWO, 0, write, chains.correct, tries=5, rows=3)
  assert made == [] and told == [chains.Filled(task='A', size=3, asked=4, tried=20, kept=0)] and len(seen) == 20
  for table, message in (({'C': {3: 1}}, "task = 'C': no such source"), ({'A': {9: 1}}, 'size = 9: LeftToRight has no'),
                         ({'A': {3: 0}}, r"table\['A'\]\[3\] = 0")):
    with pytest.raises(ConfigError, match=message):
      chains.filled(table, TWO, 0, write, chains.correct, tries=5)
  for options, message in ((dict(tries=0), 'tries = 0'), (dict(tries=0.5), 'tries = 0.5'),
                           (dict(tries=5, rows=0), 'rows = 0')):  # 0 rows at a time took for ever
    with pytest.raises(ConfigError, match=message):
      chains.filled({'A': {3: 1}}, TWO, 0, write, chains.correct, **options)
  for count in (-3, 1.5):
    with pytest.raises(ConfigError, match=rf"counts\['A'\] = {count}"):
      chains.originals(TWO, 0, {'A': count})


def test_no_chain_is_kept_that_is_longer_than_any_may_be():
  most = TWO.extent.chain
  for extra, kept in ((0, 4), (1, 0)):
    def write(some):
      return [dataclasses.replace(p, rounds=(('0',) * (most + extra - 1), (p.answer,))) for p in some]

    made, _ = chains.filled({'A': {3: 4}}, TWO, 0, write, lambda p, w: chains.consistent(TWO, p, w), tries=3)
    assert len(made) == kept
    assert all(Chain(of=TWO).example(problem) for problem in made)


def test_chains_are_drawn_by_their_stream_alone():
  first = [problem for problem, _ in zip(chains.draws(TWO, 1, 3, 'A'), range(20))]
  assert first == [problem for problem, _ in zip(chains.draws(TWO, 1, 3, 'A'), range(20))]
  assert first != [problem for problem, _ in zip(chains.draws(TWO, 2, 3, 'A'), range(20))]
  assert {(p.task, p.size) for p in first} == {('A', 3)}


def test_originals_are_of_the_training_sizes():
  made = chains.originals(TWO, 0, {'A': 30, 'B': 20})
  assert [p.task for p in made] == ['A'] * 30 + ['B'] * 20
  assert {p.size for p in made[:30]} == {1, 2} and max(p.size for p in made[30:]) == 4
  assert all(chains.consistent(TWO, p, p) for p in made)
  with pytest.raises(ConfigError, match="task = 'C': no such source of problems; choose one of 'A', 'B'"):
    chains.originals(TWO, 0, {'C': 1})


def solved(rounds, answer):
  return Problem(prompt=('q',), rounds=tuple(tuple(each.split()) for each in rounds), answer=answer, size=1)


def test_scores():
  true = [solved(['a b c', 'd e'], '1'), solved(['f'], '2')]
  perfect = chains.scored(true, true)
  assert (perfect.answer, perfect.chain, perfect.bits) == (1, 1, 1)
  np.testing.assert_array_equal(perfect.hits, [[1, 1, 1], [1, 1, np.nan]])
  found = chains.scored(true, [solved(['a x', 'd e y'], '1'), solved(['f'], '3')])
  assert (found.answer, found.chain, found.bits) == (0.5, 0.5, 4 / 6)  # of c nothing is there; y is too much
  np.testing.assert_array_equal(found.hits, [[1, 0, 0], [1, 1, np.nan]])
  flat = chains.scored(true, [solved(['a b c d e'], '1'), solved(['f f'], '2')])
  assert (flat.answer, flat.chain, flat.bits) == (1, 0.5, 1)  # what is too much makes a chain wrong
  assert chains.scored(true, [solved([], ''), solved([''], '2')]).bits == 0


def test_scores_of_problems_without_rounds():
  """Whether a loop wrote them, which has none, or a decoder, all of whose text but the answer is one."""
  of = Connectivity(longest=3, shortest=3)
  true = [of.draw(np.random.default_rng(i), 3) for i in range(3)]
  other = {YES: NO, NO: YES}
  form = Chain(of=of)
  for write in (lambda p, *words: dataclasses.replace(p, rounds=tuple((word,) for word in words[:-1]),
                                                      answer=words[-1]),
                lambda p, *words: form.read(p, words)):
    found = chains.scored(true, [write(true[0], true[0].answer), write(true[1], '1', true[1].answer),
                                 write(true[2], other[true[2].answer])])
    assert (found.answer, found.chain, found.hits.shape) == (2 / 3, 2 / 3, (0, 0)) and np.isnan(found.bits)
  mixed = chains.scored([*true[:1], solved(['a'], '1')], [write(true[0], true[0].answer), solved(['a'], '1')])
  assert (mixed.answer, mixed.chain, mixed.bits) == (1, 1, 1)
  for written in ([], true[:2]):
    with pytest.raises(ConfigError, match='problems: 3, and [02] were written'):
      chains.scored(true, written)
  with pytest.raises(ConfigError, match='problems: 0'):
    chains.scored([], [])


# What cannot be ------------------------------------------------------------------------------------------------------


def test_plans_and_cells_that_do_not_fit():
  with pytest.raises(ConfigError, match='RoundByRound.most = 2: the batch has room for 3 rounds'):
    RoundByRound(most=2)(parts.plan_context(jax.random.key(0), BATCH))
  with pytest.raises(ConfigError, match='most = 0'):
    RoundByRound(most=0)
  for name in ('loops', 'rounds', 'round_weights'):
    context = parts.plan_context(jax.random.key(0), {key: rows for key, rows in BATCH.items() if key != name})
    with pytest.raises(ConfigError, match=f"most = 3: it reads '{name}' of a batch"):
      RoundByRound(most=3)(context)
  short = {**BATCH, 'round_weights': BATCH['round_weights'][:, :2]}
  with pytest.raises(ConfigError, match=r'has room for 2 rounds \(round_weights\)'):
    RoundByRound(most=3)(parts.plan_context(jax.random.key(0), short))
  few = MODEL.clone(cell=Showing(Damped(Plain(Stack(BLOCK, 1))), RoundHead(outputs=V - 1)))
  for model in (few, few.clone(cell=Damped(few.cell))):
    with pytest.raises(ConfigError, match=f'head.outputs = {V - 1}: rounds are written in the {V} symbols'):
      RoundCE(roll='all').check(model)
  RoundCE(roll='all').check(MODEL)
  with pytest.raises(ConfigError, match='the batch has no rounds, so that RoundCE has nothing to ask for'):
    RoundCE(roll='all').weight({name: rows for name, rows in BATCH.items() if name != 'round_weights'})
  shows_none = objective(plans.Given(most=3), rounds=Weighted(1.0, RoundCE(roll='all')))
  context = parts.plan_context(jax.random.key(0), BATCH)
  for model in (MODEL, PLAIN):
    with pytest.raises(ConfigError, match="rollout 'all' shows no rounds"):
      jax.eval_shape(lambda: shows_none(model, parts.params(model), context, shows_none.denominators(BATCH)))


@pytest.mark.parametrize('argument, message', [
    ('huge', "size = 'huge'.*cpu, gpu, paper"), ('cpu,kind=taught', "kind = 'taught'"),
    ('gpu,task=left', "task = 'left'"),
    ('cpu,kind=tuned', 'start = .* needs both'), ('cpu,kind=tuned,start=runs/a', 'chains = .* needs both'),
    ('cpu,start=runs/a', 'starts from no other run'), ('cpu,kind=chain,chains=a', 'starts from no other run'),
    ('cpu,relay=-0.5', 'rounds would be learned not to be shown'),
    ('cpu,kind=chain,relay=2', 'kind = chain shows no rounds')])
def test_arguments(argument, message):
  with pytest.raises(ConfigError, match=message):
    configs.load(f'experiments/configs/relay.py:{argument}')


# Stages --------------------------------------------------------------------------------------------------------------


class Given:
  """Flags with a --set."""
  size, task = 'cpu', 'left'

  def __getitem__(self, name):
    return SimpleNamespace(value=['train.steps=60'])


@pytest.fixture
def stage(monkeypatch):
  """The study with runs that are told, and models that write the truth."""
  runs = []
  flags = SimpleNamespace(size='cpu', task='left', tries=3, problems=4, inject=False, set=SimpleNamespace(value=[]))
  monkeypatch.setattr(study, 'FLAGS', flags)
  monkeypatch.setitem(study.TABLES, 'cpu', {'LEFT': study.Tables(5, (4, 3), (2, 1))})
  monkeypatch.setattr(study, 'train', lambda argument, folder, seed, *changes: runs.append((argument, folder, changes)))
  monkeypatch.setattr(study.loopformer, 'load', lambda folder: Loaded(folder, None, None, None))
  for name in ('by_loop', 'by_token'):
    def write(model, params, form, some, name=name):
      runs.append((name, model))
      return list(some)

    monkeypatch.setattr(study, name, write)
  return runs


def test_what_is_set_holds_in_every_stage(monkeypatch, tmp_path):
  told = []
  monkeypatch.setattr(study, 'FLAGS', Given())
  monkeypatch.setattr(study.command, 'train', lambda spec, folder, *changes: told.append(configs.load(spec, changes)))
  study.train(',kind=chain', tmp_path, 7, 'train.steps=500', 'optim.schedule.peak=0.5')
  assert (told[0].train.steps, told[0].train.seed, told[0].optim.schedule.peak) == (60, 7, 0.5)


def test_stage_two_merges_by_table_and_writes_once(stage, tmp_path):
  told = study.taught(tmp_path / 'taught', 3, tmp_path / 'loop', tmp_path / 'decoder')
  assert [(row['size'], row['asked'], row['kept']) for row in told] == [(7, 4, 4), (8, 3, 3)]
  sizes = [p.size for p in recorded(tmp_path / 'taught/merged.jsonl')]
  assert len(sizes) == 12 and max(sizes[:5]) <= 6 and sizes[5:] == [7] * 4 + [8] * 3
  assert stage[0] == ('by_loop', tmp_path / 'loop')
  argument, folder, _ = stage[-1]
  assert argument == f',kind=tuned,start={tmp_path / "decoder"},chains={tmp_path / "taught/merged.jsonl"}'
  count = len(stage)
  assert study.taught(tmp_path / 'taught', 3, tmp_path / 'loop', tmp_path / 'decoder') == told
  assert stage[count:] == stage[count - 1:count]  # nothing is written again, and the run goes on


def test_chains_of_other_flags_are_not_taken(stage, tmp_path, monkeypatch):
  """Neither of other --tries, nor of another table; an interrupted stage is made whole, and one of no known flags is
  refused.
  """
  ask = functools.partial(study.taught, tmp_path / 'taught', 3, tmp_path / 'loop', tmp_path / 'decoder')
  told = ask()
  with monkeypatch.context() as changed:
    changed.setattr(study.FLAGS, 'tries', 4)
    with pytest.raises(ConfigError,
                       match='taught: it was made with tries = 3, not with 4; give the same, or another --workdir'):
      ask()
  with monkeypatch.context() as changed:
    changed.setitem(study.TABLES, 'cpu', {'LEFT': study.Tables(5, (4, 2), (2, 1))})
    with pytest.raises(ConfigError, match='made with chains = '):
      ask()
  (tmp_path / 'taught/filled.json').unlink()
  assert ask() == told
  (tmp_path / 'taught/made_with.json').unlink()
  with pytest.raises(ConfigError, match='nothing says with which flags'):
    ask()


@pytest.mark.parametrize('verifier', ['loop', 'truth'])
def test_controls_go_a_size_further_in_every_phase(stage, verifier, tmp_path):
  last, told = study.self_taught(tmp_path, 3, verifier, 'plain', 'decoder')
  assert last == tmp_path / 'phase-2' and [(row['size'], row['kept']) for row in told] == [(7, 2), (8, 1)]
  first, second = (recorded(tmp_path / f'phase-{k}/merged.jsonl') for k in (1, 2))
  assert second[:7] == first and [p.size for p in second[5:]] == [7, 7, 8]
  writers = [entry[1] for entry in stage if entry[0] == 'by_token']
  assert writers == ['decoder', tmp_path / 'phase-1'] and (('by_loop', 'plain') in stage) == (verifier == 'loop')
  trained = [entry for entry in stage if entry[0].startswith(',')]
  assert [f',start={start},' in argument for start, (argument, _, _) in zip(('decoder', tmp_path / 'phase-1'), trained)
          ] == [True, True]
  assert all('train.steps=500' in changes for _, _, changes in trained)


@pytest.mark.parametrize('task, sizes', [('lis', [45, 50]), ('ed', [13, 14, 16])])
def test_controls_have_as_many_phases_as_sizes(stage, task, sizes, tmp_path, monkeypatch):
  """At most: the table of `gpu` has four, of which two tasks have fewer."""
  few = study.Tables(2, (1,) * 4, (1,) * len(study.TABLES['gpu'][task.upper()].kept))
  monkeypatch.setitem(study.TABLES, 'gpu', {task.upper(): few})
  monkeypatch.setattr(study.FLAGS, 'size', 'gpu')
  monkeypatch.setattr(study.FLAGS, 'task', task)
  last, told = study.self_taught(tmp_path, 3, 'truth', 'plain', 'decoder')
  assert last == tmp_path / f'phase-{len(sizes)}' and [row['size'] for row in told] == sizes


@pytest.mark.parametrize('inject', [False, True])
def test_injection_is_of_the_loops_alone(stage, inject, tmp_path, monkeypatch):
  monkeypatch.setattr(study.FLAGS, 'inject', inject)
  monkeypatch.setattr(study, 'measure', lambda folder, kind: {})
  list(study.run_seed(3, tmp_path))
  told = ',inject=1' * inject
  first = [(run[0], run[1].name) for run in stage if run[0].startswith(',') and 'tuned' not in run[0]]
  assert first == [(f',kind=aligned{told}', f'aligned{"-inject" * inject}-3'),
                   (f',kind=vanilla{told}', f'vanilla{"-inject" * inject}-3'), (',kind=chain', 'chain-3')]


def test_what_problems_cost_by_hand():
  """Of a loop, its own tokens and rounds; of a decoder that reads everything once, all but the last token."""
  some = problems(1, 3)  # 4 and 8 tokens; rounds of 1, and of 6, 4 and 1
  block, head = 2 * (4 * D * D + 2 * D * 24), 2 * D * V  # products of layers and heads, a token
  each = [4 * ((block + 4 * D * 4 + head) + head), 8 * (3 * (block + 4 * D * 8 + head) + head)]
  assert study.costs(MODEL, FORM, some, True) == {'MFLOP': round(np.mean(each) / 1e6, 3), 'steps': 2.0}
  plain = [4 * (block + 4 * D * 4 + head), 8 * (3 * (block + 4 * D * 8) + head)]
  assert study.costs(PLAIN, FORM, some, True) == {'MFLOP': round(np.mean(plain) / 1e6, 3), 'steps': 2.0}
  tokens, steps = [4 + 3 - 1, 8 + 13 - 1], [3, 13]  # with the answer and the end
  each = [n * (block + 4 * D * (n + 1) / 2 + head) for n in tokens]
  assert study.costs(WRITER, Chain(of=OF), some, False) == {'MFLOP': round(np.mean(each) / 1e6, 3),
                                                            'steps': np.mean(steps)}


def test_what_is_measured_of_every_size(stage, monkeypatch, tmp_path):
  """Of writers of three truths and a question mark, at sizes of the training and beyond, in rows of their own width."""
  seen = []
  monkeypatch.setattr(study.loopformer, 'load', lambda folder: Loaded(MODEL, None, None, None))
  for name in ('by_loop', 'by_token'):
    monkeypatch.setattr(study, name, lambda model, params, form, some, name=name: seen.append((name, form.of.room)) or [
        *some[:-1], dataclasses.replace(some[-1], answer='?', rounds=())])
  for kind, name in (('aligned', 'by_loop'), ('vanilla', 'by_loop'), ('chain', 'by_token')):
    seen.clear()
    found = study.measure(tmp_path, kind)
    assert list(found) == [f'left {size}' for size in (1, 3, 4, 6, 7, 8)]
    assert seen == [(name, size) for size in (1, 3, 4, 6, 7, 8) for _ in range(2)]  # the first compiles
    assert all(row['answer'] == 0.75 and row['most frequent'] >= 0.25 for row in found.values())
    assert ['chain' in row for row in found.values()] == [kind != 'vanilla'] * 6
    assert ['hits' in row for row in found.values()] == [False] * 5 + [kind != 'vanilla']
    if kind != 'vanilla':
      assert {row['chain'] for row in found.values()} == {0.75} and len(found['left 8']['hits']) == 8
      assert found['left 8']['hits'][7] == [0.75] + [None] * 15
  rows = study.rows_of({'0': {'loop': {'scores': found}}})
  assert [row['size'] for row in rows] == list(found) and rows[0]['answer'] == 0.75 and rows[0]['model'] == 'loop'


def test_the_papers_tables():
  """Sums by the paper: 100,000 problems a task."""
  for name, of in study.PAPER.items():
    assert abs(of.originals + sum(of.written) - 100_000) < 10, name
    assert len(of.written) == len(study.relay.SIZES['paper'].tasks[name.lower()].beyond)
  assert study.PAPER['ED'].written[::9] == (4195, 3636) and study.PAPER['LIS'].written[::19] == (1479, 1198)


def test_the_picture_says_what_its_colours_mean(tmp_path, monkeypatch):
  """A scale beside the maps, and rounds and places in whole numbers."""
  pytest.importorskip('matplotlib')
  figures = []
  monkeypatch.setattr(study.plots, 'save', lambda figure, path, dpi: figures.append(figure))
  scores = {f'left {n}': {'answer': 1.0, 'chain': 0.5, 'hits': np.full((2, 3), 0.25).tolist()} for n in (1, 2)}
  study.draw(tmp_path / 'relay.png', {'0': {name: {'scores': scores} for name in (study.LOOP, study.TUNED)}})
  figure, = figures
  figure.canvas.draw()
  assert figure.axes[-1].get_ylabel() == 'right tokens'
  maps = [axes for axes in figure.axes if axes.get_xlabel() == 'place']
  assert len(maps) == 2 and all(float(tick).is_integer() for axes in maps for tick in axes.get_xticks())
