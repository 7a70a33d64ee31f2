"""Deep answers against shallow ones: the law, and texts that are decoded by it."""
import jax.numpy as jnp
import numpy as np
import pytest

import loopformer
from loopformer import plans
from loopformer.inference.engine import Engine, generate
from loopformer.inference.sampler import Contrasted
from loopformer.inference.sampling import Contrast
from loopformer.types import ConfigError
from tests import parts
from tests.inference.test_generate import MODEL, PARAMS, PROMPTS, TOKENIZER
from tests.parts import L, V


def test_the_law():
  """In NumPy: log-probabilities of the deep answer less the weighted ones of the shallow, of what is plausible."""
  rng = np.random.default_rng(0)
  deep, shallow = rng.standard_normal((2, 3, V)).astype(np.float32) * 3
  vocab = np.array([V, V - 5, 1], np.int32)
  found = np.asarray(Contrast(plausible=0.2, weight=0.5).logits(
      jnp.asarray(deep), jnp.asarray(shallow), jnp.asarray(vocab)))
  for row, count in enumerate(vocab):
    p, q = (np.exp(logits[row, :count].astype(np.float64)) for logits in (deep, shallow))
    p, q = p / p.sum(), q / q.sum()
    kept = p >= 0.2 * p.max()
    np.testing.assert_array_equal(np.isfinite(found[row]), np.pad(kept, (0, V - count)))
    np.testing.assert_allclose(found[row, :count][kept], (np.log(p) - 0.5 * np.log(q))[kept], atol=1e-4)


def contrasted(prompt: str, part: Contrast, count: int) -> str:
  """The argmax loop over parallel passes of both depths."""
  ids = TOKENIZER.encode(prompt) or [TOKENIZER.eos]
  start = len(ids)
  for _ in range(count):
    row = np.zeros((1, 32), np.int32)
    row[0, :len(ids)] = ids
    deep, shallow = (loopformer.logits(MODEL, PARAMS, row, steps=steps) for steps in (L, part.shallow or 1))
    if not part.shallow:
      shallow = none(row)
    law = part.logits(*(logits[:, len(ids) - 1] for logits in (deep, shallow)), jnp.array([V]))
    ids.append(int(law[0].argmax()))
    if ids[-1] == TOKENIZER.eos:
      return TOKENIZER.decode(ids[start:-1])
  return TOKENIZER.decode(ids[start:])


def none(tokens):
  """Logits of the state before the loop."""
  plan = plans.schedule((1.0,)).replace(active=np.zeros(1, bool))
  trace = parts.forward(MODEL, PARAMS, jnp.asarray(tokens), plan)
  return MODEL.apply({'params': PARAMS}, trace.z, method='logits')


@pytest.mark.parametrize('shallow, weight', [(0, 1.0), (1, 0.5), (2, 1.0)])
def test_greedy_texts_are_those_of_parallel_passes(shallow, weight):
  part = Contrast(shallow=shallow, weight=weight, plausible=0.05)
  found = generate(MODEL.clone(sampler=Contrasted(contrast=part)), PARAMS, TOKENIZER, list(PROMPTS), max_new_tokens=6,
                   temperature=0.0)
  assert found == [contrasted(prompt, part, 6) for prompt in PROMPTS]
  plain = generate(MODEL, PARAMS, TOKENIZER, list(PROMPTS), max_new_tokens=6, temperature=0.0)
  assert found != plain


def test_without_weight_greedy_texts_are_the_deep_ones():
  model = MODEL.clone(sampler=Contrasted(contrast=Contrast(weight=0.0)))
  options = dict(max_new_tokens=6, temperature=0.0)
  assert (generate(model, PARAMS, TOKENIZER, list(PROMPTS), **options)
          == generate(MODEL, PARAMS, TOKENIZER, list(PROMPTS), **options))


def test_what_is_no_contrast():
  for field, value in (('shallow', -1), ('shallow', 1.5), ('plausible', 0.0), ('plausible', 1.1), ('weight', 2.0)):
    with pytest.raises(ConfigError, match=f'contrast.{field} = {value}'):
      Contrast(**{field: value})
  with pytest.raises(ConfigError, match='contrast and draft'):
    Engine(MODEL, PARAMS, TOKENIZER, rows=1, draft=1, contrast=Contrast())
