import ast
import dataclasses
import itertools
from pathlib import Path
import re
import sys
import types

import jax
import numpy as np
import pytest

from experiments.configs import loopformer as paper
from loopformer import config as configs, plans
from loopformer.cells.damped import Damped
from loopformer.cells.halting import Halting
from loopformer.config import check, choose, describe, difference, flatten, override
from loopformer.inference import exits, measures
from loopformer.inference.evaluate import Depths, Named, Run
from loopformer.loop import Every
from loopformer.model import parameter_shapes
from loopformer.nn.blocks import Chain
from loopformer.nn.embed import TokenEmbed
from loopformer.nn.layers import Normal
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.sharding import Mesh
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.terms.cross_entropy import CE
from loopformer.training.checkpoint import Best
from loopformer.training.train import best_of, train
from loopformer.types import ConfigError, config_dataclass
from tests import parts
from tests.experiments.test_golden import config_of

TINY = paper.get_config('tiny')
FILE = parts.ROOT / 'experiments/configs/loopformer.py'
VARIANTS = [f'{size},kind={kind},ee={ee}' for size, kind, ee in itertools.product(paper.SIZES, paper.KINDS, (0, 1))
            if not ee or kind in ('base_loop', 'tmlt')]


def changed(*assignments: str, config=TINY):
  for assignment in assignments:
    config = override(config, assignment)
  return config


def at(config, path: str):
  for name in path.split('.'):
    config = configs.fields(config)[name]
  return config


# Overrides -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('path, text, value', [
    ('train.steps', '500', 500),
    ('name', 'mine', 'mine'),
    ('name', '123', '123'),  # a text that looks like a number
    ('optim.decay', '1', 1.0),  # int where a float is asked for
    ('optim.schedule.peak', '3e-4', 3e-4),
    ('model.cell.core.block.attn.groups', '2', 2),
    ('model.cell.core.block.attn.groups', 'None', None),
    ('model.cell.core.block.dtype', 'bfloat16', 'bfloat16'),
    ('model.cell.modulation.init.std', '0.02', 0.02),
    ('task.folder', '/data/text', '/data/text'),
    ('task.folder', 'None', None),
    ('evals.budgets', '(1, 3)', (1, 3)),
    ('evals.budgets', '[1, 3]', (1, 3)),
    ('evals.budgets', '2,', (2,)),
    ('objective.terms.lm.weight', '0.5', 0.5),
    ('objective.terms.shortcut.weight', '2', 2.0),
    ('objective.rolls.short.plan.loops', '4', 4),
    ('mesh.data', '-1', -1),
], ids=lambda value: str(value))
def test_override(path, text, value):
  config = changed(f' {path} = {text} ')
  assert at(config, path) == value and type(at(config, path)) is type(value)
  moved = set(flatten(config).items()) ^ set(flatten(TINY).items())
  assert {name for name, _ in moved} <= {path}  # nothing else
  assert type(config) is type(TINY) and paper.get_config('tiny') == TINY  # and not in place


