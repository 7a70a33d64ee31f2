"""Official weights: parity with a NumPy reference (tests/reference.py), file formats, messages, and the way back."""
import dataclasses
import functools
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loopformer
from loopformer.convert import from_official, to_official
from loopformer.model import parameter_shapes
from loopformer.types import ConfigError
from tests import reference
from tests.reference import HEADS, KINDS, SIZES

LOOPS = 8
TRAJECTORIES = [(1.0,), (0.5, 0.5), (1 / 8,) * 8, (0.5, 0.125, 0.25, 0.125)]
TOKENS = np.random.default_rng(9).integers(0, SIZES['V'], (5, 13))
WTE, HEAD = 'transformer.wte.weight', 'lm_head.weight'

kinds = pytest.mark.parametrize('kind', KINDS)
timed_kinds = pytest.mark.parametrize('kind', ['loopformer', 'tmlt'])


def weights(kind: str, seed: int = 0) -> dict[str, np.ndarray]:
  return reference.random_state_dict(kind, seed, **SIZES)


@functools.cache
def converted(kind: str):
  return from_official(kind, weights(kind), heads=HEADS, loops=LOOPS)


def assert_same(params, expected):
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


# Parity --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize('steps', TRAJECTORIES, ids=lambda steps: f'{len(steps)}steps')
def test_logits_are_the_reference(kind, steps):
  model, params = converted(kind)
  expected = reference.forward(weights(kind), kind, TOKENS, steps, HEADS)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS, steps=steps), expected, rtol=0, atol=1e-4)


def faint(kind: str) -> dict[str, np.ndarray]:
  """Weights whose first state is so small that the epsilon of the norms decides the result."""
  sd = {key: value * np.float32(1e-3) if key in (WTE, HEAD, 'transformer.wpe.weight') else value
        for key, value in weights(kind).items()}
  for i in range(SIZES['k']):
    sd[f'{reference.layer_prefix(kind, i)}mlp.c_proj.weight'] *= np.float32(1e-3)
    sd[f'{reference.layer_prefix(kind, i)}attn.c_proj.weight'] *= np.float32(1e-3)
  return sd


@kinds
def test_epsilon_of_the_norms_is_the_reference(kind, monkeypatch):
  sd = faint(kind)
  model, _ = converted(kind)
  _, params = from_official(kind, sd, heads=HEADS)
  expected = 1e3 * reference.forward(sd, kind, TOKENS, (0.5, 0.5), HEADS)
  np.testing.assert_allclose(1e3 * loopformer.logits(model, params, TOKENS, steps=2), expected, rtol=0, atol=1e-4)
  monkeypatch.setattr(reference, 'EPSILON', 1e-6)
  assert np.abs(1e3 * reference.forward(sd, kind, TOKENS, (0.5, 0.5), HEADS) - expected).max() > 1e-2


# What the parity test could miss if the reference did not feel it: each changes the weights as one mistake would.


def chunks(order, *keys):
  """Official weights with the equal parts of the rows (columns for the sinusoid) in another order."""
  def change(sd):
    return {key: np.concatenate([np.split(value, len(order), axis)[i] for i in order], axis)
            if key.endswith(keys) else value for key, value in sd.items() for axis in [1 if '.mlp.0.' in key else 0]}
  return change


def swapped_embedders(sd):
  other = {'time_embedder': 'dt_embedder', 'dt_embedder': 'time_embedder'}
  return {'.'.join([other.get(key.split('.')[0], key.split('.')[0]), *key.split('.')[1:]]): value
          for key, value in sd.items()}


def interleaved_heads(sd):
  d = SIZES['D'] // HEADS
  return {key: value.reshape(3, HEADS, d, -1).swapaxes(1, 2).reshape(value.shape) if 'c_attn' in key else value
          for key, value in sd.items()}


def transposed(*keys):
  def change(sd):
    return {key: value.T if key.endswith(keys) else value for key, value in sd.items()}
  return change


def swapped_layers(sd):
  return {re.sub(r'blocks\.(\d)', lambda m: f'blocks.{1 - int(m[1])}', key): value for key, value in sd.items()}


