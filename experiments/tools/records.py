"""Results as JSON: what is not finite is null, because JSON has no such numbers and most readers refuse them."""
import json
import math
from pathlib import Path
from typing import Any

from loopformer import storage


def plain(value: Any) -> Any:
  """The same lists and mappings, with None for every number that is not finite."""
  if isinstance(value, dict):
    return {name: plain(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: str | Path, value: Any):
  """Writes the file, whole."""
  storage.write(path, json.dumps(plain(value), indent=1, allow_nan=False) + '\n')
