# SPDX-License-Identifier: Apache-2.0
"""Training on arrays: all examples in memory, batches gathered by index."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.data import arrays
from benchmarks.harness import program
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.program import Program, TrainState
from benchmarks.methods import balanced, Method
import optax_svrg

_PIECE_SIZE = 128  # Examples evaluated at once, which fit into a cache.
_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Epoch(NamedTuple):
  """The examples of each step of an epoch."""

  examples: jax.Array  # Their indices, step by step.
  is_real: Any  # Which of them count, ``None`` for all.
  batch_index: jax.Array  # The number of each batch.
  key: jax.Array  # For augmentation.


class Batch(NamedTuple):
  """Flattened images and their classes."""

  images: jax.Array
  labels: jax.Array
  is_real: Any = None  # Which of them count, ``None`` for all.


class ArrayFeed(program.Feed):
  """Makes the programs of an experiment on arrays."""

  def __init__(self, experiment: Experiment, dataset: arrays.Dataset):
    dataset = arrays.first(
      dataset, experiment.train_examples, experiment.validation_examples
    )
    if experiment.label_noise:
      dataset = arrays.with_wrong_labels(dataset, experiment.label_noise)
    self._image_shape = dataset.image_shape
    super().__init__(
      experiment,
      len(dataset.train_labels),
      dataset.image_shape,
      dataset.num_classes,
    )
    parts = jax.device_put(dataset[:4])
    self._train, self._validation = parts[:2], parts[2:]
    args = self.init(jax.random.key(0)), self._train, self._validation
    self._evaluate = _compile(self._evaluate_fn, args)
    self._grad = jax.grad(self.loss)

  def measure(self, params: optax.Params) -> Mapping[str, float]:
    """Returns fields of :class:`Point`, over all examples."""
    found = self._evaluate(params, self._train, self._validation)
    return {name: float(value) for name, value in found.items()}

  def program(self, experiment: Experiment, method: Method) -> Program:
    """Compiles the functions of a method."""
    num_steps = method.num_steps(self.context(experiment))

    @jax.jit
    def init(params):
      tx = program.optimizer(experiment, num_steps, experiment.lr)
      states = method.transform.init(params), tx.init(params)
      return TrainState(params, states, program.nothing_observed())

    draw = jax.jit(
      functools.partial(self._draw, method, num_steps), donate_argnums=0
    )
    state = init(self.init(jax.random.key(0)))
    keys = self._keys(experiment, 0, 0)
    _, epoch = jax.eval_shape(draw, state.opt_state[0], *keys)
    steps = self._steps(experiment, method, num_steps)
    args = state, self._train, epoch, np.float32(0), np.zeros(2, np.int32)
    steps = _compile(steps, args, (0,))
    take = None
    if method.coefficient is not None:
      args = state.opt_state, state.params, self._train, epoch.key
      take = _compile(self._snapshot, args, (0,))

    def begin(state, seed, epoch, with_snapshot):
      own, opt_state = state.opt_state
      own, epoch = draw(own, *self._keys(experiment, seed, epoch))
      opt_state = own, opt_state
      if with_snapshot:
        opt_state = take(opt_state, state.params, self._train, epoch.key)
      return state._replace(opt_state=opt_state), epoch

    def advance(state, epoch, lr, start, stop):
      bounds = np.array([start, stop], np.int32)
      return steps(state, self._train, epoch, np.float32(lr), bounds)

    @jax.jit
    def batches(train, epoch):
      batch = lambda members: self._batch(train, *members, epoch.key)
      return jax.lax.map(batch, epoch[:2])

    all_batches = functools.partial(batches, self._train)
    return Program(method, num_steps, init, begin, advance, all_batches)

  def loss(self, params: optax.Params, batch: Batch) -> jax.Array:
    """Returns the mean cross-entropy of the examples that count."""
    images = arrays.unflatten(batch.images, self._image_shape)
    logits = self._model(params)(images)
    return _cross_entropy(logits, batch.labels).mean(where=batch.is_real)

  def _steps(
    self, experiment: Experiment, method: Method, num_steps: int
  ) -> Callable:
    """Makes what trains from a step of the epoch up to another one."""

    def steps(state, train, epoch, lr, start_and_stop):
      optimizer = program.optimizer(experiment, num_steps, lr)

      def batch_at(position):
        members = jax.tree.map(lambda x: x[position], epoch[:2])
        return self._batch(train, *members, epoch.key)

      def batch_grad_fn(params, batch_index):
        """The gradient of any batch, for methods that look at others, too."""
        position = jnp.argmax(epoch.batch_index == batch_index)
        return self._grad(params, batch_at(position))

      def step(i, state):
        batch = batch_at(i)
        grad_fn = lambda params: self._grad(params, batch)

        def factors_fn(params, whole):
          images = arrays.unflatten(batch.images, self._image_shape)
          model = self._model(params)
          return balanced.factors(model, images, batch.labels, whole)

        grads = grad_fn(state.params)
        return program.update(
          method,
          optimizer,
          state,
          grads,
          functools.partial(program.observe, grads),
          grad_fn=grad_fn,
          batch_index=epoch.batch_index[i],
          batch_grad_fn=batch_grad_fn,
          factors_fn=factors_fn,
        )

      # Not a scan: whatever the steps, it is this very program.
      return jax.lax.fori_loop(*start_and_stop, step, state)

    return steps

  def _snapshot(
    self, opt_state: Any, params: Any, train: Any, key: jax.Array
  ) -> Any:
    """Moves the snapshot to the present parameters."""
    size = self._common.batch_size
    full = self.num_examples - self.num_examples % size
    indices = np.split(np.arange(self.num_examples, dtype=np.int32), [full])

    def piece_grad(params, piece):
      """The mean over a piece, batch by batch."""
      batches = piece.reshape(-1, min(size, len(piece)))

      def add(total, examples):
        batch = self._batch(train, examples, None, key)
        return optax.tree.add(total, self._grad(params, batch)), None

      total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), batches)
      return optax.tree.scale(1 / len(batches), total)

    pieces = [piece for piece in indices if len(piece)]
    return optax_svrg.take_snapshot(
      opt_state,
      params,
      lambda p: optax_svrg.mean_gradient(piece_grad, p, pieces),
    )

  def _batch(
    self, train: Any, indices: jax.Array, is_real: Any, key: jax.Array
  ) -> Batch:
    """Examples, augmented as this epoch has it."""
    images, labels = (x[indices] for x in train)
    augment = self._common.augment
    images = arrays.augment(augment, key, indices, images, self._image_shape)
    return Batch(images, labels, is_real)

  def _keys(
    self, experiment: Experiment, seed: int, epoch: int
  ) -> list[jax.Array]:
    """Of an epoch and of the fixed batches, the same for all methods."""
    _, key = jax.random.split(jax.random.key(seed))
    return [jax.random.fold_in(key, i) for i in (epoch, experiment.epochs)]

  def _draw(
    self,
    method: Method,
    steps: int,
    own: Any,
    key: jax.Array,
    fixed_key: jax.Array,
  ) -> tuple[Any, Epoch]:
    """Draws an epoch; ``own`` is the state of the method."""
    size = self._common.batch_size
    if not method.has_fixed_batches:
      order = jax.random.permutation(key, self.num_examples)
      if method.next_order is not None:
        own = method.next_order(own, order, steps)
        order = own.order
      # The remainder of the epoch is dropped, as the authors do by default.
      indices = order[: steps * size].reshape(steps, size)
      return own, Epoch(indices, None, jnp.arange(steps), key)
    batches = np.array_split(np.arange(self.num_examples), steps)
    longest = max(map(len, batches))
    # Short batches are filled with what does not count.
    padded = np.stack([np.resize(b, longest) for b in batches])
    is_real = np.arange(longest) < np.array([[len(b)] for b in batches])
    members = jax.random.permutation(fixed_key, self.num_examples)
    order_key = fixed_key if method.has_fixed_order else key
    order = jax.random.permutation(order_key, steps)
    real = None if is_real.all() else jnp.asarray(is_real)[order]
    return own, Epoch(members[padded][order], real, order, key)

  def _evaluate_fn(
    self, params: optax.Params, train: Any, validation: Any
  ) -> dict[str, jax.Array]:
    model = self._model(params)

    def evaluated(example):
      image, label = example
      logits = model(arrays.unflatten(image, self._image_shape))[0]
      return _cross_entropy(logits, label), logits.argmax() == label

    (train_loss, _), (loss, accuracy) = (
      [x.mean() for x in jax.lax.map(evaluated, part, batch_size=_PIECE_SIZE)]
      for part in (train, validation)
    )
    return {
      "train_loss": train_loss,
      "validation_accuracy": accuracy,
      "validation_loss": loss,
    }


def _compile(fn: Callable, args: tuple, donate: tuple[int, ...] = ()) -> Any:
  return jax.jit(fn, donate_argnums=donate).lower(*args).compile()
