"""Looped models as they are published: folders whose config.json says whose code they are for, and how they run."""
import functools
import json
import math

import jax
import numpy as np
import pytest

import loopformer
from loopformer.convert import from_official, llama
from loopformer.model import parameter_count
from loopformer.starts import Noise, Zeros
from loopformer.types import ConfigError
from tests import llama_reference, reference
from tests.convert import test_convert_recurrent as recurrent
from tests.experiments.test_cli import run_here
from tests.papers import test_ouro

TOKENS = np.random.default_rng(5).integers(0, 48, (2, 9))
NANO = {'n_layer': 2, 'n_head': reference.HEADS, 'n_embd': 48, 'block_size': 16, 'vocab_size': 50,
        'intermediate_dim': 80,
        'bias': False, 'dropout': 0.0}
CONFIGS = {
    'ouro': {'architectures': ['OuroForCausalLM'], 'model_type': 'ouro', 'hidden_size': 48, 'intermediate_size': 80,
             'num_hidden_layers': 2, 'num_attention_heads': 6, 'num_key_value_heads': 6, 'head_dim': 8,
             'vocab_size': 50,
             'hidden_act': 'silu', 'rms_norm_eps': 1e-6, 'rope_theta': 1e6, 'rope_scaling': None,
             'tie_word_embeddings': False, 'max_position_embeddings': 32, 'use_sliding_window': False,
             'layer_types': ['full_attention'] * 2, 'total_ut_steps': 3, 'early_exit_threshold': 1.0,
             'eos_token_id': 2},
    'nanbeige': llama_reference.CONFIGS['nanbeige'] | {'architectures': ['NanbeigeForCausalLM']},
    'huginn': {'architectures': ['RavenForCausalLM'], 'model_type': 'huginn_raven',
               'architecture_class_name': 'RecurrentGPT',
               'block_class_name': 'SandwichBlock', 'norm_class_name': 'RMSNorm_llama', 'norm_eps': 1e-6,
               'mlp_class_name': 'GatedMLP', 'nonlin_name': 'SiLU', 'n_embd': 48, 'n_heads': 6, 'head_dim': 8,
               'intermediate_size': 80, 'vocab_size': 50, 'padded_vocab_size': 50, 'block_size': 64, 'bias': False,
               'qk_bias': True, 'rope_base': 50_000.0, 'injection_type': 'linear', 'state_init': 'like-init',
               'init_values': {'embed_scale': 6.9282, 'std': 0.091287}, 'tie_embeddings': True,
               'n_layers_in_prelude': 1, 'n_layers_in_recurrent_block': 1, 'n_layers_in_coda': 1, 'mean_recurrence': 5,
               'test_time_noise': 0},
    'parcae': {'_class_name': 'ParcaeConfig', 'architecture_class_name': 'Parcae',
               'block_class_name': 'TransformerPreNormBlock',
               'norm_class_name': 'RMSNorm', 'norm_eps': 1e-5, 'mlp_class_name': 'BaseMLP', 'nonlin_name': 'ReLU2',
               'n_embd': 48, 'num_attention_heads': 6, 'num_key_value_heads': 3, 'intermediate_size': 80,
               'vocab_size': 50,
               'block_size': 64, 'bias': False, 'qk_norm': True, 'logit_softcap': None, 'prelude_norm': True,
               'injection_type': 'diagonal', 'state_init': 'like-init', 'recurrent_embedding_dimension': 48,
               'n_layers_in_prelude': 1, 'n_layers_in_recurrent_block': 1, 'n_layers_in_coda': 1, 'mean_recurrence': 3,
               'rope_settings': {'use_rope': True, 'rope_condense_ratio': 1, 'rope_base': 50_000},
               'tie_embeddings': True},
    'loopformer': NANO | {'architectures': ['LoopFormerGPTForCausalLM'], 'model_type': 'loopformer'},
    'base_loop': NANO | {'model_type': 'base_loop_ee', 'max_model_loops': 5},
    'tmlt': NANO | {'model_type': 'tmlt', 'n_loop': 3},
    'base': NANO | {'model_type': 'base'},
}
LOOPS = {'ouro': 3, 'nanbeige': 2, 'huginn': 5, 'parcae': 3, 'loopformer': 8, 'base_loop': 5, 'tmlt': 3, 'base': 1}
NANOS = ('loopformer', 'base_loop', 'tmlt', 'base')
LAYERS = (1, 1, 1)  # of Huginn's and Parcae's sections
names = pytest.mark.parametrize('name', CONFIGS)


