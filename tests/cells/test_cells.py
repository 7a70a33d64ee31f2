"""Cells that stand around other cells, and states that are trees."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import config as configs, loop, plans
from loopformer.cells.cell import Cell
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.cells.plain import Normed, Plain
from loopformer.diffusion.cell import ToldHidden
from loopformer.inference import exits
from loopformer.inference.engine import generate
from loopformer.model import init_params, parameter_roles
from loopformer.nn.inject import Diagonal
from loopformer.nn.layers import Linear, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.papers.loopus.cell import Selective
from loopformer.starts import Zeros
from loopformer.types import ConfigError
from tests import parts
from tests.parts import ROWS, D, L, close, forward, params, tokens

INNER = {'timed': parts.timed(), 'recur': parts.recur(Diagonal(), norm=RMSNorm()),
         'normed': Normed(parts.stack(2), RMSNorm())}


def around(name, wrap=Halting):
  cell = INNER[name]
  return parts.looped(wrap(cell) if wrap else cell, start=Zeros() if cell.injects else parts.looped(cell).start)


@pytest.mark.parametrize('name', INNER)
def test_a_gate_around_a_cell_changes_nothing_but_what_it_tells(name):
  """Values, parameters and their first values; gradients; roles; free steps and schedules of the inner cell."""
  inner, outer = around(name, None), around(name)
  first = [jax.jit(lambda model=model: init_params(model, jax.random.key(2)))() for model in (inner, outer)]
  gate = first[1]['cell'].pop('gate')
  jax.tree.map(np.testing.assert_array_equal, *first)
  weights = params(inner)
  own = {**weights, 'cell': {**weights['cell'], 'gate': jax.tree.map(lambda leaf: leaf + 0.3, gate)}}
  plan = plans.schedule((0.5, 0.25, 0.25))
  one, two = (forward(model, w, tokens(3), plan, keep=loop.Every()) for model, w in ((inner, weights), (outer, own)))
  close((one.x, one.z, one.xs), (two.x, two.z, two.xs), 1e-6)
  states = one.xs.astype(jnp.float32) @ own['cell']['gate']['kernel'] + own['cell']['gate']['bias']
  close(two.aux['halt'], states[..., 0], 1e-5)
  grads = jax.jit(jax.grad(lambda w: jnp.sin(outer.apply({'params': w}, tokens(2), plan).aux['halt']).sum()))(own)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads['cell']))
  assert {path: role for path, role in parameter_roles(outer).items() if 'gate' not in path} == parameter_roles(inner)
  assert outer.flops(8, 3.0) == inner.flops(8, 3.0) + 3 * 2 * D
  assert outer.cell.core == inner.cell.core and outer.cell.injects == inner.cell.injects
  if name == 'recur':
    assert outer.cell.diagnose(weights['cell']) == inner.cell.diagnose(weights['cell'])
    later = plans.schedule((0.5, 0.5)).replace(no_grad_steps=jnp.int32(2))
    close(forward(outer, own, tokens(3), later).z, forward(inner, weights, tokens(3), later).z, 1e-6)


@pytest.mark.parametrize('name', INNER)
def test_around_one_another_they_answer_exit_and_decode(name):
  """Two cells deep, by the engine, whose layers are written out: the same text as one pass gives."""
  model = around(name, lambda cell: Damped(Halting(cell)))
  weights = params(model)
  tokenizer = Ids()
  texts = generate(model, weights, tokenizer, ['5 7 9', '11'], budget=3, max_new_tokens=4, temperature=0.0)
  for prompt, text in zip(('5 7 9', '11'), texts):
    ids, new = tokenizer.encode(prompt), tokenizer.encode(text)
    trace = forward(model, weights, jnp.asarray([ids + new]), plans.schedule((1 / 3,) * 3))
    answers = model.apply({'params': weights}, trace.z, method='logits')[0].argmax(-1)
    assert new == answers[len(ids) - 1:-1].tolist()
  rule = exits.Adaptive(rule=exits.Cumulative(threshold=0.6))
  exits.check(model, rule, 'exit')
  trace = model.apply({'params': weights}, tokens(3), plans.Uniform(L)(None), rule, jnp.float32(0.6), method='adapt')
  assert 1 <= int(trace.steps.min()) <= int(trace.steps.max()) <= L
  with pytest.raises(ConfigError, match='the cell has no gate'):
    exits.check(around(name, Damped), rule, 'exit')


@pytest.mark.parametrize('name', INNER)
def test_a_damped_step_goes_its_share_of_the_way(name):
  """In every step, of the inner cell's parameters; a share of one is the inner cell."""
  inner = around(name, None)
  weights = params(inner)
  whole, part = (around(name, lambda cell, share=share: Damped(cell, share)) for share in (1.0, 0.25))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), parts.shapes(inner), parts.shapes(part))
  plan = plans.schedule((0.75, 0.25))
  close(forward(whole, weights, tokens(3), plan).z, forward(inner, weights, tokens(3), plan).z, 1e-6)
  first, e = forward(inner, weights, tokens(3), plan, keep=loop.Every()).xs[0], inner.apply(
      {'params': weights}, tokens(3), jnp.broadcast_to(jnp.arange(tokens(3).shape[1]), tokens(3).shape),
      method=lambda model, tokens, pos: model.read_in(tokens, pos))
  start = jnp.zeros_like(e) if inner.cell.injects else e
  close(forward(part, weights, tokens(3), plan, keep=loop.Every()).xs[0], start + 0.25 * (first - start), 1e-5)
  for share in (0.0, 1.5, float('nan')):
    with pytest.raises(ConfigError, match='model.cell.share'):
      Damped(INNER[name], share).check(D)


