"""Generators of in-context regression and of gradient descent: a battery over all, then what each must be."""
import dataclasses

import numpy as np
import pytest

from loopformer.inference.measures import Errors
from loopformer.tasks.chains import Autoregression, ChainOfThought, Contracted
from loopformer.tasks.descent import LinearPrompt, WeightPrompt, best_rate, gradient_descent
from loopformer.tasks.functions import Linear, Network, Representation, Represented, Sparse, Tree, states_of
from loopformer.tasks.generated import Generated, Grow, Rise
from loopformer.tasks.guesses import ridge
from loopformer.tasks.regression import Regression
from loopformer.types import ConfigError

GENERATORS = {
  'linear': Regression(),
  'noisy': Regression(function=Linear(noise=0.1)),
  'sparse': Regression(function=Sparse()),
  'tree': Regression(function=Tree(), points=15),
  'network': Regression(function=Network(), points=15),
  'represented': Regression(function=Represented(noise=0.1), points=15),
  'curriculum': Regression(function=Sparse(), inputs=5, points=3, width=7, room=6),
  'one point': Regression(function=Represented(), inputs=1, points=1),
  'autoregression': Autoregression(),
  'vector autoregression': Autoregression(states=4, order=2, steps=10, noise=0.0),
  'contracted': Autoregression(bound=Contracted(), order=4, steps=4),
  'chain of thought': ChainOfThought(points=6),
  'wide chain of thought': ChainOfThought(inputs=2, hidden=5, layers=1, points=4),
  'linear prompt': LinearPrompt(),
  'weight prompt': WeightPrompt(inputs=3, examples=2),
}
VECTORS = (Autoregression, ChainOfThought, WeightPrompt)  # whose targets are vectors
REGRESSIONS = [name for name, of in GENERATORS.items() if isinstance(of, Regression)]
every = pytest.mark.parametrize('name', GENERATORS)


def example(of, seed=0):
  return of(np.random.default_rng(seed))


def many(of, count, seed=0):
  return [example(of, (seed, i)) for i in range(count)]


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


# All generators ------------------------------------------------------------------------------------------------------


@every
def test_shapes_and_dtypes(name):
  of = GENERATORS[name]
  made = example(of)
  tokens, targets, weights = made['tokens'], made['targets'], made['weights']
  assert of.symbols is None
  assert tokens.shape[0] == of.length and tokens.ndim == 2
  assert targets.shape[:1] == weights.shape == (of.length,) and targets.ndim == (2 if isinstance(of, VECTORS) else 1)
  assert tokens.dtype == targets.dtype == weights.dtype == np.float32
  assert all(np.isfinite(made[key]).all() for key in made)
  assert set(np.unique(weights)) <= {0, 1} and weights.any()
  assert not targets[weights == 0].any() or isinstance(of, Autoregression)
  np.testing.assert_array_equal(made['positions'], np.arange(of.length))
  integers = made.keys() - {'tokens', 'targets', 'weights'}
  assert all(made[key].dtype == np.int32 and made[key].shape == (of.length,) for key in integers)


@every
def test_examples_repeat_by_seed_and_differ_between_seeds(name):
  of = GENERATORS[name]
  assert same(example(of, 1), example(dataclasses.replace(of), 1))
  assert not np.array_equal(example(of, 1)['tokens'], example(of, 2)['tokens'])
  assert not np.array_equal(example(of, 1)['targets'], example(of, 2)['targets'])


@every
def test_works_as_a_task(name, tmp_path):
  of = GENERATORS[name]
  task = Generated(of=of, held_out=5, measure=Errors(scale=of.scale))
  train, held_out = task.examples(tmp_path, 'train', 3), task.examples(tmp_path, 'validation', 3)
  assert len(held_out) == 5
  assert same(train[4], task.examples(tmp_path, 'train', 3)[4])
  assert not np.array_equal(train[0]['tokens'], task.examples(tmp_path, 'train', 4)[0]['tokens'])
  assert same(held_out[2], task.examples(tmp_path, 'validation', 4)[2])
  assert held_out.batch(5)[0]['tokens'].shape == (5, *train[0]['tokens'].shape)
  lines = []
  assert task.prepare(tmp_path, lines.append) is None
  assert lines and all(line.startswith('floor: ') for line in lines)


