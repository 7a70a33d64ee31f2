"""Adaptive computation time (Graves, arXiv 1603.08983) in the loop of Universal Transformers (arXiv 1807.03819).

    python -m experiments.main --config=experiments/configs/act.py:pointers --workdir=runs/act

The model is that of ouro.py: a norm and a gate at the end of every loop. A token leaves when its summed gates reach
1 - epsilon, and its answer is the mean of its states by their gates; the loss is the cross-entropy of that answer, and
tau times the ponder cost N + R (loopformer/terms/ponder.py).

Argument: size, one of ouro.py's, then any of

    tau      of the ponder cost; 0.01
    epsilon  0.01
    loops    the size's own by default

Budgets are evaluated as in any looped model, by the last state; what was trained is the mean: `--mode=eval
--exits=act:0.01`. Departures: the gate reads the state after a step and starts at a half, where Universal Transformers'
code reads the state before and starts at a bias of one; steps are not numbered. Measured figures:
experiments/reports/adaptive_compute/.
"""
import dataclasses

from experiments.configs import ouro
from loopformer import plans
from loopformer.config import Experiment, arguments
from loopformer.inference.evaluate import Named, Run
from loopformer.inference.exits import ACT, Adaptive
from loopformer.objective import Objective, Weighted
from loopformer.terms.ponder import Averaged, Ponder


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `pointers,tau=0.001`."""
  given = arguments(argument, size='pointers', tau=0.01, epsilon=0.01, loops=int)
  epsilon = given['epsilon']
  base = ouro.get_config(given['size'] if given['loops'] is None else f'{given["size"]},loops={given["loops"]}')
  trained = Run(plan=plans.Uniform(base.model.loops), exit=Adaptive(rule=ACT(threshold=epsilon)))
  return dataclasses.replace(
      base, name='act',
      objective=Objective(rolls=base.objective.rolls,
                          terms={'lm': Weighted(1.0, Averaged(roll='all', threshold=epsilon)),
                                 'ponder': Weighted(given['tau'], Ponder(roll='all', threshold=epsilon))}),
      evals=Named(runs={'act': trained}, budgets=base.evals.budgets))
