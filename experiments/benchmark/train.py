"""Seconds of a training step, ours and others'."""
from __future__ import annotations

from concurrent import futures
import functools
import statistics
import sys
import time
from typing import Any, Callable, Iterable

import jax

from experiments.benchmark.plain import PlainStep
from experiments.benchmark.sizes import (
  MEGA,
  OPTIM,
  REMATS,
  Ours,
  Size,
  long_alone,
  make_batch,
  make_model,
  make_plain,
  short_of,
  spread,
  take_turns,
  with_short,
)
from loopformer.model import Looped, init_params
from loopformer.nn.kernels import Blockwise, Fused
from loopformer.training import metrics

PEER, COMPILED = 'PyTorch, eager', 'PyTorch, compiled'


class Theirs:
  """The same step in PyTorch, from the parameters that ours starts from; `wrap` may compile its model."""

  def __init__(self, size: Size, model: Looped, wrap: Callable[[Any], Any] = lambda module: module):
    import torch

    from experiments.benchmark import peer
    device = 'cuda' if jax.default_backend() == 'gpu' and torch.cuda.is_available() else 'cpu'
    params = jax.jit(functools.partial(init_params, model))(jax.random.fold_in(jax.random.key(0), 0))
    self._peer, self._model = peer, peer.from_params(model, params).to(device)
    self._optimizer = peer.make_optimizer(self._model, OPTIM.schedule.peak, OPTIM.decay)
    self._model = wrap(self._model)
    batch = make_batch(size)
    self._batch = [torch.tensor(batch[name], dtype=torch.long, device=device) for name in ('tokens', 'targets')]
    self._halves = size.dtype == 'bfloat16'
    short = short_of(size)
    self._plans = (1.0 / size.loops,) * size.loops, (1.0 / short.count,) * short.count

  def __call__(self) -> float:
    """One step; its loss."""
    return self._peer.train_step(self._model, self._optimizer, *self._batch, *self._plans, OPTIM.clip,
                                 self._halves)


def by_inductor(module: Any) -> Any:
  """A module that PyTorch compiles at its first call."""
  import torch
  return torch.compile(module)


def train_suite(size: Size, repeats: int, peer: str | None, kernels: Iterable[Any] | None = None,
                remats: Iterable[Any] = REMATS) -> dict[str, list[dict]]:
  """Seconds a step of LoopFormer's two rollouts.

  kernels: the backend's by default, and elsewhere than on a CPU blocks without a kernel. The first loss of every row
  shows which compute the same. On a machine that others use, processor seconds and the least seconds say more than
  medians.
  """
  if kernels is None:
    kernels = (Fused(),) if jax.default_backend() == 'cpu' else (Fused(), Blockwise(size=128))
  kernels, remats = list(kernels), list(remats)
  ways = [(kernels[0], remat) for remat in remats] + [(kernel, remats[0]) for kernel in kernels[1:]]
  steps = {f'{type(remat).__name__}, {kernel_name(size, kernel)}':
           Ours(size, make_model(size, remat, kernel), with_short(size, short_of(size))) for kernel, remat in ways}
  default = next(iter(steps.values()))
  others = {PEER: functools.partial(Theirs, size, default.model)} if peer == 'torch' else {}
  if others and jax.default_backend() == 'gpu':  # beside which ours is compared, as the last
    others[COMPILED] = functools.partial(Theirs, size, default.model, by_inductor)
  return {'train': race(size, repeats, steps, default, others)}


def plain_suite(size: Size, repeats: int) -> dict[str, list[dict]]:
  """Seconds of a step of one pass of as many layers, looped and not, with plain JAX beside ours."""
  distinct = size.layers * size.loops
  looped, deep = (make_plain(size, layers, distinct // layers) for layers in (size.layers, distinct))
  one_pass = {
      f'plain JAX, {distinct} layers': PlainStep(size, deep, 1),
      f'plain JAX, {size.layers} layers {size.loops} times': PlainStep(size, looped, size.loops),
      f'ours, {distinct} layers': Ours(size, deep, long_alone(1)),
      f'ours, {size.layers} layers {size.loops} times': (ours := Ours(size, looped, long_alone(size.loops)))}
  return {'one pass': race(size, repeats, one_pass, ours, {})}


def kernel_name(size: Size, kernel: Any) -> str:
  """What attends: of `Fused`, that of the backend."""
  if isinstance(kernel, Fused):
    kernel = kernel.on(jax.default_backend(), jax.numpy.dtype(size.dtype), size.length, size.width // size.heads)
  return type(kernel).__name__


def start_all(steps: dict[str, Any]) -> dict[str, Any]:
  """Compiles and starts all steps, at the same time where a CPU is not what is measured; the compiled ones, None where
  XLA finds no memory."""
  lowered, begun = {name: step.lower() for name, step in steps.items()}, time.time()

  def start(name):
    program = fitting(lowered[name].compile)
    if program:
      steps[name].start(program)
    print(f'{name}: {"ready" if program else "does not fit"} after {time.time() - begun:.0f} s', file=sys.stderr)
    return program

  with futures.ThreadPoolExecutor(1 if jax.default_backend() == 'cpu' else 8) as pool:
    return dict(zip(lowered, pool.map(start, lowered)))


def fitting(function: Callable[..., Any], *arguments) -> Any:
  """What it returns; None where the device's memory does not suffice."""
  try:
    return function(*arguments)
  except RuntimeError as error:
    if 'out of memory' not in str(error).lower().replace('resource_exhausted', 'out of memory'):
      raise
    return None


def race(size: Size, repeats: int, steps: dict[str, Any], model_of: Ours,
         others: dict[str, Callable[[], Any]]) -> list[dict]:
  """A row for each of `steps` and of the `others`, which are made last; beside the last of these, or the first step.
  What the device has no memory for takes no part.

  model_of: the step whose arithmetic is that of all.
  """
  programs = start_all(steps)
  memory = {name: program.memory_analysis().temp_size_in_bytes / MEGA for name, program in programs.items() if program}
  contestants = {name: step for name, step in steps.items() if programs[name]}
  contestants |= {name: make() for name, make in others.items()}
  losses = {name: fitting(contestant) for name, contestant in contestants.items()}
  contestants = {name: contestant for name, contestant in contestants.items() if losses[name] is not None}
  seconds, work = take_turns(contestants, repeats)
  peak = peak_of(size)
  flops = model_of.objective.flops(model_of.model, size.length) * size.tokens
  beside = next((name for name in reversed(others) if name in contestants), next(iter(contestants)))
  rows = []
  for name, times in seconds.items():
    median = statistics.median(times)
    ratios = [their / our for their, our in zip(seconds[beside], times)]
    rows.append({'step': name, 's/step': median, 'range': spread(times),
                 'processor s': statistics.median(work[name]), 'tokens/s': round(size.tokens / median),
                 'GFLOP': flops / 1e9, '% of peak': 100 * flops / median / peak, 'temp MB': memory.get(name, ''),
                 'first loss': losses[name], f'times as fast as {beside}': statistics.median(ratios),
                 'range of that': spread(ratios), 'by least seconds': min(seconds[beside]) / min(times)})
  return rows + [{**dict.fromkeys(rows[0], ''), 'step': f'{name}: out of memory'} for name in (*steps, *others)
                 if name not in contestants]


def peak_of(size: Size) -> float:
  """FLOP/s of a large matrix product here, in the size's dtype."""
  return metrics.measured_peak(1024 if jax.default_backend() == 'cpu' else 8192, dtype=size.dtype)
