"""How every command begins: flags are read strictly, wrong ones end it with one line, and any console can show its
texts.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
import functools
import math
import os
from pathlib import Path
import re
import subprocess
import sys
from typing import Any

from absl import app, flags

from experiments.tools import records
from loopformer import storage
from loopformer.training import interrupts
from loopformer.training.train import NotFinite
from loopformer.types import SEEDS

FLAGS = flags.FLAGS
TOLD = NotFinite, ValueError, OSError, ImportError  # which say by themselves what is wrong; ConfigError is a ValueError


def run(main):
  """Reads the flags, and runs `main(argv)`."""
  for name in ('stdout', 'stderr'):
    if getattr(sys, name) is None:  # closed, as daemons have it
      setattr(sys, name, open(os.devnull, 'w'))
    getattr(sys, name).reconfigure(errors='backslashreplace')  # a console of few letters loses them, never a result
  interrupts.run(lambda: app.run(functools.partial(begin, main), flags_parser=parse))


def train(spec: str, workdir: Path, *changes: str):
  """Runs or resumes `experiments.main` in a process of its own, whose output goes to <workdir>/log.txt; at Ctrl-C it is
  waited for, because it saves.

  Args:
    spec: the configuration; changes: as of --set.

  Raises:
    SystemExit: it failed; with a line that says where, and how its output ends.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  log = workdir / 'log.txt'
  with storage.appending(log) as out:
    process = subprocess.Popen([sys.executable, '-m', 'experiments.main', f'--config={spec}', f'--workdir={workdir}',
                                *(f'--set={change}' for change in changes)], stdout=out, stderr=subprocess.STDOUT)
    try:
      status = process.wait()
    except KeyboardInterrupt:
      process.wait()
      raise
  if status:
    last = (log.read_text(errors='replace').split('\n')[:-1] or [''])[-1]
    raise SystemExit(f'error: the run of {spec} in {workdir} ended with status {status}, and {log.name} with: {last}')


def check_chosen(name: str, given: str | Sequence[str], known: Collection[str]):
  """Ends the command where a flag, a word or a list of them, was given another than those that are known, or one twice.
  """
  words = [given] if isinstance(given, str) else given
  for word in words:
    if word not in known:
      sys.exit(f'error: --{name}={",".join(words)}: there is no {word!r} here; choose from {", ".join(known)}')
  check_once(name, words)


def check_whole(**given: Sequence[str] | None):
  """Ends the command where one of these flags, lists of words or None, has a word that is no whole number, or one
  twice; or 0, but for seeds, of which there are 2^32."""
  for name, words in given.items():
    least, most = (0, SEEDS - 1) if name == 'seeds' else (1, math.inf)
    if not all(word.isdecimal() and least <= int(word) <= most for word in words or ()):
      sys.exit(f'error: --{name}={",".join(words)}: give whole numbers apart by commas, '
               + (f'0 to {most}' if name == 'seeds' else '1 or more'))
    check_once(name, [str(int(word)) for word in words or ()])


def check_once(name: str, values: Sequence):
  """Ends the command where a flag, a list, has one of its values twice, whose results would count as often."""
  for value in values:
    if values.count(value) > 1:
      sys.exit(f'error: --{name}={",".join(map(str, values))}: {value} stands there more than once, and would count '
               'as often; give it once')


def named(runs: Sequence[str], once: bool = True) -> list[tuple[str, str]]:
  """The pairs of --run, name=REST each. Ends the command where there is none, one lacks its name or rest, or, unless a
  name may come again (once=False), two have one."""
  pairs = [run.partition('=')[::2] for run in runs]
  if not pairs:
    sys.exit(f'error: --run is missing: {FLAGS["run"].help}'.rstrip('.'))
  for run, pair in zip(runs, pairs):
    if not all(pair):
      sys.exit(f'error: --run={run}: give {FLAGS["run"].help}'.rstrip('.'))
  if once:
    check_once('run', [name for name, _ in pairs])
  return pairs


def own(*read: str, grow: Sequence[str] = (), **given: Any):
  """Keeps results in --out that other flags made, as `records.own` does.

  Args:
    read: the flags on which the results depend.
    grow: those of them that are lists, such as seeds, and may have more words when the command is given again.
    given: in the place of flags, what they come to.

  Raises:
    ConfigError: results of other flags stand there, or of these without a word that they had.
  """
  records.own(FLAGS.out, {name: [str(word) for word in FLAGS[name].value] for name in grow},
              **{name: FLAGS[name].value for name in read}, **given)


def begin(main: Callable, argv: list[str]):
  """Runs `main(argv)`, unless what it is to write could not be written where --out says; input that cannot be used,
  files that cannot be read or written, and a loss that is no number end it with one line."""
  interrupts.unwind()
  try:
    if 'out' in FLAGS and FLAGS.out:
      storage.check(FLAGS.out, '--out', writes=True)
    main(argv)
  except TOLD as error:
    sys.exit(f'error: {error}')


def parse(argv: list[str]) -> list[str]:
  """Sets the flags. Ends the command at a word that is no flag, one that is unknown or missing, or a value that it
  cannot have, such as an empty list."""
  try:
    try:
      words = FLAGS(argv)
    except SystemExit:  # --help, which absl has written, is no failure
      sys.exit(0)
    if len(words) > 1:
      sys.exit(f'error: {" ".join(words[1:])}: not a flag; flags begin with --, see --help')
    for name in FLAGS:
      if FLAGS[name].present and FLAGS[name].value == []:
        sys.exit(f'error: --{name}: no value; give one, or leave it out')
      if isinstance(FLAGS[name].value, float) and not math.isfinite(FLAGS[name].value):
        given = [word for word in argv if word.lstrip('-').startswith(f'{name}=')]
        raise flags.IllegalFlagValueError(f'flag --{given[-1].lstrip("-") if given else name}: ')
    return words
  except flags.IllegalFlagValueError as error:
    sys.exit(f'error: {_told(str(error))}')
  except flags.UnrecognizedFlagError as error:
    found = re.search(r'\. Did you mean: (.*) \?$', str(error))
    close = f'did you mean {", ".join(f"--{name}" for name in found[1].split(", "))}? ' if found else ''
    sys.exit(f'error: --{error.flagname}: there is no such flag here; {close}--help lists those there are')
  except flags.Error as error:
    sys.exit(f'error: {error}'.replace('\n', '; '))


def _told(text: str) -> str:
  """What a flag was given, and what it takes: absl says how its conversion failed. Or which flags are missing."""
  text = re.sub(r'^flags [^\n]*?: (?=--)', '', text, flags=re.MULTILINE)  # what else a check of several flags has read
  missing = r'^flag --(\w+)=None: Flag --\1 must have a value other than None\.$'
  if re.search(missing, text, re.MULTILINE):
    return '; '.join(re.sub(missing, lambda flag: f'--{flag[1]} is missing: {FLAGS[flag[1]].help}'.rstrip('.'), line)
                     for line in text.splitlines())
  found = re.match(r'flag (--(\w+)(?:=.*?)?): ', text, re.DOTALL)
  takes = found and found[2] in FLAGS and FLAGS[found[2]].parser.syntactic_help
  kinds = {'an integer': 'a whole number', 'a number': 'a finite number',
           'a non-negative number': 'a finite number, 0 or more'}
  for kind, words in kinds.items():
    takes = takes and takes.replace(kind, words)
  return f'{found[1]}: must be {takes}' if takes else text.replace('\n', '; ')
