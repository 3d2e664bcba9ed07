# SPDX-License-Identifier: Apache-2.0
"""Learning rates near plain SGD's stability limit."""

import math
import statistics

from benchmarks.harness import report, study

ARMS = {
  "plain": study.arm("plain"),
  "plain, fixed batches": study.arm("plain-fixed"),
  "adaptive SVRG": study.arm("adaptive"),
  "adaptive SAGA": study.arm("adaptive-saga"),
}
CELLS = {
  f"learning-rate-{lr:g}": study.cell(
    *("fashion-mnist", "mlp4", "sgd"), lr=lr, num_seeds=6, train_examples=2_048
  )
  for lr in (0.3, 0.5, 0.7)
}
# A training has failed if it ends above half the loss of guessing.
_FAILED = math.log(10) / 2


def table(results: study.Results) -> str:
  """Number of runs that have not failed, and their median loss."""
  cells = {f"{CELLS[c].learning_rates[0]:g}": c for c in results.cells}

  def text(rate: str, name: str) -> str:
    losses = results.losses(cells[rate], name).values()
    good = [loss for loss in losses if loss < _FAILED]
    median = f" ({statistics.median(good):#.3g})" if good else ""
    return f"{len(good)} of {len(losses)}{median}"

  return (
    "Trainings that have not failed, i.e. end below half the loss of guessing,"
    " and in brackets their median train loss. MLP-4, SGD, Fashion-MNIST.\n\n"
    + report.grid("learning rate", cells, ARMS, text)
  )


STUDY = study.Study("stability", "Large learning rates", CELLS, ARMS, table)
render, main = STUDY.render, STUDY.command()
