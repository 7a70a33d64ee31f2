"""Products with an update of low rank, one for all loops or one for each: a shared block that differs from loop to loop."""
from __future__ import annotations

from typing import Any

from flax import linen as nn
import jax.numpy as jnp

from loopformer import roles
from loopformer.nn.layers import Dense, Normal, by_heads
from loopformer.roles import Role
from loopformer.types import Array, ConfigError, Context


class LowRank(nn.Module):
  """of(x) + (x A) B, A [I, rank] ~ N(0, std^2), B [rank, O] zero at first (LoRA; relaxed recursive transformers).

  loops: None, one A and B for all loops; or a number of sets, of which loop k uses number k, and those after the last use
  the last. It stands as `linear` in attention and MLP. Give `frozen.Freeze` the paths `a` and `b` to train these alone.
  """
  rank: int
  loops: int | None = None
  std: float = 0.02
  of: Any = Dense()

  @nn.compact
  def __call__(self, x: Array, features: int, init: Any, ctx: Context | None = None, *, bias: Any = None,
               gain: Array | None = None, divided: int | None = None, heads: tuple[int, int] | None = None) -> Any:
    """As Dense; the update has no gain."""
    if self.rank < 1 or self.loops is not None and self.loops < 1:
      raise ConfigError(f'linear.rank = {self.rank}, linear.loops = {self.loops}: give 1 or more')
    # In the scope of this module: the parameters of the product lie where they would without it.
    y = self.of.copy(parent=self.scope)(x, features, init, ctx, bias=bias, gain=gain, divided=divided, heads=heads)
    sets = self.loops or 1
    a = roles.param(self, 'a', Normal(self.std), (sets, x.shape[-1], self.rank), Role(tensor=-2 if divided == -2 else None))
    b = roles.param(self, 'b', nn.initializers.zeros, (sets, self.rank, features),
                    Role(tensor=-1 if divided == -1 else None))
    if self.loops is None or ctx is None or ctx.step is None:
      low = jnp.einsum('BTi,ir,ro->BTo', x, a[0].astype(x.dtype), b[0].astype(x.dtype))
    else:
      which = jnp.broadcast_to(jnp.minimum(ctx.step.k, sets - 1), x.shape[:1])  # a sequence may be at a loop of its own
      low = jnp.einsum('BTi,Bir,Bro->BTo', x, a[which].astype(x.dtype), b[which].astype(x.dtype))
    if heads is None:
      return y + low
    return tuple(own + update for own, update in zip(y, by_heads(low, *heads)))
