"""Objectives: named rollouts, and weighted terms over them."""
from __future__ import annotations

import dataclasses
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp

from loopformer import loop
from loopformer.model import Looped, make_readout, run_batch
from loopformer.types import (
  Array,
  Batch,
  ConfigError,
  Params,
  PlanContext,
  Planner,
  Preparation,
  Teacher,
  Term,
  Trace,
  config_dataclass,
)


@config_dataclass
class Own:
  """A teacher of its own make: the model of a work folder, as it is described there, with its last weights."""
  folder: str
  paths = ('folder',)

  @property
  def name(self) -> str:
    """By which its weights are known."""
    return f'{self.folder} (its own model)'

  def model(self, own: Any) -> Any:
    """The model that runs. Raises ConfigError where the folder holds none."""
    from loopformer import config as configs
    return configs.read(self.folder).model


@config_dataclass
class Lent:
  """A teacher of the same make as the model that learns, with the weights of a work folder's last checkpoint; what that
  does not hold is as the model starts."""
  folder: str

  @property
  def name(self) -> str:
    """As of Own."""
    return self.folder

  def model(self, own: Any) -> Any:
    """The model that runs."""
    return own


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One run of the model: how its steps are arranged, which states it keeps, and with whose weights it runs.

  weights_of: None: those that learn; or a teacher, whose weights do not, such as `Own`; or a work folder, which is
  `Lent`.
  """
  plan: Planner
  keep: Any = loop.Last()
  weights_of: str | Teacher | None = None
  paths = ('weights_of',)

  @property
  def teacher(self) -> Teacher | None:
    """Whose weights it runs with, if not with those that learn."""
    return Lent(folder=self.weights_of) if isinstance(self.weights_of, str) else self.weights_of


@dataclasses.dataclass(frozen=True)
class Weighted:
  """`weight` times the mean of `term`."""
  weight: float
  term: Term


@config_dataclass
class AsGiven:
  """Learns from the batch as it is."""
  teacher = None

  def check(self, model: Any, measure: Any):
    """Nothing: it suits all models, and all measures."""

  def __call__(self, context: PlanContext, weights: Params | None = None) -> Batch:
    return context.batch


@config_dataclass
class Objective:
  """loss = sum over terms of weight * sum / weight-sum, over the rollouts in `rolls`.

  Every mean is one sum over the whole global batch divided once by a weight that depends on the batch alone, so that
  microbatches, devices and hosts agree whatever the padding.

  prepare: what becomes of a batch in every step, before anything is summed or divided: context -> batch, leaves [B,
  ...]. It may mask tokens, or say by new entries which states are learned from; weights of terms may depend on what it
  drew. What it draws for a sequence it draws from `context.keys()`. A plain function suits all models; a
  part that is for some, or runs with weights of its own, is a `types.Preparation`.
  """
  rolls: Mapping[str, Rollout]
  terms: Mapping[str, Weighted]
  prepare: Callable[[PlanContext], Batch] = AsGiven()

  def __post_init__(self):
    for name, weighted in self.terms.items():
      for roll in weighted.term.reads:
        if roll not in self.rolls:
          raise ConfigError(f'objective.terms[{name!r}] reads the rollout {roll!r}, which objective.rolls does not '
                            f'have; it has {", ".join(self.rolls)}')

  @property
  def longest(self) -> int:
    """Rows of the longest plan."""
    return max(roll.plan.longest for roll in self.rolls.values())

  def prepared(self, context: PlanContext, frozen: Mapping[str, Params] = {}) -> PlanContext:
    """The same with the batch that is learned from; once in a step, for all microbatches. frozen: the weights of
    `teachers`, by their names.

    Raises:
      ConfigError: a teacher's weights are missing.
    """
    named, encoder = context.named('prepare'), self._encoder
    prepare: Any = self.prepare
    if encoder is None:
      return dataclasses.replace(context, batch=prepare(named))
    self._all_there(frozen)
    return dataclasses.replace(context, batch=prepare(named, jax.lax.stop_gradient(frozen[encoder.name])))

  @property
  def _encoder(self):
    """Whose weights the preparation runs with, if any."""
    return self.prepare.teacher if isinstance(self.prepare, Preparation) else None

  def _all_there(self, frozen):
    missing = [name for name in self.teachers if name not in frozen]
    if missing:
      raise ConfigError(f'frozen: no weights of {missing[0]!r}, with which a rollout or the preparation runs; give '
                        'those of all objective.teachers, by their names')

  def denominators(self, batch: Batch) -> dict[str, Array]:
    """f32[] for every term: what its sum over this batch is divided by."""
    return {name: weighted.term.weight(batch) for name, weighted in self.terms.items()}

  @property
  def teachers(self) -> dict[str, Teacher]:
    """Those whose weights some rollouts, or the preparation, run with, by their names."""
    every = [*(roll.teacher for roll in self.rolls.values()), self._encoder]
    return {teacher.name: teacher for teacher in every if teacher is not None}

  def rollouts(self, model, params: Params, context: PlanContext, frozen: Mapping[str, Params] = {}) -> dict[str,
                                                                                                             Trace]:
    """Runs every rollout; each draws its plan and its noise from a key of its own, named after it."""
    self._all_there(frozen)
    traces = {}
    for name, roll in self.rolls.items():
      noise = context.named(f'{name} noise').keys()
      runs, weights = self._of(roll, model, params, frozen)
      traces[name] = run_batch(runs, weights, context.batch, roll.plan(context.named(name)), keep=roll.keep,
                               noise=noise)
    return traces

  def __call__(self, model, params: Params, context: PlanContext, denominators: Mapping[str, Array],
               frozen: Mapping[str, Params] = {}) -> tuple[Array, dict[str, Array]]:
    """This batch's share of the loss, f32[], and of every term's mean, {name: f32[]}.

    frozen: the weights of `teachers`, by their names.

    Raises:
      ConfigError: a teacher's weights are missing.
    """
    rolls = self.rollouts(model, params, context, frozen)
    of = {name: make_readout(*self._of(roll, model, params, frozen), context.batch)
          for name, roll in self.rolls.items() if roll.teacher is not None}
    readout = dataclasses.replace(make_readout(model, params, context.batch), of=of)
    shares = {name: weighted.term(rolls, context.batch, readout, params) / jnp.maximum(denominators[name], 1e-9)
              for name, weighted in self.terms.items()}
    total: Any = sum(self.terms[name].weight * share for name, share in shares.items())
    return total, shares

  def _of(self, roll, model, params, frozen) -> tuple[Looped, Params]:
    """(model, parameters) that a rollout runs with."""
    if roll.teacher is None:
      return model, params
    return roll.teacher.model(model), jax.lax.stop_gradient(frozen[roll.teacher.name])

  def flops(self, model, length: int) -> float:
    """Floating-point operations a token of one training step: forward, and twice that for what is differentiated; no
    recomputation."""
    total = 0.0
    for roll in self.rolls.values():
      steps = roll.plan.expected
      graded = roll.plan.differentiated if roll.teacher is None else 0
      runs = model if roll.teacher is None else roll.teacher.model(model)
      total += runs.flops(length, steps) + (2 * runs.flops(length, graded) if graded else 0)
    return total
