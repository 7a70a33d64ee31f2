"""Looped transformers in PyTorch, for transformers' AutoModelForCausalLM; shipped beside the weights of an export.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model(input_ids, steps=4).logits          # a budget: four equal steps
    model(input_ids, steps=(0.5, 0.25, 0.25)) # step sizes, of a model that is told them
    model(input_ids, output_hidden_states=True).hidden_states  # before the loop, after every step, before the head
    model.generate(input_ids, steps=4)        # the same steps for every token

`steps` is config.loops where it is left out, which `from_pretrained(folder, loops=4)` sets. The model is described in
config.json (`description`) part by part, and a part is one function here; the tree of modules is that of the tensors'
names (`shapes`). Products are nn.Linear in every layer (qkv, out, up, down), in the dtype of their weights; norms,
softmax, and the state are in float32. A cache holds keys and values of every application of a layer: those of the
prelude, of the coda, and then of the loop, step by step.
"""
import dataclasses
import math
import numbers
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel, initialization as init
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

CACHE = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast)
             if field.name in ('cache', 'past_key_values'))  # which of its names this version of transformers uses
LOSS_ARGUMENTS = ('num_items_in_batch', 'shift_labels', 'ignore_index')
HIDDEN = -1e30  # what is added to a score that must not count
log = logging.get_logger(__name__)


class LoopformerConfig(PretrainedConfig):
  """description: the model, part by part; shapes: of all parameters; loops: the steps that it takes by itself."""
  model_type = 'loopformer'
  keys_to_ignore_at_inference = ['cache', 'past_key_values']

  def __init__(self, description=None, shapes=None, loops=1, use_cache=True, **kwargs):
    kwargs.setdefault('tie_word_embeddings', False)
    super().__init__(**kwargs)
    self.description, self.shapes, self.loops, self.use_cache = description, shapes, loops, use_cache

  @property
  def num_hidden_layers(self):
    """Attentions of a pass of `loops` steps, of which a cache keeps keys and values."""
    if self.description is None:
      return 0
    before, each, after = _slots(self.description)
    return before + after + each * (self.loops if isinstance(self.loops, int) else len(self.loops))


class Product(nn.Linear):
  """x W^T + b in the dtype of W; float32 comes out, and the bias is added in it. Loop k adds (x a[k]) b[k] where there
  is an update of low rank for every loop, and the last of them where there are fewer than loops."""

  def forward(self, x, k=0):
    x = x.to(self.weight.dtype)
    y = functional.linear(x, self.weight).float()
    if 'a' in self._parameters:
      k = min(k, len(self.a) - 1)
      y = y + (x @ self.a[k] @ self.b[k]).float()
    return y if self.bias is None else y + self.bias.float()


class Layer(GradientCheckpointingLayer):
  """A layer of a stack; `part` says what it computes."""

  def forward(self, x, part, ctx, mod=None):
    return _block(part, self, x, ctx, mod)


@dataclasses.dataclass
class Context:
  """What attention needs. pos: i64[1 or B, T], places in the text; mask: f32[1 or B, 1 or H, T, S], added to scores;
  cache: of transformers, or None; columns: i64[T], the tokens' places in it; slot: its layer for the next attention;
  dtype: of products; tokens: i64[B, T], or None where embeddings were given; k: the step of the loop, from 0."""
  pos: torch.Tensor
  mask: torch.Tensor
  cache: Any
  columns: torch.Tensor
  dtype: torch.dtype
  slot: int = 0
  tokens: Any = None
  k: int = 0


