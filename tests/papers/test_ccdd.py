"""CCDD: noise of latents and the ways back, cells with latents, what a batch and its number may know, and what is
drawn.
"""
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import ccdd as configuration
from loopformer import config as configs, plans
from loopformer.api import Loaded
from loopformer.cells.timed import Timed
from loopformer.diffusion.noise import Masking
from loopformer.diffusion.sampler import Denoiser, Moment
from loopformer.diffusion.terms import NELBO
from loopformer.inference import measures
from loopformer.model import Looped
from loopformer.nn.attention import SelfAttention
from loopformer.nn.blocks import Block, PeriNorm
from loopformer.nn.condition import Modulation, NoiseTime
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import MLP, Normal, RMSNorm, UnitNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.papers.ccdd.blocks import CrossAttention, Experts, TwoStreams
from loopformer.papers.ccdd.cell import GUESS, AdaFinal, Doubled, Summed, last_guess
from loopformer.papers.ccdd.encoders import Hidden, RandomContext, RandomTokens
from loopformer.papers.ccdd.measures import JointBound
from loopformer.papers.ccdd.plans import LATENTS, WithLatents, with_latents
from loopformer.papers.ccdd.prepare import Apart, Clean, Corrupted, Dynamic, Joint, Slower
from loopformer.papers.ccdd.process import DDIM, DDPM, VP, Flow, InverseSNR, Quadratic, Signal
from loopformer.papers.ccdd.sampler import Both, Coevolving, noise_of
from loopformer.papers.ccdd.terms import LatentError
from loopformer.tasks.generated import Generated, SymbolTokenizer
from loopformer.tasks.sudoku import Sudoku
from loopformer.terms.cross_entropy import CE
from loopformer.types import ConfigError
from tests import parts, quick
from tests.parts import close

V, D, C, T = 6, 16, 5, 8  # answers, of which MASK is the next id; width, channels of latents, tokens
PROCESSES = [VP(), Flow(), Quadratic()]


def block(mlp=MLP(hidden=24), norm=UnitNorm()) -> Block:
  return Block(attn=SelfAttention(heads=2, kernel=Bidirectional()), mlp=mlp, norm=norm)


def timed(layer) -> Timed:
  return Timed(Stack(layer, 2), NoiseTime(D), Modulation(2, init=Normal(0.1)))


def two() -> TwoStreams:
  return TwoStreams(tokens=block(), latents=block(), to_latents=CrossAttention(2), to_tokens=CrossAttention(2))


def model(cell, **options) -> Looped:
  return Looped(read_in=TokenEmbed(vocab=V + 1, width=D, length=T), cell=cell, read_out=Head(outputs=V), loops=2,
                sampler=Coevolving(latents=C, **options))


ENDS = dict(into=AdaFinal(D), guess=AdaFinal(C))
CELLS = {'sum': Summed(parts.recur(Add(), Stack(block(norm=RMSNorm()), 1)), **ENDS),
         'mdit': Summed(timed(block()), **ENDS), 'moe': Doubled(timed(block(Experts(MLP(hidden=24), top=1))), **ENDS),
         'mmdit': Doubled(timed(two()), **ENDS)}
CONTEXT = RandomContext(vocab=V - 2, length=T, context=C - V + 2)
MASKING = Masking(mask=V)


def batch(rows: int = 4) -> dict:
  """Sequences of which the first token is a prompt and the last two are padding."""
  targets = jnp.asarray(np.random.default_rng(0).integers(0, V - 2, (rows, T)), jnp.int32)
  weights = jnp.ones((rows, T)).at[:, 0].set(0).at[:, -2:].set(0)
  segments = jnp.ones((rows, T), jnp.int32).at[:, -2:].set(0)
  return {'tokens': targets, 'targets': targets, 'weights': weights, 'segments': segments,
          'positions': jnp.broadcast_to(jnp.arange(T), (rows, T))}


