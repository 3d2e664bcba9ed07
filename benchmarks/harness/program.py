# SPDX-License-Identifier: Apache-2.0
"""One training step, and the compiled functions around it."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import optax
import optax.contrib

import benchmarks
from benchmarks import models
from benchmarks.harness.experiment import Experiment
from benchmarks.methods import Context, Method

# Of two axes, but no matrices.
_NOT_DECAYED = ("bias", "class_token", "positions")


class Optimizer(NamedTuple):
  """An optimizer by its name."""

  # Makes it from a learning rate schedule.
  make: Callable[[optax.Schedule], optax.GradientTransformation]
  lr: float  # Its default peak learning rate.
  # The parameters to evaluate, from its state and those that it trains.
  evaluated: Callable[[Any, optax.Params], optax.Params] = (
    lambda state, params: params
  )


def is_decayed(params: optax.Params) -> Any:
  """Marks the parameters that weight decay applies to: the matrices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, p: p.ndim > 1 and path[-1].key not in _NOT_DECAYED, params
  )


def averaged(decay: float) -> optax.GradientTransformation:
  """Keeps an exponential moving average of the weights, as its state."""

  def update_fn(updates, average, params):
    moved = optax.apply_updates(params, updates)
    return updates, optax.incremental_update(moved, average, 1 - decay)

  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.copy, params), update_fn
  )


_DECAYED = {"weight_decay": 0.05, "mask": is_decayed}
_adamw = functools.partial(optax.adamw, **_DECAYED)
OPTIMIZERS = {
  "sgd": Optimizer(optax.sgd, lr=0.3),
  "momentum": Optimizer(functools.partial(optax.sgd, momentum=0.9), lr=0.1),
  "nesterov": Optimizer(
    functools.partial(optax.sgd, momentum=0.9, nesterov=True), lr=0.1
  ),
  "adamw": Optimizer(_adamw, lr=0.003),
  "nadamw": Optimizer(functools.partial(optax.nadamw, **_DECAYED), lr=0.003),
  "lion": Optimizer(functools.partial(optax.lion, **_DECAYED), lr=0.0003),
  "ademamix": Optimizer(
    functools.partial(optax.contrib.ademamix, **_DECAYED), lr=0.003
  ),
  "muon": Optimizer(
    functools.partial(
      optax.contrib.muon, weight_decay=0.05, weight_decay_mask=is_decayed
    ),
    lr=0.01,
  ),
  "schedule-free": Optimizer(
    lambda lr: optax.contrib.schedule_free(_adamw(lr, b1=0.0), lr, b1=0.9),
    lr=0.003,
    evaluated=optax.contrib.schedule_free_eval_params,
  ),
  "adamw-ema": Optimizer(
    lambda lr: optax.chain(_adamw(lr), averaged(0.99)),
    lr=0.003,
    evaluated=lambda state, params: state[-1],
  ),
}


class Observed(NamedTuple):
  """Sums over the steps of an epoch."""

  loss: jax.Array  # Losses of the batches; only of streams.
  # Gradients of a batch in addition to those of the steps.
  extra_gradients: jax.Array
  alpha: jax.Array  # Coefficients.
  # Square distances of the plain gradient from the mean gradient of the
  # snapshot or table; 0 without one.
  plain_moment: jax.Array
  # Square distances of the corrected gradient from it.
  corrected_moment: jax.Array


class TrainState(NamedTuple):
  """State of a training run."""

  params: optax.Params  # The parameters.
  opt_state: Any  # The states of the method and of the optimizer.
  observed: Observed  # Sums over the steps of the epoch so far.


class Program(NamedTuple):
  """Compiled functions of a method on a feed."""

  method: Method
  num_steps: int  # Of an epoch.
  # Makes a `TrainState` from parameters.
  init: Callable[[optax.Params], TrainState]
  # From a state, a seed, the number of an epoch, and whether to take a
  # snapshot, to the state and what `advance` needs of this epoch.
  begin: Callable[[TrainState, int, int, bool], tuple[TrainState, Any]]
  # From a state, the second result of `begin`, the peak learning rate, and two
  # steps of the epoch to the state after training from the one up to the other.
  advance: Callable[[TrainState, Any, float, int, int], TrainState]
  # From the second result of `begin` to the batches of the epoch, with a
  # leading axis; `None` where they do not fit into memory, and `advance` trains
  # whole epochs.
  batches: Callable[[Any], Any] | None = None


