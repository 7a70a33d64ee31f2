"""The text of a compiled program, read for what it computes, sends and copies.

Programs of all three backends are read, as `compiled.as_text()` prints them. A loop counts as often as it runs, where
the text tells: by its `known_trip_count`, or by a condition that compares a counter, which begins at zero, with a
constant.
"""
from __future__ import annotations

import collections
import math
import re
from typing import Iterator, Sequence

import numpy as np

from loopformer.types import config_dataclass

SENDS = {'all-gather': 1.0, 'reduce-scatter': 1.0, 'all-reduce': 2.0, 'all-to-all': 1.0}
PERMUTE = 'collective-permute'
BITS = {'pred': 8, 'bf16': 16}
COPIES = ('copy', 'copy-start', 'transpose')


@config_dataclass
class Steps:
  """How often branches and loops run of which a program does not tell.

  free: steps of a loop whose end is not known, such as those without gradient that a rollout begins with, on average;
  live: share of the calls of a conditional that take its second branch, such as that of the steps that may be skipped.
  outer: steps of a loop whose end is not known and around which there is no other such; None: as `free`.
  """
  free: float
  live: float
  outer: float | None = None

  def often(self, within: bool) -> float:
    """Steps of a loop whose end is not known, within another such or not."""
    return self.free if within or self.outer is None else self.outer


@config_dataclass
class Collective:
  """An exchange between devices.

  op: 'all-gather', ...; size: bytes of the whole array: gathered, or before it is scattered; group: places in the mesh
  of the devices of the first group, None of a permutation; times: how often it runs; looped: whether inside a loop;
  name: of the operation that it was made of.
  """
  op: str
  size: float
  group: tuple[int, ...] | None
  times: float
  looped: bool
  name: str

  @property
  def devices(self) -> int:
    """Of the group."""
    return 2 if self.group is None else len(self.group)

  @property
  def apart(self) -> int:
    """How far the devices of the group are apart: 1 + last - first."""
    return 2 if self.group is None else max(self.group) - min(self.group) + 1

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, by a ring."""
    share = 1.0 if self.group is None else SENDS[self.op] * (self.devices - 1) / self.devices
    return self.size * share


@config_dataclass
class Copy:
  """A copy or a transposition in memory; arguments as of `Collective`."""
  size: float
  times: float
  looped: bool
  name: str


class Program:
  """A compiled program.

  flops: of all matrix products that are written as `dot`; outside: bytes of operands and results of those that are not
  in the step's shard_map, an optimiser's; collectives; copies; kernels: custom calls by name, how many there are.

  Raises:
    ValueError: the text has a collective that names its devices in a way that is not known here.
  """

  def __init__(self, text: str, steps: Steps):
    self.flops, self.outside = 0.0, 0.0
    self.collectives: list[Collective] = []
    self.copies: list[Copy] = []
    self.kernels = collections.Counter()
    bodies, entry = _computations(text)
    times, looped, within = collections.Counter({entry: 1.0}), {entry: False}, {entry: False}
    for name in reversed(bodies):  # what is called is printed before what calls it
      if not times[name]:
        continue
      shapes = {}
      for line in bodies[name]:
        result, kind, op = _LINE.match(line).groups()
        shapes[result] = kind
        trips = _trips(line, bodies) if op == 'while' else None
        for callee, often in _calls(op, line, steps, trips, within[name]):
          times[callee] += times[name] * often
          looped[callee] = looped.get(callee, False) or looped[name] or op == 'while'
          within[callee] = within.get(callee, False) or within[name] or (op == 'while' and trips is None)
        self._count(name, result, op, kind, line, shapes, times[name], looped[name])

  @property
  def sent(self) -> dict[tuple[str, int, int], float]:
    """Bytes that a device sends by (collective, devices of a group, how far these are apart)."""
    found = collections.Counter()
    for each in self.collectives:
      if each.sent:
        found[each.op, each.devices, each.apart] += each.times * each.sent
    return found

  def _count(self, body, result, op, kind, line, shapes, times, looped):
    base = op.removesuffix('-start')
    if op == 'dot':
      left, right = re.search(r' dot\((?:\S+ )?%?([\w.\-]+), (?:\S+ )?%?([\w.\-]+)\)', line).groups()
      summed = [int(axis) for axis in re.search(r'lhs_contracting_dims=\{([\d,]*)\}', line)[1].split(',') if axis]
      (_, dims), = _SHAPE.findall(shapes[left])
      sides = [int(n) for n in dims.split(',') if n]
      self.flops += times * 2.0 * _elements(kind) * math.prod(sides[axis] for axis in summed)
      if 'shard_map' not in line:
        self.outside += times * (_size(kind) + _size(shapes[left]) + _size(shapes[right]))
    elif base in SENDS or base == PERMUTE:
      group = None if base == PERMUTE else tuple(_group(line))
      size, count = _size(kind), 2 if group is None else len(group)
      if op != base and base != 'all-reduce':  # the operand and the result
        size *= (0.5 if group is None else count / (count + 1))
      elif base == 'reduce-scatter':
        size *= count
      elif base == 'all-reduce' and body.startswith('all-reduce-scatter'):  # how a TPU's compiler writes one
        base = 'reduce-scatter'
      self.collectives.append(Collective(op=base, size=size, group=group, times=times, looped=looped, name=_name(line)))
    elif op in COPIES or (op == 'fusion' and result.startswith('copy')):
      size = _size(kind) * (0.5 if op == 'copy-start' else 1.0)
      self.copies.append(Copy(size=size, times=times, looped=looped, name=_name(line)))
    elif op == 'custom-call':
      target = re.search(r'custom_call_target="([^"]*)"', line)[1]
      if target == 'tpu_custom_call' or target.startswith('__cu') or 'triton' in target:
        self.kernels[re.sub(r'\.\d+$', '', result) if target == 'tpu_custom_call' else target] += 1


_LINE = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(')
_SHAPE = re.compile(r'([a-z]+\d*)\[([\d,]*)\]')


def _name(line: str) -> str:
  found = re.search(r'op_name="([^"]*)"', line)
  return found[1] if found else ''


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of every computation, in the order of the text, and the name of the entry."""
  bodies, name, entry = {}, None, None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if head:
      name = head[2]
      entry = name if head[1] else entry
      bodies[name] = []
    elif name and _LINE.match(line):
      bodies[name].append(line)
  return bodies, entry


