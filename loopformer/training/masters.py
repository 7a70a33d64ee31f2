"""Weights in bfloat16, and those that are trained in float32: a wrapper of optimisers."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from loopformer.roles import Roles
from loopformer.types import ConfigError, Params, config_dataclass


class MastersState(NamedTuple):
  """master: f32, of the parameters that are kept shorter, nothing elsewhere; inner: the state of the optimiser."""
  master: Params
  inner: Any


@config_dataclass
class Masters:
  """The optimiser `of`, which acts on float32 masters of the projections (roles.py); the parameters are these in the
  dtype of the products, so that a step holds, gathers and reads half of the bytes. Give the model's blocks
  dtype='bfloat16'.

  What a pass computes is what it computes of float32 parameters, which it rounds so itself; gradients of projections
  are rounded once more. All other parameters (norms, gates, embeddings) stay in float32. The masters are part of the
  optimiser's state, divided as the parameters; evaluations and checkpoints have them in the parameters' places.
  """
  of: Any

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformationExtraArgs:
    """As optim.AdamW.make."""
    inner = optax.with_extra_args_support(self.of.make(steps, roles))
    if roles and not any(_short(role.dtype) for role in roles.values()):
      raise ConfigError('optim: Masters keeps weights in the dtype of their products, but all of the model\'s are in '
                        'float32; give its blocks dtype = bfloat16, or leave Masters out')

    def init(params):
      if any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(params, is_leaf=_masked)):
        raise ConfigError('optim: Masters holds masters of all projections, but another optimiser gives it a part of '
                          'them; put it around the other')
      whole = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
      master = jax.tree_util.tree_map_with_path(
          lambda path, leaf: jnp.array(leaf) if _short(roles.at(path).dtype) else optax.MaskedNode(), whole)
      return MastersState(master, inner.init(whole))

    def update(updates, state, params, **others):
      whole = _joined(state.master, params)
      updates, own = inner.update(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), state.inner, whole,
                                  **others)
      new = optax.apply_updates(whole, updates)
      master = jax.tree.map(lambda held, leaf: held if _masked(held) else leaf, state.master, new, is_leaf=_masked)
      # The difference is exact in float32, so that the parameter becomes the master, rounded.
      updates = jax.tree.map(lambda held, u, leaf, p: u if _masked(held) else leaf - p.astype(jnp.float32),
                             state.master, updates, new, params, is_leaf=_masked)
      return updates, MastersState(master, own)

    return optax.GradientTransformationExtraArgs(init, update)


def shortened(params: Params, optimizer: Any) -> Params:
  """Parameters as the optimiser with this state keeps them."""
  for state in _states(optimizer):
    params = jax.tree.map(lambda held, leaf: leaf if _masked(held) else leaf.astype(jnp.bfloat16), state.master, params,
                          is_leaf=_masked)
  return params


def exchanged(params: Params, optimizer: Any) -> tuple[Params, Any]:
  """As `averages.exchanged`, of masters and the parameters that are theirs, rounded."""
  found = _states(optimizer)

  def swap(state):
    if not isinstance(state, MastersState):
      return state
    return state._replace(master=jax.tree.map(lambda held, leaf: held if _masked(held) else leaf, state.master, params,
                                              is_leaf=_masked))

  swapped = jax.tree.map(swap, optimizer, is_leaf=lambda leaf: isinstance(leaf, MastersState))
  return (_joined(found[0].master, params) if found else params), swapped


def _states(optimizer: Any) -> list[MastersState]:
  leaves = jax.tree.leaves(optimizer, is_leaf=lambda leaf: isinstance(leaf, MastersState))
  return [leaf for leaf in leaves if isinstance(leaf, MastersState)]


def _joined(master: Params, params: Params) -> Params:
  """The masters, and the parameters that have none."""
  return jax.tree.map(lambda held, leaf: leaf if _masked(held) else held, master, params, is_leaf=_masked)


def _masked(leaf: Any) -> bool:
  return isinstance(leaf, optax.MaskedNode)


def _short(dtype: Any) -> bool:
  return dtype is not None and jnp.dtype(dtype) == jnp.bfloat16
