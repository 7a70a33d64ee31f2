"""The engine: rows on their own, refilled, sharing beginnings; stops, streams; drafts change speed and nothing else."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from loopformer import memories, plans
from loopformer.cells.plain import Plain
from loopformer.inference import exits
from loopformer.inference.engine import Engine, decode, generate, prefill
from loopformer.inference.sampling import verify_draft
from loopformer.nn.blocks import Chain
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.stack import Stack
from loopformer.papers.melt.attention import LatentAttention
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.mor.cell import Routed, TokenChoice
from loopformer.types import ConfigError
from tests import parts
from tests.inference.test_generate import LETTERS, MODEL, PARAMS, PROMPTS, TOKENIZER, Letters
from tests.parts import UNEVEN, D, L, V

END = Letters(eos=LETTERS.index(generate(MODEL, PARAMS, TOKENIZER, ['abc'], max_new_tokens=5, temperature=0.0)[0][4]))


def engine(**options):
  options = {'rows': 3, 'length': 64, 'max_steps': 5, **options}
  return Engine(MODEL, PARAMS, options.pop('tokenizer', TOKENIZER), **options)


def alone(prompt, **options):
  return generate(MODEL, PARAMS, options.pop('tokenizer', TOKENIZER), [prompt], **{'max_new_tokens': 12, **options})[0]


REQUESTS = [dict(prompt='abc', budget=1), dict(prompt='q', budget=L, max_new_tokens=3), dict(prompt='hello there'),
            dict(prompt='', budget=UNEVEN, temperature=0.7, seed=3), dict(prompt='abc', budget=2, max_new_tokens=1),
            dict(prompt='hello', budget=2, temperature=1.2, top_k=5, seed=9), dict(prompt='x = 1', top_p=0.8, seed=2)]


@pytest.mark.parametrize('rows', [1, 3, 8])
@pytest.mark.parametrize('tokenizer', [TOKENIZER, END], ids=['long', 'ending'])
def test_what_a_request_gets_does_not_depend_on_what_shares_the_batch(rows, tokenizer):
  made = engine(rows=rows, tokenizer=tokenizer)
  for request in REQUESTS:
    made.submit(**{'max_new_tokens': 12, 'temperature': 0.0, **request})
  texts = made.run()
  assert texts == [alone(**{'temperature': 0.0, 'tokenizer': tokenizer, **request}) for request in REQUESTS]
  assert len(set(texts)) > 4


def test_no_recompilation_across_budgets_prompts_and_fill():
  def serve(requests):
    made = engine()
    for request in requests:
      made.submit(**{'max_new_tokens': 12, **request})
    return made.run()

  serve(REQUESTS[:1]), serve(REQUESTS)
  before = prefill._cache_size(), decode._cache_size()
  serve(REQUESTS[::-1]), serve(REQUESTS[2:4]), serve([dict(prompt='new', budget=3, temperature=0.1, top_k=2)])
  assert (prefill._cache_size(), decode._cache_size()) == before


def test_requests_may_come_while_others_are_served():
  made, seen = engine(rows=2), {}
  made.submit('abc', temperature=0.0, max_new_tokens=12)
  for piece in made.stream():
    if not seen:
      made.submit('q', temperature=0.0, max_new_tokens=12)
    seen.setdefault(piece.request, []).append(piece)
  assert ''.join(p.text for p in seen[1]) == alone('q', temperature=0.0)
  assert [p.done for p in seen[0]] == [False] * (len(seen[0]) - 1) + [True] and len(seen[0]) > 2


@pytest.mark.parametrize('seed, number', [(0, 0), (5, 3), (2 ** 32 - 1, 2 ** 31)])
def test_what_is_drawn_comes_from_the_seed_and_the_number(seed, number):
  made = engine(rows=1)
  made.submit('abc', seed=seed, number=number, max_new_tokens=1)
  made.run()
  expected = jax.random.fold_in(jax.random.key(seed), np.uint32(number))
  np.testing.assert_array_equal(*map(jax.random.key_data, (made._rows.keys[0], expected)))


# Beginnings that are shared ------------------------------------------------------------------------------------------

LONG = 'the quick brown fox jumps over it '


def test_a_shared_beginning_is_read_once_and_changes_nothing(monkeypatch):
  widths = []
  real = prefill

  def spy(model, params, rows, new, *rest):
    widths.append((np.asarray(new.lengths).tolist(), np.asarray(new.shared).tolist()))
    return real(model, params, rows, new, *rest)

  monkeypatch.setattr('loopformer.inference.engine.prefill', spy)
  made = engine(rows=2)
  texts = []
  for prompt, budget in ((LONG + 'a', 2), (LONG + 'bc', 2), (LONG + 'a', 2), (LONG + 'a', 3)):
    made.submit(prompt, budget=budget, temperature=0.0, max_new_tokens=8)
    texts += made.run()
  assert [w[1][0] for w in widths] == [0, len(LONG), len(LONG), 0]  # another budget makes other keys
  assert [w[0][0] for w in widths] == [len(LONG) + 1, 2, 1, len(LONG) + 1]
  monkeypatch.undo()
  assert texts == [alone(p, budget=b, temperature=0.0, max_new_tokens=8) for p, b in
                   ((LONG + 'a', 2), (LONG + 'bc', 2), (LONG + 'a', 2), (LONG + 'a', 3))]


def test_what_was_drawn_can_be_shared_too():
  made = engine(rows=1)
  made.submit(LONG, temperature=0.0, max_new_tokens=10)
  (first,) = made.run()
  made.submit(LONG + first + 'no', temperature=0.0, max_new_tokens=5)
  assert made._beginning(made._waiting[0]) == (0, len(LONG) + 8)
  assert made.run() == [alone(LONG + first + 'no', temperature=0.0, max_new_tokens=5)]


@pytest.mark.parametrize('change', [dict(memory=memories.Ring(size=1)), dict(memory=memories.Mean())], ids=str)
def test_inexact_memories_share_nothing(change):
  made = Engine(MODEL.clone(**change), PARAMS, TOKENIZER, rows=1, length=64)
  for _ in range(2):
    made.submit(LONG, temperature=0.0, max_new_tokens=4)
  first, second = made.run()
  assert first == second


# Stops and streams ---------------------------------------------------------------------------------------------------


def test_stops_cut_before_their_first_appearance():
  whole = alone('abc', temperature=0.0)
  for n in (1, 2, 3):
    stop = whole[4:4 + n]
    assert alone('abc', temperature=0.0, stop=('~', stop)) == whole[:whole.index(stop)]
  assert alone('abc', temperature=0.0, stop=('~' * 99,)) == whole  # longer than the text


def test_streams_tell_nothing_that_a_stop_takes_back():
  texts = {seed: alone('abc', temperature=1.5, seed=seed) for seed in range(5)}
  seed, whole, stop = next((seed, text, text[i:i + 2]) for seed, text in texts.items() for i in range(9, 3, -1)
                           if text.find(text[i:i + 2]) == i < len(text) - 1)  # it ends late
  made = engine(rows=1, max_steps=1)
  made.submit('abc', temperature=1.5, seed=seed, max_new_tokens=12, stop=(stop,))
  pieces = list(made.stream())
  told = [''.join(p.text for p in pieces[:i + 1]) for i in range(len(pieces))]
  assert told[-1] == whole[:whole.index(stop)] and all(whole.startswith(text) for text in told)
  assert len(pieces) > 2 and all(len(text) <= whole.index(stop) for text in told)


def test_letters_of_several_bytes_are_told_whole():
  class Bytes(Letters):
    def decode(self, ids):
      return 'abc' + bytes([0xC3, 0xA9][i % 2] for i in range(len(ids) - 3)).decode('utf-8', 'replace')

  made = engine(rows=1, max_steps=1, tokenizer=Bytes())
  made.submit('abc', temperature=0.0, max_new_tokens=7)
  pieces = [piece.text for piece in made.stream()]
  assert '\ufffd' not in ''.join(pieces[:-1]) and ''.join(pieces) == 'é' * 3 + '\ufffd'


# Exits ---------------------------------------------------------------------------------------------------------------


def test_exits_shorten_passes_and_the_tally_says_so():
  def serve(threshold, rows=2):
    made = engine(rows=rows, exit=exits.Adaptive(rule=exits.KL(threshold=threshold)))
    for prompt in PROMPTS:
      made.submit(prompt, temperature=0.0, max_new_tokens=10)
    return made.run(), made.stats

  before = decode._cache_size()
  never, stats = serve(0.0)
  assert never == [alone(p, temperature=0.0, max_new_tokens=10) for p in PROMPTS] and stats['loops'] == L
  some, stats = serve(0.3)
  assert 1 < stats['loops'] < L
  assert some == serve(0.3, rows=1)[0]  # what a row does is its own affair
  at_once, stats = serve(1e9)
  assert stats['loops'] == 1 and at_once != never
  assert decode._cache_size() <= before + 3  # rows 2 and 1, and alone


# Drafts --------------------------------------------------------------------------------------------------------------


def test_a_draft_gives_the_text_of_all_loops_greedily_for_200_prompts():
  rng = np.random.default_rng(0)
  prompts = [''.join(rng.choice(list(LETTERS[1:]), rng.integers(1, 20))) for _ in range(200)]
  options = dict(max_new_tokens=16, temperature=0.0, rows=50)
  texts = generate(MODEL, PARAMS, TOKENIZER, prompts, **options)
  shares = {letter: np.mean([letter in text for text in texts]) for letter in LETTERS[1:]}
  end = Letters(eos=LETTERS.index(min(shares, key=lambda letter: abs(shares[letter] - 0.4))))
  plain = generate(MODEL, PARAMS, end, prompts, **options)
  made = Engine(MODEL, PARAMS, end, rows=50, length=64, draft=2, num_draft=3)
  for prompt in prompts:
    made.submit(prompt, max_new_tokens=16, temperature=0.0)
  assert made.run() == plain
  assert 0.02 < made.stats['accepted'] < 0.98 and made.stats['tokens a pass'] > 1.05
  assert len({len(text) for text in plain}) > 3  # some ended early, in the middle of what was accepted


@pytest.mark.parametrize('draft, num_draft', [(1, 1), (L, 4), (UNEVEN, 2)], ids=str)
def test_drafts_of_all_kinds(draft, num_draft):
  made = engine(draft=draft, num_draft=num_draft)
  for request in REQUESTS[:3]:
    made.submit(**{'temperature': 0.0, 'max_new_tokens': 12, **request})
  assert made.run() == [alone(**{'temperature': 0.0, **request}) for request in REQUESTS[:3]]
  if draft == L:  # judged by itself, all stands, but where a row's budget is another one
    assert made.stats['accepted'] > 0.5


@functools.partial(jax.jit, static_argnums=0)
def judged(rows, p, q, key):
  keys = jax.random.split(key, 2 * rows)
  proposed = jax.vmap(lambda key: jax.random.categorical(key, q).astype(jnp.int32))(keys[:rows])  # [rows, A]
  repeat = functools.partial(jnp.repeat, repeats=rows, axis=0)
  kept, final = verify_draft(proposed, repeat(q[None]), repeat(p[None]), keys[rows:])
  return jnp.where(kept > 0, proposed[:, 0], final), kept, final


def fits(counts, law) -> bool:
  law = np.asarray(law, np.float64)
  return stats.chisquare(counts, law / law.sum() * counts.sum()).pvalue > 1e-3


def test_what_is_kept_follows_the_law_of_the_judge():
  """The first token has the judge's first law; the one after all drafts that stood has its last."""
  rng = np.random.default_rng(1)
  p, q = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32), jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
  p = p.at[0, 2].set(-jnp.inf)  # the judge forbids what the draft may propose
  first, kept, final = map(np.asarray, judged(40_000, p, q, jax.random.key(0)))
  law = np.asarray(jax.nn.softmax(p))
  counts = np.bincount(first, minlength=6)
  assert counts[2] == 0 and fits(np.delete(counts, 2), np.delete(law[0], 2))
  ends = final[kept == 2]
  assert fits(np.bincount(ends, minlength=6), law[2])
  overlap = np.minimum(law[0], np.asarray(jax.nn.softmax(q))[0]).sum()
  assert (kept > 0).mean() == pytest.approx(overlap, abs=0.01)