@every
def test_floors_are_finite_and_leave_examples_alone(name):
  of = GENERATORS[name]
  made = many(of, 8)
  baselines = of.baselines(made)
  assert all(isinstance(value, float) and np.isfinite(value) and value >= 0 for value in baselines.values())
  assert 'zero' in baselines
  assert all(map(same, made, many(of, 8)))


@pytest.mark.parametrize('name', [  # the scale of WeightPrompt is of errors of w
  name for name, of in GENERATORS.items() if not isinstance(of, WeightPrompt)])
def test_scale_is_the_mean_square_of_what_is_asked_for(name):
  of = GENERATORS[name]
  squares = [np.square(e['targets'][e['weights'] > 0]).mean() for e in many(of, 1500)]
  extra = of.function.noise**2 if isinstance(of, Regression) and isinstance(of.function, Linear) else 0
  error = 5 * np.std(squares) / np.sqrt(len(squares))
  if isinstance(of, Autoregression):
    error *= 4  # the scale itself is measured on fewer prompts
  assert abs(np.mean(squares) - of.scale - extra) < error + 0.02 * of.scale


# Regression ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', REGRESSIONS)
def test_layout_is_interleaved(name):
  of = GENERATORS[name]
  made = example(of)
  x, y = made['tokens'][::2], made['tokens'][1::2]
  n, room = of.points, of.length // 2
  assert made['tokens'].shape == (2 * room, of.width or of.inputs)
  assert (x[:n, :of.inputs] != 0).all() and not x[:, of.inputs:].any() and not x[n:].any()
  assert not y[:, 1:].any() and not y[n:].any()
  np.testing.assert_array_equal(made['targets'][::2], y[:, 0])
  assert not made['targets'][1::2].any()
  np.testing.assert_array_equal(made['weights'], [1, 0] * n + [0, 0] * (room - n))
  np.testing.assert_array_equal(made['point'], np.repeat(np.arange(room), 2))


@pytest.mark.parametrize('name', [name for name, of in GENERATORS.items() if isinstance(of, (
  Regression, Autoregression, ChainOfThought)) and name != 'tree'])
def test_targets_are_not_visible_before_they_are_asked_for(name):
  made = example(GENERATORS[name])
  targets = made['targets'].reshape(len(made['tokens']), -1)
  for i in np.flatnonzero(made['weights']):
    hidden = targets[i][targets[i] != 0]
    assert hidden.size and not np.isin(hidden, made['tokens'][:i + 1]).any()


@pytest.mark.parametrize('depth', [1, 4, 6])
def test_tree_equals_a_slow_walk(depth):
  of = Tree(depth=depth)
  x = np.random.default_rng(5).standard_normal((300, 20))
  coordinates, values = of.draw(np.random.default_rng(6), 20)
  assert len(coordinates) + len(values) == 2**(depth + 1) - 1

  def walk(row, node=0):
    if node >= len(coordinates):
      return values[node - len(coordinates)]
    return walk(row, 2 * node + 2 if row[coordinates[node]] > 0 else 2 * node + 1)

  np.testing.assert_array_equal(of.apply((coordinates, values), x), [walk(row) for row in x])


def test_a_tree_prompt_is_that_of_its_weights():
  of = Regression(function=Tree())
  made = example(of, 9)
  rng = np.random.default_rng(9)
  rng.standard_normal((of.points, of.inputs))
  weights = of.function.draw(rng, of.inputs)
  answers = of.function.apply(weights, made['tokens'][::2])
  np.testing.assert_array_equal(made['targets'][::2], answers.astype(np.float32))


def test_tree_coordinates_reach_all_inputs():
  drawn = np.concatenate([Tree().draw(np.random.default_rng(i), 20)[0] for i in range(100)])
  assert set(drawn) == set(range(20))


