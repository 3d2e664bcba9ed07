# SPDX-License-Identifier: Apache-2.0
"""Requirements of steps on TPUs, by the TPU compiler."""

from collections.abc import Mapping, Sequence
import itertools
import json
import math
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import click
import jax

import benchmarks
from benchmarks import cli
from benchmarks.cost.tpu_program import Case, ENVIRONMENT, METHODS, PLACEMENTS
from benchmarks.harness import report, store
from benchmarks.harness.distributed import check_batch_size

MODELS = ("mlp-1024", "vit-tiny", "vit-base", "convnext-femto")
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
# Of a device, in GiB.
MEMORY = {"v5e": 16, "v6e": 32, "v5p": 95}
_GIB = 2.0**30


def compile_case(case: Case) -> dict[str, Any]:
  """Compiles a case in a process of its own, as libtpu asks for."""
  result = subprocess.run(
    [sys.executable, "-m", "benchmarks.cost.tpu_program"],
    input=json.dumps(case._asdict()),
    env={**os.environ, **ENVIRONMENT},
    capture_output=True,
    text=True,
    check=False,
  )
  if result.returncode:
    lines = result.stderr.strip().splitlines() or ["no message"]
    hint = ""
    if "libtpu" in result.stderr or "TPU support" in result.stderr:
      hint = ' The TPU compiler is needed: pip install "jax[tpu]".'
    reason = lines[-1].rstrip(".")
    raise benchmarks.UserError(f"{case.name}: {reason}.{hint}")
  return json.loads(result.stdout)


def measured(case: Case, folder: Path) -> dict[str, Any]:
  """The counts of a case, compiled unless they are stored already."""
  path = folder / f"{case.name}.json"
  if not path.exists():
    record = {"case": case._asdict(), "counts": compile_case(case)}
    store.write_json(path, {**record, **store.environment()})
  return json.loads(path.read_text("utf-8"))["counts"]


def stored(folder: Path) -> dict[Case, dict[str, Any]]:
  """All cases of a folder, in the order of models, methods and placements."""
  records = [json.loads(p.read_text("utf-8")) for p in folder.glob("*.json")]
  found = {Case(**record["case"]): record["counts"] for record in records}
  order = (*MODELS, *METHODS, *PLACEMENTS, *TOPOLOGIES)

  def key(case: Case) -> tuple[Any, ...]:
    names = (case.model, case.topology, case.placement, case.method)
    return (*map(order.index, names), *case[4:])

  return {case: found[case] for case in sorted(found, key=key)}


def baseline(case: Case) -> Case:
  """Plain training to compare with; it has no state to put on the host."""
  placement = "jit" if case.placement == "host" else case.placement
  return Case(case.model, "plain", placement, *case[3:5])


def table(found: Mapping[Case, Mapping[str, Any]]) -> str:
  """Ratios to plain, a line for each case, in Markdown.

  Of what does not fit, it is only known how much it needs.
  """
  rows = []
  for case, counts in found.items():
    base = found.get(baseline(case))
    if base and base["fits"]:
      rows.append(_row(case, counts, base))
  columns = (
    *("model", "topology", "placement", "method", "FLOPs", "bytes"),
    *("bytes above plain, P", "temporary above plain, P"),
    *("table, MiB", "device, MiB", "host, MiB", "reduced", "collectives"),
  )
  return report.markdown_table(columns, rows)


def _row(
  case: Case, counts: Mapping[str, Any], base: Mapping[str, Any]
) -> list[str]:
  above = lambda name: (counts[name] - base[name]) / counts["params"]
  sent = lambda counts: sum(counts["collective_bytes"].values())
  method = case.method
  if "saga" in method:
    method += f", {case.num_batches} batches"
  if case.table_dtype != "float32":
    method += f", {case.table_dtype}"
  names = [case.model, case.topology, case.placement, method]
  if not counts["fits"]:
    table, needed = (f"{counts[x] / 2**20:.0f}" for x in ("table", "needed"))
    return [*names, "does not fit", *[""] * 3, table, needed, *[""] * 3]
  collectives = f"{sum(counts['collectives'].values())}"
  if windows := counts["overlapped"]:
    hidden = sum(work > 0 for work in windows)
    collectives += f", {len(windows)} asynchronous, {hidden} overlapped"
  return [
    *names,
    *(f"{counts[x] / base[x]:.3f}" for x in ("flops", "bytes_accessed")),
    *(f"{above('bytes_accessed'):.1f}", f"{above('temporary'):.2f}"),
    *(f"{counts[x] / 2**20:.0f}" for x in ("table", "needed", "host")),
    *(f"{sent(counts) / sent(base):.3f}", collectives),
  ]


