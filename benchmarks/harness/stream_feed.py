# SPDX-License-Identifier: Apache-2.0
"""Training on streams: images read ahead, augmented by the paper's recipe."""

from collections.abc import Callable, Iterator, Mapping
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks.data import recipe, sources, streams
from benchmarks.harness import program
from benchmarks.harness.experiment import Experiment
from benchmarks.harness.program import Observed, Program, TrainState
from benchmarks.methods import Method
import optax_svrg

_AXIS = "data"
_KEPT_BYTES = 2**29  # Of augmented images.


class Mixed(NamedTuple):
  """A batch as a model sees it; every draw is made."""

  images: jax.Array  # Float32, (batch, image_size, image_size, channels).
  targets: jax.Array  # Float32, (batch, classes), the probabilities.
  weights: jax.Array  # Float32, (batch,), 1, or 0 for padding.
  index: jax.Array  # Int32, see :class:`streams.Batch`.
  drop_key: jax.Array  # Of stochastic depth.


class _Subset:
  """Examples drawn from a source, as the first ones may be of one class."""

  def __init__(self, source: sources.Source, size: int | None):
    self._source = source
    order = np.random.default_rng(0).permutation(len(source))
    self._indices = np.sort(order[:size])

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Mapping[str, Any]:
    return self._source[int(self._indices[index])]


