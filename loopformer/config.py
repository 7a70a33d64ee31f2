"""Experiments as data: frozen parts that can be printed, compared, overridden by dotted paths, and saved as JSON.

A configuration holds live parts: frozen dataclasses and unbound Linen modules, which are dataclasses too. Nothing is
looked up by name; a saved configuration names the classes that it is made of.

Nothing runs because it was read: of what a work folder names, only parts of the library and of its experiments are
found, and code that lies in the folder itself runs only where trust is given (`trusting`).
"""
from __future__ import annotations

import ast
import collections.abc
import contextlib
import contextvars
import dataclasses
import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import json
import math
from pathlib import Path
import re
import sys
import traceback
import types
import typing
from typing import Any, Callable, Collection, Iterator, Mapping

from flax import linen as nn
import numpy as np

from loopformer import moved, plans, reading, storage, types as sockets
from loopformer.inference import exits
from loopformer.inference.evaluate import Depths, Run
from loopformer.model import Looped
from loopformer.nn import modules
from loopformer.nn.layers import DTYPES
from loopformer.objective import Objective
from loopformer.optim import AdamW
from loopformer.roles import Roles
from loopformer.sharding import Mesh
from loopformer.tasks.text import Text
from loopformer.training.control import NoControl
from loopformer.training.train import Train, best_of
from loopformer.types import SEEDS, ConfigError, Planner, config_dataclass, real, whole

FILE = 'config.json'
LOADED = 'loopformer_config_'  # modules of configuration files are known by this prefix and the file's name
# Where parts and the functions that they may name come from; others are found where trust is given.
PARTS = 'loopformer.', 'experiments.configs.'
FUNCTIONS = 'loopformer.nn.layers', 'loopformer.plans', 'jax._src.nn.functions'
_TRUST = contextvars.ContextVar('trust', default=False)
# Fields that change what is reported and kept, and never what is computed: a resumed run may differ in them.
FREE = ('train.log_every', 'train.eval_every', 'train.eval_batches', 'train.save_every', 'train.keep', 'train.best',
        'evals', 'mesh')
# What numbers of a name may be in every part, whole ones and others; what a part asks besides it says itself.
WHOLE = dict.fromkeys(('chunk', 'features', 'groups', 'head', 'heads', 'hidden', 'inputs', 'length', 'loops', 'outputs',
                       'rank', 'sample_bytes', 'size', 'vocab', 'width'), (1, 2 ** 31 - 1))
WHOLE |= {'seed': (0, SEEDS - 1), 'warmup': (0, 2 ** 31 - 1)}
WHOLE |= dict.fromkeys(('experts', 'top'), (1, 2 ** 16))
WHOLE |= {'filler': (0, 2 ** 31 - 1)}  # an id
REAL = {
    **dict.fromkeys(('beta', 'cooldown', 'decay', 'end', 'eps', 'noise', 'out_std', 'peak', 'sigma', 'std', 'up_std',
                     'warmup'), '[0, inf)'),
    **dict.fromkeys(('clip', 'scale'), '(0, inf)'), **dict.fromkeys(('b1', 'b2', 'momentum', 'second'), '[0, 1)'),
}
# Fields that hold a part -> what it must be; others by the types that they are declared with.
SOCKETS = {'attn': sockets.Attention, 'block': sockets.Block, 'cell': sockets.Cell, 'control': sockets.Control,
           'evals': sockets.Evaluations, 'exit': sockets.Exit, 'inject': sockets.Injection, 'kernel': sockets.Kernel,
           'linear': sockets.Projection, 'measure': sockets.Measure, 'memory': sockets.Memory,
           'optim': sockets.Optimiser, 'plan': sockets.Planner, 'position': sockets.Position,
           'prepare': sockets.Preparation, 'read_in': sockets.ReadIn,
           'read_out': sockets.ReadOut, 'remat': sockets.Remat, 'rule': sockets.Rule, 'sampler': sockets.Sampler,
           'start': sockets.Start, 'task': sockets.Task, 'term': sockets.Term}
EACH = 'layers', 'loops', 'recursions'  # arguments of configurations, which may have an entry for every one
PLAIN = {'int', 'float', 'str', 'bool'}  # words of the types of fields that hold no parts
WATCHED = ('train.eval_every', 'train.eval_batches', 'evals')  # but a controller decides by what they say


