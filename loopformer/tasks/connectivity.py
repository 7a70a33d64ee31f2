"""Is there a path from one vertex of a graph to another?

    0 1 0 1 0 0 0 0 0 s0 t2          the adjacency matrix row by row, from which vertex, to which: -, there is none

After A Little Depth Goes a Long Way (Merrill and Sabharwal, 2503.03961, theorem 2), with two tokens for the question in
the place of unary ones. With fillers (fillers.py) log-depth loops can do it.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.reasoning import Even, Extent, Problem, Proportional, Round, Sized
from loopformer.types import ConfigError, config_dataclass, real, whole

YES, NO = '+', '-'
TRIES = 10_000  # graphs


def distances(adjacency: np.ndarray) -> np.ndarray:
  """i64[n, n]: edges of the shortest path from i to j, of a matrix of 0 and 1, [n, n]; -1 where there is none."""
  edges, seen = adjacency.astype(bool), np.eye(len(adjacency), dtype=bool)
  found = np.where(seen, 0, -1)
  for steps in range(1, len(adjacency)):
    seen = seen | (seen.astype(np.int64) @ edges > 0)
    found[seen & (found < 0)] = steps
  return found


@config_dataclass
class Connectivity(Sized):
  """Random graphs, an edge with probability edges / n, and two of their vertices. Size: the vertices n.

  distance: None, and half of the problems have a path, of whatever length pairs of these graphs have; 0, none has; or
  that of all pairs. directed: whether edges lead one way.
  """
  edges: float = 1.7
  distance: int | None = None
  directed: bool = False
  sizes: Even | Proportional = Even()
  least = 2

  def __post_init__(self):
    Sized.__post_init__(self)
    real('Connectivity.edges', self.edges, '(0, inf)')
    if self.distance is not None:
      whole('Connectivity.distance', self.distance, 0, self.shortest - 1,
            why='a path has fewer edges than the graph has vertices')

  @property
  def symbols(self) -> tuple[str, ...]:
    return ('0', '1', *(f'{end}{vertex}' for end in 'st' for vertex in range(self.limit)), YES, NO)

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room ** 2 + 2, round=0, rounds=0, chain=0)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    """Raises ConfigError where no graph that was tried has such a pair."""
    n = self.checked(size, task)
    joined = rng.random() < 0.5 if self.distance is None else self.distance > 0
    for _ in range(TRIES):
      edges = rng.random((n, n)) < self.edges / n
      edges = edges & ~np.eye(n, dtype=bool) if self.directed else np.triu(edges, 1) | np.triu(edges, 1).T
      found = distances(edges)
      pairs = np.argwhere(found < 0 if not joined else found == self.distance if self.distance else found > 0)
      if len(pairs):
        return self.solved(edges, *pairs[rng.integers(len(pairs))])
    raise ConfigError(f'Connectivity.edges = {self.edges}: none of {TRIES} graphs of {n} vertices has a pair of '
                      f'vertices {f"at distance {self.distance or 1}" if joined else "without a path"}; give another '
                      'number of edges, or a distance that is more common')

  def solved(self, adjacency: np.ndarray, start: int, end: int) -> Problem:
    """The problem of a graph, 0 or 1 of [n, n], and two vertices. Raises ConfigError where it is no such matrix, or
    the two are one, or none of the graph's."""
    adjacency = np.asarray(adjacency)
    if adjacency.ndim != 2 or len(adjacency) != adjacency.shape[1] or not np.isin(adjacency, (0, 1)).all():
      raise ConfigError(f'adjacency: its shape is {adjacency.shape}; give a matrix [n, n] of 0 and 1')
    if start == end or not {start, end} <= set(range(len(adjacency))):
      raise ConfigError(f'start = {start}, end = {end}: give two different vertices of 0..{len(adjacency) - 1}')
    cells = (str(int(edge)) for edge in np.reshape(adjacency, -1))
    answer = YES if distances(adjacency)[start, end] >= 0 else NO
    return Problem(prompt=(*cells, f's{start}', f't{end}'), rounds=(), answer=answer, size=len(adjacency))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """Nothing: it has no rounds."""
    return None
