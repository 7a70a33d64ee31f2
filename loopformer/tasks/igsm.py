"""i-GSM, symbolic: grade-school problems stripped to a graph of definitions, with arithmetic mod 7.

After Reasoning with latent thoughts (Saunshi et al., 2502.17416; section 5). Entities are letters on four levels; an
edge X#Y from one level to the next is a parameter, and has a value. Definitions stand in any order; the answer is one
token, without chain of thought:

    E#J := E#I . E#I := 4 . F#K := 2 * ( E#I + E#J ) . F#K ? 2

Numbers of parameters, depths of queries and the mixture of definitions are inferred: the paper does not state them.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import itertools
import re

import numpy as np

from loopformer.tasks.algorithms import accuracy, most_frequent
from loopformer.tasks.generated import Example, sequence
from loopformer.types import ConfigError, config_dataclass, whole

LEVELS = ('ABCD', 'EFGH', 'IJKL', 'MNOP')
PARAMETERS = tuple(f'{x}#{y}' for upper, lower in itertools.pairwise(LEVELS) for x in upper for y in lower)
MODULUS = 7
TERMS = 3  # most of a sum
FACTORS = (2, 3)
MULTIPLE, CONSTANT, MINUS = 0.25, 0.15, 0.125  # shares: of sums multiplied, of definitions constant, of terms negative
MOST_TOKENS = 12  # X#Y := 2 * ( X#Y + X#Y + X#Y ) .


@config_dataclass
class SymbolicGSM:
  """Problems of shortest..longest parameters, uniform, of which one is asked for; every X#Y is one token.

  A parameter is a constant, or a sum or difference of up to three different ones (one: a copy), or 2 or 3 times such a
  sum of two or three. Its depth is 0 for a constant, else 1 more than that of the deepest of these. The query is any
  parameter of depth shallowest..deepest, all alike; where there is none, the problem is drawn anew.
  """
  shortest: int = 8
  longest: int = 14
  shallowest: int = 2
  deepest: int = 8
  symbols = (*PARAMETERS, *map(str, range(MODULUS)), ':=', '.', '+', '-', '*', '(', ')', '?', '<end>')

  def __post_init__(self):
    whole('SymbolicGSM.shallowest', self.shallowest, 0, why='the depth of a constant is 0')
    whole('SymbolicGSM.deepest', self.deepest, self.shallowest, why='no query is both deeper and less deep')
    whole('SymbolicGSM.shortest', self.shortest, self.shallowest + 1, why='a query has as many ancestors as it is deep')
    whole('SymbolicGSM.longest', self.longest, self.shortest, why='the longest problem is not below the shortest')
    if self.longest > len(PARAMETERS):
      raise ConfigError(f'SymbolicGSM.longest = {self.longest}: there are {len(PARAMETERS)} parameters; set '
                        f'SymbolicGSM.longest to at most that')

  @property
  def length(self) -> int:
    """The longest definitions and the query; the answer is a target alone."""
    return MOST_TOKENS * self.longest + 2

  def __call__(self, rng: np.random.Generator) -> Example:
    count = int(rng.integers(self.shortest, self.longest + 1))
    places: list[int] = []
    while not places:
      names, values, depths, definitions = _drawn(rng, count)
      places = [i for i, depth in enumerate(depths) if self.shallowest <= depth <= self.deepest]
    query = places[rng.integers(len(places))]
    printed = itertools.chain.from_iterable([names[i], ':=', *definitions[i], '.'] for i in rng.permutation(count))
    ids = [IDS[symbol] for symbol in (*printed, names[query], '?', str(values[query]))]
    return sequence(ids, [0] * (len(ids) - 1) + [1], self.length, IDS['<end>'])

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance, of the most frequent answer, of the last number that is printed."""
    tokens = np.stack([e['tokens'] for e in examples])
    number = (tokens >= IDS['0']) & (tokens <= IDS['6'])
    last = np.maximum.accumulate(np.where(number, np.arange(tokens.shape[1]), 0), axis=1)
    guesses = {'most frequent': most_frequent(examples), 'last number': np.take_along_axis(tokens, last, 1)}
    return {'chance': 1 / MODULUS} | accuracy(examples, guesses)


