"""Models from elsewhere as work folders, by command: files as they are published, and every mode on what they become.
"""
import json
import os

import jax
import numpy as np
import pytest

import loopformer
from loopformer import config as configs
from loopformer.cells.damped import Damped
from loopformer.convert import export, from_pretrained, retrofit, tensors, to_official
from loopformer.data.tokenizer import ByteTokenizer
from loopformer.model import init_params
from tests import llama_reference as reference, parts
from tests.experiments.test_cli import run_here
from tests.llama_reference import CONFIGS

CONFIG = CONFIGS['llama'] | {'vocab_size': 259, 'eos_token_id': 256}


@pytest.fixture(scope='module')
def state():
  """Weights whose vocabulary has room for the ids of a tokenizer."""
  held = reference.weights(CONFIG)
  rows = np.random.default_rng(0).standard_normal((CONFIG['vocab_size'], reference.D)).astype(np.float32)
  return held | {name: rows for name in held if name in ('model.embed_tokens.weight', 'lm_head.weight')}


@pytest.fixture(scope='module')
def workdir(state, tmp_path_factory):
  """A folder that a model was imported into."""
  folder = tmp_path_factory.mktemp('imported')
  loopformer.load(published(folder / 'llama', state, 'safetensors')).save(folder / 'run')
  return folder / 'run'


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
    (folder / tensors.BIN_INDEX).write_text(json.dumps(
        {'weight_map': {name: file for file, own in files.items() for name in own}}))
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
  status, out, err = run_here(workdir, '--mode=generate', '--prompt=ab', '--max_new_tokens=2', '--contrast=1,0.5')
  assert status == 0 and 'ab' in out, err
  for contrast in ('0.5', '1,2', '1,0.5,3', 'x'):
    status, _, err = run_here(workdir, '--mode=generate', f'--contrast={contrast}')
    assert status == 1 and f'--contrast={contrast}' in err and 'Traceback' not in err
  (tmp_path / 'validation.txt').write_text('a text of some length, which is read in windows')
  status, out, err = run_here(workdir, '--mode=eval', f'--text={tmp_path / "validation.txt"}', '--window=16',
                              '--stride=5')
  rows = {row['budget']: row for row in json.loads((workdir / 'eval/depths-text-validation.json').read_text())}
  assert status == 0 and list(rows) == [1, 2], err
  ids = [256, *tokenizer.encode((tmp_path / 'validation.txt').read_text())]
  for loops, row in rows.items():  # each token is predicted from 11 before it, or more
    nll = [cross_entropy(model, params, ids[start:start + 17], loops) for start in (0, 5, 10, 15, 20, 25, 30, 35)]
    expected = np.concatenate([nll[0], *(some[11:] for some in nll[1:])])
    assert row['tokens'] == len(ids) - 1 == len(expected)
    assert row['loss'] == pytest.approx(expected.mean(), rel=1e-4)
    assert row['bits_per_byte'] == pytest.approx(expected.mean() / np.log(2), rel=1e-4)  # a token is a byte
  status, _, err = run_here(workdir, '--mode=eval')
  assert status == 1 and 'name a text by --text=FILE' in err
  status, _, err = run_here(workdir, '--mode=import', f'--from={source}')
  assert status == 1 and f'workdir = {workdir}: it holds a run' in err
  assert configs.read(workdir).model == given


def test_a_prompt_begins_as_the_models_own_do(state, tmp_path):
  """Where its tokenizer says so: what is generated and evaluated is what the model gives after that token."""
  source = published(tmp_path / 'llama', state, 'safetensors')
  (source / 'tokenizer_config.json').write_text(json.dumps(
      {'eos_token': '<|endoftext|>', 'bos_token': '<|endoftext|>', 'add_bos_token': True}))
  loopformer.load(source).save(tmp_path / 'run')
  model, params, tokenizer, _ = loopformer.load(tmp_path / 'run')
  assert tokenizer.start == 256
  told, plain = (loopformer.generate(model, params, of, ['ab', [256, 97, 98]], max_new_tokens=6, temperature=0.0)
                 for of in (tokenizer, tokenizer.of))
  assert told[0] == told[1] == plain[1] != plain[0]


def test_a_decoder_is_retrofitted_as_it_is_read(state, tmp_path):
  """The same as of its parameters: layers between prelude and core are dropped, and the adapter is new."""
  source = published(tmp_path / 'llama', state, 'safetensors')
  status, out, err = run_here(tmp_path / 'run', '--mode=import', f'--from={source}', '--prelude=1', '--retrofit=1',
                              '--loops=3')
  assert status == 0, err
  model, params, _, _ = loopformer.load(tmp_path / 'run')
  assert (model.prelude.depth, model.cell.core.depth, model.coda, model.loops) == (1, reference.N - 2, None, 3)
  _, plain, _ = from_pretrained(source)
  made = retrofit(plain, model, prelude=(0,), core=range(2, reference.N), coda=())
  jax.tree.map(np.testing.assert_array_equal, params, made)
  limit = 1 / np.sqrt(2 * reference.D)
  assert 0.9 * limit < np.abs(params['cell']['inject']['adapter']['kernel']).max() <= limit
  assert model.start.std == pytest.approx(0.0087, abs=1e-4)


