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
from benchmarks.cost import hlo
from benchmarks.cost.problem import (
  image_model,
  METHODS,
  mlp,
  Problem,
  ratio,
  seconds,
  TRANSFORMS,
)
from benchmarks.harness import publishing, report, store
import optax_svrg

_SIZE, _WIDTH = 1_000_000, 1_000
MODELS = {
  "mlp-256": mlp(256, 256),
  "mlp-1024": mlp(1024, 1024),
  "vit-128": image_model("vit", width=128, depth=4),
  "convnet": image_model("convnet"),
}
# Models and batch sizes.
CASES = {
  f"{model}-batch-{batch_size}": (model, batch_size)
  for model, batch_size in (
    *(("mlp-256", 128), ("mlp-1024", 128), ("mlp-1024", 1024)),
    *(("vit-128", 128), ("convnet", 128)),
  )
}
# Gradients of an epoch in addition to those of the steps, in epochs.
EXTRA_GRADIENTS = dict(zip(METHODS, (0, 2, 2, 1, 0, 0), strict=True))
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


def measure_epochs(problem: Problem, rounds: int) -> list[dict[str, Any]]:
  """Epoch times and their limit by the gradients that they need."""
  of_step = flops(problem.lower_step(TRANSFORMS["plain"]))
  of_gradient = flops(problem.lower_gradient())
  times = seconds(problem.programs(), rounds)
  return [
    {
      "method": name,
      "time": ratio(times, name, "plain"),
      "limit": 1 + extra * of_gradient / of_step,
      "first": times[name][0] / times["plain"][0],
      "seconds": times[name],
    }
    for name, extra in EXTRA_GRADIENTS.items()
  ]


def temporary_gradients(problem: Problem) -> dict[str, float]:
  """Temporary bytes of a step above plain's, in copies of the gradient."""
  transforms = {**TRANSFORMS, "adaptive-saga": optax_svrg.adaptive_saga(10)}
  temporary = {
    name: problem.lower_step(transform)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for name, transform in transforms.items()
  }
  plain = temporary.pop("plain")
  size = sum(x.nbytes for x in jax.tree.leaves(problem.params))
  return {name: (value - plain) / size for name, value in temporary.items()}


def updates_alone(size: int, dtype: Any) -> dict[str, jax.stages.Compiled]:
  """Compiles the transformation and AdamW, without the gradients."""
  params = jnp.zeros((size // _WIDTH, _WIDTH), dtype)
  result = {}
  for name, transform in TRANSFORMS.items():
    tx = optax.chain(transform, optax.adamw(1e-3))
    jitted = jax.jit(functools.partial(_update, tx), donate_argnums=0)
    lowered = jitted.lower((params, tx.init(params)), params, params)
    result[name] = lowered.compile()
  return result


def _update(tx: Any, carry: Any, grads: Any, snapshot_grads: Any) -> Any:
  params, state = carry
  updates, state = tx.update(
    grads, state, params, snapshot_grads=snapshot_grads
  )
  return optax.apply_updates(params, updates), state


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
      "temporary": compiled.memory_analysis().temp_size_in_bytes / array_bytes,
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
    model, batch_size = CASES[name]
    problem = Problem(MODELS[model], batch_size, steps, jnp.dtype(dtype))
    document["cases"][name] = {
      "epochs": measure_epochs(problem, rounds),
      "temporary_gradients": temporary_gradients(problem),
    }
    store.write_json(out / "runs.json", document)
    click.echo(name, err=True)
  publishing.show("step_cost", document, publish)
