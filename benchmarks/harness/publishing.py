# SPDX-License-Identifier: Apache-2.0
"""Published runs, and the tables and figures that are made of them.

``benchmarks/results/<study>/runs.json`` names a module, whose ``render`` makes
the other files of its folder: ``table.md``, and ``figure.json``, of which
``figure.svg`` is drawn. ``python -m benchmarks report`` makes these again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import importlib
import json
import math
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import figures
from benchmarks.harness.experiment import Experiment, finite, Point, Run

FOLDER = Path(__file__).parent.parent / "results"
_FIELDS = [name for name in Point._fields if name != "variance_ratio"]


def pack(
  study: str, runs: Sequence[Run], has_curve: Callable[[Experiment], bool]
) -> dict[str, Any]:
  """Makes the contents of ``runs.json`` of a study."""
  identities = [run.experiment.identity() for run in runs]
  common = {
    name: value
    for name, value in identities[0].items()
    if all(identity[name] == value for identity in identities)
  }
  packed = []
  for run, identity in zip(runs, identities, strict=True):
    points = run.history if has_curve(run.experiment) else run.history[-1:]
    packed.append(
      {
        "changes": {k: v for k, v in identity.items() if k not in common},
        "diverged": run.diverged,
        "history": finite(
          [[getattr(p, f) for f in _FIELDS] for p in points], 6
        ),
        **({"measured": finite(run.measured)} if run.measured else {}),
      }
    )
  return {
    "module": f"benchmarks.studies.{study}",
    "command": f"python -m benchmarks {study.replace('_', '-')}",
    **{
      name: _distinct(run.origin.get(name) for run in runs)
      for name in ("commit", "versions", "machine")
    },
    "common": common,
    "fields": _FIELDS,
    "runs": packed,
  }


def unpack(document: Mapping[str, Any]) -> list[Run]:
  """Reads the runs of :func:`pack`."""
  runs = []
  for saved in document["runs"]:
    history = [
      Point.from_json(dict(zip(document["fields"], values, strict=True)))
      for values in saved["history"]
    ]
    if saved["diverged"]:
      # Also where the point that was not finite has been left out.
      history[-1] = history[-1]._replace(train_loss=math.nan)
    experiment = Experiment(**document["common"], **saved["changes"])
    measured = saved.get("measured", {})
    runs.append(Run(experiment, history, finished=True, measured=measured))
  return runs


def publish(study: str, document: Mapping[str, Any]) -> None:
  """Writes the runs of a study, and what is made of them."""
  folder = FOLDER / study
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(document, separators=(",", ":"), allow_nan=False)
  # A line for each run, so that changes can be read.
  text = text.replace('{"changes"', '\n{"changes"')
  (folder / "runs.json").write_text(text + "\n", encoding="utf-8")
  write(folder)


def files(
  parts: Iterable[str], figure: figures.Figure | None = None
) -> dict[str, str]:
  """Makes the files of a study from paragraphs, by name."""
  made = {"table.md": "\n\n".join(parts) + "\n"}
  if figure is not None:
    text = json.dumps(figure.as_json(), ensure_ascii=False)
    made["figure.json"] = text + "\n"
  return made


def show(study: str, document: Mapping[str, Any], is_published: bool) -> None:
  """Prints the tables of a document; publishes it if asked to."""
  module = importlib.import_module(document["module"])
  click.echo(module.render(document)["table.md"])
  if is_published:
    publish(study, document)


def render(folder: Path) -> dict[str, str]:
  """Returns the contents of the files that are made of ``runs.json``."""
  document = json.loads((folder / "runs.json").read_text("utf-8"))
  return importlib.import_module(document["module"]).render(document)


def write(folder: Path) -> None:
  """Writes these files, and draws the figure."""
  for name, text in render(folder).items():
    (folder / name).write_text(text, encoding="utf-8")
    if name == "figure.json":
      drawing = figures.draw(figures.from_json(json.loads(text)))
      (folder / "figure.svg").write_bytes(drawing)


def _distinct(values: Iterable[Any]) -> list[Any]:
  """Each of the values once, in their order."""
  found = {json.dumps(value, sort_keys=True): value for value in values}
  return list(found.values())


@click.command()
@click.argument("studies", nargs=-1)
def main(studies: Sequence[str]) -> None:
  """Makes tables and figures again from the runs in benchmarks/results.

  All of them, or those of the STUDIES named.
  """
  known = sorted(path.parent.name for path in FOLDER.glob("*/runs.json"))
  for study in studies or known:
    if study not in known:
      raise click.UsageError(f"{study!r} is not one of {', '.join(known)}.")
    write(FOLDER / study)
    click.echo(FOLDER / study)