@pytest.mark.parametrize('kept', [1, 3, 20])
def test_sparsity_is_exact_and_any_coordinate_is_kept(kept):
  weights = np.stack([Sparse(kept=kept).draw(np.random.default_rng(i), 20) for i in range(400)])
  np.testing.assert_array_equal((weights != 0).sum(1), kept)
  share = (weights != 0).mean(0)
  assert abs(share - kept / 20).max() < 5 * np.sqrt(kept / 20 / 400)


def test_sparse_labels_are_those_of_three_coordinates():
  made = example(Regression(function=Sparse(), points=41))
  weights = np.linalg.lstsq(made['tokens'][::2].astype(np.float64), made['targets'][::2], rcond=None)[0]
  assert (abs(weights) > 1e-3).sum() == 3


def test_network_equals_its_formula():
  of = Network(hidden=7)
  first, second = of.draw(np.random.default_rng(0), 4)
  x = np.random.default_rng(1).standard_normal((5, 4))
  slow = [sum(second[j] * max(0.0, sum(row[i] * first[i, j] for i in range(4))) for j in range(7)) for row in x]
  np.testing.assert_allclose(of.apply((first, second), x), np.sqrt(2 / 7) * np.array(slow), rtol=1e-12)


@pytest.mark.parametrize('function', [Linear(), Linear(noise=0.1), Sparse(), Tree(), Network(), Represented(),
                                      Represented(noise=1.0)], ids=repr)
def test_error_is_about_one_without_examples(function):
  of = Regression(function=function, points=2)
  answers = np.array([e['targets'][0] for e in many(of, 3000)])
  assert abs(np.square(answers).mean() / of.scale - 1) < 0.15


def test_noise_has_its_size():
  clean, noisy = Regression(), Regression(function=Linear(noise=0.1))
  difference = np.concatenate([example(noisy, i)['targets'][::2] - example(clean, i)['targets'][::2]
                               for i in range(100)])
  assert abs(difference.std() - 0.1) < 0.005


def test_floors_of_linear_regression():
  of = Regression()
  baselines = of.baselines(many(of, 200))
  assert baselines['least squares, last'] < 1e-9
  assert abs(baselines['zero'] - 1) < 0.1
  # Minimum norm, k of D coordinates: 1 - k / D; half of the places are beyond D.
  assert abs(baselines['least squares'] - np.mean([max(0, 1 - k / 20) for k in (0, 6, 11, 17, 23, 29, 34, 40)])) < 0.05


def test_knowing_the_representation_helps():
  of = Regression(function=Represented(), points=40)
  baselines = of.baselines(many(of, 200))
  assert baselines['ridge on Phi*, last'] < 1e-9
  assert baselines['ridge on Phi*'] < 0.5 * baselines['ridge on x'] < 0.5


def test_a_curriculum_keeps_the_shape_of_rows():
  of = Regression(inputs=20, width=20, points=4)
  task = Generated(of=of, grow=Grow(fields={'inputs': Rise(first=5, every=10)}))
  source = task.source('train', 0)
  assert [(source[i]['tokens'][::2] != 0).any(0).sum() for i in (0, 9, 10, 149, 150, 999)] == [5, 5, 6, 19, 20, 20]
  of = Regression(points=6, room=6)
  task = Generated(of=of, grow=Grow(fields={'points': Rise(first=2, every=1)}))
  assert [int(task.source('train', 0)[i]['weights'].sum()) for i in range(6)] == [2, 3, 4, 5, 6, 6]
  assert {task.source('train', 0)[i]['tokens'].shape for i in range(6)} == {(12, 20)}


