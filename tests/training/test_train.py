"""The loop around the training step: what is drawn and when, the order of the data, whose rows are whose, clocks."""
import dataclasses
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loopformer import config as configs, plans, sharding
from loopformer.data import batches as data
from loopformer.inference.evaluate import Depths
from loopformer.objective import AsGiven, Objective, Rollout, Weighted
from loopformer.optim import AdamW, WarmupCosine
from loopformer.starts import Noise
from loopformer.tasks.generated import Generated, sequence
from loopformer.terms.cross_entropy import CE
from loopformer.training import metrics, processes, train as training
from loopformer.training.checkpoint import Checkpoints
from loopformer.types import ConfigError, config_dataclass
from tests import parts
from tests.parts import T, V


@config_dataclass
class Noises:
  """Texts of tokens without sense."""
  length: int = T
  symbols: tuple[str, ...] = tuple(map(str, range(V)))

  def __call__(self, rng):
    return sequence(rng.integers(0, V, T + 1), [False, *(rng.uniform(size=T) < 0.7)], T, V - 1)

  def baselines(self, examples):
    return {}


# States start from noise, and steps are as many as is drawn.
CONFIG = configs.Experiment(
    name='tiny', model=parts.looped(parts.plain(1), start=Noise(std=0.3)), task=Generated(of=Noises(), held_out=8),
    objective=Objective(rolls={'all': Rollout(plans.RandomDepth(4))}, terms={'lm': Weighted(1.0, CE(roll='all'))}),
    optim=AdamW(schedule=WarmupCosine(peak=1e-2, end=1e-3, warmup=1)), evals=Depths(budgets=(1,)),
    train=training.Train(steps=6, batch=4, log_every=1, eval_every=3, eval_batches=1, save_every=3))


def setting(**changes):
  return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


def run(config, workdir):
  return training.train(config, workdir, lambda line: None)


# Randomness ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  """(work folder, the state at the end) of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('uninterrupted')
  return workdir, run(CONFIG, workdir)


def told(workdir, kind):
  """What was logged, without what a clock measured."""
  clocks = ('tokens_per_s', 'mfu', 'seconds', 'memory')
  return [{name: value for name, value in row.items() if not name.startswith(clocks)}
          for row in metrics.read_rows(workdir / 'metrics.jsonl') if row['kind'] == kind]


def test_a_resumed_run_is_the_uninterrupted_one(uninterrupted, tmp_path):
  """Bit for bit: weights, optimiser, what is reported of every step, and what is drawn in it."""
  workdir, end = uninterrupted
  shutil.copytree(workdir, tmp_path / 'resumed')
  shutil.rmtree(tmp_path / 'resumed/checkpoints/6')
  again = run(CONFIG, tmp_path / 'resumed')
  jax.tree.map(np.testing.assert_array_equal, (again.params, again.optimizer, again.step),
               (end.params, end.optimizer, end.step))
  for kind, steps in (('train', [1, 2, 3, 4, 5, 6]), ('eval', [3, 6]), ('loops', [3, 6])):
    assert told(tmp_path / 'resumed', kind) == told(workdir, kind)
    assert [row['step'] for row in told(workdir, kind)] == steps


@dataclasses.dataclass(frozen=True)
class Drawn:
  """An objective whose loss is a number that is drawn."""
  teachers = {}

  def prepared(self, context):
    return context

  def denominators(self, batch):
    return {}

  def __call__(self, model, params, context, denominators, frozen):
    loss = jax.random.uniform(context.key) + 0 * params['w'].sum()
    numbers = {'step': context.step, 'keys': jax.random.bits(context.keys()[0]),
               'rows': (10 ** context.batch['row']).sum()}
    return loss, {name: number.astype(jnp.float32) for name, number in numbers.items()}


def test_what_a_step_draws_comes_from_the_seed_and_its_number():
  mesh, optimizer = sharding.Mesh().make(jax.devices()[:1]), optax.sgd(0.1)  # which knows nothing of stages

  def drawn(seed, *numbers):
    step = training.make_step(CONFIG.model, Drawn(), optimizer, mesh, seed=seed)
    for number in numbers:
      weights = {'w': jnp.ones(2)}
      state = training.State(step=jnp.int32(number), params=weights, optimizer=optimizer.init(weights))
      new, values = step(state, {'tokens': jnp.zeros((4, T), jnp.int32)})
      assert int(new.step) == number + 1 and int(values['step']) == number
      assert int(values['rows']) == 1111  # as they stand in the batch, where it does not number them
      yield float(values['loss']), float(values['keys'])

  first = list(drawn(0, 0, 1, 2))
  for one in zip(*first, *drawn(1, 0)):
    assert len(set(one)) == 4
  assert list(drawn(0, 2, 0)) == [first[2], first[0]]


