"""Masked diffusion with models: what is learned and measured, what requests get, loops as layers, and wrong uses."""
import dataclasses
import math
import sys
from types import SimpleNamespace

from absl.testing import flagsaver
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main
from experiments.studies import denoising as study, denoising_words
from experiments.tools import ahead
import loopformer
from loopformer import config as configs, memories, plans
from loopformer.api import Loaded
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.diffusion import orders
from loopformer.diffusion.cell import ToldHidden
from loopformer.diffusion.likelihood import Bounds
from loopformer.diffusion.measures import Bound
from loopformer.diffusion.noise import Masking, check_model
from loopformer.diffusion.sampler import Denoiser, Denoising, Network, Rows
from loopformer.diffusion.terms import NELBO
from loopformer.inference import harness
from loopformer.inference.evaluate import evaluate
from loopformer.inference.measures import Answers
from loopformer.loop import Last
from loopformer.model import Looped, init_params, parameter_shapes
from loopformer.nn.embed import Head, TokenEmbed, Vectors
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.sharding import Mesh
from loopformer.tasks.generated import Generated, SymbolTokenizer
from loopformer.tasks.reasoning import Slots
from loopformer.tasks.sudoku import Sudoku, valid
from loopformer.tasks.words import Cyclic, Word
from loopformer.terms.cross_entropy import CE
from loopformer.training.checkpoint import Checkpoints
from loopformer.training.train import _started
from loopformer.types import ConfigError, PlanContext
from tests import parts

TASK = Generated(of=Sudoku(), held_out=24, measure=Bound(mask=5, draws=2))
TOKENIZER = SymbolTokenizer(Sudoku().symbols)
V = MASK = 5
BLOCK = parts.block(RMSNorm(), kernel=Bidirectional())
OPTIONS = dict(read_in=TokenEmbed(vocab=V + 1, width=parts.D, length=16, std=1.0), read_out=Head(outputs=V, std=1.0),
               loops=4, sampler=Denoising(steps=4))
MODEL = Looped(cell=Recur(Stack(BLOCK, 1), Add()), **OPTIONS)
PARAMS = init_params(MODEL, jax.random.key(0))
AR = Looped(cell=Plain(Stack(parts.block(RMSNorm()), 1)), read_in=TokenEmbed(vocab=V, width=parts.D, length=17),
            loops=1)


def batches(count=1, rows=8):
  source = TASK.source('validation', 0)
  examples = [source[i] for i in range(count * rows)]
  return [{name: np.stack([e[name] for e in examples[i * rows:(i + 1) * rows]]) for name in examples[0]}
          for i in range(count)]


def ids_of(served):
  return [ids for _, ids in served.finished()]


def denoiser(model=MODEL, params=PARAMS, **options):
  return Denoiser(model, params, TOKENIZER, **{'rows': 4, **options})


# What is learned and measured ----------------------------------------------------------------------------------------


