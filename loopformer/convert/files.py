"""Checkpoint files as mappings of names to arrays; the libraries that read them are extras, imported when needed."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import importlib
import math
import os
from pathlib import Path
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from loopformer import reading, storage
from loopformer.convert.table import Unread
from loopformer.types import ConfigError

DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
          'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}  # in safetensors
OFFICIAL_MODULES = ('base', 'base_loop', 'loopformer', 'tmlt')


def read(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
  """What a checkpoint holds, as it is nested there.

  Args:
    source: a path, of this machine or of a bucket, that ends in .safetensors, .npz, .pt, .pth or .bin, whose arrays are
      read when they are asked for; or a mapping, which is returned as it is.

  Raises:
    ConfigError: no such file, a format that is not read, or a file that cannot be read.
    ImportError: the extra that reads the format is not installed.
  """
  if isinstance(source, Mapping):
    return source
  if not isinstance(source, (str, os.PathLike)):
    raise ConfigError(f'source = {type(source).__name__}: give a path, or a dict of arrays (model.state_dict())')
  path = storage.path(source)
  if path.suffix not in READERS:
    raise ConfigError(f'source = {path}: the format {path.suffix!r} is not read; '
                      f'save it as one of {", ".join(READERS)}')
  path = storage.fetched(path)
  if not path.is_file():
    what = 'it is a folder, not a file' if path.is_dir() else 'there is no such file'
    raise ConfigError(f'source = {path}: {what}; check the path')
  with _reading(path):
    held = READERS[path.suffix](path)
  if not isinstance(held, Mapping):
    raise ConfigError(f'source = {path}: holds a {type(held).__name__}, not a state dict; '
                      'save it by torch.save(model.state_dict(), path)')
  return held


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  """Inside it errors are told of the file: its readers have no common class of them where it is damaged."""
  try:
    yield
  except ImportError:
    raise
  except Exception as error:
    reason = (str(error).splitlines() or [''])[0]
    if type(error).__name__ == 'UnpicklingError':  # which advises to run it
      reason = 'it holds more than tensors, numbers and texts, or is damaged; nothing of it was run'
    raise ConfigError(f'source = {path}: cannot be read ({type(error).__name__}: {reason}); save the state dict alone, '
                      'as .safetensors or by torch.save(model.state_dict(), path)') from error


def _unread(path: Path, about: Mapping[str, tuple[tuple[int, ...], np.dtype]], read: Callable[[str], np.ndarray]
            ) -> dict[str, Unread]:
  """What a file holds by name, shapes and dtypes of which are known, one array read at a time."""
  def reader(name):
    def one() -> np.ndarray:
      with _reading(path):
        return read(name)

    return one

  return {name: Unread(shape=shape, dtype=dtype, read=reader(name)) for name, (shape, dtype) in about.items()}


def naming(source: Any) -> contextlib.AbstractContextManager:
  """Inside it errors about what was read of a source name its file, if it is one."""
  if isinstance(source, Mapping):
    return contextlib.nullcontext()
  return reading.naming(f'source = {source}', 'save the state dict alone')


def _npz(path: Path) -> dict[str, Unread]:
  about = {}
  with zipfile.ZipFile(path) as archive:
    for member in archive.infolist():  # what is said of an array is believed, and room made for it, before it is read
      with archive.open(member) as file:
        header = {(1, 0): np.lib.format.read_array_header_1_0}.get(np.lib.format.read_magic(file),
                                                                   np.lib.format.read_array_header_2_0)
        shape, _, dtype = header(file)
        if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
          raise ValueError(f'{member.filename} is no array of shape {shape}')
        if dtype.hasobject:
          raise ValueError(f'{member.filename} holds objects')
        about[member.filename.removesuffix('.npy')] = shape, dtype

  def read(name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
      return arrays[name]

  return _unread(path, about, read)


def _safetensors(path: Path) -> dict[str, Unread]:
  try:
    from safetensors import safe_open
  except ImportError as error:
    raise ImportError(f"reading {path} needs safetensors: install the extra 'hf'") from error
  with safe_open(path, 'np') as file:
    slices = {name: file.get_slice(name) for name in file.keys()}
    about = {name: (tuple(row.get_shape()), np.dtype(DTYPES[row.get_dtype()])) for name, row in slices.items()}

  def read(name):
    with safe_open(path, 'np') as file:
      return file.get_tensor(name)

  return _unread(path, about, read)


def _torch(path: Path) -> Any:
  try:
    import torch
  except ImportError as error:
    raise ImportError(f"reading {path} needs torch: install the extra 'peer'") from error
  # Official training checkpoints also hold an instance of the model module's GPTConfig. An empty class of that name
  # lets the safe unpickler pass over it; nothing of the file is executed. Losses and learning rates stand beside the
  # weights as NumPy's numbers.
  inert = [type('GPTConfig', (), {'__module__': f'models.{module}'}) for module in OFFICIAL_MODULES]
  multiarray = importlib.import_module('numpy._core.multiarray')
  plain = [(getattr(multiarray, name), f'numpy.{folder}.multiarray.{name}')
           for folder in ('core', '_core') for name in ('scalar', '_reconstruct')]
  kinds = [type(np.dtype(kind)) for kind in ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', '?')]
  with torch.serialization.safe_globals([*inert, *plain, np.ndarray, np.dtype, *kinds, (_latin, '_codecs.encode')]):
    zipped = zipfile.is_zipfile(path)  # mapped: optimiser states stay on disk; the format before 1.6 cannot be
    return torch.load(path, map_location='cpu', weights_only=True, mmap=zipped)


def _latin(text: str, encoding: str = 'latin1') -> bytes:
  """How pickles of old protocols write bytes, and nothing else that the codecs of Python can do."""
  if encoding != 'latin1':
    raise ValueError(f'bytes as {encoding!r}')
  return text.encode('latin1')


READERS = {'.safetensors': _safetensors, '.npz': _npz, '.pt': _torch, '.pth': _torch, '.bin': _torch}
