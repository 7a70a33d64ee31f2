"""What the script for mutants changes, and what it leaves alone. Nothing is run."""
import ast

from tests import mutate

SOURCE = b'''
"""Words: 1 < 2."""
from a import b


@jax.jit(static_argnums=0)
def f(x: int | None, y=2):
  """And 3 more."""
  if (x) < y and not x:
    raise ValueError(f'{x + 1} is too little', 4)
  x = jnp.min(x) * 0.5
  x += 1
  z = call(x, y.seg, keep=True, noise=y)
  w = stop_gradient(x) if z in y else -x
  return z, w, "\xc3\xa9" + x
'''


def test_what_is_changed():
  found = {mutant.shown(SOURCE) for mutant in mutate.mutants(SOURCE)}
  changed = {}
  for before, after in found:
    changed.setdefault(before, set()).add(after)
  assert changed == {
      'def f(x: int | None, y=2):': {'def f(x: int | None, y=3):'},
      'if (x) < y and not x:': {'if (x) <= y and not x:', 'if (x) >= y and not x:', 'if (x) < y or not x:',
                                'if (x) < y and x:', 'if not ((x) < y and not x):'},
      "raise ValueError(f'{x + 1} is too little', 4)": {'pass'},
      'x = jnp.min(x) * 0.5': {'x = jnp.max(x) * 0.5', 'x = jnp.min(x) / 0.5', 'x = jnp.min(x) * 1.0', 'pass'},
      'x += 1': {'pass', 'x -= 1', 'x += 2'},
      'z = call(x, y.seg, keep=True, noise=y)': {
          'z = call(x, None, keep=True, noise=y)', 'z = call(x, y.seg, noise=y)', 'z = call(x, y.seg, keep=True)',
          'z = call(x, y.seg, keep=False, noise=y)'},
      'w = stop_gradient(x) if z in y else -x': {
          'w = (x) if z in y else -x', 'w = stop_gradient(x) if z not in y else -x',
          'w = stop_gradient(x) if not (z in y) else -x', 'w = stop_gradient(x) if z in y else x'},
      'return z, w, "\u00e9" + x': {'return z, w, "\u00e9" - x'}}
  for mutant in mutate.mutants(SOURCE):
    before, after = SOURCE.splitlines(), mutant.apply(SOURCE).splitlines()
    assert [i + 1 for i, (a, b) in enumerate(zip(before, after)) if a != b] == [mutant.line]
    ast.parse(mutant.apply(SOURCE))


def test_a_sample_takes_every_line_before_one_twice():
  found = mutate.mutants(SOURCE)
  lines = {mutant.line for mutant in found}
  some = mutate.sample(SOURCE, found, len(lines), seed=1)
  assert {mutant.line for mutant in some} == lines
  assert some == mutate.sample(SOURCE, found, len(lines), seed=1) != mutate.sample(SOURCE, found, len(lines), seed=2)
  assert set(mutate.sample(SOURCE, found, None, 0)) == set(found)
  assert not mutate.compiles(b'def f(:')


def test_reasons_and_tests():
  text = 'Words.\n\n- a\n+ b\nOne,\n  two.\n\n- x += 1\n+ pass\nThree.\n'
  assert mutate.reasons(text) == {('a', 'b'): 'One, two.', ('x += 1', 'pass'): 'Three.'}
  assert mutate.stale(mutate.reasons(text), [SOURCE]) == [('a', 'b')]
  assert all((mutate.ROOT / f'loopformer/{name}.py').exists() for name in mutate.TESTS)
  assert all(mutate.file_of(test) for tests in mutate.TESTS.values() for test in tests)
