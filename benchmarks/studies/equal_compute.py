# SPDX-License-Identifier: Apache-2.0
"""Methods at the same number of gradients: what else could be bought."""

from benchmarks.harness import comparison, figures, report, study
from benchmarks.harness.experiment import Experiment

LENGTHS = {"plain": 1, "plain, 2x the epochs": 2, "plain, 3x the epochs": 3}
TRIPLE = "plain, 3x the epochs"


def _longer(factor: int) -> study.Arm:
  return lambda e: e.replace(method="plain", epochs=factor * e.epochs)


def _larger(template: Experiment) -> Experiment:
  """As many updates as plain, each with three times the examples."""
  return template.replace(
    method="plain",
    epochs=3 * template.epochs,
    batch_size=3 * template.batch_size,
  )


ARMS: dict[str, study.Arm] = {
  **{name: _longer(factor) for name, factor in LENGTHS.items()},
  "plain, 3x the batch": _larger,
  "SVRG": study.arm("svrg"),
  "alpha-SVRG, linear from 0.75": study.arm("alpha-svrg", alpha0=0.75),
  "adaptive SVRG": study.arm("adaptive"),
  "adaptive SVRG, gradient table": study.arm("snapshots", mean="table"),
  "SAGA": study.arm("saga"),
  "adaptive SAGA": study.arm("adaptive-saga"),
}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
)
# Each against plain with at least as many gradients.
RIVALS = {
  "SVRG": TRIPLE,
  "alpha-SVRG, linear from 0.75": TRIPLE,
  "adaptive SVRG": TRIPLE,
  "plain, 3x the batch": TRIPLE,
  "adaptive SVRG, gradient table": "plain, 2x the epochs",
  "SAGA": "plain",
  "adaptive SAGA": "plain",
}


def _point(results: study.Results, cell: str, name: str) -> tuple[float, float]:
  return (
    results.mean(cell, name, "gradients_per_example"),
    results.mean(cell, name),
  )


def table(results: study.Results) -> str:
  """Each method against plain with as many gradients."""
  verdicts = results.verdicts(list(RIVALS.items()))
  parts = []
  for cell in results.cells:
    curve = [_point(results, cell, name) for name in LENGTHS]
    rows = []
    for name in ARMS:
      gradients, loss = _point(results, cell, name)
      ratio = comparison.over_plain(gradients, loss, curve)
      rows.append(
        [
          name,
          f"{gradients:.1f}",
          results.loss_text(cell, name),
          results.accuracy_text(cell, name),
          "" if ratio is None else f"{ratio:.2f}",
          verdicts.get((cell, name, RIVALS.get(name)), ""),
        ]
      )
    columns = (
      *("method", "gradients per example", "final train loss"),
      *("validation accuracy (%)", "/ plain's with as many gradients"),
      "against plain with as many epochs' gradients",
    )
    parts.append(f"{cell}\n\n{report.markdown_table(columns, rows)}")
  parts.append(f"In all: {comparison.count(list(verdicts.values()))}.")
  return "\n\n".join(parts)


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients."""
  panels = []
  for cell in results.cells:
    x, y = zip(*(_point(results, cell, n) for n in LENGTHS), strict=True)
    lines = [figures.Line("plain, 1 to 3 times the epochs", "plain", x, y)]
    for name in ARMS:
      if name not in LENGTHS:
        gradients, loss = _point(results, cell, name)
        lines.append(
          figures.Line(name, figures.family(name), [gradients], [loss])
        )
    panels.append(
      figures.Panel(cell, "gradients per example", "final train loss", lines)
    )
  return figures.Figure("Means over the seeds", panels)


STUDY = study.Study(
  "equal_compute", "Equal numbers of gradients", CELLS, ARMS, table, figure
)
render, main = STUDY.render, STUDY.command()
