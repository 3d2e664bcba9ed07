# SPDX-License-Identifier: Apache-2.0
"""Measurements during training, by name.

An experiment names its observers and their settings in ``measure``.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.experiment import Experiment
from benchmarks.harness.program import TrainState
from benchmarks.methods import Method, optimal
import optax_svrg


class View(NamedTuple):
  """Training at one moment, for an observer.

  Attributes:
    epoch: number of the epoch.
    step: number of the next step in it.
    num_steps: number of steps of an epoch.
    method: the method.
    loss: loss of a batch, a function of the parameters and of it.
    batches: all batches of the epoch, with a leading axis.
  """

  epoch: int
  step: int
  num_steps: int
  method: Method
  loss: Callable[[optax.Params, Any], jax.Array]
  batches: Any


class Observer(Protocol):
  """Measures during training, on the feed ``"arrays"``."""

  def stops(self, num_steps: int) -> Iterable[int]:
    """Returns the steps of each epoch before which :meth:`look` is called."""

  def look(self, view: View, state: TrainState) -> TrainState:
    """Measures; returns the state to go on from, usually the same."""

  def result(self) -> Mapping[str, Any]:
    """Returns what was measured, as JSON, for :attr:`Run.measured`."""


class Variance:
  """Measures gradient variance and the best coefficient at frozen weights.

  Over all batches of the epoch. What a method does not have is NaN. The result
  has a list for each of the following, by moment:

  * ``epoch``: number of epochs trained, with a fraction;
  * ``train_loss``: mean loss over the batches;
  * ``cosine_distance``, ``total_variance`` and ``spectral_norm`` of the
    corrected gradients, see :class:`optax_svrg.GradientVariance`;
  * ``alpha``: coefficient of the next step; its mean for one per component;
  * ``optimal_component``: mean of the best coefficients of all components;
  * ``optimal_tree``: the best single coefficient;
  * ``variance_ratio``: variance of the corrected gradients divided by that of
    the plain ones;
  * ``estimated_ratio``: its online estimate by adaptive SVRG.

  The method ``"optimal"`` gets its coefficients from these measurements.
  """

  def __init__(self, points: int):
    self._points = points
    self._found: dict[str, list[float]] = {}
    self._measure: Callable | None = None

  def stops(self, num_steps: int) -> set[int]:
    """Returns the steps of each epoch at which variance is measured."""
    last = num_steps - 1
    return {0, *np.linspace(0, last, self._points, dtype=int).tolist()}

  def look(self, view: View, state: TrainState) -> TrainState:
    """Measures, and sets the coefficients of ``"optimal"``."""
    if self._measure is None:
      self._measure = jax.jit(
        functools.partial(_variance, view.loss, view.method)
      )
    before, opt_state = state.opt_state
    measured, alphas = self._measure(state.params, before, view.batches)
    measured = {"epoch": view.epoch + view.step / view.num_steps, **measured}
    for name, value in measured.items():
      self._found.setdefault(name, []).append(float(f"{value:.6g}"))
    if isinstance(before, optimal.OptimalState):
      before = before._replace(alphas=alphas)
    return state._replace(opt_state=(before, opt_state))

  def result(self) -> Mapping[str, Any]:
    """Returns the measurements as ``"variance"``."""
    return {"variance": self._found}


def _variance(
  loss: Callable, method: Method, params: Any, state: Any, batches: Any
) -> tuple[dict[str, Any], Any]:
  """Measurements of :class:`Variance`, and the best coefficients."""

  def all_grads(params):
    return jax.lax.map(lambda batch: jax.grad(loss)(params, batch), batches)

  def measured(variance, alpha, component, tree, ratio, estimated):
    mean_loss = jax.lax.map(lambda batch: loss(params, batch), batches).mean()
    return {
      "train_loss": mean_loss,
      **variance._asdict(),
      "alpha": alpha,
      "optimal_component": component,
      "optimal_tree": tree,
      "variance_ratio": ratio,
      "estimated_ratio": estimated,
    }

  grads = all_grads(params)
  plain = optax_svrg.gradient_variance(grads)
  snapshot = optax.tree.get(state, "snapshot_params")
  if snapshot is None:
    return measured(plain, 0.0, jnp.nan, jnp.nan, 1.0, jnp.nan), None
  snapshot_grads = all_grads(snapshot)
  # Within the bounds of the authors' code.
  best = jax.tree.map(
    lambda a: jnp.clip(a, -2, 2),
    optax_svrg.optimal_alpha(grads, snapshot_grads),
  )
  if isinstance(state, optimal.OptimalState):
    alphas, alpha = best, optimal.mean_of_live(best)
  else:
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    _, after = method.transform.update(
      first(grads), state, params, snapshot_grads=first(snapshot_grads)
    )
    alpha = optax.tree.get(after, "alpha")
    alphas = jax.tree.map(lambda _: alpha, params)
  mean = optax.tree.get(state, "mean_grads")
  corrected = optax_svrg.gradient_variance(
    jax.vmap(optimal.corrected, (0, 0, None, None))(
      grads, snapshot_grads, mean, alphas
    )
  )
  return (
    measured(
      corrected,
      alpha,
      optimal.mean_of_live(best),
      optax_svrg.optimal_alpha(grads, snapshot_grads, per="tree"),
      corrected.total_variance / plain.total_variance,
      optax.tree.get(state, "variance_ratio", jnp.nan),
    ),
    best,
  )


OBSERVERS: dict[str, Callable[..., Observer]] = {"variance": Variance}


def make(experiment: Experiment) -> list[Observer]:
  """Makes the observers that an experiment names."""
  return [
    OBSERVERS[name](**settings) for name, settings in experiment.measure.items()
  ]
