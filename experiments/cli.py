"""The command `loopformer`, which an installation has on its path: its first word says what to do, the rest are flags.

`loopformer train FLAGS` is `python -m experiments.main --mode=train FLAGS`, wherever it is started.
"""
from __future__ import annotations

import difflib
import runpy
import sys

import loopformer
from loopformer.training import interrupts

MAIN = 'experiments.main'
COMMANDS = {  # word -> (module, what it does); of MAIN the word is the mode
    'train': (MAIN, 'train a configuration, or go on with the run of a work folder'),
    'eval': (MAIN, 'evaluate a run at depths, schedules and exits, or on a text of your own'),
    'generate': (MAIN, 'write texts, or answer chats'),
    'inspect': (MAIN, 'what every loop answers of a prompt, how far it goes and where it looks'),
    'harness': (MAIN, 'tasks of lm-evaluation-harness at any depth (extra `eval`)'),
    'import': (MAIN, "make a work folder of a model of Hugging Face, GGUF, or a paper's own code"),
    'plan': (MAIN, 'what a run would need of devices that are not here'),
    'configs': (MAIN, 'list the configurations that come with the library'),
    'compare': ('experiments.compare', 'train several configurations on the same data, and compare them'),
    'export': ('experiments.tools.export', 'write a run as a folder for transformers'),
    'benchmark': ('experiments.benchmark.__main__', 'measure speed, memory and compile time on this machine'),
    'evaluation-data': ('experiments.tools.evaluation_data', 'write rows of PIQA, BoolQ, ... that a package carries'),
}
USAGE = '\n'.join((
    'usage: loopformer COMMAND [--flag=value ...]', '',
    *(f'  {word:{max(map(len, COMMANDS))}}  {about}' for word, (_, about) in COMMANDS.items()), '',
    '  loopformer train --config=loopformer:tiny --workdir=runs/tiny',
    '  loopformer eval --workdir=runs/tiny --depths=1,2,4,8', '',
    'loopformer COMMAND --help lists its flags; loopformer --version prints the version'))


def resolved(words: list[str]) -> tuple[str, list[str]]:
  """The module that the words of a command line are for, and its flags.

  Raises:
    SystemExit: the first is no command, or a flag says another mode; with one line.
  """
  word, *rest = words
  if word not in COMMANDS:
    close = [] if word.startswith('-') else difflib.get_close_matches(word, COMMANDS, 1)
    sys.exit(f'error: {word}: {"no command, which comes first" if word.startswith("-") else "no such command"}; '
             + (f'did you mean {close[0]}? ' if close else '') + f'there are {", ".join(COMMANDS)}')
  module, _ = COMMANDS[word]
  for flag in rest if module == MAIN else ():
    if flag.lstrip('-').partition('=')[0] == 'mode' and flag.startswith('-'):
      sys.exit(f'error: {flag}: the first word, {word}, is the mode; leave it out')
  return module, [f'--mode={word}', *rest] if module == MAIN else rest


def main():
  """Runs the command that `sys.argv` names, as `python -m` would its module."""
  words = sys.argv[1:]
  if not words:
    print(USAGE, file=sys.stderr)
    sys.exit('error: no command; give one of these')
  if words[0] in ('--help', '-h', '-help', 'help'):
    print(USAGE)
  elif words[0] == '--version':
    print(loopformer.__version__)
  else:
    module, flags = resolved(words)
    interrupts.watch()  # imports take seconds, in which Ctrl-C is heard too
    sys.argv[1:] = flags
    runpy.run_module(module, run_name='__main__', alter_sys=True)


if __name__ == '__main__':
  main()
