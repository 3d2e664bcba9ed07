# SPDX-License-Identifier: Apache-2.0
"""Studies: methods that are compared on several problems, by seed.

A study is data: problems, methods, and functions that make a table and a figure
of the runs. Its command trains what the store lacks and reports; with
``--publish`` the runs go to ``benchmarks/results``, from which ``python -m
benchmarks report`` makes the published table and figure again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import click

from benchmarks import cli
from benchmarks.harness import comparison, figures, publishing, report
from benchmarks.harness.experiment import Experiment, Run

# Around what suits the plain optimizer, for all methods alike.
LEARNING_RATES = {
  ("logreg", "sgd"): (0.1, 0.3, 1.0),
  ("logreg", "adamw"): (0.01, 0.03, 0.1),
  ("mlp2", "sgd"): (0.15, 0.3, 0.6),
  ("mlp2", "momentum"): (0.02, 0.05, 0.1),
  ("mlp2", "adamw"): (0.003, 0.01, 0.03),
  ("mlp2", "nadamw"): (0.01, 0.03, 0.06),
  ("mlp2", "muon"): (0.02, 0.04, 0.08, 0.16),
  ("mlp4", "sgd"): (0.15, 0.3, 0.6),
  ("mlp4", "momentum"): (0.05, 0.1, 0.2),
  ("mlp4", "adamw"): (0.0025, 0.005, 0.01),
}
NOTES = """\
Final train losses are means over the seeds ± sample standard deviation, with
the learning rate in brackets (`*`: at an end of its grid). Where several
learning rates were tried, each method has the one of least mean loss over two
seeds that take no part in the verdicts. A verdict is by a paired t-test over
the seeds at 5 %, after Holm's correction over all comparisons of its table. The
percentage is the mean difference from the rival's mean loss; in square brackets
is its 95 % interval, that of the single comparison."""
# How much longer plain training is that spends as many gradients.
LENGTHS = {"plain": 1, "plain, 2x the epochs": 2, "plain, 3x the epochs": 3}

# Makes the experiments of a method from the template of a problem.
Arm = Callable[[Experiment], Experiment]


def arm(
  method: str, *, changes: Mapping[str, Any] | None = None, **settings: Any
) -> Arm:
  """A method with settings, and changes of the experiment's other fields."""
  return lambda template: template.replace(
    method=method, method_settings=settings, **(changes or {})
  )