def test_weights_start_from_the_seed():
  start = jax.jit(lambda seed: training.init_state(CONFIG.model, optax.sgd(0.1), seed).params)
  first, other, again = (jax.tree.leaves(start(seed)) for seed in (0, 1, 0))
  assert any((a != b).any() for a, b in zip(first, other))
  assert all((a == b).all() for a, b in zip(first, again))


# Data ----------------------------------------------------------------------------------------------------------------


def watch(monkeypatch, step=lambda state, batch: None):
  """The batches that training steps and evaluations get, as they come; instead of a step `step` is called, and nothing
  is evaluated."""
  seen = {'train': [], 'validation': []}

  def fake(state, batch, stage=0, frozen={}):
    seen['train'].append(jax.device_get(batch))
    step(state, batch)
    return state.replace(step=state.step + 1), {name: jnp.float32(0) for name in ('loss', 'lm', 'grad_norm', 'stop')}

  def evaluated(model, params, batches, *rest):
    seen['validation'].append(jax.device_get(list(batches)))
    return [{'budget': 1, 'schedule': '1', 'loss': 0.0}]

  monkeypatch.setattr(training, 'make_step', lambda *arguments, **options: fake)
  monkeypatch.setattr(training, 'evaluate', evaluated)
  monkeypatch.setattr(training, 'motion', lambda *arguments: {})
  return seen


def batches_of(config, workdir, monkeypatch):
  """Those of a run: (tokens of all training batches, of all evaluations)."""
  seen = watch(monkeypatch)
  run(config, workdir)
  return (np.stack([batch['tokens'] for batch in seen['train']]),
          np.stack([[batch['tokens'] for batch in batches] for batches in seen['validation']]))


def test_the_order_of_data_comes_from_the_seed(tmp_path, monkeypatch):
  def of(seed, folder):
    return batches_of(setting(seed=seed), tmp_path / folder, monkeypatch)

  (first, held), (again, held_again), (other, held_other) = of(0, 'a'), of(0, 'b'), of(1, 'c')
  np.testing.assert_array_equal(first, again)
  assert (first[0] != other[0]).any()
  for later in (held_again, held_other):  # runs are compared on the same texts
    np.testing.assert_array_equal(held, later)
  assert len({batch.tobytes() for batch in first}) == 6
  shutil.rmtree(tmp_path / 'b/checkpoints/6')
  np.testing.assert_array_equal(of(0, 'b')[0], first[3:])


def test_rows_of_processes_alternate_in_the_global_batch(tmp_path, monkeypatch):
  """A sequence keeps its number, from which is drawn for it, whoever reads it."""
  readers = 2
  whole = watch(monkeypatch)
  run(setting(steps=2), tmp_path / 'one')
  assert [batch['row'].tolist() for batch in (*whole['train'], *whole['validation'][0])] == [[0, 1, 2, 3]] * 3
  for reader in range(readers):
    monkeypatch.setattr(processes, 'readers', lambda mesh, reader=reader: (reader, readers))
    own = watch(monkeypatch)
    run(setting(steps=2), tmp_path / f'{reader}')
    for kind in ('train', 'validation'):
      for mine, all_ in zip(jax.tree.leaves(own[kind]), jax.tree.leaves(whole[kind])):
        np.testing.assert_array_equal(mine, all_[reader::readers])


# Clocks --------------------------------------------------------------------------------------------------------------