def zeroed(*keys):
  def change(sd):
    return {key: 0 * value if key.endswith(keys) else value for key, value in sd.items()}
  return change


MODULATION = ('adaLN_modulation.1.weight', 'adaLN_modulation.1.bias')
MISTAKES = {
    'scales before gates': chunks((2, 3, 0, 1), *MODULATION),
    'gates swapped': chunks((1, 0, 2, 3), *MODULATION),
    'scales swapped': chunks((0, 1, 3, 2), *MODULATION),
    'modulation bias dropped': zeroed('adaLN_modulation.1.bias'),
    'sin before cos, time': chunks((1, 0), 'time_embedder.mlp.0.weight'),
    'sin before cos, step': chunks((1, 0), 'dt_embedder.mlp.0.weight'),
    'step dropped': zeroed('dt_embedder.mlp.2.weight'),
    'time and step swapped': swapped_embedders,
    'q and k swapped': chunks((1, 0, 2), 'attn.c_attn.weight'),
    'k and v swapped': chunks((0, 2, 1), 'attn.c_attn.weight'),
    'heads interleaved': interleaved_heads,
    'attention output transposed': transposed('attn.c_proj.weight'),
    'embedder transposed': transposed('time_embedder.mlp.2.weight'),
    'layers swapped': swapped_layers,
    'positions dropped': zeroed('wpe.weight'),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_reference_feels(mistake):
  sd = weights('loopformer')
  logits = [reference.forward(w, 'loopformer', TOKENS, TRAJECTORIES[-1], HEADS) for w in (sd, MISTAKES[mistake](sd))]
  assert np.abs(logits[0] - logits[1]).max() > 1e-2


@kinds
def test_reference_feels_heads_norms_order_and_number_of_steps(kind):
  sd = weights(kind)
  logits = [reference.forward(sd, kind, TOKENS, steps, heads)
            for steps, heads in [((0.5, 0.5), 6), ((0.5, 0.5), 3), ((1.0,), 6), ((0.75, 0.25), 6)]]
  felt = [np.abs(other - logits[0]).max() for other in logits[1:]]
  assert felt[0] > 1e-2 and felt[1] > 1e-2
  assert (felt[2] > 1e-2) == (kind == 'loopformer')
  unscaled = {key: np.ones_like(value) if 'norm_' in key else value for key, value in sd.items()}
  assert np.abs(reference.forward(unscaled, kind, TOKENS, (0.5, 0.5), HEADS) - logits[0]).max() > 1e-2


def test_parity_tells_the_tanh_gelu_from_the_exact_one(monkeypatch):
  steps = TRAJECTORIES[-1]
  exact = reference.forward(weights('loopformer'), 'loopformer', TOKENS, steps, HEADS)
  root = math.sqrt(2 / math.pi)
  monkeypatch.setattr(reference, 'gelu', lambda x: x * (1 + np.tanh(root * (x + 0.044715 * x**3))) / 2)
  assert np.abs(reference.forward(weights('loopformer'), 'loopformer', TOKENS, steps, HEADS) - exact).max() > 2e-4


def torch_forward(sd, kind, tokens, steps, heads):
  """The same equations in PyTorch's own functions, float32."""
  import torch
  from torch.nn import functional as F
  w = {key: torch.tensor(value) for key, value in sd.items()}

  def net(name, s):
    angle = torch.tensor(float(s)) * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    hidden = F.linear(torch.cat([angle.cos(), angle.sin()]), w[f'{name}.mlp.0.weight'], w[f'{name}.mlp.0.bias'])
    return F.linear(F.silu(hidden), w[f'{name}.mlp.2.weight'], w[f'{name}.mlp.2.bias'])

  def norm(x, key):
    return F.rms_norm(x, x.shape[-1:], w.get(key))

  x = w[WTE][tokens] + w['transformer.wpe.weight'][:tokens.shape[1]]
  for m, dt in enumerate(steps):
    for i in range(SIZES['k']):
      layer, mods = reference.layer_prefix(kind, i), (1, 1, 0, 0)
      if kind in ('loopformer', 'tmlt'):
        c = net('time_embedder', m) if kind == 'tmlt' else net('time_embedder', sum(steps[:m])) + net('dt_embedder', dt)
        mods = F.linear(F.silu(c), w[layer + MODULATION[0]], w[layer + MODULATION[1]]).chunk(4)
      y = norm(x, layer + 'norm_1.weight') * (1 + mods[2])
      q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2)
                 for part in F.linear(y, w[layer + 'attn.c_attn.weight']).chunk(3, -1))
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
      x = x + mods[0] * F.linear(y, w[layer + 'attn.c_proj.weight'])
      y = F.gelu(F.linear(norm(x, layer + 'norm_2.weight') * (1 + mods[3]), w[layer + 'mlp.c_fc.weight']))
      x = x + mods[1] * F.linear(y, w[layer + 'mlp.c_proj.weight'])
  return F.linear(norm(x, 'transformer.norm_f.weight'), w[WTE]).numpy()