@functools.partial(jax.jit, static_argnums=0)
def answers(model, params, tokens, plan, seg=None):
  trace = model.apply({'params': params}, tokens, plan, seg=seg)
  return model.apply({'params': params}, trace.z, method='logits'), last_guess(trace.aux, plan.active)


def latents(rows: int = 4, seed: int = 0):
  return jax.random.normal(jax.random.key(seed), (rows, T, C))


def plan_of(z, time=0.5, loops: int = 2):
  t = jnp.broadcast_to(jnp.float32(time), len(z))
  return with_latents(plans.schedule(plans.resolve(loops)), z, t, t)


# Noise ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('process', PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize('update', [DDPM(), DDIM()], ids=lambda u: type(u).__name__)
def test_a_chain_with_the_true_latents_has_the_law_of_the_noise_at_every_time(process, update):
  rows, steps = 40_000, 8
  z0, keys = jnp.full((rows, 1, 1), 1.7), jax.random.split(jax.random.key(0), steps + 1)
  z = process.signal(1.0) * z0 + process.spread(1.0) * jax.random.normal(keys[-1], z0.shape)
  for j in range(steps):
    t, s = jnp.full(rows, 1 - j / steps), jnp.full(rows, 1 - (j + 1) / steps)
    z = update(process, z, z0, t, s, jax.random.normal(keys[j], z.shape))
    mean, spread = float(process.signal(s[0])) * 1.7, float(process.spread(s[0]))
    assert abs(float(z.mean()) - mean) < 5 * spread / rows ** 0.5 + 1e-5
    assert abs(float(z.std()) - spread) < 5 * spread / (2 * rows) ** 0.5 + 1e-5
  np.testing.assert_allclose(z, z0, atol=1e-5)


def test_a_step_has_the_coefficients_of_the_sheet():
  def one(value):
    return jnp.full((1, 1, 1), value)

  t, s = jnp.array([0.6]), jnp.array([0.5])
  z = DDPM()(VP(), one(0.4 ** 0.5 * 1.7), one(1.7), t, s, one(0.0))
  np.testing.assert_allclose(z, one(0.5 ** 0.5 * 1.7), rtol=1e-6)  # the mean stays on the way of the mean
  euler = DDIM()(Flow(), one(0.3), one(1.7), t, s, one(9.0))
  np.testing.assert_allclose(euler, 0.5 * 1.7 + 0.5 / 0.6 * (0.3 - 0.4 * 1.7), rtol=1e-6)
  np.testing.assert_allclose(Signal()(jnp.array([0.5, 0.99])), [2.0, 10.0])
  np.testing.assert_allclose(InverseSNR()(jnp.array([0.5, 0.99])), [1.0, 10.0])


@pytest.mark.parametrize('process', PROCESSES, ids=lambda p: type(p).__name__)
def test_noise_begins_with_nothing_and_ends_without_a_signal(process):
  ends = jnp.array([0.0, 1.0])
  np.testing.assert_allclose([process.signal(ends), process.spread(ends)], [[1, 0], [0, 1]], atol=1e-7)


# Cells ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', CELLS)
def test_latents_are_heard_once_they_are_learned_and_not_before(name):
  own = model(CELLS[name])
  params = parts.params(own)
  tokens, z, other = batch()['tokens'], latents(), latents(seed=1)
  one, two = (answers(own, params, tokens, plan_of(z)) for z in (z, other))
  assert all(float(jnp.abs(a - b).max()) > 1e-3 for a, b in zip(one, two))
  closed = {**params, 'cell': {**params['cell'], 'into': jax.tree.map(jnp.zeros_like, params['cell']['into'])}}
  one, two = (answers(own, closed, tokens, plan_of(z))[0] for z in (z, other))
  close(one, two, 0)


