"""The command line, end to end: train, kill, resume, evaluate, generate; and what it says of bad input."""
from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import loopformer
from loopformer import config as configs, memories
from loopformer.training import checkpoint, metrics
from loopformer.types import ConfigError
from tests import commands, quick

ROOT = Path(__file__).parents[2]
CONFIG = f'''
import dataclasses
from pathlib import Path
import sys
sys.path.insert(0, {str(ROOT)!r})
from experiments.configs import loopformer as paper
from loopformer import config as configs
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import Bytes
from loopformer.types import config_dataclass

@config_dataclass
class Here(Files):
  """A part that is defined in a configuration file."""

def get_config(folder):
  config = paper.get_config('tiny,kind=KIND,loops=4')
  for change in ('model.read_in.vocab=300', 'model.read_in.length=64', 'task.length=32', 'train.batch=4',
                 'train.steps=24', 'optim.schedule.warmup=2', 'train.save_every=4', 'train.eval_every=12',
                 'train.log_every=1', 'train.eval_batches=2', 'model.cell.core.depth=1',
                 *(('model.cell.modulation.layers=1',) if hasattr(config.model.cell, 'modulation') else ())):
    config = configs.override(config, change)
  task = dataclasses.replace(config.task, corpus=Here(train=(folder + '/*.txt',), validation=0.3), tokenizer=Bytes())
  return dataclasses.replace(config, task=task)
'''


def command(workdir, *arguments):
  trust = [] if '--mode=plan' in arguments else ['--trust']  # of the parts that SETTING defines
  return [sys.executable, '-m', 'experiments.main', f'--workdir={workdir}', *trust, *arguments]


def environment() -> dict[str, str]:
  """Of processes that are compiled as the tests are."""
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': quick.FLAGS}


def run(workdir, *arguments):
  """(exit status, stdout, stderr) of the command line."""
  done = subprocess.run(command(workdir, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300,
                        env=environment())
  return done.returncode, done.stdout, done.stderr


def run_here(workdir, *arguments):
  """As `run`, in this process, where nothing has to be imported or compiled twice; workdir: None for none."""
  from experiments import main
  from experiments.tools import command
  out, err, status = io.StringIO(), io.StringIO(), 0
  folder = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', '')  # none
  try:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      command.parse(['main', *([] if workdir is None else [f'--workdir={workdir}']), *arguments])
      main.main(['main'])
  except SystemExit as end:
    print(end.code, file=err)
    status = 1
  finally:
    for name in commands.flags_of_commands():
      main.FLAGS[name].unparse()
    jax.config.update('jax_compilation_cache_dir', folder)
  return status, out.getvalue(), err.getvalue()


def write_setting(folder: Path, kind: str = 'loopformer') -> str:
  """--config of a small run on a corpus of generated text, both written to `folder`."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  words = np.array('one two three loop again and so on\n'.split(' '))
  for index in range(12):
    (folder / f'{index}.txt').write_text(' '.join(rng.choice(words, 150)))
  (folder / 'mine.py').write_text(CONFIG.replace('KIND', kind))
  return f'--config={folder / "mine.py"}:{folder}'


@pytest.fixture(scope='module')
def setting(tmp_path_factory):
  """--config of a corpus of generated text."""
  return write_setting(tmp_path_factory.mktemp('corpus'))


@pytest.fixture(scope='module')
def undisturbed(setting, tmp_path_factory):
  """A run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  status, out, err = run(workdir, setting)
  assert status == 0, err
  return workdir, out


def weights(workdir):
  _, params, _, _ = loopformer.load(workdir)
  return params


def rows(workdir, kind):
  """The logged rows without what a clock measured."""
  timed = ('tokens_per_s', 'mfu', 'seconds', 'memory')
  return [{k: v for k, v in row.items() if not k.startswith(timed)}
          for row in metrics.read_rows(workdir / 'metrics.jsonl') if row['kind'] == kind]


def assert_same_run(workdir, other):
  import chex
  chex.assert_trees_all_equal(weights(workdir), weights(other))
  assert rows(workdir, 'train') == rows(other, 'train')
  assert rows(workdir, 'eval') == rows(other, 'eval')


def wait_for(process, happened, what):
  """Blocks until `happened` in the run of a process."""
  deadline = time.time() + 240
  while time.time() < deadline and process.poll() is None:
    if happened():
      return
    time.sleep(0.02)
  raise AssertionError(f'the run never came to {what}')


def wait_for_step(process, workdir, step):
  """Blocks until the run has logged `step`; what it saved before is perhaps not whole yet."""
  wait_for(process, lambda: any(row['step'] >= step for row in metrics.read_rows(workdir / 'metrics.jsonl')),
           f'step {step}')


def wait_for_save(process, workdir):
  """Blocks until the run has a checkpoint that is whole, from which a killed one resumes."""
  wait_for(process, lambda: checkpoint.trained(workdir) is not None, 'a checkpoint')


def test_training_reports_and_learns(undisturbed):
  workdir, out = undisturbed
  train = rows(workdir, 'train')
  assert [row['step'] for row in train] == list(range(1, 25))
  assert train[-1]['lm'] < train[0]['lm'] - 0.5
  assert set(train[0]) >= {'loss', 'lm', 'lm_short', 'shortcut', 'grad_norm'}
  assert np.isclose(train[5]['loss'], train[5]['lm'] + 0.1 * train[5]['lm_short'] + 0.1 * train[5]['shortcut'])
  assert 'tok/s' in out and 'MFU' in out and 'left' in out and 'validation loss at 1 loop' in out


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=['SIGKILL', 'SIGTERM'])
def test_a_killed_run_resumes_bit_for_bit(setting, undisturbed, tmp_path, number):
  workdir = tmp_path / 'killed'
  process = subprocess.Popen(command(workdir, setting), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                             env=environment())
  wait_for_save(process, workdir)
  os.kill(process.pid, number)
  process.wait(60)
  reached = max(row['step'] for row in metrics.read_rows(workdir / 'metrics.jsonl'))
  assert reached < 24, 'the run was over before it could be killed'
  assert process.returncode == (-number if number == signal.SIGKILL else 0)
  status, out, err = run(workdir, setting)
  assert status == 0, err
  assert 'resumed from step' in out
  assert_same_run(workdir, undisturbed[0])


