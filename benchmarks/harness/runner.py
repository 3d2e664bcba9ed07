# SPDX-License-Identifier: Apache-2.0
"""Trains what a store lacks."""

from collections.abc import Iterable
import contextlib
from pathlib import Path
from typing import Any

from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.store import Store
from benchmarks.harness.trainer import load, OnEpoch, shared, Trainer


def run_all(
  experiments: Iterable[Experiment],
  store: Store,
  *,
  data_dir: Path | None = None,
  progress: OnEpoch = lambda run, point: None,
  checkpoint_dir: Path | None = None,
  **options: Any,
) -> list[Run]:
  """Trains each experiment that the store lacks, and stores it as it ends.

  Experiments on the same data and model share a trainer, and those that differ
  in learning rate and seed alone its compiled functions.
  """
  experiments = list(experiments)
  found = {experiment: store.get(experiment) for experiment in experiments}
  groups: dict[Experiment, list[Experiment]] = {}
  for experiment, run in found.items():
    if run is None:
      groups.setdefault(shared(experiment), []).append(experiment)
  for common, group in groups.items():
    data = load(common.dataset, common.feed, data_dir)
    trainer = Trainer(common, data, **options)
    for experiment in group:
      run = found[experiment] = Run(experiment)
      saved: Checkpoints | None = None
      if checkpoint_dir is not None:
        folder = checkpoint_dir / experiment.name
        saved = Checkpoints(folder, experiment.identity(), folder.exists())
      with saved or contextlib.nullcontext():
        trainer.fit(run, on_epoch=progress, checkpoints=saved)
      store.put(run)
  return [found[experiment] for experiment in experiments]
