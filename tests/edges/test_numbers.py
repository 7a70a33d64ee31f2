"""Numbers, from flags, arguments and configurations: whole where they are counts, finite, in range, and never
converted.
"""
import math
import re

import jax
import numpy as np
import pytest

from experiments import main
from experiments.tools import command
import loopformer
from loopformer import config as configs, plans
from loopformer.inference import exits
from loopformer.types import ConfigError, real, shown, whole
from tests import commands
from tests.inference import test_generate

NAN, INF = float('nan'), float('inf')


# Flags ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('word, expected', [
    ('--seed=2.7', 'a whole number in the range [0, 4294967295]'), ('--seed=-1', 'in the range [0, 4294967295]'),
    ('--seed=4294967296', 'in the range'), ('--seed=1e3', 'a whole number'), ('--seed=', 'a whole number'),
    ('--temperature=nan', 'a finite number, 0 or more'), ('--temperature=1e999', 'a finite number, 0 or more'),
    ('--temperature=-0.1', 'a finite number, 0 or more'), ('--temperature=warm', 'a finite number, 0 or more'),
    ('--top_p=1.01', 'a finite number in the range [0, 1]'), ('--top_p=nan', 'in the range [0, 1]'),
    ('--top_k=0', 'a positive integer'), ('--top_k=2.0', 'a positive integer'),
    ('--max_new_tokens=0', 'a positive integer'), ('--step=-1', 'a non-negative integer'),
    ('--sweep=0', 'a positive integer'), ('--limit=0', 'a positive integer'),
    ('--eval_batches=-3', 'a positive integer'), ('--devices=0', 'a positive integer'),
    ('--process=-1', 'a non-negative integer'), ('--heartbeat=0', 'positive'),
])
def test_flags(word, expected):
  try:
    with pytest.raises(SystemExit) as end:
      command.parse(['main', '--workdir=x', word])
  finally:
    for name in commands.flags_of_commands():
      main.FLAGS[name].unparse()
  assert end.value.code == f'error: {word}: must be {end.value.code.partition(": must be ")[2]}'
  assert expected in end.value.code and '\n' not in end.value.code


def test_help_is_no_failure(monkeypatch):
  """absl, which prints it, ends with a status of 1."""
  def flags(argv):
    raise SystemExit(1)

  monkeypatch.setattr(command, 'FLAGS', flags)
  with pytest.raises(SystemExit) as end:
    command.parse(['main', '--help'])
  assert end.value.code == 0


def test_flags_that_are_missing():
  text = 'flag --workdir=None: Flag --workdir must have a value other than None.'
  told = f'--workdir is missing: {main.FLAGS["workdir"].help}'.rstrip('.')
  assert command._told(text) == told
  other = 'flags mode=train: --config is missing'  # of a check of several, in any order
  assert command._told(f'{other}\n{text}') == f'--config is missing; {told}'
  assert command._told(f'{text}\n{other}') == f'{told}; --config is missing'


@pytest.mark.parametrize('words, expected', [
    (['--bogus=1'], '--bogus: there is no such flag here; --help lists'), (['--depth=1'], 'did you mean --depths'),
    (['word'], 'word: not a flag'),
    (['--mode=evil'], '--mode=evil'), (['--prompt'], '--prompt'), (['--noseed'], 'noseed'),
    ([], '--workdir is missing'),
])
def test_flags_that_there_are_not(words, expected):
  workdir = ['--workdir=x'] if words else []
  try:
    with pytest.raises(SystemExit) as end:
      command.parse(['main', *workdir, *words])
  finally:
    for name in commands.flags_of_commands():
      main.FLAGS[name].unparse()
  assert end.value.code.startswith('error: ') and expected in end.value.code and '\n' not in end.value.code


@pytest.mark.parametrize('text', ['2.7', 'nan', 'inf', '-1', '0', '', 'two', '0.5,0.4', '1e999', '1e30', '0.5,nan',
                                  '2,3', '1.5,-0.5'])
