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
APART = {  # and what went elsewhere than the rest of its module
    'loopformer.data:Separate': 'loopformer.data.batches',
    'loopformer.data:Joined': 'loopformer.data.batches',
    'loopformer.blocks:DTYPES': 'loopformer.nn.layers',
    'loopformer.blocks:EPSILON': 'loopformer.nn.layers',
    'loopformer.blocks:Normal': 'loopformer.nn.layers',
    'loopformer.blocks:UniformWithin': 'loopformer.nn.layers',
    'loopformer.blocks:Orthogonal': 'loopformer.nn.layers',
    'loopformer.blocks:dense': 'loopformer.nn.layers',
    'loopformer.blocks:turned': 'loopformer.nn.layers',
    'loopformer.blocks:dense_heads': 'loopformer.nn.layers',
    'loopformer.blocks:gelu': 'loopformer.nn.layers',
    'loopformer.blocks:squared_relu': 'loopformer.nn.layers',
    'loopformer.blocks:gelu_tanh': 'loopformer.nn.layers',
    'loopformer.blocks:Identity': 'loopformer.nn.layers',
    'loopformer.blocks:UnitNorm': 'loopformer.nn.layers',
    'loopformer.blocks:RMSNorm': 'loopformer.nn.layers',
    'loopformer.blocks:LayerNorm': 'loopformer.nn.layers',
    'loopformer.blocks:Dense': 'loopformer.nn.layers',
    'loopformer.blocks:Linear': 'loopformer.nn.layers',
    'loopformer.blocks:MLP': 'loopformer.nn.layers',
    'loopformer.blocks:GatedMLP': 'loopformer.nn.layers',
    'loopformer.blocks:Halves': 'loopformer.nn.layers',
    'loopformer.blocks:unfused': 'loopformer.nn.layers',
    'loopformer.blocks:by_heads': 'loopformer.nn.layers',
    'loopformer.blocks:unfused_kernel': 'loopformer.nn.layers',
    'loopformer.blocks:qkv': 'loopformer.nn.attention',
    'loopformer.blocks:ValueEmbed': 'loopformer.nn.attention',
    'loopformer.blocks:SelfAttention': 'loopformer.nn.attention',
    'loopformer.blocks:check_heads': 'loopformer.nn.attention',
    'loopformer.blocks:heads_of': 'loopformer.nn.attention',
    'loopformer.blocks:check_attention': 'loopformer.nn.attention',
    'loopformer.blocks:attended': 'loopformer.nn.attention',
    'loopformer.blocks:attention_flops': 'loopformer.nn.attention',
    'loopformer.blocks:unrolls': 'loopformer.nn.stack',
    'loopformer.blocks:layer_of': 'loopformer.nn.stack',
    'loopformer.blocks:Stack': 'loopformer.nn.stack',
    'loopformer.blocks:repeated': 'loopformer.nn.stack',
    'loopformer.cells.melt:Elementwise': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Scalar': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Mean': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Constant': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:LatentAttention': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Flight': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Past': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:blended': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Filled': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Matrix': 'loopformer.papers.melt.attention',
    'loopformer.cells.melt:Transition': 'loopformer.papers.melt.plans',
    'loopformer.cells.melt:Apart': 'loopformer.papers.melt.plans',
    'loopformer.cells.melt:BLEND': 'loopformer.papers.melt.plans',
    'loopformer.generation:BLOCK': 'loopformer.inference.sampling',
    'loopformer.generation:Controls': 'loopformer.inference.sampling',
    'loopformer.generation:controls': 'loopformer.inference.sampling',
    'loopformer.generation:law': 'loopformer.inference.sampling',
    'loopformer.generation:draw': 'loopformer.inference.sampling',
    'loopformer.generation:judge': 'loopformer.inference.sampling',
    'loopformer.terms.distill:Aligned': 'loopformer.papers.melt.terms',
    'loopformer.terms.expected:Improvement': 'loopformer.papers.ouro.terms',
    'loopformer.terms.expected:Retrospective': 'loopformer.papers.ouro.terms',
    'loopformer.terms.expected:Prospective': 'loopformer.papers.ouro.terms',
    'loopformer.train:State': 'loopformer.training.step',
    'loopformer.train:init_state': 'loopformer.training.step',
    'loopformer.train:make_step': 'loopformer.training.step',
}


def name_of(name: str) -> str:
  """The name, module:qualname, that a part of this name has now."""
  module, _, qualname = name.partition(':')
  outer = qualname.partition('.')[0]
  return f'{APART.get(f"{module}:{outer}") or MODULES.get(module, module)}:{qualname}'


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
  """Where norms stand in a layer was a class of layers."""
  def layer(**fields):
    from loopformer.nn import blocks
    return blocks.Block(**fields, placement=getattr(blocks, placement)())

  return layer


def _normed_attention(**fields: Any) -> Any:
  """So were norms of queries and of keys one of attentions."""
  from loopformer.nn.attention import SelfAttention
  return SelfAttention(**fields)


FACTORIES: dict[str, Callable] = {
    'loopformer.cells.halting:Halting': _halting,
    'loopformer.blocks:Sandwich': _placed('SandwichNorm'),
    'loopformer.peri_normed:PeriNormed': _placed('PeriNorm'),
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
  """Inside it modules can be imported under their old names, for files that were copied into a work folder long ago."""
  finder, before = _Finder(), set(sys.modules)
  sys.meta_path.insert(0, finder)
  try:
    yield
  finally:
    sys.meta_path.remove(finder)
    for name in MODULES.keys() & (sys.modules.keys() - before):
      parent, _, own = name.rpartition('.')
      if isinstance(sys.modules[name], _Old):
        del sys.modules[name]
        vars(importlib.import_module(parent)).pop(own, None)
