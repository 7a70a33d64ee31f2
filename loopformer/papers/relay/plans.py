"""Plans whose steps know the rounds that they are to show (RELAY, section 3.1)."""
from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from loopformer import plans
from loopformer.types import ConfigError, Plan, PlanContext, Planner, config_dataclass

ROUNDS, WEIGHTS = 'rounds', 'round_weights'  # of a batch, [B, K, n], and of a plan's rows, [K, B, n]


@config_dataclass
class RoundByRound(Planner):
  """As many steps as a problem has rounds, `batch['loops']`, and for each step the round that it is to show.

  most: K, the most rounds, as many as the batch has room for (tasks/reasoning.py).
  """
  most: int

  def __post_init__(self):
    plans.Given(most=self.most)

  @property
  def longest(self) -> int:
    return self.most

  @property
  def expected(self) -> float:
    return float(self.most)

  def __call__(self, context: PlanContext) -> Plan:
    given = {name: context.read(name, f'RoundByRound.most = {self.most}') for name in (ROUNDS, WEIGHTS)}
    for name, rows in given.items():
      if rows.shape[1] != self.most:
        raise ConfigError(f'RoundByRound.most = {self.most}: the batch has room for {rows.shape[1]} rounds ({name}); a '
                          f'plan has a row for each, set RoundByRound.most to {rows.shape[1]}')
    plan = plans.Given(most=self.most)(context)
    return dataclasses.replace(plan, rows={name: jnp.swapaxes(rows, 0, 1) for name, rows in given.items()})
