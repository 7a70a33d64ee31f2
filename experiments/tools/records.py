"""Results as JSON: what is not finite is null, because JSON has no such numbers and most readers refuse them."""
from collections.abc import Mapping, Sequence
import json
import math
import numbers
from pathlib import Path
from typing import Any

import numpy as np

from loopformer import reading, storage
from loopformer.training import metrics
from loopformer.types import ConfigError


def plain(value: Any) -> Any:
  """The same lists and mappings, with None for every number that is not finite."""
  if isinstance(value, dict):
    return {name: plain(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: str | Path, names: tuple[str, ...], remedy: str) -> list[dict]:
  """Rows that were written, each of which has values of these names. Raises ConfigError where the file holds others."""
  rows = reading.read_json(path, remedy, list)
  if not rows or not all(isinstance(row, dict) and row.keys() >= set(names) for row in rows):
    raise ConfigError(f'{path}: it holds no rows with {", ".join(names)}; {remedy}')
  return rows


def half_range(values: Sequence[float]) -> float | str:
  """Half of how far values of several seeds lie apart, for a column `+-`; of one there is none: ''."""
  return (max(values) - min(values)) / 2 if len(values) > 1 else ''


def means(rows: Sequence[Mapping[str, Any]], show: str) -> dict[str, Any]:
  """The means of all numbers that rows of several seeds have, by name; `+-` is `half_range` of what `show` names."""
  return {**{name: float(np.mean([row[name] for row in rows]))
             for name, value in rows[0].items() if isinstance(value, numbers.Real)},
          '+-': half_range([row[show] for row in rows])}


def made_with(note: str | Path, done: bool, flag: str = '--workdir', **given: Any):
  """Writes down with what something is about to be made; where it was made already, it must have been with the same.

  So a study that keeps what it has made, and makes the rest when it goes on, never takes for its own what other flags
  made.

  Args:
    note: the file.
    done: whether what was made stands there.
    flag: that which says where.
    given: name -> value, of JSON.

  Raises:
    ConfigError: it was made with other values, or nothing says with which; with the first of these.
  """
  note, now = storage.path(note), json.loads(json.dumps(plain(given)))
  if not done:
    note.parent.mkdir(parents=True, exist_ok=True)
    write(note, now)
    return
  if not note.exists():
    raise ConfigError(f'{note.parent}: nothing says with which flags it was made ({note.name} is missing); remove it, '
                      f'or give another {flag}')
  before = reading.read_json(note, f'remove {note.parent}, or give another {flag}')
  for name in (*now, *before):
    if name not in before or name not in now or before[name] != now[name]:
      raise ConfigError(f'{note.parent}: it was made with {name} = {before.get(name, "none")}, not with '
                        f'{now.get(name, "none")}; give the same, or another {flag}')


def own(out: str | Path, more: Mapping[str, Sequence[str]] | None = None, **given: Any):
  """Writes down, in a folder of results, with which flags they are made, before they are.

  Args:
    more: flag -> its words, such as seeds, which may grow: results of the earlier ones are made again beside the new.
    given: name -> value, of JSON, of all other flags that results depend on.

  Raises:
    ConfigError: results stand there that were made with others, and would be replaced; or nothing says with which.
  """
  note = storage.path(out) / 'made_with.json'
  done, more = (note.parent / 'results.json').exists(), more or {}
  before = reading.read_json(note, f'remove {note.parent}, or give another --out') if done and note.exists() else {}
  for name, words in more.items():
    earlier = before.get(name, [])
    if lost := [word for word in earlier if word not in words]:
      every = ', '.join(dict.fromkeys([*earlier, *words]))
      raise ConfigError(f'{note.parent}: results of --{name} {", ".join(earlier)} stand there, and those of {lost[0]} '
                        f'would be lost; give all of {every}, or another --out; of a run that failed, strike its word '
                        f'from {note.name}')
  made_with(note, done, '--out', **{name: before[name] for name in more if name in before}, **given)
  write(note, {**more, **given})


def report(out: str | Path, results: Any, **tables: list[dict]):
  """Writes results.json into a folder, which is made, and NAME.md for every table, given as rows."""
  out = storage.path(out)
  out.mkdir(parents=True, exist_ok=True)
  write(out / 'results.json', results)
  for name, rows in tables.items():
    storage.write(out / f'{name}.md', metrics.table(rows) + '\n')


def write(path: str | Path, value: Any):
  """Writes the file, whole."""
  storage.write(path, json.dumps(plain(value), indent=1, allow_nan=False) + '\n')
