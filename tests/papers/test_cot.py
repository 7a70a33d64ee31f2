"""To CoT or to loop: thoughts against a loop that appends them, what chains may see, rows of any width, what an answer
costs, the configuration and the studies."""
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import cot_or_loop as paper
from experiments.studies import cot_or_loop as study, cot_sampling
from experiments.tools import costs
import loopformer
from loopformer import config as configs, loop, plans
from loopformer.api import Loaded
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Plain
from loopformer.diffusion.cell import ToldHidden
from loopformer.inference import exits
from loopformer.inference.evaluate import evaluate
from loopformer.inference.measures import Answers
from loopformer.model import Looped, run_batch
from loopformer.nn.attention import ValueEmbed
from loopformer.nn.embed import Head, Tokens, Vectors
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.papers.cot.cell import Thinking
from loopformer.papers.relay.chains import by_token
from loopformer.tasks.counting import Colouring
from loopformer.tasks.generated import Generated, SymbolTokenizer
from loopformer.tasks.reasoning import Asked, Chain
from loopformer.tasks.shortened import Selected
from loopformer.tasks.words import Cyclic, Word
from loopformer.types import ConfigError, Context
from tests import parts
from tests.parts import D

OF = Word(shortest=2, longest=4, group=Cyclic(degree=5))
T = 2
THOUGHTS, CHAIN = Asked(of=OF, thoughts=T), Chain(of=Selected(of=OF, rounds=2))
ROWS, LENGTH = 4, 24  # of caches, so that tests share programs
V = len(THOUGHTS.symbols)
OPTIONS = dict(read_in=Tokens(vocab=V, width=D, length=LENGTH), read_out=Head(outputs=V), remat=loop.KeepAll())
LAYERS = Stack(parts.block(RMSNorm(), position=Rotary()), 1)
THINKER = Looped(cell=Thinking(LAYERS, filler=THOUGHTS.pad, norm=RMSNorm()), loops=T + 1, **OPTIONS)
WRITER = Looped(cell=Plain(LAYERS), loops=1, **OPTIONS)
TWO_WAYS = Looped(cell=Plain(Stack(parts.block(RMSNorm(), position=Rotary(), kernel=Bidirectional()), 1)), loops=2,
                  **OPTIONS)


def problems(*sizes):
  return [OF.draw(np.random.default_rng(i), size) for i, size in enumerate(sizes)]


def batch_of(form, *sizes):
  some = [form.of.draw(np.random.default_rng(i), size) for i, size in enumerate(sizes)]
  return jax.tree.map(jnp.asarray, study.batch_of(form, some))


@functools.partial(jax.jit, static_argnums=(0, 3))
def states(model, weights, batch, steps):
  return run_batch(model, weights, batch, plans.schedule((1 / steps,) * steps)).z


# Thoughts ------------------------------------------------------------------------------------------------------------


def test_thoughts_are_appended_inputs():
  """Every problem by itself, without padding: embeddings, then T times the last state after the norm at the end."""
  weights, batch = parts.params(THINKER), batch_of(THOUGHTS, 2, 4, 3)
  z = states(THINKER, weights, batch, T + 1)
  norm, scales = RMSNorm(), (weights['cell']['norm'], weights['read_out']['norm'])

  @jax.jit
  def last(weights, x):
    pos = jnp.arange(x.shape[1])[None]
    out = LAYERS.apply({'params': weights['cell']['core']}, x, Context(pos=pos), None, None)[0][:, -1:]
    return [norm.apply({'params': own}, out) for own in scales]

  for row, problem in zip((0, 2), (problems(2)[0], problems(2, 4, 3)[2])):
    x = weights['read_in']['embedding'][np.array([THOUGHTS.ids(problem.prompt)])]
    for _ in range(T):
      x = np.concatenate([x, last(weights, x)[0]], 1)
    place = int(np.flatnonzero(batch['weights'][row])[0])
    assert x.shape[1] == len(problem.prompt) + T == place + 1
    np.testing.assert_allclose(z[row, place], last(weights, x)[1][0, 0], atol=2e-5)


