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
TRANSFORMS: dict[str, Any] = {
  "plain": optax.with_extra_args_support(optax.identity()),
  "alpha-svrg": optax_svrg.alpha_svrg(0.75),
  "adaptive": optax_svrg.adaptive_svrg(),
}
METHODS = (
  *(*TRANSFORMS, "alpha-svrg, table"),
  *("alpha-svrg, alpha = 0", "adaptive-saga"),
)
# Makes a model from ``rngs``, and the shape of an input.
Model = tuple[Callable[..., nnx.Module], tuple[int, ...]]


def mlp(*hidden: int) -> Model:
  """A perceptron with some numbers of hidden units."""
  size = math.prod(IMAGE_SHAPE)
  sizes = (size, *hidden, NUM_CLASSES)
  return functools.partial(models.MLP, sizes), (size,)


def image_model(name: str, **settings: Any) -> Model:
  """A model of :data:`benchmarks.models.MODELS`."""
  args = (IMAGE_SHAPE[0], 1, NUM_CLASSES)
  return functools.partial(models.MODELS[name], *args, **settings), IMAGE_SHAPE


def split(model: nnx.Module) -> tuple[optax.Params, Callable[..., jax.Array]]:
  """The parameters of a model, and its loss of parameters and a batch."""
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)

  def loss(params: optax.Params, batch: Any) -> jax.Array:
    images, labels = batch
    logits = nnx.merge(graphdef, params, rest)(images).astype(jnp.float32)
    return optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, labels
    ).mean()

  return nnx.as_pure(params), loss


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


class Problem:
  """A model with made-up data, and its epochs with each method and AdamW.

  Args:
    model: the model.
    batch_size: number of examples in a batch.
    steps: number of batches of an epoch.
    dtype: of the parameters and the images.

  Attributes:
    params: the initial parameters.
    batches: images and labels, batch by batch.
  """

  def __init__(self, model: Model, batch_size: int, steps: int, dtype: Any):
    make, shape = model
    rng = np.random.default_rng(0)
    self.batches = [
      (
        jnp.asarray(rng.normal(size=(batch_size, *shape)), dtype),
        jnp.asarray(rng.integers(NUM_CLASSES, size=batch_size), jnp.int32),
      )
      for _ in range(steps)
    ]
    params, loss = split(make(rngs=nnx.Rngs(0)))
    self.params = optax.tree.cast(params, dtype)
    self.grad = jax.grad(loss)

  def lower_gradient(self) -> jax.stages.Lowered:
    """The gradient of one batch."""
    return jax.jit(self.grad).lower(self.params, self.batches[0])

  def lower_step(self, transform: Any) -> jax.stages.Lowered:
    """One step."""
    step, start = self._compile(transform)
    return step.lower(*start, self.batches[0], 0)

  def programs(self) -> dict[str, Program]:
    """The epochs with :data:`METHODS`."""
    plain, svrg, adaptive = TRANSFORMS.values()
    off = optax_svrg.alpha_svrg(optax.constant_schedule(0.0))
    programs = (
      self._program(plain),
      self._program(svrg, self._take_snapshot),
      self._program(adaptive, self._take_snapshot),
      self._program(svrg, self._make_table),
      self._program(off),
      self._program(optax_svrg.adaptive_saga(len(self.batches))),
    )
    return dict(zip(METHODS, programs, strict=True))

  def _compile(self, transform: Any) -> tuple[Any, tuple[Any, Any]]:
    """A step, and the first parameters and state."""
    tx = optax.chain(transform, optax.adamw(1e-3))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, i: Any, table: Any = None):
      grad_fn = lambda p: self.grad(p, batch)
      extra: dict[str, Any] = {"grad_fn": grad_fn}
      if table is not None:
        extra = {"snapshot_grads": table[i]}
      grads = grad_fn(params)
      updates, state = tx.update(grads, state, params, batch_index=i, **extra)
      return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.array, self.params)
    return step, (params, tx.init(params))

  def _program(
    self,
    transform: Any,
    prepare: Callable = lambda params, state: (state, None),
  ) -> Program:
    """An epoch: what comes before the steps, and the steps one by one.

    A scan over them would be one program, but XLA for CPU is many times slower
    at convolutions in a loop.
    """
    step, start = self._compile(transform)

    def run(carry: Any) -> Any:
      params, state = carry
      state, table = prepare(params, state)
      for i, batch in enumerate(self.batches):
        params, state = step(params, state, batch, i, table)
      return params, state

    return Program(run, start)

  def _take_snapshot(self, params: Any, state: Any) -> tuple[Any, None]:
    """Takes the snapshot, with a pass over the batches."""
    mean = optax_svrg.mean_gradient(self.grad, params, self.batches)
    return optax_svrg.take_snapshot(state, params, lambda _: mean), None

  def _make_table(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Takes the snapshot with a table of the gradients of the batches."""
    mean, table = optax_svrg.gradient_table(self.grad, params, self.batches)
    return optax_svrg.take_snapshot(state, params, lambda _: mean), table