def test_a_curriculum_of_several_fields():
  """In-context regression's own: dimensions and points, at different speeds, each up to its end (section 3.1)."""
  of = Regression(inputs=20, width=20, points=41, room=41)
  batch = 64
  grow = Grow(fields={'inputs': Rise(first=5, every=5000 * batch), 'points': Rise(first=11, every=5000 * batch, add=2)})
  Generated(of=of, grow=grow)
  at = {step: grow.at(of, step * batch) for step in (0, 499, 4999, 5000, 74_999, 75_000, 500_000)}
  assert {step: (part.inputs, part.points) for step, part in at.items()} == {
      0: (5, 11), 499: (5, 11), 4999: (5, 11), 5000: (6, 13), 74_999: (19, 39), 75_000: (20, 41), 500_000: (20, 41)}
  assert all((part.width, part.room, part.function) == (of.width, of.room, of.function) for part in at.values())


@pytest.mark.parametrize('of, grow, message', [
    (Regression(), Grow(fields={'dims': Rise(first=5, every=1)}), r"names 'dims', which Regression does not have"),
    (Regression(), Grow(fields={'inputs': Rise(first=5, every=1)}), r'tokens of the first .* has shape \(82, 5\)'),
    (Regression(), Grow(fields={'points': Rise(first=5, every=1)}), r'shape \(10, 20\).*the room of its largest'),
], ids=['no such field', 'width', 'length'])
def test_a_curriculum_that_does_not_suit_its_task_is_refused(of, grow, message):
  with pytest.raises(ConfigError, match=message):
    Generated(of=of, grow=grow)


@pytest.mark.parametrize('field', ['first', 'every', 'add'])
def test_a_rise_that_does_not_rise_is_refused(field):
  with pytest.raises(ConfigError, match=f'{field} = 0'):
    Rise(**{'first': 1, 'every': 1, field: 0})


def test_a_curriculum_does_not_change_the_representation():
  whole = Regression(function=Represented(), inputs=6, width=6)
  part = dataclasses.replace(whole, inputs=3)
  made = example(part)
  features = whole.function.phi(made['tokens'][::2].astype(np.float64))
  assert features.shape == (41, 20)
  fit = ridge(features[None, :25], made['targets'][None, :50:2, None].astype(np.float64), features[30:31])
  np.testing.assert_allclose(fit[0, 0], made['targets'][60], rtol=1e-3, atol=1e-4)


# Phi*, autoregression, chain of thought ------------------------------------------------------------------------------


def test_representation_is_the_same_for_all_prompts_and_restarts():
  """One Phi* makes the prompts of different data seeds linear in its features; pinned numbers stand for a restart."""
  of = Regression(function=Represented(), inputs=5, points=41)
  phi = of.function.phi
  for seed in range(3):
    made = Generated(of=of).source('train', seed)[7]
    x, y = made['tokens'][::2].astype(np.float64), made['targets'][::2].astype(np.float64)
    weights = np.linalg.lstsq(phi(x), y, rcond=None)[0]
    assert np.square(phi(x) @ weights - y).max() < 1e-10
  first = phi.matrices(5)[0].copy()
  example(of, 5)
  np.testing.assert_array_equal(first, Representation().matrices(5)[0])
  np.testing.assert_allclose(first[0, :3], [-0.399575, -0.180423, -0.617295], atol=1e-6)
  with pytest.raises(ValueError):
    phi.matrices(5)[0][0, 0] = 1


def test_representation_depends_on_its_own_seed():
  x = np.ones((1, 5))
  assert not np.allclose(Representation(seed=0)(x), Representation(seed=1)(x))
  assert Representation(layers=3, features=7)(x).shape == (1, 7)


def test_representation_equals_its_formula():
  """relu(A z) - slope relu(-A z), layer by layer; and it is as steep as its bound at most."""
  phi = Representation(slope=0.2)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((50, 6))
  z = x
  for matrix in phi.matrices(6):
    z = np.maximum(z @ matrix, 0) - 0.2 * np.maximum(-(z @ matrix), 0)
  np.testing.assert_allclose(phi(x), z, rtol=1e-12)
  steps = np.linalg.norm(phi(x[1:]) - phi(x[:-1]), axis=1) / np.linalg.norm(x[1:] - x[:-1], axis=1)
  assert steps.max() <= phi.lipschitz(6)


