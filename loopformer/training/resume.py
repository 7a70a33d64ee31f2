"""What a run may change of its configuration when it goes on.

What is reported and kept may change (config.FREE). The number of steps may, where the run so far is what a run of that
many steps would have been: none of the steps that were trained had another learning rate. Then config.json says the
new number, and is as true as if it had said so from the start. Schedules that end with the run, a cosine or a
cool-down that has begun, make it another run: `train.extended` says that it was one, and of how many steps. While
nothing is saved yet, all but the task may change, and that too where nothing was prepared for it. Anything else is
another run.
"""
from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import config as configs, storage
from loopformer.training.checkpoint import trained
from loopformer.training.control import NoControl
from loopformer.training.lock import FILE as LOCK
from loopformer.types import ConfigError

LENGTH = ('train.steps', 'train.extended')
TOLD = 8  # differences that an error tells of


def with_its_paths(config: Any, workdir: Any) -> Any:
  """The configuration with its paths as the work folder's run, if there is one, has written them, because data were
  prepared under those names; where the run's is another path, as `check` allows while nothing is saved, the
  configuration's own.
  """
  workdir = storage.path(workdir)
  if not (workdir / configs.FILE).exists():
    return config
  here = dict(configs.paths(config))
  same = {where: path for where, path in configs.paths(configs.read(workdir, config))
          if where in here and storage.absolute(path) == storage.absolute(here[where])}
  return configs.with_paths(config, same)


def check(config: Any, workdir: Any):
  """Raises ConfigError where the work folder holds a run that cannot go on as this configuration says."""
  workdir = storage.path(workdir)
  if not (workdir / configs.FILE).exists() or configs.is_saved(config, workdir):
    return
  saved, done = configs.read(workdir, config), trained(workdir)
  differences = list(configs.difference(saved, config))
  if done is None:  # nothing but data were made, if that
    differences = [row for row in differences if row[0].startswith('task')] if _prepared(workdir) else []
  others = [row for row in differences if row[0] not in LENGTH]
  if not differences:
    return
  told = ', '.join(f'{path} is {old} there, {new} here' for path, old, new in differences[:TOLD])
  told += f', and {len(differences) - TOLD} more' if len(differences) > TOLD else ''
  told = f'workdir = {workdir} holds a run of another configuration: {told}. '
  if others:
    moved = any(path.endswith('.root') for path, *_ in others)
    raise ConfigError(f'{told}Give another --workdir, or the configuration that the run was started with'
                      + (' (none at all, to go on from another current folder)' if moved else ''))
  assert done is not None  # else data alone differ, which are among the others
  old, new = saved.train, config.train
  if new.extended != old.extended:
    if new.extended != (*old.earlier, old.steps):
      past = ','.join(map(str, (*old.earlier, *([old.steps] if new.steps > old.steps else []))))
      raise ConfigError(f'{told}Give --set train.extended={past or "()"}, the numbers of steps that the run had before')
    return
  if done > new.steps:
    raise ConfigError(f'{told}Its step {done} is saved already; give train.steps={done} or more, or another --workdir')
  path = unlike(saved, config, done)
  if path is None:
    return
  start = f'begin anew in another --workdir with --set train.start={workdir}'
  if new.steps < old.steps:
    raise ConfigError(f'{told}{path} goes by the number of steps, and its {done} steps were trained as those of a '
                      f'longer run; keep train.steps={old.steps}, or {start}')
  past = ','.join(map(str, (*old.earlier, old.steps)))
  raise ConfigError(f'{told}{path} goes by the number of steps, and its {done} steps were trained as those of a '
                    f'shorter run. To go on after step {old.steps} as a run of {new.steps} steps does there, add --set '
                    f'train.extended={past}; or {start}')


def _prepared(workdir: Any) -> bool:
  """Whether a folder holds more than what a run writes before it prepares data."""
  return any(entry.name not in (configs.FILE, LOCK, 'log.txt') and entry.suffix != '.py' for entry in workdir.iterdir())


def unlike(saved: Any, config: Any, done: int) -> str | None:
  """The field by which the trained steps would have been others with the number of steps of `config`, None if none."""
  numbers = jnp.arange(done)
  for path, schedule in _schedules(saved.optim, 'optim'):
    before, after = (np.asarray(jax.vmap(schedule.make(steps))(numbers)) if done else 0
                     for steps in (saved.train.steps, config.train.steps))
    if not np.array_equal(before, after):
      return path
  last, every = saved.train.steps, saved.train.eval_every
  if saved.control != NoControl() and done == last and last % every:  # it has seen an evaluation that was the last
    return 'control'
  return None


def _schedules(value: Any, path: str) -> Iterator[tuple[str, Any]]:
  """The parts within another that make a schedule for a number of steps, `make(steps)`."""
  make = getattr(value, 'make', None)
  if make is not None and list(inspect.signature(make).parameters) == ['steps']:
    yield path, value
  for name, field in configs.fields(value).items():
    for inner, part in enumerate(field) if isinstance(field, tuple) else [('', field)]:
      if dataclasses.is_dataclass(part):
        yield from _schedules(part, f'{path}.{name}{f"[{inner}]" if inner != "" else ""}')
