"""How far decoding with each memory is from the pass over all tokens, on a trained checkpoint.

    python -m experiments.studies.memories --workdir=runs/tiny

Rows of the validation split, each read as one text, are decoded token by token with all loops of the model: from the
first token, or after the first half was read in one pass. What is compared is the second half. Writes
eval/memories.{json,csv} in the work folder and prints the table (docs/memories.md says what it means).
"""
from __future__ import annotations

import functools
import sys
import time
from typing import Any

from absl import flags, logging
import jax
import jax.numpy as jnp

from experiments.main import check_command, held_out
from experiments.tools import command, costs, records
import loopformer
from loopformer import memories, plans, storage
from loopformer.training import metrics
from loopformer.types import Array, Batch, ConfigError

FLAGS = flags.FLAGS  # experiments.main defines --workdir, --step and --eval_batches
MEMORIES = (memories.PerLoop(), memories.First(), memories.Ring(size=2), memories.Ring(size=1), memories.Mean())


@functools.partial(jax.jit, static_argnums=(0, 3))
def decoded(model, params, tokens: Array, prompt: int) -> Array:
  """Logits f32[B, T - prompt, V] of tokens i32[B, T], of which the first `prompt` are read in one pass."""
  batch, length = tokens.shape
  plan, variables = plans.schedule(plans.resolve(model.loops)), {'params': params}

  def read(kv, some, start):
    pos = jnp.broadcast_to(start + jnp.arange(some.shape[1]), some.shape)
    trace = model.apply(variables, some, plan, pos, kv=kv)
    return trace.kv, trace.z

  def one(kv, place):
    kv, z = read(kv, jax.lax.dynamic_slice_in_dim(tokens, place, 1, 1), place)
    return kv, model.apply(variables, z[:, 0], method='logits')

  kv = model.cache(batch, length)
  kv = read(kv, tokens[:, :prompt], 0)[0] if prompt else kv
  return jax.lax.scan(one, kv, jnp.arange(prompt, length))[1].swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 3))
def compared(model, params, batch: Batch, prompt: int, whole: Array) -> dict[str, Any]:
  """Sums over the answers that are asked for in the second half of the rows, and the largest difference."""
  half = batch['tokens'].shape[1] // 2
  logits, whole = decoded(model, params, batch['tokens'], prompt)[:, half - prompt:], whole[:, half:]
  targets, asked = batch['targets'][:, half:], batch['weights'][:, half:] > 0
  off = jnp.abs(logits - whole) * asked[..., None]

  def nll(logits):
    return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * asked).sum()

  same = ((logits.argmax(-1) == whole.argmax(-1)) & asked).sum()
  return {'off': off.mean(-1).sum(), 'most': off.max(), 'nll': nll(logits), 'whole': nll(whole), 'same': same,
          'tokens': asked.sum()}


def measure(model, params, batches) -> list[dict]:
  """A row for every memory and way of reading the first half."""
  rows, length = [], batches[0]['tokens'].shape[1]
  for part in MEMORIES:
    own = model.clone(memory=part)
    for prompt in (0, length // 2):
      total = {}
      for batch in batches:
        whole = loopformer.logits(model, params, batch['tokens'])
        found = jax.device_get(compared(own, params, batch, prompt, whole))
        total = {name: (max if name == 'most' else float.__add__)(total.get(name, 0.0), float(value))
                 for name, value in found.items()}
      count = total['tokens']
      rows.append({'memory': str(part), 'one pass over': prompt, 'mean difference': total['off'] / count,
                   'largest': total['most'], 'NLL': total['nll'] / count,
                   'change of NLL': (total['nll'] - total['whole']) / count, 'same argmax': total['same'] / count,
                   'bytes a token': costs.cache_bytes(own, length, own.loops),
                   'tokens': int(count)})
  return rows


def main(argv):
  check_command('step', 'eval_batches')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  workdir, start = storage.path(FLAGS.workdir), time.time()
  try:
    model, params, tokenizer, config = loopformer.load(workdir, FLAGS.step)
    if tokenizer is None:
      raise ConfigError(f'workdir = {workdir}: its task has vectors as inputs, and nothing to decode')
    rows = measure(model, params, held_out(config, workdir, FLAGS.eval_batches or config.train.eval_batches))
  except ConfigError as error:
    sys.exit(f'error: {error}')
  (workdir / 'eval').mkdir(exist_ok=True)
  records.write(workdir / 'eval/memories.json', rows)
  metrics.write_csv(workdir / 'eval/memories.csv', rows)
  print(metrics.table(rows))
  print(f'{config.name}, {model.loops} loops, {jax.devices()[0].device_kind}, {time.time() - start:.1f} s')


if __name__ == '__main__':
  command.run(main)
