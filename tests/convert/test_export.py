"""Exports: what comes back, what transformers and a NumPy Llama make of it, and what a failure leaves behind."""
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import loopformer
from loopformer import config as configs
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Plain
from loopformer.convert import description, export, from_pretrained, tensors
from loopformer.data.tokenizer import ByteTokenizer, GivenJson, JsonTokenizer, TrainedPieces, load_tokenizer
from loopformer.memories import First
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, PostNorm
from loopformer.nn.embed import Head, TiedHead, Tokens, Vectors
from loopformer.nn.inject import NoInjection
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import AcrossHeads, GatedMLP, RMSNorm
from loopformer.nn.low_rank import adapted
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.tasks.generated import SymbolTokenizer
from loopformer.training.checkpoint import Checkpoints
from loopformer.types import ConfigError
from tests import llama_reference as reference, parts
from tests.llama_reference import D, F, G, H, T, V

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(3).integers(0, V, (3, 11))
needs_transformers = pytest.mark.skipif(
    not (importlib.util.find_spec('transformers') and importlib.util.find_spec('torch')), reason='needs transformers')


def stack(depth: int, *, normed=False, biased=(), groups=G, order=None, head=None) -> Stack:
  options = dict(heads=H, groups=groups, head=head, position=Rotary(base=50.0))
  attn = SelfAttention(**options, biased=biased, norm=RMSNorm(1e-2) if normed else None)
  return Stack(Block(attn=attn, mlp=GatedMLP(hidden=F), norm=RMSNorm(1e-2)), depth, order=order)


def olmo2(depth: int) -> Stack:
  attn = SelfAttention(heads=H, groups=G, position=Rotary(base=50.0), norm=AcrossHeads(RMSNorm(1e-2)))
  return Stack(Block(attn=attn, mlp=GatedMLP(hidden=F), norm=RMSNorm(1e-2), placement=PostNorm()), depth)


def looped(core: Stack, *, tied=True, **options) -> Looped:
  head = TiedHead(RMSNorm(1e-2)) if tied else Head(outputs=V, norm=RMSNorm(1e-2))
  return Looped(**{'read_in': Tokens(vocab=V, width=D, length=T), 'cell': Plain(core), 'read_out': head, 'loops': 3,
                   **options})


