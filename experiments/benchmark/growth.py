"""How the time of a training step grows with every dimension, beside how its arithmetic does."""
from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Iterable, Mapping

import numpy as np

from experiments.benchmark.sizes import Ours, Size, make_model, short_of, spread, take_turns, with_short

AXES = ('loops', 'layers', 'width', 'length', 'vocab', 'batch')
FACTORS = (1, 2, 4)


def growth_suite(size: Size, repeats: int, axes: Iterable[str] = AXES, factors: Iterable[int] = FACTORS,
                 base: Mapping[str, int] | None = None) -> dict[str, list[dict]]:
  """Steps of sizes that grow by one dimension at a time from a quarter of the reference, heads with the width.

  The exponents are slopes of a line through logarithms: 1 is proportional. Time that grows faster than arithmetic is a
  loss at large sizes; slower, that the small ones have costs that do not grow.
  """
  if base is None:
    base = {'batch': size.batch // 2, 'length': size.length // 2, 'loops': size.loops // 2}
  base = dataclasses.replace(size, **base)
  rows, fits = [], []
  for axis in axes:
    steps, flops = {}, {}
    for factor in factors:
      sized = dataclasses.replace(base, **{axis: factor * getattr(base, axis)})
      if axis == 'width':
        sized = dataclasses.replace(sized, heads=factor * base.heads, hidden=factor * base.hidden)
      step = Ours(sized, make_model(sized), with_short(sized, short_of(sized)))
      step.start()
      step()
      steps[factor] = step
      flops[factor] = step.objective.flops(step.model, sized.length) * sized.tokens
    seconds, _ = take_turns(steps, repeats)
    middle = {factor: statistics.median(times) for factor, times in seconds.items()}
    rows += [{'grows': axis, 'to': factor * getattr(base, axis), 's/step': middle[factor],
              'range': spread(seconds[factor]), 'GFLOP': flops[factor] / 1e9,
              'GFLOP/s': flops[factor] / middle[factor] / 1e9} for factor in factors]
    fits.append({'grows': axis, 'time as the power': slope(middle), 'arithmetic as the power': slope(flops),
                 'GFLOP/s at the end, of the start': flops[max(factors)] / middle[max(factors)]
                 / (flops[min(factors)] / middle[min(factors)])})
  return {'growth': rows, 'powers': fits}


def slope(values: Mapping[int, float]) -> float:
  """The exponent of a power law through the points."""
  return float(np.polyfit(*([math.log(number) for number in numbers] for numbers in zip(*values.items())), 1)[0])
