"""Weights in bfloat16 with masters in float32: what is updated, kept, saved, resumed and answered by."""
import dataclasses
import shutil
import types

from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loopformer
from loopformer import sharding
from loopformer.model import parameter_roles
from loopformer.optim import WSD, AdamW
from loopformer.training import averages, masters
from loopformer.training.averages import Averaged
from loopformer.training.frozen import Freeze
from loopformer.training.masters import Masters
from loopformer.training.train import train
from loopformer.types import ConfigError
from tests import parts
from tests.training.test_train import CONFIG

PLAIN = AdamW(schedule=WSD(peak=0.01), decay=0.1)
MODEL = parts.ROWS['base_loop'].model
CORE = MODEL.cell.core
MODEL = MODEL.clone(cell=MODEL.cell.clone(core=CORE.clone(block=CORE.block.clone(dtype='bfloat16'))))
ROLES = parameter_roles(MODEL)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), parts.shapes(MODEL))


def same(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize('whole, plain', [
    (Masters(of=PLAIN), PLAIN), (Masters(of=Averaged(of=PLAIN, decay=0.5)), Averaged(of=PLAIN, decay=0.5)),
    (Averaged(of=Masters(of=PLAIN), decay=0.5), Averaged(of=PLAIN, decay=0.5))],
                         ids=['alone', 'around averages', 'averaged'])
def test_masters_are_trained_as_float32_and_the_weights_are_these_rounded(whole, plain, params):
  """And averages are of the masters, whichever is around the other."""
  own, plain = whole.make(10, ROLES), plain.make(10, ROLES)
  state, other, theirs = own.init(params), plain.init(params), params
  weights = masters.shortened(params, state)
  short = {path for path, leaf in flatten_dict(weights, sep='/').items() if leaf.dtype == jnp.bfloat16}
  assert short == {path for path in flatten_dict(params, sep='/')
                   if path.endswith('kernel') and path.startswith('cell')}
  for t in range(5):
    grads = jax.tree.map(lambda leaf: jnp.sin(1e3 * leaf + t), params)
    updates, state = own.update(grads, state, weights)
    expected, other = plain.update(grads, other, theirs)
    weights, theirs = optax.apply_updates(weights, updates), optax.apply_updates(theirs, expected)
    same(masters.exchanged(weights, state)[0], theirs)
    same(weights, jax.tree.map(lambda leaf, mine: leaf.astype(mine.dtype), theirs, weights))
  served, swapped = averages.exchanged(weights, state)
  same(served, averages.exchanged(theirs, other)[0])
  assert {leaf.dtype for leaf in jax.tree.leaves(served)} == {jnp.dtype('float32')}
  again, back = averages.exchanged(served, swapped)
  same((again, back), (weights, state))


def test_small_steps_are_not_lost(params):
  """Each below what bfloat16 can tell from nothing beside the weight."""
  own = Masters(of=AdamW(schedule=WSD(peak=1e-5), decay=0.0)).make(400, ROLES)
  state, weights = own.init(params), masters.shortened(params, own.init(params))
  step = jax.jit(lambda weights, state: own.update(jax.tree.map(lambda leaf: -jnp.ones(leaf.shape), params), state,
                                                   weights))
  for _ in range(300):
    updates, state = step(weights, state)
    weights = optax.apply_updates(weights, updates)
  kernel = weights['cell']['core']['block']['mlp']['up']['kernel'].astype(jnp.float32)
  moved = (kernel - params['cell']['core']['block']['mlp']['up']['kernel']).mean()
  assert 2.5e-3 < moved < 3.5e-3


def test_masters_are_divided_as_the_parameters(params):
  state = jax.eval_shape(Masters(of=PLAIN).make(10, ROLES).init, params)
  mesh = types.SimpleNamespace(shape={'data': 1, 'fsdp': 2, 'tensor': 2})
  own, theirs = sharding.specs(params, mesh, ROLES), sharding.specs(state, mesh, ROLES).master
  held = [(spec, leaf) for spec, leaf in zip(jax.tree.leaves(own), jax.tree.leaves(
      theirs, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))) if not isinstance(leaf, optax.MaskedNode)]
  assert len(held) == 4 and all(spec == leaf and {'fsdp', 'tensor'} <= set(spec) for spec, leaf in held)


def test_what_cannot_have_masters(params):
  with pytest.raises(ConfigError, match="all of the model's are in float32; give its blocks dtype = bfloat16"):
    Masters(of=PLAIN).make(10, parameter_roles(parts.ROWS['base_loop'].model))
  with pytest.raises(ConfigError, match='put it around the other'):
    Freeze(of=Masters(of=PLAIN), paths=('cell',)).make(10, ROLES).init(params)


@pytest.mark.slow
def test_a_run_is_resumed_and_answers_by_its_masters(tmp_path):
  """Stopped and resumed it is the run that was not; what is loaded are the masters."""
  block = CONFIG.model.cell.core.block.clone(dtype='bfloat16')
  model = CONFIG.model.clone(cell=CONFIG.model.cell.clone(core=CONFIG.model.cell.core.clone(block=block)))
  config = dataclasses.replace(CONFIG, model=model, optim=Masters(of=CONFIG.optim))
  state = train(config, tmp_path / 'whole', log=lambda text: None)
  half = config.train.steps // 2 // config.train.save_every * config.train.save_every
  shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
  for folder in (tmp_path / 'cut/checkpoints').iterdir():
    if folder.name.isdigit() and int(folder.name) > half:
      shutil.rmtree(folder)
  same(train(config, tmp_path / 'cut', log=lambda text: None), state)
  loaded = loopformer.load(tmp_path / 'whole').params
  same(loaded, averages.exchanged(state.params, state.optimizer)[0])
  kept = flatten_dict(state.params, sep='/')
  assert {leaf.dtype for path, leaf in kept.items() if path.endswith('mlp/up/kernel')} == {jnp.dtype('bfloat16')}
