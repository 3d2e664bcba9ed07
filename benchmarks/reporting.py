# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: a table, a JSON file and a plot."""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import math
import os
from pathlib import Path
import statistics
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np
import rich
import rich.box
import rich.table


class Point(NamedTuple):
  """The state of a run after an epoch.

  Attributes:
    epoch: number of epochs trained.
    train_loss: mean loss over all training examples.
    validation_accuracy: share of the validation examples classified rightly.
    gradients_per_example: gradients of single examples evaluated so far,
      divided by the number of training examples.
    seconds: time spent in training so far.
    alpha: mean over the steps of the epoch of the coefficient; ``None`` before
      the first epoch.
    variance_ratio: mean square distance of the corrected gradient from the mean
      gradient of the snapshot, divided by that of the plain gradient, over the
      steps of the epoch; ``None`` without a snapshot. An upper bound, as far as
      it is below 1, of the ratio of their variances.
  """

  epoch: int
  train_loss: float
  validation_accuracy: float
  gradients_per_example: float
  seconds: float
  alpha: float | None = None
  variance_ratio: float | None = None


@dataclasses.dataclass
class Run:
  """One training, from one seed.

  Attributes:
    method: name of the method.
    seed: the seed.
    finished: whether all epochs were trained.
    history: the state before the first epoch and after each one.
  """

  method: str
  seed: int
  finished: bool = False
  history: list[Point] = dataclasses.field(default_factory=list)

  @property
  def diverged(self) -> bool:
    """Whether the train loss ever was infinite or not a number."""
    return not all(math.isfinite(point.train_loss) for point in self.history)

  def as_json(self) -> dict[str, Any]:
    """The run as JSON, which has ``null`` for numbers that are not finite."""
    return {
      "method": self.method,
      "seed": self.seed,
      "finished": self.finished,
      "diverged": self.diverged,
      "history": [
        {name: _finite(value) for name, value in point._asdict().items()}
        for point in self.history
      ],
    }


def summarise(runs: Sequence[Run], methods: Sequence[str]) -> list[dict]:
  """Means over the seeds, a row for each method with finished runs.

  Args:
    runs: the runs; those that are not finished do not count.
    methods: names of the methods, in the order wanted.

  Returns:
    Rows for JSON. ``std`` is the sample standard deviation, ``None`` for a
    single run. ``variance_ratio`` is the mean over epochs with a snapshot, and
    ``None`` if there are none. The loss, the accuracy and the ratio of a method
    are ``None`` if any of its runs has diverged: the mean of the others would
    flatter it.
  """
  rows = []
  for method in methods:
    finished = [run for run in runs if run.method == method and run.finished]
    if not finished:
      continue
    last = [run.history[-1] for run in finished]
    diverged = sum(run.diverged for run in finished)
    rows.append(
      {
        "method": method,
        "runs": len(finished),
        "diverged": diverged,
        "final_train_loss": None
        if diverged
        else _mean_std([point.train_loss for point in last]),
        "validation_accuracy": None
        if diverged
        else _mean_std([point.validation_accuracy for point in last]),
        "gradients_per_example": statistics.fmean(
          point.gradients_per_example for point in last
        ),
        "variance_ratio": None if diverged else _mean_ratio(finished),
        "seconds": statistics.fmean(point.seconds for point in last),
      }
    )
  return rows


def print_table(rows: Sequence[dict]) -> None:
  """Prints a table.

  Args:
    rows: the result of :func:`summarise`.
  """
  # Narrow, and broken by hand, so that 80 columns hold a row in one line.
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("method", no_wrap=True)
  for heading in (
    "final\ntrain loss",
    "validation\naccuracy (%)",
    "gradients\nper\nexample",
    "variance\nratio",
    "seconds",
  ):
    table.add_column(heading, justify="right", no_wrap=True)
  for row in rows:
    lost = f"diverged ({row['diverged']} of {row['runs']})"
    loss, accuracy = row["final_train_loss"], row["validation_accuracy"]
    table.add_row(
      row["method"],
      lost if loss is None else _with_std(loss, 1, "#.3g", "#.2g"),
      lost if accuracy is None else _with_std(accuracy, 100, ".2f", ".2f"),
      f"{row['gradients_per_example']:.2f}",
      "" if row["variance_ratio"] is None else f"{row['variance_ratio']:.3f}",
      f"{row['seconds']:.1f}",
    )
  rich.print(table)


