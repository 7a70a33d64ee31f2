"""Folders say what they hold: who may import whom (docs/design.md)."""
import ast
from pathlib import Path

import pytest

from tests import parts

LIBRARY = parts.ROOT / 'loopformer'
MODULES = sorted(path.relative_to(parts.ROOT) for path in LIBRARY.rglob('*.py'))


def imported(path: Path) -> set[str]:
  """Names of all modules that a file imports, inside functions too."""
  found = set()
  for node in ast.walk(ast.parse((parts.ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {node.module, *(f'{node.module}.{name.name}' for name in node.names)}
  return found


def test_what_one_paper_alone_uses_is_imported_by_nobody_else():
  folders = {path.name for path in (LIBRARY / 'papers').iterdir() if path.is_dir() and path.name != '__pycache__'}
  assert {'melt', 'mor', 'plt'} <= folders
  for path in MODULES:
    own = path.parts[2] if path.parts[1] == 'papers' and len(path.parts) > 3 else None
    others = {name for name in imported(path) for folder in folders - {own}
              if name.startswith(f'loopformer.papers.{folder}')}
    assert not others or path.parts[1] == 'convert', (path, others)


@pytest.mark.parametrize('folder', ['data', 'terms', 'tasks', 'training'])
def test_linen_stays_where_models_are_made(folder):
  """What trains and feeds them sees `apply` and trees of arrays."""
  for path in MODULES:
    if path.parts[1] == folder:
      assert not [name for name in imported(path) if name.startswith('flax.linen')], path


def test_the_library_knows_nothing_of_experiments():
  for path in MODULES:
    assert not [name for name in imported(path) if name.split('.')[0] in ('experiments', 'tests')], path
