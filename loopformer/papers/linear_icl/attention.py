"""Linear attention that runs gradient descent in context, and its ways in and out (looped in-context learning, 2.2).

A prompt is f32[n + 1, d + 1]: examples (x_i, y_i), and at last the query (x_q, 0); the transpose of the paper's Z. The
state of the loop is the prompt itself: labels turn into residuals, and the query's into -w . x_q.
"""
from __future__ import annotations

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from loopformer import roles
from loopformer.nn.layers import Normal
from loopformer.roles import Role
from loopformer.types import Array, ConfigError, Context

EXACT = jax.lax.Precision.HIGHEST  # errors of 1e-4 are measured


def linear_attention(z: Array, p: Array, q: Array) -> Array:
  """Z + (1/n) P Z M (Z^T Q Z), M = diag(1, .., 1, 0), for z [.., n + 1, D] the transpose of Z; p, q [D, D].

  Without softmax the products may be taken in any order: that of keys and values comes first, so the cost is linear in
  n.
  """
  shown = z[..., :-1, :]
  moment = jnp.einsum('...ni,...nj->...ij', shown, shown, precision=EXACT) / shown.shape[-2]
  mix = jnp.einsum('ki,...kl,jl->...ij', q, moment, p, precision=EXACT)
  return z + jnp.einsum('...ni,...ij->...nj', z, mix, precision=EXACT)


class LinearAttention(nn.Module):
  """Z + (1/n) P Z M (Z^T Q Z), P and Q [D, D] ~ N(0, std^2): one head without softmax, norm or MLP.

  All n + 1 tokens attend to all n examples, also to those that come after them, and none to the query. So it is not
  causal: a state depends on the whole prompt, nothing can be cached, and one row of a batch is one prompt (positions
  and segments are not read).
  """
  std: float = 0.02
  dtype = 'float32'
  layers = 1
  modulated, viewed = False, False

  @nn.compact
  def __call__(self, x: Array, ctx: Context, mod: None, kv: None, layer: Array | int = 0) -> tuple[Array, None]:
    """x [B, n + 1, D] -> (x, None)."""
    if kv is not None:
      raise ConfigError('LinearAttention is not causal and has no cache: give it whole prompts, without kv')
    if mod is not None:
      raise ConfigError('LinearAttention knows no gates and scales: use it in a plain cell')
    if x.shape[-2] < 2:
      raise ConfigError(f'LinearAttention: a prompt of {x.shape[-2]} tokens has no examples; give examples and a query')
    shape = (x.shape[-1],) * 2
    p, q = (roles.param(self, name, Normal(self.std), shape, Role(decayed=False)) for name in ('P', 'Q'))
    return linear_attention(x, p, q), None

  def check(self, width: int, where: str):
    """Raises ConfigError where tokens have no room for an input and a label."""
    if width < 2:
      raise ConfigError(f'{where}width = {width}: a token holds at least one input and a label; use 2 or more')

  def heads_of(self, width: int) -> tuple[int, int]:
    """Raises ConfigError: there is nothing to cache."""
    raise ConfigError('LinearAttention is not causal: there is no cache for it')

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""
    return 4.0 * width * width + 4.0 * width ** 3 / length


class Prompt(nn.Module):
  """e = the tokens as they are, save that the label of the last, the query, is zero whatever was given; no parameters.

  width: d + 1; length: n + 1, the longest prompt that the model is meant for; nothing in it depends on that.
  """
  width: int
  length: int
  dtype = 'float32'
  vocab = 0

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """f32[B, n + 1, d + 1] -> the same."""
    return tokens.at[:, -1, -1].set(0)

  def example(self) -> Array:
    """The smallest input, for initialisation."""
    return jnp.zeros((1, 2, self.width))


class LabelHead(nn.Module):
  """answer = -(the last entry of the state): at the query the prediction, at an example w . x_i - y_i; no parameters.
  """

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda: nothing."""
    return x

  def __call__(self, x: Array) -> Array:
    return x

  def table(self, read_in: nn.Module) -> Array:
    """The head's matrix, [1, D]."""
    return -jax.nn.one_hot(jnp.array([read_in.width - 1]), read_in.width)

  def outputs_of(self, read_in: nn.Module) -> int:
    """Rows of that matrix."""
    return 1


def constructive(inputs: int, rate: float, preconditioner: np.ndarray | None = None) -> dict[str, Array]:
  """P and Q with which every loop is one step w <- w - (rate / n) A X (X^T w - y) of gradient descent, w = 0 at first.

  A, symmetric or not, is the preconditioner [d, d], the identity if absent.

  Raises:
    ConfigError: inputs below 1, or a preconditioner of another shape.
  """
  if inputs < 1:
    raise ConfigError(f'inputs = {inputs}: a function needs an input; use 1 or more')
  matrix = np.eye(inputs) if preconditioner is None else np.asarray(preconditioner, np.float64)
  if matrix.shape != (inputs, inputs):
    raise ConfigError(f'preconditioner of shape {matrix.shape}: give one of shape ({inputs}, {inputs})')
  p, q = np.zeros((2, inputs + 1, inputs + 1))
  p[-1, -1] = 1
  q[:-1, :-1] = -rate * matrix.T
  return {'P': jnp.asarray(p), 'Q': jnp.asarray(q)}
