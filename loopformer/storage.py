"""Where files lie: in folders of this machine, or in buckets (gs://, s3://), which etils.epath reads through fsspec.

A path is a `pathlib.Path` or, of a bucket, an `epath.Path`, which has the same methods. The libraries of a bucket are
extras, imported where such a path is made. An object is written whole or not at all; nothing is appended to one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
from pathlib import Path
import re
import secrets
import shutil
import tempfile
import time
from typing import Any, NamedTuple

from loopformer.types import ConfigError

# Scheme -> the module that serves it, and how to get it. Checkpoints need TensorStore too, which knows the first two.
CLIENTS = {'gs': ('gcsfs', "pip install 'loopformer[gcs]'"), 's3': ('s3fs', "pip install 'loopformer[s3]'"),
           'az': ('adlfs', 'pip install adlfs'), 'hf': ('huggingface_hub', 'pip install huggingface_hub')}
WORKDIRS = ('gs', 's3')
DELAYS = (1, 4, 16)  # seconds before a bucket is tried again, after what its client has tried by itself


class Unreachable(OSError):
  """A bucket that could not be read or written, however often it was tried."""


class Unwritable(OSError):
  """A place of this machine that could not be written; the message names it and the remedy."""


REMEDIES = {errno.ENOSPC: 'make room there', errno.EDQUOT: 'make room in your quota',
            errno.EFBIG: 'raise the limit on the size of files (ulimit -f)', errno.EROFS: 'it is mounted read-only',
            errno.EACCES: 'see to its permissions', errno.EPERM: 'see to its permissions',
            errno.EIO: 'see to the disk', errno.ESTALE: 'see to the mount'}


def unwritable(target: Any, error: OSError) -> Unwritable:
  """The error of a write, with the path, which that of an open file lacks, and what helps."""
  if isinstance(error, Unwritable):
    return error
  return Unwritable(f'{target}: cannot be written ({reason(error)})')


def reason(error: Exception) -> str:
  """What the system says of a write and what helps, where the error, TensorStore's too, tells the system's number."""
  told = re.search(r"os_error_code='(\d+)'", str(error))
  number = int(told[1]) if told else getattr(error, 'errno', None)
  if number is None:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
  return '; '.join(filter(None, (os.strerror(number), REMEDIES.get(number))))


def scheme(name: str | os.PathLike) -> str | None:
  """`gs` of gs://bucket/folder; None for a path of this machine."""
  found = re.match(r'([A-Za-z][A-Za-z0-9+.-]*):/', os.fspath(name))  # pathlib leaves one slash
  return found and found[1] if found and (found[1] in CLIENTS or '://' in os.fspath(name)) else None


def path(name: str | os.PathLike) -> Any:
  """A path whose methods work where it points to, with ~ as the home folder; touches nothing.

  Raises:
    ConfigError: a scheme that is not known, or whose client is not installed, or no bucket in it; no such home folder.
  """
  kind = scheme(name)
  if kind is None:
    whole = os.path.expanduser(name)
    if os.fspath(whole).startswith('~'):
      raise ConfigError(f'{os.fspath(name)}: there is no such home folder; give the whole path, or ./{os.fspath(name)}')
    return Path(whole)
  if kind not in CLIENTS:
    raise ConfigError(f'{os.fspath(name)}: there is no file system {kind}://; use a local folder, '
                      + ', '.join(f'{known}://' for known in CLIENTS))
  module, remedy = CLIENTS[kind]
  if importlib.util.find_spec(module) is None:
    raise ConfigError(f'{os.fspath(name)}: reading and writing {kind}:// needs {module}; {remedy}')
  rest = os.fspath(name)[len(kind) + 1:].lstrip('/')
  if not rest:
    raise ConfigError(f'{os.fspath(name)}: names no bucket; give {kind}://BUCKET/FOLDER')
  os.environ.setdefault('EPATH_USE_TF', 'false')  # epath would take TensorFlow where it is installed
  import fsspec
  for protocol in {kind, 'gcs' if kind == 'gs' else kind}:  # what other processes write must be seen
    fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)
  from etils import epath
  return epath.Path(f'{kind}://{rest}')


