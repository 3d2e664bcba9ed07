# SPDX-License-Identifier: Apache-2.0
"""Adaptive SAGA with additions, at the same number of gradients."""

from benchmarks.harness import comparison, report, study
from benchmarks.harness.experiment import Experiment
from benchmarks.methods import saga_variants

BASE = "adaptive SAGA"


def _variant(name: str) -> study.Arm:
  settings = saga_variants.VARIANTS[name]

  def make(template: Experiment) -> Experiment:
    epochs = saga_variants.equal_epochs(settings, template.epochs)
    return study.arm("saga-variant", changes={"epochs": epochs}, **settings)(
      template
    )

  return make


ARMS: dict[str, study.Arm] = {
  BASE: study.arm("adaptive-saga"),
  "plain, fixed batches": study.arm("plain-fixed"),
  "plain, fixed batches and order": study.arm("plain-fixed", fixed_order=True),
  "adaptive SAGA, fixed order": study.arm("adaptive-saga", fixed_order=True),
  **{name: _variant(name) for name in saga_variants.VARIANTS},
}
# At about the best learning rate of adaptive SAGA.
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw", lr=0.03),
  study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01),
)


def table(results: study.Results) -> str:
  """Losses over that of adaptive SAGA, and verdicts against it."""
  verdicts = results.verdicts([(name, BASE) for name in ARMS if name != BASE])
  rows = []
  for name in ARMS:
    ratios = [
      results.mean(c, name) / results.mean(c, BASE) for c in results.cells
    ]
    texts = [verdicts.get((cell, name, BASE), "") for cell in results.cells]
    rows.append([name, f"{comparison.geometric_mean(ratios):.3f}", *texts])
  columns = ["method", "loss / adaptive SAGA's, geometric mean", *results.cells]
  return report.markdown_table(columns, rows)


STUDY = study.Study(
  "saga_variants", "Additions to adaptive SAGA", CELLS, ARMS, table
)
render, main = STUDY.render, STUDY.command()
