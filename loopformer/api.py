"""The public functions; `import loopformer` offers them under their names."""
from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import jax

from loopformer import plans, sharding, storage
from loopformer.data.tokenizer import load_tokenizer
from loopformer.inference.engine import generate, warn_beyond
from loopformer.inference.tracing import Insight, checked_tokens, trace
from loopformer.model import Looped, init_params, run_batch
from loopformer.types import Array, ConfigError, Params, Plan

__all__ = ['Insight', 'Loaded', 'generate', 'init_params', 'load', 'logits', 'run_batch', 'trace']
TOKENIZER = 'tokenizer'  # where a folder that `Loaded.save` wrote keeps its own


class Loaded(NamedTuple):
  """A model with its weights, from wherever they came.

  tokenizer: None where there is none. config: that of the run; of a model that came from elsewhere one without a task.
  """
  model: Looped
  params: Params
  tokenizer: Any
  config: Any

  def save(self, workdir: str | Path):
    """Writes a work folder, of this machine or of a bucket, that `load`, evaluation, generation, export, `train.start`
    and teachers read; a run of its configuration starts from these parameters there.

    Raises:
      ConfigError: a run is in the folder already; no path.
    """
    from loopformer import config as configs
    from loopformer.training.checkpoint import FOLDER, Checkpoints
    _check_path('workdir', workdir)
    folder = storage.path(workdir)
    storage.check_workdir(folder, writes=True)
    if (folder / configs.FILE).exists():
      raise ConfigError(f'workdir = {folder}: it holds a run; give a new folder')
    if (folder / FOLDER).exists():
      raise ConfigError(f'workdir = {folder}: it holds checkpoints and no configuration, as of an import that was '
                        f'interrupted; remove {folder / FOLDER}, or give a new folder')
    if self.tokenizer is not None:
      self.tokenizer.save(folder / TOKENIZER)
    with Checkpoints(folder) as checkpoints:
      checkpoints.save(0, self.params, None, {}, {})
    configs.save(dataclasses.replace(self.config, model=self.model), folder)  # last: it makes the folder one of a run


def load(source: str | Path, step: int | None = None, mesh: jax.sharding.Mesh | None = None, trust: bool = False,
         **options: Any) -> Loaded:
  """(model, params, tokenizer, config) of a training run, from its work folder alone; or of a model from elsewhere.

  Args:
    source: the work folder of a run; a Hugging Face folder; a .gguf file; or a checkpoint of a paper's own code, with
      `kind='loopformer'` or another of `convert.from_official`. Of this machine or of a bucket (gs://, s3://).
    step: which checkpoint of a run; the last complete one by default.
    mesh: None for one device, or `loopformer.sharding.Mesh(...).make()`, over whose axes fsdp and tensor the weights
      are divided: each device reads its own part, and neither a host nor a device holds the whole. `evaluate`,
      `Engine`, `generate` and `logits` then run on that mesh. With several processes all of them call it.
    trust: whether code runs that lies in a work folder, or that is named there and is no part of the library.
    options: of a model from elsewhere, as of `convert.from_pretrained` or `convert.from_official`; `relaxed`, a rank,
      with `loops` ties the layers of a decoder (`convert.relaxed`).

  Raises:
    ConfigError: no run, or no complete checkpoint (of that step), in the folder; a mesh that does not divide the heads;
      what the converters refuse; an option that a run does not have.
  """
  from loopformer import config as configs
  from loopformer.convert.adapters import CONFIG as ADAPTER
  named = isinstance(source, (str, os.PathLike))
  if named or 'kind' not in options:  # with it, a dict of arrays is taken too
    _check_path('source', source)
  path = storage.path(source) if named else Path()
  if named and not storage.remote(path) and not path.exists():
    raise ConfigError(f'{source}: there is no such file or folder; give the work folder of a run, a Hugging Face '
                      'folder, or a file of weights')
  elsewhere = not configs.is_workdir(path) and any((path / name).is_file() for name in (configs.FILE, ADAPTER))
  if 'kind' in options or path.suffix == '.gguf' or elsewhere:
    if step is not None:
      raise ConfigError(f'step = {step}: {source} is no work folder, and has no steps; leave it out')
    return _imported(source, mesh, **options)
  if path.is_file():
    from loopformer.convert.official import KINDS
    raise ConfigError(f'{source}: a file of weights does not say whose they are; give kind=, one of {", ".join(KINDS)}')
  if options:
    raise ConfigError(f'{next(iter(options))}: a work folder says itself how its model is made; leave it out, or give '
                      'another source')
  with configs.trusting(trust):
    return _of_run(path, step, mesh)


