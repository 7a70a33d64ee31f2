"""Files that others may have written: read whole, as text or as JSON, or refused by their path, with what is wrong."""
from __future__ import annotations

import codecs
from collections.abc import Iterator
import contextlib
import json
import os
from typing import Any, BinaryIO

from loopformer import storage
from loopformer.types import ConfigError

MARK = '\ufeff'  # a byte-order mark, where a text begins with it
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # that of UTF-32 LE begins with the first


@contextlib.contextmanager
def opened(name: str | os.PathLike, remedy: str) -> Iterator[BinaryIO]:
  """The bytes of a file, as a file.

  Raises:
    ConfigError: it is absent, a folder, or may not be read; the message ends with the remedy.
  """
  try:
    file = storage.path(name).open('rb')
  except OSError as error:
    what = {FileNotFoundError: 'there is no such file', IsADirectoryError: 'it is a folder, not a file'}.get(
        type(error), f'it cannot be read ({error.strerror or error})')
    raise ConfigError(f'{os.fspath(name)}: {what}; {remedy}') from error
  with file:
    yield file


def contents(name: str | os.PathLike, remedy: str) -> bytes:
  """What a file holds. Raises ConfigError as `opened`."""
  with opened(name, remedy) as file:
    return file.read()


def decoded(data: bytes, where: Any, remedy: str = 'save it as UTF-8') -> str:
  """A text, without the byte-order mark that some editors and tables put before it.

  Raises:
    ConfigError: it is not UTF-8.
  """
  head = data[:1000]
  nulls = max(head[::2].count(0), head[1::2].count(0))  # every other byte of most letters is 0 there
  if data.startswith(WIDE) or len(head) > 3 and 4 * nulls > len(head):
    raise ConfigError(f'{where} is not UTF-8, but looks like UTF-16 or UTF-32; {remedy}')
  try:
    return data.decode('utf-8').lstrip(MARK)
  except UnicodeDecodeError as error:
    raise ConfigError(f'{where} is not UTF-8 ({error}); {remedy}') from error


def text(name: str | os.PathLike, remedy: str) -> str:
  """What a file of text holds. Raises ConfigError where it cannot be read, or is not UTF-8."""
  return decoded(contents(name, remedy), os.fspath(name), remedy)


def parsed(given: str, where: Any, remedy: str, kind: Any = dict) -> Any:
  """The value that a text in JSON stands for. Raises ConfigError where it is of another kind, or there is none."""
  try:
    value = json.loads(given)
  except (ValueError, RecursionError) as error:
    what = f'it is not JSON ({error})' if given.strip() else 'it is empty'
    raise ConfigError(f'{where} is damaged: {what}; {remedy}') from error
  if not isinstance(value, kind):
    wanted = 'a list' if kind is list else 'an object'
    raise ConfigError(f'{where} is damaged: it holds {type(value).__name__}, not {wanted}; {remedy}')
  return value


def read_json(name: str | os.PathLike, remedy: str, kind: Any = dict) -> Any:
  """What a file of JSON holds. Raises ConfigError where it cannot be read, or holds something else."""
  return parsed(text(name, remedy), os.fspath(name), remedy, kind)


@contextlib.contextmanager
def naming(where: Any, remedy: str) -> Iterator[None]:
  """Inside it what is wrong with the values that were read of a file is told with its path.

  Raises:
    ConfigError: a value is refused, missing, or of another kind than it has to be.
  """
  try:
    yield
  except ConfigError as error:
    if str(where) in str(error):
      raise
    raise ConfigError(f'{where}: {error}') from error
  except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
    raise ConfigError(f'{where}: a value is missing or of another kind ({type(error).__name__}: {error}); {remedy}'
                      ) from error
