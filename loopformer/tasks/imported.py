"""No task: the folder holds a model that was not trained in it, and its tokenizer."""
from __future__ import annotations

from typing import Any, Callable, Mapping

from loopformer.inference import measures
from loopformer.types import ConfigError, config_dataclass


@config_dataclass
class Imported:
  """Of a model that came from elsewhere (`loopformer.Loaded.save`): its length, and no examples."""
  length: int
  measure: measures.Tokens = measures.Tokens()

  @property
  def splits(self) -> Mapping[str, int]:
    """None."""
    return {}

  def prepare(self, workdir: Any, log: Callable = print):
    """Raises ConfigError: there is nothing to learn from."""
    raise ConfigError(f'{workdir} holds an imported model and no task; to train it, write a configuration of the same '
                      f'model with a task, and give it train.start={workdir} and a work folder of its own')

  verify = prepare

  def tokenizer_of(self, workdir: Any) -> None:
    """None: the folder's own stands in it, if the model has one."""
    return None

  def examples(self, workdir: Any, split: str, seed: int):
    """As prepare."""
    self.prepare(workdir)
