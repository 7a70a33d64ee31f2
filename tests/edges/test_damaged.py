"""Files that are read, damaged: the message names the file, what is wrong and what to do; no room is made for what a
header promises.

A file that was cut, one in which a bit has flipped on a bad disk, one of another program under the same name, a folder
in the place of a file; and headers that promise more than there is, as a hostile file has them.
"""
import contextlib
import functools
import io
import json
import os
from pathlib import Path
import re
import resource
import shutil
import struct
import sys
import types
from typing import Any, Callable, NamedTuple
import warnings
import zipfile

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from experiments.configs import loopformer as paper
from experiments.tools import records
from loopformer import config as configs, storage
from loopformer.convert import export, from_official, from_pretrained, ouro, tensors
from loopformer.data import prepared
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import Bytes, GivenJson, GivenPieces, TrainedPieces, load_tokenizer
from loopformer.tasks.text import Text
from loopformer.training import checkpoint, lock, metrics
from loopformer.training.checkpoint import Best, Checkpoints
from loopformer.types import ConfigError
from tests import llama_reference, parts, test_config
from tests.convert import test_convert, test_llama
from tests.training import test_checkpoint

TINY = paper.get_config('tiny')
ROOM = 1 << 30  # bytes that reading a small file may ask for, of which little is used
ROWS = [{'schedule': '1', 'budget': 1, 'accuracy': 0.5}, {'schedule': '2', 'budget': 2, 'accuracy': 0.75}]
TEXTS = [f'a text of words and numbers {i}, and more of them' for i in range(40)]


@contextlib.contextmanager
def little_room():
  """Inside it the process cannot have more than ROOM bytes besides those that it has."""
  pages = int(Path('/proc/self/statm').read_text().split()[0]) if os.path.exists('/proc/self/statm') else 0
  before = resource.getrlimit(resource.RLIMIT_AS)
  if pages:
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, before)


class Kind(NamedTuple):
  """What is read. make: writes it into a folder; file: the one that is damaged; read: reads it; sure: whether damage
  that is not noticed leaves the result as it is."""
  make: Callable[[Path], Any]
  file: str
  read: Callable[[Path], Any]
  sure: bool = False


@functools.cache
def pieces():
  return TrainedPieces(vocab=300).build(TEXTS)


def corpus(folder):
  for i, text in enumerate(TEXTS):
    storage.write(folder / f'{i}.txt', text)
  return Files(train=(str(folder / '*.txt'),), validation=0.2)


def prepare(folder):
  (folder / 'texts').mkdir(exist_ok=True)
  prepared.prepare(corpus(folder / 'texts'), Bytes(), folder / 'data', log=lambda text: None)


def stream(folder):
  found = {}
  for split in prepared.SPLITS:
    tokens = prepared.open_split(folder / 'data', split)
    found[split] = tokens.window(0, tokens.tokens).tolist()
  return found


def parquet(folder):
  pa = pytest.importorskip('pyarrow')
  from pyarrow import parquet as files
  files.write_table(pa.table({'text': TEXTS}), folder / 'a.parquet')


def texts(pattern):
  return lambda folder: [document.text for document in Files(train=(str(folder / pattern),)).documents()]


def hugging_face(files=1):
  def make(folder):
    pytest.importorskip('safetensors')
    pytest.importorskip('tokenizers')
    llama_reference.save(folder, test_llama.CONFIGS['llama'], test_llama.weights('llama'), files)
    storage.write(folder / 'tokenizer.json', pieces().hugging_face())
    storage.write(folder / 'tokenizer_config.json', json.dumps({'eos_token': '</s>'}))
  return make


def imported(folder):
  model, params, tokenizer = from_pretrained(folder)
  return model, tokenizer.encode('a text')


def gguf(folder):
  pytest.importorskip('gguf')
  (folder / 'm.gguf').write_bytes(test_llama.gguf_of('llama', 'Q8_0')[0])


