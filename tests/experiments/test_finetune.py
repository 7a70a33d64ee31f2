"""A decoder from elsewhere, by command and whole: imported, fine-tuned on chats by updates of low rank, merged,
exported, and scored by the harness's scorer."""
import json

from flax.traverse_util import flatten_dict
import jax
import numpy as np
import pytest

import loopformer
from loopformer import config as configs
from loopformer.convert import export, from_pretrained
from loopformer.inference.harness import Scorer
from loopformer.tasks.instructions import Instructions
from loopformer.tasks.mixture import Mixture
from loopformer.tasks.text import Text
from loopformer.training import metrics
from loopformer.training.averages import Averaged
from loopformer.training.frozen import Freeze
from loopformer.types import ConfigError
from tests import chats, llama_reference as reference
from tests.edges import test_numbers
from tests.experiments.test_cli import run_here
from tests.llama_reference import CONFIGS

pytest.importorskip('jinja2')
pytest.importorskip('tokenizers')
CONFIG = CONFIGS['llama'] | {'vocab_size': chats.VOCAB, 'num_hidden_layers': 2, 'eos_token_id': 256,
                             'max_position_embeddings': 64}
CHATS = [{'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'yes!'}]}
         for i in range(24)]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The work folder of an import; chats lie beside it, and texts."""
  folder = tmp_path_factory.mktemp('base')
  held = reference.weights(CONFIG)
  rows = np.random.default_rng(0).standard_normal((chats.VOCAB, reference.D)).astype(np.float32)
  (folder / 'llama').mkdir()
  reference.save(folder / 'llama', CONFIG, held | {'model.embed_tokens.weight': 0.3 * rows}, 1)
  chats.save(folder / 'llama')
  (folder / 'chats.jsonl').write_text('\n'.join(map(json.dumps, CHATS)))
  held_out = [{'prompt': f'{i}?', 'answer': 'yes!'} for i in range(30, 36)]
  (folder / 'held.jsonl').write_text('\n'.join(map(json.dumps, held_out)))
  (folder / 'text.txt').write_text('some text')
  status, out, err = run_here(folder / 'run', '--mode=import', f'--from={folder / "llama"}', '--loops=2')
  assert status == 0, err
  return folder


def spec(base, more=''):
  return (f'finetune:from={base / "run"},data={base / "chats.jsonl"},validation={base / "held.jsonl"},'
          f'length=32,rank=2{more}')


def test_from_an_import_to_an_export(base, tmp_path):
  workdir = tmp_path / 'tuned'
  status, out, err = run_here(workdir, f'--config={spec(base, ",steps=30,batch=4,peak=0.02")}', '--set',
                              'train.log_every=1', '--set', 'train.eval_every=30', '--set', 'train.eval_batches=1',
                              '--set', 'optim.of.clip=100.0')
  assert status == 0, err
  assert 'were cut' in out and '8 of 16 parameters start from step 0' in out
  losses = [row['loss'] for row in metrics.read_rows(workdir / 'metrics.jsonl') if row['kind'] == 'train']
  assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
  tuned, old = loopformer.load(workdir), loopformer.load(base / 'run')
  before, after = (flatten_dict(loaded.params, sep='/') for loaded in (old, tuned))
  for path, leaf in before.items():
    np.testing.assert_array_equal(after[path], leaf)
  assert tuned.tokenizer.ends == (256, 258) and len(after) == len(before) + 8

  status, out, err = run_here(workdir, '--mode=generate', '--chat', '--prompt=3?', '--max_new_tokens=8',
                              '--temperature=0')
  assert status == 0 and 'user: 3?\nassistant: ' in out, err

  export(tuned.model, tuned.params, tuned.tokenizer, tmp_path / 'out')
  model, params, tokenizer = from_pretrained(tmp_path / 'out')
  assert model.cell.core.depth == 4 and tokenizer.ends == tuned.tokenizer.ends and tokenizer.template == chats.CHATML
  tokens = np.asarray([tokenizer.conversation(CHATS[0]['messages'])[0]])
  both = [loopformer.logits(*pair, tokens) for pair in ((model, params), tuned[:2])]
  np.testing.assert_allclose(*both, rtol=0, atol=1e-4)
  assert np.abs(both[0] - loopformer.logits(*old[:2], tokens)).max() > 0.1

  asked = [('<|im_start|>user\n7?<|im_end|>\n<|im_start|>assistant\n', answer) for answer in ('yes!', 'noo?')]
  scores = [Scorer(*loaded, batch=2).loglikelihood(asked)
            for loaded in ((model, params, tokenizer), tuned[:3], old[:3])]
  np.testing.assert_allclose([score for score, _ in scores[0]], [score for score, _ in scores[1]], atol=1e-3)
  assert scores[0][0][0] > scores[2][0][0] + 1 and scores[0][0][0] > scores[0][1][0]


def test_arguments_of_the_configuration(base, tmp_path):
  config = configs.load(spec(base))
  configs.check(config)
  assert (isinstance(config.task, Instructions) and isinstance(config.optim, Freeze)
          and config.train.start == str(base / 'run'))
  assert config.objective == configs.read(base / 'run').objective
  configs.save(config, tmp_path)
  assert configs.describe(configs.read(tmp_path)) == configs.describe(config)
  each = configs.load(spec(base, ',each=1,average=0.9'))
  assert each.model.cell.core.block.mlp.linear.loops == 2 and isinstance(each.optim, Averaged)
  whole = configs.load(spec(base, ',rank=0').replace('rank=2,', ''))
  assert whole.model == configs.read(base / 'run').model and whole.optim.schedule.peak == 2e-5
  both = configs.load(spec(base, f',text={base / "*.txt"},share=0.25'))
  configs.check(both)
  assert isinstance(both.task, Mixture) and both.task.weights == {'chats': 0.75, 'text': 0.25}
  text = configs.load(f'finetune:from={base / "run"},text={base / "*.txt"}')
  assert isinstance(text.task, Text) and text.task.length == 64
  for given, message in (('', 'from and data'), (f'from={base / "run"}', 'from and data'),
                         (f'from={tmp_path / "none"},data=x', 'no config.json in it')):
    with pytest.raises(ConfigError, match=message):
      configs.load(f'finetune:{given}')


def test_numbers_of_the_configuration(base):
  test_numbers.test_every_number_of_a_configuration(spec(base))
  test_numbers.test_numbers_below_zero(spec(base))


def test_a_decoder_is_tied_by_command(base, tmp_path):
  status, out, err = run_here(tmp_path / 'tied', '--mode=import', f'--from={base / "llama"}', '--loops=2',
                              '--relaxed=4')
  assert status == 0, err
  model, params, _, config = loopformer.load(tmp_path / 'tied')
  assert (model.loops, model.cell.core.depth, config.objective.longest) == (2, 1, 2)
  assert params['cell']['core']['block']['mlp']['up']['a'].shape == (1, 2, reference.D, 4)
  assert jax.tree.all(jax.tree.map(lambda leaf: bool(np.isfinite(leaf).all()), params))
  status, _, err = run_here(tmp_path / 'no', '--mode=import', f'--from={base / "llama"}', '--relaxed=4')
  assert status == 1 and 'relaxed = 4: layers of a Hugging Face folder' in err


@pytest.mark.parametrize('flags, message', [
    (['--chat'], '--chat: there is nothing that a user says'),
    (['--messages=FILE', '--prompt=x'], '--prompt and --messages: give one of the two'),
    (['--messages=FILE'], "prompt 0: messages: the last is of the role 'assistant'"),
    (['--messages=EMPTY'], 'it has no rows'), (['--messages=none.jsonl'], 'none.jsonl: there is no such file')])
def test_chats_that_cannot_be_answered(flags, message, base, tmp_path):
  (tmp_path / 'empty.jsonl').write_text('\n')
  files = {'FILE': str(base / 'chats.jsonl'), 'EMPTY': str(tmp_path / 'empty.jsonl')}
  given = [flag if '=' not in flag
           else flag.replace(flag.split('=')[1], files.get(flag.split('=')[1], flag.split('=')[1]))
           for flag in flags]
  status, _, err = run_here(base / 'run', '--mode=generate', *given)
  assert status == 1 and message in err and err.strip().count('\n') == 0


@pytest.mark.parametrize('more, told', [
    ('data=x,rank=0,each=1', 'each: is read with rank alone'),
    ('text=x,validation=y', 'validation: is read with data alone'),
    ('text=x,template=y', 'template: is read with data alone'),
    ('text=x,share=0.25', 'share: is read with both data and text'),
    ('text=x,share=0.5', 'share: is read with both data and text'),
    ('data=x,peak=0', 'peak = 0.0: must be a finite number, above 0'),
    ('data=x,length=0', 'length = 0: must be 1 or more'), ('data=x,bf16=2', "bf16 = '2': choose one of 0, 1")])
def test_an_argument_that_nothing_reads_is_refused(more, told):
  with pytest.raises(ConfigError, match=f'config argument {told}'):
    configs.load(f'finetune:from=there,{more}')


def test_one_loop_has_no_update_of_its_own(tmp_path):
  config = configs.load('loopformer:tiny,kind=base')
  configs.save(config, tmp_path)
  assert config.model.loops == 1
  with pytest.raises(ConfigError, match='config argument each = 1: the model of .* has one loop'):
    configs.load(f'finetune:from={tmp_path},data=x,each=1')


def test_a_denoiser_is_not_taught_next_tokens(tmp_path):
  configs.save(configs.load('masked_diffusion:cpu'), tmp_path)
  with pytest.raises(ConfigError, match='its model denoises, .* train.start='):
    configs.load(f'finetune:from={tmp_path},data=x')