@functools.cache
def weights(name):
  if name == 'nanbeige':
    return llama_reference.weights(CONFIGS[name])
  if name in NANOS:
    return {f'gpt.{key}': value for key, value in reference.random_state_dict(name, **reference.SIZES).items()}
  return test_ouro.weights_of() if name == 'ouro' else recurrent.weights(name, LAYERS)


def expected(name):
  """Logits from the equations, by code that the library does not share."""
  sd, loops = weights(name), LOOPS[name]
  if name == 'nanbeige':
    return llama_reference.logits(sd, CONFIGS[name], TOKENS)
  if name == 'ouro':
    return test_ouro.reference(sd, TOKENS, loops)[0][-1]
  if name in NANOS:
    bare = {key.removeprefix('gpt.'): value for key, value in sd.items()}
    return reference.forward(bare, name, TOKENS, (1 / loops,) * loops, reference.HEADS)
  return recurrent.FORWARD[name](sd, LAYERS, TOKENS, loops)


def published(folder, name, files=1, **changes):
  """A folder as its authors upload it; a change to None takes a field away."""
  config = {key: value for key, value in (CONFIGS[name] | changes).items() if value is not None}
  held = {key: np.ascontiguousarray(value) for key, value in weights(name).items()}
  llama_reference.save(folder, config, held, files)
  return folder


def shown(model):
  """A start without noise, which the reference has none of."""
  return model.clone(start=Zeros()) if isinstance(model.start, Noise) else model


@names
def test_a_folder_is_imported_as_it_runs_there(name, tmp_path):
  model, params, tokenizer, config = loopformer.load(published(tmp_path, name, files=3 if name == 'ouro' else 1))
  assert model.loops == LOOPS[name] and tokenizer is None and config.task.length == model.read_in.length
  wanted = expected(name)
  assert np.abs(wanted).max() > 1
  np.testing.assert_allclose(loopformer.logits(shown(model), params, TOKENS), wanted, rtol=0, atol=2e-4)
  if name != 'nanbeige':
    heads = 6 if name in (*NANOS, 'ouro') else None
    again, same = from_official(name, weights(name), heads=heads, loops=LOOPS[name], length=None if name in NANOS else
                                model.read_in.length)
    assert model == again
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_the_command_imports_a_looped_folder(tmp_path):
  folder = published(tmp_path / 'ouro', 'ouro', files=2)
  status, out, err = run_here(tmp_path / 'run', '--mode=import', f'--from={folder}')
  assert status == 0 and 'no tokenizer; written to' in out, err
  model, params, _, _ = loopformer.load(tmp_path / 'run')
  assert model == loopformer.load(folder).model
  jax.tree.map(np.testing.assert_array_equal, params, from_official('ouro', weights('ouro'), heads=6)[1])
  status, _, err = run_here(tmp_path / 'other', '--mode=import', f'--from={folder}', '--coda=1')
  assert status == 1 and 'holds a looped model, whose layers are not cut again' in err


def test_other_loops_are_given_by_hand(tmp_path):
  assert loopformer.load(published(tmp_path / 'ouro', 'ouro'), loops=2).model.loops == 2
  assert loopformer.load(published(tmp_path / 'nanbeige', 'nanbeige'), loops=1).model.loops == 1


@pytest.mark.parametrize('form', ['pytorch_model.bin', 'ckpt.pt'])
def test_files_of_pytorch(form, tmp_path):
  """Parcae is published so: one file, of its own name."""
  torch = pytest.importorskip('torch')
  published(tmp_path, 'parcae')
  (tmp_path / 'model.safetensors').unlink()
  held = {key: torch.from_numpy(value.copy()) for key, value in weights('parcae').items()}
  torch.save({'model': held, 'iter_num': 3} if form == 'ckpt.pt' else held, tmp_path / form)
  params = loopformer.load(tmp_path).params
  jax.tree.map(np.testing.assert_array_equal, params, from_official('parcae', weights('parcae'))[1])


