# SPDX-License-Identifier: Apache-2.0
"""Compares methods when the snapshot is renewed ever more rarely.

Run ``python -m benchmarks.staleness --help``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
import statistics

import click

from benchmarks import grid, reporting, train

EPOCHS = 16
# The last one takes a single snapshot, at the start.
SNAPSHOT_EVERY = (1, 2, 4, 8, EPOCHS)
METHODS = {
  name: grid.METHODS[name]
  for name in ("plain", "svrg", "linear 0.75", "adaptive")
}
# Problem and learning rate, the latter about the best for plain.
CELLS = {
  grid.Cell("fashion-mnist", "mlp4", "adamw", 128, 10_000, EPOCHS): 0.005,
  grid.Cell("fashion-mnist", "mlp4", "sgd", 128, 10_000, EPOCHS): 0.3,
}


def table(lr: float, rows: Mapping[int, Sequence[dict]]) -> str:
  """The final losses, and how they compare with plain, in Markdown.

  Args:
    lr: the learning rate.
    rows: the runs by epochs between snapshots.
  """
  methods = [name for name in METHODS if name != "plain"]
  lines = []
  for every, runs in rows.items():
    plain = grid.losses(runs, "plain", lr)
    line = [f"{every}" if every < EPOCHS else "only one", _mean_std(plain)]
    for method in methods:
      losses = grid.losses(runs, method, lr)
      verdict = grid.compare(losses, plain).verdict
      line.append(f"{_mean_std(losses)} ({verdict})")
    lines.append(line)
  columns = ("epochs between snapshots", "plain", *methods)
  return reporting.markdown_table(columns, lines)


def _mean_std(losses: Mapping[int, float]) -> str:
  mean, std = statistics.fmean(losses.values()), grid.std(losses.values())
  return f"{mean:#.3g} ± {std:#.2g}"


@click.command(cls=train.Command)
@grid.data_dir_option
@click.option(
  "--seeds", type=click.IntRange(min=2), default=3, show_default=True
)
@grid.out_option("staleness")
def main(data_dir: Path, seeds: int, out: Path) -> None:
  """Trains with a snapshot every 1, 2, 4, 8 epochs, and only once.

  In brackets is how a method compares with plain: a win or a loss by more than
  two standard deviations of the difference, or a tie.
  """
  out.mkdir(parents=True, exist_ok=True)
  for cell, lr in CELLS.items():
    rows: dict[int, list[dict]] = {}
    for every in SNAPSHOT_EVERY:
      rows[every] = grid.run_cell(
        cell,
        METHODS,
        (lr,),
        range(seeds),
        data_dir,
        out / f"{cell.name}-every-{every}.json",
        snapshot_every=every,
      )
    click.echo(f"{cell.name}, learning rate {lr:g}\n\n{table(lr, rows)}\n")


if __name__ == "__main__":
  main()
