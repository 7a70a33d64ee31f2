"""One layer of linear attention learns to predict weights, with and without a chain of thought (2502.21212).

    python -m experiments.studies.linear_cot --out=experiments/reports/linear_icl

Tokens are examples (x_i, y_i, 0_d, 0), then thoughts (0_d, 0, w, 1), the first of which has w = 0; f32[.., t, 2d + 2],
the transpose of the paper's Z. A thought is appended: the last column of Z + V Z (Z^T W Z) / n. Without a chain of
thought the first thought's successor is w* at once; with it, each thought's successor is the next iterate of gradient
descent, whose true iterates are given (teacher forcing; looped in-context learning, sections 2.3 and 3.3). Prints the
error of w_k by step, to twice the trained length, and the product V_31 W_13; writes results.json and errors.png into
--out.

Only the last thought matters to the sparse solution, so that a chain over columns is a loop over a state.
"""
from __future__ import annotations

import functools
from pathlib import Path
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.tools import command, plots, records
from loopformer import storage
from loopformer.papers.linear_icl.attention import EXACT
from loopformer.training import metrics
from loopformer.types import Array, Batch, ConfigError, Params, config_dataclass

FLAGS = flags.FLAGS


# Parameters ----------------------------------------------------------------------------------------------------------


@config_dataclass
class Full:
  """V and W [2d + 2, 2d + 2] ~ N(0, std^2), all of them learned."""
  inputs: int
  std: float = 0.02

  def __post_init__(self):
    _check_inputs(self.inputs)

  def init(self, key: Array) -> Params:
    """Parameters at the start."""
    size = 2 * self.inputs + 2
    v, w = self.std * jax.random.normal(key, (2, size, size))
    return {'V': v, 'W': w}

  def matrices(self, params: Params) -> tuple[Array, Array]:
    """V and W."""
    return params['V'], params['W']

  def product(self, params: Params) -> Array:
    """V_31 W_13, [d, d]: minus the preconditioner of the descent."""
    d = self.inputs
    return params['V'][d + 1:-1, :d] @ params['W'][:d, d + 1:-1]

  def constructive(self, rate: float, preconditioner: np.ndarray | None = None) -> Params:
    """Parameters with which every thought is one step of (preconditioned) gradient descent."""
    v, w = _whole(*_blocks(self.inputs, rate, preconditioner))
    return {'V': v, 'W': w}


@config_dataclass
class Sparse:
  """Only V_31 (rows of w, columns of x) and W_13 [d, d] ~ N(0, std^2) are learned, W_24 = -1, all else is zero.

  Gradient flow keeps these zeros.
  """
  inputs: int
  std: float = 0.1

  def __post_init__(self):
    _check_inputs(self.inputs)

  def init(self, key: Array) -> Params:
    """Parameters at the start."""
    v31, w13 = self.std * jax.random.normal(key, (2, self.inputs, self.inputs))
    return {'V31': v31, 'W13': w13}

  def matrices(self, params: Params) -> tuple[Array, Array]:
    """V and W."""
    return _whole(params['V31'], params['W13'])

  def product(self, params: Params) -> Array:
    """V_31 W_13, [d, d]: minus the preconditioner of the descent."""
    return params['V31'] @ params['W13']

  def constructive(self, rate: float, preconditioner: np.ndarray | None = None) -> Params:
    """Parameters with which every thought is one step of (preconditioned) gradient descent."""
    v31, w13 = _blocks(self.inputs, rate, preconditioner)
    return {'V31': v31, 'W13': w13}


def _check_inputs(inputs):
  if inputs < 1:
    raise ConfigError(f'inputs = {inputs}: a function needs an input; use 1 or more')


def _blocks(inputs, rate, preconditioner):
  """V_31 = -rate A, W_13 = I."""
  matrix = np.eye(inputs) if preconditioner is None else np.asarray(preconditioner, np.float64)
  if matrix.shape != (inputs, inputs):
    raise ConfigError(f'preconditioner of shape {matrix.shape}: give one of shape ({inputs}, {inputs})')
  return jnp.asarray(-rate * matrix), jnp.eye(inputs)


