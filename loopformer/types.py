"""The types that all parts of the library share.

Letters in shape suffixes (`x_BTD`) and in docstrings:

    B batch     T tokens of a sequence (query length)    S key length    D model width
    H heads     G key/value groups   d width of a head   F hidden width  V vocabulary
    K steps of a plan                N layers of a stack L most loops a model is trained for

A model is one computation, `x = cell(x, e, ctx, kv)` repeated over the rows of a `Plan`; see docs/design.md.

Of how much is computed: a step is one application of the cell; `loops` counts equal steps, and a model has the number
that it was trained for at most; a `budget` is a number of loops asked for at inference; a schedule lists the sizes of
steps, with sum one; a plan is a schedule as arrays, with what a program has to know besides. `depth` is the number of
layers in a stack, or drawn numbers of loops (`plans.Truncated.depth`). In training, `steps` are those of the optimiser.
"""
from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, Callable, Mapping, Protocol, dataclass_transform, runtime_checkable
import zlib

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Params = Mapping[str, Any]
Batch = Mapping[str, Array]
AnyBatch = Mapping[str, Array | np.ndarray]  # on devices or on the host
INTERMEDIATES = 'intermediates'  # Linen's collection of what layers tell when they are looked at (inference/tracing.py)
GIVEN = 'given'  # another, of what their attention gives, where a cell asks (papers/melt/teacher.py)
SEEDS = 2**32  # how many there are: JAX cuts larger ones


@struct.dataclass
class Plan:
  """Timetable of one rollout. Arrays, so that it can be sampled inside a compiled program.

  t, dt: f32[K], time at, and size of, each step; a whole trajectory has length one.
  active: None (every step runs), bool[K] (False: the step is skipped by a real branch and costs nothing)
    or bool[K, B] (False: the step passes this sequence through unchanged; one that no sequence takes is skipped).
  no_grad_steps: None, i32[] or i32[B]: steps that run first, without gradient, as many as this number says (of each
  sequence); or i32[K, 1]: so many run before each of the K, none of which hands a gradient to those before it.
  rows: what else a planner says of each step, by name, leaves [K, ...]; a cell reads what it knows in
  `Cell.precompute`.
  """
  t: Array
  dt: Array
  active: Array | None = None
  no_grad_steps: Array | None = None
  rows: Mapping[str, Array] = struct.field(default_factory=dict)

  @property
  def steps(self) -> int:
    """K, the number of rows, skipped ones included."""
    return self.dt.shape[0]

  @property
  def free(self) -> Array | int:
    """Steps without gradient in all, i32[] or i32[B]; 0 where there are none."""
    if self.no_grad_steps is None:
      return 0
    return self.no_grad_steps.sum() if self.no_grad_steps.ndim == 2 else self.no_grad_steps


@struct.dataclass
class PlanContext:
  """What a plan may depend on.

  key: of what is drawn once for all sequences of the batch, the same on all devices; step: i32[], training steps taken;
  stage: i32[], what the run's controller has decided (see control.py); batch: the batch, whose `row` i32[B] tells a
  sequence's place in the global batch (that in this batch if absent); sequences: the key of what every sequence draws
  for itself, None where it is `key`.

  Microbatches differ in `key` alone, so what is drawn for a sequence depends neither on their number nor on the devices
  that the batch is divided over.
  """
  key: Array
  step: Array
  stage: Array
  batch: Batch
  sequences: Array | None = None

  def read(self, name: str, who: str) -> Array:
    """What the batch has under a name. Raises ConfigError, which `who` begins, where it has nothing."""
    if name not in self.batch:
      raise ConfigError(f'{who}: it reads {name!r} of a batch, which has {", ".join(self.batch)}; take a task that '
                        'gives it, or another plan')
    return self.batch[name]

  def keys(self) -> Array:
    """A key for every sequence, [B]."""
    base = self.key if self.sequences is None else self.sequences
    row = self.batch['row'] if 'row' in self.batch else jnp.arange(len(self.batch['tokens']))
    return jax.vmap(lambda row: jax.random.fold_in(base, row))(row)

  def named(self, name: str) -> PlanContext:
    """The same with keys of their own for what bears a name."""
    number = zlib.crc32(name.encode())
    sequences = None if self.sequences is None else jax.random.fold_in(self.sequences, number)
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, number), sequences=sequences)

  def microbatch(self, number: Array, batch: Batch) -> PlanContext:
    """That of a part of the batch, which draws a plan of its own."""
    return dataclasses.replace(self, key=jax.random.fold_in(self.key, number), batch=batch, sequences=self.key)


