# SPDX-License-Identifier: Apache-2.0
"""Methods at the same number of gradients: what else could be bought."""

import itertools

from benchmarks.harness import comparison, figures, study

PLAIN, DOUBLE, TRIPLE = study.LENGTHS
# Each with its rival, plain with as many gradients.
OURS = {
  # As many updates as plain.
  "plain, 3x the batch": (
    lambda e: study.LENGTHS[TRIPLE](e.replace(batch_size=3 * e.batch_size)),
    TRIPLE,
  ),
  "alpha-SVRG, linear from 0.75": (
    study.arm("alpha-svrg", alpha0=0.75),
    TRIPLE,
  ),
  "adaptive SVRG": (study.arm("adaptive"), TRIPLE),
  "adaptive SAGA": (study.arm("adaptive-saga"), PLAIN),
  "STORM": (study.arm("storm"), DOUBLE),
  "MARS": (study.arm("mars"), DOUBLE),
  "MARS, approximate": (study.arm("mars", is_exact=False), PLAIN),
}
ARMS = study.LENGTHS | {name: arm for name, (arm, _) in OURS.items()}
RIVALS = {name: rival for name, (_, rival) in OURS.items()}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
)


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
  ours = [name for name in RIVALS if not name.startswith("plain")]
  verdicts = [against(c, name) for c in results.cells for name in ours]
  count = comparison.count(verdicts)
  return f"{tables}\n\nAll of these against plain: {count}."


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients."""
  panels = [results.against_gradients(cell, RIVALS) for cell in results.cells]
  return figures.Figure("Means over the seeds", [*itertools.chain(*panels)])


STUDY = study.Study(
  "equal_compute", "Equal numbers of gradients", CELLS, ARMS, table, figure
)
render, main = STUDY.render, STUDY.command()
