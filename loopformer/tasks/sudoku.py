"""Sudoku: whole grids, and grids with clues.

After Beyond Autoregression (Ye et al., 2410.14157) and the sheet of masked diffusion: of 4x4 there are 288 grids, so
that the entropy is log(288) / 16 nats a cell, and whether a grid is valid is seen at once.
"""
from __future__ import annotations

from collections.abc import Sequence
import functools
import math

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.types import ConfigError, config_dataclass, shown, whole

SYMBOLS = '123456789'
START = '.'  # before the first cell, and an unknown one; ends texts, too


@functools.cache
def all_grids(box: int = 2) -> np.ndarray:
  """i32[288, 16]: every valid 4x4 grid, symbols from 0, in lexicographic order. Raises ConfigError for others."""
  if box != 2:
    raise ConfigError(f'box = {box}: the grids of 4x4 alone can be listed; draw those of others')
  found, grid = [], np.full(16, -1)
  groups = _groups(2)

  def fill(cell):
    if cell == 16:
      found.append(grid.copy())
      return
    taken = {grid[other] for group in groups if cell in group for other in group}
    for symbol in set(range(4)) - taken:
      grid[cell] = symbol
      fill(cell + 1)
      grid[cell] = -1

  fill(0)
  return np.array(sorted(map(tuple, found)), np.int32)


@functools.cache
def _groups(box: int) -> tuple[tuple[int, ...], ...]:
  """The cells of every row, column and box."""
  n = box * box
  cells = np.arange(n * n).reshape(n, n)
  boxes = cells.reshape(box, box, box, box).swapaxes(1, 2).reshape(n, n)
  return tuple(tuple(map(int, group)) for table in (cells, cells.T, boxes) for group in table)


def valid(grids: np.ndarray, box: int) -> np.ndarray:
  """bool[N]: whether grids i32[N, box^4] have every symbol, 0 .. box^2 - 1, once in every row, column and box."""
  parts = np.sort(np.asarray(grids)[:, np.array(_groups(box))], -1)
  return (parts == np.arange(box * box)).all((1, 2))


@config_dataclass
class Sudoku:
  """Valid grids of box^2 symbols, cell by cell from left to right and top to bottom.

      tokens   . 1 2 3 4 3 4 ..     targets   1 2 3 4 3 4 1 ..

  Next-token models predict every cell from those before it; denoisers read the targets alone. Grids of 4x4 are uniform
  over all 288; larger ones are a pattern whose symbols, rows, columns, bands and stacks are shuffled.

  holes: least and most cells of a grid that are asked for; the others are clues, of weight 0. None: all are.
  """
  box: int = 2
  holes: tuple[int, int] | None = None

  def __post_init__(self):
    whole('Sudoku.box', self.box, 2, 3, why='grids have box^2 symbols, one character each')
    if self.holes is not None:
      if not isinstance(self.holes, Sequence) or len(self.holes) != 2:
        raise ConfigError(f'Sudoku.holes = {shown(self.holes)}: give the least and the most cells that are asked for, '
                          'such as (4, 8)')
      low, high = self.holes
      whole('Sudoku.holes', low, 1, self.length)
      whole('Sudoku.holes', high, low, self.length)

  @property
  def length(self) -> int:
    """Cells of a grid."""
    return self.box ** 4

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*SYMBOLS[:self.box ** 2], START)

  @property
  def entropy(self) -> float:
    """Nats a cell of whole 4x4 grids, below which no model comes; NaN for others."""
    return math.log(len(all_grids())) / self.length if self.box == 2 and self.holes is None else math.nan

  def grid(self, rng: np.random.Generator) -> np.ndarray:
    """i32[box^4]."""
    if self.box == 2:
      return all_grids()[rng.integers(len(all_grids()))]
    n, box = self.box ** 2, self.box

    def order():  # of rows: bands, and rows within each
      return np.concatenate([band * box + rng.permutation(box) for band in rng.permutation(box)])

    line = np.arange(n)
    pattern = (line[:, None] * box + line[:, None] // box + line) % n
    return rng.permutation(n)[pattern[order()][:, order()]].astype(np.int32).ravel()

  def __call__(self, rng: np.random.Generator) -> Example:
    grid, asked = self.grid(rng), np.ones(self.length)
    if self.holes is not None:
      asked[:] = 0
      asked[rng.permutation(self.length)[:rng.integers(self.holes[0], self.holes[1] + 1)]] = 1
    before = np.concatenate([[self.box ** 2], grid[:-1]]).astype(np.int32)
    return aligned(before, grid, asked)

  def solved(self, answers: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """bool[N]: whether answers i32[N, T] are valid grids that keep the clues of examples' targets."""
    kept = ((answers == targets) | (weights > 0)).all(-1)
    return kept & valid(answers, self.box)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """The entropy of grids, nats a cell, where all can be listed, and that of cells by themselves."""
    single = math.log(self.box ** 2)
    return {'a cell by itself': single} | ({} if math.isnan(self.entropy) else {'entropy of grids': self.entropy})