@kinds
@pytest.mark.parametrize('make', [weights, faint])
def test_reference_is_what_pytorch_computes(kind, make):
  pytest.importorskip('torch')
  sd, steps = make(kind), TRAJECTORIES[-1]
  expected, size = reference.forward(sd, kind, TOKENS, steps, HEADS), np.std(sd[WTE]) / 0.2
  np.testing.assert_allclose(torch_forward(sd, kind, TOKENS, steps, HEADS) / size, expected / size, rtol=0, atol=1e-4)


# What comes out ------------------------------------------------------------------------------------------------------


@kinds
def test_params_have_the_tree_shapes_and_dtypes_of_init(kind):
  model, params = converted(kind)
  expected = parameter_shapes(model)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  assert jax.tree.all(jax.tree.map(lambda p, e: (p.shape, p.dtype) == (e.shape, jnp.float32), params, expected))
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


@kinds
def test_sizes_are_read_and_loops_default_by_kind(kind):
  model, _ = from_official(kind, weights(kind), heads=HEADS)
  core = model.cell.core
  assert (model.read_in.vocab, model.read_in.length, model.read_in.width) == (SIZES['V'], SIZES['P'], SIZES['D'])
  assert (core.depth, core.block.mlp.hidden, core.block.attn.heads) == (SIZES['k'], SIZES['F'], HEADS)
  assert model.loops == (1 if kind == 'base' else 8)


@timed_kinds
def test_dtype_is_of_the_matrix_products(kind):
  model, params = from_official(kind, weights(kind), heads=HEADS, dtype='bfloat16')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  difference = loopformer.logits(model, params, TOKENS, steps=1) - loopformer.logits(*converted(kind), TOKENS, steps=1)
  assert 1e-4 < np.abs(difference).mean() < 0.3


def test_params_do_not_share_memory_with_the_source():
  sd = weights('loopformer')
  _, params = from_official('loopformer', sd, heads=HEADS)
  before = jax.tree.map(lambda leaf: np.array(leaf), params)
  for value in sd.values():
    value += 1
  assert_same(params, before)


# Ways in -------------------------------------------------------------------------------------------------------------


def save_npz(sd, path):
  np.savez(path, **sd)


def save_safetensors(sd, path):
  pytest.importorskip('safetensors.numpy').save_file(sd, path)


def save_torch(sd, path):
  torch = pytest.importorskip('torch')
  torch.save({key: torch.tensor(value) for key, value in sd.items()}, path)


@pytest.mark.parametrize('kind', ['loopformer', 'base'])
@pytest.mark.parametrize('suffix, save', [('.npz', save_npz), ('.safetensors', save_safetensors), ('.pt', save_torch),
                                          ('.pth', save_torch)])
def test_file_formats(tmp_path, kind, suffix, save):
  path = tmp_path / f'weights{suffix}'
  save(weights(kind), path)
  assert_same(from_official(kind, path, heads=HEADS)[1], converted(kind)[1])
  assert_same(from_official(kind, str(path), heads=HEADS)[1], converted(kind)[1])


