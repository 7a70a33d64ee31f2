"""Tables of weights: which official key becomes which parameter, and how its axes are laid out; read in both ways.

A layout is a list of axes, each a product of letters (a size each), and so 'qHd D' -> 'D Hqd' takes PyTorch's fused
[3D, D] (q, k, v stacked, heads contiguous in each) to this library's [D, H * 3 * d], where the three of a head lie
together (see `attention.SelfAttention` of nn).
"""
from __future__ import annotations

import math
import re
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from loopformer.types import ConfigError, config_dataclass

Sizes = Mapping[str, int]
Shape = tuple[int, ...]
NESTED = ('model', 'state_dict', 'model_state_dict')
PREFIXES = re.compile(r'^(?:(?:_orig_mod|module|model|gpt)\.)+')
EMBEDDING, HEAD = 'transformer.wte.weight', 'lm_head.weight'


@config_dataclass
class Unread:
  """An array that lies in a file: its shape and dtype are known, and np.asarray reads it, anew each time."""
  shape: Shape
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.read(), dtype)


def empty(shape: Shape) -> np.ndarray:
  """An f32 array whose memory JAX takes over on a CPU without a copy: it begins at a multiple of 64 bytes."""
  size = 4 * math.prod(shape)
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start:start + size].view(np.float32).reshape(shape)


@config_dataclass
class Span:
  """What a weight covers of an axis `letter` that is longer on the other side: `count` places (a number, or the letter
  of a size) from `start` on (negative: from the end). whole: the side with all of them, 0 theirs, 1 ours."""
  letter: str
  start: int
  count: int | str
  whole: int = 1

  def places(self, sizes: Sizes) -> slice:
    start = self.start % sizes[self.letter]
    return slice(start, start + self._number(sizes))

  def shorter(self, sizes: Sizes) -> Sizes:
    return {**sizes, self.letter: self._number(sizes)}

  def _number(self, sizes):
    return sizes[self.count] if isinstance(self.count, str) else self.count


