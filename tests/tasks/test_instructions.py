"""Tasks of chats, and mixtures of tasks: which ids are asked for, how rows are filled, and in what order they come."""
import dataclasses
from fractions import Fraction
import json

import numpy as np
import pytest

from loopformer import config as configs
from loopformer.data import batches as data
from loopformer.data.batches import Separate
from loopformer.data.chat import ChatTokenizer, SavedTokenizer
from loopformer.data.corpus import Conversations, Files
from loopformer.data.tokenizer import Bytes, JsonTokenizer
from loopformer.tasks import mixture
from loopformer.tasks.instructions import Instructions
from loopformer.tasks.mixture import Mixture
from loopformer.tasks.text import Text
from loopformer.types import ConfigError
from tests import chats
from tests.chats import CHATML, PLAIN, REFUSES, TALK

pytest.importorskip('jinja2')
pytest.importorskip('tokenizers')
LENGTH = 64
ROWS = [{'prompt': f'{i}', 'answer': 'x' * (i % 19 + 1)} for i in range(40)]


def quiet(text):
  pass


def written(folder, rows, name='chats.jsonl'):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text('\n'.join(row if isinstance(row, str) else json.dumps(row) for row in rows))
  return str(folder / name)


def chat_tokenizer(folder, template=CHATML):
  ChatTokenizer(of=JsonTokenizer(text=chats.text(), eos=256), template=template).save(folder / 'tokenizer')
  return SavedTokenizer(path=str(folder))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A folder with a tokenizer, chats and a text."""
  folder = tmp_path_factory.mktemp('source')
  chat_tokenizer(folder)
  written(folder,
          [*ROWS, {'messages': TALK}, {'prompt': 'y' * 30, 'answer': 'z' * 90}, {'prompt': 'w' * 90, 'answer': 'v'}])
  written(folder, ['{"prompt": "held", "answer": "out"}', '', '{"prompt": "0", "answer": "x"}'], 'held.jsonl')
  for i in range(8):
    (folder / f'{i}.txt').write_text(f'text {i} ' * 40)
  return folder


def task_of(folder, **fields):
  corpus = Conversations(train=(str(folder / 'chats.jsonl'),), validation_files=(str(folder / 'held.jsonl'),))
  return Instructions(corpus=corpus, tokenizer=SavedTokenizer(path=str(folder)), length=LENGTH, **fields)


@pytest.fixture(scope='module')
def prepared(source, tmp_path_factory):
  """(task, work folder, what was said)."""
  workdir, said = tmp_path_factory.mktemp('run'), []
  task_of(source).prepare(workdir, said.append)
  return task_of(source), workdir, said


def test_rows_hold_whole_conversations_whose_answers_alone_are_asked_for(prepared):
  """Every one once, each in a segment of its own; but for one that is cut and one whose answer does not begin in time.
  """
  task, workdir, said = prepared
  rows, found, tokenizer = task.rows(workdir, 'train'), [], task.tokenizer_of(workdir)
  for i in range(len(rows)):
    row = rows[i]
    for segment in range(1, row['segments'].max() + 1):
      own = row['segments'] == segment
      tokens, targets = row['tokens'][own], row['targets'][own]
      assert row['positions'][own].tolist() == list(range(own.sum())) and tokens[1:].tolist() == targets[:-1].tolist()
      found.append(tuple(zip([*tokens, targets[-1]], [False, *(row['weights'][own] > 0)])))
    assert not row['weights'][row['segments'] == 0].any()
  given = [[{'role': 'user', 'content': row['prompt']}, {'role': 'assistant', 'content': row['answer']}]
           for row in [*ROWS[1:], {'prompt': 'y' * 30, 'answer': 'z' * 90}]] + [TALK]  # the first stands in validation
  whole = [tuple(zip(*tokenizer.conversation(messages)))[:LENGTH + 1] for messages in given]
  assert sorted(found) == sorted(whole)
  assert any('conversations in' in line and '1 were cut, 1 left out' in line for line in said)
  assert any('1 empty rows' in line and '1 train documents that stand in validation' in line for line in said)
  assert tokenizer.ends == (256, 258)


def test_a_row_ends_where_the_next_conversation_does_not_fit(prepared):
  task, workdir, _ = prepared
  rows = task.rows(workdir, 'train')
  sizes = [int((rows[i]['segments'] > 0).sum()) for i in range(len(rows))]
  counts, firsts = (rows.documents[:, 1] - 1).tolist(), rows._firsts
  assert sum(sizes) == sum(counts) and rows.filled == sum(sizes) / (LENGTH * len(rows))
  assert all(size + counts[first] > LENGTH for size, first in zip(sizes, firsts[1:-1]))
  with pytest.raises(IndexError, match=f'row {len(rows)} of {len(rows)}'):
    rows[len(rows)]


def test_the_order_depends_on_the_seed_and_not_on_the_readers(prepared):
  task, workdir, _ = prepared
  first, again, other = (task.examples(workdir, 'train', seed) for seed in (0, 0, 1))
  count = len(task.rows(workdir, 'train'))
  tokens = [[dataset[i]['tokens'].tobytes() for i in range(2 * count)] for dataset in (first, again, other)]
  assert tokens[0] == tokens[1] != tokens[2] and tokens[0][:count] != tokens[0][count:]
  assert sorted(tokens[0][:count]) == sorted(tokens[0][count:]) == sorted(tokens[2][:count])
  one = iter(data.batches(first, batch=4))
  two = [iter(data.batches(first, batch=4, process=p, processes=2)) for p in range(2)]
  for _ in range(3):
    whole, parts = next(one), [next(reader) for reader in two]
    np.testing.assert_array_equal(whole['tokens'], np.stack([part['tokens'] for part in parts], 1).reshape(4, -1))


def test_data_are_prepared_once_and_verified(prepared, source, tmp_path):
  task, workdir, _ = prepared
  said = []
  task.prepare(workdir, said.append)
  assert any('reused from' in line for line in said)
  task.verify(workdir, quiet)
  dataclasses.replace(task, length=2 * LENGTH).prepare(workdir, quiet)  # conversations are stored whole
  (tmp_path / 'plain.jinja').write_text(PLAIN)
  for changed in (dataclasses.replace(task, template=str(tmp_path / 'plain.jinja')),
                  dataclasses.replace(task, tokenizer=chat_tokenizer(tmp_path, PLAIN))):
    with pytest.raises(ValueError, match='was prepared from something else'):
      changed.prepare(workdir, quiet)
  moved = dataclasses.replace(task, tokenizer=chat_tokenizer(tmp_path / 'moved'))
  moved.prepare(workdir, quiet)


@pytest.mark.parametrize('row, message', [
    ({'messages': TALK[:1]}, r'bad\.jsonl row 2: its messages have no answer'),
    ({'prompt': 'x'}, r'bad\.jsonl row 2: its messages have no answer'),
    ({'prompt': 'x', 'answer': ''}, r'bad\.jsonl row 2: its messages have no answer'),
    ({'prompt': 'x', 'answer': 3}, r'bad\.jsonl row 2: the content of message 2 is int'),
    ({'text': 'x'}, r'bad\.jsonl row 2 has neither messages nor prompt; it has text'),
    ({'messages': 'x'}, r'bad\.jsonl row 2: give a list of objects'),
    ({'messages': [{'content': 'x'}]}, r'bad\.jsonl row 2: message 1 has no role'),
    ('{"prompt"', r'bad\.jsonl row 2 is damaged: it is not JSON'),
    ('[]', r'bad\.jsonl row 2 is damaged: it holds list')])
def test_a_row_that_cannot_be_learned_from_is_named(row, message, source, tmp_path):
  path = written(tmp_path, [ROWS[0], row, ROWS[1]], 'bad.jsonl')
  task = dataclasses.replace(task_of(source), corpus=Conversations(train=(path,), validation=0.3))
  with pytest.raises((ConfigError, ValueError), match=message) as caught:
    task.prepare(tmp_path / 'run', quiet)
  assert '\n' not in str(caught.value)


def test_what_else_cannot_be_learned_from(source, tmp_path):
  task = task_of(source)
  with pytest.raises(ConfigError, match='task.length = 5: no conversation of the train split'):
    dataclasses.replace(task, length=5).prepare(tmp_path / 'short', quiet)
  with pytest.raises(ConfigError, match=r'0\.txt is no \.jsonl file'):
    corpus = Conversations(train=(str(source / '0.txt'),))
    dataclasses.replace(task, corpus=corpus).prepare(tmp_path / 'text', quiet)
  with pytest.raises(FileNotFoundError, match="SavedTokenizer.path='.*none': no tokenizer there"):
    dataclasses.replace(task, tokenizer=SavedTokenizer(path=str(tmp_path / 'none'))).prepare(tmp_path / 'no', quiet)
  Bytes().build(()).save(tmp_path / 'bytes/tokenizer')
  with pytest.raises(ConfigError, match='task.template = None, and the tokenizer has no chat template of its own'):
    dataclasses.replace(task, tokenizer=SavedTokenizer(path=str(tmp_path / 'bytes'))).prepare(tmp_path / 'b', quiet)
  with pytest.raises(FileNotFoundError, match=r"task.template = '.*gone\.jinja': no such file"):
    dataclasses.replace(task, template=str(tmp_path / 'gone.jinja')).prepare(tmp_path / 't', quiet)
  strict = "{% if messages | length > 2 %}" + REFUSES + "{% endif %}" + CHATML
  (tmp_path / 'strict.jinja').write_text(strict)
  with pytest.raises(ConfigError, match=r'chats\.jsonl row 41: the chat template fails on these messages') as caught:
    dataclasses.replace(task, template=str(tmp_path / 'strict.jinja')).prepare(tmp_path / 's', quiet)
  assert '\n' not in str(caught.value)


def test_it_is_a_part_that_is_saved_and_read(source, tmp_path):
  config = configs.load('loopformer:tiny')
  config = dataclasses.replace(config, task=task_of(source))
  configs.check(config)
  configs.save(config, tmp_path)
  assert configs.read(tmp_path).task == config.task
  assert dict(configs.paths(config))['task.tokenizer.path'] == str(source)


def test_the_tokenizer_of_a_run_is_found_wherever_its_data_lie(source, tmp_path):
  """Runs that share their data, as studies' do, and runs of several tasks."""
  config, text = configs.load('loopformer:tiny'), mixed_of(source).of['text']
  own = SavedTokenizer(path=str(source)).build()
  for name, task in {'shared': dataclasses.replace(text, folder=str(tmp_path / 'data')),
                     'several': mixed_of(source)}.items():
    configs.save(dataclasses.replace(config, task=task), tmp_path / name)
    task.prepare(tmp_path / name, quiet)
    found = SavedTokenizer(path=str(tmp_path / name)).build()
    assert found.encode('text 1') == own.encode('text 1')
  configs.save(dataclasses.replace(config, task=dataclasses.replace(text, folder=None)), tmp_path / 'unprepared')
  with pytest.raises(FileNotFoundError):
    SavedTokenizer(path=str(tmp_path / 'unprepared')).build()


