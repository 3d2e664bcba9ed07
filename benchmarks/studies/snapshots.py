# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: what cheaper snapshots cost in loss."""

from benchmarks.harness import figures, study
from benchmarks.methods import snapshots

BASE = "full pass"
STRATEGIES = {
  name: study.arm("snapshots", **settings)
  for name, settings in snapshots.STRATEGIES.items()
}
ARMS = study.LENGTHS | STRATEGIES
# At about the best learning rate of plain.
CELLS = study.cells(study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01))


def table(results: study.Results) -> str:
  """Gradients and loss of each strategy, problem by problem."""
  rivals = {name: BASE for name in STRATEGIES if name != BASE}
  return results.tables(
    {
      "strategy": lambda cell, name: name,
      "gradients per example": results.gradients_text,
      "final train loss": results.loss_text,
      "/ plain's with as many gradients": results.over_plain_text,
      f"against {BASE}": results.against(rivals),
    }
  )


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
