# SPDX-License-Identifier: Apache-2.0
"""Seconds and passes to the optimum: ``python -m benchmarks convex``."""

from collections.abc import Mapping, Sequence
import importlib.metadata
import json
import math
from pathlib import Path
import time
from typing import Any

import click
import jax
import numpy as np

from benchmarks import cli
from benchmarks.harness import figures, publishing, report, store
from benchmarks.studies.convex import problems, solvers

TOLERANCES = (1e-6, 1e-8)
_LIMIT = 30.0  # Seconds of a call after which more work is not tried.
_SHORT = 1.0  # Seconds of a call that is repeated against noise.
NOTES = """\
Mean logistic loss without an intercept, in float64, from zero, with an l2 or an
l1 penalty of strength 0.001. The gap is the objective less the minimum, which
is that of the best point found; its bound, from the subgradient, is above each
table. **Seconds** are those of the processor, on one core, for the whole call;
shorter ones are the lesser of two. In brackets are those of the first call,
with compilation. **Passes** are products with the features and their transpose;
liblinear and newton-cholesky do not count them. Solvers are called with more
and more iterations, or smaller and smaller tolerances; between two calls the
logarithm of the gap is interpolated. `not reached`: in 800 passes, 1,000 of
ours, or 30 s.

newton-cholesky is left out where its Hessian has more than 3,000 columns,
liblinear where there are more than two classes. For l1, SciPy's L-BFGS-B has
the positive and negative parts of weights. nemos and copt are no longer run:
nemos had a step of one over the largest curvature of eight batches, and batches
of 8; copt 1/(3 L), as in its examples.

Where `fit_linear` is slow. **Compilation**: it compiles an epoch of SAGA and a
direction of Newton's method for each loss and shape, which takes longer than
small problems do. **Passes**: evaluations and the products of Newton's method
count, too. **l1 alone**: the Hessian is singular, so that Newton's steps are
short until it is known which weights are 0."""


def trace(
  problem: problems.Problem, solver: solvers.Solver, minimum: float
) -> dict[str, Any]:
  """Calls a solver with more and more effort, up to the least tolerance."""
  record = {"compiling": 0.0, "passes": [], "seconds": [], "gap": []}
  for effort in solver.efforts:
    compiles = solver.uses_jax and not record["gap"]
    if compiles:
      jax.clear_caches()
    found, first = _timed(solver, problem, effort)
    seconds = first
    if compiles or first < _SHORT:
      found, again = _timed(solver, problem, effort)
      seconds = min(first, again)
    if compiles:
      record["compiling"] = first - seconds
    gap = problems.evaluate(problem, found.weights).value - minimum
    record["passes"].append(found.passes)
    record["seconds"].append(seconds)
    record["gap"].append(gap)
    if gap <= min(TOLERANCES) or seconds > _LIMIT:
      break
  return record


def _timed(
  solver: solvers.Solver, problem: problems.Problem, effort: float
) -> tuple[solvers.Found, float]:
  start = time.process_time()
  found = solver.solve(problem, effort)
  return found, time.process_time() - start


def reference(problem: problems.Problem) -> problems.Value:
  """The minimum, by ``fit_linear``, and how well it is known."""
  tol = 1e-12 if problem.l1 else 1e-9
  found = solvers.SOLVERS["fit_linear"].solve(problem, tol)
  return problems.evaluate(problem, found.weights)


def reach(record: Mapping[str, Any], tolerance: float, field: str) -> float:
  """Passes or seconds at which a gap is reached, infinite if it is not.

  Interpolates linearly in the logarithm of the gap.
  """
  values, gaps = record[field], record["gap"]
  i = next((i for i, gap in enumerate(gaps) if gap <= tolerance), None)
  if i is None:
    return math.inf
  if values[i] is None:
    return math.nan
  around = slice(max(0, i - 1), i + 1)
  logs = -np.log10(np.maximum(gaps[around], 1e-16))
  return float(np.interp(-math.log10(tolerance), logs, values[around]))


