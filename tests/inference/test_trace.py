"""What `loopformer.trace` tells of every loop: identities that hold of every model, and what it says where it cannot
know."""
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loopformer
from loopformer import plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.diffusion.sampler import Denoising
from loopformer.inference import tracing
from loopformer.inference.tracing import Insight
from loopformer.model import Looped
from loopformer.nn import kernels
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.linear_icl.attention import LabelHead, LinearAttention, Prompt
from loopformer.papers.padded.attention import AveragingHard
from loopformer.tasks.imported import Imported
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError
from tests.experiments.test_cli import run_here
from tests.parts import ROWS, D, T, V, batch, close, looped, over, params, plain, tokens

LINEAR = Looped(read_in=Prompt(width=3, length=5), cell=Plain(Stack(LinearAttention(), 1)), read_out=LabelHead(),
                loops=2)
TRACED = ['base_loop', 'prelude_coda', 'ouro', 'mor', 'plt', 'ordered']  # a way of telling each


@pytest.fixture(scope='module')
def insights():
  """Name -> what a model of the table does with two texts; each is run once."""
  made = {}

  def of(name) -> Insight:
    if name not in made:
      model = ROWS[name].model
      made[name] = loopformer.trace(model, params(model), tokens(2))
    return made[name]

  return of


@pytest.mark.parametrize('name', ['base_loop', 'prelude_coda', 'mor', 'plt'])
def test_the_last_loop_answers_as_the_model_does(name, insights):
  model, found = ROWS[name].model, insights(name)
  close(found.logits[-1], loopformer.logits(model, params(model), tokens(2)), 1e-5)
  assert found.states.shape == (model.loops, 2, T, D) and found.logits.shape == (model.loops, 2, T, V)
  assert found.loops == model.loops


def test_a_longer_run_holds_every_shorter_one(insights):
  """Of steps that do not know the schedule."""
  model, found = ROWS['base_loop'].model, insights('base_loop')
  short = loopformer.trace(model, params(model), tokens(2), steps=2)
  for field in ('states', 'logits', 'entropy', 'rms', 'cosine', 'update', 'attention'):
    close(getattr(short, field), getattr(found, field)[:2], 1e-5, field)


@pytest.mark.parametrize('name', TRACED)
def test_numbers_are_what_they_are_called(name, insights):
  found = insights(name)
  chances = np.asarray(jax.nn.softmax(found.logits), np.float64)
  np.testing.assert_allclose(found.entropy, -(chances * np.log(chances)).sum(-1), atol=1e-4)
  states = np.asarray(found.states, np.float64)
  np.testing.assert_allclose(found.rms, np.sqrt((states ** 2).mean(-1)), rtol=1e-5)
  before = states[:-1] if found.start is None else np.concatenate([np.asarray(found.start)[None], states[:-1]])
  after = states[len(states) - len(before):]
  size, moved = np.linalg.norm(after, axis=-1), np.linalg.norm(after - before, axis=-1)
  np.testing.assert_allclose(found.update[-len(before):], moved / size, rtol=1e-4, atol=1e-6)
  along = (after * before).sum(-1) / size / np.linalg.norm(before, axis=-1)
  np.testing.assert_allclose(found.cosine[-len(before):], along, atol=1e-5)
  assert (found.start is None) == np.isnan(np.asarray(found.cosine[0])).all() == ('start' in found.unknown)


@pytest.mark.parametrize('name', TRACED)
def test_entropies_of_attention_are_those_of_causal_softmax_or_said_to_be_unknown(name, insights):
  model, found = ROWS[name].model, insights(name)
  if name == 'plt':
    assert found.attention is None and found.layers == () and 'no layer of the loop' in found.unknown['attention']
    return
  layers = model.cell.core.applications
  assert found.attention.shape == (model.loops, layers, 2, 2, T) and 'attention' not in found.unknown
  assert found.layers == tuple(str(layer) for layer in range(layers))
  assert (found.attention[..., 0] == 0).all(), 'the first token reads itself alone'
  most = np.log(np.arange(1, T + 1))
  assert (found.attention >= 0).all() and (found.attention <= most + 1e-5).all()
  assert (found.attention[:, :, :, :, 2:] > 0).any((0, 2, 3)).all(), 'in every layer somebody looks around'
  assert len(np.unique(found.attention[..., -1].round(6))) > layers, 'loops and heads are told apart'


