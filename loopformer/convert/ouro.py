"""Weights of Ouro (ByteDance/Ouro-1.4B, Ouro-2.6B and their Thinking variants; PyTorch).

Names are those of the published files, 11 tensors a layer and 5 others; no file was at hand to hold them against.

    model.embed_tokens.weight                  V D     read_in/embedding; lm_head.weight is a matrix of its own
    model.layers.{i}.
      input_layernorm.weight                   D       n1, before attention
      input_layernorm_2.weight                 D       n2, of what attention gives
      post_attention_layernorm.weight          D       n3, before the MLP
      post_attention_layernorm_2.weight        D       n4, of what the MLP gives
      self_attn.{q, k, v}_proj.weight          D D     attn/qkv
      self_attn.o_proj.weight                  D D     attn/out
      mlp.{gate, up}_proj.weight               F D     mlp/up: the half that passes the SiLU first
      mlp.down_proj.weight                     D F     mlp/down
    model.norm.weight                          D       cell/norm, applied at the end of every loop
    model.early_exit_gate.{weight, bias}       1 D, 1  cell/gate
    lm_head.weight                             V D     read_out

PyTorch's matrices are [out, in], ours [in, out]. Their rotary pairs are a channel of the first half of a head and one
of the second (r: the half, f: the place in it), ours neighbours; so the channels of queries and keys change places. The
leading `model.` of a key may be missing, and error messages leave it out.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping

import numpy as np

from loopformer import reading, storage
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed
from loopformer.convert import table
from loopformer.convert.table import HEAD, Entry, Span, row
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, check_heads
from loopformer.nn.blocks import Block, PeriNorm
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.layers import GatedMLP, Identity, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.types import ConfigError, config_dataclass

LENGTH, BASE, EPSILON = 65_536, 1e6, 1e-6
EMBEDDING = 'embed_tokens.weight'
# Letters: q query, key, value; r, f halves of a head and places in one; m gate and up; i one.
ENDS = (
    row(EMBEDDING, 'read_in/embedding', 'V D'),
    row('norm.weight', 'cell/norm/scale', 'D'),
    row('early_exit_gate.weight', 'cell/gate/kernel', 'i D', 'D i'),
    row('early_exit_gate.bias', 'cell/gate/bias', 'i'),
    row(HEAD, 'read_out/kernel', 'V D'),
)
NORMS = ('input_layernorm', 'input_layernorm_2', 'post_attention_layernorm', 'post_attention_layernorm_2')


def _part_of(letter: str, place: int) -> Span:
  return Span(letter=letter, start=place, count=1)


LAYER = tuple(row(f'{name}.weight', f'n{n}/scale', 'D') for n, name in enumerate(NORMS, 1)) + (
    row('self_attn.q_proj.weight', 'attn/qkv/kernel', 'Hqrf D', 'D Hqfr', span=_part_of('q', 0)),
    row('self_attn.k_proj.weight', 'attn/qkv/kernel', 'Hqrf D', 'D Hqfr', span=_part_of('q', 1)),
    row('self_attn.v_proj.weight', 'attn/qkv/kernel', 'Hqd D', 'D Hqd', span=_part_of('q', 2)),
    row('self_attn.o_proj.weight', 'attn/out/kernel', 'E D', 'D E'),
    row('mlp.gate_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=_part_of('m', 0)),
    row('mlp.up_proj.weight', 'mlp/up/kernel', 'mF D', 'D mF', span=_part_of('m', 1)),
    row('mlp.down_proj.weight', 'mlp/down/kernel', 'D F', 'F D'),
)


@config_dataclass
class Ouro:
  """The kind 'ouro', with what `from_official` asks of a kind. base: of the rotary positions, as published."""
  loops: int = 4
  base: float = BASE
  tied = False  # the head is a matrix of its own

  def rename(self, key: str) -> str:
    """Keys are as they are."""
    return key

  def buffer(self, key: str, array: np.ndarray) -> bool:
    """Frequencies of the rotary positions, which some versions of PyTorch's modules save."""
    return key.endswith('rotary_emb.inv_freq')

  def measure(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], heads: int | None,
              length: int | None, where: str) -> dict[str, int]:
    """The sizes that the shapes show, and heads, which they do not."""
    vocab, width = table.measured(arrays, EMBEDDING, '[V, D]', where)
    hidden, _ = table.measured(arrays, 'layers.0.mlp.gate_proj.weight', '[F, D]', where)
    if heads is None:
      raise ConfigError('heads is missing: no shape of the checkpoint shows the number of attention heads; give '
                        'heads=..., num_attention_heads of config.json (16 in the published models)')
    return _sizes(vocab=vocab, width=width, hidden=hidden, depth=table.layers(arrays, 'layers.'),
                  heads=heads, length=length or LENGTH)

  def sizes_of(self, model: Looped) -> dict[str, int]:
    """The sizes of a model of the kind."""
    block = model.cell.core.block
    if set(model.stacks()) != {'loop'}:
      raise ConfigError("kind = 'ouro': the model has a prelude or a coda; the official code cannot hold it")
    if block.attn.groups not in (None, block.attn.heads):
      raise ConfigError(f'groups = {block.attn.groups}: the published models have as many key heads as query heads '
                        f'({block.attn.heads}); they cannot hold this model')
    return _sizes(vocab=model.read_in.vocab, width=model.read_in.width, hidden=block.mlp.hidden,
                  depth=model.cell.core.depth, heads=block.attn.heads, length=model.read_in.length)

  def entries(self, sizes: Mapping[str, int]) -> list[Entry]:
    """Every weight in its place."""
    return ([Entry(key=r.theirs, path=r.ours, row=r) for r in ENDS] +
            [Entry(key=f'layers.{i}.{r.theirs}', path=f'cell/core/block/{r.ours}', row=r, slot=i)
             for i in range(sizes['N']) for r in LAYER])

  def model(self, sizes: Mapping[str, int], loops: int, dtype: str) -> Looped:
    """The unbound model."""
    block = Block(attn=SelfAttention(heads=sizes['H'], position=Rotary(base=self.base)),
                  mlp=GatedMLP(hidden=sizes['F']), norm=RMSNorm(EPSILON), placement=PeriNorm(), dtype=dtype)
    return Looped(read_in=Tokens(vocab=sizes['V'], width=sizes['D'], length=sizes['T']),
                  cell=Halting(Normed(Stack(block, sizes['N']), RMSNorm(EPSILON))),
                  read_out=Head(outputs=sizes['V'], norm=Identity()), loops=loops)


