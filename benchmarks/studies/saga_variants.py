# SPDX-License-Identifier: Apache-2.0
"""Adaptive SAGA with additions, at the same number of gradients."""

from typing import Any

from benchmarks.harness import report, study

BASE = "adaptive SAGA"


def _variant(**settings: Any) -> study.Arm:
  """With as many epochs as take the gradients of adaptive SAGA."""
  make = study.arm("saga-variant", **settings)
  first, others = settings.get("filled_first", 0), settings.get("refreshed", 0)
  return lambda e: make(e.replace(epochs=(e.epochs - first) // (1 + others)))


ARMS = {
  BASE: study.arm("adaptive-saga"),
  "plain, fixed batches": study.arm("plain-fixed"),
  "plain, fixed batches and order": study.arm("plain-fixed", fixed_order=True),
  "adaptive SAGA, fixed order": study.arm("adaptive-saga", fixed_order=True),
  "half a table": _variant(share=0.5),
  "a tenth of a table": _variant(share=0.1),
  "table filled first": _variant(filled_first=True),
  "one more entry per step": _variant(refreshed=1),
}
# At about the best learning rate of adaptive SAGA.
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw", lr=0.03),
  study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01),
)


def table(results: study.Results) -> str:
  """Losses over that of adaptive SAGA, and verdicts against it."""
  against = results.against({name: BASE for name in ARMS if name != BASE})
  rows = []
  for name in ARMS:
    ratio = results.ratio(name, BASE, results.cells)
    texts = [against(cell, name) for cell in results.cells]
    rows.append([name, f"{ratio:.3f}", *texts])
  columns = ["method", "loss / adaptive SAGA's, geometric mean", *results.cells]
  return report.markdown_table(columns, rows)


STUDY = study.Study(
  "saga_variants", "Additions to adaptive SAGA", CELLS, ARMS, table
)
render, main = STUDY.render, STUDY.command()
