"""Generators of symbols: a battery over all, each against an answer found another way, then what each must be."""
import collections
import dataclasses
from fractions import Fraction
import itertools
import re
from unittest import mock

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest

from loopformer.tasks import algorithms
from loopformer.tasks.addition import Addition
from loopformer.tasks.assignment import Assignment, Code
from loopformer.tasks.countdown import Countdown
from loopformer.tasks.edit_distance import (
  EditDistance,
  EditRows,
  LongestCommonSubsequence,
  common_subsequence,
  edit_distance,
)
from loopformer.tasks.generated import Generated, Grow, Rise
from loopformer.tasks.igsm import LEVELS, SymbolicGSM, evaluate
from loopformer.tasks.increasing import Increasing
from loopformer.tasks.markov import Complex, Markov, Medium, Simple
from loopformer.tasks.p_hop import Last, NoRepeat, PHop, Uniform, find, hop
from loopformer.tasks.reasoning import Chain, Rounds
from loopformer.types import ConfigError

# Answers found another way: from the symbols of the tokens, those of the targets that are asked for -------------------


def summed(of, words, places):
  text = ''.join(words)
  return [*str(sum(map(int, text[:text.index('=')].split('+')))), '<end>']


def hopped(of, words, places):
  """By the definition, counted from 1, with 0 for what is not defined."""
  def find_1(i):
    return max([0] + [j for j in range(2, i + 1) if words[j - 2] == words[i - 1]])

  def find_p(p, i):
    return i if p == 0 or i == 0 else find_1(find_p(p - 1, i))
  found = [find_p(of.hops, i + 1) for i in range(len(words))]
  asked = [i for i, j in enumerate(found) if j and (isinstance(of.labels, Last) <= (i == len(words) - 1))]
  assert asked == list(places)
  return [words[found[i] - 1] for i in asked]


def solved(of, words, places):
  return [str(evaluate(' '.join(words[:places[0] + 1])))]


def assigned(of, words, places):
  """By running the program, for either skin."""
  found = []
  for problem in ''.join(words).split(of.skin.end):
    known = {}
    for name, given in re.findall(r'([a-z])=([a-z\d])(?!\w)', problem):
      known[name] = known.get(given, given)
    asked, = re.findall(r'([a-z])=\?|print\(([a-z])\)', problem)
    found.append(known[''.join(asked)])
  return found


def computed(of, words, places):
  """Answers of the algorithms, by arithmetic on whole numbers and text; then EOS to the end of the row."""
  x = words[:places[0] + 1]
  bits, query = ''.join(x[:-1]), x[-1]
  if isinstance(of, algorithms.Parity):
    answer = str(bits.count('1') % 2)
  elif isinstance(of, algorithms.Copy):
    answer = bits
  elif isinstance(of, algorithms.Addition):
    a, b = bits.split('+')
    answer = format(int(a, 2) + int(b, 2), f'0{len(a) + 1}b')
  elif isinstance(of, algorithms.BinarySum):
    answer = format(bits.count('1'), 'b')[::-1] if '1' in bits else ''
  elif isinstance(of, algorithms.Multiplication):
    a, b = bits.split('*')
    answer = format(int(a, 2) * int(b, 2), f'0{len(a) + len(b)}b')[::-1]
  else:
    answer = [word for i, word in enumerate(x[:-1]) if word not in x[:i]]
  assert query in '>=' and set(words[len(x):]) <= {'<eos>'}
  assert list(places) == list(range(len(x) - 1, of.length))
  return [*answer, *['<eos>'] * (len(places) - len(answer))]


def table(first, second):
  """The table of edit distances, cell by cell."""
  cost = {(i, 0): i for i in range(len(first) + 1)} | {(0, j): j for j in range(len(second) + 1)}
  for i, j in itertools.product(range(1, len(first) + 1), range(1, len(second) + 1)):
    cost[i, j] = (cost[i - 1, j - 1] if first[i - 1] == second[j - 1] else
                  min(cost[i - 1, j] + 2, cost[i, j - 1] + 2, cost[i - 1, j - 1] + 3))
  return [[cost[i, j] for j in range(len(second) + 1)] for i in range(len(first) + 1)]


def common(first, second):
  """The longest common subsequence, by the recursion."""
  best = collections.defaultdict(int)
  for i, j in itertools.product(range(len(first)), range(len(second))):
    best[i, j] = best[i - 1, j - 1] + 1 if first[i] == second[j] else max(best[i - 1, j], best[i, j - 1])
  return best[len(first) - 1, len(second) - 1]


def compared(of, words, places):
  first, second = ''.join(words[:places[0]]).split('|')
  return [str(table(first, second)[-1][-1] if isinstance(of, EditDistance) else common(first, second)), '<eos>']


