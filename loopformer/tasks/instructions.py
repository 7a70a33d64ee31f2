"""Answers in chats: conversations that are tokenised once into the work folder, whole, several in a row."""
from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import itertools
import os
from typing import Any

import numpy as np

from loopformer import storage
from loopformer.data import prepared
from loopformer.data.chat import ChatTokenizer, Marked, SavedTokenizer
from loopformer.data.corpus import Conversations
from loopformer.data.tokenizer import load_tokenizer
from loopformer.inference import measures
from loopformer.tasks.generated import Example
from loopformer.tasks.packed import packed
from loopformer.tasks.text import mixed
from loopformer.types import ConfigError, config_dataclass, whole

BLOCK = 2 ** 22  # numbers of a stream that are looked through at a time


@config_dataclass
class Instructions:
  """Task: say the answers of conversations, token by token; what others say is read, and not asked for.

  Conversations stand in rows of `length` tokens, one after another until the next does not fit, each a segment with
  positions of its own. One that is longer than a row is cut at its end; where no answer begins before the cut it is
  left out. Both are counted, and told when the data are prepared.

  tokenizer: a part, of a folder such as the one that the first weights come from. template: a file of a chat template,
  in the place of the tokenizer's own. folder: as of `Text`.
  """
  corpus: Conversations
  tokenizer: SavedTokenizer
  length: int = 1024
  template: str | None = None
  folder: str | None = None
  measure: measures.Tokens = measures.Tokens()
  paths = ('folder', 'template')

  def __post_init__(self):
    whole('task.length', self.length, 2)

  @property
  def splits(self) -> dict[str, int]:
    """Name of each split that is not trained on -> tokens of its examples."""
    return {'validation': self.length}

  @property
  def _marked(self) -> Marked:
    return Marked(of=self.tokenizer, template=self.template)

  def prepare(self, workdir: str | os.PathLike, log: Callable = print) -> ChatTokenizer:
    """Tokenises the conversations, or reuses them; ConfigError if a split has none that can be asked for."""
    prepared.prepare(self.corpus, self._marked, self._folder(workdir), log=log)
    for split in prepared.SPLITS:
      rows = self.rows(workdir, split)
      log(f'data: {split} {len(rows.documents):,} conversations in {len(rows):,} rows of {self.length}, '
          f'{rows.filled:.0%} filled; {rows.cut:,} were cut, {rows.left_out:,} left out because no answer begins in '
          f'{self.length} tokens')
      if not len(rows):
        raise ConfigError(f'task.length = {self.length}: no conversation of the {split} split has an answer that '
                          'begins within it; raise it')
    return self.tokenizer_of(workdir)

  def verify(self, workdir: str | os.PathLike, log: Callable = print):
    """Reads all data again; ValueError if it is not what was prepared."""
    prepared.verify(self.corpus, self._marked, self._folder(workdir), log)

  def tokenizer_of(self, workdir: str | os.PathLike) -> ChatTokenizer:
    """The tokenizer of the prepared data, with its template; the end of a turn is an end of what is generated."""
    marked: Any = load_tokenizer(storage.path(self._folder(workdir)) / 'tokenizer')
    return marked.of

  def rows(self, workdir: str | os.PathLike, split: str) -> Rows:
    """The rows of a split, in one order."""
    stream = prepared.open_split(self._folder(workdir), split)
    return Rows(stream=stream, length=self.length, end=2 * self.tokenizer_of(workdir).vocab_size,
                pad=self.tokenizer_of(workdir).eos)

  def examples(self, workdir: str | os.PathLike, split: str, seed: int):
    """As `Text.examples`, of rows."""
    import grain
    rows = grain.MapDataset.source(self.rows(workdir, split))
    return rows.shuffle(mixed(seed)).repeat() if split == 'train' else rows.shuffle(mixed(0))

  def _folder(self, workdir) -> str:
    return str(storage.path(workdir) / 'data') if self.folder is None else self.folder


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
  """A random access source of rows of whole conversations, as `tasks.packed` lays them out.

  stream: numbers 2 id + (1 where it is asked for); end: the one after a conversation; pad: fills up.
  """
  stream: prepared.TokenStream
  length: int
  end: int
  pad: int

  @functools.cached_property
  def _found(self) -> tuple[np.ndarray, int, int]:
    """(start and ids of every conversation that has an answer in a row, how many are cut, how many have none)."""
    ends = [start + np.flatnonzero(self.stream.window(start, min(BLOCK, self.stream.tokens - start)) == self.end)
            for start in range(0, self.stream.tokens, BLOCK)]
    ends = np.concatenate(ends)
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes, room = ends - starts, self.length + 1
    long = np.flatnonzero(sizes > room)
    silent = [i for i in long.tolist() if not (self.stream.window(int(starts[i]), room) % 2).any()]
    kept = np.ones(len(starts), bool)
    kept[silent] = False
    return np.stack([starts, np.minimum(sizes, room)], 1)[kept], len(long) - len(silent), len(silent)

  @property
  def documents(self) -> np.ndarray:
    """i64[conversations, 2]: where each begins in the stream, and of how many ids."""
    return self._found[0]

  @property
  def cut(self) -> int:
    return self._found[1]

  @property
  def left_out(self) -> int:
    return self._found[2]

  @functools.cached_property
  def _firsts(self) -> list[int]:
    """The first conversation of every row, and after them how many there are."""
    firsts, used = [], self.length
    for i, count in enumerate((self.documents[:, 1] - 1).tolist()):  # the last id of each is a target alone
      if used + count > self.length:
        firsts.append(i)
        used = 0
      used += count
    return [*firsts, len(self.documents)]

  @property
  def filled(self) -> float:
    """The share of the rows' tokens that are of conversations."""
    return float((self.documents[:, 1] - 1).sum()) / max(len(self) * self.length, 1)

  def __len__(self) -> int:
    return len(self._firsts) - 1

  def __getitem__(self, index) -> Example:
    i = int(index)
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {len(self)}')
    numbers = (self.stream.window(start, count) for start, count in
               self.documents[self._firsts[i]:self._firsts[i + 1]].tolist())
    whole_row = itertools.chain(((own // 2, own % 2 > 0) for own in numbers), itertools.repeat(self._none))
    return packed(functools.partial(next, whole_row), self.length, self.pad)

  @property
  def _none(self):
    """What does not fit any row: it ends one."""
    return np.zeros(self.length + 2, np.int32), np.zeros(self.length + 2, bool)