class LoopformerForCausalLM(PreTrainedModel, GenerationMixin):
  """z = norm(coda(loop(prelude(embedding)))); logits = z E^T."""
  config_class = LoopformerConfig
  main_input_name = 'input_ids'
  supports_gradient_checkpointing = True
  accepts_loss_kwargs = True
  _no_split_modules = ['Layer']
  _tied_weights_keys = {'lm_head.weight': 'read_in.weight'}  # where config.tie_word_embeddings

  def __init__(self, config):
    super().__init__(config)
    for name, branch in _tree(config.shapes).items():
      self.add_module(name, _module(name, branch))
    if 'lm_head' not in self._modules:
      self.lm_head = Product(*reversed(config.shapes['read_in.weight']), bias=False)
    self.gradient_checkpointing = False
    self.post_init()

  def _init_weights(self, module):
    """First values of what is not read from a file: scales are one, matrices drawn from N(0, 0.02^2), all else zero.
    Those that a paper asks for are made by the library alone."""
    for name, leaf in module.named_parameters(recurse=False):
      if leaf.dim() > 1:
        init.normal_(leaf, std=0.02)
      else:
        init.constant_(leaf, float(name == 'scale'))

  def get_input_embeddings(self):
    return self.read_in

  def set_input_embeddings(self, value):
    self.read_in = value

  def get_output_embeddings(self):
    return self.lm_head

  def set_output_embeddings(self, new_embeddings):
    self.lm_head = new_embeddings

  def resize_token_embeddings(self, *args, **kwargs):
    """As transformers does it; config.json then describes the new model."""
    if any('.values.' in name for name in self.config.shapes):
      raise ValueError('resize_token_embeddings: layers of this model have embeddings of tokens too, which '
                       'are not resized')
    table = super().resize_token_embeddings(*args, **kwargs)
    rows, description = table.weight.shape[0], self.config.description
    for name in ('read_in.weight', 'lm_head.weight'):
      if name in self.config.shapes:
        self.config.shapes[name][0] = rows
    description['read_in']['vocab'] = rows
    if 'outputs' in description['read_out']:
      description['read_out']['outputs'] = rows
    return table

  def prepare_inputs_for_generation(self, input_ids, attention_mask=None, inputs_embeds=None, **kwargs):
    """Where rows are padded on the right, positions are counted by the mask: transformers counts on from padding. The
    tokenizer of `stop_strings` has told what to stop at."""
    kwargs.pop('tokenizer', None)
    inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask,
                                                   inputs_embeds=inputs_embeds, **kwargs)
    if attention_mask is not None and attention_mask.dim() == 2 and (
        attention_mask[:, 1:] < attention_mask[:, :-1]).any():
      inputs.pop('position_ids', None)
    return inputs

  @staticmethod
  def create_masks_for_generate(attention_mask=None, **_):
    """The mask as it is: it is made ready for attention here."""
    return attention_mask

  def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
              inputs_embeds=None, labels=None, use_cache=None, output_hidden_states=None, return_dict=None,
              logits_to_keep=0, steps=None, **kwargs):
    """input_ids i64[B, T] -> logits f32[B, T, V], and what else was asked for.

    Args:
      attention_mask: [B, past + T], 0 for padding; or [B or 1, H or 1, T, past + T], booleans (True: is seen) or floats
        that are added to scores.
      position_ids: i64[B, T]; counted by the mask where they are left out. Without a mask, texts that are packed into
        a row see themselves alone.
      past_key_values, cache: a Cache of earlier tokens, under its old or its new name.
      inputs_embeds: [B, T, D], rows of the embedding, in the place of input_ids.
      labels: i64[B, T], -100 where none is asked for; the next token is predicted.
      output_hidden_states: whether to return K + 2 states f32[B, T, D] of K steps: that before the loop, that after
        each step, and what the head reads.
      logits_to_keep: the last so many tokens, or the indices of those, whose logits are wanted; 0 for all. 1 is the
        last of every row that is no padding.
      steps: a number of equal steps, or, of a model that is told them, their sizes with sum one.
      kwargs: of transformers' loss, such as num_items_in_batch.

    Raises:
      ValueError, TypeError: arguments that it cannot follow.
    """
    _check_rest(kwargs, self.config)
    model, config = self.config.description, self.config
    sizes = _sizes(config.loops if steps is None else steps, _is_told(model['cell']))
    if len(sizes) > model['loops'] and not torch.compiler.is_compiling():
      log.warning_once(f'{len(sizes)} steps, but the model was trained with at most {model["loops"]}: quality beyond '
                       'them is not known')
    if (input_ids is None) == (inputs_embeds is None):
      raise ValueError('input_ids, inputs_embeds: give one of them')
    embeds = self.read_in(input_ids) if inputs_embeds is None else inputs_embeds
    cache = self._cache_for(past_key_values, cache, use_cache, sizes)
    ctx = _context(embeds, attention_mask, position_ids, cache, self.read_in.weight.dtype)
    ctx.tokens = input_ids
    e = model['read_in'].get('scale', 1.0) * embeds.float()
    if 'positions' in self._modules:
      _check_length(ctx.mask.shape[-1], ctx.pos, self.positions.num_embeddings)
      e = e + self.positions(ctx.pos).float()
    if model['prelude']:
      e = _stack(model['prelude'], self.prelude, e, ctx)
    x = _start(model['start'], e, ctx.pos)
    before, each, after = _slots(model)
    states = [x]
    for k, code in enumerate(_codes(model['cell'], self.cell, sizes, x.device)):
      step = dataclasses.replace(ctx, k=k, slot=before + after + k * each)
      states.append(_step(model['cell'], self.cell, states[-1], e, step, code))
    x, norm = states[-1], (model['read_out']['norm'], _child(_child(self, 'read_out'), 'norm'))
    if _kind(model['read_out']) == 'TwiceNormedHead':
      x = _norm(*norm, x)
    if model['bridge']:
      x = self.bridge(x)
    if model['coda']:
      ctx.slot = before
      x = _stack(model['coda'], self.coda, x, ctx)
    z = _norm(*norm, x)
    logits = self.lm_head(_kept(z, logits_to_keep, attention_mask))
    loss = None
    if labels is not None:
      if logits.shape[1] != z.shape[1]:
        raise ValueError(f'logits_to_keep = {logits_to_keep}: with labels, leave it out')
      given = {name: value for name, value in kwargs.items() if name in LOSS_ARGUMENTS}
      loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **given)
    wanted = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=(*states, z) if wanted else None,
                                    **{CACHE: cache})
    return output if return_dict is None or return_dict else output.to_tuple()

  def _cache_for(self, old, new, use_cache, sizes):
    """The cache of a pass; one belongs to its steps."""
    if old is not None and new is not None:
      raise ValueError('past_key_values, cache: they are two names of one argument; give one of them')
    cache = old if new is None else new
    if cache is not None and not isinstance(cache, Cache):
      raise TypeError(f'past_key_values = {type(cache).__name__}: give a Cache of transformers, such as DynamicCache()')
    if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
      if cache is not None and cache.get_seq_length():
        raise ValueError('past_key_values: gradient checkpointing computes layers twice, which would write a cache '
                         'twice; leave one of them out')
      if use_cache or cache is not None:
        log.warning_once('a cache is of no use to gradient checkpointing, which computes layers twice: it is left out')
      return None
    if cache is None and (use_cache or use_cache is None and self.config.use_cache and not self.training):
      cache = DynamicCache()
    if cache is not None:
      if cache.get_seq_length() and getattr(cache, 'steps', sizes) != sizes:
        raise ValueError(f'steps: the cache holds tokens of {len(cache.steps)} steps ({cache.steps}), and these would '
                         f'be of {len(sizes)} ({sizes}); give the same steps for all tokens, or a new cache')
      before, each, after = _slots(self.config.description)
      slots = before + after + each * len(sizes)
      if isinstance(cache, DynamicCache):  # made for another number of steps, perhaps
        cache.layers += [DynamicLayer() for _ in range(len(cache.layers), slots)]
      elif len(cache.layers) < slots:
        raise ValueError(f'past_key_values: the {type(cache).__name__} has {len(cache.layers)} layers, and '
                         f'{len(sizes)} steps need {slots}; load the model with loops={len(sizes)}, or take a '
                         'DynamicCache')
      cache.steps = sizes
    return cache


