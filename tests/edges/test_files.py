"""Texts that users have: what is one document, what is none, and what is said of what was left out."""
import collections
import glob
import json
import os
from pathlib import Path

import hypothesis
from hypothesis import strategies as st
import pytest

from loopformer.data import prepared
from loopformer.data.corpus import Files, StandardLibrary, _matches
from loopformer.data.tokenizer import Bytes
from loopformer.types import ConfigError

MARK = '\ufeff'


def made(folder: Path, files: dict) -> Path:
  """A folder of these files: a name ends in @ where a link to the value is meant, in = where a hard link is."""
  for name, value in files.items():
    path = folder / name.rstrip('@=')
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith('@'):
      path.symlink_to(value)
    elif name.endswith('='):
      path.hardlink_to(folder / value)
    else:
      path.write_bytes(value.encode() if isinstance(value, str) else value)
  return folder


def read(corpus):
  """(name in the folder -> text, what was left out) of the current folder."""
  left_out = collections.Counter()
  documents = {os.path.relpath(document.name): document.text for document in corpus.documents(left_out)}
  return documents, dict(left_out)


TWO = {'d/a.txt': 'one', 'd/b.txt': 'two'}
AGAIN = {'links to folders that were met before': 1}
PARQUET = {'text': ['one', None, 'two', '', MARK + 'three']}
# What lies in the folder, the globs, the names of the documents, what was left out.
SAME = {
    'a link to its own folder, as some archives have it': (
        TWO | {'d/again@': '.'}, ['d/**/*.txt'], ['d/a.txt', 'd/b.txt'], AGAIN),
    'two of them, of which a walk along links does not end': (
        TWO | {'d/again@': '.', 'd/more@': '.'}, ['d/**/*.txt', 'd/**/a.txt'], ['d/a.txt', 'd/b.txt'],
        {'links to folders that were met before': 2}),
    'a link to a folder above': (TWO | {'d/in/c.txt': 'three', 'd/in/up@': '../..'}, ['d/**/*.txt'],
                                 ['d/a.txt', 'd/b.txt', 'd/in/c.txt'], AGAIN),
    'a link to a folder elsewhere, as data are put together': (
        {'x/a.txt': 'one', 'd/b.txt': 'two', 'd/x@': '../x'}, ['d/**/*.txt'], ['d/x/a.txt', 'd/b.txt'], {}),
    'the link comes first in the alphabet': (TWO | {'a@': 'd'}, ['**/*.txt'], ['d/a.txt', 'd/b.txt'], AGAIN),
    'a link to a file': (TWO | {'d/A.txt@': 'a.txt'}, ['d/*'], ['d/a.txt', 'd/b.txt'], {'further names of files': 1}),
    'a link to nothing, as an editor leaves it': (TWO | {'d/c.txt@': 'gone'}, ['d/*'], ['d/a.txt', 'd/b.txt'],
                                                  {'links to nothing': 1}),
    'a hard link, as of a package cache': (TWO | {'d/c.txt=': 'd/a.txt'}, ['d/*'], ['d/a.txt', 'd/b.txt'],
                                           {'further names of files': 1}),
    'globs that overlap': (TWO, ['d/*', 'd/a*', 'd/**/*.txt'], ['d/a.txt', 'd/b.txt'], {}),
    'globs that overlap by other ways': (TWO, ['d/*', './d/a*'], ['d/a.txt', 'd/b.txt'], {'further names of files': 1}),
    'a copy is another file': (TWO | {'d/c.txt': 'one'}, ['d/*'], ['d/a.txt', 'd/b.txt', 'd/c.txt'], {}),
    'names with brackets': (TWO | {'d [v1]/a[0].txt': 'three'}, ['d [v1]/*', 'd/*'],
                            ['d/a.txt', 'd/b.txt', 'd [v1]/a[0].txt'], {}),
    'a file with brackets': (TWO | {'d/c[0].txt': 'three'}, ['d/c[0].txt', 'd/a.txt'], ['d/c[0].txt', 'd/a.txt'], {}),
    'rows that hold nothing': (
        {'r.jsonl': '{"text": "one"}\n{"text": null}\n\nnull\n{"text": ""}\n{"text": "two"}\n'}, ['*'],
        ['r.jsonl#0', 'r.jsonl#5'], {'rows of null': 2, 'empty documents': 1}),
    'a file of a byte-order mark': (TWO | {'d/c.txt': MARK}, ['d/*'], ['d/a.txt', 'd/b.txt'], {'empty documents': 1}),
}


@pytest.mark.parametrize('case', SAME)
def test_one_file_is_read_once_and_what_is_left_out_is_counted(case, tmp_path, monkeypatch):
  files, globs, names, left_out = SAME[case]
  monkeypatch.chdir(made(tmp_path, files))
  for patterns in (globs, [str(tmp_path / pattern) for pattern in globs]):
    documents, counted = read(Files(train=tuple(patterns)))
    assert sorted(documents) == sorted(names) and (counted == left_out or patterns != globs)
    sources = [source.name for source in Files(train=tuple(patterns)).sources()]
    assert {name.partition('#')[0] for name in names} <= set(map(os.path.relpath, sources))
    assert len({os.stat(source).st_ino for source in sources}) == len(sources)


