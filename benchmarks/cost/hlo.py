# SPDX-License-Identifier: Apache-2.0
"""Reads compiled programs: what operations move, send, and wait for."""

from collections.abc import Container, Iterator, Mapping
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "other")

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
# A pair of parentheses, with up to three more levels inside: tuples of tuples
# of arrays, whose layouts have tiles as T(8,128).
_NESTED = r"\([^()]*\)"
for _ in range(3):
  _NESTED = rf"\((?:[^()]|{_NESTED})*\)"
_OPERATION = re.compile(
  rf"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>{_NESTED}|\S+)"
  rf" (?P<kind>[\w\-]+)(?P<arguments>{_NESTED})"
)
_COLLECTIVE = re.compile(
  r"^(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all"
  r"|collective-permute|collective-broadcast)(?P<start>-start)?$"
)
_CALLED = re.compile(
  r"(?:to_apply|calls|branch_computations|true_computation|false_computation"
  r"|body)=(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<n>\d+)"')
_CONDITION = re.compile(r"condition=%?(?P<name>[\w.\-]+)")
_INTEGER = re.compile(r"= [su]32\[\]\S* constant\((?P<n>\d+)\)")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")
# Operations that name, group or pass on arrays, and move none. Asynchronous
# calls are of computations on the host, whose arrays they name.
_FREE = frozenset(
  (
    *("bitcast", "constant", "get-tuple-element", "parameter", "tuple"),
    *("conditional", "while", "call", "call-start", "call-done"),
    *("opt-barrier", "after-all", "custom-call-start", "custom-call-done"),
  )
)


_CALLS = frozenset(("conditional", "call", "call-start", "async-start"))

_WORK = frozenset(("fusion", "convolution", "dot", "custom-call"))


class Operation(NamedTuple):
  """A line of HLO.

  Attributes:
    name: of the result.
    shape: of the result, as text.
    kind: as ``fusion`` or ``all-reduce-start``.
    operands: names of the operands.
    line: the whole line.
  """

  name: str
  shape: str
  kind: str
  operands: tuple[str, ...]
  line: str

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return [
      name
      for match in _CALLED.finditer(self.line)
      for name in re.findall(r"[\w.\-]+", match["one"] or match["several"])
    ]


class Program(NamedTuple):
  """A compiled program.

  Attributes:
    computations: the operations of each computation, in their order.
    entry: name of the computation that is the program.
  """

  computations: Mapping[str, list[Operation]]
  entry: str

  def executed(self, name: str | None = None) -> Iterator[tuple[str, float]]:
    """Computations that run as such, and how often: NaN where it is unknown.

    Branches count once. Bodies of fusions are left out: these are operations.
    """
    name = name or self.entry
    yield name, 1
    for operation in self.computations[name]:
      times: float = 1
      if operation.kind == "while":
        times = self._trips(operation)
      elif operation.kind not in _CALLS:
        continue
      for called in operation.called:
        for inner, count in self.executed(called):
          yield inner, times * count

  def _trips(self, loop: Operation) -> float:
    """Trips of a loop: as XLA says, or from the only number it counts to."""
    if known := _TRIPS.search(loop.line):
      return int(known["n"])
    condition = _CONDITION.search(loop.line)
    bounds = [
      int(match["n"])
      for operation in self.computations.get(condition["name"], [])
      if (match := _INTEGER.search(operation.line))
    ]
    return bounds[0] if len(bounds) == 1 else math.nan


def parse(text: str) -> Program:
  """Parses HLO, the result of ``compiled.as_text()``."""
  computations: dict[str, list[Operation]] = {}
  operations: list[Operation] = []
  entry = ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      operations = computations.setdefault(match["name"], [])
      if line.startswith("ENTRY"):
        entry = match["name"]
    elif match := _OPERATION.match(line):
      operations.append(
        Operation(
          match["name"],
          match["shape"],
          match["kind"],
          tuple(_OPERAND.findall(match["arguments"])),
          line,
        )
      )
  return Program(computations, entry)


def sizes(shape: str) -> list[int]:
  """The bytes of each array of a shape."""
  found = []
  for match in _ARRAY.finditer(shape):
    bits = re.search(r"\d+", match["dtype"])
    width = int(bits.group()) // 8 if bits else 1  # pred
    lengths = map(int, filter(None, match["shape"].split(",")))
    found.append(width * math.prod(lengths))
  return found


class Traffic(NamedTuple):
  """Collective operations of one device, by kind.

  Attributes:
    num_bytes: of the arrays that are reduced, gathered, or scattered, each
      whole, i.e. before it is scattered and after it is gathered.
    operations: how often.
  """

  num_bytes: dict[str, int]
  operations: dict[str, int]


def traffic(text: str, num_devices: int) -> Traffic:
  """Counts the collective operations of a compiled program."""
  program = parse(text)
  total = Traffic(dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0))
  for name, times in program.executed():
    for operation in program.computations[name]:
      if match := _COLLECTIVE.match(operation.kind):
        if math.isnan(times):
          raise ValueError(f"unknown number of trips: {operation.line.strip()}")
        kind = match["kind"] if match["kind"] in KINDS else "other"
        lengths = sizes(operation.shape)
        if match["start"] and kind != "all-reduce":
          lengths = lengths[len(lengths) // 2 :]  # Operands and results.
        scattered = num_devices if kind == "reduce-scatter" else 1
        total.num_bytes[kind] += int(times) * scattered * sum(lengths)
        total.operations[kind] += int(times)
  return total


def overlapped(text: str) -> list[int]:
  """Work that runs while each asynchronous collective is under way."""
  counts = []
  for operations in parse(text).computations.values():
    starts: dict[str, int] = {}
    for i, operation in enumerate(operations):
      if operation.kind.endswith("-start") and any(
        kind in operation.line for kind in KINDS[:-1]
      ):
        starts[operation.name] = i
      elif starts and operation.kind.endswith("-done"):
        start = starts.pop(operation.operands[0], i)
        if start < i:
          between = [x.kind for x in operations[start + 1 : i]]
          counts.append(sum(kind in _WORK for kind in between))
  return counts


def moved_bytes(text: str) -> int:
  """Bytes that the program reads and writes each time, without its branches.

  What is in a branch counts in the cost analysis of XLA whether or not it runs.
  """
  program = parse(text)
  operations = program.computations[program.entry]
  shapes = {x.name: sum(sizes(x.shape)) for x in operations}
  return sum(
    shapes[x.name] + sum(shapes.get(name, 0) for name in x.operands)
    for x in operations
    if x.kind not in _FREE
  )


def copies(text: str, shapes: Container[str]) -> list[Operation]:
  """Operations that write an array of one of some shapes, but not in place."""
  program = parse(text)
  return [
    operation
    for name, _ in program.executed()
    for operation in program.computations[name]
    if operation.kind not in _FREE
    and any(
      match.group() in shapes for match in _ARRAY.finditer(operation.shape)
    )
    and not _updates_in_place(program, operation)
  ]


def _updates_in_place(program: Program, operation: Operation) -> bool:
  update = "dynamic-update-slice"
  if operation.kind == update:
    return True
  return operation.kind == "fusion" and any(
    inner.kind == update and inner.shape.split("{")[0] in operation.shape
    for name in operation.called
    for inner in program.computations[name]
  )