def _calls(op: str, line: str, steps: Steps, trips: float | None, within: bool) -> Iterator[tuple[str, float]]:
  """(computation, how often) of all that an instruction runs; trips: of a loop, None where they are not known."""
  if op == 'conditional':
    branches = re.search(r'branch_computations=\{([^}]*)\}', line)
    pair = re.search(r'false_computation=%?([\w.\-]+)', line), re.search(r'true_computation=%?([\w.\-]+)', line)
    names = [word.strip().lstrip('%') for word in branches[1].split(',')] if branches else [name[1] for name in pair]
    for number, name in enumerate(names):
      yield name, steps.live if number else 1 - steps.live
  elif op == 'while':
    for name in re.findall(r'(?:body|condition)=%?([\w.\-]+)', line):
      yield name, steps.often(within) if trips is None else trips
  else:
    for name in re.findall(r'(?:calls|to_apply)=%?([\w.\-]+)', line):
      yield name, 1.0


def _trips(line: str, bodies) -> float | None:
  """How often a loop runs; None where the text does not tell."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line)
  if known:
    return float(known[1])
  condition = '\n'.join(bodies.get(re.search(r'condition=%?([\w.\-]+)', line)[1], ()))
  compared = re.search(r'ROOT .* compare\((?:\S+ )?%?[\w.\-]+, (?:\S+ )?%?([\w.\-]+)\), direction=LT', condition)
  bound = compared and re.search(rf'%?{re.escape(compared[1])} = \S+ constant\((\d+)\)', condition)
  return float(bound[1]) if bound else None


def _elements(kind: str) -> int:
  return sum(math.prod(int(n) for n in dims.split(',') if n) for _, dims in _SHAPE.findall(kind))


def _size(kind: str) -> float:
  """Bytes of a shape or a tuple of shapes."""
  total = 0.0
  for dtype, dims in _SHAPE.findall(kind):
    bits = BITS.get(dtype) or int(re.search(r'\d+', dtype)[0])
    total += bits / 8 * math.prod(int(n) for n in dims.split(',') if n)
  return total


def _group(line: str) -> Sequence[int]:
  """The places in the mesh of the devices of a collective's first group."""
  named = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if named:
    return [int(n) for n in named[1].split(',')]
  short = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line)
  if short:
    return _arranged(short[2], short[3]).reshape([int(n) for n in short[1].split(',')])[0].tolist()
  axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
                   line)
  if axes is None or ':' in axes[4]:
    raise ValueError(f'a collective that this version of experiments.tools.hlo cannot read: {line.strip()[:300]}')
  names, sizes = zip(*re.findall(r"'(\w+)'=(\d+)", axes[1]))
  places = _arranged(axes[2] or ','.join(sizes), axes[3]).reshape([int(n) for n in sizes])
  own = [name.strip("' ") for name in axes[4].split(',')]
  return places[tuple(slice(None) if name in own else 0 for name in names)].ravel().tolist()


def _arranged(dims: str, order: str | None) -> np.ndarray:
  """0, 1, 2, ... in an array of such dimensions, these then reordered."""
  sizes = [int(n) for n in dims.split(',')]
  places = np.arange(math.prod(sizes)).reshape(sizes)
  return places if order is None else places.transpose([int(n) for n in order.split(',')])
