"""The text of new tokens is what they add to the prompt's, whatever the tokenizer does at the beginning of a text."""
import io
import json

from hypothesis import given, strategies as st
import jax
import numpy as np
import pytest

from loopformer.data.tokenizer import (
  BROKEN,
  ByteTokenizer,
  JsonTokenizer,
  PieceTokenizer,
  TrainedPieces,
  anchor,
  continuation,
)
from loopformer.inference.engine import Engine
from loopformer.inference.harness import Scorer
from loopformer.inference.measures import text_bytes
from loopformer.inference.sampling import controls, sampling_logits
from loopformer.model import init_params
from loopformer.nn.embed import TokenEmbed
from loopformer.tasks.generated import SymbolTokenizer
from loopformer.types import ConfigError
from tests import parts

CORPUS = ['the cat sat on the mat and sang to the dog that sat there too\n' * 20,
          'words: reading, writing, looping.\n' * 20]
# more than a tokenizer has
MODEL = parts.looped(parts.plain(1), read_in=TokenEmbed(vocab=512, width=parts.D, length=128))


def given_pieces(kind: str, **options) -> PieceTokenizer:
  """A sentencepiece model as people train them, with a space before the first word by default."""
  from sentencepiece import SentencePieceTrainer
  model = io.BytesIO()
  SentencePieceTrainer.train(sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()),
                             model_writer=model, model_type=kind, minloglevel=2, **options)
  return PieceTokenizer(model=model.getvalue())


def words(decoder: dict, pieces: list[str], **model) -> JsonTokenizer:
  """A tokenizer.json of whole words, which the given decoder puts together."""
  vocab = {piece: i for i, piece in enumerate(['[UNK]', '[END]', *pieces])}
  return JsonTokenizer(eos=1, text=json.dumps({
      'version': '1.0', 'truncation': None, 'padding': None, 'post_processor': None, 'decoder': decoder,
      'added_tokens': [{'id': 1, 'content': '[END]', 'single_word': False, 'lstrip': False, 'rstrip': False,
                        'normalized': False, 'special': True}],
      'normalizer': None, 'pre_tokenizer': model.pop('pre_tokenizer'),
      'model': {'type': 'WordLevel', 'vocab': vocab, 'unk_token': '[UNK]'} | model}))


METASPACE = {'type': 'Metaspace', 'replacement': '\u2581', 'prepend_scheme': 'first', 'split': True}
MAKERS = {
    'bytes': ByteTokenizer,
    'pieces that we train': lambda: TrainedPieces(vocab=300).build(CORPUS),
    'bpe by default options': lambda: given_pieces('bpe', vocab_size=60),
    'unigram by default options': lambda: given_pieces('unigram', vocab_size=32),
    'bpe with bytes, as of Llama 2': lambda: given_pieces('bpe', vocab_size=320, byte_fallback=True),
    'metaspace, as of converted sentencepiece models': lambda: words(
        METASPACE, ['\u2581the', '\u2581cat', '\u2581sat', '\u2581on', '\u2581mat'], pre_tokenizer=METASPACE),
    'word pieces': lambda: words({'type': 'WordPiece', 'prefix': '##', 'cleanup': False},
                                 ['the', 'cat', 'sat', 'on', 'mat'], pre_tokenizer={'type': 'Whitespace'}),
    'symbols': lambda: SymbolTokenizer(symbols=('the', 'cat', 'sat', 'on', 'mat', '<end>')),
}
TEXT = 'the cat sat on the mat'
MADE = {}


@pytest.fixture(params=MAKERS)
def tokenizer(request):
  if request.param.startswith(('metaspace', 'word')):
    pytest.importorskip('tokenizers')
  if request.param not in MADE:
    MADE[request.param] = MAKERS[request.param]()
  return MADE[request.param]