class Feed:
  """What feeds have in common: the model, and numbers of examples."""

  def __init__(
    self,
    experiment: Experiment,
    num_examples: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    **settings: Any,
  ):
    self._common = experiment
    self.num_examples = num_examples
    num_channels, height, width = image_shape
    if height != width:
      raise benchmarks.UserError(
        f"Images must be square, got {height} x {width} pixels."
      )
    self._make_model = functools.partial(
      models.MODELS[experiment.model],
      *(height, num_channels, num_classes),
      **{**experiment.model_settings, **settings},
    )
    model = nnx.eval_shape(lambda: self._make_model(rngs=nnx.Rngs(0)))
    self._model = functools.partial(nnx.merge, nnx.graphdef(model))

  def init(self, key: jax.Array) -> optax.Params:
    """Draws initial parameters."""
    model = self._make_model(rngs=nnx.Rngs(key))
    return nnx.as_pure(nnx.state(model, nnx.Param))

  def context(self, experiment: Experiment) -> Context:
    """Returns what a method is made for."""
    return Context(self.num_examples, experiment.batch_size, experiment.epochs)

  def finish(self, params: optax.Params) -> dict[str, Any]:
    """Returns what is measured at the end of a run in addition: nothing."""
    return {}


def optimizer(
  experiment: Experiment, num_steps: int, lr: Any
) -> optax.GradientTransformation:
  """Makes the optimizer of an experiment."""
  total = experiment.epochs * num_steps
  warmup = total // 10
  if experiment.warmup_epochs is not None:
    warmup = experiment.warmup_epochs * num_steps
  unit = optax.constant_schedule(1.0)
  if experiment.schedule == "cosine":
    unit = optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=1.0,
      warmup_steps=warmup,
      decay_steps=total,
      end_value=experiment.final_lr_share,
    )
  return OPTIMIZERS[experiment.optimizer].make(lambda step: lr * unit(step))


def nothing_observed() -> Observed:
  """Returns the sums over no step."""
  zero = jnp.zeros(())
  return Observed(zero, jnp.zeros((), int), zero, zero, zero)


def update(
  method: Method,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  grads: optax.Updates,
  observe: Callable[[optax.Updates, Any, Any], Observed],
  **extra_args: Any,
) -> TrainState:
  """Makes one step.

  ``observe`` gets the corrected gradient, and the method's states before and
  after.
  """
  # Without variance reduction, they are accepted and ignored.
  transform = optax.with_extra_args_support(method.transform)
  before, opt_state = state.opt_state
  corrected, after = transform.update(grads, before, state.params, **extra_args)
  updates, opt_state = optimizer.update(corrected, opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  seen = observe(corrected, before, after)
  observed = jax.tree.map(jnp.add, state.observed, seen)
  return TrainState(params, (after, opt_state), observed)


def observe(
  grads: optax.Updates, corrected: optax.Updates, before: Any, after: Any
) -> Observed:
  """Reads off a step and its correction, from the method's states around it."""
  seen = nothing_observed()
  mean_grads = optax.tree.get(before, "mean_grads")
  if mean_grads is not None:
    # The coefficient that this very step has used.
    alpha = optax.tree.get(after, "alpha")
    snapshots = optax.tree.get(before, "num_snapshots")
    if snapshots is None:
      extra_gradients = seen.extra_gradients
      known = optax.tree.get(before, "is_filled").all()
    else:
      known = snapshots > 0
      # An estimate needs the second gradient even where it is 0.
      estimated = optax.tree.get(after, "estimate") is not None
      extra_gradients = (known if estimated else alpha != 0).astype(int)
    moments = (
      optax.tree.norm(optax.tree.sub(g, mean_grads), squared=True)
      for g in (grads, corrected)
    )
    moments = (jnp.where(known, moment, 0) for moment in moments)
    seen = Observed(seen.loss, extra_gradients, alpha, *moments)
  # A method that computes further gradients by itself counts them by itself.
  counted = optax.tree.get(after, "extra_gradients")
  if counted is not None:
    counted -= optax.tree.get(before, "extra_gradients")
    seen = seen._replace(extra_gradients=counted)
  return seen