@pytest.mark.parametrize('prefix', ['_orig_mod.', 'module.', 'model.', 'gpt.', 'module._orig_mod.', 'model.gpt.',
                                    '_orig_mod.module.model.gpt.'])
def test_prefixes(prefix):
  sd = {prefix + key: value for key, value in weights('loopformer').items()}
  assert_same(from_official('loopformer', sd, heads=HEADS)[1], converted('loopformer')[1])


@pytest.mark.parametrize('nest', [['model'], ['state_dict'], ['model_state_dict'], ['state_dict', 'model']])
def test_nested_keys(nest):
  held = weights('loopformer')
  for key in nest:
    held = {key: held, 'iter_num': 7, 'optimizer': {'state': {}}}
  assert_same(from_official('loopformer', held, heads=HEADS)[1], converted('loopformer')[1])


def test_base_layers_are_read_from_both_lists():
  sd = {key.replace('transformer.h.', 'transformer.h.blocks.'): value for key, value in weights('base').items()}
  assert_same(from_official('base', sd, heads=HEADS)[1], converted('base')[1])


@pytest.mark.parametrize('kind', ['base', 'loopformer'])
def test_masks_and_a_tied_head_are_no_weights(kind):
  mask = np.tril(np.ones((1, 1, SIZES['P'], SIZES['P'])))
  sd = weights(kind) | {f'{reference.layer_prefix(kind, i)}attn.bias': mask for i in range(SIZES['k'])}
  assert_same(from_official(kind, sd, heads=HEADS)[1], converted(kind)[1])
  for dropped in (WTE, HEAD):  # a format that stores shared weights once keeps either name
    bare = {key: value for key, value in sd.items() if key != dropped}
    assert_same(from_official(kind, bare, heads=HEADS)[1], converted(kind)[1])


def test_half_precision_weights_become_float32(tmp_path):
  torch = pytest.importorskip('torch')
  safetensors = pytest.importorskip('safetensors.torch')
  halves = {key: torch.tensor(value).bfloat16() for key, value in weights('loopformer').items()}
  _, expected = from_official('loopformer', {key: value.float().numpy() for key, value in halves.items()}, heads=HEADS)
  safetensors.save_file(halves, tmp_path / 'half.safetensors')
  torch.save(halves, tmp_path / 'half.pt')
  for source in (halves, tmp_path / 'half.safetensors', tmp_path / 'half.pt'):
    assert_same(from_official('loopformer', source, heads=HEADS)[1], expected)


@dataclasses.dataclass
class GPTConfig:
  n_head: int = HEADS


@pytest.fixture
def training_checkpoint(tmp_path, monkeypatch):
  """As the official trainer saves it: with the optimizer's state and an instance of a class of its own."""
  torch = pytest.importorskip('torch')
  module = types.ModuleType('models.loopformer')
  module.GPTConfig = type('GPTConfig', (GPTConfig,), {'__module__': module.__name__})
  with monkeypatch.context() as patch:
    patch.setitem(sys.modules, 'models', types.ModuleType('models'))
    patch.setitem(sys.modules, module.__name__, module)
    tensors = {f'_orig_mod.{key}': torch.tensor(value) for key, value in weights('loopformer').items()}
    torch.save({'model': tensors, 'optimizer': {'state': {0: {'step': 3}}}, 'model_args': {'n_head': HEADS},
                'iter_num': 3, 'config': module.GPTConfig()}, tmp_path / 'ckpt.pt')
  return tmp_path / 'ckpt.pt'


def test_training_checkpoint_is_read_and_tells_its_heads(training_checkpoint):
  for given in ({}, {'heads': HEADS}):
    model, params = from_official('loopformer', training_checkpoint, **given)
    assert model.cell.core.block.attn.heads == HEADS
    assert_same(params, converted('loopformer')[1])
  with pytest.raises(ConfigError, match=r'heads = 3: .*trained with 6 .*give that'):
    from_official('loopformer', training_checkpoint, heads=3)


# Errors --------------------------------------------------------------------------------------------------------------