def test_without_thoughts_it_is_the_decoder():
  form = Asked(of=OF)
  batch = batch_of(form, 2, 4, 3)
  plain = {**parts.params(THINKER), 'cell': {'core': parts.params(THINKER)['cell']['core']}}
  place = study.asked({'weights': np.asarray(batch['weights'])})
  one, other = (states(model, weights, batch, 1)[jnp.arange(3), place]
                for model, weights in ((THINKER, parts.params(THINKER)), (WRITER, plain)))
  np.testing.assert_allclose(one, other, atol=1e-6)


def test_gradients_reach_the_problem_through_thoughts_alone():
  """Those of inputs that are appended, through all thoughts; and no answer that is read reads a filler."""
  weights, batch = parts.params(THINKER), batch_of(THOUGHTS, 3)
  ids, along = np.array(THOUGHTS.ids(problems(3)[0].prompt)), np.arange(1.0, D + 1)

  def loss(weights):
    z = run_batch(THINKER, weights, batch, plans.schedule((1 / (T + 1),) * (T + 1))).z
    return (z * batch['weights'][..., None] * along).sum()

  def appended(weights):
    x = weights['read_in']['embedding'][ids][None]
    for k in range(T + 1):
      pos = jnp.arange(x.shape[1])[None]
      out = LAYERS.apply({'params': weights['cell']['core']}, x, Context(pos=pos), None, None)[0][:, -1:]
      own = weights['cell']['norm'] if k < T else weights['read_out']['norm']
      x = jnp.concatenate([x, RMSNorm().apply({'params': own}, out)], 1)
    return (x[0, -1] * along).sum()

  grads, wanted = (jax.jit(jax.grad(of))(weights) for of in (loss, appended))
  parts.close(grads, wanted, 1e-4)
  assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(wanted['cell']))  # the norm is of thoughts alone
  table = grads['read_in']['embedding']
  assert np.abs(table[THOUGHTS.pad]).max() == 0 and all(np.abs(table[i]).max() > 0 for i in ids)


@pytest.mark.parametrize('cell', [THINKER.cell, Damped(Halting(THINKER.cell))], ids=['alone', 'within others'])
def test_no_place_of_a_thought_is_let_go_before_it_comes(cell):
  """A filler that an exit had let go kept its state, and took no thought."""
  exit_policy = exits.Adaptive(rule=exits.StateChange())
  with pytest.raises(ConfigError,
                     match=r"model\.cell = \w+: its steps write to other tokens' states.*leave the exit out"):
    exits.check(THINKER.clone(cell=cell), exit_policy, 'exit')


@pytest.mark.parametrize('name, cell', [
    ('model.cell = Thinking', THINKER.cell), ('model.cell = ToldHidden', ToldHidden(parts.plain(1), D)),
    ('attn.values = ValueEmbed', parts.plain(1, position=Rotary(), values=ValueEmbed(vocab=V, features=4)))])
def test_vectors_have_no_ids(name, cell):
  model = parts.looped(cell, read_in=Vectors(inputs=3, width=D, length=8), read_out=Head(outputs=2))
  with pytest.raises(ConfigError, match=f'{name}: it reads the ids of tokens, and model.read_in takes vectors'):
    parts.shapes(model)


def test_what_stands_in_another_segment_moves_no_thought():
  weights, batch = parts.params(THINKER), batch_of(THOUGHTS, 2, 3)
  plan = plans.schedule((1 / (T + 1),) * (T + 1))
  other = {**batch, 'tokens': jnp.where(batch['segments'] == 0, 1, batch['tokens'])}
  assert (other['tokens'] != batch['tokens']).any()
  one, same = (run_batch(THINKER, weights, made, plan).z * batch['weights'][..., None] for made in (batch, other))
  np.testing.assert_array_equal(one, same)


