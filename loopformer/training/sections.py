"""The layers of a decoder, cut into prelude, loop and coda otherwise than where they come from."""
from __future__ import annotations

from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

from loopformer.types import Array

SECTIONS = ('prelude/block/', 'cell/core/block/', 'coda/block/')  # in the order in which their layers run
EMBEDDING, HEAD = 'read_in/embedding', 'read_out/kernel'


def section_of(path: str) -> str | None:
  """The section that a parameter lies in, None if in none."""
  return next((name for name in SECTIONS if path.startswith(name)), None)


def rows(shapes: Mapping[str, tuple[int, ...]], name: str) -> list[int]:
  """How many layers every section has of the parameter `name` of a layer."""
  return [shapes[section + name][0] if section + name in shapes else 0 for section in SECTIONS]


def moved(given: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
  """Parameters of a layer of which a model has as many as another, shapes by path each, in sections of other sizes:
  {name: sizes of the sections in `own`}."""
  names = {path.removeprefix(section) for path in own if (section := section_of(path))}
  sizes = {name: (rows(given, name), rows(own, name)) for name in names}
  return {name: ours for name, (theirs, ours) in sizes.items()
          if ours != theirs and sum(ours) == sum(theirs) and _shapes(given, name) == _shapes(own, name)}


def _shapes(shapes, name):
  return {shapes[section + name][1:] for section in SECTIONS if section + name in shapes}


def fitted(given: dict[str, Array], own: Mapping[str, Any]) -> dict[str, Array]:
  """The parameters `given`, by path, as far as they are cut otherwise than in `own` (arrays, by path) cut anew, each
  part divided over devices as there. A head of its own begins as the embedding where the other model's is tied to that.
  """
  given = dict(given)
  for name, sizes in moved(*({path: leaf.shape for path, leaf in tree.items()} for tree in (given, own))).items():
    held = [given.pop(section + name) for section in SECTIONS if section + name in given]
    start = 0
    for section, size in zip(SECTIONS, sizes):
      if size:
        given[section + name] = _placed(lambda *held, at=slice(start, start + size): jnp.concatenate(held)[at],
                                        own[section + name])(*held)
      start += size
  head = own.get(HEAD)
  if head is not None and HEAD not in given and EMBEDDING in given and given[EMBEDDING].shape == head.shape:
    given[HEAD] = _placed(jnp.copy, head)(given[EMBEDDING])
  return given


def _placed(function: Callable, like: Array):
  return jax.jit(function, out_shardings=like.sharding)
