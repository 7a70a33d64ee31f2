"""SHIFT: train with one pass first, loop later (Gong et al., 2510.10089).

    python -m experiments.main --config=experiments/configs/shift.py:p_hop --workdir=runs/shift

Argument: task (p_hop, markov, text), then any of

    loops    L of the last stage
    first    step from which the next evaluation ends the first stage at the latest; 0: looped from the start; -1: half
             of the run
    steps    of the run
    patience evaluations in a row that must show a plateau; a large number leaves the switch to `first`
    moments  of the optimiser at the switch: kept, reset
    rewarm   steps after the switch in which the learning rate climbs back from a tenth; 0: none

`markov` is the paper's synthetic language, with tests on its simple and complex thirds; its Bayes score, which no model
can exceed, is printed first. The criterion of the switch is our reading of the paper's names (sheet, section 3). The
learning rate's schedule counts the steps of the whole run; parameters are kept at the switch. A run that is resumed
keeps its stage.
Measured figures: experiments/reports/shift/.
"""
import dataclasses

from experiments.configs import latent_thoughts, loopformer
from loopformer import plans
from loopformer.config import Experiment, arguments, choose
from loopformer.inference.evaluate import Depths
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import Kept, Reset, Switched
from loopformer.terms.cross_entropy import CE
from loopformer.training.control import Plateau
from loopformer.types import ConfigError


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `p_hop,loops=3,first=200`."""
  given = arguments(argument, task='p_hop', loops=3, first=-1, steps=1000, patience=3, moments='kept', rewarm=0)
  loops, steps = given['loops'], given['steps']
  base = choose('task', given['task'], {
      'p_hop': lambda: latent_thoughts.get_config(f'p_hop,layers=1,loops={loops}'),
      'markov': lambda: latent_thoughts.get_config(f'markov,layers=1,loops={loops}'),
      'text': lambda: loopformer.get_config(f'tiny,kind=base_loop,loops={loops}')})()
  if given['first'] < -1:
    raise ConfigError(f'config argument first = {given["first"]}: give a step, or -1 for half of the run')
  if given['first'] > steps:
    raise ConfigError(f'config argument first = {given["first"]}: the stage would end after the last step, {steps}')
  first = steps // 2 if given['first'] < 0 else given['first']
  stages = (1, loops)
  moments = choose('moments', given['moments'], {'kept': Kept(), 'reset': Reset()})
  unchanged = moments == Kept() and not given['rewarm']
  return dataclasses.replace(
      base, name=f'shift {given["task"]}',
      objective=Objective(rolls={'staged': Rollout(plans.Staged(loops=stages))},
                          terms={'lm': Weighted(1.0, CE(roll='staged'))}),
      optim=base.optim if unchanged else Switched(of=base.optim, moments=moments, rewarm=given['rewarm']),
      control=Plateau(loops=stages, patience=given['patience'], longest=first),
      train=dataclasses.replace(base.train, steps=steps, eval_every=50, eval_batches=8, save_every=250),
      evals=Depths(budgets=stages))