def original():
  """A state dict of the original code of timestep encoding: one layer, and no list of layers."""
  sizes = reference.SIZES | {'k': 1}
  ours = reference.random_state_dict('tmlt', **sizes)
  theirs = dict(ours)
  for old, new in (('transformer.h.blocks.0.adaLN', 'adaLN'), ('transformer.h.blocks.0.', 'transformer.'),
                   ('time_embedder', 'timestep_embedder'), ('norm_f', 'ln_f')):
    theirs = {key.replace(old, new): value for key, value in theirs.items()}
  assert {'transformer.attn.c_attn.weight', 'adaLN_modulation.1.bias', 'timestep_embedder.mlp.2.bias',
          'transformer.ln_f.weight', 'transformer.mlp.c_proj.weight'} <= set(theirs)
  return theirs, ours


def test_the_original_timestep_encoded_model(tmp_path):
  """As its trainer saves it: heads and loops are told beside the weights."""
  torch = pytest.importorskip('torch')
  theirs, ours = original()
  torch.save({'model': {f'_orig_mod.{key}': torch.from_numpy(value) for key, value in theirs.items()},
              'model_args': {'n_head': 6, 'n_embd': 48}, 'config': {'n_loop': 7, 'model_type': 'tmlt'}},
              tmp_path / 'ckpt.pt')
  model, params, _, _ = loopformer.load(tmp_path / 'ckpt.pt', kind='tmlt')
  assert model.loops == 7 and model.cell.core.depth == 1
  wanted = reference.forward(ours, 'tmlt', TOKENS, (1 / 7,) * 7, 6)
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS), wanted, rtol=0, atol=2e-4)
  with pytest.raises(ConfigError, match='time_embedder.* is missing'):  # its baseline, whose values are not normed
    from_official('tmlt', {key: value for key, value in theirs.items() if 'timestep' not in key}, heads=6)


# What is not read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['ouro', 'nanbeige', 'huginn', 'parcae', 'base_loop', 'tmlt'])
def test_a_looped_configuration_is_never_that_of_a_plain_model(name, tmp_path):
  published(tmp_path, name, model_type='llama', architectures=['LlamaForCausalLM'], _class_name=None,
            architecture_class_name=None)
  field = {'ouro': 'total_ut_steps', 'nanbeige': 'num_loops', 'base_loop': 'max_model_loops', 'tmlt': 'n_loop'}.get(
      name, 'mean_recurrence')
  with pytest.raises(ConfigError, match=f'config.json: {field} = {LOOPS[name]}: its layers run several times'):
    loopformer.load(tmp_path)


