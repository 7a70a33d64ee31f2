import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import unittest.mock

import grain
import numpy as np
import pytest

from experiments.benchmark import data as benchmark
from experiments.benchmark.sizes import Size
from loopformer import storage
from loopformer.data import batches, checked, prepared
from loopformer.data.chat import ChatTokenizer
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import Bytes, ByteTokenizer, GivenPieces, PieceTokenizer, TrainedPieces
from loopformer.tasks.text import Text


def quiet(_):
  pass


def write_corpus(folder, documents: int = 60):
  folder.mkdir(parents=True, exist_ok=True)
  for i in range(documents):
    words = ' '.join(f'word{(i * 7 + j * j) % 97}' for j in range(3000 if i % 30 == 8 else 20 + 37 * (i % 11)))
    (folder / f'{i:03}.txt').write_text(f'Document {i}.\n{words}\n')
  return Files(train=(str(folder / '*.txt'),), validation=0.2)


@pytest.fixture
def corpus(tmp_path):
  return write_corpus(tmp_path / 'corpus')


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  """A corpus, a task on it and its work folder, prepared once; tests leave it as it is."""
  folder = tmp_path_factory.mktemp('shared')
  corpus = write_corpus(folder / 'corpus')
  task = Text(corpus=corpus, tokenizer=Bytes(), length=32)
  task.prepare(folder, log=quiet)
  return corpus, task, folder


def expected_streams(corpus, tokenizer) -> dict[str, list[int]]:
  import hashlib

  order = sorted(corpus.documents(), key=lambda d: hashlib.blake2b(d.name.encode(), digest_size=8).digest())
  streams = {'train': [], 'validation': []}
  for d in order:
    streams[d.split] += [*tokenizer.encode(d.text), tokenizer.eos]
  return streams


@dataclasses.dataclass(frozen=True)
class Begun:
  """Bytes of texts that begin with an id of their own."""
  start: int | None = 7

  def build(self, texts=()):
    return ChatTokenizer(of=ByteTokenizer(), start=self.start, template='{{ messages }}')

  def sources(self):
    return []


def test_a_token_that_ends_and_begins_documents_stands_once_between_them(corpus, tmp_path):
  eos = ByteTokenizer().eos
  done = prepared.prepare(corpus, Begun(start=eos), tmp_path / 'both', log=quiet)
  plain = prepared.prepare(corpus, Begun(start=None), tmp_path / 'plain', log=quiet)
  one, other = (prepared.open_split(tmp_path / name, 'train') for name in ('both', 'plain'))
  assert one.tokens == other.tokens and done.manifest['start'] is plain.manifest['start'] is None
  np.testing.assert_array_equal(one.window(0, one.tokens), other.window(0, other.tokens))


def test_texts_begin_with_the_token_that_begins_one(corpus, tmp_path):
  """Once each; folders and chunks of earlier versions, whose texts have none, are not taken for the same."""
  told, folder = [], tmp_path / 'data'
  done = prepared.prepare(corpus, Begun(), folder, log=told.append)
  stream = prepared.open_split(folder, 'train')
  ids = stream.window(0, stream.tokens)
  ends = np.flatnonzero(ids == done.tokenizer.eos)
  assert (ids[0] == 7 and (ids[ends[:-1] + 1] == 7).all()
          and (ids == 7).sum() == done.manifest['splits']['train']['documents'])
  prepared.prepare(corpus, Begun(), folder, log=told.append)
  assert not any('do not begin' in line for line in told)
  manifest = json.loads((folder / 'manifest.json').read_text())
  (folder / 'manifest.json').write_text(json.dumps(
      {name: value for name, value in manifest.items() if name != 'start'}))
  prepared.prepare(corpus, Begun(), folder, log=told.append)
  assert any('do not begin with the token that begins a text' in line for line in told)
  (folder / 'manifest.json').write_text(json.dumps(manifest | {'start': 'x'}))
  with pytest.raises(ValueError, match="start='x' is no id"):
    prepared.prepare(corpus, Begun(), folder, log=told.append)
  names = []
  with unittest.mock.patch.object(prepared, '_write_chunk', lambda path, data: names.append(os.path.basename(path))):
    for part in (Begun(), Begun(start=None)):
      tokenizer = part.build()
      with unittest.mock.patch.object(ChatTokenizer, 'fingerprint', lambda self: 'the same'):
        prepared._tokenise(corpus, tokenizer, str(tmp_path / 'work'), np.dtype('<u2'), collections.Counter(), quiet)
  assert len(names) == 2 and names[0] != names[1]


