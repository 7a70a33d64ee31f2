"""Which files are known to be what a prepared folder says, by name, size and stamp: who meets them again need not read
them.

Notes are small files that are written once, so that processes and machines do not get into each other's way: in
`checked/` of the prepared folder, for all who see it, or among this machine's copies where it cannot be written. A file
that was copied or moved has another stamp; it is read once, and noted. Notes are named after what the folder's manifest
says, so they are void where the data are made anew.
"""
from __future__ import annotations

from collections.abc import Sequence
import contextlib
import hashlib
import json
from pathlib import Path

from loopformer import reading, storage
from loopformer.types import ConfigError

NOTES = 'checked'


def known(folder: str | Path, manifest: dict) -> set[tuple] | None:
  """(name, size, stamp) of the files that were noted; None where nothing was, of a folder of an earlier version."""
  notes = [note for place in _places(folder) for note in place.glob(f'{_key(manifest)}-*.json')]
  return {tuple(row) for note in notes for row in _rows(note)} if notes else None


def _rows(note: Path) -> list:
  """What a note says; nothing where it is damaged, so that the files are read again."""
  with contextlib.suppress(ConfigError):
    rows = reading.read_json(note, '', list)
    if all(isinstance(row, list) and len(row) == 3 and all(isinstance(field, str | int) for field in row)
           for row in rows):
      return rows
  return []


def note(folder: str | Path, manifest: dict, files: Sequence[storage.File]):
  """Notes that the files are what the manifest says."""
  rows = json.dumps([file[:3] for file in files])
  for place in _places(folder):
    with contextlib.suppress(OSError):
      place.mkdir(parents=True, exist_ok=True)
      storage.write(place / f'{_key(manifest)}-{_hash(rows)}.json', rows)
      return


def _places(folder: str | Path) -> tuple[Path, Path]:
  return storage.path(folder) / NOTES, storage.cache() / 'data' / NOTES


def _key(manifest: dict) -> str:
  return _hash(json.dumps([manifest['sources'], manifest['splits']]))


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:32]
