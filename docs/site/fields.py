"""Docstrings of this library tell of fields and arguments in running text, `name: what it is.` Here they become
lists."""
import re

import griffe

ENTRY = re.compile(r'(?:(?<=^)|(?<=\n)|(?<=[.;]\s))((?:\w+, )*\w+): (?=\S)')


def listed(text: str, names: set[str]) -> str:
  """The text, in which every `name: ` of names that begins a line or a sentence begins an entry of a list."""
  out = []
  for paragraph in re.split(r'(\n\s*\n)', text):
    if paragraph.startswith('    ') or re.match(r'(Args|Returns|Raises|Yields|Attributes):', paragraph):
      out.append(paragraph)
      continue
    found = [match for match in ENTRY.finditer(paragraph) if set(match[1].split(', ')) <= names]
    if not found:
      out.append(paragraph)
      continue
    ends = [*(match.start() for match in found[1:]), len(paragraph)]
    items = [f'- `{match[1]}`: {paragraph[match.end():end].strip()}' for match, end in zip(found, ends)]
    lead = paragraph[:found[0].start()].rstrip()
    out.append('\n\n'.join(filter(None, [lead, '\n'.join(items)])))
  return ''.join(out)


class Fields(griffe.Extension):
  """What mkdocstrings reads, with lists of fields and arguments."""

  def on_class_members(self, *, cls, **_):
    """Fields of classes."""
    if cls.docstring:
      cls.docstring.value = listed(cls.docstring.value, set(cls.members))

  def on_function_instance(self, *, func, **_):
    """Arguments of functions."""
    if func.docstring:
      func.docstring.value = listed(func.docstring.value, {parameter.name for parameter in func.parameters})
