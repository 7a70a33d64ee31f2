"""Regression in context: a function is drawn for every prompt, and its values are predicted from earlier examples.

After looped in-context learning (section 5) and AlgoFormer (section 5). Inputs are vectors and
answers are numbers: `symbols` is None. Every generator has a `scale`, the mean square of what is asked for; baselines
are in units of it, and so are measured errors where the task's measure is `Errors(scale=generator.scale)`.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from loopformer.tasks.functions import Linear, Network, Represented, Sparse, Tree
from loopformer.tasks.generated import Example, aligned
from loopformer.tasks.guesses import SHOWN, scores, simple
from loopformer.types import config_dataclass, whole


@config_dataclass
class Regression:
  """Prompts x_1, y_1, .., x_n, y_n of a function drawn for each: y_i is asked for at x_i (section 5).

  tokens f32[2n, D]: x_i ~ N(0, I) at 2i - 2, (y_i, 0, .., 0) at 2i - 1 (i from 1); targets f32[2n]: y_i at the token of
  x_i, else 0; weights: 1 there, else 0; point i32[2n]: number of examples before this token.

  inputs: coordinates of x that are not zero; points: n. For curricula, whose rows keep their shape: width: D, None is
  `inputs`; room: points that a row has place for, None is `points`; what is left over is zero and not asked for.
  Trees, sparse weights and Phi* are drawn over all D coordinates, whatever `inputs` is at the time.
  """
  function: Linear | Sparse | Tree | Network | Represented = Linear()
  inputs: int = 20
  points: int = 41
  width: int | None = None
  room: int | None = None
  symbols = None

  def __post_init__(self):
    whole('Regression.inputs', self.inputs, 1, why='a function needs an input')
    whole('Regression.points', self.points, 1, why='a prompt needs a point')
    if self.width is not None:
      whole('Regression.width', self.width, self.inputs, why=f'inputs = {self.inputs} do not fit')
    if self.room is not None:
      whole('Regression.room', self.room, self.points, why=f'points = {self.points} do not fit')
    whole(f'Regression.{"width" if self.width else "inputs"}', self._width, self.function.least,
          why=f'{self.function} needs more')

  @property
  def _width(self) -> int:
    return self.width or self.inputs

  @property
  def length(self) -> int:
    return 2 * (self.room or self.points)

  @property
  def scale(self) -> float:
    """The mean of y^2 (Linear: without noise)."""
    return self.function.scale(self.inputs, self._width)

  def __call__(self, rng: np.random.Generator) -> Example:
    used = slice(2 * self.points)
    tokens, targets, weights = np.zeros((self.length, self._width), np.float32), *np.zeros((2, self.length), np.float32)
    tokens[used][::2, :self.inputs] = rng.standard_normal((self.points, self.inputs))
    x = tokens[used][::2].astype(np.float64)  # as the model sees it
    function: Any = self.function  # of what it draws, it alone knows the type
    y = function.apply(function.draw(rng, self._width), x)
    y = y + self.function.noise * rng.standard_normal(self.points)
    tokens[used][1::2, 0] = targets[used][::2] = y
    weights[used][::2] = 1
    return {**aligned(tokens, targets, weights), 'point': np.arange(self.length, dtype=np.int32) // 2}

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """In units of `scale`: of zero, of `simple` guesses and of those of one who knows the function's form.

    A mean over all points, and at the last of them. Without an example, all guess zero.
    """
    examples = examples[:SHOWN]
    x = np.stack([e['tokens'][::2] for e in examples])[:, :self.points].astype(np.float64)
    y = np.stack([e['targets'][::2, None] for e in examples])[:, :self.points].astype(np.float64)

    def guesses(k):
      seen = x[:, :k], y[:, :k], x[:, k]
      return {**simple(*seen), **self.function.informed(*seen)} if k else {}

    return scores(guesses, y, self.scale)