def test_a_damped_import_goes_a_share_of_every_step(state, tmp_path):
  source = published(tmp_path / 'llama', state, 'safetensors')
  status, _, err = run_here(tmp_path / 'run', '--mode=import', f'--from={source}', '--prelude=1', '--damped=0.25',
                            '--loops=2')
  assert status == 0, err
  model, params, tokenizer, _ = loopformer.load(tmp_path / 'run')
  plain, weights, _ = from_pretrained(source, prelude=1, loops=2)
  assert model == plain.clone(cell=Damped(plain.cell, 0.25))
  jax.tree.map(np.testing.assert_array_equal, params, weights)
  assert len(loopformer.generate(model, params, tokenizer, ['ab'], max_new_tokens=2, temperature=0.0)) == 1


def cross_entropy(model, params, ids, loops):
  """Of every id after the first, in nats."""
  logits = np.asarray(loopformer.logits(model, params, [ids[:-1]], steps=loops), np.float64)[0]
  return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize('flags, message', [
    (['--window=8'], '--window: is read with --text alone'), (['--text=nowhere'], 'nowhere: there is no such file'),
    (['--text=TEXT', '--window=99999'], '--window=99999: the model has'),
    (['--text=TEXT', '--window=4', '--stride=5'], '--stride=5'), (['--text=EMPTY'], 'it is empty'),
], ids=str)
def test_texts_that_cannot_be_evaluated(flags, message, workdir, tmp_path):
  (tmp_path / 'TEXT').write_text('some')
  (tmp_path / 'EMPTY').write_text('')
  flags = [flag.replace('TEXT', str(tmp_path / 'TEXT')).replace('EMPTY', str(tmp_path / 'EMPTY')) for flag in flags]
  status, _, err = run_here(workdir, '--mode=eval', *flags)
  assert status == 1 and message in err and 'Traceback' not in err


def test_a_checkpoint_of_the_papers_code(tmp_path):
  """As its trainer writes it: weights, and beside them NumPy's numbers."""
  torch = pytest.importorskip('torch')
  model = configs.load('loopformer:tiny,loops=2').model
  params = init_params(model, jax.random.key(0))
  held = {name: torch.from_numpy(np.array(value)) for name, value in to_official('loopformer', model, params).items()}
  torch.save({'model': held, 'model_args': {'n_head': model.cell.core.block.attn.heads},
              'best_val_loss': np.float32(3.5), 'iter_num': np.int64(7),
              'losses': np.arange(3.0)}, tmp_path / 'ckpt.pt')
  status, out, err = run_here(tmp_path / 'run', '--mode=import', f'--from={tmp_path / "ckpt.pt"}', '--kind=loopformer',
                              '--loops=2')
  assert status == 0 and 'no tokenizer' in out, err
  jax.tree.map(np.testing.assert_array_equal, loopformer.load(tmp_path / 'run').params, params)


@pytest.mark.parametrize('flags, message', [
    ([], '--from is missing'), (['--from=SOURCE', '--heads=2'], '--heads: is read with --kind alone'),
    (['--from=SOURCE', '--kind=loopformer', '--prelude=1'], '--prelude: is read without --kind alone'),
    (['--from=SOURCE', '--kind=llama'], "kind = 'llama': choose one of"), (['--from=nowhere'], 'nowhere'),
    (['--from=SOURCE', '--dtype=int8'], "dtype = 'int8'"),
    (['--from=SOURCE', '--set=train.steps=3'], '--set train.steps=3'),
    (['--from=SOURCE', '--damped=0'], 'damped = 0.0'),
    (['--from=SOURCE', '--retrofit=9', '--loops=2'], 'prelude = 9, coda = 0: the model has'),
    (['--from=SOURCE', '--damped=0.5', '--retrofit=0'], 'two ways'),
    (['--from=SOURCE', '--damped=1', '--loops=2'], '--damped=1: a whole step'),
    (['--from=SOURCE', '--retrofit=1'], '--retrofit=1: layers are'),
    (['--from=SOURCE', '--damped=0.5'], '--damped=0.5: a loop of one step'),
    (['--from=FOLDER'], 'it has no config.json; give'),
    (['--from=FOLDER/lora'], 'lora: it holds an adapter and no model; give the folder of the model'),
    (['--from=SOURCE', '--damped=0.5', '--loops=2', '--relaxed=2'], 'damped = 0.5, relaxed = 2: two ways'),
    (['--from=SOURCE', '--loops=0'], '--loops=0: must be'),
    (['--from=SOURCE', '--loops=99999999'], 'loops = 99999999: no program is made'),
    (['--from=SOURCE', '--relaxed=2', '--loops=1'], 'relaxed = 2, loops = 1: one loop has nothing that is tied'),
    (['--from=SOURCE', '--prelude=9'], 'prelude = 9'),
    (['--from=SOURCE', '--depths=2'], '--depths: --mode=import does not read it'),
], ids=str)
def test_what_cannot_be_imported(flags, message, state, tmp_path):
  source = published(tmp_path / 'llama', state, 'safetensors')
  (tmp_path / 'lora').mkdir()
  (tmp_path / 'lora/adapter_config.json').write_text('{}')
  status, out, err = run_here(tmp_path / 'run', '--mode=import', *(
      flag.replace('SOURCE', str(source)).replace('FOLDER', str(tmp_path)) for flag in flags))
  assert status == 1 and message in err and 'Traceback' not in err and not (tmp_path / 'run/config.json').exists()


