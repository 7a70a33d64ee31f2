"""Decoders of Llama's kind in NumPy, written from their papers: random weights in Hugging Face's names, and logits."""
import json
from pathlib import Path

import numpy as np

V, D, F, N, H, G, T = 48, 32, 64, 3, 4, 2, 16  # vocabulary, width, hidden, layers, heads, groups, positions
BASE = {'hidden_size': D, 'intermediate_size': F, 'num_hidden_layers': N, 'num_attention_heads': H,
        'num_key_value_heads': G, 'vocab_size': V, 'max_position_embeddings': T, 'rms_norm_eps': 1e-2,
        'rope_theta': 50.0, 'hidden_act': 'silu', 'tie_word_embeddings': True, 'eos_token_id': 5}
CONFIGS = {
    'llama': BASE | {'model_type': 'llama'},
    'untied': BASE | {'model_type': 'llama', 'tie_word_embeddings': False, 'head_dim': D // H},
    'ungrouped': BASE | {'model_type': 'mistral', 'num_key_value_heads': H, 'sliding_window': None},
    'biased': BASE | {'model_type': 'llama', 'attention_bias': True},
    'qwen2': BASE | {'model_type': 'qwen2', 'use_sliding_window': False, 'sliding_window': 8},
    'qwen3': BASE | {'model_type': 'qwen3', 'tie_word_embeddings': False},
    'wide': BASE | {'model_type': 'llama', 'head_dim': 12},
    'narrow': BASE | {'model_type': 'mistral', 'head_dim': 6, 'num_key_value_heads': 1, 'sliding_window': T},
    'qwen3_wide': BASE | {'model_type': 'qwen3', 'head_dim': 16},
    'olmo2': BASE | {'model_type': 'olmo2', 'num_key_value_heads': G, 'tie_word_embeddings': False},
    'nanbeige': BASE | {'model_type': 'nanbeige', 'head_dim': 16, 'tie_word_embeddings': False, 'num_loops': 2,
                        'loop_loss_weights': [], 'skip_loop_final_norm': False},
    'nanbeige_skip': BASE | {'model_type': 'nanbeige', 'tie_word_embeddings': False, 'num_loops': 3,
                             'skip_loop_final_norm': True},
    'llama3': BASE | {'model_type': 'llama', 'rope_scaling': {
        'rope_type': 'llama3', 'factor': 4.0, 'low_freq_factor': 0.6, 'high_freq_factor': 1.3,
        'original_max_position_embeddings': 12}},
    'rope_parameters': {k: v for k, v in BASE.items() if k != 'rope_theta'} | {
        'model_type': 'llama', 'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0}},
}


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Random float32 tensors under their names; scales near one, all else wide enough that every part is felt."""
  rng = np.random.default_rng(seed)
  d, groups = config.get('head_dim', D // H), config['num_key_value_heads']
  shapes = {'model.embed_tokens.weight': (V, D), 'model.norm.weight': (D,)}
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (V, D)
  biased = {'qwen2': 'qkv'}.get(config['model_type'], 'qkvo' if config.get('attention_bias') else '')
  for i in range(config['num_hidden_layers']):
    first = 'post_feedforward_layernorm' if config['model_type'] == 'olmo2' else 'input_layernorm'
    layer = {f'{first}.weight': (D,), 'post_attention_layernorm.weight': (D,),
             'mlp.gate_proj.weight': (F, D), 'mlp.up_proj.weight': (F, D), 'mlp.down_proj.weight': (D, F)}
    for name, rows in (('q', H * d), ('k', groups * d), ('v', groups * d), ('o', D)):
      layer[f'self_attn.{name}_proj.weight'] = (rows, H * d if name == 'o' else D)
      if name in biased:
        layer[f'self_attn.{name}_proj.bias'] = (rows,)
    if config['model_type'] == 'qwen3':
      layer |= {'self_attn.q_norm.weight': (d,), 'self_attn.k_norm.weight': (d,)}
    if config['model_type'] == 'olmo2':
      layer |= {'self_attn.q_norm.weight': (H * d,), 'self_attn.k_norm.weight': (groups * d,)}
    shapes |= {f'model.layers.{i}.{name}': shape for name, shape in layer.items()}
  return {name: ((1 if 'norm' in name else 0) + 0.3 * rng.standard_normal(shape)).astype(np.float32)
          for name, shape in shapes.items()}


def rms(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def turn(x, base, scaling):
  """Rotary positions, half by half: [T, heads, d]; scaling: of Llama 3.1, by the wavelength of each pair."""
  half = x.shape[-1] // 2
  turns = base ** (-np.arange(half) / half)
  if scaling:
    factor, low, high, original = (scaling[name] for name in ('factor', 'low_freq_factor', 'high_freq_factor',
                                                              'original_max_position_embeddings'))
    for i, wave in enumerate(2 * np.pi / turns):
      if wave > original / low:
        turns[i] /= factor
      elif wave >= original / high:
        smooth = (original / wave - low) / (high - low)
        turns[i] = (1 - smooth) * turns[i] / factor + smooth * turns[i]
  angle = np.arange(len(x))[:, None, None] * turns
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def logits(sd: dict[str, np.ndarray], config: dict, tokens: np.ndarray, order=None) -> np.ndarray:
  """f64[B, T, V]; `order`: numbers of the layers as they run."""
  sd = {name: np.asarray(value, np.float64) for name, value in sd.items()}
  order = range(config['num_hidden_layers']) if order is None else order
  return np.stack([_one(sd, config, row, order) for row in tokens])


def _one(sd, config, tokens, order):
  eps, x = config['rms_norm_eps'], sd['model.embed_tokens.weight'][tokens]
  for loop in range(last := config.get('num_loops', 1)):
    for i in order:
      x = _layer({name.removeprefix(f'model.layers.{i}.'): value for name, value in sd.items()}, config, x)
    if loop + 1 == last or not config.get('skip_loop_final_norm'):
      x = rms(x, sd['model.norm.weight'], eps)
  return x @ sd.get('lm_head.weight', sd['model.embed_tokens.weight']).T


def _layer(layer, config, x):
  """x [T, D] after a layer; its norms stand before the branches, or where there is no input_layernorm after them."""
  eps, groups = config['rms_norm_eps'], config['num_key_value_heads']
  base = config.get('rope_theta') or config['rope_parameters']['rope_theta']
  d, post = config.get('head_dim', D // H), 'input_layernorm.weight' not in layer
  mask = np.where(np.tril(np.ones(2 * (len(x),))) > 0, 0, -np.inf)

  def normed(name, x):
    return rms(x, layer[f'{name}.weight'], eps)

  def project(name, x, heads):
    y = x @ layer[f'self_attn.{name}_proj.weight'].T + layer.get(f'self_attn.{name}_proj.bias', 0)
    scale = layer.get(f'self_attn.{name}_norm.weight')
    if scale is not None and len(scale) == heads * d and post:
      y, scale = rms(y, scale, eps), None
    y = y.reshape(len(x), heads, d)
    return y if scale is None else rms(y, scale, eps)

  h = x if post else normed('input_layernorm', x)
  q, k, v = project('q', h, H), project('k', h, groups), project('v', h, groups)
  scaling = config.get('rope_scaling')
  q, k = turn(q, base, scaling), turn(k, base, scaling)
  heads = []
  for head in range(H):
    group = head // (H // groups)
    score = q[:, head] @ k[:, group].T / np.sqrt(d) + mask
    weight = np.exp(score - score.max(-1, keepdims=True))
    heads.append(weight / weight.sum(-1, keepdims=True) @ v[:, group])
  branch = np.concatenate(heads, -1) @ layer['self_attn.o_proj.weight'].T + layer.get('self_attn.o_proj.bias', 0)
  x = x + (normed('post_attention_layernorm', branch) if post else branch)
  h = x if post else normed('post_attention_layernorm', x)
  gate = h @ layer['mlp.gate_proj.weight'].T
  branch = (gate / (1 + np.exp(-gate)) * (h @ layer['mlp.up_proj.weight'].T)) @ layer['mlp.down_proj.weight'].T
  return x + (normed('post_feedforward_layernorm', branch) if post else branch)


def mean_nll(logits: np.ndarray, tokens: np.ndarray) -> float:
  """Nats a token, of each token after its first."""
  logits = np.asarray(logits, np.float64)[:, :-1]
  most = logits.max(-1, keepdims=True)
  logp = logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))
  return -np.take_along_axis(logp, tokens[:, 1:, None], -1).mean()


def save(folder: Path, config: dict, sd: dict, files: int = 1):
  """A folder as transformers writes it."""
  from safetensors.numpy import save_file
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  if files == 1:
    return save_file(sd, folder / 'model.safetensors')
  names = [f'model-{i + 1:05}-of-{files:05}.safetensors' for i in range(files)]
  places = {tensor: names[i % files] for i, tensor in enumerate(sd)}
  for name in names:
    save_file({tensor: sd[tensor] for tensor in sd if places[tensor] == name}, folder / name)
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': places}))
