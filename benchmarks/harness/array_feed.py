# SPDX-License-Identifier: Apache-2.0
"""Training on arrays: all examples in memory, batches gathered by index."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import models
from benchmarks.data import arrays
from benchmarks.harness import program
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.program import Observed, Program, TrainState
from benchmarks.methods import balanced, Context, Method
import optax_svrg

_PIECE_SIZE = 128  # Examples evaluated at once, which fit into a cache.
_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Keys(NamedTuple):
  """Random keys, or their data."""

  epoch: Any  # For the order of the examples and for augmentation.
  batches: Any  # For fixed batches, the same in all epochs.


class Order(NamedTuple):
  """The examples of each step of an epoch."""

  examples: Any  # Their indices, step by step.
  is_real: Any  # Which of them count, ``None`` for all.
  batch_index: Any  # The number of each batch.


class Batch(NamedTuple):
  """Flattened images and their classes."""

  images: jax.Array
  labels: jax.Array
  is_real: Any = None  # Which of them count, ``None`` for all.


class ArrayFeed:
  """Makes the programs of an experiment on arrays."""

  def __init__(self, experiment: Experiment, dataset: arrays.Dataset):
    self._common = experiment
    dataset = arrays.first(
      dataset, experiment.train_examples, experiment.validation_examples
    )
    if experiment.label_noise:
      dataset = arrays.with_wrong_labels(dataset, experiment.label_noise)
    self._image_shape = dataset.image_shape
    self.num_examples = len(dataset.train_labels)
    self._make_model = models.maker(
      experiment.model,
      dataset.image_shape,
      dataset.num_classes,
      experiment.model_settings,
    )
    self._train, validation = jax.device_put(
      (
        (dataset.train_images, dataset.train_labels),
        (dataset.validation_images, dataset.validation_labels),
      )
    )
    self._graphdef = nnx.graphdef(self._make_model(nnx.Rngs(0)))
    self._passed = _whole_and_rest(self.num_examples, experiment.batch_size)
    self._evaluated = tuple(
      (x, _whole_and_rest(len(x[1]), _PIECE_SIZE))
      for x in (self._train, validation)
    )
    params = self.init(jax.random.key(0))
    self._evaluate = _compile(self._evaluate_fn, (params, *self._evaluated))
    self.nothing_observed = jax.jit(program.nothing_observed)
    self._grad = jax.grad(self.loss)

  def init(self, key: jax.Array) -> optax.Params:
    """Draws initial parameters."""
    return nnx.as_pure(nnx.state(self._make_model(nnx.Rngs(key)), nnx.Param))

  def measure(
    self, params: optax.Params, observed: Observed | None, num_steps: int
  ) -> dict[str, float]:
    """Returns fields of :class:`Point`, over all examples."""
    found = self._evaluate(params, *self._evaluated)
    return {name: float(value) for name, value in found.items()}

  def finish(self, params: optax.Params) -> Mapping[str, Any]:
    """Returns what is measured at the end of a run in addition: nothing."""
    return {}

  def program(self, experiment: Experiment, method: Method) -> Program:
    """Compiles the functions of a method."""
    context = self.context(experiment)
    num_steps = method.num_steps(context)

    @jax.jit
    def init(params):
      tx = program.optimizer(experiment, num_steps, experiment.lr)
      states = method.transform.init(params), tx.init(params)
      return TrainState(params, states, program.nothing_observed())

    draw_order = jax.jit(
      functools.partial(self._order, context, method), donate_argnums=1
    )
    state = init(self.init(jax.random.key(0)))
    keys = self._keys(experiment, 0, 0)
    steps = self._steps(experiment, method, num_steps)
    _, order = jax.eval_shape(draw_order, keys, state.opt_state[0])
    args = state, self._train, (order, keys)
    steps = _compile(steps, (*args, np.float32(0), np.zeros(2, np.int32)), (0,))
    take = None
    if method.coefficient is not None:
      args = state.opt_state, state.params, self._train, self._passed, keys
      take = _compile(self._snapshot, args, (0,))

    def begin(state, seed, epoch, with_snapshot):
      keys = self._keys(experiment, seed, epoch)
      own, order = draw_order(keys, state.opt_state[0])
      state = state._replace(opt_state=(own, state.opt_state[1]))
      if with_snapshot:
        opt_state = take(
          state.opt_state, state.params, self._train, self._passed, keys
        )
        state = state._replace(opt_state=opt_state)
      return state, (order, keys)

    def advance(state, epoch, lr, start, stop):
      bounds = np.array([start, stop], np.int32)
      return steps(state, self._train, epoch, np.float32(lr), bounds)

    batches = functools.partial(jax.jit(self._batches), self._train)
    pass_examples = num_examples = self.num_examples
    if not method.has_fixed_batches:
      num_examples = num_steps * experiment.batch_size
    return Program(
      init, begin, advance, batches, num_steps, num_examples, pass_examples
    )

  def context(self, experiment: Experiment) -> Context:
    """Returns what a method is made for."""
    return Context(self.num_examples, experiment.batch_size, experiment.epochs)

  def loss(self, params: optax.Params, batch: Batch) -> jax.Array:
    """Returns the mean cross-entropy of the examples that count."""
    model = nnx.merge(self._graphdef, params)
    logits = model(arrays.unflatten(batch.images, self._image_shape))
    return _cross_entropy(logits, batch.labels).mean(where=batch.is_real)

  def _factors(
    self, params: optax.Params, batch: Batch, whole: bool
  ) -> balanced.Factors:
    model = nnx.merge(self._graphdef, params)
    images = arrays.unflatten(batch.images, self._image_shape)
    return balanced.factors(model, images, batch.labels, whole)

  def _steps(
    self, experiment: Experiment, method: Method, num_steps: int
  ) -> Callable:
    """Makes what trains from a step of the epoch up to another one."""

    def steps(state, train, epoch, lr, start_and_stop):
      order, keys = epoch
      optimizer = program.optimizer(experiment, num_steps, lr)

      def batch_at(position):
        examples, is_real, _ = jax.tree.map(lambda x: x[position], order)
        return self._batch(train, examples, is_real, keys)

      def batch_grad_fn(params, batch_index):
        """The gradient of any batch, for methods that look at others, too."""
        position = jnp.argmax(order.batch_index == batch_index)
        return self._grad(params, batch_at(position))

      def step(i, state):
        batch = batch_at(i)
        grad_fn = lambda params: self._grad(params, batch)
        grads = grad_fn(state.params)
        after, corrected = program.update(
          method,
          optimizer,
          state,
          grads,
          grad_fn=grad_fn,
          batch_index=order.batch_index[i],
          batch_grad_fn=batch_grad_fn,
          factors_fn=lambda params, whole: self._factors(params, batch, whole),
        )
        seen = program.observe(
          grads, corrected, state.opt_state[0], after.opt_state[0]
        )
        observed = jax.tree.map(jnp.add, state.observed, seen)
        return after._replace(observed=observed)

      # Not a scan: whatever the steps, it is this very program.
      return jax.lax.fori_loop(*start_and_stop, step, state)

    return steps

  def _snapshot(
    self, opt_state: Any, params: Any, train: Any, passed: list, keys: Keys
  ) -> Any:
    """Moves the snapshot to the present parameters."""

    def piece_grad(params, piece):
      """The mean over a piece, batch by batch."""
      batches = _in_batches(piece, self._common.batch_size)

      def add(total, examples):
        batch = self._batch(train, examples, None, keys)
        return optax.tree.add(total, self._grad(params, batch)), None

      total, _ = jax.lax.scan(add, optax.tree.zeros_like(params), batches)
      return optax.tree.scale(1 / len(batches), total)

    return optax_svrg.take_snapshot(
      opt_state,
      params,
      lambda p: optax_svrg.mean_gradient(piece_grad, p, passed),
    )

  def _batches(self, train: Any, epoch: tuple[Order, Keys]) -> Batch:
    """All batches of an epoch, with a leading axis."""
    order, keys = epoch
    batch = lambda x: self._batch(train, *x, keys)
    return jax.lax.map(batch, (order.examples, order.is_real))

  def _batch(
    self, train: Any, indices: jax.Array, is_real: Any, keys: Keys
  ) -> Batch:
    """Examples, augmented as this epoch has it."""
    images, labels = (x[indices] for x in train)
    key = jax.random.wrap_key_data(keys.epoch)
    augment = self._common.augment
    images = arrays.augment(augment, key, indices, images, self._image_shape)
    return Batch(images, labels, is_real)

  def _keys(self, experiment: Experiment, seed: int, epoch: int) -> Keys:
    """The data of the keys of an epoch, the same for all methods."""
    _, key = jax.random.split(jax.random.key(seed))
    keys = (jax.random.fold_in(key, i) for i in (epoch, experiment.epochs))
    return Keys(*(np.asarray(jax.random.key_data(key)) for key in keys))

  def _order(
    self, context: Context, method: Method, keys: Keys, own: Any
  ) -> tuple[Any, Order]:
    """Draws which examples are in each step, also by a method's own state."""
    size, steps = context.batch_size, method.num_steps(context)
    keys = Keys(*map(jax.random.wrap_key_data, keys))
    if not method.has_fixed_batches:
      order = jax.random.permutation(keys.epoch, self.num_examples)
      if method.next_order is not None:
        own = method.next_order(own, order, steps)
        order = own.order
      # The remainder of the epoch is dropped, as the authors do by default.
      indices = order[: steps * size].reshape(steps, size)
      return own, Order(indices, None, jnp.arange(steps))
    batches = np.array_split(np.arange(self.num_examples), steps)
    longest = max(map(len, batches))
    # Short batches are filled with what does not count.
    padded = np.stack([np.resize(b, longest) for b in batches])
    is_real = np.arange(longest) < np.array([[len(b)] for b in batches])
    members = jax.random.permutation(keys.batches, self.num_examples)
    key = keys.batches if method.has_fixed_order else keys.epoch
    order = jax.random.permutation(key, steps)
    return own, Order(
      members[padded][order],
      None if is_real.all() else jnp.asarray(is_real)[order],
      order,
    )

  def _evaluate_fn(
    self, params: optax.Params, train: Any, validation: Any
  ) -> dict[str, jax.Array]:
    model = nnx.merge(self._graphdef, params)

    def mean(fn: Callable, store: Any, pieces: list) -> jax.Array:
      """Of a function of one example."""

      def values(indices):
        images, labels = (x[indices] for x in store)
        logits = model(arrays.unflatten(images, self._image_shape))
        return jax.vmap(fn)(logits, labels)

      return jnp.concatenate(
        [
          jax.lax.map(values, _in_batches(piece, _PIECE_SIZE)).ravel()
          for piece in pieces
        ]
      ).mean()

    is_right = lambda logits, label: logits.argmax() == label
    return {
      "train_loss": mean(_cross_entropy, *train),
      "validation_accuracy": mean(is_right, *validation),
      "validation_loss": mean(_cross_entropy, *validation),
    }


def _whole_and_rest(num_examples: int, size: int) -> list[jax.Array]:
  """Indices of all examples that fill batches, and of the remainder."""
  full = num_examples - num_examples % size
  indices = np.arange(num_examples, dtype=np.int32)
  return [jnp.asarray(part) for part in np.split(indices, [full]) if len(part)]


def _in_batches(indices: jax.Array, size: int) -> jax.Array:
  return indices.reshape(-1, min(size, len(indices)))


def _compile(fn: Callable, args: tuple, donate: tuple[int, ...] = ()) -> Any:
  return jax.jit(fn, donate_argnums=donate).lower(*args).compile()
