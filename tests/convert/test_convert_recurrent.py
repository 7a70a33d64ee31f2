"""Official weights of Parcae and Huginn against forward passes in NumPy, float64, that share no code with the library;
and surgery on plain models."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loopformer
from loopformer import config as configs
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.convert import from_official, retrofit, to_official
from loopformer.convert.official import KINDS
from loopformer.model import Looped, init_params, parameter_shapes
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, PreNorm, SandwichNorm
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.inject import Add, Concat, Diagonal
from loopformer.nn.layers import GatedMLP, RMSNorm, UniformWithin
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.starts import Noise, Zeros
from loopformer.types import ConfigError
from tests.experiments.test_golden import config_of

WTE, HEAD = 'transformer.wte.weight', 'lm_head.weight'
# No two sizes are equal, nor equal to another number in a layout: 2, 3, 8 (width of a head), 32 (channels of gates).
V, D, F, H, G = 50, 48, 80, 6, 3
SHAPES = [(2, 4, 2), (1, 1, 1), (3, 1, 2)]  # layers of prelude, core and coda
TOKENS = np.random.default_rng(9).integers(0, V, (3, 11))
LOOPS = [1, 2, 5, 8]

kinds = pytest.mark.parametrize('kind', ['parcae', 'huginn'])


# The forward passes, from the equations ------------------------------------------------------------------------------


def norm(x, gain=1.0, eps=1e-5):
  return x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + eps) * gain


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def rotate(x, base=50_000.0):
  """[B, T, H, d]: neighbours are the real and the imaginary part."""
  turns = np.arange(x.shape[1])[:, None] * base ** (-np.arange(0, x.shape[-1], 2) / x.shape[-1])
  y = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * turns)[:, None]
  return np.stack([y.real, y.imag], -1).reshape(x.shape)


def attend(q, k, v):
  """[B, T, H, d] and [B, T, G, d] twice -> [B, T, H d]; a head at a time."""
  batch, length, heads, d = q.shape
  out = np.zeros_like(q)
  for h in range(heads):
    g = h * k.shape[2] // heads
    for t in range(length):
      weight = np.exp(np.einsum('bd,bsd->bs', q[:, t, h], k[:, :t + 1, g]) / math.sqrt(d))
      out[:, t, h] = np.einsum('bs,bsd->bd', weight / weight.sum(-1, keepdims=True), v[:, :t + 1, g])
  return out.reshape(batch, length, heads * d)


def heads_of(x, heads):
  return x.reshape(*x.shape[:2], heads, -1)


def parcae_forward(sd, layers, tokens, loops, eps_qk=2.0 ** -23):
  w = {key: value.astype(np.float64) for key, value in sd.items()}
  total = sum(layers)

  def block(name, i, number, x):
    own = {key.removeprefix(prefix): value for prefix in [f'transformer.{name}.{i}.'] for key, value in w.items()
           if key.startswith(prefix)}
    y = norm(x, own['norm_1.weight'])
    q = heads_of(y @ own['attn.c_q.weight'].T, H)
    k, v = (heads_of(y @ own[f'attn.c_{c}.weight'].T, G) for c in 'kv')
    if number % 2 == (total - 1) % 2:
      gate = 2 * sigmoid(y[..., :32] @ own['attn.ve_gate.weight'].T)
      v = v + gate[..., None] * heads_of(w[f'value_embeds.{number}.weight'][tokens], G)
    q, k = (norm(rotate(z), eps=eps_qk) for z in (q, k))
    x = x + attend(q, k, v) @ own['attn.c_proj.weight'].T
    hidden = np.maximum(norm(x, own['norm_2.weight']) @ own['mlp.fc.weight'].T, 0) ** 2 / 2
    return x + hidden @ own['mlp.proj.weight'].T

  e = w[WTE][tokens]
  for i in range(layers[0]):
    e = block('prelude', i, i, e)
  e = norm(e, w['transformer.ln_prelude.weight'])
  delta = np.log1p(np.exp(w['transformer.adapter.dt_bias']))
  decay = np.exp(-delta * np.exp(w['transformer.adapter.A_log']))
  x = np.zeros_like(e)
  for _ in range(loops):
    x = decay * x + delta * (e @ w['transformer.adapter.B'].T)
    for i in range(layers[1]):
      x = block('core_block', i, layers[0] + i, x)
  x = x @ w['transformer.C.weight'].T
  for i in range(layers[2]):
    x = block('coda', i, layers[0] + layers[1] + i, x)
  return norm(x, w['transformer.ln_f.weight']) @ w[WTE].T


def huginn_forward(sd, layers, tokens, loops, eps=1e-6):
  w = {key: value.astype(np.float64) for key, value in sd.items()}

  def block(name, i, x):
    own = {key.removeprefix(prefix): value for prefix in [f'transformer.{name}.{i}.'] for key, value in w.items()
           if key.startswith(prefix)}
    n1, n2, n3, n4 = (functools.partial(norm, gain=own[f'norm_{n}.weight'], eps=eps) for n in (1, 2, 3, 4))
    q, k, v = (heads_of(z, H) for z in np.split(n1(x) @ own['attn.Wqkv.weight'].T, 3, -1))
    q, k = rotate(q + own['attn.qk_bias'][0, 0]), rotate(k + own['attn.qk_bias'][1, 0])
    x = n2(x + attend(q, k, v) @ own['attn.proj.weight'].T)
    gate, linear = np.split(n3(x) @ own['mlp.fc.weight'].T, 2, -1)
    return n4(x + (gate * sigmoid(gate) * linear) @ own['mlp.proj.weight'].T)

  e = w[WTE][tokens] * math.sqrt(D)
  for i in range(layers[0]):
    e = block('prelude', i, e)
  s = np.zeros_like(e)
  for _ in range(loops):
    s = np.concatenate([s, e], -1) @ w['transformer.adapter.weight'].T
    for i in range(layers[1]):
      s = block('core_block', i, s)
  z = norm(s, w['transformer.ln_f.weight'], eps)
  for i in range(layers[2]):
    z = block('coda', i, z)
  return norm(z, w['transformer.ln_f.weight'], eps) @ w[WTE].T


FORWARD = {'parcae': parcae_forward, 'huginn': huginn_forward}


def parcae_shapes(layers):
  d, total, number = D // H, sum(layers), 0
  shapes = {WTE: (V, D), 'transformer.ln_prelude.weight': (D,), 'transformer.adapter.A_log': (D,),
            'transformer.adapter.dt_bias': (D,), 'transformer.adapter.B': (D, D), 'transformer.C.weight': (D, D),
            'transformer.ln_f.weight': (D,)}
  for name, count in zip(('prelude', 'core_block', 'coda'), layers):
    for i in range(count):
      own = {'norm_1.weight': (D,), 'norm_2.weight': (D,), 'attn.c_q.weight': (D, D), 'attn.c_k.weight': (G * d, D),
             'attn.c_v.weight': (G * d, D), 'attn.c_proj.weight': (D, D), 'mlp.fc.weight': (F, D),
             'mlp.proj.weight': (D, F)}
      if number % 2 == (total - 1) % 2:
        own['attn.ve_gate.weight'] = (G, 32)
        shapes[f'value_embeds.{number}.weight'] = (V, G * d)
      shapes |= {f'transformer.{name}.{i}.{key}': shape for key, shape in own.items()}
      number += 1
  return shapes


def huginn_shapes(layers):
  shapes = {WTE: (V, D), 'transformer.adapter.weight': (D, 2 * D), 'transformer.ln_f.weight': (D,)}
  for name, count in zip(('prelude', 'core_block', 'coda'), layers):
    for i in range(count):
      own = {f'norm_{n}.weight': (D,) for n in (1, 2, 3, 4)} | {
          'attn.Wqkv.weight': (3 * D, D), 'attn.qk_bias': (2, 1, H, D // H), 'attn.proj.weight': (D, D),
          'mlp.fc.weight': (2 * F, D), 'mlp.proj.weight': (D, F)}
      shapes |= {f'transformer.{name}.{i}.{key}': shape for key, shape in own.items()}
  return shapes


@functools.cache
def _weights(kind, layers, seed):
  rng = np.random.default_rng(seed)
  sd = {}
  for key, shape in {'parcae': parcae_shapes, 'huginn': huginn_shapes}[kind](layers).items():
    std = 0.3 if len(shape) == 1 or 'bias' in key else 1.0 / math.sqrt(shape[-1])
    if key.endswith('proj.weight'):
      std = 0.5 / math.sqrt(shape[-1])
    sd[key] = (std * rng.normal(size=shape)).astype(np.float32)
    if 'norm_' in key or 'ln_' in key:
      sd[key] += 1
  return sd | {HEAD: sd[WTE]}


def weights(kind, layers=SHAPES[0], seed=0):
  return {key: value.copy() for key, value in _weights(kind, layers, seed).items()}


@functools.cache
def converted(kind, layers=SHAPES[0]):
  return from_official(kind, weights(kind, layers), loops=max(LOOPS))


def without_noise(model):
  return model.clone(start=Zeros())


def assert_same(params, expected):
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


# Parity --------------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize('layers', SHAPES, ids=str)
def test_logits_are_the_reference(kind, layers):
  model, params = converted(kind, layers)
  for loops in LOOPS:
    expected = FORWARD[kind](weights(kind, layers), layers, TOKENS, loops)
    assert np.abs(expected).max() > 1
    given = loopformer.logits(without_noise(model), params, TOKENS, steps=loops)
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)


@kinds
def test_a_start_of_no_spread_is_none(kind):
  model, params = converted(kind)
  zeros, noise = (loopformer.logits(model.clone(start=start), params, TOKENS, steps=2)
                  for start in (Zeros(), Noise(std=0.0)))
  np.testing.assert_array_equal(zeros, noise)


@kinds
def test_every_loop_differs_and_noise_is_the_published_one(kind):
  model, params = converted(kind)
  assert isinstance(model.start, Noise)
  assert model.start.std == pytest.approx({'parcae': math.sqrt(2 / (5 * D)), 'huginn': math.sqrt(2 / 5)}[kind])
  by_loops = [loopformer.logits(without_noise(model), params, TOKENS, steps=loops) for loops in (1, 2)]
  assert np.abs(by_loops[0] - by_loops[1]).max() > 1e-2
  assert np.abs(loopformer.logits(model, params, TOKENS, steps=1) - by_loops[0]).max() > 1e-2


# The reference must feel each of these mistakes, or agreement with it would prove nothing.


def swapped(first, second):
  """Weights that change places."""
  def change(sd):
    other = {key: key.replace(first, second) if first in key else key.replace(second, first) for key in sd}
    return {key: sd[other[key]] for key in sd}
  return change


def changed(end, how):
  return lambda sd: {key: np.ascontiguousarray(how(value)) if key.endswith(end) else value
                     for key, value in sd.items()}


def halves(axis):
  return lambda value: np.roll(value, value.shape[axis] // 2, axis)


MISTAKES = {
    'parcae': {
        'k and v': swapped('c_k', 'c_v'), 'B': changed('adapter.B', np.transpose),
        'C': changed('C.weight', np.transpose),
        'out': changed('c_proj.weight', np.transpose), 'A and dt': swapped('A_log', 'dt_bias'),
        'norms': swapped('norm_1', 'norm_2'), 'last norms': swapped('ln_prelude', 'ln_f'),
        'groups': changed('c_q.weight', lambda q: q.reshape(2, 3, 8, D).swapaxes(0, 1).reshape(D, D)),
        'rotary': changed('c_q.weight', lambda q: q.reshape(H, 2, 4, D).swapaxes(1, 2).reshape(D, D)),
        'tables': swapped('value_embeds.1', 'value_embeds.3'), 'gates': changed('ve_gate.weight', np.zeros_like),
        'pairs': swapped('prelude.0.mlp', 'prelude.1.mlp'), 'core': swapped('core_block.0.mlp', 'core_block.2.mlp')},
    'huginn': {
        'adapter': changed('adapter.weight', halves(1)), 'gate': changed('mlp.fc.weight', halves(0)),
        'biases': changed('qk_bias', halves(0)), 'no biases': changed('qk_bias', np.zeros_like),
        'norms': swapped('norm_2', 'norm_4'), 'others': swapped('norm_1', 'norm_3'),
        'out': changed('attn.proj.weight', np.transpose), 'layers': swapped('core_block.0', 'core_block.1'),
        'q, k, v': changed('Wqkv.weight', lambda w: np.roll(w, D, 0)),
        'heads': changed('Wqkv.weight', lambda w: w.reshape(3, H, -1, D).swapaxes(0, 1).reshape(w.shape))},
}


@pytest.mark.parametrize('kind, mistake', [(kind, name) for kind in MISTAKES for name in MISTAKES[kind]])
def test_the_reference_feels_mistakes(kind, mistake):
  sd = weights(kind)
  wrong = FORWARD[kind](MISTAKES[kind][mistake](sd), SHAPES[0], TOKENS, 2)
  assert np.abs(wrong - FORWARD[kind](sd, SHAPES[0], TOKENS, 2)).max() > 1e-2


def test_epsilon_of_huginns_norms_is_the_reference():
  sd = weights('huginn', (1, 1, 1))
  for key in (WTE, HEAD):
    sd[key] *= np.float32(1e-4)
  for key in ('attn.proj.weight', 'mlp.proj.weight'):
    sd[f'transformer.prelude.0.{key}'] *= np.float32(1e-3)
  model, params = from_official('huginn', sd)
  expected = 1e4 * huginn_forward(sd, (1, 1, 1), TOKENS, 2)
  given = 1e4 * loopformer.logits(without_noise(model), params, TOKENS, steps=2)
  np.testing.assert_allclose(given, expected, rtol=0, atol=1e-4)
  assert np.abs(1e4 * huginn_forward(sd, (1, 1, 1), TOKENS, 2, eps=1e-5) - expected).max() > 1e-2


def test_epsilons_of_parcaes_norms_are_the_reference():
  sd = weights('parcae', (1, 1, 1))
  for key in sd:  # so small that the epsilon of their norm decides
    if key.endswith(('c_q.weight', 'c_k.weight')):
      sd[key] *= np.float32(1e-3)
  model, params = from_official('parcae', sd)
  expected = parcae_forward(sd, (1, 1, 1), TOKENS, 2)
  np.testing.assert_allclose(loopformer.logits(without_noise(model), params, TOKENS, steps=2), expected,
                             rtol=0, atol=1e-4)
  assert np.abs(parcae_forward(sd, (1, 1, 1), TOKENS, 2, eps_qk=1e-5) - expected).max() > 1e-2


# What comes out ------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize('layers', SHAPES, ids=str)
def test_params_have_the_tree_of_init_and_round_trip(kind, layers):
  model, params = converted(kind, layers)
  expected = parameter_shapes(model)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  assert jax.tree.all(jax.tree.map(lambda p, e: (p.shape, p.dtype) == (e.shape, jnp.float32), params, expected))
  back, sd = to_official(kind, model, params), weights(kind, layers)
  assert back.keys() == sd.keys()
  for key, value in back.items():
    assert value.dtype == np.float32 and value.flags.c_contiguous, key
    np.testing.assert_array_equal(value, sd[key], err_msg=key)
  assert_same(from_official(kind, back)[1], params)


@kinds
def test_sizes_are_read(kind):
  model, _ = from_official(kind, weights(kind))
  block = model.cell.core.block
  attn, mlp = (block.blocks[1].attn, block.blocks[1].mlp) if kind == 'parcae' else (block.attn, block.mlp)
  assert (model.read_in.vocab, model.read_in.width, mlp.hidden, attn.heads) == (V, D, F, H)
  assert attn.groups in (G, None)
  assert [stack.applications for stack in (model.prelude, model.cell.core, model.coda)] == list(SHAPES[0])
  assert (model.loops, model.read_in.length) == {'parcae': (8, 2048), 'huginn': (32, 4096)}[kind]


@kinds
def test_length_is_given_or_that_of_the_rotary_table(kind):
  sd = weights(kind) | {'freqs_cis': np.zeros((1, 77, 1, 4, 2), np.float32)}
  model, params = from_official(kind, sd)
  assert model.read_in.length == 77
  assert_same(params, converted(kind)[1])
  assert from_official(kind, sd, length=13)[0].read_in.length == 13


@kinds
def test_files_prefixes_nesting_and_half_precision(kind, tmp_path):
  sd = weights(kind)
  np.savez(tmp_path / 'weights.npz', **sd)
  assert_same(from_official(kind, tmp_path / 'weights.npz')[1], converted(kind)[1])
  held = {'model': {f'_orig_mod.{key}': value for key, value in sd.items() if key != HEAD}, 'step': 3}
  assert_same(from_official(kind, held, heads=H)[1], converted(kind)[1])
  halves = {key: value.astype(jnp.bfloat16) for key, value in sd.items()}
  _, params = from_official(kind, halves, dtype='bfloat16')
  assert_same(params, from_official(kind, {key: value.astype(np.float32) for key, value in halves.items()})[1])


# Errors --------------------------------------------------------------------------------------------------------------


def without(key):
  return lambda sd: {name: value for name, value in sd.items() if name != key}


def having(key, shape):
  return lambda sd: sd | {key: np.zeros(shape, np.float32)}


P, K, C = 'transformer.prelude.', 'transformer.core_block.', 'transformer.coda.'
BAD = {
    ('parcae', 'missing'): (without(f'{K}3.attn.c_k.weight'), [f"'{K}3.attn.c_k.weight' is missing", '[24, 48]']),
    ('parcae', 'missing layer'): (lambda sd: {key: value for key, value in sd.items() if P not in key},
                                  [f"'{P}0.norm_1.weight' is missing"]),
    ('parcae', 'missing table'): (without('value_embeds.5.weight'), ["'value_embeds.5.weight' is missing", '[50, 24]']),
    ('parcae', 'missing gate'): (without(f'{C}1.attn.ve_gate.weight'), [f"'{C}1.attn.ve_gate.weight' is missing"]),
    ('parcae', 'surplus gate'): (having(f'{P}0.attn.ve_gate.weight', (G, 32)),
                                 [f"'{P}0.attn.ve_gate.weight'", 'surplus']),
    ('parcae', 'surplus table'): (having('value_embeds.0.weight', (V, 24)), ["'value_embeds.0.weight'", 'surplus']),
    ('parcae', 'misshapen'): (having(f'{P}1.attn.c_q.weight', (D, 24)), ['[48, 24], expected [48, 48]']),
    ('parcae', 'misshapen B'): (having('transformer.adapter.B', (D, 9)), ["adapter.B' has shape [48, 9], expected"]),
    ('parcae', 'keys of no head'): (having(f'{C}1.attn.c_k.weight', (25, D)), [f"'{C}1.attn.c_k.weight'", '[25, 48]']),
    ('parcae', 'untied'): (having(HEAD, (V, D)), [HEAD, 'tied']),
    ('parcae', 'empty'): (lambda sd: {}, [WTE, 'is missing', 'empty']),
    ('huginn', 'missing'): (without(f'{C}1.norm_4.weight'), [f"'{C}1.norm_4.weight' is missing", '[48]']),
    ('huginn', 'missing biases'): (without(f'{P}0.attn.qk_bias'), [f"'{P}0.attn.qk_bias' is missing", '[2, 1, H, d]']),
    ('huginn', 'surplus'): (having('transformer.adapter.bias', (D,)), ["adapter.bias' of shape [48] is surplus"]),
    ('huginn', 'misshapen'): (having(f'{K}2.mlp.fc.weight', (F, D)), ['[80, 48], expected [160, 48]']),
    ('huginn', 'misshapen adapter'): (having('transformer.adapter.weight', (2 * D, D)), ['expected [48, 96]']),
    ('huginn', 'misshapen biases'): (having(f'{K}0.attn.qk_bias', (2, H, 8)), ['expected [2, 1, 6, 8]']),
    ('huginn', 'integers'): (lambda sd: sd | {f'{K}2.norm_1.weight': np.ones(D, np.int8)}, ['norm_1', 'int8']),
}


@pytest.mark.parametrize('kind, case', BAD)
def test_bad_weights_are_named(kind, case):
  change, words = BAD[kind, case]
  with pytest.raises(ConfigError) as error:
    from_official(kind, change(weights(kind)))
  for word in words:
    assert word in str(error.value)


@kinds
def test_bad_arguments_are_named(kind):
  with pytest.raises(ConfigError, match='heads = 4: the checkpoint has 6'):
    from_official(kind, weights(kind), heads=4)
  with pytest.raises(ConfigError, match='length = 0'):
    from_official(kind, weights(kind), length=0)
  other = {'parcae': 'huginn', 'huginn': 'parcae'}[kind]
  with pytest.raises(ConfigError, match=f"kind = '{other}'.*kind"):
    from_official(other, weights(kind))
  model, params = converted(kind)
  with pytest.raises(ConfigError, match='cannot hold it'):
    to_official(kind, model.clone(coda=None), params)


# Retrofitted recurrence ----------------------------------------------------------------------------------------------

CHOSEN = {'prelude': (0, 1), 'core': (3, 4, 5), 'coda': (7,)}


def layer(hidden=40, placement=PreNorm()):
  return Block(attn=SelfAttention(heads=4, groups=2, std=0.3, out_std=0.1, position=Rotary()),
              mlp=GatedMLP(hidden=hidden, std=0.3, out_std=0.1), norm=RMSNorm(1e-5), placement=placement)


def plain(depth):
  return Looped(read_in=Tokens(vocab=V, width=32, length=16, std=1.0), cell=Plain(Stack(layer(), depth)),
                read_out=Head(outputs=V, std=0.3), loops=1)


def looped(depths=(2, 3, 1), block=layer, inject=Concat(init=UniformWithin(1 / 8)), **changes):
  prelude, core, coda = (Stack(block(), depth) if depth else None for depth in depths)
  return plain(1).clone(cell=Recur(core, inject), prelude=prelude, coda=coda, loops=4, start=Noise(std=0.0087),
                        **changes)


@functools.cache
def source():
  params = init_params(plain(8), jax.random.key(0))
  jitter = iter(jax.random.split(jax.random.key(1), 100))
  return jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(jitter), leaf.shape), params)


@pytest.mark.parametrize('chosen', [CHOSEN, {'prelude': (), 'core': (6, 2), 'coda': (4, 0)},
                                    {'prelude': range(3), 'core': np.arange(3, 7), 'coda': ()}], ids=str)
def test_retrofit_with_the_trivial_adapter_is_the_layer_dropped_source(chosen):
  model = looped([len(layers) for layers in chosen.values()])
  params = retrofit(source(), model, **chosen)
  params['cell']['inject']['adapter']['kernel'] = jnp.concatenate([jnp.zeros((32, 32)), jnp.eye(32)])
  kept = np.array([layer for layers in chosen.values() for layer in layers])
  dropped = source() | {'cell': jax.tree.map(lambda leaf: leaf[kept], source()['cell'])}
  expected = loopformer.logits(plain(len(kept)), dropped, TOKENS)
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(loopformer.logits(model, params, TOKENS, steps=1), expected, rtol=0, atol=1e-6)
  whole = loopformer.logits(plain(8), source(), TOKENS)
  assert np.abs(whole - expected).max() > 1e-2


def test_retrofit_gives_the_tree_of_init_and_its_adapter():
  model = looped()
  params = retrofit(source(), model, **CHOSEN, key=jax.random.key(3))
  expected = parameter_shapes(model)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)
  adapter = params['cell']['inject']['adapter']['kernel']
  assert 0.1 < np.abs(adapter).max() <= 1 / 8
  other = retrofit(source(), model, **CHOSEN)['cell']['inject']['adapter']['kernel']
  assert np.abs(adapter - other).max() > 0.01
  for name in ('read_in', 'read_out'):
    assert_same(params[name], source()[name])
  assert np.isfinite(loopformer.logits(model, params, TOKENS, steps=4)).all()


@pytest.mark.parametrize('change, words', [
    ({'coda': (8,)}, ['coda = (8,)', 'out of range', '0 to 7']),
    ({'prelude': (-1, 0)}, ['prelude = (-1, 0)', 'out of range']),
    ({'prelude': (0, True)}, ['layer True']),
    ({'prelude': (0, 1.0)}, ['layer 1.0']),
    ({'coda': (5,)}, ['core = (3, 4, 5) and coda = (5,) overlap', '[5]']),
    ({'prelude': (0, 4)}, ['prelude = (0, 4) and core', 'overlap', '[4]']),
    ({'core': (3, 4, 4)}, ['core = (3, 4, 4)', 'once']),
    ({'core': (3, 4)}, ['core = (3, 4)', '2 layers', '3']),
    ({'coda': ()}, ['coda = ()', '0 layers', '1']),
])
def test_retrofit_refuses_bad_layers(change, words):
  with pytest.raises(ConfigError) as error:
    retrofit(source(), looped(), **CHOSEN | change)
  for word in words:
    assert word in str(error.value)


def test_retrofit_refuses_other_models():
  with pytest.raises(ConfigError, match='Concat'):
    retrofit(source(), looped(inject=Add()), **CHOSEN)
  with pytest.raises(ConfigError, match='Concat'):
    retrofit(source(), looped(inject=Diagonal()), **CHOSEN)
  with pytest.raises(ConfigError, match='Concat'):
    retrofit(source(), plain(8), prelude=(), core=range(8), coda=())
  with pytest.raises(ConfigError, match='prelude: a stack of SandwichNorm.*pre-norm'):
    retrofit(source(), looped(block=functools.partial(layer, placement=SandwichNorm())), **CHOSEN)
  with pytest.raises(ConfigError, match=r'read_in/embedding.*\[50, 32\] from the source, \[51, 32\] in the model'):
    retrofit(source(), looped(read_in=Tokens(vocab=51, width=32, length=16)), **CHOSEN)
  with pytest.raises(ConfigError, match=r'mlp/down/kernel.*\[3, 40, 32\] from the source, \[3, 41, 32\]'):
    retrofit(source(), looped(block=functools.partial(layer, 41)), **CHOSEN)
  with pytest.raises(ConfigError, match='no weight of a plain model'):
    retrofit(retrofit(source(), looped(), **CHOSEN), looped(), **CHOSEN)
  with pytest.raises(ConfigError, match='one stack'):
    retrofit({'read_in': source()['read_in']}, looped(), **CHOSEN)


def test_converter_and_configuration_of_parcae_agree():
  """All but what a run decides: sizes, epsilons, initialisers, positions; layer by layer."""
  config = config_of('parcae', '140m').model
  kind = KINDS['parcae']
  model = kind.model(kind.sizes_of(config), config.loops, 'bfloat16')
  ours, theirs = (configs.describe(m).splitlines() for m in (config, model))
  assert len(ours) == len(theirs)
  differ = {line.split(' = ')[0].strip() for pair in zip(ours, theirs) for line in pair if len(set(pair)) > 1}
  assert differ == {'groups'}  # as many as heads: None there, the number here