def official(suffix):
  def make(folder):
    state = test_convert.weights('loopformer')
    if suffix == 'pt':
      torch = pytest.importorskip('torch')
      torch.save({'model': {key: torch.tensor(value) for key, value in state.items()}, 'iter_num': 3}, folder / 'm.pt')
    elif suffix == 'npz':
      np.savez(folder / 'm.npz', **state)
    else:
      pytest.importorskip('safetensors').numpy.save_file(state, folder / 'm.safetensors')
  return make


def converted(suffix):
  return lambda folder: from_official('loopformer', folder / f'm.{suffix}', heads=test_convert.HEADS)[0]


def checkpoints(folder):
  with Checkpoints(folder, best=Best(name='loss', sign=-1)) as saved:
    for step in (1, 2):
      saved.save(step, test_checkpoint.small(step), test_checkpoint.small(-step), {}, {}, {'loss': 1.0})


def restored(folder):
  with Checkpoints(folder, best=Best(name='loss', sign=-1)) as saved:
    return saved.restore_params(2, test_checkpoint.target())[1]['a'].tolist()


def lines(folder):
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps({'kind': 'train', 'step': i, 'loss': 0.5}) + '\n'
                                                for i in range(3)))


KINDS = {
    'the configuration of a work folder': Kind(lambda folder: configs.save(TINY, folder), 'config.json',
                                               configs.read),
    'metrics': Kind(lines, 'metrics.jsonl', lambda folder: metrics.read_rows(folder / 'metrics.jsonl')),
    'results': Kind(lambda folder: records.write(folder / 'exits.json', ROWS), 'exits.json',
                    lambda folder: records.read(folder / 'exits.json', ('schedule', 'accuracy'), 'evaluate again')),
    'a manifest': Kind(prepare, 'data/manifest.json', stream),
    'a shard': Kind(prepare, 'data/train-00000-of-00001.array_record', stream, sure=True),
    'notes of what was compared': Kind(prepare, 'data/checked/*.json', lambda folder: prepare(folder) or stream(folder),
                                       sure=True),
    'a tokenizer of a run': Kind(lambda folder: pieces().save(folder), 'tokenizer.json',
                                 lambda folder: load_tokenizer(folder).encode('a text'), sure=True),
    'a model of sentencepiece of a run': Kind(lambda folder: pieces().save(folder), 'tokenizer.model',
                                              lambda folder: load_tokenizer(folder).encode('a text'), sure=True),
    'one that is given': Kind(lambda folder: pieces().save(folder), 'tokenizer.model', lambda folder: GivenPieces(
        path=str(folder / 'tokenizer.model')).build(()).encode('a text')),
    'a tokenizer.json': Kind(hugging_face(), 'tokenizer.json', lambda folder: GivenJson(
        path=str(folder / 'tokenizer.json'), eos='</s>').build(()).encode('a text')),
    'rows of texts': Kind(lambda folder: storage.write(folder / 'a.jsonl', ''.join(
        json.dumps({'text': text}) + '\n' for text in TEXTS)), 'a.jsonl', texts('a.jsonl')),
    'columns of texts': Kind(parquet, 'a.parquet', texts('a.parquet')),
    'the configuration of Hugging Face': Kind(hugging_face(), 'config.json', imported),
    'which tokens are special': Kind(hugging_face(), 'tokenizer_config.json', imported),
    'safetensors': Kind(hugging_face(), 'model.safetensors', imported),
    'an index of them': Kind(hugging_face(2), 'model.safetensors.index.json', imported),
    'one of several files': Kind(hugging_face(2), 'model-00002-of-00002.safetensors', imported),
    'GGUF': Kind(gguf, 'm.gguf', lambda folder: from_pretrained(folder / 'm.gguf')[0]),
    **{f'official weights, .{suffix}': Kind(official(suffix), f'm.{suffix}', converted(suffix))
       for suffix in ('pt', 'npz', 'safetensors')},
    'numbers of evaluations in a checkpoint': Kind(checkpoints, 'checkpoints/2/metrics/metrics', restored, sure=True),
    'what a checkpoint holds': Kind(checkpoints, 'checkpoints/2/params/_METADATA', restored, sure=True),
    'where a checkpoint lies': Kind(checkpoints, 'checkpoints/2/params/manifest.ocdbt', restored, sure=True),
}
SLOW = ('checkpoints/', 'm.', 'data/checked')  # files that take a tenth of a second to read


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """Writes what a kind reads, once: kind -> (folder, file, what is read of it)."""
  def make(name):
    if name not in done:
      kind, folder = KINDS[name], tmp_path_factory.mktemp('kind')
      kind.make(folder)
      done[name] = folder, next(folder.glob(kind.file)), kind.read(folder)
    return done[name]

  done = {}
  return make


