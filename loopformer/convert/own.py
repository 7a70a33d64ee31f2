"""Tensors of exports under our own names: as a module of PyTorch has them, one a layer, with products as [out, in].

    read_in.weight                          V D   read_in/embedding; positions.weight T D read_in/positions
    lm_head.weight                          V D   read_out/kernel, if not tied
    {stack}.layers.{i}.attn.qkv.weight      F D   {stack}/block/attn/qkv/kernel [i]; other products alike
    {stack}.layers.{i}.norm_attn.scale      D     {stack}/block/norm_attn/scale [i]
    cell.condition.{t}.first.kernel         S D   cell/condition/{t}/in/kernel; last for out
    cell.modulation.kernel, ...                   all else as it is, with dots for slashes

Versions up to 0.1.0 wrote everything as it is, layers stacked; that is read too.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flax.traverse_util import unflatten_dict
import numpy as np

from loopformer.convert import table, tensors
from loopformer.convert.tensors import Shape, Tensors
from loopformer.model import Looped
from loopformer.nn.embed import Head, TiedHead
from loopformer.types import Array, ConfigError, Params, config_dataclass

NAMES = {'read_in/embedding': 'read_in.weight', 'read_in/positions': 'positions.weight',
         'read_out/kernel': 'lm_head.weight'}
CONDITION = {'in': 'first', 'out': 'last'}
WHOLE = ('I64', 'I32', 'I16', 'I8', 'U8', 'BOOL')  # dtypes, as files call them, that no weight has


@config_dataclass
class Place:
  """A tensor. path: of the array of parameters that it is, or is a layer (slot) of; turned: whether it is transposed.
  """
  path: str
  shape: Shape
  slot: int | None = None
  turned: bool = False

  def of(self, array: Array) -> Array:
    """The tensor, out of the array."""
    return array if self.slot is None else array[self.slot]

  def turn(self, tensor: np.ndarray) -> np.ndarray:
    """From one layout to the other."""
    return tensor.T if self.turned else tensor


def places(shapes: Mapping[str, Shape]) -> dict[str, Place]:
  """Name -> place of all tensors of a model, whose parameters have these shapes by their paths."""
  found = {}
  for path, shape in shapes.items():
    folders, name = path.split('/')[:-1], path.split('/')[-1]
    stacked, condition = 'block' in folders, 'condition' in folders
    shape = shape[1:] if stacked else shape
    turned = path not in NAMES and name == 'kernel' and len(shape) == 2 and not condition
    for slot in range(shapes[path][0]) if stacked else [None]:
      others = CONDITION if condition else {'block': f'layers.{slot}'}
      parts = [others.get(part, part) for part in folders]
      key = NAMES.get(path) or '.'.join([*parts, 'weight' if turned else name])
      found[key] = Place(path=path, shape=shape[::-1] if turned else shape, slot=slot, turned=turned)
  return found


def untied(model: Looped, held: Tensors) -> Looped:
  """The model, with a head of its own where the file has one: transformers may have untied it."""
  if type(model.read_out) is TiedHead and 'lm_head.weight' in held.shapes:
    return model.clone(read_out=Head(outputs=model.read_in.vocab, norm=model.read_out.norm))
  return model


def read(shapes: Mapping[str, Shape], held: Tensors, where: Path, put: Callable[[str, np.ndarray], Array]) -> Params:
  """Parameters of these shapes out of an export; `put` takes each array, by its path, to where it belongs."""
  old = 'read_in.embedding' in held.shapes
  named = ({path.replace('/', '.'): Place(path=path, shape=shape) for path, shape in shapes.items()} if old else
           places(shapes))
  tensors.compare({key: place.shape for key, place in named.items()}, held.shapes, where)
  check_floats(held, named, where)
  keys: dict[str, list[str]] = {}
  for key, place in named.items():
    keys.setdefault(place.path, []).append(key)
  return unflatten_dict({path: put(path, _array(names, named, held, shapes[path])) for path, names in keys.items()},
                        sep='/')


def _array(names, named, held, shape):
  array = table.empty(shape)
  for name in names:
    place = named[name]
    array[... if place.slot is None else place.slot] = place.turn(held[name])
  return array


def check_floats(held: Tensors, names, where: Path):
  """Raises ConfigError where a weight is whole numbers."""
  for name in names:
    if held.dtypes[name] in WHOLE:
      raise ConfigError(f'{where}: tensor {name!r} has dtype {held.dtypes[name]}; save it as floating point')
