# SPDX-License-Identifier: Apache-2.0
"""Gradient variance and the best coefficient over training."""

from collections.abc import Iterable, Mapping, Sequence
import itertools
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import cli, models
from benchmarks.data import arrays
from benchmarks.harness import figures, publishing, report
from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.store import Store
from benchmarks.harness.trainer import run_all

# Constant over training; what the paper's analysis had is not known.
LEARNING_RATES = {"sgd": 0.1, "adamw": 0.001}
METHODS = ("plain", "svrg", "alpha-svrg", "adaptive", "optimal")
METRICS = {
  "cosine_distance": "directional",
  "total_variance": "total variance",
  "spectral_norm": "spectral norm",
}

Key = tuple[str, str]  # Model and optimizer.
PROBLEMS: list[Key] = [
  (model, kind) for kind in LEARNING_RATES for model in models.NUM_LAYERS
]
# The paper's optimal coefficient, a line for each epoch and a column for each
# problem: mean over the epoch without the snapshot, and over the last 15 % of
# it. CIFAR-10, batches of 1024, digitised from the figures of its project page.
PAPER = """
0.81/0.79 0.45/0.39 0.77/0.91 0.80/0.79 0.23/0.17 0.10/0.09
0.95/0.95 0.84/0.79 0.88/0.82 0.89/0.89 0.70/0.60 0.63/0.54
0.96/0.96 0.79/0.76 0.75/0.71 0.87/0.87 0.72/0.67 0.65/0.57
0.96/0.96 0.77/0.75 0.69/0.63 0.89/0.88 0.69/0.64 0.59/0.55
0.96/0.96 0.76/0.73 0.71/0.65 0.90/0.89 0.67/0.63 0.61/0.53
0.96/0.96 0.73/0.71 0.67/0.61 0.90/0.90 0.67/0.65 0.59/0.54
0.98/0.97 0.75/0.72 0.68/0.62 0.90/0.90 0.66/0.60 0.57/0.53
0.97/0.97 0.72/0.69 0.58/0.53 0.92/0.92 0.63/0.60 0.53/0.49
0.96/0.95 0.67/0.63 0.56/0.51 0.91/0.91 0.61/0.59 0.53/0.47
0.95/0.95 0.66/0.64 0.52/0.47 0.88/0.88 0.53/0.53 0.47/0.41
"""

# What was measured, an array for each quantity; see observers.Variance.
Measured = Mapping[str, np.ndarray]
Results = Mapping[Key, Mapping[str, Measured]]  # By method.


def results(runs: Iterable[Run]) -> Results:
  """Orders measurements by model, optimizer and method."""
  found: dict[Key, dict[str, Measured]] = {}
  for run in runs:
    key = run.experiment.model, run.experiment.optimizer
    found.setdefault(key, {})[run.experiment.method] = {
      name: np.array(values, float)
      for name, values in run.measured["variance"].items()
    }
  return found