@pytest.mark.parametrize('part', [Bytes(), TrainedPieces(vocab=290)])
@pytest.mark.parametrize('shard_tokens', [1, 9000, 2**27])
def test_windows_equal_the_concatenated_stream(corpus, tmp_path, part, shard_tokens):
  folder = tmp_path / 'data'
  done = prepared.prepare(corpus, part, folder, shard_tokens=shard_tokens, log=quiet)
  streams = expected_streams(corpus, done.tokenizer)
  random = np.random.default_rng(0)
  for split, expected in streams.items():
    stream, counts = prepared.open_split(folder, split), done.manifest['splits'][split]
    assert stream.tokens == len(expected) == counts['tokens'] == sum(s['tokens'] for s in counts['shards'])
    assert stream.window(0, stream.tokens).tolist() == expected
    edges = [(max(0, e - 3), 5) for e in range(0, stream.tokens - 5, prepared.RECORD)] + [(stream.tokens - 1, 1)]
    for start, length in edges + [(int(random.integers(stream.tokens - 300)), 300) for _ in range(50)]:
      window = stream.window(start, length)
      assert window.dtype == np.int32 and window.tolist() == expected[start : start + length]
    for start, length in [(-1, 4), (stream.tokens - 3, 4), (0, 0)]:
      with pytest.raises(IndexError, match=f'stream of {stream.tokens}'):
        stream.window(start, length)
  per_shard = max(1, shard_tokens // prepared.RECORD)
  records = -(-len(streams['train']) // prepared.RECORD)
  assert len(done.manifest['splits']['train']['shards']) == -(-records // per_shard)


def test_manifest_and_folder(shared):
  corpus, task, folder = shared
  manifest = prepared.load_manifest(folder / 'data')
  assert manifest['version'] == prepared.VERSION and manifest['dtype'] == 'uint16'
  assert manifest['fingerprint'] == task.tokenizer_of(folder).fingerprint()
  assert manifest['corpus'] == repr(corpus) and manifest['tokenizer'] == 'Bytes()'
  assert manifest['sources']['count'] == 60 and len(manifest['sources']['files']) == 60
  documents = list(corpus.documents())
  for split, counts in task.describe(folder).items():
    texts = [d.text for d in documents if d.split == split]
    assert counts['documents'] == len(texts)
    assert counts['bytes'] == sum(len(t.encode()) for t in texts) == counts['tokens'] - len(texts)
  names = [s['name'] for n in manifest['splits'].values() for s in n['shards']]
  assert names[0] == 'train-00000-of-00001.array_record'
  assert sorted(os.listdir(folder / 'data')) == sorted([*names, 'checked', 'manifest.json', 'tokenizer'])
  assert sorted(os.listdir(folder)) == ['corpus', 'data']


def files(folder) -> dict[str, bytes]:
  """All that is in a folder but the notes, which tell the times of its files."""
  paths = [path for path in sorted(folder.rglob('*')) if path.is_file() and path.parent.name != checked.NOTES]
  return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_same_corpus_gives_the_same_bytes_whatever_chunks_and_threads(corpus, tmp_path, monkeypatch):
  from sentencepiece import SentencePieceProcessor

  results = []
  for chunk, threads in [(prepared.CHUNK, 1), (prepared.CHUNK, 2), (1, 1), (3000, 3)]:
    monkeypatch.setattr(prepared, 'CHUNK', chunk)
    monkeypatch.setattr(PieceTokenizer, '_processor', property(
      lambda self, threads=threads: SentencePieceProcessor(model_proto=self.model, num_threads=threads)))
    prepared.prepare(corpus, TrainedPieces(vocab=290), tmp_path / str(len(results)), log=quiet)
    results.append(files(tmp_path / str(len(results))))
  assert len(results[0]) == 5 and all(result == results[0] for result in results)


@pytest.fixture
def encoded(monkeypatch):
  """The batches that are encoded from now on, of about 3000 characters each."""
  batches, encode = [], ByteTokenizer.encode_batch

  def counting(self, texts):
    batches.append(tuple(texts))
    return encode(self, texts)

  monkeypatch.setattr(prepared, 'CHUNK', 3000)
  monkeypatch.setattr(ByteTokenizer, 'encode_batch', counting)
  return batches


def chunks(work):
  return sorted(path for path in work.iterdir() if path.is_file())


def test_a_killed_preparation_goes_on_where_it_was(corpus, tmp_path, encoded):
  prepared.prepare(corpus, Bytes(), tmp_path / 'whole', log=quiet)
  everything = encoded.copy()
  encoded.clear()
  code = (
    'import os, signal, sys\n'
    'from loopformer.data import corpus, prepared, tokenizer\n'
    'calls, encode = [], tokenizer.ByteTokenizer.encode_batch\n'
    'def dying(self, texts):\n'
    '  calls.append(texts)\n'
    '  if len(calls) == 6:\n'
    '    os.kill(os.getpid(), signal.SIGKILL)\n'
    '  return encode(self, texts)\n'
    'tokenizer.ByteTokenizer.encode_batch = dying\n'
    'prepared.CHUNK = 3000\n'
    f"prepared.prepare(corpus.{corpus!r}, tokenizer.Bytes(), {str(tmp_path / 'data')!r})\n"
  )
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
  assert subprocess.run([sys.executable, '-c', code], env=env, timeout=60).returncode == -signal.SIGKILL
  done, lines = chunks(tmp_path / 'data.preparing'), []
  assert len(done) == 5 and not (tmp_path / 'data').exists()
  # One was not written to its end, as when the machine stops, and another has lost a bit.
  done[0].write_bytes(done[0].read_bytes()[:-1])
  flip(done[1])
  prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=lines.append)
  assert lines[0] == f'data: 3 of {len(everything)} chunks had been tokenised before'
  assert len(encoded) == len(everything) - 3 and set(everything[5:]) < set(encoded) < set(everything)
  assert files(tmp_path / 'data') == files(tmp_path / 'whole')
  assert sorted(os.listdir(tmp_path)) == ['corpus', 'data', 'whole']


def test_what_a_failure_left_is_used_for_the_same_contents_only(corpus, tmp_path, encoded, monkeypatch):
  write = prepared._write_chunk

  def failing(path, data):
    if len(chunks(tmp_path / 'data.preparing')) == 4:
      raise OSError('no space left')
    write(path, data)

  with monkeypatch.context() as m:
    m.setattr(prepared, '_write_chunk', failing)
    with pytest.raises(OSError, match='no space left'):
      prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)
  for name in ('pieces', 'split'):
    shutil.copytree(tmp_path / 'data.preparing', tmp_path / f'{name}.preparing')
  (tmp_path / 'corpus' / '000.txt').write_text((tmp_path / 'corpus' / '000.txt').read_text().upper())
  half = dataclasses.replace(corpus, validation=0.5)
  for name, texts, part in [('data', corpus, Bytes()), ('pieces', corpus, TrainedPieces(vocab=290)),
                            ('split', half, Bytes())]:
    told = []
    prepared.prepare(texts, part, tmp_path / name, log=told.append)
    prepared.prepare(texts, part, tmp_path / f'fresh {name}', log=quiet)
    assert files(tmp_path / name) == files(tmp_path / f'fresh {name}')
    assert not (tmp_path / f'{name}.preparing').exists()
    assert name != 'data' or told[0].startswith('data: 3 of')


def test_a_chunk_that_is_lost_before_it_is_sorted_is_an_error(corpus, tmp_path, encoded, monkeypatch):
  sort = prepared._sort

  def spoilt(paths, *rest):
    flip(pathlib.Path(paths[2]))
    return sort(paths, *rest)

  with monkeypatch.context() as m:
    m.setattr(prepared, '_sort', spoilt)
    with pytest.raises(OSError, match='data.preparing/.* is not what was written .* run the same command again'):
      prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)
  everything = encoded.copy()
  encoded.clear()
  prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)
  assert encoded == everything[2:3]
  assert sorted(os.listdir(tmp_path)) == ['corpus', 'data']


