"""Looped transformers in PyTorch, for transformers' AutoModelForCausalLM; shipped beside the weights of an export.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model(input_ids, steps=4).logits          # a budget: four equal steps
    model(input_ids, steps=(0.5, 0.25, 0.25)) # step sizes, of a model that is told them

The model is described in config.json (`description`) part by part, and a part is one function here. Parameters have
the names and layouts of the library that wrote them: kernels [in, out], layers stacked. Matrix products run in the
dtype of the parameters; norms, softmax, and the state in float32. There is no cache: generation computes all tokens
again.
"""
import math

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LoopformerConfig(PretrainedConfig):
  """description: the model, part by part; shapes: of all parameters."""
  model_type = 'loopformer'

  def __init__(self, description=None, shapes=None, loops=1, **kwargs):
    self.description, self.shapes, self.loops = description, shapes, loops
    kwargs.setdefault('tie_word_embeddings', False)
    kwargs.setdefault('use_cache', False)
    super().__init__(**kwargs)


class LoopformerForCausalLM(PreTrainedModel, GenerationMixin):
  """z = norm(coda(loop(prelude(embedding)))); logits = z E^T."""
  config_class = LoopformerConfig
  main_input_name = 'input_ids'

  def __init__(self, config):
    super().__init__(config)
    for path, shape in config.shapes.items():
      *folders, name = path.split('.')
      module = self
      for folder in folders:
        if folder not in module._modules:
          module.add_module(folder, nn.Module())
        module = module._modules[folder]
      module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    self.post_init()

  def _init_weights(self, module):
    """Weights are read, never drawn."""

  def get_input_embeddings(self):
    return None

  def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
    return {'input_ids': input_ids, 'attention_mask': attention_mask, 'steps': kwargs.get('steps')}

  def forward(self, input_ids, attention_mask=None, steps=None, labels=None, **_):
    """input_ids i64[B, T], attention_mask [B, T] (0: padding) -> logits f32[B, T, V].

    steps: a number of equal steps, or their sizes, with sum one; the model's own number by default.
    """
    model, w = self.config.description, _tree(self.named_parameters())
    if attention_mask is None:
      attention_mask = torch.ones_like(input_ids)
    pos = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    causal = torch.ones(2 * (input_ids.shape[1],), dtype=torch.bool, device=input_ids.device).tril()
    ctx = (pos, causal & attention_mask.bool()[:, None])
    table = w['read_in']['embedding']
    e = model['read_in'].get('scale', 1.0) * functional.embedding(input_ids, table).float()
    if 'positions' in w['read_in']:
      e = e + w['read_in']['positions'][pos].float()
    if model['prelude']:
      e = _stack(model['prelude'], w['prelude'], e, ctx)
    x = torch.zeros_like(e) if _kind(model['start']) == 'Zeros' else e
    x = _loop(model['cell'], w['cell'], x, e, ctx, _schedule(self.config.loops if steps is None else steps))
    read_out = w.get('read_out', {})
    if _kind(model['read_out']) == 'TwiceNormedHead':
      x = _norm(model['read_out']['norm'], read_out.get('norm'), x)
    if model['bridge']:
      x = _linear(w['bridge'], x)
    if model['coda']:
      x = _stack(model['coda'], w['coda'], x, ctx)
    z = _norm(model['read_out']['norm'], read_out.get('norm'), x)
    table = read_out.get('kernel', table)
    logits = (z.to(table.dtype) @ table.T).float()
    loss = None if labels is None else functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return CausalLMOutput(loss=loss, logits=logits)


def _tree(parameters):
  """Dotted names as nested dicts."""
  tree = {}
  for path, leaf in parameters:
    *folders, name = path.split('.')
    folder = tree
    for part in folders:
      folder = folder.setdefault(part, {})
    folder[name] = leaf
  return tree


def _slice(tree, i):
  return {name: _slice(leaf, i) if isinstance(leaf, dict) else leaf[i] for name, leaf in tree.items()}


def _kind(part):
  return part.get('part', part.get('function')).split('.')[-1]


def _schedule(steps):
  sizes = [1 / steps] * steps if isinstance(steps, int) else list(steps)
  if not sizes or min(sizes) <= 0 or abs(sum(sizes) - 1) > 1e-4:
    raise ValueError(f'steps = {steps}: give a number of steps, or their sizes, all above 0 and with sum one')
  return sizes


# Cells: (what a step needs, state, input) -> state ------------------------------------------------------------------


def _loop(cell, w, x, e, ctx, sizes):
  core, kind = cell['core'], _kind(cell)
  codes = _modulations(cell, w, sizes, x.device) if kind == 'Timed' else [None] * len(sizes)
  for code in codes:
    if kind == 'Recur':
      x = _inject(cell['inject'], w.get('inject', {}), x, e)
    x = _stack(core, w['core'], x, ctx, code)
    if kind == 'Recur':
      x = _norm(cell['norm'], w.get('norm'), x)
  return x


def _modulations(cell, w, sizes, device):
  """f32[K, N, 4, D]: gates of attention and MLP, scales of attention and MLP, of every step and layer."""
  dt = torch.tensor(sizes, dtype=torch.float64)
  condition = w['condition']
  if _kind(cell['condition']) == 'Trajectory':
    c = _embed_scalar(condition['time'], dt.cumsum(0) - dt, device) + _embed_scalar(condition['step'], dt, device)
  else:
    c = _embed_scalar(condition['time'], torch.arange(len(sizes)), device)
  kernel, bias = w['modulation']['kernel'].float(), w['modulation']['bias'].float()
  return torch.einsum('KD,NDgE->KNgE', functional.silu(c), kernel) + bias


