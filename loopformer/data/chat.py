"""Chats as tokens: templates that write messages as text, the ids that end an answer, and which ids an answer has.

Templates are those of Hugging Face's tokenizers, run by jinja2 (extra `chat`) in its sandbox: they see the messages and
nothing of this machine. jinja2 is imported where one is run.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import re
from typing import Any

import numpy as np

from loopformer import reading, storage
from loopformer.data.tokenizer import FILE, Tokenizer, load_tokenizer, write_about
from loopformer.types import ConfigError

OPEN, CLOSE = '\ufdd0', '\ufdd1'  # noncharacters, which stand around what `{% generation %}` encloses
ROLE = 'assistant'  # who gives the answers
INNER = 'of'  # the folder of the tokenizer within that of one around it
PLACES = ('', 'tokenizer', 'data/tokenizer')  # where in a work folder its tokenizer lies
Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTokenizer(Tokenizer):
  """The tokenizer `of`, other ids that end what is generated, one that begins texts, and a template for chats.

  stops: ids besides its `eos`; template: None for none; names: special tokens that the template reads, such as
  ('bos_token', '<s>'); start: the id before a text that is no chat (in chats the template says what begins them).
  """

  of: Tokenizer
  stops: tuple[int, ...] = ()
  template: str | None = dataclasses.field(default=None, repr=False)
  names: tuple[tuple[str, str], ...] = ()
  start: int | None = None

  def __post_init__(self):
    for name, ids in (('stops', self.stops), ('start', () if self.start is None else (self.start,))):
      for i in ids:
        if type(i) is not int or not 0 <= i < self.vocab_size:
          raise ConfigError(f'{name} = {getattr(self, name)}: {i!r} is none of the ids 0 .. {self.vocab_size - 1}')

  @property
  def vocab_size(self) -> int:
    return self.of.vocab_size

  @property
  def eos(self) -> int:
    return self.of.eos

  @property
  def ends(self) -> tuple[int, ...]:
    return tuple(dict.fromkeys((self.eos, *self.stops)))

  def encode(self, text: str) -> list[int]:
    return self.of.encode(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return self.of.encode_batch(texts)

  def encode_special(self, text: str) -> list[int]:
    return self.of.encode_special(text)

  def specials(self) -> dict[str, int]:
    return self.of.specials()

  def decode(self, ids: Sequence[int]) -> str:
    return self.of.decode(ids)

  def byte_lengths(self) -> np.ndarray:
    return self.of.byte_lengths()

  def first_byte_lengths(self) -> np.ndarray:
    return self.of.first_byte_lengths()

  def hugging_face(self) -> str | None:
    return self.of.hugging_face()

  def fingerprint(self) -> str:
    start = [] if self.start is None else [self.start]  # of which older folders know nothing
    about = json.dumps([self.of.fingerprint(), self.stops, self.template, self.names, *start])
    return hashlib.sha256(about.encode()).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    self.of.save(storage.path(folder) / INNER)
    write_about(folder, {'kind': 'chat', 'stops': self.stops, 'template': self.template, 'names': dict(self.names),
                         'start': self.start, 'fingerprint': self.fingerprint()})

  # Chats

  def chat(self, messages: Sequence[Message]) -> list[int]:
    """The ids of messages, and of how an answer to them begins. Raises ConfigError as `conversation`."""
    check_messages(messages, 'messages')
    if messages[-1]['role'] == ROLE:
      raise ConfigError(f'messages: the last is of the role {ROLE!r}, an answer; leave it out, and one is generated')
    return self.encode_special(self._text(messages, True)[0])

  def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of a whole conversation, and which of them a model has to say itself: answers, and what ends them.

    An answer begins where the template would have it generated. It ends with the special token that the template puts
    after it, or with `eos` where it puts none after the last. What a template encloses in `{% generation %}` is taken
    as it says.

    Raises:
      ConfigError: no template, messages without an answer, a template that fails, or one that leaves an answer out.
      ImportError: jinja2 is not installed.
    """
    check_messages(messages, 'messages')
    if not any(map(is_answer, messages)):
      raise ConfigError(f'messages: none of them is an answer (of the role {ROLE!r}, with text); add one')
    text, spans = self._text(messages, False)
    if not spans:
      spans = [self._answer(messages, i, text) for i, message in enumerate(messages) if is_answer(message)]
    spans = [(start, self._closed(text, end)) for start, end in spans]
    last = spans[-1][1]
    ended = self._special_before(text, last) is not None or text[last:].strip()
    text = text if ended else text[:last]
    ids = self.encode_special(text)
    asked = np.zeros(len(ids), bool)
    for start, end in spans:
      first, after = (_common(ids, self.encode_special(text[:place])) for place in (start, end))
      asked[first:after] = True
    asked[:1] = False  # which nothing precedes
    return (ids, asked.tolist()) if ended else ([*ids, self.eos], [*asked.tolist(), True])

  def ending_turns(self) -> ChatTokenizer:
    """The same, for which the token that the template puts after an answer is an end too."""
    ids, _ = self.conversation([{'role': 'user', 'content': 'a'}, {'role': ROLE, 'content': 'b'}])
    special = set(self.specials().values())
    last = next((i for i in reversed(ids) if i in special), self.eos)
    return self if last in self.ends else dataclasses.replace(self, stops=(*self.stops, last))

  def _answer(self, messages: Sequence[Message], i: int, text: str) -> tuple[int, int]:
    """Where the answer of message i stands in the text of all: where the text of another answer differs from it."""
    own = messages[i]['content'].strip()
    letter = next(letter for letter in 'abc' if letter not in (own[0], own[-1]))
    other, _ = self._text([*messages[:i], {**messages[i], 'content': letter}, *messages[i + 1:]], False)
    if other == text:
      raise ConfigError(f'the chat template leaves out message {i + 1}, an answer; give another template')
    start = _common(text, other)
    end = len(text) - _common(text[start:][::-1], other[start:][::-1])
    try:
      before, _ = self._text(messages[:i], True)
    except ConfigError:  # some refuse messages that end so, or none at all
      return start, end
    return (len(before) if text.startswith(before) and len(before) <= start else start), end

  def _closed(self, text: str, end: int) -> int:
    """The place after the special token that follows `end`; `end` itself where none does, or one stands before it."""
    if self._special_before(text, end) is None:
      rest = text[end:].lstrip()
      found = max((name for name in self.specials() if rest.startswith(name)), key=len, default=None)
      if found:
        return len(text) - len(rest) + len(found)
    return end

  def _special_before(self, text: str, end: int) -> str | None:
    """The special token that the text ends with at a place, spaces aside."""
    before = text[:end].rstrip()
    return next((name for name in self.specials() if before.endswith(name)), None)

  def _text(self, messages: Sequence[Message], generate: bool) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and where in it `{% generation %}` stands."""
    if self.template is None:
      raise ConfigError('the tokenizer has no chat template; put chat_template.jinja beside the weights and import '
                        'them again, or give a prompt as it is')
    if any(mark in json.dumps(list(messages), ensure_ascii=False) for mark in (OPEN, CLOSE)):
      raise ConfigError('messages: they have U+FDD0 or U+FDD1, which are no characters; remove them')
    template = _compiled(self.template)
    try:
      text = template.render(messages=[dict(message) for message in messages], add_generation_prompt=generate,
                             tools=None, documents=None, **dict(self.names))
    except Exception as error:  # of the template's own code, which may do anything that jinja2 can
      reason = (str(error).splitlines() or [''])[0]
      raise ConfigError(f'the chat template fails on these messages ({type(error).__name__}: {reason}); correct them, '
                        'or give another template') from error
    spans, plain = [], ''
    for part in re.split(f'({OPEN}|{CLOSE})', text):
      if part == OPEN:
        spans.append((len(plain), len(plain)))
      elif part == CLOSE:
        spans[-1] = spans[-1][0], len(plain)
      else:
        plain += part
    return plain, [(start, end) for start, end in spans if end > start]


def check_messages(messages: Any, where: str):
  """Raises ConfigError where they are no list of objects with a role and a text; `where` begins it."""
  if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
    raise ConfigError(f'{where}: give a list of objects with role and content, one at least')
  for number, message in enumerate(messages):
    if not isinstance(message, Mapping) or not isinstance(message.get('role'), str):
      raise ConfigError(f'{where}: message {number + 1} has no role; give objects with role and content')
    if not isinstance(message.get('content'), str | None):
      raise ConfigError(f'{where}: the content of message {number + 1} is {type(message["content"]).__name__}, not '
                        'text; give text')


def is_answer(message: Message) -> bool:
  """Whether it is an answer with text in it."""
  return message['role'] == ROLE and bool((message.get('content') or '').strip())


def is_messages(prompt: Any) -> bool:
  """Whether a prompt is a chat, and neither a text nor ids."""
  return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(part, Mapping) for part in prompt)


def listed(prompt: Any, name: str) -> list[Any]:
  """What is no text and no messages, as a list of ids. Raises ConfigError naming it where it is none."""
  if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Iterable):
    raise ConfigError(f'{name} = {prompt!r}: give a text, a list of ids, or one of messages')
  return list(prompt)


def begun(tokenizer: Tokenizer, messages: Sequence[Message], where: str) -> list[int]:
  """As `ChatTokenizer.chat`, of any tokenizer. Raises ConfigError beginning with `where`."""
  with reading.naming(where, 'give messages'):
    return (tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(of=tokenizer)).chat(messages)


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> Any:
  """The template, with all that transformers gives one."""
  try:
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
  except ImportError as error:
    raise ImportError("chat templates need jinja2: "
                      "install the extra 'chat' (pip install 'loopformer[chat]')") from error

  class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, around what an assistant says."""
    tags = {'generation'}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
      return nodes.CallBlock(self.call_method('_marked'), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
      return f'{OPEN}{caller()}{CLOSE}'

  def raise_exception(message):
    raise TemplateError(message)

  def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

  environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                              extensions=[Generation, 'jinja2.ext.loopcontrols'])
  environment.filters['tojson'] = tojson
  environment.globals['raise_exception'] = raise_exception
  environment.globals['strftime_now'] = lambda form: datetime.datetime.now().strftime(form)
  try:
    return environment.from_string(text)
  except TemplateError as error:
    raise ConfigError(f'the chat template cannot be read (line {getattr(error, "lineno", "?")}: {error}); correct it, '
                      'or give another') from error


