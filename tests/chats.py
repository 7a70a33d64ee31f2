"""A chat tokenizer over bytes, and templates as they are published."""
import json

from loopformer.data.tokenizer import ALPHABET, END, byte_level_bpe

IDS = {END: 256, '<|im_start|>': 257, '<|im_end|>': 258}
VOCAB = 259
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + "
          "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|im_start|>assistant\\n' }}{% endif %}")
MARKED = CHATML.replace("message['content'] | trim + '<|im_end|>' + '\\n' }}",
                        "'' }}{% if message['role'] == 'assistant' %}"
                        "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}{% else %}"
                        "{{ message['content'] | trim + '<|im_end|>' }}{% endif %}{{ '\\n' }}")
# As Qwen3's: what was thought stands before the last answer alone.
THINKS = ("{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
          "{% if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
          "{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
PLAIN = ("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
REFUSES = "{{ raise_exception('roles must alternate') }}"
TALK = [{'role': 'user', 'content': 'one?'}, {'role': 'assistant', 'content': 'Yes.'},
        {'role': 'user', 'content': 'Yes.'}, {'role': 'assistant', 'content': ' two '}]


def text() -> str:
  """The tokenizer.json."""
  return byte_level_bpe([*ALPHABET, *IDS], [], {i: True for i in IDS.values()})


def save(folder, template=CHATML, ends=(258, 256), where='jinja'):
  """Tokenizer, template and ends beside the weights of a model, as they are published."""
  (folder / 'tokenizer.json').write_text(text())
  about = {'eos_token': END, 'bos_token': None, 'tokenizer_class': 'PreTrainedTokenizerFast'}
  if where == 'jinja':
    (folder / 'chat_template.jinja').write_text(template)
  elif where:
    about['chat_template'] = template if where == 'config' else [
        {'name': 'tools', 'template': PLAIN}, {'name': 'default', 'template': template}]
  (folder / 'tokenizer_config.json').write_text(json.dumps(about))
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': list(ends)}))
