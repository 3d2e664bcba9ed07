# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes that data parallel training sends, from compiled HLO."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
import optax

from benchmarks import cli
from benchmarks.cost import hlo, problem, steps
from benchmarks.cost.steps import AXIS
from benchmarks.harness import report, store
import optax_svrg

_BATCHES, _BATCH_SIZE = 4, 64
_PLACEMENTS = ("shard_map", "jit", "zero", "fsdp")
_METHODS = ("plain", "alpha-svrg", "adaptive-svrg", "adaptive-saga")


def programs(mesh: Mesh) -> Iterator[tuple[str, str, str]]:
  """Compiles steps of a perceptron, and snapshot passes over four batches."""
  model = problem.mlp(263, 88, 29)
  task = problem.Problem(
    model, _BATCH_SIZE, _BATCHES, jnp.float32, optax.adamw(1e-3)
  )
  params = jax.eval_shape(lambda: task.params)
  for placement in _PLACEMENTS:
    naive = (steps.NAIVE,) if placement == "shard_map" else ()
    for method in (*_METHODS, *naive):
      case = steps.Case("", method, placement, "", _BATCH_SIZE, _BATCHES)
      step = steps.make_step(case, mesh, task.loss, params, model.shape)
      text = steps.compile_step(step).as_text()
      yield f"step, {placement}", method, text

  local_grad = optax_svrg.device_local(task.grad, AXIS)
  mean_grad = lambda p, batch: jax.lax.pmean(local_grad(p, batch), AXIS)
  for name, grad, axis_name in (
    ("mean_gradient", local_grad, AXIS),
    ("naive", mean_grad, None),
  ):

    def run(params: Any, batches: Any, grad=grad, axis_name=axis_name) -> Any:
      return optax_svrg.mean_gradient(
        grad, params, batches, axis_name=axis_name
      )

    mapped = jax.shard_map(
      run, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P()
    )
    lowered = jax.jit(mapped).lower(task.params, tuple(task.batches))
    yield "pass, shard_map", name, lowered.compile().as_text()


def rows(mesh: Mesh) -> list[dict[str, Any]]:
  """Counts what the programs send."""
  result: list[dict[str, Any]] = []
  first: dict[str, int] = {}
  for how, method, text in programs(mesh):
    num_bytes, operations = hlo.traffic(text, mesh.size)
    total = sum(num_bytes.values())
    result.append(
      {
        "how": how,
        "method": method,
        "bytes": num_bytes,
        "operations": operations,
        "total": total,
        "ratio": total / first.setdefault(how, total),
      }
    )
  return result


def table(counted: Sequence[dict[str, Any]]) -> str:
  """A line for each program, in Markdown."""
  return report.markdown_table(
    ("", "method", *hlo.KINDS, "total", "ratio"),
    [
      [
        row["how"],
        row["method"],
        *(
          f"{row['bytes'][kind]:,} ({row['operations'][kind]})"
          for kind in hlo.KINDS
        ),
        f"{row['total']:,}",
        f"{row['ratio']:.4f}",
      ]
      for row in counted
    ],
  )


@click.command()
@click.option(
  "--devices", type=click.IntRange(min=2), default=8, show_default=True
)
@cli.out_option("communication")
def main(devices: int, out: Path) -> None:
  """Counts bytes and operations of one step and of one snapshot pass.

  On the CPU, whose devices are made up; nothing is executed. Bytes, in
  parentheses the number of operations.
  """
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", devices)
  mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,))
  counted = rows(mesh)
  store.write_json(
    out / "results.json",
    {**store.environment(), "devices": devices, "rows": counted},
  )
  text = table(counted)
  (out / "table.md").write_text(text + "\n", encoding="utf-8")
  click.echo(text)
