"""Evaluation, generation, loading, import and export on eight CPU devices against one; a program: prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.eight_inference
"""
import json
from pathlib import Path
import tempfile
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tools import machines
import loopformer
from loopformer import config as configs, convert, plans, sharding
from loopformer.config import Experiment
from loopformer.diffusion.sampler import Denoising
from loopformer.inference import exits, measures
from loopformer.inference.engine import Engine, decode, prefill
from loopformer.inference.evaluate import Run, evaluate, score
from loopformer.inference.harness import Scorer
from loopformer.model import parameter_roles
from loopformer.nn.embed import Head, TokenEmbed
from loopformer.nn.inject import Add
from loopformer.nn.kernels import Bidirectional
from loopformer.nn.layers import RMSNorm
from loopformer.nn.stack import Stack
from loopformer.objective import Objective, Rollout, Weighted
from loopformer.sharding import Mesh
from loopformer.tasks.generated import Generated
from loopformer.tasks.p_hop import PHop
from loopformer.terms import cross_entropy
from loopformer.terms.cross_entropy import CE
from loopformer.training.checkpoint import Checkpoints
from tests import parts
from tests.eight_devices import collectives, compare

MODEL = parts.looped(parts.timed(heads=4, groups=2))
ROLES = parameter_roles(MODEL)
DENOISER = parts.looped(parts.recur(Add(), Stack(parts.block(RMSNorm(), kernel=Bidirectional()), 1)),
                        read_in=TokenEmbed(vocab=parts.V + 1, width=parts.D, length=32), read_out=Head(outputs=parts.V),
                        sampler=Denoising())
LOOPS = 4
PROMPTS = ([1, 2, 3], [7], list(range(4, 20)), [9, 9], [], [3, 1, 2], [5] * 7, [11], [1, 2, 3, 4],
           list(range(4, 20)) + [8], [2, 7])  # more than rows, of unlike lengths, one of them the beginning of another
MESHES = {'rows': dict(data=4, fsdp=2), 'all': dict(data=2, fsdp=2, tensor=2)}


class Ids:
  """A tokenizer whose texts are ids."""
  eos, vocab_size = 0, parts.V

  def encode(self, text):
    return [int(word) for word in text.split()]

  def decode(self, ids):
    return ' '.join(map(str, ids))


def share(tree) -> float:
  """The part of the bytes that the first device holds."""
  leaves = jax.tree.leaves(tree)
  return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)


def expected_share(tree, mesh) -> float:
  """The same, by the partitions of training."""
  own = jax.tree.map(lambda leaf, s: np.prod(s.shard_shape(leaf.shape)), tree, sharding.shardings(tree, mesh, ROLES))
  return float(sum(jax.tree.leaves(own)) / sum(leaf.size for leaf in jax.tree.leaves(tree)))


def loaded(folder, params, mesh):
  """A work folder's weights restored, exported and imported, each in shards; nothing is fetched whole meanwhile."""
  objective = Objective(rolls={'r': Rollout(plans.Uniform(LOOPS))}, terms={'lm': Weighted(1.0, CE(roll='r'))})
  config = Experiment(name='small', model=MODEL, objective=objective, task=Generated(of=PHop(length=8)))
  configs.save(config, folder)
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, params, {'x': jnp.zeros(1)}, {}, {})
  with mock.patch('jax.device_get', side_effect=AssertionError('fetched whole')):
    model, ours, _, _ = loopformer.load(folder, mesh=mesh)
  for name, tree in (('one', params), ('mesh', ours)):
    convert.export(model, tree, None, folder / name)
  _, read, _ = convert.from_pretrained(folder / 'mesh', mesh=mesh)
  files = [(folder / name / 'model.safetensors').read_bytes() for name in ('one', 'mesh')]
  return {'share': share(ours), 'imported': share(read), 'expected': expected_share(ours, mesh),
          'error': compare(ours, params), 'import error': compare(read, params), 'same file': files[0] == files[1]}


def evaluated(params, measure, **runs):
  """Of two batches that no mesh divides."""
  batches = [{name: np.asarray(rows) for name, rows in parts.batch(count, seed=count).items()} for count in (6, 3)]
  return evaluate(MODEL, params, batches, {'2': plans.resolve(2), '4': plans.resolve(4), **runs},
                  np.ones(parts.V, np.int32), measure)


def differences(ours, theirs) -> dict[str, float]:
  """The largest of every column, relative to what is above one."""
  return {name: max(abs(a[name] - b[name]) / max(1.0, abs(b[name])) for a, b in zip(ours, theirs))
          for name in ours[0] if name != 'schedule'}


def score_program(params, mesh) -> dict:
  """Collectives of an evaluation whose loss has chunks that cut across rows."""
  batch = sharding.spread({name: np.asarray(rows) for name, rows in parts.batch(16).items()}, mesh)
  exit_policy, threshold = exits.compiled(exits.Final())
  with sharding.on(mesh), mock.patch.object(cross_entropy, 'at_once', lambda chunk, tokens: min(12, tokens)):
    text = score.lower(MODEL, measures.Tokens(), exit_policy, params, batch, plans.schedule(plans.resolve(LOOPS)),
                       np.ones(parts.V, np.int32), threshold).compile().as_text()
  return collectives(text, mesh)


