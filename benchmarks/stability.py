# SPDX-License-Identifier: Apache-2.0
"""Counts which methods diverge at learning rates that plain hardly bears.

Run ``python -m benchmarks.stability --help``.
"""

from collections.abc import Sequence
import math
from pathlib import Path
import statistics

import click

from benchmarks import grid, reporting, train

CELL = grid.Cell("fashion-mnist", "mlp4", "sgd", 128, 20_480, 12)
LEARNING_RATES = (0.3, 0.4, 0.5, 0.6, 0.7)
METHODS = {
  name: train.METHODS[name]
  for name in ("plain", "plain-fixed", "adaptive", "adaptive-saga")
}
# Training has failed that ends above half the loss of guessing.
_FAILED = math.log(10) / 2


def table(rows: Sequence[dict]) -> str:
  """How many runs have not failed, and their median loss, in Markdown."""
  lines = []
  for lr in LEARNING_RATES:
    line = [f"{lr:g}"]
    for method in METHODS:
      losses = grid.losses(rows, method, lr).values()
      good = [loss for loss in losses if loss < _FAILED]
      median = f" ({statistics.median(good):#.3g})" if good else ""
      line.append(f"{len(good)} of {len(losses)}{median}")
    lines.append(line)
  return reporting.markdown_table(("learning rate", *METHODS), lines)


@click.command(cls=train.Command)
@grid.data_dir_option
@click.option(
  "--seeds", type=click.IntRange(min=1), default=10, show_default=True
)
@grid.out_option("stability")
def main(data_dir: Path, seeds: int, out: Path) -> None:
  """Trains MLP-4 with SGD at ever larger learning rates.

  Prints how many trainings have not failed, and the median of their final train
  losses.
  """
  out.mkdir(parents=True, exist_ok=True)
  rows = grid.run_cell(
    CELL, METHODS, LEARNING_RATES, range(seeds), data_dir, out / "runs.json"
  )
  click.echo(table(rows))


if __name__ == "__main__":
  main()
