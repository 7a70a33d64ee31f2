"""Multi-hop questions about a world of facts: who is the r3 of the r2 of the r1 of e?

After Ouro (2510.25741, section 5) and Yao et al. (2505.17923). Entities lie in layers; for every relation, an entity
has one entity of the next layer. The facts have to be remembered, and then chained without writing the steps down:

    e17 r4 = e163            a fact
    e17 r4 r0 r11 = e388     a question of three hops
"""
from __future__ import annotations

from collections.abc import Sequence
import functools

import numpy as np

from loopformer.tasks.algorithms import accuracy, most_frequent
from loopformer.tasks.generated import Example, seed_of
from loopformer.tasks.packed import packed
from loopformer.types import ConfigError, config_dataclass, whole


@config_dataclass
class Trained:
  """A share of the problems are facts, the others questions that are trained on. The paper's training tells facts in
  sentences about an entity; here they are questions of one hop."""
  facts: float = 0.5

  def __post_init__(self):
    if not 0 <= self.facts <= 1:
      raise ConfigError(f'MultiHop.split.facts = {self.facts}: it is a share of the problems; set it to 0.0..1.0')

  def draw(self, of: MultiHop, rng: np.random.Generator) -> list[int]:
    """Ids of a problem, answer and all."""
    if rng.random() < self.facts:
      entity, relation = rng.integers(of.entities * (of.layers - 1)), rng.integers(of.relations)
      return of.problem(int(entity), [int(relation)])
    return of.question(int(rng.integers(of.trained)))


@config_dataclass
class HeldOut:
  """Questions that are never trained on, though every fact that they need is."""

  def draw(self, of: MultiHop, rng: np.random.Generator) -> list[int]:
    """Ids of a problem, answer and all."""
    return of.question(of.questions - 1 - int(rng.integers(of.held_out)))


@config_dataclass
class MultiHop:
  """Problems about `layers` layers of `entities` each and so many `relations`, packed into rows of `length` tokens.

  Questions are of `hops` relations, from any entity of the first layer: entities * relations^hops of them, in a random
  order that is fixed by `world`, as the facts are. A share of them, from the first on, is trained on; the last
  `held_out` never are. Answers alone are asked for.
  """
  entities: int = 100
  layers: int = 5
  relations: int = 20
  hops: int = 3
  share: float = 0.25
  held_out: int = 3000
  world: int = 0
  split: Trained | HeldOut = Trained()
  length: int = 128

  def __post_init__(self):
    for name in ('entities', 'relations', 'hops', 'held_out'):
      whole(f'MultiHop.{name}', getattr(self, name), 1, why='it is a count')
    whole('MultiHop.layers', self.layers, self.hops + 1, why=f'hops = {self.hops} begin in the first layer')
    whole('MultiHop.length', self.length, self.hops + 2, why=f'a row holds a question of hops = {self.hops}')
    if not 1 <= self.trained <= self.questions - self.held_out:
      raise ConfigError(f'MultiHop.share = {self.share}: of {self.questions} questions, {self.held_out} are held out, '
                        f'and {self.trained} would be trained on; set MultiHop.share to a share of 1 question or more '
                        f'and {self.questions - self.held_out} at most')

  @property
  def symbols(self) -> tuple[str, ...]:
    return (*(f'e{i}' for i in range(self.entities * self.layers)), *(f'r{i}' for i in range(self.relations)), '=',
            '<end>')

  @property
  def questions(self) -> int:
    """How many there are."""
    return self.entities * self.relations ** self.hops

  @property
  def trained(self) -> int:
    """How many of them are trained on."""
    return int(self.share * self.questions)

  def __call__(self, rng: np.random.Generator) -> Example:
    def problem():
      ids = self.split.draw(self, rng)
      return ids, np.arange(len(ids)) == len(ids) - 1

    return packed(problem, self.length, len(self.symbols) - 1)

  def question(self, place: int) -> list[int]:
    """Ids of the question at a place of the order, answer and all."""
    number, relations = int(_order(self.world, self.questions)[place]), []
    for _ in range(self.hops):
      number, relation = divmod(number, self.relations)
      relations.append(relation)
    return self.problem(number, relations)

  def problem(self, entity: int, relations: Sequence[int]) -> list[int]:
    """Ids of any chain of relations from an entity, answer and all."""
    targets, count = _targets(self.world, self.layers - 1, self.entities, self.relations), self.entities * self.layers
    answer = entity
    for relation in relations:
      layer, place = divmod(answer, self.entities)
      answer = (layer + 1) * self.entities + int(targets[layer, place, relation])
    return [entity, *(count + relation for relation in relations), count + self.relations, answer]

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance among a layer's entities, of the most frequent answer."""
    return {'chance': 1 / self.entities} | accuracy(examples, {'most frequent': most_frequent(examples)})


@functools.cache
def _targets(world: int, layers: int, entities: int, relations: int) -> np.ndarray:
  """i64[layers, entities, relations]: places in the next layer, uniform."""
  return np.random.default_rng(seed_of('facts', world)).integers(entities, size=(layers, entities, relations))


@functools.cache
def _order(world: int, questions: int) -> np.ndarray:
  """i32[questions]: all numbers below, in a random order."""
  return np.random.default_rng(seed_of('order of questions', world)).permutation(questions).astype(np.int32)
