"""Averages of weights: what they are, and that a run, its evaluations, its checkpoints and its resumption have them."""
import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loopformer
from loopformer import config as configs
from loopformer.model import parameter_roles
from loopformer.optim import WSD, AdamW, WarmupCosine
from loopformer.training import averages
from loopformer.training.averages import Averaged, AveragedState
from loopformer.training.frozen import Freeze
from loopformer.training.train import train
from loopformer.types import ConfigError
from tests import parts
from tests.parts import ROWS, params
from tests.training.test_train import CONFIG

PART = Averaged(of=AdamW(schedule=WSD(peak=0.1), decay=0.1), decay=0.7)


def test_an_average_is_its_formula_and_training_is_not_touched():
  model = ROWS['base_loop'].model
  roles, weights = parameter_roles(model), params(model)
  own, plain = PART.make(10, roles), PART.of.make(10, roles)
  state, other, average, theirs = own.init(weights), plain.init(weights), weights, weights
  for t in range(12):
    grads = jax.tree.map(lambda leaf: jnp.sin(leaf + t), weights)
    updates, state = own.update(grads, state, weights)
    expected, other = plain.update(grads, other, theirs)
    weights, theirs = optax.apply_updates(weights, updates), optax.apply_updates(theirs, expected)
    stays = min(0.7, (1 + t) / (10 + t))
    average = jax.tree.map(lambda a, p: stays * a + (1 - stays) * p, average, weights)
  jax.tree.map(np.testing.assert_array_equal, weights, theirs)
  parts.close(state.average, average, 1e-6)
  served, swapped = averages.exchanged(weights, state)
  jax.tree.map(np.testing.assert_array_equal, served, state.average)
  again, back = averages.exchanged(served, swapped)
  jax.tree.map(np.testing.assert_array_equal, (again, back), (weights, state))
  assert averages.exchanged(weights, other) == (weights, other)


def test_what_is_frozen_is_served_as_it_was():
  model = ROWS['ouro'].model
  weights = jax.tree.map(jnp.asarray, params(model))  # a tree of its own, which is taken apart
  own = Averaged(of=Freeze(of=AdamW(schedule=WSD(peak=0.1), decay=0.1), paths=('cell/gate',))).make(
      10, parameter_roles(model))
  now, state = weights, own.init(weights)
  for _ in range(4):
    updates, state = own.update(jax.tree.map(jnp.ones_like, weights), state, now)
    now = optax.apply_updates(now, updates)
  served, _ = averages.exchanged(now, state)
  assert np.abs(served['cell'].pop('gate')['kernel'] - weights['cell']['gate']['kernel']).max() > 1e-2
  del weights['cell']['gate']
  jax.tree.map(np.testing.assert_array_equal, served, weights)


def test_a_part_of_the_parameters_cannot_be_averaged():
  model = ROWS['ouro'].model
  with pytest.raises(ConfigError, match='put it around the other'):
    Freeze(of=PART, paths=('cell/gate',)).make(10, parameter_roles(model)).init(params(model))
  with pytest.raises(ConfigError, match=r'optim\.decay = 1\.0'):
    Averaged(of=PART.of, decay=1.0)


@pytest.mark.slow
def test_a_run_answers_by_its_averages_and_goes_on_from_its_parameters(tmp_path):
  """Stopped and resumed it is the run that was not; what is loaded are the averages, and they start another run."""
  config = dataclasses.replace(CONFIG, optim=Averaged(of=CONFIG.optim, decay=0.8))
  plain = train(CONFIG, _saved(CONFIG, tmp_path / 'plain'), log=_quiet)
  whole = train(config, _saved(config, tmp_path / 'whole'), log=_quiet)
  parts.close(whole.params, plain.params, 1e-6)
  assert isinstance(whole.optimizer, AveragedState)
  model, served, _, _ = loopformer.load(tmp_path / 'whole')
  jax.tree.map(np.testing.assert_array_equal, served, whole.optimizer.average)
  assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(jax.tree.leaves(served), jax.tree.leaves(whole.params)))
  folder = _saved(config, tmp_path / 'resumed')
  train(config, folder, log=_quiet)
  shutil.rmtree(folder / 'checkpoints' / str(config.train.steps))  # as if it had been stopped before
  again = train(config, folder, log=_quiet)
  jax.tree.map(np.testing.assert_array_equal, (again.params, again.optimizer), (whole.params, whole.optimizer))
  started = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=1, start=str(tmp_path / 'whole')),
                                optim=Averaged(of=AdamW(schedule=WarmupCosine(peak=0.0, end=0.0, warmup=0), decay=0.0)))
  first = train(started, _saved(started, tmp_path / 'started'), log=_quiet)
  jax.tree.map(np.testing.assert_array_equal, first.params, served)
  parts.close(first.optimizer.average, served, 1e-6)


def _quiet(text):
  pass


def _saved(config, folder):
  configs.save(config, folder)
  return folder
