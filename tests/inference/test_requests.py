"""The battery of requests: what is answered, and in how many steps, depends on nothing that shares the batch."""
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import memories, plans
from loopformer.cells.halting import Halting
from loopformer.inference import exits
from loopformer.inference.engine import Engine, generate
from loopformer.inference.sampling import SamplingParams, sampling_logits
from loopformer.papers.mor.cell import ExpertChoice, Routed
from loopformer.papers.mor.memory import Compact
from tests import parts
from tests.inference.test_generate import TOKENIZER
from tests.parts import ROWS, UNEVEN, L, V, batch, params

# Requests of all kinds: lengths, schedules, ways of drawing; two have the same words.
REQUESTS = [dict(prompt='abc'), dict(prompt='hello there', seed=4), dict(prompt='abc', temperature=0.9, seed=5),
            dict(prompt='', budget=2, temperature=1.3, top_k=7), dict(prompt='x = 1', budget=UNEVEN, max_new_tokens=3),
            dict(prompt='q', budget=1, top_p=0.8, temperature=1.0)]
ORDERS = [(0, 1, 2, 3, 4, 5), (5, 3, 1, 4, 2, 0), (2, 0)]

NONE = parts.Head(outputs=V, norm=parts.Identity())
GATED = parts.looped(Halting(parts.plain(1)), read_out=NONE)
ROUTED = parts.looped(Routed(parts.stack(1), ExpertChoice(capacities=(1.0, 0.75, 0.5, 0.25))),
                      memory=Compact(share=(1.0, 0.75, 0.5, 0.5)))
RULES = {'kl': exits.KL(threshold=0.2), 'entropy_change': exits.EntropyChange(threshold=0.1),
         'entropy': exits.Entropy(threshold=3.3), 'state': exits.StateChange(threshold=0.4),
         'stable': exits.Stable(threshold=2), 'cumulative': exits.Cumulative(threshold=0.8), 'sampled': exits.Sampled(),
         'confident': exits.Confident(threshold=0.6), 'act': exits.ACT(threshold=0.2)}


def one_layer(row):
  model = ROWS[row].model
  return model.clone(cell=model.cell.clone(core=model.cell.core.clone(depth=1)))


def leaving(name, fill=exits.Copy(), kept=memories.PerLoop()):
  return GATED.clone(memory=kept), exits.Adaptive(rule=RULES[name], fill=fill)


# Every rule, every memory, and the cells that decode in ways of their own. Models are few: they share programs.
CASES = {
    **{name: leaving(name) for name in ('sampled', 'cumulative', 'confident', 'act', 'entropy_change', 'state')},
    'kl, first': leaving('kl', kept=memories.First()), 'entropy, mean': leaving('entropy', kept=memories.Mean()),
    'stable, ring': leaving('stable', kept=memories.Ring(size=2)),
    'sampled, recomputed': leaving('sampled', exits.Recompute()),
    'routed, compact': (ROUTED, None), 'shifted': (one_layer('plt'), None), 'latent': (one_layer('melt'), None),
}


def test_the_table_names_all_rules_and_memories():
  def of(module, method):
    return {part for _, part in inspect.getmembers(module, dataclasses.is_dataclass) if hasattr(part, method)}

  assert of(exits, 'update') == {type(exit_policy.rule) for _, exit_policy in CASES.values() if exit_policy}
  assert of(memories, 'exchange') <= {type(model.memory) for model, _ in CASES.values()}


def serve(engine, order):
  """Texts of the requests by their numbers, and what they cost together: tokens, passes, steps of rows."""
  before = engine._stats.copy()
  for i in order:
    engine.submit(**{'max_new_tokens': 8, 'temperature': 0.0, 'budget': L, **REQUESTS[i]})
  return dict(zip(order, engine.run())), (engine._stats - before)[:3]


@pytest.mark.parametrize('name', list(CASES))
def test_a_request_is_answered_alike_alone_and_among_others(name):
  model, exit_policy = CASES[name]
  engine = Engine(model, params(model), TOKENIZER, rows=3, length=32, max_steps=4, exit=exit_policy)
  alone = [serve(engine, (i,)) for i in range(len(REQUESTS))]
  for order in ORDERS:  # others before and after it, in other rows, with more padding
    texts, cost = serve(engine, order)
    assert texts == {i: alone[i][0][i] for i in order}
    np.testing.assert_array_equal(cost, sum(alone[i][1] for i in order))
  if exit_policy:
    tokens, passes, steps = alone[0][1]
    assert passes < steps < L * passes, 'the threshold must part the tokens, or this tests nothing'


def test_the_same_prompt_alone_and_in_a_list():
  """With a rule that draws."""
  exit_policy = CASES['sampled'][1]

  def last(*prompts):
    return generate(GATED, params(GATED), TOKENIZER, prompts, exit=exit_policy, rows=4, max_new_tokens=16,
                    temperature=0.0)[-1]

  assert last('x = 1') == last('q', 'hello there', '', 'x = 1')


@pytest.mark.parametrize('exit_policy', [exits.Final(), exits.Confidence(), CASES['sampled'][1]],
                         ids=['final', 'confidence', 'sampled'])
def test_sequences_of_an_evaluation_may_come_in_any_order_and_number(exit_policy):
  """Their numbers, `row`, go with them."""
  run = jax.jit(lambda batch: exit_policy.run(GATED, params(GATED), batch, plans.Uniform(L)(None), None)[0])
  whole = {**batch(5), 'row': jnp.arange(5)}
  order = np.array([3, 0, 3, 4])
  some, every = run(jax.tree.map(lambda leaf: leaf[order], whole)), run(whole)
  np.testing.assert_array_equal(some.steps, every.steps[order])
  parts.close(some.z, every.z[order], 1e-5)


def test_no_token_is_cut_because_a_neighbour_cuts():
  """Sums of probabilities round to more than one before the last tokens of a long tail."""
  logits = jnp.concatenate([jnp.zeros(2 ** 14), jnp.full(2 ** 14, -30.0)])[None].repeat(2, 0)
  control = SamplingParams(temperature=jnp.ones(2), top_k=jnp.full(2, logits.shape[1]), top_p=jnp.array([1.0, 0.5]),
                           vocab=jnp.full(2, logits.shape[1]))
  alone = sampling_logits(logits[:1], jax.tree.map(lambda leaf: leaf[:1], control))
  np.testing.assert_array_equal(sampling_logits(logits, control)[0], alone[0])
  assert np.isinf(sampling_logits(logits, control)[1]).any()
