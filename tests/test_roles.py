"""What a parameter is follows from how it is declared, whatever its name."""
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loopformer import plans, roles, sharding
from loopformer.cells.plain import Plain
from loopformer.inference.flat import flattened
from loopformer.model import parameter_roles
from loopformer.nn.layers import Dense, Linear, Normal, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.optim import WSD, AdamW, AtanAdam, Muon
from loopformer.roles import Role
from tests import parts


class Odd(nn.Module):
  """A layer of somebody else's, whose parameters have the names that meant something else before roles were declared.
  """
  dtype = 'bfloat16'
  layers = 1
  modulated, viewed = False, False

  @nn.compact
  def __call__(self, x, ctx, mod, kv, layer=0):
    width = x.shape[-1]
    a = self.param('A', nn.initializers.normal(0.02), (width, width))  # a matrix: decays
    b = self.param('B', nn.initializers.ones, (width,))  # a vector: does not
    kernel = self.param('kernel', nn.initializers.ones, (width,))
    table = roles.param(self, 'table', nn.initializers.ones, (width, 4), Role(decayed=False, tensor=-2))
    y = Dense(name='anything')(x.astype(self.dtype), width, Normal(0.02), divided=-1).astype(x.dtype)
    exact = Linear(width, name='up')(x.astype(jnp.float32))  # in float32, whatever the layer's dtype
    return x + y + exact + (x @ a) * b * kernel + table.sum(), kv

  def check(self, width, where):
    pass

  def heads_of(self, width):
    return 1, width

  def flops(self, width, length):
    return 0.0


MODEL = parts.looped(Plain(Stack(Odd(), 3, norm=RMSNorm())))
PLAN = plans.schedule((0.5, 0.5))


def own(tree, at=('cell', 'core', 'block')):
  for name in at:
    tree = tree[name]
  return tree


def test_matrices_decay_and_what_is_declared_does_as_it_says():
  shapes, found = parts.shapes(MODEL), parameter_roles(MODEL)
  assert own(found.decayed(shapes)) == {'A': True, 'B': False, 'kernel': False, 'table': False,
                                        'anything': {'kernel': True}, 'up': {'kernel': True}}
  assert found.of('cell/core/norm/scale') == Role()
  assert all(role.layered == ('block' in path) for path, role in found.items())


@pytest.mark.parametrize('part', [AdamW(schedule=WSD(peak=0.1), decay=0.5),
                                  AtanAdam(schedule=WSD(peak=0.1), decay=0.05)], ids=['adamw', 'atan'])
def test_a_step_without_gradient_shrinks_what_decays_alone(part):
  weights = parts.params(MODEL)
  optimizer = part.make(10, parameter_roles(MODEL))
  updates, _ = jax.jit(lambda w: optimizer.update(optax.tree.zeros_like(w), optimizer.init(w), w))(weights)
  moved = jax.tree.map(lambda update: bool(np.abs(update).max() > 0), updates)
  assert moved == parameter_roles(MODEL).decayed(weights)


def test_muon_takes_projections_whatever_they_are_called():
  labels = parameter_roles(MODEL)
  assert {path for path, role in labels.items() if role.dtype is not None} == {
      ('cell', 'core', 'block', name, 'kernel') for name in ('anything', 'up')}
  weights = parts.params(MODEL)
  optimizer = Muon(schedule=WSD(peak=1.0), matrices=('block',)).make(10, labels)
  state = jax.eval_shape(optimizer.init, weights)
  taken = {path for path, _ in jax.tree_util.tree_leaves_with_path(state[1].inner_states['muon'])
           if 'mu' in str(path)}
  assert {labels.at(path).dtype is not None for path in taken} == {True}
  assert len(taken) == 2


def test_a_tensor_group_divides_the_axis_that_is_declared_of_states_too():
  found, sizes = parameter_roles(MODEL), {'fsdp': 1, 'tensor': 2}
  state = jax.eval_shape(AdamW(schedule=WSD(peak=0.1)).make(10, found).init, parts.shapes(MODEL))
  split = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    partition = tuple(sharding.spec(found.at(path), leaf.shape, sizes))
    if 'tensor' in partition:
      split.setdefault(str(path[-1].key if path[-1].key != 'kernel' else path[-2].key), set()).add(partition)
  assert split == {'table': {(None, 'tensor')}, 'anything': {(None, None, 'tensor')}, 'embedding': {('tensor',)}}


@pytest.mark.parametrize('transpose', [False, True])
def test_decoding_casts_what_multiplies_in_that_dtype_alone(transpose):
  flat, params = flattened(MODEL, parts.params(MODEL), transpose)
  block, name = params['cell']['core']['blocks_0'], 'transposed' if transpose else 'kernel'
  assert block['anything'][name].dtype == jnp.bfloat16 and block['up'][name].dtype == jnp.float32
  assert block['kernel'].dtype == jnp.float32 and block['A'].shape == (parts.D, parts.D)
  one, two = (model.apply({'params': p}, parts.tokens(2), PLAN).z
              for model, p in ((MODEL, parts.params(MODEL)), (flat, params)))
  parts.close(one, two, 1e-2 if transpose else 1e-5)
