# SPDX-License-Identifier: Apache-2.0
"""SAGA and plain training at the same number of gradients."""

from benchmarks.harness import comparison, figures, report, study

PLAIN, FIXED = "plain", "plain, fixed batches"
ADAPTIVE, ROUNDED = "adaptive SAGA", "adaptive SAGA, bfloat16 table"
ARMS = {
  PLAIN: study.arm("plain"),
  FIXED: study.arm("plain-fixed"),
  "SAGA": study.arm("saga"),
  ADAPTIVE: study.arm("adaptive-saga"),
  ROUNDED: study.arm("adaptive-saga", table_dtype="bfloat16"),
}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw", label_noise=0.3),
  study.cell("fashion-mnist", "mlp2", "adamw", augment="shift-flip"),
)
RIVALS = [(ADAPTIVE, PLAIN), (ADAPTIVE, FIXED), (ADAPTIVE, "SAGA")]
PAIRS = {" against ".join(p): p for p in [*RIVALS, (ROUNDED, ADAPTIVE)]}


def table(results: study.Results) -> str:
  """Losses, verdicts and accuracies, problem by problem."""
  verdicts = results.verdicts(PAIRS.values())
  verdict = lambda cell, title: verdicts[cell, *PAIRS[title]]
  count = lambda title: comparison.count(
    [verdict(cell, title) for cell in results.cells]
  )
  parts = [
    report.grid("final train loss", results.cells, ARMS, results.loss_text),
    report.grid("problem", results.cells, PAIRS, verdict),
    "\n".join(f"- {title}: {count(title)}" for title in PAIRS),
    report.grid(
      "validation accuracy (%)", results.cells, ARMS, results.accuracy_text
    ),
  ]
  return "\n\n".join(parts)


def figure(results: study.Results) -> figures.Figure:
  """Loss and accuracy over the training of one problem."""
  names = [name for name in ARMS if name != ROUNDED]
  return results.over_training("fashion-mnist-mlp2-adamw", names)


STUDY = study.Study(
  "saga",
  "SAGA against plain training, one gradient per step for all",
  *(CELLS, ARMS, table, figure),
  has_curve=lambda e: not e.method_settings and e.seed < 100,
)
render, main = STUDY.render, STUDY.command()
