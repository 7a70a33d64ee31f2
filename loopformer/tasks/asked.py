"""Problems that are asked for their answers alone, at their last token or after thoughts that are no tokens.

After To CoT or To Loop (Xu and Sato, 2505.19245 and 2509.25239): loops and continuous thoughts.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from loopformer.tasks.generated import Example, aligned
from loopformer.tasks.reasoning import Problem, Shown
from loopformer.types import ConfigError, config_dataclass, whole


@config_dataclass
class Asked(Shown):
  """The problem, and as many places of padding as there are thoughts; the answer is asked for at the last of them.

      tokens     3 * 2 + 1 = . .      thoughts = 2
      targets                  7

  What lies right of that is padding too, a segment of its own that nothing reads. length: tokens of a row, what the
  source's largest problem needs by default. Besides, examples have size i32[], that of the problem.
  """
  of: Any
  thoughts: int = 0
  length: int | None = None

  def __post_init__(self):
    whole('Asked.thoughts', self.thoughts, 0)
    if self.length is None:
      object.__setattr__(self, 'length', self.of.extent.prompt + self.thoughts)

  def example(self, problem: Problem) -> Example:
    """Of a problem. Raises ConfigError where it is longer than a row."""
    count = len(problem.prompt) + self.thoughts
    if count > self.length:
      raise ConfigError(f'Asked.length = {self.length}: a problem of size {problem.size} has {count} tokens with its '
                        'thoughts; raise Asked.length, or take smaller problems')
    tokens, targets = np.full((2, self.length), self.pad, np.int32)
    weights = np.zeros(self.length, np.float32)
    tokens[:len(problem.prompt)] = self.ids(problem.prompt)
    targets[count - 1], weights[count - 1] = self.ids([problem.answer])[0], self.of.weight(problem.task)
    return {**aligned(tokens, targets, weights), 'segments': (np.arange(self.length) < count).astype(np.int32),
            'size': np.array(problem.size, np.int32)}