def test_budgets_of_the_command_line(text):
  with pytest.raises(ConfigError, match=r'--budget|budget') as error:
    plans.resolve(main.loops_or_sizes(text, '--budget'), '--budget')
  assert '--budget' in str(error.value)


@pytest.mark.parametrize('text', ['kl:nan', 'kl:inf', 'kl:-1', 'kl:', 'kl', 'kl:1e999', 'gate:1.5', 'stable:0.5', ':',
                                  'kl:1,x'])
def test_exits_of_the_command_line(text):
  with pytest.raises(ConfigError, match='--exit'):
    main.leaves(text, '--exit')


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('value', [2.0, 2.7, NAN, INF, True, '3', None, [1], np.float32(2), np.array([1, 2])], ids=repr)
def test_what_is_no_whole_number(value):
  with pytest.raises(ConfigError, match=re.escape(f'n = {shown(value)}: must be a whole number, 1 or more')):
    whole('n', value, 1)


@pytest.mark.parametrize('value', [3, np.int32(3), np.uint8(3), np.array(3), jax.numpy.int32(3)], ids=repr)
def test_what_is_a_whole_number(value):
  assert whole('n', value, 1) == 3 and type(whole('n', value, 1)) is int
  for least, most in ((4, None), (1, 2)):
    with pytest.raises(ConfigError, match='must be'):
      whole('n', value, least, most)


@pytest.mark.parametrize('value, allowed, message', [
    (NAN, '[0, inf)', 'a finite number, 0 or more'), (INF, '[0, inf)', 'a finite number, 0 or more'),
    (-1, '[0, inf)', '0 or more'), (0, '(0, 1]', 'above 0 and at most 1'), (1.5, '(0, 1]', 'at most 1'),
    (1, '[0, 1)', 'below 1'), (True, '[0, 1]', 'number'), ('0.5', '[0, 1]', 'number'), (None, '[0, 1]', 'number'),
    (1j, '[0, 1]', 'number'), (10 ** 400, '[0, inf)', 'finite'), (np.array([0.5, 0.5]), '[0, 1]', 'number'),
    (-INF, '(-inf, inf)', 'a finite number'),
], ids=str)
def test_what_is_out_of_range(value, allowed, message):
  with pytest.raises(ConfigError, match=message) as error:
    real('x', value, allowed)
  assert str(error.value).startswith(f'x = {shown(value)}: must be a ')


@pytest.mark.parametrize('value', [0, 1, 0.5, np.float32(0.5), np.float64(1), jax.numpy.float32(0.25)], ids=repr)
def test_what_is_in_range(value):
  assert real('x', value, '[0, 1]') == float(value)


GENERATION = [dict(temperature=NAN), dict(temperature=INF), dict(temperature='warm'), dict(temperature=None),
              dict(top_p=NAN), dict(top_p=True), dict(top_k=True), dict(top_k=2.0), dict(seed=2 ** 32), dict(seed=True),
              dict(seed=NAN), dict(max_new_tokens=INF), dict(max_new_tokens=True), dict(budget=True), dict(budget=NAN),
              dict(budget='2'), dict(budget=[]), dict(budget=[0.5, NAN]), dict(budget=[0.5, INF]), dict(budget=10 ** 9),
              dict(stop=['']), dict(stop='x'), dict(stop=[3]), dict(stop=[None]), dict(stop=None), dict(rows=2.5),
              dict(rows=0), dict(exit='kl:1e-3')]


@pytest.mark.parametrize('options', GENERATION, ids=str)
def test_generation(options):
  name, = options
  with pytest.raises(ConfigError, match=f'^{name} (= |is empty)'):
    loopformer.generate(test_generate.MODEL, test_generate.PARAMS, test_generate.TOKENIZER, ['abc'], **options)


@pytest.mark.parametrize('prompts, message', [
    ('abc', "prompts = 'abc'"), (None, 'prompts = None'), (b'abc', 'prompts = b'),
    ([['a']], "prompt 0: the id = 'a'"), (['a', 3], 'prompt 1 = 3'), ([[10 ** 6]], 'prompt 0: the id = 1000000'),
], ids=str)
def test_prompts(prompts, message):
  with pytest.raises(ConfigError, match=message):
    loopformer.generate(test_generate.MODEL, test_generate.PARAMS, test_generate.TOKENIZER, prompts)


