"""An imported decoder beside transformers, with the same weights: milliseconds a round, and the floor."""
from __future__ import annotations

import os
from pathlib import Path
import statistics
import tempfile
import time
from typing import Any, Callable, Iterable, Iterator
import warnings

import jax
import numpy as np

from experiments.benchmark.decode import Ids
from experiments.benchmark.floor import bare_products
from experiments.benchmark.sizes import spread
from loopformer import plans
from loopformer.convert.llama import Decoder, write_config
from loopformer.convert.pretrained import from_pretrained
from loopformer.inference.engine import Engine
from loopformer.nn.positions import Rotary
from loopformer.training import metrics

PEER = 'transformers'
SMOL = Decoder(family='llama', vocab=49152, width=576, hidden=1536, layers=30, heads=9, groups=3, length=2048,
               rotary=Rotary(base=1e5), eps=1e-5, tied=True)  # SmolLM2-135M's shape


def imported_suite(repeats: int, decoder: Decoder = SMOL, batches: Iterable[int] = (1, 8), prompt: int = 64,
                   new: int = 64) -> dict[str, list[dict]]:
  """Greedy decoding of `new` tokens after prompts of `prompt`, by the engine and by transformers: eager PyTorch in
  float32 with its own cache, on as many threads as there are cores. The weights are random, written by transformers and
  read by `convert.from_pretrained`. Both take turns; prompts are new in every turn, so that none is shared.

  Raises:
    RuntimeError: the two do not compute the same logits.
  """
  import torch
  import transformers

  torch.set_num_threads(os.cpu_count() or 1)
  torch.manual_seed(0)
  transformers.utils.logging.disable_progress_bar()
  theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**write_config(decoder))).eval()
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    model, params, _ = from_pretrained(Path(folder))
  apart = logits_apart(model, params, theirs, next(prompts_of(decoder, 1, prompt)))
  if apart > 1e-3:
    raise RuntimeError(f'logits of the two differ by {apart:.2g} of their largest')
  contestants, bare = {}, {batch: bare_products(params['cell']['core'], batch * prompt) for batch in batches}
  products = {batch: [] for batch in bare}
  for batch in batches:
    contestants[batch, 'ours'] = ours_of(model, params, prompts_of(decoder, batch, prompt), new)
    contestants[batch, PEER] = theirs_of(theirs, prompts_of(decoder, batch, prompt), new)
  first, times = {}, {key: [] for key in contestants}
  for turn in range(repeats + 1):
    for key, contestant in contestants.items():
      start = time.perf_counter()
      taken = contestant()
      if turn:
        times[key].append(taken)
      else:  # the first compiles
        first[key] = time.perf_counter() - start
    for batch, contestant in bare.items():
      products[batch] += [contestant()] * (turn > 0)
  weights, bandwidth = weight_bytes(decoder, params), metrics.measured_bandwidth()
  rows = []
  for (batch, name), taken in times.items():
    reads, rounds, work = ([1e3 * value for value in values] for values in zip(*taken))
    rounds_of_peer = [peer[1] / own[1] for peer, own in zip(times[batch, PEER], taken)]
    reads_of_peer = [peer[0] / own[0] for peer, own in zip(times[batch, PEER], taken)]
    rows.append({'rows': batch, 'by': name, 'ms a round': statistics.median(rounds), 'range': spread(rounds),
                 'times as fast': statistics.median(rounds_of_peer), 'range of it': spread(rounds_of_peer),
                 'floor ms': 1e3 * weights / bandwidth, 'CPU ms a round': statistics.median(work),
                 f'prefill {prompt} ms': statistics.median(reads), 'prefill, times': statistics.median(reads_of_peer),
                 'its products ms': 1e3 * statistics.median(products[batch]),
                 'first turn s': first[batch, name]})
  return {'imported': rows}


def weight_bytes(decoder: Decoder, params: Any) -> float:
  """Bytes of weights that a round reads: all, but of a table that is not the head too one row a token."""
  every = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  return float(every if decoder.tied else every - params['read_in']['embedding'].nbytes)


def prompts_of(decoder: Decoder, batch: int, prompt: int) -> Iterator[np.ndarray]:
  """Random prompts, i64[batch, prompt], without end."""
  rng = np.random.default_rng(0)
  while True:
    yield rng.integers(decoder.vocab, size=(batch, prompt))


def logits_apart(model: Any, params: Any, theirs: Any, tokens: np.ndarray) -> float:
  """How far logits of the two are apart, at most, as a share of the largest."""
  import torch

  @jax.jit
  def logits(params, tokens):
    trace = model.apply({'params': params}, tokens, plans.schedule(plans.resolve(1)))
    return model.apply({'params': params}, trace.z, method='logits')

  with torch.inference_mode():
    expected = theirs(torch.from_numpy(tokens)).logits.numpy()
  return float(np.abs(np.asarray(logits(params, tokens)) - expected).max() / np.abs(expected).max())


def ours_of(model: Any, params: Any, prompts: Iterator[np.ndarray], new: int
            ) -> Callable[[], tuple[float, float, float]]:
  """Seconds to read the next prompts and draw the first tokens, of a round of the others, and of all cores in it."""
  engines = []

  def once():
    tokens = next(prompts)
    if not engines:
      engines.append(Engine(model, params, Ids(model.read_in.vocab), rows=len(tokens), length=tokens.shape[1] + new + 1,
                            max_steps=new))
    for row in tokens:
      engines[0].submit(row.tolist(), max_new_tokens=new + 1, temperature=0.0)
    start, stream = time.perf_counter(), engines[0].stream()
    for _ in tokens:  # the first piece of every row comes from reading its prompt
      next(stream)
    middle, busy = time.perf_counter(), time.process_time()
    for _ in stream:
      pass
    return middle - start, (time.perf_counter() - middle) / new, (time.process_time() - busy) / new

  return once


def theirs_of(theirs: Any, prompts: Iterator[np.ndarray], new: int) -> Callable[[], tuple[float, float, float]]:
  """The same of transformers."""
  import torch
  import transformers

  @torch.inference_mode()
  def once():
    tokens, cache = torch.from_numpy(next(prompts)), transformers.DynamicCache()

    def drawn(tokens):
      logits = theirs(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
      return logits[:, -1].argmax(-1, keepdim=True)

    with warnings.catch_warnings():
      warnings.simplefilter('ignore', FutureWarning)  # newer versions have another name for past_key_values
      start = time.perf_counter()
      token = drawn(tokens)
      middle, busy = time.perf_counter(), time.process_time()
      for _ in range(new):
        token = drawn(token)
    return middle - start, (time.perf_counter() - middle) / new, (time.process_time() - busy) / new

  return once