def test_progress_is_told(corpus, tmp_path, encoded, monkeypatch):
  monkeypatch.setattr(prepared, 'EVERY', 0)
  lines = []
  manifest = prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=lines.append).manifest
  amount = r'[\d,.]+ MB, [\d.]+ MB/s'
  told = [re.fullmatch(rf'data: ([\d,]+) ([a-z ]+), {amount}', line) for line in lines[:-1]]
  assert [m[1] for m in told if m[2] == 'documents tokenised'] == [str(n) for n in range(1, 61)]
  assert {m[2] for m in told} == {'files hashed', 'documents tokenised', 'chunks sorted', 'train documents written',
                                  'validation documents written'}
  volume = sum(split['bytes'] for split in manifest['splits'].values())
  assert f' 60 documents tokenised, {volume / 1e6:.1f} MB, ' in '\n'.join(lines)


class Unbuildable:
  """Stands for a tokenizer part that must not be built again."""

  def __repr__(self):
    return 'Bytes()'

  def build(self, texts):
    raise AssertionError('the tokenizer was built again')

  def sources(self):
    return []


def test_second_call_reuses(corpus, tmp_path):
  lines = []
  first = prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=lines.append)
  (tmp_path / 'data.preparing').mkdir()  # of one that was killed when another had done it
  again = prepared.prepare(corpus, Unbuildable(), tmp_path / 'data', log=lines.append)
  assert first == again and len(lines) == 2 and sorted(os.listdir(tmp_path)) == ['corpus', 'data']
  assert 'train' in lines[0] and 'written to' in lines[0] and 'reused from' in lines[1]