@pytest.mark.parametrize('assignment, message', [
    ('train.stpes=5', r"train\.stpes = 5: .*Train has no field 'stpes'; did you mean 'steps'\?.*steps, batch, accumul"),
    ('train.warmth=5', r"no field 'warmth' Its fields: steps, batch"),
    ('trian.steps=5', r"no field 'trian'; did you mean 'train'\?.*name, model, objective, task"),
    ('objective.terms.lm_shrot.weight=1', r"no field 'lm_shrot'; did you mean 'lm_short'\?.*lm, lm_short, shortcut"),
    ('train.steps.x=5', r"train\.steps\.x = 5: builtins\.int has no field 'x'.*none"),
    ('train.steps=many', r"train\.steps = many: expected int, got str; it was"),
    ('train.steps=1.5', r'train\.steps = 1\.5: expected int, got float'),
    ('train.steps=True', r'expected int, got bool'),
    ('train.steps=None', r'expected int, got NoneType'),
    ('optim.decay=high', r'optim\.decay = high: expected float, got str; it was 0\.2'),
    ('optim.decay=False', r'expected float, got bool'),
    ('evals.budgets=3', r'evals\.budgets = 3: expected tuple'),
    ('evals.budgets=(1, 2.5)', r'evals\.budgets = \(1, 2\.5\): expected tuple'),
    ('model.cell=5', r'model\.cell = 5: model\.cell is a part \(.*Timed\), not a value; set one of its fields '
                     r'\(core, condition, modulation\)'),
    ('objective.terms=5', r'objective\.terms is a part .*lm, lm_short, shortcut'),
    ('objective.terms.lm=5', r'objective\.terms\.lm is a part'),
    ('model.read_out.norm=5', r'model\.read_out\.norm is a part .*\(eps\)'),
    ('train.steps', r"--set 'train\.steps': expected path=value"),
    ('train.steps=0', r'train\.steps = 0: must be 1 or more'),  # the part's own check
    ('objective.rolls.short.plan.loops=1', r'Partition\.loops = 1'),
    ('model.cell.core.block.mlp.activation=relu', r'activation'),
], ids=lambda value: value if '=' in value else None)
def test_override_refuses(assignment, message):
  with pytest.raises(ConfigError, match=message):
    override(TINY, assignment)


def test_an_optional_part_can_be_taken_out():
  config = dataclasses.replace(TINY, model=TINY.model.clone(coda=parts.stack(1)))
  assert changed('model.coda.depth=3', config=config).model.coda.depth == 3
  assert changed('model.coda=None', config=config).model.coda is None


# Text ----------------------------------------------------------------------------------------------------------------


def test_describe_has_a_line_for_every_field():
  lines = describe(TINY).splitlines()
  assert 'model.cell.core.depth = 2' in lines
  assert 'objective.terms.lm.weight = 1.0' in lines
  assert "model.cell.core.block.dtype = 'float32'" in lines
  assert 'model.cell.core.block.mlp.activation = loopformer.nn.layers.gelu' in lines
  assert 'model.cell = loopformer.cells.timed.Timed' in lines
  assert 'model.prelude = None' in lines
  assert len(lines) == len(flatten(TINY)) == len({line.split(' = ')[0] for line in lines})
  assert '<' not in describe(TINY) and '0x' not in describe(TINY)  # no addresses: equal runs print equal texts


@pytest.mark.parametrize('assignment, path', [
    ('train.log_every=77', None), ('train.eval_every=77', None), ('train.eval_batches=77', None),
    ('train.save_every=77', None), ('train.keep=77', None), ('evals.budgets=(3,)', None), ('mesh.data=2', None),
    ('train.steps=77', 'train.steps'), ('train.seed=77', 'train.seed'), ('train.batch=77', 'train.batch'),
    ('optim.decay=0.3', 'optim.decay'), ('model.loops=9', 'model.loops'), ('task.length=64', 'task.length'),
    ('objective.terms.lm.weight=2', 'objective.terms.lm.weight'),
])
def test_difference_is_of_what_is_computed(assignment, path):
  found = list(difference(TINY, changed(assignment)))
  assert found == ([] if path is None else [(path, flatten(TINY)[path], flatten(changed(assignment))[path])])


def test_difference_of_other_parts():
  found = {path: (old, new) for path, old, new in difference(TINY, paper.get_config('tiny,kind=base_loop'))}
  assert found['model.cell'] == ('loopformer.cells.timed.Timed', 'loopformer.cells.plain.Plain')
  assert found['model.cell.modulation.layers'] == ('2', '(absent)')
  assert not list(difference(TINY, paper.get_config('tiny')))


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_saved_and_read_is_the_same(variant, tmp_path):
  config = paper.get_config(variant)
  configs.save(config, tmp_path)
  back = configs.read(tmp_path)
  assert back == config and describe(back) == describe(config)
  assert hash(back.model) == hash(config.model)  # static arguments of compiled functions
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_unusual_parts_are_saved(tmp_path):
  config = dataclasses.replace(
      TINY, model=TINY.model.clone(prelude=parts.stack(1), cell=parts.timed(init=0.5, groups=1, heads=4)),
      objective=Objective(rolls={'a': Rollout(plans.Staged(loops=(1, 4)), Every())},
                          terms={'x': Weighted(np.float64(0.5), CE(roll='a'))}))
  configs.save(config, tmp_path)
  assert configs.read(tmp_path) == config


