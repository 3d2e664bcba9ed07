# SPDX-License-Identifier: Apache-2.0
"""Reads compiled programs: what operations move, send, and wait for."""

from collections.abc import Iterator, Mapping
import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "other")
_COLLECTIVES = (
  *KINDS[:-1],
  *("all-to-all", "collective-permute", "collective-broadcast"),
)
_NAME = r"[\w.\-]+"
_COMPUTATION = re.compile(rf"^(?:(ENTRY) )?%?({_NAME}) \(.*\{{$")
# A pair of parentheses, with up to three more levels inside: tuples of tuples
# of arrays, whose layouts have tiles as T(8,128).
_NESTED = r"\([^()]*\)"
for _ in range(3):
  _NESTED = rf"\((?:[^()]|{_NESTED})*\)"
# Name, shape, kind, and arguments.
_OPERATION = re.compile(
  rf"^\s+(?:ROOT )?%?({_NAME}) = ({_NESTED}|\S+) ([\w\-]+)({_NESTED})"
)
_CALLED = re.compile(
  r"(?:to_apply|calls|branch_computations|true_computation|false_computation"
  r"|body)=(\{[^}]*\}|[%\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(rf"condition=%?({_NAME})")
_INTEGER = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"([a-z]+(\d*))\[([\d,]*)\]")
# Operations that name, group or pass on arrays, and move none. Asynchronous
# calls are of computations on the host, whose arrays they name.
_FREE = (
  *("bitcast", "constant", "get-tuple-element", "parameter", "tuple"),
  *("conditional", "while", "call", "call-start", "call-done"),
  *("opt-barrier", "after-all", "custom-call-start", "custom-call-done"),
)
_CALLS = ("while", "conditional", "call", "call-start", "async-start")
_WORK = ("fusion", "convolution", "dot", "custom-call")


class Operation(NamedTuple):
  """A line of HLO."""

  name: str  # Of the result.
  shape: str  # Of the result, as text.
  kind: str  # As ``fusion`` or ``all-reduce-start``.
  operands: list[str]  # Their names.
  line: str

  @property
  def called(self) -> list[str]:
    """Names of the computations that it calls."""
    return re.findall(_NAME, " ".join(_CALLED.findall(self.line)))


# The operations of each computation, in their order. The program is "ENTRY".
Computations = Mapping[str, list[Operation]]


def parse(text: str) -> Computations:
  """Parses HLO, the result of ``compiled.as_text()``."""
  computations: dict[str, list[Operation]] = {}
  operations: list[Operation] = []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      operations = computations.setdefault(match[1] or match[2], [])
    elif match := _OPERATION.match(line):
      operands = re.findall(rf"%({_NAME})", match[4])
      operations.append(Operation(*match.group(1, 2, 3), operands, line))
  return computations


def executed(
  computations: Computations, name: str = "ENTRY"
) -> Iterator[tuple[Operation, float]]:
  """Operations that run, and how often: NaN where it is unknown.

  Branches count once. A fusion is one operation.
  """
  operations = computations[name]
  yield from ((operation, 1) for operation in operations)
  for operation in operations:
    if operation.kind in _CALLS:
      is_loop = operation.kind == "while"
      times = _trips(computations, operation) if is_loop else 1
      for called in operation.called:
        for inner, count in executed(computations, called):
          yield inner, times * count


def _trips(computations: Computations, loop: Operation) -> float:
  """Trips of a loop: as XLA says, or from the only number it counts to."""
  found = _TRIPS.findall(loop.line)
  if not found:
    (condition,) = _CONDITION.findall(loop.line)
    lines = [x.line for x in computations.get(condition, [])]
    found = _INTEGER.findall("\n".join(lines))
  return int(found[0]) if len(found) == 1 else math.nan


def sizes(shape: str) -> list[int]:
  """The bytes of each array of a shape."""
  return [
    (int(bits) // 8 if bits else 1)  # Without a number: pred.
    * math.prod(map(int, filter(None, lengths.split(","))))
    for _, bits, lengths in _ARRAY.findall(shape)
  ]


class Traffic(NamedTuple):
  """Collective operations of one device, by kind."""

  # Of the arrays that are reduced, gathered, or scattered, each whole, i.e.
  # before it is scattered and after it is gathered.
  num_bytes: dict[str, int]
  operations: dict[str, int]  # How often.


def traffic(text: str, num_devices: int) -> Traffic:
  """Counts the collective operations of a compiled program."""
  total = Traffic(dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0))
  for operation, times in executed(parse(text)):
    kind = operation.kind.removesuffix("-start")
    if kind not in _COLLECTIVES:
      continue
    if math.isnan(times):
      raise ValueError(f"unknown number of trips: {operation.line.strip()}")
    lengths = sizes(operation.shape)
    if operation.kind != kind != "all-reduce":
      lengths = lengths[len(lengths) // 2 :]  # Operands and results.
    scattered = num_devices if kind == "reduce-scatter" else 1
    kind = kind if kind in KINDS else "other"
    total.num_bytes[kind] += int(times) * scattered * sum(lengths)
    total.operations[kind] += int(times)
  return total


def overlapped(text: str) -> list[int]:
  """Work that runs while each asynchronous collective is under way."""
  counts = []
  for operations in parse(text).values():
    starts: dict[str, int] = {}
    for i, operation in enumerate(operations):
      if operation.kind.endswith("-start") and any(
        kind in operation.line for kind in KINDS[:-1]
      ):
        starts[operation.name] = i
      elif operation.kind.endswith("-done") and operation.operands[0] in starts:
        between = operations[starts[operation.operands[0]] : i]
        counts.append(sum(x.kind in _WORK for x in between))
  return counts


def moved_bytes(text: str) -> int:
  """Bytes that the program reads and writes each time, without its branches.

  What is in a branch counts in the cost analysis of XLA whether or not it runs.
  """
  operations = parse(text)["ENTRY"]
  shapes = {x.name: sum(sizes(x.shape)) for x in operations}
  return sum(
    shapes[x.name] + sum(shapes.get(name, 0) for name in x.operands)
    for x in operations
    if x.kind not in _FREE
  )
