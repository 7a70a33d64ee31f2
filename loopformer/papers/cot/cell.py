"""Continuous thoughts: what a decoder made of the last token is its next input (Coconut, 2412.06769; compared with
chains and loops in 2509.25239)."""
from __future__ import annotations

from flax import linen as nn
import jax.numpy as jnp
import numpy as np

from loopformer.cells.cell import Cell
from loopformer.nn import modules
from loopformer.nn.layers import Identity
from loopformer.nn.stack import Stack
from loopformer.types import KV, Array, ConfigError, Context

State = tuple[Array, Array]  # inputs and outputs of the layers, [B, T, D] each


class Thinking(Cell):
  """Step k, from 0: y = core(x); then x at n + k is norm(y) at n + k - 1, n being the problem's tokens.

  So K steps are K - 1 thoughts and the pass that reads the last one: the answer stands at place n + K - 2. A row has n
  tokens of its own, n >= 1, and then `filler`, an id that no problem holds, in place of thoughts and to the end of its
  first segment (reasoning.Asked). A thought takes the place of an embedding, so that positions must be attention's
  (Rotary); every step runs over the whole row, whose layers must be causal, so that no token sees what is still to
  come.
  """
  core: Stack
  filler: int
  norm: nn.Module = Identity()
  tokenwise = False  # a thought is put where a filler's state is

  def check(self, width: int):
    """Raises ConfigError where a layer is not causal, or has no positions of its own."""
    if not all(kernel.causal for kernel in modules.held(self.core, 'kernel')):
      raise ConfigError('model.cell.core: a layer of Thinking is not causal, so that tokens would see the places of '
                        'thoughts that are still to come; give all layers kernel=kernels.Blockwise()')
    if None in modules.held(self.core, 'position'):
      raise ConfigError('model.cell.core: a layer of Thinking has no positions in its attention, and a thought, which '
                        'takes the place of an embedding, would stand nowhere; give all layers '
                        'position=positions.Rotary()')

  def check_tokens(self, tokens: Array, steps: int, seg: Array | None = None):
    """Raises ConfigError where a row, up to the end of its first segment, is not a problem and then `steps - 1` fillers
    or more: thoughts would have no place, and every step would answer the same."""
    tokens, most = np.asarray(tokens), steps - 1
    own = np.ones(tokens.shape, bool) if seg is None else np.equal(seg, np.asarray(seg)[:, :1])
    given = own & (tokens != self.filler)
    counts = given.sum(1)
    fillers = (own & ~given).sum(1)
    wrong = (counts < 1) | (fillers < most) | (given != (np.arange(tokens.shape[1]) < counts[:, None])).any(1)
    if wrong.any():
      row = int(wrong.argmax())
      raise ConfigError(f'tokens: row {row} has {counts[row]} tokens of a problem and {fillers[row]} fillers (id '
                        f'{self.filler}), and Thinking with {steps} steps puts {most} thoughts into the places of '
                        f'fillers; give a problem of one token or more, and after it {most} fillers, or fewer steps')

  def enter(self, x: Array) -> State:
    """Inputs and outputs of the layers; the latter are none yet."""
    return x, jnp.zeros_like(x)

  def output(self, state: State) -> Array:
    """What the layers made of it last."""
    return state[1]

  def __call__(self, x: State, e: Array, ctx: Context, kv: KV | None) -> tuple[State, KV | None, dict]:
    """Raises ConfigError where inputs are vectors (`Context.ids`), and with a cache: thoughts are no tokens, and are
    not decoded.
    """
    if kv is not None:
      raise ConfigError('model.cell = Thinking: its thoughts are made within one pass over a row; ask for answers with '
                        '`run_batch`, or generate with a model of another cell')
    assert ctx.step is not None
    inputs, _ = x
    outputs, kv = self.core(inputs, ctx, None, kv)
    given = ctx.ids('model.cell = Thinking') != self.filler
    place = (given if ctx.seg is None else given & (ctx.seg == ctx.seg[:, :1])).sum(-1) + ctx.step.k
    thought = self.norm(jnp.take_along_axis(outputs, place[:, None, None] - 1, 1))
    here = jnp.arange(inputs.shape[1]) == place[:, None]
    return (jnp.where(here[..., None], thought, inputs), outputs), kv, {}
