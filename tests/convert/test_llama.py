"""Pretrained decoders: parity with a NumPy reference (tests/llama_reference.py), safetensors, GGUF, and messages."""
import functools
import io
import json
import struct
import unittest.mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import loopformer
from loopformer import config as configs, plans
from loopformer.cells.recur import Recur
from loopformer.convert import from_pretrained, gguf, llama, retrofit, tensors
from loopformer.model import Looped, parameter_shapes
from loopformer.nn.blocks import Block
from loopformer.nn.inject import Concat
from loopformer.nn.positions import StretchedRotary
from loopformer.nn.stack import Stack
from loopformer.optim import on_unfused
from loopformer.papers.melt.attention import LatentAttention
from loopformer.papers.plt.attention import GatedAttention
from loopformer.types import ConfigError
from tests import llama_reference as reference
from tests.llama_reference import CONFIGS, D, F, G, H, N, T, V

TOKENS = np.random.default_rng(3).integers(0, V, (3, 11))
LAYER = 'model.layers.1.'


@functools.cache
def weights(name: str):
  return reference.weights(CONFIGS[name])


def imported(folder, name='llama', *, sd=None, files=1, **options):
  reference.save(folder, CONFIGS[name], weights(name) if sd is None else sd, files)
  return from_pretrained(folder, **options)


def close(model, params, expected, tolerance=2e-4, steps=None):
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS, steps=steps), expected, rtol=0, atol=tolerance)


# Parity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_are_the_reference(name, tmp_path):
  model, params, tokenizer = imported(tmp_path, name)
  expected = reference.logits(weights(name), CONFIGS[name], TOKENS)
  assert np.abs(expected).max() > 3 and tokenizer is None and model.loops == CONFIGS[name].get('num_loops', 1)
  close(model, params, expected)
  shapes = parameter_shapes(model)
  assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == (
      jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), shapes))


