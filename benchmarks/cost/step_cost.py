# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a step and its lower limit."""

from collections.abc import Mapping, Sequence
import functools
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax

from benchmarks import cli
from benchmarks.cost import hlo, problem
from benchmarks.cost.problem import image_model, mlp, Problem, TRANSFORMS
from benchmarks.harness import publishing, report, store
import optax_svrg

_SIZE, _WIDTH = 1_000_000, 1_000
# Models and batch sizes.
CASES = {
  "mlp-256-batch-128": (mlp(784, 256, 256, 10), 128),
  "mlp-1024-batch-128": (mlp(784, 1024, 1024, 10), 128),
  "mlp-1024-batch-1024": (mlp(784, 1024, 1024, 10), 1024),
  "vit-128-batch-128": (image_model("vit", 28, 1, 10, width=128, depth=4), 128),
  "convnet-batch-128": (image_model("convnet", 28, 1, 10), 128),
}
# Gradients of an epoch in addition to those of the steps, in epochs.
EXTRA_GRADIENTS = {
  "plain": 0,
  "alpha-svrg": 2,
  "adaptive": 2,
  "alpha-svrg, table": 1,
  "alpha-svrg, alpha = 0": 0,
  "adaptive-saga": 0,
}
# Arrays like the parameters that a step must read and write: AdamW reads the
# gradient, and reads and writes the parameters and two moments; SVRG reads the
# gradient at the snapshot and the mean gradient.
MUST_MOVE = {"plain": 7, "alpha-svrg": 9, "adaptive": 9}
NOTES = """\
Times are medians over the rounds of the ratio to plain's epoch in the same
round. The limit counts the operations of the gradients alone. Methods with
snapshots take one in each epoch, `table` keeps its gradients. The first run
includes compilation. The second table is of the transformation and AdamW
without gradients, in arrays of the parameters' size; the third of a whole step,
above plain's, in copies of the gradient."""


def flops(lowered: jax.stages.Lowered) -> float:
  """Operations, counted before the compiler calls libraries for some."""
  return lowered.cost_analysis()["flops"]


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
  """Bytes in addition to those of the arguments and results."""
  return compiled.memory_analysis().temp_size_in_bytes


def measure_epochs(task: Problem, rounds: int) -> list[dict[str, Any]]:
  """Epoch times and their limit by the gradients that they need."""
  of_step = flops(task.lower_step(TRANSFORMS["plain"]))
  of_gradient = flops(task.lower_gradient())
  times = problem.seconds(task.programs(), rounds)
  return [
    {
      "method": name,
      "time": problem.ratio(times, name, "plain"),
      "limit": 1 + extra * of_gradient / of_step,
      "first": times[name][0] / times["plain"][0],
      "seconds": times[name],
    }
    for name, extra in EXTRA_GRADIENTS.items()
  ]


def temporary_gradients(task: Problem) -> dict[str, float]:
  """Temporary bytes of a step above plain's, in copies of the gradient."""
  transforms = {**TRANSFORMS, "adaptive-saga": optax_svrg.adaptive_saga(10)}
  temporary = {
    name: temporary_bytes(task.lower_step(transform).compile())
    for name, transform in transforms.items()
  }
  plain = temporary.pop("plain")
  size = sum(x.nbytes for x in jax.tree.leaves(task.params))
  return {name: (value - plain) / size for name, value in temporary.items()}


def updates_alone(size: int, dtype: Any) -> dict[str, jax.stages.Compiled]:
  """Compiles the transformation and AdamW, without the gradients."""
  grads = params = jnp.zeros((size // _WIDTH, _WIDTH), dtype)
  result = {}
  for name, transform in TRANSFORMS.items():
    tx = optax.chain(transform, optax.adamw(1e-3))
    update = functools.partial(problem.advance, tx)
    jitted = jax.jit(update, donate_argnums=(0, 1))
    lowered = jitted.lower(params, tx.init(params), grads, snapshot_grads=grads)
    result[name] = lowered.compile()
  return result


def measure_updates(size: int, dtype: Any) -> list[dict[str, Any]]:
  """Returns the arrays that updates ``must_move``, and ``moves`` as compiled.

  What is in a branch that is not taken as a rule is left out.
  """
  array_bytes = size * jnp.dtype(dtype).itemsize
  return [
    {
      "method": name,
      "must_move": MUST_MOVE[name],
      "moves": hlo.moved_bytes(compiled.as_text()) / array_bytes,
      "temporary": temporary_bytes(compiled) / array_bytes,
    }
    for name, compiled in updates_alone(size, dtype).items()
  ]


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """Makes the published table from the stored measurements."""
  epochs = [
    (
      *(name, row["method"], f"{row['time']:.2f}", f"{row['limit']:.2f}"),
      *(f"{row['time'] / row['limit']:.3f}", f"{row['first']:.1f}"),
    )
    for name, case in document["cases"].items()
    for row in case["epochs"]
  ]
  updates = [
    (
      *(row["method"], str(row["must_move"])),
      *(f"{row['moves']:.1f}", f"{row['temporary']:.2f}"),
    )
    for row in document["updates"]
  ]
  temporary = [
    (name, *(f"{x:.2f}" for x in case["temporary_gradients"].values()))
    for name, case in document["cases"].items()
  ]
  tables = {
    "case|method|time / plain|limit|time / limit|first run / plain's": epochs,
    "method|arrays it must move|as compiled|temporary arrays": updates,
    "temporary gradients|alpha-svrg|adaptive|adaptive-saga": temporary,
  }
  machine = document["machine"]
  parts = (
    *("# Cost of a step", f"    {document['command']}"),
    f"On {machine['cpus']} cores of {machine['device']}, {document['dtype']}."
    f" {NOTES}",
    *(report.markdown_table(k.split("|"), v) for k, v in tables.items()),
  )
  return publishing.files(parts)


@click.command()
@cli.options(
  ("--dtype", ("float32", "bfloat16"), "float32", "Of weights and images."),
  ("--steps", cli.positive, 10, "Number of batches of an epoch."),
  ("--rounds", cli.positive, 7, "Runs of each epoch, after a first one."),
)
@cli.cell_option(CASES)
@cli.out_option("step-cost")
@cli.publish_option
def main(
  dtype: str,
  cells: Sequence[str],
  steps: int,
  rounds: int,
  out: Path,
  publish: bool,
) -> None:
  """Measures epochs and steps as ratios to the least that they could take."""
  document: dict[str, Any] = {
    "module": __name__,
    "command": "python -m benchmarks step-cost",
    **store.environment(),
    **{"dtype": dtype, "steps": steps, "rounds": rounds},
    "updates": measure_updates(_SIZE, jnp.dtype(dtype)),
    "cases": {},
  }
  for name in cells or CASES:
    task = Problem(*CASES[name], steps, jnp.dtype(dtype))
    document["cases"][name] = {
      "epochs": measure_epochs(task, rounds),
      "temporary_gradients": temporary_gradients(task),
    }
    store.write_json(out / "runs.json", document)
    click.echo(name, err=True)
  publishing.show("step_cost", document, publish)