def by_epoch(measured: Measured, field: str) -> list[tuple[float, float]]:
  """Means of each epoch without its snapshot, and of its last 15 %."""
  x, y = (_after(measured, name) for name in ("epoch", field))
  means = []
  for epoch in np.unique(x // 1):
    share, values = x[x // 1 == epoch] % 1, y[x // 1 == epoch]
    late = values[share >= min(0.85, share[-1])]
    means.append((values.mean(), late.mean()))
  return means


def coefficient_table(found: Results) -> str:
  """Returns the best coefficient by epoch and the paper's, in Markdown."""
  paper = report.parse_columns(PAPER, PROBLEMS)
  names, columns = ["epoch"], []
  for key, methods in found.items():
    means = by_epoch(methods["adaptive"], "optimal_component")
    names += [" ".join(key), "paper"]
    columns.append([f"{whole:.2f} / {late:.2f}" for whole, late in means])
    columns.append([text.replace("/", " / ") for text in paper[key]])
  rows = itertools.zip_longest(*columns, fillvalue="")
  rows = itertools.islice(rows, len(columns[0]))
  lines = [[f"{epoch}", *row] for epoch, row in enumerate(rows, 1)]
  return report.markdown_table(names, lines)


def _after(measured: Measured, field: str) -> np.ndarray:
  """Without the moments of snapshots, where variance vanishes."""
  return measured[field][measured["epoch"] % 1 > 0]


def estimate_table(found: Results) -> str:
  """Returns online estimates and the true values, in Markdown."""
  fields = ("optimal_tree", "alpha", "variance_ratio", "estimated_ratio")
  lines = []
  for key, methods in found.items():
    best, estimate, *ratios = (_after(methods["adaptive"], f) for f in fields)
    means = map(np.mean, (best, estimate, abs(best - estimate), *ratios))
    lines.append([" ".join(key), *(f"{mean:.3f}" for mean in means)])
  columns = ("", "best coefficient", "estimate", "mean absolute error")
  return report.markdown_table([*columns, "variance ratio", "estimate"], lines)


def variance_table(found: Results) -> str:
  """Means over training of the measures of each method, in Markdown."""
  lines = []
  for key, methods in found.items():
    for metric, title in METRICS.items():
      means = [_after(m, metric).mean() for m in methods.values()]
      lines.append([" ".join(key), title, *(f"{mean:.3g}" for mean in means)])
    losses = [f"{m['train_loss'][-1]:.3g}" for m in methods.values()]
    lines.append([" ".join(key), "train loss at the end", *losses])
  return report.markdown_table(["", "mean over training", *METHODS], lines)


def figure(found: Results) -> figures.Figure:
  """The best coefficients over training, and the online estimate."""
  fields = (
    ("best, mean over components (paper)", "svrg", "optimal_component"),
    ("best single coefficient", "other", "optimal_tree"),
    ("estimated online (adaptive_svrg)", "saga", "alpha"),
  )
  panels = []
  for key, methods in found.items():
    seen = {k: v.tolist() for k, v in methods["adaptive"].items()}
    lines = [figures.Line(*f[:2], seen["epoch"], seen[f[2]]) for f in fields]
    panels.append(
      figures.Panel(", ".join(key), "epochs", "coefficient", lines, log_y=False)
    )
  return figures.Figure("Coefficient of SVRG over training", panels)


def render(document: Mapping[str, Any]) -> dict[str, str]:
  """Makes the published files from the published runs."""
  runs = publishing.unpack(document)
  found, e = results(runs), runs[0].experiment
  parts = [
    "# Gradient variance and the best coefficient over training",
    f"    {document['command']}",
    f"{e.dataset}, {e.train_examples or 'all'} training images, batches of"
    f" {e.batch_size}, {e.epochs} epochs, one seed.",
    "Best coefficient, mean over components: mean of the epoch / of its end",
    coefficient_table(found),
    "Best single coefficient and variance ratio, and their online estimates",
    estimate_table(found),
    "Gradient variance, without the moments of snapshots",
    variance_table(found),
  ]
  return publishing.files(parts, figure(found))


_THREE = click.IntRange(min=3)


@click.command()
@cli.options(("--dataset", arrays.DATASETS, "mnist-5k", ""))
@cli.data_dir_option
@cli.options(
  ("--epochs", _THREE, 10, ""),
  ("--batch-size", cli.positive, 256, ""),
  ("--train-examples", cli.positive, 4_000, "The first ones."),
  ("--points", _THREE, 5, "Measurements per epoch."),
)
@cli.several("--model", models.NUM_LAYERS, "by default all")
@cli.several("--optimizer", LEARNING_RATES, "by default all")
@cli.out_option("variance")
@cli.publish_option
def main(
  data_dir: Path | None,
  model: Sequence[str],
  optimizer: Sequence[str],
  points: int,
  out: Path,
  publish: bool,
  **settings: Any,
) -> None:
  """Measures gradient variance and the best coefficient over training.

  Each model is trained with SGD and AdamW at a constant learning rate, one
  seed, with plain, SVRG, alpha-SVRG, adaptive, and the best coefficient of each
  component, which is found at each measurement. A measurement takes the
  gradients of all batches of the epoch at frozen weights.
  """
  if settings["train_examples"] < 3 * settings["batch_size"]:
    raise click.UsageError(
      "--batch-size must leave at least three batches of"
      f" {settings['train_examples']} training examples, got"
      f" {settings['batch_size']}."
    )
  # Each once, from shallow to deep.
  wanted = [
    Experiment(
      model=name,
      method=method,
      optimizer=kind,
      lr=LEARNING_RATES[kind],
      validation_examples=1_000,
      schedule="constant",
      measure={"variance": {"points": points}},
      **settings,
    )
    for name, kind in PROBLEMS
    if name in (model or (name,)) and kind in (optimizer or (kind,))
    for method in METHODS
  ]
  runs = run_all(wanted, Store(out), data_dir=data_dir)
  document = publishing.pack("variance", runs, lambda experiment: False)
  publishing.show("variance", document, publish)