@pytest.mark.parametrize('name', ['llama3', 'narrow', 'qwen3_wide', 'olmo2'])
def test_what_comes_in_goes_out_and_comes_back(name, tmp_path):
  """Transformers' own class computes what was exported as we do and as the equations say, and we read what it writes:
  scaled positions, heads of a width of their own, norms of each head and of all, before branches and after them."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  config = CONFIGS[name]
  reference.save(tmp_path / 'given', config, reference.weights(config))
  model, params, _ = from_pretrained(tmp_path / 'given')
  family = 'llama' if name == 'narrow' else config['model_type']  # a Mistral without a window
  assert export(model, params, None, tmp_path / 'out').model_type == family
  assert from_pretrained(tmp_path / 'out')[0] == model
  tokens = np.random.default_rng(0).integers(0, reference.V, (2, reference.T))
  hosted = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  theirs = hosted(torch.from_numpy(tokens)).logits
  np.testing.assert_allclose(loopformer.logits(model, params, tokens), theirs.detach(), atol=2e-4)
  np.testing.assert_allclose(reference.logits(reference.weights(config), config, tokens), theirs.detach(), atol=2e-4)
  hosted.save_pretrained(tmp_path / 'again')
  back, weights, _ = from_pretrained(tmp_path / 'again')
  assert back == model
  jax.tree.map(np.testing.assert_array_equal, weights, params)


PEAK = """
import sys
import jax
import loopformer
from loopformer import convert
from loopformer.data import tokenizer

def megabytes(field):
  with open('/proc/self/status') as file:
    return next(int(line.split()[1]) for line in file if line.startswith(field)) / 2**10

jax.block_until_ready(jax.numpy.zeros(3))
with open('/proc/self/clear_refs', 'w') as file:
  file.write('5')  # the peak begins anew
before = megabytes('VmRSS')
params = loopformer.load(sys.argv[1], **({'kind': 'ouro', 'heads': 4} if sys.argv[1].endswith('.npz') else {})).params
jax.block_until_ready(params)
print((megabytes('VmHWM') - before) / (sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20))
"""


@pytest.mark.parametrize('form', ['llama', 'ouro', 'ouro.npz'])
def test_weights_are_never_held_twice(form, tmp_path):
  """Peak of a process that reads 160 MB of weights, by the size of what it gives: stacks are filled tensor by tensor.
  """
  if not os.access('/proc/self/clear_refs', os.W_OK):
    pytest.skip('no peak of memory is told here')
  width, hidden, layers, vocab = 512, 2048, 9, 2000
  shapes = {'model.embed_tokens.weight': (vocab, width), 'model.norm.weight': (width,),
            'lm_head.weight': (vocab, width)}
  norms = ['input_layernorm', 'post_attention_layernorm']
  if form != 'llama':
    norms += ['input_layernorm_2', 'post_attention_layernorm_2']
    shapes |= {'model.early_exit_gate.weight': (1, width), 'model.early_exit_gate.bias': (1,)}
  for i in range(layers):
    shapes |= {f'model.layers.{i}.{name}.weight': (width,) for name in norms}
    shapes |= {f'model.layers.{i}.self_attn.{c}_proj.weight': (width, width) for c in 'qkvo'}
    shapes |= {f'model.layers.{i}.mlp.{name}_proj.weight': (hidden, width) for name in ('gate', 'up')}
    shapes[f'model.layers.{i}.mlp.down_proj.weight'] = (width, hidden)
  held = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
  config = {'model_type': 'llama', 'hidden_size': width, 'intermediate_size': hidden, 'num_hidden_layers': layers,
            'num_attention_heads': 4, 'vocab_size': vocab, 'tie_word_embeddings': False}
  source = tmp_path / form
  if form == 'ouro.npz':
    np.savez(source, **held)
  else:
    reference.save(source, config | ({'model_type': 'ouro', 'total_ut_steps': 4} if form == 'ouro' else {}), held, 3)
  assert float(parts.python(PEAK, str(source))) < 1.3
