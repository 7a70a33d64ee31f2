"""Commands on drawn flags: a result and status 0, or one line that names what was given; nothing else is changed."""
import re
from unittest import mock

from hypothesis import given, settings, strategies as st
import jax
import pytest

import loopformer
from loopformer import config as configs
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.model import init_params
from tests import test_config
from tests.experiments.test_cli import run_here

NUMBERS = st.sampled_from(['0', '1', '2', '-1', '2.7', 'nan', 'inf', '', ' 2', '1e9', '9' * 20, 'True', '0x2', '\u0663',
                           '1,2', 'x'])
WORDS = st.sampled_from(['kl:1e-3', 'kl', 'state:0.1', 'stable:2', 'gate:0.5', 'kl:nan', ':', 'first', 'last', 'ring:2',
                         'ring:0', 'ring:', 'mean', '0.5,0.5', '0.5,0.4', '2', '\x00', '~', 'a=b', '--', '\u00e9',
                         'sampled'])
TEXTS = st.text(max_size=12) | st.sampled_from([
    'the cat', '', ' ', '\n', '\udc80', '\ufeff', '\U0001f600', '<|endoftext|>', 'x' * 300])
GENERATE = {'prompt': TEXTS, 'budget': NUMBERS | WORDS, 'temperature': NUMBERS, 'top_k': NUMBERS, 'top_p': NUMBERS,
            'seed': NUMBERS, 'step': NUMBERS, 'exit': WORDS, 'fill': WORDS, 'memory': WORDS, 'draft': NUMBERS | WORDS,
            'set': WORDS, 'depths': NUMBERS, 'config': WORDS, 'mode': WORDS}
PLAN = {'config': st.sampled_from(['loopformer:tiny', 'loopformer:', 'loopformer:tiny,loops=0', 'loopformer:tiny,kind=',
                                   'ouro:x', '', '/', '.', ':', 'nothing.py', 'loopformer:tiny,loops=2.5',
                                   'loopformer:=']) ,
        'devices': NUMBERS, 'accelerators': WORDS, 'rows': NUMBERS, 'program': WORDS,
        'set': (NUMBERS.map(lambda text: f'train.batch={text}') | NUMBERS.map(lambda text: f'model.loops={text}')
                | WORDS)}


def flags(table):
  """Up to three different flags with drawn values."""
  return st.lists(st.sampled_from(sorted(table)), min_size=1, max_size=3, unique=True).flatmap(
      lambda names: st.tuples(*[table[name].map(lambda value, name=name: f'--{name}={value}') for name in names]))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A folder with a model of bytes, whose programs are compiled once for all that is drawn."""
  folder = tmp_path_factory.mktemp('runs') / 'run'
  model = test_config.TINY.model
  loopformer.Loaded(model, init_params(model, jax.random.key(0)), ByteTokenizer(), test_config.TINY).save(folder)
  return folder


@pytest.fixture(scope='module')
def planned():
  """Nothing is compiled where flags and configuration are right."""
  with mock.patch('experiments.tools.estimate.run', lambda *arguments: print('planned')):
    yield


def contents(folder):
  return {path: path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def holds(given, folder, *command):
  """The property."""
  before = contents(folder)
  status, out, err = run_here(*command, *given)
  assert contents(folder) == before
  said = [line for line in err.splitlines() if line.startswith('error: ')]
  assert 'Traceback' not in err
  if status == 0:
    assert not said and out.strip()
    return
  assert status == 1 and len(said) == 1, err
  words = [word for flag in given for word in re.split(r'[=:,]', flag.removeprefix('--')) if word.strip()]
  assert any(word in err or repr(word)[1:-1] in err for word in words), (given, err)


@settings(max_examples=60)
@given(flags=flags(GENERATE))
def test_generation(workdir, flags):
  holds(flags, workdir, workdir, '--mode=generate', '--max_new_tokens=3')


@settings(max_examples=60)
@given(flags=flags(PLAN))
def test_plans_and_configurations(workdir, flags, planned):
  holds(flags, workdir, None, '--mode=plan', '--config=loopformer:tiny')


ASSIGNMENTS = st.builds('{}={}'.format, st.sampled_from(sorted(configs.flatten(test_config.TINY))), NUMBERS | WORDS)


@settings(max_examples=200)
@given(assignment=ASSIGNMENTS | st.text(max_size=20))
def test_assignments(assignment):
  """--set of any field to anything: a configuration that passes its checks, or one line that names field and value."""
  path, _, text = assignment.partition('=')
  try:
    configs.check(configs.override(test_config.TINY, assignment))
  except ValueError as error:
    assert str(error) and '\n' not in str(error)
    named = (path.strip().split('.')[-1], repr(text.strip()), repr(assignment))
    assert any(name in str(error) for name in named), (assignment, str(error))
