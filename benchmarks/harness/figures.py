# SPDX-License-Identifier: Apache-2.0
"""Figures as data, and how they are drawn.

A study computes a :class:`Figure` from stored runs; it is published as JSON
with the drawing, so that it can be checked without comparing pixels.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import io
import math
import statistics
from typing import Any

import numpy as np

from benchmarks.harness.experiment import finite

MAX_LINES = 8
_COLORS = {
  "plain": "#333333",
  "svrg": "#0072b2",
  "saga": "#d55e00",
  "other": "#009e73",
}
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclasses.dataclass(frozen=True)
class Line:
  """A curve, ``None`` where it has no ordinate."""

  label: str  # In the legend.
  family: str  # Methods of a family share a hue: a key of ``_COLORS``.
  x: Sequence[float]
  y: Sequence[float | None]
  low: Sequence[float | None] = ()  # Ends of the range over the seeds.
  high: Sequence[float | None] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
  """A pair of axes, with at most eight curves."""

  title: str
  x: str  # Label of the abscissae.
  y: str  # Label of the ordinates.
  lines: Sequence[Line]
  log_x: bool = False
  log_y: bool = True
  references: Sequence[tuple[float, str]] = ()  # Horizontal lines, labelled.


@dataclasses.dataclass(frozen=True)
class Figure:
  """Panels, two in a row, under one title and over one legend."""

  title: str
  panels: Sequence[Panel]

  def as_json(self) -> dict[str, Any]:
    """The figure as JSON, with four significant digits."""
    return finite(dataclasses.asdict(self), 4)


def from_json(saved: Mapping[str, Any]) -> Figure:
  """Makes a figure from :meth:`Figure.as_json`."""
  panels = [
    Panel(**{**panel, "lines": [Line(**line) for line in panel["lines"]]})
    for panel in saved["panels"]
  ]
  return Figure(saved["title"], panels)


def family(label: str) -> str:
  """The family of a method, from its name."""
  return next((k for k in ("plain", "saga") if k in label.lower()), "svrg")


def mean_line(
  label: str, x: Sequence[float], values: Sequence[Sequence[float | None]]
) -> Line:
  """The curve of the mean over runs, and their range."""
  columns = [
    column if all(v is not None and math.isfinite(v) for v in column) else None
    for column in zip(*values, strict=True)
  ]
  curves = (
    [None if column is None else fn(column) for column in columns]
    for fn in (statistics.fmean, min, max)
  )
  return Line(label, family(label), list(x), *curves)


def curve(
  label: str, histories: Sequence[Sequence[Any]], y: str, x: str = "epoch"
) -> Line:
  """The curve of a field of the points of runs, by another field."""
  values = [[getattr(point, y) for point in history] for history in histories]
  return mean_line(label, [getattr(p, x) for p in histories[0]], values)


def draw(figure: Figure, image_format: str = "svg") -> bytes:
  """The drawing of a figure, the same bytes for the same figure."""
  for panel in figure.panels:
    if len(panel.lines) > MAX_LINES:
      raise ValueError(
        f"A panel has at most {MAX_LINES} curves, got {len(panel.lines)} in"
        f" {panel.title!r}."
      )
  import matplotlib
  import matplotlib.figure

  columns = min(2, len(figure.panels))
  rows = -(-len(figure.panels) // columns)
  settings = {"font.size": 9, "svg.fonttype": "none"}
  stream = io.BytesIO()
  with matplotlib.rc_context(settings | {"svg.hashsalt": "optax_svrg"}):
    drawing = matplotlib.figure.Figure(
      figsize=(4.6 * columns, 3.1 * rows + 0.6), layout="constrained"
    )
    axes = drawing.subplots(rows, columns, squeeze=False).ravel()
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, figure.panels, strict=False):
      handles |= _draw_panel(axis, panel)
    for axis in axes[len(figure.panels) :]:
      axis.remove()
    drawing.suptitle(figure.title)
    drawing.legend(
      handles.values(),
      handles.keys(),
      loc="outside lower center",
      ncols=4,
      frameon=False,
    )
    metadata = {"Date": None} if image_format == "svg" else None
    drawing.savefig(stream, format=image_format, dpi=120, metadata=metadata)
  return stream.getvalue()


def _draw_panel(axis: Any, panel: Panel) -> dict[str, Any]:
  handles = {}
  seen = collections.Counter()
  for line in panel.lines:
    index = seen[line.family]
    seen[line.family] += 1
    # Points have no style, and styles repeat.
    is_marked = len(line.x) < 12 or index >= len(_STYLES)
    look = {
      "color": _COLORS[line.family],
      "linestyle": _STYLES[index % len(_STYLES)],
      "marker": _MARKERS[index % len(_MARKERS)] if is_marked else None,
      "markevery": max(1, len(line.x) // 8),
      "markersize": 4,
    }
    y, low, high = (np.array(v, float) for v in (line.y, line.low, line.high))
    (handles[line.label],) = axis.plot(line.x, y, **look)
    if line.low:
      axis.fill_between(
        line.x, low, high, color=look["color"], alpha=0.12, linewidth=0
      )
  for value, label in panel.references:
    axis.axhline(value, color="#888888", linewidth=0.8)
    axis.annotate(
      label,
      (0.01, value),
      xycoords=("axes fraction", "data"),
      va="bottom",
      fontsize=8,
      color="#555555",
    )
  axis.set(
    title=panel.title,
    xlabel=panel.x,
    ylabel=panel.y,
    xscale="log" if panel.log_x else "linear",
    yscale="log" if panel.log_y else "linear",
  )
  axis.grid(alpha=0.3)
  return handles
