"""GGUF files (llama.cpp), of the decoders that llama.py reads: header, quantised tensors, tokenizer; by the package
gguf.

Of Llama's own architecture llama.cpp stores the rows of queries and keys so that rotary pairs are neighbours, as they
are in this library: they are taken as they lie. Of Qwen it stores them half by half, as Hugging Face does. Mistaking
one for the other leaves a model that still names capitals but has ten times the perplexity: the mean NLL shows it.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loopformer.convert.llama import ALL, FAMILIES, Decoder, Naming
from loopformer.convert.tensors import Tensor, Tensors
from loopformer.data.tokenizer import JsonTokenizer, byte_level_bpe
from loopformer.types import ConfigError

NAMES = {
    'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight',
    'lm_head.weight': 'output.weight', 'input_layernorm.weight': 'attn_norm.weight',
    'post_attention_layernorm.weight': 'ffn_norm.weight', 'self_attn.o_proj.weight': 'attn_output.weight',
    'self_attn.o_proj.bias': 'attn_output.bias', 'mlp.gate_proj.weight': 'ffn_gate.weight',
    'mlp.up_proj.weight': 'ffn_up.weight', 'mlp.down_proj.weight': 'ffn_down.weight',
    **{f'self_attn.{x}_proj.{kind}': f'attn_{x}.{kind}' for x in 'qkv' for kind in ('weight', 'bias')},
    **{f'self_attn.{x}_norm.weight': f'attn_{x}_norm.weight' for x in 'qk'},
}
NAMINGS = {family: Naming(layer='blk.{}.', names=NAMES, turn='fr' if family == 'llama' else 'rf')
           for family in FAMILIES if family != 'mistral'}  # which calls itself llama there


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
  """(metadata, tensors) of a file; tensors are dequantised to float32 when they are asked for.

  Raises:
    ConfigError: not a GGUF file that the package reads, or one that ends too early.
  """
  try:
    from gguf import GGUFReader, dequantize
  except ImportError as error:
    raise ImportError(f"reading {path} needs the package gguf: install the extra 'hf'") from error
  try:
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError,
          TypeError) as error:  # it has no class of its own
    raise ConfigError(f'{path}: {type(error).__name__}: {error}; it is no GGUF file, or was cut off: download it again'
                      ) from error

  def tensor(row):
    shape = tuple(int(size) for size in row.shape[::-1])  # the file has the fastest axis first

    def unpacked() -> np.ndarray:
      return np.asarray(dequantize(row.data, row.tensor_type), np.float32).reshape(shape)

    return Tensor(shape=shape, dtype=row.tensor_type.name, read=unpacked)

  return metadata, Tensors({row.name: tensor(row) for row in reader.tensors})


def read_config(metadata: Mapping[str, Any], tensors: Tensors, path: Path) -> Decoder:
  """The decoder that the metadata describe.

  Raises:
    ConfigError: another architecture, a field that is missing, or one under which the weights would be another model.
  """
  family = metadata.get('general.architecture')
  if family not in NAMINGS:
    raise ConfigError(f'{path}: general.architecture = {family!r}: the architectures that are read are '
                      f'{", ".join(NAMINGS)}')

  def of(name: str, *default: Any) -> Any:
    if f'{family}.{name}' not in metadata and not default:
      raise ConfigError(f'{path}: {family}.{name} is missing; download the file again')
    return metadata.get(f'{family}.{name}', *default)

  width, heads = of('embedding_length'), of('attention.head_count')
  for name in ('rope.dimension_count', 'attention.key_length', 'attention.value_length'):
    if of(name, None) not in (None, width / heads):
      raise ConfigError(f'{path}: {family}.{name} = {of(name)}: heads here, and what turns in them, are '
                        f'{width / heads:g} wide; choose a model for which this holds')
  scaling = 'rope_freqs.weight' if 'rope_freqs.weight' in tensors else of('rope.scaling.type', 'none')
  if scaling != 'none':
    raise ConfigError(f'{path}: {family}.rope.scaling = {scaling}: only rotary positions as they are can be read; '
                      'choose a model without scaling')
  if 'token_embd.weight' not in tensors:
    raise ConfigError(f"{path}: tensor 'token_embd.weight' is missing; download the file again")
  biased = FAMILIES[family].biased or (ALL if 'blk.0.attn_output.bias' in tensors else ())
  try:
    return Decoder(family=family, vocab=tensors.shapes['token_embd.weight'][0], width=width,
                   hidden=of('feed_forward_length'), layers=of('block_count'), heads=heads,
                   groups=of('attention.head_count_kv', heads), length=of('context_length'),
                   base=of('rope.freq_base', 10_000.0), eps=of('attention.layer_norm_rms_epsilon'),
                   tied='output.weight' not in tensors, biased=biased)
  except ConfigError as error:
    raise ConfigError(f'{path}: {error}') from error


WORDS = {'smollm': True, 'gpt-2': False}  # how text is cut before pairs are merged: whether digits stand alone
CONTROL, USER_DEFINED = 3, 4


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> JsonTokenizer:
  """The tokenizer of a file, of byte-level pairs as GPT-2's and SmolLM's.

  Raises:
    ConfigError: another tokenizer, or none, or one that cannot end a text.
  """
  kind, words = (metadata.get(f'tokenizer.ggml.{name}') for name in ('model', 'pre'))
  if kind != 'gpt2' or words not in WORDS or 'tokenizer.ggml.eos_token_id' not in metadata:
    raise ConfigError(f'{path}: tokenizer.ggml.model = {kind!r}, pre = {words!r}: rebuilt are those of kind gpt2 with '
                      f"pre {' or '.join(WORDS)} and an eos_token_id; put the model's tokenizer.json and "
                      'tokenizer_config.json beside the file')
  tokens, types, merges = (metadata[f'tokenizer.ggml.{name}'] for name in ('tokens', 'token_type', 'merges'))
  added = {i: kind == CONTROL for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
  return JsonTokenizer(text=byte_level_bpe(tokens, [pair.split(' ') for pair in merges], added, WORDS[words]),
                       eos=metadata['tokenizer.ggml.eos_token_id'])