# Arguments -----------------------------------------------------------------------------------------------------------


def _check_rest(given, config):
  """Raises where an argument would have no effect."""
  if given.get('output_attentions', config.output_attentions):
    raise ValueError('output_attentions = True: attention weights are not kept; leave it out')
  for name, value in given.items():
    if value is not None and name not in (*LOSS_ARGUMENTS, 'output_attentions', 'cache_position'):
      raise TypeError(f'{name}: LoopformerForCausalLM takes no such argument; see the docstring of its forward')


def _is_told(cell):
  cell = _inner(cell)
  return _kind(cell) == 'Timed' and _kind(cell['condition']) == 'Trajectory'


def _sizes(steps, told):
  """Step sizes of a number of steps; or sizes, checked, of a model that is told them."""
  if isinstance(steps, (list, tuple)):
    if not told:
      raise ValueError(f'steps = {steps}: this model is not told how far a step goes; give the number of steps')
    if not all(isinstance(size, numbers.Real) and not isinstance(size, bool) and size > 0 for size in steps) or (
        not abs(sum(steps) - 1) <= 1e-4):
      raise ValueError(f'steps = {steps}: sizes of steps are numbers above 0 with sum one, such as (0.5, 0.25, 0.25)')
    return [float(size) for size in steps]
  if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
    raise ValueError(f'steps = {steps!r}: give a number of steps, 1 or more' +
                     (', or their sizes, such as (0.5, 0.25, 0.25)' if told else ''))
  return [1 / int(steps)] * int(steps)


