"""Weights come from anywhere: `loopformer.load` of runs and of models from elsewhere, and what `save` makes of them."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import loopformer
from loopformer import config as configs, loop, plans
from loopformer.cells.plain import Normed
from loopformer.convert import export, from_official, to_official
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.model import make_readout
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Own, Rollout, Weighted
from loopformer.sharding import Mesh
from loopformer.terms.distill import Distill
from loopformer.training.train import train
from loopformer.types import ConfigError
from tests import llama_reference as reference, parts
from tests.training.test_train import CONFIG


def same(one, two):
  jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Source and options by kind, and parameters of each."""
  folder = tmp_path_factory.mktemp('sources')
  given = reference.CONFIGS['llama']
  reference.save(folder / 'llama', given, reference.weights(given), 1)
  model = parts.ROWS['base_loop'].model.clone(read_in=parts.ROWS['base_loop'].model.read_in.clone(vocab=256))
  weights = parts.params(model)
  export(model, weights, ByteTokenizer(), folder / 'export')
  state = to_official('base_loop', parts.ROWS['base_loop'].model, parts.params(parts.ROWS['base_loop'].model))
  np.savez(folder / 'official.npz', **state)
  theirs = from_official('base_loop', folder / 'official.npz', heads=2)
  return {'llama': (folder / 'llama', {'loops': 2}, None), 'export': (folder / 'export', {}, (model, weights)),
          'official': (folder / 'official.npz', {'kind': 'base_loop', 'heads': 2}, theirs)}


@pytest.mark.parametrize('kind', ['llama', 'export', 'official'])
def test_a_model_from_elsewhere_becomes_a_work_folder(kind, sources, tmp_path):
  source, options, expected = sources[kind]
  loaded = loopformer.load(source, **options)
  model, params, tokenizer, config = loaded
  assert loaded.model is model and config.model == model and config.task.length == model.read_in.length
  if expected:
    assert model == expected[0].clone(loops=model.loops)
    same(params, expected[1])
  loaded.save(tmp_path / 'run')
  again = loopformer.load(tmp_path / 'run')
  assert again.model == model and configs.describe(again.config) == configs.describe(config)
  same(again.params, params)
  assert (again.tokenizer is None) == (tokenizer is None)
  if kind == 'export':
    assert again.tokenizer.fingerprint() == ByteTokenizer().fingerprint()
    text, = loopformer.generate(*again[:3], ['ab'], max_new_tokens=3, temperature=0.0)
    assert text == loopformer.generate(*loaded[:3], ['ab'], max_new_tokens=3, temperature=0.0)[0]
  with pytest.raises(ConfigError, match='it holds a run; give a new folder'):
    loaded.save(tmp_path / 'run')
  with pytest.raises(ConfigError, match='holds an imported model and no task; .*train.start'):
    again.config.task.prepare(tmp_path / 'run')


def test_a_model_of_symbols_is_saved_and_loaded(tmp_path):
  """Its tokenizer is the list of them, in a file of its own, whatever its task."""
  config = configs.load('relay:cpu,kind=chain')
  model, tokenizer = config.model, config.task.tokenizer_of('')
  weights = parts.params(model)
  loopformer.Loaded(model, weights, tokenizer, config).save(tmp_path / 'run')
  again = loopformer.load(tmp_path / 'run')
  assert again.model == model and again.tokenizer == tokenizer
  same(again.params, weights)
  file = tmp_path / 'run/tokenizer/symbols.json'
  for text, message in (('{}', 'it holds dict'), ('["a", 3]', 'it is no list of texts'),
                        ('[]', 'it is no list of texts')):
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf'symbols\.json is damaged: {message}.*; save the model again'):
      loopformer.load(tmp_path / 'run')


def test_what_a_source_does_not_have_is_refused(sources, tmp_path):
  with pytest.raises(ConfigError, match='step = 3: .* is no work folder'):
    loopformer.load(sources['llama'][0], step=3)
  configs.save(CONFIG, tmp_path)
  with pytest.raises(ConfigError, match='loops: a work folder says itself how its model is made'):
    loopformer.load(tmp_path, loops=2)
  for path in ('', None, 3):
    with pytest.raises(ConfigError, match=f'source = {path!r}: give a path'):
      loopformer.load(path)
    with pytest.raises(ConfigError, match=f'workdir = {path!r}: give a path'):
      loopformer.Loaded(None, None, None, None).save(path)
  with pytest.raises(ConfigError, match='nothing: there is no such file or folder'):
    loopformer.load(tmp_path / 'nothing')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match='no config.json in it'):
    loopformer.load(tmp_path / 'empty')
  (tmp_path / 'damaged').mkdir()
  (tmp_path / 'damaged/config.json').write_text('{"$part": ')
  with pytest.raises(ValueError):
    loopformer.load(tmp_path / 'damaged')