def test_a_changed_corpus_is_an_error_that_names_the_source(corpus, tmp_path):
  folder, texts = tmp_path / 'data', tmp_path / 'corpus'
  prepared.prepare(corpus, Bytes(), folder, log=quiet)
  original = (texts / '007.txt').read_text()
  (texts / '007.txt').write_text('something else')
  with pytest.raises(ValueError, match=r'source .*007.txt has changed. Delete the folder or choose another'):
    prepared.prepare(corpus, Bytes(), folder, log=quiet)
  (texts / '007.txt').write_text(original)
  (texts / '000a.txt').write_text('new')
  with pytest.raises(ValueError, match=r'source .*000a.txt is new'):
    prepared.prepare(corpus, Bytes(), folder, log=quiet)
  (texts / '000a.txt').unlink()
  (texts / '059.txt').unlink()
  with pytest.raises(ValueError, match=r'source .*059.txt is gone'):
    prepared.prepare(corpus, Bytes(), folder, log=quiet)


def test_changed_parts_are_named(corpus, tmp_path):
  prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)
  with pytest.raises(ValueError, match=r'tokenizer=TrainedPieces\(vocab=290.*it was Bytes\(\)'):
    prepared.prepare(corpus, TrainedPieces(vocab=290), tmp_path / 'data', log=quiet)
  other = Files(train=corpus.train, validation=0.3)
  with pytest.raises(ValueError, match=r'corpus=Files\(.*validation=0.3.*it was Files\(.*validation=0.2'):
    prepared.prepare(other, Bytes(), tmp_path / 'data', log=quiet)


def test_a_changed_given_model_is_named(corpus, tmp_path):
  path = tmp_path / 'given.model'
  path.write_bytes(TrainedPieces(vocab=290).build(d.text for d in corpus.documents()).model)
  prepared.prepare(corpus, GivenPieces(path=str(path)), tmp_path / 'data', log=quiet)
  path.write_bytes(TrainedPieces(vocab=291).build(d.text for d in corpus.documents()).model)
  with pytest.raises(ValueError, match='source .*given.model has changed'):
    prepared.prepare(corpus, GivenPieces(path=str(path)), tmp_path / 'data', log=quiet)


def test_many_sources_are_kept_as_one_digest(corpus, tmp_path, monkeypatch):
  monkeypatch.setattr(prepared, 'LISTED', 10)
  manifest = prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet).manifest
  assert manifest['sources']['files'] is None and manifest['sources']['count'] == 60
  (tmp_path / 'corpus' / 'new.txt').write_text('new')
  with pytest.raises(ValueError, match='the 61 sources have digest .* they were 60'):
    prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)


def test_a_failed_preparation_leaves_nothing(corpus, tmp_path):
  with pytest.raises(ValueError, match='TrainedPieces.vocab=9'):
    prepared.prepare(corpus, TrainedPieces(vocab=9), tmp_path / 'data', log=quiet)
  assert os.listdir(tmp_path) == ['corpus']
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'mine.txt').write_text('keep')
  with pytest.raises(FileNotFoundError, match="data' is not a prepared folder"):
    prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet)
  assert (tmp_path / 'data' / 'mine.txt').read_text() == 'keep'


def test_two_processes_may_prepare_at_once(corpus, tmp_path, encoded):
  prepared.prepare(corpus, Bytes(), tmp_path / 'whole', log=quiet)
  results, errors = [], []

  def work(corpus):
    try:
      results.append(prepared.prepare(corpus, Bytes(), tmp_path / 'data', log=quiet))
    except Exception as e:
      errors.append(e)

  other = Files(train=corpus.train, validation=0.3)
  for corpora in [(corpus,) * 4, (corpus, other, corpus, other)]:
    threads = [threading.Thread(target=work, args=(c,)) for c in corpora]
    for t in threads:
      t.start()
    for t in threads:
      t.join()
    assert all(r == results[0] for r in results) and len(results) + len(errors) == 4
    assert sorted(os.listdir(tmp_path)) == ['corpus', 'data', 'whole']
    if other not in corpora:
      assert not errors and files(tmp_path / 'data') == files(tmp_path / 'whole')
    else:  # who came first decides what the folder is
      assert len(errors) == 2 and all('was prepared from something else' in str(e) for e in errors)
    shutil.rmtree(tmp_path / 'data')
    results.clear()


