"""SHIFT: train with one pass first, loop later (Gong et al., 2510.10089).

    python -m experiments.main --config=experiments/configs/shift.py:p_hop --workdir=runs/shift

Argument: task (p_hop, text), then any of

    loops    L of the last stage
    first    step from which the next evaluation ends the first stage at the latest; 0: looped from the start; -1: half
             of the run
    steps    of the run
    patience evaluations in a row that must show a plateau; a large number leaves the switch to `first`

The criterion of the switch is our reading of the paper's names (sheet, section 3). The learning rate's schedule counts
the steps of the whole run; parameters and moments are kept at the switch. A run that is resumed keeps its stage.
Measured figures: experiments/reports/shift/.
"""
import dataclasses

from experiments.configs import latent_thoughts, loopformer
from loopformer import plans
from loopformer.config import Experiment, arguments, choose
from loopformer.control import Plateau
from loopformer.evaluate import Depths
from loopformer.objective import Objective, Roll, Weighted
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `p_hop,loops=3,first=200`."""
  given = arguments(argument, task='p_hop', loops=3, first=-1, steps=1000, patience=3)
  loops, steps = given['loops'], given['steps']
  base = choose('task', given['task'], {
      'p_hop': lambda: latent_thoughts.get_config(f'p_hop,layers=1,loops={loops}'),
      'text': lambda: loopformer.get_config(f'tiny,kind=base_loop,loops={loops}')})()
  if given['first'] > steps:
    raise ConfigError(f'config argument first = {given["first"]}: the stage would end after the last step, {steps}')
  first = steps // 2 if given['first'] < 0 else given['first']
  stages = (1, loops)
  return dataclasses.replace(
      base, name=f'shift {given["task"]}',
      objective=Objective(rolls={'staged': Roll(plans.Staged(loops=stages))},
                          terms={'lm': Weighted(1.0, CE(roll='staged'))}),
      control=Plateau(loops=stages, patience=given['patience'], longest=first),
      train=dataclasses.replace(base.train, steps=steps, eval_every=50, eval_batches=8, save_every=250),
      evals=Depths(budgets=stages))