@pytest.mark.parametrize('bound', [Autoregression().bound, Contracted()], ids=repr)
@pytest.mark.parametrize('states', [1, 4])
@pytest.mark.parametrize('noise', [0.0, 0.1, 1.0])
def test_states_are_finite_for_200_steps(bound, states, noise):
  of = Autoregression(bound=bound, states=states, noise=noise, steps=200)
  for made in many(of, 20):
    assert np.isfinite(made['targets']).all() and abs(made['targets']).max() < 20


def test_rescaled_states_stay_alive():
  of = Autoregression(noise=0.0, steps=200)
  late = [np.square(e['targets'][150:]).mean() for e in many(of, 50)]
  assert min(late) > 1e-4 and 0.3 < np.mean(late) < 5


def test_next_states_are_linear_in_features_of_windows():
  of = Autoregression(order=2, states=2, steps=60, noise=0.0, phi=Representation(features=8))
  made = example(of)
  tokens, targets, asked = made['tokens'].astype(np.float64), made['targets'], made['weights'] > 0
  np.testing.assert_array_equal(targets[:-1], made['tokens'][1:])
  np.testing.assert_array_equal(asked, [False, *[True] * 59])
  np.testing.assert_array_equal(made['point'], [0, *range(59)])
  features = of.features(np.concatenate([tokens[:-1], tokens[1:]], 1))
  weights = np.linalg.lstsq(features, targets[1:], rcond=None)[0]
  np.testing.assert_allclose(features @ weights, targets[1:], atol=1e-4)
  assert of.baselines(many(of, 50))['ridge on Phi*, last'] < 1e-6


def test_chain_of_thought_equals_the_recomputed_states():
  of = ChainOfThought(points=7)
  made = example(of, 4)
  *matrices, last = of.draw(np.random.default_rng(4))
  links = of.layers + 2
  tokens = made['tokens'].reshape(7, links, of.width)
  targets = made['targets'].reshape(7, links, of.width)
  x = tokens[:, 0, :of.inputs].astype(np.float64)
  states = states_of(matrices, x, of.slope)
  assert len(states) == of.layers + 1
  state = x
  for i, matrix in enumerate(matrices):
    z = state @ matrix
    state = np.where(z > 0, z, of.slope * z)
    np.testing.assert_allclose(targets[:, i, :of.hidden], state, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets[:, i], tokens[:, i + 1])
    assert not targets[:, i, of.hidden:].any()
  np.testing.assert_allclose(targets[:, of.layers, 0], (state @ last)[:, 0], rtol=1e-5, atol=1e-6)
  assert not targets[:, of.layers, 1:].any() and not targets[:, -1].any()
  np.testing.assert_array_equal(made['link'], np.tile(np.arange(links), 7))
  np.testing.assert_array_equal(made['point'], np.repeat(np.arange(7), links))
  np.testing.assert_array_equal(made['weights'], made['link'] <= of.layers)


def test_networks_of_chains_differ_between_prompts():
  of = ChainOfThought()
  assert not np.allclose(of.draw(np.random.default_rng(0))[0], of.draw(np.random.default_rng(1))[0])


# Gradient descent ----------------------------------------------------------------------------------------------------


def drawn(inputs=10, examples=20, seed=0, prompts=()):
  rng = np.random.default_rng(seed)
  x, best = rng.standard_normal((*prompts, examples, inputs)), rng.standard_normal((*prompts, inputs))
  return x, np.einsum('...nd,...d->...n', x, best), best


def test_gradient_descent_goes_down_the_gradient():
  x, y, best = drawn()
  iterates = gradient_descent(x, y, 0.4, 500)
  assert iterates.shape == (501, 10) and iterates.dtype == np.float64 and not iterates[0].any()
  np.testing.assert_allclose(iterates[1], 0.4 / 20 * x.T @ y, rtol=1e-12)
  np.testing.assert_allclose(iterates[-1], best, atol=1e-3)
  np.testing.assert_allclose(gradient_descent(x, y, 0.4, 3, start=iterates[5]), iterates[5:9], rtol=1e-12)
  loss = np.square(iterates @ x.T - y).mean(1)
  assert (np.diff(loss) <= 0).all()
  batched = gradient_descent(np.stack([x, 2 * x]), np.stack([y, y]), 0.1, 4)
  assert batched.shape == (5, 2, 10)
  np.testing.assert_allclose(batched[:, 1], gradient_descent(2 * x, y, 0.1, 4), rtol=1e-12)