IDS = {symbol: i for i, symbol in enumerate(SymbolicGSM.symbols)}


def _drawn(rng: np.random.Generator, count: int) -> tuple[list[str], list[int], list[int], list[list[str]]]:
  """Names, values, depths and definitions, as symbols, of `count` parameters; each is defined by earlier ones."""
  names = [PARAMETERS[i] for i in rng.permutation(len(PARAMETERS))[:count]]
  order = np.argsort(rng.random((count, count)) + np.triu(np.ones((count, count))), axis=1)  # of row i, 0 .. i-1 first
  terms = np.minimum(rng.integers(1, TERMS + 1, count), np.arange(count))
  terms[rng.random(count) < CONSTANT] = 0
  factors = np.where((terms > 1) & (rng.random(count) < MULTIPLE), rng.choice(FACTORS, count), 1).tolist()
  signs = np.where(rng.random((count, TERMS)) < MINUS, -1, 1)
  signs[:, 0] = 1
  constants = rng.integers(MODULUS, size=count).tolist()
  values, depths, definitions = [], [], []
  for row, few, sign, factor, constant in zip(order.tolist(), terms, signs.tolist(), factors, constants):
    if not few:
      values.append(constant)
      depths.append(0)
      definitions.append([str(constant)])
      continue
    used = list(zip(row[:few], sign))
    values.append(factor * sum(s * values[i] for i, s in used) % MODULUS)
    depths.append(1 + max(depths[i] for i, _ in used))
    body = [symbol for i, s in used for symbol in ('+' if s > 0 else '-', names[i])][1:]
    definitions.append(body if factor == 1 else [str(factor), '*', '(', *body, ')'])
  return names, values, depths, definitions


# Evaluation of text --------------------------------------------------------------------------------------------------


def evaluate(text: str) -> int:
  """The answer to a problem such as 'E#J := E#I. E#I := 4. E#J?', in 0..6; spaces do not matter.

  Raises:
    ValueError: a parameter is defined twice, by itself, or not at all; the text is not a problem.
  """
  *statements, query = ''.join(text.split()).split('.')
  definitions = {}
  for statement in statements:
    name, is_, expression = statement.partition(':=')
    if not is_ or name in definitions:
      raise ValueError(f'{statement!r} is not a definition, or not the first of {name}')
    definitions[name] = expression
  if not query.endswith('?'):
    raise ValueError(f'{query!r} is not a question')
  known, open_ = {}, []

  def value(name: str) -> int:
    if name not in definitions or name in open_:
      raise ValueError(f'{name} is defined by itself' if name in open_ else f'{name} is not defined')
    if name not in known:
      open_.append(name)
      words = re.findall(r'[A-P]#[A-P]|\d+|\S', definitions[name])
      known[name] = _sum(words, value) % MODULUS
      open_.pop()
      if words:
        raise ValueError(f'{definitions[name]!r}: {words[0]!r} is out of place')
    return known[name]

  return value(query[:-1])


def _sum(words: list[str], value: Callable[[str], int]) -> int:
  """Takes a sum off the front of the words."""
  total = _product(words, value)
  while words and words[0] in '+-':
    sign = 1 if words.pop(0) == '+' else -1
    total += sign * _product(words, value)
  return total


def _product(words: list[str], value: Callable[[str], int]) -> int:
  product = _factor(words, value)
  while words and words[0] == '*':
    words.pop(0)
    product *= _factor(words, value)
  return product


def _factor(words: list[str], value: Callable[[str], int]) -> int:
  word = words.pop(0) if words else ''
  if word != '(':
    return int(word) if word.isdigit() else value(word)
  inner = _sum(words, value)
  if not words or words.pop(0) != ')':
    raise ValueError('a bracket is not closed')
  return inner
