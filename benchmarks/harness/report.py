# SPDX-License-Identifier: Apache-2.0
"""Tables: as published, in Markdown, and as printed on a terminal."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import math
import statistics
from typing import Any

import rich.box
import rich.console
import rich.table

# Broken by hand, so that a row takes one line.
_HEADINGS = (
  "final\ntrain loss",
  "validation\naccuracy (%)",
  "gradients\nper\nexample",
  "variance\nratio",
  "seconds",
)


def markdown_table(
  columns: Sequence[str], rows: Iterable[Sequence[str]]
) -> str:
  """A table as it is published."""
  lines = [columns, ["---"] * len(columns), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parse_columns(
  text: str, names: Iterable[Hashable]
) -> dict[Hashable, tuple[str, ...]]:
  """The columns of a table in plain text, by name."""
  rows = map(str.split, text.strip().splitlines())
  return dict(zip(names, zip(*rows, strict=True), strict=True))


def grid(
  heading: str,
  rows: Iterable[str],
  columns: Sequence[str],
  text: Callable[[str, str], str],
) -> str:
  """A table of texts by row and column."""
  lines = [[row, *(text(row, column) for column in columns)] for row in rows]
  return markdown_table([heading, *columns], lines)


def mean_std(values: Iterable[float], scale: float = 1.0) -> str:
  """Mean ± sample standard deviation; ``"diverged"`` if one is not finite."""
  values = [scale * v for v in values]
  lost = sum(not math.isfinite(v) for v in values)
  if lost:
    return f"diverged ({lost} of {len(values)})"
  return _with_std(_mean_std(values), 1, "#.3g", "#.2g")


def summarise(histories: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
  """Means over the seeds, a row for each method with finished runs."""
  return [_row(method, runs) for method, runs in histories.items() if runs]


def _row(method: str, runs: Sequence[Any]) -> dict[str, Any]:
  points = [point for run in runs for point in run]
  diverged = sum(
    not all(math.isfinite(point.train_loss) for point in run) for run in runs
  )
  ratios = [p.variance_ratio for p in points if p.variance_ratio is not None]
  mean = lambda name: _mean_std([getattr(run[-1], name) for run in runs])
  return {
    "method": method,
    "runs": len(runs),
    "diverged": diverged,
    "final_train_loss": None if diverged else mean("train_loss"),
    "validation_accuracy": None if diverged else mean("validation_accuracy"),
    "gradients_per_example": mean("gradients_per_example")["mean"],
    "variance_ratio": None
    if diverged or not ratios
    else statistics.fmean(ratios),
    "seconds": mean("seconds")["mean"],
  }


def print_table(
  rows: Sequence[Mapping[str, Any]], console: rich.console.Console | None = None
) -> None:
  """Prints the rows of :func:`summarise`, for any width of the terminal."""
  console = console or rich.console.Console()
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column("method", no_wrap=True)
  for heading in _HEADINGS:
    table.add_column(heading, justify="right", no_wrap=True)
  for row in rows:
    table.add_row(row["method"], *_texts(row))
  unlimited = console.options.update(max_width=1_000)
  if console.measure(table, options=unlimited).maximum > console.width:
    # Several lines for each method.
    table = rich.table.Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(no_wrap=True)
    for row in rows:
      table.add_row(f"[bold]{row['method']}[/bold]", "")
      for heading, text in zip(_HEADINGS, _texts(row), strict=True):
        if text:
          table.add_row(" " + heading.replace("\n", " "), text)
  console.print(table)


def _texts(row: Mapping[str, Any]) -> list[str]:
  lost = f"diverged ({row['diverged']} of {row['runs']})"
  loss, accuracy = row["final_train_loss"], row["validation_accuracy"]
  ratio = row["variance_ratio"]
  return [
    lost if loss is None else _with_std(loss, 1, "#.3g", "#.2g"),
    lost if accuracy is None else _with_std(accuracy, 100, ".2f", ".2f"),
    f"{row['gradients_per_example']:.2f}",
    "" if ratio is None else f"{ratio:.3f}",
    f"{row['seconds']:.1f}",
  ]


def _mean_std(values: Sequence[float]) -> dict[str, float | None]:
  std = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.fmean(values), "std": std}


def _with_std(
  value: Mapping[str, float | None], scale: float, mean_spec: str, std_spec: str
) -> str:
  text = f"{scale * value['mean']:{mean_spec}}"
  if value["std"] is not None:
    text += f" ± {scale * value['std']:{std_spec}}"
  return text