@config_dataclass
class Experiment:
  """All there is to know of a run."""
  name: str
  model: Looped
  objective: Objective
  task: Any = Text()
  train: Train = Train()
  optim: Any = AdamW()
  control: Any = NoControl()
  mesh: Mesh = Mesh()
  evals: Any = Depths()


def is_part(value: Any) -> bool:
  """Whether a value is a part, an instance of a dataclass."""
  return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fields(value: Any) -> dict[str, Any]:
  """Name -> value of the fields of a part, or of the entries of a mapping; nothing for other values."""
  if isinstance(value, nn.Module):
    return modules.fields(value)
  if is_part(value):
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
  if isinstance(value, Mapping):
    return dict(value)
  return {}


def flatten(value: Any, path: str = '') -> dict[str, str]:
  """Dotted path -> text, in order: the resolved configuration, readable and comparable line by line."""
  rows = {}
  inner = fields(value)
  if is_part(value):
    rows[path] = _name_of(type(value))
  elif not inner:
    rows[path] = _name_of(value) if callable(value) else repr(value)
  for name, field in inner.items():
    rows.update(flatten(field, f'{path}.{name}' if path else name))
  return rows


def describe(config: Any) -> str:
  """One line a field: `model.cell.core.depth = 2`."""
  return '\n'.join(f'{path or "experiment"} = {text}' for path, text in flatten(config).items())


def difference(old: Experiment, new: Experiment) -> Iterator[tuple[str, str, str]]:
  """Paths at which two configurations compute something different, with both texts."""
  before, after = flatten(absolute(old)), flatten(absolute(new))
  free = FREE if old.control == NoControl() else [path for path in FREE if path not in WATCHED]
  for path in dict.fromkeys([*before, *after]):
    if not path.startswith(tuple(free)) and before.get(path) != after.get(path):
      yield path, before.get(path, '(absent)'), after.get(path, '(absent)')


# Paths ---------------------------------------------------------------------------------------------------------------


def paths(value: Any, path: str = '') -> Iterator[tuple[str, str]]:
  """Dotted path -> value of the fields that hold paths, which their part names in `paths`."""
  for name, inner in fields(value).items():
    where = f'{path}.{name}' if path else name
    if isinstance(inner, str) and name in getattr(value, 'paths', ()):
      yield where, inner
    yield from paths(inner, where)


def absolute(config: Any) -> Any:
  """The configuration with whole paths, which mean the same from another current folder."""
  return with_paths(config, {where: str(storage.absolute(name)) for where, name in paths(config)})


def with_paths(config: Any, given: Mapping[str, str]) -> Any:
  """The configuration with these values of fields that hold paths, where it has such fields."""
  here = dict(paths(config))
  for where, value in given.items():
    if here.get(where) not in (None, value):
      config = _changed(config, where.split('.'), value)
  return config


def _changed(value: Any, names: list[str], new: Any) -> Any:
  name, *rest = names
  new = _changed(fields(value)[name], rest, new) if rest else new
  if isinstance(value, Mapping):
    return {**value, name: new}
  return value.clone(**{name: new}) if hasattr(value, 'clone') else dataclasses.replace(value, **{name: new})


# Overrides -----------------------------------------------------------------------------------------------------------


def override(config: Any, assignment: str) -> Any:
  """The configuration with one field replaced: `train.steps=100`.

  Raises:
    ConfigError: no such field (the message lists those there are), or a value of another type.
  """
  path, equals, text = assignment.partition('=')
  if not equals:
    raise ConfigError(f'--set {assignment!r}: expected path=value, such as train.steps=100')
  return _replace(config, path.strip().split('.'), text.strip(), path.strip())


def _replace(value: Any, names: list[str], text: str, path: str) -> Any:
  name, rest = names[0], names[1:]
  inner = fields(value)
  if name not in inner:
    close = difflib.get_close_matches(name, inner, 1)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    raise ConfigError(f'{path} = {text}: {_name_of(type(value))} has no field {name!r}{hint} '
                      f'Its fields: {", ".join(inner) or "none"}')
  return _changed(value, [name], _replace(inner[name], rest, text, path) if rest else
                  _parse(text, inner[name], _annotation(value, name), path, _optional(value, name)))