def test_eval_needs_the_work_folder_alone(undisturbed, tmp_path):
  workdir, _ = undisturbed
  status, out, err = run(workdir, '--mode=eval', '--depths=1,2,4', '--schedules=0.5,0.25,0.25;1', '--sweep=3')
  assert status == 0, err
  depths = json.loads((workdir / 'eval/depths.json').read_text())
  assert [row['budget'] for row in depths] == [1, 2, 4]
  for row in depths:
    assert np.isclose(row['perplexity'], np.exp(row['loss']))
    assert np.isclose(row['bits_per_byte'], row['loss'] / np.log(2), rtol=0.05)  # bytes; only document ends differ
  logged = [row for row in rows(workdir, 'eval') if row['step'] == 24][0]
  assert np.isclose(depths[-1]['loss'], logged['loss@4'], rtol=1e-5)
  ranked = json.loads((workdir / 'eval/sweep3.json').read_text())
  assert [row['rank'] for row in ranked] == [1, 2, 3]  # the partitions of 4 into 3 steps
  assert [row['loss'] for row in ranked] == sorted(row['loss'] for row in ranked)
  given = json.loads((workdir / 'eval/schedules.json').read_text())
  assert [row['schedule'] for row in given] == ['0.5 0.25 0.25', '1']
  same = [row for row in ranked if row['schedule'] == '0.5 0.25 0.25'][0]
  assert np.isclose(given[0]['loss'], same['loss'], rtol=1e-6)
  assert (workdir / 'eval/depths.csv').read_text().startswith('budget,schedule,loss,')
  for name in ('depths', 'sweep3', 'schedules', 'training'):
    assert (workdir / f'eval/{name}.png').read_bytes().startswith(b'\x89PNG')


