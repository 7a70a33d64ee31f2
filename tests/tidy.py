"""What no text of the repository has: spaces at the end of a line, marks of a merge, an end without a newline.

    python -m tests.tidy FILE ...

Names every place, with status 1 where there is one; mends nothing.
"""
from pathlib import Path
import re
import sys

MARKS = re.compile(r'<{7} |={7}$|>{7} ')


def faults(name: str, text: str) -> list[str]:
  """Every fault of a text, as lines that name the file and the line."""
  lines = text.split('\n')
  found = [f'{name}:{number}: {why}' for number, line in enumerate(lines, 1)
           for why, there in (('spaces at the end of the line', line != line.rstrip(' \t\r')),
                              ('a mark of a merge', MARKS.match(line))) if there]
  if text and (lines[-1] or text.endswith('\n\n')):
    found.append(f'{name}:{len(lines)}: ends with {"no" if lines[-1] else "more than one"} newline')
  return found


def main(names: list[str]) -> int:
  found = [fault for name in names for fault in faults(name, Path(name).read_bytes().decode(errors='replace'))]
  print('\n'.join(found), end='\n' if found else '')
  return bool(found)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
