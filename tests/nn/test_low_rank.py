"""Updates of low rank: put into a model, learned alone, merged, written out; and begun from what tying layers loses."""
import json

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import loopformer
from loopformer import config as configs
from loopformer.cells.plain import Normed
from loopformer.convert import export, from_pretrained, relaxed
from loopformer.model import parameter_roles
from loopformer.nn import low_rank
from loopformer.nn.layers import RMSNorm
from loopformer.nn.low_rank import LowRank, adapted, added, merged, written_out
from loopformer.optim import WSD, AdamW
from loopformer.training.averages import Averaged, exchanged
from loopformer.training.frozen import Freeze
from loopformer.types import ConfigError
from tests import llama_reference as reference, parts
from tests.llama_reference import CONFIGS, D

CONFIG = CONFIGS['llama'] | {'num_hidden_layers': 6}
TOKENS = np.random.default_rng(3).integers(0, reference.V, (2, 9))


def drawn(model):
  """Parameters of which every one is felt."""
  rng = np.random.default_rng(0)
  return unflatten_dict({path: jnp.asarray(('scale' in path) + 0.2 * rng.standard_normal(leaf.shape), leaf.dtype)
                         for path, leaf in flatten_dict(parts.shapes(model), sep='/').items()}, sep='/')


@pytest.fixture(scope='module')
def decoder(tmp_path_factory):
  """(model, params) of an untied decoder of six layers, the outer ones beside the loop."""
  folder = tmp_path_factory.mktemp('decoder')
  reference.save(folder, CONFIG, reference.weights(CONFIG), 1)
  return from_pretrained(folder, prelude=1, coda=1)[:2]


def close(one, two, tolerance=1e-4):
  np.testing.assert_allclose(one, two, rtol=0, atol=tolerance)


@pytest.mark.parametrize('name', ['loopformer', 'ouro'])
def test_what_is_merged_is_the_same_function(name):
  """With gates of the step, which act on the update too, and of a step around a step."""
  plain = parts.ROWS[name].model
  model = adapted(plain, 2)
  params = drawn(model)
  (again, weights), tokens = merged(model, params), parts.batch(2)['tokens']
  assert (again == plain
          and jax.tree.map(jnp.shape, weights) == jax.tree.map(lambda leaf: leaf.shape, parts.shapes(plain)))
  both = [loopformer.logits(m, p, tokens) for m, p in ((model, params), (again, weights))]
  close(*both)
  without = {path: leaf for path, leaf in flatten_dict(params, sep='/').items() if path not in added(model, plain)}
  assert np.abs(loopformer.logits(plain, unflatten_dict(without, sep='/'), tokens) - both[0]).max() > 1e-3


def test_only_what_was_added_is_new_and_learns(decoder):
  model = adapted(decoder[0], 2)
  paths = added(model, decoder[0])
  assert len(paths) == 24 and all(path.rsplit('/', 1)[1] in ('a', 'b') for path in paths)
  params, optim = drawn(model), Averaged(of=Freeze(of=AdamW(schedule=WSD(peak=0.1)), paths=paths), decay=0.5)
  transformation = optim.make(10, parameter_roles(model))
  state, new = transformation.init(params), params
  for _ in range(3):
    updates, state = transformation.update(jax.tree.map(jnp.ones_like, params), state, new)
    new = optax.apply_updates(new, updates)
  before, after, served = (flatten_dict(tree, sep='/') for tree in (params, new, exchanged(new, state)[0]))
  for path in before:
    assert np.array_equal(before[path], after[path]) == (path not in paths)
    assert np.allclose(before[path], served[path], rtol=1e-6, atol=0) == (path not in paths)


def test_a_model_is_adapted_once(decoder):
  with pytest.raises(ConfigError, match='have updates of low rank already'):
    adapted(adapted(decoder[0], 2), 2)
  with pytest.raises(ConfigError, match='none of its layers has a product that could be updated'):
    adapted(configs.load('linear_icl').model, 2)


def test_an_update_beside_the_gates_is_not_merged():
  plain = parts.ROWS['loopformer'].model
  model = low_rank._with(plain, lambda linear: LowRank(rank=2, of=linear))
  for beside in (model, low_rank._with(plain, lambda linear: LowRank(rank=2, of=linear, loops=2))):
    with pytest.raises(ConfigError, match=r'LowRank\.gained = False: the step makes gates'):
      merged(beside, drawn(beside))


