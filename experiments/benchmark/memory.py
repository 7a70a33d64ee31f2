"""Temporary memory of compiled training steps, by XLA's own account; nothing runs."""
from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Iterable

import jax

from experiments.benchmark.plain import PlainStep
from experiments.benchmark.sizes import (
  MEGA,
  REMATS,
  Ours,
  Size,
  long_alone,
  make_model,
  make_plain,
  short_of,
  with_short,
)
from loopformer import loop
from loopformer.objective import Objective


def memory_suite(size: Size, depths: Iterable[int] = (2, 4, 8, 16, 32)) -> dict[str, list[dict]]:
  """Temporary memory of compiled steps in MB, its growth per loop in states, and arrays of [tokens, V] in the program.

  The program of the two rollouts keeps 2 L - 1 states, because skipped rows of the short one are kept as well. At L = 2
  the short one has a single row, whose loop XLA unrolls; what it then saves is not comparable with deeper programs.
  """
  rows = []
  state = 4 * size.tokens * size.width  # float32
  for remat in REMATS:
    rows.append(memory_row(size, remat, 'long and short', with_short(size, short_of(size))))
  for name, make in (('long alone', lambda size: long_alone(size.loops)),
                     ('long and short', lambda size: with_short(size, short_of(size)))):
    last = None
    for depth in depths:
      deep = dataclasses.replace(size, loops=depth)
      row = memory_row(deep, loop.PerStep(), name, make(deep))
      if last:
        row['states a loop'] = (row['temp MB'] - last['temp MB']) * MEGA / state / (depth - last['loops'])
      rows.append(row)
      last = row
  return {'memory': rows, 'largest': [row for length in (size.length, 4 * size.length)
                                      for row in largest(dataclasses.replace(size, length=length))]}


def largest(size: Size, loops: int = 16, memory: float | None = None, remats: Iterable[Any] = REMATS) -> list[dict]:
  """The largest batch of `size.length` tokens whose step fits into `memory` bytes (the device's, or 4 GB), weights and
  optimizer included: one rollout of `loops` loops, ours and the plain peer of as many layers.

  Memory is about a constant and a share of each sequence, which two compiled batches give; the largest is compiled to
  see what it needs, and those below it until one fits. Where not even one sequence does, the batch is 0, what it needs
  is that of one, and there is no ratio to a plain peer of batch 0.
  """
  if memory is None:
    memory = (jax.devices()[0].memory_stats() or {}).get('bytes_limit', 4e9)
  deep = dataclasses.replace(size, loops=loops)
  steps = {f'plain JAX, {deep.layers} layers {loops} times': lambda size, model: PlainStep(size, model, loops)}
  steps |= {f'ours, {type(remat).__name__}': lambda size, model: Ours(size, model, long_alone(loops))
            for remat in remats}
  rows = []
  for (name, make), remat in zip(steps.items(), [loop.KeepAll(), *remats]):

    def needed(batch):
      sized = dataclasses.replace(deep, batch=batch)
      held = make(sized, make_plain(sized, sized.layers, loops, remat)).lower().compile().memory_analysis()
      return (held.temp_size_in_bytes + held.argument_size_in_bytes + held.output_size_in_bytes
              - held.alias_size_in_bytes)

    few, more = needed(2), needed(4)
    share = (more - few) / 2
    batch = max(int((memory - few) / share) + 2, 1)
    while (needs := needed(batch)) > memory and batch > 1:
      batch -= 1
    rows.append({'step': name, 'length': size.length, 'loops': loops, 'GB': memory / 1e9, 'MB a sequence': share / MEGA,
                 'largest batch': batch if needs <= memory else 0, 'needs GB': needs / 1e9})
  plain = rows[0]['largest batch']
  return [{**row, 'times plain': row['largest batch'] / plain if plain else ''} for row in rows]


def memory_row(size: Size, remat: Any, name: str, objective: Objective) -> dict:
  """One compiled step: its memory, and arrays that it should not hold."""
  compiled = Ours(size, make_model(size, remat), objective).lower().compile()
  return {'rollouts': name, 'remat': type(remat).__name__, 'loops': size.loops,
          'temp MB': compiled.memory_analysis().temp_size_in_bytes / MEGA, 'states a loop': '',
          '[tokens, V] arrays': len(logit_arrays(compiled.as_text(), size))}


def logit_arrays(program: str, size: Size) -> set[str]:
  """Shapes in a program's text that have an axis of V and room for the logits of all tokens."""
  shapes = set(re.findall(r'\[([\d,]+)\]', program))
  dims = {shape: [int(number) for number in shape.split(',') if number] for shape in shapes}
  return {shape for shape, axes in dims.items() if size.vocab in axes and math.prod(axes) >= size.tokens * size.vocab}