# What lies in the folder, and the texts of its documents.
MARKED = {
    'a text': ({'a.txt': MARK + 'one', 'b.txt': 'two'}, ['one', 'two']),
    'one of Markdown': ({'a.md': MARK + '# one', 'b.txt': 'two'}, ['# one', 'two']),
    'two marks, of files that were joined': ({'a.txt': MARK * 2 + 'one', 'b.txt': 'two'}, ['one', 'two']),
    'a mark within stays': ({'a.txt': 'o' + MARK + 'ne', 'b.txt': 'two'}, ['o' + MARK + 'ne', 'two']),
    'rows': ({'a.jsonl': MARK + '{"text": "one"}\n' + MARK + '{"text": "two"}'}, ['one', 'two']),
    'a text in a row, out of a table': ({'a.jsonl': '{"text": "\\ufeffone"}\n{"text": "two"}'}, ['one', 'two']),
}


@pytest.mark.parametrize('case', MARKED)
def test_a_mark_before_a_text_is_no_part_of_it(case, tmp_path, monkeypatch):
  files, texts = MARKED[case]
  monkeypatch.chdir(made(tmp_path, files))
  assert sorted(read(Files(train=('*',)))[0].values()) == texts


def test_parquet(tmp_path, monkeypatch):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet
  parquet.write_table(pa.table(PARQUET), tmp_path / 'a.parquet')
  monkeypatch.chdir(tmp_path)
  assert read(Files(train=('*',))) == ({'a.parquet#0': 'one', 'a.parquet#2': 'two', 'a.parquet#4': 'three'},
                                       {'rows of null': 1, 'empty documents': 1})


def test_equal_texts_are_on_one_side(tmp_path, monkeypatch):
  """With a mark and without, in a row and a file, and files that are both trained on and held out."""
  monkeypatch.chdir(made(tmp_path, {f't/{i}.txt': f'text {i}' for i in range(30)} |
                         {f'm/{i}.md': f'{MARK}text {i}' for i in range(30)} |
                         {'v/a.jsonl': ''.join(json.dumps({'text': f'text {i}'}) + '\n' for i in range(3))}))
  (tmp_path / 'v/3.txt').hardlink_to('t/3.txt')
  for corpus in (Files(train=('*/*',), validation=0.3), Files(train=('[tm]/*',), validation_files=('v/*',))):
    sides, left_out = collections.defaultdict(set), collections.Counter()
    for document in corpus.documents(left_out):
      sides[document.split].add(document.text)
    assert not sides['train'] & sides['validation'] and len(sides['train'] | sides['validation']) == 30
  assert left_out == {'train documents that stand in validation': 8} and len(sides['validation']) == 4


