"""Looped transformers for length generalisation (Fan et al., ICLR 2025, 2409.15647).

    python -m experiments.main --config=experiments/configs/length_generalization.py:cpu,task=parity --workdir=runs/p

Argument: size, then any of

    size    cpu      the sheet's measured experiment: parity to 12 bits, copy to 7, a few minutes
            paper    as published
    task    parity, copy, addition, sum, multiplication, unique
    loops   given    as many as the example asks for (the oracle); fixed: always as many as the longest asks for
    inject  1: the input is added in every loop; 0: the state starts from it

Evaluation: `oracle` takes the loops that an example asks for, `confident` those after which it is surest, up to 20 more
than the longest asks for; longer inputs are tests of their own. Departure: the rate falls over the whole run.
Measured figures: experiments/reports/length_generalization/.
"""
import dataclasses

from loopformer import loop, plans
from loopformer.cells.recur import Recur
from loopformer.config import Experiment, arguments, choose
from loopformer.inference import exits
from loopformer.inference.evaluate import Named, Run
from loopformer.model import Looped
from loopformer.nn.blocks import gpt2
from loopformer.nn.embed import Head, Tokens
from loopformer.nn.inject import Add, NoInjection
from loopformer.nn.layers import Identity, LayerNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.starts import Embedded, Zeros
from loopformer.tasks import algorithms
from loopformer.tasks.generated import Generated, Grow, Rise
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train

TASKS = {'parity': algorithms.Parity, 'copy': algorithms.Copy, 'addition': algorithms.Addition,
         'sum': algorithms.BinarySum, 'multiplication': algorithms.Multiplication, 'unique': algorithms.UniqueSet}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """Layers of the block, heads, longest training input, steps before it grows by one, longer inputs to test on."""
  layers: int
  heads: int
  longest: int
  interval: int
  tests: tuple[int, ...]


PAPER = {'parity': Setting(layers=1, heads=64, longest=20, interval=500, tests=(30, 40, 50)),
         'copy': Setting(layers=2, heads=8, longest=19, interval=1000, tests=(25, 30)),
         'addition': Setting(layers=3, heads=8, longest=19, interval=1600, tests=(25, 30)),
         'sum': Setting(layers=2, heads=16, longest=19, interval=500, tests=(22, 24)),
         'multiplication': Setting(layers=4, heads=8, longest=11, interval=500, tests=(13, 15)),
         'unique': Setting(layers=3, heads=8, longest=19, interval=1000, tests=(25, 30))}
CPU = {'parity': Setting(layers=1, heads=16, longest=12, interval=40, tests=(14, 18, 24)),
       'copy': Setting(layers=1, heads=4, longest=7, interval=60, tests=(9, 10, 14)),
       'addition': Setting(layers=2, heads=4, longest=6, interval=60, tests=(8, 10)),
       'sum': Setting(layers=2, heads=8, longest=10, interval=40, tests=(12, 14)),
       'multiplication': Setting(layers=2, heads=4, longest=5, interval=80, tests=(6, 7)),
       'unique': Setting(layers=2, heads=4, longest=8, interval=50, tests=(10, 12))}


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `cpu,task=copy`."""
  given = arguments(argument, size='cpu', task='parity', loops='given', inject=True)
  small = choose('size', given['size'], {'cpu': True, 'paper': False})
  make = choose('task', given['task'], TASKS)
  setting = (CPU if small else PAPER)[given['task']]
  rooms = max(setting.tests)
  of = make(shortest=1, longest=setting.longest, room=setting.longest)
  narrow = {'first': (2,)} if given['task'] == 'multiplication' else {}  # the paper tests with two bits
  tests = {str(n): make(shortest=n, longest=n, room=n, **narrow) for n in setting.tests}
  asked = 2 if given['task'] == 'multiplication' else 1  # loops a symbol
  most, far = asked * setting.longest, asked * rooms
  plan = choose('loops', given['loops'], {'given': plans.Given(most=most), 'fixed': plans.Uniform(most)})
  width = 64 if small else 256
  vocab = len(of.symbols)
  core = Stack(gpt2(setting.heads, 4 * width, 0.02 / (2 * setting.layers) ** 0.5), setting.layers)
  train = (Train(steps=1200, batch=64, log_every=50, eval_every=300, eval_batches=8, save_every=600) if small else
           Train(steps=100_000, batch=64, log_every=500, eval_every=5000, save_every=5000))
  return Experiment(
      name=f'{given["task"]} {given["loops"]}' + ('' if given['inject'] else ' without injection'),
      model=Looped(read_in=Tokens(vocab=vocab, width=width, length=make(shortest=1, longest=rooms, room=rooms).length,
                                  std=(3 * vocab) ** -0.5),  # as the paper's Linear of one-hot tokens starts
                   cell=Recur(core, Add() if given['inject'] else NoInjection(), norm=LayerNorm()),
                   start=Zeros() if given['inject'] else Embedded(),
                   read_out=Head(outputs=vocab, norm=Identity()), loops=most, remat=loop.PerLayer()),
      objective=Objective(rolls={'given': Rollout(plan)}, terms={'answer': Weighted(1.0, CE(roll='given'))}),
      task=Generated(of=of, tests=tests, held_out=512,
                     grow=Grow(fields={'longest': Rise(first=1, every=setting.interval * train.batch)})),
      train=train,
      optim=AdamW(schedule=WarmupCosine(peak=1e-3 if small else 1e-4, end=0.0, warmup=100), b2=0.999, decay=0.01),
      evals=Named(budgets=(most,), runs={
          'oracle': Run(plan=plans.Given(most=far)),
          'confident': Run(plan=plans.Uniform(far + 20), exit=exits.Confidence())}))
