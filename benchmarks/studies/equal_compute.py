# SPDX-License-Identifier: Apache-2.0
"""Methods at the same number of gradients: what else could be bought."""

from benchmarks.harness import comparison, figures, study

PLAIN, DOUBLE, TRIPLE = study.LENGTHS
ARMS = {
  **study.LENGTHS,
  # As many updates as plain.
  "plain, 3x the batch": lambda e: study.LENGTHS[TRIPLE](
    e.replace(batch_size=3 * e.batch_size)
  ),
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
  "adaptive SAGA": PLAIN,
  "STORM": DOUBLE,
  "MARS": DOUBLE,
  "MARS, approximate": PLAIN,
}


def table(results: study.Results) -> str:
  """Each method against plain with as many gradients."""
  against = results.against(RIVALS)
  tables = results.tables(
    {
      "method": lambda cell, name: name,
      "gradients per example": results.gradients_text,
      "final train loss": results.loss_text,
      "validation accuracy (%)": results.accuracy_text,
      "/ plain's with as many gradients": results.over_plain_text,
      "rival": lambda cell, name: RIVALS.get(name, ""),
      "against the rival": against,
    }
  )
  count = comparison.count(
    [
      against(cell, name)
      for cell in results.cells
      for name in RIVALS
      if not name.startswith("plain")
    ]
  )
  return f"{tables}\n\nAll of these against plain: {count}."


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients."""
  panels = [
    panel
    for cell in results.cells
    for panel in results.against_gradients(cell, RIVALS)
  ]
  return figures.Figure("Means over the seeds", panels)


STUDY = study.Study(
  "equal_compute", "Equal numbers of gradients", CELLS, ARMS, table, figure
)
render, main = STUDY.render, STUDY.command()