def test_thoughts_are_not_decoded():
  with pytest.raises(ConfigError, match='model.cell = Thinking: its thoughts are made within one pass'):
    THINKER.apply({'params': parts.params(THINKER)}, jnp.zeros((1, 1), jnp.int32), plans.schedule((1.0,)),
                  kv=THINKER.cache(1, 4), pos=jnp.zeros((1, 1), jnp.int32))


def test_thoughts_need_places():
  """Of a problem alone every loop would answer the same; and what has room for the thoughts is taken."""
  weights, ids = parts.params(THINKER), THOUGHTS.ids(problems(3)[0].prompt)
  full = [*ids, *[THOUGHTS.pad] * T]
  logits = loopformer.trace(THINKER, weights, [full]).logits[:, 0]
  assert all(np.abs(logits[k + 1, len(ids) + k] - logits[k, len(ids) + k]).max() > 1e-4 for k in range(T))
  batch = study.batch_of(THOUGHTS, problems(2, 4, 3))
  for tokens, steps in (([ids], None), ([full[:-1]], None), ([full], T + 2), ([[THOUGHTS.pad] * 4], 2),
                        ([full[::-1]], 2), ([full, full[1:] + full[:1]], 2)):
    for ask in (loopformer.trace, loopformer.logits):
      with pytest.raises(ConfigError, match=r'tokens: row \d has \d tokens of a problem and \d fillers'):
        ask(THINKER, weights, tokens, steps=steps)
  evaluate(THINKER, weights, [batch], {'all': plans.resolve(T + 1)}, measure=Answers())
  with pytest.raises(ConfigError, match='row 0 has 3 tokens of a problem and 2 fillers .* puts 3 thoughts'):
    evaluate(THINKER, weights, [batch], {'more': plans.resolve(T + 2)}, measure=Answers())
  around = THINKER.clone(cell=Damped(THINKER.cell, 0.5))
  with pytest.raises(ConfigError, match='puts 2 thoughts'):
    loopformer.trace(around, weights, [ids])


@pytest.mark.parametrize('changed, names',
                         [({'kernel': Bidirectional()}, 'not causal'), ({'position': None}, 'no positions')],
                         ids=['both ways', 'no positions'])
def test_layers_that_cannot_think_are_refused(changed, names):
  THINKER.cell.check(D)
  layer = parts.block(RMSNorm(), **{'position': Rotary(), **changed})
  with pytest.raises(ConfigError, match=f'a layer of Thinking .*{names}'):
    THINKER.cell.clone(core=Stack(layer, 1)).check(D)


# Chains and rows -----------------------------------------------------------------------------------------------------


def test_a_chain_never_sees_its_answer():
  """What is asked for is no input at or before its place: other answers, the same states up to where they are told."""
  weights, batch = parts.params(WRITER), batch_of(CHAIN, 3, 4)
  z = states(WRITER, weights, batch, 1)
  for place in range(int(np.flatnonzero(batch['weights'][0])[0]), CHAIN.length - 1):
    other = batch['tokens'].at[:, place + 1:].set((batch['tokens'][:, place + 1:] + 1) % V)
    moved = np.abs(states(WRITER, weights, {**batch, 'tokens': other}, 1) - z).max((0, 2))
    assert moved[:place + 1].max() < 1e-6 < 1e-4 < moved[place + 1]


def test_chains_are_decoded_as_they_are_scored():
  """Greedily with the cache, and by one pass over all that has been written, token by token."""
  weights = parts.params(WRITER)
  some = problems(2, 4, 3, 4)
  for problem, written in zip(some, by_token(WRITER, weights, CHAIN, some, rows=ROWS)):
    ids = CHAIN.ids(problem.prompt)
    told = CHAIN.ids((*written.rounds[0], *[written.answer] * bool(written.answer)))
    row = np.full((1, LENGTH), CHAIN.pad)
    row[0, :len(ids) + len(told)] = ids + told
    batch = {'tokens': row, 'positions': np.arange(LENGTH)[None]}
    own = WRITER.apply({'params': weights}, states(WRITER, weights, batch, 1), method='logits')[0].argmax(-1)
    assert own[len(ids) - 1:len(ids) + len(told) - 1].tolist() == told


