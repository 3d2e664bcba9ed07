# SPDX-License-Identifier: Apache-2.0
"""Variance reduction by the order of the examples."""

import functools
import itertools
import math

from benchmarks.harness import report, study

PLAIN = "plain"
LENGTHS = {PLAIN: 1} | {f"plain, {x}x the epochs": x for x in (1.25, 1.5)}
OURS = {
  "random signs": study.arm("balanced-order", form="random"),
  "balanced, last layer": study.arm("balanced-order", form="last"),
  "balanced, whole gradient": study.arm("balanced-order", form="whole"),
  "adaptive SAGA": study.arm("adaptive-saga"),
}
ARMS = {name: study.plain(length) for name, length in LENGTHS.items()} | OURS
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw", label_noise=0.3),
  study.cell("fashion-mnist", "mlp2", "adamw", augment="shift-flip"),
  study.cell("fashion-mnist", "mlp2", "nadamw"),
  study.cell("fashion-mnist", "mlp2", "muon"),
  study.cell("fashion-mnist", "mlp4", "adamw", train_examples=10_240),
)


def _length(results: study.Results, cell: str, name: str) -> str:
  """How much longer plain training reaches the loss, as far as was tried."""
  if name not in OURS:
    return ""
  curve = [(x, results.mean(cell, arm)) for arm, x in LENGTHS.items()]
  loss = results.mean(cell, name)
  if loss >= curve[0][1]:
    return "none"
  for (x0, y0), (x1, y1) in itertools.pairwise(curve):
    if y1 <= loss <= y0:
      share = math.log(y0 / loss) / math.log(y0 / y1)
      return f"{x0 + share * (x1 - x0):.2f}x"
  return f"> {curve[-1][0]:g}x"


def table(results: study.Results) -> str:
  """Losses, verdicts, and the length of plain training of the same loss."""
  columns = {
    "method": lambda cell, name: name,
    "final train loss": results.loss_text,
    "against plain": results.against(dict.fromkeys(OURS, PLAIN)),
    "plain's epochs for this loss": functools.partial(_length, results),
    "accuracy (%)": results.accuracy_text,
    "seconds": lambda cell, name: f"{results.mean(cell, name, 'seconds'):.1f}",
  }
  exact = [c for c in results.cells if CELLS[c].template.augment == "none"]
  rows = []
  for name in OURS if exact else ():
    loss = results.ratio(name, PLAIN, exact)
    seconds = results.ratio(name, PLAIN, exact, "seconds")
    rows.append([name, f"{loss:.3f}", f"{seconds:.2f}"])
  parts = [
    results.tables(columns),
    "Geometric means over the problems without augmentation",
    report.markdown_table(
      ("method", "loss / plain's", "seconds / plain's"), rows
    ),
  ]
  return "\n\n".join(parts)


STUDY = study.Study(
  "balanced_order",
  "Balanced order of the examples, one gradient per step for all",
  *(CELLS, ARMS, table),
)
render, main = STUDY.render, STUDY.command()
