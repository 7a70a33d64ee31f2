"""All systems on equal terms: what is equal is counted, and the best rate is taken."""
import dataclasses
import json

import jax
import pytest

from experiments.configs import leaderboard
from experiments.studies import leaderboard as study
from experiments.tools import command, estimate
from loopformer import config as configs
from loopformer.model import parameter_shapes
from loopformer.types import ConfigError

SYSTEMS = tuple(study.names_of('text'))


def config_of(name, more=''):
  return leaderboard.get_config(f'cpu,system={name}{more}' + (',start=there' if name in leaderboard.BEGINS else ''))


def sizes(config):
  shapes = parameter_shapes(config.model)
  return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in shapes.items()}


@pytest.mark.parametrize('size', leaderboard.SIZES)
def test_every_system_is_a_configuration(size):
  for name in SYSTEMS:
    for task in leaderboard.TASKS:
      if task == 'text' or name != 'diffusion':
        start = ',start=there' if name in leaderboard.BEGINS else ''
        configs.check(leaderboard.get_config(f'{size},system={name},task={task}{start}'))


def test_blocks_are_equal_but_for_what_a_system_adds():
  block = sizes(config_of('base_loop'))['cell']
  for name in SYSTEMS:
    own = sizes(config_of(name))['cell']
    if name == 'base':
      assert own == 4 * block
    elif name in ('base_loop', 'once', 'early_exit', 'middle', 'ilr', 'algoformer', 'shift', 'decoder', 'diffusion'):
      assert own == block, name
    elif name in ('tmlt', 'loopformer', 'melt', 'plt', 'mor', 'mor_token', 'parcae', 'huginn', 'ouro', 'loopus'):
      assert 0.99 * block < own < 1.8 * block, name  # conditioning, gates, injections
    else:
      raise AssertionError(f'{name} is not looked at')


def test_operations_are_those_that_run():
  counted = {name: estimate.step_flops(config_of(name)) for name in (
      'once', 'base', 'base_loop', 'ilr', 'middle', 'ouro', 'loopformer')}
  config = config_of('base_loop')
  tokens, width, layers, loops = config.train.batch * config.task.length, 64, 2, 4
  matrices = 2 * (4 * width ** 2 + 2 * width * 4 * width) * layers * loops + 2 * width * 1024
  products = counted['base_loop'] / tokens / 3  # forward, and twice that
  assert matrices < products <= matrices + 4 * config.task.length * width * layers * loops  # the rest is attention
  assert counted['base'] == pytest.approx(counted['base_loop'], rel=1e-6) == counted['ilr']
  head = 3 * 2 * width * 1024 * tokens
  assert counted['base_loop'] - counted['once'] == pytest.approx(3 * (counted['once'] - head) , rel=0.02)
  assert counted['middle'] > counted['base_loop'] + 0.9 * (counted['base_loop'] - head) / loops  # two layers more
  assert counted['ouro'] == pytest.approx(counted['base_loop'] + 3 * head, rel=0.02)  # a head for every loop
  mean = sum(range(1, loops)) / (loops - 1)  # of the short trajectory's steps
  short = (counted['base_loop'] - head) * mean / loops + head
  assert counted['loopformer'] == pytest.approx(counted['base_loop'] + short, rel=0.05)


def test_shift_loops_in_the_second_half_of_its_run():
  config = config_of('shift', ',steps=300')
  state = config.control.start()
  assert config.train.eval_every == 150 and config.control.stage(state) == 0
  told = {f'{name}@{loops}': 1.0 for name in ('loss', 'grad_norm') for loops in (1, 4)}
  state = config.control.watch(state, 149, told)
  assert config.control.stage(state) == 0
  assert config.control.stage(config.control.watch(state, 150, told)) == 1
  assert config_of('once', ',steps=300').train.eval_every == 300
  assert estimate.shares(config) == {0: 0.5, 1: 0.5} and estimate.shares(config_of('once', ',steps=300')) == {0: 1.0}
  assert estimate.shares(config_of('shift', ',steps=301')) == {0: 150 / 301, 1: 151 / 301}
  forever = dataclasses.replace(config, control=dataclasses.replace(config.control, longest=None))
  assert estimate.shares(forever) == {0: 1.0}


