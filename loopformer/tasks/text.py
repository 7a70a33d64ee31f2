"""Next-token prediction on text: windows of a corpus that is tokenised once into the work folder."""

from collections.abc import Callable
import dataclasses
import hashlib
import os

from loopformer import storage
from loopformer.data import batches, prepared
from loopformer.data.chat import SavedTokenizer
from loopformer.data.corpus import Files, HubDataset, StandardLibrary
from loopformer.data.tokenizer import Bytes, GivenJson, GivenPieces, Tokenizer, TrainedPieces, load_tokenizer
from loopformer.inference import measures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Task: predict each token of `length`-token windows of a corpus.

  `folder` is where the prepared data lives, or None for `data` in the work folder; give one to share it. Of a bucket,
  every machine keeps a copy.
  """

  corpus: StandardLibrary | Files | HubDataset = StandardLibrary()
  tokenizer: TrainedPieces | GivenPieces | GivenJson | SavedTokenizer | Bytes = TrainedPieces()
  length: int = 128
  documents: batches.Joined | batches.Separate = batches.Joined()
  folder: str | None = None
  measure: measures.Tokens = measures.Tokens()
  paths = ('folder',)

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f'Text.length={self.length}: give a positive number of tokens')

  @property
  def splits(self) -> dict[str, int]:
    """Name of each split that is not trained on -> tokens of its examples."""
    return {'validation': self.length}

  def prepare(self, workdir: str | os.PathLike, log: Callable = print) -> Tokenizer:
    """Tokenises the corpus, or reuses it; ValueError if a split does not fill one window."""
    done = prepared.prepare(self.corpus, self.tokenizer, self._folder(workdir), log=log)
    for split, counts in done.manifest['splits'].items():
      if counts['tokens'] <= self.length:
        raise ValueError(
          f'Text.length={self.length}: the {split} split has only {counts["tokens"]} tokens, less than one '
          'window and its last target; use a smaller task.length or a larger corpus'
        )
    return done.tokenizer

  def verify(self, workdir: str | os.PathLike, log: Callable = print) -> None:
    """Reads all data again; ValueError if it is not what was prepared."""
    prepared.verify(self.corpus, self.tokenizer, self._folder(workdir), log)

  def tokenizer_of(self, workdir: str | os.PathLike) -> Tokenizer:
    """The tokenizer of the prepared data."""
    return load_tokenizer(storage.path(self._folder(workdir)) / 'tokenizer')

  def examples(self, workdir: str | os.PathLike, split: str, seed: int):
    """Single examples as a grain MapDataset.

    train: endless, every epoch in its own order, a pure function of (seed, index). validation: each window once,
    in one order whatever the seed, so that the first n are a fair sample.
    """
    import grain

    stream, start = (prepared.open_split(self._folder(workdir), split),
                     prepared.load_manifest(self._folder(workdir)).get('start'))
    eos = self.tokenizer_of(workdir).eos
    windows = grain.MapDataset.source(batches.Windows(stream, self.length, eos, self.documents, start))
    if split == 'train':
      return windows.shuffle(mixed(seed)).repeat()
    return windows.shuffle(mixed(0))

  def describe(self, workdir: str | os.PathLike) -> dict:
    """Counts for logging: {split: {tokens, bytes, documents}}."""
    splits = prepared.load_manifest(self._folder(workdir))['splits']
    return {split: {n: counts[n] for n in ('tokens', 'bytes', 'documents')} for split, counts in splits.items()}

  def _folder(self, workdir) -> str:
    return str(storage.path(workdir) / 'data') if self.folder is None else self.folder


def mixed(seed: int) -> int:
  """A seed for grain, which adds the epoch's number to it: mixed, so that seeds 0 and 1 do not share epochs."""
  return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), 'big')
