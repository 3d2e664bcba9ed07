# SPDX-License-Identifier: Apache-2.0
"""Epochs with each method on made-up data, and how they are timed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
import optax_svrg

_NUM_CLASSES = 10
TRANSFORMS: dict[str, Any] = {
  "plain": optax.with_extra_args_support(optax.identity()),
  "alpha-svrg": optax_svrg.alpha_svrg(0.75),
  "adaptive": optax_svrg.adaptive_svrg(),
}
# Makes a model from ``rngs``, and the shape of an input.
Model = tuple[Callable[..., nnx.Module], tuple[int, ...]]


def mlp(*sizes: int, **settings: Any) -> Model:
  """A perceptron with some numbers of units, inputs and classes included."""
  return functools.partial(models.MLP, sizes, **settings), sizes[:1]


def image_model(name: str, size: int, *rest: int, **settings: Any) -> Model:
  """A model of :data:`benchmarks.models.MODELS`."""
  make = functools.partial(models.MODELS[name], size, *rest, **settings)
  return make, (size, size, rest[0])


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


def advance(
  tx: Any, params: Any, state: Any, grads: Any, **extra: Any
) -> tuple[Any, Any]:
  """Makes one step; returns the next parameters and state."""
  updates, state = tx.update(grads, state, params, **extra)
  return optax.apply_updates(params, updates), state


def seconds(
  programs: Mapping[str, Iterator[Any]], rounds: int
) -> dict[str, list[float]]:
  """Times programs in turn, so that a busy machine slows all of them."""
  times: dict[str, list[float]] = {name: [] for name in programs}
  for _ in range(1 + rounds):
    for name, program in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(next(program))
      times[name].append(time.perf_counter() - start)
  return times


def ratio(times: Mapping[str, Sequence[float]], name: str, to: str) -> float:
  """Median over the rounds of the ratio within a round."""
  return statistics.median(
    a / b for a, b in zip(times[name][1:], times[to][1:], strict=True)
  )


class Problem:
  """A model with made-up data, and its epochs with each method and AdamW.

  The data are the ``batches`` of an epoch, ``steps`` of them, with images and
  parameters of ``dtype``.
  """

  def __init__(self, model: Model, batch_size: int, steps: int, dtype: Any):
    make, shape = model
    rng = np.random.default_rng(0)
    self.batches = [
      (
        jnp.asarray(rng.normal(size=(batch_size, *shape)), dtype),
        jnp.asarray(rng.integers(_NUM_CLASSES, size=batch_size), jnp.int32),
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
    step, params, state = self._compile(transform)
    return step.lower(params, state, self.batches[0], 0)

  def programs(self) -> dict[str, Iterator[Any]]:
    """Methods' parameters and states, computed epoch by epoch when iterated."""
    plain, svrg, adaptive = TRANSFORMS.values()
    off = optax_svrg.alpha_svrg(optax.constant_schedule(0.0))
    mean = lambda *args: (optax_svrg.mean_gradient(*args), None)
    methods: dict[str, tuple[Any, Callable | None]] = {
      "plain": (plain, None),
      "alpha-svrg": (svrg, mean),
      "adaptive": (adaptive, mean),
      "alpha-svrg, table": (svrg, optax_svrg.gradient_table),
      "alpha-svrg, alpha = 0": (off, None),
      "adaptive-saga": (optax_svrg.adaptive_saga(len(self.batches)), None),
    }
    return {
      name: self._epochs(mean_and_table, *self._compile(transform))
      for name, (transform, mean_and_table) in methods.items()
    }

  def _compile(self, transform: Any) -> tuple[Any, Any, Any]:
    """A step, and the first parameters and state."""
    tx = optax.chain(transform, optax.adamw(1e-3))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any, i: Any, table: Any = None):
      grad_fn = lambda p: self.grad(p, batch)
      extra: dict[str, Any] = {"grad_fn": grad_fn}
      if table is not None:
        extra = {"snapshot_grads": table[i]}
      return advance(tx, params, state, grad_fn(params), batch_index=i, **extra)

    params = jax.tree.map(jnp.array, self.params)
    return step, params, tx.init(params)

  def _epochs(
    self, mean_and_table: Callable | None, step: Any, params: Any, state: Any
  ) -> Iterator[Any]:
    """Epochs: a snapshot with its pass, if any, and the steps one by one.

    A scan over them would be one program, but XLA for CPU is many times slower
    at convolutions in a loop.
    """
    table = None
    while True:
      if mean_and_table is not None:
        mean, table = mean_and_table(self.grad, params, self.batches)
        state = optax_svrg.take_snapshot(state, params, lambda _: mean)  # noqa: B023
      for i, batch in enumerate(self.batches):
        params, state = step(params, state, batch, i, table)
      yield params, state
