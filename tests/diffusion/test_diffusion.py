"""Masked diffusion: the noise and its bound against exact ones, planners with an exact denoiser, and what is drawn."""
import dataclasses
from fractions import Fraction
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer.diffusion import noise, orders
from loopformer.diffusion.measures import Bound
from loopformer.diffusion.orders import (
  Ancestral,
  ByChance,
  Cap,
  Doubtful,
  Kept,
  LeastEntropy,
  LeftToRight,
  Likeliest,
  Looping,
  Margin,
  OfDrawn,
  Ranked,
  Resampling,
  Rescale,
)
from loopformer.diffusion.sampler import begun, denoise, guided
from loopformer.inference.sampling import controls
from loopformer.tasks.sudoku import START, Sudoku, all_grids, valid
from loopformer.types import ConfigError, PlanContext

GRIDS = jnp.asarray(all_grids())
FLOOR = math.log(288) / 16
MASK = 4
ORDERS = [Ranked(), Ranked(score=Margin()), Ranked(score=LeftToRight(), blocks=2), Ranked(score=ByChance()),
          Ancestral(), Ancestral(noise=noise.Cosine()), Resampling(sigma=Cap(eta=0.1)),
          Resampling(sigma=Rescale(eta=0.5)), Resampling(sigma=Doubtful()), Looping(), Kept()]


def exact(tokens, carry=None, moment=None):
  """The law of every cell given the visible ones, of uniform grids, f32[B, 16, 4]."""
  fit = ((tokens[:, None] == MASK) | (tokens[:, None] == GRIDS)).all(-1).astype(jnp.float32)
  counts = jnp.einsum('bg,gtv->btv', fit, jax.nn.one_hot(GRIDS, 4))
  return jnp.log(jnp.maximum(counts / jnp.maximum(counts.sum(-1, keepdims=True), 1), 1e-9)), carry


def slanted(tokens, carry=None, moment=None):
  """A law that depends on what is visible, and is nowhere 0."""
  seen = jnp.where(tokens == MASK, 0, tokens + 1).sum(-1)[:, None, None]
  return jnp.cos(seen + jnp.arange(tokens.shape[1])[:, None] + 2.0 * jnp.arange(4)), carry


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(predict, order, held, asked, steps, keys, control, until):
  return denoise(predict, order, MASK, held, asked, steps, keys, control, until)


def run(order, steps, keys, tokens, predict=slanted, until=None, held=None, **options):
  rows = len(tokens)
  steps = jnp.broadcast_to(jnp.asarray(steps, jnp.int32), rows)
  control = jax.tree.map(lambda leaf: jnp.full(rows, leaf), controls(4, **options))
  tokens = jnp.asarray(tokens)
  return _run(predict, order, held or begun(tokens), tokens == MASK, steps, keys, control,
              steps.max() if until is None else jnp.int32(until))


def keys(rows, seed=0):
  return jax.random.split(jax.random.key(seed), rows)


def hidden(rows, length=16):
  return np.full((rows, length), MASK, np.int32)


# The noise and the bound ---------------------------------------------------------------------------------------------


def bound_of(batch):
  """The mean bound of the exact denoiser, and a standard error."""
  log_p = jnp.take_along_axis(exact(batch['tokens'])[0], batch['targets'][..., None], -1)[..., 0]
  rows = np.asarray((-log_p * batch['weights']).sum(-1) / 16, np.float64)
  return rows.mean(), rows.std() / len(rows) ** 0.5


def prepared(masking, rows=4096, seed=0):
  grids = GRIDS[jax.random.randint(jax.random.key(seed), (rows,), 0, 288)]
  batch = {'tokens': jnp.zeros_like(grids), 'targets': grids, 'weights': jnp.ones(grids.shape), 'row': jnp.arange(rows)}
  return masking(PlanContext(key=jax.random.key(seed + 1), step=jnp.int32(0), stage=jnp.int32(0), batch=batch))


@pytest.mark.parametrize('schedule', [noise.Linear(), noise.Cosine()], ids=lambda s: type(s).__name__)
def test_the_bound_of_the_exact_denoiser_is_the_entropy_by_any_schedule(schedule):
  mean, error = bound_of(prepared(noise.Masking(mask=MASK, noise=schedule)))
  assert abs(mean - FLOOR) < 3 * error and error < 0.02
  weights = np.asarray(prepared(noise.Masking(mask=MASK, noise=schedule), seed=3)['weights'].sum(-1)) / 16
  assert abs(weights.mean() - 1) < 3 * weights.std() / len(weights) ** 0.5  # of a uniform predictor, in units of log V


