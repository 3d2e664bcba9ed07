# SPDX-License-Identifier: Apache-2.0
"""Saves trainings, so that one that was killed goes on as if it had not been.

A folder holds one training: a file that says which, and a folder of Orbax
checkpoints for each run.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

import benchmarks
from benchmarks.harness.experiment import Point, Run
from benchmarks.harness.store import write_json

_IDENTITY = "training.json"


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of a training, of one run at a time, by epoch.

  With ``resume``, the folder must hold the training of this identity, the JSON
  that its results follow from; otherwise, it must be empty.
  """

  def __init__(self, folder: Path, identity: Any, resume: bool):
    self._folder = folder.absolute()
    self._manager: ocp.CheckpointManager | None = None
    path = self._folder / _IDENTITY
    if resume:
      check_identity(path, identity, "--checkpoint-dir", "Give another folder.")
      return
    if folder.exists() and any(folder.iterdir()):
      raise benchmarks.UserError(
        f"--checkpoint-dir {folder}: is not empty. Give --resume to go on with"
        " the training that it holds, or another folder."
      )
    # All processes have looked before one of them writes.
    ocp.multihost.sync_global_processes("checkpoints")
    if jax.process_index() == 0:
      try:
        write_json(path, {"identity": identity})
      except benchmarks.UserError as e:
        raise benchmarks.UserError(f"--checkpoint-dir {e}") from e
    ocp.multihost.sync_global_processes("checkpoints")

  def load(self, run: Run) -> None:
    """Fills in what is saved of a run, but for its state."""
    e = run.experiment
    folder = self._folder / f"{e.method}-{e.seed}"
    # A second manager would collide with the first one's removal of what an
    # interrupted run has left, which goes on in the background.
    if self._manager is None or self._manager.directory != folder:
      self.close()
      self._manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
          # One to go on from by hand if the last is damaged.
          max_to_keep=2,
          cleanup_tmp_directories=True,
        ),
        item_names=("state", "run"),
      )
    if self._manager.latest_step() is None:
      return
    saved = self._load("run", ocp.args.JsonRestore())
    found, wanted = saved.get("experiment"), e.identity()
    if found != wanted:
      raise self._error(f"is of another run: {difference(found, wanted)}.")
    run.history[:] = map(Point.from_json, saved["history"])
    run.finished, run.measured = saved["finished"], saved["measured"]
    self._checksum = saved["sha256"]

  def restore(self, target: Any) -> Any:
    """Returns the state of the run that was loaded."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
    state = self._load("state", ocp.args.StandardRestore(abstract))
    if _sha256(state) != self._checksum:
      raise self._error("is damaged: its checksum does not fit.")
    return state

  def save(self, run: Run, state: Any) -> None:
    """Saves the run."""
    saved = {**run.as_json(), "sha256": _sha256(state)}
    self._manager.save(
      run.last.epoch,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(saved)
      ),
      force=True,
    )

  def close(self) -> None:
    """Waits for what is being written."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None

  def __exit__(self, *error: object) -> None:
    self.close()

  def _load(self, item: str, args: Any) -> Any:
    try:
      restored = self._manager.restore(
        self._manager.latest_step(), args=ocp.args.Composite(**{item: args})
      )
    # Whatever is wrong with the files, in whichever layer it is noticed.
    except Exception as e:
      reason = str(e).strip().partition("\n")[0] or type(e).__name__
      raise self._error(f"cannot be restored: {reason}") from e
    return restored[item]

  def _error(self, reason: str) -> benchmarks.UserError:
    step = self._manager.latest_step()
    return benchmarks.UserError(f"{self._manager.directory}/{step}: {reason}")


def check_identity(path: Path, identity: Any, option: str, hint: str) -> None:
  """Raises unless a file is of this very training."""
  holds = f"{option} {path.parent}: holds"
  try:
    found = json.loads(path.read_text("utf-8"))["identity"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise benchmarks.UserError(
      f"{holds} no training: {path.name}: {benchmarks.one_line(e)}. {hint}"
    ) from e
  if found != identity:
    reason = difference(found, identity)
    raise benchmarks.UserError(f"{holds} another training: {reason}. {hint}")


def difference(found: Any, wanted: Any) -> str:
  """The first thing in which two records, as JSON, differ, in words."""
  if not isinstance(found, dict):
    return f"{found!r}"
  for key in {**wanted, **found}:
    if found.get(key) != wanted.get(key):
      return f"{key} is {found.get(key)!r} there and {wanted.get(key)!r} here"
  return "it has nothing"


def _sha256(state: Any) -> str:
  """Of all numbers, which every process has in full."""
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(state):
    digest.update(np.asarray(leaf.addressable_data(0)).tobytes())
  return digest.hexdigest()
