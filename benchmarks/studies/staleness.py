# SPDX-License-Identifier: Apache-2.0
"""Snapshots that are renewed ever more rarely."""

from benchmarks.harness import study

EPOCHS = 16
# The last one takes a single snapshot, at the start.
EVERY = (1, 4, EPOCHS)
METHODS = {
  "SVRG": {"method": "svrg"},
  "alpha-SVRG, linear from 0.75": {"method": "alpha-svrg", "alpha0": 0.75},
  "adaptive SVRG": {"method": "adaptive"},
}
ARMS = {"plain": study.arm("plain")} | {
  f"{name}, every {every}": study.arm(
    **settings, changes={"snapshot_every": every}
  )
  for name, settings in METHODS.items()
  for every in EVERY
}
# At about the best learning rate of plain.
CELLS = study.cells(
  study.cell("fashion-mnist", "mlp2", "adamw", lr=0.01, epochs=EPOCHS)
)


def table(results: study.Results) -> str:
  """Losses by epochs between snapshots, and verdicts against plain."""
  rivals = {name: "plain" for name in ARMS if name != "plain"}
  columns = {
    "problem": lambda cell, name: cell,
    "method, epochs between snapshots": lambda cell, name: name,
    "loss": results.loss_text,
    "against plain": results.against(rivals),
  }
  return results.table(columns, results.cells)


STUDY = study.Study("staleness", "Stale snapshots", CELLS, ARMS, table)
render, main = STUDY.render, STUDY.command()
