"""What compiled programs compute, move and hold may not grow unnoticed: figures that no machine's speed enters.

UPDATE_GOLDEN=1 writes them anew, for a change that is meant.
"""
import json
import os
from pathlib import Path

import pytest

from tests import parts

RECORD = Path(__file__).parents[1] / 'figures.json'
ROOM = 1.1  # of the recorded figure: versions of the compiler differ by a few parts in a hundred


@pytest.mark.slow
def test_figures_of_compiled_programs_do_not_grow():
  """In a process of its own, whose compiler optimises."""
  code = 'import json; from experiments.benchmark.figures import figures; print(json.dumps(figures()))'
  found = json.loads(parts.python(code, XLA_FLAGS='').splitlines()[-1])
  if os.environ.get('UPDATE_GOLDEN'):
    RECORD.write_text(json.dumps(found, indent=1) + '\n')
  recorded = json.loads(RECORD.read_text())
  assert set(found) == set(recorded)
  grown = [f'{program}: {name} {value:.6g}, recorded {recorded[program][name]:.6g}'
           for program, values in found.items() for name, value in values.items()
           if not 0 < value <= ROOM * recorded[program][name]]
  assert not grown, '; '.join(grown)
