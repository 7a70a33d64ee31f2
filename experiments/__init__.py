"""Runs, configurations and measurements."""
import sys

if sys.argv[:1] == ['-m']:  # a command is being started: what it imports takes seconds, in which Ctrl-C is heard too
  from loopformer.training import interrupts
  interrupts.watch()
