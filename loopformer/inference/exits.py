"""Exits: which state of a rollout answers, and so how many steps an answer takes. Frozen parts.

`Final` and `Confidence` run a whole plan and pick from its states. `Adaptive` asks a rule after every step, lets tokens
go one by one, and ends when the last has gone. A rule looks at one token at a time, so that what it decides does not
depend on the batch:

    init(model, x, ctx) -> state                   of tokens whose states are x [B, T, D]
    update(state, seen, threshold) -> (state, done bool[B, T], answer [B, T, D])

after every step, of which it sees a `StepView` (types.py); threshold is f32[] or f32[B, 1]; the answer is the state
from which a token that leaves now is read out. Sources: Huginn section 4, Ouro section 4, PonderNet, ACT (Universal
Transformers).
"""
from __future__ import annotations

import dataclasses
from typing import Any
import zlib

import jax
import jax.numpy as jnp

from loopformer import loop
from loopformer.model import make_readout, parameter_shapes, run_batch
from loopformer.types import Array, Batch, ConfigError, Params, Plan, Readout, Trace, config_dataclass, whole


@config_dataclass
class Final:
  """The last state."""
  threshold, decides = None, False

  def run(self, model: Any, params: Params, batch: Batch, plan: Plan, threshold: Array | None) -> tuple[Trace, Readout]:
    """The trace, whose `steps` are i32[B] or i32[B, T], and whose z answers."""
    trace = run_batch(model, params, batch, plan)
    steps = jnp.broadcast_to((plan.steps if plan.active is None else plan.active.sum(0)) + plan.free, trace.z.shape[:1])
    return dataclasses.replace(trace, steps=steps, aux={'ran': steps.max()}), make_readout(model, params, batch)


@config_dataclass
class Confidence:
  """The step whose answers are surest (length generalisation, section 4): the least cross-entropy of its likeliest
  answers, a mean over a sequence's own answer positions; the first of equals. No step before `least` is taken.
  For plans without `no_grad_steps`, whose states are not kept: ConfigError elsewhere.
  """
  least: int = 1
  threshold, decides = None, False

  def __post_init__(self):
    whole('exit.least', self.least, 1)

  def run(self, model: Any, params: Params, batch: Batch, plan: Plan, threshold: Array | None) -> tuple[Trace, Readout]:
    """As Final.run."""
    if plan.no_grad_steps is not None:
      raise ConfigError(f'exit = {self}: the plan has steps without gradient, whose states are not kept to pick from; '
                        'give a plan without them, such as Uniform, or exit = Final()')
    trace = run_batch(model, params, batch, plan, keep=loop.Every())
    readout = make_readout(model, params, batch)
    z, steps = self.pick(readout, trace, batch)
    return dataclasses.replace(trace, z=z, steps=steps, aux={'ran': trace.steps}), readout

  def pick(self, readout: Readout, trace: Trace, batch: Batch) -> tuple[Array, Array]:
    """z [B, T, D] of the chosen steps, and these, i32[B]; of a trace that kept every state."""
    assert trace.xs is not None and trace.plan is not None
    z_KBTD = readout.read(trace.xs)
    asked_BT = (batch['weights'] > 0).astype(jnp.float32)

    def doubt(z_BTD):
      logits = readout.logits(z_BTD)
      unsure_BT = jax.nn.logsumexp(logits, -1) - logits.max(-1)
      return (unsure_BT * asked_BT).sum(-1) / jnp.maximum(asked_BT.sum(-1), 1)

    doubt_KB = jax.lax.map(doubt, z_KBTD)
    early = jnp.arange(len(doubt_KB))[:, None] < self.least - 1
    active = jnp.ones(len(doubt_KB), bool) if trace.plan.active is None else trace.plan.active
    best_B = jnp.where(early | ~active.reshape(len(doubt_KB), -1), jnp.inf, doubt_KB).argmin(0)
    return jnp.take_along_axis(z_KBTD, best_B[None, :, None, None], 0)[0], best_B + 1


# What a token that was let go leaves in the caches of steps that it did not take --------------------------------------


@config_dataclass
class Copy:
  """The entries of its last step: the steps are saved, and later tokens find in every slot the deepest entry there is
  (Huginn's "latest"). Differs from a pass without cache, where the kept state goes on giving keys."""
  runs = False


@config_dataclass
class Recompute:
  """What the kept state gives: all steps run, no time is saved, and decoding equals the pass without cache exactly.
  Where a rule reads answers through a coda it could not, and is refused when tokens are decoded (ConfigError)."""
  runs = True


