"""Exports the model of a work folder for Hugging Face's transformers, and compares the two.

    python -m experiments.tools.export --workdir=runs/tiny --out=exports/tiny --check
    python -m experiments.tools.export --workdir=runs/tiny --out=exports/tiny --dtype=bfloat16 --loops=4
    python -m experiments.tools.export --workdir=runs/large --out=exports/large --set mesh.fsdp=8
"""
import importlib.util
from pathlib import Path
import sys
from typing import Any

from absl import flags, logging
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.tools import command, machines
import loopformer
from loopformer import config as configs, convert, plans, storage
from loopformer.convert.export import MODELING, without_updates
from loopformer.training import processes
from loopformer.types import ConfigError

FLAGS = flags.FLAGS
TOLERANCE = 1e-4  # of logits in float32


def define_flags():
  flags.DEFINE_string('workdir', None, 'Folder of the run.', required=True)
  flags.DEFINE_string('out', None, 'Folder to write: a new one, or an earlier export.', required=True)
  flags.DEFINE_integer('step', None, 'Which checkpoint; the last by default.', lower_bound=0)
  flags.DEFINE_multi_string('set', [], 'mesh.data, mesh.fsdp or mesh.tensor = a number: the devices that hold the '
                                       'weights meanwhile; may be repeated.')
  machines.define_flags()
  flags.DEFINE_integer('loops', None, "Steps of the loop in the export; the model's own by default.",
                       lower_bound=1)
  flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'Of the tensors.')
  flags.DEFINE_bool('check', False, f'Load the export again and compare logits; status 1 where they differ by more '
                                    f'than {TOLERANCE:g}.')


def largest_difference(model: Any, params: Any, folder: Path, dtype: str) -> tuple[float, str]:
  """(largest difference of logits in float32, through what the export was loaded): transformers, where it is installed.

  Compared is what was written: of a bfloat16 export, the source with its parameters rounded to that.
  """
  model = in_float32(model)
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf).astype(dtype).astype(jnp.float32), params)
  tokens = np.random.default_rng(0).integers(0, model.read_in.vocab, (2, min(32, model.read_in.length)))
  budgets = {model.loops} if _is_decoder(folder) else {1, model.loops}
  if importlib.util.find_spec('transformers') and importlib.util.find_spec('torch'):
    other, name = _by_transformers(folder), 'transformers'
  else:
    other, name = _by_ourselves(folder), 'loopformer'
  ours = {budget: processes.fetch(loopformer.logits(model, params, tokens, steps=budget)) for budget in budgets}
  return max(np.abs(logits - other(tokens, budget)).max() for budget, logits in ours.items()), name


def _is_decoder(folder):
  return not (folder / MODELING).exists()


def in_float32(module: nn.Module) -> nn.Module:
  """The same model, whose products run in float32."""

  def one(name, value):
    if isinstance(value, nn.Module):
      return in_float32(value)
    return 'float32' if name == 'dtype' else value

  return module.clone(**{name: one(name, value) for name, value in configs.fields(module).items()})


def _by_transformers(folder):
  import torch
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
  decoder = _is_decoder(folder)

  def logits(tokens, budget):
    with torch.no_grad():
      return model(torch.tensor(tokens), **({} if decoder else {'steps': budget})).logits.numpy()

  return logits


def _by_ourselves(folder):
  model, params, _ = convert.from_pretrained(folder)
  model, decoder = in_float32(model), _is_decoder(folder)
  return lambda tokens, budget: np.asarray(loopformer.logits(model, params, tokens, steps=1 if decoder else budget))


def run(workdir: Path, out: Path):
  """Exports, prints what was written and, if asked, how far it is from the source."""
  if FLAGS.loops is not None:
    plans.count('--loops', FLAGS.loops)
  machines.check_set(FLAGS.set, 'an export')
  machines.connect()
  model, params, tokenizer, _ = loopformer.load(workdir, FLAGS.step, machines.mesh_of(configs.read(workdir), FLAGS.set))
  model, params = without_updates(model if FLAGS.loops is None else model.clone(loops=FLAGS.loops), params)
  done = convert.export(model, params, tokenizer, out, dtype=FLAGS.dtype)
  kind = f'as {done.model_type}' + (f' (no decoder of transformers: {done.reason})' if done.reason else '')
  if processes.is_leader():
    print(f'written to {out} {kind}, {FLAGS.dtype}; {"with" if done.tokenizer else "without"} tokenizer.json')
  if FLAGS.check:
    difference, through = largest_difference(model, params, storage.fetched(out), FLAGS.dtype)
    if not processes.is_leader():
      return
    print(f'largest difference of logits: {difference:.2e}, loaded through {through}', flush=True)
    if not difference <= TOLERANCE:
      sys.exit(f'error: it is more than {TOLERANCE:g}')


def main(argv):
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a restore otherwise
  try:
    with configs.trusting(FLAGS.trust):
      run(storage.path(FLAGS.workdir), storage.path(FLAGS.out))
  except (ConfigError, ValueError, OSError) as error:
    processes.leave(error, f'error: {error}')


if __name__ == '__main__':
  define_flags()
  command.run(main)
