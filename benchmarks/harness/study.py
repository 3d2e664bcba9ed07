# SPDX-License-Identifier: Apache-2.0
"""Studies: methods that are compared on several problems, by seed.

A study is data: problems, methods, and functions that make a table and a figure
of the runs. Its command trains what the store lacks and reports; ``--publish``
writes the runs to ``benchmarks/results``, see :mod:`publishing`.
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
  ("logreg", "adamw"): (0.01, 0.03, 0.1),
  ("mlp2", "adamw"): (0.003, 0.01, 0.03),
  ("mlp2", "nadamw"): (0.01, 0.03, 0.06),
  ("mlp2", "muon"): (0.02, 0.04, 0.08, 0.16),
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

# Makes the experiments of a method from the template of a problem.
Arm = Callable[[Experiment], Experiment]
# The text of a problem and a method in a table.
Text = Callable[[str, str], str]


def arm(
  method: str, *, changes: Mapping[str, Any] = {}, **settings: Any
) -> Arm:
  """A method with settings, and changes of the experiment's other fields."""
  return lambda template: template.replace(
    method=method, method_settings=settings, **changes
  )


def plain(length: float) -> Arm:
  """Plain training, with a multiple of the epochs."""
  return lambda e: e.replace(method="plain", epochs=round(length * e.epochs))


# Plain training that spends as many gradients as methods with more per step.
LENGTHS = {
  "plain": plain(1),
  "plain, 2x the epochs": plain(2),
  "plain, 3x the epochs": plain(3),
}


@dataclasses.dataclass(frozen=True)
class Cell:
  """A problem."""

  # Its experiments but for method, learning rate and seed.
  template: Experiment
  # Those that each method is tried at. With several of them, each method's is
  # the best one over the tuning seeds.
  learning_rates: Sequence[float]
  # Names of the methods, all of the study by default.
  arms: Sequence[str] | None = None
  # Number of the verdict's seeds.
  num_seeds: int = len(comparison.VERDICT_SEEDS)