def reasoned(of, words, places):
  """Of problems solved in rounds: edit distances by the table, counts of subsequences by trying all; as a chain, or the
  answer alone at the end of the row."""
  text = [word for word in words[:words.index('<sep>')] if word != '<end>']
  if '|' in text:
    first, second = ''.join(text).split('|')
    chain = [str(cell) for row in table(first, second)[1:] for cell in (*row[1:], ',')]
    answer = chain[-2]
  else:
    numbers = list(map(int, text))
    counts = [max(len(some) for size in range(1, end + 2) for some in itertools.combinations(numbers[:end + 1], size)
                  if some[-1] == numbers[end] and list(some) == sorted(set(some))) for end in range(len(numbers))]
    answer, group, chain = str(max(counts)), of.of.group, []
    counts += counts[-1:] * (-len(counts) % group)
    for start in range(0, len(counts), group):
      chain += [*map(str, counts[start:start + group]), '<sep>']
  if isinstance(of, Rounds):
    assert list(places) == [of.length - 1]
    return [answer]
  assert places[0] == words.index('<sep>')
  return [*chain, answer, '<end>']


def followed(of, words, places):
  assert list(places) == list(range(of.length))
  return [*words[1:], mock.ANY]  # the last letter is not among the tokens


def counted(of, words, places):
  """What every equation comes to; the rest is as it is said, a place later. The last comes to the target."""
  said = words[of.given + 1:]
  for i in range(0, len(said), 6):
    a, operation, b = said[i:i + 3]
    said[i + 4:i + 5] = [str(Fraction(a) / Fraction(b) if operation == '/' else eval(a + operation + b))]
  assert said[-1] == words[of.numbers + 2]
  return said


ALGORITHMS = (algorithms.Parity, algorithms.Copy, algorithms.Addition, algorithms.BinarySum, algorithms.Multiplication,
              algorithms.UniqueSet)
ROWS = {  # name: generator, reference
  'addition': (Addition(), summed),
  'addition of two digits': (Addition(counts=(1, 3), most=20), summed),
  'p-hop': (PHop(hops=3, length=24), hopped),
  'last p-hop': (PHop(hops=16, length=128, labels=Last()), hopped),
  'uniform p-hop': (PHop(hops=4, length=32, alphabet=7, letters=Uniform()), hopped),
  'i-GSM': (SymbolicGSM(), solved),
  'shallow i-GSM': (SymbolicGSM(shortest=3, longest=5, shallowest=0, deepest=1), solved),
  'assignment': (Assignment(), assigned),
  'assignment of depth 1': (Assignment(depth=1, variables=4, shots=0), assigned),
  'code of depth 2': (Assignment(depth=2, shots=2, skin=Code()), assigned),
  **{of.__name__: (of(longest=8, room=8), computed) for of in ALGORITHMS},
  'curriculum': (algorithms.Addition(shortest=2, longest=3, room=9), computed),
  'long multiplication': (algorithms.Multiplication(shortest=70, longest=70, room=70, first=(2, 5)), computed),
  'edit distance': (EditDistance(letters=6, using=2), compared),
  'long edit distance': (EditDistance(), compared),
  'common subsequence': (LongestCommonSubsequence(letters=9, using=3), compared),
  'chain of edit distance': (Chain(of=EditRows(longest=6)), reasoned),
  'rounds of edit distance': (Rounds(of=EditRows(longest=6, room=7)), reasoned),
  'chain of increasing': (Chain(of=Increasing(longest=7, group=3)), reasoned),
  'rounds of increasing': (Rounds(of=Increasing(longest=8)), reasoned),
  'countdown': (Countdown(numbers=5), counted),
  'Markov': (Markov(), followed),
  'simple Markov': (Markov(difficulty=Simple()), followed),
  'medium Markov': (Markov(states=5, letters=7, difficulty=Medium()), followed),
  'complex Markov': (Markov(seed=4, difficulty=Complex()), followed),
}
GENERATORS = {name: of for name, (of, _) in ROWS.items()}
every = pytest.mark.parametrize('name', ROWS)
algorithm = pytest.mark.parametrize('of', ALGORITHMS)
seeds = st.integers(0, 2**31 - 1)


def example(of, seed=0):
  return of(np.random.default_rng(seed))


def many(of, count, seed=0):
  return [example(of, (seed, i)) for i in range(count)]


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def read(of, ids):
  return [of.symbols[i] for i in ids]


def spoken(of, made):
  """Symbols of the tokens, symbols asked for, and where."""
  places = np.flatnonzero(made['weights'])
  return read(of, made['tokens']), read(of, made['targets'][places]), places


# All generators ------------------------------------------------------------------------------------------------------


def extras(of):
  """What examples of a generator have besides: dtype and shape."""
  if isinstance(of, Rounds):
    rounds = of.most, of.length
    return {'loops': (np.int32, ()), 'segments': (np.int32, (of.length,)), 'rounds': (np.int32, rounds),
            'round_weights': (np.float32, rounds)}
  return {'loops': (np.int32, ())} if isinstance(of, ALGORITHMS) else {'information': (np.float32, ())}


