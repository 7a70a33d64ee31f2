"""Corpora: parts that yield documents, each in the train or the validation split.

The split is decided by a hash of a document's contents: adding, renaming or moving files leaves the other
documents where they were, and equal contents under two names are always in the same split. A file is read once, however
many names it has, and a byte-order mark before a text is no part of it.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import os
from pathlib import Path
import re
import sysconfig

from loopformer import reading, storage
from loopformer.data.chat import check_messages, is_answer
from loopformer.types import ConfigError

SUFFIXES = ('.txt', '.md', '.jsonl', '.parquet')
REMEDY = 'correct the glob, or see to its permissions'
NOT_LIBRARY = frozenset(('site-packages', 'dist-packages', 'test', 'tests', 'idle_test', '__pycache__'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text, its name (unique in the corpus; prepared.py puts documents in order by it) and its split, 'train' or
  'validation'.
  """

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

  def documents(self, left_out: collections.Counter | None = None) -> Iterator[Document]:
    """All documents; what is skipped is counted in `left_out` by why."""
    return _split(self._texts, self.validation, left_out)

  def sources(self) -> list[storage.File]:
    """Every file, in order of name; none is read."""
    root = sysconfig.get_paths()['stdlib']
    return [storage.described(name, os.path.join(root, name)) for name in self._names(root)]

  def _texts(self, left_out):
    root = sysconfig.get_paths()['stdlib']
    for name in self._names(root):
      data = reading.contents(os.path.join(root, name), 'repair the installation of Python')
      try:
        text = reading.decoded(data, name)
      except ConfigError:
        left_out['files that are not UTF-8'] += 1
        continue
      if text:
        yield name, text
      else:
        left_out['empty documents'] += 1

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
  with them, train documents whose contents also stand in validation are dropped. Documents without text, and rows where
  it is null, are skipped. Rows are numbered from 1 in messages, from 0 in names.
  ValueError or FileNotFoundError names the glob, file, row or field at fault. .parquet needs pyarrow.
  root: the folder that globs start from which do not name it; '' for the current one. Names of documents leave it out.
  """

  train: tuple[str, ...]
  validation_files: tuple[str, ...] = ()
  validation: float = 0.05
  field: str = 'text'
  root: str = dataclasses.field(default='', repr=False)  # the data are the same wherever they lie

  def __post_init__(self):
    _check_share('Files', self.validation)
    for name in ('train', 'validation_files'):
      if isinstance(getattr(self, name), str):
        raise ValueError(f'Files.{name}={getattr(self, name)!r} is one string: give a tuple of globs')
    if not self.train:
      raise ValueError('Files.train=() names no files: give at least one glob')

  @property
  def paths(self) -> tuple[str, ...]:
    """Fields that hold paths."""
    return () if all(map(storage.whole, (*self.train, *self.validation_files))) else ('root',)

  def documents(self, left_out: collections.Counter | None = None) -> Iterator[Document]:
    """All documents; what is skipped is counted in `left_out` by why."""
    return _documents(self, self._texts, left_out)

  def sources(self) -> list[storage.File]:
    """Every file, in order of path; none is read."""
    found = {file.name: file for field in ('train', 'validation_files') for file in self._found(field)}
    return [found[path] for path in sorted(found)]

  def _found(self, field: str, left_out: collections.Counter | None = None) -> list[storage.File]:
    """Every file that the globs of a field match, once, in order of path."""
    files, names = {}, collections.defaultdict(set)
    passed: dict[str, set] = collections.defaultdict(set)
    for pattern in getattr(self, field):
      found = _matches(pattern, self.root, passed)
      if not found:
        remedy = f'give a glob of files in it, such as {os.path.join(pattern, "**", "*.txt")!r}'
        folder = not storage.remote(pattern) and os.path.isdir(self._at(pattern))
        where = '' if storage.whole(pattern) else f' in {self.root or os.getcwd()}'
        raise FileNotFoundError(f'Files.{field}: {pattern!r} is a folder; {remedy}' if folder else
                                f'Files.{field}: no file matches {pattern!r}{where}; correct the glob')
      for path, (identity, file) in found.items():
        if _suffix(path) not in SUFFIXES:
          raise ValueError(
            f'Files.{field}: {path} has the unknown suffix {_suffix(path)!r}; known are '
            f'{", ".join(SUFFIXES)}: narrow the glob {pattern!r}'
          )
        files[path] = file
        names[identity].add(path)
    if left_out is not None:
      left_out += collections.Counter({why: len(paths) for why, paths in passed.items()})
      left_out += collections.Counter({'further names of files': len(files) - len(names)})
    kept = (min(own, key=lambda name: _links(self._at(name))) if len(own) > 1 else own.pop() for own in names.values())
    return [files[path] for path in sorted(kept)]

  def _texts(self, field: str, left_out: collections.Counter):
    """(name, text) of every document that has one."""
    for path in [file.name for file in self._found(field, left_out)]:
      suffix = _suffix(path)
      if suffix == '.jsonl':
        rows = self._jsonl(path)
      elif suffix == '.parquet':
        rows = self._parquet(path)
      else:
        data = reading.contents(self._at(path), REMEDY)
        rows = [(None, reading.decoded(data, f'Files: {path}', 'convert it to UTF-8 or remove it'))]
      yield from _texts_of(rows, path, 'Files', self.field, left_out)

  def _jsonl(self, path: str):
    """(row from 0, what its field holds); blank lines are rows that hold nothing."""
    with reading.opened(self._at(path), REMEDY) as f:
      for row, line in enumerate(f):
        where, remedy = f'Files: {path} row {row + 1}', 'correct or remove the row'
        text = reading.decoded(line, where, 'save the file as UTF-8').strip() if line.strip() else ''
        if not text:
          continue
        record = reading.parsed(text, where, remedy, dict | None)
        if record is None:
          yield row, None
        elif self.field in record:
          yield row, record[self.field]
        else:
          raise _missing('Files', self.field, f'{path} row {row + 1}', list(record))

  def _parquet(self, path: str):
    """(row from 0, what its field holds)."""
    try:
      import pyarrow
      from pyarrow import parquet
    except ImportError as e:
      raise ImportError(f"reading {path} needs pyarrow: install the extra 'parquet'") from e
    row, damage = 0, (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    with reading.opened(self._at(path), REMEDY) as stored, contextlib.ExitStack() as stack:
      try:
        file = stack.enter_context(parquet.ParquetFile(stored))
        names = file.schema_arrow.names
      except damage as e:
        raise ValueError(f'Files: {path} is damaged, or not parquet ({_first(e)}); fetch it again or remove it') from e
      if self.field not in names:
        raise _missing('Files', self.field, path, names)
      batches = file.iter_batches(batch_size=256, columns=[self.field])
      while True:
        try:
          texts = next(batches).column(0).to_pylist()
        except StopIteration:
          return
        except damage as e:
          raise ValueError(f'Files: {path} is damaged from row {row + 1} on ({_first(e)}); fetch it again or remove it'
                           ) from e
        yield from enumerate(texts, row)
        row += len(texts)

  def _at(self, name: str) -> str:
    """Where a file or glob of this name lies."""
    return storage.within(self.root, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubDataset:
  """Part: a data set of Hugging Face (extra `datasets`), a document a row: of the Hub by `name`, or in a `folder` of
  this machine, as `save_to_disk` writes it or of files that datasets reads.

  revision: the commit of one of the Hub, 40 hexadecimal digits, so that the data stay what they are. subset: its
  configuration, where it has several. train, validation_split: names of splits; without the second a `validation` share
  of documents is held out. With it, train documents whose contents also stand in validation are dropped. field: the
  column of the text. streaming: rows are read as they come; False keeps them in the cache of datasets. Empty rows are
  skipped. ConfigError names the field, or split and row, at fault.
  """

  name: str = ''
  revision: str = ''
  folder: str = dataclasses.field(default='', repr=False)  # the data are the same wherever they lie
  subset: str = ''
  train: str = 'train'
  validation_split: str = ''
  validation: float = 0.05
  field: str = 'text'
  streaming: bool = True

  def __post_init__(self):
    _check_share('HubDataset', self.validation)
    if bool(self.name) == bool(self.folder):
      raise ConfigError(f'HubDataset.name={self.name!r}, folder={self.folder!r}: give one of the two')
    if self.folder and (self.revision or storage.remote(self.folder)):
      raise ConfigError(f'HubDataset.folder={self.folder!r}: ' + (
          'a folder has no revision; leave that out' if self.revision else 'give a folder of this machine, or Files'))
    if self.name and not re.fullmatch('[0-9a-f]{40}', self.revision):
      raise ConfigError(f'HubDataset.revision={self.revision!r}: give the commit of {self.name}, 40 hexadecimal digits '
                        '(on its page under Files and versions), so that its data stay what they are')

  @property
  def paths(self) -> tuple[str, ...]:
    """Fields that hold paths."""
    return ('folder',) if self.folder else ()

  def documents(self, left_out: collections.Counter | None = None) -> Iterator[Document]:
    """All documents; what is skipped is counted in `left_out` by why."""
    if not self.validation_split:
      return _split(functools.partial(self._texts, 'train'), self.validation, left_out)
    return _given(self._texts, collections.Counter() if left_out is None else left_out)

  def sources(self) -> list[storage.File]:
    """Every file of the folder, in order of path; none of the Hub's, whose contents the revision names."""
    root = os.path.expanduser(self.folder)
    if self.folder and not os.path.isdir(root):
      raise FileNotFoundError(f'HubDataset.folder={self.folder!r}: there is no such folder')
    # datasets keeps results beside its own files
    files = [os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names
             if not name.startswith(('.', 'cache-'))] if self.folder else []
    return [storage.described(name.replace(os.sep, '/'), os.path.join(root, name)) for name in sorted(files)]

  def _texts(self, which: str, left_out: collections.Counter):
    split = self.train if which == 'train' else self.validation_split
    yield from _texts_of(enumerate(self._column(split)), split, 'HubDataset', self.field, left_out)

  def _column(self, split: str):
    """What the field holds, row by row."""
    try:
      import datasets
    except ImportError as error:
      raise ImportError("reading a data set of Hugging Face needs datasets: install the extra 'datasets'") from error
    root, where = os.path.expanduser(self.folder), self.folder or self.name
    self.sources()  # whose folder is there
    try:
      if self.folder and any(os.path.exists(os.path.join(root, name)) for name in ('dataset_dict.json', 'state.json')):
        found = datasets.load_from_disk(root)
        if isinstance(found, datasets.DatasetDict):
          found = found[split]
        elif split != (found.split or 'train'):
          raise ValueError(f'it has the split {found.split or "train"} alone')
      else:
        found = datasets.load_dataset(root or self.name, self.subset or None, split=split, streaming=self.streaming,
                                      revision=self.revision or None)
      rows = iter(found)
      first = next(rows, None)
    except (ValueError, LookupError, OSError, datasets.exceptions.DatasetsError) as error:
      raise ConfigError(f'HubDataset: the split {split!r} of {where} cannot be read ({_first(error)}); correct name, '
                        'subset, revision or split') from error
    if first is not None and self.field not in first:
      raise _missing('HubDataset', self.field, f'{where}, {split}', list(first))
    for row in rows if first is None else itertools.chain([first], rows):
      yield row[self.field]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations:
  """Part: chats with answers, by globs of .jsonl files: one a row, {"messages": [{"role", "content"}, ...]} or
  {"prompt", "answer"}.

  Splits as of `Files`. A document is the JSON of its messages, whichever way they were written. Rows without an answer
  (a message of the role assistant with text) are refused, empty ones skipped and counted.
  ConfigError or FileNotFoundError names the glob, or file and row, at fault.
  root: as of `Files`.
  """

  train: tuple[str, ...]
  validation_files: tuple[str, ...] = ()
  validation: float = 0.05
  root: str = dataclasses.field(default='', repr=False)

  def __post_init__(self):
    self._files  # which checks the fields

  @property
  def _files(self) -> Files:
    return Files(train=self.train, validation_files=self.validation_files, validation=self.validation, root=self.root)

  @property
  def paths(self) -> tuple[str, ...]:
    """Fields that hold paths."""
    return self._files.paths

  def documents(self, left_out: collections.Counter | None = None) -> Iterator[Document]:
    """All documents; what is skipped is counted in `left_out` by why."""
    return _documents(self, self._texts, left_out)

  def sources(self) -> list[storage.File]:
    """Every file, in order of path; none is read."""
    return self._files.sources()

  def _texts(self, field: str, left_out: collections.Counter):
    files = self._files
    for path in [file.name for file in files._found(field, left_out)]:
      if _suffix(path) != '.jsonl':
        raise ConfigError(f'Conversations.{field}: {path} is no .jsonl file; write a chat a row, or narrow the glob')
      for row, messages in rows_of(files._at(path), path, left_out):
        if not any(map(is_answer, messages)):
          raise ConfigError(f'{path} row {row + 1}: its messages have no answer (of the role assistant, with text); '
                            'add one, or remove the row')
        yield f'{path}#{row}', json.dumps({'messages': messages}, ensure_ascii=False)


