"""Prepared text: a corpus tokenised once into array_record shards, and read back as a stream of tokens.

A split is one stream of tokens, every document followed by `eos`, and after `start` where the tokenizer begins texts
with one, cut into records of RECORD tokens. A folder holds `manifest.json`, `tokenizer/` and the shards
`{split}-00000-of-000NN.array_record`; nothing in it changes afterwards, but notes are added in `checked/` (checked.py)
of the files whose contents were compared. array_record is imported only where it is used.

Until a folder is whole, what is done of it stands in `{folder}.preparing`: the tokenizer, and chunks of tokenised
documents. All are named by a hash of what they were made from, so whoever finds one may use it: the same preparation
after it was interrupted, or another that runs at the same time.

A folder in a bucket is made on this machine and uploaded, its manifest last; every machine reads a copy of its own.
"""

import array
import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
import re
import secrets
import shutil
import struct
import time
from typing import Any, Protocol, TypeVar

import numpy as np

from loopformer import reading, storage
from loopformer.data import checked
from loopformer.data.chat import Unreadable
from loopformer.data.corpus import Document
from loopformer.data.tokenizer import Tokenizer, begun, load_tokenizer, start_of
from loopformer.types import ConfigError

VERSION = 1
RECORD = 4096  # tokens in a record
BUCKETS = 64  # files through which documents are shuffled: one of them is held in memory at a time
LISTED = 10_000  # sources listed in the manifest; of more, only one digest is kept
CHUNK = 4_000_000  # characters that are tokenised and kept together, and the rest of the last document
EVERY = 5.0  # seconds between two lines of progress
ENTRY = struct.Struct('<8sBQQ')  # stands before a document's ids: hash of its name, split, bytes of text and of ids
SPLITS = ('train', 'validation')
DTYPES = ('uint16', 'uint32')
MANIFEST = 'manifest.json'
Log = Callable[[str], Any]
Item = TypeVar('Item')


class Corpus(Protocol):
  """Where documents come from (corpus.py); its `repr` says what they are made from."""

  def documents(self, left_out: collections.Counter | None = None) -> Iterator[Document]:
    """All of them, the same every time; left_out: counts what is passed over, by why."""

  def sources(self) -> list[storage.File]:
    """The files that they are read from."""


