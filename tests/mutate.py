"""Mutation testing, by hand: which one-line changes of a core file do its quick tests not notice?

    python -m tests.mutate loopformer/loop.py --limit=20 --seed=0

Each mutant is tried in a copy of the project, by a process that is forked from one that has imported JAX: the tests of
TESTS run until the first fails, those that noticed others before all. Printed are the survivors, with the reason why
one is harmless where tests/mutants.txt has it, as a line of the file, the line it becomes, and the reason below:

    - old line
    + new line
    Why nothing depends on it.
"""
from __future__ import annotations

import argparse
import ast
import bisect
import collections
import dataclasses
import importlib
import itertools
import json
import os
from pathlib import Path
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parent.parent
REASONS = ROOT / 'tests/mutants.txt'
# Core file -> the files of its tests, quickest to notice first.
TESTS = {
    'inference/engine': ('engine', 'generate'),
    'inference/evaluate': ('evaluate', 'exits'),
    'inference/exits': ('exits', 'evaluate'),
    'inference/sampling': ('generate', 'engine'),
    'loop': ('memory', 'loop', 'exits', 'recurrence'),
    'memories': ('memory', 'layouts', 'loop'),
    'model': ('evaluate', 'loop', 'memory', 'recurrence'),
    'nn/attention': ('loop', 'layouts', 'plt'),
    'nn/kernels': ('loop', 'layouts'),
    'objective': ('terms', 'train', 'cosine', 'melt'),
    'plans': ('plans', 'recurrence', 'control'),
    'training/step': ('train', 'microbatches', 'terms'),
    'training/train': ('train', 'checkpoint'),
}
IMPORTS = ('jax', 'flax.linen', 'optax', 'orbax.checkpoint', 'grain', 'hypothesis', 'scipy.stats')
FIRST = 3  # tests that are run before all others, because they noticed the most mutants
CACHE = ('JAX_COMPILATION_CACHE_DIR', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS',
         'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES')

COMPARED = {'==': '!=', '!=': '==', '<': '<=', '<=': '<', '>': '>=', '>=': '>', 'is not': 'is', 'is': 'is not',
            'not in': 'in', 'in': 'not in'}
REVERSED = {'<': '>=', '<=': '>', '>': '<=', '>=': '<'}
COMBINED = {'+': '-', '-': '+', '*': '/', '//': '*', '/': '*', '%': '*', '**': '*', '&': '|', '|': '&', 'and': 'or',
            'or': 'and'}
NAMES = [('min', 'max'), ('minimum', 'maximum'), ('any', 'all'), ('argmin', 'argmax'), ('zeros', 'ones'),
         ('zeros_like', 'ones_like'), ('floor', 'ceil'), ('sum', 'max'), ('mean', 'sum'), ('cumsum', 'cumprod'),
         ('log', 'log1p')]
RENAMED = dict(pair for a, b in NAMES for pair in ((b, a), (a, b)))
SYMBOLS = {ast.Eq: '==', ast.NotEq: '!=', ast.Lt: '<', ast.LtE: '<=', ast.Gt: '>', ast.GtE: '>=', ast.Is: 'is',
           ast.IsNot: 'is not', ast.In: 'in', ast.NotIn: 'not in', ast.Add: '+', ast.Sub: '-', ast.Mult: '*',
           ast.FloorDiv: '//', ast.Div: '/', ast.Mod: '%', ast.Pow: '**', ast.BitAnd: '&', ast.BitOr: '|',
           ast.And: 'and', ast.Or: 'or', ast.Not: 'not', ast.USub: '-', ast.Invert: '~'}
OF_ARRAYS = ('jnp', 'np', 'jax', 'math')


# Mutants -------------------------------------------------------------------------------------------------------------


def file_of(name: str) -> Path:
  """The file of tests of that name, in whichever folder."""
  found, = ROOT.glob(f'tests/**/test_{name}.py')
  return found


@dataclasses.dataclass(frozen=True)
class Mutant:
  """The bytes from start to stop of a source in UTF-8 become `new`; line: the first of those that change, from 1."""
  start: int
  stop: int
  new: bytes
  line: int

  def apply(self, source: bytes) -> bytes:
    return source[:self.start] + self.new + source[self.stop:]

  def shown(self, source: bytes) -> tuple[str, str]:
    """What changes before and after, its lines in one."""
    first, last = source.rfind(b'\n', 0, self.start) + 1, source.find(b'\n', self.stop)
    return tuple(' '.join(text.decode().split()) for text in (
        source[first:last], source[first:self.start] + self.new + source[self.stop:last]))


