"""Where a pretrained decoder is cut into prelude, loop and coda: by hand, or by how much its layers turn the state."""
from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loopformer.cells.plain import Plain
from loopformer.model import Looped
from loopformer.nn.stack import Stack
from loopformer.training.sections import SECTIONS
from loopformer.types import Array, Batch, ConfigError, Context, Params


def layers(name: str, text: str, depth: int) -> range:
  """The layers that '0..1', '13..' (to the last), '27' or 'none' names, of `depth`, from 0; both ends belong to it.

  Raises:
    ConfigError: it is none of these, runs backwards, or names a layer that is not there.
  """
  if text == 'none':
    return range(0)
  found = re.fullmatch(r'(\d{1,9})(?:(\.\.)(\d{1,9})?)?', text)
  if not found:
    raise ConfigError(f'{name} = {text!r}: give the first and the last layer, such as 0..1, or 13.. or none')
  first = int(found[1])
  last = int(found[3]) if found[3] else depth - 1 if found[2] else first
  if not first <= last < depth:
    raise ConfigError(f'{name} = {text!r}: the model has layers 0 to {depth - 1}; name some of them, '
                      'the lower one first')
  return range(first, last + 1)


def sections(depth: int, encoder: str, decoder: str, loop: str | None = None) -> tuple[int, int]:
  """(layers of the prelude, layers of the coda) of sections that are named as of `layers`; loop: None for what is
  between.

  Raises:
    ConfigError: the loop is empty, two sections overlap, or a layer is in none of them.
  """
  names = {'encoder': encoder, 'decoder': decoder} | ({} if loop is None else {'loop': loop})
  cut = {name: layers(name, text, depth) for name, text in names.items()}
  cut.setdefault('loop', range(cut['encoder'].stop, cut['decoder'].start if cut['decoder'] else depth))
  shown = ', '.join(f'{name} = {text}' for name, text in names.items())
  taken = [layer for name in ('encoder', 'loop', 'decoder') for layer in cut[name]]
  for layer in range(depth):
    if taken.count(layer) != 1 or taken[layer] != layer:
      fault = ('is in two sections' if taken.count(layer) > 1 else 'is in no section' if layer not in taken else
               'does not come in order')
      raise ConfigError(f'{shown}: layer {layer} {fault}; encoder, loop and decoder follow each other and share out '
                        f'the layers 0 to {depth - 1}')
  if not cut['loop']:
    raise ConfigError(f'{shown}: the loop is empty; give it a layer at least')
  return len(cut['encoder']), len(cut['decoder'])


def profile(model: Looped, params: Params, batch: Batch) -> np.ndarray:
  """f64[N]: how far each layer turns the state, 1 - cos(before, after), a mean over the tokens that weigh.

  Args:
    model: a decoder whose cell is Plain: it may be cut into sections of one kind of layer, which run once.
    batch: tokens and weights, positions and segments if it has them.

  Raises:
    ConfigError: a cell of another kind, or layers of several kinds.
  """
  stacks = list(model.stacks().values())
  if not isinstance(model.cell, Plain) or any(
      stack.clone(depth=1) != stacks[0].clone(depth=1) or stack.applications != stack.depth for stack in stacks):
    raise ConfigError('model: layers are compared in a decoder whose layers are all of one kind, and run once; give '
                      'the decoder that a loop is made of')
  single = model.clone(cell=Plain(Stack(stacks[0].block, 1)), prelude=None, coda=None, bridge=None, loops=1)
  held = [params['prelude']['block'] if name == SECTIONS[0] else params['cell']['core']['block'] if name == SECTIONS[1]
          else params['coda']['block'] for name, there in zip(SECTIONS, (model.prelude, model.cell, model.coda))
          if there is not None]
  tokens = jnp.asarray(batch['tokens'])
  pos = batch.get('positions')
  ctx = Context(pos=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if pos is None else jnp.asarray(pos),
                seg=batch.get('segments'), tokens=tokens)
  x = single.apply({'params': {'read_in': params['read_in']}}, tokens, ctx.pos,
                   method=lambda model, *given: model.read_in(*given))
  turned = []
  for stack in held:
    for number in range(jax.tree.leaves(stack)[0].shape[0]):
      layer = jax.tree.map(lambda leaf: leaf[number:number + 1], stack)
      new = _layer(single, {'cell': {'core': {'block': layer}}}, x, ctx)
      turned.append(float(_turned(x, new, jnp.asarray(batch['weights']))))
      x = new
  return np.array(turned)


@functools.partial(jax.jit, static_argnums=0)
def _layer(single: Looped, params: Params, x: Array, ctx: Context) -> Array:
  new: Any = single.apply({'params': params}, x, ctx,
                          method=lambda model, x, ctx: model.cell.core(x, ctx, None, None)[0])
  return new


@jax.jit
def _turned(x: Array, new: Array, weights: Array) -> Array:
  x, new = x.astype(jnp.float32), new.astype(jnp.float32)
  cosine = (x * new).sum(-1) / jnp.maximum(jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(new, axis=-1), 1e-30)
  return ((1 - cosine) * weights).sum() / jnp.maximum(weights.sum(), 1)


def split(turned: Any) -> tuple[int, int]:
  """(layers of the prelude, layers of the coda) by a profile: the layers at either end that turn the state by more than
  m + 3 s, one at least at each end; m and s are the median, and the median distance from it, of the middle half.

  The paper puts the boundaries where the profile changes most, and gives no rule; this one is ours.

  Raises:
    ConfigError: fewer than three layers.
  """
  turned = np.asarray(turned)
  depth = len(turned)
  if depth < 3:
    raise ConfigError(f'turned: a profile of {depth} layers; prelude, loop and coda need three at least')
  middle = turned[depth // 4:depth - depth // 4]
  median = np.median(middle)
  large = turned > median + 3 * np.median(np.abs(middle - median))
  return max(1, int(np.argmin(large))), max(1, int(np.argmin(large[::-1])))


def cut(model: Looped, prelude: int, coda: int) -> Looped:
  """The same decoder, described as prelude, loop and coda; `train.start` cuts the parameters (training/sections.py).

  Raises:
    ConfigError: no layer is left for the loop.
  """
  stacks = list(model.stacks().values())
  depth = sum(stack.depth for stack in stacks)
  if prelude + coda >= depth:
    raise ConfigError(f'prelude = {prelude}, coda = {coda}: the model has {depth} layers, and none is left '
                      'for the loop')

  def part(count):
    return stacks[0].clone(depth=count) if count else None

  return model.clone(prelude=part(prelude), cell=model.cell.clone(core=part(depth - prelude - coda)), coda=part(coda))
