"""Products with an update of low rank, one for all loops or one for each: a shared block that differs from loop to
loop, or a model that learns by few parameters. And models with such products: made, and made plain again.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from flax import linen as nn
from flax.traverse_util import flatten_dict
import jax
import jax.numpy as jnp

from loopformer import roles
from loopformer.cells.cell import Around
from loopformer.nn.layers import Dense, Normal, by_heads
from loopformer.nn.modules import fields
from loopformer.roles import Role
from loopformer.types import Array, ConfigError, Context, Params

if TYPE_CHECKING:
  from loopformer.model import Looped

Module = TypeVar('Module', bound=nn.Module)


class LowRank(nn.Module):
  """of(x) + (x A) B, A [I, rank] ~ N(0, std^2), B [rank, O] zero at first (LoRA; relaxed recursive transformers).

  loops: None, one A and B for all loops; or a number of sets, of which loop k uses number k, and those after the last
  use the last. It stands as `linear` in attention and MLP. Give `frozen.Freeze` the paths `a` and `b` (`added`) to
  train these alone. gained: whether the gain of the product is the update's too, so that it is an update of the
  weights.
  """
  rank: int
  loops: int | None = None
  std: float = 0.02
  of: Any = Dense()
  gained: bool = False

  @nn.compact
  def __call__(self, x: Array, features: int, init: Any, ctx: Context | None = None, *, bias: Any = None,
               gain: Array | None = None, divided: int | None = None, heads: tuple[int, int] | None = None) -> Any:
    """As Dense."""
    if self.rank < 1 or self.loops is not None and self.loops < 1:
      raise ConfigError(f'linear.rank = {self.rank}, linear.loops = {self.loops}: give 1 or more')
    # In the scope of this module: the parameters of the product lie where they would without it.
    y = self.of.copy(parent=self.scope)(x, features, init, ctx, bias=bias, gain=gain, divided=divided, heads=heads)
    sets = self.loops or 1
    a = roles.param(self, 'a', Normal(self.std), (sets, x.shape[-1], self.rank),
                    Role(tensor=-2 if divided == -2 else None))
    b = roles.param(self, 'b', nn.initializers.zeros, (sets, self.rank, features),
                    Role(tensor=-1 if divided == -1 else None))
    if self.loops is None or ctx is None or ctx.step is None:
      low = jnp.einsum('BTi,ir,ro->BTo', x, a[0].astype(x.dtype), b[0].astype(x.dtype))
    else:
      which = jnp.broadcast_to(jnp.minimum(ctx.step.k, sets - 1), x.shape[:1])  # a sequence may be at a loop of its own
      low = jnp.einsum('BTi,Bir,Bro->BTo', x, a[which].astype(x.dtype), b[which].astype(x.dtype))
    if self.gained and gain is not None:
      low = (low * gain).astype(x.dtype)
    if heads is None:
      return y + low
    return tuple(own + update for own, update in zip(y, by_heads(low, *heads)))


# Models with updates -------------------------------------------------------------------------------------------------


def adapted(model: Looped, rank: int, each: bool = False) -> Looped:
  """The model with an update of this rank in every product of its layers; each: one for every loop, in the loop.

  Raises:
    ConfigError: it has some already, or no product that could have one.
  """
  def updated(loops):
    return lambda linear: LowRank(rank=rank, loops=loops, of=linear, gained=True)

  if _updates(model):
    raise ConfigError('model: its products have updates of low rank already; merge them first (nn.low_rank.merged)')
  around = {name: value for name, value in fields(model).items() if isinstance(value, nn.Module) and name != 'cell'}
  changed: dict[str, Any] = {name: _with(value, updated(None)) for name, value in around.items()}
  new = model.clone(cell=_with(model.cell, updated(model.loops if each else None)), **changed)
  if not _updates(new):
    raise ConfigError('model: none of its layers has a product that could be updated (a part with a field `linear`)')
  return new


def added(model: Looped, plain: Looped) -> tuple[str, ...]:
  """Paths of the parameters that a model has and another does not: of what `adapted` has added, for `frozen.Freeze`."""
  from loopformer.model import parameter_shapes  # whose parts may be these
  own, other = (flatten_dict(parameter_shapes(m), sep='/')
                for m in (model, plain))
  return tuple(path for path in own if path not in other)


def merged(model: Looped, params: Params) -> tuple[Looped, Params]:
  """The same function without the updates that all loops share: they are added to the weights.

  Raises:
    ConfigError: an update that the gates of a step do not act on (`LowRank.gained`) in a model that has gates.
  """
  updates = _updates(model)
  if any(not update.gained for update in updates) and _precomputes(model, params):
    raise ConfigError('LowRank.gained = False: the step makes gates that act on the weights and not on the update, '
                      'which can be no part of them; export what was trained with gained = True (nn.low_rank.adapted)')
  shared = [update for update in updates if update.loops is None]

  def product(own, update):
    if update.loops is not None:
      return own
    rest = {name: leaf for name, leaf in own.items() if name not in ('a', 'b')}
    return {**rest, 'kernel': own['kernel'] + own['a'][..., 0, :, :] @ own['b'][..., 0, :, :]}

  params = _products(model, params, product)
  return (_with(model, lambda linear: linear.of if type(linear) is LowRank and linear.loops is None else linear)
          if shared else model), params


def has_one_a_loop(model: Looped) -> bool:
  """Whether a product has an update for every loop."""
  return any(update.loops is not None for update in _updates(model))


def written_out(model: Looped, params: Params) -> tuple[Looped, Params]:
  """A loop of layers alone, with an update a loop, as layers one after the other, each with weights of its own.

  It is the same function where a step is its stack and nothing else (cells.plain.Plain).
  """
  core = model.cell.core
  order = list(core.order or range(core.depth))
  rows = jnp.asarray(order * model.loops)

  def product(own, update):
    which = jnp.minimum(jnp.arange(len(rows)) // len(order), own['a'].shape[1] - 1)
    a, b = (own[name][jnp.arange(len(rows)), which] for name in 'ab')
    return {**{name: leaf for name, leaf in own.items() if name not in ('a', 'b')}, 'kernel': own['kernel'] + a @ b}

  block = jax.tree.map(lambda leaf: leaf[rows], params['cell']['core']['block'])
  block = _products(core.block, block, product)
  plain = _with(core, lambda linear: linear.of if type(linear) is LowRank else linear)
  return (model.clone(cell=model.cell.clone(core=plain.clone(depth=len(rows), order=None)), loops=1),
          {**params, 'cell': {**params['cell'], 'core': {**params['cell']['core'], 'block': block}}})


def _with(module: Module, change: Callable[[nn.Module], nn.Module]) -> Module:
  """The module with `change` of every `linear` in it."""
  def of(name, value):
    if name == 'linear' and isinstance(value, nn.Module):
      return change(value)
    if isinstance(value, tuple):
      return tuple(of('', item) for item in value)
    return _with(value, change) if isinstance(value, nn.Module) else value

  return module.clone(**{name: of(name, value) for name, value in fields(module).items()})


def _updates(module: Any) -> list[LowRank]:
  """Every `LowRank` of a module."""
  inner = module if isinstance(module, tuple) else fields(module).values() if isinstance(module, nn.Module) else ()
  own = [module] if type(module) is LowRank else []
  return own + [update for value in inner for update in _updates(value)]


def _products(module: nn.Module, params: Params, change: Callable[[Params, LowRank], Params]) -> Params:
  """Parameters with `change` of those of every product that has an update."""
  params = dict(_products(module.of, params, change) if isinstance(module, Around) else params)
  own = fields(module)
  update = own.get('linear')
  if type(update) is LowRank:
    params |= {name: change(tree, update) for name, tree in params.items()
               if isinstance(tree, dict) and {'a', 'b', 'kernel'} <= tree.keys()}
  for name, value in own.items():
    for at, inner in ([(f'{name}_{i}', item) for i, item in enumerate(value)] if isinstance(value, tuple)
                      else [(name, value)]):
      if isinstance(inner, nn.Module) and at in params:
        params[at] = _products(inner, params[at], change)
  return params


def _precomputes(model, params) -> bool:
  from loopformer import plans
  plan = plans.schedule(plans.resolve(model.loops))
  return bool(jax.tree.leaves(jax.eval_shape(lambda: model.apply({'params': params}, plan, method='precompute'))))
