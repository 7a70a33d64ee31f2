"""Chat tokenizers: templates, what an answer is, the ids that end one, and where they are kept."""
import dataclasses
import io
import json

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

import loopformer
from loopformer.convert import export
from loopformer.convert.pretrained import read_tokenizer
from loopformer.data.chat import ChatTokenizer, MarkedTokenizer
from loopformer.data.tokenizer import (
  END,
  ByteTokenizer,
  JsonTokenizer,
  PieceTokenizer,
  TrainedPieces,
  before_text,
  load_tokenizer,
  prompt_ids,
  start_of,
)
from loopformer.inference.engine import Engine
from loopformer.types import ConfigError
from tests import chats, parts
from tests.chats import CHATML, MARKED, PLAIN, REFUSES, TALK, THINKS

pytest.importorskip('jinja2')
pytest.importorskip('tokenizers')


def chat(template=CHATML, **fields) -> ChatTokenizer:
  return ChatTokenizer(of=JsonTokenizer(text=chats.text(), eos=256), template=template, **fields)


def asked(tokenizer, messages) -> list[str]:
  """The runs of ids that are asked for, as text in which special ids are seen."""
  ids, marks = tokenizer.conversation(messages)
  names = {i: name for name, i in tokenizer.specials().items()}
  runs = ['']
  for i, mark in zip(ids, marks):
    if mark:
      runs[-1] += names.get(i) or tokenizer.decode([i])
    elif runs[-1]:
      runs.append('')
  return [run for run in runs if run]


@pytest.mark.parametrize('template, expected', [
    (CHATML, ['Yes.<|im_end|>', 'two<|im_end|>']), (MARKED, ['Yes.<|im_end|>', 'two<|im_end|>']),
    (THINKS, ['Yes.<|im_end|>', '<think>\n\n</think>\n\n two <|im_end|>']), (PLAIN, ['Yes.', f' two {END}'])])
def test_an_answer_is_what_the_model_says_itself_and_what_ends_it(template, expected):
  """An answer that repeats the question's words too; of a template that rewrites earlier turns too."""
  assert asked(chat(template), TALK) == expected


@pytest.mark.parametrize('template, first', [
    (CHATML, 'Yes.<|im_end|>'), (PLAIN, 'Yes.'), ("{{ messages[0].role }}, " + PLAIN, 'Yes.')],
                         ids=['chatml', 'plain', 'needs one'])
def test_an_answer_that_nobody_asked_for_is_learned_without_what_is_written_before_it(template, first):
  assert asked(chat(template), TALK[1:])[0] == first


def test_a_chat_is_a_text_of_special_tokens():
  ids = chat().chat(TALK[:1])
  assert ids == [257, *b'user\none?', 258, *b'\n', 257, *b'assistant\n']
  assert chat().conversation(TALK)[0][:len(ids)] == ids
  pieces = ChatTokenizer(of=ByteTokenizer(), template=CHATML.replace('<|im_end|>', END))
  assert pieces.chat(TALK[:1])[-20:] == [*b'?', 256, *b'\n<|im_start|>assistant\n'][-20:]


@pytest.mark.parametrize('template', [CHATML, THINKS, PLAIN])
def test_ids_are_those_of_transformers(template, tmp_path):
  transformers = pytest.importorskip('transformers')
  chats.save(tmp_path, template)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  ours = read_tokenizer(tmp_path, {})
  assert ours.chat(TALK[:3]) == theirs.apply_chat_template(TALK[:3], add_generation_prompt=True)['input_ids']
  whole = theirs.apply_chat_template(TALK)['input_ids']
  ids = ours.conversation(TALK)[0]
  assert ids == whole or ids == [*whole[:-1], 256]  # the newline of a template that ends no turn


def test_templates_are_given_what_transformers_gives():
  text = ("{%- for m in messages -%}\n  {% if m.role == 'system' %}{% continue %}{% endif %}\n"
          "{{ {'a': '<é>'} | tojson }}{{ strftime_now('%Y') | length }}{{ bos_token }}{%- endfor -%}"
          "{{ tools is none }}")
  tokenizer = chat(text, names=(('bos_token', '<|im_start|>'),))
  assert tokenizer.decode(tokenizer.chat(TALK[:1])) == '{"a": "<é>"}4True'
  assert 257 in tokenizer.chat(TALK[:1])


