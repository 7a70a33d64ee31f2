"""What an earlier version wrote is read: work folders with their checkpoints, and an export.

tests/fixtures/before_the_second_foundation.tar.gz was written on 2026-11-29 by the version before cells stood around
cells and projections were parts: the rows `loopformer` and `ouro` of tests/parts.py as it was then, with the logits that
they gave.
"""
import json
import tarfile

import jax
import numpy as np
import pytest

import loopformer
from loopformer.checkpoint import Checkpoints, abstract
from loopformer.convert import from_pretrained
from loopformer.model import parameter_roles
from loopformer.train import init_state
from tests import parts

NAMES = ('loopformer', 'ouro')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  made = tmp_path_factory.mktemp('before')
  with tarfile.open(parts.ROOT / 'tests/fixtures/before_the_second_foundation.tar.gz') as archive:
    archive.extractall(made, filter='data')
  return made


@pytest.mark.parametrize('name', NAMES)
def test_a_work_folder_answers_as_it_did(folder, name):
  model, params, tokenizer, config = loopformer.load(folder / name)
  said = json.loads((folder / 'answers.json').read_text())[name]
  assert tokenizer.vocab_size <= model.read_in.vocab and config.name == name and model == parts.ROWS[name].model
  np.testing.assert_allclose(loopformer.logits(model, params, said['tokens'], steps=said['steps']), said['logits'],
                             atol=2e-5)


@pytest.mark.parametrize('name', NAMES)
def test_its_optimiser_goes_on(folder, name):
  """Every array of its state has a place."""
  _, _, _, config = loopformer.load(folder / name)
  optimizer = config.optim.make(config.train.steps, parameter_roles(config.model))
  shapes = jax.eval_shape(lambda: init_state(config.model, optimizer, 0))
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  target = abstract(shapes, jax.tree.map(lambda _: here, shapes))
  with Checkpoints(folder / name) as checkpoints:
    step, (params, state, *_) = checkpoints.restore_last(target.params, target.optimizer, print)
  assert step == 2 and jax.tree.structure(state) == jax.tree.structure(shapes.optimizer)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes.params)


def test_an_export_is_read(folder):
  model, params, tokenizer = from_pretrained(folder / 'export')
  ours, theirs, _, _ = loopformer.load(folder / 'loopformer')
  assert model == ours.clone(remat=model.remat) and tokenizer is None
  jax.tree.map(np.testing.assert_array_equal, params, theirs)
