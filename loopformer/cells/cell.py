"""What cells have in common: a plain cell's answers to all that is asked of one, and a cell that stands around another.
"""
from __future__ import annotations

from typing import Any

from flax import linen as nn

from loopformer import loop
from loopformer.nn.stack import Stack
from loopformer.types import Array, ConfigError, Params, Plan


class Cell(nn.Module):
  """A cell whose steps come one after the other, do not depend on the schedule, and do not take the input in again.

  stepwise: whether a step may be taken by itself, so that another cell can stand around this one.
  """
  stepwise = True
  run = loop.run

  @property
  def injects(self) -> bool:
    """Whether a step takes the input in again."""
    return False

  @property
  def most(self) -> int | None:
    """The most steps of a plan that it can run; None: as many as are asked for."""
    return None

  @property
  def tokenwise(self) -> bool:
    """Whether a token may keep its state while others take more steps, so that exits can let it go."""
    return True

  def check(self, width: int):
    """Raises ConfigError where its parts do not fit each other, or the model's width."""

  def check_tokens(self, tokens: Array, steps: int, seg: Array | None = None):
    """Raises ConfigError where so many steps make no sense over the tokens of these rows: never."""

  def precompute(self, plan: Plan) -> Any:
    """What it computes ahead of the loop, leaves [K, ...]: nothing."""
    return None

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over `length` tokens: those of its stack."""
    return steps * self.core.flops(width, length)

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging, from the cell's parameters: none."""
    return {}

  def enter(self, x: Array) -> Any:
    """The state that the loop begins with, a tree of leaves [B, T, ...], from that of `Looped.start` [B, T, D]."""
    return x

  def output(self, state: Any) -> Array:
    """What is read out of a state, [B, T, D]."""
    return state


class Around(Cell):
  """A cell that does something around the steps of another, `of`; the parameters of both lie side by side.

  A subclass says in `__call__` what it does with `self.inner`; what it does not say, the inner cell does.
  """
  of: nn.Module

  def setup(self):
    # In the scope of this cell: parameters have the names, and first values, that they have without it. So the name of
    # `of`, which Linen has reserved for it, is free for one more cell in it.
    assert self.scope is not None
    self.scope.reservations.pop('of', None)
    object.__setattr__(self, '_inner', self.of.copy(parent=self.scope))

  @property
  def inner(self) -> nn.Module:
    """The other cell: of the model that is running, or as it is described."""
    return self.of if self.scope is None else self._inner

  @property
  def core(self) -> Stack:
    """The stack."""
    return self.inner.core

  @property
  def injects(self) -> bool:
    """As of the inner cell."""
    return self.inner.injects

  @property
  def most(self) -> int | None:
    """As of the inner cell."""
    return self.inner.most

  @property
  def tokenwise(self) -> bool:
    """As of the inner cell."""
    return self.inner.tokenwise

  def check(self, width: int):
    """Raises ConfigError where the inner cell cannot be taken step by step, or does not fit."""
    if not self.of.stepwise:
      raise ConfigError(f'model.cell.of = {type(self.of).__name__}: its loops run together, so that nothing can be '
                        f'done after each; {type(self).__name__} takes a cell whose steps run one by one, '
                        'such as Plain')
    self.of.check(width)

  def check_tokens(self, tokens: Array, steps: int, seg: Array | None = None):
    """As the inner cell does."""
    self.of.check_tokens(tokens, steps, seg)

  def precompute(self, plan: Plan) -> Any:
    """As of the inner cell."""
    return self.inner.precompute(plan)

  def flops(self, width: int, length: int, steps: float) -> float:
    """As of the inner cell."""
    return self.inner.flops(width, length, steps)

  def diagnose(self, params: Params) -> dict[str, float]:
    """As of the inner cell."""
    return self.inner.diagnose(params)

  def enter(self, x: Array) -> Any:
    """As of the inner cell."""
    return self.inner.enter(x)

  def output(self, state: Any) -> Array:
    """As of the inner cell."""
    return self.inner.output(state)

  def of_one_array(self, state: Any) -> Array:
    """The state, for what is defined of one array alone. Raises ConfigError where the inner cell's is a tree of
    several.
    """
    if isinstance(state, Array):
      return state
    raise ConfigError(f'model.cell = {type(self).__name__}: the state of {type(self.of).__name__} is a tree of several '
                      f'arrays; put {type(self).__name__} around a cell whose state is one, such as Plain')