@every
def test_shapes_and_dtypes(name):
  of = GENERATORS[name]
  end = len(of.symbols) - 1
  assert len(set(of.symbols)) == len(of.symbols) and all(isinstance(symbol, str) for symbol in of.symbols)
  for made in many(of, 20):
    for key in ('tokens', 'targets', 'positions'):
      assert made[key].dtype == np.int32 and made[key].shape == (of.length,)
    assert made['weights'].dtype == np.float32 and made['weights'].shape == (of.length,)
    assert set(np.unique(made['weights'])) <= {0, 1} and made['weights'].any()
    assert made['tokens'].min() >= 0 and made['tokens'].max() <= end
    assert made['targets'].min() >= 0 and made['targets'].max() <= end
    np.testing.assert_array_equal(made['positions'], np.arange(of.length))
    for key in made.keys() - {'tokens', 'targets', 'weights', 'positions'}:
      kind, shape = extras(of)[key]
      assert made[key].dtype == kind and made[key].shape == shape


@every
def test_answers_equal_those_found_another_way(name):
  of, reference = ROWS[name]
  for made in many(of, 40):
    words, asked, places = spoken(of, made)
    assert asked == reference(of, words, places)


@every
def test_examples_repeat_by_seed_and_differ_between_seeds(name):
  of = GENERATORS[name]
  again = dataclasses.replace(of)
  assert again == of and hash(again) == hash(of)
  assert all(same(a, b) for a, b in zip(many(of, 5), many(again, 5)))
  assert not all(same(a, b) for a, b in zip(many(of, 5), many(of, 5, seed=1)))
  with pytest.raises(dataclasses.FrozenInstanceError):
    of.length = 3


@every
def test_works_as_a_task(name, tmp_path):
  of = GENERATORS[name]
  task = Generated(of=of, held_out=8)
  train, held_out = task.examples(tmp_path, 'train', 3), task.examples(tmp_path, 'validation', 3)
  assert len(held_out) == 8 and task.length == of.length
  assert same(train[4], task.examples(tmp_path, 'train', 3)[4])
  assert not all(same(train[i], task.examples(tmp_path, 'train', 4)[i]) for i in range(5))
  assert same(held_out[2], task.examples(tmp_path, 'validation', 4)[2])
  batch = held_out.batch(8)[0]
  assert batch['tokens'].shape == (8, of.length) and batch.keys() == train[0].keys()
  assert isinstance(of, ALGORITHMS) <= (batch.get('loops', np.zeros(0)).shape == (8,))
  lines = []
  tokenizer = task.prepare(tmp_path, lines.append)
  assert lines and all(line.startswith('floor: ') for line in lines)
  ids = [i for i in train[0]['tokens'] if i != tokenizer.eos]
  assert tokenizer.encode(tokenizer.decode(ids)) == ids


@every
def test_floors_are_shares_and_leave_examples_alone(name):
  of = GENERATORS[name]
  made = many(of, 64)
  baselines = of.baselines(made)
  assert all(isinstance(value, float) and 0 <= value <= 1 for value in baselines.values())
  assert 'most frequent' in baselines and len(baselines) > 2
  assert all(map(same, made, many(of, 64)))


# Guesses -------------------------------------------------------------------------------------------------------------


def test_guesses_are_scored_where_they_are_asked_for():
  made = [{'targets': np.array([9, 1, 2]), 'weights': np.array([0, 1, 1])},
          {'targets': np.array([1, 3, 9]), 'weights': np.array([1, 1, 0])},
          {'targets': np.array([9, 9, 2]), 'weights': np.array([0, 0, 1])},
          {'targets': np.array([9, 1, 2]), 'weights': np.array([0, 1, 1])}]
  guesses = {'most': algorithms.most_frequent(made), 'place': algorithms.by_place(made)}
  assert (guesses['most'] == 1).all()  # 1 and 2 are asked for three times each
  assert guesses['place'].tolist() == [[1, 1, 2], [1, 2, 0], [1, 1, 1], [1, 1, 2]]
  assert algorithms.accuracy(made, guesses) == {'most': 3 / 7, 'place': 5 / 7}
  assert algorithms.exact(made, guesses) == {'most, exact': 0, 'place, exact': 0.5}
  oracle = {'oracle': algorithms.answers(made)[0]}
  assert algorithms.accuracy(made, oracle) == {'oracle': 1} and algorithms.exact(made, oracle) == {'oracle, exact': 1}


# Addition ------------------------------------------------------------------------------------------------------------


