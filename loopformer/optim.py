"""Optimisers: frozen parts that make an optax transformation for a run of so many steps."""
from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from loopformer.nn.layers import unfused_kernel
from loopformer.roles import Roles
from loopformer.types import Array, ConfigError, config_dataclass, real

# Polar Express: (a, b, c) of five steps x <- (a + b x x^T + c (x x^T)^2) x (Parcae section 3).
POLAR = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
         (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
         (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
MARGIN = 1.02  # by which a matrix is made smaller than its Frobenius norm would before the first step


@config_dataclass
class WarmupCosine:
  """Linear warm-up to `peak` in `warmup` steps, then a cosine to `end` at the last step of the run."""
  peak: float = 6e-4
  end: float = 6e-5
  warmup: int = 2000

  def make(self, steps: int) -> optax.Schedule:
    """The learning rate by step. Raises ConfigError where the run is not longer than its warm-up."""
    if self.warmup >= steps:
      raise ConfigError(f'optim.schedule.warmup = {self.warmup} is not below train.steps = {steps}; '
                        'lower the warm-up or train longer')
    return optax.warmup_cosine_decay_schedule(self.peak / (self.warmup + 1), self.peak, self.warmup, steps, self.end)


@config_dataclass
class WSD:
  """Linear warm-up to `peak`, constant, then linear to `end` at the end of the run.

  warmup, cooldown: how long these last; a whole number counts steps, a fraction is of the run. Parcae: cooldown=0.5;
  Huginn: warmup=4096; retrofitted recurrence: warmup=0.005, cooldown=0.9.
  """
  peak: float
  end: float = 0.0
  warmup: int | float = 0
  cooldown: int | float = 0

  def make(self, steps: int) -> optax.Schedule:
    """The learning rate by step. Raises ConfigError where warm-up and cool-down do not fit the run."""
    warmup, cooldown = self._count('warmup', steps), self._count('cooldown', steps)
    if warmup + cooldown > steps:
      raise ConfigError(f'schedule.warmup = {self.warmup} and schedule.cooldown = {self.cooldown} are {warmup} and '
                        f'{cooldown} steps, more than train.steps = {steps}; shorten them or train longer')
    rise = optax.linear_schedule(self.peak / (warmup + 1), self.peak, warmup)
    return optax.join_schedules([rise, optax.linear_schedule(self.peak, self.end, cooldown)], [steps - cooldown])

  def _count(self, name, steps):
    value = getattr(self, name)
    whole = isinstance(value, int)
    if not 0 <= value <= (steps if whole else 1):
      raise ConfigError(f'schedule.{name} = {value} does not fit train.steps = {steps}; give a number of steps up to '
                        'that, or a fraction between 0.0 and 1.0 of the run')
    return value if whole else round(value * steps)


@config_dataclass
class AdamW:
  """AdamW with global-norm clipping; weight decay on matrices and embeddings alone (LoopFormer section 3; roles.py)."""
  schedule: WarmupCosine | WSD = WarmupCosine()
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  decay: float = 0.2
  clip: float = 1.0

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """The transformation for a run of `steps` of a model with these `model.parameter_roles`."""
    return optax.chain(
        optax.clip_by_global_norm(self.clip),
        optax.adamw(self.schedule.make(steps), self.b1, self.b2, self.eps, weight_decay=self.decay, mask=roles.decayed))


# Adam by the arc tangent ---------------------------------------------------------------------------------------------


@config_dataclass
class AtanAdam:
  """Adam without eps, with update clipping (Huginn section 3); p *= 1 - rate / peak * decay on what AdamW decays too.

  The arc tangent of the moments is their quotient where that is small, and bounded where the second moment is zero. The
  decay does not grow with the peak of the learning rate.
  """
  schedule: WarmupCosine | WSD = WSD(peak=4e-5, warmup=4096)
  b1: float = 0.9
  b2: float = 0.95
  decay: float = 4e-5
  clip: float = 1.0

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """As AdamW.make. Raises ConfigError where the peak is 0, by which the decay is divided."""
    real('optim.schedule.peak', self.schedule.peak, '(0, inf)')
    return optax.chain(
        optax.clip_by_global_norm(self.clip), scale_by_atan(self.b1, self.b2, roles),
        optax.add_decayed_weights(self.decay / self.schedule.peak, roles.decayed),
        optax.scale_by_learning_rate(self.schedule.make(steps)))


class AtanState(NamedTuple):
  """count: i32[], updates so far; m, v: moments, as parameters."""
  count: Array  # type: ignore[assignment]  # saved under this name, which tuple has for a method
  m: Any
  v: Any


def scale_by_atan(b1: float, b2: float, roles: Roles, floor: float = 1e-12) -> optax.GradientTransformation:
  """atan2(m, sqrt(v / (1 - b2^t))) / (1 - b1^t) / max(1, sqrt(mean(g^2 / v))).

  Moments start at the first gradient and its square, and are corrected as if they had started at zero: the first
  updates are about 2.2 long. v is at least `floor`, and stays so: where gradients are far below its root, updates are
  in proportion to them. The mean is over a tensor, or a group of them that is one (`Role.group`); each layer of a stack
  apart.
  """

  def init(params):
    m, v = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))  # arrays of their own, which a step may give away
    return AtanState(jnp.int32(0), m, v)

  def update(grads, state, params=None):
    t = state.count + 1

    def moment(b, old, new):
      return jnp.where(t == 1, new, b * old + (1 - b) * new)

    def tensor(path):
      group = roles.at(path).group
      return (*path[:-1], group) if group else tuple(path)

    def add(path, g, v):
      total = jnp.sum(g * g / v, tuple(range(roles.at(path).layered, g.ndim)), keepdims=True)
      before, count = squares.get(tensor(path), (0.0, 0))
      squares[tensor(path)] = before + total, count + g.size // total.size

    def one(path, m, v):
      total, count = squares[tensor(path)]
      size = (1 - b1 ** t) * jnp.maximum(1, jnp.sqrt(total / count))
      return jnp.arctan2(m, jnp.sqrt(v / (1 - b2 ** t))) / size

    squares = {}  # of each tensor: the sum of g^2 / v, and of how many numbers; of each layer
    m = jax.tree.map(lambda m, g: moment(b1, m, g), state.m, grads)
    v = jax.tree.map(lambda v, g: jnp.maximum(moment(b2, v, g * g), floor), state.v, grads)
    jax.tree_util.tree_map_with_path(add, grads, v)
    return jax.tree_util.tree_map_with_path(one, m, v), AtanState(t, m, v)

  return optax.GradientTransformation(init, update)


