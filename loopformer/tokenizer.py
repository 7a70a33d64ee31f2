"""Tokenizers, text <-> ids: bytes, or sentencepiece pieces trained on the corpus or given as a file.

sentencepiece is imported only where a piece tokenizer is used, so bytes work without it.
"""

import abc
import dataclasses
import functools
import hashlib
import heapq
import io
import json
import os
from collections.abc import Iterable, Sequence

import numpy as np

FILE = 'tokenizer.json'
MODEL = 'tokenizer.model'
META = '\u2581'  # how sentencepiece writes a space inside a piece
BLOCK = 1_000_000  # characters encoded in one call: longer documents are cut at newlines
LINE = 16_384  # characters of a training sentence: longer lines are cut
BUILT_IN = ('bytes', 'pieces')


class Tokenizer(abc.ABC):
  """What the library asks of a tokenizer; ids are 0 .. vocab_size - 1 and `eos` ends a document."""

  vocab_size: int
  eos: int

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """The ids of a text, without `eos`."""

  @abc.abstractmethod
  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """The ids of each text."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids: special ids are dropped, invalid UTF-8 is replaced; ValueError for an id outside."""

  @abc.abstractmethod
  def byte_lengths(self) -> np.ndarray:
    """UTF-8 bytes that each id stands for, i32[V]; 0 for special ids."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """A hex hash of everything that affects the ids."""

  @abc.abstractmethod
  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `load_tokenizer` reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
  """UTF-8 bytes are the ids 0 .. 255, end of document is 256."""

  vocab_size = 257
  eos = 256

  def encode(self, text):
    return list(text.encode('utf-8', 'replace'))

  def encode_batch(self, texts):
    return [self.encode(text) for text in texts]

  def decode(self, ids):
    ids = _checked(ids, self.vocab_size)
    return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')

  def byte_lengths(self):
    lengths = np.ones(self.vocab_size, np.int32)
    lengths[self.eos] = 0
    return lengths

  def fingerprint(self):
    return hashlib.sha256(b'bytes 0..255, eos 256').hexdigest()

  def save(self, folder):
    _write(folder, {'kind': 'bytes', 'fingerprint': self.fingerprint()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PieceTokenizer(Tokenizer):
  """A sentencepiece model, held as its serialized proto.

  Models trained by `TrainedPieces` give back every text exactly, but for U+2581, sentencepiece's own mark for
  a space, which comes back as a space; a lone surrogate comes back as '?'. A given model may normalise text.
  ValueError if the model has no end-of-sentence piece.
  """

  model: bytes = dataclasses.field(repr=False)

  def __post_init__(self):
    if self._processor.eos_id() < 0:
      raise ValueError(
        'PieceTokenizer.model has no end-of-sentence piece (its eos_id is -1), which is needed to end '
        'documents: train the model with eos_id >= 0'
      )

  @functools.cached_property
  def _processor(self):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=self.model)

  @functools.cached_property
  def _cuttable(self) -> bool:
    """Whether a text cut after a newline has the same ids: so if newline is a token of its own."""
    encode = self._processor.encode
    return encode('a\n\n b') == encode('a\n') + encode('\n') + encode(' b')

  @property
  def vocab_size(self):
    return self._processor.vocab_size()

  @property
  def eos(self):
    return self._processor.eos_id()

  def encode(self, text):
    return self.encode_batch([text])[0]

  def encode_batch(self, texts):
    texts = [text.encode('utf-8', 'replace').decode('utf-8') for text in texts]
    if max(map(len, texts), default=0) <= BLOCK or not self._cuttable:
      return self._processor.encode(texts)
    # One call on a text of gigabytes would need many times its size in memory.
    return [[i for block in _blocks(text) for i in self._processor.encode(block)] for text in texts]

  def decode(self, ids):
    special = self._special
    return self._processor.decode([i for i in _checked(ids, self.vocab_size) if not special[i]])

  @functools.cached_property
  def _special(self) -> np.ndarray:
    p = self._processor
    return np.array([p.is_control(i) or p.is_unknown(i) or p.is_unused(i) for i in range(self.vocab_size)])

  def byte_lengths(self):
    p = self._processor
    lengths = np.zeros(self.vocab_size, np.int32)
    for i in np.flatnonzero(~self._special).tolist():
      lengths[i] = 1 if p.is_byte(i) else len(p.id_to_piece(i).replace(META, ' ').encode())
    return lengths

  def fingerprint(self):
    return hashlib.sha256(b'sentencepiece' + self.model).hexdigest()

  def save(self, folder):
    _write(folder, {'kind': 'pieces', 'fingerprint': self.fingerprint()})
    with open(os.path.join(folder, MODEL), 'wb') as f:
      f.write(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """Part: one token for each byte."""

  def build(self, texts: Iterable[str]) -> Tokenizer:
    del texts
    return ByteTokenizer()

  def sources(self) -> list[tuple[str, int, str]]:
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedPieces:
  """Part: sentencepiece BPE with byte fallback, trained on a sample of the corpus; lossless, the same every time.

  `vocab` counts all ids: 256 bytes, unknown, end of document, newline, then learnt pieces. `sample_bytes` bounds
  the text trained on and the memory it takes: whole documents, chosen by a hash of their contents.
  ValueError if `vocab` is too small or too large for the text.
  """

  vocab: int = 1024
  sample_bytes: int = 8_000_000

  def build(self, texts: Iterable[str]) -> Tokenizer:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
      SentencePieceTrainer.train(
        sentence_iterator=_sentences(_sample(texts, self.sample_bytes)),
        model_writer=model,
        model_type='bpe',
        vocab_size=self.vocab,
        byte_fallback=True,
        normalization_rule_name='identity',
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=['\n'],
        split_digits=True,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        max_sentence_length=8 * LINE,
        num_threads=1,  # the result must not depend on the machine
        minloglevel=2,
      )
    except RuntimeError as e:
      raise ValueError(
        f'TrainedPieces.vocab={self.vocab} does not suit this text: choose another size, or Bytes() for '
        f'very little text. sentencepiece says: {e}'
      ) from None
    return PieceTokenizer(model=model.getvalue())

  def sources(self) -> list[tuple[str, int, str]]:
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenPieces:
  """Part: a sentencepiece .model file; FileNotFoundError if absent, ValueError if it cannot end a document."""

  path: str

  def build(self, texts: Iterable[str]) -> Tokenizer:
    del texts
    model = self._read()
    try:
      return PieceTokenizer(model=model)
    except (RuntimeError, ValueError) as e:
      raise ValueError(f'GivenPieces.path={self.path!r} is not a usable sentencepiece model: {e}') from None

  def sources(self) -> list[tuple[str, int, str]]:
    """(path, size, sha256) of the model: prepared data is stale once it changes."""
    model = self._read()
    return [(self.path, len(model), hashlib.sha256(model).hexdigest())]

  def _read(self) -> bytes:
    if not os.path.isfile(self.path):
      raise FileNotFoundError(
        f'GivenPieces.path={self.path!r}: no such file; give the path of a sentencepiece .model file'
      )
    with open(self.path, 'rb') as f:
      return f.read()


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
  """The tokenizer saved in a folder; FileNotFoundError or ValueError naming the file that is absent or damaged."""
  path = os.path.join(folder, FILE)
  if not os.path.isfile(path):
    raise FileNotFoundError(f'no tokenizer in {os.fspath(folder)!r}: {FILE} is absent; prepare the data first')
  with open(path, encoding='utf-8') as f:
    saved = json.load(f)
  if saved.get('kind') not in BUILT_IN:
    raise ValueError(f'{path}: kind={saved.get("kind")!r} is none of {", ".join(BUILT_IN)}')
  tokenizer: Tokenizer
  if saved['kind'] == 'bytes':
    tokenizer = ByteTokenizer()
  else:
    tokenizer = GivenPieces(path=os.path.join(folder, MODEL)).build(())
  if tokenizer.fingerprint() != saved.get('fingerprint'):
    raise ValueError(
      f'{path}: the fingerprint is not that of the tokenizer beside it, so the folder is damaged or of another '
      'version: delete it and prepare the data again'
    )
  return tokenizer


def _write(folder, saved: dict) -> None:
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, FILE), 'w', encoding='utf-8') as f:
    json.dump(saved, f, indent=1)


def _checked(ids, size: int) -> list[int]:
  ids = [int(i) for i in ids]
  for i in ids:
    if not 0 <= i < size:
      raise ValueError(f"id {i} is outside the tokenizer's vocab_size={size}")
  return ids


def _sample(texts: Iterable[str], limit: int) -> list[str]:
  """Whole documents of the smallest content hashes, until `limit` bytes: the order of `texts` does not matter."""
  kept, size = [], 0
  for text in texts:
    data = text[:limit].encode('utf-8', 'replace')[:limit]
    key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
    heapq.heappush(kept, (-key, data))
    size += len(data)
    while size - len(kept[0][1]) >= limit:
      size -= len(heapq.heappop(kept)[1])
  return [data.decode('utf-8', 'ignore') for _, data in sorted(kept, reverse=True)]


def _sentences(texts: Iterable[str]):
  """Lines of at most LINE characters: newlines are tokens of their own, so nothing is learnt across them."""
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), LINE):
        yield line[start : start + LINE]


def _blocks(text: str):
  """A text cut after newlines into blocks of about BLOCK characters (more if it has no newline there)."""
  start = 0
  while start < len(text):
    end = text.find('\n', start + BLOCK) + 1 or len(text)
    yield text[start:end]
    start = end
