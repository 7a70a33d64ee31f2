"""Old names: parts as the config.json of older work folders, and configuration files copied beside it, call them."""
from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any, Callable, Iterator

MODULES = {  # where each module of the first layout went, but for data.py, which held no parts
    'loopformer.attention': 'loopformer.nn.kernels',
    'loopformer.averages': 'loopformer.training.averages',
    'loopformer.bidirectional': 'loopformer.nn.kernels',
    'loopformer.blocks': 'loopformer.nn.blocks',
    'loopformer.cells.linear': 'loopformer.papers.linear_icl.attention',
    'loopformer.cells.melt': 'loopformer.papers.melt.cell',
    'loopformer.cells.routed': 'loopformer.papers.mor.cell',
    'loopformer.cells.shifted': 'loopformer.papers.plt.cell',
    'loopformer.checked': 'loopformer.data.checked',
    'loopformer.checkpoint': 'loopformer.training.checkpoint',
    'loopformer.compact': 'loopformer.papers.mor.memory',
    'loopformer.condition': 'loopformer.nn.condition',
    'loopformer.control': 'loopformer.training.control',
    'loopformer.corpus': 'loopformer.data.corpus',
    'loopformer.embed': 'loopformer.nn.embed',
    'loopformer.evaluate': 'loopformer.inference.evaluate',
    'loopformer.exits': 'loopformer.inference.exits',
    'loopformer.flat': 'loopformer.inference.flat',
    'loopformer.frozen': 'loopformer.training.frozen',
    'loopformer.gated_attention': 'loopformer.papers.plt.attention',
    'loopformer.generation': 'loopformer.inference.engine',
    'loopformer.harness': 'loopformer.inference.harness',
    'loopformer.inject': 'loopformer.nn.inject',
    'loopformer.low_rank': 'loopformer.nn.low_rank',
    'loopformer.measures': 'loopformer.inference.measures',
    'loopformer.memory': 'loopformer.memories',
    'loopformer.metrics': 'loopformer.training.metrics',
    'loopformer.modules': 'loopformer.nn.modules',
    'loopformer.normed_attention': 'loopformer.nn.attention',
    'loopformer.peri_normed': 'loopformer.nn.blocks',
    'loopformer.positions': 'loopformer.nn.positions',
    'loopformer.prepared': 'loopformer.data.prepared',
    'loopformer.processes': 'loopformer.training.processes',
    'loopformer.routing': 'loopformer.papers.mor.routing',
    'loopformer.streams': 'loopformer.papers.plt.streams',
    'loopformer.terms.cosine': 'loopformer.papers.latent_thoughts.cosine',
    'loopformer.terms.router': 'loopformer.papers.mor.terms',
    'loopformer.tokenizer': 'loopformer.data.tokenizer',
    'loopformer.train': 'loopformer.training.train',
}
NAMES = {  # and what went elsewhere than the rest of its module, or is called otherwise
    'loopformer.blocks:DTYPES': 'loopformer.nn.layers:DTYPES',
    'loopformer.blocks:Dense': 'loopformer.nn.layers:Dense',
    'loopformer.blocks:EPSILON': 'loopformer.nn.layers:EPSILON',
    'loopformer.blocks:GatedMLP': 'loopformer.nn.layers:GatedMLP',
    'loopformer.blocks:Halves': 'loopformer.nn.layers:Halves',
    'loopformer.blocks:Identity': 'loopformer.nn.layers:Identity',
    'loopformer.blocks:LayerNorm': 'loopformer.nn.layers:LayerNorm',
    'loopformer.blocks:Linear': 'loopformer.nn.layers:Linear',
    'loopformer.blocks:MLP': 'loopformer.nn.layers:MLP',
    'loopformer.blocks:Normal': 'loopformer.nn.layers:Normal',
    'loopformer.blocks:Orthogonal': 'loopformer.nn.layers:Orthogonal',
    'loopformer.blocks:RMSNorm': 'loopformer.nn.layers:RMSNorm',
    'loopformer.blocks:SelfAttention': 'loopformer.nn.attention:SelfAttention',
    'loopformer.blocks:Stack': 'loopformer.nn.stack:Stack',
    'loopformer.blocks:UniformWithin': 'loopformer.nn.layers:UniformWithin',
    'loopformer.blocks:UnitNorm': 'loopformer.nn.layers:UnitNorm',
    'loopformer.blocks:ValueEmbed': 'loopformer.nn.attention:ValueEmbed',
    'loopformer.blocks:attended': 'loopformer.nn.attention:attended',
    'loopformer.blocks:attention_flops': 'loopformer.nn.attention:attention_flops',
    'loopformer.blocks:by_heads': 'loopformer.nn.layers:by_heads',
    'loopformer.blocks:check_attention': 'loopformer.nn.attention:check_attention',
    'loopformer.blocks:check_heads': 'loopformer.nn.attention:check_heads',
    'loopformer.blocks:dense': 'loopformer.nn.layers:dense',
    'loopformer.blocks:dense_heads': 'loopformer.nn.layers:dense_heads',
    'loopformer.blocks:gelu': 'loopformer.nn.layers:gelu',
    'loopformer.blocks:gelu_tanh': 'loopformer.nn.layers:gelu_tanh',
    'loopformer.blocks:heads_of': 'loopformer.nn.attention:heads_of',
    'loopformer.blocks:layer_of': 'loopformer.nn.stack:layer_of',
    'loopformer.blocks:qkv': 'loopformer.nn.attention:qkv',
    'loopformer.blocks:repeated': 'loopformer.nn.stack:repeated',
    'loopformer.blocks:squared_relu': 'loopformer.nn.layers:squared_relu',
    'loopformer.blocks:turned': 'loopformer.nn.layers:transposed',
    'loopformer.blocks:unfused': 'loopformer.nn.layers:unfused',
    'loopformer.blocks:unfused_kernel': 'loopformer.nn.layers:unfused_kernel',
    'loopformer.blocks:unrolls': 'loopformer.nn.stack:unrolls',
    'loopformer.cells.melt:Apart': 'loopformer.papers.melt.plans:Apart',
    'loopformer.cells.melt:BLEND': 'loopformer.papers.melt.plans:BLEND',
    'loopformer.cells.melt:Constant': 'loopformer.papers.melt.attention:Constant',
    'loopformer.cells.melt:Elementwise': 'loopformer.papers.melt.attention:Elementwise',
    'loopformer.cells.melt:Filled': 'loopformer.papers.melt.attention:Filled',
    'loopformer.cells.melt:Flight': 'loopformer.papers.melt.attention:Flight',
    'loopformer.cells.melt:LatentAttention': 'loopformer.papers.melt.attention:LatentAttention',
    'loopformer.cells.melt:Matrix': 'loopformer.papers.melt.attention:Matrix',
    'loopformer.cells.melt:Mean': 'loopformer.papers.melt.attention:Mean',
    'loopformer.cells.melt:Past': 'loopformer.papers.melt.attention:Past',
    'loopformer.cells.melt:Scalar': 'loopformer.papers.melt.attention:Scalar',
    'loopformer.cells.melt:Transition': 'loopformer.papers.melt.plans:Transition',
    'loopformer.cells.melt:blended': 'loopformer.papers.melt.attention:blended',
    'loopformer.control:Steady': 'loopformer.training.control:NoControl',
    'loopformer.data:Joined': 'loopformer.data.batches:Joined',
    'loopformer.data:Separate': 'loopformer.data.batches:Separate',
    'loopformer.frozen:Grouped': 'loopformer.training.frozen:ParamGroups',
    'loopformer.frozen:Only': 'loopformer.training.frozen:Freeze',
    'loopformer.inject:Hold': 'loopformer.nn.inject:NoInjection',
    'loopformer.objective:Roll': 'loopformer.objective:Rollout',
    'loopformer.optim:Trapezoid': 'loopformer.optim:WSD',
    'loopformer.plans:Each': 'loopformer.plans:PerSequence',
    'loopformer.plans:Together': 'loopformer.plans:Shared',
    'loopformer.terms.distill:Aligned': 'loopformer.papers.melt.terms:Aligned',
    'loopformer.terms.expected:Improvement': 'loopformer.papers.ouro.terms:Improvement',
    'loopformer.terms.expected:Prospective': 'loopformer.papers.ouro.terms:Prospective',
    'loopformer.terms.expected:Retrospective': 'loopformer.papers.ouro.terms:Retrospective',
    'loopformer.terms.match:Match': 'loopformer.terms.match:ShortcutConsistency',
    'loopformer.terms.squared:Squared': 'loopformer.terms.squared:MSE',
    'loopformer.train:State': 'loopformer.training.step:State',
    'loopformer.train:init_state': 'loopformer.training.step:init_state',
    'loopformer.types:Ctx': 'loopformer.types:Context',
    'loopformer.types:Draw': 'loopformer.types:PlanContext',
    'loopformer.types:Seen': 'loopformer.types:StepView',
    'loopformer.types:part': 'loopformer.types:config_dataclass',
    'loopformer.types:Tick': 'loopformer.types:Step',
}


