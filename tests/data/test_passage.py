"""A text as batches: what is counted, from how much it is predicted, and that the command tells the loss of it."""
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loopformer import plans
from loopformer.data import passage
from loopformer.data.chat import ChatTokenizer
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.model import run_batch
from loopformer.nn import kernels
from loopformer.nn.embed import TokenEmbed
from loopformer.types import ConfigError
from tests import parts

TOKENIZER = ByteTokenizer()


def counted(text: str, **options):
  """(place in the text, how many tokens it is predicted from) of everything that has weight."""
  found, ids = [], [TOKENIZER.eos, *TOKENIZER.encode(text)]
  for batch in passage.batches(text, TOKENIZER, **options):
    assert not batch['weights'][batch['counted'] == 0].any()
    for tokens, targets, positions, weights in zip(*(
        batch[name] for name in ('tokens', 'targets', 'positions', 'weights'))):
      np.testing.assert_array_equal(positions, np.arange(len(tokens)))
      for at in np.flatnonzero(weights):
        starts = [i for i in range(len(ids))
                  if ids[i:i + at + 1] == tokens[:at + 1].tolist() and ids[i + at + 1] == targets[at]]
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
  begun = ChatTokenizer(of=TOKENIZER, start=7)
  assert next(passage.batches('abc', begun, length=64))['tokens'].tolist() == [[7, *b'ab']]


def test_a_model_that_reads_both_ways_does_not_read_what_fills_up():
  batch, = passage.batches('abcdefghijk', TOKENIZER, length=8, causal=False)
  assert batch['segments'].tolist() == [[1] * 8, [1] * 3 + [0] * 5]
  model = parts.looped(parts.plain(1, kernel=kernels.Bidirectional()), loops=2,
                       read_in=TokenEmbed(vocab=TOKENIZER.vocab_size, width=parts.D, length=8))
  plan, weights = plans.schedule(plans.resolve(2)), parts.params(model)
  other = {**batch, 'tokens': np.where(batch['segments'] > 0, batch['tokens'], 7)}
  one, two = (run_batch(model, weights, jax.tree.map(jnp.asarray, some), plan).z for some in (batch, other))
  np.testing.assert_array_equal(one[1, :3], two[1, :3])
  assert 'segments' not in next(passage.batches('abcdefghijk', TOKENIZER, length=8))


def test_the_command_tells_denoisers_what_fills_up(tmp_path):
  from experiments import main
  (tmp_path / 'own.txt').write_text('abcdefghijk')
  given = SimpleNamespace(text=str(tmp_path / 'own.txt'), window=None, stride=None, eval_batches=None)
  model = SimpleNamespace(sampler=SimpleNamespace(denoises=True), read_in=SimpleNamespace(length=8))
  config = SimpleNamespace(task=SimpleNamespace(length=8, measure='bound'), train=SimpleNamespace(batch=2))
  with mock.patch.object(main, 'FLAGS', given):
    found, measure = main.examples(model, None, TOKENIZER, config, tmp_path)
    batch, = found['text-own']()
  assert measure == 'bound' and batch['segments'][1].tolist() == [1] * 3 + [0] * 5


@pytest.mark.parametrize('text, options, message', [
    ('', {}, 'text: it is empty'), ('ab', {'stride': 9}, 'stride = 9'), ('ab', {'stride': 0}, 'stride = 0'),
    ('ab', {'rows': 0}, 'rows = 0'),
])
def test_what_makes_no_batches(text, options, message):
  with pytest.raises(ConfigError, match=message):
    list(passage.batches(text, TOKENIZER, 8, **options))