def _whole(v31, w13):
  """V and W [2d + 2, 2d + 2] of their blocks, W_24 = -1."""
  d = len(v31)
  zeros = jnp.zeros((2 * d + 2,) * 2, v31.dtype)
  return zeros.at[d + 1:-1, :d].set(v31), zeros.at[:d, d + 1:-1].set(w13).at[d, -1].set(-1)


# The model -----------------------------------------------------------------------------------------------------------


def successors(matrices: tuple[Array, Array], tokens: Array, examples: int) -> Array:
  """What would be appended after each thought: the last columns of f(Z), Z ending with that thought, in one pass.

  Args:
    matrices: V and W; tokens: [.., n + k, D], n = `examples` of them, then k thoughts.

  Returns:
    [.., k, D].
  """
  v, w = matrices
  thoughts = tokens[..., examples:, :]
  scores = jnp.einsum('...ti,ij,...kj->...kt', tokens, w, thoughts, precision=EXACT) / examples
  count, steps = tokens.shape[-2], thoughts.shape[-2]
  seen = jnp.arange(count) <= examples + jnp.arange(steps)[:, None]  # each thought sees itself and what is before it
  mixed = jnp.einsum('...kt,...ti->...ki', jnp.where(seen, scores, 0), tokens, precision=EXACT)
  return thoughts + jnp.einsum('...ki,ji->...kj', mixed, v, precision=EXACT)


def chain(matrices: tuple[Array, Array], tokens: Array, steps: int) -> Array:
  """Appends `steps` thoughts to [.., n + 1, D], n examples and the first thought; returns [.., n + 1 + steps, D].

  Raises:
    ConfigError: fewer than one step, or no example before the thought.
  """
  examples = tokens.shape[-2] - 1
  if steps < 1 or examples < 1:
    raise ConfigError(f'chain of {steps} steps after {examples} examples: give 1 or more of both')
  room = jnp.concatenate([tokens, jnp.zeros((*tokens.shape[:-2], steps, tokens.shape[-1]), tokens.dtype)], -2)

  def think(k, z):
    # Columns that are not there yet are zero, and a zero column adds nothing to linear attention.
    last = jax.lax.dynamic_index_in_dim(z, examples + k, z.ndim - 2)
    new = last + _attend(matrices, z, last) / examples
    return jax.lax.dynamic_update_index_in_dim(z, new, examples + k + 1, z.ndim - 2)

  return jax.lax.fori_loop(0, steps, think, room)


def _attend(matrices, z, last):
  """V Z Z^T W z of the column z, [.., 1, D]."""
  v, w = matrices
  scores = jnp.einsum('...ti,ij,...kj->...kt', z, w, last, precision=EXACT)
  return jnp.einsum('...kt,...ti,ji->...kj', scores, z, v, precision=EXACT)


def thoughts_of(tokens: Array, examples: int) -> Array:
  """w of every thought, [.., k, d]."""
  d = tokens.shape[-1] // 2 - 1
  return tokens[..., examples:, d + 1:-1]


# Data and losses -----------------------------------------------------------------------------------------------------


def lay_out(x: Array, y: Array, thoughts: Array) -> Array:
  """x [.., n, d], y [.., n], thoughts [.., k, d] -> tokens [.., n + k, 2d + 2]."""
  shown = jnp.concatenate([x, y[..., None], jnp.zeros_like(x), jnp.zeros_like(y)[..., None]], -1)
  one = jnp.ones_like(thoughts[..., :1])
  return jnp.concatenate([shown, jnp.concatenate([jnp.zeros_like(thoughts), 0 * one, thoughts, one], -1)], -2)