def name_of(name: str) -> str:
  """The name, module:qualname, that a part of this name has now."""
  module, _, qualname = name.partition(':')
  outer, dot, inner = qualname.partition('.')
  return NAMES.get(f'{module}:{outer}', f'{MODULES.get(module, module)}:{outer}') + dot + inner


def find(name: str) -> Any:
  """What a name, module:qualname, stands for now: a class, a function, or what makes a part from its old fields."""
  if name in FACTORIES:
    return FACTORIES[name]
  module, _, qualname = name_of(name).partition(':')
  found = importlib.import_module(module)
  for attribute in qualname.split('.'):
    found = getattr(found, attribute)
  return found


def _halting(**fields: Any) -> Any:
  """Halting had a stack and a norm of its own, before it stood around a cell."""
  from loopformer.cells.halting import Halting
  from loopformer.cells.plain import Normed
  if 'core' in fields:
    fields['of'] = Normed(fields.pop('core'), fields.pop('norm'))
  return Halting(**fields)


def _placed(placement: str) -> Callable:
  """Where norms stand in a layer was a class of layers, with a norm of its own by default."""
  def layer(**fields):
    from loopformer.nn import blocks, layers
    return blocks.Block(**{'norm': layers.RMSNorm(1e-6), **fields}, placement=getattr(blocks, placement)())

  return layer