def test_prediction_form_is_gradient_descent():
  """Section 2.2: P = e e^T, Q = diag(-eta I, 0)."""
  of = LinearPrompt()
  made = example(of)
  d, n, rate = of.inputs, of.examples, 0.4
  z = made['tokens'].T.astype(np.float64)
  x, y, query = z[:d, :n].T.copy(), z[d, :n].copy(), z[:d, n].copy()
  iterates = gradient_descent(x, y, rate, 12)
  p, q, mask = np.zeros((d + 1, d + 1)), np.diag([-rate] * d + [0.0]), np.diag([1.0] * n + [0.0])
  p[d, d] = 1
  for weights in iterates[1:]:
    z = z + p @ z @ mask @ (z.T @ q @ z) / n
    np.testing.assert_allclose(z[d, :n], y - x @ weights, atol=1e-12)
    np.testing.assert_allclose(-z[d, n], weights @ query, atol=1e-12)


def test_chain_form_is_gradient_descent():
  """Section 2.3: V_31 = -eta I, W_13 = I, W_24 = -1; the new column is (0, 0, w, 1)."""
  of = WeightPrompt()
  d, n, rate = of.inputs, of.examples, 0.4
  z = example(of)['tokens'].T.astype(np.float64)
  x, y = z[:d, :n].T, z[d, :n]
  v, w = np.zeros((2, 2 * d + 2, 2 * d + 2))
  v[d + 1:-1, :d], w[:d, d + 1:-1], w[d, -1] = -rate * np.eye(d), np.eye(d), -1
  for weights in gradient_descent(x, y, rate, 12)[1:]:
    new = (z + v @ z @ (z.T @ w @ z) / n)[:, -1]
    np.testing.assert_allclose(new, [*np.zeros(d + 1), *weights, 1], atol=1e-12)
    z = np.concatenate([z, new[:, None]], 1)


def test_linear_prompt_hides_the_label_of_the_query():
  of = LinearPrompt()
  made = example(of)
  assert made['tokens'].shape == (21, 11)
  assert made['tokens'][-1, -1] == 0 and made['targets'][-1] not in made['tokens']
  np.testing.assert_array_equal(made['weights'], [0] * 20 + [1])
  weights = np.linalg.lstsq(made['tokens'][:-1, :-1].astype(np.float64), made['tokens'][:-1, -1], rcond=None)[0]
  np.testing.assert_allclose(made['tokens'][-1, :-1] @ weights, made['targets'][-1], rtol=1e-4)


