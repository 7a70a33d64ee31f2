"""What it is worth to draw tokens by the contrast of deep and shallow answers, on held-out text.

    python -m experiments.studies.contrast --workdir=runs/tiny --eval_batches=8 \\
        --out=experiments/reports/imported/contrast_tiny
    python -m experiments.studies.contrast --workdir=runs/smol --text=book.txt --window=256 --out=...

For every shallow answer, of no loops up to one less than the model's, and every weight: the share of tokens that the
likeliest of the contrasted law hits (`accuracy`), and the share that the plausible set keeps at all. Weight 0 is the
deep answer. Nothing is trained. Writes results.json and table.md.
"""
from __future__ import annotations

import functools

from absl import flags, logging
import jax
import jax.numpy as jnp

from experiments import main as commands
from experiments.tools import command, records
import loopformer
from loopformer import plans, storage
from loopformer.inference.sampling import Contrast
from loopformer.model import run_batch
from loopformer.training import metrics

FLAGS = flags.FLAGS
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def answers(model, params, batch, plan):
  """f32[B, T, V]."""
  trace = run_batch(model, params, batch, plan)
  return model.apply({'params': params}, trace.z, method='logits')


def shallow_plan(model, loops: int):
  """Of so many equal steps, padded to the model's loops; of none: every step is skipped."""
  plan = plans.schedule(plans.resolve(loops or 1), model.loops)
  return plan if loops else plan.replace(active=jnp.zeros(model.loops, bool))


@functools.partial(jax.jit, static_argnums=0)
def count(contrast: Contrast, deep, shallow, batch):
  """f32[3]: tokens that are hit, that are kept, and all."""
  rows = deep.shape[0] * deep.shape[1]
  flat = (logits.reshape(rows, -1) for logits in (deep, shallow))
  law = contrast.logits(*flat, jnp.full(rows, deep.shape[-1])).reshape(deep.shape)
  hit = law.argmax(-1) == batch['targets']
  kept = jnp.isfinite(jnp.take_along_axis(law, batch['targets'][..., None], -1)[..., 0])
  return jnp.stack([(batch['weights'] * value).sum() for value in (hit, kept, jnp.ones_like(hit))])


def measure(model, params, batches) -> list[dict]:
  """Rows of the table."""
  parts = [Contrast(shallow=loops, weight=weight) for loops in range(model.loops) for weight in WEIGHTS]
  totals = dict.fromkeys(parts, 0.0)
  for batch in batches:
    deep = answers(model, params, batch, shallow_plan(model, model.loops))
    for loops in range(model.loops):
      shallow = answers(model, params, batch, shallow_plan(model, loops))
      for part in parts:
        if part.shallow == loops:
          totals[part] = totals[part] + count(part, deep, shallow, batch)
  return [{'shallow loops': part.shallow, 'weight': part.weight, 'accuracy': float(hit / all_),
           'kept': float(kept / all_), 'tokens': int(all_)} for part, (hit, kept, all_) in totals.items()]


def define_flags():
  """A function, so that importing this file defines none."""
  flags.DEFINE_string('out', None, 'Folder of the results.', required=True)


def main(argv):
  commands.check_command('text', 'window', 'stride', 'eval_batches', 'step')
  logging.set_verbosity(logging.WARNING)
  workdir, out = storage.path(FLAGS.workdir), storage.path(FLAGS.out)
  model, params, tokenizer, config = loopformer.load(workdir, FLAGS.step)
  (name, batches), *_ = commands.examples(model, params, tokenizer, config, workdir)[0].items()
  rows = measure(model, params, batches())
  out.mkdir(parents=True, exist_ok=True)
  records.write(out / 'results.json', {'workdir': workdir.name, 'text': name, 'rows': rows})
  storage.write(out / 'table.md', metrics.table(rows) + '\n')
  print(metrics.table(rows))


if __name__ == '__main__':
  define_flags()
  command.run(main)
