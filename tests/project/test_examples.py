"""Papers that the library does not know, each in one small file that touches nothing else (docs/adding_a_paper.md)."""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loopformer
from loopformer import config as configs, plans
from loopformer.model import parameter_roles
from loopformer.optim import AdamW, WarmupCosine
from loopformer.sharding import Mesh
from loopformer.training import metrics
from loopformer.training.step import init_state, make_step
from loopformer.training.train import train
from tests import llama_reference as reference, parts
from tests.examples import confidence, low_rank_loops, masked_tokens
from tests.experiments.test_golden import text_of

EXAMPLES = parts.ROOT / 'tests/examples'


@pytest.mark.parametrize('path', sorted(EXAMPLES.glob('[a-z]*.py')), ids=lambda path: path.stem)
def test_a_paper_is_one_small_file(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 60 and max(map(len, lines)) <= 120
  assert not any('tests' in line for line in lines if line.startswith(('from', 'import')))


@pytest.mark.parametrize('module', [low_rank_loops, masked_tokens], ids=['low_rank_loops', 'masked_tokens'])
def test_it_trains_by_the_command_s_own_loop_and_is_read_again(module, tmp_path):
  spec = f'{EXAMPLES / module.__name__.rsplit(".", 1)[1]}.py'
  config = configs.load(spec, ['train.steps=30', 'train.log_every=1', 'train.batch=8'])
  configs.check(config)
  configs.save(config, tmp_path)
  state = train(config, tmp_path, log=lambda text: None)
  losses = [row['loss'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl') if row['kind'] == 'train']
  assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
  model, params, _, read = loopformer.load(tmp_path)
  assert configs.describe(read) == configs.describe(config) and model == config.model
  jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_the_low_rank_example_is_as_it_was_published():
  assert text_of(low_rank_loops.get_config()) == (EXAMPLES / 'low_rank_loops.txt').read_text()


def test_every_loop_has_an_update_of_its_own():
  """Gradients of its set come from its loop alone; with B at zero the model is the one without an update."""
  config = low_rank_loops.get_config('rank=3')
  model, loops = config.model, config.model.loops
  assert parameter_roles(model).of('cell/core/block/mlp/up/b').tensor == -1
  params = parts.params(model)
  batch = {**parts.batch(2), 'tokens': parts.batch(2)['tokens'] % len(config.task.of.symbols)}

  def answers(params, used):
    plan = plans.schedule((1 / loops,) * loops)
    return loopformer.run_batch(model, params, batch, plan.replace(active=jnp.arange(loops) < used)).z.sum()

  for used in range(1, loops + 1):
    grads = jax.jit(jax.grad(answers), static_argnums=1)(params, used)['cell']['core']['block']
    for product in (grads['attn']['qkv'], grads['attn']['out'], grads['mlp']['up'], grads['mlp']['down']):
      for name in 'ab':
        moved = np.abs(product[name]).max((0, 2, 3)) > 0
        assert moved.tolist() == [loop < used for loop in range(loops)]


def test_tokens_are_masked_once_a_step_whatever_the_microbatches():
  config = masked_tokens.get_config()
  objective, model = config.objective, config.model
  batch = {**parts.batch(4), 'tokens': parts.batch(4)['tokens'] % len(config.task.of.symbols)}
  context = parts.plan_context(jax.random.key(3), batch)
  made = objective.prepared(context).batch
  hidden = np.asarray(made['weights']) > 0
  assert 0 < hidden.mean() < 1 and len({row.tobytes() for row in hidden}) > 1
  np.testing.assert_array_equal(made['tokens'], np.where(hidden, len(config.task.of.symbols), batch['tokens']))
  np.testing.assert_array_equal(made['targets'], batch['tokens'])
  other = objective.prepared(parts.plan_context(jax.random.key(4), batch)).batch
  assert (other['tokens'] != made['tokens']).any()
  optimizer = optax.sgd(1.0)
  results = []
  for accumulate in (1, 2):
    state = jax.jit(functools.partial(init_state, model, optimizer, 0))()
    step = make_step(model, objective, optimizer, Mesh().make(jax.devices()[:1]), accumulate)
    results.append(step(state, batch)[0].params)
  parts.close(*results, 1e-5)


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A Hugging Face folder with a small Llama, looped."""
  folder = tmp_path_factory.mktemp('llama')
  given = reference.CONFIGS['llama']
  reference.save(folder, given, reference.weights(given), 1)
  return loopformer.load(folder, loops=3, prelude=1)


def test_a_head_on_an_imported_llama_learns_at_random_loops(llama):
  """In somebody's own loop: what it tells changes no answer, it learns by its term alone, and both losses fall."""
  model, objective = confidence.sure(llama.model)
  first = loopformer.init_params(model, jax.random.key(0))
  params = {**llama.params, 'cell': {**llama.params['cell'], 'head': first['cell']['head']}}
  assert jax.tree.structure(params) == jax.tree.structure(first)
  tokens = np.random.default_rng(0).integers(1, model.read_in.vocab, (4, 9))
  batch = {'tokens': jnp.asarray(tokens[:, :-1]), 'targets': jnp.asarray(tokens[:, 1:]), 'weights': jnp.ones((4, 8))}
  plan = plans.schedule((1 / 3,) * 3)
  np.testing.assert_array_equal(loopformer.run_batch(model, params, batch, plan).z,
                                loopformer.run_batch(llama.model, llama.params, batch, plan).z)
  roles = parameter_roles(model)
  optimizer = AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=1)).make(40, roles)

  def loss(params, step):
    context = objective.prepared(parts.plan_context(jax.random.fold_in(jax.random.key(1), step), batch))
    total, terms = objective(model, params, context, objective.denominators(context.batch))
    return total, (terms, context.batch['loop'])

  @jax.jit
  def update(params, state, step):
    (_, (terms, loops)), grads = jax.value_and_grad(loss, has_aux=True)(params, step)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state, terms, loops

  only = dataclasses.replace(objective, terms={'sure': objective.terms['sure']})
  context = only.prepared(parts.plan_context(jax.random.key(1), batch))
  grads = jax.jit(jax.grad(lambda p: only(model, p, context, only.denominators(context.batch))[0]))(params)
  moved = {path[1].key for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if np.abs(leaf).max() > 0}
  assert moved == {'head'}
  state, told, seen = optimizer.init(params), [], set()
  for step in range(40):
    params, state, terms, loops = update(params, state, step)
    told.append({name: float(value) for name, value in terms.items()})
    seen |= set(np.asarray(loops).tolist())
  assert seen == {0, 1, 2}
  assert told[-1]['lm'] < told[0]['lm'] - 0.1 and told[-1]['sure'] < told[0]['sure'] - 0.05


def test_the_page_about_it_runs(tmp_path):
  """docs/adding_a_paper.md: its first program is a configuration file, its second somebody's own loop."""
  first, second = re.findall(r'```python\n(.*?)```', (parts.ROOT / 'docs/adding_a_paper.md').read_text(), re.DOTALL)
  assert len(first.splitlines()) <= 42
  (tmp_path / 'damped.py').write_text(first)
  config = configs.load(f'{tmp_path}/damped.py', ['train.steps=2', 'optim.schedule.warmup=1', 'train.eval_batches=1'])
  configs.check(config)
  configs.save(config, tmp_path / 'run')
  train(config, tmp_path / 'run', log=lambda text: None)
  model, params, _, _ = loopformer.load(tmp_path / 'run')
  assert model.cell.of == config.model.cell.of and params['cell']['share'].shape == ()
  batch = {**parts.batch(2), 'tokens': parts.batch(2)['tokens'] % 4, 'targets': parts.batch(2)['targets'] % 4}
  names = {'batch': batch}
  exec(first + second, names)
  assert np.isfinite(names['loss']) and names['trace'].z.shape == (2, parts.T, 32)