def test_empty_corpora(tmp_path):
  (tmp_path / 'a.txt').write_text('')
  part = Files(train=(str(tmp_path / '*.txt'),))
  with pytest.raises(ValueError, match=r'Files\(.*is empty'):
    prepared.prepare(part, Bytes(), tmp_path / 'data', log=quiet)
  (tmp_path / 'a.txt').write_text('one document')
  with pytest.raises(ValueError, match=r'has no (train|validation) document: give two different'):
    prepared.prepare(part, Bytes(), tmp_path / 'data', log=quiet)


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  'damage, message',
  [
    (lambda p: p.write_bytes(p.read_bytes()[:-10]), r'shard .*validation-00000.*damaged or stale \(size'),
    (lambda p: p.unlink(), r'shard .*validation-00000-of-00001.array_record is missing: delete .* and prepare'),
  ],
)
def test_bad_shards_are_named(corpus, tmp_path, damage, message):
  folder = tmp_path / 'data'
  prepared.prepare(corpus, Bytes(), folder, log=quiet)
  damage(folder / 'validation-00000-of-00001.array_record')
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    prepared.open_split(folder, 'validation')
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    prepared.verify(corpus, Bytes(), folder, log=quiet)
  prepared.open_split(folder, 'train')


@pytest.mark.parametrize('listed', [prepared.LISTED, 10])
@pytest.mark.parametrize('start', ['prepare', 'verify'])
def test_contents_are_compared_where_times_differ_and_when_asked_for(corpus, tmp_path, monkeypatch, listed, start):
  """Damage that leaves sizes as they are, of a source and of a shard, with and without another time."""
  monkeypatch.setattr(prepared, 'LISTED', listed)
  task = Text(corpus=corpus, tokenizer=Bytes(), length=16)
  task.prepare(tmp_path, log=quiet)
  lines = []
  task.verify(tmp_path, lines.append)
  assert len(lines) == 1 and 'are as they were prepared' in lines[0]
  changed = 'source .*007.txt has changed' if listed > 10 else 'the 60 sources have digest'
  damaged = r'shard .*validation-00000-of-00001.array_record is damaged or stale \(sha256'
  for path, message in [(tmp_path / 'corpus' / '007.txt', changed),
                        (tmp_path / 'data' / 'validation-00000-of-00001.array_record', damaged)]:
    original, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    flip(path)
    if start == 'verify':
      os.utime(path, ns=times)
      task.prepare(tmp_path, log=quiet)
    for _ in range(2):
      with pytest.raises(ValueError, match=message):
        getattr(task, start)(tmp_path, quiet)
    path.write_bytes(original)
    task.prepare(tmp_path, quiet)


@pytest.fixture
def hashed(monkeypatch):
  """The names of files that are hashed from now on."""
  names, original = [], storage.sha256
  monkeypatch.setattr(storage, 'sha256', lambda name: names.append(os.path.basename(name)) or original(name))
  return names


def bytes_read() -> int:
  """That this process has asked the system for."""
  return int(re.search(r'rchar: (\d+)', pathlib.Path('/proc/self/io').read_text())[1])


@pytest.mark.skipif(not os.path.exists('/proc/self/io'), reason='the system does not count what is read')
def test_existing_data_are_not_read(tmp_path, hashed):
  """A run that resumes does not wait for hashes of its data, or of what they were made from."""
  write_corpus(tmp_path / 'corpus')
  (tmp_path / 'corpus' / 'large.txt').write_text('a long text ' * 500_000)
  task = Text(corpus=Files(train=(str(tmp_path / 'corpus' / '*.txt'),)), tokenizer=Bytes(), length=16)
  task.prepare(tmp_path, log=quiet)
  assert len(hashed) == 61
  for _ in range(2):
    before = bytes_read()
    task.prepare(tmp_path, log=quiet)
    assert len(task.examples(tmp_path, 'train', 0)) and len(task.examples(tmp_path, 'validation', 0))
    read = bytes_read() - before
  assert read < 1_000_000 and len(hashed) == 61  # of twelve million, in sources and shards


@pytest.mark.parametrize('listed', [prepared.LISTED, 10])
def test_what_was_copied_is_read_once(corpus, tmp_path, monkeypatch, hashed, listed):
  """Of sources and shards alike, whoever reads them: what one machine has noted in the folder holds for the others."""
  monkeypatch.setattr(prepared, 'LISTED', listed)
  task = Text(corpus=corpus, tokenizer=Bytes(), length=16, folder=str(tmp_path / 'data'))
  task.prepare(tmp_path, log=quiet)
  hashed.clear()
  os.utime(tmp_path / 'corpus' / '007.txt')
  task.prepare(tmp_path, log=quiet)
  assert hashed == (['007.txt'] if listed > 10 else [f'{i:03}.txt' for i in range(60)])
  hashed.clear()
  moved = dataclasses.replace(task, folder=str(tmp_path / 'moved'))
  os.rename(tmp_path / 'data', tmp_path / 'moved')
  moved.prepare(tmp_path, log=quiet)
  assert not hashed
  copied = dataclasses.replace(task, folder=str(tmp_path / 'copied'))
  shutil.copytree(tmp_path / 'moved', tmp_path / 'copied', copy_function=shutil.copyfile)
  copied.prepare(tmp_path, log=quiet)
  assert sorted(hashed) == [f'{split}-00000-of-00001.array_record' for split in ('train', 'validation')]
  hashed.clear()
  monkeypatch.setenv('LOOPFORMER_CACHE', str(tmp_path / 'another machine'))
  copied.prepare(tmp_path, log=quiet)
  assert not hashed


