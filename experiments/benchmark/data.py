"""Tokens a second of the input pipeline alone, and megabytes a second of tokenising."""
from __future__ import annotations

import functools
from pathlib import Path
import shutil
import statistics
import tempfile
from typing import Any

from experiments.benchmark.sizes import MEGA, Size, spread, take_turns
from experiments.configs.loopformer import SIZES
from loopformer.data import batches, prepared
from loopformer.data.corpus import StandardLibrary
from loopformer.data.tokenizer import Bytes, ByteTokenizer, PieceTokenizer
from loopformer.tasks.text import Text

PARTS = (SIZES['tiny'].task.tokenizer, Bytes())
DRAWN = 400_000  # tokens of a turn


def data_suite(size: Size, repeats: int, corpus: Any = StandardLibrary(), parts: tuple = PARTS,
               drawn: int = DRAWN) -> dict[str, list[dict]]:
  """Batches as a training run draws them, from the text that the tiny configuration reads, and how that is prepared.

  A processor second is one of one core, over all threads: where others use the machine too it says more than the clock.
  """
  with tempfile.TemporaryDirectory() as folder:
    pipeline = pipeline_rows(size, repeats, Path(folder), corpus, parts[0], max(1, drawn // size.tokens))
    return {'pipeline': pipeline, 'tokenising': tokenising_rows(repeats, Path(folder), corpus, parts)}


def pipeline_rows(size: Size, repeats: int, work: Path, corpus: Any, part: Any, count: int) -> list[dict]:
  """`count` shuffled batches a turn, for both ways to see the documents in a window."""
  contestants = {}
  for documents in (batches.Joined(), batches.Separate()):
    task = Text(corpus=corpus, tokenizer=part, length=size.length, documents=documents)
    task.prepare(work, log=quiet)
    draw = PlanContext(iter(batches.batches(task.examples(work, 'train', 0), batch=size.batch)), count)
    draw()  # fills the buffers
    contestants[repr(documents)] = draw
  seconds, busy = take_turns(contestants, repeats)
  return [{'documents': name, 'batch': size.batch, 'length': size.length,
           **rates('tokens/s', 'tokens per processor second', count * size.tokens, seconds[name], busy[name])}
          for name in contestants]


class PlanContext:
  """Takes the next `count` batches."""

  def __init__(self, batches: Any, count: int):
    self._batches, self._count = batches, count

  def __call__(self):
    for _ in range(self._count):
      next(self._batches)


def tokenising_rows(repeats: int, work: Path, corpus: Any, parts: tuple) -> list[dict]:
  """Encoding one chunk of texts that are in memory; and the whole preparation, from files to shards."""
  texts, chunk, whole = [], 0, 0
  for document in corpus.documents():
    size = len(document.text.encode('utf-8', 'replace'))
    whole += size
    if chunk < prepared.CHUNK:
      texts.append(document.text)
      chunk += size
  encoders, preparations = {}, {}
  for part in parts:
    prepare = Prepare(corpus, part, work / 'again')
    tokenizer = prepare().tokenizer
    threads = 1 if isinstance(tokenizer, ByteTokenizer) else 'all'
    preparations[repr(part), 'prepare', threads] = prepare
    encoders[repr(part), 'encode', threads] = functools.partial(tokenizer.encode_batch, texts)
    if isinstance(tokenizer, PieceTokenizer):
      from sentencepiece import SentencePieceProcessor
      alone = SentencePieceProcessor(model_proto=tokenizer.model, num_threads=1)
      encoders[repr(part), 'encode', 1] = functools.partial(alone.encode, texts)
  rows = []
  for contestants, volume, turns in ((encoders, chunk, repeats), (preparations, whole, min(repeats, 3))):
    seconds, busy = take_turns(contestants, turns)
    rows += [{'tokenizer': name, 'what': what, 'threads': threads, 'MB': volume / MEGA,
              **rates('MB/s', 'MB per processor second', volume / MEGA, seconds[name, what, threads],
                      busy[name, what, threads])}
             for name, what, threads in contestants]
  return rows


class Prepare:
  """Prepares a corpus in a folder that it then removes."""

  def __init__(self, corpus: Any, part: Any, folder: Path):
    self._corpus, self._part, self._folder = corpus, part, folder

  def __call__(self) -> prepared.Prepared:
    done = prepared.prepare(self._corpus, self._part, self._folder, log=quiet)
    shutil.rmtree(self._folder)
    return done


def rates(clock: str, core: str, amount: float, seconds: list[float], busy: list[float]) -> dict[str, Any]:
  """The median amount in a second of the clock, its range, and that in a second of one core."""
  values = [amount / s for s in seconds]
  return {clock: figure(statistics.median(values)), 'range': spread(values),
          core: figure(amount / statistics.median(busy))}


def figure(value: float) -> float:
  """Without decimals where they say nothing."""
  return round(value) if value >= 1000 else value


def quiet(line: str):
  del line