@config_dataclass
class Adaptive:
  """Lets each token go when `rule` says so, after `least` steps at the earliest and with the plan at the latest."""
  rule: Any
  least: int = 1
  fill: Copy | Recompute = Copy()
  decides = True  # while the model runs, from what each token shows; so it serves where tokens are decoded

  def __post_init__(self):
    whole('exit.least', self.least, 1)

  @property
  def threshold(self) -> float | None:
    """The rule's threshold, where it has one."""
    return self.rule.threshold

  @property
  def static(self) -> Adaptive:
    """The same for all thresholds, so that one compiled program serves them: 1 is one for every rule."""
    return self if self.threshold is None else dataclasses.replace(self,
                                                                   rule=dataclasses.replace(self.rule, threshold=1))

  def run(self, model: Any, params: Params, batch: Batch, plan: Plan, threshold: Array | None) -> tuple[Trace, Readout]:
    """As Final.run; steps i32[B, T]. What is drawn for a sequence comes from its number in the batch, `row`."""
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(batch['row']) if 'row' in batch else None
    trace = run_batch(model, params, batch, plan, exit_policy=self, threshold=threshold, keys=keys, method='adapt')
    return trace, make_readout(model, params, batch)


def compiled(exit_policy: Final | Confidence | Adaptive | None) -> tuple[Any, Array | None]:
  """(the exit that a program is compiled for, its threshold f32[], an argument of the program); None if there is none.
  """
  if exit_policy is None or exit_policy.threshold is None:
    return exit_policy, None
  return exit_policy.static, jnp.float32(exit_policy.threshold)


def check(model: Any, exit_policy: Any, name: str):
  """Raises ConfigError where the model cannot be decoded or scored with the exit; `name` begins its message.

  Steps are traced with abstract values: nothing is computed, and nothing compiled.
  """
  if not hasattr(exit_policy, 'decides'):
    raise ConfigError(f'{name} = {exit_policy!r}: give an exits.Adaptive, such as Adaptive(rule=KL(threshold=1e-3))')
  if not exit_policy.decides:
    raise ConfigError(f'{name} = {exit_policy}: it picks from the states of a whole plan, and does not stop token by '
                      'token; use exits.Adaptive with a rule, or no exit for all steps')
  plan = Plan(t=jnp.zeros(2), dt=jnp.full(2, 0.5))
  params = parameter_shapes(model)
  try:
    jax.eval_shape(lambda params: model.apply({'params': params}, model.read_in.example(), plan, exit_policy,
                                              exit_policy.threshold,
                                              method='adapt').steps, params)
  except ConfigError as error:
    raise ConfigError(f'{name}: {error}') from error


# Rules ---------------------------------------------------------------------------------------------------------------


def check_threshold(threshold: float, low: float, high: float, what: str):
  """Raises ConfigError where a rule's threshold is not from `low` to `high`, and finite."""
  if not low <= threshold <= high or threshold == INF:
    raise ConfigError(f'exit.rule.threshold = {threshold}: {what}')


INF = float('inf')
SLACK = 1e-6  # of sums of logarithms
DRAWS = zlib.crc32(b'exits')  # tells what exits draw from the tokens that are drawn with the same key


@config_dataclass
class KL:
  """KL(answer before || answer after the step) < threshold nats; before the first step the answer is uniform.

  Memory f32[B, T, V] between steps.
  """
  threshold: float = 5e-4

  def __post_init__(self):
    check_threshold(self.threshold, 0, INF, 'nats, 0 (all steps) or more')

  def init(self, model, x, ctx):
    return jnp.full((*x.shape[:2], answers(model)), -jnp.log(answers(model)))

  def update(self, state, seen, threshold):
    after = jax.nn.log_softmax(seen.logits())
    return after, (jnp.exp(state) * (state - after)).sum(-1) < threshold, seen.new


@config_dataclass
class EntropyChange:
  """The entropy of the answer moves by less than threshold nats in a step; before the first it is that of chance."""
  threshold: float = 1e-3

  def __post_init__(self):
    check_threshold(self.threshold, 0, INF, 'nats, 0 (all steps) or more')

  def init(self, model, x, ctx):
    return jnp.full(x.shape[:2], jnp.log(answers(model)))

  def update(self, state, seen, threshold):
    after = entropy(seen.logits())
    return after, jnp.abs(after - state) < threshold, seen.new


@config_dataclass
class Entropy:
  """The answer has less than threshold nats of entropy."""
  threshold: float = 0.5

  def __post_init__(self):
    check_threshold(self.threshold, 0, INF, 'nats, 0 (all steps) or more')

  def init(self, model, x, ctx):
    answers(model)
    return ()

  def update(self, state, seen, threshold):
    return state, entropy(seen.logits()) < threshold, seen.new


@config_dataclass
class StateChange:
  """|x_k - x_(k-1)| < threshold * |x_k|. Needs neither coda nor head."""
  threshold: float = 0.03

  def __post_init__(self):
    check_threshold(self.threshold, 0, INF, "a share of the state's length, 0 (all steps) or more")

  def init(self, model, x, ctx):
    return ()

  def update(self, state, seen, threshold):
    old, new = seen.old.astype(jnp.float32), seen.new.astype(jnp.float32)
    return state, jnp.linalg.norm(new - old, axis=-1) < threshold * jnp.linalg.norm(new, axis=-1), seen.new