def descend(x: Array, y: Array, rate: float, steps: int) -> Array:
  """The iterates of gradient descent from zero, [.., steps + 1, d]."""

  def step(w, _):
    residual = jnp.einsum('...nd,...d->...n', x, w, precision=EXACT) - y
    w = w - rate / x.shape[-2] * jnp.einsum('...nd,...n->...d', x, residual, precision=EXACT)
    return w, w

  first = jnp.zeros((*x.shape[:-2], x.shape[-1]), x.dtype)
  _, rest = jax.lax.scan(step, first, None, length=steps)
  return jnp.concatenate([first[..., None, :], jnp.moveaxis(rest, 0, -2)], -2)


def sample(key: Array, batch: int, inputs: int, examples: int) -> Batch:
  """x [B, n, d], y [B, n] and best [B, d]: y = x . best, all N(0, 1)."""
  key_x, key_w = jax.random.split(key)
  x = jax.random.normal(key_x, (batch, examples, inputs))
  best = jax.random.normal(key_w, (batch, inputs))
  return {'x': x, 'y': jnp.einsum('bnd,bd->bn', x, best, precision=EXACT), 'best': best}


def loss_with_chain(matrices: tuple[Array, Array], batch: Batch, thoughts: int, descent: float) -> Array:
  """1/(2B) sum over prompts and thoughts of |successor - (0, 0, w_{i+1}, 1)|^2, from true iterates."""
  x, y = batch['x'], batch['y']
  iterates = descend(x, y, descent, thoughts)
  tokens = lay_out(x, y, iterates[..., :-1, :])
  targets = lay_out(x, y, iterates[..., 1:, :])[..., x.shape[-2]:, :]
  return jnp.square(successors(matrices, tokens, x.shape[-2]) - targets).sum((-2, -1)).mean() / 2


def loss_without_chain(matrices: tuple[Array, Array], batch: Batch) -> Array:
  """The mean of |w of the first successor - w*|^2."""
  return errors(matrices, batch, 1)[-1]


def errors(matrices: tuple[Array, Array], batch: Batch, steps: int) -> Array:
  """The mean of |w_k - w*|^2, k = 0 .. steps, f32[steps + 1], along the model's own chain."""
  x = batch['x']
  first = lay_out(x, batch['y'], jnp.zeros_like(batch['best'])[..., None, :])
  weights = thoughts_of(chain(matrices, first, steps), x.shape[-2])
  return jnp.square(weights - batch['best'][..., None, :]).sum(-1).mean(0)


# Training ------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=('of', 'loss', 'examples', 'steps', 'batch', 'rate'))
def train(of: Full | Sparse, loss: Any, key: Array, examples: int, steps: int, batch: int,
          rate: float) -> tuple[Params, Array]:
  """Adam on fresh prompts; parameters at the end and the loss of every step. loss: (V and W, batch) -> f32[]."""
  optimizer = optax.adam(rate)
  start = of.init(jax.random.fold_in(key, 0))
  keys = jax.random.fold_in(key, 1)

  def step(carry, index):
    params, state = carry
    rows = sample(jax.random.fold_in(keys, index), batch, of.inputs, examples)
    value, grads = jax.value_and_grad(lambda p: loss(of.matrices(p), rows))(params)
    updates, state = optimizer.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), value

  (params, _), losses = jax.lax.scan(step, (start, optimizer.init(start)), jnp.arange(steps))
  return params, losses


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_integer('inputs', 5, 'd.', lower_bound=1)
  flags.DEFINE_integer('examples', 20, 'n.', lower_bound=1)
  flags.DEFINE_integer('thoughts', 10, 'k: steps of gradient descent in a chain.', lower_bound=1)
  flags.DEFINE_float('descent', 0.4, 'The rate of that descent.')
  flags.DEFINE_float('rate', 2e-2, "Adam's learning rate.")
  flags.DEFINE_integer('steps', 1500, 'Of training.', lower_bound=1)
  flags.DEFINE_integer('batch', 256, 'Prompts a step.', lower_bound=1)
  flags.DEFINE_integer('seed', 0, 'Of initialisation and data.', lower_bound=0, upper_bound=2**32 - 1)
  flags.DEFINE_bool('full', False, 'Train all of V and W too, not only the two blocks.')
  flags.DEFINE_string('out', None, 'Folder of results.json and errors.png; nothing is written without it.')