# Mixtures ------------------------------------------------------------------------------------------------------------


def mixed_of(source, **fields):
  text = Text(corpus=Files(train=(str(source / '*.txt'),), validation=0.3), tokenizer=SavedTokenizer(path=str(source)),
              length=LENGTH, documents=Separate())
  return Mixture(**{'of': {'chats': task_of(source), 'text': text}, 'weights': {'chats': 3, 'text': 1.5}, **fields})


@pytest.mark.parametrize('weights', [(1,), (1, 1), (3, 1.5), (0.7, 0.2, 0.1), (0.1, 0.2, 0.3, 1e-3), (np.pi, np.e, 1)])
def test_shares_are_exact_and_every_example_comes_once(weights):
  shares = [Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
  seen = np.zeros(len(weights), int)
  for i in range(3000):
    task, own = mixture.place(shares, i)
    assert own == seen[task]
    seen[task] += 1
    assert all(abs(n - (i + 1) * share) < max(len(shares), 2) / 2 + 0.5 for n, share in zip(seen, shares))
  far = 10 ** 12
  assert [mixture.place(shares, far)] == [mixture.place(shares, far)] and sum(mixture.place(shares, far)) <= far


def test_examples_last_as_long_as_those_of_every_task():
  for shares, counts in (((0.5, 0.5), (4, 9)), ((0.75, 0.25), (10, 1)), ((0.2, 0.3, 0.5), (7, 7, 7)), ((1.0,), (5,))):
    shares = [Fraction(share) / sum(map(Fraction, shares)) for share in shares]
    count = mixture.lasting(shares, counts)
    places = [mixture.place(shares, i) for i in range(count + 1)]
    assert all(own < counts[task] for task, own in places[:-1]) and places[-1][1] == counts[places[-1][0]]


def test_a_mixture_has_the_examples_of_its_tasks_in_their_order(source, tmp_path):
  task = mixed_of(source)
  tokenizer = task.prepare(tmp_path, quiet)
  assert tokenizer.ends == (256, 258) and task.splits == dict.fromkeys(
      ('validation', 'chats-validation', 'text-validation'), LENGTH)
  task.verify(tmp_path, quiet)
  own = {name: part.examples(tmp_path / 'mixture' / name, 'train', 3) for name, part in task.of.items()}
  examples, seen = task.examples(tmp_path, 'train', 3), dict.fromkeys(own, 0)
  for i in range(60):
    name = list(own)[mixture.place(task.shares(), i)[0]]
    for field, value in own[name][seen[name]].items():
      np.testing.assert_array_equal(examples[i][field], value)
    assert examples[i].keys() == examples[0].keys()
    seen[name] += 1
  assert seen == {'chats': 40, 'text': 20}
  one, two = iter(data.batches(examples, batch=6)), iter(data.batches(examples, batch=6, process=1, processes=3))
  for _ in range(2):
    np.testing.assert_array_equal(next(one)['tokens'][1::3], next(two)['tokens'])
  state, expected = two.get_state(), next(two)
  again = iter(data.batches(task.examples(tmp_path, 'train', 3), batch=6, process=1, processes=3))
  again.set_state(state)
  np.testing.assert_array_equal(next(again)['tokens'], expected['tokens'])
  held = task.examples(tmp_path, 'validation', 0)
  assert len(held) == mixture.lasting(task.shares(), [len(part.examples(tmp_path / 'mixture' / name, 'validation', 0))
                                                      for name, part in task.of.items()])
  np.testing.assert_array_equal(task.examples(tmp_path, 'text-validation', 0)[0]['tokens'],
                                task.of['text'].examples(tmp_path / 'mixture/text', 'validation', 0)[0]['tokens'])


def test_documents_that_are_joined_are_one_segment(source, tmp_path):
  task = mixed_of(source)
  text = dataclasses.replace(task.of['text'], documents=type(task.of['text']).documents)
  task = dataclasses.replace(task, of={**task.of, 'text': text})
  task.prepare(tmp_path, quiet)
  examples = task.examples(tmp_path, 'train', 0)
  index = next(i for i in range(9) if mixture.place(task.shares(), i)[0] == 1)
  assert examples[index]['segments'].tolist() == [1] * LENGTH


@pytest.mark.parametrize('weights, message', [
    ({'chats': 'x', 'text': 1}, r"task\.weights\.chats = 'x': must be a finite number, above 0"),
    ({'chats': 0, 'text': 1}, r'task\.weights\.chats = 0'), ({'chats': float('nan'), 'text': 1}, r'chats = nan'),
    ({'chats': float('inf'), 'text': 1}, r'chats = inf'), ({'chats': True, 'text': 1}, r'chats = True'),
    ({'chats': 1}, r'task\.weights are of chats, task\.of has chats, text'), ({}, 'task.weights are of nothing')])
def test_weights_that_are_none(weights, message, source):
  with pytest.raises(ConfigError, match=message):
    mixed_of(source, weights=weights)


def test_names_of_tasks_may_begin_alike_and_weights_be_of_other_libraries(source, tmp_path):
  tasks = mixed_of(source).of
  task = Mixture(of={'chats': tasks['chats'], 'chats-validation': tasks['text']},
                 weights={'chats': np.float32(1), 'chats-validation': np.int64(1)})
  task.prepare(tmp_path, quiet)
  other = tasks['text'].examples(tmp_path / 'mixture/chats-validation', 'validation', 0)
  np.testing.assert_array_equal(task.examples(tmp_path, 'chats-validation-validation', 0)[0]['tokens'],
                                other[0]['tokens'])
  assert task.shares() == (Fraction(1, 2), Fraction(1, 2))
  for name in ('', '../x', 'a/b', '.'):
    with pytest.raises(ConfigError, match='is no name of a task'):
      Mixture(of={name: tasks['chats']}, weights={name: 1})


def test_tasks_that_do_not_mix(source, tmp_path):
  task = mixed_of(source)
  with pytest.raises(ConfigError, match='chats have 64 tokens, text have 32 tokens; give them one length'):
    dataclasses.replace(task, of={**task.of, 'text': dataclasses.replace(task.of['text'], length=32)})
  other = dataclasses.replace(task.of['text'], tokenizer=Bytes())
  with pytest.raises(ConfigError, match='text has another tokenizer than chats'):
    dataclasses.replace(task, of={**task.of, 'text': other}).prepare(tmp_path, quiet)


def test_a_mixture_is_a_part_that_is_saved_and_read(source, tmp_path):
  config = dataclasses.replace(configs.load('loopformer:tiny'), task=mixed_of(source))
  configs.check(config)
  configs.save(config, tmp_path)
  assert configs.read(tmp_path).task == config.task
  assert configs.override(config, 'task.weights.text=0.25').task.weights['text'] == 0.25
