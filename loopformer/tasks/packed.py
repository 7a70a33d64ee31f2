"""Several problems in one row, each a document of its own."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from loopformer.tasks.generated import Example

Problem = tuple[Sequence[int], Sequence[bool]]


def packed(problem: Callable[[], Problem], length: int, pad: int) -> Example:
  """Problems one after another until the next one does not fit; then padding, which is a document too, and weighs none.

  Positions begin anew with every problem, and its segment has a number of its own, so that none sees another. What
  does not fit is left out, so that the last of a row are the shorter ones.

  Args:
    problem: makes one: ids, and which of them are to be predicted from those before; never the first.

  Raises:
    ValueError: the first one does not fit, or asks for its first id.
  """
  example = {'tokens': np.full(length, pad, np.int32), 'targets': np.full(length, pad, np.int32),
             'weights': np.zeros(length, np.float32), 'positions': np.zeros(length, np.int32),
             'segments': np.zeros(length, np.int32)}
  start = number = 0
  while True:
    ids, asked = problem()
    count = len(ids) - 1
    if asked[0] or not number and count > length:
      raise ValueError(f'{len(ids)} ids (the first is asked for: {asked[0]}) do not fit length = {length}')
    if start + count > length:
      break
    number += 1
    place = slice(start, start + count)
    for name, values in (('tokens', ids[:-1]), ('targets', ids[1:]), ('weights', asked[1:]),
                         ('positions', range(count)), ('segments', number)):
      example[name][place] = values
    start += count
  example['positions'][start:] = np.arange(length - start)
  return example
