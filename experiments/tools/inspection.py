"""What `--mode=inspect` shows of a prompt: tables and pictures of what every loop does (loopformer.trace)."""
from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import numpy as np

from experiments.tools import plots, records
from loopformer import storage
from loopformer.data.tokenizer import prompt_ids
from loopformer.diffusion.sampler import HOLE
from loopformer.inference.tracing import Insight
from loopformer.training import metrics
from loopformer.types import ConfigError

HIDDEN = '<mask>'


def encoded(model: Any, params: Any, tokenizer: Any, prompt: str, number: int) -> list[int]:
  """The ids of a prompt; of a model that denoises those of its holes too. Raises ConfigError naming the prompt."""
  if model.sampler.denoises:
    if not HOLE.search(prompt):
      raise ConfigError(f'--prompt={prompt!r}: a masked diffusion model answers where tokens are hidden; give it '
                        'holes, <mask> or <mask:5>')
    ids = model.sampler.serve(model, params, tokenizer, rows=1).encode(prompt)
  else:
    ids = prompt_ids(tokenizer, prompt)
  if not ids:
    raise ConfigError(f'--prompt={prompt!r}: prompt {number} has no tokens to inspect; give a text')
  if len(ids) > model.read_in.length:
    raise ConfigError(f'--prompt: prompt {number} has {len(ids)} tokens, more than the {model.read_in.length} '
                      'positions of the model (read_in.length); shorten it')
  return list(ids)


def text_of(tokenizer: Any, id_: int, hidden: int | None) -> str:
  """A token by itself, on one line: spaces and ends of lines are shown, what is no text is a number."""
  if id_ == hidden:
    return HIDDEN
  if id_ >= tokenizer.vocab_size:
    return f'<{id_}>'
  text = tokenizer.decode([id_])
  if not text or '\ufffd' in text or not text.replace('\n', '').replace('\t', '').isprintable():
    return f'<{id_}>'
  return text.replace('\n', '\u21b5').replace('\t', '\u21e5').replace(' ', '\u2423')


def places(insight: Insight, ids: Sequence[int], name: Any) -> list[dict]:
  """A row a loop and token of the one prompt: what it would answer there, with what probability, and how it moved.

  name: id -> text.
  """
  logits = np.asarray(insight.logits[:, 0], np.float64)  # [K, T, V]
  chances = np.exp(logits - logits.max(-1, keepdims=True))
  chances /= chances.sum(-1, keepdims=True)
  best = logits.argmax(-1)
  numbers = {field: np.asarray(getattr(insight, field)[:, 0]) for field in ('entropy', 'rms', 'cosine', 'update')}
  settled = insight.settled()[0]
  return [{'loop': k + 1, 'place': t, 'token': name(ids[t]), 'answer': name(int(best[k, t])),
           'probability': float(chances[k, t, best[k, t]]),
           **{field: float(values[k, t]) for field, values in numbers.items()}, 'settled': int(settled[t])}
          for k in range(insight.loops) for t in range(len(ids))]


def loops(insight: Insight, rows: list[dict], asked: Sequence[int]) -> list[dict]:
  """A row a loop: means over the tokens, of the answers those over the places `asked`; and the answer at the last of
  these."""
  table = []
  for k in range(insight.loops):
    own = [row for row in rows if row['loop'] == k + 1]
    last = own[asked[-1]]
    row = {'loop': k + 1, 'step': float(insight.plan.dt[k]), 'answer': last['answer'],
           'probability': last['probability'], 'entropy there': last['entropy'],
           'entropy': float(np.mean([own[t]['entropy'] for t in asked])),
           **{name: float(np.mean([row[name] for row in own])) for name in ('rms', 'cosine', 'update')}}
    if insight.attention is not None:
      row['attention'] = float(insight.attention[k].mean())
    table.append(row)
  return table


def heads(insight: Insight) -> list[dict]:
  """A row a loop, layer and head: the entropy of attention, a mean over tokens; none where it is unknown."""
  if insight.attention is None:
    return []
  means = insight.attention[:, :, 0].mean(-1)  # [K, N, H]
  return [{'loop': k + 1, 'layer': name, 'head': h, 'entropy': float(means[k, n, h])}
          for k in range(insight.loops) for n, name in enumerate(insight.layers) for h in range(means.shape[-1])]


def report(insight: Insight, ids: Sequence[int], name: Any, hidden: int | None, folder: Path | None, stem: str,
           title: str) -> str:
  """What is printed of one prompt; tables and pictures go to a folder, if one is given."""
  asked = [t for t, id_ in enumerate(ids) if id_ == hidden] if hidden is not None else range(len(ids))
  rows = places(insight, ids, name)
  table = loops(insight, rows, asked)
  last = rows[asked[-1]]
  where = 'in the last hole' if hidden is not None else 'after the last token'
  since = insight.settled()[0][list(asked)]
  first, late = int((since == 1).sum()), int((since == insight.loops).sum()) if insight.loops > 1 else 0
  lines = [metrics.table(table), f'{where}: {table[-1]["answer"]!r}, which is the answer since loop {last["settled"]}; '
           f'of {len(since)} {"places" if len(since) > 1 else "place"} {first} never changed after loop 1, and {late} '
           'changed in the last']
  lines += [f'{field}: unknown, {why}' for field, why in insight.unknown.items()]
  if folder is not None:
    folder.mkdir(parents=True, exist_ok=True)
    of_heads = heads(insight)
    for kind, found in (('loops', table), ('places', rows), ('attention', of_heads)):
      if found:
        records.write(folder / f'{stem}{kind}.json', found)
        metrics.write_csv(folder / f'{stem}{kind}.csv', found)
    plots.answers(folder / f'{stem}answers.png', rows, title)
    plots.motion(folder / f'{stem}motion.png', rows, title)
    if of_heads:
      plots.attention(folder / f'{stem}attention.png', of_heads, title)
  return '\n'.join(lines)


def inspect(model: Any, params: Any, tokenizer: Any, prompts: Sequence[str], steps: Any, folder: Path | None,
            title: str, log: Any):
  """Traces every prompt, prints what its loops did, and writes it to the folder, if one is given."""
  from loopformer.inference.tracing import trace
  hidden = model.outputs if model.sampler.denoises else None
  if folder is not None:
    storage.check(folder, 'workdir', writes=True)
  for number, prompt in enumerate(prompts):
    ids = encoded(model, params, tokenizer, prompt, number)
    try:
      insight = trace(model, params, np.asarray([ids]), steps=steps)
    except ConfigError as error:
      raise ConfigError(f'--prompt: prompt {number}: {error}') from error
    stem = f'{number}-' if len(prompts) > 1 else ''
    log(f'--- {insight.loops} loops, {len(ids)} tokens\n{prompt}')
    log(report(insight, ids, lambda id_: text_of(tokenizer, id_, hidden), hidden, folder, stem, title))
