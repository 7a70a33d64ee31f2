"""Corpora: parts that yield documents, each in the train or the validation split.

The split is decided by a hash of a document's contents: adding, renaming or moving files leaves the other
documents where they were, and equal contents under two names are always in the same split.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import glob
import hashlib
import json
import os
import sysconfig

from loopformer import storage

SUFFIXES = ('.txt', '.md', '.jsonl', '.parquet')
NOT_LIBRARY = frozenset(('site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text, its name (unique in the corpus) and its split, 'train' or 'validation'."""

  name: str
  split: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibrary:
  """Part: the .py files of the running interpreter's standard library, without its tests; works offline.

  Names are paths relative to the library. `validation` is the share of documents held out. Empty files, and
  those that are not UTF-8, are skipped.
  """

  validation: float = 0.05

  def __post_init__(self):
    _check_share('StandardLibrary', self.validation)

  def documents(self) -> Iterator[Document]:
    return _split(self._texts, self.validation)

  def sources(self) -> list[storage.File]:
    """Every file, in order of name; none is read."""
    root = sysconfig.get_paths()['stdlib']
    return [storage.described(name, os.path.join(root, name)) for name in self._names(root)]

  def _texts(self):
    root = sysconfig.get_paths()['stdlib']
    for name in self._names(root):
      try:
        yield name, _read_text(os.path.join(root, name))
      except UnicodeDecodeError:
        continue

  def _names(self, root: str) -> list[str]:
    names = []
    for folder, folders, files in os.walk(root):
      folders[:] = [f for f in folders if f not in NOT_LIBRARY]
      names += [os.path.relpath(os.path.join(folder, f), root) for f in files if f.endswith('.py')]
    return sorted(name.replace(os.sep, '/') for name in names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
  """Part: files by glob ('**' is recursive), of folders or buckets: .txt and .md are one document each, .jsonl and
  .parquet one a row.

  `field` names the text in a row. Without `validation_files`, a `validation` share of documents is held out;
  with them, train documents whose contents also stand in validation are dropped. Empty documents are skipped.
  ValueError or FileNotFoundError names the glob, file, row or field at fault. .parquet needs pyarrow.
  """

  train: tuple[str, ...]
  validation_files: tuple[str, ...] = ()
  validation: float = 0.05
  field: str = 'text'

  def __post_init__(self):
    _check_share('Files', self.validation)
    for name in ('train', 'validation_files'):
      if isinstance(getattr(self, name), str):
        raise ValueError(f'Files.{name}={getattr(self, name)!r} is one string: give a tuple of globs')
    if not self.train:
      raise ValueError('Files.train=() names no files: give at least one glob')

  def documents(self) -> Iterator[Document]:
    train = functools.partial(self._texts, self._paths('train'))
    if not self.validation_files:
      return _split(train, self.validation)
    return self._given(train, functools.partial(self._texts, self._paths('validation_files')))

  def sources(self) -> list[storage.File]:
    """Every file, in order of path; none is read."""
    found = self._found('train') | self._found('validation_files')
    return [found[path] for path in sorted(found)]

  def _given(self, train, validation):
    held = set()
    for name, text in validation():
      held.add(content_hash(text))
      yield Document(name=name, split='validation', text=text)
    for name, text in train():
      if content_hash(text) not in held:
        yield Document(name=name, split='train', text=text)

  def _paths(self, field: str) -> list[str]:
    return sorted(self._found(field))

  def _found(self, field: str) -> dict[str, storage.File]:
    """Every file that the globs of a field match, by its path."""
    files = {}
    for pattern in getattr(self, field):
      found = _matches(pattern)
      if not found:
        raise FileNotFoundError(f'Files.{field}: no file matches {pattern!r}; correct the glob')
      for path in found:
        if _suffix(path) not in SUFFIXES:
          raise ValueError(
            f'Files.{field}: {path} has the unknown suffix {_suffix(path)!r}; known are '
            f'{", ".join(SUFFIXES)}: narrow the glob {pattern!r}'
          )
      files |= found
    return files

  def _texts(self, paths: list[str]):
    for path in paths:
      suffix = _suffix(path)
      if suffix == '.jsonl':
        rows = self._jsonl(path)
      elif suffix == '.parquet':
        rows = self._parquet(path)
      else:
        try:
          rows = [(path, _read_text(path))]
        except UnicodeDecodeError as e:
          raise ValueError(f'Files: {path} is not UTF-8 ({e}); convert or remove it') from None
      for name, text in rows:
        if not isinstance(text, str):
          raise ValueError(
            f'Files.field={self.field!r}: {name} holds {type(text).__name__}, not text; name another field'
          )
        yield name, text

  def _jsonl(self, path: str):
    with storage.path(path).open('rb') as f:
      for row, line in enumerate(f):
        if not line.strip():
          continue
        try:
          record = json.loads(line)
        except ValueError as e:
          raise ValueError(f'Files: {path} row {row} is not JSON ({e}); correct or remove the row') from None
        if not isinstance(record, dict):
          raise ValueError(f'Files: {path} row {row} is not a JSON object; correct or remove the row')
        if self.field not in record:
          raise self._missing(f'{path} row {row}', list(record))
        yield f'{path}#{row}', record[self.field]

  def _parquet(self, path: str):
    try:
      from pyarrow import parquet
    except ImportError as e:
      raise ImportError(f"reading {path} needs pyarrow: install the extra 'parquet'") from e
    with storage.path(path).open('rb') as stored, parquet.ParquetFile(stored) as file:
      if self.field not in file.schema_arrow.names:
        raise self._missing(path, file.schema_arrow.names)
      row = 0
      for batch in file.iter_batches(batch_size=256, columns=[self.field]):
        for text in batch.column(0).to_pylist():
          yield f'{path}#{row}', text
          row += 1

  def _missing(self, where: str, present: list[str]) -> ValueError:
    return ValueError(
      f'Files.field={self.field!r}: {where} has no such field; it has {", ".join(present) or "none"}: '
      'set Files.field to one of them'
    )


def content_hash(text: str) -> int:
  """64 bits that depend on the contents alone."""
  data = text.encode('utf-8', 'surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


def _split(read: Callable[[], Iterator[tuple[str, str]]], share: float) -> Iterator[Document]:
  """Documents whose hash lies below a cut are validation: a `share` of them, and one at least if two differ."""
  cut = _cut(read, int(share * 2**64))
  for name, text in read():
    if text:
      yield Document(name=name, split='validation' if content_hash(text) < cut else 'train', text=text)


def _cut(read, cut: int) -> int:
  """The cut, moved as little as needed in a corpus so small that a split would be empty.

  Reads only until both splits are seen to hold a document.
  """
  low, high = 2**64, -1
  for _, text in read():
    if text:
      key = content_hash(text)
      low, high = min(low, key), max(high, key)
      if low < cut <= high:
        return cut
  if low < high:
    return low + 1 if low >= cut else high
  return cut


def _check_share(part: str, share: float) -> None:
  if not 0 < share < 1:
    raise ValueError(f'{part}.validation={share}: give a share between 0 and 1, such as 0.05')


def _suffix(path: str) -> str:
  return os.path.splitext(path)[1].lower()


def _read_text(path: str) -> str:
  # Bytes, so that line ends come through as they are.
  return storage.path(path).read_bytes().decode('utf-8')


def _matches(pattern: str) -> dict[str, storage.File]:
  """Every file that a glob matches, by its path."""
  if not storage.remote(pattern):
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return {path: storage.described(path, path) for path in found if os.path.isfile(path)}
  place = storage.path(pattern)
  found = storage.attempt(lambda: storage.files(place).glob(str(place), detail=True), pattern)
  paths = {f'{storage.scheme(place)}://{key}': about for key, about in found.items() if about['type'] == 'file'}
  return {path: storage.described(path, path, about) for path, about in paths.items()}
