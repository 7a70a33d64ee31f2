"""Problems solved in rounds: the papers' examples token for token, solutions against other ways to them, examples made
of both kinds, and files of problems."""
import dataclasses
import itertools
import json
import operator
import re

import numpy as np
import pytest

from loopformer.tasks.arithmetic import Arithmetic, LeftToRight, modular, reduced
from loopformer.tasks.connectivity import Connectivity
from loopformer.tasks.edit_distance import EditRows
from loopformer.tasks.fillers import Filled, Power
from loopformer.tasks.generated import Generated, Grow, Rise, SymbolTokenizer
from loopformer.tasks.increasing import Increasing, ending
from loopformer.tasks.pointers import Pointers
from loopformer.tasks.reasoning import Asked, Chain, Even, Proportional, Rounds, Several, Slots
from loopformer.tasks.recorded import Recorded, record, recorded
from loopformer.tasks.shortened import Internalised, Selected
from loopformer.tasks.words import Cyclic, Prefixes, Word
from loopformer.types import ConfigError
from tests.tasks.test_tasks_symbolic import table

SOURCES = {
    'arithmetic': Arithmetic(longest=6), 'arithmetic mod 3': Arithmetic(longest=4, modulus=3, room=5, limit=7),
    'sums': Arithmetic(longest=5, operators='+-'), 'left to right': LeftToRight(longest=4),
    'left to right, all': LeftToRight(longest=4, operators='+-*/', sizes=Even()),
    'edit distance': EditRows(longest=7, using=2), 'increasing': Increasing(longest=23),
    'increasing in fours': Increasing(longest=9, group=4, spread=6)}
SEVERAL = Several(of={'ARI': Arithmetic(longest=4), 'ED': EditRows(longest=5), 'LIS': Increasing(longest=12)},
                  weights={'ED': 10.0})
ONE = LeftToRight(longest=4)
every = pytest.mark.parametrize('name', SOURCES)
all_of = pytest.mark.parametrize('of', [*SOURCES.values(), SEVERAL], ids=[*SOURCES, 'several'])


def rng(*seed):
  return np.random.default_rng(seed)


def problems(of, count=60):
  return [of.problem(rng(0, i)) for i in range(count)]


# The papers' examples ------------------------------------------------------------------------------------------------


def test_arithmetic_token_for_token():
  problem = Arithmetic(longest=3).solved('3 * 2 + 6 / 3'.split())
  assert [''.join(each) for each in (problem.prompt, *problem.rounds)] == ['3*2+6/3=', '6+6/3=', '6+2=', '8']
  assert problem.answer == '8' and problem.size == 3


def test_the_leftmost_operation_that_precedence_allows():
  """The paper's longer example, in whole numbers."""
  plain = {'+': operator.add, '-': operator.sub, '*': operator.mul, '/': operator.floordiv}
  words, seen = '( 6 + 9 ) / ( 7 + 2 * 5 - 4 * 3 )'.split(), []
  while len(words) > 1:
    words = reduced(words, lambda a, op, b: plain[op](a, b))
    seen.append(''.join(words))
  assert seen == ['15/(7+2*5-4*3)', '15/(7+10-4*3)', '15/(17-4*3)', '15/(17-12)', '15/5', '3']
  with pytest.raises(ValueError, match='no operation'):
    reduced(['(', '3'], modular)


def test_edit_distance_token_for_token():
  problem = EditRows(longest=4).solved('otml', 'ottml', 4)
  assert ' '.join(problem.prompt) == 'o t m l | o t t m l <sep>'
  assert [' '.join(each) for each in problem.rounds] == ['0 2 4 6 7 ,', '2 0 2 4 6 ,', '4 2 3 2 4 ,', '6 4 5 4 2 ,']
  assert problem.answer == '2'


