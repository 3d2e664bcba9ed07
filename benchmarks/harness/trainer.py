# SPDX-License-Identifier: Apache-2.0
"""The trainer: one loop for both feeds."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
from pathlib import Path
import time
from typing import Any

import jax
import optax

from benchmarks import methods
from benchmarks.data import arrays, sources
from benchmarks.harness import checkpoints as checkpointing
from benchmarks.harness.array_feed import ArrayFeed
from benchmarks.harness.experiment import Experiment, Point, Run
from benchmarks.harness.observers import OBSERVERS, Variance
from benchmarks.harness.program import Observed, OPTIMIZERS, Program, TrainState
from benchmarks.harness.stream_feed import StreamFeed
import optax_svrg

# Called with a run and its state after an epoch.
OnEpoch = Callable[[Run, Point], None]
Feed = ArrayFeed | StreamFeed


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
    self.feed: Feed = make(shared(experiment), data, **options)
    # Seeds and learning rates have a program in common.
    self._compiled = functools.cache(self._compile)

  def fit(
    self,
    run: Run,
    *,
    on_epoch: OnEpoch = lambda run, point: None,
    checkpoints: checkpointing.Checkpoints | None = None,
  ) -> None:
    """Trains once."""
    experiment = run.experiment
    at = checkpointing.START
    if checkpoints is not None:
      at = checkpoints.position(run)
    for point in run.history:
      if point.epoch:
        on_epoch(run, point)
    if run.finished:
      return
    # All is compiled before the clock starts.
    method, program = self._compiled(experiment.replace(seed=0, lr=0.0))
    init_key, _ = jax.random.split(jax.random.key(experiment.seed))
    state = program.init(self.feed.init(init_key))
    if at != checkpointing.START:
      state = checkpoints.restore(state)
    watching = [
      OBSERVERS[name](self.feed.loss, method, program.num_steps, **settings)
      for name, settings in experiment.measure.items()
    ]
    training = _Training(
      self.feed, run, method, program, watching, checkpoints, state, at
    )
    if at == checkpointing.START:
      training.record(None)
    # So that no process waits for another one for ever.
    for epoch in optax_svrg.lockstep(range(at.epoch, experiment.epochs)):
      training.epoch(epoch)
      on_epoch(run, run.last)

  def _compile(self, experiment: Experiment) -> tuple[methods.Method, Program]:
    context = self.feed.context(experiment)
    settings = experiment.method_settings
    method = methods.make(experiment.method, context, **settings)
    return method, self.feed.program(experiment, method)


@dataclasses.dataclass
class _Training:
  """A run under way; the fields are what :meth:`Trainer.fit` has."""

  feed: Feed
  run: Run
  method: methods.Method
  program: Program
  observers: Sequence[Variance]
  checkpoints: checkpointing.Checkpoints | None
  state: TrainState
  at: checkpointing.Position

  def epoch(self, epoch: int) -> None:
    """Trains the rest of an epoch, records and saves it."""
    experiment, program = self.run.experiment, self.program
    takes_snapshot = self._takes_snapshot(epoch)
    is_new = not self.at.step
    if is_new:
      self.state = self.state._replace(observed=self.feed.nothing_observed())
    with self._clock():
      self.state, batches = program.begin(
        self.state, experiment.seed, epoch, takes_snapshot and is_new
      )
    seen = program.batches(batches) if self.observers else None
    while self.at.step < program.num_steps:
      step = self.at.step
      for observer in self.observers:
        if step in observer.stops:
          self.state = observer.look(epoch, step, seen, self.state)
      stop = self._next_stop()
      with self._clock():
        self.state = program.advance(
          self.state, batches, experiment.lr, step, stop
        )
        jax.block_until_ready(self.state)
      self.at = self.at._replace(step=stop)
      if stop < program.num_steps:
        self._save()
    count = program.num_examples + takes_snapshot * program.pass_examples
    observed = self.state.observed
    count += int(observed.extra_gradients) * experiment.batch_size
    self.at = checkpointing.Position(
      epoch + 1, 0, self.at.evaluations + count, self.at.seconds
    )
    self.record(observed)
    if self.at.epoch == experiment.epochs:
      self.run.finished = True
      self.run.measured |= self.feed.finish(self._evaluated)
      for observer in self.observers:
        self.run.measured |= observer.result
    self._save()

  def record(self, observed: Observed | None) -> None:
    """Adds the present state to the history; ``None`` before the first step."""
    steps = self.program.num_steps
    measured = self.feed.measure(self._evaluated, observed, steps)
    if measured is None:
      return
    alpha = ratio = None
    if observed is not None:
      alpha = float(observed.alpha / steps)
      if observed.plain_moment > 0:
        ratio = float(observed.corrected_moment / observed.plain_moment)
    self.run.history.append(
      Point(
        self.at.epoch,
        **measured,
        gradients_per_example=self.at.evaluations / self.feed.num_examples,
        seconds=self.at.seconds,
        alpha=alpha,
        variance_ratio=ratio,
      )
    )

  @property
  def _evaluated(self) -> optax.Params:
    optimizer = OPTIMIZERS[self.run.experiment.optimizer]
    return optimizer.evaluated(self.state.opt_state[1], self.state.params)

  def _takes_snapshot(self, epoch: int) -> bool:
    """True if a step uses the snapshot that an epoch may begin with."""
    experiment, steps = self.run.experiment, self.program.num_steps
    if epoch % experiment.snapshot_every:
      return False
    stop = min(epoch + experiment.snapshot_every, experiment.epochs)
    return self.method.uses_snapshot(epoch * steps, stop * steps)

  def _next_stop(self) -> int:
    """The next step of the epoch at which something else is to be done."""
    end = self.program.num_steps
    stops = {end}.union(*(observer.stops for observer in self.observers))
    later = range(self.at.step + 1, end + 1)
    return next(step for step in later if step in stops or self._is_due(step))

  def _is_due(self, step: int) -> bool:
    """True if a checkpoint is to be saved at a step of the epoch."""
    at, steps = self.at._replace(step=step), self.program.num_steps
    return self.checkpoints is not None and self.checkpoints.is_due(at, steps)

  def _save(self) -> None:
    """Saves the run if it is due, and at its end."""
    if self._is_due(self.at.step) or (self.checkpoints and self.run.finished):
      steps = self.program.num_steps
      self.checkpoints.save(self.run, self.state, self.at, steps)

  @contextlib.contextmanager
  def _clock(self) -> Iterator[None]:
    """Adds the time spent to that of the run."""
    start = time.perf_counter()
    yield
    seconds = self.at.seconds + time.perf_counter() - start
    self.at = self.at._replace(seconds=seconds)
