"""lm-evaluation-harness with depth as an argument (extra `eval`): any of its tasks, at any budget, schedule or exit.

    from loopformer.inference import harness
    model, params, tokenizer, _ = loopformer.load('runs/tiny')
    lm_eval.simple_evaluate(harness.Harness(model, params, tokenizer, steps=4), tasks=['piqa'])

`Scorer` does the work and imports nothing of the harness. `Harness` is its subclass of `lm_eval.api.model.LM`, and
`run_harness` evaluates a work folder's model at many depths.
"""
from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
import re
import time
from typing import Any, Callable, Iterator, Mapping, Sequence, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans, sharding, storage
from loopformer.data.tokenizer import before_text
from loopformer.inference.engine import warn_beyond
from loopformer.inference.exits import check, compiled
from loopformer.training import metrics, processes
from loopformer.training.processes import say
from loopformer.types import Array, ConfigError, Params, Plan, real, whole

SHORTEST = 16  # tokens of the shortest compiled row; each further one is twice as long
COLUMNS = 16  # continuation tokens of a row whose logits exist at a time
EVERY = 5.0  # seconds between two lines of progress
NEW = 256  # tokens that a request for text asks for where it does not say, the harness's own default
LIMITS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')  # where it does; the first counts
BOOTSTRAPS = 1000  # resamplings behind the standard errors that have no formula
Told = TypeVar('Told')


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Ids of a context, never empty, and of its continuation: as the harness's `TemplateLM._encode_pair` makes them.

  White space at the end of the context is moved to the continuation, and the two are encoded together; what exceeds the
  context's own number of ids is the continuation. Two cases are left open there. An empty context is the token that
  begins documents, or else the one that ends them. Where the tokenizer joins all of the continuation to the context's
  last piece, that joint piece is scored.
  """
  bare = context.rstrip()
  continuation = context[len(bare):] + continuation
  own, whole = tokenizer.encode(bare) if bare else [], tokenizer.encode(bare + continuation)
  if continuation and own and len(whole) <= len(own):
    own = whole[:-1]
  return own or [before_text(tokenizer)], whole[len(own):]


def windows(ids: Sequence[int], length: int, first: int) -> Iterator[tuple[list[int], list[int]]]:
  """(context, continuation) of a long text: every id is scored once, and no window reads more than `length` ids.

  The first context is the id `first`, those of the others are one id, and that of the last is as long as fits.
  """
  for start in range(0, len(ids), length):
    end = min(start + length, len(ids))
    yield ([first] if start == 0 else list(ids[end - length - 1:start])), list(ids[start:end])


def states(model: Any, exit_policy: Any, params: Params, tokens: Array, plan: Plan, threshold: Array | None
           ) -> tuple[Array, Array]:
  """(z [B, T, D], ready for the head, steps that each token took i32[B, T]) of tokens i32[B, T].

  exit_policy: None (all steps of the plan), or an exits.Adaptive without its threshold (`static`), an argument.
  """
  if exit_policy is None:
    trace = model.apply({'params': params}, tokens, plan)
    return trace.z, jnp.broadcast_to(trace.steps, tokens.shape)
  trace = model.apply({'params': params}, tokens, plan, exit_policy, threshold, method='adapt')
  return trace.z, trace.steps


@functools.partial(jax.jit, static_argnums=(0, 1))
def score_rows(model: Any, exit_policy: Any, params: Params, tokens: Array, targets: Array, first: Array, counts: Array,
               plan: Plan, threshold: Array | None, vocab: Array) -> tuple[Array, Array, Array]:
  """What a batch of continuations scores; the head sees their positions alone, `COLUMNS` of each row at a time.

  Args:
    exit_policy, threshold: as of `states`.
    tokens: i32[B, T], context and continuation, padded at the end.
    targets: i32[B, C], continuations, padded to a multiple of `COLUMNS`; counts: i32[B], without padding.
    first: i32[B], the position in `tokens` whose answer is the first of the continuation.
    vocab: i32[], ids of the tokenizer; the likeliest is one of them.

  Returns:
    (sums of log-probabilities f32[B], whether each token is the likeliest bool[B], steps over the positions i32[B]).
  """
  length, column = tokens.shape[1], jnp.arange(COLUMNS)
  z_BTD, taken = states(model, exit_policy, params, tokens, plan, threshold)

  def some(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    total, likeliest = carry
    at = i * COLUMNS + column
    z = jnp.take_along_axis(z_BTD, jnp.minimum(first[:, None] + at, length - 1)[..., None], 1)
    logits = model.apply({'params': params}, z, method='logits')
    target = jax.lax.dynamic_slice_in_dim(targets, i * COLUMNS, COLUMNS, 1)
    score = jnp.take_along_axis(logits, target[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, -1)
    asked = at < counts[:, None]
    best = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf).argmax(-1)
    return total + jnp.where(asked, score, 0).sum(-1), likeliest & (~asked | (best == target)).all(-1)

  start = jnp.zeros(len(tokens)), jnp.ones(len(tokens), bool)
  total, likeliest = jax.lax.fori_loop(0, -(-counts.max() // COLUMNS), some, start)
  place = jnp.arange(length) - first[:, None]
  return total, likeliest, jnp.where((place >= 0) & (place < counts[:, None]), taken, 0).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _last(model: Any, params: Params, tokens: Array) -> Array:
  """z f32[B, T, D] after all of the model's loops."""
  return model.apply({'params': params}, tokens, plans.schedule(plans.resolve(model.loops))).z.astype(jnp.float32)


