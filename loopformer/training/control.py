"""Controllers: what a run decides from what it sees. Their state is part of every checkpoint.

A controller is a frozen part. `start` gives its state (numbers and lists, saved as JSON), `watch` a new state after a
step's values or an evaluation, `stage` the number that plans may read (`PlanContext.stage`). All processes see the same
values and so decide the same.
"""
from __future__ import annotations

import math
from typing import Any, Mapping

from loopformer.types import ConfigError, config_dataclass

State = dict[str, Any]


@config_dataclass
class NoControl:
  """Nothing is decided."""

  def start(self) -> State:
    return {}

  def watch(self, state: State, step: int, values: Mapping[str, float]) -> State:
    return state

  def stage(self, state: State) -> int:
    return 0

  def check(self, plans: Mapping[str, Any], evals: Mapping[str, Any]):
    """Raises ConfigError where a plan waits for stages."""
    for name, plan in plans.items():
      if plan.stages:
        raise ConfigError(f'objective.rolls.{name}.plan has stages, but control = NoControl never leaves the first; '
                          'use a controller with the same stages, such as Plateau')


@config_dataclass
class Plateau:
  """The next stage once the present one has stopped to learn: SHIFT's criterion with patience (sheet, section 3).

  At every evaluation, m is the validation loss at the stage's loops, g the running mean of the gradient's norm, W the
  `window` in evaluations:

      plateau   m[-W] - min(m since) < progress * |m[-W]|
      stable    |g - g[-W]|          < steadiness * g[-W]

  `patience` evaluations in a row at which both hold end the stage; so does the first from its step `longest` on. The
  formula is our reading: the paper's text, but for the names of its thresholds, was not to be had. A stage is never
  entered again.

  loops: of each stage, ascending; the plan is `plans.Staged` with the same. progress, steadiness: delta_1, delta_2.
  """
  loops: tuple[int, ...] = (1, 8)
  window: int = 5
  patience: int = 3
  progress: float = 0.01
  steadiness: float = 0.1
  longest: int | None = None
  decay: float = 0.98

  def __post_init__(self):
    if not self.loops or list(self.loops) != sorted(set(self.loops)) or self.loops[0] < 1:
      raise ConfigError(f'control.loops = {self.loops}: give ascending numbers of loops, each 1 or more')
    for name, least in (('window', 1), ('patience', 1), ('progress', 0), ('steadiness', 0)):
      if getattr(self, name) < least:
        raise ConfigError(f'control.{name} = {getattr(self, name)}: must be {least} or more')
    if self.longest is not None and self.longest < 0:
      raise ConfigError(f'control.longest = {self.longest}: a number of steps, 0 to begin with the last stage')

  def start(self) -> State:
    stage = len(self.loops) - 1 if self.longest == 0 else 0
    return {'stage': stage, 'losses': [], 'norms': [], 'norm': None, 'count': 0, 'entered': 0, 'switches': []}

  def stage(self, state: State) -> int:
    return state['stage']

  def check(self, plans: Mapping[str, Any], evals: Mapping[str, Any]):
    """Raises ConfigError where plans have other stages, or a stage's loops are not evaluated."""
    for name, plan in plans.items():
      if plan.stages not in ((), self.loops):
        raise ConfigError(f'control.loops = {self.loops}, but objective.rolls.{name}.plan has the stages '
                          f'{plan.stages}; give both the same')
    missing = [loops for loops in self.loops[:-1] if str(loops) not in evals]
    if missing:
      raise ConfigError(f'control.loops = {self.loops}: the stage of {missing[0]} is judged by its validation loss, '
                        f'but evals has {", ".join(evals)} alone; add {missing[0]} to evals.budgets')

  def watch(self, state: State, step: int, values: Mapping[str, float]) -> State:
    norm = state['norm']
    if math.isfinite(values.get('grad_norm', math.nan)):
      new = values['grad_norm']
      norm = new if norm is None else self.decay * norm + (1 - self.decay) * new
    state = {**state, 'norm': norm}
    name = f'loss@{self.loops[state["stage"]]}'
    if name not in values or state['stage'] == len(self.loops) - 1:  # stages end at evaluations alone
      return state
    loss = values[name]
    if math.isfinite(loss) and norm is not None:
      losses, norms = ([*state[name], value][-self.window - 1:] for name, value in (('losses', loss), ('norms', norm)))
      state = {**state, 'losses': losses, 'norms': norms, 'count': self._count(losses, norms, state['count'])}
    over = self.longest is not None and step - state['entered'] >= self.longest
    if state['count'] < self.patience and not over:
      return state
    return {**self.start(), 'stage': state['stage'] + 1, 'norm': norm, 'entered': step,
            'switches': [*state['switches'], step]}

  def _count(self, losses, norms, count):
    if len(losses) <= self.window:
      return 0
    plateau = losses[0] - min(losses[1:]) < self.progress * max(abs(losses[0]), 1e-9)
    stable = abs(norms[-1] - norms[0]) < self.steadiness * max(norms[0], 1e-9)
    return count + 1 if plateau and stable else 0