def _declared(kind: type, name: str) -> tuple[Any, Any]:
  """The declared type of a field of a kind of parts, as it stands there, and the class that declares it."""
  for cls in kind.__mro__ if dataclasses.is_dataclass(kind) else ():
    declared = cls.__dict__.get('__annotations__', {}).get(name)
    if declared is not None:
      return declared, cls
  return None, None


def _annotation(value: Any, name: str) -> Any:
  """The declared type of a field; the type of its present value inside a mapping."""
  declared, cls = _declared(type(value), name)
  return type(fields(value)[name]) if declared is None else _type_of(declared, cls)


def _type_of(declared: Any, cls: type) -> Any:
  return eval(declared, dict(vars(sys.modules[cls.__module__]))) if isinstance(declared, str) else declared


def _optional(value: Any, name: str) -> bool:
  """Whether a field of a part is None by default."""
  return is_part(value) and any(f.name == name and f.default is None for f in dataclasses.fields(value))


def _parse(text: str, old: Any, kind: Any, path: str, optional: bool = False) -> Any:
  try:
    candidates = [ast.literal_eval(text), text]  # the text itself: a string that looks like a number
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    candidates = [text]
  for candidate in candidates:
    if kind is Any and not (candidate is None and optional):
      break  # parts are declared so
    try:
      return fit(candidate, kind)
    except TypeError:
      continue
  if is_part(old) or isinstance(old, Mapping):
    raise ConfigError(f'{path} = {text}: {path} is a part ({_name_of(type(old))}), not a value; set one of its fields '
                      f'({", ".join(fields(old)) or "it has none"}), or edit the configuration file')
  if kind is Any:
    raise ConfigError(f'{path} = {text}: {path} is for a part, and was {old!r}; edit the configuration file')
  got = candidates[0]
  told = f'got {type(got).__name__}' if type(got) is not kind else 'and a finite one of 64 bits at most'
  raise ConfigError(f'{path} = {text}: expected {_kind_name(kind)}, {told}; it was {old!r}')


def fit(value: Any, kind: Any) -> Any:
  """The parsed value as the declared type: integers become floats, lists tuples, where those are wanted.

  Raises:
    TypeError: the value does not have that type, is a number that is not finite, or a whole one of more than 64 bits.
  """
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if kind is Any or kind in (None, type(None)) and value is None:
    return value
  if origin in (typing.Union, types.UnionType):
    for exact in (True, False):  # of int | float, an integer is an int
      for arg in args:
        if not exact or type(value) is arg or value is None and arg is type(None):
          with contextlib.suppress(TypeError):
            return fit(value, arg)
  elif origin is tuple and isinstance(value, (tuple, list)):
    if len(args) == 2 and args[1] is Ellipsis:
      return tuple(fit(item, args[0]) for item in value)
    if len(args) == len(value):
      return tuple(map(fit, value, args))
  elif kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # NaN is not
    return float(value)
  elif kind in (str, bool) and type(value) is kind or kind is int and type(value) is int and abs(value) < 2 ** 63:
    return value
  raise TypeError(f'{value!r} is no {_kind_name(kind)}')


def _kind_name(kind: Any) -> str:
  return kind.__name__ if isinstance(kind, type) else str(kind)


# Checks --------------------------------------------------------------------------------------------------------------


