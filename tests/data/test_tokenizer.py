import io
import os
import subprocess
import sys

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from loopformer.data import tokenizer as module
from loopformer.data.tokenizer import Bytes, ByteTokenizer, GivenPieces, PieceTokenizer, TrainedPieces, load_tokenizer

TEXTS = [
  'def first(values):\n    for value in values:\n        return value + 10 * 123\n',
  "class Loop:\n\t'''It repeats a block.'''\n\n    depth = 4096\n",
  'the quick brown fox jumps over the lazy dog, and the dog sleeps on\r\n' * 5,
  'words made of many letters: reading, writing, looping, stepping, forming\n' * 3,
]
PART = TrainedPieces(vocab=320)
# U+2581 is the documented exception: sentencepiece writes a space so.
ANY_TEXT = st.text().filter(lambda s: '\u2581' not in s)


@pytest.fixture(scope='module')
def pieces():
  return PART.build(TEXTS)


def tokenizers(pieces):
  return [ByteTokenizer(), pieces]


@settings(max_examples=200, deadline=None, database=None)
@given(text=ANY_TEXT)
def test_round_trip_bytes(text):
  assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@settings(max_examples=400, deadline=None, database=None)
@given(text=ANY_TEXT | st.text(alphabet=' \n\t\r\x00<>/s0x1aé漢\U0001f600'))
def test_round_trip_pieces(pieces, text):
  ids = pieces.encode(text)
  assert pieces.decode(ids) == text
  assert pieces.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize(
  'text', ['', '\n\n\n', '  lead and trail  ', '</s><unk><0x0A>', 'a\x00b', '\ufeff\u3000\u2028']
)
def test_round_trip_of_awkward_texts(pieces, text):
  for tokenizer in tokenizers(pieces):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_exceptions(pieces):
  assert pieces.decode(pieces.encode('a\u2581b')) == 'a b'
  for tokenizer in tokenizers(pieces):
    assert tokenizer.decode(tokenizer.encode('a\ud800b')) == 'a?b'


def test_batch_is_the_same_as_one_by_one(pieces):
  for tokenizer in tokenizers(pieces):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(t) for t in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_long_texts_are_cut_without_changing_ids(pieces, monkeypatch):
  text = '\n'.join(TEXTS * 4)
  whole = pieces.encode(text)
  monkeypatch.setattr(module, 'BLOCK', 50)
  assert pieces.encode(text) == whole


def test_specials_and_lengths(pieces):
  for tokenizer in tokenizers(pieces):
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,) and lengths.dtype == np.int32
    assert lengths[tokenizer.eos] == 0 and (lengths > 0).sum() >= 256
    ids = tokenizer.encode('one')
    assert tokenizer.decode(np.array([tokenizer.eos, *ids, tokenizer.eos])) == 'one'
    with pytest.raises(ValueError, match=f'id {tokenizer.vocab_size} .*vocab_size={tokenizer.vocab_size}'):
      tokenizer.decode([tokenizer.vocab_size])
  assert pieces.decode([0]) == ''
  assert ByteTokenizer().decode([0xFF, ord('a')]) == '\ufffda'


def test_pieces_suit_code(pieces):
  assert pieces.vocab_size == 320
  assert len(pieces.encode('\n')) == 1 and len(pieces.encode('\n\n')) == 2
  assert len(pieces.encode('123')) == 3
  assert len(pieces.encode('        ')) < 8


def test_training_is_deterministic_and_ignores_order(pieces):
  assert PART.build(iter(TEXTS)).fingerprint() == pieces.fingerprint()
  assert PART.build(TEXTS[::-1]).fingerprint() == pieces.fingerprint()
  assert PART.build(TEXTS[:3]).fingerprint() != pieces.fingerprint()


def test_sample_is_bounded():
  texts = [f'{i:03}' * 100 for i in range(100)]
  sample = module._sample(iter(texts), 3000)
  assert 3000 <= sum(map(len, sample)) < 3300 and set(sample) <= set(texts)
  assert sum(map(len, module._sample(['é' * 10_000], 3000))) == 1500


@pytest.mark.parametrize('vocab', [100, 100_000])
def test_vocab_that_does_not_suit_is_named(vocab):
  with pytest.raises(ValueError, match=f'TrainedPieces.vocab={vocab}'):
    TrainedPieces(vocab=vocab).build(TEXTS)


def test_save_and_load(pieces, tmp_path):
  for i, tokenizer in enumerate(tokenizers(pieces)):
    tokenizer.save(tmp_path / str(i))
    loaded = load_tokenizer(tmp_path / str(i))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.vocab_size, loaded.eos) == (tokenizer.vocab_size, tokenizer.eos)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_load_errors(pieces, tmp_path):
  with pytest.raises(FileNotFoundError, match='tokenizer.json is absent'):
    load_tokenizer(tmp_path)
  pieces.save(tmp_path)
  (tmp_path / 'tokenizer.model').write_bytes(TrainedPieces(vocab=310).build(TEXTS).model)
  with pytest.raises(ValueError, match='fingerprint'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text('{"kind": "words"}')
  with pytest.raises(ValueError, match="kind='words' is none of bytes, pieces"):
    load_tokenizer(tmp_path)


def test_given_pieces(pieces, tmp_path):
  path = str(tmp_path / 'given.model')
  with pytest.raises(FileNotFoundError, match="GivenPieces.path='.*given.model': no such file"):
    GivenPieces(path=path).build(())
  with open(path, 'wb') as f:
    f.write(pieces.model)
  assert GivenPieces(path=path).build(()).encode(TEXTS[1]) == pieces.encode(TEXTS[1])
  assert GivenPieces(path=path).sources()[0][:2] == (path, len(pieces.model))
  assert Bytes().build(()) == ByteTokenizer() and Bytes().sources() == PART.sources() == []


def test_given_model_must_be_usable(tmp_path):
  from sentencepiece import SentencePieceTrainer

  model = io.BytesIO()
  SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[2].split("\n")), model_writer=model, vocab_size=40, eos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
  path = tmp_path / 'endless.model'
  path.write_bytes(model.getvalue())
  with pytest.raises(ValueError, match='GivenPieces.path=.*endless.model.*no end-of-sentence'):
    GivenPieces(path=str(path)).build(())
  with pytest.raises(ValueError, match='no end-of-sentence'):
    PieceTokenizer(model=model.getvalue())
  path.write_bytes(b'not a model')
  with pytest.raises(ValueError, match='GivenPieces.path=.*endless.model.*not a usable'):
    GivenPieces(path=str(path)).build(())


def test_foreign_model_with_a_dummy_prefix_is_not_cut(tmp_path, monkeypatch):
  from sentencepiece import SentencePieceTrainer

  model = io.BytesIO()
  SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).split("\n")), model_writer=model, model_type="bpe", vocab_size=340,
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
  tokenizer = PieceTokenizer(model=model.getvalue())
  whole = tokenizer.encode(TEXTS[2])
  monkeypatch.setattr(module, 'BLOCK', 10)
  assert tokenizer.encode(TEXTS[2]) == whole
  assert tokenizer.byte_lengths()[tokenizer.eos] == 0


def test_imports_are_lazy():
  code = (
    'import sys, loopformer.data.tokenizer, loopformer.data.corpus, loopformer.data, loopformer.tasks.text\n'
    'loopformer.data.tokenizer.Bytes().build(())\n'
    "heavy = {'grain', 'array_record', 'sentencepiece', 'pyarrow'} & set(sys.modules)\n"
    'assert not heavy, heavy'
  )
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
  subprocess.run([sys.executable, '-c', code], check=True, env=env, timeout=60)
