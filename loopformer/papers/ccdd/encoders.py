"""Encoders of clean sequences: what the latents of CCDD are noised from. Frozen parts, that learn nothing."""
from __future__ import annotations

import jax
import jax.numpy as jnp

from loopformer import plans
from loopformer.model import run_batch
from loopformer.objective import Own
from loopformer.types import Array, ConfigError, Params, config_dataclass, whole


def standardised(z: Array) -> Array:
  """Every token's channels [..., d] with mean zero and variance one."""
  z = z.astype(jnp.float32)
  return (z - z.mean(-1, keepdims=True)) * jax.lax.rsqrt(z.var(-1, keepdims=True) + 1e-6)


@config_dataclass
class RandomContext:
  """z_i = standardised([2 onehot(x_i) - 1/2, G x]): the token itself, and a fixed random linear map G of the whole
  sequence, of weights N(0, 1 / length). Anything that is no token of the data, such as MASK, reads as none.

  vocab: tokens of the data; length: of every sequence; context: numbers of G x; seed: of G.
  """
  vocab: int
  length: int
  context: int = 4
  seed: int = 0
  teacher = None  # whose weights it needs

  def __post_init__(self):
    for name in ('vocab', 'length', 'context'):
      whole(f'RandomContext.{name}', getattr(self, name), 1)

  @property
  def width(self) -> int:
    """d, channels of a latent."""
    return self.vocab + self.context

  def __call__(self, tokens: Array, segments: Array | None, weights: Params | None) -> Array:
    """i32[B, T] -> f32[B, T, d]. Raises ConfigError where T is not `length`."""
    if tokens.shape[1] != self.length:
      raise ConfigError(f'RandomContext.length = {self.length}: sequences have {tokens.shape[1]} tokens; '
                        'set it to that')
    own = jax.nn.one_hot(tokens, self.vocab)
    matrix = jax.random.normal(jax.random.key(self.seed), (self.length, self.vocab, self.context)) / self.length ** 0.5
    of_all = jnp.broadcast_to(jnp.einsum('BTV,TVc->Bc', own, matrix)[:, None], (*tokens.shape, self.context))
    return standardised(jnp.concatenate([2 * own - 0.5, of_all], -1))


@config_dataclass
class RandomTokens:
  """z_i = standardised(a random vector of x_i): latents that say nothing of the context, the control for those that do.

  vocab: tokens of the data, MASK not counted; width: d, channels of a latent; seed: of the vectors.
  """
  vocab: int
  width: int
  seed: int = 0
  teacher = None

  def __post_init__(self):
    whole('RandomTokens.vocab', self.vocab, 1)
    whole('RandomTokens.width', self.width, 2, why='one channel alone has no variance')

  def __call__(self, tokens: Array, segments: Array | None, weights: Params | None) -> Array:
    """As of RandomContext."""
    return standardised(jax.random.normal(jax.random.key(self.seed), (self.vocab + 1, self.width))[tokens])


@config_dataclass
class Hidden:
  """z_i = standardised(the first `width` numbers of the last state of a model, after its coda and norm).

  folder: a work folder, of a model of ours or an imported one (`--mode=import`); loops: of its steps, all by default.
  mask: what it reads in the place of ids that it does not know, such as MASK.
  """
  folder: str
  width: int = 32
  loops: int | None = None
  mask: int = 0
  paths = ('folder',)

  def __post_init__(self):
    whole('Hidden.width', self.width, 2, why='one channel alone has no variance')

  @property
  def teacher(self) -> Own:
    """Whose weights it needs."""
    return Own(folder=self.folder)

  def __call__(self, tokens: Array, segments: Array | None, weights: Params | None) -> Array:
    """As of RandomContext. Raises ConfigError where the model's states are narrower than `width`."""
    model = self.teacher.model(None)
    if self.width > model.read_in.width:
      raise ConfigError(f'Hidden.width = {self.width}: states of {self.folder} have {model.read_in.width} numbers; set '
                        'it to that or less')
    batch = {'tokens': jnp.where(tokens < model.read_in.vocab, tokens, self.mask)}
    if segments is not None:
      batch['segments'] = segments
    plan = plans.schedule(plans.resolve(self.loops or model.loops))
    assert weights is not None  # those of its `teacher`
    return standardised(run_batch(model, weights, batch, plan).z[..., :self.width])