def test_entropies_equal_those_of_the_layers_by_hand():
  """Of one layer over the input as it is: softmax of q . k / sqrt(d) under the causal mask."""
  model = looped(plain(1), loops=1)
  weights, ids = params(model), tokens(2)
  found = loopformer.trace(model, weights, ids)
  own = weights['cell']['core']['block']
  x = np.asarray(found.start, np.float64)
  scale = np.asarray(own['norm_attn']['scale'][0], np.float64)
  normed = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + model.cell.core.block.norm.eps) * scale
  fused = normed @ np.asarray(own['attn']['qkv']['kernel'][0], np.float64)
  q, k, _ = np.moveaxis(fused.reshape(2, T, 2, 3, D // 2), 3, 0)  # head by head: its queries, keys, values
  scores = np.einsum('BTHd,BSHd->BHTS', q, k) / math.sqrt(D // 2)
  given = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
  given /= given.sum(-1, keepdims=True)
  entropy = -np.where(given > 0, given * np.log(np.where(given > 0, given, 1)), 0).sum(-1)
  np.testing.assert_allclose(found.attention[0, 0], entropy, atol=1e-4)


def test_neighbours_change_nothing(insights):
  found, weights = insights('base_loop'), params(ROWS['base_loop'].model)
  other = tokens(2).at[1].set((tokens(2)[1] + 3) % V)
  beside = loopformer.trace(ROWS['base_loop'].model, weights, other)
  for field, axis in (('states', 1), ('logits', 1), ('entropy', 1), ('rms', 1), ('cosine', 1), ('attention', 2)):
    mine, again = (np.take(np.asarray(getattr(one, field)), 0, axis) for one in (found, beside))
    np.testing.assert_array_equal(mine, again, err_msg=field)
  assert not np.array_equal(beside.logits[:, 1], found.logits[:, 1])


def test_a_padded_row_is_the_row_and_documents_do_not_see_each_other():
  both_ways = plain(1, kernel=kernels.Bidirectional())  # in which padding would be seen, by the loop and by the coda
  model = looped(both_ways, loops=2, coda=both_ways.core)
  weights, ids, room = params(model), tokens(1), 3
  alone = loopformer.trace(model, weights, ids[:, :T - room])
  segments = jnp.asarray([[0] * (T - room) + [1] * room])
  inside = loopformer.trace(model, weights, ids, segments=segments)
  unmarked = loopformer.trace(model, weights, ids, segments=jnp.zeros_like(segments))
  for field in ('states', 'logits', 'entropy', 'update', 'attention'):
    place = -1 if field == 'attention' else 2
    rows, seen = (np.take(np.asarray(getattr(one, field)), range(T - room), place) for one in (inside, unmarked))
    close(rows, np.asarray(getattr(alone, field)), 1e-5, field)
    assert np.abs(seen - rows).max() > 1e-3, field
  packed = batch(2)
  model = ROWS['base_loop'].model
  found = loopformer.trace(model, params(model), packed['tokens'], positions=packed['positions'],
                           segments=packed['segments'])
  close(found.states[-1], over(model, params(model), packed, plans.schedule(plans.resolve(model.loops))).x, 1e-5)
  first = np.asarray(packed['positions']) == 0
  assert (found.attention[:, :, 0][..., first[0]] == 0).all() and (found.attention[:, :, 1][..., first[1]] == 0).all()


def test_other_kernels_tell_their_own_weights():
  q = k = jax.random.normal(jax.random.key(0), (1, T, 2, 4))
  for kernel in (kernels.Bidirectional(), kernels.Blockwise(size=3), AveragingHard(), kernels.Fused()):
    for seg in (None, jnp.asarray([[0] * 3 + [1] * (T - 3)])):
      v = jax.random.normal(jax.random.key(1), (1, T, 2, 4))
      def both(kernel=kernel, seg=seg, v=v):
        return jnp.einsum('BHTS,BSHd->BTHd', kernel.weights(q, k, seg), v), kernel(q, k, v, seg)

      np.testing.assert_allclose(*jax.jit(both)(), atol=1e-5, err_msg=str(kernel))


def test_what_has_no_distribution_says_so():
  found = loopformer.trace(LINEAR, params(LINEAR), np.ones((2, 5, LINEAR.read_in.width), np.float32), steps=2)
  assert found.entropy is None and found.attention is None and set(found.unknown) == {'entropy', 'attention'}
  assert found.logits.shape == (2, 2, 5, 1) and np.isfinite(found.update).all()


def told(layer, step=0, shape=(1, 2, T)):
  """What an attention leaves of one step."""
  return np.int32(step), np.int32(layer), np.full(shape, layer + 10.0 * step)


def test_attentions_are_put_in_order_and_named():
  layers = {'b': {'attn': {'attention': (told(1, 1), told(1, 0))}},
            'a': {'attn': {'attention': (told(0, 0), told(0, 1))}}}
  names, values = tracing._by_layer({'core': {'block': layers}})
  assert names == ('0', '1') and values[:, :, 0, 0, 0].tolist() == [[0, 1], [10, 11]]
  two = {'latents': {'attn': {'attention': (told(0),)}}, 'tokens': {'attn': {'attention': (told(0),)}}}
  assert tracing._by_layer({'core': {'block': two}})[0] == ('0 latents', '0 tokens'), 'two streams of one layer (CCDD)'
  unlike = {'a': {'attention': (told(0), told(1, shape=(1, 3, T)))}}
  assert tracing._by_layer(unlike) == ('its layers have attentions of several shapes', None)


def test_a_training_pass_tells_nothing(insights):
  """Entropies cost a product of all tokens by all: where nobody asks, the program has none."""
  model = ROWS['base_loop'].model
  assert 'intermediates' not in jax.eval_shape(lambda: model.init(jax.random.key(0), tokens(1), plans.schedule((1.0,))))
  run = jax.make_jaxpr(lambda weights: model.apply({'params': weights}, tokens(1), plans.schedule((1.0,))).z)
  looked = jax.make_jaxpr(lambda weights: model.apply({'params': weights}, tokens(1), plans.schedule((1.0,)),
                                                      mutable=['intermediates'])[1])
  assert str(run(params(model))).count(' log ') < str(looked(params(model))).count(' log ')


def test_when_the_answer_settled():
  found = Insight(**{field.name: None for field in dataclasses.fields(Insight)})
  likeliest = jnp.asarray([[0, 1, 2, 0], [1, 1, 0, 2], [1, 1, 2, 0]])[:, None]  # [K, B, T]
  found = dataclasses.replace(found, states=likeliest, logits=jax.nn.one_hot(likeliest, 3))
  assert found.settled().tolist() == [[2, 1, 3, 3]]


@pytest.mark.parametrize('given, message', [
    ({'steps': 0}, 'steps = 0'), ({'steps': (0.5, 0.4)}, 'sum'), ({'tokens': [[V]]}, 'vocabulary'),
    ({'tokens': [1, 2]}, r'shape \[B, T\]'), ({'segments': [[0]]}, r'segments: int64, shape \[1, 1\]'),
    ({'positions': [[0], [1, 2]]}, 'positions: no array'),
    ({'positions': np.full((2, T), 0.5)}, 'positions: float64, shape'),
    ({'positions': np.full((2, T), 32)}, 'positions: from 32 to 32, but'),
    ({'positions': np.full((2, T), -1)}, 'positions: from -1 to -1, but'),
    ({'positions': np.zeros((2, T, 1), int)}, r'positions: int64, shape \[2, '),
    ({'steps': plans.schedule((1.0,), 4)}, 'skipped steps')])
def test_what_cannot_be_traced_is_refused_in_a_line(given, message):
  model = ROWS['base_loop'].model
  with pytest.raises(ConfigError, match=message) as error:
    loopformer.trace(model, None, **{'tokens': np.asarray(tokens(2)), **given})
  assert '\n' not in str(error.value)


# The command line ----------------------------------------------------------------------------------------------------

READS = Looped(read_in=TokenEmbed(vocab=258, width=D, length=16), cell=plain(), loops=3)
FILLS = Looped(read_in=TokenEmbed(vocab=259, width=D, length=16), cell=plain(1, kernel=kernels.Bidirectional()),
               loops=2, read_out=Head(outputs=258), sampler=Denoising(steps=2))


def saved(folder, model, tokenizer=ByteTokenizer()):
  """The work folder of a model with parameters of no training."""
  objective = Objective(rolls={'all': Rollout(plans.Uniform(model.loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))})
  config = Experiment(name='mine', model=model, objective=objective, task=Imported(length=16))
  loopformer.Loaded(model, params(model), tokenizer, config).save(folder)
  return folder


def test_a_prompt_is_inspected(tmp_path):
  pytest.importorskip('matplotlib')
  folder, prompt = saved(tmp_path / 'run', READS), 'a $b_{\n'
  status, out, err = run_here(folder, '--mode=inspect', f'--prompt={prompt}', '--budget=0.5,0.25,0.25')
  assert status == 0, err
  assert f'written to {folder / "inspect"}' in out and '--- 3 loops, 7 tokens' in out
  ids = [list(prompt.encode())]
  found = loopformer.trace(READS, params(READS), ids, steps=(0.5, 0.25, 0.25))
  rows, table, heads = (json.loads((folder / f'inspect/{name}.json').read_text())
                        for name in ('places', 'loops', 'attention'))
  assert len(rows) == 3 * 7 and len(table) == 3 and len(heads) == 3 * 2 * 2
  assert [row['token'] for row in rows[:7]] == ['a', '\u2423', '$', 'b', '_', '{', '\u21b5']
  chances = np.asarray(jax.nn.softmax(found.logits[:, 0]))
  np.testing.assert_allclose([row['probability'] for row in rows], chances.max(-1).ravel(), rtol=1e-4)
  np.testing.assert_allclose([row['rms'] for row in table], np.asarray(found.rms).mean((1, 2)), rtol=1e-4)
  np.testing.assert_allclose([row['entropy'] for row in heads], found.attention[:, :, 0].mean(-1).ravel(), atol=1e-5)
  assert [row['settled'] for row in rows[-7:]] == found.settled()[0].tolist()
  assert table[-1]['answer'] == rows[-1]['answer'] and table[-1]['entropy there'] == rows[-1]['entropy']
  assert f'{table[-1]["answer"]!r}, which is the answer since loop {rows[-1]["settled"]}' in out
  for name in ('answers', 'motion', 'attention'):
    assert (folder / f'inspect/{name}.png').read_bytes()[1:4] == b'PNG'
  assert (folder / 'inspect/places.csv').read_text().count('\n') >= 1 + len(rows)


def test_a_denoiser_answers_in_its_holes(tmp_path):
  folder = saved(tmp_path / 'run', FILLS)
  status, out, err = run_here(folder, '--mode=inspect', '--prompt=a<mask:2>', '--prompt=bc<mask>')
  assert status == 0, err
  assert '--- 2 loops, 3 tokens' in out and 'in the last hole' in out and 'of 2 places' in out and 'of 1 place ' in out
  rows = json.loads((folder / 'inspect/0-places.json').read_text())
  assert [row['token'] for row in rows[:3]] == ['a', '<mask>', '<mask>']
  assert json.loads((folder / 'inspect/1-loops.json').read_text())
  status, _, err = run_here(folder, '--mode=inspect', '--prompt=ab')
  assert status == 1 and "--prompt='ab': a masked diffusion model answers where tokens are hidden; give it holes" in err


def test_what_cannot_be_inspected_is_refused_in_a_line(tmp_path):
  folder, vectors = saved(tmp_path / 'run', READS), saved(tmp_path / 'vectors', LINEAR, None)
  for place, arguments, message in (
      (folder, [], '--prompt is missing: give a text to inspect'), (folder, ['--prompt='], 'prompt 0 has no tokens'),
      (folder, [f'--prompt={"a" * 17}'], 'prompt 0 has 17 tokens, more than the 16 positions'),
      (folder, ['--prompt=a', '--budget=2.5'], '--budget=2.5: neither a whole number of loops'),
      (folder, ['--prompt=a', '--seed=1'], '--seed: --mode=inspect does not read it'),
      (vectors, ['--prompt=a'], 'vectors as inputs, and no text')):
    status, _, err = run_here(place, '--mode=inspect', *arguments)
    assert status == 1 and message in err, err
    assert len(err.strip().splitlines()) == 1, err
