"""Rules beside fixed budgets, and memories beside the pass over all tokens: the scripts behind the reports."""
import json

import numpy as np
import pytest

from experiments.studies import memories as study
import loopformer
from loopformer import memories
from tests import parts
from tests.parts import ROWS, L, T

POINTS = [('1', 1, 0.4), ('2', 2, 0.8), ('4', 4, 1.0), ('kl:0.1', 1.5, 0.5), ('kl:0.01', 3, 0.995),
          ('gate:0.5', 2, 0.7)]


def test_rules_are_held_against_the_line_of_fixed_budgets(tmp_path):
  folder = tmp_path / 'runs/a/eval'
  folder.mkdir(parents=True)
  (folder / 'exits.json').write_text(json.dumps([{'schedule': name, 'budget': budget, 'accuracy': accuracy}
                                                 for name, budget, accuracy in POINTS]))
  code = ('import sys; from absl import app; from experiments.studies import adaptive; adaptive.define_flags(); '
          'app.run(adaptive.main)')
  out = parts.python(code, f'--workdir={tmp_path / "runs"}', '--models=a', f'--out={tmp_path / "out"}')
  rows = json.loads((tmp_path / 'out/results.json').read_text())['a']
  assert [row['fixed'] for row in rows] == pytest.approx([0.4, 0.8, 1.0, 0.6, 0.9, 0.8])
  assert [row['gain'] for row in rows] == pytest.approx([0, 0, 0, -0.1, 0.095, -0.1])
  assert (tmp_path / 'out/table.md').read_text().strip() == out.strip()
  table = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.strip().splitlines()[2:]]
  assert table == [['a', 'fixed budget', '4', '4', '0.0000', '1', '1', '0.0000', '1'],
                   ['a', 'kl', '3', 'kl:0.01', '0.0950', 'kl:0.01', '3', '-0.1000', 'kl:0.1'],
                   ['a', 'gate', 'none', '', '-0.1000', 'gate:0.5', '2', '-0.1000', 'gate:0.5']]
  assert (tmp_path / 'out/exits.png').read_bytes().startswith(b'\x89PNG')


def test_decoding_with_a_memory_of_every_loop_is_the_pass_over_all_tokens():
  model, prompt = ROWS['prelude_coda'].model, 3
  weights, texts = parts.params(model), parts.tokens(3)
  whole = loopformer.logits(model, weights, texts)
  parts.close(study.decoded(model, weights, texts, prompt), whole[:, prompt:], 1e-5)


def test_a_row_of_the_table_is_what_it_says(monkeypatch):
  ring, half = memories.Ring(size=1), T // 2
  monkeypatch.setattr(study, 'MEMORIES', (memories.PerLoop(), ring))
  model, batch = ROWS['loopformer'].model, parts.batch(4)
  weights = parts.params(model)
  exact, _, row, _ = study.measure(model, weights, [batch])
  assert [exact['memory'], row['memory'], row['one pass over']] == ['PerLoop()', 'Ring(size=1)', 0]
  assert exact['largest'] < 1e-4 and exact['same argmax'] == 1 and abs(exact['change of NLL']) < 1e-5
  assert exact['bytes a token'] == L * row['bytes a token']
  there = np.asarray(loopformer.logits(model, weights, batch['tokens']))[:, half:]
  logits = np.asarray(study.decoded(model.clone(memory=ring), weights, batch['tokens'], 0))[:, half:]
  asked = np.asarray(batch['weights'])[:, half:] > 0
  off = np.abs(logits - there)[asked]
  assert row['tokens'] == asked.sum() and 0 < asked.sum() < asked.size
  assert off.max() > 0.1
  assert (row['mean difference'], row['largest']) == pytest.approx((off.mean(), off.max()), rel=1e-4)
  assert row['same argmax'] == pytest.approx((logits.argmax(-1) == there.argmax(-1))[asked].mean())

  def nll(logits):
    law = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    return -np.take_along_axis(law, np.asarray(batch['targets'])[:, half:, None], -1)[..., 0][asked].mean()

  assert row['NLL'] == pytest.approx(nll(logits), rel=1e-4)
  assert row['change of NLL'] == pytest.approx(nll(logits) - nll(there), rel=1e-3)
