"""Every published configuration as text: its fields, its parameters, and how they divide over four devices."""
import difflib
import os
from pathlib import Path

import jax
import pytest

from experiments.configs import loopformer as paper
from loopformer import config as configs
from loopformer import sharding
from loopformer.model import parameter_count
from tests import parts

FOLDER = Path(__file__).parent / 'golden'
UPDATE = 'UPDATE_GOLDEN'
FSDP = 4
VARIANTS = [(size, kind, ee) for size in paper.SIZES for kind in paper.KINDS for ee in (0, 1)
            if not ee or kind in ('base_loop', 'tmlt')]


def name_of(size: str, kind: str, ee: int) -> str:
  return f'loopformer_{size}_{kind}{"_ee" if ee else ""}'


def text_of(config) -> str:
  """Configuration, parameter count, and a line for each parameter; shapes alone, nothing is allocated."""
  lines = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(parts.shapes(config.model)):
    where = jax.tree_util.keystr(path, simple=True, separator='/')
    axis = sharding.split_axis(leaf.shape, FSDP)
    split = 'whole' if axis is None else f'axis {axis}'
    lines.append(f'{where} {leaf.dtype}{list(leaf.shape)} {split}')
  count = f'parameters: {parameter_count(config.model):,} (with their split over fsdp={FSDP})'
  return '\n'.join([configs.describe(config), '', count, *lines, ''])


@pytest.mark.parametrize('size, kind, ee', VARIANTS, ids=[name_of(*v) for v in VARIANTS])
def test_golden(size, kind, ee):
  path = FOLDER / f'{name_of(size, kind, ee)}.txt'
  text = text_of(paper.get_config(f'{size},kind={kind},ee={ee}'))
  if os.environ.get(UPDATE):
    path.write_text(text)
  old = path.read_text() if path.exists() else ''
  changes = '\n'.join(difflib.unified_diff(old.splitlines(), text.splitlines(), path.name, 'now', lineterm='', n=0))
  assert text == old, (f'{changes}\nIf this is meant: {UPDATE}=1 python -m pytest tests/test_golden.py, '
                       'and commit tests/golden with the change')


def test_golden_files_are_of_configurations_that_exist():
  assert {path.stem for path in FOLDER.iterdir()} == {name_of(*variant) for variant in VARIANTS}


def formula(kind: str, layers: int, width: int, hidden: int, vocab: int, length: int) -> int:
  """Parameters by the paper's architecture (sheet, section 2)."""
  block = 3 * width * width + width * width + 2 * width * hidden
  embed = 256 * width + width + width * width + width
  total = vocab * width + length * width + width
  if kind in ('base', 'base_loop'):
    return total + layers * (block + 2 * width)
  return total + layers * (block + 4 * width * width + 4 * width) + (2 if kind == 'loopformer' else 1) * embed


@pytest.mark.parametrize('kind, layers', [('loopformer', 3), ('tmlt', 3), ('base_loop', 3), ('base', 24)])
def test_parameter_count_of_the_published_sizes(kind, layers):
  model = paper.get_config(f'paper,kind={kind}').model
  expected = formula(kind, layers, width=2048, hidden=5120, vocab=50304, length=1024)
  assert parameter_count(model) == expected
