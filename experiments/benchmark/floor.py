"""What no program that computes the same layers can be faster than."""
from __future__ import annotations

import functools
import time
from typing import Any, Callable

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp


def bare_products(core: Any, rows: int, loops: int = 1, table: Any = None,
                  dtype: Any = jnp.float32) -> Callable[[], float]:
  """Seconds of the matrix products of a stack of layers, one after the other.

  core: parameters of a stack, whose kernels are [layers, in, out] and named qkv, out, up (with the gate) and down;
  rows: of x [rows, in]; loops: times the stack; table: [vocab, in], of the logits after it, none by default; dtype: of
  the products.
  """
  layers = layers_of(core, dtype)
  x = jnp.ones((rows, layers[0]['qkv'].shape[0]), dtype)
  table = None if table is None else table.astype(dtype)
  run = jax.jit(functools.partial(products, loops=loops))

  def once():
    start = time.perf_counter()
    jax.block_until_ready(run(x, layers, table))
    return time.perf_counter() - start

  once()
  return once


def layers_of(core: Any, dtype: Any) -> list[dict[str, jax.Array]]:
  """Kernels [in, out] of every layer, by name."""
  kernels = {path[-2]: leaf.astype(dtype) for path, leaf in flatten_dict(core).items() if path[-1] == 'kernel'}
  return [{name: leaf[i] for name, leaf in kernels.items()} for i in range(len(kernels['qkv']))]


def products(x: jax.Array, layers: list[dict[str, jax.Array]], table: jax.Array | None, loops: int) -> jax.Array:
  """Of x [rows, in] and all kernels of all layers, `loops` times, then of the table; between two of a branch a sum over
  columns, so that none need not be computed."""
  def body(_, x):
    for layer in layers:
      for wide, narrow in (('qkv', 'out'), ('up', 'down')):
        y, width = x @ layer[wide], layer[narrow].shape[0]
        x = (y[:, :width] + y.sum(1, keepdims=True)) @ layer[narrow]
    return x
  x = jax.lax.fori_loop(0, loops, body, x)
  return x if table is None else x @ table.T