def _sizes(*, vocab, width, hidden, depth, heads, length) -> dict[str, int]:
  check_heads(heads, heads, width)
  head = width // heads
  if head % 2:
    raise ConfigError(f'heads = {heads}: their width {head} is odd, and rotary positions turn pairs; choose a divisor '
                      f'of {width // 2}')
  return dict(V=vocab, T=length, D=width, E=width, F=hidden, N=depth, H=heads, d=head, r=2, f=head // 2, q=3, m=2, i=1)


@config_dataclass
class Settings:
  """What a checkpoint's config.json says and its weights do not; None where it does not either.

  heads, loops, length: for `from_official`. eos: the id that ends a text, which is not the same in all checkpoints.
  threshold: the probability of having left at which the released code stops.
  """
  heads: int | None = None
  loops: int | None = None
  length: int | None = None
  eos: int | None = None
  threshold: float | None = None


FIELDS = {'heads': 'num_attention_heads', 'loops': 'total_ut_steps', 'length': 'max_position_embeddings',
          'eos': 'eos_token_id', 'threshold': 'early_exit_threshold'}


def settings(source: str | Path | Mapping[str, Any]) -> Settings:
  """The settings of a checkpoint.

  Args:
    source: a config.json, or the folder that it lies in, or what it holds.

  Raises:
    ConfigError: no such file, or a setting under which the same weights would be another model.
  """
  if not isinstance(source, Mapping):
    path = storage.path(source)
    path = path / 'config.json' if path.is_dir() else path
    source = reading.read_json(path, 'give config.json, or the folder that it lies in')
  read = {'num_key_value_heads': source.get('num_attention_heads'), 'tie_word_embeddings': False,
          'rms_norm_eps': EPSILON, 'rope_theta': BASE, 'hidden_act': 'silu'}
  for name, value in read.items():
    if source.get(name, value) != value:
      raise ConfigError(f'{name} = {source[name]}: the models that are read have {value}; this one has no counterpart')
  return Settings(**{ours: source.get(theirs) for ours, theirs in FIELDS.items()})