def _context(embeds, mask, pos, cache, dtype):
  """Positions and the mask of tokens after those in the cache."""
  rows, new = embeds.shape[:2]
  past = 0 if cache is None else int(cache.get_seq_length())
  columns = torch.arange(past + new, device=embeds.device)
  if mask is not None and (mask.dim() not in (2, 4) or mask.shape[-1] != past + new or mask.dim() == 4 and
                           mask.shape[2] != new or mask.shape[0] not in (1, rows)):
    raise ValueError(f'attention_mask: its shape is {list(mask.shape)}; for {rows} rows of {new} tokens after {past} '
                     f'in the cache give [{rows}, {past + new}], or [{rows}, 1, {new}, {past + new}]')
  seen = (columns <= columns[past:, None])[None, None]
  if mask is None:
    if pos is not None and not past:  # texts in a row begin where positions do not go on
      text = functional.pad(pos[:, 1:] != pos[:, :-1] + 1, (1, 0)).cumsum(-1)
      seen = seen & (text[:, None, :, None] == text[:, None, None, :])
    pos = columns[None, past:] if pos is None else pos
  elif mask.dim() == 2:
    seen = seen & mask.bool()[:, None, None]
    pos = (mask.bool().cumsum(-1) - 1).clamp(min=0)[:, past:] if pos is None else pos
  else:
    pos = columns[None, past:] if pos is None else pos
    seen = mask
  added = seen.float().clamp(min=HIDDEN) if seen.is_floating_point() else torch.where(seen, 0.0, HIDDEN)
  return Context(pos=pos, mask=added, cache=cache, columns=columns[past:], dtype=dtype)


def _check_length(columns, pos, length):
  """Raises where a text is longer than the table of positions; padding does not count."""
  if columns > length and (torch.compiler.is_compiling() or int(pos.max()) >= length):
    raise ValueError(f'input_ids: texts of more than {length} tokens, for which the model has no positions '
                     '(max_position_embeddings); shorten them, or generate fewer tokens')


def _kept(z, keep, mask):
  """The states whose logits are wanted."""
  if isinstance(keep, int) and keep == 1 and mask is not None and mask.dim() == 2:
    real = mask[:, -z.shape[1]:].bool()
    last = (real * torch.arange(1, z.shape[1] + 1, device=z.device)).argmax(-1)
    return z[torch.arange(len(z), device=z.device), last][:, None]
  return z[:, -keep:] if isinstance(keep, int) else z[:, keep]


# Trees ---------------------------------------------------------------------------------------------------------------


def _tree(flat):
  """Dotted names as nested dicts."""
  tree = {}
  for path, leaf in flat.items():
    *folders, name = path.split('.')
    folder = tree
    for part in folders:
      folder = folder.setdefault(part, {})
    folder[name] = leaf
  return tree


