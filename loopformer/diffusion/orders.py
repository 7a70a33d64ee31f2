"""Planners of denoising: which hidden positions are written in a step, and which are hidden again.

A planner is a frozen part, called with what a step shows (`Round`); it answers (write bool[B, T], hide bool[B, T]):
hidden positions that keep the token that was drawn for them, and positions that become MASK afterwards. The last step
writes all that is left, and hides nothing, whatever a planner says.
"""
from __future__ import annotations

from fractions import Fraction
from typing import Protocol

from flax import struct
import jax
import jax.numpy as jnp

from loopformer.diffusion.noise import Cosine, Linear, ranks
from loopformer.types import Array, ConfigError, config_dataclass, real, whole

MOST_PARTS = 10_000  # of all steps, in which shares of them are counted


def times_of(step: Array, steps: Array) -> tuple[Array, Array]:
  """(t, s), f32[B]: where step i32[B] of so many, i32[B], begins and ends, from 1 to 0 in equal parts."""
  steps = jnp.maximum(steps, 1)
  return (steps - step) / steps, (steps - step - 1) / steps


@struct.dataclass
class Round:
  """What a planner sees of step j of S, of every sequence.

  step, steps: i32[B], j and S. asked: bool[B, T], positions that are to be made. hidden: bool[B, T], those of them that
  read MASK. tokens: i32[B, T]. drawn: i32[B, T], a token that was drawn for every position. log_p: f32[B, T, V], the
  predictor's own law, at temperature 1. held: f32[B, T], the probability with which a visible token was revealed. keys:
  [B], of this step.
  """
  step: Array
  steps: Array
  asked: Array
  hidden: Array
  tokens: Array
  drawn: Array
  log_p: Array
  held: Array
  keys: Array

  @property
  def times(self) -> tuple[Array, Array]:
    """(t, s), f32[B], as of `times_of`."""
    return times_of(self.step, self.steps)

  def log_of(self, tokens: Array) -> Array:
    """f32[B, T]: log-probabilities of these tokens, i32[B, T]."""
    return jnp.take_along_axis(self.log_p, tokens[..., None], -1)[..., 0]

  def uniform(self, number: int) -> Array:
    """f32[B, T] in [0, 1), a draw of this number, that depends on request, step and position alone."""
    return by_position(jax.vmap(lambda key: jax.random.fold_in(key, number))(self.keys), self.tokens.shape[1])


def by_position(keys: Array, length: int) -> Array:
  """f32[B, T] in [0, 1), of keys [B]; what a position draws does not depend on the length of the row."""
  at = jnp.arange(length)
  return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i)))(at))(keys)


class Order(Protocol):
  """A planner."""

  def check(self, steps: int, count: int):
    """Raises ConfigError where it cannot reveal so many positions in so many steps."""

  def __call__(self, seen: Round) -> tuple[Array, Array]: ...


# By chance -----------------------------------------------------------------------------------------------------------


def masses(alpha_t: Array, alpha_s: Array, sigma: Array | float) -> tuple[Array, Array]:
  """(stays hidden, is written) of a hidden position from t to s, where a visible one is hidden with chance sigma: all
  of any shape, with sum one (ReMDM, 2503.00307, section 3). They are no probabilities where sigma is above
  `most_hidden`.
  """
  gone = jnp.maximum(1 - alpha_t, 1e-9)
  return (1 - alpha_s - sigma * alpha_t) / gone, (alpha_s - (1 - sigma) * alpha_t) / gone


def most_hidden(alpha_t: Array, alpha_s: Array) -> Array:
  """The largest sigma from t to s: min(1, (1 - alpha_s) / alpha_t)."""
  return jnp.minimum(1.0, (1 - alpha_s) / jnp.maximum(alpha_t, 1e-9))


@config_dataclass
class Ancestral:
  """Each hidden position by chance, (alpha_s - alpha_t) / (1 - alpha_t); what is written stays (MDLM)."""
  noise: Linear | Cosine = Linear()

  def check(self, steps: int, count: int):
    """Nothing: it serves all."""

  def __call__(self, seen: Round) -> tuple[Array, Array]:
    t, s = seen.times
    _, written = masses(self.noise.alpha(t), self.noise.alpha(s), 0.0)
    return seen.hidden & (seen.uniform(0) < written[:, None]), jnp.zeros_like(seen.hidden)