@pytest.mark.parametrize('name', ['sum', 'mdit'])
def test_with_unlearned_latents_it_is_the_cell_within(name):
  own, inner = model(CELLS[name]), model(CELLS[name].of)
  params = parts.params(own)
  first = parts.shapes(own)['cell']['into']['out']['kernel']
  assert first.shape == (C, D)
  closed = {**params, 'cell': {**params['cell'], 'into': jax.tree.map(jnp.zeros_like, params['cell']['into'])}}
  alone = {**params,
           'cell': {key: value for key, value in params['cell'].items() if key not in ('into', 'guess', 'clock')}}
  plan = plan_of(latents())
  expected = inner.apply({'params': alone}, batch()['tokens'], plan).z
  close(own.apply({'params': closed}, batch()['tokens'], plan).z, expected, 1e-6)


@pytest.mark.parametrize('name', CELLS)
def test_padding_is_not_heard_and_time_is(name):
  own = model(CELLS[name])
  params, one, z = parts.params(own), batch(), latents()
  given = answers(own, params, one['tokens'], plan_of(z), one['segments'])
  poked = answers(own, params, one['tokens'].at[:, -1].add(1), plan_of(z.at[:, -2:].add(3.0)), one['segments'])
  close(*(tuple(leaf[:, :-2] for leaf in found) for found in (given, poked)), 1e-6)
  later = answers(own, params, one['tokens'], plan_of(z, 0.9), one['segments'])
  assert float(jnp.abs(later[0] - given[0]).max()) > 1e-4


@pytest.mark.parametrize('name', CELLS)
def test_gradients_are_those_of_the_loss_where_every_sequence_has_its_time(name):
  smooth = Doubled(timed(block(Experts(MLP(hidden=24), top=2))), **ENDS)  # of two experts, so that no choice switches
  own = model(smooth if name == 'moe' else CELLS[name])
  params, one = parts.params(own), batch(2)
  plan = plan_of(latents(2), jnp.array([0.2, 0.7]))

  def loss(params):
    trace = own.apply({'params': params}, one['tokens'], plan, seg=one['segments'])
    return jnp.square(own.apply({'params': params}, trace.z, method='logits')).mean()

  direction = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(1).standard_normal(leaf.shape), leaf.dtype),
                           params)
  value = jax.jit(lambda size: loss(jax.tree.map(lambda leaf, way: leaf + size * way, params, direction)))
  slope = (float(value(1e-3)) - float(value(-1e-3))) / 2e-3
  gradient = jax.jit(jax.grad(loss))(params)
  assert float(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, direction)))) == pytest.approx(slope, rel=0.01)


@pytest.mark.parametrize('name', ['moe', 'mmdit'])
def test_doubled_operations_are_those_of_the_program(name):
  own = model(CELLS[name])
  params = parts.params(own)
  plan = plan_of(latents(1), loops=1)
  # all, so that nothing is cut
  program = jax.jit(lambda p: jax.tree.leaves(own.apply({'params': p}, batch(1)['tokens'], plan)))
  counted = program.lower(params).compile().cost_analysis()
  counted = (counted[0] if isinstance(counted, list) else counted)['flops']
  assert 0.85 < own.flops(T, 1) * T / counted < 1.25  # of so few tokens XLA turns some products into sums


def test_a_plan_with_latents_is_otherwise_the_one_within():
  of = plans.Staged(loops=(1, 3))
  own = WithLatents(of)
  assert not own.detached and WithLatents(plans.RandomSupervision(loops=4, graded=2)).detached
  assert (own.longest, own.expected, own.differentiated, own.stages) == (3, 3.0, 3.0, (1, 3))


def test_a_guess_is_that_of_the_last_step_of_each_sequence():
  aux = {GUESS: jnp.arange(3.0)[:, None, None, None] * jnp.ones((3, 2, T, C))}
  active = jnp.array([[True, True], [False, True], [False, True]])
  np.testing.assert_array_equal(last_guess(aux, active)[:, 0, 0], [0, 2])
  np.testing.assert_array_equal(last_guess(aux, jnp.array([True, True, False]))[:, 0, 0], [1, 1])
  np.testing.assert_array_equal(last_guess(aux, None)[:, 0, 0], [2, 2])