REFUSED = [
    ('ouro', {'num_key_value_heads': 3}, 'num_key_value_heads = 3'),
    ('ouro', {'rope_theta': 1e4}, 'rope_theta = 10000'),
    ('ouro', {'early_exit_threshold': 0.5}, 'early_exit_threshold = 0.5: .*--exit=gate:THRESHOLD'),
    ('ouro', {'rope_scaling': {'factor': 2.0}}, 'rope_scaling = '),
    ('ouro', {'attention_bias': True}, 'attention_bias = True'), ('ouro', {'is_causal': False}, 'is_causal = False'),
    ('ouro', {'layer_types': ['sliding_attention']}, 'layer_types = '),
    ('ouro', {'total_ut_steps': 0}, 'total_ut_steps = 0'),
    ('ouro', {'total_ut_steps': None}, 'total_ut_steps is missing, and no shape'),
    ('ouro', {'num_attention_heads': None, 'num_key_value_heads': None}, 'heads is missing: no shape'),
    ('ouro', {'final_logit_softcapping': 30.0}, 'final_logit_softcapping = 30'),
    ('ouro', {'quantization_config': {'bits': 4}}, 'quantization_config = '),
    ('huginn', {'block_class_name': 'TransformerPreNormBlock'}, 'block_class_name = TransformerPreNormBlock'),
    ('huginn', {'tie_embeddings': False}, 'tie_embeddings = False'), ('huginn', {'qk_bias': False}, 'qk_bias = False'),
    ('huginn', {'init_values': {'embed_scale': 1.0}}, 'init_values.embed_scale = 1.0'),
    ('huginn', {'init_values': {'embed_scale': 6.9282, 'std': 0.02}}, 'init_values.std = 0.02'),
    ('huginn', {'rope_base': 1e4}, 'rope_base = 10000'),
    ('huginn', {'mean_recurrence': None}, 'mean_recurrence is missing'),
    ('parcae', {'injection_type': 'linear'}, 'injection_type = linear'),
    ('parcae', {'logit_softcap': 15.0}, 'logit_softcap = 15'),
    ('parcae', {'qk_norm': False}, 'qk_norm = False'), ('parcae', {'prelude_norm': False}, 'prelude_norm = False'),
    ('parcae', {'rope_settings': {'use_rope': False}}, 'rope_settings.use_rope = False'),
    ('loopformer', {'bias': True}, 'bias = True'), ('loopformer', {'n_head': None}, 'heads is missing: no shape'),
    ('tmlt', {'is_causal': False}, 'is_causal = False'), ('tmlt', {'n_loop': 2.5}, 'n_loop = 2.5'),
    # The weights are of another size.
    ('ouro', {'hidden_size': 64}, 'hidden_size = 64, and the weights show 48'),
    ('ouro', {'head_dim': 16}, 'head_dim = 16, and the weights show 8'),
    ('ouro', {'num_hidden_layers': 3}, 'num_hidden_layers = 3, and the weights show 2'),
    ('huginn', {'n_heads': 3}, 'n_heads = 3, and the weights show 6'),
    ('huginn', {'n_layers_in_recurrent_block': 2}, 'n_layers_in_recurrent_block = 2, and the weights show 1'),
    ('parcae', {'num_attention_heads': 3}, 'num_attention_heads = 3, and the weights show 6'),
    ('parcae', {'num_key_value_heads': 6}, 'num_key_value_heads = 6, and the weights show 3'),
    ('parcae', {'recurrent_embedding_dimension': 64}, 'recurrent_embedding_dimension = 64, and the weights show 48'),
    ('parcae', {'vocab_size': 64}, 'vocab_size = 64, and the weights show 50'),
    ('loopformer', {'n_layer': 3}, 'n_layer = 3, and the weights show 2'),
    ('loopformer', {'block_size': 32}, 'block_size = 32, and the weights show 16'),
    ('loopformer', {'n_embd': 'wide'}, "n_embd = 'wide': give an integer"),
]


@pytest.mark.parametrize('name, change, message', REFUSED, ids=[
    f'{name} {" ".join(change)}' for name, change, _ in REFUSED])
def test_a_setting_that_makes_another_model_is_refused_by_name(name, change, message, tmp_path):
  published(tmp_path, name, **change)
  with pytest.raises(ConfigError, match=message) as error:
    loopformer.load(tmp_path)
  assert '\n' not in str(error.value) and tmp_path.name in str(error.value) or 'heads is missing' in message


def test_another_kind_and_other_files_are_named(tmp_path):
  folder = published(tmp_path / 'ouro', 'ouro', files=2)
  with pytest.raises(ConfigError, match="kind = 'parcae': .*config.json is that of kind ouro; leave kind out"):
    loopformer.load(folder, kind='parcae')
  with pytest.raises(ConfigError, match='heads = 3: .*config.json says 6'):
    loopformer.load(folder, kind='ouro', heads=3)
  assert loopformer.load(folder, kind='ouro', loops=1).model.loops == 1
  shard = folder / 'model-00002-of-00002.safetensors'
  whole = shard.read_bytes()
  shard.write_bytes(whole[:-5])
  with pytest.raises(ConfigError, match='model-00002-of-00002.safetensors: .*cut off'):
    loopformer.load(folder)
  shard.unlink()
  with pytest.raises(ConfigError, match="names 'model-00002-of-00002.safetensors', which is not in the folder"):
    loopformer.load(folder)
  for path in folder.glob('model*'):
    path.unlink()
  with pytest.raises(ConfigError, match='ouro: no file of weights'):
    loopformer.load(folder)
  for name in ('a.npz', 'b.npz'):
    np.savez(folder / name, **weights('ouro'))
  with pytest.raises(ConfigError, match='ouro: 2 files of weights, a.npz among them'):
    loopformer.load(folder)
  (folder / 'config.json').write_text(json.dumps({'model_type': 'gemma'}))
  with pytest.raises(ConfigError, match='no model.safetensors'):
    loopformer.load(folder)


