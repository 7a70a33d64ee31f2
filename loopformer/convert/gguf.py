"""GGUF files (llama.cpp), of the decoders that llama.py reads: header, quantised tensors, tokenizer; by the package
gguf.

Of Llama's own architecture llama.cpp stores the rows of queries and keys so that rotary pairs are neighbours, as they
are in this library: they are taken as they lie (of Nanbeige too). Of Qwen and OLMo it stores them half by half, as
Hugging Face does. Mistaking one for the other leaves a model that still names capitals but has ten times the
perplexity: the mean NLL shows it.
"""
from __future__ import annotations

from collections.abc import Mapping
import math
import os
from pathlib import Path
import re
from typing import Any, Literal

import numpy as np

from loopformer import reading
from loopformer.convert.llama import ALL, FAMILIES, Decoder, Naming
from loopformer.convert.tensors import Tensor, Tensors
from loopformer.data.tokenizer import FILE, Tokenizer, Words, bpe_pieces, byte_level_bpe, json_tokenizer
from loopformer.nn.positions import Rotary, StretchedRotary
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
POST = {'post_attention_layernorm.weight': 'post_attention_norm.weight',
        'post_feedforward_layernorm.weight': 'post_ffw_norm.weight'}  # norms after the branches
FACTORS = 'rope_freqs.weight'  # no weight of a layer, but what is known of positions
NAMINGS = {family: Naming(layer='blk.{}.', names=NAMES | (POST if kind.post else {}),
                          turn='fr' if family in ('llama', 'nanbeige') else 'rf')
           for family, kind in FAMILIES.items() if family != 'mistral'}  # which calls itself llama there


PART = re.compile(r'-(\d{5})-of-(\d{5})\.gguf$')  # how files that are parts of one are called


def parts(path: Path) -> list[Path]:
  """The files that a model is divided over, if it is, by the name of one of them."""
  found = PART.search(path.name)
  return [path] if found is None else [
      path.with_name(f'{path.name[:found.start()]}-{number:05}-of-{found[2]}.gguf')
      for number in range(1, int(found[2]) + 1)]


def read(path: Path) -> tuple[dict[str, Any], Tensors]:
  """(metadata, tensors) of a file, or of all parts of one; tensors are dequantised to float32 when they are asked for.

  Raises:
    ConfigError: not a GGUF file that the package reads, one that ends too early, or a part without the others.
  """
  files = parts(path)
  absent = [file.name for file in files if not file.is_file()]
  if absent:
    raise ConfigError(f'{path}: it is one of {len(files)} parts, and {absent[0]} is not beside it; '
                      'download all of them')
  metadata, tensors = _read_file(files[0])
  if (count := metadata.get('split.count', 1) or 1) != len(files):
    raise ConfigError(f'{path}: it is a part of a model in {count} files, which its name does not tell '
                      '(NAME-00001-of-00002.gguf); name them so, or merge them with llama-gguf-split')
  for file in files[1:]:
    tensors |= _read_file(file)[1]
  return metadata, Tensors(tensors)


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  try:
    from gguf import GGUFReader, dequantize
  except ImportError as error:
    raise ImportError(f"reading {path} needs the package gguf: install the extra 'hf'") from error
  try:
    _check_lengths(path)
    reader = GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
  except Exception as error:  # it has no class of its own
    raise ConfigError(f'{path}: {type(error).__name__}: {error}; it is no GGUF file, or was cut off: download it again'
                      ) from error

  def tensor(row):
    shape = tuple(int(size) for size in row.shape[::-1])  # the file has the fastest axis first

    def unpacked() -> np.ndarray:
      try:
        return np.asarray(dequantize(row.data, row.tensor_type), np.float32).reshape(shape)
      except (NotImplementedError, ValueError) as error:
        raise ConfigError(f'{path}: tensor {row.name!r} of kind {row.tensor_type.name} cannot be read ({error}); '
                          'choose a file of another kind') from error

    return Tensor(shape=shape, dtype=row.tensor_type.name, read=unpacked)

  return metadata, {row.name: tensor(row) for row in reader.tensors}


