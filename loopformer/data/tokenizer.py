"""Tokenizers, text <-> ids: bytes, sentencepiece pieces trained on the corpus or given as a file, or a tokenizer.json.

sentencepiece and tokenizers are imported only where a tokenizer of theirs is used, so bytes work without them.
"""

import abc
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from loopformer import reading, storage
from loopformer.types import ConfigError

FILE = 'tokenizer.json'
MODEL = 'tokenizer.model'
JSON = 'hugging_face.json'
BROKEN = '\ufffd'  # what bytes that are no text are decoded as
NEAR = 16  # ids before a continuation that usually decide how it begins
META = '\u2581'  # how sentencepiece writes a space inside a piece
BLOCK = 1_000_000  # characters encoded in one call: longer documents are cut at newlines
LINE = 16_384  # characters of a training sentence: longer lines are cut
BUILT_IN = ('bytes', 'pieces', 'json')
AROUND = ('chat', 'marked')  # those that hold another (chat.py)
END = '<|endoftext|>'  # what the end of a document is called where it must have a name


class Tokenizer(abc.ABC):
  """What the library asks of a tokenizer; ids are 0 .. vocab_size - 1 and `eos` ends a document."""

  if TYPE_CHECKING:  # to be read alone: some have them as constants, some as fields, some as properties

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos(self) -> int: ...

  @property
  def ends(self) -> tuple[int, ...]:
    """The ids at which generation ends, `eos` first."""
    return (self.eos,)

  @property
  def start(self) -> int | None:
    """The id before the first of a text, where a model was trained with one; `encode` leaves it out."""
    return None

  @abc.abstractmethod
  def encode(self, text: str) -> list[int]:
    """The ids of a text, without `start` and `eos`."""

  def encode_special(self, text: str) -> list[int]:
    """The same, where the names of special tokens stand for these tokens."""
    specials = self.specials()
    if not specials:
      return self.encode(text)
    parts = re.split('(' + '|'.join(map(re.escape, sorted(specials, key=len, reverse=True))) + ')', text)
    return [i for part in parts if part for i in ([specials[part]] if part in specials else self.encode(part))]

  def specials(self) -> dict[str, int]:
    """Special tokens by what chat templates call them."""
    return {}

  @abc.abstractmethod
  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """The ids of each text."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids: special ids are dropped, invalid UTF-8 is replaced; ValueError for an id outside."""

  @abc.abstractmethod
  def byte_lengths(self) -> np.ndarray:
    """UTF-8 bytes that each id stands for within a text, i32[V]; 0 for special ids."""

  def first_byte_lengths(self) -> np.ndarray:
    """The same where the id begins a text, i32[V]: one fewer of pieces whose space is not the text's own."""
    return self.byte_lengths()

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """A hex hash of everything that affects the ids."""

  @abc.abstractmethod
  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `load_tokenizer` reads."""

  def hugging_face(self) -> str | None:
    """The same as a tokenizer.json of Hugging Face's `tokenizers`, its text; None where there is no such file."""
    return None


def ends_of(tokenizer: Any) -> tuple[int, ...]:
  """The ids at which generation ends, also of what has no more of a tokenizer than `encode`, `decode` and `eos`."""
  return tokenizer.ends if isinstance(tokenizer, Tokenizer) else (tokenizer.eos,)


def start_of(tokenizer: Any) -> int | None:
  """The id before a text, also of what has no more of a tokenizer than `encode`, `decode` and `eos`."""
  return tokenizer.start if isinstance(tokenizer, Tokenizer) else None


def before_text(tokenizer: Any) -> int:
  """What a text is predicted from that nothing precedes: `start`, or else the end of another document."""
  start = start_of(tokenizer)
  return tokenizer.eos if start is None else start


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
  """The ids of a text that a model goes on with: `start` once, also where the text spells it out, then the text."""
  return begun(tokenizer, tokenizer.encode(text))


def begun(tokenizer: Any, ids: list[int]) -> list[int]:
  """The ids of a whole text after `start`, once."""
  start = start_of(tokenizer)
  return ids if start is None or ids[:1] == [start] else [start, *ids]


def continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
  """The text that ids add to that of the ids before them, which decide over a space at its beginning.

  A letter of several bytes that begins in `before` comes whole.
  """
  head, both = tokenizer.decode(before), tokenizer.decode([*before, *ids])
  return both[len(os.path.commonprefix([head, both])):]