def test_training_starts_from_parameters(tmp_path):
  """Given in memory, from a folder that was saved, or by train.start: the same run."""
  params = parts.params(CONFIG.model)
  still = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, steps=2, eval_every=2, save_every=2))
  loopformer.Loaded(still.model, params, None, still).save(tmp_path / 'saved')
  configs.save(still, tmp_path / 'given')
  ends = [train(still, tmp_path / 'given', log=lambda text: None, params=params),
          train(still, tmp_path / 'saved', log=lambda text: None)]
  same(ends[0].params, ends[1].params)
  assert int(ends[1].step) == 2
  moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), ends[0].params, params)
  assert 0 < max(jax.tree.leaves(moved)) < 0.05  # two steps from there, not from a random start
  same(loopformer.load(tmp_path / 'saved').params, ends[1].params)
  with pytest.raises(ConfigError, match=r'params: cell/core.* has the shape .* there, .* in the model'):
    (tmp_path / 'other').mkdir()
    train(still, tmp_path / 'other', log=lambda text: None, params={**params, 'cell': {}})


def test_a_batch_is_run_at_its_positions_and_within_its_documents():
  model, batch = parts.ROWS['prelude_coda'].model, parts.batch()
  plan, params = parts.padded(2), parts.params(parts.ROWS['prelude_coda'].model)
  trace = loopformer.run_batch(model, params, batch, plan)
  same(trace.z, model.apply({'params': params}, batch['tokens'], plan, batch['positions'], batch['segments']).z)
  bare = {'tokens': batch['tokens']}
  same(loopformer.run_batch(model, params, bare, plan).z, model.apply({'params': params}, batch['tokens'], plan).z)
  assert np.abs(trace.z - loopformer.run_batch(model, params, bare, plan).z).max() > 1e-3


def test_a_saved_model_is_divided_over_a_mesh_when_it_is_loaded(sources, tmp_path):
  loaded = loopformer.load(sources['export'][0])
  loaded.save(tmp_path / 'run')
  mesh = Mesh().make(jax.devices()[:1])
  params = loopformer.load(tmp_path / 'run', mesh=mesh).params
  same(params, loaded.params)
  assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(params)) and jnp.float32 == params['read_in'][
      'embedding'].dtype


def test_a_rollout_runs_the_model_of_another_folder(tmp_path):
  """A teacher of another make, wider and with other layers: what is learned from it by hand, and in a run."""
  student, teacher = parts.looped(parts.plain(1)), parts.looped(
      Normed(Stack(parts.block(RMSNorm(), heads=3), 2), RMSNorm()),
      read_in=TokenEmbed(vocab=parts.V, width=24, length=32))
  weights, theirs = parts.params(student), parts.params(teacher)
  folder = str(tmp_path / 'teacher')
  loopformer.Loaded(teacher, theirs, None, dataclasses.replace(CONFIG, model=teacher)).save(folder)
  plan = plans.Uniform(2)
  objective = Objective(rolls={'own': Rollout(plan, keep=loop.Every()),
                               'there': Rollout(plan, loop.Every(), Own(folder=folder))},
                        terms={'kd': Weighted(1.0, Distill(roll='own', teacher='there'))})
  config = dataclasses.replace(CONFIG, model=student, objective=objective, train=dataclasses.replace(
      CONFIG.train, steps=2, eval_every=2, save_every=2))
  configs.check(config)
  batch, (name,) = parts.batch(), objective.teachers

  def loss(weights, theirs):
    context = parts.plan_context(jax.random.key(0), batch)
    return objective(student, weights, context, objective.denominators(batch), {name: theirs})[0]

  value, (own, taught) = jax.jit(jax.value_and_grad(loss, (0, 1)))(weights, theirs)
  laws = []
  for model, params in ((teacher, theirs), (student, weights)):
    trace = loopformer.run_batch(model, params, batch, plan(None), keep=loop.Every())
    z = make_readout(model, params, batch).read(trace.xs)
    laws.append(jax.nn.log_softmax(model.apply({'params': params}, z, method='logits')))
  apart = (jnp.exp(laws[0]) * (laws[0] - laws[1])).sum(-1).mean(0)
  assert value == pytest.approx(float((apart * batch['weights']).sum() / batch['weights'].sum()), rel=1e-4)
  assert not any(leaf.any() for leaf in jax.tree.leaves(taught)) and any(leaf.any() for leaf in jax.tree.leaves(own))
  assert objective.flops(student, 8) == 3 * student.flops(8, 2) + teacher.flops(8, 2)
  configs.save(config, tmp_path / 'run')
  assert configs.read(tmp_path / 'run').objective == objective
  train(config, tmp_path / 'run', log=lambda text: None)
  same(loopformer.load(folder).params, theirs)
  fewer = parts.looped(parts.plain(1), read_in=TokenEmbed(vocab=parts.V - 1, width=parts.D, length=32))
  with pytest.raises(ConfigError, match='has 40 answers to choose from, the model 39'):
    configs.check(dataclasses.replace(config, model=fewer))
  with pytest.raises(ConfigError, match='no config.json in it'):
    configs.check(dataclasses.replace(config, objective=dataclasses.replace(objective, rolls={
        **objective.rolls, 'there': Rollout(plan, loop.Every(), Own(folder=str(tmp_path / 'nobody')))})))