def _rollout(**fields: Any) -> Any:
  """A rollout called the folder of its teacher `weights`."""
  from loopformer.objective import Rollout
  return Rollout(**{'weights_of' if name == 'weights' else name: value for name, value in fields.items()})


def _normed_attention(**fields: Any) -> Any:
  """So were norms of queries and of keys one of attentions."""
  from loopformer.nn.attention import SelfAttention
  from loopformer.nn.layers import RMSNorm
  from loopformer.nn.positions import Rotary
  return SelfAttention(**{'norm': RMSNorm(1e-6), 'position': Rotary(), **fields})


FACTORIES: dict[str, Callable] = {
    'loopformer.cells.halting:Halting': _halting,
    'loopformer.blocks:Sandwich': _placed('SandwichNorm'),
    'loopformer.peri_normed:PeriNormed': _placed('PeriNorm'),
    'loopformer.objective:Roll': _rollout,
    'loopformer.normed_attention:NormedAttention': _normed_attention,
}


class _Old(types.ModuleType):
  """A module that is gone: what is asked of it is looked up where it is now."""

  def __getattr__(self, name):
    if name.startswith('__'):
      raise AttributeError(name)
    return find(f'{self.__name__}:{name}')


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):

  def find_spec(self, name, path, target=None):
    return importlib.machinery.ModuleSpec(name, self) if name in MODULES else None

  def create_module(self, spec):
    return _Old(spec.name)

  def exec_module(self, module):
    pass


@contextlib.contextmanager
def importable() -> Iterator[None]:
  """Inside it modules and names can be imported as they were, for files that were copied into a work folder long
  ago."""
  finder, before = _Finder(), set(sys.modules)
  aliases = [(importlib.import_module(module), name, find(f'{module}:{name}'))
             for module, _, name in (old.partition(':') for old in NAMES) if module not in MODULES]
  sys.meta_path.insert(0, finder)
  for module, name, now in aliases:
    setattr(module, name, now)
  try:
    yield
  finally:
    sys.meta_path.remove(finder)
    for module, name, _ in aliases:
      delattr(module, name)
    for name in MODULES.keys() & (sys.modules.keys() - before):
      parent, _, own = name.rpartition('.')
      if isinstance(sys.modules[name], _Old):
        del sys.modules[name]
        vars(importlib.import_module(parent)).pop(own, None)
