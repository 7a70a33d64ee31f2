"""Ways in and out of the model: embeddings of tokens and vectors, and heads."""
from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from loopformer import roles
from loopformer.nn.layers import Linear, Normal, RMSNorm
from loopformer.roles import Role
from loopformer.types import Array, ConfigError


def check_length(length: int, positions: int):
  """Raises ConfigError where a sequence is longer than a table of positions, whose last row would serve all the rest.
  """
  if length > positions:
    raise ConfigError(f'tokens: {length} a row, more than the {positions} positions of the model (read_in.length); '
                      'shorten the rows, or train a model with more positions')


class TokenEmbed(nn.Module):
  """x = E[tokens] + P[positions]: token embedding and learned absolute positions, both N(0, std^2).

  vocab: rows of E (at least the tokenizer's size); length: rows of P, the longest sequence that can be read;
  dtype: of the result, and so of the loop's state.
  """
  vocab: int
  width: int
  length: int
  std: float = 0.02
  dtype: str = 'float32'

  def setup(self):
    self.embedding = roles.param(self, 'embedding', Normal(self.std), (self.vocab, self.width), Role(tensor=-2))
    self.positions = self.param('positions', Normal(self.std), (self.length, self.width))

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """i32[B, T] twice (position -1: padding) -> [B, T, D]. Raises ConfigError where T is more than `length`."""
    check_length(tokens.shape[1], self.length)
    return (self.embedding[tokens] + self.positions[jnp.maximum(pos, 0)]).astype(self.dtype)

  def table(self) -> Array:
    """E, [V, D]."""
    return self.embedding

  def example(self) -> Array:
    """The smallest input, for initialisation."""
    return jnp.zeros((1, 1), jnp.int32)


class Tokens(nn.Module):
  """x = scale * E[tokens], E ~ N(0, std^2): positions, if any, are attention's (positions.py), or none.

  length: the longest sequence that the model is meant for; nothing in it depends on that. init: what draws E instead.
  """
  vocab: int
  width: int
  length: int
  std: float = 0.02
  scale: float = 1.0
  dtype: str = 'float32'
  init: Any = None

  def setup(self):
    init = self.init or Normal(self.std)
    self.embedding = roles.param(self, 'embedding', init, (self.vocab, self.width), Role(tensor=-2))

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """i32[B, T] -> [B, T, D]."""
    return (self.scale * self.embedding[tokens]).astype(self.dtype)

  def table(self) -> Array:
    """E, [V, D]."""
    return self.embedding

  def example(self) -> Array:
    """The smallest input, for initialisation."""
    return jnp.zeros((1, 1), jnp.int32)


class Vectors(nn.Module):
  """x = tokens W + b + P[positions]: inputs that are vectors already (in-context regression).

  inputs: their width; length: rows of P. W ~ N(0, 1 / (3 inputs)), the spread of PyTorch's default for a Linear: a loop
  that adds x to a normed state hears nothing of a much smaller one. P ~ N(0, std^2).
  """
  inputs: int
  width: int
  length: int
  std: float = 0.02
  dtype: str = 'float32'
  vocab = 0

  @nn.compact
  def __call__(self, tokens: Array, pos: Array) -> Array:
    """f32[B, T, inputs], i32[B, T] -> [B, T, D]. Raises ConfigError where T is more than `length`, or vectors have
    another width."""
    if tokens.ndim != 3 or tokens.shape[2] != self.inputs:
      raise ConfigError(f'model.read_in.inputs = {self.inputs}: the tokens of the batch have the shape {tokens.shape}, '
                        f'and are to be vectors [B, T, {self.inputs}]; set it to their width, or take another task')
    check_length(tokens.shape[1], self.length)
    positions = self.param('positions', Normal(self.std), (self.length, self.width))
    x = Linear(self.width, (3 * self.inputs) ** -0.5, bias=Normal(0.0), name='vectors')(tokens)
    return (x + positions[jnp.maximum(pos, 0)]).astype(self.dtype)

  def example(self) -> Array:
    """The smallest input, for initialisation."""
    return jnp.zeros((1, 1, self.inputs))


class TiedHead(nn.Module):
  """z = norm(x); logits = z E^T, with the matrix of `read_in`."""
  norm: nn.Module = RMSNorm()

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda: nothing."""
    return x

  def __call__(self, x: Array) -> Array:
    return self.norm(x)

  def table(self, read_in: Any) -> Array:
    """The head's matrix, [V, D]."""
    return read_in.table()

  def outputs_of(self, read_in: Any) -> int:
    """Rows of that matrix."""
    return read_in.vocab


class TwiceNormedHead(TiedHead):
  """As TiedHead, whose norm is also that of the state before the coda (Huginn's n_c)."""

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda."""
    return self.norm(x)


class Head(nn.Module):
  """z = norm(x); answers = z W^T with a matrix of its own, [outputs, D]: a vocabulary, or the numbers of a regression.
  """
  outputs: int
  norm: nn.Module = RMSNorm()
  std: float = 0.02

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda: nothing."""
    return x

  def __call__(self, x: Array) -> Array:
    return self.norm(x)

  @nn.compact
  def table(self, read_in: nn.Module) -> Array:
    """The head's matrix, [outputs, D]."""
    return roles.param(self, 'kernel', Normal(self.std), (self.outputs, read_in.width), Role(tensor=-2))

  def outputs_of(self, read_in: nn.Module) -> int:
    """Rows of that matrix."""
    return self.outputs