def test_notes_that_cannot_stand_in_the_folder_stand_on_the_machine(corpus, tmp_path, monkeypatch, hashed):
  """A folder that may not be written, of an earlier version too, which noted nothing: its sizes are believed once."""
  monkeypatch.setenv('LOOPFORMER_CACHE', str(tmp_path / 'cache'))
  task = Text(corpus=corpus, tokenizer=Bytes(), length=16)
  task.prepare(tmp_path, log=quiet)
  hashed.clear()
  shutil.rmtree(tmp_path / 'data' / checked.NOTES)
  (tmp_path / 'data' / checked.NOTES).write_text('in the way')
  task.prepare(tmp_path, log=quiet)
  assert not hashed and len(list((tmp_path / 'cache').rglob('*.json'))) == 1
  for _ in range(2):
    os.utime(tmp_path / 'corpus' / '007.txt', ns=(1, 1))
    task.prepare(tmp_path, log=quiet)
    assert hashed == ['007.txt']
  flip(tmp_path / 'corpus' / '007.txt')
  with pytest.raises(ValueError, match='source .*007.txt has changed'):
    task.prepare(tmp_path, log=quiet)


def test_a_damaged_record_is_not_read(corpus, tmp_path):
  """Whatever its file's time: records have checksums."""
  folder = tmp_path / 'data'
  tokens = prepared.prepare(corpus, Bytes(), folder, log=quiet).manifest['splits']['train']['tokens']
  shard = folder / 'train-00000-of-00001.array_record'
  content = bytearray(shard.read_bytes())
  content[300] ^= 1
  shard.write_bytes(content)
  with pytest.raises(Exception, match='hash mismatch'):
    prepared.open_split(folder, 'train').window(0, tokens)


def test_open_errors(corpus, tmp_path):
  folder = tmp_path / 'data'
  with pytest.raises(FileNotFoundError, match="data' is not a prepared folder .*manifest.json is absent"):
    prepared.open_split(folder, 'train')
  prepared.prepare(corpus, Bytes(), folder, log=quiet)
  with pytest.raises(ValueError, match="split='test' is none of train, validation"):
    prepared.open_split(folder, 'test')
  manifest = json.loads((folder / 'manifest.json').read_text())
  (folder / 'manifest.json').write_text(json.dumps({**manifest, 'version': 0}))
  with pytest.raises(ValueError, match='manifest.json: version=0, this library reads 1: delete'):
    prepared.open_split(folder, 'train')
  (folder / 'manifest.json').write_text('{')
  with pytest.raises(ValueError, match='manifest.json is damaged'):
    prepared.open_split(folder, 'train')


def test_more_than_uint16_ids(corpus, tmp_path):
  class Wide:
    vocab_size, eos = 70_000, 69_999

    def encode_batch(self, texts):
      return [[69_000 + ord(c) for c in text] for text in texts]

    def fingerprint(self):
      return 'wide'

    def save(self, folder):
      os.makedirs(folder)

  class WidePart:
    def build(self, texts):
      return Wide()

    def sources(self):
      return []

  manifest = prepared.prepare(corpus, WidePart(), tmp_path / 'data', log=quiet).manifest
  window = prepared.open_split(tmp_path / 'data', 'train').window(0, 10)
  assert manifest['dtype'] == 'uint32'
  assert ''.join(chr(i - 69_000) for i in window) == 'Document 1'[:9] + chr(window[9] - 69_000)


class ListStream:
  def __init__(self, ids):
    self._ids, self.tokens = ids, len(ids)

  def window(self, start, length):
    return np.array(self._ids[start : start + length], np.int32)


IDS = [5, 6, 9, 7, 9, 9, 8, 5, 6, 7, 9, 5, 6]  # 9 ends a document


def test_joined_by_hand():
  windows = batches.Windows(ListStream(IDS), 6, 9)
  assert len(windows) == 2
  w = windows[1]
  assert w['tokens'].tolist() == [8, 5, 6, 7, 9, 5] and w['targets'].tolist() == [5, 6, 7, 9, 5, 6]
  assert w['positions'].tolist() == [0, 1, 2, 3, 4, 5]
  assert w['weights'].tolist() == [1.0] * 6 and 'segments' not in w  # which would cost a mask and divide nothing


