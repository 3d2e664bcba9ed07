# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m benchmarks <command>``.

A command is a module with a :class:`click.Command` called ``main``. It is
imported when it is called, so that optional packages are needed by the commands
that use them only.
"""

from collections.abc import Callable, Iterable
import importlib
import math
from pathlib import Path
import shlex
import sys
from typing import Any, NamedTuple

import click

import benchmarks

INTERRUPTED = 128 + 2  # The exit status of a shell command ended by SIGINT.


class Entry(NamedTuple):
  """A command."""

  help: str  # One line of ``--help``.
  # The module that has it, as ``main``; a page of the studies by default.
  module: str | None = None
  extra: str = "benchmarks"  # Extra with the optional packages it needs.


COMMANDS = {
  "train": Entry("Train a model with each method; compare them."),
  "paper": Entry("Tables of the alpha-SVRG paper.", extra="tfds"),
  "variance": Entry("Gradient variance and best coefficient."),
  "coefficient": Entry("Coefficients of SVRG, given and estimated."),
  "staleness": Entry("Snapshots that are renewed ever more rarely."),
  "stability": Entry("Learning rates near SGD's stability limit."),
  "saga": Entry("SAGA against plain training."),
  "saga-variants": Entry("Additions to adaptive SAGA."),
  "snapshots": Entry("Snapshot strategies: gradients and loss."),
  "equal-compute": Entry("Methods at equal numbers of gradients."),
  "optimizers": Entry("Other optimizers, alone and behind adaptive SAGA."),
  "balanced-order": Entry("The order of the examples, by their gradients."),
  "step-cost": Entry(
    "Time and bytes of steps, and their lower limits.",
    "benchmarks.cost.step_cost",
  ),
  "tpu": Entry(
    "Needs of steps on TPUs, by their compiler.", "benchmarks.cost.tpu"
  ),
  "convex": Entry(
    "Convex problems to high precision, and other packages.",
    "benchmarks.studies.convex.study",
    "convex",
  ),
  "tomography": Entry(
    "Poisson tomography by SVRG and by L-BFGS-B.", extra="convex"
  ),
  "report": Entry(
    "Make published tables and figures again.", "benchmarks.harness.publishing"
  ),
}


class Commands(click.Group):
  """A group that imports a command when it is called.

  Reports errors of the user in one line, without a traceback.
  """

  def list_commands(self, ctx: click.Context) -> list[str]:
    """Returns the names of the commands."""
    return list(COMMANDS)

  def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
    """Imports a command."""
    if name not in COMMANDS:
      return None
    module = f"benchmarks.studies.{name.replace('-', '_')}"
    return importlib.import_module(COMMANDS[name].module or module).main

  def format_commands(
    self, ctx: click.Context, formatter: click.HelpFormatter
  ) -> None:
    """Lists the commands without importing them."""
    with formatter.section("Commands"):
      formatter.write_dl([(k, entry.help) for k, entry in COMMANDS.items()])

  def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
    """Keeps the arguments as they are given, for :func:`argv`."""
    ctx.obj = list(args)
    return super().parse_args(ctx, args)

  def invoke(self, ctx: click.Context) -> Any:
    """Imports and runs a command; names the extra of a missing package."""
    try:
      return super().invoke(ctx)
    except ModuleNotFoundError as error:
      name, package = argv(ctx)[0], (error.name or "").partition(".")[0]
      if package in ("", "benchmarks", "optax_svrg"):
        raise
      raise click.UsageError(
        f"{name} needs the package {package!r}:"
        f' pip install "optax-svrg[{COMMANDS[name].extra}]".'
      ) from error

  def main(self, *args: Any, **kwargs: Any) -> None:
    """Runs a command and exits with its status."""
    try:
      status = super().main(*args, **{**kwargs, "standalone_mode": False})
    except click.ClickException as error:
      click.echo(f"Error: {error.format_message()}", err=True)
      status = error.exit_code
    except benchmarks.UserError as error:
      click.echo(f"Error: {error}", err=True)
      status = click.UsageError.exit_code
    except click.Abort:
      click.echo("Interrupted.", err=True)
      status = INTERRUPTED
    sys.exit(status)


@click.group(cls=Commands)
def main() -> None:
  """Benchmarks of optax_svrg. ``COMMAND --help`` explains each of them."""


def argv(ctx: click.Context) -> list[str]:
  """Returns the arguments of the command line, for the record of a run."""
  return ctx.obj or []


def command(ctx: click.Context) -> str:
  """Returns the command line to publish: without folders and --publish."""
  kept, given = [], iter(argv(ctx))
  for argument in given:
    if argument in ("--data-dir", "--out"):
      next(given)
    elif argument != "--publish":
      kept.append(argument)
  return shlex.join(["python", "-m", "benchmarks", *kept])


class Number(click.FloatRange):
  """A finite number of a range; the type of every option that is a float."""

  name = "number"

  def convert(
    self, value: Any, param: click.Parameter | None, ctx: click.Context | None
  ) -> float:
    """Converts what was given."""
    number = super().convert(value, param, ctx)
    if not math.isfinite(number):
      self.fail(f"{value} is not a finite number.", param, ctx)
    return number


class Names(click.Choice):
  """Different names, separated by commas."""

  def convert(
    self, value: Any, param: click.Parameter | None, ctx: click.Context | None
  ) -> tuple[str, ...]:
    """Converts what was given."""
    names = value.split(",") if isinstance(value, str) else value
    convert = super().convert
    names = tuple(convert(name, param, ctx) for name in names)
    if len(set(names)) < len(names):
      self.fail(f"{value!r} has a name twice.", param, ctx)
    return names


positive = click.IntRange(min=1)
rate = Number(min=0, min_open=True)
folder = click.Path(file_okay=False, writable=True, path_type=Path)


def options(
  *table: tuple[str, Any, Any, str],
) -> Callable[[Callable], Callable]:
  """The options of a command as a table.

  An option may name its argument, too: ``"--cell cells"``.
  """

  def decorate(command: Callable) -> Callable:
    for name, kind, default, text in reversed(table):
      if kind is not bool and not isinstance(kind, click.ParamType):
        kind = click.Choice(list(kind))
      command = click.option(
        *name.split(),
        type=kind,
        is_flag=kind is bool,
        default=False if kind is bool else default,
        show_default=True,
        help=text,
      )(command)
    return command

  return decorate


data_dir_option = options(
  (
    *("--data-dir", click.Path(True, file_okay=False, path_type=Path), None),
    "Folder of the data sets; mnist-5k needs none.",
  )
)
publish_option = options(
  ("--publish", bool, None, "Write to benchmarks/results, too.")
)


def out_option(study: str) -> Callable[[Callable], Callable]:
  """The option for the folder of a study's results."""
  text = "Folder of the results; runs that are stored there are not repeated."
  return options(("--out", folder, Path("results", study), text))


def several(
  name: str, known: Iterable[str], default: str
) -> Callable[[Callable], Callable]:
  """An option that may be repeated."""
  kind = click.Choice(list(known))
  text = f"May be repeated; {default}."
  return click.option(*name.split(), type=kind, multiple=True, help=text)


def cell_option(cells: Iterable[str]) -> Callable[[Callable], Callable]:
  """The option to choose some of a study's problems, the argument ``cells``."""
  return several("--cell cells", cells, "by default all problems")