def test_weight_prompt_asks_for_the_weights():
  made = example(WeightPrompt(inputs=4, examples=9))
  x, y = made['tokens'][:9, :4].astype(np.float64), made['tokens'][:9, 4]
  np.testing.assert_allclose(made['targets'][-1, 5:-1], np.linalg.lstsq(x, y, rcond=None)[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(made['tokens'][-1], [0] * 9 + [1])
  np.testing.assert_array_equal(made['weights'], [0] * 9 + [1])
  np.testing.assert_array_equal(made['targets'][:, -1], made['weights'])
  assert not made['tokens'][:9, 5:].any() and not made['targets'][:, :5].any()


@pytest.mark.parametrize('inputs, examples', [(10, 20), (5, 20), (3, 4)])
def test_error_of_the_best_single_step(inputs, examples):
  """d (d + 1) / (n + d + 1), and no other rate does better (section 2.3)."""
  x, y, best = drawn(inputs, examples, prompts=(20000,))
  rate = best_rate(inputs, examples)

  def errors(rate):
    return np.square(gradient_descent(x, y, rate, 1)[-1] - best).sum(-1)

  found = errors(rate)
  assert abs(found.mean() - inputs * (inputs + 1) / (examples + inputs + 1)) < 4 * found.std() / np.sqrt(len(found))
  assert errors(0.8 * rate).mean() > found.mean() < errors(1.2 * rate).mean()


def test_the_best_single_step_must_not_be_repeated():
  """Nor is 0.5 small enough for every prompt: few of them diverge, and the mean is theirs. 0.45 is."""
  x, y, best = drawn(10, 20, prompts=(20000,))
  single, half, steady = (np.square(gradient_descent(x, y, rate, 50) - best).sum(-1)
                          for rate in (best_rate(10, 20), 0.5, 0.45))
  np.testing.assert_allclose(single[[1, 2]].mean(1), [3.55, 2.12], rtol=0.03)
  assert single[5].mean() < 1.5 and single[10].mean() > 5 and single[20].mean() > 1e4
  np.testing.assert_allclose(np.sort(half[[10, 20]])[:, :-20].mean(1), [0.37, 0.1], rtol=0.1)
  assert half[50].mean() > 10
  np.testing.assert_allclose(steady[[10, 20, 50]].mean(1), [0.45, 0.127, 0.0112], rtol=0.1)


def test_floors_of_one_step_follow_the_formula():
  for of in (LinearPrompt(), WeightPrompt()):
    baselines = of.baselines(many(of, 256))
    assert abs(baselines['one step'] - 11 / 31) < 0.08 and baselines['least squares'] < 1e-6


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make, message', [
  (lambda: Regression(inputs=0), r'Regression\.inputs = 0'),
  (lambda: Regression(points=0), r'Regression\.points = 0'),
  (lambda: Regression(inputs=5, width=4), r'Regression\.width = 4.*set Regression\.width to 5'),
  (lambda: Regression(points=5, room=4), r'Regression\.room = 4.*set Regression\.room to 5'),
  (lambda: Regression(function=Sparse(kept=4), inputs=3), r'Regression\.inputs = 3.*kept=4.*to 4 or more'),
  (lambda: Linear(noise=-1.0), r'Linear\.noise = -1'),
  (lambda: Linear(noise=float('nan')), r'Linear\.noise = nan'),
  (lambda: Sparse(kept=0), r'Sparse\.kept = 0'),
  (lambda: Tree(depth=0), r'Tree\.depth = 0'),
  (lambda: Network(hidden=0), r'Network\.hidden = 0'),
  (lambda: Representation(layers=0), r'Representation\.layers = 0'),
  (lambda: Representation(features=0), r'Representation\.features = 0'),
  (lambda: Representation(slope=1.5), r'Representation\.slope = 1\.5'),
  (lambda: Represented(noise=-0.1), r'Represented\.noise = -0\.1'),
  (lambda: Autoregression(order=0), r'Autoregression\.order = 0'),
  (lambda: Autoregression(states=0), r'Autoregression\.states = 0'),
  (lambda: Autoregression(steps=2), r'Autoregression\.steps = 2.*set Autoregression\.steps to 3'),
  (lambda: Autoregression(noise=-1.0), r'Autoregression\.noise = -1'),
  (lambda: ChainOfThought(inputs=0), r'ChainOfThought\.inputs = 0'),
  (lambda: ChainOfThought(hidden=0), r'ChainOfThought\.hidden = 0'),
  (lambda: ChainOfThought(layers=0), r'ChainOfThought\.layers = 0'),
  (lambda: ChainOfThought(points=0), r'ChainOfThought\.points = 0'),
  (lambda: ChainOfThought(slope=-1.0), r'ChainOfThought\.slope = -1'),
  (lambda: LinearPrompt(inputs=0), r'LinearPrompt\.inputs = 0'),
  (lambda: LinearPrompt(examples=0), r'LinearPrompt\.examples = 0'),
  (lambda: WeightPrompt(examples=0), r'WeightPrompt\.examples = 0'),
])
def test_bad_fields_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