@config_dataclass
class Stable:
  """The likeliest answer has been the same after `threshold` steps in a row."""
  threshold: float = 5

  def __post_init__(self):
    check_threshold(self.threshold, 1, INF, 'a number of steps, 1 or more')

  def init(self, model, x, ctx):
    answers(model)
    return jnp.full(x.shape[:2], -1), jnp.zeros(x.shape[:2], jnp.int32)

  def update(self, state, seen, threshold):
    best = seen.logits().argmax(-1)
    count = jnp.where(best == state[0], state[1] + 1, 1)
    return (best, count), count >= threshold, seen.new


@config_dataclass
class Cumulative:
  """Ouro's Q-exit: the probability of having left by now, 1 - prod(1 - lambda), reaches threshold.

  lambda = sigmoid(aux['halt']) of a cell with a gate (cells/halting.py). 0: after one step; 1: with the plan, or a
  lambda that is 1. Compared as logarithms, where gates that are nearly 0 or 1 do not round to either.
  """
  threshold: float = 0.5

  def __post_init__(self):
    check_threshold(self.threshold, 0, 1, 'a probability, 0 to 1')

  def init(self, model, x, ctx):
    return jnp.zeros(x.shape[:2])

  def update(self, state, seen, threshold):
    stay = state + jax.nn.log_sigmoid(-halt(seen.aux))
    return stay, stay <= jnp.log1p(-jnp.asarray(threshold, jnp.float32)) + SLACK, seen.new


@config_dataclass
class Sampled:
  """PonderNet's exit: after every step a token leaves with probability lambda = sigmoid(aux['halt']).

  Drawn ahead, as one number u for every place: it leaves when 1 - prod(1 - lambda) passes u, which is the same
  distribution. u comes from the sequence's key (`Context.keys`; of a request, its seed) and the position alone. So a
  request is answered
  alike whatever shares its batch, and requests of one seed draw the same numbers at the same positions: where that
  matters, give them seeds of their own.
  """
  seed: int = 0
  threshold: None = None

  def init(self, model, x, ctx):
    keys = jnp.broadcast_to(jax.random.key(0), x.shape[:1]) if ctx.keys is None else ctx.keys

    def draw(key, pos):
      key = jax.random.fold_in(jax.random.fold_in(key, DRAWS), self.seed)
      return jax.random.uniform(jax.random.fold_in(key, pos))

    return (jax.vmap(jax.vmap(draw, (None, 0)))(keys, jnp.maximum(ctx.pos, 0)), Cumulative().init(model, x, ctx))

  def update(self, state, seen, threshold):
    stay, done, answer = Cumulative().update(state[1], seen, state[0])
    return (state[0], stay), done, answer


@config_dataclass
class Confident:
  """The gate itself, sigmoid(aux['halt']), reaches threshold: a head that was trained to tell whether it is right."""
  threshold: float = 0.9

  def __post_init__(self):
    check_threshold(self.threshold, 0, 1, 'a probability, 0 to 1')

  def init(self, model, x, ctx):
    return ()

  def update(self, state, seen, threshold):
    return state, jax.nn.sigmoid(halt(seen.aux)) >= threshold, seen.new


@config_dataclass
class ACT:
  """Adaptive computation time (Universal Transformers): leaves when the summed gates reach 1 - threshold.

  The answer is the mean of the states after each step, weighted by its gate, and the last one by what is left to 1, so
  that weights sum to one also where the plan ends first.
  """
  threshold: float = 0.01

  def __post_init__(self):
    check_threshold(self.threshold, 0, 1, 'a probability, 0 to 1')

  def init(self, model, x, ctx):
    return jnp.zeros(x.shape[:2]), jnp.zeros_like(x)

  def update(self, state, seen, threshold):
    total, answer = state
    p = jax.nn.sigmoid(halt(seen.aux))
    done = (total + p >= 1 - threshold) | seen.last
    weight = jnp.where(done, 1 - total, p)
    answer += weight[..., None].astype(answer.dtype) * seen.new
    return (total + weight, answer), done, answer


def answers(model: Any) -> int:
  """How many answers a token may have. Raises ConfigError where it is one, a number, over which there is no
  distribution."""
  if model.outputs < 2:
    raise ConfigError(f'exit.rule: it compares laws over answers, but the model has {model.outputs} output, a number; '
                      'take a rule that looks at the state, such as StateChange')
  return model.outputs


def halt(aux: dict[str, Array]) -> Array:
  """The gate's logits, f32[B, T]. Raises ConfigError where the cell has no gate."""
  if 'halt' not in aux:
    raise ConfigError('exit.rule: the cell has no gate to read; take a rule that needs none, such as KL or '
                      'StateChange, or a cell with one (cells/halting.py)')
  return aux['halt'].astype(jnp.float32)


def entropy(logits: Array) -> Array:
  """[..., V] -> nats [...]."""
  log_p = jax.nn.log_softmax(logits)
  return -(jnp.exp(log_p) * log_p).sum(-1)