@struct.dataclass
class Step:
  """Row k of a plan: all that a step knows of the schedule.

  t, dt: f32[]; active: None, bool[] or bool[B]; k: the number of steps before this one, i32[], or i32[B] where
  sequences have had different numbers of `no_grad_steps`, in passes without a cache;
  precomputed: what the cell made of this row ahead of the loop (`Cell.precompute`), any pytree.
  """
  t: Array
  dt: Array
  active: Array | None
  k: Array
  precomputed: Any = None


@struct.dataclass
class Context:
  """What a block knows besides its input.

  pos: i32[B, T], position of each token in its document; -1 marks padding (with a cache only).
  seg: None or i32[B, T], tokens attend within equal numbers only; documents have numbers from 1, padding 0.
  tokens: i32[B, T] or f32[B, T, width], the input.
  noise: keys [B] of what a pass that learns draws at random; None where it answers.
  keys: keys [B] of what exits draw at random; None: one fixed key serves all sequences.
  step: the row of the plan that is running; None in prelude and coda.
  own: what the cell tells its own layers, of a type that both know; None elsewhere.
  memory: how steps share the cache (a frozen part, static).
  remat: what the backward pass saves (a frozen part, static); None saves everything.
  """
  pos: Array
  seg: Array | None = None
  tokens: Array | None = None
  noise: Array | None = None
  keys: Array | None = None
  step: Step | None = None
  own: Any = None
  memory: Any = struct.field(pytree_node=False, default=None)
  remat: Any = struct.field(pytree_node=False, default=None)

  def ids(self, who: str) -> Array:
    """The input's ids, i32[B, T]. Raises ConfigError, which `who` begins, where it is vectors."""
    if self.tokens is None or self.tokens.ndim != 2:
      raise ConfigError(f'{who}: it reads the ids of tokens, and model.read_in takes vectors, which have none; give a '
                        'read_in of tokens, such as Tokens, or a part in its place that reads none')
    return self.tokens


