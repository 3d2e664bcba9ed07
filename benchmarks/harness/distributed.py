# SPDX-License-Identifier: Apache-2.0
"""Options of commands that train on the devices of several processes."""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import click
import jax

from benchmarks import cli


def _initialize(distributed: bool, given: Mapping[str, Any]) -> None:
  """Joins the processes of a cluster; ``None`` for what is to be detected."""
  missing = [name for name, value in given.items() if value is None]
  if not distributed:
    for name in (name for name in given if name not in missing):
      raise click.UsageError(f"{name} needs --distributed.")
    return
  if 0 < len(missing) < len(given):
    raise click.UsageError(
      f"{', '.join(given)} go together, {', '.join(missing)} is missing."
    )
  if not missing and given["--process-id"] >= given["--num-processes"]:
    raise click.UsageError(
      "--process-id must be less than --num-processes,"
      f" {given['--num-processes']}, got {given['--process-id']}."
    )
  try:
    jax.distributed.initialize(*given.values())
  except (RuntimeError, ValueError) as error:
    reason = str(error).partition("\n")[0].rstrip(".")
    raise click.UsageError(
      f"--distributed: {reason}. Where the cluster is not detected, give"
      f" {', '.join(given)}."
    ) from error


def options(command: Callable) -> Callable:
  """Options to join the processes of a cluster before the command runs."""

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
  def with_cluster(distributed: bool, **kwargs: Any) -> Any:
    names = ("coordinator", "num_processes", "process_id")
    given = {f"--{k.replace('_', '-')}": kwargs.pop(k) for k in names}
    _initialize(distributed, given)
    return command(**kwargs)

  return with_cluster


def check_batch_size(
  batch_size: int, num_examples: float, num_devices: int
) -> None:
  """Raises unless batches can be filled and divided among devices.

  Made-up examples are infinitely many.
  """
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