# Exports -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('each', [False, True])
def test_an_export_is_merged(each, decoder, tmp_path):
  """Those of all loops into the weights; those of each into layers that are written out: a plain Llama in both cases.
  """
  model = adapted(decoder[0].clone(loops=2), 3, each)
  params = drawn(model)
  if each:
    assert params['cell']['core']['block']['mlp']['up']['a'].shape == (4, 2, D, 3)
    assert params['coda']['block']['mlp']['up']['a'].shape == (1, 1, D, 3)
  done = export(model, params, None, tmp_path / 'out')
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert done.model_type == 'llama' and not done.reason and config['num_hidden_layers'] == 1 + 2 * 4 + 1
  expected = loopformer.logits(model, params, TOKENS)
  close(loopformer.logits(*from_pretrained(tmp_path / 'out')[:2], TOKENS), expected)
  transformers, torch = (pytest.importorskip(name) for name in ('transformers', 'torch'))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out').eval()
  with torch.no_grad():
    close(theirs(torch.tensor(TOKENS)).logits.numpy(), expected, 1e-3)


def test_layers_in_an_order_of_their_own_are_written_out(decoder):
  core = decoder[0].cell.core.clone(order=(2, 0, 0, 3))
  model = adapted(decoder[0].clone(cell=decoder[0].cell.clone(core=core), loops=2), 2, True)
  params = drawn(model)
  out, weights = written_out(model, params)
  assert out.loops == 1 and out.cell.core.depth == 8
  close(loopformer.logits(out, weights, TOKENS), loopformer.logits(model, params, TOKENS))


def test_an_update_a_loop_of_another_step_is_exported_with_it(decoder, tmp_path):
  """Those of prelude and coda are merged, those of each loop kept."""
  model = adapted(decoder[0].clone(cell=Normed(decoder[0].cell.core, RMSNorm()), loops=2), 2, True)
  params = drawn(model)
  done = export(model, params, None, tmp_path / 'out')
  assert done.model_type == 'loopformer' and 'Normed' in done.reason
  back, weights, _ = from_pretrained(tmp_path / 'out')
  assert back.prelude == decoder[0].prelude and back.cell == model.cell
  for steps in (1, 2, 3):
    close(loopformer.logits(back, weights, TOKENS, steps=steps), loopformer.logits(model, params, TOKENS, steps=steps))


# Relaxed recursion ---------------------------------------------------------------------------------------------------


def test_with_the_full_rank_it_is_the_decoder(decoder):
  model, params = relaxed(*decoder, loops=2, rank=D)
  assert model.loops == 2 and model.cell.core.depth == 2
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, parts.shapes(model))
  close(loopformer.logits(model, params, TOKENS), loopformer.logits(*decoder, TOKENS))


def test_each_update_is_the_nearest_of_its_rank_to_what_tying_loses(decoder):
  model, params = relaxed(*decoder, loops=2, rank=3)
  before, after = ({path: np.asarray(leaf)
                    for path, leaf in flatten_dict(tree['cell']['core']['block'], sep='/').items()}
                   for tree in (decoder[1], params))
  for product, norm in (('attn/qkv', 'norm_attn'), ('attn/out', None), ('mlp/up', 'norm_mlp'), ('mlp/down', None)):
    scale = 1 if norm is None else before[f'{norm}/scale'][..., None]
    whole = (scale * before[f'{product}/kernel']).reshape(2, 2, *before[f'{product}/kernel'].shape[1:])  # [loop, layer]
    close(after[f'{product}/kernel'], whole.mean(0), 1e-5)
    for loop in range(2):
      for layer in range(2):
        rest = whole[loop, layer] - whole[:, layer].mean(0)
        update = after[f'{product}/a'][layer, loop] @ after[f'{product}/b'][layer, loop]
        lost = np.linalg.svd(rest, compute_uv=False)[3:]
        np.testing.assert_allclose(np.linalg.norm(rest - update), np.linalg.norm(lost), rtol=1e-3)
  np.testing.assert_array_equal(after['norm_attn/scale'], 1)
  assert model.cell.core.block.mlp.linear.loops == 2 and model.coda.block.mlp == decoder[0].coda.block.mlp


@pytest.mark.parametrize('change, fields, message', [
    (lambda model: model, {'loops': 3}, 'loops = 3 does not divide the 4 layers'),
    (lambda model: model, {'rank': D + 1}, rf'rank = {D + 1}: .*kernel is a matrix of {D} x'),
    (lambda model: model, {'rank': 0}, 'rank = 0'), (lambda model: model, {'loops': 0}, 'loops = 0'),
    (lambda model: model, {'loops': 10_001}, 'loops = 10001'),
    (lambda model: model, {'loops': 1}, 'loops = 1: one loop has nothing that is tied'),
    (lambda model: model.clone(loops=2), {}, 'it is no plain decoder'),
    (lambda model: parts.ROWS['ouro'].model.clone(loops=1), {}, 'it is no plain decoder')])
def test_what_cannot_be_tied(change, fields, message, decoder):
  with pytest.raises(ConfigError, match=message):
    relaxed(change(decoder[0]), decoder[1], **{'loops': 2, 'rank': 2, **fields})
