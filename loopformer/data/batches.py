"""Windows of a token stream, and batches of them: shuffled, packed, divided over processes, resumable.

grain is imported only where it is used.
"""

import dataclasses

import numpy as np

from loopformer.data.prepared import TokenStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joined:
  """Part: documents in a window are one sequence and may attend across (GPT style)."""

  def arrange(self, tokens: np.ndarray, eos: int) -> dict[str, np.ndarray]:
    """Tokens i32[T] -> weights f32[T] (all 1), positions i32[T] (0 .. T-1)."""
    del eos
    length = len(tokens)
    return {'weights': np.ones(length, np.float32), 'positions': np.arange(length, dtype=np.int32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separate:
  """Part: documents in a window are separate segments, and no document predicts the start of the next."""

  def arrange(self, tokens: np.ndarray, eos: int) -> dict[str, np.ndarray]:
    """Tokens i32[T] -> weights f32[T] (0 at eos), positions i32[T] from 0 and segments i32[T] from 1."""
    ends = tokens == eos
    index = np.arange(len(tokens), dtype=np.int32)
    starts = np.zeros_like(index)
    starts[1:] = np.where(ends[:-1], index[1:], 0)
    return {
      'weights': (~ends).astype(np.float32),
      'positions': index - np.maximum.accumulate(starts),
      'segments': 1 + np.cumsum(starts > 0, dtype=np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Windows:
  """A random access source of training windows: window i holds stream tokens i*length .. i*length + length.

  Element: tokens, targets (the next tokens), positions, all i32[T], and weights f32[T], 0 where the target is `start`,
  which begins documents and is nothing to learn; segments i32[T] where documents are separate.
  """

  stream: TokenStream
  length: int
  eos: int
  documents: Joined | Separate = Joined()
  start: int | None = None

  def __len__(self) -> int:
    return max(0, self.stream.tokens - 1) // self.length

  def __getitem__(self, index) -> dict[str, np.ndarray]:
    # Grain reads a few elements by numpy integers.
    i = int(index)
    if not 0 <= i < len(self):
      raise IndexError(f'window {i} of {len(self)}')
    ids = self.stream.window(i * self.length, self.length + 1)
    tokens, targets = ids[:-1], ids[1:]
    arranged = self.documents.arrange(tokens, self.eos)
    if self.start is not None:
      arranged['weights'] = arranged['weights'] * (targets != self.start)
    return {'tokens': tokens, 'targets': targets, **arranged}


def batches(dataset, *, batch: int, process: int = 0, processes: int = 1):
  """This process's rows of each global batch, as a grain IterDataset; leaves are [batch // processes, ...].

  Global batch s is rows s*batch .. (s+1)*batch - 1 of the dataset (a grain MapDataset of single examples), of which
  process p takes every `processes`-th from p on; a last incomplete batch is dropped. The iterator's state counts
  global batches, so it is the same on all processes and can be restored with another number of them.
  ValueError if `processes` does not divide `batch`, or if the dataset holds fewer examples than a batch.
  """
  import grain

  if batch < 1 or batch % processes:
    raise ValueError(f'train.batch={batch} must be a positive multiple of processes={processes}')
  if not 0 <= process < processes:
    raise ValueError(f'process={process} is not one of the {processes} processes')
  examples = _examples(dataset)
  if examples < batch:
    raise ValueError(
      f'the dataset holds {examples} examples, fewer than train.batch={batch}: use a smaller train.batch or '
      'task.length, or a larger corpus'
    )
  # Whole batches only: else processes could be left with unequal numbers of them.
  rows = dataset.slice(slice(process, len(dataset) // batch * batch, processes))
  local = rows.batch(batch // processes, drop_remainder=True)
  return local.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=8))


def _examples(dataset) -> int:
  """Examples in one epoch: those below an endless repeat."""
  endless = 2**62
  while len(dataset) >= endless and len(dataset.parents) == 1:
    dataset = dataset.parents[0]
  return len(dataset)