class StreamFeed(program.Feed):
  """Makes the programs of an experiment on streams."""

  def __init__(
    self,
    experiment: Experiment,
    images: sources.ImageData,
    remat: bool = False,
    num_workers: int = 0,
  ):
    self._num_workers = num_workers
    self._train = _Subset(images.train, experiment.train_examples)
    self._validation = _Subset(
      images.validation, experiment.validation_examples
    )
    size = experiment.image_size
    shape = images.num_channels, size, size
    super().__init__(
      experiment, len(self._train), shape, images.num_classes, remat=remat
    )
    self._recipe = recipe.Recipe(size, images.num_channels, images.num_classes)
    self._mesh = jax.make_mesh(
      (jax.device_count(),), (_AXIS,), axis_types=(AxisType.Auto,)
    )
    self._divided = NamedSharding(self._mesh, P(_AXIS))
    self._replicated = NamedSharding(self._mesh, P())
    self.init = jax.jit(super().init, out_shardings=self._replicated)
    # By itself, so that it is compiled once for all methods.
    self._mix = jax.jit(
      self._mix_fn,
      out_shardings=Mixed(*[self._divided] * 3, *[self._replicated] * 2),
    )
    # By itself as well, and so that both gradients of a batch are of the very
    # same program.
    self._loss_and_grad = jax.jit(
      jax.value_and_grad(self.loss), out_shardings=self._replicated
    )
    self._evaluate = jax.jit(self._evaluate_fn)

  def measure(self, params: optax.Params) -> Mapping[str, float]:
    """Returns the fields of :class:`Point` that are not of the steps."""
    return {"validation_accuracy": self._mean(params, self._validation)[1]}

  def finish(self, params: optax.Params) -> dict[str, Any]:
    """Returns the loss over the training images as they are."""
    loss, _ = self._mean(params, self._train)
    num_params = optax.tree.size(params)
    return {"clean_train_loss": loss, "num_params": num_params}

  def program(self, experiment: Experiment, method: Method) -> Program:
    """Compiles the functions of a method, for all seeds."""
    num_steps = method.num_steps(self.context(experiment))
    make = functools.partial(program.optimizer, experiment, num_steps)
    tx = optax.chain(method.transform, make(0.0))
    # The parameters are on all devices, what the optimizer keeps is divided
    # among them, notably tables of gradients.
    shardings = optax_svrg.state_shardings(
      tx,
      jax.tree.map(
        lambda p: p.update(sharding=divided(self._mesh, p)),
        jax.eval_shape(self.init, jax.random.key(0)),
      ),
    )
    placed = TrainState(self._replicated, shardings, self._replicated)

    @functools.partial(jax.jit, out_shardings=placed)
    def init(params):
      return TrainState(params, tx.init(params), program.nothing_observed())

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def take(opt_state, params, mean):
      return optax_svrg.take_snapshot(opt_state, params, lambda _: mean)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=placed)
    def update(state, loss_and_grads, index, snapshot, lr):
      loss, grads = loss_and_grads
      extra_gradients = 0
      if snapshot is None:
        snapshot = grads  # There is none yet, or no method that would use it.
      elif isinstance(snapshot, optax_svrg.GradientTable):
        snapshot = snapshot[index]
      else:
        extra_gradients = 1

      def observe(corrected, before, after):
        alpha = optax.tree.get(after, "alpha", jnp.zeros(()))
        return Observed(loss, extra_gradients, alpha, 0, 0)

      return program.update(
        method,
        make(lr),
        state,
        grads,
        observe,
        snapshot_grads=snapshot,
        batch_index=index,
      )

    def begin(state, seed, epoch, with_snapshot):
      batches = functools.partial(self.batches, experiment, method, seed, epoch)
      if not with_snapshot:
        return state, (batches, None, None)
      params, table, copied = state.params, None, None
      if experiment.keeps_table:
        mean, table = optax_svrg.gradient_table(
          self.grad, params, batches(), num_batches=num_steps
        )
      else:
        mean = optax_svrg.mean_gradient(self.grad, params, batches())
        # Whole on each device, unlike that of the state, for all steps.
        copied = jax.tree.map(jnp.copy, params)
      opt_state = take(state.opt_state, params, mean)
      return state._replace(opt_state=opt_state), (batches, table, copied)

    def advance(state, epoch, lr, start, stop):
      batches, table, copied = epoch
      # So that no process waits for another one for ever.
      for batch in optax_svrg.lockstep(batches()):
        snapshot = table if copied is None else self.grad(copied, batch)
        loss_and_grads = self._loss_and_grad(state.params, batch)
        state = update(
          state, loss_and_grads, batch.index, snapshot, np.float32(lr)
        )
      return state

    return Program(method, num_steps, init, begin, advance)

  def batches(
    self, experiment: Experiment, method: Method, seed: int, epoch: int
  ) -> Iterator[Mixed]:
    """Returns the batches of an epoch, the same ones at each call."""
    visits = streams.Visits(
      self.num_examples,
      experiment.batch_size,
      seed,
      has_fixed_batches=method.has_fixed_batches,
    )
    steps = visits.steps_per_epoch
    _, key = jax.random.split(jax.random.key(seed))
    # Its data, as all processes have them.
    mix = functools.partial(self._mix, np.asarray(jax.random.key_data(key)))
    return map(mix, self._stream(visits, epoch * steps, (epoch + 1) * steps))

  def loss(self, params: optax.Params, batch: Mixed) -> jax.Array:
    """Returns the mean cross-entropy of the examples that count."""
    rngs = nnx.Rngs(dropout=batch.drop_key)
    logits = self._model(params)(batch.images, rngs=rngs)
    losses = optax.losses.softmax_cross_entropy(logits, batch.targets)
    return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

  def grad(self, params: optax.Params, batch: Mixed) -> optax.Updates:
    """Returns the gradient of :meth:`loss`."""
    return self._loss_and_grad(params, batch)[1]

  @functools.cached_property
  def _stream(self) -> Callable:
    """Batches of steps, kept where they fit into memory."""
    stream = functools.partial(
      streams.train_batches,
      self._train,
      self._recipe,
      sharding=self._divided,
      num_workers=self._num_workers,
    )
    epochs = self._common.epochs
    size = self.num_examples * self._common.image_size**2
    if epochs * size * self._recipe.num_channels > _KEPT_BYTES:
      return stream
    # All passes and methods see the same images, with fixed batches or not.
    return functools.lru_cache(maxsize=2 * epochs)(
      lambda *args: list(stream(*args))
    )

  def _mix_fn(self, draw: jax.Array, batch: streams.Batch) -> Mixed:
    """Makes the draws of a batch, which follow from the number of its step."""
    key = jax.random.fold_in(jax.random.wrap_key_data(draw), batch.step)
    mix_key, drop_key = jax.random.split(key)
    images, targets = recipe.mix(
      self._recipe, mix_key, batch.images, batch.labels
    )
    return Mixed(images, targets, batch.weights, batch.index, drop_key)

  def _evaluate_fn(
    self, params: optax.Params, batch: streams.Batch
  ) -> list[jax.Array]:
    """Sums of the losses and of the correct answers of a batch."""
    images = recipe.standardise(self._recipe, batch.images)
    logits = self._model(params)(images)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch.labels
    )
    is_right = jnp.argmax(logits, axis=-1) == batch.labels
    return [
      jnp.sum(jnp.where(batch.weights > 0, x, 0)) for x in (losses, is_right)
    ]

  def _mean(self, params: optax.Params, source: sources.Source) -> list[float]:
    """Loss and accuracy over the images of a source, as they are."""
    size, workers = self._common.batch_size, self._num_workers
    batches = streams.validation_batches(
      source, self._recipe, size, self._divided, workers
    )
    sums = [self._evaluate(params, batch) for batch in batches]
    return [sum(map(float, x)) / len(source) for x in zip(*sums, strict=True)]


def divided(mesh: Any, leaf: Any) -> NamedSharding:
  """Divides the last axis that can be divided among all devices."""
  divisible = [size and size % mesh.size == 0 for size in leaf.shape]
  last = max((i for i, fits in enumerate(divisible) if fits), default=None)
  return NamedSharding(
    mesh, P(*(_AXIS if i == last else None for i in range(leaf.ndim)))
  )
