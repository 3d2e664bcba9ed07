# SPDX-License-Identifier: Apache-2.0
"""Tables, and figures as data."""

import io
import json
import math
import xml.etree.ElementTree

import pytest
import rich.console

from benchmarks.harness import figures, report
from benchmarks.harness.experiment import Experiment, Point, Run


def run(losses, ratio=None):
  history = [
    Point(i, loss, 0.5 + i / 10, 3.0 * i, 1.5 * i, 0.7, ratio)
    for i, loss in enumerate(losses)
  ]
  experiment = Experiment(
    dataset="d",
    model="m",
    method="x",
    optimizer="o",
    epochs=1,
    batch_size=1,
    lr=0.1,
  )
  return Run(experiment, history, finished=True)


class TestTables:
  def test_markdown(self):
    got = report.markdown_table(("a", "b"), [("1", "2"), ("3", "4")])
    assert got == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"

  def test_mean_std(self):
    assert report.mean_std([1.0, 2.0, 3.0]) == "2.00 ± 1.0"
    assert report.mean_std([0.5]) == "0.500"
    assert report.mean_std([1.0, math.inf, 1.0]) == "diverged (1 of 3)"

  HISTORIES = (
    [run([2.0, 1.0], 0.4).history, run([2.0, 3.0], 0.6).history],
    [run([2.0, math.nan]).history, run([2.0, 1.0]).history],
  )

  def rows(self):
    names = ("adaptive-svrg", "lost")
    return report.summarise(
      dict(zip(names, self.HISTORIES, strict=True)) | {"none": []}
    )

  def test_summary(self):
    good, lost = self.rows()
    assert good["final_train_loss"]["mean"] == 2.0
    assert good["final_train_loss"]["std"] == pytest.approx(math.sqrt(2))
    assert good["variance_ratio"] == pytest.approx(0.5)
    assert lost["diverged"] == 1
    assert lost["final_train_loss"] is None
    assert lost["gradients_per_example"] == 3.0

  @pytest.mark.parametrize("width", [40, 60, 80, 200])
  def test_any_width_of_the_terminal(self, width):
    stream = io.StringIO()
    console = rich.console.Console(file=stream, width=width)
    report.print_table(self.rows(), console)
    text = stream.getvalue()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("adaptive-svrg", "2.00 ± 1.4", "diverged (1 of 2)", "0.500"):
      assert word in text


class TestFigures:
  @staticmethod
  def figure(num_lines=2):
    lines = [
      figures.mean_line(
        f"plain {i}", [1, 2, 3], [[1.0, 2.0, None], [3.0, 4.0, 5.0]]
      )
      for i in range(num_lines)
    ]
    reference = [(1.5, "as plain")]
    panel = figures.Panel("left", "epochs", "loss", lines, references=reference)
    return figures.Figure("a title", [panel, panel, panel])

  def test_mean_and_range(self):
    line = self.figure().panels[0].lines[0]
    assert line.y == [2.0, 3.0, None]
    assert (line.low, line.high) == ([1.0, 2.0, None], [3.0, 4.0, None])

  def test_json_and_back(self):
    saved = json.loads(json.dumps(self.figure().as_json()))
    assert figures.from_json(saved).as_json() == saved

  def test_drawing(self):
    """Well-formed, the same each time, and all that is said is in it."""
    drawing = figures.draw(self.figure())
    assert drawing == figures.draw(self.figure())
    root = xml.etree.ElementTree.fromstring(drawing)
    text = " ".join(root.itertext())
    for word in ("a title", "left", "epochs", "plain 0", "plain 1", "as plain"):
      assert word in text

  def test_too_many_curves(self):
    figures.draw(self.figure(figures.MAX_LINES))
    with pytest.raises(ValueError, match="at most 8 curves, got 9 in 'left'"):
      figures.draw(self.figure(figures.MAX_LINES + 1))

  @pytest.mark.parametrize(
    ("label", "want"),
    [
      ("plain, fixed batches", "plain"),
      ("adaptive SAGA", "saga"),
      ("alpha-SVRG, linear from 0.5", "svrg"),
    ],
  )
  def test_families(self, label, want):
    assert figures.family(label) == want

  def test_looks_differ(self, monkeypatch):
    """No two curves of a panel have hue, style and marker in common."""
    seen = []
    plot = "matplotlib.axes.Axes.plot"
    import matplotlib.axes

    original = matplotlib.axes.Axes.plot

    def record(self, *args, **look):
      seen.append((look["color"], look["linestyle"], look["marker"]))
      return original(self, *args, **look)

    monkeypatch.setattr(plot, record)
    figures.draw(figures.Figure("", [self.figure(8).panels[0]]))
    assert len(set(seen)) == 8
