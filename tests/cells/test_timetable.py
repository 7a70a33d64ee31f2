"""What a cell computes ahead of the loop may be any tree of arrays, wherever its rows are handed out."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import backend, plans
from loopformer.cells.timed import Timed
from loopformer.inference import exits
from loopformer.inference.engine import Engine, empty_rows, partitions
from loopformer.nn import stack as stacks
from loopformer.nn.blocks import Block
from loopformer.nn.stack import Stack
from tests import parts
from tests.inference.test_generate import MODEL, PARAMS, TOKENIZER
from tests.parts import ROWS, UNEVEN, D, L, N, params, tokens


class Named(Timed):
  """Timed, with gates by their name and scales in a tuple."""

  def precompute(self, plan):
    mods = super().precompute(plan)
    return {'gates': mods[:, :, :2], 'scales': (mods[:, :, 2:],)}


class Taking(Block):
  """The layer that takes them so."""

  def __call__(self, x, ctx, mod, kv, layer=0):
    return super().__call__(x, ctx, jnp.concatenate([mod['gates'], *mod['scales']]), kv, layer)


def named(model):
  """The same model, with the same parameters."""
  cell, block = model.cell, model.cell.core.block
  taking = Taking(attn=block.attn, mlp=block.mlp, norm=block.norm, dtype=block.dtype)
  core = Stack(taking, cell.core.depth, order=cell.core.order)
  return model.clone(cell=Named(core, cell.condition, cell.modulation))


def learned(model, weights):
  def loss(weights):
    return jnp.sin(model.apply({'params': weights}, tokens(2), plans.schedule((0.25, 0.75))).z).sum()
  return jax.jit(jax.value_and_grad(loss))(weights)


def adapted(model, weights, exit_policy):
  def apply(weights):
    return model.apply({'params': weights}, tokens(3), plans.Uniform(L)(None), exit_policy, jnp.float32(0.3),
                       method='adapt')
  trace = jax.jit(apply)(weights)
  return trace.z, trace.steps


def same(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize('written_out', [False, True])
def test_a_pass_that_learns_and_exits(written_out, monkeypatch):
  monkeypatch.setattr(stacks, 'unrolls', lambda layers: written_out)
  model = ROWS['loopformer'].model
  exit_policy = exits.Adaptive(rule=exits.KL(threshold=1))
  exits.check(named(model), exit_policy, 'exit')
  same(learned(named(model), params(model)), learned(model, params(model)))
  same(adapted(named(model), params(model), exit_policy), adapted(model, params(model), exit_policy))


def test_layers_in_an_order_of_their_own():
  model = parts.looped(Timed(Stack(parts.block(), N, order=(1, 0, 0)), parts.Trajectory(D), parts.Modulation(3)))
  same(parts.shapes(named(model)), parts.shapes(model))
  same(learned(named(model), params(model)), learned(model, params(model)))


@pytest.mark.parametrize('flat, options', [(0, {}), (8, dict(exit=exits.Adaptive(rule=exits.KL(threshold=0.3))))],
                         ids=['scanned', 'written out, exits'])
def test_requests_with_schedules_of_their_own(flat, options, monkeypatch):
  monkeypatch.setitem(backend.BACKENDS, 'cpu', dataclasses.replace(backend.current(), flat=flat))

  def serve(model):
    made = Engine(model, PARAMS, TOKENIZER, rows=3, length=32, **options)
    for prompt, budget in (('abc', L), ('hello there', UNEVEN), ('q', 1)):
      made.submit(prompt, budget=budget, max_new_tokens=5, temperature=0.0)
    return made.run(), made.stats

  assert serve(named(MODEL)) == serve(MODEL)


def test_rows_of_requests_are_divided_over_devices():
  model = named(MODEL)
  rows = jax.eval_shape(lambda: empty_rows(model, PARAMS, 4, 16, L))
  specs = partitions(model, PARAMS, rows, {'data': 2, 'fsdp': 1, 'tensor': 1}).precomputed
  divided = jax.tree.map(lambda leaf, spec: [leaf.shape[axis] for axis, names in enumerate(spec) if names],
                         rows.precomputed,
                         specs)
  assert divided == {'gates': [4], 'scales': ([4],)}