@contextlib.contextmanager
def instead(file: Path, contents: bytes | None):
  """Inside it the file holds something else, or is a folder; with the time that it had."""
  before, about = file.read_bytes(), file.stat()
  file.unlink()
  file.mkdir() if contents is None else file.write_bytes(contents)
  try:
    yield
  finally:
    shutil.rmtree(file) if contents is None else file.unlink()
    file.write_bytes(before)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def named(kind, folder, file, expected):
  """Reads, and sees that an error names the file. What was refused, or None."""
  try:
    with little_room(), warnings.catch_warnings():
      warnings.simplefilter('ignore')
      found = kind.read(folder)
  except (ConfigError, ValueError, OSError) as error:
    place = f'{folder.name}/checkpoints/2' if 'checkpoints' in kind.file else file.name
    assert place in str(error) and '\n' not in str(error).strip() and 'MemoryError' not in str(error), error
    return str(error)
  assert not kind.sure or found == expected
  return None


@pytest.mark.parametrize('name', KINDS)
def test_a_damaged_file_is_read_as_it_was_or_named(name, made):
  kind = KINDS[name]
  folder, file, expected = made(name)
  whole = file.read_bytes()

  @hypothesis.given(st.integers(0, len(whole) - 1), st.integers(0, 8))
  @hypothesis.settings(max_examples=8 if kind.file.startswith(SLOW) else 25, database=None)
  def damaged(place, bit):
    changed = whole[:place] if bit == 8 else whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:]
    with instead(file, changed):
      named(kind, folder, file, expected)

  damaged()


OTHERS = {'empty': b'', 'a folder': None, 'another program\'s': b'<html>Not found</html>', 'of zeros': bytes(2000),
          'UTF-16': '{"text": 1}'.encode('utf-16'), 'a list': b'[1]', 'a number': b'1', 'null': b'null'}
# What is read without them: no rows are left, or there are none; notes are made anew; numbers are missing, not damaged.
TAKEN = {('metrics', other) for other in OTHERS if other != 'a folder'} | {
    ('notes of what was compared', other) for other in OTHERS} | {
    ('rows of texts', 'empty'), ('rows of texts', 'null')} | {
    ('numbers of evaluations in a checkpoint', other) for other in ('a list', 'a number', 'null')}


@pytest.mark.parametrize('name', KINDS)
def test_what_is_another_file_is_named(name, made):
  kind = KINDS[name]
  folder, file, expected = made(name)
  for other, contents in OTHERS.items():
    with instead(file, contents):
      refused = named(kind, folder, file, expected)
      assert (refused is None) == ((name, other) in TAKEN), other


def replaced(file: Path, change: Callable[[Any], Any]):
  """Writes JSON that was changed."""
  storage.write(file, json.dumps(change(json.loads(file.read_text()))))


def altered(path: str, value: Any):
  """A change of one value in JSON; the value of a part by its name."""
  def change(encoded):
    *outer, last = path.split('.')
    place = encoded
    for name in outer:
      place = place[int(name) if isinstance(place, list) else name]
    if value is None:
      del place[last]
    else:
      place[last] = value
    return encoded
  return change