def test_experts_are_a_dense_mixture_and_one_alone_teaches_its_router():
  x = jax.random.normal(jax.random.key(0), (2, T, D))
  dense = Experts(MLP(hidden=24), top=2)
  params = jax.tree.map(lambda leaf: leaf * 20, dense.init(jax.random.key(1), x)['params'])
  share = jax.nn.softmax(x @ params['router']['kernel'])
  each = [MLP(hidden=24).apply({'params': jax.tree.map(lambda leaf: leaf[i], params['mlp'])}, x) for i in range(2)]
  close(dense.apply({'params': params}, x), sum(share[..., i:i + 1] * each[i] for i in range(2)), 1e-5)
  one = Experts(MLP(hidden=24), top=1)
  most = jnp.where((share[..., :1] > share[..., 1:]), share[..., :1] * each[0], share[..., 1:] * each[1])
  close(one.apply({'params': params}, x), most, 1e-5)
  grads = jax.grad(lambda p: jnp.square(one.apply({'params': p}, x)).sum())(params)
  assert float(jnp.abs(grads['router']['kernel']).max()) > 1e-3


# Batches -------------------------------------------------------------------------------------------------------------


def joint(**options) -> Joint:
  return Joint(**{'masking': MASKING, 'encoder': CONTEXT, **options})


def prepared(part, rows=8, given=None):
  return _prepared(part, batch(rows) if given is None else given)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(part, given):
  return part(parts.plan_context(jax.random.key(3), given))


def test_latents_of_clean_sequences_know_what_is_hidden_and_those_of_corrupted_do_not():
  one = batch(8)
  hidden = np.asarray(prepared(joint())['tokens'] == V)
  row = int(hidden.any(-1).argmax())
  column = int(hidden[row].argmax())
  other = {**one, 'targets': one['targets'].at[row, column].set((one['targets'][row, column] + 1) % (V - 2))}
  for source, knows in ((Clean(), True), (Corrupted(), False)):
    a, b = (prepared(joint(source=source), given=given) for given in (one, other))
    np.testing.assert_array_equal(a['tokens'], b['tokens'])
    assert bool((a[LATENTS] != b[LATENTS]).any()) is knows
    assert float(jnp.abs(a['latent_targets'] - b['latent_targets']).max()) > 0.1  # of what is guessed, the truth


def test_a_share_of_hidden_tokens_shows_no_latents():
  class Still(VP):
    """Without noise, so that zeros are seen."""

    def signal(self, t):
      return jnp.ones_like(t)

    def spread(self, t):
      return jnp.zeros_like(t)

  made = prepared(joint(source=Clean(least=1.0, most=1.0), process=Still()), rows=64)
  zero, hidden = (made[LATENTS] == 0).all(-1), made['tokens'] == V
  np.testing.assert_array_equal(zero, hidden)
  half = prepared(joint(source=Clean(least=0.0, most=1.0), process=Still()), rows=256)
  zero, hidden = (half[LATENTS] == 0).all(-1), half['tokens'] == V
  assert not (zero & ~hidden).any() and 0.4 < float(zero.sum() / hidden.sum()) < 0.6


def test_times_and_weights():
  made = {name: prepared(joint(**options), rows=64) for name, options in {
      'bound': {}, 'dynamic': {'weights': Dynamic()}, 'apart': {'times': Apart()},
      'slower': {'times': Slower(power=2.0)}}.items()}
  time, hidden = made['bound']['time'], made['bound']['tokens'] == V
  np.testing.assert_allclose(made['bound']['weights'], jnp.where(hidden, 1 / time[:, None], 0), rtol=1e-5)
  np.testing.assert_allclose(made['dynamic']['weights'], jnp.where(hidden, 2 * (1 - time[:, None]), 0), rtol=1e-4,
                             atol=1e-6)
  np.testing.assert_array_equal(made['bound']['latent_time'], time)
  np.testing.assert_allclose(made['slower']['latent_time'], jnp.maximum(time ** 2, MASKING.least), rtol=1e-5)
  assert abs(np.corrcoef(made['apart']['latent_time'], made['apart']['time'])[0, 1]) < 0.5
  dropped = prepared(joint(drop=0.5), rows=256)
  assert 0.35 < float((dropped[LATENTS] == 0).all((1, 2)).mean()) < 0.65