def test_what_begins_documents_is_nothing_to_learn():
  for documents in (batches.Joined(), batches.Separate()):
    w = batches.Windows(ListStream([5, 6, 9, 7, 8, 6, 9]), 6, 9, documents, start=7)[0]
    assert w['targets'].tolist() == [6, 9, 7, 8, 6, 9] and w['weights'].tolist() == [1, 1, 0, 1, 1, 1]
    assert w['weights'].dtype == np.float32


def test_separate_by_hand():
  w, v = batches.Windows(ListStream(IDS), 6, 9, batches.Separate())
  assert w['tokens'].tolist() == [5, 6, 9, 7, 9, 9] and w['targets'].tolist() == [6, 9, 7, 9, 9, 8]
  assert w['segments'].tolist() == [1, 1, 1, 2, 2, 3]
  assert w['positions'].tolist() == [0, 1, 2, 0, 1, 0]
  assert w['weights'].tolist() == [1, 1, 0, 1, 0, 0]
  assert v['segments'].tolist() == [1, 1, 1, 1, 1, 2]
  assert v['positions'].tolist() == [0, 1, 2, 3, 4, 0]
  assert v['weights'].tolist() == [1, 1, 1, 1, 0, 1]
  for example in (w, v):
    dtypes = {name: str(array.dtype) for name, array in example.items()}
    assert dtypes.pop('weights') == 'float32' and set(dtypes.values()) == {'int32'} and len(dtypes) == 4


def test_windows_tile_the_stream_and_bounds():
  assert len(batches.Windows(ListStream(IDS), 12, 9)) == 1 and len(batches.Windows(ListStream(IDS), 13, 9)) == 0
  with pytest.raises(IndexError, match='window 2 of 2'):
    batches.Windows(ListStream(IDS), 6, 9)[2]


def first_tokens(dataset, indices):
  return [tuple(dataset[i]['tokens']) for i in indices]


@pytest.fixture(scope='module')
def few(shared):
  """The same text in windows so long that an epoch has few of them: a task and its work folder."""
  _, task, folder = shared
  return dataclasses.replace(task, length=256), folder


def test_epochs_and_seeds(few):
  task, folder = few
  train = task.examples(folder, 'train', 0)
  n = (task.describe(folder)['train']['tokens'] - 1) // task.length
  epochs = [first_tokens(train, range(e * n, e * n + n)) for e in range(3)]
  assert epochs[0] != epochs[1] != epochs[2]
  assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert first_tokens(task.examples(folder, 'train', 0), range(n)) == epochs[0]
  other = task.examples(folder, 'train', 1)
  assert first_tokens(other, range(n)) not in epochs

  validation = task.examples(folder, 'validation', 0)
  m = (task.describe(folder)['validation']['tokens'] - 1) // task.length
  assert len(validation) == m
  order = first_tokens(validation, range(m))
  assert order == first_tokens(task.examples(folder, 'validation', 7), range(m))
  stream = prepared.open_split(folder / 'data', 'validation')
  assert sorted(order) == sorted(tuple(stream.window(i * 256, 256)) for i in range(m)) != order


def take(iterator, n):
  return [next(iterator) for _ in range(n)]


def same(left, right):
  assert len(left) == len(right)
  for a, b in zip(left, right):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_rows_of_the_dataset(shared):
  _, task, folder = shared
  dataset = task.examples(folder, 'train', 0)
  for s, batch in enumerate(take(iter(batches.batches(dataset, batch=8)), 5)):
    assert batch['tokens'].shape == (8, 32) and batch['weights'].dtype == np.float32
    assert [tuple(row) for row in batch['tokens']] == first_tokens(dataset, range(8 * s, 8 * s + 8))


