"""What importing costs: no flags, no device, no library that the imported part does not need."""
import json

import pytest

from tests import parts

HEAVY = ('grain', 'array_record', 'sentencepiece', 'matplotlib', 'torch', 'tensorboardX', 'orbax', 'pyarrow',
         'wandb', 'datasets', 'safetensors', 'fsspec', 'gcsfs', 's3fs')
REPORT = '''
import importlib, json, sys
importlib.import_module(sys.argv[1])
from jax._src import xla_bridge
modules = sorted({name.split('.')[0] for name in sys.modules})
print(json.dumps({'modules': modules, 'backends': list(xla_bridge._backends)}))
'''


def imported(module: str, *arguments: str) -> dict:
  return json.loads(parts.python(REPORT, module, *arguments))


@pytest.mark.parametrize('module', ['loopformer', 'loopformer.model', 'loopformer.inference.engine', 'loopformer.api',
                                    'loopformer.training.train', 'loopformer.convert',
                                    'experiments.configs.loopformer'])
def test_importing_loads_and_touches_little(module):
  report = imported(module)
  assert not set(HEAVY) & set(report['modules'])
  assert report['backends'] == []


def test_importing_parses_no_flags():
  code = ('import sys, loopformer, loopformer.api, loopformer.training.train; from absl import flags; '
          'assert not flags.FLAGS.is_parsed(); print(sys.argv[1:])')
  assert parts.python(code, '--nonsense=1', 'x') == "['--nonsense=1', 'x']\n"


def test_the_package_offers_its_functions_on_demand():
  code = '''
import sys
import loopformer
assert 'jax' not in sys.modules, 'importing the package alone loads nothing'
assert {'generate', 'load', 'logits', 'convert'} <= set(dir(loopformer))
import loopformer.inference.engine, loopformer.api
from loopformer import generate, load, logits
assert loopformer.generate is generate is loopformer.inference.engine.generate and callable(load) and callable(logits)
try:
  loopformer.nonsense
except AttributeError as error:
  print(error)
'''
  assert parts.python(code) == "module 'loopformer' has no attribute 'nonsense'\n"


def test_every_script_can_be_imported():
  """In one process; flags are forgotten before each, because scripts define some of the same names."""
  told = parts.python('''
import importlib, pkgutil
from absl import flags
import experiments
names = [found.name for found in pkgutil.walk_packages(experiments.__path__, 'experiments.')
         if found.name not in ('experiments.benchmark.peer', 'experiments.benchmark.__main__')]
for name in names:
  for flag in list(flags.FLAGS):
    delattr(flags.FLAGS, flag)
  importlib.import_module(name)
print(len(names))
''')
  assert int(told.splitlines()[-1]) > 40


def test_tensorboard_takes_no_other_framework_along(tmp_path):
  """tensorboardX imports torch and clients of buckets where it finds them; here it does not, and they stay to be
  had."""
  pytest.importorskip('tensorboardX')
  told = parts.python('''
import importlib.util, json, pathlib, sys
from loopformer.training import metrics
writer = metrics.writer(pathlib.Path(sys.argv[1]), 0)
writer.write('train', 1, {'loss': 1.5})
writer.close()
print(json.dumps([name for name in ('torch', 'boto3', 'google.cloud') if name in sys.modules]))
if importlib.util.find_spec('torch'):
  import torch
''', str(tmp_path))
  assert json.loads(told) == []
  written, = (tmp_path / 'tensorboard').iterdir()
  assert b'train/loss' in written.read_bytes()
