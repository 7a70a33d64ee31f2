"""Samplers: how a model makes texts. Frozen parts; a model names its own."""
from __future__ import annotations

from typing import Any

from loopformer.inference.sampling import Contrast
from loopformer.types import Params, config_dataclass


@config_dataclass
class Autoregressive:
  """Token by token, each from those before it, through a cache (engine.py)."""
  denoises = False

  def serve(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """An `Engine`; options as there."""
    from loopformer.inference.engine import Engine  # which needs the model, which names its sampler
    return Engine(model, params, tokenizer, **options)

  def score(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """A `harness.Scorer`; options as there."""
    from loopformer.inference.harness import Scorer
    return Scorer(model, params, tokenizer, **options)


@config_dataclass
class Contrasted:
  """Token by token, each by what all loops answer and fewer do not: decoding that uses depth without training."""
  contrast: Contrast = Contrast()
  denoises = False

  def serve(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """As Autoregressive.serve."""
    from loopformer.inference.engine import Engine
    return Engine(model, params, tokenizer, contrast=self.contrast, **options)

  def score(self, model: Any, params: Params, tokenizer: Any, **options: Any) -> Any:
    """As Autoregressive.score: likelihoods are those of all loops."""
    from loopformer.inference.harness import Scorer
    return Scorer(model, params, tokenizer, **options)
