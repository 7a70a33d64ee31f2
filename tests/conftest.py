"""What all tests share: deterministic hypothesis, and quiet logs."""
import logging

import hypothesis

hypothesis.settings.register_profile('loopformer', deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile('loopformer')
logging.getLogger('absl').setLevel(logging.ERROR)
