import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import loopformer
from loopformer import backend, plans
from loopformer.cells.plain import Plain
from loopformer.inference.engine import ROUND, decode, generate, prefill
from loopformer.inference.flat import Flat, flattened
from loopformer.inference.sampling import controls, sample, sampling_logits
from loopformer.nn.blocks import Chain
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError
from tests import parts
from tests.parts import UNEVEN, D, L, V

MODEL = parts.looped(parts.timed(), read_in=parts.TokenEmbed(vocab=V, width=D, length=80))
PROMPTS = ('abc', 'q', 'hello there', '')
LETTERS = '\0abcdefghijklmnopqrstuvwxyz .,()=:+-*/0123'[:V]


@dataclasses.dataclass(frozen=True)
class Letters:
  """A tokenizer of single letters; 0 ends a document."""
  eos: int = 0
  vocab_size: int = V

  def encode(self, text):
    return [LETTERS.index(letter) for letter in text]

  def decode(self, ids):
    return ''.join(LETTERS[i] for i in ids)


TOKENIZER = Letters()


PARAMS = parts.params(MODEL)


def run(prompts=PROMPTS, **options):
  options = {'max_new_tokens': 12, 'temperature': 0.0, **options}
  return generate(MODEL, PARAMS, TOKENIZER, list(prompts), **options)


def greedy(prompt: str, steps, count: int) -> str:
  """The argmax loop over the parallel pass."""
  ids = TOKENIZER.encode(prompt) or [TOKENIZER.eos]
  start = len(ids)
  for _ in range(count):
    row = np.zeros((1, 32), np.int32)  # causal: what follows does not matter, and one length is one program
    row[0, :len(ids)] = ids
    logits = loopformer.logits(MODEL, PARAMS, row, steps=steps)
    ids.append(int(logits[0, len(ids) - 1].argmax()))
    if ids[-1] == TOKENIZER.eos:
      return TOKENIZER.decode(ids[start:-1])
  return TOKENIZER.decode(ids[start:])


@pytest.mark.parametrize('budget', [1, 2, L, None, UNEVEN], ids=str)
def test_greedy_is_the_argmax_of_the_parallel_pass(budget):
  assert run(budget=budget) == [greedy(prompt, budget, 12) for prompt in PROMPTS]


def test_budgets_and_schedules_matter():
  texts = {tuple(run(budget=budget)) for budget in (1, 2, L, UNEVEN)}
  assert len(texts) > 2
  assert run(budget=None) == run(budget=L) == run(budget=(1 / L,) * L)


def test_one_program_serves_all_budgets_and_controls():
  run()
  before = prefill._cache_size(), decode._cache_size()
  for budget in (1, 2, 3, UNEVEN, None):
    run(budget=budget)
  run(temperature=0.7, top_k=3, top_p=0.9, seed=4, max_new_tokens=9)
  run(('d', 'ef', 'ghi', 'a'))
  assert (prefill._cache_size(), decode._cache_size()) == before


def test_a_batch_equals_its_prompts_one_by_one():
  assert run() == [text for prompt in PROMPTS for text in run((prompt,))]


def test_seeds():
  hot = dict(temperature=1.5)
  first, again, other = run(seed=1, **hot), run(seed=1, **hot), run(seed=2, **hot)
  assert first == again != other
  assert len({*run(('ab', 'ab', 'ab', 'ab'), seed=1, **hot)}) > 1  # rows of a batch draw on their own


@pytest.mark.parametrize('control', [dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-5)], ids=str)
def test_controls_that_leave_the_likeliest_alone_are_greedy(control):
  assert run(**{'temperature': 1.0, 'seed': 3, **control}) == run()


def test_more_tokens_continue_fewer():
  short, long = run(max_new_tokens=5), run(max_new_tokens=12)
  assert all(b.startswith(a) for a, b in zip(short, long)) and any(len(b) > len(a) for a, b in zip(short, long))
  assert all(len(text) <= 5 for text in short)


