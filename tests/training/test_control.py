"""SHIFT's criterion on curves that are made up (sheet, section 10 point 2)."""
import json
import math

import pytest

from loopformer.training.control import NoControl, Plateau
from loopformer.types import ConfigError

EVERY = 50


def follow(control, losses, norms=None, steps=EVERY):
  """(stage, evaluation at which it was entered) after training values and evaluations in turn."""
  memory = control.start()
  entered = None
  for i, loss in enumerate(losses, 1):
    before = control.stage(memory)
    memory = control.watch(memory, i * steps, {'loss': 1.0, 'grad_norm': 1.0 if norms is None else norms[i - 1]})
    memory = control.watch(memory, i * steps, {f'loss@{n}': loss for n in control.loops})
    memory = json.loads(json.dumps(memory))  # as a checkpoint keeps it
    if control.stage(memory) != before:
      entered = i
  return control.stage(memory), entered


FLAT, FALLING = [1.0] * 40, [10 * 0.9 ** i for i in range(40)]


def test_a_falling_loss_never_switches():
  assert follow(Plateau(), FALLING) == (0, None)


@pytest.mark.parametrize('window, patience', [(5, 3), (1, 1), (3, 4)])
def test_a_flat_loss_with_a_steady_gradient_switches_at_once(window, patience):
  """The first check needs window + 1 values, the last is the patience-th good one."""
  assert follow(Plateau(window=window, patience=patience), FLAT) == (1, window + patience)


def test_a_swinging_gradient_does_not():
  norms = [1.0 if i % 2 else 30.0 for i in range(40)]
  assert follow(Plateau(decay=0.0, window=5), FLAT, norms) == (0, None)


def test_nan_neither_switches_nor_crashes():
  assert follow(Plateau(), [math.nan] * 40) == (0, None)
  assert follow(Plateau(), [math.nan] * 5 + FLAT) == (1, 5 + 5 + 3)


def test_one_bad_check_resets_the_count():
  losses = [1.0] * 7 + [0.5] + [0.5] * 20  # good, good, then progress within the window
  assert follow(Plateau(), losses)[1] > 8


def test_without_thresholds_the_longest_stage_decides():
  assert follow(Plateau(progress=0.0), FLAT) == (0, None)
  assert follow(Plateau(progress=0.0, longest=10 * EVERY), FLAT) == (1, 10)


def test_no_first_stage():
  control = Plateau(longest=0)
  assert control.stage(control.start()) == 1


def test_several_stages_in_order():
  control = Plateau(loops=(1, 2, 4), window=1, patience=1)
  memory, stages = control.start(), []
  for i in range(1, 12):
    memory = control.watch(memory, i, {'grad_norm': 1.0})
    memory = control.watch(memory, i, {'loss@1': 1.0, 'loss@2': 1.0, 'loss@4': 1.0})
    stages.append(control.stage(memory))
  assert stages == [0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2] and memory['switches'] == [2, 4]


def test_steady_is_always_in_its_only_stage():
  assert NoControl().stage(NoControl().watch(NoControl().start(), 1, {'loss': 0.0})) == 0


@pytest.mark.parametrize('options, message', [
    (dict(loops=(0, 2)), r'control\.loops = \(0, 2\)'), (dict(loops=(4, 2)), r'control\.loops'),
    (dict(loops=()), r'control\.loops'), (dict(window=0), r'control\.window = 0'),
    (dict(patience=0), r'control\.patience = 0'), (dict(progress=-0.1), r'control\.progress = -0\.1'),
    (dict(steadiness=-1), r'control\.steadiness = -1'), (dict(longest=-1), r'control\.longest = -1'),
], ids=str)
def test_bad_input(options, message):
  with pytest.raises(ConfigError, match=message):
    Plateau(**options)