# Fields under which the same weights are another model, and the values under which they are not.
PLAIN = {'attention.causal': (True,), **dict.fromkeys(('logit_scale', 'embedding_scale', 'residual_scale'), (0, 1)),
         **dict.fromkeys(('expert_count', 'attention.scale', 'attn_logit_softcapping', 'final_logit_softcapping'),
                         (0,))}
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its kind
TEXT, LIST = 8, 9  # the other kinds


def _check_lengths(path: Path):
  """Raises ValueError where a length in the header leads beyond the file: the package believes them."""
  size = path.stat().st_size
  with path.open('rb') as file:
    def skip(count):
      if count > size - file.tell():
        raise ValueError('its header leads beyond its end')
      file.seek(count, os.SEEK_CUR)

    def number(width):
      data = file.read(width)
      if len(data) < width:
        raise ValueError('it ends within its header')
      return int.from_bytes(data, order)

    def value(kind):
      if kind in WIDTHS:
        skip(WIDTHS[kind])
      elif kind == TEXT:
        skip(number(8))
      elif kind == LIST:
        kind, count = number(4), number(8)
        if kind in WIDTHS:
          skip(count * WIDTHS[kind])
        elif kind == TEXT:
          for _ in range(count):
            skip(number(8))
        else:
          raise ValueError(f'a list of the unknown kind {kind}')
      else:
        raise ValueError(f'a value of the unknown kind {kind}')

    order: Literal['little', 'big'] = 'little'
    skip(len(b'GGUF'))
    if number(4) & 0xffff == 0:  # of the version, which is small
      order = 'big'
    tensors, fields = number(8), number(8)
    for _ in range(fields):
      skip(number(8))
      value(number(4))
    for _ in range(tensors):
      skip(number(8))  # its name
      skip(number(4) * 8)  # its shape
      skip(12)  # its kind and its place


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
  head = of('attention.key_length', width / heads)
  for name in ('rope.dimension_count', 'attention.value_length'):
    if of(name, None) not in (None, head):
      raise ConfigError(f'{path}: {family}.{name} = {of(name)}: values, and what turns in a head, are as wide as keys '
                        f'here, {head:g}; choose a model for which this holds')
  kind = FAMILIES[family]
  if kind.looped and f'{family}.num_loops' not in metadata:
    raise ConfigError(f'{path}: {family}.num_loops is missing, and no shape of the weights shows how often the layers '
                      'run; take a file that a newer converter wrote')
  for name, plain in PLAIN.items():
    if of(name, plain[0]) not in plain:
      raise ConfigError(f'{path}: {family}.{name} = {of(name)}: what llama.cpp does with it has no counterpart here; '
                        'choose a model without')
  window, length = of('attention.sliding_window', None) or math.inf, of('context_length')
  if window < length:
    raise ConfigError(f'{path}: {family}.attention.sliding_window = {window}: attention is read to all {length} '
                      'earlier tokens alone; choose a model of this form')
  # Where a file has a factor and no kind of scaling, llama.cpp scales the positions by it.
  scaling, factor = of('rope.scaling.type', 'linear'), of('rope.scaling.factor', of('rope.scale_linear', 0)) or 1
  if scaling != 'none' and (scaling, factor) != ('linear', 1):
    raise ConfigError(f'{path}: {family}.rope.scaling = {scaling} by {factor:g}: only rotary positions as they are can '
                      'be read; choose a model without scaling')
  if 'token_embd.weight' not in tensors:
    raise ConfigError(f"{path}: tensor 'token_embd.weight' is missing; download the file again")
  biased = kind.biased or (ALL if 'blk.0.attn_output.bias' in tensors else ())
  with reading.naming(path, 'download the file again'):
    rotary = _rotary(float(of('rope.freq_base', 10_000.0)), tensors.get(FACTORS))
    return Decoder(family=family, vocab=tensors.shapes['token_embd.weight'][0], width=width,
                   head=None if head * heads == width else head, loops=of('num_loops') if kind.looped else 1,
                   between=kind.looped and not of('skip_loop_final_norm', False),
                   hidden=of('feed_forward_length'), layers=of('block_count'), heads=heads,
                   groups=of('attention.head_count_kv', heads), length=length,
                   rotary=rotary, eps=of('attention.layer_norm_rms_epsilon'),
                   tied='output.weight' not in tensors, biased=biased)


