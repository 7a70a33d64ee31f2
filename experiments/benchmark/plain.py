"""A decoder as one writes it in plain JAX, to read the library's numbers beside.

Functions on a dictionary of arrays; every layer of every loop stands in the program by itself, attention holds its
whole matrix of scores, the head the logits of all tokens, and nothing is computed twice. Nothing else of it is used.
"""
from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.benchmark.sizes import OPTIM, TRAIN_STEPS, Size, make_batch
from loopformer.model import Looped, init_params, parameter_roles

EPS = 1.1920929e-07


def rms_norm(x, scale=1.0):
  x = x.astype(jnp.float32)
  return scale * x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + EPS)


def attention(x, layer, heads):
  batch, length, width = x.shape
  q, k, v = jnp.split(x @ layer['qkv'].astype(x.dtype), 3, -1)
  q, k, v = (part.reshape(batch, length, heads, -1) for part in (q, k, v))
  scores = jnp.einsum('bqhd,bkhd->bhqk', q, k).astype(jnp.float32) / (width // heads) ** 0.5
  scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
  mixed = jnp.einsum('bhqk,bkhd->bqhd', jax.nn.softmax(scores).astype(x.dtype), v)
  return mixed.reshape(x.shape) @ layer['out'].astype(x.dtype)


def decoder(params, tokens, heads, loops, dtype):
  """Tokens i32[B, T] -> logits f32[B, T, V]; dtype: of products, what layers add up to is float32."""
  x = params['embedding'][tokens] + params['positions'][:tokens.shape[1]]
  for _ in range(loops):
    for layer in params['layers']:
      x = x + attention(rms_norm(x).astype(dtype), layer, heads)
      hidden = jax.nn.gelu(rms_norm(x).astype(dtype) @ layer['up'].astype(dtype), approximate=False)
      x = x + hidden @ layer['down'].astype(dtype)
  x = rms_norm(x, params['scale']).astype(dtype)
  return (x @ params['embedding'].T.astype(dtype)).astype(jnp.float32)


def loss(params, tokens, targets, heads, loops, dtype):
  """The mean cross-entropy of the next token."""
  logits = decoder(params, tokens, heads, loops, dtype)
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


class PlainStep:
  """A training step of `layers` layers applied `loops` times, from the parameters of the library's model."""

  def __init__(self, size: Size, model: Looped, loops: int):
    self._size, self._model, self._optimizer = size, model, OPTIM.make(TRAIN_STEPS, parameter_roles(model))
    self._loss = functools.partial(loss, heads=size.heads, loops=loops, dtype=size.dtype)
    self.step = jax.jit(self._update, donate_argnums=0)

  def _make(self):
    params = from_params(self._model, init_params(self._model, jax.random.fold_in(jax.random.key(0), 0)))
    return params, self._optimizer.init(params)

  def _update(self, state, tokens, targets):
    params, moments = state
    value, grads = jax.value_and_grad(self._loss)(params, tokens, targets)
    updates, moments = self._optimizer.update(grads, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  def _tokens(self):
    batch = make_batch(self._size)
    return batch['tokens'], batch['targets']

  def lower(self) -> Any:
    """The traced step; nothing is allocated."""
    return self.step.lower(jax.eval_shape(self._make), *self._tokens())

  def start(self, compiled: Any = None):
    """Allocates state and batch; compiles the step, where it is not given."""
    self.compiled = compiled or self.lower().compile()
    self._state, self._batch = jax.jit(self._make)(), jax.device_put(self._tokens())

  def __call__(self) -> float:
    """One step; its loss."""
    self._state, value = self.compiled(self._state, *self._batch)
    return float(value)


def from_params(model: Looped, params: Any) -> dict[str, Any]:
  """The plain decoder's parameters, of a model as `sizes.make_plain` makes it."""
  block, heads = params['cell']['core']['block'], model.cell.core.block.attn.heads
  width = model.read_in.width
  layers = []
  for i in range(model.cell.core.depth):
    qkv_DHcd = block['attn']['qkv']['kernel'][i].reshape(width, heads, 3, width // heads)
    layers.append({'qkv': qkv_DHcd.transpose(0, 2, 1, 3).reshape(width, 3 * width),
                   'out': block['attn']['out']['kernel'][i], 'up': block['mlp']['up']['kernel'][i],
                   'down': block['mlp']['down']['kernel'][i]})
  return {'embedding': params['read_in']['embedding'], 'positions': params['read_in']['positions'],
          'scale': params['read_out']['norm']['scale'], 'layers': layers}
