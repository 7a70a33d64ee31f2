"""Seconds to compile, and programs that a run needs."""
from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, Iterable

from experiments.benchmark.sizes import Ours, Size, make_model, spread, with_short
from loopformer import plans


def compile_suite(size: Size, repeats: int, loops: Iterable[int] = (2, 8, 32),
                  layers: Iterable[int] = (1, 3, 12)) -> dict[str, list[dict]]:
  """Seconds to trace and compile the training step, over L at the reference's k and over k at its L; the published
  configuration's from cold and with a cache; and programs that a run needs."""
  sizes = {f'L={n}, k={size.layers}': dataclasses.replace(size, loops=n) for n in loops}
  sizes |= {f'L={size.loops}, k={n}': dataclasses.replace(size, layers=n) for n in layers}
  seconds, instructions = {name: [] for name in sizes}, {}
  compile_step(next(iter(sizes.values())))  # what the process compiles once is nobody's
  for _ in range(repeats):
    for name, each in sizes.items():
      start = time.perf_counter()
      compiled = compile_step(each)
      seconds[name].append(time.perf_counter() - start)
      instructions[name] = count_instructions(compiled.as_text())
  least = min(statistics.median(times) for times in seconds.values())
  rows = [{'step': name, 'compile s': statistics.median(times), 'range': spread(times),
           'of the least': statistics.median(times) / least, 'instructions': instructions[name]}
          for name, times in seconds.items()]
  return {'compile': rows, 'published': published_rows(), 'programs': programs_rows(size)}


def published_rows() -> list[dict]:
  """Seconds until the training step of the published LoopFormer can run, in processes that have compiled nothing: the
  first fills a cache of programs, the second finds it."""
  with tempfile.TemporaryDirectory() as folder:
    return [{'cache of programs': state, **_published(folder)} for state in ('empty', 'full')]


def _published(folder: str) -> dict[str, float]:
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': folder}
  done = subprocess.run([sys.executable, '-c', PUBLISHED], env=environment, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


PUBLISHED = '''
import time
start = time.perf_counter()
import functools, json
import jax
import numpy as np
from experiments.configs.loopformer import get_config
from loopformer import sharding
from loopformer.model import parameter_roles
from loopformer.training.train import init_state, make_step
imported = time.perf_counter()
config = get_config('paper')
optimizer = config.optim.make(config.train.steps, parameter_roles(config.model))
mesh = sharding.Mesh(data=1).make(jax.devices()[:1])
step = make_step(config.model, config.objective, optimizer, mesh, config.train.accumulate)
shape = (config.train.batch, config.task.length)
batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in (
    ('tokens', np.int32), ('targets', np.int32), ('weights', np.float32), ('positions', np.int32))}
lowered = step.lower(jax.eval_shape(functools.partial(init_state, config.model, optimizer, 0)), batch)
traced = time.perf_counter()
lowered.compile()
print(json.dumps({'import s': imported - start, 'trace s': traced - imported,
                  'compile s': time.perf_counter() - traced, 'in all s': time.perf_counter() - start}))
'''


def compile_step(size: Size) -> Any:
  """The step with random short trajectories, compiled afresh."""
  return Ours(size, make_model(size), with_short(size, plans.Partition(size.loops))).lower().compile()


def count_instructions(program: str) -> int:
  """Instructions of a program's text."""
  return len(re.findall(r'^\s+(?:ROOT )?%?[\w.-]+ = ', program, re.MULTILINE))


def programs_rows(size: Size, steps: int = 5) -> list[dict]:
  """Programs that `steps` training steps with short trajectories of their own need."""
  planner = plans.Partition(size.loops)
  ours = Ours(size, make_model(size), with_short(size, planner))
  ours.start()
  state, losses = ours.state, []
  for _ in range(steps):
    state, values = ours.step(state, ours.batch)
    losses.append(float(values['loss']))
  return [{'steps': steps, 'programs': ours.step._cache_size(), 'last loss': losses[-1]}]
