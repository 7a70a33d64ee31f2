"""LoRA adapters of PEFT, added to the weights of a decoder as it is read in."""
import json

import jax
import numpy as np
import pytest

import loopformer
from loopformer.convert import adapters, from_pretrained
from loopformer.types import ConfigError
from tests import llama_reference as reference
from tests.llama_reference import CONFIGS, D, F

save_file = pytest.importorskip('safetensors.numpy').save_file
CONFIG = CONFIGS['llama']
TOKENS = np.random.default_rng(3).integers(0, reference.V, (2, 9))
TARGETS = {'model.layers.1.self_attn.q_proj': (D, D), 'model.layers.0.mlp.down_proj': (D, F)}
RANK = 2


def written(folder, targets=TARGETS, rank=RANK, **fields):
  folder.mkdir()
  rng = np.random.default_rng(0)
  halves = {f'base_model.model.{name}.lora_{half}.weight': rng.standard_normal(shape).astype(np.float32)
            for name, (rows, columns) in targets.items()
            for half, shape in (('A', (rank, columns)), ('B', (rows, rank)))}
  save_file(halves, folder / adapters.NAME)
  about = {'peft_type': 'LORA', 'r': rank, 'lora_alpha': 6, 'base_model_name_or_path': 'some/llama',
           'bias': 'none'} | fields
  (folder / adapters.CONFIG).write_text(json.dumps(about))
  return halves


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  reference.save(folder, CONFIG, reference.weights(CONFIG), 1)
  return folder


@pytest.mark.parametrize('rs, scale', [(False, 6 / RANK), (True, 6 / RANK ** 0.5)])
def test_it_is_added_to_the_weights(rs, scale, base, tmp_path):
  halves = written(tmp_path / 'lora', use_rslora=rs, init_lora_weights='gaussian' if rs else True)
  weights = dict(reference.weights(CONFIG))
  for name in TARGETS:
    a, b = (halves[f'base_model.model.{name}.lora_{half}.weight'] for half in 'AB')
    weights[f'{name}.weight'] = weights[f'{name}.weight'] + scale * b @ a
  model, params, _ = from_pretrained(base, adapter=tmp_path / 'lora')
  expected = reference.logits(weights, CONFIG, TOKENS)
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS), expected, rtol=0, atol=1e-3)
  assert np.abs(expected - reference.logits(reference.weights(CONFIG), CONFIG, TOKENS)).max() > 0.1


def test_peft_computes_the_same(base, tmp_path):
  torch, peft, transformers = (pytest.importorskip(name) for name in ('torch', 'peft', 'transformers'))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
  theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, target_modules='all-linear', init_lora_weights=False))
  theirs.save_pretrained(tmp_path / 'lora')
  model, params, _ = from_pretrained(base, adapter=tmp_path / 'lora')
  with torch.no_grad():
    expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize('options, message', [
    ({'targets': {'model.layers.9.mlp.down_proj': (D, F)}},
     r"it is for another model: .* for 'model\.layers\.9\.mlp\.down_proj\.weight', which is not there .*some/llama"),
    ({'targets': {'model.layers.1.self_attn.q_proj': (D, 2 * D)}},
     r'it is for another model: .*which is \(32, 32\) here'),
    ({'r': 5}, r'it is for another model: .* of rank 5'), ({'r': 'x'}, "r = 'x'"),
    ({'lora_alpha': None}, 'lora_alpha = None'),
    ({'use_dora': True}, r'use_dora = True: it is read as False alone; merge the adapter with PEFT'),
    ({'init_lora_weights': 'pissa_niter_4'},
     "init_lora_weights = 'pissa_niter_4': the adapter is of weights that were changed"),
    ({'init_lora_weights': 'olora'}, "'olora'"), ({'layer_replication': [[0, 2], [1, 2]]}, 'layer_replication'),
    ({'alora_invocation_tokens': [3, 4]}, r'alora_invocation_tokens = \[3, 4\]: it is read as None alone'),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'), ({'peft_type': 'IA3'}, "peft_type = 'IA3'")])
def test_an_adapter_that_does_not_fit(options, message, base, tmp_path):
  written(tmp_path / 'lora', **options)
  with pytest.raises(ConfigError, match=message) as caught:
    from_pretrained(base, adapter=tmp_path / 'lora')
  assert '\n' not in str(caught.value)


def test_an_adapter_that_is_none(base, tmp_path):
  written(tmp_path / 'lora')
  save_file({'base_model.model.model.embed_tokens.weight': np.zeros((2, 2), np.float32)},
            tmp_path / 'lora' / adapters.NAME)
  for folder, message in ((base, 'adapter_config.json: there is no such file; give the folder of a LoRA adapter'),
                          (tmp_path / 'lora', 'is none of a plain LoRA')):
    with pytest.raises(ConfigError, match=message):
      from_pretrained(base, adapter=folder)
  (tmp_path / 'lora' / adapters.NAME).unlink()
  with pytest.raises(ConfigError, match='there is no adapter_model.safetensors'):
    from_pretrained(base, adapter=tmp_path / 'lora')
  with pytest.raises(ConfigError, match='tensors of a .gguf file have other names'):
    from_pretrained('x.gguf', adapter=tmp_path / 'lora')


def test_a_folder_of_an_adapter_says_so(base, tmp_path):
  written(tmp_path / 'lora')
  with pytest.raises(ConfigError,
                     match='lora: it holds an adapter and no model; give the folder of the model .* adapter='):
    loopformer.load(tmp_path / 'lora')
  written(tmp_path / 'both')
  for path in base.iterdir():
    (tmp_path / 'both' / path.name).write_bytes(path.read_bytes())
  with pytest.raises(ConfigError,
                     match='both: it holds an adapter beside the model .* or take adapter_config.json away'):
    from_pretrained(tmp_path / 'both')
  same = (from_pretrained(tmp_path / 'both', adapter=tmp_path / 'both')[1],
          from_pretrained(base, adapter=tmp_path / 'lora')[1])
  jax.tree.map(np.testing.assert_array_equal, *same)
