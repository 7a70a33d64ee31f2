"""Kinds of what other people's JSON says: "false" in quotes would be true, and "1e-5" a number to some and none to
others.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loopformer.types import ConfigError, shown


def _is_number(value: Any) -> bool:
  return type(value) in (int, float)


def _is_list(value: Any) -> bool:
  return isinstance(value, list) and all(isinstance(item, str) for item in value)


KINDS: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    'true or false': (lambda value: type(value) is bool, (
        'tie_word_embeddings', 'tie_embeddings', 'attention_bias', 'mlp_bias', 'use_sliding_window',
        'skip_loop_final_norm', 'is_causal', 'use_bidirectional_attention', 'qk_norm', 'prelude_norm', 'add_bos_token',
        'use_rslora', 'use_rope')),
    'a whole number': (lambda value: type(value) is int, (
        'max_position_embeddings', 'sliding_window', 'bos_token_id', 'original_max_position_embeddings')),
    'a number': (_is_number, (
        'rms_norm_eps', 'norm_eps', 'rope_theta', 'rope_base', 'partial_rotary_factor', 'factor', 'low_freq_factor',
        'high_freq_factor', 'rope_condense_ratio', 'embed_scale', 'std', 'early_exit_threshold')),
    'text': (lambda value: isinstance(value, str), (
        'model_type', '_class_name', 'hidden_act', 'rope_type', 'tokenizer_class')),
    'a list of texts': (_is_list, ('layer_types', 'architectures')),
    'an object': (lambda value: isinstance(value, dict), (
        'rope_scaling', 'rope_parameters', 'rope_settings', 'init_values')),
}
KIND_OF = {name: kind for kind, (_, names) in KINDS.items() for name in names}


def check(config: Mapping[str, Any], where: Any, within: str = ''):
  """Raises ConfigError where a field that is read, of config.json or of what stands beside it, is of another kind than
  it has to be; null is not looked at. Counts of layers, heads and the like are checked where they are used."""
  for name, value in config.items():
    kind = KIND_OF.get(name)
    if kind is None or value is None:
      continue
    if not KINDS[kind][0](value):
      raise ConfigError(f'{where}: {within}{name} = {shown(value)}: it is to be {kind}; correct it')
    if isinstance(value, dict):
      check(value, where, f'{name}.')