def test_load_of_a_file_with_argument_and_overrides():
  config = configs.load(f'{FILE}:tiny,kind=tmlt,ee=1,loops=4', ['train.steps=123', 'train.steps=321'])
  assert config.name == 'tmlt_ee' and config.model.loops == 4 and config.train.steps == 321
  assert configs.load(str(FILE)) == paper.get_config()


@pytest.mark.parametrize('spec, message', [
    ('nowhere/mine.py', r'--config=nowhere/mine\.py: no such file'),
    (f'{FILE}:huge', r"config argument size = 'huge': choose one of tiny, p_hop, pointers, small, paper"),
    (f'{FILE}:tiny,kind=plain', r"config argument kind = 'plain': choose one of loopformer, base"),
    (f'{FILE}:tiny,depth=4', r"config argument 'depth=4': no 'depth' here; there are size, kind, ee, loops, dtype"),
    (f'{FILE}:tiny,loops=few', r'config argument loops = few: expected int, got str; it was 8'),
    (f'{FILE}:tiny,ee=1', r'config argument ee = 1: early exit is a variant'),
    ('ouro:tiny,loops=x', r'config argument loops = x: give a whole number, or leave it out'),
    ('finetune:from=a,text=b,peak=none', r'config argument peak = none: give a finite number, or leave it out'),
], ids=['missing', 'size', 'kind', 'name', 'type', 'ee', 'whole', 'finite'])
def test_load_refuses(spec, message):
  with pytest.raises(ConfigError, match=message):
    configs.load(spec)


def test_a_file_without_get_config_is_refused(tmp_path):
  (tmp_path / 'empty_one.py').write_text('x = 1\n')
  with pytest.raises(ConfigError, match='defines no get_config'):
    configs.load(str(tmp_path / 'empty_one.py'))


def test_arguments():
  assert configs.arguments('', size='tiny', loops=8) == {'size': 'tiny', 'loops': 8}
  assert configs.arguments('small,loops=4', size='tiny', loops=8) == {'size': 'small', 'loops': 4}
  assert configs.arguments('loops=4,size=small', size='tiny', loops=8) == {'size': 'small', 'loops': 4}
  assert choose('size', 'a', {'a': 1}) == 1


@pytest.mark.parametrize('argument', [
    'ouro:tiny,loops=0', 'ouro:tiny,layers=-1', 'act:pointers,loops=0', 'pondernet:pointers,loops=0',
    'loopformer:pointers,kind=base,loops=0', 'loopformer:tiny,kind=base,loops=-1', 'mor:tiny,recursions=0',
    'leaderboard:cpu,loops=0', 'leaderboard:cpu,width=0', 'leaderboard:cpu,steps=0', 'loopus:cpu,start=there,loops=0',
    'loopus:cpu,start=there,graded=0', 'mor:tiny,layers=0', 'mor:tiny,steps=0', 'plt:tiny,loops=0',
    'masked_diffusion:cpu,loops=0', 'masked_diffusion:cpu,task=s3,letters=0', 'ccdd:cpu,loops=0'])
def test_a_number_that_is_given_is_not_taken_for_one_that_is_left_out(argument):
  name, _, value = argument.rpartition(',')[2].partition('=')
  with pytest.raises(ConfigError, match=f'config argument {name} = {value}: must be 1 (or more|to 10000)'):
    configs.load(argument)


@pytest.mark.parametrize('argument', [
    'leaderboard:cpu,loops', 'mor:tiny,recursions', 'mor:tiny,layers', 'mor:tiny,kind=vanilla,layers', 'plt:tiny,loops',
    'loopformer:tiny,kind=base,loops', 'ouro:tiny,layers'])
