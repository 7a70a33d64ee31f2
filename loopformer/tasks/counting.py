"""Counting and sampling, which chains that draw at random can do step by step: satisfying assignments of a formula, and
proper colourings of a graph.

    Trials      a formula in disjunctive normal form, and one trial of Karp and Luby's estimate of its count
    Count       the same formulas, and their counts as one of 2^n + 1 symbols: what a loop is asked for
    Colouring   a graph, the steps of a Glauber chain on its colourings, and where the chain ends

After To CoT or To Loop (Xu and Sato, 2505.19245 and 2509.25239, experiments). Chains are drawn anew whenever a problem
is: their rounds are samples, no function of the prompt. Estimates of counts are float64.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
import functools
import itertools
import math

import numpy as np

from loopformer.tasks.reasoning import Extent, Problem, Round, Sized
from loopformer.types import ConfigError, config_dataclass, shown, whole

SEP = '<sep>'
SUCCESS, FAILURE = 'Success', 'Failure'
ACCEPTED, REFUSED = 'accept', 'refuse'
MOST_VARIABLES, MOST_COLOURINGS = 16, 2 ** 20  # assignments and colourings are listed

Formula = np.ndarray  # i64[m, w]: v for variable v, -v for its negation, v from 1; clauses are ors of ands


# Formulas ------------------------------------------------------------------------------------------------------------


def assignments(variables: int) -> np.ndarray:
  """bool[2^n, n]: all of them. Raises ConfigError where there are too many."""
  whole('variables', variables, 1, MOST_VARIABLES, why='their assignments are counted one by one')
  return (np.arange(2 ** variables)[:, None] >> np.arange(variables) & 1).astype(bool)


def satisfied(formula: Formula, values: np.ndarray) -> np.ndarray:
  """bool[A, m]: which clauses the assignments bool[A, n] satisfy. Raises ConfigError where the formula has no clause,
  or one without a literal, or with one of a variable that there is not."""
  try:
    formula = np.asarray(formula)
  except ValueError:
    raise ConfigError(f'formula = {formula}: its clauses have different lengths; give all as many literals') from None
  if formula.ndim != 2 or not formula.size:
    raise ConfigError(f'formula = {formula.tolist()}: it is empty; give one or more clauses, each of one or '
                      'more literals')
  if not np.issubdtype(formula.dtype, np.integer) or (formula == 0).any() or np.abs(formula).max() > values.shape[1]:
    raise ConfigError(f'formula = {formula.tolist()}: literals are 1..{values.shape[1]}, negated with a minus')
  return (values[:, np.abs(formula) - 1] == (formula > 0)).all(-1)


def cover(formula: Formula, variables: int) -> np.ndarray:
  """i64[2^n]: by how many clauses every assignment is satisfied."""
  return satisfied(formula, assignments(variables)).sum(1)


def checked(formula: Formula, variables: int) -> Formula:
  """The formula as an array. Raises ConfigError as `satisfied`, and where a clause has a variable twice, of which an
  assignment cannot be drawn, or is counted for too little."""
  satisfied(formula, assignments(variables)[:1])
  formula = np.asarray(formula)
  named = np.sort(np.abs(formula), 1)
  twice = (named[:, 1:] == named[:, :-1]).any(1)
  if twice.any():
    raise ConfigError(f'formula: its clause {formula[twice.argmax()].tolist()} has a variable twice; give clauses of '
                      'different variables')
  return formula


def count(formula: Formula, variables: int) -> int:
  """Assignments that satisfy the formula, by trying all."""
  return int((cover(formula, variables) > 0).sum())


def drawn(rng: np.random.Generator, variables: int, formula: Formula) -> tuple[int, np.ndarray]:
  """A clause and an assignment bool[n] that satisfies it, both uniform: so an assignment comes as often as the number
  of clauses that it satisfies says."""
  clause = int(rng.integers(len(formula)))
  values = rng.random(variables) < 0.5
  values[np.abs(formula[clause]) - 1] = formula[clause] > 0
  return clause, values


def estimate(formula: Formula, variables: int, draws: int, successes: int) -> float:
  """2^(n - w) draws / successes: of trials that were made as `self_adjusting` says, the count; infinite without
  success.

  draws: of second clauses. A trial takes |D| / 2^(n - w) of them in the mean, D being the assignments that satisfy
  the formula.
  """
  return 2.0 ** (variables - formula.shape[1]) * draws / successes if successes else np.inf


def self_adjusting(rng: np.random.Generator, formula: Formula, variables: int, draws: int) -> float:
  """The count, as Karp, Luby and Madras estimate it: an assignment is kept until a second clause, uniform, is one that
  it satisfies."""
  successes, values, formula = 0, None, checked(formula, variables)
  whole('draws', draws, 1)
  for _ in range(draws):
    if values is None:
      values = drawn(rng, variables, formula)[1]
    if satisfied(formula[[rng.integers(len(formula))]], values[None])[0, 0]:
      successes, values = successes + 1, None
  return estimate(formula, variables, draws, successes)


def resampling(rng: np.random.Generator, formula: Formula, variables: int, draws: int) -> float:
  """The estimate of the paper's published code: a new assignment with every second clause. It does not tend to the
  count but to `resampling_limit`."""
  successes, formula = 0, checked(formula, variables)
  whole('draws', draws, 1)
  for _ in range(draws):
    values = drawn(rng, variables, formula)[1]
    successes += int(satisfied(formula[[rng.integers(len(formula))]], values[None])[0, 0])
  return estimate(formula, variables, draws, successes)


def resampling_limit(formula: Formula, variables: int) -> float:
  """(sum_a c(a))^2 / sum_a c(a)^2, c(a) being the number of clauses that assignment a satisfies."""
  c = cover(formula, variables).astype(np.float64)
  return float(c.sum() ** 2 / (c * c).sum())


@config_dataclass
class Trials(Sized):
  """Formulas of `variables` variables whose clauses have `width` literals, signs fair; one trial a problem. Size:
  clauses.

      1 -2 3 | -1 2 4 | <sep>     rounds: c0 <sep>, the clause that is drawn; +1 -2 +3 -4 <sep>, an assignment that
                                  satisfies it; c1 <sep>, a second clause      the answer Success or Failure

  A model that has learned the trials makes any estimate of them: continued from after its assignment until it writes
  Success, that of `self_adjusting`.
  """
  variables: int = 5
  width: int = 3

  def __post_init__(self):
    Sized.__post_init__(self)
    name = type(self).__name__
    whole(f'{name}.variables', self.variables, 1, MOST_VARIABLES, why='their assignments are counted one by one')
    whole(f'{name}.width', self.width, 1, self.variables, why='a clause has so many different variables')

  @property
  def literals(self) -> tuple[str, ...]:
    return tuple(sign + str(v) for v in range(1, self.variables + 1) for sign in ('+', '-'))

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.literals, *(f'c{j}' for j in range(self.limit)), '|', SEP, SUCCESS, FAILURE)

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room * (self.width + 1) + 1, round=max(self.variables + 1, 2), rounds=3,
                  chain=self.variables + 5)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    return self.solved(rng, self.formula(rng, self.checked(size, task)))

  def formula(self, rng: np.random.Generator, clauses: int) -> Formula:
    """A random one."""
    picked = np.argsort(rng.random((clauses, self.variables)))[:, :self.width] + 1
    return picked * np.where(rng.random(picked.shape) < 0.5, -1, 1)

  def written(self, formula: Formula) -> Round:
    """How a formula is written. Raises ConfigError where it is empty, has variables that there are not, or one twice in
    a clause."""
    formula = checked(formula, self.variables)
    return (*(word for clause in formula for word in (*map(_literal, clause), '|')), SEP)

  def solved(self, rng: np.random.Generator, formula: Formula) -> Problem:
    """The problem of a formula, with one trial."""
    prompt, (first, values) = self.written(formula), drawn(rng, self.variables, formula)
    second = int(rng.integers(len(formula)))
    success = satisfied(formula[[second]], values[None])[0, 0]
    told = tuple(_literal(v if value else -v) for v, value in enumerate(values, 1))
    return Problem(prompt=prompt, rounds=((f'c{first}', SEP), (*told, SEP), (f'c{second}', SEP)),
                   answer=SUCCESS if success else FAILURE, size=len(formula))

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """None: the answer depends on the formula too."""
    return None


@config_dataclass
class Count(Trials):
  """The same formulas, asked for their counts, 0..2^variables, without rounds."""

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*self.literals, '|', SEP, *map(str, range(2 ** self.variables + 1)))

  @property
  def extent(self) -> Extent:
    return Extent(prompt=self.room * (self.width + 1) + 1, round=0, rounds=0, chain=0)

  def solved(self, rng: np.random.Generator, formula: Formula) -> Problem:
    """The problem of a formula; nothing is drawn."""
    return Problem(prompt=self.written(formula), rounds=(), answer=str(count(formula, self.variables)),
                   size=len(formula))


def _literal(literal: int) -> str:
  return f'{literal:+d}'


# Colourings ----------------------------------------------------------------------------------------------------------

TRIANGLE = ((0, 1), (0, 2), (1, 2))


def proper(edges: Iterable[tuple[int, int]], colours: Sequence[int]) -> bool:
  """Whether no edge has ends of one colour."""
  return all(colours[u] != colours[v] for u, v in edges)


@functools.cache
def colourings(edges: tuple[tuple[int, int], ...], vertices: int, colours: int) -> tuple[tuple[int, ...], ...]:
  """All that are proper."""
  return tuple(each for each in itertools.product(range(colours), repeat=vertices) if proper(edges, each))


def total_variation(drawn: Iterable[tuple[int, ...] | None], among: Sequence[tuple[int, ...]]) -> float:
  """Of what was drawn to the uniform law over `among`: half the sum of differences; what is none of these counts
  whole."""
  counts, total = dict.fromkeys(among, 0), 0
  for each in drawn:
    total += 1
    if each in counts:
      counts[each] += 1
  if not total or not counts:
    raise ConfigError(f'{"among" if total else "drawn"} is empty: give one or more colourings')
  shares = np.array(list(counts.values())) / total
  return float((np.abs(shares - 1 / len(among)).sum() + 1 - shares.sum()) / 2)


@config_dataclass
class Colouring(Sized):
  """A Glauber chain on the proper colourings of a graph, from the greedy one. Size: its steps.

      0 1 | 0 2 | 1 2 | <sep>     rounds: v1 c4 accept 0 4 2      the answer 0-4-2, where the chain ends

  A step draws a vertex and a colour, both uniform, and takes it where the colouring stays proper. The prompt is the
  same for all problems: what is asked for is a sample.

  colours: 2 d + 1 by default, for the largest degree d; the chain then reaches all proper colourings.
  """
  edges: tuple[tuple[int, int], ...] = TRIANGLE
  colours: int | None = None

  def __post_init__(self):
    Sized.__post_init__(self)
    if not self.edges or any(len(edge) != 2 or edge[0] == edge[1] for edge in self.edges):
      raise ConfigError(f'Colouring.edges = {self.edges}: give one or more pairs of different vertices 0, 1 ..')
    for vertex in sum(map(tuple, self.edges), ()):
      whole('Colouring.edges: a vertex', vertex, 0, MOST_COLOURINGS)
    degree = max(np.bincount(np.array(self.edges).ravel()))
    if self.colours is None:
      object.__setattr__(self, 'colours', 2 * int(degree) + 1)
    colours = whole('Colouring.colours', self.colours, int(degree) + 2, 36,
                    why='with fewer, chains may not reach all colourings')
    if self.vertices * math.log(colours) > math.log(MOST_COLOURINGS) + 1e-9:
      raise ConfigError(f'Colouring.edges = {shown(self.edges)}: {self.vertices} vertices have {self.colours} ^ '
                        f'{self.vertices} colourings, which are listed; give a graph with {MOST_COLOURINGS} at most')

  @property
  def vertices(self) -> int:
    return max(map(max, self.edges)) + 1

  @property
  def proper(self) -> tuple[tuple[int, ...], ...]:
    """All proper colourings."""
    assert self.colours is not None
    return colourings(self.edges, self.vertices, self.colours)

  @property
  def symbols(self) -> tuple[str, ...]:
    assert self.colours is not None
    numbers = map(str, range(max(self.vertices, self.colours)))
    return (*numbers, '|', SEP, *(f'v{v}' for v in range(self.vertices)), *(f'c{c}' for c in range(self.colours)),
            ACCEPTED, REFUSED, *map(_joined, self.proper))

  @property
  def extent(self) -> Extent:
    each = 3 + self.vertices
    return Extent(prompt=3 * len(self.edges) + 1, round=each, rounds=self.room, chain=each * self.room)

  @property
  def first(self) -> tuple[int, ...]:
    """The greedy colouring: every vertex takes the least colour that none of those before it has across an edge."""
    assert self.colours is not None
    colours: list[int] = []
    for vertex in range(self.vertices):
      taken = {colours[other] for edge in self.edges if vertex in edge for other in edge if other < vertex}
      colours.append(min(set(range(self.colours)) - taken))
    return tuple(colours)

  def draw(self, rng: np.random.Generator, size: int, task: str = '') -> Problem:
    assert self.colours is not None
    state, rounds = self.first, []
    for _ in range(self.checked(size, task)):
      vertex, colour = int(rng.integers(self.vertices)), int(rng.integers(self.colours))
      new = self.step(state, vertex, colour)
      accepted = new != state or state[vertex] == colour
      rounds.append((f'v{vertex}', f'c{colour}', ACCEPTED if accepted else REFUSED, *map(str, new)))
      state = new
    prompt = (*(word for u, v in self.edges for word in (str(u), str(v), '|')), SEP)
    return Problem(prompt=prompt, rounds=tuple(rounds), answer=_joined(state), size=size)

  def step(self, state: tuple[int, ...], vertex: int, colour: int) -> tuple[int, ...]:
    """The colouring after a step: with the vertex in that colour if it is proper, as it was if not."""
    new = (*state[:vertex], colour, *state[vertex + 1:])
    return new if proper(self.edges, new) else state

  def concluded(self, rounds: Sequence[Round], task: str = '') -> str | None:
    """The colouring that the last round ends with."""
    last = rounds[-1][-self.vertices:] if rounds else ()
    return '-'.join(last) if len(last) == self.vertices and all(word.isdigit() for word in last) else None

  def coloured(self, answer: str) -> tuple[int, ...] | None:
    """The colouring that an answer names; None where it names none."""
    words = answer.split('-')
    return tuple(map(int, words)) if len(words) == self.vertices and all(word.isdigit() for word in words) else None


def _joined(state):
  return '-'.join(map(str, state))