def test_drawn_with_a_draft_the_text_has_the_same_law():
  """Two tokens after one prompt, drawn many times with and without a draft."""
  def drawn(**options):
    made = Engine(MODEL, PARAMS, TOKENIZER, rows=200, length=16, max_steps=2, **options)
    for number in range(2000):
      made.submit('abc', max_new_tokens=3, temperature=0.8, top_k=4, seed=1 if options else 2, number=number)
    return made.run()

  texts = [drawn(), drawn(draft=1, num_draft=2)]
  names = sorted({text[1:] for text in texts[0]} | {text[1:] for text in texts[1]})
  table = np.array([[sum(text[1:] == name for text in side) for name in names] for side in texts])
  table = table[:, table.sum(0) >= 10]
  assert table.shape[1] >= 4 and stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize('make, message', [
    (lambda: engine(rows=0), 'rows = 0'), (lambda: engine(length=81), 'length = 81.*80'),
    (lambda: engine(draft=1, exit=exits.Adaptive(rule=exits.KL())), 'exit and draft'),
    (lambda: Engine(MODEL.clone(memory=memories.Mean()), PARAMS, TOKENIZER, draft=1), 'draft with memory'),
    (lambda: engine().submit('a', budget=L + 1), f'budget = {L + 1}.*slots for {L}'),
    (lambda: engine().submit('a', budget=0), 'budget = 0'), (lambda: engine().submit('a', stop=('',)), 'stop'),
    (lambda: engine().submit('a', stop='x'), "stop = 'x'"), (lambda: engine(draft=0), 'draft = 0'),
    (lambda: engine().submit('a' * 60, max_new_tokens=5), '60 tokens.*max_new_tokens = 5.*64 positions')],
                         ids=range(10))