# The kind, what is changed in its JSON, words of the message.
WRONG = [
    ('the configuration of a work folder', altered('control.$part', 'loopformer.training.control:Gone'),
     'control:Gone, which this version of loopformer does not have .*; use the version that wrote it'),
    ('the configuration of a work folder', altered('control.$part', 'loopformer.gone:Steady'), 'gone:Steady, which'),
    ('the configuration of a work folder', altered('control.$part', 7), 'it names 7, which is no part'),
    ('the configuration of a work folder', altered('train.later', 1), "unexpected keyword .*'later'.*the version"),
    ('the configuration of a work folder', altered('name', None), "'name'.*the version"),
    ('the configuration of a work folder', altered('train.steps', 'many'), "Train.steps = 'many': expected int; give"),
    ('the configuration of a work folder', altered('train.batch', 2.5), 'batch = 2.5: expected int'),
    ('the configuration of a work folder', altered('model.loops', '8'), "Looped.loops = '8': expected int"),
    ('the configuration of a work folder', lambda held: held['train'], 'it describes no experiment'),
    ('a manifest', altered('version', 2), 'version=2, this library reads 1'),
    ('a manifest', altered('record', 8192), 'record=8192'),
    ('a manifest', altered('splits.test', {}), 'splits are not'),
    ('a manifest', altered('splits.train.tokens', 7), r'the shards of train have \d+ tokens .*the split 7'),
    ('a manifest', altered('splits.train.shards.0.records', None), 'the split train is not described'),
    ('a manifest', altered('splits.train.shards.0.name', '../train-0-of-1.array_record'), 'is no name of a shard'),
    ('a manifest', altered('splits.train.shards.0.name', '/etc/passwd'), 'is no name of a shard'),
    ('an index of them', altered('weight_map', {'a': '../model.safetensors'}), "names '../model.safetensors'"),
    ('an index of them', altered('weight_map', {'a': '/tmp/model.safetensors'}), "names '/tmp/model.safetensors'"),
    ('an index of them', altered('weight_map', {'a': './model-00001-of-00002.safetensors'}), "names './model-0"),
    ('an index of them', altered('weight_map', {'a': 1}), 'no weight_map'),
    ('an index of them', altered('weight_map', None), 'no weight_map'),
    ('the configuration of Hugging Face', altered('num_hidden_layers', 10**12), 'said to have 1000000000000 layers'),
    ('the configuration of Hugging Face', altered('hidden_size', 'wide'), "hidden_size = 'wide': give"),
    ('the configuration of Hugging Face', altered('num_attention_heads', 0), 'num_attention_heads = 0: give'),
    ('the configuration of Hugging Face', altered('rope_parameters', [1]), 'it is to be an object'),
    ('which tokens are special', altered('eos_token', [1]), r'eos_token = \[1\]: it is no name of a token'),
    ('a tokenizer.json', altered('model.vocab.<unk>', 2**40), 'it has no vocabulary'),
    ('a tokenizer.json', altered('model.vocab', {}), 'it has no vocabulary'),
    ('a tokenizer.json', altered('model', None), 'it has no vocabulary'),
    ('a tokenizer.json', altered('added_tokens', [{'id': 0}]), 'it has no vocabulary'),
    ('a tokenizer.json', altered('model.type', 'Spells'), 'no usable tokenizer'),
    ('results', lambda rows: [{'budget': 1}], 'it holds no rows with schedule, accuracy; evaluate again'),
    ('results', lambda rows: [], 'it holds no rows'),
]


@pytest.mark.parametrize('name, change, words', WRONG)
def test_a_value_of_another_kind_or_version_is_named(name, change, words, made):
  kind = KINDS[name]
  folder, file, expected = made(name)
  with instead(file, file.read_bytes()):
    replaced(file, change)
    refused = named(kind, folder, file, expected)
  assert refused and re.search(words, refused), refused


