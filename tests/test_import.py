"""Models from elsewhere as work folders, by command: files as they are published, and every mode on what they become."""
import json

import jax
import numpy as np
import pytest

import loopformer
from loopformer import config as configs
from loopformer.convert import export, from_pretrained, tensors, to_official
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.model import init_params
from tests import llama_reference as reference
from tests.llama_reference import CONFIGS
from tests.test_cli import run_here

CONFIG = CONFIGS['llama'] | {'vocab_size': 259, 'eos_token_id': 256}


@pytest.fixture(scope='module')
def state():
  """Weights whose vocabulary has room for the ids of a tokenizer."""
  held = reference.weights(CONFIG)
  rows = np.random.default_rng(0).standard_normal((CONFIG['vocab_size'], reference.D)).astype(np.float32)
  return held | {name: rows for name in held if name in ('model.embed_tokens.weight', 'lm_head.weight')}


def published(folder, state, how):
  """The folder of a model, in one of the forms in which such are published."""
  folder.mkdir(exist_ok=True)
  reference.save(folder, CONFIG, state, 1)
  (folder / 'tokenizer.json').write_text(ByteTokenizer().hugging_face())
  (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<|endoftext|>'}))
  if how == 'safetensors':
    return folder
  torch = pytest.importorskip('torch')
  (folder / tensors.NAME).unlink()
  held = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
  if 'bfloat16' in how:
    held = {name: tensor.to(torch.bfloat16) for name, tensor in held.items()}
  if 'indexed' in how:
    names = sorted(held)
    files = {f'pytorch_model-0000{i + 1}-of-00002.bin': names[i::2] for i in range(2)}
    for file, own in files.items():
      torch.save({name: held[name] for name in own}, folder / file)
    (folder / tensors.BIN_INDEX).write_text(json.dumps({'weight_map': {name: file for file, own in files.items() for name in own}}))
  else:
    torch.save(held, folder / tensors.BIN, _use_new_zipfile_serialization='old' not in how)
  return folder


@pytest.mark.parametrize('how', ['one .bin', 'an old .bin', 'indexed .bin', 'bfloat16 .bin'])
def test_weights_of_pytorch_are_those_of_safetensors(how, state, tmp_path):
  _, params, _ = from_pretrained(published(tmp_path, state, how))
  kind = jax.numpy.bfloat16 if 'bfloat16' in how else np.float32
  rounded = {name: np.asarray(value, kind).astype(np.float32) for name, value in state.items()}
  (tmp_path / 'other').mkdir()
  reference.save(tmp_path / 'other', CONFIG, rounded, 1)
  jax.tree.map(np.testing.assert_array_equal, params, from_pretrained(tmp_path / 'other')[1])


def test_every_mode_reads_what_was_imported(state, tmp_path):
  source, workdir = published(tmp_path / 'llama', state, 'safetensors'), tmp_path / 'run'
  status, out, err = run_here(workdir, '--mode=import', f'--from={source}', '--loops=2', '--prelude=1')
  assert status == 0 and 'a tokenizer; written to' in out, err
  model, params, tokenizer, config = loopformer.load(workdir)
  given, expected, _ = from_pretrained(source, loops=2, prelude=1)
  assert model == given and tokenizer.encode('ab') == [97, 98] and config.task.length == model.read_in.length
  jax.tree.map(np.testing.assert_array_equal, params, expected)
  status, out, err = run_here(workdir, '--mode=generate', '--prompt=ab', '--max_new_tokens=4', '--temperature=0')
  assert status == 0 and 'ab' in out, err
  status, _, err = run_here(workdir, '--mode=import', f'--from={source}')
  assert status == 1 and f'workdir = {workdir}: it holds a run' in err
  assert configs.read(workdir).model == given


def test_a_checkpoint_of_the_papers_code(tmp_path):
  """As its trainer writes it: weights, and beside them NumPy's numbers."""
  torch = pytest.importorskip('torch')
  model = configs.load('loopformer:tiny,loops=2').model
  params = init_params(model, jax.random.key(0))
  held = {name: torch.from_numpy(np.array(value)) for name, value in to_official('loopformer', model, params).items()}
  torch.save({'model': held, 'model_args': {'n_head': model.cell.core.block.attn.heads}, 'best_val_loss': np.float32(3.5), 'iter_num': np.int64(7),
              'losses': np.arange(3.0)}, tmp_path / 'ckpt.pt')
  status, out, err = run_here(tmp_path / 'run', '--mode=import', f'--from={tmp_path / "ckpt.pt"}', '--kind=loopformer',
                              '--loops=2')
  assert status == 0 and 'no tokenizer' in out, err
  jax.tree.map(np.testing.assert_array_equal, loopformer.load(tmp_path / 'run').params, params)


@pytest.mark.parametrize('flags, message', [
    ([], '--from is missing'), (['--from=SOURCE', '--heads=2'], '--heads: is read with --kind alone'),
    (['--from=SOURCE', '--kind=loopformer', '--prelude=1'], '--prelude: is read without --kind alone'),
    (['--from=SOURCE', '--kind=llama'], "kind = 'llama': choose one of"), (['--from=nowhere'], 'nowhere'),
    (['--from=SOURCE', '--dtype=int8'], "dtype = 'int8'"), (['--from=SOURCE', '--set=train.steps=3'], '--set train.steps=3'),
    (['--from=SOURCE', '--loops=0'], '--loops=0: must be'), (['--from=SOURCE', '--prelude=9'], 'prelude = 9'),
    (['--from=SOURCE', '--depths=2'], '--depths: --mode=import does not read it'),
], ids=str)
def test_what_cannot_be_imported(flags, message, state, tmp_path):
  source = published(tmp_path / 'llama', state, 'safetensors')
  status, out, err = run_here(tmp_path / 'run', '--mode=import', *(flag.replace('SOURCE', str(source)) for flag in flags))
  assert status == 1 and message in err and 'Traceback' not in err and not (tmp_path / 'run/config.json').exists()


def test_llama_3_comes_in_and_goes_out(tmp_path):
  """Its scaled positions: transformers' own class computes what was exported as we do."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  config = CONFIGS['llama3']
  reference.save(tmp_path / 'llama', config, reference.weights(config))
  model, params, _ = from_pretrained(tmp_path / 'llama')
  assert export(model, params, None, tmp_path / 'out').model_type == 'llama'
  assert from_pretrained(tmp_path / 'out')[0] == model
  tokens = np.random.default_rng(0).integers(0, reference.V, (2, reference.T))
  theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')(torch.from_numpy(tokens)).logits
  np.testing.assert_allclose(loopformer.logits(model, params, tokens), theirs.detach(), atol=2e-4)
  np.testing.assert_allclose(reference.logits(reference.weights(config), config, tokens), theirs.detach(), atol=2e-4)
