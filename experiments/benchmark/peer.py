"""LoopFormer's training step in plain eager PyTorch, to measure ours against; written from the paper's sheet.

Needs PyTorch (the extra `peer`). It is what a careful user would write there: fused qkv, the library's fused attention,
two rollouts with shared weights, `torch.optim.AdamW(fused=True)` and norm clipping. Nothing else of it is used.
"""
from __future__ import annotations

import math
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from torch import nn
import torch.nn.functional as F

FEATURES = 256


class ScalarEmbed(nn.Module):
  """A scalar -> [D]: sinusoid, Linear, SiLU, Linear."""

  def __init__(self, width: int):
    super().__init__()
    self.inner, self.outer = nn.Linear(FEATURES, width), nn.Linear(width, width)
    self.register_buffer('frequencies', torch.exp(-math.log(10000.0) * torch.arange(FEATURES // 2) / (FEATURES // 2)))

  def forward(self, s: float) -> torch.Tensor:
    angle = s * self.frequencies
    return self.outer(F.silu(self.inner(torch.cat([angle.cos(), angle.sin()]))))


class Attention(nn.Module):
  """Causal self-attention with one projection to queries, keys and values, stacked in that order."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Layer(nn.Module):
  """x += g_a * Attn(norm(x) * (1 + s_a)); x += g_m * MLP(norm(x) * (1 + s_m))."""

  def __init__(self, width: int, heads: int, hidden: int):
    super().__init__()
    self.norm = nn.RMSNorm(width, elementwise_affine=False)
    self.attn = Attention(width, heads)
    self.up, self.down = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
    self.modulation = nn.Linear(width, 4 * width)

  def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    g_a, g_m, s_a, s_m = self.modulation(F.silu(c)).chunk(4)
    x = x + g_a * self.attn(self.norm(x) * (1 + s_a))
    return x + g_m * self.down(F.gelu(self.up(self.norm(x) * (1 + s_m))))


class Peer(nn.Module):
  """Tokens i64[B, T] and a schedule -> the final state after the norm, [B, T, D], and its logits, [B, T, V]."""

  def __init__(self, vocab: int, length: int, width: int, heads: int, hidden: int, layers: int):
    super().__init__()
    self.embedding, self.positions = nn.Embedding(vocab, width), nn.Embedding(length, width)
    self.time, self.step = ScalarEmbed(width), ScalarEmbed(width)
    self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
    self.norm = nn.RMSNorm(width)

  def forward(self, tokens: torch.Tensor, schedule: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
    t = 0.0
    for dt in schedule:
      c = self.time(t) + self.step(dt)
      for layer in self.layers:
        x = layer(x, c)
      t += dt
    z = self.norm(x)
    return z, F.linear(z, self.embedding.weight)


def loss_of(model: Peer, tokens: torch.Tensor, targets: torch.Tensor, long: Sequence[float],
            short: Sequence[float]) -> torch.Tensor:
  """CE(long) + 0.1 CE(short) + 0.1 mean((stop(z_long) - z_short)^2)."""
  z_long, logits_long = model(tokens, long)
  z_short, logits_short = model(tokens, short)
  targets = targets.flatten()
  lm, lm_short = (F.cross_entropy(logits.flatten(0, 1), targets) for logits in (logits_long, logits_short))
  return lm + 0.1 * lm_short + 0.1 * F.mse_loss(z_short, z_long.detach())


def make_optimizer(model: Peer, rate: float, decay: float) -> torch.optim.Optimizer:
  """AdamW with weight decay on matrices and embeddings alone."""
  matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
  vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
  return torch.optim.AdamW([{'params': matrices, 'weight_decay': decay}, {'params': vectors, 'weight_decay': 0.0}],
                           lr=rate, betas=(0.9, 0.95), fused=True)


def train_step(model: Peer, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, targets: torch.Tensor,
               long: Sequence[float], short: Sequence[float], clip: float, halves: bool = False) -> float:
  """One step in place, `halves` under autocast to bfloat16; returns the loss, and so waits for the device."""
  optimizer.zero_grad(set_to_none=True)
  with torch.autocast(tokens.device.type, torch.bfloat16, enabled=halves):
    loss = loss_of(model, tokens, targets, long, short)
  loss.backward()
  nn.utils.clip_grad_norm_(model.parameters(), clip)
  optimizer.step()
  return loss.item()


def from_params(model: Any, params: Mapping[str, Any]) -> Peer:
  """The peer of a `loopformer` model (timed by `Trajectory`, bare norms), with a copy of its parameters."""
  block, width, layers = model.cell.core.block, model.read_in.width, model.cell.core.depth
  heads = block.attn.heads
  peer = Peer(model.read_in.vocab, model.read_in.length, width, heads, block.mlp.hidden, layers)
  cell, core = params['cell'], params['cell']['core']['block']
  state = {'embedding.weight': params['read_in']['embedding'], 'positions.weight': params['read_in']['positions'],
           'norm.weight': params['read_out']['norm']['scale']}
  for name in ('time', 'step'):
    for ours, theirs in (('in', 'inner'), ('out', 'outer')):
      linear = cell['condition'][name][ours]
      state[f'{name}.{theirs}.weight'] = np.asarray(linear['kernel']).T
      state[f'{name}.{theirs}.bias'] = linear['bias']
  modulation = cell['modulation']
  for i in range(layers):
    qkv_DHcd = np.asarray(core['attn']['qkv']['kernel'][i]).reshape(width, heads, 3, width // heads)
    layer = {'attn.qkv': qkv_DHcd.transpose(0, 2, 1, 3).reshape(width, 3 * width),
             'attn.out': core['attn']['out']['kernel'][i], 'up': core['mlp']['up']['kernel'][i],
             'down': core['mlp']['down']['kernel'][i],
             'modulation': np.asarray(modulation['kernel'][i]).reshape(width, 4 * width)}
    state |= {f'layers.{i}.{name}.weight': np.asarray(kernel).T for name, kernel in layer.items()}
    state[f'layers.{i}.modulation.bias'] = np.asarray(modulation['bias'][i]).reshape(4 * width)
  buffers = {name: value for name, value in peer.state_dict().items() if name.endswith('frequencies')}
  peer.load_state_dict({name: torch.tensor(np.asarray(value)) for name, value in state.items()} | buffers)
  return peer