def test_every_continuation_of_a_text_completes_it(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert tokenizer.decode(ids) == TEXT
  for n in range(1, len(ids)):
    assert tokenizer.decode(ids[:n]) + continuation(tokenizer, ids[:n], ids[n:]) == TEXT
    assert continuation(tokenizer, anchor(tokenizer, ids[:n]), ids[n:]) == continuation(tokenizer, ids[:n], ids[n:])
  assert continuation(tokenizer, [tokenizer.eos], ids) == TEXT  # a document begins


@given(text=st.text(alphabet='the cat\n\u00e9\u6f22\U0001f600', max_size=80), data=st.data())
def test_an_anchor_is_as_good_as_all(text, data):
  """Letters of several bytes too, where the prompt ends within one."""
  for name in ('bytes', 'pieces that we train', 'bpe with bytes, as of Llama 2'):
    tokenizer = MADE.setdefault(name, MAKERS[name]())
    ids = tokenizer.encode(text)
    n = data.draw(st.integers(0, len(ids)))
    whole = continuation(tokenizer, ids[:n], ids[n:])
    assert continuation(tokenizer, anchor(tokenizer, ids[:n]), ids[n:]) == whole
    head = tokenizer.decode(ids[:n])
    if not head.endswith(BROKEN):
      assert head + whole == tokenizer.decode(ids)


def test_bytes_of_texts_are_counted_once(tokenizer):
  """The sum over a document's tokens, whose first stands after the end of another, is its size."""
  if not tokenizer.byte_lengths().any():
    pytest.skip('symbols are no text')
  within, first = text_bytes(tokenizer)
  for text in (TEXT, 'sat', 'the mat'):
    ids = tokenizer.encode(text)
    assert first[ids[0]] + within[ids[1:]].sum() == len(text.encode())
  assert within[tokenizer.eos] == 0


@pytest.fixture(scope='module')
def model():
  """A model whose vocabulary is padded, as it is for tensor cores and shards."""
  return MODEL, init_params(MODEL, jax.random.key(3))


@pytest.mark.parametrize('temperature', [0.0, 3.0])
def test_generation(tokenizer, model, temperature):
  """The pieces of a stream make the text that the new ids add; none is an id that the tokenizer does not have."""
  engine = Engine(*model, tokenizer, rows=2)
  for seed, prompt in enumerate([TEXT, 'the', '', 'sat on']):
    engine.submit(prompt, temperature=temperature, max_new_tokens=20, seed=seed)
  requests, texts = list(engine._waiting), {}
  for piece in engine.stream():
    texts[piece.request] = texts.get(piece.request, '') + piece.text
  for request in requests:
    assert min(request.drawn) >= 0 and max(request.drawn) < tokenizer.vocab_size
    new = request.drawn[:request.drawn.index(tokenizer.eos)] if tokenizer.eos in request.drawn else request.drawn
    whole, head = tokenizer.decode(request.prompt + new), tokenizer.decode(request.prompt)
    assert texts[request.number] == whole.removeprefix(head)
  stop = texts[0][3:6]
  if stop:
    engine.submit(TEXT, temperature=temperature, max_new_tokens=20, seed=0, stop=[stop])
    assert engine.run() == [texts[0][:texts[0].index(stop)]]


def test_the_harness_continues_with_the_space(model):
  tokenizer = MADE.setdefault('bpe by default options', MAKERS['bpe by default options']())
  scorer = Scorer(*model, tokenizer, steps=2, batch=2)
  engine = Engine(*model, tokenizer, rows=2)
  engine.submit('the cat', budget=2, temperature=0.0, max_new_tokens=8)
  texts = engine.run()
  assert scorer.generate([('the cat', {'max_gen_toks': 8})]) == texts and texts[0].startswith(' ')


@pytest.mark.parametrize('how', [{'temperature': float('nan')}, {'temperature': -1}, {'temperature': 'warm'},
                                 {'max_gen_toks': 2.5}, {'max_gen_toks': 0}, {'top_p': 2, 'do_sample': True},
                                 {'top_k': 1.5}], ids=str)
def test_what_the_harness_cannot_ask_for(how, model):
  with pytest.raises(ConfigError, match=f'^{next(iter(how))} = '):
    Scorer(*model, ByteTokenizer(), steps=2, batch=2).generate([('the cat', how)])


def test_ids_that_the_tokenizer_lacks_are_never_drawn_nor_likeliest():
  logits = jax.numpy.zeros((4, 10)).at[:, 7:].set(100.0)
  for how in (dict(temperature=0.0), dict(), dict(top_k=9), dict(top_p=0.5), dict(top_p=1e-50)):
    control = jax.tree.map(lambda leaf: np.repeat(leaf, 4), controls(7, **how))
    assert np.isinf(sampling_logits(logits, control)[:, 7:]).all()
    assert np.isfinite(sampling_logits(logits, control)[:, :7]).any(-1).all()


@pytest.mark.parametrize('top_p', [1e-10, 1e-40, 1e-50])
def test_next_to_no_probability_leaves_the_likeliest(top_p):
  control = jax.tree.map(lambda leaf: np.repeat(leaf, 1), controls(7, top_p=top_p))
  left = np.isfinite(sampling_logits(jax.numpy.arange(7.0)[None], control))
  assert left.tolist() == [[False] * 6 + [True]]


@pytest.mark.parametrize('prompt, message', [
    ([1000000], 'prompt 0: the id = 1000000: must be 0 to 256'), ([257], 'the id = 257'), ([-1], 'the id = -1'),
    ([1.5], r'the id = 1\.5: must be a whole number'), ([True], 'the id = True: must be a whole number'),
    (['a'], "the id = 'a'"), (b'abc', "prompt 0 = b'abc': give a text, a list of ids, or"),
    (7, 'prompt 0 = 7: give a text'), ([[1, 2]], r'the id = \[1, 2\]'), (None, 'prompt 0 = None'),
], ids=str)
def test_prompts_that_are_none(prompt, message, model):
  engine = Engine(*model, ByteTokenizer(), rows=2)
  with pytest.raises(ConfigError, match=message):
    engine.submit(prompt)
  assert not engine._waiting


def test_ids_of_numpy_are_taken(model):
  engine = Engine(*model, ByteTokenizer(), rows=2)
  engine.submit(np.array([104, 105], np.uint8))
  assert engine._waiting[0].prompt == [104, 105]
