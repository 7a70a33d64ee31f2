"""What all tests share: quick compilation, deterministic hypothesis, quiet logs."""
import collections
import gc
import logging
import math
import os
from unittest import mock

import hypothesis
import jax
import pytest

from loopformer import config as configs
from tests import quick

# The tests compile thousands of small programs and run each a few times. Flags are read when the first device is asked
# for; the processes that tests start do not inherit them.
with mock.patch.dict(os.environ, XLA_FLAGS=f'{quick.FLAGS} {os.environ.get("XLA_FLAGS", "")}'):
  jax.devices()
configs._TRUST.set(True)  # the folders that tests read are their own; tests/test_trust.py has others'
hypothesis.settings.register_profile('loopformer', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('loopformer')
logging.getLogger('absl').setLevel(logging.ERROR)
# Tracing makes millions of small objects, few of them in cycles: the usual thresholds cost a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)


def pytest_collection_modifyitems(items):
  """Files with the most long tests first: what is handed out last should be short."""
  slow = collections.Counter(item.path for item in items if item.get_closest_marker('slow'))
  items.sort(key=lambda item: -slow[item.path])


def memory_maps() -> float:
  """Of this process; infinitely many where the system does not tell."""
  try:
    with open('/proc/self/maps', 'rb') as file:
      return sum(1 for _ in file)
  except OSError:
    return math.inf


@pytest.fixture(scope='module', autouse=True)
def programs_of_a_file():
  """Lets go of compiled programs after a file, where they have become many.

  Each holds several memory maps, of which Linux allows a process 65,530: a suite that keeps them all dies of a
  segmentation fault in the middle of a compilation. What is kept, the next files need not compile again.
  """
  yield
  if memory_maps() > 20_000:
    jax.clear_caches()
    gc.collect()
