"""What studies refuse before they train anything: lists that are empty or say something twice, and a folder of results
that other flags made."""
import json
import re

import pytest

from experiments.tools import records
from loopformer.types import ConfigError
from tests import parts
from tests.project import test_docs

# Of every (study, flags ..): what ends it, where nothing is trained.
ENDS = """
import importlib, json, pathlib, sys
from absl import flags
if json.loads(sys.argv[2]):
  from experiments import main
from experiments.tools import command

def train(*arguments):
  raise SystemExit('training')

command.train = train
own = set(flags.FLAGS)
for name, *arguments in json.loads(sys.argv[1]):
  study = importlib.import_module(f'experiments.{name}')
  for flag in set(flags.FLAGS) - own:
    delattr(flags.FLAGS, flag)
  for doing in {'train', 'imported'} & set(vars(study)):
    setattr(study, doing, train)
  study.define_flags()
  for flag in own:
    flags.FLAGS[flag].unparse()
  try:
    command.begin(study.main, command.parse(['main', *arguments]))
    print(json.dumps('nothing'))
  except SystemExit as end:
    print(json.dumps(end.code))
"""


def ends(*runs, main: bool = True) -> list[str]:
  """How each (command, flags ..) ends; main: whether they have flags of experiments.main beside their own."""
  out = parts.python(ENDS, json.dumps(runs), json.dumps(main))
  return [json.loads(line) for line in out.splitlines() if line.startswith('"')]


ONE = ['--widths=32', '--trained_loops=1', '--operations=3e10']
HEAL = ['--from=a', '--loops=2', '--damped=0.5', '--corpus=b']
FOLDERS = [  # study, flags, others, what is said of these
    ('studies.relay_stages', [], ['--inject'], 'inject = False, not with True'),
    ('studies.relay_stages', [], ['--task=ari'], 'task = left, not with ari'),
    ('studies.padded_depth', [], ['--task=s3'], 'task = parity, not with s3'),
    ('studies.cot_or_loop', ['--set=train.steps=4'], [], "set = ['train.steps=4'], not with []"),
    ('studies.cot_sampling', ['--formulas=1'], ['--formulas=1', '--seed=1'], 'seed = 0, not with 1'),
    ('studies.dial', [], ['--task=p_hop'], 'task = pointers, not with p_hop'),
    ('studies.leaderboard', ['--systems=base', '--rates=1e-3', '--steps=4'],
     ['--systems=base', '--rates=1e-3', '--steps=8'], 'steps = 4, not with 8'),
    ('studies.scaling', ONE, [*ONE, '--system=huginn'], 'system = middle, not with huginn'),
    ('studies.ouro_stages', [], ['--set=train.steps=4'], "set = [], not with ['train.steps=4']"),
    ('studies.melt_stages', [], ['--size=gpu'], 'size = cpu, not with gpu'),
    ('studies.loopus_stages', [], ['--eval_rows=4'], 'eval_rows = 512, not with 4'),
    ('studies.coevolution', [], ['--samples=4'], 'samples = 512, not with 4'),
    ('studies.denoising', [], ['--depths=1,2'], 'depths = [1, 2, 4], not with [1, 2]'),
    ('studies.denoising_words', ['--letters=4'], ['--letters=8'], 'letters = 4, not with 8'),
    ('studies.heal', HEAL, [*HEAL, '--batch=4'], 'batch = 8, not with 4'),
    ('studies.heal', HEAL, [*HEAL, '--depths=1'], 'depths = [1, 2], not with [1]'),
    ('compare', ['--run=a=loopformer:tiny'], ['--run=a=loopformer:tiny', '--budgets=1'],
     "budgets = None, not with ['1']")]
ALONE = [  # of those that have no flags of experiments.main
    ('studies.linear_cot', ['--seed=1'], [], 'seed = 1, not with 0'),
    ('studies.memorise', ['--loops=2'], ['--loops=2', '--steps=4'], 'steps = 3000, not with 4')]


@pytest.mark.parametrize('rows', [FOLDERS, ALONE], ids=['with main', 'alone'])
def test_results_of_other_flags_are_not_replaced(rows, tmp_path):
  """They are where there are none yet, and the same flags go on."""
  def runs(which):
    work = [f'--workdir={tmp_path}/work'] if rows is FOLDERS else []
    return [[row[0], *work, f'--out={tmp_path}/{number}', *row[which]] for number, row in enumerate(rows)]

  def ended(*given):
    return ends(*given, main=rows is FOLDERS)

  assert ended(*runs(2), *runs(1)) == ['training'] * 2 * len(rows)
  for number in range(len(rows)):
    (tmp_path / f'{number}/results.json').write_text('{}')
  assert ended(*runs(2), *runs(1)) == [
      *(f'error: {tmp_path}/{number}: it was made with {row[3]}; give the same, or another --out'
        for number, row in enumerate(rows)), *['training'] * len(rows)]


