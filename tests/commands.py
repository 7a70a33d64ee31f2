"""Commands of one process, the one after the other: started once, it joins the other processes at the first.

    python -m tests.commands --workdir=FOLDER [--coordinator=...] '[["experiments.main", "--mode=eval"], ...]'

What command n prints goes to FOLDER/said-PROCESS-n.txt.
"""
import contextlib
import importlib
import json
from pathlib import Path
import sys
from unittest import mock

from absl import flags
import jax

from loopformer.training import processes


def flags_of_commands() -> set[str]:
  """Names of the flags that scripts have defined; several define some of the same names."""
  return {flag.name for module, defined in flags.FLAGS.flags_by_module_dict().items()
          if module.startswith('experiments.') for flag in defined}


def main(commands: list[list[str]], common: list[str]):
  options = dict(word.removeprefix('--').split('=', 1) for word in common)
  connect = processes.connect

  def once(*arguments):
    if not jax.distributed.is_initialized():
      connect(*arguments)

  with mock.patch.object(processes, 'connect', once):
    for n, (name, *arguments) in enumerate(commands):
      for flag in flags_of_commands():
        delattr(flags.FLAGS, flag)
      sys.modules.pop(name, None)
      command = importlib.import_module(name)
      if 'define_flags' in vars(command):  # which defines its own where it is the program
        command.define_flags()
      flags.FLAGS([name, *common, *arguments])
      with (Path(options['workdir']) / f'said-{options.get("process", 0)}-{n}.txt').open('w') as file:
        with contextlib.redirect_stdout(file):
          command.main([name])


if __name__ == '__main__':
  main(json.loads(sys.argv[-1]), sys.argv[1:-1])
