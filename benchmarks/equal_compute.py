# SPDX-License-Identifier: Apache-2.0
"""Compares methods by what they reach with the gradients they take.

Run ``python -m benchmarks.equal_compute --help``.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import json
import math
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click
from matplotlib.figure import Figure

from benchmarks import grid, levers, reporting, train

_PLAIN = "plain"
_ROUNDS = 3
LONGER = {f"plain, {factor}x the epochs": factor for factor in (2, 3)}
LARGER = "plain, 3x the batch"
METHODS: dict[str, Callable[..., train.Method]] = {
  _PLAIN: train.plain,
  **dict.fromkeys((*LONGER, LARGER), train.plain),
  "plain, fixed batches": train.plain_fixed,
  "SVRG": train.svrg,
  "alpha-SVRG, 0.75 linear": grid.METHODS["linear 0.75"],
  **levers.METHODS,
  "SAGA": train.saga,
  "adaptive SAGA": train.adaptive_saga,
}
EPOCHS = 12
CELLS = {
  cell.name: cell
  for cell in (
    grid.Cell("fashion-mnist", "mlp4", "adamw", 128, 10_240, EPOCHS),
    grid.Cell("fashion-mnist", "mlp4", "sgd", 128, 10_240, EPOCHS),
    grid.Cell("mnist-5k", "logreg", "adamw", 64, 4_000, EPOCHS),
  )
}


class Result(NamedTuple):
  """A method in a cell, at its own best learning rate; means over the seeds.

  Attributes:
    lr: the learning rate.
    losses: final train losses by seed.
    accuracy: validation accuracy.
    gradients: gradient evaluations per example.
    seconds: of the training, divided by those of plain.
    over_plain: the mean loss, divided by what plain has with as many gradients:
      a power law between the runs of plain before and after; ``None`` beyond
      them.
  """

  lr: float
  losses: dict[int, float]
  accuracy: float
  gradients: float
  seconds: float
  over_plain: float | None

  @property
  def loss(self) -> float:
    """Mean of the losses."""
    return statistics.fmean(self.losses.values())


def variants(cell: grid.Cell) -> dict[str, tuple[grid.Cell, list[str]]]:
  """The problem with other numbers of epochs and batch sizes, by a suffix.

  Returns:
    For each the problem, and the methods that are trained on it.
  """
  longer = {
    f"-{factor}-epochs": (cell._replace(epochs=factor * cell.epochs), [method])
    for method, factor in LONGER.items()
  }
  # As many updates.
  larger = cell._replace(epochs=3 * cell.epochs, batch_size=3 * cell.batch_size)
  others = [name for name in METHODS if name not in (*LONGER, LARGER)]
  return {"": (cell, others), **longer, "-3-batch": (larger, [LARGER])}


def run_cell(
  name: str, seeds: Sequence[int], data_dir: Path, out: Path
) -> list[dict[str, Any]]:
  """Trains with every method.

  Args:
    name: of the problem.
    seeds: the seeds.
    data_dir: the folder of Fashion-MNIST.
    out: folder of the results.

  Returns:
    A row for each run, see :func:`benchmarks.grid.run_cell`.
  """
  rows = []
  for suffix, (cell, names) in variants(CELLS[name]).items():
    rows += grid.run_cell(
      cell,
      {method: METHODS[method] for method in names},
      cell.learning_rates,
      seeds,
      data_dir,
      out / f"{name}{suffix}.json",
    )
  return rows


def time_cell(name: str, data_dir: Path, out: Path) -> dict[str, float]:
  """Trains once more with every method in turn, so that loads are alike.

  Args:
    name: of the problem.
    data_dir: the folder of Fashion-MNIST.
    out: folder of the results, where they are looked up first.

  Returns:
    Seconds of a whole training over those of plain: the median of the ratios
    of three rounds.
  """
  path = out / f"{name}-seconds.json"
  if path.exists():
    return json.loads(path.read_text())
  rounds: list[dict[str, float]] = [{} for _ in range(_ROUNDS)]
  trainers = {}
  for cell, names in variants(CELLS[name]).values():
    trainer = grid.make_trainer(
      cell, {method: METHODS[method] for method in names}, data_dir
    )
    trainers.update(dict.fromkeys(names, trainer))
  for times in rounds:
    for method in METHODS:
      run = reporting.Run(method, 0)
      trainers[method].train(run, CELLS[name].learning_rates[0])
      times[method] = run.history[-1].seconds
  seconds = {
    method: statistics.median(times[method] / times[_PLAIN] for times in rounds)
    for method in METHODS
  }
  reporting.write_json(path, seconds)
  return seconds


def summarise(
  rows: Sequence[dict], seconds: Mapping[str, float]
) -> dict[str, Result]:
  """What each method has reached.

  Args:
    rows: the runs of a cell.
    seconds: those of each method over those of plain.
  """
  by_method = {
    method: [row for row in rows if row["method"] == method]
    for method in METHODS
    if any(row["method"] == method for row in rows)
  }
  results = {}
  for method, runs in by_method.items():
    lr = grid.best_lr(rows, method)
    best = [row for row in runs if row["lr"] == lr]
    mean = lambda field, best=best: statistics.fmean(row[field] for row in best)
    results[method] = Result(
      lr,
      grid.losses(rows, method, lr),
      mean("validation_accuracy"),
      mean("gradients_per_example"),
      seconds[method],
      None,
    )
  curve = [results[name] for name in (_PLAIN, *LONGER)]
  return {
    method: result._replace(over_plain=over_plain(result, curve))
    for method, result in results.items()
  }


def over_plain(result: Result, curve: Sequence[Result]) -> float | None:
  """The loss over that of plain runs with as many gradients, interpolated."""
  # The remainder of an epoch makes fixed batches a little more.
  gradients = min(
    max(result.gradients, curve[0].gradients), curve[-1].gradients
  )
  if abs(gradients / result.gradients - 1) > 0.03:
    return None
  for left, right in itertools.pairwise(curve):
    if gradients <= right.gradients:
      share = math.log(gradients / left.gradients) / math.log(
        right.gradients / left.gradients
      )
      plain = left.loss ** (1 - share) * right.loss**share
      return result.loss / plain
  return None


def table(results: Mapping[str, Result]) -> str:
  """A line for each method, in Markdown."""
  lines = [
    [
      method,
      f"{result.gradients:.1f}",
      f"{result.seconds:.2f}",
      f"{result.loss:#.3g} ± {grid.std(result.losses.values()):#.2g}"
      f" ({result.lr:g})",
      f"{100 * result.accuracy:.1f}",
      "" if result.over_plain is None else f"{result.over_plain:.2f}",
    ]
    for method, result in results.items()
  ]
  columns = (
    *("method", "gradient evaluations per example", "seconds / plain's"),
    *("final train loss (learning rate)", "validation accuracy (%)"),
    "loss / plain's with as many gradients",
  )
  return reporting.markdown_table(columns, lines)


def write_plot(path: Path, name: str, results: Mapping[str, Result]) -> None:
  """Draws the loss against gradients and against seconds.

  Args:
    path: the PNG file.
    name: of the problem.
    results: what each method has reached.
  """
  figure = Figure(figsize=(13, 6), layout="constrained")
  axes = figure.subplots(1, 2, sharey=True)
  curve = [results[method] for method in (_PLAIN, *LONGER)]
  for axis, field in zip(axes, ("gradients", "seconds"), strict=True):
    axis.plot(
      [getattr(result, field) for result in curve],
      [result.loss for result in curve],
      color="black",
    )
    for index, (method, result) in enumerate(results.items()):
      axis.plot(
        getattr(result, field),
        result.loss,
        "os^Dv"[index // 10],
        color=f"C{index % 10}",
        label=method,
      )
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
  axes[0].set(
    xlabel="gradient evaluations per example", ylabel="final train loss"
  )
  axes[1].set(xlabel="seconds / plain's")
  figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8
  )
  figure.suptitle(f"{name}; the line: plain with 1, 2 and 3 times the epochs")
  figure.savefig(path, format="png", dpi=90)


@click.command(cls=train.Command)
@grid.data_dir_option
@grid.cell_option(CELLS)
@click.option(
  "--seeds", type=click.IntRange(min=2), default=3, show_default=True
)
@grid.out_option("equal_compute")
def main(data_dir: Path, cells: Sequence[str], seeds: int, out: Path) -> None:
  """Trains with plain, every lever of SVRG and SAGA, and compares their price.

  Each method at its own best learning rate, of one grid. Prints a table and
  draws a figure for each problem.
  """
  out.mkdir(parents=True, exist_ok=True)
  for name in cells or CELLS:
    rows = run_cell(name, range(seeds), data_dir, out)
    results = summarise(rows, time_cell(name, data_dir, out))
    write_plot(out / f"{name}.png", name, results)
    click.echo(f"{name}\n\n{table(results)}\n")


if __name__ == "__main__":
  main()
