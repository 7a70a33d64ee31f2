"""Parts as the config.json of older work folders names them: how they are written now."""
from __future__ import annotations

from typing import Any, Callable, Mapping


def _halting(fields: Mapping[str, Any]) -> dict[str, Any]:
  """Halting had a stack and a norm of its own, before it stood around a cell."""
  if 'core' not in fields:
    return dict(fields)
  own = {name: fields[name] for name in ('core', 'norm')}
  return {'of': {'$part': 'loopformer.cells.plain:Normed', **own},
          **{name: value for name, value in fields.items() if name not in own}}


FIELDS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {'loopformer.cells.halting:Halting': _halting}


def fields_of(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that a part of this name, module:qualname, has now, encoded as those that were found."""
  return FIELDS[name](fields) if name in FIELDS else dict(fields)