class TokenizerPart(Protocol):
  """What makes a tokenizer (tokenizer.py, chat.py); its `repr` says from what."""

  def build(self, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer of these texts, or one that is given."""

  def sources(self) -> list[storage.File]:
    """The files that it is read from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
  """A prepared folder, as it is on this machine, its manifest and its tokenizer."""

  folder: str
  manifest: dict
  tokenizer: Tokenizer


def prepare(corpus: Corpus, tokenizer_part: TokenizerPart, folder: str | os.PathLike, *, shard_tokens: int = 2**27,
            log: Log = print) -> Prepared:
  """Tokenises a corpus into a folder, or reuses the folder if it was made from the same corpus and part.

  Documents are put in the order of a hash of their names. Holds a few chunks of documents, or 1/BUCKETS of the tokens,
  in memory. Written beside the folder and renamed, so the folder is whole or absent; what an interrupted or failed call
  has tokenised is used by the next one, and the result is the same to the byte. Of a folder that is reused, and of what
  it was made from, names, sizes and times are compared; contents where the times differ, once, and of all by `verify`.
  ValueError if a split is empty, or if the folder was made from something else (names the first difference).
  """
  if storage.remote(folder):
    return _prepare_shared(corpus, tokenizer_part, storage.path(folder), shard_tokens, log)
  folder, began = os.path.abspath(folder), time.monotonic()
  if os.path.isdir(folder) and os.listdir(folder):
    return _reuse(folder, corpus, tokenizer_part, log)
  sources = [*corpus.sources(), *tokenizer_part.sources()]
  inputs = {
    'corpus': repr(corpus),
    'tokenizer': repr(tokenizer_part),
    'sources': _summary(sources, _hashes(sources, log)),
  }
  _check_splits(corpus)
  work = _work(folder)
  mine = os.path.join(work, f'folder-{secrets.token_hex(4)}')
  try:
    tokenizer = _tokenizer(corpus, tokenizer_part, os.path.join(work, f'tokenizer-{_hash(json.dumps(inputs))}'), log)
    dtype = DTYPES[tokenizer.vocab_size > 2**16]
    stored = np.dtype(dtype).newbyteorder('<')
    left_out: collections.Counter[str] = collections.Counter()
    chunks = _tokenise(corpus, tokenizer, work, stored, left_out, log)
    tokenizer.save(os.path.join(mine, 'tokenizer'))
    manifest = {
      'version': VERSION,
      **inputs,
      'fingerprint': tokenizer.fingerprint(),
      'start': start_between(tokenizer),
      'dtype': dtype,
      'record': RECORD,
      'left_out': dict(left_out),
      'splits': _sort(chunks, mine, stored, max(1, shard_tokens // RECORD), log),
    }
    with open(os.path.join(mine, MANIFEST), 'w', encoding='utf-8') as f:
      json.dump(manifest, f, indent=1)
    checked.note(mine, manifest, [*sources, *_shards(mine, manifest, *SPLITS)])
    os.rename(mine, folder)
  except Exception:
    # Another process may have prepared the same folder meanwhile, and removed the chunks.
    if not os.path.isfile(os.path.join(folder, MANIFEST)):
      raise
    return _reuse(folder, corpus, tokenizer_part, log)
  finally:
    shutil.rmtree(mine, ignore_errors=True)
  shutil.rmtree(work, ignore_errors=True)
  log(f'data: {_counts(manifest)}; written to {folder} in {time.monotonic() - began:.1f} s')
  return Prepared(folder=folder, manifest=manifest, tokenizer=tokenizer)


def _prepare_shared(corpus: Corpus, tokenizer_part: TokenizerPart, shared: Any, shard_tokens: int,
                    log: Log) -> Prepared:
  """`prepare` of a folder in a bucket, which the first process makes and others copy."""
  if not (shared / MANIFEST).exists():
    making = storage.cache() / 'data' / f'making-{_hash(str(shared), repr(corpus), repr(tokenizer_part))}'
    prepare(corpus, tokenizer_part, making, shard_tokens=shard_tokens, log=log)
    storage.upload(making, shared, last=MANIFEST)
    log(f'data: uploaded to {shared}')
    with contextlib.suppress(OSError):  # the copy is there
      making.rename(_copy(shared))
    shutil.rmtree(making, ignore_errors=True)
  return _reuse(local(shared, log), corpus, tokenizer_part, log)


def local(folder: str | os.PathLike, log: Log = lambda text: None) -> str:
  """The folder on this machine: itself or, of a bucket, a copy in `storage.cache()`, made once."""
  if not storage.remote(folder):
    return os.fspath(folder)
  shared = storage.path(folder)
  load_manifest(shared)
  copy = _copy(shared)
  if not copy.is_dir():
    top = str(shared).partition('://')[2]
    storage.downloaded({key: os.path.relpath(key, top) for key in storage.held(shared)}, shared, copy)
    manifest = load_manifest(copy)
    if checked.known(copy, manifest) is not None:
      checked.note(copy, manifest, _shards(str(copy), manifest, *SPLITS))  # a copy has times of its own
    log(f'data: copied from {shared} to {copy}')
  return str(copy)


def _copy(shared: Any) -> Path:
  return storage.cache() / 'data' / _hash(str(shared), (shared / MANIFEST).read_text(encoding='utf-8'))


def verify(corpus: Corpus, tokenizer_part: TokenizerPart, folder: str | os.PathLike, log: Log = print) -> None:
  """Reads a prepared folder, and all that it was made from, and compares every hash with the manifest.

  FileNotFoundError or ValueError naming the first shard or source that is missing or differs.
  """
  folder, began = local(folder), time.monotonic()
  manifest = load_manifest(folder)
  _compare(folder, manifest, corpus, tokenizer_part, log, everything=True)
  log(f'data: {folder} and its sources are as they were prepared; verified in {time.monotonic() - began:.1f} s')


def load_manifest(folder: str | os.PathLike) -> dict[str, Any]:
  """The manifest of a prepared folder; FileNotFoundError if it is none, ValueError if of another version."""
  path = storage.path(folder) / MANIFEST
  if not path.exists():
    raise FileNotFoundError(
      f'{os.fspath(folder)!r} is not a prepared folder ({MANIFEST} is absent): prepare it, or choose another'
    )
  remedy = 'delete the folder and prepare the data again'
  manifest = reading.read_json(path, remedy)
  if manifest.get('version') != VERSION:
    raise ValueError(f'{path}: version={manifest.get("version")!r}, this library reads {VERSION}: {remedy}')
  if wrong := _wrong(manifest):
    raise ValueError(f'{path} is damaged: {wrong}; {remedy}')
  return manifest


def _wrong(manifest: dict[str, Any]) -> str | None:
  """What of a manifest is not as `prepare` writes it; None where nothing is."""
  texts, sources, splits = ('corpus', 'tokenizer', 'fingerprint'), manifest.get('sources'), manifest.get('splits')
  if bad := [name for name in texts if not isinstance(manifest.get(name), str)]:
    return f'{bad[0]} is no text'
  if type(manifest.get('start')) not in (int, type(None)):
    return f'start={manifest["start"]!r} is no id'
  if manifest.get('dtype') not in DTYPES or manifest.get('record') != RECORD:
    return f'dtype={manifest.get("dtype")!r}, record={manifest.get("record")!r}: not one of {DTYPES}, {RECORD}'
  if not isinstance(sources, dict) or not {'count', 'sha256', 'files'} <= sources.keys() or not isinstance(
      sources['files'], list | None) or not all(map(_is_source, sources['files'] or ())):
    return 'sources are not described'
  left_out = manifest.get('left_out', {})
  if not isinstance(left_out, dict) or not _counted(left_out, *left_out):
    return 'left_out holds no counts'
  if not isinstance(splits, dict) or set(splits) != set(SPLITS):
    return f'splits are not {", ".join(SPLITS)}'
  for split, counts in splits.items():
    shards = counts.get('shards') if isinstance(counts, dict) else None
    if not isinstance(shards, list) or not _counted(counts, 'documents', 'tokens', 'bytes') or not all(
        _counted(shard, 'records', 'tokens', 'size') and isinstance(shard.get('sha256'), str) for shard in shards):
      return f'the split {split} is not described'
    for shard in shards:  # a name that leads nowhere else
      if not re.fullmatch(rf'{split}-\d+-of-\d+\.array_record', str(shard.get('name'))):
        return f'{shard.get("name")!r} is no name of a shard'
    if not counts['tokens']:
      return f'the split {split} has no tokens'
    tokens, records = (sum(shard[name] for shard in shards) for name in ('tokens', 'records'))
    if tokens != counts['tokens'] or records != -(-tokens // RECORD):
      return f'the shards of {split} have {tokens} tokens in {records} records, the split {counts["tokens"]}'
  return None


def _is_source(row: Any) -> bool:
  """Whether it is [name, size, hash or None]."""
  return isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and type(row[1]) is int and isinstance(
    row[2], str | None)


def _counted(described: Any, *names: str) -> bool:
  return isinstance(described, dict) and all(
    type(described.get(name)) is int and described[name] >= 0 for name in names
  )


def start_between(tokenizer: Tokenizer) -> int | None:
  """The id that begins every document of a stream; none where it is the one that ended the document before."""
  start = start_of(tokenizer)
  return None if start == tokenizer.eos else start


def _reuse(folder: str, corpus: Corpus, tokenizer_part: TokenizerPart, log: Log) -> Prepared:
  manifest = load_manifest(folder)
  shutil.rmtree(_work(folder), ignore_errors=True)  # whoever still works there comes here in the end
  _compare(folder, manifest, corpus, tokenizer_part, log)
  tokenizer = load_tokenizer(os.path.join(folder, 'tokenizer'))
  if tokenizer.fingerprint() != manifest['fingerprint']:
    raise ValueError(f'{folder}/tokenizer is not the one the data was made with: delete the folder and prepare again')
  if manifest.get('start') != start_between(tokenizer):
    log(f'data: texts in {folder} do not begin with the token that begins a text, because an earlier version prepared '
        'them; a run that goes on reads them as they are, for another delete the folder and prepare again')
  log(f'data: {_counts(manifest)}; reused from {folder}')
  return Prepared(folder=folder, manifest=manifest, tokenizer=tokenizer)


def _compare(folder: str, manifest: dict, corpus: Corpus, tokenizer_part: TokenizerPart, log: Log,
             everything: bool = False) -> None:
  """Compares parts, sources and shards with the manifest: names and sizes, and the contents of everything or of the
  files that are not known, by their times, to be right; these are noted. Sources that are not there are told, and not
  missed.
  """
  parts: tuple[tuple[str, Corpus | TokenizerPart], ...] = ('corpus', corpus), ('tokenizer', tokenizer_part)
  for name, part in parts:
    if manifest[name] != repr(part):
      raise _changed(folder, f'{name}={part!r}, it was {manifest[name]}')
  try:
    sources = [*corpus.sources(), *tokenizer_part.sources()]
  except FileNotFoundError as error:
    if everything:
      raise
    log(f'data: {error}; what was prepared from it is used as it is')
    sources = None
  if sources is not None and (change := _first_change(manifest['sources'], _summary(sources, {}))):
    raise _changed(folder, change)
  shards = _shards(folder, manifest, *SPLITS)
  files, known = [*(sources or ()), *shards], checked.known(folder, manifest)
  # Earlier versions noted nothing, and compared no more than names and sizes.
  unread = files if everything else [] if known is None else [file for file in files if file[:3] not in known]
  if manifest['sources']['files'] is None and not set(unread).isdisjoint(sources or ()):
    unread = [*(sources or ()), *set(unread).intersection(shards)]  # which have but one hash together
  hashes = _hashes(unread, log)
  if sources is not None and (change := _first_change(manifest['sources'], _summary(sources, hashes))):
    raise _changed(folder, change)
  for shard in _described(manifest, *SPLITS):
    if hashes.get(shard['name'], shard['sha256']) != shard['sha256']:
      raise _damaged(folder, shard, 'sha256', hashes[shard['name']])
  if unread or known is None:
    checked.note(folder, manifest, files if known is None else unread)


def _changed(folder: str, change: str) -> ValueError:
  return ValueError(f'{folder} was prepared from something else: {change}. Delete the folder or choose another.')


def _hashes(files: list[storage.File], log: Log) -> dict[str, str]:
  """name -> sha256."""
  return {file.name: file.sha256() for file in _watched(files, lambda file: file.size, 'files hashed', log)}


def _work(folder: str) -> str:
  return f'{folder}.preparing'


def _hash(*parts: str) -> str:
  digest = hashlib.blake2b(digest_size=16)
  for part in parts:
    data = part.encode('utf-8', 'surrogatepass')
    digest.update(struct.pack('<Q', len(data)) + data)
  return digest.hexdigest()


def _summary(sources: list[storage.File], hashes: dict[str, str]) -> dict:
  """What a manifest says of the sources; hashes: of some, by name."""
  files = [[source.name, source.size, hashes.get(source.name)] for source in sources]
  hashed = all(digest is not None for *_, digest in files)
  return {
    'count': len(files),
    'sha256': _digest(files) if hashed else None,
    'sizes': _digest([file[:2] for file in files]),
    'files': files if len(files) <= LISTED else None,
  }


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _first_change(old: dict, new: dict) -> str | None:
  """What differs between two summaries, as far as both know; None where nothing does."""
  if old['files'] is None or new['files'] is None:
    kind = 'sizes' if new['sha256'] is None and 'sizes' in old else 'sha256'
    if new[kind] in (old[kind], None):
      return None
    return f'the {new["count"]} sources have digest {new[kind]}, they were {old["count"]} of {old[kind]}'
  rows = [[list(row) for row in summary['files']] for summary in (old, new)]
  for before, after in zip(*rows):
    if None in (before[2], after[2]):
      before[2] = after[2] = None
  if rows[0] == rows[1]:
    return None
  was, now = ({name: rest for name, *rest in listed} for listed in rows)
  for name in sorted(was | now):
    if name not in now:
      return f'source {name} is gone'
    if name not in was:
      return f'source {name} is new'
    if was[name] != now[name]:
      return f'source {name} has changed'
  return 'the order of the sources has changed'


def _counts(manifest: dict) -> str:
  kept = ', '.join(
    f'{split} {n["tokens"]:,} tokens of {n["documents"]:,} documents ({n["bytes"] / n["tokens"]:.2f} bytes a token)'
    for split, n in manifest['splits'].items()
  )
  left_out = ', '.join(f'{count:,} {why}' for why, count in manifest.get('left_out', {}).items())
  return f'{kept}; left out: {left_out}' if left_out else kept


def _check_splits(corpus: Corpus) -> None:
  seen: set[str] = set()
  for document in corpus.documents():
    seen.add(document.split)
    if len(seen) == len(SPLITS):
      return
  if not seen:
    raise ValueError(f'{corpus!r} is empty: it has no document with text')
  missing = next(split for split in SPLITS if split not in seen)
  raise ValueError(f'{corpus!r} has no {missing} document: give two different documents, or files for validation')


def _tokenizer(corpus: Corpus, part: TokenizerPart, saved: str, log: Log) -> Tokenizer:
  try:
    return load_tokenizer(saved)
  except (OSError, ValueError):  # absent or, the machine having stopped, damaged
    documents = _watched(corpus.documents(), _text_bytes, 'documents read for the tokenizer', log)
    tokenizer = part.build(d.text for d in documents if d.split == 'train')
    temporary = f'{saved}.{secrets.token_hex(4)}'
    tokenizer.save(temporary)
    with contextlib.suppress(OSError):  # another process was first
      os.rename(temporary, saved)
    return tokenizer


def _tokenise(corpus: Corpus, tokenizer: Tokenizer, work: str, stored: np.dtype, left_out: collections.Counter,
              log: Log) -> list[str]:
  """The files of all chunks, in order; only those are made that are not there. Counts what the corpus leaves out."""
  os.makedirs(work, exist_ok=True)
  paths: list[str] = []
  found, fingerprint, start = 0, tokenizer.fingerprint(), start_between(tokenizer)
  fingerprint = fingerprint if start is None else f'{fingerprint} after {start}'  # earlier versions made chunks without
  for batch in _batched(_watched(corpus.documents(left_out), _text_bytes, 'documents tokenised', log), CHUNK):
    contents = (part for d in batch for part in (d.name, d.split, d.text))
    paths.append(os.path.join(work, _hash(fingerprint, *contents)))
    if _read_chunk(paths[-1]) is not None:
      found += 1
      continue
    entries: list[bytes] = []
    try:
      encoded = tokenizer.encode_batch([d.text for d in batch])
    except Unreadable as error:
      file, _, row = batch[error.index].name.rpartition('#')
      raise ConfigError(f'{file} row {int(row) + 1}: {error}') from error
    for document, ids in zip(batch, encoded, strict=True):
      # By way of an array, which takes less than half the time of NumPy's own reading of a list.
      data = np.array(array.array(
          'I', [*(ids if start is None else begun(tokenizer, ids)), tokenizer.eos])).astype(stored).tobytes()
      key = hashlib.blake2b(document.name.encode('utf-8', 'surrogatepass'), digest_size=8).digest()
      entries += [ENTRY.pack(key, SPLITS.index(document.split), _text_bytes(document), len(data)), data]
    _write_chunk(paths[-1], b''.join(entries))
  if found:
    log(f'data: {found:,} of {len(paths):,} chunks had been tokenised before')
  return paths


def _write_chunk(path: str, data: bytes) -> None:
  temporary = f'{path}.{secrets.token_hex(4)}'
  with open(temporary, 'wb') as f:
    f.write(hashlib.blake2b(data).digest())
    f.write(data)
  os.replace(temporary, path)


def _read_chunk(path: str) -> memoryview | None:
  """What a chunk holds; None if it is absent or, the machine having stopped, not what was written."""
  try:
    with open(path, 'rb') as f:
      digest, data = f.read(64), f.read()
  except FileNotFoundError:
    return None
  return memoryview(data) if hashlib.blake2b(data).digest() == digest else None


def _watched(items: Iterable[Item], size: Callable[[Item], int], what: str, log: Log) -> Iterator[Item]:
  """The items, and every few seconds a line of how many have passed; size: bytes of an item."""
  count = total = before = 0
  last = time.monotonic()
  for item in items:
    yield item
    count, total, now = count + 1, total + size(item), time.monotonic()
    if now - last >= EVERY:
      log(f'data: {count:,} {what}, {total / 1e6:,.1f} MB, {(total - before) / 1e6 / (now - last):.1f} MB/s')
      last, before = now, total


def _text_bytes(document: Document) -> int:
  return len(document.text.encode('utf-8', 'replace'))


def _batched(documents: Iterator[Document], characters: int) -> Iterator[list[Document]]:
  batch: list[Document] = []
  size = 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= characters:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _sort(chunks: list[str], folder: str, stored: np.dtype, shard_records: int, log: Log) -> dict[str, dict[str, Any]]:
  """Writes the shards; what the manifest says of the splits."""
  counts: dict[str, dict[str, Any]] = {split: {'documents': 0, 'tokens': 0, 'bytes': 0} for split in SPLITS}
  with contextlib.ExitStack() as stack:
    spills = {split: _Spill(folder, split, stored, stack) for split in SPLITS}
    for path in _watched(chunks, os.path.getsize, 'chunks sorted', log):
      data = _read_chunk(path)
      if data is None:
        raise OSError(f'{path} is not what was written a moment ago: run the same command again')
      for key, split, size, start, end in _entries(data):
        n = counts[SPLITS[split]]
        n['documents'] += 1
        n['tokens'] += (end - start) // stored.itemsize
        n['bytes'] += size
        spills[SPLITS[split]].add(key, data[start - ENTRY.size : end])
    for split in SPLITS:
      documents = _watched(spills[split].drain(), lambda ids: ids.nbytes, f'{split} documents written', log)
      counts[split]['shards'] = _write_shards(documents, folder, split, shard_records)
  return counts


def _entries(data: bytes | memoryview) -> Iterator[tuple[bytes, int, int, int, int]]:
  """Of each document: hash of its name, split, bytes of its text, and where its ids start and end."""
  at = 0
  while at < len(data):
    key, split, size, volume = ENTRY.unpack_from(data, at)
    at += ENTRY.size + volume
    yield key, split, size, at - volume, at


class _Spill:
  """Sorts tokenised documents by a hash of their names, through files of which one at a time is in memory."""

  def __init__(self, folder: str, split: str, stored: np.dtype, stack: contextlib.ExitStack):
    self._stored = stored
    self._paths = [os.path.join(folder, f'{split}.bucket-{i:02}') for i in range(BUCKETS)]
    self._files = [stack.enter_context(open(path, 'w+b')) for path in self._paths]

  def add(self, key: bytes, entry: memoryview) -> None:
    self._files[key[0] * BUCKETS // 256].write(entry)

  def drain(self) -> Iterator[np.ndarray]:
    for file, path in zip(self._files, self._paths):
      file.seek(0)
      data = file.read()
      os.remove(path)
      for _, start, end in sorted((key, start, end) for key, _, _, start, end in _entries(data)):
        yield np.frombuffer(data, self._stored, (end - start) // self._stored.itemsize, start)


def _write_shards(documents: Iterator[np.ndarray], work: str, split: str, shard_records: int) -> list[dict]:
  from array_record.python.array_record_module import ArrayRecordWriter

  shards: list[dict[str, Any]] = []
  records = _records(documents)
  while (head := next(records, None)) is not None:
    path = os.path.join(work, f'{split}-{len(shards):05}')
    writer = ArrayRecordWriter(path, 'group_size:1')
    n = tokens = 0
    for record in itertools.chain([head], itertools.islice(records, shard_records - 1)):
      writer.write(record.tobytes())
      n, tokens = n + 1, tokens + len(record)
    writer.close()
    shards.append({'name': path, 'records': n, 'tokens': tokens, **_size(path)})
  for shard in shards:
    path = shard['name']
    shard['name'] = f'{os.path.basename(path)}-of-{len(shards):05}.array_record'
    os.rename(path, os.path.join(work, shard['name']))
  return shards


def _records(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
  pending: list[np.ndarray] = []
  size = 0
  for ids in documents:
    pending.append(ids)
    size += len(ids)
    if size >= RECORD:
      joined, whole = np.concatenate(pending), size - size % RECORD
      yield from np.split(joined[:whole], whole // RECORD)
      pending, size = [joined[whole:]], size - whole
  if size:
    yield np.concatenate(pending)


def _described(manifest: dict, *splits: str) -> list[dict]:
  return [shard for split in splits for shard in manifest['splits'][split]['shards']]


def _shards(folder: str, manifest: dict, *splits: str) -> list[storage.File]:
  """The shards of some splits, which are there and have the sizes of the manifest."""
  files: list[storage.File] = []
  for shard in _described(manifest, *splits):
    path = os.path.join(folder, shard['name'])
    if not os.path.isfile(path):
      raise FileNotFoundError(f'shard {path} is missing: {_remedy(folder)}')
    files.append(storage.described(shard['name'], path))
    if files[-1].size != shard['size']:
      raise _damaged(folder, shard, 'size', files[-1].size)
  return files


def _damaged(folder: str, shard: dict, what: str, found: int | str) -> ValueError:
  path = os.path.join(folder, shard['name'])
  return ValueError(f'shard {path} is damaged or stale ({what} {found}, not {shard[what]}): {_remedy(folder)}')


def _remedy(folder: str) -> str:
  return f'delete {folder} and prepare the data again'


def _size(path: str) -> dict:
  with open(path, 'rb') as f:
    digest = hashlib.file_digest(f, 'sha256').hexdigest()
    return {'size': f.tell(), 'sha256': digest}


@dataclasses.dataclass(frozen=True)
class _Shard:
  """A shard whose records are read; its package has no class of its own for what is damaged."""

  path: str
  records: int

  def __post_init__(self):
    with self._naming():
      held = self._reader.num_records()
    if held != self.records:
      raise ValueError(f'shard {self.path} is damaged or stale ({held} records, not {self.records}): {self._remedy}')

  @functools.cached_property
  def _reader(self) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # No readahead: windows are read in random order.
    return ArrayRecordReader(self.path, options='readahead_buffer_size:0,max_parallelism:0')

  @property
  def _remedy(self) -> str:
    return _remedy(os.path.dirname(self.path))

  @contextlib.contextmanager
  def _naming(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      reason = (str(e).splitlines() or [type(e).__name__])[0]
      raise ValueError(f'shard {self.path} is damaged ({reason}): {self._remedy}') from e

  def read(self, records: list[int]) -> list[bytes]:
    """Some records."""
    with self._naming():
      return self._reader.read(records)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenStream:
  """The tokens of a split, readable anywhere from any thread."""

  tokens: int
  dtype: np.dtype
  readers: tuple[_Shard, ...] = dataclasses.field(repr=False)
  first_records: tuple[int, ...] = dataclasses.field(repr=False)

  def window(self, start: int, length: int) -> np.ndarray:
    """Tokens start .. start + length - 1, i32[length]; IndexError if not all of them exist."""
    if start < 0 or length < 1 or start + length > self.tokens:
      raise IndexError(f'tokens {start} to {start + length} of a stream of {self.tokens}')
    first, last = start // RECORD, (start + length - 1) // RECORD
    parts = []
    for reader, begin, end in zip(self.readers, self.first_records, self.first_records[1:]):
      wanted = list(range(max(first, begin) - begin, min(last + 1, end) - begin))
      if wanted:
        parts += reader.read(wanted)
    data, before = b''.join(parts), start - first * RECORD
    if len(data) < (before + length) * self.dtype.itemsize:
      raise ValueError(f'{self.readers[0].path}: records are shorter than the manifest says: prepare the data again')
    return np.frombuffer(data, self.dtype, length, before * self.dtype.itemsize).astype(np.int32)


def open_split(folder: str | os.PathLike, split: str) -> TokenStream:
  """Opens a split, of whose shards the sizes are compared with the manifest; records have checksums of their own.

  FileNotFoundError or ValueError naming the shard that is missing, cut off or not of this manifest.
  """
  folder = local(folder)
  manifest = load_manifest(folder)
  if split not in manifest['splits']:
    raise ValueError(f'split={split!r} is none of {", ".join(manifest["splits"])}')
  files, shards = _shards(folder, manifest, split), manifest['splits'][split]['shards']
  readers = [_Shard(os.path.join(folder, file.name), shard['records']) for file, shard in zip(files, shards)]
  return TokenStream(
    tokens=manifest['splits'][split]['tokens'],
    dtype=np.dtype(manifest['dtype']).newbyteorder('<'),
    readers=tuple(readers),
    first_records=tuple(itertools.accumulate((shard['records'] for shard in shards), initial=0)),
  )
