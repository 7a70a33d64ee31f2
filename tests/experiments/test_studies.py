"""What studies refuse before they train anything: lists that are empty or say something twice, and a folder of results
that other flags made."""
import json

import pytest

from experiments.tools import records
from loopformer.types import ConfigError
from tests import parts
from tests.project import test_docs

# Of every (study, flags ..): what ends it, where nothing is trained.
ENDS = """
import importlib, json, pathlib, sys
from absl import flags
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
  study.define_flags()
  for flag in own:
    flags.FLAGS[flag].unparse()
  try:
    command.begin(study.main, command.parse(['main', *arguments]))
    print(json.dumps('nothing'))
  except SystemExit as end:
    print(json.dumps(end.code))
"""


def ends(*runs) -> list[str]:
  return [json.loads(line) for line in parts.python(ENDS, json.dumps(runs)).splitlines() if line.startswith('"')]


FOLDERS = [  # study, flags, others, what is said of these
    ('relay_stages', [], ['--inject'], 'inject = False, not with True'),
    ('relay_stages', [], ['--task=ari'], 'task = left, not with ari'),
    ('padded_depth', [], ['--task=s3'], 'task = parity, not with s3'),
    ('cot_or_loop', ['--set=train.steps=4'], [], "set = ['train.steps=4'], not with []"),
    ('cot_sampling', ['--formulas=1'], ['--formulas=1', '--seed=1'], 'seed = 0, not with 1'),
    ('dial', [], ['--task=p_hop'], 'task = pointers, not with p_hop'),
    ('leaderboard', ['--systems=base', '--rates=1e-3', '--steps=4'], ['--systems=base', '--rates=1e-3', '--steps=8'],
     'steps = 4, not with 8'),
    ('scaling', ['--widths=32'], ['--widths=32', '--system=huginn'], 'system = middle, not with huginn')]


def test_results_of_other_flags_are_not_replaced(tmp_path):
  """They are where there are none yet, and the same flags go on."""
  def runs(which):
    return [[f'studies.{row[0]}', f'--workdir={tmp_path}/work', f'--out={tmp_path}/{number}', *row[which]]
            for number, row in enumerate(FOLDERS)]

  assert ends(*runs(2), *runs(1)) == ['training'] * 2 * len(FOLDERS)
  for number in range(len(FOLDERS)):
    (tmp_path / f'{number}/results.json').write_text('{}')
  assert ends(*runs(2), *runs(1)) == [
      *(f'error: {tmp_path}/{number}: it was made with {row[3]}; give the same, or another --out'
        for number, row in enumerate(FOLDERS)), *['training'] * len(FOLDERS)]


def test_results_may_grow_and_lose_nothing(tmp_path):
  records.own(tmp_path, {'seeds': ['0']}, size='cpu')
  records.own(tmp_path, {'seeds': ['1']}, size='gpu')  # nothing was made yet
  (tmp_path / 'results.json').write_text('{}')
  for more in (['1'], ['0', '1'], ['1', '0', '2']):
    records.own(tmp_path, {'seeds': more}, size='gpu')
  with pytest.raises(ConfigError, match='results of --seeds=1,0,2 stand there, and those of 1 would be lost; give '
                                        '--seeds=1,0,2,3, or another --out'):
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
  """Where its study asks; a command of its text goes on there."""
  studies = (parts.ROOT / 'experiments/studies').glob('*.py')
  asking = {path.stem for path in studies if 'records.own(' in path.read_text()}
  given = [(words, folder[0]) for where, words in test_docs.EVERY
           if (found := test_docs.command(words)) and found[0].rpartition('.')[2] in asking
           and (folder := [word.partition('=')[2] for word in words if word.startswith('--out=experiments/reports')])]
  assert len({folder for _, folder in given}) >= 7
  assert [folder for _, folder in given if not (parts.ROOT / folder / 'made_with.json').is_file()] == []


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