def test_addition_is_padded_and_its_longest_answer_fits():
  of = Addition()
  for made in many(of, 50):
    words, _, places = spoken(of, made)
    text = ''.join(words[:places[0] + 1])
    assert re.fullmatch(r'(\d{3}\+)*\d{3}=', text)
    assert set(words[places[-1] + 1:]) <= {'<end>'} and not made['weights'][places[-1] + 1:].any()

  class Most:
    """The largest of everything."""

    def integers(self, high, size=None):
      return high - 1 if size is None else np.full(size, high - 1)
  words, asked, places = spoken(of, of(Most()))
  assert ''.join(asked) == '31968<end>' and places[-1] == of.length - 1
  assert Addition(counts=(1,), most=9).length == 3


def test_addition_never_trains_on_24():
  of = Addition()
  made = collections.Counter(np.count_nonzero(e['tokens'] == 10) + 1 for e in many(of, 1000))
  assert made.keys() == {2, 4, 8, 16, 32} and min(made.values()) > 150
  held_out = many(Addition(counts=(24,)), 5)
  assert all(np.count_nonzero(e['tokens'] == 10) == 23 for e in held_out)


# p-hop ---------------------------------------------------------------------------------------------------------------


@hypothesis.given(letters=st.lists(st.integers(0, 3), min_size=1, max_size=30), hops=st.integers(1, 12))
def test_hops_equal_the_recursion(letters, hops):
  def find_1(i):  # from 0
    return max([-1] + [j + 1 for j in range(i) if letters[j] == letters[i]])

  def find_p(p, i):
    return i if p == 0 or i < 0 else find_p(p - 1, find_1(i))
  array = np.array(letters, np.int32)
  assert find(array).tolist() == [find_1(i) for i in range(len(letters))]
  places = [find_p(hops, i) for i in range(len(letters))]
  assert hop(array, hops).tolist() == [-1 if place < 0 else letters[place] for place in places]


def test_find_stands_still_where_neighbours_are_equal():
  letters = np.array([2, 0, 1, 0, 0])
  assert find(letters).tolist() == [-1, -1, -1, 2, 4]
  assert hop(letters, 9).tolist() == [-1, -1, -1, -1, 0]


@hypothesis.given(seed=seeds, length=st.integers(1, 50), alphabet=st.integers(2, 26))
def test_no_repeat_has_no_equal_neighbours(seed, length, alphabet):
  letters = NoRepeat().draw(np.random.default_rng(seed), length, alphabet)
  assert letters.shape == (length,) and letters.min() >= 0 and letters.max() < alphabet
  assert (letters[1:] != letters[:-1]).all()


def test_letters_are_uniform_among_those_allowed():
  rng = np.random.default_rng(0)
  letters = NoRepeat().draw(rng, 40_000, 4)
  pairs = np.bincount(4 * letters[:-1] + letters[1:], minlength=16).reshape(4, 4) / 39_999
  np.testing.assert_allclose(pairs, (1 - np.eye(4)) / 12, atol=0.005)
  np.testing.assert_allclose(np.bincount(Uniform().draw(rng, 40_000, 4)) / 40_000, 0.25, atol=0.01)


def test_what_has_no_answer_is_not_asked_and_never_labelled():
  of = PHop(hops=3, length=12)
  for made in many(of, 50):
    defined = hop(made['tokens'], 3) >= 0
    np.testing.assert_array_equal(made['weights'], defined)
    assert (made['targets'][~defined] == len(of.symbols) - 1).all() and not defined[:4].any()


@pytest.mark.parametrize('letters, expected', [(NoRepeat(), 0.25), (Uniform(), 0.43)])
def test_repeating_the_last_letter(letters, expected):
  """As measured: chance without equal neighbours, far more with."""
  of = PHop(hops=16, length=256, letters=letters, labels=Last())
  made = many(of, 1000)
  assert all(e['weights'].sum() == e['weights'][-1] == 1 for e in made)
  assert abs(of.baselines(made)['repeat the letter'] - expected) < 0.05


# i-GSM ---------------------------------------------------------------------------------------------------------------

PRINTED = ('E#I := 4. E#J := E#I. K#N := I#N + J#O + F#K. F#K := E#J. J#O := F#K + K#O + E#J. H#J := E#J + F#K. '
           'I#P := L#M + I#N + K#O. I#M := J#O + J#P + F#K. J#P := H#J - F#K. L#M := I#N + J#P + F#K. '
           'I#N := 2 * (J#P + H#J + E#I). K#O := J#P + I#N + E#J. ')


@pytest.mark.parametrize('name, value', [
  ('E#I', 4), ('E#J', 4), ('F#K', 4), ('H#J', 1), ('J#P', 4), ('I#N', 4), ('L#M', 5), ('K#O', 5), ('J#O', 6),
  ('I#P', 0)])
def test_printed_example(name, value):
  assert evaluate(PRINTED + name + '?') == value


def definitions_of(of, made):
  """Name -> the names and whole definition, in the order of printing; and the query."""
  words, _, places = spoken(of, made)
  *statements, query = ' '.join(words[:places[0]]).split(' . ')
  return dict(statement.split(' := ') for statement in statements), query, len(statements)