def test_a_number_of_what_each_has_an_entry_is_bounded(argument):
  """Lists of two thousand million entries took minutes, or all memory, before anything was said."""
  name = argument.rpartition(',')[2]
  with pytest.raises(ConfigError, match=f'config argument {name} = 2147483648: must be 1 to 10000'):
    configs.load(f'{argument}=2147483648')


@pytest.mark.parametrize('argument, message', [
    ('plt:tiny,kind=seq,window=3', 'window = 3: kind=seq does not read it, gswa does; leave it out'),
    ('plt:tiny,kind=clp,gate=query', 'gate = query: kind=clp does not read it, gswa does'),
    ('plt:tiny,kind=seq,mix=ones', 'mix = ones: kind=seq does not read it, gswa, share, clp do'),
    ('plt:tiny,kind=r1,loops=3', 'loops = 3: kind=r1 does not read it'), ('plt:tiny,window=-1', 'window_left = -1'),
    ('shift:p_hop,first=-2', 'first = -2: give a step, or -1 for half of the run')])
def test_numbers_that_say_nothing_are_refused(argument, message):
  with pytest.raises(ConfigError, match=message):
    configs.load(argument)


def test_a_window_of_none_but_itself_is_one():
  assert configs.load('plt:tiny,window=0').model.memory.window_left == 0


@pytest.mark.parametrize('name', configs.published())
def test_a_switch_takes_0_and_1_alone(name):
  about = ast.get_docstring(ast.parse(configs.published()[name].read_text(encoding='utf-8')))
  for switch in re.findall(r'^ {4}(\w+) +1: ', about, re.M):
    with pytest.raises(ConfigError, match=f"config argument {switch} = '?2'?: choose one of (-1, )?0, 1"):
      configs.load(f'{name}:from=there,data=there,{switch}=2' if name == 'finetune' else f'{name}:{switch}=2')


def test_read_of_a_folder_without_a_run(tmp_path):
  with pytest.raises(ConfigError, match=r'workdir = .*no config\.json'):
    configs.read(tmp_path)


def test_lambdas_are_refused(tmp_path):
  block = TINY.model.cell.core.block
  block = block.clone(mlp=block.mlp.clone(activation=lambda x: x))
  core = TINY.model.cell.core.clone(block=block)
  config = dataclasses.replace(TINY, model=TINY.model.clone(cell=TINY.model.cell.clone(core=core)))
  with pytest.raises(ConfigError, match='lambda.*cannot be saved'):
    configs.save(config, tmp_path)
  assert not (tmp_path / 'config.json').exists()


def test_what_cannot_be_saved_is_refused(tmp_path):
  config = dataclasses.replace(TINY, name=jax.ShapeDtypeStruct((3,), np.float32))
  with pytest.raises(ConfigError, match='cannot be saved'):
    configs.save(config, tmp_path)


OWN_PART = '''
import dataclasses

from experiments.configs import loopformer as paper
from loopformer import plans
from loopformer.objective import Objective, Rollout
from loopformer.types import Planner, config_dataclass


@config_dataclass
class Halved(Planner):
  """One plan of two steps."""
  first: float = {first}

  @property
  def longest(self):
    return 2

  @property
  def expected(self):
    return 2.0

  def __call__(self, key):
    return plans.schedule((self.first, 1 - self.first))


def get_config(first: str = ''):
  config = paper.get_config('tiny')
  rolls = {{**config.objective.rolls, 'short': Rollout(Halved(first=float(first)) if first else Halved())}}
  return dataclasses.replace(config, objective=Objective(rolls=rolls, terms=config.objective.terms))
'''


def own_part(folder: Path, first: float = 0.5) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'own_part.py').write_text(OWN_PART.format(first=first))
  return folder / 'own_part.py'


@pytest.fixture
def forget():
  """As if no configuration file had been imported in this process."""
  def clean():
    for name in [name for name in sys.modules if name.startswith(configs.LOADED)]:
      del sys.modules[name]
  clean()
  yield clean
  clean()


