"""PonderNet: a gate that is held to a geometric law (Banino, Balaguer, Blundell, arXiv 2107.05407).

    python -m experiments.main --config=experiments/configs/pondernet.py:pointers --workdir=runs/pondernet

The model is that of ouro.py: a norm and a gate at the end of every loop. The loss is the expected cross-entropy over
the exit step, and beta times KL(p || geometric law), where Ouro has the entropy.

Argument: size, one of ouro.py's, then any of

    rate     lambda_p of the geometric law, whose mean is near 1 / rate
    beta     of the divergence; 0.01
    loops    the size's own by default

Departures: a gate a token, where the paper's experiments have one a sequence, and a transformer where they have
recurrent cells. Measured figures: experiments/reports/adaptive_compute/.
"""
import dataclasses

from experiments.configs import ouro
from loopformer.config import Experiment, arguments
from loopformer.objective import Objective, Weighted
from loopformer.terms.expected import Expected
from loopformer.terms.ponder import Geometric


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `pointers,rate=0.4`."""
  given = arguments(argument, size='pointers', rate=0.4, beta=0.01, loops=int)
  base = ouro.get_config(given['size'] if given['loops'] is None else f'{given["size"]},loops={given["loops"]}')
  return dataclasses.replace(
      base, name='pondernet',
      objective=Objective(rolls=base.objective.rolls,
                          terms={'lm': Weighted(1.0, Expected(roll='all', beta=0.0)),
                                 'prior': Weighted(given['beta'], Geometric(roll='all', rate=given['rate']))}))