@pytest.mark.parametrize('messages, template, message', [
    (TALK[:1], None, 'the tokenizer has no chat template; put chat_template.jinja beside'),
    (TALK[:1], REFUSES, r'the chat template fails on these messages \(TemplateError: roles must alternate\)'),
    (TALK[:1], "{{ messages[0]['content'] + 1 }}", r'fails on these messages \(TypeError'),
    (TALK[:1], '{{ messages.append(1) }}', r'fails on these messages \(SecurityError'),
    (TALK[:1], "{{ ''.__class__.__mro__ }}", r'fails on these messages \(SecurityError'),
    (TALK[:1], '{% for %}', r'the chat template cannot be read \(line 1:'),
    (TALK[:2], CHATML, "the last is of the role 'assistant'"),
    ([], CHATML, 'give a list of objects with role and content'),
    ([{'content': 'x'}], CHATML, 'message 1 has no role'),
    ([{'role': 'user', 'content': 3}], CHATML, 'the content of message 1 is int'),
    ([{'role': 'user', 'content': '\ufdd0'}], CHATML, r'U\+FDD0')])
def test_what_cannot_be_a_chat_is_said_in_one_line(messages, template, message):
  with pytest.raises(ConfigError, match=message) as caught:
    chat(template).chat(messages)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('messages, template, message', [
    (TALK[:1], CHATML, 'none of them is an answer'),
    ([TALK[0], {'role': 'assistant', 'content': ' '}], CHATML, 'none of them is an answer'),
    (TALK, '{{ messages[0].content }}', 'leaves out message 2, an answer')])
def test_a_conversation_without_an_answer(messages, template, message):
  with pytest.raises(ConfigError, match=message):
    chat(template).conversation(messages)


def test_the_end_of_a_turn_becomes_an_end():
  assert chat().ends == (256,) and chat().ending_turns().ends == (256, 258)
  assert chat(stops=(258,)).ending_turns() == chat(stops=(258,)) and chat(PLAIN).ending_turns().ends == (256,)


def test_it_is_saved_and_read_again(tmp_path):
  tokenizer = chat(stops=(258,), names=(('eos_token', END),))
  tokenizer.save(tmp_path)
  again = load_tokenizer(tmp_path)
  assert again == tokenizer and again.fingerprint() == tokenizer.fingerprint()
  for field, value in (('stops', ()), ('template', PLAIN), ('names', ()), ('start', 257)):
    assert dataclasses.replace(tokenizer, **{field: value}).fingerprint() != tokenizer.fingerprint()
  about = json.loads((tmp_path / 'tokenizer.json').read_text())
  (tmp_path / 'tokenizer.json').write_text(json.dumps({**about, 'stops': [999]}))
  with pytest.raises(ConfigError, match='999 is none of the ids'):
    load_tokenizer(tmp_path)
  (tmp_path / 'tokenizer.json').write_text(json.dumps({**about, 'stops': []}))
  with pytest.raises(ValueError, match='the fingerprint is not that'):
    load_tokenizer(tmp_path)


def test_answers_that_are_marked_are_those_of_a_chat(tmp_path):
  MarkedTokenizer(of=chat()).save(tmp_path)
  assert load_tokenizer(tmp_path) == MarkedTokenizer(of=chat())
  ByteTokenizer().save(tmp_path / 'of')
  with pytest.raises(ConfigError, match=r'tokenizer\.json is damaged: the tokenizer in of/ is none of chats; delete'):
    load_tokenizer(tmp_path)


@pytest.mark.parametrize('where', ['jinja', 'config', 'list', None])
def test_files_say_template_and_ends(where, tmp_path):
  chats.save(tmp_path, where=where)
  tokenizer = read_tokenizer(tmp_path, {'eos_token_id': 7})  # which the other file overrules
  assert tokenizer.ends == (256, 258) and tokenizer.template == (CHATML if where else None)
  assert dict(tokenizer.names) == {'eos_token': END}
  (tmp_path / 'generation_config.json').unlink()
  assert read_tokenizer(tmp_path, {'eos_token_id': [256, 7]}).ends == (256, 7)
  with pytest.raises(ConfigError, match=r'config\.json: eos_token_id = \[256, 999\]: 999 is none of the 259 ids'):
    read_tokenizer(tmp_path, {'eos_token_id': [256, 999]})


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
  """Though the file says so: transformers saves what the last call asked for."""
  chats.save(tmp_path, where=None, ends=(256,))
  (tmp_path / 'tokenizer.json').write_text(json.dumps(json.loads(chats.text()) | {
      'truncation': {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0},
      'padding': {'strategy': 'BatchLongest', 'direction': 'Left', 'pad_to_multiple_of': None, 'pad_id': 256,
                  'pad_type_id': 0, 'pad_token': END}}))
  assert read_tokenizer(tmp_path, {}).encode_batch(['abc', 'd']) == [[97, 98, 99], [100]]


