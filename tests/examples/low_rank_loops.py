"""A shared block that differs from loop to loop by an update of low rank (relaxed recursive transformers, in a loop).

    python -m experiments.main --config=tests/examples/low_rank_loops.py --workdir=runs/low_rank
"""
from loopformer import plans
from loopformer.cells.plain import Plain
from loopformer.config import Experiment, arguments
from loopformer.inference.evaluate import Depths
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.layers import MLP
from loopformer.nn.low_rank import LowRank
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.terms.cross_entropy import CE
from loopformer.training.train import Train


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `rank=4`."""
  given = arguments(argument, rank=2, loops=3)
  task = Generated(of=PHop(length=16), held_out=64)
  linear = LowRank(rank=given['rank'], loops=given['loops'])
  block = Block(attn=SelfAttention(heads=2, linear=linear), mlp=MLP(hidden=64, linear=linear))
  model = Looped(read_in=TokenEmbed(vocab=len(task.of.symbols), width=32, length=task.length),
                 cell=Plain(Stack(block, 1)), loops=given['loops'])
  return Experiment(
      name='low rank', model=model, task=task, evals=Depths(budgets=(1, given['loops'])),
      objective=Objective(rolls={'all': Rollout(plans.Uniform(given['loops']))},
                          terms={'lm': Weighted(1.0, CE(roll='all'))}),
      train=Train(steps=40, batch=16, eval_every=40, save_every=40, eval_batches=1),
      optim=AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=4)))
