"""Tokens a second with drafts of few loops that all loops judge, on a trained checkpoint."""
from __future__ import annotations

import statistics
import time
from typing import Iterable

from experiments.benchmark.sizes import spread
from loopformer.inference.engine import Engine


def draft_suite(workdir: str, repeats: int, new: int = 128, temperatures: Iterable[float] = (0.0, 1.0),
                drafts: Iterable[tuple[int, int]] = ((1, 3), (1, 4), (1, 5), (1, 6), (2, 4)),
                prompts: int = 4) -> dict[str, list[dict]]:
  """Tokens a second at one row, plain and with drafts (loops, tokens ahead), in turns; a few texts that the model was
  not trained on are continued, one after the other."""
  import loopformer
  model, params, tokenizer, config = loopformer.load(workdir)
  examples = config.task.examples(workdir, 'validation', 0)
  texts = [[int(token) for token in examples[i]['tokens'][:32]] for i in range(prompts)]
  new = min(new, model.read_in.length - len(texts[0]))
  rows = []
  for temperature in temperatures:
    contestants = {None: Engine(model, params, tokenizer, rows=1)}
    contestants |= {draft: Engine(model, params, tokenizer, rows=1, draft=draft[0],
                                  num_draft=draft[1]) for draft in drafts}
    seconds, drawn = {name: [] for name in contestants}, {name: [] for name in contestants}
    for turn in range(repeats + 1):
      for name, engine in contestants.items():
        before = engine.stats['tokens']
        for text in texts:
          engine.submit(text, max_new_tokens=new, temperature=temperature, seed=turn)
        start = time.perf_counter()
        engine.run()
        if turn:
          seconds[name].append(time.perf_counter() - start)
          drawn[name].append(engine.stats['tokens'] - before)
    rates = {name: [n / s for n, s in zip(drawn[name], seconds[name])] for name in contestants}
    for name, engine in contestants.items():
      ratios = [ours / plain for ours, plain in zip(rates[name], rates[None])]
      rows.append({'temperature': temperature, 'draft': '-' if name is None else f'{name[0]} loops, {name[1]} ahead',
                   'tokens/s': round(statistics.median(rates[name])), 'times plain': statistics.median(ratios),
                   'range': spread(ratios), 'accepted': engine.stats.get('accepted', '-')})
  return {'draft': rows}
