# SPDX-License-Identifier: Apache-2.0
"""The coefficient of SVRG: given by a schedule, or estimated in many ways."""

from benchmarks.harness import figures, report, study
from benchmarks.harness.experiment import Experiment
from benchmarks.methods import coefficients

PLAIN, ADAPTIVE = "plain", "adaptive SVRG"
GIVEN: dict[str, study.Arm] = {
  PLAIN: study.arm("plain"),
  "SVRG": study.arm("svrg"),
  "alpha-SVRG, linear from 0.5": study.arm("alpha-svrg", alpha0=0.5),
  "alpha-SVRG, linear from 0.75": study.arm("alpha-svrg", alpha0=0.75),
  ADAPTIVE: study.arm("adaptive"),
}
VARIANTS: dict[str, study.Arm] = {
  name: study.arm("coefficient", **settings)
  for name, settings in coefficients.VARIANTS.items()
}
RIVALS = [name for name in GIVEN if name != ADAPTIVE]
GRID = study.cells(
  study.cell("mnist-5k", "logreg", "adamw", arms=list(GIVEN)),
  study.cell("fashion-mnist", "mlp2", "adamw", arms=list(GIVEN)),
)
# At about the best learning rate of plain.
ESTIMATES = {
  "fashion-mnist-mlp2-adamw-estimates": study.cell(
    *("fashion-mnist", "mlp2", "adamw"),
    lr=0.01,
    arms=[PLAIN, ADAPTIVE, *VARIANTS],
  )
}
SHOWN = "fashion-mnist-mlp2-adamw"


def table(results: study.Results) -> str:
  """Adaptive SVRG against given coefficients, and its variants."""
  grid = [c for c in results.cells if c in GRID]
  verdicts = results.verdicts([(ADAPTIVE, rival) for rival in RIVALS], grid)
  losses = [[c, *(results.loss_text(c, name) for name in GIVEN)] for c in grid]
  against = [
    [c, *(verdicts[c, ADAPTIVE, rival] for rival in RIVALS)] for c in grid
  ]
  parts = [
    report.markdown_table(["problem", *GIVEN], losses),
    "Adaptive SVRG against",
    report.markdown_table(["problem", *RIVALS], against),
  ]
  parts += [_variants(results, c) for c in results.cells if c in ESTIMATES]
  return "\n\n".join(parts)


def _variants(results: study.Results, cell: str) -> str:
  verdicts = results.verdicts([(name, ADAPTIVE) for name in VARIANTS], [cell])
  names = (PLAIN, ADAPTIVE, *VARIANTS)
  rows = [
    [
      name,
      results.loss_text(cell, name),
      f"{results.mean(cell, name) / results.mean(cell, PLAIN):.3f}",
      verdicts.get((cell, name, ADAPTIVE), ""),
    ]
    for name in names
  ]
  columns = ("estimate", "final train loss", "/ plain's", "against adaptive")
  return f"Other estimates: {cell}\n\n{report.markdown_table(columns, rows)}"


def figure(results: study.Results) -> figures.Figure:
  """Loss and accuracy over the training of one problem."""
  shown = results.shown(SHOWN)
  panels = [
    figures.Panel(
      "", "epochs", label, results.curves(shown, GIVEN, field), log_y=log
    )
    for label, field, log in (
      ("train loss", "train_loss", True),
      ("validation accuracy", "validation_accuracy", False),
    )
  ]
  return figures.Figure(f"{shown}: mean and range over the seeds", panels)


def _is_shown(experiment: Experiment) -> bool:
  return experiment.method != "coefficient" and experiment.seed < 100


STUDY = study.Study(
  "coefficient",
  "Coefficients of SVRG, given and estimated",
  {**GRID, **ESTIMATES},
  {**GIVEN, **VARIANTS},
  table,
  figure,
  _is_shown,
)
render, main = STUDY.render, STUDY.command()
