# SPDX-License-Identifier: Apache-2.0
"""Methods at the same number of gradients: what else could be bought."""

from benchmarks.harness import comparison, figures, report, study
from benchmarks.harness.experiment import Experiment

DOUBLE, TRIPLE = "plain, 2x the epochs", "plain, 3x the epochs"


def _larger(template: Experiment) -> Experiment:
  """As many updates as plain, each with three times the examples."""
  return template.replace(
    method="plain",
    epochs=3 * template.epochs,
    batch_size=3 * template.batch_size,
  )


ARMS: dict[str, study.Arm] = {
  **study.plain_lengths(),
  "plain, 3x the batch": _larger,
  "alpha-SVRG, linear from 0.75": study.arm("alpha-svrg", alpha0=0.75),
  "adaptive SVRG": study.arm("adaptive"),
  "adaptive SAGA": study.arm("adaptive-saga"),
  "STORM": study.arm("storm"),
  "MARS": study.arm("mars"),
  "MARS, approximate": study.arm("mars", is_exact=False),
}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
)
# Each against plain with as many gradients.
RIVALS = {
  "plain, 3x the batch": TRIPLE,
  "alpha-SVRG, linear from 0.75": TRIPLE,
  "adaptive SVRG": TRIPLE,
  "adaptive SAGA": "plain",
  "STORM": DOUBLE,
  "MARS": DOUBLE,
  "MARS, approximate": "plain",
}


def table(results: study.Results) -> str:
  """Each method against plain with as many gradients."""
  verdicts = results.verdicts(list(RIVALS.items()))
  parts = []
  for cell in results.cells:
    rows = [
      [
        name,
        f"{results.point(cell, name)[0]:.1f}",
        results.loss_text(cell, name),
        results.accuracy_text(cell, name),
        results.over_plain(cell, name),
        RIVALS.get(name, ""),
        verdicts.get((cell, name, RIVALS.get(name)), ""),
      ]
      for name in ARMS
    ]
    columns = (
      *("method", "gradients per example", "final train loss"),
      *("validation accuracy (%)", "/ plain's with as many gradients"),
      *("rival", "against the rival"),
    )
    parts.append(f"{cell}\n\n{report.markdown_table(columns, rows)}")
  count = comparison.count(
    [
      text
      for (_, name, _), text in verdicts.items()
      if not name.startswith("plain")
    ]
  )
  parts.append(f"All of these against plain: {count}.")
  return "\n\n".join(parts)


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients."""
  names = [name for name in ARMS if name not in study.LENGTHS]
  return figures.Figure(
    "Means over the seeds",
    [
      panel
      for cell in results.cells
      for panel in results.against_gradients(cell, names)
    ],
  )


STUDY = study.Study(
  "equal_compute", "Equal numbers of gradients", CELLS, ARMS, table, figure
)
render, main = STUDY.render, STUDY.command()
