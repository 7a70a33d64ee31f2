"""Files of tensors that are read and written one tensor at a time; shapes are known before anything is allocated.

Files are read by the package safetensors, or by PyTorch (`pytorch_model.bin`). They are written here, because the
package wants all tensors of a file at once: eight bytes with the length of a header, the header (JSON: dtype, shape and
place of every tensor), then the tensors, row by row. Large models lie in several such files, beside an index.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
import functools
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

import ml_dtypes
import numpy as np

from loopformer import reading
from loopformer.convert import files
from loopformer.convert.files import DTYPES
from loopformer.convert.table import Unread
from loopformer.types import ConfigError, config_dataclass

NAME, INDEX = 'model.safetensors', 'model.safetensors.index.json'
BIN, BIN_INDEX = 'pytorch_model.bin', 'pytorch_model.bin.index.json'
Shape = tuple[int, ...]


@config_dataclass
class Tensor:
  """A tensor that has not been read: its shape, its dtype as the file calls it, and how to read it."""
  shape: Shape
  dtype: str
  read: Callable[[], np.ndarray]


class Tensors(Mapping):
  """name -> array, read whenever it is asked for; `shapes` and `dtypes` cost nothing."""

  def __init__(self, tensors: Mapping[str, Tensor]):
    self._tensors = tensors

  def __getitem__(self, name: str) -> np.ndarray:
    return self._tensors[name].read()

  def __contains__(self, name: object) -> bool:
    return name in self._tensors  # a Mapping's own reads it

  def __iter__(self) -> Iterator[str]:
    return iter(self._tensors)

  def __len__(self) -> int:
    return len(self._tensors)

  def tensor(self, name: str) -> Tensor:
    """One that has not been read."""
    return self._tensors[name]

  def only(self, names: Collection[str]) -> Tensors:
    """Those of these names."""
    return Tensors({name: tensor for name, tensor in self._tensors.items() if name in names})

  @property
  def shapes(self) -> dict[str, Shape]:
    """name -> shape."""
    return {name: tensor.shape for name, tensor in self._tensors.items()}

  @property
  def dtypes(self) -> dict[str, str]:
    """name -> dtype, as the file calls it."""
    return {name: tensor.dtype for name, tensor in self._tensors.items()}


def read_folder(folder: Path) -> Tensors:
  """The tensors of model.safetensors, of the files that its index names, or of pytorch_model.bin and its index.

  Raises:
    ConfigError: no such file, a file of the index that is absent, one that ends too early or is damaged, a tensor that
      the index has and its file has not, or one that it has not and two files have.
  """
  for file, index, read in ((NAME, INDEX, read_file), (BIN, BIN_INDEX, read_torch)):
    if (folder / file).exists():
      return Tensors(read(folder / file))
    if (folder / index).exists():
      return _read_indexed(folder, index, read)
  raise ConfigError(f'folder = {folder}: no {NAME}, {INDEX}, {BIN} or {BIN_INDEX} in it; give the folder of a model '
                    'with its weights')


def read_any(folder: Path) -> Mapping[str, Any]:
  """What the weights of a folder hold: the tensors of `read_folder`, or of its only file of weights, whatever its name.

  Raises:
    ConfigError: as of `read_folder` and `files.read`, or several files of other names.
  """
  if any((folder / name).exists() for name in (NAME, INDEX, BIN, BIN_INDEX)):
    held = read_folder(folder)
    return {name: Unread(shape=held.shapes[name], dtype=np.dtype(DTYPES[held.dtypes[name]]),
                         read=functools.partial(held.__getitem__, name)) for name in held}
  found = sorted(path for path in folder.iterdir() if path.suffix in files.READERS)
  if len(found) != 1:
    what = f'{len(found)} files of weights, {found[0].name} among them' if found else 'no file of weights'
    raise ConfigError(f'folder = {folder}: {what} and no {NAME}, {INDEX}, {BIN} or {BIN_INDEX}; name one file')
  return files.read(found[0])


WRAPPERS = ('_orig_mod', 'module', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')  # of PyTorch around modules


def bare(held: Tensors) -> Tensors:
  """Tensors of a decoder as it calls them itself: without names of wrappers, and with one `model.`, which the files of
  a bare stack lack and some have twice. Raises ConfigError where two become one."""
  found: dict[str, str] = {}
  for name in held:
    parts = [part for part in name.split('.') if part not in WRAPPERS]
    while parts[:2] == ['model', 'model']:
      parts = parts[1:]
    own = '.'.join(['model', *parts] if parts[:1] in (['embed_tokens'], ['layers'], ['norm']) else parts)
    if own in found:
      raise ConfigError(f'tensors {found[own]!r} and {name!r} are both {own!r} without what is around it; remove one')
    found[own] = name
  return Tensors({own: held.tensor(name) for own, name in found.items()})


def _read_indexed(folder: Path, index: str, read: Callable[[Path], dict[str, Tensor]]) -> Tensors:
  """What the files of an index hold: where it says, and besides that what it does not list, which transformers reads
  too.
  """
  places = reading.read_json(folder / index, 'download it again').get('weight_map')
  if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
    raise ConfigError(f'{folder / index} is damaged: it has no weight_map of names of files; download it again')
  held = {}
  for name in sorted(set(places.values())):
    if Path(name).name != name or not (folder / name).is_file():
      raise ConfigError(f'{folder / index}: it names {name!r}, which is not in the folder; download it again')
    held[name] = read(folder / name)
  listed = dict(places)
  for tensor, name in listed.items():
    if tensor not in held[name]:
      raise ConfigError(f'{folder / name}: tensor {tensor!r}, which {index} places there, is not in it; '
                        'download it again')
  for name, inside in held.items():
    for tensor in inside:
      if places.setdefault(tensor, name) not in (name, listed.get(tensor)):
        raise ConfigError(f'{folder / name}: tensor {tensor!r} is in {places[tensor]!r} too, and {index} does not say '
                          'which counts; download it again')
  return Tensors({tensor: held[name][tensor] for tensor, name in places.items()})


def read_file(path: Path) -> dict[str, Tensor]:
  """The tensors of one safetensors file.

  Raises:
    ConfigError: the file is damaged or ends before its tensors do, or one has a dtype that is not read.
  """
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError as error:
    raise ImportError(f"reading {path} needs safetensors: install the extra 'hf'") from error
  try:
    with safe_open(path, 'np') as file:
      slices = {name: file.get_slice(name) for name in file.keys()}
      rows = {name: (tuple(row.get_shape()), row.get_dtype()) for name, row in slices.items()}
  except (SafetensorError, ValueError, OSError) as error:
    raise ConfigError(f'{path}: {error}; it is no safetensors file, or was cut off: download it again') from error
  for name, (_, dtype) in rows.items():
    if dtype not in DTYPES:
      raise ConfigError(f'{path}: tensor {name!r} has dtype {dtype}; those that are read are {", ".join(DTYPES)}')

  def reader(name):
    def read() -> np.ndarray:
      with safe_open(path, 'np') as file:
        return file.get_tensor(name)

    return read

  return {name: Tensor(shape=shape, dtype=dtype, read=reader(name)) for name, (shape, dtype) in rows.items()}


def read_torch(path: Path) -> dict[str, Tensor]:
  """The tensors of one file of PyTorch's, which is mapped into memory.

  Raises:
    ConfigError: the file is damaged, is no state dict, or holds what is no tensor of numbers.
  """
  held = {name: tensor.detach() for name, tensor in files.read(path).items() if hasattr(tensor, 'detach')}
  codes = {f'torch.{np.dtype(kind).name}': code for code, kind in DTYPES.items()} | {'torch.bool': 'BOOL'}

  def reader(tensor):
    if codes[str(tensor.dtype)] == 'BF16':  # NumPy's own has none
      return lambda: tensor.contiguous().view(dtype=sys.modules['torch'].int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy

  for name, tensor in held.items():
    if 'strided' not in str(tensor.layout) or tensor.is_meta:
      raise ConfigError(f'{path}: tensor {name!r} is {tensor.layout} on {tensor.device}; save it again with its '
                        'numbers, as safetensors')
    if str(tensor.dtype) not in codes or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
      raise ConfigError(f'{path}: tensor {name!r} is {tensor.dtype} of shape {list(tensor.shape)}, which is not read, '
                        'or more than the file holds; save it again as safetensors')
  return {name: Tensor(shape=tuple(tensor.shape), dtype=codes[str(tensor.dtype)], read=reader(tensor))
          for name, tensor in held.items()}


def compare(expected: Mapping[str, Shape], given: Mapping[str, Shape], where: Any):
  """Raises ConfigError for the first tensor that is missing, misshapen or surplus."""
  for name, shape in expected.items():
    if name not in given:
      raise ConfigError(f'{where}: tensor {name!r} is missing, expected with shape {list(shape)}; the configuration '
                        f'and the weights are not of one model (it has {", ".join(map(repr, sorted(given)[:3]))}, ...)')
    if given[name] != shape:
      raise ConfigError(f'{where}: tensor {name!r} has shape {list(given[name])}, expected {list(shape)}; the '
                        'configuration and the weights are not of one model')
  for name in given:
    if name not in expected:
      raise ConfigError(f'{where}: tensor {name!r} of shape {list(given[name])} has no place in such a model; the '
                        'configuration and the weights are not of one model')


def write_folder(folder: Path, tensors: Mapping[str, tuple[Shape, Callable[[], np.ndarray]]], dtype: str,
                 shard_bytes: int):
  """Writes model.safetensors, or files of at most `shard_bytes` (one tensor at least) and their index.

  tensors: name -> (shape, what makes the array), called once for each, in order, while no other is held.
  """
  code = {'float32': 'F32', 'bfloat16': 'BF16'}[dtype]
  width = np.dtype(DTYPES[code]).itemsize
  shards: list[list[str]] = [[]]
  filled = 0
  for name, (shape, _) in tensors.items():
    size = math.prod(shape) * width
    if shards[-1] and filled + size > shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append(name)
    filled += size
  files = [NAME] if len(shards) == 1 else [
      f'model-{i:05}-of-{len(shards):05}.safetensors' for i in range(1, len(shards) + 1)]
  for file, names in zip(files, shards):
    _write_file(folder / file, {name: tensors[name] for name in names}, code)
  if len(shards) > 1:
    total = sum(math.prod(shape) for shape, _ in tensors.values()) * width
    places = {name: file for file, names in zip(files, shards) for name in names}
    (folder / INDEX).write_text(json.dumps({'metadata': {'total_size': total}, 'weight_map': places}, indent=1) + '\n')


def _write_file(path: Path, tensors: Mapping[str, tuple[Shape, Callable[[], np.ndarray]]], code: str):
  end = 0
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  for name, (shape, _) in tensors.items():
    start, end = end, end + math.prod(shape) * np.dtype(DTYPES[code]).itemsize
    header[name] = {'dtype': code, 'shape': list(shape), 'data_offsets': [start, end]}
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # tensors begin at a multiple of eight
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, (shape, make) in tensors.items():
      array = np.asarray(make(), order='C')
      if array.shape != shape:
        raise ConfigError(f'tensor {name!r} has shape {list(array.shape)}, expected {list(shape)}')
      array.astype(DTYPES[code], copy=False).tofile(file)
    file.flush()
    os.fsync(file.fileno())