def test_a_part_of_the_configuration_file_is_read_from_the_work_folder(tmp_path, forget):
  source = own_part(tmp_path / 'configs')
  config = configs.load(f'{source}:0.75')
  source.unlink()  # what is saved is what was read
  configs.save(config, tmp_path / 'run')
  plan = "config.objective.rolls['short'].plan"
  out = parts.python('import sys; from loopformer import config as configs; from pathlib import Path; '
                     f'\nwith configs.trusting():\n  config = configs.read(Path(sys.argv[1]))\n'
                     f'print(type({plan}).__name__, {plan}.first); '
                     'print(configs.describe(config))', str(tmp_path / 'run'))
  assert out == f'Halved 0.75\n{describe(config)}\n'


def test_a_run_that_was_read_can_be_saved_where_it_came_from(tmp_path, forget):
  """Resuming without --config reads the work folder's own copy of the configuration file, then saves."""
  configs.save(configs.load(str(own_part(tmp_path / 'configs'))), tmp_path / 'run')
  forget()
  config = configs.read(tmp_path / 'run')
  configs.save(config, tmp_path / 'run')
  forget()
  assert describe(configs.read(tmp_path / 'run')) == describe(config)


def test_files_of_one_name_in_two_work_folders_are_two_files(tmp_path, forget):
  """Runs of one configuration file, edited between them, are compared in one process."""
  for run, first in (('a', 0.5), ('b', 0.25)):
    configs.save(configs.load(str(own_part(tmp_path / 'configs', first))), tmp_path / run)
    forget()
  plan = {run: configs.read(tmp_path / run).objective.rolls['short'].plan for run in 'ab'}
  assert [type(plan[run])().first for run in 'ab'] == [0.5, 0.25]  # each class by its own folder's file


# Checks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_variant_is_sound(variant):
  check(paper.get_config(variant))


@pytest.mark.parametrize('assignments, message', [
    (['model.cell.core.block.attn.heads=5'], r'model\.loop: heads = 5 does not divide the width 128'),
    (['model.cell.core.block.attn.heads=4', 'model.cell.core.block.attn.groups=3'],
     r'groups = 3 does not divide heads = 4'),
    (['model.cell.core.block.attn.head=0'], r'model\.cell\.core\.block\.attn\.head = 0: must be 1'),
    (['model.cell.core.block.dtype=float16'], r"block\.dtype = 'float16'; use one of float32, bfloat16"),
    (['task.length=129'], r'task\.length = 129 is more than model\.read_in\.length = 128'),
    (['model.loops=7'], r'a plan of 8 steps is longer than model\.loops = 7'),
    (['train.batch=10', 'train.accumulate=4'], r'train\.batch = 10 .*train\.accumulate = 4'),
    (['train.steps=100', 'optim.schedule.warmup=100'], r'optim\.schedule\.warmup = 100'),
    (['model.cell.core.depth=3'], r'depth = 3.*modulation\.layers = 2|modulation\.layers = 2.*depth = 3'),
    (['model.cell.modulation.layers=1'], r'layers = 1.*depth = 2|depth = 2.*layers = 1'),
    (['model.read_in.width=64'], r'width = 128.*width = 64|width = 64.*width = 128'),
    (['model.cell.condition.width=64'], r'width = 128.*width = 64|width = 64.*width = 128'),
    (['model.read_in.dtype=float16'], r"read_in\.dtype = 'float16'"),
], ids=lambda value: ' '.join(value) if isinstance(value, list) else '')
def test_check_refuses(assignments, message):
  with pytest.raises(ConfigError, match=message):
    check(changed(*assignments))


