"""What is learned of masked diffusion."""
from __future__ import annotations

from typing import Mapping

from loopformer.terms.cross_entropy import nll_sum
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass


@config_dataclass
class NELBO(Term):
  """The bound on the negative log-likelihood, nats a token that may be hidden: the weighted cross-entropy of hidden
  tokens at the end of the rollout `roll`, divided by the number of all that could have been (MDLM, section 3; LLaDA).

  It reads what `noise.Masking` prepares.
  """
  roll: str
  chunk: int | None = None

  def weight(self, batch: Batch) -> Array:
    if 'maskable' not in batch:
      raise ConfigError('objective.prepare hides no tokens, so that NELBO has nothing to ask for; set it to '
                        'diffusion.noise.Masking')
    return batch['maskable'].sum()

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    return nll_sum(rolls[self.roll].z, readout.table, batch['targets'], batch['weights'], self.chunk, readout.dtype)
