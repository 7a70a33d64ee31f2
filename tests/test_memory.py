"""Memories: which decode what one pass computes, what the others read, and the bytes that they take."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import memories
from loopformer.types import ConfigError, Context, Step
from tests import parts
from tests.parts import ROWS, D, L, T, close, params, tokens

MEMORIES = {'per_loop': memories.PerLoop(), 'first': memories.First(), 'ring_1': memories.Ring(size=1),
            'ring_2': memories.Ring(size=2), f'ring_{L}': memories.Ring(size=L), 'mean': memories.Mean()}
every = pytest.mark.parametrize('name', list(MEMORIES))
MODELS = pytest.mark.parametrize('row', ['loopformer', 'prelude_coda', 'parcae'])


def extend(model, text, start, stop, kv, steps=L):
  pos = jnp.broadcast_to(jnp.arange(start, stop), (len(text), stop - start))
  return parts.extend(model, params(model), text[:, start:stop], parts.padded(steps, max(L, steps)), pos, kv)


def by_token(model, text, kv, start=0, steps=L):
  outs = []
  for i in range(start, text.shape[1]):
    out, kv = extend(model, text, i, i + 1, kv, steps)
    outs.append(out)
  return jnp.concatenate(outs, 1), kv


def with_memory(row, name):
  model = ROWS[row].model.clone(memory=MEMORIES[name])
  return model, params(ROWS[row].model)


@MODELS
@every
def test_exact_memories_decode_what_one_pass_computes(row, name):
  model, _ = with_memory(row, name)
  text = tokens(3)
  whole, _ = extend(model, text, 0, T, model.cache(3, T + 2))
  single, _ = by_token(model, text, model.cache(3, T + 2))
  if model.memory.exact or name == f'ring_{L}':  # a ring with a slot for every loop
    close(single, whole, 1e-5)
  else:
    assert np.abs(np.asarray(single - whole)).max() > 1e-2 and np.isfinite(single).all()


@MODELS
@every
def test_one_pass_is_the_loop_without_memory_but_for_first(row, name):
  """And so is everything of a single step."""
  model, weights = with_memory(row, name)
  text = tokens(3)
  for steps in (1, L):
    z = parts.forward(model, weights, text, parts.padded(steps)).z
    whole, _ = extend(model, text, 0, T, model.cache(3, T + 2), steps)
    difference = np.abs(np.asarray(whole - parts.logits(model, weights, z))).max()
    assert difference > 1e-2 if name == 'first' and steps > 1 else difference < 1e-4


def step(k):
  return Step(t=jnp.float32(0), dt=jnp.float32(0), active=None, k=jnp.int32(k))


def steps_of(part, loops, pos):
  """Loops over one layer with entries that tell (loop, position); what each loop may read of place 0, and the cache."""
  kv = part.make(loops, 1, 1, 4, 1, 1, jnp.float32)
  reads = []
  for p in pos:
    for k in range(loops):
      entry = jnp.full((1, 1, 1, 1), 100.0 * p + k + 1)
      kv, keys, values, places = part.update(kv, Context(pos=jnp.array([[p]]), step=step(k)), jnp.int32(0), entry,
                                             -entry)
      np.testing.assert_array_equal(keys, -values)
      reads.append((p, k, np.asarray(keys)[0, 0, :, 0], np.asarray(places)[0]))
  return reads, kv


@pytest.mark.parametrize('name, past, own', [
    ('per_loop', lambda k: k + 1, lambda k: k + 1), ('first', lambda k: 1, lambda k: 1),
    ('ring_1', lambda k: 6, lambda k: k + 1), ('ring_2', lambda k: 5 if k % 2 == 0 else 6, lambda k: k + 1),
    ('mean', lambda k: 3.5, lambda k: k + 1)])
def test_what_is_read(name, past, own):
  """Of a token in the past, and of the token itself, in each of six loops."""
  reads, _ = steps_of(MEMORIES[name], 6, (0, 1))
  for p, k, keys, places in reads:
    assert keys[p] == pytest.approx(100 * p + own(k))
    assert (places >= 0).sum() == p + 1
    if p == 1:
      assert keys[0] == pytest.approx(past(k))


@pytest.mark.parametrize('name', ['per_loop', 'mean'])
def test_what_a_sequence_leaves_in_the_cache_does_not_depend_on_the_depth_of_others(name):
  """One that has no such step writes nothing into the slot that others write into."""
  model, weights = with_memory('base_loop', name)
  own, text = [parts.padded(steps) for steps in (1, L, 2)], tokens(3)
  pos = jnp.broadcast_to(jnp.arange(T), text.shape)

  def read(text, plan, pos):
    first, kv = parts.extend(model, weights, text[:, :-1], plan, pos[:, :-1], model.cache(len(text), T))
    return first, *parts.extend(model, weights, text[:, -1:], plan, pos[:, -1:], kv)

  *together, kv = read(text, jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *own), pos)
  for row, plan in enumerate(own):
    *alone, one = read(text[row:row + 1], plan, pos[row:row + 1])
    close([leaf[row] for leaf in together], [leaf[0] for leaf in alone], 1e-5)
    close([leaf[:, :, row] for leaf in (kv['loop'].k, kv['loop'].v)],
          [leaf[:, :, 0] for leaf in (one['loop'].k, one['loop'].v)], 1e-5)
    np.testing.assert_array_equal(kv['loop'].pos[:, row], one['loop'].pos[:, 0])


@pytest.mark.parametrize('name', ['per_loop', 'ring_2'])
def test_slots_that_no_step_reached_get_what_the_last_step_left(name):
  """At the token's place; nothing of rows that took no step, took all, or have no token."""
  kv = MEMORIES[name].make(L, 1, 4, 3, 1, 2, jnp.float32)
  slots = len(kv.pos)
  kv = kv.replace(**{field: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + 7
                     for field, leaf in (('k', kv.k), ('v', kv.v), ('pos', kv.pos))})
  filled = MEMORIES[name].fill_skipped(kv, jnp.array([[1], [1], [1], [-1]]), jnp.array([-1, 0, slots - 1, 0]))
  for field in ('k', 'v'):
    expected = np.array(getattr(kv, field))  # [slots, N, B, G, S, d]
    expected[:, :, 1, :, 1] = expected[:1, :, 1, :, 1]
    np.testing.assert_array_equal(getattr(filled, field), expected)
  expected = np.array(kv.pos)
  expected[1:, 1, 1] = 1
  np.testing.assert_array_equal(filled.pos, expected)