@pytest.mark.parametrize('row', ['mor', 'plt', 'melt'])
def test_a_cell_whose_loops_run_together_takes_none_around_it(row):
  cell = Halting(ROWS[row].model.cell)
  with pytest.raises(ConfigError, match=rf'model.cell.of = {type(cell.of).__name__}: its loops run together'):
    cell.check(D)


@pytest.mark.parametrize('wrap, name',
                         [(Halting, 'gate'), (Selective, 'share'), (lambda cell: ToldHidden(cell, D), 'told')])
def test_a_cell_with_parameters_takes_none_of_its_own_kind(wrap, name):
  """However many cells stand between the two; one without parameters, such as Damped, does."""
  for cell in (wrap(wrap(parts.plain(1))), wrap(Damped(wrap(parts.plain(1))))):
    with pytest.raises(ConfigError, match=rf'parameters in one place \(.*"{name}".*take each kind once'):
      parts.shapes(parts.looped(cell))
  assert parts.shapes(parts.looped(Damped(Damped(parts.plain(1)))))


def test_a_folder_of_the_version_before_is_read(tmp_path):
  """A Halting of then had a stack and a norm of its own."""
  model = ROWS['ouro'].model
  encoded = configs._encode(model)
  old = {**encoded['cell'], 'core': encoded['cell']['of']['core'], 'norm': encoded['cell']['of']['norm']}
  del old['of']
  assert configs._decode(json.loads(json.dumps({**encoded, 'cell': old})), tmp_path) == model


# States that are trees -----------------------------------------------------------------------------------------------


class Pair(Cell):
  """Two states: a fast one, which is read out, and a slow one, that it writes to."""
  core: Stack
  mix: Linear = Linear(D, std=0.2)

  def enter(self, x):
    return {'fast': x, 'slow': jnp.zeros_like(x)}

  def output(self, state):
    return state['fast']

  def __call__(self, x, e, ctx, kv):
    fast, kv = self.core(x['fast'] + self.mix(x['slow']), ctx, None, kv)
    return {'fast': fast, 'slow': 0.5 * x['slow'] + fast}, kv, {}


PAIR = parts.looped(Pair(parts.stack(2)))


def by_hand(weights, batch, steps):
  """The same without the loop."""
  plain = parts.looped(Plain(parts.stack(2)), start=PAIR.start)
  own = {**weights, 'cell': {'core': weights['cell']['core']}}
  e = plain.apply({'params': own}, batch,
                  method=lambda m, t: m.read_in(t, jnp.broadcast_to(jnp.arange(t.shape[1]), t.shape)))
  fast, slow, kept = e, jnp.zeros_like(e), []
  for _ in range(steps):
    fast = plain.apply({'params': own}, fast + slow @ weights['cell']['mix']['kernel'],
                       method=lambda m, x: m.cell.core(x, parts.context(x), None, None)[0])
    slow = 0.5 * slow + fast
    kept.append(fast)
  return jnp.stack(kept)


@pytest.mark.parametrize('steps', [1, 3])
def test_a_tree_goes_through_the_loop_and_one_leaf_is_read(steps):
  weights = params(PAIR)
  trace = forward(PAIR, weights, tokens(3), plans.schedule((1 / steps,) * steps), keep=loop.Every())
  close(trace.xs, by_hand(weights, tokens(3), steps), 1e-5)
  close(trace.x, trace.xs[-1], 0)


def test_steps_that_are_skipped_or_not_taken_keep_the_whole_tree():
  """Skipped for all, and for each sequence its own."""
  weights, kept = params(PAIR), by_hand(params(PAIR), tokens(3), L)
  some = plans.Uniform(L)(None)
  skipped = some.replace(active=jnp.array([True, False, True, True]))
  close(forward(PAIR, weights, tokens(3), skipped).x, kept[2], 1e-5)
  each = some.replace(active=jnp.arange(L)[:, None] < jnp.array([1, 4, 2]))
  close(forward(PAIR, weights, tokens(3), each).x, jnp.stack([kept[0, 0], kept[3, 1], kept[1, 2]]), 1e-5)
  trace = PAIR.apply({'params': weights}, tokens(3), some, exits.Adaptive(rule=exits.KL(threshold=0.5)),
                     jnp.float32(0.5), method='adapt')
  assert trace.z.shape == (3, parts.T, D)


@pytest.mark.parametrize('wrap, name', [(Selective, 'Selective'), (lambda cell: ToldHidden(cell, D), 'ToldHidden')])
def test_a_tree_is_refused_where_one_array_is_needed(wrap, name):
  with pytest.raises(ConfigError,
                     match=rf'model\.cell = {name}: the state of Pair is a tree of several arrays; put {name} around'):
    parts.shapes(PAIR.clone(cell=wrap(PAIR.cell)))
  assert parts.shapes(PAIR.clone(cell=Damped(PAIR.cell))) and parts.shapes(PAIR.clone(cell=wrap(parts.plain(1))))


def test_a_tree_decodes_what_the_pass_computes():
  weights, tokenizer = params(PAIR), Ids()
  text, = generate(PAIR, weights, tokenizer, ['5 7 9'], budget=3, max_new_tokens=5, temperature=0.0)
  new = tokenizer.encode(text)
  trace = forward(PAIR, weights, jnp.asarray([[5, 7, 9, *new]]), plans.schedule((1 / 3,) * 3))
  assert new == PAIR.apply({'params': weights}, trace.z, method='logits')[0].argmax(-1)[2:-1].tolist()


class Ids:
  """Texts of numbers."""
  eos, vocab_size = 0, parts.V

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return ''.join(f'{token} ' for token in ids)
