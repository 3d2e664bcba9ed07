# SPDX-License-Identifier: Apache-2.0
"""Measures what a step costs, beside the least that it could."""

from collections.abc import Mapping, Sequence
import functools
import json
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import optax

from benchmarks import cli
from benchmarks.cost import hlo
from benchmarks.cost.problem import (
  image_model,
  METHODS,
  mlp,
  no_transform,
  Problem,
  Program,
  ratio,
  seconds,
)
from benchmarks.harness import report, store
import optax_svrg

_PEAK_SIZE, _PEAK_PRODUCTS = 4096, 4
_WIDTH = 1000

MODELS = {
  "mlp-256": mlp(256, 256),
  "mlp-1024": mlp(1024, 1024),
  "vit-128": image_model("vit", width=128, depth=4),
  "convnet": image_model("convnet"),
}


class Case(NamedTuple):
  """A model and a batch size."""

  model: str
  batch_size: int


CASES = {
  f"{case.model}-batch-{case.batch_size}": case
  for case in (
    Case("mlp-256", 128),
    Case("mlp-1024", 128),
    Case("mlp-1024", 1024),
    Case("vit-128", 128),
    Case("convnet", 128),
  )
}
# Gradients of an epoch in addition to those of the steps, in epochs.
EXTRA_GRADIENTS = dict(zip(METHODS, (0, 2, 2, 2, 1, 0, 0, 0), strict=True))
# Arrays like the parameters that a step must read and write: AdamW reads the
# gradient, and reads and writes the parameters and two moments; SVRG reads the
# gradient at the snapshot and the mean gradient.
MUST_MOVE = {"plain": 7, "alpha-svrg": 9, "adaptive": 9}


def flops(lowered: jax.stages.Lowered) -> float:
  """Operations, counted before the compiler calls libraries for some."""
  return lowered.cost_analysis()["flops"]


def measure_epochs(
  case: Case, dtype: Any, steps: int, rounds: int
) -> list[dict[str, Any]]:
  """Epoch times beside their limit by the gradients that they need.

  Args:
    case: the case.
    dtype: of the parameters.
    steps: number of batches of an epoch.
    rounds: how many times to run each epoch.

  Returns:
    A row for each method: ``time``, that of the epoch, and ``limit``, the
    operations of the plain steps and of the further gradients, both divided
    by those of the plain epoch; ``first``, the time of the first run with
    compilation, likewise; ``flops_per_second``; ``seconds`` of all runs.
  """
  problem = _problem(case, dtype, steps)
  of_step = flops(problem.lower_step(no_transform()))
  of_gradient = flops(problem.lower_gradient())
  times = seconds(problem.programs(), rounds)
  rows = []
  for name, extra in EXTRA_GRADIENTS.items():
    needed = of_step + extra * of_gradient
    rows.append(
      {
        "method": name,
        "time": ratio(times, name, "plain"),
        "limit": needed / of_step,
        "first": times[name][0] / times["plain"][0],
        "flops_per_second": steps * needed / statistics.median(times[name][1:]),
        "seconds": times[name],
      }
    )
  return rows


def _problem(case: Case, dtype: Any, steps: int) -> Problem:
  return Problem(
    MODELS[case.model], case.batch_size, steps, dtype, optax.adamw(1e-3)
  )


def temporary_gradients(case: Case, dtype: Any) -> dict[str, float]:
  """Temporary bytes of a step above plain's, in copies of the gradient."""
  problem = _problem(case, dtype, 1)

  def temporary(transform: optax.GradientTransformationExtraArgs) -> int:
    compiled = problem.lower_step(transform).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = temporary(no_transform())
  size = sum(x.nbytes for x in jax.tree.leaves(problem.params))
  return {
    name: (temporary(transform) - plain) / size
    for name, transform in (
      ("alpha-svrg", optax_svrg.alpha_svrg(0.75)),
      ("adaptive", optax_svrg.adaptive_svrg()),
      ("adaptive-saga", optax_svrg.adaptive_saga(10)),
    )
  }


