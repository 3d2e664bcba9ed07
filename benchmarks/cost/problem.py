# SPDX-License-Identifier: Apache-2.0
"""Epochs with each method on made-up data, and how they are timed."""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import statistics
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
import optax_svrg

IMAGE_SHAPE, NUM_CLASSES = (28, 28, 1), 10
METHODS = (
  *("plain", "alpha-svrg", "adaptive", "alpha-svrg, table"),
  *("alpha-svrg, alpha = 0", "adaptive-saga"),
)


class Model(NamedTuple):
  """A model for images of 28 pixels in ten classes.

  Attributes:
    make: a function of ``rngs``.
    shape: of an input.
  """

  make: Callable[..., nnx.Module]
  shape: tuple[int, ...] = IMAGE_SHAPE


def mlp(*hidden: int) -> Model:
  """A perceptron with some numbers of hidden units."""
  size = math.prod(IMAGE_SHAPE)
  make = functools.partial(models.MLP, (size, *hidden, NUM_CLASSES))
  return Model(make, (size,))


def image_model(name: str, **settings: Any) -> Model:
  """A model of :data:`benchmarks.models.MODELS`."""
  return Model(
    functools.partial(
      models.MODELS[name], IMAGE_SHAPE[0], 1, NUM_CLASSES, **settings
    )
  )


class Program(NamedTuple):
  """Something to be timed.

  Attributes:
    run: takes a state and returns the next one.
    state: the first one.
  """

  run: Callable[[Any], Any]
  state: Any


def seconds(
  programs: Mapping[str, Program], rounds: int
) -> dict[str, list[float]]:
  """Times programs in turn, so that a busy machine slows all of them."""
  states = {name: program.state for name, program in programs.items()}
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(1 + rounds):
    for name, program in programs.items():
      start = time.perf_counter()
      states[name] = jax.block_until_ready(program.run(states[name]))
      times[name].append(time.perf_counter() - start)
  return times


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
  """Median over the rounds of the ratio within a round."""
  return statistics.median(
    a / b for a, b in zip(times[name][1:], times[to][1:], strict=True)
  )


def no_transform() -> optax.GradientTransformationExtraArgs:
  """The transformation of plain training."""
  return optax.with_extra_args_support(optax.identity())


class Problem:
  """A model with made-up data, and its epochs with each method.

  Args:
    model: the model.
    batch_size: number of examples in a batch.
    steps: number of batches of an epoch.
    dtype: of the parameters and the images.
    optimizer: what the methods are chained before.

  Attributes:
    params: the initial parameters.
    batches: images and labels, batch by batch.
  """

  def __init__(
    self,
    model: Model,
    batch_size: int,
    steps: int,
    dtype: Any,
    optimizer: optax.GradientTransformation,
  ):
    rng = np.random.default_rng(0)
    self.batches = [
      (
        jnp.asarray(rng.normal(size=(batch_size, *model.shape)), dtype),
        jnp.asarray(rng.integers(NUM_CLASSES, size=batch_size), jnp.int32),
      )
      for _ in range(steps)
    ]
    made = model.make(rngs=nnx.Rngs(0))
    self._graphdef, params = nnx.split(made, nnx.Param)
    self.params = optax.tree.cast(nnx.as_pure(params), dtype)
    self._optimizer = optimizer

  def grad(self, params: optax.Params, batch: Any) -> optax.Updates:
    """The gradient of a batch."""
    return jax.grad(self.loss)(params, batch)

  def loss(self, params: optax.Params, batch: Any) -> jax.Array:
    """The loss of a batch."""
    images, labels = batch
    logits = nnx.merge(self._graphdef, params)(images).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  def lower_gradient(self) -> jax.stages.Lowered:
    """The gradient of one batch."""
    return jax.jit(self.grad).lower(self.params, self.batches[0])

  def lower_step(
    self, transform: optax.GradientTransformationExtraArgs
  ) -> jax.stages.Lowered:
    """One step."""

    def step(params: Any, state: Any, batch: Any, i: Any) -> Any:
      return self._step(transform, params, state, batch, {"batch_index": i})

    return jax.jit(step, donate_argnums=(0, 1)).lower(
      *self._start(transform), self.batches[0], 0
    )

  def programs(self) -> dict[str, Program]:
    """The epochs with :data:`METHODS`."""
    svrg = optax_svrg.alpha_svrg(0.75)
    off = optax_svrg.alpha_svrg(optax.constant_schedule(0.0))
    programs = (
      self._program(no_transform()),
      self._program(svrg, self._take_snapshot),
      self._program(optax_svrg.adaptive_svrg(), self._take_snapshot),
      self._program(svrg, self._make_table),
      self._program(off),
      self._program(optax_svrg.adaptive_saga(len(self.batches))),
    )
    return dict(zip(METHODS, programs, strict=True))

  def _start(self, transform: Any) -> tuple[optax.Params, Any]:
    params = jax.tree.map(jnp.array, self.params)
    return params, optax.chain(transform, self._optimizer).init(params)

  def _step(
    self, transform: Any, params: Any, state: Any, batch: Any, extra: dict
  ) -> tuple[optax.Params, Any]:
    grad_fn = lambda p: self.grad(p, batch)
    if "snapshot_grads" not in extra:
      extra = {"grad_fn": grad_fn, **extra}
    updates, state = optax.chain(transform, self._optimizer).update(
      grad_fn(params), state, params, **extra
    )
    return optax.apply_updates(params, updates), state

  def _program(
    self,
    transform: optax.GradientTransformationExtraArgs,
    prepare: Callable = lambda params, state: (state, None),
  ) -> Program:
    """An epoch: what comes before the steps, and the steps one by one.

    A scan over them would be one program, but XLA for CPU is many times slower
    at convolutions in a loop.
    """

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, i: Any, table: Any) -> Any:
      extra = {"batch_index": i}
      if table is not None:
        extra["snapshot_grads"] = table[i]
      return self._step(transform, params, state, batch, extra)

    def run(carry: Any) -> Any:
      params, state = carry
      state, table = prepare(params, state)
      for i, batch in enumerate(self.batches):
        params, state = step(params, state, batch, i, table)
      return params, state

    return Program(run, self._start(transform))

  def _take_snapshot(self, params: Any, state: Any) -> tuple[Any, None]:
    """Takes the snapshot, with a pass over the batches."""
    return optax_svrg.take_snapshot(
      state,
      params,
      lambda p: optax_svrg.mean_gradient(self.grad, p, self.batches),
    ), None

  def _make_table(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Takes the snapshot with a table of the gradients of the batches."""
    mean, table = optax_svrg.gradient_table(self.grad, params, self.batches)
    return optax_svrg.take_snapshot(state, params, lambda _: mean), table