def rows_of(where: str, name: str, left_out: collections.Counter | None = None, remedy: str = REMEDY
            ) -> Iterator[tuple[int, list[dict]]]:
  """(row from 0, messages) of a .jsonl file of chats, which messages call `name`; counts the rows that are empty.

  Raises:
    ConfigError: a file that cannot be read, ending with the remedy; a row that is no JSON, or has neither messages nor
      prompt and answer, as texts.
  """
  with reading.opened(where, remedy) as file:
    for row, line in enumerate(file):
      told = f'{name} row {row + 1}'
      text = reading.decoded(line, told, 'save the file as UTF-8').strip() if line.strip() else ''
      if not text:
        if left_out is not None:
          left_out['empty rows'] += 1
        continue
      record = reading.parsed(text, told, 'correct or remove the row')
      if 'messages' in record:
        messages = record['messages']
      elif 'prompt' in record:
        answer = [{'role': 'assistant', 'content': record['answer']}] if 'answer' in record else []
        messages = [{'role': 'user', 'content': record['prompt']}, *answer]
      else:
        raise ConfigError(f'{told} has neither messages nor prompt; it has {", ".join(record) or "nothing"}: give '
                          '{"messages": [...]} or {"prompt": ..., "answer": ...}')
      check_messages(messages, told)
      yield row, messages