@config_dataclass
class Row:
  """A weight: its official key (within a layer, for rows of layers), its path in the parameters, both layouts; a span
  where several weights of one side are one of the other."""
  theirs: str
  ours: str
  layout: tuple[str, str]
  span: Span | None = None

  def shapes(self, sizes: Sizes) -> tuple[Shape, Shape]:
    """(official shape, shape here), without the axis of stacked layers."""
    theirs, ours = (tuple(math.prod(own[c] for c in axis) for axis in axes.split())
                    for axes, own in zip(self.layout, self._sizes(sizes)))
    return theirs, ours

  def views(self, theirs: np.ndarray, ours: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers in both arrays, in one order of axes: assign one to the other (contiguous) one."""
    letters = [axes.replace(' ', '') for axes in self.layout]
    views = [array.reshape([own[c] for c in names])
             for array, names, own in zip((theirs, ours), letters, self._sizes(sizes))]
    if self.span is not None:
      side = self.span.whole
      views[side] = views[side][tuple(self.span.places(sizes) if c == self.span.letter else slice(None)
                                      for c in letters[side])]
    return views[0].transpose([letters[0].index(c) for c in letters[1]]), views[1]

  def _sizes(self, sizes):
    if self.span is None:
      return sizes, sizes
    own = [self.span.shorter(sizes)] * 2
    own[self.span.whole] = sizes
    return own


def row(theirs: str, ours: str, *layout: str, span: Span | None = None) -> Row:
  """A row; with one layout where both sides have the same."""
  return Row(theirs=theirs, ours=ours, layout=(layout[0], layout[-1]), span=span)


@config_dataclass
class Entry:
  """A row in its place: the full official key, the full path, and the slot of a stack that it is, if of a stack."""
  key: str
  path: str
  row: Row
  slot: int | None = None

  def of(self, flat: Mapping[str, np.ndarray]) -> np.ndarray:
    """Its part of the parameters."""
    return flat[self.path] if self.slot is None else flat[self.path][self.slot]


def placed(rows: Sequence[Row]) -> list[Entry]:
  """Rows that are not of layers, in their places."""
  return [Entry(key=r.theirs, path=r.ours, row=r) for r in rows]


def shapes(entries: Sequence[Entry], sizes: Sizes) -> tuple[dict[str, Shape], dict[str, Shape]]:
  """({official key: shape}, {path: shape})."""
  theirs, ours = {}, {}
  slots: dict[str, int] = {}
  for e in entries:
    theirs[e.key], ours[e.path] = e.row.shapes(sizes)
    if e.slot is not None:
      slots[e.path] = max(slots.get(e.path, 0), e.slot + 1)
  return theirs, {path: (slots[path], *shape) if path in slots else shape for path, shape in ours.items()}


def to_ours(entries: Sequence[Entry], arrays: Mapping[str, np.ndarray], sizes: Sizes,
            put: Callable[[str, np.ndarray], Any]) -> dict[str, Any]:
  """{path: what `put` makes of the path and its f32 array}, of official arrays of any floating dtype; always copies.
  One parameter is made after the other, and held no longer than `put` holds it."""
  parts: dict[str, list[Entry]] = {}
  for e in entries:
    parts.setdefault(e.path, []).append(e)

  def one(path, shape):
    array = empty(shape)
    for e in parts[path]:
      source, target = e.row.views(np.asarray(arrays[e.key]), e.of({path: array}), sizes)
      target[...] = source
    return put(path, array)

  return {path: one(path, shape) for path, shape in shapes(entries, sizes)[1].items()}


def to_theirs(entries: Sequence[Entry], flat: Mapping[str, np.ndarray], sizes: Sizes) -> dict[str, np.ndarray]:
  """{official key: f32 array}: the inverse. Arrays are contiguous: safetensors writes memory, not the values of views.
  """
  arrays = {key: np.empty(shape, np.float32) for key, shape in shapes(entries, sizes)[0].items()}
  for e in entries:
    target, source = e.row.views(arrays[e.key], e.of(flat), sizes)
    target[...] = source
  return arrays


def named(held: Mapping[str, Any], rename: Callable[[str], str], buffer: Callable[[str, Any], bool],
          ) -> tuple[dict[str, Any], dict[str, Any]]:
  """(weights, buffers) of the innermost state dict, under their bare keys; those of files are unread (`Unread`)."""
  while inner := [held[key] for key in NESTED if isinstance(held.get(key), Mapping)]:
    held = inner[0]
  weights: dict[str, Any] = {}
  buffers: dict[str, Any] = {}
  full: dict[str, str] = {}
  for name, value in held.items():
    key = rename(PREFIXES.sub('', name))
    if key in full:
      raise ConfigError(f'keys {full[key]!r} and {name!r} are both {key!r} without their prefixes; remove one')
    full[key] = name
    try:
      array = _array(value)
    except Exception as error:  # of torch, or of NumPy
      raise ConfigError(f'key {name!r}: it is no array ({str(error).splitlines()[0]}); save the state dict alone'
                        ) from error
    (buffers if buffer(key, array) else weights)[key] = array
  return weights, buffers


def _array(value: Any) -> np.ndarray | Unread:
  """A tensor (NumPy has no bfloat16: by way of float32), or anything like an array, as NumPy."""
  if isinstance(value, Unread):
    return value
  if not hasattr(value, 'detach'):
    return np.asarray(value)
  value = value.detach()
  if value.is_meta or 'strided' not in str(value.layout):
    raise ValueError(f'it is {value.layout} on {value.device}')
  if value.numel() * value.element_size() > value.untyped_storage().nbytes():
    raise ValueError('it is a view of fewer numbers than its shape has')
  floating = value.is_floating_point()
  dtype = np.dtype('float32' if floating else str(value.dtype).removeprefix('torch.'))
  return Unread(shape=tuple(value.shape), dtype=dtype,
                read=lambda: (value.float() if floating else value).cpu().numpy())


def tied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the head; formats that store shared weights once may have kept it in place of the embedding."""
  if HEAD not in arrays:
    return arrays
  rest = {key: array for key, array in arrays.items() if key != HEAD}
  head, embedding = arrays[HEAD], rest.setdefault(EMBEDDING, arrays[HEAD])
  if not np.array_equal(np.asarray(head), np.asarray(embedding)):
    raise ConfigError(f'key {HEAD!r} of shape {list(head.shape)} differs from {EMBEDDING!r} of shape '
                      f'{list(embedding.shape)}; the head of these models is tied: remove it, or convert a tied model')
  return rest


def measured(arrays: Mapping[str, np.ndarray], key: str, letters: str, where: str) -> Shape:
  """The shape of an array that others are measured by; as many axes as there are letters in '[V, D]'."""
  if key not in arrays:
    raise ConfigError(f'{where}: key {key!r} is missing, expected with shape {letters}; '
                      f'check that kind is the kind of the checkpoint{_sample(arrays)}')
  if arrays[key].ndim != letters.count(',') + 1:
    raise ConfigError(f'{where}: key {key!r} has shape {list(arrays[key].shape)}, expected {letters}')
  return arrays[key].shape


def layers(arrays: Mapping[str, np.ndarray], stack: str) -> int:
  """How many layers have keys that begin with `stack` and a number; 1 if none does (whose keys will be missed)."""
  numbers = [re.match(re.escape(stack) + r'(\d{1,9})\.', key) for key in arrays]
  # No more than there are keys: one of a layer beyond them is surplus.
  return 1 + max((n for n in (int(number[1]) for number in numbers if number) if n < len(arrays)), default=0)


def same_key(key: str) -> str:
  """Keys are as they are: what a kind renames that renames nothing."""
  return key


def rotary_table(key: str, array: np.ndarray) -> bool:
  """Whether a key is that of the rotary table, the only buffer of recurrent models."""
  return key == 'freqs_cis'


def length_of(buffers: Mapping[str, np.ndarray], given: int | None, published: int) -> int:
  """The longest sequence: as given, or that of the rotary table [1, T, 1, d / 2, 2], or the published one."""
  tables = [array.shape[1] for array in buffers.values() if array.ndim > 1]
  return given or (tables + [published])[0]


def check_shown_heads(given: int | None, shown: int):
  """Raises ConfigError where heads are given that are not those that the checkpoint's shapes show."""
  if given not in (None, shown):
    raise ConfigError(f'heads = {given}: the checkpoint has {shown}; give that, or leave heads out')


def check_count(name: str, value: Any):
  """Raises ConfigError unless it is a positive integer."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
    raise ConfigError(f'{name} = {value!r}: give an integer, 1 or more')


def compare(expected: Mapping[str, Shape], given: Mapping[str, Shape], where: str):
  """Raises ConfigError for the first key that is missing, misshapen or surplus."""
  for key, shape in expected.items():
    if key not in given:
      raise ConfigError(f'{where}: key {key!r} is missing, expected with shape {list(shape)}; '
                        f'check that kind is the kind of the checkpoint{_sample(given)}')
    if given[key] != shape:
      raise ConfigError(f'{where}: key {key!r} has shape {list(given[key])}, expected {list(shape)}; '
                        'check that all weights are from one model')
  for key in given:
    if key not in expected:
      raise ConfigError(f'{where}: key {key!r} of shape {list(given[key])} is surplus, expected is no such weight; '
                        'choose the kind that has it, or remove it if it is none')


def _sample(given: Mapping[str, Any]) -> str:
  """The first keys that are there, for messages."""
  return f' (keys begin {", ".join(map(repr, sorted(given)[:3]))})' if given else ' (it is empty)'
