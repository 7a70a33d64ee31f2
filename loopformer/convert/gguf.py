"""GGUF files (llama.cpp), of the decoders that llama.py reads: header, quantised tensors, tokenizer.

Of Llama's own architecture llama.cpp stores the rows of queries and keys so that rotary pairs are neighbours, as they
are in this library: they are taken as they lie. Of Qwen it stores them half by half, as Hugging Face does. Mistaking
one for the other leaves a model that still names capitals but has ten times the perplexity: the mean NLL shows it.

Read here are F32, F16, BF16, Q4_0, Q4_1 and Q8_0; Q5_0, Q5_1 and K-quants by the package `gguf` (extra `hf`).
"""
from __future__ import annotations

from collections.abc import Mapping
import math
from pathlib import Path
import struct
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from loopformer.convert.llama import ALL, FAMILIES, Decoder, Naming
from loopformer.convert.tensors import Shape, Tensor, Tensors, check_end
from loopformer.data.tokenizer import JsonTokenizer, byte_level_bpe
from loopformer.types import ConfigError, config_dataclass

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
MAGIC, STRING, ARRAY = b'GGUF', 8, 9
SCALARS = dict(enumerate('B b H h I i f ?'.split())) | {10: 'Q', 11: 'q', 12: 'd'}


@config_dataclass
class Kind:
  """A type of tensor: numbers of a block, its bytes, and how blocks u8[n, bytes] become f32[n, numbers] (None: by the
  package)."""
  name: str
  numbers: int
  bytes: int
  unpack: Any = None


def _plain(dtype):
  return lambda blocks: blocks.view(dtype).astype(np.float32)


def _f16(blocks: np.ndarray, place: int) -> np.ndarray:
  """The float16 that stands `place` bytes into each block, f32[n, 1]."""
  return np.ascontiguousarray(blocks[:, place:place + 2]).view(np.float16).astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
  """Low halves of all bytes first, then the high ones."""
  return np.concatenate([blocks & 15, blocks >> 4], 1).astype(np.float32)


def _q8_0(blocks):
  return _f16(blocks, 0) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)


def _q4_0(blocks):
  return _f16(blocks, 0) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks):
  return _f16(blocks, 0) * _nibbles(blocks[:, 4:]) + _f16(blocks, 2)


KINDS = {
    0: Kind(name='F32', numbers=1, bytes=4, unpack=_plain(np.float32)),
    1: Kind(name='F16', numbers=1, bytes=2, unpack=_plain(np.float16)),
    30: Kind(name='BF16', numbers=1, bytes=2, unpack=_plain(ml_dtypes.bfloat16)),
    2: Kind(name='Q4_0', numbers=32, bytes=18, unpack=_q4_0),
    3: Kind(name='Q4_1', numbers=32, bytes=20, unpack=_q4_1),
    8: Kind(name='Q8_0', numbers=32, bytes=34, unpack=_q8_0),
    6: Kind(name='Q5_0', numbers=32, bytes=22),
    7: Kind(name='Q5_1', numbers=32, bytes=24),
    10: Kind(name='Q2_K', numbers=256, bytes=84),
    11: Kind(name='Q3_K', numbers=256, bytes=110),
    12: Kind(name='Q4_K', numbers=256, bytes=144),
    13: Kind(name='Q5_K', numbers=256, bytes=176),
    14: Kind(name='Q6_K', numbers=256, bytes=210),
}


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
  """(metadata, tensors) of a file; tensors are dequantised to float32 when they are asked for.

  Raises:
    ConfigError: not a GGUF file of version 2 or 3, one that ends too early, or a tensor of a type that is not read.
  """
  size = path.stat().st_size
  with open(path, 'rb') as file:
    try:
      if file.read(4) != MAGIC:
        raise ConfigError(f'{path}: it does not begin with {MAGIC.decode()}; give a GGUF file')
      version, = _numbers(file, 'I')
      if version not in (2, 3):
        raise ConfigError(f'{path}: version {version} of GGUF; versions 2 and 3 are read')
      count, keys = _numbers(file, 'QQ')
      metadata = {_string(file): _value(file, *_numbers(file, 'I')) for _ in range(keys)}
      rows = [_row(file) for _ in range(count)]
    except (struct.error, UnicodeDecodeError) as error:
      raise ConfigError(f'{path}: its header cannot be read ({error}); it was cut off or is damaged: download it '
                        'again') from error
    alignment = metadata.get('general.alignment', 32)
    start = -(-file.tell() // alignment) * alignment
  return metadata, Tensors({name: _tensor(path, name, shape, code, start + offset, size)
                            for name, shape, code, offset in rows})


def _numbers(file: BinaryIO, form: str) -> tuple:
  return struct.unpack(f'<{form}', file.read(struct.calcsize(f'<{form}')))


def _string(file: BinaryIO) -> str:
  length, = _numbers(file, 'Q')
  text = file.read(length)
  if len(text) < length:
    raise struct.error(f'a text of {length} bytes goes beyond its end')
  return text.decode()


def _value(file: BinaryIO, code: int) -> Any:
  if code == STRING:
    return _string(file)
  if code == ARRAY:
    inner, count = _numbers(file, 'IQ')
    if inner in SCALARS:
      return list(_numbers(file, f'{count}{SCALARS[inner]}'))
    return [_value(file, inner) for _ in range(count)]
  if code not in SCALARS:
    raise struct.error(f'{code} is no type of a value')
  return _numbers(file, SCALARS[code])[0]


def _row(file: BinaryIO) -> tuple[str, Shape, int, int]:
  """(name, shape, type, offset) of a tensor; the file has the fastest axis first."""
  name = _string(file)
  axes, = _numbers(file, 'I')
  shape = _numbers(file, f'{axes}Q')[::-1]
  return name, shape, *_numbers(file, 'IQ')


def _tensor(path: Path, name: str, shape: Shape, code: int, start: int, size: int) -> Tensor:
  if code not in KINDS:
    raise ConfigError(f'{path}: tensor {name!r} is of type {code}; those that are read are '
                      f'{", ".join(kind.name for kind in KINDS.values())}')
  kind = KINDS[code]
  if shape[-1] % kind.numbers:
    raise ConfigError(f'{path}: tensor {name!r} of shape {list(shape)} has rows that are no multiple of the '
                      f'{kind.numbers} numbers of a block of {kind.name}; the file is damaged')
  blocks = math.prod(shape) // kind.numbers
  check_end(path, name, shape, start + blocks * kind.bytes, size)

  def read() -> np.ndarray:
    with open(path, 'rb') as file:
      file.seek(start)
      held = np.fromfile(file, np.uint8, blocks * kind.bytes).reshape(blocks, kind.bytes)
    return (kind.unpack or _by_package(kind.name, path))(held).reshape(shape)

  return Tensor(shape=shape, dtype=kind.name, read=read)


def _by_package(name: str, path: Path):
  try:
    from gguf import GGMLQuantizationType, dequantize
  except ImportError as error:
    raise ImportError(f"{path}: reading tensors of type {name} needs the package gguf: install the extra 'hf'"
                      ) from error
  return lambda blocks: dequantize(blocks, GGMLQuantizationType[name])


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
