# SPDX-License-Identifier: Apache-2.0
"""Compares methods over a grid of problems, learning rates and seeds.

Run ``python -m benchmarks.grid --help``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path
import statistics
from typing import Any, NamedTuple

import click

from benchmarks import reporting, train
from benchmarks.data import arrays as data

LINEAR = ("linear 0.5", "linear 0.75", "linear 1")
ADAPTIVE = "adaptive"
SEEDS, MORE_SEEDS = 3, 5
VERDICTS = ("win", "tie", "loss")

# Around what suits the plain optimizer.
LEARNING_RATES = {
  ("logreg", "sgd"): (0.1, 0.3, 1.0),
  ("logreg", "adamw"): (0.01, 0.03, 0.1),
  ("mlp2", "sgd"): (0.15, 0.3, 0.6),
  ("mlp2", "adamw"): (0.003, 0.01, 0.03),
  ("mlp4", "sgd"): (0.15, 0.3, 0.6),
  ("mlp4", "adamw"): (0.0025, 0.005, 0.01),
}


class Cell(NamedTuple):
  """A problem of the grid.

  Attributes:
    dataset: name of the data set.
    model: name of the model.
    optimizer: name of the optimizer.
    batch_size: number of examples of a batch.
    train_examples: how many of the data set are used.
    epochs: number of epochs.
    label_noise: share of the labels that are drawn at random.
    augment: name of the augmentation.
  """

  dataset: str
  model: str
  optimizer: str
  batch_size: int
  train_examples: int
  epochs: int
  label_noise: float = 0.0
  augment: str = "none"

  @property
  def name(self) -> str:
    """What the cell is called on the command line."""
    return "-".join(map(str, self[:4]))

  @property
  def learning_rates(self) -> Sequence[float]:
    """The peak learning rates that are tried."""
    return LEARNING_RATES[self.model, self.optimizer]


def _cells() -> list[Cell]:
  cells = []
  for model, optimizer in itertools.product(
    ("logreg", "mlp2", "mlp4"), ("sgd", "adamw")
  ):
    for batch_size in (64, 128):
      cells.append(Cell("mnist-5k", model, optimizer, batch_size, 4_000, 12))
    for batch_size in (128, 512):
      size = 20_000 if model == "mlp4" and batch_size == 128 else 10_000
      cells.append(
        Cell("fashion-mnist", model, optimizer, batch_size, size, 12)
      )
  return cells


CELLS = {cell.name: cell for cell in _cells()}


def _linear(alpha0: float) -> Callable[..., train.Method]:
  def make(options: train.Options, num_examples: int) -> train.Method:
    options = dataclasses.replace(options, alpha0=alpha0)
    return train.alpha_svrg(options, num_examples)

  return make


METHODS: dict[str, Callable[..., train.Method]] = {
  "plain": train.plain,
  "svrg": train.svrg,
  **{name: _linear(float(name.split()[1])) for name in LINEAR},
  ADAPTIVE: train.adaptive,
}


def run_cell(
  cell: Cell,
  methods: Mapping[str, Callable[..., train.Method]],
  learning_rates: Sequence[float],
  seeds: Sequence[int],
  data_dir: Path | None,
  path: Path,
  snapshot_every: int = 1,
) -> list[dict[str, Any]]:
  """Trains with each method, learning rate and seed.

  Args:
    cell: the problem.
    methods: makes the methods, by their names.
    learning_rates: the peak learning rates.
    seeds: the seeds.
    data_dir: the folder of Fashion-MNIST.
    path: JSON file of the results, to which those that it lacks are added.
    snapshot_every: epochs between snapshots.

  Returns:
    A row for each run: ``method``, ``lr``, ``seed``, ``train_loss``,
    ``validation_accuracy`` and ``gradients_per_example`` at the end, with
    ``None`` for a loss that is not finite.
  """
  rows = json.loads(path.read_text())["runs"] if path.exists() else []
  done = {(row["method"], row["lr"], row["seed"]) for row in rows}
  missing = [
    key
    for key in itertools.product(methods, learning_rates, seeds)
    if key not in done
  ]
  if not missing:
    return rows
  wanted = {key[0] for key in missing}
  trainer = make_trainer(
    cell,
    {k: v for k, v in methods.items() if k in wanted},
    data_dir,
    snapshot_every,
  )
  for method, lr, seed in missing:
    run = reporting.Run(method, seed)
    trainer.train(run, lr)
    last = run.as_json()["history"][-1]
    rows.append({"method": method, "lr": lr, "seed": seed} | last)
    reporting.write_json(path, {"cell": cell._asdict(), "runs": rows})
  return rows


def make_trainer(
  cell: Cell,
  methods: Mapping[str, Callable[..., train.Method]],
  data_dir: Path | None,
  snapshot_every: int = 1,
) -> train.Trainer:
  """What trains with these methods, at any learning rate and seed.

  Args:
    cell: the problem.
    methods: makes the methods, by their names.
    data_dir: the folder of Fashion-MNIST.
    snapshot_every: epochs between snapshots.
  """
  settings = dataclasses.replace(
    options(cell, tuple(methods), 1, data_dir, Path()),
    snapshot_every=snapshot_every,
  )
  dataset = _subset(cell.dataset, data_dir, cell.train_examples)
  return train.Trainer(settings, dataset, dict(methods))


def options(
  cell: Cell,
  methods: Sequence[str],
  seeds: int,
  data_dir: Path | None,
  out: Path,
) -> train.Options:
  """The options of ``benchmarks.train`` that a cell stands for."""
  return train.Options(
    dataset=cell.dataset,
    data_dir=data_dir,
    model=cell.model,
    optimizer=cell.optimizer,
    methods=methods,
    epochs=cell.epochs,
    batch_size=cell.batch_size,
    lr=cell.learning_rates[0],
    alpha0=1.0,
    snapshot_every=1,
    label_noise=cell.label_noise,
    augment=cell.augment,
    seeds=seeds,
    out=out,
  )


@functools.lru_cache(maxsize=1)
def _subset(name: str, data_dir: Path | None, size: int) -> data.Dataset:
  dataset = data.load(name, None if name == "mnist-5k" else data_dir)
  return dataset._replace(
    train_images=dataset.train_images[:size],
    train_labels=dataset.train_labels[:size],
  )


def losses(rows: Sequence[dict], method: str, lr: float) -> dict[int, float]:
  """Final train losses by seed; infinite where training diverged."""
  return {
    row["seed"]: math.inf if row["train_loss"] is None else row["train_loss"]
    for row in rows
    if row["method"] == method and row["lr"] == lr
  }


def best_lr(rows: Sequence[dict], method: str) -> float:
  """The learning rate of the least mean loss over the first seeds."""
  rates = sorted({row["lr"] for row in rows if row["method"] == method})

  def mean(lr: float) -> float:
    by_seed = losses(rows, method, lr)
    return statistics.fmean(by_seed[seed] for seed in by_seed if seed < SEEDS)

  return min(rates, key=mean)


def chosen(rows: Sequence[dict]) -> dict[float, set[str]]:
  """The methods that are compared at a learning rate, by learning rate."""
  by_lr: dict[float, set[str]] = {}
  for method in METHODS:
    for tuned in ("plain", method):
      by_lr.setdefault(best_lr(rows, tuned), set()).add(method)
  return by_lr


class Comparison(NamedTuple):
  """A method against a rival, over paired seeds.

  Attributes:
    relative: mean loss over the rival's, minus 1.
    deviations: mean of the difference, the rival's loss subtracted, in its
      standard deviations.
    verdict: ``"win"`` if that is below -2, ``"loss"`` if above 2, otherwise
      ``"tie"``.
  """

  relative: float
  deviations: float
  verdict: str


def compare(ours: dict[int, float], theirs: dict[int, float]) -> Comparison:
  """Compares the losses of two methods by seed.

  Args:
    ours: losses of the method by seed.
    theirs: losses of the rival by seed.

  Returns:
    The comparison. Where a method has diverged for a seed, it has lost.
  """
  finite = [all(map(math.isfinite, x.values())) for x in (ours, theirs)]
  if not all(finite):
    verdict = {(True, False): "win", (False, True): "loss"}.get(tuple(finite))
    return Comparison(math.nan, math.nan, verdict or "tie")
  # One of the two may have been run with more seeds, for another comparison.
  seeds = sorted(ours.keys() & theirs.keys())
  ours, theirs = ({seed: x[seed] for seed in seeds} for x in (ours, theirs))
  differences = [ours[seed] - theirs[seed] for seed in seeds]
  mean, std = statistics.fmean(differences), statistics.stdev(differences)
  deviations = mean / std if std else math.copysign(math.inf, mean)
  return Comparison(
    statistics.fmean(ours.values()) / statistics.fmean(theirs.values()) - 1,
    deviations,
    "win" if deviations < -2 else "loss" if deviations > 2 else "tie",
  )


def verdict(comparison: Comparison) -> str:
  """A comparison as it is published."""
  relative, deviations, verdict = comparison
  return f"{verdict} {relative:+.1%} ({deviations:+.1f})"


def summarise(rows: Sequence[dict], own_lr: bool) -> dict[str, Any]:
  """Compares adaptive with its rivals in a cell.

  Args:
    rows: the runs of the cell.
    own_lr: whether each method has its own best learning rate instead of that
      of plain.

  Returns:
    For each method its ``lr``, ``mean`` and ``std``; and the
    :class:`Comparison` of adaptive with plain, with SVRG, and with the best of
    the linear schedules, whose name is ``best_linear``.
  """
  lrs = {m: best_lr(rows, m if own_lr else "plain") for m in METHODS}
  by_method = {m: losses(rows, m, lrs[m]) for m in METHODS}
  means = {m: statistics.fmean(x.values()) for m, x in by_method.items()}
  best_linear = min(LINEAR, key=lambda m: means[m])
  return {
    "methods": {
      m: {"lr": lrs[m], "mean": means[m], "std": std(x.values())}
      for m, x in by_method.items()
    },
    "best_linear": best_linear,
    "against": {
      name: compare(by_method[ADAPTIVE], by_method[rival])
      for name, rival in (
        ("plain", "plain"),
        ("svrg", "svrg"),
        ("linear", best_linear),
      )
    },
  }


def std(values: Iterable[float]) -> float:
  """Sample standard deviation of what is finite."""
  finite = [x for x in values if math.isfinite(x)]
  return statistics.stdev(finite) if len(finite) > 1 else math.nan


def table(summaries: Mapping[str, dict]) -> str:
  """A line for each cell, in Markdown, and the wins, ties and losses.

  Args:
    summaries: results of :func:`summarise` by cell.
  """
  lines = []
  for name, summary in summaries.items():
    methods = summary["methods"]
    shown = ("plain", "svrg", summary["best_linear"], ADAPTIVE)
    lines.append(
      [
        name,
        *(
          f"{methods[m]['mean']:#.3g} ± {methods[m]['std']:#.1g}"
          f" ({' at '.join([*m.split()[1:], ''])}{methods[m]['lr']:g})"
          for m in shown
        ),
        *map(verdict, summary["against"].values()),
      ]
    )
  columns = (
    *("cell", "plain", "SVRG", "best linear", "adaptive"),
    *("against plain", "against SVRG", "against best linear"),
  )
  counts = []
  for rival in ("plain", "svrg", "linear"):
    verdicts = [s["against"][rival].verdict for s in summaries.values()]
    count = ", ".join(f"{v} {verdicts.count(v)}" for v in VERDICTS)
    counts.append(f"adaptive against {rival}: {count}")
  nets = [s for name, s in summaries.items() if "mlp" in name]
  lower = sum(s["against"]["linear"].relative <= -0.1 for s in nets)
  counts.append(
    f"at least 10 % below the best linear schedule: {lower} of {len(nets)}"
    " cells with an MLP"
  )
  return "\n".join([reporting.markdown_table(columns, lines), "", *counts])


def close_cells(summaries: Mapping[str, dict]) -> list[str]:
  """The cells that three seeds do not settle.

  Args:
    summaries: results of :func:`summarise` by cell.

  Returns:
    Those with a difference between 1.5 and 3 standard deviations, or, with an
    MLP, between 7 and 13 % below the best linear schedule.
  """

  def is_close(name: str, against: Mapping[str, Comparison]) -> bool:
    deviations = [abs(c.deviations) for c in against.values()]
    return any(1.5 <= d <= 3 for d in deviations) or (
      "mlp" in name and -0.13 <= against["linear"].relative <= -0.07
    )

  return [
    name
    for name, summary in summaries.items()
    if is_close(name, summary["against"])
  ]


def relative_losses(
  rows: Mapping[str, Sequence[dict]],
  methods: Iterable[str],
  lrs: Mapping[str, float],
  base: str,
) -> dict[str, dict[str, float]]:
  """Mean final train losses, divided by those of one method.

  Args:
    rows: the runs of each problem, see :func:`run_cell`.
    methods: the methods.
    lrs: the learning rate of each problem.
    base: the method that they are divided by.

  Returns:
    For each method the quotient by problem, and their geometric mean as
    ``"all"``.
  """
  result: dict[str, dict[str, float]] = {}
  for method in methods:
    quotients = {}
    for name, runs in rows.items():
      ours, theirs = (
        statistics.fmean(losses(runs, m, lrs[name]).values())
        for m in (method, base)
      )
      quotients[name] = ours / theirs
    result[method] = quotients | {
      "all": math.exp(statistics.fmean(map(math.log, quotients.values())))
    }
  return result


def relative_table(
  rows: Mapping[str, Sequence[dict]],
  methods: Iterable[str],
  lrs: Mapping[str, float],
  base: str,
) -> str:
  """A line for each method, in Markdown; see :func:`relative_losses`."""
  lines = [
    [method, *(f"{quotient:.3f}" for quotient in quotients.values())]
    for method, quotients in relative_losses(rows, methods, lrs, base).items()
  ]
  return reporting.markdown_table(["method", *rows, "all"], lines)


# Options that studies have in common.
data_dir_option = click.option(
  "--data-dir",
  type=click.Path(exists=True, file_okay=False, path_type=Path),
  required=True,
  help="Folder of the four IDX .gz files of fashion-mnist.",
)


def cell_option(cells: Iterable[str]) -> Callable[[Callable], Callable]:
  """The option to choose some of the problems, by their names."""
  return click.option(
    "--cell",
    "cells",
    multiple=True,
    type=click.Choice(list(cells)),
    help="Only this problem; may be repeated.",
  )


def out_option(study: str) -> Callable[[Callable], Callable]:
  """The option for the folder of the results of a study."""
  return click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results", study),
    show_default=True,
    help="Folder of the results; runs that are in it are not repeated.",
  )


@click.command(cls=train.Command)
@data_dir_option
@cell_option(CELLS)
@out_option("grid")
def main(data_dir: Path, cells: Sequence[str], out: Path) -> None:
  """Trains with every method in every cell, and compares adaptive with each.

  Each cell with three seeds, with five where these do not settle it.
  """
  out.mkdir(parents=True, exist_ok=True)

  def run(
    name: str, methods: Iterable[str], lrs: Sequence[float], seeds: int
  ) -> list[dict]:
    return run_cell(
      CELLS[name],
      {method: METHODS[method] for method in METHODS if method in methods},
      lrs,
      range(seeds),
      data_dir,
      out / f"{name}.json",
    )

  rows = {}
  for name in cells or CELLS:
    rows[name] = run(name, METHODS, CELLS[name].learning_rates, SEEDS)
    both = [{name: summarise(rows[name], own)} for own in (False, True)]
    if any(map(close_cells, both)):
      for lr, methods in chosen(rows[name]).items():
        rows[name] = run(name, methods, [lr], MORE_SEEDS)
    click.echo(name)
  for title, own in (
    ("at the learning rate that is best for plain", False),
    ("at the best learning rate of each method", True),
  ):
    summaries = {name: summarise(runs, own) for name, runs in rows.items()}
    click.echo(f"\n{title}\n\n{table(summaries)}")


if __name__ == "__main__":
  main()
