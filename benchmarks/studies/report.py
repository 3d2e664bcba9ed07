# SPDX-License-Identifier: Apache-2.0
"""Makes the published tables and figures again from the published runs."""

from collections.abc import Sequence

import click

from benchmarks.harness import publishing


@click.command()
@click.argument("studies", nargs=-1)
def main(studies: Sequence[str]) -> None:
  """Makes tables and figures again from the runs in benchmarks/results.

  All of them, or those of the STUDIES named.
  """
  known = sorted(p.parent.name for p in publishing.FOLDER.glob("*/runs.json"))
  for study in studies or known:
    if study not in known:
      raise click.UsageError(f"{study!r} is not one of {', '.join(known)}.")
    publishing.write(publishing.FOLDER / study)
    click.echo(publishing.FOLDER / study)
