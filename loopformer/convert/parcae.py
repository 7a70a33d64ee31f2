"""Weights of Parcae's official repository (PyTorch, sandyresearch/parcae): the published "Transformer setup".

Names are those of the modules of the official modelling code, as far as we could read them in public copies of it; no
published checkpoint was at hand to hold them against.

    transformer.wte.weight                     V D     read_in/embedding (scale 1); lm_head.weight is tied to it
    transformer.{prelude, core_block, coda}.{i}.
      norm_1.weight, norm_2.weight             D       norm_attn, norm_mlp
      attn.c_q.weight                          HdD     queries of attn/qkv [D, G, H/G + 2, d]; heads of a group are
      attn.c_k.weight, attn.c_v.weight         GdD     neighbours
      attn.c_proj.weight                       D D     attn/out
      attn.ve_gate.weight                      G 32    attn/values/gate, in layers with value embeddings
      mlp.fc.weight, mlp.proj.weight           F D, D F
    value_embeds.{i}.weight                    V Gd    attn/values/embedding of layer i of all N = P + K + C, where
                                                       i and N - 1 are both even or both odd
    transformer.ln_prelude.weight              D       prelude/norm
    transformer.adapter.{A_log, dt_bias}       D       cell/inject/{log_a, dt}
    transformer.adapter.B                      D D     cell/inject/B, [state, input] there, [input, state] here
    transformer.C.weight                       D D     bridge
    transformer.ln_f.weight                    D       read_out/norm
    freqs_cis                                          a buffer: the rotary table, whose second axis is the length

PyTorch's matrices are [out, in], ours [in, out]. Rotary pairs are neighbours in both. The norm of queries and keys has
PyTorch's default epsilon (float32's), all others 1e-5. Where a stack has an even number of layers it is a stack of
pairs, without and with value embeddings; else one chain of them all.

Not read: other injections than the diagonal one, models without a norm after the prelude, the "RDM setup", and models
in which layers with a table and layers with a gate are not the same (odd K, odd products of K and the mean recurrence).
"""
from __future__ import annotations

import math
from typing import Mapping

import numpy as np

from loopformer.cells.recur import Recur
from loopformer.convert import table
from loopformer.convert.table import EMBEDDING, Entry, Span, row
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention, ValueEmbed, check_heads
from loopformer.nn.blocks import Block, Chain
from loopformer.nn.embed import TiedHead, Tokens
from loopformer.nn.inject import Diagonal
from loopformer.nn.layers import MLP, ByProjection, Linear, Normal, Orthogonal, RMSNorm, UnitNorm, squared_relu
from loopformer.nn.positions import Rotary
from loopformer.nn.stack import Stack
from loopformer.starts import Noise
from loopformer.types import ConfigError, config_dataclass

GATED = 32  # channels that the gate of value embeddings sees
LENGTH = 2048
# Letters: P, K, C layers of prelude, core, coda; e queries of a group, p all of a group; c channels of the gate.
SECTIONS = (('prelude', 'prelude', 'P'), ('core_block', 'cell/core', 'K'), ('coda', 'coda', 'C'))
ENDS = (
    row(EMBEDDING, 'read_in/embedding', 'V D'),
    row('transformer.ln_prelude.weight', 'prelude/norm/scale', 'D'),
    row('transformer.adapter.A_log', 'cell/inject/log_a', 'D'),
    row('transformer.adapter.dt_bias', 'cell/inject/dt', 'D'),
    row('transformer.adapter.B', 'cell/inject/B', 'E D', 'D E'),
    row('transformer.C.weight', 'bridge/kernel', 'E D', 'D E'),
    row('transformer.ln_f.weight', 'read_out/norm/scale', 'D'),
)
LAYER = (
    row('norm_1.weight', 'norm_attn/scale', 'D'),
    row('norm_2.weight', 'norm_mlp/scale', 'D'),
    row('attn.c_q.weight', 'attn/qkv/kernel', 'Gpd D', 'D Gpd', span=Span(letter='p', start=0, count='e')),
    row('attn.c_k.weight', 'attn/qkv/kernel', 'Gpd D', 'D Gpd', span=Span(letter='p', start=-2, count=1)),
    row('attn.c_v.weight', 'attn/qkv/kernel', 'Gpd D', 'D Gpd', span=Span(letter='p', start=-1, count=1)),
    row('attn.c_proj.weight', 'attn/out/kernel', 'E D', 'D E'),
    row('mlp.fc.weight', 'mlp/up/kernel', 'F D', 'D F'),
    row('mlp.proj.weight', 'mlp/down/kernel', 'D F', 'F D'),
)
GATE = row('attn.ve_gate.weight', 'attn/values/gate', 'G c', 'c G')
VALUES = row('value_embeds.{}.weight', 'attn/values/embedding', 'V Gd')


