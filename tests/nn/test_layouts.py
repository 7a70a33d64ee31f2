"""Layouts of caches: what is decoded does not depend on how keys and values lie."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmark.decode import Ids
from loopformer import backend, layouts, memories
from loopformer.inference.engine import Engine
from loopformer.types import Context, Step
from tests import parts
from tests.parts import ROWS, V, close, params, tokens

T = 5
MODELS = {'mean': ROWS['grouped'].model.clone(memory=memories.Mean()), 'alibi': ROWS['alibi'].model,
          'plt': ROWS['plt_hidden'].model}


def decoded(model, budget=3):
  """Logits of a prompt of two tokens and of the others, one by one."""
  text, kv, outs = tokens(2, T), model.cache(2, T + 1), []
  for start, stop in ((0, 2), (2, 3), (3, 4), (4, 5)):
    pos = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
    out, kv = parts.extend(model, params(model), text[:, start:stop], parts.padded(budget), pos, kv)
    outs.append(out)
  return jnp.concatenate(outs, 1), kv


@pytest.mark.parametrize('name', MODELS)
def test_layouts_decode_the_same(name):
  ours, heads_first = decoded(MODELS[name])
  with backend.compiling_for('tpu'):
    merged_logits, merged = decoded(MODELS[name])
  close(merged_logits, ours, 1e-5)
  kept = [jax.tree.leaves(caches, is_leaf=lambda leaf: hasattr(leaf, 'layout')) for caches in (heads_first, merged)]
  for one, other in zip(*kept):
    close(other.layout.of_heads(other.k), one.layout.of_heads(one.k), 1e-5)
  assert {type(kv.layout) for kv in kept[0]} == {layouts.HeadsFirst}
  assert layouts.Merged in {type(kv.layout) for kv in kept[1]}


@pytest.mark.parametrize('layout', [layouts.HeadsFirst(), layouts.Merged(groups=3)], ids=['heads first', 'merged'])
def test_axes_of_rows_and_heads(layout):
  """What divides caches over devices may count on."""
  kv = memories.empty(2, 4, 5, 6, 3, 8, jnp.float32, layout)
  assert kv.k.shape[2] == 5 and kv.pos.shape == (2, 5, 6)
  assert kv.k.shape[layout.heads] in (3, 3 * 8) and kv.layout == layout
  entries = jnp.arange(3.0)[:, None] * jnp.ones((3, 8))
  kept = layout.put(kv.k, (1, 2, 3, 4), entries)
  for head, own in enumerate(jnp.split(kept, 3, layout.heads)):
    assert float(own.sum()) == 8 * head
  np.testing.assert_array_equal(layout.get(kept, (1, 2, 3, 4)), entries)
  np.testing.assert_array_equal(layout.of_heads(kept)[1, 2, 3, :, 4], entries)


def test_slots_of_steps_that_were_not_taken():
  """Two rows, of which one took a step of three, and the other all."""
  keys = jax.random.normal(jax.random.key(0), (3, 2, 1, 4, 8))  # of three steps

  def filled(layout):
    kv = memories.empty(3, 1, 2, 6, 4, 8, jnp.float32, layout)
    for k in range(3):
      ctx = Context(pos=jnp.array([[2 if k == 0 else -1], [3]]), step=Step(t=0.0, dt=0.0, active=None, k=jnp.int32(k)))
      kv, *_ = memories.PerLoop().update(kv, ctx, 0, keys[k], -keys[k])
    kv = memories.PerLoop().fill_skipped(kv, jnp.array([[2], [3]]), jnp.array([0, 2]))
    return [layout.of_heads(kv.k), layout.of_heads(kv.v), kv.pos]

  ours = filled(layouts.HeadsFirst())
  close(filled(layouts.Merged(groups=4)), ours, 0)
  np.testing.assert_array_equal(ours[0][:, 0, 0, :, 2], jnp.repeat(keys[:1, 0, 0], 3, 0))


def test_the_engine_in_both():
  """Rows that are refilled from others, and drafts that are taken back."""
  def texts():
    model = ROWS['grouped'].model
    engine = Engine(model, params(model), Ids(V), rows=2, length=32, max_steps=4, draft=1, num_draft=2)
    for start in (0, 3, 3):
      engine.submit([(start + i) % V for i in range(18)], max_new_tokens=5, temperature=0)
    return engine.run()

  ours = texts()
  with backend.compiling_for('tpu'):
    assert texts() == ours