# Muon ----------------------------------------------------------------------------------------------------------------


@config_dataclass
class Muon:
  """Muon for the matrices of attention and MLP, another optimiser for the rest, clipped together (Parcae section 3).

  A matrix moves along its momentum made orthogonal, at `schedule` times sqrt(max(1, out / in)). Each layer of a stack
  is a matrix of its own. Parcae's peaks are 8e-3 (140M, 370M) and 6e-3 (770M, 1.3B), of both optimisers.

  Of Parcae's code, three things are left out: the warm-up of the momentum, the first step, which it skips, and that it
  skips steps whose gradient is not finite. Momentum is corrected for its start at zero, which Parcae's is not.

  matrices: what a path contains to be Muon's, see `routes`; retrofitted recurrence adds 'adapter'.
  heads, groups: of attention; given, queries, keys and values of its fused projection are three matrices, as in Parcae;
    without, one.
  momentum: Nesterov's. second: decay of the second moment in `normalize_sides`; None leaves that out.
  decay: weight decay by step, times the rate, where it agrees with the update (`cautious_decay`).
  others: the optimiser of the rest; its own clipping sees the rest alone, and is idle if it is not below `clip`.
  """
  schedule: WarmupCosine | WSD = WSD(peak=8e-3, cooldown=0.5)
  matrices: tuple[str, ...] = ('attn', 'mlp')
  heads: int | None = None
  groups: int | None = None
  momentum: float = 0.95
  second: float | None = 0.95
  decay: WarmupCosine | WSD = WSD(peak=0.2, cooldown=1.0)
  clip: float = 1.0
  others: Any = AdamW(schedule=WSD(peak=8e-3, cooldown=0.5), b1=0.8, eps=1e-10, decay=0.0)

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformation:
    """As AdamW.make."""
    if self.groups is not None and self.heads is None:
      raise ConfigError(f'optim.groups = {self.groups}, but optim.heads is None; give those of the model\'s attention')
    (a, b, c), *rest = POLAR
    coefficients = ((a / MARGIN, b / MARGIN ** 3, c / MARGIN ** 5), *rest)  # of x / MARGIN
    muon = optax.chain(
        contrib.scale_by_muon(coefficients, len(POLAR), self.momentum, weight_dimension_numbers=last_two),
        optax.identity() if self.second is None else normalize_sides(self.second),
        cautious_decay(self.decay.make(steps)),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_by_shape, updates)),
        optax.scale_by_learning_rate(self.schedule.make(steps)))
    if self.heads is not None:
      muon = on_unfused(muon, self.heads, self.groups or self.heads)
    return optax.chain(
        optax.clip_by_global_norm(self.clip),
        optax.partition({'muon': muon, 'adam': self.others.make(steps, roles)},
                        lambda params: routes(params, roles, self.matrices)))


