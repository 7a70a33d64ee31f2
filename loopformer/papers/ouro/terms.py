"""What teaches the gate of Ouro (section 3): what a step gained."""
from __future__ import annotations

from typing import Any, Mapping

from flax import errors
import jax
import jax.numpy as jnp

from loopformer.cells.halting import GATE, halt_logits
from loopformer.terms.cross_entropy import token_nll
from loopformer.terms.expected import whole
from loopformer.terms.term import Term
from loopformer.types import Array, Batch, ConfigError, Params, Readout, Trace, config_dataclass, shown


@config_dataclass
class Retrospective:
  """lambda_t is taught by what step t has just brought, as the paper prints it; lambda_1 learns nothing, and lambda_K,
  which p ignores, does."""

  def taught(self, halt: Array) -> Array:
    """The logits [K, ...] of those that learn, [K - 1, ...]."""
    return halt[1:]


@config_dataclass
class Prospective:
  """lambda_t is taught by what step t + 1 would bring, which is what a token that may leave has to know."""

  def taught(self, halt: Array) -> Array:
    """The logits [K, ...] of those that learn, [K - 1, ...]."""
    return halt[:-1]


@config_dataclass
class Improvement(Term):
  """The gate learns whether a step pays, the model nothing: Ouro's stage II (section 3).

  Of the gain I_t = max(0, CE_(t-1) - CE_t) of steps t = 2..K, w_t = sigmoid(slope (I_t - least)) says whether to go on;
  the loss is -sum_t [w_t log(1 - lambda) + (1 - w_t) log lambda] / K, a mean over tokens by their weights.

  States and losses get no gradient, nor does any parameter but those of the gate, `params['cell']['gate']`.

  alignment: which lambda is taught by which gain. gate: the cell's; ConfigError where it has another.
  """
  roll: str
  alignment: Retrospective | Prospective = Retrospective()
  slope: float = 50.0
  least: float = 0.005
  gate: Any = GATE
  chunk: int | None = None

  def check(self, model: Any):
    """Raises ConfigError where the gate is not that of model.cell: one within another cell, as in Damped(Halting(..)),
    reads states that are not those that steps give, of which this term teaches it."""
    gate = getattr(model.cell, 'gate', None)
    if gate is None:
      raise ConfigError(f'objective: Improvement teaches the gate of model.cell, and {type(model.cell).__name__} has '
                        'none: its states are those that steps give; put Halting around all other cells')
    if gate != self.gate:
      raise ConfigError(f'objective: Improvement.gate = {shown(self.gate)}, and model.cell.gate = {shown(gate)}: give '
                        "the term the cell's gate")

  def __call__(self, rolls: Mapping[str, Trace], batch: Batch, readout: Readout, params: Params) -> Array:
    trace = whole(rolls, self.roll)
    assert trace.xs is not None
    xs_KBTD = jax.lax.stop_gradient(trace.xs)
    targets_KBT = jnp.broadcast_to(batch['targets'], xs_KBTD.shape[:-1])
    ce_KBT = token_nll(readout.read(xs_KBTD), readout.table, targets_KBT, self.chunk, readout.dtype)
    goes_on = jax.nn.sigmoid(self.slope * (jnp.maximum(ce_KBT[:-1] - ce_KBT[1:], 0) - self.least))
    gate = self.gate.clone(parent=None).bind({'params': params['cell'].get('gate', {})})
    try:
      halt = self.alignment.taught(halt_logits(gate, xs_KBTD))
    except errors.FlaxError as error:
      raise ConfigError(f'objective: Improvement.gate = {type(self.gate).__name__}: the cell\'s gate has other '
                        'parameters; give the term the gate that stands in model.cell') from error
    loss = -goes_on * jax.nn.log_sigmoid(-halt) - (1 - goes_on) * jax.nn.log_sigmoid(halt)
    return jnp.sum(loss * batch['weights']) / len(xs_KBTD)
