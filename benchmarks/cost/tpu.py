# SPDX-License-Identifier: Apache-2.0
"""Requirements of steps on TPUs, by the TPU compiler."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

import click
import jax

import benchmarks
from benchmarks import cli
from benchmarks.cost.steps import Case, METHODS, PLACEMENTS
from benchmarks.cost.tpu_program import ENVIRONMENT
from benchmarks.harness import report, store

MODELS = ("mlp-1024", "vit-tiny", "vit-base", "convnext-femto")
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4")
# Of a device, in GiB.
MEMORY = {"v5e": 16, "v6e": 32, "v5p": 95}
_GIB = 2.0**30
_WORKER = "benchmarks.cost.tpu_program"


def compile_case(case: Case) -> dict[str, Any]:
  """Compiles a case in a process of its own, as libtpu asks for."""
  result = subprocess.run(
    [sys.executable, "-m", _WORKER],
    input=json.dumps(case._asdict()),
    env={**os.environ, **ENVIRONMENT},
    capture_output=True,
    text=True,
    check=False,
  )
  if result.returncode:
    lines = result.stderr.strip().splitlines() or ["no message"]
    hint = ""
    if "libtpu" in result.stderr:
      hint = ' The TPU compiler is needed: pip install "jax[tpu]".'
    raise benchmarks.UserError(f"{case.name}: {lines[-1]}{hint}")
  return json.loads(result.stdout)


def path_of(folder: Path, case: Case) -> Path:
  """The file of a case."""
  return folder / f"{case.name}.json"


def measured(case: Case, folder: Path) -> dict[str, Any]:
  """The counts of a case, compiled unless they are stored already."""
  path = path_of(folder, case)
  if not path.exists():
    record = {"case": case._asdict(), "counts": compile_case(case)}
    store.write_json(path, {**record, **store.environment()})
  return json.loads(path.read_text("utf-8"))["counts"]


def stored(folder: Path) -> dict[Case, dict[str, Any]]:
  """All cases of a folder, in the order of models, methods and placements."""
  found = {}
  for path in folder.glob("*.json"):
    record = json.loads(path.read_text("utf-8"))
    found[Case(**record["case"])] = record["counts"]
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
  """Ratios to plain, a line for each case, in Markdown."""
  rows = []
  for case, counts in found.items():
    base = found.get(baseline(case))
    if base is None or not (base["fits"] and counts["fits"]):
      continue
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
  sent = sum(counts["collective_bytes"].values())
  params = counts["params"]
  above = lambda name: (counts[name] - base[name]) / params
  method = case.method
  if "saga" in method:
    method += f", {case.num_batches} batches"
  if case.table_dtype != "float32":
    method += f", {case.table_dtype}"
  return [
    *(case.model, case.topology, case.placement, method),
    f"{counts['flops'] / base['flops']:.3f}",
    f"{counts['bytes_accessed'] / base['bytes_accessed']:.3f}",
    f"{above('bytes_accessed'):.1f}",
    f"{above('temporary'):.2f}",
    f"{counts['table'] / 2**20:.0f}",
    f"{counts['needed'] / 2**20:.0f}",
    f"{counts['host'] / 2**20:.0f}",
    f"{sent / sum(base['collective_bytes'].values()):.3f}",
    _collectives(counts),
  ]


def _collectives(counts: Mapping[str, Any]) -> str:
  """Their number, and of the asynchronous ones those that hide behind work."""
  total = sum(counts["collectives"].values())
  windows = counts["overlapped"]
  if not windows:
    return f"{total}"
  hidden = sum(work > 0 for work in windows)
  return f"{total}, {len(windows)} asynchronous, {hidden} overlapped"


def fit(case: Case, counts: Mapping[str, Any]) -> str:
  """Says whether a step fits on a device, or what makes it fit."""
  device = case.topology.partition(":")[0]
  has = MEMORY[device]
  needs = counts["needed"] / _GIB
  what = f"{case.model}, {case.method}, {case.placement} on {case.topology}"
  lines = [
    f"{what} needs {needs:.2f} of the {has} GiB of a device,"
    f" {counts['state'] / _GIB:.2f} of them for the state of the method."
  ]
  if needs <= has and counts["fits"]:
    return lines[0]
  rest = needs - counts["state"] / _GIB
  for name, num_bytes in _alternatives(case, counts).items():
    size = rest + num_bytes / _GIB
    verdict = "fits" if size <= has else "does not fit"
    lines.append(f"  with {name}: about {size:.2f} GiB, {verdict}")
  return "\n".join(lines)


def _alternatives(case: Case, counts: Mapping[str, Any]) -> dict[str, float]:
  """Bytes of the state on a device with other settings."""
  sizes = {}
  state, halved = counts["state"], counts["state"] - counts["table"] / 2
  devices = counts["devices"]
  is_whole = case.placement not in ("zero", "fsdp")
  has_halves = counts["table"] and case.table_dtype == "float32"
  if has_halves:
    sizes["table_dtype=bfloat16"] = halved
  if is_whole:
    sizes["ZeRO"] = state / devices
  if has_halves and is_whole:
    sizes["ZeRO and table_dtype=bfloat16"] = halved / devices
  sizes["the state in the host's memory"] = 0
  return sizes


def cases(
  names: Mapping[str, Sequence[str]], batch_size: int, rest: Sequence[Any]
) -> list[Case]:
  """The combinations of choices, plain first, as all are compared with it."""
  found: dict[Case, None] = {}
  for topology, model, placement, method in itertools.product(
    names["topology"], names["model"], names["placement"], names["method"]
  ):
    case = Case(model, method, placement, topology, batch_size, *rest)
    if method == "plain":
      case = baseline(case)
    found.setdefault(baseline(case))
    found.setdefault(case)
  return list(found)


def _choice(name: str, known: Iterable[str], default: str) -> Any:
  return click.option(
    f"--{name}",
    type=cli.Names(known),
    default=default,
    show_default=True,
    help="One, or several separated by commas.",
  )


@click.command()
@_choice("model", MODELS, "vit-tiny")
@_choice("method", METHODS, ",".join(METHODS))
@_choice("placement", PLACEMENTS, "jit,shard_map")
@_choice("topology", TOPOLOGIES, "v5e:4x4")
@click.option(
  "--batch-size",
  type=cli.positive,
  default=1024,
  show_default=True,
  help="Number of examples in a batch, over all devices.",
)
@click.option(
  "--num-batches",
  type=cli.positive,
  default=312,
  show_default=True,
  help="Number of batches of SAGA's table.",
)
@click.option(
  "--table-dtype",
  type=click.Choice(["float32", "bfloat16"]),
  default="float32",
  show_default=True,
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
  jax.config.update("jax_platforms", "cpu")  # Compilers run in processes.
  try:
    for case in cases(names, batch_size, (num_batches, table_dtype)):
      click.echo(fit(case, measured(case, out)))
  finally:
    found = stored(out)
    if found:
      (out / "table.md").write_text(table(found) + "\n", encoding="utf-8")
  click.echo(f"\n{table(found)}")
