"""Decoding, compiled for a TPU that is not here: caches are written in place and read as they lie."""
import json

import pytest

from tests.parts import python

pytest.importorskip('libtpu', reason='compiles for TPUs with libtpu, which is not installed')

PROGRAM = '''
import json
import re

import jax
from jax.experimental import topologies
import jax.numpy as jnp

from experiments.benchmark.sizes import Size, make_model
from loopformer import backend
from loopformer.inference import engine
from loopformer.inference.flat import flattened
from loopformer.model import init_params

size = Size(width=256, heads=4, hidden=512, vocab=512, layers=1, loops=2, length=256, dtype='bfloat16')
topology = topologies.get_topology_desc(platform='tpu', topology_name='v5e:1x1', chips_per_host_bounds=(1, 1, 1))
place = jax.sharding.SingleDeviceSharding(topology.devices[0])


def there(tree):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)


with backend.compiling_for('tpu'):
  made = []

  def weights():
    model = make_model(size)
    model, params = flattened(model, init_params(model, jax.random.key(0)), transpose=True)
    made.append(model)
    return params

  params = jax.eval_shape(weights)
  state = jax.eval_shape(lambda params: engine.empty_rows(made[0], params, 64, size.length, size.loops), params)
  end, idle = there((jnp.int32(0), jnp.bool_(True)))
  program = engine.decode.lower(made[0], 16, 0, None, there(params), there(state), None, None, end,
                                idle).compile()
bytes_of = {'f32': 4, 'bf16': 2, 's32': 4, 'u32': 4, 'pred': 1}
copies, stored = [], True
for line in program.as_text().splitlines():
  if line and not line[0].isspace():  # the head of a computation; what is inside fusions is never stored
    stored = not line.startswith('%fused')
  found = re.match(r'\\s+(?:ROOT )?(%\\S+) = (\\w+)\\[([\\d,]*)\\]\\S* ([\\w-]+)\\(', line)
  if stored and found:
    name, dtype, shape, kind = found.groups()
    if kind in ('copy', 'transpose') or kind == 'fusion' and ('copy' in name or 'transpose' in name):
      count = 1
      for length in filter(None, shape.split(',')):
        count *= int(length)
      copies.append([count * bytes_of.get(dtype, 4), line.strip()[:120]])
print(json.dumps({'copies': copies, 'peak': program.memory_analysis().peak_memory_in_bytes,
                  'kept': sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((params, state.kv)))}))
'''


def test_no_copy_of_a_cache():
  """64 rows, whose caches take 17 MB a loop and layer, and keys or values of a layer 8 MB."""
  told = json.loads(python(PROGRAM, TPU_SKIP_MDS_QUERY='1', ALLOW_MULTIPLE_LIBTPU_LOAD='1', XLA_FLAGS='',
                           JAX_EXEC_TIME_OPTIMIZATION_EFFORT='-1.0').splitlines()[-1])
  assert [line for size, line in told['copies'] if size > 1e6] == []
  assert told['peak'] < 1.15 * told['kept']
