"""Checkpoints: parameters, optimiser state, and where the data stood, in one Orbax manager a work folder.

`params` is an item of its own, so that evaluation restores weights without an optimiser.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from loopformer.types import ConfigError

FOLDER = 'checkpoints'
LAYOUT = 2  # raised whenever the meaning of what is stored changes


class Checkpoints:
  """The checkpoints of a work folder; a context manager that waits for the last save."""

  def __init__(self, workdir: Path, keep: int = 3):
    import orbax.checkpoint as ocp
    self._ocp = ocp
    self._folder = Path(workdir).resolve() / FOLDER
    self._manager = ocp.CheckpointManager(
        self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._manager.close()

  def latest(self) -> int | None:
    """The last complete step, or None."""
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """All complete steps, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, params: Any, optimizer: Any, data: dict, control: dict):
    """Starts to save; returns as soon as the arrays may be overwritten.

    `data` is the state of the data iterator, `control` the memory of the run's controller.
    """
    args = self._ocp.args
    self._manager.save(step, args=args.Composite(
        params=args.StandardSave(params), optimizer=args.StandardSave(optimizer),
        meta=args.JsonSave({'layout': LAYOUT, 'step': step, 'data': data, 'control': control})))

  def restore(self, step: int, params: Any, optimizer: Any) -> tuple[Any, Any, dict, dict]:
    """(params, optimizer, data state, controller's memory) of a step, laid out like the abstract arrays that are given.

    Raises:
      ConfigError: the step is not there, or was written by another layout.
    """
    args = self._ocp.args
    restored = self._restore(step, params=args.StandardRestore(params), optimizer=args.StandardRestore(optimizer))
    return restored['params'], restored['optimizer'], restored['meta']['data'], restored['meta']['control']

  def restore_params(self, step: int | None, params: Any) -> tuple[int, Any]:
    """(step, params), of the latest step if none is named."""
    step = self.latest() if step is None else step
    return step, self._restore(step, params=self._ocp.args.StandardRestore(params))['params']

  def _restore(self, step: int | None, **items):
    if step not in self.steps():
      wanted = 'no complete checkpoint' if step is None else f'no complete checkpoint of step {step}'
      raise ConfigError(f'{self._folder}: {wanted} there; complete steps: {self.steps() or "none"}. '
                        'Train first, or name a step that is there')
    restored = self._manager.restore(
        step, args=self._ocp.args.Composite(meta=self._ocp.args.JsonRestore(), **items))
    layout = restored['meta']['layout']
    if layout != LAYOUT:
      raise ConfigError(f'{self._folder}/{step}: layout {layout}, but this version reads layout {LAYOUT}; '
                        'use the version of loopformer that wrote it')
    return restored


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes and dtypes with their shardings: the target of a restore onto this mesh."""
  return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                      tree, shardings)
