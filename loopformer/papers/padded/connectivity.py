"""Which vertices of a directed graph lead to which: a looped model of constructed weights (2503.03961, theorem 2).

Tokens are the n^2 cells of the adjacency matrix, row by row, and n^3 fillers. Where the paper computes coordinates in
17 layers, a table of positions holds them here: a cell has (i, j), a filler (i, k, j). A layer before the loop makes

    B(i, j) = an edge from i to j, or i = j           at cells

and every loop, of two layers, squares it:

    C(i, k, j) = B(i, k) and B(k, j)                  at fillers, from the two cells
    B(i, j) = C(i, k, j) for some k                   at cells, from the mean of n fillers

So L loops find all paths of up to 2^L edges, and ceil(log2 n) loops all there are. Attention is averaging-hard and
reads all tokens; there are no norms.
"""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loopformer.cells.plain import Plain
from loopformer.model import Looped, parameter_shapes
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.layers import MLP, Identity
from loopformer.nn.stack import Stack
from loopformer.papers.padded.attention import AveragingHard
from loopformer.plans import LogDepth
from loopformer.types import Array, Batch, Params, whole

NO_EDGE, EDGE, FILLER = 0, 1, 2  # tokens
UNITS, HEADS = 4, 2
FAR = 3.0  # beyond what the match of two coordinates adds to a score


class _State:
  """Where a state holds what: coordinates (one-hot), flags of cells and fillers, B and C, and what heads read."""

  def __init__(self, n: int):
    self.i, self.k, self.j = (slice(start, start + n) for start in (0, n, 2 * n))
    self.cell, self.filler, self.b, self.c, self.first, self.second, self.mean = range(3 * n, 3 * n + 7)
    self.width = 3 * n + 7


def model(vertices: int) -> Looped:
  """The model for graphs of so many vertices; ConfigError where it is no whole number, 1 or more."""
  n = whole('vertices', vertices, 1, 64, why='there are n^3 fillers')
  kernel: Any = AveragingHard(masked=False)  # none of those that SelfAttention can be trained with
  attn = SelfAttention(heads=HEADS, head=2 * n + 1, kernel=kernel)
  block = Block(attn=attn, mlp=MLP(hidden=UNITS, activation=jax.nn.relu), norm=Identity())
  width = _State(n).width
  return Looped(read_in=TokenEmbed(vocab=3, width=width, length=n ** 2 + n ** 3), cell=Plain(Stack(block, 2)),
                read_out=Head(outputs=2, norm=Identity()), prelude=Stack(block, 1), loops=plan(n).longest)


def plan(vertices: int) -> LogDepth:
  """As many loops as suffice: ceil(log2 n)."""
  return LogDepth(size=vertices, rows=vertices ** 2 + vertices ** 3)


def batch(adjacency: np.ndarray) -> Batch:
  """Graphs by their matrices, 0 or 1 of [B, n, n]: tokens i32[B, n^2 + n^3], size i32[B]."""
  count, n, _ = adjacency.shape
  fillers = np.full((count, n ** 3), FILLER)
  tokens = np.concatenate([np.where(np.reshape(adjacency, (count, -1)), EDGE, NO_EDGE), fillers], 1)
  return {'tokens': jnp.asarray(tokens, jnp.int32), 'size': jnp.full(count, n, jnp.int32)}


def reached(logits: Array) -> np.ndarray:
  """bool[B, n, n], whether j is reached from i, from the model's answers f32[B, n^2 + n^3, 2]."""
  count, length, _ = logits.shape
  n = next(n for n in range(1, length + 1) if n ** 2 + n ** 3 == length)
  return np.asarray(logits[:, :n * n].argmax(-1) == 1).reshape(count, n, n)


