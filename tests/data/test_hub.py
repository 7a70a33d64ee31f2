"""Data sets of Hugging Face as corpora: of folders of this machine, and how one of the Hub is asked for."""
import collections
import json
import shutil

import pytest

from loopformer.data import prepared
from loopformer.data.corpus import Files, HubDataset
from loopformer.data.tokenizer import Bytes
from loopformer.tasks.mixture import Mixture
from loopformer.tasks.text import Text
from loopformer.types import ConfigError

COMMIT = '0123456789abcdef0123456789abcdef01234567'
TEXTS = [f'document {i} ' * (i % 7 + 1) for i in range(40)]


@pytest.fixture(scope='module')
def datasets(tmp_path_factory):
  """The library, whose cache is a folder of the tests, and which leaves PyTorch alone."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('USE_TORCH', '0')
    module = pytest.importorskip('datasets', reason='datasets is not installed (extra `datasets`)')
    patch.setattr(module.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))
    yield module


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  """A folder of rows, as data sets are published: train and test, with two columns; null and empty ones."""
  folder = tmp_path_factory.mktemp('rows')
  for split, texts in {'train': [*TEXTS, None, ''], 'test': ['held out', TEXTS[3]]}.items():
    (folder / f'{split}.jsonl').write_text(''.join(json.dumps({'n': n, 'body': text}) + '\n'
                                                   for n, text in enumerate(texts)))
  return folder


def found(corpus) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
  left_out = collections.Counter()
  documents = list(corpus.documents(left_out))
  assert len({document.name for document in documents}) == len(documents)
  return {document.name: (document.split, document.text) for document in documents}, dict(left_out)


def test_a_folder_gives_what_its_rows_hold(datasets, rows):
  """The same texts in the same splits as `Files` reads of these rows, streamed or not."""
  corpus = HubDataset(folder=str(rows), field='body', validation=0.25)
  documents, left_out = found(corpus)
  plain, _ = found(Files(train=(str(rows / 'train.jsonl'),), field='body', validation=0.25))
  assert sorted(documents.values()) == sorted(plain.values()) and len(documents) == len(TEXTS)
  assert documents['train#3'][1] == TEXTS[3]
  assert left_out == {'rows of null': 1, 'empty documents': 1}
  assert (documents, left_out) == found(corpus) == found(HubDataset(folder=str(rows), field='body', validation=0.25,
                                                                    streaming=False))


def test_splits_are_named(datasets, rows):
  documents, left_out = found(HubDataset(folder=str(rows), field='body', validation_split='test'))
  held = {name: text for name, (split, text) in documents.items() if split == 'validation'}
  assert held == {'test#0': 'held out', 'test#1': TEXTS[3]}
  assert left_out['train documents that stand in validation'] == 1 and 'train#3' not in documents


@pytest.mark.parametrize('several', [False, True])
def test_a_saved_data_set_is_read(several, datasets, tmp_path):
  saved = datasets.Dataset.from_dict({'text': TEXTS})
  (datasets.DatasetDict({'train': saved}) if several else saved).save_to_disk(tmp_path / 'saved')
  corpus = HubDataset(folder=str(tmp_path / 'saved'))
  assert [text for _, text in found(corpus)[0].values()] == TEXTS
  with pytest.raises(ConfigError, match="HubDataset: the split 'valid' of .*saved cannot be read"):
    found(HubDataset(folder=str(tmp_path / 'saved'), train='valid'))


def test_it_is_prepared_once_wherever_it_lies(datasets, rows, tmp_path):
  def prepare(folder):
    told = []
    prepared.prepare(HubDataset(folder=str(folder), field='body'), Bytes(), tmp_path / 'data', log=told.append)
    return told[-1]

  assert 'written to' in prepare(rows)
  shutil.copytree(rows, tmp_path / 'moved')
  assert 'reused from' in prepare(tmp_path / 'moved')
  with (tmp_path / 'moved/train.jsonl').open('a') as file:
    file.write('{"n": 0, "body": "one more"}\n')
  with pytest.raises(ValueError, match=r'source train\.jsonl has changed'):
    prepare(tmp_path / 'moved')


def test_a_mixture_takes_it(datasets, rows, tmp_path):
  """Beside another text, by weights: three examples of it for one of the other."""
  text = Text(corpus=HubDataset(folder=str(rows), field='body'), tokenizer=Bytes(), length=8)
  (tmp_path / 'other.txt').write_text('z' * 400)
  (tmp_path / 'held.txt').write_text('z' * 401)
  other = Text(corpus=Files(train=(str(tmp_path / 'other.txt'),), validation_files=(str(tmp_path / 'held.txt'),)),
               tokenizer=Bytes(), length=8)
  task = Mixture(of={'hub': text, 'files': other}, weights={'hub': 3, 'files': 1})
  task.prepare(tmp_path, lambda line: None)
  examples = task.examples(tmp_path, 'train', 0)
  z = task.tokenizer_of(tmp_path).encode('z')[0]
  assert sum((examples[i]['tokens'] == z).sum() > 4 for i in range(40)) == 10


def test_one_of_the_hub_is_asked_for_by_its_commit(datasets, rows, monkeypatch):
  asked, load = [], datasets.load_dataset

  def local(name, subset, **options):
    asked.append((name, subset, options.pop('revision')))
    return load(str(rows), None, **options)

  monkeypatch.setattr(datasets, 'load_dataset', local)
  corpus = HubDataset(name='owner/books', subset='en', revision=COMMIT, field='body', validation_split='test')
  assert len(found(corpus)[0]) == len(TEXTS) - 1 + 2
  assert set(asked) == {('owner/books', 'en', COMMIT)}
  assert corpus.sources() == [] and corpus.paths == () and COMMIT in repr(corpus)


@pytest.mark.parametrize('fields, message', [
    ({}, "HubDataset.name='', folder='': give one of the two"),
    ({'name': 'a/b', 'folder': 'c', 'revision': COMMIT}, "folder='c': give one of the two"),
    ({'name': 'a/b'}, "HubDataset.revision='': give the commit of a/b, 40 hexadecimal digits"),
    ({'name': 'a/b', 'revision': 'main'}, "HubDataset.revision='main': give the commit"),
    ({'folder': 'c', 'revision': COMMIT}, 'a folder has no revision; leave that out'),
    ({'folder': 'gs://bucket/rows'}, 'give a folder of this machine, or Files'),
    ({'folder': 'c', 'validation': 1.0}, 'HubDataset.validation=1.0: give a share between 0 and 1'),
])
def test_what_is_no_data_set_is_refused(fields, message):
  with pytest.raises(ValueError) as error:
    HubDataset(**fields)
  assert message in str(error.value)


def test_what_cannot_be_read_is_named(datasets, rows, tmp_path):
  with pytest.raises(ValueError, match=r"HubDataset.field='text': .*, train has no such field; it has n, body"):
    found(HubDataset(folder=str(rows)))
  with pytest.raises(ValueError, match=r"HubDataset.field='n': train row 1 holds int, not text"):
    found(HubDataset(folder=str(rows), field='n'))
  with pytest.raises(ConfigError, match="HubDataset: the split 'valid' of .* cannot be read"):
    found(HubDataset(folder=str(rows), field='body', train='valid'))
  with pytest.raises(FileNotFoundError, match='HubDataset.folder=.*: there is no such folder'):
    found(HubDataset(folder=str(tmp_path / 'nowhere')))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(ConfigError, match="HubDataset: the split 'train' of .*empty cannot be read"):
    found(HubDataset(folder=str(tmp_path / 'empty')))
