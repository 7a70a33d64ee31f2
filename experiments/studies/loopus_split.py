"""Where a decoder may be cut for LoopUS: how far each of its layers turns the state, and what the rule proposes.

    python -m experiments.studies.loopus_split --workdir=runs/base --text=README.md --out=runs/base/split

Reads the first --tokens of a text, in rows of 256 (or as many as the model has positions), and prints a table; with
--out it is written there too, as table.md, with profile.png. The rule and its source:
loopformer/papers/loopus/split.py.
"""
from __future__ import annotations

from absl import flags, logging
import numpy as np

from experiments.main import check_command
from experiments.tools import command, plots
import loopformer
from loopformer import reading, storage
from loopformer.data.tokenizer import prompt_ids
from loopformer.papers.loopus.split import profile, split
from loopformer.training import metrics
from loopformer.types import ConfigError

FLAGS = flags.FLAGS


def rows_of(ids: list[int], length: int) -> dict[str, np.ndarray]:
  """A batch of whole rows of a text's tokens; of one row if it is shorter."""
  length = min(length, len(ids))
  tokens = np.array(ids[:len(ids) // length * length], np.int32).reshape(-1, length)
  return {'tokens': tokens, 'weights': np.ones(tokens.shape, np.float32)}


def draw(path, turned: np.ndarray, prelude: int, coda: int):
  """A bar a layer, those outside the loop in another colour."""
  pyplot = plots.library()
  if pyplot is None:
    return
  figure, axes = pyplot.subplots(figsize=(8, 3.5), layout='constrained')
  inside = (np.arange(len(turned)) >= prelude) & (np.arange(len(turned)) < len(turned) - coda)
  for where, label in ((~inside, 'prelude and coda'), (inside, 'loop')):
    axes.bar(np.flatnonzero(where), turned[where], label=label)
  axes.set_yscale('log')
  axes.set_xlabel('layer')
  axes.set_ylabel('1 - cos(before, after)')
  axes.legend()
  plots.save(figure, path, 150)


def define_flags():
  """A function, so that importing this file defines none; experiments.main defines --workdir and --text."""
  flags.DEFINE_integer('tokens', 2048, 'How many tokens of it.', lower_bound=2)
  flags.DEFINE_string('out', None, 'Folder of table.md and profile.png.')


def main(argv):
  check_command('text')
  logging.set_verbosity(logging.WARNING)  # Orbax tells every step of every restore otherwise
  if FLAGS.text is None:
    raise ConfigError('--text is missing: name a text file, whose first tokens are looked at')
  model, params, tokenizer, _ = loopformer.load(storage.path(FLAGS.workdir))
  if tokenizer is None:
    raise ConfigError(f'--workdir={FLAGS.workdir}: no tokenizer came with its model, which a text needs')
  ids = prompt_ids(tokenizer, reading.text(storage.path(FLAGS.text), 'give a text file'))[:FLAGS.tokens]
  if len(ids) < 2:
    raise ConfigError(f'--text={FLAGS.text}: it has {len(ids)} tokens; give a longer text')
  turned = profile(model, params, rows_of(ids, min(256, model.read_in.length)))
  prelude, coda = split(turned)
  depth = len(turned)
  table = metrics.table([{'layer': layer, '1 - cos': f'{value:.4f}',
                          'section': 'prelude' if layer < prelude else 'coda' if layer >= depth - coda else 'loop'}
                         for layer, value in enumerate(turned)])
  print(table)
  print(f'\nproposed: encoder=0..{prelude - 1},decoder={depth - coda}..{depth - 1}')
  if FLAGS.out is not None:
    out = storage.path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    storage.write(out / 'table.md', table + '\n')
    draw(out / 'profile.png', turned, prelude, coda)


if __name__ == '__main__':
  define_flags()
  command.run(main)