def _rotary(base: float, factors: np.ndarray | None) -> Rotary:
  """The positions, where a file says by what each pair turns more slowly, f32[d / 2]; so it does of Llama 3.1 and
  later.

  Raises:
    ConfigError: the factors are not those of Llama 3, whose low, high and original are the same in all of its models.
  """
  if factors is None:
    return Rotary(base=base)
  found = StretchedRotary(base=base, factor=float(factors.max()))
  if not np.allclose(Rotary(base=base).turns(len(factors)) / found.turns(len(factors)), factors, rtol=1e-3):
    raise ConfigError(f'tensor {FACTORS!r}: the factors are not those of Llama 3; choose a model without scaling')
  return found


def _words(digits: str, **others: Any) -> Words:
  """Those of Llama 3 and of what came after it; digits: a pattern of as many as stand together."""
  pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
             % digits)
  cut = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return Words(cuts=(cut,), gpt2=False, **others)


# By what llama.cpp calls them; as in the tokenizer.json of the models that have them.
WORDS = {'gpt-2': Words(), 'smollm': Words(cuts=({'type': 'Digits', 'individual_digits': True},)),
         'llama-bpe': _words(r'\p{N}{1,3}', whole=True), 'dbrx': _words(r'\p{N}{1,3}'),
         'qwen2': _words(r'\p{N}', normalizer={'type': 'NFC'})}
CONTROL, USER_DEFINED = 3, 4


def special_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The id that begins a text, and whether it is put there; the ids that end what is generated, the end of a text
  first: as the configurations of a folder have them."""
  begin, *ends = (metadata.get(f'tokenizer.ggml.{name}_token_id') for name in ('bos', 'eos', 'eot', 'eom'))
  begins = metadata.get('tokenizer.ggml.model') == 'llama' or metadata.get('tokenizer.ggml.pre') == 'llama-bpe'
  return {'bos_token_id': begin, 'eos_token_id': [end for end in ends if end is not None],
          'add_bos_token': metadata.get('tokenizer.ggml.add_bos_token', begins)}


def read_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
  """The tokenizer of a file: byte-level pairs (`gpt2`), or pieces of sentencepiece (`llama`).

  Raises:
    ConfigError: another tokenizer, or none, or one that cannot end a text.
  """
  def of(name: str, *default: Any) -> Any:
    return metadata.get(f'tokenizer.ggml.{name}', *default)

  kind, words, eos = of('model'), of('pre'), of('eos_token_id')
  if eos is None or kind != 'llama' and (kind != 'gpt2' or words not in WORDS):
    raise ConfigError(f'{path}: tokenizer.ggml.model = {kind!r}, pre = {words!r}: rebuilt are those of kind llama, and '
                      f"of kind gpt2 with pre {', '.join(WORDS)}, that have an eos_token_id; put the model's {FILE} "
                      'and tokenizer_config.json beside the file')
  tokens, types = of('tokens'), of('token_type')
  if kind == 'llama':
    try:
      return bpe_pieces(tokens, of('scores'), types, unk=of('unknown_token_id', 0), bos=of('bos_token_id'), eos=eos,
                        prefix=bool(of('add_space_prefix', True)))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
      raise ConfigError(f"{path}: tokenizer.ggml: they are no pieces of sentencepiece ({error}); put the model's "
                        f'{FILE} and tokenizer_config.json beside the file') from error
  added = {i: kind == CONTROL for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
  return json_tokenizer(byte_level_bpe(tokens, [pair.split(' ') for pair in of('merges')], added, WORDS[words]),
                        eos, path)
