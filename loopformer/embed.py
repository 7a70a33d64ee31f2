"""Ways in and out of the model: token embedding, and the head that is tied to it."""
from __future__ import annotations

from flax import linen as nn
import jax.numpy as jnp

from loopformer.blocks import Normal, RMSNorm
from loopformer.types import Array


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
    self.embedding = self.param('embedding', Normal(self.std), (self.vocab, self.width))
    self.positions = self.param('positions', Normal(self.std), (self.length, self.width))

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """i32[B, T] twice (position -1: padding) -> [B, T, D]."""
    return (self.embedding[tokens] + self.positions[jnp.maximum(pos, 0)]).astype(self.dtype)

  def table(self) -> Array:
    """E, [V, D]."""
    return self.embedding


class TiedHead(nn.Module):
  """z = norm(x); logits = z E^T, with the matrix of `read_in`."""
  norm: nn.Module = RMSNorm()

  def __call__(self, x: Array) -> Array:
    return self.norm(x)

  def table(self, read_in: TokenEmbed) -> Array:
    """The head's matrix, [V, D]."""
    return read_in.table()
