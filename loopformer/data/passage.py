"""One text as batches, to be evaluated on whole."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from loopformer.data.tokenizer import before_text
from loopformer.types import ConfigError, whole


def batches(text: str, tokenizer: Any, length: int, *, stride: int | None = None, rows: int = 32, causal: bool = True
            ) -> Iterator[dict[str, np.ndarray]]:
  """Batches in which every token of a text has weight once.

  The text begins as documents do, after the token that begins one (`start` of the tokenizer), or else the one that
  ends one. Only the first window does: the others begin within the text, as windows do that are learned from, and as
  those of the harness's rolling likelihood and of transformers' perplexity. Windows of up to `length` tokens begin
  `stride` tokens apart, and each counts those of its tokens that none before it did: with a stride of the length
  every token is read once, and the first of a window is predicted from one token alone; with a shorter one every
  token but the first ones is predicted from length - stride tokens or more, at length / stride times the cost. A text
  that is shorter than a window makes one of its own length.

  Args:
    tokenizer: its ids and their end.
    length: tokens that a window reads at most.
    stride: None for `length`.
    rows: windows of a batch, at most; the last is filled up with rows that do not count (`counted`).
    causal: whether no token reads what follows it, as what fills up the last window does.

  Yields:
    tokens, targets, positions, i32[rows, T], weights, f32[rows, T], counted, f32[rows]; for models that are not causal
    also segments, i32[rows, T], 1 for the text and 0 for what fills up, so that the text does not read it.

  Raises:
    ConfigError: a text without tokens, or a stride beyond the length.
  """
  length, rows = whole('length', length, 1), whole('rows', rows, 1)
  stride = length if stride is None else whole('stride', stride, 1, length)
  ids = np.asarray([before_text(tokenizer), *tokenizer.encode(text)], np.int32)
  count = len(ids) - 1
  if not count:
    raise ConfigError('text: it is empty; give one with a token at least')
  length = min(length, count)
  starts = [0, *range(stride, count - length + stride, stride)]  # the last reaches the end, or beyond
  rows = min(rows, len(starts))
  index = np.arange(length, dtype=np.int32)
  for first in range(0, len(starts), rows):
    some = np.asarray(starts[first:first + rows])
    at = np.zeros((rows, length), np.int64)
    at[:len(some)] = some[:, None] + index
    fresh = np.where(some == 0, 0, length - stride)  # the first of a window that no window before it counts
    weights = np.zeros((rows, length), np.float32)
    weights[:len(some)] = (index >= fresh[:, None]) & (at[:len(some)] < count)
    segments = {} if causal else {'segments': (at < count).astype(np.int32)}
    yield {'tokens': ids[np.minimum(at, count - 1)], 'targets': ids[np.minimum(at + 1, count)],
           'positions': np.broadcast_to(index, (rows, length)), 'weights': weights,
           'counted': (np.arange(rows) < len(some)).astype(np.float32), **segments}
