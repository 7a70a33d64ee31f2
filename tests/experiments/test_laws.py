"""Scaling laws are found in losses that follow them, and intervals hold what they should."""
import numpy as np
import pytest

from experiments.tools import laws
from loopformer.types import ConfigError


def points_of(phi, noise=0.0, seed=0):
  """Losses of E = 1.5, A = 40, a = 0.35, B = 300, b = 0.45, phi over a grid of sizes, loops and tokens."""
  rng, found = np.random.default_rng(seed), []
  for looped in (1e4, 1e5, 1e6):
    for loops in (1, 2, 4, 8):
      for tokens in (1e5, 1e6, 1e7):
        size = looped / 2 + loops ** phi * looped
        loss = 1.5 + 40 * size ** -0.35 + 300 * tokens ** -0.45
        found.append(laws.Point(looped / 2, looped, loops, tokens, loss * np.exp(noise * rng.standard_normal())))
  return found


def test_the_worth_of_a_loop_is_found():
  for phi in (0.0, 0.46, 1.0):
    told = laws.Equivalent().told(laws.fit(laws.Equivalent(), points_of(phi)))
    assert abs(told['phi'] - phi) < 0.02, told
    assert abs(told['E'] - 1.5) < 0.05 and abs(told['b'] - 0.45) < 0.03, told


def test_loops_that_are_layers_of_their_own_follow_the_unrolled_law():
  told = laws.Unrolled().told(laws.fit(laws.Unrolled(), points_of(1.0)))
  assert abs(told['a'] - 0.35) < 0.02 and abs(told['E'] - 1.5) < 0.05, told


def test_an_interval_widens_with_noise_and_holds_the_truth():
  width = {}
  for noise in (0.002, 0.03):
    low, high = laws.intervals(laws.Equivalent(), points_of(0.46, noise), draws=30)['phi']
    width[noise] = high - low
    assert low - 0.02 < 0.46 < high + 0.02
  assert width[0.03] > 2 * width[0.002]


def test_the_best_loops_of_a_cost_and_their_exponent():
  points = [laws.Point(1, 1, loops, tokens, loss) for loops, tokens, loss in (
      (1, 100, 2.0), (2, 50, 1.9), (4, 25, 2.1), (1, 1600, 1.5), (4, 400, 1.2))]
  best = laws.best_loops(points, [1e6, 1e6, 1e6, 16e6, 16e6])
  assert [(row['operations'], row['loops']) for row in best] == [(1e6, 2), (16e6, 4)]
  assert laws.exponent([1, 16], [2, 4]) == pytest.approx(0.25)
  assert np.isnan(laws.exponent([1, 1], [2, 4]))


@pytest.mark.parametrize('points, told', [
    (points_of(0.5)[:4], '4 points: Equivalent has 6 numbers'),
    ([*points_of(0.5), laws.Point(1, 1, 1, 1, float('nan'))], 'loss = nan'),
    ([*points_of(0.5), laws.Point(1, 0, 1, 1, 1.0)], 'looped = 0')])
def test_points_that_fix_nothing_are_refused(points, told):
  with pytest.raises(ConfigError, match=told):
    laws.fit(laws.Equivalent(), points)
