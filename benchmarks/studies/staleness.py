# SPDX-License-Identifier: Apache-2.0
"""Snapshots that are renewed ever more rarely."""

import functools

from benchmarks.harness import figures, report, study

EPOCHS = 16
# The last one takes a single snapshot, at the start.
EVERY = (1, 4, EPOCHS)
METHODS = {
  "SVRG": functools.partial(study.arm, "svrg"),
  "alpha-SVRG, linear from 0.75": functools.partial(
    study.arm, "alpha-svrg", alpha0=0.75
  ),
  "adaptive SVRG": functools.partial(study.arm, "adaptive"),
}
ARMS: dict[str, study.Arm] = {"plain": study.arm("plain")} | {
  f"{name}, every {every}": make(changes={"snapshot_every": every})
  for name, make in METHODS.items()
  for every in EVERY
}
# At about the best learning rate of plain.
CELLS = study.cells(
  study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01, epochs=EPOCHS)
)


def table(results: study.Results) -> str:
  """Losses by epochs between snapshots, and verdicts against plain."""
  pairs = [(name, "plain") for name in ARMS if name != "plain"]
  verdicts = results.verdicts(pairs)
  rows = [
    [
      cell,
      name,
      results.loss_text(cell, name),
      verdicts.get((cell, name, "plain"), ""),
    ]
    for cell in results.cells
    for name in ARMS
  ]
  return report.markdown_table(
    ["problem", "method, epochs between snapshots", "loss", "against plain"],
    rows,
  )


def figure(results: study.Results) -> figures.Figure:
  """Loss by epochs between snapshots."""
  panels = []
  for cell in results.cells:
    lines = []
    for name in METHODS:
      values = [
        results.values(cell, f"{name}, every {e}", "train_loss") for e in EVERY
      ]
      lines.append(
        figures.mean_line(name, EVERY, list(zip(*values, strict=True)))
      )
    plain = (results.mean(cell, "plain"), "plain")
    panels.append(
      figures.Panel(
        *(cell, "epochs between snapshots", "final train loss", lines),
        log_x=True,
        references=[plain],
      )
    )
  return figures.Figure("Mean and range over the seeds", panels)


STUDY = study.Study("staleness", "Stale snapshots", CELLS, ARMS, table, figure)
render, main = STUDY.render, STUDY.command()