def test_results_may_grow_and_lose_nothing(tmp_path):
  records.own(tmp_path, {'seeds': ['0']}, size='cpu')
  records.own(tmp_path, {'seeds': ['1']}, size='gpu')  # nothing was made yet
  (tmp_path / 'results.json').write_text('{}')
  for more in (['1'], ['0', '1'], ['1', '0', '2']):
    records.own(tmp_path, {'seeds': more}, size='gpu')
  with pytest.raises(ConfigError, match='results of --seeds 1, 0, 2 stand there, and those of 1 would be lost; give '
                                        'all of 1, 0, 2, 3, or another --out; of a run that failed, strike its word '
                                        'from made_with.json'):
    records.own(tmp_path, {'seeds': ['0', '2', '3']}, size='gpu')
  with pytest.raises(ConfigError, match='size = gpu, not with cpu'):
    records.own(tmp_path, {'seeds': ['1', '0', '2']}, size='cpu')
  records.own(tmp_path, {'seeds': ['1', '0', '2'], 'arms': ['a']}, size='gpu')  # of a note before there were arms
  assert json.loads((tmp_path / 'made_with.json').read_text()) == {
      'seeds': ['1', '0', '2'], 'arms': ['a'], 'size': 'gpu'}
  (tmp_path / 'made_with.json').unlink()
  with pytest.raises(ConfigError, match='nothing says with which flags it was made'):
    records.own(tmp_path, {'seeds': ['1', '0', '2']}, size='gpu')


def test_every_report_says_with_which_flags_it_was_made():
  """A command of its text goes on there."""
  training = {row[0] for row in (*FOLDERS, *ALONE)}
  given = {folder for _, words in test_docs.EVERY
           if (found := test_docs.command(words)) and found[0].removeprefix('experiments.') in training
           for word in words if (folder := word.removeprefix('--out=')) != word and folder.startswith('experiments/')}
  assert len(given) >= 40
  assert [folder for folder in given if not (parts.ROOT / folder / 'made_with.json').is_file()] == []


def test_every_command_that_trains_is_tried_above():
  """Those that ask whose the folder of results is; others make tables of what stands elsewhere."""
  files = [*(parts.ROOT / 'experiments/studies').glob('*.py'), parts.ROOT / 'experiments/compare.py']
  trains = {path.stem for path in files if re.search(r'command\.train\(|\btrain\(', path.read_text())}
  assert trains == {row[0].rpartition('.')[2] for row in (*FOLDERS, *ALONE)}


def test_lists_that_name_nothing_or_one_thing_twice(tmp_path):
  common = [f'--workdir={tmp_path}/work', f'--out={tmp_path}/out']
  told = {
      ('studies.padded_depth', '--seeds='): '--seeds: no value; give one, or leave it out',
      ('studies.dial', '--kinds='): '--kinds: no value; give one, or leave it out',
      ('studies.cot_or_loop', '--arms='): '--arms: no value; give one, or leave it out',
      ('studies.leaderboard', '--systems='): '--systems: no value; give one, or leave it out',
      ('studies.cot_or_loop', '--seeds=1,01'): '--seeds=1,1: 1 stands there more than once',
      ('studies.dial', '--set=train.seed=3'): '--set=train.seed=3: this command takes seeds by --seeds; leave it out',
      ('studies.cot_sampling', '--set=train.seed=3'):
          '--set=train.seed=3: this command takes seeds by --seed; leave it out',
      ('studies.cot_or_loop', '--arms=chain-4,chain-04'): '--arms=chain-4,chain-4: chain-4 stands there more than once',
      ('studies.leaderboard', '--rates=1e-3,0.001'): '--rates=0.001,0.001: 0.001 stands there more than once',
      ('studies.ouro_stages', '--seeds=x'): '--seeds=x: give whole numbers apart by commas, 0 to 4294967295',
      ('studies.loopus_stages', '--arms=base,base'): '--arms=base,base: base stands there more than once',
      ('studies.loopus_stages', '--thresholds=0.3,0.30'): '--thresholds=0.3,0.3: 0.3 stands there more than once',
      ('studies.routing',): '--run is missing: name=the folder',
      ('studies.cosines', '--run=a'): '--run=a: give name=the folder',
      ('studies.routing', '--run=a=b', '--run=a=c'): '--run=a,a: a stands there more than once',
      ('compare',): '--run is missing: name=configuration',
      ('compare', '--run=a=loopformer:tiny', '--run=a=ouro:tiny'): '--run=a,a: a stands there more than once'}
  found = ends(*([name, *common, *given] for name, *given in told))
  assert [text for text, wanted in zip(found, told.values()) if not text.startswith(f'error: {wanted}')] == []
  assert len(found) == len(told)