def test_eval_on_a_text_of_ones_own(undisturbed, tmp_path):
  (tmp_path / 'own.txt').write_text('one two three loop again and so on\n' * 20)
  status, out, err = run_here(undisturbed[0], '--mode=eval', f'--text={tmp_path / "own.txt"}', '--depths=1,4')
  assert status == 0 and 'depths-text-own: 700 text-own tokens' in out, err
  found = json.loads((undisturbed[0] / 'eval/depths-text-own.json').read_text())
  assert [row['budget'] for row in found] == [1, 4] and all(row['tokens'] == 700 for row in found)
  assert found[-1]['loss'] < 5.5  # of chance, log 257, in a run that learned these words


def test_generate(undisturbed):
  """A process of its own says the same; more loops than the model was trained with are warned of."""
  workdir, _ = undisturbed
  asked = ('--mode=generate', '--prompt=one', '--prompt=three loop', '--budget=0.5,0.5', '--max_new_tokens=8')
  first = run_here(workdir, *asked)
  assert first[0] == 0, first[2]
  assert '0.5,0.5 loops' in first[1] and 'three loop' in first[1]
  assert first[1] == run(workdir, *asked)[1]
  with pytest.warns(UserWarning, match='6 loops, but the model was trained with at most 4'):
    status, _, err = run_here(workdir, '--mode=generate', '--prompt=one', '--budget=6', '--max_new_tokens=4')
  assert status == 0, err


def test_load_and_logits(undisturbed):
  model, params, tokenizer, config = loopformer.load(undisturbed[0], step=24)
  tokens = np.array([tokenizer.encode('one two three')])
  out = loopformer.logits(model, params, tokens, steps=2)
  assert out.shape == (1, tokens.shape[1], 300) and out.dtype == np.float32
  assert np.allclose(out, loopformer.logits(model, params, tokens, steps=(0.5, 0.5)))
  assert not np.allclose(out, loopformer.logits(model, params, tokens, steps=4))
  assert config.task.length == 32


REFUSED = {
    'unknown field': (['--set', 'train.stps=3'], ['train.stps', "did you mean 'steps'", 'batch']),
    'wrong type': (['--set', 'train.steps=many'], ['train.steps = many', 'int']),
    'heads': (['--set', 'model.cell.core.block.attn.heads=3'], ['heads = 3', '128', 'divisor']),
    'one loop': (['--set', 'objective.rolls.short.plan.loops=1'], ['Partition.loops = 1', '2']),
    'length': (['--set', 'task.length=65'], ['task.length = 65', 'read_in.length = 64']),
    'warmup': (['--set', 'optim.schedule.warmup=24'], ['warmup = 24', 'train.steps = 24']),
    'dtype': (['--set', 'model.cell.core.block.dtype=float8'], ['float8', 'bfloat16']),
    'no such file': (['--config=absent.py'], ['absent.py', 'no such file']),
    'vocabulary': (['--set', 'model.read_in.vocab=200'], ['read_in.vocab = 200', '257']),
    'corpus absent': (['--set', "task.corpus.train=('/nowhere/*.txt',)"], ['/nowhere/*.txt']),
    'corpus too small': (['--set', 'train.batch=4096'], ['4096']),
}


@pytest.mark.parametrize('name', REFUSED)
def test_training_refuses(setting, tmp_path, name):
  arguments, expected = REFUSED[name]
  status, _, err = run_here(tmp_path / 'run', setting, *arguments)
  assert status == 1
  assert err.splitlines()[-1].startswith('error: ') and 'Traceback' not in err, err
  for text in expected:
    assert text in err
  assert not (tmp_path / 'run/checkpoints').exists()


def test_another_configuration_is_refused(setting, undisturbed):
  before = (undisturbed[0] / 'config.json').read_text()
  status, _, err = run_here(undisturbed[0], setting, '--set', 'train.seed=7')
  assert status == 1 and 'train.seed is 0 there, 7 here' in err
  assert (undisturbed[0] / 'config.json').read_text() == before


@pytest.mark.parametrize('arguments, expected', [
    (['--mode=eval'], 'no config.json'),
    (['--mode=generate'], 'no config.json'),
    ([], '--config is missing'),
], ids=['eval', 'generate', 'train'])
def test_an_empty_work_folder_is_refused(tmp_path, arguments, expected):
  status, _, err = run_here(tmp_path / 'empty', *arguments)
  assert status == 1 and expected in err
  assert not (tmp_path / 'empty').exists()