def absolute(name: str | os.PathLike) -> Any:
  """The same path from every current folder."""
  return path(name) if remote(name) else Path(os.path.abspath(path(name)))


def whole(name: str) -> bool:
  """Whether a path or glob means the same from every current folder."""
  return remote(name) or os.path.isabs(os.path.expanduser(name))


def within(root: str, name: str) -> str:
  """A path or glob that starts from a folder, unless it is whole."""
  return name if remote(name) else os.path.join(root, os.path.expanduser(name))


def remote(name: str | os.PathLike) -> bool:
  """Whether it lies in a bucket."""
  return scheme(name) is not None


def cache() -> Path:
  """The folder of this machine for copies and compiled programs: $LOOPFORMER_CACHE, or that of the system; where this
  user has none that can be written, one among the temporary files.

  Raises:
    ConfigError: that one is somebody else's.
  """
  given = os.environ.get('LOOPFORMER_CACHE')
  if given:
    return path(given).absolute()
  own = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')) / 'loopformer'
  if own.is_absolute() and writable(own):
    return own
  shared = Path(tempfile.gettempdir()) / f'loopformer-{os.getuid()}'
  with contextlib.suppress(OSError):
    shared.mkdir(mode=0o700, exist_ok=True)
    if shared.stat().st_uid == os.getuid() and not shared.is_symlink():
      return shared
  raise ConfigError(f'{shared}: no folder of this user, and {own} cannot be written; name one by LOOPFORMER_CACHE')


def writable(name: str | os.PathLike) -> bool:
  """Whether a folder of this machine can be written, or made; touches nothing."""
  place = path(name).absolute()
  while not os.path.lexists(place) and place != place.parent:
    place = place.parent
  return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def check_workdir(name: str | os.PathLike, writes: bool):
  """Raises ConfigError where a work folder lies in a bucket that cannot hold one, is not there, or is not open to us.
  """
  if scheme(name) not in (None, *WORKDIRS):
    raise ConfigError(f'workdir = {os.fspath(name)}: checkpoints go to local folders, '
                      + ', '.join(f'{known}://' for known in WORKDIRS))
  check(name, 'workdir', writes)


def check(name: str | os.PathLike, called: str, writes: bool):
  """Raises ConfigError, with the name of the argument, where a folder cannot be written, or the bucket of a path is not
  there or not open to us."""
  place = path(name)
  if not remote(place):
    if writes and not writable(place):
      what = 'a file' if os.path.isfile(place) else 'not a folder that this user may write or make'
      raise ConfigError(f'{called} = {place}: {what}; name another folder, or see to its permissions')
    return
  bucket = f'{scheme(place)}://{_key(place).partition("/")[0]}'
  try:
    if writes:
      with _probed(place):
        pass
    elif not place.exists():
      files(bucket).ls(bucket)
  except FileNotFoundError as error:
    raise ConfigError(f'{called} = {place}: there is no bucket {bucket}; make it, or correct the name') from error
  except Exception as error:  # of the client, each of which has its own
    raise ConfigError(f'{called} = {place}: {bucket} cannot be {"written" if writes else "read"} ({_reason(error)}); '
                      'see to its permissions and to the credentials of this machine') from error


def stores(folder: str | os.PathLike, log: Callable[[str], None]) -> bool:
  """Whether results can be written into a folder; where they cannot, the log hears that they are printed alone."""
  try:
    check(folder, 'workdir', writes=True)
  except ConfigError as error:
    log(f'warning: results are printed, and not stored: {error}')
    return False
  return True


def files(name: str | os.PathLike) -> Any:
  """The fsspec file system of a bucket's path."""
  import fsspec
  return fsspec.filesystem(scheme(path(name)))