def test_shards_that_changed_places_are_named(tmp_path):
  """Of sizes and records that are those of the others."""
  (tmp_path / 'texts').mkdir()
  for i in range(30):
    storage.write(tmp_path / f'texts/{i}.txt', f'{i}' * 400)
  prepared.prepare(Files(train=(str(tmp_path / 'texts/*.txt'),)), Bytes(), tmp_path / 'data', shard_tokens=2 * 4096,
                   log=lambda text: None)
  assert stream(tmp_path)

  def change(manifest):
    shards = manifest['splits']['train']['shards']
    assert shards[0]['records'] == 2
    shards[0]['records'], shards[-1]['records'] = shards[-1]['records'], 2
    return manifest

  replaced(tmp_path / 'data/manifest.json', change)
  with pytest.raises(ValueError, match=r'train-00000-of-.* is damaged or stale \(2 records, not \d\)'):
    stream(tmp_path)


def header(*fields, tensors: int = 0, count: int | None = None) -> bytes:
  """A GGUF file that ends with its header."""
  return b'GGUF' + struct.pack('<IQQ', 3, tensors, len(fields) if count is None else count) + b''.join(fields)


def claimed(shape, dtype: str = '<f4') -> bytes:
  """An .npz file with an array of eight bytes, which says that it has another shape."""
  array, file = io.BytesIO(), io.BytesIO()
  np.lib.format.write_array_header_1_0(array, {'descr': dtype, 'fortran_order': False, 'shape': shape})
  with zipfile.ZipFile(file, 'w') as archive:
    archive.writestr('a.npy', array.getvalue() + bytes(8))
  return file.getvalue()


FIELD = struct.pack('<Q', 1) + b'a'
# The kind, what its file holds.
HOSTILE = {
    'more fields than bytes': ('GGUF', header(count=2**62)),
    'more tensors than bytes': ('GGUF', header(tensors=2**62)),
    'a name beyond the end': ('GGUF', header(struct.pack('<Q', 2**62))),
    'a text beyond the end': ('GGUF', header(FIELD + struct.pack('<IQ', 8, 2**62))),
    'a list of numbers beyond the end': ('GGUF', header(FIELD + struct.pack('<IIQ', 9, 4, 2**60))),
    'a list of texts beyond the end': ('GGUF', header(FIELD + struct.pack('<IIQ', 9, 8, 2**60))),
    'lists in a list': ('GGUF', header(FIELD + struct.pack('<IIQ', 9, 9, 2**60))),
    'a value of no kind': ('GGUF', header(FIELD + struct.pack('<I', 99))),
    'a tensor of many axes': ('GGUF', header(tensors=1) + FIELD + struct.pack('<I', 2**31)),
    'a tensor beyond the end': ('GGUF', header(tensors=1) + FIELD + struct.pack('<IQQIQ', 2, 2**31, 2**31, 0, 0)),
    'a header beyond the end': ('safetensors', struct.pack('<Q', 2**60) + b'{}'),
    'a tensor that is not there': ('safetensors', struct.pack('<Q', 64) + b'{"a":{"dtype":"F32",'
                                   b'"shape":[1099511627776],"data_offsets":[0,4]}}'.ljust(64)),
    'an array that is not there': ('official weights, .npz', claimed((2**40,))),
    'an array whose size wraps around': ('official weights, .npz', claimed((2**32, 2**32))),
    'objects': ('official weights, .npz', claimed((1,), '|O')),
}


@pytest.mark.parametrize('case', HOSTILE)
def test_no_room_is_made_for_what_a_header_promises(case, made):
  name, contents = HOSTILE[case]
  folder, file, expected = made(name)
  with instead(file, contents):
    assert named(KINDS[name], folder, file, expected)


def test_a_tensor_of_torch_that_repeats_few_numbers_is_not_spread_out(tmp_path):
  torch = pytest.importorskip('torch')
  for value, words in ((torch.zeros(1, dtype=torch.bfloat16).expand(2**38), 'it is a view of fewer numbers'),
                       (torch.sparse_coo_tensor(size=(2**38,)), '')):
    torch.save({'a': value}, tmp_path / 'm.pt')
    with little_room(), pytest.raises(ConfigError, match=r"m\.pt: key 'a': it is no array \(" + words):
      from_official('loopformer', tmp_path / 'm.pt', heads=2)