def check(config: Experiment):
  """Checks what concerns several parts at once, before anything is compiled or written.

  Raises:
    ConfigError: with field, value and remedy.
  """
  check_values(config, '')
  model, train = config.model, config.train
  if model.read_in.dtype not in DTYPES:
    raise ConfigError(f'model.read_in.dtype = {model.read_in.dtype!r}; use one of {", ".join(DTYPES)}')
  model.cell.check(model.read_in.width)
  for name, stack in model.stacks().items():
    whole(f'model.{name}.depth', stack.depth, 1, 2 ** 31 - 1)
    stack.block.check(model.read_in.width, f'model.{name}: ')
    wrong = [layer for layer in stack.order or () if not 0 <= layer < stack.depth]
    if wrong:
      raise ConfigError(f'model.{name}: order = {stack.order} names layer {wrong[0]}, but depth = {stack.depth}; '
                        f'layers are 0 to {stack.depth - 1}')
  if config.task.length > model.read_in.length:
    raise ConfigError(f'task.length = {config.task.length} is more than model.read_in.length = {model.read_in.length}, '
                      'the positions of the model; shorten the one or raise the other')
  for split, length in config.task.splits.items():
    if length > model.read_in.length:
      raise ConfigError(f'task: the examples of the split {split!r} have {length} tokens, more than '
                        f'model.read_in.length = {model.read_in.length}, the positions of the model; shorten the ones '
                        'or raise the other')
  _check_loops(config)
  if config.objective.longest > model.loops:
    raise ConfigError(f'objective: a plan of {config.objective.longest} steps is longer than model.loops = '
                      f'{model.loops}; raise model.loops')
  if train.batch % train.accumulate:
    raise ConfigError(f'train.batch = {train.batch} does not divide into train.accumulate = {train.accumulate} '
                      'microbatches; choose a divisor of the batch')
  if not model.start.heard and not model.cell.injects:
    raise ConfigError(f'model.start = {_name_of(type(model.start))}: the loop would never see its input, because '
                      'model.cell does not inject it; start from it (Embedded), or use a cell that injects')
  for name, teacher in config.objective.teachers.items():
    outputs = teacher.model(model).outputs
    if outputs != model.outputs:
      raise ConfigError(f'objective.rolls: the teacher {name} has {outputs} answers to choose from, the model '
                        f'{model.outputs}; give a teacher with the same tokenizer')
  for name, roll in config.objective.rolls.items():
    if Planner not in type(roll.plan).__mro__:
      raise ConfigError(f'objective.rolls.{name}.plan = {_name_of(type(roll.plan))}: it is no planner; make it a '
                        'subclass of loopformer.types.Planner, which says what every planner tells')
    if roll.plan.differentiated < roll.plan.expected and not model.cell.injects and not roll.plan.detached:
      raise ConfigError(f'objective.rolls.{name}.plan: steps without gradient before the others, but model.cell does '
                        'not inject its input, so nothing before the loop would learn; differentiate all, or inject')
  for weighted in config.objective.terms.values():
    if hasattr(weighted.term, 'check'):
      weighted.term.check(model)
  if isinstance(config.objective.prepare, sockets.Preparation):
    config.objective.prepare.check(model, config.task.measure)
  config.control.check({name: roll.plan for name, roll in config.objective.rolls.items()}, config.evals.schedules())
  for steps in (*train.earlier, train.steps):
    try:
      config.optim.make(steps, Roles())
    except TypeError as error:  # memories have a `make` too
      raise ConfigError(f'optim = {_name_of(type(config.optim))}: no optimiser can be made of it ({error}); give one '
                        'of those of loopformer.optim') from error
  best_of(config)
  _check_evals(model, config.evals.schedules())


def _check_evals(model: Looped, schedules: Mapping[str, Any]):
  """Raises ConfigError where the model cannot run what it is to be evaluated at, which would end a run at its first
  evaluation; or its own number of loops."""
  most = model.cell.most
  if most is not None and model.loops > most:
    raise ConfigError(f'model.loops = {model.loops}: model.cell runs {most} steps at most; lower the one, or make the '
                      'other for more')
  for name, steps in schedules.items():
    longest = steps.plan.longest if isinstance(steps, Run) else len(steps)
    if most is not None and longest > most:
      raise ConfigError(f'evals: the schedule {name!r} has {longest} steps, but model.cell runs {most} at most; '
                        'evaluate at so many, or make the cell for more')
    if isinstance(steps, Run) and steps.exit.decides:
      exits.check(model, steps.exit, f'evals: the exit of {name!r}')


def _check_loops(config: Experiment):
  """Raises ConfigError where a plan, or the model's caches, would have more steps than a program is made for."""
  schedules = config.evals.schedules()
  found: dict[str, float] = {'model.loops': config.model.loops}
  found |= {f'the steps of objective.rolls.{name}.plan': max(roll.plan.longest, roll.plan.expected)
            for name, roll in config.objective.rolls.items() if Planner in type(roll.plan).__mro__}
  found |= {f'the steps of evals: {name}': run.plan.longest for name, run in schedules.items() if isinstance(run, Run)}
  for name, loops in found.items():
    plans.count(name, math.ceil(loops))


