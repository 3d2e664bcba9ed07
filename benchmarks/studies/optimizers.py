# SPDX-License-Identifier: Apache-2.0
"""Optimizers, each alone and behind adaptive SAGA, at the same gradients."""

import dataclasses
import statistics

from benchmarks.harness import comparison, report, study

PLAIN, SAGA = "plain", "adaptive SAGA"
ARMS: dict[str, study.Arm] = {
  PLAIN: study.arm("plain"),
  SAGA: study.arm("adaptive-saga"),
}
# Multiplied by 1, 2, 4 and 8; the least one of each optimizer.
_LEAST = {
  "sgd": 0.1,
  "momentum": 0.025,
  "nesterov": 0.025,
  "adamw": 0.00125,
  "nadamw": 0.00125,
  "lion": 0.0002,
  "ademamix": 0.001,
  "muon": 0.005,
  "schedule-free": 0.0025,
  "adamw-ema": 0.00125,
  "adamw-ema, constant": 0.000625,
}
# Logistic regression takes larger steps with adaptive optimizers,
_LEAST_LOGREG = {
  **{name: 16 * lr for name, lr in _LEAST.items()},
  **{name: _LEAST[name] for name in ("sgd", "momentum", "nesterov")},
  **{"muon": 0.04, "schedule-free": 0.01, "adamw-ema, constant": 0.0025},
}
# and so do ViT and Mixer, but with Muon and momentum. 16 times the least, too.
_LEAST_PATCHES = {
  **{name: 4 * lr for name, lr in _LEAST.items()},
  **{name: _LEAST[name] for name in ("momentum", "nesterov", "muon")},
}
_TABLES = {"mlp4": _LEAST, "logreg": _LEAST_LOGREG}
# Where the best rate was an end of the grid.
_WIDER = {
  "MLP-4, 30 % wrong labels: adamw-ema, constant": 0.0003125,
  "MLP-4, shift and flip: nadamw": 0.00125,
  "Mixer, 4,096 images: ademamix": 0.008,
  "Mixer, 4,096 images: momentum": 0.05,
  "Mixer, 4,096 images: nesterov": 0.05,
  "ViT, 4,096 images: momentum": 0.05,
}
_BOTH = ("validation loss: alone / behind SAGA", "accuracy", "median seconds")
_CONSTANT = ("schedule-free", "adamw-ema, constant")
PROBLEMS = {
  "MLP-4": ("mlp4", {}),
  "MLP-4, 30 % wrong labels": ("mlp4", {"label_noise": 0.3}),
  "MLP-4, shift and flip": ("mlp4", {"augment": "shift-flip"}),
  "MLP-4, 60,000 images, shift and flip": (
    "mlp4",
    {"train_examples": 60_000, "augment": "shift-flip", "epochs": 6},
  ),
  "logistic regression": ("logreg", {}),
  "ViT, 4,096 images": ("vit", {"train_examples": 4_096}),
  "Mixer, 4,096 images": ("mixer", {"train_examples": 4_096}),
}


def _cell(problem: str, optimizer: str, least: float) -> study.Cell:
  model, changes = PROBLEMS[problem]
  is_close = model in ("vit", "mixer")
  cell = study.cell(
    *("fashion-mnist", model, optimizer.partition(",")[0]),
    lr=least,
    num_seeds=6 if is_close else 5,
    schedule="constant" if optimizer in _CONSTANT else "cosine",
    **{"train_examples": 10_240, **changes},
  )
  wider = _WIDER.get(f"{problem}: {optimizer}")
  num_rates = 5 if wider or is_close else 4
  rates = [(wider or least) * 2**k for k in range(num_rates)]
  return dataclasses.replace(cell, learning_rates=rates)


CELLS = {
  f"{problem}: {optimizer}": _cell(problem, optimizer, least)
  for problem, (model, _) in PROBLEMS.items()
  for optimizer, least in _TABLES.get(model, _LEAST_PATCHES).items()
}


def table(results: study.Results) -> str:
  """Loss and accuracy of each optimizer alone and behind SAGA, by problem."""
  both = lambda cell, field, spec, average=statistics.fmean: " / ".join(
    f"{average(results.values(cell, name, field)):{spec}}" for name in ARMS
  )
  parts = []
  for problem in PROBLEMS:
    cells = [c for c in results.cells if c.startswith(f"{problem}: ")]
    if not cells:
      continue
    verdicts = results.verdicts([(SAGA, PLAIN)], cells)
    rows = [
      [
        cell.partition(": ")[2],
        *(results.loss_text(cell, name) for name in ARMS),
        verdicts[cell, SAGA, PLAIN],
        both(cell, "validation_loss", ".3f"),
        both(cell, "validation_accuracy", ".1%"),
        both(cell, "seconds", ".1f", statistics.median),
      ]
      for cell in sorted(cells, key=lambda c: results.mean(c, PLAIN))
    ]
    columns = ("optimizer", *ARMS, "SAGA against plain", *_BOTH)
    parts.append(f"{problem}\n\n{report.markdown_table(columns, rows)}")
    gradients = (results.gradients_text(cells[0], name) for name in ARMS)
    parts.append(
      f"SAGA against plain: {comparison.count([*verdicts.values()])}."
      f" Gradients per example: {' / '.join(gradients)}."
    )
  return "\n\n".join(parts)


STUDY = study.Study(
  "optimizers",
  "Optimizers alone and behind adaptive SAGA",
  *(CELLS, ARMS, table),
)
render, main = STUDY.render, STUDY.command()