def uniform(model):
  """Parameters of a head that answers all alike."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf * ('read_out' not in jax.tree_util.keystr(path)),
                                          PARAMS)


def test_the_term_is_the_weighted_loss_of_hidden_tokens_over_all():
  objective = Objective(rolls={'all': Rollout(plans.Uniform(2))}, prepare=Masking(mask=MASK),
                        terms={'bound': Weighted(1.0, NELBO(roll='all'))})
  batch = {name: jnp.asarray(leaf) for name, leaf in batches()[0].items()}
  context = objective.prepared(PlanContext(key=jax.random.key(1), step=jnp.int32(0), stage=jnp.int32(0), batch=batch))
  made = context.batch
  loss, shares = objective(MODEL, PARAMS, context, objective.denominators(made))
  trace = parts.forward(MODEL, PARAMS, made['tokens'], plans.Uniform(2)(None), None, Last(), made['positions'])
  log_p = jax.nn.log_softmax(parts.logits(MODEL, PARAMS, trace.z))
  nll = -jnp.take_along_axis(log_p, batch['targets'][..., None], -1)[..., 0]
  np.testing.assert_allclose(loss, (nll * made['weights']).sum() / (8 * 16), rtol=1e-4)
  assert (made['tokens'] == MASK).any() and log_p.shape[-1] == V  # MASK has no probability
  assert shares['bound'] == loss


def test_the_bound_of_a_uniform_model_is_log_v_at_every_depth():
  rows = evaluate(MODEL, uniform(MODEL), batches(2), {'1': (1.0,), '2': (0.5, 0.5)}, None, TASK.measure)
  for row in rows:
    assert row['loss'] == pytest.approx(math.log(V), rel=1e-4) and row['error'] < 1e-3
    assert row['tokens'] == 2 * 8 * 16 and 'bits_per_byte' not in row  # the cells of grids are no text
    assert row['perplexity'] == pytest.approx(V, rel=1e-3)


def test_what_is_asked_depends_on_sequence_and_place_alone():
  batch = batches()[0]
  batch['row'] = np.arange(8, dtype=np.int32)
  whole = TASK.measure.asked(batch)
  half = TASK.measure.asked({name: leaf[4:] for name, leaf in batch.items()})
  assert whole['tokens'].shape == (16, 16)
  np.testing.assert_array_equal(whole['tokens'][8:], half['tokens'])
  count = np.asarray((whole['tokens'] == MASK).sum(-1))
  np.testing.assert_allclose((whole['weights']).sum(-1), 16, rtol=1e-5)
  assert count.min() >= 1 and len(set(count.tolist())) > 4
  first = count.reshape(8, 2)
  assert (np.abs(first[:, 0] - first[:, 1]) == 8).all()  # two draws, half of 16 apart
  given = np.tile(np.arange(16) < 5, (8, 1)).astype(np.float32)
  clues = TASK.measure.asked({**batch, 'weights': given})
  assert (np.asarray(clues['tokens'])[:, 5:] == np.repeat(batch['targets'], 2, 0)[:, 5:]).all()


def test_bits_a_byte_count_what_may_be_hidden():
  lengths = np.array([1, 2, 3, 4, 0], np.int32)
  row, = evaluate(MODEL, uniform(MODEL), batches(), {'1': (1.0,)}, lengths, Bound(mask=MASK))
  size = lengths[batches()[0]['targets']].sum()
  assert row['bits_per_byte'] == pytest.approx(math.log2(V) * 8 * 16 / size, rel=1e-4)


def test_the_layers_may_hear_how_much_is_hidden():
  told = MODEL.clone(cell=ToldHidden(MODEL.cell, width=parts.D, mask=MASK))
  params = init_params(told, jax.random.key(0))
  plan, tokens = plans.schedule((1.0,)), jnp.array([[0, 1, 2, MASK] * 4])
  shape = jax.tree.map(lambda leaf: leaf.shape, params['cell'])
  assert 'told' in shape and shape['core'] == jax.tree.map(lambda leaf: leaf.shape, PARAMS['cell']['core'])

  def z(params, tokens, seg=None):
    return parts.forward(told, params, tokens, plan, seg).z

  loud = {**params, 'cell': {**params['cell'], 'told': jax.tree.map(lambda leaf: leaf + 1.0, params['cell']['told'])}}
  assert jnp.abs(z(loud, tokens) - z(params, tokens)).max() > 1e-3
  padded = jnp.pad(tokens[:, :8], ((0, 0), (0, 8)), constant_values=MASK)  # padding is not hidden
  seg = (jnp.arange(16) < 8).astype(jnp.int32)[None]
  np.testing.assert_allclose(z(loud, padded, seg)[:, :8], z(loud, tokens[:, :8]), atol=2e-5)


# Requests ------------------------------------------------------------------------------------------------------------


def test_a_request_does_not_depend_on_its_neighbours_or_on_the_length_of_rows():
  prompts = ['1 2 3', '', '1 <mask:2> 4', '2 1', '4']
  served = denoiser()
  for number, prompt in enumerate(prompts):
    served.submit(prompt, max_new_tokens=6, steps=2 + number, budget=1 + number % 4, number=number, seed=3)
  made = ids_of(served)
  for number, prompt in reversed(list(enumerate(prompts))[:3]):
    alone = denoiser(length=10)
    alone.submit(prompt, max_new_tokens=6, steps=2 + number, budget=1 + number % 4, number=number, seed=3)
    assert ids_of(alone) == [made[number]]
  assert made[2][0] == 0 and made[2][3] == 3 and [len(ids) for ids in made] == [9, 6, 4, 8, 7]
  assert all(0 <= id_ < V for ids in made for id_ in ids)
  assert served.stats['passes'] == sum(range(2, 7)) and served.stats['tokens'] == 4 * 6 + 2
  assert served.stats['loops'] == pytest.approx((2 * 1 + 3 * 2 + 4 * 3 + 5 * 4 + 6 * 1) / 20)


def test_seeds_tell_requests_apart_and_repeat_them():
  served = denoiser()
  for seed in (0, 1, 0):
    served.submit('', seed=seed)
  one, other, again = ids_of(served)
  assert one == again != other


def test_the_public_function_serves_denoisers():
  texts = loopformer.generate(MODEL, PARAMS, TOKENIZER, ['1 2', '<mask:3>'], max_new_tokens=3, temperature=0.0,
                              budget=2)
  assert len(texts) == 2 and len(texts[1].split()) <= 3
  assert loopformer.generate(MODEL, PARAMS, TOKENIZER, ['1 2'], max_new_tokens=3, temperature=0.0,
                             budget=2) == texts[:1]


def test_the_public_function_writes_as_many_tokens_as_fit():
  """As the command line, where it is not told how many: all positions after the prompt."""
  text, = loopformer.generate(MODEL, PARAMS, TOKENIZER, ['1 2'], temperature=0.0, budget=2)
  served = denoiser(rows=1)
  served.submit('1 2', temperature=0.0, budget=2)
  assert served.stats['tokens'] == 0 and served.run() == [text] and served.stats['tokens'] == 14


def test_text_ends_before_an_end_and_at_a_stop():
  served = denoiser()
  number = served.submit('1 2', max_new_tokens=4, stop=['3'])
  request = served._waiting[0]
  assert number == 0
  assert served._text(request, [0, 1, 3, 0, 4, 3]) == ' 4 1'  # 4 is the symbol that ends
  assert served._text(request, [0, 1, 3, 2, 0, 3]) == ' 4 '
  assert request.ids == [0, 1] + [MASK] * 4


def test_holes_never_become_what_a_text_does_not_show():
  """Ends are for continuations, and other special tokens too. Of answers that are all alike one in five would be an
  end.
  """
  class Special(SymbolTokenizer):
    def specials(self):
      return {'bos_token': 2}

  def made(tokenizer, prompt, **options):
    served = Denoiser(MODEL, uniform(MODEL), tokenizer, rows=4)
    for seed in range(4):
      served.submit(prompt, steps=4, budget=1, seed=seed, **options)
    return np.array(ids_of(served))

  filled = made(TOKENIZER, '1 <mask:14> 2')
  assert set(filled[:, 1:-1].ravel()) == {0, 1, 2, 3} and (filled[:, [0, -1]] == [0, 1]).all()
  assert set(made(Special(Sudoku().symbols), [MASK] * 16).ravel()) == {0, 1, 3}
  assert set(made(TOKENIZER, '1 2', max_new_tokens=14)[:, 2:].ravel()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize('prompt, known', [
    ('<mask> <mask:2>', [None, 32, None, None]), ('a<mask>\n<mask>', [97, None, 10, None]), ('<mask>\t', [None, 9]),
    (' <mask>', [32, None]), ('<mask><mask>', [None, None]), (' ', [32])])
def test_white_space_beside_holes_is_text(prompt, known):
  """Of a tokenizer that has it; one of symbols reads none."""
  model = dataclasses.replace(MODEL, read_in=TokenEmbed(vocab=258, width=parts.D, length=16),
                              read_out=Head(outputs=257))
  served = Denoiser(model, PARAMS, ByteTokenizer())
  assert served.encode(prompt) == [257 if id_ is None else id_ for id_ in known]
  assert denoiser().encode('<mask> 1\n<mask>\t') == [MASK, 0, MASK]


def test_long_runs_are_told_of(monkeypatch):
  told = []
  monkeypatch.setattr('loopformer.diffusion.sampler.AT_ONCE', 2)
  monkeypatch.setattr('loopformer.diffusion.sampler.EVERY', 0.0)
  served = denoiser(log=told.append)
  served.submit('', steps=5, seed=7)
  made = ids_of(served)
  assert told[0] == '  denoised 2/5 steps'
  monkeypatch.undo()
  whole = denoiser()
  whole.submit('', steps=5, seed=7)
  assert made == ids_of(whole)


# Loops ---------------------------------------------------------------------------------------------------------------


def test_loops_of_a_block_are_tied_layers():
  looped = MODEL.clone(cell=Plain(Stack(BLOCK, 1)))
  stacked = MODEL.clone(cell=Plain(Stack(BLOCK, 3)), loops=1)
  params = init_params(looped, jax.random.key(2))
  tied = {**params, 'cell': jax.tree.map(lambda leaf: jnp.repeat(leaf, 3, 0), params['cell'])}
  shapes = parameter_shapes(stacked)
  assert jax.tree.map(lambda leaf: leaf.shape, tied) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  texts = []
  for model, own, budget in ((looped, params, 3), (stacked, tied, 1)):
    served = Denoiser(model, own, TOKENIZER, rows=2, loops=budget)
    for prompt in ('1 2 3 4', '1 <mask:14> 2'):
      served.submit(prompt, budget=budget, steps=5, temperature=0.0)
    texts.append(ids_of(served))
  assert texts[0] == texts[1]


def network(guidance, model=MODEL):
  served = Denoiser(model, PARAMS, TOKENIZER, rows=1)
  served.submit('1 2 3 4', steps=3, budget=2)
  rows = Rows(**{name: jnp.asarray(leaf) for name, leaf in vars(served._rows(served._waiting)).items()})
  moment = SimpleNamespace(active=jnp.ones(1, bool))

  @jax.jit
  def predict(tokens):
    return Network(model, PARAMS, rows.plan, rows.segments, rows.asked, MASK, guidance)(tokens, None, moment)[0]

  return predict(rows.tokens), predict(jnp.where(rows.asked, rows.tokens, MASK))


def test_guidance_is_by_what_the_prompt_changes():
  conditional, unconditional = network(0.0)
  ours, none = network(1.5)
  np.testing.assert_allclose(ours, unconditional + 2.5 * (conditional - unconditional), atol=1e-4)
  np.testing.assert_allclose(none, unconditional, atol=1e-4)
  assert jnp.abs(conditional - unconditional).max() > 1e-2


# The harness ---------------------------------------------------------------------------------------------------------


def test_likelihoods_are_bounds_and_exact_for_one_token():
  scorer = MODEL.sampler.score(MODEL, PARAMS, TOKENIZER, steps=2, batch=2, draws=3)
  assert isinstance(scorer, Bounds) and scorer.likelihood == 'bound'
  (one, likeliest), (several, _) = scorer.loglikelihood([('1 2 3', ' 4'), ('1 2', ' 3 4 1')])
  tokens = jnp.array([[0, 1, 2, MASK]])
  trace = parts.forward(MODEL, PARAMS, tokens, plans.schedule((0.5, 0.5)))
  log_p = jax.nn.log_softmax(parts.logits(MODEL, PARAMS, trace.z))[0, 3]
  assert one == pytest.approx(float(log_p[3]), rel=1e-4) and likeliest == (int(log_p.argmax()) == 3)
  assert scorer.mean_loops == 2 and several < 0
  flat = Bounds(MODEL, uniform(MODEL), TOKENIZER, steps=2, batch=2, draws=3)
  (score, _), = flat.loglikelihood([('1 2', ' 3 4 1')])
  assert score == pytest.approx(-3 * math.log(V), rel=1e-4)
  assert flat.rolling(['1 2 3 4 1 2 3 4']) == [pytest.approx(-8 * math.log(V), rel=1e-4)]


def test_the_likeliest_is_an_id_of_the_tokenizer():
  """Heads may be wider, and what they answer beyond is none of its texts."""
  tokens = jnp.array([[0, 1, 2, MASK]])
  logits = parts.logits(MODEL, PARAMS, parts.forward(MODEL, PARAMS, tokens, plans.schedule((0.5, 0.5))).z)[0, 3]
  best = int(logits.argmax())
  second = int(logits[:best].argmax())
  assert best > 0  # else there is nothing to test
  scorer = MODEL.sampler.score(MODEL, PARAMS, SymbolTokenizer(Sudoku().symbols[:best]), steps=2, batch=2, draws=3)
  (_, likeliest), _ = scorer.score([([0, 1, 2], [second])] * 2)
  assert likeliest


# Wrong uses ----------------------------------------------------------------------------------------------------------


def with_(**changes):
  return MODEL.clone(**changes)


@pytest.mark.parametrize('model, mask, names', [
    (MODEL, 4, 'mask = 4: the model answers ids 0 to 4'),
    (with_(read_in=TokenEmbed(vocab=V, width=parts.D, length=16)), 5, 'read_in.vocab = 5'),
    (with_(cell=Plain(Stack(parts.block(RMSNorm()), 1))), 5, 'model.loop: a layer is causal'),
    (with_(prelude=Stack(parts.block(RMSNorm()), 1)), 5, 'model.prelude: a layer is causal'),
    (with_(coda=Stack(parts.block(RMSNorm()), 1)), 5, 'model.coda: a layer is causal'),
    (with_(read_in=Vectors(inputs=2, width=parts.D, length=16)), 5, 'vectors')],
                         ids=['inside', 'unread', 'causal', 'prelude', 'coda', 'vectors'])
def test_models_that_are_no_denoisers_are_refused(model, mask, names):
  with pytest.raises(ConfigError, match=names):
    check_model(model, mask)


def test_a_configuration_is_checked_before_anything_runs():
  config = configs.load('masked_diffusion:cpu')
  configs.check(config)
  wrong = dataclasses.replace(config, objective=dataclasses.replace(config.objective, prepare=Masking(mask=3)))
  with pytest.raises(ConfigError, match='mask = 3'):
    configs.check(wrong)
  for measure, names in ((Answers(), 'Answers: it hides no tokens'),
                         (Bound(mask=4), 'Bound: it hides tokens by the id 4')):
    with pytest.raises(ConfigError, match=f'task.measure = {names}'):
      configs.check(dataclasses.replace(config, task=dataclasses.replace(config.task, measure=measure)))
  unprepared = Objective(rolls={'all': Rollout(plans.Uniform(1))}, terms={'b': Weighted(1.0, NELBO(roll='all'))})
  with pytest.raises(ConfigError, match='Masking'):
    unprepared.denominators(batches()[0])
  for argument, names in (('cpu,task=sudoku9,kind=ar', 'sudoku4'), ('cpu,loops=1,consistency=0.1', 'loops=2'),
                          ('cpu,consistency=-0.1', 'consistency = -0.1'), ('cpu,kind=ar,time=1', 'time = 1'),
                          ('cpu,kind=ar,noise=cosine', 'noise = cosine'), ('cpu,letters=8', 'letters = 8')):
    with pytest.raises(ConfigError, match=names):
      configs.load(f'masked_diffusion:{argument}')


@pytest.mark.parametrize('options, names',
                         [({'memory': memories.Ring(size=1)}, 'memory = Ring'), ({'exits': {'kl': 1}}, 'exits = ')],
                         ids=['memory', 'exits'])
def test_the_harness_refuses_what_denoisers_have_not_before_any_task(monkeypatch, tmp_path, options, names):
  monkeypatch.setitem(sys.modules, 'lm_eval', SimpleNamespace())
  monkeypatch.setattr(harness, '_harness_class', lambda: None)
  monkeypatch.setattr(harness, '_tasks', lambda tasks, include: (None, ['any']))
  monkeypatch.setattr('loopformer.api.load', lambda *given: Loaded(MODEL, PARAMS, TOKENIZER, None))
  with pytest.raises(ConfigError, match=f'{names}.* holds a denoiser'):
    harness.run_harness(tmp_path, ['any'], **options)


@pytest.mark.parametrize('name', ['masked_diffusion:cpu', 'ccdd:cpu'])
def test_a_planned_evaluation_hides_tokens(name):
  """What --mode=plan --program=eval compiles is what --mode=eval runs: with hidden tokens, and with latents."""
  config = configs.load(name)
  mesh = config.mesh.make()
  built = ahead.scoring(config, mesh, 2, 1e12)
  batch, plan = built.arguments[4:6]
  assert batch['maskable'].shape == (2, 16) and ('latents' in batch) == ('latents' in plan.rows) == (name == 'ccdd:cpu')
  assert built.trace(mesh).jaxpr


@pytest.mark.parametrize('there, here', [(AR, MODEL), (MODEL, AR)],
                         ids=['into a denoiser', 'into one that writes token by token'])
def test_a_run_does_not_start_from_one_that_reads_other_ids(tmp_path, there, here):
  """MASK is a row of the embedding, which the other does not have."""
  there, here = (model.clone(read_in=TokenEmbed(vocab=model.read_in.vocab, width=parts.D, length=16))
                 for model in (there, here))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, parts.params(there), None, {}, {})
  with pytest.raises(ConfigError, match=r'train\.start = .*: read_in/embedding has the shape .* there, .* here'):
    _started(parts.params(here), str(tmp_path), Mesh().make(), print)


@pytest.mark.parametrize('submit, names', [
    ({'steps': 0}, 'steps = 0'), ({'steps': 10_001}, 'steps = 10001'),
    ({'prompt': '1 <mask> 2', 'stop': ['3']}, 'stop = '), ({'budget': 9}, 'budget = 9'),
    ({'prompt': '1 ' * 16}, '17 tokens'), ({'prompt': [7]}, 'the id = 7'),
    ({'prompt': jnp.ones((1, 3), int)}, r'the id = \[1 1 1\]: must be a whole number'),
    ({'stop': '3'}, "stop = '3': give a list"), ({'stop': ['']}, r"stop = \[''\]"), ({'stop': None}, 'stop = None'),
    ({'prompt': 5}, 'prompt 0 = 5'), ({'prompt': b'1'}, 'give a text'), ({'max_new_tokens': 17}, '17 tokens'),
    ({'prompt': '<mask:40>'}, '40'), ({'seed': -1}, 'seed = -1'), ({'temperature': -1.0}, 'temperature = -1.0'),
    ({'max_new_tokens': 0}, 'max_new_tokens = 0')])
def test_requests_that_cannot_be_served_are_refused(submit, names):
  with pytest.raises(ConfigError, match=names):
    denoiser().submit(submit.pop('prompt', ''), **submit)


def test_blocks_must_divide_the_answer():
  served = denoiser(MODEL.clone(sampler=Denoising(order=orders.Ranked(blocks=4))))
  with pytest.raises(ConfigError, match='6 positions'):
    served.submit('', max_new_tokens=6, steps=8)


@pytest.mark.parametrize('make, names', [
    (lambda: denoiser(exit=1), 'exit = 1'), (lambda: denoiser(draft=1), 'draft = 1'),
    (lambda: denoiser(length=17), 'length = 17'), (lambda: Denoiser(MODEL, PARAMS, None), 'tokenizer = None'),
    (lambda: denoiser(AR), 'MASK, the id 5'), (lambda: Denoising(steps=0), 'sampler.steps = 0'),
    (lambda: Denoising(guidance=-1.0), 'sampler.guidance = -1.0'), (lambda: Bound(mask=0), 'measure.mask = 0'),
    (lambda: Bounds(MODEL, PARAMS, TOKENIZER, exit=1), 'exit = 1'),
    (lambda: Bounds(MODEL, PARAMS, TOKENIZER, draws=0), 'draws = 0')])
def test_wrong_options_are_refused(make, names):
  with pytest.raises(ConfigError, match=names):
    make()


# The command line ----------------------------------------------------------------------------------------------------


def generate(monkeypatch, model, capsys, tmp_path, *words):
  params = PARAMS if model is MODEL else parts.params(model)
  monkeypatch.setattr(main, 'load', lambda workdir: Loaded(model, params, TOKENIZER, None))
  with flagsaver.flagsaver():
    main.FLAGS.unparse_flags()
    main.FLAGS(['main', '--mode=generate', f'--workdir={tmp_path}', *words])
    main.check_flags('generate', main.given_flags())
    main.run_generate(tmp_path)
  return capsys.readouterr().out


def test_steps_loops_and_orders_are_flags(monkeypatch, capsys, tmp_path):
  out = generate(monkeypatch, MODEL, capsys, tmp_path, '--denoise=3', '--budget=2', '--prompt=1 <mask:2> 4',
                 '--order=margin')
  assert out.startswith('--- 3 denoising steps of 2 loops\n1 ') and out.rstrip().endswith(' 4')
  out = generate(monkeypatch, MODEL, capsys, tmp_path, '--prompt=1 2', '--max_new_tokens=2', '--order=left',
                 '--blocks=2')
  assert out.startswith('--- 4 denoising steps of 4 loops\n1 2')


@pytest.mark.parametrize('model, word, names', [
    (MODEL, '--draft=1', '--draft: a masked'), (MODEL, '--exit=kl:0.1', '--exit: a masked'),
    (MODEL, '--memory=first', '--memory: a masked'), (MODEL, '--contrast=1', '--contrast: a masked'),
    (MODEL, '--order=up', '--order=up'), (MODEL, '--order=cap', '--order=cap'),
    (MODEL, '--order=cap:7', '--order=cap:7: Cap.eta = 7'), (MODEL, '--order=margin:1', '--order=margin:1'),
    (AR, '--denoise=4', '--denoise: the model of'), (AR, '--order=left', '--order: the model of')],
                         ids=lambda value: value if isinstance(value, str) else '')
def test_flags_of_the_other_kind_of_model_are_refused(monkeypatch, capsys, tmp_path, model, word, names):
  with pytest.raises(ConfigError, match=names):
    generate(monkeypatch, model, capsys, tmp_path, word)


def test_holes_are_filled_and_nothing_is_added(monkeypatch, capsys, tmp_path):
  with pytest.raises(ConfigError, match='--max_new_tokens=2: holes of a prompt are filled'):
    generate(monkeypatch, MODEL, capsys, tmp_path, '--prompt=1 <mask>', '--max_new_tokens=2')
  assert generate(monkeypatch, MODEL, capsys, tmp_path, '--prompt=1 <mask>', '--prompt=1',
                  '--max_new_tokens=2').count('---') == 2


def test_blocks_go_with_ranks(monkeypatch, capsys, tmp_path):
  with pytest.raises(ConfigError, match='--blocks=2'):
    generate(monkeypatch, MODEL, capsys, tmp_path, '--order=ancestral', '--blocks=2')


def test_what_denoising_learns_is_no_next_token():
  """CE on a batch that Masking prepared is the weighted loss too, but by another divisor."""
  batch = {name: jnp.asarray(leaf) for name, leaf in batches()[0].items()}
  made = Masking(mask=MASK)(PlanContext(key=jax.random.key(1), step=jnp.int32(0), stage=jnp.int32(0), batch=batch))
  assert NELBO(roll='all').weight(made) == 128 and CE(roll='all').weight(made) != 128


# The study -----------------------------------------------------------------------------------------------------------


def test_the_study_measures_grids_and_tables_them_by_seed(monkeypatch):
  monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(samples=4))
  loaded = Loaded(MODEL, PARAMS, TOKENIZER, SimpleNamespace(task=TASK))
  right = study.solved(loaded, orders.Ranked(), 3, 2)
  served = denoiser()
  for number in range(4):
    served.submit('', steps=3, budget=2, number=number)
  made = np.array(ids_of(served))
  assert right == valid(made, 2).mean()
  row = {'trained with': '2', 'loops': 2, 'order': 'random', 'steps': 4, 'MFLOP': 1.0}
  results = {seed: {'bounds': {'trained with 2': {'1': {'loss': 0.5 + i, 'error': 0.1}}},
                    'solved': [{**row, 'solved': 0.25 * i}]}
             for i, seed in enumerate('01')}
  first, second = study.tables(results)
  assert first == [{'model': 'trained with 2', 'loops': '1', 'seed 0': 0.5, 'seed 1': 1.5}]
  assert second == [{**row, 'seed 0': 0.0, 'seed 1': 0.25}]


def test_the_study_has_whole_grids_written_cell_by_cell(monkeypatch):
  config = configs.load('masked_diffusion:cpu,kind=ar')
  monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(samples=4))
  loaded = Loaded(config.model, parts.params(config.model), SymbolTokenizer(config.task.of.symbols), config)
  assert 0 <= study.written(loaded) <= 1  # it has a place for each of 16 cells, and for what it begins with
  grids = study.puzzles(config, 4)['targets']
  grids[0, 0] = grids[0, 1]
  monkeypatch.setattr(study.loopformer, 'generate',
                      lambda *given, **options: [loaded.tokenizer.decode(grid) for grid in grids])
  assert study.written(loaded) == 0.75


def test_the_study_of_words_judges_slots(monkeypatch):
  form = Slots(of=Word(shortest=7, longest=7, group=Cyclic(degree=3)))  # as many tokens and symbols as grids have
  task, tokenizer = Generated(of=form, held_out=4), SymbolTokenizer(form.symbols)
  monkeypatch.setattr(study, 'FLAGS', SimpleNamespace(samples=4))
  row = denoising_words.judged(Loaded(MODEL, uniform(MODEL), tokenizer, SimpleNamespace(task=task)), 'confidence', 3, 2)
  served, source = Denoiser(MODEL, uniform(MODEL), tokenizer, rows=4), task.source('validation', 0)
  for number in range(4):
    words = [form.symbols[id_] for id_ in source[number]['targets'][:8]]
    served.submit(' '.join(words) + ' <mask:8>', steps=3, budget=2, number=number)
  right = np.array([ids == source[number]['targets'] for number, ids in enumerate(np.array(ids_of(served)))])
  assert right[:, :8].all() and 0 < right[:, 8:].mean() < 1
  assert (row['last'] == right[:, -1].mean() and row['all'] == right.all(-1).mean()
          and row['a slot'] == right[:, 8:].mean())
  assert (row['order'], row['steps'], row['loops'], row['steps x loops']) == ('confidence', 3, 2, 6)
  assert row['MFLOP'] == pytest.approx(MODEL.flops(16, 2) * 16 * 3 / 1e6)
  shown = denoising_words.table(
      {'0': [row, {'order': 'padded', 'steps': 1, 'loops': 2, 'MFLOP': 1, 'last': 1, 'a slot': 1}]})
  assert ([line['all'] for line in shown] == [round(row['all'], 3), '']
          and [line['seed'] for line in shown] == ['0', '0'])