def _common(a: Sequence, b: Sequence) -> int:
  """Length of the common beginning."""
  pair: Any = [a, b]  # of lists too, of which the stubs do not know
  return len(os.path.commonprefix(pair))


# Answers in streams of ids -------------------------------------------------------------------------------------------


class Unreadable(ConfigError):
  """A conversation that could not be encoded. index: of the text in its batch."""

  def __init__(self, message: str, index: int):
    super().__init__(message)
    self.index = index


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkedTokenizer(Tokenizer):
  """Conversations, texts as `corpus.Conversations` has them, as numbers 2 id + (1 where it belongs to an answer)."""

  of: ChatTokenizer

  @property
  def vocab_size(self) -> int:
    return 2 * self.of.vocab_size + 1

  @property
  def eos(self) -> int:
    """What stands after a conversation: no id at all."""
    return 2 * self.of.vocab_size

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self._encoded(index, text) for index, text in enumerate(texts)]

  def _encoded(self, index: int, text: str) -> list[int]:
    try:
      ids, asked = self.of.conversation(json.loads(text)['messages'])
    except ConfigError as error:
      raise Unreadable(str(error), index) from error
    return [2 * i + answers for i, answers in zip(ids, asked)]

  def decode(self, ids: Sequence[int]) -> str:
    return self.of.decode([i // 2 for i in ids if i != self.eos])

  def byte_lengths(self) -> np.ndarray:
    return np.append(np.repeat(self.of.byte_lengths(), 2), np.int32(0))

  def fingerprint(self) -> str:
    return hashlib.sha256(f'marked {self.of.fingerprint()}'.encode()).hexdigest()

  def save(self, folder: str | os.PathLike) -> None:
    self.of.save(storage.path(folder) / INNER)
    write_about(folder, {'kind': 'marked', 'fingerprint': self.fingerprint()})


def around(saved: Mapping[str, Any], folder: Any) -> Tokenizer:
  """The tokenizer of kind 'chat' or 'marked' whose description lies in a folder. Raises ConfigError where it is
  damaged.
  """
  of = load_tokenizer(folder / INNER)
  remedy = 'delete the folder and prepare the data again'
  if saved['kind'] == 'marked':
    if not isinstance(of, ChatTokenizer):
      raise ConfigError(f'{folder / FILE} is damaged: the tokenizer in {INNER}/ is none of chats; {remedy}')
    return MarkedTokenizer(of=of)
  with reading.naming(folder / FILE, remedy):
    return ChatTokenizer(of=of, stops=tuple(saved['stops']), template=saved['template'],
                         names=tuple(saved['names'].items()), start=saved.get('start'))


# Parts ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedTokenizer:
  """Part: the tokenizer of a work folder; FileNotFoundError where it has none."""

  path: str = dataclasses.field(repr=False)  # the data are the same wherever it lies
  paths = ('path',)

  def build(self, texts: Iterable[str] = ()) -> Tokenizer:
    del texts
    found = self._found()
    return found.of if isinstance(found, MarkedTokenizer) else found

  def sources(self) -> list[storage.File]:
    """What it is: prepared data is stale once it changes."""
    digest = self.build().fingerprint()
    return [storage.File('tokenizer', 0, digest, lambda: digest)]

  def _found(self) -> Any:
    folder = storage.path(self.path)
    for place in (folder / place for place in PLACES):
      if (place / FILE).exists() and 'kind' in reading.read_json(place / FILE, 'give another work folder'):
        return load_tokenizer(place)
    if (folder / 'config.json').exists():  # a run whose data lie elsewhere, or of several tasks
      from loopformer import config as configs
      found = configs.read(folder).task.tokenizer_of(folder)
      if found is not None:
        return found
    raise FileNotFoundError(f'SavedTokenizer.path={self.path!r}: no tokenizer there; give a work folder, of an import '
                            'with its tokenizer or of a run on text')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked:
  """Part: how conversations become numbers: by the tokenizer part `of`, and a file of a chat template if it is given
  one.

  FileNotFoundError or ConfigError where there is no template.
  """

  of: Any
  template: str | None = dataclasses.field(default=None, repr=False)

  def build(self, texts: Iterable[str]) -> Tokenizer:
    found = self.of.build(texts)
    chat = found if isinstance(found, ChatTokenizer) else ChatTokenizer(of=found)
    if self.template is not None:
      chat = dataclasses.replace(chat, template=_template(self.template))
    if chat.template is None:
      raise ConfigError('task.template = None, and the tokenizer has no chat template of its own; give the file of '
                        'one, such as chat_template.jinja of a chat model that has the same tokenizer')
    return MarkedTokenizer(of=chat.ending_turns())

  def sources(self) -> list[storage.File]:
    """Those of the tokenizer, and the template."""
    own = self.of.sources()
    if self.template is None:
      return own
    data = _template(self.template).encode()
    digest = hashlib.sha256(data).hexdigest()
    return [*own, storage.File('template', len(data), digest, lambda: digest)]


def _template(path: str) -> str:
  if not storage.path(path).exists():
    raise FileNotFoundError(f'task.template = {path!r}: no such file; give the path of a chat template')
  return reading.text(path, 'give the path of a chat template')