def routes(params: Any, roles: Roles, matrices: tuple[str, ...] = ('attn', 'mlp')) -> Any:
  """'muon' or 'adam' for every parameter.

  Muon's are the projections within the modules that `matrices` names, and the parameters that it names themselves.

  Raises:
    ConfigError: a name that occurs in no path.
  """
  paths = [{entry.key for entry in path} for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for name in matrices:
    if not any(name in path for path in paths):
      raise ConfigError(f'optim.matrices names {name!r}, which no parameter is or lies in; there are '
                        f'{", ".join(sorted(set().union(*paths)))}')

  def route(path, _):
    names = [entry.key for entry in path]
    within = any(name in matrices for name in names)
    return 'muon' if within and (roles.at(path).dtype is not None or names[-1] in matrices) else 'adam'

  return jax.tree_util.tree_map_with_path(route, params)


def last_two(params: Any) -> Any:
  """The last two axes of a parameter are a matrix [in, out]; those before them number matrices."""
  return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)


def _scale_by_shape(update):
  rows, columns = update.shape[-2:]
  return update * max(1.0, columns / rows) ** 0.5


class CountState(NamedTuple):
  """count: i32[], updates so far."""
  count: Array  # type: ignore[assignment]  # saved under this name, which tuple has for a method


def cautious_decay(rate: optax.Schedule) -> optax.GradientTransformation:
  """u + rate(step) * p where u and p agree in sign, u elsewhere: decay never works against the update."""

  def update(updates, state, params):
    now = rate(state.count)
    updates = jax.tree.map(lambda u, p: u + jnp.where(u * p >= 0, now * p, 0), updates, params)
    return updates, CountState(state.count + 1)

  return optax.GradientTransformation(lambda params: CountState(jnp.int32(0)), update)


class SidesState(NamedTuple):
  """second: second moments, [..., I, 1] where I > O, [..., 1, O] elsewhere."""
  second: Any


def normalize_sides(decay: float, floor: float = 1e-10) -> optax.GradientTransformation:
  """Rows or columns of a matrix [..., I, O], whichever are more, brought to equal size; the matrix keeps its norm.

  u' = u / sqrt(v), then u' |u| / |u'|; v is the running mean of u^2, averaged over the shorter side, and at
  least `floor`: what hardly moves is not blown up.
  """

  def mean_square(u):
    return jnp.mean(u * u, -1 if u.shape[-2] > u.shape[-1] else -2, keepdims=True)

  def norm(u):
    return jnp.sqrt(jnp.sum(u * u, (-2, -1), keepdims=True))

  def scale(u, v):
    scaled = u * jax.lax.rsqrt(jnp.maximum(v, floor))
    return scaled * (norm(u) / jnp.maximum(norm(scaled), floor))

  def update(updates, state, params=None):
    second = jax.tree.map(lambda u, v: decay * v + (1 - decay) * mean_square(u), updates, state.second)
    return jax.tree.map(scale, updates, second), SidesState(second)

  return optax.GradientTransformation(
      lambda params: SidesState(jax.tree.map(lambda p: jnp.zeros_like(mean_square(p)), params)), update)


class Unfused(NamedTuple):
  """A fused projection in three: q [..., D, H d], k and v [..., D, G d]."""
  q: Array
  k: Array
  v: Array


