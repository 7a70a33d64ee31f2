"""n-ary addition in decimal, no chain of thought.

After Reasoning with latent thoughts (Saunshi et al., 2502.17416; section 5).
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.algorithms import accuracy, answers, by_place, exact, most_frequent
from loopformer.tasks.generated import Example, sequence
from loopformer.types import ConfigError, config_dataclass, whole

PLUS, EQUALS, END = 10, 11, 12


@config_dataclass
class Addition:
  """`315+120+045+824=1304<end>`, what follows `=` being asked for.

  The number of operands is one of `counts`, any of them alike. Operands are uniform on 0..most and all of the digits of
  `most`, zeros in front; the answer has no zeros in front; the most significant digit comes first.
  """
  counts: tuple[int, ...] = (2, 4, 8, 16, 32)
  most: int = 999
  symbols = (*'0123456789', '+', '=', '<end>')

  def __post_init__(self):
    if not self.counts or min(self.counts) < 1:
      raise ConfigError(f'Addition.counts = {self.counts}: give numbers of operands, each 1 or more')
    whole('Addition.most', self.most, 1, why='it is the largest operand')

  @property
  def length(self) -> int:
    """The longest sequence, without its last token."""
    operands = max(self.counts)
    return operands * (len(str(self.most)) + 1) + len(str(operands * self.most))

  def __call__(self, rng: np.random.Generator) -> Example:
    operands = rng.integers(self.most + 1, size=self.counts[rng.integers(len(self.counts))])
    digits = len(str(self.most))
    terms = np.full((len(operands), digits + 1), PLUS)
    terms[:, :-1] = operands[:, None] // 10**np.arange(digits)[::-1] % 10
    terms[-1, -1] = EQUALS
    answer = [*map(int, str(operands.sum())), END]
    return sequence([*terms.ravel(), *answer], [0] * terms.size + [1] * len(answer), self.length, END)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of the most frequent answers, anywhere and by place, and of the sum to be expected of so many operands."""
    targets, asked = answers(examples)
    expected = np.full_like(targets, END)
    for row, example, first in zip(expected, examples, asked.argmax(1)):
      total = str((np.count_nonzero(example['tokens'] == PLUS) + 1) * self.most // 2)
      row[first:first + len(total)] = [*map(int, total)]
    guesses = {'most frequent': most_frequent(examples), 'by place': by_place(examples), 'expected sum': expected}
    return accuracy(examples, guesses) | exact(examples, guesses)
