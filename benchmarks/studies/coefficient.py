# SPDX-License-Identifier: Apache-2.0
"""The coefficient of SVRG: given by a schedule, or estimated in many ways."""

from benchmarks.harness import figures, report, study

PLAIN, ADAPTIVE = "plain", "adaptive SVRG"
GIVEN = {
  PLAIN: study.arm("plain"),
  "SVRG": study.arm("svrg"),
  "alpha-SVRG, linear from 0.5": study.arm("alpha-svrg", alpha0=0.5),
  "alpha-SVRG, linear from 0.75": study.arm("alpha-svrg", alpha0=0.75),
  ADAPTIVE: study.arm("adaptive"),
}
VARIANTS = {
  "decay 0.8": study.arm("coefficient", decay=0.8),
  "with the current batch": study.arm("coefficient", current=True),
  "per array": study.arm("coefficient", per_leaf=True),
  "never reset": study.arm("coefficient", kept=True),
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


def table(results: study.Results) -> str:
  """Adaptive SVRG against given coefficients, and its variants."""
  grid = [c for c in results.cells if c in GRID]
  verdicts = results.verdicts([(ADAPTIVE, rival) for rival in RIVALS], grid)
  against = lambda cell, rival: verdicts[cell, ADAPTIVE, rival]
  parts = [
    report.grid("problem", grid, GIVEN, results.loss_text),
    "Adaptive SVRG against",
    report.grid("problem", grid, RIVALS, against),
  ]
  parts += [_variants(results, c) for c in results.cells if c in ESTIMATES]
  return "\n\n".join(parts)


def _variants(results: study.Results, cell: str) -> str:
  rivals = dict.fromkeys(VARIANTS, ADAPTIVE)
  columns = {
    "estimate": lambda c, name: name,
    "final train loss": results.loss_text,
    "/ plain's": lambda c, name: f"{results.ratio(name, PLAIN, [c]):.3f}",
    "against adaptive": results.against(rivals, [cell]),
  }
  return f"Other estimates: {cell}\n\n{results.table(columns, [cell])}"


def figure(results: study.Results) -> figures.Figure:
  """Loss and accuracy over the training of one problem."""
  return results.over_training("fashion-mnist-mlp2-adamw", GIVEN)


STUDY = study.Study(
  "coefficient",
  "Coefficients of SVRG, given and estimated",
  *({**GRID, **ESTIMATES}, {**GIVEN, **VARIANTS}, table, figure),
  has_curve=lambda e: e.method != "coefficient" and e.seed < 100,
)
render, main = STUDY.render, STUDY.command()