def check_values(value: Any, path: str):
  """Raises ConfigError where a field that is declared to hold numbers, text or truth holds something else: not whole
  numbers, which would be truncated, or not finite ones."""
  for name, inner in fields(value).items():
    where = f'{path}.{name}' if path else name
    words = _check_kind(type(value), name, inner, where)
    for number in (_plain(inner) if isinstance(inner, tuple) else (_plain(inner),)) if words & {'int', 'float'} else ():
      if isinstance(number, float) or 'float' in words and number is not None:
        real(where, number, REAL.get(name, '(-inf, inf)'))
      elif isinstance(number, int):
        whole(where, number, *WHOLE.get(name, (-2 ** 31, 2 ** 31 - 1)))
    for index, item in enumerate(inner) if isinstance(inner, tuple) else ():
      check_values(item, f'{where}[{index}]')
    check_values(inner, where)


def _check_kind(kind: Any, name: str, value: Any, where: str) -> set[str]:
  """The words of the declared type of a field that holds no parts; raises ConfigError where the value is of another."""
  declared, cls = _declared(kind, name)
  called = _kind_name(declared)
  words = set(re.findall(r'\w+', called)) - {'tuple', 'None'}
  if not words or not words <= PLAIN:
    if declared is not None:
      _check_parts(value, called, where)
      _check_socket(name, value, _kind_of(declared, cls), where)
    return set()
  try:
    fit(_plain(value), _type_of(declared, cls))
  except TypeError:
    wanted = 'finite numbers' if 'float' in words else 'whole numbers' if 'int' in words else 'a value of that kind'
    raise ConfigError(f'{where} = {value!r}: expected {called}; give {wanted}') from None
  return words


def _check_parts(value: Any, called: str, where: str):
  """Raises ConfigError where a plain value stands in a field whose declared type, `called`, has parts alone."""
  words, held = set(re.findall(r'\w+', called)), {'': value}
  if words & {'Mapping', 'dict'}:
    words -= {'str'}  # the names
    held = {f'.{name}': item for name, item in value.items()} if isinstance(value, Mapping) else held
  elif 'tuple' in words and isinstance(value, (tuple, list)):
    held = {f'[{index}]': item for index, item in enumerate(value)}
  for inner, item in held.items() if not words & PLAIN else ():
    if isinstance(item, (bool, int, float, str, tuple, list, np.generic)):
      raise ConfigError(f'{where}{inner} = {item!r}: expected a part ({called}), which is written as an object '
                        'with its $part')


def _check_socket(name: str, value: Any, kind: Any, where: str):
  """Raises ConfigError where a part of the library stands in a field, of declared type `kind`, that is for others: it
  lacks what the socket of the field's name asks for, or is of none of the declared types."""
  inner = typing.get_args(kind)
  if isinstance(value, (Mapping, tuple)) and typing.get_origin(kind) in (collections.abc.Mapping, dict, tuple):
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
      _check_socket(name, item, inner[-1] if isinstance(value, Mapping) else inner[0], f'{where}[{key!r}]')
  if not is_part(value) and not isinstance(value, nn.Module) or not (shown := _name_of(type(value))).startswith(PARTS):
    return
  kinds = [kind for kind in inner or (kind,) if kind is not type(None)]
  own = [kind for kind in kinds if inspect.isclass(kind) and (dataclasses.is_dataclass(kind) and kind is not nn.Module)]
  if isinstance(value, tuple(own)):
    return
  socket = SOCKETS.get(name) or next((kind for kind in kinds if typing.Protocol in getattr(kind, '__bases__', ())),
                                     None)
  if socket is not None:
    has = {*dir(value), *fields(value)}
    for member in (*vars(socket), *socket.__annotations__):
      if (member == '__call__' or not member.startswith('_')) and member not in has:
        raise ConfigError(f'{where} = {shown}: no {socket.__name__}, because it has no {member}; give one of those')
    return
  if len(own) == len(kinds):
    raise ConfigError(f'{where} = {shown}: expected {" or ".join(kind.__name__ for kind in own)}; give one of those')


def _kind_of(declared: Any, cls: type) -> Any:
  """The declared type; Any where its names are known to type checkers alone."""
  try:
    return _type_of(declared, cls)
  except (NameError, TypeError):
    return Any


def _plain(value: Any) -> Any:
  """NumPy's numbers as Python's, in tuples too."""
  if isinstance(value, (tuple, list)):
    return tuple(map(_plain, value))
  return value.item() if isinstance(value, np.generic) else value