def test_bad_input(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_bytes_are_those_of_all_caches():
  size = 2 * 64 * 2 * (2 * D * 4) // 2  # of one loop: two layers, 64 positions, keys and values
  places = 64 * 4
  assert V == 40 and engine().bytes == 3 * L * (size + places)
  assert engine(draft=2).bytes == 3 * (L + 2) * (size + places)
  assert parts.N == 2


@pytest.mark.parametrize('name, value', [('rows', 2.5), ('length', 10.5), ('loops', 2.5), ('loops', 0),
                                         ('num_draft', 1.5),
                                         ('max_steps', 2.5)])
def test_an_engine_takes_whole_numbers(name, value):
  with pytest.raises(ConfigError, match=f'{name} = {value}: must be '):
    engine(**{name: value})


@pytest.mark.parametrize('prompt', [[1, V], [-1, 2]], ids=str)
def test_ids_that_the_model_does_not_have_are_refused(prompt):
  with pytest.raises(ConfigError, match=rf'prompt 0: the id = ({V}|-1): must be 0 to {V - 1}'):
    engine().submit(prompt)


# Attention in both directions -----------------------------------------------------------------------------------------

BOTH = dict(heads=2, kernel=Bidirectional())
AHEAD = {
    'block': parts.looped(parts.plain(kernel=Bidirectional())),
    'coda': parts.looped(parts.plain(), coda=Stack(parts.block(kernel=Bidirectional()), 1)),
    'chain': parts.looped(Plain(Stack(Chain((parts.block(), parts.block(kernel=Bidirectional()))), 1))),
}


@pytest.mark.parametrize('name', AHEAD)
def test_what_reads_ahead_is_not_decoded(name):
  """It would be decoded causally, which is another function than was trained: before anything is compiled."""
  model = AHEAD[name]
  made = Engine(model, parts.params(model), TOKENIZER, rows=1, length=16)
  made.submit('abc', max_new_tokens=2)
  with pytest.raises(ConfigError, match=r'cache: its attention reads later tokens too.*kernels\.Fused'):
    made.run()


def test_what_reads_ahead_is_not_given_keys_one_after_the_other():
  """A cache that was made for another model; recursions that share keys in training; chunks; windows."""
  plan = plans.Uniform(2)(None)
  shared = parts.looped(Routed(Stack(parts.block(kernel=Bidirectional()), 1), TokenChoice(recursions=2)), loops=2)
  chunks = parts.looped(Gated(Stack(parts.peri(LatentAttention(**BOTH)), 1)),
                        memory=Latest(chunk=3))
  for model, kv in ((AHEAD['block'], MODEL.cache(1, 8)), (shared.clone(memory=memories.First()), None), (chunks, None),
                    (parts.looped(**parts.shifted(kernel=Bidirectional())), None)):
    with pytest.raises(ConfigError, match='its attention reads later tokens too'):
      jax.eval_shape(lambda v, model=model, kv=kv: model.apply(v, parts.tokens(1), plan, kv=kv).z,
                     {'params': parts.shapes(parts.ROWS['base_loop'].model)} if kv else {'params': parts.shapes(model)})