# Loops whose steps are all alike, and the layers that run, by number of the unlike ones.
DECODERS = {
    'llama': (looped(stack(2)), 'llama', [0, 1] * 3),
    'untied': (looped(stack(1), tied=False), 'llama', [0] * 3),
    'ungrouped': (looped(stack(2, groups=None), loops=1), 'llama', [0, 1]),
    'ends': (looped(stack(2), prelude=stack(1), coda=stack(2)), 'llama', [0, 1, 2, 1, 2, 1, 2, 3, 4]),
    'ordered': (looped(stack(2, order=(1, 1, 0)), loops=2), 'llama', [1, 1, 0] * 2),
    'biased': (looped(stack(2, biased=('q', 'k', 'v', 'out'))), 'llama', [0, 1] * 3),
    'qwen2': (looped(stack(2, biased=('q', 'k', 'v'))), 'qwen2', [0, 1] * 3),
    'qwen3': (looped(stack(2, normed=True), tied=False), 'qwen3', [0, 1] * 3),
    'qwen3_wide': (looped(stack(1, normed=True, head=16)), 'qwen3', [0] * 3),
    'wide': (looped(stack(1, head=12), prelude=stack(1, head=12)), 'llama', [0, 1, 1, 1]),
    'same_head': (looped(stack(1, head=D // H)), 'llama', [0] * 3),
    'olmo2': (looped(olmo2(2), tied=False, loops=2), 'olmo2', [0, 1] * 2),
}


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def loaded(folder):
  """(config, tensors) of an export, read without our code."""
  held = {}
  for path in sorted(folder.glob('*.safetensors')):
    held |= load_file(path)
  return json.loads((folder / 'config.json').read_text()), held


# Decoders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', DECODERS)
def test_a_plain_loop_is_an_unrolled_decoder(name, tmp_path):
  model, kind, order = DECODERS[name]
  params = parts.params(model)
  done = export(model, params, None, tmp_path / 'out')
  assert (done.model_type, done.reason) == (kind, '')
  config, held = loaded(tmp_path / 'out')
  assert config['num_hidden_layers'] == len(order) and not (tmp_path / 'out/modeling_loopformer.py').exists()
  expected = loopformer.logits(model, params, TOKENS)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(reference.logits(held, config, TOKENS), expected, rtol=0, atol=2e-4)
  for i, layer in enumerate(order):  # equal layers have equal weights
    first = order.index(layer)
    for part in ('self_attn.q_proj.weight', 'mlp.down_proj.weight', 'post_attention_layernorm.weight'):
      np.testing.assert_array_equal(held[f'model.layers.{i}.{part}'], held[f'model.layers.{first}.{part}'])


@pytest.mark.parametrize('name', DECODERS)
def test_an_unrolled_decoder_comes_back_bit_for_bit(name, tmp_path):
  model, _, order = DECODERS[name]
  params = parts.params(model)
  export(model, params, None, tmp_path / 'out')
  back, weights, _ = from_pretrained(tmp_path / 'out')
  assert back.loops == 1 and back.cell.core.depth == len(order)
  flat = [params[stack]['block'] if stack in ('prelude', 'coda') else params['cell']['core']['block']
          for stack in ('prelude', 'cell', 'coda') if stack in params]
  layers = jax.tree.map(lambda *leaves: np.concatenate(leaves), *flat)
  same(weights['cell']['core']['block'], jax.tree.map(lambda leaf: leaf[np.array(order)], layers))
  for name in ('read_in', 'read_out'):
    same(weights[name], params[name])
  export(back, weights, None, tmp_path / 'again')
  for path in (tmp_path / 'out').iterdir():
    assert path.read_bytes() == (tmp_path / 'again' / path.name).read_bytes(), path.name


CHANGES = {  # of a decoder; each is a function that no decoder of transformers has
    'positions': (looped(stack(1), read_in=parts.TokenEmbed(vocab=V, width=D, length=T)), 'read_in'),
    'scaled input': (looped(stack(1), read_in=Tokens(vocab=V, width=D, length=T, scale=2.0)), 'read_in.scale'),
    'norm of the stack': (looped(stack(1).clone(norm=RMSNorm())), 'cell.core.norm'),
    'another epsilon': (looped(stack(1), read_out=TiedHead(RMSNorm(1e-3))), 'eps'),
    'another prelude': (looped(stack(1), prelude=stack(1, groups=H)), 'prelude.block.attn.groups'),
    'one norm of q and k': (looped(stack(1).clone(block=stack(1).block.clone(
        attn=SelfAttention(heads=H, position=Rotary(), norm_qk=RMSNorm())))), 'norm_qk'),
    'norms and biases': (looped(stack(1, normed=True, biased=('q', 'k', 'v'))), 'biased'),
    'some biases': (looped(stack(1, biased=('q',))), 'biased'),
    'no positions of attention': (looped(stack(1).clone(block=stack(1).block.clone(attn=SelfAttention(heads=H)))),
                                  'attn.position = None, not loopformer.nn.positions.Rotary'),
    'zeros': (looped(stack(1), start=parts.Zeros()), 'start'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_other_functions_are_exported_under_our_own_names_and_say_why(change, tmp_path):
  model, word = CHANGES[change]
  params = parts.params(model)
  done = export(model, params, None, tmp_path / 'out')
  assert done.model_type == 'loopformer' and word in done.reason
  back, weights, _ = from_pretrained(tmp_path / 'out')
  assert back == model
  same(weights, params)


# Our own names -------------------------------------------------------------------------------------------------------

REFUSED = {'mor': 'Routed', 'mor_token': 'Routed', 'plt': 'Shifted', 'plt_hidden': 'Shifted', 'melt': 'Gated'}
# What is no other model to PyTorch is left out: kernels, rematerialisation.
SAME = ('fused', 'blocks_of_3', 'keep_all', 'per_layer', 'base_loop')
MODELS = {name: row.model for name, row in parts.ROWS.items() if name not in (*REFUSED, *SAME)}
MODELS['from_zeros'] = parts.ROWS['huginn'].model.clone(start=parts.Zeros())
# more loops than updates
MODELS['each'] = adapted(parts.looped(parts.timed(), loops=2), 3, each=True).clone(loops=parts.L)
MODELS['damped selective'] = parts.ROWS['loopus'].model.clone(cell=Damped(parts.ROWS['loopus'].model.cell, 0.25))
MODELS['gated'] = parts.looped(Damped(Halting(parts.timed()), 0.25))
MODELS['diagonal'] = parts.looped(parts.recur(parts.Diagonal()), bridge=parts.Linear(parts.D), start=parts.Zeros())


@pytest.mark.parametrize('name', MODELS)
def test_every_model_comes_back_bit_for_bit(name, tmp_path):
  model = MODELS[name]
  params = parts.params(model)
  export(model, params, None, tmp_path / 'out')
  back, weights, tokenizer = from_pretrained(tmp_path / 'out')
  assert back == model and tokenizer is None
  same(weights, params)
  assert from_pretrained(tmp_path / 'out', loops=7)[0] == model.clone(loops=7)


@pytest.mark.parametrize('name', REFUSED)
def test_what_the_modeling_code_does_not_compute_is_refused_by_name(name, tmp_path):
  model = parts.ROWS[name].model
  with pytest.raises(ConfigError,
                     match=f'= {REFUSED[name]}: it cannot be exported.*--mode=harness.* or train one with Plain or '):
    export(model, parts.params(model), None, tmp_path / 'out')
  assert not list(tmp_path.iterdir())


INSTEAD = [  # what stands in the way, what to do instead
    (parts.looped(parts.plain(), read_in=Vectors(inputs=3, width=parts.D, length=9), read_out=Head(outputs=2)),
     r'model\.read_in = Vectors: .*reads tokens; evaluate this one here \(--mode=eval\)$'),
    (parts.looped(parts.plain(kernel=Bidirectional())),
     r'attn\.kernel = Bidirectional: .*none after them; .*--mode=eval.*--mode=generate\)$'),
    (looped(stack(1), memory=First()), 'memory = First: .*--mode=generate.*, or train one with PerLoop there$'),
    (parts.looped(parts.plain(), coda=Stack(parts.ROWS['plt'].model.cell.core.block, 1)),
     r'coda\.block = GatedBlock: .*, or train one with Block or Chain there$')]


@pytest.mark.parametrize('model, words', INSTEAD, ids=['vectors', 'bidirectional', 'memory', 'block'])
def test_what_is_refused_says_what_to_do_instead(model, words):
  with pytest.raises(ConfigError, match=words):
    description.encode(model)


def test_names_in_a_file_are_looked_up_and_never_imported(tmp_path):
  model = parts.ROWS['loopformer'].model
  export(model, parts.params(model), None, tmp_path / 'out')
  path = tmp_path / 'out/config.json'
  config = json.loads(path.read_text())
  config['description']['start'] = {'part': 'os.system', 'command': 'false'}
  path.write_text(json.dumps(config))
  with pytest.raises(ConfigError, match="names 'os.system'"):
    from_pretrained(tmp_path / 'out')
  del config['description']
  path.write_text(json.dumps(config))
  with pytest.raises(ConfigError, match='description is missing'):
    from_pretrained(tmp_path / 'out')


def before(value):
  """A description as versions wrote it in which layers and attentions with other norms were classes of their own."""
  if isinstance(value, list):
    return [before(item) for item in value]
  if not isinstance(value, dict):
    return value
  old = {name: before(field) for name, field in value.items() if name not in ('sampler', 'placement')}
  if value.get('part') == 'loopformer.NoInjection':
    old['part'] = 'loopformer.Hold'
  if value.get('placement', {}).get('part') == 'loopformer.SandwichNorm':
    old['part'] = 'loopformer.Sandwich'
  elif value.get('part') == 'loopformer.SelfAttention':
    normed = old.pop('norm') is not None
    if normed:
      old = {name: field for name, field in old.items() if name not in ('norm_qk', 'biased', 'values', 'init',
                                                                        'out_init')}
      old |= {'part': 'loopformer.NormedAttention', 'norm': before(value['norm'])}
  return old


@pytest.mark.parametrize('model', [looped(Stack(parts.sandwich(), 2)), looped(stack(2, normed=True)),
                                   looped(stack(1)).clone(cell=parts.recur(NoInjection()))],
                         ids=['sandwich', 'normed', 'held'])
def test_parts_of_older_exports_are_found(model):
  old = before(description.encode(model))
  assert any(f'loopformer.{name}"' in json.dumps(old) for name in ('Sandwich', 'NormedAttention', 'Hold'))
  assert description.decode({'description': old}, 'config.json') == model


def test_an_export_of_ours_is_not_cut_again(tmp_path):
  model = parts.ROWS['loopformer'].model
  export(model, parts.params(model), None, tmp_path / 'out')
  with pytest.raises(ConfigError, match='prelude = 1'):
    from_pretrained(tmp_path / 'out', prelude=1)


@needs_transformers
@pytest.mark.parametrize('name', MODELS)
def test_transformers_computes_every_model_at_every_budget(name, tmp_path, monkeypatch):
  import torch
  model = MODELS[name]
  params = parts.params(model)
  export(model, params, None, tmp_path / 'out')
  other = by_transformers(tmp_path / 'out', monkeypatch, tmp_path)
  tokens = np.random.default_rng(0).integers(0, parts.V, (2, parts.T))
  told = isinstance(getattr(within(model.cell), 'condition', None), parts.Trajectory)  # of the sizes of steps
  for steps in (1, 3, *[parts.UNEVEN] * told, None) if model.loops > 1 else (1, None):
    expected = loopformer.logits(in_float32(model), params, tokens, steps=steps)
    with torch.no_grad():
      given = other(torch.tensor(tokens), steps=steps, use_cache=False).logits
      cache, pieces = None, []
      for piece in torch.tensor(tokens).split([4, 1, parts.T - 5], 1):
        out = other(piece, steps=steps, cache=cache)
        cache, pieces = out.past_key_values, [*pieces, out.logits]
    np.testing.assert_allclose(given.numpy(), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(torch.cat(pieces, 1).numpy(), given.numpy(), rtol=0, atol=1e-5)


@needs_transformers
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_slopes_know_distances_alone(dtype, tmp_path, monkeypatch):
  """Places are kept in two channels of a key, multiples of 256 and the rest: a text that begins late is the same text.
  """
  import torch
  model = MODELS['alibi']
  export(model, parts.params(model), None, tmp_path / 'out', dtype=dtype)
  other = by_transformers(tmp_path / 'out', monkeypatch, tmp_path).to(getattr(torch, dtype))
  tokens, late = torch.tensor(TOKENS[:, :8] % parts.V), torch.arange(252, 260)[None]
  with torch.no_grad():
    expected, given = other(tokens).logits, other(tokens, position_ids=late).logits
    cache = other(tokens[:, :3], position_ids=late[:, :3]).past_key_values
    rest = other(tokens[:, 3:], position_ids=late[:, 3:], past_key_values=cache).logits
    nowhere = other(tokens, position_ids=0 * late, attention_mask=torch.ones_like(tokens)).logits
  torch.testing.assert_close(given, expected, rtol=0, atol=1e-4 if dtype == 'float32' else 0.1)
  torch.testing.assert_close(rest, given[:, 3:], rtol=0, atol=1e-4 if dtype == 'float32' else 0.1)
  assert (nowhere - expected).abs().max() > 0.2


@needs_transformers
@pytest.mark.parametrize('name', ['loopformer', 'parcae', 'each'])
def test_weights_in_eight_bits_compute_nearly_the_same(name, tmp_path, monkeypatch):
  """What takes a product's place is told no step."""
  pytest.importorskip('torchao', reason='quantises for transformers')
  import torch
  from torchao.quantization import Int8WeightOnlyConfig
  import transformers
  model = MODELS[name]
  export(model, parts.params(model), None, tmp_path / 'out')
  whole = by_transformers(tmp_path / 'out', monkeypatch, tmp_path)
  small = by_transformers(tmp_path / 'out', monkeypatch, tmp_path,
                          quantization_config=transformers.TorchAoConfig(Int8WeightOnlyConfig()))
  kinds = {type(module.weight).__name__ for module in small.modules() if isinstance(module, torch.nn.Linear)}
  assert 'Int8Tensor' in kinds
  tokens = torch.tensor(TOKENS[:, :8] % parts.V)
  with torch.no_grad():
    expected, given = whole(tokens, steps=2).logits, small(tokens, steps=2).logits
  assert 0 < (given - expected).abs().max() / expected.abs().max() < 0.06
  assert small.generate(tokens, steps=2, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] == 11


@needs_transformers
@pytest.mark.parametrize('name', DECODERS)
def test_transformers_computes_every_decoder(name, tmp_path, monkeypatch):
  import torch
  model = DECODERS[name][0]
  params = parts.params(model)
  export(model, params, None, tmp_path / 'out')
  other = by_transformers(tmp_path / 'out', monkeypatch, tmp_path)
  assert 'loopformer' not in type(other).__module__
  with torch.no_grad():
    given = other(torch.tensor(TOKENS)).logits.numpy()
  np.testing.assert_allclose(given, loopformer.logits(model, params, TOKENS), rtol=0, atol=1e-4)


@needs_transformers
def test_transformers_generates_from_padded_prompts_what_we_generate(tmp_path, monkeypatch):
  import torch
  model = parts.ROWS['loopformer'].model.clone(read_in=parts.TokenEmbed(vocab=257, width=parts.D, length=64))
  params, tokenizer = parts.params(model), ByteTokenizer()
  export(model, params, tokenizer, tmp_path / 'out')
  prompts = ['one two', 'three']
  expected = loopformer.generate(model, params, tokenizer, prompts, budget=3, max_new_tokens=6, temperature=0)
  import transformers
  other = by_transformers(tmp_path / 'out', monkeypatch, tmp_path)
  own = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', padding_side='left', pad_token='<|endoftext|>')
  batch = own(prompts, return_tensors='pt', padding=True)
  assert batch.attention_mask.min() == 0
  out = other.generate(batch.input_ids, attention_mask=batch.attention_mask, steps=3, max_new_tokens=6,
                       do_sample=False, pad_token_id=256)
  width = batch.input_ids.shape[1]
  assert [own.decode(row[width:], skip_special_tokens=True) for row in out] == expected
  loss = other(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]]), steps=2).loss
  nll = reference.mean_nll(loopformer.logits(model, params, np.array([[1, 2, 3]]), steps=2), np.array([[1, 2, 3]]))
  assert abs(float(loss.detach()) - nll) < 1e-5


def within(cell):
  return within(cell.of) if isinstance(cell, (Damped, Halting)) else cell


@needs_transformers
def test_what_needs_tokens_says_so(tmp_path, monkeypatch):
  """A model whose layers read tokens again takes no embeddings in their place, and keeps its vocabulary."""
  model = MODELS['parcae']
  export(model, parts.params(model), None, tmp_path / 'out')
  other = by_transformers(tmp_path / 'out', monkeypatch, tmp_path)
  import torch
  with pytest.raises(ValueError, match='inputs_embeds: .* give input_ids'):
    other(inputs_embeds=torch.zeros(1, 2, parts.D))
  with pytest.raises(ValueError, match='resize_token_embeddings'):
    other.resize_token_embeddings(parts.V + 1)


def by_transformers(folder, monkeypatch, cache, **options):
  import torch
  import transformers
  from transformers import dynamic_module_utils
  monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(cache / 'modules'))
  monkeypatch.setattr(sys, 'path', list(sys.path))
  return transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, trust_remote_code=True, **options).eval()


def in_float32(model):
  from experiments.tools.export import in_float32
  return in_float32(model)


# Files ---------------------------------------------------------------------------------------------------------------

MODEL = parts.ROWS['loopformer'].model


def test_large_models_are_written_in_several_files(tmp_path):
  params = parts.params(MODEL)
  export(MODEL, params, None, tmp_path / 'one')
  export(MODEL, params, None, tmp_path / 'some', shard_bytes=20_000)
  files = sorted(path.name for path in (tmp_path / 'some').glob('*.safetensors'))
  assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05}.safetensors'
  one, some = loaded(tmp_path / 'one')[1], loaded(tmp_path / 'some')[1]
  assert one.keys() == some.keys() and all(np.array_equal(one[name], some[name]) for name in one)
  index = json.loads((tmp_path / 'some/model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == one.keys()
  assert index['metadata']['total_size'] == sum(array.nbytes for array in one.values())
  for file in files:
    held = load_file(tmp_path / 'some' / file)
    assert sum(array.nbytes for array in held.values()) <= 20_000 or len(held) == 1
  same(from_pretrained(tmp_path / 'some')[1], params)


def test_an_export_keeps_the_dtype_of_its_products(tmp_path):
  export(MODEL, parts.params(MODEL), None, tmp_path / 'out')
  assert MODEL.dtype == 'float32' and from_pretrained(tmp_path / 'out', dtype='float32')[0] == MODEL
  with pytest.raises(ConfigError, match="dtype = 'bfloat16': it is an export of a model whose products are in float32"):
    from_pretrained(tmp_path / 'out', dtype='bfloat16')


@pytest.mark.parametrize('model', [MODEL, DECODERS['llama'][0]])
def test_bfloat16_is_the_nearest_one(model, tmp_path):
  params = parts.params(model)
  export(model, params, None, tmp_path / 'out', dtype='bfloat16')
  config, held = loaded(tmp_path / 'out')
  assert config['dtype'] == 'bfloat16' and {array.dtype for array in held.values()} == {np.dtype(ml_dtypes.bfloat16)}
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
  export(model, rounded, None, tmp_path / 'wide')
  same(from_pretrained(tmp_path / 'out')[1], from_pretrained(tmp_path / 'wide')[1])


def test_one_tensor_is_held_at_a_time(tmp_path):
  live, most = [0], [0]

  def made():
    live[0] += 1
    most[0] = max(most[0], live[0])
    array = np.zeros(4, np.float32).view(Counted)
    array.live = live
    return array

  tensors.write_folder(tmp_path, {f'w{i}': ((4,), made) for i in range(5)}, 'float32', 100)
  assert most[0] <= 2 and len(load_file(tmp_path / 'model.safetensors')) == 5


class Counted(np.ndarray):
  """An array that tells when it is let go."""
  live = None

  def __del__(self):
    if self.live is not None:
      self.live[0] -= 1


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(*_):
  raise OSError('disk full')


def fails_at_the_end(path, target):
  """Path.rename that fails where the complete new folder takes its place."""
  if path.name.startswith('.') and not path.name.endswith('.old'):
    fails()
  return os.rename(path, target)


STAGES = {'tensors': (tensors.os, 'fsync', fails), 'rename': (Path, 'rename', fails_at_the_end),
          'configuration': (sys.modules['loopformer.convert.export'], '_json', fails)}


@pytest.mark.parametrize('stage', STAGES)
def test_a_failing_export_leaves_the_earlier_one(stage, tmp_path, monkeypatch):
  out, params = tmp_path / 'out', parts.params(MODEL)

  def failing_export():
    with monkeypatch.context() as patch:
      patch.setattr(*STAGES[stage])
      with pytest.raises(OSError, match='disk full'):
        export(MODEL, params, None, out)

  failing_export()
  assert not list(tmp_path.iterdir()), 'nothing is left where nothing was'
  export(MODEL, params, None, out)
  before = contents(out)
  failing_export()
  assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ['out']


def test_an_earlier_export_is_replaced_whole(tmp_path):
  out = tmp_path / 'out'
  export(MODEL, parts.params(MODEL), None, out, shard_bytes=20_000)
  other = DECODERS['llama'][0]
  export(other, parts.params(other), None, out)
  assert sorted(contents(out)) == ['config.json', 'generation_config.json', 'model.safetensors']
  assert [path.name for path in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('name, text', [('notes.txt', 'mine'), ('config.json', '{"$part": "a run"}'),
                                        ('model.safetensors', "another's")])
def test_other_files_are_never_replaced(name, text, tmp_path):
  (tmp_path / name).write_text(text)
  with pytest.raises(ConfigError, match=f'it holds {name!r} and is no earlier export'):
    export(MODEL, parts.params(MODEL), None, tmp_path)
  assert contents(tmp_path) == {name: text.encode()}


@pytest.mark.parametrize('options, words', [({'dtype': 'float16'}, "dtype = 'float16'"),
                                            ({'shard_bytes': 0}, 'shard_bytes = 0')])
def test_wrong_arguments_are_named(options, words, tmp_path):
  with pytest.raises(ConfigError, match=words):
    export(MODEL, parts.params(MODEL), None, tmp_path / 'out', **options)


def test_parameters_of_another_model_are_named(tmp_path):
  with pytest.raises(ConfigError, match="tensor 'cell/.*expected with shape"):
    export(MODEL, parts.params(DECODERS['llama'][0]), None, tmp_path / 'out')


# Tokenizers ----------------------------------------------------------------------------------------------------------

TEXTS = ['def loop(steps):\n    return steps + 120\n', 'the loop returns to the loop, and the steps\n\n  go on. é漢']


def tokenizer_of(kind):
  if kind == 'bytes':
    return ByteTokenizer()
  pieces = TrainedPieces(vocab=320).build(TEXTS * 9)
  return pieces if kind == 'pieces' else JsonTokenizer(text=pieces.hugging_face(), eos=pieces.eos)


@pytest.mark.parametrize('kind', ['bytes', 'pieces', 'json'])
def test_tokenizers_come_back(kind, tmp_path):
  tokenizer = tokenizer_of(kind)
  done = export(MODEL, parts.params(MODEL), tokenizer, tmp_path / 'out')
  back = from_pretrained(tmp_path / 'out')[2]
  assert done.tokenizer and type(back) is type(tokenizer) and back.fingerprint() == tokenizer.fingerprint()
  assert loaded(tmp_path / 'out')[0]['eos_token_id'] == tokenizer.eos


@pytest.mark.parametrize('kind', ['bytes', 'pieces'])
def test_tokenizers_of_hugging_face_give_the_same_ids(kind):
  pytest.importorskip('tokenizers')
  tokenizer = tokenizer_of(kind)
  other = JsonTokenizer(text=tokenizer.hugging_face(), eos=tokenizer.eos)
  rng = np.random.default_rng(0)
  texts = [*TEXTS, '', '  \n\n x ', '\x00\t\U0001f600', *(''.join(rng.choice([*' \n-le12é', 'loop', 'the'], 20))
                                                         for _ in range(200))]
  assert other.encode_batch(texts) == tokenizer.encode_batch(texts)
  assert [other.decode(ids) for ids in other.encode_batch(texts)] == texts
  assert other.vocab_size == tokenizer.vocab_size
  np.testing.assert_array_equal(other.byte_lengths(), tokenizer.byte_lengths())


def test_a_tokenizer_json_is_saved_loaded_and_given(tmp_path):
  tokenizer = tokenizer_of('json')
  tokenizer.save(tmp_path / 'saved')
  back = load_tokenizer(tmp_path / 'saved')
  assert back == tokenizer and back.fingerprint() == tokenizer.fingerprint()
  path = tmp_path / 'tokenizer.json'
  path.write_text(tokenizer.text, encoding='utf-8')
  part = GivenJson(path=str(path), eos='</s>')
  assert part.build(()) == tokenizer and part.sources()[0][1] == path.stat().st_size
  with pytest.raises(ValueError, match="no token '<end>'; its added tokens are '<unk>', '</s>'"):
    GivenJson(path=str(path), eos='<end>').build(())
  with pytest.raises(FileNotFoundError, match='absent'):
    GivenJson(path='absent', eos='</s>').build(())
  with pytest.raises(ValueError, match='eos=320'):
    JsonTokenizer(text=tokenizer.text, eos=320)
  (tmp_path / 'saved/hugging_face.json').write_text(tokenizer.text + ' ', encoding='utf-8')
  with pytest.raises(ValueError, match='fingerprint'):
    load_tokenizer(tmp_path / 'saved')


def test_end_of_a_text_comes_from_the_configuration_files(tmp_path):
  reference.save(tmp_path, reference.CONFIGS['llama'], reference.weights(reference.CONFIGS['llama']))
  text = tokenizer_of('json').text
  (tmp_path / 'tokenizer.json').write_text(text, encoding='utf-8')
  assert from_pretrained(tmp_path)[2] == JsonTokenizer(text=text, eos=5)
  for name in ('</s>', {'content': '</s>'}):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': name}))
    found = from_pretrained(tmp_path)[2]  # texts end with the named one; what is generated, at that of config.json too
    assert found.of == JsonTokenizer(text=text, eos=1) and found.ends == (1, 5)
  (tmp_path / 'tokenizer_config.json').unlink()
  config = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | {'eos_token_id': None}))
  with pytest.raises(ConfigError, match='neither eos_token'):
    from_pretrained(tmp_path)


def test_symbols_have_no_counterpart(tmp_path):
  done = export(MODEL, parts.params(MODEL), SymbolTokenizer(('a', 'b', '.')), tmp_path / 'out')
  assert not done.tokenizer and from_pretrained(tmp_path / 'out')[2] is None


@needs_transformers
@pytest.mark.parametrize('kind', ['bytes', 'pieces', 'json'])
def test_transformers_reads_the_tokenizer(kind, tmp_path):
  import transformers
  tokenizer = tokenizer_of(kind)
  export(MODEL, parts.params(MODEL), tokenizer, tmp_path / 'out')
  other = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert other.eos_token_id == tokenizer.eos
  for text in TEXTS:
    assert other.encode(text) == tokenizer.encode(text) and other.decode(other.encode(text)) == text


# Command line --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A run with a checkpoint, that nothing was trained for."""
  from experiments.configs import loopformer as paper
  folder = tmp_path_factory.mktemp('runs') / 'run'
  config = paper.get_config('tiny,loops=4')
  for change in ('model.read_in.vocab=300', 'model.read_in.length=64', 'model.cell.core.depth=1',
                 'model.cell.modulation.layers=1', 'task.length=32'):
    config = configs.override(config, change)
  configs.save(config, folder)
  ByteTokenizer().save(folder / 'data/tokenizer')
  params = jax.tree.map(lambda leaf: leaf / 4, parts.params(config.model))  # logits of single digits
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, params, {'count': np.zeros(1)}, {}, {})
  return folder