@every
def test_padding_is_not_written(name):
  part = MEMORIES[name]
  kv = part.make(L, 1, 1, 4, 1, 1, jnp.float32)
  ones = jnp.ones((1, 2, 1, 1))
  for k in range(L):
    kv, *_ = part.update(kv, Context(pos=jnp.array([[2, -1]]), step=step(k)), jnp.int32(0), ones, ones)
  assert np.asarray(kv.pos)[:, 0].tolist() == [[-1, -1, 2, -1]] * len(kv.pos)
  assert float(jnp.abs(kv.k).sum()) == pytest.approx(len(kv.pos))


@pytest.mark.parametrize('loops', [1, 3, L + 3])
@every
def test_bytes(name, loops):
  """Per sequence 2 * slots * layers * positions * groups * head * 4, and 4 for the place of each."""
  model = ROWS['base_loop'].model.clone(memory=MEMORIES[name])
  slots = {'per_loop': loops, 'first': 1, 'ring_1': 1, 'ring_2': min(2, loops), f'ring_{L}': min(L, loops),
           'mean': 1}[name]
  kv = jax.eval_shape(lambda: model.cache(3, 11, loops))['loop']
  assert kv.bytes == 3 * slots * 11 * (2 * 2 * D * 4 + 4)


def test_a_slot_of_several_loops_serves_more_loops_than_it_has():
  """With more loops than slots a ring goes round; per-loop memory refuses."""
  text = tokens(2)
  for name in ('ring_2', 'mean', 'first'):
    model, _ = with_memory('base_loop', name)
    out, _ = extend(model, text, 0, T, model.cache(2, T, 2), L + 2)
    assert np.isfinite(out).all()
  model = ROWS['base_loop'].model
  with pytest.raises(ConfigError, match='slots for 2'):
    extend(model, text, 0, T, model.cache(2, T, 2), L + 2)


def test_bad_input():
  with pytest.raises(ConfigError, match=r'memory\.size = 0'):
    memories.Ring(size=0)