@struct.dataclass
class KV:
  """Keys and values of all slots of one stack.

  k, v: [slots, N, B, ...], rows always the third axis, the rest as the `layout` says (a part of layouts.py, static),
  [G, S, d] or [S, G d]; heads are its axis `layout.heads`, in order, so that it may be divided over them. pos:
  i32[slots, B, S], the position that a place holds, -1 where it is empty.
  """
  k: Array
  v: Array
  pos: Array
  layout: Any = struct.field(pytree_node=False)

  @property
  def bytes(self) -> int:
    """Bytes that the arrays take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

  @property
  def length(self) -> int:
    """S, the places of a row."""
    return self.pos.shape[-1]

  def visible(self, pos: Array, ctx: Context) -> Array:
    """bool[B, T, S]: which places, of positions pos i32[B, S], the tokens of `ctx` may read."""
    return (pos[:, None] >= 0) & (pos[:, None] <= ctx.pos[..., None])


@struct.dataclass
class Trace:
  """What a rollout leaves behind.

  x: [B, T, D], the last state of the loop; z: [B, T, D], the same after coda and final norm, ready for the head.
  xs: None or [K, B, T, D], the states that were kept; aux: per-step auxiliaries of the cell, leaves [K, ...].
  kv: the caches; steps: i32[], steps that the deepest sequence took (of an exit: i32[B] or i32[B, T], those of each
  sequence or token); plan: what was run.
  """
  x: Array
  z: Array
  xs: Array | None
  aux: Any
  kv: Any
  steps: Array
  plan: Plan | None = None


@dataclasses.dataclass(frozen=True)
class Readout:
  """The way from a state to an answer, with its parameters in it.

  table: f32[V, D], the head's matrix: answers are z @ table^T. read: a state of the loop [..., B, T, D] -> z, the same
  after coda and final norm. of: the same of rollouts that ran with weights of their own, by their names. dtype: of the
  operands of products with the table, which are summed in float32; None: that of z.
  """
  table: Array
  read: Callable[[Array], Array]
  of: Mapping[str, Readout] = dataclasses.field(default_factory=dict)
  dtype: Any = None

  def logits(self, z: Array) -> Array:
    """z [..., D] -> f32[..., V]."""
    dtype = self.dtype or z.dtype
    return jnp.einsum('...D,VD->...V', z.astype(dtype), self.table.astype(dtype), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class StepView:
  """What a rule sees of a step.

  k: i32[], its number, from 0; last: bool[], whether the plan ends with it; old, new: [B, T, D], the states before and
  after; aux: the cell's auxiliaries; logits: () -> f32[B, T, V] of the new state, which costs coda and head, and is
  asked for by the rules that need it alone.
  """
  k: Array
  last: Array
  old: Array
  new: Array
  aux: dict[str, Array]
  logits: Callable[[], Array]


# Sockets -------------------------------------------------------------------------------------------------------------


class Planner(Protocol):
  """How the steps of a rollout are arranged. Planners are subclasses, which say what is not as here."""

  @property
  def longest(self) -> int:
    """Rows of every plan it makes."""

  @property
  def expected(self) -> float:
    """Mean number of steps that run; for counting arithmetic."""

  @property
  def differentiated(self) -> float:
    """Mean number of steps with a backward pass: all."""
    return self.expected

  @property
  def detached(self) -> bool:
    """Whether it is meant that no gradient reaches the state that the loop begins with: that what stands before the
    loop keeps its values (training/frozen.py)."""
    return False

  @property
  def stages(self) -> tuple[int, ...]:
    """The loops of every stage of a controller that it waits for: none."""
    return ()

  def check_batch(self, batch: AnyBatch):
    """Raises ConfigError where a batch on the host asks for steps that its plans do not have: never."""
    return

  def __call__(self, context: PlanContext) -> Plan: ...


class Cell(Protocol):
  """What one step does; a Linen module with a stack named `core`. Most begin from cells/cell.py."""

  stepwise: bool  # whether a step may be taken by itself, so that another cell can stand around it

  @property
  def injects(self) -> bool:
    """Whether a step takes the input in again."""

  @property
  def most(self) -> int | None:
    """The most steps of a plan that it can run; None: as many as are asked for."""

  @property
  def tokenwise(self) -> bool:
    """Whether a token may keep its state while others take more steps, so that exits can let it go."""

  def check(self, width: int):
    """Raises ConfigError where its parts do not fit each other, or the model's width."""

  def check_tokens(self, tokens: Array, steps: int, seg: Array | None = None):
    """Raises ConfigError where so many steps make no sense over the tokens of these rows, i32[B, T], within these
    segments, i32[B, T], both of the host; asked before an evaluation or a trace."""

  def precompute(self, plan: Plan) -> Any:
    """What it computes ahead of the loop, from the plan alone: leaves [K, ...]; None where there is nothing."""

  def flops(self, width: int, length: int, steps: float) -> float:
    """Floating-point operations a token, forward, of `steps` steps over sequences of `length` tokens."""

  def diagnose(self, params: Params) -> dict[str, float]:
    """Numbers worth logging, from the cell's parameters."""

  def run(self, x: Array, e: Array, plan: Plan, ctx: Context, kv: Any, keep: Any, remat: Any, precomputed: Any = None):
    """The steps of a plan: `loop.run`, where one comes after the other for all tokens; a cell whose steps are of
    different shapes, or of several tokens' at a time, has a way of its own to the same results."""

  def enter(self, x: Array) -> Any:
    """The state that the loop begins with, a tree of leaves [B, T, ...], from that of the start, [B, T, D]."""

  def output(self, state: Any) -> Array:
    """What is read out of a state, [B, T, D]."""

  def __call__(self, x: Any, e: Array, ctx: Context, kv: Any) -> tuple[Any, Any, dict]:
    """One step: (state, input, context, cache) -> (state, cache, auxiliaries)."""


class Memory(Protocol):
  """What the steps of a loop keep of keys and values."""

  def slots(self, loops: int) -> int:
    """Steps whose entries it keeps; asked by `loop.run` alone."""

  @property
  def exact(self) -> bool:
    """Whether decoding token by token gives what one pass over all of them with this memory gives."""

  @property
  def rewinds(self) -> bool:
    """Whether a cache from which the last tokens are taken away is the cache before them (drafts, shared prompts)."""

  def make(self, loops: int, layers: int, batch: int, length: int, groups: int, head: int, dtype: Any,
           width: int) -> Any:
    """An empty cache for plans of up to `loops` steps: a KV, or a tree of them; width: that of the states."""

  def has_capacity(self, kv: Any, ctx: Context, taken: Array) -> Array:
    """Which of the tokens that a router takes, bool[B, T], find a place in the cache of the step."""

  def update(self, kv: KV, ctx: Context, layer: Array, k: Array, v: Array) -> tuple[KV, Array, Array, Array]:
    """Writes k, v [B, T, G, d]; returns the cache and what may be read: [B, G, S, d] twice, positions [B, S]."""

  def fill_skipped(self, kv: KV, pos: Array, last: Array) -> KV:
    """What slots of steps that were not taken hold: pos i32[B, 1] the token's, last i32[B] its last step (-1: none)."""


