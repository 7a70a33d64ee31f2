"""Models as JSON, for config.json of an export: the parts that modeling_loopformer.py computes, and no others.

What is read may come from anywhere, so that names are looked up in a table, and nothing is imported because a file says
so.
"""
from __future__ import annotations

from collections.abc import Mapping
import itertools
from typing import Any

import jax

from loopformer import config as configs, loop, memories, moved, starts
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed, Plain
from loopformer.cells.recur import Recur
from loopformer.cells.timed import Timed
from loopformer.inference.sampler import Autoregressive
from loopformer.model import Looped
from loopformer.nn import attention, blocks, condition, inject, kernels, layers, stack
from loopformer.nn.embed import Head, TiedHead, TokenEmbed, Tokens, TwiceNormedHead
from loopformer.nn.low_rank import LowRank
from loopformer.nn.positions import Alibi, Rotary, StretchedRotary
from loopformer.papers.loopus.cell import ConfidenceHead, Rising, Selective, Share, StepSizes
from loopformer.types import ConfigError

MODEL_TYPE = 'loopformer'  # which LoopFormer's own code writes too, with an n_embd and no description
SOCKETS = {  # the parts that are computed, by the fields that they stand in
    'model': (Looped,), 'read_in': (Tokens, TokenEmbed), 'read_out': (TiedHead, TwiceNormedHead, Head),
    'bridge': (layers.Linear,), 'start': (starts.Embedded, starts.Zeros, starts.Noise),
    'cell': (Plain, Normed, Timed, Recur, Damped, Halting, Selective), 'gate': (layers.Linear, ConfidenceHead),
    'share': (Share,), 'condition': (condition.Trajectory, condition.LoopIndex), 'modulation': (condition.Modulation,),
    'inject': (inject.NoInjection, inject.Add, inject.Concat, inject.Diagonal), 'core': (stack.Stack,),
    'block': (blocks.Block, blocks.Chain),
    'placement': (blocks.PreNorm, blocks.SandwichNorm, blocks.PeriNorm, blocks.PostNorm),
    'attn': (attention.SelfAttention,), 'values': (attention.ValueEmbed,), 'position': (Rotary, StretchedRotary, Alibi),
    'mlp': (layers.MLP, layers.GatedMLP), 'linear': (layers.Dense, LowRank),
    'norm': (layers.Identity, layers.UnitNorm, layers.RMSNorm, layers.LayerNorm, layers.AcrossHeads)}
FUNCTIONS: tuple[Any, ...] = (layers.gelu, layers.gelu_tanh, layers.squared_relu, jax.nn.silu)
# What says how weights begin, how gradients and attention are computed, what decoding keeps: no part of the function.
BESIDE = {
    'init': (layers.Normal, layers.UniformWithin, layers.Orthogonal, layers.ByProjection, layers.Halves, Rising,
             StepSizes),
    'kernel': (kernels.Fused, kernels.Blockwise, kernels.Cudnn, kernels.Splash),
    'remat': (loop.KeepAll, loop.PerStep, loop.PerLayer, loop.Products, loop.Offload),
    'memory': (memories.PerLoop,), 'sampler': (Autoregressive,)}
SAME = {'of': 'cell', 'prelude': 'core', 'coda': 'core', 'norm_qk': 'norm'}  # fields that take what another does


def _name(thing: Any) -> str:
  return f'{thing.__module__.split(".")[0]}.{thing.__name__}'


TABLE = {_name(thing): thing for thing in (*itertools.chain(*SOCKETS.values(), *BESIDE.values()), *FUNCTIONS)}
OLD = {'loopformer.Hold': moved.find('loopformer.inject:Hold'),  # as exports of older versions name them
       'loopformer.Sandwich': moved.find('loopformer.blocks:Sandwich'),
       'loopformer.NormedAttention': moved.find('loopformer.normed_attention:NormedAttention')}


def encode(value: Any, path: str = 'model') -> Any:
  """A model, or a value in it, as JSON: a part is an object whose `part` is its name, a function `{'function': name}`.

  Raises:
    ConfigError: a part that the modeling code does not compute.
  """
  kind = type(value)
  if configs.is_part(value):
    if TABLE.get(_name(kind)) is not kind:
      raise ConfigError(f'{path} = {kind.__name__}: it cannot be exported, because modeling_loopformer.py does not '
                        f'compute {kind.__name__}; {_instead(path.split(".")[-1], value)}')
    return {'part': _name(kind),
            **{name: encode(field, f'{path}.{name}') for name, field in configs.fields(value).items()}}
  if isinstance(value, (tuple, list)):
    return [encode(item, f'{path}.{i}') for i, item in enumerate(value)]
  if callable(value):
    if value not in FUNCTIONS:
      raise ConfigError(f'{path} = {value}: it cannot be exported, because modeling_loopformer.py does not compute it; '
                        f'it computes {", ".join(function.__name__ for function in FUNCTIONS)}')
    return {'function': _name(value)}
  return value


def _instead(field: str, part: Any) -> str:
  """What to do where a field holds a part that is not computed."""
  if field == 'read_in':
    return 'a model of transformers reads tokens; evaluate this one here (--mode=eval)'
  if getattr(part, 'causal', True) is False:
    return ('tokens of a decoder of transformers read none after them; evaluate this model here (--mode=eval), and if '
            'it denoises, let it write here (--mode=generate)')
  known = {**SOCKETS, **BESIDE}.get(SAME.get(field, field), ())
  other = f', or train one with {" or ".join(part.__name__ for part in known)} there' if known else ''
  return f'evaluate and serve such a model here (--mode=harness, --mode=generate){other}'


def decode(config: Mapping[str, Any], where: Any) -> Looped:
  """The model of a config.json that `encode` had a part in.

  Raises:
    ConfigError: no description, a part that is not known, or fields that are not its own.
  """
  if 'description' not in config:
    raise ConfigError(f'{where}: description is missing; export the model again')
  model = _decode(config['description'], where)
  if not isinstance(model, Looped):
    raise ConfigError(f'{where}: description is of no model; export the model again')
  configs.check_values(model, 'description')
  return model


def _decode(value: Any, where: Any) -> Any:
  if isinstance(value, list):
    return tuple(_decode(item, where) for item in value)
  if not isinstance(value, dict):
    return value
  name = value.get('part', value.get('function'))
  known = {**TABLE, **OLD}
  if name not in known:
    raise ConfigError(f'{where}: description names {name!r}, which this version does not know; use the version of '
                      'loopformer that wrote it')
  if 'function' in value:
    return known[name]
  try:
    return known[name](**{field: _decode(inner, where) for field, inner in value.items() if field != 'part'})
  except TypeError as error:
    raise ConfigError(f'{where}: description of {name}: {error}; use the version of loopformer that wrote it'
                      ) from error