def _cell_table(cell: Mapping[str, Any]) -> str:
  records, lines, columns = cell["solvers"], [], ["solver"]
  for tolerance in TOLERANCES:
    columns += [f"passes to {tolerance:.0e}", "seconds", "saga's / these"]
  for name, record in records.items():
    line = [name]
    for tolerance in TOLERANCES:
      passes = reach(record, tolerance, "passes")
      seconds = reach(record, tolerance, "seconds")
      if math.isinf(seconds):
        line += ["", f"not reached ({min(record['gap']):.0e})", ""]
        continue
      base = reach(records[solvers.BASELINE], tolerance, "seconds")
      whole = seconds + record["compiling"]
      line += [
        "" if math.isnan(passes) else f"{passes:.0f}",
        f"{seconds:#.2g}" + (f" [{whole:#.2g}]" if record["compiling"] else ""),
        "" if math.isinf(base) else f"{base / seconds:#.2g}x",
      ]
    lines.append(line)
  return report.markdown_table(columns, lines)


_DRAWN = {
  "fit_linear": "saga",
  "minimize, saga": "saga",
  "minimize, svrg": "svrg",
  solvers.BASELINE: "plain",
  "nemos SVRG": "plain",  # As published; it is no longer run.
  "scikit-learn lbfgs": "other",
  "SciPy L-BFGS, compiled gradient": "other",
}


def _figure(cells: Mapping[str, Mapping[str, Any]]) -> figures.Figure:
  panels = []
  for name, cell in cells.items():
    found = cell["solvers"]
    lines = [
      figures.Line(
        *(solver, family, found[solver]["seconds"]),
        [max(gap, 1e-13) for gap in found[solver]["gap"]],
      )
      for solver, family in _DRAWN.items()
      if solver in found
    ]
    panels.append(figures.Panel(name, "seconds", "gap", lines, log_x=True))
  return figures.Figure("Gap against seconds, without compilation", panels)


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """Makes the published files from the stored calls."""
  cells = document["cells"]
  parts = [
    "# Convex problems: seconds and passes to the optimum",
    f"    {document['command']}",
    NOTES,
  ]
  for name, cell in cells.items():
    rows, columns, outputs = cell["shape"]
    parts += [
      f"`{name}`: {rows:,} examples, {columns} features, {outputs} outputs;"
      f" minimum {cell['minimum']:.12f}, known to {cell['bound']:.0e}",
      _cell_table(cell),
    ]
  return publishing.files(parts, _figure(cells))


@click.command()
@cli.data_dir_option
@cli.cell_option(problems.CELLS)
@cli.out_option("convex")
@cli.publish_option
def main(
  data_dir: Path | None, cells: Sequence[str], out: Path, publish: bool
) -> None:
  """Solves logistic regression with fit_linear, minimize, and other packages.

  For one core, start it by taskset. The features of a net need --data-dir.
  """
  has_data = lambda name: data_dir or not name.startswith(problems.PROBED)
  if not all(map(has_data, cells)):
    raise click.UsageError(f"{problems.PROBED} needs --data-dir.")
  path = out / "runs.json"
  document = json.loads(path.read_text("utf-8")) if path.exists() else {}
  found = document.setdefault("cells", {})
  document |= {
    "module": __name__,
    "command": "python -m benchmarks convex",
    **store.environment(),
    "packages": {
      name: importlib.metadata.version(name)
      for name in ("scikit-learn", "scipy")
    },
  }
  for name in cells or filter(has_data, problems.CELLS):
    cell, problem = found.setdefault(name, {}), problems.make(name, data_dir)
    with jax.enable_x64(True):
      if "minimum" not in cell:
        cell["shape"] = [len(problem.labels), *problem.shape]
        cell["minimum"], cell["bound"] = reference(problem)
      records = cell.setdefault("solvers", {})
      for label, solver in solvers.SOLVERS.items():
        if label not in records and solver.accepts(problem):
          records[label] = trace(problem, solver, cell["minimum"])
          store.write_json(path, document)
          click.echo(f"{name}: {label}", err=True)
  document["cells"] = {c: found[c] for c in problems.CELLS if c in found}
  publishing.show("convex", document, publish)
