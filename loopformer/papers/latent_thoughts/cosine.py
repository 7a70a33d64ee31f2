"""Looping-inspired regularisation: the blocks of a stack that does not loop are drawn towards one another."""
from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from loopformer.nn.layers import unfused_kernel
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass

EPSILON = 1e-12  # added to the squared norm of a tensor: all zeros have cosine 0, and no gradient


@config_dataclass
class Cosine:
  """1 - mean over groups G of R_G (Reasoning with latent thoughts, section 3); no rollout is read.

    R_G = 1 / (N - k) * sum over layers l < N - k of cos(theta_G of layer l, theta_G of layer l + k)

  The paper prints `loss + lambda * mean R_G`, which would push blocks apart, against its own aim that a large lambda
  gives the looped model. Here `Weighted(lambda, Cosine(...))` adds lambda * (1 - mean R_G): blocks are drawn together,
  and the term is never negative. The gradient goes to both layers of a pair.

  A group is what a parameter of a layer is called within the stack, without '.kernel': 'attn.out', 'mlp.up',
  'norm_attn.scale'. The fused projection is three, 'attn.q', 'attn.k', 'attn.v'; these, 'attn.out', 'mlp.up' and
  'mlp.down' are the paper's six matrices. In a stack of chains, a layer is a chain.

  period: k, layers of a block. heads, kv_heads: of attention, kv_heads if fewer than heads. stack: where the stacked
  layers are among the parameters. groups: which count; None is all, norms and biases included.
  """
  period: int
  heads: int
  kv_heads: int | None = None
  stack: str = 'cell.core.block'
  groups: tuple[str, ...] | None = None
  reads = ()

  def weight(self, batch: Batch) -> Array:
    return jnp.float32(batch['weights'].shape[0])

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout | None, params: Params) -> Array:
    # The value is the same on all devices; times this one's rows, the sum over devices divides out to it.
    return self.weight(batch) * (1 - jnp.mean(jnp.stack([*self.cosines(params).values()])))

  def cosines(self, params: Params) -> dict[str, Array]:
    """R_G by group, f32[] in [-1, 1].

    Raises:
      ConfigError: a stack, group, number of heads or period that the parameters do not have.
    """
    tensors = self._tensors(params)
    if self.groups == () or not set(self.groups or ()) <= set(tensors):
      raise ConfigError(f'groups = {self.groups}: the groups of {self.stack} are {", ".join(tensors)}; name some of '
                        'these, or give None for all')
    layers = len(next(iter(tensors.values())))
    if self.period < 1 or layers % self.period or layers == self.period:
      raise ConfigError(f'period = {self.period} does not divide the {layers} layers of {self.stack} into two blocks '
                        'or more; choose a smaller divisor')
    return {name: _mean_cosine(tensors[name], self.period) for name in self.groups or tensors}

  def _tensors(self, params):
    """Group -> [N, ...]."""
    for i, name in enumerate(names := self.stack.split('.')):
      if name not in params:
        raise ConfigError(f'stack = {self.stack!r}: no {".".join(names[:i + 1])!r} among the parameters; there are '
                          f'{", ".join(params)}')
      params = params[name]
    tensors: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
      name = '.'.join(entry.key for entry in path).removesuffix('.kernel')
      tensors |= self._split(name, leaf) if name.split('.')[-1] == 'qkv' else {name: leaf}
    return tensors

  def _split(self, name, kernel):
    """The fused projection [N, D, outputs] in three."""
    given = f'heads = {self.heads}, kv_heads = {self.kv_heads} of {self.stack}.{name}'
    pieces = unfused_kernel(kernel, self.heads, self.kv_heads or self.heads, given)
    return {name.removesuffix('qkv') + piece: tensor for piece, tensor in zip('qkv', pieces)}


def _mean_cosine(tensor, period):
  """[N, ...] -> f32[], over N - period pairs."""
  blocks = tensor.astype(jnp.float32).reshape(len(tensor) // period, period, -1)
  blocks = blocks * jax.lax.rsqrt(jnp.sum(blocks * blocks, -1, keepdims=True) + EPSILON)
  return jnp.mean(jnp.sum(blocks[:-1] * blocks[1:], -1))


def block_cosines(params: Params, term: Cosine) -> dict[str, float]:
  """R_G by group, for reports; 1 where the blocks are tied. The paper's regularised models reach 0.98."""
  return {name: float(value) for name, value in term.cosines(params).items()}