def _texts_of(rows: Iterable, path: str, part: str, field: str,
              left_out: collections.Counter) -> Iterator[tuple[str, str]]:
  """(name, text) of every row (its number from 0, None where the file is one document; what it holds) that has text."""
  for row, text in rows:
    where = path if row is None else f'{path} row {row + 1}'
    if not isinstance(text, str | None):
      raise ValueError(f'{part}.field={field!r}: {where} holds {type(text).__name__}, not text; name another field')
    if text is None:
      left_out['rows of null'] += 1
    elif text := text.lstrip(reading.MARK):
      yield path if row is None else f'{path}#{row}', text
    else:
      left_out['empty documents'] += 1


def _missing(part: str, field: str, where: str, present: list[str]) -> ValueError:
  return ValueError(f'{part}.field={field!r}: {where} has no such field; it has {", ".join(present) or "none"}: '
                    f'set {part}.field to one of them')


def content_hash(text: str) -> int:
  """64 bits that depend on the contents alone."""
  data = text.encode('utf-8', 'surrogatepass')
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), 'big')


def _documents(part, texts: Callable, left_out: collections.Counter | None) -> Iterator[Document]:
  """All documents of a corpus of files; texts: (field, left_out) -> (name, text) of those that its globs match."""
  if not part.validation_files:
    return _split(functools.partial(texts, 'train'), part.validation, left_out)
  return _given(texts, collections.Counter() if left_out is None else left_out)


