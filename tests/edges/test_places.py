"""Where things lie: home folders, other current folders, places that cannot be written, consoles, names of
configurations.
"""
import ast
import dataclasses
import os
from pathlib import Path
import pwd
import shutil
import subprocess
import sys

import jax
import pytest

from experiments import main
import loopformer
from loopformer import config as configs, convert, storage
from loopformer.data.corpus import Files
from loopformer.data.tokenizer import ByteTokenizer, GivenJson, GivenPieces, TrainedPieces, load_tokenizer
from loopformer.model import init_params
from loopformer.objective import Own
from loopformer.tasks.text import Text
from loopformer.training import resume
from loopformer.types import ConfigError
from tests import parts, test_config
from tests.experiments.test_cli import run_here

TEXT = 'the cat sat on the mat\n' * 40


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder, from which nothing else is read; the current folder is another one."""
  (tmp_path / 'home').mkdir()
  (tmp_path / 'here').mkdir()
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  monkeypatch.chdir(tmp_path / 'here')
  yield tmp_path / 'home'
  assert not (tmp_path / 'here/~').exists()


def saved(folder):
  """A work folder with a model in it."""
  model = parts.looped(parts.plain(1))
  config = test_config.TINY
  model = config.model
  loopformer.Loaded(model, init_params(model, jax.random.key(0)), ByteTokenizer(), config).save(folder)


ENTRIES = {  # what is called with a path below ~ -> whether it writes
    'a work folder': (lambda path: saved(path), lambda path: loopformer.load(path)),
    'a tokenizer': (lambda path: ByteTokenizer().save(path), lambda path: load_tokenizer(path)),
    'pieces': (lambda path: Path(os.path.expanduser(path)).write_bytes(TrainedPieces(vocab=280).build([TEXT]).model),
               lambda path: GivenPieces(path=path).build(())),
    'a tokenizer.json': (lambda path: Path(os.path.expanduser(path)).write_text(ByteTokenizer().hugging_face()),
                         lambda path: GivenJson(path=path, eos='<|endoftext|>').build(())),
    'a corpus': (lambda path: Path(os.path.expanduser(path)).with_suffix('.txt').write_text(TEXT),
                 lambda path: list(Files(train=(path + '.txt',)).sources())),
    'a configuration': (lambda path: Path(os.path.expanduser(path)).write_bytes(
        (parts.ROOT / 'experiments/configs/loopformer.py').read_bytes()), lambda path: configs.load(path)),
    'an export': (lambda path: convert.export(test_config.TINY.model, init_params(
        test_config.TINY.model, jax.random.key(0)), None, path), lambda path: convert.from_pretrained(path)),
    'a teacher': (lambda path: configs.save(test_config.TINY, path), lambda path: Own(folder=path).model(None)),
}


@pytest.mark.parametrize('name', ENTRIES)
def test_a_path_in_the_home_folder(name, home):
  """Flags with = and files reach us with ~ in them: shells expand it in front alone."""
  write, read = ENTRIES[name]
  write('~/x')
  assert len(list(home.iterdir())) == 1
  read('~/x')


@pytest.mark.parametrize('name', ['~nobody-of-this-name/x', '~nobody-of-this-name'])
def test_a_home_folder_that_there_is_not(name, home):
  for call in (storage.path, loopformer.load, configs.read):
    with pytest.raises(ConfigError, match=f'{name}: there is no such home folder; .* ./~'):
      call(name)
  assert storage.path('./~x') == Path('~x') and storage.path('a~b') == Path('a~b')


def test_paths_are_stored_whole(home, tmp_path, monkeypatch):
  """What a configuration file names from the current folder means the same from another."""
  Path('c.py').write_text('import dataclasses\nfrom experiments.configs import loopformer\n'
                          'from loopformer.data.tokenizer import GivenPieces\n'
                          'def get_config(argument="tiny"):\n'
                          '  config = loopformer.get_config(argument)\n'
                          '  task = dataclasses.replace(config.task, tokenizer=GivenPieces(path="pieces.model"), '
                          'folder="data")\n'
                          '  return dataclasses.replace(config, task=task)\n')
  here = Path.cwd()
  config = configs.absolute(configs.load('c.py', ['train.start=~/runs/first']))
  assert dict(configs.paths(config)) == {'task.tokenizer.root': str(here), 'task.folder': str(here / 'data'),
                                         'train.start': str(home / 'runs/first')}
  configs.save(config, 'run')
  monkeypatch.chdir(tmp_path)
  assert dict(configs.paths(configs.read(here / 'run'))) == dict(configs.paths(config))
  older = configs.with_paths(config, {'task.folder': 'here/data', 'model.nothing': 'x'})
  assert older.task.folder == 'here/data' and not list(configs.difference(older, config))
  assert configs.with_paths(configs.absolute(configs.load(str(here / 'c.py'))),
                            dict(configs.paths(older))).task.folder == 'here/data'


def test_buckets_stay_as_they_are():
  pytest.importorskip('gcsfs')
  assert str(storage.absolute('gs://bucket/folder')) == 'gs://bucket/folder'


# Places that cannot be written ---------------------------------------------------------------------------------------


@pytest.fixture
def nobody(monkeypatch, tmp_path):
  """A user without a name or a home, as containers have them; temporary files go to a folder of the test."""
  def unknown(uid):
    raise KeyError(uid)

  for name in ('HOME', 'XDG_CACHE_HOME', 'LOOPFORMER_CACHE'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  monkeypatch.setattr('tempfile.gettempdir', lambda: str(tmp_path))


def test_without_a_home(nobody, tmp_path, monkeypatch):
  assert storage.cache() == tmp_path / f'loopformer-{os.getuid()}'
  assert storage.cache().stat().st_mode & 0o777 == 0o700
  monkeypatch.setattr(os, 'getuid', lambda: 12345)
  (tmp_path / 'loopformer-12345').mkdir()  # another's
  with pytest.raises(ConfigError, match='loopformer-12345: no folder of this user.*LOOPFORMER_CACHE'):
    storage.cache()
  (tmp_path / 'loopformer-12345').rmdir()
  (tmp_path / 'loopformer-12345').symlink_to(tmp_path)
  with pytest.raises(ConfigError):
    storage.cache()


@pytest.mark.parametrize('given', ['LOOPFORMER_CACHE', 'XDG_CACHE_HOME'])
def test_a_cache_that_is_named(given, tmp_path, monkeypatch):
  monkeypatch.setenv(given, str(tmp_path / 'named'))
  assert storage.cache() in (tmp_path / 'named', tmp_path / 'named/loopformer')


def test_programs_that_cannot_be_kept(nobody, tmp_path, monkeypatch, capsys):
  """One line of warning, and the command goes on."""
  (tmp_path / f'loopformer-{os.getuid()}').write_text('a file')
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setattr(main, 'compiled', lambda workdir: str(storage.cache()))
  jax.config.update('jax_compilation_cache_dir', None)
  try:
    main.keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir is None
  finally:
    jax.config.update('jax_compilation_cache_dir', before)
  said = capsys.readouterr().err
  assert said.startswith('warning: compiled programs are not kept') and said.count('\n') == 1


def test_writable(tmp_path):
  (tmp_path / 'file').write_text('')
  assert storage.writable(tmp_path / 'a/b/c') and not (tmp_path / 'a').exists()
  assert not storage.writable(tmp_path / 'file') and not storage.writable(tmp_path / 'file/below')
  with pytest.raises(ConfigError, match='workdir = .*file: a file; name another folder'):
    storage.check(tmp_path / 'file', 'workdir', writes=True)


@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_folder_that_cannot_be_written(mode, tmp_path):
  """Training is refused at once; an evaluation says so before it computes, and prints what it would have stored."""
  folder = tmp_path / 'run'
  if mode == 'train':
    folder.write_text('a file')
    status, out, err = run_here(folder, '--config=loopformer:tiny')
    assert status == 1 and not out and f'workdir = {folder}: a file; name another folder' in err
    return
  config = test_config.TINY
  said = []
  folder.mkdir()
  (folder / 'eval').write_text('a file')
  assert not storage.stores(folder / 'eval', said.append) and storage.stores(folder, said.append)
  assert len(said) == 1 and said[0].startswith('warning: results are printed, and not stored: workdir = ')
  del config


# Consoles ------------------------------------------------------------------------------------------------------------


def python(code: str, **environment) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-c', code], capture_output=True, env={**os.environ, **environment},
                        cwd=parts.ROOT)


def test_a_console_of_few_letters():
  """Texts in any language come out, escaped where they must be."""
  done = python('from experiments.tools import command\ncommand.run(lambda argv: print("caf\\xe9 \\U0001f600"))',
                PYTHONIOENCODING='ascii')
  assert done.returncode == 0 and done.stdout == b'caf\\xe9 \\U0001f600\n', done.stderr


def test_consoles_that_are_closed():
  """As daemons and cron have them."""
  done = subprocess.run(f'{sys.executable} -c "from experiments.tools import command; '
                        'command.run(lambda argv: print(1))" >&- 2>&-', shell=True, cwd=parts.ROOT)
  assert done.returncode == 0


def test_a_console_that_is_gone():
  """`command | head`: the work goes on to its end."""
  done = python('import os, sys\nr, w = os.pipe()\nos.dup2(w, 1)\nos.close(r)\n'
                'from loopformer.training.processes import say\nfor _ in range(3): say("x" * 100000)\n'
                'print("done", file=sys.stderr)', JAX_PLATFORMS='cpu')
  assert done.returncode == 0 and done.stderr.rstrip().endswith(b'done') and b'Broken' not in done.stderr


# Names of configurations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['loopformer:tiny', 'loopformer.py:tiny', 'experiments/configs/loopformer.py:tiny',
                                  'experiments/configs/loopformer:tiny', 'loopformer'])
def test_configurations_of_the_library_from_any_folder(name, home):
  assert configs.load(name) == configs.load(f'{parts.ROOT}/experiments/configs/loopformer.py:tiny')


def test_a_file_of_the_same_name_is_meant_first(home):
  Path('loopformer.py').write_text('from experiments.configs.ouro import get_config\n')
  assert configs.load('loopformer.py:tiny').name == 'ouro' and configs.load('loopformer:tiny').name == 'loopformer'


@pytest.mark.parametrize('name, message', [
    ('loopfromer:tiny', r'--config=loopfromer: no such file.*did you mean --config=loopformer\? --mode=configs'),
    ('runs/loopfromer.py', 'did you mean --config=loopformer'), ('zzz', 'no such file.*--mode=configs lists'),
    ('loopformer:tyni', "size = 'tyni': did you mean 'tiny'"),
    ('loopformer:tiny,lops=3', "no 'lops' here; did you mean 'loops'"), ('.', 'no such file'),
    ('experiments', 'no such file'),
])
def test_names_that_are_nearly_right(name, message, home):
  with pytest.raises(ConfigError, match=message):
    configs.load(name)


BROKEN = {
    'def get_config(:\n': 'line 1 is not Python', 'x = 1\n': 'defines no get_config',
    'def get_config():\n  return 3\n': 'returns builtins.int; let it return an Experiment',
    'x = "\udce9"\n': 'is not Python',
}


@pytest.mark.parametrize('source', BROKEN)
def test_files_that_are_no_configuration(source, home):
  Path('c.py').write_bytes(source.encode('utf-8', 'surrogateescape'))
  with pytest.raises(ConfigError, match=f'c.py: .*{BROKEN[source]}'):
    configs.load('c.py')
  Path('d.py').write_text('def get_config():\n  pass\n')
  with pytest.raises(ConfigError, match='takes no argument; leave out :tiny'):
    configs.load('d.py:tiny')


def test_the_list_of_configurations(home):
  status, out, _ = run_here(None, '--mode=configs')
  assert status == 0
  for name, file in configs.published().items():
    about = ast.get_docstring(ast.parse(file.read_text())).partition('\n\n')[0]
    assert f'{name} ' in out and ' '.join(about.split()) in ' '.join(out.split())  # to its end, over lines
  assert max(map(len, out.splitlines())) <= 143
  status, out, _ = run_here(None, '--mode=configs', '--config=mor:tiny')
  assert status == 0 and 'Mixture-of-Recursions' in out and 'Argument: size' in out
  status, out, err = run_here(None, '--mode=configs', '--config=more')
  assert status == 1 and not out and '--config=more' in err


# A corpus from another folder, or gone -------------------------------------------------------------------------------


def corpus_config():
  """Of texts that are named from the current folder."""
  Path('texts [1]').mkdir(exist_ok=True)
  for i in range(4):
    (Path('texts [1]') / f'{i}.txt').write_text(TEXT * (i + 1))
  Path('pieces.model').write_bytes(TrainedPieces(vocab=280).build([TEXT]).model)
  task = Text(corpus=Files(train=('texts [1]/*.txt',)), tokenizer=GivenPieces(path='pieces.model'), length=16)
  return dataclasses.replace(test_config.TINY, task=task)


def test_a_run_is_found_from_another_folder(home, tmp_path, monkeypatch):
  """Prepared here, it is reused from elsewhere: with the corpus, without it, and by its names of before."""
  here, config = Path.cwd(), corpus_config()
  whole, said = configs.absolute(config), []
  assert whole.task.corpus.root == str(here) and repr(whole.task.corpus) == repr(config.task.corpus)
  whole.task.prepare(here / 'run', said.append)
  configs.save(whole, here / 'run')
  names = [document.name for document in config.task.corpus.documents()]
  monkeypatch.chdir(tmp_path)
  assert [document.name for document in whole.task.corpus.documents()] == names and names[0] == 'texts [1]/0.txt'
  read = configs.read(here / 'run')
  read.task.prepare(here / 'run', said.append)
  assert 'reused from' in said[-1]
  with pytest.raises(FileNotFoundError,
                     match=rf"no file matches 'texts \[1\]/\*\.txt' in {tmp_path}; correct the glob"):
    config.task.corpus.sources()
  shutil.rmtree(here / 'texts [1]')
  (here / 'pieces.model').unlink()
  read.task.prepare(here / 'run', said.append)
  assert (read.task.tokenizer.root, repr(read.task.tokenizer)) == (str(here), "GivenPieces(path='pieces.model')")
  assert any('what was prepared from it is used as it is' in line for line in said)
  with pytest.raises(FileNotFoundError):  # is asked for the sources
    read.task.verify(here / 'run', said.append)
  assert not list(configs.difference(read, whole))


def test_a_folder_of_before_paths_were_whole(home, tmp_path, monkeypatch):
  """Its data were prepared under the names of its config.json, which stay."""
  here, config = Path.cwd(), corpus_config()
  config.task.prepare(here / 'run', lambda line: None)
  configs.save(config, here / 'run')
  again = resume.with_its_paths(configs.absolute(config), here / 'run')
  assert again.task == config.task
  again.task.prepare(here / 'run', lambda line: None)
  resume.check(configs.absolute(config), here / 'run')


def test_a_start_that_was_corrected_before_anything_was_saved_is_the_one_that_is_taken(home):
  def started(folder):
    return dataclasses.replace(test_config.TINY, train=dataclasses.replace(test_config.TINY.train, start=folder))

  configs.save(configs.absolute(started('mistaken')), 'run')
  config = configs.absolute(started('meant'))
  resume.check(config, 'run')
  assert resume.with_its_paths(config, 'run') == config
  assert resume.with_its_paths(started('mistaken'), 'run') == configs.absolute(started('mistaken'))


def test_globs_that_name_their_folder_need_no_other(home):
  (home / 'x.txt').write_text(TEXT)
  for glob in ('~/x.txt', str(home / '*.txt')):
    corpus = configs.absolute(dataclasses.replace(test_config.TINY, task=Text(corpus=Files(train=(glob,))))).task.corpus
    assert corpus.root == '' and [file.name for file in corpus.sources()] == [str(home / 'x.txt')]
