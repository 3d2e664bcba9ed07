# SPDX-License-Identifier: Apache-2.0
"""Progress of a command, on standard error."""

import sys
import threading
from typing import Self

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
    self._interval = interval
    self._ended = threading.Event()
    self._is_first = jax.process_index() == 0
    self._has_bar = self._is_first and sys.stderr.isatty()
    self._bar = rich.progress.Progress(
      console=rich.console.Console(stderr=True), disable=not self._has_bar
    )
    self._task = self._bar.add_task("compiling", total=total)

  def __enter__(self) -> Self:
    if self._has_bar:
      self._bar.start()
    else:
      threading.Thread(target=self._tell, daemon=True).start()
    return self

  def __exit__(self, *error: object) -> None:
    if self._has_bar:
      self._bar.stop()
    self._ended.set()

  def __call__(self, run: Run, point: Point) -> None:
    """Shows the state of a run after an epoch."""
    e = run.experiment
    status = (
      f"{e.model}, {e.dataset}, {e.method}, seed {e.seed}, epoch"
      f" {point.epoch}/{e.epochs}, loss {point.train_loss:#.3g}"
    )
    self._bar.update(self._task, advance=1, description=status)

  def say(self, line: str) -> None:
    """Prints a line above the bar."""
    if self._is_first:
      self._bar.console.out(line, highlight=False)

  def _tell(self) -> None:
    (task,) = self._bar.tasks
    while not self._ended.wait(self._interval):
      done = f"{task.completed:.0f}/{task.total}"
      self.say(f"{done} epochs: {task.description}")