# Files ---------------------------------------------------------------------------------------------------------------


def load(spec: str, overrides: typing.Sequence[str] = ()) -> Experiment:
  """The experiment of a configuration file: `path/to/file.py` or `path/to/file.py:argument`, then overrides.

  The file defines `get_config()` or `get_config(argument: str)`. Those that come with the library have short names too,
  `loopformer:tiny`, and are found from every folder.
  """
  bucket = (re.match(r'\w+://', spec) or [''])[0]
  name, _, argument = spec.removeprefix(bucket).partition(':')
  path = _file_of(bucket + name)
  module = _import_file(path)
  if not hasattr(module, 'get_config'):
    raise ConfigError(f'--config {path}: the file defines no get_config; see experiments/configs/ for examples')
  if argument and not inspect.signature(module.get_config).parameters:
    raise ConfigError(f'--config {spec}: its get_config takes no argument; leave out :{argument}')
  with _telling(path):
    config = module.get_config(*([argument] if argument else []))
  if not isinstance(config, Experiment):
    raise ConfigError(f'--config {path}: its get_config returns {_name_of(type(config))}; let it return an Experiment')
  for assignment in overrides:
    config = override(config, assignment)
  return config


def published() -> dict[str, Path]:
  """The configuration files that come with the library, by their short names."""
  spec = importlib.util.find_spec('experiments.configs')
  files = [file for folder in (spec and spec.submodule_search_locations or ()) for file in Path(folder).glob('*.py')]
  return {file.stem: file for file in sorted(files) if file.stem != '__init__'}


def _file_of(name: str) -> Any:
  """The configuration file that is meant: of this path, or of this short name. Raises ConfigError if there is neither.
  """
  path = storage.path(name)
  short = re.fullmatch(r'(?:experiments/configs/)?([^/]+?)(?:\.py)?', name)
  known = published()
  if not path.is_file() and short and short[1] in known:
    return known[short[1]]
  if not path.is_file():
    close = difflib.get_close_matches(path.stem, known, 1)
    raise ConfigError(f'--config={name}: no such file, and no configuration of the library; '
                      + (f'did you mean --config={close[0]}? ' if close else '') + '--mode=configs lists those '
                      'there are, as `loopformer configs` does')
  return path


def _import_file(path: Any) -> types.ModuleType:
  """The file as a module that is named after it and its contents, so that two versions of it are two modules."""
  source = path.read_bytes()
  digest = hashlib.sha256(source).hexdigest()[:8]
  name = LOADED + path.stem if path.stem.endswith(digest) else f'{LOADED}{path.stem}_{digest}'
  if name not in sys.modules:
    file = str(storage.fetched(path))  # whatever its name ends with
    loader = importlib.machinery.SourceFileLoader(name, file)
    module_spec: Any = importlib.util.spec_from_file_location(name, file, loader=loader)
    module: Any = importlib.util.module_from_spec(module_spec)
    module.__source__ = source
    sys.modules[name] = module
    try:
      with moved.importable(), _telling(path):
        loader.exec_module(module)
    except BaseException:
      del sys.modules[name]
      raise
  return sys.modules[name]


@contextlib.contextmanager
def _telling(path: Any) -> Iterator[None]:
  """Names the line of a configuration file whose code fails."""
  try:
    yield
  except ConfigError:
    raise
  except SyntaxError as error:
    where = f'line {error.lineno}' if error.lineno else 'it'
    raise ConfigError(f'--config {path}: {where} is not Python ({error.msg}); correct it') from error
  except Exception as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path.name)]
    where = f'line {lines[-1]}: ' if lines else ''
    raise ConfigError(f'--config {path}: {where}{type(error).__name__}: {error}; correct the file') from error


