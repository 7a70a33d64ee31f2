"""Looped models as they are published: whose code a config.json is for, and how its model runs.

A folder of Llama's kind is read by llama.py (Nanbeige too), what `export` wrote by own.py. The others are the kinds of
official.py, known here by `model_type`, by the names of classes in `architectures`, or by Parcae's `_class_name`.
Fields are those that the kinds' public code writes (of Ouro and Huginn its configuration classes, of Parcae
`ParcaeConfig`, of LoopFormer `GPTConfig`); what they say of heads, loops and length is obeyed, sizes are compared with
the weights, and a field under which the same weights would be another model is refused by its name.
"""
from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from loopformer.convert import ouro
from loopformer.convert.table import check_count
from loopformer.types import ConfigError, config_dataclass

OFF = (None, False, 0)
# What embeddings are multiplied by, and so is the noise that the loop begins with, of this deviation before.
HUGINN = {'embed_scale': math.sqrt, 'std': lambda width: math.sqrt(2 / (5 * width))}


@config_dataclass
class Published:
  """How a kind is published.

  names: what calls it so; heads, loops, length: the field of each, loops under any of these names, and no length where
  the weights show it; needed: whether there must be one of loops; sizes: field -> the letter of the size that the
  weights show; plain: field -> the values that it may have, the published one first.
  """
  names: tuple[str, ...]
  heads: str = 'num_attention_heads'
  loops: tuple[str, ...] = ('mean_recurrence',)
  needed: bool = True
  length: str = 'block_size'
  sizes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  plain: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


SECTIONS = {'n_layers_in_prelude': 'P', 'n_layers_in_recurrent_block': 'K', 'n_layers_in_coda': 'C'}
EVERYWHERE = {'quantization_config': (None,), 'is_causal': (True,), 'rope_scaling': (None,), 'bias': OFF,
              'logit_softcap': (None,), 'attn_logit_softcapping': (None,), 'final_logit_softcapping': (None,)}
NANO = Published(names=(), heads='n_head', loops=('max_model_loops', 'max_loops', 'n_loop'), needed=False, length='',
                 sizes={'n_embd': 'D', 'n_layer': 'N', 'vocab_size': 'V', 'intermediate_dim': 'F', 'block_size': 'T'},
                 plain={'is_causal': (True,)})
PUBLISHED = {
    'ouro': Published(
        names=('ouro', 'OuroForCausalLM'), loops=('total_ut_steps',), length='max_position_embeddings',
        sizes={'hidden_size': 'D', 'num_hidden_layers': 'N', 'intermediate_size': 'F', 'vocab_size': 'V',
               'head_dim': 'd'},
        plain={'early_exit_threshold': (1.0,), 'rope_parameters.rope_type': ('default',),
               'rope_parameters.rope_theta': (1e6,), 'attention_bias': OFF, 'mlp_bias': OFF,
               'use_sliding_window': OFF}),
    'huginn': Published(
        names=('huginn_raven', 'RavenForCausalLM'), heads='n_heads', sizes={
            'n_embd': 'D', 'intermediate_size': 'F', 'padded_vocab_size': 'V', 'head_dim': 'd', **SECTIONS},
        plain={'architecture_class_name': ('RecurrentGPT',), 'block_class_name': ('SandwichBlock',),
               'norm_class_name': ('RMSNorm_llama',), 'norm_eps': (1e-6,), 'mlp_class_name': ('GatedMLP',),
               'nonlin_name': ('SiLU',), 'injection_type': ('linear',), 'state_init': ('like-init',),
               'qk_bias': (True,), 'rope_base': (50_000,), 'rope_theta': (50_000,), 'tie_embeddings': (True,),
               'tie_word_embeddings': (True,), 'test_time_noise': OFF}),
    'parcae': Published(
        names=('parcae', 'Parcae', 'ParcaeConfig', 'ParcaeForCausalLM'), sizes={
            'n_embd': 'D', 'hidden_size': 'D', 'recurrent_embedding_dimension': 'D', 'intermediate_size': 'F',
            'recurrent_intermediation_embedding_dimension': 'F', 'num_key_value_heads': 'G', 'padded_vocab_size': 'V',
            'recurrent_num_attention_heads': 'H', 'head_dim': 'd', **SECTIONS},
        plain={'architecture_class_name': ('Parcae',), 'block_class_name': ('TransformerPreNormBlock',),
               'norm_class_name': ('RMSNorm',), 'norm_eps': (1e-5,), 'mlp_class_name': ('BaseMLP',),
               'nonlin_name': ('ReLU2',), 'qk_norm': (True,), 'qk_bias': OFF, 'prelude_norm': (True,),
               'injection_type': ('diagonal',), 'state_init': ('like-init',), 'tie_embeddings': (True,),
               'tie_word_embeddings': (True,), 'rope_settings.use_rope': (True,),
               'rope_settings.rope_condense_ratio': (1,), 'rope_settings.rope_base': (50_000,),
               'rope_base': (50_000,)}),
    'loopformer': dataclasses.replace(NANO, names=('loopformer', 'LoopFormerGPTForCausalLM')),
    'base_loop': dataclasses.replace(NANO, names=('base_loop', 'base_loop_ee')),
    'tmlt': dataclasses.replace(NANO, names=('tmlt', 'tmlt_ee', 'TMLT')),
    'base': dataclasses.replace(NANO, names=('base',), loops=()),
}


