# SPDX-License-Identifier: Apache-2.0
"""SVRG with the coefficient found in other ways than the library's."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

import optax_svrg


class CoefficientState(NamedTuple):
  """State of :func:`transform`."""

  svrg: optax_svrg.SVRGState  # State of the library's transformation.
  seen: jax.Array  # `num_snapshots` of `svrg` at the last update.
  # Averages of the inner products of the control variate with the gradient, one
  # for each array of parameters or one for all, both centred.
  covariance: jax.Array
  variance: jax.Array  # Averages of those of the control variate with itself.


def transform(
  decay: float = 0.97,
  current: bool = False,
  per_leaf: bool = False,
  kept: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """SVRG with a coefficient that is estimated."""
  svrg = optax_svrg.alpha_svrg(1.0)

  def inner_products(a, b):
    """Inner products of the arrays of two trees, or their sum; 1-D."""
    products = jnp.stack(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
    return products if per_leaf else products.sum(keepdims=True)

  def init_fn(params):
    state = svrg.init(params)
    zeros = jnp.zeros(len(jax.tree.leaves(params)) if per_leaf else 1)
    return CoefficientState(
      state, jnp.zeros_like(state.num_snapshots), zeros, zeros
    )

  def update_fn(updates, state, params=None, *, grad_fn, **extra_args):
    before = state.svrg
    control = optax.tree.sub(grad_fn(before.snapshot_params), before.mean_grads)
    centred = optax.tree.sub(updates, before.mean_grads)
    products = jnp.stack(
      [inner_products(x, control) for x in (centred, control)]
    )
    old = jnp.stack([state.covariance, state.variance])
    if not kept:
      old = jnp.where(before.num_snapshots != state.seen, 0, old)
    new = decay * old + (1 - decay) * products
    covariance, variance = new if current else old
    known = variance > 0
    ratio = jnp.where(known, covariance / jnp.where(known, variance, 1), 1)
    alpha = jnp.clip(ratio, 0, 1)
    after = before._replace(count=before.count + 1, alpha=alpha.mean())
    # A coefficient for each array, or one for all.
    treedef = jax.tree.structure(updates)
    alphas = treedef.unflatten(jnp.broadcast_to(alpha, treedef.num_leaves))
    made = jax.tree.map(lambda g, a, c: g - a * c, updates, alphas, control)
    return made, CoefficientState(after, before.num_snapshots, *new)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class OptimalState(NamedTuple):
  """State of :func:`optimal_svrg`."""

  svrg: optax_svrg.SVRGState  # State of the library's transformation.
  alphas: Any  # A coefficient for each component, set from outside.


def optimal_svrg() -> optax.GradientTransformationExtraArgs:
  """SVRG with a coefficient for each component, 1 until it is set."""
  svrg = optax_svrg.alpha_svrg(1.0)

  def init_fn(params):
    return OptimalState(svrg.init(params), jax.tree.map(jnp.ones_like, params))

  def update_fn(updates, state, params=None, *, grad_fn, **extra_args):
    s = grad_fn(state.svrg.snapshot_params)
    updates = corrected(updates, s, state.svrg.mean_grads, state.alphas)
    # For the record, as the paper draws it.
    alpha = mean_of_live(state.alphas)
    return updates, state._replace(svrg=state.svrg._replace(alpha=alpha))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def corrected(grads: Any, snapshot_grads: Any, mean: Any, alphas: Any) -> Any:
  """The corrected gradient; coefficients that are NaN count as 0."""
  return jax.tree.map(
    lambda g, s, m, a: g - jnp.nan_to_num(a) * (s - m),
    grads,
    snapshot_grads,
    mean,
    alphas,
  )


def mean_of_live(alphas: Any) -> jax.Array:
  """Mean over all components that have a coefficient, i.e. are not NaN."""
  return jnp.nanmean(jax.flatten_util.ravel_pytree(alphas)[0])