def arguments(text: str, /, **defaults: Any) -> dict[str, Any]:
  """Reads a configuration's argument: `arguments('small,loops=4', size='tiny', loops=8)`.

  A word without `=` is the value of the first name; where the default is a bool, 0 and 1 are. A default that is a type,
  int or float, stands for a number that may be left out: None then. Raises ConfigError for names that are not among the
  defaults, and for values of another type than theirs.
  """
  values = {name: None if isinstance(default, type) else default for name, default in defaults.items()}
  first = next(iter(defaults))
  for word in filter(None, text.split(',')):
    name, equals, value = word.partition('=')
    name, value = (name, value) if equals else (first, word)
    if name not in defaults:
      close = difflib.get_close_matches(name, defaults, 1)
      raise ConfigError(f'config argument {word!r}: no {name!r} here; {f"did you mean {close[0]!r}? " if close else ""}'
                        f'there are {", ".join(defaults)}')
    if isinstance(defaults[name], bool):
      values[name] = choose(name, value, {'0': False, '1': True})
    else:
      kind = defaults[name] if isinstance(defaults[name], type) else type(defaults[name])
      try:
        values[name] = _parse(value, values[name], kind, f'config argument {name}')
      except ConfigError as error:
        if isinstance(defaults[name], type):
          number = 'a whole' if kind is int else 'a finite'
          raise ConfigError(f'config argument {name} = {value}: give {number} number, or leave it out') from error
        raise
  return values


def counted(given: Mapping[str, Any], name: str, default: int) -> int:
  """The number that an argument of `arguments` gives, where it is left out the default. Raises ConfigError below 1, and
  where it counts what a configuration has an entry for each of, above the most loops of a plan."""
  most = plans.LONGEST if name in EACH else None
  return default if given[name] is None else whole(f'config argument {name}', given[name], 1, most)


def choose(name: str, value: Any, table: Mapping[Any, Any]) -> Any:
  """The row of a configuration's table, or an error that lists the rows."""
  if value not in table:
    close = difflib.get_close_matches(str(value), map(str, table), 1, 0.5)
    raise ConfigError(f'config argument {name} = {value!r}: {f"did you mean {close[0]!r}? " if close else ""}choose '
                      f'one of {", ".join(map(str, table))}')
  return table[value]


def save(config: Experiment, workdir: str | Path):
  """Writes config.json, and a copy of the configuration file where parts of it are defined there."""
  folder = storage.path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  encoded = json.dumps(_encode(config), indent=1)
  for name, module in list(sys.modules.items()):
    if name.startswith(LOADED) and f'"{name}:' in encoded:
      copy = folder / f'{name.removeprefix(LOADED)}.py'
      if not copy.exists():
        storage.write(copy, module.__source__)  # as it was read: the file may have changed or gone since
  storage.write(folder / FILE, encoded + '\n')


def is_saved(config: Experiment, workdir: str | Path) -> bool:
  """Whether a work folder holds this configuration, word for word; nothing in it is looked up."""
  with contextlib.suppress(ValueError):
    encoded = json.loads((storage.path(workdir) / FILE).read_text(encoding='utf-8'))
    return encoded == json.loads(json.dumps(_encode(config)))
  return False


def is_workdir(path: Any) -> bool:
  """Whether a folder holds the configuration of a run, and not another program's file of that name, or none."""
  if not (path / FILE).is_file():
    return False
  with contextlib.suppress(ConfigError):
    return '$part' in reading.read_json(path / FILE, '')
  return True  # damaged: `read` says so


@contextlib.contextmanager
def trusting(given: bool = True) -> Iterator[None]:
  """Inside it, if trust is given, work folders may name any code, and code that lies in them is run."""
  token = _TRUST.set(given or _TRUST.get())
  try:
    yield
  finally:
    _TRUST.reset(token)


def read(workdir: str | Path, like: Experiment | None = None) -> Experiment:
  """The configuration of a work folder.

  Args:
    like: one that the caller has: what it is made of may be named in the folder too.

  Raises:
    ConfigError: it holds none, or one that names what is no part of the library, which runs where trust is given alone;
      or one that is damaged, or of a version whose parts are not those of this one.
  """
  folder = storage.path(workdir)
  path = folder / FILE
  if not path.exists():
    raise ConfigError(f'workdir = {folder}: no config.json in it, so no run was started there; '
                      'give the work folder of a training run')
  remedy = 'put the file back that the run wrote'
  encoded = reading.read_json(path, remedy)
  with reading.naming(path, remedy):
    found = _decode(encoded, folder, set() if like is None else set(_named(_encode(like))))
    if not isinstance(found, Experiment):
      raise ConfigError(f'it describes no experiment; {remedy}')
  return found


