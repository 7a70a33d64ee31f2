"""Results as JSON: what is not finite is null, because JSON has no such numbers and most readers refuse them."""
from collections.abc import Sequence
import json
import math
from pathlib import Path
from typing import Any

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