BOS = '<|im_start|>'
ADDS = {'type': 'Sequence', 'processors': [
    {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True},
    {'type': 'TemplateProcessing', 'pair': [],
     'single': [{'SpecialToken': {'id': BOS, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
     'special_tokens': {BOS: {'id': BOS, 'ids': [257], 'tokens': [BOS]}}}]}


@pytest.mark.parametrize('post, about, start', [
    (None, {}, None), (ADDS, {}, 257), (ADDS, {'add_bos_token': False}, None),
    (None, {'add_bos_token': True, 'bos_token': BOS}, 257),
    (None, {'tokenizer_class': 'LlamaTokenizer', 'bos_token': {'content': BOS}}, 257),
    (None, {'add_bos_token': True}, None)])
def test_files_say_what_begins_a_text(post, about, start, tmp_path):
  chats.save(tmp_path, where=None, ends=(256,))
  (tmp_path / 'tokenizer.json').write_text(json.dumps(json.loads(chats.text()) | {'post_processor': post}))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': END} | about))
  tokenizer = read_tokenizer(tmp_path, {})
  assert start_of(tokenizer) == start and before_text(tokenizer) == (start or 256)
  first = [] if start is None else [start]
  assert tokenizer.encode('ab') == [97, 98] and prompt_ids(tokenizer, 'ab') == [*first, 97, 98]
  assert prompt_ids(tokenizer, f'{BOS}ab') == [257, 97, 98] and prompt_ids(tokenizer, '') == first
  tokenizer.save(tmp_path / 'saved')
  assert load_tokenizer(tmp_path / 'saved') == tokenizer


@pytest.mark.parametrize('whole', [True, False])
def test_what_two_files_say_of_special_tokens(whole, tmp_path):
  """The configuration of a tokenizer counts where it is one of newer transformers', or else the map beside it."""
  chats.save(tmp_path)
  about = {'eos_token': END, 'bos_token': None} | ({'added_tokens_decoder': {}} if whole else {})
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(about))
  (tmp_path / 'special_tokens_map.json').write_text(json.dumps({'eos_token': {'content': '<|im_end|>'},
                                                                'pad_token': END}))
  tokenizer = read_tokenizer(tmp_path, {'bos_token_id': 257})
  assert tokenizer.ends == ((256, 258) if whole else (258, 256))
  assert dict(tokenizer.names) == {'eos_token': END if whole else '<|im_end|>', 'pad_token': END}


def test_of_several_templates_one_is_called_default(tmp_path):
  chats.save(tmp_path, where=None)
  for templates, found in (([{'name': 'tools', 'template': PLAIN}], PLAIN), ([], None), (
      [{'name': 'tools', 'template': PLAIN}, {'name': 'rag', 'template': CHATML}],
      "'tools', 'rag', and none is called default")):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': END, 'chat_template': templates}))
    if found in (PLAIN, None):
      assert read_tokenizer(tmp_path, {}).template == found
    else:
      with pytest.raises(ConfigError, match=found):
        read_tokenizer(tmp_path, {})


@pytest.mark.parametrize('where', ['added_tokens.json', 'tokenizer_config.json'])
@pytest.mark.parametrize('name', ['tokenizer.model', 'tokenizer.json'])
def test_tokens_that_other_files_add(where, name, tmp_path):
  pieces = TrainedPieces(vocab=300).build(['some text, which is read again and again'])
  first = '<unk>' if name == 'tokenizer.model' else END
  (tmp_path / name).write_bytes(pieces.model if name == 'tokenizer.model' else chats.text().encode())
  # one that no text has, one that is known
  (tmp_path / 'added_tokens.json').write_text(json.dumps({'[PAD]': 300, first: 0}))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'pad_token': '[PAD]'}))
  assert read_tokenizer(tmp_path, {'eos_token_id': 256}).encode('text')
  told = {'added_tokens.json': {'<call>': 300}, 'tokenizer_config.json': {
      'pad_token': '[PAD]', 'added_tokens_decoder': {'0': {'content': first}, '301': {'content': '<call>'}}}}[where]
  (tmp_path / where).write_text(json.dumps(told))
  with pytest.raises(ConfigError,
                     match=f"other files add '<call>' to the tokens of {name}; put a tokenizer.json there"):
    read_tokenizer(tmp_path, {'eos_token_id': 256})


@pytest.mark.parametrize('about', [{'eos_token': 256}, {'bos_token': ['<s>']}, {'added_tokens_decoder': [1]}], ids=str)
def test_what_is_no_name_of_a_token(about, tmp_path):
  chats.save(tmp_path)
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': END} | about))
  with pytest.raises(ConfigError, match=f'tokenizer_config.json: {next(iter(about))} = '):
    read_tokenizer(tmp_path, {})


