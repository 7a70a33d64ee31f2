"""loopformer: looped transformers, whose depth is a dial turned at run time.

    import loopformer
    model, params, tokenizer, config = loopformer.load('runs/tiny')
    texts = loopformer.generate(model, params, tokenizer, ['def main('], budget=4)

Importing parses no flags and touches no device; what is offered here is loaded when it is first used.
"""
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from loopformer import convert as convert
  from loopformer.api import Insight, Loaded, generate, init_params, load, logits, run_batch, trace

__version__ = '0.1.0'
__all__ = ['Insight', 'Loaded', 'convert', 'generate', 'init_params', 'load', 'logits', 'run_batch', 'trace']


def __getattr__(name: str) -> Any:
  if name == 'convert':
    return importlib.import_module('loopformer.convert')
  if name in __all__:
    return getattr(importlib.import_module('loopformer.api'), name)
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *__all__])