def test_answers_do_not_depend_on_the_width_of_rows():
  place = [3 - 1, 5 - 1, 4 - 1]
  for model, form in ((TWO_WAYS, Asked(of=OF)), (THINKER, THOUGHTS)):
    at = np.array(place) + form.thoughts
    longer = Asked(of=OF, thoughts=form.thoughts, length=11)
    one, other = (states(model, parts.params(model), batch_of(f, 2, 4, 3), model.loops)[jnp.arange(3), at]
                  for f in (form, longer))
    np.testing.assert_allclose(one, other, atol=1e-5)


# Costs ---------------------------------------------------------------------------------------------------------------


def test_costs_are_counted_by_hand():
  weights = parts.params(WRITER)
  prompts = [CHAIN.ids(problem.prompt) for problem in problems(*[4] * ROWS)]
  cost = costs.of_chain(WRITER, weights, SymbolTokenizer(CHAIN.symbols), prompts, written=6, most=LENGTH - 5, repeats=1)
  tokens = 5 + 6 - 1
  layer = 2 * (4 * D * D + 2 * D * 24) + 4 * D * (tokens + 1) / 2  # products; attention, half of it before a token
  assert cost.flops == pytest.approx(tokens * (layer + 2 * D * V)) and cost.steps == 6 and cost.milliseconds > 0
  batch = batch_of(Asked(of=OF), 4, 4)
  context = parts.plan_context(jax.random.key(0), {**batch, 'loops': jnp.array([1, 2])})
  plan = plans.Given(most=3)(context)  # the deeper of the two, whatever rows there are
  cost = costs.of_pass(TWO_WAYS, parts.params(TWO_WAYS), batch, plan, repeats=1)
  layer = 2 * (4 * D * D + 2 * D * 24) + 4 * D * 5  # which reads all of it
  assert cost.flops == pytest.approx(5 * (2 * layer + 2 * D * V)) and cost.steps == 2 and cost.milliseconds > 0
  with pytest.raises(ConfigError, match='repeats = 0'):
    costs.of_pass(TWO_WAYS, parts.params(TWO_WAYS), batch, plans.schedule((0.5, 0.5)), repeats=0)


def test_times_are_medians_after_a_first_call(monkeypatch):
  clock, calls = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0]), []
  monkeypatch.setattr(costs.time, 'perf_counter', lambda: next(clock))
  assert costs._milliseconds(lambda: calls.append(1), 3) == 3000 and len(calls) == 4


# The configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', paper.SIZES['cpu'].tasks)
def test_every_kind_of_every_task_can_be_built(task):
  for size in paper.SIZES:
    for kind in paper.KINDS:
      configs.check(paper.get_config(f'{size},kind={kind},task={task}'))


def test_kinds_share_their_block():
  of = {kind: paper.get_config(f'cpu,kind={kind},task=connectivity').model for kind in paper.KINDS}
  blocks = {kind: model.cell.core.block for kind, model in of.items()}
  assert blocks['chain'] == blocks['thought'] and blocks['chain'].mlp == blocks['loop'].mlp
  assert [blocks[kind].attn.kernel.causal for kind in paper.KINDS] == [True, False, False, True]
  assert paper.get_config('cpu,kind=loop,task=word').model.cell.core.block.attn.kernel.causal  # asked at every prefix
  assert of['thought'].loops == 9 and of['loop'].loops == 8 and of['chain'].loops == 1


def test_loops_of_the_published_size_grow_to_it():
  config = paper.get_config('paper,kind=loop,task=connectivity')
  at = [config.task.grow.at(config.task.of, index).of.longest for index in
        (0, config.train.steps * config.train.batch - 1)]
  assert at == [4, 32]
  assert paper.get_config('cpu,task=edit,internalise=50').task.grow.at(
      paper.get_config('cpu,task=edit,internalise=50').task.of, 50 * 64).of.stage == 2