def test_nothing_to_say_leaves_the_tokenizer_as_it_is(tmp_path):
  chats.save(tmp_path, where=None, ends=(256,))
  assert type(read_tokenizer(tmp_path, {})) is JsonTokenizer


# Generation and exports ----------------------------------------------------------------------------------------------

MODEL = parts.ROWS['base_loop'].model.clone(loops=1)
MODEL = MODEL.clone(read_in=MODEL.read_in.clone(vocab=chats.VOCAB))
ROWS = 3


@pytest.fixture(scope='module')
def weights():
  return parts.params(MODEL)


def drawn(weights, stop: int) -> tuple[list[list[int]], list[str]]:
  """Ids and texts of a few requests that end at 256 and at another id; one program for all of these."""
  engine = Engine(MODEL, weights, chat(stops=(stop,)), rows=ROWS, length=16, max_steps=4)
  for seed in range(ROWS):
    engine.submit([97, 98], max_new_tokens=12, seed=seed, temperature=5.0)
  texts = engine.run()
  return [request.drawn for request in sorted(engine._of, key=lambda request: request.number)], texts


def test_generation_stops_at_any_of_the_ends(weights):
  """At one that comes first of all, and at one that comes later; the others go on as they were."""
  whole, _ = drawn(weights, 258)
  assert not {256, 258} & {i for ids in whole for i in ids} and {len(ids) for ids in whole} == {12}
  for stop in (whole[1][0], whole[2][5]):
    ids, texts = drawn(weights, stop)
    assert ids == [row[:row.index(stop) + 1] if stop in row else row for row in whole]
    assert texts == [chat().decode(row[:-1] if row[-1] == stop else row) for row in ids]


def test_messages_are_a_prompt(weights):
  tokenizer, wide = chat(), MODEL.clone(read_in=MODEL.read_in.clone(length=64))
  engine = Engine(wide, weights, tokenizer, rows=1)
  engine.submit(TALK[:1], max_new_tokens=4)
  assert engine._waiting[0].prompt == tokenizer.chat(TALK[:1])
  engine = Engine(wide, weights, dataclasses.replace(tokenizer, start=257), rows=1)
  for prompt in ('ab', '', TALK[:1], [97]):  # a text has it, a chat what its template says
    engine.submit(prompt, max_new_tokens=4)
  assert [request.prompt for request in engine._waiting] == [[257, 97, 98], [257], tokenizer.chat(TALK[:1]), [97]]
  with pytest.raises(ConfigError, match='prompt 0: the tokenizer has no chat template'):
    loopformer.generate(wide, weights, tokenizer.of, [TALK[:1]])


def test_an_export_of_pieces_says_what_begins_a_text(tmp_path):
  made = io.BytesIO()
  SentencePieceTrainer.train(sentence_iterator=iter(['some text, which is read'] * 9), model_writer=made,
                             model_type='bpe', vocab_size=280, byte_fallback=True, minloglevel=2,
                             hard_vocab_limit=False)
  tokenizer = ChatTokenizer(of=PieceTokenizer(model=made.getvalue()), start=1,
                            names=(('bos_token', '<s>'), ('eos_token', '</s>')))
  model = MODEL.clone(read_in=MODEL.read_in.clone(vocab=tokenizer.vocab_size))
  export(model, parts.params(model), tokenizer, tmp_path / 'out')
  assert tokenizer.hugging_face() is None
  assert read_tokenizer(tmp_path / 'out', json.loads((tmp_path / 'out/config.json').read_text())) == tokenizer


def test_an_export_has_template_and_ends(weights, tmp_path):
  tokenizer = chat(stops=(258,), start=257,
                   names=(('bos_token', '<|im_start|>'), ('eos_token', END), ('pad_token', END)))
  export(MODEL, weights, tokenizer, tmp_path / 'out')
  assert read_tokenizer(tmp_path / 'out', json.loads((tmp_path / 'out/config.json').read_text())) == tokenizer
  assert json.loads((tmp_path / 'out/generation_config.json').read_text())['eos_token_id'] == [256, 258]
  assert json.loads((tmp_path / 'out/config.json').read_text())['bos_token_id'] == 257
  export(MODEL, weights, tokenizer.of, tmp_path / 'out')  # it may be replaced
  assert json.loads((tmp_path / 'out/config.json').read_text())['eos_token_id'] == 256
  transformers = pytest.importorskip('transformers')
  export(MODEL, weights, tokenizer, tmp_path / 'out')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert np.array_equal(theirs.apply_chat_template(TALK[:1], add_generation_prompt=True)['input_ids'],
                        tokenizer.chat(TALK[:1]))
