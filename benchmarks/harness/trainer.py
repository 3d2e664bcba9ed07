# SPDX-License-Identifier: Apache-2.0
"""The trainer: one loop for both feeds."""

from collections.abc import Callable, Iterator
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
from benchmarks.harness.observers import OBSERVERS
from benchmarks.harness.program import OPTIMIZERS, Program, TrainState
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
    method, program = self._compiled(experiment.replace(seed=0, lr=0.0))
    init_key, _ = jax.random.split(jax.random.key(experiment.seed))
    state = program.init(self.feed.init(init_key))
    training = _Training(self.feed, run, method, program, state)
    if run.history:
      training.state = checkpoints.restore(state)
    elif experiment.feed == "arrays":
      training.record(0)
    # So that no process waits for another one for ever.
    epochs = range(run.last.epoch if run.history else 0, experiment.epochs)
    for epoch in optax_svrg.lockstep(epochs):
      training.epoch(epoch)
      if checkpoints is not None:
        checkpoints.save(run, training.state)
      on_epoch(run, run.last)

  def _compile(self, experiment: Experiment) -> tuple[methods.Method, Program]:
    context = self.feed.context(experiment)
    settings = experiment.method_settings
    method = methods.make(experiment.method, context, **settings)
    return method, self.feed.program(experiment, method)


class _Training:
  """A run under way."""

  def __init__(
    self,
    feed: ArrayFeed | StreamFeed,
    run: Run,
    method: methods.Method,
    program: Program,
    state: TrainState,
  ):
    self._feed, self._run, self._method = feed, run, method
    self._program, self.state = program, state
    self._num_steps = method.num_steps(feed.context(run.experiment))
    self._observers = [
      OBSERVERS[name](feed.loss, method, self._num_steps, **settings)
      for name, settings in run.experiment.measure.items()
    ]
    self._seconds, self._evaluations = 0.0, 0
    if run.history:
      self._seconds = run.last.seconds
      self._evaluations = round(
        run.last.gradients_per_example * feed.num_examples
      )

  def epoch(self, epoch: int) -> None:
    """Trains an epoch, and records it."""
    experiment, program = self._run.experiment, self._program
    takes_snapshot = self._takes_snapshot(epoch)
    self.state = self.state._replace(
      observed=optax.tree.zeros_like(self.state.observed)
    )
    with self._clock():
      self.state, batches = program.begin(
        self.state, experiment.seed, epoch, takes_snapshot
      )
    seen = program.batches(batches) if self._observers else None
    stops = {0, self._num_steps}.union(*(o.stops for o in self._observers))
    for start, stop in itertools.pairwise(sorted(stops)):
      for observer in self._observers:
        if start in observer.stops:
          self.state = observer.look(epoch, start, seen, self.state)
      with self._clock():
        self.state = program.advance(
          self.state, batches, experiment.lr, start, stop
        )
        jax.block_until_ready(self.state)
    num_examples = self._feed.num_examples
    count = num_examples
    if not self._method.has_fixed_batches:
      count = self._num_steps * experiment.batch_size
    extra = int(self.state.observed.extra_gradients) * experiment.batch_size
    self._evaluations += count + extra + takes_snapshot * num_examples
    self.record(epoch + 1)
    if epoch + 1 == experiment.epochs:
      self._run.finished = True
      self._run.measured |= self._feed.finish(self._evaluated)
      for observer in self._observers:
        self._run.measured |= observer.result

  def record(self, epoch: int) -> None:
    """Adds the state after this number of epochs to the history."""
    observed, steps = self.state.observed, self._num_steps
    ratio = None
    if observed.plain_moment > 0:
      ratio = float(observed.corrected_moment / observed.plain_moment)
    measured = {
      "train_loss": float(observed.loss) / steps,
      **self._feed.measure(self._evaluated),
    }
    self._run.history.append(
      Point(
        epoch,
        **measured,
        gradients_per_example=self._evaluations / self._feed.num_examples,
        seconds=self._seconds,
        alpha=float(observed.alpha / steps) if epoch else None,
        variance_ratio=ratio,
      )
    )

  @property
  def _evaluated(self) -> optax.Params:
    optimizer = OPTIMIZERS[self._run.experiment.optimizer]
    return optimizer.evaluated(self.state.opt_state[1], self.state.params)

  def _takes_snapshot(self, epoch: int) -> bool:
    """True if a step uses the snapshot that an epoch may begin with."""
    experiment, steps = self._run.experiment, self._num_steps
    if epoch % experiment.snapshot_every:
      return False
    stop = min(epoch + experiment.snapshot_every, experiment.epochs)
    return self._method.uses_snapshot(epoch * steps, stop * steps)

  @contextlib.contextmanager
  def _clock(self) -> Iterator[None]:
    """Adds the time spent to that of the run."""
    start = time.perf_counter()
    yield
    self._seconds += time.perf_counter() - start
