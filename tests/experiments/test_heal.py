"""A decoder that is made to loop, before and after a few steps, by the study's command."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.studies import heal
from loopformer import config as configs
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.types import ConfigError
from tests import llama_reference as reference, parts

CODE = 'import sys; from absl import app; from experiments.studies import heal; heal.define_flags(); app.run(heal.main)'
CONFIG = reference.CONFIGS['llama'] | {'vocab_size': 257, 'eos_token_id': 256}


def save(folder):
  """Writes a decoder of bytes."""
  held = reference.weights(CONFIG)
  rows = np.random.default_rng(0).standard_normal((257, reference.D)).astype(np.float32)
  held |= {name: rows for name in held if name in ('model.embed_tokens.weight', 'lm_head.weight')}
  folder.mkdir()
  reference.save(folder, CONFIG, held, 1)
  (folder / 'tokenizer.json').write_text(ByteTokenizer().hugging_face())
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|endoftext|>'}))


@pytest.mark.slow
def test_the_command_trains_both_and_tells_before_and_after(tmp_path):
  save(tmp_path / 'llama')
  for i in range(60):
    (tmp_path / f'{i}.txt').write_text(f'a text of number {i}, and another one. ' * 20)
  parts.python(CODE, f'--from={tmp_path / "llama"}', '--prelude=1', '--retrofit=1', '--loops=2', '--depths=1,2',
               f'--corpus={tmp_path}/*.txt', '--steps=3', '--batch=2', '--window=16', f'--workdir={tmp_path / "runs"}',
               f'--out={tmp_path / "out"}')
  found = json.loads((tmp_path / 'out/results.json').read_text())['rows']
  assert [(row['model'], row['trained'], row['budget']) for row in found] == [
      ('looped', 'no', 1), ('looped', 'no', 2), ('looped', '3 steps', 1), ('looped', '3 steps', 2), ('plain', 'no', 1),
      ('plain', '3 steps', 1)]
  loss = {(row['model'], row['trained'], row['budget']): row['loss'] for row in found}
  assert (loss['looped', 'no', 1] != loss['looped', '3 steps', 1]
          and loss['plain', 'no', 1] != loss['plain', '3 steps', 1])
  assert all(np.isfinite(value) for value in loss.values()) and len({row['tokens'] for row in found}) == 1
  assert (tmp_path / 'out/table.md').is_file()


class Flags(SimpleNamespace):
  """What the study reads of its flags."""

  def __getitem__(self, name):
    return SimpleNamespace(value=getattr(self, name))


@pytest.fixture
def flags(tmp_path, monkeypatch):
  """A decoder and a text for the study, whose measures are told."""
  save(tmp_path / 'llama')
  for i in range(40):
    (tmp_path / f'{i}.txt').write_text(f'a text of number {i}. ' * 4)
  given = Flags(**{'from': str(tmp_path / 'llama')}, corpus=[f'{tmp_path}/*.txt'], steps=0, batch=2, window=None,
                depths=None)
  monkeypatch.setattr(heal, 'FLAGS', given)
  monkeypatch.setattr(heal, 'evaluate', lambda model, params, batches, schedules, lengths: [
      {'budget': len(sizes), 'loss': 1.0, 'bits_per_byte': 1.0, 'tokens': len(batches)}
      for sizes in schedules.values()])
  return given


def test_what_other_flags_imported_or_trained_is_not_taken(flags, tmp_path):
  options = {'prelude': 1, 'retrofit': 1, 'loops': 2}
  rows = heal.arm('looped', options, heal.budgets(2), tmp_path)
  assert [row['budget'] for row in rows] == [1, 2] and heal.arm('looped', options, heal.budgets(2), tmp_path) == rows
  for other in (options | {'loops': 3}, options | {'coda': 1}, {'prelude': 1, 'damped': 0.5, 'loops': 2}):
    with pytest.raises(ConfigError,
                       match='looped-imported: it was made with (loops = 2, not with 3|coda = none|damped = none)'):
      heal.arm('looped', other, heal.budgets(2), tmp_path)
  with pytest.raises(ConfigError, match='prelude = 10'):  # of which nothing is left
    heal.arm('other', options | {'prelude': 9}, heal.budgets(2), tmp_path)
  heal.arm('other', options, heal.budgets(2), tmp_path)
  flags.steps = 3
  loaded = heal.imported(tmp_path / 'looped-imported', options)
  task = heal.Text(corpus=heal.Files(train=tuple(flags.corpus)),
                   tokenizer=heal.SavedTokenizer(path=str(tmp_path / 'looped-imported')), length=reference.T,
                   folder=str(tmp_path / 'data'))
  configs.save(heal.healing(loaded, tmp_path / 'looped-imported', 4, 2, task, 2), tmp_path / 'looped')
  with pytest.raises(ValueError, match='data was prepared from something else: corpus='):
    flags.corpus = [f'{tmp_path}/1*.txt']
    heal.arm('looped', options, heal.budgets(2), tmp_path)


def test_the_corpus_is_read_once_and_has_to_be_large_enough(flags, tmp_path, monkeypatch):
  """By both models, in the words of this command."""
  made = []
  monkeypatch.setattr(heal.prepared, '_tokenise',
                      lambda *given, own=heal.prepared._tokenise: made.append(own(*given)) or made[-1])
  for name, options in (('looped', {'prelude': 1, 'damped': 0.5, 'loops': 2}), ('plain', {})):
    heal.arm(name, options, {'1': (1.0,)}, tmp_path)
  assert len(made) == 1 and (tmp_path / 'data/manifest.json').is_file()
  flags.batch = 1000
  with pytest.raises(ConfigError, match=r'--corpus=.*: \d+ windows of \d+ tokens in its train split, fewer than '
                                        r'--batch=1000; give more'):
    heal.arm('plain', {}, {'1': (1.0,)}, tmp_path)


def test_what_stands_before_damped_steps_learns_in_every_step(flags, tmp_path):
  """Whose loop does not take its input in again: of no drawn number of loops is a part without gradient."""
  damped, recurrent = (SimpleNamespace(model=parts.ROWS[name].model) for name in ('damped', 'huginn'))
  for mean in (2, 5, 12):
    plan = heal.drawn(damped, 20, mean)
    assert plan.differentiated == plan.expected and plan.longest == mean
    assert heal.drawn(recurrent, 20, mean).longest == min(8, mean)
  assert heal.drawn(damped, 20, 1).longest == 1
  with pytest.raises(ConfigError, match='--damped=1: a whole step'):
    heal.check_looped({'damped': 1.0, 'loops': 4})


def test_depths_and_windows_that_do_not_fit(flags, tmp_path):
  assert list(heal.budgets(3)) == ['1', '2', '3']
  flags.depths = ['1', '4']
  assert {name: len(sizes) for name, sizes in heal.budgets(2).items()} == {'1': 1, '4': 4}
  for depths, told in ((['1', '1'], 'more than once'), (['0'], '1 or more'), (['x'], 'whole numbers')):
    flags.depths = depths
    with pytest.raises(SystemExit, match=f'error: --depths=.*{told}'):
      heal.budgets(2)
  flags.depths, flags.window = ['99999999'], reference.T + 1
  with pytest.raises(ConfigError, match='--depths = 99999999'):
    heal.budgets(2)
  with pytest.raises(ConfigError, match=f'--window={flags.window}: the model has {reference.T} positions'):
    heal.arm('plain', {}, {'1': (1.0,)}, tmp_path)


def test_the_study_of_contrasts_counts_what_the_law_hits():
  """Its weight of 0 is the deep answer, and its other numbers are those of logits in NumPy."""
  code = '''
import numpy as np
import jax.numpy as jnp
import loopformer
from experiments.studies import contrast as study
from loopformer import plans
from tests import parts
model, batch = parts.ROWS["loopformer"].model, parts.batch(4)
params = parts.params(model)
rows = {(row["shallow loops"], row["weight"]): row for row in study.measure(model, params, [batch, batch])}
assert len(rows) == 4 * 5
asked = np.asarray(batch["weights"])
logits = lambda plan: np.asarray(study.answers(model, params, batch, plan), np.float64)
log_p = lambda x: x - np.log(np.exp(x).sum(-1, keepdims=True))
deep, one = log_p(logits(parts.padded(4))), log_p(logits(parts.padded(1)))
best = (asked * (deep.argmax(-1) == batch["targets"])).sum() / asked.sum()
for loops in range(4):
  assert abs(rows[loops, 0.0]["accuracy"] - best) < 1e-6
kept = deep >= deep.max(-1, keepdims=True) + np.log(0.1)
law = np.where(kept, deep - 0.5 * one, -np.inf)
hit = (asked * (law.argmax(-1) == batch["targets"])).sum() / asked.sum()
left = (asked * np.take_along_axis(kept, np.asarray(batch["targets"])[..., None], -1)[..., 0]).sum() / asked.sum()
assert abs(rows[1, 0.5]["accuracy"] - hit) < 1e-6 and abs(rows[1, 0.5]["kept"] - left) < 1e-6
assert rows[1, 0.5]["tokens"] == 2 * int(asked.sum())
'''
  parts.python(code)