def test_check_refuses_what_would_end_a_run_at_its_first_evaluation():
  """More steps than a router's recursions, or a table's rows, also within another cell; exits that the cell cannot
  answer.
  """
  def evaluated(steps, exit_policy=exits.Final()):
    return Named(budgets=(1,), runs={'own': Run(plan=plans.Uniform(steps), exit=exit_policy)})

  for file, argument in (('mor', 'tiny,kind=token'), ('timestep', 'cpu,kind=table,loops=3')):
    config = config_of(file, argument)
    check(config)
    check(dataclasses.replace(config, evals=evaluated(3)))
    with pytest.raises(ConfigError, match=r"evals: the schedule '4' has 4 steps, but model\.cell runs 3 at most"):
      check(dataclasses.replace(config, evals=Depths(budgets=(1, 2, 4))))
    model = config.model.clone(cell=config.model.cell if file == 'mor' else Damped(Halting(config.model.cell)))
    with pytest.raises(ConfigError, match=r"evals: the schedule 'own' has 5 steps"):
      check(dataclasses.replace(config, model=model, evals=evaluated(5)))
    with pytest.raises(ConfigError, match=r'model\.loops = 4: model\.cell runs 3 steps at most'):
      check(dataclasses.replace(config, model=model.clone(loops=4)))
  check(dataclasses.replace(TINY, evals=evaluated(20, exits.Adaptive(rule=exits.KL()))))
  with pytest.raises(ConfigError, match=r"evals: the exit of 'own': exit\.rule: the cell has no gate"):
    check(dataclasses.replace(TINY, evals=evaluated(4, exits.Adaptive(rule=exits.Cumulative()))))


@pytest.mark.parametrize('name', ['last@4', 'lost@4', 'loss@3', 'loss', 'ran@4', 'state norm@4', 'accuracy@4'])
def test_check_refuses_a_best_that_no_evaluation_reports(name):
  with pytest.raises(ConfigError, match=rf"train\.best = '{name}': no number .*choose one of loss@1, perplexity@1"):
    check(changed(f'train.best={name}'))


def test_check_refuses_what_is_no_planner():
  own = types.SimpleNamespace(longest=2, expected=2.0)
  rolls = {**TINY.objective.rolls, 'short': Rollout(own)}
  with pytest.raises(ConfigError, match=r'objective\.rolls\.short\.plan = .*: it is no planner; make it a subclass'):
    configs.check(dataclasses.replace(TINY, objective=dataclasses.replace(TINY.objective, rolls=rolls)))


def test_the_measure_says_which_checkpoint_is_best():
  """`last` is a share of right answers of some tasks, and an error of others."""
  found = {}
  for task, measure in (('answers', measures.Answers()), ('errors', measures.Errors())):
    found[task] = {}
    for name in measure.better:
      config = changed(f'train.best={name}@8', config=dataclasses.replace(
          TINY, task=Generated(of=PHop(hops=2, length=16), measure=measure)))
      check(config)
      found[task][name] = best_of(config)
  assert found['answers'] == {name: Best(name=f'{name}@8', sign=-1 if name == 'loss' else 1)
                              for name in ('loss', 'accuracy', 'exact', 'last')}
  assert found['errors'] == {name: Best(name=f'{name}@8', sign=-1) for name in ('loss', 'last')}
  assert best_of(TINY) is None


