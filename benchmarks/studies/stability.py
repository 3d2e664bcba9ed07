# SPDX-License-Identifier: Apache-2.0
"""Learning rates near plain SGD's stability limit."""

import math
import statistics

from benchmarks.harness import figures, report, study

LEARNING_RATES = (0.3, 0.5, 0.7)
ARMS: dict[str, study.Arm] = {
  "plain": study.arm("plain"),
  "plain, fixed batches": study.arm("plain-fixed"),
  "adaptive SVRG": study.arm("adaptive"),
  "adaptive SAGA": study.arm("adaptive-saga"),
}
CELLS = {
  f"learning-rate-{lr:g}": study.cell(
    *("fashion-mnist", "mlp4", "sgd"),
    lr=lr,
    num_seeds=6,
    train_examples=2_048,
  )
  for lr in LEARNING_RATES
}
# A training has failed if it ends above half the loss of guessing.
_FAILED = math.log(10) / 2


def _good(results: study.Results, cell: str, name: str) -> list[float]:
  return [x for x in results.losses(cell, name).values() if x < _FAILED]


def table(results: study.Results) -> str:
  """Number of runs that have not failed, and their median loss."""
  rows = []
  for cell in results.cells:
    row = [f"{CELLS[cell].learning_rates[0]:g}"]
    for name in ARMS:
      good = _good(results, cell, name)
      median = f" ({statistics.median(good):#.3g})" if good else ""
      row.append(f"{len(good)} of {len(results.losses(cell, name))}{median}")
    rows.append(row)
  return (
    "Trainings that have not failed, i.e. end below half the loss of guessing,"
    " and in brackets their median train loss. MLP-4, SGD, Fashion-MNIST.\n\n"
    + report.markdown_table(("learning rate", *ARMS), rows)
  )


def figure(results: study.Results) -> figures.Figure:
  """The same numbers as curves."""
  cells = results.cells
  rates = [CELLS[cell].learning_rates[0] for cell in cells]
  counts, medians = [], []
  for name in ARMS:
    good = [_good(results, cell, name) for cell in cells]
    middle = [statistics.median(x) if x else None for x in good]
    family = figures.family(name)
    counts.append(figures.Line(name, family, rates, [len(x) for x in good]))
    medians.append(figures.Line(name, family, rates, middle))
  x = "peak learning rate"
  return figures.Figure(
    "MLP-4, SGD, Fashion-MNIST",
    [
      figures.Panel(
        "", x, "trainings that have not failed", counts, log_y=False
      ),
      figures.Panel("", x, "their median train loss", medians),
    ],
  )


STUDY = study.Study(
  "stability",
  "Large learning rates",
  CELLS,
  ARMS,
  table,
  figure,
)
render, main = STUDY.render, STUDY.command()
