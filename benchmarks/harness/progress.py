# SPDX-License-Identifier: Apache-2.0
"""Progress of a command, on standard error."""

import math
import sys
import time
from typing import Self

import jax
import rich.console
import rich.progress

from benchmarks.harness.experiment import Point, Run


class Progress:
  """Shows a bar on a terminal; elsewhere a line, each ``interval`` seconds.

  Called with a run and its state after each epoch; a context manager. Only
  process 0 shows anything.
  """

  def __init__(self, total: int, interval: float = 10.0):
    self._interval, self._told = interval, -math.inf
    self._is_first = jax.process_index() == 0
    self._bar = rich.progress.Progress(
      console=rich.console.Console(stderr=True),
      disable=not (self._is_first and sys.stderr.isatty()),
    )
    self._task = self._bar.add_task("compiling", total=total)

  def __enter__(self) -> Self:
    self._bar.start()
    self._tell()
    return self

  def __exit__(self, *error: object) -> None:
    self._bar.stop()

  def __call__(self, run: Run, point: Point) -> None:
    """Shows the state of a run after an epoch."""
    e = run.experiment
    status = (
      f"{e.model}, {e.dataset}, {e.method}, seed {e.seed}, epoch"
      f" {point.epoch}/{e.epochs}, loss {point.train_loss:#.3g}"
    )
    self._bar.update(self._task, advance=1, description=status)
    self._tell()

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if self._is_first:
      self._bar.console.out(line, highlight=False)

  def _tell(self) -> None:
    (task,), now = self._bar.tasks, time.monotonic()
    if self._bar.disable and task.total and now - self._told >= self._interval:
      self._told = now
      self.say(f"{task.completed:.0f}/{task.total} epochs: {task.description}")
