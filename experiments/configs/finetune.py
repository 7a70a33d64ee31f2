"""Fine-tuning: the model of any work folder, an import or a run, learns the answers of chats, or a text.

    python -m experiments.main --mode=import --from=SmolLM2-135M-Instruct --workdir=runs/smol
    python -m experiments.main --config=finetune:from=runs/smol,data=chats.jsonl --workdir=runs/tuned

Argument: any of

    from        the work folder whose last weights it starts from, and whose model, tokenizer and objective it has
    data        a glob of .jsonl files of chats: {"messages": [...]} or {"prompt": ..., "answer": ...} a row
    text        a glob of files of text, learned besides or instead
    share       of the examples that are of text, where both are given; 0.5
    validation  a glob of chats to validate on; a twentieth of `data` by default
    template    a file of a chat template; the tokenizer's own by default
    length      tokens of a row; the model's positions, 1024 at most, by default
    rank        of the update that every product of the layers learns, the rest frozen; 8; 0 trains all parameters
    each        1: an update for every loop; 0: one that all loops share, which exports merge into the weights
    steps, batch, peak (of the learning rate; 2e-4, of all parameters 2e-5), seed
    bf16        1: projections are held in bfloat16, their masters in float32; of a model whose products are bfloat16
    average     what of an average of the weights stays at each step, such as 0.999; 0 keeps none

How it is used: docs/finetune.md.
"""
from loopformer import config as configs
from loopformer.config import Experiment, arguments
from loopformer.data.batches import Separate
from loopformer.data.chat import SavedTokenizer
from loopformer.data.corpus import Conversations, Files
from loopformer.inference.evaluate import Depths
from loopformer.nn.low_rank import adapted, added
from loopformer.optim import AdamW, WarmupCosine
from loopformer.sharding import Mesh
from loopformer.tasks.instructions import Instructions
from loopformer.tasks.mixture import Mixture
from loopformer.tasks.text import Text
from loopformer.training.averages import Averaged
from loopformer.training.control import NoControl
from loopformer.training.frozen import Freeze
from loopformer.training.masters import Masters
from loopformer.training.train import Train
from loopformer.types import ConfigError, real, whole

MOST = 1024  # tokens of a row, if nothing else is said
SHARE = 0.5


def get_config(argument: str = '') -> Experiment:
  """The experiment of an argument such as `from=runs/smol,data=chats.jsonl,rank=16`."""
  given = arguments(argument, **{'from': ''}, data='', text='', share=float, validation='', template='', length=int,
                    rank=8, each=False, steps=1000, batch=8, peak=float, seed=0, bf16=False, average=0.0)
  source = given['from']
  if not source or not (given['data'] or given['text']):
    raise ConfigError('config argument: from and data (or text) are missing; give them, such as '
                      'finetune:from=runs/smol,data=chats.jsonl')
  for name, needed in (('validation', 'data'), ('template', 'data'), ('each', 'rank')):
    if given[name] and not given[needed]:
      raise ConfigError(f'config argument {name}: is read with {needed} alone; leave it out')
  if given['share'] is not None and not (given['data'] and given['text']):
    raise ConfigError('config argument share: is read with both data and text; leave it out')
  if given['length'] is not None:
    whole('config argument length', given['length'], 1)
  if given['peak'] is not None:
    real('config argument peak', given['peak'], '(0, inf)')
  old = configs.read(source)
  if old.model.sampler.denoises:
    raise ConfigError(f'config argument from = {source}: its model denoises, and answers and texts are learned here token by '
                      f'token; train it on by a configuration of its own, with --set train.start={source}')
  if given['each'] and old.model.loops == 1:
    raise ConfigError(f'config argument each = 1: the model of {source} has one loop, whose update is the one that all share; leave '
                      'it out')
  model = adapted(old.model, given['rank'], given['each']) if given['rank'] else old.model
  peak = (2e-4 if given['rank'] else 2e-5) if given['peak'] is None else given['peak']
  length = min(model.read_in.length, MOST) if given['length'] is None else given['length']
  optim = AdamW(schedule=WarmupCosine(peak=peak, end=0.0, warmup=given['steps'] // 30), b2=0.999, decay=0.0)
  if given['rank']:
    optim = Freeze(of=optim, paths=added(model, old.model))
  optim = Masters(of=optim) if given['bf16'] else optim
  return Experiment(
      name=f'finetune {old.name}', model=model, objective=old.objective, control=NoControl(), mesh=Mesh(),
      evals=old.evals if old.task.splits else Depths(budgets=(model.loops,)),
      task=_task(given, source, length),
      optim=Averaged(of=optim, decay=given['average']) if given['average'] else optim,
      train=Train(steps=given['steps'], batch=given['batch'], seed=given['seed'], start=source))


def _task(given: dict, source: str, length: int):
  """Chats, text, or both."""
  tokenizer, tasks = SavedTokenizer(path=source), {}
  if given['data']:
    held = (given['validation'],) if given['validation'] else ()
    corpus = Conversations(train=(given['data'],), validation_files=held)
    tasks['chats'] = Instructions(corpus=corpus, tokenizer=tokenizer, length=length, template=given['template'] or None)
  if given['text']:
    tasks['text'] = Text(corpus=Files(train=(given['text'],)), tokenizer=tokenizer, length=length,
                         documents=Separate())
  if len(tasks) == 1:
    return next(iter(tasks.values()))
  share = SHARE if given['share'] is None else given['share']
  return Mixture(of=tasks, weights={'chats': 1 - share, 'text': share})