def test_a_row_stops_at_the_end_of_its_document_and_the_others_go_on():
  """The likeliest first token of row 0 is made the end of documents."""
  texts = run()
  assert all(texts[:2]) and texts[0][0] not in texts[1][:3]
  end = LETTERS.index(texts[0][0])
  with_end = Letters(eos=end)
  out = generate(MODEL, PARAMS, with_end, list(PROMPTS[:2]), max_new_tokens=12, temperature=0.0)
  assert out[0] == ''
  assert out[1] == texts[1].split(LETTERS[end])[0] != ''


def test_no_prompts():
  assert run(()) == []


@pytest.mark.parametrize('prompt, new', [('a' * 70, 11), ('a' * 81, 1), ('ab', 79)], ids=['sum', 'prompt', 'new'])
def test_what_does_not_fit_is_refused(prompt, new):
  with pytest.raises(ConfigError, match=rf'prompt 1 has {len(prompt)} tokens.*max_new_tokens = {new}.*80 positions'):
    run(('', prompt), max_new_tokens=new)


def test_what_just_fits_is_served():
  """Lengths are rounded up to a multiple, and no further than the model's positions."""
  assert MODEL.read_in.length % ROUND
  prompt = ('abcdefghij' * 8)[:76]
  (text,) = run((prompt,), max_new_tokens=4)
  ids = TOKENIZER.encode(prompt)
  for _ in range(4):
    row = np.zeros((1, 80), np.int32)
    row[0, :len(ids)] = ids
    ids.append(int(loopformer.logits(MODEL, PARAMS, row)[0, len(ids) - 1].argmax()))
  assert TOKENIZER.decode(ids[76:]).split('\0')[0] == text


@pytest.mark.parametrize('options, message', [
    (dict(budget=0), 'budget = 0'), (dict(budget=(0.5, 0.4)), r'budget = \(0\.5, 0\.4\).*0\.9'),
    (dict(temperature=-1.0), r'temperature = -1\.0'), (dict(top_k=0), 'top_k = 0'), (dict(top_p=0.0), r'top_p = 0\.0'),
    (dict(top_p=1.5), r'top_p = 1\.5'), (dict(max_new_tokens=0), 'max_new_tokens = 0'),
    (dict(budget=2.7), r'budget = 2\.7: give a budget as an integer'),
    (dict(top_k=2.7), r'top_k = 2\.7: must be a whole'), (dict(budget=np.float32(2.5)), r'budget = 2\.5'),
    (dict(max_new_tokens=2.7), r'max_new_tokens = 2\.7: must be a whole'),
    (dict(temperature=float('nan')), 'temperature = nan'),
    (dict(seed=2**32), 'seed = 4294967296: must be 0 to 4294967295'),
    (dict(seed=jax.random.key(0)), r'seed = Array\(\(\), dtype=key<fry>\) overlaying: \[0 0\]: must be a whole'),
    (dict(stop='a'), "stop = 'a': give a list"), (dict(stop=None), 'stop = None'), (dict(stop=[1]), r'stop = \[1\]'),
    (dict(seed=-1), 'seed = -1: must be 0 to'), (dict(seed=1.5), r'seed = 1\.5: must be a whole'),
], ids=str)
def test_options_out_of_range_are_refused(options, message):
  with pytest.raises(ConfigError, match=message):
    run(**options)


def test_a_single_text_is_refused():
  with pytest.raises(ConfigError, match="prompts = 'abc'"):
    generate(MODEL, PARAMS, TOKENIZER, 'abc')
  for prompts in ({'abc': 1}, {'abc'}):  # of no order, or of names that are no texts
    with pytest.raises(ConfigError, match='prompts = .*give a list'):
      generate(MODEL, PARAMS, TOKENIZER, prompts)


def test_numbers_and_lists_of_other_libraries_are_taken():
  text = run()[2]
  assert run(iter(PROMPTS), budget=jnp.int32(L), max_new_tokens=np.int64(12), temperature=jnp.float32(0))[2] == text
  assert run(stop=iter([text[2]]))[2] == text[:text.index(text[2])]