@pytest.mark.parametrize('number', [10**9 - 1, 10**12, '1' * 5000])
def test_a_layer_of_a_large_number_is_one_key(number, tmp_path):
  state = test_convert.weights('loopformer') | {f'transformer.h.blocks.{number}.a': np.zeros(1, np.float32)}
  np.savez(tmp_path / 'm.npz', **state)
  with little_room(), pytest.raises(ConfigError, match='m.npz: .* is surplus'):
    from_official('loopformer', tmp_path / 'm.npz', heads=test_convert.HEADS)


@pytest.mark.parametrize('name', ['../out', '/out', 'a/../../out'])
def test_a_copy_of_a_bucket_is_written_nowhere_else(name, tmp_path):
  with pytest.raises(ConfigError, match='gs://b/run: it holds .* outside of the copy'):
    storage.downloaded({f'b/run/{name}': name}, 'gs://b/run', tmp_path / 'copy')


# A configuration file, and words of the message.
PROGRAMS = {
    'a mistake of spelling': ('def get_config(:\n', 'line 1 is not Python .*; correct it'),
    'UTF-16': ('def get_config(): pass'.encode('utf-16'), '.* is not Python .*null bytes'),
    'a name that is not there': ('import os\nos.gone\n', "line 2: AttributeError: .*'gone'; correct the file"),
    'a package that is not there': ('import gone_from_here', 'line 1: ModuleNotFoundError: .*gone_from_here'),
    'a fault in get_config': ('def get_config():\n  return 1 / 0\n', 'line 2: ZeroDivisionError'),
    'no get_config': ('', 'the file defines no get_config'),
    'another result': ('def get_config():\n  return 1\n', 'its get_config returns builtins.int; let it return'),
}


@pytest.mark.parametrize('case', PROGRAMS)
def test_a_fault_in_a_configuration_file_is_told_with_its_line(case, tmp_path):
  text, words = PROGRAMS[case]
  (tmp_path / 'mine.py').write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(ConfigError, match=f'mine.py: {words}') as error:
    configs.load(str(tmp_path / 'mine.py'))
  assert '\n' not in str(error.value)


def test_marks_before_what_is_read_are_no_part_of_it(made):
  """As editors of Windows write them."""
  for name in ('the configuration of a work folder', 'metrics', 'results', 'a tokenizer.json', 'an index of them',
               'the configuration of Hugging Face', 'which tokens are special', 'a tokenizer of a run', 'a manifest'):
    kind = KINDS[name]
    folder, file, expected = made(name)
    with instead(file, b'\xef\xbb\xbf' + file.read_bytes()):
      assert kind.read(folder) == expected, name
  (folder / 'mine.py').write_text('\ufeffimport experiments.configs.loopformer as paper\n'
                                  'def get_config():\n  return paper.get_config("tiny")\n', encoding='utf-8')
  assert configs.load(str(folder / 'mine.py')) == TINY


