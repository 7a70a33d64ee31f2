"""A text as batches: what is counted, from how much it is predicted, and that the command tells the loss of it."""
import numpy as np
import pytest

from loopformer.data import passage
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.types import ConfigError

TOKENIZER = ByteTokenizer()


def counted(text: str, **options):
  """(place in the text, how many tokens it is predicted from) of everything that has weight."""
  found, ids = [], [TOKENIZER.eos, *TOKENIZER.encode(text)]
  for batch in passage.batches(text, TOKENIZER, **options):
    assert not batch['weights'][batch['counted'] == 0].any()
    for tokens, targets, positions, weights in zip(*(batch[name] for name in ('tokens', 'targets', 'positions', 'weights'))):
      np.testing.assert_array_equal(positions, np.arange(len(tokens)))
      for at in np.flatnonzero(weights):
        starts = [i for i in range(len(ids)) if ids[i:i + at + 1] == tokens[:at + 1].tolist() and ids[i + at + 1] == targets[at]]
        found.append((starts[0] + at, at + 1))  # texts here hold no window twice
  return found


@pytest.mark.parametrize('count', [1, 2, 7, 8, 9, 16, 23])
@pytest.mark.parametrize('stride', [None, 1, 3, 8])
@pytest.mark.parametrize('rows', [1, 3])
def test_every_token_counts_once(count, stride, rows):
  text = ''.join(chr(ord('A') + i) for i in range(count))
  found = counted(text, length=8, stride=stride, rows=rows)
  assert sorted(place for place, _ in found) == list(range(count))
  least = {None: 1, 1: 8, 3: 6, 8: 1}[stride]
  assert all(read >= min(least, place + 1) for place, read in found)


def test_batches_are_of_one_shape_and_a_short_text_is_not_filled_up():
  shapes = [batch['tokens'].shape for batch in passage.batches('abcdefghijk', TOKENIZER, length=4, rows=2)]
  assert shapes == [(2, 4)] * 2
  assert next(passage.batches('abc', TOKENIZER, length=64))['tokens'].tolist() == [[TOKENIZER.eos, *b'ab']]


@pytest.mark.parametrize('text, options, message', [
    ('', {}, 'text: it is empty'), ('ab', {'stride': 9}, 'stride = 9'), ('ab', {'stride': 0}, 'stride = 0'),
    ('ab', {'rows': 0}, 'rows = 0'),
])
def test_what_makes_no_batches(text, options, message):
  with pytest.raises(ConfigError, match=message):
    list(passage.batches(text, TOKENIZER, 8, **options))