@pytest.mark.parametrize('argument, message', [
    ('cpu,steps=-1', 'config argument steps = -1: must be 0 or more'), ('cpu,steps=many', 'must be a whole number'),
    ('cpu,kind=loop,steps=0', 'steps = 0: must be 1 or more'), ('cpu,task=nonsense', "task = 'nonsense'"),
    ('cpu,kind=cot', "kind = 'cot'"), ('cpu,inject=1', 'inject = 1: give 0, or 1 with kind=loop'),
    ('cpu,kind=loop,internalise=5', 'internalise = 5: it takes whole chains apart'),
    ('cpu,steps=2,internalise=5', 'leave out steps'), ('cpu,internalise=-1', 'internalise = -1')])
def test_arguments_that_cannot_be_used(argument, message):
  with pytest.raises(ConfigError, match=message):
    paper.get_config(argument)


def test_a_filler_is_an_id():
  config = paper.get_config('cpu,kind=thought')
  assert config.model.cell.filler == config.task.of.pad
  with pytest.raises(ConfigError, match='model.cell.filler = -1'):
    configs.check(configs.override(config, 'model.cell.filler=-1'))


# The studies ---------------------------------------------------------------------------------------------------------


STUDIES = ['experiments.compare', *(f'experiments.studies.{file.stem}'
                                    for file in sorted((parts.ROOT / 'experiments/studies').glob('[!_]*.py')))]


FLAGS_OF_STUDIES = """
import importlib, inspect, sys
from absl import flags
modules = [importlib.import_module(name) for name in sys.argv[1:]]
before = set(flags.FLAGS)
for module in modules:
  if 'define_flags' in vars(module) and 'check_command' in inspect.getsource(module):  # others stand alone
    module.define_flags()
  for flag in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, flag)
print('all')
"""


def test_studies_define_flags_of_their_own():
  """Beside those of experiments.main, which they import, and not as they are imported: one process imports them all."""
  assert len(STUDIES) > 20 and parts.python(FLAGS_OF_STUDIES, *STUDIES).split()[-1] == 'all'


def config_of(form, model):
  return SimpleNamespace(task=Generated(of=form, held_out=8), model=model)


def test_problems_that_are_timed_together_are_as_many_as_said():
  batch = study.costs.rows({'tokens': np.arange(6).reshape(3, 2), 'size': np.arange(3)}, 7)
  assert batch['size'].tolist() == [0, 1, 2, 0, 1, 2, 0] and batch['tokens'].shape == (7, 2)
  assert study.costs.rows(batch, 2)['size'].tolist() == [0, 1]


def test_arms_have_names():
  for text in ('chain-0', 'loop-8-inject', 'thought-12'):
    assert study.arm(text).name == text
  for text in ('chain', 'cot-4', 'loop-x', 'loop-8-injected', 'chain--1', 'chain-²'):
    with pytest.raises(ConfigError, match='--arms has'):
      study.arm(text)


@pytest.mark.parametrize('name, form, model', [('chain-2', CHAIN, WRITER), ('thought-2', THOUGHTS, THINKER)])
def test_what_the_study_measures(name, form, model, monkeypatch, tmp_path):
  """Shares that a count by hand gives too, of random parameters, and a table and a plot of them."""
  weights = parts.params(model)
  monkeypatch.setattr(study.loopformer, 'load', lambda folder: Loaded(model, weights, None, config_of(form, model)))
  monkeypatch.setattr(study, 'TOGETHER', ROWS)
  monkeypatch.setattr(study.costs, '_milliseconds', lambda call, repeats: 1.0)
  row = study.measure(study.arm(name), tmp_path, 8)
  source = study.draws(form.of, 'measured', OF.longest)
  some = [next(source) for _ in range(8)]
  if form is CHAIN:
    own = [written.answer for written in by_token(model, weights, form, some, rows=ROWS)]
  else:
    batch = study.batch_of(form, some)
    logits = model.apply({'params': weights}, states(model, weights, batch, T + 1), method='logits')
    own = [form.symbols[i] for i in logits[jnp.arange(8), study.asked(batch)].argmax(-1)]
  assert row['right'] == np.mean([a == problem.answer for a, problem in zip(own, some)])
  assert row['ms'] == 1.0 and (row['steps'] == T + 1 if form is THOUGHTS else 2 <= row['steps'] <= 7)
  results = {'word': {'0': {name: row}, '1': {name: row}}}
  assert [told['seed'] for told in study.rows_of(results)] == ['0', '1']
  if form is CHAIN:
    study.draw(tmp_path / 'plot.png', results)


