"""What an earlier version wrote is read: work folders with their checkpoints, and an export.

tests/fixtures/before_the_second_foundation.tar.gz was written on 2026-11-29 by the version before cells stood around
cells and projections were parts: the rows `loopformer` and `ouro` of tests/parts.py as it was then, with the logits
that they gave. before_the_layout.tar.gz was written on the same day by commit 7d41941, the last before modules moved
into folders: one run of each of five configurations, two of which define parts in the configuration file itself, a copy
of which lies in the folder; with some columns of the states that their heads read.
"""
import importlib
import json
import sys
import tarfile

import jax
import numpy as np
import pytest

import loopformer
from loopformer import config as configs, moved, plans, types
from loopformer.convert import from_pretrained
from loopformer.model import parameter_roles, run_batch
from loopformer.nn.blocks import PeriNorm, SandwichNorm
from loopformer.nn.layers import MLP, RMSNorm
from loopformer.nn.positions import Rotary
from loopformer.training.checkpoint import Checkpoints, abstract
from loopformer.training.step import init_state
from tests import parts

NAMES = ('loopformer', 'ouro')
LATER = ('linear_icl', 'melt', 'mor', 'plt', 'timestep')


def unpacked(name, folder):
  with tarfile.open(parts.ROOT / f'tests/fixtures/{name}.tar.gz') as archive:
    archive.extractall(folder, filter='data')
  return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return unpacked('before_the_second_foundation', tmp_path_factory.mktemp('before'))


@pytest.fixture(scope='module')
def later(tmp_path_factory):
  return unpacked('before_the_layout', tmp_path_factory.mktemp('later'))


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


@pytest.mark.parametrize('name', LATER)
def test_a_folder_from_before_the_layout_answers_as_it_did(later, name):
  for module in [module for module in sys.modules if module.startswith(configs.LOADED)]:
    del sys.modules[module]  # as in a new process
  model, params, _, config = loopformer.load(later / name)
  said = json.loads((later / 'answers.json').read_text())[name]
  z = run_batch(model, params, {'tokens': np.asarray(said['tokens'])}, plans.schedule(plans.resolve(said['steps']))).z
  np.testing.assert_allclose(z[..., :8], said['z'], atol=2e-5)
  configs.check(config)
  assert not moved.MODULES.keys() & sys.modules.keys()  # old names live while a file is read, and no longer


def test_every_old_name_leads_somewhere():
  for name in moved.MODULES.values():
    importlib.import_module(name)
  for name in moved.NAMES:
    module, _, qualname = moved.name_of(name).partition(':')
    assert hasattr(importlib.import_module(module), qualname), name
  before = set(vars(types))
  with moved.importable():
    from loopformer.types import Ctx
    assert Ctx is types.Context
  assert set(vars(types)) == before


def test_what_older_classes_took_by_default_they_take_still():
  """Names that a configuration file of then imports, and calls without all fields."""
  with moved.importable():
    from loopformer.blocks import Sandwich
    from loopformer.normed_attention import NormedAttention
    from loopformer.peri_normed import PeriNormed
    attn = NormedAttention(heads=2)
    layers = [kind(attn=attn, mlp=MLP(hidden=8)) for kind in (Sandwich, PeriNormed)]
  assert (attn.norm, attn.position) == (RMSNorm(1e-6), Rotary())
  assert [(layer.norm, layer.placement) for layer in layers] == [(RMSNorm(1e-6), SandwichNorm()),
                                                                 (RMSNorm(1e-6), PeriNorm())]
