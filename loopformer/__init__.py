"""loopformer: looped transformers, whose depth is a dial turned at run time.

    import loopformer
    model, params, tokenizer, config = loopformer.load('runs/tiny')
    texts = loopformer.generate(model, params, tokenizer, ['def main('], budget=4)

Importing parses no flags and touches no device; what is offered here is loaded when it is first used.
"""
import importlib

__version__ = '0.1.0'
_API = ('Insight', 'Loaded', 'generate', 'init_params', 'load', 'logits', 'run_batch', 'trace')
__all__ = [*_API, 'convert']


def __getattr__(name: str):
  if name in _API:
    return getattr(importlib.import_module('loopformer.api'), name)
  if name == 'convert':
    return importlib.import_module('loopformer.convert')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__():
  return sorted([*globals(), *__all__])