def anchor(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
  """Some last ids, before which the others change nothing: `continuation` is the same after these as after all."""
  ids, count = list(ids), NEAR
  text = tokenizer.decode(ids)
  while count < len(ids):
    near = tokenizer.decode(ids[-count:])
    if near and text.endswith(near) and near[0] != BROKEN:
      return ids[-count:]
    count *= 2
  return ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteTokenizer(Tokenizer):
  """UTF-8 bytes are the ids 0 .. 255, end of document is 256."""

  vocab_size = 257
  eos = 256

  def encode(self, text: str) -> list[int]:
    return list(text.encode('utf-8', 'replace'))

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    ids = _checked(ids, self.vocab_size)
    return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')

  def byte_lengths(self) -> np.ndarray:
    lengths = np.ones(self.vocab_size, np.int32)
    lengths[self.eos] = 0
    return lengths

  def specials(self) -> dict[str, int]:
    return {END: self.eos}

  def fingerprint(self) -> str:
    return hashlib.sha256(b'bytes 0..255, eos 256').hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    write_about(folder, {'kind': 'bytes', 'fingerprint': self.fingerprint()})

  def hugging_face(self) -> str | None:
    """As it is, save that a text which spells `END` out has the end of the document there."""
    return _json(_byte_level(False), {byte: i for i, byte in enumerate(ALPHABET)}, [], [_added(self.eos, END, True)])


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
  def _processor(self) -> Any:
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=self.model)

  @functools.cached_property
  def _cuttable(self) -> bool:
    """Whether a text cut after a newline has the same ids: so if newline is a token of its own."""
    encode = self._processor.encode
    return encode('a\n\n b') == encode('a\n') + encode('\n') + encode(' b')

  @property
  def vocab_size(self) -> int:
    return self._processor.vocab_size()

  @property
  def eos(self) -> int:
    return self._processor.eos_id()

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    texts = [text.encode('utf-8', 'replace').decode('utf-8') for text in texts]
    if max(map(len, texts), default=0) <= BLOCK or not self._cuttable:
      return self._processor.encode(texts)
    # A text of gigabytes as one would need many times its size in memory, and have one thread.
    blocks = [list(_blocks(text)) for text in texts]
    ids = iter(self._processor.encode([block for text in blocks for block in text]))
    return [[i for _ in text for i in next(ids)] for text in blocks]

  def decode(self, ids: Sequence[int]) -> str:
    special = self._special
    return self._processor.decode([i for i in _checked(ids, self.vocab_size) if not special[i]])

  @functools.cached_property
  def _special(self) -> np.ndarray:
    p = self._processor
    return np.array([p.is_control(i) or p.is_unknown(i) or p.is_unused(i) for i in range(self.vocab_size)])

  def byte_lengths(self) -> np.ndarray:
    p = self._processor
    lengths = np.zeros(self.vocab_size, np.int32)
    for i in np.flatnonzero(~self._special).tolist():
      lengths[i] = 1 if p.is_byte(i) else len(p.id_to_piece(i).replace(META, ' ').encode())
    return lengths

  def first_byte_lengths(self) -> np.ndarray:
    spaced = [i for i in np.flatnonzero(~self._special).tolist() if self._processor.id_to_piece(i).startswith(META)]
    lengths = self.byte_lengths()
    if spaced and not self._processor.decode([spaced[-1], spaced[-1]]).startswith(' '):
      lengths[spaced] -= 1
    return lengths

  def known(self) -> set[str]:
    """What its ids are called."""
    return {self._processor.id_to_piece(i) for i in range(self.vocab_size)}

  def specials(self) -> dict[str, int]:
    p = self._processor
    return {p.id_to_piece(i): i for i in range(self.vocab_size) if p.is_control(i)}

  def fingerprint(self) -> str:
    return hashlib.sha256(b'sentencepiece' + self.model).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    write_about(folder, {'kind': 'pieces', 'fingerprint': self.fingerprint()})
    storage.write(storage.path(folder) / MODEL, self.model)

  def hugging_face(self) -> str | None:
    """As it is for BPE that leaves texts as they are, such as that of `TrainedPieces`; None for other models.

    Names of special ids are read as these ids. Of two ways to put one piece together that overlap, sentencepiece takes
    the left one, `tokenizers` that of the older pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(self.model)
    changes = proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE or not proto.trainer_spec.byte_fallback or (
        changes.precompiled_charsmap or changes.add_dummy_prefix or changes.remove_extra_whitespaces):
      return None
    p = self._processor
    ids = {p.id_to_piece(i): i for i in range(self.vocab_size)}
    given = {i for i, piece in enumerate(proto.pieces) if piece.type == piece.USER_DEFINED}
    merges = [(-p.get_score(i), ids[piece[:cut]], ids[piece[cut:]], (piece[:cut], piece[cut:]))
              for piece, i in ids.items() if not self._special[i] and not p.is_byte(i) and i not in given
              for cut in range(1, len(piece)) if piece[:cut] in ids and piece[cut:] in ids]
    added = [_added(i, p.id_to_piece(i), True) for i in np.flatnonzero(self._special).tolist()]
    added += [_added(i, p.id_to_piece(i).replace(META, ' '), False) for i in sorted(given)]
    spaces = {
      'normalizer': {'type': 'Replace', 'pattern': {'String': ' '}, 'content': META},
      'pre_tokenizer': None,
      'decoder': {'type': 'Sequence', 'decoders': [
        {'type': 'Replace', 'pattern': {'String': META}, 'content': ' '}, {'type': 'ByteFallback'}, {'type': 'Fuse'}]},
    }
    return _json(spaces, ids, [pair for *_, pair in sorted(merges)], added, unk_token=p.id_to_piece(p.unk_id()),
                 byte_fallback=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonTokenizer(Tokenizer):
  """A tokenizer.json, held as its text, that the package `tokenizers` (extra `hf`) reads; `eos` is an id of it.

  Special tokens that are spelt out in a text are read as such. What a post-processor would add is not added
  (`added_first`). ImportError where `tokenizers` is not installed, when the first text is encoded or decoded.
  """

  text: str = dataclasses.field(repr=False)
  eos: int

  def __post_init__(self):
    if not isinstance(self.eos, (int, np.integer)) or not 0 <= self.eos < self.vocab_size:
      raise ValueError(f'JsonTokenizer.eos={self.eos!r} is none of the ids 0 .. {self.vocab_size - 1}')

  @functools.cached_property
  def _tokenizer(self) -> Any:
    try:
      from tokenizers import Tokenizer as HuggingFace
    except ImportError as e:
      raise ImportError("reading a tokenizer.json needs the package tokenizers: install the extra 'hf'") from e

    made = HuggingFace.from_str(self.text)
    made.no_truncation()  # files keep the lengths of the last call of whoever wrote them
    made.no_padding()
    return made

  @functools.cached_property
  def _table(self) -> tuple[dict[int, str], dict[int, bool]]:
    """The pieces of the model by id, and the added tokens: whether they are special."""
    saved = json.loads(self.text)
    vocab = saved['model']['vocab']
    ids = {i: piece for piece, i in vocab.items()} if isinstance(vocab, dict) else {
      i: piece for i, (piece, _) in enumerate(vocab)}
    added = {token['id']: token for token in saved.get('added_tokens') or ()}
    return ids | {i: t['content'] for i, t in added.items()}, {i: t['special'] for i, t in added.items()}

  @property
  def vocab_size(self) -> int:
    return max(self._table[0]) + 1

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    texts = [text.encode('utf-8', 'replace').decode('utf-8') for text in texts]
    return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

  def encode_special(self, text: str) -> list[int]:
    return self.encode(text)

  def specials(self) -> dict[str, int]:
    pieces, added = self._table
    return {pieces[i]: i for i in added}

  def decode(self, ids: Sequence[int]) -> str:
    return self._tokenizer.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

  def known(self) -> set[str]:
    """What its ids are called."""
    return set(self._table[0].values())

  @property
  def added_first(self) -> int | None:
    """The id that the post-processor puts before a text, if it does."""
    steps = [json.loads(self.text).get('post_processor') or {}]
    while steps:
      step = steps.pop(0)
      steps = [*step.get('processors', ()), *steps]
      if first := (step.get('single') or [{}])[0].get('SpecialToken'):
        return step['special_tokens'][first['id']]['ids'][0]
    return None

  def byte_lengths(self) -> np.ndarray:
    return self._byte_lengths[0]

  def first_byte_lengths(self) -> np.ndarray:
    return self._byte_lengths[1]

  @functools.cached_property
  def _byte_lengths(self) -> np.ndarray:
    """i32[2, V]: within a text, and at its beginning."""
    pieces, added = self._table
    lengths = np.zeros((2, self.vocab_size), np.int32)
    ids = [i for i in pieces if not added.get(i)]
    if '"ByteLevel"' in json.dumps(json.loads(self.text).get('decoder')):
      for i in ids:
        lengths[:, i] = len(pieces[i].encode() if i in added else pieces[i])
      return lengths
    texts = self._tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=True)
    before = next((i for i, text in zip(ids, texts) if text.isalnum()), ids[0])  # what a text may begin with
    head = self._tokenizer.decode([before], skip_special_tokens=True)
    after = self._tokenizer.decode_batch([[before, i] for i in ids], skip_special_tokens=True)
    for i, first, both in zip(ids, texts, after):
      within = both[len(os.path.commonprefix([head, both])):]
      lengths[:, i] = 1 if _is_byte(pieces[i]) else (len(within.encode()), len(first.encode()))
    return lengths

  def fingerprint(self) -> str:
    return hashlib.sha256(f'json, eos {self.eos}: {self.text}'.encode()).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    write_about(folder, {'kind': 'json', 'eos': self.eos, 'fingerprint': self.fingerprint()})
    storage.write(storage.path(folder) / JSON, self.text)

  def hugging_face(self) -> str | None:
    return self.text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """Part: one token for each byte."""

  def build(self, texts: Iterable[str]) -> ByteTokenizer:
    del texts
    return ByteTokenizer()

  def sources(self) -> list[storage.File]:
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

  def build(self, texts: Iterable[str]) -> PieceTokenizer:
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

  def sources(self) -> list[storage.File]:
    return []


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenPieces:
  """Part: a sentencepiece .model file; FileNotFoundError if absent, ValueError if it cannot end a document."""

  path: str
  root: str = dataclasses.field(default='', repr=False)  # the folder that it starts from, as of corpus.Files

  @property
  def paths(self) -> tuple[str, ...]:
    """Fields that hold paths."""
    return () if storage.whole(self.path) else ('root',)

  def build(self, texts: Iterable[str]) -> PieceTokenizer:
    del texts
    model = self._read()
    try:
      return PieceTokenizer(model=model)
    except (RuntimeError, ValueError) as e:
      raise ValueError(f'GivenPieces.path={self.path!r} is not a usable sentencepiece model: {e}') from None

  def sources(self) -> list[storage.File]:
    """The model: prepared data is stale once it changes."""
    return [_source(self.path, self._read())]

  def _read(self) -> bytes:
    path = storage.path(storage.within(self.root, self.path))
    if not path.exists():
      raise FileNotFoundError(
        f'GivenPieces.path={self.path!r}: no such file; give the path of a sentencepiece .model file'
      )
    return reading.contents(path, 'give the path of a sentencepiece .model file')


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenJson:
  """Part: a tokenizer.json, and the name of the token that ends a document; FileNotFoundError or ValueError if absent.
  """

  path: str
  eos: str
  root: str = dataclasses.field(default='', repr=False)  # the folder that it starts from, as of corpus.Files

  @property
  def paths(self) -> tuple[str, ...]:
    """Fields that hold paths."""
    return () if storage.whole(self.path) else ('root',)

  def build(self, texts: Iterable[str]) -> JsonTokenizer:
    del texts
    text = self._read()
    return json_tokenizer(text, id_of(text, self.eos, f'GivenJson.path={self.path!r}'), self.path)

  def sources(self) -> list[storage.File]:
    """The file: prepared data is stale once it changes."""
    return [_source(self.path, self._read().encode())]

  def _read(self) -> str:
    path = storage.path(storage.within(self.root, self.path))
    if not path.exists():
      raise FileNotFoundError(f'GivenJson.path={self.path!r}: no such file; give the path of a tokenizer.json')
    return json_text(path)


def _source(path: str, contents: bytes) -> storage.File:
  """A file that was read: it is small, so its stamp is its hash."""
  digest = hashlib.sha256(contents).hexdigest()
  return storage.File(path, len(contents), digest, lambda: digest)


def json_text(path: str | os.PathLike) -> str:
  """What a tokenizer.json holds. Raises ConfigError where it cannot be read, or is not of the form of one."""
  remedy = 'fetch it again, or give another tokenizer'
  text = reading.text(path, remedy)
  saved = reading.parsed(text, os.fspath(path), remedy)
  vocab = saved['model'].get('vocab') if isinstance(saved.get('model'), dict) else None
  added = saved.get('added_tokens') or []
  right = (isinstance(vocab, dict) or isinstance(vocab, list) and all(
      isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in vocab)) and isinstance(added, list)
  right = right and all(isinstance(token, dict) and isinstance(token.get('content'), str) and 'special' in token
                        for token in added)
  ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(token.get('id') for token in added)] if right else []
  if not right or not vocab or not all(type(i) is int and 0 <= i < len(text) for i in ids):  # an id takes a character
    raise ConfigError(f'{os.fspath(path)} is damaged: it has no vocabulary of a tokenizer.json; {remedy}')
  return text


def json_tokenizer(text: str, eos: int, where: str | os.PathLike) -> JsonTokenizer:
  """The tokenizer of what a tokenizer.json at `where` holds. Raises ConfigError where it is none, or has no such id."""
  try:
    tokenizer = JsonTokenizer(text=text, eos=eos)
    with contextlib.suppress(ImportError):  # which is said where a text is encoded
      tokenizer._tokenizer
  except Exception as e:  # tokenizers has no class of its own
    raise ConfigError(f'{os.fspath(where)}: it is no usable tokenizer ({e}); fetch it again, or give another') from e
  return tokenizer


def id_of(text: str, token: str, where: str) -> int:
  """The id of a token of a tokenizer.json; ValueError, beginning with `where`, if there is none of that name."""
  saved = json.loads(text)
  added = {t['content']: t['id'] for t in saved.get('added_tokens') or ()}
  vocab = saved['model']['vocab']
  i = added.get(token, vocab.get(token) if isinstance(vocab, dict) else None)
  if i is None:
    names = ', '.join(map(repr, added)) or 'none'
    raise ValueError(f'{where}: it has no token {token!r}; its added tokens are {names}')
  return i


def load_tokenizer(folder: str | os.PathLike) -> Tokenizer:
  """The tokenizer saved in a folder; FileNotFoundError or ValueError naming the file that is absent or damaged."""
  path = storage.path(folder) / FILE
  if not path.exists():
    from loopformer.data import symbols
    if (of_symbols := symbols.saved_in(folder)) is not None:
      return of_symbols
    raise FileNotFoundError(f'no tokenizer in {os.fspath(folder)!r}: {FILE} is absent; prepare the data first')
  saved = reading.read_json(path, 'delete the folder and prepare the data again')
  if saved.get('kind') not in (*BUILT_IN, *AROUND):
    raise ValueError(f'{path}: kind={saved.get("kind")!r} is none of {", ".join((*BUILT_IN, *AROUND))}')
  tokenizer: Tokenizer
  if saved['kind'] in AROUND:
    from loopformer.data import chat
    tokenizer = chat.around(saved, path.parent)
  elif saved['kind'] == 'bytes':
    tokenizer = ByteTokenizer()
  elif saved['kind'] == 'json':
    tokenizer = json_tokenizer(json_text(path.with_name(JSON)), saved.get('eos'), path.with_name(JSON))
  else:
    tokenizer = GivenPieces(path=str(path.with_name(MODEL))).build(())
  if tokenizer.fingerprint() != saved.get('fingerprint'):
    raise ValueError(
      f'{path}: the fingerprint is not that of the tokenizer beside it ({MODEL} or {JSON}), so the folder is damaged '
      'or of another version: delete it and prepare the data again'
    )
  return tokenizer


def write_about(folder: str | os.PathLike, saved: dict) -> None:
  """Writes what `load_tokenizer` reads first: the kind of a tokenizer, and its fingerprint."""
  folder = storage.path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  storage.write(folder / FILE, json.dumps(saved, indent=1))


def _checked(ids: Sequence[int], size: int) -> list[int]:
  ids = [int(i) for i in ids]
  for i in ids:
    if not 0 <= i < size:
      raise ValueError(f"id {i} is outside the tokenizer's vocab_size={size}")
  return ids


def _byte_alphabet() -> tuple[str, ...]:
  """The characters by which byte-level vocabularies write the bytes 0 .. 255, GPT-2's: printable ones as they are."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
  others = [byte for byte in range(256) if byte not in printable]
  return tuple(chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256))