def updates_alone(
  size: int, dtype: Any
) -> dict[str, tuple[jax.stages.Compiled, Program]]:
  """The transformation and AdamW, without the gradients.

  Args:
    size: number of parameters, a multiple of 1,000: of a matrix.
    dtype: their dtype.

  Returns:
    For each method the compiled update, and the program that calls it.
  """
  params, grads, snapshot_grads, mean = jax.random.normal(
    jax.random.key(0), (4, size // _WIDTH, _WIDTH)
  ).astype(dtype)
  transforms = {
    "plain": no_transform(),
    "alpha-svrg": optax_svrg.alpha_svrg(0.75),
    "adaptive": optax_svrg.adaptive_svrg(),
  }
  result = {}
  for name, transform in transforms.items():
    tx = optax.chain(transform, optax.adamw(1e-3))
    state = tx.init(params)
    if name != "plain":
      state = optax_svrg.take_snapshot(state, params, lambda _: mean)
    carry = jnp.array(params), state
    compiled = (
      jax.jit(functools.partial(_update, tx), donate_argnums=0)
      .lower(carry, grads, snapshot_grads)
      .compile()
    )
    run = functools.partial(_call, compiled, grads, snapshot_grads)
    result[name] = compiled, Program(run, carry)
  return result


def _update(tx: Any, carry: Any, grads: Any, snapshot_grads: Any) -> Any:
  params, state = carry
  updates, state = tx.update(
    grads, state, params, snapshot_grads=snapshot_grads
  )
  return optax.apply_updates(params, updates), state


def _call(compiled: Any, grads: Any, snapshot_grads: Any, carry: Any) -> Any:
  return compiled(carry, grads, snapshot_grads)


def measure_updates(size: int, dtype: Any, rounds: int) -> list[dict[str, Any]]:
  """The transformation alone beside the bytes that it must move.

  Args:
    size: number of parameters.
    dtype: their dtype.
    rounds: how many times to run each program.

  Returns:
    A row for each method: the arrays that it ``must_move`` and those that it
    ``moves`` as compiled, its ``time`` divided by that of moving the former at
    the bandwidth of adding two arrays, and that bandwidth in bytes per second.
  """
  updates = updates_alone(size, dtype)
  programs = {name: program for name, (_, program) in updates.items()}
  add = jax.jit(jnp.add, donate_argnums=0)
  other = jnp.ones((size // _WIDTH, _WIDTH), dtype)
  programs["add"] = Program(lambda x: add(x, other), jnp.ones_like(other))
  times = seconds(programs, rounds)
  array_bytes = other.nbytes
  # Adding moves three. The best of all rounds, here and of the updates: what
  # others do to the memory meanwhile does not slow all programs alike.
  bandwidth = 3 * array_bytes / min(times["add"][1:])
  return [
    {
      "method": name,
      "must_move": moved,
      "moves": hlo.moved_bytes(updates[name][0].as_text()) / array_bytes,
      "time": min(times[name][1:]) * bandwidth / (moved * array_bytes),
      "bandwidth": bandwidth,
      "seconds": times[name],
    }
    for name, moved in MUST_MOVE.items()
  ]


def matmul_peak(size: int, dtype: Any, rounds: int) -> float:
  """Operations per second of products of large matrices.

  Args:
    size: rows and columns.
    dtype: dtype of the matrices.
    rounds: how many times to measure; the best counts.
  """
  x = jax.random.normal(jax.random.key(0), (size, size)) / size**0.5
  x = x.astype(dtype)

  @jax.jit
  def products(y: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, _PEAK_PRODUCTS, lambda _, y: x @ y, y)

  (times,) = seconds({"": Program(products, x)}, rounds).values()
  return 2 * size**3 * _PEAK_PRODUCTS / min(times[1:])


def state_copies(num_batches: int) -> list[dict[str, Any]]:
  """Bytes of the states, in copies of float32 parameters.

  Args:
    num_batches: of the tables.

  Returns:
    A row for each ``state``: copies ``on_device``, and ``on_host``.
  """
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]
  )
  on_device = NamedSharding(mesh, P())
  here, offloaded = (
    jax.ShapeDtypeStruct((1_000_000,), jnp.float32, sharding=sharding)
    for sharding in (on_device, on_device.with_memory_kind("pinned_host"))
  )
  svrg = optax_svrg.alpha_svrg(0.75)
  halves = optax_svrg.alpha_svrg(0.75, snapshot_dtype=jnp.bfloat16)
  saga = optax_svrg.adaptive_saga(num_batches)
  half_table = optax_svrg.adaptive_saga(num_batches, table_dtype=jnp.bfloat16)
  rows = []
  for name, transform, stored, table_bytes in (
    ("alpha_svrg", svrg, here, 0),
    ("alpha_svrg, snapshot_dtype=bfloat16", halves, here, 0),
    ("alpha_svrg, in the memory of the host", svrg, offloaded, 0),
    ("adaptive_svrg", optax_svrg.adaptive_svrg(), here, 0),
    (f"alpha_svrg, gradient_table of {num_batches}", svrg, here, 4),
    ("the same, dtype=bfloat16", svrg, here, 2),
    (f"adaptive_saga, {num_batches} batches", saga, here, 0),
    ("the same, table_dtype=bfloat16", half_table, here, 0),
    ("adaptive_saga, in the memory of the host", saga, offloaded, 0),
  ):
    leaves = jax.tree.leaves(jax.eval_shape(transform.init, here))
    shardings = jax.tree.leaves(optax_svrg.state_shardings(transform, stored))
    copies = {True: table_bytes * num_batches / 4, False: 0.0}
    for leaf, sharding in zip(leaves, shardings, strict=True):
      is_on_device = sharding.memory_kind != "pinned_host"
      size = leaf.size * leaf.dtype.itemsize
      copies[is_on_device] += size / (here.size * here.dtype.itemsize)
    rows.append(
      {"state": name, "on_device": copies[True], "on_host": copies[False]}
    )
  return rows


def tables(results: Mapping[str, Any]) -> str:
  """What is published, in Markdown.

  Args:
    results: the contents of the JSON file.
  """
  epochs = report.markdown_table(
    (
      *("case", "method", "time / plain", "limit", "time / limit"),
      *("share of peak", "first run / plain's"),
    ),
    [
      (
        name,
        row["method"],
        f"{row['time']:.2f}",
        f"{row['limit']:.2f}",
        f"{row['time'] / row['limit']:.3f}",
        f"{row['flops_per_second'] / results['matmul_peak']:.0%}",
        f"{row['first']:.1f}",
      )
      for name, case in results["cases"].items()
      for row in case["epochs"]
    ],
  )
  updates = report.markdown_table(
    (
      *("method", "arrays it must move", "arrays moved as compiled"),
      *("moved / must", "time / limit", "GB/s measured"),
    ),
    [
      (
        row["method"],
        str(row["must_move"]),
        f"{row['moves']:.1f}",
        f"{row['moves'] / row['must_move']:.2f}",
        f"{row['time']:.2f}",
        f"{row['bandwidth'] / 1e9:.1f}",
      )
      for row in results["updates"]
    ],
  )
  states = report.markdown_table(
    ("state", "copies on the device", "in the memory of the host"),
    [
      (row["state"], f"{row['on_device']:.2f}", f"{row['on_host']:.2f}")
      for row in results["states"]
    ],
  )
  temporary = report.markdown_table(
    ("temporary gradients", "alpha-svrg", "adaptive", "adaptive-saga"),
    [
      (name, *(f"{x:.2f}" for x in case["temporary_gradients"].values()))
      for name, case in results["cases"].items()
    ],
  )
  return "\n\n".join((epochs, updates, states, temporary))


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """The files that are made of stored results, by name."""
  return {"table.md": tables(document) + "\n"}


steps_option = click.option(
  "--steps",
  type=cli.positive,
  default=10,
  show_default=True,
  help="Number of batches of an epoch.",
)
rounds_option = click.option(
  "--rounds",
  type=cli.positive,
  default=7,
  show_default=True,
  help="How many times everything is run, after a first time.",
)


@click.command()
@click.option(
  "--dtype",
  type=click.Choice(["float32", "bfloat16"]),
  default="float32",
  show_default=True,
  help="Of parameters and images.",
)
@cli.cell_option(CASES)
@steps_option
@rounds_option
@click.option(
  "--size",
  type=cli.positive,
  default=10_000_000,
  show_default=True,
  help="Number of parameters of the transformation alone.",
)
@cli.out_option("step-cost")
def main(
  dtype: str,
  cells: Sequence[str],
  steps: int,
  rounds: int,
  size: int,
  out: Path,
) -> None:
  """Measures epochs and steps as ratios to the least that they could take.

  Prints tables of epochs, of the transformation alone, of states, and of the
  temporary bytes of a step above plain's in copies of the gradient; and writes
  a JSON file. Compilation counts in the first run only.
  """
  path = out / "results.json"
  settings = {"dtype": dtype, "steps": steps, "rounds": rounds, "size": size}
  results: dict[str, Any] = {
    **store.environment(),
    **settings,
    "matmul_peak": matmul_peak(_PEAK_SIZE, jnp.dtype(dtype), min(rounds, 3)),
    "updates": measure_updates(size, jnp.dtype(dtype), 3 * rounds),
    "states": state_copies(steps),
    "cases": {},
  }
  for name in cells or CASES:
    results["cases"][name] = {
      "epochs": measure_epochs(CASES[name], jnp.dtype(dtype), steps, rounds),
      "temporary_gradients": temporary_gradients(CASES[name], jnp.dtype(dtype)),
    }
    store.write_json(path, results)
    click.echo(name, err=True)
  for name, text in render(json.loads(path.read_text("utf-8"))).items():
    (out / name).write_text(text, encoding="utf-8")
    click.echo(text)


if __name__ == "__main__":
  main()