def _module(name, tree):
  """The module of a tree of shapes; what is neither a table nor a product is a folder of parameters and modules."""
  if name in ('read_in', 'positions'):
    return nn.Embedding(*tree['weight'])
  if 'weight' in tree:
    module = Product(*reversed(tree['weight']), bias='bias' in tree)
    for name in ('a', 'b'):
      if name in tree:
        module.register_parameter(name, nn.Parameter(torch.zeros(tree[name])))
    return module
  if name == 'layers':
    return nn.ModuleList(_module(name, branch) for name, branch in tree.items())
  module = Layer() if name.isdigit() else nn.Module()
  for name, branch in tree.items():
    if isinstance(branch, dict):
      module.add_module(name, _module(name, branch))
    else:
      module.register_parameter(name, nn.Parameter(torch.zeros(branch)))
  return module


def _child(module, name):
  return getattr(module, name, None)


def _slots(model):
  """Attentions of prelude, of a step of the loop, and of coda."""

  def of_block(part):
    return sum(map(of_block, part['blocks'])) if _kind(part) == 'Chain' else 1

  def of(part):
    return len(part['order'] or range(part['depth'])) * of_block(part['block']) if part else 0

  return of(model['prelude']), of(_inner(model['cell'])['core']), of(model['coda'])


def _kind(part):
  return part.get('part', part.get('function')).split('.')[-1]


# The state before the loop -------------------------------------------------------------------------------------------


def _start(part, e, pos):
  """f32[B, T, D]: the input, zeros, or noise: a token's own by its position, the same in every text and every pass."""
  kind = _kind(part)
  if kind != 'Noise':
    return torch.zeros_like(e) if kind == 'Zeros' else e
  number = torch.arange(e.shape[-1], device=e.device)
  key = _threefry((0, 0), torch.zeros_like(pos), pos.clamp(min=0))
  bits = torch.bitwise_xor(*_threefry([word[..., None] for word in key], torch.zeros_like(number), number))
  end = math.erf(3 / math.sqrt(2))  # a normal law, cut at three standard deviations
  uniform = (bits >> 9).to(torch.float32) / 2 ** 23 * (2 * end) - end
  return (part['std'] * math.sqrt(2) * torch.erfinv(uniform)).expand_as(e)