@pytest.mark.parametrize('mode, name', [
    ('eval', 'config'), ('generate', 'config'), ('harness', 'config'), ('train', 'depths'), ('eval', 'prompt'),
    ('generate', 'exits'), ('eval', 'exit'), ('train', 'seed'), ('generate', 'profile'), ('plan', 'processes'),
    ('harness', 'eval_batches'), ('train', 'topology')])
def test_a_flag_that_the_mode_does_not_read_is_refused(mode, name):
  from experiments import main
  with pytest.raises(ConfigError, match=f'--{name}: --mode={mode} does not read it, .* do(es)?; leave it out'):
    main.check_flags(mode, {name: 0})


@pytest.mark.parametrize('mode, name, value', [
    ('eval', 'schedules', ''), ('harness', 'tasks', []), ('generate', 'budget', ''), ('train', 'config', '')])
def test_a_flag_without_a_value_is_refused(mode, name, value):
  from experiments import main
  with pytest.raises(ConfigError, match=f'--{name}: no value; give one, or leave it out'):
    main.check_flags(mode, {name: value})


def test_flags_that_the_mode_reads_are_taken():
  from experiments import main
  for mode, given in (('train', {'config': 'x.py', 'verify': True, 'coordinator': 'x:1'}),
                      ('eval', {'depths': ['1'], 'step': 3, 'processes': 2}),
                      ('harness', {'tasks': ['x'], 'memory': 'first', 'step': 3}),
                      ('generate', {'prompt': [''], 'budget': '2', 'seed': 0}),
                      ('plan', {'config': 'x.py', 'rows': 2})):
    main.check_flags(mode, given)


def test_loops_and_step_sizes_of_the_command_line():
  from experiments import main
  for text, expected in (('2', 2), ('2.0', 2), ('1', (1.0,)), ('0.5,0.25,0.25', (0.5, 0.25, 0.25))):
    found = main.loops_or_sizes(text, '--budget')
    assert found == expected and type(found) is type(expected)
  for text in ('2.7', '0.5', 'nan', 'inf', '-0.5'):
    with pytest.raises(ConfigError, match=f'--budget={text}: neither a whole number of loops'):
      main.loops_or_sizes(text, '--budget')
  for text, message in (('two', '--budget=two'), ('1,1', 'sum to 2'), ('', '--budget=')):
    with pytest.raises(ConfigError, match=message):
      main.loops_or_sizes(text, '--budget')


@pytest.mark.parametrize('arguments, expected', [
    (['--step=5'], 'no complete checkpoint of step 5'),
    (['--schedules=0.5,0.25'], 'sum to 0.75'),
    (['--depths=0'], '--depths = 0'),
    (['--depths=two'], '--depths=two'),
    (['--sweep=9'], '--sweep = 9'), (['--depths=1,99999999'], '--depths = 99999999'),
    (['--sweep=0'], '--sweep=0: must be a positive integer'),
], ids=['step', 'schedule', 'zero', 'word', 'sweep', 'endless', 'no sweep'])
def test_eval_refuses(undisturbed, arguments, expected):
  status, _, err = run_here(undisturbed[0], '--mode=eval', *arguments)
  assert status == 1 and expected in err and 'Traceback' not in err


def test_a_sweep_over_more_schedules_than_can_be_ranked(undisturbed, monkeypatch):
  from experiments import main
  monkeypatch.setattr(main, 'SCHEDULES', 2)
  status, _, err = run_here(undisturbed[0], '--mode=eval', '--sweep=2')
  assert status == 1 and '--sweep=2: there are 3 schedules of so many steps on the grid of 1/4, more than the 2' in err


def test_unfinished_run_is_refused(setting, tmp_path):
  config = configs.load(setting.removeprefix('--config='))
  configs.save(config, tmp_path)
  with pytest.raises(ValueError, match='no checkpoint was saved there yet'):
    loopformer.load(tmp_path)


