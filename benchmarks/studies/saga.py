# SPDX-License-Identifier: Apache-2.0
"""SAGA and plain training at the same number of gradients."""

from benchmarks.harness import comparison, figures, report, study
from benchmarks.harness.experiment import Experiment

PLAIN = ("plain", "plain, fixed batches")
ADAPTIVE, ROUNDED = "adaptive SAGA", "adaptive SAGA, bfloat16 table"
ARMS: dict[str, study.Arm] = {
  PLAIN[0]: study.arm("plain"),
  PLAIN[1]: study.arm("plain-fixed"),
  "SAGA": study.arm("saga"),
  ADAPTIVE: study.arm("adaptive-saga"),
  ROUNDED: study.arm("adaptive-saga", table_dtype="bfloat16"),
}
CELLS = study.cells(
  study.cell("mnist-5k", "logreg", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw"),
  study.cell("fashion-mnist", "mlp2", "adamw", label_noise=0.3),
  study.cell("fashion-mnist", "mlp2", "adamw", augment="shift-flip"),
)
PAIRS = [(ADAPTIVE, p) for p in PLAIN] + [
  (ADAPTIVE, "SAGA"),
  (ROUNDED, ADAPTIVE),
]
SHOWN = "fashion-mnist-mlp2-adamw"


def table(results: study.Results) -> str:
  """Losses, verdicts and accuracies, problem by problem."""
  verdicts = results.verdicts(PAIRS)
  losses, against, accuracies = [], [], []
  for cell in results.cells:
    losses.append([cell, *(results.loss_text(cell, name) for name in ARMS)])
    against.append([cell, *(verdicts[cell, *pair] for pair in PAIRS)])
    accuracies.append(
      [cell, *(results.accuracy_text(cell, name) for name in ARMS)]
    )
  counts = [
    f"- {ours} against {rival}: "
    + comparison.count(
      [v for k, v in verdicts.items() if k[1:] == (ours, rival)]
    )
    for ours, rival in PAIRS
  ]
  columns = [f"{ours} against {rival}" for ours, rival in PAIRS]
  return "\n\n".join(
    [
      report.markdown_table(["final train loss", *ARMS], losses),
      report.markdown_table(["problem", *columns], against),
      "\n".join(counts),
      report.markdown_table(["validation accuracy (%)", *ARMS], accuracies),
    ]
  )


def figure(results: study.Results) -> figures.Figure:
  """Loss and accuracy over the training of one problem."""
  shown = results.shown(SHOWN)
  names = [name for name in ARMS if name != ROUNDED]
  return figures.Figure(
    f"{shown}: mean and range over the seeds",
    [
      figures.Panel(
        "", "epochs", "train loss", results.curves(shown, names, "train_loss")
      ),
      figures.Panel(
        *("", "epochs", "validation accuracy"),
        results.curves(shown, names, "validation_accuracy"),
        log_y=False,
      ),
    ],
  )


def _is_shown(experiment: Experiment) -> bool:
  return not experiment.method_settings and experiment.seed < 100


STUDY = study.Study(
  "saga",
  "SAGA against plain training, one gradient per step for all",
  CELLS,
  ARMS,
  table,
  figure,
  _is_shown,
)
render, main = STUDY.render, STUDY.command()