def without(key):
  return lambda sd: {name: value for name, value in sd.items() if name != key}


def given(**arrays):
  return lambda sd: sd | {name.replace('__', '.'): value for name, value in arrays.items()}


LAYER = 'transformer.h.blocks.1.'
BAD_WEIGHTS = {
    'missing': (without(f'{LAYER}mlp.c_fc.weight'), [f"'{LAYER}mlp.c_fc.weight' is missing", '[80, 48]']),
    'missing embedding': (lambda sd: without(WTE)(without(HEAD)(sd)), [f"'{WTE}' is missing", '[V, D]', 'kind']),
    'missing first layer': (lambda sd: {key: value for key, value in sd.items() if 'blocks.0' not in key},
                            ["'transformer.h.blocks.0.mlp.c_fc.weight' is missing", '[F, D]']),
    'missing net': (without('dt_embedder.mlp.2.bias'), ["'dt_embedder.mlp.2.bias' is missing", '[48]']),
    'nothing': (lambda sd: {}, ['is missing', 'empty']),
    'surplus': (given(extra__weight=np.zeros((2, 7))), ["'extra.weight' of shape [2, 7] is surplus"]),
    'surplus layer': (given(**{f'{LAYER}attn.c_attn.bias': np.zeros(144)}), ['attn.c_attn.bias', '[144]', 'surplus']),
    'no mask': (given(**{f'{LAYER}attn.bias': np.zeros(48)}), ['attn.bias', '[48]', 'surplus']),
    'misshapen': (given(**{f'{LAYER}attn.c_attn.weight': np.zeros((48, 144))}),
                  [f"'{LAYER}attn.c_attn.weight' has shape [48, 144], expected [144, 48]"]),
    'misshapen positions': (given(transformer__wpe__weight=np.zeros((16, 47))), ['[16, 47], expected [16, 48]']),
    'misshapen embedding': (lambda sd: {WTE: np.zeros(5)}, [f"'{WTE}' has shape [5], expected [V, D]"]),
    'untied': (given(**{HEAD: np.ones((50, 48))}), [HEAD, WTE, '[50, 48]', 'differs', 'tied']),
    'head of another size': (given(**{HEAD: np.ones((51, 48))}), [HEAD, WTE, '[51, 48]', '[50, 48]', 'differs']),
    'twice': (lambda sd: sd | {f'model.{WTE}': sd[WTE]}, [f"'{WTE}'", f"'model.{WTE}'", 'remove one']),
    'integers': (given(transformer__wpe__weight=np.zeros((16, 48), np.int8)), ['wpe.weight', 'int8', 'floating point']),
    'a number': (given(iter_num=3), ["'iter_num' of shape [] is surplus"]),
}


@pytest.mark.parametrize('case', BAD_WEIGHTS)
def test_bad_weights(case):
  change, words = BAD_WEIGHTS[case]
  with pytest.raises(ConfigError) as error:
    from_official('loopformer', change(weights('loopformer')), heads=HEADS)
  for word in words:
    assert word in str(error.value)


@pytest.mark.parametrize('wrong', ['base', 'base_loop', 'tmlt'])
def test_weights_of_another_kind(wrong):
  with pytest.raises(ConfigError, match=f"kind = '{wrong}'.*kind"):
    from_official(wrong, weights('loopformer'), heads=HEADS)
  with pytest.raises(ConfigError, match="kind = 'loopformer'.*kind"):
    from_official('loopformer', weights(wrong), heads=HEADS)


@pytest.mark.parametrize('change, words', [
    ({'kind': 'loopformers'}, ["kind = 'loopformers'", 'loopformer, base, base_loop, tmlt']),
    ({'heads': None}, ['heads is missing', 'n_head']),
    ({'heads': 7}, ['heads = 7', '48']),
    ({'heads': 0}, ['heads = 0']),
    ({'heads': 6.0}, ['heads = 6.0', 'integer']),
    ({'loops': 0}, ['loops = 0', '1 to 10000']), ({'loops': 10_001}, ['loops = 10001']),
    ({'dtype': 'int8'}, ["dtype = 'int8'", 'bfloat16']),
    ({'source': 3}, ['source = int', 'path', 'dict']),
])
def test_bad_arguments(change, words):
  arguments = {'kind': 'loopformer', 'source': weights('loopformer'), 'heads': HEADS} | change
  with pytest.raises(ConfigError) as error:
    from_official(**arguments)
  for word in words:
    assert word in str(error.value)


