"""Variable assignment, a primitive of reasoning: what is b, some names later?

After Reasoning with latent thoughts (Saunshi et al., 2502.17416; section 5). At depth 0 names have values,
`a=1,b=2,c=6,b=?2`; at every depth more, as many names again are copies of those before, `a=1,b=2,c=a,d=b,d=?2`.
"""
from __future__ import annotations

from collections.abc import Sequence
import string

import numpy as np

from loopformer.tasks.algorithms import accuracy, most_frequent
from loopformer.tasks.generated import Example, sequence
from loopformer.types import ConfigError, config_dataclass, whole

NAMES, DIGITS = string.ascii_lowercase, string.digits
FIRST_DIGIT = len(NAMES)


@config_dataclass
class Math:
  """`a=1,b=2,b=?2;`"""
  equals, between, before, after, end = '=', ',', (), ('=', '?'), ';'


@config_dataclass
class Code:
  """`a=1;b=2;print(b)#2|`"""
  equals, between, before, after, end = '=', ';', ('print(',), (')', '#'), '|'


@config_dataclass
class Assignment:
  """Problems one after another, every answer being asked for; the last follows `shots` solved ones.

  variables: names of every depth, 0 to `depth`; each of a depth is a copy of another one of the depth before. Names are
  different letters, in any order; values are digits, uniform; the query is any name of the last depth.
  """
  depth: int = 0
  variables: int = 5
  shots: int = 5
  skin: Math | Code = Math()

  def __post_init__(self):
    whole('Assignment.depth', self.depth, 0, why='at depth 0 names have values')
    whole('Assignment.variables', self.variables, 1, why='a query needs a name')
    whole('Assignment.shots', self.shots, 0, why='it is a number of solved problems')
    if self.variables * (self.depth + 1) > len(NAMES):
      raise ConfigError(f'Assignment.variables = {self.variables}, at depth {self.depth}: there are {len(NAMES)} names;'
                        f' set Assignment.variables to at most {len(NAMES) // (self.depth + 1)}')

  @property
  def symbols(self) -> tuple[str, ...]:
    skin = self.skin
    marks = dict.fromkeys((skin.equals, skin.between, *skin.before, *skin.after, skin.end))
    return (*NAMES, *DIGITS, *marks, '<end>')

  @property
  def length(self) -> int:
    """That of all problems, without the last answer and its end."""
    problem = 4 * self.variables * (self.depth + 1) + len(self.skin.before) + len(self.skin.after) + 3
    return (self.shots + 1) * problem - 2

  def __call__(self, rng: np.random.Generator) -> Example:
    place = {symbol: i for i, symbol in enumerate(self.symbols)}
    equals, between, end = (place[mark] for mark in (self.skin.equals, self.skin.between, self.skin.end))
    before, after = ([place[mark] for mark in marks] for marks in (self.skin.before, self.skin.after))
    ids = []
    for _ in range(self.shots + 1):
      names = rng.permutation(len(NAMES))[:self.variables * (self.depth + 1)].reshape(self.depth + 1, self.variables)
      values = FIRST_DIGIT + rng.integers(len(DIGITS), size=self.variables)
      lines = np.empty((self.depth + 1, self.variables, 4), np.int64)
      lines[..., 0], lines[..., 1], lines[..., 3] = names, equals, between
      lines[0, :, 2] = values
      for level in range(1, self.depth + 1):
        order = rng.permutation(self.variables)
        lines[level, :, 2], values = names[level - 1, order], values[order]
      query = rng.integers(self.variables)
      ids += [*lines.ravel(), *before, names[-1, query], *after, values[query], end]
    asked = np.arange(len(ids)) % (len(ids) // (self.shots + 1)) == len(ids) // (self.shots + 1) - 2
    return sequence(ids[:-1], asked[:-1], self.length, len(place) - 1)

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance, of the most frequent answer, of the last value that was given to a name."""
    tokens = np.stack([e['tokens'] for e in examples])
    digit = (tokens >= FIRST_DIGIT) & (tokens < FIRST_DIGIT + len(DIGITS))
    last = np.maximum.accumulate(np.where(digit, np.arange(tokens.shape[1]), 0), axis=1)
    guesses = {'most frequent': most_frequent(examples), 'last value': np.take_along_axis(tokens, last, 1)}
    return {'chance': 1 / len(DIGITS)} | accuracy(examples, guesses)