@config_dataclass
class Told:
  """What a config.json says: the kind, what `from_official` is to be given, and the sizes that the weights must show:
  (letter, field, value)."""
  kind: str
  heads: int | None
  loops: int | None
  length: int | None
  sizes: tuple[tuple[str, str, int], ...]

  def check(self, sizes: Mapping[str, int], where: Any):
    """Raises ConfigError where the weights have another size."""
    for letter, field, value in self.sizes:
      if value != sizes[letter]:
        raise ConfigError(f'{where}: {field} = {value}, and the weights show {sizes[letter]}; the configuration and '
                          'the weights are not of one model')


def kind_of(config: Mapping[str, Any]) -> str | None:
  """The kind that a config.json names; None where it names none of ours."""
  architectures = config.get('architectures')
  given = [config.get('model_type'), config.get('_class_name'), config.get('architecture_class_name'),
           *(architectures if isinstance(architectures, list) else [])]
  return next((kind for kind, how in PUBLISHED.items() if any(name in how.names for name in given)), None)


def read(config: Mapping[str, Any], where: Any) -> Told:
  """What the config.json of a kind says.

  Raises:
    ConfigError: no loops, or a setting under which the same weights would be another model.
  """
  kind = kind_of(config)
  assert kind is not None  # `kind_of` has told whoever asks
  how = PUBLISHED[kind]
  for field, plain in {**EVERYWHERE, **how.plain}.items():
    if (value := _at(config, field)) is not None and value not in plain:
      raise ConfigError(f'{where}: {field} = {value}: the {kind} models that are read have {plain[0]}; this one has no '
                        'counterpart' + ('. Write 1.0, and give --exit=gate:THRESHOLD where it answers'
                                         if field == 'early_exit_threshold' else ''))
  if kind == 'ouro':
    ouro.settings(config)
  if others := set(config.get('layer_types') or ()) - {'full_attention'}:
    raise ConfigError(f'{where}: layer_types = {sorted(others)}: attention is read to all earlier tokens alone; this '
                      'model has no counterpart')
  width = config.get('n_embd')
  for field, power in HUGINN.items() if kind == 'huginn' and width is not None else ():
    value, wanted = _at(config, f'init_values.{field}'), power(width)
    if value is not None and not math.isclose(value, wanted, rel_tol=1e-4):
      raise ConfigError(f'{where}: init_values.{field} = {value}: the huginn models that are read have {wanted:g} '
                        f'where n_embd is {width}; this one has no counterpart')
  loops = next((config[name] for name in how.loops if config.get(name) is not None), None)
  if loops is None and how.needed:
    raise ConfigError(f'{where}: {how.loops[0]} is missing, and no shape of the weights shows how often the layers '
                      'run; write it')
  heads, length = config.get(how.heads), config.get(how.length)
  for name, value in (*((name, config.get(name)) for name in how.loops), (how.heads, heads), (how.length, length)):
    if value is not None:
      check_count(name, value)
  sizes = how.sizes
  if 'padded_vocab_size' in sizes:  # huginn and parcae, whose weights show the heads too
    sizes = {**sizes, how.heads: 'H'} | ({} if config.get('padded_vocab_size') else {'vocab_size': 'V'})
    heads = None
  shown = tuple((letter, field, config[field]) for field, letter in sizes.items() if config.get(field) is not None)
  for _, field, value in shown:
    check_count(field, value)
  return Told(kind=kind, heads=heads, loops=loops, length=length, sizes=shown)


def _at(config: Mapping[str, Any], field: str) -> Any:
  """The value of a field, or of one in a field: 'a.b'."""
  for name in field.split('.'):
    config = config.get(name) if isinstance(config, Mapping) else None
  return config
