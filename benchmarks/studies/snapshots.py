# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: what cheaper snapshots cost in loss."""

from benchmarks.harness import comparison, figures, report, study
from benchmarks.methods import snapshots

LENGTHS = {"plain": 1, "plain, 2x the epochs": 2, "plain, 3x the epochs": 3}
BASE = "full pass"


def _longer(factor: int) -> study.Arm:
  return lambda e: e.replace(method="plain", epochs=factor * e.epochs)


ARMS: dict[str, study.Arm] = {
  **{name: _longer(factor) for name, factor in LENGTHS.items()},
  **{
    name: study.arm("snapshots", **settings)
    for name, settings in snapshots.STRATEGIES.items()
  },
}
# At about the best learning rate of plain.
CELLS = study.cells(study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01))


def _point(results: study.Results, cell: str, name: str) -> tuple[float, float]:
  return (
    results.mean(cell, name, "gradients_per_example"),
    results.mean(cell, name),
  )


def table(results: study.Results) -> str:
  """Gradients and loss of each strategy, problem by problem."""
  return "\n\n".join(f"{c}\n\n{_table(results, c)}" for c in results.cells)


def _table(results: study.Results, cell: str) -> str:
  strategies = list(snapshots.STRATEGIES)
  pairs = [(name, BASE) for name in strategies if name != BASE]
  verdicts = results.verdicts(pairs, [cell])
  curve = [_point(results, cell, name) for name in LENGTHS]
  rows = []
  for name in ARMS:
    gradients, loss = _point(results, cell, name)
    ratio = comparison.over_plain(gradients, loss, curve)
    rows.append(
      [
        name,
        f"{gradients:.1f}",
        results.loss_text(cell, name),
        "" if ratio is None else f"{ratio:.2f}",
        verdicts.get((cell, name, BASE), ""),
      ]
    )
  columns = (
    *("strategy", "gradients per example", "final train loss"),
    *("/ plain's with as many gradients", f"against {BASE}"),
  )
  return report.markdown_table(columns, rows)


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients, the six strategies of least loss."""
  panels = []
  for cell in results.cells:
    best = sorted(snapshots.STRATEGIES, key=lambda n: results.mean(cell, n))[:6]
    lines = [
      figures.Line(name, "svrg", [x], [y])
      for name in best
      for x, y in [_point(results, cell, name)]
    ]
    x, y = zip(*(_point(results, cell, n) for n in LENGTHS), strict=True)
    plain = figures.Line("plain, 1 to 3 times the epochs", "plain", x, y)
    panels.append(
      figures.Panel(
        cell, "gradients per example", "final train loss", [plain, *lines]
      )
    )
  return figures.Figure("The six snapshot strategies of least loss", panels)


STUDY = study.Study(
  "snapshots",
  "Snapshot strategies of adaptive SVRG",
  CELLS,
  ARMS,
  table,
  figure,
)
render, main = STUDY.render, STUDY.command()