@runtime_checkable
class Preparation(Protocol):
  """What becomes of a batch in every step, before anything is summed; see `Objective.prepare`."""

  teacher: Teacher | None  # whose weights it runs with

  def check(self, model: Any, measure: Any):
    """Raises ConfigError where the model does not fit it, or the measure that the model is evaluated by."""

  def __call__(self, context: PlanContext, weights: Params | None = None) -> Batch:
    """The batch that is learned from. weights: the teacher's; not given where there is none."""


class Teacher(Protocol):
  """Whose weights a rollout runs with, where they are not those that learn: the last ones of a work folder, frozen."""

  @property
  def folder(self) -> str:
    """The work folder."""

  @property
  def name(self) -> str:
    """By which its weights are known."""

  def model(self, own: Any) -> Any:
    """The model that runs, where the model `own` learns."""


class Term(Protocol):
  """What is learned from rollouts; see terms/term.py for what they share. One that does not suit every model has
  `check(model)` too, which raises ConfigError."""

  @property
  def reads(self) -> tuple[str, ...]:
    """Names of the rollouts."""

  def weight(self, batch: Batch) -> Array:
    """f32[]: what the sum is divided by, a function of the batch alone."""

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    """f32[]: the sum over the batch."""


class Task(Protocol):
  """Where examples come from."""

  length: int
  measure: Measure

  @property
  def splits(self) -> Mapping[str, int]:
    """What may be evaluated: the name of each split that is not trained on -> tokens of its examples."""

  def prepare(self, workdir: Any, log: Callable) -> Any:
    """Makes the data, if it has any, and gives the tokenizer, or None."""

  def tokenizer_of(self, workdir: Any) -> Any:
    """The tokenizer of data that are prepared, or None."""

  def verify(self, workdir, log):
    """Raises ValueError where the data are not, byte for byte, what was prepared."""

  def examples(self, workdir, split: str, seed: int) -> Any:
    """A grain.MapDataset of single examples: tokens, targets, weights, positions, each [T, ...]; segments i32[T] too
    where several documents, which must not see each other, share an example: from 1, and 0 for padding."""


# Layers --------------------------------------------------------------------------------------------------------------


class Block(Protocol):
  """A layer; a Linen module."""

  dtype: str  # of its products
  layers: int  # attentions in it, each with a place in the cache
  modulated: bool  # whether it takes gates and scales from the cell
  viewed: bool  # whether it takes a view of its own cell in the place of a cache

  def check(self, width: int, where: str):
    """Raises ConfigError where heads do not fit the width, or the dtype is none that we know; `where` begins it."""

  def heads_of(self, width: int) -> tuple[int, int]:
    """(G, d): heads of keys and values, and their width."""

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""

  def __call__(self, x: Array, ctx: Context, mod: Any, kv: Any, layer: Array | int = 0) -> tuple[Array, Any]:
    """x [B, T, D], what the cell gives this layer, the cache, the layer's number -> (x, cache)."""


class Attention(Protocol):
  """What mixes tokens in a layer; a Linen module."""

  heads: int
  groups: int | None
  head: int | None  # the width of a head; None: the layer's divided by `heads`
  kernel: Kernel
  position: Position | None

  def flops(self, width: int, length: float) -> float:
    """Floating-point operations a token, forward."""

  def __call__(self, x: Array, ctx: Context, kv: Any, layer: Array | int, gate: Array | None = None) -> tuple[Array,
                                                                                                              Any]:
    """x [B, T, D] in the layer's dtype, the gate of its last product f32[D] or None -> ([B, T, D], cache)."""


class Projection(Protocol):
  """What makes a product of attention or MLP; a Linen module."""

  def __call__(self, x: Array, features: int, init: Any, ctx: Context | None = None, *, bias: Any = None,
               gain: Array | None = None, divided: int | None = None, heads: tuple[int, int] | None = None) -> Any:
    """x [..., I] -> [..., features], or queries, keys and values; see layers.Dense."""