def test_increasing_token_for_token():
  problem = Increasing(longest=14).solved([20, 21, 22, 23, 24, 10, 12, 21, 22, 23, 25, 26, 27, 28])
  assert [' '.join(each) for each in problem.rounds] == ['1 2 3 4 5 1 2 3 4 5 <sep>', '6 7 8 9 9 9 9 9 9 9 <sep>']
  assert problem.answer == '9' and problem.prompt[-1] == '<sep>' and len(problem.prompt) == 15


# Solutions, found another way ----------------------------------------------------------------------------------------


class Number:
  """Of a field; Python reads the expression."""

  def __init__(self, value, modulus):
    self.value, self.modulus = value % modulus, modulus

  def _with(self, other, operate):
    return Number(operate(self.value, other.value), self.modulus)

  def __add__(self, other):
    return self._with(other, operator.add)

  def __sub__(self, other):
    return self._with(other, operator.sub)

  def __mul__(self, other):
    return self._with(other, operator.mul)

  def __truediv__(self, other):
    # one: b is not zero
    found, = [x for x in range(self.modulus) if (x * other.value - self.value) % self.modulus == 0]
    return Number(found, self.modulus)


def value(words, modulus, flat):
  words = [f'Number({word}, {modulus})' if word.isdigit() else word for word in words if word != '=']
  if flat:  # brackets from the left
    words = ['('] * (len(words) // 2) + [word + ')' * (place % 2 == 0 and place > 0)
                                         for place, word in enumerate(words)]
  return eval(''.join(words), {'Number': Number}).value


@pytest.mark.parametrize('name', [name for name, of in SOURCES.items() if isinstance(of, Arithmetic | LeftToRight)])
def test_every_round_has_the_value_of_the_expression_and_an_operator_less(name):
  of = SOURCES[name]
  flat = isinstance(of, LeftToRight)
  for problem in problems(of, 200):
    found = [value(words, of.modulus, flat) for words in (problem.prompt, *problem.rounds)]
    assert set(found) == {int(problem.answer)}
    counts = [sum(word in '+-*/' for word in words) for words in (problem.prompt, *problem.rounds)]
    assert counts == list(range(problem.size, -1, -1)) and len(problem.rounds) == problem.size
    assert all(words[-1] == '=' for words in (problem.prompt, *problem.rounds[:-1])) and len(problem.rounds[-1]) == 1
    assert set(counts[:1]) <= set(range(1, of.longest + 1))
    assert set(problem.prompt) & set('+-*/') <= set(of.operators)


def test_all_of_arithmetic_is_drawn_and_brackets_stand_where_they_are_needed_alone():
  drawn = problems(SOURCES['arithmetic'], 300)
  assert {word for p in drawn for word in p.prompt} == set(SOURCES['arithmetic'].symbols)
  bare = [''.join(word for word in p.prompt if word not in '()') for p in drawn]
  changed = [value(list(_words(text)), 11, False) != int(p.answer) if _divides(text) else None
             for text, p in zip(bare, drawn) if '(' in p.prompt]
  assert sum(c is True for c in changed) > 0.3 * len(changed)  # without them the value is another one


def _words(text):
  number = ''
  for letter in text:
    if letter.isdigit():
      number += letter
      continue
    yield number
    yield letter
    number = ''
  if number:
    yield number


def _divides(text):
  try:
    value(list(_words(text)), 11, False)
  except ValueError:
    return False
  return True


def test_edit_rows_are_those_of_the_table():
  for problem in problems(SOURCES['edit distance'], 40):
    first, second = ''.join(problem.prompt[:-1]).split('|')
    assert len(first) <= len(second) and first != second
    rows = table(first, second)
    assert [list(map(int, each[:-1])) for each in problem.rounds] == [row[1:] for row in rows[1:]]
    assert all(each[-1] == ',' for each in problem.rounds) and len(problem.rounds) == len(first)
    assert problem.answer == str(rows[-1][-1])


def test_counts_are_of_the_longest_subsequence_by_trying_all():
  for seed in range(30):
    numbers = rng(seed).integers(5, 14, size=8).tolist()
    best = [max(len(places) for count in range(1, 9) for places in itertools.combinations(range(end + 1), count)
                if places[-1] == end and all(numbers[a] < numbers[b] for a, b in zip(places, places[1:])))
            for end in range(8)]
    assert ending(numbers) == best