def run(*arguments):
  done = subprocess.run([sys.executable, '-m', 'experiments.tools.export', *arguments], cwd=ROOT, capture_output=True,
                        text=True, timeout=300, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_command_line_exports_and_compares(dtype, workdir, tmp_path, monkeypatch):
  monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
  status, out, err = run(f'--workdir={workdir}', f'--out={tmp_path}/out', f'--dtype={dtype}', '--check')
  assert status == 0, err
  assert 'as loopformer (no decoder of transformers: ' in out and 'with tokenizer.json' in out
  assert float(out.split('largest difference of logits: ')[1].split(',')[0]) < 1e-4
  _, params, tokenizer = from_pretrained(tmp_path / 'out')
  assert isinstance(tokenizer, ByteTokenizer)
  same(params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), loopformer.load(workdir)[1]))


def test_logits_of_other_parameters_differ(workdir, tmp_path):
  from experiments.tools import export as command
  model, params, _, _ = loopformer.load(workdir)
  export(model, params, None, tmp_path / 'out')
  near = command.largest_difference(model, params, tmp_path / 'out', 'float32')[0]
  shifted = jax.tree.map(lambda leaf: leaf * 1.01, params)
  assert near < 1e-4 < command.largest_difference(model, shifted, tmp_path / 'out', 'float32')[0]