def test_exact_resume_in_and_across_epochs(few):
  task, folder = few
  dataset = task.examples(folder, 'train', 3)
  n = (task.describe(folder)['train']['tokens'] - 1) // task.length
  total = 2 * n // 8 + 3
  whole = take(iter(batches.batches(dataset, batch=8)), total + 1)
  for stop in (0, 1, n // 16, n // 8, n // 8 + 1, total - 1):
    iterator = iter(batches.batches(dataset, batch=8))
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = iter(batches.batches(task.examples(folder, 'train', 3), batch=8))
    take(resumed, 2)
    resumed.set_state(state)
    same(take(resumed, 2), whole[stop : stop + 2])


def test_process_count_may_change_at_every_restart(shared):
  _, task, folder = shared
  dataset = task.examples(folder, 'train', 0)
  whole = take(iter(batches.batches(dataset, batch=8)), 12)
  state, seen = None, []
  for processes in (1, 2, 4, 1):
    iterators = [iter(batches.batches(dataset, batch=8, process=p, processes=processes)) for p in range(processes)]
    for iterator in iterators:
      if state is not None:
        iterator.set_state(state)
    for _ in range(3):
      parts = [next(iterator) for iterator in iterators]
      merged = {k: np.empty((8, *parts[0][k].shape[1:]), parts[0][k].dtype) for k in parts[0]}
      for p, part in enumerate(parts):
        for k in part:
          merged[k][p::processes] = part[k]
      seen.append(merged)
    states = [iterator.get_state() for iterator in iterators]
    assert all(s == states[0] for s in states)
    state = states[0]
  same(seen, whole)


@pytest.mark.parametrize('examples', [16, 17, 19, 23, 24])
def test_all_processes_have_the_same_number_of_batches(examples):
  dataset = grain.MapDataset.range(examples).shuffle(0)
  counts = [sum(1 for _ in batches.batches(dataset, batch=8, process=p, processes=4)) for p in range(4)]
  assert counts == [examples // 8] * 4


def test_batches_errors(shared):
  dataset = grain.MapDataset.range(5)
  with pytest.raises(ValueError, match='train.batch=6 must be a positive multiple of processes=4'):
    batches.batches(dataset, batch=6, processes=4)
  with pytest.raises(ValueError, match='process=2 is not one of the 2 processes'):
    batches.batches(dataset, batch=4, process=2, processes=2)
  for d in (dataset, dataset.shuffle(1).repeat(), dataset.repeat()[1:]):
    with pytest.raises(ValueError, match='holds 5 examples, fewer than train.batch=8.*smaller train.batch'):
      batches.batches(d, batch=8)


def test_text_errors(corpus, tmp_path):
  with pytest.raises(ValueError, match='Text.length=0'):
    Text(length=0)
  with pytest.raises(ValueError, match=r'Text.length=100000: the (train|validation) split has only \d+ tokens'):
    Text(corpus=corpus, tokenizer=Bytes(), length=100_000).prepare(tmp_path, log=quiet)
  with pytest.raises(FileNotFoundError, match='prepare the data first'):
    Text(corpus=corpus).tokenizer_of(tmp_path / 'other')


def test_folder_may_be_shared(corpus, tmp_path):
  task = Text(corpus=corpus, tokenizer=Bytes(), folder=str(tmp_path / 'elsewhere'), documents=batches.Separate())
  assert task.prepare(tmp_path / 'work', log=quiet) == task.tokenizer_of(tmp_path / 'work')
  assert not (tmp_path / 'work').exists()
  example = task.examples(tmp_path / 'work', 'validation', 0)[0]
  assert example['segments'].min() == 1


def test_a_process_ends_while_batches_are_being_read(shared):
  _, task, folder = shared
  code = (
    'from loopformer.data import batches as data, prepared\n'
    'import grain\n'
    f"stream = prepared.open_split({str(folder / 'data')!r}, 'train')\n"
    'windows = grain.MapDataset.source(data.Windows(stream, 32, 256)).shuffle(0).repeat()\n'
    'iterator = iter(data.batches(windows, batch=8))\n'
    'next(iterator), next(iterator)\n'
    "print('done')"
  )
  env = {**os.environ, 'PYTHONPATH': os.pathsep.join(p for p in sys.path if p)}
  result = subprocess.run([sys.executable, '-c', code], env=env, timeout=60, capture_output=True, text=True)
  assert result.returncode == 0 and result.stdout == 'done\n', result.stderr


def test_the_benchmark_measures_both_ways_to_treat_documents_and_all_tokenizers(shared):
  corpus, _, _ = shared
  tables = benchmark.data_suite(Size(batch=2, length=16), 2, corpus, (TrainedPieces(vocab=290), Bytes()), drawn=500)
  assert [row['documents'] for row in tables['pipeline']] == ['Joined()', 'Separate()']
  pieces = 'TrainedPieces(vocab=290, sample_bytes=8000000)'
  assert [(row['tokenizer'], row['what'], row['threads']) for row in tables['tokenising']] == [
    (pieces, 'encode', 'all'), (pieces, 'encode', 1), ('Bytes()', 'encode', 1),
    (pieces, 'prepare', 'all'), ('Bytes()', 'prepare', 1)]
  volume = sum(len(document.text) for document in corpus.documents()) / 1e6
  assert {row['MB'] for row in tables['tokenising']} == {volume}
  rates = [*(row['tokens/s'] for row in tables['pipeline']), *(row['MB/s'] for row in tables['tokenising'])]
  assert all(np.isfinite(rate) and rate > 0 for rate in rates)


def test_reads_from_many_threads_agree(shared):
  from concurrent.futures import ThreadPoolExecutor

  _, _, folder = shared
  stream = prepared.open_split(folder / 'data', 'train')
  starts = list(itertools.islice(range(0, stream.tokens - 40, 40), 300))
  one = [stream.window(s, 40).tolist() for s in starts]
  with ThreadPoolExecutor(8) as pool:
    assert [w.tolist() for w in pool.map(lambda s: stream.window(s, 40), starts)] == one