def cells(*problems: Cell) -> dict[str, Cell]:
  """Problems by names that say what differs within a study."""
  named = {}
  for problem in problems:
    e = problem.template
    parts = [e.dataset, e.model, e.optimizer]
    parts += [f"noise-{e.label_noise:g}"] if e.label_noise else []
    parts += [e.augment] if e.augment != "none" else []
    named["-".join(parts)] = problem
  return named


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
    sizes = {"train_examples": 4_096, "batch_size": 128}
    sizes["validation_examples"] = 2_000
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
  """The runs of a study, by problem and method; ignores other runs."""

  def __init__(
    self,
    cells: Mapping[str, Cell],
    arms: Mapping[str, Arm],
    runs: Iterable[Run],
  ):
    self._cells, self._all_arms = cells, arms
    self._runs = {run.experiment: run for run in runs if run.finished}
    self._tuned = functools.cache(self._tune)

  @functools.cached_property
  def cells(self) -> list[str]:
    """Names of the problems that have runs of each method."""
    return [
      c for c in self._cells if all(self.runs(c, a) for a in self.arms(c))
    ]

  def arms(self, cell: str) -> list[str]:
    """Names of the methods of a problem."""
    return list(self._cells[cell].arms or self._all_arms)

  def lr(self, cell: str, arm: str) -> float | None:
    """The learning rate of a method; ``None`` while it is not chosen."""
    return self._tuned(cell, arm)[0]

  def experiments(self, cell: str, arm: str) -> list[Experiment]:
    """Experiments to run next for a method: to tune it, or for the verdict."""
    return self._tuned(cell, arm)[1]

  def runs(self, cell: str, arm: str) -> list[Run]:
    """The verdict's runs of a method, by seed."""
    return self._tuned(cell, arm)[2]

  def _tune(
    self, cell: str, arm: str
  ) -> tuple[float | None, list[Experiment], list[Run]]:
    """What the three methods above return."""
    problem = self._cells[cell]
    made = self._all_arms[arm](problem.template)

    def experiments(lr: float, seeds: Iterable[int]) -> list[Experiment]:
      return [made.replace(lr=lr, seed=seed) for seed in seeds]

    lr, *others = problem.learning_rates
    if others:
      wanted = {
        rate: experiments(rate, comparison.TUNING_SEEDS)
        for rate in problem.learning_rates
      }
      losses = {k: _losses(self._found(tuning)) for k, tuning in wanted.items()}
      if not all(losses.values()):
        return None, list(itertools.chain(*wanted.values())), []
      lr = comparison.best_learning_rate(losses)
    verdict = experiments(lr, range(problem.num_seeds))
    return lr, verdict, self._found(verdict)

  def _found(self, experiments: Iterable[Experiment]) -> list[Run]:
    return [self._runs[key] for key in experiments if key in self._runs]

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
    return comparison.mean(self.values(cell, arm, field))

  def ratio(
    self, arm: str, base: str, cells: Iterable[str], field: str = "train_loss"
  ) -> float:
    """Geometric mean over problems of a method's mean over another one's."""
    return comparison.geometric_mean(
      [self.mean(c, arm, field) / self.mean(c, base, field) for c in cells]
    )

  def verdicts(
    self,
    pairs: Iterable[tuple[str, str]],
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

  def against(
    self, rivals: Mapping[str, str], cells: Iterable[str] | None = None
  ) -> Text:
    """Verdicts of one table as a column, by the rivals of methods."""
    verdicts = self.verdicts(rivals.items(), cells)
    return lambda c, arm: verdicts.get((c, arm, rivals.get(arm)), "")

  def lr_text(self, cell: str, arm: str) -> str:
    """The learning rate, with a mark where it is the end of a grid."""
    lr, rates = self.lr(cell, arm), self._cells[cell].learning_rates
    is_end = len(rates) > 1 and lr in (min(rates), max(rates))
    return f"{lr:g}" + "*" * is_end

  def loss_text(self, cell: str, arm: str) -> str:
    """The loss as it is published, with the learning rate."""
    text = report.mean_std(self.losses(cell, arm).values())
    return f"{text} ({self.lr_text(cell, arm)})"

  def accuracy_text(self, cell: str, arm: str) -> str:
    """The validation accuracy in percent as it is published."""
    values = self.values(cell, arm, "validation_accuracy")
    return f"{100 * math.fsum(values) / len(values):.1f}"

  def gradients_text(self, cell: str, arm: str) -> str:
    """The number of gradients per example as it is published."""
    return f"{self.mean(cell, arm, 'gradients_per_example'):.1f}"

  def over_plain_text(self, cell: str, arm: str) -> str:
    """The loss over that of plain with as many gradients, if known."""
    curve = zip(*self._points(cell, LENGTHS), strict=True)
    ((gradients,), (loss,)) = self._points(cell, [arm])
    ratio = comparison.over_plain(gradients, loss, list(curve))
    return "" if ratio is None else f"{ratio:.2f}"

  def table(self, columns: Mapping[str, Text], cells: Iterable[str]) -> str:
    """A table with a line for each problem and method."""
    rows = [
      [text(cell, arm) for text in columns.values()]
      for cell in cells
      for arm in self.arms(cell)
    ]
    return report.markdown_table([*columns], rows)

  def tables(self, columns: Mapping[str, Text]) -> str:
    """A table for each problem, with a line for each method."""
    return "\n\n".join(
      f"{cell}\n\n{self.table(columns, [cell])}" for cell in self.cells
    )

  def curves(
    self, cell: str, arms: Iterable[str], field: str
  ) -> list[figures.Line]:
    """Curves of a field over the training, a line for each method."""
    return [
      figures.curve(name, [r.history for r in self.runs(cell, name)], field)
      for name in arms
    ]

  def over_training(self, cell: str, arms: Iterable[str]) -> figures.Figure:
    """Loss and accuracy by epochs, of the first problem if it was not run."""
    shown = cell if cell in self.cells else self.cells[0]
    lines = functools.partial(self.curves, shown, arms)
    return figures.Figure(
      f"{shown}: mean and range over the seeds",
      _loss_and_accuracy("", "epochs", "train loss", lines),
    )

  def against_gradients(
    self, cell: str, arms: Iterable[str]
  ) -> list[figures.Panel]:
    """Loss and accuracy by gradients, with plain training of all lengths."""
    names = {"plain, 1 to 3 times the epochs": [*LENGTHS]}
    names |= {name: [name] for name in arms}
    return _loss_and_accuracy(
      *(cell, "gradients per example", "final train loss"),
      lambda field: [
        figures.Line(
          label, figures.family(label), *self._points(cell, points, field)
        )
        for label, points in names.items()
      ],
    )

  def _points(
    self, cell: str, arms: Iterable[str], field: str = "train_loss"
  ) -> tuple[list[float], list[float]]:
    """Gradients per example, and the means of a field."""
    names = ("gradients_per_example", field)
    x, y = ([self.mean(cell, arm, name) for arm in arms] for name in names)
    return x, y


def _loss_and_accuracy(
  title: str, x: str, loss: str, lines: Callable[[str], Sequence[figures.Line]]
) -> list[figures.Panel]:
  """A panel for each of the two, with the lines of their fields."""
  return [
    figures.Panel(title, x, loss, lines("train_loss")),
    figures.Panel(
      *(title, x, "validation accuracy", lines("validation_accuracy")),
      log_y=False,
    ),
  ]


def _value(run: Run, field: str) -> float:
  value = run.measured.get(field, getattr(run.last, field, None))
  return math.inf if value is None else value


def _losses(runs: Iterable[Run], field: str = "train_loss") -> dict[int, float]:
  return {
    run.experiment.seed: math.inf if run.diverged else _value(run, field)
    for run in runs
  }


def _sizes(cells: Mapping[str, Cell]) -> str:
  """A list of the sizes, with the problems of each."""
  sizes: dict[str, list[str]] = {}
  for name, cell in cells.items():
    e = cell.template
    size = (
      f"{e.train_examples} training examples, batches of {e.batch_size},"
      f" {e.epochs} epochs, {cell.num_seeds} seeds"
    )
    sizes.setdefault(size, []).append(name)
  if len(sizes) == 1:
    return f"All problems: {next(iter(sizes))}."
  return "\n".join(f"- {', '.join(v)}: {k}" for k, v in sizes.items())


@dataclasses.dataclass(frozen=True)
class Study:
  """A study."""

  name: str  # Name of its command, module and folder.
  title: str  # What it compares.
  cells: Mapping[str, Cell]  # The problems.
  arms: Mapping[str, Arm]  # The methods.
  # Makes the tables of the results, in Markdown.
  table: Callable[[Results], str]
  figure: Callable[[Results], figures.Figure] | None = None  # Makes the figure.
  # Whether the whole history of an experiment is published, and not the last
  # point alone.
  has_curve: Callable[[Experiment], bool] = lambda experiment: False

  def render(self, document: Mapping[str, Any]) -> dict[str, str]:
    """Makes the published files from the published runs."""
    results = Results(self.cells, self.arms, publishing.unpack(document))
    parts = [
      f"# {self.title}",
      f"    {document['command']}",
      self.table(results),
      NOTES,
      _sizes({name: self.cells[name] for name in results.cells}),
    ]
    figure = self.figure and self.figure(results)
    return publishing.files(parts, figure)

  def command(self) -> click.Command:
    """Makes the command of the study."""

    @click.command(help=f"{self.title}.")
    @cli.data_dir_option
    @cli.cell_option(self.cells)
    @cli.options(
      ("--seeds", cli.positive, None, "Seeds of a verdict; five at least."),
      ("--epochs", cli.positive, None, "For a quick look."),
      ("--examples train_examples", cli.positive, None, "For a quick look."),
    )
    @cli.out_option(self.name)
    @cli.publish_option
    @click.pass_context
    def main(
      ctx: click.Context,
      data_dir: Path | None,
      cells: Sequence[str],
      seeds: int | None,
      out: Path,
      publish: bool,
      **sizes: int | None,
    ) -> None:
      changes = {name: size for name, size in sizes.items() if size}
      if publish and (changes or seeds):
        raise click.UsageError("--publish takes the sizes of the study.")
      chosen = {
        name: dataclasses.replace(
          self.cells[name],
          template=self.cells[name].template.replace(**changes),
          num_seeds=seeds or self.cells[name].num_seeds,
        )
        for name in cells or self.cells
      }
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

    ``options`` are those of :func:`trainer.run_all`.
    """
    from benchmarks.harness import store, trainer

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
      made = trainer.run_all(wanted, stored, data_dir=data_dir, **options)
      runs |= {run.experiment: run for run in made}
    return list(runs.values())
