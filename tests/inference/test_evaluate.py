"""Measures and exits against what they should be, computed in NumPy."""
import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import loop, plans
from loopformer.inference import exits, measures
from loopformer.inference.evaluate import Depths, Named, Run, evaluate, motion
from loopformer.model import make_readout
from loopformer.types import ConfigError, Readout
from tests import parts
from tests.parts import ROWS, T, over, params

MODEL = ROWS['base_loop'].model


def batch(rows: int = 5):
  made = dict(parts.batch(rows))
  made['weights'] = made['weights'].at[0].set(0.0).at[0, 2].set(1.0)
  return made


def test_answers_count_tokens_sequences_and_last_answers():
  made = batch()
  readout = make_readout(MODEL, params(MODEL), made)
  z = over(MODEL, params(MODEL), made, plans.Uniform(2)(None)).z
  best = np.asarray(z @ readout.table.T).argmax(-1)
  made['targets'] = jnp.where(jnp.arange(T) % 3 == 0, made['targets'], best).at[1].set(best[1])  # some are right
  measure = measures.Answers()
  sums = measure.sums(readout, z, made, None)
  asked, right = np.asarray(made['weights']) > 0, best == np.asarray(made['targets'])
  row = measure.row({name: float(value) for name, value in sums.items()})
  assert row['accuracy'] == pytest.approx(right[asked].mean())
  assert row['exact'] == pytest.approx(np.mean([right[i][asked[i]].all() for i in range(5)]))
  assert row['last'] == pytest.approx(np.mean([right[i][np.flatnonzero(asked[i])[-1]] for i in range(5)]))
  assert 0 < row['exact'] < 1 and row['tokens'] == asked.sum()


def test_tokens_that_are_no_text_have_no_bytes():
  z, table = jax.random.normal(jax.random.key(0), (5, T, 4)), jax.random.normal(jax.random.key(1), (parts.V, 4))
  measure = measures.Tokens()
  without, of_one = (measure.sums(Readout(table=table, read=None), z, batch(), lengths)
                     for lengths in (None, np.ones(parts.V, np.int32)))
  rows = [measure.row({name: float(value) for name, value in sums.items()}) for sums in (without, of_one)]
  assert np.isnan(rows[0]['bits_per_byte']) and rows[1]['bits_per_byte'] == pytest.approx(rows[1]['loss'] / np.log(2))
  assert all(rows[0][name] == rows[1][name] for name in ('loss', 'perplexity', 'tokens'))


def test_errors_are_squared_and_in_units_of_the_scale():
  z, table = jax.random.normal(jax.random.key(0), (3, T, 4)), jax.random.normal(jax.random.key(1), (1, 4))
  made = {**batch(3), 'targets': jax.random.normal(jax.random.key(2), (3, T))}
  measure = measures.Errors(scale=2.0)
  sums = measure.sums(Readout(table=table, read=None), z, made, None)
  error = np.square(np.asarray(z @ table[0]) - np.asarray(made['targets']))
  row = measure.row({name: float(value) for name, value in sums.items()})
  asked = np.asarray(made['weights']) > 0
  assert row['loss'] == pytest.approx(error[asked].mean() / 2, rel=1e-5)
  assert row['last'] == pytest.approx(np.mean([error[i][np.flatnonzero(asked[i])[-1]] for i in range(3)]) / 2, rel=1e-5)


@pytest.mark.parametrize('measure', [measures.Tokens(), measures.Answers(), measures.Errors()], ids=str)
def test_a_measure_says_of_every_number_whether_more_is_better(measure):
  row = measure.row(collections.defaultdict(lambda: 2.0))
  assert set(measure.better) == set(row) - {'tokens'}
  right = {name for name, sign in measure.better.items() if sign == measures.MORE}
  assert right == ({'accuracy', 'exact', 'last'} if measure == measures.Answers() else set())


def test_the_readout_gives_what_the_pass_gave():
  """Of the last state, and of every kept one, by the positions and the documents of the batch."""
  model, made = ROWS['prelude_coda'].model, batch()
  readout = make_readout(model, params(model), made)
  trace = over(model, params(model), made, parts.padded(2), keep=loop.Every())
  parts.close(readout.read(trace.x), trace.z, 1e-5)
  parts.close(readout.read(trace.xs)[1], trace.z, 1e-5)


def test_motion_is_relative_to_the_state_that_was_reached():
  made = batch()
  moved = motion(MODEL, params(MODEL), made, plans.schedule(parts.UNEVEN))
  xs = np.asarray(over(MODEL, params(MODEL), made, plans.schedule(parts.UNEVEN), keep=loop.Every()).xs, np.float64)
  norms = np.linalg.norm(xs, axis=-1)
  np.testing.assert_allclose(moved['state norm'], norms.mean((1, 2)), rtol=1e-5)
  change = (np.linalg.norm(xs[1:] - xs[:-1], axis=-1) / norms[1:]).mean((1, 2))
  np.testing.assert_allclose(moved['state change'], change, rtol=1e-5)


