import json
import os
import sysconfig

import pytest

from loopformer.data.corpus import Files, StandardLibrary


def text_of(i: int) -> str:
  return f'document {i} ' * (i % 7 + 1)


def write(folder, names):
  for i, name in enumerate(names):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text_of(i), encoding='utf-8')


def splits(corpus) -> dict[str, str]:
  return {os.path.basename(d.name): d.split for d in corpus.documents()}


def test_standard_library():
  corpus = StandardLibrary()
  documents = list(corpus.documents())
  names = {d.name for d in documents}
  assert len(names) == len(documents) > 200
  assert 'json/decoder.py' in names and 'argparse.py' in names
  folders = {part for name in names for part in name.split('/')[:-1]}
  assert not folders & {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
  assert all(d.text for d in documents) and not any(os.path.isabs(name) for name in names)
  held = sum(d.split == 'validation' for d in documents) / len(documents)
  assert 0.02 < held < 0.09
  sources = corpus.sources()
  assert names <= {source.name for source in sources}
  assert [source.name for source in sources] == sorted(source.name for source in sources)
  name, size, stamp, sha256 = sources[0]
  found = os.stat(os.path.join(sysconfig.get_paths()['stdlib'], name))
  assert (size, stamp) == (found.st_size, found.st_mtime_ns) and len(sha256()) == 64
  assert splits(corpus) == splits(StandardLibrary())


def test_split_is_stable_when_files_are_added_and_renamed(tmp_path):
  write(tmp_path, [f'a/{i:03}.txt' for i in range(100)])
  corpus = Files(train=(str(tmp_path / '**' / '*.txt'),), validation=0.2)
  before = splits(corpus)
  assert 5 < sum(split == 'validation' for split in before.values()) < 40
  for i in range(100, 150):
    (tmp_path / f'000-{i}.txt').write_text(text_of(i))
  after = splits(corpus)
  assert len(after) == 150 and all(after[name] == split for name, split in before.items())
  os.rename(tmp_path / 'a', tmp_path / 'b')
  assert splits(corpus) == after


def test_equal_contents_never_straddle_the_splits(tmp_path):
  write(tmp_path, [f'one/{i:03}.txt' for i in range(60)])
  write(tmp_path, [f'two/other{i:03}.md' for i in range(60)])
  corpus = Files(train=(str(tmp_path / '**' / '*.*'),), validation=0.3)
  texts = {'train': set(), 'validation': set()}
  for d in corpus.documents():
    texts[d.split].add(d.text)
  assert texts['train'] and texts['validation'] and not texts['train'] & texts['validation']


@pytest.mark.parametrize('share', [0.001, 0.999])
@pytest.mark.parametrize('count', [2, 3, 20])
def test_no_split_is_empty(tmp_path, count, share):
  write(tmp_path, [f'{i}.txt' for i in range(count)])
  found = splits(Files(train=(str(tmp_path / '*.txt'),), validation=share))
  assert len(found) == count and set(found.values()) == {'train', 'validation'}


def test_given_validation_files(tmp_path):
  write(tmp_path, [f'train/{i}.txt' for i in range(5)])
  write(tmp_path, ['held/x.txt'])  # the same contents as train/0.txt
  corpus = Files(train=(str(tmp_path / '**/*.txt'),), validation_files=(str(tmp_path / 'held/*'),))
  found = splits(corpus)
  assert found == {'x.txt': 'validation', **{f'{i}.txt': 'train' for i in range(1, 5)}}
  assert len(corpus.sources()) == 6


def test_text_is_read_as_it_is(tmp_path):
  (tmp_path / 'a.txt').write_bytes('one\r\ntwo\té\n'.encode())
  (tmp_path / 'b.md').write_text('# title')
  (tmp_path / 'empty.txt').write_text('')
  found = {os.path.basename(d.name): d.text for d in Files(train=(str(tmp_path / '*'),)).documents()}
  assert found == {'a.txt': 'one\r\ntwo\té\n', 'b.md': '# title'}


def test_jsonl_rows(tmp_path):
  path = tmp_path / 'rows.jsonl'
  path.write_text('\n\n'.join(json.dumps({'id': i, 'body': text_of(i)}) for i in range(10)))
  documents = list(Files(train=(str(path),), field='body').documents())
  assert [d.text for d in documents] == [text_of(i) for i in range(10)]
  assert documents[3].name == f'{path}#6' and len({d.name for d in documents}) == 10


def test_parquet_rows(tmp_path):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet

  path = tmp_path / 'rows.parquet'
  parquet.write_table(pa.table({'id': list(range(600)), 'text': [text_of(i) for i in range(600)]}), path)
  documents = list(Files(train=(str(path),)).documents())
  assert [d.text for d in documents] == [text_of(i) for i in range(600)]
  assert documents[599].name == f'{path}#599'
  with pytest.raises(ValueError, match=r"Files.field='body': .*rows.parquet has no such field; it has id, text"):
    list(Files(train=(str(path),), field='body').documents())
  with pytest.raises(ValueError, match=r"Files.field='id': .*rows.parquet row 1 holds int"):
    list(Files(train=(str(path),), field='id').documents())


@pytest.mark.parametrize(
  'line, message',
  [
    ('{"title": "x", "id": 1}', r"Files.field='text': .*bad.jsonl row 2 has no such field; it has title, id"),
    ('{"text": 1}', r"Files.field='text': .*bad.jsonl row 2 holds int"),
    ('[1]', r'bad.jsonl row 2 is damaged: it holds list, not an object; correct'),
    ('{text', r'bad.jsonl row 2 is damaged: it is not JSON .*; correct or remove the row'),
  ],
)
def test_jsonl_errors(tmp_path, line, message):
  (tmp_path / 'bad.jsonl').write_text('{"text": "fine"}\n' + line + '\n')
  with pytest.raises(ValueError, match=message):
    list(Files(train=(str(tmp_path / 'bad.jsonl'),)).documents())


def test_file_errors(tmp_path):
  write(tmp_path, ['a.txt', 'b.png'])
  pattern = str(tmp_path / 'none*.txt')
  with pytest.raises(FileNotFoundError, match=r"Files.train: no file matches '.*none\*.txt'"):
    list(Files(train=(pattern,)).documents())
  with pytest.raises(FileNotFoundError, match=r"Files.validation_files: no file matches '.*none\*.txt'"):
    Files(train=(str(tmp_path / 'a.txt'),), validation_files=(pattern,)).sources()
  with pytest.raises(ValueError, match=r"Files.train: .*b.png has the unknown suffix '.png'; known are .txt"):
    list(Files(train=(str(tmp_path / '*'),)).documents())
  (tmp_path / 'c.txt').write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match=r'c.txt is not UTF-8'):
    list(Files(train=(str(tmp_path / 'c.txt'),)).documents())


def test_field_errors():
  with pytest.raises(ValueError, match="Files.train='a.txt' is one string"):
    Files(train='a.txt')
  with pytest.raises(ValueError, match=r'Files.train=\(\) names no files'):
    Files(train=())
  with pytest.raises(ValueError, match='Files.validation=1.5'):
    Files(train=('a.txt',), validation=1.5)
  with pytest.raises(ValueError, match='StandardLibrary.validation=0'):
    StandardLibrary(validation=0)
