# SPDX-License-Identifier: Apache-2.0
"""The trainer: one loop for both feeds."""

from collections.abc import Callable, Iterable
import contextlib
import functools
import itertools
from pathlib import Path
import time
from typing import Any

import jax
import optax

from benchmarks import methods
from benchmarks.data import arrays, sources
from benchmarks.harness.array_feed import ArrayFeed
from benchmarks.harness.checkpoints import Checkpoints
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.observers import Variance
from benchmarks.harness.program import OPTIMIZERS, Program, TrainState
from benchmarks.harness.progress import Progress
from benchmarks.harness.store import Store
from benchmarks.harness.stream_feed import StreamFeed
import optax_svrg

# Called with a run and its state after an epoch.
OnEpoch = Callable[[Run, Point], None]


def shared(experiment: Experiment) -> Experiment:
  """Returns the experiment of a trainer: without what differs between runs."""
  method = {"method": "", "method_settings": {}, "snapshot_every": 1}
  rates = {"schedule": "", "warmup_epochs": None, "final_lr_share": 0.0}
  return experiment.replace(
    **method, **rates, optimizer="", lr=0.0, seed=0, measure={}
  )


@functools.lru_cache(maxsize=1)
def load(
  dataset: str, feed: str, data_dir: Path | None
) -> arrays.Dataset | sources.ImageData:
  """Loads the data of an experiment."""
  data_dir = None if dataset == "mnist-5k" else data_dir
  return (arrays if feed == "arrays" else sources).load(dataset, data_dir)


class Trainer:
  """Trains experiments that share their data, of :func:`load`, and model."""

  def __init__(
    self,
    experiment: Experiment,
    data: arrays.Dataset | sources.ImageData,
    **options: Any,
  ):
    make = {"arrays": ArrayFeed, "streams": StreamFeed}[experiment.feed]
    self.feed: ArrayFeed | StreamFeed = make(
      shared(experiment), data, **options
    )
    # Seeds and learning rates have a program in common.
    self._compiled = functools.cache(self._compile)

  def fit(
    self,
    run: Run,
    *,
    on_epoch: OnEpoch = lambda run, point: None,
    checkpoints: Checkpoints | None = None,
  ) -> None:
    """Trains once."""
    experiment = run.experiment
    if checkpoints is not None:
      checkpoints.load(run)
    for point in run.history:
      if point.epoch:
        on_epoch(run, point)
    if run.finished:
      return
    # All is compiled before the clock starts.
    program = self._compiled(experiment.replace(seed=0, lr=0.0))
    init_key, _ = jax.random.split(jax.random.key(experiment.seed))
    state = program.init(self.feed.init(init_key))
    if run.history:
      state = checkpoints.restore(state)
    elif experiment.feed == "arrays":
      measured = self.feed.measure(_evaluated(experiment, state))
      run.history.append(run.last._replace(**measured))
    observer = None
    if experiment.measure:
      settings = experiment.measure["variance"]
      observer = Variance(self.feed.loss, program, **settings)
    epochs = range(run.last.epoch, experiment.epochs)
    # So that no process waits for another one for ever.
    for epoch in optax_svrg.lockstep(epochs):
      state = self._train(run, program, observer, state, epoch)
      if epoch + 1 == experiment.epochs:
        run.finished = True
        run.measured |= self.feed.finish(_evaluated(experiment, state))
        if observer:
          run.measured["variance"] = observer.result
      if checkpoints is not None:
        checkpoints.save(run, state)
      on_epoch(run, run.last)

  def _compile(self, experiment: Experiment) -> Program:
    context = self.feed.context(experiment)
    settings = experiment.method_settings
    method = methods.make(experiment.method, context, **settings)
    return self.feed.program(experiment, method)

  def _train(
    self,
    run: Run,
    program: Program,
    observer: Variance | None,
    state: TrainState,
    epoch: int,
  ) -> TrainState:
    """Trains an epoch, and adds it to the history."""
    experiment, num_examples = run.experiment, self.feed.num_examples
    method, num_steps = program.method, program.num_steps
    takes_snapshot = False
    if epoch % experiment.snapshot_every == 0:
      # If a step uses it until the next one.
      end = min(epoch + experiment.snapshot_every, experiment.epochs)
      takes_snapshot = method.uses_snapshot(epoch * num_steps, end * num_steps)
    state = state._replace(observed=optax.tree.zeros_like(state.observed))
    begun = time.perf_counter()
    state, batches = program.begin(
      state, experiment.seed, epoch, takes_snapshot
    )
    seconds = time.perf_counter() - begun
    seen = program.batches(batches) if observer else None
    looks = observer.stops if observer else set()
    for start, stop in itertools.pairwise(sorted({0, num_steps} | looks)):
      if start in looks:
        state = observer.look(epoch, start, seen, state)
      begun = time.perf_counter()
      state = program.advance(state, batches, experiment.lr, start, stop)
      jax.block_until_ready(state)
      seconds += time.perf_counter() - begun
    count = num_examples
    if not method.has_fixed_batches:
      count = num_steps * experiment.batch_size
    # With "streams", a pass is over the batches of the epoch.
    passed = num_examples if experiment.feed == "arrays" else count
    count += takes_snapshot * passed
    observed, last = state.observed, run.last
    count += int(observed.extra_gradients) * experiment.batch_size
    count += round(last.gradients_per_example * num_examples)
    ratio = None
    if observed.plain_moment > 0:
      ratio = float(observed.corrected_moment / observed.plain_moment)
    measured = {
      "train_loss": float(observed.loss) / num_steps,
      **self.feed.measure(_evaluated(experiment, state)),
    }
    point = Point(
      epoch + 1,
      **measured,
      gradients_per_example=count / num_examples,
      seconds=seconds + last.seconds,
      alpha=float(observed.alpha / num_steps),
      variance_ratio=ratio,
    )
    run.history.append(point)
    return state


def _evaluated(experiment: Experiment, state: TrainState) -> optax.Params:
  optimizer = OPTIMIZERS[experiment.optimizer]
  return optimizer.evaluated(state.opt_state[1], state.params)


def run_all(
  experiments: Iterable[Experiment],
  store: Store,
  *,
  data_dir: Path | None = None,
  checkpoint_dir: Path | None = None,
  **options: Any,
) -> list[Run]:
  """Trains each experiment that the store lacks, and stores it as it ends.

  Experiments on the same data and model share a trainer, and those that differ
  in learning rate and seed alone its compiled functions.
  """
  found = {experiment: store.get(experiment) for experiment in experiments}
  missing = [experiment for experiment, run in found.items() if run is None]
  groups: dict[Experiment, list[Experiment]] = {}
  for experiment in missing:
    groups.setdefault(shared(experiment), []).append(experiment)
  with Progress(sum(experiment.epochs for experiment in missing)) as progress:
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
  return list(found.values())
