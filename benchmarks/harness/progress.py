# SPDX-License-Identifier: Apache-2.0
"""Progress of a command, on standard error."""

import sys
import threading
from typing import Any, Self

import click
import jax
import rich.console
import rich.progress

from benchmarks.harness.experiment import Point, Run


class Progress:
  """Shows a bar on a terminal; elsewhere a line every ``interval`` seconds.

  Called with a run and its state after each epoch; a context manager. Only
  process 0 shows anything.
  """

  def __init__(self, total: int, interval: float = 10.0):
    self._total, self._done = total, 0
    self._interval = interval
    self._status = "compiling"
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._tell, daemon=True)
    self._is_first = jax.process_index() == 0
    self._bar: Any = None
    if self._is_first and sys.stderr.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
      )
      self._task = self._bar.add_task(self._status, total=total)

  def __enter__(self) -> Self:
    if self._bar is not None:
      self._bar.start()
    elif self._is_first:
      self._thread.start()
    return self

  def __exit__(self, *error: object) -> None:
    if self._bar is not None:
      self._bar.stop()
    self._ended.set()

  def __call__(self, run: Run, point: Point) -> None:
    """Shows the state of a run after an epoch."""
    e = run.experiment
    self._done += 1
    self._status = (
      f"{e.model}, {e.dataset}, {e.method}, seed {e.seed}, epoch"
      f" {point.epoch}/{e.epochs}, loss {point.train_loss:#.3g}"
    )
    if self._bar is not None:
      self._bar.update(self._task, advance=1, description=self._status)

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if self._bar is not None:
      self._bar.console.print(line)
    elif self._is_first:
      click.echo(line, err=True)

  def _tell(self) -> None:
    while not self._ended.wait(self._interval):
      self.say(f"{self._done}/{self._total} epochs: {self._status}")