class Kernel(Protocol):
  """How attention's parallel pass is computed."""

  causal: bool  # whether queries read no token after them

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], segments i32[B, T] or None -> [B, T, H, d]."""

  def weights(self, q: Array, k: Array, seg: Array | None) -> Array:
    """What every query gives to every key, f32[B, H, T, T], rows of sum one; for looking on (inference/tracing.py)."""


class Position(Protocol):
  """Where queries and keys learn their places."""

  def check(self, heads: int, width: int, where: str):
    """Raises ConfigError where heads, `width` wide together, cannot be served."""

  def rotate(self, x: Array, pos: Array) -> Array:
    """Queries or keys [B, T, H, d] at positions i32[B, T] -> the same shape."""

  def augment_qk(self, q: Array, k: Array, v: Array, pos: Array, heads: int = 2) -> tuple[Array, Array, Array]:
    """Adds channels that tell places; pos i32[B, S] of the keys, whose heads stand at the axis `heads`."""


# Around the loop -----------------------------------------------------------------------------------------------------


class ReadIn(Protocol):
  """How inputs enter; a Linen module."""

  width: int
  length: int  # the longest sequence
  vocab: int  # 0 where inputs are vectors
  dtype: str  # of the loop's state

  def __call__(self, tokens: Array, pos: Array) -> Array:
    """Tokens i32[B, T] or vectors f32[B, T, inputs], positions i32[B, T] -> [B, T, D]."""

  def example(self) -> Array:
    """The smallest input, for initialisation."""


class ReadOut(Protocol):
  """How states become answers; a Linen module."""

  def before(self, x: Array) -> Array:
    """What a state passes on its way to the coda, [B, T, D]."""

  def __call__(self, x: Array) -> Array:
    """The state after the coda -> z [B, T, D], ready for the head."""

  def table(self, read_in: Any) -> Array:
    """The head's matrix, [outputs, D]."""

  def outputs_of(self, read_in: Any) -> int:
    """Rows of that matrix."""


class Start(Protocol):
  """The state that the loop begins with."""

  heard: bool  # whether it knows the input

  def __call__(self, e: Array, ctx: Context) -> Array:
    """The input [B, T, D] -> a state [B, T, D]."""


class Injection(Protocol):
  """How a step takes the input in again; a Linen module."""

  injects: bool

  def radius(self, params: Params) -> float:
    """Spectral radius of the linear map of the state."""

  def flops(self, width: int) -> float:
    """Floating-point operations a token, forward."""

  def __call__(self, x: Array, e: Array) -> Array:
    """State and input [B, T, D] -> what the layers see, [B, T, D]."""


class Remat(Protocol):
  """What the backward pass saves."""

  def step(self, step: Callable) -> Callable:
    """A step, the body of a scan over steps, lifted."""

  def once(self, step: Callable) -> Callable:
    """A step that is written out in the program, lifted: (cell, state, *all that it uses besides) -> outputs."""

  def layer(self, layer: Callable) -> Callable:
    """A layer of a stack, lifted."""


class Exit(Protocol):
  """Which state answers."""

  decides: bool  # whether token by token while the model runs, so that it serves where tokens are decoded

  @property
  def threshold(self) -> float | None:
    """A threshold, which is an argument of the compiled program; None where it has none."""

  def run(self, model: Any, params: Params, batch: Batch, plan: Plan, threshold: Array | None) -> tuple[Trace, Readout]:
    """The trace, whose `steps` are i32[B] or i32[B, T] and whose z answers."""