@hypothesis.given(seed=seeds, shuffle=seeds)
def test_problems_are_acyclic_and_their_order_does_not_matter(seed, shuffle):
  of = SymbolicGSM()
  made = example(of, seed)
  definitions, query, count = definitions_of(of, made)
  assert of.shortest <= count == len(definitions) <= of.longest and query in definitions
  depths = {}
  while len(depths) < count:  # every round resolves a parameter, or there is a cycle or a name without definition
    ready = {name: re.findall(r'\w#\w', text) for name, text in definitions.items() if name not in depths}
    done = {name: 1 + max([depths[used] for used in names], default=-1)
            for name, names in ready.items() if all(used in depths for used in names)}
    assert done
    depths |= done
  assert of.shallowest <= depths[query] <= of.deepest
  names = list(definitions)
  order = np.random.default_rng(shuffle).permutation(count)
  text = ' . '.join(f'{names[i]} := {definitions[names[i]]}' for i in order) + f' . {query} ?'
  assert read(of, made['targets'][made['weights'] > 0]) == [str(evaluate(text))]
  for name in names:
    assert any(name[0] in upper and name[2] in lower for upper, lower in itertools.pairwise(LEVELS))
    assert 0 <= evaluate(text.rpartition(' . ')[0] + f'. {name}?') <= 6


FORM = re.compile(r'[0-6]|(?P<times>[23] \* \( )?\w#\w( [-+] \w#\w){0,2}(?(times) \))')


def test_forms_of_definitions():
  of = SymbolicGSM()
  shown = [text for made in many(of, 200) for text in definitions_of(of, made)[0].values()]
  assert all(FORM.fullmatch(text) for text in shown)
  assert all(len(set(names)) == len(names) for names in (re.findall(r'\w#\w', text) for text in shown))
  for kind in (r'\d', r'\w#\w', r'\w#\w - \w#\w', r'2 \* \(.*\)', r'3 \* \(.*\)', r'\w#\w \+ \w#\w \+ \w#\w'):
    assert any(re.fullmatch(kind, text) for text in shown), kind
  assert 0.14 < of.baselines(many(of, 500))['most frequent'] < 0.27


@pytest.mark.parametrize('text, value', [
  ('A#E := 2. B#E := A#E - C#E. C#E := 5. B#E?', 4), ('A#E:=3.B#E:=3*(A#E-A#E-A#E).B#E?', 5), ('A#E := 6. A#E?', 6)])
def test_evaluation_wraps_differences(text, value):
  assert evaluate(text) == value


@pytest.mark.parametrize('text, message', [
  ('A#E := A#E. A#E?', 'by itself'), ('A#E := B#E. B#E := A#E. A#E?', 'by itself'), ('A#E := B#E. A#E?', 'B#E is not'),
  ('A#E := 1. A#E := 2. A#E?', 'not the first'), ('A#E := 1. A#E', 'not a question'), ('A#E = 1. A#E?', 'definition'),
  ('A#E := 2 * (1 + 1. A#E?', 'not closed'), ('A#E := 1 (. A#E?', 'out of place'), ('A#E := . A#E?', 'not defined')])
def test_evaluation_refuses_what_is_no_problem(text, message):
  with pytest.raises(ValueError, match=message):
    evaluate(text)


# Assignment ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('of, form', [
  (Assignment(variables=3, shots=0), r'([a-z]=\d,){3}[a-z]=\?'),
  (Assignment(depth=1, variables=2, shots=0), r'([a-z]=\d,){2}([a-z]=[a-z],){2}[a-z]=\?'),
  (Assignment(depth=1, variables=2, shots=0, skin=Code()), r'([a-z]=\d;){2}([a-z]=[a-z];){2}print\([a-z]\)#'),
  (Assignment(variables=1, shots=2), r'([a-z]=\d,[a-z]=\?\d;){2}[a-z]=\d,[a-z]=\?'),
])
def test_assignment_is_written_so(of, form):
  for made in many(of, 20):
    words, asked, places = spoken(of, made)
    text = ''.join(words)
    assert re.fullmatch(form, text), text
    assert len(asked) == of.shots + 1 and places[-1] == of.length - 1
    names = [re.findall(r'([a-z])=(?!\?)', problem) for problem in text.split(of.skin.end)]
    assert all(len(set(row)) == len(row) == of.variables * (of.depth + 1) for row in names)


# Length generalisation -----------------------------------------------------------------------------------------------