@config_dataclass
class Parcae:
  """The kind 'parcae', with what `from_official` asks of a kind."""
  loops: int = 8

  rename = staticmethod(table.same_key)
  buffer = staticmethod(table.rotary_table)

  def measure(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, np.ndarray], heads: int | None,
              length: int | None, where: str) -> dict[str, int]:
    """The sizes that the shapes show: the gate of the last layer shows the groups, and so the width of a head."""
    vocab, width = table.measured(arrays, EMBEDDING, '[V, D]', where)
    counts = counted(arrays)
    last = f'transformer.coda.{counts["C"] - 1}.'
    groups, _ = table.measured(arrays, f'{last}attn.ve_gate.weight', '[G, 32]', where)
    key = f'{last}attn.c_k.weight'
    keys, _ = table.measured(arrays, key, '[G d, D]', where)
    hidden, _ = table.measured(arrays, f'{last}mlp.fc.weight', '[F, D]', where)
    head = keys // groups
    if keys % groups or not head or width % head:
      raise ConfigError(f'{where}: key {key!r} has shape {list(arrays[key].shape)}, expected [G d, D] with '
                        f'{groups} heads G, whose width d divides the width {width}; '
                        'check that all weights are from one model')
    table.check_shown_heads(heads, width // head)
    return _sizes(counts, vocab=vocab, width=width, hidden=hidden, heads=width // head, groups=groups,
                  length=table.length_of(buffers, length, LENGTH))

  def sizes_of(self, model: Looped) -> dict[str, int]:
    """The sizes of a model of the kind."""
    stacks = model.stacks()
    if set(stacks) != {'prelude', 'loop', 'coda'} or model.bridge is None:
      raise ConfigError("kind = 'parcae': the model needs prelude, coda and bridge; the official code cannot hold it")
    block = getattr(model.cell.core.block, 'blocks', (model.cell.core.block,))[0]
    counts = {letter: stacks[name].applications for name, letter in (('prelude', 'P'), ('loop', 'K'), ('coda', 'C'))}
    return _sizes(counts, vocab=model.read_in.vocab, width=model.read_in.width, length=model.read_in.length,
                  hidden=block.mlp.hidden, heads=block.attn.heads, groups=block.attn.groups or block.attn.heads)

  def entries(self, sizes: Mapping[str, int]) -> list[Entry]:
    """Every weight in its place, the tied head's apart."""
    entries, first = table.placed(ENDS), 0
    for name, path, letter in SECTIONS:
      each = _period(sizes[letter])
      for i in range(sizes[letter]):
        block, rows = f'{path}/block/blocks_{i % each}/', LAYER + (GATE,) * _valued(first + i, sizes)
        entries += [Entry(key=f'transformer.{name}.{i}.{r.theirs}', path=block + r.ours, row=r, slot=i // each)
                    for r in rows]
        if _valued(first + i, sizes):
          entries.append(Entry(key=VALUES.theirs.format(first + i), path=block + VALUES.ours, row=VALUES,
                               slot=i // each))
      first += sizes[letter]
    return entries

  def model(self, sizes: Mapping[str, int], loops: int, dtype: str) -> Looped:
    """The unbound model, initialised as published."""
    vocab, width = sizes['V'], sizes['D']
    std = math.sqrt(2 / (5 * width))
    orthogonal = Orthogonal(std)

    def block(valued: bool) -> Block:
      attn = SelfAttention(heads=sizes['H'], groups=sizes['G'], init=ByProjection(orthogonal, sizes['H'], sizes['G']),
                           out_init=Normal(0.0), position=Rotary(base=50_000.0), norm_qk=UnitNorm(),
                           values=ValueEmbed(vocab=vocab, features=GATED) if valued else None)
      mlp = MLP(hidden=sizes['F'], init=orthogonal, out_init=Normal(0.0), activation=squared_relu)
      return Block(attn=attn, mlp=mlp, norm=RMSNorm(1e-5), dtype=dtype)

    def stack(first: int, count: int, norm: RMSNorm | None = None) -> Stack:
      each = _period(count)
      chain = Chain(tuple(block(_valued(first + i, sizes)) for i in range(each)))
      return Stack(chain, count // each, norm=norm)

    prelude, core, coda = (sizes[letter] for letter in 'PKC')
    return Looped(read_in=Tokens(vocab=vocab, width=width, length=sizes['T'], std=std, init=orthogonal),
                  cell=Recur(stack(prelude, core), Diagonal()), read_out=TiedHead(RMSNorm(1e-5)), loops=loops,
                  prelude=stack(0, prelude, RMSNorm(1e-5)), coda=stack(prelude + core, coda), start=Noise(std=std),
                  bridge=Linear(width, init=orthogonal))


def _sizes(counts, *, vocab, width, length, hidden, heads, groups) -> dict[str, int]:
  check_heads(heads, groups, width)
  return dict(counts, V=vocab, D=width, E=width, T=length, F=hidden, H=heads, G=groups, d=width // heads,
              e=heads // groups, p=heads // groups + 2, c=GATED)


def _period(count: int) -> int:
  """Layers of a chain: a pair, or where pairs do not divide the layers, all of them."""
  return count if count % 2 else 2


def _valued(layer: int, sizes: Mapping[str, int]) -> bool:
  """Whether layer i of all has value embeddings: the last one does, and every second before it."""
  return (sizes['P'] + sizes['K'] + sizes['C'] - 1 - layer) % 2 == 0


def counted(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
  """Layers of each section, by its letter."""
  return {letter: table.layers(arrays, f'transformer.{name}.') for name, _, letter in SECTIONS}
