# SPDX-License-Identifier: Apache-2.0
"""Measurements during training, for experiments of the feed ``"arrays"``."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness.program import Program, TrainState
from benchmarks.methods import coefficients, Method
import optax_svrg


class Variance:
  """Measures gradient variance and the best coefficient at frozen weights.

  Over all batches of the epoch, before some of its steps, the ``stops``, which
  are as many as ``points``. What a method does not have is NaN. The result, as
  JSON, has a list for each of the following, by moment:

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

  def __init__(self, loss: Callable, program: Program, points: int):
    self._num_steps = n = program.num_steps
    self._measure = jax.jit(functools.partial(_variance, loss, program.method))
    self.stops = {*np.linspace(0, n - 1, points, dtype=int).tolist()}
    self.result: dict[str, list[float]] = {}

  def look(
    self, epoch: int, step: int, batches: Any, state: TrainState
  ) -> TrainState:
    """Measures, and sets the coefficients of ``"optimal"``."""
    before, opt_state = state.opt_state
    measured, alphas = self._measure(state.params, before, batches)
    measured = {"epoch": epoch + step / self._num_steps, **measured}
    for name, value in measured.items():
      self.result.setdefault(name, []).append(float(f"{value:.6g}"))
    if isinstance(before, coefficients.OptimalState):
      before = before._replace(alphas=alphas)
    return state._replace(opt_state=(before, opt_state))


def _variance(
  loss: Callable, method: Method, params: Any, state: Any, batches: Any
) -> tuple[dict[str, Any], Any]:
  """Measurements of :class:`Variance`, and the best coefficients."""

  def all_grads(params):
    return jax.lax.map(lambda batch: jax.grad(loss)(params, batch), batches)

  grads = all_grads(params)
  plain = optax_svrg.gradient_variance(grads)
  measured = {
    "train_loss": jax.lax.map(lambda b: loss(params, b), batches).mean(),
    "alpha": 0.0,
    "optimal_component": jnp.nan,
    "optimal_tree": jnp.nan,
    "variance_ratio": 1.0,
    "estimated_ratio": optax.tree.get(state, "variance_ratio", jnp.nan),
  }
  snapshot = optax.tree.get(state, "snapshot_params")
  if snapshot is None:
    return {**measured, **plain._asdict()}, None
  snapshot_grads = all_grads(snapshot)
  # Within the bounds of the authors' code.
  best = jax.tree.map(
    lambda a: jnp.clip(a, -2, 2),
    optax_svrg.optimal_alpha(grads, snapshot_grads),
  )
  if isinstance(state, coefficients.OptimalState):
    alphas, alpha = best, coefficients.mean_of_live(best)
  else:
    first = lambda tree: jax.tree.map(lambda x: x[0], tree)
    _, after = method.transform.update(
      first(grads), state, params, snapshot_grads=first(snapshot_grads)
    )
    alpha = optax.tree.get(after, "alpha")
    alphas = jax.tree.map(lambda _: alpha, params)
  corrected = optax_svrg.gradient_variance(
    jax.vmap(coefficients.corrected, (0, 0, None, None))(
      grads, snapshot_grads, optax.tree.get(state, "mean_grads"), alphas
    )
  )
  measured |= {
    "alpha": alpha,
    "optimal_component": coefficients.mean_of_live(best),
    "optimal_tree": optax_svrg.optimal_alpha(grads, snapshot_grads, per="tree"),
    "variance_ratio": corrected.total_variance / plain.total_variance,
  }
  return {**measured, **corrected._asdict()}, best