CASES = {  # task: input, answer, T
  algorithms.Parity: [('1 1 1 >', '1', 3), ('0 >', '0', 1)],
  algorithms.Copy: [('0 1 1 >', '0 1 1', 3)],
  algorithms.Addition: [('0 0 + 0 0 =', '0 0 0', 2), ('1 1 1 + 0 0 1 =', '1 0 0 0', 3), ('1 + 1 =', '1 0', 1)],
  algorithms.BinarySum: [('0 0 0 =', '', 3), ('1 1 0 =', '0 1', 3), ('1 1 1 1 =', '0 0 1', 4)],
  algorithms.Multiplication: [('1 0 * 1 1 =', '0 1 1 0', 4), ('1 * 1 1 1 =', '1 1 1 0', 3), ('0 * 1 =', '0 0', 1)],
  algorithms.UniqueSet: [('7 3 7 =', '7 3', 3), ('5 5 5 5 =', '5', 4)],
}
LENGTHS = {algorithms.Parity: 6, algorithms.Copy: 10, algorithms.Addition: 15, algorithms.BinarySum: 8,
           algorithms.Multiplication: 20, algorithms.UniqueSet: 10}
IDS = {  # of a binary task, and of the unique set: separator (where any), query, EOS, ignored
  algorithms.Parity: (2, 2, 3, 5), algorithms.Copy: (2, 2, 3, 4), algorithms.Addition: (2, 5, 3, 4),
  algorithms.BinarySum: (5, 5, 3, 4), algorithms.Multiplication: (2, 5, 3, 4), algorithms.UniqueSet: (51, 51, 53, 52),
}


class Given:
  """Draws what it is told to, in turn."""

  def __init__(self, *draws):
    self.draws = list(draws)

  def integers(self, low, high=None, size=None):
    return self.draws.pop(0)


def given_to(of, x):
  """What a generator makes of the input `x`."""
  bits = [list(map(int, run)) for digits, run in itertools.groupby(x[:-1], str.isdigit) if digits]
  if isinstance(of, algorithms.Addition):
    return of(Given(len(bits[0]), np.array(bits)))
  if isinstance(of, algorithms.Multiplication):
    return of(Given(of.first.index(len(bits[0])), np.array(bits[0]), len(bits[1]), np.array(bits[1])))
  return of(Given(len(bits[0]), np.array(bits[0])))


@algorithm
def test_rows_of_algorithms(of):
  """The token at the query is asked for answer[0]; EOS fills and is asked for to the end; T(n)."""
  separator, query, eos, ignored = IDS[of]
  made_by = of(longest=4, room=4)
  assert made_by.length == LENGTHS[of]
  assert len(made_by.symbols) == (60 if of is algorithms.UniqueSet else 7)
  for x, answer, loops in CASES[of]:
    x, answer = x.split(), answer.split()
    ids = [int(word) if word.isdigit() else query if i == len(x) - 1 else separator for i, word in enumerate(x)]
    made = given_to(made_by, x)
    first = len(x) - 1
    assert made['tokens'].tolist() == ids + [eos] * (made_by.length - len(x))
    assert made['targets'].tolist() == [ignored] * first + [*map(int, answer)] + [eos] * (
      made_by.length - first - len(answer))
    assert made['weights'].tolist() == [0] * first + [1] * (made_by.length - first)
    assert made['loops'] == loops


@algorithm
def test_lengths_are_uniform_within_exact_bounds(of):
  made_by = of(shortest=2, longest=5, room=7)
  multiplied = of is algorithms.Multiplication
  if multiplied:
    made_by = dataclasses.replace(made_by, first=(1,))
  counts = collections.Counter(int(e['loops']) for e in many(made_by, 800))
  assert counts.keys() == {2, 3, 4, 5} and min(counts.values()) > 140
  assert {len(e['tokens']) for e in many(made_by, 5)} == {of(longest=7, room=7).length}


@algorithm
def test_the_longest_input_fits(of):
  for n in (1, 2, 3, 20):
    for made in many(of(shortest=n, longest=n, room=n), 10):
      assert len(made['targets']) == of(longest=n, room=n).length and made['weights'][-1] == 1


@algorithm
def test_curriculum_keeps_the_rows(of):
  task = Generated(of=of(longest=9, room=9), grow=Grow(fields={'longest': Rise(first=1, every=10)}))
  source = task.source('train', 0)
  made = [source[i] for i in (*range(10), 10_000, 10_001)]
  assert len({e['tokens'].shape for e in made}) == 1
  assert all(e['loops'] <= 2 for e in made[:10])


def test_factors_of_the_multiplication():
  counts = collections.Counter(int(np.flatnonzero(e['tokens'] == 2)[0])
                               for e in many(algorithms.Multiplication(longest=4, room=4), 400))
  assert counts.keys() == {1, 2} and min(counts.values()) > 150


def test_chance_knows_the_length_of_the_answer():
  of = algorithms.Copy(shortest=2, longest=2, room=2)
  baselines = of.baselines(many(of, 9))
  assert baselines['chance'] == (2 * 0.5 + 2) / 4 and baselines['chance, exact'] == 0.25
  of = algorithms.Parity(longest=12, room=12)
  baselines = of.baselines(many(of, 400))
  assert baselines['chance, exact'] == 0.5 and all(
    abs(baselines[f'{name}, exact'] - 0.5) < 0.1 for name in ('by place', 'last bit'))