def _named(encoded: Any) -> Iterator[str]:
  """The classes and functions that an encoded configuration names."""
  if isinstance(encoded, (list, dict)):
    yield from (encoded[key] for key in ('$part', '$name') if isinstance(encoded, dict) and key in encoded)
    for inner in encoded.values() if isinstance(encoded, dict) else encoded:
      yield from _named(inner)


def _name_of(thing: Any) -> str:
  return f'{thing.__module__}.{thing.__qualname__}'


def _encode(value: Any) -> Any:
  if is_part(value):
    return {'$part': f'{type(value).__module__}:{type(value).__qualname__}',
            **{name: _encode(field) for name, field in fields(value).items()}}
  if isinstance(value, Mapping):
    return {name: _encode(field) for name, field in value.items()}
  if isinstance(value, (tuple, list)):
    return [_encode(item) for item in value]
  if callable(value) and hasattr(value, '__qualname__'):
    if '<' in value.__qualname__:
      raise ConfigError(f'{value.__qualname__} is a lambda or a closure and cannot be saved; define it in a module')
    return {'$name': f'{value.__module__}:{value.__qualname__}'}
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, np.generic):
    return value.item()
  raise ConfigError(f'a configuration holds {value!r}, which cannot be saved; use parts, numbers, text and tuples')


def _decode(value: Any, workdir: Any, known: Collection[str] = ()) -> Any:
  if isinstance(value, list):
    return tuple(_decode(item, workdir, known) for item in value)
  if not isinstance(value, dict):
    return value
  inner = {name: _decode(field, workdir, known) for name, field in value.items() if not name.startswith('$')}
  for key in ('$name', '$part'):
    if key in value:
      name = value[key]
      found = moved.find(name) if name in known else _find(name, workdir, part=key == '$part')
      return _made(found, inner, name, workdir) if key == '$part' else found
  return inner


def _made(part: Callable, inner: Mapping[str, Any], name: str, workdir: Any) -> Any:
  """The part of a saved name, of these fields."""
  with reading.naming(workdir / FILE, f'{name} has it; use the version of loopformer that wrote the file'):
    for field, value in inner.items() if isinstance(part, type) else ():
      if not isinstance(value, float) or math.isfinite(value):  # infinite ones were taken once
        _check_kind(part, field, value, f'{part.__name__}.{field}')
    return part(**inner)


def _published(module: str) -> Path | None:
  """The file of experiments/configs whose contents a module of this name has; None where it is another's."""
  stem, _, digest = module.removeprefix(LOADED).rpartition('_')
  path = published().get(stem)
  return path if path and hashlib.sha256(path.read_bytes()).hexdigest()[:8] == digest else None


def _find(name: str, workdir: Any, part: bool) -> Callable:
  """What a saved name stands for: a class of parts, or a function that a part has as a value."""
  if not isinstance(name, str) or ':' not in name:
    raise ConfigError(f'{workdir / FILE}: it names {name!r}, which is no part; put the file back that the run wrote')
  module, trusted = moved.name_of(name).partition(':')[0], _TRUST.get()
  copied = module.startswith(LOADED)  # of a configuration file, read in this process or a copy in the folder
  refused = ConfigError(f'{workdir / FILE}: it names {name}, which is no part of this library; if you know the code '
                        'and where the folder comes from, give --trust (trust=True) to run it')
  if copied and module not in sys.modules:
    published, file = _published(module), workdir / f'{module.removeprefix(LOADED)}.py'
    if published is None and not trusted:
      raise ConfigError(f'{workdir / FILE}: it names {name}, whose code is in {file}; read that file, and give --trust '
                        '(trust=True) to run it')
    _import_file(published or file)
  elif not copied and not trusted and not f'{module}.'.startswith(PARTS) and (part or module not in FUNCTIONS):
    raise refused  # before anything is imported
  try:
    found = moved.find(name)
  except Exception as error:  # of a module that is imported for it, such as one of another command
    raise ConfigError(f'{workdir / FILE}: it names {name}, which this version of loopformer does not have ({error}); '
                      'use the version that wrote it') from error
  if trusted or part and name in moved.FACTORIES:
    return found
  own = getattr(found, '__module__', None) or ''  # a name may lead through a module to what that has imported
  if part:
    own_part = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, nn.Module))
    known = own_part and (own == module if copied else f'{own}.'.startswith(PARTS))
  else:
    known = own == module and (copied or module in FUNCTIONS)
  if not known:
    raise refused
  return found