def test_an_export_of_more_loops_than_can_run_is_refused(monkeypatch, tmp_path):
  from experiments.tools import export as command
  monkeypatch.setattr(command, 'FLAGS', SimpleNamespace(loops=99_999_999))
  with pytest.raises(ConfigError, match='--loops = 99999999: .* 1 to 10000'):
    command.run(tmp_path, tmp_path / 'out')


def test_command_line_fails_where_logits_differ_by_more_than_allowed(workdir, tmp_path):
  code = 'from experiments.tools import export as e; e.TOLERANCE = -1.0; e.define_flags(); e.command.run(e.main)'
  done = subprocess.run([sys.executable, '-c', code, f'--workdir={workdir}', f'--out={tmp_path}/out', '--check'],
                        cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and 'it is more than -1' in done.stderr


@pytest.mark.parametrize('arguments, words', [(['--workdir={tmp}', '--out={tmp}/out'], 'no config.json'),
                                              (['--workdir={run}', '--out={run}'], 'is no earlier export')])
def test_command_line_names_what_is_wrong(arguments, words, workdir, tmp_path):
  before = sorted(path.name for path in workdir.iterdir())
  status, _, err = run(*(argument.format(tmp=tmp_path, run=workdir) for argument in arguments))
  assert status == 1 and words in err and 'Traceback' not in err
  assert sorted(path.name for path in workdir.iterdir()) == before
