"""Chains that models write (RELAY, section 3.2): by a loop, round by round, or token by token; and which are kept."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loopformer import plans
from loopformer.inference.engine import generate
from loopformer.model import run_batch
from loopformer.papers.relay.cell import SHOWN
from loopformer.tasks.generated import SymbolTokenizer, seed_of
from loopformer.tasks.reasoning import Chain, Problem, Rounds
from loopformer.types import Array, Batch, ConfigError, Params, PlanContext, whole

ROWS = 64  # problems at a time

Table = Mapping[str, Mapping[int, int]]  # task -> size -> how many chains
Writer = Callable[[Sequence[Problem]], list[Problem]]


@functools.partial(jax.jit, static_argnums=(0, 3))
def shown(model: Any, params: Params, batch: Batch, most: int) -> tuple[Array | None, Array]:
  """Of a loop: the likeliest tokens after each of `most` steps, i32[K, B, n], None where its cell shows none; and the
  likeliest answers, i32[B]. Of steps after a problem's last its tokens mean nothing."""
  context = PlanContext(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0), batch=batch)
  trace = run_batch(model, params, batch, plans.Given(most=most)(context))
  return trace.aux.get(SHOWN), model.apply({'params': params}, trace.z[:, -1], method='logits').argmax(-1)


def by_loop(model: Any, params: Params, form: Rounds, problems: Sequence[Problem], rows: int = ROWS) -> list[Problem]:
  """The problems with what a loop shows of them in the place of their solutions; no rounds where its cell shows none.

  Steps and width are those of the problem, which follow from its size. All passes are of `rows` problems.

  Raises:
    ConfigError: a problem has more rounds, or is wider, than `form` has place for, or the model's positions; the model
      was made for other symbols; rows below 1.
  """
  _check_symbols(model, form)
  whole('rows', rows, 1)
  if form.length > model.read_in.length:
    raise ConfigError(f'problems: {form.length} tokens, more than the {model.read_in.length} positions of the model '
                      '(read_in.length); take smaller problems')
  written = []
  for some in _groups(problems, rows):
    examples = [form.example(problem) for problem in (*some, *some[:1] * (rows - len(some)))]
    batch = {name: np.stack([example[name] for example in examples]) for name in
             ('tokens', 'positions', 'segments', 'loops')}
    rounds, answers = jax.device_get(shown(model, params, batch, form.most))
    for place, problem in enumerate(some):
      steps = len(problem.rounds) if rounds is not None else 0
      own = rounds[:steps, place] if steps else np.zeros((0, 0), np.int32)
      written.append(form.read(problem, own, int(answers[place])))
  return written


def by_token(model: Any, params: Params, form: Chain, problems: Sequence[Problem], rows: int = ROWS) -> list[Problem]:
  """The problems with what a model that writes token by token makes of them, always the likeliest one.

  It may write as much as the longest trace that `form` has place for.

  Raises:
    ConfigError: that does not fit the model's positions, or the model was made for other symbols.
  """
  _check_symbols(model, form)
  prompts = [form.ids(problem.prompt) for problem in problems]
  most = form.of.extent.chain + 2
  texts = generate(model, params, SymbolTokenizer(form.symbols), prompts, temperature=0.0, max_new_tokens=most,
                   rows=rows)
  return [form.read(problem, text.split()) for problem, text in zip(problems, texts)]


def _check_symbols(model, form):
  count, name = len(form.symbols), type(form.of).__name__
  if model.outputs != count or model.read_in.vocab < count:
    raise ConfigError(f'problems: {name} writes them in {count} symbols, and the model reads {model.read_in.vocab} and '
                      f'answers {model.outputs}; take the source that it was trained on, or one with its limit')


def consistent(of: Any, problem: Problem, written: Problem) -> bool:
  """Whether the answer that was written is the one that its rounds lead to: what a chain may be asked without knowing
  the solution. Written by a loop, two heads have to agree.

  Raises:
    ConfigError: not even the problem's own rounds lead to its answer: they are told in part, or there are none.
  """
  if of.concluded(problem.rounds, problem.task) != problem.answer:
    raise ConfigError(f'{type(of).__name__}: its rounds lead to no answer, so that no chain could be kept; give a '
                      'source of whole solutions')
  return of.concluded(written.rounds, written.task) == written.answer


def correct(problem: Problem, written: Problem) -> bool:
  """Whether the answer is right."""
  return written.answer == problem.answer


def draws(of: Any, stream: Any, size: int, task: str = '') -> Iterator[Problem]:
  """Problems of a size without end, the same for a stream (anything that prints), drawn apart from those of runs."""
  number = 0
  while True:
    yield of.draw(np.random.default_rng((seed_of('chains', stream, task, size), number)), size, task)
    number += 1