def plain_lengths(lengths: Mapping[str, float] = LENGTHS) -> dict[str, Arm]:
  """Plain training of several lengths, by default each of ``LENGTHS``."""

  def longer(factor: float) -> Arm:
    return lambda e: e.replace(method="plain", epochs=round(factor * e.epochs))

  return {name: longer(factor) for name, factor in lengths.items()}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A problem.

  Attributes:
    template: its experiments but for method, learning rate and seed.
    learning_rates: those that each method is tried at. With several of them,
      each method's is the best one over the tuning seeds.
    arms: names of the methods, all of the study by default.
    num_seeds: number of the verdict's seeds.
  """

  template: Experiment
  learning_rates: Sequence[float]
  arms: Sequence[str] | None = None
  num_seeds: int = len(comparison.VERDICT_SEEDS)

  @property
  def name(self) -> str:
    """Name of the problem, from what differs within a study."""
    e = self.template
    parts = [e.dataset, e.model, e.optimizer]
    parts += [f"noise-{e.label_noise:g}"] if e.label_noise else []
    parts += [e.augment] if e.augment != "none" else []
    return "-".join(parts)

  @property
  def size(self) -> str:
    """The size of the problem, in words."""
    e = self.template
    return (
      f"{e.train_examples} training examples, batches of {e.batch_size},"
      f" {e.epochs} epochs, {self.num_seeds} seeds"
    )


def cells(*problems: Cell) -> dict[str, Cell]:
  """Problems by their names."""
  return {problem.name: problem for problem in problems}


def cell(
  dataset: str,
  model: str,
  optimizer: str,
  *,
  lr: float | None = None,
  arms: Sequence[str] | None = None,
  num_seeds: int = len(comparison.VERDICT_SEEDS),
  **changes: Any,
) -> Cell:
  """A problem of the size that most studies have."""
  rates = LEARNING_RATES[model, optimizer] if lr is None else (lr,)
  sizes: dict[str, Any] = {"train_examples": 4_000, "batch_size": 64}
  if dataset == "fashion-mnist":
    sizes = {
      "train_examples": 4_096,
      "validation_examples": 2_000,
      "batch_size": 128,
    }
  template = Experiment(
    dataset=dataset,
    model=model,
    optimizer=optimizer,
    method="plain",
    lr=rates[0],
    **{"epochs": 12, **sizes, **changes},
  )
  return Cell(template, rates, arms, num_seeds)


class Results:
  """The runs of a study, by problem and method.

  Args:
    cells: the problems.
    arms: the methods.
    runs: the runs, of which others are ignored.

  Attributes:
    runs: from a problem and a method to the verdict's runs, by seed.
  """

  def __init__(
    self,
    cells: Mapping[str, Cell],
    arms: Mapping[str, Arm],
    runs: Iterable[Run],
  ):
    self._cells, self._all_arms = cells, arms
    self._runs = {run.experiment: run for run in runs if run.finished}
    self.runs = functools.cache(self._verdict_runs)

  @functools.cached_property
  def cells(self) -> list[str]:
    """Names of the problems that have runs of each method."""
    return [
      c for c in self._cells if all(self.runs(c, a) for a in self.arms(c))
    ]

  def shown(self, cell: str) -> str:
    """The problem if it has been run, otherwise the first one that has."""
    return cell if cell in self.cells else self.cells[0]

  def arms(self, cell: str) -> list[str]:
    """Names of the methods of a problem."""
    return list(self._cells[cell].arms or self._all_arms)

  def experiments(self, cell: str, arm: str) -> list[Experiment]:
    """Experiments to run next for a method: to tune it, or for the verdict."""
    lr, seeds = self.lr(cell, arm), range(self._cells[cell].num_seeds)
    if lr is None:
      rates = self._cells[cell].learning_rates
      pairs = itertools.product(rates, comparison.TUNING_SEEDS)
      return [self._experiment(cell, arm, *pair) for pair in pairs]
    return [self._experiment(cell, arm, lr, seed) for seed in seeds]

  def lr(self, cell: str, arm: str) -> float | None:
    """The learning rate of a method; ``None`` while it is not chosen."""
    rates = self._cells[cell].learning_rates
    if len(rates) == 1:
      return rates[0]
    tuning = {
      lr: self._found(cell, arm, lr, comparison.TUNING_SEEDS) for lr in rates
    }
    if not all(map(len, tuning.values())):
      return None
    return comparison.best_learning_rate(
      {lr: _losses(runs) for lr, runs in tuning.items()}
    )

  def lr_text(self, cell: str, arm: str) -> str:
    """The learning rate, with a mark where it is the end of a grid."""
    lr, rates = self.lr(cell, arm), self._cells[cell].learning_rates
    is_end = len(rates) > 1 and lr in (min(rates), max(rates))
    return f"{lr:g}" + "*" * is_end

  def losses(
    self, cell: str, arm: str, field: str = "train_loss"
  ) -> dict[int, float]:
    """Final losses by seed; infinite where training diverged."""
    return _losses(self.runs(cell, arm), field)

  def values(self, cell: str, arm: str, field: str) -> list[float]:
    """A field of the last points, or what was measured at the end."""
    return [_value(run, field) for run in self.runs(cell, arm)]

  def mean(self, cell: str, arm: str, field: str = "train_loss") -> float:
    """The mean of a field over the seeds; infinite if a run diverged."""
    values = self.values(cell, arm, field)
    if not all(map(math.isfinite, values)):
      return math.inf
    return math.fsum(values) / len(values)

  def loss_text(self, cell: str, arm: str) -> str:
    """The loss as it is published, with the learning rate."""
    text = report.mean_std(self.losses(cell, arm).values())
    return f"{text} ({self.lr_text(cell, arm)})"

  def accuracy_text(self, cell: str, arm: str) -> str:
    """The validation accuracy in percent as it is published."""
    values = self.values(cell, arm, "validation_accuracy")
    return f"{100 * math.fsum(values) / len(values):.1f}"

  def verdicts(
    self,
    pairs: Sequence[tuple[str, str]],
    cells: Iterable[str] | None = None,
    field: str = "train_loss",
  ) -> dict[tuple[str, str, str], str]:
    """Verdicts of one table, by problem, method and rival."""
    chosen = self.cells if cells is None else cells
    return comparison.verdicts(
      {
        (c, arm, rival): comparison.compare(
          self.losses(c, arm, field), self.losses(c, rival, field)
        )
        for c, (arm, rival) in itertools.product(chosen, pairs)
      }
    )

  def curves(
    self, cell: str, arms: Iterable[str], field: str
  ) -> list[figures.Line]:
    """Curves of a field over the training, a line for each method."""
    lines = []
    for name in arms:
      histories = [run.history for run in self.runs(cell, name)]
      lines.append(
        figures.mean_line(
          name,
          [point.epoch for point in histories[0]],
          [[getattr(point, field) for point in h] for h in histories],
        )
      )
    return lines

  def point(
    self, cell: str, arm: str, field: str = "train_loss"
  ) -> tuple[float, float]:
    """Gradients per example, and the mean of a field."""
    gradients = self.mean(cell, arm, "gradients_per_example")
    return gradients, self.mean(cell, arm, field)

  def over_plain(self, cell: str, arm: str) -> str:
    """The loss over that of plain with as many gradients, if known."""
    curve = [self.point(cell, name) for name in LENGTHS]
    ratio = comparison.over_plain(*self.point(cell, arm), curve)
    return "" if ratio is None else f"{ratio:.2f}"

  def against_gradients(
    self, cell: str, arms: Iterable[str]
  ) -> list[figures.Panel]:
    """Loss and accuracy by gradients, with plain training of all lengths."""

    def panel(field: str, label: str, log_y: bool) -> figures.Panel:
      points = [self.point(cell, name, field) for name in LENGTHS]
      x, y = zip(*points, strict=True)
      lines = [figures.Line("plain, 1 to 3 times the epochs", "plain", x, y)]
      for name in arms:
        x, y = self.point(cell, name, field)
        lines.append(figures.Line(name, figures.family(name), [x], [y]))
      return figures.Panel(
        cell, "gradients per example", label, lines, log_y=log_y
      )

    return [
      panel("train_loss", "final train loss", True),
      panel("validation_accuracy", "validation accuracy", False),
    ]

  def _verdict_runs(self, cell: str, arm: str) -> list[Run]:
    lr = self.lr(cell, arm)
    if lr is None:
      return []
    return self._found(cell, arm, lr, range(self._cells[cell].num_seeds))

  def _found(
    self, cell: str, arm: str, lr: float, seeds: Iterable[int]
  ) -> list[Run]:
    keys = [self._experiment(cell, arm, lr, seed) for seed in seeds]
    return [self._runs[key] for key in keys if key in self._runs]

  def _experiment(
    self, cell: str, arm: str, lr: float, seed: int
  ) -> Experiment:
    template = self._all_arms[arm](self._cells[cell].template)
    return template.replace(lr=lr, seed=seed)


def _value(run: Run, field: str) -> float:
  value = run.measured.get(field, getattr(run.last, field, None))
  return math.inf if value is None else value


def _losses(runs: Iterable[Run], field: str = "train_loss") -> dict[int, float]:
  return {
    run.seed: math.inf if run.diverged else _value(run, field) for run in runs
  }


def _sizes(by_cell: Mapping[str, str]) -> str:
  """A list of the sizes, with the problems of each."""
  sizes: dict[str, list[str]] = {}
  for name, size in by_cell.items():
    sizes.setdefault(size, []).append(name)
  if len(sizes) == 1:
    return f"All problems: {next(iter(sizes))}."
  return "\n".join(f"- {', '.join(v)}: {k}" for k, v in sizes.items())


@dataclasses.dataclass(frozen=True)
class Study:
  """A study.

  Attributes:
    name: name of its command, module and folder.
    title: what it compares.
    cells: the problems.
    arms: the methods.
    table: makes the tables of the results, in Markdown.
    figure: makes the figure.
    has_curve: whether the whole history of an experiment is published, and not
      the last point alone.
  """

  name: str
  title: str
  cells: Mapping[str, Cell]
  arms: Mapping[str, Arm]
  table: Callable[[Results], str]
  figure: Callable[[Results], figures.Figure] | None = None
  has_curve: Callable[[Experiment], bool] = lambda experiment: False

  def render(self, document: Mapping[str, Any]) -> dict[str, str]:
    """Makes the published files from the published runs."""
    results = Results(self.cells, self.arms, publishing.unpack(document))
    parts = [
      f"# {self.title}",
      f"    {document['command']}",
      self.table(results),
      NOTES,
      _sizes({name: self.cells[name].size for name in results.cells}),
    ]
    figure = self.figure and self.figure(results)
    return publishing.files(parts, figure)

  def command(self) -> click.Command:
    """Makes the command of the study."""

    @click.command(help=f"{self.title}.")
    @cli.data_dir_option
    @cli.cell_option(self.cells)
    @click.option(
      "--seeds", type=cli.positive, help="Seeds of a verdict; five at least."
    )
    @click.option("--epochs", type=cli.positive, help="For a quick look.")
    @click.option("--examples", type=cli.positive, help="For a quick look.")
    @cli.out_option(self.name)
    @cli.publish_option
    @click.pass_context
    def main(
      ctx: click.Context,
      data_dir: Path | None,
      cells: Sequence[str],
      seeds: int | None,
      epochs: int | None,
      examples: int | None,
      out: Path,
      publish: bool,
    ) -> None:
      if publish and (epochs or examples or seeds):
        raise click.UsageError("--publish takes the sizes of the study.")
      changes = {"epochs": epochs, "train_examples": examples}
      chosen = {}
      for name in cells or self.cells:
        cell = self.cells[name]
        kept = {k: v for k, v in changes.items() if v is not None}
        chosen[name] = dataclasses.replace(
          cell,
          template=cell.template.replace(**kept),
          num_seeds=seeds or cell.num_seeds,
        )
      study = dataclasses.replace(self, cells=chosen)
      runs = study.train(out, data_dir)
      study.report(runs, cli.command(ctx), publish)

    return main

  def report(self, runs: Sequence[Run], command: str, publish: bool) -> None:
    """Prints the tables of runs; publishes them if asked to."""
    document = publishing.pack(self.name, runs, self.has_curve)
    document["command"] = command
    click.echo(self.render(document)["table.md"])
    if publish:
      publishing.publish(self.name, document)

  def train(
    self, out: Path, data_dir: Path | None, **options: Any
  ) -> list[Run]:
    """Trains what the store lacks: first to tune, then for the verdict.

    ``options`` are those of :func:`runner.run_all`.
    """
    from benchmarks.harness import runner, store
    from benchmarks.harness.progress import Progress

    stored = store.Store(out)
    runs: dict[Experiment, Run] = {}
    for cell, _ in itertools.product(self.cells, range(2)):
      results = Results(self.cells, self.arms, runs.values())
      wanted = [
        experiment
        for arm in results.arms(cell)
        for experiment in results.experiments(cell, arm)
        if experiment not in runs
      ]
      with Progress(sum(e.epochs for e in wanted)) as progress:
        made = runner.run_all(
          wanted, stored, data_dir=data_dir, progress=progress, **options
        )
      runs |= {run.experiment: run for run in made}
    return list(runs.values())
