"""LoopFormer and its sister models in NumPy, float64, from the equations; it shares no code with the library.

Weights are state dicts as the official PyTorch code names and lays them out ([out, in] matrices). Letters: B batch,
T tokens, D width, H heads, F hidden width, V vocabulary, k layers, P positions.
"""
from __future__ import annotations

import math

import numpy as np

KINDS = ('loopformer', 'base', 'base_loop', 'tmlt')
EPSILON = 2.0 ** -23  # of float32, in which the official code computes its norms
# No two of these are equal, nor equal to 3 (q, k, v), 4 (gates and scales) or the width of a head (8).
SIZES = dict(V=50, P=16, D=48, F=80, k=2)
HEADS = 6


def random_state_dict(kind: str, seed: int = 0, std: float = 0.2, *, V: int, P: int, D: int, F: int, k: int):
  """An official state dict {key: f32 array} with weights, biases and norms that are all far from trivial."""
  rng = np.random.default_rng(seed)
  shapes = {'transformer.wte.weight': (V, D), 'transformer.wpe.weight': (P, D), 'transformer.norm_f.weight': (D,)}
  for i in range(k):
    layer = layer_prefix(kind, i)
    shapes |= {layer + 'attn.c_attn.weight': (3 * D, D), layer + 'attn.c_proj.weight': (D, D),
               layer + 'mlp.c_fc.weight': (F, D), layer + 'mlp.c_proj.weight': (D, F)}
    if kind in ('base', 'base_loop'):
      shapes |= {layer + 'norm_1.weight': (D,), layer + 'norm_2.weight': (D,)}
    else:
      shapes |= {layer + 'adaLN_modulation.1.weight': (4 * D, D), layer + 'adaLN_modulation.1.bias': (4 * D,)}
  for net in {'loopformer': ('time_embedder', 'dt_embedder'), 'tmlt': ('time_embedder',)}.get(kind, ()):
    shapes |= {f'{net}.mlp.0.weight': (D, 256), f'{net}.mlp.0.bias': (D,),
               f'{net}.mlp.2.weight': (D, D), f'{net}.mlp.2.bias': (D,)}
  sd = {key: (std * rng.normal(size=shape)).astype(np.float32) for key, shape in shapes.items()}
  for key in sd:
    if 'norm_' in key:
      sd[key] += 1
    if '.mlp.2.' in key:  # of the embedders: conditions of size one, not ten, else float32 itself errs by 1e-3
      sd[key] /= 4
  sd['lm_head.weight'] = sd['transformer.wte.weight']
  return sd


def layer_prefix(kind: str, i: int) -> str:
  return f'transformer.h.{i}.' if kind == 'base' else f'transformer.h.blocks.{i}.'


def forward(sd, kind: str, tokens: np.ndarray, steps, heads: int) -> np.ndarray:
  """Logits, f64[B, T, V], of i32[B, T] tokens after one application of the layers for every one of `steps`.

  base and base_loop take no notice of the sizes of steps, tmlt of their number alone.
  """
  w = {key: value.astype(np.float64) for key, value in sd.items()}
  depth = sum(key.endswith('attn.c_attn.weight') for key in w)
  x = w['transformer.wte.weight'][tokens] + w['transformer.wpe.weight'][:tokens.shape[1]]
  t = 0.0
  for m, dt in enumerate(steps):
    if kind == 'loopformer':
      c = scalar_net(w, 'time_embedder', t) + scalar_net(w, 'dt_embedder', dt)
    elif kind == 'tmlt':
      c = scalar_net(w, 'time_embedder', m)
    for i in range(depth):
      layer = {key.removeprefix(prefix): value for prefix in [layer_prefix(kind, i)]
               for key, value in w.items() if key.startswith(prefix)}
      if kind in ('loopformer', 'tmlt'):
        g_a, g_m, s_a, s_m = np.split(
            layer['adaLN_modulation.1.weight'] @ silu(c) + layer['adaLN_modulation.1.bias'], 4)
        x = x + g_a * attention(layer, unit(x) * (1 + s_a), heads)
        x = x + g_m * mlp(layer, unit(x) * (1 + s_m))
      else:
        x = x + attention(layer, unit(x) * layer['norm_1.weight'], heads)
        x = x + mlp(layer, unit(x) * layer['norm_2.weight'])
    t = t + dt
  return unit(x) * w['transformer.norm_f.weight'] @ w['transformer.wte.weight'].T


def attention(layer, x: np.ndarray, heads: int) -> np.ndarray:
  """Causal softmax(q k^T / sqrt(d)) v, a head at a time; [B, T, D] -> [B, T, D]."""
  width = x.shape[-1]
  d = width // heads
  q, k, v = np.split(x @ layer['attn.c_attn.weight'].T, 3, axis=-1)
  out = np.zeros_like(x)
  for h in range(heads):
    own = slice(h * d, (h + 1) * d)
    for i in range(x.shape[1]):
      score = np.einsum('bd,bsd->bs', q[:, i, own], k[:, :i + 1, own]) / math.sqrt(d)
      weight = np.exp(score - score.max(-1, keepdims=True))
      weight = weight / weight.sum(-1, keepdims=True)
      out[:, i, own] = np.einsum('bs,bsd->bd', weight, v[:, :i + 1, own])
  return out @ layer['attn.c_proj.weight'].T


def mlp(layer, x: np.ndarray) -> np.ndarray:
  return gelu(x @ layer['mlp.c_fc.weight'].T) @ layer['mlp.c_proj.weight'].T


def gelu(x: np.ndarray) -> np.ndarray:
  """x times the normal distribution function, exactly."""
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def unit(x: np.ndarray) -> np.ndarray:
  """RMSNorm without a learned scale."""
  return x / np.sqrt(np.mean(x ** 2, -1, keepdims=True) + EPSILON)


def scalar_net(w, net: str, s: float) -> np.ndarray:
  """TimeEmbed and StepEmbed: a number -> [D]."""
  angle = s * np.exp(-math.log(10000) * np.arange(128) / 128)
  feature = np.concatenate([np.cos(angle), np.sin(angle)])
  hidden = silu(w[f'{net}.mlp.0.weight'] @ feature + w[f'{net}.mlp.0.bias'])
  return w[f'{net}.mlp.2.weight'] @ hidden + w[f'{net}.mlp.2.bias']