def write(target: Any, data: str | bytes):
  """Writes a file whole: readers see what was there before, or all of it.

  Raises:
    Unreachable: the bucket could not be written.
    Unwritable: the place on this machine could not.
  """
  data = data.encode() if isinstance(data, str) else data
  target = path(target)
  if remote(target):
    attempt(lambda: target.write_bytes(data), target)
    return
  temporary = target.with_name(f'{target.name}.{secrets.token_hex(4)}')
  try:
    temporary.write_bytes(data)
    temporary.replace(target)
  except BaseException as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    if isinstance(error, OSError):
      raise unwritable(target, error) from error
    raise


def create(target: Any, data: str) -> bool:
  """Writes a file where none is, and says whether it did. (A store that does not know of such files overwrites it.)

  Raises:
    Unreachable: the bucket could not be written.
  """
  target = path(target)
  if remote(target):
    return attempt(lambda: _created(target, data), target)
  try:
    file = target.open('x')
  except FileExistsError:
    return False
  try:
    with file:
      file.write(data)
  except BaseException:
    target.unlink()
    raise
  return True


def _created(target, data):
  try:
    files(target).pipe_file(str(target), data.encode(), mode='create')
  except Exception:  # each client has its own for what is there
    if target.exists():
      return False
    raise
  return True


def touch(target: Any, data: str):
  """Lets a file that holds `data` be as if it had been written just now."""
  if remote(target):
    write(target, data)
  else:
    os.utime(target)


def written(target: Any) -> float:
  """When a file was written last, in seconds by the clock of where it lies."""
  return files(target).modified(str(target)).timestamp() if remote(target) else os.stat(target).st_mtime


def age(target: Any) -> float:
  """Seconds since a file was written last, by the clock of where it lies."""
  with _probed(path(target).parent) as probe:
    return written(probe) - written(target)


@contextlib.contextmanager
def _probed(folder: Any) -> Iterator[Any]:
  """A file in a folder, for a moment."""
  probe = folder / f'.probe-{secrets.token_hex(4)}'
  try:
    probe.write_text('can be deleted\n')
    yield probe
  finally:
    with contextlib.suppress(FileNotFoundError):
      probe.unlink()


def attempt(action: Callable[[], Any], where: Any) -> Any:
  """What `action` returns, which may fail for a while.

  Raises:
    Unreachable: it went on failing, or failed for a reason that does not pass.
  """
  for number, delay in enumerate((*DELAYS, None), 1):
    try:
      return action()
    except Exception as error:  # of the client, each of which has its own
      if delay is None or isinstance(error, (FileNotFoundError, PermissionError)):
        times = f' (tried {number} times)' if number > 1 else ''
        raise Unreachable(f'{where}: {_reason(error)}{times}') from error
      time.sleep(delay)


def _reason(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0][:300]


@contextlib.contextmanager
def appending(target: Any) -> Iterator[Any]:
  """A file of this machine to append text to, for processes too; of a bucket, it is uploaded at the end."""
  target = path(target)
  if not remote(target):
    with target.open('a') as file:
      yield file
    return
  with tempfile.NamedTemporaryFile('w') as file:
    if target.exists():
      file.write(target.read_text())
      file.flush()
    try:
      yield file
    finally:
      file.flush()
      write(target, Path(file.name).read_bytes())


@contextlib.contextmanager
def filled(target: Any) -> Iterator[Path]:
  """A folder of this machine to write into: `target` itself or, of a bucket, one that is uploaded at the end."""
  target = path(target)
  if not remote(target):
    target.mkdir(parents=True, exist_ok=True)
    yield target
    return
  with tempfile.TemporaryDirectory() as folder:
    yield Path(folder)
    upload(Path(folder), target)


def upload(folder: Path, target: Any, last: str = ''):
  """Copies all files of a folder into one of a bucket, the file `last` after the others."""
  names = sorted(str(file.relative_to(folder)) for file in folder.rglob('*') if file.is_file())
  for chosen in ([name for name in names if name != last], [name for name in names if name == last]):
    if chosen:
      attempt(lambda: files(target).put([str(folder / name) for name in chosen],
                                        [f'{target}/{name}' for name in chosen]), target)


