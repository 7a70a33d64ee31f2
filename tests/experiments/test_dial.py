"""The study of the dial on reasoning: accuracy at every number of loops against a count by hand, its costs, and means
over seeds."""
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.studies import dial as study
from loopformer import plans
from loopformer.api import Loaded
from loopformer.nn.embed import Head, Vectors
from loopformer.nn.kernels import Bidirectional
from loopformer.tasks.generated import Generated
from loopformer.tasks.pointers import Pointers
from tests import parts
from tests.parts import D

OF = Pointers(places=4, hops=2)
MODEL = parts.looped(parts.plain(1, kernel=Bidirectional()), loops=3, read_in=Vectors(inputs=6, width=D, length=4),
                     read_out=Head(outputs=4))
TASK = Generated(of=OF, held_out=6, tests={'2 hops': dataclasses.replace(OF, fewest=2)})


def test_what_the_study_measures(monkeypatch, tmp_path):
  trained, weights = [], parts.params(MODEL)
  examples = {split: [TASK.source(split, 0)[i] for i in range(6)] for split in TASK.splits}
  batches = {split: {name: np.stack([example[name] for example in some]) for name in some[0]}
             for split, some in examples.items()}
  config = SimpleNamespace(task=TASK, train=SimpleNamespace(eval_batches=1))
  monkeypatch.setattr(study, 'FLAGS', type('Flags', (), {
      'workdir': str(tmp_path), 'task': 'pointers', 'eval_batches': None,
      '__getitem__': lambda self, name: SimpleNamespace(value=['train.steps=5'])})())
  monkeypatch.setattr(study.command, 'train', lambda spec, folder, *rest: trained.append((spec, folder.name, rest)))
  monkeypatch.setattr(study.loopformer, 'load', lambda folder: Loaded(MODEL, weights, None, config))
  monkeypatch.setattr(study, 'held_out', lambda config, folder, count, split: [batches[split]])
  monkeypatch.setattr(study, 'TOGETHER', 6)
  monkeypatch.setattr(study.costs, '_milliseconds', lambda call, repeats: 12.0)
  rows = study.run('tmlt+ee', 3)
  assert trained == [
      (f'{study.CONFIG}:pointers,kind=tmlt,ee=1', 'pointers-tmlt+ee-3', ('train.steps=5', 'train.seed=3'))]
  assert [row['loops'] for row in rows] == [1, 2, 3] == [row['steps'] for row in rows]
  for row in rows:
    plan = plans.schedule(plans.resolve(row['loops']))
    for split, batch in batches.items():
      z = parts.forward(MODEL, weights, batch['tokens'], plan).z
      own = np.asarray(MODEL.apply({'params': weights}, z, method='logits')).argmax(-1)
      assert row[split] == pytest.approx((own == batch['targets']).mean())
    assert row['MFLOP'] == pytest.approx(4 * MODEL.flops(4, row['loops']) / 1e6) and row['ms'] == 2.0


def test_means_over_seeds():
  """Of the seeds that have a kind; and half of the range between them."""
  def rows(*accuracies):
    return [{'loops': n, 'validation': a, '1 hops': a / 2, 'MFLOP': 2.0 * n, 'steps': n, 'ms': 0.5}
            for n, a in enumerate(accuracies, 1)]

  table = study.table({'0': {'loopformer': rows(0.5, 1.0), 'tmlt': rows(0.25, 0.5)},
                       '1': {'loopformer': rows(0.7, 1.0)}})
  assert [(row['kind'], row['loops'], row['accuracy'], row['+-']) for row in table] == [
      ('loopformer', 1, 0.6, pytest.approx(0.1)), ('loopformer', 2, 1.0, 0.0), ('tmlt', 1, 0.25, ''),
      ('tmlt', 2, 0.5, '')]
  assert [row['1 hops'] for row in table] == [0.3, 0.5, 0.125, 0.25]
  assert table[1]['MFLOP'] == 4 and table[1]['steps'] == 2
