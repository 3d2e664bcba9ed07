# SPDX-License-Identifier: Apache-2.0
"""Snapshot strategies: what cheaper snapshots cost in loss."""

import functools

from benchmarks.harness import figures, study

BASE = "full pass"
_arm = functools.partial(study.arm, "snapshots")
STRATEGIES = {
  BASE: _arm(),
  "gradient table": _arm(keeps_table=True),
  "a pass each 2 epochs": _arm(every=2),
  "a pass each 4 epochs": _arm(every=4),
  "coin flips": _arm(by_chance=True),
  "1/2 sampled": _arm(share=1 / 2),
  "1/2 sampled, max_alpha=1/2": _arm(share=1 / 2, max_alpha=1 / 2),
  "1/8 sampled": _arm(share=1 / 8),
  "1/8 sampled, alpha=1": _arm(share=1 / 8, alpha=1.0),
  "1/8 sampled, max_alpha=1/8": _arm(share=1 / 8, max_alpha=1 / 8),
  "growing samples": _arm(share=1 / 16, growth=2.0),
  "first half": _arm(stop=1 / 2),
  "second half": _arm(start=1 / 2),
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