def test_bad_files(tmp_path):
  for name, words in {'absent.npz': 'no such file', 'weights.onnx': r"'\.onnx'.*\.safetensors, \.npz"}.items():
    with pytest.raises(ConfigError, match=f'{name}.*{words}'):
      from_official('loopformer', tmp_path / name, heads=HEADS)
  for suffix, module in {'.npz': 'numpy', '.safetensors': 'safetensors', '.pt': 'torch'}.items():
    pytest.importorskip(module)
    path = tmp_path / f'broken{suffix}'
    path.write_bytes(b'not a checkpoint')
    with pytest.raises(ConfigError, match=f'broken{suffix}: cannot be read .*save the state dict alone'):
      from_official('loopformer', path, heads=HEADS)


def test_pickled_objects_are_not_executed(tmp_path):
  torch = pytest.importorskip('torch')
  torch.save({'model': weights('loopformer'), 'config': GPTConfig()}, tmp_path / 'pickled.pt')
  with pytest.raises(ConfigError, match=r'pickled\.pt: cannot be read \(UnpicklingError.*torch\.save\(model\.state'):
    from_official('loopformer', tmp_path / 'pickled.pt', heads=HEADS)
  torch.save(torch.ones(2), tmp_path / 'tensor.pt')
  with pytest.raises(ConfigError, match=r'tensor\.pt: holds a Tensor, not a state dict'):
    from_official('loopformer', tmp_path / 'tensor.pt', heads=HEADS)


@pytest.mark.parametrize('suffix, module, extra', [
    ('.safetensors', 'safetensors', 'hf'),
    ('.pt', 'torch', 'peer'),
    ('.pth', 'torch', 'peer'),
])
def test_missing_extras_are_named(tmp_path, monkeypatch, suffix, module, extra):
  path = tmp_path / f'weights{suffix}'
  path.touch()
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ImportError, match=f"weights{suffix} needs .*extra '{extra}'"):
    from_official('loopformer', path, heads=HEADS)


# The way back --------------------------------------------------------------------------------------------------------


@kinds
def test_round_trip_is_bit_equal(kind):
  model, params = converted(kind)
  back, sd = to_official(kind, model, params), weights(kind)
  assert back.keys() == sd.keys()
  for key, value in back.items():
    assert value.dtype == np.float32 and value.flags.c_contiguous, key
    np.testing.assert_array_equal(value, sd[key], err_msg=key)
  assert_same(from_official(kind, back, heads=HEADS)[1], params)


def test_way_back_through_a_file(tmp_path):
  model, params = converted('tmlt')
  save_safetensors(to_official('tmlt', model, params), tmp_path / 'back.safetensors')
  assert_same(from_official('tmlt', tmp_path / 'back.safetensors', heads=HEADS)[1], params)


def test_way_back_refuses_what_the_official_code_cannot_hold():
  model, params = converted('loopformer')
  with pytest.raises(ConfigError, match="kind = 'tmlt': key 'cell/condition/step.*surplus"):
    to_official('tmlt', model, params)
  with pytest.raises(ConfigError, match=r"key 'cell/condition/step/in/kernel' is missing, expected with .*\[256, 48\]"):
    to_official('loopformer', *converted('tmlt'))
  with pytest.raises(ConfigError, match="kind = 'gpt'"):
    to_official('gpt', model, params)
  core = model.cell.core
  grouped = core.clone(block=core.block.clone(attn=core.block.attn.clone(groups=2)))
  with pytest.raises(ConfigError, match=r'groups = 2: .*\(6\)'):
    to_official('loopformer', model.clone(cell=model.cell.clone(core=grouped)), params)
