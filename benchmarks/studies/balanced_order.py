# SPDX-License-Identifier: Apache-2.0
"""Variance reduction by the order of the examples."""

import itertools
import math

from benchmarks.harness import comparison, report, study

PLAIN, CONTROL, LAST, WHOLE, SAGA = (
  *("plain", "random signs", "balanced, last layer"),
  *("balanced, whole gradient", "adaptive SAGA"),
)
LENGTHS = {"plain, 1.25x the epochs": 1.25, "plain, 1.5x the epochs": 1.5}


ARMS: dict[str, study.Arm] = {
  PLAIN: study.arm("plain"),
  **study.plain_lengths(LENGTHS),
  CONTROL: study.arm("balanced-order", form="random"),
  LAST: study.arm("balanced-order", form="last"),
  WHOLE: study.arm("balanced-order", form="whole"),
  SAGA: study.arm("adaptive-saga"),
}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw", label_noise=0.3),
  study.cell("fashion-mnist", "mlp2", "adamw", augment="shift-flip"),
  study.cell("fashion-mnist", "mlp2", "nadamw"),
  study.cell("fashion-mnist", "mlp2", "muon"),
  study.cell("fashion-mnist", "mlp4", "adamw", train_examples=10_240),
)
OURS = (CONTROL, LAST, WHOLE, SAGA)


def _gradients_saved(results: study.Results, cell: str, name: str) -> str:
  """How much longer plain training reaches the loss, as far as was tried."""
  curve = [(1.0, results.mean(cell, PLAIN))]
  curve += [(x, results.mean(cell, arm)) for arm, x in LENGTHS.items()]
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
  verdicts = results.verdicts([(name, PLAIN) for name in OURS])
  parts = []
  for cell in results.cells:
    rows = [
      [
        name,
        results.loss_text(cell, name),
        verdicts.get((cell, name, PLAIN), ""),
        _gradients_saved(results, cell, name) if name in OURS else "",
        results.accuracy_text(cell, name),
        f"{results.mean(cell, name, 'seconds'):.1f}",
      ]
      for name in ARMS
    ]
    columns = ("method", "final train loss", "against plain")
    columns += ("plain's epochs for this loss", "accuracy (%)", "seconds")
    parts.append(f"{cell}\n\n{report.markdown_table(columns, rows)}")
  exact = [c for c in results.cells if CELLS[c].template.augment == "none"]
  rows = []
  for name in OURS:
    loss, seconds = (
      comparison.geometric_mean(
        [
          results.mean(c, name, field) / results.mean(c, PLAIN, field)
          for c in exact
        ]
      )
      for field in ("train_loss", "seconds")
    )
    rows.append([name, f"{loss:.3f}", f"{seconds:.2f}"])
  columns = ("method", "loss / plain's", "seconds / plain's")
  parts += [
    "Geometric means over the problems without augmentation",
    report.markdown_table(columns, rows),
  ]
  return "\n\n".join(parts)


STUDY = study.Study(
  "balanced_order",
  "Balanced order of the examples, one gradient per step for all",
  *(CELLS, ARMS, table),
)
render, main = STUDY.render, STUDY.command()