def test_a_run_is_counted_over_its_stages():
  """Whatever it is called: the operations of one loop and of all, by the shares of steps."""
  once, looped = (estimate.step_flops(config_of(name)) for name in ('once', 'base_loop'))
  config = config_of('shift', ',steps=300')
  assert estimate.step_flops(config) == pytest.approx((once + looped) / 2, rel=1e-6)
  early = dataclasses.replace(config, control=dataclasses.replace(config.control, longest=0))
  assert estimate.step_flops(early) == pytest.approx(looped, rel=1e-6)


class Flags:
  """What the study reads of its flags."""

  def __init__(self, workdir):
    self.workdir, self.changes = str(workdir), []

  def __getitem__(self, name):
    return type('Flag', (), {'value': self.changes})


def test_the_best_rate_is_taken_and_those_that_follow_share_the_budget(tmp_path, monkeypatch):
  losses = {'0.001': 3.0, '0.003': 2.0, '0.01': None}  # None: it was not finite
  calls = []

  def train(spec, folder, *changes):
    calls.append((spec, folder, changes))
    folder.mkdir(parents=True, exist_ok=True)
    rate = next(loss for rate, loss in losses.items() if f'rate={rate},' in spec)
    loops = 1 if 'system=once' in spec or 'system=base,' in spec else 4
    (folder / 'metrics.jsonl').write_text(json.dumps({'kind': 'eval', 'step': 1, f'loss@{loops}': rate}) + '\n')

  monkeypatch.setattr(command, 'train', train)
  monkeypatch.setattr(study, 'FLAGS', Flags(tmp_path))
  monkeypatch.setattr(study.configs, 'read', lambda folder: config_of('ouro'))
  made = study.Study('cpu', 'text', 100, 0.25, (1e-3, 3e-3, 1e-2))
  made.sweep('ouro')
  assert made.short['ouro'] == {1e-3: 3.0, 3e-3: 2.0, 1e-2: float('inf')} and made.rate('ouro') == 3e-3
  ratio = made.flops('base') / made.flops('ouro')
  assert f'steps={round(25 * ratio)}' in calls[0][0] and made.steps('base', 1.0) == 100
  calls.clear()
  made.sweep('melt')
  (first, parent, _), (second, _, _) = calls[:2]
  assert 'system=ouro' in first and 'rate=0.003' in first and f'steps={round(12.5 * ratio)}' in first
  assert f'start={parent}' in second and f'steps={made.steps("melt", 0.125)}' in second
  halves = (made.flops('once') + made.flops('base_loop')) / 2
  assert made.steps('shift', 1.0) == round(100 * made.flops('base') / halves)
  assert study.Study('cpu', 'text', 100, 0.25, (5e-3,)).budget == made.budget


def test_a_run_of_another_configuration_is_not_taken_for_the_one_that_is_asked_for(tmp_path, monkeypatch):
  calls, flags = [], Flags(tmp_path)
  monkeypatch.setattr(command, 'train', lambda spec, folder, *changes: calls.append(changes))
  monkeypatch.setattr(study, 'FLAGS', flags)
  monkeypatch.setattr(study, 'trained', lambda folder: 100 if (folder / 'config.json').exists() else None)
  made = study.Study('cpu', 'p_hop', 100, 0.25, (3e-3,))
  folder = made.train('base', 3e-3, 0, 1.0)
  configs.save(configs.load(made.spec('base', rate=3e-3, steps=100), calls.pop()), folder)
  assert made.train('base', 3e-3, 0, 1.0) == folder and not calls
  flags.changes = ['optim.decay=0.5']
  assert made.train('base', 3e-3, 0, 1.0) == folder and calls == [('optim.decay=0.5', 'train.seed=0')]
  flags.changes = []
  study.Study('small', 'p_hop', 100, 0.25, (3e-3,)).train('base', 3e-3, 0, 1.0)
  assert len(calls) == 2


