"""The public functions; `import loopformer` offers them under their names."""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import numpy as np

from loopformer import plans, sharding, storage
from loopformer.generation import generate, warn_beyond
from loopformer.types import Array, ConfigError, Params, Plan

__all__ = ['generate', 'load', 'logits']


def load(workdir: str | Path, step: int | None = None,
         mesh: jax.sharding.Mesh | None = None) -> tuple[Any, Params, Any, Any]:
  """(model, params, tokenizer, config) of a training run, from its work folder alone.

  Args:
    workdir: the folder that the run was given, of this machine or of a bucket (gs://, s3://).
    step: which checkpoint; the last complete one by default.
    mesh: None for one device, or `loopformer.sharding.Mesh(...).make()`, over whose axes fsdp and tensor the weights
      are divided: each device reads its own part, and neither a host nor a device holds the whole. `evaluate`, `Engine`,
      `generate` and `logits` then run on that mesh. With several processes all of them call it.

  Raises:
    ConfigError: no run, or no complete checkpoint (of that step), in the folder; a mesh that does not divide the heads.
  """
  from loopformer import config as configs
  from loopformer.checkpoint import FOLDER, Checkpoints, abstract
  from loopformer.model import init_params, parameter_roles
  workdir = storage.path(workdir)
  storage.check_workdir(workdir, writes=False)
  config = configs.read(workdir)
  if not (workdir / FOLDER).is_dir():
    raise ConfigError(f'workdir = {workdir}: no checkpoint was saved there yet; let the run reach its first save '
                      f'(train.save_every = {config.train.save_every} steps)')
  shapes = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
  if mesh is None:
    device = SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda _: device, shapes)
  else:
    sharding.check_model(config.model, mesh)
    target = sharding.shardings(shapes, mesh, parameter_roles(config.model))
  with Checkpoints(workdir) as checkpoints:
    _, params = checkpoints.restore_params(step, abstract(shapes, target))
  return config.model, params, config.task.tokenizer_of(workdir), config


def logits(model: Any, params: Params, tokens: Any, *, steps: int | Sequence[float] | None = None) -> Array:
  """Next-token logits, f32[B, T, V].

  Args:
    tokens: i32[B, T].
    steps: a budget (that many equal steps), or step sizes with sum one; the model's own number of loops by default.

  Raises:
    ConfigError: a schedule that does not sum to one, or more tokens than the model has positions.
  """
  steps = plans.resolve(model.loops if steps is None else steps)
  warn_beyond(model, steps)
  if not model.read_in.vocab:
    raise ConfigError('model: its inputs are vectors, and it has no next token; call model.apply, as evaluate.py does')
  tokens = np.asarray(tokens)
  if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
    raise ConfigError(f'tokens: {tokens.dtype}{list(tokens.shape)}; give integers of shape [B, T]')
  if tokens.shape[1] > model.read_in.length:
    raise ConfigError(f'tokens: {tokens.shape[1]} a row, more than the {model.read_in.length} positions of the model '
                      '(read_in.length); shorten them')
  if tokens.size and not 0 <= tokens.min() <= tokens.max() < model.read_in.vocab:
    raise ConfigError(f'tokens: ids from {tokens.min()} to {tokens.max()}, but the vocabulary has '
                      f'{model.read_in.vocab} (read_in.vocab)')
  with sharding.on(sharding.mesh_of(params)):
    return _logits(model, params, jnp.asarray(tokens, jnp.int32), plans.schedule(steps, max(len(steps), model.loops)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params: Params, tokens: Array, plan: Plan) -> Array:
  trace = model.apply({'params': params}, tokens, plan)
  return model.apply({'params': params}, trace.z, method='logits')