@dataclasses.dataclass(frozen=True)
class Filled:
  """What became of a row of a table: how many chains were asked for, tried, and kept."""
  task: str
  size: int
  asked: int
  tried: int
  kept: int


def filled(table: Table, of: Any, stream: Any, write: Writer, keep: Callable[[Problem, Problem], bool], tries: int,
           rows: int = ROWS) -> tuple[list[Problem], list[Filled]]:
  """Chains as a table asks for them: problems are drawn, solved by `write`, and kept where `keep` says so, until there
  are enough of a row, or `tries` times as many were tried. None is kept that is longer than any of `of` may be.

  Raises:
    ConfigError: a task that `of` does not have, a size that it has no problems of, a count, tries or rows below 1.
  """
  whole('tries', tries, 1)
  whole('rows', rows, 1)
  problems, told = [], []
  for task, counts in table.items():
    for size, count in counts.items():
      whole(f'table[{task!r}][{size}]', count, 1)
      source, tried = draws(of, stream, size, task), 0
      kept: list[Any] = []
      while len(kept) < count and tried < tries * count:
        some = [next(source) for _ in range(min(rows, tries * count - tried))]
        kept += [written for problem, written in zip(some, write(some))
                 if _fits(of, written) and keep(problem, written)]
        tried += len(some)
      problems += kept[:count]
      told.append(Filled(task=task, size=size, asked=count, tried=tried, kept=min(len(kept), count)))
  return problems, told


def _fits(of, problem):
  return sum(map(len, problem.rounds)) <= of.extent.chain


def originals(of: Any, stream: Any, counts: Mapping[str, int]) -> list[Problem]:
  """Problems of the sizes that training draws, with their true solutions: so many of each task."""
  problems = []
  for task, count in counts.items():
    if task not in of.tasks:
      raise ConfigError(f'task = {task!r}: no such source of problems; choose one of {", ".join(map(repr, of.tasks))}')
    whole(f'counts[{task!r}]', count, 0)
    source, rng = of.tasks[task], np.random.default_rng(seed_of('originals', stream, task))
    problems += [of.draw(rng, source.sizes.pick(rng, source.shortest, source.longest), task) for _ in range(count)]
  return problems


@dataclasses.dataclass(frozen=True)
class Scores:
  """Shares of problems whose answer is right, and whose whole chain is; of tokens of chains that are right (`bits`, NaN
  where no chain has a token); and of tokens at every place of every round, f64[T, most tokens], NaN where no round has
  one (`hits`)."""
  answer: float
  chain: float
  bits: float
  hits: np.ndarray


def scored(problems: Sequence[Problem], written: Sequence[Problem]) -> Scores:
  """How chains compare with the true ones, token by token from the left; one that is missing is wrong.

  Chains that were written round by round are compared by rounds; others as a whole. Of a problem without rounds the
  chain is right where nothing was written but an answer.

  Raises:
    ConfigError: there are no problems, or not as many were written.
  """
  if not problems or len(problems) != len(written):
    raise ConfigError(f'problems: {len(problems)}, and {len(written)} were written; give one or more, and as many')
  shape = max(len(p.rounds) for p in problems), max((len(r) for p in problems for r in p.rounds), default=0)
  right, seen = np.zeros(shape), np.zeros(shape)
  whole_chains = 0
  for problem, other in zip(problems, written):
    rounds = other.rounds if len(other.rounds) == len(problem.rounds) else _cut(other.rounds, problem.rounds)
    whole_chains += rounds == problem.rounds
    for t, (true, own) in enumerate(zip(problem.rounds, rounds)):
      right[t, :len(true)] += [place < len(own) and own[place] == token for place, token in enumerate(true)]
      seen[t, :len(true)] += 1
  hits = np.divide(right, seen, out=np.full(shape, np.nan), where=seen > 0)
  bits = float(right.sum() / seen.sum()) if seen.any() else math.nan
  return Scores(answer=float(np.mean([correct(*pair) for pair in zip(problems, written)])),
                chain=whole_chains / len(problems), bits=bits, hits=hits)


def _cut(rounds, like):
  """A text without rounds, cut as these are; what is too much stays in the last, or is one of its own where there are
  none."""
  text, cut = [token for each in rounds for token in each], []
  for each in like[:-1]:
    cut.append(tuple(text[:len(each)]))
    text = text[len(each):]
  return (*cut, tuple(text)) if like or text else ()


def _groups(items, size):
  return (items[i:i + size] for i in range(0, len(items), size))
