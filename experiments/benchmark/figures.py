"""Figures of compiled programs that no machine's speed enters: what a change must not make worse unnoticed.

    python -m experiments.benchmark.figures

Compiles a training step and decoding at a small size, and prints as JSON by program: GFLOP and MB that the compiler
counts (the body of a loop once), MB of temporary memory, and instructions. tests/experiments/test_figures.py holds them
to those in tests/figures.json.
"""
from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp

from experiments.benchmark.compile import count_instructions
from experiments.benchmark.sizes import MEGA, Ours, Size, make_model, short_of, with_short
from loopformer import loop
from loopformer.inference import engine
from loopformer.inference.flat import flattened
from loopformer.model import init_params

SMALL = Size(batch=4, length=64, width=64, heads=4, hidden=128, vocab=512, layers=2, loops=4, short=2)


def train_step(remat):
  """The compiled step with two rollouts."""
  return Ours(SMALL, make_model(SMALL, remat), with_short(SMALL, short_of(SMALL))).lower().compile()


def decoding(rows: int):
  """The compiled rounds of the engine, so many rows at a time."""
  model = make_model(SMALL)
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
  model, params = flattened(model, params, transpose=rows > 1)
  batch = engine.empty_rows(model, params, rows, SMALL.length, SMALL.loops)
  return engine.decode.lower(model, 4, 0, None, params, batch, None, None, jnp.int32(0), jnp.bool_(False)).compile()


PROGRAMS = {'train, PerLayer': lambda: train_step(loop.PerLayer()), 'decode, 8 rows': lambda: decoding(8)}


def figures() -> dict[str, dict[str, float]]:
  """The figures of every program."""
  found = {}
  for name, compiled in ((name, compile_()) for name, compile_ in PROGRAMS.items()):
    cost = compiled.cost_analysis()
    found[name] = {'GFLOP': cost['flops'] / 1e9, 'MB read and written': cost['bytes accessed'] / MEGA,
                   'temporary MB': compiled.memory_analysis().temp_size_in_bytes / MEGA,
                   'instructions': count_instructions(compiled.as_text())}
  return found


if __name__ == '__main__':
  print(json.dumps(figures(), indent=1))