def test_a_loss_that_is_no_number_stops_the_run(setting, tmp_path):
  workdir = tmp_path / 'broken'
  status, _, err = run(workdir, setting, '--set', 'train.steps=24', '--set', 'optim.schedule.peak=1e30',
                       '--set', 'optim.schedule.warmup=12', '--set', 'optim.clip=1e30')
  assert status == 1 and 'Traceback' not in err
  step = int(err.rsplit('error: step ', 1)[1].split(':')[0])
  assert 'not finite' in err and any(term in err for term in ('lm', 'shortcut'))
  kept = [int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()]
  assert all(saved < step for saved in kept)


REFUSED_LATE = {
    'gate': (['--mode=eval', '--depths=1', '--exits=kl:1e-3;gate:0.5'],
             ['--exits=gate:0.5: exit.rule: the cell has no gate', 'take a rule that needs none, such as KL']),
    'threshold': (['--mode=eval', '--depths=1', '--exits=kl:1e-3;kl:-1'],
                  ['--exits=kl:-1: exit.rule.threshold = -1.0', '0 (all steps) or more']),
    'gate, texts': (['--mode=generate', '--exit=act:0.01'], ['--exit=act:0.01: exit.rule: the cell has no gate']),
    'two': (['--mode=generate', '--exit=kl:1e-3,1e-2'], ['--exit=kl:1e-3,1e-2: names 2 exits; give one rule']),
    'unknown': (['--mode=generate', '--exit=budget:2'], ["--exit=budget:2: there is no rule 'budget:2'",
                                                         'kl, entropy']),
    'sampled': (['--mode=eval', '--depths=1', '--exits=sampled:0.5'], ["no rule 'sampled:0.5'", 'sampled without one']),
    'no gate': (['--mode=generate', '--exit=sampled', '--fill=recompute'],
                ['--exit=sampled: exit.rule: the cell has no gate']),
    'fill': (['--mode=generate', '--fill=copy'], ['--fill=copy: is read with --exit alone']),
    'chats': (['--mode=generate', '--messages=nowhere'],
              ['nowhere: there is no such file; name a file of chats by --messages']),
    'no exits': (['--mode=eval', '--exits= ;'], ['--exits= ;: names none; give a rule']),
    'no schedules': (['--mode=eval', '--schedules=;'], ['--schedules=;: names none; give step sizes']),
    'draft': (['--mode=generate', '--exit=kl:1e-3', '--draft=1'], ['exit and draft', 'give one of the two']),
    'memory': (['--mode=generate', '--memory=second'], ['--memory=second', 'per_loop, first, last, mean, ring:SIZE']),
    'no size': (['--mode=generate', '--memory=last:2'], ['--memory=last:2: there is no such memory']),
    'ring': (['--mode=generate', '--memory=ring:two'], ['--memory=ring:SIZE, SIZE=two']),
    'part of a loop': (['--mode=generate', '--budget=2.7'], ['--budget=2.7: neither a whole number of loops']),
    'config': (['--mode=generate', '--config=x.py'], ['--config: --mode=generate does not read it']),
    'no ring': (['--mode=generate', '--memory=ring:0'], ['memory.size = 0', '1 slot or more']),
    'memory and draft': (['--mode=generate', '--memory=mean', '--draft=1'], ['draft with memory = Mean()']),
}


@pytest.mark.parametrize('name', REFUSED_LATE)
def test_what_a_run_does_not_serve_is_refused_before_anything_is_written(undisturbed, tmp_path, name):
  arguments, expected = REFUSED_LATE[name]
  workdir = tmp_path / 'run'
  shutil.copytree(undisturbed[0], workdir, ignore=shutil.ignore_patterns('eval'))
  status, out, err = run_here(workdir, *arguments)
  assert status == 1 and 'Traceback' not in err and not out.strip(), err
  for text in expected:
    assert text in err
  assert not (workdir / 'eval').exists()