def test_the_loop_of_the_sampling_study_has_one_answer():
  rows = cot_sampling.told('loop', [(0, 1, 2)] * 5, ((0, 1, 2), (0, 2, 1)))
  assert rows == {'way': 'loop', 'samples': 5, 'total variation': 0.5, 'proper': 1.0}


def test_what_is_said_of_colourings(monkeypatch, tmp_path):
  """A decoder that writes all colourings alike often, and a loop whose head is sure of one."""
  of = Colouring(shortest=3, longest=3)
  forms = {'chain': Chain(of=of), 'loop': Asked(of=of)}
  flat = np.where([of.coloured(symbol) == (2, 0, 4) for symbol in forms['loop'].symbols], 50.0, 0.0)
  specs = []
  monkeypatch.setattr(cot_sampling, 'FLAGS', type('Flags', (), {
      'seed': 3, 'samples': 600, 'together': 8, '__getitem__': lambda self, name: SimpleNamespace(value=[])})())
  monkeypatch.setattr(cot_sampling.command, 'train', lambda spec, folder, *changes: specs.append((spec, changes)))
  monkeypatch.setattr(cot_sampling.loopformer, 'load', lambda folder: Loaded(
      None, None, None, config_of(forms[folder.name.split('-')[1]], None)))
  asked = {}
  monkeypatch.setattr(cot_sampling, 'generate', lambda model, params, tokenizer, prompts, **options: asked.update(
      options, prompts=prompts) or [f'0 1 2 {"-".join(map(str, of.proper[i % 60]))}' for i in range(len(prompts))])
  monkeypatch.setattr(cot_sampling, 'logits', lambda model, params, batch, place: flat[None])
  rows = {row['way']: row for row in cot_sampling.colourings(tmp_path)}
  assert asked.pop('prompts') == [forms['chain'].ids('0 1 | 0 2 | 1 2 | <sep>'.split())] * 600
  assert asked == {'temperature': 1.0, 'seed': 3, 'max_new_tokens': 3 * 6 + 2, 'rows': 8}
  assert [spec.split(':')[1] for spec, _ in specs] == ['cpu,task=colouring,kind=chain,steps=40',
                                                       'cpu,task=colouring,kind=loop,steps=4']
  assert all(changes == ('train.seed=3',) for _, changes in specs)
  assert rows['decoder, sampled chains']['total variation'] < 1e-9 and rows['decoder, sampled chains']['samples'] == 600
  for name in ('loop, its answer', 'loop, samples from its head'):
    assert rows[name]['total variation'] == pytest.approx(59 / 60) and rows[name]['proper'] == 1
  assert 0.05 < rows['exact uniform samples']['total variation'] < 0.2 < rows['exact chains']['total variation']


def test_the_error_of_counts_falls_and_that_of_the_published_code_does_not(monkeypatch):
  monkeypatch.setattr(cot_sampling, 'FLAGS', SimpleNamespace(seed=0, formulas=4))
  monkeypatch.setattr(cot_sampling, 'TRIALS', (30, 1000))
  rows = cot_sampling.counts()
  kept, published = rows[:2], rows[2:]
  assert kept[0]['relative error'] > 2 * kept[1]['relative error'] and kept[1]['bias'] == 0
  assert published[1]['relative error'] > 0.5 * published[1]['bias'] > 0.03