def pick(exit_policy, steps: int, made):
  trace = over(MODEL, params(MODEL), made, plans.Uniform(steps)(None), keep=loop.Every())
  return exit_policy.pick(make_readout(MODEL, params(MODEL), made), trace, made), trace


@pytest.mark.parametrize('least', [1, 3])
def test_confidence_takes_the_surest_step(least):
  made = batch()
  (z, steps), trace = pick(exits.Confidence(least=least), 4, made)
  readout = make_readout(MODEL, params(MODEL), made)
  logits = np.asarray(readout.read(trace.xs) @ readout.table.T, np.float64)
  unsure = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
  asked = np.asarray(made['weights']) > 0
  for row in range(5):
    doubt = [unsure[k, row][asked[row]].mean() for k in range(4)]
    best = least - 1 + int(np.argmin(doubt[least - 1:]))
    assert steps[row] == best + 1
    np.testing.assert_allclose(z[row], readout.read(trace.xs)[best, row], rtol=1e-5)


def test_confidence_of_one_item_is_that_of_the_batch():
  made = batch()
  (_, together), _ = pick(exits.Confidence(), 4, made)
  for row in range(5):
    (_, alone), _ = pick(exits.Confidence(), 4, {name: leaf[row:row + 1] for name, leaf in made.items()})
    assert alone[0] == together[row]


def test_evaluation_of_budgets_and_runs():
  made = {**batch(6), 'loops': jnp.array([1, 2, 4, 4, 2, 1])}
  weights = params(MODEL)
  runs = Named(budgets=(1, 4), runs={'oracle': Run(plan=plans.Given(most=4)),
                                     'sure': Run(plan=plans.Uniform(4), exit=exits.Confidence())}).schedules()
  rows = {row['schedule']: row for row in evaluate(MODEL, weights, [made, made], runs, measure=measures.Answers())}
  assert list(rows) == ['1', '4', 'oracle', 'sure']
  assert rows['oracle']['budget'] == pytest.approx(14 / 6, abs=0.01) and 1 <= rows['sure']['budget'] <= 4
  for budget in (1, 4):
    trace = over(MODEL, weights, made, parts.padded(budget))
    assert rows[str(budget)]['state norm'] == pytest.approx(
        float(np.linalg.norm(trace.x, axis=-1).mean()), rel=1e-4)
  # Each sequence at its own depth.
  z = np.stack([np.asarray(over(MODEL, weights, made, plans.Uniform(int(n))(None)).z)[i]
                for i, n in enumerate(made['loops'])])
  best = (z @ np.asarray(weights['read_in']['embedding']).T).argmax(-1)
  asked = np.asarray(made['weights']) > 0
  assert rows['oracle']['accuracy'] == pytest.approx((best == np.asarray(made['targets']))[asked].mean(), abs=1e-6)


def test_bad_input():
  with pytest.raises(ConfigError, match=r'exit\.least = 0'):
    exits.Confidence(least=0)
  with pytest.raises(ConfigError, match=r'evals\.budgets'):
    Depths(budgets=(0,))


def on_host(**changed):
  made = {name: np.asarray(rows) for name, rows in batch(2).items()} | changed
  return {name: rows for name, rows in made.items() if rows is not None}


@pytest.mark.parametrize('batches, message', [
    ([], 'batches: there are none'), (on_host(), 'one batch alone; give a list'),
    *(([make(name)], f'and no {name}') for name in ('tokens', 'targets', 'weights') for make in (
        lambda name: on_host(**{name: None}),
        lambda name: {key: rows for key, rows in batch(2).items() if key != name})),
    ([{}], 'a batch has nothing, and no tokens'),
    ([on_host(weights=np.zeros((2, T), np.float32))], 'nothing is asked for'),
    ([on_host(tokens=np.full((2, T), parts.V))], 'tokens: ids from 40 to 40, but the model has 0 to 39'),
    ([on_host(targets=np.full((2, T), -100))], 'targets: ids from -100 to -100')])
def test_batches_that_say_nothing_are_refused(batches, message):
  with pytest.raises(ConfigError, match=message):
    evaluate(MODEL, params(MODEL), batches, {'4': 4}, measure=measures.Answers())


def test_a_batch_on_the_host_asks_for_no_steps_that_a_plan_has_not():
  run = Run(plan=plans.LogDepth(size=T))
  with pytest.raises(ConfigError, match=f'LogDepth.size = {T}: the batch has an input of size {T + 1}'):
    evaluate(MODEL, params(MODEL), [on_host(size=np.array([1, T + 1]))], {'by size': run}, measure=measures.Answers())


def test_without_the_bytes_of_tokens_there_are_no_bits_of_a_byte():
  row, = evaluate(MODEL, params(MODEL), [on_host()], {'4': 4})
  assert (np.isnan(row['bits_per_byte']) and row['perplexity'] == pytest.approx(np.exp(row['loss']))
          and row['budget'] == 4)