def test_time_is_counted_as_what_it_was_spent_on(tmp_path, monkeypatch):
  """A step takes a second, its data ten, an evaluation a hundred and a save a thousand; speed is that of steps and
  their data."""
  now = [0.0]

  def after(seconds, call):
    def timed(*arguments, **options):
      now[0] += seconds
      return call(*arguments, **options)
    return timed

  class Stream:
    """Batches without end."""
    def __iter__(self):
      return self

    def __next__(self):
      now[0] += 10
      return {name: np.asarray(rows) for name, rows in parts.batch().items()}

    def get_state(self):
      return {}

  watch(monkeypatch, step=after(1, lambda state, batch: None))
  monkeypatch.setattr(training, 'evaluate', after(100, training.evaluate))
  monkeypatch.setattr(Checkpoints, 'save', after(1000, Checkpoints.save))
  monkeypatch.setattr(data, 'batches', lambda *arguments, **options: Stream())
  monkeypatch.setattr(training, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))
  monkeypatch.setattr(metrics, 'peak_flops', lambda: (1e6, 'a sheet'))
  run(setting(steps=9, log_every=2, eval_every=4, save_every=4), tmp_path)
  rows = [row for row in metrics.read_rows(tmp_path / 'metrics.jsonl') if row['kind'] == 'train']
  assert [row['step'] for row in rows] == [1, 2, 4, 6, 8, 9] and 'seconds_per_step' not in rows[0]
  # Steps 1 and 2 have begun when the first is read, from which on is counted.
  total = sum(row['seconds_per_step'] * (row['step'] - before['step']) for before, row in zip(rows, rows[1:]))
  assert total == pytest.approx(7 * 11)
  spent = {what: sum(row[f'seconds/{what}'] for row in rows[1:]) for what in ('data', 'step', 'eval', 'save')}
  assert spent == pytest.approx({'data': 7 * 10, 'step': 7, 'eval': 2 * 100, 'save': 2 * 1000})
  per_token = CONFIG.objective.flops(CONFIG.model, T)
  for row in rows[1:]:
    assert row['tokens_per_s'] == pytest.approx(4 * T / row['seconds_per_step'])
    assert row['mfu'] == pytest.approx(row['tokens_per_s'] * per_token / 1e6 / jax.device_count())


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, value', [('batch', 0), ('steps', 0), ('seed', -1), ('keep', 0), ('accumulate', -2)])
def test_numbers_out_of_range_are_refused(name, value):
  with pytest.raises(ConfigError,
                     match=rf'train\.{name} = {value}: must be {"0 to" if name == "seed" else "1 or more"}'):
    training.Train(**{name: value})
  training.Train(**{name: 0 if name == 'seed' else 1})


@pytest.mark.parametrize('count, told', [(0.4, '0'), (57.3, '57'), (999.4, '999'), (999.6, '1.0k'), (1540, '1.5k'),
                                         (999_600, '1.0M'), (2.34e6, '2.3M')])
def test_speeds_are_told_in_three_digits(count, told):
  assert metrics.rounded(count) == told


@pytest.mark.parametrize('name, arguments, changes, message', [
    ('cot_or_loop', 'cpu,kind=thought', 'task.of.thoughts=2', 'puts 8 thoughts into the places of fillers'),
    ('cot_or_loop', 'cpu,kind=thought', 'model.cell.filler=0', 'row 0 has .* tokens of a problem and .* fillers'),
    ('padded', 'cpu,loops=log', 'objective.rolls.all.plan.size=8',
     'LogDepth.size = 8: the batch has an input of size 16,'),
    ('padded', 'cpu,task=s3', 'model.read_out.outputs=3', 'outputs = 3: the task asks for the answer 5,'),
    ('loopformer', 'pointers,kind=tmlt', 'task.of.hops=9', r'model.read_in.inputs = 16: .* \(64, 8, 17\)')])
def test_examples_that_the_model_makes_nothing_of(name, arguments, changes, message, tmp_path):
  """Before a step: such runs went on in silence, or ended with a loss that is no number, or another package's error."""
  config = configs.load(f'{name}:{arguments}', [changes, 'train.eval_batches=1', 'task.held_out=64'])
  configs.check(config)
  with pytest.raises(ConfigError, match=message):
    run(config, tmp_path)


def test_examples_are_judged_as_the_step_reads_them():
  """Not where a preparation changes them, a batch has no answers a place, or a teacher takes the steps."""
  asked = []
  cell = types.SimpleNamespace(check_tokens=lambda tokens, steps, segments: asked.append(steps))

  def roll(steps, teacher=None):
    return types.SimpleNamespace(plan=plans.Uniform(steps), teacher=teacher)

  def check(batch, prepare=AsGiven()):
    rolls = {'own': roll(2), 'taught': roll(8, teacher='one')}
    training._check_batch(types.SimpleNamespace(model=types.SimpleNamespace(outputs=4, cell=cell),
                                                objective=types.SimpleNamespace(prepare=prepare, rolls=rolls)), batch)

  tokens, four = np.zeros((2, 3), int), np.full((2, 3), 4)
  with pytest.raises(ConfigError, match='asks for the answer 4'):
    check({'tokens': tokens, 'targets': four, 'weights': np.ones((2, 3))})
  assert asked == []
  check({'tokens': tokens, 'targets': four, 'weights': np.ones((2, 3))}, prepare=lambda context: context.batch)
  assert asked == []
  for batch in ({'weights': np.ones((2, 3))}, {'targets': four}, {'targets': four[:, 0], 'weights': np.ones((2, 3))},
                {'targets': four, 'weights': np.zeros((2, 3))}):
    check({'tokens': tokens, **batch})
  assert asked == [2] * 4
