"""Whether a path leads from one vertex of a random graph to another, with the search that finds out.

    0 2 | 1 3 | 2 3 | ? 0 1        rounds N 0   0 2 0 N   2 0 2 3 2 N   3 1        the answer TRUE

After To CoT or To Loop (Xu and Sato, 2505.19245 and 2509.25239, experiments). The graph is undirected, G(n, p) with
p = degree / n; with 1.7, about half of all pairs are connected where n is large: as many as lie in the giant component.
"""
from __future__ import annotations

import collections
from collections.abc import Sequence
import dataclasses
import functools
import math

import numpy as np

from loopformer.tasks.reasoning import Extent, Problem, Round, Sized
from loopformer.types import ConfigError, config_dataclass, real

BAR, ASKED, NEXT = '|', '?', 'N'
CONNECTED, APART = 'TRUE', 'FALSE'
RARE = 5  # standard deviations: graphs with so many edges more than the mean are drawn anew

Edge = tuple[int, int]


@config_dataclass
class Reachable(Sized):
  """Is t reachable from s != t, both uniform? Size: the vertices. Prompts are edges `u v |`, u < v, in order, then ? s
  t.

  The rounds are those of a breadth-first search: `N s`; then of every vertex u that it expands all edges `u v`, v
  rising, and `u N`. It ends as soon as it meets t, so that its last token is t if and only if t is reachable. (That of
  edges to vertices which have been met before are told too, and that neighbours come in rising order, is inferred.)

  degree: n p. Graphs with more edges than rows have place for, 5 standard deviations above the mean, are drawn anew.
  """
  shortest: int = 2
  degree: float = 1.7
  least = 2

  def __post_init__(self):
    Sized.__post_init__(self)
    real('Reachable.degree', self.degree, '(0, inf)')
    if self.degree > self.shortest:
      raise ConfigError(f'Reachable.degree = {self.degree}: edges of {self.shortest} vertices would have the '
                        f'probability {self.degree / self.shortest:.3g}; set degree to {self.shortest} at most, '
                        'or raise shortest')

  @property
  def vertices(self) -> tuple[str, ...]:
    """Of the largest graph."""
    return tuple(map(str, range(self.limit)))

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.vertices, BAR, ASKED, NEXT, CONNECTED, APART)

  @property
  def extent(self) -> Extent:
    edges = _most_edges(self.room, self.degree)
    return Extent(prompt=3 * edges + 3, round=2 * self.room, rounds=self.room + 1,
                  chain=4 * edges + 2 * self.room + 2)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    n, most = self.checked(size, task), _most_edges(size, self.degree)
    edges = None
    while edges is None or len(edges) > most:
      edges = [(u, v) for u in range(n) for v in range(u + 1, n) if rng.random() < self.degree / n]
    start, end = rng.choice(n, 2, replace=False).tolist()
    return self.solved(edges, start, end, size)

  def solved(self, edges: Sequence[Edge], start: int, end: int, size: int) -> Problem:
    """The problem of a graph. Raises ConfigError where start and end are one vertex, or the graph is none."""
    if start == end:
      raise ConfigError(f'start = end = {start}: a vertex is reachable from itself; ask for two different ones')
    outside = [vertex for vertex in (start, end, *sum(map(tuple, edges), ())) if not 0 <= vertex < size]
    if outside or any(u >= v for u, v in edges):
      raise ConfigError(f'edges = {list(edges)}, start = {start}, end = {end}: give vertices 0..{size - 1}, and '
                        'edges (u, v) with u < v')
    rounds, met = search(edges, start, end)
    return Problem(prompt=self.prompt(edges, start, end, size), rounds=rounds, answer=CONNECTED if met else APART,
                   size=size)

  def prompt(self, edges: Sequence[Edge], start: int, end: int, size: int) -> Round:
    """How a problem is written."""
    return (*(word for u, v in edges for word in (str(u), str(v), BAR)), ASKED, str(start), str(end))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """Whether the search ended at a vertex, or with nothing left to expand."""
    last = rounds[-1][-1] if rounds and rounds[-1] else ''
    return APART if last == NEXT else CONNECTED if last.isdigit() else None


@config_dataclass
class ReachableByEdges(Reachable):
  """As Reachable, written for loops: a token a vertex, a token `u,v` an edge, and `s,t` for the question, at the end,
  where the answer is read (the paper has it first; a loop that reads both ways has no order). No rounds."""

  @property
  def symbols(self) -> tuple[str, ...]:
    pairs = (f'{u},{v}' for u in self.vertices for v in self.vertices if u != v)
    return (*self.vertices, *pairs, CONNECTED, APART)

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room + _most_edges(self.room, self.degree) + 1, round=0, rounds=0, chain=0)

  def solved(self, edges: Sequence[Edge], start: int, end: int, size: int) -> Problem:
    return dataclasses.replace(super().solved(edges, start, end, size), rounds=())

  def prompt(self, edges: Sequence[Edge], start: int, end: int, size: int) -> Round:
    """How a problem is written."""
    return (*self.vertices[:size], *(f'{u},{v}' for u, v in edges), f'{start},{end}')

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """None: there are no rounds."""
    return None


def search(edges: Sequence[Edge], start: int, end: int) -> tuple[tuple[Round, ...], bool]:
  """The rounds of a breadth-first search, and whether it has met the end."""
  neighbours = collections.defaultdict(list)
  for u, v in edges:
    neighbours[u].append(v)
    neighbours[v].append(u)
  rounds: list[Round] = [(NEXT, str(start))]
  waiting, met = collections.deque([start]), {start}
  while waiting:
    vertex, told = waiting.popleft(), []
    for other in sorted(neighbours[vertex]):
      told += [str(vertex), str(other)]
      if other == end:
        return (*rounds, tuple(told)), True
      if other not in met:
        met.add(other)
        waiting.append(other)
    rounds.append((*told, str(vertex), NEXT))
  return tuple(rounds), False


@functools.cache
def _most_edges(size: int, degree: float) -> int:
  """Of a graph of so many vertices, by the rows that there are."""
  pairs, share = size * (size - 1) // 2, min(degree / size, 1.0)
  return min(pairs, math.ceil(pairs * share + RARE * math.sqrt(pairs * share * (1 - share))))
