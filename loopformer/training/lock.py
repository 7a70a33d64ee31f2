"""One run at a time writes into a work folder: the lock that it holds there, and when that of another has expired.

The lock is a small file of JSON that says who made it. It expires when its owner is dead: on the same machine as soon
as the process is gone (or its number is another process's), elsewhere after PATIENCE seconds without a sign of life,
which the owner gives every BEAT seconds. Times are those of the file system, not of the machines. Nothing but training
asks for it.
"""
from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import os
from pathlib import Path
import secrets
import socket
import threading
import time
from typing import Any

from loopformer import storage
from loopformer.types import ConfigError

FILE = 'lock.json'
BEAT, PATIENCE = 15.0, 120.0
POLL = 1.0  # seconds between looks at another's lock
SETTLE = 1.0  # seconds after which whoever wrote last has a lock that two have written


class Lock:
  """The lock of a work folder, held while it is a context.

  Args:
    log: is told when another's lock is waited for.

  Raises:
    ConfigError: another run holds it.
    OSError: the folder cannot be written.
  """

  def __init__(self, workdir: Any, log: Callable[[str], None]):
    self._folder, self._log = storage.path(workdir), log
    self._path = self._folder / FILE
    self._own = self._lost = ''  # the text of the lock, and that of the run that has taken it over
    self._ended = threading.Event()

  def __enter__(self) -> Lock:
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._own = json.dumps({**_here(self._folder), 'process': os.getpid(), 'started': _process(os.getpid())[1],
                              'since': time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime()),
                              'token': secrets.token_hex(8)}, indent=1) + '\n'
      self._take()
    except storage.Unreachable:
      raise
    except OSError as error:
      raise storage.unwritable(self._folder, error) from error
    self._thread = threading.Thread(target=self._beat, name='lock', daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    self._thread.join(BEAT)
    with contextlib.suppress(Exception):  # what cannot be removed expires
      if self._path.read_text() == self._own:
        self._path.unlink()

  def check(self):
    """Raises OSError where another run has taken the folder over meanwhile."""
    if self._lost:
      raise OSError(f'workdir = {self._folder}: another run has taken the folder over ({_told(self._lost)}), because '
                    f'nothing was heard of this one for {PATIENCE:.0f} s; this one ends, and writes nothing more there')

  def _take(self):
    # not every maker's store knows of files that are not there yet
    tries, exclusive = 0, not storage.remote(self._path)
    while not storage.create(self._path, self._own):
      found = self._read()
      if found is None:  # its owner has just ended
        tries += 1
        if tries > 20:
          raise ConfigError(f'{self._path}: it cannot be made, and is not there (a link that leads nowhere?); '
                            'remove it')
        time.sleep(POLL / 20)
        continue
      if found[0] == self._own:  # an answer of the store was lost
        break
      self._wait(found)
      storage.write(self._path, self._own)
      exclusive = False
      break
    if not exclusive:
      time.sleep(SETTLE)
      text, _ = self._read() or ('', 0)
      if text != self._own:
        raise self._refusal(text)

  def _read(self) -> tuple[str, float] | None:
    """The text and the time of the lock that is there."""
    def look():
      try:
        return self._path.read_bytes().decode(errors='replace'), storage.written(self._path)
      except FileNotFoundError:
        return None

    return storage.attempt(look, self._path) if storage.remote(self._path) else look()

  def _wait(self, found: tuple[str, float]):
    """Returns when the owner of a lock is known to be dead. Raises ConfigError where it lives."""
    dead = _dead(found[0], self._folder)
    if dead is None:
      left = PATIENCE - storage.age(self._path)
      if left > 0:
        self._log(f'{self._folder} is locked by a run that cannot be asked from here ({_told(found[0])}); without a '
                  f'sign of life it counts as dead in {left:.0f} s')
      end = time.monotonic() + left
      while time.monotonic() < end and (now := self._read()) is not None:
        if now != found:
          raise self._refusal(now[0])
        time.sleep(POLL)
    elif not dead:
      raise self._refusal(found[0])

  def _refusal(self, text: str) -> ConfigError:
    return ConfigError(f'workdir = {self._folder}: another run is training there ({_told(text)}); wait for it or stop '
                       'it, or give another --workdir (evaluation and generation may read it meanwhile)')

  def _beat(self):
    while not self._ended.wait(BEAT) and not self._lost:
      with contextlib.suppress(Exception):  # a full disk, a store out of reach: the run says so when it saves
        found = self._read()
        if found is None:  # deleted by hand
          storage.create(self._path, self._own)
        elif found[0] == self._own:
          storage.touch(self._path, self._own)
        else:
          self._lost = found[0] or 'nobody'


def _here(folder: Any) -> dict[str, Any]:
  """What tells this machine from others, since it was booted and as far as it sees processes, and a folder from its
  copies there."""
  boot, space = '', ''
  with contextlib.suppress(OSError):
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  with contextlib.suppress(OSError):
    space = os.readlink('/proc/self/ns/pid')
  return {'host': socket.gethostname(), 'system': f'{boot} {space}',
          'folder': None if storage.remote(folder) else os.stat(folder).st_ino}


def _process(number: int) -> tuple[str, str | None]:
  """(state, time of its start in ticks) of a process; ('', None) where the system does not tell."""
  try:
    fields = Path(f'/proc/{number}/stat').read_text().rpartition(')')[2].split()
    return fields[0], fields[19]
  except (OSError, IndexError):
    return '', None


def _owner(text: str) -> dict[str, Any]:
  with contextlib.suppress(ValueError):
    owner = json.loads(text)
    if isinstance(owner, dict):
      return owner
  return {}


def _dead(text: str, folder: Any) -> bool | None:
  """Whether who made a lock is gone; None where this machine cannot know."""
  owner, here = _owner(text), _here(folder)
  number = owner.get('process')
  if not isinstance(number, int) or number < 1 or any(owner.get(name) != here[name] for name in ('host', 'system')):
    return None
  if owner.get('folder') != here['folder']:  # the folder is a copy of the owner's
    return True
  try:
    os.kill(number, 0)
  except (ProcessLookupError, OverflowError):
    return True
  except PermissionError:  # another user's
    pass
  state, started = _process(number)
  return state in ('Z', 'X') or started is not None and started != owner.get('started')


def _told(text: str) -> str:
  owner = _owner(text)
  return 'process {} on {}, since {}'.format(*(owner.get(name, '?') for name in ('process', 'host', 'since')))