def test_more_loops_than_trained_warn():
  with pytest.warns(UserWarning, match=f'{L + 1} loops.*at most {L}'):
    texts = run(budget=L + 1)
  with pytest.warns(UserWarning, match=f'{L + 1} loops'):
    assert texts[0] == greedy(PROMPTS[0], L + 1, 12)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    run(budget=L)


# Drawing a token -----------------------------------------------------------------------------------------------------

DRAWS = 20_000
LOGITS = np.array([2.0, -1.0, 1.5, 0.3, 1.1, -3.0, 0.9, 0.0], np.float32)


def reference(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
  """The distribution: the k likeliest, then the fewest of those that reach top_p, then their shares."""
  order = np.argsort(-LOGITS)[:top_k]
  p = np.exp(LOGITS[order].astype(np.float64) / temperature)
  p /= p.sum()
  count = len(p) if top_p is None else int(np.searchsorted(np.cumsum(p), top_p)) + 1
  out = np.zeros(len(LOGITS))
  out[order[:count]] = p[:count] / p[:count].sum()
  return out


@jax.jit
def drawn_under(logits, key, control):
  """A token a row, all rows under one control."""
  control = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, logits.shape[:1]), control)
  return sample(sampling_logits(logits, control), jax.random.split(key, len(logits)))


@pytest.mark.parametrize('temperature', [1.0, 0.5, 2.0])
@pytest.mark.parametrize('top_k, top_p', [(None, None), (3, None), (None, 0.7), (4, 0.8), (100, 1.0), (5, 0.2)],
                         ids=str)
def test_sample_draws_the_reference_distribution(temperature, top_k, top_p):
  control = controls(len(LOGITS), temperature, top_k, top_p)
  drawn = drawn_under(jnp.broadcast_to(LOGITS, (DRAWS, len(LOGITS))), jax.random.key(0), control)
  counts, expected = np.bincount(drawn, minlength=len(LOGITS)), reference(temperature, top_k, top_p)
  assert not counts[expected == 0].any()
  kept = expected > 0
  assert kept.sum() == 1 or stats.chisquare(counts[kept], expected[kept] * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize('top_k', [None, 5])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_k):
  for top_p in np.linspace(0.03, 0.97, 32):
    control = controls(len(LOGITS), 2.0, top_k, float(top_p))
    drawn = drawn_under(jnp.broadcast_to(LOGITS, (2000, len(LOGITS))), jax.random.key(0), control)
    np.testing.assert_array_equal(np.unique(drawn), np.flatnonzero(reference(2.0, top_k, top_p)), f'top_p = {top_p}')


def test_laws_of_many_blocks_are_drawn_from():
  """Most tokens, and whole blocks of them, are impossible, the first and the last among them."""
  rng = np.random.default_rng(0)
  p = np.zeros(1000)
  possible = rng.choice(np.arange(200, 990), 60, replace=False)
  p[possible] = rng.dirichlet(np.full(60, 0.5))
  with np.errstate(divide='ignore'):
    logits = jnp.asarray(np.log(p), jnp.float32)
  drawn = jax.jit(sample)(jnp.broadcast_to(logits, (DRAWS, 1000)), jax.random.split(jax.random.key(1), DRAWS))
  counts = np.bincount(drawn, minlength=1000)
  assert not counts[p == 0].any()
  often = p * DRAWS > 5
  counts, expected = ([*values[often], values[~often].sum()] for values in (counts, p * DRAWS))
  assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize('vocab', [1, 7, 128, 129, 300])