# What lies in the folder, the globs, words of the message.
REFUSED = {
    'UTF-16, as a shell of Windows writes it': ({'a.txt': 'one'.encode('utf-16')}, '*', 'a.txt is not UTF-8.*UTF-16'),
    'UTF-16 with letters of more bytes': ({'a.txt': 'ab\u2014cd, ef'.encode('utf-16-le')}, '*',
                                          'a.txt is not UTF-8.*UTF-16'),
    'UTF-16 without a mark': ({'a.txt': 'one two'.encode('utf-16-le')}, '*', 'a.txt is not UTF-8.*UTF-16'),
    'the other order': ({'a.md': b'\xfe\xff' + 'one'.encode('utf-16-be')}, '*', 'a.md is not UTF-8.*UTF-16'),
    'UTF-32': ({'a.txt': 'one'.encode('utf-32')}, '*', 'a.txt is not UTF-8.*UTF-32'),
    'rows in UTF-16': ({'a.jsonl': '{"text": "one"}\n'.encode('utf-16')}, '*', 'a.jsonl row 1 is not UTF-8.*UTF-16'),
    'Latin letters in one byte': ({'a.txt': b'caf\xe9'}, '*', 'a.txt is not UTF-8.*convert it to UTF-8 or remove it'),
    'a row that is cut': ({'a.jsonl': '{"text": "a"}\n\n{"text": "o'}, '*', 'a.jsonl row 3 is damaged.*remove the row'),
    'a row of numbers': ({'a.jsonl': '{"text": "a"}\n[1]'}, '*', 'a.jsonl row 2 .* holds list, not an object'),
    'a number as text': ({'a.jsonl': '{"text": 1}'}, '*', "field='text': a.jsonl row 1 holds int, not text"),
    'a field that is not there': ({'a.jsonl': '{"body": ""}'}, '*', 'a.jsonl row 1 has no such field; it has body'),
    'brackets without end': ({'a.jsonl': '{"text": ' + '[' * 100_000}, '*', 'a.jsonl row 1 is damaged'),
    'a number of too many digits': ({'a.jsonl': '{"text": ' + '1' * 10_000 + '}'}, '*', 'a.jsonl row 1 is damaged'),
    'no parquet': ({'a.parquet': 'text'}, '*', 'a.parquet is damaged, or not parquet.*fetch it again'),
    'an empty one': ({'a.parquet': ''}, '*', 'a.parquet is damaged, or not parquet'),
    'a folder': (TWO, 'd', r"Files.train: 'd' is a folder; give a glob of files in it, such as 'd/\*\*/\*.txt'"),
    'nothing': (TWO, 'e/*', r"Files.train: no file matches 'e/\*' in .*; correct the glob"),
    'another suffix': ({'a.doc': ''}, '*', "a.doc has the unknown suffix '.doc'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_is_no_text_is_named(case, tmp_path, monkeypatch):
  files, pattern, words = REFUSED[case]
  if 'parquet' in next(iter(files)):
    pytest.importorskip('pyarrow')
  monkeypatch.chdir(made(tmp_path, files))
  with pytest.raises((ValueError, FileNotFoundError), match=words):
    read(Files(train=(pattern,)))


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
  def denied(path, *_, **__):
    raise PermissionError(13, 'Permission denied', str(path))

  monkeypatch.chdir(made(tmp_path, {'a.txt': 'one', 'b.jsonl': ''}))
  monkeypatch.setattr(Path, 'open', denied)
  for pattern in ('*.txt', '*.jsonl'):
    with pytest.raises(ConfigError, match='[ab].*: it cannot be read .Permission denied.; correct the glob'):
      read(Files(train=(pattern,)))


def test_what_was_left_out_is_told_where_data_are_prepared(tmp_path, monkeypatch):
  """Then and whenever they are used again; and nothing is said where nothing was."""
  monkeypatch.chdir(made(tmp_path, TWO | {'d/c.txt': MARK, 'd/e.txt=': 'd/a.txt',
                                          'd/r.jsonl': '{"text": null}\n{"text": "three"}\n{"text": null}'}))
  told = []
  for _ in range(2):
    prepared.prepare(Files(train=('d/*',)), Bytes(), 'data', log=told.append)
  words = 'left out: 1 further names of files, 1 empty documents, 2 rows of null; '
  assert len(told) == 2 and all(words in line for line in told)
  prepared.prepare(Files(train=('d/[ab].txt',)), Bytes(), 'others', log=told.append)
  assert 'left out' not in told[-1]
  assert read(StandardLibrary())[1]['empty documents']


GLOBS = st.lists(st.sampled_from(['a', 'b', '**', '*', '?', '[ab]', '.*', 'x.txt', '*.txt', 'a*', '']), min_size=1,
                 max_size=4)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tree')
  for names in ('', 'a', 'b', '.h', 'c d', 'a/a', 'a/b', 'b/.h', 'a/c d/b', 'a/a/a/a'):
    made(folder / names, {'x.txt': '', 'y.txt': '', '.z.txt': ''})
  return folder


@hypothesis.given(GLOBS, st.booleans())
@hypothesis.settings(max_examples=150)
def test_globs_match_what_they_do_elsewhere(tree, parts, absolute):
  """By the same names, on which the order of documents depends."""
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(tree)
    pattern = os.path.join(*([str(tree)] if absolute else []), *parts)
    assert (set(_matches(pattern, '', collections.defaultdict(set)))
            == set(filter(os.path.isfile, glob.glob(pattern, recursive=True))))


@hypothesis.given(st.lists(st.one_of(
    st.fixed_dictionaries({'text': st.one_of(st.none(), st.text(max_size=9))}).map(json.dumps), st.text(max_size=9),
    st.sampled_from(['', ' ', 'null', '[]', '1', '"x"', '{}', '{"text": 1}', MARK, '{"text": "\\ud800"}'])),
    max_size=5),
    st.binary(max_size=3), st.sampled_from(['', MARK]))
@hypothesis.settings(max_examples=300)
def test_rows_are_read_or_the_row_is_named(tmp_path_factory, rows, tail, mark):
  path = tmp_path_factory.getbasetemp() / 'rows.jsonl'
  path.write_bytes((mark + '\n'.join(rows)).encode('utf-8', 'replace') + tail)
  lines = path.read_bytes().split(b'\n')
  left_out = collections.Counter()
  try:
    documents = list(Files(train=(str(path),)).documents(left_out))
  except ValueError as error:
    number = int(str(error).partition('rows.jsonl row ')[2].split()[0])
    assert 1 <= number <= len(lines) and lines[number - 1].strip(), error
    return
  held = [json.loads(line.decode().lstrip(MARK)) for line in lines if line.decode().strip().lstrip(MARK).strip()]
  texts = [((row or {}).get('text') or '').lstrip(MARK) for row in held]
  assert [document.text for document in documents] == [text for text in texts if text]
  assert len(documents) + left_out.total() == len(held)