# Sizes ---------------------------------------------------------------------------------------------------------------

SHEETS = {  # fields of published configurations, and parameters counted by hand from them
    'TinyLlama-1.1B': (dict(model_type='llama', vocab_size=32_000, hidden_size=2048, intermediate_size=5632,
                            rms_norm_eps=1e-5,
                            num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4), 1_100_048_384),
    'Llama-2-7b': (dict(model_type='llama', vocab_size=32_000, hidden_size=4096, intermediate_size=11_008,
                        rms_norm_eps=1e-5,
                        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32), 6_738_415_616),
    'SmolLM2-135M': (dict(model_type='llama', vocab_size=49_152, hidden_size=576, intermediate_size=1536,
                          rms_norm_eps=1e-5,
                          num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000,
                          tie_word_embeddings=True), 134_515_008),
    'Llama-3.2-1B': (dict(model_type='llama', vocab_size=128_256, hidden_size=2048, intermediate_size=8192, head_dim=64,
                          num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
                          tie_word_embeddings=True, rope_scaling={
                              'rope_type': 'llama3', 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                              'original_max_position_embeddings': 8192}), 1_235_814_400),
    'Qwen2.5-0.5B': (dict(model_type='qwen2', vocab_size=151_936, hidden_size=896, intermediate_size=4864,
                          num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
                          use_sliding_window=False, sliding_window=32_768), 494_032_768),
    'Qwen3-0.6B': (dict(model_type='qwen3', vocab_size=151_936, hidden_size=1024, intermediate_size=3072, head_dim=128,
                        num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True,
                        attention_bias=False, use_sliding_window=False, sliding_window=None), 596_049_920),
    'OLMo-2-0425-1B': (dict(model_type='olmo2', vocab_size=100_352, hidden_size=2048, intermediate_size=8192,
                            num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=16, rope_theta=500_000,
                            attention_bias=False, tie_word_embeddings=False), 1_484_916_736),
    'Mistral-7B-v0.3': (dict(model_type='mistral', vocab_size=32_768, hidden_size=4096, intermediate_size=14_336,
                             num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None),
                        7_248_023_552),
    'Nanbeige4.2-3B': (dict(model_type='nanbeige', vocab_size=166_144, hidden_size=3072, intermediate_size=10_752,
                            num_hidden_layers=22, num_attention_heads=48, num_key_value_heads=8, head_dim=128,
                            kv_channels=128, num_loops=2, loop_loss_weights=[], skip_loop_final_norm=False),
                       4_169_800_704),
}


@pytest.mark.parametrize('name', SHEETS)
def test_published_sizes_have_the_parameters_of_their_sheets(name):
  config, count = SHEETS[name]
  v, d, f, n, h, g = (config[field] for field in ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers',
                                                  'num_attention_heads', 'num_key_value_heads'))
  head, kind = config.get('head_dim', d // h), config['model_type']
  extra = {'qwen2': (h + 2 * g) * head, 'qwen3': 2 * head, 'olmo2': (h + g) * head}.get(kind, 0)
  layer = 2 * d * (h + g) * head + 3 * d * f + 2 * d + extra
  assert count == n * layer + d + v * d * (1 if config.get('tie_word_embeddings') else 2)
  model = llama.model_of(llama.read_config({'hidden_act': 'silu', **config}, name))
  assert parameter_count(model) == count
  if kind == 'nanbeige':  # bytes a token of its cache in bfloat16: 2 loops, 22 layers, 8 heads of 128, keys and values
    wide = llama.model_of(llama.read_config(config, name), dtype='bfloat16')
    cache = jax.eval_shape(lambda: wide.cache(1, 16))['loop']
    assert sum(math.prod(leaf.shape) * 2 for leaf in (cache.k, cache.v)) == 16 * 180_224
