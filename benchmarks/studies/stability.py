# SPDX-License-Identifier: Apache-2.0
"""Learning rates near plain SGD's stability limit."""

from collections.abc import Callable
import math
import statistics

from benchmarks.harness import figures, report, study

ARMS = {
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
  for lr in (0.3, 0.5, 0.7)
}
# A training has failed if it ends above half the loss of guessing.
_FAILED = math.log(10) / 2


def _good(results: study.Results, cell: str, name: str) -> list[float]:
  return [x for x in results.losses(cell, name).values() if x < _FAILED]


def table(results: study.Results) -> str:
  """Number of runs that have not failed, and their median loss."""
  cells = {f"{CELLS[c].learning_rates[0]:g}": c for c in results.cells}

  def text(rate: str, name: str) -> str:
    good = _good(results, cells[rate], name)
    median = f" ({statistics.median(good):#.3g})" if good else ""
    return f"{len(good)} of {len(results.losses(cells[rate], name))}{median}"

  return (
    "Trainings that have not failed, i.e. end below half the loss of guessing,"
    " and in brackets their median train loss. MLP-4, SGD, Fashion-MNIST.\n\n"
    + report.grid("learning rate", cells, ARMS, text)
  )


def figure(results: study.Results) -> figures.Figure:
  """The same numbers as curves."""
  rates = [CELLS[cell].learning_rates[0] for cell in results.cells]

  def panel(
    label: str, value: Callable[[list[float]], float | None], log_y: bool
  ) -> figures.Panel:
    lines = [
      figures.Line(
        *(name, figures.family(name), rates),
        [value(_good(results, cell, name)) for cell in results.cells],
      )
      for name in ARMS
    ]
    return figures.Panel("", "peak learning rate", label, lines, log_y=log_y)

  median = lambda good: statistics.median(good) if good else None
  panels = [
    panel("trainings that have not failed", len, log_y=False),
    panel("their median train loss", median, log_y=True),
  ]
  return figures.Figure("MLP-4, SGD, Fashion-MNIST", panels)


STUDY = study.Study(
  "stability", "Large learning rates", CELLS, ARMS, table, figure
)
render, main = STUDY.render, STUDY.command()