def test_generate_with_an_exit(undisturbed):
  workdir, _ = undisturbed
  texts = {}
  for leave in ('state:0', 'state:1e9', None):
    status, out, err = run_here(workdir, '--mode=generate', '--prompt=one', '--prompt=two lo', '--max_new_tokens=9',
                                '--temperature=0', *([] if leave is None else [f'--exit={leave}']))
    assert status == 0, err
    texts[leave], _, told = out.partition('--- mean loops a token: ')
    mean = {'state:0': '4.00 of 4 with state:0', 'state:1e9': '1.00 of 4 with state:1e9', None: ''}[leave]
    assert told.startswith(mean) and bool(told) == bool(mean)
  assert texts['state:0'] == texts[None]


def test_generate_writes_as_many_tokens_as_fit_unless_it_is_told_how_many(undisturbed):
  workdir, _ = undisturbed
  given = '--mode=generate', '--prompt=one', '--prompt=' + 'x' * 62, '--temperature=0'
  status, out, err = run_here(workdir, *given)
  assert status == 0, err
  model, params, tokenizer, _ = loopformer.load(workdir)
  rows = [loopformer.generate(model, params, tokenizer, [prompt], max_new_tokens=new, temperature=0.0)[0]
          for prompt, new in (('one', 61), ('x' * 62, 2))]  # of 64 positions
  assert out == ''.join(f'--- 4 loops\n{prompt}{text}\n' for prompt, text in zip(('one', 'x' * 62), rows))
  status, _, err = run_here(workdir, *given, '--max_new_tokens=64')
  assert status and 'more than the 64 positions' in err


def test_generate_without_a_prompt(undisturbed):
  workdir, _ = undisturbed
  status, out, err = run(workdir, '--mode=generate', '--max_new_tokens=5', '--temperature=0')
  assert status == 0, err
  model, params, tokenizer, _ = loopformer.load(workdir)
  text, = loopformer.generate(model, params, tokenizer, [''], max_new_tokens=5, temperature=0.0)
  assert out == f'--- 4 loops\n{text}\n'


def test_generate_with_a_memory(undisturbed):
  workdir, _ = undisturbed
  model, params, tokenizer, _ = loopformer.load(workdir)
  prompts = ['one two', 'three loop again and']
  expected = {}
  for name, part in (('per_loop', memories.PerLoop()), ('first', memories.First()), ('ring:2', memories.Ring(size=2))):
    expected[name] = loopformer.generate(model.clone(memory=part), params, tokenizer, prompts, max_new_tokens=12,
                                         temperature=0.0)
    status, out, err = run_here(workdir, '--mode=generate', f'--memory={name}', '--max_new_tokens=12',
                                '--temperature=0', *(f'--prompt={prompt}' for prompt in prompts))
    assert status == 0, err
    assert out == ''.join(f'--- 4 loops\n{prompt}{text}\n' for prompt, text in zip(prompts, expected[name]))
  assert len({tuple(texts) for texts in expected.values()}) > 1


def test_csv_of_rows(tmp_path):
  rows = [{'schedule': '0.5 0.5', 'exit': 'a "b", c', 'loss': 1.25}, {'schedule': '1', 'exit': '', 'loss': 2.0}]
  metrics.write_csv(tmp_path / 'rows.csv', rows)
  assert (tmp_path / 'rows.csv').read_text() == 'schedule,exit,loss\n0.5 0.5,"a ""b"", c",1.25\n1,,2.0\n'


def test_exits_of_the_command_line():
  from experiments import main
  from loopformer.inference import exits
  from tests.parts import ROWS
  model = ROWS['loopformer'].model
  runs = main.rules('kl:1e-3,0.5;stable:3', model)
  assert list(runs) == ['kl:0.001', 'kl:0.5', 'stable:3']
  assert runs['stable:3'].exit == exits.Adaptive(rule=exits.Stable(threshold=3.0)) and runs['kl:0.5'].plan.longest == 4
  for text, message in (('kl:x', '--exits=x'), ('gait:1', "no rule 'gait:1'"), ('kl:-1', 'threshold = -1')):
    with pytest.raises(main.ConfigError, match=message):
      main.rules(text, model)
  assert list(main.rules('gate:0.5', ROWS['ouro'].model)) == ['gate:0.5']