def check_causal(model: Any, params: Params):
  """Raises ConfigError where what a token answers depends on those after it.

  Measured, because no part knows it of all others: a pass over a few ids, and one over the same with another last id.
  """
  ids = np.arange(min(8, model.read_in.length))[None] % model.read_in.vocab
  other = ids.copy()
  other[:, -1] = (ids[:, -1] + 1) % model.read_in.vocab
  with sharding.on(sharding.mesh_of(params)):
    here, there = (_last(model, params, jnp.asarray(tokens, jnp.int32))[:, :-1] for tokens in (ids, other))
  moved = float(jnp.abs(here - there).max(initial=0))
  if moved > 1e-5 * float(jnp.abs(here).max(initial=0)):
    raise ConfigError(f'model: not causal, another last token moves what is before it by {moved:.2g}, so continuations '
                      'would be scored by themselves; give a model with causal attention (kernels.Blockwise)')


class Scorer:
  """Log-likelihoods of texts and continuations of prompts, at one depth.

  Rows are sorted by length into few shapes, powers of two up to the model's positions, and batches are filled up: a
  program a shape, shared by all depths, schedules and thresholds of one exit rule.

  Args:
    model: a causal one; its memory is what texts are generated with (`model.clone(memory=...)`), scores need none.
    steps: a budget (that many equal steps), or a tuple of step sizes with sum one; the model's own loops by default.
    exit: an exits.Adaptive, by which every position takes fewer steps; rules that read answers (such as KL) form
      logits of all positions after every step. In generation prompts are read with all steps.
    params: on one device, or divided over a mesh (`loopformer.load(..., mesh=)`), over which rows are divided too; with
      several processes all of them ask the same.
    batch: rows of a batch, and texts that are generated at a time; on a mesh rounded up to a multiple of data * fsdp.
    log: hears of progress, a line every few seconds; None for silence.

  Raises:
    ConfigError: a schedule that does not sum to one; a model without text, or that is not causal; a tokenizer that is
      larger than the model; an exit that is not decided token by token, or that reads a gate which the model lacks.
  """

  def __init__(self, model: Any, params: Params, tokenizer: Any, *, steps: int | Sequence[float] | None = None,
               exit: Any = None, batch: int = 16, log: Callable[[str], None] | None = None):
    if tokenizer is None or not model.read_in.vocab:
      raise ConfigError('tokenizer = None: no text can be scored; import the model again with its tokenizer beside it'
                        if model.read_in.vocab else
                        'model: its inputs are vectors, and it has no text that could be scored')
    if tokenizer.vocab_size > model.read_in.vocab:
      raise ConfigError(f'tokenizer: {tokenizer.vocab_size} ids, but the model has {model.read_in.vocab} '
                        '(read_in.vocab); give the tokenizer that it was trained with')
    whole('batch', batch, 1)
    params = sharding.gathered(params)
    self.check(model, params, exit)
    self.model, self.params, self.tokenizer = model, params, tokenizer
    self.steps = plans.resolve(model.loops if steps is None else steps)
    warn_beyond(model, self.steps)
    self._mesh = sharding.mesh_of(params)
    self.exit, self.log = exit, log
    self.batch = batch if self._mesh is None else batch + -batch % sharding.row_parts(self._mesh)
    self._plan = plans.schedule(self.steps, max(len(self.steps), model.loops))
    self.reset()

  likelihood = 'exact'  # or 'bound': what its likelihoods are
  unread = 1  # ids of a row that are asked for and never read: the last

  def check(self, model: Any, params: Params, exit: Any):
    """Raises ConfigError where the model is not causal, or cannot be scored with the exit."""
    check_causal(model, params)
    if exit is not None:
      check(model, exit, 'exit')

  def reset(self):
    """Forgets the steps that were counted."""
    self._taken, self._tokens = 0.0, 0

  @property
  def mean_loops(self) -> float:
    """Mean steps of all tokens that were scored or drawn since the last `reset`; the budget where none was."""
    return self._taken / self._tokens if self._tokens else float(len(self.steps))

  def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(context, continuation) -> (sum of log-probabilities in nats, whether every token is the likeliest).

    Contexts that are too long are cut from the left. Raises ConfigError where a continuation alone is too long.
    """
    return self.score([encode_pair(self.tokenizer, *pair) for pair in pairs])

  def rolling(self, texts: Sequence[str]) -> list[float]:
    """Log-likelihood of whole texts in nats, each in windows of the model's positions."""
    parts = [list(windows(self.tokenizer.encode(text), self.model.read_in.length, before_text(self.tokenizer)))
             for text in texts]
    scores = iter(self.score([pair for pairs in parts for pair in pairs]))
    return [sum(next(scores)[0] for _ in pairs) for pairs in parts]

  def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """As `loglikelihood`, of ids; contexts are not empty."""
    most = self.model.read_in.length
    for _, continuation in pairs:
      if len(continuation) > most:
        raise ConfigError(f'continuation: {len(continuation)} tokens, more than the {most} positions of the model '
                          '(read_in.length); score it as a rolling text')
    results = [(0.0, True)] * len(pairs)
    shapes: dict[int, list[tuple[int, list[int], int]]] = {}
    for index, (context, continuation) in enumerate(pairs):
      if continuation:
        row = (list(context) + list(continuation))[-most - self.unread:]
        width = min(max(SHORTEST, 1 << (len(row) - 1 - self.unread).bit_length()), most)
        shapes.setdefault(width, []).append((index, row, len(continuation)))
    tell, done = self._progress(sum(map(len, shapes.values())), 'scored'), 0
    for width, rows in sorted(shapes.items(), reverse=True):
      for start in range(0, len(rows), self.batch):
        some = rows[start:start + self.batch]
        for (index, *_), result in zip(some, self._score_batch(some, width)):
          results[index] = result
        done += len(some)
        tell(done)
    return results

  def _score_batch(self, rows: Sequence[tuple[int, list[int], int]], width: int) -> list[tuple[float, bool]]:
    """The scores of up to `batch` rows (index, ids, length of the continuation) of one shape."""
    tokens = np.full((self.batch, width), self.tokenizer.eos, np.int32)
    targets = np.zeros((self.batch, -(-width // COLUMNS) * COLUMNS), np.int32)
    first, counts = np.zeros((2, self.batch), np.int32)
    for i, (_, ids, count) in enumerate(rows):
      tokens[i, :len(ids) - 1], targets[i, :count] = ids[:-1], ids[-count:]
      first[i], counts[i] = len(ids) - 1 - count, count
    exit_policy, threshold = compiled(self.exit)
    asked: Any = {'tokens': tokens, 'targets': targets, 'first': first, 'counts': counts}
    if self._mesh is not None:
      asked = sharding.spread(asked, self._mesh)
    with sharding.on(self._mesh):
      scores = score_rows(self.model, exit_policy, self.params, **asked, plan=self._plan, threshold=threshold,
                          vocab=jnp.int32(self.tokenizer.vocab_size))
    total, likeliest, taken = processes.fetch(scores)
    self._taken += float(taken.sum())
    self._tokens += int(counts.sum())
    return list(zip(total.tolist(), likeliest.tolist()))[:len(rows)]

  def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """(context, how) -> its continuation, up to the first of the texts how['until'].

    how: until (a text or texts), max_gen_toks (or another of `LIMITS`), do_sample, temperature, top_k, top_p; greedy
    unless do_sample is true, or absent with a temperature above 0. Where context and new tokens do not fit the
    positions, the context is cut from the left, but to no less than half of them, and then fewer tokens are drawn.
    """
    if not requests:
      return []
    most = self.model.read_in.length
    engine = self.model.sampler.serve(self.model, self.params, self.tokenizer, rows=self.batch,
                                      loops=max(len(self.steps), self.model.loops), exit=self.exit)
    for number, (context, how) in enumerate(requests):
      ids = self.tokenizer.encode(context) or [before_text(self.tokenizer)]
      wanted = next((whole(name, how[name], 1) for name in LIMITS if how.get(name) is not None), NEW)
      new = min(wanted, max(most - len(ids), most // 2))
      until = how.get('until') or ()
      heat = None if how.get('temperature') is None else real('temperature', how['temperature'], '[0, inf)')
      sample = how.get('do_sample', bool(heat))
      engine.submit(ids[-(most - new):], budget=self.steps, max_new_tokens=new, number=number,
                    stop=[text for text in ([until] if isinstance(until, str) else until) if text],
                    temperature=(1.0 if heat is None else heat) if sample else 0.0,
                    top_k=how.get('top_k'), top_p=how.get('top_p'))
    tell, texts, done = self._progress(len(requests), 'continued'), [''] * len(requests), 0
    for piece in engine.stream():
      texts[piece.request] += piece.text
      done += piece.done
      tell(done)
    stats = engine.stats
    self._taken += stats['loops'] * stats['passes'] + len(self.steps) * len(requests)  # first tokens: with the prompts
    self._tokens += stats['passes'] + len(requests)
    return texts

  def _progress(self, total: int, what: str) -> Callable[[int], None]:
    """done -> a line to the log, if the last is some seconds ago."""
    start = last = time.monotonic()

    def tell(done: int):
      nonlocal last
      now = time.monotonic()
      if self.log and now - last >= EVERY and 0 < done < total:
        left, last = (now - start) / done * (total - done), now
        self.log(f'  {what} {done:,}/{total:,}, {metrics.duration(left)} left')

    return tell


@functools.cache
def _harness_class() -> Any:
  """The subclass of LM, made when it is first asked for, because the harness is an optional package."""
  try:
    from lm_eval.api.model import LM
  except ImportError as error:
    raise ImportError("lm-evaluation-harness is not installed: install the extra 'eval' "
                      "(pip install 'loopformer[eval]')") from error

  class Harness(LM):
    """A model at one depth, for `lm_eval.simple_evaluate`; arguments as of `Scorer`."""

    def __init__(self, model: Any, params: Params, tokenizer: Any, *, steps: int | Sequence[float] | None = None,
                 exit: Any = None, batch: int = 16, log: Callable[[str], None] | None = None):
      super().__init__()
      self.scorer = model.sampler.score(model, params, tokenizer, steps=steps, exit=exit, batch=batch, log=log)

    @property
    def mean_loops(self) -> float:
      """Mean steps of all tokens since the start, or the last `scorer.reset()`."""
      return self.scorer.mean_loops

    def get_model_info(self) -> dict[str, Any]:
      """What the harness writes beside its results."""
      return {'likelihood': self.scorer.likelihood, 'steps': list(self.scorer.steps),
              'exit': self.scorer.exit and str(self.scorer.exit), 'mean_loops': self.mean_loops}

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
      """Of every (context, continuation): (sum of log-probabilities, is greedy)."""
      return self._told('loglikelihood', requests, self.scorer.loglikelihood([r.args for r in requests]))

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
      """The log-likelihood of every text."""
      return self._told('loglikelihood_rolling', requests, self.scorer.rolling([r.args[0] for r in requests]))

    def generate_until(self, requests: list[Any]) -> list[str]:
      """The continuation of every (context, how)."""
      return self._told('generate_until', requests, self.scorer.generate([r.args for r in requests]))

    def _told(self, kind: str, requests: list[Any], answers: list[Told]) -> list[Told]:
      for request, answer in zip(requests, answers):
        self.cache_hook.add_partial(kind, request.args, answer)
      return answers

  Harness.__qualname__ = 'Harness'
  return Harness


def __getattr__(name: str) -> Any:
  if name == 'Harness':
    return _harness_class()
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def run_harness(workdir: str | Path, tasks: Sequence[str], depths: Sequence[int] = (),
                schedules: Sequence[Sequence[float]] = (), exits: Mapping[str, Any] | None = None, memory: Any = None,
                include: str | Path | None = None, limit: int | None = None, step: int | None = None,
                batch: int = 16, name: str | None = None, mesh: jax.sharding.Mesh | None = None
                ) -> list[Mapping[str, Any]]:
  """Evaluates a run's model on tasks at every depth and schedule, with all steps and with every exit.

  Prints the table and writes <workdir>/harness/<name>.json and .csv. `loops` is the mean number of steps of the tokens
  that were scored or drawn; the other columns are the harness's metrics, `<metric>_stderr` their standard errors.

  Args:
    workdir: the run's folder; step: which checkpoint, the last by default.
    tasks: names of tasks; patterns such as 'piqa*' are allowed.
    depths: budgets; schedules: step sizes with sum one; the model's own number of loops where neither is given.
    exits: exits.Adaptive parts by the names that the table has for them, each run at every depth and schedule too.
    memory: what texts are generated with (memories.py); the model's own by default. A denoiser has none, and no exits.
    include: a folder of task files (.yaml), the only ones that are looked at; None for the harness's own tasks, whose
      data it fetches from the internet.
    limit: only so many rows of every task.
    batch: rows of a batch. name: of the files; those of the tasks by default.
    mesh: as of `loopformer.load`. With several processes all of them call this, and the leader writes.

  Returns:
    The rows of the table, one for every task, schedule and exit.

  Raises:
    ConfigError: no such task; data that cannot be fetched; a model or an exit that `Scorer` refuses, before any task
      is run. ImportError: the harness is not installed.
  """
  from loopformer.api import load
  harness = _harness_class()
  import lm_eval
  chosen = {str(depth): plans.resolve(depth, 'depths') for depth in depths}
  chosen |= {' '.join(f'{size:g}' for size in sizes): plans.check_steps(sizes, name='schedules') for sizes in schedules}
  manager, names = _tasks(tasks, include)
  folder = storage.path(workdir) / 'harness'
  stores = storage.stores(folder, say)
  model, params, tokenizer, _ = load(workdir, step, mesh)
  params = sharding.gathered(params)
  for name, given in (('memory', memory), ('exits', exits)) if model.sampler.denoises else ():
    if given:
      raise ConfigError(f'{name} = {given}: {workdir} holds a denoiser, which writes and scores all tokens at once; '
                        'leave it out')
  model = model if memory is None else model.clone(memory=memory)
  for called, exit_policy in (exits or {}).items():
    check(model, exit_policy, f'exits = {called}')
  chosen = chosen or {str(model.loops): plans.resolve(model.loops)}
  runs = list(itertools.product(names, chosen.items(), {'': None, **(exits or {})}.items()))
  rows: list[Mapping[str, Any]] = []
  bound = model.sampler.denoises
  if bound:
    say('likelihoods are bounds: a denoiser has no others; texts that are compared by them have to be of like lengths')
  for number, (task, (label, steps), (called, exit_policy)) in enumerate(runs):
    say(f'{number + 1}/{len(runs)}: {task}, {label} loops' + (f', {called}' if exit_policy else ''))
    lm, start = harness(model, params, tokenizer, steps=steps, exit=exit_policy, batch=batch, log=say), time.time()
    result = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, limit=limit, log_samples=False,
                                     bootstrap_iters=BOOTSTRAPS)
    rows += [{'task': part, 'budget': len(steps), 'schedule': label, 'exit': called,
              **({'likelihood': 'bound'} if bound else {}), 'loops': lm.mean_loops,
              'rows': result['n-samples'].get(part, {}).get('effective', ''),
              **_numbers(found), 'seconds': round(time.time() - start, 1)}
             for part, found in result['results'].items()]
  columns = list(dict.fromkeys(key for row in rows for key in row if key != 'seconds')) + ['seconds']
  rows = [{key: row.get(key, '') for key in columns} for row in rows]
  say(metrics.table(rows))
  if not stores or not processes.is_leader():
    return rows
  folder.mkdir(parents=True, exist_ok=True)
  name = name or re.sub(r'[^\w+-]+', '_', '+'.join(tasks))[:100] + (f'-first{limit}' if limit else '')
  device = jax.devices()[0].device_kind
  about = {'workdir': str(workdir), 'step': step, 'limit': limit, 'include': include and str(include),
           'memory': str(model.memory), 'exits': {called: str(exit_policy) for called,
                                                  exit_policy in (exits or {}).items()},
           'lm_eval': lm_eval.__version__, 'device': device, 'rows': rows}
  storage.write(folder / f'{name}.json', json.dumps(about, indent=1) + '\n')
  metrics.write_csv(folder / f'{name}.csv', rows)
  say(f'written to {folder / name}.json and .csv')
  return rows


def _tasks(tasks: Sequence[str], include: str | Path | None) -> tuple[Any, list[str]]:
  """(task manager, names of the tasks that were asked for)."""
  from lm_eval.tasks import TaskManager
  include = None if include is None else storage.fetched(include)
  if include is not None and not include.is_dir():
    raise ConfigError(f'include = {include}: no such folder; give one with task files (.yaml), such as '
                      'experiments.tools.evaluation_data writes')
  manager = TaskManager() if include is None else TaskManager(include_path=str(include), include_defaults=False)
  names = []
  for task in tasks:
    found = manager.match_tasks([task])
    if not found:
      there = f'the tasks there are {", ".join(manager.all_tasks)}' if include else 'give include=FOLDER for your own'
      raise ConfigError(f'tasks = {task}: no such task in {include or "the harness"}; {there}')
    names += [name for name in found if name not in names]
  if not names:
    raise ConfigError('tasks is empty: name at least one')
  if include is None:
    try:
      manager.load(names)
    except Exception as error:  # whatever the hub's client raises
      raise ConfigError(f'tasks = {",".join(names)}: their data could not be loaded ({type(error).__name__}: {error}). '
                        "The harness's own tasks fetch it from the internet; give include=FOLDER for tasks of local "
                        'files, such as experiments.tools.evaluation_data writes') from error
  return manager, names


def _numbers(found: Mapping[str, Any]) -> dict[str, Any]:
  """The harness's results of a task ('acc,none', 'acc_stderr,none') as columns, each number before its error."""
  columns = {}
  for key, value in found.items():
    metric, _, kind = key.partition(',')
    if kind and isinstance(value, (int, float)):
      columns[metric if kind == 'none' else f'{metric},{kind}'] = float(value)
  return columns