def test_a_certain_token_is_drawn(vocab):
  for token in {0, vocab // 2, vocab - 1}:
    logits = jnp.where(jnp.arange(vocab) == token, 0.0, -jnp.inf)
    assert (sample(jnp.broadcast_to(logits, (64, vocab)), jax.random.split(jax.random.key(0), 64)) == token).all()


def test_temperature_zero_takes_the_likeliest():
  drawn = drawn_under(jnp.broadcast_to(LOGITS, (50, len(LOGITS))), jax.random.key(0), controls(len(LOGITS), 0.0))
  assert (drawn == LOGITS.argmax()).all()


def test_every_row_has_its_own_law():
  given = [(0.0, None, None), (1.0, 3, None), (0.5, None, 0.7), (1.0, None, None)]
  control = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[controls(len(LOGITS), *row) for row in given])
  laws = jax.nn.softmax(sampling_logits(jnp.broadcast_to(LOGITS, (4, len(LOGITS))), control))
  for row, (temperature, top_k, top_p) in enumerate(given):
    expected = reference(temperature, top_k, top_p) if temperature else np.eye(len(LOGITS))[LOGITS.argmax()]
    np.testing.assert_allclose(laws[row], expected, atol=1e-6)


def test_rows_are_drawn_each_from_its_own_logits():
  logits = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(LOGITS[::-1])])
  drawn = drawn_under(logits, jax.random.key(0), controls(len(LOGITS), 1.0, 1))
  np.testing.assert_array_equal(drawn, [0, 7])


# logits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tokens, message', [
    (np.zeros(3, np.int32), r'tokens: int32\[3\]'), (np.zeros((1, 3)), 'tokens: float64'),
    (np.zeros((1, 81), np.int32), '81 a row, more than the 80 positions'),
    (np.array([[0, V]]), f'ids from 0 to {V}'), (np.array([[-1, 0]]), 'ids from -1 to 0'),
], ids=['flat', 'float', 'long', 'large', 'negative'])
def test_tokens_that_cannot_be_read_are_refused(tokens, message):
  with pytest.raises(ConfigError, match=message):
    loopformer.logits(MODEL, PARAMS, tokens)


@pytest.mark.parametrize('steps', [1, 3, None, UNEVEN], ids=str)
def test_logits_equal_the_model(steps):
  text = parts.tokens(2)
  plan = parts.plans.schedule(parts.plans.resolve(L if steps is None else steps))
  z = parts.forward(MODEL, PARAMS, text, plan).z
  ours = loopformer.logits(MODEL, PARAMS, np.asarray(text), steps=steps)
  np.testing.assert_allclose(ours, z @ PARAMS['read_in']['embedding'].T, atol=1e-4)
  assert ours.shape == (2, parts.T, V) and ours.dtype == jnp.float32


def test_deep_stacks_are_written_out_on_a_cpu_alone():
  """For decoding; they compute the same."""
  model = parts.looped(parts.plain(9), loops=1)
  weights, answers = parts.params(model), []
  for name, kind in (('cpu', Flat), ('gpu', Stack)):
    with backend.compiling_for(name):
      flat, own = flattened(model, weights, transpose=True)
    assert isinstance(flat.cell.core, kind) and flat.cell.core.applications == 9
    plan = plans.Uniform(1)(None)
    answers.append(jax.jit(lambda p, flat=flat: flat.apply({'params': p}, parts.tokens(2), plan).z)(own))
  parts.close(*answers, 1e-5)


def test_weights_that_are_cast_ahead_change_nothing():
  chain = Chain((parts.block(RMSNorm(), dtype='bfloat16'), parts.block(RMSNorm(), dtype='bfloat16')))
  for model in (parts.ROWS['bfloat16'].model, parts.looped(Plain(Stack(chain, 2)))):
    weights = parts.params(model)
    flat, own = flattened(model, weights)
    dtypes = {leaf.dtype.name for path, leaf in jax.tree_util.tree_leaves_with_path(own['cell']['core'])
              if path[-1].key == 'kernel'}
    assert dtypes == {'bfloat16'}
    plan = plans.Uniform(2)(None)
    ours, theirs = (jax.jit(lambda p, model=model: model.apply({'params': p}, parts.tokens(2), plan).z)(p)
                    for model, p in ((flat, own), (model, weights)))
    np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))