def weights(vertices: int) -> Params:
  """The constructed parameters of `model(vertices)`."""
  n, at = vertices, _State(vertices)
  head, either = 2 * n + 1, {at.cell: 1.0, at.filler: 1.0}
  one, two, own = slice(0, n), slice(n, 2 * n), 2 * n  # parts of a head: two coordinates, and the kind of token

  def matrix(*entries):
    """[D, d] of (place in the state, place in the head, value); equal slices by the identity."""
    made = np.zeros((at.width, head))
    for source, target, value in entries:
      made[source, target] = value * (np.eye(n) if isinstance(source, slice) else 1.0)
    return made

  def asked(first, second):
    return matrix((first, one, 1.0), (second, two, 1.0), *((flag, own, 1.0) for flag in either))

  def told(first, second, kind):
    return matrix((first, one, 1.0), (second, two, 1.0), (kind, own, FAR))

  def attention(heads):
    """heads: (query, key, where its value comes from, where it goes to) each."""
    qkv, out = np.zeros((at.width, HEADS, 3, head)), np.zeros((HEADS, head, at.width))
    for number, (query, key, source, target) in enumerate(heads):
      qkv[:, number] = np.stack([query, key, matrix((source, 0, 1.0))], 1)
      out[number, 0, target] = 1.0
    return {'qkv': {'kernel': qkv.reshape(at.width, -1)}, 'out': {'kernel': out.reshape(-1, at.width)}}

  def mlp(*units):
    """units: ({place: weight} in, {place: weight} out) each, a relu between them."""
    up, down = np.zeros((at.width, UNITS)), np.zeros((UNITS, at.width))
    for number, (reads, writes) in enumerate(units):
      for place, value in reads.items():
        up[place, number] = value
      for place, value in writes.items():
        down[number, place] = value
    return {'up': {'kernel': up}, 'down': {'kernel': down}}

  def stacked(*layers):
    return {'block': jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), jnp.float32), *layers)}

  def cleared(place):
    return {place: 1.0}, {place: -1.0}

  def above(place, threshold, at_kind, other):
    """relu(place - threshold), 0 at tokens of the other kind."""
    return {place: 1.0, at_kind: -threshold, other: -threshold - FAR}

  # An edge from a vertex to itself adds up to 2 with the diagonal.
  start = {'attn': attention(()), 'mlp': mlp((above(at.b, 1.0, at.cell, at.filler), {at.b: -1.0}))}
  both = {'attn': attention([(asked(at.i, at.k), told(at.i, at.j, at.cell), at.b, at.first),
                             (asked(at.k, at.j), told(at.i, at.j, at.cell), at.b, at.second)]),
          'mlp': mlp(({**above(at.first, 1.0, at.filler, at.cell), at.second: 1.0}, {at.c: 1.0}), cleared(at.c),
                     cleared(at.first), cleared(at.second))}
  some = {'attn': attention([(asked(at.i, at.j), told(at.i, at.j, at.filler), at.c, at.mean)]),
          'mlp': mlp((above(at.mean, 0.5 / n, at.cell, at.filler), {at.b: 2.0 * n}),
                     (above(at.mean, 1.0 / n, at.cell, at.filler), {at.b: -2.0 * n}), cleared(at.b), cleared(at.mean))}
  table = np.zeros((2, at.width))  # the second answer where B is above a half
  table[1, [at.b, at.cell]] = 1.0, -0.5
  embedding, positions = np.zeros((3, at.width)), np.zeros((n ** 2 + n ** 3, at.width))
  embedding[EDGE, at.b] = 1.0
  for place, (i, j) in enumerate(np.ndindex(n, n)):
    positions[place, [at.i.start + i, at.j.start + j, at.cell]] = 1.0
    positions[place, at.b] = i == j
  for place, (i, k, j) in enumerate(np.ndindex(n, n, n), n * n):
    positions[place, [at.i.start + i, at.k.start + k, at.j.start + j, at.filler]] = 1.0
  made = {'read_in': {'embedding': embedding, 'positions': positions}, 'prelude': stacked(start),
          'cell': {'core': stacked(both, some)}, 'read_out': {'kernel': table}}
  like = parameter_shapes(model(n))
  return jax.tree.map(lambda shape, leaf: jnp.asarray(leaf, jnp.float32).reshape(shape.shape), like, made)