def _check_path(name: str, path: Any):
  """Raises ConfigError where it is no path, or an empty one, which would be the folder that one happens to be in."""
  if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
    raise ConfigError(f'{name} = {path!r}: give a path')


def _imported(source, mesh, kind: str | None = None, relaxed: int | None = None, **options):
  from loopformer import config as configs, convert
  from loopformer.inference.evaluate import Depths
  from loopformer.objective import Objective, Rollout, Weighted
  from loopformer.tasks.imported import Imported
  from loopformer.terms.cross_entropy import CE
  if relaxed is not None:
    if kind is not None or options.get('loops') is None:
      raise ConfigError(f'relaxed = {relaxed}: layers of a Hugging Face folder or a .gguf file are tied over loops; '
                        'give loops, and no kind')
    if plans.count('loops', options['loops']) == 1:  # before weights are read
      raise ConfigError(f'relaxed = {relaxed}, loops = 1: one loop has nothing that is tied; give loops, 2 or more')
    for name in ('damped', 'retrofit'):
      if options.get(name) is not None:
        raise ConfigError(f'{name} = {options[name]}, relaxed = {relaxed}: two ways to make a loop of a decoder; '
                          'give one')
    loops = options.pop('loops')
    model, params, tokenizer = convert.from_pretrained(source, mesh=mesh, **options)
    model, params = convert.relaxed(model, params, loops=loops, rank=relaxed)
  elif kind is None:
    model, params, tokenizer = convert.from_pretrained(source, mesh=mesh, **options)
  else:
    (model, params), tokenizer = convert.from_official(kind, source, mesh=mesh, **options), None
  plans.count('loops', model.loops)  # of a config.json
  objective = Objective(rolls={'all': Rollout(plans.Uniform(model.loops))}, terms={'lm': Weighted(1.0, CE(roll='all'))})
  config = configs.Experiment(name=Path(str(source)).stem, model=model, objective=objective,
                              task=Imported(length=model.read_in.length),
                              evals=Depths(budgets=tuple(range(1, model.loops + 1))))
  return Loaded(model, params, tokenizer, config)


def _of_run(workdir, step, mesh):
  from loopformer import config as configs
  from loopformer.training.checkpoint import FOLDER, restore_model
  storage.check_workdir(workdir, writes=False)
  config = configs.read(workdir)
  if not (workdir / FOLDER).is_dir():
    raise ConfigError(f'workdir = {workdir}: no checkpoint was saved there yet; let the run reach its first save '
                      f'(train.save_every = {config.train.save_every} steps)')
  if mesh is not None:
    sharding.check_model(config.model, mesh)
  _, params = restore_model(workdir, config.model, mesh, step)
  own = workdir / TOKENIZER
  tokenizer = load_tokenizer(own) if own.is_dir() else config.task.tokenizer_of(workdir)
  return Loaded(config.model, params, tokenizer, config)


def logits(model: Any, params: Params, tokens: Any, *, steps: int | Sequence[float] | None = None) -> Array:
  """Next-token logits, f32[B, T, V]; of a masked diffusion model those of the token at each place itself.

  Args:
    tokens: i32[B, T]; a masked diffusion model reads its MASK, the id `model.outputs`, for what is hidden, and its
      logits at places that are not hidden mean nothing, for it was never asked there.
    steps: a budget (that many equal steps), or step sizes with sum one; the model's own number of loops by default.

  Raises:
    ConfigError: a schedule that does not sum to one, more tokens than the model has positions, or such as its cell
      makes nothing of in so many steps.
  """
  steps = plans.resolve(model.loops if steps is None else steps)
  warn_beyond(model, steps)
  if not model.read_in.vocab:
    raise ConfigError('model: its inputs are vectors, and it has no next token; call model.apply, as evaluate.py does')
  tokens = checked_tokens(model, tokens)
  model.cell.check_tokens(tokens, len(steps))
  with sharding.on(sharding.mesh_of(params)):
    return _logits(model, params, tokens, plans.schedule(steps, max(len(steps), model.loops)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params: Params, tokens: Array, plan: Plan) -> Array:
  trace = model.apply({'params': params}, tokens, plan)
  return model.apply({'params': params}, trace.z, method='logits')