OBJECTIVE = Objective(rolls={'all': Rollout(WithLatents(plans.Uniform(2)))}, prepare=joint(),
                      terms={'tokens': Weighted(1.0, NELBO(roll='all')),
                             'latents': Weighted(1.0, LatentError(roll='all'))})


OBJECTIVES = {'context': OBJECTIVE,
              'tokens': dataclasses.replace(OBJECTIVE, prepare=joint(encoder=RandomTokens(vocab=V, width=C)))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def losses(own, name, params, given):
  objective = OBJECTIVES[name]
  context = objective.prepared(parts.plan_context(jax.random.key(3), given))
  return objective(own, params, context, objective.denominators(context.batch))[1]


def test_padding_is_in_neither_loss_and_both_teach():
  own = model(CELLS['sum'])
  params, one = parts.params(own), batch()
  other = {**one, 'targets': one['targets'].at[:, -1].set(0)}
  close(losses(own, 'tokens', params, one), losses(own, 'tokens', params, other), 1e-5)
  grads = jax.grad(lambda p: sum(losses(own, 'context', p, one).values()))(params)
  assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads['cell']))


ON_TWO = """
import sys
import numpy as np
from loopformer import sharding
from tests.papers import test_ccdd
measure = test_ccdd.JointBound(mask=test_ccdd.V, encoder=test_ccdd.Hidden(folder=sys.argv[1], width=test_ccdd.C))
mesh = sharding.Mesh(data=2, fsdp=1, tensor=1).make()
given = {**test_ccdd.batch(), 'row': np.arange(4, dtype=np.int32)}
one, two = (measure.asked(rows)['latents'] for rows in (given, sharding.spread(given, mesh)))
assert len(two.sharding.device_set) == 2
np.testing.assert_allclose(one, two, atol=1e-4)
"""