def _threefry(key, *words):
  """Threefry 2x32 of 20 rounds (Salmon et al., 2011), by which JAX draws: two i64 tensors below 2^32 of two others."""
  most, keys = 2 ** 32 - 1, (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
  a, b = ((word + own) & most for word, own in zip(words, keys))
  for turn in range(5):
    for shift in ((13, 15, 26, 6), (17, 29, 16, 24))[turn % 2]:
      a = (a + b) & most
      b = ((b << shift | b >> 32 - shift) & most) ^ a
    a, b = (a + keys[(turn + 1) % 3]) & most, (b + keys[(turn + 2) % 3] + turn + 1) & most
  return a, b


# Cells: (what a step needs, state, input) -> state -------------------------------------------------------------------


def _inner(cell):
  """The cell within those that stand around it, whose weights lie beside theirs."""
  while 'of' in cell:
    cell = cell['of']
  return cell


def _step(cell, w, x, e, ctx, code):
  """The state after a step; code: of a cell that is told where the step stands."""
  kind = _kind(cell)
  if kind == 'Halting':  # its gate tells when to leave the loop, and changes no state
    return _step(cell['of'], w, x, e, ctx, code)
  if kind in ('Damped', 'Selective'):
    way = _step(cell['of'], w, x, e, ctx, code) - x
    return x + (cell['share'] if kind == 'Damped' else _share(w.share, way)) * way
  if kind == 'Recur':
    x = _inject(cell['inject'], _child(w, 'inject'), x, e)
  x = _stack(cell['core'], w.core, x, ctx, code)
  return _norm(cell['norm'], _child(w, 'norm'), x) if kind in ('Recur', 'Normed') else x


def _share(w, way):
  """f32[B, T, D] in (0, 1): how much of its way every channel goes."""
  return torch.exp(-functional.softplus(w.up(w.down(way))) * torch.exp(w.rates.float()))


def _codes(cell, w, sizes, device):
  """What every step is told: f32[K, N, 4, D], gates of attention and MLP, scales of attention and MLP, of every layer;
  or nothing."""
  cell = _inner(cell)
  if _kind(cell) != 'Timed':
    return [None] * len(sizes)
  dt = torch.tensor(sizes, dtype=torch.float64)
  if _kind(cell['condition']) == 'Trajectory':
    c = (_embed_scalar(w.condition.time, dt.cumsum(0) - dt, device) + _embed_scalar(w.condition.step, dt, device))
  else:
    c = _embed_scalar(w.condition.time, torch.arange(len(sizes)), device)
  kernel, bias = w.modulation.kernel.float(), w.modulation.bias.float()
  return torch.einsum('KD,NDgE->KNgE', functional.silu(c), kernel) + bias


def _embed_scalar(w, s, device, features=256):
  frequencies = torch.exp(-math.log(10000.0) * torch.arange(features // 2) / (features // 2))
  angle = s.float()[:, None] * frequencies
  x = torch.cat([angle.cos(), angle.sin()], -1).to(device)
  x = functional.silu(x @ w.first.kernel.float() + w.first.bias.float())
  return x @ w.last.kernel.float() + w.last.bias.float()


def _inject(part, w, x, e):
  kind = _kind(part)
  if kind == 'Add':
    return x + e
  if kind == 'Concat':
    return w.adapter(torch.cat([x, e], -1))
  if kind == 'Diagonal':
    delta = functional.softplus(w.dt.float())
    a = torch.exp(-(delta * torch.exp(w.log_a.float().clamp(-60.0, 60.0))).clamp(1e-7, 80.0))
    return a * x + delta * (e @ w.B.float())
  return x


# Layers --------------------------------------------------------------------------------------------------------------


def _stack(part, w, x, ctx, mods=None):
  order = part['order'] or range(part['depth'])
  for place, i in enumerate(order):
    x = w.layers[i](x, part['block'], ctx, None if mods is None else mods[place])
  return _norm(part['norm'], _child(w, 'norm'), x) if part['norm'] else x


def _block(part, w, x, ctx, mod):
  kind = _kind(part)
  if kind == 'Chain':
    for i, block in enumerate(part['blocks']):
      x = _block(block, getattr(w, f'blocks_{i}'), x, ctx, mod)
    return x
  placement = _kind(part['placement'])
  if placement != 'PreNorm':
    norms = [lambda x, n=n: _norm(part['norm'], _child(w, n), x) for n in ('n1', 'n2', 'n3', 'n4')]
    before = (lambda x: x, lambda x: x) if placement == 'PostNorm' else norms[::2]
    branches = (lambda x: _attention(part['attn'], w.attn, x, ctx), lambda x: _mlp(part['mlp'], w.mlp, x, ctx.k))
    for read, branch, norm in zip(before, branches, norms[1::2]):
      x = norm(x + branch(read(x))) if placement == 'SandwichNorm' else x + norm(branch(read(x)))
    return x
  g_a, g_m, s_a, s_m = (1.0, 1.0, 0.0, 0.0) if mod is None else mod
  x = x + g_a * _attention(part['attn'], w.attn, _norm(part['norm'], _child(w, 'norm_attn'), x) * (1 + s_a), ctx)
  return x + g_m * _mlp(part['mlp'], w.mlp, _norm(part['norm'], _child(w, 'norm_mlp'), x) * (1 + s_m), ctx.k)


def _attention(part, w, x, ctx):
  """Causal; the product holds, for every group of heads, its queries, then a key and a value."""
  heads, groups = part['heads'], part['groups'] or part['heads']
  head, each = part.get('head') or x.shape[-1] // heads, heads // groups
  alibi = part['position'] is not None and _kind(part['position']) == 'Alibi'
  qkv = _times(w.qkv, x, ctx.k).unflatten(-1, (groups, each + 2, head))
  q, k, v = qkv[..., :each, :].flatten(2, 3), qkv[..., each, :], qkv[..., each + 1, :]
  biases = (_child(w, f'{name}_bias') for name in 'qkv')
  q, k, v = (t if bias is None else t + bias.float() for t, bias in zip((q, k, v), biases))
  if part.get('values'):
    v = v + _of_tokens(part['values'], w.values, x, ctx.tokens).view_as(v)
  if part['norm']:
    q, k = _norm(part['norm'], _child(w, 'norm_q'), q), _norm(part['norm'], _child(w, 'norm_k'), k)
  if part['position'] and not alibi:
    q, k = _turn(part['position'], q, ctx.pos), _turn(part['position'], k, ctx.pos)
  if part.get('norm_qk'):
    q, k = _norm(part['norm_qk'], _child(w, 'norm_qk'), q), _norm(part['norm_qk'], _child(w, 'norm_qk'), k)
  if alibi:
    k = _with_places(k, ctx.pos)
  q, k, v = (t.to(ctx.dtype).transpose(1, 2) for t in (q, k, v))
  mask = ctx.mask
  if ctx.cache is not None:
    k, v = ctx.cache.update(k, v, ctx.slot, {'cache_position': ctx.columns})  # which some versions ask for
    ctx.slot += 1
    mask = functional.pad(mask, (0, k.shape[2] - mask.shape[-1]), value=HIDDEN)  # a static cache has room left
  k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
  if alibi:  # less slope * (the query's place - the key's), of which a softmax forgets what all keys of a query share
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1, device=k.device) / heads)
    mask = mask + slopes[:, None, None] * k[..., head:].float().sum(-1)[:, :, None]
    k = k[..., :head]
  scores = (q @ k.transpose(2, 3)).float() / math.sqrt(head)
  weights = (scores + mask).softmax(-1).to(ctx.dtype)
  return _times(w.out, (weights @ v).transpose(1, 2).flatten(2), ctx.k)


def _times(w, x, k):
  """The product of step k: what takes a Product's place, as quantised ones do, is told no step."""
  return w(x, k) if 'a' in w._parameters else w(x)


def _of_tokens(part, w, x, tokens):
  """f32[B, T, G, d]: an embedding of the tokens, gated for every group of heads by the first channels of x."""
  if tokens is None:
    raise ValueError('inputs_embeds: layers of this model have embeddings of tokens too; give input_ids')
  gate = 2 * torch.sigmoid(x[..., :part['features']].float() @ w.gate.float())
  return gate[..., None] * w.embedding.float()[tokens].unflatten(-1, (gate.shape[-1], -1))


def _with_places(k, pos):
  """[B, T, G, d + 2]: keys that carry their places into the cache, as multiples of 256 and the rest, which bfloat16
  holds.
  """
  place = torch.stack([pos // 256 * 256, pos % 256], -1)[:, :, None]
  return torch.cat([k, place.to(k.dtype).expand(*k.shape[:3], 2)], -1)


def _turn(part, x, pos):
  """Pairs of channels (2 i, 2 i + 1) turn by pos * base^(-2 i / d)."""
  half = x.shape[-1] // 2
  turns = part['base'] ** (-torch.arange(half, device=x.device).float() / half)
  if _kind(part) == 'StretchedRotary':
    kept = (part['original'] * turns / (2 * math.pi) - part['low']) / (part['high'] - part['low'])
    turns = turns * (kept.clamp(0, 1) + (1 - kept.clamp(0, 1)) / part['factor'])
  angle = pos[..., None].float() * turns
  cos, sin = angle.cos()[:, :, None], angle.sin()[:, :, None]
  even, odd = x[..., 0::2], x[..., 1::2]
  return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


ACTIVATIONS = {'gelu': functional.gelu, 'gelu_tanh': lambda x: functional.gelu(x, approximate='tanh'),
               'silu': functional.silu, 'squared_relu': lambda x: 0.5 * functional.relu(x).square()}


def _mlp(part, w, x, k):
  activation, up = ACTIVATIONS[_kind(part['activation'])], _times(w.up, x, k)
  if _kind(part) == 'GatedMLP':
    gate, up = up.chunk(2, -1)
    return _times(w.down, activation(gate) * up, k)
  return _times(w.down, activation(up), k)


def _norm(part, w, x):
  kind = _kind(part)
  if kind == 'Identity':
    return x
  if kind == 'AcrossHeads':
    return _norm(part['of'], w, x.flatten(-2)).view_as(x)
  x = x.float()
  if kind == 'LayerNorm':
    x = x - x.mean(-1, keepdim=True)
  x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + part['eps'])
  if kind == 'UnitNorm':
    return x
  return x * w.scale.float() + (w.bias.float() if kind == 'LayerNorm' else 0)