def mutants(source: bytes) -> list[Mutant]:
  """The one-line changes of a module, in order; a few of them do not compile. Messages of errors, annotations and
  decorators are left as they are."""
  starts = [0]
  for line in source.splitlines(keepends=True):
    starts.append(starts[-1] + len(line))

  def span(node):
    return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

  found = {Mutant(start, stop, new.encode(), bisect.bisect(starts, start))
           for start, stop, new in _changes(ast.parse(source), source, span)}
  return sorted(found, key=lambda mutant: (mutant.start, mutant.stop, mutant.new))


def compiles(source: bytes) -> bool:
  try:
    ast.parse(source)
  except SyntaxError:
    return False
  return True


def _changes(tree, source, span) -> Iterator[tuple[int, int, str]]:
  def text(start, stop):
    return source[start:stop].decode()

  def operator(start, stop, old, new):
    """The operator between two operands becomes another."""
    place = text(start, stop).find(old)
    if place >= 0:
      place = start + len(text(start, stop)[:place].encode())
      yield place, place + len(old.encode()), new

  for node in _visited(tree):
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
      symbol = SYMBOLS[type(node.ops[0])]
      for new in (COMPARED[symbol], REVERSED.get(symbol)):
        if new:
          yield from operator(span(node.left)[1], span(node.comparators[0])[0], symbol, new)
    elif isinstance(node, ast.BinOp) and SYMBOLS.get(type(node.op)) in COMBINED:
      symbol = SYMBOLS[type(node.op)]
      yield from operator(span(node.left)[1], span(node.right)[0], symbol, COMBINED[symbol])
    elif isinstance(node, ast.AugAssign):
      yield *span(node), 'pass'
      symbol = SYMBOLS.get(type(node.op))
      if symbol in COMBINED:
        yield from operator(span(node.target)[1], span(node.value)[0], symbol, COMBINED[symbol])
    elif isinstance(node, ast.BoolOp):
      symbol = SYMBOLS[type(node.op)]
      for left, right in zip(node.values, node.values[1:]):
        yield from operator(span(left)[1], span(right)[0], symbol, COMBINED[symbol])
    elif isinstance(node, ast.UnaryOp) and type(node.op) in SYMBOLS:
      yield from operator(span(node)[0], span(node.operand)[0], SYMBOLS[type(node.op)], '')
    elif isinstance(node, (ast.IfExp, ast.If)):
      yield *span(node.test), f'not ({text(*span(node.test))})'
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
      yield *span(node), str(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
      yield *span(node), repr(node.value + 1 if isinstance(node.value, int) or not node.value else 2 * node.value)
    elif isinstance(node, ast.Attribute) and node.attr in RENAMED:
      start, stop = span(node)
      yield stop - len(node.attr), stop, RENAMED[node.attr]
    elif isinstance(node, ast.Call):
      yield from _of_call(node, text, span)
    elif isinstance(node, (ast.Raise, ast.Expr)):
      yield *span(node), 'pass'
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      yield from _of_bindings(node, span)


def _of_call(node, text, span):
  """An argument that is left out, or None; a gradient that is not stopped."""
  name = text(*span(node.func))
  if name.endswith('stop_gradient') and len(node.args) == 1:
    yield *span(node), f'({text(*span(node.args[0]))})'
  arguments = sorted([*node.args, *node.keywords], key=lambda argument: span(argument)[0])
  for number, argument in enumerate(arguments):
    start, stop = span(argument)
    if isinstance(argument, ast.keyword):
      if number + 1 < len(arguments):
        stop = span(arguments[number + 1])[0]
      elif number:
        start = span(arguments[number - 1])[1]
      yield start, stop, ''
    elif number and isinstance(argument, (ast.Name, ast.Call, ast.Attribute)) and (
        name.split('.')[0] not in OF_ARRAYS):
      yield start, stop, 'None'


def _of_bindings(function, span):
  """A name that keeps the value it had."""
  known = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
  for node in _visited(function):
    if isinstance(node, ast.Assign):
      names = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
      stored = any(isinstance(target, (ast.Attribute, ast.Subscript)) for target in node.targets)
      if stored or names <= known:
        yield *span(node), 'pass'
      known |= names


def _visited(node) -> Iterator[ast.AST]:
  """The nodes whose change could be noticed, parents before their children, in order."""
  yield node
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns', 'decorator_list', 'bases', 'exc', 'cause', 'msg'):
      continue
    for child in value if isinstance(value, list) else [value]:
      docs = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
      if isinstance(child, ast.AST) and not docs and not isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        yield from _visited(child)


def sample(source: bytes, found: list[Mutant], limit: int | None, seed: int) -> list[Mutant]:
  """So many of them at random, no line twice before every line was taken once."""
  found = random.Random(seed).sample(found, len(found))
  seen = collections.Counter()
  place = {mutant: (seen[mutant.line], seen.update([mutant.line]))[0] for mutant in found}
  valid = (mutant for mutant in sorted(found, key=place.get) if compiles(mutant.apply(source)))
  return list(itertools.islice(valid, limit))


def reasons(text: str) -> dict[tuple[str, str], str]:
  """(line, what it becomes) -> why that is harmless."""
  found, pair = {}, ()
  for line in text.splitlines():
    if line.startswith('- '):
      pair = (line[2:],)
    elif line.startswith('+ ') and len(pair) == 1:
      pair += (line[2:],)
    elif line.strip() and len(pair) == 2:
      found[pair] = f'{found[pair]} {line.strip()}' if pair in found else line.strip()
    elif not line.strip():
      pair = ()
  return found


def stale(known: dict[tuple[str, str], str], sources: list[bytes]) -> list[tuple[str, str]]:
  """The lines with a reason that are in none of the sources any more."""
  made = {mutant.shown(source) for source in sources for mutant in mutants(source)}
  return sorted(set(known) - made)


# Running them --------------------------------------------------------------------------------------------------------


class Order:
  """Plugin of pytest: the tests that noticed the most first, then file by file, the quickest first; tells what failed.
  """

  def __init__(self, report: Path, kills: collections.Counter, seconds: dict[str, float]):
    self._report, self._first, self._seconds = report, [name for name, _ in kills.most_common(FIRST)], seconds
    self._told = {'failed': [], 'seconds': {}}

  @pytest.hookimpl(trylast=True)
  def pytest_collection_modifyitems(self, session, items):
    files = [Path(argument).name for argument in session.config.args]

    def place(item):
      first = self._first.index(item.nodeid) if item.nodeid in self._first else FIRST
      return first, files.index(item.path.name), self._seconds.get(item.nodeid, 0.0)

    items.sort(key=place)

  def pytest_runtest_logreport(self, report):
    self._told['seconds'][report.nodeid] = self._told['seconds'].get(report.nodeid, 0.0) + report.duration
    if report.failed:
      self._told['failed'].append(report.nodeid)
      self._report.write_text(json.dumps(self._told))

  def pytest_sessionfinish(self):
    self._report.write_text(json.dumps(self._told))


@dataclasses.dataclass
class Outcome:
  """How a run of the tests ended: 'passed', 'failed' or 'out of time'; the tests that failed; seconds of each."""
  verdict: str
  failed: list[str]
  seconds: dict[str, float]
  wall: float


class Copy:
  """A copy of the project, in which mutants are tried."""

  def __init__(self, folder: Path, name: str, log: Path, matching: str):
    self.folder, self.file, self._log = folder, folder / f'loopformer/{name}.py', log
    self._tests = ['-k', matching, *(str(file_of(test).relative_to(ROOT)) for test in TESTS[name])]
    self.kills, self.seconds = collections.Counter(), {}
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns('.*', '__pycache__', 'runs', 'build', 'dist'))
    self.source = self.file.read_bytes()

  def run(self, source: bytes, limit: float | None) -> Outcome:
    """The quick tests of the file with this source, until one fails or so many seconds are over."""
    self.file.write_bytes(source)
    report = self.folder / 'report.json'
    report.unlink(missing_ok=True)
    begun = time.monotonic()
    child = os.fork()
    if not child:
      self._child(report)
    status = None
    try:
      while status is None and (limit is None or time.monotonic() - begun < limit):
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else time.sleep(0.05)
    finally:
      if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    told = json.loads(report.read_text()) if report.exists() else {'failed': [], 'seconds': {}}
    verdict = 'out of time' if status is None else 'passed' if status == 0 else 'failed'
    return Outcome(verdict, told['failed'], told['seconds'], time.monotonic() - begun)

  def _child(self, report):
    """Runs the tests of the copy and ends."""
    status = 3
    try:
      os.setsid()
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      out = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
      os.dup2(out, 1), os.dup2(out, 2)
      os.chdir(self.folder)
      os.environ['PYTHONPATH'] = str(self.folder)
      sys.path[:] = [str(self.folder), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
      sys.dont_write_bytecode = True  # a mutant of the same size and second would be taken for the one before
      for module in [name for name in sys.modules if name.split('.')[0] in ('tests', 'loopformer', 'experiments')]:
        del sys.modules[module]
      importlib.invalidate_caches()
      arguments = ['-x', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', *self._tests]
      status = int(pytest.main(arguments, plugins=[Order(report, self.kills, self.seconds)]))
      import loopformer
      assert Path(loopformer.__file__).is_relative_to(self.folder), loopformer.__file__
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush(), sys.stderr.flush()
      os._exit(status)


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('file', help=f'loopformer/NAME.py, NAME one of {", ".join(TESTS)}')
  parser.add_argument('--limit', type=int, help='mutants to try; all by default')
  parser.add_argument('--seed', type=int, default=0, help='which ones')
  parser.add_argument('--line', type=int, action='append', help='only those of this line; may be given again')
  parser.add_argument('-k', default='', help='only tests that match, as of pytest; others may notice what survives')
  parser.add_argument('--timeout', type=float, help='seconds for a mutant; by default three times those of the tests')
  options = parser.parse_args()
  name = options.file.removeprefix('loopformer/').removesuffix('.py')
  if name not in TESTS:
    parser.error(f'{options.file}: no tests are known of it; there are {", ".join(TESTS)}')
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # whose clean-up ends the tests that run
  known = reasons(REASONS.read_text())
  for before, after in stale(known, [(ROOT / f'loopformer/{name}.py').read_bytes() for name in TESTS]):
    print(f'{REASONS.name}: no file has this line any more, take its reason out\n  - {before}\n  + {after}')
  with tempfile.TemporaryDirectory(prefix='mutants-') as folder:
    # Most programs of a mutant are those of the one before.
    for variable, value in zip(CACHE, (f'{folder}/programs', '0', '-1')):
      os.environ.setdefault(variable, value)
    for module in IMPORTS:
      importlib.import_module(module)
    log = Path(folder) / 'log.txt'
    copy = Copy(Path(folder) / 'project', name, log, options.k)
    whole = copy.run(copy.source, None)
    if whole.verdict != 'passed':
      sys.exit(f'{log.read_text()[-4000:]}\nerror: without a mutant the tests {whole.verdict}')
    copy.seconds = whole.seconds
    limit = options.timeout or 3 * whole.wall + 30
    found = [mutant for mutant in mutants(copy.source) if not options.line or mutant.line in options.line]
    chosen = sample(copy.source, found, options.limit, options.seed)
    print(f'{options.file}: {len(found)} mutants, {len(chosen)} are tried; {len(whole.seconds)} tests in '
          f'{whole.wall:.0f} s', flush=True)
    verdicts = collections.Counter()
    for mutant in chosen:
      before, after = mutant.shown(copy.source)
      outcome = copy.run(mutant.apply(copy.source), limit)
      copy.kills.update(outcome.failed)
      reason = known.get((before, after))
      survived = 'harmless' if reason else 'SURVIVED'
      verdict = {'failed': 'noticed', 'passed': survived}.get(outcome.verdict, outcome.verdict)
      verdicts[verdict] += 1
      if verdict == 'noticed':
        by = ', '.join(outcome.failed) or 'an import'
        print(f'{mutant.line}: noticed in {outcome.wall:.0f} s by {by}', flush=True)
      else:
        print(f'{mutant.line}: {verdict}\n  - {before}\n  + {after}' + (f'\n  {reason}' if reason else ''), flush=True)
    print(f'{options.file}: ' + ', '.join(f'{count} {verdict}' for verdict, count in verdicts.most_common()))


if __name__ == '__main__':
  main()