def markdown_table(
  columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> str:
  """A table as it is published.

  Args:
    columns: the headings.
    rows: the cells, row by row.

  Returns:
    Lines of Markdown.
  """
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_json(path: Path, results: dict[str, Any]) -> None:
  """Writes a file that is whole at any moment, however the program ends.

  Args:
    path: the file.
    results: its contents, without numbers that are not finite.
  """
  partial = path.with_name(f"{path.name}.partial")
  text = json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False)
  partial.write_text(text + "\n", encoding="utf-8")
  os.replace(partial, path)


def write_plot(
  path: Path, runs: Sequence[Run], methods: Sequence[str], title: str
) -> None:
  """Draws the train loss against epochs and against gradient evaluations.

  A third panel has the variance ratio, and a line at 1/3, below which three
  gradients instead of one are worth it as far as variance goes. Finished runs
  are shown by their mean and the range over the seeds, other runs
  by dotted lines.

  Args:
    path: the PNG file.
    runs: the runs.
    methods: names of the methods, in the order of the legend.
    title: title of the whole figure.
  """
  figure = Figure(figsize=(14, 4), layout="constrained")
  axes = figure.subplots(1, 3)
  fields = (
    ("epoch", "train_loss"),
    ("gradients_per_example", "train_loss"),
    ("epoch", "variance_ratio"),
  )
  for axis, (x_field, y_field) in zip(axes, fields, strict=True):
    for index, method in enumerate(methods):
      of_method = [run for run in runs if run.method == method]
      _draw(axis, of_method, x_field, y_field, method, f"C{index}")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
  axes[0].set(xlabel="epochs", ylabel="train loss")
  axes[1].set(xlabel="gradient evaluations per example")
  axes[1].sharey(axes[0])
  axes[2].set(xlabel="epochs", ylabel="variance, corrected / plain")
  axes[2].axhline(1 / 3, color="black", linestyle="--", linewidth=1)
  axes[0].legend(title="mean and range over seeds")
  figure.suptitle(title)
  figure.savefig(path, format="png", dpi=150)


def _draw(
  axis: Axes,
  runs: Sequence[Run],
  x_field: str,
  y_field: str,
  method: str,
  color: str,
) -> None:
  finished = [run for run in runs if run.finished]
  x = np.array([_column(run, x_field) for run in finished])
  y = np.array([_column(run, y_field) for run in finished])
  # A label without data, so that the legend has all methods.
  axis.plot([], [], color=color, label=method)
  if finished:
    x = x.mean(axis=0)
    axis.plot(x, y.mean(axis=0), color=color)
    axis.fill_between(
      x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.2, linewidth=0
    )
  for run in runs:
    if not run.finished:
      axis.plot(_column(run, x_field), _column(run, y_field), ":", color=color)


def _column(run: Run, field: str) -> list[float]:
  values = [getattr(point, field) for point in run.history]
  return [math.nan if value is None else value for value in values]


def _mean_ratio(runs: Sequence[Run]) -> float | None:
  ratios = [
    point.variance_ratio
    for run in runs
    for point in run.history
    if point.variance_ratio is not None
  ]
  return statistics.fmean(ratios) if ratios else None


def _mean_std(values: Sequence[float]) -> dict[str, float | None]:
  std = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.fmean(values), "std": std}


def _with_std(
  value: dict[str, float | None], scale: float, mean_spec: str, std_spec: str
) -> str:
  text = f"{scale * value['mean']:{mean_spec}}"
  if value["std"] is None:
    return text
  return f"{text} ± {scale * value['std']:{std_spec}}"


def _finite(x: float | None) -> float | None:
  return x if x is not None and math.isfinite(x) else None