def test_rows_of_metrics_that_are_damaged_are_told(tmp_path):
  """But a last one that a killed run cut short is nothing to tell of; a run that goes on writes beside the others."""
  lines(tmp_path)
  whole = (tmp_path / 'metrics.jsonl').read_text()
  (tmp_path / 'metrics.jsonl').write_text(whole + whole[:9])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert [row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [0, 1, 2]
  (tmp_path / 'metrics.jsonl').write_text(whole.replace('{"kind": "train", "step": 1,', '{"kind": "tr') + '[1]\n{}\n')
  for read in (metrics.read_rows, lambda path: metrics.writer(path.parent, 5).close()):
    with pytest.warns(match='metrics.jsonl: 3 rows are damaged and left out, the first of them on line 2'):
      read(tmp_path / 'metrics.jsonl')
  assert [row['step'] for row in metrics.read_rows(tmp_path / 'metrics.jsonl')] == [0, 2]


def test_settings_of_ouro_name_their_file(tmp_path):
  for contents in (b'{', b'[]', b'\xff\xfe{'):
    (tmp_path / 'config.json').write_bytes(contents)
    with pytest.raises(ConfigError, match='config.json'):
      ouro.settings(tmp_path)


def test_a_run_that_keeps_the_best_of_another_number_goes_on(tmp_path):
  checkpoints(tmp_path)
  with Checkpoints(tmp_path, keep=1, best=Best(name='accuracy', sign=1)) as saved:
    saved.save(3, test_checkpoint.small(3), test_checkpoint.small(-3), {}, {}, {'accuracy': 0.5})
    saved.save(4, test_checkpoint.small(4), test_checkpoint.small(-4), {}, {}, {'accuracy': 0.25})
  with Checkpoints(tmp_path) as saved:
    assert saved.steps() == [3, 4]


def test_what_a_failed_restore_leaves_behind_is_not_printed(monkeypatch):
  """Requests for other arrays, which end when nobody listens any more; other errors are."""
  told = []
  monkeypatch.setattr(sys, 'unraisablehook', told.append)
  with checkpoint._quiet():
    pass
  assert sys.unraisablehook == told.append
  with pytest.raises(OSError), checkpoint._quiet():
    raise OSError
  for words in ('Event loop is closed', 'another error'):
    sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(words)))
  assert [str(unraised.exc_value) for unraised in told] == ['another error']


def test_an_export_of_more_layers_than_rows_is_not_built(tmp_path):
  pytest.importorskip('safetensors')
  model = parts.looped(parts.plain())
  export(model, parts.params(model), None, tmp_path)
  for path, value, words in (('description.cell.core.depth', 10**9, 'said to have 1000000000 layers'),
                             ('description.loops', 'x', "loops = 'x': expected int"),
                             ('description.part', [], 'another kind'),
                             ('description', [], 'another kind|is of no model'),
                             ('description.cell', None, 'config.json.*the version'),
                             ('description.read_in.vocab', 10**15, 'config.json')):
    whole = (tmp_path / 'config.json').read_bytes()
    replaced(tmp_path / 'config.json', altered(path, value))
    with little_room(), pytest.raises(ConfigError, match=words) as error:
      from_pretrained(tmp_path)
    assert 'config.json' in str(error.value)
    (tmp_path / 'config.json').write_bytes(whole)


# Of the right form, and of other contents ---------------------------------------------------------------------------


def places(value, path=()):
  """The paths of all values in JSON."""
  yield path
  for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
    yield from places(inner, (*path, key))


def changed(value, path, new):
  """The same JSON with another value at a path; DELETED: none."""
  if not path:
    return new
  copied = dict(value) if isinstance(value, dict) else list(value)
  if len(path) == 1 and new is DELETED:
    del copied[path[0]]
  else:
    copied[path[0]] = changed(value[path[0]], path[1:], new)
  return copied


DELETED = object()
VALUES = (None, 5, -1.5, '', 'x', [], [1], {}, True, DELETED)


def test_a_manifest_of_other_values_is_read_or_named(tmp_path):
  """By whoever reuses it: a right result, or one line with its path."""
  (tmp_path / 'a.txt').write_text('some text and more\n' * 400)
  (tmp_path / 'b.txt').write_text('other text\n' * 400)
  task = Text(corpus=Files(train=(f'{tmp_path}/*.txt',)), tokenizer=Bytes(), length=16)
  task.prepare(tmp_path, lambda line: None)
  file = tmp_path / 'data/manifest.json'
  whole = json.loads(file.read_text())
  for path in list(places(whole))[1:]:
    for new in VALUES:
      file.write_text(json.dumps(changed(whole, path, new)))
      try:
        task.prepare(tmp_path, lambda line: None)
      except (ValueError, OSError) as error:  # a changed name or size of a source is another corpus
        assert str(tmp_path / 'data') in str(error), (path, new, error)