@config_dataclass
class Cap:
  """sigma = min(eta, the largest)."""
  eta: float = 0.02

  def __post_init__(self):
    real('Cap.eta', self.eta, '[0, 1]')

  def __call__(self, most: Array, seen: Round) -> Array:
    """f32[B, T]: the chance that a visible position is hidden again, of the largest, f32[B]."""
    return jnp.broadcast_to(jnp.minimum(self.eta, most)[:, None], seen.hidden.shape)


@config_dataclass
class Rescale:
  """sigma = eta times the largest."""
  eta: float = 0.02

  def __post_init__(self):
    real('Rescale.eta', self.eta, '[0, 1]')

  def __call__(self, most: Array, seen: Round) -> Array:
    """As of Cap."""
    return jnp.broadcast_to((self.eta * most)[:, None], seen.hidden.shape)


@config_dataclass
class Doubtful:
  """sigma_i = the largest times softmax(-p_i) over visible positions, p_i the probability with which i was revealed,
  and 0 where a position is hidden (ReMDM-conf)."""

  def __call__(self, most: Array, seen: Round) -> Array:
    """As of Cap."""
    visible = seen.asked & ~seen.hidden
    share = jax.nn.softmax(jnp.where(visible, -seen.held, -1e9), -1)
    return most[:, None] * jnp.where(visible, share, 0.0)


@config_dataclass
class Resampling:
  """As Ancestral, and visible positions are hidden again with chance sigma (ReMDM, 2503.00307). sigma = 0 is Ancestral,
  draw by draw.
  """
  sigma: Cap | Rescale | Doubtful = Cap()
  noise: Linear | Cosine = Linear()

  def check(self, steps: int, count: int):
    """Nothing: it serves all."""

  def __call__(self, seen: Round) -> tuple[Array, Array]:
    t, s = seen.times
    return _resampled(seen, self.noise.alpha(t), self.noise.alpha(s), self.sigma)


@config_dataclass
class Looping:
  """ReMDM-loop: the first part of the steps reveals up to time `on`, the next stay there, hiding visible positions with
  chance `eta` and writing as many; the last part reveals the rest.

  on: the time of the plateau; begins, ends: the shares of the steps at which it begins and ends, to four decimals: a
  step that begins, or ends, there is one of it.
  """
  eta: float = 0.02
  on: float = 0.1
  begins: float = 0.4
  ends: float = 0.8
  noise: Linear | Cosine = Linear()

  def __post_init__(self):
    real('Looping.on', self.on, '(0, 1)')
    real('Looping.begins', self.begins, '(0, 1)')
    real('Looping.ends', self.ends, '(0, 1)')
    if self.ends < self.begins:
      raise ConfigError(f'Looping.ends = {self.ends}: the plateau would end before it begins; '
                        f'set it to {self.begins} or more')
    alpha = float(self.noise.alpha(jnp.float32(self.on)))
    check_sigma('Looping.eta', self.eta, alpha, alpha)

  def check(self, steps: int, count: int):
    """Nothing: it serves all."""

  def _alpha(self, done):
    """At a share of the steps."""
    before = 1 - done / self.begins * (1 - self.on)
    after = (1 - done) / (1 - self.ends) * self.on
    return self.noise.alpha(jnp.where(done < self.begins, before, jnp.where(done <= self.ends, self.on, after)))

  def __call__(self, seen: Round) -> tuple[Array, Array]:
    t, s = seen.times
    first, last = (Fraction(share).limit_denominator(MOST_PARTS)
                   for share in (self.begins, self.ends))  # as they are written
    stays = ((seen.step * first.denominator >= seen.steps * first.numerator)
             & ((seen.step + 1) * last.denominator <= seen.steps * last.numerator))
    alpha_t, alpha_s = self._alpha(1 - t), self._alpha(1 - s)
    return _resampled(seen, alpha_t, alpha_s, lambda most, seen: jnp.broadcast_to(
        jnp.where(stays, jnp.minimum(self.eta, most), 0.0)[:, None], seen.hidden.shape))


def check_sigma(name: str, sigma: float, alpha_t: float, alpha_s: float):
  """Raises ConfigError where visible positions cannot be hidden with this chance: those left would be fewer than none.
  """
  most = float(most_hidden(jnp.float32(alpha_t), jnp.float32(alpha_s)))
  if not 0 <= sigma <= most:
    raise ConfigError(f'{name} = {sigma}: a visible position cannot be hidden with a chance above {most:.4g} there '
                      f'((1 - alpha_s) / alpha_t), nor below 0; set it to 0..{most:.4g}')