# Edit distance -------------------------------------------------------------------------------------------------------


def letters(text):
  return np.array([ord(letter) - ord('a') for letter in text], np.int64)


def test_table_of_the_example():
  assert table('otml', 'ottml') == [[0, 1, 2, 3, 4, 5], [1, 0, 2, 4, 6, 7], [2, 2, 0, 2, 4, 6], [3, 4, 2, 3, 2, 4],
                                    [4, 6, 4, 5, 4, 2]]
  assert edit_distance(letters('otml'), letters('ottml')) == 2


@hypothesis.settings(max_examples=100)
@hypothesis.given(first=st.text('abc', min_size=1, max_size=12), second=st.text('abc', min_size=1, max_size=12))
def test_distances_equal_the_slow_ones(first, second):
  assert edit_distance(letters(first), letters(second)) == table(first, second)[-1][-1]
  assert common_subsequence(letters(first), letters(second)) == common(first, second)


@pytest.mark.parametrize('first, second, distance', [
  ('abc', 'abc', 0), ('ab', 'b', 1), ('bbba', 'a', 3), ('a', 'bbba', 3), ('ab', 'a', 2), ('aaaa', 'bbbb', 12)])
def test_steps_along_the_border_cost_one(first, second, distance):
  """`ab` to `b` deletes along the border, `ab` to `a` does not."""
  assert edit_distance(letters(first), letters(second)) == distance


@hypothesis.given(seed=seeds, n=st.integers(4, 12), using=st.integers(1, 24))
def test_pairs_are_within_bounds(seed, n, using):
  of = EditDistance(letters=n, using=using)
  words, _, places = spoken(of, example(of, seed))
  first, second = ''.join(words[:places[0]]).split('|')
  assert first != second and len(first) <= len(second) and n in (len(first), len(second))
  assert n - 3 <= len(first) and len(second) <= n + 2
  assert len({*first, *second}) <= using + 2 and words[places[0]] == '<sep>'
  assert set(words[places[0] + 3:]) <= {'<pad>'}


def test_ids_of_edit_distance():
  of = EditDistance()
  assert of.length == 127
  assert of.symbols[:5] == ('<pad>', '<sep>', '<eos>', '|', ',')
  assert of.symbols[5:31] == tuple('abcdefghijklmnopqrstuvwxyz')
  assert of.symbols[31:211] == tuple(map(str, range(180)))
  assert of.symbols[211:] == ('180', '181', '182', '<end>')
  assert LongestCommonSubsequence().symbols[31:] == (*map(str, range(101)), '<end>')


@pytest.mark.parametrize('n', [4, 6, 60])
def test_largest_distance_has_a_number(n):
  assert edit_distance(np.zeros(n), np.ones(n + 2)) == 3 * n + 2 == int(EditDistance(letters=n).symbols[-2])


def test_forms_of_pairs():
  """About 0.4 of the pairs are unrelated, which cost more; alphabets have 3 to using + 2 letters."""
  of = EditDistance(letters=20, using=8)
  pairs = [''.join(spoken(of, e)[0]).partition('<sep>')[0] for e in many(of, 300)]
  sizes = {len(set(pair) - {'|'}) for pair in pairs}
  assert max(sizes) == 10 and min(sizes) == 3
  lengths = {len(pair.split('|')[1]) for pair in pairs}
  assert lengths == {20, 21, 22}


def test_letters_of_common_subsequences_are_drawn_apart():
  of = LongestCommonSubsequence(letters=100)
  made = many(of, 50)
  for e in made:
    words, _, places = spoken(of, e)
    halves = ''.join(words[:places[0]]).split('|')
    assert [len(half) for half in halves] == [100, 100] and all(len(set(half)) <= 8 for half in halves)
  assert any(set(words[:100]) != set(words[101:201]) for words in (spoken(of, e)[0] for e in made))


# Markov --------------------------------------------------------------------------------------------------------------


def test_transitions():
  of = Markov()
  matrix = of.transitions
  np.testing.assert_allclose(matrix.sum(1), 1)
  assert matrix.shape == (8, 8) and (matrix.max(1) >= 0.7).all() and (matrix > 0).all()
  assert not np.array_equal(matrix, Markov(seed=1).transitions)
  sentences = np.array([[*e['tokens'], e['targets'][-1]] for e in many(of, 2000)])
  pairs = np.zeros((8, 8))
  np.add.at(pairs, (sentences[:, :-1], sentences[:, 1:]), 1)
  seen = pairs.sum(1, keepdims=True)
  assert (np.abs(pairs / seen - matrix) < 5 * np.sqrt(matrix * (1 - matrix) / seen) + 1e-3).all()


