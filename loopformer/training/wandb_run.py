"""Metrics to Weights & Biases (extra `wandb`): where WANDB_PROJECT names a project, beside JSON lines and TensorBoard.
"""
from __future__ import annotations

import functools
import importlib.util
import os
import secrets
from typing import Any
import warnings

from loopformer import reading, storage
from loopformer.types import ConfigError

PROJECT = 'WANDB_PROJECT'
FILE = 'wandb.json'  # of a work folder: the id of its run


class WandbRun:
  """The run of a work folder, begun after the first step and continued, under its id, where training is resumed.

  Steps that it was told of before are not told again by wandb: a resumed run repeats them as they were. Whatever fails
  in wandb is a warning, once, and ends the telling; training goes on. Its own files lie in the work folder (of a
  bucket, in the cache of this machine); WANDB_MODE=offline keeps them for `wandb sync`.
  """

  def __init__(self, folder: Any):
    self._folder, self._failed = folder, False

  @functools.cached_property
  def _run(self) -> Any:
    import wandb  # the extra `wandb`
    kept = self._folder / FILE
    if not kept.exists():
      storage.write(kept, f'{{"id": "{secrets.token_hex(4)}"}}\n')
    told = reading.read_json(kept, 'remove it, and another run begins').get('id')
    if not isinstance(told, str) or not told:
      raise ConfigError(f'{kept}: no id of a run; remove it, and another run begins')
    place = storage.cache() if storage.remote(self._folder) else self._folder
    place.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project=os.environ[PROJECT], id=told, name=self._folder.name, resume='allow', dir=str(place),
                     settings=wandb.Settings(console='off'))
    config = self._folder / 'config.json'
    if config.exists():  # fields that a resumed run may change have changed
      run.config.update(reading.read_json(config, 'put the file back'), allow_val_change=True)
    return run

  def add_scalar(self, name: str, value: float, step: int):
    """One number, such as 'train/loss', of a step."""
    self._try(lambda: self._run.log({name: value}, step=step))

  def close(self):
    """Waits for what was not sent yet."""
    if '_run' in self.__dict__:
      self._try(lambda: self._run.finish())

  def _try(self, tell: Any):
    if self._failed:
      return
    try:
      tell()
    except Exception as error:
      self._failed = True
      first = (str(error).splitlines() or [type(error).__name__])[0]
      warnings.warn(f'Weights & Biases is told no more of this run, which goes on: {first}', stacklevel=2)


def begin(folder: Any) -> WandbRun | None:
  """The run of a work folder; None where WANDB_PROJECT names no project, or with a warning where wandb is not
  installed.
  """
  if not os.environ.get(PROJECT):
    return None
  found = importlib.util.find_spec('wandb')
  if found is None or found.origin is None:  # a folder of that name, which wandb itself makes, is no package
    warnings.warn(f'{PROJECT}={os.environ[PROJECT]}: nothing is told to Weights & Biases, because wandb is not '
                  "installed; pip install 'loopformer[wandb]', or unset it", stacklevel=2)
    return None
  return WandbRun(folder)
