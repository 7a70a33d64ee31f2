"""Weights of Huginn's official repository (PyTorch, seal-rg/recurrent-pretraining; RavenForCausalLM on the hub).

Names are those of the modules of the official modelling file; no published checkpoint was at hand to hold them against.

    transformer.wte.weight                     V D     read_in/embedding (times sqrt(D)); lm_head.weight is tied to it
    transformer.{prelude, core_block, coda}.{i}.
      norm_1.weight .. norm_4.weight           D       n1 .. n4
      attn.Wqkv.weight                         3D D    attn/qkv: q, k, v stacked, heads contiguous in each
      attn.qk_bias                             2 1 H d attn/q_bias, attn/k_bias
      attn.proj.weight                         D D     attn/out
      mlp.fc.weight                            2F D    mlp/up: the half that passes the SiLU first, then the linear one
      mlp.proj.weight                          D F     mlp/down
    transformer.adapter.weight                 D 2D    cell/inject/adapter: the state's columns first, then the input's
    transformer.ln_f.weight                    D       read_out/norm, applied before the coda and again before the head
    freqs_cis                                          a buffer: the rotary table, whose second axis is the length

PyTorch's matrices are [out, in], ours [in, out]. Rotary pairs are neighbours in both. Norms have an epsilon of 1e-6.
"""
from __future__ import annotations

import math
from typing import Mapping

import numpy as np

from loopformer.cells.recur import Recur
from loopformer.convert import table
from loopformer.convert.parcae import SECTIONS, counted
from loopformer.convert.table import EMBEDDING, Entry, Span, row
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, check_heads
from loopformer.nn.blocks import Block, SandwichNorm
from loopformer.nn.embed import Tokens, TwiceNormedHead
from loopformer.nn.inject import Concat
from loopformer.nn.layers import GatedMLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.starts import Noise
from loopformer.types import ConfigError, config_dataclass

LENGTH = 4096
# Letters: b query and key bias, i one, m gate and up, s state and input.
ENDS = (
    row(EMBEDDING, 'read_in/embedding', 'V D'),
    row('transformer.adapter.weight', 'cell/inject/adapter/kernel', 'E sD', 'sD E'),
    row('transformer.ln_f.weight', 'read_out/norm/scale', 'D'),
)
LAYER = tuple(row(f'norm_{n}.weight', f'n{n}/scale', 'D') for n in (1, 2, 3, 4)) + (
    row('attn.Wqkv.weight', 'attn/qkv/kernel', 'qHd D', 'D Hqd'),
    row('attn.qk_bias', 'attn/q_bias', 'b i H d', 'biH d', span=Span(letter='b', start=0, count=1, whole=0)),
    row('attn.qk_bias', 'attn/k_bias', 'b i H d', 'biH d', span=Span(letter='b', start=1, count=1, whole=0)),
    row('attn.proj.weight', 'attn/out/kernel', 'E D', 'D E'),
    row('mlp.fc.weight', 'mlp/up/kernel', 'mF D', 'D mF'),
    row('mlp.proj.weight', 'mlp/down/kernel', 'D F', 'F D'),
)


@config_dataclass
class Huginn:
  """The kind 'huginn', with what `from_official` asks of a kind."""
  loops: int = 32

  rename = staticmethod(table.same_key)
  buffer = staticmethod(table.rotary_table)

  def measure(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], heads: int | None,
              length: int | None, where: str) -> dict[str, int]:
    """The sizes that the shapes show: biases of queries and keys show the heads."""
    vocab, width = table.measured(arrays, EMBEDDING, '[V, D]', where)
    counts = counted(arrays)
    _, hidden = table.measured(arrays, 'transformer.prelude.0.mlp.proj.weight', '[D, F]', where)
    shown = table.measured(arrays, 'transformer.prelude.0.attn.qk_bias', '[2, 1, H, d]', where)[2]
    table.check_shown_heads(heads, shown)
    return _sizes(counts, vocab=vocab, width=width, hidden=hidden, heads=shown,
                  length=table.length_of(buffers, length, LENGTH))

  def sizes_of(self, model: Looped) -> dict[str, int]:
    """The sizes of a model of the kind."""
    stacks = model.stacks()
    attn = model.cell.core.block.attn
    if set(stacks) != {'prelude', 'loop', 'coda'}:
      raise ConfigError("kind = 'huginn': the model needs prelude and coda; the official code cannot hold it")
    if attn.groups not in (None, attn.heads):
      raise ConfigError(f'groups = {attn.groups}: the official code has as many key heads as query heads '
                        f'({attn.heads}); it cannot hold this model')
    counts = {letter: stacks[name].depth for name, letter in (('prelude', 'P'), ('loop', 'K'), ('coda', 'C'))}
    return _sizes(counts, vocab=model.read_in.vocab, width=model.read_in.width, length=model.read_in.length,
                  hidden=model.cell.core.block.mlp.hidden, heads=attn.heads)

  def entries(self, sizes: Mapping[str, int]) -> list[Entry]:
    """Every weight in its place, the tied head's apart."""
    return (table.placed(ENDS) +
            [Entry(key=f'transformer.{name}.{i}.{r.theirs}', path=f'{path}/block/{r.ours}', row=r, slot=i)
             for name, path, letter in SECTIONS for i in range(sizes[letter]) for r in LAYER])

  def model(self, sizes: Mapping[str, int], loops: int, dtype: str) -> Looped:
    """The unbound model, initialised as published."""
    width = sizes['D']
    prelude, core, coda = (sizes[letter] for letter in 'PKC')
    std = math.sqrt(2 / (5 * width))
    out_std = math.sqrt(1 / (5 * width * (prelude + loops * core + coda)))

    def stack(count: int) -> Stack:  # with a block of its own: one instance in two stacks would be one set of weights
      attn = SelfAttention(heads=sizes['H'], std=std, out_std=out_std, position=Rotary(base=50_000.0),
                           biased=('q', 'k'))
      mlp = GatedMLP(hidden=sizes['F'], std=std, up_std=out_std, out_std=out_std)
      return Stack(Block(attn=attn, mlp=mlp, norm=RMSNorm(1e-6), placement=SandwichNorm(), dtype=dtype), count)

    return Looped(read_in=Tokens(vocab=sizes['V'], width=width, length=sizes['T'], std=std, scale=math.sqrt(width)),
                  cell=Recur(stack(core), Concat(std=std)), read_out=TwiceNormedHead(RMSNorm(1e-6)),
                  loops=loops, prelude=stack(prelude), coda=stack(coda), start=Noise(std=math.sqrt(2 / 5)))


def _sizes(counts, *, vocab, width, length, hidden, heads) -> dict[str, int]:
  check_heads(heads, heads, width)
  return dict(counts, V=vocab, D=width, E=width, T=length, F=hidden, H=heads, d=width // heads, q=3, b=2, i=1, m=2, s=2)
