"""What all tests share: quick compilation, deterministic hypothesis, quiet logs."""
import logging

import hypothesis
import jax

# The tests compile several hundred small programs and run each a few times. What must hold of optimised programs (the
# sharded step) runs in processes of their own, which do not read this file.
jax.config.update('jax_disable_most_optimizations', True)
hypothesis.settings.register_profile('loopformer', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('loopformer')
logging.getLogger('absl').setLevel(logging.ERROR)