def _given(texts: Callable, left_out: collections.Counter) -> Iterator[Document]:
  held = set()
  for name, text in texts('validation_files', left_out):
    held.add(content_hash(text))
    yield Document(name=name, split='validation', text=text)
  for name, text in texts('train', left_out):
    if content_hash(text) in held:
      left_out['train documents that stand in validation'] += 1
    else:
      yield Document(name=name, split='train', text=text)


def _split(read: Callable, share: float, left_out: collections.Counter | None) -> Iterator[Document]:
  """Documents whose hash lies below a cut are validation: a `share` of them, and one at least if two differ."""
  cut = _cut(read, int(share * 2**64))
  for name, text in read(collections.Counter() if left_out is None else left_out):
    yield Document(name=name, split='validation' if content_hash(text) < cut else 'train', text=text)


def _cut(read, cut: int) -> int:
  """The cut, moved as little as needed in a corpus so small that a split would be empty.

  Reads only until both splits are seen to hold a document.
  """
  low, high = 2**64, -1
  for _, text in read(collections.Counter()):
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


def _first(error: BaseException) -> str:
  """The first line of what an error says."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def _matches(pattern: str, root: str, passed: dict[str, set]) -> dict[str, tuple]:
  """Every file that a glob matches: name -> (what it is known by whatever its name, the file).

  root: where the glob starts from, if it does not name it; names leave it out. passed: what is passed over, by why.
  """
  if not storage.remote(pattern):
    own = os.path.join(root, os.path.expanduser(pattern))
    found = list(_named(os.path.join(own, '*') if os.path.basename(own) == '**' else own, passed))
    passed['links to nothing'] |= {path for path in found if not os.path.exists(path)}
    own_files = filter(os.path.isfile, found)
    before = 0 if storage.whole(pattern) else len(os.path.join(root, ''))
    return {path[before:]: (_identity(path), storage.described(path[before:], path)) for path in own_files}
  place = storage.path(pattern)
  found = storage.attempt(lambda: storage.files(place).glob(str(place), detail=True), pattern)
  paths = {f'{storage.scheme(place)}://{key}': about for key, about in found.items() if about['type'] == 'file'}
  return {path: (path, storage.described(path, path, about)) for path, about in paths.items()}


def _identity(path: str) -> tuple:
  """The same for all names of a file or folder."""
  found = os.stat(path)
  # Not all file systems number their files.
  return (found.st_dev, found.st_ino) if found.st_ino else (os.path.realpath(path),)


def _named(pattern: str, passed: dict[str, set]) -> list[str]:
  """What a glob of this machine matches; a name that is there is matched by itself, whatever brackets stand in it."""
  if not glob.has_magic(pattern):
    return [pattern] if os.path.lexists(pattern) else []
  head, name = os.path.split(pattern)
  tops = [top for top in _named(head, passed) if os.path.isdir(top or os.curdir)] if head else ['']
  if name == '**':
    return [folder for top in tops for folder in _folders(top, passed)]
  return [os.path.join(top, found) for top in tops for found in
          ([name] if os.path.lexists(os.path.join(top, name)) else glob.glob(name, root_dir=top or None))]


def _folders(top: str, passed: dict[str, set]) -> Iterator[str]:
  """A folder and those in it that are not hidden, each once: by a name without links where it has one."""
  seen, waiting = set(), [top]
  while waiting:
    links = []
    for begin in waiting:
      for folder, inner, _ in os.walk(begin or os.curdir, onerror=_refuse):
        if _identity(folder) in seen:
          passed['links to folders that were met before'].add(folder)
          inner.clear()
          continue
        seen.add(_identity(folder))
        folder = folder if begin else folder[2:]
        inner[:] = sorted(name for name in inner if not name.startswith('.'))
        links += [path for path in (os.path.join(folder, name) for name in inner) if os.path.islink(path)]
        yield folder
    waiting = links


def _refuse(error: OSError):
  raise ConfigError(f'Files: {error.filename}: its files cannot be listed ({error.strerror}); '
                    'see to its permissions') from error


def _links(path: str) -> tuple[int, str]:
  """How many links a name leads through, and the name: the first of a file's names is the one that it is read by."""
  return sum(map(os.path.islink, (path, *map(str, Path(path).parents)))), path