class Sampler(Protocol):
  """How a model makes texts; the command line, the harness and `loopformer.generate` go through the model's own."""

  denoises: bool  # whether it writes all of an answer at once (diffusion/sampler.py), and not token by token

  def serve(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """What serves requests: `submit` takes one and gives its number, `run` the texts of all, `stream` pieces of them as
    they come, `stats` what was computed; see inference/engine.py."""

  def score(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """What scores texts for the harness: a `harness.Scorer`, or one whose likelihoods are bounds."""


class Rule(Protocol):
  """When a token leaves the loop."""

  threshold: float | None

  def init(self, model: Any, x: Array, ctx: Context) -> Any:
    """Its state before the first step, of tokens whose states are x [B, T, D]."""

  def update(self, state: Any, seen: StepView, threshold: Array | None) -> tuple[Any, Array, Array]:
    """After a step: (its state, done bool[B, T], the state that answers if the token leaves now [B, T, D])."""


# Around training -----------------------------------------------------------------------------------------------------


class Optimiser(Protocol):
  """How parameters are updated."""

  def make(self, steps: int, roles: Any) -> Any:
    """The optax transformation for a run of `steps` of a model with these `model.parameter_roles`; it may take the
    stage of the run, `update(..., stage=i32[])`."""


class Control(Protocol):
  """What a run decides from what it sees; its state is numbers and lists, saved in every checkpoint."""

  def start(self) -> dict[str, Any]:
    """The state of a new run."""

  def watch(self, state: dict[str, Any], step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """The state after a step's values, or an evaluation's."""

  def stage(self, state: dict[str, Any]) -> int:
    """The number that plans may read (`PlanContext.stage`)."""

  def check(self, plans: Mapping[str, Any], evals: Mapping[str, Any]):
    """Raises ConfigError where plans or evaluations do not suit it."""


class Measure(Protocol):
  """What is reported of a batch."""

  @property
  def better(self) -> Mapping[str, int]:
    """Number of a row -> measures.MORE or measures.LESS."""

  mask: int | None  # what hidden tokens read in `asked`; None where it hides none

  def asked(self, batch: Batch) -> Batch:
    """The batch that the model reads and is asked about: the one that the task gave, or one in which it has hidden
    tokens."""

  def told(self, plan: Plan, batch: Batch) -> Plan:
    """The plan that runs: the one that is evaluated, with what that batch tells its steps."""

  def sums(self, readout: Readout, z: Array, batch: Batch, byte_lengths: Array | None) -> dict[str, Array]:
    """f32[] each, sums over the batch. byte_lengths: i32[2, V], as of `measures.text_bytes`; None where there is no
    text.
    """

  def row(self, total: Mapping[str, float]) -> dict[str, Any]:
    """The row of a table, from totals of the sums."""


class Evaluations(Protocol):
  """At which depths a run is evaluated."""

  def schedules(self) -> Mapping[str, Any]:
    """Name -> step sizes, or a run of its own (`evaluate.Run`)."""


class ConfigError(ValueError):
  """A field of a configuration, or an argument, that cannot be used; the message names it, its value, the remedy."""


def shown(value: Any) -> str:
  """A value as messages have it: as it was given, in one line."""
  return repr(value) if isinstance(value, (str, bytes)) else ' '.join(str(value).split())


def whole(name: str, value: Any, least: int, most: int | None = None, why: str = '') -> int:
  """The value of an argument, field or flag as an int. why: what else the message says.

  Raises:
    ConfigError: it is no whole number (True and 2.0 are none), or not from `least` to `most`.
  """
  allowed = f'{least} or more' if most is None else f'{least} to {most}'
  try:
    number = operator.index(value)
  except TypeError:
    number = None
  if number is None or isinstance(value, bool):
    allowed = f'a whole number, {allowed}'
  elif number >= least and (most is None or number <= most):
    return number
  raise ConfigError(f'{name} = {shown(value)}: {f"{why}; set {name} to" if why else "must be"} {allowed}')


def real(name: str, value: Any, allowed: str, why: str = '') -> float:
  """The value of an argument, field or flag as a float.

  Args:
    allowed: the numbers that it may be, as an interval such as '(0, 1]'; never NaN, and infinity only where it says
      so, '[0, inf]'.
    why: what else the message says.

  Raises:
    ConfigError: it is no number, or none of these.
  """
  low, high = (float(end) for end in allowed[1:-1].split(','))
  try:
    number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  inside = (low <= number if allowed[0] == '[' else low < number) and (
      number <= high if allowed[-1] == ']' else number < high)
  if not inside:
    bounds = [f'{low:g} or more' if allowed[0] == '[' else f'above {low:g}'] if low > -math.inf else []
    bounds += [f'at most {high:g}' if allowed[-1] == ']' else f'below {high:g}'] if high < math.inf else []
    finite = '' if allowed[-1] == ']' and high == math.inf else 'finite '
    raise ConfigError(f'{name} = {shown(value)}: {f"{why}; set {name} to" if why else "must be"} a {finite}number'
                      f'{", " if bounds else ""}{" and ".join(bounds)}')
  return number


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config_dataclass(cls):
  """Class decorator of the parts of a configuration: a frozen, keyword-only dataclass."""
  return dataclasses.dataclass(frozen=True, kw_only=True)(cls)
