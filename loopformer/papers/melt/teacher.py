"""The teacher that a converted model learns from: the model as it was trained, and what its attention gives."""
from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from loopformer.cells.cell import Around
from loopformer.objective import Own
from loopformer.types import GIVEN, Array, ConfigError, Context, config_dataclass


class WithAttention(Around):
  """The step of another cell, and aux['attention'] [N, B, T, D]: what attention gave in every layer that ran, after its
  last projection, in the dtype of the layers (MELT, section 3).

  Layers are those of `nn.blocks.Block`, in chains too. Raises ConfigError where the stack has others. Around a cell
  that tells as much already, as in WithAttention(WithAttention(..)), it is that cell.
  """

  def __call__(self, x: Any, e: Array, ctx: Context, kv: Any) -> tuple[Any, Any, dict]:
    if self.is_initializing():  # there are no parameters to run with yet
      return self.inner(x, e, ctx, kv)
    cell, variables = self.inner.unbind()
    (x, kv, aux), told = cell.apply(variables, x, e, ctx, kv, mutable=[GIVEN])
    return x, kv, aux if 'attention' in aux else {**aux, 'attention': _by_layer(told, self.core.applications)}


def _by_layer(told, layers):
  """Pairs of leaves, numbers of layers [n] and what their attention gave [n, B, T, D], or without n -> [N, B, T, D], in
  the order of the numbers."""
  leaves = jax.tree.leaves(told)
  numbers = [number.ravel() for number in leaves[::2]]
  found = sum(len(number) for number in numbers)
  if found != layers:
    raise ConfigError(f'model.cell.of: {found} of its {layers} layers tell what their attention gives; use a model '
                      'whose layers are those of nn.blocks.Block')
  given = jnp.concatenate([leaf.reshape(-1, *leaf.shape[-3:]) for leaf in leaves[1::2]])
  return given[jnp.argsort(jnp.concatenate(numbers))]


@config_dataclass
class OwnWithAttention:
  """A teacher of its own make, as `objective.Own`, that also tells what its attention gives: for the term `Aligned`."""
  folder: str
  paths = ('folder',)

  @property
  def name(self) -> str:
    """As of Own."""
    return f'{self.folder} (its own model, and what its attention gives)'

  def model(self, own: Any) -> Any:
    """The model that runs. Raises ConfigError where the folder holds none, or one whose loops do not run one by one."""
    model = Own(folder=self.folder).model(own)
    cell = WithAttention(model.cell)
    try:
      cell.check(model.read_in.width)
    except ConfigError as error:
      raise ConfigError(f'objective.rolls: weights_of = {self.folder}: {error}') from error
    return model.clone(cell=cell)
