"""Tokenizers of tasks that are made: a list of symbols, each of which is a token."""
from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

import numpy as np

from loopformer import reading, storage
from loopformer.data.tokenizer import Tokenizer
from loopformer.types import ConfigError

FILE = 'symbols.json'
REMEDY = 'save the model again'


@dataclasses.dataclass(frozen=True)
class SymbolTokenizer(Tokenizer):
  """Ids are places in a list of symbols; text is symbols apart by spaces, or run together where each is one character.

  Run together, `12` may be 1 and 2, or a symbol of its own: a text that can be read both ways is refused.
  """
  symbols: tuple[str, ...]

  @property
  def vocab_size(self) -> int:
    return len(self.symbols)

  @property
  def eos(self) -> int:
    return len(self.symbols) - 1

  @functools.cached_property
  def _ids(self) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(self.symbols)}

  def encode(self, text: str) -> list[int]:
    words = [text] if text in self._ids else text.split()
    if len(words) == 1 and words[0] not in self._ids:
      text = words[0]
      words = list(text)
    unknown = [word for word in words if word not in self._ids]
    if unknown:
      raise ConfigError(f'prompt {text!r}: {unknown[0]!r} is not a symbol of this task; its symbols: '
                        f'{" ".join(self.symbols)}')
    longer = [symbol for symbol in self.symbols if len(symbol) > 1 and symbol in text] if words == list(text) else []
    if longer:
      raise ConfigError(f'prompt {text!r}: {longer[0]!r} is one symbol of this task, or {len(longer[0])}; put spaces '
                        'between symbols')
    return [self._ids[word] for word in words]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    outside = [i for i in ids if not 0 <= i < self.vocab_size]
    if outside:
      raise ValueError(f'id {outside[0]} is outside 0..{self.vocab_size - 1}')
    return ' '.join(self.symbols[i] for i in ids if i != self.eos)

  def byte_lengths(self) -> np.ndarray:
    return np.zeros(self.vocab_size, np.int32)  # symbols are not text, and have no bytes

  def fingerprint(self) -> str:
    return hashlib.sha256(json.dumps(self.symbols).encode()).hexdigest()

  def save(self, folder: str | os.PathLike):
    folder = storage.path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write(folder / FILE, json.dumps(self.symbols) + '\n')


def saved_in(folder: Any) -> SymbolTokenizer | None:
  """The tokenizer of symbols that was saved in a folder; None where none was. Raises ConfigError where it is damaged.
  """
  path = storage.path(folder) / FILE
  if not path.exists():
    return None
  symbols = reading.read_json(path, REMEDY, list)
  if not symbols or not all(isinstance(symbol, str) for symbol in symbols):
    raise ConfigError(f'{path} is damaged: it is no list of texts; {REMEDY}')
  return SymbolTokenizer(tuple(symbols))
