# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: what cheaper snapshots cost in loss."""

from benchmarks.harness import figures, report, study
from benchmarks.methods import snapshots

BASE = "full pass"
STRATEGIES: dict[str, study.Arm] = {
  name: study.arm("snapshots", **settings)
  for name, settings in snapshots.STRATEGIES.items()
}
ARMS = study.plain_lengths() | STRATEGIES
# At about the best learning rate of plain.
CELLS = study.cells(study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01))


def table(results: study.Results) -> str:
  """Gradients and loss of each strategy, problem by problem."""
  return "\n\n".join(f"{c}\n\n{_table(results, c)}" for c in results.cells)


def _table(results: study.Results, cell: str) -> str:
  pairs = [(name, BASE) for name in STRATEGIES if name != BASE]
  verdicts = results.verdicts(pairs, [cell])
  rows = [
    [
      name,
      f"{results.point(cell, name)[0]:.1f}",
      results.loss_text(cell, name),
      results.over_plain(cell, name),
      verdicts.get((cell, name, BASE), ""),
    ]
    for name in ARMS
  ]
  columns = (
    *("strategy", "gradients per example", "final train loss"),
    *("/ plain's with as many gradients", f"against {BASE}"),
  )
  return report.markdown_table(columns, rows)


def figure(results: study.Results) -> figures.Figure:
  """Loss against gradients, of the strategies of least loss."""
  panels = []
  for cell in results.cells:
    best = sorted(STRATEGIES, key=lambda name: results.mean(cell, name))[:6]
    panels += results.against_gradients(cell, best)
  return figures.Figure("The six snapshot strategies of least loss", panels)


STUDY = study.Study(
  *("snapshots", "Snapshot strategies of adaptive SVRG"),
  *(CELLS, ARMS, table, figure),
)
render, main = STUDY.render, STUDY.command()
