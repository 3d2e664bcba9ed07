# SPDX-License-Identifier: Apache-2.0
"""Options of commands that train on the devices of several processes."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import click
import jax

from benchmarks import cli


class Distributed(NamedTuple):
  """Options to join the processes of a cluster; ``None`` to detect them."""

  distributed: bool  # Whether there is one.
  coordinator: str | None  # Address of process 0.
  num_processes: int | None
  process_id: int | None

  def initialize(self) -> None:
    """Joins them."""
    given = {
      "--coordinator": self.coordinator,
      "--num-processes": self.num_processes,
      "--process-id": self.process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not self.distributed:
      for name in (name for name in given if name not in missing):
        raise click.UsageError(f"{name} needs --distributed.")
      return
    if 0 < len(missing) < len(given):
      raise click.UsageError(
        f"{', '.join(given)} go together, {', '.join(missing)} is missing."
      )
    if not missing and self.process_id >= self.num_processes:
      raise click.UsageError(
        "--process-id must be less than --num-processes,"
        f" {self.num_processes}, got {self.process_id}."
      )
    try:
      jax.distributed.initialize(*self[1:])
    except (RuntimeError, ValueError) as error:
      reason = str(error).partition("\n")[0].rstrip(".")
      raise click.UsageError(
        f"--distributed: {reason}. Where the cluster is not detected, give"
        f" {', '.join(given)}."
      ) from error


def options(command: Callable) -> Callable:
  """The options of a :class:`Distributed`, the argument ``cluster``."""

  @cli.options(
    (
      *("--distributed", bool, None),
      "Train on the devices of several processes, each started with this"
      " command. TPU pods, Slurm and GKE need no further options.",
    ),
    (
      *("--coordinator", click.STRING, None),
      "Address of process 0, host:port, where the cluster is not detected.",
    ),
    ("--num-processes", cli.positive, None, ""),
    ("--process-id", click.IntRange(min=0), None, ""),
  )
  @functools.wraps(command)
  def with_distributed(**kwargs: Any) -> Any:
    cluster = Distributed(*map(kwargs.pop, Distributed._fields))
    return command(cluster=cluster, **kwargs)

  return with_distributed


def check_batch_size(
  batch_size: int, num_examples: int, num_devices: int
) -> None:
  """Raises unless batches can be filled and divided among devices."""
  if batch_size > num_examples:
    raise click.UsageError(
      "--batch-size must be at most the number of training examples,"
      f" {num_examples}, got {batch_size}."
    )
  if batch_size % num_devices:
    raise click.UsageError(
      "--batch-size must be a multiple of the number of devices,"
      f" {num_devices}, got {batch_size}."
    )