def test_an_encoder_is_the_model_of_a_folder_and_does_not_learn(tmp_path):
  encoder = parts.looped(parts.plain(kernel=Bidirectional()))
  weights = parts.params(encoder)
  config = dataclasses.replace(configuration.get_config(), model=encoder, objective=Objective(
      rolls={'all': Rollout(plans.Uniform(2))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
      task=Generated(of=Sudoku()))
  Loaded(encoder, weights, None, config).save(tmp_path / 'encoder')
  hidden = Hidden(folder=str(tmp_path / 'encoder'), width=C)
  part = joint(encoder=hidden)
  objective = dataclasses.replace(OBJECTIVE, prepare=part)
  assert MASKING.teacher is None
  (name, teacher), = objective.teachers.items()
  assert name == hidden.teacher.name and teacher.model(None) == encoder
  context = parts.plan_context(jax.random.key(3), batch())
  made = objective.prepared(context, {name: weights}).batch
  z = made['latent_targets']
  np.testing.assert_allclose([z.mean(-1), z.var(-1)], [jnp.zeros((4, T)), jnp.ones((4, T))], atol=1e-3)
  grads = jax.grad(lambda w: objective.prepared(context, {name: w}).batch[LATENTS].sum())(weights)
  assert all(not leaf.any() for leaf in jax.tree.leaves(grads))
  with pytest.raises(ConfigError, match='no weights of'):
    objective.prepared(context)
  measured = JointBound(mask=V, encoder=hidden).asked(batch())
  assert measured[LATENTS].shape == (4, T, C)
  # Batches that are divided over devices find the encoder's weights on these.
  parts.python(ON_TWO, hidden.folder, XLA_FLAGS=f'{quick.FLAGS} --xla_force_host_platform_device_count=2')
  z = measured[LATENTS]
  Loaded(encoder, jax.tree.map(lambda leaf: 0 * leaf, weights), None, config).save(tmp_path / 'other')
  shutil.rmtree(tmp_path / 'encoder/checkpoints')  # its run has gone on
  (tmp_path / 'other/checkpoints').rename(tmp_path / 'encoder/checkpoints')
  (tmp_path / 'encoder/checkpoints/0').rename(tmp_path / 'encoder/checkpoints/8')
  assert float(jnp.abs(JointBound(mask=V, encoder=hidden).asked(batch())[LATENTS] - z).max()) > 0.1
  with pytest.raises(ConfigError, match=r'Hidden\.width = 17'):
    Hidden(folder=str(tmp_path / 'encoder'), width=D + 1)(batch()['tokens'], None, weights)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_a_number_of_clean_latents_is_no_bound_and_says_so():
  clean, corrupted = (JointBound(mask=V, encoder=CONTEXT, source=source) for source in (Clean(), Corrupted()))
  total = {'nll': 6.0, 'squares': 20.0, 'tokens': 12.0, 'right': 3.0, 'weight': 12.0, 'rows': 2.0, 'bytes': 0.0}
  assert measures.main_number(clean) == 'conditional' and measures.main_number(corrupted) == 'loss'
  assert 'loss' not in clean.row(total) and 'perplexity' not in clean.row(total)
  assert clean.row(total)['conditional'] == corrupted.row(total)['loss'] == 0.5
  asked = clean.asked(batch())
  plan = clean.told(plans.schedule((0.5, 0.5)), asked)
  np.testing.assert_array_equal(plan.rows[LATENTS][1], asked[LATENTS])
  np.testing.assert_array_equal(clean.asked(batch())[LATENTS], asked[LATENTS])  # the same for all models and depths


def test_latents_that_are_apart_have_a_time_for_every_mask_of_every_sequence():
  """Not one for a place, which all masks of it, and all batches, would share; the same whenever it is asked for."""
  measure = JointBound(mask=V, encoder=CONTEXT, times=Apart(), draws=8)
  reversed_ = {**batch(64), 'targets': batch(64)['targets'][::-1]}
  one, other = (np.asarray(measure.asked(given)['latent_time']) for given in (batch(64), reversed_))
  assert len(one) == 512 and len(set(one.tolist())) > 500  # the least is cut off
  assert (one != other).mean() > 0.98
  np.testing.assert_array_equal(np.asarray(measure.asked(batch(64))['latent_time']), one)
  assert abs(one.mean() - 0.5) < 3.5 * (1 / 12 / 512) ** 0.5


# Sampling ------------------------------------------------------------------------------------------------------------


SYMBOLS = SymbolTokenizer(tuple('abcde.'))


def texts(own, requests, **options):
  denoiser = Denoiser(own, parts.params(own), SYMBOLS, rows=3, **options)
  for request in requests:
    denoiser.submit('a', max_new_tokens=6, **request)
  return denoiser.run()


@pytest.mark.parametrize('options', [{}, {'update': DDPM(), 'process': Flow(), 'guidance': 0.5}],
                         ids=['ddim', 'ddpm, guided'])
def test_what_is_written_depends_on_the_request_alone(options):
  own = model(CELLS['sum'], **options)
  requests = [{'steps': 4, 'seed': 1, 'number': 0}, {'steps': 7, 'seed': 2, 'number': 5},
              {'steps': 1, 'seed': 3, 'number': 9}]
  together = texts(own, requests)
  assert together == texts(own, requests)
  assert [text for request in reversed(requests) for text in texts(own, [request])] == together[::-1]
  assert len(set(together)) > 1


def test_guidance_of_no_weight_is_the_plain_pass_and_latents_follow_the_guess():
  own = model(CELLS['mdit'])
  params, z = parts.params(own), latents(2)
  tokens = jnp.full((2, T), V, jnp.int32)
  plan = plans.schedule(plans.resolve(2))
  plan = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], 2, 1), plan.replace(active=jnp.ones(2, bool)))
  keys = jax.random.split(jax.random.key(0), 2)
  moment = Moment(step=jnp.array([1, 1]), steps=jnp.array([4, 4]), active=jnp.array([True, False]), keys=keys)
  seg = jnp.ones((2, T), jnp.int32)
  logits, new = Both(own, params, plan, seg, VP(), DDIM())(tokens, z, moment)
  expected, guess = answers(own, params, tokens, plan_of(z, 0.75))
  close(logits[0], expected[0], 1e-5)
  close(new[0], DDIM()(VP(), z[:1], guess[:1], jnp.array([0.75]), jnp.array([0.5]), 0.0)[0], 1e-5)
  close(new[1], z[1], 0)  # a sequence without steps left
  # Latents that decay slower than tokens are told, and brought to, times of their own.
  slower = Both(own, params, plan, seg, VP(), DDIM(), times=Slower(power=2.0))(tokens, z, moment)[1]
  guess = answers(own, params, tokens, with_latents(plans.schedule(plans.resolve(2)), z, jnp.full(2, 0.75),
                                                          jnp.full(2, 0.5625)))[1]
  close(slower[0], DDIM()(VP(), z[:1], guess[:1], jnp.array([0.5625]), jnp.array([0.25]), 0.0)[0], 1e-5)
  without = answers(own, params, tokens, plan_of(jnp.zeros_like(z), 0.75))[0]
  guided = Both(own, params, plan, seg, VP(), DDIM(), guidance=0.5)(tokens, z, moment)[0]
  close(guided[0], (1.5 * expected - 0.5 * without)[0], 1e-4)