@pytest.mark.parametrize('draws', [1, 4])
def test_the_bound_by_exact_counts_is_the_entropy_too(draws):
  grids = GRIDS[jax.random.randint(jax.random.key(5), (4096 // draws,), 0, 288)]
  batch = {'tokens': jnp.zeros_like(grids), 'targets': grids, 'weights': jnp.ones(grids.shape),
           'row': jnp.arange(len(grids))}
  mean, error = bound_of(Bound(mask=MASK, draws=draws).asked(batch))
  assert abs(mean - FLOOR) < 3 * error and error < 0.015


@pytest.mark.parametrize('schedule', [noise.Linear(), noise.Cosine()], ids=lambda s: type(s).__name__)
def test_the_weight_is_the_slope_of_the_schedule(schedule):
  t = jnp.linspace(0.05, 0.95, 19)
  slope = jax.vmap(jax.grad(schedule.alpha))(t)
  np.testing.assert_allclose(schedule.weight(t), -slope / (1 - schedule.alpha(t)), rtol=1e-5)
  np.testing.assert_allclose(schedule.alpha(jnp.array([0.0, 1.0])), [1, 0], atol=1e-6)


def test_times_are_one_in_every_part_of_a_batch_and_alike_on_parts_of_it():
  t = np.asarray(noise.stratified(jax.random.key(3), jnp.arange(64)))
  assert len(np.unique(np.floor(np.sort((t - t.min()) * 64 + 0.5)))) == 64
  whole = prepared(noise.Masking(mask=MASK), rows=32)
  masking = noise.Masking(mask=MASK)
  assert whole['time'].min() >= masking.least and whole['time'].max() <= 1
  base = {'tokens': jnp.zeros_like(whole['targets']), 'targets': whole['targets'], 'weights': jnp.ones((32, 16)),
          'row': jnp.arange(32)}
  half = masking(PlanContext(key=jax.random.key(1), step=jnp.int32(0), stage=jnp.int32(0),
                             batch={name: leaf[16:] for name, leaf in base.items()}))
  for name in ('tokens', 'weights', 'time'):
    np.testing.assert_array_equal(half[name], whole[name][16:])


def test_what_weighs_nothing_is_never_hidden():
  grids = GRIDS[:64]
  given = jnp.tile(jnp.arange(16) < 6, (64, 1)).astype(jnp.float32)
  batch = {'tokens': grids, 'targets': grids, 'weights': given, 'row': jnp.arange(64)}
  out = noise.Masking(mask=MASK, least=0.9)(
      PlanContext(key=jax.random.key(0), step=jnp.int32(0), stage=jnp.int32(0), batch=batch))
  assert (out['tokens'][:, 6:] == grids[:, 6:]).all() and (out['weights'][:, 6:] == 0).all()
  assert ((out['tokens'] == MASK) == (out['weights'] > 0)).all() and (out['tokens'] == MASK).any()
  np.testing.assert_array_equal(out['maskable'], given)


# Planners ------------------------------------------------------------------------------------------------------------


def chi(grids):
  """Chi-square of grids against the uniform law over 288, 287 degrees of freedom."""
  number = {tuple(grid): i for i, grid in enumerate(np.asarray(GRIDS).tolist())}
  counts = np.bincount([number[tuple(grid)] for grid in grids.tolist()], minlength=288)
  return np.square(counts - len(grids) / 288).sum() / (len(grids) / 288)


@pytest.mark.parametrize('score', [ByChance(), Margin()],
                         ids=lambda s: type(s).__name__)
def test_with_an_exact_denoiser_every_order_gives_the_uniform_law(score):
  grids = np.asarray(run(Ranked(score=score), 16, keys(576), hidden(576), exact).tokens)
  assert valid(grids, 2).all()
  assert chi(grids) < 370  # 287 + 3.5 standard deviations


def test_an_order_by_drawn_tokens_gives_valid_grids_by_another_law():
  """Where a position is written because of what was drawn for it, likely tokens are drawn more often than they should.
  """
  grids = np.asarray(run(Ranked(score=OfDrawn()), 16, keys(576), hidden(576), exact).tokens)
  assert valid(grids, 2).all() and chi(grids) > 400


def test_one_step_gives_the_product_of_marginals():
  grids = np.asarray(run(Ranked(score=ByChance()), 1, keys(576), hidden(576), exact).tokens)
  pairs = np.bincount(grids[:, 0] * 4 + grids[:, 1], minlength=16)  # of one row, where equal ones are never valid
  assert np.square(pairs - 36).sum() / 36 < 37  # 15 degrees of freedom, p = 0.001
  assert valid(grids, 2).mean() < 0.01


@pytest.mark.parametrize('order', ORDERS, ids=str)
def test_nothing_is_left_hidden_and_nothing_given_is_changed(order):
  given = np.array([0, 3, 1, MASK, 2, MASK] + [MASK] * 10, np.int32)
  tokens = np.tile(given, (8, 1))
  for steps in (1, 4):
    out = np.asarray(run(order, steps, keys(8), tokens).tokens)
    assert ((out >= 0) & (out < MASK)).all()
    assert (out[:, given != MASK] == given[given != MASK]).all()


@pytest.mark.parametrize('blocks, steps', [(1, 5), (1, 16), (1, 20), (4, 8)])
def test_steps_reveal_the_floor_or_ceiling_of_their_share(blocks, steps):
  order, tokens, held, left = Ranked(blocks=blocks), hidden(8), None, [16]
  for until in range(1, steps + 1):
    held = run(order, steps, keys(8), tokens, until=until, held=held) if held is not None else run(
        order, steps, keys(8), tokens, until=until)
    counts = np.asarray((held.tokens == MASK).sum(-1))
    assert len(set(counts.tolist())) == 1
    left.append(int(counts[0]))
    done = (16 - left[-1]) * blocks // 16
    wide = 16 // blocks
    assert (np.asarray(held.tokens)[:, min(done + 1, blocks) * wide:] == MASK).all()  # later blocks wait
  shares = -np.diff(left)
  size, each = 16 // blocks, steps // blocks
  assert shares.tolist() == [size // each + (i < size % each) for i in range(each)] * blocks


def run_from(order, steps, tokens, rows):
  return np.asarray(run(order, steps, keys(rows, 5), tokens).tokens)


@pytest.mark.parametrize('sigma', [Cap(eta=0.0), Rescale(eta=0.0)], ids=str)
def test_resampling_without_chance_is_ancestral(sigma):
  ours, theirs = (run_from(order, 6, hidden(8), 8) for order in (Resampling(sigma=sigma), Ancestral()))
  np.testing.assert_array_equal(ours, theirs)
  assert (run_from(Resampling(sigma=Cap(eta=0.5)), 6, hidden(8), 8) != theirs).any()


def test_masses_are_a_law_at_every_time_and_chance():
  for schedule in (noise.Linear(), noise.Cosine()):
    t, s = (a.ravel() for a in jnp.meshgrid(jnp.linspace(0.05, 1, 20), jnp.linspace(0, 0.95, 20)))
    t, s = t[s < t], s[s < t]
    most = orders.most_hidden(schedule.alpha(t), schedule.alpha(s))
    for share in (0.0, 0.3, 1.0):
      stays, written = orders.masses(schedule.alpha(t), schedule.alpha(s), share * most)
      np.testing.assert_allclose(stays + written, 1, atol=2e-4)
      assert stays.min() > -2e-4 and written.min() > -2e-4
  stays, _ = orders.masses(jnp.float32(0.5), jnp.float32(0.8), jnp.float32(0.9))  # above the largest, 0.4
  assert stays < 0


def test_resampling_keeps_the_mean_number_of_hidden_positions():
  for order in (Resampling(sigma=Cap(eta=0.2)), Ancestral()):
    counts = np.asarray((run(order, 8, keys(512), hidden(512), until=4).tokens == MASK).sum(-1))
    assert abs(counts.mean() - 8) < 3.5 * counts.std() / 512 ** 0.5


def test_a_plateau_hides_and_writes_as_much():
  order = Looping(eta=0.05, on=0.5, begins=0.25, ends=0.75)
  for until in (2, 4, 6):
    counts = np.asarray((run(order, 8, keys(512), hidden(512), until=until).tokens == MASK).sum(-1))
    assert abs(counts.mean() - 8) < 3.5 * counts.std() / 512 ** 0.5


@pytest.mark.parametrize('begins, ends', [(0.4, 0.8), (0.1, 0.7), (0.3, 0.9), (0.0625, 1 - 1e-4)])
def test_a_plateau_has_the_steps_that_its_shares_say(monkeypatch, begins, ends):
  """Of every number of steps, those that begin at `begins` or later and end at `ends` or earlier, in exact fractions.
  """
  monkeypatch.setattr(orders, '_resampled',
                      lambda seen, alpha_t, alpha_s, sigma: (sigma(jnp.ones(len(seen.step)), seen), alpha_t))
  steps, step = (jnp.array(column) for column in zip(*[(n, i) for n in (5, 10, 20, 48, 10_000) for i in range(n)]))
  none = jnp.zeros((len(step), 1), bool)
  seen = orders.Round(step=step, steps=steps, asked=none, hidden=none, tokens=none, drawn=none, log_p=none, held=none,
                      keys=None)
  hides, _ = Looping(begins=begins, ends=ends)(seen)
  first, last = Fraction(str(begins)), Fraction(str(ends))
  right = [first <= Fraction(i, n) and Fraction(i + 1, n) <= last for i, n in zip(step.tolist(), steps.tolist())]
  np.testing.assert_array_equal(np.asarray(hides)[:, 0] > 0, right)


def test_kept_hides_the_least_probable_again():
  for until, left in ((1, 12), (2, 8), (3, 4), (4, 0)):
    out = np.asarray(run(Kept(), 4, keys(8), hidden(8), until=until).tokens)
    assert ((out == MASK).sum(-1) == left).all()
  first, second = (np.asarray(run(Kept(), 4, keys(64), hidden(64), until=until).tokens) for until in (1, 2))
  assert ((first != MASK) & (second == MASK)).any()  # what was written may be hidden again


@pytest.mark.parametrize('score, first',
                         [(Likeliest(), 1), (OfDrawn(), 1), (Margin(), 2), (LeastEntropy(), 3), (LeftToRight(), 0)],
                         ids=lambda value: str(value))
def test_scores_choose_what_they_are_named_after(score, first):
  law = jnp.array([[0.25, 0.25, 0.25, 0.25], [0.55, 0.449, 0.0005, 0.0005], [0.5, 0.17, 0.17, 0.16],
                   [0.51, 0.4899, 0.00005, 0.00005]])
  seen = orders.Round(step=jnp.zeros(1, int), steps=jnp.full(1, 4), asked=jnp.ones((1, 4), bool),
                      hidden=jnp.ones((1, 4), bool), tokens=jnp.full((1, 4), MASK), drawn=jnp.zeros((1, 4), int),
                      log_p=jnp.log(law)[None], held=jnp.ones((1, 4)), keys=keys(1))
  write, hide = jax.jit(Ranked(score=score))(seen)
  assert np.flatnonzero(write[0]).tolist() == [first] and not hide.any()


# Draws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('order', [Ranked(), Ancestral(), Kept()], ids=str)
def test_what_is_drawn_does_not_depend_on_neighbours_or_on_their_steps(order):
  rows = run(order, np.array([3, 9, 0, 5, 1, 1, 1, 1]), keys(8), hidden(8))
  alone = run(order, 5, jnp.tile(keys(8)[3:4], 8), hidden(8))  # by itself, eight times
  np.testing.assert_array_equal(jnp.tile(rows.tokens[3:4], (8, 1)), alone.tokens)
  assert (rows.tokens[2] == MASK).all()  # no steps, nothing happens
  assert (run(order, 5, keys(8, 1), hidden(8)).tokens != alone.tokens).any()


def test_looking_in_between_changes_nothing():
  order = Resampling(sigma=Doubtful())  # which reads what is kept from step to step
  half = run(order, 6, keys(8), hidden(8), until=3)
  np.testing.assert_array_equal(run(order, 6, keys(8), hidden(8), held=half).tokens,
                                run(order, 6, keys(8), hidden(8)).tokens)


def test_one_program_serves_every_number_of_steps():
  run(Ranked(), 2, keys(8), hidden(8))
  before = _run._cache_size()
  for steps in (1, 7, 30):
    run(Ranked(), steps, keys(8), hidden(8))
  assert _run._cache_size() == before


def test_controls_cut_what_is_drawn():
  greedy = run(Ranked(), 8, keys(8), hidden(8), temperature=0.0).tokens
  np.testing.assert_array_equal(greedy, run(Ranked(), 8, keys(8, 1), hidden(8), top_k=1).tokens)
  np.testing.assert_array_equal(greedy, run(Ranked(), 8, keys(8, 2), hidden(8), top_p=1e-6).tokens)
  assert (greedy == greedy[0]).all() and (run(Ranked(), 8, keys(8), hidden(8)).tokens != greedy).any()


def test_guidance_of_no_weight_is_none():
  c, u = slanted(hidden(1))[0], slanted(hidden(1) - 2)[0]
  np.testing.assert_allclose(guided(c, u, 0.0), c, atol=1e-6)
  np.testing.assert_allclose(guided(c, u, 1.0), 2 * c - u, atol=1e-5)


# The task ------------------------------------------------------------------------------------------------------------


def test_grids_are_the_valid_ones():
  grids = np.asarray(GRIDS)
  assert len(np.unique(grids, axis=0)) == 288 and valid(grids, 2).all()
  spoilt = grids.copy()
  spoilt[:, [0, 1]] = spoilt[:, [1, 0]]
  assert not valid(spoilt, 2).any()
  task, rng = Sudoku(box=3, holes=(30, 45)), np.random.default_rng(0)
  example = task(rng)
  assert valid(example['targets'][None], 3).all() and 30 <= example['weights'].sum() <= 45
  assert len({tuple(task.grid(rng)) for _ in range(5)}) == 5
  assert example['tokens'][0] == task.symbols.index(START) and (example['tokens'][1:] == example['targets'][:-1]).all()


def test_a_solution_keeps_the_clues():
  task = Sudoku(box=2, holes=(6, 6))
  example = task(np.random.default_rng(1))
  target, weights = example['targets'][None], example['weights'][None]
  other = np.asarray(GRIDS)[[int((np.asarray(GRIDS) != target).any(-1).argmax())]]
  assert task.solved(target, target, weights).all()
  assert task.solved(other, target, weights)[0] == (other == target)[weights == 0].all()
  assert Sudoku(box=2).solved(other, target, np.ones((1, 16))).all()
  assert Sudoku().entropy == pytest.approx(0.3539, abs=1e-4) and math.isnan(task.entropy)
  assert Sudoku().baselines([]) == {'a cell by itself': math.log(4), 'entropy of grids': Sudoku().entropy}


# Input that cannot be used --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make, names', [
    (lambda: noise.Masking(mask=0), 'Masking.mask = 0'),
    (lambda: noise.Masking(mask=4, least=0.0), 'Masking.least = 0.0'),
    (lambda: noise.Masking(mask=4, least=1.5), 'Masking.least = 1.5'),
    (lambda: Ranked(blocks=0), 'Ranked.blocks = 0'),
    (lambda: Ranked(blocks=3).check(6, 16), '16 positions'),
    (lambda: Ranked(blocks=4).check(6, 16), '6 denoising steps'),
    (lambda: Cap(eta=1.5), 'Cap.eta = 1.5'),
    (lambda: Looping(eta=0.9, on=0.1), 'Looping.eta = 0.9'),
    (lambda: Looping(begins=0.5, ends=0.4), 'Looping.ends = 0.4'),
    (lambda: orders.check_sigma('sigma', 0.5, 0.5, 0.8), 'sigma = 0.5'),
    (lambda: Sudoku(box=4), 'Sudoku.box = 4'),
    (lambda: Sudoku(box=2, holes=(0, 3)), 'Sudoku.holes = 0'),
    (lambda: Sudoku(box=2, holes=5), 'Sudoku.holes = 5: give the least and the most'),
    (lambda: Kept(noise=-1.0), 'Kept.noise = -1.0'), (lambda: all_grids(3), 'box = 3')])
def test_bad_values_are_named(make, names):
  with pytest.raises(ConfigError, match=names):
    make()


def test_parts_are_frozen():
  for part in (*ORDERS, noise.Masking(mask=4)):
    assert dataclasses.is_dataclass(part) and part.__dataclass_params__.frozen and hash(part) is not None