def test_information_and_its_thirds():
  of = Markov()
  made = many(of, 3000)
  matrix = of.transitions
  information = np.array([e['information'] for e in made])
  for e, value in zip(made[:50], information):
    np.testing.assert_allclose(-sum(np.log(matrix[a, b]) for a, b in zip(e['tokens'], e['targets'])), value, rtol=1e-5)
  parts = [dataclasses.replace(of, difficulty=part) for part in (Simple(), Medium(), Complex())]
  shares = [np.mean([low < value <= high for value in information]) for low, high in (part.bounds for part in parts)]
  np.testing.assert_allclose(shares, 1 / 3, atol=0.03)
  assert of.bounds == (-np.inf, np.inf) and parts[0].bounds[1] == parts[1].bounds[0] < parts[1].bounds[1]
  for part in parts:
    low, high = part.bounds
    assert all(low < e['information'] <= high for e in many(part, 50))
  bayes = [part.baselines(many(part, 200))['Bayes'] for part in parts]
  assert bayes[0] > bayes[1] > bayes[2]


def test_bayes_is_the_best_of_the_floors():
  for seed in range(3):
    of = Markov(seed=seed)
    baselines = of.baselines(many(of, 200))
    assert max(baselines, key=baselines.get) == 'Bayes' and abs(baselines['Bayes'] - 0.73) < 0.06


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('make, message', [
  (lambda: Addition(counts=()), r'Addition\.counts = \(\).*1 or more'),
  (lambda: Addition(counts=(2, 0)), r'Addition\.counts = \(2, 0\)'),
  (lambda: Addition(most=0), r'Addition\.most = 0.*to 1 or more'),
  (lambda: PHop(hops=0), r'PHop\.hops = 0.*to 1 or more'),
  (lambda: PHop(hops=24, length=24), r'PHop\.length = 24.*to 26 or more'),
  (lambda: PHop(hops=23, length=24), r'PHop\.length = 24'),
  (lambda: PHop(hops=24, length=24, letters=Uniform()), r'PHop\.length = 24.*to 25 or more'),
  (lambda: PHop(alphabet=1), r'PHop\.alphabet = 1.*to 2 to 26'),
  (lambda: PHop(alphabet=27), r'PHop\.alphabet = 27'),
  (lambda: SymbolicGSM(shallowest=-1), r'SymbolicGSM\.shallowest = -1'),
  (lambda: SymbolicGSM(deepest=1), r'SymbolicGSM\.deepest = 1.*to 2 or more'),
  (lambda: SymbolicGSM(shortest=2), r'SymbolicGSM\.shortest = 2.*to 3 or more'),
  (lambda: SymbolicGSM(longest=7), r'SymbolicGSM\.longest = 7.*to 8 or more'),
  (lambda: SymbolicGSM(longest=49), r'SymbolicGSM\.longest = 49.*48'),
  (lambda: Assignment(depth=-1), r'Assignment\.depth = -1'),
  (lambda: Assignment(variables=0), r'Assignment\.variables = 0'),
  (lambda: Assignment(variables=9, depth=2), r'Assignment\.variables = 9.*at most 8'),
  (lambda: Assignment(shots=-1), r'Assignment\.shots = -1'),
  (lambda: algorithms.Parity(shortest=0, longest=3, room=3), r'Parity\.shortest = 0.*to 1 or more'),
  (lambda: algorithms.Copy(shortest=4, longest=3, room=3), r'Copy\.longest = 3.*to 4 or more'),
  (lambda: algorithms.Addition(longest=4, room=3), r'Addition\.room = 3.*to 4 or more'),
  (lambda: algorithms.BinarySum(longest=4, room=3), r'BinarySum\.room = 3'),
  (lambda: algorithms.UniqueSet(longest=4, room=3), r'UniqueSet\.room = 3'),
  (lambda: algorithms.Multiplication(longest=4, room=3), r'Multiplication\.room = 3'),
  (lambda: algorithms.Multiplication(longest=4, room=4, first=()), r'Multiplication\.first = \(\)'),
  (lambda: algorithms.Multiplication(longest=4, room=4, first=(6,)), r'Multiplication\.first = \(6,\).*from 1 to 5'),
  (lambda: EditDistance(letters=3), r'EditDistance\.letters = 3.*to 4 or more'),
  (lambda: EditDistance(using=0), r'EditDistance\.using = 0'),
  (lambda: EditDistance(using=25), r'EditDistance\.using = 25.*1 to 24'),
  (lambda: LongestCommonSubsequence(letters=0), r'LongestCommonSubsequence\.letters = 0'),
  (lambda: LongestCommonSubsequence(using=0), r'LongestCommonSubsequence\.using = 0'),
  (lambda: Markov(states=1), r'Markov\.states = 1.*2\.\.26'),
  (lambda: Markov(letters=1), r'Markov\.letters = 1.*to 2 or more'),
  (lambda: Markov(likely=1.0), r'Markov\.likely = 1'),
  (lambda: Markov(spread=0.0), r'Markov\.spread = 0'),
])
def test_bad_fields_are_refused(make, message):
  with pytest.raises(ConfigError, match=message):
    make()
