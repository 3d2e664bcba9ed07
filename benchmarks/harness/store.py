# SPDX-License-Identifier: Apache-2.0
"""Runs on disk: a JSON file for each, checked by its whole configuration."""

from collections.abc import Mapping
import functools
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import subprocess
from typing import Any

import jax

import benchmarks
from benchmarks.harness.experiment import Experiment, Run
import optax_svrg


class Store:
  """A folder of runs."""

  def __init__(self, folder: Path):
    self.folder = folder

  def path(self, experiment: Experiment) -> Path:
    """Returns the file of an experiment."""
    return self.folder / f"{experiment.name}.json"

  def get(self, experiment: Experiment) -> Run | None:
    """Reads a run."""
    path = self.path(experiment)
    if not path.exists():
      return None
    try:
      run = Run.from_json(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise benchmarks.UserError(
        f"{path}: holds no run: {benchmarks.one_line(error)}."
      ) from error
    return run if run.experiment == experiment else None

  def put(self, run: Run) -> None:
    """Writes a run, with commit, versions and machine, in process 0."""
    run.origin = environment()
    if jax.process_index() == 0:
      write_json(self.path(run.experiment), run.as_json())


def write_json(path: Path, contents: Mapping[str, Any]) -> None:
  """Writes a file that is whole at any moment, however the program ends."""
  partial = path.with_name(f"{path.name}.partial")
  text = json.dumps(contents, indent=2, allow_nan=False, ensure_ascii=False)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
  except OSError as error:
    raise benchmarks.UserError(
      f"{path.parent}: {benchmarks.one_line(error)}."
    ) from error


@functools.cache
def environment() -> dict[str, Any]:
  """Returns commit, versions and machine: what results depend on as well."""
  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  return {
    "commit": _commit(),
    "versions": {
      "python": platform.python_version(),
      "optax_svrg": optax_svrg.__version__,
      **{name: importlib.metadata.version(name) for name in packages},
    },
    "machine": {
      "platform": platform.platform(),
      "cpus": os.cpu_count(),
      "backend": jax.default_backend(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "processes": jax.process_count(),
    },
  }


def _commit() -> str | None:
  """The commit, marked when files have been changed since; None if unknown."""
  command = ("git", "describe", "--always", "--dirty", "--abbrev=40")
  try:
    return subprocess.check_output(
      (*command, "--exclude=*"),
      cwd=Path(__file__).parent,
      stderr=subprocess.DEVNULL,
      text=True,
    ).strip()
  except (OSError, subprocess.CalledProcessError):
    return None