def move(folder: Any, target: Any):
  """Gives a folder another name, in the same file system."""
  if not remote(folder):
    folder.rename(target)
    return
  keys = list(held(folder))
  moved = [_key(target) + key.removeprefix(_key(folder)) for key in keys]
  attempt(lambda: files(folder).copy(keys, moved), folder)
  attempt(lambda: files(folder).rm(keys), folder)


def fetched(name: str | os.PathLike, beside: Sequence[str] = ()) -> Path:
  """A file or folder as it is on this machine: itself or, of a bucket, a copy in `cache()`, made anew when it changed.

  Args:
    beside: names in the folder of a file that come along, where there are such.

  Raises:
    ConfigError: there is nothing of that name in the bucket.
  """
  source = path(name)
  if not remote(source):
    return source
  found = held(source)
  if not found:
    raise ConfigError(f'{source}: there is no such file or folder; check the path')
  top = _key(source.parent)
  if list(found) == [_key(source)]:
    found |= {key: state for other in beside for key, state in held(source.parent / other).items()}
  digest = hashlib.sha256(json.dumps([str(source), sorted(found.items())]).encode()).hexdigest()[:32]
  return downloaded({key: os.path.relpath(key, top) for key in found}, source, cache() / 'files' / digest) / source.name


class File(NamedTuple):
  """A file that something was made from.

  size: bytes; stamp: what changes when the file is written, nanoseconds of its modification or, in a bucket, the
  store's mark of contents; sha256: reads the file, in hexadecimal digits.
  """
  name: str
  size: int
  stamp: int | str
  sha256: Callable[[], str]


def described(name: str, where: str | os.PathLike, about: dict | None = None) -> File:
  """The file that lies at `where`; about: what a listing of its bucket said of it, None for a file of this machine."""
  if about is None:
    found = os.stat(where)
    return File(name, found.st_size, found.st_mtime_ns, lambda: sha256(where))
  return File(name, about['size'], _mark(about), lambda: sha256(where))


def sha256(name: str | os.PathLike) -> str:
  """Of a file's contents, in hexadecimal digits."""
  digest = hashlib.sha256()
  with path(name).open('rb') as file:
    while block := file.read(1 << 20):
      digest.update(block)
  return digest.hexdigest()


def held(folder: Any) -> dict[str, str]:
  """What stands in a folder of a bucket, or the file of that name: key -> size and the store's own mark of contents."""
  found = attempt(lambda: files(folder).find(str(folder), detail=True), folder)
  return {key: f'{about["size"]} {_mark(about)}' for key, about in found.items() if about['type'] == 'file'}


def _mark(about: dict) -> str:
  return str(next((about[name] for name in ('md5Hash', 'crc32c', 'ETag', 'etag', 'mtime') if about.get(name)), ''))


def downloaded(names: dict[str, str], source: Any, folder: Path) -> Path:
  """The folder, which files of a bucket (key -> name in it) are copied into unless it is there; whole or absent."""
  outside = [key for key, name in names.items() if os.path.isabs(name) or '..' in Path(name).parts]
  if outside:
    raise ConfigError(f'{source}: it holds {outside[0]!r}, which would be written outside of the copy; remove it')
  if folder.is_dir():
    return folder
  temporary = folder.with_name(f'{folder.name}.{secrets.token_hex(4)}')
  try:
    for name in names.values():
      (temporary / name).parent.mkdir(parents=True, exist_ok=True)
    attempt(lambda: files(source).get(list(names), [str(temporary / name) for name in names.values()]), source)
    with contextlib.suppress(OSError):  # another process was first
      temporary.rename(folder)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return folder


def _key(place: Any) -> str:
  """bucket/folder of scheme://bucket/folder."""
  return str(place).partition('://')[2]
