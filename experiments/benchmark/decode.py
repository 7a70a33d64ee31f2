"""Tokens a second of generation, and what they could be."""
from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any, Callable, Iterable

import jax
import numpy as np

from experiments.benchmark.floor import bare_products
from experiments.benchmark.sizes import MEGA, Size, make_model, spread
from loopformer import plans
from loopformer.inference.engine import Engine
from loopformer.model import Looped, init_params
from loopformer.training import metrics


def decode_suite(size: Size, repeats: int, budgets: Iterable[int] = (1, 2, 4, 8),
                 batches: Iterable[int] | None = None, context: int = 512) -> dict[str, list[dict]]:
  """Tokens a second over a batch, the end of text never drawn; every budget runs the same program.

  All that is compared takes turns: budgets and batches, the bare products of as many rows, and a pass without cache
  over `context` tokens. batches: 1 and 8 rows on a CPU, 1 and 64 elsewhere.
  """
  batches = batches or ((1, 8) if jax.default_backend() == 'cpu' else (1, 64))
  model = make_model(size)
  params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
  contestants = {(batch, budget): functools.partial(decode_once, size, model, params, budget, batch)
                 for batch in batches for budget in budgets}
  table = params['read_in']['embedding']
  bare = {batch: bare_products(params['cell']['core'], batch, size.loops, table, size.dtype) for batch in batches}
  deep = dataclasses.replace(size, prompt=context - size.new, length=context + 1)
  whole = make_model(deep)
  weights = jax.jit(functools.partial(init_params, whole))(jax.random.key(0))
  again = recompute(deep, whole, weights, context)
  reads, draws = ({key: [] for key in contestants} for _ in range(2))
  products, cached, recomputed = {batch: [] for batch in bare}, [], []
  for turn in range(repeats + 1):
    kept = turn > 0  # the first compiles
    for key, contestant in contestants.items():
      read, drawn = contestant()
      reads[key] += [read] * kept
      draws[key] += [drawn / size.new] * kept
    for batch, contestant in bare.items():
      products[batch] += [contestant()] * kept
    cached += [decode_once(deep, whole, weights, deep.loops, 1)[1] / deep.new] * kept
    recomputed += [again()] * kept
  middle = {key: statistics.median(times) for key, times in draws.items()}
  rows = [{'rows': batch, 'loops': budget, f'prefill {size.prompt} s': statistics.median(reads[batch, budget]),
           'ms a round': 1e3 * middle[batch, budget], 'range': spread([1e3 * value for value in draws[batch, budget]]),
           'tokens/s': round(batch / middle[batch, budget]),
           'times one row': batch * middle[batches[0], budget] / middle[batch, budget]}
          for batch, budget in contestants]
  shares = []
  for batch in batches:
    slope, fixed = np.polyfit(budgets, [middle[batch, budget] for budget in budgets], 1)
    worst = max(abs(fixed + slope * budget - middle[batch, budget]) / middle[batch, budget] for budget in budgets)
    shares.append({'rows': batch, 'fixed ms': 1e3 * fixed, 'ms a loop': 1e3 * slope,
                   f'fixed share at {size.loops} loops %': 100 * fixed / (fixed + slope * size.loops),
                   'worst miss of the line %': 100 * worst})
  ratio = [b / a for a, b in zip(cached, recomputed)]
  caches = [{'places': context, 'cached ms a token': 1e3 * statistics.median(cached),
             'recomputed ms a token': 1e3 * statistics.median(recomputed),
             'times as fast': statistics.median(ratio), 'range': spread(ratio)}]
  bandwidth, baselines = metrics.measured_bandwidth(), []
  for batch, times in products.items():
    least, seconds = (bare_bytes(size) + batch * cache_bytes(size)) / bandwidth, middle[batch, size.loops]
    baselines.append({'rows': batch, 'bare products ms': 1e3 * statistics.median(times),
                      'MB of weights': bare_bytes(size) / MEGA, 'MB of caches': batch * cache_bytes(size) / MEGA,
                      'roofline ms': 1e3 * least, 'decoding ms': 1e3 * seconds,
                      'times the products': seconds / statistics.median(times), '% of roofline': 100 * least / seconds})
  return {'decode': rows, 'fixed share': shares, 'cache': caches, 'floor': baselines}


def recompute(size: Size, model: Looped, params: Any, context: int) -> Callable[[], float]:
  """Seconds of a pass over `context` tokens and the logits of the last: a token without a cache."""
  tokens = jax.numpy.asarray(np.random.default_rng(0).integers(size.vocab, size=(1, context)), jax.numpy.int32)

  @jax.jit
  def last(params, tokens):
    trace = model.apply({'params': params}, tokens, plans.schedule(plans.resolve(size.loops)))
    return model.apply({'params': params}, trace.z[:, -1], method='logits')

  def once():
    start = time.perf_counter()
    last(params, tokens).block_until_ready()
    return time.perf_counter() - start

  return once


def bare_bytes(size: Size) -> float:
  """Bytes of weights that a token of all rows reads: a block a loop, and the head."""
  block = size.width * (4 * size.width + 2 * size.hidden)
  return float(jax.numpy.dtype(size.dtype).itemsize) * (size.loops * size.layers * block + size.vocab * size.width)


def cache_bytes(size: Size) -> float:
  """Bytes of keys and values that a token of a row reads: those of the prompt and half of the new tokens."""
  places = size.prompt + size.new / 2
  return float(jax.numpy.dtype(size.dtype).itemsize) * 2 * size.loops * size.layers * places * size.width


@dataclasses.dataclass(frozen=True)
class Ids:
  """The end of a tokenizer that writes ids as numbers, and never ends a document."""
  vocab_size: int
  eos: int = -1

  def decode(self, ids) -> str:
    return ' '.join(map(str, ids))


def decode_once(size: Size, model: Looped, params: Any, budget: int, batch: int) -> tuple[float, float]:
  """Seconds to read the prompts and draw the first tokens, and to draw the new tokens."""
  rng = np.random.default_rng(0)
  engine = Engine(model, params, Ids(size.vocab), rows=batch, length=size.prompt + size.new + 1, loops=size.loops,
                  max_steps=size.new)
  for _ in range(batch):
    engine.submit(rng.integers(size.vocab, size=size.prompt).tolist(), budget=budget,
                  max_new_tokens=size.new + 1)
  start = time.perf_counter()
  stream = engine.stream()
  for _ in range(batch):  # the first piece of every row comes from reading its prompt
    next(stream)
  middle = time.perf_counter()
  for _ in stream:
    pass
  if engine.stats['tokens'] != batch * size.new:
    raise RuntimeError(f'decoding drew {engine.stats["tokens"]} tokens, not {batch * size.new}')
  return middle - start, time.perf_counter() - middle