def on_unfused(inner: optax.GradientTransformation, heads: int, groups: int) -> optax.GradientTransformation:
  """`inner`, to which a fused kernel, [..., D, G (H/G queries + key + value) d], is three parameters."""

  def split(path, kernel):
    if 'qkv' not in [entry.key for entry in path]:
      return kernel
    pieces = unfused_kernel(kernel, heads, groups, f'optim.heads = {heads}, optim.groups = {groups}')
    return Unfused(*(piece.reshape(*kernel.shape[:-1], -1) for piece in pieces))

  def join(leaf):
    if not isinstance(leaf, Unfused):
      return leaf
    lead = leaf.k.shape[:-1]
    head = leaf.k.shape[-1] // groups
    pieces = [piece.reshape(*lead, groups, -1, head) for piece in leaf]
    return jnp.concatenate(pieces, -2).reshape(*lead, -1)

  def apart(tree):
    return jax.tree_util.tree_map_with_path(split, tree)

  def update(updates, state, params):
    updates, state = inner.update(apart(updates), state, apart(params))
    return jax.tree.map(join, updates, is_leaf=lambda leaf: isinstance(leaf, Unfused)), state

  return optax.GradientTransformation(lambda params: inner.init(apart(params)), update)


# Stages --------------------------------------------------------------------------------------------------------------


@config_dataclass
class Kept:
  """Moments go on as they are."""

  def __call__(self, state: Any, fresh: Any) -> Any:
    """The optimiser's state at the start of a stage, of that at the end of the last and of a new one."""
    return state


@config_dataclass
class Reset:
  """Moments begin anew; schedules, which count the steps of the whole run, go on."""

  def __call__(self, state: Any, fresh: Any) -> Any:
    """The optimiser's state at the start of a stage, of that at the end of the last and of a new one."""
    return jax.tree.map(lambda old, new: old if _is_place(old) else new, state, fresh, is_leaf=_is_place)


def _is_place(state):
  """Whether it is the place in a schedule that a transformation keeps."""
  return isinstance(state, (optax.ScaleByScheduleState, CountState))


class SwitchedState(NamedTuple):
  """stage: i32[], of the last update, -1 before the first; since: i32[], updates of this stage, at most `rewarm`."""
  stage: Array
  since: Array
  inner: Any


@config_dataclass
class Switched:
  """The optimiser `of`, and what becomes of it where the run's controller begins a new stage (SHIFT, section 3).

  Its transformation takes the stage of the run with every update, `update(..., stage=i32[])`; the stage that a run
  begins in is no switch. A checkpoint holds the stage of the last update, so a run that is resumed at a switch makes it
  once.

  moments: what becomes of them. rewarm: updates of a new stage in which the learning rate is back on its way: it is
  multiplied by numbers that rise linearly from `least` to 1; 0 for none.
  """
  of: AdamW | AtanAdam | Muon
  moments: Kept | Reset = Kept()
  rewarm: int = 0
  least: float = 0.1

  def __post_init__(self):
    if self.rewarm < 0:
      raise ConfigError(f'optim.rewarm = {self.rewarm}: a number of steps, 0 for none')
    if not 0 <= self.least <= 1:
      raise ConfigError(f'optim.least = {self.least}: the share of the learning rate that a stage begins with; use a '
                        'number from 0 to 1')

  def make(self, steps: int, roles: Roles) -> optax.GradientTransformationExtraArgs:
    """As AdamW.make."""
    inner = optax.with_extra_args_support(self.of.make(steps, roles))

    def init(params):
      return SwitchedState(jnp.int32(-1), jnp.int32(self.rewarm), inner.init(params))

    def update(updates, state, params=None, *, stage, **others):
      begins = (state.stage >= 0) & (stage != state.stage)
      started = self.moments(state.inner, inner.init(params))
      own = jax.tree.map(lambda new, old: jnp.where(begins, new, old), started, state.inner)
      updates, own = inner.update(updates, own, params, **others)
      since = jnp.where(begins, 0, state.since)
      if self.rewarm:
        share = self.least + (1 - self.least) * since / self.rewarm
        updates = jax.tree.map(lambda u: (u * share).astype(u.dtype), updates)
      return updates, SwitchedState(jnp.asarray(stage, jnp.int32), jnp.minimum(since + 1, self.rewarm), own)

    return optax.GradientTransformationExtraArgs(init, update)