@pytest.mark.parametrize('check', [
    lambda: command.check_whole(seeds=['0', '1', '00']),
    lambda: command.check_chosen('systems', ['base', 'base'], SYSTEMS)])
def test_what_is_given_twice_does_not_count_twice(check):
  with pytest.raises(SystemExit, match='error: --(seeds|systems)=.*: (0|base) stands there more than once'):
    check()


def results():
  """Two seeds of a system with a dial, one of one without."""
  def run(losses, loops, **more):
    return {'rows': [{'loops': n, 'loss': loss, 'state norm': 2.0 * n, 'MFLOP a token': 0.1 * n}
                     for n, loss in enumerate(losses, 1)], 'loops': loops, 'parameters': 10, 'steps': 5, 'rate': 3e-3,
            'cache': 64.0, **more}
  return {'base': [run([3.0], 1)], 'looped': [run([3.0, 2.0, 2.5], 3, radius=0.5), run([3.2, 2.4, 2.1], 3, radius=0.5)],
          'noisy': [run([4.0, 3.5], 2, cache=None)]}


def test_every_system_has_a_colour_of_its_own(tmp_path, monkeypatch):
  """None is grey, as all others are behind it in systems.png."""
  pytest.importorskip('matplotlib')
  figures = []
  monkeypatch.setattr(study.plots, 'save', lambda figure, path, dpi: figures.append(figure))
  row = {'loops': 4, 'loss': 3.5, 'MFLOP a token': 1.0}
  study.draw(tmp_path, {name: [{'loops': 4, 'rows': [row]}] for name in SYSTEMS}, 'loss')
  colours = [line.get_color() for line in figures[0].axes[0].lines]
  assert len(colours) == len(set(colours)) == len(SYSTEMS)
  assert min(max(colour[:3]) - min(colour[:3]) for colour in colours) > 0.1


def test_tables_say_what_was_measured(tmp_path):
  rows = study.table(results(), {'looped': 1.234, 'base': None}, 'loss')
  assert [row['system'] for row in rows] == ['looped', 'base', 'noisy']
  looped = rows[0]
  assert (looped['loss'] == 2.3 and looped['+-'] == 0.2 and looped['best'] == '2.200 at 2'
          and looped['ms a token'] == 1.23)
  assert rows[1]['+-'] == '' and rows[1]['ms a token'] == '' and rows[2]['cache bytes a token'] == ''
  assert study.budget_table(results(), 'loss')[0] == {'system': 'base', '1': 3.0, '2': '', '3': ''}
  accuracies = {name: [{**run, 'rows': [{**row, 'accuracy': 1 / row['loss']} for row in run['rows']]} for run in runs]
                for name, runs in results().items()}
  assert [row['system'] for row in study.table(accuracies, {}, 'accuracy')][-1] == 'noisy'
  pytest.importorskip('matplotlib')
  study.draw(tmp_path, results(), 'loss')
  assert {path.name for path in tmp_path.iterdir()} == {'quality.png', 'systems.png'}


@pytest.mark.parametrize('argument, told', [
    ('cpu,system=melt', 'melt needs the work folder of system=ouro'),
    ('cpu,system=ouro,start=there', 'ouro starts from no other run'),
    ('cpu,system=diffusion,task=p_hop', 'system=diffusion takes text'),
    ('cpu,system=nothing', 'nothing'), ('cpu,task=nothing', 'nothing')])
def test_arguments_that_cannot_be(argument, told):
  with pytest.raises(ConfigError, match=told):
    leaderboard.get_config(argument)
