"""Retrofitted recurrence (McLeish et al., 2511.07384): a looped model out of the layers of a pretrained plain decoder.

    model = Looped(read_in, Recur(Stack(block(), 6), Concat()), prelude=Stack(block(), 4), coda=Stack(block(), 4), ...)
    params = retrofit(source_params, model, prelude=range(4), core=range(6, 12), coda=range(12, 16))

`from_pretrained(folder, prelude=4, coda=4, retrofit=2)`, and --mode=import with these flags, read a published decoder
so. Layers that no section takes are dropped. Embedding, head and final norm are copied; only the adapter is new.
"""
from __future__ import annotations

import itertools
import math
from typing import Any, Mapping, Sequence

from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from loopformer.cells.recur import Recur
from loopformer.model import Looped, parameter_shapes
from loopformer.nn.blocks import PostNorm, PreNorm
from loopformer.nn.inject import Concat
from loopformer.nn.layers import UniformWithin
from loopformer.starts import Noise
from loopformer.types import Array, ConfigError, Params

SOURCE = 'cell/core/block/'
STD = math.sqrt(2 / (5 * 5280))  # of the first state, 0.0087
TARGETS = {'prelude': 'prelude/block/', 'core': SOURCE, 'coda': 'coda/block/'}


def retrofit(params: Params, model: Looped, *, prelude: Sequence[int], core: Sequence[int], coda: Sequence[int],
             key: Array | None = None) -> Params:
  """Parameters of `model` whose layers are layers of a plain model.

  Args:
    params: those of the source: Looped with a Plain cell, one stack of pre-norm blocks, neither prelude nor coda.
    model: what comes out: Looped with Recur(.., Concat), whose prelude, core and coda are stacks of the source's kind
      of block, each an instance of its own, and whose ways in and out are the source's.
    prelude, core, coda: numbers of source layers, from 0, in the order in which they are to run. Each section has as
      many as the model's stack has layers; none where the model has no such stack.
    key: of the adapter's own initialiser; `jax.random.key(0)` if absent.

  Raises:
    ConfigError: a layer that is not there or is taken twice, a section of another size than the model's, a source or
      model of another form, or weights of another shape.
  """
  source = flatten_dict(params, sep='/')
  depth = _depth(source)
  chosen = {'prelude': tuple(prelude), 'core': tuple(core), 'coda': tuple(coda)}
  _check_layers(chosen, depth)
  _check_model(model, chosen)
  flat = {path: leaf for path, leaf in source.items() if not path.startswith(SOURCE)}
  for name, layers in chosen.items():
    if layers:
      flat |= {TARGETS[name] + path.removeprefix(SOURCE): jnp.asarray(leaf)[np.asarray(layers)]
               for path, leaf in source.items() if path.startswith(SOURCE)}
  flat |= adapter(model, key)
  _check_shapes(flat, flatten_dict(parameter_shapes(model), sep='/'))
  return unflatten_dict(flat, sep='/')


def adapter(model: Looped, key: Array | None = None) -> dict[str, Array]:
  """First values of the parameters of the model's injection, by their paths; key: as of `retrofit`."""
  state = jnp.zeros((1, 1, model.read_in.width))
  initialise = nn.init(lambda inject: inject(state, state), model.cell.inject)  # its own `init` is a field
  made = initialise(jax.random.key(0) if key is None else key)['params']
  return {f'cell/inject/{path}': leaf for path, leaf in flatten_dict(made, sep='/').items()}


def recurrent(plain: Looped) -> Looped:
  """The model that the paper makes of one whose layers are cut into prelude, loop and coda (section 11 of the sheet on
  Huginn, which read the code): an adapter with PyTorch's first values, and a state that begins as noise of Huginn's
  spread without its scale of embeddings."""
  inject = Concat(init=UniformWithin(1 / math.sqrt(2 * plain.read_in.width)))
  return plain.clone(cell=Recur(plain.cell.core, inject), start=Noise(std=STD))


def _depth(source: Mapping[str, Any]) -> int:
  stray = [path for path in source if path.split('/')[0] in ('prelude', 'coda', 'bridge', 'cell')
           and not path.startswith(SOURCE)]
  if stray:
    raise ConfigError(f'params: {stray[0]!r} is no weight of a plain model; give those of Looped with a Plain cell, '
                      'neither prelude nor coda')
  depths = {leaf.shape[0] for path, leaf in source.items() if path.startswith(SOURCE)}
  if len(depths) != 1:
    raise ConfigError(f'params: {SOURCE!r} has stacks of {sorted(depths)} layers; give the parameters of one stack')
  return depths.pop()


def _check_layers(chosen: Mapping[str, tuple[int, ...]], depth: int):
  for name, layers in chosen.items():
    for layer in layers:
      if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)) or not 0 <= layer < depth:
        raise ConfigError(f'{name} = {layers}: layer {layer!r} is out of range; the source has layers 0 to {depth - 1}')
  for (a, first), (b, second) in itertools.combinations(chosen.items(), 2):
    if shared := sorted(set(first) & set(second)):
      raise ConfigError(f'{a} = {first} and {b} = {second} overlap in layers {shared}; a layer can be in one section')
  for name, layers in chosen.items():
    if len(set(layers)) < len(layers):
      raise ConfigError(f'{name} = {layers}: overlaps itself; name every layer once')


def _check_model(model: Looped, chosen: Mapping[str, tuple[int, ...]]):
  if not isinstance(model.cell, Recur) or not isinstance(model.cell.inject, Concat):
    raise ConfigError('model.cell: must be Recur with the injection Concat')
  stacks = {'prelude': model.prelude, 'core': model.cell.core, 'coda': model.coda}
  for name, stack in stacks.items():
    kind = None if stack is None else getattr(stack.block, 'placement', stack.block)
    if kind not in (None, PreNorm(), PostNorm()):
      raise ConfigError(f'{name}: a stack of {type(kind).__name__}; the layers of a plain decoder fit pre-norm blocks, '
                        'or those of OLMo 2 (PostNorm), alone')
    depth = 0 if stack is None else stack.depth
    if depth != len(chosen[name]):
      raise ConfigError(f'{name} = {chosen[name]}: {len(chosen[name])} layers, but the model has {depth} there; '
                        'name as many as it has')


def _check_shapes(given: Mapping[str, Any], expected: Mapping[str, Any]):
  for path in sorted(set(given) | set(expected)):
    shapes = [list(tree[path].shape) if path in tree else 'no such weight' for tree in (given, expected)]
    if shapes[0] != shapes[1]:
      raise ConfigError(f'{path!r}: {shapes[0]} from the source, {shapes[1]} in the model; all but the number of '
                        'layers and the adapter must be as in the source')
