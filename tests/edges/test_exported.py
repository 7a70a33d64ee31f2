"""An exported model and its host: what transformers, Trainer, generate, PEFT, torch.compile and the harness ask of it.

Each table has a row a case: what is given, what it must give, and where such a case comes from.
"""
import importlib.util
import json
import math
import sys

from flax.traverse_util import flatten_dict
import numpy as np
import pytest

import loopformer
from loopformer import loop, plans
from loopformer.convert import export, from_pretrained, tensors
from loopformer.data.tokenizer import ByteTokenizer
from tests import parts
from tests.convert.test_export import DECODERS, same

torch = pytest.importorskip('torch', reason='needs torch')
transformers = pytest.importorskip('transformers', reason='needs transformers')
needs_accelerate, needs_peft, needs_harness = (
    pytest.mark.skipif(not importlib.util.find_spec(name), reason=f'needs {name}')
    for name in ('accelerate', 'peft', 'lm_eval'))

LENGTH = 64
MODEL = parts.looped(parts.timed(heads=4, groups=2), prelude=parts.stack(2), coda=parts.stack(1),
                     read_in=parts.TokenEmbed(vocab=260, width=parts.D, length=LENGTH))
PROMPTS = ['one two', 'three', 'a']
IDS = torch.randint(0, 256, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An export with rows of the vocabulary that no text has; code of exports is copied beside it, and one thread is
  enough for models of this size."""
  home, threads = tmp_path_factory.mktemp('exports'), torch.get_num_threads()
  torch.set_num_threads(1)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(transformers.dynamic_module_utils, 'HF_MODULES_CACHE', str(home / 'modules'))
    patch.setattr(sys, 'path', list(sys.path))
    export(MODEL, parts.params(MODEL), ByteTokenizer(), home / 'out')
    yield home / 'out'
  torch.set_num_threads(threads)


def load(folder, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope='module')
def host(folder):
  return load(folder)


@pytest.fixture(scope='module')
def tokenizer(folder):
  return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope='module')
def logits(host):
  with torch.no_grad():
    return host(IDS).logits


def near(a, b, tolerance=1e-5):
  torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Arguments -----------------------------------------------------------------------------------------------------------

WRONG_STEPS = [  # steps, where it comes from
    (0, 'a sweep that begins at nothing'), (-1, '"all of them" in other tools'), (2.5, 'a mean of budgets'),
    (True, 'a flag in the wrong place'), (math.nan, 'an empty cell of a table'), ('4', 'the command line'),
    ([], 'no steps'), ([0.5, 0.4], 'a sum that is not one'), ([1.5, -0.5], 'a step back'),
    ([0.5, math.nan], 'a mean of none'), ([True], 'a flag in a list'),
    (torch.tensor(3), 'a tensor, which beams would repeat')]


@pytest.mark.parametrize('steps, _', WRONG_STEPS, ids=str)
def test_a_wrong_number_of_steps_is_named(host, steps, _):
  for call in (lambda: host(IDS, steps=steps), lambda: host.generate(IDS, steps=steps, max_new_tokens=1)):
    with pytest.raises(ValueError, match='^steps = '):
      call()


def test_sizes_are_refused_where_the_model_is_not_told_them(folder):
  model = parts.ROWS['tmlt'].model
  export(model, parts.params(model), None, folder.with_name('untold'))
  with pytest.raises(ValueError, match=r'steps = \[0.75, 0.25\]: this model is not told'):
    load(folder.with_name('untold'))(IDS % parts.V, steps=[0.75, 0.25])


def test_steps_of_other_kinds_of_numbers_are_numbers(host, folder):
  with torch.no_grad():
    expected = host(IDS, steps=2).logits
    for steps in (np.int64(2), [0.5, 0.5], (np.float32(0.5), 0.5)):
      near(host(IDS, steps=steps).logits, expected)
    near(load(folder, loops=2)(IDS).logits, expected)
    assert host(IDS, steps=MODEL.loops + 5).logits.isfinite().all()  # as the library does: with a warning


def mask(*shape):
  return torch.ones(shape, dtype=torch.long)


REFUSED = [  # arguments, words of the error, where they come from
    ({'stpes': 2}, 'stpes', 'a misspelt name'), ({'token_type_ids': 0 * IDS}, 'token_type_ids', 'a foreign tokenizer'),
    ({'output_attentions': True}, 'output_attentions', 'a plot of attention'),
    ({'attention_mask': mask(2, 3)}, 'attention_mask', 'a mask of the new tokens alone'),
    ({'attention_mask': mask(2, 10, 10)}, 'attention_mask', 'a mask without heads'),
    ({'attention_mask': mask(2, 1, 4, 10)}, 'attention_mask', 'a mask of fewer queries'),
    ({'past_key_values': ((IDS, IDS),)}, 'past_key_values', 'tuples of older versions'),
    ({'inputs_embeds': torch.zeros(2, 10, parts.D)}, 'inputs_embeds', 'both kinds of input'),
    ({'labels': IDS, 'logits_to_keep': 3}, 'logits_to_keep', 'a loss of fewer logits'),
    ({'input_ids': torch.zeros(1, LENGTH + 1, dtype=torch.long)}, 'max_position_embeddings', 'a long text')]


@pytest.mark.parametrize('arguments, words, _', REFUSED, ids=[f'{sorted(row[0])} {row[2]}' for row in REFUSED])
def test_what_would_have_no_effect_is_refused(host, arguments, words, _):
  with pytest.raises((ValueError, TypeError), match=words):
    host(**{'input_ids': IDS, **arguments})


PASSED = [  # arguments that hosts pass, and who does
    ({'output_attentions': None, 'output_hidden_states': None, 'return_dict': None, 'inputs_embeds': None}, 'PEFT'),
    ({'cache_position': torch.arange(10), 'use_cache': True, 'logits_to_keep': 0}, 'generate of older versions'),
    ({'attention_mask': mask(2, 10), 'position_ids': torch.arange(10)[None], 'use_cache': False}, 'collators'),
    ({'attention_mask': mask(2, 10).bool()}, 'a mask of booleans'),
    ({'attention_mask': mask(2, 10).float()}, 'a mask of floats'),
    ({'attention_mask': torch.ones(10, 10).tril().bool()[None, None]}, 'a mask for every query'),
    ({'attention_mask': torch.full((10, 10), -math.inf).triu(1)[None, None]}, 'what is added to scores'),
    ({'num_items_in_batch': 5}, 'Trainer without labels')]


@pytest.mark.parametrize('arguments, _', PASSED, ids=[row[1] for row in PASSED])
def test_what_hosts_pass_is_taken(host, logits, arguments, _):
  with torch.no_grad():
    near(host(IDS, **arguments).logits, logits)


def test_a_part_of_the_logits(host, logits):
  with torch.no_grad():
    near(host(IDS, logits_to_keep=3).logits, logits[:, -3:])
    near(host(IDS, logits_to_keep=torch.tensor([1, 4])).logits, logits[:, [1, 4]])
    near(host(inputs_embeds=host.get_input_embeddings()(IDS)).logits, logits)
    assert len(host(IDS, return_dict=False, use_cache=False)) == 1


def test_texts_that_are_packed_into_a_row_see_themselves_alone(host):
  with torch.no_grad():
    packed = host(IDS.reshape(1, 20), position_ids=torch.arange(10).repeat(1, 2)).logits
    near(packed.reshape(2, 10, -1), host(IDS).logits)


def test_tokens_that_see_nothing_spoil_no_others(host, logits):
  ids, see = torch.nn.functional.pad(IDS, (2, 0)), torch.ones(12, 12).tril().bool()
  see[:, :2] = False
  added = torch.zeros(12, 12).masked_fill(~see, -math.inf)
  for given in (see, added):
    with torch.no_grad():
      out = host(ids, attention_mask=given[None, None], position_ids=(torch.arange(12) - 2).clamp(min=0)[None]).logits
    near(out[:, 2:], logits)


def test_padding_on_either_side_changes_nothing(host, logits):
  for left, right in ((3, 0), (0, 3), (2, 2)):
    ids = torch.nn.functional.pad(IDS, (left, right), value=7)
    with torch.no_grad():
      out = host(ids, attention_mask=torch.nn.functional.pad(mask(2, 10), (left, right))).logits
    near(out[:, left:left + 10], logits)


# Losses and gradients ------------------------------------------------------------------------------------------------


def test_losses_are_normalised_as_the_host_asks(host, logits):
  labels = IDS.masked_fill(torch.arange(10) > torch.tensor([[3], [8]]), -100)
  nll = -logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
  asked = labels[:, 1:] != -100
  with torch.no_grad():
    near(host(IDS, labels=labels).loss, nll[asked].mean())
    for count in (44, torch.tensor(44)):
      near(host(IDS, labels=labels, num_items_in_batch=count).loss, nll[asked].sum() / 44)


def gradients(model, **options):
  model.train().zero_grad()
  model(IDS, labels=IDS, steps=3, **options).loss.backward()
  found = {name: leaf.grad.clone() for name, leaf in model.named_parameters() if leaf.grad is not None}
  model.eval().zero_grad()
  return found


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_computes_twice_and_changes_no_gradient(folder, reentrant):
  model, calls = load(folder), []
  model.cell.core.layers[0].attn.qkv.register_forward_hook(lambda *_: calls.append(1))
  expected = gradients(model)
  assert len(calls) == 3 and len(expected) == len(dict(model.named_parameters()))
  model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': reentrant})
  given = gradients(model, use_cache=True)
  assert len(calls) == 9 and given.keys() == expected.keys()
  for name in expected:
    near(given[name], expected[name])
  with pytest.raises(ValueError, match='past_key_values: gradient checkpointing'), torch.enable_grad():
    gradients(model, past_key_values=load(folder)(IDS[:, :1]).past_key_values)
  model.gradient_checkpointing_disable()
  gradients(model)
  assert len(calls) == 12


def test_what_is_not_read_begins_so_that_it_learns(folder):
  config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
  torch.manual_seed(0)
  model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
  with torch.no_grad():
    assert abs(model(IDS, labels=IDS).loss - math.log(260)) < 0.2
  assert all(leaf.abs().max() > 0 for leaf in gradients(model).values())
  model.resize_token_embeddings(300, mean_resizing=False)
  assert model.get_input_embeddings().weight[260:].std() < 0.03
  assert dict(model.named_parameters()).keys() == dict(load(folder).named_parameters()).keys()


def texts():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 256, (8, 10))
  asked = np.arange(10) < rng.integers(2, 10, (8, 1))
  return [{'input_ids': row, 'labels': np.where(mask, row, -100), 'attention_mask': mask.astype(int)}
          for row, mask in zip(ids, asked)]


def trained(model, folder, micro: int, **options):
  """Loss, gradients of the first step, and loss of an evaluation by Trainer."""
  found = {}

  class Keep(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, *_, model, **__):
      found.update({name: leaf.grad.clone() for name, leaf in model.named_parameters() if leaf.grad is not None})

  arguments = transformers.TrainingArguments(
      output_dir=str(folder), per_device_train_batch_size=8 // micro, gradient_accumulation_steps=micro, max_steps=1,
      learning_rate=0.0, max_grad_norm=1e9, report_to=[], save_strategy='no', use_cpu=True, disable_tqdm=True,
      **options)
  trainer = transformers.Trainer(model=model, args=arguments, train_dataset=texts(), eval_dataset=texts(),
                                 callbacks=[Keep()])
  return trainer.train().training_loss, found, trainer.evaluate()['eval_loss']


def lora(model, **options):
  import peft
  torch.manual_seed(0)
  options = {'target_modules': 'all-linear', 'r': 2, 'init_lora_weights': False, **options}
  return peft.get_peft_model(model, peft.LoraConfig(task_type='CAUSAL_LM', **options)).eval()


@needs_accelerate
@pytest.mark.parametrize('wrap, options', [
    (lambda model: model, {}), pytest.param(lora, {'gradient_checkpointing': True}, marks=needs_peft)],
    ids=['whole', 'adapters, checkpointing'])
def test_trainer_finds_the_same_gradient_in_one_batch_and_in_four(folder, tmp_path, wrap, options):
  loss, expected, evaluated = trained(wrap(load(folder)), tmp_path, 1)
  other, given, _ = trained(wrap(load(folder)), tmp_path, 4, **options)
  assert abs(loss - evaluated) < 1e-3 and abs(other - loss) < 1e-4 and expected and given.keys() == expected.keys()
  for name in expected:
    near(given[name], expected[name])


# Generation ----------------------------------------------------------------------------------------------------------

WAYS = {'greedy': {}, 'sampled': {'do_sample': True, 'top_k': 5}, 'beams': {'num_beams': 3},
        'several answers': {'num_beams': 4, 'num_return_sequences': 2}}


def generated(host, tokenizer, prompts, side='left', new=5, **options):
  batch = tokenizer(prompts, return_tensors='pt', padding=True, padding_side=side)
  torch.manual_seed(0)
  out = host.generate(**batch, **{'max_new_tokens': new, 'do_sample': False, 'steps': 3, **options})
  return out[:, batch.input_ids.shape[1]:]


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('way', WAYS)
def test_a_cache_and_the_place_of_padding_change_no_text(host, tokenizer, way, side):
  cached, whole = (generated(host, tokenizer, PROMPTS, side, use_cache=use, **WAYS[way]) for use in (True, False))
  assert torch.equal(cached, whole) and cached.max() < tokenizer.vocab_size
  if way != 'sampled':
    alone = [generated(host, tokenizer, [prompt], **WAYS[way]) for prompt in PROMPTS]
    assert torch.equal(cached, torch.cat(alone))


@pytest.mark.parametrize('side', ['left', 'right'])
def test_logits_of_padded_rows_are_those_of_each_alone(host, tokenizer, side):
  batch = tokenizer(PROMPTS, return_tensors='pt', padding=True, padding_side=side)
  options = {'max_new_tokens': 4, 'do_sample': False, 'return_dict_in_generate': True, 'output_logits': True}
  together = torch.stack(host.generate(**batch, **options).logits, 1)
  for row, prompt in zip(together, PROMPTS):
    near(row, torch.stack(host.generate(**tokenizer(prompt, return_tensors='pt'), **options).logits, 1)[0], 1e-4)


def test_embeddings_are_gone_on_from_as_tokens_are(host, tokenizer):
  batch = tokenizer(PROMPTS, return_tensors='pt', padding=True)
  embeds = host.get_input_embeddings()(batch.input_ids)
  for way in ({}, {'num_beams': 3}):
    given = host.generate(inputs_embeds=embeds, attention_mask=batch.attention_mask, steps=3, max_new_tokens=5,
                          do_sample=False, **way)
    assert torch.equal(given, generated(host, tokenizer, PROMPTS, **way))


def test_a_string_stops_a_text(host, tokenizer):
  """Its tokenizer comes as far as `prepare_inputs_for_generation`, and is no argument of a pass."""
  whole = generated(host, tokenizer, PROMPTS[:1], new=20)[0]
  at = next(i for i, token in enumerate(whole.tolist()) if i and token < 128)
  assert whole[at] not in whole[:at]
  batch = tokenizer(PROMPTS[0], return_tensors='pt')
  out = host.generate(**batch, steps=3, max_new_tokens=20, do_sample=False, stop_strings=[chr(int(whole[at]))],
                      tokenizer=tokenizer)
  assert torch.equal(out[0, batch.input_ids.shape[1]:], whole[:at + 1])


def test_the_steps_are_those_of_every_token(host, tokenizer, folder):
  two = generated(host, tokenizer, PROMPTS, steps=2)
  assert torch.equal(two, generated(load(folder, loops=2), tokenizer, PROMPTS, steps=None))
  assert not torch.equal(two, generated(host, tokenizer, PROMPTS))
  assert torch.equal(two, generated(host, tokenizer, PROMPTS, steps=[0.5, 0.5]))


def test_caches_of_other_kinds(host, tokenizer, folder):
  expected = generated(host, tokenizer, PROMPTS)
  assert torch.equal(generated(host, tokenizer, PROMPTS, cache_implementation='static'), expected)
  cache = transformers.DynamicCache(config=host.config)  # made for four steps
  assert torch.equal(generated(host, tokenizer, PROMPTS, past_key_values=cache), expected)
  assert len(cache.layers) == host.config.num_hidden_layers == 2 + 4 * 2 + 1
  with pytest.raises(ValueError, match='StaticCache has 11 layers, and 8 steps need 19'):
    generated(host, tokenizer, PROMPTS, cache_implementation='static', steps=8)
  more = [generated(host, tokenizer, PROMPTS, use_cache=use, steps=MODEL.loops + 2) for use in (True, False)]
  assert torch.equal(*more)
  lookup = generated(host, tokenizer, PROMPTS[:1], prompt_lookup_num_tokens=2)
  assert torch.equal(lookup, generated(host, tokenizer, PROMPTS[:1]))
  assisted = generated(host, tokenizer, PROMPTS[:1], steps=None, assistant_model=load(folder, loops=1))
  assert torch.equal(assisted, generated(host, tokenizer, PROMPTS[:1], steps=None))


def test_a_cache_belongs_to_its_steps(host):
  cache = host(IDS).past_key_values
  with pytest.raises(ValueError, match='the cache holds tokens of 4 steps'):
    host(IDS[:, :1], cache=cache, steps=2)
  cache.crop(-10)
  assert not cache.get_seq_length() and host(IDS, cache=cache, steps=2).past_key_values is cache


def test_a_text_that_is_longer_than_the_positions_is_refused(host):
  with pytest.raises(ValueError, match=f'more than {LENGTH} tokens'):
    host.generate(IDS, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)


def test_hidden_states_are_those_of_every_loop(host, tokenizer):
  with torch.no_grad():
    states = host(IDS, steps=3, output_hidden_states=True).hidden_states
    near(host.get_output_embeddings()(states[-1]), host(IDS, steps=3).logits)
  trace = parts.forward(MODEL, parts.params(MODEL), IDS.numpy(), plans.schedule([1 / 3] * 3), None, loop.Every())
  assert len(states) == 5
  np.testing.assert_allclose(torch.stack(states[1:4]).numpy(), trace.xs, rtol=0, atol=1e-4)
  np.testing.assert_allclose(states[4].numpy(), trace.z, rtol=0, atol=1e-4)
  batch = tokenizer(PROMPTS[0], return_tensors='pt')
  out = host.generate(**batch, max_new_tokens=2, steps=3, output_hidden_states=True, return_dict_in_generate=True)
  shapes = [[tuple(state.shape) for state in token] for token in out.hidden_states]
  assert shapes == [[(1, 7, 16)] * 5, [(1, 1, 16)] * 5]


@pytest.mark.parametrize('name', ['llama', 'qwen3'])
def test_decoders_of_transformers_pad_and_generate(name, folder):
  model = DECODERS[name][0]
  model = model.clone(read_in=model.read_in.clone(vocab=260)) if name == 'llama' else model
  params = parts.params(model)
  if name == 'llama':
    target = folder.with_name('llama')
    export(model, params, ByteTokenizer(), target)
    decoder, words = load(target), transformers.AutoTokenizer.from_pretrained(target)
    batched = generated(decoder, words, PROMPTS, steps=None)
    alone = [generated(decoder, words, [prompt], steps=None) for prompt in PROMPTS]
    assert torch.equal(batched, torch.cat(alone)) and batched.max() < words.vocab_size
    assert decoder.config.use_cache and decoder.get_input_embeddings().padding_idx is None
    assert decoder.generation_config.pad_token_id == words.pad_token_id == words.eos_token_id == 256
  else:
    export(model, params, None, folder.with_name('qwen3'))
    decoder = load(folder.with_name('qwen3'))
    out = [decoder.generate(IDS % 40, max_new_tokens=3, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*out) and decoder.generation_config.suppress_tokens is None


def test_the_tokenizer_pads_on_the_left_with_the_end_of_a_text(host, tokenizer):
  batch = tokenizer(PROMPTS, return_tensors='pt', padding=True)
  assert sorted(batch) == ['attention_mask', 'input_ids'] and batch.attention_mask[1].tolist() == [0, 0, 1, 1, 1, 1, 1]
  assert host.config.pad_token_id == host.generation_config.pad_token_id == tokenizer.pad_token_id == 256
  pipe = transformers.pipeline('text-generation', model=host, tokenizer=tokenizer)
  out = pipe(PROMPTS, batch_size=3, max_new_tokens=4, do_sample=False, return_full_text=False)
  expected = [tokenizer.decode(row) for row in generated(host, tokenizer, PROMPTS, new=4, steps=None)]
  assert [row[0]['generated_text'] for row in out] == expected


# Files ---------------------------------------------------------------------------------------------------------------


def logits_of(folder):
  model, params, _ = from_pretrained(folder)
  return loopformer.logits(model, params, IDS.numpy() % model.read_in.vocab)


def test_what_transformers_saves_is_read_again(folder, tmp_path):
  deep = parts.looped(parts.plain(11), loops=1)  # whose names sort otherwise than their numbers
  export(deep, parts.params(deep), None, folder.with_name('deep'))
  host = load(folder.with_name('deep'))
  host.save_pretrained(tmp_path)
  back, params, _ = from_pretrained(tmp_path)
  assert back == deep
  same(params, parts.params(deep))
  assert torch.equal(load(tmp_path)(IDS % parts.V).logits, host(IDS % parts.V).logits)


def test_tensors_of_older_exports_are_read(folder, tmp_path):
  params = flatten_dict(parts.params(MODEL), sep='.')
  (tmp_path / 'config.json').write_bytes((folder / 'config.json').read_bytes())
  held = {name: (leaf.shape, lambda leaf=leaf: np.asarray(leaf)) for name, leaf in params.items()}
  tensors.write_folder(tmp_path, held, 'float32', 10**9)
  back, given, _ = from_pretrained(tmp_path)
  assert back == MODEL
  same(given, parts.params(MODEL))


def test_a_vocabulary_that_grows_and_a_head_that_is_untied(folder, tmp_path):
  model = load(folder)
  model.resize_token_embeddings(300, mean_resizing=False)
  assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
  model.save_pretrained(tmp_path / 'grown')
  model.config.tie_word_embeddings = False
  model.set_output_embeddings(torch.nn.Linear(parts.D, 300, bias=False))
  model.save_pretrained(tmp_path / 'untied')
  back, params, _ = from_pretrained(tmp_path / 'grown')
  assert back == MODEL.clone(read_in=MODEL.read_in.clone(vocab=300))
  np.testing.assert_array_equal(params['read_in']['embedding'], model.get_input_embeddings().weight.detach())
  with torch.no_grad():
    expected = model(IDS).logits
    assert load(tmp_path / 'grown')(IDS).logits.shape == expected.shape
    near(load(tmp_path / 'untied')(IDS).logits, expected)
  np.testing.assert_allclose(logits_of(tmp_path / 'untied'), expected.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize('options', [{'dtype': 'bfloat16'}, {'dtype': torch.float16},
                                     pytest.param({'device_map': 'cpu'}, marks=needs_accelerate)], ids=str)
def test_ways_to_load(folder, logits, options):
  model = load(folder, **options)
  with torch.no_grad():
    near(model(IDS).logits, logits, 0.05 * float(logits.abs().max()))
    assert model(IDS).logits.dtype == torch.float32 and model.dtype == options.get('dtype', model.dtype) or (
        str(model.dtype) == f'torch.{options["dtype"]}')
  assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 12)


def test_one_graph_is_compiled(host):
  with torch.no_grad():
    near(torch.compile(host, backend='eager', fullgraph=True)(IDS, steps=1).logits, host(IDS, steps=1).logits)


# PEFT and the harness ------------------------------------------------------------------------------------------------

ADAPTED = [  # options, modules that are adapted, who chooses so
    ({}, 5 * 4, 'all products of layers'), ({'target_modules': ['qkv', 'out']}, 5 * 2, 'attention, by names'),
    ({'target_modules': ['up'], 'layers_to_transform': [1], 'layers_pattern': 'layers'}, 2, 'second layers of stacks'),
    ({'target_modules': [], 'target_parameters': ['down.weight']}, 5, 'parameters by names')]


@needs_peft
@pytest.mark.parametrize('options, modules, _', ADAPTED, ids=[row[2] for row in ADAPTED])
def test_adapters_are_trained_and_merged(folder, logits, tmp_path, options, modules, _):
  model = lora(load(folder), **options)
  adapted = [name for name, leaf in model.named_parameters() if leaf.requires_grad]
  assert len(adapted) == 2 * modules
  with torch.no_grad():
    expected = model(IDS).logits
  assert (expected - logits).abs().max() > 1e-2
  model(input_ids=IDS, labels=IDS).loss.backward()
  assert all(leaf.grad.abs().max() > 0 for leaf in model.parameters() if leaf.requires_grad)
  assert model.generate(input_ids=IDS, max_new_tokens=2, steps=2).shape == (2, 12)
  model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / 'merged')
  with torch.no_grad():
    near(load(tmp_path / 'merged')(IDS).logits, expected, 1e-4 * float(expected.abs().max()))
  if not options:
    np.testing.assert_allclose(logits_of(tmp_path / 'merged'), expected.numpy(), rtol=1e-4, atol=1e-3)


@needs_peft
def test_products_that_do_not_exist_are_not_found(folder):
  with pytest.raises(ValueError, match='q_proj'):
    lora(load(folder), target_modules=['q_proj'])


@needs_peft
def test_learned_prompts(folder):
  import peft
  model = peft.get_peft_model(load(folder), peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3))
  model(input_ids=IDS, attention_mask=mask(2, 10), labels=IDS).loss.backward()
  assert all(leaf.grad.abs().max() > 0 for leaf in model.parameters() if leaf.requires_grad)


@needs_harness
@needs_accelerate
def test_the_harness_reads_and_generates(folder, tmp_path, monkeypatch):
  import lm_eval
  from lm_eval.tasks import TaskManager
  monkeypatch.setenv('HF_DATASETS_OFFLINE', '1')
  monkeypatch.setenv('HF_HOME', str(tmp_path))
  rows = tmp_path / 'rows.jsonl'
  rows.write_text(''.join(json.dumps({'text': text, 'answer': i % 2}) + '\n' for i, text in enumerate(PROMPTS)))
  about = {'dataset_path': 'json', 'dataset_kwargs': {'data_files': {'test': str(rows)}}, 'test_split': 'test',
           'doc_to_text': '{{text}}', 'doc_to_target': '{{answer}}'}
  kinds = {'choice': {'output_type': 'multiple_choice', 'doc_to_choice': ['yes', 'never']},
           'words': {'output_type': 'generate_until', 'generation_kwargs': {'until': ['\n'], 'max_gen_toks': 3}}}
  for name, kind in kinds.items():
    (tmp_path / f'{name}.yaml').write_text(json.dumps({'task': name, **about, **kind}))
  out = lm_eval.simple_evaluate(
      model='hf', model_args=f'pretrained={folder},trust_remote_code=True,loops=2,max_length={LENGTH}', device='cpu',
      tasks=['choice', 'words'], task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
      batch_size=2, bootstrap_iters=0)
  texts = [row['resps'][0][0] for row in out['samples']['words']]
  host, words = load(folder, loops=2), transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
  expected = generated(host, words, PROMPTS, new=3, steps=2)
  assert texts == [words.decode(row, skip_special_tokens=True).split('\n')[0] for row in expected]
  score = out['samples']['choice'][0]['resps'][1][0][0]
  ids = torch.tensor([words.encode('one two never')])
  with torch.no_grad():
    nll = host(ids).logits.log_softmax(-1)[0, 6:-1].gather(-1, ids[0, 7:, None]).sum()
  assert abs(float(score) - float(nll)) < 1e-3