def _embed_scalar(w, s, device, features=256):
  frequencies = torch.exp(-math.log(10000.0) * torch.arange(features // 2) / (features // 2))
  angle = s.float()[:, None] * frequencies
  x = torch.cat([angle.cos(), angle.sin()], -1).to(device)
  x = functional.silu(x @ w['in']['kernel'].float() + w['in']['bias'].float())
  return x @ w['out']['kernel'].float() + w['out']['bias'].float()


def _inject(part, w, x, e):
  kind = _kind(part)
  if kind == 'Add':
    return x + e
  if kind == 'Concat':
    return _linear(w['adapter'], torch.cat([x, e], -1))
  if kind == 'Diagonal':
    delta = functional.softplus(w['dt'].float())
    a = torch.exp(-(delta * torch.exp(w['log_a'].float().clamp(-60.0, 60.0))).clamp(1e-7, 80.0))
    return a * x + delta * (e @ w['B'].float())
  return x


# Layers --------------------------------------------------------------------------------------------------------------


def _stack(part, w, x, ctx, mods=None):
  order = part['order'] or range(part['depth'])
  for place, i in enumerate(order):
    x = _block(part['block'], _slice(w['block'], i), x, ctx, None if mods is None else mods[place])
  return _norm(part['norm'], w.get('norm'), x) if part['norm'] else x


def _block(part, w, x, ctx, mod):
  kind = _kind(part)
  if kind == 'Chain':
    for i, block in enumerate(part['blocks']):
      x = _block(block, w[f'blocks_{i}'], x, ctx, mod)
    return x
  if _kind(part['placement']) == 'SandwichNorm':
    norms = [lambda x, n=n: _norm(part['norm'], w.get(n), x) for n in ('n1', 'n2', 'n3', 'n4')]
    x = norms[1](x + _attention(part['attn'], w['attn'], norms[0](x), ctx))
    return norms[3](x + _mlp(part['mlp'], w['mlp'], norms[2](x)))
  g_a, g_m, s_a, s_m = (1.0, 1.0, 0.0, 0.0) if mod is None else mod
  x = x + g_a * _attention(part['attn'], w['attn'], _norm(part['norm'], w.get('norm_attn'), x) * (1 + s_a), ctx)
  return x + g_m * _mlp(part['mlp'], w['mlp'], _norm(part['norm'], w.get('norm_mlp'), x) * (1 + s_m))


def _attention(part, w, x, ctx):
  """Causal; the kernel holds, for every group of heads, its queries, then a key and a value."""
  pos, mask = ctx
  heads, groups = part['heads'], part['groups'] or part['heads']
  head, each = x.shape[-1] // heads, heads // groups
  qkv = _linear(w['qkv'], x).unflatten(-1, (groups, each + 2, head))
  q, k, v = qkv[..., :each, :].flatten(2, 3), qkv[..., each, :], qkv[..., each + 1, :]
  q, k, v = (t + w[f'{name}_bias'].float() if f'{name}_bias' in w else t for name, t in (('q', q), ('k', k), ('v', v)))
  if part['norm']:
    q, k = _norm(part['norm'], w.get('norm_q'), q), _norm(part['norm'], w.get('norm_k'), k)
  if part['position']:
    q, k = _turn(part['position'], q, pos), _turn(part['position'], k, pos)
  if part.get('norm_qk'):
    q, k = _norm(part['norm_qk'], w.get('norm_qk'), q), _norm(part['norm_qk'], w.get('norm_qk'), k)
  dtype = w['qkv']['kernel'].dtype
  q, k, v = (t.to(dtype).transpose(1, 2) for t in (q, k.repeat_interleave(each, 2), v.repeat_interleave(each, 2)))
  scores = (q @ k.transpose(2, 3)).float() / math.sqrt(head)
  weights = scores.masked_fill(~mask[:, None], -1e30).softmax(-1).to(dtype)
  return _linear(w['out'], (weights @ v).transpose(1, 2).flatten(2))


def _turn(part, x, pos):
  """Pairs of channels (2 i, 2 i + 1) turn by pos * base^(-2 i / d)."""
  half = x.shape[-1] // 2
  angle = pos[..., None].float() * part['base'] ** (-torch.arange(half, device=x.device).float() / half)
  cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
  even, odd = x[..., 0::2], x[..., 1::2]
  return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


ACTIVATIONS = {'gelu': functional.gelu, 'gelu_tanh': lambda x: functional.gelu(x, approximate='tanh'),
               'silu': functional.silu, 'squared_relu': lambda x: 0.5 * functional.relu(x).square()}


def _mlp(part, w, x):
  activation, up = ACTIVATIONS[_kind(part['activation'])], _linear(w['up'], x)
  if _kind(part) == 'GatedMLP':
    gate, up = up.chunk(2, -1)
    return _linear(w['down'], activation(gate) * up)
  return _linear(w['down'], activation(up))


def _linear(w, x):
  """In the dtype of the kernel; float32 comes out."""
  y = (x.to(w['kernel'].dtype) @ w['kernel']).float()
  return y + w['bias'].float() if 'bias' in w else y


def _norm(part, w, x):
  kind = _kind(part)
  if kind == 'Identity':
    return x
  x = x.float()
  if kind == 'LayerNorm':
    x = x - x.mean(-1, keepdim=True)
  x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + part['eps'])
  if kind == 'UnitNorm':
    return x
  return x * w['scale'].float() + (w['bias'].float() if kind == 'LayerNorm' else 0)