def test_noise_of_a_position_is_its_own():
  keys = jax.random.split(jax.random.key(0), 3)
  np.testing.assert_array_equal(noise_of(keys, 8, C)[:, :5], noise_of(keys, 5, C))
  drawn = noise_of(jax.random.split(jax.random.key(1), 200), 8, C)
  assert abs(float(drawn.mean())) < 0.05 and abs(float(drawn.std()) - 1) < 0.05


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make, message', [
    (lambda: configuration.get_config('cpu,noise=fast'), 'noise'),
    (lambda: configuration.get_config('cpu,kind=dit'), 'kind'),
    (lambda: configuration.get_config('cpu,experts=3'), 'experts'),
    (lambda: Clean(least=0.5, most=0.2), r'Clean\.most = 0.2'),
    (lambda: joint(drop=1.0), r'Joint\.drop = 1.0'),
    (lambda: Slower(power=0.0), r'Slower\.power = 0.0'),
    (lambda: RandomTokens(vocab=4, width=1), r'RandomTokens\.width = 1'),
    (lambda: CONTEXT(jnp.zeros((1, T + 1), jnp.int32), None, None), r'RandomContext\.length = 8'),
    (lambda: Coevolving(latents=C).score(None, None, None), 'depends on the latents beside it'),
    (lambda: Coevolving(latents=C, steps=0), r'sampler\.steps = 0'),
    (lambda: Experts(MLP(hidden=4), top=3).init(jax.random.key(0), jnp.zeros((1, 1, 4))), r'Experts\.top = 3'),
    (lambda: WithLatents(plans.Uniform(2))(parts.plan_context(jax.random.key(0), batch())), 'the batch has no latents'),
    (lambda: LatentError(roll='all').weight(batch()), 'makes no latents'),
    (lambda: TwoStreams(tokens=Block(attn=SelfAttention(heads=2), mlp=MLP(hidden=4), placement=PeriNorm()),
                        latents=block(), to_latents=CrossAttention(2), to_tokens=CrossAttention(2)).check(D, ''),
     'PeriNorm'),
    (lambda: configs.check(dataclasses.replace(configuration.get_config(), model=configuration.get_config().model.clone(
        cell=Summed(configuration.get_config().model.cell.of, into=AdaFinal(31), guess=AdaFinal(8))))),
     r'into\.features = 31'),
])
def test_bad_values_are_named(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
