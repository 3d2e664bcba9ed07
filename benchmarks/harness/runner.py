# SPDX-License-Identifier: Apache-2.0
"""Trains what a store lacks."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.harness.experiment import Experiment, Run
from benchmarks.harness.store import Store
from benchmarks.harness.trainer import load, Observer, OnEpoch, shared, Trainer


def run_all(
  experiments: Iterable[Experiment],
  store: Store,
  *,
  data_dir: Path | None = None,
  progress: OnEpoch = lambda run, point: None,
  observers: Callable[[Experiment], Sequence[Observer]] = lambda _: (),
) -> list[Run]:
  """Trains each experiment that the store lacks, and stores it as it ends.

  Experiments on the same data and model share a trainer, and those that differ
  in learning rate and seed alone its compiled functions.

  Args:
    experiments: the experiments.
    store: where runs are looked up and stored.
    data_dir: folder of the data sets that need one.
    progress: called with each run and its state after each epoch.
    observers: makes the observers of an experiment, which must follow from it.

  Returns:
    The runs in the order of the experiments.

  Raises:
    benchmarks.UserError: if data or the store cannot be used.
  """
  experiments = list(experiments)
  found = {experiment: store.get(experiment) for experiment in experiments}
  groups: dict[Experiment, list[Experiment]] = {}
  for experiment, run in found.items():
    if run is None:
      groups.setdefault(shared(experiment), []).append(experiment)
  for common, group in groups.items():
    trainer = Trainer(common, load(common.dataset, common.feed, data_dir))
    for experiment in group:
      run = found[experiment] = Run(experiment)
      trainer.fit(run, observers=observers(experiment), on_epoch=progress)
      store.put(run)
  return [found[experiment] for experiment in experiments]