ALPHABET = _byte_alphabet()


def _is_byte(piece: str) -> bool:
  return len(piece) == 6 and piece.startswith('<0x') and piece.endswith('>')


def _byte_level(words: bool, *first: dict) -> dict:
  """Steps of a tokenizer.json that works on bytes; after the steps `first`, and within GPT-2's words or not."""
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
  steps = [*first, level | {'use_regex': words}]
  return {'normalizer': None, 'decoder': level | {'use_regex': True},
          'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': steps} if first else steps[0]}


def _added(i: int, content: str, special: bool) -> dict:
  return {'id': i, 'content': content, 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
          'special': special}


def _json(steps: dict, vocab: dict[str, int], merges: list, added: list[dict], **model: Any) -> str:
  """A tokenizer.json of byte-pair encoding."""
  bpe = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
         'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
         'vocab': vocab, 'merges': [list(pair) for pair in merges], **model}
  return json.dumps({'version': '1.0', 'truncation': None, 'padding': None,
                     'added_tokens': sorted(added, key=lambda token: token['id']), **steps, 'post_processor': None,
                     'model': bpe}, ensure_ascii=False, indent=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
  """How a byte-level tokenizer cuts texts before it merges pairs.

  cuts: pre-tokenizers of a tokenizer.json; gpt2: whether GPT-2's words follow them; normalizer: what comes before all;
  whole: whether what is a piece as it is cut is taken whole, whatever its pairs.
  """
  cuts: tuple[dict, ...] = ()
  gpt2: bool = True
  normalizer: dict | None = None
  whole: bool = False


def byte_level_bpe(vocab: Sequence[str], merges: Iterable[Sequence[str]], added: dict[int, bool],
                   words: Words = Words()) -> str:
  """The tokenizer.json of a byte-level vocabulary.

  vocab: pieces by id; merges: pairs, oldest first; added: ids that are found in texts as they are spelt, and whether
  they are special.
  """
  return _json(_byte_level(words.gpt2, *words.cuts) | {'normalizer': words.normalizer},
               {piece: i for i, piece in enumerate(vocab)}, list(merges),
               [_added(i, vocab[i], special) for i, special in added.items()], ignore_merges=words.whole)


def bpe_pieces(vocab: Sequence[str], scores: Sequence[float], types: Sequence[int], *, unk: int, bos: int | None,
               eos: int, prefix: bool) -> PieceTokenizer:
  """A sentencepiece model (BPE, with bytes for what is no piece, texts as they are) of its pieces, scores and types.

  prefix: whether a space is put before a text. Raises RuntimeError or ValueError where they are no such model.
  """
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  for piece, score, kind in zip(vocab, scores, types, strict=True):
    proto.pieces.add(piece=piece, score=score, type=kind)
  spec = proto.trainer_spec
  spec.model_type, spec.vocab_size = spec.BPE, len(vocab)
  spec.byte_fallback = any(piece.type == piece.BYTE for piece in proto.pieces)
  spec.unk_id, spec.unk_piece, spec.eos_id, spec.eos_piece, spec.pad_id = unk, vocab[unk], eos, vocab[eos], -1
  spec.bos_id, spec.bos_piece = (-1, '') if bos is None else (bos, vocab[bos])
  proto.normalizer_spec.name = 'identity'
  proto.normalizer_spec.add_dummy_prefix = prefix
  proto.normalizer_spec.remove_extra_whitespaces = False
  return PieceTokenizer(model=proto.SerializeToString())


def _sample(texts: Iterable[str], limit: int) -> list[str]:
  """Whole documents of the smallest content hashes, until `limit` bytes: the order of `texts` does not matter."""
  size = 0
  kept: list[tuple[int, bytes]] = []
  for text in texts:
    data = text[:limit].encode('utf-8', 'replace')[:limit]
    key = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')
    heapq.heappush(kept, (-key, data))
    size += len(data)
    while size - len(kept[0][1]) >= limit:
      size -= len(heapq.heappop(kept)[1])
  return [data.decode('utf-8', 'ignore') for _, data in sorted(kept, reverse=True)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
  """Lines of at most LINE characters: newlines are tokens of their own, so nothing is learnt across them."""
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), LINE):
        yield line[start : start + LINE]


def _blocks(text: str) -> Iterator[str]:
  """A text cut after newlines into blocks of about BLOCK characters (more if it has no newline there)."""
  start = 0
  while start < len(text):
    end = text.find('\n', start + BLOCK) + 1 or len(text)
    yield text[start:end]
    start = end