def test_train_refuses_an_unknown_best_before_anything_is_written(tmp_path):
  with pytest.raises(ConfigError, match="train.best = 'last@8'"):
    train(changed('train.best=last@8'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_split_that_is_longer_than_the_positions_is_refused():
  """Every split is looked at, and the model's own limit is within it."""
  def of(**tests):
    return dataclasses.replace(TINY, task=Generated(of=PHop(length=16), tests={
        name: PHop(length=length) for name, length in tests.items()}))

  check(of(short=8, longest=128))
  with pytest.raises(ConfigError, match=r"split 'far' have 129 tokens, more than model\.read_in\.length = 128"):
    check(of(short=8, far=129))
  assert of(far=129).task.splits == {'validation': 16, 'far': 129} and TINY.task.splits == {'validation': 128}


@config_dataclass
class Late:
  """Examples of another generator that stand at later positions of their document."""
  of: PHop = PHop(length=16)
  by: int = 128
  length, symbols = property(lambda self: self.of.length), property(lambda self: self.of.symbols)

  def baselines(self, examples):
    return self.of.baselines(examples)

  def __call__(self, rng):
    example = self.of(rng)
    return {**example, 'positions': example['positions'] + self.by}


def test_training_refuses_examples_at_positions_that_the_model_does_not_have(tmp_path):
  config = changed('train.batch=2', config=dataclasses.replace(TINY, task=Generated(of=Late())))
  check(config)
  with pytest.raises(ConfigError, match='positions up to 143, but model.read_in.length = 128'):
    train(config, tmp_path, log=lambda text: None)
  assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.parametrize('change, message', [
    (dict(model=TINY.model.clone(loops=8.0)), r'model\.loops = 8\.0: expected int'),
    (dict(mesh=Mesh(fsdp=1.5)), r'mesh\.fsdp = 1\.5: expected int'),
    (dict(model=TINY.model.clone(coda=parts.stack(3, order=(0, 1.5)))), r'model\.coda\.order = \(0, 1\.5\): expected'),
    (dict(model=TINY.model.clone(coda=Stack(Chain((parts.block(heads=2.5),)), 1))),
     r'model\.coda\.block\.blocks\[0\]\.attn\.heads = 2\.5: expected int'),
], ids=['loops', 'mesh', 'order', 'chain'])
def test_check_refuses_parts_of_whole_numbers(change, message):
  """In configuration files, where no `--set` has looked at their types."""
  with pytest.raises(ConfigError, match=message):
    check(dataclasses.replace(TINY, **change))


def test_numbers_of_numpy_are_taken():
  check(dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, steps=np.int64(1000))))


def test_check_names_the_stack():
  config = dataclasses.replace(TINY, model=TINY.model.clone(coda=parts.stack(1)))
  with pytest.raises(ConfigError, match=r'model\.coda: heads = 3'):
    check(changed('model.coda.block.attn.heads=3', config=config))


def test_what_passes_the_check_can_be_built():
  """Overrides that concern several parts at once, made together."""
  config = changed('model.read_in.width=64', 'model.cell.condition.width=64', 'model.cell.core.depth=3',
                   'model.cell.modulation.layers=3', 'model.cell.core.block.attn.groups=1')
  check(config)
  assert parts.shapes(config.model)['read_in']['embedding'].shape == (1024, 64)


def test_parts_are_plain_values():
  assert TINY.model == paper.get_config('tiny').model != changed('model.loops=9').model
  assert {TINY.model: 1}[paper.get_config('tiny').model] == 1
  assert TokenEmbed(vocab=1, width=1, length=1) == TokenEmbed(vocab=1, width=1, length=1)
  assert Normal(0.0) == Normal(0.0) != Normal(0.1)
  assert parameter_shapes(TINY.model)


@pytest.mark.parametrize('change, named', [
    ('model.loops=99999999', 'model.loops = 99999999: .* set model.loops to 1 to 10000'),
    ('objective.rolls.long.plan.loops=99999999', 'the steps of objective.rolls.long.plan = 99999999: .* 1 to 10000'),
    ('evals.budgets=(1,99999999)', r'evals.budgets = 99999999: .* 1 to 10000')])
def test_plans_that_never_end_are_refused(change, named):
  """Before anything is allocated or compiled."""
  with pytest.raises(ConfigError, match=named):
    check(override(paper.get_config('tiny'), change))


def test_depths_that_never_end_are_refused():
  config = paper.get_config('tiny,kind=base_loop')
  check(config)
  drawn = plans.Truncated(depth=plans.Poisson(average=1e8), graded=2)
  with pytest.raises(ConfigError, match=r'the steps of objective.rolls.\w+.plan = 100000000: .* 1 to 10000'):
    check(dataclasses.replace(config, objective=dataclasses.replace(
        config.objective, rolls={name: Rollout(drawn) for name in config.objective.rolls})))
  runs = Named(runs={'deep': Run(plan=plans.Uniform(10 ** 8))})
  with pytest.raises(ConfigError, match='the steps of evals: deep = 100000000: .* 1 to 10000'):
    check(dataclasses.replace(config, evals=runs))