def _resampled(seen, alpha_t, alpha_s, sigma):
  hides = sigma(most_hidden(alpha_t, alpha_s), seen)
  _, written = masses(alpha_t[:, None], alpha_s[:, None], hides)
  return seen.hidden & (seen.uniform(0) < written), seen.asked & ~seen.hidden & (seen.uniform(1) < hides)


# By rank -------------------------------------------------------------------------------------------------------------


@config_dataclass
class OfDrawn:
  """The probability of the token that was drawn: what is shown and what is scored agree (LLaDA's low-confidence
  remasking).
  """

  def __call__(self, seen: Round) -> Array:
    """f32[B, T]: the highest is written first."""
    return seen.log_of(seen.drawn)


@config_dataclass
class Likeliest:
  """The probability of the likeliest token (Kim et al., 2502.06768)."""

  def __call__(self, seen: Round) -> Array:
    return seen.log_p.max(-1)


@config_dataclass
class Margin:
  """The difference between the two largest probabilities (Kim et al.)."""

  def __call__(self, seen: Round) -> Array:
    two = jax.lax.top_k(seen.log_p, 2)[0]
    return jnp.exp(two[..., 0]) - jnp.exp(two[..., 1])


@config_dataclass
class LeastEntropy:
  """Minus the entropy."""

  def __call__(self, seen: Round) -> Array:
    return (jnp.exp(seen.log_p) * seen.log_p).sum(-1)


@config_dataclass
class ByChance:
  """A random number: any order alike."""

  def __call__(self, seen: Round) -> Array:
    return seen.uniform(0)


@config_dataclass
class LeftToRight:
  """The leftmost first."""

  def __call__(self, seen: Round) -> Array:
    return -jnp.broadcast_to(jnp.arange(seen.hidden.shape[1], dtype=jnp.float32), seen.hidden.shape)


@config_dataclass
class Ranked:
  """Of n positions and S steps, in every step the floor or ceiling of n / S of highest score, ceilings first (LLaDA).

  blocks: so many parts of the positions, from left to right, come one after the other, each with its share of the
  steps.
  """
  score: OfDrawn | Likeliest | Margin | LeastEntropy | ByChance | LeftToRight = OfDrawn()
  blocks: int = 1

  def __post_init__(self):
    whole('Ranked.blocks', self.blocks, 1)

  def check(self, steps: int, count: int):
    """Raises ConfigError where the blocks do not divide positions or steps."""
    for name, number in (('positions that are to be written', count), ('denoising steps', steps)):
      if number % self.blocks:
        raise ConfigError(f'blocks = {self.blocks}: they do not divide the {number} {name}; give a divisor of both')

  def __call__(self, seen: Round) -> tuple[Array, Array]:
    count = seen.asked.sum(-1)
    size = jnp.maximum(count // self.blocks, 1)[:, None]
    each = jnp.maximum(seen.steps // self.blocks, 1)
    block = (jnp.cumsum(seen.asked, -1) - 1) // size == (seen.step // each)[:, None]
    number = (seen.asked & block).sum(-1)
    now = number // each + (seen.step % each < number % each)
    open_ = seen.hidden & block
    return open_ & (ranks(jnp.where(open_, -self.score(seen), jnp.inf)) < now[:, None]), jnp.zeros_like(open_)


@config_dataclass
class Kept:
  """Every step writes all, and hides the floor of n s least probable of all positions again, those that were visible
  too (MGDM, 2410.14157: top-k with remasking). noise: of the scores, Gumbel's times `noise` and t.
  """
  noise: float = 0.5

  def __post_init__(self):
    real('Kept.noise', self.noise, '[0, inf)')

  def check(self, steps: int, count: int):
    """Nothing: it serves all."""

  def __call__(self, seen: Round) -> tuple[Array, Array]:
    t, s = seen.times
    log_p = seen.log_of(jnp.where(seen.hidden, seen.drawn, seen.tokens))
    u = jnp.clip(seen.uniform(0), 1e-7, 1 - 1e-7)
    score = log_p - self.noise * t[:, None] * jnp.log(-jnp.log(u))
    again = jnp.floor(seen.asked.sum(-1) * s + 1e-4)
    order = ranks(jnp.where(seen.asked, score, jnp.inf))
    return seen.hidden, seen.asked & (order < again[:, None])