@pytest.mark.parametrize('name', ['increasing', 'increasing in fours'])
def test_rounds_of_counts(name):
  of = SOURCES[name]
  for problem in problems(of):
    numbers, counts = list(map(int, problem.prompt[:-1])), ending(list(map(int, problem.prompt[:-1])))
    assert len(numbers) == problem.size and min(numbers) > of.limit and max(numbers) <= of.limit + of.spread
    assert len(problem.rounds) == -(-len(numbers) // of.group)
    assert all(len(each) == of.group + 1 and each[-1] == '<sep>' for each in problem.rounds)
    told = [int(word) for each in problem.rounds for word in each[:-1]]
    assert told[:len(counts)] == counts and set(told[len(counts):]) <= {counts[-1]}
    assert problem.answer == str(max(counts))


# All sources ---------------------------------------------------------------------------------------------------------


@all_of
def test_problems_keep_to_their_extent_and_symbols_and_lead_to_their_answers(of):
  most, symbols = of.extent, set(of.symbols)
  assert len(of.symbols) == len(symbols)
  for problem in problems(of):
    assert len(problem.prompt) <= most.prompt and len(problem.rounds) <= most.rounds
    assert max(map(len, problem.rounds)) <= most.round and sum(map(len, problem.rounds)) <= most.chain
    assert {*problem.prompt, problem.answer, *(word for each in problem.rounds for word in each)} <= symbols
    assert of.concluded(problem.rounds, problem.task) == problem.answer
    inner = of.tasks[problem.task]
    assert inner.shortest <= problem.size <= inner.longest
  assert of.concluded((), problem.task) is None and of.concluded(((),), problem.task) is None


@every
def test_sizes_and_room(name):
  of = SOURCES[name]
  assert {of.draw(rng(i), of.longest).size for i in range(5)} == {of.longest}
  for size in (of.least - 1, of.limit + 1, 2.5):
    with pytest.raises(ConfigError, match=f'size = {size}: {type(of).__name__} has no problem of it'):
      of.draw(rng(0), size)
  with pytest.raises(ConfigError, match="task = 'ED'"):
    of.draw(rng(0), of.longest, 'ED')
  wider = dataclasses.replace(of, room=of.room + 2, limit=of.limit + 2)
  assert wider.extent != of.extent and dataclasses.replace(of, limit=of.limit + 2).extent == of.extent
  for change in (dict(shortest=of.least - 1), dict(longest=of.shortest - 1), dict(room=of.longest - 1),
                 dict(limit=of.room - 1)):
    with pytest.raises(ConfigError, match=f'{type(of).__name__}.{next(iter(change))} = '):
      dataclasses.replace(of, **change)


def test_sizes_are_drawn_by_their_law():
  for law, shares in ((Even(), [1 / 3] * 3), (Proportional(), [2 / 9, 3 / 9, 4 / 9])):
    drawn = [law.pick(rng(i), 2, 4) for i in range(3000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=5)[2:] / 3000, shares, atol=0.03)


@pytest.mark.parametrize('make, message', [
    (lambda: Arithmetic(longest=2, modulus=9), 'modulus = 9: division needs a prime'),
    (lambda: Arithmetic(longest=2, modulus=1), 'modulus = 1'),
    (lambda: LeftToRight(longest=2, operators='+^'), r"operators = '\+\^'"),
    (lambda: LeftToRight(longest=2, operators=''), "operators = ''"),
    *((lambda of=of, text=text: of(longest=2).solved(text.split()),
       f'expression = {re.escape(repr(text))}: {why}.*; give one of')
      for of in (Arithmetic, LeftToRight)
      for text, why in (('', 'it is empty'), ('3 +', '.*no operation'), ('1 / 0', '1 / 0 divides by zero'),
                        ('12 + 1', 'numbers are 0 to'), ('+', '. is no number'), ('1 2 3', '.*no operation'))),
    (lambda: Arithmetic(longest=2).solved('3 / ( 2 - 2 )'.split()), '3 / 0 divides by zero'),
    *((lambda text=text: Arithmetic(longest=2).solved(text.split()), f'{re.escape(left)}: no operation')
      for text, left in (('( 1 + 2', '( 3'), ('1 + 2 )', '3 )'), ('4 ( 1 + 2 )', '4 3'), ('( )', '( )'))),
    (lambda: Increasing(longest=5).solved([]), 'numbers = .*: they are empty'),
    *((lambda pair=pair: EditRows(longest=5).solved(*pair, 5), f"first = '{pair[0]}', second = '{pair[1]}'")
      for pair in (('', ''), ('', 'ab'), ('abc', 'ab'), ('AB', 'ab'), ('a|', 'abc'))),
    (lambda: EditRows(longest=5, using=2.5), 'using = 2.5'),
    *((lambda change=change: dataclasses.replace(Chain(of=ONE), length=change), f'Chain.length = {change}')
      for change in (0, -1, 9.5)),
    *((lambda change=change: Asked(of=ONE, length=change), f'Asked.length = {change}') for change in (0, 9.5)),
    (lambda: Several(of={'A B': ONE}), "names 'A B': a name is a symbol"), (lambda: Several(of={'': ONE}), "names ''"),
    (lambda: Several(of={'X': SEVERAL}), r"Several.of\['X'\] = Several: .* ARI, ED, LIS; name them all"),
    (lambda: Several(of={'X': Selected(of=SEVERAL, rounds=1)}), r"Several.of\['X'\] = Selected"),
    (lambda: EditRows(longest=5, using=99), 'using = 99'),
    (lambda: Increasing(longest=5, group=0), 'group = 0'), (lambda: Increasing(longest=5, spread=0), 'spread = 0'),
    (lambda: Several(of={}), 'Several.of is empty'),
    (lambda: Several(of={'A': LeftToRight(longest=2)}, weights={'B': 1.0}), "names 'B'"),
    (lambda: Several(of={'A': LeftToRight(longest=2)}, weights={'A': -1.0}), 'must be'),
])
def test_sources_that_cannot_be(make, message):
  with pytest.raises(ConfigError, match=message):
    make()


def test_several_sources_are_told_apart():
  drawn = problems(SEVERAL, 300)
  assert {p.prompt[0] for p in drawn} == {'[ARI]', '[ED]', '[LIS]'} and all(p.prompt[0] == f'[{p.task}]' for p in drawn)
  assert (np.unique([p.task for p in drawn], return_counts=True)[1] > 70).all()
  assert SEVERAL.draw(rng(0), 5, 'ED').prompt == ('[ED]', *EditRows(longest=5).draw(rng(0), 5).prompt)
  with pytest.raises(ConfigError, match="task = 'XX': no such source.*ARI, ED, LIS"):
    SEVERAL.draw(rng(0), 5, 'XX')
  tokenizer = Generated(of=Chain(of=SEVERAL), held_out=8).tokenizer_of('')
  with pytest.raises(ConfigError, match=r"'\[XX\]' is not a symbol"):
    tokenizer.encode('[XX] 3 + 4 =')


# Examples ------------------------------------------------------------------------------------------------------------


@all_of
def test_chains_give_the_problem_and_ask_for_the_rest(of):
  form = Chain(of=of)
  for problem in problems(of):
    made, trace = form.example(problem), [word for each in problem.rounds for word in each]
    given = len(problem.prompt)
    asked = np.flatnonzero(made['weights'])
    assert [form.symbols[i] for i in made['targets'][asked]] == [*trace, problem.answer, '<end>']
    assert [form.symbols[i] for i in made['tokens'][:given]] == list(problem.prompt)
    assert asked[0] == given - 1 and len(asked) == len(trace) + 2  # no part of the problem is asked for
    assert set(made['weights'][asked]) == {of.weight(problem.task)}
    assert form.read(problem, [*trace, problem.answer]) == dataclasses.replace(problem, rounds=(tuple(trace),))
  assert form.read(problem, []).answer == ''


def definition(problem, of, n, most):
  """Rounds and weights of an example, by section 3.1."""
  form = Rounds(of=of)
  own = max(map(len, (problem.prompt, *problem.rounds)))
  ids, marks = np.full((most, n), form.pad), np.zeros((most, n))
  for t, words in enumerate(problem.rounds):
    for back, word in enumerate(reversed(words), 1):
      ids[t, n - back], marks[t, n - back] = form.symbols.index(word), 1
    if len(words) < own:
      marks[t, n - len(words) - 1] = 1
    marks[t] *= of.weight(problem.task) / len(problem.rounds) / marks[t].sum()
  return ids, marks


@all_of
def test_rounds_stand_at_the_right_end_with_one_padding_before_them(of):
  form = Rounds(of=of)
  for problem in problems(of):
    made, own = form.example(problem), form.width(problem)
    ids, marks = definition(problem, of, form.length, form.most)
    np.testing.assert_array_equal(made['rounds'], ids)
    np.testing.assert_allclose(made['round_weights'], marks, rtol=1e-6)
    n, given = form.length, len(problem.prompt)
    assert [form.symbols[i] for i in made['tokens'][n - given:]] == list(problem.prompt)
    assert set(made['tokens'][:n - given]) <= {form.pad}  # nothing of the solution is in what is read
    np.testing.assert_array_equal(made['segments'], np.arange(n) >= n - own)
    assert made['loops'] == len(problem.rounds)
    assert form.symbols[made['targets'][-1]] == problem.answer and np.flatnonzero(made['weights']).tolist() == [n - 1]
    assert made['weights'][-1] == of.weight(problem.task)
    assert form.read(problem, made['rounds'][:made['loops']], made['targets'][-1]) == problem


def test_a_round_as_wide_as_the_problem_has_no_padding_before_it():
  of = Increasing(longest=3, group=10)
  form, problem = Rounds(of=of), of.draw(rng(0), 3)
  made = form.example(problem)
  assert form.length == 11 == form.width(problem) == len(problem.rounds[0])
  np.testing.assert_allclose(made['round_weights'], np.full((1, 11), 1 / 11), rtol=1e-6)
  assert form.read(problem, made['rounds'], made['targets'][-1]) == problem


def test_rounds_are_cut_at_the_last_padding():
  of = LeftToRight(longest=2)
  form, problem = Rounds(of=of), of.solved('1 + 2 * 3'.split())
  pad, a = form.pad, form.symbols.index('1')
  shown = np.array([[a, pad, a, a, pad, a], [a] * 6, [pad] * 6])
  assert form.read(problem, shown, a).rounds == (('1',), ('1',) * 6, ())
  assert form.read(problem, shown[:, 1:2].repeat(6, 1), a).rounds == ((), ('1',) * 6, ())


def test_what_does_not_fit():
  small, large = LeftToRight(longest=2, limit=5), LeftToRight(longest=5).draw(rng(0), 5)
  with pytest.raises(ConfigError,
                     match=r'LeftToRight.room: a problem of size 5 has 5 rounds and 12 tokens.* raise room'):
    Rounds(of=small).example(large)
  with pytest.raises(ConfigError, match='0 rounds'):
    Rounds(of=small).example(dataclasses.replace(small.problem(rng(0)), rounds=()))
  with pytest.raises(ConfigError, match=r'Chain.length = \d+: a problem of size 5 with its trace has \d+ tokens'):
    Chain(of=small).example(large)
  exact = LeftToRight(longest=5, shortest=5)
  need = len(large.prompt) + sum(map(len, large.rounds)) + 1
  assert Chain(of=exact, length=need).example(large)['weights'][-1] == 1
  with pytest.raises(ConfigError, match='Chain.length'):
    Chain(of=exact, length=need - 1).example(large)
  other = Arithmetic(longest=2).solved('9 - 8'.split())
  for form in (Rounds(of=small), Chain(of=small)):
    with pytest.raises(ConfigError, match="problem .*: '9' is not a symbol"):
      form.example(other)


def test_a_curriculum_reaches_the_source_inside():
  of = Rounds(of=LeftToRight(longest=4))
  task = Generated(of=of, grow=Grow(fields={'of/longest': Rise(first=1, every=20)}))
  source = task.source('train', 0)
  sizes = [int(source[i]['loops']) for i in range(200)]
  assert set(sizes[:20]) == {1} and set(sizes[20:40]) == {1, 2} and max(sizes) == 4
  for name, message in (('of/deepest', 'LeftToRight has shortest'), ('of/sizes/deepest', 'Proportional has no fields'),
                        ('of/longest/real', 'int has no fields')):
    with pytest.raises(ConfigError, match=f"'{name}', which Rounds does not have; {message}"):
      Generated(of=of, grow=Grow(fields={name: Rise(first=1, every=20)}))


# Files ---------------------------------------------------------------------------------------------------------------


def test_problems_come_back_from_a_file(tmp_path):
  made = problems(SEVERAL)
  record(tmp_path / 'p.jsonl', made)
  assert recorded(tmp_path / 'p.jsonl') == made
  task = Recorded(of=Generated(of=Rounds(of=SEVERAL), held_out=8), file=str(tmp_path / 'p.jsonl'))
  lines = []
  assert task.prepare(tmp_path, lines.append).symbols == task.of.of.symbols and lines
  train = task.examples(tmp_path, 'train', 3)
  first, second = ([train[i] for i in range(k * len(made), (k + 1) * len(made))] for k in (0, 1))

  def key(example):
    return tuple(example['tokens'].tolist())

  wanted = sorted(key(task.of.of.example(p)) for p in made)
  assert (sorted(map(key, first)) == sorted(map(key, second)) == wanted
          and list(map(key, first)) != list(map(key, second)))
  held_out = task.examples(tmp_path, 'validation', 3)
  assert len(held_out) == 8 and key(held_out[0]) == key(task.of.examples(tmp_path, 'validation', 0)[0])
  assert (task.length, task.splits, task.measure) == (task.of.length, task.of.splits, task.of.measure)


@pytest.mark.parametrize('form', [Filled(of=Chain(of=SEVERAL), fillers=3), Filled(of=Asked(of=SEVERAL), fillers=2),
                                  Filled(of=Chain(of=ONE), fillers=Power(power=1.0)),
                                  Filled(of=Slots(of=ONE), fillers=1)])
def test_problems_of_a_file_with_fillers(form, tmp_path):
  of = form.of.of
  made = problems(of) if of is SEVERAL else [of.draw(np.random.default_rng(i), 1 + i % of.room) for i in range(6)]
  record(tmp_path / 'p.jsonl', made)
  task = Recorded(of=Generated(of=form, held_out=8), file=str(tmp_path / 'p.jsonl'))
  task.prepare(tmp_path, lambda line: None)
  train = task.examples(tmp_path, 'train', 0)
  found, wanted = ([example['tokens'].tolist() for example in some] for some in (
      [train[i] for i in range(len(made))], map(form.example, made)))
  assert sorted(found) == sorted(wanted)
  record(tmp_path / 'p.jsonl', [dataclasses.replace(made[0], task='XX')])
  with pytest.raises(ConfigError, match="line 1: task = 'XX': no such source of problems here"):
    task.prepare(tmp_path, print)


def test_forms_of_sources_that_they_cannot_show():
  words = Word(longest=5, shortest=5, group=Cyclic(degree=2))
  with pytest.raises(ConfigError, match='Rounds.of = Connectivity: its problems have no rounds to show'):
    Rounds(of=Connectivity(longest=3, shortest=3))
  for part, count in ((Selected(of=words, rounds=2), 2), (Internalised(of=words, smoothing=1e-6), 0)):
    with pytest.raises(ConfigError,
                       match=rf'Prefixes.of = {type(part).__name__}: a problem of 6 tokens has {count} rounds of'):
      Prefixes(of=part)(rng(0))
  for of in (Pointers(places=4, hops=2), Filled(of=Prefixes(of=words), fillers=2)):
    with pytest.raises(ConfigError, match=f'Filled.of = {type(of).__name__}: it is no form of problems'):
      Filled(of=of, fillers=1)


def test_what_a_file_of_problems_cannot_be():
  with pytest.raises(ConfigError, match='task.of.of = Pointers: it makes examples of no problems'):
    Recorded(of=Generated(of=Pointers(places=4, hops=2)), file='p.jsonl')
  form = Filled(of=Chain(of=ONE), fillers=Power(power=1.0))
  with pytest.raises(ConfigError,
                     match='Filled.fillers: a problem of size 9 has 9, but rows have place for 4, those of size 4'):
    form.example(dataclasses.replace(ONE.draw(np.random.default_rng(0), 2), size=9))


GOOD = {'task': 'ARI', 'size': 1, 'prompt': '[ARI] 3 + 4 =', 'rounds': ['7'], 'answer': '7'}


@pytest.mark.parametrize('row, message', [
    ('nonsense', 'line 2 is damaged: it is not JSON'), ([3], 'line 2 is damaged: it holds list'),
    ({**GOOD, 'answer': 7}, 'line 2: a value is missing or of another kind.*texts'),
    ({k: v for k, v in GOOD.items() if k != 'rounds'}, 'line 2: a value is missing'),
    ({**GOOD, 'rounds': 3}, 'line 2: a value is missing'),
    ({**GOOD, 'rounds': '77'}, 'line 2: a value is missing.*a list'),
    ({**GOOD, 'size': 1.5}, 'line 2: a value is missing'),
    ({**GOOD, 'prompt': ' '}, 'line 2: a value is missing.*not empty'),
    ({**GOOD, 'size': 'x'}, 'line 2: a value is missing'),
    ({**GOOD, 'size': -1}, 'line 2: a value is missing.*0 or more'),
    ({**GOOD, 'size': True}, 'line 2: a value is missing'),
    ({**GOOD, 'answer': '777'}, "line 2: problem .*'777' is not a symbol"),
    ({**GOOD, 'task': 'XX'}, "line 2: task = 'XX': no such source of problems here"),
    ({**GOOD, 'rounds': ['7 ' * 400]}, r'line 2: Chain.length = \d+: .* raise Chain.length'),
])
def test_files_that_cannot_be_learned_from(row, message, tmp_path):
  file = tmp_path / 'p.jsonl'
  file.write_text(f'{json.dumps(GOOD)}\n{row if isinstance(row, str) else json.dumps(row)}\n')
  task = Recorded(of=Generated(of=Chain(of=SEVERAL), held_out=8), file=str(file))
  with pytest.raises(ConfigError, match=f'{file}, {message}'):
    task.prepare(tmp_path, print)


def test_text_that_can_be_read_two_ways_is_refused():
  tokenizer = SymbolTokenizer(Chain(of=Arithmetic(longest=2)).symbols)
  assert (tokenizer.encode('3*2=') == tokenizer.encode('3 * 2 =')
          and tokenizer.decode(tokenizer.encode('10 + 1 =')) == '10 + 1 =')
  assert tokenizer.encode('10') == tokenizer.encode(' 10\n') == [10] and tokenizer.encode(' \n') == []
  assert tokenizer.encode('3*2=\n') == tokenizer.encode('\t3\n*  2 =') == tokenizer.encode('3*2=')
  with pytest.raises(ConfigError, match="prompt '10\\+1=': '10' is one symbol of this task, or 2; put spaces"):
    tokenizer.encode('10+1=')


def test_a_file_that_is_not_there(tmp_path):
  with pytest.raises(ConfigError, match='there is no such file; give a file that record'):
    recorded(tmp_path / 'none.jsonl')
  (tmp_path / 'empty.jsonl').write_text('')
  with pytest.raises(ConfigError, match='it holds no problems'):
    recorded(tmp_path / 'empty.jsonl')
