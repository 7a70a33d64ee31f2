"""Adapters of PEFT (LoRA) for decoders of Hugging Face: W + alpha / r B A, added to the tensors before they are read
in.

    adapter_config.json            r, lora_alpha, use_rslora (alpha / sqrt r), fan_in_fan_out
    adapter_model.safetensors      base_model.model.{name}.lora_A.weight [r, in], lora_B.weight [out, r]
"""
from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
import re
from typing import Any

import numpy as np

from loopformer import reading, storage
from loopformer.convert import kinds, tensors
from loopformer.convert.tensors import Tensor, Tensors
from loopformer.types import ConfigError, real, whole

CONFIG, NAME = 'adapter_config.json', 'adapter_model.safetensors'
PLAIN = {'use_dora': False, 'bias': 'none', 'modules_to_save': None, 'rank_pattern': {}, 'alpha_pattern': {},
         'fan_in_fan_out': False, 'lora_bias': False, 'layer_replication': None, 'alora_invocation_tokens': None,
         'use_qalora': False}  # fields, and the values under which an adapter is no more than this
# init_lora_weights; others, as pissa and olora, change the model's weights
STARTS = True, False, 'gaussian', 'eva', 'orthogonal'
AGAIN = 'download it again'


def with_adapter(held: Tensors, folder: str | Path) -> Tensors:
  """The tensors of a decoder, with an adapter added.

  Raises:
    ConfigError: no adapter of this form, a damaged one, or one that is for another model: it names a tensor that is not
      there, or that has another shape.
  """
  path = storage.fetched(folder)
  config = reading.read_json(path / CONFIG, 'give the folder of a LoRA adapter as PEFT writes it')
  kinds.check(config, path / CONFIG)
  if config.get('peft_type') != 'LORA':
    raise ConfigError(f'{path / CONFIG}: peft_type = {config.get("peft_type")!r}: adapters that are read are LORA')
  for name, plain in PLAIN.items():
    if config.get(name, plain) not in (plain, None):
      raise ConfigError(f'{path / CONFIG}: {name} = {config[name]!r}: it is read as {plain!r} alone; merge the adapter '
                        'with PEFT (merge_and_unload), and give what it saves')
  start = config.get('init_lora_weights')
  if start not in (None, *STARTS):
    raise ConfigError(f'{path / CONFIG}: init_lora_weights = {start!r}: the adapter is of weights that were changed '
                      'when its training began, and not of those of the model; convert it with PEFT (save_pretrained '
                      'with path_initial_model_for_weight_conversion), or merge it (merge_and_unload), and give '
                      'what it saves')
  with reading.naming(path / CONFIG, AGAIN):
    rank = whole('r', config.get('r'), 1)
    scale = real('lora_alpha', config.get('lora_alpha'), '(-inf, inf)') / (
        math.sqrt(rank) if config.get('use_rslora') else rank)
  if not (path / NAME).is_file():
    raise ConfigError(f'{path}: there is no {NAME}; give the folder of a LoRA adapter as PEFT writes it')
  given = Tensors(tensors.read_file(path / NAME))
  new = {name: held.tensor(name) for name in held}
  halves: dict[str, dict[str, Any]] = {}
  for name in given:
    found = re.fullmatch(r'base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight', name)
    if not found:
      raise ConfigError(f'{path / NAME}: tensor {name!r} is none of a plain LoRA; merge the adapter with PEFT, and '
                        'give what it saves')
    halves.setdefault(f'{found[1]}.weight', {})[found[2]] = name
  for target, pair in halves.items():
    shapes = [given.shapes[pair[half]] if half in pair else 'absent' for half in 'BA']
    shape = held.shapes.get(target)
    if shape is None or len(shape) != 2 or shapes != [(shape[0], rank), (rank, shape[1])]:
      raise ConfigError(f'adapter = {path}: it is for another model: it has {shapes[0]} and {shapes[1]} of rank {rank} '
                        f'for {target!r}, which is {"not there" if shape is None else shape} here; give the model that '
                        f'it was trained on ({config.get("base_model_name_or_path") or "it does not say which"})')
    new[target] = Tensor(shape=shape, dtype='F32', read=_added(held, given, target, pair, scale))
  return Tensors(new)


def _added(held: Tensors, given: Tensors, target: str, pair: dict[str, str], scale: float) -> Callable[[], np.ndarray]:
  return lambda: held[target].astype(np.float32) + np.float32(scale) * (
      given[pair['B']].astype(np.float32) @ given[pair['A']].astype(np.float32))
