"""Pointer jumping: every place points at a place, and is asked where so many jumps lead.

The smallest task whose difficulty differs from token to token. A layer that reads the pointer at its pointer's place
doubles the jumps that it knows, so h jumps take ceil(log2 h) layers; one that starts with the pointers themselves
answers h = 1 at once.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from loopformer.tasks.algorithms import accuracy
from loopformer.tasks.generated import Example, aligned
from loopformer.types import config_dataclass, whole


@config_dataclass
class Pointers:
  """Place i of `places` points at pi(i), a random permutation, and is asked for pi^h(i), h uniform in fewest..most.

  tokens f32[places, places + hops]: pi(i) and h, one-hot; targets i32[places]; hops i32[places]: h. The answer may
  depend on places that come later: for attention in both directions. hops: the largest h that can be told, and `most`
  by default.
  """
  places: int = 8
  hops: int = 4
  fewest: int = 1
  most: int | None = None
  symbols = None

  def __post_init__(self):
    whole('Pointers.places', self.places, 2, why='a place points at another')
    whole('Pointers.hops', self.hops, 1, why='an answer takes a hop')
    if self.most is None:
      object.__setattr__(self, 'most', self.hops)
    whole('Pointers.fewest', self.fewest, 1, self.hops, why='Pointers.hops is the largest number that can be told')
    whole('Pointers.most', self.most, self.fewest, self.hops,
          why='Pointers.hops is the largest number that can be told')

  @property
  def length(self) -> int:
    return self.places

  def __call__(self, rng: np.random.Generator) -> Example:
    assert self.most is not None
    pointers = rng.permutation(self.places)
    hops = rng.integers(self.fewest, self.most + 1, self.places)
    tokens = np.concatenate([np.eye(self.places)[pointers], np.eye(self.hops)[hops - 1]], 1)
    reached = np.arange(self.places)
    for hop in range(self.hops):
      reached = np.where(hop < hops, pointers[reached], reached)
    example = aligned(tokens.astype(np.float32), reached.astype(np.int32), np.ones(self.places))
    return {**example, 'hops': hops.astype(np.int32)}

  def baselines(self, examples: Sequence[Example]) -> dict[str, float]:
    """Of chance, of the place itself, of its pointer, which is one jump."""
    pointers = np.stack([e['tokens'][:, :self.places].argmax(1) for e in examples])
    guesses = {'own place': np.broadcast_to(np.arange(self.places), pointers.shape), 'one jump': pointers}
    return {'chance': 1 / self.places} | accuracy(examples, guesses)
