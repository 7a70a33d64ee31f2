"""What launch/quickstart.sh trains: LoopFormer on text, and on a reasoning task where loops are worth more.

    python -m experiments.main --config=experiments/configs/quickstart.py:text --workdir=runs/tiny

Argument:

    text      loopformer.py:tiny, in fewer steps: minutes on two CPU cores
    pointers  loopformer.py:pointers, in fewer steps: the same
"""
import dataclasses

from experiments.configs import loopformer
from loopformer.config import Experiment, arguments, choose

RUNS = {'text': ('tiny', 500), 'pointers': ('pointers', 2500)}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument, text or pointers."""
  run = arguments(argument, run='text')['run']
  size, steps = choose('run', run, RUNS)
  config = loopformer.get_config(size)
  return dataclasses.replace(config, name=f'quickstart {run}', train=dataclasses.replace(config.train, steps=steps))
