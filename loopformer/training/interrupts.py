"""Ctrl-C (SIGINT): it ends a run before its first step; later the first one saves and ends it, a second ends it at
once.

In a command, `watch` sees to it that the process ends with status 130 and one line, whatever it is doing: a thread of
its own hears of signals also while the main thread is in a compiler or waits for a device. Elsewhere, in a notebook or
a test, KeyboardInterrupt is raised, as Python does. Nothing that takes time is imported here, so that a command can
call `watch` before it imports the rest.
"""
from __future__ import annotations

from collections.abc import Callable
import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

STATUS = 130
IMPORTING = 'before anything was begun'
GRACE = 3.0  # seconds in which the main thread may end by itself, and clean up
_ending = threading.Lock()


def _early() -> str:
  return 'before it had ended'


class _Command:
  """What the watching thread goes by."""
  importing = True
  caught: Caught | None = None  # while a run trains
  words: Callable[[], str] = staticmethod(_early)


def watch():
  """Makes this process, a command, end at Ctrl-C with STATUS and one line.

  Call it in the main thread before slow imports, in which it ends at once, and `unwind` after them.
  """
  hears, wakes = socket.socketpair()
  wakes.setblocking(False)
  signal.set_wakeup_fd(wakes.detach(), warn_on_full_buffer=False)
  signal.signal(signal.SIGINT, lambda *_: end(IMPORTING))
  threading.Thread(target=_listen, args=(hears,), name='interrupts', daemon=True).start()


def unwind(words: Callable[[], str] = _early):
  """From here on Ctrl-C raises KeyboardInterrupt, with which files are closed and removed; and ends the process, saying
  these words, where that takes longer than GRACE."""
  _Command.importing, _Command.words = False, staticmethod(words)
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def words_of(error: KeyboardInterrupt) -> str:
  """What is to be said of an interrupt that has come to the top."""
  return str(error) or _Command.words()


def _listen(hears: socket.socket):
  while True:
    for number in hears.recv(64):
      if number == signal.SIGINT:
        _act(_Command.caught)


def _act(caught: Caught | None):
  """One interrupt, in the watching thread."""
  if caught is not None and caught.stepping:
    caught.heard += 1
    if caught.heard == 1:
      _say('interrupted: the step is finished and saved; Ctrl-C again ends at once')
    else:
      end(caught.words())
  elif _Command.importing:
    end(IMPORTING)
  else:
    time.sleep(GRACE)
    end((caught or _Command).words())


def end(words: str) -> NoReturn:
  """Ends the process with STATUS, at once."""
  if not _ending.acquire(blocking=False):
    time.sleep(60)  # the other thread is at it
  _say(f'interrupted {words}')
  os._exit(STATUS)


def _say(line: str):
  """To standard error, without its buffer, which another thread may be holding."""
  try:
    os.write(2, f'{line}\n'.encode(errors='replace'))
  except OSError:
    pass


def run(program: Callable[[], None]):
  """Runs a command to its end. If it fails or is interrupted, its own line is the last: what the threads of libraries
  would still say is not waited for."""
  try:
    program()
  except KeyboardInterrupt as error:
    sys.stdout.flush()
    end(words_of(error))
  except SystemExit as error:
    if error.code in (None, 0):
      signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
      raise
    if not isinstance(error.code, int):
      print(error.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.code if isinstance(error.code, int) else 1)


class Caught:
  """While a run trains: SIGTERM, and the first SIGINT after its first step, are an event that asks it to save and end.

  Signals can be caught in the main thread alone; elsewhere the event never comes.

  Args:
    words: what is said where the run ends at once.
  """

  def __init__(self, words: Callable[[], str]):
    self.words = words
    self.told = threading.Event()
    self.stepping = False  # whether there is something to save
    self.reached: int | None = None  # the last step that was begun
    self.heard = 0  # interrupts that the watching thread has heard of since
    self._interrupts = 0
    self._old: dict[signal.Signals, Callable | int | None] = {}

  def __enter__(self) -> Caught:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._old[number] = signal.signal(number, self._on_signal)
      _Command.caught = self
    return self

  def __exit__(self, *_):
    if self._old:
      _Command.caught = None
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _on_signal(self, number, _):
    if number == signal.SIGINT:
      self._interrupts += self.stepping
      if not self.stepping or self._interrupts > 1:
        raise KeyboardInterrupt(self.words())
    self.told.set()