def main(argv):
  if FLAGS.out:
    command.own('inputs', 'examples', 'thoughts', 'descent', 'rate', 'steps', 'batch', 'seed', 'full')
  d, n, k = FLAGS.inputs, FLAGS.examples, FLAGS.thoughts
  with_chain = functools.partial(loss_with_chain, thoughts=k, descent=FLAGS.descent)
  jobs = {'without': (Sparse(inputs=d), loss_without_chain), 'with': (Sparse(inputs=d), with_chain)}
  if FLAGS.full:
    jobs |= {'full without': (Full(inputs=d), loss_without_chain), 'full with': (Full(inputs=d), with_chain)}
  held_out = sample(jax.random.key(2**31 - 1 - FLAGS.seed), 20_000, d, n)
  measure = jax.jit(functools.partial(errors, batch=held_out, steps=2 * k))
  curves, products = {}, {}
  for name, (of, loss) in jobs.items():
    start = time.time()
    params, losses = train(of, loss, jax.random.key(FLAGS.seed), n, FLAGS.steps, FLAGS.batch, FLAGS.rate)
    print(f'{name}: loss {losses[0]:.4g} -> {losses[-100:].mean():.3g}, {time.time() - start:.1f} s', flush=True)
    curves[name] = np.asarray(measure(of.matrices(params)))
    product = np.asarray(of.product(params))
    if name == 'without':  # its W_13 meets w = 0 alone, and learned nothing: iterate what it would be with the identity
      curves['without, W_13 = I'] = np.asarray(measure(of.matrices({**params, 'W13': jnp.eye(d)})))
      product = np.asarray(params['V31'])
    products[name] = {'diagonal': float(product.diagonal().mean()),
                      'farthest entry from a multiple of I': float(
                          np.abs(product - product.diagonal().mean() * np.eye(d)).max())}
  rates = {'descent': FLAGS.descent, 'descent at n/(n+d+1)': n / (n + d + 1)}
  for name, rate in rates.items():
    w = descend(held_out['x'], held_out['y'], rate, 2 * k)
    curves[name] = np.asarray(jnp.square(w - held_out['best'][:, None]).sum(-1).mean(0))
  rows = [{'step': step, **{name: float(curve[step]) for name, curve in curves.items()}} for step in range(2 * k + 1)]
  print(f'\nerror |w_k - w*|^2; the best of one step: {d * (d + 1) / (n + d + 1):.4g}')
  print(metrics.table([{key: f'{value:.4g}' for key, value in row.items()} for row in rows]))
  print('\nV_31 W_13 (V_31 alone for `without`)')
  print(metrics.table([{'model': name, **row} for name, row in products.items()]))
  if FLAGS.out:
    write(storage.path(FLAGS.out), rows, products, k)


def write(out: Path, rows: list[dict], products: dict, trained: int):
  """results.json and errors.png."""
  out.mkdir(parents=True, exist_ok=True)
  records.write(out / 'results.json', {'errors': rows, 'products': products})
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(6, 4), layout='constrained')
  for name in list(rows[0])[1:]:
    axes.plot([row['step'] for row in rows], [row[name] for row in rows], marker='.',
              linestyle='--' if name.startswith('descent') else '-', label=name)
  axes.axvline(trained, color='grey', linewidth=0.8, label='steps trained on')
  axes.set_yscale('log')
  axes.xaxis.get_major_locator().set_params(integer=True)
  axes.set_xlabel('step')
  axes.set_ylabel('mean of |w - w*|²')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=7)
  figure.savefig(out / 'errors.png', dpi=150)
  pyplot.close(figure)


if __name__ == '__main__':
  define_flags()
  command.run(main)
