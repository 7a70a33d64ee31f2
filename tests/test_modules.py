"""Modules are values: one instance in several places of a model is as many sets of parameters."""
import jax
import jax.numpy as jnp
import pytest

from loopformer import plans
from loopformer.cells.cell import Cell
from loopformer.cells.plain import Plain
from loopformer.cells.recur import Recur
from loopformer.inference import exits
from loopformer.inference.flat import flattened
from loopformer.model import Looped, parameter_shapes
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, Chain
from loopformer.nn.inject import Concat
from loopformer.nn.layers import GatedMLP, Linear, RMSNorm
from loopformer.nn.stack import Stack
from loopformer.papers.melt.attention import Elementwise, LatentAttention
from loopformer.papers.melt.cell import Gated, Latest
from tests import parts
from tests.parts import D, tokens


class Several(Cell):
  """A cell with modules in a list and in a dict."""
  core: Stack
  ways: list
  named: dict

  def __call__(self, x, e, ctx, kv):
    x, kv = self.core(x, ctx, None, kv)
    return sum(way(x) for way in (*self.ways, *self.named.values())), kv, {}


def layer(attn=SelfAttention(heads=2)):
  return Block(attn=attn, mlp=GatedMLP(hidden=24), norm=RMSNorm())


def stack(block=None, **options):
  return Stack(layer() if block is None else block, 1, **options)


def plain(core=None, **options):
  return Looped(**{'read_in': parts.nowhere(), 'cell': Plain(stack() if core is None else core), **options})


# What stands in several places, in how many, and the model that they are.
PLACES = {
    'prelude and coda': (stack, 2, lambda a, b: plain(prelude=a, coda=b)),
    'all stacks': (stack, 3, lambda a, b, c: plain(a, prelude=b, coda=c)),
    'blocks of stacks': (layer, 2, lambda a, b: plain(stack(a), prelude=stack(b))),
    'norms of stacks': (RMSNorm, 2, lambda a, b: plain(prelude=stack(norm=a), coda=stack(norm=b))),
    'within a cell': (RMSNorm, 2, lambda a, b: plain(cell=Recur(stack(norm=a), Concat(), norm=b))),
    'layers of a chain': (layer, 2, lambda a, b: plain(stack(Chain((a, b))))),
    'parts of layers': (lambda: GatedMLP(hidden=24), 2, lambda a, b: plain(stack(Chain(tuple(
        Block(attn=SelfAttention(heads=2), mlp=mlp) for mlp in (a, b)))))),
    'lists and dicts': (lambda: Linear(D), 3, lambda a, b, c: plain(cell=Several(stack(), [a, b], {'last': c}))),
}


@pytest.mark.parametrize('name', list(PLACES))
def test_an_instance_in_several_places_is_several_sets_of_parameters(name):
  make, count, build = PLACES[name]
  again, apart = build(*[make()] * count), build(*[make() for _ in range(count)])
  found, expected = (parameter_shapes(model) for model in (again, apart))
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.eval_shape(lambda found: again.apply({'params': found}, tokens(2), plans.Uniform(2)(None)), found)


def test_what_a_class_gives_to_all_by_default_is_shared_by_none():
  def model(*gates):
    layers = [Block(attn=LatentAttention(heads=2, **gate), mlp=GatedMLP(hidden=24)) for gate in gates]
    return plain(cell=Gated(stack(Chain(tuple(layers)))), memory=Latest(chunk=4))

  found, expected = (parts.shapes(model({}, {})),
                     parts.shapes(model({'latent': Elementwise()}, {'latent': Elementwise()})))
  assert jax.tree.structure(found) == jax.tree.structure(expected)


def test_copies_of_a_model_stay_apart():
  """Where fields are replaced, where a model is bound and let go, in loops that lift it, and flat."""
  one = stack()
  model = plain(cell=Recur(one, Concat())).clone(prelude=one, coda=one)
  shapes = parts.shapes(model)
  apart = parts.shapes(plain(cell=Recur(stack(), Concat()), prelude=stack(), coda=stack()))
  for copy in (model, model.bind({}).unbind()[0], model.copy()):
    assert copy == model and jax.tree.structure(parts.shapes(copy)) == jax.tree.structure(apart)
  exit_policy = exits.Adaptive(rule=exits.KL())
  jax.eval_shape(lambda weights: model.apply({'params': weights}, tokens(2), plans.Uniform(2)(None), exit_policy,
                                             jnp.float32(0.1), method='adapt'), shapes)
  deep = plain(Stack(layer(), 3))
  kept = []
  weights = jax.eval_shape(lambda weights: kept.append(flattened(deep, weights)) or kept[0][1], parts.shapes(deep))
  assert jax.tree.structure(parts.shapes(kept[0][0])) == jax.tree.structure(weights)
