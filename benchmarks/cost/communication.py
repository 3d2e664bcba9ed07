# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that data parallel training sends, from compiled HLO.

Run ``python -m benchmarks.communication --help``.
"""

from collections.abc import Callable, Sequence
import math
from pathlib import Path
import re
from typing import Any, NamedTuple

import click
from flax import nnx
import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks import reporting, train
from benchmarks.models import small as models
import optax_svrg

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "other")
_BATCHES, _BATCH_SIZE = 4, 64
_AXIS = "data"

_COLLECTIVE = re.compile(
  r"= (?P<shape>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter"
  r"|all-to-all|collective-permute|collective-broadcast)(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_WHILE = re.compile(r" while\(.*body=%?(?P<body>[\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(?P<n>\d+)"')
_CALLED = re.compile(
  r"(?:to_apply|calls|branch_computations|true_computation|false_computation)"
  r"=(?:\{(?P<several>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d,]*)\]")


class Traffic(NamedTuple):
  """What one device takes part in, by the kind of operation.

  Attributes:
    num_bytes: of the arrays that are reduced, gathered, or scattered, each
      whole, i.e. before it is scattered and after it is gathered.
    operations: how often.
  """

  num_bytes: dict[str, int]
  operations: dict[str, int]


def traffic(text: str, num_devices: int) -> Traffic:
  """Counts the collective operations of a compiled program.

  Args:
    text: the HLO, ``compiled.as_text()``.
    num_devices: over how many devices it scatters.

  Returns:
    The sums over the program. What is in a loop counts as often as the loop is
    run, what is in a branch once.

  Raises:
    ValueError: if a loop with collective operations has no known number of
      trips.
  """
  bodies: dict[str, list[str]] = {}
  lines: list[str] = []
  entry = ""
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      lines = bodies.setdefault(match["name"], [])
      if line.startswith("ENTRY"):
        entry = match["name"]
    else:
      lines.append(line)

  def count(name: str) -> Traffic:
    total = Traffic(dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0))
    for line in bodies[name]:
      if match := _COLLECTIVE.search(line):
        kind = match["kind"] if match["kind"] in KINDS else "other"
        sizes = _sizes(match["shape"])
        if match["start"] and kind != "all-reduce":
          sizes = sizes[len(sizes) // 2 :]  # Operands and results.
        size = sum(sizes)
        if kind == "reduce-scatter":
          size *= num_devices
        total.num_bytes[kind] += size
        total.operations[kind] += 1
      elif match := _WHILE.search(line):
        inner = count(match["body"])
        trips = _TRIPS.search(line)
        if trips is None and any(inner.operations.values()):
          raise ValueError(f"unknown number of trips: {line.strip()}")
        _add(total, inner, int(trips["n"]) if trips else 0)
      elif match := _CALLED.search(line):
        names = match["one"] or match["several"].replace("%", "")
        for called in names.split(", "):
          _add(total, count(called), 1)
    return total

  return count(entry)


def _add(total: Traffic, part: Traffic, times: int) -> None:
  for sums, more in zip(total, part, strict=True):
    for kind in KINDS:
      sums[kind] += times * more[kind]


def _sizes(shape: str) -> list[int]:
  """The bytes of each array of a shape."""
  sizes = []
  for match in _ARRAY.finditer(shape):
    bits = re.search(r"\d+", match["dtype"])
    width = int(bits.group()) // 8 if bits else 1  # pred
    lengths = map(int, filter(None, match["shape"].split(",")))
    sizes.append(width * math.prod(lengths))
  return sizes


class Case(NamedTuple):
  """A program that is counted.

  Attributes:
    how: how the training is distributed.
    method: which method.
    fn: the program.
    args: its arguments, with their shardings.
  """

  how: str
  method: str
  fn: Callable
  args: tuple
  out_shardings: Any = None


def _methods(axis_name: str | None) -> dict[str, Any]:
  return {
    "plain": optax.identity(),
    "alpha-svrg": optax_svrg.alpha_svrg(0.5, axis_name=axis_name),
    "adaptive": optax_svrg.adaptive_svrg(axis_name=axis_name),
    "adaptive-saga": optax_svrg.adaptive_saga(_BATCHES, axis_name=axis_name),
  }


def cases(model: str, mesh: jax.sharding.Mesh) -> list[Case]:
  """All programs: steps, and snapshot passes over four batches.

  Args:
    model: name of the model, for Fashion-MNIST.
    mesh: one axis of devices, of the type Auto.
  """
  graphdef, params = nnx.split(
    models.MODELS[model]((1, 28, 28), 10, rngs=nnx.Rngs(0)), nnx.Param
  )
  params = nnx.as_pure(params)
  images = np.zeros((_BATCHES, _BATCH_SIZE, 784), np.float32)
  labels = np.zeros((_BATCHES, _BATCH_SIZE), np.int32)
  batches = tuple(zip(images, labels, strict=True))

  def loss(params, batch):
    logits = nnx.merge(graphdef, params)(batch[0])
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch[1]
    ).mean()

  grad = jax.grad(loss)
  local_grad = optax_svrg.device_local(grad, _AXIS)
  optimizer = optax.adamw(1e-3)

  def make_step(transform, gradient, reduce=lambda g: g):
    transform = optax.with_extra_args_support(transform)

    def step(params, state, batch, batch_index):
      grad_fn = lambda p: reduce(gradient(p, batch))
      svrg, opt_state = state
      updates, svrg = transform.update(
        grad_fn(params), svrg, params, grad_fn=grad_fn, batch_index=batch_index
      )
      updates, opt_state = optimizer.update(updates, opt_state, params)
      return optax.apply_updates(params, updates), (svrg, opt_state)

    return step

  index = np.int32(1)
  found = []
  # Each device has its own part of the batch, and averages are explicit.
  specs = {"mesh": mesh, "out_specs": P()}
  mean = lambda tree: jax.lax.pmean(tree, _AXIS)
  step_specs = (P(), P(), P(_AXIS), P())
  explicit = [
    (name, transform, (lambda g: g) if name != "plain" else mean)
    for name, transform in _methods(_AXIS).items()
  ]
  explicit.insert(1, ("alpha-svrg, naive", optax_svrg.alpha_svrg(0.5), mean))
  for name, transform, reduce in explicit:
    step = make_step(transform, local_grad, reduce)
    state = (transform.init(params), optimizer.init(params))
    fn = jax.shard_map(step, in_specs=step_specs, **specs)
    args = (params, state, batches[0], index)
    found.append(Case("shard_map, step", name, fn, args))
  for name, one_reduction in (("naive", False), ("mean_gradient", True)):

    def snapshot_pass(params, batches, one_reduction=one_reduction):
      gradient = (
        local_grad if one_reduction else lambda p, b: mean(local_grad(p, b))
      )
      return optax_svrg.mean_gradient(
        gradient, params, batches, axis_name=_AXIS if one_reduction else None
      )

    fn = jax.shard_map(snapshot_pass, in_specs=(P(), P(_AXIS)), **specs)
    found.append(Case("shard_map, pass", name, fn, (params, batches)))

  # Global arrays, and averages are the compiler's.
  def sharded(tree, specs):
    return jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        np.shape(x), x.dtype, sharding=NamedSharding(mesh, spec)
      ),
      tree,
      specs,
    )

  data = sharded(batches, jax.tree.map(lambda _: P(_AXIS), batches))
  for how, of_params, of_state in (
    ("jit, replicated", False, False),
    ("jit, state sharded (ZeRO)", False, True),
    ("jit, parameters sharded too (FSDP)", True, True),
  ):
    spread = lambda tree, on: jax.tree.map(
      lambda x: _spread(x, mesh.size) if on else P(), tree
    )
    placed = sharded(params, spread(params, of_params))
    for name, transform in _methods(None).items():
      state = jax.eval_shape(
        lambda p, t=transform: (t.init(p), optimizer.init(p)), params
      )
      state = sharded(state, spread(state, of_state))
      args = (placed, state, data[0], index)
      out = jax.tree.map(lambda x: x.sharding, (placed, state))
      found.append(
        Case(f"{how}, step", name, make_step(transform, grad), args, out)
      )
  return found


def _spread(x: Any, num_devices: int) -> P:
  """Shards the last axis that can be, as ZeRO and FSDP do."""
  for axis in reversed(range(len(x.shape))):
    if x.shape[axis] % num_devices == 0:
      return P(*[None] * axis, _AXIS)
  return P()


def rows(found: Sequence[Case], num_devices: int) -> list[dict[str, Any]]:
  """Compiles the programs, and counts.

  Args:
    found: the programs.
    num_devices: number of devices of the mesh.

  Returns:
    For each program ``how``, ``method``, ``bytes`` and ``operations`` by kind,
    the ``total`` of bytes and its ``ratio`` to the first program of that kind.
  """
  result: list[dict[str, Any]] = []
  first: dict[str, int] = {}
  for case in found:
    jitted = jax.jit(case.fn, out_shardings=case.out_shardings)
    text = jitted.lower(*case.args).compile().as_text()
    num_bytes, operations = traffic(text, num_devices)
    total = sum(num_bytes.values())
    base = first.setdefault(case.how, total)
    result.append(
      {
        "how": case.how,
        "method": case.method,
        "bytes": num_bytes,
        "operations": operations,
        "total": total,
        "ratio": total / base,
      }
    )
  return result


def table(counted: Sequence[dict[str, Any]]) -> str:
  """A line for each program, in Markdown."""
  return reporting.markdown_table(
    ("", "method", *KINDS, "total", "ratio"),
    [
      [
        row["how"],
        row["method"],
        *(
          f"{row['bytes'][kind]:,} ({row['operations'][kind]})"
          for kind in KINDS
        ),
        f"{row['total']:,}",
        f"{row['ratio']:.4f}",
      ]
      for row in counted
    ],
  )


@click.command(cls=train.Command)
@click.option(
  "--model",
  type=click.Choice(list(models.MODELS)),
  default="mlp4",
  show_default=True,
)
@click.option(
  "--devices", type=click.IntRange(min=2), default=8, show_default=True
)
@click.option(
  "--out",
  type=click.Path(file_okay=False, path_type=Path),
  default=Path("results", "communication"),
  show_default=True,
  help="Folder of the results.",
)
def main(model: str, devices: int, out: Path) -> None:
  """Counts bytes and operations of one step and of one snapshot pass.

  On the CPU, whose devices are made up; nothing is executed. Bytes, in
  parentheses the number of operations.
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  mesh = jax.make_mesh((devices,), (_AXIS,), axis_types=(AxisType.Auto,))
  counted = rows(cases(model, mesh), devices)
  out.mkdir(parents=True, exist_ok=True)
  reporting.write_json(
    out / "communication.json",
    {"model": model, "devices": devices, "rows": counted},
  )
  click.echo(table(counted))


if __name__ == "__main__":
  main()