def halves_as_pairs(value, d=D // H):
  return value.reshape(-1, 2, d // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


# What parity would miss if the reference did not feel it: each changes the weights as one mistake would.
MISTAKES = {
    'pairs of q and k': ('llama', lambda key, value: halves_as_pairs(value) if key[-13:] in (
        'q_proj.weight', 'k_proj.weight') else value),
    'heads of q': ('llama', lambda key, value: np.roll(value, D // H, 0) if 'q_proj' in key else value),
    'groups of v': ('llama', lambda key, value: np.roll(value, D // H, 0) if 'v_proj' in key else value),
    'output transposed': ('llama', lambda key, value: value.T if 'o_proj' in key else value),
    'bias of q dropped': ('qwen2', lambda key, value: 0 * value if 'q_proj.bias' in key else value),
    'bias of q in pairs': ('qwen2', lambda key, value: halves_as_pairs(value) if 'q_proj.bias' in key else value),
    'bias of the output dropped': ('biased', lambda key, value: 0 * value if 'o_proj.bias' in key else value),
    'norm of q in pairs': ('qwen3', lambda key, value: halves_as_pairs(value) if 'q_norm' in key else value),
    'heads of the output': ('wide', lambda key, value: np.roll(value, 12, 1) if 'o_proj' in key else value),
    'norm of all queries in pairs': ('olmo2', lambda key, value: halves_as_pairs(value) if 'q_norm' in key else value),
    'norms of the branches': ('olmo2', lambda key, value: value / value if 'post_attention' in key else value),
    'norm of every loop': ('nanbeige', lambda key, value: value / value if key == 'model.norm.weight' else value),
    'norm of k dropped': ('qwen3', lambda key, value: value / value if 'k_norm' in key else value),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_reference_feels(mistake):
  name, change = MISTAKES[mistake]
  changed = {key: change(key, value) for key, value in weights(name).items()}
  both = [reference.logits(sd, CONFIGS[name], TOKENS) for sd in (weights(name), changed)]
  assert np.abs(both[0] - both[1]).max() > 1e-2


@pytest.mark.parametrize('change', [{'rope_theta': 60.0}, {'rms_norm_eps': 2e-2}])
def test_fields_of_the_configuration_are_felt(change, tmp_path):
  model, params, _ = imported(tmp_path)
  other = reference.logits(weights('llama'), CONFIGS['llama'] | change, TOKENS)
  assert np.abs(loopformer.logits(model, params, TOKENS) - other).max() > 1e-2


@pytest.mark.parametrize('name', ['llama', 'qwen3'])
def test_layers_between_prelude_and_coda_are_looped(name, tmp_path):
  model, params, _ = imported(tmp_path, name, prelude=1, coda=1, loops=3)
  assert {stack: of.depth for stack, of in model.stacks().items()} == {'prelude': 1, 'loop': N - 2, 'coda': 1}
  for loops in (1, 3):
    order = (0, *range(1, N - 1)) + tuple(range(1, N - 1)) * (loops - 1) + (N - 1,)
    close(model, params, reference.logits(weights(name), CONFIGS[name], TOKENS, order), steps=loops)


def test_decodes_with_a_cache_what_the_parallel_pass_computes(tmp_path):
  model, params, _ = imported(tmp_path, 'qwen3')
  plan, kv, rows = plans.schedule((1.0,)), model.cache(len(TOKENS), TOKENS.shape[1]), []
  for place in range(TOKENS.shape[1]):
    trace = model.apply({'params': params}, TOKENS[:, place:place + 1], plan, jnp.full((len(TOKENS), 1), place), kv=kv)
    kv = trace.kv
    rows.append(model.apply({'params': params}, trace.z, method='logits'))
  np.testing.assert_allclose(np.concatenate(rows, 1), loopformer.logits(model, params, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['llama', 'olmo2'])
def test_a_plain_import_can_be_retrofitted(name, tmp_path):
  source, params, _ = imported(tmp_path, name)

  def stack():
    return Stack(source.cell.core.block.clone(), 1)

  model = Looped(read_in=source.read_in, cell=Recur(stack(), Concat()), prelude=stack(), coda=stack(),
                 read_out=source.read_out)
  looped = retrofit(params, model, prelude=(0,), core=(1,), coda=(2,))
  assert np.isfinite(loopformer.logits(model, looped, TOKENS)).all()
  np.testing.assert_array_equal(looped['coda']['block']['attn']['qkv']['kernel'][0],
                                params['cell']['core']['block']['attn']['qkv']['kernel'][2])


@pytest.mark.parametrize('name', ['llama', 'wide', 'qwen3_wide', 'nanbeige'])
def test_heads_of_a_width_of_their_own_are_counted(name, tmp_path):
  model, _, _ = imported(tmp_path, name)
  d, loops = CONFIGS[name].get('head_dim', D // H), model.loops
  # products, and half of all scores
  layer = 2 * (D * (H + 2 * G) * d + H * d * D + 3 * D * F) + 4 * H * d * (T + 1) / 2
  assert model.flops(T, loops) == loops * N * layer + 2 * D * V
  assert model.cache(2, T)['loop'].k.size == loops * N * 2 * T * G * d


def test_projections_of_heads_of_a_width_of_their_own_are_not_taken_apart(tmp_path):
  model, params, _ = imported(tmp_path, 'wide')
  with pytest.raises(ConfigError, match='optim.heads = 4, .* leave them out where its heads have a width of their own'):
    on_unfused(optax.sgd(0.1), H, G).init(params)


@pytest.mark.parametrize('attention', [GatedAttention, LatentAttention])
def test_attentions_of_papers_refuse_it_by_name(attention):
  with pytest.raises(TypeError, match="unexpected keyword argument 'head'"):
    attention(heads=2, head=8)
  with pytest.raises(ConfigError, match="attn.head = 8: .* has no field 'head'"):
    configs.override(Block(attn=attention(heads=2), mlp=None), 'attn.head=8')


# safetensors ---------------------------------------------------------------------------------------------------------


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_several_files_are_one_model(tmp_path):
  same(imported(tmp_path / 'one')[1], imported(tmp_path / 'three', files=3)[1])


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(dtype, tmp_path):
  sd = {key: value.astype(dtype) for key, value in weights('llama').items()}
  wide = {key: value.astype(np.float32) for key, value in sd.items()}
  same(imported(tmp_path / 'half', sd=sd)[1], imported(tmp_path / 'wide', sd=wide)[1])


def test_buffers_and_a_copy_of_the_tied_head_are_passed_over(tmp_path):
  sd = weights('llama')
  more = {'lm_head.weight': sd['model.embed_tokens.weight'], LAYER + 'self_attn.rotary_emb.inv_freq': np.ones(4)}
  same(imported(tmp_path / 'more', sd=sd | more)[1], imported(tmp_path / 'as_is')[1])


@pytest.mark.parametrize('name', ['_orig_mod.model.{}', 'module.model.{}', 'model.model.{}', '{}', 'model.module.{}'])
def test_names_are_read_without_what_is_around_them(name, tmp_path):
  """Of modules that were compiled or trained on several devices; of a stack without its head, or twice within one."""
  theirs = {name.format(key.removeprefix('model.')): value for key, value in weights('llama').items()}
  theirs = {key.replace('layers.1.', 'layers.1._orig_mod.'): value for key, value in theirs.items()}
  same(imported(tmp_path / 'theirs', sd=theirs)[1], imported(tmp_path / 'as_is')[1])


def test_a_tied_head_in_place_of_the_embedding(tmp_path):
  """As safetensors' own save_model keeps it, the first by name of tensors that are one."""
  theirs = {'lm_head.weight' if 'embed' in key else key: value for key, value in weights('llama').items()}
  same(imported(tmp_path / 'theirs', sd=theirs)[1], imported(tmp_path / 'as_is')[1])


def without(sd, *keys):
  return {key: value for key, value in sd.items() if key not in keys}


WEIGHT_ERRORS = {
    'missing': (lambda sd: without(sd, LAYER + 'mlp.up_proj.weight'),
                [LAYER + 'mlp.up_proj.weight', 'missing', f'[{F}, {D}]']),
    'misshapen': (lambda sd: sd | {LAYER + 'self_attn.k_proj.weight': np.zeros((D, D), np.float32)},
                  [LAYER + 'self_attn.k_proj.weight', f'[{D}, {D}]', f'[{G * D // H}, {D}]']),
    'surplus': (lambda sd: sd | {LAYER + 'self_attn.q_proj.bias': np.zeros(D, np.float32)},
                [LAYER + 'self_attn.q_proj.bias', 'no place']),
    'integers': (lambda sd: sd | {'model.norm.weight': np.zeros(D, np.int32)}, ['model.norm.weight', 'I32']),
    'another head': (lambda sd: sd | {'lm_head.weight': np.zeros((V, D), np.float32)},
                     ['lm_head.weight', 'tie_word_embeddings']),
    'twice': (lambda sd: sd | {'_orig_mod.model.norm.weight': sd['model.norm.weight']},
              ["'_orig_mod.model.norm.weight' and ", "are both 'model.norm.weight'"]),
}


def test_a_head_that_is_missing_may_be_a_tied_one(tmp_path):
  with pytest.raises(ConfigError, match='lm_head.weight.* is missing; .* write "tie_word_embeddings": true'):
    imported(tmp_path, 'untied', sd=without(weights('untied'), 'lm_head.weight'))


@pytest.mark.parametrize('case', WEIGHT_ERRORS)
def test_wrong_weights_are_named(case, tmp_path):
  change, words = WEIGHT_ERRORS[case]
  with pytest.raises(ConfigError) as error:
    imported(tmp_path, sd=change(weights('llama')))
  assert not [word for word in words if word not in str(error.value)], error.value


def test_whether_a_tensor_is_there_is_asked_without_reading_it():
  held = tensors.Tensors({'a': tensors.Tensor(shape=(1,), dtype='F32', read=None)})
  assert 'a' in held and 'b' not in held and list(held) == ['a'] and held.shapes == {'a': (1,)}


def test_what_an_index_does_not_list_is_there_all_the_same(tmp_path):
  """As transformers reads it; of two files that both have it, neither counts."""
  written = pytest.importorskip('safetensors.numpy')
  name, path = 'model.norm.weight', tmp_path / 'model.safetensors.index.json'
  reference.save(tmp_path, CONFIGS['llama'], weights('llama'), 2)
  whole, index = from_pretrained(tmp_path)[1], json.loads(path.read_text())
  of = index['weight_map'].pop(name)
  path.write_text(json.dumps(index))
  jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path)[1], whole)
  other = next(file for file in index['weight_map'].values() if file != of)
  written.save_file({**written.load_file(tmp_path / other), name: weights('llama')[name]}, tmp_path / other)
  with pytest.raises(ConfigError,
                     match=f"tensor '{name}' is in .* too, and model.safetensors.index.json does not say which"):
    from_pretrained(tmp_path)


def test_nothing_is_read_before_all_shapes_fit(tmp_path, monkeypatch):
  sd = weights('llama') | {LAYER + 'self_attn.k_proj.weight': np.zeros((D, D), np.float32)}
  monkeypatch.setattr(tensors.Tensors, '__getitem__', None)
  with pytest.raises(ConfigError, match='k_proj'):
    imported(tmp_path, sd=sd)


@pytest.mark.parametrize('family', ['llama', 'mistral', 'qwen2'])
def test_null_is_as_if_it_were_left_out(family):
  config = {'model_type': family, 'vocab_size': 40, 'hidden_size': 16, 'intermediate_size': 24, 'num_hidden_layers': 2,
            'num_attention_heads': 4}
  names = ('max_position_embeddings', 'rms_norm_eps', 'tie_word_embeddings', 'num_key_value_heads', 'head_dim',
           'rope_theta', 'rope_scaling', 'attention_bias', 'bos_token_id', 'layer_types', 'use_sliding_window')
  assert llama.read_config(config | dict.fromkeys(names), 'here') == llama.read_config(config, 'here')


CONFIG_ERRORS = {
    'architecture': ({'model_type': 'gpt_neox'}, ["model_type = 'gpt_neox'", 'llama']),
    'no width': ({'hidden_size': None}, ['hidden_size is missing']),
    'width of heads': ({'head_dim': 16}, ['self_attn.q_proj.weight', f'expected [{16 * H}, {D}]']),
    'odd heads': ({'head_dim': 7}, ['heads = 4: their width 7 is odd']),
    'no heads': ({'num_attention_heads': 0}, ['num_attention_heads = 0']),
    'half a head': ({'head_dim': 8.5}, ['head_dim = 8.5: give an integer']),
    'capped': ({'final_logit_softcapping': 30.0}, ['final_logit_softcapping = 30.0']),
    'scaled': ({'embedding_multiplier': 12.0}, ['embedding_multiplier = 12.0']),
    'looped': ({'num_loops': 2}, ['num_loops = 2: its layers run several times']),
    'biased norms': ({'model_type': 'olmo2', 'attention_bias': True}, ['attention_bias = True: olmo2']),
    'no loops': ({'model_type': 'nanbeige'}, ['num_loops is missing']),
    'mini-hyper': ({'model_type': 'nanbeige', 'num_loops': 2, 'enable_mhc': True}, ['enable_mhc = True']),
    'shared keys': ({'model_type': 'nanbeige', 'num_loops': 2, 'loop_share_kv': True}, ['loop_share_kv = True']),
    'heads': ({'num_attention_heads': 5}, ['heads = 5']),
    'groups': ({'num_key_value_heads': 3}, ['groups = 3']),
    'scaling': ({'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}},
                ['rope_scaling = llama3', 'low_freq_factor is']),
    'no scaling': ({'rope_scaling': CONFIGS['llama3']['rope_scaling'] | {'factor': 0.5}}, ['position.factor = 0.5']),
    'unordered': ({'rope_scaling': CONFIGS['llama3']['rope_scaling'] | {'low_freq_factor': 2.0}},
                  ['position.high = 1.3']),
    'old scaling': ({'rope_scaling': {'type': 'linear', 'factor': 2.0}}, ['rope_scaling = linear']),
    'new scaling': ({'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 50.0}}, ['rope_scaling = yarn']),
    'of every kind of layer': ({'rope_parameters': {'full_attention': {'rope_type': 'default', 'rope_theta': 5.0}}}, [
        'rope_parameters.full_attention = ', 'the same in all layers']),
    'two scalings': ({'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'type': 'linear', 'factor': 2.0}}, [
        'rope_parameters: rope_type = default, but elsewhere it is linear']),
    'two types': ({'rope_scaling': {'rope_type': 'default', 'type': 'yarn'}},
                  ['rope_type = yarn, but elsewhere it is default']),
    'two bases': ({'rope_parameters': {'rope_theta': 60.0}}, ['rope_theta = 60.0, but elsewhere it is 50.0']),
    'no type': ({'rope_scaling': {'factor': 2.0}}, ['rope_scaling = a factor without rope_type']),
    'truth in quotes': ({'tie_word_embeddings': 'false'}, ["tie_word_embeddings = 'false': it is to be true or false"]),
    'bias in quotes': ({'attention_bias': 'false'}, ["attention_bias = 'false'"]),
    'truth as a number': ({'use_sliding_window': 1}, ['use_sliding_window = 1: it is to be true or false']),
    'number in quotes': ({'rms_norm_eps': '1e-5'}, ["rms_norm_eps = '1e-5': it is to be a number"]),
    'base in quotes': ({'rope_parameters': {'rope_theta': '50'}},
                       ["rope_parameters.rope_theta = '50': it is to be a number"]),
    'number as truth': ({'rope_theta': True}, ['rope_theta = True: it is to be a number']),
    'length in quotes': ({'max_position_embeddings': '16'},
                         ["max_position_embeddings = '16': it is to be a whole number"]),
    'window in quotes': ({'model_type': 'mistral', 'sliding_window': '4'}, ["sliding_window = '4'"]),
    'text as a list': ({'model_type': ['llama']}, ['model_type = ', 'it is to be text']),
    'list as text': ({'layer_types': 'full_attention'}, ["layer_types = 'full_attention': it is to be a list"]),
    'scaling as text': ({'rope_scaling': 'llama3'}, ["rope_scaling = 'llama3': it is to be an object"]),
    'both ways': ({'is_causal': False}, ['is_causal = False']),
    'code of its own': ({'auto_map': {'AutoModelForCausalLM': 'modeling_x.X'}},
                        ['auto_map = modeling_x.X', 'remove auto_map']),
    'window of Mistral': ({'model_type': 'mistral', 'max_position_embeddings': 8192}, [
        'sliding_window = 4096', 'max_position_embeddings = 4096 (it is 8192)']),
    'linear': ({'layer_types': ['linear_attention'], 'sliding_window': T}, ["layer_types = ['linear_attention']"]),
    'partial': ({'partial_rotary_factor': 0.5}, ['partial_rotary_factor = 0.5']),
    'activation': ({'hidden_act': 'gelu'}, ['hidden_act = gelu']),
    'bias': ({'mlp_bias': True}, ['mlp_bias = True']),
    'window': ({'model_type': 'mistral', 'sliding_window': 4}, [
        'sliding_window = 4', 'max_position_embeddings = 4 (it is 16)']),
    'windows': ({'layer_types': ['sliding_attention']}, ['layer_types']),
    'quantised': ({'quantization_config': {'bits': 4}}, ['quantization_config']),
}


@pytest.mark.parametrize('case', CONFIG_ERRORS)
def test_models_that_would_be_others_are_refused(case, tmp_path):
  change, words = CONFIG_ERRORS[case]
  reference.save(tmp_path, CONFIGS['llama'] | change, weights('llama'))
  with pytest.raises(ConfigError) as error:
    from_pretrained(tmp_path)
  assert not [word for word in [*words, 'config.json'] if word not in str(error.value)], error.value
  assert str(error.value).count('config.json: ') <= 1 and '\n' not in str(error.value)


@pytest.mark.parametrize('change', [
    {'partial_rotary_factor': None, 'rope_scaling': None}, {'rope_parameters': {'rope_theta': 50, 'type': 'default'}},
    {'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': None, 'layer_types': ['full_attention'] * N},
    {'auto_map': {'AutoTokenizer': 'tokenization_x.X'}, 'is_causal': True, 'rope_interleaved': False}], ids=str)
def test_fields_that_change_nothing_are_read(change, tmp_path):
  name = change.get('model_type', 'llama')
  reference.save(tmp_path / 'with', CONFIGS[name] | change, weights(name))
  assert from_pretrained(tmp_path / 'with')[0] == imported(tmp_path / 'without', name)[0]


@pytest.mark.parametrize('options, words', [
    ({'prelude': 2, 'coda': 1}, 'none would be left'), ({'prelude': -1}, 'prelude = -1'), ({'loops': 0}, 'loops = 0'),
    ({'dtype': 'float16'}, "dtype = 'float16'")])
def test_wrong_arguments_are_named(options, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    imported(tmp_path, **options)


def truncate(path, size):
  path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize('size, words', [(4, 'no safetensors file'), (40, 'no safetensors file'), (-1, 'was cut off'),
                                         (-70_000, 'was cut off')])
def test_a_file_that_was_cut_off_is_named(size, words, tmp_path):
  reference.save(tmp_path, CONFIGS['llama'], weights('llama'))
  truncate(tmp_path / 'model.safetensors', size)
  with pytest.raises(ConfigError, match=words) as error:
    from_pretrained(tmp_path)
  assert 'model.safetensors' in str(error.value)


def test_absent_and_damaged_files_are_named(tmp_path):
  with pytest.raises(ConfigError, match='config.json: there is no such file'):
    from_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIGS['llama']))
  with pytest.raises(ConfigError, match='no model.safetensors, model.safetensors.index.json, pytorch_model.bin'):
    from_pretrained(tmp_path)
  reference.save(tmp_path, CONFIGS['llama'], weights('llama'), files=2)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(ConfigError, match="names 'model-00002"):
    from_pretrained(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ConfigError, match='not JSON'):
    from_pretrained(tmp_path)


# GGUF ----------------------------------------------------------------------------------------------------------------


def f16(number):
  return struct.pack('<e', number)


def packed(values, kind):
  """(bytes of a tensor, what they stand for), number by number."""
  values = np.asarray(values, np.float32)
  if kind == 'F32':
    return values.tobytes(), values
  if kind == 'F16':
    return values.astype(np.float16).tobytes(), values.astype(np.float16).astype(np.float32)
  if kind == 'BF16':
    return values.astype(ml_dtypes.bfloat16).tobytes(), values.astype(ml_dtypes.bfloat16).astype(np.float32)
  data, meant = b'', []
  for block in values.reshape(-1, 32).tolist():
    low, high = min(block), max(block)
    scale = float(np.float16({'Q8_0': max(map(abs, block)) / 127, 'Q4_0': max(map(abs, block)) / 7,
                              'Q4_1': (high - low) / 15}[kind])) or 1.0
    least = float(np.float16(low))
    if kind == 'Q8_0':
      codes = [max(-127, min(127, round(x / scale))) for x in block]
      data += f16(scale) + struct.pack('<32b', *codes)
      meant += [scale * code for code in codes]
    else:
      codes = [max(0, min(15, round(x / scale) + 8 if kind == 'Q4_0' else round((x - least) / scale))) for x in block]
      halves = bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
      data += f16(scale) + (f16(least) if kind == 'Q4_1' else b'') + halves
      meant += [scale * (code - 8) if kind == 'Q4_0' else scale * code + least for code in codes]
  return data, np.float32(meant).reshape(values.shape)


CODES = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q8_0': 8, 'BF16': 30}


def text(value):
  return struct.pack('<Q', len(value.encode())) + value.encode()


def entry(value):
  """A value of the metadata with its type."""
  if isinstance(value, str):
    return struct.pack('<I', 8) + text(value)
  if isinstance(value, list):
    kind = entry(value[0])[:4]
    return struct.pack('<I', 9) + kind + struct.pack('<Q', len(value)) + b''.join(entry(item)[4:] for item in value)
  return struct.pack('<If', 6, value) if isinstance(value, float) else struct.pack('<II', 4, value)


def gguf_bytes(metadata, tensors):
  """A file of version 3; tensors: name -> (shape, kind, bytes)."""
  head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(metadata))
  head += b''.join(text(key) + entry(value) for key, value in metadata.items())
  body = b''
  for name, (shape, kind, data) in tensors.items():
    head += text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape[::-1], CODES[kind], len(body))
    body += data + b'\0' * (-len(data) % 32)
  return head + b'\0' * (-len(head) % 32) + body


THEIRS = {'model.embed_tokens': 'token_embd', 'model.norm': 'output_norm', 'lm_head': 'output',
          'model.layers.': 'blk.', 'self_attn.q_norm': 'attn_q_norm', 'self_attn.k_norm': 'attn_k_norm',
          'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k', 'self_attn.v_proj': 'attn_v',
          'self_attn.o_proj': 'attn_output', 'input_layernorm': 'attn_norm', 'post_attention_layernorm': 'ffn_norm',
          'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up', 'mlp.down_proj': 'ffn_down'}
POST = {'post_attention_layernorm': 'post_attention_norm', 'post_feedforward_layernorm': 'post_ffw_norm'}
VOCAB = [*map(chr, range(97, 97 + 26)), 'Ġ', '1', '2', 'ab', 'abc', 'Ġa', '12', '<|end|>'] + [
    f'<|{i}|>' for i in range(V - 34)]
TOKENIZER = {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.tokens': VOCAB,
             'tokenizer.ggml.token_type': [3 if piece.startswith('<') else 1 for piece in VOCAB],
             'tokenizer.ggml.merges': ['a b', 'ab c', 'Ġ a', '1 2'], 'tokenizer.ggml.eos_token_id': 33}


def gguf_of(name, kind='F32', metadata=(), permute=True, drop=(), more=()):
  """(bytes of the model as a GGUF file, the weights that it stands for); norms and biases are F32."""
  config = CONFIGS[name]
  arch = config['model_type']
  described = {'general.architecture': arch, f'{arch}.block_count': N, f'{arch}.context_length': T,
               f'{arch}.embedding_length': D, f'{arch}.feed_forward_length': F, f'{arch}.attention.head_count': H,
               f'{arch}.attention.head_count_kv': config['num_key_value_heads'],
               f'{arch}.attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
               f'{arch}.rope.freq_base': config['rope_theta'], f'{arch}.attention.key_length': config.get('head_dim'),
               f'{arch}.num_loops': config.get('num_loops'),
               f'{arch}.skip_loop_final_norm': config.get('skip_loop_final_norm'), **TOKENIZER} | dict(metadata)
  tensors, meant = {}, {}
  for (key, value), own in zip(weights(name).items(), gguf_named(weights(name), arch)):
    # As llama.cpp's converter does:
    swapped = permute and arch in ('llama', 'nanbeige') and any(f'{x}_proj' in key for x in 'qk')
    given = halves_as_pairs(value, config.get('head_dim', D // H)) if swapped else value
    data, value = packed(given, 'F32' if value.ndim == 1 else kind)
    tensors[own] = (value.shape, 'F32' if value.ndim == 1 else kind, data)
    meant[key] = pairs_as_halves(value) if swapped else value
  tensors |= {own: (value.shape, 'F32', value.tobytes()) for own, value in dict(more).items()}
  return gguf_bytes({key: value for key, value in described.items() if value is not None},
                    without(tensors, *drop)), meant


def gguf_named(sd, arch):
  """Tensors under the names of llama.cpp, in the order in which they are given."""
  found = {}
  for key, value in sd.items():
    for theirs, ours in (THEIRS | POST if arch == 'olmo2' else THEIRS).items():
      key = key.replace(theirs, ours)
    found[key] = value
  return found


def pairs_as_halves(value):
  return value.reshape(-1, D // H // 2, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


@pytest.mark.parametrize('kind', CODES)
def test_gguf_of_every_kind_gives_the_reference_mean_nll(kind, tmp_path):
  data, meant = gguf_of('llama', kind)
  (tmp_path / 'model.gguf').write_bytes(data)
  model, params, _ = from_pretrained(tmp_path / 'model.gguf')
  expected = reference.logits(meant, CONFIGS['llama'], TOKENS)
  nll = reference.mean_nll(loopformer.logits(model, params, TOKENS), TOKENS)
  assert abs(nll - reference.mean_nll(expected, TOKENS)) < 1e-5
  close(model, params, expected)


@pytest.mark.parametrize('name', ['untied', 'biased', 'qwen2', 'qwen3', 'qwen3_wide', 'olmo2', 'nanbeige',
                                  'nanbeige_skip'])
def test_gguf_of_every_family_is_the_folder(name, tmp_path):
  (tmp_path / 'model.gguf').write_bytes(gguf_of(name)[0])
  model, params, _ = from_pretrained(tmp_path / 'model.gguf')
  expected = imported(tmp_path / 'folder', name)
  texts = ({line for line in configs.describe(of).splitlines() if '.eps = ' not in line} for of in (model, expected[0]))
  assert next(texts) == next(texts)  # a file has epsilons in 32 bits
  same(params, expected[1])


def test_a_file_of_a_looped_model_that_does_not_say_how_often_is_refused(tmp_path):
  (tmp_path / 'model.gguf').write_bytes(gguf_of('nanbeige', metadata={'nanbeige.num_loops': None})[0])
  with pytest.raises(ConfigError, match='model.gguf: nanbeige.num_loops is missing'):
    from_pretrained(tmp_path / 'model.gguf')


def test_rows_of_queries_and_keys_that_were_not_permuted_show_in_the_mean_nll(tmp_path):
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', permute=False)[0])
  model, params, _ = from_pretrained(tmp_path / 'model.gguf')
  nll = reference.mean_nll(loopformer.logits(model, params, TOKENS), TOKENS)
  assert abs(nll - reference.mean_nll(reference.logits(weights('llama'), CONFIGS['llama'], TOKENS), TOKENS)) > 1e-2


def test_quantised_tensors_are_those_of_the_package(tmp_path):
  package = pytest.importorskip('gguf')
  code = package.GGMLQuantizationType.Q4_K
  numbers, size = package.GGML_QUANT_SIZES[code]
  blocks = np.random.default_rng(0).integers(0, 120, (4, 2 * size), np.uint8)
  with unittest.mock.patch.dict(CODES, Q4_K=int(code)):
    (tmp_path / 'x.gguf').write_bytes(gguf_bytes({'a': 1}, {'w': ((4, 2 * numbers), 'Q4_K', blocks.tobytes())}))
  metadata, tensors = gguf.read(tmp_path / 'x.gguf')
  assert metadata == {'a': 1} and tensors.shapes == {'w': (4, 2 * numbers)} and tensors.dtypes == {'w': 'Q4_K'}
  np.testing.assert_array_equal(tensors['w'], package.dequantize(blocks, code))


GGUF_ERRORS = {
    'architecture': (dict(metadata={'general.architecture': 'gemma'}), ["general.architecture = 'gemma'"]),
    'no width': (dict(metadata={'llama.embedding_length': None}), ['llama.embedding_length is missing']),
    'width of heads': (dict(metadata={'llama.attention.key_length': 16}),
                       ['attn_q.weight', f'expected [{16 * H}, {D}]']),
    'width of values': (dict(metadata={'llama.attention.value_length': 16}), ['llama.attention.value_length = 16']),
    'scaling': (dict(metadata={'llama.rope.scaling.type': 'yarn'}), ['rope.scaling = yarn']),
    'a factor alone': (dict(metadata={'llama.rope.scaling.factor': 4.0}), ['rope.scaling = linear by 4']),
    'an old factor': (dict(metadata={'llama.rope.scale_linear': 4.0}), ['rope.scaling = linear by 4']),
    'window': (dict(metadata={'llama.attention.sliding_window': 4}), ['attention.sliding_window = 4']),
    'both ways': (dict(metadata={'llama.attention.causal': 0}), ['llama.attention.causal = 0']),
    'experts': (dict(metadata={'llama.expert_count': 8}), ['llama.expert_count = 8']),
    'scaled logits': (dict(metadata={'llama.logit_scale': 0.5}), ['llama.logit_scale = 0.5']),
    'part': (dict(metadata={'split.count': 2}), ['a part of a model in 2 files']),
    'groups': (dict(metadata={'llama.attention.head_count_kv': 3}), ['groups = 3']),
    'factors': (dict(more={gguf.FACTORS: np.float32([1, 2, 3, 5])}),
                ["'rope_freqs.weight': the factors are not those of Llama"]),
    'missing': (dict(drop=['blk.2.ffn_up.weight']), ["'blk.2.ffn_up.weight'", f'[{F}, {D}]']),
    'no embedding': (dict(drop=['token_embd.weight']), ["'token_embd.weight' is missing"]),
    'layers': (dict(metadata={'llama.block_count': N - 1}), ["'blk.2.", 'no place']),
    'hidden': (dict(metadata={'llama.feed_forward_length': 96}), ['ffn_gate.weight', f'[{F}, {D}]', f'[96, {D}]']),
    'tokenizer': (dict(metadata={'tokenizer.ggml.pre': 'tekken'}), ["pre = 'tekken'", 'tokenizer.json']),
}


@pytest.mark.parametrize('case', GGUF_ERRORS)
def test_wrong_gguf_files_are_named(case, tmp_path):
  options, words = GGUF_ERRORS[case]
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', **options)[0])
  with pytest.raises(ConfigError) as error:
    from_pretrained(tmp_path / 'model.gguf')
  assert not [word for word in [*words, 'model.gguf'] if word not in str(error.value)], error.value
  assert str(error.value).count('model.gguf: ') == 1 and '\n' not in str(error.value)


def test_parts_of_a_gguf_file_are_one_model(tmp_path):
  names = list(gguf_named(weights('llama'), 'llama'))
  half, others = names[::2], names[1::2]
  for part, (drop, about) in enumerate([(half, {}), (others, TOKENIZER | {'general.architecture': 'gpt2'})], 1):
    data, _ = gguf_of('llama', metadata=about | {'split.count': 2}, drop=drop)
    (tmp_path / f'model-0000{part}-of-00002.gguf').write_bytes(data)
  model, params, _ = from_pretrained(tmp_path / 'model-00001-of-00002.gguf')
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama')[0])
  assert (from_pretrained(tmp_path / 'model-00002-of-00002.gguf')[0] == model
          == from_pretrained(tmp_path / 'model.gguf')[0])
  same(params, from_pretrained(tmp_path / 'model.gguf')[1])
  (tmp_path / 'model-00002-of-00002.gguf').unlink()
  with pytest.raises(ConfigError, match='one of 2 parts, and model-00002-of-00002.gguf is not beside it'):
    from_pretrained(tmp_path / 'model-00001-of-00002.gguf')


def test_gguf_of_llama_3_says_how_much_more_slowly_each_pair_turns(tmp_path):
  base, factor, original, factors = 5e5, 32.0, 8192, []
  for i in range(D // H // 2):  # as llama.cpp's converter does
    wave = 2 * np.pi * base ** (2 * i / (D // H))
    smooth = np.clip((original / wave - 1) / (4 - 1), 0, 1)
    factors.append(1 / ((1 - smooth) / factor + smooth))
  assert factors[0] == 1 < factors[2] < factors[3] == factor
  data, _ = gguf_of('llama', metadata={'llama.rope.freq_base': base}, more={gguf.FACTORS: np.float32(factors)})
  (tmp_path / 'model.gguf').write_bytes(data)
  position = from_pretrained(tmp_path / 'model.gguf')[0].cell.core.block.attn.position
  assert position == StretchedRotary(base=base, factor=factor, low=1.0, high=4.0, original=original)


@pytest.mark.parametrize('size, words', [(2, 'no GGUF file'), (30, 'no GGUF file'), (400, 'no GGUF file'),
                                         (-1, 'was cut off')])
def test_a_gguf_file_that_was_cut_off_is_named(size, words, tmp_path):
  path = tmp_path / 'model.gguf'
  path.write_bytes(gguf_of('llama', 'Q8_0')[0].rstrip(b'\0') if size < 0 else gguf_of('llama')[0])
  truncate(path, size)
  with pytest.raises(ConfigError, match=words):
    from_pretrained(path)


def test_a_gguf_file_says_what_begins_a_text_and_what_ends_one(tmp_path):
  pytest.importorskip('tokenizers')
  about = {'tokenizer.ggml.bos_token_id': 35, 'tokenizer.ggml.eot_token_id': 34,
           'tokenizer.chat_template': '{{ bos_token }}a'}
  for add in (1, 0):
    (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', metadata=about | {'tokenizer.ggml.add_bos_token': add})[0])
    tokenizer = from_pretrained(tmp_path / 'model.gguf')[2]
    assert tokenizer.ends == (33, 34) and tokenizer.start == (35 if add else None)
    assert dict(tokenizer.names) == {'bos_token': VOCAB[35], 'eos_token': VOCAB[33]}


@pytest.mark.parametrize('pre, text, pieces', [
    ('gpt-2', 'ab 1212abc', ['ab', 'Ġ', '12', '12', 'abc']),
    ('smollm', 'ab 1212abc', ['ab', 'Ġ', '1', '2', '1', '2', 'abc']),
    ('llama-bpe', 'ab 1212abc', ['ab', 'Ġ', '12', '1', '2', 'abc']), ('qwen2', 'ab 12', ['ab', 'Ġ', '1', '2']),
    ('dbrx', 'ab 1212', ['ab', 'Ġ', '12', '1', '2']), ('llama-bpe', 'xyz a  b', ['xyz', 'Ġa', 'Ġ', 'Ġ', 'b']),
    ('dbrx', 'xyz', ['x', 'y', 'z'])])
def test_texts_are_cut_as_the_model_of_a_gguf_file_cuts_them(pre, text, pieces, tmp_path):
  pytest.importorskip('tokenizers')
  vocab = [*VOCAB[:-1], 'xyz']  # a piece that no pairs make: Llama 3 takes such whole
  about = {'tokenizer.ggml.pre': pre, 'tokenizer.ggml.tokens': vocab, 'tokenizer.ggml.add_bos_token': 0,
           'tokenizer.ggml.token_type': [*TOKENIZER['tokenizer.ggml.token_type'][:-1], 1]}
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', metadata=about)[0])
  assert [vocab[i] for i in from_pretrained(tmp_path / 'model.gguf')[2].encode(text)] == pieces


def test_pieces_of_a_gguf_file_are_those_of_sentencepiece(tmp_path):
  from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
  made = io.BytesIO()
  SentencePieceTrainer.train(sentence_iterator=iter(['some text, and again some text'] * 9), model_writer=made,
                             model_type='bpe', vocab_size=285, byte_fallback=True, normalization_rule_name='identity',
                             minloglevel=2, remove_extra_whitespaces=False, hard_vocab_limit=False)
  theirs = SentencePieceProcessor(model_proto=made.getvalue())
  ids = range(theirs.vocab_size())
  about = TOKENIZER | {
      'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.pre': 'default',
      'tokenizer.ggml.tokens': [theirs.id_to_piece(i) for i in ids],
      'tokenizer.ggml.scores': [theirs.get_score(i) for i in ids], 'tokenizer.ggml.bos_token_id': 1,
      'tokenizer.ggml.eos_token_id': 2, 'tokenizer.ggml.token_type': [
          2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]}
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', metadata=about)[0])
  tokenizer = from_pretrained(tmp_path / 'model.gguf')[2]
  assert (tokenizer.start, tokenizer.ends, tokenizer.vocab_size) == (1, (2,), theirs.vocab_size())
  for text in ('some text', ' again,  ä\n1', ''):
    ids = theirs.encode(text)
    assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == theirs.decode(ids)
  (tmp_path / 'model.gguf').write_bytes(gguf_of('llama', metadata=about | {'tokenizer.ggml.scores': [1.0]})[0])
  with pytest.raises(ConfigError, match='no pieces of sentencepiece .*; put the model.s tokenizer.json') as error:
    from_pretrained(tmp_path / 'model.gguf')
  assert '\n' not in str(error.value)


def test_tokenizer_of_a_gguf_file(tmp_path):
  pytest.importorskip('tokenizers')
  path = tmp_path / 'model.gguf'
  path.write_bytes(gguf_of('llama')[0])
  _, _, tokenizer = from_pretrained(path)
  ids = tokenizer.encode('abcab a12<|end|>')
  assert [VOCAB[i] for i in ids] == ['abc', 'ab', 'Ġa', '1', '2', '<|end|>'], 'digits stand alone'
  assert tokenizer.eos == 33 and tokenizer.vocab_size == V and tokenizer.decode(ids) == 'abcab a12'
  assert tokenizer.byte_lengths()[ids].tolist() == [3, 2, 2, 1, 1, 0]
