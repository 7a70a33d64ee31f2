"""What all tests share: quick compilation, deterministic hypothesis, quiet logs."""
import gc
import logging

import hypothesis
import jax
import pytest

# The tests compile several hundred small programs and run each a few times. What must hold of optimised programs (the
# sharded step) runs in processes of their own, which do not read this file.
jax.config.update('jax_disable_most_optimizations', True)
hypothesis.settings.register_profile('loopformer', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('loopformer')
logging.getLogger('absl').setLevel(logging.ERROR)


@pytest.fixture(scope='module', autouse=True)
def programs_of_a_file():
  """Lets go of the programs that a file has compiled.

  Each holds several memory maps, of which Linux allows a process 65,530: a suite that keeps them all dies of a
  segmentation fault in the middle of a compilation.
  """
  yield
  jax.clear_caches()
  gc.collect()
