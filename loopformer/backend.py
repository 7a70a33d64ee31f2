"""The backend that programs are made for: one value, read here by all that chooses by it.

It is that of JAX's devices, unless a program is compiled for machines that are not here:

    with backend.compiling_for('tpu'):
      program = step.lower(...).compile()

Traced programs are kept apart by it. What each backend wants was measured (docs/performance.md) or is what its compiler
does with the other choice (docs/plan.md).
"""
from __future__ import annotations

from typing import Any, ContextManager

import jax
import jax.numpy as jnp

from loopformer.types import ConfigError, config_dataclass

_CHOSEN = jax.make_user_context(None)


@config_dataclass
class Backend:
  """What programs of one kind of device look like.

  name: as JAX calls it: 'cpu', 'gpu' (Nvidia's) or 'tpu'; kernels.Fused chooses its kernel by it.
  unrolled: stacks of up to so many layers are written out and not scanned, where there is no cache. A scan stacks what
    its layers save for the backward pass, and the loop around it copies the stack into its own: on a GPU that was up to
    an eighth of a step. On a CPU, where it is less, programs that compile twice as fast are worth more.
  logits_at_once: tokens whose logits are held at a time: few enough for a CPU's caches, and elsewhere enough to keep
    the device busy, and to add to the table's gradient seldom.
  product: the dtype that products of projections are written in; None: that of their operands. An accelerator
    accumulates in float32 whatever it writes, and a wider result would only have to be read again.
  columns: products with up to so many rows (and more than one) are computed with the rows as columns: a CPU's threads
    and registers then have the many outputs to divide, and it takes half the time.
  largest_scatter: the most devices that one sum is scattered over, where these are all devices that there are; of more,
    a TPU's compiler makes the sum whole on every device, and sends twice as much. None: any number.
  qkv_apart: whether queries, keys and values are three products, each in the layout that attention wants. Of one
    product, a TPU's compiler copies all three in every layer and loop.
  sums_contiguous: whether decoding wants kernels [O, I] for a single row too: a CPU multiplies one row by [I, O] well.
  flat: stacks of up to so many layers are written out for decoding, each with kernels of its own: a scan copies them
    out of the stack before it reads them, on a CPU at thrice the traffic.
  merged: whether caches have their heads merged in the last axis (layouts.py).
  """
  name: str
  unrolled: int = 4
  logits_at_once: int = 4096
  product: str | None = None
  columns: int = 0
  sums_contiguous: bool = True
  largest_scatter: int | None = None
  qkv_apart: bool = False
  flat: int = 8
  merged: bool = False


BACKENDS = {backend.name: backend for backend in (
    Backend(name='cpu', unrolled=0, logits_at_once=512, product='float32', columns=64, sums_contiguous=False, flat=64),
    Backend(name='gpu'),
    Backend(name='tpu', sums_contiguous=False, largest_scatter=8, qkv_apart=True, merged=True))}


def current() -> Backend:
  """The backend that a program which is traced now is for."""
  name = _CHOSEN.value or jax.default_backend()
  return BACKENDS.get(name) or Backend(name=name)


def compiling_for(name: str) -> ContextManager[Any]:
  """Within it, programs are traced for another backend. Raises ConfigError where there is none of that name."""
  if name not in BACKENDS:
    raise ConfigError(f'backend = {name!r}: choose from {", ".join(BACKENDS)}')
  return _CHOSEN(name)


def written(dtype: Any) -> Any:
  """What a product of operands of this dtype is written in."""
  return jnp.dtype(current().product or dtype)
