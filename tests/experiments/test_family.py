"""Every system from its configuration: trained, resumed, evaluated at its depths, and made to write, in one process."""
import contextlib
import dataclasses
import math
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from experiments.main import held_out
import loopformer
from loopformer import config as configs
from loopformer.inference import measures
from loopformer.inference.evaluate import evaluate
from loopformer.training import metrics
from loopformer.training.train import train
from tests import parts
from tests.data.test_data import write_corpus
from tests.experiments.test_golden import config_of

SYSTEMS = [('algoformer', 'cpu,task=chain'), ('huginn', 'cpu,ramp=4'), ('intra_layer', 'cpu,map=2111'),
           ('latent_thoughts', 'p_hop,layers=4,loops=1,cosine=1,period=2'), ('latent_thoughts', 'addition,kind=middle'),
           ('length_generalization', 'cpu,task=copy'), ('linear_icl', ''), ('linear_icl', 'predict=weights'),
           ('looped_icl', 'cpu,grow=1'), ('mor', 'tiny'), ('mor', 'tiny,kind=token,balance=free'),
           ('parcae', 'cpu,ramp=3'), ('plt', 'tiny,window=3'), ('shift', 'p_hop,first=2'),
           ('shift', 'markov,first=2,moments=reset,rewarm=2'), ('timestep', 'cpu,kind=table')]

LENGTH = 32  # of texts, at most


def brief(config, corpus, steps: int = 4):
  """The same experiment, cut to a few steps of small batches."""
  task = config.task
  if hasattr(task, 'corpus'):
    task = dataclasses.replace(task, corpus=corpus, length=min(task.length, LENGTH))
  else:
    task = dataclasses.replace(task, held_out=8)
  run = dataclasses.replace(config.train, steps=steps, batch=4, log_every=1, eval_every=2, eval_batches=2, save_every=2)
  return dataclasses.replace(config, task=task, train=run, optim=soon(config.optim))


def soon(optim):
  """The same optimiser, whose warm-up ends within a few steps."""
  if hasattr(optim, 'of'):
    return dataclasses.replace(optim, of=soon(optim.of))
  warmup = min(optim.schedule.warmup, 1)
  return dataclasses.replace(optim, schedule=dataclasses.replace(optim.schedule, warmup=warmup))


@contextlib.contextmanager
def compiled_once():
  """Runs meanwhile are of one configuration: the step of the first serves all."""
  training, steps = sys.modules[train.__module__], []
  make_step = training.make_step

  def first(*arguments):
    if not steps:
      steps.append(make_step(*arguments))
    return steps[0]

  with mock.patch.object(training, 'make_step', first):
    yield


@pytest.mark.slow
@pytest.mark.parametrize('file, argument', SYSTEMS, ids=[f'{file} {argument}' for file, argument in SYSTEMS])
def test_system(file, argument, tmp_path):
  config = brief(config_of(file, argument), write_corpus(tmp_path / 'text'))
  configs.check(config)
  configs.save(config, tmp_path)
  log = []
  with compiled_once():
    end = train(config, tmp_path, log.append)
    again = configs.read(tmp_path)
    assert configs.flatten(again) == configs.flatten(config)

    # Its second half again, from the checkpoint of the first: bit for bit.
    (tmp_path / 'checkpoints/4').rename(tmp_path / 'last')
    resumed = train(again, tmp_path, log.append)
  assert 'resumed from step 2' in '\n'.join(log)
  for ours, theirs in zip(jax.tree.leaves(end.params), jax.tree.leaves(resumed.params)):
    np.testing.assert_array_equal(ours, theirs)

  model, params, tokenizer, config = loopformer.load(tmp_path)
  rows = evaluate(model, params, held_out(config, tmp_path, 2), config.evals.schedules(),
                  tokenizer and measures.text_bytes(tokenizer), config.task.measure)
  assert [row['schedule'] for row in rows] == list(config.evals.schedules())
  assert all(math.isfinite(row['loss']) for row in rows)
  curve = metrics.training_curve(metrics.read_rows(tmp_path / 'metrics.jsonl'))
  assert [row['step'] for row in curve] == [2, 4]
  if hasattr(model.cell, 'inject'):
    assert 0 <= curve[-1]['radius'] < math.inf
  rows = metrics.read_rows(tmp_path / 'metrics.jsonl')
  stages = [(row['step'], row['stage']) for row in rows if row['kind'] == 'stage']
  assert stages == ([(2, 1)] if file == 'shift' else [])
  assert ('step 2: stage 0 has ended, stage 1 begins' in log) == (file == 'shift')
  if tokenizer is not None:
    texts = loopformer.generate(model, params, tokenizer, ['', ''], budget=1, max_new_tokens=3, temperature=0)
    assert len(texts) == 2 and texts[0] == texts[1]


@pytest.mark.parametrize('moments, counts', [('kept', {4}), ('reset', {2})])
def test_shift_tells_the_optimiser_of_its_switch(moments, counts, tmp_path):
  """After two updates before and two after the switch: Adam's corrections count those since its moments began."""
  config = brief(config_of('shift', f'p_hop,first=2,moments={moments},rewarm=100'), None)
  configs.save(config, tmp_path)
  state = train(config, tmp_path, lambda line: None).optimizer
  assert (int(state.stage), int(state.since)) == (1, 2)
  adam = [leaf for leaf in jax.tree.leaves(state.inner, is_leaf=lambda s: hasattr(s, 'nu')) if hasattr(leaf, 'nu')]
  assert {int(leaf.count) for leaf in adam} == counts


def test_modules_of_a_configuration_are_not_shared():
  """One block in three stacks is three blocks."""
  config = config_of('parcae', 'cpu')
  blocks = [config.model.prelude.block, config.model.cell.core.block, config.model.coda.block]
  assert len({id(block) for block in blocks}) == 3
  assert set(parts.shapes(config.model)) == {'read_in', 'prelude', 'cell', 'coda', 'read_out'}
