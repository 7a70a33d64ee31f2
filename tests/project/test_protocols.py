"""What the library says of a socket is what its parts have: every Protocol of types.py against the parts that fill it.
"""
import inspect
import re
from typing import Protocol

from flax import linen as nn
import pytest

from loopformer import loop, memories, objective, optim, plans, starts, types
from loopformer.cells import damped, halting, plain, recur, timed
from loopformer.diffusion.cell import ToldHidden
from loopformer.diffusion.measures import Bound
from loopformer.diffusion.noise import Masking
from loopformer.diffusion.sampler import Denoising
from loopformer.diffusion.terms import NELBO
from loopformer.inference import evaluate, exits, measures, sampler
from loopformer.nn import attention, blocks, embed, inject, kernels, layers, low_rank, positions
from loopformer.papers.ccdd.blocks import TwoStreams
from loopformer.papers.ccdd.cell import Doubled, Summed
from loopformer.papers.ccdd.measures import JointBound
from loopformer.papers.ccdd.plans import WithLatents
from loopformer.papers.ccdd.prepare import Joint
from loopformer.papers.ccdd.sampler import Coevolving
from loopformer.papers.ccdd.terms import LatentError
from loopformer.papers.cot.cell import Thinking
from loopformer.papers.linear_icl.attention import LabelHead, LinearAttention, Prompt
from loopformer.papers.loopus.cell import Selective
from loopformer.papers.loopus.terms import Supervision
from loopformer.papers.melt.attention import LatentAttention
from loopformer.papers.melt.cell import Gated, Latest
from loopformer.papers.melt.plans import Apart, Transition
from loopformer.papers.melt.teacher import OwnWithAttention, WithAttention
from loopformer.papers.melt.terms import Aligned
from loopformer.papers.mor.cell import Routed
from loopformer.papers.mor.memory import Compact
from loopformer.papers.mor.routing import AsTrained, LossFree
from loopformer.papers.mor.terms import Balance, RouterBCE
from loopformer.papers.ouro.terms import Improvement
from loopformer.papers.padded.attention import AveragingHard
from loopformer.papers.plt.attention import GatedBlock
from loopformer.papers.plt.cell import Shifted
from loopformer.papers.plt.streams import Streams
from loopformer.papers.relay.cell import Showing
from loopformer.papers.relay.plans import RoundByRound
from loopformer.papers.relay.terms import RoundCE
from loopformer.tasks.generated import Generated
from loopformer.tasks.imported import Imported
from loopformer.tasks.instructions import Instructions
from loopformer.tasks.mixture import Mixture
from loopformer.tasks.recorded import Recorded
from loopformer.tasks.text import Text
from loopformer.terms import cross_entropy, distill, expected, match, ponder, squared
from loopformer.training import control, frozen
from loopformer.training.averages import Averaged
from loopformer.training.masters import Masters

PARTS = {
    types.Planner: [plans.Uniform, plans.Partition, plans.RandomDepth, plans.Truncated, plans.Given, plans.Staged,
                    plans.RandomSupervision, plans.LogDepth, Transition, Apart, RoundByRound, WithLatents],
    types.Cell: [plain.Plain, plain.Normed, timed.Timed, recur.Recur, halting.Halting, damped.Damped, Selective, Routed,
                 Shifted, Gated, Showing, Thinking, ToldHidden, Summed, Doubled, WithAttention],
    types.Teacher: [objective.Own, objective.Lent, OwnWithAttention],
    types.Memory: [memories.PerLoop, memories.First, memories.Ring, memories.Mean, Streams, Compact, Latest],
    types.Term: [cross_entropy.CE, match.ShortcutConsistency, squared.MSE, expected.Expected, Improvement,
                 ponder.Ponder, Supervision,
                 distill.Distill, Aligned, RouterBCE, Balance, RoundCE, NELBO, LatentError],
    types.Preparation: [objective.AsGiven, Masking, Joint],
    types.Task: [Text, Generated, Imported, Instructions, Mixture, Recorded],
    types.Block: [blocks.Block, blocks.Chain, GatedBlock, TwoStreams,
                  LinearAttention],
    types.Attention: [attention.SelfAttention, LatentAttention],
    types.Projection: [layers.Dense, low_rank.LowRank],
    types.Kernel: [kernels.Blockwise, kernels.Fused, kernels.Cudnn, kernels.Splash, kernels.Bidirectional,
                   AveragingHard],
    types.Position: [positions.Rotary, positions.Alibi],
    types.ReadIn: [embed.TokenEmbed, embed.Tokens, embed.Vectors, Prompt],
    types.ReadOut: [embed.TiedHead, embed.TwiceNormedHead, embed.Head, LabelHead],
    types.Start: [starts.Embedded, starts.Zeros, starts.Noise],
    types.Injection: [inject.NoInjection, inject.Add, inject.Concat, inject.Diagonal],
    types.Remat: [loop.KeepAll, loop.PerStep, loop.PerLayer, loop.Products, loop.Offload],
    types.Sampler: [sampler.Autoregressive, sampler.Contrasted, Denoising, Coevolving],
    types.Exit: [exits.Final, exits.Confidence, exits.Adaptive, AsTrained],
    types.Rule: [exits.KL, exits.Entropy, exits.EntropyChange, exits.StateChange, exits.Stable, exits.Cumulative,
                 exits.Sampled, exits.Confident, exits.ACT],
    types.Optimiser: [optim.AdamW, optim.AtanAdam, optim.Muon, optim.Switched, frozen.Freeze, frozen.ParamGroups,
                      Averaged, Masters,
                      LossFree],
    types.Evaluations: [evaluate.Depths, evaluate.Named],
    types.Control: [control.NoControl, control.Plateau],
    types.Measure: [measures.Tokens, measures.Answers, measures.Errors, Bound, JointBound],
}
CASES = [(socket, part) for socket, parts in PARTS.items() for part in parts]


def test_every_socket_has_parts():
  protocols = {value for value in vars(types).values() if inspect.isclass(value) and Protocol in value.__bases__}
  assert protocols == set(PARTS)


@pytest.mark.parametrize('socket, part', CASES, ids=lambda value: value.__name__)
def test_a_part_has_what_its_socket_asks_for(socket, part):
  fields = {field for cls in part.__mro__ for field in cls.__dict__.get('__annotations__', {})}
  for name in socket.__annotations__:
    assert name in fields or hasattr(part, name), name
  for name, member in vars(socket).items():
    if isinstance(member, property):
      assert name in fields or hasattr(part, name), name
    elif inspect.isfunction(member) and (name == '__call__' or not name.startswith('_')):
      own = getattr(part, name)
      wanted, given = (list(inspect.signature(f).parameters.values())[inspect.isfunction(f):] for f in (member, own))
      assert len(given) >= len(wanted) or any(p.kind is p.VAR_POSITIONAL for p in given), name
      extra = given[len(wanted):]
      assert all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in extra), name


def test_parts_are_described_whole():
  """Of every module and part of a socket a docstring, and one of what calls it."""
  for _, part in CASES:
    # which Python writes itself
    assert part.__doc__ and not re.match(rf'{part.__name__}\((\w+:|\*)', part.__doc__), part
    assert issubclass(part, nn.Module) or part.__dataclass_params__.frozen, part


def test_evaluations_and_objectives_name_their_sockets():
  assert evaluate.Run.__dataclass_fields__['plan'].type == 'Planner'
  assert objective.Rollout.__dataclass_fields__['plan'].type == 'Planner'