def served(params):
  """(texts of all prompts, the engine)."""
  engine = Engine(MODEL, params, Ids(), rows=5, max_steps=4)
  for number, prompt in enumerate(PROMPTS):
    engine.submit(prompt, budget=(1, 3, 4)[number % 3], max_new_tokens=4 + number % 5, temperature=0.0)
  texts = engine.run()
  engine.submit(' '.join(map(str, PROMPTS[2])) + ' 8 8', temperature=0.7, seed=5, max_new_tokens=6, stop=('3',))
  return texts + engine.run(), engine


def served_by_programs(params, mesh):
  """As `served`, and collectives of the programs of prefill and decode that served."""
  compiled, seen = {}, {}

  def spy(name, function, dynamic):
    def call(*arguments):
      key = name, *(leaf.shape for leaf in jax.tree.leaves(arguments[dynamic]))
      if key not in compiled:
        compiled[key] = function.lower(*arguments).compile()
        seen[name] = collectives(compiled[key].as_text(), mesh)
      return compiled[key](*arguments[dynamic])
    return call

  with mock.patch('loopformer.inference.engine.prefill', spy('prefill', prefill, slice(1, 6))), \
      mock.patch('loopformer.inference.engine.decode', spy('decode', decode, slice(4, 10))):
    return *served(params), seen


def denoised(params):
  """(texts of prompts, more than rows, scores of the harness)."""
  served = DENOISER.sampler.serve(DENOISER, params, Ids(), rows=5)
  for number, prompt in enumerate([*PROMPTS[:7], '1 2 <mask:3> 4']):
    served.submit(prompt, budget=1 + number % 4, steps=1 + number % 3, seed=number, max_new_tokens=5)
  scorer = DENOISER.sampler.score(DENOISER, params, Ids(), batch=3, draws=2, steps=2)
  return served.run(), scorer.score([([1, 2, 3], [4, 5]), ([7], [8])])


def report(devices) -> dict:
  """What the tests look at."""
  params = parts.params(MODEL)
  gate = {'kl': Run(plan=plans.Uniform(LOOPS), exit=exits.Adaptive(rule=exits.KL(threshold=1e-2)))}
  tokens, answers = evaluated(params, measures.Tokens(), **gate), evaluated(params, measures.Answers())
  pairs = [([1, 2, 3], [4, 5]), ([7], [8]), ([2] * 9, [1, 1, 1])]
  texts, engine = served(params)
  scores = Scorer(MODEL, params, Ids(), batch=3).score(pairs)
  found = {'unlike': len(set(texts))}
  for name, sizes in MESHES.items():
    mesh = Mesh(**sizes).make(devices)
    divided = sharding.place(params, mesh, ROLES)
    whole = sharding.gathered(divided)
    theirs, own, programs = served_by_programs(whole, mesh)
    found[name] = {
        'evaluate': differences(evaluated(whole, measures.Tokens(), **gate), tokens),
        'score': score_program(whole, mesh), 'texts': theirs == texts, 'rows': len(own._of),
        'cache': list(own._rows.kv['loop'].k.addressable_shards[0].data.shape), 'bytes': own.bytes / engine.bytes,
        'kernels': [share(own.params['cell']['core']['blocks_0'][branch]) for branch in ('mlp', 'attn')],
        'programs': programs,
        'tally': [own.stats[count] == engine.stats[count] for count in ('tokens', 'passes')]}
  divided = sharding.place(params, Mesh(**MESHES['rows']).make(devices), ROLES)
  found['answers'] = differences(evaluated(divided, measures.Answers()), answers)
  mesh = Mesh(**MESHES['all']).make(devices)
  divided = sharding.place(params, mesh, ROLES)
  ours = Scorer(MODEL, divided, Ids(), batch=3).score(pairs)
  found['harness'] = max(abs(a - b) for (a, _), (b, _) in zip(ours, scores))
  weights = parts.params(DENOISER)
  alone = denoised(weights)
  own = denoised(sharding.place(weights, mesh, parameter_roles(DENOISER)))
  found['denoised'] = {'unlike': len(set(alone[0])), 'texts': own[0] == alone[0],
                       'scores': max(abs(a - b) for (a, _), (b, _) in zip(own[1], alone[1]))}
  found['meshes'] = [dict(machines.mesh_of(SimpleNamespace(model=MODEL, mesh=own), [], devices).shape) for own in (
      Mesh(), Mesh(fsdp=4, tensor=2), Mesh(data=1, fsdp=64), Mesh(tensor=8))]
  with tempfile.TemporaryDirectory() as folder:
    found['load'] = loaded(Path(folder), params, mesh)
  return found


def main():
  devices = jax.devices()
  assert len(devices) == 8, devices
  print(json.dumps(report(devices)))


if __name__ == '__main__':
  main()
