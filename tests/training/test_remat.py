"""What the backward pass saves: memory of every kind of cell under every policy, from compiled programs; and gradients.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import loop, plans
from loopformer.papers.mor.cell import ExpertChoice, Routed, TokenChoice
from tests import parts
from tests.parts import ROWS, params

B, T, LOOPS = 2, 64, 4
POLICIES = {'all': loop.KeepAll(), 'step': loop.PerStep(), 'layer': loop.PerLayer()}
LONG = parts.TokenEmbed(vocab=parts.V, width=parts.D, length=T)
MODELS = {
    'plain': parts.looped(parts.plain(), read_in=LONG),
    'routed': parts.looped(Routed(parts.stack(2), ExpertChoice(capacities=(1.0,) * LOOPS)), read_in=LONG),
    'token': parts.looped(Routed(parts.stack(2), TokenChoice(recursions=LOOPS)), read_in=LONG),
    'shifted': parts.looped(**{**parts.shifted(), 'read_in': parts.Tokens(vocab=parts.V, width=parts.D, length=T)}),
    'melt': ROWS['melt'].model.clone(read_in=parts.Tokens(vocab=parts.V, width=parts.D, length=T),
                                     memory=parts.Latest(chunk=T)),
}


def loss(model, params, tokens, keys):
  return (model.apply({'params': params}, tokens, plans.schedule((1 / LOOPS,) * LOOPS), noise=keys).z ** 2).sum()


@functools.cache
def temporaries(name: str, policy: str) -> int:
  """Bytes of the gradient's program besides its arguments and results."""
  model = MODELS[name].clone(remat=POLICIES[policy])
  tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
  gradient = jax.jit(jax.grad(functools.partial(loss, model)), compiler_options={'xla_backend_optimization_level': 0})
  compiled = gradient.lower(parts.shapes(model), tokens, keys).compile()
  return compiled.memory_analysis().temp_size_in_bytes


# Of what is needed when everything is kept: the most that a policy may need. With one chunk, MELT's steps are a scan.
MOST = {'plain': 0.5, 'routed': 0.5, 'token': 0.5, 'shifted': 0.6, 'melt': 0.75}


@pytest.mark.slow
@pytest.mark.parametrize('policy', ['step', 'layer'])
@pytest.mark.parametrize('name', MODELS)
def test_memory_falls_whether_steps_are_scanned_or_written_out(name, policy):
  assert temporaries(name, policy) < MOST[name] * temporaries(name, 'all')


@pytest.mark.parametrize('policy', ['step', 'layer'])
@pytest.mark.parametrize('name', ['routed', 'token', 'shifted'])
def test_a_step_that_is_written_out_has_the_same_gradient(name, policy):
  """Through states, gates and routers; of skipped steps too."""
  tokens, keys = parts.tokens(B), jax.random.split(jax.random.key(1), B)
  plan = plans.schedule((1 / LOOPS,) * LOOPS).replace(active=jnp.array([[True, True], [True, False], [False, False],
                                                                        [False, False]]))

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(model, weights):
    return jax.value_and_grad(lambda w: jnp.sin(model.apply({'params': w}, tokens, plan, noise=keys).z).sum())(weights)

  model = MODELS[name]
  expected = gradient(model.clone(remat=loop.KeepAll()), params(model))
  found = gradient(model.clone(remat=POLICIES[policy]), params(model))
  parts.close(found, expected, 1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