def fit(case: Case, counts: Mapping[str, Any]) -> str:
  """Says whether a step fits on a device, or what makes it fit."""
  has = MEMORY[case.topology.partition(":")[0]]
  needs, state = counts["needed"] / _GIB, counts["state"] / _GIB
  lines = [
    f"{case.model}, {case.method}, {case.placement} on {case.topology} needs"
    f" {needs:.2f} of the {has} GiB of a device, {state:.2f} of them for the"
    " state of the method."
  ]
  if needs > has or not counts["fits"]:
    for name, num_bytes in _alternatives(case, counts).items():
      size = needs - state + num_bytes / _GIB
      verdict = "fits" if size <= has else "does not fit"
      lines.append(f"  with {name}: about {size:.2f} GiB, {verdict}")
  return "\n".join(lines)


def _alternatives(case: Case, counts: Mapping[str, Any]) -> dict[str, float]:
  """Bytes of the state on a device with other settings."""
  state, halved = counts["state"], counts["state"] - counts["table"] / 2
  has_halves = counts["table"] and case.table_dtype == "float32"
  sizes = {"table_dtype=bfloat16": halved} if has_halves else {}
  if case.placement not in ("zero", "fsdp"):
    sizes["ZeRO"] = state / counts["devices"]
    if has_halves:
      sizes["ZeRO and table_dtype=bfloat16"] = halved / counts["devices"]
  return {**sizes, "the state in the host's memory": 0}


def cases(names: Mapping[str, Sequence[str]], *rest: Any) -> list[Case]:
  """The combinations of choices, plain first, as all are compared with it."""
  choices = (names[x] for x in ("topology", "model", "placement", "method"))
  found: dict[Case, None] = {}
  for topology, model, placement, method in itertools.product(*choices):
    case = Case(model, method, placement, topology, *rest)
    found.setdefault(baseline(case))
    if method != "plain":
      found.setdefault(case)
  return list(found)


_SEVERAL = "One, or several separated by commas."


@click.command()
@cli.options(
  ("--model", cli.Names(MODELS), "vit-tiny", _SEVERAL),
  ("--method", cli.Names(METHODS), ",".join(METHODS), _SEVERAL),
  ("--placement", cli.Names(PLACEMENTS), "jit,shard_map", _SEVERAL),
  ("--topology", cli.Names(TOPOLOGIES), "v5e:4x4", _SEVERAL),
  ("--batch-size", cli.positive, 1024, "Examples, over all devices."),
  ("--num-batches", cli.positive, 312, "Number of batches of SAGA's table."),
  ("--table-dtype", ("float32", "bfloat16"), "float32", ""),
)
@cli.out_option("tpu")
def main(
  batch_size: int,
  num_batches: int,
  table_dtype: str,
  out: Path,
  **names: Sequence[str],
) -> None:
  """Compiles training steps for TPUs, without any, and counts what they need.

  Per device: operations, bytes, memory of device and host, and collective
  operations, as ratios to plain training with AdamW. P is the size of the
  parameters on a device. Images have 224 pixels, computation is in bfloat16.
  A ViT compiles in one to five minutes.
  """
  for topology in names["topology"]:
    devices = math.prod(map(int, topology.partition(":")[2].split("x")))
    check_batch_size(batch_size, math.inf, devices)
  jax.config.update("jax_platforms", "cpu")  # Compilers run in processes.
  try:
    for case in cases(names, batch_size, num_batches, table_dtype):
      click.echo(fit(case, measured(case, out)))
  finally:
    if found := stored(out):
      (out / "table.md").write_text(table(found) + "\n", encoding="utf-8")
  click.echo(f"\n{table(found)}")