def test_a_configuration_of_plain_values_where_parts_belong(tmp_path):
  configs.save(test_config.TINY, tmp_path)
  whole = json.loads((tmp_path / configs.FILE).read_text())

  def at(path):
    value = whole
    for key in path:
      value = value[key]
    return value

  parted = [path for path in places(whole) if isinstance(at(path), dict) and '$part' in at(path)]
  assert len(parted) > 15
  for path in parted:
    for new in (5, -1.5, 'x', [], [1], True):
      (tmp_path / configs.FILE).write_text(json.dumps(changed(whole, path, new)))
      with pytest.raises(ConfigError, match=configs.FILE):
        configs.read(tmp_path)


def test_a_configuration_of_parts_where_others_belong(tmp_path):
  """A part that was moved by hand into another's place, everywhere: the file is named, or it is one that can stand
  there.
  """
  configs.save(test_config.TINY, tmp_path)
  whole = json.loads((tmp_path / configs.FILE).read_text())
  held = {}

  def gather(value, path=()):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
      if isinstance(inner, dict) and '$part' in inner:
        held[(*path, key)] = inner
      gather(inner, (*path, key))

  gather(whole)
  configs.check(configs.read(tmp_path))
  refused = 0
  for path, own in held.items():
    for new in {json.dumps(part): part for part in held.values()}.values():
      if new['$part'] == own['$part']:
        continue
      (tmp_path / configs.FILE).write_text(json.dumps(changed(whole, path, new)))
      try:
        configs.check(configs.read(tmp_path))
      except ConfigError:
        refused += 1
  assert refused > 0.9 * len(held) * (len({part['$part'] for part in held.values()}) - 1)


@pytest.mark.parametrize('name', ['experiments.main:main', 'experiments.compare:X', 'experiments.benchmark.__main__:X',
                                  'experiments.studies.adaptive:main'])
def test_names_of_commands_are_not_parts(name, tmp_path):
  """Which define flags when they are imported: they are not. (Other tests of the same process import some of them.)"""
  before = set(sys.modules)
  token = configs._TRUST.set(False)
  try:
    configs.save(test_config.TINY, tmp_path)
    whole = json.loads((tmp_path / configs.FILE).read_text())
    (tmp_path / configs.FILE).write_text(json.dumps(changed(whole, ('control',), {'$part': name})))
    with pytest.raises(ConfigError, match=f'config.json: it names {name}, which is no part of this library'):
      configs.read(tmp_path)
  finally:
    configs._TRUST.reset(token)
  assert name.partition(':')[0] not in set(sys.modules) - before


@pytest.mark.parametrize('kind', ['parameter', 'sparse', 'meta'])
def test_tensors_of_pytorch_that_are_not_plain(kind, tmp_path):
  torch = pytest.importorskip('torch')
  made = {'parameter': lambda: torch.nn.Parameter(torch.ones(2)), 'sparse': lambda: torch.eye(2).to_sparse(),
          'meta': lambda: torch.ones(2, device='meta')}[kind]()
  torch.save({'w': made}, tmp_path / 'x.bin')
  if kind == 'parameter':
    assert tensors.read_torch(tmp_path / 'x.bin')['w'].read().tolist() == [1, 1]
  else:
    with pytest.raises(ConfigError, match="x.bin: (tensor 'w' is|cannot be read)|x.bin.*cannot be read"):
      tensors.read_torch(tmp_path / 'x.bin')


@pytest.mark.parametrize('contents', [b'\xff\xfe', b'', b'[]', b'{"process": "x"}', None])
def test_a_damaged_lock_is_no_trace(contents, tmp_path, monkeypatch):
  """What cannot be asked counts as dead after a while; a link that leads nowhere is named."""
  monkeypatch.setattr(lock, 'PATIENCE', 0.2)
  monkeypatch.setattr(lock, 'POLL', 0.05)
  monkeypatch.setattr(lock, 'SETTLE', 0.0)
  file = tmp_path / lock.FILE
  if contents is None:
    file.symlink_to(tmp_path / 'nowhere')
    with pytest.raises(ConfigError, match=f'{file}: it cannot be made'):
      with lock.Lock(tmp_path, print):
        pass
  else:
    file.write_bytes(contents)
    with lock.Lock(tmp_path, print):
      assert json.loads(file.read_text())['process'] == os.getpid()
