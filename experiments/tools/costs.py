"""What an answer costs: operations, steps that wait for each other, and time, of a chain that is decoded, of one pass,
and of one more token.

A chain of N tokens that writes T more is read in one pass and then decoded with a cache, so that every token goes
through the layers once. A pass of L loops goes through them L times with all of its N tokens. Operations are counted
(`model.flops`), times measured.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Any

import jax
import numpy as np

from loopformer import plans
from loopformer.model import run_batch
from loopformer.types import Batch, Params, Plan, whole


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of a problem: floating-point operations, forward; steps, applications of the cell one after the other;
  milliseconds, those of a whole call divided by its problems."""
  flops: float
  steps: float
  milliseconds: float


def of_chain(model: Any, params: Params, tokenizer: Any, prompts: Sequence[Sequence[int]], written: float, most: int,
             repeats: int = 5) -> Cost:
  """Of prompts that are continued greedily, all at once.

  Args:
    prompts: ids; written: tokens that the model writes for each, a mean, the one that ends it included; most: that it
      may write.
  """
  longest = max(map(len, prompts)) + most
  engine = model.sampler.serve(model, params, tokenizer, rows=len(prompts), length=min(longest, model.read_in.length),
                               loops=model.loops)

  def call():
    for number, prompt in enumerate(prompts):
      engine.submit(prompt, max_new_tokens=most, temperature=0.0, number=number)
    engine.run()

  tokens = float(np.mean([len(prompt) for prompt in prompts])) + written - 1  # the last one is not read
  return Cost(flops=model.flops(tokens, model.loops) * tokens, steps=written * model.loops,
              milliseconds=_milliseconds(call, repeats) / len(prompts))


def of_pass(model: Any, params: Params, batch: Batch, plan: Plan, repeats: int = 5) -> Cost:
  """Of a batch that goes through the steps of a plan at once, up to the likeliest answers; as wide as its rows are, and
  as deep as the deepest of them."""
  rows, tokens = batch['tokens'].shape[:2]
  pass_of = jax.jit(lambda params, batch, plan: model.apply(
      {'params': params}, run_batch(model, params, batch, plan).z, method='logits').argmax(-1))
  batch = {name: jax.numpy.asarray(value) for name, value in batch.items()}
  steps = plan.steps if plan.active is None else int(np.asarray(plan.active).sum(0).max())
  return Cost(flops=model.flops(tokens, steps) * tokens, steps=float(steps),
              milliseconds=_milliseconds(lambda: jax.block_until_ready(pass_of(params, batch, plan)), repeats) / rows)


def of_token(model: Any, params: Params, length: int, loops: int, repeats: int = 20) -> Cost:
  """Of one more token of a text whose caches are `length` long, up to the likeliest next one."""
  plan, variables = plans.schedule(plans.resolve(loops)), {'params': params}

  @jax.jit
  def one(kv, token, place):
    trace = model.apply(variables, token[None], plan, place[None, None], kv=kv)
    return model.apply(variables, trace.z[:, 0], method='logits').argmax(-1), trace.kv

  kv, token, place = model.cache(1, length, loops), jax.numpy.zeros(1, jax.numpy.int32), jax.numpy.int32(length // 2)
  return Cost(flops=model.flops(length, loops), steps=float(loops),
              milliseconds=_milliseconds(lambda: jax.block_until_ready(one(kv, token, place)), repeats))


def cache_bytes(model: Any, length: int, loops: int) -> float:
  """Bytes a token that decoding keeps, of texts of `length` tokens."""
  caches = jax.tree.leaves(jax.eval_shape(lambda: model.cache(1, length, loops)))
  return sum(leaf.size * leaf.dtype.itemsize for leaf in caches) / length


def _milliseconds(call: Callable[[], Any], repeats: int) -> float:
  """The median of several calls, after one that compiles."""
  whole('repeats', repeats, 1)
  call()
  spent = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    spent.append(time.perf_counter() - start)
  return 1e3 * float(np.median(spent))