def test_without_a_tokenizer():
  with pytest.raises(ConfigError, match='tokenizer = None: no text can be generated'):
    loopformer.generate(test_generate.MODEL, test_generate.PARAMS, None, ['a'])


@pytest.mark.parametrize('tokens', [[[1, 2], [3]], [1, 2], [[]], [[1.5]], [['a']], [[10 ** 6]], [[-1]], None], ids=str)
def test_tokens_of_logits(tokens):
  with pytest.raises(ConfigError, match='^tokens: '):
    loopformer.logits(test_generate.MODEL, test_generate.PARAMS, tokens)


@pytest.mark.parametrize('source', [None, 3, '/no/such/folder', '/no/such.gguf', '/no/such.pt'])
def test_what_is_loaded(source):
  with pytest.raises(ConfigError, match=f'{source}: (there is no such file or folder|give a path)'):
    loopformer.load(source)


@pytest.mark.parametrize('rule', [exits.KL, exits.Entropy, exits.EntropyChange, exits.StateChange, exits.Stable,
                                  exits.Cumulative, exits.Confident, exits.ACT])
@pytest.mark.parametrize('threshold', [NAN, INF, -INF, -1])
def test_thresholds(rule, threshold):
  with pytest.raises(ConfigError, match=rf'threshold = {threshold}'):
    rule(threshold=threshold)


# Configurations ------------------------------------------------------------------------------------------------------


# which needs a folder (tests/experiments/test_finetune.py)
FILES = [name for name in configs.published() if name != 'finetune']


def numbers_of(value, path=''):
  """(dotted path, class and field, whether it is whole) of the numbers of a configuration."""
  for name, inner in configs.fields(value).items():
    where = f'{path}.{name}' if path else name
    declared = set(re.findall(r'\w+', configs._kind_name(configs._declared(type(value), name)[0])))
    if declared & {'int', 'float'} and declared <= {'int', 'float', 'None'}:
      yield where, (type(value), name), 'float' not in declared
    yield from numbers_of(inner, where)


@pytest.mark.parametrize('name', FILES)
def test_every_number_of_a_configuration(name):
  """NaN, infinity, what is not whole, what is longer than 64 bits: refused by the field's name and the value."""
  config = configs.load(name)
  for path, _, counts in numbers_of(config):
    for text in ('nan', 'inf', '1e999', '-1e999', 'True', *(['2.5', '1e3', '9' * 25] if counts else [])):
      with pytest.raises(ConfigError, match=re.escape(f'{path} = {text}')):
        configs.override(config, f'{path}={text}')
    for value in (NAN, INF, *([2.5] if counts else [])):
      with pytest.raises(ValueError, match=re.escape(path.rsplit('.', 1)[-1])) as error:
        configs.check(configs._changed(config, path.split('.'), value))
      assert str(value) in str(error.value)


# Below zero these mean something.
SIGNED = {'weight', 'embed', 'hidden', 'alpha', 'data', 'fsdp', 'tensor'}


@pytest.mark.parametrize('name', FILES)
def test_numbers_below_zero(name):
  config = configs.load(name)
  for path, (_, field), _ in numbers_of(config):
    if field not in SIGNED:
      with pytest.raises(ValueError, match=field):
        configs.check(configs.override(config, f'{path}=-1'))


@pytest.mark.parametrize('seed', [2 ** 32, -1, 1.5, True])
def test_seeds_that_jax_would_cut(seed):
  """jax.random.key(2**32 + 5) is that of 5."""
  with pytest.raises(ConfigError, match=rf'train\.seed = {seed}'):
    configs.Train(seed=seed)
  assert configs.Train(seed=2 ** 32 - 1).seed == 2 ** 32 - 1


def test_thresholds_are_finite_where_they_are_printed():
  assert math.isfinite(exits.KL().threshold)
