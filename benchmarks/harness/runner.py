# SPDX-License-Identifier: Apache-2.0
"""Trains what a store lacks."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.store import Store
from benchmarks.harness.trainer import Observer, shared, Trainer

# Called with a run and its latest state.
OnEpoch = Callable[[Run, Point], None]


def run_all(
  experiments: Iterable[Experiment],
  store: Store,
  *,
  data_dir: Path | None = None,
  progress: OnEpoch | None = None,
  observers: Callable[[Experiment], Sequence[Observer]] = lambda _: (),
) -> list[Run]:
  """Trains each experiment that the store lacks, and stores it as it ends.

  Experiments that differ in method, learning rate and seed alone share a
  trainer: its data and compiled functions.

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
  missing = [e for e in dict.fromkeys(experiments) if store.get(e) is None]
  groups: dict[Experiment, list[Experiment]] = {}
  for experiment in missing:
    groups.setdefault(shared(experiment), []).append(experiment)
  for common, group in groups.items():
    trainer = Trainer(common, data_dir)
    for experiment in group:
      run = Run(experiment)
      on_epoch = (
        (lambda point, run=run: progress(run, point)) if progress else None
      )
      trainer.fit(run, observers=observers(experiment), on_epoch=on_epoch)
      store.put(run)
  return [_stored(store, experiment) for experiment in experiments]
